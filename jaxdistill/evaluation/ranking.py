"""What only all examples together can tell, on the host in float64: ranks, spread, neighbours."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

__all__ = [
  "HITS",
  "average_precision",
  "errors",
  "hits",
  "nearest",
  "neighbourhoods",
  "normal_errors",
  "places",
]

# The columns of `hits`.
HITS = ("knn_accuracy", "weighted_knn_accuracy", "recall_at_1", "recall_at_k")
_VOTE = 0.07  # Wu, Xiong, Yu, Lin 2018, and DINO

# Rows of similarities that are there at once.
_BLOCK = 1024
_LEVELS = np.arange(1, 10) / 10


def average_precision(scores: Any, labels: Any, weight: Any) -> float | None:
  """The mean of the precision over the recall that each score adds.

  Σ (R_n − R_{n−1}) P_n over the thresholds from the highest on; scores that are equal are one
  threshold, as scikit-learn has it.

  Args:
    scores: ``[N]``, higher for yes.
    labels: ``[N]`` truth values.
    weight: ``[N]``, 0 for what does not count.

  Returns:
    A share; None where no label that counts is true, NaN where a score that counts is.

  >>> average_precision(np.array([0.9, 0.8, 0.1]), np.array([True, False, True]), np.ones(3))
  0.8333333333333333
  """
  there = np.asarray(weight) > 0
  scores, labels = np.asarray(scores, np.float64)[there], np.asarray(labels, bool)[there]
  weight = np.asarray(weight, np.float64)[there]
  total = weight[labels].sum()
  if not total:
    return None
  if np.isnan(scores).any():
    return float("nan")
  order = np.argsort(-scores, kind="stable")
  scores, labels, weight = scores[order], labels[order], weight[order]
  last = np.append(np.diff(scores) != 0, True)  # of those that are equal
  hits, every = np.cumsum(weight * labels)[last], np.cumsum(weight)[last]
  return float(np.sum(np.diff(hits, prepend=0) * hits / every) / total)


def errors(said: np.ndarray, labels: np.ndarray, weight: np.ndarray) -> dict[str, float]:
  """Root mean squared and mean absolute error, and the share of the variance explained.

  Args:
    said: ``[N, D]``.
    labels: ``[N, D]``.
    weight: ``[N, D]``.

  Returns:
    ``rmse``, ``mae`` and ``r2``, the means over the targets; what was not measured is absent: all
    where nothing counts, ``r2`` of a target without spread.
  """
  found: dict[str, list[float]] = {"rmse": [], "mae": [], "r2": []}
  for d in range(labels.shape[1]):
    there = weight[:, d] > 0
    w, y, x = weight[there, d], labels[there, d], said[there, d]
    if not len(w):
      continue
    squares = np.average((x - y) ** 2, weights=w)
    spread = np.average((y - np.average(y, weights=w)) ** 2, weights=w)
    found["rmse"].append(float(np.sqrt(squares)))
    found["mae"].append(float(np.average(np.abs(x - y), weights=w)))
    if spread > 0:
      found["r2"].append(float(1 - squares / spread))
  return {name: float(np.mean(values)) for name, values in found.items() if values}


def normal_errors(
  said: np.ndarray, log_variance: np.ndarray, labels: np.ndarray, weight: np.ndarray
) -> dict[str, float]:
  """How well predicted normal distributions fit.

  Args:
    said: their means, ``[N, D]``.
    log_variance: likewise.
    labels: likewise.
    weight: likewise.

  Returns:
    ``nll`` in nats, and ``interval_error``: over the central 10, 20 ... 90 % of each distribution,
    the mean distance of the share of labels inside from that number. Absent where nothing counts.
  """
  there = weight > 0
  if not there.any():
    return {}
  w, error, log = weight[there], (labels - said)[there], log_variance[there]
  nll = 0.5 * (np.log(2 * np.pi) + log + error**2 * np.exp(-log))
  # |z| below the level's quantile: erf(|z| / √2) is the central share that z is the edge of.
  edges = np.abs(error) * np.exp(-0.5 * log) / np.sqrt(2)
  share = np.array([math.erf(edge) for edge in edges.tolist()])
  inside = [np.average(share <= level, weights=w) for level in _LEVELS]
  return {
    "nll": float(np.average(nll, weights=w)),
    "interval_error": float(np.mean(np.abs(inside - _LEVELS))),
  }


def neighbourhoods(
  vectors: np.ndarray,
  labels: np.ndarray,
  weight: np.ndarray,
  known: np.ndarray,
  teacher: np.ndarray | None,
  neighbours: int,
) -> dict[str, float]:
  """Who is near whom, by cosine similarity; see `evaluation.tasks.embedding`.

  Args:
    vectors: ``[N, D]``.
    labels: ``[N]``.
    weight: ``[N]``, how much each counts, above 0: in a mean over pairs the product of both.
    known: ``[N]``, which of them have a label.
    teacher: a teacher's vectors, ``[N, E]``.
    neighbours: k, at most one less than N.
  """
  count = len(vectors)
  k = min(neighbours, count - 1)
  if k < 1:
    return {}
  units = _units(vectors)
  theirs = None if teacher is None else _units(teacher)
  same, sums = [], np.zeros(4)  # squared distances within a class, their pairs; potentials, pairs
  for first in range(0, count, _BLOCK):
    rows = np.arange(first, min(first + _BLOCK, count))
    near, similar = _nearest(units, rows, k, np.ones(count, bool))
    distance = np.maximum(2 - 2 * similar, 0)
    others = np.arange(count)[None, :] != rows[:, None]
    alike = (labels[None, :] == labels[rows, None]) & known[None, :] & known[rows, None]
    pairs = others * weight[rows, None] * weight[None, :]
    sums += (
      (pairs * alike * distance).sum(),
      (pairs * alike).sum(),
      (pairs * np.exp(-2 * distance)).sum(),
      pairs.sum(),
    )
    if theirs is not None:
      beside = _nearest(theirs, rows, k, np.ones(count, bool))[0]
      same.append((near[:, :, None] == beside[:, None, :]).any(axis=2).mean(axis=1))
  found = {"uniformity": float(np.log(sums[2] / sums[3]))}
  if sums[1]:
    found["alignment"] = float(sums[0] / sums[1])
  if same:
    found["neighbour_agreement"] = np.average(np.concatenate(same), weights=weight)
  if known.sum() > 1:
    each = hits(vectors, labels, known, neighbours)[known]
    found |= dict(zip(HITS, np.average(each, axis=0, weights=weight[known]), strict=True))
  return {name: float(value) for name, value in found.items()}


def hits(vectors: np.ndarray, labels: np.ndarray, known: np.ndarray, neighbours: int) -> np.ndarray:
  """Of each example whether its neighbours have its label.

  Args:
    vectors: ``[N, D]``.
    labels: ``[N]``.
    known: ``[N]``, which of them have a label; only those are neighbours.
    neighbours: k.

  Returns:
    ``[N, 4]`` of 0 and 1, by the names of `HITS`: whether most of the k nearest, most of them
    by votes of exp(similarity / 0.07), the nearest, and any of them have its label; NaN of an
    example without one, or without a neighbour.

  >>> vectors, labels = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), np.array([0, 0, 1])
  >>> hits(vectors, labels, np.array([True, True, True]), 1)[:, 0].tolist()
  [1.0, 1.0, 0.0]
  """
  found = np.full((len(vectors), len(HITS)), np.nan)
  k = min(neighbours, int(known.sum()) - 1)
  if k < 1:
    return found
  units, every = _units(vectors), np.flatnonzero(known)
  for first in range(0, len(every), _BLOCK):
    mine = every[first : first + _BLOCK]
    near, similar = _nearest(units, mine, k, known)
    votes = np.exp(np.take_along_axis(similar, near, axis=1) / _VOTE)
    found[mine] = _hits(labels[near], votes, labels[mine])
  return found


def places(
  queries: np.ndarray, candidates: np.ndarray, labels: np.ndarray, known: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Of each query the place, from 0, at which its partner is found, by cosine similarity.

  Right is the candidate of the same example, and of those that have a label each with the same.
  The place is the number of wrong ones that are no less similar than the best of the right: what
  is the same everywhere finds nothing.

  Args:
    queries: ``[N, D]``.
    candidates: ``[N, D]``.
    labels: ``[N]``.
    known: ``[N]``, which of them have a label.

  Returns:
    The places ``[N]``, and the row of the most similar candidate ``[N]``.

  >>> eye = np.eye(3)
  >>> places(eye, eye[[0, 2, 1]], np.zeros(3), np.zeros(3, bool))[0].tolist()
  [0, 2, 2]
  """
  ours, theirs, count = _units(queries), _units(candidates), len(queries)
  found, best = np.zeros(count, np.int64), np.zeros(count, np.int64)
  for first in range(0, count, _BLOCK):
    rows = np.arange(first, min(first + _BLOCK, count))
    similar = ours[rows] @ theirs.T
    right = (labels[rows, None] == labels[None, :]) & known[rows, None] & known[None, :]
    right |= rows[:, None] == np.arange(count)[None, :]
    least = np.where(right, similar, -np.inf).max(axis=1, keepdims=True)
    # Asked as what is not less: of NaN everything is, and so it is found nowhere.
    found[rows] = (~right & ~(similar < least)).sum(axis=1)
    best[rows] = similar.argmax(axis=1)
  return found, best


def nearest(vectors: np.ndarray, row: int, neighbours: int, among: np.ndarray) -> np.ndarray:
  """The k nearest of one example among some others, the nearest first.

  Args:
    vectors: ``[N, D]``.
    row: the example's.
    neighbours: k.
    among: ``[N]``, which may be neighbours.

  Returns:
    Up to k rows.
  """
  k = min(neighbours, int(among.sum()) - int(among[row]))
  return _nearest(_units(vectors), np.array([row]), max(k, 0), among)[0][0]


def _units(vectors: np.ndarray) -> np.ndarray:
  return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _nearest(
  units: np.ndarray, rows: np.ndarray, k: int, among: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """The k nearest of each row, nearest first, ties by their order; and its similarity to all."""
  similar = units[rows] @ units.T
  rank = np.where(among[None, :], similar, -np.inf)
  rank[np.arange(len(rows)), rows] = -np.inf
  return np.argsort(-rank, axis=1, kind="stable")[:, :k], similar


def _hits(nearest: np.ndarray, votes: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Of each row, with the votes of its neighbours, what `hits` gives."""
  same = nearest[:, :, None] == nearest[:, None, :]
  # The class of most; of classes with as many, that of the nearest.
  voted = (
    np.take_along_axis(nearest, (same * each[:, None, :]).sum(axis=2).argmax(axis=1)[:, None], 1)
    for each in (np.ones_like(votes), votes)
  )
  right = nearest == labels[:, None]
  columns = [*(one[:, 0] == labels for one in voted), right[:, 0], right.any(axis=1)]
  return np.stack(columns, axis=1).astype(np.float64)
