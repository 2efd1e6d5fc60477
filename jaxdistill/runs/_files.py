"""Files that are written whole or not at all, and known again by size and SHA-256; without JAX.

`user_cache` says where what can be made anew is kept between processes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import pathlib
import stat
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

__all__ = [
  "BELIEVED",
  "SMALL",
  "WRITING",
  "altered",
  "check_links",
  "digest",
  "entry",
  "parse_json",
  "read_digested",
  "read_json",
  "read_npz",
  "read_object",
  "read_text",
  "replacing",
  "sha256",
  "size_and_digest",
  "user_cache",
  "within",
  "write_digested",
  "write_npz",
  "write_text",
  "writes",
]

WRITING = ".writing"
# How many times its file what is read may take of memory, and what is little enough to be any size.
BELIEVED = 10
SMALL = 2**20
_LINK = "is a link out of its folder (cp -rL copies what links lead to)"
# What reading an archive raises: none, one cut off, packed in a way that Python lacks, encrypted.
_DAMAGE = (
  *(OSError, ValueError, EOFError, MemoryError, RuntimeError),
  *(zipfile.BadZipFile, zlib.error),
)
# What keeps everybody from writing, and what to do about it.
_ROOM = "free some room there, or name another folder; what was written before is kept"
_RIGHT = "name a folder that can be"
_REFUSED = {
  errno.ENOSPC: f"the disk is full: {_ROOM}",
  errno.EDQUOT: f"your quota is used up: {_ROOM}",
  errno.EFBIG: f"it would be larger than a file may be: {_ROOM}",
  errno.EEXIST: f"a file of that name is in the way: {_RIGHT}",
  errno.EISDIR: f"a folder of that name is in the way: {_RIGHT}",
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
      writing.unlink(missing_ok=True)  # a link of that name would have us write where it leads
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
  if _leads_out(path, path.parent):
    return _LINK
  if not path.is_file():
    return "is missing"
  size = path.stat().st_size
  if size != written.get("bytes", size):
    return f"has {size} bytes, {written['bytes']} were written"
  if whole and sha256(path) != written.get("sha256"):
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


def parse_json(content: bytes | str) -> Any:
  """What JSON says that anybody may have written.

  Raises:
    ValueError: it is no JSON, nested so deeply that Python gives up, would take more than ten times
      its size in memory, or has an integer that no float is as large as.
  """
  content = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
  # A list of nothing but empty lists takes twenty times its text; anything else, less than ten.
  if content.count(b"[") + content.count(b"{") > max(SMALL // 100, len(content) // 10):
    raise ValueError("is nested too deeply, or nearly all brackets")
  try:
    return json.loads(content, parse_int=_integer)
  except RecursionError as error:
    raise ValueError("is nested too deeply") from error


def _integer(digits: str) -> int:
  """What is read is compared, averaged and drawn as floats, of which the largest has 309 digits."""
  if len(digits) > 308:
    raise ValueError(f"has a number of {len(digits):,} digits")
  return int(digits)


def read_text(path: pathlib.Path) -> str:
  """The text of a file that anybody may have written, with a mark for what is no UTF-8.

  Raises:
    OSError: there is no such file, or it cannot be read; the message names it.
  """
  try:
    return _plain(path).read_text(encoding="utf-8", errors="replace")
  except ValueError as error:
    raise OSError(f"{path} {error}") from error


def read_json(path: pathlib.Path) -> Any:
  """What a file of JSON says that anybody may have written.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it cannot be read, or is no JSON; the message follows the file's name in a sentence.
  """
  try:
    return parse_json(_plain(path).read_bytes())
  except FileNotFoundError:
    raise
  except (OSError, ValueError) as error:
    raise ValueError(f"cannot be read ({error})") from error


def read_object(path: pathlib.Path) -> dict[str, Any]:
  """What a file of JSON says that anybody may have written, and that holds an object.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is damaged, or holds something else; the message names it.
  """
  try:
    found = read_json(path)
    if not isinstance(found, dict):
      raise ValueError(f"holds {found!r:.60} and no object")
  except ValueError as error:
    raise ValueError(f"{path} is damaged (it {error}): put it right, or move it away.") from error
  return found


def entry(body: Any, name: str, kind: type | tuple[type, ...]) -> Any:
  """What an object of JSON has under a name.

  Args:
    body: the object, or what stands in its place.
    name: the entry's.
    kind: what it must be: a type, or several. True is no number.

  Raises:
    ValueError: it is of another kind, or is not there; the message follows the file's name in a
      sentence.

  >>> entry({"bytes": 3}, "bytes", int)
  3
  """
  kinds = kind if isinstance(kind, tuple) else (kind,)
  found = body.get(name) if isinstance(body, dict) else None
  if type(found) not in kinds:
    wanted = " or ".join(one.__name__ for one in kinds)
    raise ValueError(f"has {found!r:.100} for {name}, which must be of type {wanted}")
  return found


def write_npz(path: pathlib.Path, arrays: Mapping[str, Any], *, compressed: bool = True) -> None:
  """Writes arrays of numbers or text as `read_npz` reads them; never seen half written.

  Args:
    path: the file, in a folder that is there.
    arrays: by name.
    compressed: whether to pack them, where they do not become so small that nobody would believe
      the archive.
  """
  plain: dict[str, Any] = {name: np.asarray(array) for name, array in arrays.items()}
  with replacing(path) as writing, writing.open("w+b") as file:
    save = np.savez_compressed if compressed else np.savez
    save(file, allow_pickle=False, **plain)
    if sum(array.nbytes for array in plain.values()) > BELIEVED // 2 * file.tell():
      file.seek(0)
      file.truncate()
      np.savez(file, allow_pickle=False, **plain)


def read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of an ``.npz`` archive that anybody may have written.

  Args:
    path: the file, of arrays of numbers or text.

  Raises:
    FileNotFoundError: it is not there.
    ValueError: it is damaged, or would take more than ten times its size in memory, as nothing
      does that `write_npz` wrote.
  """
  try:
    with zipfile.ZipFile(_plain(path)) as archive:
      members = archive.infolist()
      size, packed = sum(m.file_size for m in members), sum(m.compress_size for m in members)
      if size > max(SMALL, BELIEVED * min(packed, path.stat().st_size)):
        raise ValueError(f"holds {size:,} bytes in {packed:,}")
      return {m.filename.removesuffix(".npy"): _array(archive, m) for m in members}
  except FileNotFoundError:
    raise
  except _DAMAGE as error:
    raise ValueError(str(error) or type(error).__name__) from error


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
  """An array whose head claims what its member holds: NumPy takes the memory before it reads."""
  form = np.lib.format
  with archive.open(member) as file:
    head = (
      form.read_array_header_1_0 if form.read_magic(file)[0] == 1 else form.read_array_header_2_0
    )
    shape, _, dtype = head(file)
    if math.prod(shape) * dtype.itemsize > member.file_size or min(shape, default=0) < 0:
      raise ValueError(f"{member.filename} claims the shape {shape} in {member.file_size:,} bytes")
  with archive.open(member) as file:
    array = form.read_array(file, allow_pickle=False)
    if file.read(1):  # and so the checksum of all of it is compared
      raise ValueError(f"{member.filename} has more than its array")
  return array


def _plain(path: pathlib.Path) -> pathlib.Path:
  """The path, of a file to be read that is in its folder and no pipe, which one would wait for.

  Raises:
    OSError: there is none.
    ValueError: it is something else, or a link out of its folder; the message follows its name.
  """
  if _leads_out(path, path.parent):
    raise ValueError(_LINK)
  if not stat.S_ISREG(path.stat().st_mode):
    raise ValueError("is no file")
  return path


def within(folder: pathlib.Path, name: Any, *, links: bool = False) -> pathlib.Path:
  """The path of a file that another file names, if it lies in that file's folder.

  What a file says is believed of its own folder alone: a path that leads out of it would have us
  read, write or remove what is somebody else's. A link may lead to the ``blobs`` of Hugging Face's
  cache from its ``snapshots``, where a folder that was downloaded is all links.

  Args:
    folder: where it has to lie, at any depth.
    name: what the file says, relative to the folder.
    links: whether other links may lead out of it, which the user made and not the file's author.

  Raises:
    ValueError: it does not; the message follows the naming file's name in a sentence.

  >>> within(pathlib.Path("cache"), "view-0.array_record").as_posix()
  'cache/view-0.array_record'
  """
  spelled = [pathlib.PurePosixPath(str(name)), pathlib.PureWindowsPath(str(name))]
  leads_out = any(path.anchor or ".." in path.parts for path in spelled)
  if not isinstance(name, str) or not name.strip("./") or "\0" in name or leads_out:
    raise ValueError(f"names {name!r}, which is no file of its folder")
  try:
    (folder / name).exists()
  except OSError as error:  # longer than a name may be, which each later look at it would meet
    raise ValueError(f"names {name[:80]!r}: {error.strerror}") from error
  if not links and _leads_out(folder / name, folder):
    raise ValueError(f"names {name!r}, which {_LINK}")
  return folder / name


def check_links(folder: pathlib.Path) -> None:
  """Sees that what is read by a library stays in the folder that it was given.

  Raises:
    ValueError: a link leads out of it; the message names it.
  """
  for path in folder.rglob("*"):
    if path.is_symlink() and _leads_out(path, folder):
      raise ValueError(f"{path} {_LINK}")


def _leads_out(path: pathlib.Path, folder: pathlib.Path) -> bool:
  """Whether links, or links in a circle, lead from a path in a folder to where it has no part."""
  whole = folder.resolve()
  places = [whole, *(up.parent / "blobs" for up in whole.parents if up.name == "snapshots")]
  try:
    real = path.resolve()
  except (OSError, RuntimeError):
    return True
  return not any(real.is_relative_to(place) for place in places)


def read_digested(path: pathlib.Path) -> dict[str, Any]:
  """Reads what `write_digested` wrote.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is damaged; the message says how, and follows the file's name in a sentence.
  """
  body: dict[str, Any] = read_json(path)
  if not isinstance(body, dict) or "digest" not in body:
    raise ValueError("cannot be read (it has no digest)")
  try:
    intact = body["digest"] == digest(body)
  except RecursionError as error:  # what writes JSON gives up before what reads it
    raise ValueError("is nested too deeply") from error
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
