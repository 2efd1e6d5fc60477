"""Small networks that the tests share."""

import contextlib
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import jaxtyping

from jaxdistill import networks


class Dense(nn.Module):
  """Dense layers with an optional BatchNorm; sows ``mid``."""

  width: int
  classes: int = 3
  norm: bool = False
  axis_name: str | None = None
  dropout: float = 0.0
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, *, train: bool = False):
    x = nn.Dense(self.width, param_dtype=self.param_dtype)(x.reshape(x.shape[0], -1))
    if self.norm:
      x = nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        axis_name=self.axis_name,
        param_dtype=self.param_dtype,
      )(x)
    x = nn.relu(x)
    self.sow("intermediates", "mid", x)
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return nn.Dense(self.classes, param_dtype=self.param_dtype)(x)


@contextlib.contextmanager
def untyped():
  """Without the tests' own type checks: what a user's mistake meets."""
  jaxtyping.config.update("jaxtyping_disable", True)
  try:
    yield
  finally:
    jaxtyping.config.update("jaxtyping_disable", False)


def dense(width, **fields):
  return networks.linen(Dense(width, **fields), features=["mid"])
