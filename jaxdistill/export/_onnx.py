"""Programs as ONNX, by jax2onnx."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jaxdistill import _check, _extras
from jaxdistill.export import _program
from jaxdistill.export._program import Operations, Program, Rule, is_literal
from jaxdistill.runs import named_leaves

__all__ = ["OPSET", "input_names", "onnx_bytes"]

# jax2onnx's own default in the versions that the extra allows.
OPSET = 23


def input_names(program: Program) -> list[str]:
  """What the inputs of an ONNX file are called: ``inputs``, or ``inputs/<key>`` for several."""
  if isinstance(program.inputs, jax.ShapeDtypeStruct):
    return ["inputs"]
  return [f"inputs/{name}" for name in named_leaves("inputs", program.inputs)]


def onnx_bytes(program: Program) -> bytes:
  """A program as an ONNX model with its weights inside and a symbolic batch size.

  Its inputs are named by `input_names`, its outputs as the program's: ``logits``. The operations
  are converted, not the modules, so that what was folded or is somebody's own module is converted
  alike.

  Args:
    program: from `as_program`, folded or not.

  Returns:
    The bytes of the file.

  Raises:
    ImportError: jax2onnx is not installed.
    ValueError: it has an operation that cannot be converted, or was read from a file, where nobody
      can see its operations.
  """
  _extras.need("ONNX", "jax2onnx")
  from jax2onnx import to_onnx

  found = _program.traced(program, "converted into ONNX")
  leaves = {name: np.asarray(leaf) for name, leaf in program.leaves.items()}
  shapes = [variable.aval for variable in found.inputs]
  specs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in shapes]
  wide = any(
    aval.dtype == np.float64
    for equation in found.equations
    for aval in (atom.aval for atom in equation.outvars)
    if hasattr(aval, "dtype")
  )
  structure = jax.tree.structure(program.inputs)

  def flat(made: Any) -> Any:
    return tuple(jax.tree.leaves(made)) if len(program.outputs) > 1 else made

  ways: list[Callable[..., Any]] = [
    lambda *inputs: flat(found.run(leaves, inputs, _paddings(found))),
    # The converter knows some of NumPy's functions better than the operations they consist of.
    lambda *inputs: flat(program.call(leaves, jax.tree.unflatten(structure, inputs))),
  ]
  problems = []
  for way in ways:
    try:
      with _quiet():
        model = to_onnx(
          way,
          specs,
          model_name=program.name,
          opset=OPSET,
          enable_double_precision=wide,
          input_names=input_names(program),
          output_names=list(program.outputs),
        )
      _without_zeros(model)
      return model.SerializeToString()
    except Exception as error:  # A converter may fail on anything that nobody has tried.
      problems.append(error)
  raise ValueError(
    f"{program.name} cannot be converted into ONNX: {_check.short(problems[0])}"
  ) from problems[0]


def _without_zeros(model: Any) -> None:
  """Takes out a Gemm's third operand where it is one 0, which ONNX Runtime's quantiser trips over.

  The converter adds it to a product that has no bias, where ONNX has left it out since opset 11.
  """
  zeros = {
    one.name
    for one in model.graph.initializer
    if not one.dims and one.raw_data and not any(one.raw_data)
  }
  for node in model.graph.node:
    if node.op_type == "Gemm" and len(node.input) == 3 and node.input[2] in zeros:
      node.input.pop()
  read = {name for node in model.graph.node for name in node.input}
  for one in [one for one in model.graph.initializer if one.name in zeros - read]:
    model.graph.initializer.remove(one)


def _paddings(found: Operations) -> dict[Any, Rule]:
  """Padding as ``jnp.pad``: lax's own, jax2onnx 0.17 converts for a batch of fixed size alone."""

  def rule(equation: Any) -> Rule:
    config = equation.params["padding_config"]
    widths = [(low, high) for low, high, _ in config]
    operand, value = equation.invars
    return Rule((operand,), lambda x: jnp.pad(x, widths, constant_values=value.val))

  return {
    equation.outvars[0]: rule(equation)
    for equation in found.equations
    if equation.primitive.name == "pad"
    and is_literal(equation.invars[1])
    and all(min(low, high) >= 0 == inner for low, high, inner in equation.params["padding_config"])
  }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps notes on shapes that the converter could not name, which say nothing to a caller."""
  logger: Any = logging.getLogger("onnx_ir")
  before = logger.level
  logger.setLevel(logging.ERROR)
  try:
    yield
  finally:
    logger.setLevel(before)
