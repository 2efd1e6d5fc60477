"""Methods that look at features through a classifier: SRRL the teacher's, CAT-KD each its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import _check, losses
from jaxdistill.networks.models.layers import kaiming_init
from jaxdistill.recipes import projectors
from jaxdistill.recipes.parts import (
  Modules,
  Running,
  feature,
  hard_term,
  head_of,
  init_modules,
  layer_names,
  learned,
  map_pairs,
  recipe,
)
from jaxdistill.types import Batch, Network, Number, Objective, Outputs, Term, compute_dtype

__all__ = ["catkd", "srrl", "with_class_maps"]

PyTree = Any


def with_class_maps(
  network: Network,
  *,
  layer: str = "stage3",
  classifier: str = "classifier",
  name: str = "class_maps",
  bias: bool = False,
) -> Network:
  """A network that also puts out where in the image the evidence for each class is.

  ``[B, H, W, K]``, the map at ``layer`` times the classifier's kernel: a classifier of the mean
  over positions is the mean of the classifier at each position, so that their mean is the logit but
  for the bias, which has no place in the image. Nothing else of the network changes, and no
  parameter is added; the kernel gets a gradient through its maps.

  Args:
    network: captures ``layer``; between that and the classifier there is the mean over positions
      and nothing else.
    layer: a map ``[B, H, W, C]`` among its features.
    classifier: the path of a dense layer among its parameters, ``kernel`` ``[C, K]``.
    name: the new feature's.
    bias: whether the classifier's bias is added at each position, so that the maps' mean is the
      logits to rounding: what `logits.sdd` takes.

  Returns:
    The network, with the same variables.

  Raises:
    ValueError: when it is applied, there is no such layer or classifier, or they do not fit.

  >>> from jaxdistill import networks
  >>> plain = networks.linen(networks.models.resnet8(10), features=["stage3"])
  >>> network = with_class_maps(plain)
  >>> x = jnp.zeros((1, 8, 8, 3))
  >>> shapes = jax.eval_shape(network.init, jax.random.key(0), x)
  >>> seen, _ = jax.eval_shape(lambda v: network.apply(v, x, train=False, key=None), shapes)
  >>> seen.features["class_maps"].shape
  (1, 2, 2, 10)
  """

  def apply(
    variables: Mapping[str, PyTree], inputs: Any, *, train: bool, key: Any = None
  ) -> tuple[Outputs, dict[str, PyTree]]:
    outputs, state = network.apply(variables, inputs, train=train, key=key)
    maps = feature(outputs, layer, "layer")
    head = head_of(variables, classifier, maps, f"{layer!r} of {network.name}")
    dtype = compute_dtype(maps)
    made = jnp.matmul(maps.astype(dtype), jnp.asarray(head["kernel"], dtype))
    if bias and "bias" in head:
      made = made + jnp.asarray(head["bias"], dtype)[None, None, None]
    features = {**outputs.features, name: made}
    return dataclasses.replace(outputs, features=features), state

  def at_rest(paths: Collection[str]) -> Network:
    assert network.at_rest is not None
    rested = network.at_rest(paths)
    return with_class_maps(rested, layer=layer, classifier=classifier, name=name, bias=bias)

  return dataclasses.replace(
    network, apply=apply, at_rest=None if network.at_rest is None else at_rest
  )


def _check_catkd(student_layer: Any, teacher_layer: Any, size: Any) -> None:
  layer_names(student_layer, teacher_layer)
  _check.whole("size", size)


@recipe(check=_check_catkd)
def catkd(
  student: Outputs,
  teacher: Outputs | None,
  batch: Batch,
  *,
  student_layer: str = "class_maps",
  teacher_layer: str | None = None,
  size: int = 2,
  normalize: bool = False,
  cat_weight: Number = 15.0,
  hard_weight: Number | None = 1.0,
) -> dict[str, Term]:
  """Class attention transfer (CAT-KD): where the evidence for each class is, and the labels.

  ``hard_weight * cross_entropy + cat_weight * class_attention``, of both networks' class activation
  maps, which `with_class_maps` makes of any network that classifies a mean over positions::

      student, wide = with_class_maps(small), Model(with_class_maps(large), variables)

  Args:
    student_layer: maps ``[B, H, W, K]`` of the classes.
    teacher_layer: the teacher's; None for the same name.
    size: what both are average-pooled to; 2 in the published code, 4 with a ShuffleNet and for
      ResNet-18 on ImageNet.
    normalize: whether each class's map is divided by its norm; False in the published code for
      pairs of one style, True for others.
    cat_weight: 15 in the published code for ResNet-32x4 to 8x4; 0.7 to 600 for others (12 for
      WRN-40-2 to 16-2, 600 for ShuffleNets, whose maps are normalised), 0.5 for ResNet-18 on
      ImageNet. Its README: the term should be 1 to 50 after an epoch. A keyword of the objective.
    hard_weight: 1 there; a keyword of the objective. None leaves the labels out.

  Returns:
    An objective with the terms ``labels`` and ``attention``.

  The published code rebuilds both networks without the classifier's bias, the teacher's trained one
  too; here both keep theirs in the logits, and the maps have none.

  Source: Guo, Yan, Li, Lu, "Class Attention Transfer Based Knowledge Distillation", 2023.

  >>> catkd().hyper
  {'cat_weight': 15.0, 'hard_weight': 1.0}
  """
  ((ours, theirs),) = map_pairs(student, teacher, [layer_names(student_layer, teacher_layer)])
  # [B]. Channels are classes in both networks, so that no projector stands between them.
  values = losses.class_attention(ours, theirs, size=size, normalize=normalize)
  return {
    "labels": hard_term(student, batch, hard_weight),
    "attention": Term(values, weight=cat_weight),
  }


def srrl(
  classifier: PyTree,
  *,
  student_layer: str = "stage3",
  teacher_layer: str | None = None,
  feature_weight: float = 1.0,
  regression_weight: float = 1.0,
  hard_weight: float | None = 1.0,
  axis_name: str | None = None,
) -> Objective:
  """Softmax regression (SRRL): the student's feature is to mean the same to the teacher's head.

  ``hard_weight * cross_entropy + feature_weight * hint_l2 + regression_weight * logit_l2``. The
  student's map goes through a connector (``connector``: 1 x 1 convolution without bias, BatchNorm,
  ReLU) to the teacher's width, where its mean over positions is compared with the teacher's, and
  what the teacher's classifier says of it with the teacher's logits. The classifier is state and
  never changes; the gradient passes through it. The student is deployed with its own.

  Args:
    classifier: the variables of the teacher's head, such as its
      ``teacher.variables["params"]["classifier"]`` with ``kernel`` ``[C, K]`` and maybe ``bias``
      ``[K]``.
    student_layer: the last map, as in the published code.
    teacher_layer: the teacher's, whose mean over positions its classifier reads; None for the same
      name.
    feature_weight: 1 in the published code; a keyword of the objective.
    regression_weight: 1 there for ImageNet, 5 in cls_KD for CIFAR-100; a keyword of the objective.
    hard_weight: 1 in both; a keyword of the objective. None leaves the labels out.
    axis_name: the mapped axis over which the connector's BatchNorm averages, under ``pmap``.

  Returns:
    An `Objective` with the terms ``labels``, ``feature`` and ``regression``.

  Raises:
    ValueError: when it is initialised, a layer is missing or no map, or the classifier does not
      read the teacher's width.

  Source: Yang, Martinez, Bulat, Tzimiropoulos, "Knowledge Distillation via Softmax Regression
  Representation Learning", 2021.

  >>> srrl({"kernel": jnp.ones((4, 3))}).hyper
  {'feature_weight': 1.0, 'regression_weight': 1.0, 'hard_weight': 1.0}
  """
  layers = layer_names(student_layer, teacher_layer)

  def modules(student: Outputs, teacher: Outputs | None) -> Modules:
    ((ours, theirs),) = map_pairs(student, teacher, [layers])
    module = projectors.Conv(
      theirs.shape[-1],
      tuple(ours.shape[1:3]),
      use_bias=False,
      kernel_init=kaiming_init,
      axis_name=axis_name,
    )
    return {"connector": (module, ours)}

  def init(key: Any, student: Outputs, teacher: Outputs | None) -> tuple[PyTree, PyTree]:
    params, state = init_modules(key, modules(student, teacher))
    theirs = map_pairs(student, teacher, [layers])[0][1]
    kernel: Any = classifier.get("kernel") if isinstance(classifier, Mapping) else None
    if np.ndim(kernel) != 2 or np.shape(kernel)[0] != theirs.shape[-1]:
      raise ValueError(
        f"classifier has a kernel {np.shape(kernel) or None} for the teacher's {layers[1]!r} "
        f"{tuple(theirs.shape)}; give the dense layer [C, K] that reads its mean, "
        "teacher.variables['params']['classifier'], say."
      )
    # State and no parameter: nothing trains it, and it travels with the checkpoint.
    return params, {**state, "classifier": jax.tree.map(jnp.asarray, classifier)}

  def method(
    running: Running,
    student: Outputs,
    teacher: Outputs,
    batch: Batch,
    *,
    feature_weight: Any,
    regression_weight: Any,
  ) -> dict[str, Term]:
    head, theirs = running.state["classifier"], teacher.features[layers[1]]
    connected = running("connector")
    pooled = jnp.mean(connected.astype(compute_dtype(connected)), axis=(1, 2))  # [B, C]
    taught = jnp.mean(theirs.astype(compute_dtype(theirs)), axis=(1, 2))
    kernel = jnp.asarray(head["kernel"], pooled.dtype)
    read = jnp.matmul(pooled, kernel)
    if "bias" in head:
      read = read + jnp.asarray(head["bias"], read.dtype)[None]
    return {
      "feature": Term(losses.hint_l2(pooled, taught), weight=feature_weight),
      "regression": Term(losses.logit_l2(read, teacher.logits), weight=regression_weight),
    }

  hyper = {"feature_weight": feature_weight, "regression_weight": regression_weight}
  return learned(modules, method, hyper, hard_weight, init=init)
