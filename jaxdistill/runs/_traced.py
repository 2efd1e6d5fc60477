"""What tells one traced function from another: its operations, their numbers, what goes where.

A run is known again by what it computes. Source code says too little of that (a constant comes from
elsewhere) and too much (a comment changes it); a jaxpr, what JAX traces before it compiles, is what
is computed. Functions that compute the same by the same operations have one digest, whatever their
names, the order in which independent lines were written, what is never used, and on how many
devices the arrays lie.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.extend import core, source_info_util

from jaxdistill.runs._fingerprints import checksum

__all__ = ["Traced", "difference", "traced"]

# How something is placed, compiled, called and shown: none of it is what is computed.
_NOT_COMPUTED = re.compile(r".*sharding.*|.*layouts?|name|unroll|_split_transpose|debug_info")
# Operations that hand on what they are given.
_SAME = {"sharding_constraint", "optimization_barrier", "pvary"}
# Operations that call a function: its own operations are as good as the caller's. What a loop or a
# branch does with its body is not in the body, so those stay what they are.
_CALLS = {
  **dict.fromkeys(("jit", "pjit", "checkpoint", "remat2"), "jaxpr"),
  **dict.fromkeys(("closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"), "call_jaxpr"),
  "custom_vmap_call": "call",
}
_ARRAY = "the array"


@dataclasses.dataclass(frozen=True)
class Traced:
  """What a traced function computes.

  Attributes:
    digest: 16 hexadecimal digits of all of it.
    operations: those that the outputs need, in words, each with how often it is there and the line
      of code that asks for it first; what JSON holds.
  """

  digest: str
  operations: dict[str, tuple[int, str]]


@dataclasses.dataclass(frozen=True)
class _Node:
  """A value: the operation that makes it, of which values."""

  words: str
  where: Any = None
  inputs: tuple[str, ...] = ()
  inner: tuple[Traced, ...] = ()


def traced(closed: core.ClosedJaxpr) -> Traced:
  """Lists what a traced function computes.

  Args:
    closed: from ``jax.make_jaxpr(function)(*args)``. What the function closes over counts with its
      values, its arguments with their shapes and dtypes.

  Returns:
    The `Traced`; the same in every process, for the same versions of what is traced.

  >>> def of(function):
  ...   return traced(jax.make_jaxpr(function)(1.0))
  >>> double = of(lambda x: 2 * x)
  >>> double.digest == of(lambda y: [unused := y + 1, 2 * y][1]).digest
  True
  >>> difference(double.operations, of(lambda x: 3 * x).operations).count("mul")
  2
  """
  return _Walk().listed(closed)


class _Walk:
  """One way through a jaxpr and all that are inside."""

  def __init__(self) -> None:
    self._nodes: dict[str, _Node] = {}
    self._inner: dict[int, tuple[Any, Traced]] = {}  # the jaxpr beside, so that its id stays its

  def listed(self, closed: core.ClosedJaxpr) -> Traced:
    given = [self._node(f"argument {i} {_type(v)}") for i, v in enumerate(closed.jaxpr.invars)]
    made = self._walk(closed.jaxpr, closed.consts, given)
    found: dict[str, tuple[int, str]] = {}

    for node in self._needed(made):
      if node.where or node.words.startswith(_ARRAY):  # a number stands where it is used
        times, line = found.get(node.words) or (0, _line(node.where))
        found[node.words] = times + 1, line
      for inner in node.inner:
        for words, (times, line) in inner.operations.items():
          before, first = found.get(words, (0, line))
          found[words] = before + times, first
    return Traced(_digest(*made), dict(sorted(found.items())))

  def _needed(self, made: list[str]) -> Iterator[_Node]:
    """What the outputs are made of, each once."""
    left, seen = list(made), set(made)
    while left:
      node = self._nodes[left.pop()]
      yield node
      left += [one for one in dict.fromkeys(node.inputs) if one not in seen]
      seen.update(node.inputs)

  def _node(self, words: str, *rest: Any) -> str:
    node = _Node(words, *rest)
    digest = _digest(words, *node.inputs, *(inner.digest for inner in node.inner))
    self._nodes.setdefault(digest, node)
    return digest

  def _walk(self, jaxpr: core.Jaxpr, consts: Any, given: list[str]) -> list[str]:
    """The digests of a jaxpr's outputs, from those of its arguments."""
    found: dict[Any, str] = dict(zip(jaxpr.invars, given, strict=True))
    for var, const in zip(jaxpr.constvars, consts, strict=True):
      found[var] = self._node(_constant(const))

    def of(atom: Any) -> str:
      return self._node(_constant(atom.val)) if isinstance(atom, core.Literal) else found[atom]

    for equation in jaxpr.eqns:
      made = self._outputs(equation, [of(atom) for atom in equation.invars])
      found.update(zip(equation.outvars, made, strict=True))
    return [of(atom) for atom in jaxpr.outvars]

  def _outputs(self, equation: Any, inputs: list[str]) -> list[str]:
    kind = equation.primitive.name
    if kind in _SAME:
      return inputs
    called = equation.params.get(_CALLS.get(kind, ""))
    if called is not None:
      inside = getattr(called, "jaxpr", called)
      return self._walk(inside, getattr(called, "consts", ()), inputs)
    inner = tuple(self._body(one) for one in _bodies(list(equation.params.values())))
    given = ", ".join(
      _constant(one.val) if isinstance(one, core.Literal) else _type(one) for one in equation.invars
    )
    params = ", ".join(
      f"{name}={_words(value)}"
      for name, value in sorted(equation.params.items())
      if not _NOT_COMPUTED.fullmatch(name)
    )
    made = ", ".join(map(_type, equation.outvars))
    words = f"{kind}({given}) -> {made}" + (f" [{params}]" if params else "")
    # Sharing one node, several outputs are told apart by their number.
    one = self._node(words, equation.source_info, tuple(inputs), inner)
    many = range(len(equation.outvars))
    return [one] if len(many) == 1 else [self._node(f"part {i}", None, (one,)) for i in many]

  def _body(self, body: Any) -> Traced:
    """What the body of a loop or of a branch computes."""
    if id(body) not in self._inner:
      self._inner[id(body)] = body, _Walk().listed(body)
    return self._inner[id(body)][1]


def _bodies(values: Any) -> Iterator[core.ClosedJaxpr]:
  """The jaxprs among an operation's parameters: a loop's body, or a tuple of branches."""
  for value in values:
    if isinstance(value, core.ClosedJaxpr):
      yield value
    elif isinstance(value, core.Jaxpr):
      yield core.ClosedJaxpr(value, ())
    elif isinstance(value, list | tuple):
      yield from _bodies(value)


def _line(where: Any) -> str:
  """The file, with the last folder alone (where a library is installed says nothing), and line."""
  if where is None:
    return ""
  line = "/".join(source_info_util.summarize(where).split("/")[-2:])
  return re.sub(r"[^( ]*<locals>\.(?=\w)", "", line)


def _type(atom: Any) -> str:
  aval = atom.aval
  return f"{aval.dtype}{list(aval.shape)}" if hasattr(aval, "dtype") else type(aval).__name__


def _constant(value: Any) -> str:
  """A number as it is, an array by its shape and a digest."""
  if np.shape(value) == () and not jax.dtypes.issubdtype(
    getattr(value, "dtype", np.float32), jax.dtypes.extended
  ):
    return f"{np.asarray(value)!s}:{getattr(value, 'dtype', type(value).__name__)}"
  return f"{_ARRAY} {value.dtype}{list(value.shape)} of digest {checksum(value)}"


def _words(value: Any) -> str:
  """A parameter as text that is the same in every process."""
  if isinstance(value, core.Jaxpr | core.ClosedJaxpr):
    return "..."
  if isinstance(value, Mapping):
    return "{" + ", ".join(sorted(f"{key}: {_words(one)}" for key, one in value.items())) + "}"
  if isinstance(value, set | frozenset):
    return "{" + ", ".join(sorted(map(_words, value))) + "}"
  if type(value) in (list, tuple):
    return "(" + ", ".join(map(_words, value)) + ")"
  if isinstance(value, np.ndarray | jax.Array):
    return _constant(value)
  if callable(value) and hasattr(value, "__qualname__"):
    return f"{value.__module__}.{value.__qualname__}"
  return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _digest(*parts: str) -> str:
  return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def difference(there: Mapping[str, Any], now: Mapping[str, Any], most: int = 2) -> str:
  """How two listings' operations differ, in words.

  Args:
    there: operations of one.
    now: operations of the other.
    most: how many of each are named, those first whose like the other has not at all.
  """
  said = []
  for which, mine, other in (("there", there, now), ("now", now, there)):
    alone = [words for words in mine if mine[words][0] > other.get(words, (0, ""))[0]]
    kinds = {words.split("(")[0] for words in other}
    alone.sort(key=lambda words: (words.split("(")[0] in kinds, words in other))
    named = [words + (f" by {mine[words][1]}" if mine[words][1] else "") for words in alone[:most]]
    if alone:
      more = f" and {len(alone) - most} more" if len(alone) > most else ""
      said.append(f"only {which}: {'; '.join(named)}{more}")
  return "; ".join(said) or "the same operations, put together otherwise"
