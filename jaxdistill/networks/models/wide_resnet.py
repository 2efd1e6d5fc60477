"""Wide ResNets for CIFAR: pre-activation blocks, ``widen_factor`` times as wide.

The pairs wrn_40_2 → wrn_16_2 and wrn_40_2 → wrn_40_1 are the ones that most distillation tables
report. Architectures, initialisation and parameter counts follow the common PyTorch definition
(https://github.com/HobbitLong/RepDistiller), which is why convolutions pad one pixel on both sides:
at stride 2, ``SAME`` would pad only after and shift every feature map.

One difference remains: PyTorch's running variance is the unbiased one, Flax's the biased one.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdistill.networks.models._named import named
from jaxdistill.networks.models.layers import Images, Logits, batch_norm, convolution, default_init

__all__ = ["WideBlock", "WideResNet", "wrn_16_1", "wrn_16_2", "wrn_40_1", "wrn_40_2"]


class WideBlock(nn.Module):
  """A pre-activation block: ``conv(relu(bn(conv(relu(bn(x)))))) + shortcut``.

  The shortcut is ``x``, or a 1x1 convolution of ``relu(bn(x))`` where the shape changes.

  Attributes:
    channels: output channels.
    stride: of the first convolution and of the projection.
    dtype: of the computation; None promotes from inputs and parameters.
    param_dtype: of the parameters.
    axis_name: the mapped axis over which BatchNorm averages its statistics.

  Source: Zagoruyko, Komodakis, "Wide Residual Networks", 2016.

  >>> import jax
  >>> block = WideBlock(channels=4, stride=2)
  >>> x = jnp.ones((1, 8, 8, 3))
  >>> (output, normalised), _ = jax.eval_shape(block.init_with_output, jax.random.key(0), x)
  >>> output.shape, normalised.shape
  ((1, 4, 4, 4), (1, 8, 8, 3))
  """

  channels: int
  stride: int = 1
  dtype: Any = None
  param_dtype: Any = jnp.float32
  axis_name: str | None = None

  @nn.compact
  def __call__(
    self, x: Float[Array, "B H W C"], *, train: bool = False
  ) -> tuple[Float[Array, "B H2 W2 C2"], Float[Array, "B H W C"]]:
    """Applies the block.

    Args:
      x: features ``[B, H, W, C]``, not normalised.
      train: use and update the batch's own statistics.

    Returns:
      The output, not normalised, and the first BatchNorm's output: what the methods that compare
      features before the activation call the input's pre-activation.
    """
    conv = convolution(self)
    norm = functools.partial(batch_norm, self, train)
    strides = (self.stride, self.stride)
    # BatchNorm and ReLU come before the convolution, so that the shortcut runs through untouched.
    normalised = norm(name="norm1")(x)
    active = nn.relu(normalised)
    shortcut = x
    if self.stride != 1 or x.shape[-1] != self.channels:
      shortcut = conv(self.channels, (1, 1), strides, padding=0, name="shortcut_conv")(active)
    y = conv(self.channels, (3, 3), strides, padding=1, name="conv1")(active)
    y = nn.relu(norm(name="norm2")(y))
    y = conv(self.channels, (3, 3), padding=1, name="conv2")(y)
    return y + shortcut, normalised


class WideResNet(nn.Module):
  """A 3x3 stem, three stages of ``(depth - 4) / 6`` blocks, BatchNorm, a linear layer.

  Sows ``stem``; ``stage1``, ``stage2``, ``stage3`` (the stages' outputs, not normalised) and
  ``stage1_preact`` ... (the same after the BatchNorm that comes next, before its ReLU), all
  ``[B, H, W, C]``; ``pooled`` ``[B, C]``.

  Attributes:
    depth: 6n + 4 for n blocks in each stage.
    widen_factor: multiplies the stages' channels 16, 32, 64.
    num_classes: K.
    dtype: of the computation; None promotes from inputs and parameters. Pooling and the classifier
      compute in float32 at least.
    param_dtype: of the parameters.
    axis_name: the mapped axis over which BatchNorm averages its statistics, under ``pmap``.

  Raises:
    ValueError: ``depth`` is not 6n + 4, or ``widen_factor`` is below 1.

  Source: Zagoruyko, Komodakis, "Wide Residual Networks", 2016.

  >>> import jax
  >>> model = WideResNet(depth=10, widen_factor=1, num_classes=10)
  >>> shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 8, 8, 3)))
  >>> shapes["params"]["classifier"]["kernel"].shape
  (64, 10)
  """

  depth: int
  widen_factor: int
  num_classes: int
  dtype: Any = None
  param_dtype: Any = jnp.float32
  axis_name: str | None = None

  def __post_init__(self) -> None:
    """Checks the depth and the width before anything is built."""
    if self.depth < 10 or (self.depth - 4) % 6:
      raise ValueError(
        f"depth must be 6n + 4 with n >= 1 blocks in each of the three stages, got {self.depth}: "
        "use 10, 16, 22, 28 or 40."
      )
    if self.widen_factor < 1:
      raise ValueError(f"widen_factor must be at least 1, got {self.widen_factor}: use e.g. 2.")
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Images, *, train: bool = False) -> Logits:
    """Classifies images.

    Args:
      x: normalised images ``[B, H, W, C]``.
      train: use and update the batch's own statistics.

    Returns:
      Logits ``[B, K]`` in float32 (float64 where the network computes in it).
    """
    x = convolution(self)(16, (3, 3), padding=1, name="stem_conv")(x)
    self.sow("intermediates", "stem", x)
    for stage in (1, 2, 3):
      for block in range((self.depth - 4) // 6):
        x, normalised = WideBlock(
          8 * 2**stage * self.widen_factor,  # 16, 32, 64 channels, times the factor
          stride=2 if stage > 1 and block == 0 else 1,
          dtype=self.dtype,
          param_dtype=self.param_dtype,
          axis_name=self.axis_name,
          name=f"stage{stage}_block{block}",
        )(x, train=train)
        # A stage ends without a norm; the one that begins the next stage is its pre-activation.
        if stage > 1 and block == 0:
          self.sow("intermediates", f"stage{stage - 1}_preact", normalised)
      self.sow("intermediates", f"stage{stage}", x)
    x = batch_norm(self, train, "final_norm")(x)
    self.sow("intermediates", "stage3_preact", x)
    # Logits in bfloat16 carry three digits: too few to distil from, and the layer is tiny.
    wide = np.promote_types(x.dtype, np.float32)
    pooled = jnp.mean(nn.relu(x), axis=(1, 2), dtype=wide)
    self.sow("intermediates", "pooled", pooled)
    return nn.Dense(
      self.num_classes, kernel_init=default_init, param_dtype=self.param_dtype, name="classifier"
    )(pooled)


wrn_16_1 = named(WideResNet, "wrn_16_1", "WRN-16-1", 180_916, depth=16, widen_factor=1)
wrn_16_2 = named(WideResNet, "wrn_16_2", "WRN-16-2", 703_284, depth=16, widen_factor=2)
wrn_40_1 = named(WideResNet, "wrn_40_1", "WRN-40-1", 569_780, depth=40, widen_factor=1)
wrn_40_2 = named(WideResNet, "wrn_40_2", "WRN-40-2", 2_255_156, depth=40, widen_factor=2)
