"""Losses that part the classes ``[..., K]`` and compare the parts: one value per example.

One divergence is behind all of them, `partition_kl`: how much probability is inside a set of
classes, and how it is spread inside and outside. DKD takes the label's class for the set, GDKD the
teacher's first few, RLD whatever the teacher puts above the label.

All of them take classes masked to −inf in both networks, as the divergences of `logits` do.
Throughout, p = softmax(teacher_logits / temperature), q = softmax(student_logits / temperature)
and logarithms are natural.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Integer

from jaxdistill import _check
from jaxdistill.losses._log_space import (
  MASKED,
  AnyArray,
  Logits,
  PerExample,
  Scalar,
  check_classes,
  kl,
  one_hot,
  pair,
  soften,
)

__all__ = [
  "decoupled_kd",
  "generalized_decoupled_kd",
  "normalized_kd",
  "partition_kl",
  "refined_kd",
]


def partition_kl(
  student_logits: Logits,
  teacher_logits: Logits,
  inside: Bool[AnyArray, "*batch K"],
  *,
  temperature: Scalar = 4.0,
  pair_weight: Scalar = 1.0,
  inside_weight: Scalar = 1.0,
  outside_weight: Scalar = 8.0,
) -> PerExample:
  """Partition KL (what DKD and GDKD have in common): a set of classes, and those outside it.

  temperature² · (pair_weight · KL([p_I, 1 − p_I] ‖ [q_I, 1 − q_I])
    + inside_weight · KL(p̂ ‖ q̂) + outside_weight · KL(p̌ ‖ q̌)),
  p_I = Σ_k p_k over the classes k that are inside, p̂ and q̂ = p and q over these, p̌ and q̌ over
  the others, each divided by its sum, KL(a ‖ b) = Σ_k a_k log(a_k / b_k),
  p = softmax(teacher_logits / temperature), q = softmax(student_logits / temperature).

  With inside_weight = p_I and outside_weight = 1 − p_I it is `soft_target_kl`, whatever the set. A
  part of one class or none contributes 0.

  Args:
    student_logits: ``[..., K]``, q's logits. Classes masked to −inf in both are left out.
    teacher_logits: ``[..., K]``, p's logits.
    inside: ``[..., K]`` booleans, the set of classes of each example.
    temperature: softens both, > 0. 4 is mdistiller's for CIFAR-100.
    pair_weight: weight of the (inside, outside) pair. 1 is DKD's and GDKD's.
    inside_weight: weight of the classes inside. 1 is GDKD's for ResNet-32x4 to either ShuffleNet.
    outside_weight: weight of the others. 8 is GDKD's for the same.

  Returns:
    ``[...]``, in nats · temperature².

  Raises:
    ValueError: the shapes differ, there is but one output, or ``temperature`` is not positive.

  Source: Zheng, Cheng, "Rethinking Decoupled Knowledge Distillation: A Predictive Distribution
  Perspective", 2025.

  Other codes: DKD, GDKD and RLD subtract 1000 or put −1e9 where a class is not in a part, and take
  logarithms of sums of a softmax; this one stays in log space. Theirs are `decoupled_kd`,
  `generalized_decoupled_kd` and `refined_kd`.

  >>> student, teacher = jnp.zeros(4), jnp.log(jnp.array([0.3, 0.3, 0.2, 0.2]))
  >>> inside = jnp.array([True, True, False, False])
  >>> round(partition_kl(student, teacher, inside, temperature=1.0).item(), 4)  # the pair's alone
  0.0201
  """
  student, teacher = pair(student_logits, teacher_logits)
  inside = jnp.asarray(inside)
  if inside.shape != student.shape or inside.dtype != bool:
    raise ValueError(
      f"inside must be booleans of the logits' shape {student.shape}, got {inside.dtype} of shape "
      f"{inside.shape}."
    )
  squared, *parts = _parts(student, teacher, inside, temperature)
  weights = (jnp.asarray(w, student.dtype) for w in (pair_weight, inside_weight, outside_weight))
  return squared * sum(weight * part for weight, part in zip(weights, parts, strict=True))


def decoupled_kd(
  student_logits: Logits,
  teacher_logits: Logits,
  labels: Integer[AnyArray, "*batch"],
  *,
  temperature: Scalar = 4.0,
  target_weight: Scalar = 1.0,
  nontarget_weight: Scalar = 8.0,
) -> PerExample:
  """Decoupled knowledge distillation (DKD): the label's class apart from the others.

  temperature² · (target_weight · KL([p_y, 1 − p_y] ‖ [q_y, 1 − q_y])
    + nontarget_weight · KL(p̂ ‖ q̂)),
  y = labels, p̂ and q̂ = p and q over the classes other than y, each divided by its sum,
  KL(a ‖ b) = Σ_k a_k log(a_k / b_k),
  p = softmax(teacher_logits / temperature), q = softmax(student_logits / temperature).

  With nontarget_weight = 1 − p_y it is `soft_target_kl`. With two classes (or two that are not
  masked) the second part is exactly 0.

  Args:
    student_logits: ``[..., K]``, q's logits. Classes masked to −inf in both are left out.
    teacher_logits: ``[..., K]``, p's logits.
    labels: ``[...]`` integers. One that is masked or outside ``0 .. K-1`` has p_y = q_y = 0.
    temperature: softens both, > 0. 4 is mdistiller's for CIFAR-100.
    target_weight: weight of the (label, rest) pair. 1 is the paper's.
    nontarget_weight: weight of the other classes. 8 is the paper's for ResNet-32x4 to 8x4; it
      chose 2 to 8 by the teacher.

  Returns:
    ``[...]``, in nats · temperature².

  Raises:
    ValueError: the shapes differ, there is but one output, or ``temperature`` is not positive.

  Source: Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation", 2022.

  Other codes: mdistiller, the published code, takes logarithms of sums of a softmax and gives −inf
  at confident logits; this one has its values elsewhere, and stays in log space. Its warm-up over
  epochs is the recipe's. OFAKD's copy takes nontarget_weight 2 at temperature 1.

  >>> student, teacher = jnp.zeros(3), jnp.log(jnp.array([0.5, 0.375, 0.125]))
  >>> round(decoupled_kd(student, teacher, jnp.array(0), temperature=1.0).item(), 4)
  1.1054
  """
  student, teacher = pair(student_logits, teacher_logits)
  # The paper's TCKD is the pair's: how sure the label is. Its NCKD is the rest's: which others are
  # near. In plain KD that has the weight 1 − p_y, next to nothing for a teacher that is sure.
  squared, pairs, _, others = _parts(student, teacher, one_hot(labels, student), temperature)
  target, nontarget = (jnp.asarray(w, student.dtype) for w in (target_weight, nontarget_weight))
  return squared * (target * pairs + nontarget * others)


def generalized_decoupled_kd(
  student_logits: Logits,
  teacher_logits: Logits,
  *,
  top: int = 5,
  temperature: Scalar = 4.0,
  pair_weight: Scalar = 1.0,
  top_weight: Scalar = 2.0,
  rest_weight: Scalar = 8.0,
) -> PerExample:
  """Generalised decoupled knowledge distillation (GDKD): the teacher's first few classes apart.

  temperature² · (pair_weight · KL([p_I, 1 − p_I] ‖ [q_I, 1 − q_I])
    + top_weight · KL(p̂ ‖ q̂) + rest_weight · KL(p̌ ‖ q̌)),
  p_I = Σ_k p_k over the top classes k of largest teacher_logits, p̂ and q̂ = p and q over these,
  p̌ and q̌ over the rest, each divided by its sum, KL(a ‖ b) = Σ_k a_k log(a_k / b_k),
  p = softmax(teacher_logits / temperature), q = softmax(student_logits / temperature).

  It looks at no label. With all classes at the top, the rest contributes 0.

  Args:
    student_logits: ``[..., K]``, q's logits. Classes masked to −inf in both are left out.
    teacher_logits: ``[..., K]``, p's logits. Of equal ones the first is before the others.
    top: how many classes are at the top, an integer. 5 is the published code's.
    temperature: softens both, > 0. 4 is the published code's for CIFAR-100 (1 for ImageNet).
    pair_weight: weight of the (top, rest) pair. 1 is the published code's.
    top_weight: weight of the top classes among themselves. 2 is the published code's for
      ResNet-32x4 to 8x4.
    rest_weight: weight of the others. 8 is the published code's for the same.

  Returns:
    ``[...]``, in nats · temperature².

  Raises:
    TypeError: ``top`` is no integer.
    ValueError: the shapes differ, there is but one output, ``temperature`` is not positive or
      ``top`` below 1.

  Source: Zheng, Cheng, "Rethinking Decoupled Knowledge Distillation: A Predictive Distribution
  Perspective", 2025.

  Other codes: the published code subtracts 1000 where a class is not in a part, which leaves all of
  them where none is in it: with all classes at the top it counts the whole KL for the rest, and
  this one, in log space, 0. Its options ("worst" classes, reverse KL in the parts) are not here.

  >>> student, teacher = jnp.zeros(4), jnp.log(jnp.array([0.3, 0.3, 0.2, 0.2]))
  >>> round(generalized_decoupled_kd(student, teacher, top=2, temperature=1.0).item(), 4)
  0.0201
  """
  _check.whole("top", top)
  student, teacher = pair(student_logits, teacher_logits)
  # The choice is no function of the logits that has a gradient. One largest after another, and not
  # by sorting: a vocabulary that lies in parts on several devices would be gathered for it.
  fixed = jax.lax.stop_gradient(teacher)
  place = jax.lax.broadcasted_iota(jnp.int32, fixed.shape, fixed.ndim - 1)

  def with_next(_: Any, inside: Array) -> Array:
    left = jnp.where(inside, -jnp.inf, fixed)
    return inside | (place == jnp.argmax(left, axis=-1, keepdims=True).astype(jnp.int32))

  none = jnp.zeros(fixed.shape, bool)  # [..., K]
  inside = jax.lax.fori_loop(0, min(top, fixed.shape[-1]), with_next, none)
  return partition_kl(
    student,
    teacher,
    inside,
    temperature=temperature,
    pair_weight=pair_weight,
    inside_weight=top_weight,
    outside_weight=rest_weight,
  )


def refined_kd(
  student_logits: Logits,
  teacher_logits: Logits,
  labels: Integer[AnyArray, "*batch"],
  *,
  temperature: Scalar = 4.0,
  target_temperature: Scalar = 1.0,
  target_weight: Scalar = 1.0,
  nontarget_weight: Scalar = 8.0,
) -> PerExample:
  """Refined logit distillation (RLD): what the teacher puts above the label is not taught.

  target_weight · target_temperature² · KL([p_m, 1 − p_m] ‖ [q_y, 1 − q_y])
    + nontarget_weight · temperature² · KL(p̂ ‖ q̂),
  y = labels, m = the class of the largest teacher_logits, both at target_temperature in the first
  part; p̂ and q̂ = p and q over the classes with smaller teacher_logits than y's, each divided by
  its sum, KL(a ‖ b) = Σ_k a_k log(a_k / b_k),
  p = softmax(teacher_logits / temperature), q = softmax(student_logits / temperature).

  The label is taught to be as probable as whatever the teacher holds to be most probable. Where
  the teacher is right the second part is that of `decoupled_kd`; where it puts the label last or
  last but one, it is 0.

  Args:
    student_logits: ``[..., K]``, q's logits. Classes masked to −inf in both are left out.
    teacher_logits: ``[..., K]``, p's logits.
    labels: ``[...]`` integers. One outside ``0 .. K-1`` contributes 0.
    temperature: softens both in the second part, > 0. 4 is the published code's for CIFAR-100 (1
      for ImageNet).
    target_temperature: softens both in the first part, > 0. 1 is the published code's.
    target_weight: weight of the first part. 1 is the published code's.
    nontarget_weight: weight of the second. 8 is the published code's for CIFAR-100.

  Returns:
    ``[...]``, in nats · temperature².

  Raises:
    ValueError: the shapes differ, there is but one output, or a temperature is not positive.

  Source: Sun, Chen, Lyu, Chen, Chen, Wang, "Knowledge Distillation with Refined Logits", 2024.

  Other codes: the published code puts −1e9 where a class is left out and takes logarithms of sums
  of a softmax; this one stays in log space. RC and SWAP, which stand beside it, are not here.

  >>> student, teacher = jnp.zeros(3), jnp.log(jnp.array([0.5, 0.375, 0.125]))
  >>> round(refined_kd(student, teacher, jnp.array(1)).item(), 4)  # [½, ½] from [⅓, ⅔]
  0.0589
  """
  _check.number("target_temperature", target_temperature, above=0)
  student, teacher = pair(student_logits, teacher_logits)
  is_label = one_hot(labels, student)
  of_label = jnp.max(jnp.where(is_label, teacher, -jnp.inf), axis=-1, keepdims=True)
  # A tie with the label is above it.
  squared, _, _, below = _parts(student, teacher, teacher >= of_label, temperature)
  scale = jnp.asarray(target_temperature, student.dtype)
  most = jax.nn.one_hot(jnp.argmax(teacher, axis=-1), teacher.shape[-1], dtype=bool)
  student_pair, *_ = _split(soften(student, scale), is_label)
  teacher_pair, *_ = _split(soften(teacher, scale), most)
  target, nontarget = (jnp.asarray(w, scale.dtype) for w in (target_weight, nontarget_weight))
  values = target * jnp.square(scale) * kl(teacher_pair, student_pair) + nontarget * squared * below
  return jnp.where(jnp.any(is_label, axis=-1), values, 0.0)


def normalized_kd(
  student_logits: Logits,
  teacher_logits: Logits,
  labels: Integer[AnyArray, "*batch"],
  *,
  temperature: Scalar = 1.0,
  nontarget_weight: Scalar = 1.5,
) -> PerExample:
  """Normalised knowledge distillation (NKD): the teacher's label term, and the others normalised.

  −p_y log q_y − nontarget_weight · temperature² · Σ_k p̂_k log q̂_k,
  y = labels, p_y and q_y at temperature 1; p̂ and q̂ = p and q over the classes other than y, each
  divided by its sum,
  p = softmax(teacher_logits / temperature), q = softmax(student_logits / temperature).

  The second part differs from that of `decoupled_kd` by the entropy of p̂, which the student cannot
  change; the first pulls on the label alone. With two classes the second part is exactly 0.

  Args:
    student_logits: ``[..., K]``, q's logits. Classes masked to −inf in both are left out.
    teacher_logits: ``[..., K]``, p's logits.
    labels: ``[...]`` integers. One outside ``0 .. K-1`` has p_y = 0.
    temperature: softens both in the second part, > 0. 1 is the published code's for ImageNet (3 for
      CIFAR-100).
    nontarget_weight: weight of the second part. 1.5 is the published code's for ImageNet's
      convolutional networks (1 for ViTs, 3.5 for CIFAR-100).

  Returns:
    ``[...]``, in nats · temperature².

  Raises:
    ValueError: the shapes differ, there is but one output, or ``temperature`` is not positive.

  Source: Yang, Zeng, Li, Zhang, Yuan, Li, "From Knowledge Distillation to Self-Knowledge
  Distillation: A Unified Approach with Normalized Loss and Customized Soft Labels", 2023.

  Other codes: these are the values of cls_KD, the published code, which stops the gradient of p_y;
  here, as everywhere, the teacher is frozen where it runs. SDD's copy masks nothing in its second
  part.

  >>> student, teacher = jnp.zeros(3), jnp.log(jnp.array([0.5, 0.375, 0.125]))
  >>> round(normalized_kd(student, teacher, jnp.array(0)).item(), 4)  # ½ log 3 + 1.5 log 2
  1.589
  """
  _check.number("temperature", temperature, above=0)
  check_classes(student_logits, "student_logits")
  student, teacher = pair(student_logits, teacher_logits)
  is_label = one_hot(labels, student)
  pairs = [_split(soften(z, 1.0), is_label)[0][..., 0] for z in (student, teacher)]
  scale = jnp.asarray(temperature, student.dtype)
  log_q, log_p = (_split(soften(z, scale), is_label)[2] for z in (student, teacher))
  # The label has a probability of 0 among the others, and its logarithm times temperature² might
  # leave float32.
  others = -jnp.sum(jnp.exp(log_p) * jnp.where(is_label, 0.0, log_q), axis=-1)
  weight = jnp.asarray(nontarget_weight, scale.dtype)
  return -jnp.exp(pairs[1]) * pairs[0] + weight * jnp.square(scale) * others


def _parts(
  student: Array, teacher: Array, inside: Array, temperature: Scalar
) -> tuple[Array, Array, Array, Array]:
  """Temperature², and the KLs of the (inside, outside) pair, inside and outside."""
  _check.number("temperature", temperature, above=0)
  check_classes(student, "student_logits")
  scale = jnp.asarray(temperature, student.dtype)
  ours, theirs = (_split(soften(z, scale), inside) for z in (student, teacher))
  pairs, within, without = (kl(p, q) for p, q in zip(theirs, ours, strict=True))
  return jnp.square(scale), pairs, within, without


def _split(logits: Array, inside: Array) -> tuple[Array, Array, Array]:
  """Log-probabilities of (inside, outside) ``[..., 2]``, and within either ``[..., K]``."""
  parts = jnp.where(inside, logits, MASKED), jnp.where(inside, MASKED, logits)
  # [..., 1] each. A part of no class has MASKED for its mass, a probability of 0, and its classes
  # have the logarithm 0 in both networks: a divergence of 0.
  masses = [jax.nn.logsumexp(part, axis=-1, keepdims=True) for part in parts]
  # log p_I = −softplus(−odds) and log(1 − p_I) = −softplus(odds), without the 1 − p_I that rounds
  # to 0 at a confident label, where the published codes end.
  odds = (masses[0] - masses[1])[..., 0]
  pairs = -jax.nn.softplus(jnp.stack([-odds, odds], axis=-1))
  within, without = (part - mass for part, mass in zip(parts, masses, strict=True))
  return pairs, within, without
