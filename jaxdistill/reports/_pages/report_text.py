"""A report in words: the verdict, the one table, the Markdown page; and the picture beside it.

What is unknown or undefined is a dash, and a model that was not measured has no column.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdistill.reports import figures
from jaxdistill.reports._format import DASH, count, grid, number, percent, signed
from jaxdistill.reports._pages import significance
from jaxdistill.reports._pages.run_files import BROKEN

__all__ = [
  "MODELS",
  "fidelity_rows",
  "gap_sentence",
  "markdown",
  "picture",
  "rows",
  "table",
  "verdict",
]

MODELS = ("teacher", "baseline", "student")


def verdict(accuracy: Mapping[str, np.ndarray], gain: Mapping[str, Any] | None) -> str:
  """Whether distillation helped, in one sentence; its error is that over seeds alone.

  It helps (or hurts) where Welch's test over seeds has p < 0.05, and seems to beyond one standard
  error. Whether other examples would say the same is the decision's question.

  Args:
    accuracy: ``[S]`` by model; values that are not finite are no part of it.
    gain: from `evaluation.metrics.difference` of student and baseline; None where there is no
      baseline.

  Returns:
    The sentence.
  """
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


def rows(report: Mapping[str, Any]) -> list[list[str]]:
  """The one table as texts, its head first: quality, agreement with the teacher, and cost."""
  models = report.get("models") or {}
  names = [name for name in MODELS if name in models]
  fidelity = {"baseline": report.get("baseline_fidelity"), "student": report.get("fidelity")}
  lines = [["", *names]]

  def add(label: str, show: Any) -> None:
    lines.append([label, *(show(models[name]) for name in names)])

  def timed(key: str) -> Any:
    def show(model: Mapping[str, Any]) -> str:
      value = (model.get("latency_ms") or {}).get(key)
      return DASH if value is None else f"{value:.3f}"

    return show

  def whole(key: str) -> Any:
    return lambda m: DASH if m.get(key) is None else f"{m[key]:,}"

  add("accuracy, %", lambda m: percent(m.get("accuracy")))
  add("top-5, %", lambda m: percent(m.get("top5")))
  add("negative log-likelihood", lambda m: number(m.get("nll")))
  add("calibration error, %", lambda m: percent(m.get("ece")))
  add("Brier score", lambda m: number(m.get("brier")))
  agreement = [percent((fidelity.get(name) or {}).get("agreement")) for name in names]
  lines.append(["agrees with teacher, %", *agreement])
  add("parameters", whole("parameters"))
  add("bytes", whole("bytes"))
  add("FLOPs an example", lambda m: count(m.get("flops")))
  add("FLOPs by XLA's count", lambda m: count(m.get("xla_flops")))
  add("latency, ms", timed("median"))
  add("latency, 95th pct, ms", timed("p95"))
  add("examples a second", lambda m: count(m.get("throughput")))
  return lines


def table(report: Mapping[str, Any]) -> str:
  """The one table: quality, agreement with the teacher, and cost of the models, as Markdown."""
  return grid(rows(report))


def fidelity_rows(report: Mapping[str, Any]) -> list[list[str]]:
  """How far baseline and student agree with the teacher, as texts; the head first."""
  both = {"baseline": report.get("baseline_fidelity"), "student": report.get("fidelity")}
  there: dict[str, Mapping[str, Any]] = {name: one for name, one in both.items() if one}
  lines = [["", *there]]
  for key, label, show in (
    ("agreement", "same answer as the teacher, %", percent),
    ("kl", "KL to the teacher, nats", number),
    ("accuracy_where_teacher_wrong", "accuracy where the teacher is wrong, %", percent),
  ):
    lines.append([label, *(show(one.get(key)) for one in there.values())])
  return lines


def gap_sentence(gap: Mapping[str, Any] | None) -> str:
  """The share of the gap closed, in a sentence."""
  gap = gap or {}
  if gap.get("value") is None:
    return f"Share of the gap closed: undefined. {gap.get('note') or ''}".strip()
  share = f"Share of the gap closed: {100 * gap['value']:.0f}%"
  if gap.get("low") is None or gap.get("high") is None:
    return f"{share}."
  return f"{share} (95% bootstrap interval {100 * gap['low']:.0f} to {100 * gap['high']:.0f}%)."


def markdown(report: Mapping[str, Any]) -> str:
  """``report.md``: verdict, tables, how to repeat it; a part of broken numbers says so."""
  lines = [f"# {report.get('dataset', DASH)}, {report.get('split', DASH)} split", ""]
  for what, make in (
    ("verdict", _headline),
    ("decision", _decided),
    ("table", _measured),
    ("agreement with the teacher", _agreement),
    ("classes and slices", _by_groups),
    ("models", _described),
    ("commands", _repeat),
  ):
    try:
      lines += [str(line) for line in make(report)]
    except BROKEN as error:
      lines += [f"The part on {what} could not be made of these numbers ({error!r}).", ""]
  return "\n".join(lines)


def _headline(report: Mapping[str, Any]) -> list[str]:
  said = report.get("verdict") or "There is no verdict."
  return [said, "", gap_sentence(report.get("gap_closed")), ""]


def _measured(report: Mapping[str, Any]) -> list[str]:
  """The table, and how its numbers came about."""
  where = report.get("environment") or {}
  seeds = len(report.get("seeds") or [])
  student = (report.get("models") or {}).get("student") or {}
  batch = student.get("throughput_batch", DASH)
  examples = report.get("examples")
  size = "An unknown number of" if examples is None else f"{examples:,}"
  return [
    f"{size} examples. Mean ± standard deviation over {seeds} seeds "
    f"({report.get('varied', DASH)}); no ± where there is one instance. The last checkpoint of "
    "every run.",
    "",
    table(report),
    "",
    f"Latency is at batch 1, throughput at batch {batch}, on {where.get('processor', DASH)} "
    f"({where.get('cores', DASH)} cores), JAX device {where.get('device', DASH)} × "
    f"{where.get('devices', DASH)}.",
    "",
  ]


def _agreement(report: Mapping[str, Any]) -> list[str]:
  return ["## How far they agree with the teacher", "", grid(fidelity_rows(report)), ""]


def _described(report: Mapping[str, Any]) -> list[str]:
  models = report.get("models") or {}
  names = [name for name in MODELS if name in models]
  return [
    "## What they are",
    "",
    *(f"- **{name}**: {models[name].get('description', '')}" for name in names),
    "",
    "![accuracy](accuracy.png)",
    "",
  ]


def _repeat(report: Mapping[str, Any]) -> list[str]:
  where = report.get("environment") or {}
  return [
    "## How to repeat it",
    "",
    "```",
    *(report.get("commands") or []),
    "```",
    "",
    f"Python {where.get('python', DASH)}, jax {where.get('jax', DASH)}, numpy "
    f"{where.get('numpy', DASH)}.",
    "",
  ]


def _decided(report: Mapping[str, Any]) -> list[str]:
  """What the page says of shipping the student, and what is missing or broken."""
  lines: list[str] = []
  decision = report.get("decision")
  if decision:
    lines += [f"**{decision['word']}.** {decision['sentence']}", ""]
    marks = {"for": "for", "against": "against", "unknown": "unknown"}
    reasons = decision.get("reasons") or []
    lines += [f"- {marks.get(r['side'], r['side'])}: {r['text']}" for r in reasons]
    lines += [""] if reasons else []
  problems = report.get("problems") or []
  if problems:
    lines += ["What is missing or broken:", "", *(f"- {one}" for one in problems), ""]
  return lines


def _by_groups(report: Mapping[str, Any]) -> list[str]:
  """Classes and slices, where the report has them: those that lost most first."""
  lines: list[str] = []
  tables = {"class": (report.get("classes") or [], "Classes that lost most")}
  for name, found in (report.get("slices") or {}).items():
    tables[name] = (found, f"By {name}")
  for name, (found, title) in tables.items():
    if not found:
      continue
    models = [m for m in MODELS if m in found[0]["accuracy"]]
    shown = [[name, "examples", *models, "student − teacher"]]
    chosen = found
    if name == "class":
      counted = [row for row in found if row["examples"] and row["changes"].get("teacher")]
      chosen = sorted(counted, key=lambda row: row["changes"]["teacher"]["change"])[:10]
    for row in chosen:
      change = row["changes"].get("teacher") or {"change": None}
      points = DASH if change["change"] is None else signed(100 * change["change"])
      mark = " (beyond noise)" if change.get("beyond_noise") else ""
      cells = [percent(row["accuracy"][m]) for m in models]
      shown.append([str(row["name"]), str(row["examples"]), *cells, points + mark])
    lines += [f"## {title}", "", grid(shown), ""]
  return lines


def picture(report: Mapping[str, Any], path: str | os.PathLike[str] | None = None) -> Any:
  """Accuracy of the models: every seed a dot, the mean with its standard deviation.

  Args:
    report: from `reports.build_report`.
    path: where the PNG goes; None writes none.

  Returns:
    The figure, Matplotlib's, which a notebook shows; None where no accuracy is known.
  """
  labels = {"teacher": "teacher", "baseline": "labels alone", "student": "distilled"}
  values = {}
  for name in MODELS:
    model = report["models"].get(name)
    each = [v for v in (model or {}).get("accuracy_per_seed") or [] if v is not None]
    if model is not None and each:
      below = "" if model.get("parameters") is None else f"\n{model['parameters']:,} parameters"
      values[labels[name] + below] = 100 * np.asarray(each, np.float64)
  if not values:
    return None
  return figures.models(
    path,
    values,
    ylabel=f"accuracy on the {report.get('split', DASH)} split, %",
    title=f"{report.get('dataset', DASH)}: {len(report.get('seeds') or [])} seeds, mean ± std",
  )
