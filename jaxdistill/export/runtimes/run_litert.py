"""Runs an exported LiteRT file in its interpreter, without JAX: ``run_litert.py FILE INPUTS OUT``.

INPUTS is a ``.npz`` with an array ``[N, ...]`` for each of the model's inputs, by name; with its
outputs too (``logits``), as in ``example.npz``, the difference from them is printed. OUT.npz
receives the outputs ``[N, ...]`` by name, OUT.json what ran them and how many ms the
``--latency-batch`` examples last, from NumPy arrays to NumPy arrays. A file takes batches of the
size that it was made for; other numbers of examples are several calls. This file needs NumPy and
ai-edge-litert alone; copy it, or its `run`, to where the model is deployed.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np

__all__ = ["main", "run"]


def run(runner: Any, inputs: Mapping[str, np.ndarray], batch_size: int) -> dict[str, np.ndarray]:
  """The outputs of N examples by name, ``batch_size`` at once; the last batch is padded.

  Args:
    runner: of ``Interpreter(path).get_signature_runner()``.
    inputs: name to array ``[N, ...]``.
    batch_size: that of the file.

  Returns:
    ``{"logits": [N, ..., K]}``, or whatever it puts out.
  """
  size = len(next(iter(inputs.values())))
  found = []
  for begin in range(0, size, batch_size):
    rows = np.arange(begin, begin + batch_size)
    rows = np.where(rows < size, rows, 0)
    found.append(runner(**{name: array[rows] for name, array in inputs.items()}))
  return {name: np.concatenate([made[name] for made in found])[:size] for name in found[0]}


def main(args: Sequence[str] | None = None) -> None:
  """The command; see the module."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("file")
  parser.add_argument("inputs")
  parser.add_argument("output")
  parser.add_argument("--batch-size", type=int, help="not used: the file has its own")
  parser.add_argument("--latency-batch", type=int, default=1, help="how many examples to time")
  parser.add_argument("--calls", type=int, default=100, help="how many to time; 0 for none")
  parser.add_argument("--seconds", type=float, default=3.0, help="at most so long")
  options = parser.parse_args(args)
  try:
    from ai_edge_litert.interpreter import Interpreter
  except ImportError as error:
    sys.exit(f"LiteRT is needed: pip install ai-edge-litert ({error})")
  version = metadata.version("ai-edge-litert")
  try:
    runner = Interpreter(model_path=os.fspath(options.file)).get_signature_runner()
  except Exception as error:
    sys.exit(
      f"{options.file} cannot be loaded by ai-edge-litert {version}: it is truncated, no LiteRT "
      f"file, or needs a newer one ({' '.join(str(error).split())[:300]})"
    )
  with np.load(options.inputs, allow_pickle=False) as arrays:
    inputs = {name: arrays[name] for name in arrays.files}
  named, expected = runner.get_output_details(), runner.get_input_details()
  student = {name: inputs.pop(name) for name in named if name in inputs}
  if sorted(expected) != sorted(inputs):
    sys.exit(f"{options.file} takes {sorted(expected)}, and {options.inputs} has {sorted(inputs)}")
  fixed = int(next(iter(expected.values()))["shape"][0])
  outputs: Any = run(runner, inputs, fixed)
  size = len(next(iter(inputs.values())))
  some = {name: array[np.arange(options.latency_batch) % size] for name, array in inputs.items()}
  times = []
  begin = time.perf_counter()
  for call in range(options.calls + 3 if options.calls else 0):  # three to warm up
    start = time.perf_counter()
    run(runner, some, fixed)
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
    loaded = [name for name in ("jax", "flax", "jaxdistill", "tensorflow") if name in sys.modules]
    about = {"runtime": f"ai-edge-litert {version}", "platform": "cpu"}
    json.dump({**about, "times": times, "loaded": loaded}, file)


if __name__ == "__main__":
  main()
