"""Eight-bit integers in place of floats, by qwix: for the weights alone, or for activations too.

`quantize_weights` stores kernels as int8 with one scale for each output channel and multiplies them
out when they are used: a quarter of the bytes, the arithmetic of before. `quantize_activations`
also rounds what goes into every convolution and matrix product to int8, in a range that a
calibration has found, and multiplies integers. The rounding, scales and integer products are
qwix's; where they go is found among the network's operations, so that Linen, NNX and modules of
somebody's own are all the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import _extras
from jaxdistill._compile import shapes_of
from jaxdistill.export import _inputs, _program
from jaxdistill.export._program import Operations, Program, Rule, is_literal

__all__ = ["quantize_activations", "quantize_weights"]

PyTree = Any
_SCALE = "_scale"
# An array with fewer values for each scale than this is hardly smaller as int8.
_LEAST = 8


def _qwix() -> Any:
  _extras.need("int8", "qwix")
  import qwix

  return qwix


def quantize_weights(program: Program) -> Program:
  """Stores the weights as int8, each kernel's output channels with a scale of their own.

  Those are quantised that have two axes or more and at least eight values to a channel; biases,
  scales and statistics stay as they are. Symmetric, by the largest absolute value (qwix's default).

  Args:
    program: from `as_program`, folded or not, or read from a run by `load_student`.

  Returns:
    The program, with ``params/Dense_0/kernel`` as int8 and ``params/Dense_0/kernel_scale`` beside
    it.

  Raises:
    ImportError: qwix is not installed.
    ValueError: there is nothing to quantise.

  >>> call = lambda leaves, x: x @ leaves["params/kernel"]
  >>> stored = jax.ShapeDtypeStruct((8,), jnp.float32)
  >>> program = Program("net", {"params/kernel": jnp.ones((8, 2))}, call, stored)
  >>> {name: str(leaf.dtype) for name, leaf in quantize_weights(program).leaves.items()}
  {'params/kernel': 'int8', 'params/kernel_scale': 'float32'}
  """
  qwix = _qwix()
  leaves: dict[str, Any] = {}
  dtypes = {}
  for name, leaf in program.leaves.items():
    value = jnp.asarray(leaf)
    floats = jnp.issubdtype(value.dtype, jnp.floating)
    if not floats or value.ndim < 2 or value.size < _LEAST * value.shape[-1]:
      leaves[name] = leaf
      continue
    made = qwix.quantize(value, jnp.int8, channelwise_axes=[value.ndim - 1])
    leaves[name], leaves[name + _SCALE] = made.qvalue, made.scale
    dtypes[name] = value.dtype
  if not dtypes:
    raise ValueError(f"{program.name} has no weights of two axes or more, so nothing to quantise.")
  base, wanted = program.call, list(program.leaves)

  def call(given: Mapping[str, Any], inputs: PyTree) -> Any:
    full = {name: given[name] for name in wanted}
    for name, dtype in dtypes.items():
      array = qwix.QArray(jnp.asarray(given[name]), jnp.asarray(given[name + _SCALE]))
      full[name] = qwix.dequantize(array).astype(dtype)
    return base(full, inputs)

  return program.changed(leaves=leaves, call=call)


def quantize_activations(
  program: Program, calibration: PyTree, *, skip: Collection[str] = (), batch_size: int = 256
) -> Program:
  """Computes convolutions and matrix products in int8, weights and activations.

  The scale of what goes into an operation is fixed: by the largest absolute value that it takes on
  the calibration's examples, so that none of these is clipped. A product of two activations
  (attention's) and what is inside a loop stay in floats. Whether it is faster is the platform's
  matter: on a CPU, XLA computes integer convolutions more slowly than floats.

  Args:
    program: from `as_program`; fold its BatchNorm first, or that part
      stays in floats.
    calibration: inputs ``[N, ...]`` as the data set stores them, of the training split; a few
      hundred are enough.
    skip: names of kernels, ``params/Dense_0/kernel``, that stay in floats with their operation.
    batch_size: how many examples to calibrate with at once.

  Returns:
    The program: its kernels as int8 with ``..._scale`` beside them, its activations' scales inside.

  Raises:
    ImportError: qwix is not installed.
    ValueError: there is no operation to quantise, ``skip`` names none of them, the activations are
      not finite, or the program was read from a file, where nobody can see its operations.
  """
  qwix = _qwix()
  found = _program.traced(program)
  sites = _sites(found)
  if not sites:
    raise ValueError(
      f"{program.name} has no convolution or matrix product with fixed weights that can be seen; a "
      "program read from a run's folder hides its own: give the network, networks.linen(module)."
    )
  unknown = sorted(set(skip) - set(sites))
  if unknown:
    raise ValueError(f"skip names {unknown}; the kernels that can be quantised are {list(sites)}.")
  chosen = {name: site for name, site in sites.items() if name not in skip}
  ranges = _ranges(program, calibration, set(chosen), batch_size)
  unread = {site.output: Rule((site.data,), lambda data: data) for site in chosen.values()}
  leaves = {name: program.leaves[name] for name in found.weights(unread)}
  stored = {name: name if name not in leaves else f"{name}_int8" for name in chosen}
  for name, site in chosen.items():
    value = found.run(program.leaves, [None] * len(found.inputs), until=site.kernel)
    made = qwix.quantize(jnp.asarray(value), jnp.int8, channelwise_axes=site.channels)
    leaves[stored[name]], leaves[stored[name] + _SCALE] = made.qvalue, made.scale
  base, shapes = program.call, shapes_of(program.leaves)

  def call(given: Mapping[str, Any], inputs: PyTree) -> Any:
    again = _program.trace_operations(base, shapes, inputs)
    rules = {}
    for name, site in _sites(again).items():
      if name in stored:
        kernel = qwix.QArray(given[stored[name]], given[stored[name] + _SCALE])
        rules[site.output] = _integers(qwix, site, ranges[name], kernel)
    return again.run(given, jax.tree.leaves(inputs), rules)

  return program.changed(leaves=leaves, call=call)


class _Site(NamedTuple):
  """An operation one of whose operands is fixed."""

  equation: Any
  data: Any
  kernel: Any
  channels: list[int]  # the kernel's axes that have a scale for each index
  output: Any


def _sites(found: Operations) -> dict[str, _Site]:
  """The convolutions and matrix products with a fixed kernel, by its weight's name, in order."""
  sources = found.sources()
  sites: dict[str, _Site] = {}
  for equation in found.equations:
    kind = equation.primitive.name
    if kind not in ("conv_general_dilated", "dot_general"):
      continue
    fixed = [not is_literal(atom) and atom in sources for atom in equation.invars]
    if sum(fixed) != 1 or (kind != "dot_general" and fixed[0]):
      continue
    at = fixed.index(True)
    data, kernel = equation.invars[1 - at], equation.invars[at]
    if not jnp.issubdtype(kernel.aval.dtype, jnp.floating):
      continue
    if kind == "dot_general":
      contracted = equation.params["dimension_numbers"][0][at]
      channels = [axis for axis in range(kernel.aval.ndim) if axis not in contracted]
    else:
      channels = [equation.params["dimension_numbers"].rhs_spec[0]]
    name = min(sources[kernel], default="kernel")
    name = name if name not in sites else f"{name}_{len(sites)}"
    sites[name] = _Site(equation, data, kernel, channels, equation.outvars[0])
  return sites


def _integers(qwix: Any, site: _Site, largest: float, kernel: Any) -> Rule:
  """The operation in int8."""
  equation, params = site.equation, site.equation.params
  dtype = site.output.aval.dtype

  def compute(data: Any) -> Any:
    fixed = f"fixed,{-largest!r},{largest!r}"
    rounded = qwix.quantize(data, jnp.int8, calibration_method=fixed)
    if equation.primitive.name == "dot_general":
      pair = (rounded, kernel) if equation.invars[0] is site.data else (kernel, rounded)
      return qwix.dot_general(*pair, params["dimension_numbers"]).astype(dtype)
    same = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers")
    groups = ("feature_group_count", "batch_group_count")
    keywords = {name: params[name] for name in (*same, *groups)}
    return qwix.conv_general_dilated(rounded, kernel, **keywords).astype(dtype)

  return Rule((site.data,), compute)


def _ranges(
  program: Program, calibration: PyTree, names: Collection[str], batch_size: int
) -> dict[str, float]:
  """The largest absolute value that goes into each operation, over the calibration's examples."""
  accepted, size = program.accepted(calibration)

  @jax.jit
  def observe(leaves: Mapping[str, Any], inputs: PyTree) -> dict[str, Any]:
    again = _program.trace_operations(program.call, leaves, inputs)
    seen = {}

    def watch(name: str, site: _Site) -> Rule:
      def compute(*operands: Any) -> Any:
        data = operands[site.equation.invars.index(site.data)]
        seen[name] = jnp.max(jnp.abs(data)).astype(jnp.float32)
        return _program.apply_operation(site.equation, operands)[0]

      return Rule(tuple(site.equation.invars), compute)

    rules = {site.output: watch(n, site) for n, site in _sites(again).items() if n in names}
    again.run(leaves, jax.tree.leaves(inputs), rules)
    return seen

  largest = dict.fromkeys(names, 0.0)
  for batch in _inputs.padded_batches(accepted, size, batch_size):
    for name, value in jax.device_get(observe(program.leaves, batch)).items():
      largest[name] = float(np.maximum(largest[name], value))
  wrong = sorted(name for name, value in largest.items() if not np.isfinite(value))
  if wrong:
    raise ValueError(f"what goes into {wrong} is not finite on the calibration's examples.")
  return {name: value or 1.0 for name, value in largest.items()}
