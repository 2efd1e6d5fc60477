"""Manifests: size and SHA-256 of every file of a folder, written last and checked before use."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

from jaxdistill.runs._files import (
  BELIEVED,
  WRITING,
  altered,
  entry,
  read_digested,
  size_and_digest,
  within,
  write_digested,
)

__all__ = [
  "MANIFEST",
  "CheckpointError",
  "as_json",
  "check_size",
  "clear_unfinished",
  "damaged",
  "digests",
  "discard",
  "file_names",
  "first_few",
  "listing",
  "locate",
  "publish",
  "read_manifest",
  "verify",
  "write_manifest",
]

MANIFEST = "manifest.json"
_REMOVED = ".removed"
_FORMAT = 1
# Zeros take no room on the disk, and weights may be mostly zeros: so much is read in any case.
_ZEROS = 2**28


class CheckpointError(RuntimeError):
  """A checkpoint is damaged or half written, or could not be saved."""


def file_names(folder: pathlib.Path) -> list[str]:
  """The files below a folder, but for the manifest."""
  inside = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
  return sorted(name for name in inside if name != MANIFEST)


def as_json(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
  """Metadata as JSON brings it back."""
  try:
    return json.loads(json.dumps(dict(metadata or {})))
  except (TypeError, ValueError) as error:
    raise TypeError(f"metadata={metadata!r} is not what JSON can hold: {error}") from error


def damaged(folder: pathlib.Path, file: str, reason: str) -> CheckpointError:
  """The error that names folder, file and reason."""
  return CheckpointError(f"The checkpoint {folder} cannot be used: {file} {reason}.")


def check_size(folder: pathlib.Path, size: int, there: int, expected: int = 0) -> None:
  """Raises where arrays would take more memory than their files, or who wants them, account for."""
  if size > max(_ZEROS, BELIEVED * there, expected):
    problem = f"would take {size:,} bytes, more than ten times what lies there"
    raise damaged(folder, "what it holds", f"{problem}: say what it is by like=")


def digests(folder: pathlib.Path, names: Iterable[str]) -> dict[str, Any]:
  """Size and SHA-256 of files of a folder."""
  return {name: size_and_digest(folder / name) for name in names}


def write_manifest(
  folder: pathlib.Path, body: dict[str, Any], files: dict[str, Any] | None = None
) -> None:
  """Adds size and SHA-256 of every file to ``body`` and writes it, whole or not at all.

  Args:
    folder: the folder.
    body: what else the manifest says.
    files: from `digests`, of all files, where others have read them; None reads them here.
  """
  there = file_names(folder)
  files = digests(folder, there) if files is None else {name: files[name] for name in there}
  body = {"format": _FORMAT, **body, "files": files, "file_count": len(files)}
  write_digested(folder / MANIFEST, body)


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
  """The manifest, after verifying that it is as it was written."""
  try:
    body = read_digested(folder / MANIFEST)
    if body.get("format") == _FORMAT:
      _check_body(folder, body)
  except FileNotFoundError:
    raise damaged(folder, MANIFEST, "is missing, so it is half written") from None
  except ValueError as error:
    raise damaged(folder, MANIFEST, str(error)) from error
  if body.get("format") != _FORMAT:
    raise damaged(folder, MANIFEST, f"is of format {body.get('format')!r:.100}, not {_FORMAT}")
  return body


def _check_body(folder: pathlib.Path, body: dict[str, Any]) -> None:
  """Raises ValueError where a manifest that has its own digest does not say what it must."""
  entry(body, "file_count", int)
  for name, about in entry(body, "files", dict).items():
    within(folder, name)
    entry(about, "bytes", int)
    entry(about, "sha256", str)
  if "items" in body:  # a checkpoint of ours, and no other folder
    entry(body, "items", dict)
    entry(body, "metadata", dict)
    entry(body, "score", (float, type(None)))


def verify(
  folder: pathlib.Path,
  items: list[str] | None = None,
  part: tuple[int, int] = (0, 1),
) -> dict[str, Any]:
  """Compares the files with the manifest.

  Args:
    folder: the folder.
    items: of which alone the digests are compared; None for all.
    part: ``(p, P)``: the p-th of P processes that each compare the digests of some of the files.

  Returns:
    The manifest.

  Raises:
    CheckpointError: a file is missing, too many, or not what was written.
  """
  body = read_manifest(folder)
  expected, found = body["files"], file_names(folder)
  for name in sorted(set(expected) - set(found)):
    raise damaged(folder, name, "is missing")
  if len(found) != body["file_count"]:
    extra = first_few(sorted(set(found) - set(expected)))
    raise damaged(folder, extra, f"was not written with it ({body['file_count']} files were)")
  try:
    for number, (name, about) in enumerate(sorted(expected.items())):
      asked = items is None or "/" not in name or name.split("/")[0] in items
      asked = asked and number % part[1] == part[0]
      problem = altered(folder / name, about, whole=asked)
      if problem:
        raise damaged(folder, name, problem)
  except OSError as error:
    raise damaged(folder, name, f"cannot be read ({error})") from error
  return body


def first_few(names: list[str]) -> str:
  """The first few names."""
  rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
  return (", ".join(names[:5]) or "nothing") + rest


def listing(folder: pathlib.Path) -> list[pathlib.Path]:
  """What is in a folder; nothing if there is none."""
  return sorted(folder.iterdir()) if folder.is_dir() else []


def locate(target: pathlib.Path) -> pathlib.Path:
  """The folder; or the complete one that a killed process had no time to rename."""
  writing = target.with_name(target.name + WRITING)
  return writing if not target.exists() and (writing / MANIFEST).is_file() else target


def clear_unfinished(folder: pathlib.Path, names: str) -> None:
  """Finishes or removes what a killed process left behind."""
  for path in listing(folder):
    match = re.fullmatch(rf"({names})({WRITING}|{_REMOVED})(\..*)?", path.name)
    if match and locate(folder / match[1]) == path:
      os.rename(path, folder / match[1])
    elif match:
      _remove(path)


def publish(
  target: pathlib.Path, body: dict[str, Any], files: dict[str, Any] | None = None
) -> None:
  """Writes the manifest of the folder being written for ``target``, and gives it its name."""
  writing = target.with_name(target.name + WRITING)
  write_manifest(writing, body, files)
  if target.exists():
    discard(target)  # A kill between here and the rename loses nothing: see locate.
  os.rename(writing, target)


def discard(target: pathlib.Path) -> None:
  """Removes a folder, with no half of it ever under its name."""
  # Renamed first, so that a kill in the midst of it leaves no half a checkpoint.
  removed = target.with_name(target.name + _REMOVED)
  os.rename(target, removed)
  _remove(removed)


def _remove(folder: pathlib.Path) -> None:
  """Removes a folder; of a link to one, the link, since what it leads to is somebody else's."""
  if folder.is_symlink():
    folder.unlink()
  else:
    shutil.rmtree(folder)
