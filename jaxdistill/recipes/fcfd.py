"""FCFD: what a student's map means to the teacher's own later stages."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdistill import _check, losses
from jaxdistill.networks.models.layers import batch_norm, kaiming_init
from jaxdistill.recipes import projectors
from jaxdistill.recipes.parts import (
  EPOCH,
  STAGES,
  Modules,
  Running,
  feature,
  init_modules,
  layer_pairs,
  learned,
  map_pairs,
  rising,
)
from jaxdistill.types import Batch, Network, Objective, Outputs, Term, compute_dtype

__all__ = ["fcfd", "fcfd_back", "with_variables"]

PyTree = Any


def fcfd(
  tails: Mapping[str, Network],
  variables: PyTree,
  *,
  student_layers: Sequence[str] = STAGES,
  teacher_layers: Sequence[str] | None = None,
  map_weight: float = 5.0,
  soft_weight: float = 1.0,
  mixed_weight: float = 1.0,
  hard_weight: float | None = 1.0,
  temperature: float = 4.0,
  warmup_steps: int = 20 * EPOCH,
  projector: Callable[[Any, Any], nn.Module | None] | None = None,
  axis_name: str | None = None,
) -> Objective:
  """Function consistency (FCFD): the teacher goes on from the student's maps as from its own.

  ``hard_weight * cross_entropy + soft_weight * soft_target_kl + map_warmup * map_weight *
  (appearance + function) + mixed_weight * Σ_i soft_target_kl(m_i, t)``. A bridge makes ``b_i`` of
  the student's map at layer i. *Appearance* is Σ_i hint_l2(b_i, T_i), T_i the teacher's map;
  *function* is Σ_{i<j} hint_l2(T_j from b_i, T_j), the teacher's stages applied to b_i; both with
  the means over positions of the last layer's maps behind a ReLU beside the maps. m_i are the
  logits that the teacher says of b_i. The gradient passes through the teacher's stages, which
  never change. The student is deployed alone.

  The teacher from a layer on is a network like any other, of the teacher's own variables, which
  takes that layer's map for its inputs. Of the ResNets here it is the module with ``after``::

      tails = {
        "stage1": linen(module.clone(after="stage1"), features=["stage2", "stage3"]),
        "stage2": linen(module.clone(after="stage2"), features=["stage3"]),
      }
      objective = fcfd(tails, teacher.variables)

  Source: Liu, Kan, Shan, Chen, "Function-Consistent Feature Distillation", 2023. This is its code
  with ``--extra_type s2t``; the other half of its default is `fcfd_back`. There two of all mixed
  paths are drawn for each step; here all count, which are two for three stages. Its teacher
  goes by the batch's statistics throughout, and keeps averages of their own for mixed paths, which
  nothing reads; here it is in inference, as every teacher, on both sides of the comparison.

  Args:
    tails: the teacher from each of its layers on but the last, by the layer's name: networks with
      the teacher's logits and its later layers among their features.
    variables: the teacher's. They are kept in the objective's state, and never changed; of several
      seeds side by side each has a copy.
    student_layers: maps ``[B, H, W, C]`` from the bottom to the top, at least two; the three stages
      of a CIFAR ResNet, as published.
    teacher_layers: the teacher's, one for each, of which the last is what its pooling reads; None
      for the same names.
    map_weight: 5 in the published configurations of VGG, ResNet-32x4 and WRN for CIFAR-100, 0.02
      for ResNet-56 to ResNet-20 and for ImageNet. It, the other weights and the temperature are
      keywords of the objective.
    soft_weight: of the student's soft targets; 1 there.
    mixed_weight: of those of what the teacher says of bridged maps; 1 there, 0.2 for WRN-40-2 to
      16-2.
    hard_weight: 1 there. None leaves the labels out.
    temperature: of both; 4 there for pairs of one style, 8 for others, 1 for ImageNet.
    warmup_steps: over how many steps the keyword ``map_warmup`` rises from 0 to 1; 20 epochs of
      CIFAR-100 at batch 64 as published, in steps of an epoch there. 0 turns it off.
    projector: ``(student, teacher) -> module`` from two maps' shapes, as `projectors.between` is,
      or None in the module's place for a map as it is; by default the published bridge: a 3 x 3
      convolution without bias, or where sizes differ that of `projectors.Conv`, then BatchNorm and
      a LeakyReLU of slope 0.1.
    axis_name: the mapped axis over which that bridge's BatchNorm averages, under ``pmap``.

  Returns:
    An `Objective` with the terms ``labels``, ``soft``, ``appearance``, ``function`` and ``mixed``,
    and beside the weights the keyword ``map_warmup``: a schedule, which the step follows.

  Raises:
    TypeError: ``tails`` is no mapping to networks, or an argument is of another kind than it must
      be.
    ValueError: ``tails`` are of other layers, or a weight is negative; when it is initialised, a
      layer is missing or no map, or a tail says something else of the teacher's map than the
      teacher's shapes.

  >>> from jaxdistill import networks
  >>> module = networks.models.resnet8(10)
  >>> tail = networks.linen(module.clone(after="stage2"), features=["stage3"])
  >>> variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
  >>> objective = fcfd({"stage2": tail}, variables, student_layers=("stage2", "stage3"))
  >>> objective.hyper["map_weight"], float(objective.hyper["map_warmup"](10 * EPOCH))
  (5.0, 0.5)
  """
  pairs = layer_pairs(student_layers, teacher_layers, least=2)
  names = [theirs for _, theirs in pairs]
  _check_tails(tails, names, "teacher_layers")
  made = projector or functools.partial(_published, axis_name)

  def modules(student: Outputs, teacher: Outputs | None) -> Modules:
    found = map_pairs(student, teacher, pairs)
    return {f"bridge{i}": (made(ours, theirs), ours) for i, (ours, theirs) in enumerate(found)}

  def init(key: Any, student: Outputs, teacher: Outputs | None) -> tuple[PyTree, PyTree]:
    params, state = init_modules(key, modules(student, teacher))
    for name in tails:
      _check_tail(tails[name], variables, teacher, names[names.index(name) :], "teacher_layers")
    # State and no parameter: nothing trains it, and it travels with the checkpoint.
    return params, {**state, "teacher": jax.tree.map(jnp.asarray, variables)}

  def method(
    running: Running,
    student: Outputs,
    teacher: Outputs,
    batch: Batch,
    *,
    map_weight: Any,
    soft_weight: Any,
    mixed_weight: Any,
    temperature: Any,
    map_warmup: Any,
  ) -> dict[str, Term]:
    bridged = dict(zip(names, running.each(), strict=True))
    # What looks alike need not mean the same: the teacher's own later stages are asked.
    kept = running.state["teacher"]
    gone_on = [tails[n].apply(kept, bridged[n], train=False, key=None)[0] for n in names[:-1]]
    # Each of the teacher's layers: the map bridged to it, and those that came from below it.
    appearance = [_apart(bridged, teacher, name, name == names[-1]) for name in names]
    function = [
      _apart(outputs.features, teacher, name, name == names[-1])
      for i, outputs in enumerate(gone_on)
      for name in names[i + 1 :]
    ]
    soft, *mixed = (
      losses.soft_target_kl(outputs.logits, teacher.logits, temperature=temperature)
      for outputs in (student, *gone_on)
    )
    # A schedule that no step has followed: the warm-up is over.
    weight = map_weight * (1.0 if callable(map_warmup) else map_warmup)
    return {
      "soft": Term(soft, weight=soft_weight),
      "appearance": Term(sum(appearance), weight=weight),
      "function": Term(sum(function), weight=weight),
      "mixed": Term(sum(mixed), weight=mixed_weight),
    }

  hyper = {
    "map_weight": map_weight,
    "soft_weight": soft_weight,
    "mixed_weight": mixed_weight,
    "temperature": temperature,
    "map_warmup": rising(warmup_steps),
  }
  return learned(modules, method, hyper, hard_weight, init=init)


def fcfd_back(
  tails: Mapping[str, Network],
  *,
  student_layers: Sequence[str] = STAGES,
  teacher_layers: Sequence[str] | None = None,
  mixed_weight: float = 1.0,
  temperature: float = 4.0,
  projector: Callable[[Any, Any], nn.Module | None] | None = None,
  axis_name: str | None = None,
) -> Objective:
  """The other half of `fcfd`: the student goes on from the teacher's maps as from its own.

  ``mixed_weight * Σ_i soft_target_kl(m_i, t)``, m_i the logits that the student's later stages say
  of the teacher's map at layer i, behind a bridge to the student's width and size. The gradient
  trains the bridges and the student's later stages, and stops at the teacher's maps. ::

      student = with_variables(linen(module, features=["stage1", "stage2", "stage3"]))
      objective = combine(fcfd(tails, teacher.variables), fcfd_back(student_tails))

  Both with weights of a half are on average the code's default, ``--extra_type bi``, which draws
  two of all four mixed paths for each step.

  Source: as `fcfd`'s, with ``--extra_type t2s``. What it compares on such a path is the logits
  alone. There as here, the student's BatchNorms go by the statistics of the mixed batch; its code
  keeps averages of these, which nothing reads, and here there are none: those of the student are of
  its own maps.

  Args:
    tails: the student from each of its layers on but the last, by the layer's name, as `fcfd` has
      the teacher's.
    student_layers: maps ``[B, H, W, C]`` from the bottom to the top, at least two.
    teacher_layers: the teacher's, one for each; None for the same names.
    mixed_weight: 1 in the published configurations, 0.2 for WRN-40-2 to 16-2. It and the
      temperature are keywords of the objective.
    temperature: as `fcfd`'s.
    projector: ``(teacher, student) -> module`` from two maps' shapes; by default `fcfd`'s bridge.
    axis_name: as `fcfd`'s.

  Returns:
    An `Objective` with the term ``back``.

  Raises:
    TypeError: ``tails`` is no mapping to networks, or an argument is of another kind than it must
      be.
    ValueError: ``tails`` are of other layers, or a weight is negative; when it is initialised, the
      student is not one of `with_variables`, a layer is missing or no map, or a tail says something
      else of the student's map than the student's shapes.

  >>> from jaxdistill import networks
  >>> module = networks.models.resnet8(10)
  >>> tail = networks.linen(module.clone(after="stage2"), features=["stage3"])
  >>> fcfd_back({"stage2": tail}, student_layers=("stage2", "stage3")).hyper
  {'mixed_weight': 1.0, 'temperature': 4.0}
  """
  pairs = layer_pairs(student_layers, teacher_layers, least=2)
  names = [ours for ours, _ in pairs]
  _check_tails(tails, names, "student_layers")
  made = projector or functools.partial(_published, axis_name)

  def modules(student: Outputs, teacher: Outputs | None) -> Modules:
    found = map_pairs(student, teacher, pairs)[:-1]
    return {f"bridge{i}": (made(theirs, ours), theirs) for i, (ours, theirs) in enumerate(found)}

  def init(key: Any, student: Outputs, teacher: Outputs | None) -> tuple[PyTree, PyTree]:
    if student.variables is None:
      raise ValueError(
        "fcfd_back calls the student's later stages once more, and student does not bring its "
        "variables: train recipes.with_variables(student)."
      )
    for name in tails:
      below = names[names.index(name) :]
      _check_tail(tails[name], student.variables, student, below, "student_layers")
    return init_modules(key, modules(student, teacher))

  def method(
    running: Running,
    student: Outputs,
    teacher: Outputs,
    batch: Batch,
    *,
    mixed_weight: Any,
    temperature: Any,
    key: Any,
  ) -> dict[str, Term]:
    mixed = []
    for i, (name, maps) in enumerate(zip(names[:-1], running.each(), strict=True)):
      drawn = None if key is None else jax.random.fold_in(key, i)  # dropout of its own on each path
      mixed.append(tails[name].apply(student.variables, maps, train=True, key=drawn)[0])
    said = (
      losses.soft_target_kl(one.logits, teacher.logits, temperature=temperature) for one in mixed
    )
    return {"back": Term(sum(said), weight=mixed_weight)}

  hyper = {"mixed_weight": mixed_weight, "temperature": temperature}
  return learned(modules, method, hyper, init=init)


def with_variables(network: Network) -> Network:
  """A network that in training puts out its own variables too, for a method that calls it again.

  Args:
    network: any.

  Returns:
    The network, with the same variables; deployed it is as ever.

  >>> from jaxdistill import networks
  >>> network = with_variables(networks.linen(networks.models.MLP([4], num_classes=3)))
  >>> variables = network.init(jax.random.key(0), jnp.zeros((1, 5)))
  >>> outputs, _ = network.apply(variables, jnp.zeros((1, 5)), train=True, key=None)
  >>> sorted(outputs.variables)
  ['params']
  """

  def apply(
    variables: PyTree, inputs: Any, *, train: bool, key: Any = None
  ) -> tuple[Outputs, dict[str, PyTree]]:
    outputs, state = network.apply(variables, inputs, train=train, key=key)
    return dataclasses.replace(outputs, variables=variables if train else None), state

  def of(made: Callable[..., Network]) -> Callable[..., Network]:
    return lambda *args: with_variables(made(*args))

  return dataclasses.replace(
    network,
    apply=apply,
    at_rest=None if network.at_rest is None else of(network.at_rest),
    at_use=None if network.at_use is None else of(network.at_use),
  )


def _apart(maps: Mapping[str, Any], teacher: Outputs, name: str, last: bool) -> jax.Array:
  """``[B]``: how far a map is from the teacher's; of the last layer, also what its head reads."""
  ours, theirs = maps[name], teacher.features[name]
  values = losses.hint_l2(ours, theirs)
  if not last:
    return values
  # A bridge's LeakyReLU leaves values below 0, which no map of the teacher's has.
  pooled = (jnp.mean(nn.relu(x.astype(compute_dtype(x))), axis=(1, 2)) for x in (ours, theirs))
  return values + losses.hint_l2(*pooled)


class _Bridge(nn.Module):
  """A convolution, BatchNorm, and a ReLU that leaves a tenth of what is below 0.

  Attributes:
    features: the teacher's channels.
    spatial: the teacher's height and width.
    axis_name: for BatchNorm, under ``pmap``.
  """

  features: int
  spatial: tuple[int, int]
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    options: Any = {"kernel_init": kaiming_init, "name": "conv"}
    if x.shape[1:3] == self.spatial:
      x = nn.Conv(self.features, (3, 3), padding=1, use_bias=False, **options)(x)
    else:
      # As FitNets' regressor, whose kernels for half and twice the size are the published ones.
      options |= {"use_norm": False, "use_relu": False}
      x = projectors.Conv(self.features, self.spatial, **options)(x, train=train)
    return nn.leaky_relu(batch_norm(self, train, "norm")(x), 0.1)


def _published(axis_name: str | None, student: Any, teacher: Any) -> nn.Module:
  """The bridge from shapes."""
  del student
  # The student's width does not matter: a convolution takes what comes.
  return _Bridge(teacher.shape[-1], tuple(teacher.shape[1:3]), axis_name)


def _check_tails(tails: Any, names: Sequence[str], argument: str) -> None:
  """Raises where there is not one network for each layer but the last."""
  if not isinstance(tails, Mapping) or not all(isinstance(n, Network) for n in tails.values()):
    raise TypeError(
      f"tails={_check.show(tails)} must map layers to networks that start there, "
      "as {'stage2': networks.linen(module.clone(after='stage2'), features=['stage3'])}."
    )
  if sorted(tails) != sorted(names[:-1]):
    raise ValueError(
      f"tails are of {sorted(tails)} and must be of {sorted(names[:-1])}: one for each of "
      f"{argument}={tuple(names)} but the last."
    )


def _check_tail(
  tail: Network, variables: PyTree, whole: Any, names: Sequence[str], argument: str
) -> None:
  """Raises where a tail's outputs have not the shapes of the whole's, from its own map on."""
  # By shapes, at the first step: the tail of another network may well take this one's map.
  start = feature(whole, names[0], argument)
  start = jax.ShapeDtypeStruct(start.shape, start.dtype)
  apply = functools.partial(tail.apply, train=False, key=None)
  try:
    seen, _ = jax.eval_shape(apply, variables, start)
  except (TypeError, ValueError) as error:
    raise ValueError(
      f"tails[{names[0]!r}] does not take the map {tuple(start.shape)} of that name with these "
      f"variables: {_check.short(error)}"
    ) from error
  said, want = (
    {name: tuple(feature(outputs, name, argument).shape) for name in names[1:]}
    | {"logits": getattr(outputs.logits, "shape", None)}
    for outputs in (seen, whole)
  )
  if said != want:
    raise ValueError(
      f"tails[{names[0]!r}] says {said} of the map {tuple(start.shape)} of that name, and the "
      f"whole network {want}: give the rest of this very network, and its variables."
    )
