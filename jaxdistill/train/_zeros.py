"""What of a program is zero whatever it is given: a proof by its operations, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

__all__ = ["zero_outputs"]

# Zero where one of the factors is (of numbers that are finite: others end a run anyway), ...
_PRODUCTS = frozenset({"mul", "dot_general"})
# ... where all operands are, or the first one, in which the others say how or where.
_SUMS = frozenset({"add", "add_any", "sub", "max", "min", "concatenate", "pad", "sqrt", "neg"})
_SUMS |= {"abs", "sign", "square", "integer_pow", "tanh", "sin", "cbrt", "real", "imag", "conj"}
_SUMS |= {"convert_element_type", "reduce_precision", "broadcast_in_dim", "reshape", "transpose"}
_SUMS |= {"squeeze", "slice", "rev", "copy", "reduce_sum", "reduce_max", "reduce_min", "cumsum"}
_SUMS |= {"expand_dims", "sharding_constraint", "psum", "pmean"}
_FIRSTS = frozenset({"div", "dynamic_slice", "gather"})


def zero_outputs(program: ClosedJaxpr, known: Sequence[bool]) -> list[bool]:
  """Which outputs of a program are zero for all its inputs.

  Says False where it does not know: of loops, and of operations that are not listed here.

  Args:
    program: from `jax.make_jaxpr`.
    known: for each input, whether it is known to be zero.

  Returns:
    A bool for each output.

  >>> program = jax.make_jaxpr(lambda x, y: (0 * x - 0 * y, x - y))(1.0, 1.0)
  >>> zero_outputs(program, [False, False]), zero_outputs(program, [True, True])
  ([True, False], [True, True])
  """
  jaxpr = program.jaxpr
  zero = dict(zip(jaxpr.constvars, map(_is_zero, program.consts), strict=True))
  zero.update(zip(jaxpr.invars, known, strict=True))

  def of(atom: Any) -> bool:
    return _is_zero(atom.val) if isinstance(atom, Literal) else zero.get(atom, False)

  for equation in jaxpr.eqns:
    made = _outputs(equation, [of(operand) for operand in equation.invars])
    zero.update(zip(equation.outvars, made, strict=True))
  return [of(atom) for atom in jaxpr.outvars]


def _outputs(equation: Any, operands: list[bool]) -> list[bool]:
  name, params, count = equation.primitive.name, equation.params, len(equation.outvars)
  if name in ("scan", "while"):
    return [False] * count
  if name == "cond":
    each = [zero_outputs(branch, operands[1:]) for branch in params["branches"]]
    return [all(one) for one in zip(*each, strict=True)]
  called = params.get("jaxpr", params.get("call_jaxpr"))
  if called is not None:  # jit and its like
    closed = called if isinstance(called, ClosedJaxpr) else ClosedJaxpr(called, ())
    return zero_outputs(closed, operands)
  if name == "optimization_barrier":
    return operands
  if name in _PRODUCTS:
    return [any(operands)] * count
  if name in _FIRSTS:
    return [operands[0]] * count
  if name == "select_n":
    return [all(operands[1:])]
  return [name in _SUMS and all(operands)] * count


def _is_zero(value: Any) -> bool:
  if isinstance(value, jax.core.Tracer) or not hasattr(value, "dtype"):
    return isinstance(value, int | float) and value == 0
  plain = jax.dtypes.issubdtype(value.dtype, np.number) or value.dtype == bool
  return bool(plain) and not np.any(np.asarray(value))
