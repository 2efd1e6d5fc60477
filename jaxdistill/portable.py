"""The deployed network as one function of named weights: what is exported, folded and quantised.

A `Program` takes inputs as the data set stores them. `from_network` makes one from a network and
its variables; `jaxdistill.folding` and `jaxdistill.int8` turn one into another; `stablehlo`
serialises one, so that any process with JAX can run it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jaxdistill import accept, arguments, flat
from jaxdistill.flat import Flat
from jaxdistill.leaves import named
from jaxdistill.types import Network

__all__ = ["PLATFORMS", "Program", "batched", "from_network", "stablehlo", "traced"]

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
    unfolded: those that `jaxdistill.folding.fold` had to leave.
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
    arguments.whole("batch_size", batch_size)
    accepted, size = accept.batch(inputs, batched(self.inputs, 1), self.name)
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
    network: from `jaxdistill.capture` or `jaxdistill.capture_nnx`.
    variables: the trained variables, of one seed.
    stored: shapes and dtypes of the inputs of one example, without the batch axis, as
      `jaxdistill.deployed.save_student` takes them.
    normalize: what is done to stored inputs before the network sees them; None for nothing.
    name: the network's own by default.

  Returns:
    The program. Where the network does not allow a symbolic batch size, it computes every example
    alone.

  Raises:
    TypeError: ``network``, ``normalize`` or ``stored`` is not of the kind described.
    ValueError: it cannot be traced, or its variables do not fit.

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
      f"network must be a Network, got {arguments.show(network)}; give capture.linen(module)."
    )
  if normalize is not None and not callable(normalize):
    raise TypeError(
      f"normalize={normalize!r} is no function; give views.normalizer((mean, std)), for example."
    )
  leaves = {name: _host(leaf) for name, leaf in named("variables", variables).items()}
  names, structure = list(leaves), jax.tree.structure(variables)

  def call(given: Mapping[str, Any], inputs: PyTree) -> Any:
    seen = inputs if normalize is None else normalize(inputs)
    tree = jax.tree.unflatten(structure, [given[name] for name in names])
    return network.apply(tree, seen, train=False, key=None)[0].logits

  shapes = jax.tree.map(accept.stored, stored, is_leaf=lambda leaf: leaf is None)
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
      f"{program.name} cannot be traced for inputs {shapes} ({arguments.short(problem)}; one "
      f"example alone: {arguments.short(error)})"
    ) from error
  return alone


def traced(program: Program) -> Flat:
  """The operations of a program, for a symbolic batch size.

  Raises:
    ValueError: its logits are not ``[batch, ..., K]``.
  """
  (batch,) = jax.export.symbolic_shape("batch")
  found = flat.trace(program.call, program.leaves, batched(program.inputs, batch))
  shape: tuple[Any, ...] = getattr(found.output.aval, "shape", ())
  if len(shape) < 2 or shape[0] != batch:
    raise ValueError(f"the logits of {program.name} have the shape {shape}, not [batch, ..., K].")
  return found


def batched(inputs: PyTree, size: Any) -> PyTree:
  """Shapes of one example's inputs as those of a batch; the size may be symbolic.

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
    f"{program.name} cannot be exported as StableHLO ({arguments.short(problem)}): take out what "
    "calls Python at run time (jax.debug, jax.pure_callback) and what fixes the devices."
  ) from problem


def _each(call: Callable[..., Any], leaves: Mapping[str, Any], inputs: PyTree) -> Any:
  """A program of one example, mapped over the batch."""

  def one(example: PyTree) -> Any:
    return call(leaves, jax.tree.map(lambda leaf: leaf[None], example))[0]

  return jax.vmap(one)(inputs)


def _cpu() -> Any:
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError:  # JAX_PLATFORMS leaves it out
    return None


def _host(leaf: Any) -> Any:
  """A copy that lies on no device, or on one; keys of random streams stay as they are."""
  keys = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  return leaf if keys else np.asarray(leaf)
