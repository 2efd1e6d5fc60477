"""The deployed network as one function of named weights: what is exported, folded and quantised.

A `Program` takes inputs as the data set stores them. `from_network` makes one from a network and
its variables; `jaxdistill.export.fold` and `jaxdistill.export.quantize_weights` turn one into
another; `stablehlo` serialises one, so that any process with JAX can run it.

What rewrites a trained network works on its jaxpr, as one list of `Operations`: there a BatchNorm
is what it computes, whoever wrote the module, and who uses a value is known exactly.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from jaxdistill import _check
from jaxdistill.export import _inputs
from jaxdistill.runs import is_key, named_leaves
from jaxdistill.types import Network

__all__ = [
  "PLATFORMS",
  "Operations",
  "Program",
  "Rule",
  "apply_operation",
  "batched",
  "from_network",
  "is_literal",
  "stablehlo",
  "trace_operations",
  "traced",
]

PyTree = Any
PLATFORMS = ("cpu", "cuda", "tpu")


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
  """A network in inference mode, and what its weights are.

  Attributes:
    name: the network's.
    leaves: the weights by path, ``params/Dense_0/kernel``.
    call: ``(leaves, inputs [B, ...]) -> logits [B, ..., K]``, for any B.
    inputs: shapes and dtypes of the inputs of one example, as the data set stores them.
    platforms: where the exported program is to run.
    folded: the BatchNorms that are part of a kernel now, by path.
    unfolded: those that `jaxdistill.export.fold` had to leave.
  """

  name: str
  leaves: dict[str, Any] = dataclasses.field(repr=False)
  call: Callable[[Mapping[str, Any], PyTree], Any] = dataclasses.field(repr=False)
  inputs: PyTree
  platforms: tuple[str, ...] = PLATFORMS
  folded: tuple[str, ...] = ()
  unfolded: tuple[str, ...] = ()

  def logits(self, inputs: PyTree, batch_size: int = 256) -> np.ndarray:
    """The logits of N examples, computed here, as a NumPy array ``[N, ..., K]``.

    On the CPU, where this process has it, so that they can be compared with those of another
    process to rounding: a GPU multiplies with fewer bits than float32 has.

    Args:
      inputs: ``[N, ...]``, in the structure and the dtypes of the stored inputs.
      batch_size: how many at once; the last batch is padded.

    Returns:
      ``[N, ..., K]``.

    Raises:
      TypeError: another structure or dtype.
      ValueError: another shape.
    """
    _check.whole("batch_size", batch_size)
    accepted, size = _inputs.as_batch(inputs, batched(self.inputs, 1), self.name)
    batch_size = min(batch_size, size)
    call = jax.jit(self.call)
    found = []
    with jax.default_device(_cpu()):
      leaves = {name: _host(leaf) for name, leaf in self.leaves.items()}
      for begin in range(0, size, batch_size):
        rows = np.arange(begin, begin + batch_size)
        rows = np.where(rows < size, rows, 0)
        batch = jax.tree.map(lambda leaf, rows=rows: np.asarray(leaf)[rows], accepted)
        found.append(np.asarray(call(leaves, batch)))
    return np.concatenate(found)[:size]


def from_network(
  network: Network,
  variables: PyTree,
  *,
  stored: PyTree,
  normalize: Callable[[Any], Any] | None = None,
  name: str | None = None,
) -> Program:
  """A network and its variables as a program.

  Args:
    network: from `jaxdistill.networks`.
    variables: the trained variables, of one seed.
    stored: shapes and dtypes of the inputs of one example, without the batch axis, as
      `jaxdistill.export.save_student` takes them.
    normalize: what is done to stored inputs before the network sees them; None for nothing.
    name: the network's own by default.

  Returns:
    The program. Where the network does not allow a symbolic batch size, it computes every example
    alone.

  Raises:
    TypeError: ``network``, ``normalize`` or ``stored`` is not of the kind described.
    ValueError: it cannot be traced, or its variables do not fit.

  >>> import jax.numpy as jnp
  >>> from jaxdistill.types import Outputs
  >>> apply = lambda variables, x, *, train, key: (Outputs(logits=x @ variables["kernel"]), {})
  >>> network = Network(init=lambda key, x: {"kernel": jnp.eye(2)}, apply=apply)
  >>> stored = jax.ShapeDtypeStruct((2,), jnp.float32)
  >>> program = from_network(network, {"kernel": 2 * jnp.eye(2)}, stored=stored)
  >>> program.logits([[1.0, 2.0]]).tolist()
  [[2.0, 4.0]]
  """
  if not isinstance(network, Network):
    raise TypeError(
      f"network must be a Network, got {_check.show(network)}; give networks.linen(module)."
    )
  if normalize is not None and not callable(normalize):
    raise TypeError(
      f"normalize={normalize!r} is no function; give data.normalizer((mean, std)), for example."
    )
  leaves = {name: _host(leaf) for name, leaf in named_leaves("variables", variables).items()}
  names, structure = list(leaves), jax.tree.structure(variables)

  def call(given: Mapping[str, Any], inputs: PyTree) -> Any:
    seen = inputs if normalize is None else normalize(inputs)
    tree = jax.tree.unflatten(structure, [given[name] for name in names])
    return network.apply(tree, seen, train=False, key=None)[0].logits

  shapes = jax.tree.map(_inputs.stored_shape, stored, is_leaf=lambda leaf: leaf is None)
  if not jax.tree.leaves(shapes):
    raise TypeError(f"stored={stored!r} has no arrays; give the shapes of one example's inputs.")
  program = Program(name or network.name, leaves, call, shapes)
  try:
    traced(program)
    return program
  except Exception as error:  # Anything may be wrong with a module that nobody here wrote.
    problem = error
  alone = dataclasses.replace(program, call=functools.partial(_each, call))
  try:
    traced(alone)
  except Exception as error:
    raise ValueError(
      f"{program.name} cannot be traced for inputs {shapes} ({_check.short(problem)}; one "
      f"example alone: {_check.short(error)})"
    ) from error
  return alone


def traced(program: Program) -> Operations:
  """The operations of a program, for a symbolic batch size.

  Raises:
    ValueError: its logits are not ``[batch, ..., K]``.
  """
  (batch,) = jax.export.symbolic_shape("batch")
  found = trace_operations(program.call, program.leaves, batched(program.inputs, batch))
  shape: tuple[Any, ...] = getattr(found.output.aval, "shape", ())
  if len(shape) < 2 or shape[0] != batch:
    raise ValueError(f"the logits of {program.name} have the shape {shape}, not [batch, ..., K].")
  return found


def batched(inputs: PyTree, size: Any) -> PyTree:
  """Shapes of one example's inputs as those of a batch; the size may be symbolic.

  >>> import jax.numpy as jnp
  >>> batched(jax.ShapeDtypeStruct((8,), jnp.uint8), 4).shape
  (4, 8)
  """
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype), inputs)


def stablehlo(program: Program, *, weights: bool = True) -> tuple[bytes, dict[str, Any]]:
  """A program as serialised StableHLO (`jax.export`) with a symbolic batch size.

  Args:
    program: the program.
    weights: whether the weights are inside; else they are its first argument, by name.

  Returns:
    The bytes, and what is to be written beside them: ``jax`` (the version that made it),
    ``least_jax`` (the least that is sure to load it: a program loads in the version that made it
    and, for six months, in later ones; JAX promises nothing for earlier ones, and one made by 0.12
    does not load in 0.10), ``stablehlo`` (its version), ``calling_convention`` (JAX's number for
    the form), ``platforms``.

  Raises:
    ValueError: the program cannot be exported: it calls Python at run time, for example.
  """
  (batch,) = jax.export.symbolic_shape("batch")
  specs = batched(program.inputs, batch)
  constants = {name: _host(leaf) for name, leaf in program.leaves.items()}
  shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in constants.items()}
  inside = jax.jit(lambda inputs: program.call(constants, inputs))
  called, args = (inside, (specs,)) if weights else (jax.jit(program.call), (shapes, specs))
  here = jax.export.default_export_platform()
  for platforms in (program.platforms, (here,)):
    try:
      exported = jax.export.export(called, platforms=platforms)(*args)
      if exported.nr_devices != 1:
        raise ValueError(f"it became a program for {exported.nr_devices} devices")
      serialized = bytes(exported.serialize())
    except Exception as error:  # Anything may be wrong with a module that nobody here wrote.
      problem = error
      continue
    version = re.search(rb"StableHLO_v([0-9.]+)", exported.mlir_module_serialized[:100])
    return serialized, {
      "jax": jax.__version__,
      "least_jax": jax.__version__,
      "stablehlo": version[1].decode() if version else None,
      "calling_convention": exported.calling_convention_version,
      "platforms": list(exported.platforms),
    }
  raise ValueError(
    f"{program.name} cannot be exported as StableHLO ({_check.short(problem)}): take out what "
    "calls Python at run time (jax.debug, jax.pure_callback) and what fixes the devices."
  ) from problem


def _each(call: Callable[..., Any], leaves: Mapping[str, Any], inputs: PyTree) -> Any:
  """A program of one example, mapped over the batch."""

  def one_example(example: PyTree) -> Any:
    return call(leaves, jax.tree.map(lambda leaf: leaf[None], example))[0]

  return jax.vmap(one_example)(inputs)


def _cpu() -> Any:
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError:  # JAX_PLATFORMS leaves it out
    return None


def _host(leaf: Any) -> Any:
  """A copy that lies on no device, or on one; keys of random streams stay as they are."""
  return leaf if is_key(leaf) else np.asarray(leaf)


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


def apply_operation(equation: Any, values: Sequence[Any]) -> list[Any]:
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
class Operations:
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
        out = apply_operation(equation, [read(atom) for atom in equation.invars])
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


def trace_operations(
  call: Callable[[Mapping[str, Any], PyTree], Any], leaves: Any, inputs: PyTree
) -> Operations:
  """Traces a network.

  Args:
    call: ``(weights by name, inputs) -> logits``.
    leaves: the weights by name, or their shapes.
    inputs: arrays, tracers or shapes, batch axis first; it may be symbolic.

  Returns:
    The operations.

  >>> import jax.numpy as jnp
  >>> call = lambda leaves, x: jax.nn.relu(x @ leaves["kernel"])
  >>> flat = trace_operations(call, {"kernel": jnp.ones((2, 3))}, jnp.ones((1, 2)))
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
  return Operations(
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
      out = apply_operation(equation, operands)
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
