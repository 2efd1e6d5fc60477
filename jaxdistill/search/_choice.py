"""Which point of a sweep is best, what its lead is worth, and the table and picture of all."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxdistill import _check, runs
from jaxdistill.data import Batches
from jaxdistill.evaluation import predictions, tasks
from jaxdistill.evaluation.metrics import mean_std
from jaxdistill.reports import Markup, csv_text, figures, grid, with_std
from jaxdistill.types import Batch, Model

__all__ = ["Choice", "Halving", "Result", "Row", "best_of", "measured", "standard_error"]


@dataclasses.dataclass(frozen=True)
class Halving:
  """Successive halving: after each rung the best 1/factor of the points go on.

  Jamieson, Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization",
  2016; 3 is the factor of Li et al., "Hyperband", 2018. A rung has ``factor`` times the steps of
  the one before it, the last one all of them; schedules run over all of them throughout.

  Attributes:
    factor: of points and of steps.
    rungs: how many there are, the last included.
  """

  factor: int = 3
  rungs: int = 3

  def __post_init__(self) -> None:
    _check.whole("factor", self.factor, least=2)
    _check.whole("rungs", self.rungs)

  def until(self, rung: int, steps: int) -> int:
    """The step at which a rung ends, of so many in all."""
    return math.ceil(steps / self.factor ** (self.rungs - 1 - rung))


@dataclasses.dataclass(frozen=True)
class Choice:
  """By what a point of a search is chosen, and what is done with it.

  Attributes:
    validation: the split to choose on, from `jaxdistill.data.evaluation_batches`; never the test
      split.
    metric: the validation metric to choose by, one of the task's: accuracy, nll or ece of
      classification (lower is better for these); the task's first where left out.
    halving: to drop hopeless points early; None trains all of them to the end in a `sweep`, and
      drops two thirds in each of three rungs in `compress`.
    retrain: seeds from which the chosen point is trained anew before it is tested: a few seeds that
      won are better than their point is. None takes its students as they are in a `sweep`, and
      ``range(5)`` in `compress`.
    test: the test split; read once, for the chosen point of a `sweep` alone.
    task: what the labels mean, see `jaxdistill.evaluation.tasks`; one class an example where left
      out.
    baseline: the objective on labels alone by which `compress` trains what it chose once more, to
      tell what distillation adds: a method that asks no teacher anything. By default
      ``recipes.labels()`` where labels are classes, and nothing elsewhere.

  Raises:
    TypeError: a split is not what `jaxdistill.data.evaluation_batches` makes.
    ValueError: the metric is none of these, or no example of a split has a label.
  """

  validation: Batch | Batches
  metric: str = ""
  halving: Halving | None = None
  retrain: Sequence[int] | Sequence[tuple[int, int]] | None = None
  test: Batch | Batches | None = None
  task: tasks.Task | None = None
  baseline: Any = None

  def __post_init__(self) -> None:
    if not isinstance(self.task, tasks.Task | None):
      raise TypeError(
        f"task={_check.show(self.task)} must be an evaluation.tasks.Task, such as "
        "tasks.regression()."
      )
    object.__setattr__(self, "metric", self.metric or self.of.first)
    self.of.metric(self.metric)
    for name, split in (("validation", self.validation), ("test", self.test)):
      if not (name == "test" and split is None) and not isinstance(split, Batch | Batches):
        raise TypeError(
          f"{name}={_check.show(split)} must be what data.evaluation_batches makes, leaves "
          "[N, B, ...], or data.Batches."
        )
      if split is None or self.of.unlabelled:
        continue
      if not predictions.labelled(split):
        raise ValueError(
          f"no example of {name} has a label, and {self.metric} is of labels: nothing could be "
          "chosen by it, nor told. Give a split that has some."
        )
    if not isinstance(self.halving, Halving | None):
      raise TypeError(f"halving={_check.show(self.halving)} must be a search.Halving, or None.")

  def describe(self) -> dict[str, Any]:
    """What of it decides what a search trains, as ``config.json`` holds it."""
    halving = None if self.halving is None else dataclasses.asdict(self.halving)
    told = {"metric": self.metric, "halving": halving}
    return told if self.task is None else {**told, "task": self.task.name}

  @property
  def of(self) -> tasks.Task:
    """The task."""
    return tasks.classification() if self.task is None else self.task

  def score(self, row: Row) -> np.ndarray:
    """A point's metric ``[S]``, turned so that higher is better."""
    return self.of.metric(self.metric).sign * row.metrics[self.metric]


@dataclasses.dataclass(frozen=True)
class Row:
  """One point of a sweep.

  Attributes:
    values: its values by keyword.
    metrics: validation metrics, ``[S]`` over the seeds, NaN where a student was not finite.
    step: how many steps its students were trained for.
    status: ``"finished"``, ``"dropped"`` (by halving), ``"pruned"`` (in a study) or
      ``"not finite"`` (one of its students).
  """

  values: dict[str, Any]
  metrics: dict[str, np.ndarray]
  step: int
  status: str


def standard_error(values: np.ndarray) -> float:
  """The standard error of a mean over seeds, ``[S]``; 0 for one seed, which tells of none.

  Args:
    values: one for each seed; differences, for a comparison seed by seed.

  >>> standard_error(np.array([1.0, 3.0])), standard_error(np.array([1.0]))
  (1.0, 0.0)
  """
  count = len(values)
  return float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else 0.0


def best_of(
  rows: Sequence[Row], metric: str, *, task: tasks.Task | None = None
) -> tuple[int, list[int]]:
  """The finished point with the best mean, and those that it does not clearly beat.

  Args:
    rows: the points.
    metric: one of the task's.
    task: what the labels mean, and so which way is better; one class an example where left out.

  Returns:
    ``(index, ties)``: the ties are the finished points whose mean is within one standard error of
    the difference, which is taken seed by seed; the best is not among them. With one seed there is
    no such error, and only equal points tie.

  Raises:
    FloatingPointError: no point finished, or none with a finite metric.
  """
  sign = (tasks.classification() if task is None else task).metric(metric).sign
  scores: list[Any] = [
    sign * row.metrics[metric] if measured(row, metric) else None for row in rows
  ]
  finished = [i for i, row in enumerate(rows) if row.status == "finished"]
  # Of a NaN nobody knows whether it is more, and `max` would take the first.
  finished = [i for i in finished if scores[i] is not None]
  if not finished:
    raise FloatingPointError(
      f"no point of the sweep stayed finite, its {metric} included; lower the learning rate or the "
      "weights."
    )
  best = max(finished, key=lambda i: (float(np.mean(scores[i])), -i))
  ties = []
  for i in finished:
    behind = scores[best] - scores[i]
    if i != best and float(np.mean(behind)) <= standard_error(behind):
      ties.append(i)
  return best, ties


def measured(row: Row, metric: str) -> bool:
  """Whether a point has a finite number of each student.

  Args:
    row: the point.
    metric: by name.
  """
  return metric in row.metrics and bool(np.all(np.isfinite(row.metrics[metric])))


@dataclasses.dataclass(frozen=True)
class Result:
  """What `jaxdistill.search.sweep` and `jaxdistill.search.study` return.

  Attributes:
    rows: the points, in the order in which they were given or proposed.
    seeds: ``(seed, data_seed)`` of each point's students.
    choice: what was chosen by.
    best: the index of the chosen point.
    ties: the points that it does not clearly beat, see `best_of`.
    model: the chosen point's deployed network and variables, over ``final_seeds``.
    students: ``index -> the deployed model`` of any point, over ``seeds``.
    final_seeds: those of ``seeds``, or those that the chosen point was trained anew from.
    test: the chosen students on the test split, ``[S]`` by metric; None where none was given.
  """

  rows: list[Row]
  seeds: list[tuple[int, int]]
  choice: Choice
  best: int
  ties: list[int]
  model: Model
  students: Callable[[int], Model]
  final_seeds: list[tuple[int, int]]
  test: dict[str, np.ndarray] | None = None

  @property
  def metric(self) -> str:
    """What was chosen by."""
    return self.choice.metric

  def _spread(self, metrics: dict[str, np.ndarray]) -> str:
    """Mean ± std of the metric; a share in percent."""
    values = metrics.get(self.metric, np.array([np.nan]))
    if not np.all(np.isfinite(values)):
      return "not finite"
    if self.choice.of.metric(self.metric).percent:
      return f"{with_std(*mean_std(100 * values))} %"
    return with_std(*mean_std(values), 4)

  @property
  def chosen(self) -> dict[str, Any]:
    """The chosen point's values."""
    return self.rows[self.best].values

  def table(self) -> str:
    """All points as a Markdown table, and a sentence on the choice."""
    names = list(self.rows[0].values)
    lines = [[*names, f"{self.metric} (validation)", ""]]
    for i, row in enumerate(self.rows):
      mark = Markup("**chosen**") if i == self.best else "tie" if i in self.ties else ""
      if row.status != "finished":
        mark = f"{row.status}, step {row.step}"
      cells = [_cell(row.values[name]) for name in names]
      lines.append([*cells, self._spread(row.metrics), mark])
    return "\n".join([grid(lines), "", self.sentence()])

  def sentence(self) -> str:
    """What was chosen, by how much, and what it does on the test split."""
    row, count = self.rows[self.best], len(self.seeds)
    values = ", ".join(f"{name} {_cell(value)}" for name, value in row.values.items())
    over = f"mean ± std over {count} seeds" if count > 1 else "one seed"
    text = f"Chosen on validation: {values or 'the one point'}, {self.metric} "
    text += f"{self._spread(row.metrics)} ({over})."
    if self.ties:
      text += (
        f" {len(self.ties)} of {len(self.rows) - 1} other points are within one standard error of "
        "the difference."
      )
    if self.test is not None:
      anew = (
        ""
        if self.final_seeds == self.seeds
        else f", trained anew from {len(self.final_seeds)} seeds"
      )
      text += f" On the test split, read once{anew}: {self._spread(self.test)}."
    return text

  def reached(self) -> dict[str, np.ndarray]:
    """What the chosen students validated at, and what they reached on the test split, by name."""
    found = {f"validation/{n}": of for n, of in self.rows[self.best].metrics.items()}
    return found | {f"test/{name}": of for name, of in (self.test or {}).items()}

  def write(self, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes ``table.md``, ``table.csv`` (a line for each student), ``chosen.json``, a picture.

    Args:
      folder: the sweep's.

    Returns:
      The files' paths.
    """
    runs.write_text(folder / "table.md", self.table() + "\n")
    runs.write_text(folder / "table.csv", self._csv())
    chosen = {
      "values": self.chosen,
      "metric": self.metric,
      "validation": self.rows[self.best].metrics,
      "ties": [self.rows[i].values for i in self.ties],
      "seeds": self.seeds,
      "final_seeds": self.final_seeds,
      "test": self.test,
    }
    runs.write_json(folder / "chosen.json", chosen)
    names = ["table.md", "table.csv", "chosen.json"]
    if self.picture(folder / "sweep.png"):
      names.append("sweep.png")
    return [folder / name for name in names]

  def _csv(self) -> str:
    names, known = list(self.rows[0].values), list(self.rows[0].metrics)
    lines: list[list[Any]] = [[*names, "seed", "data_seed", "status", "step", *known]]
    for row in self.rows:
      for s, pair in enumerate(self.seeds):
        found = [float(row.metrics[name][s]) for name in known]
        lines.append([*row.values.values(), *pair, row.status, row.step, *found])
    return csv_text(lines)

  def picture(self, path: pathlib.Path) -> bool:
    """Draws the metric over the keyword with most numbers, a curve for each of the other values.

    Where every point would be a curve of its own, as of a study's proposals, there is a panel for
    each keyword instead.

    Args:
      path: of the PNG.

    Returns:
      Whether there was a keyword to draw it over.
    """
    numbers = {
      name: sorted({row.values[name] for row in self.rows})
      for name, value in self.rows[0].values.items()
      if all(isinstance(row.values[name], int | float) for row in self.rows)
    }
    over = max(numbers, key=lambda name: len(numbers[name]), default=None)
    if over is None or len(numbers[over]) < 2:
      return False
    x, names = numbers[over], _telling(self.rows, over)
    series: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    scale = 100 if self.choice.of.metric(self.metric).percent else 1
    for row in self.rows:
      label = (
        ", ".join(f"{n.replace('_', ' ')} {_cell(v)}" for n, v in row.values.items() if n in names)
        or self.metric
      )
      mean, std = series.setdefault(label, (np.full(len(x), np.nan), np.full(len(x), np.nan)))
      if row.status == "finished" and measured(row, self.metric):
        values = scale * row.metrics[self.metric]
        mean[x.index(row.values[over])] = np.mean(values)
        std[x.index(row.values[over])] = np.std(values, ddof=1) if len(values) > 1 else 0.0
    unit = " (%)" if scale == 100 else ""
    ylabel = f"validation {self.metric}{unit}"
    title = f"{len(self.rows)} points, {len(self.seeds)} seeds each"
    if len(series) == len(self.rows):  # no two lie on one curve, as of a study's proposals
      reached = [
        scale * np.mean(row.metrics[self.metric]) if measured(row, self.metric) else np.nan
        for row in self.rows
      ]
      figures.panels(
        path,
        {name.replace("_", " "): [row.values[name] for row in self.rows] for name in numbers},
        reached,
        ylabel=ylabel,
        title=f"{title}: means; open where a point was not trained to the end",
        chosen=self.best,
        hollow=[i for i, row in enumerate(self.rows) if row.status != "finished"],
      )
      return True
    figures.curves(
      path,
      x,
      series,
      xlabel=over.replace("_", " "),
      ylabel=ylabel,
      title=f"{title}: mean ± std",
    )
    return True


def _telling(rows: Sequence[Row], over: str) -> list[str]:
  """The keywords that tell curves apart, without those that follow from the others."""
  names = [name for name in rows[0].values if name != over]

  def curves(some: Sequence[str]) -> int:
    return len({tuple(repr(row.values[name]) for name in some) for row in rows})

  for name in reversed(names):
    rest = [other for other in names if other != name]
    if curves(rest) == curves(names):
      names = rest
  return names


def _cell(value: Any) -> str:
  return f"{value:.4g}" if isinstance(value, float) else str(value)
