"""Weights that other programs wrote, as variables of ours: Orbax, Flax's msgpack, safetensors.

Each reader returns ``{"params": ..., "batch_stats": ...}``, which a network of
`jaxdistill.networks` takes. With ``like`` (the variables of such a network, or their shapes) every
leaf is compared, and the result has its structure and its float dtypes. Nothing is unpickled.

A network from PyTorch has its axes in another order, which `linear` and `convolution` turn.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import _check, _extras, runs
from jaxdistill.runs import CheckpointError, first_few, listing, named_leaves

__all__ = [
  "Tensor",
  "as_like",
  "convolution",
  "linear",
  "msgpack",
  "opened",
  "orbax",
  "safetensors",
  "save_safetensors",
]

PyTree = Any
Collections = Sequence[str] | Mapping[str, str]
Function = Callable[[np.ndarray], Any]
# Where a tensor goes, or where and through which function; None skips it.
Place = str | tuple[str, Function] | None
Names = Mapping[str, Place] | Callable[[str], Place]
_SUFFIX = ".safetensors"
_INDEX = ".safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# What the library stores and NumPy reads back.
_STORED = {"bool", "bfloat16", "float16", "float32", "float64", "complex64"} | {
  f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}


def orbax(
  path: str | os.PathLike[str],
  *,
  collections: Collections = ("params", "batch_stats"),
  like: PyTree | None = None,
) -> PyTree:
  """Reads variables from a checkpoint that another program wrote with Orbax.

  It may be the folder of a `StandardCheckpointer` or `PyTreeCheckpointer` (of a `TrainState`, of
  variables, of parameters alone), of the v1 calls, or of a `CheckpointManager`, of which the last
  step is taken. The rest of it, such as an optimiser's state, is not read. On how many devices it
  was saved makes no difference.

  Args:
    path: the checkpoint's folder.
    collections: names, each searched for at any depth outside of optimisers: the first must be
      there, others that are nowhere are left out, as a network without BatchNorm has no
      ``batch_stats``. A tree of nothing but modules counts as ``params`` itself. Or a mapping from
      names to paths, such as ``{"params": "state/ema_params"}``, when they lie elsewhere or at
      several places; ``""`` means the whole tree.
    like: variables, or their shapes (``jax.eval_shape(network.init, key, inputs)``), that the
      checkpoint must fit: the same paths and shapes. Floats become like's float dtype, rounded to
      it; other dtypes must hold the values. Leaves go to like's sharding where it has one.

  Returns:
    The variables, as ``like`` or as nested dictionaries of arrays, uncommitted. Without ``like``,
    64 bits that JAX has not enabled stay NumPy's.

  Raises:
    FileNotFoundError: there is nothing at ``path``.
    ValueError: it is no checkpoint of Orbax's, it is one of ours, it lacks a collection or has one
      at several places, or it does not fit ``like``.
    CheckpointError: it is damaged.

  >>> import tempfile
  >>> from jaxdistill.runs import _orbax
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   _orbax.write(pathlib.Path(folder, "a"), {"params": {"kernel": np.ones(2, np.float32)}})
  ...   orbax(f"{folder}/a")["params"]["kernel"].tolist()
  [1.0, 1.0]
  """
  expected = sum(8 * math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(like))  # or fewer bits
  variables = runs.read_foreign_orbax(path, collections, expected)
  return _finish(f"the checkpoint {os.fspath(path)}", variables, like)


def msgpack(
  path: str | os.PathLike[str],
  *,
  collections: Collections = ("params", "batch_stats"),
  like: PyTree | None = None,
) -> PyTree:
  """Reads variables from a file of `flax.serialization.to_bytes` (``.msgpack``).

  Args:
    path: the file; it holds variables, parameters alone, or a whole `TrainState`.
    collections: names, each searched for at any depth outside of optimisers, of which the first
      must be there; or a mapping from names to paths, where ``""`` is the whole tree.
    like: variables or shapes that the file must fit: the same paths and shapes. Floats become
      like's float dtype; leaves go to like's sharding where it has one.

  Returns:
    The variables, as from `orbax`.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is a folder or a pickle, it lacks a collection or has one at several places, or
      it does not fit ``like``.
    CheckpointError: the file is truncated, or no msgpack.

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   file = pathlib.Path(folder, "a.msgpack")
  ...   _ = file.write_bytes(flax.serialization.to_bytes({"Dense_0": {"bias": jnp.zeros(2)}}))
  ...   msgpack(file)["params"]["Dense_0"]["bias"].shape
  (2,)
  """
  file = _existing(path)
  if file.is_dir():
    raise ValueError(
      f"path={file} is a folder, and msgpack is one file; is it networks.weights.orbax?"
    )
  _refuse_pickle(file)
  try:
    tree = flax.serialization.msgpack_restore(file.read_bytes())
  except Exception as error:
    raise CheckpointError(
      f"path={file} is truncated, or no msgpack of Flax's: {error or type(error).__name__}"
    ) from error
  if not isinstance(tree, dict):
    raise ValueError(f"path={file} holds a {type(tree).__name__}, not variables.")
  leaves = {
    tuple(jax.tree_util.keystr((key,), simple=True) for key in keys): leaf
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
  }
  # A TrainState holds parameters twice more, as the optimiser's moments: those are passed over.
  found = runs.find_collections(leaves, collections, f"the file {file}")
  wanted = {
    (name, *place[len(start) :]): leaf
    for name, start in found.items()
    for place, leaf in leaves.items()
    if place[: len(start)] == start
  }
  return _finish(f"the file {file}", runs.nested_dicts(wanted), like)


def safetensors(
  path: str | os.PathLike[str], names: Names | None = None, *, like: PyTree | None = None
) -> PyTree:
  """Reads variables from safetensors, PyTorch's for instance, by a map of names.

  The map says for each tensor of the file where it goes, and must name all of them: a tensor that
  is forgotten is an error, one that is not wanted is mapped to None. From PyTorch:

  - ``Linear.weight`` through `linear`, ``Conv.weight`` through `convolution`;
  - ``BatchNorm.weight`` is Flax's ``scale``, ``running_mean`` and ``running_var`` are
    ``batch_stats/.../mean`` and ``var``, and ``num_batches_tracked`` has no counterpart;
  - a linear map after a flattened image has its inputs in the order of channels, rows, columns
    there, and rows, columns, channels here: reorder them in a function of your own.

  Args:
    path: a file, an index (``...safetensors.index.json``) of several, or a folder that holds them.
    names: the file's name of a tensor to a path of ours, ``"params/Dense_0/kernel"``, or to
      ``(path, function)`` where the function takes and returns an array; or a function from the
      name to those. None takes the file's names as paths, as `save_safetensors` writes them.
    like: variables or shapes that the result must fit: the same paths and shapes. Floats become
      like's float dtype; leaves go to like's sharding where it has one.

  Returns:
    The variables, as from `orbax`.

  Raises:
    FileNotFoundError: there is nothing at ``path``, or a file that the index names is missing.
    TypeError: ``names`` gives something else than a path, a path and a function, or None.
    ValueError: the map and the file name different tensors, two go to one path, a function does not
      fit its tensor, the result does not fit ``like``, or the file is a pickle.
    CheckpointError: a file is truncated, or no safetensors.

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   file = f"{folder}/a.safetensors"
  ...   save_safetensors(file, {"fc.weight": np.zeros((3, 4), np.float32)})
  ...   variables = safetensors(file, {"fc.weight": ("params/Dense_0/kernel", linear)})
  >>> variables["params"]["Dense_0"]["kernel"].shape
  (4, 3)
  """
  with opened(path) as there:
    place = _check.folder("path", path)
    result: dict[tuple[str, ...], Any] = {}
    for target, (tensor, function) in _targets(place, there, names).items():
      result[target] = _tensor(there[tensor], tensor, function)
  return _finish(f"the tensors of {place}", runs.nested_dicts(result), like)


class Tensor(NamedTuple):
  """A tensor of a safetensors file that is open.

  Attributes:
    shape: as the file has it.
    read: reads it into memory; only now.
  """

  shape: tuple[int, ...]
  read: Callable[[], np.ndarray]


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[dict[str, Tensor]]:
  """Opens safetensors for reading one tensor after the other, so that never all are in memory.

  Args:
    path: a file, an index (``...safetensors.index.json``) of several, or a folder that holds them.

  Yields:
    The tensors of all files by name.

  Raises:
    FileNotFoundError: there is nothing at ``path``, or a file that the index names is missing.
    ValueError: a tensor is in two files, or a file is a pickle.
    CheckpointError: a file is truncated, or no safetensors, or lacks what the index says it has.

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   save_safetensors(f"{folder}/a.safetensors", {"fc.weight": np.zeros((3, 4), np.float32)})
  ...   with opened(folder) as tensors:
  ...     tensors["fc.weight"].shape, tensors["fc.weight"].read().dtype.name
  ((3, 4), 'float32')
  """
  _extras.need("networks.weights.safetensors", "safetensors")
  place = _existing(path)
  with contextlib.ExitStack() as stack:
    # Handles, no arrays: a tensor is read when its turn comes.
    there: dict[str, Tensor] = {}
    files, promised = _shards(place)
    for file in files:
      for name, handle in _open(file, stack):
        if name in there:
          raise ValueError(f"path={place}: {name!r} is in two of its files; name one file.")
        shape = tuple(handle.get_slice(name).get_shape())
        there[name] = Tensor(shape, functools.partial(_read, place, handle, name))
    if promised - set(there):
      missing = first_few(sorted(promised - set(there)))
      raise CheckpointError(f"the index of {place} names tensors that no file has: {missing}.")
    yield there


def save_safetensors(
  path: str | os.PathLike[str], variables: PyTree, *, metadata: Mapping[str, str] | None = None
) -> None:
  """Saves variables as one safetensors file, each leaf under its path; whole or not at all.

  Lists come back from `safetensors` as dictionaries, and collections without leaves not at all.

  Args:
    path: the file, ``.safetensors``; one that is there is replaced.
    variables: a pytree of arrays, such as ``{"params": ..., "batch_stats": ...}``.
    metadata: words for the file's header; ``{"format": "pt"}`` is what transformers looks for.

  Raises:
    TypeError: a leaf is no array of a dtype that the format has.
    ValueError: the file has another suffix, or two leaves one path.

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   save_safetensors(f"{folder}/a.safetensors", {"params": {"bias": jnp.ones(2)}})
  ...   safetensors(f"{folder}/a.safetensors")["params"]["bias"].tolist()
  [1.0, 1.0]
  """
  _extras.need("networks.weights.save_safetensors", "safetensors")
  import safetensors.numpy

  file = _check.folder("path", path)
  if file.suffix != _SUFFIX or file.is_dir():
    raise ValueError(f"path={file} must end in {_SUFFIX}, and be no folder.")
  arrays = {}
  for name, leaf in named_leaves("variables", variables).items():
    if str(getattr(leaf, "dtype", type(leaf).__name__)) not in _STORED:
      kind = getattr(leaf, "dtype", type(leaf).__name__)
      raise TypeError(f"{name} is of {kind}, which safetensors cannot hold; convert or drop it.")
    # The library writes the buffer as it lies, so it must lie in order; and 0-d must stay 0-d.
    arrays[name] = np.array(leaf, order="C")
  file.parent.mkdir(parents=True, exist_ok=True)
  with runs.replacing(file) as writing:
    safetensors.numpy.save_file(arrays, writing, metadata=dict(metadata) if metadata else None)


def linear(weight: np.ndarray) -> np.ndarray:
  """PyTorch's linear weight ``[out, in]`` as Flax's kernel ``[in, out]``.

  PyTorch computes ``x @ weight.T`` and Flax ``x @ kernel``.

  Args:
    weight: ``[out, in]``.

  Returns:
    ``[in, out]``.

  Raises:
    ValueError: it has not two axes.

  >>> linear(np.zeros((3, 4))).shape
  (4, 3)
  """
  if np.ndim(weight) != 2:
    raise ValueError(
      f"networks.weights.linear needs [out, in], and got the shape {np.shape(weight)}."
    )
  return np.transpose(weight)


def convolution(weight: np.ndarray) -> np.ndarray:
  """PyTorch's convolution weight ``[out, in, *space]`` as Flax's kernel ``[*space, in, out]``.

  PyTorch keeps channels before space, Flax after it. Both slide the kernel as it is, so nothing is
  flipped; in 1, 2 or 3 dimensions, and with groups (``in`` is then the group's). A transposed
  convolution is another matter.

  Args:
    weight: ``[out, in, W]``, ``[out, in, H, W]`` or ``[out, in, D, H, W]``.

  Returns:
    ``[W, in, out]``, ``[H, W, in, out]`` or ``[D, H, W, in, out]``.

  Raises:
    ValueError: it has other than three to five axes.

  >>> convolution(np.zeros((8, 3, 5, 7))).shape
  (5, 7, 3, 8)
  """
  # [out, in, *space] to [*space, in, out].
  axes = np.ndim(weight)
  if not 3 <= axes <= 5:
    raise ValueError(
      f"networks.weights.convolution needs [out, in, *space], and got the shape {np.shape(weight)}."
    )
  return np.transpose(weight, (*range(2, axes), 1, 0))


def _existing(path: str | os.PathLike[str]) -> pathlib.Path:
  file = _check.folder("path", path)
  if not file.exists():
    raise FileNotFoundError(f"there are no weights at path={file}.")
  return file


def _refuse_pickle(file: pathlib.Path) -> None:
  # By its first bytes too, whatever it is called: pickle protocols 2 to 5, and a zip, which is how
  # torch.save packs one.
  start = b""
  if file.is_file():
    with file.open("rb") as opened:
      start = opened.read(4)
  pickled = start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
  if file.suffix in _PICKLES or pickled or start == b"PK\x03\x04":
    raise ValueError(
      f"path={file} is a pickle, or may be one, and nothing is unpickled here, since that runs "
      "code. Convert it where you trust it: safetensors.torch.save_file(torch.load(path, "
      "weights_only=True), 'networks.weights.safetensors')."
    )


def _shards(place: pathlib.Path) -> tuple[list[pathlib.Path], set[str]]:
  """The files that belong together, and the tensors that their index promises."""
  if place.is_dir():
    inside = listing(place)
    indices = [p for p in inside if p.name.endswith(_INDEX)]
    if len(indices) > 1:
      raise ValueError(
        f"path={place} has {first_few([p.name for p in indices])}; name one of them."
      )
    if indices:
      return _shards(indices[0])
    files = [p for p in inside if p.suffix == _SUFFIX]
    for file in inside if not files else []:
      _refuse_pickle(file)
    if not files:
      names = first_few([p.name for p in inside])
      raise ValueError(f"path={place} has no {_SUFFIX} file in it; it holds: {names}.")
    return files, set()
  if not place.name.endswith(_INDEX):
    _refuse_pickle(place)
    return [place], set()
  try:
    index = runs.entry(runs.read_json(place.resolve()), "weight_map", dict)
    for tensor in index:
      runs.entry(index, tensor, str)
  except (OSError, RuntimeError, ValueError) as error:  # links in a circle among them
    raise CheckpointError(f"{place} is no index of safetensors: it {error}.") from error
  try:  # links may lead elsewhere: that is how Hugging Face's cache lays out a model
    files = [runs.within(place.parent, name, links=True) for name in sorted({*index.values()})]
  except ValueError as error:
    raise CheckpointError(f"{place} {error}: leave it out, or name the files yourself.") from error
  missing = [file.name for file in files if not file.is_file()]
  if missing:
    raise FileNotFoundError(f"{place} names files that are not beside it: {first_few(missing)}.")
  return files, set(index)


def _open(file: pathlib.Path, stack: contextlib.ExitStack) -> Iterator[tuple[str, Any]]:
  from safetensors import safe_open

  try:
    # Its parser keeps 32 bytes for each bracket that it does not expect: ours looks first.
    with file.open("rb") as head:
      runs.parse_json(head.read(min(int.from_bytes(head.read(8), "little"), file.stat().st_size)))
    handle = stack.enter_context(safe_open(file, framework="numpy"))
  except Exception as error:
    raise CheckpointError(f"{file} is truncated, or no safetensors: {error}") from error
  yield from ((name, handle) for name in handle.keys())  # noqa: SIM118


def _targets(
  place: pathlib.Path, there: Mapping[str, Any], names: Names | None
) -> dict[tuple[str, ...], tuple[str, Function | None]]:
  """The path of each tensor that is wanted, with its function."""
  if names is None:
    names = {name: name for name in there}
  elif isinstance(names, Mapping):
    unknown, forgotten = sorted(set(names) - set(there)), sorted(set(there) - set(names))
    if unknown or forgotten:
      raise ValueError(
        f"names and {place} name different tensors. Only in names: {first_few(unknown)}. Only in "
        f"the file: {first_few(forgotten)} (map a tensor to None to leave it out)."
      )
  # Every tensor has to be said something of: one that is forgotten would be a layer at random.
  targets: dict[tuple[str, ...], tuple[str, Function | None]] = {}
  for tensor in there:
    if not isinstance(names, Mapping):
      _check.function("names", names, "name -> path, or a mapping", arguments=1)
    entry = names[tensor] if isinstance(names, Mapping) else names(tensor)
    if entry is None:
      continue
    path, function = entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, None)
    if not isinstance(path, str) or not (function is None or callable(function)):
      raise TypeError(
        f"names gives {entry!r} for {tensor!r}; it must be a path, (path, function) or None."
      )
    target = tuple(path.split("/"))
    if len(target) < 2 or not all(target):
      raise ValueError(
        f"{tensor!r} would go to the path {path!r}; a path has a collection and a name, such as "
        "'params/Dense_0/kernel' (names says which)."
      )
    if target in targets:
      raise ValueError(f"{tensor!r} and {targets[target][0]!r} both go to {path!r} by names.")
    targets[target] = (tensor, function)
  if not targets:
    raise ValueError(f"names takes none of the tensors of {place}: {first_few(sorted(there))}.")
  for target, (tensor, _) in targets.items():
    above = [targets[target[:end]][0] for end in range(1, len(target)) if target[:end] in targets]
    if above:
      raise ValueError(f"{tensor!r} would go below the path of {above[0]!r} by names.")
  return targets


def _read(place: pathlib.Path, handle: Any, name: str) -> np.ndarray:
  try:
    return handle.get_tensor(name)
  except Exception as error:
    raise CheckpointError(
      f"{name!r} of {place} cannot be read into NumPy ({error}); convert its dtype."
    ) from error


def _tensor(there: Tensor, name: str, function: Function | None) -> np.ndarray:
  value = there.read()
  # A user's function on a user's tensor: its error is shown with the tensor's name.
  if function is None:
    return value
  try:
    return np.asarray(function(value))
  except Exception as error:
    raise ValueError(f"the function that names gives for {name!r} failed: {error}") from error


def _finish(where: str, variables: PyTree, like: PyTree | None) -> PyTree:
  """JAX's arrays, in the structure of like."""
  if like is None:
    there = named_leaves("variables", variables)
    leaves = [_as_it_is(f"{name} of {where}", value) for name, value in there.items()]
    return jax.tree.unflatten(jax.tree.structure(variables), leaves)
  # Everything that does not fit is in one message: weights are rarely wrong in one place.
  wanted, there = named_leaves("like", like), named_leaves("variables", variables)
  missing, unexpected = sorted(set(wanted) - set(there)), sorted(set(there) - set(wanted))
  shapes = []
  for name in sorted(set(wanted) & set(there)):
    have, want = np.shape(there[name]), tuple(np.shape(wanted[name]))
    if have != want:
      turned = "; an axis order? see networks.weights.linear, networks.weights.convolution"
      hint = turned if sorted(have) == sorted(want) else ""
      shapes.append(f"{name} is {have}, and like has {want}{hint}")
  if missing or unexpected or shapes:
    raise ValueError(
      f"{where} do not fit like. Missing: {first_few(missing)}. Unexpected: "
      f"{first_few(unexpected)}. Other shapes: {first_few(shapes)}."
    )
  leaves = [as_like(f"{name} of {where}", there[name], leaf) for name, leaf in wanted.items()]
  return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _as_it_is(where: str, value: Any) -> Any:
  value = np.asarray(value)
  if value.dtype.kind in "OSU":
    raise ValueError(f"{where} is {value.dtype}, and no array of numbers; leave it out.")
  # JAX would silently halve 64 bits that are not enabled.
  return jnp.array(value) if value.dtype == jax.dtypes.canonicalize_dtype(value.dtype) else value


def as_like(where: str, value: Any, like: Any) -> jax.Array:
  """An array in another's float dtype and, where that is committed to one, its sharding.

  Args:
    where: what it is, for messages.
    value: the array.
    like: an array, a number, or a ``jax.ShapeDtypeStruct``.

  Raises:
    ValueError: other dtypes than floats differ, or a value is too large for the dtype.

  >>> as_like("a", np.ones(2), jax.ShapeDtypeStruct((2,), jnp.bfloat16)).dtype.name
  'bfloat16'
  """
  value, dtype = np.asarray(value), jnp.asarray(like).dtype if np.isscalar(like) else like.dtype
  floats = [jax.dtypes.issubdtype(d, np.floating) for d in (value.dtype, dtype)]
  if not all(floats) and (any(floats) or not np.can_cast(value.dtype, dtype)):
    raise ValueError(f"{where} is {value.dtype}, and like has {dtype}; only floats are converted.")
  if dtype != jax.dtypes.canonicalize_dtype(dtype):
    raise ValueError(f"like has {dtype} for {where}: enable jax_enable_x64, or use 32 bits.")
  # An overflow is looked for below, and named; NumPy's warning would be an error in tests only.
  with np.errstate(over="ignore"):
    result = value.astype(dtype, copy=False)  # the largest tensor of a model may be gigabytes
  if value.dtype != dtype and all(floats) and np.any(np.isfinite(value) & ~np.isfinite(result)):
    raise ValueError(f"{where} has values too large for like's {dtype}; take a wider float.")
  committed = not isinstance(like, jax.Array) or like.committed
  sharding = getattr(like, "sharding", None) if committed else None
  if sharding is None:
    return jnp.array(result)
  return jax.device_put(result, sharding, may_alias=False)  # the caller's array is the caller's
