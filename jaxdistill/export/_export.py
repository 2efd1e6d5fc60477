"""Exports: the deployed network alone as files that other programs run, each one checked.

`export` writes what is asked for into a run's ``exports/``; `export_file` writes one. Every file is
loaded in a process of its own by its own runtime, before it gets its name, and compared with the
student on held-out examples: one that fails is not kept.

**The tolerance** is a share of the largest logit (or value of another output) that the student puts
out on the held-out examples. One float32 operation rounds by 6e-8 of its result, and another order
of the sums in a hundred layers comes to less than 1e-4 of the logits: that is the tolerance of
float32. Networks that compute in bfloat16 or float16 (a step is 0.8% there) have 0.05, float64
1e-9. Where the student's margin is larger, the top-1 must be the same. Files in int8 are judged by
their accuracy instead; where there is none, by how far they agree with the student. Core ML runs on
a Mac alone: a package is read back, and ``remaining`` says what is still to be checked.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import _check, _extras, runs
from jaxdistill.data import Examples
from jaxdistill.export import (
  _coreml,
  _folding,
  _inputs,
  _int8,
  _int8_onnx,
  _litert,
  _onnx,
  _program,
  _student,
)
from jaxdistill.export._process import ExportError, Ran, compare, run_file, top1
from jaxdistill.export._program import Program
from jaxdistill.networks import weights as safetensors
from jaxdistill.runs import write_json, writes
from jaxdistill.types import Model, Network

__all__ = [
  "KINDS",
  "Check",
  "default_tolerance",
  "export",
  "export_file",
  "problem_of",
  "split_examples",
  "verify_exports",
  "write_stablehlo",
]

PyTree = Any
FOLDER, LIST, EXAMPLE = "exports", "exports.json", "example.npz"
_VERSION = 1
# What is true of one export, and so is told of each file: those of an earlier one stay.
_OF_ONE_EXPORT = ("batch_size", "examples", "split", "student_accuracy")
# What each kind's file is called, and which weights it has.
KINDS = {
  "stablehlo": ("student.stablehlo", "float"),
  "onnx": ("student.onnx", "float"),
  "litert": ("student.tflite", "float"),
  "coreml": ("student.mlpackage.zip", "float"),
  "safetensors": ("student.safetensors", "float"),
  "int8_weights": ("student.int8_weights.stablehlo", "int8_weights"),
  "int8_weights_onnx": ("student.int8_weights.onnx", "int8_weights"),
  "int8_weights_safetensors": ("student.int8_weights.safetensors", "int8_weights"),
  "int8": ("student.int8.stablehlo", "int8"),
  "int8_onnx": ("student.int8.onnx", "int8_onnx"),
}
# What a file of that suffix, and weights of that kind, are made and checked with.
_NEEDS = {
  ".onnx": ("jax2onnx", "onnxruntime"),
  ".tflite": ("litert_converter", "ai_edge_litert"),
  ".zip": ("stablehlo_coreml", "coremltools"),
  ".safetensors": ("safetensors",),
  "int8_weights": ("qwix",),
  "int8": ("qwix",),
  "int8_onnx": ("onnx",),
}
# Whose libraries no other extra brings: tried by default where they are there.
_APART = ("coreml", "litert")
_SUFFIXES = (".stablehlo", ".onnx", ".tflite", ".mlpackage.zip", ".safetensors")


@dataclasses.dataclass(frozen=True)
class Check:
  """How an exported file is checked and timed before it is kept.

  Attributes:
    tolerance: by how much an output may differ from the student's, in its units. By default a share
      of the student's largest: 1e-4 in float32, 0.05 in bfloat16 and float16, 1e-9 in float64.
    accuracy_loss: by how much the accuracy of a file in int8 may be below the student's; by default
      one point. Without labels, the share of examples whose top-1 may be another; of an output that
      has none (an embedding, one number), the share of its variance that may be lost.
    batch_size: with which a call is timed, from NumPy arrays to a NumPy array in every runtime.
    seconds: how long to time.
    time_limit: seconds after which the process is ended.

  Raises:
    TypeError: a value is no number.
    ValueError: ``batch_size`` is below 1, or the tolerance negative.
  """

  tolerance: float | None = None
  accuracy_loss: float = 0.01
  batch_size: int = 1
  seconds: float = 2.0
  time_limit: float = 300.0

  def __post_init__(self) -> None:
    _check.whole("batch_size", self.batch_size)
    if self.tolerance is not None:
      _check.number("tolerance", self.tolerance, least=0)


def export(
  run: str | os.PathLike[str],
  held_out: Examples | tuple[PyTree, Any],
  *,
  kinds: Collection[str] | None = None,
  network: Network | None = None,
  normalize: Callable[[Any], Any] | None = None,
  calibration: PyTree = None,
  fold: bool = False,
  skip: Collection[str] = (),
  instance: int = 0,
  check: Check = Check(),
) -> dict[str, Any]:
  """Exports the student of a finished run into ``<run>/exports``, and checks every file.

  Args:
    run: the run's folder.
    held_out: examples as stored, of a split that training did not see, or ``(inputs, labels)``;
      every file is compared with the student on all of them. The files put out what the saved
      student does, and take the inputs that it takes.
    kinds: which of `KINDS`, one or several; by default all that can be made of what is given,
      LiteRT and Core ML where their extras are installed.
    network: the student's network, for ONNX, folding and int8 activations; without it, its saved
      program is all there is.
    normalize: what is done to stored inputs before the network sees them.
    calibration: inputs of the training split, as stored, for int8 activations: by qwix
      (``"int8"``) and by ONNX Runtime's own quantiser (``"int8_onnx"``).
    fold: whether BatchNorm is folded into the layers before it.
    skip: names of kernels, ``params/Dense_0/kernel``, that int8 activations leave in floats.
    instance: which of the networks of a run over several seeds; the list names it.
    check: how each file is checked and timed.

  Returns:
    What ``exports.json`` says. A kind that failed is there with ``passed`` false and its
    ``problem``, and has no file. Kinds exported before, of the same student, stay listed, each with
    the ``batch_size``, ``examples``, ``split`` and ``student_accuracy`` that were its own: those of
    the list, and its ``instance``, are of the latest export.

  Raises:
    FileNotFoundError: there is no finished run.
    ImportError: a kind that ``kinds`` names needs a library that is not installed; the message
      names the extra that brings it. A kind that is tried by default is then one that failed.
    TypeError: ``check`` or ``held_out`` is not of the kind described.
    ValueError: a kind is unknown or needs what is not given, or the network with ``normalize`` does
      not compute what the run's student does.
  """
  chosen = _chosen(kinds, network, calibration, fold)
  inputs, labels, split = _given(held_out, check)
  saved = _student.load_student(run, instance=instance)
  exact: Program = saved
  student = _reference(saved, inputs)
  if network is not None:
    model = Model(network, saved.variables)
    stored = saved.inputs
    if saved.ignored:  # what fed the network in training, and the program does not take
      given = jax.tree.map(lambda leaf: _inputs.stored_shape(np.asarray(leaf)[0]), dict(inputs))
      stored = {**given, **stored}
    exact = _program.as_program(model, stored=stored, normalize=normalize, outputs=saved.outputs)
    _same(exact, inputs, student)
  folder = pathlib.Path(run).absolute() / FOLDER
  folder.mkdir(exist_ok=True)
  digest = runs.short_digest(saved.name, runs.fingerprint(saved.leaves))
  listed: dict[str, Any] = {
    "version": _VERSION,
    "student": digest,
    "instance": instance,
    "batch_size": check.batch_size,
    "examples": _length(student),
    "split": split,
    "student_accuracy": top1(student.get("logits"), labels),
    "files": _earlier(folder, digest),
  }
  runs.write_npz(folder / EXAMPLE, {**_by_name(saved, inputs, 16), **_some(student, 16)})
  makers = _makers(exact, fold, calibration, skip)
  for kind in chosen:
    name, which = KINDS[kind]
    options: dict[str, Any] = {"student": student, "rounded": which != "float", "check": check}
    options["calibration"] = calibration if which == "int8_onnx" else None
    try:
      entry = export_file(folder / name, makers[which](), held_out, **options)
    except Exception as error:  # The other kinds are as good as before.
      named_here = isinstance(error, ExportError | ImportError | ValueError)
      _remove(folder / name)
      problem = str(error) if named_here else _check.short(error)
      own = {key: listed[key] for key in _OF_ONE_EXPORT}
      entry = {"file": name, "passed": False, "problem": problem, **own}
    rest = [other for other in listed["files"] if other["file"] != name]
    listed["files"] = [*rest, {"kind": kind, **entry}]
    write_json(folder / LIST, listed)
  return json.loads((folder / LIST).read_text())


def verify_exports(
  run: str | os.PathLike[str], *, time_limit: float = 300.0
) -> dict[str, str | None]:
  """Looks whether the exports of a run are what was checked, and still load and compute the same.

  Each file's size and digest are compared with ``exports.json``; StableHLO, ONNX and LiteRT are
  run again, in a process of their own, on the examples of ``example.npz``.

  Args:
    run: the run's folder.
    time_limit: seconds for each process.

  Returns:
    For each file listed as good what is wrong with it, or None.

  Raises:
    FileNotFoundError: the run has no exports.
    ExportError: the list is damaged, or of another version.
  """
  folder = _check.folder("run", run) / FOLDER
  listed = _read(folder)
  try:
    example = runs.read_npz(folder / EXAMPLE)
    outputs = [name for name in example if name.partition("/")[0] != "inputs"]
    student = {name: example.pop(name) for name in outputs}
  except (OSError, ValueError, KeyError) as error:
    raise ExportError(f"{folder / EXAMPLE} cannot be read ({error}); export again.") from error
  return {
    entry["file"]: problem_of(folder / entry["file"], entry, example, student, time_limit)
    for entry in listed["files"]
    if entry["passed"]
  }


def _chosen(kinds: Any, network: Any, calibration: Any, fold: bool) -> list[str]:
  """The kinds, if what they need is given."""
  lacks: dict[str, list[str]] = {
    "network": [k for k in KINDS if network is None and (k.endswith("onnx") or k == "int8")],
    "calibration": [k for k in KINDS if calibration is None and k in ("int8", "int8_onnx")],
  }
  if fold and network is None:
    raise ValueError("fold=True needs network=, whose operations can be seen; the run has none.")
  if kinds is None:
    away = [k for k in _APART if not all(_extras.there(one) for one in _libraries(k))]
    return [k for k in KINDS if not any(k in lacking for lacking in (away, *lacks.values()))]
  kinds = [kinds] if isinstance(kinds, str) else list(kinds)
  if not kinds:
    raise ValueError("kinds is empty; leave it out for all that can be made.")
  unknown = sorted(set(kinds) - set(KINDS))
  if unknown:
    raise ValueError(f"kinds has {unknown}; they are {list(KINDS)}.")
  for need, lacking in lacks.items():
    missing = [kind for kind in kinds if kind in lacking]
    if missing:
      raise ValueError(f"kinds={missing} need {need}=, which is not given.")
  for kind in kinds:
    _extras.need(f"kinds={kind!r}", *_libraries(kind))
  return [kind for kind in KINDS if kind in kinds]


def _libraries(kind: str) -> list[str]:
  """What a kind is made and checked with, beyond the core."""
  file, which = KINDS[kind]
  return [*_NEEDS.get(which, ()), *_NEEDS.get(pathlib.PurePath(file).suffix, ())]


def _makers(
  exact: Program, fold: bool, calibration: Any, skip: Any
) -> dict[str, Callable[[], Any]]:
  """The program of each precision, made when it is first asked for."""
  made: dict[str, Program] = {}

  def remembered(name: str, make: Callable[[], Program]) -> Callable[[], Program]:
    return lambda: made[name] if name in made else made.setdefault(name, make())

  floats = remembered("float", lambda: _folding.fold(exact) if fold else exact)
  return {
    "float": floats,
    "int8_weights": remembered("int8_weights", lambda: _int8.quantize_weights(floats())),
    "int8_onnx": floats,  # ONNX Runtime quantises the file
    "int8": remembered(
      "int8", lambda: _int8.quantize_activations(floats(), calibration, skip=skip)
    ),
  }


def _same(exact: Program, inputs: PyTree, student: dict[str, np.ndarray]) -> None:
  """Raises where the network is not the student's, or is fed in another way."""
  made = _reference(exact, jax.tree.map(lambda leaf: leaf[:64], inputs))
  found = compare(_some(student, 64), made, default_tolerance(exact, student))
  if found["problem"]:
    raise ValueError(
      f"network={exact.name} with its normalize is not what the run saved: {found['problem']}. "
      "Give the student's own network, and normalize= as the data were normalised in training."
    )


def _length(outputs: Mapping[str, np.ndarray]) -> int:
  """Of how many examples these outputs are."""
  return len(next(iter(outputs.values())))


def _some(outputs: Mapping[str, np.ndarray], first: int) -> dict[str, np.ndarray]:
  return {name: array[:first] for name, array in outputs.items()}


def _reference(program: Program, inputs: PyTree) -> dict[str, np.ndarray]:
  """What N examples make of it, by name, ``[N, ..., K]``, on the CPU where this process has it.

  So they can be compared with those of another process to rounding: a GPU multiplies with fewer
  bits than float32 has.
  """
  try:
    cpu = jax.local_devices(backend="cpu")[0]
  except RuntimeError:  # JAX_PLATFORMS leaves it out
    cpu = None
  with jax.default_device(cpu):
    return program.named(program.changed(leaves=_program.host(program.leaves)).predict(inputs))


def _by_name(program: Program, inputs: PyTree, first: int | None = None) -> dict[str, np.ndarray]:
  """The inputs by the names that a file has for them; the first few, or all."""
  if isinstance(inputs, Mapping):
    inputs = {key: value for key, value in inputs.items() if key not in program.ignored}
  arrays = [np.asarray(leaf)[:first] for leaf in jax.tree.leaves(inputs)]
  return dict(zip(_onnx.input_names(program), arrays, strict=True))


def _read(folder: pathlib.Path) -> dict[str, Any]:
  """The list of exports."""
  path = folder / LIST
  if not path.is_file():
    raise FileNotFoundError(f"{folder.parent} has no {FOLDER}/{LIST}: export.export makes it.")
  try:
    listed = runs.read_json(path)
    version = listed["version"]
    for entry in listed["files"] if version == _VERSION else ():
      runs.within(folder, entry["file"])
      lacks = {"sha256", "tolerance"} - set(entry) if entry["passed"] else ()
      if lacks:
        raise ValueError(f"{entry['file']} has no {' and no '.join(sorted(lacks))}")
  except (ValueError, KeyError, TypeError) as error:
    raise ExportError(f"{path} is damaged ({error}); export again.") from error
  if version != _VERSION:
    raise ExportError(f"{path} is of version {version}, and this is {_VERSION}; export again.")
  return listed


def _earlier(folder: pathlib.Path, digest: str) -> list[dict[str, Any]]:
  """What was exported before of this student; files of another are removed."""
  try:
    listed = _read(folder)
    if listed.get("student") == digest:
      # An entry of a list that did not yet tell it of each file has what the list says.
      shared = {key: listed[key] for key in _OF_ONE_EXPORT if key in listed}
      return [{**shared, **entry} for entry in listed["files"] if entry.get("kind") in KINDS]
  except (ExportError, FileNotFoundError):
    pass
  for name, _ in KINDS.values():
    _remove(folder / name)
  return []


def _remove(path: pathlib.Path) -> None:
  """Removes an exported file and what is written beside it: it is not what was asked for now."""
  for old in (path, _beside(path)):
    old.unlink(missing_ok=True)


def _beside(path: pathlib.Path) -> pathlib.Path:
  """The file that says which JAX made a program; its runtime script looks for it there."""
  return path.with_name(path.name + ".json")


# Of the largest logit, by the bytes of the narrowest float in the network: some hundred roundings.
_SHARES = {2: 0.05, 4: 1e-4, 8: 1e-9}


def export_file(
  path: str | os.PathLike[str],
  program: Program,
  held_out: Examples | tuple[PyTree, Any],
  *,
  student: np.ndarray | Mapping[str, np.ndarray] | None = None,
  rounded: bool = False,
  calibration: PyTree = None,
  check: Check = Check(),
) -> dict[str, Any]:
  """Exports a program as one file, runs it in a process of its own, and keeps it if that is right.

  Args:
    path: ``.stablehlo`` (any JAX from ``least_jax`` on, which the ``.json`` beside it names),
      ``.onnx``, ``.tflite`` (LiteRT, for batches of ``check.batch_size``), ``.mlpackage.zip``
      (Core ML, likewise; read back, not run), or ``.safetensors`` (the weights by path; checked by
      running the program with what is read).
    program: from `load_student` or `as_program`, folded or quantised or not.
    held_out: examples as stored, or ``(inputs, labels)``; labels may be None.
    student: the logits ``[N, ..., K]`` that the file is compared with, or a dict of outputs; the
      program's by default.
    rounded: whether it is judged by its accuracy (int8) instead of its logits.
    calibration: of an ``.onnx``: inputs of the training split, as stored, with which ONNX Runtime's
      static quantiser makes its activations int8; None leaves them.
    check: how it is checked and timed.

  Returns:
    What ``exports.json`` says of it: ``file``, ``bytes``, ``sha256``, ``runtime``, ``accuracy``,
    ``agreement``, ``largest_difference``, ``tolerance``, ``latency_ms`` ... and, for this file,
    ``batch_size`` of a timed call, ``examples``, ``split`` and ``student_accuracy`` of the check.

  Raises:
    ExportError: it cannot be loaded or fails its comparison; no file of that name is left.
    ImportError: a library is missing; the message names the extra that brings it.
    ValueError: the program cannot be exported in this form, its weights hold NaN, or an argument
      does not fit.

  >>> call = lambda leaves, x: x @ leaves["params/kernel"]
  >>> inputs = jax.ShapeDtypeStruct((2,), jnp.float32)
  >>> program = Program("net", {"params/kernel": jnp.eye(2)}, call, inputs)
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   held_out = (np.eye(2, dtype=np.float32), [0, 1])
  ...   made = export_file(f"{folder}/net.stablehlo", program, held_out)
  >>> made["accuracy"], made["agreement"], made["folded"]
  (1.0, 1.0, [])
  """
  target = _check.folder("path", path)
  if not target.name.endswith(_SUFFIXES):
    raise ValueError(f"path={target} must end in one of {', '.join(_SUFFIXES)}.")
  if calibration is not None and target.suffix != ".onnx":
    raise ValueError(
      f"calibration is given for path={target.name!r}, and only .onnx is quantised by it: give "
      "quantize_activations(program, calibration) for another."
    )
  _extras.need(f"path={target.name!r}", *_NEEDS.get(target.suffix, ()))
  runs.check_nan("program.leaves", program.leaves)
  inputs, labels, split = _given(held_out, check)
  wanted = _reference(program, inputs) if student is None else program.named(student)
  if check.tolerance is None:
    tolerance = default_tolerance(program, wanted)
  else:
    tolerance = dict.fromkeys(wanted, check.tolerance)
  with writes(target):
    target.parent.mkdir(parents=True, exist_ok=True)
  try:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".checking-") as folder:
      made = pathlib.Path(folder, target.name)
      with writes(target):
        about = _write(made, program, calibration, check)
      if target.suffix == ".zip":
        found = _coreml.check_coreml(made, program, check.batch_size, check.time_limit)
        ran, result = _unrun(found, wanted, labels)
      else:
        ran = _run(made, program, _by_name(program, inputs), check)
        result = _judged(ran.outputs, wanted, labels, None if rounded else tolerance, check)
      if result["problem"]:
        raise ExportError(f"{target.name} is not kept: {result['problem']}.")
      if about:
        os.replace(_beside(made), _beside(target))
      os.replace(made, target)
  except BaseException:
    _remove(target)
    raise
  return {
    "file": target.name,
    **runs.size_and_digest(target),
    "runtime": ran.runtime,
    "platform": ran.platform,
    "passed": True,
    "batch_size": check.batch_size,
    "examples": _length(wanted),
    "split": split,
    **result,
    "latency_ms": ran.latency_ms,
    "folded": list(program.folded),
    "unfolded": list(program.unfolded),
    "least_jax": about.get("least_jax"),
  }


def _unrun(
  found: Mapping[str, str], student: Mapping[str, np.ndarray], labels: Any
) -> tuple[Ran, dict[str, Any]]:
  """What is said of a file that was read back and could not be run: nothing of its outputs."""
  unknown = ("accuracy", "agreement", "largest_difference", "decided", "problem", "tolerance")
  told = {"student_accuracy": top1(student.get("logits"), labels), **dict.fromkeys(unknown)}
  return Ran({}, found["runtime"], "none", None), {**told, "remaining": found["remaining"]}


def _judged(
  outputs: Mapping[str, np.ndarray],
  student: Mapping[str, np.ndarray],
  labels: Any,
  tolerance: Mapping[str, float] | None,
  check: Check,
) -> dict[str, Any]:
  """A file's outputs beside the student's: by themselves, or in int8 by the accuracy."""
  rounded, loss = tolerance is None, check.accuracy_loss
  result = compare(student, outputs, tolerance or dict.fromkeys(student, 0.0), within=not rounded)
  accuracy, before = top1(outputs.get("logits"), labels), top1(student.get("logits"), labels)
  if rounded and result["problem"] is None:
    if accuracy is None and result["agreement"] < 1 - loss:
      same = f"it agrees with the student on {result['agreement']:.2%}"
      result["problem"] = f"{same}, and {1 - loss:.2%} is asked for"
    if accuracy is not None and before is not None and accuracy < before - loss:
      result["problem"] = (
        f"its accuracy is {accuracy:.2%} and the student's {before:.2%}; {loss:.2%} less is allowed"
      )
  told = {"student_accuracy": before, "accuracy": accuracy}
  allowed = tolerance if tolerance is None or len(tolerance) > 1 else next(iter(tolerance.values()))
  return {**told, **result, "tolerance": allowed}


def problem_of(
  path: pathlib.Path,
  entry: Mapping[str, Any],
  example: Mapping[str, np.ndarray],
  student: Mapping[str, np.ndarray],
  time_limit: float,
) -> str | None:
  """What is wrong with a file that was good: another size or digest, other logits; or None.

  Args:
    path: the file.
    entry: what `export_file` said of it.
    example: inputs ``[N, ...]`` by name.
    student: its outputs of them, ``[N, ..., K]`` by name.
    time_limit: seconds after which the process is ended.
  """
  problem = runs.altered(path, entry)
  if problem:
    return f"it {problem}"
  if path.suffix in (".safetensors", ".zip"):
    return None
  wide = any(array.dtype.itemsize == 8 for array in (*example.values(), *student.values()))
  try:
    ran = run_file(path, example, calls=0, time_limit=time_limit, wide=wide)
  except ExportError as error:
    return str(error)
  allowed = entry["tolerance"]
  each = allowed if isinstance(allowed, dict) else dict.fromkeys(student, allowed or 0.0)
  return compare(student, ran.outputs, each, within=allowed is not None)["problem"]


def _write(
  path: pathlib.Path, program: Program, calibration: PyTree, check: Check
) -> dict[str, Any]:
  """Writes a file in the form of its suffix; what is known of it, and written beside a program."""
  if path.suffix == ".onnx":
    made = _onnx.onnx_bytes(program)
    if calibration is not None:
      accepted, _ = program.accepted(calibration)
      made = _int8_onnx.quantized_onnx(made, _by_name(program, accepted))
    path.write_bytes(made)
    return {}
  if path.suffix == ".tflite":
    path.write_bytes(_litert.litert_bytes(program, check.batch_size, check.time_limit))
    return {}
  if path.suffix == ".zip":
    path.write_bytes(_coreml.coreml_bytes(program, check.batch_size, check.time_limit))
    return {}
  if path.suffix == ".safetensors":
    safetensors.save_safetensors(path, program.leaves)
    return {}
  return write_stablehlo(path, program, weights=True)


def write_stablehlo(path: pathlib.Path, program: Program, *, weights: bool) -> dict[str, Any]:
  """Writes a program, and beside it what it takes and puts out.

  Args:
    path: the file; ``path + ".json"`` is written beside it.
    program: the program.
    weights: whether they are inside; else they are its first argument, by name.

  Returns:
    What `_program.stablehlo` says of it.
  """
  serialized, about = _program.stablehlo(program, weights=weights)
  path.write_bytes(serialized)
  shapes = jax.tree.map(lambda s: {"shape": s.shape, "dtype": str(s.dtype)}, program.inputs)
  write_json(_beside(path), {**about, "inputs": shapes})
  return about


def _run(path: pathlib.Path, program: Program, inputs: dict[str, Any], check: Check) -> Ran:
  """Runs a file; weights by the program that takes them as an argument."""
  leaves = [*program.leaves.values(), *jax.tree.leaves(program.inputs)]
  options: dict[str, Any] = {
    "latency_batch": check.batch_size,
    "seconds": check.seconds,
    "time_limit": check.time_limit,
    "wide": any(np.dtype(leaf.dtype).itemsize == 8 for leaf in leaves),
  }
  if path.suffix != ".safetensors":
    return run_file(path, inputs, **options)
  runner = path.with_name("runner.stablehlo")
  write_stablehlo(runner, program, weights=False)
  return run_file(runner, inputs, weights=path, **options)


def _given(held_out: Any, check: Any) -> tuple[PyTree, np.ndarray | None, str]:
  """What `split_examples` gives, where a check is one too."""
  if not isinstance(check, Check):
    raise TypeError(f"check must be an export.Check, such as Check(batch_size=8), got {check!r}.")
  return split_examples(held_out)


def split_examples(held_out: Any) -> tuple[PyTree, np.ndarray | None, str]:
  """Inputs, labels (below 0 where they do not count) and the split's name."""
  if isinstance(held_out, Examples):
    inputs, split = held_out.inputs, held_out.split
    labels = held_out.labels if held_out.has_labels and held_out.num_classes > 0 else None
    if labels is not None and labels.dtype.kind in "iu" and held_out.ignore is not None:
      labels = np.where(labels == held_out.ignore, -1, labels.astype(np.int64))
  elif isinstance(held_out, tuple) and len(held_out) == 2:
    (inputs, labels), split = held_out, ""
  else:
    raise TypeError(
      f"held_out must be data.Examples or (inputs, labels), got {_check.show(held_out)}."
    )
  labels = None if labels is None else np.asarray(labels)
  sizes = {len(leaf) for leaf in jax.tree.leaves(inputs)} | (
    {len(labels)} if labels is not None else set()
  )
  if len(sizes) != 1 or 0 in sizes:
    raise ValueError(f"held_out needs examples, as many inputs as labels; it has {sorted(sizes)}.")
  return inputs, labels, split


def default_tolerance(program: Program, student: Mapping[str, np.ndarray]) -> dict[str, float]:
  """How far apart values may be: a share of an output's largest, by the narrowest float between."""
  floats = {v.aval.dtype for e in _program.traced(program).equations for v in e.outvars}
  floats = {d for d in floats if jnp.issubdtype(d, jnp.floating)}
  share = _SHARES.get(min((np.dtype(d).itemsize for d in floats), default=4), 0.05)
  return {name: share * float(np.max(np.abs(x), initial=0.0)) for name, x in student.items()}
