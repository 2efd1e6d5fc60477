"""The deployed network as one function of named weights: saved, exported, folded, quantised.

A `Program` takes inputs as the data set stores them, those that its network reads, and puts out
logits, or features by name. `as_program` makes one from a model and
`jaxdistill.export.load_student` from a run's folder; `jaxdistill.export.fold` and
`jaxdistill.export.quantize_weights` turn one into another; `export_program` lowers one to StableHLO
that any process with JAX can run.

What rewrites a trained network works on its jaxpr, as one list of `Operations`: there a BatchNorm
is what it computes, whoever wrote the module, and who uses a value is known exactly.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import jax
import jax.export
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from jaxdistill import _check
from jaxdistill._compile import shapes_of
from jaxdistill._reach import narrowed
from jaxdistill.export import _inputs
from jaxdistill.runs import is_key, named_leaves
from jaxdistill.types import Model, Network, Outputs, with_logits

__all__ = [
  "PLATFORMS",
  "Operations",
  "Program",
  "Rule",
  "apply_operation",
  "as_program",
  "batched",
  "each_alone",
  "export_program",
  "host",
  "is_literal",
  "portable",
  "stablehlo",
  "trace_operations",
  "traced",
  "untraced",
]

PyTree = Any
PLATFORMS = ("cpu", "cuda", "tpu")


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
  """A network in inference mode, and what its weights are: call it on inputs as they are stored.

  Attributes:
    name: the network's.
    leaves: the weights by path, ``params/Dense_0/kernel``.
    call: ``(leaves, inputs [B, ...]) -> logits [B, ..., K]``, for any B; a feature in their place,
      or ``{name: [B, ...]}`` of several outputs.
    inputs: shapes and dtypes of the inputs of one example, as the data set stores them: those that
      the network reads.
    outputs: the names of what it puts out, sorted: ``"logits"``, or features.
    ignored: entries of the inputs that it may be given and does not read.
    platforms: where the exported program is to run.
    folded: the BatchNorms that are part of a kernel now, by path.
    unfolded: those that `jaxdistill.export.fold` had to leave.
  """

  name: str
  leaves: dict[str, Any] = dataclasses.field(repr=False)
  call: Callable[[Mapping[str, Any], PyTree], Any] = dataclasses.field(repr=False)
  inputs: PyTree
  outputs: tuple[str, ...] = ("logits",)
  ignored: tuple[str, ...] = ()
  platforms: tuple[str, ...] = PLATFORMS
  folded: tuple[str, ...] = ()
  unfolded: tuple[str, ...] = ()

  @functools.cached_property
  def compiled(self) -> Callable[[Mapping[str, Any], PyTree], Any]:
    """``call``, compiled once for each batch size."""
    return jax.jit(self.call)

  def changed(self, **fields: Any) -> Program:
    """The program with other weights, or computed otherwise."""
    own = {field.name: getattr(self, field.name) for field in dataclasses.fields(Program)}
    return Program(**own | fields)

  def __call__(self, inputs: PyTree) -> Any:
    """The logits of a batch, or what else it is deployed for; under ``jit`` too.

    A dtype is converted where that is safe: between floating-point types; between integer types,
    if the values fit; Python's own numbers, in lists, to either. Nothing else is: images in 0 ..
    255 and in 0.0 .. 1.0 are not the same, and a cast would hide it.

    Args:
      inputs: ``[B, ...]`` for any B from 1 on: NumPy or JAX arrays or lists, in the structure of
        the stored inputs.

    Returns:
      ``[B, K]``, or ``[B, L, K]`` for tokens; of several outputs a dict.

    Raises:
      TypeError: another structure, or a dtype that is not converted.
      ValueError: another shape, no batch axis, no example, or values that do not fit the dtype.
    """
    return self.compiled(self.leaves, self.accepted(inputs)[0])

  def predict(self, inputs: PyTree, batch_size: int = 256) -> Any:
    """The outputs of N examples, ``batch_size`` at once, as NumPy arrays: logits ``[N, ..., K]``.

    The last batch is padded, so that one program is compiled.

    Args:
      inputs: ``[N, ...]``, in the structure of the stored inputs; converted as in a call.
      batch_size: how many at once, at most.

    Raises:
      TypeError: another structure, or a dtype that is not converted.
      ValueError: another shape, no example, or a ``batch_size`` below 1.
    """
    accepted, size = self.accepted(inputs)
    batches = _inputs.padded_batches(accepted, size, batch_size)
    found = [jax.device_get(self.compiled(self.leaves, batch)) for batch in batches]
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:size], *found)

  def named(self, made: Any) -> dict[str, Any]:
    """What a call returned, by the names of the outputs."""
    return dict(made) if isinstance(made, Mapping) else {self.outputs[0]: made}

  def accepted(self, inputs: PyTree) -> tuple[PyTree, int]:
    """The inputs as arrays of the stored shapes and dtypes, and how many examples they are."""
    if isinstance(inputs, Mapping):
      inputs = {key: value for key, value in inputs.items() if key not in self.ignored}
    return _inputs.as_batch(inputs, batched(self.inputs, 1), self.name)


def as_program(
  model: Model,
  *,
  stored: PyTree,
  normalize: Callable[[Any], Any] | None = None,
  name: str | None = None,
  outputs: Collection[str] | None = None,
) -> Program:
  """A model as a program.

  Args:
    model: a network with its variables, of one seed.
    stored: shapes and dtypes of the inputs of one example, without the batch axis, as the data set
      stores them: a `jax.ShapeDtypeStruct`, or a dict, list or tuple of them. Entries of a dict
      that the network does not read (a teacher's or a loss's) are no inputs of the program.
    normalize: what is done to stored inputs before the network sees them; None for nothing.
    name: the network's own by default.
    outputs: what it puts out: ``"logits"`` and features by name; by default the logits, or all
      features of a network that has none.

  Returns:
    The program. Where Python has to know the batch size, it computes every example alone.

  Raises:
    TypeError: ``model``, ``normalize`` or ``stored`` is not of the kind described.
    ValueError: it cannot be traced, its variables do not fit, they are those of several seeds, or
      it puts out nothing of a name in ``outputs``.

  >>> import jax.numpy as jnp
  >>> from jaxdistill.types import Outputs
  >>> apply = lambda variables, x, *, train, key: (Outputs(logits=x @ variables["kernel"]), {})
  >>> network = Network(init=lambda key, x: {"kernel": jnp.eye(2)}, apply=apply)
  >>> stored = jax.ShapeDtypeStruct((2,), jnp.float32)
  >>> program = as_program(Model(network, {"kernel": 2 * jnp.eye(2)}), stored=stored)
  >>> program([[1.0, 2.0]]).tolist()
  [[2.0, 4.0]]
  """
  program = untraced(model, stored=stored, normalize=normalize, name=name, outputs=outputs)
  try:
    traced(program)
    return program
  except Exception as error:  # Anything may be wrong with a module that nobody here wrote.
    problem = error
  alone = program.changed(call=each_alone(program.call))
  try:
    traced(alone)
  except Exception as error:
    raise ValueError(
      f"{program.name} cannot be traced for inputs {program.inputs} ({_check.short(problem)}; one "
      f"example alone: {_check.short(error)})"
    ) from error
  return alone


def untraced(
  model: Model,
  *,
  stored: PyTree,
  normalize: Callable[[Any], Any] | None,
  name: str | None,
  outputs: Collection[str] | None,
) -> Program:
  """What `as_program` gives, not traced yet: for an exporter that tries the ways itself.

  Its variables may be bare shapes, since what is exported without its weights never reads them.

  Raises:
    TypeError: ``model``, ``normalize`` or ``stored`` is not of the kind that `as_program` takes.
    ValueError: the variables are those of several seeds, or ``outputs`` are not put out.
  """
  if not isinstance(model, Model) or not isinstance(model.network, Network):
    given = model.network if isinstance(model, Model) else model
    raise TypeError(
      f"model must be a Model of a Network, got {_check.show(given)}; give what fit returned, or "
      "types.Model(networks.linen(module), variables)."
    )
  if model.seeds is not None:
    raise ValueError(f"model has the variables of {model.seeds} seeds; give one of its unstack().")
  if normalize is not None and not callable(normalize):
    raise TypeError(
      f"normalize={normalize!r} is no function; give data.normalizer((mean, std)), for example."
    )
  shapes = jax.tree.map(_inputs.stored_shape, stored, is_leaf=lambda leaf: leaf is None)
  if not jax.tree.leaves(shapes):
    raise TypeError(f"stored={stored!r} has no arrays; give the shapes of one example's inputs.")
  leaves = host(named_leaves("variables", model.variables))
  # A checkpoint brings the variables back in plain containers: by path they find their places in
  # the network's own.
  names, structure = list(leaves), jax.tree.structure(model.variables)

  def put_out(given: Mapping[str, Any], inputs: PyTree) -> Outputs:
    tree = jax.tree.unflatten(structure, [given[name] for name in names])
    seen = inputs if normalize is None else normalize(inputs)
    return with_logits(Model(model.network, tree)(seen))

  fixed, one = shapes_of(leaves), batched(shapes, 1)
  try:
    found = jax.eval_shape(put_out, fixed, one)
  except Exception:  # It cannot be traced: whoever exports it finds out why.
    found = None
  asked = (outputs,) if isinstance(outputs, str) else outputs
  # So it does, too, of a network that puts out nothing.
  lacks = found is None or (asked is None and found.logits is None and not found.features)
  wanted = tuple(sorted(asked or ("logits",))) if lacks else tuple(found.named(asked))

  def whole(inputs: PyTree, given: Mapping[str, Any]) -> Any:
    made = put_out(given, inputs).named(wanted)
    return made if len(wanted) > 1 else made[wanted[0]]

  narrow, left, idle = (whole, one, ()) if lacks else narrowed(whole, one, fixed)
  read = {key: shapes[key] for key in left} if idle else shapes
  return Program(
    name or model.network.name,
    leaves,
    lambda given, inputs: narrow(inputs, given),
    read,
    wanted,
    idle,
  )


def traced(program: Program, to_be: str = "") -> Operations:
  """The operations of a program, for a symbolic batch size: one trace that holds for any.

  Args:
    program: the program.
    to_be: what is to be done with them, for the message where nobody can see them: ``"folded"``.

  Raises:
    ValueError: its logits are not ``[batch, ..., K]``; or ``to_be`` is given, and the program was
      read from a file, where all its operations are one.
  """
  (batch,) = jax.export.symbolic_shape("batch")
  found = trace_operations(program.call, program.leaves, batched(program.inputs, batch))
  for name, output in zip(program.outputs, found.outputs, strict=True):
    shape: tuple[Any, ...] = getattr(output.aval, "shape", ())
    if len(shape) < 2 or shape[0] != batch:
      raise ValueError(f"the {name} of {program.name} have the shape {shape}, not [batch, ..., K].")
  if to_be and any(equation.primitive.name == "call_exported" for equation in found.equations):
    raise ValueError(
      f"{program.name} is a compiled program, which cannot be {to_be}: give the network itself, "
      "network=networks.linen(module)."
    )
  return found


def batched(inputs: PyTree, size: Any) -> PyTree:
  """Shapes of one example's inputs as those of a batch; the size may be symbolic.

  >>> import jax.numpy as jnp
  >>> batched(jax.ShapeDtypeStruct((8,), jnp.uint8), 4).shape
  (4, 8)
  """
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype), inputs)


def host(leaves: dict[str, Any]) -> dict[str, Any]:
  """Copies that lie on no device; keys of random streams and bare shapes stay as they are.

  Leaf by leaf: of what is in parts, the whole of one comes together here, and then of the next.

  Raises:
    ValueError: a leaf lies on other processes' devices.
  """
  for name, leaf in leaves.items():
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      raise ValueError(
        f"{name} {list(leaf.shape)} lies on devices of other processes, and a file of weights "
        "needs the whole of it on one host: export the run's folder, export.export(run, ...) or "
        "export.load_student(run), in a program of one process."
      )
  return {
    name: leaf if is_key(leaf) or isinstance(leaf, jax.ShapeDtypeStruct) else np.asarray(leaf)
    for name, leaf in leaves.items()
  }


def each_alone(
  call: Callable[[Mapping[str, Any], PyTree], Any],
  mapper: Callable[..., Any] = lambda one, inputs: jax.vmap(one)(inputs),
) -> Callable[[Mapping[str, Any], PyTree], Any]:
  """A program that sees one example at a time, ``[1, ...]``, mapped over the batch."""

  def mapped(leaves: Mapping[str, Any], inputs: PyTree) -> Any:
    def one(x: PyTree) -> Any:
      made = call(leaves, jax.tree.map(lambda leaf: leaf[None], x))
      return jax.tree.map(lambda leaf: leaf[0], made)

    return mapper(one, inputs)

  return mapped


def export_program(program: Program, *, weights: bool) -> tuple[bytes, dict[str, Any]]:
  """A program as serialised StableHLO (`jax.export`): the best that the network allows.

  Tried in this order, each for all of its platforms and then for the present one alone. A symbolic
  batch size is one program for any; it fails where Python has to know the size. There ``"mapped"``
  may do, which computes each example alone. ``"looped"`` is a program of one example: whoever loads
  it maps it over the batch, since an exported program has no batching rule.

  Args:
    program: the program; its leaves may be shapes where ``weights`` is false.
    weights: whether the weights are inside; else they are its first argument, by name.

  Returns:
    The bytes, empty where there is no way; and what is known of them: ``batch`` (the way, None
    where there is none), ``platforms``, ``classes`` (K of the logits, else None), ``problem`` (why
    it is not symbolic for all platforms, else None), ``jax`` (the version that made it),
    ``stablehlo`` (its version), ``calling_convention`` (JAX's number for the form).
  """
  (batch,) = jax.export.symbolic_shape("batch")
  here = jax.export.default_export_platform()
  asked = program.platforms if here in program.platforms else (*program.platforms, here)
  ways = {
    "symbolic": (program.call, batch),
    "mapped": (each_alone(program.call), batch),
    "looped": (program.call, 1),
  }
  inside = host(program.leaves) if weights else {}
  args = () if weights else (shapes_of(program.leaves),)
  problems = {}
  for way, (call, size) in ways.items():
    called: Callable[..., Any] = functools.partial(call, inside) if weights else call
    for platforms in (asked, (here,)):
      try:
        with _one_device():
          exporter = jax.export.export(jax.jit(called), platforms=platforms)
          exported = exporter(*args, batched(program.inputs, size))
        out = [aval.shape for aval in exported.out_avals]
        if not all(len(shape) > 1 and shape[0] == size for shape in out):
          raise ValueError(
            f"{', '.join(program.outputs)} have the shapes {out}, not [{size}, ..., K]"
          )
        if exported.nr_devices != 1:
          raise ValueError(f"it is a program for {exported.nr_devices} devices")
        serialized = bytes(exported.serialize())
      except Exception as error:  # Anything may be wrong with a module that nobody here wrote.
        problems[way] = _check.short(error)
        continue
      version = re.search(rb"StableHLO_v([0-9.]+)", exported.mlir_module_serialized[:100])
      return serialized, {
        "batch": way,
        "platforms": list(platforms),
        "classes": dict(zip(program.outputs, out, strict=True)).get("logits", (None,))[-1],
        "problem": problems.get("symbolic"),
        "jax": jax.__version__,
        "stablehlo": version[1].decode() if version else None,
        "calling_convention": exported.calling_convention_version,
      }
  nothing: dict[str, Any] = {
    "batch": None,
    "platforms": [],
    "classes": None,
    "jax": jax.__version__,
  }
  return b"", {**nothing, "problem": problems["looped"]}


def stablehlo(program: Program, *, weights: bool = True) -> tuple[bytes, dict[str, Any]]:
  """A program as serialised StableHLO that takes a batch of any size by itself.

  Args:
    program: the program.
    weights: whether the weights are inside; else they are its first argument, by name.

  Returns:
    The bytes, and what is to be written beside them: ``jax`` (the version that made it),
    ``least_jax`` (the least that is sure to load it: a program loads in the version that made it
    and, for six months, in later ones; JAX promises nothing for earlier ones, and one made by 0.12
    does not load in 0.10), ``stablehlo`` (its version), ``calling_convention`` (JAX's number for
    the form), ``platforms``, ``outputs`` (their names).

  Raises:
    ValueError: the program cannot be exported: it calls Python at run time, for example.
  """
  serialized, about = export_program(program, weights=weights)
  if about["batch"] not in ("symbolic", "mapped"):
    raise ValueError(
      f"{program.name} cannot be exported as StableHLO ({about['problem']}): take out what "
      "calls Python at run time (jax.debug, jax.pure_callback) and what fixes the devices."
    )
  told = ("jax", "stablehlo", "calling_convention", "platforms")
  told_too = {"least_jax": about["jax"], "outputs": list(program.outputs)}
  return serialized, {**told_too, **{name: about[name] for name in told}}


def portable(program: Program, batch_size: int) -> bytes:
  """A program as StableHLO for other compilers: of one batch size, weights inside, for a CPU.

  Args:
    program: the program.
    batch_size: how many examples a call takes.

  Returns:
    A portable artifact of StableHLO.

  Raises:
    ValueError: it cannot be lowered, or what it puts out is not ``[batch_size, ..., K]``.
  """
  called = functools.partial(program.call, host(program.leaves))
  try:
    with _one_device():
      exporter = jax.export.export(jax.jit(called), platforms=("cpu",))
      exported = exporter(batched(program.inputs, batch_size))
  except Exception as error:  # Anything may be wrong with a module that nobody here wrote.
    raise ValueError(f"{program.name} cannot be lowered: {_check.short(error)}") from error
  out = [aval.shape for aval in exported.out_avals]
  if not all(len(shape) > 1 and shape[0] == batch_size for shape in out):
    raise ValueError(f"{program.name} puts out the shapes {out}, not [{batch_size}, ..., K].")
  return bytes(exported.mlir_module_serialized)


def _one_device() -> AbstractContextManager[Any]:
  """Makes a program for one device where the caller has set a mesh of several."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return nullcontext()
  ones, names, types = (1,) * len(mesh.axis_names), mesh.axis_names, mesh.axis_types
  return jax.set_mesh(jax.make_mesh(ones, names, axis_types=types, devices=jax.devices()[:1]))


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
    outputs: the variables, or literals, of the outputs.
    structure: of what the function returns: one output, or a dict of several.
  """

  equations: list[Any]
  leaves: dict[Any, str]
  inputs: list[Any]
  constants: dict[Any, Any]
  outputs: list[Any]
  structure: Any

  def uses(self) -> collections.Counter[Any]:
    """How often each variable is used, as an output too."""
    atoms = [atom for equation in self.equations for atom in equation.invars] + self.outputs
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
    """The places of the operations that the outputs (or ``until``) need, in order."""
    return self._demand(rules or {}, self.outputs if until is None else [until])[0]

  def weights(self, rules: Mapping[Any, Rule] | None = None) -> set[str]:
    """The names of the weights that the outputs need, but for those that a rule brings itself."""
    wanted = self._demand(rules or {}, self.outputs)[1]
    return {name for variable, name in self.leaves.items() if variable in wanted}

  def run(
    self,
    leaves: Mapping[str, Any],
    inputs: Sequence[Any],
    rules: Mapping[Any, Rule] | None = None,
    until: Any = None,
  ) -> Any:
    """Computes the outputs, or ``until``, and what they need.

    Args:
      leaves: weights by name; only those that are needed must be there.
      inputs: the leaves of the inputs, in order.
      rules: how a variable is computed instead of by its operation.
      until: a variable to compute instead of the outputs.

    Returns:
      Its value; or what the function returns.
    """
    rules = rules or {}
    values = {variable: leaves[n] for variable, n in self.leaves.items() if n in leaves}
    values |= self.constants | dict(zip(self.inputs, inputs, strict=True))

    def read(atom: Any) -> Any:
      return atom.val if is_literal(atom) else values[atom]

    for place in self.needed(rules, until):
      equation = self.equations[place]
      rule = next((rules[v] for v in equation.outvars if v in rules), None)
      if rule is None:
        out = apply_operation(equation, [read(atom) for atom in equation.invars])
      else:
        out = [rule.compute(*(read(atom) for atom in rule.reads))]
      values |= dict(zip(equation.outvars, out, strict=True))
    if until is not None:
      return read(until)
    return jax.tree.unflatten(self.structure, [read(atom) for atom in self.outputs])

  def _demand(self, rules: Mapping[Any, Rule], targets: list[Any]) -> tuple[list[int], set[Any]]:
    wanted, places = {target for target in targets if not is_literal(target)}, []
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
    call: ``(weights by name, inputs) -> logits``, or a dict of outputs.
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
  shapes = shapes_of(leaves)
  given = jax.tree.leaves(inputs)
  structure = jax.tree.structure(inputs)
  names = list(shapes)

  def listed(values: Sequence[Any], given: Sequence[Any]) -> Any:
    return call(dict(zip(names, values, strict=True)), jax.tree.unflatten(structure, given))

  first, out = jax.make_jaxpr(listed, return_shape=True)(list(shapes.values()), given)
  flat = jax.make_jaxpr(lambda *args: _inlined(first, args))(*list(shapes.values()), *given)
  jaxpr = flat.jaxpr
  variables = list(jaxpr.invars)
  return Operations(
    equations=list(_live(jaxpr.eqns, jaxpr.outvars)),
    leaves=dict(zip(variables[: len(names)], names, strict=True)),
    inputs=variables[len(names) :],
    constants=dict(zip(jaxpr.constvars, flat.consts, strict=True)),
    outputs=list(jaxpr.outvars),
    structure=jax.tree.structure(out),
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


def _live(equations: Sequence[Any], outputs: Sequence[Any]) -> Iterator[Any]:
  """Without what no output depends on, such as features that nobody asked for."""
  wanted, live = {output for output in outputs if not is_literal(output)}, []
  for equation in reversed(equations):
    if equation.effects or wanted.intersection(equation.outvars):
      live.append(equation)
      wanted |= {atom for atom in equation.invars if not is_literal(atom)}
  return reversed(live)
