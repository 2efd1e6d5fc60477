"""Methods that compare what two networks predict: LSKD, TTM, WSL, DIST, MLKD, OFA-KD and CTKD.

Each is complete by itself, with its published hard-label term; `basics.combine` adds more. Weights
and temperatures are keywords of the objective. CTKD's temperature is learned, against the student.
Methods that part the classes are in `partitions`, those without a teacher in `self_distillation`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxdistill import _check, losses
from jaxdistill.recipes import projectors
from jaxdistill.recipes.parts import (
  EPOCH,
  STAGES,
  LogitLoss,
  Modules,
  Running,
  at_a_step,
  both_features,
  both_logits,
  check_loss,
  feature,
  hard_term,
  learned,
  present,
  recipe,
  strong_view,
)
from jaxdistill.types import Batch, Number, Objective, Outputs, Term, compute_dtype

__all__ = ["ctkd", "dist", "kd_standardized", "mlkd", "ofa", "sdd", "ttm", "wsl", "wttm"]


@recipe(check=check_loss)
def kd_standardized(
  student: Outputs,
  teacher: Outputs | None,
  batch: Batch,
  *,
  loss: LogitLoss = losses.soft_target_kl,
  temperature: Number = 2.0,
  soft_weight: Number = 9.0,
  hard_weight: Number | None = 0.1,
) -> dict[str, Term]:
  """Logit standardisation (LSKD): the logits' z-scores in front of a loss on logits.

  ``hard_weight * cross_entropy + soft_weight * loss(z(student), z(teacher), temperature)``,
  z = `losses.standardize_logits`, through which the student's gradient flows. The labels' term sees
  the logits as they are. `dkd`, `dist` and `ctkd` have the same as their option ``standardize``.

  Source: Sun, Ren, Li, Wang, Cao, "Logit Standardization in Knowledge Distillation", 2024. Its code
  has other (temperature, soft_weight) for some pairs: (3, 1) for ResNet50 to MobileNetV2; (4, 12)
  for resnet110 to resnet20; (3, 9) for vgg13 to vgg8 or MobileNetV2, wrn40-2 to MobileNetV2, and
  resnet32x4 to wrn16-2 or wrn40-2. For ImageNet hard_weight is 1; torchdistill's is 0.5.

  Args:
    loss: ``(student_logits, teacher_logits, *, temperature) -> [B]``; the published one by default.
    temperature: in standard deviations of the logits; the published code's for CIFAR-100. It and
      both weights are keywords of the objective.
    soft_weight: of the loss; the published code's for CIFAR-100, ten times `kd`'s.
    hard_weight: of the labels; the published code's for CIFAR-100. None leaves that term out.

  Returns:
    An objective with the terms ``labels`` and ``soft``. Unlabelled examples take part in
    the latter only.

  >>> batch = Batch(None, jnp.array([0]), jnp.ones(1), jnp.ones(1), None, None)
  >>> student, teacher = (Outputs(z * jnp.array([[2.0, 1.0, 0.0]])) for z in (1.0, 3.0))
  >>> kd_standardized.function(student, teacher, batch)["soft"].values.round(6).tolist()
  [0.0]
  """
  ours, theirs = both_logits("kd_standardized", student, teacher, standardize=True)
  # [B]. A student of less capacity need not reach the teacher's range of logits, only its order
  # and spacing: z-scores leave shift and scale to each network.
  soft = loss(ours, theirs, temperature=temperature)
  return {
    "labels": hard_term(student, batch, hard_weight),
    "soft": Term(soft, weight=soft_weight),
  }


@recipe
def ttm(
  student: Outputs,
  teacher: Outputs | None,
  batch: Batch,
  *,
  power: Number = 0.1,
  soft_weight: Number = 45.0,
  hard_weight: Number | None = 1.0,
) -> dict[str, Term]:
  """Transformed teacher matching (TTM): a power flattens the teacher, the student stays as it is.

  ``hard_weight * cross_entropy + soft_weight * transformed_teacher``.

  Source: Zheng, Yang, "Knowledge Distillation Based on Transformed Teacher Matching", 2024. Of its
  numbers the published code has those for VGG-13 to VGG-8 alone, which are here.

  Args:
    power: of the teacher's probabilities, > 0: one over its temperature. It and the weights are
      keywords of the objective.
    soft_weight: of the matching, which has no temperature ** 2 in front.
    hard_weight: of the labels; None leaves that term out.

  Returns:
    An objective with the terms ``labels`` and ``soft``. Unlabelled examples take part in the latter
    only.
  """
  ours, theirs = both_logits("ttm", student, teacher)
  # [B]. Only the teacher is flattened: the student is trained at the temperature it is used at.
  soft = losses.transformed_teacher(ours, theirs, power=power)
  return {
    "labels": hard_term(student, batch, hard_weight),
    "soft": Term(soft, weight=soft_weight),
  }


@recipe
def wttm(
  student: Outputs,
  teacher: Outputs | None,
  batch: Batch,
  *,
  power: Number = 0.2,
  soft_weight: Number = 4.0,
  hard_weight: Number | None = 1.0,
) -> dict[str, Term]:
  """Weighted transformed teacher matching (WTTM): more of TTM where the teacher is less sure.

  ``hard_weight * cross_entropy + soft_weight * weighted_transformed_teacher``.

  Source: Zheng, Yang, "Knowledge Distillation Based on Transformed Teacher Matching", 2024, whose
  published code has these numbers for VGG-13 to VGG-8, beside CRD with a weight of 0.8:
  ``combine(wttm(), crd(labels, crd_weight=0.8, hard_weight=None))``.

  Args:
    power: of the teacher's probabilities, > 0. It and the weights are keywords of the objective.
    soft_weight: of the matching; less than `ttm`'s, since an example's own weight is up to
      K ** (1 - power).
    hard_weight: of the labels; None leaves that term out.

  Returns:
    An objective with the terms ``labels`` and ``soft``. Unlabelled examples take part in the latter
    only.
  """
  ours, theirs = both_logits("wttm", student, teacher)
  # [B]: the weight of an example is a function of the teacher alone.
  soft = losses.weighted_transformed_teacher(ours, theirs, power=power)
  return {
    "labels": hard_term(student, batch, hard_weight),
    "soft": Term(soft, weight=soft_weight),
  }


@recipe
def wsl(
  student: Outputs,
  teacher: Outputs | None,
  batch: Batch,
  *,
  temperature: Number = 2.0,
  soft_weight: Number = 2.5,
  hard_weight: Number | None = 1.0,
) -> dict[str, Term]:
  """Weighted soft labels (WSL): the teacher's, where the student lags behind on the label.

  ``hard_weight * cross_entropy + soft_weight * weighted_soft_labels``. For its weight in front of
  another loss, `losses.soft_label_weight` is a factor of that loss's values.

  Source: Zhou, Song, Chen, Zhou, Wang, Yuan, Zhang, "Rethinking Soft Labels for Knowledge
  Distillation: A Bias-Variance Tradeoff Perspective", 2021. Its numbers are ImageNet's; cls_KD's
  copy has temperature 4 and soft_weight 2.25 for CIFAR-100. Its teacher runs in training mode.

  Args:
    temperature: the published code's. It and the weights are keywords of the objective.
    soft_weight: of the soft labels.
    hard_weight: of the labels; None leaves that term out.

  Returns:
    An objective with the terms ``labels`` and ``soft``; both count labelled examples only, whose
    labels must be integers.
  """
  ours, theirs = both_logits("wsl", student, teacher)
  soft = losses.weighted_soft_labels(ours, theirs, batch.labels, temperature=temperature)
  return {
    "labels": hard_term(student, batch, hard_weight),
    # Without the label nobody lags behind.
    "soft": Term(soft, weight=soft_weight, where=batch.labelled),
  }


@recipe
def dist(
  student: Outputs,
  teacher: Outputs | None,
  batch: Batch,
  *,
  temperature: Number = 4.0,
  inter_weight: Number = 2.0,
  intra_weight: Number = 2.0,
  hard_weight: Number | None = 1.0,
  standardize: bool = False,
) -> dict[str, Term]:
  """DIST: correlations of predictions, over an example's classes and over a class's examples.

  ``hard_weight * cross_entropy + inter_weight * inter_class_correlation
  + intra_weight * intra_class_correlation``.

  Source: Huang, You, Wang, Qian, Xu, "Knowledge Distillation from A Stronger Teacher", 2022. Its
  code has 2 * (inter + intra) beside the labels' 1, and both times temperature ** 2, which the
  paper's own listing has not.

  Args:
    temperature: 4 is the published code's for CIFAR-100, 1 for ImageNet. It and the weights are
      keywords of the objective.
    inter_weight: of the relation between classes.
    intra_weight: of the relation within each class, which depends on who is in the batch: under
      ``pmap`` or gradient accumulation, the device's share or the micro-batch.
    hard_weight: of the labels; None leaves that term out.
    standardize: whether both networks' logits become z-scores first, as in LSKD.

  Returns:
    An objective with the terms ``labels``, ``inter`` and ``intra``; the last has one value
    per class. Unlabelled examples take part in both relations, padding (weight 0) in none.

  >>> batch = Batch(None, jnp.array([0, 1]), jnp.ones(2), jnp.ones(2), None, None)
  >>> logits = Outputs(jnp.array([[2.0, 0.0], [0.0, 1.0]]))
  >>> terms = dist.function(logits, logits, batch)
  >>> terms["intra"].axis, terms["intra"].values.round(4).tolist()
  ('classes', [0.0, 0.0])
  """
  ours, theirs = both_logits("dist", student, teacher, standardize=standardize)
  # The batch itself is what a class is compared over: padding in it would be a relation to noise.
  counted = jnp.broadcast_to(present(batch, ours)[..., 0], ours.shape[:-1])
  inter = losses.inter_class_correlation(ours, theirs, temperature=temperature)  # [B]: along rows
  # [K]: along columns.
  intra = losses.intra_class_correlation(ours, theirs, temperature=temperature, where=counted)
  # One example has no relation within a class: such a micro-batch must not dilute the others.
  related = jnp.full(intra.shape, jnp.sum(counted) > 1)
  return {
    "labels": hard_term(student, batch, hard_weight),
    "inter": Term(inter, weight=inter_weight),
    "intra": Term(intra, weight=intra_weight, where=related, axis="classes"),
  }


def _check_temperatures(temperatures: Any) -> None:
  if isinstance(temperatures, str) or not isinstance(temperatures, Sequence) or not temperatures:
    raise TypeError(
      f"temperatures={_check.show(temperatures)} must be a sequence of numbers, such as (4.0, 2.0)."
    )
  for temperature in temperatures:
    _check.number("temperatures", temperature, above=0)


@recipe(check=_check_temperatures)
def mlkd(
  student: Outputs,
  teacher: Outputs | None,
  batch: Batch,
  *,
  temperatures: Sequence[float] = (4.0, 3.0, 5.0, 2.0, 6.0),
  soft_weight: Number = 0.9,
  class_weight: Number = 0.9,
  batch_weight: Number = 0.9,
  hard_weight: Number | None = 0.1,
  standardize: bool = False,
  two_views: bool = False,
) -> dict[str, Term]:
  """Multi-level logit distillation (MLKD): examples, classes and the batch; of one view or two.

  ``hard_weight * cross_entropy + the sum over temperatures of (soft_weight * soft_target_kl
  + class_weight * class_gram + batch_weight * batch_gram)``.

  Source: Jin, Wang, Lin, "Multi-Level Logit Distillation", 2023. Its networks see each image twice,
  weakly and strongly augmented, which is ``two_views=True``: of the strong view there are the
  labels and the soft targets. With one view it is RLD's variant of it. The published code takes two
  of the strong view's five temperatures, 2 and 6, of the weak one, by a slip. Its masks of
  confident examples and classes multiply means that are taken already, which halves them, and are
  left out. Logit standardisation's variant has ``standardize=True``, the temperatures (2, 3, 5, 2,
  6) and the weights 9, of which those masks leave 4.5 to classes and batch. These two terms are
  sums of squares that grow with the examples of a class, B / K, squared and plainly: where answers
  are sure, 64 examples of 10 classes have 100 and 10 times what those of 100 classes have, for
  which the weights were found. Lower them by as much, or training may diverge.

  Args:
    temperatures: of each term; the published code's for CIFAR-100.
    soft_weight: of the soft targets, with their temperature ** 2. All weights are keywords.
    class_weight: of the correlation of classes, which depends on who is in the batch: under
      ``pmap`` or gradient accumulation, the device's share or the micro-batch.
    batch_weight: of the correlation of examples, likewise.
    hard_weight: of the labels; None leaves that term out.
    standardize: whether the soft targets' logits become z-scores first, as in LSKD.
    two_views: whether batches show two looks (`jaxdistill.data.two_views`) that both networks see
      (`views.with_views`).

  Returns:
    An objective with the terms ``labels``, ``soft``, ``classes`` (one value per class) and
    ``batch``; of two views also ``strong``, by the weight of ``soft``, and ``labels`` are of both.
    Unlabelled examples take part in all but the first, padding (weight 0) in none.

  Raises:
    TypeError: ``temperatures`` is no sequence.
    ValueError: one of them is not positive; at the first step, a network saw one look of two.
  """
  ours, theirs = both_logits("mlkd", student, teacher)
  sharp = both_logits("mlkd", student, teacher, standardize=standardize)
  counted = jnp.broadcast_to(present(batch, ours)[..., 0], ours.shape[:-1])
  # Three levels: what an example is, which classes go together, which examples do. Several
  # temperatures, since what is alike among the unlikely classes shows at a high one only.
  soft, classes, examples = (
    sum(loss(*pair, temperature=t, **where) for t in temperatures)
    for loss, pair, where in (
      (losses.soft_target_kl, sharp, {}),
      (losses.class_gram, (ours, theirs), {"where": counted}),
      (losses.batch_gram, (ours, theirs), {"where": counted}),
    )
  )
  looks = (strong_view(student, "student"),) if two_views else ()
  terms = {
    "labels": hard_term(student, batch, hard_weight, *looks),
    "soft": Term(soft, weight=soft_weight),
    "classes": Term(classes, weight=class_weight, axis="classes"),
    "batch": Term(examples, weight=batch_weight),
  }
  for look in looks:
    pair = both_logits("mlkd", look, strong_view(teacher, "teacher"), standardize=standardize)
    strong = sum(losses.soft_target_kl(*pair, temperature=t) for t in temperatures)
    terms["strong"] = Term(strong, weight=soft_weight)
  return terms


@recipe
def sdd(
  student: Outputs,
  teacher: Outputs | None,
  batch: Batch,
  *,
  student_layer: str = "logit_map",
  teacher_layer: str = "logit_map",
  scales: Sequence[int] = (1, 2),
  temperature: Number = 4.0,
  soft_weight: Number = 0.9,
  hard_weight: Number | None = 0.1,
) -> dict[str, Term]:
  """Scale-decoupled distillation (SDD): soft targets of the whole image and of its regions.

  ``hard_weight * cross_entropy + soft_weight * scale_decoupled_kd``. The layers are maps of logits
  ``[B, H, W, K]``, of a network that applies its linear classifier at each position and puts out
  the mean: the same logits as of a classifier behind the mean, so that any network of that kind
  has such a map by ``recipes.with_class_maps(network, name="logit_map", bias=True)``.

  Source: Wei, Luo, Luo, "Scaled Decoupled Distillation", 2024. Its code pools features to 4 x 4
  first, and has (1, 2, 4) for scales too. Its SD-DKD is `losses.region_weight` on DKD's values.

  Args:
    student_layer: the student's map of logits.
    teacher_layer: the teacher's; its size may differ.
    scales: sides of the grids of regions, 1 (the whole image) first.
    temperature: the published code's for CIFAR-100. It and the weights are keywords of the
      objective.
    soft_weight: of the regions' soft targets.
    hard_weight: of the labels; None leaves that term out.

  Returns:
    An objective with the terms ``labels`` and ``soft``; both count labelled examples only, whose
    labels must be integers.

  Raises:
    ValueError: at the first step, there is no teacher or no such feature, or it is no map.
  """
  both_logits("sdd", student, teacher)
  maps = both_features(student, teacher, (student_layer, teacher_layer))
  # [B, N, K]: what of the image speaks for a class, and of which one, where all of it together
  # is ambiguous. A region on which the teacher changes its mind counts twice.
  ours, theirs = (losses.region_logits(logit_map, scales=scales) for logit_map in maps)
  soft = losses.scale_decoupled_kd(ours, theirs, batch.labels, temperature=temperature)
  return {
    "labels": hard_term(student, batch, hard_weight),
    "soft": Term(soft, weight=soft_weight, where=batch.labelled),
  }


def ofa(
  *,
  student_layers: Sequence[str] = STAGES,
  head: Callable[[Any, int], nn.Module] | None = None,
  power: float = 1.0,
  temperature: float = 1.0,
  ofa_weight: float = 1.0,
  soft_weight: float = 1.0,
  hard_weight: float | None = 1.0,
) -> Objective:
  """One-for-all distillation (OFA-KD): the teacher's logits teach exits on the student's stages.

  ``hard_weight * cross_entropy + soft_weight * one_for_all(logits)
  + ofa_weight * sum over student_layers of one_for_all(head(feature))``. No feature of the teacher
  is looked at, so that its architecture may be any. The heads are no part of the deployed network.

  Source: Hao, Guo, Han, Tang, Hu, Wang, Xu, "One-for-All: Bridge the Gap Between Heterogeneous
  Architectures in Knowledge Distillation", 2023. Its heads have separable convolutions (or, in a
  ViT, blocks with patch merging) before the pooling, and its networks four stages; its labels are
  smoothed by 0.1 on CIFAR-100.

  Args:
    student_layers: features with an exit; by default the stages of our ResNets.
    head: ``(feature, num_classes) -> module``, from the feature's shape ``[B, ..., C]``; the module
      ``(x, *, train)`` returns logits ``[B, num_classes]``. By default the mean over positions and
      a linear map.
    power: how much the label's class is enhanced; 1 is published for CIFAR-100, 1.5 for ImageNet.
      It, the temperature and the weights are keywords of the objective.
    temperature: 1 in the published code.
    ofa_weight: of the exits, whose losses are added up; 1 in the published code, as the two below.
    soft_weight: of the same loss on the student's logits.
    hard_weight: of the labels; None leaves that term out.

  Returns:
    An `Objective` with the terms ``labels``, ``soft`` and ``ofa``. All of them count labelled
    examples only, whose labels must be integers.

  Raises:
    ValueError: ``student_layers`` is one text or names nothing or something twice; and when it is
      initialised, there is no teacher or no such feature.

  >>> sorted(ofa(student_layers=["mid"]).hyper)
  ['hard_weight', 'ofa_weight', 'power', 'soft_weight', 'temperature']
  """
  layers = _names("student_layers", student_layers)
  make_head = head or (lambda feature, num_classes: _PooledLinear(num_classes))

  def modules(student: Outputs, teacher: Outputs | None) -> Modules:
    _, theirs = both_logits("ofa", student, teacher)
    # As many classes as the teacher has: the exits answer to its logits, not to its features.
    found = {layer: feature(student, layer, "student_layers") for layer in layers}
    return {layer: (make_head(x, theirs.shape[-1]), x) for layer, x in found.items()}

  def method(
    running: Running,
    student: Outputs,
    teacher: Outputs,
    batch: Batch,
    *,
    power: Any,
    temperature: Any,
    ofa_weight: Any,
    soft_weight: Any,
  ) -> dict[str, Term]:
    # [B] for the network's own logits, then for each exit: an exit is taught as the network is.
    final, *early = [
      losses.one_for_all(z, teacher.logits, batch.labels, power=power, temperature=temperature)
      for z in (student.logits, *running.each())
    ]
    return {
      "soft": Term(final, weight=soft_weight, where=batch.labelled),
      "ofa": Term(sum(early), weight=ofa_weight, where=batch.labelled),
    }

  hyper = {
    "power": power,
    "temperature": temperature,
    "ofa_weight": ofa_weight,
    "soft_weight": soft_weight,
  }
  return learned(modules, method, hyper, hard_weight)


class _PooledLinear(nn.Module):
  """An exit: the mean over all positions, and a linear map to the classes."""

  num_classes: int

  @nn.compact
  def __call__(self, x: Any, *, train: bool = False) -> Any:
    # In float32 at least, as the networks' own logits are.
    # [B, ..., C] to [B, C]: maps and tokens by the mean over positions, a vector as it is.
    pooled = jnp.mean(x, axis=tuple(range(1, x.ndim - 1)), dtype=compute_dtype(x))
    return nn.Dense(self.num_classes, dtype=pooled.dtype, name="classifier")(pooled)


def _names(argument: str, layers: Sequence[str]) -> tuple[str, ...]:
  # Each layer's exit is a module under the layer's name, so a name can be there once only.
  if isinstance(layers, str):
    raise ValueError(
      f"{argument}={layers!r} must be a sequence of names: {argument}=({layers!r},)."
    )
  if not layers or len(set(layers)) < len(layers):
    raise ValueError(f"{argument}={tuple(layers)} must name one feature at least, and each once.")
  return tuple(layers)


def ctkd(
  *,
  loss: LogitLoss = losses.soft_target_kl,
  learned_temperature: projectors.LearnedTemperature | None = None,
  soft_weight: float = 0.9,
  hard_weight: float | None = 0.1,
  warmup_steps: int = 10 * EPOCH,
  standardize: bool = False,
) -> Objective:
  """Curriculum temperature (CTKD): the temperature is learned against the student.

  ``hard_weight * cross_entropy + soft_weight * loss(student, teacher, temperature)``, where the
  gradient of the temperature's parameters is multiplied by ``-ctkd_reversal``, so that they climb
  what the student descends; temperature ** 2 is part of what they climb.

  ctkd_reversal(step) = (1 - cos(pi * min(step / warmup_steps, 1))) / 2, from 0 to 1.

  Source: Li, Li, Yang, Zhao, Song, Luo, Li, Yang, "Curriculum Temperature for Knowledge
  Distillation", 2023. Its code's curriculum goes by the epoch, counted from 1; this one by the
  step, from 0. Its parameter is in the student's optimiser, weight decay included, and so it is
  here. Its instance-wise form, one temperature for each example, loops over the batch; this one,
  ``learned_temperature=recipes.projectors.LearnedTemperature(hidden=128)``, does not.

  Args:
    loss: ``(student_logits, teacher_logits, *, temperature) -> [B]``.
    learned_temperature: the published 1 + 20 * sigmoid(theta), theta from 1, by default.
    soft_weight: of the loss. 0.9 and 0.1 as published for CIFAR-100; keywords of the objective.
    hard_weight: of the labels; None leaves them out.
    warmup_steps: of the curriculum; 10 epochs of CIFAR-100 at batch size 64 by default, as
      published. 0 turns it off: the gradient is reversed in full from the first step on.
    standardize: whether both networks' logits become z-scores first, as in LSKD.

  Returns:
    An `Objective` with the terms ``labels``, ``soft`` and, for the log alone (its weight is 0),
    ``learned_temperature``. Unlabelled examples take part in all but the first.

  Raises:
    TypeError: ``warmup_steps`` is no integer.
    ValueError: it is negative; and when it is initialised, there is no teacher.

  >>> reversal = ctkd(warmup_steps=100).hyper["ctkd_reversal"]
  >>> [round(float(reversal(step)), 3) for step in (0, 50, 100, 900)]
  [0.0, 0.5, 1.0, 1.0]
  """
  check_loss(loss)
  _check.whole("warmup_steps", warmup_steps, least=0)
  temperature_of = learned_temperature or projectors.LearnedTemperature()
  # The curriculum, easy to hard: at reversal 0 the temperature stays where it is, at 1 it climbs
  # against the student at full speed. Published as a cosine.
  falling = optax.cosine_decay_schedule(1.0, warmup_steps) if warmup_steps else None
  hyper = {
    "soft_weight": soft_weight,
    "ctkd_reversal": 1.0 if falling is None else lambda step: 1 - falling(step),
  }

  def seen(student: Outputs, teacher: Outputs | None) -> tuple[Any, ...]:
    """What the module looks at beside the reversal: both networks' logits, or nothing."""
    if temperature_of.hidden is None:
      return ()
    # [B, 2K], both networks' side by side: the instance-wise temperature depends on both.
    pair = both_logits("ctkd", student, teacher, standardize=standardize)
    dtype = compute_dtype(*pair)
    return (jnp.concatenate([z.astype(dtype) for z in pair], axis=-1),)

  def modules(student: Outputs, teacher: Outputs | None) -> Modules:
    both_logits("ctkd", student, teacher)
    given = jax.eval_shape(lambda s, t: (jnp.zeros(()), *seen(s, t)), student, teacher)
    return {"temperature": (temperature_of, given)}

  def method(
    running: Running,
    student: Outputs,
    teacher: Outputs,
    batch: Batch,
    *,
    soft_weight: Any,
    ctkd_reversal: Any,
  ) -> dict[str, Term]:
    ours, theirs = both_logits("ctkd", student, teacher, standardize=standardize)
    # Its gradient is multiplied by -reversal: it climbs what the student descends.
    reversal = at_a_step("ctkd_reversal", ctkd_reversal)
    temperature = running("temperature", reversal, *seen(student, teacher))
    # For the log alone: weight 0, and no gradient from there either.
    axis = "parameters" if temperature.ndim == 0 else "batch"
    logged = jax.lax.stop_gradient(temperature)
    return {
      "soft": Term(_tempered(loss, ours, theirs, temperature), weight=soft_weight),
      "learned_temperature": Term(logged, weight=0.0, axis=axis),
    }

  return learned(modules, method, hyper, hard_weight)


def _tempered(loss: LogitLoss, student: Any, teacher: Any, temperature: Any) -> Any:
  """The loss at one temperature for all, or at one for each row."""
  if temperature.ndim == 0:
    return loss(student, teacher, temperature=temperature)
  # A loss takes one temperature, so each row is a call of its own; vmap makes one program of them.
  rows = [z.reshape(-1, z.shape[-1]) for z in (student, teacher)]
  by_row = jax.vmap(lambda s, t, value: loss(s, t, temperature=value))
  return by_row(rows[0], rows[1], temperature.reshape(-1)).reshape(temperature.shape)
