"""What an experiment ends with: teacher, labels alone and distillation, measured side by side."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxdistill import _check, _extras, evaluation, runs, teachers
from jaxdistill.data import Batches, Examples, Records
from jaxdistill.evaluation import predictions, tasks
from jaxdistill.evaluation.predictions import Answers, Predictions
from jaxdistill.evaluation.tasks import Shows, Task
from jaxdistill.reports import _report
from jaxdistill.reports._pages import analysis, document, exhibits
from jaxdistill.reports._texts import Texts, write_texts
from jaxdistill.types import Batch, Model, Network, Teacher

__all__ = ["compare_students", "gather_predictions"]

# Examples to look at: those that were lost, those that were gained, and others that most students
# get wrong, for a comparison of two runs. So a page stays small enough to send.
_LOST, _GAINED, _KEPT = 96, 48, 192
_POINTS = 2000  # of a target, which no picture could show more of


def compare_students(
  folder: str | os.PathLike[str],
  *,
  network: Network | Mapping[str, Model],
  teacher: Teacher,
  batches: Batch | Batches,
  examples: Examples | Records | int,
  descriptions: Mapping[str, str] | None = None,
  metadata: Mapping[str, Any] | None = None,
  show: exhibits.Show | None = None,
  task: Task | None = None,
  texts: Texts | None = None,
  **about: Any,
) -> tuple[pathlib.Path, dict[str, Any]]:
  """Compares the runs ``baseline`` and ``student`` of an experiment's folder with their teacher.

  Where there is no ``baseline``, the report says that what distillation gained is unknown. In a
  program of several processes all call this, evaluate together, and process 0 writes what it timed.

  Args:
    folder: the experiment's folder; the report is written there.
    network: the network of both runs, each of which is of one seed or of several. What it costs is
      measured once: timing it twice would show the clock's noise as a difference. Or the models
      themselves, ``{"baseline": fitted, "student": fitted}``: no run is read then.
    teacher: the teacher.
    batches: the split, from `jaxdistill.data.evaluation_batches`.
    examples: the examples that the batches were made of, whose classes have names and which can be
      looked at; or only how many there are.
    descriptions: what ``teacher``, ``baseline`` and ``student`` are, in a few words.
    metadata: columns to slice the split by, see `evaluation.predictions.column`.
    show: how an example is shown, see `exhibits.chosen`.
    task: what the labels mean; one class an example where left out.
    texts: of language models, how sample texts of all three are drawn, which are shown side by
      side; the examples are then `data.Examples`.
    **about: what `reports.build_report` takes beside the models. By default the examples' name and
      version, the split ``test``, seeds from 0 on, and no commands.

  Returns:
    ``(the path of report.md, the report)``.

  Raises:
    FileNotFoundError: a run has no usable checkpoint.
    TypeError: the task, or the models, are of another kind.
    ValueError: a run is not finished, or a column of metadata does not fit; or batches are streamed
      and ``examples`` is a number; or they are not of the teacher's tokenizer.
  """
  _extras.need("reports.compare_students", "matplotlib", "scipy", "jinja2", "jsonschema")
  runs.check_place(folder, "report")  # before the models are measured
  folder = _check.folder("folder", folder)
  size = examples if isinstance(examples, int) else len(examples)
  task = tasks.classification() if task is None else task
  _check_kinds(task, texts, examples)
  if isinstance(examples, Examples) and isinstance(teacher, Teacher):
    teachers.check_tokenizer(teacher, examples.tokenizer, examples.name)
  told = _told(batches, examples)
  columns = _columns(metadata, told, size, task)  # a wrong one says so before the long work
  models = _models(folder, network)
  costs = _costs(teacher, models, batches)
  # The teacher is asked once, for itself and for all that are compared with it.
  taught = evaluation.taught(teacher, batches, task=task)
  asked: dict[str, Model | Teacher] = {"teacher": teachers.brought(), **models}
  measured = {
    name: _report.measure_model(
      model,
      taught,
      costs=costs[name],
      description=(descriptions or {}).get(name, ""),
      task=task,
    )
    for name, model in asked.items()
  }
  instances = models["student"].seeds or 1
  result = _report.build_report(
    teacher=measured["teacher"],
    baseline=measured.get("baseline"),
    student=measured["student"],
    examples=size,
    **{**_described(examples, instances), **about},
  )
  found = gather_predictions(
    measured,
    told,
    dataset=result["dataset"],
    split=result["split"],
    seeds=result["seeds"],
    examples=None if isinstance(examples, int) else examples,
    columns=columns,
    show=show,
  )

  def write() -> None:
    with runs.writes(folder):
      folder.mkdir(parents=True, exist_ok=True)
    if texts is not None and isinstance(examples, Examples):
      write_texts(folder, texts, {"teacher": teacher, **models}, examples, split=result["split"])
    kept = found if found.models or found.details else None
    _report.write_report(folder, result, predictions=kept)

  runs.Together().first(write)
  return folder / "report.md", result


def _costs(
  teacher: Teacher, models: Mapping[str, Model], batches: Batch | Batches
) -> dict[str, Any]:
  """What each model costs; one network is measured once."""
  costs = {"teacher": evaluation.costs(teacher, batches)}
  for name, model in models.items():
    alike = [n for n in costs if n != "teacher" and models[n].network is model.network]
    costs[name] = costs[alike[0]] if alike else evaluation.costs(model, batches)
  return costs


def _told(batches: Batch | Batches, examples: Any) -> Batch:
  """The batches, leaves ``[N, B, ...]``; of those that are streamed all but what is large."""
  if isinstance(batches, Batch):
    return batches
  if isinstance(examples, int):
    raise ValueError(
      f"examples={examples} is a number, and of batches that are streamed examples are read anew "
      "to be shown: give the records that the batches are made of."
    )
  each = [dataclasses.replace(batch, inputs=None, teacher=None) for batch in batches]
  stacked: Batch = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
  return stacked


def _check_kinds(task: Any, texts: Any, examples: Any) -> None:
  """Raises for a task, or for texts, that are none; or for texts of what lies in no array."""
  if not isinstance(task, Task):
    raise TypeError(
      f"task={_check.show(task)} must be an evaluation.tasks.Task, such as tasks.regression()."
    )
  if texts is not None and not (isinstance(texts, Texts) and isinstance(examples, Examples)):
    raise TypeError(
      f"texts={_check.show(texts)} must be reports.Texts(tokenizer), and examples data.Examples."
    )


def _models(folder: pathlib.Path, network: Network | Mapping[str, Model]) -> dict[str, Model]:
  """The baseline, where there is one, and the student."""
  if isinstance(network, Network):
    there = [n for n in ("baseline", "student") if n == "student" or (folder / n).is_dir()]
    return {name: teachers.restore(folder / name, network) for name in there}
  if (
    not isinstance(network, Mapping)
    or not set(network) <= {"baseline", "student"}
    or ("student" not in network)
  ):
    raise TypeError(
      "network must be the Network of both runs, or the models themselves, {'baseline': model, "
      f"'student': model}}, got {_check.show(network)}."
    )
  return {name: network[name] for name in ("baseline", "student") if name in network}


def _described(examples: Examples | Records | int, instances: int) -> dict[str, Any]:
  """What a report says of the data and the runs where nobody said it."""
  name = "data" if isinstance(examples, int) else f"{examples.name} {examples.version}".strip()
  seeds = {"seeds": range(instances), "varied": "seeds"}
  return {"dataset": name or "data", "split": "test", **seeds, "commands": ()}


def _columns(
  metadata: Mapping[str, Any] | None, batches: Batch, size: int, task: Task
) -> dict[str, predictions.Column]:
  if metadata is not None and not isinstance(metadata, Mapping):
    raise TypeError("metadata must be columns by name: {'font': ['serif', 'sans', ...]}.")
  index = _index(batches, task)
  return {
    str(name): predictions.column(str(name), values, index, size)
    for name, values in (metadata or {}).items()
  }


def _there(batches: Batch, task: Task) -> np.ndarray:
  """``[N · B]``, which examples of stacked batches `evaluation.examine` has something of."""
  return (predictions.counted if task.shown.classes else predictions.present)(batches)


def _index(batches: Batch, task: Task) -> np.ndarray:
  """The numbers of those examples."""
  return np.asarray(batches.index).reshape(-1)[_there(batches, task)]


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
  task = next((one.task for one in measured.values()), tasks.classification())
  about: dict[str, Any] = {
    "dataset": dataset,
    "split": split,
    "seeds": tuple(int(seed) for seed in seeds),
    "label_names": () if examples is None else tuple(examples.label_names),
    "columns": dict(columns or {}),
  }
  index = _index(batches, task)
  about["weight"] = predictions.weight_of(batches, _there(batches, task))
  source = batches if examples is None else examples
  if not task.shown.classes:
    names = [name for one in measured.values() for name in one.quality]
    about |= {"index": index, "task": document.about(task, list(dict.fromkeys(names)))}
    return _detailed(measured, task, about, lambda rows: exhibits.chosen(rows, source, show))
  answers = {
    name: one.answers for name, one in measured.items() if isinstance(one.answers, Answers)
  }
  labels = np.asarray(batches.labels).reshape(-1)[predictions.counted(batches)]
  largest = [int(labels.max(initial=-1))]
  largest += [int(one.predicted.max(initial=-1)) for one in answers.values()]
  found = Predictions(
    index=index,
    labels=labels,
    models=answers,
    num_classes=max(largest) + 1 if examples is None else examples.num_classes,
    **about,
  )
  if not {"teacher", "student"} <= answers.keys() or not len(found):
    return found
  wrong = 1 - found.correct("student").mean(axis=0)
  hard = np.argsort(-wrong, kind="stable")[: int(np.sum(wrong > 0))]
  gone = analysis.lost(found)
  rows = list(dict.fromkeys([*gone.rows[:_LOST], *gone.gained[:_GAINED], *hard]))[:_KEPT]
  found.shown.update(exhibits.chosen(found.index[rows], source, show))
  return found


def _detailed(
  measured: Mapping[str, _report.Measured],
  task: Task,
  about: Mapping[str, Any],
  chosen: Callable[[np.ndarray], dict[int, np.ndarray | str]],
) -> Predictions:
  """What the task makes of what was kept, and some examples to look at."""
  kept = {name: one.answers for name, one in measured.items() if isinstance(one.answers, Mapping)}
  kept = {name: one for name, one in kept.items() if one}
  called = functools.partial(_called, names=about["label_names"])
  details = {name: _details(one, task.shown, called) for name, one in kept.items()}
  found = Predictions(labels=np.zeros(0, np.int32), models={}, details=details, **about)
  tells, size = task.shown.tells, len(found)
  if not kept or not size:
    return found
  readings = document.readings({"task": found.task})
  rows = np.unique(np.concatenate(list(analysis.outstanding(found, readings).values())))
  for name, one in kept.items():
    if tells is None:
      continue
    first = {key: values[0] for key, values in one.items()}
    for row in rows.tolist():
      label, said = tells(first, row)
      index = int(found.index[row])
      found.truth[index], details[name].said[index] = called(label), called(said)
  found.shown.update(chosen(found.index[rows]))
  return found


def _called(one: Any, names: Sequence[str]) -> np.ndarray | str:
  """A text as it is, a class by its name, several in a row; a picture of classes as whole numbers.

  >>> _called((0, 2), ["cat", "dog"]), _called((), [])
  ('cat, 2', 'none')
  """
  if isinstance(one, str):
    return one
  if isinstance(one, tuple):
    return ", ".join(str(_called(part, names)) for part in one) or "none"
  array = np.asarray(one)
  if array.ndim == 2:
    return array.astype(np.int32)
  if array.ndim == 0 and array.dtype.kind in "iu":
    number = int(array)
    return names[number] if 0 <= number < len(names) else str(number)
  raise TypeError(
    "Shows.tells must give texts, classes' numbers, tuples of these, or pictures [H, W] of "
    f"classes, and gave {_check.show(one)}."
  )


def _details(
  kept: Mapping[str, np.ndarray], shows: Shows, called: Callable[[Any], Any]
) -> predictions.Details:
  """What a task makes of what was kept of a model, ``{name: [S, N, ...]}``."""
  count = len(next(iter(kept.values())))
  each = [{name: values[s] for name, values in kept.items()} for s in range(count)]
  made = predictions.Details()
  if shows.values is not None:
    of_each = [shows.values(one) for one in each]
    made.values.update({n: np.stack([np.asarray(o[n]) for o in of_each]) for n in of_each[0]})
  if shows.parts is not None:
    apart = [shows.parts(one) for one in each]
    for name in dict.fromkeys(name for one in apart for name in one):
      there = [one.get(name, {}) for one in apart]
      rows = list(dict.fromkeys(row for one in there for row in one))
      made.rows[name] = tuple(str(called(row)) for row in rows)
      made.parts[name] = np.array([[one.get(row, np.nan) for row in rows] for one in there])
  if shows.points is not None:
    for name, (labels, said) in shows.points(each[0]).items():
      some = np.unique(np.linspace(0, len(labels) - 1, _POINTS).round().astype(int))
      some = some if len(labels) else np.zeros(0, int)
      made.points[name] = np.stack([np.asarray(labels)[some], np.asarray(said)[some]])
  return made
