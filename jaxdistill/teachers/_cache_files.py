"""The files of a teacher cache: written whole or not at all, verified before they are believed.

A folder holds ``manifest.json``, ``ids.json`` and shards of ArrayRecord. ``docs/cache.md`` has the
format, which other programs may write. Nothing here needs JAX, and nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import pathlib
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill import _extras
from jaxdistill.runs import (
  MANIFEST,
  WRITING,
  altered,
  entry,
  read_digested,
  read_json,
  replacing,
  sha256,
  size_and_digest,
  within,
  write_digested,
  write_text,
  writes,
)

__all__ = [
  "FORMAT",
  "IDS",
  "SHARD_BYTES",
  "CacheError",
  "arrays_of",
  "check_shard",
  "complete_views",
  "create",
  "forget",
  "prefix",
  "read_ids",
  "read_manifest",
  "read_view",
  "row_type",
  "verify_cache",
  "write_view",
]

FORMAT = 1
IDS = "ids.json"
SHARD_BYTES = 256 * 2**20
# What every manifest has, whoever wrote it.
_KEYS = (
  "arrays",
  "augmentation",
  "data",
  "data_seed",
  "dtype",
  "ids",
  "view_count",
  "views",
)
_LOCK = ".lock"
# One record a chunk, so that a row is found without unpacking its neighbours; logits hardly shrink.
_OPTIONS = "group_size:1,uncompressed"
Rows = dict[str, np.ndarray]


class CacheError(RuntimeError):
  """A cache is damaged, or half written."""


def _damaged(path: pathlib.Path, reason: str) -> CacheError:
  return CacheError(
    f"The cache cannot be used: {path} {reason}. Let `jaxdistill cache verify "
    f"{path.parent} --drop` drop the views that are damaged, and they will be filled again; or "
    "delete the folder."
  )


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
  """The manifest, if it is as it was written.

  Args:
    folder: the cache.

  Returns:
    Its content; ``views`` maps numbers (as text) to shards.

  Raises:
    FileNotFoundError: there is none.
    CacheError: it is damaged, or of another format.
  """
  path = folder / MANIFEST
  try:
    body = read_digested(path)
  except FileNotFoundError:
    raise FileNotFoundError(f"{os.fspath(folder)!r} is no cache: it has no {MANIFEST}.") from None
  except ValueError as error:
    raise _damaged(path, str(error)) from error
  if body.get("format") != FORMAT:
    raise CacheError(f"{path} is of format {body.get('format')!r}; this program reads {FORMAT}.")
  try:
    _check_manifest(folder, body)
  except ValueError as error:
    # Whatever is in it, the files that it names are nobody's to remove.
    raise CacheError(f"The cache cannot be used: {path} {error}. Delete the folder.") from error
  return body


def _check_manifest(folder: pathlib.Path, body: Mapping[str, Any]) -> None:
  """Raises where a manifest, which another program may have written, does not say what it must.

  Raises:
    ValueError: it follows the file's name in a sentence.
  """
  lacking = [name for name in _KEYS if name not in body]
  if lacking:
    raise ValueError(f"lacks {', '.join(map(repr, lacking))}")
  arrays, views, size = body["arrays"], body["views"], entry(body["data"], "size", int)
  if not isinstance(arrays, list) or not isinstance(views, dict):
    raise ValueError("has no list of arrays, or no views by number")
  for array in arrays:
    name, dtype = entry(array, "name", str), entry(array, "dtype", str)
    shape = entry(array, "shape", list)
    if not re.fullmatch(r"[<>|]?[fiub][1248]", dtype):
      raise ValueError(f"has the array {name!r} of dtype {dtype!r}, which is no number's")
    if not all(type(n) is int and 0 < n < 2**31 for n in shape):
      raise ValueError(f"has the array {name!r} of shape {shape}")
  names = [array["name"] for array in arrays]
  if "logits" not in names or len(set(names)) < len(names):
    raise ValueError(f"has the arrays {names}, and not 'logits' and others, each once")
  row = sum(np.dtype(a["dtype"]).itemsize * math.prod(a["shape"]) for a in arrays)
  for view, shards in views.items():
    if not re.fullmatch(r"0|[1-9]\d{0,8}", view) or not isinstance(shards, list):
      raise ValueError(f"has the view {view!r}, which is no number with its shards")
    for shard in shards:
      if within(folder, entry(shard, "file", str)).name in (MANIFEST, IDS, _LOCK):
        raise ValueError(f"names {shard['file']!r} as a file of view {view}")
      entry(shard, "sha256", str)
      records, written = entry(shard, "records", int), entry(shard, "bytes", int)
      # What is read into memory is no more than what lies in the files.
      if not 0 <= records <= size or records * row > written:
        raise ValueError(f"has {records} records of {row} bytes in {written} bytes of view {view}")
  within(folder, entry(body["ids"], "file", str))
  entry(body["ids"], "sha256", str)


def _write_manifest(folder: pathlib.Path, body: Mapping[str, Any]) -> None:
  write_digested(folder / MANIFEST, body, durable=True)


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
  """One writer at a time; a killed one holds nothing back."""
  # Made where it is not there; a link of that name is not followed, to what is somebody else's.
  number = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
  with os.fdopen(number, "r+") as file:
    # The lock belongs to the open file and not to its name: the system takes it back from a process
    # that is killed, where a lock file would stay and keep everybody out.
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def create(folder: pathlib.Path, body: Mapping[str, Any], ids: Sequence[str]) -> dict[str, Any]:
  """Starts a cache without views, or opens the one that is there.

  Args:
    folder: the cache.
    body: what the manifest says beside ``format``, ``ids``, ``views`` and ``digest``.
    ids: of the examples, in the order of a view's records.

  Returns:
    The manifest.

  Raises:
    ValueError: the folder holds something else.
  """
  with writes(folder):
    folder.mkdir(parents=True, exist_ok=True)
  with _locked(folder):
    if not (folder / MANIFEST).exists():
      others = sorted(path.name for path in folder.iterdir())
      others = [n for n in others if n not in (_LOCK, IDS) and not n.endswith(WRITING)]
      if others:
        raise ValueError(
          f"folder={os.fspath(folder)!r} holds {others[:3]} and no cache: name a folder of its own."
        )
      # The ids first: a manifest names their digest, so a folder with a manifest is a whole cache,
      # and one that was killed before it has none and is begun anew.
      write_text(folder / IDS, json.dumps(list(ids)), durable=True)
      named = {"file": IDS, "sha256": sha256(folder / IDS)}
      _write_manifest(folder, {"format": FORMAT, **body, "ids": named, "views": {}})
    return read_manifest(folder)


def read_ids(folder: pathlib.Path, manifest: Mapping[str, Any]) -> list[str]:
  """The ids of the examples, in the order of a view's records.

  Raises:
    CacheError: the file is damaged.
  """
  path = folder / manifest["ids"]["file"]
  problem = altered(path, manifest["ids"])
  if problem:
    raise _damaged(path, problem)
  size = manifest["data"]["size"]
  try:
    ids = read_json(path)
  except ValueError as error:
    raise _damaged(path, str(error)) from error
  # Half a surrogate is text to JSON, and to nothing that writes it.
  half = re.compile("[\ud800-\udfff]")
  whole = isinstance(ids, list) and all(isinstance(id, str) and not half.search(id) for id in ids)
  if not whole or len(ids) != size or len(set(ids)) != len(ids):
    raise _damaged(path, f"does not hold {size} different ids")
  return ids


def arrays_of(layout: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The manifest's ``arrays`` of rows with these shapes and dtypes.

  >>> arrays_of({"logits": np.zeros(3, np.float16)})
  [{'name': 'logits', 'dtype': '<f2', 'shape': [3]}]
  """
  return [
    {"name": name, "dtype": np.dtype(row.dtype).newbyteorder("<").str, "shape": list(row.shape)}
    for name, row in layout.items()
  ]


def row_type(arrays: Sequence[Mapping[str, Any]]) -> np.dtype:
  """What follows the id in a record, as a NumPy type with one field for each array.

  >>> row_type([{"name": "logits", "dtype": "<f2", "shape": [3]}]).itemsize
  6
  """
  return np.dtype([(a["name"], a["dtype"], tuple(a["shape"])) for a in arrays])


def prefix(id: str) -> bytes:
  """What a record begins with: the length of the id and the id.

  >>> list(prefix("a7"))
  [2, 0, 0, 0, 97, 55]
  """
  text = id.encode()
  return struct.pack("<I", len(text)) + text


def complete_views(manifest: Mapping[str, Any]) -> list[int]:
  """Which views the cache holds."""
  return sorted(int(view) for view in manifest["views"])


def write_view(folder: pathlib.Path, view: int, rows: Rows, ids: Sequence[str]) -> dict[str, Any]:
  """Adds a view, unless somebody else has done so in the meantime.

  Args:
    folder: the cache.
    view: its number.
    rows: ``[N, ...]`` by name, as the manifest has them.
    ids: of the rows, in the order of ``ids.json``.

  Returns:
    The manifest.
  """
  with _locked(folder):
    manifest = read_manifest(folder)
    if str(view) in manifest["views"]:
      return manifest
    _clear(folder, manifest)
    kind = row_type(manifest["arrays"])
    # [N] records of a structured type: a row's arrays lie side by side, as they will in the file.
    packed = np.empty(len(ids), kind)
    for name, values in rows.items():
      packed[name] = values
    each = max(1, SHARD_BYTES // (kind.itemsize + 16))  # 16: about what ids and framing take
    count = -(-len(ids) // each)
    shards = [
      _write_shard(
        folder / f"view-{view:05d}-{number:05d}-of-{count:05d}.array_record",
        packed[number * each : (number + 1) * each],
        ids[number * each : (number + 1) * each],
      )
      for number in range(count)
    ]
    # The shards are on the disk before the manifest names them: whoever is killed here leaves files
    # that nobody knows of, which the next writer clears away.
    _write_manifest(folder, manifest | {"views": {**manifest["views"], str(view): shards}})
    return read_manifest(folder)


def _clear(folder: pathlib.Path, manifest: Mapping[str, Any]) -> None:
  """Removes what a killed process left of a view; who holds the lock is alone."""
  known = {shard["file"] for shards in manifest["views"].values() for shard in shards}
  for path in folder.glob("view-*.array_record*"):
    if path.name not in known:
      path.unlink()


def _write_shard(path: pathlib.Path, packed: np.ndarray, ids: Sequence[str]) -> dict[str, Any]:
  from array_record.python import array_record_module as array_record

  with replacing(path, durable=True) as writing:
    writer = array_record.ArrayRecordWriter(str(writing), _OPTIONS)
    for id, row in zip(ids, packed, strict=True):
      writer.write(prefix(id) + row.tobytes())
    writer.close()
  return {"file": path.name, "records": len(ids), **size_and_digest(path)}


def check_shard(folder: pathlib.Path, shard: Mapping[str, Any]) -> None:
  """Raises where a shard is not as it was written.

  Raises:
    CacheError: with the file's name.
  """
  path = folder / shard["file"]
  problem = altered(path, shard)
  if problem:
    raise _damaged(path, problem)


def read_view(
  folder: pathlib.Path, manifest: Mapping[str, Any], view: int, ids: Sequence[str]
) -> Rows:
  """The rows of one view in the order of their records, verified.

  Args:
    folder: the cache.
    manifest: its manifest.
    view: the view's number.
    ids: from `read_ids`.

  Returns:
    ``[N, ...]`` by name.

  Raises:
    CacheError: a shard is missing, damaged, or of other examples.
  """
  from array_record.python import array_record_module as array_record

  kind = row_type(manifest["arrays"])
  starts = [prefix(id) for id in ids]
  pieces: list[bytes] = []
  for shard in manifest["views"][str(view)]:
    check_shard(folder, shard)
    path = folder / shard["file"]
    try:
      reader = array_record.ArrayRecordReader(str(path))
      records = reader.read_all() if reader.num_records() else []
      reader.close()
    except (RuntimeError, ValueError, IndexError) as error:
      raise _damaged(path, f"cannot be read ({error})") from error
    if len(records) != shard["records"]:
      raise _damaged(path, f"has {len(records)} records, {shard['records']} were written")
    # Every record says whose it is. A digest would not notice rows that were written in another
    # order, by a program whose data set was sorted otherwise: each row would teach another example.
    for record, start in zip(records, starts[len(pieces) :], strict=False):
      if not record.startswith(start) or len(record) != len(start) + kind.itemsize:
        raise _damaged(path, f"has another record where that of {start[4:].decode()!r} belongs")
      pieces.append(record[len(start) :])
  if len(pieces) != len(ids):
    raise _damaged(folder / MANIFEST, f"has {len(pieces)} of {len(ids)} examples in view {view}")
  packed = np.frombuffer(b"".join(pieces), kind)
  return {name: np.ascontiguousarray(packed[name]) for name in kind.names or ()}


def verify_cache(folder: str | os.PathLike[str]) -> dict[str, list[int]]:
  """Checks every digest, count and id of a cache.

  Args:
    folder: the cache.

  Returns:
    ``{what is wrong: the views that have it}``, empty where all is right.

  Raises:
    FileNotFoundError: there is no cache.
    CacheError: the manifest or the list of ids is damaged, so that nothing else can be told.
  """
  _extras.need("reading a cache of a teacher's outputs", "array_record")
  folder = pathlib.Path(folder)
  manifest = read_manifest(folder)
  ids = read_ids(folder, manifest)
  problems: dict[str, list[int]] = {}
  for view in complete_views(manifest):
    try:
      read_view(folder, manifest, view, ids)
    except CacheError as error:
      problems.setdefault(str(error), []).append(view)
  return problems


def forget(folder: pathlib.Path, views: Sequence[int]) -> None:
  """Drops views, so that they are filled again."""
  with _locked(folder):
    manifest = read_manifest(folder)
    dropped = [shard for view in views for shard in manifest["views"].pop(str(view))]
    _write_manifest(folder, manifest)  # first, for the reason for which it comes last in writing
    for shard in dropped:
      (folder / shard["file"]).unlink(missing_ok=True)
