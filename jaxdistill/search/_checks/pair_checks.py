"""Pre-flight checks of an objective and a pair: labels, targets, gradients, sizes.

Each is a function of measured numbers alone, so that it can be asked about numbers from elsewhere,
and returns a `Finding`, or None where all is well. `jaxdistill.search.preflight` measures the
numbers and asks all checks at once. Every threshold is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxdistill import _check
from jaxdistill.search._checks.findings import Finding, quoted
from jaxdistill.search._checks.probes import ProbedTerm

__all__ = [
  "capacity_gap",
  "collapsed",
  "labels_scale",
  "no_labels",
  "unequal_gradients",
  "unfit_labels",
  "uniform_targets",
]

# A change of labels changes a gradient by rounding at least; what reads them, by far more.
_READS = 1e-4


def capacity_gap(
  teacher_parameters: int,
  student_parameters: int,
  *,
  teacher_flops: float | None = None,
  student_flops: float | None = None,
  largest: float = 100.0,
) -> Finding | None:
  """Whether the teacher is far too large for the student.

  A student can follow a teacher only so far above it: with a larger teacher its accuracy falls
  again (Cho, Hariharan, "On the Efficacy of Knowledge Distillation", 2019), and a network of middle
  size in between helps (Mirzadeh et al., "Improved Knowledge Distillation via Teacher Assistant",
  2020). The ratio is the geometric mean of that of the parameters and that of the operations, where
  both are known, since either alone can be extreme between two families of networks.

  Where the effect begins depends on the task. 100 lies above the pairs that are in common use and
  still gain (ResNet-56 to 20: 3; ResNet-32x4 to 8x4: 6; ResNet-50 to MobileNetV2 on CIFAR-100: 29
  in parameters), so that it fires where no published protocol vouches for the pair.

  Args:
    teacher_parameters: of all its members, for an ensemble.
    student_parameters: of the network that is trained.
    teacher_flops: of one example; None where unknown.
    student_flops: those of the student; None where they cannot be counted.
    largest: the largest ratio that is let pass.

  Returns:
    A finding, with the assistants' sizes in geometric steps, or None.
  """
  for name, count in (
    ("teacher_parameters", teacher_parameters),
    ("student_parameters", student_parameters),
  ):
    _check.whole(name, count)
  ratios = {"parameters": teacher_parameters / student_parameters}
  if teacher_flops and student_flops:
    ratios["flops"] = teacher_flops / student_flops
  ratio = float(np.exp(np.mean(np.log(list(ratios.values())))))
  if ratio <= largest:
    return None
  steps = max(2, math.ceil(math.log(ratio) / math.log(largest)))
  each = ratios["parameters"] ** (1 / steps)
  sizes = [_digits(student_parameters * each**i) for i in range(steps - 1, 0, -1)]
  many = "a teaching assistant" if steps == 2 else f"{steps - 1} teaching assistants in turn"
  of_flops = f" and {ratios['flops']:.0f} times its operations" if "flops" in ratios else ""
  return Finding(
    "capacity_gap",
    f"The teacher is far too large for the student: it has {teacher_parameters:,} parameters, "
    f"{ratios['parameters']:.0f} times the student's {student_parameters:,}{of_flops}.",
    f"Try {many} of about {' and '.join(f'{size:,}' for size in sizes)} parameters (distil the "
    "teacher into it, and it into the student), a smaller teacher, or a larger student.",
    {"ratio": ratio, **{f"ratio_{n}": r for n, r in ratios.items()}, "assistants": sizes},
  )


def no_labels(terms: Mapping[str, ProbedTerm], *, labelled: bool = True) -> Finding | None:
  """Whether no term of the objective that counts depends on the labels.

  It is asked of what the objective computes, not of names: a term reads labels where its gradient
  changes when every example gets another label.

  Args:
    terms: from `probes.probe_terms`.
    labelled: whether the data has any label that may be used.

  Returns:
    A finding, or None.
  """
  reading = [name for name, term in terms.items() if term.label_change > _READS]
  counting = [name for name in reading if terms[name].weight != 0]
  if counting and labelled:
    return None
  if counting:
    why = f"the data has no label that may be used, so {quoted(counting)} counts nothing"
    how = "give the data labels (data.from_arrays(inputs, labels)), or leave that term out"
  elif reading:
    why = f"the weight of {quoted(reading)} is 0"
    how = "give it a weight (hard_weight=0.1, say)"
  else:
    why = f"none of its terms ({quoted(terms)}) depends on them"
    how = "add a term on the labels (hard_weight=0.1, or recipes.labels() by recipes.combine)"
  return Finding(
    "no_labels",
    f"There are no hard labels in the objective: {why}. The student then learns the teacher's "
    "mistakes with the rest.",
    f"If labels are meant to take part, {how}. Without them all is well where that is meant: "
    "unlabelled transfer data, a stage that matches features, a recipe that takes the teacher's "
    "classifier over (SimKD).",
    {"reading": reading, "weights": {n: terms[n].weight for n in reading}, "labelled": labelled},
  )


def unfit_labels(where: str, error: Exception) -> Finding:
  """That the task refuses the labels: another shape, a class beyond K, a tag of 0.5.

  A loss may take them without a word: a class beyond K (255, which stands for none) is a row of
  zeros to it.

  Args:
    where: in which split.
    error: what the task's check raised.
  """
  return Finding(
    "labels",
    f"The labels of {where} are not what the task takes: {error}",
    "A number that stands for no label is told by ignore= where the examples are made "
    "(data.from_arrays(..., ignore=255)).",
    {"where": where},
  )


def labels_scale(outputs: Any, labels: Any, where: Any, *, factor: float = 100.0) -> Finding | None:
  """Whether numbers that are to be predicted are of another size than what the student puts out.

  A network starts with outputs of about one. Towards targets of a thousand its first gradients are
  a thousand times those that learning rates are meant for; towards targets of a thousandth the
  loss of a network that always says 0 looks small.

  Args:
    outputs: the student's at initialisation, ``[B, D]``.
    labels: of the same shape.
    where: how much each counts, of the same shape.
    factor: how many times larger, or smaller, is let pass.

  Returns:
    A finding, also for labels that are not finite, or None.
  """
  _check.number("factor", factor, above=1)
  there = np.asarray(where) > 0
  said, wanted = (np.asarray(x, np.float64)[there] for x in (outputs, labels))
  if not there.any():
    return None
  bad = int(np.sum(~np.isfinite(wanted)))
  if bad:
    return Finding(
      "labels",
      f"{bad} of {wanted.size} labels of a training batch are not finite.",
      "Leave such examples out, or say by ignore=float('nan') that NaN stands for no label.",
      {"not_finite": bad},
    )
  ours, theirs = (float(np.sqrt(np.mean(np.square(x)))) for x in (said, wanted))
  ratio = theirs / ours if ours > 0 else math.inf
  if theirs == 0 or ours == 0 or 1 / factor <= ratio <= factor:
    return None
  return Finding(
    "labels",
    f"The labels are of another size than the student's outputs at initialisation: their root mean "
    f"square is {theirs:.3g}, and that of the outputs {ours:.3g}.",
    "Standardise them (subtract their mean over the training examples, divide by their standard "
    "deviation), and turn predictions back by the same numbers.",
    {"labels": theirs, "outputs": ours, "ratio": ratio},
  )


def collapsed(said: Mapping[str, Any], *, least: float = 1e-4) -> Finding | None:
  """Whether a teacher says the same of every example, so that there is nothing to learn from it.

  Args:
    said: its outputs by name, ``[B, ...]``.
    least: how far examples have to be apart: the root mean square of the deviation from their mean,
      as a share of that of the outputs.

  Returns:
    A finding, or None; of a single example nobody knows.
  """
  found = {}
  for name, given in said.items():
    x = np.asarray(given, np.float64)
    x = np.where(np.isfinite(x), x, 0)
    size = float(np.sqrt(np.mean(np.square(x)))) if x.size else 0.0
    if len(x) > 1:
      apart = float(np.sqrt(np.mean(np.square(x - x.mean(axis=0)))))
      found[name] = apart / size if size > 0 else 0.0
  same = [name for name, share in found.items() if share < least]
  if not same:
    return None
  return Finding(
    "collapsed",
    f"The teacher says the same of every example: its {quoted(same)} differ by "
    f"{max(found[name] for name in same):.2g} of their size.",
    "Look whether these are the trained variables, and whether its inputs are normalised as they "
    "were in its training. An embedding that was trained without negatives may have collapsed.",
    {"spread": found},
  )


def uniform_targets(
  logits: Any, temperature: float | Sequence[float], *, dtype: Any = None, units: float = 8.0
) -> Finding | None:
  """Whether the temperature makes the teacher's targets uniform to within rounding.

  With ``p = softmax(logits / temperature)`` over K classes, an example deviates from the uniform
  target by ``max |K p - 1|``. Where that is small all exponentials are near 1, and computing p
  rounds each of them (by up to one eps of the dtype), their sum (in pairs: one eps or less) and the
  quotient (half an eps): p is off by up to 3 eps of itself. So is the student's, and the gradient
  is the difference of the two. A deviation below 6 eps is noise, and 8 leaves a little room. For
  logits of ±5 that is a temperature of about 5 million in float32 and of 80 in bfloat16.

  Args:
    logits: ``[N, K]``, the teacher's.
    temperature: one, or those of several steps; the largest counts.
    dtype: in which the targets are computed; that of the logits by default. The library's losses
      compute in float32 at least.
    units: how many eps are noise.

  Returns:
    A finding where at least half of the examples are uniform, or None.
  """
  logits = np.asarray(logits)
  if logits.ndim != 2 or not logits.size:
    raise ValueError(f"logits must be [N, K], got {_check.show(logits)}.")
  largest = float(np.max(np.asarray(temperature, np.float64)))
  _check.number("temperature", largest, above=0)
  dtype = jnp.dtype(logits.dtype if dtype is None else dtype)
  deviation, plain = _deviation(logits, largest), _deviation(logits, 1.0)
  tells = units * float(jnp.finfo(dtype).eps)
  if deviation > tells:
    return None
  fix = (
    "Lower the temperature: 1 to 20 are in use."
    if plain > tells
    else "They are so at temperature 1 already: look whether the teacher is trained."
  )
  return Finding(
    "uniform_targets",
    f"At temperature {largest:g} the teacher's targets are uniform to within rounding: half of "
    f"them deviate by {deviation:.2g} of a class's share or less, and {dtype.name} tells "
    f"{tells:.2g}.",
    fix,
    {"temperature": largest, "deviation": deviation, "resolution": tells, "deviation_at_1": plain},
  )


def _deviation(logits: np.ndarray, temperature: float) -> float:
  """The examples' median of ``max |K p - 1|``, in float64; masked classes are left out."""
  scaled = logits.astype(np.float64) / temperature
  powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
  there = np.isfinite(scaled)
  shares = there.sum(axis=1, keepdims=True) * powers / powers.sum(axis=1, keepdims=True)
  return float(np.median(np.abs(np.where(there, shares, 1) - 1).max(axis=1)))


def unequal_gradients(terms: Mapping[str, ProbedTerm], *, factor: float = 100.0) -> Finding | None:
  """Whether the weighted terms differ by more than ``factor`` in gradient norm, or one has none.

  The norm is that of the gradient by the student's parameters. A term without weight is not
  looked at, nor is one of which nothing in the batch counts. One whose gradient is zero has no
  ratio; it is said, unless it teaches the objective's own parameters.

  Args:
    terms: from `probes.probe_terms`.
    factor: the largest ratio that is let pass.

  Returns:
    A finding, or None.
  """
  _check.number("factor", factor, above=1)
  counting = {name: t for name, t in terms.items() if t.weight != 0 and t.counted > 0}
  norms = {name: abs(term.weight) * term.norm for name, term in counting.items()}
  values: dict[str, Any] = {
    "norms": norms,
    "weights": {name: term.weight for name, term in counting.items()},
  }
  bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
  if bad:
    return Finding(
      "unequal_gradients",
      f"The gradient of {quoted(bad)} is not finite at initialisation.",
      "Look for a square root, a norm or a division at 0 in that loss, or a weight too large.",
      values,
    )
  nothing = [n for n, norm in norms.items() if norm == 0 and counting[n].objective_norm == 0]
  norms = {name: norm for name, norm in norms.items() if norm > 0}
  messages, fixes = [], []
  if norms:
    small, large = min(norms, key=norms.__getitem__), max(norms, key=norms.__getitem__)
    ratio = values["ratio"] = norms[large] / norms[small]
    if ratio > factor:
      listed = ", ".join(f"{name!r} {norm:.3g}" for name, norm in sorted(norms.items()))
      messages.append(
        f"The weighted terms differ {ratio:,.0f} times in gradient norm at initialisation "
        f"({listed}): {small!r} has next to no say."
      )
      fixes.append(
        f"Divide the weight of {large!r} by about {_digits(ratio):,g}, or multiply that of "
        f"{small!r} by it, and choose on validation."
      )
  if nothing:
    messages.append(f"The gradient of {quoted(nothing)} is zero at initialisation, weight or not.")
    fixes.append(
      f"Look whether {quoted(nothing)} depends on the student at all, or is at its minimum from "
      "the start; leave it out otherwise."
    )
  if not messages:
    return None
  return Finding("unequal_gradients", " ".join(messages), " ".join(fixes), values)


def _digits(value: float) -> int:
  """Two digits of a number, which is all that such advice is worth."""
  return int(float(f"{value:.2g}"))
