"""Where a train step is compiled and where its arrays live: `jit` over a mesh, or `pmap`.

A step is a pure function; this file is the edge at which it is compiled. All ways offer the same
operations (`Dispatch`), so the trainer does not know which it uses. The third way splits students
over the devices, and not batches: a sweep's.

Under `jit` the program sees the global batch: averages, BatchNorm and losses that relate examples
are what one device gives, to rounding. Under `pmap` each device sees its share: averages are
exact through ``psum``, but BatchNorm (unless it is given ``axis_name``) and losses that relate
examples see only that share.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxdistill import _check
from jaxdistill._compile import CompiledOnce
from jaxdistill.runs import is_key

__all__ = [
  "AXIS",
  "Dispatch",
  "agree",
  "barrier",
  "check_divides",
  "data_parallel",
  "with_jit",
  "with_pmap",
  "with_students",
]

AXIS = "data"
PyTree = Any


def data_parallel(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A one-axis mesh, named `AXIS`, over which batches are split.

  Args:
    devices: the devices to use; all of them by default.

  Returns:
    A mesh whose axis type is ``Auto``: the compiler propagates shardings.

  Raises:
    TypeError: these are no devices.
    ValueError: there is no device, or one twice.

  >>> dict(data_parallel(jax.devices()[:1]).shape)
  {'data': 1}
  """
  chosen: Any = jax.devices() if devices is None else devices
  if isinstance(chosen, str) or not isinstance(chosen, Sequence | np.ndarray):
    raise TypeError(f"devices={_check.show(chosen)} must be devices, such as jax.devices()[:2].")
  chosen = list(chosen)
  if not chosen:
    raise ValueError("devices is empty: a mesh needs at least one device; leave it out to use all.")
  if not all(isinstance(device, jax.Device) for device in chosen):
    raise TypeError(f"devices={_check.show(chosen)} must be devices, such as jax.devices()[:2].")
  if len(set(chosen)) < len(chosen):
    raise ValueError(f"devices={chosen} has a device more than once; name each one time.")
  return Mesh(np.asarray(chosen), (AXIS,), axis_types=(AxisType.Auto,))


@dataclasses.dataclass(frozen=True)
class Dispatch:
  """How a chunk of steps is compiled, and how its arguments get to the devices.

  Attributes:
    devices: how many devices share a batch, over all processes.
    seeds_by: whether several seeds are trained side by side (``"vmap"``) or one after another
      inside the program (``"unroll"``); None for what suits the networks, see `students_by`.
    scan: whether a chunk of steps is one dispatch, a loop on the device; None for what suits.
    part: ``(p, P)``: this process is the p-th of P that share a batch, and reads its rows alone.
    axis_name: the axis for collectives inside the step (`pmap`), or None (`jit`).
    compile: ``run(state, teacher, shared, items, values, count) -> (state, sums)`` to its compiled
      form, which donates the state.
    place: puts what no step changes (the teacher, shared arrays) on every device. A leaf that lies
      on the mesh already stays where and as it is, replicated or in parts, and nothing is copied;
      leaves that are shapes get the sharding of such an array.
    spread: puts what is donated, and what students have each of their own (state, values), where
      `compile`'s function takes it, in buffers of its own; shapes get that sharding.
    split: ``(items, batch_axis)``: shares out the batch axis of the leaves that have one; the
      others, which have no axis beyond those before it, go to every device.
    constrain: keeps a batch's leading axis split, inside the program.
    collect: one copy of what `compile`'s function returned, on this process's devices.
    accumulate: into how many micro-batches a step cuts its batch.
    tokens_at_once: how many tokens' logits a step has at any time; None for those of its batch.
  """

  devices: int
  seeds_by: str | None
  scan: bool | None
  part: tuple[int, int]
  axis_name: str | None
  compile: Callable[[Callable[..., Any]], CompiledOnce]
  place: Callable[[PyTree], PyTree]
  spread: Callable[[PyTree], PyTree]
  split: Callable[[PyTree, int], PyTree]
  constrain: Callable[[PyTree], PyTree]
  collect: Callable[[PyTree], PyTree]
  accumulate: int = 1
  tokens_at_once: int | None = None


def check_divides(batch_size: int, devices: int) -> None:
  """Raises where a batch, or a stream's part of it, can't be shared out evenly."""
  if batch_size % devices:
    raise ValueError(
      f"batch_size={batch_size} does not divide by the {devices} devices of the mesh; "
      f"take a multiple of {devices}, or fewer devices."
    )


def agree(value: int) -> int:
  """Process 0's value, in every process; the value itself where there is but one."""
  if jax.process_count() == 1:
    return value
  from jax.experimental import multihost_utils  # only programs of several processes need it

  return int(multihost_utils.broadcast_one_to_all(np.int64(value)))


def barrier(name: str) -> None:
  """Waits until every process is here."""
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(name)


def _part(mesh: Mesh) -> tuple[int, int]:
  """Which of the processes of a mesh this one is."""
  owners = [device.process_index for device in mesh.devices.flat]
  processes = list(dict.fromkeys(owners))
  each = len(owners) // len(processes)
  if owners != [p for p in processes for _ in range(each)]:
    raise ValueError(
      "the mesh does not hold the same number of devices of each process, side by side; take "
      "train.data_parallel()."
    )
  if jax.process_index() not in processes:
    raise ValueError(f"the mesh holds no device of process {jax.process_index()}.")
  return processes.index(jax.process_index()), len(processes)


def _check_form(seeds_by: Any, scan: Any, accumulate: Any = 1, tokens_at_once: Any = None) -> None:
  if seeds_by not in ("vmap", "unroll", None):
    raise ValueError(f"seeds_by={seeds_by!r} must be 'vmap' or 'unroll', or None.")
  if scan is not None:
    _check.switch("scan", scan)
  _check.whole("accumulate", accumulate)
  if tokens_at_once is not None:
    _check.whole("tokens_at_once", tokens_at_once)


def with_jit(
  mesh: Mesh | None = None,
  *,
  accumulate: int = 1,
  tokens_at_once: int | None = None,
  seeds_by: str | None = None,
  scan: bool | None = None,
) -> Dispatch:
  """Compiles by `jax.jit` over a data-parallel mesh. The way to train.

  In a program of several processes (``jax.distributed.initialize``) the mesh spans all of them.
  How a step fits into memory is said here too: ``fit(..., dispatch=with_jit(accumulate=4))``.

  Args:
    mesh: from `data_parallel`; all devices by default.
    accumulate: into how many micro-batches each batch is cut, to need less memory; the same
      gradient for a network without state across examples and without dropout. BatchNorm, and
      losses that relate examples, see the micro-batch.
    tokens_at_once: how many tokens' logits there are at any time, of networks that put out
      ``hidden`` and ``head``; the same loss and gradient, see `train.in_chunks`. None for those of
      the whole batch.
    seeds_by: whether several seeds are trained side by side (``"vmap"``) or one after another
      inside the program (``"unroll"``). By default side by side, but for a few students with
      ``lax`` convolutions on a CPU, for which the other is faster.
    scan: whether a chunk of steps is one dispatch, a loop on the device. Without, its steps are
      dispatched one by one. By default it is, but for networks with ``lax`` convolutions on a CPU,
      where XLA computes those twenty times slower inside a loop; the log says so.

  Returns:
    The dispatch; its compiled function donates the state.

  Raises:
    TypeError: ``mesh`` is not one of the one axis `AXIS`, ``scan`` no bool, or a number no integer.
    ValueError: ``seeds_by`` is neither, a number is below 1, or the processes of the mesh have
      unequal shares.
  """
  _check_form(seeds_by, scan, accumulate, tokens_at_once)
  mesh = data_parallel() if mesh is None else mesh
  if not isinstance(mesh, Mesh) or mesh.axis_names != (AXIS,):
    shown = _check.show(mesh if not isinstance(mesh, Mesh) else dict(mesh.shape))
    raise TypeError(
      f"mesh must be of the one axis {AXIS!r}, got {shown}; use train.data_parallel()."
    )
  devices, part = mesh.devices.size, _part(mesh)
  several = part[1] > 1
  replicated = NamedSharding(mesh, PartitionSpec())

  def split(items: PyTree, batch_axis: int) -> PyTree:
    shared_out = NamedSharding(mesh, PartitionSpec(*([None] * batch_axis), AXIS))

    # Numbers (a step, a key) go everywhere; what has a batch axis is cut along it. Every process
    # has read its own rows alone: the global array is put together of them without communication.
    def put(leaf: Any) -> Any:
      sharding = replicated
      if np.ndim(leaf) > batch_axis:
        check_divides(np.shape(leaf)[batch_axis] * part[1], devices)
        sharding = shared_out
      if several:
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))
      return jax.device_put(leaf, sharding)

    return jax.tree.map(put, items)

  def constrain(batch: PyTree) -> PyTree:
    if devices == 1:
      return batch
    # Without it the compiler is free to gather the whole batch on every device after the cut.
    return jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, PartitionSpec(AXIS)))

  def put(leaf: Any, *, owned: bool) -> Any:
    if not owned and _lies_on(mesh, leaf):
      return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
      return leaf.update(sharding=replicated)
    if several and is_key(leaf):  # device_put knows no keys on other processes' devices
      words = jax.device_put(jax.random.key_data(leaf), replicated)
      return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
    # The compiled call donates the state, and device_put hands the caller's own buffer back where
    # that lies right already: what is donated must own its buffers, or the caller's variables (a
    # student that starts from its teacher's) would be gone after the first step.
    return jax.device_put(leaf, replicated, may_alias=False if owned else None)

  def place(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: put(leaf, owned=False), tree)

  def spread(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: put(leaf, owned=True), tree)

  def collect(tree: PyTree) -> PyTree:
    return jax.tree.map(_local, tree) if several else tree

  def compile(run: Callable[..., Any]) -> CompiledOnce:
    # Here fit's step meets jax.jit. The arguments are (state, teacher, shared, items, values,
    # count):
    # - The state is donated, so the new one takes its memory: parameters and the optimiser's
    #   moments are there once, not twice. The teacher is not; it is the same for every call.
    # - Arguments bring their shardings along: state, values, shared arrays and most teachers lie on
    #   every device (`place`, `spread`), the items' batch axis is shared out (`split`), and inside
    #   `constrain` keeps a batch that was cut out of shared arrays shared out too. From these the
    #   compiler propagates (AxisType.Auto), and adds the sum of gradients over the devices.
    # - The results are replicated as the arguments were, so the second call compiles nothing anew.
    # keep_unused: see CompiledOnce.
    jit = functools.partial(jax.jit, donate_argnums=0, out_shardings=replicated, keep_unused=True)
    return CompiledOnce(run, jit)

  return Dispatch(
    devices=devices,
    seeds_by=seeds_by,
    scan=scan,
    part=part,
    axis_name=None,
    compile=compile,
    place=place,
    spread=spread,
    split=split,
    constrain=constrain,
    collect=collect,
    accumulate=accumulate,
    tokens_at_once=tokens_at_once,
  )


def _lies_on(mesh: Mesh, leaf: Any) -> bool:
  """Whether an array is laid out over the devices of a mesh, in their order."""
  found = getattr(leaf, "sharding", None)
  return isinstance(found, NamedSharding) and list(found.mesh.devices.flat) == list(
    mesh.devices.flat
  )


def _local(leaf: Any) -> Any:
  """This process's copy of a replicated array, by itself."""
  if is_key(leaf):
    return jax.random.wrap_key_data(
      _local(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf)
    )
  return leaf.addressable_data(0)


def with_students(
  mesh: Mesh | None = None, *, seeds_by: str | None = None, scan: bool | None = None
) -> Dispatch:
  """Compiles by `jax.jit` with the students of a sweep shared out over the devices.

  Every device sees whole batches and trains students of its own: nothing is communicated.

  Args:
    mesh: from `data_parallel`; all devices by default.
    seeds_by: ``"vmap"``, or ``"unroll"`` for one student after another inside the program.
    scan: whether a chunk of steps is one dispatch; both by what suits, as in `with_jit`.

  Returns:
    The dispatch, for a state with an axis over students that divides by the devices; its compiled
    function donates the state.

  Raises:
    ValueError: there are several processes.
  """
  if jax.process_count() > 1:
    raise ValueError(
      f"a sweep is of one process, and there are {jax.process_count()}: start it in one, whose "
      "devices share its students; train.fit takes several."
    )
  _check_form(seeds_by, scan)
  mesh = data_parallel() if mesh is None else mesh
  everywhere = NamedSharding(mesh, PartitionSpec())
  # On one device an array that comes out of a program is not said to be split.
  over = NamedSharding(mesh, PartitionSpec(AXIS)) if mesh.devices.size > 1 else everywhere
  on_cpu = mesh.devices.flat[0].platform == "cpu"

  def put_by(sharding: NamedSharding, *, owned: bool) -> Callable[[PyTree], PyTree]:
    def put(leaf: Any) -> Any:
      if not owned and _lies_on(mesh, leaf):
        return leaf
      if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.update(sharding=sharding)
      if on_cpu and getattr(leaf, "sharding", sharding) != sharding:
        # JAX would compile a program to cut an array of its own into parts.
        if is_key(leaf):
          words = jax.device_put(np.asarray(jax.random.key_data(leaf)), sharding)
          return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
        leaf = np.asarray(leaf)
      return jax.device_put(leaf, sharding, may_alias=False if owned else None)  # see `with_jit`

    return lambda tree: jax.tree.map(put, tree)

  def compile(run: Callable[..., Any]) -> CompiledOnce:
    if mesh.devices.size > 1:
      whole, part = PartitionSpec(), PartitionSpec(AXIS)
      # Students are shared out, and whatever they look at (teacher, arrays, items) is whole on each
      # device: inside, a device runs the program of its own students as if it were alone.
      specs = (part, whole, whole, whole, part, whole)
      run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=part, check_vma=False)
    return CompiledOnce(run, functools.partial(jax.jit, donate_argnums=0, keep_unused=True))

  return Dispatch(
    devices=1,
    seeds_by=seeds_by,
    scan=scan,
    part=(0, 1),
    axis_name=None,
    compile=compile,
    place=put_by(everywhere, owned=False),
    spread=put_by(over, owned=True),
    split=lambda items, batch_axis: put_by(everywhere, owned=True)(items),
    constrain=lambda batch: batch,
    collect=lambda tree: tree,
  )


def with_pmap(
  devices: Sequence[jax.Device] | None = None,
  *,
  accumulate: int = 1,
  tokens_at_once: int | None = None,
  seeds_by: str | None = None,
  scan: bool | None = None,
) -> Dispatch:
  """Compiles by `jax.pmap`, sums through ``psum`` over the axis `AXIS`.

  Args:
    devices: the devices to use; all of them by default.
    accumulate: into how many micro-batches each device's share is cut, as in `with_jit`.
    tokens_at_once: how many tokens' logits each device has at any time, likewise.
    seeds_by: as several seeds are trained: ``"vmap"`` or ``"unroll"``.
    scan: whether a chunk of steps is one dispatch; both by what suits, as in `with_jit`.

  Returns:
    The dispatch; its compiled function donates the state.

  Raises:
    ValueError: there are several processes, which `with_jit` is for.
  """
  _check_form(seeds_by, scan, accumulate, tokens_at_once)
  if jax.process_count() > 1:
    raise ValueError(f"pmap serves one process, and there are {jax.process_count()}: use with_jit.")
  mesh = data_parallel(devices)
  count = mesh.devices.size
  per_device = NamedSharding(mesh, PartitionSpec(AXIS))

  def place(tree: PyTree) -> PyTree:
    def put(leaf: Any) -> Any:
      if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype, sharding=per_device)
      leaf = jnp.asarray(leaf)
      return jax.device_put(jnp.broadcast_to(leaf[None], (count, *leaf.shape)), per_device)

    return jax.tree.map(put, tree)

  def split(items: PyTree, batch_axis: int) -> PyTree:
    def put(leaf: Any) -> Any:
      shape = np.shape(leaf)
      if len(shape) <= batch_axis:
        return place(leaf)
      check_divides(shape[batch_axis], count)
      parts = (*shape[:batch_axis], count, shape[batch_axis] // count, *shape[batch_axis + 1 :])
      return jax.device_put(jnp.moveaxis(jnp.reshape(leaf, parts), batch_axis, 0), per_device)

    return jax.tree.map(put, items)

  return Dispatch(
    devices=count,
    seeds_by=seeds_by,
    scan=scan,
    part=(0, 1),
    axis_name=AXIS,
    # Each device has a copy of state and teacher with an axis over devices in front, of which it
    # sees its own; the step sums over the axis by psum. Donated as under jit.
    compile=lambda run: CompiledOnce(
      run,
      functools.partial(
        jax.pmap, axis_name=AXIS, donate_argnums=0, devices=list(mesh.devices.flat)
      ),
      shared=False,
    ),
    place=place,
    spread=place,
    split=split,
    constrain=lambda batch: batch,
    collect=lambda tree: jax.tree.map(lambda leaf: leaf[0], tree),
    accumulate=accumulate,
    tokens_at_once=tokens_at_once,
  )
