"""What the losses on logits are made of: one dtype, masked classes, log-probabilities.

Private to `jaxdistill.losses`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Num

from jaxdistill import _check

__all__ = [
  "MASKED",
  "AnyArray",
  "Logits",
  "PerExample",
  "Scalar",
  "absolute",
  "bounded",
  "check_classes",
  "check_there",
  "counted",
  "distribution",
  "float_arrays",
  "is_masked",
  "kl",
  "log_mixture",
  "log_probabilities",
  "one_hot",
  "pair",
  "soften",
  "softened_pair",
  "softmax_cross_entropy",
  "softmax_kl",
]

AnyArray = Array | np.ndarray
# A network's logits, and what a loss on them gives: the leading axes stay, the classes go.
Logits = Float[AnyArray, "*batch K"]
PerExample = Float[Array, "*batch"]
# A hyper-parameter: a number, or a scalar array (of a schedule, or of a sweep under vmap).
Scalar = float | int | np.number | Num[AnyArray, ""]
# Stands for −inf where a class is masked. Its exponential is 0 and, being finite, its difference
# from itself is 0, so that values and gradients need no second mask. Whatever is below it counts as
# masked too: the lowest float, as some networks mask with, would be −inf after the temperature.
MASKED = -1e30


def absolute(x: Array) -> Array:
  """The absolute value, with a gradient of 0 at 0, as PyTorch's; JAX's own is 1 there.

  >>> jax.grad(absolute)(0.0).item(), absolute(jnp.array(-2.0)).item()
  (0.0, 2.0)
  """
  return x * jax.lax.stop_gradient(jnp.sign(x))


def bounded(x: Array) -> Array:
  """Within ±1e30, so that neither a difference nor a small temperature leaves float32.

  >>> bounded(jnp.array([3e38, 1.0])).tolist() == [jnp.float32(1e30).item(), 1.0]
  True
  """
  # Not `jnp.clip`, whose gradient asks which of x and a bound is equal to the result.
  low, high = jnp.asarray(MASKED, x.dtype), jnp.asarray(-MASKED, x.dtype)
  return jax.lax.clamp(low, x, high)


def counted(where: Any, shape: tuple[int, ...]) -> Bool[Array, ...]:
  """Which examples (or positions) take part: those that are not 0, or all.

  >>> counted(None, (2,)).tolist(), counted(jnp.array([1.0, 0.0]), (2,)).tolist()
  ([True, True], [True, False])
  """
  valid = jnp.ones(shape, bool) if where is None else jnp.asarray(where).astype(bool)
  if valid.shape != shape:
    raise ValueError(f"where must have shape {shape}, got {valid.shape}.")
  return valid


def check_there(**logits: Any) -> None:
  """Raises for logits that a network does not put out, by the argument's name.

  >>> check_there(student_logits=jnp.ones((2, 3)))
  """
  for name, one in logits.items():
    if one is None:
      raise ValueError(
        f"{name} is None: that network puts out no logits. Compare features, by recipes.hint or "
        "recipes.rkd, or say which of its outputs they are by logits= of networks.linen or nnx."
      )


def check_classes(logits: Any, name: str) -> None:
  """Raises for a single output, of which a softmax makes 1, whatever it is.

  >>> check_classes(jnp.ones((2, 3)), "logits")
  """
  check_there(**{name: logits})
  if np.shape(logits)[-1:] == (1,):
    raise ValueError(
      f"{name} {np.shape(logits)} have one output, of which a softmax makes 1 whatever it is: the "
      "loss would be 0 and train nothing. Give a network of two classes two outputs; numbers are "
      "compared by losses.logit_l2."
    )


def float_arrays(*arrays: Any) -> list[Array]:
  """The arrays in one dtype, explicitly: float64 if any of them is that, else float32.

  >>> [x.dtype.name for x in float_arrays(jnp.ones(2, jnp.bfloat16), jnp.ones(2, jnp.float16))]
  ['float32', 'float32']
  """
  present = [jnp.asarray(array) for array in arrays]
  dtype = jnp.float64 if any(array.dtype == jnp.float64 for array in present) else jnp.float32
  return [array.astype(dtype) for array in present]


def pair(student_logits: Any, teacher_logits: Any) -> list[Array]:
  """Both networks' logits in one dtype, after a look at their shapes.

  >>> [x.dtype.name for x in pair(jnp.ones((2, 3), jnp.bfloat16), jnp.ones((2, 3)))]
  ['float32', 'float32']
  """
  check_there(student_logits=student_logits, teacher_logits=teacher_logits)
  if np.shape(student_logits) != np.shape(teacher_logits):
    raise ValueError(
      f"student_logits {np.shape(student_logits)} and teacher_logits {np.shape(teacher_logits)} "
      "must have one shape: select or pad the classes of one of them first."
    )
  return float_arrays(student_logits, teacher_logits)


def distribution(labels: Any, logits: Array) -> Array:
  """Labels as ``[..., K]`` distributions in the dtype of the logits.

  Numbers that are no distribution would give a loss all the same, and a gradient towards nothing.
  Inside of a program nobody can look at them; outside, and so before a run (`train.fit`), they are
  looked at. Several labels at once, 0 or 1 each, are let pass, and rows of zeros.

  >>> distribution(jnp.array([1]), jnp.zeros((1, 2))).tolist()
  [[0.0, 1.0]]
  """
  labels = jnp.asarray(labels)
  if labels.shape == logits.shape:
    if not isinstance(labels, jax.core.Tracer) and labels.is_fully_addressable:
      _check_distributions(np.asarray(labels, np.float64))
    return labels.astype(logits.dtype)
  return one_hot(labels, logits, f" or distributions of shape {logits.shape}").astype(logits.dtype)


def _check_distributions(labels: np.ndarray) -> None:
  """Raises where not one row ``[..., K]`` is a distribution; those that do not count may be any."""
  rows = labels.reshape(-1, labels.shape[-1])
  rows = rows[np.isfinite(rows).all(axis=1) & rows.any(axis=1)]
  # To the digits of bfloat16, in which labels may be.
  shares = (rows >= 0).all(axis=1) & (np.abs(rows.sum(axis=1) - 1) < 0.02)
  if len(rows) and not (shares | np.isin(rows, (0, 1)).all(axis=1)).any():
    first = ", ".join(f"{value:.3g}" for value in rows[0][:5])
    raise _check.LabelsError(
      f"labels are no distributions over the {rows.shape[1]} classes: a row is [{first}"
      f"{', ...' if rows.shape[1] > 5 else ''}], whose sum is {rows[0].sum():.3g}. Towards numbers "
      "there are losses.huber and recipes.regression; several labels at once are recipes."
      "multi_label."
    )


def one_hot(labels: Any, logits: Array, alternative: str = "") -> Array:
  """Where in ``[..., K]`` the labels' classes are, as booleans.

  >>> one_hot(jnp.array([1]), jnp.zeros((1, 2))).tolist()
  [[False, True]]
  """
  labels = jnp.asarray(labels)
  if labels.shape != logits.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
    raise ValueError(
      f"labels must be integers of shape {logits.shape[:-1]}{alternative} beside logits of shape "
      f"{logits.shape}, got {labels.dtype} of shape {labels.shape}."
    )
  # In int32, since one_hot counts the classes in the labels' dtype and a uint8 would wrap.
  return jax.nn.one_hot(labels.astype(jnp.int32), logits.shape[-1], dtype=bool)


def is_masked(logits: Array) -> Array:
  """Which classes are masked; NaN is not.

  >>> is_masked(jnp.array([0.0, -1e4, -jnp.inf, jnp.nan])).tolist()
  [False, False, True, False]
  """
  return logits < MASKED


def soften(logits: Array, temperature: Array | float) -> Array:
  """Logits over temperature, with about `MASKED` where they are −inf or nearly.

  >>> softened = soften(jnp.array([2.0, -jnp.inf]), 2.0)
  >>> softened[0].item(), softened[1].item() < -1e29
  (1.0, True)
  """
  masked = is_masked(logits)
  # Masked before the division too: −inf would make the temperature's gradient NaN.
  # Less at a high temperature, whose square multiplies it.
  low = MASKED / jax.lax.stop_gradient(jnp.maximum(temperature, 1.0))
  return jnp.where(masked, low, bounded(jnp.where(masked, 0.0, logits)) / temperature)


def log_probabilities(
  student_logits: Any, teacher_logits: Any, temperature: Scalar
) -> tuple[Array, Array, Array]:
  """Returns (log q, log p, temperature²), all in one dtype.

  >>> log_q, _, squared = log_probabilities(jnp.zeros(2), jnp.ones(2), 3.0)
  >>> round(log_q[0].item(), 4), squared.item()
  (-0.6931, 9.0)
  """
  student, teacher, squared = softened_pair(student_logits, teacher_logits, temperature)
  return jax.nn.log_softmax(student, axis=-1), jax.nn.log_softmax(teacher, axis=-1), squared


def softened_pair(
  student_logits: Any, teacher_logits: Any, temperature: Scalar
) -> tuple[Array, Array, Array]:
  """Both networks' logits over temperature, and temperature², all in one dtype.

  >>> student, _, squared = softened_pair(jnp.ones(2), jnp.ones(2), 2.0)
  >>> student.tolist(), squared.item()
  ([0.5, 0.5], 4.0)
  """
  _check.number("temperature", temperature, above=0)
  check_classes(student_logits, "student_logits")
  student, teacher = pair(student_logits, teacher_logits)
  # Of the logits' dtype: two dtypes in one operation raise under strict promotion.
  scale = jnp.asarray(temperature, student.dtype)
  return soften(student, scale), soften(teacher, scale), jnp.square(scale)


def kl(log_a: Array, log_b: Array) -> Array:
  """KL(a‖b) over the last axis, from logarithms.

  >>> round(kl(jnp.array([0.0, -2e4]), jnp.log(jnp.array([0.5, 0.5]))).item(), 4)
  0.6931
  """
  # Σ a·d + b − a, d = log a − log b: the same, since both sum to 1, with no summand below 0. Of
  # Σ a·d the summands cancel, and what rounding leaves of nearly equal ones was below 0.
  a, b, d = jnp.exp(log_a), jnp.exp(log_b), log_a - log_b
  # [..., K]. Where d is small b − a cancels too: it is a·(e⁻ᵈ − 1).
  small = jnp.abs(d) < 1
  rest = jnp.where(small, a * jnp.expm1(-jnp.where(small, d, 0)), b - a)
  # A masked class has MASKED in both: exp gives 0, the difference is finite, the term is 0.
  each = a * d + rest
  return jnp.sum(each + jax.lax.stop_gradient(jnp.maximum(-each, 0)), axis=-1)


@jax.custom_jvp
def softmax_kl(a: Array, b: Array) -> Array:
  """KL(softmax(a) ‖ softmax(b)) over the last axis, of logits that are `soften`-ed already.

  Its derivative is written down: softmax(b) − softmax(a) by b, and softmax(a) · (log a − log b −
  KL) by a. Autodiff of `kl` comes to the same numbers, and keeps five arrays of their size for one.

  >>> z = jnp.array([0.0, 1.0])
  >>> jax.grad(softmax_kl, argnums=1)(z, z).tolist()
  [0.0, 0.0]
  """
  return kl(jax.nn.log_softmax(a, axis=-1), jax.nn.log_softmax(b, axis=-1))


@functools.partial(softmax_kl.defjvp, symbolic_zeros=True)
def _softmax_kl_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
  log_a, log_b = (jax.nn.log_softmax(z, axis=-1) for z in primals)
  value = kl(log_a, log_b)
  slope = jnp.zeros_like(value)
  by_a, by_b = tangents
  # Of the one network that is trained; the other's slope is not computed at all.
  if not isinstance(by_b, SymbolicZero):
    slope = slope + jnp.sum((jnp.exp(log_b) - jnp.exp(log_a)) * by_b, axis=-1)
  if not isinstance(by_a, SymbolicZero):
    apart = log_a - log_b - value[..., None]
    slope = slope + jnp.sum(jnp.exp(log_a) * apart * by_a, axis=-1)
  return value, slope


@jax.custom_jvp
def softmax_cross_entropy(z: Array, targets: Array) -> Array:
  """−Σ targets · log softmax(z) over the last axis, of logits that are `soften`-ed already.

  Its derivative is written down: softmax(z) · Σ targets − targets by z, and −log softmax(z) by the
  targets. Autodiff comes to the same numbers, and keeps arrays of the logits' size besides.

  >>> jax.grad(softmax_cross_entropy)(jnp.zeros(2), jnp.array([1.0, 0.0])).tolist()
  [-0.5, 0.5]
  """
  # Never log(softmax(z)): at logits of ±1e4 a probability rounds to 0, and its logarithm is −inf.
  return -jnp.sum(targets * jax.nn.log_softmax(z, axis=-1), axis=-1)


@functools.partial(softmax_cross_entropy.defjvp, symbolic_zeros=True)
def _softmax_cross_entropy_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
  z, targets = primals
  log_q = jax.nn.log_softmax(z, axis=-1)
  value = -jnp.sum(targets * log_q, axis=-1)
  slope = jnp.zeros_like(value)
  by_z, by_targets = tangents
  if not isinstance(by_z, SymbolicZero):
    # A label outside of the classes, or a row of zeros, sums to 0 and pulls nowhere.
    total = jnp.sum(targets, axis=-1, keepdims=True)
    slope = slope + jnp.sum((jnp.exp(log_q) * total - targets) * by_z, axis=-1)
  if not isinstance(by_targets, SymbolicZero):
    slope = slope - jnp.sum(log_q * by_targets, axis=-1)
  return value, slope


def log_mixture(log_a: Array, log_b: Array, share: Scalar) -> Array:
  """Logarithm of share · a + (1 − share) · b, without leaving log space.

  At a share of exactly 0 or 1 the value is exact and the gradients of a and b are too, but the
  share's own leaves out the absent part, whose slope can be infinite.

  >>> log_mixture(jnp.array([0.0]), jnp.array([-2e4]), 0.0).tolist()
  [-20000.0]
  """
  share = jnp.asarray(share, log_a.dtype)
  # exp, mix and log again would lose what both sides have below 1e-38, and a log(0) with it.
  return jnp.logaddexp(log_a + _log_share(share), log_b + _log_share(1 - share))


def _log_share(share: Array) -> Array:
  """Logarithm of a share: −inf at 0, with a gradient of 0 there."""
  # The inner `where` is for the gradient: 1/0 times the 0 of the branch not taken is NaN.
  return jnp.where(share > 0, jnp.log(jnp.where(share > 0, share, 1.0)), -jnp.inf)
