"""What the recipes that relate examples share: one feature of each network, and who takes part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxdistill import arguments, projectors
from jaxdistill.recipes._pieces import Running, feature, init_modules
from jaxdistill.types import Batch, Outputs, compute_dtype

__all__ = ["both_features", "check_layers", "embed", "init_embeddings", "present"]

PyTree = Any


def check_layers(student_layer: Any, teacher_layer: Any) -> tuple[str, str]:
  """The names of both features, the teacher's being the student's where it is None.

  >>> check_layers("pooled", None)
  ('pooled', 'pooled')
  """
  teacher_layer = student_layer if teacher_layer is None else teacher_layer
  for argument, layer in (("student_layer", student_layer), ("teacher_layer", teacher_layer)):
    if not isinstance(layer, str):
      raise TypeError(f"{argument}={arguments.show(layer)} must be a feature's name.")
  return student_layer, teacher_layer


def both_features(
  student: Outputs, teacher: Outputs | None, layers: tuple[str, str]
) -> tuple[Any, Any]:
  """The features of both networks, or their shapes; an error that names the one that is missing.

  >>> outputs = Outputs(features={"a": jnp.ones((2, 3))})
  >>> [x.shape for x in both_features(outputs, outputs, ("a", "a"))]
  [(2, 3), (2, 3)]
  """
  ours = feature(student, layers[0], "student_layer")
  return ours, feature(teacher, layers[1], "teacher_layer")


def present(batch: Batch) -> jax.Array:
  """Which examples are no padding, ``[B]``.

  >>> from jaxdistill.types import make_batch
  >>> present(make_batch(jnp.ones((2, 1)), weight=jnp.array([1.0, 0.0]))).tolist()
  [True, False]
  """
  there = batch.weight > 0
  return jnp.any(there, axis=tuple(range(1, there.ndim)))


def init_embeddings(
  key: Any, student: Outputs, teacher: Outputs | None, layers: tuple[str, str], width: int
) -> dict[str, PyTree]:
  """Parameters of a linear map for either network's flattened feature.

  >>> outputs = Outputs(features={"a": jnp.ones((1, 2, 3))})
  >>> params = init_embeddings(jax.random.key(0), outputs, outputs, ("a", "a"), 4)
  >>> params["teacher"]["dense"]["kernel"].shape
  (6, 4)
  """
  shapes = jax.eval_shape(lambda pair: [_flat(x) for x in pair], _pair(student, teacher, layers))
  modules = {
    name: (projectors.Linear(width), shape)
    for name, shape in zip(("student", "teacher"), shapes, strict=True)
  }
  return init_modules(key, modules)[0]


def embed(
  params: Mapping[str, PyTree],
  student: Outputs,
  teacher: Outputs | None,
  layers: tuple[str, str],
  width: int,
  where: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Both networks' flattened features in the embeddings' width, ``[B, width]``.

  Features of examples that are not in ``where`` count as 0: whatever they hold, the gradient of
  the linear map multiplies it.

  >>> outputs = Outputs(features={"a": jnp.ones((1, 2, 3))})
  >>> params = init_embeddings(jax.random.key(0), outputs, outputs, ("a", "a"), 4)
  >>> where = jnp.ones(1, bool)
  >>> [x.shape for x in embed(params, outputs, outputs, ("a", "a"), 4, where)]
  [(1, 4), (1, 4)]
  """
  running = Running(params, {})
  linear = projectors.Linear(width)

  def embedded(name: str, x: jax.Array) -> jax.Array:
    return running(name, linear, jnp.where(where[:, None], _flat(x), 0.0))

  ours, theirs = both_features(student, teacher, layers)
  return embedded("student", ours), embedded("teacher", theirs)


def _pair(student: Outputs, teacher: Outputs | None, layers: tuple[str, str]) -> tuple[Any, Any]:
  """The features as shapes, of which alone an initialiser needs to know."""
  pair = both_features(student, teacher, layers)
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), pair)


def _flat(x: jax.Array) -> jax.Array:
  return x.reshape(x.shape[0], -1).astype(compute_dtype(x))
