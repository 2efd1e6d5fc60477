"""Losses on how examples lie beside each other in the batch: one value per example.

Student first, teacher second; each ``[B, D]``, or any ``[B, ...]`` whose axes are then flattened.
Where only distances or angles within each network are compared, the two widths may differ. Inputs
are computed in float32 (float64 stays float64) and no gradient is ever stopped: freezing the
teacher is the business of the teacher's forward pass.

``where`` ``[B]`` says which examples take part (not 0); the others are in no pair, may hold
anything and have the value 0. All of these depend on who is in the batch: under ``pmap`` or
gradient accumulation that is the device's share or the micro-batch.

`contrastive` and `contrastive_bank` compare student with teacher directly: a student's example
against the teacher's others, within the batch or in a bank of every example that has been seen.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jaxdistill import _check
from jaxdistill.losses._log_space import MASKED, AnyArray, Scalar, absolute
from jaxdistill.losses._maps import (
  Features,
  Mask,
  huber,
  norm,
  product,
  rows,
  same_width,
  tame,
  unit,
)

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
# The published code's guard against a norm, and the logarithm of a probability, of 0.
PKT_EPSILON = 1e-7
# Steps in which the batch is streamed: fewer are faster on an accelerator and take more memory.
STEPS = 32


def similarity_preserving(
  student: Features, teacher: Features, *, where: Mask = None
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
    # [B, B]: whom example i resembles, in a row of norm 1.
    return unit(product("id,jd->ij", x, x))

  return _mean(jnp.square(similarities(student) - similarities(teacher)), valid)


def relational_distance(
  student: Features, teacher: Features, *, where: Mask = None
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
    # By their mean, so that a network of longer features is not farther from the other one.
    mean = jnp.sum(lengths) / jnp.maximum(count, 1)
    return lengths / jnp.where(count > 0, mean, 1.0)

  return _mean(huber(distances(student) - distances(teacher)), valid)


def relational_angle(
  student: Features, teacher: Features, *, where: Mask = None
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
    # Unit vectors from this example to all others, [B, D]; to itself it is 0, an angle with nobody.
    directions = jnp.where(valid[:, None], unit(x - anchor[None]), 0.0)
    return product("jd,kd->jk", directions, directions)

  def total(student_anchor: Array, teacher_anchor: Array) -> Array:
    return jnp.sum(huber(cosines(student, student_anchor) - cosines(teacher, teacher_anchor)))

  # One [B, B] of cosines at a time, in place of the [B, B, B] of all corners.
  totals = _stream(total, student, teacher)
  return jnp.where(valid, totals / jnp.maximum(count, 1) ** 2, 0.0)


def probabilistic_transfer(
  student: Features, teacher: Features, *, where: Mask = None
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
  student: Features, teacher: Features, *, where: Mask = None
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
  # [B − 1]: the errors of an example and of the next one, which the loss wants apart.
  size = absolute(student - teacher)
  values = jnp.sum(size[:-1] * size[1:], axis=1)
  return jnp.where(valid[:-1] & valid[1:], values, 0.0)


def _stream(function: Callable[..., Array], *anchors: Array) -> Array:
  """Maps a function over examples, a few at a time, forwards and backwards."""
  # The largest number of examples at once that divides the batch into about STEPS steps.
  size = len(anchors[0])
  few = max(n for n in range(1, max(size // STEPS, 1) + 1) if size % n == 0)
  # Computed again on the way back; a scan would otherwise stack what every step has held.
  step = jax.checkpoint(lambda each: function(*each))
  return jax.lax.map(step, anchors, batch_size=few)


def _mean(pairs: Array, valid: Array) -> Array:
  """Mean over the valid j of ``[B, B]`` pairs ij; 0 where i is not valid."""
  # Over the examples that take part, the example itself included, as the published codes have it.
  both = valid[:, None] & valid[None, :]
  count = jnp.maximum(jnp.sum(valid), 1).astype(pairs.dtype)
  return jnp.sum(jnp.where(both, pairs, 0.0), axis=1) / count


# The published code's guard in its denominators.
CRD_EPSILON = 1e-7


class Banks(NamedTuple):
  """Memory banks (CRD): an embedding of every training example by each network.

  A pytree of arrays, to be carried, checkpointed and sharded like any state; `init_banks` makes it.

  Attributes:
    student: ``[N, D]``, unit rows; float32 from `init_banks`, whatever the networks' dtype.
    teacher: ``[N, D]``, unit rows of the same dtype.
    labels: ``[N]`` int32, the classes of the examples, from which negatives are chosen.
    log_normalizers: ``[2]`` float32, logarithms of the normalisers Z of the student's scores
      (against the teacher's bank) and of the teacher's (against the student's); 0 until they are
      set.
    normalized: ``[]`` bool, whether they have been set, which the first batch does.

  Source: Tian, Krishnan, Isola, "Contrastive Representation Distillation", 2020.

  Other codes: here they are a value, carried like any state; in RepDistiller they are buffers of a
  module, without the classes, since its data loader draws the negatives.

  >>> init_banks(jax.random.key(0), jnp.array([0, 1, 0]), 2).student.shape
  (3, 2)
  """

  student: Any
  teacher: Any
  labels: Any
  log_normalizers: Any
  normalized: Any


def init_banks(key: Any, labels: Integer[AnyArray, " N"], width: int) -> Banks:
  """Memory banks (CRD) before the first batch: random unit rows.

  Both banks ``[len(labels), width]``: uniform in ±√(3 / width), then each row divided by its norm.

  Args:
    key: a random key.
    labels: ``[N]``, the class of every training example, in the order of its index. Distinct
      numbers (``arange(N)``) make every other example a negative.
    width: D, of the embeddings; 128 in the published code.

  Returns:
    The banks, with no normalisers yet.

  Raises:
    ValueError: ``width`` is not positive.

  Source: Tian, Krishnan, Isola, "Contrastive Representation Distillation", 2020.

  Other codes: rows are of norm 1 here; RepDistiller leaves them as they are drawn, which is 1 on
  average.

  >>> banks = init_banks(jax.random.key(0), jnp.array([0, 1, 0]), 2)
  >>> jnp.linalg.norm(banks.teacher, axis=1).round(3).tolist(), banks.normalized.item()
  ([1.0, 1.0, 1.0], False)
  """
  _check.number("width", width, above=0)
  # A uniform number within ±bound has the variance bound² / 3 = 1 / width: rows near norm 1.
  bound = math.sqrt(3 / width)
  student, teacher = (
    unit(jax.random.uniform(each, (len(labels), width), jnp.float32, -bound, bound))
    for each in jax.random.split(key)
  )
  return Banks(
    student=student,
    teacher=teacher,
    labels=jnp.asarray(labels, jnp.int32),
    log_normalizers=jnp.zeros(2, jnp.float32),
    normalized=jnp.zeros((), bool),
  )


def contrastive(
  student: Features, teacher: Features, *, temperature: Scalar = 0.07, where: Mask = None
) -> Float[Array, " B"]:
  """Contrastive distillation within the batch (InfoNCE), both ways round.

  ½ (−log softmax_j(s_i·t_j / temperature) − log softmax_j(t_i·s_j / temperature)), both at j = i,
  s_i = n(student_i), t_i = n(teacher_i), n(v) = v / max(‖v‖, 1e-12).

  Args:
    student: ``[B, ...]``, flattened; embedded in the teacher's width.
    teacher: ``[B, ...]``, flattened to the same width.
    temperature: > 0. 0.07 is CRD's and MoCo's.
    where: ``[B]``, which examples take part (not 0); the others are nobody's negatives, may hold
      anything and have the value 0. None is all.

  Returns:
    ``[B]``, in nats; 0 for a batch of one. It is not 0 at equality, and depends on who is in the
    batch: under ``pmap`` or gradient accumulation that is the device's share or the micro-batch.

  Raises:
    ValueError: the widths differ, or ``temperature`` is not positive.

  Source: van den Oord, Li, Vinyals, "Representation Learning with Contrastive Predictive Coding",
  2018.

  Other codes: here are both directions, as in CLIP; the paper and MoCo have one of them. CRD is
  `contrastive_bank`.

  >>> values = contrastive(jnp.eye(2), jnp.eye(2), temperature=1.0)
  >>> [round(value, 4) for value in values.tolist()]  # log(1 + exp(-1))
  [0.3133, 0.3133]
  """
  _check.number("temperature", temperature, above=0)
  same_width(student, teacher)
  student, teacher, valid = rows(student, teacher, where)
  same_width(student, teacher)
  # [B, B] cosines: the diagonal is each example with itself, everything else its negatives.
  scores = product("id,jd->ij", unit(student), unit(teacher))
  scores = scores / jnp.asarray(temperature, scores.dtype)
  # Forth: find your teacher among all teachers (a row). Back: find your student (a column).
  forth = jax.nn.log_softmax(jnp.where(valid[None, :], scores, MASKED), axis=1)
  back = jax.nn.log_softmax(jnp.where(valid[:, None], scores, MASKED), axis=0)
  return jnp.where(valid, -0.5 * (jnp.diagonal(forth) + jnp.diagonal(back)), 0.0)


def contrastive_bank(
  student: Float[AnyArray, "B D"],
  teacher: Float[AnyArray, "B E"],
  labels: Integer[AnyArray, " B"],
  index: Integer[AnyArray, " B"],
  banks: Banks,
  *,
  key: Any,
  negatives: int = 16384,
  temperature: Scalar = 0.07,
  momentum: Scalar = 0.5,
  where: Mask = None,
) -> tuple[Float[Array, " B"], Banks]:
  """Contrastive representation distillation (CRD), against banks of all training examples.

  Σ over two sides of [log((P₊ + c) / P₊) + Σ over negatives of log((P₋ + c) / (m/N))],
  m = negatives, N = the banks' rows, c = m/N + 1e-7, P = exp(v·row / temperature) / Z.
  One side has v = n(student_i) and the teacher's bank, the other v = n(teacher_i) and the
  student's, n(v) = v / max(‖v‖, 1e-12). P₊ is of the bank's row index_i, P₋ of m rows of
  classes other than labels_i, the same rows for both sides.

  Z is set by the first batch, for each side, and then kept in the banks: N · the mean of exp(v·row
  / temperature) over the examples and over their 1 + m rows, own and negatives. Rows are those of
  ``banks`` as given: they are updated after scoring.

  Args:
    student: ``[B, D]``, embeddings as wide as the banks (a projector's; both are trained).
    teacher: ``[B, D]``, the teacher's embeddings of the same examples.
    labels: ``[B]``, the examples' classes.
    index: ``[B]``, which rows of the banks the examples are; no two of one batch the same.
    banks: from `init_banks`, or from the call before. Under ``pmap`` each device would remember its
      own share only: use ``jit``.
    key: a random key. An example's draw depends on it and on the example's index alone.
    negatives: m, drawn without replacement from the examples of other classes; where there are
      fewer, all of them, each counted m / (their number) times, in the sum and in Z's mean; where
      there is none, the second sum is 0. 16384 is the paper's.
    temperature: > 0. 0.07 is the published code's.
    momentum: how much of a row is kept at an update, in [0, 1]. 0.5 is the published code's.
    where: ``[B]``, which examples take part (not 0); the others may hold anything, have the value
      0, and change neither rows nor normalisers. None is all.

  Returns:
    (values ``[B]``, banks). After scoring, row index_i of each bank becomes n(momentum · row +
    (1 − momentum) · v), v its own network's; no gradient passes through banks or normalisers.

  Raises:
    ValueError: the widths differ, or a number is out of its range.

  Source: Tian, Krishnan, Isola, "Contrastive Representation Distillation", 2020.

  Other codes: this, as the mean over the batch, is RepDistiller's number (its weight is 0.8); there
  the data loader draws the negatives. mdistiller's copy loses updates of the banks on all devices
  but the first, torchdistill's fails unless the negatives are passed in.

  >>> banks = init_banks(jax.random.key(0), jnp.array([0, 1, 0]), 2)
  >>> values, banks = contrastive_bank(
  ...     jnp.eye(2), jnp.eye(2), jnp.array([0, 1]), jnp.array([2, 1]), banks,
  ...     key=jax.random.key(1), negatives=2)
  >>> values.shape, banks.normalized.item()
  ((2,), True)
  """
  _check.number("negatives", negatives, above=0)
  _check.number("temperature", temperature, above=0)
  _check.number("momentum", momentum, least=0, most=1)
  same_width(student, teacher)
  for bank in ("student", "teacher"):
    same_width(student, getattr(banks, bank), ("student", f"banks.{bank}"))
  student, teacher, valid = rows(student, teacher, where)
  student, teacher = unit(student), unit(teacher)
  # A bank is state: what was seen before, not what is being trained.
  banks = jax.tree.map(lambda x: jax.lax.stop_gradient(jnp.asarray(x)), banks)
  # An excluded example may have any index, and a gather out of range would be clamped in silence.
  index = jnp.where(valid, jnp.asarray(index, jnp.int32), 0)
  drawn = _draw(key, jnp.asarray(labels, jnp.int32), index, banks.labels, negatives)

  def score(vectors: Array, bank: Array) -> tuple[Array, Array]:
    bank, scale = bank.astype(vectors.dtype), jnp.asarray(temperature, vectors.dtype)
    # One product with the whole bank: gathering rows instead would hold [B, negatives, D].
    everyone = product("bd,nd->bn", vectors, bank) / scale
    return everyone, product("bd,bd->b", vectors, bank[index]) / scale

  # Each network's embedding against the other's memory: [B, N] scores, and [B] of its own row.
  sides = [score(student, banks.teacher), score(teacher, banks.student)]
  fresh = jnp.stack([_log_normalizer(*side, drawn, valid, negatives) for side in sides])
  # NCE's Z would be a sum over the data set at every step. The published code estimates it once,
  # on the first batch, and keeps it; a batch that is all padding cannot be that one.
  keep = banks.normalized | ~jnp.any(valid)
  log_z = jnp.where(keep, banks.log_normalizers, fresh.astype(banks.log_normalizers.dtype))
  # Both sides are added up: an example against its true pair, and against what was drawn.
  values = jnp.zeros_like(student[:, 0])
  for (scores, own), z in zip(sides, log_z.astype(values.dtype), strict=True):
    values = values + _noise_contrast(scores - z, own - z, drawn, negatives)
  banks = banks._replace(
    student=_remember(banks.student, student, index, valid, momentum),
    teacher=_remember(banks.teacher, teacher, index, valid, momentum),
    log_normalizers=log_z,
    normalized=banks.normalized | jnp.any(valid),
  )
  return jnp.where(valid, values, 0.0), banks


def _draw(key: Any, labels: Array, index: Array, bank_labels: Array, negatives: int) -> Array:
  """Which rows ``[B, N]`` are the negatives: of other classes, all of them if they are too few."""

  def negatives_of(label: Array, index: Array) -> Array:
    # The largest of independent random numbers are a sample without replacement.
    bits = jax.random.bits(jax.random.fold_in(key, index), bank_labels.shape, jnp.uint32)
    other = bank_labels != label
    ranked = jnp.where(other, (bits >> 1).astype(jnp.int32), -1)
    last = jnp.sort(ranked)[max(len(bank_labels) - negatives, 0)]
    return other & (ranked >= last)

  return jax.vmap(negatives_of)(labels, index)


def _repeats(drawn: Array, negatives: int, dtype: Any) -> Array:
  """How often each drawn row counts ``[B]``, so that they are as many as was asked for."""
  return negatives / jnp.maximum(jnp.sum(drawn, axis=1), 1).astype(dtype)


def _log_normalizer(scores: Array, own: Array, drawn: Array, valid: Array, negatives: int) -> Array:
  """Logarithm of N · mean exp(score) over the valid examples' own rows and negatives."""
  scores, own = jax.lax.stop_gradient((scores, own))
  others = jax.nn.logsumexp(jnp.where(drawn, scores, MASKED), axis=1)
  others = others + jnp.log(_repeats(drawn, negatives, scores.dtype))
  total = jax.nn.logsumexp(jnp.where(valid, jnp.logaddexp(own, others), MASKED))
  each = jnp.where(jnp.any(drawn, axis=1), 1.0 + negatives, 1.0)
  count = jnp.sum(jnp.where(valid, each, 0.0)).astype(scores.dtype)
  return total - jnp.log(jnp.maximum(count, 1)) + math.log(scores.shape[1])


# Its parts are as large as the scores, and cheaper to compute again than to keep.
@functools.partial(jax.checkpoint, static_argnums=3)
def _noise_contrast(log_p: Array, log_own: Array, drawn: Array, negatives: int) -> Array:
  """One side of CRD per example, from log P of all rows and of its own."""
  share = negatives / log_p.shape[1]
  # In log space, and as log(1 + x): thousands of terms near 0 are summed. ``share`` is m/N, what a
  # score of pure noise would be.
  own = jax.nn.softplus(math.log(share + CRD_EPSILON) - log_own)
  terms = jax.nn.softplus(jnp.logaddexp(log_p, math.log(CRD_EPSILON)) - math.log(share))
  others = jnp.sum(jnp.where(drawn, terms, 0.0), axis=1)
  return own + _repeats(drawn, negatives, log_p.dtype) * others


def _remember(bank: Array, vectors: Array, index: Array, valid: Array, momentum: Scalar) -> Array:
  """The bank with the valid examples' rows moved towards their vectors."""
  # A slow average, so that rows from a few epochs ago still fit those of today.
  old = bank[index]
  keep = jnp.asarray(momentum, bank.dtype)
  mixed = keep * old + (1 - keep) * jax.lax.stop_gradient(vectors).astype(bank.dtype)
  # Opposite vectors leave a rounding, and a rounding's direction means nothing.
  mixed = jnp.where(norm(mixed, -1) > 1e-6, unit(mixed), old)
  return bank.at[jnp.where(valid, index, len(bank))].set(mixed, mode="drop")
