"""Losses on how examples lie beside each other in the batch: one value per example.

Student first, teacher second; each ``[B, D]``, or any ``[B, ...]`` whose axes are then flattened.
Where only distances or angles within each network are compared, the two widths may differ. Inputs
are computed in float32 (float64 stays float64) and no gradient is ever stopped: freezing the
teacher is the business of the teacher's forward pass.

``where`` ``[B]`` says which examples take part (not 0); the others are in no pair, may hold
anything and have the value 0. All of these depend on who is in the batch: under ``pmap`` or
gradient accumulation that is the device's share or the micro-batch.

The losses that compare student with teacher directly, `contrastive` and `contrastive_bank`, are
written in `contrast`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxdistill.losses._log_space import AnyArray, absolute
from jaxdistill.losses._maps import huber, norm, product, rows, same_width, tame, unit
from jaxdistill.losses.contrast import Banks, contrastive, contrastive_bank, init_banks

__all__ = [
  "Banks",
  "contrastive",
  "contrastive_bank",
  "correlation_congruence",
  "init_banks",
  "probabilistic_transfer",
  "relational_angle",
  "relational_distance",
  "similarity_preserving",
]

# The published code's floor under distances; it keeps their gradient finite at equal rows.
SMALLEST_DISTANCE = 1e-6
PKT_EPSILON = 1e-7
# Steps in which the batch is streamed: fewer are faster on an accelerator and take more memory.
STEPS = 32


def similarity_preserving(
  student: Float[AnyArray, "B ..."],
  teacher: Float[AnyArray, "B ..."],
  *,
  where: Shaped[AnyArray, " B"] | None = None,
) -> Float[Array, " B"]:
  """Similarity-preserving distillation (SP, SPKD): which examples excite the same units.

  mean_j (G_student − G_teacher)²_ij, G = f fᵀ, ``[B, B]``, each row divided by
  max(its Euclidean norm, 1e-12), f = student or teacher flattened to ``[B, D]``.

  Args:
    student: ``[B, ...]``, the last map or a vector; its width need not be the teacher's.
    teacher: ``[B, ...]``.
    where: ``[B]``, which examples take part (not 0); the others are in no pair and no mean, may
      hold anything and have the value 0. None is all.

  Returns:
    ``[B]``, one value for each i.

  Source: Tung, Mori, "Similarity-Preserving Knowledge Distillation", 2019.

  Other codes: this is RepDistiller's and mdistiller's, and the paper's ‖·‖²_F / B²; torchdistill
  passes the normalisation's axis as its power, and so divides rows by their L1 norm.

  >>> values = similarity_preserving(jnp.eye(2), jnp.ones((2, 1)))
  >>> [round(value, 4) for value in values.tolist()]  # ((1 − 1/√2)² + 1/2) / 2
  [0.2929, 0.2929]
  """
  student, teacher, valid = rows(student, teacher, where)

  def similarities(x: Array) -> Array:
    # A scale of all examples cancels in the rows' norms.
    x = tame(x, (0, 1))
    return unit(product("id,jd->ij", x, x))

  return _mean(jnp.square(similarities(student) - similarities(teacher)), valid)


def relational_distance(
  student: Float[AnyArray, "B ..."],
  teacher: Float[AnyArray, "B ..."],
  *,
  where: Shaped[AnyArray, " B"] | None = None,
) -> Float[Array, " B"]:
  """Relational knowledge distillation by distance (RKD-D).

  mean_j Huber(d_student − d_teacher)_ij, over all j, i included;
  d_ij = max(‖f_i − f_j‖, 1e-6) over its mean over all pairs i ≠ j, d_ii = 0,
  f = student or teacher flattened to ``[B, D]``; Huber(x) = ½x² up to |x| = 1 and |x| − ½ beyond.

  Args:
    student: ``[B, ...]``; its width need not be the teacher's.
    teacher: ``[B, ...]``.
    where: ``[B]``, which examples take part (not 0); the others are in no pair and no mean, may
      hold anything and have the value 0. None is all.

  Returns:
    ``[B]``, one value for each i.

  Source: Park, Kim, Lu, Cho, "Relational Knowledge Distillation", 2019.

  Other codes: this is RepDistiller's, mdistiller's and torchdistill's: the mean is over all B²
  pairs, the diagonal included, and equal rows, 1e-6 apart, are a positive pair in the mean distance
  too. KD_Lib has 1e-7 added to that mean and 1e-10 as the floor.

  >>> student, teacher = jnp.array([[0.0], [1.0], [2.0]]), jnp.array([[0.0], [1.0], [1.0]])
  >>> [round(value, 4) for value in relational_distance(student, teacher).tolist()]
  [0.0937, 0.1875, 0.0937]
  """
  student, teacher, valid = rows(student, teacher, where)
  others = valid[:, None] & valid[None, :] & ~jnp.eye(len(valid), dtype=bool)
  count = jnp.sum(others).astype(student.dtype)

  def distances(x: Array) -> Array:
    x = tame(x, (0, 1))
    # By differences: the product of Gram matrices would lose small distances in rounding.
    lengths = _stream(lambda anchor: norm(x - anchor[None], -1, SMALLEST_DISTANCE)[:, 0], x)
    lengths = jnp.where(others, lengths, 0.0)
    mean = jnp.sum(lengths) / jnp.maximum(count, 1)
    return lengths / jnp.where(count > 0, mean, 1.0)

  return _mean(huber(distances(student) - distances(teacher)), valid)


def relational_angle(
  student: Float[AnyArray, "B ..."],
  teacher: Float[AnyArray, "B ..."],
  *,
  where: Shaped[AnyArray, " B"] | None = None,
) -> Float[Array, " B"]:
  """Relational knowledge distillation by angle (RKD-A).

  mean_jk Huber(c_student − c_teacher)_ijk, over all j and k,
  c_ijk = n(f_j − f_i)·n(f_k − f_i), the cosine at example i between j and k,
  f = student or teacher flattened to ``[B, D]``, n(v) = v / max(‖v‖, 1e-12),
  Huber(x) = ½x² up to |x| = 1 and |x| − ½ beyond.

  Args:
    student: ``[B, ...]``; its width need not be the teacher's.
    teacher: ``[B, ...]``.
    where: ``[B]``, which examples take part (not 0); the others are in no pair and no mean, may
      hold anything and have the value 0. None is all.

  Returns:
    ``[B]``, one value for each i. Streamed over i, forwards and backwards, so that neither
    ``[B, B, D]`` nor ``[B, B, B]`` is held.

  Source: Park, Kim, Lu, Cho, "Relational Knowledge Distillation", 2019.

  Other codes: this is RepDistiller's, mdistiller's and torchdistill's: the mean is over all B³
  triples, those with equal corners included.

  >>> student = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
  >>> teacher = jnp.array([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
  >>> [round(value, 4) for value in relational_angle(student, teacher).tolist()]
  [0.1111, 0.1111, 0.1111]
  """
  student, teacher, valid = rows(student, teacher, where)
  student, teacher = tame(student, (0, 1)), tame(teacher, (0, 1))
  count = jnp.sum(valid).astype(student.dtype)

  def cosines(x: Array, anchor: Array) -> Array:
    directions = jnp.where(valid[:, None], unit(x - anchor[None]), 0.0)
    return product("jd,kd->jk", directions, directions)

  def total(student_anchor: Array, teacher_anchor: Array) -> Array:
    return jnp.sum(huber(cosines(student, student_anchor) - cosines(teacher, teacher_anchor)))

  totals = _stream(total, student, teacher)
  return jnp.where(valid, totals / jnp.maximum(count, 1) ** 2, 0.0)


def probabilistic_transfer(
  student: Float[AnyArray, "B ..."],
  teacher: Float[AnyArray, "B ..."],
  *,
  where: Shaped[AnyArray, " B"] | None = None,
) -> Float[Array, " B"]:
  """Probabilistic knowledge transfer (PKT): whom each example would pick as a neighbour.

  mean_j P_teacher log((P_teacher + ε) / (P_student + ε))_ij, over all j, i included, ε = 1e-7,
  P_ij = S_ij / Σ_j S_ij, S_ij = (u_i·u_j + 1) / 2, u_i = f_i / (‖f_i‖ + 1e-7),
  f = student or teacher flattened to ``[B, D]``.

  Args:
    student: ``[B, ...]``; its width need not be the teacher's.
    teacher: ``[B, ...]``.
    where: ``[B]``, which examples take part (not 0); the others are in no pair and no mean, may
      hold anything and have the value 0. None is all.

  Returns:
    ``[B]``, in nats, one value for each i: about 1/B of a divergence.

  Source: Passalis, Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer",
  2018.

  Other codes: this is RepDistiller's, mdistiller's and torchdistill's, with the mean over all B²
  pairs, the diagonal included, which RepDistiller's weight of 30 000 makes up for.

  >>> student, teacher = jnp.eye(2), jnp.array([[1.0], [1.0]])
  >>> [round(value, 4) for value in probabilistic_transfer(student, teacher).tolist()]
  [0.0294, 0.0294]
  """
  student, teacher, valid = rows(student, teacher, where)
  both = valid[:, None] & valid[None, :]

  def probabilities(x: Array) -> Array:
    x = tame(x, -1)
    x = x / (norm(x, -1) + PKT_EPSILON)
    # Rounding can take a cosine below −1, and the logarithm below then takes less than 0.
    near = jnp.maximum((product("id,jd->ij", x, x) + 1) / 2, 0.0)
    near = jnp.where(both, near, 0.0)
    return near / jnp.where(valid[:, None], jnp.sum(near, axis=1, keepdims=True), 1.0)

  q, p = probabilities(student), probabilities(teacher)
  return _mean(p * jnp.log((p + PKT_EPSILON) / (q + PKT_EPSILON)), valid)


def correlation_congruence(
  student: Float[AnyArray, "B ..."],
  teacher: Float[AnyArray, "B ..."],
  *,
  where: Shaped[AnyArray, " B"] | None = None,
) -> Float[Array, " pairs"]:
  """Correlation congruence (CC): neighbours' errors. One value per consecutive **pair**.

  Σ_d |Δ_i|·|Δ_{i+1}|, Δ = student − teacher flattened to ``[B, D]``.

  Args:
    student: ``[B, ...]``, embedded in the teacher's width (RepDistiller trains a linear map to 128
      for each network).
    teacher: ``[B, ...]``.
    where: ``[B]``, which examples take part; a pair with one that does not is 0. None is all.

  Returns:
    ``[B − 1]``, empty for a batch of one. It depends on the order of the batch.

  Raises:
    ValueError: the widths differ.

  Source: Peng, Jin, Liu, Li, Wu, Liu, Zhou, Zhang, "Correlation Congruence for Knowledge
  Distillation", 2019.

  Other codes: this is RepDistiller's formula, and its number is the mean of these values.
  torchdistill has another function under this name, the paper's: it compares matrices of kernels
  between examples.

  >>> correlation_congruence(jnp.array([[1.0], [2.0], [3.0]]), jnp.zeros((3, 1))).tolist()
  [2.0, 6.0]
  """
  same_width(student, teacher)
  student, teacher, valid = rows(student, teacher, where)
  same_width(student, teacher)
  size = absolute(student - teacher)
  values = jnp.sum(size[:-1] * size[1:], axis=1)
  return jnp.where(valid[:-1] & valid[1:], values, 0.0)


def _stream(function: Callable[..., Array], *anchors: Array) -> Array:
  """Maps a function over examples, a few at a time, forwards and backwards."""
  size = len(anchors[0])
  few = max(n for n in range(1, max(size // STEPS, 1) + 1) if size % n == 0)
  # Computed again on the way back; a scan would otherwise stack what every step has held.
  step = jax.checkpoint(lambda each: function(*each))
  return jax.lax.map(step, anchors, batch_size=few)


def _mean(pairs: Array, valid: Array) -> Array:
  """Mean over the valid j of ``[B, B]`` pairs ij; 0 where i is not valid."""
  both = valid[:, None] & valid[None, :]
  count = jnp.maximum(jnp.sum(valid), 1).astype(pairs.dtype)
  return jnp.sum(jnp.where(both, pairs, 0.0), axis=1) / count
