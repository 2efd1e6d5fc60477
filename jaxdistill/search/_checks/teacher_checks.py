"""Pre-flight checks of a teacher: better than labels, trained to the end, calibrated.

Each is a function of measured numbers alone, so that it can be asked about numbers from elsewhere,
and returns a `Finding`, or None where all is well. `jaxdistill.search.preflight` measures the
numbers and asks all checks at once. Every threshold is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np

from jaxdistill import _check
from jaxdistill._compile import quick
from jaxdistill.evaluation import metrics, tasks
from jaxdistill.search._checks.calibration import (
  RANGE,
  calibrating_temperature,
  losses_at,
  smoothed_losses,
)
from jaxdistill.search._checks.findings import Finding, percent

__all__ = [
  "LINES",
  "curve_tells",
  "hardly_better",
  "hardly_better_by",
  "mean_and_error",
  "misleading",
  "near_chance",
  "still_falling",
  "still_learning",
]

_sums = jax.jit(metrics.classification_sums, compiler_options=quick())
# The fewest lines of a log of which two tenths say anything.
LINES = 20


def hardly_better(
  teacher: float,
  baseline: metrics.Values,
  *,
  examples: int,
  paired_error: float | None = None,
  least: float = 0.05,
  errors: float = 1.0,
) -> Finding | None:
  """Whether the teacher is hardly better than the student on labels alone.

  A teacher that knows no more than labels give has little to teach. It is found where the gap is
  within ``errors`` standard errors, or where the teacher makes less than ``least`` fewer errors.
  One standard error is even between the two mistakes: of teachers that are no better, one in six is
  let pass, and of those that are better by two standard errors, one in six is named. (The report
  asks for two before it speaks of a share of the gap, `evaluation.metrics.gap_closed`.)

  The variance of the gap is that of the seeds, plus that of the examples: both sides' binomial
  variances (with two added successes and failures, Agresti, Coull, 1998) unless the error of the
  paired difference is given, which is smaller, since both are wrong on much the same examples.

  Args:
    teacher: its accuracy, in [0, 1], on held-out examples.
    baseline: ``[S]``, the accuracies of students trained on labels alone, on the same examples.
    examples: how many they are.
    paired_error: the standard error, over examples, of the mean difference between the teacher's
      and the baseline's being right.
    least: the share of the baseline's errors that the teacher has to avoid.
    errors: how many standard errors are noise.

  Returns:
    A finding, or None.
  """
  _check.number("teacher", teacher, least=0, most=1)
  _check.whole("examples", examples)
  mean, std = metrics.mean_std(baseline)
  _check.number("baseline", mean, least=0, most=1)
  seeds = np.size(baseline)
  of_examples = (
    sum(_binomial(share, examples) for share in (teacher, mean))
    if paired_error is None
    else paired_error**2
  )
  of_seeds = 0.0 if std is None else std**2 / seeds
  gap, error = teacher - mean, math.sqrt(of_examples + of_seeds)
  values = {
    "teacher": teacher,
    "baseline": mean,
    "seeds": seeds,
    "gap": gap,
    "standard_error": error,
    "examples": examples,
  }
  compared = (
    f"has an accuracy of {percent(teacher)} on {examples:,} held-out examples, and the student "
    f"trained on labels alone {percent(mean)} ({seeds} seed{'s' if seeds > 1 else ''}): a gap of "
    f"{100 * gap:.2f} points, with a standard error of {100 * error:.2f}."
  )
  better = "Take a better teacher (larger, longer trained, more data or augmentation, an ensemble)"
  if gap <= errors * error:
    more = ""
    if gap > 0 and of_examples > of_seeds:
      needed = math.ceil(examples * of_examples * 4 / gap**2)  # two standard errors
      more = f", or find out whether it is better: a gap of this size takes {needed:,} examples"
    return Finding(
      "hardly_better",
      f"The teacher is not better beyond noise: it {compared}",
      f"{better}{more}.",
      values,
    )
  if gap < least * (1 - mean):
    return Finding(
      "hardly_better", f"The teacher is hardly better: it {compared}", f"{better}.", values
    )
  return None


def hardly_better_by(
  name: str,
  metric: tasks.Metric,
  teacher: float,
  baseline: metrics.Values,
  *,
  least: float = 0.05,
  errors: float = 1.0,
) -> Finding | None:
  """`hardly_better` by any metric: the gap beyond the noise of the seeds, and worth teaching.

  Of a metric that is no share of right answers nobody knows the noise of the examples; the seeds'
  is all there is, and of one seed none.

  Args:
    name: the metric's.
    metric: how it is read.
    teacher: the teacher's value on held-out examples.
    baseline: ``[S]``, those of students trained on labels alone.
    least: by which share of the baseline's value (of a share that is better when higher, of what it
      lacks of 1) the teacher has to be better.
    errors: how many standard errors are noise.

  Returns:
    A finding, or None.
  """
  mean, std = metrics.mean_std(baseline)
  gap = metric.sign * (teacher - mean)
  error = 0.0 if std is None else std / math.sqrt(np.size(baseline))
  lacks = 1 - mean if metric.percent and metric.sign > 0 else abs(mean)
  if gap > max(errors * error, least * lacks):
    return None
  return Finding(
    "hardly_better",
    f"The teacher is hardly better: its {name} is {teacher:.4g} on held-out examples, and that of "
    f"the student trained on labels alone {mean:.4g} ({np.size(baseline)} seeds, with a standard "
    f"error of {error:.2g}), where {metric.better} is better.",
    "Take a better teacher (larger, longer trained, more data or augmentation, an ensemble).",
    {"metric": name, "teacher": teacher, "baseline": mean, "gap": gap, "standard_error": error},
  )


def near_chance(
  accuracy: float, *, examples: int, chance: float, errors: float = 2.0
) -> Finding | None:
  """Whether the teacher is near chance, so that it has not learned, or sees other inputs.

  Args:
    accuracy: the teacher's, in [0, 1].
    examples: on how many it was measured.
    chance: the accuracy of whoever always names the most frequent class.
    errors: within how many binomial standard errors of chance it has to be.

  Returns:
    A finding, or None.
  """
  _check.number("accuracy", accuracy, least=0, most=1)
  _check.number("chance", chance, least=0, most=1)
  _check.whole("examples", examples)
  error = math.sqrt(chance * (1 - chance) / examples)
  if accuracy > chance + errors * error:
    return None
  return Finding(
    "not_trained",
    f"The teacher's accuracy is near chance: {percent(accuracy)} on {examples:,} held-out "
    f"examples, where always naming the most frequent class gives {percent(chance)}.",
    "Look whether these are the trained variables (teachers.restore), whether its inputs are "
    "normalised as they were in its training, and whether its classes have the labels' order.",
    {"accuracy": accuracy, "chance": chance, "standard_error": error, "examples": examples},
  )


def still_falling(
  steps: Sequence[int] | np.ndarray,
  losses: Sequence[float] | np.ndarray,
  *,
  planned: int | None = None,
  share: float = 0.02,
  errors: float = 3.0,
) -> Finding | None:
  """Whether a training curve was still falling when it ended, or ended before its time.

  The rule asks for both of these:

  - The median of the last tenth is below that of the tenth before by more than ``share`` of the
    fall in the whole run, and by more than ``errors`` standard errors of a difference of medians,
    of a noise that is estimated from the changes between neighbouring lines (their median absolute
    deviation).
  - Inside of the last tenth the curve falls on: its slope there (the median of all pairs' slopes:
    Theil, 1950; Sen, 1968) would in a tenth bring 0.7 of that drop or more. A loss that follows a
    learning rate down to zero falls before its end and flattens at it (of a cosine's height, half
    as fast in the last tenth), and the first condition alone would take that for a run without an
    end.

  An exponential approach of time constant τ fulfils them until about 3.1 τ at a ``share`` of 0.02.
  A flat curve does not prove that a run was long enough: one whose rate went to zero too early is
  flat as well.

  Args:
    steps: ``[N]``, increasing.
    losses: ``[N]``, the training loss at each; what is not finite is left out.
    planned: how many steps the run was meant to have; None where that is unknown.
    share: which part of the whole fall the last tenth may bring.
    errors: how many standard errors are noise.

  Returns:
    A finding, or None: also where there are fewer than `LINES`, of which a tenth says nothing.
  """
  values = np.asarray(losses, np.float64)
  at = np.asarray(steps, np.float64)[np.isfinite(values)]
  values = values[np.isfinite(values)]
  end = at[-1] if len(at) else 0
  if planned is not None and end < planned:
    return Finding(
      "not_trained",
      f"The teacher's run is not finished: it stands at step {int(end):,} of {planned:,}.",
      "Start it again with the same arguments; it goes on from its last checkpoint.",
      {"step": int(end), "steps": planned},
    )
  if len(values) < LINES:
    return None
  width, before, last, error = _tenths(values)
  fall, drop = float(values.max()) - last, before - last
  ahead = -_slope(at[-width:], values[-width:]) * float(at[-1] - at[0]) / 10
  if fall <= 0 or drop <= max(share * fall, errors * error) or ahead <= 0.7 * drop:
    return None
  return Finding(
    "not_trained",
    f"The teacher's training loss was still falling when its run ended: from {before:.4g} to "
    f"{last:.4g} in the last tenth ({100 * drop / fall:.1f}% of its fall in the whole run).",
    "Train the teacher longer, or let its learning rate go to zero by the end.",
    {"before": before, "last": last, "fall": fall, "standard_error": error, "ahead": ahead},
  )


def curve_tells(
  losses: Sequence[float] | np.ndarray, *, share: float = 0.02, errors: float = 3.0
) -> bool:
  """Whether a curve has lines enough, and noise little enough, for `still_falling` to answer.

  Args:
    losses: ``[N]``.
    share: which part of the whole fall the last tenth may bring.
    errors: how many standard errors are noise.

  Returns:
    Whether a drop of ``share`` in the last tenth would be beyond noise.

  >>> curve_tells(np.linspace(2, 1, 40)), curve_tells([2.0, 1.0])
  (True, False)
  """
  values = np.asarray(losses, np.float64)
  values = values[np.isfinite(values)]
  if len(values) < LINES:
    return False
  _, _, last, error = _tenths(values)
  return errors * error <= share * (float(values.max()) - last)


def _tenths(values: np.ndarray) -> tuple[int, float, float, float]:
  """How long a tenth is, the last two's medians, and the standard error of their difference."""
  width = max(len(values) // 10, 3)
  changes = np.diff(values[-2 * width :])
  noise = 1.4826 * np.median(np.abs(changes - np.median(changes))) / math.sqrt(2)
  before, last = np.median(values[-2 * width : -width]), np.median(values[-width:])
  # The median of a sample of the normal distribution errs 1.2533 times as much as its mean.
  return width, float(before), float(last), float(1.2533 * noise * math.sqrt(2 / width))


def _slope(x: np.ndarray, y: np.ndarray) -> float:
  first, second = np.triu_indices(len(x), 1)
  apart = x[second] - x[first]
  return float(np.median((y[second] - y[first])[apart > 0] / apart[apart > 0]))


def still_learning(
  before: np.ndarray,
  after: np.ndarray,
  *,
  share: float = 0.05,
  least: float = 0.01,
  errors: float = 2.0,
) -> Finding | None:
  """Whether a few probe steps still lower the teacher's loss, from `probes.taught_further`.

  A network that was trained to the end is at a place where a few small steps change little. The
  loss has to fall by more than its noise, by ``share`` of itself, and by ``least`` in nats: a
  network that has learned its training data by heart goes on towards zero for ever.

  Args:
    before: ``[N]``, the losses of training examples that the steps did not see.
    after: ``[N]``, those after the steps.
    share: by which part of itself the loss has to fall.
    least: by how much in nats.
    errors: how many standard errors of the mean paired difference are noise.

  Returns:
    A finding, or None.
  """
  drops = np.asarray(before, np.float64) - np.asarray(after, np.float64)
  drop, error = mean_and_error(drops)
  loss = float(np.mean(before))
  if not drop > max(share * loss, least, errors * error):
    return None
  return Finding(
    "not_trained",
    f"The teacher is not trained to the end: a few steps on the labels lower its loss on other "
    f"training examples from {loss:.4g} to {loss - drop:.4g} nats.",
    "Train it longer, or let its learning rate go to zero by the end. If it was trained on other "
    "data or other views, fine-tune it on these.",
    {"before": loss, "after": loss - drop, "standard_error": error, "examples": len(drops)},
  )


def misleading(
  logits: np.ndarray,
  labels: np.ndarray,
  *,
  temperature: float | None = None,
  least: float = 0.1,
  largest_drop: float = 0.5,
  errors: float = 2.0,
) -> Finding | None:
  """Whether the teacher's calibration is so bad that its soft targets mislead.

  That a network is too sure by a few points is usual (Guo, Pleiss, Sun, Weinberger, "On Calibration
  of Modern Neural Networks", 2017), and the objective's temperature softens it. It misleads where
  its probabilities are worth less than its answers, by either of two measures on held-out data, in
  nats of the mean negative log-likelihood:

  - It is ``least`` above that of the same answers with one confidence for all of them, the
    accuracy, and the rest spread evenly (`calibration.smoothed_losses`): whoever forgot everything
    but the teacher's most likely class would know more about the labels. 0.1 is about what a
    teacher that was trained with a label smoothing of 0.1 loses by being less sure than it could
    (log 1/0.9): that is no harm to the labels.
  - Dividing the logits by one number lowers it by ``largest_drop``. At 0.5, the right class has in
    the geometric mean only 0.6 of the probability that the teacher itself could give it.

  Both have to be beyond noise: more than ``errors`` standard errors of the mean over examples.

  Args:
    logits: ``[N, K]`` on held-out examples.
    labels: ``[N]`` classes.
    temperature: the objective's, for the advice; None where it has none.
    least: see above.
    largest_drop: see above.
    errors: how many standard errors are noise.

  Returns:
    A finding, with the expected calibration error (15 bins) and the loss before and after, or None.
  """
  best = calibrating_temperature(logits, labels)
  plain, fitted = losses_at(logits, labels), losses_at(logits, labels, best)
  excess, excess_error = mean_and_error(plain - smoothed_losses(logits, labels))
  drop, drop_error = mean_and_error(plain - fitted)
  worse = excess > max(least, errors * excess_error)
  if not worse and not drop > max(largest_drop, errors * drop_error):
    return None
  before, after = _calibration_error(logits, labels), _calibration_error(logits / best, labels)
  nll, calibrated = float(plain.mean()), float(fitted.mean())
  why = (
    f"{excess:.2f} more than its answers alone with one confidence for all of them"
    if worse
    else f"and {calibrated:.3g} with its logits divided by {best:.3g}"
  )
  return Finding(
    "calibration",
    f"The teacher's probabilities mislead: its calibration error is {percent(before)}, and its "
    f"negative log-likelihood on held-out examples {nll:.3g} nats, {why}.",
    _calibrate(best, excess - drop, after, temperature),
    {
      "ece": before,
      "ece_calibrated": after,
      "nll": nll,
      "nll_calibrated": calibrated,
      "nll_of_answers": nll - excess,
      "temperature": best,
      "examples": len(plain),
    },
  )


def _calibrate(best: float, left: float, after: float, temperature: float | None) -> str:
  """What to do: divide the logits where that helps."""
  if left > 0 or not RANGE[0] * 1.01 < best < RANGE[1] / 1.01:
    return (
      "No temperature puts that right: give the labels more weight, or take another teacher, "
      "and look whether its classes have the labels' order."
    )
  instead = "" if temperature is None else f" (temperature={temperature * best:.3g} here)"
  cause = (
    "it is too sure: training it for fewer epochs or with more weight decay helps too"
    if best > 1
    else "it is not sure enough: if it was trained with label smoothing or mixup, leave that out"
  )
  return (
    f"Divide its logits by {best:.3g}, which leaves a calibration error of {percent(after)}, or "
    f"multiply the objective's temperature by that{instead}; {cause}."
  )


def _calibration_error(logits: np.ndarray, labels: np.ndarray) -> float:
  sums = _sums(np.asarray(logits, np.float32), labels, np.ones(len(labels), np.float32))
  return float(metrics.finish(jax.device_get(sums))["ece"])


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
  """A mean and its standard error; that of a single value is infinite.

  >>> mean_and_error(np.array([1.0, 3.0]))
  (2.0, 1.0)
  """
  count = len(values)
  error = float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else math.inf
  return float(np.mean(values)), error


def _binomial(share: float, examples: int) -> float:
  share = (share * examples + 2) / (examples + 4)
  return share * (1 - share) / (examples + 4)
