"""Losses on numbers (regression) ``[..., D]``: one value per example, the leading axes are kept.

The squared error is `jaxdistill.losses.logit_l2`, of two networks or of a network and its labels.
A network that says how sure it is puts out ``[..., 2D]``: D means, then D logarithms of variances.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from jaxdistill import _check
from jaxdistill.losses import _maps
from jaxdistill.losses._log_space import AnyArray, PerExample, Scalar, bounded, float_arrays

__all__ = ["gaussian_kl", "gaussian_nll", "huber", "teacher_bounded"]

Numbers = Float[AnyArray, "*batch D"]
Gaussians = Float[AnyArray, "*batch M"]
# A logarithm of a variance beyond this counts as this: its exponential has to stay in float32.
LARGEST_LOG_VARIANCE = 60.0


def huber(
  student: Numbers, target: Num[AnyArray, "*batch D"], *, delta: Scalar = 1.0
) -> PerExample:
  """Huber's loss (smooth L1): squares of small errors, sizes of large ones.

  mean_d h(student_d − target_d), h(e) = ½ e² where |e| ≤ delta, else delta · (|e| − ½ delta).

  Args:
    student: ``[..., D]``.
    target: ``[..., D]``, the teacher's numbers or the labels.
    delta: where it becomes straight, > 0. 1 is PyTorch's.

  Returns:
    ``[...]``.

  Raises:
    ValueError: the shapes differ, or ``delta`` is not positive.

  Source: Barron, "A General and Adaptive Robust Loss Function", 2019 (its smooth form and others).

  Other codes: this, as the mean over the batch, is PyTorch's ``HuberLoss``; its ``SmoothL1Loss`` is
  this divided by ``beta``, its name for delta.

  >>> huber(jnp.array([[0.5, -3.0]]), jnp.zeros((1, 2)))  # (1/8 + 5/2) / 2
  Array([1.3125], dtype=float32)
  """
  _check.number("delta", delta, above=0)
  student, target = _alike("target", student, target)
  knee = jnp.asarray(delta, student.dtype)
  return jnp.mean(jnp.square(knee) * _maps.huber((student - target) / knee), axis=-1)


def teacher_bounded(
  student: Numbers,
  teacher: Numbers,
  target: Num[AnyArray, "*batch D"],
  *,
  margin: Scalar = 0.0,
) -> PerExample:
  """Teacher-bounded regression (TB): the labels' error, where the student is no better by a margin.

  e_s where e_s + margin > e_t, else 0, e_s = Σ_d (student_d − target_d)²,
  e_t = Σ_d (teacher_d − target_d)².

  The student is drawn to the target and never to the teacher, whose error says when it may stop.
  There the value jumps to 0; the gradient on either side is that of e_s, or 0.

  Args:
    student: ``[..., D]``.
    teacher: ``[..., D]``.
    target: ``[..., D]``, the labels.
    margin: in the target's units squared. 0 is the plain comparison's; the paper gives no number.

  Returns:
    ``[...]``, in the target's units squared.

  Raises:
    ValueError: the shapes differ.

  Source: Chen, Choi, Yu, Han, Chandraker, "Learning Efficient Object Detection Models with
  Knowledge Distillation", 2017.

  Other codes: there is no published one; re-implementations compare the errors of whole batches,
  where this one, like the paper, compares each example's.

  >>> student, teacher = jnp.array([[2.0], [0.5]]), jnp.array([[1.0], [1.0]])
  >>> teacher_bounded(student, teacher, jnp.zeros((2, 1))).tolist()
  [4.0, 0.0]
  """
  _check.number("margin", margin)
  student, target = _alike("target", student, target)
  student, teacher = _alike("teacher", student, teacher)
  ours, theirs = (jnp.sum(jnp.square(x - target), axis=-1) for x in (student, teacher))
  return jnp.where(ours + jnp.asarray(margin, ours.dtype) > theirs, ours, 0.0)


def gaussian_nll(
  student: Gaussians, target: Num[AnyArray, "*batch D"], *, floor: Scalar = 1e-6
) -> PerExample:
  """Heteroscedastic regression (Gaussian NLL): errors in the units of the student's own doubt.

  mean_d ½ [(μ_d − target_d)² / v_d + log v_d], μ = the first D numbers of student,
  v = floor + exp(the last D).

  The constant ½ log 2π is left out. The gradient of μ is the error divided by v: what fits badly
  is trained less.

  Args:
    student: ``[..., 2D]``, means and then logarithms of variances (beyond 60 they count as 60).
    target: ``[..., D]``, the labels or the teacher's means.
    floor: the least variance, > 0. 1e-06 is PyTorch's.

  Returns:
    ``[...]``, in nats.

  Raises:
    ValueError: the shapes do not fit, or ``floor`` is not positive.

  Source: Kendall, Gal, "What Uncertainties Do We Need in Bayesian Deep Learning for Computer
  Vision?", 2017.

  Other codes: PyTorch's ``GaussianNLLLoss`` takes variances and clamps them to the floor without a
  gradient of the clamp, where this one adds it; PAD has the sum of both parts without ½.

  >>> student = jnp.array([[1.0, jnp.log(4.0)]])  # a mean of 1 and a variance of 4
  >>> round(gaussian_nll(student, jnp.array([[3.0]])).item(), 4)  # ½ (1 + log 4)
  1.1931
  """
  _check.number("floor", floor, above=0)
  mean, log_variance = _gaussians("student", student, floor)
  mean, target = _alike("target", mean, target)
  return 0.5 * jnp.mean(jnp.square(mean - target) * jnp.exp(-log_variance) + log_variance, axis=-1)


def gaussian_kl(student: Gaussians, teacher: Gaussians, *, floor: Scalar = 1e-6) -> PerExample:
  """KL of Gaussians (UDD): the teacher's mean and its doubt.

  mean_d ½ [log(v_d / w_d) + (w_d + (μ_d − ν_d)²) / v_d − 1], which is the mean over d of the KL of
  N(ν_d, w_d) from N(μ_d, v_d), μ = the first D numbers of student, v = floor + exp(the last D), and
  ν and w likewise of teacher.

  Args:
    student: ``[..., 2D]``, means and then logarithms of variances (beyond 60 they count as 60).
    teacher: ``[..., 2D]``, likewise.
    floor: the least variance, > 0, without which a teacher that is sure makes the value infinite.
      1e-06 is PyTorch's for `gaussian_nll`.

  Returns:
    ``[...]``, in nats.

  Raises:
    ValueError: the shapes differ, the last axis is odd, or ``floor`` is not positive.

  Source: Shen, Zhang, Sabuncu, Sun, "Real-Time Uncertainty Estimation in Computer Vision via
  Uncertainty-Aware Distribution Distillation", 2021.

  Other codes: none has this closed form; the paper fits samples of the teacher's, for which it is
  what the mean of `gaussian_nll` tends to, less a constant.

  >>> student, teacher = jnp.array([[0.0, 0.0]]), jnp.array([[1.0, 0.0]])  # two of variance 1
  >>> round(gaussian_kl(student, teacher).item(), 4)
  0.5
  """
  _check.number("floor", floor, above=0)
  student, teacher = _alike("teacher", student, teacher)
  mean, log_variance = _gaussians("student", student, floor)
  target, log_target = _gaussians("teacher", teacher, floor)
  ratio = log_target - log_variance
  apart = jnp.square(mean - target) * jnp.exp(-log_variance)
  # exp(x) − 1 − x, whose digits are lost where the variances are nearly equal, but for expm1.
  return 0.5 * jnp.mean(jnp.expm1(ratio) - ratio + apart, axis=-1)


def _alike(name: str, student: Any, other: Any) -> list[Array]:
  """Two arrays of one shape in one dtype."""
  if np.shape(student) != np.shape(other):
    raise ValueError(
      f"student {np.shape(student)} and {name} {np.shape(other)} must have one shape [..., D]: "
      f"labels of one number an example are labels[..., None]."
    )
  return [bounded(x) for x in float_arrays(student, other)]


def _gaussians(name: str, given: Any, floor: Scalar) -> tuple[Array, Array]:
  """Means and logarithms of variances, these with the floor."""
  shape = np.shape(given)
  if shape[-1] % 2:
    raise ValueError(f"{name} {shape} must be [..., 2D]: D means, then D logarithms of variances.")
  (numbers,) = float_arrays(given)
  mean, log_variance = jnp.split(bounded(numbers), 2, axis=-1)
  least = jnp.log(jnp.asarray(floor, numbers.dtype))
  return mean, jnp.logaddexp(least, jnp.minimum(log_variance, LARGEST_LOG_VARIANCE))
