"""What a network costs: parameters, bytes, floating-point operations, and time.

`flops` counts by walking the jaxpr, so it needs no device and a loop's body counts as often as it
runs; `xla_flops` is the compiler's own figure, which counts a loop's body once and leaves out what
falls on padding. `latency` and `throughput` measure.
"""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr, Literal

__all__ = [
  "flops",
  "flops_or_none",
  "latency",
  "parameters",
  "size_bytes",
  "throughput",
  "timed",
  "xla_flops",
]

PyTree = Any
# Calls that throughput lets run ahead: enough to hide the host, few enough to keep their outputs.
_IN_FLIGHT = 4
# fmt: off
# These move, reinterpret or cast; XLA mostly fuses them away.
_FREE = frozenset({
  "all_gather", "all_to_all", "axis_index", "bitcast_convert_type", "broadcast_in_dim",
  "concatenate", "convert_element_type", "copy", "device_put", "dynamic_slice",
  "dynamic_update_slice", "gather", "get", "imag", "iota", "name", "optimization_barrier", "pad",
  "pbroadcast", "platform_index", "ppermute", "pvary", "real", "reshape", "rev", "scatter",
  "sharding_constraint", "slice", "split", "squeeze", "stop_gradient", "swap", "transpose",
})
# One operation per element that goes in.
_REDUCTIONS = frozenset({
  "approx_top_k", "argmax", "argmin", "cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum",
  "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum",
  "reduce_xor", "sort", "top_k",
})
# Their cost is in no jaxpr and not one per element: better no number than a wrong one.
_OPAQUE = frozenset({
  "call_exported", "call_hi_primitive", "cholesky", "eig", "eigh", "ffi_call", "fft", "hessenberg",
  "householder_product", "io_callback", "lu", "pallas_call", "pure_callback", "qr",
  "ragged_dot_general", "schur", "svd", "triangular_solve", "tridiagonal", "tridiagonal_solve",
})
# fmt: on


def parameters(variables: PyTree) -> int:
  """Counts parameters: the elements of ``variables["params"]``, or of any other pytree.

  Args:
    variables: a network's variables, whose other collections (``batch_stats``) do not count; a
      sequence of such, for an ensemble; or a pytree of arrays or shapes.

  Returns:
    The number of elements.

  >>> parameters({"params": {"kernel": np.zeros((3, 2))}, "batch_stats": {"mean": np.zeros(2)}})
  6
  """
  if isinstance(variables, list | tuple):
    return sum(parameters(member) for member in variables)
  if isinstance(variables, Mapping) and "params" in variables:
    variables = variables["params"]
  return sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(variables))


def size_bytes(variables: PyTree) -> int:
  """Bytes that all collections take as stored values; int4 takes half a byte.

  Args:
    variables: a pytree of arrays or shapes.

  Returns:
    The number of bytes, each leaf rounded up.

  >>> size_bytes({"params": np.zeros((3, 2), np.float32), "batch_stats": np.zeros(2, np.float16)})
  28
  """
  total = 0
  for leaf in jax.tree.leaves(variables):
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    total += math.ceil(math.prod(np.shape(leaf)) * jax.dtypes.itemsize_bits(dtype) / 8)
  return total


def flops(fn: Callable[..., Any], *args: Any) -> int:
  """Floating-point operations of one call, counted in its jaxpr.

  A multiply-add is 2 (the "MACs" of the literature, doubled). Matrix products and convolutions
  count in full, in any dtype; a convolution's padding counts as data, as in published figures,
  while the holes of a dilated input do not. Everything else counts 1 per output element, per input
  element for reductions, sorts and scatters, and per window element for pooling; integers
  (indices, counters, random bits), moves and casts are free. A scan's body counts times its
  length, of a cond the dearest branch, and a shard_map's body once per shard. A while loop's length
  is unknown, so its body counts ONCE. What no output depends on is left out.

  Args:
    fn: a function of arrays.
    *args: its arguments, as arrays or ``jax.ShapeDtypeStruct``. With a batch of one the result is
      per example.

  Returns:
    The count, for all devices together.

  Raises:
    ValueError: the function holds an operation whose cost cannot be read off, such as a
      matrix decomposition, a Fourier transform or a kernel written by hand.

  >>> flops(lambda x, w: x @ w, np.zeros((2, 3)), np.zeros((3, 4)))
  48
  """
  return _count_whole(jax.make_jaxpr(fn)(*args))


def flops_or_none(fn: Callable[..., Any], *args: Any) -> int | None:
  """`flops`, or None where the function holds an operation whose cost cannot be read off.

  Args:
    fn: a function of arrays.
    *args: its arguments, or their shapes.

  >>> flops_or_none(jax.numpy.linalg.inv, np.eye(2)) is None
  True
  """
  try:
    return flops(fn, *args)
  except ValueError:
    return None


def _count(jaxpr: Any, live: Sequence[bool]) -> int:
  """Counts a jaxpr of which only the outputs marked live are wanted, from the end to the start."""
  jaxpr = _open(jaxpr)
  wanted = {v for v, is_live in zip(jaxpr.outvars, live, strict=True) if is_live and _is_var(v)}
  total = 0
  for equation in reversed(jaxpr.eqns):
    live_outputs = [v in wanted for v in equation.outvars]
    if any(live_outputs) or equation.effects:
      total += _count_equation(equation, live_outputs)
      wanted.update(v for v in equation.invars if _is_var(v))
  return total


def _is_var(atom: Any) -> bool:
  return not isinstance(atom, Literal)


def _count_equation(equation: Any, live: Sequence[bool]) -> int:
  name, params = equation.primitive.name, equation.params
  if name in _OPAQUE:
    raise ValueError(
      f"flops cannot count the operation {name!r}: use xla_flops, or leave it out of fn."
    )
  match name:
    case "dot_general":
      return _count_dot(equation)
    case "conv_general_dilated":
      return _count_conv(equation)
    case "scan":
      return params["length"] * _count_whole(params["jaxpr"])
    case "while":
      return _count_whole(params["cond_jaxpr"]) + _count_whole(params["body_jaxpr"])
    case "cond":
      return max(_count(branch, live) for branch in params["branches"])
    case "shard_map":
      axes = params.get("newly_manual_axes", params["mesh"].axis_names)
      return math.prod(params["mesh"].shape[axis] for axis in axes) * _count(params["jaxpr"], live)
    case "custom_linear_solve":
      return _count_whole(params["jaxprs"].solve)
    case "reduce" | "reduce_window" | "scatter":
      return _count_elements(equation)
  bodies = list(_bodies(params))
  if not bodies or name.startswith("scatter"):
    return _count_elements(equation)
  # jit, remat, custom_jvp, custom_vjp, and whatever else calls a jaxpr once.
  outputs = [len(_open(body).outvars) for body in bodies]
  return sum(
    _count(body, live) if count == len(live) else _count_whole(body)
    for body, count in zip(bodies, outputs, strict=True)
  )


def _count_whole(jaxpr: Any) -> int:
  return _count(jaxpr, [True] * len(_open(jaxpr).outvars))


def _open(jaxpr: Any) -> Any:
  """The bare jaxpr: up to jax 0.10 some are wrapped together with their constants."""
  return getattr(jaxpr, "jaxpr", jaxpr)


def _bodies(params: Mapping[str, Any]) -> Iterator[Any]:
  for value in params.values():
    for item in value if isinstance(value, list | tuple) else [value]:
      if isinstance(_open(item), Jaxpr):
        yield item


def _count_dot(equation: Any) -> int:
  (contracted, _), _ = equation.params["dimension_numbers"]
  left = equation.invars[0].aval.shape
  return 2 * _elements(equation.outvars[0]) * math.prod(left[axis] for axis in contracted)


def _count_conv(equation: Any) -> int:
  params = equation.params
  numbers = params["dimension_numbers"]
  out, kernel = equation.outvars[0].aval.shape, equation.invars[1].aval.shape
  batch, features, *space = numbers.out_spec
  # The kernel's input features are those of one group already.
  _, inputs, *kernel_space = numbers.rhs_spec
  products = out[batch] * out[features] * kernel[inputs]
  for axis, (low, _) in enumerate(params["padding"]):
    outputs, taps = out[space[axis]], kernel[kernel_space[axis]]
    holes = params["lhs_dilation"][axis]
    if holes == 1:
      products *= outputs * taps
      continue
    start = np.arange(outputs) * params["window_strides"][axis] - low
    position = start[:, None] + np.arange(taps)[None, :] * params["rhs_dilation"][axis]
    products *= int(np.count_nonzero(position % holes == 0))
  return 2 * products


def _count_elements(equation: Any) -> int:
  """One per element of the output, the input or the window, if there is a float among them."""
  name, params = equation.primitive.name, equation.params
  if name in _FREE or not any(_is_float(v) for v in [*equation.invars, *equation.outvars]):
    return 0
  first, output = equation.invars[0], max(map(_elements, equation.outvars), default=0)
  if name in _REDUCTIONS:
    return _elements(first)
  if name == "reduce":
    return _elements(first) * _count_whole(params["jaxpr"])
  if name.startswith("scatter"):
    return _elements(equation.invars[2])
  if "window_dimensions" in params:
    window = math.prod(params["window_dimensions"])
    if name == "reduce_window":
      return output * window * _count_whole(params["jaxpr"])
    # The gradient of max-pooling looks through a window for each element of its source.
    return _elements(first) * window if name.startswith("select_and_scatter") else output * window
  return output


def _elements(atom: Any) -> int:
  return math.prod(getattr(atom.aval, "shape", ()))


def _is_float(atom: Any) -> bool:
  dtype = getattr(atom.aval, "dtype", None)
  return dtype is not None and bool(jax.dtypes.issubdtype(dtype, np.inexact))


def xla_flops(fn: Callable[..., Any], *args: Any) -> float | None:
  """The compiler's count of operations for one call, as a second opinion on `flops`.

  It describes the compiled program: bodies of loops count once whatever their length,
  transcendental functions are left out, and what falls on padding may be, too.

  Args:
    fn: a function of arrays.
    *args: its arguments, as arrays or ``jax.ShapeDtypeStruct``.

  Returns:
    The figure of ``cost_analysis``, or None where the backend has none.

  >>> xla_flops(lambda x, w: x @ w, np.zeros((2, 3), np.float32), np.zeros((3, 4), np.float32))
  48.0
  """
  analysis = _jitted(fn).lower(*args).compile().cost_analysis()
  if isinstance(analysis, list | tuple):
    analysis = analysis[0] if analysis else None
  count = analysis.get("flops") if isinstance(analysis, Mapping) else None
  # XLA says -1 for what it does not know.
  return float(count) if count is not None and count >= 0 else None


def _jitted(fn: Callable[..., Any]) -> Any:
  """The function under ``jax.jit``, once: compiled for all figures together."""
  return fn if isinstance(fn, jax.stages.Wrapped) else jax.jit(fn)


def latency(
  fn: Callable[..., Any], *args: Any, repeats: int = 100, warmup: int = 5, seconds: float = 10.0
) -> dict[str, float]:
  """Time of one call, from the dispatch until the result is there.

  The function is compiled and its arguments are on the device before the clock starts; every call
  is waited for.

  Args:
    fn: a function of arrays, jitted here where it is not.
    *args: its arguments, as arrays.
    repeats: how many calls to time.
    warmup: how many calls to make before; the first compiles.
    seconds: stop warming up, and stop timing, after this long, but not before one call each.

  Returns:
    ``{"median", "p95", "calls"}``: milliseconds, and how many calls they are over.

  Raises:
    ValueError: ``repeats`` or ``warmup`` is below 1.

  >>> sorted(latency(lambda x: x + 1, np.zeros(2), repeats=3))
  ['calls', 'median', 'p95']
  """
  if repeats < 1 or warmup < 1:
    raise ValueError(f"repeats and warmup must be at least 1, got {repeats} and {warmup}.")
  call = _warm(fn, args, warmup, seconds)
  return timed(lambda: jax.block_until_ready(call()), repeats=repeats, seconds=seconds)


def timed(
  call: Callable[[], Any], *, repeats: int = 100, seconds: float = 10.0
) -> dict[str, float]:
  """Time of a call that returns when it is done, as a user's program makes it.

  Args:
    call: a function without arguments. It is called once before the clock starts.
    repeats: how many calls to time.
    seconds: stop after this long, but not before one call.

  Returns:
    As `latency`.

  >>> timed(lambda: None, repeats=3)["calls"]
  3.0
  """
  call()
  times: list[float] = []
  stop = time.perf_counter() + seconds
  while len(times) < repeats and (not times or time.perf_counter() < stop):
    start = time.perf_counter()
    call()
    times.append(1000 * (time.perf_counter() - start))
  median, p95 = np.percentile(times, [50, 95])
  return {"median": float(median), "p95": float(p95), "calls": float(len(times))}


def throughput(
  fn: Callable[..., Any],
  *args: Any,
  examples: int,
  seconds: float = 2.0,
  warmup: int = 5,
  repeats: int = 300,
) -> float:
  """Examples per second when calls follow one another without waiting for each.

  A few calls are kept in flight, so that the device does not wait for the host.

  Args:
    fn: a function of arrays, jitted here where it is not.
    *args: its arguments, as arrays: a batch.
    examples: how many examples one call handles.
    seconds: stop after this long, but not before one call.
    warmup: how many calls to make before; the first compiles.
    repeats: stop after so many calls. Their rate is a mean, which varies with one over the root of
      their number: of 300 by a seventeenth of what one call does, and more tell nothing new.

  Returns:
    Examples per second.

  Raises:
    ValueError: ``examples``, ``warmup`` or ``repeats`` is below 1, or ``seconds`` is not positive.

  >>> throughput(lambda x: x + 1, np.zeros((8, 2)), examples=8, seconds=0.01) > 0
  True
  """
  if min(examples, warmup, repeats) < 1 or seconds <= 0:
    raise ValueError(
      "examples, warmup and repeats must be at least 1 and seconds positive, got "
      f"{examples}, {warmup}, {repeats} and {seconds}."
    )
  call = _warm(fn, args, warmup, seconds)
  in_flight: collections.deque[Any] = collections.deque()
  calls = 0
  start = time.perf_counter()
  while not calls or (calls < repeats and time.perf_counter() - start < seconds):
    in_flight.append(call())
    calls += 1
    if len(in_flight) > _IN_FLIGHT:
      jax.block_until_ready(in_flight.popleft())
  jax.block_until_ready(in_flight)
  return calls * examples / (time.perf_counter() - start)


def _warm(
  fn: Callable[..., Any], args: Sequence[Any], warmup: int, seconds: float
) -> Callable[[], Any]:
  """Compiles, moves the arguments to the device, and warms up for at most so many seconds."""
  compiled = _jitted(fn)
  placed = jax.block_until_ready(jax.device_put(tuple(args)))
  jax.block_until_ready(compiled(*placed))
  stop = time.perf_counter() + seconds
  for _ in range(warmup - 1):
    if time.perf_counter() >= stop:
      break
    jax.block_until_ready(compiled(*placed))
  return lambda: compiled(*placed)
