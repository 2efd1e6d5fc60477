"""Checkpoints that are verified before they are believed, and saved while training goes on.

A checkpoint is a folder that Orbax wrote (each item a checkpointable: a flat dictionary of leaves
by path) with a ``manifest.json`` of ours in it: size and SHA-256 of every file, their count, the
structure of each item, the score, and the caller's metadata. Orbax does not notice a flipped bit;
the manifest does.

An array that lies in parts on a mesh is copied, written, read back and restored part by part: no
process has more of it on its host than its devices hold. Where the mesh has devices of several
processes, all of them call `Checkpoints.save`: each writes its parts into files of its own, reads
them back, and says their digests; process 0 writes the manifest when all have said so. What is
restored goes to where ``like`` lies, whatever mesh and however many processes wrote it.

A save goes to ``<step>.writing``; the manifest is written last, and then the folder gets its name
by a rename. So a folder named by a step is complete unless somebody touched it, and one without
a manifest counts as half written. Leftovers of a killed process are cleared at the next save.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import re
import threading
import time
import warnings
from collections.abc import Callable, Container, Iterator, Mapping
from types import ModuleType, TracebackType
from typing import Any

import jax
import numpy as np

from jaxdistill import _check
from jaxdistill.runs._files import WRITING, writes
from jaxdistill.runs._folder import check_place
from jaxdistill.runs._manifest import (
  MANIFEST,
  CheckpointError,
  as_json,
  check_size,
  clear_unfinished,
  damaged,
  digests,
  discard,
  file_names,
  first_few,
  listing,
  locate,
  publish,
  read_manifest,
  verify,
)
from jaxdistill.runs._shards import Together, in_parts, same_bits
from jaxdistill.runs._trees import (
  check_items,
  check_like,
  from_outline,
  lying,
  named_leaves,
  place,
  snapshot,
  stored_as,
)

__all__ = ["CheckpointWarning", "Checkpoints", "load_variables", "save_variables", "wait_for_saves"]

# A pytree of arrays: parameters, statistics, a train state.
PyTree = Any
_VARIABLES = "variables"
# Bytes of the arrays in parts that are read back at a time, of each process's own.
_AT_ONCE = 2**28
# A folder is called so, and other programs count steps in 64 bits.
_MOST_STEPS = 2**63 - 1
# The threads that write, of all folders.
_SAVING: set[threading.Thread] = set()


class CheckpointWarning(UserWarning):
  """A checkpoint was skipped, because it is damaged or half written."""


class Checkpoints:
  """A folder of checkpoints by step: saved asynchronously, verified before use, a few kept.

  After a save is complete, and never before, all but the last `keep_last` and the best are
  removed. Saving a step that is there replaces it, damaged or not, once the new one is complete.
  Steps above the one just saved are left alone. Reading waits for a save under way.

  Use it as a context manager, or call `close`: the interpreter cannot finish a save at its exit.
  In a program of several processes, all of them save what lies in parts on the devices of several,
  each its own parts into the folder that all of them see; what one process has whole, process 0
  saves alone.

  Args:
    folder: where the checkpoints are; made at the first save.
    keep_last: how many of the last ones to keep, at least 1.
    keep_best: whether to keep the one with the highest score as well.
    together: whether all processes of the program call `latest`, `best` and `restore`: each then
      digests its share of the files, and believes the others theirs. By default a process reads by
      itself.

  Raises:
    ValueError: ``keep_last`` is below 1.

  >>> import tempfile
  >>> import jax.numpy as jnp
  >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
  ...   checkpoints.save(10, {"student": {"kernel": jnp.ones(3)}}, score=0.5)
  ...   checkpoints.latest(), checkpoints.restore(10)["student"]["kernel"].tolist()
  (10, [1.0, 1.0, 1.0])
  """

  def __init__(
    self,
    folder: str | os.PathLike[str],
    *,
    keep_last: int = 2,
    keep_best: bool = True,
    together: bool = False,
  ) -> None:
    _check.whole("keep_last", keep_last)
    self.folder = _check.folder("folder", folder)
    self.keep_last = keep_last
    self.keep_best = keep_best
    self._together = Together(None if together else {})
    self._thread: threading.Thread | None = None
    self._error: tuple[int, BaseException] | None = None

  def save(
    self,
    step: int,
    items: dict[str, PyTree],
    *,
    score: float | None = None,
    metadata: Mapping[str, Any] | None = None,
  ) -> None:
    """Copies the items to the host and writes them in the background.

    When it returns, the arrays may be donated. It waits for the save before this one first. Where
    an array lies on devices of several processes, all of them call this, with the same arguments.

    Args:
      step: which step this is, from 0 on.
      items: pytrees by name: ``{"state": state, "best": params}``. Leaves are arrays of any
        shape, typed random keys, or Python numbers.
      score: higher is better; ``best`` compares it. NaN and infinities count as no score.
      metadata: what JSON can hold, for `metadata`.

    Raises:
      CheckpointError: the save before this one failed.
      TypeError: a leaf is no array or number, or the metadata is not JSON.
      ValueError: a bad step, no items, a name that cannot be one, two leaves of one path, or an
        array on other processes' devices that lies on no mesh.
    """
    check_place(self.folder, "checkpoints")
    step = _check.whole("step", step, least=0, most=_MOST_STEPS)
    if not isinstance(items, Mapping):
      raise TypeError(f"items must be pytrees by name, got {_check.show(items)}.")
    if score is not None and not isinstance(score, float | int | np.number):
      raise TypeError(f"score={_check.show(score)} must be a number, or None.")
    head = {
      "step": step,
      "score": float(score) if score is not None and math.isfinite(score) else None,
      "metadata": as_json(metadata),
    }
    self.wait()
    _orbax()  # here, and not at the thread's first write: imports of two threads may meet
    arrays, described = snapshot(items)
    self._thread = threading.Thread(
      target=self._finish, args=(step, arrays, head | {"items": described})
    )
    _SAVING.add(self._thread)
    self._thread.start()

  def _finish(self, step: int, arrays: dict[str, dict[str, Any]], body: dict[str, Any]) -> None:
    try:
      together = Together(arrays)
      together.first(lambda: clear_unfinished(self.folder, r"\d+"))
      _commit(self.folder / str(step), arrays, body, together)
      together.first(lambda: self._retain(step))
    except BaseException as error:
      self._error = (step, error)
      if not threading.main_thread().is_alive():
        raise  # Nobody will call wait any more: let the thread's hook print it.
    finally:
      _SAVING.discard(threading.current_thread())

  def _retain(self, step: int) -> None:
    complete = self._complete()
    keep = set([s for s in complete if s <= step][-self.keep_last :])
    if self.keep_best:
      keep.update(self._by_score(complete, lambda _: None)[:1])
    for old in complete:
      if old < step and old not in keep:
        discard(self.folder / str(old))

  def _present(self) -> list[int]:
    names = [p.name.removesuffix(WRITING) for p in listing(self.folder)]
    numbers = {int(n) for n in names if re.fullmatch(r"0|[1-9]\d*", n)}
    return sorted(s for s in numbers if locate(self.folder / str(s)).is_dir())

  def _complete(self) -> list[int]:
    return [s for s in self._present() if (locate(self.folder / str(s)) / MANIFEST).is_file()]

  def _by_score(self, steps: list[int], damaged: Callable[[CheckpointError], None]) -> list[int]:
    scores = {}
    for step in steps:
      try:
        scores[step] = read_manifest(locate(self.folder / str(step)))["score"]
      except CheckpointError as error:
        damaged(error)
    scored = [s for s in scores if scores[s] is not None]
    return sorted(scored, key=lambda s: (-scores[s], s))

  def _join(self) -> None:
    if self._thread is not None:
      self._thread.join()
      self._thread = None

  def steps(self) -> list[int]:
    """The steps of the complete checkpoints, ascending; their digests are not verified."""
    self._join()
    return self._complete()

  def _first_verified(self, steps: list[int]) -> int | None:
    for step in steps:
      try:
        _verify(locate(self.folder / str(step)), None, self._together)
      except CheckpointError as error:
        _warn_skipped(error)
      else:
        return step
    return None

  def latest(self) -> int | None:
    """The newest step that verifies, or None; one that does not is skipped with a warning.

    Warns:
      CheckpointWarning: names the folder, the file, and what is wrong with it.
    """
    self._join()
    # Those that process 0 sees: a disk of several machines may show each another list.
    seen = self._together.each(lambda: json.dumps(self._present()))[0]
    return self._first_verified(json.loads(seen)[::-1])

  def best(self) -> int | None:
    """The step of the highest score that verifies, the earliest among equals; None without any.

    Warns:
      CheckpointWarning: a checkpoint is damaged, and passed over.
    """
    self._join()
    return self._first_verified(self._by_score(self._present(), _warn_skipped))

  def restore(self, step: int, like: dict[str, PyTree] | None = None) -> dict[str, PyTree]:
    """Reads a checkpoint after verifying it.

    Args:
      step: one of `steps`.
      like: the items to read, and how: pytrees of arrays, `jax.ShapeDtypeStruct`s or numbers, of
        the saved shapes and dtypes. Each leaf comes back as its like is: on the sharding given,
        or uncommitted where there is none. Only these items are read. An item that is None, or
        no ``like`` at all, reads what is there: arrays as NumPy's or JAX's as they were saved
        (64 bits that JAX has not enabled stay NumPy's), dataclasses and named tuples as
        dictionaries of their fields.

    Returns:
      The items by name.

    Raises:
      FileNotFoundError: there is no such folder or step; it names those that exist.
      CheckpointError: the checkpoint is damaged or half written.
      ValueError: an unknown item, or another structure, shape or dtype than was saved.
    """
    self._join()
    return _read(self._existing(step), like, self._together)

  def items(self, step: int) -> list[str]:
    """The names of what a checkpoint holds.

    Args:
      step: one of `steps`.

    Returns:
      The items' names, sorted.

    Raises:
      FileNotFoundError: there is no such folder or step.
      CheckpointError: its manifest is damaged.
    """
    self._join()
    return sorted(_described(self._existing(step)))

  def metadata(self, step: int) -> dict[str, Any]:
    """What `save` was given as metadata at this step, as JSON brings it back.

    Args:
      step: one of `steps`.

    Returns:
      The metadata; empty if there was none.

    Raises:
      FileNotFoundError: there is no such folder or step.
      CheckpointError: its manifest is damaged.
    """
    self._join()
    return read_manifest(self._existing(step))["metadata"]

  def _existing(self, step: int) -> pathlib.Path:
    path = locate(self.folder / str(_check.whole("step", step, least=0)))
    if not self.folder.is_dir():
      raise FileNotFoundError(f"there is no folder of checkpoints at {self.folder}.")
    if not path.is_dir():
      there = ", ".join(map(str, self._complete())) or "none"
      raise FileNotFoundError(f"no checkpoint of step {step} in {self.folder}; there are: {there}.")
    return path

  def wait(self) -> None:
    """Waits until the last save is complete.

    Raises:
      CheckpointError: it failed; the cause is attached.
    """
    self._join()
    failed, self._error = self._error, None
    if failed is not None:
      raise CheckpointError(
        f"saving the checkpoint of step {failed[0]} in {self.folder} failed: {failed[1]}"
      ) from failed[1]

  def close(self) -> None:
    """Waits for the last save, and raises what it raised."""
    self.wait()

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    self.close()


def wait_for_saves(seconds: float) -> None:
  """Waits for the saves under way in this process, for one that is about to be left.

  Args:
    seconds: at most.
  """
  until = time.monotonic() + seconds
  for thread in list(_SAVING):
    thread.join(max(0.0, until - time.monotonic()))


def save_variables(path: str | os.PathLike[str], variables: PyTree) -> None:
  """Saves one pytree, such as a teacher's or a deployed student's variables; synchronously.

  Args:
    path: a folder for it alone; a checkpoint that is there is replaced once this is complete.
    variables: a pytree of arrays. Where one lies on devices of several processes, all of them call
      this, and each writes what it holds.

  Raises:
    FileExistsError: ``path`` is a file, or a folder that holds something else.
    TypeError: a leaf is no array or number.

  >>> import tempfile
  >>> import jax.numpy as jnp
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   save_variables(f"{folder}/teacher", {"params": {"bias": jnp.zeros(2)}})
  ...   load_variables(f"{folder}/teacher")["params"]["bias"].shape
  (2,)
  """
  check_place(path, "saved variables", name="path")
  target = _check.folder("path", path)
  if listing(target) and not (target / MANIFEST).is_file():
    raise FileExistsError(f"path={target} holds something that is no checkpoint; take another.")
  arrays, described = snapshot({_VARIABLES: variables})
  together = Together(arrays)
  together.first(lambda: clear_unfinished(target.parent, re.escape(target.name)))
  body = {"step": None, "score": None, "metadata": {}, "items": described}
  _commit(target, arrays, body, together)


def load_variables(path: str | os.PathLike[str], like: PyTree | None = None) -> PyTree:
  """Loads what `save_variables` saved, after verifying it.

  Args:
    path: the folder.
    like: a pytree of arrays, or of `jax.ShapeDtypeStruct`, that what is read must have the
      structure, shapes and dtypes of; None reads what is there.

  Returns:
    The variables.

  Raises:
    FileNotFoundError: there is nothing at ``path``.
    CheckpointError: the checkpoint is damaged or half written.
    ValueError: another structure, shape or dtype than was saved.
  """
  target = locate(_check.folder("path", path))
  if not target.is_dir():
    raise FileNotFoundError(f"there is no checkpoint at path={target}.")
  return _read(target, {_VARIABLES: like}, Together({}))[_VARIABLES]


def _verify(folder: pathlib.Path, items: list[str] | None, together: Together) -> None:
  """Raises, in all processes that read together, where one finds its share of the files damaged."""

  def mine() -> None:
    verify(folder, items, (together.me, together.count))

  together.each(mine)


def _warn_skipped(error: CheckpointError) -> None:
  warnings.warn(f"{error} It is skipped.", CheckpointWarning, stacklevel=4)


def _orbax() -> ModuleType:
  from jaxdistill.runs import _orbax  # a quarter of a second, and only checkpoints need it

  return _orbax


def _commit(
  target: pathlib.Path,
  arrays: dict[str, dict[str, Any]],
  body: dict[str, Any],
  together: Together,
) -> None:
  writing = target.with_name(target.name + WRITING)

  def try_out() -> None:
    # Orbax wants to make it. Where it cannot, its threads wait for it five minutes, and Python for
    # them: so it is tried.
    with writes(target):
      writing.mkdir(parents=True)
      if arrays:
        writing.rmdir()

  def write() -> None:
    with writes(target):
      _orbax().write(writing, arrays)

  def read_back() -> str:
    _read_back(writing, arrays, first=together.me == 0)
    names = [n for n in file_names(writing) if _writer(n, together.count) == together.me]
    return json.dumps(digests(writing, names))

  try:
    together.first(try_out)
    if arrays:
      # Where one cannot write, Orbax keeps the others five minutes, out of reach of Python.
      together.each(write, watched=True)
    files = {n: one for said in together.each(read_back) for n, one in json.loads(said).items()}
    together.first(lambda: publish(target, body, files))
  except OSError:
    # Half a checkpoint would fill a full disk all the more; one that a kill left stays, see locate.
    if together.count == 1:
      with contextlib.suppress(OSError):
        clear_unfinished(target.parent, re.escape(target.name))
    raise


def _writer(name: str, count: int) -> int:
  """Which process wrote a file: Orbax has a folder for each, and all else is process 0's."""
  found = re.search(r"(?:^|/)ocdbt\.process_(\d+)/", name)
  return int(found[1]) if found and int(found[1]) < count else 0


def _read_back(folder: pathlib.Path, arrays: dict[str, dict[str, Any]], *, first: bool) -> None:
  """Raises where what was written is not what is read: digests would vouch for it ever after.

  Whole arrays are process 0's to compare; of those in parts, each process compares what it holds.
  """
  for item, leaves in arrays.items():
    for names in _at_once(leaves):
      written = {name: leaves[name] for name in names if first or in_parts(leaves[name])}
      like = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))
        for name, leaf in written.items()
      }
      try:
        found = _orbax().read_some(folder / item, like)
      except Exception as error:
        raise damaged(folder, first_few(list(like)), f"cannot be read again ({error})") from error
      for name, leaf in written.items():
        if name not in found or not same_bits(leaf, found[name]):
          raise damaged(folder, f"{item}/{name}", "is not what was written")


def _at_once(leaves: dict[str, Any]) -> Iterator[list[str]]:
  """Names of leaves, so many at a time as are no more than so many bytes here."""
  some, size = list[str](), 0
  for name, leaf in leaves.items():
    cut = isinstance(leaf, jax.Array)
    mine = sum(part.data.nbytes for part in leaf.addressable_shards) if cut else leaf.nbytes
    if some and size + mine > _AT_ONCE:
      yield some
      some, size = [], 0
    some.append(name)
    size += mine
  if some:
    yield some


def _described(folder: pathlib.Path) -> dict[str, Any]:
  """What the manifest says of the items."""
  try:
    return check_items(read_manifest(folder).get("items"))
  except (ValueError, RecursionError) as error:
    raise damaged(folder, MANIFEST, str(error)) from error


def _check_stored(folder: pathlib.Path, described: dict[str, Any], liked: Container[str]) -> None:
  """Raises where Orbax would read other arrays than the manifest has, before they take memory."""
  size = 0
  for item, about in described.items():
    wanted = {name: stored_as(record) for name, record in about["leaves"].items()}
    wanted = {name: leaf for name, leaf in wanted.items() if leaf.size}
    there = _orbax().stored(folder / item) if (folder / item).is_dir() else {}
    for name in sorted({*wanted, *there}):
      leaf, found = wanted.get(name), there.get(name)
      if leaf is None or found != (leaf.shape, leaf.dtype):
        raise damaged(folder, f"{item}/{name}", f"is {found} and not {leaf}, as {MANIFEST} has it")
    size += sum(leaf.size * leaf.dtype.itemsize for leaf in wanted.values() if item not in liked)
  check_size(folder, size, sum(about["bytes"] for about in read_manifest(folder)["files"].values()))


def _read(
  folder: pathlib.Path, like: dict[str, PyTree] | None, together: Together
) -> dict[str, PyTree]:
  described = _described(folder)
  wanted = dict.fromkeys(described) if like is None else like
  unknown = sorted(set(wanted) - set(described))
  if unknown:
    raise ValueError(
      f"the checkpoint {folder} has no item {', '.join(map(repr, unknown))}; it has: "
      f"{', '.join(map(repr, described))}."
    )
  liked = {item: named_leaves(item, tree) for item, tree in wanted.items() if tree is not None}
  for item, leaves in liked.items():
    check_like(item, folder, described[item]["leaves"], leaves)
  _verify(folder, list(wanted), together)
  stored = [item for item in wanted if (folder / item).is_dir()]
  in_place = {
    item: {
      name: at
      for name, leaf in leaves.items()
      if (at := lying(described[item]["leaves"][name], leaf)) is not None
    }
    for item, leaves in liked.items()
  }
  _check_stored(folder, {item: described[item] for item in wanted}, liked)
  try:
    loaded = _orbax().read(folder, stored, in_place) if stored else {}
  except Exception as error:
    raise damaged(folder, first_few(stored), f"cannot be read by Orbax ({error})") from error
  result = {}
  for item, tree in wanted.items():
    as_like, arrays = liked.get(item, {}), loaded.get(item, {})
    leaves = {
      name: place(f"{item}/{name}", record, arrays.get(name), as_like.get(name))
      for name, record in described[item]["leaves"].items()
    }
    if tree is None:
      try:
        result[item] = from_outline(described[item].get("outline"), leaves)
      except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        problem = f"has an outline of {item} that is none ({error!r:.100})"
        raise damaged(folder, MANIFEST, problem) from error
    else:
      result[item] = jax.tree.unflatten(jax.tree.structure(tree), [leaves[n] for n in as_like])
  return result
