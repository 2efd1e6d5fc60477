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
        f"in every chunk: give at least {batch}, or smaller batches (accumulate=...)."
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

  def cut(self, tree: PyTree, i: Any) -> PyTree:
    """A chunk of the leaves ``[B, L, ...]``; others as they are."""

    def part(leaf: Any) -> Any:
      if jnp.shape(leaf)[:2] != (self.batch, self.length):
        return leaf
      return jax.lax.dynamic_slice_in_dim(jnp.asarray(leaf), self.start(i), self.size, axis=1)

    return jax.tree.map(part, tree)

  def add(self, whole: jax.Array, part: jax.Array, i: Any) -> jax.Array:
    """An array ``[B, L, ...]`` with what a chunk of it ``[B, size, ...]`` adds."""
    there = jax.lax.dynamic_slice_in_dim(whole, self.start(i), self.size, axis=1)
    return jax.lax.dynamic_update_slice_in_dim(whole, there + part, self.start(i), axis=1)
