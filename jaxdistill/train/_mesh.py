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
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxdistill import _check
from jaxdistill._compile import CompiledOnce
from jaxdistill._devices import AXIS, batch_axes
from jaxdistill.runs import is_key
from jaxdistill.train._sharding import Rules, Sharding, check_rules, laid, lies_on, put

__all__ = [
  "AXIS",
  "Dispatch",
  "agree",
  "barrier",
  "check_divides",
  "data_parallel",
  "mesh",
  "with_jit",
  "with_pmap",
  "with_students",
]

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
  return Mesh(np.asarray(_chosen(devices)), (AXIS,), axis_types=(AxisType.Auto,))


def mesh(
  *, data: int | None = None, devices: Sequence[jax.Device] | None = None, **axes: int
) -> Mesh:
  """A mesh of several axes: `AXIS`, over which batches are split, and others for the networks.

  ``train.mesh(data=2, fsdp=4)``, ``train.mesh(model=8)``. Neighbours on the last axis are closest
  where the machine has a topology, so put the one that communicates most there (`jax.make_mesh`).

  Args:
    data: devices along `AXIS`; as many as the other axes leave, by default.
    devices: the devices to use; all of them by default.
    **axes: devices along each other axis, by any names. Over one called ``"fsdp"`` batches are
      split too, see `with_jit`.

  Returns:
    A mesh whose axis types are ``Auto``: the compiler propagates shardings.

  Raises:
    TypeError: these are no devices, or a number is no integer.
    ValueError: the axes do not multiply to the number of devices; there is no device, or one twice.

  >>> dict(mesh(devices=jax.devices()[:1], model=1).shape)
  {'data': 1, 'model': 1}
  """
  chosen = _chosen(devices)
  for name, size in axes.items():
    _check.whole(name, size)
  others = math.prod(axes.values())
  count = len(chosen) // others if data is None else _check.whole("data", data)
  sizes = {AXIS: count, **axes}
  if count * others != len(chosen):
    raise ValueError(
      f"the axes {sizes} are of {count * others} devices, and there are {len(chosen)}; take axes "
      "that multiply to that, or name the devices: train.mesh(..., devices=jax.devices()[:4])."
    )
  types = (AxisType.Auto,) * len(sizes)
  return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=chosen)


def _chosen(devices: Any) -> list[jax.Device]:
  """Devices, each once; all where none are named."""
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
  return chosen


@dataclasses.dataclass(frozen=True)
class Dispatch:
  """How a chunk of steps is compiled, and how its arguments get to the devices.

  Attributes:
    devices: how many shares a batch is cut into, over all processes: one for each device, or for
      each set of devices that hold a network's parts.
    seeds_by: whether several seeds are trained side by side (``"vmap"``) or one after another
      inside the program (``"unroll"``); None for what suits the networks, see `students_by`.
    scan: whether a chunk of steps is one dispatch, a loop on the device; None for what suits.
    part: ``(p, P)``: this process is the p-th of P that share a batch, and reads its rows alone.
    axis_name: the axis for collectives inside the step (`pmap`), or None (`jit`).
    compile: ``run(state, teacher, shared, items, values, count) -> (state, sums)`` to its compiled
      form, which donates the state; ``compile(run, where)`` for a state that lies where a tree of
      shardings says.
    place: puts what no step changes (the teacher, shared arrays) on every device. A leaf that lies
      on the mesh already stays where and as it is, replicated or in parts, and nothing is copied;
      leaves that are shapes get the sharding of such an array. ``place(tree, where)`` puts the
      others where a tree of shardings says.
    spread: puts what is donated, and what students have each of their own (state, values), where
      `compile`'s function takes it, in buffers of its own; shapes get that sharding.
      ``spread(tree, where)``, of a tree that is the caller's to donate, moves what does not lie
      there yet.
    split: ``(items, batch_axis)``: shares out the batch axis of the leaves that have one; the
      others, which have no axis beyond those before it, go to every device.
    constrain: keeps a batch's leading axis split, inside the program.
    collect: what `compile`'s function returned, whole on each of this process's devices; what is in
      parts on the devices of several processes stays there.
    accumulate: into how many micro-batches a step cuts its batch.
    tokens_at_once: how many tokens' logits a step has at any time; None for those of its batch.
    sharding: the rules by which a student and a teacher are cut into parts; None where networks
      are on every device in any case.
  """

  devices: int
  seeds_by: str | None
  scan: bool | None
  part: tuple[int, int]
  axis_name: str | None
  compile: Callable[..., CompiledOnce]
  place: Callable[..., PyTree]
  spread: Callable[..., PyTree]
  split: Callable[[PyTree, int], PyTree]
  constrain: Callable[[PyTree], PyTree]
  collect: Callable[[PyTree], PyTree]
  accumulate: int = 1
  tokens_at_once: int | None = None
  sharding: Sharding | None = None


def check_divides(batch_size: int, devices: int) -> None:
  """Raises where a batch, or a stream's part of it, can't be shared out evenly."""
  if batch_size % devices:
    raise ValueError(
      f"batch_size={batch_size} does not divide by the {devices} devices of the mesh that share "
      f"it; take a multiple of {devices}, or fewer devices."
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


def _part(mesh: Mesh, over: tuple[str, ...]) -> tuple[int, int]:
  """Which of the parts of a batch this process reads, and how many there are.

  Processes that hold parts of the same networks read the same rows.
  """
  rest = [axis for axis in mesh.axis_names if axis not in over]
  order = [mesh.axis_names.index(axis) for axis in (*over, *rest)]
  shares = math.prod(mesh.shape[axis] for axis in over)
  rows = mesh.devices.transpose(order).reshape(shares, -1)
  mine: dict[int, list[int]] = {}
  for share, devices in enumerate(rows):
    for process in sorted({device.process_index for device in devices}):
      mine.setdefault(process, []).append(share)
  parts = sorted({tuple(one) for one in mine.values()})
  each = shares // len(parts)
  if parts != [tuple(range(i * each, (i + 1) * each)) for i in range(len(parts))]:
    raise ValueError(
      "the mesh does not hold the same number of devices of each process, side by side; take "
      "train.data_parallel(), or train.mesh(...) of all devices."
    )
  if jax.process_index() not in mine:
    raise ValueError(f"the mesh holds no device of process {jax.process_index()}.")
  return parts.index(tuple(mine[jax.process_index()])), len(parts)


def _several(mesh: Mesh) -> bool:
  """Whether a mesh has devices of several processes."""
  return len({device.process_index for device in mesh.devices.flat}) > 1


def _usable(mesh: Any) -> Mesh:
  """A mesh over which batches can be split, with axes that the compiler propagates along."""
  if not isinstance(mesh, Mesh) or AXIS not in mesh.axis_names:
    shown = _check.show(mesh if not isinstance(mesh, Mesh) else dict(mesh.shape))
    raise TypeError(
      f"mesh must have the axis {AXIS!r}, got {shown}; use train.data_parallel(), or "
      "train.mesh(data=2, model=4)."
    )
  # In Explicit axes each operation would have to be told how its result lies.
  types = (AxisType.Auto,) * len(mesh.axis_names)
  return mesh if mesh.axis_types == types else Mesh(mesh.devices, mesh.axis_names, axis_types=types)


def _over(mesh: Mesh, axes: Any) -> tuple[str, ...]:
  """The axes over which a batch is split."""
  if axes is None:
    return batch_axes(mesh)
  found = (axes,) if not isinstance(axes, Sequence) or isinstance(axes, str) else tuple(axes)
  if AXIS not in found or not set(found) <= set(mesh.axis_names) or len(set(found)) < len(found):
    raise ValueError(
      f"batch_axes={_check.show(axes)} must be axes of the mesh {dict(mesh.shape)}, each once, and "
      f"{AXIS!r} among them."
    )
  return found


def _rules(mesh: Mesh, over: tuple[str, ...], sharding: Any, teacher_sharding: Any) -> Sharding:
  """The rules as a value."""
  given = {"sharding": sharding, "teacher_sharding": teacher_sharding}
  for name, rules in given.items():
    if rules is not None:
      check_rules(name, rules)
  return Sharding(mesh, over, sharding, teacher_sharding)


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
  sharding: Rules | None = None,
  teacher_sharding: Rules | None = None,
  batch_axes: str | Sequence[str] | None = None,
  seeds_by: str | None = None,
  scan: bool | None = None,
) -> Dispatch:
  """Compiles by `jax.jit` over a mesh: data-parallel, or with networks in parts. The way to train.

  In a program of several processes (``jax.distributed.initialize``) the mesh spans all of them, and
  so do the parts of a network. A run's checkpoints are then written by all of them, and what `fit`
  returns stays in parts: read it from the run's folder.
  Whatever the mesh and the rules, the numbers are those of one device, to rounding. How a step fits
  into memory is said here too: ``fit(..., dispatch=with_jit(accumulate=4))``.

  Args:
    mesh: from `data_parallel` or `mesh`; all devices by default.
    sharding: how the student is cut into parts: `fsdp`, `annotated`, or rules by path, see
      `shardings`. What the objective learns goes by the same rules, and the optimiser's state and
      moving averages lie as the parameters do. What no rule covers is on every device, and the log
      lists it. None for all of it on every device.
    teacher_sharding: likewise for the teacher, by rules of its own. What lies on the mesh in parts
      already stays as it is. None leaves it where it lies on the mesh, and puts what does not on
      every device.
    batch_axes: the axes of the mesh over which batches are split: by default `AXIS`, and ``"fsdp"``
      where the mesh has such an axis.
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
    TypeError: ``mesh`` has no axis `AXIS`, rules are none, ``scan`` is no bool, or a number no
      integer.
    ValueError: ``seeds_by`` or ``batch_axes`` is out of range, a number is below 1, or the
      processes of the mesh have unequal shares.
  """
  _check_form(seeds_by, scan, accumulate, tokens_at_once)
  mesh = _usable(data_parallel() if mesh is None else mesh)
  over = _over(mesh, batch_axes)
  rules = _rules(mesh, over, sharding, teacher_sharding)
  devices, part = math.prod(mesh.shape[axis] for axis in over), _part(mesh, over)
  several = _several(mesh)
  replicated = NamedSharding(mesh, PartitionSpec())
  rows = over[0] if len(over) == 1 else over

  def split(items: PyTree, batch_axis: int) -> PyTree:
    shared_out = NamedSharding(mesh, PartitionSpec(*([None] * batch_axis), rows))

    # Numbers (a step, a key) go everywhere; what has a batch axis is cut along it. Every process
    # has read its own rows alone: the global array is put together of them without communication.
    def put(leaf: Any) -> Any:
      sharding = replicated
      shape = list(np.shape(leaf))
      if np.ndim(leaf) > batch_axis:
        shape[batch_axis] *= part[1]
        check_divides(shape[batch_axis], devices)
        sharding = shared_out
      if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.update(sharding=sharding)
      if several:
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf), tuple(shape))
      return jax.device_put(leaf, sharding)

    return jax.tree.map(put, items)

  def constrain(batch: PyTree) -> PyTree:
    if devices == 1:
      return batch
    # Without it the compiler is free to gather the whole batch on every device after the cut.
    return jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, PartitionSpec(rows)))

  def everywhere(leaf: Any, *, owned: bool) -> Any:
    if not owned and lies_on(mesh, leaf):
      return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
      return leaf.update(sharding=replicated)
    if several and isinstance(leaf, jax.Array) and leaf.is_fully_addressable:
      # From this process's devices (what `fit` has returned) to all: device_put knows such a way of
      # host arrays alone, of which it sees that they are the same everywhere.
      if is_key(leaf):
        words = jax.device_put(np.asarray(jax.random.key_data(leaf)), replicated)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
      leaf = np.asarray(leaf)
    # The compiled call donates the state, and device_put hands the caller's own buffer back where
    # that lies right already: what is donated must own its buffers, or the caller's variables (a
    # student that starts from its teacher's) would be gone after the first step.
    return jax.device_put(leaf, replicated, may_alias=False if owned else None)

  def place(tree: PyTree, where: PyTree = None) -> PyTree:
    if where is not None:
      return jax.tree.map(put, tree, where)
    return jax.tree.map(lambda leaf: everywhere(leaf, owned=False), tree)

  def spread(tree: PyTree, where: PyTree = None) -> PyTree:
    if where is not None:
      return jax.tree.map(_moved, tree, where)
    return jax.tree.map(lambda leaf: everywhere(leaf, owned=True), tree)

  def collect(tree: PyTree) -> PyTree:
    if several and all(leaf.is_fully_replicated for leaf in jax.tree.leaves(tree)):
      return jax.tree.map(_local, tree)
    return tree

  def compile(run: Callable[..., Any], where: PyTree = None) -> CompiledOnce:
    # Here fit's step meets jax.jit. The arguments are (state, teacher, shared, items, values,
    # count):
    # - The state is donated, so the new one takes its memory: parameters and the optimiser's
    #   moments are there once, not twice. The teacher is not; it is the same for every call.
    # - Arguments bring their shardings along: values, shared arrays, and without rules states and
    #   most teachers, lie on every device (`place`, `spread`), the items' batch axis is shared out
    #   (`split`), and inside `constrain` keeps a batch that was cut out of shared arrays shared out
    #   too. From these the compiler propagates (AxisType.Auto): it gathers what is in parts where
    #   that is used, and adds the sum of gradients over the devices.
    # - The results lie as the arguments did, so the second call compiles nothing anew.
    # keep_unused: see CompiledOnce.
    out = replicated if where is None else [jax.tree.leaves(where), replicated]
    jit = functools.partial(jax.jit, donate_argnums=0, out_shardings=out, keep_unused=True)
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
    sharding=rules,
  )


def _moved(leaf: Any, sharding: NamedSharding) -> Any:
  """An array that may be given away, where it is to lie: itself, where it lies there."""
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return leaf.update(sharding=sharding)
  there = lies_on(sharding.mesh, leaf) and leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
  return leaf if there else laid(leaf, sharding)


def _local(leaf: Any) -> Any:
  """This process's copies of a replicated array, by themselves; no number is moved."""
  if is_key(leaf):
    return jax.random.wrap_key_data(
      _local(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf)
    )
  copies = [shard.data for shard in leaf.addressable_shards]
  here = data_parallel([device for copy in copies for device in copy.devices()])
  sharding = NamedSharding(here, PartitionSpec())
  return jax.make_array_from_single_device_arrays(leaf.shape, sharding, copies)


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
      "devices share its students. search.study of Proposals(storage=...) shares trials out over "
      "processes that are started one by one; train.fit takes several."
    )
  _check_form(seeds_by, scan)
  mesh = data_parallel() if mesh is None else mesh
  everywhere = NamedSharding(mesh, PartitionSpec())
  # On one device an array that comes out of a program is not said to be split.
  over = NamedSharding(mesh, PartitionSpec(AXIS)) if mesh.devices.size > 1 else everywhere
  on_cpu = mesh.devices.flat[0].platform == "cpu"

  def put_by(sharding: NamedSharding, *, owned: bool) -> Callable[[PyTree], PyTree]:
    def put(leaf: Any) -> Any:
      if not owned and lies_on(mesh, leaf):
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
