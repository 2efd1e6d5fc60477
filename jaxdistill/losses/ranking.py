"""Losses on scores of pairs (retrieval, image and text): which goes with which, and by how much.

`margin_mse` takes the scores themselves, `affinity` the embeddings of two towers, whose products
they are. Scores of a query's candidates ``[..., N]`` are logits: ``soft_target_kl`` of them is the
listwise loss, with −inf where there is no candidate.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdistill import _check
from jaxdistill.losses._log_space import (
  MASKED,
  AnyArray,
  PerExample,
  Scalar,
  counted,
  float_arrays,
  kl,
)
from jaxdistill.losses._maps import Mask, product, unit

__all__ = ["affinity", "margin_mse"]

Embeddings = Float[AnyArray, "B _"]


def margin_mse(
  student_scores: Float[AnyArray, "*batch N"], teacher_scores: Float[AnyArray, "*batch N"]
) -> PerExample:
  """Margin MSE (MarginMSE of ranking): by how much the right one is ahead.

  mean_j ((s_0 − s_j) − (t_0 − t_j))² over j ≥ 1, s = student_scores, t = teacher_scores, the right
  candidate's first.

  A shift of all of a query's scores does not count, their scale does.

  Args:
    student_scores: ``[..., N]`` of a query's candidates, the relevant one first; N ≥ 2.
    teacher_scores: ``[..., N]`` of the same.

  Returns:
    ``[...]``.

  Raises:
    ValueError: the shapes differ, or there is but one candidate.

  Source: Hofstätter, Althammer, Schröder, Sertkan, Hanbury, "Improving Efficient Neural Ranking
  Models with Cross-Architecture Knowledge Distillation", 2020.

  Other codes: this, at N = 2 and as the mean over the batch, is the published code's and Sentence
  Transformers'; the paper's teacher is the mean of three networks' scores.

  >>> margin_mse(jnp.array([[3.0, 1.0]]), jnp.array([[9.0, 8.0]])).tolist()
  [1.0]
  """
  shapes = np.shape(student_scores), np.shape(teacher_scores)
  if shapes[0] != shapes[1] or shapes[0][-1] < 2:
    raise ValueError(
      f"student_scores {shapes[0]} and teacher_scores {shapes[1]} must have one shape [..., N], "
      "the relevant candidate's score first and at least one other."
    )
  student, teacher = float_arrays(student_scores, teacher_scores)
  # Before the difference of networks that of scores: theirs may lie far from ours.
  ours, theirs = (scores[..., :1] - scores[..., 1:] for scores in (student, teacher))
  return jnp.mean(jnp.square(ours - theirs), axis=-1)


def affinity(
  student_images: Embeddings,
  student_texts: Embeddings,
  teacher_images: Embeddings,
  teacher_texts: Embeddings,
  *,
  student_temperature: Scalar = 0.07,
  teacher_temperature: Scalar = 0.01,
  where: Mask = None,
) -> Float[Array, " B"]:
  """Affinity of two towers (CLIP-KD's CRD, TinyCLIP): which image goes with which text.

  ½ KL(P_i ‖ Q_i) + ½ KL(P'_i ‖ Q'_i), Q_ij = softmax_j(x_i·y_j / student_temperature),
  Q'_ij = softmax_j(y_i·x_j / student_temperature), x_i = n(student_images_i),
  y_i = n(student_texts_i), P and P' likewise of teacher_images, teacher_texts and
  teacher_temperature, n(v) = v / max(‖v‖, 1e-12), KL(a ‖ b) = Σ_j a_j log(a_j / b_j).

  The two networks' embeddings may be of different widths. The towers need not be of images and
  texts: queries and documents will do.

  Args:
    student_images: ``[B, D]``, one tower's.
    student_texts: ``[B, D]``, the other tower's, of the same examples.
    teacher_images: ``[B, E]``.
    teacher_texts: ``[B, E]``.
    student_temperature: > 0; one over CLIP's logit scale, which is learned. 0.07 is CLIP's at the
      start.
    teacher_temperature: > 0. 0.01 is trained CLIP's.
    where: ``[B]``, which examples take part (not 0); the others are nobody's pair, may hold
      anything and have the value 0. None is all.

  Returns:
    ``[B]``, in nats; 0 for a batch of one. It depends on who is in the batch: under ``pmap`` or
    gradient accumulation that is the device's share or the micro-batch.

  Raises:
    ValueError: embeddings of one network have different shapes, the networks have different
      examples, or a temperature is not positive.

  Source: Yang, An, Huang, Bi, Yu, Yang, Diao, Xu, "CLIP-KD: An Empirical Study of CLIP Model
  Distillation", 2024.

  Other codes: this, as the mean over the batch, is CLIP-KD's CRD (not `contrastive_bank`'s);
  TinyCLIP has the cross-entropy, of the same gradient.

  >>> eye = jnp.eye(2)
  >>> affinity(eye, eye, eye, eye, student_temperature=0.01).tolist()
  [0.0, 0.0]
  """
  _check.number("student_temperature", student_temperature, above=0)
  _check.number("teacher_temperature", teacher_temperature, above=0)
  shapes = [np.shape(x) for x in (student_images, student_texts, teacher_images, teacher_texts)]
  if shapes[0] != shapes[1] or shapes[2] != shapes[3] or shapes[0][0] != shapes[2][0]:
    raise ValueError(
      f"student_images {shapes[0]} and student_texts {shapes[1]} must have one shape [B, D], "
      f"teacher_images {shapes[2]} and teacher_texts {shapes[3]} one shape [B, E]."
    )
  towers = float_arrays(student_images, student_texts, teacher_images, teacher_texts)
  valid = counted(where, shapes[0][:1])
  a, b, c, d = (unit(jnp.where(valid[:, None], x, 0.0)) for x in towers)
  values = [
    kl(log_p, log_q)
    for log_p, log_q in zip(
      _both_ways(c, d, valid, teacher_temperature),
      _both_ways(a, b, valid, student_temperature),
      strict=True,
    )
  ]
  return jnp.where(valid, 0.5 * (values[0] + values[1]), 0.0)


def _both_ways(a: Array, b: Array, valid: Array, temperature: Any) -> list[Array]:
  """Log-probabilities ``[B, B]`` of each one's partner, from either tower."""
  scores = product("id,jd->ij", a, b) / jnp.asarray(temperature, a.dtype)
  return [jax.nn.log_softmax(jnp.where(valid[None], x, MASKED), -1) for x in (scores, scores.T)]
