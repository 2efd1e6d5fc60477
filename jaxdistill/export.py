"""Exports: the deployed network alone as files that other programs run, each one checked.

`run` writes what is asked for into a run's ``exports/``; `file` writes one. Every file is loaded in
a process of its own by its own runtime, before it gets its name, and compared with the student on
held-out examples: one that fails is not kept. ``python -m jaxdistill.export RUN --with
module:function`` does the same from a command line, where ``function()`` gives the keywords of
`run` (those of the command line come first), and without ``--with`` looks whether the exports of a
run are still what they were.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import json
import os
import pathlib
import sys
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxdistill import arguments, deployed, folding, int8, onnx_files, portable
from jaxdistill.examples import Examples
from jaxdistill.exported import default_tolerance, file, split_examples, wrong
from jaxdistill.leaves import named
from jaxdistill.portable import Program
from jaxdistill.run import write_json
from jaxdistill.separate import ExportError, compare, top1
from jaxdistill.types import Network

__all__ = ["KINDS", "ExportError", "file", "main", "run", "saved", "verify"]

PyTree = Any

FOLDER, LIST, EXAMPLE = "exports", "exports.json", "example.npz"
_VERSION = 1
# What is true of one export, and so is told of each file: those of an earlier one stay.
_OF_ONE_EXPORT = ("batch_size", "examples", "split", "student_accuracy")
# What each kind's file is called, and which weights it has.
KINDS = {
  "stablehlo": ("student.stablehlo", "float"),
  "onnx": ("student.onnx", "float"),
  "safetensors": ("student.safetensors", "float"),
  "int8_weights": ("student.int8_weights.stablehlo", "int8_weights"),
  "int8_weights_onnx": ("student.int8_weights.onnx", "int8_weights"),
  "int8_weights_safetensors": ("student.int8_weights.safetensors", "int8_weights"),
  "int8": ("student.int8.stablehlo", "int8"),
}


def saved(run: str | os.PathLike[str], *, instance: int = 0) -> Program:
  """The student of a finished run as a program, from its folder alone.

  Its operations are compiled: it becomes StableHLO, safetensors and int8 weights, while ONNX,
  folding and int8 activations need the network (`jaxdistill.portable.from_network`).

  Args:
    run: the run's folder.
    instance: which of the networks of a run over several seeds.

  Returns:
    The program. Raises what `jaxdistill.deployed.load_student` raises.
  """
  return _as_program(deployed.load_student(run, instance=instance))


def _as_program(student: deployed.Student) -> Program:
  leaves, structure = named("variables", student.variables), jax.tree.structure(student.variables)
  names = list(leaves)

  def call(given: Any, inputs: PyTree) -> Any:
    return student.program(jax.tree.unflatten(structure, [given[name] for name in names]), inputs)

  inputs = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape[1:], s.dtype), student.expected)
  return Program(student.info["name"], leaves, call, inputs, tuple(student.info["platforms"]))


def run(
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
  accuracy_loss: float = 0.01,
  tolerance: float | None = None,
  batch_size: int = 1,
  seconds: float = 2.0,
  time_limit: float = 300.0,
) -> dict[str, Any]:
  """Exports the student of a finished run into ``<run>/exports``, and checks every file.

  Args:
    run: the run's folder.
    held_out: examples as stored, of a split that training did not see, or ``(inputs, labels)``;
      every file is compared with the student on all of them.
    kinds: which of `KINDS`, one or several; by default all that can be made of what is given.
    network: the student's network, for ONNX, folding and int8 activations; without it, its saved
      program is all there is.
    normalize: what is done to stored inputs before the network sees them.
    calibration: inputs of the training split, as stored, for int8 activations.
    fold: whether BatchNorm is folded into the layers before it.
    skip: kernels that int8 activations leave alone; see `jaxdistill.int8.activations`.
    instance: which of the networks of a run over several seeds; the list names it.
    accuracy_loss: see `file`.
    tolerance: see `file`.
    batch_size: see `file`.
    seconds: see `file`.
    time_limit: see `file`.

  Returns:
    What ``exports.json`` says. A kind that failed is there with ``passed`` false and its
    ``problem``, and has no file. Kinds exported before, of the same student, stay listed, each with
    the ``batch_size``, ``examples``, ``split`` and ``student_accuracy`` that were its own: those of
    the list, and its ``instance``, are of the latest export.

  Raises:
    FileNotFoundError: there is no finished run.
    ValueError: a kind is unknown or needs what is not given, or the network with ``normalize`` does
      not compute what the run's student does.
  """
  chosen = _chosen(kinds, network, calibration, fold)
  arguments.whole("batch_size", batch_size)  # before a file of an earlier export is given up
  inputs, labels, split = split_examples(held_out)
  loaded = deployed.load_student(run, instance=instance)
  base = exact = _as_program(loaded)
  student = base.logits(inputs)
  if network is not None:
    exact = portable.from_network(
      network, loaded.variables, stored=base.inputs, normalize=normalize
    )
    _same(exact, inputs, student)
  folder = pathlib.Path(run).absolute() / FOLDER
  folder.mkdir(exist_ok=True)
  digest = _digest(base)
  listed: dict[str, Any] = {
    "version": _VERSION,
    "student": digest,
    "instance": instance,
    "batch_size": batch_size,
    "examples": len(student),
    "split": split,
    "student_accuracy": top1(student, labels),
    "files": _earlier(folder, digest),
  }
  some = jax.tree.map(lambda leaf: np.asarray(leaf)[:16], inputs)
  example = dict(zip(onnx_files.input_names(base), jax.tree.leaves(some), strict=True))
  _save(folder / EXAMPLE, {**example, "logits": student[:16]})
  makers = _makers(exact, fold, calibration, skip)
  for kind in chosen:
    name, which = KINDS[kind]
    try:
      entry = file(
        folder / name,
        makers[which](),
        held_out,
        student=student,
        rounded=which != "float",
        accuracy_loss=accuracy_loss,
        tolerance=tolerance,
        batch_size=batch_size,
        seconds=seconds,
        time_limit=time_limit,
      )
    except Exception as error:  # The other kinds are as good as before.
      named_here = isinstance(error, ExportError | ImportError | ValueError)
      problem = str(error) if named_here else arguments.short(error)
      for old in (folder / name, folder / f"{name}.json"):
        old.unlink(missing_ok=True)
      own = {key: listed[key] for key in _OF_ONE_EXPORT}
      entry = {"file": name, "passed": False, "problem": problem, **own}
    rest = [other for other in listed["files"] if other["file"] != name]
    listed["files"] = [*rest, {"kind": kind, **entry}]
    write_json(folder / LIST, listed)
  return json.loads((folder / LIST).read_text())


def verify(run: str | os.PathLike[str], *, time_limit: float = 300.0) -> dict[str, str | None]:
  """Looks whether the exports of a run are what was checked, and still load and compute the same.

  Each file's size and digest are compared with ``exports.json``; StableHLO and ONNX are run again,
  in a process of their own, on the examples of ``example.npz``.

  Args:
    run: the run's folder.
    time_limit: seconds for each process.

  Returns:
    For each file listed as good what is wrong with it, or None.

  Raises:
    FileNotFoundError: the run has no exports.
    ExportError: the list is damaged, or of another version.
  """
  folder = arguments.folder("run", run).absolute() / FOLDER
  listed = _read(folder)
  try:
    with np.load(folder / EXAMPLE, allow_pickle=False) as arrays:
      example = {name: arrays[name] for name in arrays.files}
    student = example.pop("logits")
  except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
    raise ExportError(f"{folder / EXAMPLE} cannot be read ({error}); export again.") from error
  return {
    entry["file"]: wrong(folder / entry["file"], entry, example, student, time_limit)
    for entry in listed["files"]
    if entry["passed"]
  }


def _chosen(kinds: Any, network: Any, calibration: Any, fold: bool) -> list[str]:
  """The kinds, if what they need is given."""
  lacks: dict[str, list[str]] = {
    "network": [k for k in KINDS if network is None and (k.endswith("onnx") or k == "int8")],
    "calibration": [k for k in KINDS if calibration is None and k == "int8"],
  }
  if fold and network is None:
    raise ValueError("fold=True needs network=, whose operations can be seen; the run has none.")
  if kinds is None:
    return [k for k in KINDS if not any(k in lacking for lacking in lacks.values())]
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
  return [kind for kind in KINDS if kind in kinds]


def _makers(
  exact: Program, fold: bool, calibration: Any, skip: Any
) -> dict[str, Callable[[], Any]]:
  """The program of each precision, made when it is first asked for."""
  made: dict[str, Program] = {}

  def once(name: str, make: Callable[[], Program]) -> Callable[[], Program]:
    return lambda: made[name] if name in made else made.setdefault(name, make())

  floats = once("float", lambda: folding.fold(exact) if fold else exact)
  return {
    "float": floats,
    "int8_weights": once("int8_weights", lambda: int8.weights(floats())),
    "int8": once("int8", lambda: int8.activations(floats(), calibration, skip=skip)),
  }


def _same(exact: Program, inputs: PyTree, student: np.ndarray) -> None:
  """Raises where the network is not the student's, or is fed in another way."""
  some = jax.tree.map(lambda leaf: leaf[:64], inputs)
  problem = compare(student[:64], exact.logits(some), default_tolerance(exact, student))["problem"]
  if problem:
    raise ValueError(
      f"network={exact.name} with its normalize is not what the run saved: {problem}. Give the "
      "student's own network, and normalize= as the data were normalised in training."
    )


def _digest(program: Program) -> str:
  """What tells one student from another."""
  found = hashlib.sha256(program.name.encode())
  for name, leaf in sorted(program.leaves.items()):
    found.update(name.encode() + np.asarray(leaf).tobytes())
  return found.hexdigest()


def _read(folder: pathlib.Path) -> dict[str, Any]:
  """The list of exports."""
  path = folder / LIST
  if not path.is_file():
    raise FileNotFoundError(f"{folder.parent} has no {FOLDER}/{LIST}: export.run makes it.")
  try:
    listed = json.loads(path.read_text())
    version = listed["version"]
    whole = version != _VERSION or all({"file", "passed"} <= set(e) for e in listed["files"])
    if not whole:
      raise ValueError("an entry has no file")
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
    for path in (folder / name, folder / f"{name}.json"):
      path.unlink(missing_ok=True)
  return []


def _save(path: pathlib.Path, arrays: dict[str, Any]) -> None:
  temporary = path.with_name(path.name + ".tmp")
  with temporary.open("wb") as opened:
    np.savez(opened, **arrays)
  os.replace(temporary, path)


def main(args: Sequence[str] | None = None) -> int:
  """The command; returns the exit code, 1 where a file failed.

  Args:
    args: the command line's words; those of the process by default.
  """
  parser = argparse.ArgumentParser(prog="python -m jaxdistill.export", description=__doc__)
  parser.add_argument("run", type=pathlib.Path, help="the run's folder")
  parser.add_argument("--with", dest="given", metavar="MODULE:FUNCTION", help="keywords of run")
  parser.add_argument("--kinds", nargs="+", choices=list(KINDS), help="by default all")
  parser.add_argument("--fold", action="store_true", default=None, help="fold BatchNorm")
  parser.add_argument("--batch-size", type=int, help="to time a call with; by default 1")
  options = parser.parse_args(args)
  asked = {"kinds": options.kinds, "fold": options.fold, "batch_size": options.batch_size}
  asked = {name: value for name, value in asked.items() if value is not None}
  module, _, function = (options.given or "").partition(":")
  if options.given and not (module and function and module[0] != "."):
    parser.error(f"--with {options.given} must be module:function, as in my_export:given")
  if asked and not options.given:
    words = ", ".join(f"--{name.replace('_', '-')}" for name in asked)
    parser.error(
      f"{words} without --with MODULE:FUNCTION would do nothing: without it nothing is exported, "
      "the files that are there are looked at. Give --with, whose function returns held_out=."
    )
  try:
    if not options.given:
      found = verify(options.run)
      for name, problem in found.items():
        print(
          f"{name}: {problem or 'as it was checked'}", file=sys.stderr if problem else sys.stdout
        )
      return int(any(found.values()))
    listed = run(options.run, **_keywords(options.run, options.given, asked))
  except (ExportError, OSError, ValueError) as error:
    print(error, file=sys.stderr)
    return 1
  for entry in listed["files"]:
    print(_line(entry), file=sys.stdout if entry["passed"] else sys.stderr)
  return int(not all(entry["passed"] for entry in listed["files"]))


def _keywords(folder: pathlib.Path, given: str, asked: dict[str, Any]) -> dict[str, Any]:
  """The keywords of `run`, of ``module:function`` and then of the command line."""
  module, _, function = given.partition(":")
  sys.path.insert(0, os.getcwd())  # as `python -m` has it, and a console script has not
  try:
    make = getattr(importlib.import_module(module), function, None)
    if not callable(make):
      raise ValueError(f"--with {given}: {module} has no function {function}.")
    made = make()
  except ImportError as error:
    raise ValueError(
      f"--with {given}: {arguments.short(error)}. MODULE is a name as import takes it, found from "
      "the current folder; what it imports must be installed."
    ) from error
  if not isinstance(made, Mapping):
    raise ValueError(
      f"--with {given} must return a dict of keywords of export.run, got {arguments.show(made)}."
    )
  keywords = {**made, **asked}
  try:
    split_examples(inspect.signature(run).bind(folder, **keywords).arguments["held_out"])
  except TypeError as error:
    raise ValueError(f"--with {given} must return keywords of export.run: {error}.") from error
  return keywords


def _line(entry: dict[str, Any]) -> str:
  if not entry["passed"]:
    return f"{entry['file']}: {entry['problem']}"
  accuracy = "" if entry["accuracy"] is None else f"accuracy {entry['accuracy']:.2%}, "
  latency = f"{entry['latency_ms']['median']:.3f} ms" if entry["latency_ms"] else "not timed"
  return (
    f"{entry['file']}: {entry['bytes'] / 1e3:.1f} kB, {accuracy}agrees with the student on "
    f"{entry['agreement']:.2%}, {latency} in {entry['runtime']} on {entry['platform']}"
  )


if __name__ == "__main__":
  sys.exit(main())
