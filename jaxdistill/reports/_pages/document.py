"""``report.json`` as a document: held against its schema, and with all that it may lack."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill.evaluation import metrics, tasks
from jaxdistill.evaluation.tasks import Task
from jaxdistill.reports._format import MODELS, Reading
from jaxdistill.reports._pages.validation import sound

__all__ = [
  "COSTS",
  "VERSION",
  "about",
  "classes",
  "complete",
  "fidelity",
  "first",
  "known",
  "model",
  "readings",
  "schema",
  "sound_report",
  "spread",
]

# Of report.json; 3 knew classes alone, 2 had null for what is unknown, 1 neither this number nor
# answers on each example.
VERSION = 4
COSTS = ("parameters", "bytes", "flops", "xla_flops", "throughput", "throughput_batch")
_SPREAD: dict[str, Any] = {"mean": None, "std": None}
# What a model has beside its metrics.
_MODEL: dict[str, Any] = {
  "description": "",
  "instances": None,
  "per_seed": {},
  **dict.fromkeys(COSTS),
  "latency_ms": {"median": None, "p95": None},
}
_GAP = {"value": None, "low": None, "high": None, "note": None}
_REPORT: dict[str, Any] = {
  **dict.fromkeys(("dataset", "split", "varied", "verdict"), ""),
  **dict.fromkeys(("examples", "fidelity", "baseline_fidelity", "gain", "decision", "lost")),
  "texts": None,  # which lie beside report.json
  "seeds": [],
  "models": {},
  "gap_closed": _GAP,
  "environment": {},
  "commands": [],
  "classes": [],
  "confusions": [],
  "slices": {},
  "parts": {},
  "paired": [],
  "problems": [],
}


def about(task: Task, measured: Sequence[str]) -> dict[str, Any]:
  """What a report says of its task, so that its pages can be made without it.

  Args:
    task: the task.
    measured: the metrics that were, in the order in which they are shown after the first; those
      of single examples, and of parts, are told beside them.

  Raises:
    ValueError: a metric has the name of something else that a model has.
  """
  taken = sorted(tasks.RESERVED & set(measured))  # of those that it declares, a task has none
  if taken:
    raise ValueError(
      f"the metric {taken[0]!r} of the task {task.name!r} has the name of what every model of a "
      "report has beside its metrics: call it something else."
    )
  read = {**task.metrics, **task.others}
  names = [task.first, *(n for n in measured if n not in task.fidelity), *read]
  return {
    "name": task.name,
    "metrics": {name: _read(name, read.get(name)) for name in dict.fromkeys(names)},
    "fidelity": {name: _read(name, one) for name, one in task.fidelity.items()},
    "shows": task.shown.forms,
    "leads": list(task.leads),
  }


def _read(name: str, one: tasks.Metric | None) -> dict[str, Any]:
  title = name.replace("_", " ")
  if one is None:
    return {"title": title}
  return {
    "title": one.title or title,
    "better": one.better,
    "percent": one.percent,
    "of_examples": one.of_examples,
  }


def classes() -> dict[str, Any]:
  """The task of a report that names none, as those of earlier versions."""
  return about(tasks.classification(), ("accuracy", "top5", "nll", "ece", "brier"))


def readings(report: Mapping[str, Any], part: str = "metrics") -> dict[str, Reading]:
  """How the metrics of a complete report (or its ``fidelity``) are told."""
  return {name: Reading(name, **one) for name, one in report["task"][part].items()}


def first(report: Mapping[str, Any]) -> Reading:
  """How the metric is told by which the student is judged."""
  return next(iter(readings(report).values()))


def fidelity(report: Mapping[str, Any]) -> Reading | None:
  """How it is told how far a student does what its teacher does; None where nobody said."""
  return next(iter(readings(report, "fidelity").values()), None)


def schema(name: str = "report") -> dict[str, Any]:
  """The JSON schema of ``report.json``, or of ``exports.json``."""
  text = (importlib.resources.files("jaxdistill.reports") / f"{name}.schema.json").read_text()
  return json.loads(text)


def sound_report(report: Any, name: str) -> tuple[dict[str, Any] | None, list[str]]:
  """A report's whole parts, and what is wrong with the others.

  Args:
    report: from a file, of any version.
    name: the file's, for the sentences.

  Returns:
    ``(report, sentences)``; None where it is no report, which has models and a student among them.
  """
  versionless = report
  if isinstance(report, dict):
    versionless = {key: value for key, value in report.items() if key != "version"}
  kept, wrong = sound(versionless, schema(), name, deeper=("models",))
  if kept is None or "student" not in kept.get("models", {}):
    return None, [f"{name} is no report: it has no models, or no student among them."]
  return kept | {key: report[key] for key in ("version",) if key in report}, wrong


def known(value: Any) -> Any:
  """What is unknown is absent: a value without the entries of its mappings that are None.

  A ``mean`` stays: None is what JSON has for one that was measured and is not finite.

  >>> known({"mean": None, "std": None, "each": [None, 1.0]})
  {'mean': None, 'each': [None, 1.0]}
  """
  if isinstance(value, Mapping):
    there = {key: one for key, one in value.items() if one is not None or key == "mean"}
    return {key: known(one) for key, one in there.items()}
  return [known(one) for one in value] if isinstance(value, list) else value


def complete(report: Mapping[str, Any]) -> dict[str, Any]:
  """A sound report with a place for everything: what is unknown is None, or empty.

  >>> complete({"models": {"student": {}}})["models"]["student"]["accuracy"]
  {'mean': None, 'std': None}
  """
  there = report.get("models", {})
  task = {"fidelity": {}, "shows": [], "leads": [], **(report.get("task") or classes())}
  names = task["metrics"]
  made = {
    name: {**_MODEL, **dict.fromkeys(names, _SPREAD), **_spreads(there[name])}
    for name in MODELS
    if name in there
  }
  every = {
    **_REPORT,
    **report,
    "task": task,
    "models": made,
    "gap_closed": {**_GAP, **report.get("gap_closed", {})},
  }
  for name in ("fidelity", "baseline_fidelity"):
    every[name] = every[name] and {
      **dict.fromkeys(task["fidelity"], _SPREAD),
      **_spreads(every[name]),
    }
  every["gain"] = every["gain"] and {"standard_error": None, **every["gain"]}
  return every


def _spreads(numbers: Mapping[str, Any]) -> dict[str, Any]:
  """Numbers with a place for the spread of each that is one."""
  return {key: one if key in _MODEL else {**_SPREAD, **one} for key, one in numbers.items()}


def model(report: Mapping[str, Any], name: str) -> dict[str, Any]:
  """A model of a complete report; one of which nothing is known where there is none."""
  nothing = {**_MODEL, **dict.fromkeys(report["task"]["metrics"], _SPREAD)}
  return report["models"].get(name, nothing)


def spread(values: Any) -> dict[str, float | None]:
  """Mean and sample standard deviation over the finite values; None where there are too few.

  >>> spread([1.0, 3.0, float("nan")])["mean"], spread([float("nan")])
  (2.0, {'mean': None, 'std': None})
  """
  found = np.atleast_1d(np.asarray(values, np.float64))
  found = found[np.isfinite(found)]
  mean, std = metrics.mean_std(found) if found.size else (None, None)
  return {"mean": mean, "std": std}
