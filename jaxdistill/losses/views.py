"""Losses on several looks at one image: its regions (SDD) and its augmentations (CRLD).

Logits of regions come from maps of logits ``[B, H, W, K]``: where a network ends in a mean over
positions and a linear map, the two may change places, and the mean of the map is the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from jaxdistill import _check
from jaxdistill.losses._log_space import AnyArray, Logits, PerExample, Scalar, float_arrays, pair
from jaxdistill.losses.logits import soft_target_kl
from jaxdistill.losses.pooling import average_pool

__all__ = ["cross_view_kd", "region_logits", "region_weight", "scale_decoupled_kd"]

# Logits of N regions of each example, of the whole image first.
Regions = Float[AnyArray, "*batch N K"]


def region_logits(
  logit_map: Float[AnyArray, "B H W K"], *, scales: Sequence[int] = (1, 2)
) -> Float[Array, "B N K"]:
  """Logits of regions (for SDD): of the whole image, of its quarters, and so on.

  mean of logit_map over each cell of an r × r grid, r in scales: N = Σ r² of them, scale by scale,
  row by row.

  Args:
    logit_map: ``[B, H, W, K]``, the classifier's logits at each position.
    scales: sides of the grids, 1 (the whole image) first. (1, 2) is the published code's for
      same-style pairs; it has (1, 2, 4) too.

  Returns:
    ``[B, N, K]``, float32 (or float64).

  Raises:
    ValueError: it is no map, or ``scales`` do not begin with 1.
    TypeError: a scale is no integer.

  Source: Wei, Luo, Luo, "Scaled Decoupled Distillation", 2024.

  Other codes: the published code pools features to 4 × 4 first and larger regions from that, which
  for a 7 × 7 map, whose windows overlap, is not the mean of the region; this one pools the map.

  >>> region_logits(jnp.arange(4.0).reshape(1, 2, 2, 1))[0, :, 0].tolist()
  [1.5, 0.0, 1.0, 2.0, 3.0]
  """
  if np.ndim(logit_map) != 4:
    raise ValueError(f"logit_map {np.shape(logit_map)} must be a map of logits [B, H, W, K].")
  if not scales or scales[0] != 1:
    raise ValueError(f"scales={tuple(scales)} must begin with 1, the whole image.")
  (whole,) = float_arrays(logit_map)
  sides = [_check.whole("scales", scale) for scale in scales]
  cells = [average_pool(whole, side, side) for side in sides]
  return jnp.concatenate([x.reshape(x.shape[0], -1, x.shape[-1]) for x in cells], axis=1)


def region_weight(
  teacher_regions: Regions, labels: Integer[AnyArray, "*batch"]
) -> Float[Array, "*batch N"]:
  """Weights of regions (for SDD): 2 where the teacher is right of the one and wrong of the whole.

  1 + [r_n ≠ r_0], r_n = 1 where the largest of teacher_regions_n is at labels, else 0;
  [·] is 1 where what it holds is true.

  They multiply the values of any loss of the regions, whose mean over N is the example's:
  ``jnp.mean(weight * losses.decoupled_kd(student, teacher, labels[:, None]...), axis=-1)``.

  Args:
    teacher_regions: ``[..., N, K]``, the whole image's first: `region_logits`.
    labels: ``[...]`` integers.

  Returns:
    ``[..., N]``, 1 or 2.

  Raises:
    ValueError: the labels are of another shape.

  Source: Wei, Luo, Luo, "Scaled Decoupled Distillation", 2024.

  Other codes: this is the published code's.

  >>> regions = jnp.array([[[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]]])
  >>> region_weight(regions, jnp.array([0])).tolist()
  [[1.0, 2.0, 1.0]]
  """
  (teacher,) = float_arrays(teacher_regions)
  labels = jnp.asarray(labels)
  if labels.shape != teacher.shape[:-2]:
    raise ValueError(
      f"labels must be of shape {teacher.shape[:-2]} beside regions {teacher.shape}, got "
      f"{labels.shape}."
    )
  right = jnp.argmax(teacher, axis=-1) == labels[..., None]
  return 1 + (right != right[..., :1]).astype(teacher.dtype)


def scale_decoupled_kd(
  student_regions: Regions,
  teacher_regions: Regions,
  labels: Integer[AnyArray, "*batch"],
  *,
  temperature: Scalar = 4.0,
) -> PerExample:
  """Scale-decoupled distillation (SDD, SD-KD): soft targets of an image's regions.

  mean_n w_n · `soft_target_kl` of the region n of student_regions and teacher_regions, w =
  `region_weight` at labels, at temperature; that is, temperature² · mean_n w_n Σ_k a_nk log(a_nk /
  b_nk), a and b = the softmax of either over temperature.

  Args:
    student_regions: ``[..., N, K]``, the whole image's first: `region_logits`.
    teacher_regions: ``[..., N, K]``.
    labels: ``[...]`` integers.
    temperature: softens both, > 0. 4 is the published code's for CIFAR-100.

  Returns:
    ``[...]``, in nats · temperature².

  Raises:
    ValueError: the shapes do not fit, there is but one output, or ``temperature`` is not positive.

  Source: Wei, Luo, Luo, "Scaled Decoupled Distillation", 2024.

  Other codes: this, as the mean over the batch, is the published code's, which puts 0 in place of
  what is NaN; SD-DKD and SD-NKD have another loss at each region, as `region_weight` shows.

  >>> student, teacher = jnp.zeros((1, 1, 2)), jnp.log(jnp.array([[[0.75, 0.25]]]))
  >>> round(scale_decoupled_kd(student, teacher, jnp.array([0]), temperature=1.0).item(), 4)
  0.1308
  """
  values = soft_target_kl(student_regions, teacher_regions, temperature=temperature)
  return jnp.mean(region_weight(teacher_regions, labels) * values, axis=-1)


def cross_view_kd(
  student_weak: Logits,
  student_strong: Logits,
  teacher_weak: Logits,
  teacher_strong: Logits,
  *,
  temperature: Scalar = 4.0,
  weak_threshold: Scalar = 0.9,
  strong_threshold: Scalar = 0.2,
  within_weight: Scalar = 2.0,
  cross_weight: Scalar = 0.5,
) -> PerExample:
  """Cross-view distillation (CRLD): soft targets within and across a weak and a strong view.

  within_weight · m_w · (D(student_weak, teacher_weak) + D(student_strong, teacher_strong))
    + cross_weight · m_s · (D(student_strong, teacher_weak) + D(student_weak, teacher_strong)),
  D = `soft_target_kl` at temperature, m_w = [max softmax(teacher_weak) ≥ weak_threshold],
  m_s = [max softmax(teacher_strong) ≥ strong_threshold], both at temperature 1; [·] is 1 where what
  it holds is true, else 0.

  Args:
    student_weak: ``[..., K]``, of the weakly augmented image.
    student_strong: ``[..., K]``, of the strongly augmented one.
    teacher_weak: ``[..., K]``.
    teacher_strong: ``[..., K]``.
    temperature: softens both, > 0. 4 is the published code's for CIFAR-100 (1 for ImageNet).
    weak_threshold: how sure the teacher must be. 0.9 is the published code's.
    strong_threshold: likewise. 0.2 is the published code's.
    within_weight: of the pairs of one view. 2 is the published code's.
    cross_weight: of the pairs of two views. 0.5 is the published code's.

  Returns:
    ``[...]``, in nats · temperature²; 0 where the teacher is not sure.

  Raises:
    ValueError: the shapes differ, there is but one output, or ``temperature`` is not positive.

  Source: Zhang, Liu, Cai, Ma, "Cross-View Consistency Regularisation for Knowledge Distillation",
  2024.

  Other codes: this is the published code's, whose masks go by the term and not by the view that
  teaches; DeepKD's copy is the same. The mean over the batch counts who is masked as 0.

  >>> sure, unsure = jnp.array([9.0, 0.0, 0.0]), jnp.array([0.1, 0.0, 0.0])
  >>> cross_view_kd(sure, sure, unsure, unsure, cross_weight=0.0).item()
  0.0
  """
  views = {"weak": (student_weak, teacher_weak), "strong": (student_strong, teacher_strong)}
  for student, teacher in views.values():
    pair(student, teacher)

  def apart(of_student: str, of_teacher: str) -> Array:
    return soft_target_kl(views[of_student][0], views[of_teacher][1], temperature=temperature)

  def sure(teacher: Any, threshold: Scalar) -> Array:
    (logits,) = float_arrays(teacher)
    most = jnp.max(jax.nn.softmax(logits, axis=-1), axis=-1)
    return (most >= jnp.asarray(threshold, most.dtype)).astype(most.dtype)

  within = apart("weak", "weak") + apart("strong", "strong")
  across = apart("strong", "weak") + apart("weak", "strong")
  weights = [jnp.asarray(w, within.dtype) for w in (within_weight, cross_weight)]
  masks = sure(teacher_weak, weak_threshold), sure(teacher_strong, strong_threshold)
  return weights[0] * masks[0] * within + weights[1] * masks[1] * across
