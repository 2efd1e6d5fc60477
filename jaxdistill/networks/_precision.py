"""Mixed precision: parameters and losses in float32, the network's products in bfloat16.

A module's own ``dtype`` does the same from inside; `mixed_precision` does it from outside, for
modules that nobody here wrote. What it can't change is a dtype that a module insists on:
`count_products` counts what a network really multiplies in.
"""

from __future__ import annotations

import collections
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr

from jaxdistill import _check
from jaxdistill.types import Network, Outputs, compute_dtype

__all__ = ["count_products", "mixed_precision"]

PyTree = Any
_PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general")


def mixed_precision(network: Network, *, compute: Any = jnp.bfloat16) -> Network:
  """A network that keeps its parameters in float32 and computes in a shorter dtype.

  On the way in floating parameters and inputs are cast to ``compute``; other collections
  (``batch_stats``) are not, so that BatchNorm's averages don't lose small changes. On the way out
  logits, features, ``hidden`` and ``head`` are cast to float32, in which losses are computed, and
  updated collections to the dtypes that they had. Gradients pass through the casts: they arrive in
  float32, and so do the optimiser's moments.

  It follows the modules: those with ``dtype=None`` compute in what their inputs and parameters
  are, so in ``compute``. A module that says ``dtype=jnp.float32`` computes in float32, of rounded
  parameters. So does everything after a float32 constant that a module adds, after NNX's BatchNorm,
  which promotes to the dtype of its averages (Linen's does not): give that one
  ``dtype=jnp.bfloat16``; and in Linen's SpectralNorm, which divides by what it keeps. See
  `count_products`.

  Wrap the network last: `networks.capturable` knows only the bare one. A teacher is wrapped
  just so: ``teachers.frozen(mixed_precision(network))``.

  Args:
    network: from `jaxdistill.networks`.
    compute: a floating dtype of at most 32 bits. bfloat16 has float32's range and needs no scaling
      of the loss; in float16 small gradients vanish (nothing here scales them), so that it is for
      teachers.

  Returns:
    The network; ``compute`` shows in its name. Its ``init`` makes float32 of parameters that are
    shorter, and looks once at what is multiplied: it warns if less than half of the products are
    in ``compute``.

  Raises:
    ValueError: ``compute`` is no such dtype; or, from ``init``, not one product is in it, or the
      network does not run in it.

  Source: Micikevicius et al., "Mixed Precision Training", 2018; bfloat16 as in Kalamkar et al., "A
  Study of BFLOAT16 for Deep Learning Training", 2019.

  >>> def apply(variables, x, *, train, key):
  ...   return Outputs(x @ variables["params"]["kernel"]), {}
  >>> network = Network(lambda key, x: {"params": {"kernel": jnp.ones((3, 4))}}, apply, "linear")
  >>> half = mixed_precision(network)
  >>> variables = half.init(jax.random.key(0), jnp.ones((2, 3)))
  >>> half.apply(variables, jnp.ones((2, 3)), train=False, key=None)[0].logits.dtype.name
  'float32'
  >>> half.name, count_products(half, variables, jnp.ones((2, 3)))
  ('linear (bfloat16)', {'bfloat16': 1})
  """
  if not isinstance(network, Network):
    raise TypeError(
      f"network must be a Network, got {_check.show(network)}; give networks.linen(module)."
    )
  dtype = _checked(compute)

  def init(key: Any, inputs: Any) -> dict[str, PyTree]:
    variables = dict(network.init(key, inputs))
    variables["params"] = jax.tree.map(_at_least_float32, variables["params"])
    _check_products(result, variables, inputs, dtype)
    return variables

  def apply(
    variables: Mapping[str, PyTree], inputs: Any, *, train: bool, key: Any = None
  ) -> tuple[Outputs, dict[str, PyTree]]:
    # Parameters and inputs only. An average that moves by 1e-3 of itself would stand still in
    # bfloat16, whose steps are 4e-3 of a number and more.
    short = {**variables, "params": _cast(variables["params"], dtype)}
    outputs, state = network.apply(short, _cast(inputs, dtype), train=train, key=key)
    # What goes out is float32 again: losses are differences of logarithms, and need the digits.
    restored = {name: _as_before(tree, variables.get(name)) for name, tree in state.items()}
    return jax.tree.map(_at_least_float32, outputs), restored

  rest, use = network.at_rest, network.at_use
  result = Network(
    init,
    apply,
    f"{network.name} ({dtype.name})",
    None if rest is None else lambda paths: mixed_precision(rest(paths), compute=dtype),
    network.axes,
    None if use is None else lambda *how: mixed_precision(use(*how), compute=dtype),
  )
  return result


def count_products(
  network: Network, variables: Mapping[str, PyTree], inputs: Any
) -> dict[str, int]:
  """Counts a network's matrix products and convolutions by the dtype that they multiply in.

  In inference, by abstract evaluation only; a loop's body counts once. A product of two dtypes
  counts as the longer one.

  Args:
    network: from `jaxdistill.networks`, or from `mixed_precision`.
    variables: its variables, or their shapes (``jax.ShapeDtypeStruct``).
    inputs: what it sees, or the shapes.

  Returns:
    ``{dtype: count}``, the most frequent first.

  >>> def apply(variables, x, *, train, key):
  ...   return Outputs(x @ variables["params"]["kernel"]), {}
  >>> network = Network(lambda key, x: {}, apply)
  >>> count_products(network, {"params": {"kernel": jnp.ones((3, 4))}}, jnp.ones((2, 3)))
  {'float32': 1}
  """
  # A jaxpr is the program before any compiler: what is multiplied, not what it was fused into.
  call = lambda v, x: network.apply(v, x, train=False, key=None)[0]  # noqa: E731
  traced = jax.make_jaxpr(call)(variables, inputs)
  return dict(collections.Counter(_multiplied(traced.jaxpr)).most_common())


def _multiplied(jaxpr: Any) -> Iterator[str]:
  """The dtype of every product in a jaxpr and in those inside it."""
  for equation in jaxpr.eqns:
    # Products are where the time is: the dtype of an addition says nothing of the speed.
    if equation.primitive.name in _PRODUCTS:
      dtypes = [operand.aval.dtype for operand in equation.invars[:2]]
      yield max(dtypes, key=lambda dtype: dtype.itemsize).name
    for value in equation.params.values():
      for item in value if isinstance(value, list | tuple) else [value]:
        # Up to jax 0.10 some are wrapped together with their constants.
        inner = getattr(item, "jaxpr", item)
        if isinstance(inner, Jaxpr):
          yield from _multiplied(inner)


def _check_products(
  network: Network, variables: Mapping[str, PyTree], inputs: Any, dtype: np.dtype
) -> None:
  try:
    found = count_products(network, variables, inputs)
  except TypeError as error:
    raise ValueError(
      f"networks.mixed_precision: {network.name} runs, but not in {dtype.name}; where a loop "
      "has to carry one dtype, all that it does must be in it (NNX's BatchNorm inside nnx.scan is "
      f"not, unless built with dtype=jnp.{dtype.name}): {_check.short(error)}"
    ) from error
  # Of what a module insists on only the count shows: its outputs may be cast back behind it.
  count, short = sum(found.values()), found.get(dtype.name, 0)
  shown = ", ".join(f"{number} in {name}" for name, number in found.items())
  advice = (
    f"networks.mixed_precision: {network.name} multiplies {shown}. Modules with a dtype of their "
    f"own keep it; build them with dtype=None or dtype=jnp.{dtype.name}"
  )
  if count and not short:
    raise ValueError(f"{advice}, or leave mixed_precision out.")
  if 2 * short < count:
    warnings.warn(f"{advice}.", stacklevel=3)


def _checked(compute: Any) -> np.dtype:
  try:
    dtype = jnp.dtype(compute)
  except TypeError:
    dtype = None
  if dtype is None or not jnp.issubdtype(dtype, jnp.floating) or not 2 <= dtype.itemsize <= 4:
    raise ValueError(
      f"compute={compute!r} must be a floating dtype of 16 or 32 bits: jnp.bfloat16 to train, or "
      "jnp.float16 for a teacher."
    )
  return dtype


def _is_float(leaf: Any) -> bool:
  return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def _cast(tree: PyTree, dtype: Any) -> PyTree:
  return jax.tree.map(lambda leaf: leaf.astype(dtype) if _is_float(leaf) else leaf, tree)


def _at_least_float32(leaf: Any) -> Any:
  return leaf.astype(compute_dtype(leaf)) if _is_float(leaf) else leaf


def _as_before(new: PyTree, old: PyTree) -> PyTree:
  """An updated collection in the dtypes that it had."""
  # A step must carry what it was given: another dtype would be another program at the next step.
  before: Any = jax.tree.structure(old)
  if jax.tree.structure(new) != before:
    # There is no telling what was what: at least nothing is short.
    return jax.tree.map(_at_least_float32, new)
  return jax.tree.map(lambda n, o: n.astype(o.dtype) if _is_float(n) else n, new, old)
