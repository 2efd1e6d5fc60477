"""A network's computation as one flat list of operations, to be looked at and run in another way.

What rewrites a trained network (`jaxdistill.folding`, `jaxdistill.int8`) works on the jaxpr: there
a BatchNorm is what it computes, whoever wrote the module, and who uses a value is known exactly.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Literal

__all__ = ["Flat", "Rule", "bind", "is_literal", "trace"]

PyTree = Any

# Calls whose body stands in their place; of a loop or a branch it cannot.
_CALLS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"} | {
  "custom_jvp_call",
  "custom_vjp_call",
  "custom_vjp_call_jaxpr",
}
_BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def is_literal(atom: Any) -> bool:
  """Whether an operand is a number written into the operation."""
  return isinstance(atom, Literal)


def bind(equation: Any, values: Sequence[Any]) -> list[Any]:
  """Computes one operation on these values, arrays or tracers; returns its outputs."""
  out = equation.primitive.bind(*values, **equation.primitive.get_bind_params(equation.params))
  return list(out) if equation.primitive.multiple_results else [out]


class Rule(NamedTuple):
  """How a variable is computed instead of by its operation.

  Attributes:
    reads: the operands, variables or literals that come before it.
    compute: ``(*values of the operands) -> value``.
  """

  reads: tuple[Any, ...]
  compute: Callable[..., Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Flat:
  """Operations in order, calls inlined, without those that no output depends on.

  Attributes:
    equations: of a jaxpr.
    leaves: the name of each weight by its variable.
    inputs: the variables of the inputs.
    constants: the value of each other variable that is no operation's output.
    output: the variable, or literal, of the one output.
  """

  equations: list[Any]
  leaves: dict[Any, str]
  inputs: list[Any]
  constants: dict[Any, Any]
  output: Any

  def uses(self) -> collections.Counter[Any]:
    """How often each variable is used, as the output too."""
    atoms = [atom for equation in self.equations for atom in equation.invars] + [self.output]
    return collections.Counter(atom for atom in atoms if not is_literal(atom))

  def sources(self) -> dict[Any, set[str]]:
    """The weights that each variable is computed from; what depends on the inputs is absent."""
    found: dict[Any, set[str]] = {variable: {name} for variable, name in self.leaves.items()}
    found |= {variable: set() for variable in self.constants}
    for equation in self.equations:
      operands = [atom for atom in equation.invars if not is_literal(atom)]
      if not equation.effects and all(atom in found for atom in operands):
        of = set().union(*(found[atom] for atom in operands))
        found |= dict.fromkeys(equation.outvars, of)
    return found

  def needed(self, rules: Mapping[Any, Rule] | None = None, until: Any = None) -> list[int]:
    """The places of the operations that the output (or ``until``) needs, in order."""
    return self._demand(rules or {}, self.output if until is None else until)[0]

  def weights(self, rules: Mapping[Any, Rule] | None = None) -> set[str]:
    """The names of the weights that the output needs, but for those that a rule brings itself."""
    wanted = self._demand(rules or {}, self.output)[1]
    return {name for variable, name in self.leaves.items() if variable in wanted}

  def run(
    self,
    leaves: Mapping[str, Any],
    inputs: Sequence[Any],
    rules: Mapping[Any, Rule] | None = None,
    until: Any = None,
  ) -> Any:
    """Computes the output, or ``until``, and what they need.

    Args:
      leaves: weights by name; only those that are needed must be there.
      inputs: the leaves of the inputs, in order.
      rules: how a variable is computed instead of by its operation.
      until: a variable to compute instead of the output.

    Returns:
      Its value.
    """
    rules, target = rules or {}, self.output if until is None else until
    values = {variable: leaves[n] for variable, n in self.leaves.items() if n in leaves}
    values |= self.constants | dict(zip(self.inputs, inputs, strict=True))

    def read(atom: Any) -> Any:
      return atom.val if is_literal(atom) else values[atom]

    for place in self.needed(rules, target):
      equation = self.equations[place]
      rule = next((rules[v] for v in equation.outvars if v in rules), None)
      if rule is None:
        out = bind(equation, [read(atom) for atom in equation.invars])
      else:
        out = [rule.compute(*(read(atom) for atom in rule.reads))]
      values |= dict(zip(equation.outvars, out, strict=True))
    return read(target)

  def _demand(self, rules: Mapping[Any, Rule], target: Any) -> tuple[list[int], set[Any]]:
    wanted, places = {target} if not is_literal(target) else set(), []
    for place in reversed(range(len(self.equations))):
      equation = self.equations[place]
      if wanted.intersection(equation.outvars):
        places.append(place)
        rule = next((rules[v] for v in equation.outvars if v in rules), None)
        atoms = equation.invars if rule is None else rule.reads
        wanted |= {atom for atom in atoms if not is_literal(atom)}
    return places[::-1], wanted


def trace(call: Callable[[Mapping[str, Any], PyTree], Any], leaves: Any, inputs: PyTree) -> Flat:
  """Traces a network.

  Args:
    call: ``(weights by name, inputs) -> logits``.
    leaves: the weights by name, or their shapes.
    inputs: arrays, tracers or shapes, batch axis first; it may be symbolic.

  Returns:
    The operations.

  >>> import jax.numpy as jnp
  >>> call = lambda leaves, x: jax.nn.relu(x @ leaves["kernel"])
  >>> flat = trace(call, {"kernel": jnp.ones((2, 3))}, jnp.ones((1, 2)))
  >>> [equation.primitive.name for equation in flat.equations]
  ['dot_general', 'max']
  """
  shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
  given = jax.tree.leaves(inputs)
  structure = jax.tree.structure(inputs)
  names = list(shapes)

  def listed(values: Sequence[Any], given: Sequence[Any]) -> Any:
    return call(dict(zip(names, values, strict=True)), jax.tree.unflatten(structure, given))

  first = jax.make_jaxpr(listed)(list(shapes.values()), given)
  flat = jax.make_jaxpr(lambda *args: _inlined(first, args))(*list(shapes.values()), *given)
  jaxpr = flat.jaxpr
  if len(jaxpr.outvars) != 1:
    raise ValueError(f"a network must have one output, its logits; this one has {jaxpr.outvars}.")
  (output,) = jaxpr.outvars
  variables = list(jaxpr.invars)
  return Flat(
    equations=list(_live(jaxpr.eqns, output)),
    leaves=dict(zip(variables[: len(names)], names, strict=True)),
    inputs=variables[len(names) :],
    constants=dict(zip(jaxpr.constvars, flat.consts, strict=True)),
    output=output,
  )


def _inlined(closed: ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
  """Evaluates a jaxpr with the bodies of calls in their place."""
  jaxpr = closed.jaxpr
  values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
  values |= dict(zip(jaxpr.invars, args, strict=True))

  def read(atom: Any) -> Any:
    return atom.val if is_literal(atom) else values[atom]

  for equation in jaxpr.eqns:
    operands = [read(atom) for atom in equation.invars]
    body = next((equation.params[name] for name in _BODIES if name in equation.params), None)
    if equation.primitive.name in _CALLS and body is not None:
      inner = body if hasattr(body, "consts") else ClosedJaxpr(body, ())
      out = _inlined(inner, operands)
    else:
      out = bind(equation, operands)
    values |= dict(zip(equation.outvars, out, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _live(equations: Sequence[Any], output: Any) -> Iterator[Any]:
  """Without what no output depends on, such as features that nobody asked for."""
  wanted, live = {output} if not is_literal(output) else set(), []
  for equation in reversed(equations):
    if equation.effects or wanted.intersection(equation.outvars):
      live.append(equation)
      wanted |= {atom for atom in equation.invars if not is_literal(atom)}
  return reversed(live)
