"""Programs as Core ML packages, from StableHLO by stablehlo-coreml and Apple's coremltools.

The conversion runs anywhere, Core ML itself on a Mac alone. So a file is read back in another
process, where its program and weights must load, its inputs be the student's and its outputs have
the student's names; what it computes remains to be checked on a Mac, as every list and report says.
"""

from __future__ import annotations

import json
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import _extras
from jaxdistill.export import _onnx, _process, _program
from jaxdistill.export._process import ExportError
from jaxdistill.export._program import Program

__all__ = ["REMAINS", "check_coreml", "coreml_bytes"]

REMAINS = "what it computes, and how fast, on a Mac: Core ML runs nowhere else"
# What an array of Core ML may hold; smaller integers are handed over as int32.
_TYPES = {"float16": "FLOAT16", "float32": "FLOAT32", "int32": "INT32"}


def coreml_bytes(program: Program, batch_size: int = 1, time_limit: float = 300.0) -> bytes:
  """A program as a zipped ``.mlpackage``, for batches of one size, in float32, from iOS 18 on.

  Inputs and outputs have the names that an ONNX file gives them, with ``_`` for ``/``. Integers
  and booleans are given as int32.

  Args:
    program: from `as_program`, folded or not, or read from a run by `load_student`.
    batch_size: how many examples a call takes.
    time_limit: seconds after which the converter's process is ended.

  Returns:
    The bytes of the file.

  Raises:
    ImportError: the converter is not installed.
    ExportError: it failed; the message has its reason.
    ValueError: the program cannot be lowered.
  """
  _extras.need("Core ML", "stablehlo_coreml", "coremltools")

  def call(leaves: Any, inputs: Any) -> Any:
    kept = jax.tree.map(lambda leaf, shape: leaf.astype(shape.dtype), inputs, program.inputs)
    return program.call(leaves, kept)

  accepted = program.changed(call=call, inputs=jax.tree.map(_accepted, program.inputs))
  lowered = _program.portable(accepted, batch_size)
  with tempfile.TemporaryDirectory() as folder:
    source, made = pathlib.Path(folder, "program"), pathlib.Path(folder, "made")
    source.write_bytes(lowered)
    words = [str(source), str(made), "--inputs", *map(_name, _onnx.input_names(program))]
    words += ["--outputs", *map(_name, program.outputs)]
    about = f"{program.name} as Core ML"
    _process.run_script("make_coreml.py", words, time_limit, about, {"JAX_PLATFORMS": "cpu"})
    return made.read_bytes()


def check_coreml(
  path: pathlib.Path, program: Program, batch_size: int, time_limit: float
) -> dict[str, Any]:
  """Reads a file back in a process of its own; what is known of it then.

  Args:
    path: the file.
    program: what it was made of.
    batch_size: of a call.
    time_limit: seconds after which the process is ended.

  Returns:
    ``runtime``, and ``remaining``: what is still to be checked.

  Raises:
    ExportError: it does not load, takes something else than the program, or its outputs have other
      names.
  """
  with tempfile.TemporaryDirectory() as folder:
    told = pathlib.Path(folder, "told.json")
    _process.run_script("check_coreml.py", [str(path), str(told)], time_limit, path)
    found = json.loads(told.read_text())
  shapes = jax.tree.leaves(jax.tree.map(_accepted, program.inputs))
  names = map(_name, _onnx.input_names(program))
  wanted = {
    n: [[batch_size, *s.shape], _TYPES[str(s.dtype)]] for n, s in zip(names, shapes, strict=True)
  }
  if found["inputs"] != wanted or sorted(found["outputs"]) != sorted(map(_name, program.outputs)):
    raise ExportError(
      f"{path.name} is not kept: it takes {found['inputs']} and puts out {found['outputs']}, not "
      f"{wanted} and {list(program.outputs)}."
    )
  return {"runtime": f"{found['runtime']}, not run", "remaining": REMAINS}


def _name(name: str) -> str:
  return name.replace("/", "_")


def _accepted(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """The shape with a dtype that Core ML takes."""
  floats = jnp.issubdtype(leaf.dtype, jnp.floating)
  dtype = leaf.dtype if str(leaf.dtype) in _TYPES else np.float32 if floats else np.int32
  return jax.ShapeDtypeStruct(leaf.shape, dtype)
