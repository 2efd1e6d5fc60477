"""The decoded arrays of small sets, kept on disk: what one process has decoded, the next one loads.

An entry is two files, the arrays and a manifest: what decided them, their size and their SHA-256.
An entry that is not as it was written is not believed, and what cannot be written is done without.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxdistill import _check, runs

__all__ = ["folder_of", "kept"]

# Counted up when the arrays that are made of the same files change.
_FORMAT = 1
# A cache that nobody asked for may take a second or two to write and little of a home's quota. This
# is CIFAR-100's size six times over; what is larger is better streamed.
_LARGEST = 2**30
# Of all entries together: those used last stay.
_ALL = 4 * 2**30


def folder_of(cache: bool | str | os.PathLike[str]) -> pathlib.Path | None:
  """The folder that the argument ``cache`` means: the user's for True, none for False.

  Raises:
    TypeError: it is neither a truth value nor a path.
  """
  if cache is False:
    return None
  if cache is not True:
    if not isinstance(cache, str | os.PathLike) or not os.fspath(cache):
      raise TypeError(
        f"cache={_check.show(cache)} must be True (the user's cache folder), False or a folder."
      )
    return pathlib.Path(cache)
  try:
    return runs.user_cache("data")
  except RuntimeError:  # a user without a home
    return None


def kept(
  folder: pathlib.Path, name: str, decides: Mapping[str, Any], make: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
  """The arrays that ``make`` makes, from the disk where they are there already.

  Args:
    folder: of all entries; made where something is written.
    name: of the data set, for the files' names.
    decides: all that decides the arrays, as JSON has it.
    make: makes them; a dict of arrays, or of what is not kept.

  Returns:
    What ``make`` returns: arrays that are the caller's own.
  """
  decides = {**decides, "format": _FORMAT}
  path = folder / f"{name}-{runs.short_digest(decides)}.npz"
  arrays = _read(path, decides)
  if arrays is None:
    arrays = make()
    _write(path, decides, arrays)
  return arrays


def _read(path: pathlib.Path, decides: Mapping[str, Any]) -> dict[str, Any] | None:
  """The arrays of an entry; None where there is none, or none to be believed."""
  manifest = path.with_suffix(".json")
  try:
    if not manifest.is_file():
      return None
    written = runs.read_digested(manifest)
    if runs.entry(written, "decides", dict) != decides:
      return None
    runs.entry(written, "sha256", str)
    problem = runs.altered(path, written)
    if problem is None:
      arrays = runs.read_npz(path)
      with contextlib.suppress(OSError):
        os.utime(manifest)  # used last: now
      return arrays
  except ValueError as error:
    problem = str(error)
  except OSError as error:
    problem = f"cannot be read ({error})"
  warnings.warn(f"{path} {problem}: its data set is decoded anew.", stacklevel=4)
  return None


def _write(path: pathlib.Path, decides: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
  """Keeps arrays, unless they are not NumPy's own or larger than a cache unasked for may be."""
  plain = all(isinstance(a, np.ndarray) and not a.dtype.hasobject for a in arrays.values())
  if not plain or sum(array.nbytes for array in arrays.values()) > _LARGEST:
    return
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may want one entry at once (the seeds of a study): each writes a whole one
    # of its own, and whichever comes last puts the same bytes in the same place.
    with tempfile.TemporaryDirectory(prefix=runs.WRITING, dir=path.parent) as own:
      whole = pathlib.Path(own) / path.name
      runs.write_npz(whole, arrays, compressed=False)
      body = {"decides": decides, **runs.size_and_digest(whole)}
      runs.write_digested(whole.with_suffix(".json"), body)
      for suffix in (".npz", ".json"):  # an entry is there when its manifest is
        os.replace(whole.with_suffix(suffix), path.with_suffix(suffix))
  except OSError as error:
    # Python says a warning of one text once: not at every set of a search.
    warnings.warn(
      f"Decoded data cannot be kept under {path.parent} ({error.strerror or error}), so it is "
      "decoded in every process: pass cache=, a folder that can be written to, or cache=False.",
      stacklevel=4,
    )
    return
  with contextlib.suppress(OSError):  # another process may forget at the same time
    _forget(path.parent)


def _forget(folder: pathlib.Path) -> None:
  """Removes what killed processes left, and beyond `_ALL` the entries not used for longest."""
  for left in folder.glob(f"{runs.WRITING}*"):
    if time.time() - left.stat().st_mtime > 3600:  # nobody writes an entry for so long
      shutil.rmtree(left, ignore_errors=True)
  entries = [
    (manifest.stat().st_mtime_ns, arrays.stat().st_size, arrays, manifest)
    for manifest in folder.glob("*-*.json")
    if (arrays := manifest.with_suffix(".npz")).is_file()
  ]
  room = _ALL
  for _, size, arrays, manifest in sorted(entries, reverse=True):
    room -= size
    if room < 0:
      manifest.unlink(missing_ok=True)
      arrays.unlink(missing_ok=True)
