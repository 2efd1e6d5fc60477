"""SimKD: the student predicts through a projector and the teacher's own classifier."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdistill import _check, losses
from jaxdistill.losses import pooling
from jaxdistill.networks.models.layers import batch_norm
from jaxdistill.recipes.parts import (
  Modules,
  Running,
  both_features,
  feature,
  hard_term,
  init_modules,
  layer_names,
  learned,
)
from jaxdistill.types import Batch, Deployed, Network, Objective, Outputs, Term, compute_dtype

__all__ = ["simkd"]

PyTree = Any


def simkd(
  classifier: PyTree,
  *,
  student_layer: str = "stage3",
  teacher_layer: str | None = None,
  simkd_weight: float = 1.0,
  hard_weight: float | None = 0.0,
  factor: int = 2,
  head: Callable[[PyTree, jax.Array], jax.Array] | None = None,
  projector: Callable[[Any, Any], nn.Module] | None = None,
  axis_name: str | None = None,
) -> Objective:
  """SimKD: the student's last map is made the teacher's, and the teacher's classifier reused.

  Chen, Mei, Zhang, Wang, Feng, Chen, "Knowledge Distillation with the Reused Teacher Classifier",
  2022. ``simkd_weight · hint_l2(projector(student map), teacher map) + hard_weight ·
  cross_entropy``. Of two maps of different sizes the larger is average-pooled to the smaller, the
  student's before the projector.

  What is trained to predict is the student up to ``student_layer``, then the projector, then the
  classifier: that is the deployed network, which `jaxdistill.train.fit` validates, returns and
  exports, with the parameters that the projector adds. To validate it, build the validator from
  ``objective.deployed.network(student)``. The student's own classifier is never used: it is not
  trained, and its classes need not be the teacher's.

  Args:
    classifier: the variables of the teacher's head, such as its
      ``teacher.variables["params"]["classifier"]`` with ``kernel`` ``[C, K]`` and ``bias``
      ``[K]``. They are kept in the objective's state, and never changed.
    student_layer: the student's last map ``[B, H, W, C]``.
    teacher_layer: the teacher's, which its head takes; the same name by default.
    simkd_weight: 1 in the published code.
    hard_weight: of the cross-entropy of what the deployed network predicts, through the
      projector's batch statistics. 0 in the published code; the term is logged all the same.
      None leaves it out.
    factor: by how much the projector's middle is narrower than the teacher's map, 2 in the
      published code; 4 and 8 are smaller and somewhat less accurate.
    head: ``(classifier, maps [B, H, W, C]) -> logits [B, K]``; by default the mean over positions,
      then a dense layer, as in all networks of `jaxdistill.networks.models` that end in maps.
    projector: ``(student, teacher) -> module`` from the two maps' shapes, as
      `recipes.projectors.between` is; by default the published 1x1, 3x3, 1x1 convolutions without
      bias, each with BatchNorm and ReLU.
    axis_name: the axis over which that projector's BatchNorm averages its statistics, under
      ``pmap``.

  Returns:
    An `Objective` with the terms ``labels`` and ``simkd``, and with `Objective.deployed`. It learns
    ``projector`` and remembers its statistics, ``classifier``, and ``target``: zeros of the size
    of the teacher's map that the projector leads to.

  Raises:
    TypeError: ``classifier`` has no kernel and ``head`` is not given, or an argument is of another
      kind than it must be.
    ValueError: a weight is negative; and when it is initialised, a layer is not there or no map, or
      the head does not take the teacher's map.

  >>> simkd({"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}).hyper
  {'simkd_weight': 1.0, 'hard_weight': 0.0}
  """
  layers = layer_names(student_layer, teacher_layer)
  _check.whole("factor", factor)
  if head is None:
    _check_dense(classifier)
  parts = _Parts(layers, head or _mean_and_dense, projector or _published(factor, axis_name))

  def modules(student: Outputs, teacher: Outputs | None) -> Modules:
    ours, theirs = parts.shapes(student, teacher)
    # The student is pooled in front of the projector, so that its 3 × 3 runs on the smaller map.
    target = _smaller(ours, theirs)
    pooled = jax.ShapeDtypeStruct((ours.shape[0], *target[:2], ours.shape[-1]), ours.dtype)
    return {"projector": (parts.module(pooled, target), pooled)}

  def init(key: Any, student: Outputs, teacher: Outputs | None) -> tuple[PyTree, PyTree]:
    params, state = init_modules(key, modules(student, teacher))
    ours, theirs = parts.shapes(student, teacher)
    # State and no parameter: nothing trains it, and it travels with checkpoint and export.
    kept = jax.tree.map(jnp.asarray, classifier)
    _check_head(parts.head, kept, theirs)
    # The deployed network never sees the teacher: this array of nothing has its map's shape.
    target = jnp.zeros(_smaller(ours, theirs), bool)
    return params, {**state, "classifier": kept, "target": target}

  def method(
    running: Running,
    student: Outputs,
    teacher: Outputs | None,
    batch: Batch,
    *,
    simkd_weight: Any,
    hard_weight: Any = None,
  ) -> dict[str, Term]:
    ours, theirs = both_features(student, teacher, layers)
    # [B, H, W, C] of the teacher's width. Once it equals the teacher's map, the classifier cannot
    # tell the two apart; so no term on the logits is needed.
    projected = running("projector", parts.pooled(ours, running.state["target"].shape))
    # Published with weight 1 and nothing beside it: the labels' default weight is 0, so that the
    # term is logged and changes nothing.
    terms = {"simkd": Term(losses.hint_l2(projected, theirs), weight=simkd_weight)}
    if hard_weight is not None:  # the labels, of what the deployed network predicts
      predicted = parts.head(running.state["classifier"], projected)
      terms = {"labels": hard_term(Outputs(predicted), batch, hard_weight), **terms}
    return terms

  hyper = {"simkd_weight": simkd_weight}
  hyper |= {} if hard_weight is None else {"hard_weight": hard_weight}
  deployed = Deployed(network=parts.network, variables=_together)
  return learned(modules, method, hyper, init=init, deployed=deployed)


def _smaller(ours: Any, theirs: Any) -> tuple[int, ...]:
  """The shape ``[H, W, C]`` that the projector leads to: the teacher's width, the smaller map."""
  # Only ever smaller: what a map has lost in pooling no projector brings back.
  sizes = zip(ours.shape[1:3], theirs.shape[1:3], strict=True)
  return (*map(min, sizes), theirs.shape[-1])


@dataclasses.dataclass(frozen=True)
class _Parts:
  """What training and the deployed network have in common."""

  layers: tuple[str, str]
  head: Callable[[PyTree, jax.Array], jax.Array]
  projector: Callable[[Any, Any], nn.Module]

  def shapes(self, student: Outputs, teacher: Outputs | None) -> tuple[Any, Any]:
    """Both maps; an error where one is none."""
    pair = both_features(student, teacher, self.layers)
    for argument, name, x in zip(
      ("student_layer", "teacher_layer"), self.layers, pair, strict=True
    ):
      if len(x.shape) != 4:
        raise ValueError(
          f"{argument}={name!r} has the shape {tuple(x.shape)}, which is no map [B, H, W, C]; name "
          "the last layer before the pooling."
        )
    return pair

  def pooled(self, maps: jax.Array, target: tuple[int, ...]) -> jax.Array:
    """The student's map in the size that the projector leads to."""
    dtype = compute_dtype(maps)
    return pooling.average_pool(maps.astype(dtype), *target[:2])

  def module(self, pooled: Any, target: tuple[int, ...]) -> nn.Module:
    """The projector from one map's shape to the other's."""
    shape = (*pooled.shape[:1], *target)
    return self.projector(pooled, jax.ShapeDtypeStruct(shape, pooled.dtype))

  def network(self, student: Network) -> Network:
    """The student, the projector and the classifier as one network."""

    # A random projector in front of a trained classifier would be a network of nobody's.
    def init(key: Any, inputs: Any) -> dict[str, PyTree]:
      raise NotImplementedError(
        f"{name!r} is made by training: take the variables that train.fit returns."
      )

    def apply(
      variables: PyTree, inputs: Any, *, train: bool, key: Any
    ) -> tuple[Outputs, dict[str, PyTree]]:
      params = variables["params"]
      # The student's own logits are computed and dropped; a compiler leaves them out.
      outputs, updated = student.apply(
        {"params": params["student"], **variables["student"]}, inputs, train=train, key=key
      )
      target = variables["target"].shape
      pooled = self.pooled(feature(outputs, self.layers[0], "student_layer"), target)
      module = self.module(pooled, target)
      # In inference the projector's BatchNorms use their averages, like all the rest.
      known = {"params": params["projector"], **variables["projector"]}
      if train:
        projected, moved = module.apply(
          known, pooled, train=True, mutable=list(variables["projector"])
        )
      else:
        projected, moved = module.apply(known, pooled, train=False), {}
      logits = self.head(params["classifier"], projected)
      # Both parts may hold statistics: what moved replaces what was there, the rest stays.
      state = {"student": updated, "projector": moved} if train else {}
      state = {part: {**variables[part], **new} for part, new in state.items()}
      return Outputs(logits=logits, features=outputs.features), state

    name = f"{student.name} through the reused classifier"
    return Network(init=init, apply=apply, name=name)


def _together(student: PyTree, params: PyTree, state: PyTree) -> dict[str, PyTree]:
  """The deployed network's variables."""
  # One tree that is trained, saved and exported as any network's: parameters together, statistics
  # by the part that they belong to.
  collections = {name: value for name, value in student.items() if name != "params"}
  return {
    "params": {
      "student": student["params"],
      "projector": params["projector"],
      "classifier": state["classifier"],
    },
    "student": collections,
    "projector": dict(state.get("projector", {})),
    "target": state["target"],
  }


def _published(factor: int, axis_name: str | None) -> Callable[[Any, Any], nn.Module]:
  """The projector from shapes."""

  def projector(student: Any, teacher: Any) -> nn.Module:
    del student
    # The student's width does not matter: the first 1 × 1 convolution takes what comes.
    channels = teacher.shape[-1]
    if channels < factor:
      raise ValueError(f"factor={factor} is more than the teacher's {channels} channels.")
    return _Bottleneck(channels, channels // factor, axis_name)

  return projector


class _Bottleneck(nn.Module):
  """1x1, 3x3 and 1x1 convolutions, each with BatchNorm and ReLU.

  Attributes:
    features: the teacher's channels.
    middle: channels between.
    axis_name: for BatchNorm, under ``pmap``.
  """

  features: int
  middle: int
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    # Narrow, so that what the deployed student carries beside itself stays small.
    widths = (self.middle, self.middle, self.features)
    for i, (channels, size) in enumerate(zip(widths, (1, 3, 1), strict=True), start=1):
      x = nn.Conv(channels, (size, size), padding=size // 2, use_bias=False, name=f"conv{i}")(x)
      x = nn.relu(batch_norm(self, train, f"norm{i}")(x))
    return x


def _mean_and_dense(classifier: PyTree, maps: jax.Array) -> jax.Array:
  """Logits of a head that averages over positions and then is linear."""
  # [B, H, W, C] to [B, C] to [B, K], in float32 at least, as the teacher's own head computes.
  pooled = jnp.mean(maps.astype(compute_dtype(maps, classifier["kernel"])), axis=(1, 2))
  logits = pooled @ classifier["kernel"].astype(pooled.dtype)
  if "bias" not in classifier:
    return logits
  return logits + jnp.expand_dims(classifier["bias"].astype(pooled.dtype), 0)


def _check_dense(classifier: Any) -> None:
  """Raises where the classifier is no dense layer, which the default head is."""
  known = isinstance(classifier, Mapping) and {"kernel"} <= set(classifier) <= {"kernel", "bias"}
  if not known or jnp.ndim(classifier["kernel"]) != 2:
    raise TypeError(
      "classifier must be a dense layer's {'kernel': [C, K], 'bias': [K]}, such as "
      'teacher.variables["params"]["classifier"]; for another head give head=, a function '
      f"(classifier, maps) -> logits. Got {_check.show(classifier)}."
    )


def _check_head(head: Callable[..., Any], classifier: PyTree, maps: Any) -> None:
  """Raises where the head does not take the teacher's map."""
  # By shapes, at the first step and not after a run: the classifier of another teacher may well fit
  # the student's map and not this teacher's.
  try:
    logits = jax.eval_shape(head, classifier, jax.ShapeDtypeStruct(maps.shape, maps.dtype))
  except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
    raise ValueError(
      f"the head does not take the teacher's map {tuple(maps.shape)} with the classifier's "
      f"{jax.tree.map(jnp.shape, classifier)}: {_check.short(error)} Give the classifier of "
      "this very teacher, and the layer that it follows (teacher_layer)."
    ) from error
  if getattr(logits, "ndim", 0) != 2 or logits.shape[0] != maps.shape[0]:
    raise ValueError(f"head must return logits [B, K], got {_check.show(logits)}.")
