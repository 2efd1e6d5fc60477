"""What a program costs before it runs: its memory, measured and not guessed; its compilation."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

__all__ = ["activations", "available", "brief", "quick", "that_fit"]

# What is left to everything else: the compiler's own figure is exact for a program, not for what
# lies beside it.
_SHARE = 0.8


def activations(function: Callable[..., Any], *args: Any) -> int:
  """The bytes of everything that a function computes on the way, counted in its jaxpr.

  Args:
    function: traced, not run.
    *args: its arguments, or their shapes.

  Returns:
    The sum over all operations of what each puts out.

  >>> activations(lambda x: 2 * (x + 1), jax.ShapeDtypeStruct((10,), "float32"))
  80
  """

  def count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
      inner = [getattr(value, "jaxpr", value) for value in equation.params.values()]
      bodies = [body for body in inner if hasattr(body, "eqns")]
      total += sum(count(body) for body in bodies)
      if not bodies:
        total += sum(v.aval.size * v.aval.dtype.itemsize for v in equation.outvars)
    return total

  return count(jax.make_jaxpr(function)(*args).jaxpr)


def available(devices: Sequence[jax.Device]) -> int:
  """The memory that a program may take on each of these devices, in bytes.

  A device's own limit less what is in use; on a CPU, what the machine has available, shared out
  among its devices. A fifth is left to others.

  Args:
    devices: those of a mesh.

  Returns:
    Bytes for each device.
  """
  stats = [device.memory_stats() or {} for device in devices]
  if all("bytes_limit" in found for found in stats):
    return int(_SHARE * min(found["bytes_limit"] - found["bytes_in_use"] for found in stats))
  return int(_SHARE * _of_machine() / len(devices))


def _of_machine() -> int:
  table = pathlib.Path("/proc/meminfo")
  if table.is_file():
    lines = dict(line.split(":", 1) for line in table.read_text().splitlines())
    if "MemAvailable" in lines:
      return 1024 * int(lines["MemAvailable"].split()[0])
  # Other systems tell no such figure through the standard library: an ordinary laptop's half.
  return 4 * 2**30


def that_fit(cost: Callable[[int], int], count: int, memory: int, *, multiple: int = 1) -> int:
  """How many of ``count`` points one program can hold.

  All of them, where the program of all needs no more than the memory. Else two small programs, of
  one and of two times ``multiple`` points, give what a point costs and what is there anyway.

  Args:
    cost: points to the bytes that their program needs on a device, from the compiler.
    count: how many points there are.
    memory: bytes on a device.
    multiple: what the number has to be a multiple of: the devices that share the points.

  Returns:
    The number of points, the last ones of which may be there to fill up.

  Raises:
    ValueError: not even ``multiple`` points fit.

  >>> that_fit(lambda points: 100 + 10 * points, count=50, memory=350)
  25
  """
  every = multiple * math.ceil(count / multiple)
  if cost(every) <= memory:
    return every
  one, two = cost(multiple), cost(2 * multiple)
  if one > memory:
    raise ValueError(
      f"one point (its students of all seeds, {multiple} points on as many devices) needs "
      f"{one:,} bytes, and memory is {memory:,}: take fewer seeds, a smaller batch or more memory."
    )
  each = max(two - one, 1)
  most = multiple * (1 + (memory - one) // each)
  chunks = math.ceil(count / most)
  # Chunks of one length are compiled once, and those of about equal length waste least.
  return multiple * math.ceil(math.ceil(count / chunks) / multiple)


def brief() -> dict[str, Any] | None:
  """Compiler options for a program that runs for seconds: a third less to compile, as fast to run.

  Returns:
    Those of ``jax.jit`` on a CPU; None elsewhere.
  """
  return {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None


def quick() -> dict[str, Any] | None:
  """Compiler options for a program that runs a few times, which costs more to compile than to run.

  Returns:
    Those of ``jax.jit`` on a CPU; None elsewhere.
  """
  if jax.default_backend() != "cpu":
    return None
  return {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
