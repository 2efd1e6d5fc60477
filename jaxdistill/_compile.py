"""What a program costs before it runs, and how it is compiled.

`activations`, `available` and `that_fit` are about memory, measured and not guessed. `quick`,
`brief`, `long`, `by_work` and `for_work` are options of the compiler. What only looks at numbers
compiles nothing where `host_view` shows them. A `BackgroundCompiled` function is
compiled while Python traces what comes next, and a `Deferred` array is computed when it is first
needed.
"""

from __future__ import annotations

import concurrent.futures
import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

__all__ = [
  "BackgroundCompiled",
  "Deferred",
  "activations",
  "available",
  "brief",
  "by_work",
  "computed",
  "for_work",
  "host_view",
  "long",
  "quick",
  "that_fit",
]

# What is left to everything else: the compiler's own figure is exact for a program, not for what
# lies beside it.
_SHARE = 0.8
# Bytes that a program computes. On a core of an AMD EPYC `quick` costs 0.05 to 0.4 ns more for each
# of them than `brief`, and compiles the digits' networks in 0.2 to 0.3 s less; `brief` costs 0.005
# to 0.02 ns more than `long`, and compiles their sweeps in 0.3 to 0.7 s less.
_LITTLE = 2**28
_MUCH = 2**34
_QUICK = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
  "xla_cpu_use_fusion_emitters": False,
  "xla_cpu_parallel_codegen_split_count": 1,
}


def activations(function: Callable[..., Any], *args: Any) -> int:
  """The bytes of everything that a function computes on the way, counted in its jaxpr.

  Args:
    function: traced, not run.
    *args: its arguments, or their shapes.

  Returns:
    The sum over all operations of what each puts out; all branches count, and a loop as often as it
    runs where that is known.

  >>> activations(lambda x: 2 * (x + 1), jax.ShapeDtypeStruct((10,), "float32"))
  80
  """

  def count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
      params = jax.tree.leaves(list(equation.params.values()))  # branches come as a tuple
      inner = [getattr(value, "jaxpr", value) for value in params]
      bodies = [body for body in inner if hasattr(body, "eqns")]
      total += sum(count(body) for body in bodies) * equation.params.get("length", 1)
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


def by_work(function: Callable[..., Any], *args: Any, calls: int) -> dict[str, Any] | None:
  """Compiler options by what a program computes in all its calls: `quick`, `brief` or `long`.

  Args:
    function: traced here, which ``jax.jit`` then need not do again.
    *args: its arguments, or their shapes.
    calls: how often it will be called.

  Returns:
    Those of ``jax.jit`` on a CPU; None elsewhere.
  """
  return for_work(activations(function, *args) * calls)


def for_work(work: float) -> dict[str, Any] | None:
  """Compiler options for a program that computes so many bytes in all its calls.

  Args:
    work: from `activations`.

  Returns:
    Those of ``jax.jit`` on a CPU; None elsewhere.
  """
  return quick() if work < _LITTLE else brief() if work < _MUCH else long()


def host_view(leaf: Any) -> np.ndarray | None:
  """An array's memory as NumPy sees it, where that is the host's; None where it is a device's.

  What looks at every number of a tree does so here without a compilation, and on an accelerator
  without a copy to the host.

  Args:
    leaf: NumPy's array, or JAX's; a number counts as an array.
  """
  if not isinstance(leaf, jax.Array):
    return np.asarray(leaf)
  whole = leaf.is_fully_addressable and (leaf.is_fully_replicated or len(leaf.devices()) == 1)
  on_host = all(device.platform == "cpu" for device in leaf.devices())
  numbers = not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  return np.asarray(leaf) if whole and on_host and numbers else None


def quick() -> dict[str, Any] | None:
  """Compiler options for a program that costs more to compile than to run."""
  return _on_cpu(_QUICK)


def brief() -> dict[str, Any] | None:
  """Compiler options for a program that takes about as long to compile as to run."""
  return _on_cpu({"xla_backend_optimization_level": 1, "xla_cpu_use_fusion_emitters": False})


def long() -> dict[str, Any] | None:
  """Compiler options for a program that runs far longer than it compiles.

  A third less to compile than by default, and as fast.
  """
  return _on_cpu({"xla_backend_optimization_level": 1})


def _on_cpu(options: dict[str, Any]) -> dict[str, Any] | None:
  """The options that this compiler knows."""
  if jax.default_backend() != "cpu":
    return None
  return {name: value for name, value in options.items() if name in _known()}


@functools.cache
def _known() -> frozenset[str]:
  """Which of `_QUICK`, all that are used, there are: they come and go with the versions."""

  def accepted(options: dict[str, Any]) -> bool:
    try:
      jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
      return False
    return True

  if accepted(_QUICK):
    return frozenset(_QUICK)
  return frozenset(name for name, value in _QUICK.items() if accepted({name: value}))


class BackgroundCompiled:
  """A jitted function that is compiled while Python goes on."""

  def __init__(self, function: Callable[..., Any]) -> None:
    """Nothing is compiled yet.

    Args:
      function: from ``jax.jit``.
    """
    self.function: Any = function
    self.pending: concurrent.futures.Future[Any] | None = None

  def compile(self, *args: Any, options: dict[str, Any] | None = None) -> None:
    """Traces the function here, and has it compiled in a thread of its own.

    Tracing stays in the caller's thread, where its settings are (``jax.enable_x64`` and the like
    are of a thread).

    Args:
      *args: arguments, or their shapes, dtypes and shardings.
      options: of the compiler, for what `compiled` gives. A call has none of them, and compiles.
    """
    lowered = self.function.lower(*args)
    pool = concurrent.futures.ThreadPoolExecutor(1)
    self.pending = pool.submit(lowered.compile, compiler_options=options)
    pool.shutdown(wait=False)

  def compiled(self) -> Any:
    """What `compile` made: ``jax.stages.Compiled``; waits for it."""
    assert self.pending is not None
    return self.pending.result()

  def __call__(self, *args: Any) -> Any:
    """Calls the function, once it is compiled.

    ``jax.jit`` keeps what it lowered together with its executable: arguments like those that it was
    compiled for, without ``options``, compile nothing more, and others are compiled as ever.
    """
    if self.pending is not None:
      self.pending.result()
    return self.function(*args)


class Deferred(jax.ShapeDtypeStruct):
  """An array's shape and dtype, which is all that tracing and compiling take, and how to get it."""

  __slots__ = ["make"]
  # Shapes that are the same are equal; arrays that are still to come are not.
  __eq__ = object.__eq__
  __hash__ = object.__hash__

  def __init__(self, shape: Sequence[int], dtype: Any, make: Callable[[], jax.Array]) -> None:
    """An array that is not there yet.

    Args:
      shape: its shape.
      dtype: its dtype.
      make: computes it; may be called several times, and is to give the same array.
    """
    super().__init__(tuple(shape), dtype)
    self.make = make


def computed(tree: Any) -> Any:
  """The tree with its pending arrays computed.

  Args:
    tree: any tree.

  Returns:
    The same, without a `Deferred`.
  """
  return jax.tree.map(lambda leaf: leaf.make() if isinstance(leaf, Deferred) else leaf, tree)
