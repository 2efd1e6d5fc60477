"""What tells one tree of variables from another: integers, so the same on every device."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.runs._trees import is_key

__all__ = ["checksum", "fingerprint", "short_digest", "tree_identity"]

PyTree = Any


def _mixed(xp: Any, words: Any) -> Any:
  """Two sums of the scrambled words, each with its place: integers, so exact on every device."""
  words = words.reshape(-1)
  words = words + xp.arange(words.size, dtype=xp.uint32) * xp.uint32(0x9E3779B9)
  sums = []
  for factor in (0x85EBCA6B, 0xC2B2AE35):
    words = (words ^ (words >> xp.uint32(16))) * xp.uint32(factor)
    words = words ^ (words >> xp.uint32(13))
    sums.append(xp.sum(words, dtype=xp.uint32))
  return xp.stack(sums)


def _words(xp: Any, leaf: Any) -> Any:
  """An array's bits as 32-bit words."""
  size = leaf.dtype.itemsize
  if leaf.dtype == bool:
    return leaf.astype(xp.uint32)
  if xp is np:
    view = np.ascontiguousarray(leaf).reshape(-1).view(f"u{min(size, 4)}")
    return view.astype(np.uint32)
  if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
    leaf = jnp.stack([leaf.real, leaf.imag], axis=-1)
  kind = {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32)
  return jax.lax.bitcast_convert_type(leaf, kind).astype(jnp.uint32)


@jax.jit
def _sums(leaves: list[Any]) -> list[Any]:
  return [_mixed(jnp, _words(jnp, leaf)) for leaf in leaves]


def checksum(variables: PyTree) -> str:
  """A digest of a tree's values, summed up where they lie.

  Args:
    variables: arrays.

  Returns:
    16 hexadecimal digits, the same on every device.

  >>> checksum({"a": jnp.zeros(3)}) == checksum({"a": jnp.zeros(3).at[0].set(1e-30)})
  False
  """
  leaves = [
    jax.random.key_data(leaf) if is_key(leaf) else jnp.asarray(leaf)
    for leaf in jax.tree.leaves(variables)
  ]
  if jax.default_backend() == "cpu":  # the memory is the host's, and there is nothing to compile
    found = [_mixed(np, _words(np, np.asarray(leaf))) for leaf in leaves]
  else:
    found = jax.device_get(_sums(leaves))
  joined = b"".join(np.asarray(one, "<u4").tobytes() for one in found)
  return hashlib.sha256(joined).hexdigest()[:16]


def tree_identity(variables: PyTree) -> dict[str, Any]:
  """Paths, shapes, dtypes and checksum of a tree of variables: what a cache says of its teacher."""
  leaves = [
    [jax.tree_util.keystr(path, simple=True, separator="/"), list(np.shape(leaf)), str(leaf.dtype)]
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.tree.map(jnp.asarray, variables))
  ]
  return {"leaves": leaves, "checksum": checksum(variables)}


def short_digest(*parts: Any) -> str:
  """16 hexadecimal digits of what JSON holds."""
  return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint(tree: PyTree) -> str:
  """A digest of a pytree's paths, shapes, dtypes and values, which are summed up where they lie.

  Args:
    tree: arrays, typed keys or numbers; 64 bits of NumPy's count whole, though JAX would drop half.

  Returns:
    16 hexadecimal digits, the same on every device.

  >>> fingerprint({"a": np.zeros(2)}) == fingerprint({"a": np.array([0, 1e-300])})
  False
  >>> fingerprint({"a": {"b": np.zeros(2)}}) == fingerprint({"a/b": np.zeros(2)})
  False
  """
  named = [
    (jax.tree_util.keystr(path), leaf if isinstance(leaf, jax.Array) else np.asarray(leaf))
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  ]
  about = [[path, list(leaf.shape), str(leaf.dtype)] for path, leaf in named]
  return short_digest(about, checksum([_whole(leaf) for _, leaf in named]))


def _whole(leaf: Any) -> Any:
  """A leaf, but NumPy's 64-bit words as pairs of 32 bits, which JAX takes as they are."""
  if isinstance(leaf, np.ndarray) and leaf.dtype.itemsize > 4:
    return np.ascontiguousarray(leaf).reshape(-1).view(np.uint32)
  return leaf
