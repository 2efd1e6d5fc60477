"""What an experiment ends with: teacher, labels alone and distillation, measured side by side."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdistill import _check, _extras, evaluation, teachers
from jaxdistill.data import Examples, Records
from jaxdistill.evaluation import predictions
from jaxdistill.evaluation.predictions import Predictions
from jaxdistill.reports import _report
from jaxdistill.reports._pages import analysis, exhibits
from jaxdistill.types import Batch, Model, Network, Outputs, Teacher

__all__ = ["compare_students", "gather_predictions"]

# Examples to look at: those that were lost, those that were gained, and others that most students
# get wrong, for a comparison of two runs. So a page stays small enough to send.
_LOST, _GAINED, _KEPT = 96, 48, 192


def compare_students(
  folder: str | os.PathLike[str],
  *,
  network: Network,
  teacher: Teacher,
  batches: Batch,
  descriptions: Mapping[str, str],
  examples: Examples | Records | int,
  metadata: Mapping[str, Any] | None = None,
  show: exhibits.Show | None = None,
  **about: Any,
) -> tuple[pathlib.Path, dict[str, Any]]:
  """Compares the runs ``baseline`` and ``student`` of an experiment's folder with their teacher.

  Where the folder has no ``baseline``, the report says that what distillation gained is unknown.

  Args:
    folder: the experiment's folder; the report is written there.
    network: the network of both runs, each of which is of one seed or of several. What it costs is
      measured once: timing it twice would show the clock's noise as a difference.
    teacher: the teacher.
    batches: the split, from `jaxdistill.data.evaluation_batches`.
    descriptions: what ``teacher``, ``baseline`` and ``student`` are, in a few words.
    examples: the examples that the batches were made of, whose classes have names and which can be
      looked at; or only how many there are.
    metadata: columns to slice the split by, see `evaluation.predictions.column`.
    show: how an example is shown, see `exhibits.chosen`.
    **about: what `reports.build_report` takes beside the models.

  Returns:
    ``(the path of report.md, the report)``.

  Raises:
    FileNotFoundError: a run has no usable checkpoint.
    ValueError: a run is not finished, or a column of metadata does not fit.
  """
  _extras.need("reports.compare_students", "matplotlib", "scipy", "jinja2", "jsonschema")
  folder = _check.folder("folder", folder)
  size = examples if isinstance(examples, int) else len(examples)
  columns = _columns(metadata, batches, size)  # a wrong one says so before the long work
  there = [name for name in ("baseline", "student") if _is_there(folder, name)]
  models = {name: teachers.restore(folder / name, network) for name in there}
  costs = {"teacher": evaluation.costs(teacher, batches)}
  costs |= dict.fromkeys(there, evaluation.costs(models["student"], batches))
  # The teacher is asked once, for itself and for all that are compared with it.
  taught = evaluation.taught(teacher, batches)
  asked: dict[str, Model | Teacher] = {"teacher": Teacher({}, _as_taught), **models}
  measured = {
    name: _report.measure_model(model, taught, costs=costs[name], description=descriptions[name])
    for name, model in asked.items()
  }
  result = _report.build_report(
    teacher=measured["teacher"],
    baseline=measured.get("baseline"),
    student=measured["student"],
    examples=size,
    **about,
  )
  found = gather_predictions(
    measured,
    batches,
    dataset=result["dataset"],
    split=result["split"],
    seeds=result["seeds"],
    examples=None if isinstance(examples, int) else examples,
    columns=columns,
    show=show,
  )
  return _report.write_report(folder, result, predictions=found), result


def _as_taught(variables: Any, batch: Batch) -> Outputs:
  """The teacher's outputs as they came along."""
  assert batch.teacher is not None
  return batch.teacher


def _is_there(folder: pathlib.Path, name: str) -> bool:
  return name == "student" or (folder / name).is_dir()


def _columns(
  metadata: Mapping[str, Any] | None, batches: Batch, size: int
) -> dict[str, predictions.Column]:
  if metadata is not None and not isinstance(metadata, Mapping):
    raise TypeError("metadata must be columns by name: {'font': ['serif', 'sans', ...]}.")
  index = _index(batches)
  return {
    str(name): predictions.column(str(name), values, index, size)
    for name, values in (metadata or {}).items()
  }


def _index(batches: Batch) -> np.ndarray:
  return np.asarray(batches.index).reshape(-1)[predictions.counted(batches)]


def gather_predictions(
  measured: Mapping[str, _report.Measured],
  batches: Batch,
  *,
  dataset: str,
  split: str,
  seeds: Any = (),
  examples: Examples | Records | None = None,
  columns: Mapping[str, predictions.Column] | None = None,
  show: exhibits.Show | None = None,
) -> Predictions:
  """What all models said of each example, with some to look at: lost, gained and hard ones.

  Args:
    measured: by model, from `reports.measure_model`, on these batches.
    batches: the split.
    dataset: the data set's name and version.
    split: which split it is.
    seeds: those of baseline and student.
    examples: what the batches were made of; without it the inputs are shown as a network sees them,
      and classes are numbers.
    columns: of metadata, see `evaluation.predictions.column`.
    show: how an example is shown, see `exhibits.chosen`.

  Returns:
    What `reports.write_report` keeps as ``predictions.npz``.
  """
  where = predictions.counted(batches)
  answers = {name: one.answers for name, one in measured.items() if one.answers is not None}
  labels = np.asarray(batches.labels).reshape(-1)[where]
  largest = [int(labels.max(initial=-1))]
  largest += [int(one.predicted.max(initial=-1)) for one in answers.values()]
  found = Predictions(
    index=_index(batches),
    labels=labels,
    models=answers,
    dataset=dataset,
    split=split,
    seeds=tuple(int(seed) for seed in seeds),
    label_names=() if examples is None else tuple(examples.label_names),
    num_classes=max(largest) + 1 if examples is None else examples.num_classes,
    columns=dict(columns or {}),
  )
  if not {"teacher", "student"} <= answers.keys() or not len(found):
    return found
  wrong = 1 - found.correct("student").mean(axis=0)
  hard = np.argsort(-wrong, kind="stable")[: int(np.sum(wrong > 0))]
  gone = analysis.lost(found)
  rows = list(dict.fromkeys([*gone.rows[:_LOST], *gone.gained[:_GAINED], *hard]))[:_KEPT]
  source = batches if examples is None else examples
  found.shown.update(exhibits.chosen(found.index[rows], source, show))
  return found
