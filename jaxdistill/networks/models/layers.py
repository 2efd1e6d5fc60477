"""PyTorch's layers in Flax, as the published networks and projectors have them.

Tables of the literature come from PyTorch; where its defaults differ from Flax's, a copy that takes
Flax's trains to other numbers. These are the differences, each said once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Float

__all__ = ["Images", "Logits", "batch_norm", "convolution", "default_init", "kaiming_init"]

# What a classifier of images takes, and what it gives.
Images = Float[Array | np.ndarray, "B H W C"]
Logits = Float[Array, "B K"]

# kaiming_normal_(mode="fan_out"): a standard deviation of √(2 / (k² · channels out)). Not
# truncated, as Flax's he_normal is.
kaiming_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# What nn.Linear and nn.Conv2d start from: kaiming_uniform_(a=√5), uniform within ±1/√fan_in.
default_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def batch_norm(module: nn.Module, train: bool, name: str, **options: Any) -> nn.Module:
  """BatchNorm with PyTorch's numbers, and the dtypes and the axis of the module that it is in.

  Args:
    module: has ``axis_name``; ``dtype`` and ``param_dtype`` are taken where it has them.
    train: use and update the batch's own statistics.
    name: of the layer.
    **options: further attributes of ``nn.BatchNorm``.

  Returns:
    The layer.

  >>> import jax
  >>> class Block(nn.Module):
  ...   axis_name: str | None = None
  ...   @nn.compact
  ...   def __call__(self, x):
  ...     return batch_norm(self, True, "norm")(x)
  >>> made = jax.eval_shape(Block().init, jax.random.key(0), np.ones((2, 3)))
  >>> sorted(made["params"]["norm"])
  ['bias', 'scale']
  """
  dtypes = {d: getattr(module, d) for d in ("dtype", "param_dtype") if hasattr(module, d)}
  return nn.BatchNorm(
    use_running_average=not train,
    # Flax weighs the old average, PyTorch the new value: its 0.1 is 0.9 here.
    momentum=0.9,
    epsilon=1e-5,
    # Under pmap each device sees its share: without the axis, statistics are of that share alone.
    axis_name=module.axis_name,
    name=name,
    **dtypes,
    **options,
  )


def convolution(module: nn.Module, **options: Any) -> Callable[..., nn.Conv]:
  """Convolutions without bias, since a BatchNorm follows each, of a module's dtypes.

  Args:
    module: the network or the block, with ``dtype`` and ``param_dtype``.
    **options: further attributes of ``nn.Conv``.

  Returns:
    ``(features, kernel_size, strides=1, *, padding, name) -> layer``. Pad by numbers of pixels: at
    stride 2 ``"SAME"`` pads after the image only, PyTorch on both sides.

  >>> convolution(nn.Dense(1))(4, (3, 3), padding=1).kernel_size
  (3, 3)
  """
  dtypes = {"dtype": module.dtype, "param_dtype": module.param_dtype}
  return functools.partial(nn.Conv, use_bias=False, kernel_init=kaiming_init, **dtypes, **options)
