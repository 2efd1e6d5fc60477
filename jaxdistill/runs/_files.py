"""Files that are written whole or not at all, and known again by their SHA-256; without JAX."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
from collections.abc import Iterator

__all__ = ["WRITING", "replacing", "sha256", "write_text"]

WRITING = ".writing"


@contextlib.contextmanager
def replacing(path: pathlib.Path, *, durable: bool = False) -> Iterator[pathlib.Path]:
  """A path to write to, which then takes the place of ``path``: nobody ever sees half a file.

  For libraries that write a file themselves. What a killed process leaves beside the file is
  written over by the next one.

  Args:
    path: the file, in a folder that is there.
    durable: whether not even a power cut may leave half of it: waits for the disk.

  Yields:
    A path in the same folder, ``path`` with `WRITING` at its end.
  """
  writing = path.with_name(path.name + WRITING)
  yield writing
  if durable:
    _sync(writing)
  os.replace(writing, path)
  if durable:
    _sync(path.parent)  # the new name is the folder's content, not the file's


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
    durable: as `replacing` has it.
  """
  with replacing(path, durable=durable) as writing:
    writing.write_bytes(text.encode("utf-8", "replace"))


def sha256(path: pathlib.Path) -> str:
  """The SHA-256 of a file."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
