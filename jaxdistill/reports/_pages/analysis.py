"""What answers say about a student: calibration, classes, slices, and what it lost of its teacher.

Functions of `jaxdistill.evaluation.predictions.Predictions`, on the host. A difference is called
real only beyond the noise of examples and of seeds, corrected for how many groups were looked at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill.evaluation import metrics
from jaxdistill.evaluation.predictions import Column, Predictions
from jaxdistill.reports._format import Reading
from jaxdistill.reports._pages import document, significance

__all__ = [
  "Lost",
  "answered",
  "classes",
  "confusions",
  "groups",
  "lost",
  "outstanding",
  "paired",
  "parts",
  "quality",
  "reliability",
  "slices",
]

SURE = 0.8
_MOST = 100  # pairs of classes that are kept of all that are confused
_RESAMPLES = 2_000  # of each of the paired tests, which are several
_DRAWN = 200_000_000  # examples in all draws of one of them, which takes seconds
_WORST, _GAINED, _OTHERS = 8, 4, 4  # examples to look at, of a task without classes


def quality(found: Predictions, model: str) -> dict[str, np.ndarray]:
  """Accuracy, negative log-likelihood and calibration error of each instance, from its answers.

  Args:
    found: the answers.
    model: the model's name.

  Returns:
    ``accuracy``, ``nll`` (nats) and ``ece`` (15 bins), ``[S]``; nothing of no examples, and NaN
    where answers are not numbers.
  """
  one, right, weight = found.models[model], found.correct(model), found.weights()
  with np.errstate(divide="ignore", invalid="ignore"):
    nll = -np.log(one.probability.astype(np.float64))
  bins = reliability(found, model)
  sums: dict[str, Any] = {f"bin_{name}": sums for name, sums in bins.items()}
  sums |= {"examples": weight.sum(), "correct": right @ weight, "nll": nll @ weight}
  finished = metrics.finish(sums)
  # A confidence that is no number is in no bin, where it would count as an honest one.
  unclear = ~np.isfinite(one.confidence).all(axis=1)
  return {n: np.where(unclear & (n == "ece"), np.nan, values) for n, values in finished.items()}


def reliability(found: Predictions, model: str) -> dict[str, np.ndarray]:
  """Sums by confidence, for a reliability diagram.

  Args:
    found: the answers.
    model: the model's name.

  Returns:
    ``count``, ``confidence`` and ``correct``, ``[S, 15]`` sums over the examples of a bin, by their
    weights; bins are equal and closed on the right. A confidence that is not a number is in none.

  Source: Guo, Pleiss, Sun, Weinberger, On Calibration of Modern Neural Networks, 2017.
  """
  confidence, right = found.models[model].confidence, found.correct(model)
  weight = found.weights()
  which = np.searchsorted(metrics.EDGES, confidence, side="left")
  sums = {
    name: np.zeros((len(confidence), metrics.BINS)) for name in ("count", "confidence", "correct")
  }
  for s, (bins, sure, hit) in enumerate(zip(which, confidence, right, strict=True)):
    there = np.isfinite(sure)
    for name, values in (("count", 1.0), ("confidence", sure[there]), ("correct", hit[there])):
      sums[name][s] = np.bincount(bins[there], values * weight[there], metrics.BINS)
  return sums


def groups(
  found: Predictions, column: Column, readings: Mapping[str, Reading] | None = None
) -> list[dict[str, Any]]:
  """Accuracy of every model on each group of examples, and how the student's differs.

  Args:
    found: the answers.
    column: which group each example is in.
    readings: how the metrics are read of a task that has no classes. The first that an example has
      is in the accuracy's place then.

  Returns:
    One dict per group, in the order of the names, and one for the missing where there are such:
    ``name``, ``examples``; ``accuracy`` ``{model: {"mean", "low", "high"}}``, Wilson intervals with
    95% for the mean over seeds (how it would vary with other examples), or ``values`` with the
    normal law's; ``changes`` ``{reference: {"change", "error", "p_value", "beyond_noise"}}``, how
    much better the student is than the baseline and than the teacher, as `significance.change` has
    it, p-values corrected (Holm) for the number of groups. Of a group without examples both are
    empty.
  """
  numbers, names = list(range(len(column.names))), list(column.names)
  if np.any(column.codes < 0):
    numbers, names = [*numbers, -1], [*names, "missing"]
  sign = 1.0
  if found.models:
    right: dict[str, np.ndarray] = {name: found.correct(name) for name in found.models}
    there = np.ones(len(found), bool)
  else:
    right, there, sign = _first_values(found, readings or {})
  called, weights = "accuracy" if found.models else "values", found.weights()
  rows: list[dict[str, Any]] = []
  for number, name in zip(numbers, names, strict=True):
    here = (column.codes == number) & there
    shares = {
      model: _share(hits[:, here], weights[here]) for model, hits in right.items() if here.any()
    }
    rows.append({"name": name, "examples": int(here.sum()), called: shares, "changes": {}})
  known = [i for i, row in enumerate(rows) if row["examples"]]
  for reference in ("baseline", "teacher"):
    if reference not in right or "student" not in right:
      continue
    sides = sign * right["student"], sign * right[reference]
    rows_of = [(column.codes == numbers[i]) & there for i in known]
    pairs = [tuple(found.weighed(side, rows) for side in sides) for rows in rows_of]
    for i, one in zip(known, _changes(pairs), strict=True):
      rows[i]["changes"][reference] = {**one, "beyond_noise": one["p_value"] < significance.LEVEL}
  return rows


def _first_values(
  found: Predictions, readings: Mapping[str, Reading]
) -> tuple[dict[str, np.ndarray], np.ndarray, float]:
  """The first metric of each example by model, which examples have it of all, and its sign."""
  values = {name: found.values(name) for name in found.details}
  name = next(iter(values.get("student", {})), None)
  right = {model: one[name] for model, one in values.items() if name is not None and name in one}
  there = np.ones(len(found), bool)
  for one in right.values():
    there &= np.isfinite(one).all(axis=0)
  reading = readings.get(name or "")
  return right, there, reading.gain(1.0) if reading is not None else 1.0


def _changes(pairs: Sequence[tuple[np.ndarray, ...]]) -> list[dict[str, Any]]:
  """Each group's change; seeds are as noisy as all groups together say, p-values are corrected."""
  sizes = [len(side) for side in pairs[0]] if pairs else [1, 1]
  paired = sizes[0] == sizes[1] or 1 in sizes
  pooled = None
  if paired:
    differences = [a.astype(np.float64) - b.astype(np.float64) for a, b in pairs]
    pooled = significance.pooled_variance(differences)
  changes = []
  for a, b in pairs:
    share = None if pooled is None else (pooled[0] / a.shape[1], pooled[1])
    changes.append(significance.change(a, b, pooled=share))
  corrected = significance.holm([one["p_value"] for one in changes])
  return [{**one, "p_value": p} for one, p in zip(changes, corrected, strict=True)]


def _share(right: np.ndarray, weight: np.ndarray) -> dict[str, float]:
  """Mean over seeds with the interval over examples.

  Source: Kish, Survey Sampling, 1965, for how many examples of one weight those of several are
  worth.
  """
  examples = right.mean(axis=0)
  mean = float(np.average(examples, weights=weight))
  size = weight.sum() ** 2 / (weight**2).sum()
  if right.dtype != bool:
    variance = np.average((examples - mean) ** 2, weights=weight)
    error = 1.96 * np.sqrt(variance / (size - 1)) if size > 1 else 0.0
    return {"mean": mean, "low": float(mean - error), "high": float(mean + error)}
  low, high = significance.wilson(mean * size, size)
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
  for row in rows:
    row |= {"predicted": 0.0, "taken_for": []}
  for (label, other), often in answered(found, "student").items():
    if 0 <= other < size:
      rows[other]["predicted"] += often
    if other != label and len(rows[label]["taken_for"]) < 2:
      rows[label]["taken_for"].append([found.name(other), often])
  return rows


def answered(found: Predictions, model: str) -> dict[tuple[int, int], float]:
  """A confusion matrix where it is not 0: which class a model calls which, the most often first.

  Args:
    found: the answers.
    model: the model's name.

  Returns:
    How many examples, a mean over instances, by (label, predicted); −1 is what is not a number.
  """
  predicted = found.models[model].predicted.astype(np.int64) + 1
  width = int(predicted.max(initial=0)) + 1
  codes, times = np.unique(found.labels * width + predicted, return_counts=True)
  order = np.argsort(-times, kind="stable")
  pairs = zip(codes[order] // width, codes[order] % width - 1, times[order], strict=True)
  return {(int(one), int(other)): float(n / len(predicted)) for one, other, n in pairs}


def confusions(found: Predictions) -> list[dict[str, Any]]:
  """Which class the student takes for which, the most frequent first.

  Args:
    found: the answers; of the student.

  Returns:
    Up to 100 of ``{"label", "taken_for", "of", "examples": {model: number}}``: as many of the
    ``of`` examples of that label, a mean over seeds.
  """
  by_model = {name: answered(found, name) for name in found.models}
  pairs = [pair for pair in by_model["student"] if pair[0] != pair[1]][:_MOST]
  sizes = np.bincount(found.labels)
  return [
    {
      "label": found.name(one),
      "taken_for": found.name(other),
      "of": int(sizes[one]),
      "examples": {name: counts.get((one, other), 0.0) for name, counts in by_model.items()},
    }
    for one, other in pairs
  ]


def slices(
  found: Predictions, readings: Mapping[str, Reading] | None = None
) -> dict[str, list[dict[str, Any]]]:
  """`groups` by every column of metadata."""
  if not found.models and not _first_values(found, readings or {})[0]:
    return {}
  return {name: groups(found, column, readings) for name, column in found.columns.items()}


def parts(found: Predictions) -> dict[str, list[dict[str, Any]]]:
  """A metric apart, by class, label, target or position, of every model.

  Args:
    found: with `Details`.

  Returns:
    By metric its rows, ``{"name", "values": {model: {"mean", "std"}}}``, over seeds; a model that
    has nothing of a row is not in it.
  """
  made: dict[str, list[dict[str, Any]]] = {}
  for metric in dict.fromkeys(name for one in found.details.values() for name in one.parts):
    rows: dict[str, dict[str, Any]] = {}
    for model, one in found.details.items():
      values = one.parts.get(metric, np.zeros((0, 0)))
      for r, row in enumerate(one.rows.get(metric, ())):
        mean = document.spread(values[:, r])
        if mean["mean"] is not None:
          rows.setdefault(row, {})[model] = mean
    if rows:
      made[metric] = [{"name": name, "values": values} for name, values in rows.items()]
  return made


def paired(found: Predictions, readings: Mapping[str, Reading]) -> list[dict[str, Any]]:
  """How much better the student is on the same examples, by each metric that an example has.

  Args:
    found: the answers.
    readings: how the metrics are read.

  Returns:
    A row for each metric and reference: ``metric``, ``reference``, ``examples`` (those on which
    both have it), and of `significance.bootstrap` ``gain``, ``low``, ``high`` and ``p_value``.
  """
  values = {name: found.values(name) for name in (*found.models, *found.details)}
  rows = []
  for metric, ours in values.get("student", {}).items():
    for reference in ("baseline", "teacher"):
      theirs = values.get(reference, {}).get(metric)
      if theirs is None:
        continue
      there = np.isfinite(ours).all(axis=0) & np.isfinite(theirs).all(axis=0)
      if not there.any():
        continue
      sign = readings[metric].gain(1.0) if metric in readings else 1.0
      sides = (found.weighed(sign * side, there) for side in (ours, theirs))
      draws = int(np.clip(_DRAWN // there.sum(), 200, _RESAMPLES))
      tested = significance.bootstrap(*sides, resamples=draws)
      about = {"metric": metric, "reference": reference, "examples": int(there.sum())}
      rows.append({**about, "gain": tested.pop("change"), **tested})
  return rows


def outstanding(found: Predictions, readings: Mapping[str, Reading]) -> dict[str, np.ndarray]:
  """Examples to look at, of a task without classes, by their place in the answers.

  Args:
    found: with `Details`.
    readings: how the metrics are read.

  Returns:
    ``worst``: those on which the student is furthest behind its teacher by the first metric that
    an example has; ``gained``: those on which it is furthest ahead of labels alone; ``others``:
    some as they come, of those that are in neither.
  """
  values, there, sign = _first_values(found, readings)
  means = {name: sign * one.mean(axis=0) for name, one in values.items()}
  rows = np.flatnonzero(there)
  chosen = {"worst": np.zeros(0, int), "gained": np.zeros(0, int)}
  if {"student", "teacher"} <= means.keys():
    behind = (means["teacher"] - means["student"])[rows]
    chosen["worst"] = rows[np.argsort(-behind, kind="stable")[: min(_WORST, sum(behind > 0))]]
  if {"student", "baseline"} <= means.keys():
    ahead = (means["student"] - means["baseline"])[rows]
    chosen["gained"] = rows[np.argsort(-ahead, kind="stable")[: min(_GAINED, sum(ahead > 0))]]
  rest = np.setdiff1d(np.arange(len(found)), np.concatenate(list(chosen.values())))
  some = np.unique(np.linspace(0, len(rest) - 1, _OTHERS).round().astype(int))
  return {**chosen, "others": rest[some] if len(rest) else rest}


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
    gained: the examples on which most students are right and the teacher is wrong, likewise.
  """

  rows: np.ndarray
  most: int
  known: int
  sure: float
  baseline_right: int | None
  gained: np.ndarray


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
  gained = np.flatnonzero((wrong < 0.5) & ~found.correct("teacher").any(axis=0))
  gained = gained[np.lexsort((drop[gained], wrong[gained]))]
  return Lost(rows, most, int(known.sum()), sure, baseline_right, gained)
