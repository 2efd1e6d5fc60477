"""The report of a comparison: teacher, baseline (labels alone) and distilled student.

`build` makes the numbers of ``report.json``, whose schema is ``report.schema.json`` beside this
file; `write` puts them into a run's folder as JSON, Markdown and a picture.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import os
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxdistill import arguments, evaluate, metrics, pictures
from jaxdistill import run as run_lib
from jaxdistill.types import Batch

__all__ = [
  "Measured",
  "build",
  "environment",
  "markdown",
  "measure",
  "picture",
  "schema",
  "table",
  "write",
]

MODELS = ("teacher", "baseline", "student")
QUALITIES = ("accuracy", "top5", "nll", "ece", "brier")


@dataclasses.dataclass(frozen=True)
class Measured:
  """One model as `jaxdistill.evaluate` measured it.

  Attributes:
    quality: from `evaluate.evaluate`; arrays ``[S]`` over seeds, or scalars.
    costs: from `evaluate.costs`.
    description: what it is, in a few words.
  """

  quality: Mapping[str, np.ndarray]
  costs: Mapping[str, Any]
  description: str = ""


def measure(
  predict: evaluate.Predict,
  variables: Any,
  batches: Batch,
  *,
  reference: tuple[evaluate.Predict, Any] | None = None,
  stacked: bool = False,
  costs: Mapping[str, Any] | None = None,
  description: str = "",
) -> Measured:
  """Evaluates a model and what it costs.

  Args:
    predict: ``(variables, batch) -> logits``, see `evaluate.predictor`.
    variables: its variables; leaves ``[S, ...]`` when ``stacked``.
    batches: the split, from `jaxdistill.data.evaluation_batches`.
    reference: the teacher as ``(predict, variables)``.
    stacked: whether the variables are those of S seeds; costs are those of one.
    costs: from `evaluate.costs`, where another model of the same network was measured already:
      timing it twice would show the clock's noise as a difference.
    description: what it is, in a few words.

  Returns:
    The model's quality and costs.
  """
  one = jax.tree.map(lambda leaf: leaf[0], variables) if stacked else variables
  return Measured(
    quality=evaluate.evaluate(predict, variables, batches, reference=reference, stacked=stacked),
    costs=evaluate.costs(predict, one, batches) if costs is None else costs,
    description=description,
  )


def schema() -> dict[str, Any]:
  """The JSON schema that every ``report.json`` satisfies."""
  text = (importlib.resources.files("jaxdistill") / "report.schema.json").read_text()
  return json.loads(text)


def build(
  *,
  dataset: str,
  split: str,
  examples: int,
  seeds: Sequence[int],
  varied: str,
  teacher: Measured,
  baseline: Measured,
  student: Measured,
  commands: Sequence[str] = (),
) -> dict[str, Any]:
  """Assembles a report from three measured models.

  Args:
    dataset: the data set's name and version.
    split: which split was read.
    examples: how many examples it has.
    seeds: the seeds that baseline and student were trained from.
    varied: what the ± is over, in words.
    teacher: a single instance, or several.
    baseline: the student's network trained on labels alone.
    student: the distilled student, evaluated with the teacher as its reference.
    commands: how to repeat it.

  Returns:
    A dictionary that satisfies `schema`.
  """
  parts = {"teacher": teacher, "baseline": baseline, "student": student}
  _check_parts(parts, len(seeds))
  arguments.whole("examples", examples)
  accuracy = {name: np.atleast_1d(part.quality["accuracy"]) for name, part in parts.items()}
  gap = metrics.gap_closed(
    accuracy["teacher"], accuracy["baseline"], accuracy["student"], examples=examples
  )
  gain = metrics.difference(accuracy["student"], accuracy["baseline"])
  fidelity = ("agreement", "kl", "accuracy_where_teacher_wrong")
  report = {
    "dataset": dataset,
    "split": split,
    "examples": examples,
    "seeds": list(seeds),
    "varied": varied,
    "verdict": _verdict(accuracy, gain),
    "models": {name: _model(part) for name, part in parts.items()},
    "fidelity": {name: _spread(student.quality[name]) for name in fidelity},
    "baseline_fidelity": {name: _spread(baseline.quality[name]) for name in fidelity},
    "gain": gain,
    "gap_closed": gap,
    "environment": environment(),
    "commands": list(commands),
  }
  return run_lib.to_json(report)


def _check_parts(parts: Mapping[str, Any], seeds: int) -> None:
  for name, part in parts.items():
    if not isinstance(part, Measured):
      raise TypeError(f"{name} must be from report.measure, got {arguments.show(part)}.")
    fidelity = () if name == "teacher" else ("agreement", "kl", "accuracy_where_teacher_wrong")
    missing = sorted({*QUALITIES, *fidelity} - set(part.quality))
    if missing:
      raise ValueError(f"{name} lacks {missing}; measure it with reference=(predict, variables).")
    values = np.atleast_1d(part.quality["accuracy"])
    if not np.all((values >= 0) & (values <= 1)):
      raise ValueError(f"{name} has the accuracy {values}; it is a share of labelled examples.")
    if name != "teacher" and len(values) != seeds:
      raise ValueError(
        f"seeds has {seeds} and {name} {len(values)} instances; give each one's seed."
      )


def environment() -> dict[str, Any]:
  """Hardware and versions that the numbers were produced with."""
  return {
    "device": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
    "processor": _processor(),
    "cores": os.cpu_count(),
    "python": platform.python_version(),
    "jax": jax.__version__,
    "numpy": np.__version__,
  }


def _processor() -> str:
  """The processor's own name where the system tells it."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
  except (OSError, StopIteration):
    return platform.processor() or platform.machine()


def _spread(values: Any) -> dict[str, Any]:
  values = np.atleast_1d(values)
  if not np.all(np.isfinite(values)):  # undefined on this split: a teacher that is never wrong
    return {"mean": None, "std": None}
  mean, std = metrics.mean_std(values)
  return {"mean": mean, "std": std}


def _model(part: Measured) -> dict[str, Any]:
  values = np.atleast_1d(part.quality["accuracy"])
  return {
    "description": part.description,
    "instances": len(values),
    **{name: _spread(part.quality[name]) for name in QUALITIES},
    "accuracy_per_seed": values,
    **part.costs,
  }


def _verdict(accuracy: Mapping[str, np.ndarray], gain: Mapping[str, Any]) -> str:
  student, baseline = accuracy["student"].mean(), accuracy["baseline"].mean()
  error = gain["standard_error"]
  change = f"{100 * abs(student - baseline):.2f} points"
  where = f"({100 * student:.2f}% against {100 * baseline:.2f}%)"
  if error is None:
    word = "higher" if student > baseline else "lower or equal"
    return f"One seed: the distilled student's accuracy is {change} {word} {where}; no error known."
  margin = f"standard error of the difference {100 * error:.2f}"
  beyond = abs(student - baseline) / error if error else float("inf")
  if beyond > 1 and student != baseline:
    sure = beyond > 2
    if student > baseline:
      word = "helps" if sure else "seems to help"
      return f"Distillation {word}: {change} over labels alone {where}, {margin}."
    word = "hurts" if sure else "seems to hurt"
    return f"Distillation {word}: {change} under labels alone {where}, {margin}."
  return f"No difference beyond noise between distillation and labels alone {where}, {margin}."


def _percent(spread: Mapping[str, Any]) -> str:
  if spread["mean"] is None:
    return "–"
  mean = f"{100 * spread['mean']:.2f}"
  return mean if spread["std"] is None else f"{mean} ± {100 * spread['std']:.2f}"


def _number(spread: Mapping[str, Any]) -> str:
  if spread["mean"] is None:
    return "–"
  mean = f"{spread['mean']:.4f}"
  return mean if spread["std"] is None else f"{mean} ± {spread['std']:.4f}"


def _count(value: float | None) -> str:
  if value is None:
    return "–"
  for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
    if value >= unit:
      return f"{value / unit:.3g} {name}"
  return f"{value:.3g}"


def _grid(rows: Sequence[Sequence[str]]) -> str:
  """Rows as a Markdown table that is aligned as plain text too."""
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

  def line(row: Sequence[str]) -> str:
    cells = [
      row[0].ljust(widths[0]),
      *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
    ]
    return "| " + " | ".join(cells) + " |"

  rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
  return "\n".join([line(rows[0]), line(rule), *(line(row) for row in rows[1:])])


def table(report: Mapping[str, Any]) -> str:
  """The one table: quality, agreement with the teacher, and cost of the three models."""
  models = report["models"]
  agreement = {
    "teacher": "–",
    "baseline": _percent(report["baseline_fidelity"]["agreement"]),
    "student": _percent(report["fidelity"]["agreement"]),
  }
  rows = [["", *MODELS]]

  def add(label: str, show: Any) -> None:
    rows.append([label, *(show(models[name]) for name in MODELS)])

  add("accuracy, %", lambda m: _percent(m["accuracy"]))
  add("top-5, %", lambda m: _percent(m["top5"]))
  add("negative log-likelihood", lambda m: _number(m["nll"]))
  add("calibration error, %", lambda m: _percent(m["ece"]))
  add("Brier score", lambda m: _number(m["brier"]))
  rows.append(["agrees with teacher, %", *(agreement[name] for name in MODELS)])
  add("parameters", lambda m: f"{m['parameters']:,}")
  add("bytes", lambda m: f"{m['bytes']:,}")
  add("FLOPs an example", lambda m: _count(m["flops"]))
  add("FLOPs by XLA's count", lambda m: _count(m["xla_flops"]))
  add("latency, ms", lambda m: f"{m['latency_ms']['median']:.3f}")
  add("latency, 95th pct, ms", lambda m: f"{m['latency_ms']['p95']:.3f}")
  add("examples a second", lambda m: _count(m["throughput"]))
  return _grid(rows)


def _gap_sentence(gap: Mapping[str, Any]) -> str:
  if gap["value"] is None:
    return f"Share of the gap closed: undefined. {gap['note']}"
  share = f"Share of the gap closed: {100 * gap['value']:.0f}%"
  if gap["low"] is None:
    return f"{share}."
  return f"{share} (95% bootstrap interval {100 * gap['low']:.0f} to {100 * gap['high']:.0f}%)."


def markdown(report: Mapping[str, Any]) -> str:
  """``report.md``: the verdict, the tables, and how to repeat it."""
  models, where = report["models"], report["environment"]
  fidelity = [["", "baseline", "student"]]
  for name, label, show in (
    ("agreement", "agreement, %", _percent),
    ("kl", "KL to the teacher, nats", _number),
    ("accuracy_where_teacher_wrong", "accuracy where the teacher is wrong, %", _percent),
  ):
    both = (report["baseline_fidelity"][name], report["fidelity"][name])
    fidelity.append([label, *(show(spread) for spread in both)])
  lines = [
    f"# {report['dataset']}, {report['split']} split",
    "",
    report["verdict"],
    "",
    _gap_sentence(report["gap_closed"]),
    "",
    f"{report['examples']:,} examples. Mean ± standard deviation over "
    f"{len(report['seeds'])} seeds ({report['varied']}); no ± where there is one instance. The "
    "last checkpoint of every run.",
    "",
    table(report),
    "",
    "Latency is at batch 1, throughput at batch "
    f"{models['student']['throughput_batch']}, on {where['processor']} ({where['cores']} cores), "
    f"JAX device {where['device']} × {where['devices']}.",
    "",
    "## How far they agree with the teacher",
    "",
    _grid(fidelity),
    "",
    "## What they are",
    "",
    *(f"- **{name}**: {models[name]['description']}" for name in MODELS),
    "",
    "![accuracy](accuracy.png)",
    "",
    "## How to repeat it",
    "",
    "```",
    *report["commands"],
    "```",
    "",
    f"Python {where['python']}, jax {where['jax']}, numpy {where['numpy']}.",
    "",
  ]
  return "\n".join(lines)


def picture(report: Mapping[str, Any], path: str | os.PathLike[str] | None = None) -> Any:
  """Accuracy of the three models: every seed a dot, the mean with its standard deviation.

  Args:
    report: from `build`.
    path: where the PNG goes; None writes none.

  Returns:
    The figure, Matplotlib's, which a notebook shows.
  """
  labels = {"teacher": "teacher", "baseline": "labels alone", "student": "distilled"}
  models = report["models"]
  return pictures.models(
    path,
    {
      f"{labels[name]}\n{models[name]['parameters']:,} parameters": 100
      * np.asarray(models[name]["accuracy_per_seed"], np.float64)
      for name in MODELS
    },
    ylabel=f"accuracy on the {report['split']} split, %",
    title=f"{report['dataset']}: {len(report['seeds'])} seeds, mean ± std",
  )


def write(folder: str | os.PathLike[str], report: Mapping[str, Any]) -> pathlib.Path:
  """Writes ``report.json``, ``report.md`` and ``accuracy.png``.

  A report on another split than ``test`` gets the split's name: ``report-validation.json``.

  Args:
    folder: the run's folder.
    report: from `build`.

  Returns:
    The path of the Markdown report.
  """
  folder = arguments.folder("folder", folder)
  if not isinstance(report, Mapping) or "split" not in report:
    raise TypeError(f"report must be what report.build returns, got {arguments.show(report)}.")
  if not folder.is_dir():
    raise NotADirectoryError(f"folder={os.fspath(folder)!r} is no folder; give the run's.")
  suffix = "" if report["split"] == "test" else f"-{report['split']}"
  run_lib.write_json(folder / f"report{suffix}.json", report)
  picture(report, folder / f"accuracy{suffix}.png")
  text = markdown(report).replace("(accuracy.png)", f"(accuracy{suffix}.png)")
  path = folder / f"report{suffix}.md"
  path.write_text(text)
  return path
