"""A report in short: the verdict, the one table, the Markdown page; and the picture beside it.

What is unknown or undefined is a dash, and a model that was not measured has no column.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill.reports import figures
from jaxdistill.reports._format import (
  DASH,
  MODELS,
  Reading,
  Table,
  count,
  escaped,
  exact,
  fenced,
  grid,
  percent,
  tenths,
  whole,
)
from jaxdistill.reports._pages import significance
from jaxdistill.reports._pages.document import (
  complete,
  fidelity,
  first,
  model,
  readings,
  sound_report,
)

__all__ = [
  "COSTS",
  "agreement",
  "apart",
  "confused",
  "gap_sentence",
  "in_order",
  "markdown",
  "measured",
  "of_example",
  "over_seeds",
  "paired",
  "picture",
  "picture_name",
  "shares",
  "side_by_side",
  "table",
  "text",
  "verdict",
]


# A row of the one table: how a model's cost is told.
COSTS: dict[str, Callable[[Mapping[str, Any]], str]] = {
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
  values: Mapping[str, np.ndarray],
  gain: Mapping[str, Any] | None,
  reading: Reading,
  agreement: tuple[Reading | None, Mapping[str, Any] | None] = (None, None),
) -> str:
  """Whether distillation helped, in one sentence; its error is that over seeds alone.

  It helps (or hurts) where Welch's test over seeds has p < 0.05, and seems to beyond one standard
  error. Whether other examples would say the same is the decision's question.

  Args:
    values: ``[S]`` by model, of those where the metric was measured; what is not finite is no part
      of it.
    gain: from `evaluation.metrics.difference` of student and baseline, positive for the better;
      None where there is no baseline.
    reading: how the metric is told.
    agreement: how it is told how far the student does what its teacher does, and how far: the one
      thing that needs no labels.

  Returns:
    The sentence.
  """
  if "student" not in values:
    agree, how_far = "", agreement[0]
    if how_far is not None and how_far.name == "agreement" and agreement[1] is not None:
      agree = f" It agrees with its teacher on {percent(agreement[1])}%."
    return f"The student's {reading.title} was not measured: no example has a label.{agree}"
  finite = {name: found[np.isfinite(found)] for name, found in values.items()}
  if not finite["student"].size:
    return f"Nothing is known of the student: its {reading.title} is not a number in any seed."
  student = float(finite["student"].mean())
  if gain is None or not finite.get("baseline", np.zeros(0)).size:
    why = "no usable baseline" if "baseline" in finite else "no baseline (labels alone)"
    teacher = finite.get("teacher", np.zeros(0))
    beside = f", the teacher's {reading.value(teacher.mean())}" if teacher.size else ""
    return (
      f"What distillation gained is unknown: there is {why}. The student's {reading.title} is "
      f"{reading.value(student)}{beside}."
    )
  baseline, error = float(finite["baseline"].mean()), gain["standard_error"]
  change = reading.amount(student - baseline)
  where = f"({reading.called}{reading.value(student)} against {reading.value(baseline)})"
  if error is None:
    word = "higher" if student > baseline else "lower"
    found = f"{change} {word}" if student != baseline else "the same as with labels alone"
    name = f"the distilled student's {reading.title}"
    return f"One seed: {name} is {found} {where}; no error known."
  margin = f"standard error of the difference over seeds {reading.bare(error)}"
  beyond = abs(student - baseline) / error if error else float("inf")
  if beyond > 1 and student != baseline:
    sure = significance.welch(finite["student"], finite["baseline"]) < 0.05
    over = "over" if student > baseline else "under"
    if reading.gain(student - baseline) > 0:
      word = "helps" if sure else "seems to help"
    else:
      word = "hurts" if sure else "seems to hurt"
    return f"Distillation {word}: {change} {over} labels alone {where}, {margin}."
  return f"No difference beyond noise between distillation and labels alone {where}, {margin}."


def side_by_side(
  models: Mapping[str, Mapping[str, Any]], read: Sequence[Reading], costs: Sequence[str]
) -> Table:
  """What was measured of several models, a column each; no row of what was measured of none.

  Args:
    models: by name, with all that their rows are made of.
    read: how the metrics are told that come first.
    costs: labels of the rows below.
  """
  rows = [[one.label, *(one.spread(m.get(one.name)) for m in models.values())] for one in read]
  rows += [[label, *map(COSTS[label], models.values())] for label in costs]
  caption = "Mean ± standard deviation over the seeds; no ± where there is one instance"
  return Table(["", *models], _known(rows), caption, sortable=False)


def _known(rows: Sequence[Sequence[str]]) -> list[Sequence[str]]:
  """Rows of which something was measured."""
  return [row for row in rows if set(row[1:]) != {DASH}]


def measured(report: Mapping[str, Any]) -> Table:
  """The one table of a complete report: quality, agreement with the teacher, and cost."""
  read, faithful = readings(report), fidelity(report)
  told = {name: dict(one) for name, one in report["models"].items()}
  leads, follows = report["task"]["leads"], readings(report, "fidelity")
  # Of what compares with the teacher those that a task puts in front, or else the first alone.
  beside = [one for name, one in follows.items() if name in leads]
  beside = beside or ([] if faithful is None else [faithful])
  for name, one in _followers(report).items():
    if name in told:
      told[name] |= {metric.name: one[metric.name] for metric in beside}
  rows = in_order({**read, **{one.name: one for one in beside}}, leads)
  return side_by_side(told, rows, [label for label in COSTS if label != "instances"])


def in_order(read: Mapping[str, Reading], leads: Sequence[str]) -> list[Reading]:
  """How metrics are told, those in front with which the task's tables begin.

  >>> [one.name for one in in_order({n: Reading(n, n) for n in "abc"}, ["c", "d"])]
  ['c', 'a', 'b']
  """
  return [read[name] for name in dict.fromkeys((*leads, *read)) if name in read]


def _followers(report: Mapping[str, Any]) -> dict[str, Any]:
  """How far baseline and student do what the teacher does, where it was measured."""
  both = {"baseline": report["baseline_fidelity"], "student": report["fidelity"]}
  return {name: one for name, one in both.items() if one}


def table(report: Mapping[str, Any]) -> str:
  """The one table: quality, agreement with the teacher, and cost of the models, as Markdown."""
  return measured(complete(report)).markdown()


def agreement(report: Mapping[str, Any]) -> Table:
  """How far baseline and student of a complete report agree with the teacher."""
  there = _followers(report)
  rows = [
    [one.label, *(one.spread(found[one.name]) for found in there.values())]
    for one in readings(report, "fidelity").values()
  ]
  known = _known(rows)
  head = ["", *there] if known else [""]
  return Table(head, known, "How far they agree with the teacher", sortable=False)


def gap_sentence(gap: Mapping[str, Any]) -> str:
  """The share of the gap closed, in a sentence."""
  if gap["value"] is None:
    return f"Share of the gap closed: undefined. {gap['note'] or ''}".strip()
  share = f"Share of the gap closed: {100 * gap['value']:z.0f}%"  # z: never -0
  if gap["low"] is None:
    return f"{share}."
  ends = f"{100 * gap['low']:z.0f} to {100 * gap['high']:z.0f}%"
  return f"{share} (95% bootstrap interval {ends})."


def over_seeds(report: Mapping[str, Any]) -> str:
  """What the ± of the tables is over, in a sentence."""
  size, varied = len(report["seeds"]), report["varied"] or ""
  if size == 1:
    return "One seed, so that there is no ±."
  what = f" ({escaped(varied)})" if varied not in ("", "seeds") else ""
  return f"Mean ± standard deviation over {size} seeds{what}; no ± where there is one instance."


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
  told = {**told, "problems": [*wrong, *told["problems"]]}
  return text(told, picture_name(told))


def text(told: Mapping[str, Any], pictured: str) -> str:
  """The Markdown of a complete report, with the name of the picture beside it."""
  title = f"# {escaped(told['dataset'] or DASH)}, {escaped(told['split'] or DASH)} split"
  lines = [title, "", escaped(told["verdict"] or "There is no verdict."), ""]
  lines += [gap_sentence(told["gap_closed"]), "", *_decided(told), *_numbers(told)]
  agree = agreement(told)
  if len(agree.head) > 1:
    lines += ["## How far they agree with the teacher", "", agree.markdown(), ""]
  lines += _by_groups(told)
  lines += _written(told["texts"])
  described = [
    f"- **{name}**: {escaped(one['description'])}"
    for name, one in told["models"].items()
    if one["description"]
  ]
  lines += ["## What they are", "", *described, ""] if described else []
  judged = first(told)
  if any(one["per_seed"].get(judged.name) for one in told["models"].values()):
    lines += [f"![{escaped(judged.title)}]({pictured})", ""]
  where = {**dict.fromkeys(("python", "jax", "numpy"), DASH), **told["environment"]}
  lines += ["## How to repeat it", ""]
  lines += [*fenced(told["commands"]), ""] if told["commands"] else []
  python, jax, numpy = (escaped(where[name]) for name in ("python", "jax", "numpy"))
  lines += [f"Python {python}, jax {jax}, numpy {numpy}.", ""]
  return "\n".join(lines)


def _written(texts: Mapping[str, Any] | None) -> list[str]:
  """Sample texts, each in a fence of its own; nothing where there are none."""
  if not texts:
    return []
  lines = ["## Sample texts", ""]
  lines += [f"Temperature {texts['temperature']}, seed {texts['seed']}.", ""]
  for one in texts["texts"]:
    for name, text in {"beginning": one["prompt"], **one["said"]}.items():
      lines += [f"{escaped(name)}:", "", *fenced(text.splitlines() or [""]), ""]
  return lines


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
    f"{size} examples. {over_seeds(report)} The last checkpoint of every run.",
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
  """Classes, slices and parts, where the report has them: classes that lost most come first."""
  counted = [row for row in report["classes"] if row["changes"].get("teacher")]
  counted.sort(key=lambda row: row["changes"]["teacher"]["change"])
  parts = [("class", "Classes that lost most", counted[:10] if report["classes"] else [])]
  parts += [(name, f"By {name}", rows) for name, rows in report["slices"].items()]
  lines: list[str] = []
  reading = of_example(report)
  for name, title, rows in parts:
    if not rows:
      continue
    models = [m for m in MODELS if any(m in shares(row) for row in rows)]
    shown = [[name, "examples", *models, "student − teacher"]]
    for row in rows:
      told = row["changes"].get("teacher") or {"change": None}
      mark = " (beyond noise)" if told.get("beyond_noise") else ""
      cells = [reading.spread(shares(row).get(m)) for m in models]
      lost = None if told["change"] is None else reading.gain(told["change"])
      shown.append([row["name"], str(row["examples"]), *cells, reading.change(lost, None) + mark])
    lines += [f"## {escaped(title)}", "", grid(shown), ""]
  for reading, made in apart(report):
    lines += [f"## {escaped(reading.label)}", "", made.markdown(), ""]
  if report["paired"]:
    lines += ["## On the same examples", "", paired(report).markdown(), ""]
  if report["confusions"]:
    lines += ["## Most frequent confusions", "", confused(report["confusions"][:10]).markdown(), ""]
  return lines


def shares(row: Mapping[str, Any]) -> Mapping[str, Any]:
  """A group's means by model: of accuracies, or of another task's values."""
  found: Mapping[str, Any] = row["accuracy"] if "accuracy" in row else row["values"]
  return found


def of_example(report: Mapping[str, Any]) -> Reading:
  """How that is told which slices are made of: the first metric that an example has."""
  there = readings(report)
  return next((there[r["metric"]] for r in report["paired"] if r["metric"] in there), first(report))


def apart(report: Mapping[str, Any]) -> list[tuple[Reading, Table]]:
  """Metrics by class, label, target or position."""
  there, made = readings(report), []
  for metric, rows in report["parts"].items():
    reading = there.get(metric, Reading(metric, metric))
    models = [name for name in MODELS if any(name in row["values"] for row in rows)]
    body = [[row["name"], *(reading.spread(row["values"].get(m)) for m in models)] for row in rows]
    caption = f"{reading.label}: mean ± standard deviation over the seeds"
    made.append((reading, Table(["", *models], body, caption)))
  return made


def paired(report: Mapping[str, Any]) -> Table:
  """How much better the student is on the same examples."""
  there = readings(report)
  against = {"teacher": "the teacher", "baseline": "labels alone"}
  body = []
  for row in report["paired"]:
    one = there.get(row["metric"], Reading(row["metric"], row["metric"]))
    change, low, high = (one.gain(row[key]) for key in ("gain", "low", "high"))
    sure = row["p_value"] < significance.LEVEL
    word = ("better" if row["gain"] > 0 else "worse") if sure else "within noise"
    cells = [against[row["reference"]], one.change(change, None)]
    ends = one.interval(min(low, high), max(low, high))
    body.append([one.label, *cells, ends, f"{row['p_value']:.2g}", word])
  head = ["metric", "against", "difference", "95% interval", "p", "the student is"]
  return Table(head, body, "The student less what it is held against, on the same examples")


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


def picture_name(report: Mapping[str, Any], end: str = "") -> str:
  """What the picture's file is called: by the metric, as far as its name is one of a file.

  >>> picture_name(complete({}))
  'accuracy.png'
  """
  return (re.sub(r"[^a-zA-Z0-9_-]", "", first(report).name) or "metric") + f"{end}.png"


def picture(report: Mapping[str, Any], path: str | os.PathLike[str] | None = None) -> Any:
  """The metric of the models: every seed a dot, the mean with its standard deviation.

  Args:
    report: from `reports.build_report`.
    path: where the PNG goes; None writes none.

  Returns:
    The figure, Matplotlib's, which a notebook shows; None where no value is known.
  """
  told = complete(report)
  judged = first(told)
  labels = {"teacher": "teacher", "baseline": "labels alone", "student": "distilled"}
  values = {}
  for name, one in told["models"].items():
    each = [value for value in one["per_seed"].get(judged.name, []) if value is not None]
    if each:
      below = "" if one["parameters"] is None else f"\n{one['parameters']:,} parameters"
      values[labels[name] + below] = judged.scaled(1.0) * np.asarray(each, np.float64)
  if not values:
    return None
  unit = ", %" if judged.percent else ""
  return figures.models(
    path,
    values,
    ylabel=f"{judged.title} on the {told['split'] or DASH} split{unit}",
    title=f"{told['dataset'] or DASH}: {len(told['seeds'])} seeds, mean ± std",
    show=lambda mean: judged.told(mean, None),
  )
