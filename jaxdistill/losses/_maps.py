"""What the losses on features and relations are made of: one size, pooling, units, products.

Private to `jaxdistill.losses`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from jaxdistill.losses._log_space import AnyArray, counted, float_arrays
from jaxdistill.losses.pooling import average_pool

__all__ = [
  "SMALLEST_NORM",
  "Features",
  "Maps",
  "Mask",
  "both_maps",
  "huber",
  "map_pair",
  "norm",
  "pair",
  "product",
  "rows",
  "same_width",
  "tame",
  "unit",
]

# A feature of a batch, whatever its other axes; one that is a map ``[B, H, W, C]``; and which
# examples take part.
Features = Float[AnyArray, "B ..."]
Maps = Float[AnyArray, "B _ _ _"]
Mask = Shaped[AnyArray, " B"] | None
# What PyTorch's normalize divides by at least.
SMALLEST_NORM = 1e-12
# Squares of larger numbers come near float32's end.
LARGEST = 1e9
# Accelerators round the factors of a float32 product by default; a loss must not.
product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def both_maps(student: Any, teacher: Any) -> tuple[Array, Array]:
  """Two maps ``[B, H, W, C]`` in one dtype, of any sizes and widths.

  >>> a, b = both_maps(jnp.ones((2, 4, 4, 3)), jnp.ones((2, 2, 2, 5), jnp.bfloat16))
  >>> a.shape, b.shape, b.dtype
  ((2, 4, 4, 3), (2, 2, 2, 5), dtype('float32'))
  """
  shapes = np.shape(student), np.shape(teacher)
  if any(len(shape) != 4 for shape in shapes):
    raise ValueError(
      f"student {shapes[0]} and teacher {shapes[1]} must be maps [B, H, W, C]: name a layer before "
      "the pooling."
    )
  student, teacher = float_arrays(student, teacher)
  return student, teacher


def map_pair(student: Any, teacher: Any) -> tuple[Array, Array]:
  """Two maps ``[B, H, W, C]`` in one dtype, the larger pooled to the smaller along each axis.

  >>> a, b = map_pair(jnp.ones((2, 4, 4, 3)), jnp.ones((2, 2, 2, 5)))
  >>> a.shape, b.shape
  ((2, 2, 2, 3), (2, 2, 2, 5))
  """
  student, teacher = both_maps(student, teacher)
  # Along each axis by itself: a 7 × 3 map and a 3 × 5 one meet at 3 × 3.
  height, width = (min(sizes) for sizes in zip(student.shape[1:3], teacher.shape[1:3], strict=True))
  return average_pool(student, height, width), average_pool(teacher, height, width)


def pair(student: Any, teacher: Any) -> tuple[Array, Array]:
  """Two features of one width, in one dtype: vectors, tokens, or maps pooled to one size.

  >>> a, b = pair(jnp.ones((2, 4, 4, 3)), jnp.ones((2, 2, 2, 3)))
  >>> a.shape, b.shape
  ((2, 2, 2, 3), (2, 2, 2, 3))
  """
  shapes = np.shape(student), np.shape(teacher)
  same_width(student, teacher)
  if len(shapes[0]) != len(shapes[1]) or len(shapes[0]) < 2:
    raise ValueError(
      f"student {shapes[0]} and teacher {shapes[1]} must both be vectors [B, D], tokens [B, L, D] "
      "or maps [B, H, W, C]: use a projector, or name other layers."
    )
  if len(shapes[0]) == 4:
    return map_pair(student, teacher)
  if shapes[0] != shapes[1]:
    raise ValueError(
      f"student {shapes[0]} and teacher {shapes[1]} must have the same positions: only maps "
      "[B, H, W, C] are pooled to one size."
    )
  student, teacher = float_arrays(student, teacher)
  return student, teacher


def rows(student: Any, teacher: Any, where: Any) -> tuple[Array, Array, Array]:
  """Features flattened to ``[B, D]`` in one dtype, and who takes part; the others become 0.

  >>> x, _, valid = rows(jnp.ones((2, 1, 2)), jnp.ones((2, 3)), jnp.array([1, 0]))
  >>> x.tolist(), valid.tolist()
  ([[1.0, 1.0], [0.0, 0.0]], [True, False])
  """
  shapes = np.shape(student), np.shape(teacher)
  if not shapes[0] or shapes[0][:1] != shapes[1][:1]:
    raise ValueError(f"student {shapes[0]} and teacher {shapes[1]} must hold the same examples.")
  size = shapes[0][0]
  valid = counted(where, (size,))
  # Before anything is computed as well as after it: a value masked only later can still leak NaN.
  flat = [
    jnp.where(valid[:, None], x.reshape(size, math.prod(x.shape[1:])), 0.0)
    for x in float_arrays(student, teacher)
  ]
  return flat[0], flat[1], valid


def same_width(student: Any, teacher: Any, names: tuple[str, str] = ("student", "teacher")) -> None:
  """Refuses features whose last axes differ.

  >>> same_width(jnp.ones((2, 3)), jnp.ones((2, 3)))
  """
  shapes = np.shape(student), np.shape(teacher)
  if shapes[0][-1:] != shapes[1][-1:]:
    raise ValueError(
      f"{names[0]} {shapes[0]} and {names[1]} {shapes[1]} differ in width (the last axis): use a "
      "projector."
    )


def tame(x: Array, axis: int | tuple[int, ...]) -> Array:
  """Divides by the largest entry over axes where its square would overflow; for scale-free use.

  >>> tame(jnp.array([[2.0**99, 0.0], [2.0, 1.0]]), -1).tolist()
  [[1.0, 0.0], [2.0, 1.0]]
  """
  # The scale cancels in what follows, so that its own gradient is 0 and can be left out.
  largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0.0))
  return x / jnp.where(largest > LARGEST, largest, 1.0)


def norm(x: Array, axis: int | tuple[int, ...], floor: float = 0.0) -> Array:
  """Euclidean norm, at least ``floor``, axes kept, with a gradient of 0 at and below the floor.

  >>> norm(jnp.array([[3.0, 4.0], [0.0, 0.0]]), -1).ravel().tolist()
  [5.0, 0.0]
  """
  # The root is taken of 1 where there is nothing: its slope at 0 is infinite, and infinity times
  # the 0 of the branch not taken is NaN.
  squared = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
  above = squared > floor**2
  return jnp.where(above, jnp.sqrt(jnp.where(above, squared, 1.0)), floor)


def unit(x: Array, axis: int | tuple[int, ...] = -1) -> Array:
  """Unit vectors, x / max(‖x‖, 1e-12) over axes, as PyTorch's normalize.

  Its gradient is 0 where ‖x‖ ≤ 1e-12; the formula's own, 1e12, would end a run at one dead unit.

  >>> unit(jnp.array([[2.0, 0.0], [0.0, 0.0]])).tolist()
  [[1.0, 0.0], [0.0, 0.0]]
  """
  x = tame(x, axis)
  length = norm(x, axis, SMALLEST_NORM)
  return jnp.where(length > SMALLEST_NORM, x, jax.lax.stop_gradient(x)) / length


def huber(x: Array) -> Array:
  """Smooth L1 with its knee at 1.

  >>> huber(jnp.array([0.5, -2.0])).tolist()
  [0.125, 1.5]
  """
  # Quadratic where errors are small, so that it is smooth at 0; straight beyond, so that one pair
  # far apart does not rule the batch.
  size = jnp.abs(x)
  return jnp.where(size < 1, 0.5 * jnp.square(x), size - 0.5)
