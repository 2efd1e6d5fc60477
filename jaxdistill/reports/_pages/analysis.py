"""What answers say about a student: calibration, classes, slices, and what it lost of its teacher.

Functions of `jaxdistill.evaluation.predictions.Predictions`, on the host. A difference is called
real only beyond the noise of examples and of seeds, corrected for how many groups were looked at.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxdistill.evaluation import metrics
from jaxdistill.evaluation.predictions import Column, Predictions
from jaxdistill.reports._pages import significance

__all__ = ["Lost", "classes", "groups", "lost", "quality", "reliability", "slices"]

SURE = 0.8


def quality(found: Predictions, model: str) -> dict[str, np.ndarray]:
  """Accuracy, negative log-likelihood and calibration error of each instance, from its answers.

  Args:
    found: the answers.
    model: the model's name.

  Returns:
    ``accuracy``, ``nll`` (nats) and ``ece`` (15 bins), ``[S]``; NaN where undefined.
  """
  one, right = found.models[model], found.correct(model)
  with np.errstate(divide="ignore", invalid="ignore"):
    nll = -np.log(one.probability.astype(np.float64))
  bins = reliability(found, model)
  sums: dict[str, Any] = {f"bin_{name}": sums for name, sums in bins.items()}
  sums |= {"examples": len(found), "correct": right.sum(axis=1), "nll": nll.sum(axis=1)}
  # An answer has not what these two need.
  finished = metrics.finish({**sums, "top5": np.nan, "brier": np.nan})
  return {name: finished[name] for name in ("accuracy", "nll", "ece")}


def reliability(found: Predictions, model: str) -> dict[str, np.ndarray]:
  """Sums by confidence, for a reliability diagram.

  Args:
    found: the answers.
    model: the model's name.

  Returns:
    ``count``, ``confidence`` and ``correct``, ``[S, 15]`` sums over the examples of a bin; bins are
    equal and closed on the right. A confidence that is not a number is in none.

  Source: Guo, Pleiss, Sun, Weinberger, On Calibration of Modern Neural Networks, 2017.
  """
  confidence, right = found.models[model].confidence, found.correct(model)
  which = np.searchsorted(metrics.EDGES, confidence, side="left")
  sums = {
    name: np.zeros((len(confidence), metrics.BINS)) for name in ("count", "confidence", "correct")
  }
  for s, (bins, sure, hit) in enumerate(zip(which, confidence, right, strict=True)):
    there = np.isfinite(sure)
    for name, values in (("count", None), ("confidence", sure[there]), ("correct", hit[there])):
      sums[name][s] = np.bincount(bins[there], values, metrics.BINS)
  return sums


def groups(found: Predictions, column: Column) -> list[dict[str, Any]]:
  """Accuracy of every model on each group of examples, and how the student's differs.

  Args:
    found: the answers.
    column: which group each example is in.

  Returns:
    One dict per group, in the order of the names, and one for the missing where there are such:
    ``name``, ``examples``; ``accuracy`` ``{model: {"mean", "low", "high"}}``, Wilson intervals with
    95% for the mean over seeds (how it would vary with other examples; None without examples);
    ``changes`` ``{reference: {"change", "error", "p_value", "beyond_noise"}}``, the student less
    the baseline and less the teacher, as `significance.change` has them, p-values corrected (Holm)
    for the number of groups.
  """
  codes, names = column.codes, list(column.names)
  numbers = list(range(len(names)))
  if np.any(codes < 0):
    numbers.append(-1)
    names.append("missing")
  right = {name: found.correct(name) for name in found.models}
  rows: list[dict[str, Any]] = []
  for number, name in zip(numbers, names, strict=True):
    here = codes == number
    accuracy = {model: _share(hits[:, here]) for model, hits in right.items()}
    rows.append({"name": name, "examples": int(here.sum()), "accuracy": accuracy, "changes": {}})
  for reference in ("baseline", "teacher"):
    if reference not in right or "student" not in right:
      continue
    pairs = [(right["student"][:, codes == n], right[reference][:, codes == n]) for n in numbers]
    corrected = _changes(pairs)
    for row, one in zip(rows, corrected, strict=True):
      p_value = one["p_value"]
      beyond = p_value is not None and p_value < significance.LEVEL
      row["changes"][reference] = {**one, "beyond_noise": beyond}
  return rows


def _changes(pairs: list[tuple[np.ndarray, np.ndarray]]) -> list[dict[str, float | None]]:
  """Each group's change; seeds are as noisy as all groups together say, p-values are corrected."""
  sizes = [len(side) for side in pairs[0]] if pairs else [1, 1]
  paired = sizes[0] == sizes[1] or 1 in sizes
  pooled = None
  if paired:
    differences = [a.astype(np.float64) - b.astype(np.float64) for a, b in pairs]
    pooled = significance.pooled_variance(differences)
  changes = []
  for a, b in pairs:
    share = None if pooled is None else (pooled[0] / max(a.shape[1], 1), pooled[1])
    changes.append(significance.change(a, b, pooled=share))
  corrected = significance.holm([one["p_value"] for one in changes])
  return [{**one, "p_value": p} for one, p in zip(changes, corrected, strict=True)]


def _share(right: np.ndarray) -> dict[str, float | None]:
  """Mean over seeds with the interval over examples."""
  if not right.shape[1]:
    return {"mean": None, "low": None, "high": None}
  mean = float(right.mean())
  low, high = significance.wilson(mean * right.shape[1], right.shape[1])
  return {"mean": mean, "low": float(low), "high": float(high)}


def classes(found: Predictions) -> list[dict[str, Any]]:
  """`groups` by label, with what each class is mostly taken for.

  Args:
    found: the answers.

  Returns:
    One dict per class: what `groups` gives, ``predicted`` (how many examples the student calls so,
    a mean over seeds) and ``taken_for`` (``[[name, mean number of examples], ...]``, up to two).
  """
  size = max([found.num_classes, len(found.label_names), int(found.labels.max(initial=-1)) + 1])
  names = tuple(found.name(label) for label in range(size))
  rows = groups(found, Column(found.labels, names))
  if "student" not in found.models:
    return rows
  predicted = found.models["student"].predicted
  seeds = len(predicted)
  counts = np.bincount(predicted[predicted >= 0], minlength=size) / seeds
  for label, row in enumerate(rows[:size]):
    row["predicted"] = float(counts[label])
    wrong = predicted[:, found.labels == label]
    others, times = np.unique(wrong[wrong != label], return_counts=True)
    most = np.argsort(-times, kind="stable")[:2]
    row["taken_for"] = [[found.name(int(others[i])), float(times[i] / seeds)] for i in most]
  return rows


def slices(found: Predictions) -> dict[str, list[dict[str, Any]]]:
  """`groups` by every column of metadata."""
  return {name: groups(found, column) for name, column in found.columns.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Lost:
  """What the student lost of what its teacher knew.

  Attributes:
    rows: the examples that at least one student gets wrong, by their place in the answers, the
      clearest first.
    most: how many of them most students get wrong: those that are called lost.
    known: on how many examples the teacher is right and sure.
    sure: from which probability of the label it is called sure.
    baseline_right: how many of the lost ones most baselines know; None without a baseline.
    gained: on how many examples most students are right and the teacher is wrong.
  """

  rows: np.ndarray
  most: int
  known: int
  sure: float
  baseline_right: int | None
  gained: int


def lost(found: Predictions, *, sure: float = SURE) -> Lost:
  """The examples that the teacher knows and the student does not.

  Known is what every instance of the teacher gets right with a probability of at least ``sure`` on
  the label; lost, what more than half of the students then get wrong. They are ordered by the share
  of students that are wrong, then by how much less probability the students give to the label.

  Args:
    found: the answers; of the student and the teacher.
    sure: from which probability the teacher is called sure.

  Returns:
    The lost examples and their numbers.
  """
  teacher, student = found.models["teacher"], found.models["student"]
  right, sureness = found.correct("teacher").all(axis=0), teacher.probability.min(axis=0)
  known = right & (sureness >= sure)
  wrong = 1 - found.correct("student").mean(axis=0)
  gone = known & (wrong > 0)
  drop = teacher.probability.mean(axis=0) - np.nan_to_num(student.probability).mean(axis=0)
  rows = np.flatnonzero(gone)
  rows = rows[np.lexsort((-drop[rows], -wrong[rows]))]
  most = int(np.sum(wrong[rows] > 0.5))
  baseline_right = None
  if "baseline" in found.models:
    baseline_right = int(np.sum(found.correct("baseline").mean(axis=0)[rows[:most]] > 0.5))
  gained = int(np.sum((wrong < 0.5) & ~found.correct("teacher").any(axis=0)))
  return Lost(rows, most, int(known.sum()), sure, baseline_right, gained)
