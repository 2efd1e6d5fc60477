"""Methods that part the classes: DKD and GDKD, NKD, and the refined logits of RLD.

Each is complete by itself, with its published hard-label term. A warm-up is a keyword whose default
is a schedule of the step: who calls an objective directly, without the step, gives it a number.
"""

from __future__ import annotations

from typing import Any

from jaxdistill import _check, losses
from jaxdistill.recipes.parts import EPOCH, at_a_step, both_logits, hard_term, recipe, rising
from jaxdistill.types import Batch, Number, Outputs, Term

__all__ = ["dkd", "gdkd", "nkd", "rld"]


@recipe(follows={"dkd_warmup": rising})
def dkd(
  student: Outputs,
  teacher: Outputs | None,
  batch: Batch,
  *,
  temperature: Number = 4.0,
  target_weight: Number = 1.0,
  nontarget_weight: Number = 8.0,
  soft_weight: Number = 1.0,
  hard_weight: Number | None = 1.0,
  warmup_steps: int = 20 * EPOCH,
  dkd_warmup: Number = 1.0,
  standardize: bool = False,
) -> dict[str, Term]:
  """Decoupled knowledge distillation (DKD), with its warm-up.

  ``hard_weight * cross_entropy + soft_weight * dkd_warmup * decoupled_kd``, the latter weighing the
  label's class by target_weight and the others among themselves by nontarget_weight.

  Source: Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation", 2022, whose
  nontarget_weight on CIFAR-100 is 2 for resnet56 to resnet20 and resnet110 to resnet32; 6 for
  wrn40-2 to wrn16-2 or wrn40-1 and vgg13 to vgg8 or MobileNetV2; 8 for resnet32x4 to resnet8x4 or
  either ShuffleNet, ResNet50 to MobileNetV2 and wrn40-2 to ShuffleNetV1. On ImageNet, at
  temperature 1 with one epoch of warm-up: 0.5 for ResNet34 to ResNet18, 2 for ResNet50 to
  MobileNetV1. Its warm-up rises by the epoch, from 1/20 in the first; this one by the step, from 0.
  CTKD's copy has nontarget_weight 2, OFA-KD's too, at temperature 1.

  Args:
    temperature: the published code's for CIFAR-100. It and the weights are keywords.
    target_weight: of the (label, rest) pair; 1 in the paper.
    nontarget_weight: of the other classes; the paper's for resnet32x4 to resnet8x4.
    soft_weight: of both parts together; logit standardisation has 9, at temperature 2.
    hard_weight: of the labels; 1 in the paper. None leaves that term out.
    warmup_steps: in how many steps the keyword ``dkd_warmup`` rises from 0 to 1, in a line; 20
      epochs of CIFAR-100 at batch size 64 by default, as published. 0 turns it off.
    dkd_warmup: that keyword, of the objective; what ``warmup_steps`` says by default.
    standardize: whether both networks' logits become z-scores first, as in LSKD.

  Returns:
    An objective with the terms ``labels`` and ``dkd``; both count labelled examples only,
    whose labels must be integers.

  Raises:
    TypeError: ``warmup_steps`` is no integer.
    ValueError: it is negative.

  >>> import jax.numpy as jnp
  >>> batch = Batch(None, jnp.array([0]), jnp.ones(1), jnp.ones(1), None, None)
  >>> student, teacher = (Outputs(jnp.full((1, 3), value)) for value in (0.0, 1.0))
  >>> terms = dkd.function(student, teacher, batch, dkd_warmup=0.5)
  >>> sorted(terms), terms["dkd"].weight, terms["dkd"].values.tolist()
  (['dkd', 'labels'], 0.5, [0.0])
  """
  del warmup_steps  # of which dkd_warmup is the schedule, and here the number of this step
  # Logits, not probabilities: the loss stays in log space, where 1 − p_y can't round to 0.
  ours, theirs = both_logits("dkd", student, teacher, standardize=standardize)
  # NCKD weighs 8 where plain KD has 1 − p_y, next to nothing. Published runs rise to that over 20
  # epochs, since at first the student's other classes are in no order at all.
  weight = soft_weight * at_a_step("dkd_warmup", dkd_warmup)
  values = losses.decoupled_kd(
    ours,
    theirs,
    batch.labels,
    temperature=temperature,
    target_weight=target_weight,
    nontarget_weight=nontarget_weight,
  )
  return {
    "labels": hard_term(student, batch, hard_weight),
    # Without the label no class is the target.
    "dkd": Term(values, weight=weight, where=batch.labelled),
  }


def _check_top(top: Any) -> None:
  _check.whole("top", top)


@recipe(check=_check_top, follows={"gdkd_warmup": rising})
def gdkd(
  student: Outputs,
  teacher: Outputs | None,
  batch: Batch,
  *,
  top: int = 5,
  temperature: Number = 4.0,
  pair_weight: Number = 1.0,
  top_weight: Number = 2.0,
  rest_weight: Number = 8.0,
  soft_weight: Number = 1.0,
  hard_weight: Number | None = 1.0,
  warmup_steps: int = 20 * EPOCH,
  gdkd_warmup: Number = 1.0,
) -> dict[str, Term]:
  """Generalised decoupled knowledge distillation (GDKD): the teacher's first few classes apart.

  ``hard_weight * cross_entropy + soft_weight * gdkd_warmup * generalized_decoupled_kd``.

  Source: Zheng, Cheng, "Rethinking Decoupled Knowledge Distillation: A Predictive Distribution
  Perspective", 2025, whose (top_weight, rest_weight) on CIFAR-100 are (2, 8) for resnet32x4 to
  resnet8x4; (1, 8) for resnet32x4 to either ShuffleNet and ResNet50 to MobileNetV2; (1, 6) for
  vgg13 to vgg8 or MobileNetV2; (2, 6) for wrn40-2 to wrn16-2, wrn40-1 or ShuffleNetV1; (1, 1) for
  resnet56 to resnet20 and resnet110 to resnet32. On ImageNet, at temperature 1 with one epoch of
  warm-up, (pair_weight, top_weight, rest_weight) are (0.5, 1, 1) for ResNet34 to ResNet18 and
  (0.5, 2, 2) for ResNet50 to MobileNetV1. Its warm-up rises by the epoch; this one by the step.

  Args:
    top: how many of the teacher's classes are at the top.
    temperature: the published code's for CIFAR-100. It and the weights are keywords.
    pair_weight: of the (top, rest) pair.
    top_weight: of the top classes among themselves.
    rest_weight: of the others.
    soft_weight: of all three together.
    hard_weight: of the labels. None leaves that term out.
    warmup_steps: in how many steps the keyword ``gdkd_warmup`` rises from 0 to 1, in a line; 20
      epochs of CIFAR-100 at batch size 64 by default, as published. 0 turns it off.
    gdkd_warmup: that keyword, of the objective; what ``warmup_steps`` says by default.

  Returns:
    An objective with the terms ``labels`` and ``gdkd``. Unlabelled examples take part in the latter
    too: it looks at no label.

  Raises:
    TypeError: ``top`` or ``warmup_steps`` is no integer.
    ValueError: ``top`` is below 1, or ``warmup_steps`` negative.
  """
  del warmup_steps  # of which gdkd_warmup is the schedule, and here the number of this step
  ours, theirs = both_logits("gdkd", student, teacher)
  values = losses.generalized_decoupled_kd(
    ours,
    theirs,
    top=top,
    temperature=temperature,
    pair_weight=pair_weight,
    top_weight=top_weight,
    rest_weight=rest_weight,
  )
  return {
    "labels": hard_term(student, batch, hard_weight),
    "gdkd": Term(values, weight=soft_weight * at_a_step("gdkd_warmup", gdkd_warmup)),
  }


@recipe(follows={"rld_warmup": rising})
def rld(
  student: Outputs,
  teacher: Outputs | None,
  batch: Batch,
  *,
  temperature: Number = 4.0,
  target_temperature: Number = 1.0,
  target_weight: Number = 1.0,
  nontarget_weight: Number = 8.0,
  hard_weight: Number | None = 1.0,
  warmup_steps: int = 20 * EPOCH,
  rld_warmup: Number = 1.0,
  standardize: bool = False,
) -> dict[str, Term]:
  """Refined logit distillation (RLD): what the teacher puts above the label is not taught.

  ``hard_weight * cross_entropy + rld_warmup * refined_kd``.

  Source: Sun, Chen, Lyu, Chen, Chen, Wang, "Knowledge Distillation with Refined Logits", 2024. On
  ImageNet, at temperature 1 with one epoch of warm-up, nontarget_weight is 0.5 for ResNet34 to
  ResNet18, 2 for ResNet50 to MobileNetV1. Its warm-up rises by the epoch; this one by the step.

  Args:
    temperature: of the classes below the label. It and the weights are keywords of the objective.
    target_temperature: of the label's own probability.
    target_weight: of the label against the rest.
    nontarget_weight: of the classes that the teacher puts below the label.
    hard_weight: of the labels. None leaves that term out.
    warmup_steps: in how many steps the keyword ``rld_warmup`` rises from 0 to 1, in a line; 20
      epochs of CIFAR-100 at batch size 64 by default, as published. 0 turns it off.
    rld_warmup: that keyword, of the objective; what ``warmup_steps`` says by default.
    standardize: whether both networks' logits become z-scores first, as in LSKD.

  Returns:
    An objective with the terms ``labels`` and ``rld``; both count labelled examples only, whose
    labels must be integers.

  Raises:
    TypeError: ``warmup_steps`` is no integer.
    ValueError: it is negative.
  """
  del warmup_steps  # of which rld_warmup is the schedule, and here the number of this step
  ours, theirs = both_logits("rld", student, teacher, standardize=standardize)
  values = losses.refined_kd(
    ours,
    theirs,
    batch.labels,
    temperature=temperature,
    target_temperature=target_temperature,
    target_weight=target_weight,
    nontarget_weight=nontarget_weight,
  )
  return {
    "labels": hard_term(student, batch, hard_weight),
    # Without the label nothing is above it.
    "rld": Term(values, weight=at_a_step("rld_warmup", rld_warmup), where=batch.labelled),
  }


@recipe
def nkd(
  student: Outputs,
  teacher: Outputs | None,
  batch: Batch,
  *,
  temperature: Number = 3.0,
  nontarget_weight: Number = 3.5,
  soft_weight: Number = 1.0,
  hard_weight: Number | None = 1.0,
) -> dict[str, Term]:
  """Normalised knowledge distillation (NKD): the teacher's label term, and the others normalised.

  ``hard_weight * cross_entropy + soft_weight * normalized_kd``.

  Source: Yang, Zeng, Li, Zhang, Yuan, Li, "From Knowledge Distillation to Self-Knowledge
  Distillation: A Unified Approach with Normalized Loss and Customized Soft Labels", 2023, whose
  (temperature, nontarget_weight) on ImageNet are (1, 1.5) for convolutional networks and (1, 1) for
  ViTs. With mixed labels it takes the larger one's class for the label.

  Args:
    temperature: of the other classes; the published code's for CIFAR-100. It and the weights are
      keywords of the objective.
    nontarget_weight: of the other classes, likewise.
    soft_weight: of both parts together; 1 in the published code, as hard_weight.
    hard_weight: of the labels. None leaves that term out.

  Returns:
    An objective with the terms ``labels`` and ``nkd``; both count labelled examples only, whose
    labels must be integers.
  """
  ours, theirs = both_logits("nkd", student, teacher)
  values = losses.normalized_kd(
    ours,
    theirs,
    batch.labels,
    temperature=temperature,
    nontarget_weight=nontarget_weight,
  )
  return {
    "labels": hard_term(student, batch, hard_weight),
    # Without the label no class is the target.
    "nkd": Term(values, weight=soft_weight, where=batch.labelled),
  }
