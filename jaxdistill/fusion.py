"""ReviewKD's fusion of a stage with what came from the stages above it; see `projectors`."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = ["ReviewFusion"]

# PyTorch's kaiming_uniform_(a=1), and its default for a convolution.
_fusion_init = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
_attention_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class ReviewFusion(nn.Module):
  """Attention-based fusion (ABF) of ReviewKD: one stage of the student, reviewed from above.

  ``y = bn(conv1x1(x))``; with a residual r from the stage above, brought to the size of x,
  ``y = y * a + r * b`` with ``[a, b] = sigmoid(conv1x1([y, r]))`` ``[B, H, W, 2]``. y, brought to
  ``spatial``, is the residual for the stage below, and ``bn(conv3x3(y))`` is what is compared with
  the teacher's stage. Sizes are changed by taking the nearest pixel, floor(i * size / new size).

  Attributes:
    mid: channels of y and of the residuals, the same in all stages.
    features: the teacher's channels.
    spatial: the teacher's height and width.
    axis_name: the mapped axis over which BatchNorm averages its statistics, under ``pmap``.
    dtype: of the computation; None promotes from inputs and parameters.
    param_dtype: of the parameters.

  Source: Chen, Liu, Zhao, Jia, "Distilling Knowledge via Knowledge Review", 2021.

  >>> module = ReviewFusion(mid=4, features=5, spatial=(8, 8))
  >>> x, residual = jnp.ones((2, 8, 8, 3)), jnp.ones((2, 4, 4, 4))
  >>> shapes = jax.eval_shape(module.init_with_output, jax.random.key(0), x, residual)
  >>> [y.shape for y in shapes[0]]
  [(2, 8, 8, 5), (2, 8, 8, 4)]
  """

  mid: int
  features: int
  spatial: tuple[int, int]
  axis_name: str | None = None
  dtype: Any = None
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: Float[Array | np.ndarray, "B H W C"],
    residual: Float[Array | np.ndarray, "B H2 W2 mid"] | None = None,
    *,
    train: bool = False,
  ) -> tuple[Float[Array, "B H3 W3 D"], Float[Array, "B H3 W3 mid"]]:
    """Fuses a stage with the residual from above.

    Args:
      x: the student's stage ``[B, H, W, C]``.
      residual: the second output of the fusion above, ``[B, H2, W2, mid]``; None for the topmost.
      train: use and update the batch's own statistics.

    Returns:
      What is compared with the teacher, ``[B, *spatial, features]``, and the residual for the
      stage below, ``[B, *spatial, mid]``.

    Raises:
      ValueError: ``residual`` has another number of channels than ``mid``.
    """
    if residual is not None and residual.shape[-1] != self.mid:
      raise ValueError(
        f"residual {residual.shape} must have mid={self.mid} channels: give all fusions one mid."
      )
    options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    # A 1 x 1 convolution is a linear map of the channels.
    y = nn.Dense(self.mid, use_bias=False, kernel_init=_fusion_init, **options, name="conv1")(x)
    y = self._norm("norm1", train)(y)
    if residual is not None:
      above = _nearest(residual, (x.shape[1], x.shape[2])).astype(y.dtype)
      both = jnp.concatenate([y, above], axis=-1)
      attention = nn.Dense(2, kernel_init=_attention_init, **options, name="attention")(both)
      attention = jax.nn.sigmoid(attention)
      y = y * attention[..., :1] + above * attention[..., 1:]
    y = _nearest(y, self.spatial)
    out = nn.Conv(
      self.features,
      (3, 3),
      padding=1,
      use_bias=False,
      kernel_init=_fusion_init,
      **options,
      name="conv2",
    )(y)
    return self._norm("norm2", train)(out), y

  def _norm(self, name: str, train: bool) -> nn.Module:
    return nn.BatchNorm(
      use_running_average=not train,
      momentum=0.9,
      epsilon=1e-5,
      axis_name=self.axis_name,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name=name,
    )


def _nearest(maps: Any, spatial: tuple[int, int]) -> Any:
  """PyTorch's nearest interpolation; `jax.image.resize` takes pixels from their centres instead."""
  for axis, size in zip((1, 2), spatial, strict=True):
    old = maps.shape[axis]
    if old != size:
      maps = jnp.take(maps, np.arange(size) * old // size, axis=axis)
  return maps
