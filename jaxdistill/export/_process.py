"""An exported file run in a process of its own, and its outputs compared with the student's."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxdistill import _check

__all__ = ["ExportError", "Ran", "compare", "compare_outputs", "run_file", "run_script", "top1"]

_SCRIPTS = pathlib.Path(__file__).parent / "runtimes"
_PROGRAMS = {
  ".onnx": "run_onnx.py",
  ".stablehlo": "run_stablehlo.py",
  ".tflite": "run_litert.py",
}
# The parent's devices, precision and flags are not those of a deployed process.
_KEPT = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE")


class ExportError(RuntimeError):
  """An exported file cannot be loaded, or does not compute what the student does."""


class Ran(NamedTuple):
  """What a process made of an exported file.

  Attributes:
    outputs: what it put out, by name: ``logits`` ``[N, ..., K]``, say.
    runtime: what ran it, with its version.
    platform: on what.
    latency_ms: ``{"median", "p95", "calls"}`` of one call, from NumPy arrays to a NumPy array in
      either runtime (with JAX, what goes to the device and comes back), or None where it was not
      timed.
  """

  outputs: dict[str, np.ndarray]
  runtime: str
  platform: str
  latency_ms: dict[str, float] | None


def run_file(
  path: str | os.PathLike[str],
  inputs: Mapping[str, Any],
  *,
  weights: str | os.PathLike[str] | None = None,
  batch_size: int = 256,
  latency_batch: int = 1,
  calls: int = 100,
  seconds: float = 2.0,
  time_limit: float = 300.0,
  platform: str = "cpu",
  wide: bool = False,
) -> Ran:
  """Runs an exported file in a new process, which imports neither jaxdistill nor Flax.

  Args:
    path: ``.onnx``, run by ONNX Runtime without JAX; ``.tflite``, by LiteRT's interpreter without
      JAX; or ``.stablehlo``, by JAX.
    inputs: arrays ``[N, ...]`` by name, in the program's order.
    weights: a safetensors file that is the program's first argument.
    batch_size: how many examples at once; the last batch is padded. A ``.tflite`` has its own.
    latency_batch: how many at once when a call is timed.
    calls: how many calls to time at most; 0 for none.
    seconds: how long to time at most.
    time_limit: seconds after which the process is ended.
    platform: JAX's, of the process: ``"cpu"``, ``"cuda"``.
    wide: whether JAX has 64 bits there.

  Returns:
    What came of it.

  Raises:
    ExportError: the file cannot be loaded there, or the process failed; the message has its reason.
    FileNotFoundError: there is no such file.
    ValueError: the suffix is none of these.
  """
  file = _check.folder("path", path)
  if file.suffix not in _PROGRAMS:
    raise ValueError(f"path={file} must end in one of {sorted(_PROGRAMS)}.")
  if not file.is_file():
    raise FileNotFoundError(f"path={file}: there is no such file.")
  arrays: dict[str, Any] = {name: np.asarray(array) for name, array in inputs.items()}
  strange = [n for n, a in arrays.items() if a.dtype.kind not in "biufc"]
  if strange:
    kinds = [str(arrays[name].dtype) for name in strange]
    raise ExportError(f"inputs {strange} are {kinds}, which another process cannot be handed.")
  with tempfile.TemporaryDirectory() as folder:
    given, out = pathlib.Path(folder, "inputs.npz"), pathlib.Path(folder, "out")
    np.savez(given, **arrays)
    words = [str(file), str(given), str(out), "--batch-size", str(batch_size)]
    words += ["--calls", str(calls), "--latency-batch", str(latency_batch)]
    words += ["--seconds", str(seconds)]
    words += ["--weights", str(pathlib.Path(weights).absolute())] if weights else []
    jax_there = {"JAX_PLATFORMS": platform, "JAX_ENABLE_X64": str(int(wide))}
    run_script(_PROGRAMS[file.suffix], words, time_limit, file, jax_there)
    about = json.loads(out.with_name("out.json").read_text())
    with np.load(out.with_name("out.npz"), allow_pickle=False) as arrays_out:
      outputs = {name: arrays_out[name] for name in arrays_out.files}
  if about["loaded"]:
    raise ExportError(f"{file} was run in a process that imported {about['loaded']}.")
  times = about["times"]
  latency = None
  if times:
    median, p95 = np.percentile(times, [50, 95])
    latency = {"median": float(median), "p95": float(p95), "calls": float(len(times))}
  return Ran(outputs, about["runtime"], about["platform"], latency)


def run_script(
  script: str, words: list[str], limit: float, file: Any, more: Mapping[str, str] | None = None
) -> None:
  """Runs one of the scripts of ``runtimes`` in a new process, and waits for it.

  Args:
    script: its file's name.
    words: its command line.
    limit: seconds after which it is ended.
    file: what it is about, for messages.
    more: of the environment, beside what this process has without JAX's own.

  Raises:
    ExportError: it failed, or was not done in time.
  """
  command = [sys.executable, "-P", str(_SCRIPTS / script), *words]
  environment = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("JAX_", "XLA_FLAGS")) or name.startswith(_KEPT)
  } | dict(more or {})
  try:
    ended = subprocess.run(
      command, env=environment, capture_output=True, text=True, errors="replace", timeout=limit
    )
  except subprocess.TimeoutExpired as error:
    raise ExportError(
      f"{file} was not done after {limit:g} s in a process of its own; give a larger time_limit, "
      "or fewer held-out examples."
    ) from error
  if ended.returncode < 0:
    raise ExportError(
      f"the process that ran {file} was ended by signal {-ended.returncode}: out of memory, or a "
      "fault of its runtime."
    )
  if ended.returncode:
    lines = ended.stderr.strip().splitlines() or ["no message"]
    raise ExportError(f"the process that ran {file} failed: {lines[-1][:600]}")


def top1(logits: np.ndarray | None, labels: np.ndarray | None) -> float | None:
  """The share of right answers; None without logits, or where labels are not their classes.

  Args:
    logits: ``[N, ..., K]``.
    labels: ``[N, ...]`` integers; one below 0 does not count.

  >>> top1(np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([1, 1]))
  0.5
  """
  if logits is None or labels is None or labels.dtype.kind not in "iu":
    return None
  if labels.shape != logits.shape[:-1] or logits.shape[-1] < 2 or not np.any(labels >= 0):
    return None
  return float(np.mean((logits.argmax(-1) == labels)[labels >= 0]))


def compare(
  student: Mapping[str, np.ndarray],
  outputs: Mapping[str, np.ndarray],
  tolerance: Mapping[str, float],
  *,
  within: bool = True,
) -> dict[str, Any]:
  """Compares all outputs with the student's, by `compare_outputs`.

  Args:
    student: what the student puts out, by name.
    outputs: the same of the exported file.
    tolerance: of each.
    within: see there.

  Returns:
    The same of all together: the least agreement, the largest difference, the first problem.
  """
  if set(outputs) != set(student):
    return _result(0.0, float("nan"), 0, f"it puts out {sorted(outputs)}, not {sorted(student)}")
  found = [
    compare_outputs(student[name], outputs[name], tolerance[name], within=within, name=name)
    for name in student
  ]
  return {
    "agreement": min(one["agreement"] for one in found),
    "largest_difference": max(one["largest_difference"] for one in found),
    "decided": sum(one["decided"] for one in found),
    "problem": next((one["problem"] for one in found if one["problem"]), None),
  }


def compare_outputs(
  student: np.ndarray,
  outputs: np.ndarray,
  tolerance: float,
  *,
  within: bool = True,
  name: str = "logits",
) -> dict[str, Any]:
  """Compares an output with the student's.

  Args:
    student: ``[N, ..., K]``.
    outputs: the same of the exported file.
    tolerance: how far apart two values may be, and above which margin (largest less second largest
      of the student's logits) the top-1 must be the same.
    within: whether that is asked; else only that they are finite.
    name: of the output; of what is no logits, or of one alone, there is no top-1.

  Returns:
    ``agreement`` (the share of the same top-1; without one, the share of the student's variance
    over the examples that its difference leaves), ``largest_difference``, ``decided`` (how many
    have a margin above the tolerance), and ``problem``, None where all is well.

  >>> student = np.array([[0.0, 1.0], [0.5, 0.5001]])
  >>> compare_outputs(student, student[:, ::-1], 1e-3)["problem"]
  'its logits differ from the student by up to 1, and 0.001 is the tolerance'
  """
  if outputs.shape != student.shape:
    shapes = f"{outputs.shape}, and the student's {student.shape}"
    return _result(0.0, float("nan"), 0, f"its {name} have the shape {shapes}")
  if not np.all(np.isfinite(outputs[np.isfinite(student)])):
    return _result(0.0, float("nan"), 0, f"its {name} are not finite where the student's are")
  wide = student.astype(np.float64)
  apart = outputs.astype(np.float64) - wide
  difference = float(np.nanmax(np.abs(apart), initial=0.0))
  wrong = 0
  decided: np.ndarray = np.zeros(0, bool)
  if name == "logits" and wide.shape[-1] > 1:
    ordered = np.sort(wide, axis=-1)
    decided = ordered[..., -1] - ordered[..., -2] > tolerance
    same = outputs.argmax(-1) == student.argmax(-1)
    wrong, agreement = int(np.sum(decided & ~same)), float(same.mean())
  else:
    spread = np.nansum(np.square(wide - np.nanmean(wide, axis=0)))
    left = np.nansum(np.square(apart))
    agreement = float(1 - left / spread) if spread > 0 else float(left == 0)
  problem = None
  if within and difference > tolerance:
    problem = (
      f"its {name} differ from the student by up to {difference:.3g}, and {tolerance:.3g} is the "
      "tolerance"
    )
  elif within and wrong:
    problem = f"its top-1 is another than the student's on {wrong} examples with a clear margin"
  return _result(agreement, difference, int(decided.sum()), problem)


def _result(
  agreement: float, difference: float, decided: int, problem: str | None
) -> dict[str, Any]:
  return {
    "agreement": agreement,
    "largest_difference": difference,
    "decided": decided,
    "problem": problem,
  }
