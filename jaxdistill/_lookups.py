"""Which inputs a program looks up in tables, found in its jaxpr: tokens, positions, categories.

A number beyond an embedding's rows is no error on a device: it gives NaN, or another row. How many
rows there are is nobody's attribute: a module of anybody's looks its inputs up in whatever it has.
So the program is read: where an integer of the inputs becomes, with its value unchanged, the index
of a gather from what does not depend on the inputs, the table's rows bound it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from jaxdistill._compile import host_view

__all__ = ["Lookup", "check_values", "in_jaxpr", "looked_up", "of_integers"]

# What hands the values of its first operand on, in another shape or dtype, or some of them.
_HANDS_ON = {
  "broadcast_in_dim", "convert_element_type", "copy", "copy_p", "dynamic_slice", "expand_dims",
  "gather", "pad", "reshape", "rev", "sharding_constraint", "slice", "squeeze", "transpose",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Lookup:
  """An input that is looked up.

  Attributes:
    path: of the leaf among the function's arguments.
    rows: V, of the smallest table: values lie in 0 .. V-1.
  """

  path: str
  rows: int


@dataclasses.dataclass(frozen=True)
class _Value:
  """What is known of a value: the leaf whose values it has, plus a table's rows or not.

  Attributes:
    leaf: the number of that argument; None where it is computed.
    moved: whether something that is no input was added, as to negative indices.
    inputs: whether it depends on the inputs.
  """

  leaf: int | None = None
  moved: bool = False
  inputs: bool = False


_CONSTANT = _Value()


def of_integers(tree: Any) -> bool:
  """Whether any leaf may be an index, so that a program is worth reading."""
  return any(np.issubdtype(leaf.dtype, np.integer) for leaf in jax.tree.leaves(tree))


def looked_up(function: Callable[..., Any], fixed: Any, *inputs: Any) -> tuple[Lookup, ...]:
  """Which leaves of the inputs ``function(fixed, *inputs)`` looks up; by tracing alone.

  Args:
    function: traceable.
    fixed: variables, or their shapes: what tables are made of.
    *inputs: arrays, or their shapes.
  """
  traced = jax.make_jaxpr(function)(fixed, *inputs)
  return in_jaxpr(traced, len(jax.tree.leaves(fixed)), inputs)


def in_jaxpr(traced: Any, fixed: int, inputs: Any) -> tuple[Lookup, ...]:
  """The same of a program that was traced before.

  Args:
    traced: its closed jaxpr.
    fixed: how many arguments come before the inputs' leaves.
    inputs: a tuple of the arguments after those; leaves with ``inputs`` in their path are meant.
  """
  leaves = jax.tree_util.tree_leaves_with_path(inputs)
  given = [_CONSTANT] * fixed
  for i, (_, leaf) in enumerate(leaves):
    may = np.issubdtype(leaf.dtype, np.integer) and "inputs" in jax.tree_util.keystr(leaves[i][0])
    given.append(_Value(leaf=i if may else None, inputs=True))
  found: dict[int, int] = {}
  _read(traced.jaxpr, given, found)
  return tuple(Lookup(jax.tree_util.keystr(leaves[i][0]), rows) for i, rows in found.items())


def _read(jaxpr: Any, given: Sequence[_Value], found: dict[int, int]) -> list[_Value]:
  """Goes through a jaxpr; puts the rows of the tables in ``found``, returns what goes out."""
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  known = dict(zip(jaxpr.invars, given, strict=True))

  def of(atom: Any) -> _Value:
    return _CONSTANT if isinstance(atom, Literal) else known.get(atom, _CONSTANT)

  for equation in jaxpr.eqns:
    values = [of(atom) for atom in equation.invars]
    made = _of_equation(equation, values, found)
    known.update(zip(equation.outvars, made, strict=True))
  return [of(atom) for atom in jaxpr.outvars]


def _of_equation(equation: Any, values: list[_Value], found: dict[int, int]) -> list[_Value]:
  name, params, outs = equation.primitive.name, equation.params, len(equation.outvars)
  computed = _Value(inputs=any(value.inputs for value in values))
  if name in ("scan", "while", "cond"):
    _read_bodies(name, params, values, found)
    return [computed] * outs
  bodies = [body for body in map(params.get, ("jaxpr", "call_jaxpr", "fun_jaxpr")) if body]
  if bodies:  # jit, remat, custom_jvp, custom_vjp
    inner = getattr(bodies[0], "jaxpr", bodies[0])
    if len(inner.invars) == len(values) and len(inner.outvars) == outs:
      return _read(inner, values, found)
    return [computed] * outs
  if name == "gather" and not values[0].inputs and values[1].leaf is not None:
    axes = params["dimension_numbers"].start_index_map
    if len(axes) == 1 and not values[1].moved:
      rows, leaf = equation.invars[0].aval.shape[axes[0]], values[1].leaf
      found[leaf] = min(found.get(leaf, rows), rows)
    return [computed]
  return [_handed_on(name, values) or computed] * outs


def _handed_on(name: str, values: list[_Value]) -> _Value | None:
  """A value that is one of the inputs' still; None where it is computed."""
  leaves = {value.leaf for value in values}
  if name in _HANDS_ON and values[0].leaf is not None:
    return values[0]
  if name == "concatenate" and None not in leaves and len(leaves) == 1:
    return values[0] if all(value == values[0] for value in values) else None
  if name == "add":  # x + V, of a negative index: half of what jax.numpy makes of x
    (one, other) = values
    if one.leaf is not None and not one.moved and not other.inputs:
      return dataclasses.replace(one, moved=True)
  if name == "select_n":  # and the other half: x < 0 ? x + V : x
    cases = values[1:]
    same = {value.leaf for value in cases}
    if len(same) == 1 and None not in same:
      return dataclasses.replace(cases[0], moved=all(value.moved for value in cases))
  return None


def _read_bodies(name: str, params: Any, values: list[_Value], found: dict[int, int]) -> None:
  """Reads a loop's body, or the branches: what is carried may be anything after a turn."""
  carried = _Value(inputs=any(value.inputs for value in values))
  if name == "scan":
    first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
    given = [carried if first <= i < last else value for i, value in enumerate(values)]
    _read(params["jaxpr"], given, found)
  elif name == "while":
    of_test, of_body = params["cond_nconsts"], params["body_nconsts"]
    state = [carried] * (len(values) - of_test - of_body)
    _read(params["body_jaxpr"], [*values[of_test : of_test + of_body], *state], found)
  else:
    for branch in params["branches"]:
      _read(branch, values[1:], found)


def check_values(
  looked: Sequence[Lookup], inputs: Any, *, name: str, who: str, axes: int = 1
) -> None:
  """Raises for a value beyond its table, by its row and position.

  Args:
    looked: from `looked_up`.
    inputs: the same tree as there, of arrays with ``axes`` axes of examples in front; None in the
      place of a part that is not looked at. An ``index`` beside ``inputs`` says which example each
      is; where there is none, its place does.
    name: the data, as the message says it.
    who: looks them up.
    axes: how many axes of examples there are.

  Raises:
    ValueError: one is negative, or not below the table's rows.
  """
  by_path: Mapping[str, Any] = {
    jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(inputs)
  }
  for one in looked:
    leaf = by_path.get(one.path)
    if leaf is None:  # it lies elsewhere, and is looked at there
      continue
    view = host_view(leaf) if isinstance(leaf, jax.Array) else leaf
    value = np.asarray(jax.device_get(leaf) if view is None else view)
    if not value.size or (value.min() >= 0 and value.max() < one.rows):
      continue
    at = tuple(np.argwhere((value < 0) | (value >= one.rows))[0].tolist())
    row, place = at[:axes], at[axes:]
    before, _, after = one.path.partition("inputs")
    quoted = after.startswith("']")  # of a dict, ['inputs']; of a Batch, .inputs
    index = by_path.get(f"{before}index{after[:2] if quoted else ''}")
    number = np.ravel_multi_index(row, value.shape[:axes]) if index is None else index[row]
    position = f" at position {', '.join(map(str, place))}" if place else ""
    part = after.strip("[]'.")  # of the inputs, where these are several
    its = f"its inputs {part!r}" if part else "its inputs"
    raise ValueError(
      f"row {int(number)} of {name} has {value[at]}{position} in {its}"
      f", and {who} looks them up in a table of {one.rows} rows: they lie in 0 .. {one.rows - 1}. "
      "Make the data with the network's own tokenizer (data.from_text), or build the network with "
      "as many rows as there are tokens; in the place of a number that stands for none put any "
      "that is there, and give it no weight."
    )
