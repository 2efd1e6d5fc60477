"""What of a function's arguments its outputs have anything to do with, read off its program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["depend_on", "narrowed", "unread"]

PyTree = Any
# What runs its inside more than once, or only some of it: what goes in may come out anywhere.
_LOOPS = ("scan", "while")


def depend_on(function: Callable[..., PyTree], argument: PyTree, *rest: PyTree) -> list[bool]:
  """Whether each of a function's outputs has anything to do with its first argument.

  Args:
    function: of arrays; it is traced.
    argument: a pytree of arrays, or of their shapes.
    *rest: further arguments, which are not asked about.

  Returns:
    One answer for each leaf of the output. Where that is hard to tell, in a loop, it is yes.

  >>> depend_on(lambda x: {"a": x["y"] + 1, "b": jnp.ones(2)}, {"y": 1.0})
  [True, False]
  """
  jaxpr, first = jax.make_jaxpr(function)(argument, *rest).jaxpr, len(jax.tree.leaves(argument))
  return _reached(jaxpr, [i < first for i in range(len(jaxpr.invars))])


def unread(function: Callable[..., PyTree], inputs: PyTree, *rest: PyTree) -> tuple[str, ...]:
  """The entries of a dict of inputs that no output has anything to do with.

  What a teacher, a loss or an objective reads lies in the same dict as what a network does, and a
  deployed network is not to ask for it.

  Args:
    function: of the inputs and of the rest; it is traced.
    inputs: arrays, or their shapes.
    *rest: further arguments.

  Returns:
    Their keys, sorted; none where the inputs are no dict, or where nothing is read at all.

  >>> unread(lambda x: x["image"] + 1, {"image": 1.0, "target": 2.0})
  ('target',)
  """
  if not isinstance(inputs, Mapping):
    return ()
  jaxpr = jax.make_jaxpr(function)(dict(inputs), *rest).jaxpr
  paths = [path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(dict(inputs))]
  paths += [None] * len(jax.tree.leaves(rest))
  idle = [key for key in sorted(inputs) if not any(_reached(jaxpr, [key == p for p in paths]))]
  return () if len(idle) == len(inputs) else tuple(idle)


def narrowed(
  function: Callable[..., PyTree], inputs: PyTree, *rest: PyTree
) -> tuple[Callable[..., PyTree], PyTree, tuple[str, ...]]:
  """A function of a batch without the inputs that it does not read.

  Args:
    function: of the inputs ``[B, ...]`` and of the rest.
    inputs: shapes of a batch.
    *rest: further arguments, or their shapes.

  Returns:
    The function of the inputs that are left and of the rest, for any B; these inputs; and the keys
    of the others, see `unread`.

  >>> narrow, left, idle = narrowed(lambda x: 2 * x["a"], {"a": jnp.ones(3), "b": jnp.ones(3)})
  >>> narrow({"a": jnp.ones(2)}).tolist(), sorted(left), idle
  ([2.0, 2.0], ['a'], ('b',))
  """
  idle = unread(function, inputs, *rest)
  if not idle:
    return function, inputs, ()
  blank = {key: inputs[key] for key in idle}

  def narrow(given: PyTree, *rest: PyTree) -> PyTree:
    # What nobody reads is not asked for, and the compiler drops what stands in its place.
    size = jax.tree.leaves(given)[0].shape[0]
    zeros = jax.tree.map(lambda leaf: jnp.zeros((size, *leaf.shape[1:]), leaf.dtype), blank)
    return function({**given, **zeros}, *rest)

  return narrow, {key: leaf for key, leaf in inputs.items() if key not in idle}, idle


def _reached(jaxpr: Any, inputs: Sequence[bool]) -> list[bool]:
  """Which of a program's outputs its marked inputs reach, from the start to the end."""
  marked = {id(v) for v, is_marked in zip(jaxpr.invars, inputs, strict=True) if is_marked}
  for equation in jaxpr.eqns:
    given = [id(v) in marked for v in equation.invars]
    if not any(given):
      continue
    inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    inner = getattr(inner, "jaxpr", inner)  # some are wrapped together with their constants
    out = [True] * len(equation.outvars)
    once = inner is not None and equation.primitive.name not in _LOOPS
    if once and (len(inner.invars), len(inner.outvars)) == (len(given), len(out)):
      out = _reached(inner, given)  # what is called once, with what the operation is given
    marked |= {id(v) for v, does in zip(equation.outvars, out, strict=True) if does}
  return [id(v) in marked for v in jaxpr.outvars]
