"""Whether a difference between classifiers is more than noise: exact tests, intervals, a bootstrap.

All of it runs on the host on answers that are already there (``[S, N]``: instances by examples) and
pairs what can be paired: the same example, and the same seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = [
  "LEVEL",
  "bootstrap",
  "change",
  "holm",
  "mcnemar",
  "pooled_variance",
  "sign_flips",
  "welch",
  "wilson",
]

# A p-value below it is beyond noise, on every page.
LEVEL = 0.05
FLIPS = 9_999  # a p-value is then known to about 0.002 where it is 0.05
_BOUND = 3.18  # how much heavier the tail of a sum of random signs can be than the normal law's
_CHUNK = 2_000_000  # numbers in a block of the bootstrap: 16 MB


def wilson(
  successes: Any, trials: Any, *, confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
  """Wilson's score interval of a share; it stays in 0 .. 1, and has a width at 0 and at 1 too.

  Args:
    successes: ``[...]``; a mean over seeds need not be whole.
    trials: ``[...]``; where it is 0, both ends are NaN.
    confidence: of the interval, in (0, 1).

  Returns:
    ``(low, high)``, float64.

  Raises:
    ValueError: ``confidence`` is not in (0, 1).

  Source: Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927.

  >>> low, high = wilson(8, 10)
  >>> round(float(low), 4), round(float(high), 4)
  (0.4902, 0.9433)
  """
  import scipy.special

  if not 0 < confidence < 1:
    raise ValueError(f"confidence must be in (0, 1), got {confidence}.")
  z = -float(scipy.special.ndtri((1 - confidence) / 2))
  k, n = np.asarray(successes, np.float64), np.asarray(trials, np.float64)
  with np.errstate(divide="ignore", invalid="ignore"):
    share = k / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    ends = np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1)
  return np.where(n > 0, ends[0], np.nan), np.where(n > 0, ends[1], np.nan)


def mcnemar(first: Any, second: Any) -> dict[str, float | int]:
  """McNemar's exact test of two classifiers on the same examples.

  Of the examples on which only one is right, either is as likely under the hypothesis that they
  are equally good: a two-sided binomial test with 1/2.

  Args:
    first: ``[N]`` bool, whether one is right.
    second: ``[N]`` bool, whether the other is.

  Returns:
    ``first_only`` and ``second_only``, counts; ``p_value``.

  Source: McNemar, Note on the Sampling Error of the Difference between Correlated Proportions or
  Percentages, 1947; the exact form as in Dietterich, Approximate Statistical Tests for Comparing
  Supervised Classification Learning Algorithms, 1998.

  >>> found = mcnemar([True] * 6 + [False], [False] * 5 + [True, True])
  >>> found["first_only"], found["second_only"], round(found["p_value"], 5)
  (5, 1, 0.21875)
  """
  import scipy.special

  a, b = np.asarray(first, bool), np.asarray(second, bool)
  if a.shape != b.shape or a.ndim != 1:
    raise ValueError(
      f"first and second must be [N] of the same examples, got {a.shape}, {b.shape}."
    )
  only = int(np.sum(a & ~b)), int(np.sum(b & ~a))
  # With 1/2 both ends are alike; where they meet, in the middle, twice one end counts it twice.
  p = min(1.0, float(2 * scipy.special.bdtr(min(only), sum(only), 0.5)))
  return {"first_only": only[0], "second_only": only[1], "p_value": p}


def sign_flips(differences: Any, *, seed: int = 0) -> float:
  """Two-sided p-value of paired differences: how often random signs give as large a sum.

  Exact up to 13 differences that are not 0, over 9,999 random draws up to 300, and beyond by the
  normal law that the sum then follows. Where no draw is as large, the p-value is bounded by 3.18
  times the normal law's, which holds for every sum of random signs. For differences of one size it
  is McNemar's test.

  Args:
    differences: ``[N]``, one per example; those that are 0 have no part in it.
    seed: of the draws.

  Returns:
    The p-value; 1 where there is no difference.

  Source: Fisher, The Design of Experiments, 1935 (the randomisation test of paired observations);
  Bentkus, Dzindzalieta, A tight Gaussian bound for weighted sums of Rademacher random variables,
  2015.

  >>> sign_flips([1.0, 1.0, 0.0, 1.0])
  0.25
  """
  found = np.asarray(differences, np.float64)
  found = found[found != 0]
  if not found.size:
    return 1.0
  exact = len(found) <= 13
  normal = 0.0 if exact else _normal(found)
  if len(found) > 300:
    return normal
  if exact:
    numbers = np.arange(2 ** len(found))[:, None] >> np.arange(len(found))
    signs = 1.0 - 2.0 * (numbers & 1)
  else:
    random = np.random.default_rng(seed)
    signs = 1.0 - 2.0 * random.integers(0, 2, (FLIPS, len(found)), dtype=np.int8)
  as_large = int(np.sum(np.abs(signs @ found) >= abs(found.sum()) * (1 - 1e-12)))
  if exact:
    return as_large / len(signs)
  # The observed signs are one of the draws, so that no p-value is 0.
  drawn = (as_large + 1) / (FLIPS + 1)
  return drawn if as_large else min(drawn, _BOUND * normal)


def _normal(differences: np.ndarray) -> float:
  import scipy.special

  size = abs(differences.sum()) / np.sqrt(np.sum(differences**2))
  return float(2 * scipy.special.ndtr(-size))


def change(
  first: Any,
  second: Any,
  *,
  paired: bool = True,
  pooled: tuple[float, int] | None = None,
) -> dict[str, float]:
  """Difference of two classifiers' accuracies, with its error over examples and over seeds.

  The standard error is that of the mean of a crossed design: examples and seeds are both drawn, and
  every seed sees every example. The p-value is the larger of two: one that asks whether the
  difference would stay with other examples (`sign_flips` of its mean over seeds), one whether it
  would stay with other seeds (Student's t over the seeds, where there are several). So a difference
  is beyond noise only where it is beyond both.

  Args:
    first: ``[S, N]``, whether each instance is right on each example.
    second: ``[T, N]``, of the same examples.
    paired: whether instance s of both has the same seed; needs S = T. One side with a single
      instance is held fixed.
    pooled: the variance between paired seeds of a mean over the N examples as other groups of
      examples tell it, with its degrees of freedom, from `pooled_variance`. Few seeds know their
      own badly; the larger of the two is taken.

  Returns:
    ``change`` (mean of the first less that of the second), ``error`` and ``p_value``.

  Raises:
    ValueError: the two are not of the same examples, or there are none.

  Source: Owen, The Pigeonhole Bootstrap, 2007, for the variance of a crossed mean.

  >>> change([[1, 1, 0, 1]], [[1, 0, 0, 0]])["change"]
  0.5
  """
  a, b = (np.atleast_2d(np.asarray(side, np.float64)) for side in (first, second))
  if a.ndim != 2 or a.shape[1] != b.shape[1] or not a.shape[1]:
    raise ValueError(
      f"first and second must be [S, N] of the same N examples, got {a.shape} and {b.shape}."
    )
  rows = a.mean(axis=0) - b.mean(axis=0)
  together = 1 in (len(a), len(b)) or (paired and len(a) == len(b))
  if together:
    error = _crossed_error(a - b)
    seeds = (a - b).mean(axis=1)
    p_seeds = _student(seeds, pooled) if len(seeds) > 1 else 0.0
  else:
    examples = rows.var(ddof=1) / len(rows) if len(rows) > 1 else 0.0
    means = a.mean(axis=1), b.mean(axis=1)
    error = float(np.sqrt(examples + sum(side.var(ddof=1) / len(side) for side in means)))
    p_seeds = welch(*means)
  p_value = max(sign_flips(np.round(rows, 12)), p_seeds)
  return {"change": float(rows.mean()), "error": error, "p_value": p_value}


def _crossed_error(values: np.ndarray) -> float:
  """Standard error of the mean of ``[S, N]`` values, both axes being samples."""
  seeds, examples = values.shape
  rows, columns = values.mean(axis=0), values.mean(axis=1)
  variance = rows.var(ddof=1) / examples if examples > 1 else 0.0
  if seeds > 1:
    variance += columns.var(ddof=1) / seeds
    if examples > 1:  # what is of neither alone is in both of them
      rest = values - rows[None, :] - columns[:, None] + values.mean()
      freedom = (seeds - 1) * (examples - 1)
      variance -= float(np.sum(rest**2)) / freedom / (seeds * examples)
  return float(np.sqrt(max(variance, 0.0)))


def _student(values: np.ndarray, pooled: tuple[float, int] | None) -> float:
  import scipy.special

  variance, freedom = float(values.var(ddof=1)), len(values) - 1
  if pooled is not None:
    variance, freedom = max(variance, pooled[0]), pooled[1]
  if variance < 1e-24:  # the same in every seed
    return 0.0 if abs(values[0]) > 1e-12 else 1.0
  size = abs(values.mean()) / np.sqrt(variance / len(values))
  return float(2 * scipy.special.stdtr(freedom, -size))


def pooled_variance(differences: Sequence[np.ndarray]) -> tuple[float, int] | None:
  """How much seeds differ, an example: what groups of examples have in common.

  Args:
    differences: per group ``[S, N_g]``, paired; those without examples have no part in it.

  Returns:
    ``(variance, degrees of freedom)``: that of a mean over n examples is the n-th part of it. None
    for a single seed.
  """
  there = [one for one in differences if one.shape[1]]
  freedom = sum(len(one) - 1 for one in there)
  if not freedom:
    return None
  squares = sum(one.shape[1] * float(np.sum((one.mean(axis=1) - one.mean()) ** 2)) for one in there)
  return squares / freedom, freedom


def welch(first: Any, second: Any) -> float:
  """Two-sided p-value of Welch's t-test: whether two means of independent runs differ.

  Few runs know their own spread badly; Student's distribution makes up for it, which a rule of two
  standard errors does not.

  Args:
    first: ``[S]``, one value per run, at least two.
    second: ``[T]``, likewise.

  Returns:
    The p-value. Where neither side varies it is 0 for two values, and 1 for one.

  Raises:
    ValueError: a side has fewer than two values.

  Source: Welch, The Generalization of "Student's" Problem when Several Different Population
  Variances are Involved, 1947.

  >>> welch([3.0, 5.0], [3.0, 5.0]), welch([1.0, 1.0], [2.0, 2.0])
  (1.0, 0.0)
  """
  import scipy.special

  a, b = (np.asarray(side, np.float64) for side in (first, second))
  if min(a.size, b.size) < 2 or a.ndim != 1 or b.ndim != 1:
    raise ValueError(f"each side must be [S] of at least two runs, got {a.shape} and {b.shape}.")
  difference = abs(a.mean() - b.mean())
  if np.ptp(a) < 1e-12 and np.ptp(b) < 1e-12:
    return 0.0 if difference > 1e-12 else 1.0
  # SciPy's own warns of a side that does not vary.
  parts = np.array([a.var(ddof=1) / a.size, b.var(ddof=1) / b.size])
  freedom = parts.sum() ** 2 / np.sum(parts**2 / [a.size - 1, b.size - 1])
  return float(2 * scipy.special.stdtr(freedom, -difference / np.sqrt(parts.sum())))


def holm(p_values: Sequence[float]) -> list[float]:
  """P-values corrected for their number: below 0.05, all claims hold together with 95%.

  Args:
    p_values: one per test.

  Returns:
    The corrected ones, in the same order.

  Source: Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979.

  >>> holm([0.01, 0.04])
  [0.02, 0.04]
  """
  corrected = [0.0] * len(p_values)
  largest = 0.0
  for place, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
    largest = max(largest, min(1.0, (len(p_values) - place) * p_values[i]))
    corrected[i] = largest
  return corrected


def bootstrap(
  first: Any,
  second: Any,
  *,
  paired: bool = True,
  resamples: int = 10_000,
  confidence: float = 0.95,
  seed: int = 0,
) -> dict[str, float]:
  """Percentile bootstrap of a difference of means, over examples and over seeds.

  Every draw takes N examples with replacement, the same for both sides, and S seeds: the same for
  both where they are paired, else independently.

  Args:
    first: ``[S, N]`` values (right or wrong, or a loss).
    second: ``[T, N]``, of the same examples.
    paired: as in `change`.
    resamples: number of draws.
    confidence: of the interval, in (0, 1).
    seed: of the draws.

  Returns:
    ``change``, ``low``, ``high``, and ``p_value``: twice the smaller share of draws on one side of
    0, at least 2 / (resamples + 1).

  Source: Efron, Tibshirani, An Introduction to the Bootstrap, 1993; both axes as in Owen, 2007.

  >>> found = bootstrap(np.ones((1, 50)), np.zeros((1, 50)), resamples=100)
  >>> found["low"], found["high"]
  (1.0, 1.0)
  """
  a, b = (np.atleast_2d(np.asarray(side, np.float64)) for side in (first, second))
  if a.ndim != 2 or a.shape[1] != b.shape[1] or not a.shape[1]:
    raise ValueError(
      f"first and second must be [S, N] of the same examples, at least one, got {a.shape} and "
      f"{b.shape}."
    )
  if resamples < 1 or not 0 < confidence < 1:
    raise ValueError(
      f"resamples must be at least 1 and confidence in (0, 1), got {resamples} and {confidence}."
    )
  random = np.random.default_rng(seed)
  size = a.shape[1]
  same = paired and len(a) == len(b)

  def instances(count: int, side: np.ndarray) -> np.ndarray:
    return random.multinomial(len(side), np.full(len(side), 1 / len(side)), count) / len(side)

  draws = []
  step = max(1, _CHUNK // size)
  for begin in range(0, resamples, step):
    count = min(step, resamples - begin)
    weights_a = instances(count, a)
    rows = weights_a @ a - (weights_a if same else instances(count, b)) @ b
    examples = random.integers(0, size, (count, size))
    draws.append(np.take_along_axis(rows, examples, axis=1).mean(axis=1))
  every = np.concatenate(draws)
  outside = (1 - confidence) / 2
  low, high = np.quantile(every, [outside, 1 - outside])
  below, above = float(np.mean(every <= 0)), float(np.mean(every >= 0))
  p_value = min(1.0, max(2 * min(below, above), 2 / (resamples + 1)))
  middle = float(a.mean() - b.mean())
  return {"change": middle, "low": float(low), "high": float(high), "p_value": p_value}
