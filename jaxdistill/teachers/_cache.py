"""A teacher's outputs computed once: a source whose batches bring them along.

Views are finite and numbered, so a cache is exact under augmentation: the teacher's answer to view
v of an example is computed when v is first shown, and read back whenever it comes again. Nothing in
the train step knows of it, since a step uses ``batch.teacher`` where there is one.

`cached` is the source. A `Filler` computes the rows of a view; a `Store` keeps them in memory and
`Files` on the disk, and find them again.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import _check, _extras, runs
from jaxdistill._compile import by_work, quarter
from jaxdistill._lookups import Lookup, check_values, looked_up, of_integers, shapes_of
from jaxdistill.data import Part, Source, record_files
from jaxdistill.runs import MANIFEST, progress_bar, say_saved
from jaxdistill.teachers import _cache_files, _identity
from jaxdistill.teachers._frozen import asked_on_host, check_tokenizer
from jaxdistill.teachers._identity import PROBES, sketch
from jaxdistill.teachers.cache_writer import row_type
from jaxdistill.types import Batch, Outputs, Teacher

__all__ = ["DTYPES", "LIMIT", "Files", "Filler", "Store", "cached", "compare_cache", "with_outputs"]

PyTree = Any
DTYPES = ("float16", "float32", "float64")
# CIFAR-100's logits of all 162 views of crop_flip(4) take 3.2 GB as float32, half as float16.
LIMIT = 4 * 2**30
# Of a view that is being filled, what is lost where the process is killed.
PART_SECONDS = 10.0


def cached(
  teacher: Teacher | None,
  source: Source,
  *,
  dtype: str = "float32",
  features: Sequence[str] = (),
  folder: str | os.PathLike[str] | None = None,
  in_advance: bool = False,
  limit: int = LIMIT,
  batch_size: int = 256,
  progress: str | None = "cache",
) -> Source:
  """A source whose batches bring the teacher's outputs along: each view of an example asked once.

  Train with ``fit(student, objective, data=cached(...))`` and without a teacher. After V epochs of
  a source with V views the teacher is never run again; a view is filled when it is first shown,
  between two dispatches. Where there is no augmentation there is one view, filled at once, and
  sources of other data seeds (``dataclasses.replace(made, data_seed=3)``) share it. With an
  augmentation each data seed has views of its own, so each takes a cache.

  What is complete and no larger than a quarter of the device's memory lies on the device; other
  rows are kept in the host's memory, or read from the files as they are needed, and travel with the
  items. A source with a transform (mixup), which changes what the teacher would see, is refused.

  Args:
    teacher: the teacher; it must answer to an example alone, whatever else is in the batch. One
      with a function of yours that depends on more than its variables says so in its ``asked``.
      One of another program (`foreign`) is asked on the host, and teaches the examples that it
      answers. None opens a complete cache in ``folder`` without one, as another program wrote it
      (`write`, ``docs/cache.md``); examples that are not in it count by their labels alone.
    source: from `data.on_device`, `streamed` or `mixed`, with finite ``views``.
    dtype: of what is kept: ``"float32"``, ``"float16"`` (half the size; read back as float32), or
      ``"float64"``.
    features: which of the teacher's features to keep beside the logits, or without any where it
      has none; of a `foreign` teacher all by default.
    folder: where the cache is kept, to be used again; in memory alone by default. It is refused
      where it was made for another teacher, data set or augmentation; missing views are filled.
    in_advance: fill all views now, under a progress bar.
    limit: the most bytes that the cache may take; 4 GiB by default.
    batch_size: examples in a batch while it is filled.
    progress: the label of the bar while it is filled; None for silence.

  Returns:
    The source; ``teacher`` is a fingerprint of what it brings along.

  Raises:
    TypeError: an argument is of another kind than it must be.
    ValueError: the source has no finite views; the cache would exceed ``limit``; a feature is not
      there; ``folder`` holds another cache, and the message says in what they differ.
    CacheError: the folder's files are damaged.
  """
  _check_arguments(source, dtype, features, progress)
  for name, value in (("limit", limit), ("batch_size", batch_size)):
    _check.whole(name, value)
  _check.switch("in_advance", in_advance)
  if folder is not None:
    _extras.need("teachers.cached(folder=...)", "array_record", "grain")
  if teacher is None:
    store, about = _foreign(source, folder)
  else:
    _check_teacher(teacher)
    check_tokenizer(teacher, source.tokenizer, source.name)
    fill = Filler(teacher, source, dtype, tuple(features), batch_size)
    _check_size(limit, source, fill.layout)
    about = {
      **_identity.identity_of(source, _views(source), dtype, fill.layout),
      "asked": _identity.asked_of(teacher),
      "teacher": runs.tree_identity(teacher.variables),
    }
    store = Store(_views(source), fill.layout, fill.size, fill=fill, progress=progress)
    if folder is not None:
      store.files = _claimed(_check.folder("folder", folder), fill, about)
  # Read once and kept where they fit: a step then waits for a copy and not for the disk. Where the
  # files are larger than a quarter of the host's memory, rows are read as they are needed.
  store.keep = folder is None or _fits(_bytes(source, store.layout), "host")
  # One view comes in every epoch anyway. Several are filled when they are first shown, so that a
  # run shorter than the views pays only for what it sees.
  if _views(source) == 1 or in_advance:
    store.complete()
  skipped = store.skipped() if store.full else 0
  device = store.full and _fits(_bytes(source, store.layout), "device")
  made = _on_device(source, store) if device else _beside(source, store)
  return dataclasses.replace(made, teacher=runs.short_digest(about), skipped=skipped)


def _claimed(folder: pathlib.Path, fill: Filler, about: dict[str, Any]) -> Files:
  """The files of a cache of ours, made or gone on with."""
  source, views = fill.source, about["view_count"]
  if (folder / MANIFEST).exists():
    # By what is cheap to know, before the teacher is compiled to be asked about a few examples.
    _check_same(folder, about)
  about = {
    **about,
    "teacher": {**about["teacher"], "outputs": fill.probe()},
    "looks": _identity.views_identity(source, views),
  }
  whole: Any = source.whole
  ids = whole.ids()
  if len(set(ids)) != len(ids):
    raise ValueError(f"the ids of {source.name!r} are not unique, and a cache is keyed by them.")
  if not (folder / MANIFEST).exists():
    _cache_files.create(folder, {**about, "libraries": _identity.libraries()}, ids)
  _check_same(folder, about)
  files = Files(folder, ids)
  if jax.process_count() > 1 and not all(files.has(view) for view in range(views)):
    raise ValueError(
      f"folder={str(folder)!r} lacks views, and several processes would fill it: fill it by one "
      "process before, with in_advance=True."
    )
  return files


def _foreign(source: Source, folder: str | os.PathLike[str] | None) -> tuple[Store, dict[str, Any]]:
  """A complete cache, whoever wrote it."""
  if folder is None:
    raise ValueError("teacher is None, and there is no folder to read its outputs from.")
  path = _check.folder("folder", folder)
  manifest = _cache_files.read_manifest(path)
  kind = row_type(manifest["arrays"])
  layout = {n: jax.ShapeDtypeStruct(kind[n].shape, kind[n].base) for n in kind.names or ()}
  now = _identity.identity_of(source, _views(source), manifest["dtype"], layout)
  # A teacher may have skipped examples: their ids say better than their number whether it is this
  # data set.
  same_size = {**now, "data": {**now["data"], "size": manifest["data"]["size"]}}
  _check_same(path, {**same_size, "looks": _identity.views_identity(source, _views(source))})
  whole: Any = source.whole
  files = Files(path, whole.ids(), skipping=True)
  if files.skips:
    layout["where"] = jax.ShapeDtypeStruct((), np.dtype(np.uint8))
  store = Store(_views(source), layout, whole.size, files=files)
  if not store.full:
    lacking = [view for view in range(store.count) if not store.has(view)]
    raise ValueError(
      f"folder={str(folder)!r} lacks the views {lacking[:5]} of {store.count}, and there is no "
      "teacher to fill them: let whoever wrote it write the rest."
    )
  written = {name: manifest.get(name) for name in ("teacher", "asked", "views", "ids")}
  return store, {**now, **written}


def _check_same(folder: pathlib.Path, now: dict[str, Any]) -> None:
  lines = _identity.differences(_cache_files.read_manifest(folder), now)
  if lines:
    raise ValueError(
      f"folder={str(folder)!r} is a cache of something else. {'; '.join(lines)}. Take another "
      "folder, or what it was made with."
    )


def _views(source: Source) -> int:
  """V."""
  return 1 if source.augmentation == "identity" or source.views is None else source.views


def _on_device(source: Source, store: Store) -> Source:
  """All views as arrays of the program; a batch takes its rows out of them."""
  # One array, in which row ``view * N + index`` is one example's.
  arrays = {
    name: np.concatenate([store.view(v)[name] for v in range(store.count)]) for name in store.layout
  }
  return with_outputs(source, jax.device_put(arrays), store.size, store.count)


def with_outputs(
  source: Source, arrays: PyTree, size: int, views: int = 1, *, widen: bool = True
) -> Source:
  """A source whose batches take their rows out of arrays of the program.

  Args:
    source: without a teacher's outputs.
    arrays: ``{"logits": [V * N, ...], "features/<name>": [V * N, ...]}``, pending ones too.
    size: N.
    views: V.
    widen: whether float16 is for keeping alone, and a batch has float32.
  """

  def cut(shared: PyTree, item: PyTree) -> Batch:
    batch = source.cut(shared[0], item)
    # Arrays [V * N, ...] and not [V, N, ...]: one gather by one number, row v * N + n.
    row = (batch.view % jnp.int32(views)) * jnp.int32(size) + batch.index
    rows = jax.tree.map(lambda leaf: jnp.take(leaf, row, 0, mode="clip"), shared[1])
    return dataclasses.replace(batch, teacher=_outputs(rows, widen=widen))

  return dataclasses.replace(
    source, shared=(source.shared, arrays), cut=cut, read=_read(source, source.read)
  )


def _beside(source: Source, store: Store) -> Source:
  """Rows gathered on the host, which travel with the items."""
  whole: Any = source.whole

  def read(seed: int, batch: int, step: int, count: int, part: Part) -> PyTree:
    items = source.read(seed, batch, step, count, part)
    # [count, B] each: what the items will show is known on the host, before anything is cut.
    index, view = whole.rows(items)
    return {"items": items, "teacher": store.rows(index, view % store.count)}

  def cut(shared: PyTree, item: PyTree) -> Batch:
    batch = source.cut(shared, item["items"])
    return dataclasses.replace(batch, teacher=_outputs(item["teacher"]))

  return dataclasses.replace(source, cut=cut, read=_read(source, read), whole=None)


def _read(
  source: Source, read: Callable[[int, int, int, int, Part], PyTree]
) -> Callable[[int, int, int, int, Part], PyTree]:
  """The ``read`` of a cached source: of one data seed, unless nothing depends on it."""
  if source.augmentation == "identity":
    return read

  def checked(seed: int, *rest: Any) -> PyTree:
    if seed != source.data_seed:
      raise ValueError(
        f"data_seed={seed}, but these outputs were cached for data_seed={source.data_seed}, and "
        f"what {source.augmentation} shows depends on it: cache the source of each seed."
      )
    return read(seed, *rest)

  return checked


def _outputs(rows: Mapping[str, Any], *, widen: bool = True) -> Outputs:
  """A batch's rows as the teacher put them out."""
  # float16 is for the disk alone: a softmax at a high temperature lives of differences that it has
  # not, and losses take their dtype from what they are given.
  values = {
    name: value.astype(jnp.float32) if widen and value.dtype == jnp.float16 else value
    for name, value in rows.items()
  }
  where = values.pop("where", None)
  return Outputs(
    logits=values.pop("logits", None),
    features={n.split("/", 1)[1]: v for n, v in values.items()},
    where=None if where is None else where.astype(jnp.float32),
  )


def _check_arguments(
  source: Any, dtype: str, features: Sequence[str], progress: str | None
) -> None:
  if not isinstance(source, Source):
    raise TypeError(
      f"source must be a Source (from data.on_device, streamed or mixed), got "
      f"{_check.show(source)}."
    )
  if source.teacher is not None:
    raise ValueError(f"source {source.name!r} brings a teacher's outputs along already.")
  if source.transform is not None:
    raise ValueError(
      f"source {source.name!r} has a transform, which changes the inputs after the teacher's "
      "outputs were looked up; cache the source without it, and train without it."
    )
  if source.whole is None:
    raise ValueError(
      f"source {source.name!r} only iterates, so an example cannot be found again: make it one of "
      "data.from_sequence (or from_dicts) and streamed."
    )
  if source.views is None and source.augmentation != "identity":
    raise ValueError(
      f"source {source.name!r} shows a new view of {source.augmentation} in every epoch, and a "
      "cache needs views that come again: make it with views=8, say."
    )
  if dtype not in DTYPES:
    raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}.")
  if dtype == "float64" and jax.dtypes.canonicalize_dtype(dtype) != dtype:
    raise ValueError("dtype='float64' needs jax.enable_x64(True) around all of the run.")
  if isinstance(features, str) or not all(isinstance(name, str) for name in features):
    raise TypeError(f"features={_check.show(features)} must be a sequence of names.")
  if not isinstance(progress, str | None):
    raise TypeError(f"progress={progress!r} must be the bar's label, or None for no bar.")


def _check_teacher(teacher: Any) -> None:
  if not isinstance(teacher, Teacher):
    raise TypeError(
      f"teacher={_check.show(teacher)} must be a Teacher; make one by teachers.frozen(model)."
    )


def _bytes(source: Source, layout: Mapping[str, Any]) -> int:
  """What all views take."""
  whole: Any = source.whole
  row = sum(math.prod(r.shape) * np.dtype(r.dtype).itemsize for r in layout.values())
  return _views(source) * whole.size * row


def _check_size(limit: int, source: Source, layout: Mapping[str, Any]) -> None:
  needed, whole = _bytes(source, layout), source.whole
  if needed > limit:
    each = ", ".join(f"{name} {row.dtype}{list(row.shape)}" for name, row in layout.items())
    raise ValueError(
      f"the cache would take {needed / 1e9:.3g} GB ({_views(source)} views of "
      f"{whole and whole.size} examples, each {each}), and limit={limit} is {limit / 1e9:.3g} GB: "
      "take fewer views or features, dtype='float16', or a higher limit."
    )


def _fits(size: int, where: str) -> bool:
  """Whether so many bytes take no more than a quarter of a device's memory, or of the host's."""
  return size <= quarter(where)


def compare_cache(teacher: Teacher, source: Source, folder: str | os.PathLike[str]) -> list[str]:
  """Computes a sample of a cache again.

  Args:
    teacher: the teacher.
    source: what the cache was made of.
    folder: the cache.

  Returns:
    What differs, in words; nothing where the cache is this teacher's. Of a cache that another
    program wrote, only the sample is compared.
  """
  _extras.need("reading a cache of a teacher's outputs", "array_record")
  path = _check.folder("folder", folder)
  manifest = _cache_files.read_manifest(path)
  names = [a["name"] for a in manifest["arrays"]]
  features = tuple(n.split("/", 1)[1] for n in names if n.startswith("features/"))
  fill = Filler(teacher, source, manifest["dtype"], features, 64)
  now = _identity.identity_of(source, _views(source), manifest["dtype"], fill.layout)
  if "checksum" in (manifest.get("teacher") or {}):
    variables = runs.tree_identity(teacher.variables)
    now |= {"asked": _identity.asked_of(teacher), "teacher": variables}
  lines = _identity.differences(manifest, now)
  if lines:
    return lines
  whole: Any = source.whole
  files = Files(path, whole.ids())
  there = _cache_files.complete_views(manifest)
  for view in sorted({there[i] for i in (0, len(there) // 2, -1)}) if there else []:
    rows = files.load(view)
    # The first batch of the view, and one in the middle.
    for number, item in enumerate(itertools.islice(fill.items(view), fill.steps // 2 + 1)):
      if number not in (0, fill.steps // 2):
        continue
      index, made, _ = jax.device_get(fill.outputs(teacher, source.shared, item))
      for name, values in made.items():
        off = _off(rows[name][index], values)
        if not off <= _ROUNDING:
          lines.append(f"{name} in view {view} is off by {off:.2g} of the largest number")
  return lines


# float16 and TF32 are ten times better than that.
_ROUNDING = 0.01


def _off(found: np.ndarray, right: np.ndarray) -> float:
  """The largest difference, as a share of the largest number; NaN and infinities in one place."""
  known = np.isfinite(right)
  if not np.array_equal(known, np.isfinite(found)):
    return math.inf
  right, found = (np.where(known, one, 0).astype(np.float64) for one in (right, found))
  return float(
    np.max(np.abs(found - right), initial=0) / max(np.max(np.abs(right), initial=0), 1e-30)
  )


# One view's rows, by example: ``{"logits": [N, ...], "features/<name>": [N, ...]}``.
Rows = dict[str, np.ndarray]


class Filler:
  """Runs the teacher over every example of a view."""

  def __init__(
    self,
    teacher: Teacher,
    source: Source,
    dtype: str | None,
    features: tuple[str, ...],
    batch_size: int,
    *,
    nan: bool = False,
  ) -> None:
    """Looks at what the teacher puts out, abstractly.

    Args:
      teacher: the teacher.
      source: a source with a ``whole``.
      dtype: of the rows; None for that of what the teacher puts out.
      features: which of the teacher's features are kept.
      batch_size: examples in a batch.
      nan: whether NaN are kept as they are, and no error.
    """
    whole: Any = source.whole
    self.source, self.teacher, self.dtype, self.nan = source, teacher, dtype, nan
    self.size, self.every = whole.size, whole.every
    self.batch_size = min(batch_size, self.size)
    self.steps = -(-self.size // self.batch_size)

    on_host = asked_on_host(teacher)
    outputs = _function(source.cut, dtype, features, on_host)
    self._looked_up: tuple[Lookup, ...] = ()
    given = teacher, source.shared, next(self.items(0))
    self._first: Any = None
    self._looked_up = () if on_host else self._lookups(given[2])
    if on_host:
      # Nobody knows what it puts out before it is asked: about those examples by which a cache is
      # told too, once.
      self.outputs = outputs
      few = jax.tree.map(lambda leaf: leaf[:PROBES] if np.ndim(leaf) else leaf, given[2])
      self._first = made = outputs(teacher, source.shared, few)[1]
    else:
      _, made, _ = jax.eval_shape(outputs, *given)
      options = by_work(outputs, *given, calls=self.steps * (source.views or 1))
      self.outputs = jax.jit(outputs, compiler_options=options)
    self.layout = {
      name: jax.ShapeDtypeStruct(value.shape[1:], value.dtype) for name, value in made.items()
    }

  def items(self, view: int) -> Iterator[PyTree]:
    """The batches of a view; those of a stream are looked at when they come."""
    for item in self.every(self.source.data_seed, self.batch_size, view):
      self._look_at(None, item)
      yield item

  def _lookups(self, item: PyTree) -> tuple[Lookup, ...]:
    """What the teacher looks up of the inputs; raises where what is there is not in its tables."""
    source = self.source
    teacher, *given = shapes_of((self.teacher, source.shared, item))
    if not of_integers(jax.eval_shape(source.cut, *given).inputs):
      return ()
    found = looked_up(lambda t, shared, item: t(source.cut(shared, item)), teacher, *given)
    self._looked_up = found
    self._look_at(source.shared, item)
    return found

  def _look_at(self, shared: PyTree, item: PyTree) -> None:
    """Raises where the teacher would look up what is not in its tables."""
    found, name, who = self._looked_up, repr(self.source.name), "the teacher"
    check_values(found, (shared, None), name=name, who=who)
    check_values(found, (None, item), name=name, who=who)

  def probe(self) -> dict[str, Any]:
    """What the teacher puts out for the first examples, as sketches."""
    made = self._first
    if made is None:
      _, made, _ = self.outputs(self.teacher, self.source.shared, next(self.items(0)))
    return {name: sketch(np.asarray(value[:PROBES])) for name, value in made.items()}

  def alone(self) -> bool:
    """Whether the teacher answers to an example alone, whatever else is in the batch."""
    item, half = next(self.items(0)), self.batch_size // 2

    def twice(leaf: Any) -> Any:  # the first half of the examples in the place of the second
      return np.concatenate([leaf[:half], leaf[: len(leaf) - half]]) if np.ndim(leaf) else leaf

    def answers(item: PyTree) -> Any:
      return jax.device_get(self.outputs(self.teacher, self.source.shared, item))[1]

    if half == 0:
      return True
    first, second = answers(item), answers(jax.tree.map(twice, item))
    return all(
      _off(second[name][:half], value[:half]) <= _ROUNDING for name, value in first.items()
    )

  def __call__(self, view: int, done: Callable[[int], Any], files: Files | None = None) -> Rows:
    """The rows of one view, in the order of the examples; what files have of it is not asked again.

    Args:
      view: its number.
      done: told of every batch.
      files: where what is known is kept every few seconds, so that a killed process goes on there.
    """
    rows = {name: np.empty((self.size, *r.shape), r.dtype) for name, r in self.layout.items()}
    missing = np.ones(self.size, bool)
    if files is not None:
      files.begin(view, rows, missing)
    kept = time.monotonic()

    def take(made: Any) -> None:
      nonlocal kept
      index, values, problems = jax.device_get(made)
      self._check(view, values, problems)
      for name in self.layout:
        rows[name][index] = values[name]
      missing[index] = False
      done(1)
      if files is not None and missing.any() and time.monotonic() - kept >= PART_SECONDS:
        files.add(view, rows, missing)
        kept = time.monotonic()

    pending: Any = None
    for item in self.items(view):
      if not missing[self._numbers(item)].any():
        done(1)
        continue
      made = self.outputs(self.teacher, self.source.shared, item)
      # One batch late: the host waits for numbers that are there, while the device computes on.
      if pending is not None:
        take(pending)
      pending = made
    if pending is not None:
      take(pending)
    if missing.any():
      raise RuntimeError(f"{self.source.name!r} did not show example {missing.argmax()} of a view.")
    return rows

  def _numbers(self, item: PyTree) -> np.ndarray:
    """Which examples a batch has, before anything is cut."""
    whole: Any = self.source.whole
    index: np.ndarray = whole.rows(jax.tree.map(lambda leaf: np.asarray(leaf)[None], item))[0][0]
    return index

  def _check(self, view: int, values: Rows, problems: Mapping[str, Any]) -> None:
    """Raises where a batch's outputs are none, or not those that the first ones were."""
    found = {name: (value.shape[1:], str(value.dtype)) for name, value in values.items()}
    first = {name: (row.shape, str(row.dtype)) for name, row in self.layout.items()}
    if found != first:
      raise ValueError(
        f"the teacher put out {first} for the first examples, and {found} in view {view}: it must "
        "give the same arrays in every batch ('where' too, once it gives it)."
      )
    for name, bad in problems.items():
      if bad and not self.nan:
        kept = f", or a number that {self.dtype} has not" if self.dtype else ""
        raise ValueError(
          f"the teacher's {name} in view {view} hold NaN{kept}: look at the teacher's variables"
          f"{', or take dtype=' + repr('float32') if self.dtype else ''}."
        )


@functools.lru_cache(maxsize=4)
def _function(
  cut: Callable[[PyTree, PyTree], Any],
  dtype: str | None,
  features: tuple[str, ...],
  on_host: bool,
) -> Callable[..., Any]:
  """What runs the teacher on a batch; sources that differ in their seed alone compile it once."""
  shown = jax.jit(cut) if on_host else cut

  def outputs(teacher: Teacher, shared: PyTree, item: PyTree) -> Any:
    batch = shown(shared, item)
    made = _picked(teacher(batch), features, all_of_them=on_host)
    where = made.pop("where", None)
    kept = {name: value.astype(dtype or value.dtype) for name, value in made.items()}
    # An infinity may be meant (a masked class); a number that became one in float16 is not.
    problems = {
      name: jnp.any(jnp.isnan(value) | (jnp.isfinite(value) & ~jnp.isfinite(kept[name])))
      for name, value in made.items()
    }
    mask = {} if where is None else {"where": (where > 0).astype(jnp.uint8)}
    return batch.index, {**kept, **mask}, problems

  return outputs


def _picked(
  outputs: Any, features: Sequence[str], *, all_of_them: bool = False
) -> dict[str, jax.Array]:
  """What is kept of a teacher's outputs."""
  if not isinstance(outputs, Outputs):
    raise TypeError(f"teacher must return Outputs, got {_check.show(outputs)}.")
  if all_of_them and not features:
    features = sorted(outputs.features)
  lacking = [name for name in features if name not in outputs.features]
  if lacking:
    raise ValueError(
      f"features has {lacking}, which the teacher does not put out; it has "
      f"{sorted(outputs.features)}."
    )
  if outputs.logits is None and not features:
    raise ValueError(
      "the teacher puts out no logits (hidden and head may stand for them), and a cache holds "
      "logits and features: name features=[...] of it, let it multiply its logits out, or leave "
      "cached out."
    )
  made = {"logits": outputs.logits, **{f"features/{n}": outputs.features[n] for n in features}}
  return {n: v for n, v in {**made, "where": outputs.where}.items() if v is not None}


class Files:
  """A cache's folder, read in the order of a source's examples."""

  def __init__(self, folder: pathlib.Path, ids: Sequence[str], *, skipping: bool = False) -> None:
    """Opens it.

    Args:
      folder: the cache.
      ids: of the source's examples, in their order.
      skipping: whether examples may lack, which the teacher skipped.

    Raises:
      ValueError: the cache is of other examples.
    """
    self.folder = folder
    self.manifest = _cache_files.read_manifest(folder)
    self.ids = _cache_files.read_ids(folder, self.manifest)
    place = {id: number for number, id in enumerate(self.ids)}
    lacking = [id for id in ids if id not in place]
    self.skips = skipping and len(place) == len(ids) - len(lacking) > 0 and bool(lacking)
    if (lacking or len(place) != len(ids)) and not self.skips:
      raise ValueError(
        f"folder={str(folder)!r} is a cache of other examples: {len(lacking)} of {len(ids)} ids "
        f"are not in it ({', '.join(lacking[:3])}), and it has {len(place)}. Take another folder."
      )
    # Where each example's record stands in a view; who wrote it may have had another order. One
    # that the teacher skipped has none: −1.
    self.place = np.array([place.get(id, -1) for id in ids])
    self._open: dict[int, Any] = {}

  def has(self, view: int) -> bool:
    """Whether the view is complete."""
    return str(view) in self.manifest["views"]

  def refresh(self) -> None:
    """Sees what another process has filled."""
    self.manifest = _cache_files.read_manifest(self.folder)

  def load(self, view: int) -> Rows:
    """All rows of a view, verified."""
    rows = _cache_files.read_view(self.folder, self.manifest, view, self.ids)
    if np.array_equal(self.place, np.arange(len(self.place))):
      return rows
    return self._placed({name: values[self.place] for name, values in rows.items()}, self.place)

  def _placed(self, rows: Rows, place: np.ndarray) -> Rows:
    """Rows with those of skipped examples, which have no record, as 0."""
    if not self.skips:
      return rows
    rows.setdefault("where", np.ones(place.shape, np.uint8))
    for values in rows.values():
      values[place < 0] = 0
    return rows

  def begin(self, view: int, rows: Rows, missing: np.ndarray) -> None:
    """Puts what there is of a view that is not complete into rows, which are then not missing."""
    known = _cache_files.read_part(self.folder, self.manifest, view, self.ids)
    index = np.argsort(self.place)[: len(next(iter(known.values())))]
    for name, values in known.items():
      rows[name][index] = values
    missing[index] = False

  def add(self, view: int, rows: Rows, missing: np.ndarray) -> None:
    """Keeps the first rows of a view, as far as they are known."""
    order = np.argsort(self.place)
    first = sum(s["records"] for s in _cache_files.parts_of(self.manifest, view))
    last = int(missing[order].argmax())
    if last > first:
      moved = {name: values[order] for name, values in rows.items()}
      self.manifest = _cache_files.add_part(self.folder, view, moved, self.ids, first, last)

  def write(self, view: int, rows: Rows) -> None:
    """Adds a view."""
    order = np.argsort(self.place)
    moved = {name: values[order] for name, values in rows.items()}
    self.manifest = _cache_files.write_view(self.folder, view, moved, self.ids)

  def read(self, view: int, index: np.ndarray) -> Rows:
    """Some rows of a view, through Grain; its shards are verified when they are opened."""
    kind = row_type(self.manifest["arrays"])
    if view not in self._open:
      self._open[view] = self._opened(view, kind)
    place = self.place[index.reshape(-1)]
    places = np.maximum(place, 0).tolist()
    records = self._open[view].__getitems__(places)
    starts = [_cache_files.prefix(self.ids[place]) for place in places]
    for record, start in zip(records, starts, strict=True):
      if not record.startswith(start) or len(record) != len(start) + kind.itemsize:
        raise _cache_files.CacheError(
          f"View {view} of {self.folder} has another record where {start[4:]!r} belongs."
        )
    joined = b"".join(r[len(s) :] for r, s in zip(records, starts, strict=True))
    packed = np.frombuffer(joined, kind)
    rows = {name: packed[name].copy() for name in kind.names or ()}
    placed = self._placed(rows, place)
    return {
      name: values.reshape(*index.shape, *values.shape[1:]) for name, values in placed.items()
    }

  def _opened(self, view: int, kind: np.dtype) -> Any:
    """A view's records by number, its shards verified."""
    shards = self.manifest["views"][str(view)]
    for shard in shards:
      _cache_files.check_shard(self.folder, shard)
    paths = [self.folder / shard["file"] for shard in shards]
    if any(path.suffix == ".npy" for path in paths):
      counts = [shard["records"] for shard in shards]
      return _cache_files.Mapped(paths, counts, kind)
    opened = record_files([str(path) for path in paths])
    if len(opened) != len(self.ids):
      raise _cache_files.CacheError(
        f"View {view} of {self.folder} has {len(opened)} records for {len(self.ids)} examples."
      )
    return opened


class Store:
  """The views that there are, in memory and in files."""

  def __init__(
    self,
    count: int,
    layout: Mapping[str, Any],
    size: int,
    *,
    fill: Filler | None = None,
    files: Files | None = None,
    keep: bool = True,
    progress: str | None = None,
  ) -> None:
    """A store that is filled from a teacher, or from files, or both.

    Args:
      count: V.
      layout: one row's shapes and dtypes.
      size: the number of examples.
      fill: what makes a view.
      files: where views are written, and found.
      keep: whether views that are in files are kept in memory too.
      progress: the bar's label.
    """
    self.count, self.layout, self.size = count, dict(layout), size
    self.fill, self.files, self.progress = fill, files, progress
    self.keep = keep or files is None
    self.views: dict[int, Rows] = {}

  @property
  def full(self) -> bool:
    """Whether every view is there."""
    return all(self.has(view) for view in range(self.count))

  def has(self, view: int) -> bool:
    """Whether a view is there."""
    return view in self.views or (self.files is not None and self.files.has(view))

  def make(self, wanted: Sequence[int]) -> None:
    """Fills those of these views that are not there."""
    missing = [view for view in wanted if not self.has(view)]
    if missing and self.files is not None:
      self.files.refresh()  # another run on the same folder may have filled it meanwhile
      missing = [view for view in wanted if not self.has(view)]
    if not missing:
      return
    if self.fill is None:
      raise ValueError(f"the cache lacks the views {missing[:5]}, and there is no teacher.")
    with progress_bar(len(missing) * self.fill.steps, self.progress, unit="batch") as shown:
      for view in missing:
        rows = self.fill(view, shown.update, self.files)
        if "where" in rows and (few := int(np.sum(rows["where"] == 0))):
          shown.say(f"{self.progress}: the teacher skipped {few} of {self.size} examples.")
        if self.files is not None:
          self.files.write(view, rows)
        if self.keep:
          self.views[view] = rows

  def complete(self) -> None:
    """Fills all views."""
    before = self.full
    self.make(range(self.count))
    if self.files is not None and not before:
      say_saved(self.progress, self.files.folder)

  def view(self, view: int) -> Rows:
    """All rows of a view that is there."""
    if view in self.views:
      return self.views[view]
    assert self.files is not None  # else it would be in memory
    rows = self.files.load(view)
    if self.keep:
      self.views[view] = rows
    return rows

  def skipped(self) -> int:
    """How many examples the teacher says nothing of, in the view in which these are most."""
    if "where" not in self.layout:
      return 0
    return max(int(np.sum(self.view(v)["where"] == 0)) for v in range(self.count))

  def rows(self, index: np.ndarray, view: np.ndarray) -> Rows:
    """The rows of these examples in these views, each ``[count, B]``."""
    wanted = np.unique(view).tolist()
    self.make(wanted)
    if len(wanted) == 1:
      return self._rows_at(wanted[0], index)
    made = {name: np.empty((*index.shape, *r.shape), r.dtype) for name, r in self.layout.items()}
    for one in wanted:
      chosen = view == one
      for name, rows in self._rows_at(one, index[chosen]).items():
        made[name][chosen] = rows
    return made

  def _rows_at(self, view: int, index: np.ndarray) -> Rows:
    if self.files is not None and not self.keep:
      return self.files.read(view, index)
    return {name: rows[index] for name, rows in self.view(view).items()}
