"""One exported file: written, run in a process of its own, compared, and kept if it is right.

**The tolerance** is a share of the largest logit that the student puts out on the held-out
examples. One float32 operation rounds by 6e-8 of its result, and another order of the sums in a
hundred layers comes to less than 1e-4 of the logits: that is the tolerance of float32. Networks
that compute in bfloat16 or float16 (a step is 0.8% there) have 0.05, float64 1e-9. Where the
student's margin is larger, the top-1 must be the same. Files in int8 are judged by their accuracy
instead.
"""

from __future__ import annotations

import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import arguments, manifest, onnx_files, portable
from jaxdistill import weights as weight_files
from jaxdistill.examples import Examples
from jaxdistill.portable import Program
from jaxdistill.run import write_json
from jaxdistill.separate import ExportError, compare, execute, top1

__all__ = ["default_tolerance", "file", "split_examples", "wrong"]

PyTree = Any

# Of the largest logit, by the bytes of the narrowest float in the network; see the module.
_SHARES = {2: 0.05, 4: 1e-4, 8: 1e-9}


def file(
  path: str | os.PathLike[str],
  program: Program,
  held_out: Examples | tuple[PyTree, Any],
  *,
  student: np.ndarray | None = None,
  rounded: bool = False,
  accuracy_loss: float = 0.01,
  tolerance: float | None = None,
  batch_size: int = 1,
  seconds: float = 2.0,
  time_limit: float = 300.0,
) -> dict[str, Any]:
  """Exports a program as one file, runs it in a process of its own, and keeps it if that is right.

  Args:
    path: ``.stablehlo`` (any JAX from ``least_jax`` on, see the ``.json`` beside it), ``.onnx``, or
      ``.safetensors`` (the weights by path; checked by running the program with what is read).
    program: from `saved` or `jaxdistill.portable.from_network`, folded or quantised or not.
    held_out: examples as stored, or ``(inputs, labels)``; labels may be None.
    student: the logits ``[N, ..., K]`` that the file is compared with; the program's by default.
    rounded: whether it is judged by its accuracy (int8) instead of its logits.
    accuracy_loss: by how much its accuracy may then be below the student's; by default one point.
      Without labels, the share of examples whose top-1 may be another.
    tolerance: of a logit; see the module for the default.
    batch_size: with which a call is timed, from NumPy arrays to a NumPy array in every runtime.
    seconds: how long to time.
    time_limit: seconds after which the process is ended.

  Returns:
    What ``exports.json`` says of it: ``file``, ``bytes``, ``sha256``, ``runtime``, ``accuracy``,
    ``agreement``, ``largest_difference``, ``tolerance``, ``latency_ms`` ... and, for this file,
    ``batch_size`` of a timed call, ``examples``, ``split`` and ``student_accuracy`` of the check.

  Raises:
    ExportError: it cannot be loaded or fails its comparison; no file of that name is left.
    ImportError: a library is missing; the message says which to install.
    ValueError: the program cannot be exported in this form, or an argument does not fit.

  >>> call = lambda leaves, x: x @ leaves["params/kernel"]
  >>> inputs = jax.ShapeDtypeStruct((2,), jnp.float32)
  >>> program = Program("net", {"params/kernel": jnp.eye(2)}, call, inputs)
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   made = file(f"{folder}/net.stablehlo", program, (np.eye(2, dtype=np.float32), [0, 1]))
  >>> made["accuracy"], made["agreement"], made["folded"]
  (1.0, 1.0, [])
  """
  target = arguments.folder("path", path).absolute()
  if target.suffix not in (".stablehlo", ".onnx", ".safetensors"):
    raise ValueError(f"path={target} must end in .stablehlo, .onnx or .safetensors.")
  arguments.whole("batch_size", batch_size)
  inputs, labels, split = split_examples(held_out)
  student = program.logits(inputs) if student is None else student
  if tolerance is None:
    tolerance = default_tolerance(program, student)
  arguments.number("tolerance", tolerance, least=0)
  target.parent.mkdir(parents=True, exist_ok=True)
  beside = target.with_name(target.name + ".json")
  try:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".checking-") as folder:
      made = pathlib.Path(folder, target.name)
      about = _write(made, program)
      given = dict(zip(onnx_files.input_names(program), jax.tree.leaves(inputs), strict=True))
      options: dict[str, Any] = {"latency_batch": batch_size, "seconds": seconds}
      ran = _run(made, program, given, **options, time_limit=time_limit)
      result = compare(student, ran.logits, tolerance, within=not rounded)
      accuracy, before = top1(ran.logits, labels), top1(student, labels)
      problem = result["problem"] or (
        _too_low(accuracy, before, result["agreement"], accuracy_loss) if rounded else None
      )
      if problem:
        raise ExportError(f"{target.name} is not kept: {problem}.")
      for extra in made.parent.glob(f"{made.name}.json"):
        os.replace(extra, beside)
      os.replace(made, target)
  except BaseException:
    # One of an earlier export is not what was asked for now.
    for old in (target, beside):
      old.unlink(missing_ok=True)
    raise
  return {
    "file": target.name,
    "bytes": target.stat().st_size,
    "sha256": manifest.sha256(target),
    "runtime": ran.runtime,
    "platform": ran.platform,
    "passed": True,
    "batch_size": batch_size,
    "examples": len(student),
    "split": split,
    "student_accuracy": before,
    "accuracy": accuracy,
    **result,
    "tolerance": None if rounded else tolerance,
    "latency_ms": ran.latency_ms,
    "folded": list(program.folded),
    "unfolded": list(program.unfolded),
    "least_jax": about.get("least_jax"),
  }


def wrong(
  path: pathlib.Path,
  entry: Mapping[str, Any],
  example: Mapping[str, np.ndarray],
  student: np.ndarray,
  time_limit: float,
) -> str | None:
  """What is wrong with a file that was good: another size or digest, other logits; or None.

  Args:
    path: the file.
    entry: what `file` said of it.
    example: inputs ``[N, ...]`` by name.
    student: its logits of them, ``[N, ..., K]``.
    time_limit: seconds after which the process is ended.
  """
  if not path.is_file():
    return "it is missing"
  size = path.stat().st_size
  if size != entry["bytes"]:
    return f"it has {size} bytes, {entry['bytes']} were written"
  if manifest.sha256(path) != entry["sha256"]:
    return "it is not as it was written (its SHA-256 differs)"
  if path.suffix == ".safetensors":
    return None
  wide = any(array.dtype.itemsize == 8 for array in (*example.values(), student))
  try:
    ran = execute(path, example, calls=0, time_limit=time_limit, wide=wide)
  except ExportError as error:
    return str(error)
  within = entry["tolerance"] is not None
  return compare(student, ran.logits, entry["tolerance"] or 0.0, within=within)["problem"]


def _write(path: pathlib.Path, program: Program) -> dict[str, Any]:
  """Writes a file in the form of its suffix; what is known of it."""
  if path.suffix == ".onnx":
    path.write_bytes(onnx_files.onnx_bytes(program))
    return {}
  if path.suffix == ".safetensors":
    weight_files.save_safetensors(path, program.leaves)
    return {}
  serialized, about = portable.stablehlo(program)
  path.write_bytes(serialized)
  shapes = jax.tree.map(lambda s: {"shape": s.shape, "dtype": str(s.dtype)}, program.inputs)
  write_json(path.with_name(path.name + ".json"), {**about, "inputs": shapes})
  return about


def _run(path: pathlib.Path, program: Program, inputs: dict[str, Any], **options: Any) -> Any:
  """Runs a file; weights by the program that takes them as an argument."""
  leaves = [*program.leaves.values(), *jax.tree.leaves(program.inputs)]
  options["wide"] = any(np.dtype(leaf.dtype).itemsize == 8 for leaf in leaves)
  if path.suffix != ".safetensors":
    return execute(path, inputs, **options)
  serialized, _ = portable.stablehlo(program, weights=False)
  runner = path.with_name("runner.stablehlo")
  runner.write_bytes(serialized)
  return execute(runner, inputs, weights=path, **options)


def split_examples(held_out: Any) -> tuple[PyTree, np.ndarray | None, str]:
  """Inputs, labels and the split's name."""
  if isinstance(held_out, Examples):
    labels = held_out.labels if held_out.num_classes else None
    inputs, split = held_out.inputs, held_out.split
  elif isinstance(held_out, tuple) and len(held_out) == 2:
    (inputs, labels), split = held_out, ""
  else:
    raise TypeError(
      f"held_out must be data.Examples or (inputs, labels), got {arguments.show(held_out)}."
    )
  labels = None if labels is None else np.asarray(labels)
  sizes = {len(leaf) for leaf in jax.tree.leaves(inputs)} | (
    {len(labels)} if labels is not None else set()
  )
  if len(sizes) != 1 or 0 in sizes:
    raise ValueError(f"held_out needs examples, as many inputs as labels; it has {sorted(sizes)}.")
  return inputs, labels, split


def default_tolerance(program: Program, student: np.ndarray) -> float:
  """How far apart two logits may be; see the module."""
  floats = {v.aval.dtype for e in portable.traced(program).equations for v in e.outvars}
  floats = {d for d in floats if jnp.issubdtype(d, jnp.floating)}
  least = min((np.dtype(d).itemsize for d in floats), default=4)
  return _SHARES.get(least, 0.05) * float(np.max(np.abs(student), initial=0.0))


def _too_low(
  accuracy: float | None, before: float | None, agreement: float, loss: float
) -> str | None:
  if accuracy is not None and before is not None and accuracy < before - loss:
    return (
      f"its accuracy is {accuracy:.2%} and the student's {before:.2%}; {loss:.2%} less is allowed"
    )
  if accuracy is None and agreement < 1 - loss:
    return f"its top-1 is the student's on {agreement:.2%}, and {1 - loss:.2%} is asked for"
  return None
