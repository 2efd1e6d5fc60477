"""A network whose weights lie in eight bits, and are floats again where it uses them.

Half the memory of bfloat16, and the arithmetic of before: what is multiplied are floats, a layer's
at a time. The rounding and its scales are qwix's. For networks that are run and not trained: a
teacher, ``teachers.frozen(model, dtype="int8")``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxdistill import _check, _extras
from jaxdistill.types import Model, Network, Outputs

__all__ = ["Int8", "int8_weights"]

PyTree = Any
# With fewer weights to a scale of four bytes an array is hardly smaller.
_LEAST = 32


@flax.struct.dataclass
class Int8:
  """A weight in eight bits; a pytree of two arrays.

  Attributes:
    int8: ``[...]``, integers from -127 to 127.
    int8_scale: what they are multiplied by, float32, of the same rank; 1 along one axis.
    dtype: of the weight before, and where it is used.
  """

  int8: Any
  int8_scale: Any
  dtype: Any = flax.struct.field(pytree_node=False)

  def floats(self) -> jax.Array:
    """The weight, to half a step of its scale."""
    # Cast with everything else (`mixed_precision`), a scale says what is computed in.
    short = min(self.dtype, self.int8_scale.dtype, key=lambda dtype: dtype.itemsize)
    return (self.int8.astype(jnp.float32) * self.int8_scale.astype(jnp.float32)).astype(short)


def int8_weights(model: Model) -> Model:
  """A model whose kernels and embeddings are kept in eight bits, with a scale for each channel.

  Each array of its parameters that has two axes or more is rounded, symmetrically, to the largest
  absolute value of those weights that share a scale: of an embedding (a parameter called
  ``embedding``) each row's, of others those along their longest axis but the last, which is what a
  product sums over. Arrays with fewer than 32 weights to a scale, biases, norms and statistics stay
  as they are. Each weight is made a float where its module asks for it, in the body of a scan over
  layers too; of a module that looks into its variables itself, and of NNX, all at once.

  Args:
    model: the model, of arrays or of shapes; arrays are rounded where they lie, in parts where they
      lie in parts.

  Returns:
    The model; for inference, since integers have no gradient.

  Raises:
    TypeError: ``model`` is none.
    ValueError: none of its parameters is large enough.
    MissingExtraError: qwix is not installed.

  >>> from jaxdistill import networks
  >>> network = networks.linen(networks.models.MLP([64], num_classes=8))
  >>> model = Model(network, network.init(jax.random.key(0), jnp.ones((1, 32))))
  >>> kernel = int8_weights(model).variables["params"]["hidden_layer1"]["kernel"]
  >>> kernel.int8.shape, kernel.int8.dtype.name, kernel.int8_scale.shape
  ((32, 64), 'int8', (1, 64))
  """
  if not isinstance(model, Model):
    raise TypeError(f"model must be a Model, got {_check.show(model)}.")
  _extras.need("int8 weights", "qwix")
  variables = {"params": {}, **model.variables}
  rounded = jax.tree_util.tree_map_with_path(_rounded, variables["params"])
  if not any(isinstance(leaf, Int8) for leaf in jax.tree.leaves(rounded, is_leaf=_is_int8)):
    raise ValueError(
      f"{model.network.name} has no parameter of two axes with {_LEAST} weights to a scale, so "
      "nothing to keep in eight bits: leave dtype='int8' out."
    )
  return Model(_reading(model.network), {**variables, "params": rounded}, model.seeds)


def _is_int8(node: Any) -> bool:
  return isinstance(node, Int8)


def _rounded(path: Any, leaf: Any) -> Any:
  """A parameter in eight bits, or as it is."""
  import qwix

  shape = jnp.shape(leaf)
  if len(shape) < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
    return leaf
  by_row = jax.tree_util.keystr(path[-1:], simple=True) == "embedding"
  shared = len(shape) - 1 if by_row else max(range(len(shape) - 1), key=lambda i: (shape[i], i))
  if shape[shared] < _LEAST:
    return leaf
  channels = [axis for axis in range(len(shape)) if axis != shared]

  def made(weights: jax.Array) -> Int8:
    array = qwix.quantize(weights.astype(jnp.float32), jnp.int8, channelwise_axes=channels)
    return Int8(array.qvalue, array.scale, weights.dtype)

  # In one program, so that there is no copy in float32 of what may be the largest array there is.
  return (
    jax.eval_shape(made, leaf) if isinstance(leaf, jax.ShapeDtypeStruct) else jax.jit(made)(leaf)
  )


@functools.lru_cache(maxsize=64)
def _reading(network: Network) -> Network:
  """One object for one network: programs are told apart by it, and would compile anew."""
  return _InInt8(network).made()


@dataclasses.dataclass(frozen=True, eq=False)
class _InInt8:
  """What `int8_weights` makes of a network.

  Attributes:
    network: of floats.
    specs: as `Network.at_use` has them, by the paths of arrays.
    read: likewise; None where nothing is in parts.
  """

  network: Network
  specs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  read: Callable[[Any, Any], Any] | None = None

  def made(self) -> Network:
    use = self.network.at_use
    return Network(
      self.network.init,
      self.apply,
      f"{self.network.name} (int8)",
      None,
      self.network.axes,
      None if use is None else self.at_use,
    )

  def at_use(self, specs: Mapping[str, Any], read: Callable[[Any, Any], Any]) -> Network:
    return dataclasses.replace(self, specs=specs, read=read).made()

  def floats(self, leaf: Any, spec: Any) -> Any:
    """A parameter as a module takes it; what is in parts is gathered as integers."""
    cut = self.read is not None and any(spec)
    if not _is_int8(leaf):
      return self.read(leaf, spec) if cut and self.read is not None else leaf
    if cut and self.read is not None:
      shape = leaf.int8_scale.shape
      along = [None if shape[i] == 1 else entry for i, entry in enumerate(spec)]
      leaf = leaf.replace(
        int8=self.read(leaf.int8, spec), int8_scale=self.read(leaf.int8_scale, tuple(along))
      )
    return leaf.floats()

  def apply(
    self, variables: Mapping[str, PyTree], inputs: Any, *, train: bool, key: Any = None
  ) -> tuple[Outputs, dict[str, PyTree]]:
    use = self.network.at_use
    if use is None:
      params = jax.tree.map(
        lambda leaf: self.floats(leaf, ()), variables["params"], is_leaf=_is_int8
      )
      return self.network.apply({**variables, "params": params}, inputs, train=train, key=key)
    leaves = jax.tree_util.tree_leaves_with_path({"params": variables["params"]}, is_leaf=_is_int8)
    paths = [
      jax.tree_util.keystr(path, simple=True, separator="/")
      for path, leaf in leaves
      if _is_int8(leaf)
    ]
    # Of an array in eight bits the integers' spec; the scale follows it.
    specs = {p: spec for p, spec in self.specs.items() if not p.endswith(("/int8", "/int8_scale"))}
    specs |= {path: tuple(self.specs.get(f"{path}/int8", ())) for path in paths}
    return use(specs, self.floats).apply(variables, inputs, train=train, key=key)
