"""An exported file run in a process of its own, and its logits compared with the student's."""

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

__all__ = ["ExportError", "Ran", "compare_logits", "run_file", "top1"]

_SCRIPTS = pathlib.Path(__file__).parent / "runtimes"
_PROGRAMS = {".onnx": "run_onnx.py", ".stablehlo": "run_stablehlo.py"}
# The parent's devices, precision and flags are not those of a deployed process.
_KEPT = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE")


class ExportError(RuntimeError):
  """An exported file cannot be loaded, or does not compute what the student does."""


class Ran(NamedTuple):
  """What a process made of an exported file.

  Attributes:
    logits: ``[N, ..., K]``.
    runtime: what ran it, with its version.
    platform: on what.
    latency_ms: ``{"median", "p95", "calls"}`` of one call, from NumPy arrays to a NumPy array in
      either runtime (with JAX, what goes to the device and comes back), or None where it was not
      timed.
  """

  logits: np.ndarray
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
    path: ``.onnx``, run by ONNX Runtime without JAX, or ``.stablehlo``, run by JAX.
    inputs: arrays ``[N, ...]`` by name, in the program's order.
    weights: a safetensors file that is the program's first argument.
    batch_size: how many examples at once; the last batch is padded.
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
    ValueError: the suffix is neither.
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
  environment = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("JAX_", "XLA_FLAGS")) or name.startswith(_KEPT)
  }
  environment |= {"JAX_PLATFORMS": platform, "JAX_ENABLE_X64": str(int(wide))}
  with tempfile.TemporaryDirectory() as folder:
    given, out = pathlib.Path(folder, "inputs.npz"), pathlib.Path(folder, "out")
    np.savez(given, **arrays)
    command = [sys.executable, "-P", str(_SCRIPTS / _PROGRAMS[file.suffix]), str(file)]
    command += [str(given), str(out), "--batch-size", str(batch_size), "--calls", str(calls)]
    command += ["--latency-batch", str(latency_batch), "--seconds", str(seconds)]
    command += ["--weights", str(pathlib.Path(weights).absolute())] if weights else []
    _wait(command, environment, time_limit, file)
    about = json.loads(out.with_name("out.json").read_text())
    logits = np.load(out.with_name("out.npy"), allow_pickle=False)
  if about["loaded"]:
    raise ExportError(f"{file} was run in a process that imported {about['loaded']}.")
  times = about["times"]
  latency = None
  if times:
    median, p95 = np.percentile(times, [50, 95])
    latency = {"median": float(median), "p95": float(p95), "calls": float(len(times))}
  return Ran(logits, about["runtime"], about["platform"], latency)


def _wait(command: list[str], environment: dict[str, str], limit: float, file: Any) -> None:
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


def top1(logits: np.ndarray, labels: np.ndarray | None) -> float | None:
  """The share of right answers; None without labels.

  >>> top1(np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([1, 1]))
  0.5
  """
  return None if labels is None else float(np.mean(logits.argmax(-1) == labels))


def compare_logits(
  student: np.ndarray, logits: np.ndarray, tolerance: float, *, within: bool = True
) -> dict[str, Any]:
  """Compares logits with the student's.

  Args:
    student: ``[N, ..., K]``.
    logits: the same of the exported file.
    tolerance: how far apart two logits may be, and above which margin (largest less second largest
      of the student's logits) the top-1 must be the same.
    within: whether that is asked; else only that the logits are finite.

  Returns:
    ``agreement`` (share of the same top-1), ``largest_difference``, ``decided`` (how many have a
    margin above the tolerance), and ``problem``, None where all is well.

  >>> student = np.array([[0.0, 1.0], [0.5, 0.5001]])
  >>> compare_logits(student, student[:, ::-1], 1e-3)["problem"]
  'its logits differ from the student by up to 1, and 0.001 is the tolerance'
  """
  if logits.shape != student.shape:
    shapes = f"{logits.shape}, and the student's {student.shape}"
    return _result(0.0, float("nan"), 0, f"its logits have the shape {shapes}")
  if not np.all(np.isfinite(logits[np.isfinite(student)])):
    return _result(0.0, float("nan"), 0, "its logits are not finite where the student's are")
  wide = student.astype(np.float64)
  difference = float(np.nanmax(np.abs(logits.astype(np.float64) - wide), initial=0.0))
  ordered = np.sort(wide, axis=-1)
  margin = ordered[..., -1] - ordered[..., -2] if wide.shape[-1] > 1 else np.zeros(wide.shape[:-1])
  same = logits.argmax(-1) == student.argmax(-1)
  decided = margin > tolerance
  wrong = int(np.sum(decided & ~same))
  problem = None
  if within and difference > tolerance:
    problem = (
      f"its logits differ from the student by up to {difference:.3g}, and {tolerance:.3g} is the "
      "tolerance"
    )
  elif within and wrong:
    problem = f"its top-1 is another than the student's on {wrong} examples with a clear margin"
  return _result(float(same.mean()), difference, int(decided.sum()), problem)


def _result(
  agreement: float, difference: float, decided: int, problem: str | None
) -> dict[str, Any]:
  return {
    "agreement": agreement,
    "largest_difference": difference,
    "decided": decided,
    "problem": problem,
  }
