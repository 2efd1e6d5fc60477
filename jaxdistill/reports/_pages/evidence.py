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
from jaxdistill.evaluation import predictions
from jaxdistill.evaluation.predictions import Predictions
from jaxdistill.reports._format import MODELS, listed
from jaxdistill.reports._pages import analysis
from jaxdistill.reports._pages.document import (
  VERSION,
  classes,
  complete,
  known,
  readings,
  schema,
  sound_report,
  spread,
)
from jaxdistill.reports._pages.validation import read_json, sound

__all__ = ["TEXTS", "Evidence", "read", "suffix", "values"]

# Sample texts, of a split.
TEXTS = "texts{}.json"
_LONGEST = 100  # letters of a split's name, of which names of files are made
_EXPORTS = 1  # the version of exports.json that is known
# What follows from the rest, and is made anew.
_DERIVED = (
  "decision", "classes", "confusions", "slices", "lost", "parts", "paired", "problems",
)  # fmt: skip
_ENTRY = ("runtime", "bytes", "sha256", "accuracy", "agreement", "largest_difference", "least_jax")


@dataclasses.dataclass(frozen=True, eq=False)
class Evidence:
  """All that a report can show of a run.

  Attributes:
    folder: the run's.
    split: which split was read.
    report: ``report.json`` as far as it is sound, and `document.complete`.
    predictions: the answers on each example, or None.
    curves: the lines of ``metrics.jsonl`` by run (``teacher``, ``baseline``, ``student``).
    exports: ``exports/exports.json`` or None; of each file all is there, None where it is unknown,
      and a ``problem`` where it has one.
    findings: of the pre-flight checks, ``{"check", "message", "fix"}``; None where there were none.
    budget: ``{"limits": {name: limit}, "costs": {name: cost}}`` from ``budget.json``; empty where
      there is none.
    texts: sample texts, ``{"seed", "temperature", "length", "texts"}``, each of the last
      ``{"index", "prompt", "goes_on", "said": {model: text}}``; None where there are none.
    configs: ``config.json`` of the folder (by the name ``""``) and of each run in it.
    problems: what is missing or broken, in sentences.
    doubts: those of them that speak against the student, or against the numbers about it.
    whole: what ``report.json`` measured, where it is whole and of this version, so that it may be
      written again; else None.
  """

  folder: pathlib.Path
  split: str
  report: dict[str, Any]
  predictions: Predictions | None
  curves: dict[str, list[dict[str, Any]]]
  exports: dict[str, Any] | None
  findings: list[dict[str, str]] | None
  budget: dict[str, Any]
  texts: dict[str, Any] | None
  configs: dict[str, dict[str, Any]]
  problems: list[str]
  doubts: list[str]
  whole: dict[str, Any] | None


def _places(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Where the runs are; one that lies alone, as `train.fit` leaves it, is the student's."""
  places = {name: folder / name for name in MODELS}
  return places if places["student"].is_dir() else {**places, "student": folder}


def suffix(split: str) -> str:
  """What a report on another split than the test's has in its files' names.

  Raises:
    ValueError: it is no word that a file's name may have.
  """
  word = isinstance(split, str) and 0 < len(split) <= _LONGEST
  if not word or set(split) & set("/\\\0") or split[0] == ".":
    raise ValueError(
      f"split={_check.show(split)} must be a word, such as 'validation': names of files are made "
      "of it."
    )
  return "" if split == "test" else f"-{split}"


def read(folder: str | os.PathLike[str], split: str = "test") -> Evidence:
  """Reads a run's folder.

  Args:
    folder: where ``report.json``, ``predictions.npz``, the runs and ``exports/`` are.
    split: which split's report.

  Returns:
    What there is.

  Raises:
    FileNotFoundError: there is no report, there are no predictions, and no run's log: nothing to
      show.
  """
  folder = _check.folder("folder", folder)
  problems: list[str] = []
  end = suffix(split)
  report, answers = folder / f"report{end}.json", folder / f"predictions{end}.npz"
  if not report.is_file() and not answers.is_file():
    others = sorted(p.name for p in folder.glob("report*.json")) if folder.is_dir() else []
    if others or not any((place / "metrics.jsonl").is_file() for place in _places(folder).values()):
      hint = f" It has {others}: name the split by --split." if others else ""
      raise FileNotFoundError(
        f"{os.fspath(folder)!r} has neither {report.name} nor {answers.name}: measure the run "
        f"first, by its experiment's --evaluate or by reports.compare_students.{hint}"
      )
    problems.append(
      "Nothing was measured on held-out examples, so the training is all that is shown. "
      "reports.compare_students measures the runs student and, on labels alone, baseline of one "
      "folder; reports.measure_model, build_report and write_report do it for any models."
    )
  numbers = read_json(report, "The report's numbers", problems)
  if isinstance(numbers, dict):
    numbers = _of_this_version(numbers)
  # Answers of an earlier measurement may lie beside a report that was made without any.
  without = isinstance(numbers, dict) and "predictions" not in numbers
  found = None if without else _predictions(answers, problems)
  read_report, intact = _report(report, numbers, found, problems)
  numbers = _rebuilt(found, split) if read_report is None else read_report
  made = complete(numbers)
  doubts = _not_numbers(made, numbers["models"], "student")
  if found is not None:
    problems += _classes_missing(found) if found.models else []
    problems += _slices_missing(found)
    doubts += _nan_logits(found)
    if read_report is not None:
      doubts += _other_measurement(made["models"], found)
  for name in ("teacher", "baseline"):
    problems += _not_numbers(made, numbers["models"], name)
  curves = _curves(folder, made, problems, doubts)
  return Evidence(
    folder=folder,
    split=split,
    report=made,
    predictions=found,
    curves=curves,
    exports=_exports(folder, problems),
    findings=_findings(folder, problems),
    budget=_budget(folder / "budget.json", problems),
    texts=_texts(folder / TEXTS.format(end), problems),
    configs={
      name: _mapping(
        folder / name / "config.json", f"The configuration of {(folder / name).name}", problems
      )
      for name in ("", *MODELS)
    },
    problems=doubts + problems,
    doubts=doubts,
    whole=read_report if intact else None,
  )


def _of_this_version(numbers: dict[str, Any]) -> dict[str, Any]:
  """A report's numbers, null only where this version has null."""
  version = numbers.get("version", 1)
  if not isinstance(version, int) or version >= VERSION:
    return numbers
  models = numbers.get("models")
  if version < 4 and isinstance(models, dict):
    models = {name: _per_seed(one) for name, one in models.items()}
    numbers = {"task": classes(), **numbers, "models": models}
  # The first version knew no answers, and some may lie beside it.
  return known({**({} if version > 1 else {"predictions": "unknown"}), **numbers})


def _per_seed(model: Any) -> Any:
  """A model of version 3, which knew the accuracy of each seed alone."""
  if not isinstance(model, dict) or "accuracy_per_seed" not in model:
    return model
  rest = {name: value for name, value in model.items() if name != "accuracy_per_seed"}
  return {**rest, "per_seed": {"accuracy": model["accuracy_per_seed"]}}


def _predictions(path: pathlib.Path, problems: list[str]) -> Predictions | None:
  try:
    found = predictions.load(path)
  except FileNotFoundError:
    return None
  except ValueError as error:
    problems.append(f"The answers on each example cannot be read: {error}")
    return None
  if not len(found):
    problems.append(
      "No example of the split has a label: accuracy, calibration, classes and slices were not "
      "measured."
    )
  return found


def _report(
  path: pathlib.Path, report: Any, found: Predictions | None, problems: list[str]
) -> tuple[dict[str, Any] | None, bool]:
  """The report as far as it has its form, and whether that is all of it."""
  if report is None:
    if not path.is_file():
      problems.append(f"{path.name} is missing: what the models cost is unknown.")
    return None, False
  if isinstance(report, dict):
    report = {key: value for key, value in report.items() if key not in _DERIVED}
  version = report.get("version", 1) if isinstance(report, dict) else 1
  report, wrong = sound_report(report, path.name)
  if report is None:
    problems += wrong
    return None, False
  shows = report.get("task", classes()).get("shows", [])
  missing = "tests over examples, slices and examples to look at are missing"
  if "classes" in shows:
    missing = "calibration diagrams, classes, lost examples and slices are missing"
  # What a newer version has more is no fault of the file.
  newer = not isinstance(version, int) or version > VERSION
  problems += [] if newer else wrong
  intact = not wrong and version == VERSION
  if newer:
    problems.append(
      f"{path.name} was made by a newer version of jaxdistill (format {version}, this one knows "
      f"{VERSION}): what is new in it is not shown."
    )
  elif version < 2 and found is None:
    problems.append(
      f"{path.name} was made by an older version, which kept no answers on each example: "
      f"{missing}. Measure the run again to have them."
    )
  elif shows and found is None and not any("answers on each example" in one for one in problems):
    problems.append(f"There are no answers on each example (predictions.npz): {missing}.")
  if "baseline" not in report["models"]:
    problems.append(
      "There is no baseline (the same network on labels alone): what distillation gained, and the "
      "share of the gap closed, are unknown."
    )
  return report, intact


def _other_measurement(models: Mapping[str, Any], found: Predictions) -> list[str]:
  """Whether the answers give another accuracy than the report: they are not of one making."""
  for name in sorted(models.keys() & found.models.keys()):
    there = models[name]["per_seed"].get("accuracy", [])
    weight = found.weights()
    ours = found.correct(name) @ (weight / weight.sum()) if len(found) else np.zeros(0)
    if not there or None in there:
      continue
    # The device's sums are of float32, exact as counts, and divided in float64; those of weights
    # are rounded.
    rounded = 1e-6 if found.weight is None else 1e-5
    if len(there) != len(ours) or not np.allclose(there, ours, atol=rounded):
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
    if name in found.models or name in found.details:
      numbers = analysis.quality(found, name) if name in found.models else _means(found, name)
      models[name] = {
        **{key: spread(each) for key, each in numbers.items()},
        "per_seed": {key: each.tolist() for key, each in numbers.items()},
        "instances": len(next(iter(found.values(name).values()), ())) or None,
      }
  about = {"dataset": found.dataset, "split": found.split, "seeds": list(found.seeds)}
  task = {"task": found.task} if found.task else {}
  return {**about, **task, "examples": len(found), "models": models}


def _means(found: Predictions, name: str) -> dict[str, np.ndarray]:
  """The means over the examples that have them: no metric of the whole split, but all that is."""
  return {
    metric: np.nansum(values * found.weights(), axis=1) / (~np.isnan(values) @ found.weights())
    for metric, values in found.values(name).items()
    if np.isfinite(values).any(axis=1).all()
  }


def _not_numbers(report: Mapping[str, Any], models: Mapping[str, Any], name: str) -> list[str]:
  """Which of a model's numbers are none."""
  one, told = models.get(name, {}), readings(report)
  bad = [r.title for key, r in told.items() if one.get(key, {}).get("mean", 0) is None]
  if bad:
    return [f"The {name}'s {listed(bad)} is not a finite number (NaN or infinite)."]
  judged = next(iter(told.values()))
  each = one.get("per_seed", {}).get(judged.name, [])
  undefined = sum(value is None for value in each)
  if undefined:
    seeds = f"{undefined} of {len(each)} seeds"
    return [f"The {name}'s {judged.title} is not a number in {seeds}, which are left out."]
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
      f"them: {listed(absent)}."
    )
  if "student" in found.models:
    predicted = found.models["student"].predicted
    never = [every[k] for k in np.flatnonzero(counts) if not np.any(predicted == k)]
    if never:
      problems.append(f"The student never predicts the classes {listed(never)}, in any seed.")
  return problems


def _slices_missing(found: Predictions) -> list[str]:
  problems = []
  for name, column in found.columns.items():
    there = np.bincount(column.codes[column.codes >= 0], minlength=len(column.names))
    empty = [column.names[k] for k in np.flatnonzero(there == 0)]
    if empty:
      problems.append(f"Slices of {name!r} without an example: {listed(empty)}.")
  return problems


def _curves(
  folder: pathlib.Path, report: Mapping[str, Any], problems: list[str], doubts: list[str]
) -> dict[str, list[dict[str, Any]]]:
  """The lines of each run's log; a torn last line is left out, as a kill leaves one."""
  curves: dict[str, list[dict[str, Any]]] = {}
  for name, place in _places(folder).items():
    try:
      lines, torn = runs.read_metrics(place)
    except OSError:
      # A teacher may be somebody else's, and models may have been given without a run.
      if name in report["models"] and name != "teacher" and (folder / name).is_dir():
        problems.append(f"{name}/metrics.jsonl is missing: there are no training curves of it.")
      continue
    if torn:
      lines_of = f"{torn} line{'s' * (torn > 1)} of {name}/metrics.jsonl"
      problems.append(f"{lines_of} could not be read.")
    bad = [r["step"] for r in lines if not np.all(np.isfinite(values(r, "loss")))]
    if bad:
      times = f"in {len(bad)} of {len(lines)} lines of its log, first at step {bad[0]}"
      said = f"The {name}'s loss is not a finite number {times}."
      (doubts if name == "student" else problems).append(said)
    if lines:
      curves[name] = lines
  return curves


def values(record: Mapping[str, Any], key: str) -> list[float]:
  """What a log's line has of a key, one number a seed; NaN for what is none.

  >>> values({"loss": [1, "high"]}, "loss"), values({"loss": 2.5}, "loss"), values({}, "loss")
  ([1.0, nan], [2.5], [])
  """
  found = record.get(key, [])
  return [
    float(one) if isinstance(one, int | float) and not isinstance(one, bool) else float("nan")
    for one in (found if isinstance(found, list) else [found])
  ]


def _mapping(path: pathlib.Path, what: str, problems: list[str]) -> dict[str, Any]:
  """A file's JSON, which should be a mapping; empty where it is not."""
  found = read_json(path, what, problems)
  if found is not None and not isinstance(found, dict):
    problems.append(f"{what} ({path.name}) is no mapping, but {_check.show(found)}.")
  return found if isinstance(found, dict) else {}


def _exports(run: pathlib.Path, problems: list[str]) -> dict[str, Any] | None:
  """The list of exported files; one that is not as it was checked has not passed."""
  folders = [run / "exports", run / "student" / "exports"]
  folder = next((one for one in folders if (one / "exports.json").exists()), folders[0])
  found = read_json(folder / "exports.json", "The list of exported files", problems)
  if found is None:
    return None
  found, wrong = sound(found, schema("exports"), "exports.json", deeper=("files",))
  problems += wrong
  if found is None or "files" not in found:
    return None
  if found.get("version") != _EXPORTS:
    problems.append(
      f"exports.json is of version {found.get('version')!r} and this version of jaxdistill knows "
      f"{_EXPORTS}: it is shown as far as it is understood. Export again to be sure."
    )
  shared = {"batch_size": 1, "examples": None, "split": None, **found}
  files = []
  for one in found["files"]:
    entry = {**dict.fromkeys((*_ENTRY, "latency_ms", "problem")), "passed": False, **one}
    entry["file"] = one.get("file") or one.get("kind") or "?"
    entry |= {key: one.get(key) or shared[key] for key in ("batch_size", "examples", "split")}
    problem = _file_problem(folder, entry)
    if problem:
      problems.append(f"The exported file {entry['file']} {problem}: export again.")
      entry |= {"passed": False, "problem": f"it {problem}"}
    files.append(entry)
  return {**shared, "files": files}


def _file_problem(folder: pathlib.Path, entry: Mapping[str, Any]) -> str | None:
  if not entry["passed"]:
    return None  # it is not there, and the list says why
  try:
    path = runs.within(folder, entry["file"])
  except ValueError:
    return "lies outside of the folder exports"
  written = {key: entry[key] for key in ("bytes", "sha256") if entry[key] is not None}
  try:
    return runs.altered(path, written, whole="sha256" in written)
  except OSError as error:
    return f"cannot be read ({_check.short(error)})"


def _findings(run: pathlib.Path, problems: list[str]) -> list[dict[str, str]] | None:
  """What the pre-flight checks of the run, and of its ``student/``, found; None without any."""
  every: list[Any] = []
  checked = False
  for path in (run / "preflight.json", run / "student" / "preflight.json"):
    found = read_json(path, "What the pre-flight checks found", problems)
    checked |= isinstance(found, list)
    if found is not None and not isinstance(found, list):
      problems.append("preflight.json is no list of findings.")
    every += found if isinstance(found, list) else []
  keys = ("check", "message", "fix")
  rows = [{key: str(one.get(key) or "") for key in keys} for one in every if isinstance(one, dict)]
  return rows if checked else None


def _texts(path: pathlib.Path, problems: list[str]) -> dict[str, Any] | None:
  """Sample texts, as far as they are whole."""
  found = _mapping(path, "The sample texts", problems)
  rows = found.get("texts")
  if not isinstance(rows, list):
    return None
  kept = []
  for one in rows:
    said = one.get("said") if isinstance(one, dict) else None
    if not isinstance(said, dict) or not isinstance(one.get("prompt"), str):
      problems.append(f"A sample text of {path.name} is none, and is left out.")
      continue
    texts = {name: said[name] for name in MODELS if isinstance(said.get(name), str)}
    index, rest = one.get("index"), one.get("goes_on")
    kept.append(
      {
        "index": index if isinstance(index, int) else None,
        "prompt": one["prompt"],
        "goes_on": rest if isinstance(rest, str) else "",
        "said": texts,
      }
    )
  drawn = {name: found.get(name) for name in ("seed", "temperature", "length")}
  numbers = {n: v if isinstance(v, int | float) else None for n, v in drawn.items()}
  return {**numbers, "texts": kept} if kept else None


def _budget(path: pathlib.Path, problems: list[str]) -> dict[str, dict[str, Any]]:
  """``{"limits": {name: number}, "costs": {name: number}}``, as far as there are such."""
  found = _mapping(path, "The budget", problems)
  inner = next((found[k] for k in ("limits", "budget") if isinstance(found.get(k), dict)), found)
  costs = found["costs"] if isinstance(found.get("costs"), dict) else {}

  def numbers(given: Mapping[str, Any]) -> dict[str, Any]:
    return {
      str(name): value
      for name, value in given.items()
      if isinstance(value, int | float) and not isinstance(value, bool)
    }

  return {"limits": numbers(inner), "costs": numbers(costs)} if found else {}
