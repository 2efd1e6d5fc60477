"""Methods of two stages: FSP, activation boundaries (AB), factor transfer (FT); and FitNets' own.

All have one shape. ``method(stage=1)`` is the objective of the first stage, ``method(stage=2)``
that of the second, and ``method()`` has the terms of both in one run, which nobody has published
but which needs no second run. The stages are two runs, each with a length and an optimiser of its
own, the second of which starts from what the first one leaves::

    first = train.fit(student, recipes.fsp(stage=1), ...)
    second = train.fit(first, recipes.fsp(stage=2), ...)

- `fsp`: the term ``fsp``, then ``labels``; the second run is given the first one's model.
- `activation_boundary`: ``boundary``, then ``labels``; the first one's model.
- `factor_transfer`: ``reconstruction``, then ``labels`` and ``factor``; the student itself, but an
  objective with ``start=({}, first.state.objective_params)``.
- FitNets as in its paper: ``hint("stage2", "stage2")``, then ``kd()``; the first one's model.

The first stage has no gradient for what lies above the student's last named layer, and that of
`factor_transfer` none for the student at all; weight decay, where the optimiser has it, still
shrinks them (``decayed="kernels"`` spares at least the norms), and BatchNorm's averages still move.
The published code, RepDistiller's, gives the first stage 30 of 240 epochs beforehand.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdistill import _check, losses
from jaxdistill.networks.models.layers import batch_norm, default_init
from jaxdistill.recipes import projectors
from jaxdistill.recipes.basics import labels
from jaxdistill.recipes.parts import (
  Modules,
  Running,
  init_modules,
  layer_pairs,
  learned,
  map_pairs,
  stage_weights_or,
)
from jaxdistill.types import Batch, Objective, Outputs, Term

__all__ = ["activation_boundary", "factor_transfer", "fsp"]

PyTree = Any


def fsp(
  *,
  stage: int | None = None,
  student_layers: Sequence[str] = ("stem", "stage1", "stage2", "stage3"),
  teacher_layers: Sequence[str] | None = None,
  fsp_weight: float | None = None,
  hard_weight: float | None = 1.0,
  connect: bool = True,
  axis_name: str | None = None,
) -> Objective:
  """Flow of the solution procedure (FSP): how each layer's channels go with the next one's.

  ``fsp_weight * Σ_i flow_of_solution((layer i, layer i + 1))``; then the labels alone.

  Args:
    stage: 1 or 2; None for both at once, see the module's text.
    student_layers: maps ``[B, H, W, C]``, at least two; stem and stages as in RepDistiller.
    teacher_layers: the teacher's, one for each; None for the same names.
    fsp_weight: a keyword of the objective. None is 1 for stage 1, as RepDistiller runs it, and for
      both at once the 50 that its scripts name (where it takes no effect).
    hard_weight: 1 in RepDistiller; a keyword of the objective. None leaves the labels out.
    connect: whether a student's map of another width than the teacher's goes through a 1 x 1
      convolution, BatchNorm and ReLU (``connector<i>``), trained with the student. Published codes
      have no such thing and need equal widths: False makes others an error.
    axis_name: the mapped axis over which the connectors' BatchNorm averages, under ``pmap``.

  Returns:
    An `Objective` with the terms ``fsp`` (stage 1), ``labels`` (stage 2), or both.

  Raises:
    TypeError, ValueError: an argument is out of its range; when it is initialised, a layer is
      missing or no map, or widths differ and ``connect`` is False.

  Source: Yim, Joo, Bae, Kim, "A Gift from Knowledge Distillation: Fast Optimization, Network
  Minimization and Transfer Learning", 2017.

  >>> sorted(fsp(stage=1).hyper), sorted(fsp(stage=2).hyper)
  (['fsp_weight'], ['hard_weight'])
  """
  _check_stage(stage)
  pairs = layer_pairs(student_layers, teacher_layers, least=2)
  if stage == 2:
    return _labels_alone(hard_weight)
  # RepDistiller's 50 takes no effect there, since its second stage drops the term; beside the
  # labels in one run there has to be a weight.
  if fsp_weight is None:
    fsp_weight = 50.0 if stage is None else 1.0

  def modules(student: Outputs, teacher: Outputs | None) -> Modules:
    found: dict[str, tuple[Any, Any]] = {}
    for i, (ours, theirs) in enumerate(map_pairs(student, teacher, pairs)):
      width, module = theirs.shape[-1], None
      if ours.shape[-1] != width:
        if not connect:
          raise ValueError(
            f"fsp needs equal widths: the student's {pairs[i][0]!r} is {tuple(ours.shape)} and the "
            f"teacher's {pairs[i][1]!r} {tuple(theirs.shape)}; take connect=True, or other layers."
          )
        # To the teacher's width in the student's own size: a flow has no positions to match.
        module = projectors.Conv(width, tuple(ours.shape[1:3]), axis_name=axis_name)
      found[f"connector{i}"] = (module, ours)
    return found

  def method(
    running: Running, student: Outputs, teacher: Outputs, batch: Batch, *, fsp_weight: Any
  ) -> dict[str, Term]:
    # The connected maps of the student, [B, H, W, C] in their order, and the teacher's own.
    ours = running.each()
    theirs = [teacher.features[name] for _, name in pairs]
    # How the channels of a layer go with those of the next one, [C, C'], for each two of them.
    steps = zip(itertools.pairwise(ours), itertools.pairwise(theirs), strict=True)
    values = sum(losses.flow_of_solution(mine, its) for mine, its in steps)
    return {"fsp": Term(values, weight=fsp_weight)}

  hyper = {"fsp_weight": fsp_weight}
  return learned(modules, method, hyper, None if stage == 1 else hard_weight)


def activation_boundary(
  *,
  stage: int | None = None,
  student_layers: Sequence[str] = ("stage1_preact", "stage2_preact", "stage3_preact"),
  teacher_layers: Sequence[str] | None = None,
  boundary_weight: float = 3e-3,
  hard_weight: float | None = 1.0,
  margin: float = 1.0,
  stage_weights: Sequence[float] | None = None,
  axis_name: str | None = None,
) -> Objective:
  """Activation boundaries (AB): the student's units are on where the teacher's are.

  ``boundary_weight * Σ_i stage_weights[i] * activation_boundary``; then the labels alone. Where a
  student's map has another shape than the teacher's, it goes through a connector
  (``connector<i>``), FitNets' regressor without its ReLU, which is trained with the student.

  Args:
    stage: 1 or 2; None for both at once, see the module's text.
    student_layers: maps from before their activation; all three stages as in RepDistiller.
    teacher_layers: the teacher's, one for each; None for the same names.
    boundary_weight: 3/1000 in RepDistiller, 1 in torchdistill; a keyword of the objective.
    hard_weight: 1 in RepDistiller; a keyword of the objective. None leaves the labels out.
    margin: 1 in both; a keyword of the objective.
    stage_weights: one for each layer; by default 1 for the last and half as much for each one
      before it, as in RepDistiller. torchdistill has 1 for each.
    axis_name: the mapped axis over which the connectors' BatchNorm averages, under ``pmap``.

  Returns:
    An `Objective` with the terms ``boundary`` (stage 1), ``labels`` (stage 2), or both.

  Raises:
    TypeError, ValueError: an argument is out of its range; when it is initialised, a layer is
      missing or no map.

  Source: Heo, Lee, Yun, Choi, "Knowledge Transfer via Distillation of Activation Boundaries Formed
  by Hidden Neurons", 2019.

  >>> sorted(activation_boundary(stage=1).hyper), sorted(activation_boundary(stage=2).hyper)
  (['boundary_weight', 'margin'], ['hard_weight'])
  """
  _check_stage(stage)
  pairs = layer_pairs(student_layers, teacher_layers)
  weights = stage_weights_or(stage_weights, len(pairs))
  _check.scheduled("margin", margin, least=0)
  if stage == 2:
    return _labels_alone(hard_weight)

  def modules(student: Outputs, teacher: Outputs | None) -> Modules:
    found: dict[str, tuple[Any, Any]] = {}
    for i, (ours, theirs) in enumerate(map_pairs(student, teacher, pairs)):
      module = None
      if ours.shape[1:] != theirs.shape[1:]:
        # Signs are what is compared, and after a ReLU there is no other side.
        module = projectors.between(ours, theirs, axis_name=axis_name).clone(use_relu=False)
      found[f"connector{i}"] = (module, ours)
    return found

  def method(
    running: Running,
    student: Outputs,
    teacher: Outputs,
    batch: Batch,
    *,
    boundary_weight: Any,
    margin: Any,
  ) -> dict[str, Term]:
    _check.number("margin", margin, least=0)  # once more, now that a schedule has become a number
    # [B]. A hinge for each unit: on the teacher's side by a margin, and no more is asked.
    values = sum(
      weight * losses.activation_boundary(ours, teacher.features[name], margin=margin)
      for weight, ours, (_, name) in zip(weights, running.each(), pairs, strict=True)
    )
    return {"boundary": Term(values, weight=boundary_weight)}

  hyper = {"boundary_weight": boundary_weight, "margin": margin}
  return learned(modules, method, hyper, None if stage == 1 else hard_weight)


def factor_transfer(
  *,
  stage: int | None = None,
  student_layer: str = "stage3",
  teacher_layer: str | None = None,
  factor_weight: float = 200.0,
  hard_weight: float | None = 1.0,
  reconstruction_weight: float = 1.0,
  ratio: float = 0.5,
  axis_name: str | None = None,
) -> Objective:
  """Factor transfer (FT): the student's translator matches the teacher's paraphraser.

  Stage 1 trains the paraphraser on the teacher's map, ``reconstruction_weight * mean (decoded −
  map)²``; the student takes no part. Stage 2, ``hard_weight * cross_entropy + factor_weight *
  factor_transfer``, compares its factor with that of the translator, which is trained with the
  student, and only reads the paraphraser: it is state there and never changes::

      first = train.fit(student, recipes.factor_transfer(stage=1), ...)
      handed = ({}, first.state.objective_params)
      objective = dataclasses.replace(recipes.factor_transfer(stage=2), start=handed)
      second = train.fit(student, objective, ...)

  Without that ``start`` the term ``factor`` is NaN, and fit says so at the first steps.
  Encoder and decoder are three 3 x 3 convolutions each, with bias and leaky ReLUs of slope 0.1; the
  translator is an encoder with BatchNorm.

  Args:
    stage: 1 or 2; None for both at once, see the module's text: the factor's gradient doesn't reach
      the paraphraser.
    student_layer: a map; the last one as in RepDistiller.
    teacher_layer: the teacher's; None for the same name.
    factor_weight: 200 in RepDistiller; 1000 in torchdistill, whose factors are normalised
      otherwise. A keyword of the objective.
    hard_weight: 1 in RepDistiller; a keyword of the objective. None leaves the labels out.
    reconstruction_weight: 1 in RepDistiller, which trains the paraphraser at learning rate 0.01;
      a keyword of the objective.
    ratio: the factor's channels by the teacher's; 0.5 in the paper and RepDistiller.
    axis_name: the mapped axis over which the translator's BatchNorm averages, under ``pmap``.

  Returns:
    An `Objective` with the terms ``reconstruction`` (stage 1), ``labels`` and ``factor`` (stage 2),
    or all three.

  Raises:
    TypeError, ValueError: an argument is out of its range; when it is initialised, a layer is
      missing or no map.

  Source: Kim, Park, Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer",
  2018.

  >>> sorted(factor_transfer(stage=1).hyper), sorted(factor_transfer(stage=2).hyper)
  (['reconstruction_weight'], ['factor_weight', 'hard_weight'])
  """
  _check_stage(stage)
  pairs = layer_pairs((student_layer,), None if teacher_layer is None else (teacher_layer,))
  _check.number("ratio", ratio, above=0)

  def modules(student: Outputs, teacher: Outputs | None) -> Modules:
    ((ours, theirs),) = map_pairs(student, teacher, pairs)
    width = theirs.shape[-1]
    # The bottleneck is the point: a paraphrase in half the channels is easier to imitate.
    factor = max(1, int(ratio * width))
    # The translator is half an autoencoder: it meets the factor, not the map.
    found: dict[str, tuple[Any, Any]] = {"paraphraser": (_Paraphraser(factor, width), theirs)}
    if stage != 1:
      found["translator"] = (_Encoder((ours.shape[-1], factor, factor), True, axis_name), ours)
    return found

  def init(key: Any, student: Outputs, teacher: Outputs | None) -> tuple[PyTree, PyTree]:
    params, state = init_modules(key, modules(student, teacher))
    if stage == 2:
      # Nobody distils from a paraphraser that was never trained without noticing.
      missing = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params.pop("paraphraser"))
      state = {**state, "paraphraser": missing}
    return params, state

  def method(
    running: Running, student: Outputs, teacher: Outputs, batch: Batch, **weights: Any
  ) -> dict[str, Term]:
    made = {}
    if stage == 2:
      # Read from the state: not in the parameters, so no optimiser and no weight decay reaches it.
      module, theirs = modules(student, teacher)["paraphraser"]
      variables = {"params": running.state["paraphraser"]}
      factor = module.apply(variables, theirs, method=_Paraphraser.encode)
    else:
      factor, decoded = running("paraphraser")
      # An autoencoder of the teacher's map; neither labels nor student take part.
      values = losses.hint_l2(decoded, teacher.features[pairs[0][1]])
      made["reconstruction"] = Term(values, weight=weights["reconstruction_weight"])
    if stage != 1:
      # The one gradient between two things that are both trained here, where the method has none.
      values = losses.factor_transfer(running("translator"), jax.lax.stop_gradient(factor))
      made["factor"] = Term(values, weight=weights["factor_weight"])
    return made

  # Which keywords there are follows from the stage, as the terms do.
  first = {"reconstruction_weight": reconstruction_weight}
  second = {"factor_weight": factor_weight}
  hyper = {1: first, 2: second, None: {**second, **first}}[stage]
  return learned(modules, method, hyper, None if stage == 1 else hard_weight, init=init)


class _Encoder(nn.Module):
  """Convolutions of 3 x 3 with leaky ReLUs: half of a paraphraser, or a translator with norms."""

  features: tuple[int, ...]
  use_norm: bool = False
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Any, *, train: bool = False) -> Any:
    for i, features in enumerate(self.features):
      layer = nn.Conv(features, (3, 3), padding=1, kernel_init=default_init, name=f"conv{i + 1}")
      x = layer(x)
      if self.use_norm:
        x = batch_norm(self, train, f"norm{i + 1}")(x)
      # Leaky, as published: a factor has both signs, which its energy then squares.
      x = jax.nn.leaky_relu(x, 0.1)
    return x


class _Paraphraser(nn.Module):
  """An autoencoder of the teacher's map: ``(factor, the map again)``."""

  factor: int
  features: int

  def setup(self) -> None:
    self.encoder = _Encoder((self.features, self.factor, self.factor))
    # Back to the map's width. A transposed convolution of stride 1, as published, is a convolution.
    self.decoder = _Encoder((self.factor, self.features, self.features))

  def __call__(self, x: Any, *, train: bool = False) -> tuple[Any, Any]:
    del train
    factor = self.encoder(x)
    return factor, self.decoder(factor)

  def encode(self, x: Any) -> Any:
    return self.encoder(x)


def _check_stage(stage: Any) -> None:
  # None is our own: published methods are two runs, and so is every published number.
  if stage not in (None, 1, 2):
    raise ValueError(f"stage={_check.show(stage)} must be 1, 2, or None for both at once.")


def _labels_alone(hard_weight: Any) -> Objective:
  if hard_weight is None:
    raise ValueError("hard_weight=None leaves nothing: stage=2 is the labels alone; give a number.")
  return labels(hard_weight=hard_weight)
