"""Tokens in chunks of positions, so that what is large of each is never there of all at once."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["Chunks"]

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Chunks:
  """Tokens ``[B, L]`` cut along L, with all of B in each chunk, so that no device's rows move.

  The last chunk is as long as the others and goes back for it: where L does not divide, it has
  positions that were in the one before, and `fresh` tells them apart. Nothing is padded or copied.

  Positions may be taken in another order, each row in its own: ``order`` ``[B, L]`` of `packed`,
  which has those that count in front. No row leaves its device for it.

  Attributes:
    batch: B.
    length: L.
    size: positions in a chunk.

  >>> chunks = Chunks.of((2, 5), tokens=4)
  >>> x = jnp.arange(10).reshape(2, 5)
  >>> [chunks.cut(x, i)[0].tolist() for i in range(chunks.count)], chunks.fresh(2).tolist()
  ([[0, 1], [2, 3], [3, 4]], [False, True])
  """

  batch: int
  length: int
  size: int

  @classmethod
  def of(cls, shape: tuple[int, ...], *, tokens: int, name: str = "tokens_at_once") -> Chunks:
    """Chunks of as many tokens, or of up to B - 1 more where they do not divide by B.

    Args:
      shape: ``(B, L)``, or longer.
      tokens: in a chunk.
      name: what the number is called in a message.

    Raises:
      ValueError: it is below B.
    """
    batch, length = shape[:2]
    if tokens < batch:
      raise ValueError(
        f"{name}={tokens} is below the {batch} examples of a batch, each of which has a position "
        f"in every chunk: give at least {batch}, or micro-batches (train.with_jit(accumulate=...))."
      )
    return cls(batch, length, min(-(-tokens // batch), length))

  @property
  def count(self) -> int:
    """How many chunks there are."""
    return -(-self.length // self.size)

  def start(self, i: Any) -> jax.Array:
    """The first position of a chunk."""
    return jnp.minimum(jnp.asarray(i, jnp.int32) * self.size, self.length - self.size)

  def fresh(self, i: Any) -> jax.Array:
    """Which positions of a chunk ``[size]`` no chunk before it had."""
    return self.start(i) + jnp.arange(self.size) >= jnp.asarray(i, jnp.int32) * self.size

  def cut(self, tree: PyTree, i: Any, order: Any = None) -> PyTree:
    """A chunk of the leaves ``[B, L, ...]``; others as they are."""

    def sliced(leaf: Any) -> jax.Array:
      return jax.lax.dynamic_slice_in_dim(jnp.asarray(leaf), self.start(i), self.size, axis=1)

    def part(leaf: Any) -> Any:
      if jnp.shape(leaf)[:2] != (self.batch, self.length):
        return leaf
      if order is None:
        return sliced(leaf)
      picked = jax.vmap(lambda row, at: row.at[at].get(mode="promise_in_bounds"))
      return picked(jnp.asarray(leaf), sliced(order))

    return jax.tree.map(part, tree)

  def add(self, whole: jax.Array, part: jax.Array, i: Any, order: Any = None) -> jax.Array:
    """An array ``[B, L, ...]`` with what a chunk of it ``[B, size, ...]`` adds."""
    if order is not None:
      known = {"unique_indices": True, "mode": "promise_in_bounds"}
      added = jax.vmap(lambda row, at, more: row.at[at].add(more, **known))
      return added(whole, self.cut(order, i), part)
    there = jax.lax.dynamic_slice_in_dim(whole, self.start(i), self.size, axis=1)
    return jax.lax.dynamic_update_slice_in_dim(whole, there + part, self.start(i), axis=1)

  def joined(self, parts: jax.Array) -> jax.Array:
    """The whole ``[B, L]`` of all chunks' parts ``[chunks, B, size]``.

    >>> chunks = Chunks.of((2, 5), tokens=4)
    >>> x = jnp.arange(10).reshape(2, 5)
    >>> parts = jnp.stack([chunks.cut(x, i) for i in range(chunks.count)])
    >>> chunks.joined(parts).tolist() == x.tolist()
    True
    """
    before, last = (self.count - 1) * self.size, self.length - (self.count - 1) * self.size
    flat = jnp.moveaxis(parts, 0, 1).reshape(self.batch, -1)
    return jnp.concatenate([flat[:, :before], flat[:, -last:]], axis=1)

  def packed(self, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Positions with those that count in front, and how many chunks hold all of these.

    Args:
      counts: which positions count, booleans ``[B, L]``.

    Returns:
      ``(order, chunks)``: ``[B, L]``, each row by itself and otherwise in its order; and a number,
      0 where nothing counts.

    >>> order, count = Chunks.of((1, 4), tokens=2).packed(jnp.array([[False, True, False, True]]))
    >>> order.tolist(), count.item()
    ([[1, 3, 0, 2]], 1)
    """
    order = jnp.argsort(~counts, axis=1, stable=True)
    most = jnp.max(jnp.sum(counts, axis=1, dtype=jnp.int32))
    return order, (most + self.size - 1) // self.size
