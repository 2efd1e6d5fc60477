"""CIFAR ResNets with basic blocks, as the distillation literature pairs them.

The pairs resnet56 → resnet20, resnet110 → resnet32 and resnet32x4 → resnet8x4 are the ones that
most tables report. Architectures, initialisation and parameter counts follow the common PyTorch
definition (https://github.com/HobbitLong/RepDistiller), which is why convolutions pad one pixel on
both sides: at stride 2, ``SAME`` would pad only after and shift every feature map.

One difference remains: PyTorch's running variance is the unbiased one, Flax's the biased one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdistill.networks.models._named import named
from jaxdistill.networks.models.layers import Images, Logits, batch_norm, convolution, default_init
from jaxdistill.networks.models.small import patches_convolution

__all__ = [
  "BasicBlock",
  "ResNet",
  "resnet8",
  "resnet8x4",
  "resnet14",
  "resnet20",
  "resnet32",
  "resnet32x4",
  "resnet44",
  "resnet56",
  "resnet110",
]


def _patches(x: Array, kernel: Array, strides: Sequence[int], padding: Any, **unused: Any) -> Array:
  """What Flax's convolution calls in place of ``lax``; our blocks use neither groups nor holes."""
  del unused
  return patches_convolution(x, kernel, strides[0], padding)


_CONVOLUTIONS = {"lax": None, "patches": _patches}
# Where `ResNet` can go on from.
_MAPS = ("stem", "stage1", "stage2", "stage3")


class BasicBlock(nn.Module):
  """Two 3x3 convolutions around a shortcut: ``relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))``.

  The shortcut is the identity, or a 1x1 convolution with BatchNorm where the shape changes.

  Attributes:
    channels: output channels.
    stride: of the first convolution and of the projection.
    dtype: of the computation; None promotes from inputs and parameters.
    param_dtype: of the parameters.
    axis_name: the mapped axis over which BatchNorm averages its statistics.
    conv: how convolutions are computed, ``"lax"`` or ``"patches"``, from the same parameters.

  Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2016.

  >>> block = BasicBlock(channels=4, stride=2)
  >>> x = jnp.ones((1, 8, 8, 3))
  >>> (output, preact), _ = jax.eval_shape(block.init_with_output, jax.random.key(0), x)
  >>> output.shape, preact.shape
  ((1, 4, 4, 4), (1, 4, 4, 4))
  """

  channels: int
  stride: int = 1
  dtype: Any = None
  param_dtype: Any = jnp.float32
  axis_name: str | None = None
  conv: Literal["lax", "patches"] = "lax"

  @nn.compact
  def __call__(
    self, x: Float[Array, "B H W C"], *, train: bool = False
  ) -> tuple[Float[Array, "B H2 W2 C2"], Float[Array, "B H2 W2 C2"]]:
    """Applies the block.

    Args:
      x: features ``[B, H, W, C]``.
      train: use and update the batch's own statistics.

    Returns:
      The output after the last ReLU, and the same before it.
    """
    conv = convolution(self, conv_general_dilated=_CONVOLUTIONS[self.conv])
    norm = functools.partial(batch_norm, self, train)
    # An identity wherever shapes allow it: what He et al. found to train best.
    shortcut = x
    if self.stride != 1 or x.shape[-1] != self.channels:
      shortcut = conv(
        self.channels, (1, 1), (self.stride, self.stride), padding=0, name="shortcut_conv"
      )(x)
      shortcut = norm(name="shortcut_norm")(shortcut)
    y = conv(self.channels, (3, 3), (self.stride, self.stride), padding=1, name="conv1")(x)
    y = nn.relu(norm(name="norm1")(y))
    y = conv(self.channels, (3, 3), padding=1, name="conv2")(y)
    # The sum before its ReLU is a feature of its own: OFD, AB and ReviewKD compare it.
    preact = norm(name="norm2")(y) + shortcut
    return nn.relu(preact), preact


class ResNet(nn.Module):
  """A CIFAR ResNet: a 3x3 stem, three stages of ``(depth - 2) / 6`` basic blocks, a linear layer.

  Sows ``stem``; ``stage1``, ``stage2``, ``stage3`` (outputs of the stages' last blocks) and
  ``stage1_preact`` ... (the same before the ReLU), all ``[B, H, W, C]``; ``pooled`` ``[B, C]``.

  Attributes:
    depth: 6n + 2 for n blocks in each stage.
    num_classes: K.
    width: channels of the stem and of the three stages.
    dtype: of the computation; None promotes from inputs and parameters. Pooling and the classifier
      compute in float32 at least.
    param_dtype: of the parameters.
    axis_name: the mapped axis over which BatchNorm averages its statistics, under ``pmap``.
    conv: how convolutions are computed, from the same parameters: ``"lax"``, or ``"patches"``,
      faster on a CPU inside a loop and for several seeds at once (`patches_convolution`).
    after: None, or one of ``stem``, ``stage1``, ``stage2``, ``stage3``: the network is then what
      follows, which takes that map for its images and reads the same parameters.

  Raises:
    ValueError: ``depth`` is not 6n + 2, ``width`` has not four entries, or there is no map of the
      name ``after``.

  Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2016.

  >>> model = ResNet(depth=8, num_classes=10, width=(2, 2, 4, 8))
  >>> shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 8, 8, 3)))
  >>> shapes["params"]["classifier"]["kernel"].shape
  (8, 10)
  """

  depth: int
  num_classes: int
  width: Sequence[int] = (16, 16, 32, 64)
  dtype: Any = None
  param_dtype: Any = jnp.float32
  axis_name: str | None = None
  conv: Literal["lax", "patches"] = "lax"
  after: str | None = None

  def __post_init__(self) -> None:
    """Checks the depth, the widths and where it starts before anything is built."""
    if self.depth < 8 or (self.depth - 2) % 6:
      raise ValueError(
        f"depth must be 6n + 2 with n >= 1 blocks in each of the three stages, got {self.depth}: "
        "use 8, 14, 20, 32, 44, 56 or 110."
      )
    if len(self.width) != 4:
      raise ValueError(
        f"width must have four entries (stem and three stages), got {tuple(self.width)}: "
        "use e.g. (16, 16, 32, 64)."
      )
    if self.after not in (None, *_MAPS):
      raise ValueError(f"after must be None or one of {', '.join(_MAPS)}, got {self.after!r}.")
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Images, *, train: bool = False) -> Logits:
    """Classifies images.

    Args:
      x: normalised images ``[B, H, W, C]``; with ``after``, the map of that name.
      train: use and update the batch's own statistics.

    Returns:
      Logits ``[B, K]`` in float32 (float64 where the network computes in it).
    """
    # Which of the maps is there already: a stage behind it keeps its name, and so its parameters.
    done = 0 if self.after is None else _MAPS.index(self.after)
    if self.after is None:
      conv = convolution(self, conv_general_dilated=_CONVOLUTIONS[self.conv])
      x = conv(self.width[0], (3, 3), padding=1, name="stem_conv")(x)
      x = nn.relu(batch_norm(self, train, "stem_norm")(x))
      self.sow("intermediates", "stem", x)
    else:
      x = jnp.asarray(x)
    for stage, channels in enumerate(self.width[1:], start=1):
      if stage <= done:
        continue
      for block in range((self.depth - 2) // 6):
        x, preact = BasicBlock(
          channels,
          # 32, 16 and 8 pixels a side on CIFAR: the first block of a later stage halves the map.
          stride=2 if stage > 1 and block == 0 else 1,
          dtype=self.dtype,
          param_dtype=self.param_dtype,
          axis_name=self.axis_name,
          conv=self.conv,
          name=f"stage{stage}_block{block}",
        )(x, train=train)
      self.sow("intermediates", f"stage{stage}_preact", preact)
      self.sow("intermediates", f"stage{stage}", x)
    # Logits in bfloat16 carry three digits: too few to distil from, and the layer is tiny.
    pooled = jnp.mean(x, axis=(1, 2), dtype=np.promote_types(x.dtype, np.float32))
    self.sow("intermediates", "pooled", pooled)
    return nn.Dense(
      self.num_classes,
      kernel_init=default_init,
      bias_init=_linear_bias_init(pooled.shape[-1]),
      param_dtype=self.param_dtype,
      name="classifier",
    )(pooled)


def _linear_bias_init(fan_in: int) -> nn.initializers.Initializer:
  """PyTorch's default for the bias of nn.Linear: uniform within ±1/√fan_in."""
  bound = 1 / math.sqrt(fan_in)

  def init(key: Any, shape: Sequence[int], dtype: Any = jnp.float32, **_: Any) -> Array:
    return jax.random.uniform(key, tuple(shape), dtype, -bound, bound)

  return init


_WIDE = (32, 64, 128, 256)

resnet8 = named(ResNet, "resnet8", "resnet8", 83_892, depth=8)
resnet14 = named(ResNet, "resnet14", "resnet14", 181_108, depth=14)
resnet20 = named(ResNet, "resnet20", "resnet20", 278_324, depth=20)
resnet32 = named(ResNet, "resnet32", "resnet32", 472_756, depth=32)
resnet44 = named(ResNet, "resnet44", "resnet44", 667_188, depth=44)
resnet56 = named(ResNet, "resnet56", "resnet56", 861_620, depth=56)
resnet110 = named(ResNet, "resnet110", "resnet110", 1_736_564, depth=110)
resnet8x4 = named(
  ResNet,
  "resnet8x4",
  "resnet8x4, four times as wide (stem twice)",
  1_233_540,
  depth=8,
  width=_WIDE,
)
resnet32x4 = named(
  ResNet,
  "resnet32x4",
  "resnet32x4, four times as wide (stem twice)",
  7_433_860,
  depth=32,
  width=_WIDE,
)
