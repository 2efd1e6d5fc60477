"""What tells one tree of variables from another: integers, so the same on every device."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxdistill._compile import host_view
from jaxdistill.runs._trees import is_key, outline

__all__ = ["checksum", "fingerprint", "short_digest", "tree_identity"]

PyTree = Any
# Words that the host adds up at a time: what is made of them on the way stays in a core's cache.
_BLOCK = 2**15


def _scrambled(xp: Any, words: Any, place: Any) -> Any:
  """Two sums of 32-bit words, each scrambled with its place.

  Sums of integers are exact in any order, so neither the device nor the sharding changes them.
  """
  words, sums = words + place * xp.uint32(0x9E3779B9), []
  for factor in (0x85EBCA6B, 0xC2B2AE35):
    words = (words ^ (words >> xp.uint32(16))) * xp.uint32(factor)
    words = words ^ (words >> xp.uint32(13))
    sums.append(xp.sum(words, dtype=xp.uint32))
  return xp.stack(sums)


def _sums(leaf: Any) -> Any:
  """An array's sums where it lies; not reshaped, which would gather one that is split."""
  if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
    leaf = jnp.stack([leaf.real, leaf.imag], axis=-1)
  if leaf.dtype == bool:
    words = leaf.astype(jnp.uint32)
  else:
    kind = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    words = jax.lax.bitcast_convert_type(leaf, kind).astype(jnp.uint32)
  place, stride = jnp.zeros(words.shape, jnp.uint32), 1
  for axis in reversed(range(words.ndim)):
    along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    place, stride = place + along * jnp.uint32(stride % 2**32), stride * words.shape[axis]
  return _scrambled(jnp, words, place)


_compiled = jax.jit(_sums)


def _summed(leaf: Any) -> Any:
  """The sums of a leaf; of one on other processes' devices too, on each of them."""
  leaf = jax.random.key_data(leaf) if is_key(leaf) else leaf
  here = host_view(leaf)
  if here is not None:  # nothing has to be compiled, which takes longer than to add up
    flat = np.ascontiguousarray(here).reshape(-1)
    # 64 bits are pairs of 32: JAX would drop half of NumPy's.
    words = flat if flat.dtype == bool else flat.view(f"u{min(flat.dtype.itemsize, 4)}")
    sums, places = np.zeros(2, np.uint32), np.arange(_BLOCK, dtype=np.uint32)
    with np.errstate(over="ignore"):
      for first in range(0, words.size, _BLOCK):
        some = words[first : first + _BLOCK].astype(np.uint32)
        place = places[: some.size] + np.uint32(first % 2**32)
        sums = sums + _scrambled(np, some, place)
    return sums
  sharding = leaf.sharding
  if isinstance(sharding, NamedSharding) and not sharding.is_fully_addressable:
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.jit(_sums, out_shardings=everywhere)(leaf)
  return _compiled(leaf)


def checksum(variables: PyTree) -> str:
  """A digest of a tree's values, summed up where they lie: there is no copy on the host.

  Args:
    variables: arrays of any sharding, typed keys, or NumPy arrays.

  Returns:
    16 hexadecimal digits, the same on every device, of every sharding and number of devices.

  >>> checksum({"a": jnp.zeros(3)}) == checksum({"a": jnp.zeros(3).at[0].set(1e-30)})
  False
  """
  found = jax.device_get([_summed(leaf) for leaf in jax.tree.leaves(variables)])
  joined = b"".join(np.asarray(one, "<u4").tobytes() for one in found)
  return hashlib.sha256(joined).hexdigest()[:16]


def _identity(tree: PyTree) -> dict[str, Any]:
  leaves = [
    [jax.tree_util.keystr(path, simple=True, separator="/"), list(leaf.shape), str(leaf.dtype)]
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  ]
  return {"leaves": leaves, "checksum": checksum(tree)}


def tree_identity(variables: PyTree) -> dict[str, Any]:
  """Paths, shapes, dtypes and checksum of a tree of variables: what a cache says of its teacher.

  Args:
    variables: arrays of any sharding, typed keys, NumPy arrays or numbers, in the dtypes that JAX
      computes with.
  """
  return _identity(jax.tree.map(jnp.asarray, variables))


def short_digest(*parts: Any) -> str:
  """16 hexadecimal digits of what JSON holds."""
  return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint(tree: PyTree) -> str:
  """A digest of a pytree's containers, paths, shapes, dtypes and values, summed up where they lie.

  Args:
    tree: arrays of any sharding, typed keys or numbers; 64 bits of NumPy's count whole, though JAX
      would drop half.

  Returns:
    16 hexadecimal digits, the same on every device, of every sharding and number of devices.

  >>> fingerprint({"a": np.zeros(2)}) == fingerprint({"a": np.array([0, 1e-300])})
  False
  >>> fingerprint({"a": {"b": np.zeros(2)}}) == fingerprint({"a/b": np.zeros(2)})
  False
  """
  whole = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.asarray(x), tree)
  return short_digest(outline(whole), _identity(whole))
