"""The report of a run: teacher, baseline (labels alone) and distilled student.

`build_report` makes the numbers of ``report.json``, whose schema is ``report.schema.json`` beside
this file; `write_report` puts them into a run's folder as JSON, Markdown, a picture, and
``report.html``, from which one can decide whether to ship the student. ``jaxdistill report RUN``
makes the pages again from the folder alone; ``jaxdistill report RUN_A RUN_B`` compares two runs.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill import _check, _extras, evaluation, runs
from jaxdistill.data import Batches
from jaxdistill.evaluation import metrics, tasks
from jaxdistill.evaluation.predictions import Answers, Predictions, column
from jaxdistill.evaluation.predictions import save as save_predictions
from jaxdistill.evaluation.tasks import Task
from jaxdistill.reports._format import Reading
from jaxdistill.reports._pages import analysis, document, evidence, page, summary
from jaxdistill.reports._pages.decision import decide
from jaxdistill.runs import environment
from jaxdistill.types import Batch, Model, Teacher

__all__ = [
  "Measured",
  "build_report",
  "measure_model",
  "render_report",
  "report_schema",
  "write_report",
]


@dataclasses.dataclass(frozen=True)
class Measured:
  """One model as `jaxdistill.evaluation.examine` measured it.

  Attributes:
    quality: from `evaluation.evaluate`; arrays ``[S]`` over seeds, or scalars. What is not in it
      was not measured, and is in no part of the report.
    costs: from `evaluation.costs`.
    description: what it is, in a few words.
    answers: what it said of each example, from `evaluation.examine`; None where nobody asked.
    task: what the labels mean; one class an example where left out.
  """

  quality: Mapping[str, np.ndarray]
  costs: Mapping[str, Any]
  description: str = ""
  answers: Answers | Mapping[str, np.ndarray] | None = None
  task: Task = dataclasses.field(default_factory=tasks.classification)


def measure_model(
  model: Model | Teacher,
  batches: Batch | Batches,
  *,
  teacher: Teacher | None = None,
  costs: Mapping[str, Any] | None = None,
  description: str = "",
  task: Task | None = None,
) -> Measured:
  """Evaluates a model and what it costs.

  Args:
    model: a model, or a teacher; of several seeds, costs are those of one.
    batches: the split, from `jaxdistill.data.evaluation_batches`.
    teacher: to measure agreement with, as in `evaluation.evaluate`.
    costs: from `evaluation.costs`, where another model of the same network was measured already:
      timing it twice would show the clock's noise as a difference.
    description: what it is, in a few words.
    task: what the labels mean, as in `evaluation.evaluate`.

  Returns:
    The model's quality, its answers and its costs.
  """
  task = tasks.classification() if task is None else task
  quality, answers = evaluation.examine(model, batches, teacher=teacher, task=task)
  return Measured(
    quality=quality,
    costs=evaluation.costs(model, batches) if costs is None else costs,
    description=description,
    answers=answers,
    task=task,
  )


def report_schema() -> dict[str, Any]:
  """The JSON schema that every ``report.json`` satisfies."""
  return document.schema()


def build_report(
  *,
  dataset: str,
  split: str,
  examples: int,
  seeds: Sequence[int],
  varied: str,
  teacher: Measured,
  baseline: Measured | None = None,
  student: Measured,
  commands: Sequence[str] = (),
) -> dict[str, Any]:
  """Assembles a report from the measured models.

  Args:
    dataset: the data set's name and version.
    split: which split was read.
    examples: how many examples it has.
    seeds: the seeds that baseline and student were trained from.
    varied: what the ± is over, in words.
    teacher: a single instance, or several.
    baseline: the student's network trained on labels alone. None where there is none: what
      distillation gained is then unknown, and the report says so.
    student: the distilled student, evaluated with the teacher as its reference.
    commands: how to repeat it.

  Returns:
    A dictionary that satisfies `report_schema`.

  Raises:
    TypeError: a model is not from `measure_model`.
    ValueError: the models are of different tasks, of another number of seeds, or lack what compares
      with the teacher; a share is none; or a metric has the name of a cost.
  """
  parts = {"teacher": teacher, "student": student}
  if baseline is not None:
    parts = {"teacher": teacher, "baseline": baseline, "student": student}
  task = _check_parts(parts, len(seeds))
  _check.whole("examples", examples)
  about = {"task": document.about(task, list(student.quality) + list(teacher.quality))}
  first, faithful = document.first(about), document.fidelity(about)
  values = {
    name: np.atleast_1d(part.quality[first.name])
    for name, part in parts.items()
    if first.name in part.quality
  }
  gap, gain = _gap(parts, values, first, examples)
  fidelity = {name: _spreads(part, list(task.fidelity)) for name, part in parts.items()}
  agreement = None if faithful is None else fidelity["student"].get(faithful.name)
  report = {
    "version": document.VERSION,
    **about,
    "dataset": dataset,
    "split": split,
    "examples": examples,
    "seeds": list(seeds),
    "varied": varied,
    "verdict": summary.verdict(values, gain, first, (faithful, agreement)),
    "models": {name: _model(part, list(about["task"]["metrics"])) for name, part in parts.items()},
    "fidelity": fidelity["student"],
    "baseline_fidelity": fidelity.get("baseline"),
    "gain": gain,
    "gap_closed": gap,
    "environment": environment(),
    "commands": list(commands),
  }
  return document.known(runs.to_json(report))


def _gap(
  parts: Mapping[str, Measured],
  values: Mapping[str, np.ndarray],
  first: Reading,
  examples: int,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
  """Share of the gap and gain, of what is finite; an unknown share says why."""
  if "baseline" not in parts:
    return {"note": "There is no baseline, the same network trained on labels alone."}, None
  finite = {name: each[np.isfinite(each)] for name, each in values.items()}
  empty = [name for name in parts if not finite.get(name, np.zeros(0)).size]
  gain = None
  if not {"student", "baseline"} & set(empty):
    gain = metrics.difference(finite["student"], finite["baseline"])
    gain["mean"] = first.gain(float(gain["mean"] or 0.0))
  if empty:
    why = "is not a number" if set(empty) & set(values) else "was not measured"
    return {"note": f"The {first.title} of {' and '.join(empty)} {why}."}, gain
  gap = metrics.gap_closed(
    finite["teacher"],
    finite["baseline"],
    finite["student"],
    better="lower" if first.better == "lower" else "higher",
    examples=examples if first.of_examples else None,
  )
  return gap, gain


def _check_parts(parts: Mapping[str, Any], seeds: int) -> Task:
  """The task that all models were measured by."""
  for name, part in parts.items():
    if not isinstance(part, Measured):
      raise TypeError(f"{name} must be from reports.measure_model, got {_check.show(part)}.")
    task = part.task
    if task is not parts["student"].task:
      raise ValueError(
        f"{name} was measured by the task {task.name!r} and the student by another "
        f"({parts['student'].task.name!r}): measure all models by one."
      )
    missing = sorted(task.fidelity) if task.compared is not None else []
    if name != "teacher" and missing and not set(missing) & set(part.quality):
      raise ValueError(f"{name} lacks {missing}; measure it with teacher=.")
    for metric, one in {**task.metrics, **task.others, **task.fidelity}.items():
      values = np.atleast_1d(part.quality.get(metric, np.nan))
      if one.percent and np.any((values < 0) | (values > 1)):
        raise ValueError(
          f"{name} has the {metric} {values}; it is a share of labelled examples, in 0 .. 1."
        )
    if name != "teacher" and _instances(part) != seeds:
      raise ValueError(
        f"seeds has {seeds} and {name} {_instances(part)} instances; give each one's seed."
      )
  found: Task = parts["student"].task
  return found


def _instances(part: Measured) -> int:
  """How many seeds a model is of, of whatever was measured."""
  said = part.answers.predicted if isinstance(part.answers, Answers) else None
  kept = part.answers.values() if isinstance(part.answers, Mapping) else ()
  there = (*part.quality.values(), *(() if said is None else (said,)), *kept)
  return len(np.atleast_1d(next(iter(there), 0)))


def _spreads(part: Measured, names: Sequence[str]) -> dict[str, Any]:
  """Those that were measured; of one that is not finite throughout there is no mean."""
  found = {name: part.quality[name] for name in names if name in part.quality}
  return {
    name: document.spread(values if np.all(np.isfinite(values)) else [])
    for name, values in found.items()
  }


def _model(part: Measured, names: Sequence[str]) -> dict[str, Any]:
  first, *_ = names
  model = {
    "description": part.description,
    "instances": _instances(part),
    **_spreads(part, names),
    **part.costs,
    "per_seed": {n: np.atleast_1d(part.quality[n]) for n in names if n in part.quality} or None,
  }
  if first in part.quality:
    # Seeds without one are left out of it, as they are of the gain; the page says so.
    model[first] = document.spread(np.atleast_1d(part.quality[first]))
  return model


def write_report(
  folder: str | os.PathLike[str],
  report: Mapping[str, Any],
  *,
  predictions: Predictions | None = None,
) -> pathlib.Path:
  """Writes ``report.json``, ``report.md``, ``report.html``, ``predictions.npz``, and a picture.

  The picture is called by the metric, ``accuracy.png``. A report on another split than ``test``
  gets the split's name: ``report-validation.json``. Numbers
  are written first: whatever should go wrong with a page, they are there.

  Args:
    folder: the run's folder.
    report: from `build_report`.
    predictions: the answers on each example; None makes a report without classes, calibration
      diagrams, lost examples and slices, which says so.

  Returns:
    The path of the Markdown report.
  """
  _extras.need("reports.write_report", "matplotlib", "scipy", "jinja2", "jsonschema")
  folder = _check.folder("folder", folder)
  if not isinstance(report, Mapping) or "split" not in report:
    raise TypeError(f"report must be what reports.build_report returns, got {_check.show(report)}.")
  if not folder.is_dir():
    raise NotADirectoryError(f"folder={os.fspath(folder)!r} is no folder; give the run's.")
  end = evidence.suffix(report["split"])
  answers = None if predictions is None else f"predictions{end}.npz"
  runs.write_json(folder / f"report{end}.json", document.known({**report, "predictions": answers}))
  if predictions is not None and answers is not None:
    save_predictions(folder / answers, predictions)
  render_report(folder, split=report["split"])
  return folder / f"report{end}.md"


def render_report(
  folder: str | os.PathLike[str],
  *,
  split: str = "test",
  metadata: Mapping[str, Any] | None = None,
) -> pathlib.Path:
  """Makes the pages of a report again from a run's folder alone; runs no network.

  What is missing, broken or of another version is said on the page, never an error. The numbers
  that follow from the answers (``classes``, ``slices``, ``decision``, ...) are put into
  ``report.json`` anew, where that is whole and of this version; what was measured stays.

  Args:
    folder: the run's folder.
    split: which split's report.
    metadata: columns to slice the split by from now on, beside those that it is sliced by already,
      see `evaluation.predictions.column`.

  Returns:
    The path of ``report.html``.

  Raises:
    FileNotFoundError: the folder has nothing to make a report of.
    OSError: the folder cannot be written.
    ValueError: a column does not fit, or there are no answers on each example to slice.
  """
  _extras.need("a report", "matplotlib", "scipy", "jinja2", "jsonschema")
  found = evidence.read(folder, split)
  if metadata:
    _slice(found, metadata)
    found = evidence.read(folder, split)
  derived = _derived(found)
  end = evidence.suffix(split)
  anew = {**_as_json(derived), "problems": found.problems}
  report = {**found.report, **anew, "texts": found.texts}
  if found.whole is not None:
    runs.write_json(found.folder / f"report{end}.json", document.known({**found.whole, **anew}))
  named = summary.picture_name(report, end)
  summary.picture(report, found.folder / named)
  runs.write_text(found.folder / f"report{end}.md", summary.text(report, named))
  path = found.folder / f"report{end}.html"
  runs.write_text(path, page.build(found, derived))
  return path


def _slice(found: evidence.Evidence, metadata: Mapping[str, Any]) -> None:
  """Puts more columns beside the answers."""
  answers = found.predictions
  if answers is None:
    raise ValueError(
      f"{os.fspath(found.folder)!r} has no answers on each example that could be sliced "
      f"({' '.join(found.problems)})."
    )
  size = found.report["examples"]
  columns = {
    str(name): column(str(name), values, answers.index, size) for name, values in metadata.items()
  }
  path = found.folder / f"predictions{evidence.suffix(found.split)}.npz"
  sliced = dataclasses.replace(answers, columns={**answers.columns, **columns})
  save_predictions(path, sliced)


def _derived(found: evidence.Evidence) -> dict[str, Any]:
  """What follows from the answers on each example, and the decision."""
  answers = found.predictions
  known = answers is not None and len(answers) > 0 and "student" in answers.models
  measured = answers is not None and len(answers) > 0
  readings = document.readings(found.report)
  classes = analysis.classes(answers) if answers is not None and known else []
  slices = analysis.slices(answers, readings) if answers is not None and measured else {}
  lost = None
  if answers is not None and known and "teacher" in answers.models:
    lost = analysis.lost(answers)
  confused = analysis.confusions(answers) if answers is not None and known else []
  decision = decide(found, classes, slices)
  return {
    "decision": decision,
    "classes": classes,
    "confusions": confused,
    "slices": slices,
    "lost": lost,
    "parts": analysis.parts(answers) if answers is not None else {},
    "paired": analysis.paired(answers, readings) if answers is not None and measured else [],
  }


def _as_json(derived: Mapping[str, Any]) -> dict[str, Any]:
  lost = derived["lost"]
  numbers = None
  if lost is not None:
    numbers = {
      "known": lost.known,
      "sure": lost.sure,
      "lost": lost.most,
      "sometimes": len(lost.rows),
      "baseline_right": lost.baseline_right,
      "gained": len(lost.gained),
    }
  return {**derived, "lost": numbers}
