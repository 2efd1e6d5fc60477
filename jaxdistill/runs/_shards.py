"""Arrays in parts, part by part: no host ever has more of one than its devices hold.

And the processes of a program that write such arrays into one folder together: what one of them
could not do, all of them hear of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from jaxdistill._among import Meetings, alone, company
from jaxdistill.runs._manifest import CheckpointError

__all__ = ["Together", "by_part", "in_parts", "kept", "same_bits"]

PyTree = Any
_MEETINGS = Meetings("saving")


def in_parts(leaf: Any) -> bool:
  """Whether an array, or a shape with a sharding, is cut, or lies on other processes' devices."""
  at = getattr(leaf, "sharding", None)
  if not isinstance(at, NamedSharding):
    return False
  return not (at.is_fully_replicated and at.is_fully_addressable)


def by_part(
  leaf: jax.Array, at: Any, change: Callable[[Any], Any] = lambda part: part
) -> jax.Array:
  """An array made of the parts of another, each where it lies, in a buffer of its own.

  Args:
    leaf: the array.
    at: the new one's sharding, a mesh's, of the same parts on some of the same devices.
    change: what becomes of a part; of the same shape.
  """
  kind, devices = at.memory_kind, at.device_set
  parts = [
    jax.device_put(
      change(part.data), SingleDeviceSharding(part.device, memory_kind=kind), may_alias=False
    )
    for part in leaf.addressable_shards
    if part.device in devices
  ]
  return jax.make_array_from_single_device_arrays(leaf.shape, at, parts)


def kept(leaf: jax.Array, change: Callable[[Any], Any] = lambda part: part) -> jax.Array:
  """A copy of an array in parts that outlives it, in the host's memory: of copies, one.

  Args:
    leaf: the array, which may be donated afterwards.
    change: as `by_part` takes it.
  """
  return by_part(leaf, _once(leaf.sharding), change)


def _once(at: Any) -> NamedSharding:
  """The sharding without copies, in the memory of the host.

  Copies lie along the axes of the mesh that the array is not cut along. A process keeps one of what
  it has: Orbax asks each for a part, and takes the first copy of all.
  """
  cut = {a for entry in at.spec for a in (entry if isinstance(entry, tuple) else (entry,))}
  devices = at.mesh.devices
  processes = {device.process_index for device in devices.flat}
  for axis, name in enumerate(at.mesh.axis_names):
    if name not in cut:
      fewer = devices.take([0], axis=axis)
      if {device.process_index for device in fewer.flat} == processes:
        devices = fewer
  mesh = Mesh(devices, at.mesh.axis_names, axis_types=at.mesh.axis_types)
  return NamedSharding(mesh, at.spec, memory_kind=_host_memory(at.addressable_devices))


def _host_memory(devices: Any) -> str | None:
  """What JAX calls the host's memory beside a device; None where the device's own is that."""
  kinds = {memory.kind for device in devices for memory in device.addressable_memories()}
  on_host = all(device.platform == "cpu" for device in devices)
  return "pinned_host" if "pinned_host" in kinds and not on_host else None


def same_bits(one: Any, other: Any) -> bool:
  """Whether two arrays are the same in every bit, compared part by part where they are in parts."""
  if one.shape != other.shape or one.dtype != other.dtype:
    return False
  if not in_parts(one):
    a, b = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (one, other))
    return bool(np.array_equal(a, b))
  pairs = zip(one.addressable_shards, other.addressable_shards, strict=True)
  return all(
    a.index == b.index and same_bits(np.asarray(a.data), np.asarray(b.data)) for a, b in pairs
  )


class Together:
  """The processes that write one folder: all of them where arrays lie on other ones' devices.

  Args:
    tree: the arrays that are written; None for all processes in any case.

  Attributes:
    me: which of them this process is; 0 of those that write alone.
    count: how many there are.
  """

  def __init__(self, tree: PyTree = None) -> None:
    leaves = (leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))
    several = any(not leaf.is_fully_addressable for leaf in leaves)
    several = jax.process_count() > 1 if tree is None else several
    self.me, self.count = company() if several else (0, 1)

  def each(self, work: Callable[[], str | None], *, watched: bool = False) -> list[str]:
    """What each process has to say, once all of them have done their work.

    Args:
      work: this process's; it returns what it says.
      watched: whether it is left, in a thread of its own, as soon as another process has failed.

    Raises:
      CheckpointError: another process failed; names it, and says why. What this one raises comes.
    """
    if self.count == 1:
      return [work() or ""]
    said = _MEETINGS.each(lambda: (work() or "").encode(), CheckpointError, watched=watched)
    return [one.decode() for one in said]

  def first(self, work: Callable[[], Any]) -> None:
    """Does something in process 0 alone, for whose end the others wait: an hour, and no longer.

    What it evaluates is shared out over no other processes, since these wait.

    Raises:
      CheckpointError: it failed there.
    """

    def mine() -> None:
      if self.me == 0:
        with alone():
          work()

    self.each(mine)
