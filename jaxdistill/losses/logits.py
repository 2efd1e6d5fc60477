"""Losses on logits ``[..., K]``: one value per example, the leading axes are kept.

Student first, teacher second, labels third. Inputs are computed in float32 (float64 stays float64),
nothing is averaged over the batch, and no gradient is ever stopped: freezing the teacher is the
business of the teacher's forward pass.

The divergences, from `cross_entropy` to `decoupled_kd`, are written in `divergences` and take
classes masked to −inf; the functions written here do not.

Throughout, p = softmax(teacher_logits / temperature), q = softmax(student_logits / temperature)
and logarithms are natural.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Shaped

from jaxdistill.losses._log_space import (
  AnyArray,
  Scalar,
  bounded,
  check_positive,
  float_arrays,
  log_probabilities,
  one_hot,
  pair,
)
from jaxdistill.losses._maps import tame
from jaxdistill.losses.divergences import (
  cross_entropy,
  decoupled_kd,
  generalized_jsd,
  reverse_kl,
  skew_kl,
  skew_reverse_kl,
  soft_target_kl,
  total_variation,
)

__all__ = [
  "cross_entropy",
  "decoupled_kd",
  "generalized_jsd",
  "inter_class_correlation",
  "intra_class_correlation",
  "logit_l2",
  "one_for_all",
  "reverse_kl",
  "skew_kl",
  "skew_reverse_kl",
  "soft_target_kl",
  "standardize_logits",
  "total_variation",
]


def logit_l2(
  student_logits: Float[AnyArray, "*batch K"], teacher_logits: Float[AnyArray, "*batch K"]
) -> Float[Array, "*batch"]:
  """Logit regression (L2): mean squared error of the logits.

  mean_k (student_logits_k − teacher_logits_k)².

  Args:
    student_logits: ``[..., K]``, no class masked to −inf.
    teacher_logits: ``[..., K]``, likewise.

  Returns:
    ``[...]``.

  Raises:
    ValueError: the shapes differ.

  Source: Ba, Caruana, "Do Deep Nets Really Need to be Deep?", 2014.

  Other codes: this, as the mean over the batch, is PyTorch's ``MSELoss``; the paper has half of the
  sum, and TextBrewer divides both logits by a temperature first.

  >>> logit_l2(jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 0.0]])).tolist()
  [2.0]
  """
  student, teacher = pair(student_logits, teacher_logits)
  return jnp.mean(jnp.square(student - teacher), axis=-1)


def standardize_logits(logits: Float[AnyArray, "*batch K"]) -> Float[Array, "*batch K"]:
  """Logit standardisation (LSKD): z-scores over the classes, for use in front of any loss.

  (z − mean_k z) / (1e-7 + std_k z), z = logits,
  std_k z = √(Σ_k (z_k − mean_k z)² / (K − 1)).

  Apply it to both networks' logits; the temperature then multiplies standard deviations. The
  gradient flows through mean and std, as in the published code.

  Args:
    logits: ``[..., K]``, no class masked to −inf. A row of equal logits gives zeros, with a
      gradient of 0; the formula's own, of the order of 1e7, would end a run.

  Returns:
    ``[..., K]``, float32 (or float64).

  Source: Sun, Ren, Li, Wang, Cao, "Logit Standardization in Knowledge Distillation", 2024.

  Other codes: K − 1, here, is the published code's and torchdistill's, PyTorch's default; NumPy's
  and JAX's is K.

  >>> standardize_logits(jnp.array([[1.0, 2.0, 3.0]])).round(3).tolist()
  [[-1.0, 0.0, 1.0]]
  """
  (z,) = float_arrays(logits)
  # A scale of more than 1e9 cancels, but for the 1e-7; its square would not be finite.
  z = tame(bounded(z), -1)
  z = _centred(z, axis=-1)
  spread = _norm(z, axis=-1) / max(z.shape[-1] - 1, 1) ** 0.5
  return _moving(z, spread) / (1e-7 + spread)


def inter_class_correlation(
  student_logits: Float[AnyArray, "*batch K"],
  teacher_logits: Float[AnyArray, "*batch K"],
  *,
  temperature: Scalar = 4.0,
) -> Float[Array, "*batch"]:
  """Inter-class relation (DIST): how an example's classes rank and spread.

  temperature² · (1 − a·b / (‖a‖‖b‖ + 1e-8)), which is 1 − Pearson's correlation over the classes,
  a = q − mean_k q, b = p − mean_k p,
  p = softmax(teacher_logits / temperature), q = softmax(student_logits / temperature).
  The gradient is 0 for a row of equal logits (a head that starts at 0), where the formula's own is
  of the order of 1e7.

  Args:
    student_logits: ``[..., K]``, q's logits; no class masked to −inf.
    teacher_logits: ``[..., K]``, p's logits; likewise.
    temperature: softens both, > 0. 4 is the published code's for CIFAR-100 (1 for ImageNet).

  Returns:
    ``[...]``, in [0, 2 · temperature²]; temperature² where either is uniform.

  Raises:
    ValueError: the shapes differ or ``temperature`` is not positive.

  Source: Huang, You, Wang, Qian, Xu, "Knowledge Distillation from A Stronger Teacher", 2022.

  Other codes: temperature² is the published code's, absent from the paper's; torchdistill clamps
  ‖a‖‖b‖ where this one, like the published code, adds 1e-8 to it.

  >>> logits = jnp.array([[2.0, 1.0]])
  >>> inter_class_correlation(logits, -logits, temperature=1.0).round(3).tolist()
  [2.0]
  """
  log_q, log_p, squared = log_probabilities(student_logits, teacher_logits, temperature)
  q, p = jnp.exp(log_q), jnp.exp(log_p)
  a, b = _centred(q, axis=-1), _centred(p, axis=-1)
  return squared * (1 - _cosine(a, b, axis=-1))


def intra_class_correlation(
  student_logits: Float[AnyArray, "*batch K"],
  teacher_logits: Float[AnyArray, "*batch K"],
  *,
  temperature: Scalar = 4.0,
  where: Shaped[AnyArray, "*batch"] | None = None,
) -> Float[Array, " K"]:
  """Intra-class relation (DIST): how a class ranks the examples. One value per **class**.

  temperature² · (1 − a·b / (‖a‖‖b‖ + 1e-8)) for each class k, over the batch (all leading axes):
  a_i = q_ik − mean_i q_ik, b_i = p_ik − mean_i p_ik,
  p = softmax(teacher_logits / temperature), q = softmax(student_logits / temperature).

  Args:
    student_logits: ``[..., K]``, q's logits; no class masked to −inf.
    teacher_logits: ``[..., K]``, p's logits; likewise.
    temperature: softens both, > 0. 4 is the published code's for CIFAR-100 (1 for ImageNet).
    where: ``[...]``, which examples count (not 0); the others may hold anything. None counts all.

  Returns:
    ``[K]``, in [0, 2 · temperature²]; all 0 where fewer than two examples count. It depends on
    who is in the batch: under ``pmap`` or gradient accumulation that is the device's share or the
    micro-batch.

  Raises:
    ValueError: the shapes differ or ``temperature`` is not positive.

  Source: Huang, You, Wang, Qian, Xu, "Knowledge Distillation from A Stronger Teacher", 2022.

  Other codes: temperature² and 1e-8 are here as in the published code, whose number is the mean
  over the classes (see `inter_class_correlation`).

  >>> student, teacher = jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([[0.0, 0.0], [1.0, 0.0]])
  >>> intra_class_correlation(student, teacher, temperature=1.0).round(3).tolist()
  [2.0, 2.0]
  """
  student, teacher = pair(student_logits, teacher_logits)
  counted = jnp.ones(student.shape[:-1], bool) if where is None else jnp.asarray(where).astype(bool)
  if counted.shape != student.shape[:-1]:
    raise ValueError(f"where must have shape {student.shape[:-1]}, got {counted.shape}.")
  counted = counted[..., None]
  # Before the softmax as well as after it: a value that is masked only later can still leak NaN.
  student, teacher = jnp.where(counted, student, 0.0), jnp.where(counted, teacher, 0.0)
  log_q, log_p, squared = log_probabilities(student, teacher, temperature)
  axes = tuple(range(student.ndim - 1))
  count = jnp.sum(counted, axis=axes, keepdims=True).astype(student.dtype)

  def centre(x: Array) -> Array:
    # From the largest on, so that rounding in the mean cannot show where all are equal.
    largest = jnp.max(jnp.where(counted, x, 0.0), axis=axes, keepdims=True)
    x = x - jax.lax.stop_gradient(largest)
    mean = jnp.sum(jnp.where(counted, x, 0.0), axis=axes, keepdims=True) / jnp.maximum(count, 1)
    return jnp.where(counted, x - mean, 0.0)

  cosine = _cosine(centre(jnp.exp(log_q)), centre(jnp.exp(log_p)), axis=axes)
  return jnp.where(count.reshape(1) > 1, squared * (1 - cosine), 0.0)


def one_for_all(
  student_logits: Float[AnyArray, "*batch K"],
  teacher_logits: Float[AnyArray, "*batch K"],
  labels: Integer[AnyArray, "*batch"],
  *,
  power: Scalar = 1.0,
  temperature: Scalar = 1.0,
) -> Float[Array, "*batch"]:
  """One-for-all distillation (OFA-KD): the label's class is enhanced by a power.

  −Σ_k [(p_k + y_k)^power − y_k] log q_k, y one-hot of labels,
  p = softmax(teacher_logits / temperature), q = softmax(student_logits / temperature).

  At power = 1 it is the cross-entropy with the teacher's probabilities.

  Args:
    student_logits: ``[..., K]``, q's logits (of an exit head, or the last); no class masked to
      −inf.
    teacher_logits: ``[..., K]``, p's logits; likewise.
    labels: ``[...]`` integers. One outside ``0 .. K-1`` enhances no class.
    power: > 0. 1 is the published code's for CIFAR-100 (1.5 for ImageNet); larger trusts the
      label more.
    temperature: softens both, > 0. 1 is the published code's.

  Returns:
    ``[...]``, in nats.

  Raises:
    ValueError: the shapes differ, or ``temperature`` or ``power`` is not positive.

  Source: Hao, Guo, Han, Tang, Hu, Wang, Xu, "One-for-All: Bridge the Gap Between Heterogeneous
  Architectures in Knowledge Distillation", 2023.

  Other codes: the values of OFAKD, the published code, which takes the logarithm of a softmax; here
  it is a log-softmax, which stays finite. Neither has temperature².

  >>> student, teacher = jnp.zeros(2), jnp.log(jnp.array([0.75, 0.25]))
  >>> round(one_for_all(student, teacher, jnp.array(0), power=2.0).item(), 4)  # 2.125 · log 2
  1.4729
  """
  check_positive("power", power)
  log_q, log_p, _ = log_probabilities(student_logits, teacher_logits, temperature)
  exponent = jnp.asarray(power, log_q.dtype)
  # p^power as an exponential: its gradient is finite where p is 0, whatever the power.
  enhanced = jnp.expm1(exponent * jnp.log1p(jnp.exp(log_p)))
  targets = jnp.where(one_hot(labels, log_q), enhanced, jnp.exp(exponent * log_p))
  return -jnp.sum(targets * log_q, axis=-1)


def _centred(x: Array, axis: int) -> Array:
  """Less the mean over an axis, and exactly 0 where all are equal."""
  # From the first one on, so that rounding in the mean cannot show.
  x = x - jax.lax.index_in_dim(x, 0, axis)
  return x - jnp.mean(x, axis=axis, keepdims=True)


def _moving(x: Array, size: Array) -> Array:
  """The same values, without a gradient where the size is 0."""
  return jnp.where(size > 0, x, jax.lax.stop_gradient(x))


def _norm(x: Array, axis: int | tuple[int, ...]) -> Array:
  """Euclidean norm, axes kept, with a gradient of 0 at 0."""
  squared = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
  positive = squared > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1.0)), 0.0)


def _cosine(a: Array, b: Array, axis: int | tuple[int, ...]) -> Array:
  """Cosine of two arrays over axes, with DIST's 1e-8 in the denominator."""
  sizes = _norm(a, axis), _norm(b, axis)
  # Beside a size of 0 the 1e-8 is all there is, and the gradient would be 1e8 times the other side.
  a, b = _moving(a, sizes[0]), _moving(b, sizes[1])
  dot = jnp.sum(a * b, axis=axis, keepdims=True)
  return jnp.squeeze(dot / (sizes[0] * sizes[1] + 1e-8), axis=axis)
