"""``report.json`` as a document: held against its schema, and with all that it may lack."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill.evaluation import metrics
from jaxdistill.reports._format import MODELS
from jaxdistill.reports._pages.validation import sound

__all__ = [
  "FIDELITY",
  "QUALITIES",
  "VERSION",
  "complete",
  "known",
  "model",
  "schema",
  "sound_report",
  "spread",
]

# Of report.json; 2 had null for what is unknown, 1 neither this number nor answers on each example.
VERSION = 3
QUALITIES = ("accuracy", "top5", "nll", "ece", "brier")
FIDELITY = ("agreement", "kl", "accuracy_where_teacher_wrong")
_SPREAD: dict[str, Any] = {"mean": None, "std": None}
_MODEL: dict[str, Any] = {
  "description": "",
  "instances": None,
  **dict.fromkeys(QUALITIES, _SPREAD),
  "accuracy_per_seed": [],
  **dict.fromkeys(("parameters", "bytes", "flops", "xla_flops", "throughput", "throughput_batch")),
  "latency_ms": {"median": None, "p95": None},
}
_GAP = {"value": None, "low": None, "high": None, "note": None}
_REPORT: dict[str, Any] = {
  **dict.fromkeys(("dataset", "split", "varied", "verdict"), ""),
  **dict.fromkeys(("examples", "fidelity", "baseline_fidelity", "gain", "decision", "lost")),
  "seeds": [],
  "models": {},
  "gap_closed": _GAP,
  "environment": {},
  "commands": [],
  "classes": [],
  "confusions": [],
  "slices": {},
  "problems": [],
}


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
  made = {name: {**_MODEL, **_spreads(there[name], QUALITIES)} for name in MODELS if name in there}
  every = {
    **_REPORT,
    **report,
    "models": made,
    "gap_closed": {**_GAP, **report.get("gap_closed", {})},
  }
  for name in ("fidelity", "baseline_fidelity"):
    every[name] = every[name] and {
      **dict.fromkeys(FIDELITY, _SPREAD),
      **_spreads(every[name], FIDELITY),
    }
  every["gain"] = every["gain"] and {"standard_error": None, **every["gain"]}
  return every


def _spreads(numbers: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
  """Numbers with a place for the spread of each that is one."""
  return {key: {**_SPREAD, **one} if key in names else one for key, one in numbers.items()}


def model(report: Mapping[str, Any], name: str) -> dict[str, Any]:
  """A model of a complete report; one of which nothing is known where there is none."""
  return report["models"].get(name, _MODEL)


def spread(values: Any) -> dict[str, float | None]:
  """Mean and sample standard deviation over the finite values; None where there are too few.

  >>> spread([1.0, 3.0, float("nan")])["mean"], spread([float("nan")])
  (2.0, {'mean': None, 'std': None})
  """
  found = np.atleast_1d(np.asarray(values, np.float64))
  found = found[np.isfinite(found)]
  mean, std = metrics.mean_std(found) if found.size else (None, None)
  return {"mean": mean, "std": std}
