"""Small networks and their training that the tests share, parameters, a convolution by hand."""

import contextlib
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.monitoring
import jax.numpy as jnp
import jaxtyping
import numpy as np

from jaxdistill import networks, train
from jaxdistill.types import Model


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


@contextlib.contextmanager
def compiled():
  """The names of the programs that are compiled inside."""
  names = []

  def note(event, seconds, fun_name="", **rest):
    if event.endswith("backend_compile_duration"):
      names.append(fun_name.removeprefix("jit(").removesuffix(")"))

  jax.monitoring.register_event_duration_secs_listener(note)
  try:
    yield names
  finally:
    jax.monitoring.unregister_event_duration_listener(note)


def dense(width, **fields):
  return networks.linen(Dense(width, **fields), features=["mid"])


def model(network, *shape, key):
  """A network with new variables, for inputs of this shape."""
  return Model(network, network.init(key, jnp.zeros(shape)))


def fit(student, objective, *, room=train, **options):
  """A room's `fit`, which takes what `Run`, `Watch` and `with_jit` do as keywords; silent."""
  options.setdefault("progress", None)
  smaller = {n: options.pop(n) for n in ("accumulate", "tokens_at_once") if n in options}
  if smaller:
    dispatch = options.get("dispatch") or room.with_jit()
    options["dispatch"] = dataclasses.replace(dispatch, **smaller)
  for name, kind in (("run", room.Run), ("watch", room.Watch)):
    fields = [field.name for field in dataclasses.fields(kind)]
    options[name] = kind(**{field: options.pop(field) for field in fields if field in options})
  return room.fit(student, objective, **options)


def drawn(shapes, seed=0, scale=1.0):
  """Parameters without the initialisers, whose compilation would take most of the time."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda s: jnp.asarray(scale * rng.normal(size=s.shape), s.dtype), shapes)


def convolve(x, kernel, stride=1, pad=1):
  """A convolution with zero padding, one output pixel after the other."""
  x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  high, wide = kernel.shape[:2]
  rows = range(0, x.shape[1] - high + 1, stride)
  columns = range(0, x.shape[2] - wide + 1, stride)
  pixels = [
    [np.einsum("bhwc,hwcd->bd", x[:, i : i + high, j : j + wide], kernel) for j in columns]
    for i in rows
  ]
  return np.stack([np.stack(row, axis=1) for row in pixels], axis=1)
