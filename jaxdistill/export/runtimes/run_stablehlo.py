"""Runs an exported StableHLO program with JAX alone: ``run_stablehlo.py FILE INPUTS OUTPUT``.

INPUTS is a ``.npz`` with an array ``[N, ...]`` for each of the program's inputs, in order; with its
outputs too (``logits``), as in ``example.npz``, the difference from them is printed. OUTPUT.npz
receives the outputs ``[N, ...]`` by name, OUTPUT.json what ran them and how many ms a call lasts,
from NumPy arrays to NumPy arrays: what goes to the device and comes back is part of it, weights are
there before. What the outputs are called, ``FILE.json`` beside the file says. With ``--weights
FILE.safetensors`` the program takes these as its first argument, by name. This file needs JAX,
NumPy and flatbuffers (and safetensors for weights); copy it, or its `load`, to where the program is
deployed.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__ = ["about", "load", "main", "run"]


def about(path: str) -> dict[str, Any]:
  """What ``path + ".json"`` beside a file says of it; empty where it is not there."""
  if not os.path.isfile(path + ".json"):
    return {}
  with open(path + ".json") as file:
    said: dict[str, Any] = json.load(file)
  return said


def load(path: str) -> Any:
  """The program of a file, as a function of a batch of any size.

  Args:
    path: the file; ``path + ".json"`` beside it says which JAX wrote it.

  Returns:
    The ``jax.export.Exported``; its ``call`` is the function.

  Raises:
    SystemExit: it cannot be read, with the reason.
  """
  import jax
  import jax.export

  said = about(path)
  try:
    with open(path, "rb") as file:
      exported = jax.export.deserialize(bytearray(file.read()))
    low = jax.export.minimum_supported_calling_convention_version
    high = jax.export.maximum_supported_calling_convention_version
    if not low <= exported.calling_convention_version <= high:
      raise ValueError(f"calling convention {exported.calling_convention_version}")
    exported.mlir_module()  # decoded here; JAX would fail at the first call only
    return exported
  except ImportError as error:
    sys.exit(f"to read {path}: pip install flatbuffers ({error})")
  except Exception as error:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    made = said.get("jax")
    by = f"it was made by jax {made} and needs at least {said.get('least_jax')}" if made else ""
    sys.exit(
      f"{path} cannot be read by jax {jax.__version__}: "
      f"{by or 'nothing beside it says which jax made it'}, or it is damaged ({reason})"
    )


def run(
  call: Callable[..., Any], inputs: Sequence[np.ndarray], batch_size: int
) -> list[np.ndarray]:
  """The outputs of N examples, ``batch_size`` at once; the last batch is padded.

  Args:
    call: ``(*inputs of a batch) -> logits``, or a list or a dict of outputs.
    inputs: arrays ``[N, ...]``.
    batch_size: how many at once.

  Returns:
    ``[N, ..., K]`` each; of a dict, in the order of its sorted keys.
  """
  import jax

  size, found = len(inputs[0]), []
  for begin in range(0, size, batch_size):
    rows = np.arange(begin, begin + batch_size)
    rows = np.where(rows < size, rows, 0)
    made = call(*(array[rows] for array in inputs))
    found.append([np.asarray(leaf) for leaf in jax.tree.leaves(made)])
  return [np.concatenate(parts)[:size] for parts in zip(*found, strict=True)]


def main(args: Sequence[str] | None = None) -> None:
  """The command; see the module."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("file")
  parser.add_argument("inputs")
  parser.add_argument("output")
  parser.add_argument("--weights", help="a safetensors file, the program's first argument")
  parser.add_argument("--batch-size", type=int, default=256, help="to compute the logits with")
  parser.add_argument("--latency-batch", type=int, default=1, help="to time a call with")
  parser.add_argument("--calls", type=int, default=100, help="how many to time; 0 for none")
  parser.add_argument("--seconds", type=float, default=3.0, help="at most so long")
  options = parser.parse_args(args)
  import jax

  exported = load(options.file)
  here = jax.export.default_export_platform()
  if here not in exported.platforms:
    sys.exit(f"{options.file} is for {', '.join(exported.platforms)}, and this is {here}")
  with np.load(options.inputs, allow_pickle=False) as arrays:
    names = about(options.file).get("outputs", ["logits"])
    inputs = [arrays[name] for name in arrays.files if name not in names]
    student = {name: arrays[name] for name in names if name in arrays.files}
  before = []
  if options.weights:
    from safetensors.numpy import load_file

    try:
      before = [jax.device_put(load_file(options.weights))]
    except Exception as error:
      sys.exit(f"{options.weights} is truncated, or no safetensors ({str(error)[:200]})")
  structure = exported.in_tree
  if structure.num_leaves != len(jax.tree.leaves(before)) + len(inputs):
    sys.exit(f"{options.file} takes {structure}, which {options.inputs} and --weights do not give")

  def program(*leaves: Any) -> Any:
    args, keywords = jax.tree.unflatten(structure, [*jax.tree.leaves(before), *leaves])
    return exported.call(*args, **keywords)

  call = jax.jit(program)
  size = len(inputs[0])
  outputs = dict(zip(names, run(call, inputs, min(options.batch_size, size)), strict=True))
  some = [array[np.arange(options.latency_batch) % size] for array in inputs]
  times = []
  begin = time.perf_counter()
  for index in range(options.calls + 3 if options.calls else 0):  # three to compile and warm up
    start = time.perf_counter()
    jax.device_get(call(*some))  # to NumPy and from it, as ONNX Runtime is timed
    if index >= 3:
      times.append(1000 * (time.perf_counter() - start))
    if times and time.perf_counter() - begin > options.seconds:
      break
  for name, array in student.items():
    print(
      f"largest difference from the student's {name}: {np.abs(outputs[name] - array).max():.3g}"
    )
  np.savez(options.output + ".npz", **outputs)
  with open(options.output + ".json", "w") as file:
    loaded = [name for name in ("flax", "jaxdistill") if name in sys.modules]
    json.dump(
      {"runtime": f"jax {jax.__version__}", "times": times, "loaded": loaded, "platform": here},
      file,
    )


if __name__ == "__main__":
  main()
