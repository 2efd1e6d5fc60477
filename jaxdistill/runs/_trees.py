"""Trees to named arrays that Orbax stores as they are, and back to what a caller likes.

What lies on one device, or whole on each, goes as one array of NumPy's; what is in parts, as those.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxdistill import _check
from jaxdistill._compile import host_view
from jaxdistill.runs._files import entry
from jaxdistill.runs._manifest import first_few
from jaxdistill.runs._shards import by_part, in_parts, kept

__all__ = [
  "check_items",
  "check_like",
  "check_nan",
  "from_outline",
  "holding",
  "is_key",
  "lies_in_parts",
  "lying",
  "named_leaves",
  "outline",
  "place",
  "snapshot",
  "stored_as",
]

PyTree = Any
_LONGEST = 128  # bytes of an item's name, a folder's in a checkpoint
# What Orbax stores as it is; the other small floats and integers go as their bytes.
_NATIVE = {"bool", "complex64", "complex128", "float16", "bfloat16", "float32", "float64"} | {
  f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}


def named_leaves(item: str, tree: PyTree) -> dict[str, Any]:
  """The leaves by their path, ``params/Dense_0/kernel``."""
  named: dict[str, Any] = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    name = jax.tree_util.keystr(path, simple=True, separator="/") or "value"
    if name in named:
      raise ValueError(f"two leaves of item {item!r} have the path {name!r}; rename one.")
    named[name] = leaf
  return named


def holding(bad: str, trees: Mapping[str, PyTree]) -> list[str]:
  """Which of several trees hold numbers that are bad: all asked at once, each where it lies.

  On a CPU nothing is compiled for it and no leaf is copied; elsewhere no leaf comes to the host.

  Args:
    bad: ``"nan"``; or ``"not finite"``, which infinities are too.
    trees: arrays by what they are called. Integers, and random keys, are never bad.

  Returns:
    The names, in their order.
  """
  found = [
    (name, leaf, host_view(leaf))
    for name, tree in trees.items()
    for leaf in jax.tree.leaves(tree)
    if jnp.issubdtype(getattr(leaf, "dtype", float), jnp.inexact)
  ]
  # A program takes what lies on the same devices: some leaves may lie on a mesh, and others not. Of
  # what lies on other processes' devices, all of them ask together.
  away: dict[Any, list[tuple[str, Any]]] = {}
  for name, leaf, view in found:
    if view is None:
      away.setdefault(_devices(leaf), []).append((name, leaf))
  flags = jax.device_get([_bad_leaves(bad, [x for _, x in some]) for some in away.values()])
  names = {name for name, _, view in found if view is not None and _is_bad(np, bad, view)}
  for some, bads in zip(away.values(), flags, strict=True):
    names |= {name for (name, _), flag in zip(some, bads, strict=True) if flag}
  return [name for name in trees if name in names]


def check_nan(name: str, tree: PyTree) -> None:
  """Raises where variables hold NaN, which nobody starts from or deploys; infinities may be meant.

  Args:
    name: of the argument, which the message begins with.
    tree: arrays; they are looked at where they lie.

  Raises:
    ValueError: one holds NaN; names it.
  """
  found = jax.tree_util.tree_leaves_with_path(tree)
  for where in holding("nan", {name + jax.tree_util.keystr(path): leaf for path, leaf in found}):
    raise ValueError(f"{where} holds NaN; take a checkpoint from before the run went wrong.")


def _devices(leaf: jax.Array) -> tuple[int, ...]:
  """The devices that an array lies on, in the order of its mesh."""
  mesh = getattr(leaf.sharding, "mesh", None)
  devices = leaf.sharding.device_set if mesh is None else mesh.devices.flat
  return tuple(device.id for device in devices)


def _is_bad(xp: Any, bad: str, leaf: Any) -> Any:
  return xp.any(xp.isnan(leaf) if bad == "nan" else ~xp.isfinite(leaf))


def _bad_leaves(bad: str, leaves: list[jax.Array]) -> jax.Array:
  """A flag for each of some leaves on the same devices, known to each of them."""
  at = leaves[0].sharding
  mesh = at.mesh if isinstance(at, NamedSharding) else None
  everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
  return _flags_of(everywhere)(bad, leaves)


@functools.lru_cache(8)
def _flags_of(everywhere: NamedSharding | None) -> Any:
  # One array: each that comes to the host has to be waited for.
  return jax.jit(
    lambda bad, leaves: jnp.stack([_is_bad(jnp, bad, leaf) for leaf in leaves]),
    static_argnums=0,
    out_shardings=everywhere,
  )


def outline(tree: PyTree, path: tuple[Any, ...] = ()) -> Any:
  """The containers as JSON, so that a tree comes back without ``like``."""
  children = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)[0]
  if len(children) == 1 and not children[0][0]:
    return {"leaf": jax.tree_util.keystr(path, simple=True, separator="/") or "value"}
  inner = {
    jax.tree_util.keystr(keys, simple=True): outline(child, path + keys) for keys, child in children
  }
  if tree is None:
    return None
  if type(tree) in (list, tuple):
    return {type(tree).__name__: list(inner.values())}
  return {"dict": inner}


def from_outline(outline: Any, leaves: dict[str, Any]) -> PyTree:
  """The tree again, from its outline and its leaves by path."""
  if outline is None:
    return None
  ((kind, inner),) = outline.items()
  if kind == "leaf":
    return leaves[inner]
  if kind == "dict":
    return {name: from_outline(child, leaves) for name, child in inner.items()}
  return (tuple if kind == "tuple" else list)(from_outline(child, leaves) for child in inner)


def is_key(leaf: Any) -> bool:
  """Whether a leaf, or its shape, is of typed random keys: no array of numbers to NumPy.

  >>> is_key(jax.random.key(0)), is_key(jax.random.key_data(jax.random.key(0))), is_key(1.0)
  (True, False, False)
  """
  return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def lies_in_parts(tree: PyTree) -> bool:
  """Whether an array of a tree is cut, or lies on devices of other processes, which take part."""
  return any(isinstance(leaf, jax.Array) and in_parts(leaf) for leaf in jax.tree.leaves(tree))


def _describe(where: str, leaf: Any) -> tuple[dict[str, Any], Any]:
  """What the manifest says of a leaf, and what Orbax stores of it, copied to the host."""
  if isinstance(leaf, jax.Array):
    kind = "key" if is_key(leaf) else "jax"
    if not (leaf.is_fully_addressable or in_parts(leaf)):
      raise ValueError(
        f"{where} lies on devices of other processes by {leaf.sharding}; only what lies on a mesh "
        "(jax.sharding.NamedSharding) is saved by all of them."
      )
  elif isinstance(leaf, np.ndarray | np.generic):
    kind = "numpy"
  elif isinstance(leaf, bool | int | float | complex):
    kind = "python"
  else:
    raise TypeError(
      f"{where} is a {type(leaf).__name__}, which is no array and no number; "
      "leave it out of the items, or put it into the metadata."
    )
  value = jax.random.key_data(leaf) if kind == "key" else leaf
  if not (isinstance(value, jax.Array) and in_parts(value)):
    # A copy, since NumPy's view of a JAX array on a CPU is the buffer that is about to be donated.
    value = np.array(value, copy=True, order="C")
  record = {"kind": kind, "shape": list(np.shape(leaf)), "dtype": value.dtype.name}
  as_bytes = value.dtype.name not in _NATIVE or not value.dtype.isnative
  if kind == "key":
    record |= {"dtype": str(leaf.dtype), "impl": str(jax.random.key_impl(leaf))}
  elif as_bytes and not (
    jax.dtypes.issubdtype(value.dtype, np.number) and value.dtype.itemsize == 1
  ):
    raise TypeError(f"{where} is of dtype {value.dtype}, which cannot be stored; convert it.")
  if isinstance(value, jax.Array):
    return record, kept(value, _bytes_of) if as_bytes else kept(value)
  return record, value.view(np.uint8) if as_bytes else value


def _bytes_of(part: Any) -> np.ndarray:
  return np.asarray(part).view(np.uint8)


def snapshot(items: Mapping[str, PyTree]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
  """Everything copied to the host, and its description for the manifest.

  Of an array in parts there are copies of the parts that this process's devices hold, as an array
  of JAX's; of the others, one of NumPy's.
  """
  if not items:
    raise ValueError("items is empty: there is nothing to save.")
  for leaf in jax.tree.leaves(items):
    if isinstance(leaf, jax.Array) and not is_key(leaf) and not in_parts(leaf):
      leaf.copy_to_host_async()  # All transfers under way before the first is waited for.
  arrays: dict[str, dict[str, Any]] = {}
  described = {}
  for item, tree in items.items():
    if not isinstance(item, str) or not item.isidentifier() or item in ("AUTO", "metrics"):
      raise ValueError(f"items has the name {item!r}: not an identifier, or one Orbax reserves.")
    if len(item.encode()) > _LONGEST:
      raise ValueError(
        f"items has a name of {len(item.encode())} bytes, {_check.show(item)}: a folder is called "
        f"so, and {_LONGEST} are the most."
      )
    leaves = {n: _describe(f"{item}/{n}", leaf) for n, leaf in named_leaves(item, tree).items()}
    described[item] = {
      "outline": outline(tree),
      "leaves": {name: record for name, (record, _) in leaves.items()},
    }
    # Orbax refuses empty arrays and empty trees; the manifest is enough to make them again.
    arrays[item] = {name: value for name, (_, value) in leaves.items() if value.size}
  return {item: stored for item, stored in arrays.items() if stored}, described


_KINDS = ("jax", "key", "numpy", "python")


def check_items(items: Any) -> dict[str, Any]:
  """What a manifest says of a checkpoint's items, if `snapshot` might have said it.

  Raises:
    ValueError: it follows the file's name in a sentence.
  """
  for item, described in entry({"items": items}, "items", dict).items():
    if not item.isidentifier():
      raise ValueError(f"has {item!r:.100} where the name of an item belongs")
    leaves = entry(described, "leaves", dict)
    for name, record in leaves.items():
      where = f"has for {item}/{name}".replace("\n", " ")[:100]
      shape = entry(record, "shape", list)
      entry(record, "dtype", str)
      if not all(type(n) is int and 0 <= n < 2**31 for n in shape):
        raise ValueError(f"{where} the shape {shape!r:.100}")
      if entry(record, "kind", str) not in _KINDS:
        raise ValueError(f"{where} the kind {record['kind']!r:.100}")
      try:
        stored_as(record)
      except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{where} what is no array ({error})") from error
  return items


def stored_as(record: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
  """What Orbax has of a leaf that the manifest describes; of an empty one, nothing."""
  shape = tuple(record["shape"])
  if record["kind"] == "key":
    data = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=record["impl"])))
    return jax.ShapeDtypeStruct((*shape, *data.shape), data.dtype)
  dtype = jnp.dtype(record["dtype"])
  if dtype.kind != "b" and not jax.dtypes.issubdtype(dtype, np.number):
    raise ValueError(f"dtype {dtype}")
  return jax.ShapeDtypeStruct(shape, dtype if dtype.name in _NATIVE else np.uint8)


def lying(record: Mapping[str, Any], like: Any) -> jax.ShapeDtypeStruct | None:
  """How Orbax reads a leaf part by part, to where its like lies; None of one that is whole."""
  if like is None or not in_parts(like) or 0 in record["shape"]:
    return None
  stored = stored_as(record)
  if stored.dtype != jax.dtypes.canonicalize_dtype(stored.dtype):
    return None  # `place` refuses it
  at = NamedSharding(like.sharding.mesh, like.sharding.spec)
  return stored.update(sharding=at)


def place(where: str, record: dict[str, Any], stored: Any, like: Any) -> Any:
  """A leaf as its like is, or, where that is None, as it was when it was saved."""
  if isinstance(stored, jax.Array):  # it lies there already
    if record["kind"] == "key":
      return jax.random.wrap_key_data(stored, impl=record["impl"])
    dtype = jnp.dtype(record["dtype"])
    same = stored.dtype == dtype
    return stored if same else by_part(stored, stored.sharding, lambda x: np.asarray(x).view(dtype))
  if record["kind"] == "key":
    if stored is None:
      stored = np.zeros(stored_as(record).shape, np.uint32)
    value = jax.random.wrap_key_data(jax.device_put(stored), impl=record["impl"])
  else:
    dtype = jnp.dtype(record["dtype"])
    value = np.zeros(record["shape"], dtype) if stored is None else stored.view(dtype)
  if like is None and record["kind"] != "jax":
    return value.item() if record["kind"] == "python" else value
  if isinstance(like, bool | int | float | complex):
    return type(like)(value.item())
  if isinstance(like, np.ndarray | np.generic):
    return value if isinstance(like, np.ndarray) else value[()]
  committed = not isinstance(like, jax.Array) or like.committed
  sharding = getattr(like, "sharding", None) if committed else None
  if not is_key(value) and value.dtype != jax.dtypes.canonicalize_dtype(value.dtype):
    if like is None:
      return value
    raise ValueError(f"{where} was saved as {value.dtype}: enable jax_enable_x64 to restore it.")
  if sharding is None:
    # Uncommitted, as a fresh array is: jit may move it to where the others are.
    return value if is_key(value) else jax.device_put(value, may_alias=False)
  return jax.device_put(value, sharding, may_alias=False)


def check_like(item: str, folder: pathlib.Path, records: dict[str, Any], like: Any) -> None:
  """Compares paths, shapes and dtypes with what the manifest says."""
  where = f"item {item!r} of the checkpoint {folder}"
  lacking, unknown = sorted(set(records) - set(like)), sorted(set(like) - set(records))
  if lacking or unknown:
    raise ValueError(
      f"{where} has another structure than like. Only in the checkpoint: {first_few(lacking)}. "
      f"Only in like: {first_few(unknown)}. Likely the network, the objective or the optimiser is "
      "not the one that was saved."
    )
  for name, record in records.items():
    leaf, saved, dtype = like[name], tuple(record["shape"]), record["dtype"]
    number = not hasattr(leaf, "dtype")
    shape, wanted = np.shape(leaf), str(np.asarray(leaf).dtype if number else leaf.dtype)
    if shape != saved:
      raise ValueError(
        f"{where}: {name} has the shape {saved} in the checkpoint and {shape} in like. Likely "
        + _likely(saved, shape)
      )
    if in_parts(leaf):
      try:
        leaf.sharding.shard_shape(saved)
      except ValueError as error:
        raise ValueError(
          f"{where}: {name} {list(saved)} does not divide as like has it, {leaf.sharding.spec} on "
          f"the mesh {dict(leaf.sharding.mesh.shape)}; leave that axis whole."
        ) from error
    # A Python number has a kind, but no width of its own.
    same = wanted == dtype or (number and wanted.rstrip("0123456789") == dtype.rstrip("0123456789"))
    if not same:
      raise ValueError(
        f"{where}: {name} has the dtype {dtype} in the checkpoint and {wanted} in like (shape "
        f"{saved}). Likely another precision (param_dtype, jax_enable_x64), or a typed key "
        "(jax.random.key) against a raw one (jax.random.PRNGKey)."
      )


def _likely(saved: tuple[int, ...], shape: tuple[int, ...]) -> str:
  longer, shorter = sorted((saved, shape), key=len, reverse=True)
  if len(longer) == len(shorter) + 1 and longer[1:] == shorter:
    return "one has an axis of devices (pmap) or of a sweep (vmap) in front, the other has not."
  if len(saved) == len(shape) and saved[:-1] == shape[:-1]:
    return "another number of classes, or another width, than was saved."
  return "another architecture, width or input size than was saved."
