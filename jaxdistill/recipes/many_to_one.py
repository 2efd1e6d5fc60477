"""NORM: the student's last map, expanded to several segments that are each the teacher's map.

The expansion is a linear block inside the student, trained with it (`with_many_to_one`), and folded
into its classifier when it is done (`fold_many_to_one`): the deployed student is the plain one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxdistill import _check, losses
from jaxdistill.networks.models.layers import batch_norm, kaiming_init
from jaxdistill.recipes.parts import (
  EPOCH,
  at_a_step,
  feature,
  hard_term,
  head_of,
  map_pairs,
  recipe,
)
from jaxdistill.types import Batch, Model, Network, Number, Outputs, Term, compute_dtype

__all__ = ["fold_many_to_one", "many_to_one", "sharpened", "with_many_to_one"]

PyTree = Any
# Of BatchNorm, as `batch_norm` has it.
_EPSILON = 1e-5


class _Block(nn.Module):
  """To several times the teacher's width and back: linear, so that it can be folded away."""

  width: int
  axis_name: str | None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
    # A 1 x 1 convolution is a dense layer at each position.
    options: Any = {"use_bias": False, "kernel_init": kaiming_init}
    wide = nn.Dense(self.width, name="conv1", **options)(x)
    wide = batch_norm(self, train, "norm1")(wide)
    back = nn.Dense(x.shape[-1], name="conv2", **options)(wide)
    return wide, batch_norm(self, train, "norm2")(back)


def with_many_to_one(
  network: Network,
  width: int,
  *,
  segments: int = 8,
  layer: str = "stage3",
  classifier: str = "classifier",
  name: str = "many_to_one",
  axis_name: str | None = None,
) -> Network:
  """A student with NORM's block behind its last map: expanded, matched, and added back.

  The map at ``layer`` goes through a 1 x 1 convolution to ``segments * width`` channels and a
  BatchNorm, which is the new feature ``name``, and through another pair back to its own width,
  where it is added to the map; the classifier reads the mean of the sum. Nothing else sees the
  block: other features are as without it.

  Args:
    network: captures ``layer``; between that and the classifier there is the mean over positions
      and nothing else.
    width: the teacher's channels, at the layer that is matched.
    segments: N; 8 in the published scripts, 4 by its program's default.
    layer: a map ``[B, H, W, C]`` among its features.
    classifier: the path of a dense layer among its parameters, ``kernel`` ``[C, K]``.
    name: of the block's variables, and of the new feature ``[B, H, W, segments * width]``.
    axis_name: the mapped axis over which the block's BatchNorms average, under ``pmap``.

  Returns:
    The network; its variables have the block's beside the network's own.

  Raises:
    ValueError: ``width`` or ``segments`` is out of range; when it is applied, there is no such
      layer or classifier, or they do not fit.
    TypeError: one of them is no whole number.

  >>> from jaxdistill import networks
  >>> plain = networks.linen(networks.models.resnet8(10), features=["stage3"])
  >>> network, x = with_many_to_one(plain, 6, segments=2), jnp.zeros((1, 8, 8, 3))
  >>> shapes = jax.eval_shape(network.init, jax.random.key(0), x)
  >>> seen, _ = jax.eval_shape(lambda v: network.apply(v, x, train=False, key=None), shapes)
  >>> seen.features["many_to_one"].shape, seen.logits.shape
  ((1, 2, 2, 12), (1, 10))
  """
  _check.whole("width", width)
  _check.whole("segments", segments)
  block = _Block(segments * width, axis_name)

  def init(key: Any, inputs: Any) -> dict[str, PyTree]:
    variables = network.init(key, inputs)
    shapes, _ = jax.eval_shape(lambda v: network.apply(v, inputs, train=False, key=None), variables)
    maps = jnp.zeros(feature(shapes, layer, "student_layer").shape, jnp.float32)
    own = block.init(jax.random.fold_in(key, 1), maps, train=False)
    return {
      collection: {
        **variables.get(collection, {}),
        **({name: own[collection]} if collection in own else {}),
      }
      for collection in {**variables, **own}
    }

  def apply(
    variables: Mapping[str, PyTree], inputs: Any, *, train: bool, key: Any = None
  ) -> tuple[Outputs, dict[str, PyTree]]:
    own = {c: tree[name] for c, tree in variables.items() if name in tree}
    outputs, state = network.apply(_without(variables, name), inputs, train=train, key=key)
    maps = feature(outputs, layer, "student_layer")
    if train:
      (wide, back), moved = block.apply(own, maps, train=True, mutable=["batch_stats"])
      statistics = {**state.get("batch_stats", {}), name: moved["batch_stats"]}
      state = {**state, "batch_stats": statistics}
    else:
      wide, back = block.apply(own, maps, train=False)
    head = head_of(variables, classifier, maps, f"{layer!r} of {network.name}")
    dtype = compute_dtype(back)
    # The classifier of the mean of a sum: what the network says already, and what is added to it.
    added = jnp.mean(back.astype(dtype), axis=(1, 2)) @ jnp.asarray(head["kernel"], dtype)
    features = {**outputs.features, name: wide}
    logits = outputs.logits + added.astype(outputs.logits.dtype)
    return dataclasses.replace(outputs, logits=logits, features=features), state

  return dataclasses.replace(network, init=init, apply=apply, at_rest=None)


def _without(variables: Mapping[str, PyTree], name: str) -> dict[str, PyTree]:
  """Variables without the block's."""
  return {
    collection: {n: value for n, value in tree.items() if n != name}
    for collection, tree in variables.items()
  }


def fold_many_to_one(
  model: Model, network: Network, *, classifier: str = "classifier", name: str = "many_to_one"
) -> Model:
  """The student alone, its classifier changed by what the block has added: the same function.

  W' = (I + C1 C2) W, C1 and C2 the convolutions with their BatchNorms folded in: the block is
  linear, and so are the mean over positions and the classifier behind it.

  Args:
    model: a trained student of `with_many_to_one`; of several seeds too.
    network: the one that was given there.
    classifier: as there; with a bias.
    name: as there.

  Returns:
    The model of ``network``, whose logits in inference are the same to rounding.

  Raises:
    ValueError: there is no such block, or the classifier has no bias to take the block's.
  """
  params = model.variables["params"]
  if name not in params:
    raise ValueError(
      f"model has no block {name!r} among its parameters {sorted(params)}: give a model of "
      "recipes.with_many_to_one."
    )
  own, seen = params[name], model.variables["batch_stats"][name]
  dtype = jnp.promote_types(own["conv1"]["kernel"].dtype, jnp.float32)
  wide, wide_bias = _folded(own["conv1"], own["norm1"], seen["norm1"], dtype)
  back, back_bias = _folded(own["conv2"], own["norm2"], seen["norm2"], dtype)
  rest = _without(model.variables, name)
  path = classifier.split("/")
  head = rest["params"]
  for part in path:
    head = head[part]
  if "bias" not in head:
    raise ValueError(f"classifier={classifier!r} has no bias, and the block has one to be folded.")
  kernel = head["kernel"].astype(dtype)
  # Leaves may have an axis over seeds in front. [C, C]: what the block makes of each channel.
  through = wide @ back
  moved = {
    "kernel": kernel + through @ kernel,
    "bias": head["bias"].astype(dtype) + _row(_row(wide_bias, back) + back_bias, kernel),
  }
  moved = {n: value.astype(head[n].dtype) for n, value in moved.items()}
  params = _replaced(rest["params"], path, {**head, **moved})
  return Model(network, {**rest, "params": params}, model.seeds)


def _folded(conv: PyTree, norm: PyTree, seen: PyTree, dtype: Any) -> tuple[jax.Array, jax.Array]:
  """A convolution and its BatchNorm in inference: kernel ``[..., C, D]`` and bias ``[..., D]``."""
  scale = norm["scale"].astype(dtype) / jnp.sqrt(seen["var"].astype(dtype) + _EPSILON)
  bias = norm["bias"].astype(dtype) - seen["mean"].astype(dtype) * scale
  return conv["kernel"].astype(dtype) * scale[..., None, :], bias


def _row(vector: jax.Array, matrix: jax.Array) -> jax.Array:
  """``[..., C]`` times ``[..., C, D]``."""
  return (vector[..., None, :] @ matrix)[..., 0, :]


def _replaced(tree: PyTree, path: list[str], value: PyTree) -> PyTree:
  first, *rest = path
  return {**tree, first: _replaced(tree[first], rest, value) if rest else value}


def _stairs(run_steps: Any) -> Any:
  """NORM's share of its weight over the run: 0.1, 0.5, 1, 0.5 and 0.1, as published for CIFAR."""
  _check.whole("run_steps", run_steps, least=0, instead=": 0 is the full weight throughout")
  if not run_steps:
    return 1.0
  # Up at epochs 10 and 20 of 240, down at 180 and 210.
  changes = {10: 5.0, 20: 2.0, 180: 0.5, 210: 0.2}
  at = {round(run_steps * epoch / 240): factor for epoch, factor in changes.items()}
  return optax.piecewise_constant_schedule(0.1, at)


@recipe(follows={"norm_share": _stairs})
def many_to_one(
  student: Outputs,
  teacher: Outputs | None,
  batch: Batch,
  *,
  student_layer: str = "many_to_one",
  teacher_layer: str = "stage3",
  norm_weight: Number = 1.0,
  soft_weight: Number | None = None,
  hard_weight: Number | None = 1.0,
  temperature: Number = 4.0,
  sharpness: Number | None = 2.5,
  run_steps: int = 240 * EPOCH,
  norm_share: Number = 1.0,
) -> dict[str, Term]:
  """NORM: the student's expanded map in several segments, each of them the teacher's map.

  ``hard_weight * cross_entropy + norm_share * norm_weight * many_to_one``, and with a
  ``soft_weight`` soft targets. The student is `with_many_to_one`; `fold_many_to_one` makes the
  plain one of it.

  Source: Liu, Li, Li, Yao, "NORM: Knowledge Distillation via N-to-One Representation Matching",
  2023. What its paper does not say is in its code, and here: the logits of both networks are
  normalised over the classes and multiplied by 2.5 in front of the labels' term and the soft
  targets, and the weight rises and falls in stairs over the run. On ImageNet the stairs are at
  epochs 5, 15, 60 and 80 of 100, with 0.9 at the top.

  Args:
    student_layer: the block's feature ``[B, H, W, N * C]``.
    teacher_layer: the teacher's last map ``[B, H, W, C]``.
    norm_weight: 1 in the published code. It, the other weights, the temperature and the sharpness
      are keywords of the objective.
    soft_weight: of the soft targets; None, as in NORM without KD, leaves them out.
    hard_weight: of the labels; the published scripts try 1/16, 1/8, 1/4 and 1/2 for each pair on
      CIFAR-100, and have 1 for ResNet-18 and 1/8 for MobileNet on ImageNet; 1 by its program's
      default. None leaves that term out.
    temperature: of the soft targets.
    sharpness: what normalised logits are multiplied by; None takes the logits as they are. Which
      class is largest does not change, but the deployed network's own probabilities are not those
      that were trained.
    run_steps: the steps of the run, over which the keyword ``norm_share`` goes in stairs; 240
      epochs of CIFAR-100 at batch size 64 by default. 0 is 1 throughout.
    norm_share: that keyword, of the objective; what ``run_steps`` says by default.

  Returns:
    An objective with the terms ``labels``, ``norm`` and maybe ``soft``. Unlabelled examples take
    part in the latter two only.

  Raises:
    ValueError: ``run_steps`` is negative; at the first step, a layer is missing or no map.
    TypeError: it is no whole number.

  >>> float(many_to_one(run_steps=240).hyper["norm_share"](15))
  0.5
  """
  del run_steps  # of which norm_share is the schedule, and here the number of this step
  ((ours, theirs),) = map_pairs(student, teacher, [(student_layer, teacher_layer)])
  # [B]. Each of the segments is a guess of its own at the teacher's map: more room than one
  # projection has, and none of it is left in the deployed network.
  values = losses.many_to_one(ours, theirs)
  seen = student if sharpness is None else sharpened(student, sharpness)
  terms = {
    "labels": hard_term(seen, batch, hard_weight),
    "norm": Term(values, weight=at_a_step("norm_share", norm_share) * norm_weight),
  }
  if soft_weight is not None and teacher is not None:
    taught = teacher if sharpness is None else sharpened(teacher, sharpness)
    soft = losses.soft_target_kl(seen.logits, taught.logits, temperature=temperature)
    terms["soft"] = Term(soft, weight=soft_weight)
  return terms


def sharpened(outputs: Outputs, sharpness: Any) -> Outputs:
  """Logits of mean 0 and, but for the floor under it, of this standard deviation.

  Args:
    outputs: a network's.
    sharpness: the standard deviation.

  >>> sharpened(Outputs(jnp.array([[1.0, 3.0]])), 2.0).logits.round(3).tolist()
  [[-2.0, 2.0]]
  """
  logits = jnp.asarray(outputs.logits).astype(compute_dtype(outputs.logits))
  centred = logits - jnp.mean(logits, axis=-1, keepdims=True)
  # The biased variance with 1e-7 inside of the root: a LayerNorm, where LSKD has neither.
  spread = jnp.sqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + 1e-7)
  return Outputs(jnp.asarray(sharpness, logits.dtype) * centred / spread)
