"""What a program costs before it runs, and how it is compiled.

`activations`, `available`, `limit_of` and `that_fit` are about memory, measured and not guessed.
`quick`, `brief`, `long`, `by_work` and `for_work` are options of the compiler, and `compares` what
the first of them gets wrong. What only looks at numbers compiles nothing where `host_view` shows
them. A `BackgroundCompiled` function is compiled while Python traces what comes next; a
`CompiledOnce` one likewise, and not at all where the same program was compiled before. A `Deferred`
array is computed when it is first needed. `placed` brings what a program reads to where the rest of
it lies.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import math
import os
import pathlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

__all__ = [
  "BackgroundCompiled",
  "CompiledOnce",
  "Deferred",
  "activations",
  "available",
  "brief",
  "by_work",
  "compares",
  "computed",
  "convolves",
  "for_work",
  "host_view",
  "limit_of",
  "long",
  "placed",
  "quarter",
  "quick",
  "quickly",
  "shapes_of",
  "that_fit",
  "weighed",
]

# What is left to everything else: the compiler's own figure is exact for a program, not for what
# lies beside it.
_SHARE = 0.8
# Bytes that a program computes. On a core of an AMD EPYC `quick` costs 0.05 to 0.4 ns more for each
# of them than `brief`, and compiles the digits' networks in 0.2 to 0.3 s less; `brief` costs 0.005
# to 0.02 ns more than `long`, and compiles their sweeps in 0.3 to 0.7 s less.
_LITTLE = 2**28
_MUCH = 2**34
# XLA hands products, sums and convolutions to a library (YNNPACK) where it is built with one. On
# two Intel Xeon cores its own code takes a fifth less for a ResNet's step, a quarter less for that
# of the digits' networks, and as long for a transformer's.
_OWN = {"xla_cpu_experimental_ynn_fusion_type": ""}
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
    runs, or once where that is not known.

  >>> activations(lambda x: 2 * (x + 1), jax.ShapeDtypeStruct((10,), "float32"))
  80
  """
  return _computed_bytes(jax.make_jaxpr(function)(*args).jaxpr)


def _computed_bytes(jaxpr: Any) -> int:
  total = 0
  for equation in jaxpr.eqns:
    bodies = list(_bodies(equation))
    total += sum(map(_computed_bytes, bodies)) * equation.params.get("length", 1)
    if not bodies:
      total += sum(v.aval.size * v.aval.dtype.itemsize for v in equation.outvars)
  return total


def _bodies(equation: Any) -> Iterator[Any]:
  """The jaxprs inside an operation: branches, the body of a loop, what is called."""
  for value in jax.tree.leaves(list(equation.params.values())):  # branches come as a tuple
    inner = getattr(value, "jaxpr", value)
    if hasattr(inner, "eqns"):
      yield inner


def compares(function: Callable[..., Any], *args: Any) -> bool:
  """Whether a function asks of floats that it computed whether they are equal.

  The gradients of `jax.numpy.max` and `jax.numpy.maximum` do: the entry that equals the maximum
  gets it. XLA may compute the entry once more where it compares, and at its optimisation level 0
  rounds it otherwise there, so that no entry is equal, and the gradient 0 or NaN. At level 1 it
  does not.

  Args:
    function: traced, not run.
    *args: its arguments, or their shapes.

  >>> compares(jax.grad(lambda x: (2 * x).max()), jax.ShapeDtypeStruct((3,), "float32"))
  True
  >>> compares(lambda x: x == 0.0, jax.ShapeDtypeStruct((3,), "float32"))
  False
  """
  return _compares(jax.make_jaxpr(function)(*args).jaxpr)


def _compares(jaxpr: Any) -> bool:
  def of_floats(equation: Any) -> bool:
    told = equation.invars
    return equation.primitive.name in ("eq", "ne") and all(
      hasattr(v.aval, "dtype")
      and jax.dtypes.issubdtype(v.aval.dtype, np.inexact)
      and not hasattr(v, "val")  # a number of the program's text
      for v in told
    )

  return any(
    of_floats(equation) or any(map(_compares, _bodies(equation))) for equation in jaxpr.eqns
  )


def convolves(function: Callable[..., Any], *args: Any) -> bool:
  """Whether a function has ``lax`` convolutions, which XLA computes slowly in a CPU's loop.

  Args:
    function: traced, not run.
    *args: its arguments, or their shapes.
  """

  def found(jaxpr: Any) -> bool:
    return any(
      equation.primitive.name == "conv_general_dilated" or any(map(found, _bodies(equation)))
      for equation in jaxpr.eqns
    )

  return found(jax.make_jaxpr(function)(*args).jaxpr)


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


def shapes_of(leaves: Any) -> Any:
  """Shapes and dtypes of arrays, without their devices; numbers have those that JAX gives them.

  >>> shapes_of({"scale": 2.0})
  {'scale': ShapeDtypeStruct(shape=(), dtype=float32)}
  """
  known = jax.eval_shape(lambda tree: tree, leaves)
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), known)


def limit_of(devices: Sequence[jax.Device]) -> int | None:
  """The memory that each of these devices has, in bytes; None where one of them does not say.

  Args:
    devices: those of a mesh; of a machine that is not there, which say nothing, too.
  """
  try:
    stats = [device.memory_stats() or {} for device in devices]
  except jax.errors.JaxRuntimeError:
    return None
  known = [int(one["bytes_limit"]) for one in stats if "bytes_limit" in one]
  return min(known) if known and len(known) == len(stats) else None


def _of_machine() -> int:
  table = pathlib.Path("/proc/meminfo")
  if table.is_file():
    lines = dict(line.split(":", 1) for line in table.read_text().splitlines())
    if "MemAvailable" in lines:
      return 1024 * int(lines["MemAvailable"].split()[0])
  # Other systems tell no such figure through the standard library: an ordinary laptop's half.
  return 4 * 2**30


def quarter(where: str) -> int:
  """A quarter of the memory there is, in bytes: the same whatever else is in it at the moment.

  Args:
    where: ``"device"`` or ``"host"``; a device without memory of its own has the host's.
  """
  stats = jax.local_devices()[0].memory_stats() if where == "device" else None
  if stats and "bytes_limit" in stats:
    return int(stats["bytes_limit"] // 4)
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


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
  each, exact = weighed(function, *args)
  return for_work(each * calls, exact=exact)


def weighed(function: Callable[..., Any], *args: Any) -> tuple[int, bool]:
  """What `for_work` asks of one call: its `activations`, and whether it `compares`; of one trace.

  Args:
    function: traced, not run.
    *args: its arguments, or their shapes.
  """
  jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  return _computed_bytes(jaxpr), _compares(jaxpr)


def for_work(work: float, *, exact: bool) -> dict[str, Any] | None:
  """Compiler options for a program that computes so many bytes in all its calls.

  Args:
    work: from `activations`.
    exact: whether the program `compares` what it computes, for which `quick` is no good.

  Returns:
    Those of ``jax.jit`` on a CPU; None elsewhere.
  """
  return (brief() if exact else quick()) if work < _LITTLE else brief() if work < _MUCH else long()


def host_view(leaf: Any) -> np.ndarray | None:
  """An array's memory as NumPy sees it, where that is the host's; None where it is a device's.

  None too of an array that is traced, which has no memory yet.

  What looks at every number of a tree does so here without a compilation, and on an accelerator
  without a copy to the host.

  Args:
    leaf: NumPy's array, or JAX's; a number counts as an array.
  """
  if not isinstance(leaf, jax.Array):
    return np.asarray(leaf)
  if isinstance(leaf, jax.core.Tracer):
    return None
  whole = leaf.is_fully_addressable and (leaf.is_fully_replicated or len(leaf.devices()) == 1)
  on_host = all(device.platform == "cpu" for device in leaf.devices())
  numbers = not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  return np.asarray(leaf) if whole and on_host and numbers else None


def placed(tree: Any, like: Any) -> Any:
  """The tree on the devices of another one, which a program reads together with it.

  ``jax.jit`` moves what is committed to no device, and refuses what is committed to another one.

  Args:
    tree: arrays. What lies elsewhere is copied, to each of several devices; what is traced or lies
      on the host stays.
    like: arrays, or their shapes and shardings. Where they lie in several places, that of the most
      devices is meant; where in none, nothing is moved.
  """
  found = [_home(leaf) for leaf in jax.tree.leaves(like)]
  homes = [home for home in found if home is not None]
  if not homes:
    return tree
  home = max(homes, key=lambda one: len(one.device_set))

  def put(leaf: Any) -> Any:
    lies = _home(leaf)
    away = lies is not None and lies.device_set != home.device_set
    return jax.device_put(leaf, home) if away else leaf

  return jax.tree.map(put, tree)


def _home(leaf: Any) -> Sharding | None:
  """Where an array is committed to, whole on each device; None where it is not, or none can say."""
  traced = isinstance(leaf, jax.core.Tracer) or not getattr(leaf, "committed", True)
  over = None if traced else getattr(leaf, "sharding", None)
  if not isinstance(over, Sharding):
    return None
  if len(over.device_set) == 1:
    return SingleDeviceSharding(*over.device_set)
  mesh = over.mesh if isinstance(over, NamedSharding) else None
  return NamedSharding(mesh, PartitionSpec()) if isinstance(mesh, Mesh) else None


def quick() -> dict[str, Any] | None:
  """Compiler options for a program that costs more to compile than to run, and no `compares`."""
  return _on_cpu(_QUICK)


def quickly(function: Callable[..., Any]) -> Callable[..., Any]:
  """A function under ``jax.jit`` with `quick`; with `brief` where the program `compares`."""
  fast: Any = jax.jit(function, compiler_options=quick())
  exact: Any = jax.jit(function, compiler_options=brief())

  # `jax.jit` keeps what it traced of arguments like these, which is then looked through once.
  known = functools.lru_cache(maxsize=4)(_compares)

  def call(*args: Any) -> Any:
    return (exact if known(fast.trace(*args).jaxpr.jaxpr) else fast)(*args)

  return call


def brief() -> dict[str, Any] | None:
  """Compiler options for a program that takes about as long to compile as to run."""
  return _on_cpu({"xla_backend_optimization_level": 1, "xla_cpu_use_fusion_emitters": False})


def long() -> dict[str, Any] | None:
  """Compiler options for a program that runs far longer than it compiles.

  A third less to compile than by default, and as fast.
  """
  return _on_cpu({"xla_backend_optimization_level": 1})


def _on_cpu(options: dict[str, Any]) -> dict[str, Any] | None:
  """The options that this compiler knows, and `_OWN`."""
  if jax.default_backend() != "cpu":
    return None
  return {name: value for name, value in (_OWN | options).items() if name in _known()}


@functools.cache
def _known() -> frozenset[str]:
  """Which of `_OWN` and `_QUICK`, all that are used, there are: they come and go with versions."""
  every = _OWN | _QUICK

  def accepted(options: dict[str, Any]) -> bool:
    try:
      jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
      return False
    return True

  if accepted(every):
    return frozenset(every)
  return frozenset(name for name, value in every.items() if accepted({name: value}))


class BackgroundCompiled:
  """A jitted function that is compiled while Python goes on."""

  def __init__(self, function: Callable[..., Any]) -> None:
    """Nothing is compiled yet.

    Args:
      function: from ``jax.jit``.
    """
    self.function: Any = function
    self.pending: concurrent.futures.Future[Any] | None = None

  def compile(self, *args: Any) -> None:
    """Traces the function here, and has it compiled in a thread of its own.

    Tracing stays in the caller's thread, where its settings are (``jax.enable_x64`` and the like
    are of a thread).

    Args:
      *args: arguments, or their shapes, dtypes and shardings.
    """
    self.pending = _submitted(self.function.lower(*args), None)

  def ready(self) -> Any:
    """The function from ``jax.jit``, once it is compiled."""
    if self.pending is not None:
      self.pending.result()
    return self.function

  def __call__(self, *args: Any) -> Any:
    """Calls the function, once it is compiled.

    ``jax.jit`` keeps what it lowered together with its executable: arguments like those that it was
    compiled for compile nothing more, and others are compiled as ever.
    """
    return self.ready()(*args)


class CompiledOnce:
  """A function that is compiled while Python goes on, once for all programs that are the same.

  Two functions are the same program where JAX lowers them to the same text: a second fit of the
  same network and objective from other variables is traced, and not compiled. What JAX compiles is
  a function of lists of leaves, so that trees with other static parts may share it.
  """

  def __init__(
    self,
    function: Callable[..., Any],
    jit: Callable[..., Any] | None = None,
    *,
    shared: bool = True,
  ) -> None:
    """Nothing is compiled yet.

    Args:
      function: of trees of arrays.
      jit: compiles it, by ``jax.jit``; with an option that drops no argument, since the text of a
        program does not say which one was dropped.
      shared: whether programs that are the same are compiled once.
    """
    self._function, self._shared = function, shared
    self._trees: list[Any] = []
    self._where: list[Any] = []
    self._result: Any = None
    jit = functools.partial(jax.jit, keep_unused=True) if jit is None else jit

    def of_leaves(*leaves: list[Any]) -> list[Any]:
      trees = zip(self._trees, leaves, strict=True)
      made = self._function(*(jax.tree.unflatten(tree, mine) for tree, mine in trees))
      self._result = jax.tree.structure(made)
      # The members of a tuple stay apart, so that it can be said of each where it is to lie.
      return [*map(jax.tree.leaves, made)] if type(made) is tuple else jax.tree.leaves(made)

    of_leaves.__name__ = getattr(function, "__name__", "program")  # as profiles show it
    self._jitted = jit(of_leaves)
    self._stage: Any = None
    self._pending: concurrent.futures.Future[Any] | None = None

  @property
  def begun(self) -> bool:
    """Whether it is compiled, or about to be."""
    return self._pending is not None

  def trace(self, *args: Any) -> None:
    """Traces the function, so that what does not fit says so.

    Args:
      *args: arguments, or their shapes, dtypes and shardings.
    """
    leaves, self._trees = map(list, zip(*map(jax.tree.flatten, args), strict=True))
    self._where = [_devices_of(leaf) for leaf in jax.tree.leaves(leaves)]
    # pmap can lower, and has no trace.
    stage = getattr(self._jitted, "trace", self._jitted.lower)
    self._stage = stage(*leaves)

  def lower(self, platform: str, *args: Any) -> None:
    """Traces the function, and lowers it for a platform whose compiler need not be here.

    Args:
      platform: ``"cuda"``, ``"tpu"``, as JAX names them.
      *args: arguments, or their shapes, dtypes and shardings.
    """
    self.trace(*args)
    stage, self._stage = self._stage, None
    stage.lower(lowering_platforms=(platform,))

  def compile(
    self, *args: Any, options: dict[str, Any] | None = None, calls: int | None = None
  ) -> None:
    """Traces the function here, if that has not been done, and compiles it in a thread of its own.

    Tracing stays in the caller's thread, where its settings are (``jax.enable_x64`` and the like
    are of a thread).

    Args:
      *args: arguments, or their shapes, dtypes and shardings.
      options: of the compiler.
      calls: how often it will be called, by which the options are chosen in place of ``options``,
        see `by_work`.
    """
    if self._stage is None:
      self.trace(*args)
    stage, self._stage = self._stage, None
    if hasattr(stage, "lower"):
      jaxpr = stage.jaxpr.jaxpr
      exact = _compares(jaxpr)
      if calls is not None:
        options = for_work(_computed_bytes(jaxpr) * calls, exact=exact)
      elif exact and options == quick():
        options = brief()
      stage = stage.lower()
    text = stage.as_text() if self._shared else "callback"
    # What calls back into Python has a function of its own behind the same text; and constants that
    # are arguments are not in it.
    hidden = getattr(jax.config, "jax_use_simplified_jaxpr_constants", False)
    if "callback" in text or hidden:
      self._pending = _submitted(stage, options)
      return
    digest = hashlib.sha256(text.encode()).hexdigest()
    self._pending = _PROGRAMS.get((digest, repr(options), repr(self._where)), stage, options)

  def compiled(self) -> Any:
    """What `compile` made: ``jax.stages.Compiled``, of lists of leaves; waits for it."""
    assert self._pending is not None
    return self._pending.result()

  def __call__(self, *args: Any) -> Any:
    """Calls the function, once it is compiled.

    Args:
      *args: arguments of the shapes, dtypes and shardings that it was compiled for; of the first
        call, where it was not.
    """
    if not self.begun:
      self.compile(*args)
    leaves = [jax.tree.leaves(arg) for arg in args]
    return jax.tree.unflatten(self._result, jax.tree.leaves(self.compiled()(*leaves)))


def _devices_of(leaf: Any) -> Any:
  """On which devices a leaf lies, in the order of its mesh; the text of a program does not say."""
  sharding = getattr(leaf, "sharding", None)
  if sharding is None:
    return getattr(jax.config, "jax_default_device", None)
  mesh = getattr(sharding, "mesh", None)
  devices = sharding.device_set if mesh is None else mesh.devices.flat
  return [(device.platform, device.id) for device in devices]


def _submitted(lowered: Any, options: dict[str, Any] | None) -> concurrent.futures.Future[Any]:
  pool = concurrent.futures.ThreadPoolExecutor(1)
  pending = pool.submit(lowered.compile, compiler_options=options)
  pool.shutdown(wait=False)
  return pending


class _Programs:
  """The programs of this process that were compiled last, as ``jax.jit`` keeps its own."""

  def __init__(self, most: int) -> None:
    self._most = most
    self._lock = threading.Lock()
    self._found: dict[Any, concurrent.futures.Future[Any]] = {}

  def get(
    self, key: Any, lowered: Any, options: dict[str, Any] | None
  ) -> concurrent.futures.Future[Any]:
    """The program of this key, compiled or on its way; the one used last is dropped last."""
    with self._lock:
      pending = self._found.pop(key, None)
      if pending is None or (pending.done() and pending.exception() is not None):
        pending = _submitted(lowered, options)
      self._found[key] = pending
      while len(self._found) > self._most:
        del self._found[next(iter(self._found))]
      return pending


# An executable of a large network holds some megabytes.
_PROGRAMS = _Programs(most=64)


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
