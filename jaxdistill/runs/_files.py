"""Files that are written whole or not at all, and known again by size and SHA-256; without JAX.

`user_cache` says where what can be made anew is kept between processes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import pathlib
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

__all__ = [
  "WRITING",
  "altered",
  "digest",
  "read_digested",
  "read_json",
  "read_npz",
  "replacing",
  "sha256",
  "size_and_digest",
  "user_cache",
  "within",
  "write_digested",
  "write_text",
  "writes",
]

WRITING = ".writing"
# How much larger than its file an archive may be, and what is little enough to be any size.
_UNPACKED = 10
_SMALL = 2**20
# What keeps everybody from writing, and what to do about it.
_ROOM = "free some room there, or name another folder; what was written before is kept"
_RIGHT = "name a folder that can be"
_REFUSED = {
  errno.ENOSPC: f"the disk is full: {_ROOM}",
  errno.EDQUOT: f"your quota is used up: {_ROOM}",
  errno.EFBIG: f"it would be larger than a file may be: {_ROOM}",
  errno.EROFS: f"the disk is only to be read: {_RIGHT}",
  errno.EACCES: f"you have no right to: {_RIGHT}",
  errno.EPERM: f"you have no right to: {_RIGHT}",
  errno.ENOTDIR: f"a part of the path is a file: {_RIGHT}",
  errno.ENAMETOOLONG: f"its name is too long: {_RIGHT}",
}


@contextlib.contextmanager
def writes(path: pathlib.Path) -> Iterator[None]:
  """Says in one sentence that something cannot be written, whichever library notices it.

  Args:
    path: what is written.

  Raises:
    OSError: the disk is full, or may not be written; with its ``errno``, and of the class that
      belongs to it (PermissionError).
  """
  try:
    yield
  except Exception as error:
    number = _system_error(error)
    if number is None or number not in _REFUSED:
      raise
    # Orbax shows a full disk under thirty kilobytes of its own frames.
    raise OSError(number, f"{path} cannot be written, {_REFUSED[number]}") from None


def _system_error(error: BaseException | None) -> int | None:
  """The number that the operating system gave, here or in what led here."""
  while error is not None:
    if isinstance(error, OSError) and error.errno is not None:
      return error.errno
    # TensorStore, which writes for Orbax, and ArrayRecord have it in their words alone.
    for number in _REFUSED:
      if os.strerror(number) in str(error):
        return number
    error = error.__cause__ or error.__context__
  return None


@contextlib.contextmanager
def replacing(path: pathlib.Path, *, durable: bool = False) -> Iterator[pathlib.Path]:
  """A path to write to, which then takes the place of ``path``: nobody ever sees half a file.

  For libraries that write a file themselves. What a killed process leaves beside the file is
  written over by the next one.

  Args:
    path: the file, in a folder that is there.
    durable: whether not even a power cut may leave half of it: waits for the disk.

  Raises:
    OSError: it cannot be written, see `writes`.

  Yields:
    A path in the same folder, ``path`` with `WRITING` at its end.
  """
  writing = path.with_name(path.name + WRITING)
  try:
    with writes(path):
      yield writing
      if durable:
        _sync(writing)
      os.replace(writing, path)
      if durable:
        _sync(path.parent)  # the new name is the folder's content, not the file's
  except Exception:
    with contextlib.suppress(OSError):
      writing.unlink()  # half a file fills a full disk all the more
    raise


def _sync(path: pathlib.Path) -> None:
  number = os.open(path, os.O_RDONLY)
  try:
    os.fsync(number)
  finally:
    os.close(number)


def write_text(path: pathlib.Path, text: str, *, durable: bool = False) -> None:
  """Writes a text so that the file is never seen half written; half a surrogate becomes ``?``.

  Args:
    path: the file, in a folder that is there.
    text: its content.
    durable: whether it is on the disk, and not only on its way, when this returns.
  """
  with replacing(path, durable=durable) as writing:
    writing.write_bytes(text.encode("utf-8", "replace"))


def sha256(path: pathlib.Path) -> str:
  """The SHA-256 of a file."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def size_and_digest(path: pathlib.Path) -> dict[str, Any]:
  """``bytes`` and ``sha256`` of a file: what a manifest says of it, and `altered` compares."""
  return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def altered(path: pathlib.Path, written: Mapping[str, Any], *, whole: bool = True) -> str | None:
  """How a file differs from what a manifest says of it, in words; None where it does not.

  Args:
    path: the file.
    written: its ``sha256``, and its ``bytes`` where they were written too.
    whole: whether the digest is compared, for which the whole file is read.

  Returns:
    ``"is missing"``, or what else follows the file's name in a sentence.

  Raises:
    OSError: the file is there and cannot be read.
  """
  if not path.is_file():
    return "is missing"
  size = path.stat().st_size
  if size != written.get("bytes", size):
    return f"has {size} bytes, {written['bytes']} were written"
  if whole and sha256(path) != written["sha256"]:
    return "is not as it was written (its SHA-256 differs)"
  return None


def digest(body: Mapping[str, Any]) -> str:
  """The digest of a manifest's own content."""
  rest = {name: value for name, value in body.items() if name != "digest"}
  return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_digested(path: pathlib.Path, body: Mapping[str, Any], *, durable: bool = False) -> None:
  """Writes a manifest with its own digest in it; ``durable``: on the disk when this returns."""
  rest = {name: value for name, value in body.items() if name != "digest"}
  write_text(path, json.dumps(rest | {"digest": digest(rest)}, indent=1), durable=durable)


def read_json(content: bytes | str) -> Any:
  """What JSON says, of a file that anybody may have written.

  Raises:
    ValueError: it is no JSON, or nested so deeply that Python gives up.
  """
  try:
    return json.loads(content)
  except RecursionError as error:
    raise ValueError("is nested too deeply") from error


def read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of an ``.npz`` archive that anybody may have written.

  Args:
    path: the file, of arrays of numbers or text.

  Raises:
    OSError: it is not there, or cannot be read.
    ValueError: it is damaged, or would take more than ten times its size in memory, as nothing
      does that was measured.
  """
  try:
    with zipfile.ZipFile(path) as archive:
      members = archive.infolist()
      size, packed = sum(m.file_size for m in members), sum(m.compress_size for m in members)
      if size > max(_SMALL, _UNPACKED * min(packed, path.stat().st_size)):
        raise ValueError(f"holds {size:,} bytes in {packed:,}")
      found = {}
      for member in members:
        content = io.BytesIO(archive.read(member))
        array = np.lib.format.read_array(content, allow_pickle=False)
        found[member.filename.removesuffix(".npy")] = array
      return found
  except OSError:
    raise
  # No archive, one cut off, one packed in a way that Python lacks, or an array without its content.
  except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, MemoryError, RuntimeError) as error:
    raise ValueError(str(error) or type(error).__name__) from error


def within(folder: pathlib.Path, name: Any, *, links: bool = False) -> pathlib.Path:
  """The path of a file that another file names, if it lies in that file's folder.

  What a file says is believed of its own folder alone: a path that leads out of it would have us
  read, write or remove what is somebody else's.

  Args:
    folder: where it has to lie, at any depth.
    name: what the file says, relative to the folder.
    links: whether symbolic links may lead out of it, which the user made and not the file's author.

  Raises:
    ValueError: it does not; the message follows the naming file's name in a sentence.

  >>> within(pathlib.Path("cache"), "view-0.array_record").as_posix()
  'cache/view-0.array_record'
  """
  spelled = [pathlib.PurePosixPath(str(name)), pathlib.PureWindowsPath(str(name))]
  leads_out = any(path.anchor or ".." in path.parts for path in spelled)
  if not isinstance(name, str) or not name.strip("./") or "\0" in name or leads_out:
    raise ValueError(f"names {name!r}, which is no file of its folder")
  path = folder / name
  if not links and not path.resolve().is_relative_to(folder.resolve()):
    raise ValueError(f"names {name!r}, a link out of its folder")
  return path


def read_digested(path: pathlib.Path) -> dict[str, Any]:
  """Reads what `write_digested` wrote.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is damaged; the message says how, and follows the file's name in a sentence.
  """
  try:
    body: dict[str, Any] = read_json(path.read_bytes())
    intact = body["digest"] == digest(body)
  except FileNotFoundError:
    raise
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ValueError(f"cannot be read ({error})") from error
  if not intact:
    raise ValueError("is not as it was written (its digest differs)")
  return body


def user_cache(name: str) -> pathlib.Path:
  """The user's folder for what can be made anew, where the operating system wants such things.

  Args:
    name: of one kind of thing, a folder of its own.

  Returns:
    ``$XDG_CACHE_HOME/jaxdistill/<name>`` where that variable is set (to an absolute path, as its
    specification asks), else ``~/.cache/jaxdistill/<name>``; on macOS ``~/Library/Caches``, on
    Windows ``%LOCALAPPDATA%``. The folder need not be there: whoever writes makes it.

  Raises:
    RuntimeError: this user has no home folder.
  """
  chosen = os.environ.get("XDG_CACHE_HOME", "")
  if not os.path.isabs(chosen) and sys.platform == "win32":
    chosen = os.environ.get("LOCALAPPDATA", "")
  if os.path.isabs(chosen):
    folder = pathlib.Path(chosen)
  elif sys.platform == "darwin":
    folder = pathlib.Path.home() / "Library" / "Caches"
  else:
    folder = pathlib.Path.home() / ".cache"
  return folder / "jaxdistill" / name
