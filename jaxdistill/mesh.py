"""Where a train step is compiled and where its arrays live: `jit` over a mesh, or `pmap`.

A step is a pure function; this file is the edge at which it is compiled. Both ways offer the same
five operations (`Dispatch`), so the trainer does not know which it uses.

Under `jit` the program sees the global batch: averages, BatchNorm and losses that relate examples
are what one device gives, to rounding. Under `pmap` each device sees its share: averages are
exact through ``psum``, but BatchNorm (unless it is given ``axis_name``) and losses that relate
examples see only that share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

__all__ = ["AXIS", "Dispatch", "data_parallel", "with_jit", "with_pmap"]

AXIS = "data"

PyTree = Any


def data_parallel(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A one-axis mesh, named `AXIS`, over which batches are split.

  Args:
    devices: the devices to use; all of them by default.

  Returns:
    A mesh whose axis type is ``Auto``: the compiler propagates shardings.

  Raises:
    ValueError: there is no device.

  >>> dict(data_parallel(jax.devices()[:1]).shape)
  {'data': 1}
  """
  chosen = jax.devices() if devices is None else list(devices)
  if not chosen:
    raise ValueError("devices is empty: a mesh needs at least one device; leave it out to use all.")
  return Mesh(np.asarray(chosen), (AXIS,), axis_types=(AxisType.Auto,))


@dataclasses.dataclass(frozen=True)
class Dispatch:
  """How a chunk of steps is compiled, and how its arguments get to the devices.

  Attributes:
    devices: how many devices share a batch.
    axis_name: the axis for collectives inside the step (`pmap`), or None (`jit`).
    compile: ``run(state, teacher_variables, shared, items) -> (state, sums)`` to its compiled
      form, which donates the state.
    place: puts a tree on every device (state, variables, shared arrays).
    split: ``(items, batch_size, batch_axis)``: shares the batch axis out.
    constrain: keeps a batch's leading axis split, inside the program.
    collect: one copy of what `compile`'s function returned.
  """

  devices: int
  axis_name: str | None
  compile: Callable[[Callable[..., Any]], Callable[..., Any]]
  place: Callable[[PyTree], PyTree]
  split: Callable[[PyTree, int, int], PyTree]
  constrain: Callable[[PyTree], PyTree]
  collect: Callable[[PyTree], PyTree]


def _check_divides(batch_size: int, devices: int) -> None:
  if batch_size % devices:
    raise ValueError(
      f"batch_size={batch_size} does not divide by the {devices} devices of the mesh; "
      f"take a multiple of {devices}, or fewer devices."
    )


def _has_batch_axis(leaf: Any, batch_size: int, axis: int) -> bool:
  return np.ndim(leaf) > axis and np.shape(leaf)[axis] == batch_size


def with_jit(mesh: Mesh | None = None) -> Dispatch:
  """Compiles by `jax.jit` over a data-parallel mesh. The way to train.

  Args:
    mesh: from `data_parallel`; all devices by default.

  Returns:
    The dispatch; its compiled function donates the state.
  """
  mesh = data_parallel() if mesh is None else mesh
  devices = mesh.devices.size
  replicated = NamedSharding(mesh, PartitionSpec())

  def split(items: PyTree, batch_size: int, batch_axis: int) -> PyTree:
    _check_divides(batch_size, devices)
    spec = PartitionSpec(*([None] * batch_axis), AXIS)

    def put(leaf: Any) -> Any:
      shared_out = _has_batch_axis(leaf, batch_size, batch_axis)
      return jax.device_put(leaf, NamedSharding(mesh, spec) if shared_out else replicated)

    return jax.tree.map(put, items)

  def constrain(batch: PyTree) -> PyTree:
    if devices == 1:
      return batch
    return jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, PartitionSpec(AXIS)))

  def place(tree: PyTree) -> PyTree:
    # The compiled call donates the state: a placed tree must own its buffers, and device_put
    # hands the caller's own buffer back when it already lies where it should.
    return jax.tree.map(lambda leaf: jax.device_put(leaf, replicated, may_alias=False), tree)

  return Dispatch(
    devices=devices,
    axis_name=None,
    # The results stay where the arguments were, so the second call does not compile again.
    compile=lambda run: jax.jit(run, donate_argnums=0, out_shardings=replicated),
    place=place,
    split=split,
    constrain=constrain,
    collect=lambda tree: tree,
  )


def with_pmap(devices: Sequence[jax.Device] | None = None) -> Dispatch:
  """Compiles by `jax.pmap`, sums through ``psum`` over the axis `AXIS`.

  Args:
    devices: the devices to use; all of them by default.

  Returns:
    The dispatch; its compiled function donates the state.
  """
  mesh = data_parallel(devices)
  count = mesh.devices.size
  per_device = NamedSharding(mesh, PartitionSpec(AXIS))

  def place(tree: PyTree) -> PyTree:
    def put(leaf: Any) -> Any:
      leaf = jnp.asarray(leaf)
      return jax.device_put(jnp.broadcast_to(leaf[None], (count, *leaf.shape)), per_device)

    return jax.tree.map(put, tree)

  def split(items: PyTree, batch_size: int, batch_axis: int) -> PyTree:
    _check_divides(batch_size, count)

    def put(leaf: Any) -> Any:
      if not _has_batch_axis(leaf, batch_size, batch_axis):
        return place(leaf)
      shape = np.shape(leaf)
      parts = (*shape[:batch_axis], count, batch_size // count, *shape[batch_axis + 1 :])
      return jax.device_put(jnp.moveaxis(jnp.reshape(leaf, parts), batch_axis, 0), per_device)

    return jax.tree.map(put, items)

  return Dispatch(
    devices=count,
    axis_name=AXIS,
    compile=lambda run: jax.pmap(
      run, axis_name=AXIS, donate_argnums=0, devices=list(mesh.devices.flat)
    ),
    place=place,
    split=split,
    constrain=lambda batch: batch,
    collect=lambda tree: jax.tree.map(lambda leaf: leaf[0], tree),
  )
