"""Programs as LiteRT (TFLite) files, by Google's converter from StableHLO."""

from __future__ import annotations

import pathlib
import tempfile

from jaxdistill import _extras
from jaxdistill.export import _onnx, _process, _program
from jaxdistill.export._program import Program

__all__ = ["litert_bytes"]


def litert_bytes(program: Program, batch_size: int = 1, time_limit: float = 300.0) -> bytes:
  """A program as a LiteRT model with its weights inside, for batches of one size.

  The size is fixed, since a phone's accelerators take no other graph. Inputs and outputs have the
  names that an ONNX file gives them, in the signature ``serving_default``. The conversion is done
  in a process of its own, for the converter is native code that may end the one it is in.

  Args:
    program: from `as_program`, folded or not, or read from a run by `load_student`.
    batch_size: how many examples a call takes.
    time_limit: seconds after which the process is ended.

  Returns:
    The bytes of the file.

  Raises:
    ImportError: the converter is not installed.
    ExportError: it failed; the message has its reason.
    ValueError: the program cannot be lowered.
  """
  _extras.need("LiteRT", "litert_converter")
  lowered = _program.portable(program, batch_size)
  with tempfile.TemporaryDirectory() as folder:
    source, made = pathlib.Path(folder, "program"), pathlib.Path(folder, "made")
    source.write_bytes(lowered)
    words = [str(source), str(made), "--inputs", *_onnx.input_names(program)]
    words += ["--outputs", *program.outputs]
    _process.run_script("make_litert.py", words, time_limit, f"{program.name} as LiteRT")
    return made.read_bytes()
