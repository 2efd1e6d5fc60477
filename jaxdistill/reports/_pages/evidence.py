"""What a run's folder holds for a report, read tolerantly: what is missing or broken is said.

Nothing here raises for a file's content. A report at the end of a long training must come, and say
in plain sentences (`Evidence.problems`) what it could not read.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdistill import _check, runs
from jaxdistill.evaluation import metrics, predictions
from jaxdistill.evaluation.predictions import Predictions
from jaxdistill.reports._pages import analysis, run_files
from jaxdistill.reports._pages.report_text import MODELS

__all__ = ["VERSION", "Evidence", "names", "read", "spread", "suffix"]

VERSION = 2  # of report.json; 1 had neither this number nor answers on each example
_QUALITIES = {
  "accuracy": "accuracy",
  "nll": "negative log-likelihood",
  "ece": "calibration error",
  "brier": "Brier score",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Evidence:
  """All that a report can show of a run.

  Attributes:
    folder: the run's.
    split: which split was read.
    report: ``report.json``, as far as it could be read.
    predictions: the answers on each example, or None.
    curves: the lines of ``metrics.jsonl`` by run (``teacher``, ``baseline``, ``student``).
    exports: ``exports/exports.json`` or None; each file with a ``problem`` where it has one.
    findings: of the pre-flight checks, ``{"check", "message", "fix"}``; None where there were none.
    budget: ``{"limits": {name: limit}, "costs": {name: cost}}`` from ``budget.json``; empty where
      there is none.
    configs: ``config.json`` of the folder (by the name ``""``) and of each run in it.
    problems: what is missing or broken, in sentences.
    doubts: those of them that speak against the student, or against the numbers about it.
    intact: whether ``report.json`` is whole and of this version, so that it may be written again.
  """

  folder: pathlib.Path
  split: str
  report: dict[str, Any]
  predictions: Predictions | None
  curves: dict[str, list[dict[str, Any]]]
  exports: dict[str, Any] | None
  findings: list[dict[str, str]] | None
  budget: dict[str, Any]
  configs: dict[str, dict[str, Any]]
  problems: list[str]
  doubts: list[str]
  intact: bool


def suffix(split: str) -> str:
  """What a report on another split than the test's has in its files' names."""
  return "" if split == "test" else f"-{split}"


def read(folder: str | os.PathLike[str], split: str = "test") -> Evidence:
  """Reads a run's folder.

  Args:
    folder: where ``report.json``, ``predictions.npz``, the runs and ``exports/`` are.
    split: which split's report.

  Returns:
    What there is.

  Raises:
    FileNotFoundError: there is no report and there are no predictions: nothing to show.
  """
  folder = _check.folder("folder", folder)
  problems: list[str] = []
  end = suffix(split)
  report, answers = folder / f"report{end}.json", folder / f"predictions{end}.npz"
  if not report.is_file() and not answers.is_file():
    others = sorted(p.name for p in folder.glob("report*.json")) if folder.is_dir() else []
    hint = f" It has {others}: name the split by --split." if others else ""
    raise FileNotFoundError(
      f"{os.fspath(folder)!r} has neither {report.name} nor {answers.name}: measure the run first, "
      f"e.g. by its experiment's --evaluate.{hint}"
    )
  numbers = run_files.read_json(report, "The report's numbers", problems)
  kept = isinstance(numbers, dict) and numbers.get("predictions", "unknown") is None
  # Answers of an earlier measurement may lie beside a report that was made without any.
  found = None if kept else _predictions(answers, problems)
  read_report, intact = _report(report, numbers, found, problems)
  made = read_report if read_report is not None else _rebuilt(found, split)
  doubts = _not_numbers(made, "student")
  if found is not None:
    problems += _classes_missing(found)
    doubts += _nan_logits(found)
    if read_report is not None:
      doubts += _other_measurement(made["models"], found)
  for name in made["models"]:
    problems += [] if name == "student" else _not_numbers(made, name)
  curves = _curves(folder, made, problems, doubts)
  return Evidence(
    folder=folder,
    split=split,
    report=made,
    predictions=found,
    curves=curves,
    exports=run_files.exports(folder, problems),
    findings=run_files.preflight(folder, problems),
    budget=run_files.budget(folder / "budget.json", problems),
    configs={name: run_files.config(folder / name, problems) for name in ("", *MODELS)},
    problems=doubts + problems,
    doubts=doubts,
    intact=intact,
  )


def spread(values: Any) -> dict[str, float | None]:
  """Mean and sample standard deviation over the finite values; None where there are too few.

  >>> spread([1.0, 3.0, float("nan")])["mean"], spread([float("nan")])
  (2.0, {'mean': None, 'std': None})
  """
  found = np.atleast_1d(np.asarray(values, np.float64))
  found = found[np.isfinite(found)]
  mean, std = metrics.mean_std(found) if found.size else (None, None)
  return {"mean": mean, "std": std}


def names(values: list[str], most: int = 8) -> str:
  """Some names in a row, and how many there are beside.

  >>> names(["a", "b", "c"], most=2)
  'a, b and 1 more'
  """
  shown = ", ".join(values[:most])
  return shown if len(values) <= most else f"{shown} and {len(values) - most} more"


def _predictions(path: pathlib.Path, problems: list[str]) -> Predictions | None:
  try:
    found = predictions.load(path)
  except FileNotFoundError:
    return None
  except ValueError as error:
    problems.append(f"The answers on each example cannot be read: {error}")
    return None
  if not len(found):
    problems.append("No example of the split has a label: nothing was measured.")
  return found


def _report(
  path: pathlib.Path, report: Any, found: Predictions | None, problems: list[str]
) -> tuple[dict[str, Any] | None, bool]:
  """The report as far as it has its form, and whether that is all of it."""
  missing = "calibration diagrams, classes, lost examples and slices are missing"
  if report is None:
    if not path.is_file():
      problems.append(f"{path.name} is missing: what the models cost is unknown.")
    return None, False
  models = report.get("models") if isinstance(report, dict) else None
  whole = isinstance(models, dict) and all(isinstance(one, dict) for one in models.values())
  if not whole or not isinstance(models, dict) or "student" not in models:
    problems.append(f"{path.name} is no report: it has no models, or no student among them.")
    return None, False
  said = len(problems)
  report = run_files.as_expected(report, problems)
  intact = len(problems) == said and report.get("version") == VERSION
  version = report.get("version", 1)
  if not isinstance(version, int) or version > VERSION:
    problems.append(
      f"{path.name} was made by a newer version of jaxdistill (format {version}, this one knows "
      f"{VERSION}): what is new in it is not shown."
    )
  elif version < VERSION and found is None:
    problems.append(
      f"{path.name} was made by an older version, which kept no answers on each example: "
      f"{missing}. Measure the run again to have them."
    )
  elif found is None and not any("answers on each example" in one for one in problems):
    problems.append(f"There are no answers on each example (predictions.npz): {missing}.")
  if "baseline" not in models:
    problems.append(
      "There is no baseline (the same network on labels alone): what distillation gained, and the "
      "share of the gap closed, are unknown."
    )
  return report, intact


def _other_measurement(models: Mapping[str, Any], found: Predictions) -> list[str]:
  """Whether the answers give another accuracy than the report: they are not of one making."""
  for name in sorted(models.keys() & found.models.keys()):
    there = models[name].get("accuracy_per_seed")
    ours = found.correct(name).mean(axis=1) if len(found) else np.zeros(0)
    if not isinstance(there, list) or None in there:
      continue
    # The device's sums are of float32, exact as counts, and divided in float64.
    if len(there) != len(ours) or not np.allclose(there, ours, atol=1e-6):
      return [
        f"The {name}'s answers on each example give another accuracy than the report has: they "
        "are of different measurements. Measure the run again."
      ]
  return []


def _rebuilt(found: Predictions | None, split: str) -> dict[str, Any]:
  """A report of what the answers alone tell; costs are unknown."""
  if found is None:
    return {"split": split, "models": {}}
  models = {}
  for name in MODELS:
    if name in found.models:
      numbers = analysis.quality(found, name)
      models[name] = {
        **{key: spread(values) for key, values in numbers.items()},
        "accuracy_per_seed": numbers["accuracy"].tolist(),
        "instances": len(numbers["accuracy"]),
      }
  about = {"dataset": found.dataset, "split": found.split, "seeds": list(found.seeds)}
  return {**about, "examples": len(found), "models": models}


def _not_numbers(report: Mapping[str, Any], name: str) -> list[str]:
  """Which of a model's numbers are none."""
  model = report["models"].get(name) or {}
  bad = []
  for key, label in _QUALITIES.items():
    value = model.get(key)
    if isinstance(value, dict) and value.get("mean", 0) is None:
      bad.append(label)
  if bad:
    return [f"The {name}'s {names(bad)} is not a finite number (NaN or infinite)."]
  each = model.get("accuracy_per_seed") or []
  undefined = sum(value is None for value in each)
  if undefined:
    seeds = f"{undefined} of {len(each)} seeds"
    return [f"The {name}'s accuracy is not a number in {seeds}, which are left out."]
  return []


def _nan_logits(found: Predictions) -> list[str]:
  predicted = found.models["student"].predicted if "student" in found.models else np.zeros(0)
  bad = float(np.mean(predicted < 0)) if predicted.size else 0.0
  if not bad:
    return []
  share = f"{100 * bad:.2g}% of its answers"
  return [f"The student's logits are not numbers (NaN) on {share}, which count as wrong."]


def _classes_missing(found: Predictions) -> list[str]:
  problems = []
  counts = np.bincount(found.labels, minlength=found.num_classes)
  every = [found.name(label) for label in range(len(counts))]
  absent = [every[label] for label in np.flatnonzero(counts == 0)]
  if absent and len(found):
    problems.append(
      f"{len(absent)} of {len(every)} classes never appear in this split, so nothing is known of "
      f"them: {names(absent)}."
    )
  if "student" in found.models:
    predicted = found.models["student"].predicted
    never = [every[k] for k in np.flatnonzero(counts) if not np.any(predicted == k)]
    if never:
      problems.append(f"The student never predicts the classes {names(never)}, in any seed.")
  for name, column in found.columns.items():
    there = np.bincount(column.codes[column.codes >= 0], minlength=len(column.names))
    empty = [column.names[k] for k in np.flatnonzero(there == 0)]
    if empty:
      problems.append(f"Slices of {name!r} without an example: {names(empty)}.")
  return problems


def _curves(
  folder: pathlib.Path, report: Mapping[str, Any], problems: list[str], doubts: list[str]
) -> dict[str, list[dict[str, Any]]]:
  """The lines of each run's log; a torn last line is left out, as a kill leaves one."""
  curves: dict[str, list[dict[str, Any]]] = {}
  for name in MODELS:
    try:
      lines, torn = runs.read_metrics(folder / name)
    except OSError:
      if name in report["models"] and name != "teacher":  # which may be somebody else's
        problems.append(f"{name}/metrics.jsonl is missing: there are no training curves of it.")
      continue
    if torn:
      lines_of = f"{torn} line{'s' * (torn > 1)} of {name}/metrics.jsonl"
      problems.append(f"{lines_of} could not be read.")
    bad = [r["step"] for r in lines if not _all_finite(r.get("loss", 0.0))]
    if bad:
      times = f"in {len(bad)} of {len(lines)} lines of its log, first at step {bad[0]}"
      said = f"The {name}'s loss is not a finite number {times}."
      (doubts if name == "student" else problems).append(said)
    if lines:
      curves[name] = lines
  return curves


def _all_finite(value: Any) -> bool:
  try:
    return bool(np.all(np.isfinite(np.asarray(value, np.float64))))
  except (TypeError, ValueError):
    return False
