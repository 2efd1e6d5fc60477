"""Methods without a teacher, or with the student's own past for one: Tf-KD, USKD and PS-KD."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxdistill import _check, losses
from jaxdistill.recipes import projectors
from jaxdistill.recipes.parts import (
  EPOCH,
  Modules,
  Running,
  at_a_step,
  both_logits,
  feature,
  hard_term,
  learned,
  present,
  recipe,
)
from jaxdistill.types import (
  Batch,
  Number,
  Objective,
  Outputs,
  Term,
  Terms,
  as_objective,
  compute_dtype,
)

__all__ = ["pskd", "tfkd", "uskd"]

PyTree = Any


@recipe
def tfkd(
  student: Outputs,
  teacher: Outputs | None,
  batch: Batch,
  *,
  correct: Number = 0.99,
  temperature: Number = 20.0,
  virtual_weight: Number = 0.1,
  hard_weight: Number | None = 0.9,
) -> dict[str, Term]:
  """Teacher-free distillation (Tf-KD): a designed teacher that is right and says little.

  ``hard_weight * cross_entropy + virtual_weight * virtual_teacher``. It needs no teacher. The
  paper's other form, a network that learns from a copy of its own trained before, is `basics.kd`.

  Source: Yuan, Tay, Li, Wang, Feng, "Revisiting Knowledge Distillation via Label Smoothing
  Regularization", 2020. Its code's (virtual_weight, temperature) on CIFAR-100 are (0.1, 20) for
  ResNet-18; (0.0095, 40), beside a hard_weight of 0.05, for MobileNetV2, whose code divides by the
  number of classes without undoing it.

  Args:
    correct: the designed probability of the label. It, the temperature and the weights are keywords
      of the objective.
    temperature: of the designed teacher alone; it divides probabilities.
    virtual_weight: of the designed teacher's term.
    hard_weight: of the labels; None leaves that term out.

  Returns:
    An objective with the terms ``labels`` and ``virtual``; both count labelled examples only, whose
    labels must be integers.
  """
  del teacher
  values = losses.virtual_teacher(
    student.logits, batch.labels, correct=correct, temperature=temperature
  )
  return {
    "labels": hard_term(student, batch, hard_weight),
    "virtual": Term(values, weight=virtual_weight, where=batch.labelled),
  }


def _grown(growth_steps: Any) -> Any:
  """PS-KD's share of the past: from 0 to 0.8 in a line, as a schedule of the step."""
  _check.whole("growth_steps", growth_steps, least=0, instead=": 0 is the full share throughout")
  return optax.linear_schedule(0.0, 0.8, growth_steps) if growth_steps else 0.8


@recipe(follows={"past_share": _grown})
def _mixed_targets(
  student: Outputs,
  teacher: Outputs | None,
  batch: Batch,
  *,
  hard_weight: Number | None = 1.0,
  growth_steps: int = 300 * EPOCH,
  past_share: Number = 0.8,
) -> dict[str, Term]:
  """`pskd`, whose past is what the teacher says."""
  del growth_steps  # of which past_share is the schedule, and here the number of this step
  ours, theirs = both_logits("pskd", student, teacher)
  share = at_a_step("past_share", past_share)
  # [B]: linear in the target, so that the mixture's cross-entropy is that of its parts.
  past = losses.cross_entropy(ours, jax.nn.softmax(theirs.astype(compute_dtype(theirs))))
  return {
    "labels": hard_term(student, batch, None if hard_weight is None else hard_weight * (1 - share)),
    "past": Term(past, weight=share),
  }


def pskd(
  examples: int | None = None,
  *,
  hard_weight: Number | None = 1.0,
  growth_steps: int = 300 * EPOCH,
  past_share: Any = None,
  axis_name: str | None = None,
) -> Objective:
  """Progressive self-distillation (PS-KD): the labels give way to the student's own past.

  ``hard_weight * (1 - past_share) * cross_entropy(labels) + past_share * cross_entropy(past)``, at
  temperature 1 throughout: the cross-entropy with the mixture of both. With ``examples`` the past
  is what the student itself said of each example when it last saw it, an epoch ago, of that epoch's
  view, in training mode; at the first time it is the label. It needs no teacher then. Without, the
  past is a teacher's: the student of an earlier run, or a moving average.

  The predictions, ``[N, ..., K]`` in float32, are the objective's state: checkpointed, and one for
  each of several seeds. Padding changes none of them. What has no label and was not seen before has
  no past, and counts in no term. Under ``pmap`` give ``axis_name``, or each device knows its share
  alone and the step averages what they know.

  Source: Kim, Ji, Yoon, Hwang, "Self-Knowledge Distillation with Progressive Refinement of
  Targets", 2021. In its code the share rises by the epoch, from 0.8 / 300 to 0.8; here by the step.

  Args:
    examples: N, how many the training set has; ``batch.index`` says which they are. One beyond N
      makes the term NaN, which ends the run. None for a teacher's past.
    hard_weight: of the labels' part; None leaves that term out.
    growth_steps: in how many steps the keyword ``past_share`` rises from 0 to 0.8, in a line: those
      of the run, as published; 300 epochs of CIFAR-100 at batch size 64 by default. 0 is 0.8
      throughout.
    past_share: that keyword, of the objective; what ``growth_steps`` says by default.
    axis_name: `train.AXIS` under ``pmap``; None under ``jit``.

  Returns:
    An objective with the terms ``labels`` and ``past``. Unlabelled examples take part in the latter
    only.

  Raises:
    TypeError: ``growth_steps`` or ``examples`` is no integer.
    ValueError: one is out of range; there is no teacher, or with ``examples`` there is one.

  >>> sorted(pskd(1000).hyper)
  ['hard_weight', 'past_share']
  """
  given = {} if past_share is None else {"past_share": past_share}
  mixed = as_objective(_mixed_targets(hard_weight=hard_weight, growth_steps=growth_steps, **given))
  if examples is None:
    return mixed
  count = _check.whole("examples", examples)

  def init(key: Any, student: Outputs, teacher: Outputs | None) -> tuple[PyTree, PyTree]:
    del key
    _no_teacher(teacher)
    shape = (count, *student.logits.shape[1:])
    return {}, {"past": jnp.zeros(shape, jnp.float32), "seen": jnp.zeros(count, bool)}

  def apply(
    params: PyTree,
    state: PyTree,
    student: Outputs,
    teacher: Outputs | None,
    batch: Batch,
    *,
    key: Any,
    **hyper: Any,
  ) -> tuple[Terms, PyTree]:
    del params
    _no_teacher(teacher)
    logits, index = student.logits, batch.index
    rows = jnp.clip(index, 0, count - 1)
    seen = jnp.expand_dims(state["seen"][rows], range(1, logits.ndim - 1))  # [B] or [B, 1]
    first = jax.nn.one_hot(batch.labels, logits.shape[-1], dtype=jnp.float32)
    past = jnp.where(seen[..., None], state["past"][rows], first)
    terms, _ = mixed.apply({}, {}, student, Outputs(jnp.log(past)), batch, key=key, **hyper)
    known = jnp.asarray(batch.labelled) > 0
    known = jnp.expand_dims(known, range(known.ndim, logits.ndim - 1)) | seen
    # A wrong row would be another example's past without a word.
    amiss = jnp.expand_dims((index < 0) | (index >= count), range(1, logits.ndim - 1))
    values = jnp.where(amiss, jnp.nan, terms["past"].values)
    terms["past"] = dataclasses.replace(terms["past"], values=values, where=known)
    said = jax.nn.softmax(jax.lax.stop_gradient(logits).astype(jnp.float32))
    # Rows of padding lie beyond the end, where nothing is written.
    written = jnp.where(present(batch) & (index >= 0), index, count), said
    if axis_name is not None:
      written = jax.lax.all_gather(written, axis_name, tiled=True)
    return terms, {
      "past": state["past"].at[written[0]].set(written[1], mode="drop"),
      "seen": state["seen"].at[written[0]].set(True, mode="drop"),
    }

  return Objective(init=init, apply=apply, hyper=mixed.hyper, check=mixed.check)


def _no_teacher(teacher: Outputs | None) -> None:
  if teacher is not None:
    raise ValueError(
      "pskd(examples) learns from what the student said before, and teacher is not None: leave "
      "one of them out."
    )


def uskd(
  *,
  student_layer: str = "stage2",
  target_weight: float = 0.1,
  nontarget_weight: float = 0.1,
  weak_weight: float = 0.1,
  hard_weight: float | None = 1.0,
) -> Objective:
  """Universal self-knowledge distillation (USKD): soft labels of the student's own answers.

  ``hard_weight * cross_entropy + target_weight * self_target + nontarget_weight * self_nontarget
  + weak_weight * cross_entropy(weak, smoothed labels)``, weak = a linear exit on ``student_layer``,
  which is no part of the deployed network. It needs no teacher. Of tokens and pixels each is an
  example: the exit is of each position, and its logits are resized to those of the student where
  the feature has fewer positions (bilinearly, as auxiliary exits of segmentation are).

  Source: Yang, Zeng, Li, Zhang, Yuan, Li, "From Knowledge Distillation to Self-Knowledge
  Distillation: A Unified Approach with Normalized Loss and Customized Soft Labels", 2023. Its
  weights on ImageNet are 1, 0.1 and 0.005.

  Args:
    student_layer: the feature of the exit, of the stage before the last (in a ViT the class token
      half way): averaged over its positions where logits are ``[B, K]``.
    target_weight: of the label's soft target; the published code's for CIFAR-100, as the two below.
      All weights are keywords of the objective.
    nontarget_weight: of the other classes' Zipf distribution.
    weak_weight: of the exit's own labels, smoothed by 0.1.
    hard_weight: of the labels; None leaves that term out.

  Returns:
    An `Objective` with the terms ``labels``, ``target``, ``nontarget`` and ``weak``. All of them
    count labelled examples only, whose labels must be integers; the mean in the second depends on
    who is in the batch.

  Raises:
    ValueError: when it is initialised, there is no such feature, or it has other axes of positions
      than the logits.

  >>> sorted(uskd(target_weight=1.0).hyper)
  ['hard_weight', 'nontarget_weight', 'target_weight', 'weak_weight']
  """

  def modules(student: Outputs, teacher: Outputs | None) -> Modules:
    x = feature(student, student_layer, "student_layer")
    axes = _pooled_axes(x, student.logits, student_layer)
    shape = tuple(size for axis, size in enumerate(x.shape) if axis not in axes)
    pooled = jax.ShapeDtypeStruct(shape, compute_dtype(x))
    return {"weak": (projectors.Linear(student.logits.shape[-1]), pooled)}

  def method(
    running: Running,
    student: Outputs,
    teacher: Outputs | None,
    batch: Batch,
    *,
    target_weight: Any,
    nontarget_weight: Any,
    weak_weight: Any,
  ) -> dict[str, Term]:
    x = feature(student, student_layer, "student_layer")
    logits, labels = student.logits, batch.labels
    # [B, K], or [B, L, K] and [B, H, W, K], of as many positions as the feature has.
    axes = _pooled_axes(x, logits, student_layer)
    weak = running("weak", jnp.mean(x, axis=axes, dtype=compute_dtype(x)))
    if weak.shape != logits.shape:
      weak = jax.image.resize(weak, logits.shape, "bilinear")
    # Padding and what has no label are in no mean over the batch.
    labelled = dataclasses.replace(batch, weight=batch.labelled)
    there = present(batch, logits) & present(labelled, logits)
    known = jnp.broadcast_to(there[..., 0], logits.shape[:-1])
    values = {
      "target": (losses.self_target(logits, labels, where=known), target_weight),
      "nontarget": (losses.self_nontarget(logits, weak, labels), nontarget_weight),
      "weak": (losses.cross_entropy(weak, labels, label_smoothing=0.1), weak_weight),
    }
    return {name: Term(x, weight=w, where=batch.labelled) for name, (x, w) in values.items()}

  hyper = {
    "target_weight": target_weight,
    "nontarget_weight": nontarget_weight,
    "weak_weight": weak_weight,
  }
  return learned(modules, method, hyper, hard_weight)


def _pooled_axes(x: Any, logits: Any, layer: str) -> tuple[int, ...]:
  """The axes of a feature over which it is averaged: of its positions, where logits have none."""
  if logits.ndim == 2:
    return tuple(range(1, x.ndim - 1))
  if x.ndim != logits.ndim:
    raise ValueError(
      f"student_layer={layer!r} is {tuple(x.shape)} and the logits are {tuple(logits.shape)}: of "
      "tokens or pixels the exit says something of each, so name a feature with as many axes."
    )
  return ()
