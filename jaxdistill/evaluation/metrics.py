"""Evaluation metrics: exact sums on the device, divided once at the end on the host.

`classification_sums` and `fidelity_sums` are pure and turn a batch into sums; `add_sums` merges
batches, devices and hosts; `finish` divides. A metric over padded batches of any size is therefore
the metric over the examples, calibration included. For tokens, flatten ``[B, L, K]`` to ``[B, K]``.

`mean_std`, `difference` and `gap_closed` are about runs, not examples: they run on NumPy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped
from numpy.typing import NDArray

from jaxdistill import _check

__all__ = [
  "add_sums",
  "answers",
  "classification_sums",
  "difference",
  "fidelity_sums",
  "finish",
  "gap_closed",
  "mean_std",
  "over_documents",
]

BINS = 15  # Guo et al. 2017
EDGES = np.asarray(np.arange(1, BINS) / BINS, np.float32)
# Each metric is one sum over another.
_RATIOS = {
  "accuracy": ("correct", "examples"),
  "top5": ("top5", "examples"),
  "nll": ("nll", "examples"),
  "ece": ("gaps", "examples"),
  "brier": ("brier", "examples"),
  "agreement": ("agreement", "fidelity_examples"),
  "kl": ("kl", "fidelity_examples"),
  "accuracy_where_teacher_wrong": ("correct_where_teacher_wrong", "teacher_wrong"),
}
_WORDS = {"higher": "above", "lower": "below"}
# One number per run, or that of a single run.
Values = Sequence[Any] | np.ndarray | float | int


def classification_sums(
  logits: Float[Array, "B K"], labels: Int[Array, " B"], where: Shaped[Array, " B"]
) -> dict[str, Array]:
  """Sums over a batch from which `finish` makes accuracy, top-5, nll, Brier score and ECE.

  Ties: top-1 is the first of the largest logits; top-5 asks that fewer than 5 classes have a
  *strictly* greater logit than the label, so that ties fall to the label (5 classes or fewer are
  always right). A counted example with a NaN logit or a label outside ``0 .. K-1`` is never
  correct and makes the nll and the Brier score NaN.

  Args:
    logits: ``[B, K]``; computed in float32 whatever their dtype.
    labels: ``[B]`` classes.
    where: ``[B]``, how much an example counts. One that does not may hold anything, NaN logits and
      labels out of range included.

  Returns:
    float32 sums: scalars ``examples``, ``correct``, ``top5``, ``nll`` (nats), ``brier``
    (Σ_k (p_k − y_k)²) and ``[15]`` ``bin_count``, ``bin_confidence``, ``bin_correct`` by the
    confidence of the top-1 class, in equal bins closed on the right.

  Source: Guo, Pleiss, Sun, Weinberger, On Calibration of Modern Neural Networks, 2017.

  >>> logits = jnp.array([[3.0, 0.0], [0.0, 1.0], [jnp.nan, 0.0]])
  >>> sums = classification_sums(logits, jnp.array([0, 0, 7]), jnp.array([1.0, 1.0, 0.0]))
  >>> sums["examples"].item(), sums["correct"].item()
  (2.0, 1.0)
  """
  where = where.astype(jnp.float32)
  counted = where > 0
  logits = _clean(logits, counted)
  classes = logits.shape[1]
  labels = jnp.where(counted, labels.astype(jnp.int32), 0)
  known = (labels >= 0) & (labels < classes)
  readable = known & ~jnp.isnan(logits).any(axis=1)
  labels = jnp.where(known, labels, 0)

  log_probs = jax.nn.log_softmax(logits, axis=1)
  probs = jnp.exp(log_probs)
  truth = jax.nn.one_hot(labels, classes, dtype=jnp.float32)
  label_logit = jnp.take_along_axis(logits, labels[:, None], axis=1)
  rank = jnp.sum(logits > label_logit, axis=1)
  correct = readable & (jnp.argmax(logits, axis=1) == labels)
  nll = -jnp.take_along_axis(log_probs, labels[:, None], axis=1)[:, 0]
  brier = jnp.sum(jnp.square(probs - truth), axis=1)

  sums = {
    "examples": counted,
    "correct": correct,
    "top5": readable & (rank < min(5, classes)),
    "nll": jnp.where(known, nll, jnp.nan),
    "brier": jnp.where(known, brier, jnp.nan),
  }
  # Comparing with the edges closes the bins on the right without rounding `confidence * 15`.
  confidence = jnp.max(probs, axis=1)
  bins = jax.nn.one_hot(jnp.sum(confidence[:, None] > EDGES[None, :], axis=1), BINS, dtype=bool)
  for name, values in (("count", counted), ("confidence", confidence), ("correct", correct)):
    sums[f"bin_{name}"] = jnp.where(bins, values.astype(jnp.float32)[:, None], 0)
  return {name: _masked_sum(values, where) for name, values in sums.items()}


def fidelity_sums(
  student_logits: Float[Array, "B K"],
  teacher_logits: Float[Array, "B K"],
  labels: Int[Array, " B"],
  where: Shaped[Array, " B"],
  labelled: Shaped[Array, " B"] | None = None,
) -> dict[str, Array]:
  """Sums that say how far a student does what its teacher does, and what it does where that errs.

  Args:
    student_logits: ``[B, K]``.
    teacher_logits: ``[B, K]``. Classes masked to −inf on both sides have no part in the KL; one
      that only the student masks makes it inf.
    labels: ``[B]`` classes.
    where: ``[B]``, how much an example counts: 0 for padding.
    labelled: ``[B]``, which of them have a label, without which nobody knows where the teacher
      errs; None for all.

  Returns:
    float32 scalar sums: ``fidelity_examples``, ``agreement`` (the same top-1 class), ``kl``
    (KL(teacher‖student) at temperature 1, in nats), ``teacher_wrong`` and
    ``correct_where_teacher_wrong``; no name is in `classification_sums`, so the two can be merged.

  Source: Stanton et al., Does Knowledge Distillation Really Work?, 2021.

  >>> student, teacher = jnp.array([[2.0, 0.0], [0.0, 2.0]]), jnp.array([[2.0, 0.0], [2.0, 0.0]])
  >>> sums = fidelity_sums(student, teacher, jnp.array([0, 1]), jnp.ones(2))
  >>> sums["agreement"].item(), sums["correct_where_teacher_wrong"].item()
  (1.0, 1.0)
  """
  where = where.astype(jnp.float32)
  counted = where > 0
  known = counted if labelled is None else counted & labelled.astype(bool)
  labels = jnp.where(known, labels.astype(jnp.int32), 0)
  both = [_clean(logits, counted) for logits in (student_logits, teacher_logits)]
  student_class, teacher_class = (_top_class(x) for x in both)
  student_log, teacher_log = (jax.nn.log_softmax(x, axis=1) for x in both)
  teacher_probs = jnp.exp(teacher_log)
  # A class of probability 0 adds 0; its own product may be 0 · (−inf − −inf). A NaN stays one.
  kl = jnp.where(teacher_probs == 0, 0, teacher_probs * (teacher_log - student_log))
  teacher_wrong = known & (teacher_class != labels)
  sums = {
    "fidelity_examples": counted,
    "agreement": (student_class == teacher_class) & (teacher_class >= 0),
    "kl": jnp.sum(kl, axis=1),
    "teacher_wrong": teacher_wrong,
    "correct_where_teacher_wrong": teacher_wrong & (student_class == labels),
  }
  return {name: _masked_sum(values, where) for name, values in sums.items()}


def _clean(logits: Any, counted: Any) -> Any:
  """Float32 logits in which the rows that do not count are zeros."""
  return jnp.where(counted[:, None], logits.astype(jnp.float32), 0)


def _top_class(logits: Any) -> Any:
  """The first of the largest, or −1 for a row with NaN, which is never right."""
  return jnp.where(jnp.isnan(logits).any(axis=1), -1, jnp.argmax(logits, axis=1))


def _masked_sum(values: Any, where: Any) -> Any:
  """Float32 sum over the batch axis of what counts, as much as it counts."""
  where = where.reshape(where.shape + (1,) * (values.ndim - 1))
  return jnp.sum(where * jnp.where(where > 0, values.astype(jnp.float32), 0), axis=0)


def answers(logits: Float[Array, "B K"], labels: Int[Array, " B"]) -> dict[str, Array]:
  """A batch's answers, on the device.

  Args:
    logits: ``[B, K]``; computed in float32 whatever their dtype.
    labels: ``[B]``; one out of range gets the probability NaN.

  Returns:
    ``predicted`` int32, ``confidence`` and ``probability`` float32, each ``[B]``, as in
    `predictions.Answers`.

  >>> found = answers(jnp.array([[0.0, 0.0], [jnp.nan, 0.0]]), jnp.array([1, 1]))
  >>> found["predicted"].tolist(), found["probability"].tolist()
  ([0, -1], [0.5, nan])
  """
  logits = logits.astype(jnp.float32)
  probabilities = jax.nn.softmax(logits, axis=1)
  known = (labels >= 0) & (labels < logits.shape[1])
  truth = jnp.where(known, labels, 0).astype(jnp.int32)
  probability = jnp.take_along_axis(probabilities, truth[:, None], axis=1)[:, 0]
  bad = jnp.isnan(logits).any(axis=1)
  return {
    "predicted": jnp.where(bad, -1, jnp.argmax(logits, axis=1)).astype(jnp.int32),
    "confidence": jnp.where(bad, jnp.nan, jnp.max(probabilities, axis=1)),
    "probability": jnp.where(known & ~bad, probability, jnp.nan),
  }


def add_sums(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
  """Adds two dicts of sums, key by key.

  Args:
    first: sums, of JAX or NumPy. Counts in float32 are exact to 2²⁴ ≈ 16.8 million.
    second: sums of the same names and shapes.

  Returns:
    Their sums.

  Raises:
    ValueError: the names differ.

  >>> add_sums({"correct": 1.0}, {"correct": 2.0})
  {'correct': 3.0}
  """
  if first.keys() != second.keys():
    odd = sorted(first.keys() ^ second.keys())
    raise ValueError(
      f"first and second must hold the same sums (of one function); only one of them has {odd}."
    )
  return {name: first[name] + second[name] for name in first}


def finish(sums: Mapping[str, Any]) -> dict[str, NDArray[np.float64]]:
  """Divides sums into metrics, on the host and in float64.

  Args:
    sums: from `classification_sums`, `fidelity_sums`, or both merged; every leaf may have the same
      leading axes (the seeds of a sweep).

  Returns:
    Arrays of the leading axes' shape, ``()`` without any: fractions ``accuracy`` and ``top5``,
    ``nll``, ``brier``, ``ece`` (``Σ_bins |correct − confidence| / examples``), and ``agreement``,
    ``kl``, ``accuracy_where_teacher_wrong``, as far as there are sums for them. What counted
    nothing was not measured, and is absent: all that needs labels where there are none, the last
    beside a teacher without errors. NaN is a number that was measured and is none: a logit was.

  Raises:
    ValueError: there are no such sums.

  >>> finish(classification_sums(jnp.eye(2), jnp.array([0, 0]), jnp.ones(2)))["accuracy"].item()
  0.5
  """
  host = {name: np.asarray(value, np.float64) for name, value in sums.items()}
  if "bin_count" in host:
    host["gaps"] = np.abs(host["bin_correct"] - host["bin_confidence"]).sum(axis=-1)
  there = {name: parts for name, parts in _RATIOS.items() if host.keys() >= set(parts)}
  if not there:
    raise ValueError(f"sums must be of classification_sums or fidelity_sums, got {sorted(sums)}.")
  with np.errstate(divide="ignore", invalid="ignore"):  # of some seeds alone: 0 / 0 is NaN
    return {
      name: np.asarray(host[total] / host[count])
      for name, (total, count) in there.items()
      if np.any(host[count] > 0)
    }


def mean_std(values: Values) -> tuple[float, float | None]:
  """Mean and sample standard deviation (n − 1 in the denominator) over runs.

  Args:
    values: ``[S]``, one value per seed.

  Returns:
    ``(mean, std)``; the std of one run is None, not 0.

  Raises:
    ValueError: there is no value, or one is not finite.

  >>> mean_std([1.0, 3.0]), mean_std([2.0])
  ((2.0, 1.4142135623730951), (2.0, None))
  """
  runs = _runs("values", values)
  return float(runs.mean()), float(runs.std(ddof=1)) if runs.size > 1 else None


def difference(student: Values, baseline: Values) -> dict[str, float | None]:
  """Difference of two means over independent runs, with its standard error.

  ``mean(student) − mean(baseline)`` and ``sqrt(var_s / S_s + var_b / S_b)`` (Welch).

  Args:
    student: ``[S_s]``, one value per seed.
    baseline: ``[S_b]``; taken as independent even where it shares the student's seeds.

  Returns:
    ``{"mean", "standard_error"}``; the error is None when a side has a single run.

  Raises:
    ValueError: a side has no value, or one that is not finite.

  >>> difference([3.0, 5.0], [1.0, 1.0])
  {'mean': 3.0, 'standard_error': 1.0}
  """
  runs = _runs("student", student), _runs("baseline", baseline)
  error = None
  if min(side.size for side in runs) > 1:
    error = float(np.sqrt(sum(side.var(ddof=1) / side.size for side in runs)))
  return {"mean": float(runs[0].mean() - runs[1].mean()), "standard_error": error}


# What the task of tokens keeps of each.
_OF_TOKENS = {"nll", "accuracy", "where"}


def over_documents(
  kept: Mapping[str, Any],
  documents: Any,
  *,
  beside: Mapping[str, Any] | None = None,
  sizes: Any = None,
) -> dict[str, dict[str, float | None]]:
  """Means over tokens with their standard errors over documents, of one model or of a difference.

  The next token's loss depends on the last one's, so no token is an independent draw; a document
  is. A mean over tokens is a ratio of sums over documents, Σ_d t_d / Σ_d w_d = R, and its error is
  the linearised one, sqrt(D / (D − 1) · Σ_d (t_d − R w_d)²) / Σ_d w_d (Cochran, "Sampling
  Techniques", 1977, section 6.4). Of two models it is that of their paired difference, in which
  what makes a document hard for both cancels.

  Args:
    kept: what `jaxdistill.evaluation.examine` keeps of a model by the task
      `jaxdistill.evaluation.tasks.tokens`: ``nll`` (nats), ``accuracy`` and ``where`` (how much a
      token counts), ``[S, N, L]`` of S seeds, whose mean each token's value is. The error over
      seeds is another: `difference`.
    documents: ``[N, L]`` integers, which document each token is of, as
      `jaxdistill.data.from_text` says it (``examples.documents``); any where nothing counts. Of a
      single long text, numbers of passages whose rows follow one another, as those of
      ``data.from_text(split="pad")`` do and the shuffled ones of ``"cut"`` do not.
    beside: of another model, on the same examples; figures are then of ``kept`` − ``beside``.
    sizes: ``[N, L]``, the bytes of each label's text (``tokenizer.bytes[labels]``), for
      ``bits_per_byte`` too.

  Returns:
    ``{"nll" | "accuracy" | "bits_per_byte": {"mean", "standard_error", "documents"}}``: the error
    is None of a single document, and ``documents`` how many counted.

  Raises:
    TypeError: what was kept is not of tokens.
    ValueError: shapes differ, the two models count other tokens, or nothing counts.

  >>> kept = {"nll": [[[1.0, 1.0], [3.0, 3.0]]], "accuracy": np.ones((1, 2, 2))}
  >>> kept["where"] = np.ones((1, 2, 2))
  >>> over_documents(kept, [[0, 0], [1, 1]])["nll"]
  {'mean': 2.0, 'standard_error': 1.0, 'documents': 2}
  """
  for name, one in (("kept", kept), ("beside", beside)):
    if one is not None and not (isinstance(one, Mapping) and set(one) >= _OF_TOKENS):
      raise TypeError(
        f"{name}={_check.show(one)} must be what evaluation.examine(..., task=tasks.tokens()) "
        f"keeps, with {sorted(_OF_TOKENS)}."
      )
  where = np.asarray(kept["where"], np.float64)[0]
  shapes = {"documents": np.shape(documents), "beside": where.shape, "sizes": where.shape}
  if beside is not None:
    shapes["beside"] = np.shape(beside["where"])[1:]
  if sizes is not None:
    shapes["sizes"] = np.shape(sizes)
  for name, shape in shapes.items():
    if shape != where.shape:
      raise ValueError(
        f"{name} has the shape {list(shape)}, and kept is of {list(where.shape)} tokens: give one "
        "of the same examples for each, without rows that count nowhere."
      )
  if beside is not None and not np.array_equal(where, np.asarray(beside["where"])[0]):
    raise ValueError("beside counts other tokens than kept: examine both on the same examples.")
  counted = where > 0
  if not counted.any():
    raise ValueError("kept has no token that counts.")
  _, group = np.unique(np.asarray(documents)[counted], return_inverse=True)

  def ratio(name: str, weight: Any, unit: float = 1.0) -> dict[str, float | None]:
    values = [np.asarray(one[name], np.float64).mean(axis=0) for one in (kept, beside or kept)]
    each = values[0] - values[1] if beside is not None else values[0]
    t = np.bincount(group, (where * each)[counted])
    w = np.bincount(group, (where * weight)[counted]) * unit
    if not w.sum() > 0:  # of tokens that are no text
      raise ValueError("sizes are 0 wherever a token counts: there are no bits a byte.")
    mean, n = t.sum() / w.sum(), len(t)
    residual = t - w * mean
    error = np.sqrt(n / (n - 1) * np.sum(residual**2)) / w.sum() if n > 1 else None
    return {
      "mean": float(mean),
      "standard_error": None if error is None else float(error),
      "documents": n,
    }

  found = {name: ratio(name, 1.0 + 0 * where) for name in ("nll", "accuracy")}
  if sizes is not None:
    found["bits_per_byte"] = ratio("nll", np.asarray(sizes, np.float64), float(np.log(2)))
  return found


def gap_closed(
  teacher: Values,
  baseline: Values,
  student: Values,
  *,
  better: Literal["higher", "lower"] = "higher",
  examples: int | None = None,
  resamples: int = 10_000,
  confidence: float = 0.95,
  seed: int = 0,
) -> dict[str, Any]:
  """Share of the way from the baseline to the teacher that the student went, with an interval.

  ``(mean(student) − mean(baseline)) / (mean(teacher) − mean(baseline))``. It is given only where
  the teacher is better than the baseline by more than 2 standard errors of their difference:
  ``var / S`` for a side of several runs, the binomial error on the test set for a single run when
  ``examples`` is given, and otherwise 0, which ``note`` then says.

  The interval is a percentile bootstrap over runs. Student and baseline of equal length are drawn
  in pairs: run i of both shares its seed, hence initialisation and order, and what they share
  cancels. Else they are drawn independently, and so is a teacher of several runs; a single teacher
  is held fixed. A draw whose teacher is no better than its baseline lies outside on both sides.

  Args:
    teacher: one value, or ``[S_t]``.
    baseline: ``[S_b]``: the student's network trained without a teacher.
    student: ``[S]``.
    better: which values are: ``"higher"`` or ``"lower"``.
    examples: the number of test examples, when values are fractions of them.
    resamples: number of bootstrap draws.
    confidence: of the interval, in (0, 1).
    seed: of the draws.

  Returns:
    ``{"value", "low", "high", "note"}``: floats or None, and why, or how far to trust them ("").

  Raises:
    ValueError: an argument is empty, not finite or out of range; the message says which.

  Source: Efron, Tibshirani, An Introduction to the Bootstrap, 1993.

  >>> gap_closed([92.0, 90.0], [82.0, 80.0], [86.0, 86.0])["value"]
  0.5
  """
  if resamples < 1 or not 0 < confidence < 1:
    raise ValueError(
      f"resamples must be at least 1 and confidence in (0, 1), got {resamples} and {confidence}."
    )
  sides = {"teacher": teacher, "baseline": baseline, "student": student}
  runs = {name: _runs(name, values) for name, values in sides.items()}
  gap = float(runs["teacher"].mean() - runs["baseline"].mean())
  notes: list[str] = []
  error = _gap_error(runs, examples, notes)
  if better not in _WORDS:
    raise ValueError(f"better={better!r} must be 'higher' or 'lower'.")
  if better == "lower":  # whose negatives are higher, and as far from one another
    gap, runs = -gap, {name: -side for name, side in runs.items()}
  word = _WORDS[better]
  if gap <= 2 * error:
    note = (
      f"The teacher is not {word} the baseline beyond noise: the gap is {gap:.4g} with a standard "
      f"error of {error:.2g}, so the share of it means nothing."
    )
    return {"value": None, "low": None, "high": None, "note": " ".join([note, *notes])}
  value = float(runs["student"].mean() - runs["baseline"].mean()) / gap
  low, high = _gap_interval(runs, resamples, confidence, seed, notes, word)
  return {"value": value, "low": low, "high": high, "note": " ".join(notes)}


def _gap_error(
  runs: Mapping[str, NDArray[np.float64]], examples: int | None, notes: list[str]
) -> float:
  """Standard error of teacher − baseline; a side of unknown noise is 0 and noted."""
  if examples is not None and examples < 1:
    raise ValueError(f"examples must be a positive number of test examples, got {examples}.")
  variance = 0.0
  for name in ("teacher", "baseline"):
    side = runs[name]
    if side.size > 1:
      variance += float(side.var(ddof=1)) / side.size
    elif examples is not None:
      fraction = float(side[0])
      if not 0 <= fraction <= 1:
        raise ValueError(
          f"{name} must be a fraction in [0, 1] when examples is given, got {fraction}: divide "
          "percentages by 100, or leave examples out."
        )
      # Two added successes and failures (Agresti, Coull, 1998): a perfect score is no exact one.
      fraction = (fraction * examples + 2) / (examples + 4)
      variance += fraction * (1 - fraction) / (examples + 4)
    else:
      notes.append(f"The noise of the single {name} run is unknown and was taken as 0.")
  return float(np.sqrt(variance))


def _gap_interval(
  runs: Mapping[str, NDArray[np.float64]],
  resamples: int,
  confidence: float,
  seed: int,
  notes: list[str],
  word: str,
) -> tuple[float | None, float | None]:
  """Percentile bootstrap of the share; ``(None, None)`` and a note where there is none."""
  teacher, baseline, student = runs["teacher"], runs["baseline"], runs["student"]
  fewest = min(baseline.size, student.size)
  if fewest < 2:
    notes.append("There is no interval: baseline and student need at least 2 runs each.")
    return None, None
  random = np.random.default_rng(seed)

  def draw(size: int) -> NDArray[np.int64]:
    return random.integers(size, size=(resamples, size))

  student_draw = draw(student.size)
  baseline_draw = student_draw if baseline.size == student.size else draw(baseline.size)
  low_end = baseline[baseline_draw].mean(axis=1)
  gap = teacher[draw(teacher.size)].mean(axis=1) - low_end
  gain = student[student_draw].mean(axis=1) - low_end
  usable = gap > 0
  share = gain / np.where(usable, gap, 1)
  tail = (1 - confidence) / 2
  # Order statistics, not interpolation: the draws outside are infinite.
  low = float(np.quantile(np.where(usable, share, -np.inf), tail, method="lower"))
  high = float(np.quantile(np.where(usable, share, np.inf), 1 - tail, method="higher"))
  if not np.isfinite([low, high]).all():
    lost = f"{1 - usable.mean():.1%}"
    notes.append(
      f"There is no interval: the teacher is not {word} the baseline in {lost} of draws."
    )
    return None, None
  if fewest < 5:
    notes.append(f"With {fewest} runs the interval is likely too narrow.")
  return low, high


def _runs(name: str, values: Values) -> NDArray[np.float64]:
  runs = np.atleast_1d(np.asarray(values, np.float64))
  if runs.ndim != 1 or not runs.size or not np.isfinite(runs).all():
    raise ValueError(f"{name} must be finite numbers, one per run, got {values!r}.")
  return runs
