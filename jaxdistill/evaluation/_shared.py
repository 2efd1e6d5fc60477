"""The batches of a split shared out over the processes of a program, and what came of them.

The p-th of P processes takes every P-th batch. What each has made is told to all of them as bytes,
and added up by each in the order of the batches: the numbers are those of one process, to the bit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxdistill import runs
from jaxdistill._among import Meetings, company
from jaxdistill._compile import quarter
from jaxdistill._devices import mesh_of

__all__ = ["Rows", "everywhere", "gathered", "over", "share", "whole"]

PyTree = Any
_MEETINGS = Meetings("evaluation")


def share(count: int, *, every: bool = False) -> Sequence[int]:
  """The numbers of the batches that this process takes, as many as every other one does.

  Where they do not come out even, some take the first ones again: what they make is left out.

  Args:
    count: how many batches there are.
    every: whether each process takes all, as where a network lies in parts over several.
  """
  me, processes = (0, 1) if every else company()
  return [number % count for number in range(me, me + count, processes)]


def gathered(work: Callable[[], list[PyTree]], count: int, *, every: bool = False) -> list[PyTree]:
  """What all processes made of their batches, in the order of the batches.

  Args:
    work: makes a pytree of each batch of `share`, all of the same structure, shapes and dtypes.
    count: how many batches there are.
    every: as `share` takes it.

  Returns:
    Pytrees of the host's arrays; where each process takes all, what ``work`` made, as it is.

  Raises:
    RuntimeError: another process failed; says which, and why.
  """
  if every or company()[1] == 1:
    return work()
  made: list[PyTree] = []

  def mine() -> bytes:
    made.extend(jax.device_get(work()))
    return b""

  _MEETINGS.each(mine, RuntimeError)
  leaves, structure = jax.tree.flatten(made[0])
  told = b"".join(np.ascontiguousarray(x).tobytes() for one in made for x in jax.tree.leaves(one))
  parts = [memoryview(one) for one in _MEETINGS.gathered(told)]
  size = len(told) // len(made)

  def tree(number: int) -> PyTree:
    own, begin = parts[number % len(parts)], number // len(parts) * size
    found = []
    for leaf in leaves:
      piece = np.frombuffer(own[begin : begin + leaf.nbytes], leaf.dtype)
      found.append(piece.reshape(leaf.shape))
      begin += leaf.nbytes
    return jax.tree.unflatten(structure, found)

  return [tree(number) for number in range(count)]


def over(tree: PyTree) -> NamedSharding | None:
  """All devices of the mesh on which something of a tree lies, where other processes have some."""
  mesh = mesh_of(tree)
  at = None if mesh is None else NamedSharding(mesh, PartitionSpec())
  return None if at is None or at.is_fully_addressable else at


def whole(tree: PyTree, at: NamedSharding) -> PyTree:
  """What a program over several processes gave back, whole in each of them."""
  return jax.jit(_same, out_shardings=at)(tree)


def _same(tree: PyTree) -> PyTree:
  return tree


def everywhere(tree: PyTree, at: NamedSharding) -> PyTree:
  """A tree where a program over the devices of several processes can read it.

  Args:
    tree: arrays that are the same in every process, or their shapes; what lies on devices of
      several already stays as it is.
    at: where to. Nothing is communicated.
  """

  def put(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
      there = leaf.sharding
      return leaf if there and not there.is_fully_addressable else leaf.update(sharding=at)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      return leaf
    if runs.is_key(leaf):
      words = put(jax.random.key_data(leaf))
      return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, at, lambda index: host[index])

  return jax.tree.map(put, tree)


class Rows:
  """What is said of all batches, ``[N, ...]``: in memory, or in a file where that would be much.

  The file lies where the system keeps temporary ones, has no name, and goes with the arrays.

  Args:
    count: N.
    most: bytes that may be in memory; by default a quarter of what the machine has.
  """

  def __init__(self, count: int, most: int | None = None) -> None:
    self._count, self._most = count, quarter("host") if most is None else most
    self._arrays: list[np.ndarray] = []
    self._structure: Any = None

  def put(self, number: int, tree: PyTree) -> None:
    """Keeps what was said of one batch."""
    leaves, self._structure = jax.tree.flatten(tree)
    if not self._arrays:
      size = self._count * sum(leaf.nbytes for leaf in leaves)
      self._arrays = [self._empty(leaf, in_file=size > self._most) for leaf in leaves]
    for array, leaf in zip(self._arrays, leaves, strict=True):
      array[number] = leaf

  def _empty(self, leaf: np.ndarray, *, in_file: bool) -> np.ndarray:
    shape = (self._count, *leaf.shape)
    if not in_file or leaf.size == 0:
      return np.empty(shape, leaf.dtype)
    with tempfile.TemporaryFile() as file:  # closed, it stays for as long as it is mapped
      return np.memmap(file, leaf.dtype, "w+", shape=shape)

  @property
  def tree(self) -> PyTree:
    """All of it."""
    return jax.tree.unflatten(self._structure, self._arrays)
