"""FCFD: what a student's map means to the teacher's own later stages."""

from __future__ import annotations

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

__all__ = ["fcfd"]

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
  with ``--extra_type s2t``. Left out is the other half of its default, in which the student's later
  stages also go on from the teacher's maps, and two of all mixed paths are drawn for each step;
  here those from the student to the teacher all count, which are two for three stages. Its teacher
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
  _check_tails(tails, names)
  made = projector or functools.partial(_published, axis_name)

  def modules(student: Outputs, teacher: Outputs | None) -> Modules:
    found = map_pairs(student, teacher, pairs)
    return {f"bridge{i}": (made(ours, theirs), ours) for i, (ours, theirs) in enumerate(found)}

  def init(key: Any, student: Outputs, teacher: Outputs | None) -> tuple[PyTree, PyTree]:
    params, state = init_modules(key, modules(student, teacher))
    for name in tails:
      _check_tail(tails[name], variables, teacher, names[names.index(name) :])
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


def _check_tails(tails: Any, names: Sequence[str]) -> None:
  """Raises where there is not one network for each layer but the last."""
  if not isinstance(tails, Mapping) or not all(isinstance(n, Network) for n in tails.values()):
    raise TypeError(
      f"tails={_check.show(tails)} must map the teacher's layers to networks that start there, "
      "as {'stage2': networks.linen(module.clone(after='stage2'), features=['stage3'])}."
    )
  if sorted(tails) != sorted(names[:-1]):
    raise ValueError(
      f"tails are of {sorted(tails)} and must be of {sorted(names[:-1])}: one for each of "
      f"teacher_layers={tuple(names)} but the last."
    )


def _check_tail(tail: Network, variables: PyTree, teacher: Any, names: Sequence[str]) -> None:
  """Raises where a tail's outputs have not the shapes of the teacher's, from its own map on."""
  # By shapes, at the first step: the tail of another network may well take this teacher's map.
  start = feature(teacher, names[0], "teacher_layers")
  start = jax.ShapeDtypeStruct(start.shape, start.dtype)
  apply = functools.partial(tail.apply, train=False, key=None)
  try:
    seen, _ = jax.eval_shape(apply, variables, start)
  except (TypeError, ValueError) as error:
    raise ValueError(
      f"tails[{names[0]!r}] does not take the teacher's map {tuple(start.shape)} with these "
      f"variables: {_check.short(error)}"
    ) from error
  said, want = (
    {name: tuple(feature(outputs, name, "teacher_layers").shape) for name in names[1:]}
    | {"logits": getattr(outputs.logits, "shape", None)}
    for outputs in (seen, teacher)
  )
  if said != want:
    raise ValueError(
      f"tails[{names[0]!r}] says {said} of the teacher's map {tuple(start.shape)}, and the teacher "
      f"{want}: give the rest of this very teacher, and its variables."
    )
