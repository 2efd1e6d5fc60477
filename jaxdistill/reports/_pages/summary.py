"""A report in short: the verdict, the one table, the Markdown page; and the picture beside it.

What is unknown or undefined is a dash, and a model that was not measured has no column.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill.reports import figures
from jaxdistill.reports._format import (
  DASH,
  MODELS,
  Table,
  change,
  count,
  escaped,
  exact,
  fenced,
  grid,
  number,
  percent,
  tenths,
  whole,
)
from jaxdistill.reports._pages import significance
from jaxdistill.reports._pages.document import complete, model, sound_report

__all__ = [
  "QUANTITIES",
  "agreement",
  "confused",
  "gap_sentence",
  "markdown",
  "measured",
  "picture",
  "side_by_side",
  "table",
  "text",
  "verdict",
]


# A row of the one table: how a model's number is told.
QUANTITIES: dict[str, Callable[[Mapping[str, Any]], str]] = {
  "accuracy, %": lambda model: percent(model["accuracy"]),
  "top-5, %": lambda model: percent(model["top5"]),
  "negative log-likelihood": lambda model: number(model["nll"]),
  "calibration error, %": lambda model: percent(model["ece"]),
  "Brier score": lambda model: number(model["brier"]),
  "agrees with teacher, %": lambda model: percent(model["agreement"]),
  "instances": lambda model: whole(model["instances"]),
  "parameters": lambda model: whole(model["parameters"]),
  "bytes": lambda model: whole(model["bytes"]),
  "FLOPs an example": lambda model: count(model["flops"]),
  "FLOPs by XLA's count": lambda model: count(model["xla_flops"]),
  "latency, ms": lambda model: exact(model["latency_ms"]["median"]),
  "latency, 95th pct, ms": lambda model: exact(model["latency_ms"]["p95"]),
  "examples a second": lambda model: count(model["throughput"]),
}


def verdict(
  accuracy: Mapping[str, np.ndarray],
  gain: Mapping[str, Any] | None,
  agreement: Mapping[str, Any] | None = None,
) -> str:
  """Whether distillation helped, in one sentence; its error is that over seeds alone.

  It helps (or hurts) where Welch's test over seeds has p < 0.05, and seems to beyond one standard
  error. Whether other examples would say the same is the decision's question.

  Args:
    accuracy: ``[S]`` by model, of those where it was measured; values that are not finite are no
      part of it.
    gain: from `evaluation.metrics.difference` of student and baseline; None where there is no
      baseline.
    agreement: of the student with its teacher, the one thing that needs no labels.

  Returns:
    The sentence.
  """
  if "student" not in accuracy:
    agree = "" if agreement is None else f" It agrees with its teacher on {percent(agreement)}%."
    return f"The student's accuracy was not measured: no example has a label.{agree}"
  values = {name: found[np.isfinite(found)] for name, found in accuracy.items()}
  if not values["student"].size:
    return "Nothing is known of the student: its accuracy is not a number in any seed."
  student = values["student"].mean()
  if gain is None or not values.get("baseline", np.zeros(0)).size:
    why = "no usable baseline" if "baseline" in values else "no baseline (labels alone)"
    teacher = values.get("teacher", np.zeros(0))
    beside = f", the teacher's {100 * teacher.mean():.2f}%" if teacher.size else ""
    return (
      f"What distillation gained is unknown: there is {why}. The student's accuracy is "
      f"{100 * student:.2f}%{beside}."
    )
  baseline = values["baseline"].mean()
  error = gain["standard_error"]
  change = f"{100 * abs(student - baseline):.2f} points"
  where = f"({100 * student:.2f}% against {100 * baseline:.2f}%)"
  if error is None:
    word = "higher" if student > baseline else "lower or equal"
    return f"One seed: the distilled student's accuracy is {change} {word} {where}; no error known."
  margin = f"standard error of the difference over seeds {100 * error:.2f}"
  beyond = abs(student - baseline) / error if error else float("inf")
  if beyond > 1 and student != baseline:
    sure = significance.welch(values["student"], values["baseline"]) < 0.05
    if student > baseline:
      word = "helps" if sure else "seems to help"
      return f"Distillation {word}: {change} over labels alone {where}, {margin}."
    word = "hurts" if sure else "seems to hurt"
    return f"Distillation {word}: {change} under labels alone {where}, {margin}."
  return f"No difference beyond noise between distillation and labels alone {where}, {margin}."


def side_by_side(models: Mapping[str, Mapping[str, Any]], labels: Sequence[str]) -> Table:
  """What was measured of several models, a column each; no row of what was measured of none.

  Args:
    models: by name, with all that their rows are made of.
    labels: of the rows.
  """
  rows = [[label, *map(QUANTITIES[label], models.values())] for label in labels]
  caption = "Mean ± standard deviation over the seeds; no ± where there is one instance"
  return Table(["", *models], _known(rows), caption, sortable=False)


def _known(rows: Sequence[Sequence[str]]) -> list[Sequence[str]]:
  """Rows of which something was measured."""
  return [row for row in rows if set(row[1:]) != {DASH}]


def measured(report: Mapping[str, Any]) -> Table:
  """The one table of a complete report: quality, agreement with the teacher, and cost."""
  fidelity = {"baseline": report["baseline_fidelity"], "student": report["fidelity"]}
  agree = {name: one["agreement"] for name, one in fidelity.items() if one}
  models = report["models"].items()
  told = {name: {**one, "agreement": agree.get(name)} for name, one in models}
  return side_by_side(told, [label for label in QUANTITIES if label != "instances"])


def table(report: Mapping[str, Any]) -> str:
  """The one table: quality, agreement with the teacher, and cost of the models, as Markdown."""
  return measured(complete(report)).markdown()


def agreement(report: Mapping[str, Any]) -> Table:
  """How far baseline and student of a complete report agree with the teacher."""
  both = {"baseline": report["baseline_fidelity"], "student": report["fidelity"]}
  there = {name: one for name, one in both.items() if one}
  rows = [
    [label, *(show(one[key]) for one in there.values())]
    for key, label, show in (
      ("agreement", "same answer as the teacher, %", percent),
      ("kl", "KL to the teacher, nats", number),
      ("accuracy_where_teacher_wrong", "accuracy where the teacher is wrong, %", percent),
    )
  ]
  return Table(["", *there], _known(rows), "How far they agree with the teacher", sortable=False)


def gap_sentence(gap: Mapping[str, Any]) -> str:
  """The share of the gap closed, in a sentence."""
  if gap["value"] is None:
    return f"Share of the gap closed: undefined. {gap['note'] or ''}".strip()
  share = f"Share of the gap closed: {100 * gap['value']:.0f}%"
  if gap["low"] is None:
    return f"{share}."
  return f"{share} (95% bootstrap interval {100 * gap['low']:.0f} to {100 * gap['high']:.0f}%)."


def markdown(report: Mapping[str, Any]) -> str:
  """``report.md``: verdict, tables, how to repeat it.

  Args:
    report: from `reports.build_report`, or a file's; what is not as the schema has it is named
      among what is missing or broken, and left out.

  Returns:
    Markdown that reads as plain text too.
  """
  kept, wrong = sound_report(dict(report), "The report")
  told = complete({} if kept is None else kept)
  return text({**told, "problems": [*wrong, *told["problems"]]})


def text(told: Mapping[str, Any]) -> str:
  """The Markdown of a complete report."""
  title = f"# {escaped(told['dataset'] or DASH)}, {escaped(told['split'] or DASH)} split"
  lines = [title, "", escaped(told["verdict"] or "There is no verdict."), ""]
  lines += [gap_sentence(told["gap_closed"]), "", *_decided(told), *_numbers(told)]
  agree = agreement(told)
  if len(agree.head) > 1:
    lines += ["## How far they agree with the teacher", "", agree.markdown(), ""]
  lines += _by_groups(told)
  described = [
    f"- **{name}**: {escaped(one['description'])}" for name, one in told["models"].items()
  ]
  lines += ["## What they are", "", *described, ""] if described else []
  if any(one["accuracy_per_seed"] for one in told["models"].values()):
    lines += ["![accuracy](accuracy.png)", ""]
  where = {**dict.fromkeys(("python", "jax", "numpy"), DASH), **told["environment"]}
  lines += ["## How to repeat it", "", *fenced(told["commands"]), ""]
  python, jax, numpy = (escaped(where[name]) for name in ("python", "jax", "numpy"))
  lines += [f"Python {python}, jax {jax}, numpy {numpy}.", ""]
  return "\n".join(lines)


def _numbers(report: Mapping[str, Any]) -> list[str]:
  """The table, and how its numbers came about; nothing of no models."""
  if not report["models"]:
    return []
  names = ("processor", "cores", "device", "devices")
  where = {**dict.fromkeys(names, DASH), **report["environment"]}
  where = {name: escaped(where[name]) for name in names}
  size = "An unknown number of" if report["examples"] is None else f"{report['examples']:,}"
  batch = model(report, "student")["throughput_batch"] or DASH
  return [
    f"{size} examples. Mean ± standard deviation over {len(report['seeds'])} seeds "
    f"({escaped(report['varied'] or DASH)}); no ± where there is one instance. The last checkpoint "
    "of every run.",
    "",
    measured(report).markdown(),
    "",
    f"Latency is at batch 1, throughput at batch {batch}, on {where['processor']} "
    f"({where['cores']} cores), JAX device {where['device']} × {where['devices']}.",
    "",
  ]


def _decided(report: Mapping[str, Any]) -> list[str]:
  """What the page says of shipping the student, and what is missing or broken."""
  lines: list[str] = []
  decision = report["decision"]
  if decision:
    reasons = [f"- {escaped(one['side'])}: {escaped(one['text'])}" for one in decision["reasons"]]
    lines = [f"**{escaped(decision['word'])}.** {escaped(decision['sentence'])}", "", *reasons, ""]
  if report["problems"]:
    problems = (f"- {escaped(one)}" for one in report["problems"])
    lines += ["What is missing or broken:", "", *problems, ""]
  return lines


def _by_groups(report: Mapping[str, Any]) -> list[str]:
  """Classes and slices, where the report has them: classes that lost most come first."""
  counted = [row for row in report["classes"] if row["changes"].get("teacher")]
  counted.sort(key=lambda row: row["changes"]["teacher"]["change"])
  parts = [("class", "Classes that lost most", counted[:10] if report["classes"] else [])]
  parts += [(name, f"By {name}", rows) for name, rows in report["slices"].items()]
  lines: list[str] = []
  for name, title, rows in parts:
    if not rows:
      continue
    models = [m for m in MODELS if any(m in row["accuracy"] for row in rows)]
    shown = [[name, "examples", *models, "student − teacher"]]
    for row in rows:
      told = row["changes"].get("teacher") or {"change": None}
      mark = " (beyond noise)" if told.get("beyond_noise") else ""
      cells = [percent(row["accuracy"].get(m)) for m in models]
      shown.append([row["name"], str(row["examples"]), *cells, change(told["change"], None) + mark])
    lines += [f"## {escaped(title)}", "", grid(shown), ""]
  if report["confusions"]:
    lines += ["## Most frequent confusions", "", confused(report["confusions"][:10]).markdown(), ""]
  return lines


def confused(rows: Sequence[Mapping[str, Any]]) -> Table:
  """Which class the student takes for which, and how often the others do.

  Args:
    rows: from `analysis.confusions`.
  """
  models = [name for name in reversed(MODELS) if name in rows[0]["examples"]]
  body = [
    [
      row["label"],
      row["taken_for"],
      *(tenths(row["examples"][m]) for m in models),
      whole(row["of"]),
    ]
    for row in rows
  ]
  caption = "How many examples of a class are taken for another, a mean over seeds"
  return Table(["class", "taken for", *models, "of"], body, caption)


def picture(report: Mapping[str, Any], path: str | os.PathLike[str] | None = None) -> Any:
  """Accuracy of the models: every seed a dot, the mean with its standard deviation.

  Args:
    report: from `reports.build_report`.
    path: where the PNG goes; None writes none.

  Returns:
    The figure, Matplotlib's, which a notebook shows; None where no accuracy is known.
  """
  told = complete(report)
  labels = {"teacher": "teacher", "baseline": "labels alone", "student": "distilled"}
  values = {}
  for name, one in told["models"].items():
    each = [value for value in one["accuracy_per_seed"] if value is not None]
    if each:
      below = "" if one["parameters"] is None else f"\n{one['parameters']:,} parameters"
      values[labels[name] + below] = 100 * np.asarray(each, np.float64)
  if not values:
    return None
  return figures.models(
    path,
    values,
    ylabel=f"accuracy on the {told['split'] or DASH} split, %",
    title=f"{told['dataset'] or DASH}: {len(told['seeds'])} seeds, mean ± std",
  )
