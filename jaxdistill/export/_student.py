"""The deployed network: saved with a run, and called again without any of the code that made it.

`save_student` lowers the student to a StableHLO program (`jax.export`) of its variables and of the
inputs as the data set stores them, normalisation included, and keeps it beside the weights;
`load_student` gives it back as a function. Both are verified by digests before they are used.

JAX promises that a program loads in the version that wrote it and, for six months, in later ones;
`runs.load_variables` reads the weights in any version.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jaxdistill import _check, runs
from jaxdistill._compile import shapes_of
from jaxdistill.evaluation import cost
from jaxdistill.export import _program
from jaxdistill.export._program import Program
from jaxdistill.runs import CheckpointError, Checkpoints, load_variables, named_leaves, read_config
from jaxdistill.types import Model

__all__ = ["DeployedWarning", "Student", "load_student", "save_student"]

PyTree = Any
_FOLDER, _PROGRAM, _VARIABLES, _INFO = "student", "program", "variables", "student.json"


class DeployedWarning(UserWarning):
  """A student was saved in a lesser way than it could be; the message says what to change."""


def save_student(
  folder: str | os.PathLike[str],
  model: Model,
  *,
  stored: PyTree,
  normalize: Callable[[Any], Any] | None = None,
  name: str | None = None,
  outputs: Collection[str] | None = None,
) -> pathlib.Path:
  """Saves a network, ready to call, in the folder ``student`` of a run; one there is replaced.

  The program is ``(variables, inputs [B, ...]) -> logits`` in inference mode, for any B, for CPU,
  CUDA and TPU at once; of several outputs, a dict of them. Where a module does not allow that, the
  program is of one example, mapped over the batch, or for the present platform alone; where it
  allows none at all (it calls Python at run time, say), the weights are saved without one.

  Args:
    folder: the run's folder, made if it is not there.
    model: the trained network, a `jaxdistill.types.Model`; its variables are arrays of any
      sharding, and no host gathers them: where they lie on devices of several processes, all of
      these call this, and each writes what it holds. Of one over S seeds, the program is of one of
      them, and the weights hold all.
    stored: shapes and dtypes of the inputs of one example, without the batch axis, as the data set
      stores them: a `jax.ShapeDtypeStruct`, or a dict, list or tuple of them. Entries of a dict
      that the network does not read (a teacher's or a loss's) are no inputs of the program.
    normalize: what is done to stored inputs ``[B, ...]`` before the network sees them, such as
      ``data.normalizer((mean, std))``; None for nothing.
    name: the student's name; the network's by default.
    outputs: what the program puts out: ``"logits"`` and features by name; by default the logits, or
      all features of a network that has none.

  Returns:
    The folder ``student``.

  Raises:
    FileExistsError: the run holds something else of that name.
    TypeError: ``model``, ``normalize`` or ``stored`` is not of the kind described, or a leaf is no
      array.
    ValueError: the model's ``seeds`` do not fit its variables, these hold NaN, or it puts out
      nothing of a name in ``outputs``.

  Warns:
    DeployedWarning: the program could not be made as meant.

  >>> import tempfile
  >>> from jaxdistill.types import Network, Outputs
  >>> apply = lambda variables, x, *, train, key: (Outputs(logits=x @ variables["kernel"]), {})
  >>> network = Network(init=lambda key, x: {"kernel": jnp.eye(2)}, apply=apply)
  >>> model = Model(network, {"kernel": jnp.eye(2)})
  >>> with tempfile.TemporaryDirectory() as run:
  ...   path = save_student(run, model, stored=jax.ShapeDtypeStruct((2,), jnp.float32))
  ...   load_student(run)([[1.0, 2.0], [3.0, 4.0]]).tolist()
  [[1.0, 2.0], [3.0, 4.0]]
  """
  runs.check_place(folder, "deployed student")
  target = _check.folder("folder", folder) / _FOLDER
  one = _of_one_seed(model) if isinstance(model, Model) else model  # else `untraced` says it
  program = _program.untraced(one, stored=stored, normalize=normalize, name=name, outputs=outputs)
  runs.check_nan("model.variables", model.variables)
  serialized, about = _program.export_program(program, weights=False)
  together = runs.Together(model.variables)
  if about["problem"] and together.me == 0:
    _warn_lesser(program.name, about)
  info = {
    "name": program.name,
    "inputs": jax.tree.map(lambda s: {"shape": s.shape, "dtype": str(s.dtype)}, program.inputs),
    "outputs": list(program.outputs),
    "ignored": list(program.ignored),
    "instances": model.seeds or 1,
    "stacked": model.seeds is not None,
    "parameters": cost.parameters(one.variables),
    "flops": _flops_of_one(program),
    # JAX has no list of the earlier releases that know this one's StableHLO; they may try.
    "jax_least": jax.__version__,
    **about,
  }
  writing = target.with_name(_FOLDER + runs.WRITING)

  def begin() -> None:
    runs.clear_unfinished(target.parent, _FOLDER)
    with runs.writes(target):
      writing.mkdir(parents=True)

  def finish() -> None:
    if serialized:
      (writing / _PROGRAM).write_bytes(serialized)
    runs.write_json(writing / _INFO, info)
    runs.publish(target, {"kind": _FOLDER})

  together.first(begin)
  with runs.writes(target):
    runs.save_variables(writing / _VARIABLES, model.variables)
    together.first(finish)
  return target


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Student(Program):
  """A deployed network: a `Program` that was loaded. It has no gradient and no rule for ``vmap``.

  Attributes:
    info: what ``student.json`` says: name, shapes, versions, platforms, how it was exported.
    variables: the weights of one instance, in plain dicts, lists and tuples.
  """

  info: dict[str, Any]
  variables: PyTree = dataclasses.field(repr=False)

  @property
  def classes(self) -> int | None:
    """K, the size of the logits' last axis; None of a student without logits."""
    return self.info["classes"]

  @property
  def instances(self) -> int:
    """How many networks the run trained side by side; this is one of them."""
    return self.info["instances"]


def load_student(run: str | os.PathLike[str], *, instance: int = 0) -> Student:
  """Loads the deployed network of a finished run from its folder alone.

  Its operations are compiled, and nobody can see them: it becomes StableHLO, safetensors and int8
  weights, while ONNX, folding and int8 activations need the network, by `as_program`.

  Args:
    run: the run's folder; or that of an experiment of ours, in which ``student`` is a run.
    instance: which of the networks of a run over several seeds, from 0 on.

  Returns:
    The student: ``student(inputs) -> logits``, or what else it was saved for (``outputs``).

  Raises:
    FileNotFoundError: there is no such folder, it is no run's, or the run is not finished.
    CheckpointError: a file is damaged; the message names it.
    ImportError: flatbuffers is not installed, which JAX reads programs with.
    IndexError: there is no such instance.
    RuntimeError: this JAX cannot read the program, or not on this platform or with these settings.
    ValueError: it was saved without a program.
  """
  folder = runs.locate(_check.folder("run", run) / _FOLDER)
  if not folder.is_dir():
    raise FileNotFoundError(_absent(pathlib.Path(run)))
  if (folder / "config.json").is_file():
    return load_student(folder, instance=instance)
  runs.verify(folder)
  info = _about(folder)
  if not 0 <= _check.whole("instance", instance, least=None) < info["instances"]:
    raise IndexError(f"instance={instance} must lie in 0 .. {info['instances'] - 1} for {folder}.")
  load = f"its weights with runs.load_variables({str(folder / _VARIABLES)!r})"
  if info["batch"] is None:
    raise ValueError(
      f"{folder} was saved without a program, since jax.export cannot make one "
      f"({info['problem']}); build the network in code and load {load}."
    )
  exported = _deserialize(folder, info, load)
  saved = load_variables(folder / _VARIABLES)
  try:
    one = jax.tree.map(lambda leaf: leaf[instance], saved) if info["stacked"] else saved
    # The first argument is the weights, by path; in earlier folders in the network's containers.
    (weights, expected), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    avals = named_leaves(_VARIABLES, weights)
    there = named_leaves(_VARIABLES, one)
    if {n: aval.shape for n, aval in avals.items()} != {n: np.shape(v) for n, v in there.items()}:
      raise ValueError("paths or shapes differ")
  except (IndexError, TypeError, ValueError) as error:
    raise CheckpointError(
      f"{folder / _PROGRAM} takes other weights than {folder / _VARIABLES} has ({error})."
    ) from error
  structure = jax.tree.structure(weights)
  leaves = {name: jnp.asarray(leaf, avals[name].dtype) for name, leaf in there.items()}

  def call(given: Mapping[str, Any], inputs: PyTree) -> Any:
    return exported.call(jax.tree.unflatten(structure, [given[name] for name in avals]), inputs)

  looped = info["batch"] == "looped"
  return Student(
    info["name"],
    leaves,
    _program.each_alone(call, jax.lax.map) if looped else call,
    jax.tree.map(lambda aval: jax.ShapeDtypeStruct(aval.shape[1:], aval.dtype), expected),
    tuple(info["outputs"]),
    tuple(info["ignored"]),
    tuple(info["platforms"]),
    info=info,
    variables=jax.tree.unflatten(jax.tree.structure(one), leaves.values()),
  )


# What `save_student` has put down since the first version.
_SAID: dict[str, Any] = {
  **{"name": str, "instances": int, "stacked": bool, "platforms": list, "jax": str},
  **{"outputs": list, "ignored": list},
  **{"batch": (str, type(None)), "classes": (int, type(None)), "parameters": int},
}


def _about(folder: pathlib.Path) -> dict[str, Any]:
  """What ``student.json`` says, if it says all that is asked of it."""
  try:
    info = runs.read_json(folder / _INFO)
    for name, kind in _SAID.items():
      runs.entry(info, name, kind)
    return info
  except (OSError, ValueError) as error:
    raise CheckpointError(f"{folder / _INFO} {error}: save the student again.") from error


def _of_one_seed(model: Model) -> Model:
  """The model with the shapes of one seed's variables, without devices."""
  shapes = shapes_of(model.variables)
  if model.seeds is None:
    return Model(model.network, shapes)
  axes = sorted({leaf.shape[:1] for leaf in jax.tree.leaves(shapes)})
  if axes != [(model.seeds,)]:
    raise ValueError(
      f"model.seeds={model.seeds} needs one leading axis of that size on all variables, which have "
      f"{axes}."
    )
  first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), shapes)
  return Model(model.network, first)


def _flops_of_one(program: Program) -> int | None:
  """Counted here: nothing can be counted in a program that was loaded."""
  try:
    one = _program.batched(program.inputs, 1)
    return cost.flops_or_none(program.call, program.leaves, one)
  except Exception:  # Anything may be wrong with a module that nobody here wrote.
    return None


def _warn_lesser(name: str, about: dict[str, Any]) -> None:
  if about["batch"] is None:
    what = (
      "cannot be made: the weights are saved without one, and load_student cannot give it back. "
      "Take out what calls Python at run time (jax.debug, jax.pure_callback) and what fixes the "
      "batch size or the devices, and call save_student again."
    )
  elif about["batch"] == "symbolic":
    platforms = ", ".join(about["platforms"])
    what = f"is for {platforms} alone; save it on another platform to have it there."
  else:
    what = (
      "computes every example alone: the logits are the same unless examples of a batch depend on "
      "one another. To have it for any batch size, keep x.shape[0] out of Python's arithmetic and "
      "comparisons and out of NumPy; x.reshape(x.shape[0], -1) is fine."
    )
  warnings.warn(f"the program of {name} ({about['problem']}) {what}", DeployedWarning, stacklevel=3)


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
      f"read it ({_check.short(error)}). Programs load in the version that wrote them and, for six "
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
  other = runs.other_kind(run, "run")
  if other is not None:
    return f"run={str(run)!r} holds a {other}, and no {_FOLDER}/: give a run's folder."
  if not (run / "config.json").is_file():
    return f"run={str(run)!r} is no run's folder: it has neither {_FOLDER}/ nor a config.json."
  with Checkpoints(run / "checkpoints") as saved:
    at = max(saved.steps(), default=0)
  return (
    f"the run {str(run)!r} stands at step {at} of {read_config(run).get('steps')} and has no "
    f"{_FOLDER}/. Start it again with the same arguments to finish it; or save what there is with "
    f"export.save_student({str(run)!r}, types.Model(network, teachers.restore({str(run)!r}, "
    f"step={at})), stored=..., normalize=...)."
  )
