"""BatchNorm folded into the convolution or dense layer before it, in any network.

In inference, BatchNorm is ``(y - mean) / sqrt(variance + epsilon) * scale + bias``: one factor and
one shift for each channel, so that a linear layer before it can do the same alone, with its kernel
multiplied and its bias moved. It is looked for among the network's operations, not its modules, so
that it makes no difference whether it is Linen, NNX or somebody's own.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill._compile import shapes_of
from jaxdistill.export import _program
from jaxdistill.export._program import Operations, Program, Rule, is_literal

__all__ = ["fold"]

# What may lie between a weight and its use without changing its values.
_CASTS = ("convert_element_type", "copy")
_LAYOUTS = ("reshape", "squeeze", "transpose", "broadcast_in_dim")
# What BatchNorm does to a layer's output, one number for each channel at a time.
_AFFINE = ("add", "sub", "mul", "div")


class _Step(NamedTuple):
  """One operation on a layer's output, with something that does not depend on the inputs."""

  kind: str
  other: Any
  first: bool  # whether the layer's output is the first operand


class _Fold(NamedTuple):
  """A layer, and what comes after it and becomes part of it."""

  layer: Any
  kernel: str
  axis: int  # of the kernel's channels
  channel: int  # the same axis of the output
  steps: tuple[_Step, ...]
  output: Any
  bias: str = ""


def fold(program: Program) -> Program:
  """Folds every BatchNorm into the linear layer before it, where that is exact.

  It is where the layer's output goes nowhere else and its kernel is used once. What cannot be
  folded (BatchNorm before a layer, after an addition or a ReLU, on a shared kernel) is left as it
  is. The logits are the same to rounding.

  Args:
    program: from `as_program`.

  Returns:
    The program with fewer weights: the kernels multiplied, biases under ``bias`` beside them, and
    ``folded`` and ``unfolded`` naming the BatchNorms by path.

  Raises:
    ValueError: the program was read from a file, where nobody can see its operations.

  >>> import flax.linen as nn
  >>> from jaxdistill import networks
  >>> from jaxdistill.types import Model
  >>> layers = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True)])
  >>> network = networks.linen(layers)
  >>> variables = network.init(jax.random.key(0), jnp.ones((1, 2)))
  >>> stored = jax.ShapeDtypeStruct((2,), jnp.float32)
  >>> folded = fold(_program.as_program(Model(network, variables), stored=stored))
  >>> sorted(folded.leaves), folded.folded
  (['params/layers_0/bias', 'params/layers_0/kernel'], ('layers_1',))
  """
  found = _program.traced(program, "folded")
  folds = _folds(found)
  used, kept = found.weights(), found.weights(_rules(folds, {}))
  # A weight that no logit depends on (an auxiliary head's) stays: it is no BatchNorm of ours.
  leaves = {n: leaf for n, leaf in program.leaves.items() if n in kept or n not in used}
  for one in folds:
    factor, shift = _numbers(found, one, program.leaves)
    kernel = jnp.asarray(program.leaves[one.kernel])
    along = tuple(-1 if axis == one.axis else 1 for axis in range(kernel.ndim))
    leaves[one.kernel] = (kernel * factor.reshape(along)).astype(kernel.dtype)
    leaves[one.bias] = shift
  base, shapes = program.call, shapes_of(program.leaves)

  def call(given: Mapping[str, Any], inputs: Any) -> Any:
    again = _program.trace_operations(base, shapes, inputs)
    return again.run(given, jax.tree.leaves(inputs), _rules(_folds(again), given))

  left = _owners(n for n in leaves if n.startswith("batch_stats/"))
  gone = [name for name in _owners(set(program.leaves) - set(leaves)) if name not in left]
  folded = tuple(sorted({*program.folded, *gone}))
  return program.changed(leaves=leaves, call=call, folded=folded, unfolded=tuple(left))


def _folds(found: Operations) -> list[_Fold]:
  """What can be folded, in order."""
  uses, sources = found.uses(), found.sources()
  users = {a: e for e in found.equations for a in e.invars if not is_literal(a)}
  makers = {v: e for e in found.equations for v in e.outvars}
  folds = []
  for layer in found.equations:
    axes = _channels(layer, sources)
    kernel = axes and _kernel(found, layer.invars[1], axes[0], makers, uses)
    if not axes or not kernel:
      continue
    output, steps = layer.outvars[0], []
    while uses[output] == 1 and output in users:
      step = _step(users[output], output, axes[1], sources)
      if step is None:
        break
      steps.append(step)
      output = users[output].outvars[0]
    of = {name for step in steps for name in sources.get(step.other, ())} if steps else set()
    scaled = any(step.kind in ("mul", "div") for step in steps)
    if scaled and any(not name.startswith("params/") for name in of):
      folds.append(_Fold(layer, *kernel, axes[1], tuple(steps), output))
  return _with_biases(found, folds)


def _channels(layer: Any, sources: Mapping[Any, Any]) -> tuple[int, int] | None:
  """The axes of kernel and output that are the channels, if it is a layer with a fixed kernel."""
  if layer.primitive.name not in ("conv_general_dilated", "dot_general"):
    return None
  data, kernel = layer.invars
  if is_literal(data) or is_literal(kernel) or data in sources or kernel not in sources:
    return None
  params = layer.params
  if layer.primitive.name == "conv_general_dilated":
    numbers = params["dimension_numbers"]
    grouped = params["batch_group_count"] != 1
    return None if grouped else (numbers.rhs_spec[0], numbers.out_spec[1])
  (_, contracted), (_, batch) = params["dimension_numbers"]
  free = [axis for axis in range(kernel.aval.ndim) if axis not in contracted]
  return (free[0], layer.outvars[0].aval.ndim - 1) if len(free) == 1 and not batch else None


def _kernel(
  found: Operations, operand: Any, axis: int, makers: Mapping[Any, Any], uses: Mapping[Any, int]
) -> tuple[str, int] | None:
  """The weight that an operand is, but for its layout and dtype, and its axis of the channels.

  None where the operand is computed in another way, or used for something else too.
  """
  steps, variable = [], operand
  while variable in makers:
    maker = makers[variable]
    name = maker.primitive.name
    if name not in (*_CASTS, *_LAYOUTS) or len(maker.invars) != 1 or uses[variable] != 1:
      return None
    steps += [maker] if name in _LAYOUTS else []
    variable = maker.invars[0]
  weight = None if is_literal(variable) else found.leaves.get(variable)
  if weight is None or uses[variable] != 1:
    return None
  shape, wanted = variable.aval.shape, _indices(operand.aval.shape, axis)
  for own in range(len(shape)):
    # Where the weight's axis ends up: its indices, laid out as the weight is.
    moved = _indices(shape, own)
    for step in reversed(steps):
      out = step.outvars[0].aval.shape
      if step.primitive.name == "transpose":
        moved = np.transpose(moved, step.params["permutation"])
      elif math.prod(out) == moved.size:
        moved = moved.reshape(out)
      else:
        return None
    if np.array_equal(moved, wanted):
      return weight, own
  return None


def _indices(shape: Sequence[int], axis: int) -> np.ndarray:
  """An array of this shape whose values are the places along an axis."""
  along = [1] * len(shape)
  along[axis] = -1
  return np.broadcast_to(np.arange(shape[axis]).reshape(along), shape)


def _step(user: Any, value: Any, channel: int, sources: Mapping[Any, Any]) -> _Step | None:
  """What an operation does to a layer's output, if it is affine for each channel."""
  name = user.primitive.name
  if name == "convert_element_type":
    floats = jnp.issubdtype(user.outvars[0].aval.dtype, jnp.floating)
    return _Step("cast", None, True) if floats else None
  if name not in _AFFINE:
    return None
  first = user.invars[0] is value
  other = user.invars[1] if first else user.invars[0]
  if (not is_literal(other) and other not in sources) or (name == "div" and not first):
    return None
  shape, whole = other.aval.shape, value.aval.shape
  each = len(shape) == len(whole) and all(
    size == 1 or (axis == channel and size == whole[axis]) for axis, size in enumerate(shape)
  )
  return _Step(name, other, first) if shape == () or each else None


def _numbers(found: Operations, one: _Fold, leaves: Mapping[str, Any]) -> tuple[Any, Any]:
  """The factor and the shift of each channel, ``[D]`` each."""
  size = one.layer.outvars[0].aval.shape[one.channel]
  dtype = one.output.aval.dtype
  factor, shift = jnp.ones(size, dtype), jnp.zeros(size, dtype)
  for kind, other, first in one.steps:
    if kind == "cast":
      continue
    value = found.run(leaves, [None] * len(found.inputs), until=other)
    value = jnp.broadcast_to(jnp.reshape(jnp.asarray(value, dtype), -1), size)
    if kind == "sub":
      factor, shift = (factor, shift - value) if first else (-factor, value - shift)
    elif kind == "add":
      shift = shift + value
    else:
      by = value if kind == "mul" else 1 / value
      factor, shift = factor * by, shift * by
  return factor, shift


def _rules(folds: Sequence[_Fold], given: Mapping[str, Any]) -> dict[Any, Rule]:
  """How the outputs of what is folded are computed."""

  def rule(one: _Fold) -> Rule:
    def compute(data: Any, kernel: Any) -> Any:
      (out,) = _program.apply_operation(one.layer, [data, kernel])
      bias = jnp.asarray(given[one.bias])
      along = tuple(-1 if axis == one.channel else 1 for axis in range(out.ndim))
      return (out.astype(one.output.aval.dtype) + bias.reshape(along)).astype(out_dtype)

    out_dtype = one.output.aval.dtype
    return Rule(tuple(one.layer.invars), compute)

  return {one.output: rule(one) for one in folds}


def _with_biases(found: Operations, folds: Sequence[_Fold]) -> list[_Fold]:
  """Gives each a name for its bias: ``bias`` beside the kernel, unless that is something else."""
  taken = found.weights(_rules(folds, {})) if folds else set()
  named = []
  for one in folds:
    beside = f"{one.kernel.rpartition('/')[0]}/bias".lstrip("/")
    name = beside if beside not in taken else f"{one.kernel}_shift"
    taken.add(name)
    named.append(one._replace(bias=name))
  return named


def _owners(names: Collection[str] | Any) -> list[str]:
  """The modules whose statistics these are, by path."""
  split = (name.split("/") for name in names)
  return sorted({"/".join(parts[1:-1]) or parts[-1] for parts in split if parts[0] != "params"})
