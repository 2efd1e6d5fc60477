"""``report.json`` as a document: held against its schema, and with all that it may lack."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdistill.evaluation import metrics
from jaxdistill.reports._format import MODELS
from jaxdistill.reports._pages.validation import sound

__all__ = ["VERSION", "complete", "model", "schema", "sound_report", "spread"]

VERSION = 2  # of report.json; 1 had neither this number nor answers on each example
_SPREAD: dict[str, Any] = {"mean": None, "std": None}
_MODEL: dict[str, Any] = {
  "description": "",
  "instances": 1,
  **dict.fromkeys(("accuracy", "top5", "nll", "ece", "brier"), _SPREAD),
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


def complete(report: Mapping[str, Any]) -> dict[str, Any]:
  """A sound report with a place for everything: what is unknown is None, or empty.

  >>> complete({"models": {"student": {}}})["models"]["student"]["accuracy"]
  {'mean': None, 'std': None}
  """
  there = report.get("models", {})
  models = {name: {**_MODEL, **there[name]} for name in MODELS if name in there}
  gap = {**_GAP, **report.get("gap_closed", {})}
  rest = {name: value for name, value in _REPORT.items() if name not in report}
  return {**report, **rest, "models": models, "gap_closed": gap}


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
