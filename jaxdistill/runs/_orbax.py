"""What is asked of Orbax, and the only file that imports it: write, read, and read others' files.

Orbax expects every process of a program to take part in every call. Ours do so where an array lies
on devices of several: each writes the parts that it holds, into files of its own. What one process
has is written by process 0 alone, and whoever needs a checkpoint reads of it what is its own; so
these calls tell Orbax that this process is the only one.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import glob
import hashlib
import itertools
import logging
import math
import os
import pathlib
import re
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxdistill import _check
from jaxdistill.runs._files import check_links, read_json
from jaxdistill.runs._manifest import MANIFEST, CheckpointError, check_size, listing
from jaxdistill.runs._shards import Together

__all__ = [
  "find_collections",
  "nested_dicts",
  "read",
  "read_foreign_orbax",
  "read_some",
  "stored",
  "write",
]

Path = tuple[str, ...]
# Orbax numbers its operations in a global counter that two threads must not share.
_ORBAX = threading.Lock()
# Bytes of a piece of an array, and of the files that pieces are gathered in.
_PIECE, _FILE = 2 * 2**20, 8 * 2**20
# The names of Orbax's barriers, which one program has once: of each writing by several processes.
_WRITINGS = itertools.count()
_METADATA = "_METADATA"  # In every folder that holds a pytree of Orbax's.
_RECORD = "_CHECKPOINT_METADATA"  # In every checkpoint of a newer Orbax, of one pytree or several.
_TEMPORARY = ".orbax-checkpoint-tmp"
# Orbax's threads write to the log, with thirty kilobytes of their own frames, what it raises too.
logging.getLogger("absl").addFilter(lambda record: "_SignalingThread.run()" not in str(record.msg))
# An optimiser's moments mirror the parameters, and are none.
_OPTIMIZER = {"opt_state", "opt_states", "opt", "optimizer", "optimizer_state"}
# What stands at the top of a training state, but never of bare parameters.
_NO_MODULE = _OPTIMIZER | {"step", "state", "train_state", "model", "target", "params"}


def write(folder: pathlib.Path, arrays: dict[str, dict[str, Any]]) -> None:
  """Writes arrays as a checkpoint, whole or not at all.

  Where one of them lies on devices of several processes, all of these call it, and each writes what
  it holds. Else only the process that calls it takes part, and in a program of several that is
  process 0. Orbax counts its operations and puts the number into the names of its barriers; so do
  not mix this with Orbax calls of your own that all the processes make together.

  Args:
    folder: where to; it must not exist.
    arrays: ``{item: {name: array}}``, of NumPy's or JAX's; each item becomes a folder.

  Raises:
    RuntimeError: a process other than 0 calls it, of arrays that are its own.

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   write(pathlib.Path(folder, "a"), {"params": {"Dense_0/bias": np.arange(3)}})
  ...   read(pathlib.Path(folder, "a"), ["params"])
  {'params': {'Dense_0/bias': array([0, 1, 2])}}
  """
  together = Together(arrays)
  if together.count == 1 and jax.process_index() != 0:
    raise RuntimeError(
      f"process {jax.process_index()} of {jax.process_count()} writes {folder}; Orbax stores host "
      "arrays on process 0 alone, so let only that one write."
    )
  with _ORBAX, _no_pattern(folder, first=together.me == 0) as place:
    if jax.process_count() == 1:
      with _small_files():
        ocp.v1.save_checkpointables(place, arrays)
    else:
      _write_among(_alone() if together.count == 1 else _all(), place, arrays)


@contextlib.contextmanager
def _no_pattern(folder: pathlib.Path, *, first: bool) -> Iterator[pathlib.Path]:
  """Where to write so that it comes to lie in ``folder``, whatever characters its path has.

  Orbax gathers what it wrote by a pattern that it makes of the path: of ``lr=[0.1]`` it finds
  nothing and leaves the parts unread, and ``lr=*`` may find those of another run.
  """
  if not glob.has_magic(os.fspath(folder)):
    yield folder
    return
  with tempfile.TemporaryDirectory() as beside:
    link = pathlib.Path(beside, "parent")
    link.symlink_to(folder.parent, target_is_directory=True)
    place = link / f"{hashlib.sha256(folder.name.encode()).hexdigest()[:16]}.writing"
    if first:
      shutil.rmtree(place, ignore_errors=True)  # of a process that was killed
    yield place
    if first:
      place.rename(folder)


def _small_files() -> Any:
  """Arrays in pieces and files of a few megabytes, so that a run's folder can be carried away."""
  saving = ocp.v1.options.ArrayOptions.Saving
  context = ocp.v1.Context()
  if not hasattr(context, "array"):  # Orbax 0.11, whose options are frozen.
    pieces = saving.StorageOptions(chunk_byte_size=_PIECE)
    options = saving(ocdbt_target_data_file_size=_FILE, storage_options=pieces)
    return ocp.v1.Context(array_options=ocp.v1.options.ArrayOptions(saving=options))
  context.array.saving.ocdbt_target_data_file_size = _FILE
  context.array.saving.storage_options.chunk_byte_size = _PIECE
  return context


def _write_among(
  processes: dict[str, Any], folder: pathlib.Path, arrays: dict[str, dict[str, Any]]
) -> None:
  # The v1 calls compare the folder between all processes, whatever they are told, and by the
  # devices, which are another thread's; these wait for the named processes in JAX's own service.
  among = ocp.options.MultiprocessingOptions(**processes)
  registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
  for item in arrays:
    handler = ocp.PyTreeCheckpointHandler(use_zarr3=True, multiprocessing_options=among)
    registry.add(item, ocp.args.PyTreeSave, handler)
  composite = ocp.CompositeCheckpointHandler(
    handler_registry=registry,
    composite_options=ocp.CompositeOptions(multiprocessing_options=among),
  )
  with ocp.Checkpointer(composite, multiprocessing_options=among) as checkpointer:
    items = {
      item: ocp.args.PyTreeSave(
        leaves,
        save_args=jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_PIECE), leaves),
        ocdbt_target_data_file_size=_FILE,
      )
      for item, leaves in arrays.items()
    }
    checkpointer.save(folder, ocp.args.Composite(**items))


def read(
  folder: pathlib.Path,
  names: Iterable[str],
  lying: Mapping[str, Mapping[str, jax.ShapeDtypeStruct]] | None = None,
) -> dict[str, dict[str, Any]]:
  """Reads what `write` wrote; each process by itself, and of an array in parts its own alone.

  Args:
    folder: the checkpoint.
    names: the items to read.
    lying: by item and name, the shape, dtype and sharding of arrays that are read to where they
      lie, whatever they were written from. All others are read as host arrays.

  Returns:
    ``{item: {name: array}}``.
  """
  known = lying or {}
  return {item: _read_item(folder / item, known.get(item, {}), whole=True) for item in names}


def read_some(folder: pathlib.Path, lying: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
  """Some arrays of one item that `write` wrote, where they lie; the others are not read.

  Args:
    folder: the item's.
    lying: as `read` has it; without a sharding, arrays that are read as host arrays.
  """
  return _read_item(folder, lying, whole=False)


def _read_item(
  folder: pathlib.Path, lying: Mapping[str, jax.ShapeDtypeStruct], *, whole: bool
) -> dict[str, Any]:
  with _ORBAX:
    tree, leaves = _outline(folder)
    where = {path: lying[name] for path in leaves if (name := "/".join(path)) in lying}
    read = _restore(folder, tree, set(leaves) if whole else set(where), where)
  return {"/".join(path): leaf for path, leaf in read.items()}


def stored(folder: pathlib.Path) -> dict[str, tuple[tuple[int, ...], Any]]:
  """The shape and dtype of each array of an item that `write` wrote, by name, without reading it.

  Raises:
    CheckpointError: Orbax cannot tell.
  """
  with _ORBAX:
    _, leaves = _outline(folder)
  return {"/".join(path): _described(leaf) for path, leaf in leaves.items()}


def _described(leaf: Any) -> Any:
  """An array's shape and dtype; what is none, or is in pieces larger than itself, in words."""
  shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
  if shape is None or dtype is None:
    return "no array"
  chunk = getattr(getattr(leaf, "storage", None), "chunk_shape", None) or shape
  if any(piece > max(size, 1) for piece, size in zip(chunk, shape, strict=False)):
    return f"an array in pieces of {chunk}"
  return tuple(shape), np.dtype(dtype)


def _alone() -> dict[str, Any]:
  me = jax.process_index()
  return {
    "primary_host": me,
    "active_processes": {me},
    "barrier_sync_key_prefix": f"process_{me}",
  }


def _all() -> dict[str, Any]:
  return {
    "primary_host": 0,
    "active_processes": set(range(jax.process_count())),
    "barrier_sync_key_prefix": f"writing_{next(_WRITINGS)}",
  }


def read_foreign_orbax(
  path: str | os.PathLike[str],
  collections: Sequence[str] | Mapping[str, str] = ("params", "batch_stats"),
  expected: int = 0,
) -> dict[str, Any]:
  """Reads collections from a checkpoint that somebody else's program wrote with Orbax.

  Understood are the folders of `StandardCheckpointer` and `PyTreeCheckpointer`, of the v1 calls,
  and of a `CheckpointManager`, of which the last step is taken; written by one process. Leaves that
  are not asked for, such as an optimiser's, are not read from the disk.

  Args:
    path: the folder.
    collections: names of collections, or a mapping from them to paths. Items of the checkpoint
      count as the first part of a path, but for a single item of another name than these.
    expected: the bytes that they may take, however few lie on the disk; more than ten times those
      are refused, but for what is small anyway.

  Returns:
    ``{collection: nested dicts of host arrays}``, whatever devices they were saved from.

  Raises:
    FileNotFoundError: there is nothing at ``path``.
    ValueError: it is no checkpoint of Orbax's, it is one of ours, or it lacks a collection.
    CheckpointError: Orbax cannot read it, or a link in it leads elsewhere.
  """
  folder = _check.folder("path", path)
  _refuse_ours(folder)
  folder = _last_step(folder)
  try:
    check_links(folder)
  except ValueError as error:
    raise CheckpointError(str(error)) from error
  items = _items(folder)
  only = next(iter(items)) if len(items) == 1 else None
  with _ORBAX:
    trees = {item: _outline(where) for item, where in items.items()}
  leaves: dict[Path, tuple[str, Path]] = {}
  for item, tree in trees.items():
    prefix = (item,) if item and (item != only or item in collections) else ()
    leaves.update({prefix + inside: (item, inside) for inside in tree[1]})
  where = f"the checkpoint {folder}"
  found = find_collections(leaves, collections, where)
  result: dict[Path, Any] = {}
  for item, (tree, described) in trees.items():
    wanted: dict[Path, list[Path]] = {}
    for name, start in found.items():
      for place, (owner, inside) in leaves.items():
        if owner == item and place[: len(start)] == start:
          if not hasattr(described[inside], "dtype"):
            raise ValueError(f"{'/'.join(place)} of {where} is no array; name what lies beside it.")
          wanted.setdefault(inside, []).append((name, *place[len(start) :]))
    if wanted:
      size = sum(
        math.prod(described[p].shape) * np.dtype(described[p].dtype).itemsize for p in wanted
      )
      there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
      check_size(folder, size, there, expected)
      with _ORBAX:
        values = _restore(items[item], tree, set(wanted))
      result.update({place: values[inside] for inside in wanted for place in wanted[inside]})
  return nested_dicts(result)


def find_collections(
  paths: Iterable[Path], collections: Sequence[str] | Mapping[str, str], where: str
) -> dict[str, Path]:
  """Finds where collections lie in a tree that somebody else laid out.

  Args:
    paths: the paths of the tree's leaves.
    collections: names, each searched for at any depth outside of optimisers: the first must be
      there, others that are nowhere are left out, as a network without BatchNorm has no
      ``batch_stats``. A tree of nothing but modules counts as ``params`` itself. Or a mapping from
      names to paths, such as ``{"params": "state/ema_params"}``, when they lie elsewhere or at
      several places; ``""`` means the whole tree.
    where: what to call the tree in messages.

  Returns:
    The path of each collection.

  Raises:
    ValueError: a collection is not there or at several places.

  >>> leaves = [("state", "params", "kernel"), ("state", "opt_state", "params", "kernel")]
  >>> find_collections(leaves, ["params", "batch_stats"], "the tree")
  {'params': ('state', 'params')}
  """
  words: list[Any] = list(collections) if isinstance(collections, Sequence | Mapping) else []
  if isinstance(collections, Mapping):
    words += collections.values()
  if isinstance(collections, str) or not words or not all(isinstance(w, str) for w in words):
    raise ValueError(
      f"collections={collections!r} must be a sequence of names, such as ('params',), or a mapping "
      "from names to paths."
    )
  paths = list(paths)
  if isinstance(collections, Mapping):
    given = {name: tuple(p for p in place.split("/") if p) for name, place in collections.items()}
    for name, start in given.items():
      if not any(p[: len(start)] == start and len(p) > len(start) for p in paths):
        raise ValueError(
          f"collections={{{name!r}: {collections[name]!r}}} is no part of {where}; it holds: "
          f"{_there(paths)}."
        )
    return given
  places = {name: _places(paths, name) for name in collections}
  found = {name: there[0] for name, there in places.items() if there}
  for name, there in places.items():
    if len(there) > 1:
      several = ", ".join("/".join(place) for place in there)
      one = {name: "/".join(place) for name, place in found.items()}
      raise ValueError(
        f"{where} has {name!r} at several places ({several}); say which: collections={one}."
      )
  first = collections[0]
  if not found and first == "params" and paths and not _NO_MODULE & {p[0] for p in paths}:
    return {first: ()}
  if first not in found:
    raise ValueError(
      f"{where} has no collection {first!r}; it holds: {_there(paths)}. Say where it lies: "
      f"collections={{{first!r}: 'path/to/it'}} ('' is all of it)."
    )
  return found


def nested_dicts(leaves: Mapping[Path, Any]) -> dict[str, Any]:
  """Nested dictionaries from leaves by path.

  >>> nested_dicts({("params", "Dense_0", "bias"): 1})
  {'params': {'Dense_0': {'bias': 1}}}
  """
  result: dict[str, Any] = {}
  for path, value in leaves.items():
    node = result
    for part in path[:-1]:
      node = node.setdefault(part, {})
    node[path[-1]] = value
  return result


def _places(paths: list[Path], name: str) -> list[Path]:
  """Where dictionaries of this name are; of one within another of the name, the inner."""
  places = {
    path[: depth + 1]
    for path in paths
    for depth, part in enumerate(path[:-1])
    if part == name and not _OPTIMIZER & set(path[:depth])
  }
  # A TrainState's params may be all variables: params/params and params/batch_stats.
  return sorted(place for place in places if (*place, name) not in places)


def _there(paths: list[Path]) -> str:
  names = sorted({"/".join(path[:2]) for path in paths})
  return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _items(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """The pytrees of one checkpoint; itself, if it is one, without a name."""
  if (folder / _METADATA).is_file():
    return {"": folder}
  inside = {p.name: p for p in listing(folder) if (p / _METADATA).is_file()}
  # One with its own record is a checkpoint beside others, not a part of one.
  return {n: p for n, p in inside.items() if not (p / _RECORD).is_file() and _TEMPORARY not in n}


def _last_step(folder: pathlib.Path) -> pathlib.Path:
  """The folder, or its last step's if it has steps."""
  if not folder.exists():
    raise FileNotFoundError(f"there is no checkpoint at path={folder}.")
  if not folder.is_dir():
    raise ValueError(f"path={folder} is a file; Orbax's checkpoints are folders.")
  if _TEMPORARY in folder.name:
    raise ValueError(f"path={folder} is half written; take a finished checkpoint.")
  if not (folder / _RECORD).is_file() and not (folder / _METADATA).is_file():
    steps = {}
    for child in listing(folder):
      match = re.fullmatch(r"(?:.*_)?(\d+)", child.name)
      if match and child.is_dir():
        steps[int(match[1])] = child
    if steps:
      folder = steps[max(steps)]
  if not _items(folder):
    inside = ", ".join(p.name for p in listing(folder)[:12]) or "nothing"
    raise ValueError(
      f"path={folder} is no checkpoint of Orbax's (neither it nor a folder in it has a "
      f"{_METADATA}); it holds: {inside}. Name the checkpoint's own folder, or the folder of its "
      "steps."
    )
  return folder


def _refuse_ours(folder: pathlib.Path) -> None:
  """Says which function reads what this library wrote."""
  saved = (folder / MANIFEST).is_file() or any((p / MANIFEST).is_file() for p in listing(folder))
  run = {folder.name: folder.parent, folder.parent.name: folder.parent.parent}.get("checkpoints")
  if (folder / "config.json").is_file() and (folder / "checkpoints").is_dir():
    run = folder
  elif not saved:
    return
  if run is None:
    raise ValueError(
      f"path={folder} is this library's own: runs.load_variables reads what save_variables "
      "wrote, runs.Checkpoints the steps of a folder, and export.load_student a student."
    )
  step = f", step={folder.name}" if folder.parent.name == "checkpoints" else ""
  raise ValueError(
    f"path={folder} belongs to a run of this library: use teachers.restore({str(run)!r}{step})."
  )


def _handler() -> Any:
  alone = ocp.options.MultiprocessingOptions(**_alone())
  return ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)


def _outline(folder: pathlib.Path) -> tuple[Any, dict[Path, Any]]:
  """The tree of what Orbax says about each leaf, and the same by path."""
  try:
    read_json(folder / _METADATA)  # before Orbax does: whatever it is, it is of a bounded size
    tree = _handler().metadata(folder).tree
  except Exception as error:
    raise CheckpointError(f"{folder / _METADATA} cannot be read by Orbax: {error}") from error
  return tree, {_parts(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _restore(
  folder: pathlib.Path,
  tree: Any,
  wanted: set[Path],
  lying: Mapping[Path, jax.ShapeDtypeStruct] | None = None,
) -> dict[Path, Any]:
  """Reads the wanted leaves as host arrays, or to where they are to lie.

  An ellipsis tells Orbax to leave one out.
  """
  with_path = jax.tree_util.tree_map_with_path
  item = with_path(lambda path, leaf: leaf if _parts(path) in wanted else ..., tree)

  def how(path: tuple[Any, ...], _: Any) -> Any:
    at = (lying or {}).get(_parts(path))
    if at is None or at.sharding is None:
      return ocp.RestoreArgs(restore_type=np.ndarray if _parts(path) in wanted else None)
    return ocp.ArrayRestoreArgs(sharding=at.sharding, global_shape=at.shape, dtype=at.dtype)

  arguments = ocp.args.PyTreeRestore(item=item, restore_args=with_path(how, tree))

  def restore() -> Any:
    # What is set of JAX is of a thread. `lying` asks for no more than its caller's takes.
    with jax.enable_x64(True):
      return _handler().restore(folder, args=arguments)

  try:
    # In a thread of its own: where asyncio.run is the main thread's, it asks Python for the handler
    # of SIGINT, whose enum writes out a task's result on its way, all of each array, on the host.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
      restored = thread.submit(restore).result()
  except Exception as error:
    raise CheckpointError(f"the checkpoint {folder} cannot be read by Orbax: {error}") from error
  leaves = jax.tree_util.tree_flatten_with_path(restored)[0]
  return {
    _parts(path): leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
    for path, leaf in leaves
    if leaf is not ...
  }


def _parts(path: tuple[Any, ...]) -> Path:
  return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
