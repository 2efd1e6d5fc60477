"""How any number of processes fill one cache, who need not talk to one another.

A view is cut into shards, the same for everybody. Who fills one claims it, by a file that only one
of them can make; rows lie in files whose names say which rows they are and the beginning of their
digest. A name appears when its file is whole, so what there is can be told from the folder alone,
whoever died and whenever. A claim of the dead is taken over. Should two ever fill the same shard,
they write the same rows: nothing that is there is harmed. Nothing here needs JAX.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import secrets
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxdistill.runs import WRITING, read_object

__all__ = [
  "BEAT",
  "SHARDS",
  "SILENT",
  "Rows",
  "Shard",
  "claimed",
  "leftovers",
  "parts_of",
  "path_of",
  "rows_of",
  "shard_records",
  "shards_of",
  "share",
  "unique",
  "views_begun",
]

# At least so many shards, where examples allow: what many processes share, and one loses by dying.
SHARDS = 64
# How often who fills a shard says that it is alive, and after how long a silence it is taken for
# dead, in seconds. The clock is the folder's: those of several machines may differ.
BEAT, SILENT = 20.0, 180.0
_NAME = re.compile(r"view-(\d{5,9})-from-(\d{9})-to-(\d{9})-([0-9a-f]{16})\.array_record")


@dataclasses.dataclass(frozen=True, order=True)
class Shard:
  """Records ``first .. last - 1`` of a view, which one process fills."""

  view: int
  first: int
  last: int

  @property
  def records(self) -> int:
    """How many they are."""
    return self.last - self.first


@dataclasses.dataclass(frozen=True, order=True)
class Rows(Shard):
  """A file of rows: of a whole shard, or of a shard's first rows where its filler has not ended.

  Attributes:
    digest: the first 16 characters of the file's SHA-256, as its name has them.
    path: the file.
  """

  digest: str
  path: pathlib.Path


def shard_records(size: int, views: int, most: int, batch_size: int) -> int:
  """How many records a shard has: whole batches, so that no batch is computed for two shards.

  Args:
    size: N.
    views: V.
    most: as many as a file may have.
    batch_size: examples in a batch while the cache is filled.

  >>> shard_records(1_281_167, 8, 60_000, 256), shard_records(50_000, 1, 600_000, 256)
  (59904, 768)
  """
  each = -(-size // -(-SHARDS // views))  # so that the views together have `SHARDS`
  return max(1, min(most, each) // batch_size) * batch_size


def shards_of(manifest: Mapping[str, Any], views: Sequence[int] | None = None) -> list[Shard]:
  """The shards of a cache, or of some of its views, in their order."""
  size = manifest["data"]["size"]
  each = manifest.get("shard_records", size)
  return [
    Shard(view, first, min(first + each, size))
    for view in (range(manifest["view_count"]) if views is None else views)
    for first in range(0, size, each)
  ]


def share(shards: Sequence[Shard], part: tuple[int, int]) -> list[Shard]:
  """The p-th of P shares of some shards, neighbours, as near to equal as can be."""
  count = len(shards)
  return list(shards[count * part[0] // part[1] : count * (part[0] + 1) // part[1]])


def path_of(folder: pathlib.Path, rows: Shard, digest: str) -> pathlib.Path:
  """What a file of these rows is called."""
  name = f"view-{rows.view:05d}-from-{rows.first:09d}-to-{rows.last:09d}"
  return folder / f"{name}-{digest[:16]}.array_record"


def rows_of(folder: pathlib.Path, shards: Sequence[Shard]) -> dict[Shard, list[Rows]]:
  """What there is of some shards, as far as their first rows go: files that follow one another.

  Args:
    folder: the cache.
    shards: those that are looked for.

  Returns:
    For each of them its files, in the order of their rows; one that is complete has one file.
  """
  at: dict[tuple[int, int], Rows] = {}
  for entry in os.scandir(folder):
    if said := _NAME.fullmatch(entry.name):
      view, first, last = (int(number) for number in said.groups()[:3])
      made = Rows(view, first, last, said[4], folder / entry.name)
      # The longest file that begins here: a whole shard stands for the parts of it.
      if (view, first) not in at or at[view, first] < made:
        at[view, first] = made
  found = {}
  for shard in shards:
    files, first = [], shard.first
    while (rows := at.get((shard.view, first))) and first < rows.last <= shard.last:
      files.append(rows)
      first = rows.last
    found[shard] = files
  return found


def parts_of(folder: pathlib.Path, shard: Shard) -> list[pathlib.Path]:
  """The files of some of a shard's rows."""
  paths = folder.glob(f"view-{shard.view:05d}-from-*")
  found = [(_NAME.fullmatch(path.name), path) for path in paths]
  spans = [(int(said[2]), int(said[3]), path) for said, path in found if said]
  return [
    path
    for first, last, path in spans
    if shard.first <= first and last <= shard.last and last - first < shard.records
  ]


def views_begun(folder: pathlib.Path, manifest: Mapping[str, Any]) -> list[int]:
  """The views that are not complete, and of which there is a file."""
  there = {int(said[1]) for entry in os.scandir(folder) if (said := _NAME.fullmatch(entry.name))}
  return sorted(v for v in there - {*map(int, manifest["views"])} if v < manifest["view_count"])


def leftovers(folder: pathlib.Path, view: int, known: Sequence[str]) -> list[pathlib.Path]:
  """What lies about of a view that is complete: rows of shards that were begun, claims."""
  paths = folder.glob(f"view-{view:05d}-from-*")
  return [path for path in paths if path.name not in known]


def unique() -> str:
  """A name that no other process writes under."""
  return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


@contextlib.contextmanager
def claimed(folder: pathlib.Path, shard: Shard) -> Iterator[bool | None]:
  """Claims a shard, and says every few seconds that whoever has it is alive.

  Args:
    folder: the cache.
    shard: the shard.

  Yields:
    True where it is ours, None where it is ours and was that of a process that is dead, and False
    where another one that is alive has it.
  """
  path = folder / f"view-{shard.view:05d}-from-{shard.first:09d}.claim"
  took = None
  mine = _made(path)
  if not mine and _taken_from_dead(path):
    mine = _made(path)
    took = mine or None
  if not mine:
    yield False
    return
  ended = threading.Event()

  def beat() -> None:
    while not ended.wait(BEAT):
      with contextlib.suppress(OSError):
        os.utime(path)

  beats = threading.Thread(target=beat, daemon=True)
  beats.start()
  try:
    yield None if took else True
  finally:
    ended.set()
    beats.join()
    if _holder(path) == _me():
      path.unlink(missing_ok=True)


def _made(path: pathlib.Path) -> bool:
  """Whether the claim could be made: nobody has it."""
  try:
    # Exclusive on a network's file system too; a link of that name is not followed.
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
  except FileExistsError:
    return False
  with os.fdopen(number, "w") as file:
    json.dump(_me(), file)
  return True


def _taken_from_dead(path: pathlib.Path) -> bool:
  """Removes a claim if who made it is dead; of several who try at once, one does it."""
  holder = _holder(path)
  if not _is_dead(path, holder):
    return False
  aside = path.with_name(f"{path.name}.{unique()}{WRITING}")
  try:
    os.rename(path, aside)
  except FileNotFoundError:  # another one was faster
    return False
  if _holder(aside) != holder:
    # Between the look and the rename somebody else had taken it: it is theirs again. (Were it
    # claimed a third time by now, two would fill it, and write the same.)
    with contextlib.suppress(OSError):
      os.link(aside, path)
    aside.unlink(missing_ok=True)
    return False
  aside.unlink(missing_ok=True)
  return True


def _holder(path: pathlib.Path) -> dict[str, Any]:
  """Who made a claim; nobody known where it is just being made, or is no claim."""
  try:
    return read_object(path)
  except (OSError, ValueError):
    return {}


def _is_dead(path: pathlib.Path, holder: Mapping[str, Any]) -> bool:
  """Whether who made a claim is gone: its process here, or elsewhere its sign of life."""
  me = _me()
  if me["machine"] and holder.get("machine") == me["machine"]:
    return _started(holder.get("pid")) != holder.get("started")
  try:
    beat = path.stat().st_mtime
    with tempfile.TemporaryFile(dir=path.parent) as clock:
      return os.fstat(clock.fileno()).st_mtime - beat > SILENT
  except FileNotFoundError:
    return False


def _me() -> dict[str, Any]:
  """This process: a number alone may be another's by tomorrow, or in another container."""
  machine = ""
  with contextlib.suppress(OSError):
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
  pid = os.getpid()
  return {"host": socket.gethostname(), "machine": machine, "pid": pid, "started": _started(pid)}


def _started(pid: Any) -> str | None:
  """When a process of this machine began, in the system's ticks; None where there is none."""
  try:
    said = pathlib.Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
  except (OSError, ValueError, TypeError):
    return None
  # Killed, and not yet asked by its parent how it ended: it computes nothing any more.
  return None if said[0] in "ZX" else said[19]
