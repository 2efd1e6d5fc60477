"""Runs an exported ONNX file with ONNX Runtime, without JAX: ``run_onnx.py FILE INPUTS OUTPUT``.

INPUTS is a ``.npz`` with an array ``[N, ...]`` for each of the model's inputs, by name; with its
outputs too (``logits``), as in ``example.npz``, the difference from them is printed. OUTPUT.npz
receives the outputs ``[N, ...]`` by name, OUTPUT.json what ran them and how many ms a call lasts,
from NumPy arrays to NumPy arrays. This file needs NumPy and onnxruntime alone; copy it, or its
`run`, to where the model is deployed.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["main", "run"]


def run(session: Any, inputs: Mapping[str, np.ndarray], batch_size: int) -> dict[str, np.ndarray]:
  """The outputs of N examples by name, ``batch_size`` at once; the last batch is padded.

  Args:
    session: an ``onnxruntime.InferenceSession``.
    inputs: name to array ``[N, ...]``.
    batch_size: how many at once.

  Returns:
    ``{"logits": [N, ..., K]}``, or whatever it puts out.
  """
  size = len(next(iter(inputs.values())))
  found = []
  for begin in range(0, size, batch_size):
    rows = np.arange(begin, begin + batch_size)
    rows = np.where(rows < size, rows, 0)
    found.append(session.run(None, {name: array[rows] for name, array in inputs.items()}))
  names = [one.name for one in session.get_outputs()]
  return {
    name: np.concatenate(parts)[:size]
    for name, parts in zip(names, zip(*found, strict=True), strict=True)
  }


def main(args: Sequence[str] | None = None) -> None:
  """The command; see the module."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("file")
  parser.add_argument("inputs")
  parser.add_argument("output")
  parser.add_argument("--batch-size", type=int, default=256, help="to compute the logits with")
  parser.add_argument("--latency-batch", type=int, default=1, help="to time a call with")
  parser.add_argument("--calls", type=int, default=100, help="how many to time; 0 for none")
  parser.add_argument("--seconds", type=float, default=3.0, help="at most so long")
  options = parser.parse_args(args)
  try:
    import onnxruntime
  except ImportError as error:
    sys.exit(f"ONNX Runtime is needed: pip install onnxruntime ({error})")
  onnxruntime.set_default_logger_severity(3)  # errors; the converter's shapes make it warn
  try:
    session = onnxruntime.InferenceSession(options.file, providers=["CPUExecutionProvider"])
  except Exception as error:
    sys.exit(
      f"{options.file} cannot be loaded by onnxruntime {onnxruntime.__version__}: it is truncated, "
      f"no ONNX, or needs a newer one ({str(error)[:300]})"
    )
  with np.load(options.inputs, allow_pickle=False) as arrays:
    inputs = {name: arrays[name] for name in arrays.files}
  named = [one.name for one in session.get_outputs()]
  student = {name: inputs.pop(name) for name in named if name in inputs}
  expected = [one.name for one in session.get_inputs()]
  if sorted(expected) != sorted(inputs):
    sys.exit(f"{options.file} takes {expected}, and {options.inputs} has {sorted(inputs)}")
  size = len(next(iter(inputs.values())))
  outputs: Any = run(session, inputs, min(options.batch_size, size))
  some = {name: array[np.arange(options.latency_batch) % size] for name, array in inputs.items()}
  times = []
  begin = time.perf_counter()
  for call in range(options.calls + 3 if options.calls else 0):  # three to warm up
    start = time.perf_counter()
    session.run(None, some)
    if call >= 3:
      times.append(1000 * (time.perf_counter() - start))
    if times and time.perf_counter() - begin > options.seconds:
      break
  for name, array in student.items():
    print(
      f"largest difference from the student's {name}: {np.abs(outputs[name] - array).max():.3g}"
    )
  np.savez(options.output + ".npz", **outputs)
  with open(options.output + ".json", "w") as file:
    loaded = [name for name in ("jax", "flax", "jaxdistill") if name in sys.modules]
    json.dump(
      {
        "runtime": f"onnxruntime {onnxruntime.__version__}",
        "times": times,
        "loaded": loaded,
        "platform": "cpu",
      },
      file,
    )


if __name__ == "__main__":
  main()
