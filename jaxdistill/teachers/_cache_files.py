"""The files of a teacher cache: written whole or not at all, verified before they are believed.

A folder holds ``manifest.json``, ``ids.json`` and shards: of ArrayRecord, or of NumPy where another
program wrote them (`cache_writer`). ``docs/cache.md`` has the format. Views come into the manifest
when all their shards are there (`publish`); until then their files lie beside it, see
`_cache_shards`. Nothing here needs JAX, and nothing is unpickled.
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
from jaxdistill.teachers import _cache_shards
from jaxdistill.teachers._cache_shards import Shard
from jaxdistill.teachers.cache_writer import FORMAT, IDS, SHARD_BYTES, row_type

__all__ = [
  "SHARD_BYTES",
  "CacheError",
  "Mapped",
  "check_shard",
  "complete_views",
  "create",
  "expected_bytes",
  "forget",
  "lacking",
  "prefix",
  "publish",
  "read_begun",
  "read_ids",
  "read_manifest",
  "read_shards",
  "read_view",
  "shard_records",
  "verify_cache",
  "write_rows",
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
# What such a file has beside its records: for each a header and its place in the index, and blocks
# that are filled up, the last one twice.
_FRAME, _BLOCK = 53, 2**16
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
    if not os.path.isdir(folder):  # nor where its name is none that the disk takes
      raise FileNotFoundError
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
  for name in ("shard_records", "batch_size"):  # of our own caches
    if name in body and entry(body, name, int) < 1:
      raise ValueError(f"has {body[name]} for {name}")
  if not 0 < entry(body, "view_count", int) < 10**9:
    raise ValueError(f"has {body['view_count']} views")
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


def shard_records(size: int, views: int, row: np.dtype, batch_size: int) -> int:
  """How many records a shard of a new cache has, see `_cache_shards.shard_records`.

  Args:
    size: N.
    views: V.
    row: from `cache_writer.row_type`.
    batch_size: examples in a batch while the cache is filled.
  """
  most = max(1, SHARD_BYTES // (row.itemsize + _FRAME))
  return _cache_shards.shard_records(size, views, most, batch_size)


def expected_bytes(row: np.dtype, ids: Sequence[str], shards: Sequence[Shard]) -> int:
  """What the files of these shards will take, by arithmetic.

  Args:
    row: from `cache_writer.row_type`.
    ids: of the examples, in the order of a view's records.
    shards: the shards.
  """
  each = np.array([len(prefix(id)) + row.itemsize + _FRAME for id in ids], np.int64)
  ends = np.concatenate([[0], np.cumsum(each)])
  # Each block begins with 24 bytes of its own.
  records = (ends[s.last] - ends[s.first] for s in shards)
  return sum(_BLOCK * (math.ceil(n * (1 + 24 / _BLOCK) / _BLOCK) + 1) for n in records)


def write_rows(
  folder: pathlib.Path,
  manifest: Mapping[str, Any],
  shard: Shard,
  rows: Mapping[str, np.ndarray],
  ids: Sequence[str],
) -> pathlib.Path:
  """Writes rows of a view that is not complete; any number of processes may do so at once.

  Args:
    folder: the cache.
    manifest: its manifest.
    shard: which rows of the view.
    rows: ``[records, ...]`` by name, as the manifest has them.
    ids: of the whole view, in the order of ``ids.json``.

  Returns:
    The file, whose name appears when it is whole.
  """
  from array_record.python import array_record_module as array_record

  # [records] of a structured type: a row's arrays lie side by side, as they will in the file.
  packed = np.empty(shard.records, row_type(manifest["arrays"]))
  for name, values in rows.items():
    packed[name] = values
  own = _cache_shards.path_of(folder, shard, "").with_suffix(f".{_cache_shards.unique()}")
  with replacing(own, durable=True) as writing:
    writer = array_record.ArrayRecordWriter(str(writing), _OPTIONS)
    for id, row in zip(ids[shard.first : shard.last], packed, strict=True):
      writer.write(prefix(id) + row.tobytes())
    writer.close()
  path = _cache_shards.path_of(folder, shard, sha256(own))
  os.replace(own, path)
  return path


def publish(folder: pathlib.Path) -> list[int]:
  """Names in the manifest the views whose shards are all there, and clears away their leftovers.

  Args:
    folder: the cache.

  Returns:
    The views that were added.

  Raises:
    CacheError: a file is not as its name says.
  """
  with _locked(folder):
    manifest = read_manifest(folder)
    views = _cache_shards.views_begun(folder, manifest)
    files = _cache_shards.rows_of(folder, _cache_shards.shards_of(manifest, views))
    added = {}
    for view in views:
      mine = {shard: found for shard, found in files.items() if shard.view == view}
      if all(found and found[0].last == shard.last for shard, found in mine.items()):
        added[str(view)] = [_as_written(found[0]) for found in mine.values()]
    if added:
      # The shards are on the disk before the manifest names them: whoever is killed here leaves
      # files that the next one finds.
      _write_manifest(folder, manifest | {"views": {**manifest["views"], **added}})
      for number, shards in added.items():
        for path in _cache_shards.leftovers(folder, int(number), [s["file"] for s in shards]):
          path.unlink(missing_ok=True)
    return sorted(map(int, added))


def _as_written(rows: _cache_shards.Rows) -> dict[str, Any]:
  """What a manifest says of a shard, whose file is read back."""
  known = size_and_digest(rows.path)
  if not known["sha256"].startswith(rows.digest):
    raise _damaged(rows.path, "is not as it was written (its SHA-256 is not that of its name)")
  return {"file": rows.path.name, "records": rows.records, **known}


def lacking(folder: pathlib.Path, manifest: Mapping[str, Any]) -> int:
  """How many records nobody has filled yet, of all views."""
  begun = _cache_shards.views_begun(folder, manifest)
  files = _cache_shards.rows_of(folder, _cache_shards.shards_of(manifest, begun))
  there = sum(rows.records for found in files.values() for rows in found)
  size: int = manifest["data"]["size"]
  return (manifest["view_count"] - len(manifest["views"])) * size - there


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
  kind, first = row_type(manifest["arrays"]), 0
  packed = np.empty(len(ids), kind)
  for rows in read_shards(folder, manifest, view, ids):
    packed[first : first + len(rows)] = rows
    first += len(rows)
  return {name: np.ascontiguousarray(packed[name]) for name in kind.names or ()}


def read_shards(
  folder: pathlib.Path, manifest: Mapping[str, Any], view: int, ids: Sequence[str]
) -> Iterator[np.ndarray]:
  """The rows of one view shard by shard, ``[records]`` of a structured type each, verified.

  Args:
    folder: the cache.
    manifest: its manifest.
    view: the view's number.
    ids: from `read_ids`.

  Raises:
    CacheError: a shard is missing, damaged, or of other examples; or the view lacks some.
  """
  shards = manifest["views"][str(view)]
  found = sum(shard["records"] for shard in shards)
  if found != len(ids):
    raise _damaged(folder / MANIFEST, f"has {found} of {len(ids)} examples in view {view}")
  kind, first = row_type(manifest["arrays"]), 0
  for shard in shards:
    check_shard(folder, shard)
    whose = ids[first : first + shard["records"]]
    read = _read_npy if shard["file"].endswith(".npy") else _read_array_record
    yield read(folder / shard["file"], shard["records"], kind, whose)
    first += shard["records"]


def read_begun(
  manifest: Mapping[str, Any], files: Sequence[_cache_shards.Rows], ids: Sequence[str]
) -> Iterator[np.ndarray]:
  """The first rows of a shard that is not complete, file by file, as `read_shards` gives a view's.

  Args:
    manifest: the cache's.
    files: from `_cache_shards.rows_of`.
    ids: from `read_ids`.
  """
  for rows in files:
    known = _as_written(rows)
    kind, whose = row_type(manifest["arrays"]), ids[rows.first : rows.last]
    yield _read_array_record(rows.path, known["records"], kind, whose)


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

  def look(view: int, read: Iterator[np.ndarray]) -> None:
    try:
      for _ in read:  # a shard at a time: a view may be larger than memory
        pass
    except CacheError as error:
      problems.setdefault(str(error), []).append(view)

  for view in complete_views(manifest):
    look(view, read_shards(folder, manifest, view, ids))
  others = _cache_shards.shards_of(manifest, _cache_shards.views_begun(folder, manifest))
  for shard, files in _cache_shards.rows_of(folder, others).items():
    look(shard.view, read_begun(manifest, files, ids))
  return problems


def forget(folder: pathlib.Path, views: Sequence[int]) -> None:
  """Drops views, so that they are filled again."""
  with _locked(folder):
    manifest = read_manifest(folder)
    dropped = [shard for view in views for shard in manifest["views"].pop(str(view), [])]
    _write_manifest(folder, manifest)  # first, for the reason for which it comes last in writing
    paths = [folder / shard["file"] for shard in dropped]
    for path in [*paths, *(p for view in views for p in _cache_shards.leftovers(folder, view, []))]:
      path.unlink(missing_ok=True)
