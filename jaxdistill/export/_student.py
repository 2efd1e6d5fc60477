"""The deployed network: saved with a run, and called again without any of the code that made it.

`save_student` lowers the student to a StableHLO program (`jax.export`) of its variables and of the
inputs as the data set stores them, normalisation included, and keeps it beside the weights;
`load_student` gives it back as a function. Both are verified by digests before they are used.

JAX promises that a program loads in the version that wrote it and, for six months, in later ones;
`runs.load_variables` reads the weights in any version.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jaxdistill import _check, runs
from jaxdistill.evaluation import cost
from jaxdistill.export import _inputs
from jaxdistill.runs import (
  Checkpoints,
  from_outline,
  load_variables,
  named_leaves,
  outline,
  read_config,
  save_variables,
  write_json,
)
from jaxdistill.types import Network

__all__ = ["DeployedWarning", "Student", "load_student", "save_student"]

PyTree = Any
_Program = Callable[[PyTree, PyTree], Any]
_FOLDER, _PROGRAM, _VARIABLES, _INFO = "student", "program", "variables", "student.json"
_PLATFORMS = ("cpu", "cuda", "tpu")


class DeployedWarning(UserWarning):
  """A student was saved in a lesser way than it could be; the message says what to change."""


def save_student(
  folder: str | os.PathLike[str],
  network: Network,
  variables: PyTree,
  *,
  stored: PyTree,
  normalize: Callable[[Any], Any] | None = None,
  stacked: bool = False,
  name: str | None = None,
) -> pathlib.Path:
  """Saves a network, ready to call, in the folder ``student`` of a run; one there is replaced.

  The program is ``(variables, inputs [B, ...]) -> logits`` in inference mode, for any B, for CPU,
  CUDA and TPU at once. Where a module does not allow that, the program is of one example, mapped
  over the batch, or for the present platform alone; where it allows none at all (it calls Python at
  run time, say), the weights are saved without one.

  Args:
    folder: the run's folder, made if it is not there.
    network: from `jaxdistill.networks`.
    variables: the trained variables; arrays of any sharding.
    stored: shapes and dtypes of the inputs of one example, without the batch axis, as the data set
      stores them: a `jax.ShapeDtypeStruct`, or a dict, list or tuple of them.
    normalize: what is done to stored inputs ``[B, ...]`` before the network sees them, such as
      ``data.normalizer((mean, std))``; None for nothing.
    stacked: whether all leaves have a leading axis S, over seeds. The program is of one of them,
      the weights hold all.
    name: the student's name; the network's by default.

  Returns:
    The folder ``student``.

  Raises:
    FileExistsError: the run holds something else of that name.
    TypeError: ``normalize`` or ``stored`` is not of the kind described, or a leaf is no array.
    ValueError: ``stacked`` does not fit the variables.

  Warns:
    DeployedWarning: the program could not be made as meant.

  >>> import tempfile
  >>> from jaxdistill.types import Outputs
  >>> apply = lambda variables, x, *, train, key: (Outputs(logits=x @ variables["kernel"]), {})
  >>> network = Network(init=lambda key, x: {"kernel": jnp.eye(2)}, apply=apply)
  >>> with tempfile.TemporaryDirectory() as run:
  ...   stored = jax.ShapeDtypeStruct((2,), jnp.float32)
  ...   path = save_student(run, network, {"kernel": jnp.eye(2)}, stored=stored)
  ...   load_student(run)([[1.0, 2.0], [3.0, 4.0]]).tolist()
  [[1.0, 2.0], [3.0, 4.0]]
  """
  run = _check.folder("folder", folder).absolute()
  if not isinstance(network, Network):
    raise TypeError(
      f"network must be a Network, got {_check.show(network)}; give networks.linen(module)."
    )
  if any(part.is_file() for part in (run, *run.parents)):
    raise FileExistsError(f"folder={run} is a file, or lies below one; take another.")
  target = run / _FOLDER
  if target.is_file() or (runs.listing(target) and not (target / runs.MANIFEST).is_file()):
    raise FileExistsError(f"{target} is no student of ours; move it, or take another folder.")
  if normalize is not None and not callable(normalize):
    raise TypeError(
      f"normalize={normalize!r} is no function; give data.normalizer((mean, std)), for example."
    )
  inputs = jax.tree.map(_inputs.stored_shape, stored, is_leaf=lambda leaf: leaf is None)
  if not jax.tree.leaves(inputs):
    raise TypeError(f"stored={stored!r} has no arrays; give the shapes of one example's inputs.")
  shapes, instances = _shapes(variables, stacked)
  name = name or network.name
  infer = _inference(network, variables, normalize)
  with _one_device():
    program, about = _export(infer, shapes, inputs, name)
  parameters = shapes.get("params", shapes) if isinstance(shapes, Mapping) else shapes
  info = {
    "name": name,
    "inputs": jax.tree.map(lambda s: {"shape": s.shape, "dtype": str(s.dtype)}, inputs),
    "instances": instances,
    "stacked": stacked,
    "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameters)),
    "flops": _flops_of_one(infer, shapes, inputs),
    # JAX has no list of the earlier releases that know this one's StableHLO; they may try.
    "jax": jax.__version__,
    "jax_least": jax.__version__,
    **about,
  }
  runs.clear_unfinished(target.parent, _FOLDER)
  writing = target.with_name(_FOLDER + runs.WRITING)
  writing.mkdir(parents=True)
  save_variables(writing / _VARIABLES, variables)
  if program:
    (writing / _PROGRAM).write_bytes(program)
  write_json(writing / _INFO, info)
  runs.publish(target, {"kind": _FOLDER})
  return target


@dataclasses.dataclass(frozen=True, eq=False)
class Student:
  """A deployed network: call it on inputs as the data set stores them, under ``jit`` too.

  Attributes:
    info: what ``student.json`` says: name, shapes, versions, platforms, how it was exported.
    variables: the weights of one instance, in plain dicts, lists and tuples.
    expected: shapes and dtypes of the inputs, batch axis first.
    program: ``(variables, inputs) -> logits``, compiled once for each batch size. It has no
      gradient and no batching rule (``vmap``).
    classes: K, the size of the logits' last axis.
    instances: how many networks the run trained side by side; this is one of them.
  """

  info: dict[str, Any]
  variables: PyTree = dataclasses.field(repr=False)
  expected: PyTree = dataclasses.field(repr=False)
  program: _Program = dataclasses.field(repr=False)
  classes: int
  instances: int

  def __call__(self, inputs: PyTree) -> jax.Array:
    """The logits of a batch.

    A dtype is converted where that is safe: between floating-point types; between integer types,
    if the values fit; Python's own numbers, in lists, to either. Nothing else is: images in 0 ..
    255 and in 0.0 .. 1.0 are not the same, and a cast would hide it.

    Args:
      inputs: ``[B, ...]`` for any B from 1 on: NumPy or JAX arrays or lists, in the structure of
        the stored inputs.

    Returns:
      ``[B, K]``, or ``[B, L, K]`` for tokens.

    Raises:
      TypeError: another structure, or a dtype that is not converted.
      ValueError: another shape, no batch axis, no example, or values that do not fit the dtype.
    """
    return self.program(
      self.variables, _inputs.as_batch(inputs, self.expected, self.info["name"])[0]
    )

  def predict(self, inputs: PyTree, batch_size: int = 256) -> np.ndarray:
    """The logits of N examples, ``batch_size`` at once, as a NumPy array ``[N, ..., K]``.

    The last batch is padded, so that one program is compiled. Raises what a call raises.
    """
    _check.whole("batch_size", batch_size)
    accepted, size = _inputs.as_batch(inputs, self.expected, self.info["name"])
    logits = []
    for begin in range(0, size, batch_size):
      rows = np.arange(begin, begin + min(batch_size, size))
      batch = jax.tree.map(lambda leaf, rows=rows: leaf[np.where(rows < size, rows, 0)], accepted)
      logits.append(np.asarray(self.program(self.variables, batch)))
    return np.concatenate(logits)[:size]


def load_student(run: str | os.PathLike[str], *, instance: int = 0) -> Student:
  """Loads the deployed network of a finished run from its folder alone.

  Args:
    run: the run's folder; or that of an experiment of ours, in which ``student`` is a run.
    instance: which of the networks of a run over several seeds, from 0 on.

  Returns:
    The student: ``student(inputs) -> logits``.

  Raises:
    FileNotFoundError: there is no such folder, it is no run's, or the run is not finished.
    CheckpointError: a file is damaged; the message names it.
    ImportError: flatbuffers is not installed, which JAX reads programs with.
    IndexError: there is no such instance.
    RuntimeError: this JAX cannot read the program, or not on this platform or with these settings.
    ValueError: it was saved without a program.
  """
  folder = runs.locate(_check.folder("run", run).absolute() / _FOLDER)
  if not folder.is_dir():
    raise FileNotFoundError(_absent(pathlib.Path(run)))
  if (folder / "config.json").is_file():
    return load_student(folder, instance=instance)
  runs.verify(folder)
  info = json.loads((folder / _INFO).read_text())
  if not 0 <= _check.whole("instance", instance, least=None) < info["instances"]:
    raise IndexError(f"instance={instance} must lie in 0 .. {info['instances'] - 1} for {folder}.")
  load = f"its weights with runs.load_variables({str(folder / _VARIABLES)!r})"
  if info["batch"] is None:
    raise ValueError(
      f"{folder} was saved without a program, since jax.export cannot make one "
      f"({info['problem']}); build the network in code and load {load}."
    )
  exported = _deserialize(folder, info, load)
  (shapes, expected), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
  pick = (lambda leaf: leaf[instance]) if info["stacked"] else (lambda leaf: leaf)
  loaded = load_variables(folder / _VARIABLES)
  variables = jax.tree.map(lambda leaf, s: jnp.asarray(pick(leaf), s.dtype), loaded, shapes)
  looped = info["batch"] == "looped"
  program = jax.jit(_each(exported.call, jax.lax.map) if looped else exported.call)
  return Student(info, variables, expected, program, info["classes"], info["instances"])


def _inference(
  network: Network, variables: PyTree, normalize: Callable[[Any], Any] | None
) -> _Program:
  """Variables and stored inputs to logits; a checkpoint brings variables back as plain dicts."""
  names, structure = list(named_leaves(_VARIABLES, variables)), jax.tree.structure(variables)

  def program(plain: PyTree, inputs: PyTree) -> Any:
    leaves = named_leaves(_VARIABLES, plain)
    given = jax.tree.unflatten(structure, [leaves[name] for name in names])
    seen = inputs if normalize is None else normalize(inputs)
    return network.apply(given, seen, train=False, key=None)[0].logits

  return program


def _flops_of_one(infer: _Program, shapes: PyTree, inputs: PyTree) -> int | None:
  """Counted here: nothing can be counted in a program that was loaded."""
  one = jax.tree.map(lambda s: jax.ShapeDtypeStruct((1, *s.shape), s.dtype), inputs)
  try:
    return cost.flops_or_none(infer, shapes, one)
  except Exception:  # Anything may be wrong with a module that nobody here wrote.
    return None


def _each(program: _Program, mapper: Callable[..., Any]) -> _Program:
  """A program that sees one example at a time."""

  def mapped(variables: PyTree, inputs: PyTree) -> Any:
    return mapper(lambda x: program(variables, jax.tree.map(lambda leaf: leaf[None], x))[0], inputs)

  return mapped


def _export(
  program: _Program, shapes: PyTree, inputs: PyTree, name: str
) -> tuple[bytes, dict[str, Any]]:
  """The best program that the network allows, and what is recorded of it."""
  (batch,) = jax.export.symbolic_shape("batch")
  here = jax.export.default_export_platform()
  everywhere = _PLATFORMS if here in _PLATFORMS else (*_PLATFORMS, here)
  ways = {
    "symbolic": (program, batch),
    "mapped": (_each(program, lambda one, inputs: jax.vmap(one)(inputs)), batch),
    "looped": (program, 1),  # for load_student to map: an exported program has no batching rule
  }
  problems = {}
  for way, (called, size) in ways.items():
    batched = jax.tree.map(lambda s, n=size: jax.ShapeDtypeStruct((n, *s.shape), s.dtype), inputs)
    for platforms in (everywhere, (here,)):
      try:
        exported = jax.export.export(jax.jit(called), platforms=platforms)(shapes, batched)
        out = [aval.shape for aval in exported.out_avals]
        if len(out) != 1 or len(out[0]) < 2 or out[0][0] != size:
          raise ValueError(f"the logits have the shapes {out}, not [{size}, ..., K]")
        if exported.nr_devices != 1:
          raise ValueError(f"it is a program for {exported.nr_devices} devices")
        serialized = bytes(exported.serialize())
      except Exception as error:  # Anything may be wrong with a module that nobody here wrote.
        problems[way] = _short(error)
        continue
      if way != "symbolic" or platforms != everywhere:
        _warn_lesser(name, way, platforms, problems["symbolic"])
      about = {"classes": out[0][-1], "batch": way, "platforms": platforms}
      return serialized, {**about, "problem": problems.get("symbolic")}
  problem = problems["looped"]
  _warn_lesser(name, "", (), problem)
  return b"", {"classes": None, "batch": None, "platforms": [], "problem": problem}


def _one_device() -> AbstractContextManager[Any]:
  """Makes a program for one device where the caller has set a mesh of several."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return nullcontext()
  ones, names, types = (1,) * len(mesh.axis_names), mesh.axis_names, mesh.axis_types
  return jax.set_mesh(jax.make_mesh(ones, names, axis_types=types, devices=jax.devices()[:1]))


def _warn_lesser(name: str, way: str, platforms: tuple[str, ...], problem: str) -> None:
  if not way:
    what = (
      "cannot be made: the weights are saved without one, and load_student cannot give it back. "
      "Take out what calls Python at run time (jax.debug, jax.pure_callback) and what fixes the "
      "batch size or the devices, and call save_student again."
    )
  elif way == "symbolic":
    what = f"is for {', '.join(platforms)} alone; save it on another platform to have it there."
  else:
    what = (
      "computes every example alone: the logits are the same unless examples of a batch depend on "
      "one another. To have it for any batch size, keep x.shape[0] out of Python's arithmetic and "
      "comparisons and out of NumPy; x.reshape(x.shape[0], -1) is fine."
    )
  warnings.warn(f"the program of {name} ({problem}) {what}", DeployedWarning, stacklevel=4)


def _short(error: Exception) -> str:
  """The first line of an error, which may be a page long."""
  return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def _deserialize(folder: pathlib.Path, info: dict[str, Any], load: str) -> jax.export.Exported:
  """The program; its bytes are as they were written, so a failure is the version's."""
  low = jax.export.minimum_supported_calling_convention_version
  high = jax.export.maximum_supported_calling_convention_version
  try:
    exported = jax.export.deserialize(bytearray((folder / _PROGRAM).read_bytes()))
    if not low <= exported.calling_convention_version <= high:
      raise ValueError(f"calling convention {exported.calling_convention_version}")
    exported.mlir_module()  # JAX would decode it, and fail, at the first call only.
  except ImportError as error:
    raise ImportError(f"to read {folder / _PROGRAM}: pip install flatbuffers.") from error
  except Exception as error:
    raise RuntimeError(
      f"the program of {folder} was written by jax {info['jax']}, and jax {jax.__version__} cannot "
      f"read it ({_short(error)}). Programs load in the version that wrote them and, for six "
      f"months, in later ones: install jax>={info['jax_least']} of about that age, or build the "
      f"network in code and load {load}."
    ) from error
  here = jax.export.default_export_platform()
  if here not in exported.platforms:
    raise RuntimeError(
      f"the program of {folder} is for {', '.join(exported.platforms)}, and this is {here}: set "
      f"JAX_PLATFORMS={exported.platforms[0]}, or save the student on {here}."
    )
  dtypes = {aval.dtype for aval in exported.in_avals if isinstance(aval.dtype, np.dtype)}
  wide = sorted(str(d) for d in dtypes if jax.dtypes.canonicalize_dtype(d) != d)
  if wide:
    raise RuntimeError(
      f"the program of {folder} takes {', '.join(wide)}: set JAX_ENABLE_X64=1 (or "
      "jax.config.update('jax_enable_x64', True)) before loading it."
    )
  return exported


def _absent(run: pathlib.Path) -> str:
  """Why a folder has no student, and what to do."""
  if not run.is_dir():
    return f"run={str(run)!r}: there is no such folder."
  if not (run / "config.json").is_file():
    return f"run={str(run)!r} is no run's folder: it has neither {_FOLDER}/ nor a config.json."
  with Checkpoints(run / "checkpoints") as saved:
    at = max(saved.steps(), default=0)
  return (
    f"the run {str(run)!r} stands at step {at} of {read_config(run).get('steps')} and has no "
    f"{_FOLDER}/. Start it again with the same arguments to finish it; or save what there is with "
    f"export.save_student({str(run)!r}, network, teachers.restore({str(run)!r}, step={at}), "
    "stored=..., normalize=...)."
  )


def _shapes(variables: PyTree, stacked: bool) -> tuple[PyTree, int]:
  """One network's variables as shapes, without devices; and how many networks there are."""
  leaves = named_leaves(_VARIABLES, jax.eval_shape(lambda tree: tree, variables))
  first = {name: leaf.shape[:1] for name, leaf in leaves.items()}
  if stacked and (len(set(first.values())) != 1 or () in first.values()):
    axes = sorted(set(first.values()))
    raise ValueError(f"stacked=True needs one leading axis on all variables, which have {axes}.")
  skip = int(stacked)
  shapes = {n: jax.ShapeDtypeStruct(leaf.shape[skip:], leaf.dtype) for n, leaf in leaves.items()}
  return from_outline(outline(variables), shapes), next(iter(first.values()))[0] if stacked else 1
