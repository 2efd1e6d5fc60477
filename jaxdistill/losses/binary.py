"""Losses on labels that are each on or off (multi-label) ``[..., C]``: one value per example.

Each label has a logit of its own: σ(z) = 1 / (1 + exp(−z)) is its probability, and the labels do
not compete. They are summed, not averaged, so that a value does not depend on how many of an
example's labels are known: ``where`` ``[..., C]`` leaves the others out, which may then hold
anything. Labels are 0 or 1, or probabilities.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Num, Shaped

from jaxdistill import _check
from jaxdistill.losses._log_space import (
  AnyArray,
  Logits,
  PerExample,
  Scalar,
  bounded,
  counted,
  float_arrays,
  kl,
  pair,
)

__all__ = ["binary_cross_entropy", "binary_focal", "binary_soft_target_kl"]

Labels = Num[AnyArray, "*batch K"]
Mask = Shaped[AnyArray, "*batch K"] | None


def binary_cross_entropy(
  student_logits: Logits, labels: Labels, *, where: Mask = None
) -> PerExample:
  """Binary cross-entropy (BCE), summed over an example's labels.

  −Σ_c [y_c log σ(z_c) + (1 − y_c) log σ(−z_c)] over the labels c, y = labels, z = student_logits,
  σ(z) = 1 / (1 + exp(−z)).

  Args:
    student_logits: ``[..., C]``, one for each label.
    labels: ``[..., C]``, 0 or 1, or in between.
    where: ``[..., C]``, which labels are known (not 0); the others may hold anything. None is all.

  Returns:
    ``[...]``, in nats; 0 where no label is known.

  Raises:
    ValueError: the shapes differ.

  Source: Nam, Kim, Loza Mencía, Gurevych, Fürnkranz, "Large-scale Multi-label Text Classification:
  Revisiting Neural Networks", 2014.

  Other codes: PyTorch's default is the mean over examples and labels, this over C; L2D's labels
  have the sum over the batch too.

  >>> logits, labels = jnp.array([[0.0, jnp.log(3.0)]]), jnp.array([[1, 1]])
  >>> round(binary_cross_entropy(logits, labels).item(), 4)  # log 2 + log 4/3
  0.9808
  """
  z, y, valid = _known(student_logits, labels, where)
  # log σ(−z) = log σ(z) − z, so that one logarithm does.
  values = -jax.nn.log_sigmoid(-z) - y * z
  return jnp.sum(jnp.where(valid, values, 0.0), axis=-1)


def binary_focal(
  student_logits: Logits,
  labels: Labels,
  *,
  focus: Scalar = 2.0,
  positive_share: Scalar = 0.25,
  where: Mask = None,
) -> PerExample:
  """Focal loss (FL), summed over an example's labels: what is easy counts less.

  −Σ_c [positive_share · y_c · σ(−z_c)^focus · log σ(z_c)
    + (1 − positive_share) · (1 − y_c) · σ(z_c)^focus · log σ(−z_c)],
  y = labels, z = student_logits, σ(z) = 1 / (1 + exp(−z)).

  With focus = 0 and positive_share = ½ it is half of `binary_cross_entropy`.

  Args:
    student_logits: ``[..., C]``, one for each label.
    labels: ``[..., C]``, 0 or 1, or in between.
    focus: the power, ≥ 0. 2 is the paper's.
    positive_share: of labels that are on, in [0, 1]; 1 − positive_share is that of the others. 0.25
      is the paper's for a focus of 2.
    where: ``[..., C]``, which labels are known (not 0); the others may hold anything. None is all.

  Returns:
    ``[...]``, in nats; 0 where no label is known.

  Raises:
    ValueError: the shapes differ, ``focus`` is negative or ``positive_share`` outside [0, 1].

  Source: Lin, Goyal, Girshick, He, Dollár, "Focal Loss for Dense Object Detection", 2017.

  Other codes: torchvision's is this at labels of 0 and 1; in between it mixes probabilities, and
  this one the two losses. RetinaNet divides by the number of labels that are on.

  >>> round(binary_focal(jnp.array([[0.0]]), jnp.array([[1]])).item(), 4)  # log 2 / 16
  0.0433
  """
  _check.number("focus", focus, least=0)
  _check.number("positive_share", positive_share, least=0, most=1)
  z, y, valid = _known(student_logits, labels, where)
  power, share = (jnp.asarray(x, z.dtype) for x in (focus, positive_share))
  log_on, log_off = jax.nn.log_sigmoid(z), jax.nn.log_sigmoid(-z)
  # The power of a probability as an exponential: its gradient is finite where that is 0.
  on = share * y * jnp.exp(power * log_off) * log_on
  off = (1 - share) * (1 - y) * jnp.exp(power * log_on) * log_off
  return -jnp.sum(jnp.where(valid, on + off, 0.0), axis=-1)


def binary_soft_target_kl(
  student_logits: Logits, teacher_logits: Logits, *, temperature: Scalar = 1.0, where: Mask = None
) -> PerExample:
  """Multi-label logits distillation (MLD): KL of each label's probability, and their sum.

  temperature² · Σ_c KL([p_c, 1 − p_c] ‖ [q_c, 1 − q_c]) over the labels c,
  p_c = σ(teacher_logits_c / temperature), q_c = σ(student_logits_c / temperature),
  σ(z) = 1 / (1 + exp(−z)), KL(a ‖ b) = Σ_k a_k log(a_k / b_k).

  Args:
    student_logits: ``[..., C]``, q's logits.
    teacher_logits: ``[..., C]``, p's logits.
    temperature: softens both, > 0. 1 is the paper's.
    where: ``[..., C]``, which labels take part (not 0); the others may hold anything. None is all.

  Returns:
    ``[...]``, in nats · temperature².

  Raises:
    ValueError: the shapes differ, or ``temperature`` is not positive.

  Source: Yang, Xie, Zong, Feng, Niu, Sugiyama, Huang, "Multi-Label Knowledge Distillation", 2023.

  Other codes: this, as the mean over the batch, is L2D's, the published code, which clamps
  probabilities to [1e-8, 1 − 1e-8] where this one stays in log space, and has no temperature.

  >>> student, teacher = jnp.zeros((1, 1)), jnp.log(jnp.array([[3.0]]))  # of ½ and ¾
  >>> round(binary_soft_target_kl(student, teacher).item(), 4)
  0.1308
  """
  _check.number("temperature", temperature, above=0)
  student, teacher = pair(student_logits, teacher_logits)
  valid = counted(where, student.shape)
  scale = jnp.asarray(temperature, student.dtype)
  # [..., C, 2]: a label that is on or off is a softmax of two classes, z and 0.
  log_q, log_p = (
    jax.nn.log_sigmoid(jnp.stack([z, -z], axis=-1))
    for z in (bounded(jnp.where(valid, z, 0.0)) / scale for z in (student, teacher))
  )
  return jnp.square(scale) * jnp.sum(jnp.where(valid, kl(log_p, log_q), 0.0), axis=-1)


def _known(logits: Any, labels: Any, where: Any) -> tuple[Array, Array, Array]:
  """Logits and labels in one dtype, 0 where they are not known, and where they are."""
  if np.shape(labels) != np.shape(logits):
    raise ValueError(
      f"labels must have the logits' shape {np.shape(logits)}, one of 0 or 1 for each label, got "
      f"{np.shape(labels)}."
    )
  (z,) = float_arrays(logits)
  valid = counted(where, z.shape)
  # Before anything is computed: a value that is masked only later can still leak NaN.
  y = jnp.where(valid, jnp.asarray(labels).astype(z.dtype), 0.0)
  return bounded(jnp.where(valid, z, 0.0)), y, valid
