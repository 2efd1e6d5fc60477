"""Small networks for handwritten digits, examples and tests: they train in seconds on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdistill.networks.models.layers import Images, Logits

__all__ = ["MLP", "Conv3x3", "ConvNet", "patches_convolution"]


def patches_convolution(
  x: Float[Array, "B H W C"],
  kernel: Float[Array, "h w C D"],
  stride: int = 1,
  padding: str | Sequence[tuple[int, int]] = "SAME",
) -> Float[Array, "B H2 W2 D"]:
  """A convolution as shifted slices, one for each tap of the kernel, and one matrix product.

  The same numbers as ``jax.lax.conv_general_dilated``, to rounding. Under ``jax.vmap`` over kernels
  (a sweep) a convolution becomes a grouped one, which XLA computes slowly on a CPU, while a matrix
  product stays one: a training step of five small networks at once is two to three times faster
  this way, and of a single one as fast. A 3x3 kernel costs nine times the memory of ``x``.

  Args:
    x: features ``[B, H, W, C]``.
    kernel: ``[h, w, C, D]``, of the same dtype.
    stride: of both axes.
    padding: ``"SAME"``, ``"VALID"``, or pixels before and after each of the two axes.

  Returns:
    ``[B, H2, W2, D]``; ``"SAME"`` has H2 = ceil(H / stride).

  >>> convolve = jax.jit(patches_convolution)
  >>> convolve(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1)))[0, :, 0, 0].tolist()
  [4.0, 6.0, 6.0, 4.0]
  """
  taps = kernel.shape[:2]
  pads = padding
  if isinstance(padding, str):
    pads = jax.lax.padtype_to_pads(x.shape[1:3], taps, (stride, stride), padding)
  x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
  height, width = ((size - tap) // stride + 1 for size, tap in zip(x.shape[1:3], taps, strict=True))
  # lax.slice, since NumPy's indexing becomes a gather where the batch size is symbolic (an export).
  ends = stride * (height - 1) + 1, stride * (width - 1) + 1
  slices = [
    jax.lax.slice(
      x, (0, i, j, 0), (x.shape[0], i + ends[0], j + ends[1], x.shape[3]), (1, stride, stride, 1)
    )
    for i in range(taps[0])
    for j in range(taps[1])
  ]
  # [B, H2, W2, h·w·C] by [h·w·C, D]: rows of the kernel lie in the order of the slices.
  return jnp.concatenate(slices, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


class Conv3x3(nn.Module):
  """A 3x3 ``SAME`` convolution with bias, computed in one of two ways from the same parameters.

  Attributes:
    channels: output channels.
    stride: of both axes.
    method: ``"patches"`` (`patches_convolution`) or ``"lax"`` (``jax.lax.conv_general_dilated``).
    dtype: of the computation; None promotes from inputs and parameters.
    param_dtype: of the parameters.

  >>> layer = Conv3x3(channels=4)
  >>> variables = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, 8, 8, 3)))
  >>> variables["params"]["kernel"].shape
  (3, 3, 3, 4)
  """

  channels: int
  stride: int = 1
  method: Literal["patches", "lax"] = "patches"
  dtype: Any = None
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Images) -> Float[Array, "B H2 W2 D"]:
    """Applies the convolution.

    Args:
      x: features ``[B, H, W, C]``.

    Returns:
      ``[B, ceil(H / stride), ceil(W / stride), channels]``.
    """
    shape = (3, 3, x.shape[-1], self.channels)
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, self.param_dtype)
    bias = self.param("bias", nn.initializers.zeros_init(), (self.channels,), self.param_dtype)
    inputs, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    if self.method == "patches":
      y = patches_convolution(inputs, kernel, self.stride)
    else:
      y = jax.lax.conv_general_dilated(
        inputs,
        kernel,
        (self.stride, self.stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
      )
    return y + bias[None, None, None]


class ConvNet(nn.Module):
  """3x3 convolutions with ReLU, then a dense layer with ReLU and a linear one.

  Sows ``conv1`` ... ``convN`` ``[B, H, W, C]`` and ``hidden`` ``[B, dense]``, all after the ReLU.

  Attributes:
    channels: of each convolution.
    strides: of each convolution.
    dense: width of the dense layer.
    num_classes: K.
    conv: how convolutions are computed: ``"patches"``, as one matrix product, or ``"lax"``, as XLA
      does. Same parameters, same numbers to rounding.
    dtype: of the computation; None promotes from inputs and parameters. The last layer computes in
      float32 at least.
    param_dtype: of the parameters.

  Raises:
    ValueError: ``channels`` and ``strides`` differ in length, or ``conv`` is neither word.

  >>> model = ConvNet(channels=(2, 4), strides=(1, 2), dense=8)
  >>> x = jnp.ones((1, 8, 8, 1))
  >>> jax.eval_shape(model.init_with_output, jax.random.key(0), x)[0].shape
  (1, 10)
  """

  channels: Sequence[int] = (32, 64, 64)
  strides: Sequence[int] = (1, 2, 1)
  dense: int = 256
  num_classes: int = 10
  conv: Literal["patches", "lax"] = "patches"
  dtype: Any = None
  param_dtype: Any = jnp.float32

  def __post_init__(self) -> None:
    """Checks the attributes before anything is built."""
    if len(self.channels) != len(self.strides):
      raise ValueError(
        f"strides must have one entry for each of channels {tuple(self.channels)}, "
        f"got {tuple(self.strides)}: use e.g. {(1,) * len(self.channels)}."
      )
    if self.conv not in ("patches", "lax"):
      raise ValueError(f"conv must be 'patches' or 'lax', got {self.conv!r}: use 'patches'.")
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Images, *, train: bool = False) -> Logits:
    """Classifies images.

    Args:
      x: normalised images ``[B, H, W, C]``.
      train: changes nothing here.

    Returns:
      Logits ``[B, K]`` in float32 (float64 where the network computes in it).
    """
    del train
    for i, (channels, stride) in enumerate(zip(self.channels, self.strides, strict=True)):
      layer = Conv3x3(
        channels, stride, self.conv, self.dtype, self.param_dtype, name=f"convolution{i + 1}"
      )
      x = nn.relu(layer(x))
      self.sow("intermediates", f"conv{i + 1}", x)
    x = x.reshape(x.shape[0], -1)  # [B, H·W·C]
    x = nn.Dense(self.dense, dtype=self.dtype, param_dtype=self.param_dtype, name="dense_layer")(x)
    x = nn.relu(x)
    self.sow("intermediates", "hidden", x)
    # Logits in bfloat16 carry three digits: too few to distil from, and the layer is tiny.
    x = x.astype(np.promote_types(x.dtype, np.float32))
    return nn.Dense(self.num_classes, param_dtype=self.param_dtype, name="classifier")(x)


class MLP(nn.Module):
  """Dense layers with ReLU on flattened inputs, then a linear one.

  Sows ``hidden1`` ... ``hiddenN`` ``[B, width]``, after the ReLU.

  Attributes:
    widths: of the hidden layers; empty for a linear classifier.
    num_classes: K.
    dtype: of the computation; None promotes from inputs and parameters. The last layer computes in
      float32 at least.
    param_dtype: of the parameters.

  >>> model = MLP(widths=(16,), num_classes=3)
  >>> x = jnp.ones((2, 5))
  >>> jax.eval_shape(model.init_with_output, jax.random.key(0), x)[0].shape
  (2, 3)
  """

  widths: Sequence[int] = (16,)
  num_classes: int = 10
  dtype: Any = None
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array | np.ndarray, "B ..."], *, train: bool = False) -> Logits:
    """Classifies inputs of any shape.

    Args:
      x: inputs ``[B, ...]``.
      train: changes nothing here.

    Returns:
      Logits ``[B, K]`` in float32 (float64 where the network computes in it).
    """
    del train
    x = x.reshape(x.shape[0], -1)
    for i, width in enumerate(self.widths):
      layer = nn.Dense(
        width, dtype=self.dtype, param_dtype=self.param_dtype, name=f"hidden_layer{i + 1}"
      )
      x = nn.relu(layer(x))
      self.sow("intermediates", f"hidden{i + 1}", x)
    # Logits in bfloat16 carry three digits: too few to distil from, and the layer is tiny.
    x = x.astype(np.promote_types(x.dtype, np.float32))
    return nn.Dense(self.num_classes, param_dtype=self.param_dtype, name="classifier")(x)
