"""The files of a teacher cache: written whole or not at all, verified before they are believed.

A folder holds ``manifest.json``, ``ids.json`` and shards: of ArrayRecord, or of NumPy where another
program wrote them (`cache_writer`). ``docs/cache.md`` has the format. Nothing here needs JAX, and
nothing is unpickled.
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
from jaxdistill.teachers.cache_writer import FORMAT, IDS, SHARD_BYTES, row_type

__all__ = [
  "SHARD_BYTES",
  "CacheError",
  "Mapped",
  "add_part",
  "check_shard",
  "complete_views",
  "create",
  "forget",
  "parts_of",
  "prefix",
  "read_ids",
  "read_manifest",
  "read_part",
  "read_view",
  "verify_cache",
  "write_view",
]

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
  known = all(n in ("logits", "where") or n.startswith("features/") for n in names)
  if not known or not set(names) - {"where"} or len(set(names)) < len(names):
    raise ValueError(f"has the arrays {names}, and not 'logits' or 'features/<name>', each once")
  row = sum(np.dtype(a["dtype"]).itemsize * math.prod(a["shape"]) for a in arrays)
  parts = body.get("parts", {})
  if not isinstance(parts, dict):
    raise ValueError("has parts of views, and not by number")
  for view, shards in [*views.items(), *parts.items()]:
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
    rows: ``[N, ...]`` by name, as the manifest has them; what lies in parts is not written again.
    ids: of the rows, in the order of ``ids.json``.

  Returns:
    The manifest.
  """
  with _locked(folder):
    manifest = read_manifest(folder)
    if str(view) in manifest["views"]:
      return manifest
    begun = parts_of(manifest, view)
    _clear(folder, manifest)
    first = _records(begun)
    shards = begun + _write_shards(folder, view, manifest, rows, ids, first, len(ids))
    parts = {n: those for n, those in manifest.get("parts", {}).items() if n != str(view)}
    # The shards are on the disk before the manifest names them: whoever is killed here leaves files
    # that nobody knows of, which the next writer clears away.
    views = {**manifest["views"], str(view): shards}
    _write_manifest(folder, manifest | {"views": views, "parts": parts})
    return read_manifest(folder)


def add_part(
  folder: pathlib.Path, view: int, rows: Rows, ids: Sequence[str], first: int, last: int
) -> dict[str, Any]:
  """Keeps some rows of a view that is not complete yet, so that whoever is killed goes on there.

  Args:
    folder: the cache.
    view: the view's number.
    rows: ``[N, ...]`` by name, of which ``first .. last - 1`` are known.
    ids: of the rows, in the order of ``ids.json``.
    first: where the parts that there are end; somebody who has come further is left alone.
    last: where this one ends.

  Returns:
    The manifest.
  """
  with _locked(folder):
    manifest = read_manifest(folder)
    begun = parts_of(manifest, view)
    if str(view) in manifest["views"] or _records(begun) != first:
      return manifest
    shards = begun + _write_shards(folder, view, manifest, rows, ids, first, last)
    parts = {**manifest.get("parts", {}), str(view): shards}
    _write_manifest(folder, manifest | {"parts": parts})
    return read_manifest(folder)


def parts_of(manifest: Mapping[str, Any], view: int) -> list[dict[str, Any]]:
  """The shards of a view that is not complete: of its first rows."""
  return list(manifest.get("parts", {}).get(str(view), []))


def _records(shards: Sequence[Mapping[str, Any]]) -> int:
  return sum(shard["records"] for shard in shards)


def _clear(folder: pathlib.Path, manifest: Mapping[str, Any]) -> None:
  """Removes what a killed process left of a view; who holds the lock is alone."""
  whole = [*manifest["views"].values(), *manifest.get("parts", {}).values()]
  known = {shard["file"] for shards in whole for shard in shards}
  for path in folder.glob("view-*.array_record*"):
    if path.name not in known:
      path.unlink()


def _write_shards(
  folder: pathlib.Path,
  view: int,
  manifest: Mapping[str, Any],
  rows: Rows,
  ids: Sequence[str],
  first: int,
  last: int,
) -> list[dict[str, Any]]:
  """Writes the rows ``first .. last - 1`` of a view."""
  kind = row_type(manifest["arrays"])
  # [N] records of a structured type: a row's arrays lie side by side, as they will in the file.
  packed = np.empty(last - first, kind)
  for name, values in rows.items():
    packed[name] = values[first:last]
  each = max(1, SHARD_BYTES // (kind.itemsize + 16))  # 16: about what ids and framing take
  return [
    _write_shard(
      folder / f"view-{view:05d}-from-{first + at:09d}.array_record",
      packed[at : at + each],
      ids[first + at : min(first + at + each, last)],
    )
    for at in range(0, last - first, each)
  ]


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
  rows = _read_shards(folder, manifest, manifest["views"][str(view)], ids)
  found = len(next(iter(rows.values())))
  if found != len(ids):
    raise _damaged(folder / MANIFEST, f"has {found} of {len(ids)} examples in view {view}")
  return rows


def read_part(
  folder: pathlib.Path, manifest: Mapping[str, Any], view: int, ids: Sequence[str]
) -> Rows:
  """The first rows of a view that is not complete, verified, as `read_view` gives all of one."""
  return _read_shards(folder, manifest, parts_of(manifest, view), ids)


def _read_shards(
  folder: pathlib.Path,
  manifest: Mapping[str, Any],
  shards: Sequence[Mapping[str, Any]],
  ids: Sequence[str],
) -> Rows:
  kind, first = row_type(manifest["arrays"]), 0
  pieces = [np.empty(0, kind)]
  for shard in shards:
    check_shard(folder, shard)
    whose = ids[first : first + shard["records"]]
    read = _read_npy if shard["file"].endswith(".npy") else _read_array_record
    pieces.append(read(folder / shard["file"], shard["records"], kind, whose))
    first += shard["records"]
  packed = np.concatenate(pieces)
  return {name: np.ascontiguousarray(packed[name]) for name in kind.names or ()}


def _read_array_record(
  path: pathlib.Path, count: int, kind: np.dtype, ids: Sequence[str]
) -> np.ndarray:
  """A shard's rows, ``[count]`` of a structured type."""
  from array_record.python import array_record_module as array_record

  try:
    reader = array_record.ArrayRecordReader(str(path))
    records = reader.read_all() if reader.num_records() else []
    reader.close()
  except (RuntimeError, ValueError, IndexError) as error:
    raise _damaged(path, f"cannot be read ({error})") from error
  if len(records) != count:
    raise _damaged(path, f"has {len(records)} records, {count} were written")
  # Every record says whose it is. A digest would not notice rows that were written in another
  # order, by a program whose data set was sorted otherwise: each row would teach another example.
  pieces = []
  for record, start in zip(records, map(prefix, ids), strict=False):
    if not record.startswith(start) or len(record) != len(start) + kind.itemsize:
      raise _damaged(path, f"has another record where that of {start[4:].decode()!r} belongs")
    pieces.append(record[len(start) :])
  return np.frombuffer(b"".join(pieces), kind)


def _read_npy(path: pathlib.Path, count: int, kind: np.dtype, ids: Sequence[str]) -> np.ndarray:
  """The same of a shard that NumPy alone wrote."""
  records = _mapped(path, count, kind)
  if len(ids) < count:
    raise _damaged(path, f"has {count} records where {len(ids)} examples are left")
  wrong = records["id"] != np.array([id.encode() for id in ids])
  if wrong.any():
    whose = ids[int(wrong.argmax())]
    raise _damaged(path, f"has another record where that of {whose!r} belongs")
  made = np.empty(count, kind)
  for name in kind.names or ():
    made[name] = records[name]
  return made


class Mapped:
  """NumPy shards of a view where they lie, as records of bytes by number."""

  def __init__(self, paths: Sequence[pathlib.Path], counts: Sequence[int], kind: np.dtype) -> None:
    """Maps the files into memory.

    Args:
      paths: the shards.
      counts: how many records each has.
      kind: from `cache_writer.row_type`.
    """
    self._shards = [_mapped(path, n, kind) for path, n in zip(paths, counts, strict=True)]
    self._ends, self._names = np.cumsum(counts), kind.names or ()

  def __getitems__(self, places: Sequence[int]) -> list[bytes]:
    """The records at these places: as in an ArrayRecord, the id and the arrays side by side."""
    made = []
    for place in places:
      shard = int(np.searchsorted(self._ends, place, side="right"))
      record = self._shards[shard][place - self._ends[shard]]  # counted from the shard's end
      start = prefix(bytes(record["id"]).decode())
      made.append(start + b"".join(record[name].tobytes() for name in self._names))
    return made


def _mapped(path: pathlib.Path, count: int, kind: np.dtype) -> np.ndarray:
  """A NumPy shard where it lies: records with an ``id`` and the arrays of a row."""
  try:
    records = np.load(path, mmap_mode="r", allow_pickle=False)
  except (OSError, ValueError, EOFError) as error:
    raise _damaged(path, f"cannot be read ({error})") from error
  fields = records.dtype.fields or {}
  same = list(fields) == ["id", *(kind.names or ())] and records.dtype["id"].kind == "S"
  if not same or any(fields[n][0] != kind[n] for n in kind.names or ()):
    raise _damaged(path, f"has records of {records.dtype}, and not an id and {kind}")
  if records.shape != (count,):
    raise _damaged(path, f"has {list(records.shape)} records, {count} were written")
  return records


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
  begun = [(int(view), read_part) for view in manifest.get("parts", {})]
  for view, read in [*((view, read_view) for view in complete_views(manifest)), *begun]:
    try:
      read(folder, manifest, view, ids)
    except CacheError as error:
      problems.setdefault(str(error), []).append(view)
  return problems


def forget(folder: pathlib.Path, views: Sequence[int]) -> None:
  """Drops views, so that they are filled again."""
  with _locked(folder):
    manifest = read_manifest(folder)
    dropped = [shard for view in views for shard in manifest["views"].pop(str(view), [])]
    for view in views:
      dropped += manifest.get("parts", {}).pop(str(view), [])
    _write_manifest(folder, manifest)  # first, for the reason for which it comes last in writing
    for shard in dropped:
      (folder / shard["file"]).unlink(missing_ok=True)
