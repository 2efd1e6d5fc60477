"""Maps of two sizes made one: PyTorch's adaptive average pooling."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = ["average_pool"]


def average_pool(
  maps: Float[Array, "B H W C"], height: int, width: int
) -> Float[Array, "B {height} {width} C"]:
  """Averages over windows of maps, so that their size becomes the one given.

  Window i of n spans floor(i · size / n) to ceil((i + 1) · size / n), so windows overlap where
  they do not divide the size evenly, as in PyTorch's ``adaptive_avg_pool2d``.

  Args:
    maps: ``[B, H, W, C]``.
    height: rows of the result.
    width: columns of the result.

  Returns:
    ``[B, height, width, C]``, the same array where that is its size.

  >>> average_pool(jnp.arange(5.0).reshape(1, 5, 1, 1), 2, 1).ravel().tolist()
  [1.0, 3.0]
  """
  for axis, (size, windows) in enumerate(zip(maps.shape[1:3], (height, width), strict=True)):
    # Axis by axis, since a mean over a window is a mean over rows of means over columns.
    if size != windows:
      letters = ("bhwc,nh->bnwc", "bhwc,nw->bhnc")[axis]
      matrix = jnp.asarray(_windows(size, windows), maps.dtype)
      # Accelerators round the factors of a float32 product by default; a mean must not.
      maps = jnp.einsum(letters, maps, matrix, precision=jax.lax.Precision.HIGHEST)
  return maps


def _windows(size: int, windows: int) -> np.ndarray:
  """The averaging matrix ``[windows, size]``."""
  # Sizes are known when tracing, so this is a constant of the program; as a product with it,
  # windows may overlap, and the gradient is a product too.
  matrix = np.zeros((windows, size))
  for i in range(windows):
    start, stop = i * size // windows, -(-(i + 1) * size // windows)
    matrix[i, start:stop] = 1 / (stop - start)
  return matrix
