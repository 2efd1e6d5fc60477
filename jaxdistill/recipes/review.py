"""ReviewKD: each stage of the student, seen with those above it, matches the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxdistill import _check, losses
from jaxdistill.recipes import projectors
from jaxdistill.recipes.parts import (
  EPOCH,
  Modules,
  Running,
  feature,
  layer_pairs,
  learned,
  rising,
)
from jaxdistill.types import Batch, Objective, Outputs, Term

__all__ = ["reviewkd"]


def reviewkd(
  *,
  student_layers: Sequence[str] = ("stage1", "stage2", "stage3", "pooled"),
  teacher_layers: Sequence[str] | None = (
    "stage1_preact",
    "stage2_preact",
    "stage3_preact",
    "pooled",
  ),
  review_weight: float = 5.0,
  hard_weight: float | None = 1.0,
  warmup_steps: int = 20 * EPOCH,
  max_mid: int = 512,
  axis_name: str | None = None,
) -> Objective:
  """ReviewKD: the student's stages, fused from the top down, match the teacher's, and the labels.

  ``hard_weight * cross_entropy + review_warmup * review_weight * Σ_stages hierarchical_context``.
  The topmost feature goes through a `recipes.projectors.ReviewFusion` of its own; every other one
  is fused with what the fusion above it leaves over. Fusions (``fusion<i>``, counted from the
  bottom) are trained with the student.

  Args:
    student_layers: from the bottom to the top, maps ``[B, H, W, C]`` or vectors ``[B, D]``, which
      are maps of one pixel; the three stages after their ReLU, and the pooled feature, as published
      for CIFAR (before the ReLU for ImageNet).
    teacher_layers: the teacher's, one for each; the stages before their ReLU, as published. None
      for the student's names.
    review_weight: 5 in mdistiller (resnet32x4 → resnet8x4), and in the paper's code for the wide
      ResNets, resnet32x4 → resnet8x4 and → ShuffleNetV1; there 8 for → ShuffleNetV2, 0.6 for
      resnet56 → resnet20 and 1 for resnet110 → resnet32; on ImageNet 1 for ResNet-34 → ResNet-18
      and 8 for ResNet-50 → MobileNet. A keyword of the objective.
    hard_weight: 1 in both; a keyword of the objective. None leaves the labels out.
    warmup_steps: over how many steps the keyword ``review_warmup`` rises from 0 to 1; by default
      20 epochs of CIFAR-100 at batch 64. Published are 20 epochs on CIFAR, 1 on ImageNet, in steps
      of an epoch; torchdistill has none. 0 turns it off.
    max_mid: fusions have as many channels inside as the student's topmost feature, at most these:
      512. The paper's code takes 256 for ResNet-50 → MobileNet.
    axis_name: the mapped axis over which the fusions' BatchNorm averages, under ``pmap``.

  Returns:
    An `Objective` with the terms ``labels`` and ``review``, and beside the weights the keyword
    ``review_warmup``: a schedule, which the step follows. Where ``apply`` is called without a step,
    it is 1.

  Raises:
    TypeError, ValueError: an argument is out of its range; when it is initialised, a layer is
      missing or neither map nor vector.

  Source: Chen, Liu, Zhao, Jia, "Distilling Knowledge via Knowledge Review", 2021.

  >>> objective = reviewkd(warmup_steps=10)
  >>> float(objective.hyper["review_warmup"](5))
  0.5
  """
  pairs = layer_pairs(student_layers, teacher_layers)
  warmup = rising(warmup_steps)
  _check.whole("max_mid", max_mid)

  def modules(student: Outputs, teacher: Outputs | None) -> Modules:
    """The fusions from the top down: each takes a stage, and what the one above leaves over."""
    found: dict[str, tuple[Any, Any]] = {}
    residual: tuple[Any, ...] = ()
    # A pooled vector [B, D] is a map of one pixel: the top of the review.
    shapes = [_as_map(feature(student, name, "student_layers"), name) for name, _ in pairs]
    # One width for all residuals, or a fusion could not add what comes from above to its own.
    mid = min(max_mid, shapes[-1].shape[-1])
    # From the top down: what a stage has learned is reviewed by the one below it, never above.
    for i, shape in reversed(list(enumerate(shapes))):
      target = _as_map(feature(teacher, pairs[i][1], "teacher_layers"), pairs[i][1])
      module = projectors.ReviewFusion(
        mid, target.shape[-1], tuple(target.shape[1:3]), axis_name=axis_name
      )
      found[f"fusion{i}"] = (module, (shape, *residual))
      # [B, H, W, mid] in the teacher's size here, which the fusion below brings to its own.
      residual = (jax.ShapeDtypeStruct((*target.shape[:3], mid), shape.dtype),)
    return found

  def method(
    running: Running,
    student: Outputs,
    teacher: Outputs,
    batch: Batch,
    *,
    review_weight: Any,
    review_warmup: Any,
  ) -> dict[str, Term]:
    values = []
    residual: tuple[Any, ...] = ()
    for i, (ours, theirs) in reversed(list(enumerate(pairs))):
      # Vectors become maps of one pixel on both sides, so that one loss serves all levels.
      maps, taught = (
        x.reshape(_as_map(x, name).shape)
        for x, name in ((student.features[ours], ours), (teacher.features[theirs], theirs))
      )
      # Fused, as wide as the teacher's stage; and what is left over for the stage below.
      fused, left = running(f"fusion{i}", maps, *residual)
      residual = (left,)
      values.append(losses.hierarchical_context(fused, taught))
    # [B], summed over the levels. A schedule that no step has followed: the warm-up is over.
    warmup = 1.0 if callable(review_warmup) else review_warmup
    return {"review": Term(sum(values), weight=review_weight * warmup)}

  hyper = {"review_weight": review_weight, "review_warmup": warmup}
  return learned(modules, method, hyper, hard_weight)


def _as_map(value: Any, name: str) -> jax.ShapeDtypeStruct:
  """The shape of a map, or of a vector as a map of one pixel."""
  shape = tuple(value.shape)
  if len(shape) not in (2, 4):
    raise ValueError(
      f"reviewkd takes maps [B, H, W, C] and vectors [B, D], and {name!r} has the shape {shape}; "
      "name another layer."
    )
  shape = shape if len(shape) == 4 else (shape[0], 1, 1, shape[1])
  return jax.ShapeDtypeStruct(shape, jnp.dtype(value.dtype))
