"""Losses that need no teacher (self-distillation) ``[..., K]``: soft labels made of less.

USKD makes them of the student's own answers, Tf-KD of the label alone, mean teacher of what the
student's own average answers. No class may be masked.
Throughout, q = softmax(student_logits) and logarithms are natural.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Integer, Shaped

from jaxdistill import _check
from jaxdistill.losses._log_space import (
  MASKED,
  AnyArray,
  Logits,
  PerExample,
  Scalar,
  check_classes,
  counted,
  float_arrays,
  kl,
  one_hot,
  pair,
  soften,
)

__all__ = ["consistency", "self_nontarget", "self_target", "virtual_teacher"]


def consistency(student_logits: Logits, teacher_logits: Logits) -> PerExample:
  """Consistency (MT, mean teacher): squared error of the probabilities.

  mean_k (q_k − p_k)², q = softmax(student_logits), p = softmax(teacher_logits).

  Args:
    student_logits: ``[..., K]``, q's logits; no class masked to −inf.
    teacher_logits: ``[..., K]``, p's logits: of the student's moving average, in the paper.

  Returns:
    ``[...]``.

  Raises:
    ValueError: the shapes differ.

  Source: Tarvainen, Valpola, "Mean Teachers Are Better Role Models: Weight-Averaged Consistency
  Targets Improve Semi-Supervised Deep Learning Results", 2017.

  Other codes: the published code's is this, as the mean over the batch, before its weight of 100.

  >>> consistency(jnp.array([[0.0, 0.0]]), jnp.log(jnp.array([[0.75, 0.25]]))).round(4).tolist()
  [0.0625]
  """
  student, teacher = pair(student_logits, teacher_logits)
  apart = jax.nn.softmax(soften(student, 1.0)) - jax.nn.softmax(soften(teacher, 1.0))
  return jnp.mean(jnp.square(apart), axis=-1)


def self_target(
  student_logits: Logits,
  labels: Integer[AnyArray, "*batch"],
  *,
  where: Shaped[AnyArray, "*batch"] | None = None,
) -> PerExample:
  """Target part of universal self-knowledge distillation (USKD): a smooth soft label of 1 or so.

  −P log q_y, P = 1 + q_y² − mean q_y² over the batch (all leading axes), y = labels,
  q = softmax(student_logits).

  The gradient does not pass through P.

  Args:
    student_logits: ``[..., K]``, q's logits; no class masked to −inf.
    labels: ``[...]`` integers. One outside ``0 .. K-1`` has the value 0 and no part in the mean.
    where: ``[...]``, which examples count (not 0); the others may hold anything and have the value
      0. None counts all.

  Returns:
    ``[...]``, in nats. It depends on who is in the batch: under ``pmap`` or gradient accumulation
    that is the device's share or the micro-batch.

  Raises:
    ValueError: there is but one output, or the labels are no integers ``[...]``.

  Source: Yang, Zeng, Li, Zhang, Yuan, Li, "From Knowledge Distillation to Self-Knowledge
  Distillation: A Unified Approach with Normalized Loss and Customized Soft Labels", 2023.

  Other codes: these are the values of cls_KD, the published code, for integer labels; its form for
  mixup, with two targets, is not here.

  >>> logits = jnp.log(jnp.array([[0.5, 0.5], [0.75, 0.25]]))
  >>> [round(v, 4) for v in self_target(logits, jnp.array([0, 0])).tolist()]
  [0.5848, 0.3326]
  """
  check_classes(student_logits, "student_logits")
  (student,) = float_arrays(student_logits)
  valid = counted(where, student.shape[:-1])
  is_label = one_hot(labels, student)
  valid = valid & jnp.any(is_label, axis=-1)
  log_q = jax.nn.log_softmax(soften(jnp.where(valid[..., None], student, 0.0), 1.0), axis=-1)
  log_label = jnp.sum(jnp.where(is_label, log_q, 0.0), axis=-1)
  squared = jnp.where(valid, jnp.exp(2 * log_label), 0.0)
  mean = jnp.sum(squared) / jnp.maximum(jnp.sum(valid), 1).astype(squared.dtype)
  target = jax.lax.stop_gradient(1 + squared - mean)
  return jnp.where(valid, -target * log_label, 0.0)


def self_nontarget(
  student_logits: Logits, weak_logits: Logits, labels: Integer[AnyArray, "*batch"]
) -> PerExample:
  """Non-target part of universal self-knowledge distillation (USKD): Zipf's law for the others.

  −Σ_k z_k log q̂_k over the classes k other than y = labels, z_k = 1 / rank_k, divided by their sum,
  rank = the places, from 1, of all classes by w / (1 − w_y + 1e-6) + q / (1 − q_y + 1e-6),
  w = softmax(weak_logits), q = softmax(student_logits), q̂ = q over the others, divided by its sum.

  Ranks are no function with a gradient, so none reaches weak_logits.

  Args:
    student_logits: ``[..., K]``, q's logits; no class masked to −inf.
    weak_logits: ``[..., K]`` of an exit on an earlier layer; no class masked to −inf.
    labels: ``[...]`` integers. One outside ``0 .. K-1`` leaves all classes among the others.

  Returns:
    ``[...]``, in nats; 0 with two classes.

  Raises:
    ValueError: the shapes differ, there is but one output, or the labels are no integers ``[...]``.

  Source: Yang, Zeng, Li, Zhang, Yuan, Li, "From Knowledge Distillation to Self-Knowledge
  Distillation: A Unified Approach with Normalized Loss and Customized Soft Labels", 2023.

  Other codes: the published code, cls_KD, ranks by log q in place of q, since it reuses a name;
  this one ranks by probabilities, as the paper does. Of equal classes the first is before the
  others here, which PyTorch leaves open.

  >>> logits = jnp.log(jnp.array([0.7, 0.2, 0.1]))
  >>> loss = self_nontarget(logits, logits, jnp.array(0))  # ranks 2 and 3: ⅗ and ⅖ of [⅔, ⅓]
  >>> round(loss.item(), 4)
  0.6827
  """
  check_classes(student_logits, "student_logits")
  student, weak = pair(student_logits, weak_logits)
  is_label = one_hot(labels, student)

  def share(logits: Array) -> Array:
    p = jax.nn.softmax(soften(jax.lax.stop_gradient(logits), 1.0), axis=-1)
    others = 1 - jnp.sum(jnp.where(is_label, p, 0.0), axis=-1, keepdims=True)
    return p / (others + 1e-6)

  # The place of each class: sorting what sorted them inverts the permutation.
  places = jnp.argsort(jnp.argsort(-(share(student) + share(weak)), axis=-1), axis=-1)
  zipf = jnp.where(is_label, 0.0, 1 / (places + 1).astype(student.dtype))
  target = zipf / jnp.sum(zipf, axis=-1, keepdims=True)
  others = jnp.where(is_label, MASKED, soften(student, 1.0))
  log_q = jnp.where(is_label, 0.0, jax.nn.log_softmax(others, axis=-1))
  return -jnp.sum(target * log_q, axis=-1)


def virtual_teacher(
  student_logits: Logits,
  labels: Integer[AnyArray, "*batch"],
  *,
  correct: Scalar = 0.99,
  temperature: Scalar = 20.0,
) -> PerExample:
  """Teacher-free distillation by a designed teacher (Tf-KD): one that is right and says little.

  KL(r ‖ q) = Σ_k r_k log(r_k / q_k), r = softmax(u / temperature), u_k = correct at k = labels,
  (1 − correct) / (K − 1) at the others; KL(a ‖ b) = Σ_k a_k log(a_k / b_k),
  q = softmax(student_logits).

  The temperature divides probabilities, so that r is nearly uniform: at 20 and 100 classes 0.0105
  at the label and 0.01 elsewhere.

  Args:
    student_logits: ``[..., K]``, q's logits; no class masked to −inf.
    labels: ``[...]`` integers. One outside ``0 .. K-1`` leaves r uniform.
    correct: the designed probability of the label, in [0, 1]. 0.99 is the published code's.
    temperature: of the designed teacher alone, > 0. 20 is the published code's for ResNet-18.

  Returns:
    ``[...]``, in nats.

  Raises:
    ValueError: there is but one output, the labels are no integers ``[...]``, ``temperature`` is
      not positive or ``correct`` outside [0, 1].

  Source: Yuan, Tay, Li, Wang, Feng, "Revisiting Knowledge Distillation via Label Smoothing
  Regularization", 2020.

  Other codes: the published code's number is the mean over batch and classes, this over K, before a
  multiplier (100 for ResNet-18 on CIFAR-100, which undoes that). The paper tempers the student too.
  KD_Lib's copy differs from both.

  >>> round(virtual_teacher(jnp.zeros(2), jnp.array(0), temperature=1.0).item(), 4)
  0.107
  """
  _check.number("temperature", temperature, above=0)
  _check.number("correct", correct, least=0, most=1)
  check_classes(student_logits, "student_logits")
  (student,) = float_arrays(student_logits)
  right, scale = (jnp.asarray(x, student.dtype) for x in (correct, temperature))
  designed = jnp.where(one_hot(labels, student), right, (1 - right) / (student.shape[-1] - 1))
  log_r = jax.nn.log_softmax(designed / scale, axis=-1)
  return kl(log_r, jax.nn.log_softmax(soften(student, 1.0), axis=-1))
