"""A method that places features by their class: the norm and direction of KD++."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxdistill import _check, losses
from jaxdistill.recipes import projectors
from jaxdistill.recipes.parts import (
  EPOCH,
  Modules,
  Running,
  at_a_step,
  both_features,
  both_logits,
  layer_names,
  learned,
  rising,
)
from jaxdistill.types import Batch, Objective, Outputs, Term

__all__ = ["norm_direction"]


def norm_direction(
  means: Any,
  *,
  student_layer: str = "pooled",
  teacher_layer: str | None = None,
  temperature: float = 4.0,
  soft_weight: float = 3.5,
  direction_weight: float = 2.0,
  hard_weight: float | None = 1.0,
  warmup_steps: int = 20 * EPOCH,
  projector: Callable[[Any, Any], nn.Module] = projectors.between,
) -> Objective:
  """Norm and direction (ND): KD++, which draws features to their class's mean beside soft targets.

  ``hard_weight * cross_entropy + soft_weight * nd_warmup * soft_target_kl
  + direction_weight * norm_and_direction``. Other methods become theirs of "++" by this one without
  its soft targets: ``combine(dkd(), norm_direction(means, soft_weight=0.0, hard_weight=None))``.

  Source: Wang, Cheng, Duan, Wang, Feng, Kong, "Improving Knowledge Distillation via Regularizing
  Feature Norm and Direction", 2023, whose (soft_weight, direction_weight) on CIFAR-100 are (1, 2)
  for resnet56 to resnet20; (3.5, 2) for resnet32x4 to resnet8x4; (1, 1.5) for wrn40-2 to wrn40-1;
  (3, 0.5) for ResNet50 to MobileNetV2; (2.5, 1.5) and (4, 0.5) for resnet32x4 to the first and
  second ShuffleNet. On ImageNet (2.5, 1) for ResNet34 to ResNet18 and (4, 1) for ResNet50 to
  MobileNetV1. Its projector has a BatchNorm and a dropout before the linear map.

  Args:
    means: ``[K, D]``, the teacher's mean feature of each class over the training set, in evaluation
      mode: `losses.class_means`.
    student_layer: the pooled feature ``[B, C]``.
    teacher_layer: the teacher's ``[B, D]``; the same name by default.
    temperature: of the soft targets. It and the weights are keywords of the objective.
    soft_weight: of the soft targets, with their temperature ** 2.
    direction_weight: of the features.
    hard_weight: of the labels; None leaves that term out.
    warmup_steps: in how many steps the keyword ``nd_warmup`` rises from 0 to 1, in a line; 20
      epochs of CIFAR-100 at batch size 64 by default, as published. 0 turns it off.
    projector: ``(student, teacher) -> module`` from the two features' shapes; it is left out when
      the widths are equal.

  Returns:
    An `Objective` with the terms ``labels``, ``soft`` and ``direction``. Unlabelled examples take
    part in the second only.

  Raises:
    TypeError: ``warmup_steps`` is no integer.
    ValueError: it is negative, or ``means`` are no numbers ``[K, D]``; and when it is initialised,
      there is no teacher or no such feature.

  >>> sorted(norm_direction(jnp.ones((3, 5))).hyper)
  ['direction_weight', 'hard_weight', 'nd_warmup', 'soft_weight', 'temperature']
  """
  _check.function("projector", projector, "(student, teacher) -> module", arguments=2)
  if np.ndim(means) != 2:
    raise ValueError(
      f"means={_check.show(means)} must be [K, D], the teacher's mean feature of each class: "
      "losses.class_means(features, labels, num_classes)."
    )
  layers = layer_names(student_layer, teacher_layer)
  hyper = {
    "temperature": temperature,
    "soft_weight": soft_weight,
    "direction_weight": direction_weight,
    "nd_warmup": rising(warmup_steps),
  }

  def modules(student: Outputs, teacher: Outputs | None) -> Modules:
    both_logits("norm_direction", student, teacher)
    ours, theirs = both_features(student, teacher, layers)
    same = ours.shape[1:] == theirs.shape[1:]
    return {"projector": (None if same else projector(ours, theirs), ours)}

  def method(
    running: Running,
    student: Outputs,
    teacher: Outputs,
    batch: Batch,
    *,
    temperature: Any,
    soft_weight: Any,
    direction_weight: Any,
    nd_warmup: Any,
  ) -> dict[str, Term]:
    soft = losses.soft_target_kl(student.logits, teacher.logits, temperature=temperature)
    # [B]: towards the class's mean, and at least as long as the teacher's own feature.
    theirs = teacher.features[layers[1]]
    towards = losses.norm_and_direction(
      running("projector"), theirs, batch.labels, jnp.asarray(means)
    )
    return {
      "soft": Term(soft, weight=soft_weight * at_a_step("nd_warmup", nd_warmup)),
      "direction": Term(towards, weight=direction_weight, where=batch.labelled),
    }

  return learned(modules, method, hyper, hard_weight)
