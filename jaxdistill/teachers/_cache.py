"""A teacher's outputs computed once: a source whose batches bring them along.

Views are finite and numbered, so a cache is exact under augmentation: the teacher's answer to view
v of an example is computed when v is first shown, and read back whenever it comes again. Nothing in
the train step knows of it, since a step uses ``batch.teacher`` where there is one.

`cached` is the source, and `fill` fills one beforehand. A `Filler` computes the rows of a view; a
`Store` keeps them in memory and `Files` on the disk, and find them again.
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
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxdistill import _check, _extras, runs
from jaxdistill._compile import by_work, quarter, shapes_of
from jaxdistill._devices import AXIS, mesh_of
from jaxdistill._lookups import Lookup, check_values, looked_up, of_integers
from jaxdistill.data import Part, Source, made_ahead, record_files
from jaxdistill.runs import MANIFEST, Progress, progress_bar, say_saved
from jaxdistill.teachers import _cache_files, _identity
from jaxdistill.teachers._cache_shards import (
  Shard,
  claimed,
  parts_of,
  rows_of,
  shards_of,
  share,
)
from jaxdistill.teachers._frozen import asked_on_host, check_tokenizer
from jaxdistill.teachers._identity import PROBES, sketch
from jaxdistill.teachers.cache_writer import row_type
from jaxdistill.types import Batch, Head, Outputs, Teacher, with_logits

__all__ = [
  "DTYPES",
  "LIMIT",
  "Files",
  "Filled",
  "Filler",
  "Store",
  "cached",
  "check_source",
  "compare_cache",
  "fill",
  "fill_as_it_is",
  "with_outputs",
]

PyTree = Any
DTYPES = ("float16", "float32", "float64")
# CIFAR-100's logits of all 162 views of crop_flip(4) take 3.2 GB as float32, half as float16.
LIMIT = 4 * 2**30
# Of a shard that is being filled, what is lost where the process is killed.
PART_SECONDS = 10.0
# By how many batches, after the first, the time of the rest is told: at least so many, and those of
# so many seconds, or of a twentieth of all that there is to do.
_MEASURED, _MEASURED_SECONDS = 5, 10.0
# How long one waits for what others are filling before it looks again.
_LOOK_AGAIN = 1.0


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
    FileExistsError: the folder holds a run, a sweep or a search.
  """
  check_source(source)
  _check_arguments(dtype, features, progress)
  for name, value in (("limit", limit), ("batch_size", batch_size)):
    _check.whole(name, value)
  _check.switch("in_advance", in_advance)
  if folder is not None:
    _extras.need("teachers.cached(folder=...)", "array_record", "grain")
    runs.check_place(folder, "cache")
  if teacher is None:
    store, about = _foreign(source, folder)
  else:
    fill, about = _filler(teacher, source, dtype, features, batch_size, limit)
    store = Store(_views(source), fill.layout, fill.size, fill=fill, progress=progress)
    if folder is not None:
      store.files = _opened(_check.folder("folder", folder), fill, about)
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


def fill(
  teacher: Teacher,
  source: Source,
  folder: str | os.PathLike[str],
  *,
  part: Part = (0, 1),
  dtype: str = "float32",
  features: Sequence[str] = (),
  limit: int = LIMIT,
  batch_size: int = 256,
  progress: str | None = "cache",
) -> Filled:
  """Fills a cache of all views, or this process' part of it: what `cached` then opens.

  Any number of processes, on one machine or on several that share a disk, may fill one folder at
  once. They need not talk, start together or know how many they are: each claims a shard after
  another, of some thousand rows, and leaves those that others have claimed. One that dies loses
  what it computed in the last ten seconds; its shard is taken over by whoever comes to it next. On
  one machine a dead process is known by its number and the time at which it began, elsewhere by
  three minutes without a sign of life. The files are the same however many filled it, where these
  have devices of one kind and as many each.

  Each process splits its batches over its own devices. A teacher that lies on several already is
  asked there.

  Args:
    teacher: as in `cached`.
    source: likewise.
    folder: the cache; made where it is not there.
    part: ``(p, P)``: only the p-th of P parts of the shards, from 0 on, as a cluster's array of
      jobs has them; all of them by default, those that nobody has claimed.
    dtype: as in `cached`, and the same in every process.
    features: likewise.
    limit: likewise.
    batch_size: examples in a batch, over all devices of the process; the same in every process.
    progress: the label of the bar and of the estimate before it; None for silence.

  Returns:
    What this process has filled, and how much nobody has filled by now.

  Raises:
    TypeError: an argument is of another kind than it must be.
    ValueError: as in `cached`; or ``part`` is none.
    CacheError: the folder's files are damaged.
  """
  check_source(source)
  _check_arguments(dtype, features, progress)
  for name, value in (("limit", limit), ("batch_size", batch_size)):
    _check.whole(name, value)
  part = _checked_part(part)
  _extras.need("teachers.fill", "array_record", "grain")
  runs.check_place(folder, "cache")
  made, about = _filler(teacher, source, dtype, features, batch_size, limit)
  files = _opened(_check.folder("folder", folder), made, about)
  return files.fill(share(shards_of(files.manifest), part), made, progress, wait=False)


def fill_as_it_is(teacher: Teacher, source: Source, folder: pathlib.Path) -> Filled:
  """Fills what a cache that is there lacks, with the dtype, features and size that it has.

  Args:
    teacher: the teacher.
    source: what the cache was made of.
    folder: the cache.
  """
  manifest = _cache_files.read_manifest(folder)
  return fill(
    teacher,
    source,
    folder,
    dtype=manifest["dtype"],
    features=_features(manifest),
    limit=2**63,
    batch_size=manifest.get("batch_size", 256),
  )


def _features(manifest: Mapping[str, Any]) -> tuple[str, ...]:
  """The features that a cache has."""
  names = [a["name"] for a in manifest["arrays"]]
  return tuple(n.split("/", 1)[1] for n in names if n.startswith("features/"))


def _checked_part(part: Any) -> Part:
  """A share of the work, p of P."""
  if not isinstance(part, Sequence) or isinstance(part, str) or len(part) != 2:
    raise TypeError(f"part={_check.show(part)} must be (p, P), the p-th of P parts from 0 on.")
  of = _check.whole("part[1]", part[1])
  return _check.whole("part[0]", part[0], least=0, most=of - 1), of


def _filler(
  teacher: Teacher,
  source: Source,
  dtype: str,
  features: Sequence[str],
  batch_size: int,
  limit: int,
) -> tuple[Filler, dict[str, Any]]:
  """What fills a cache by a teacher, and by what the cache is known."""
  _check_teacher(teacher)
  check_tokenizer(teacher, source.tokenizer, source.name)
  devices = jax.local_devices()  # each process fills by itself
  fill = Filler(teacher, source, dtype, tuple(features), batch_size, devices=devices)
  _check_size(limit, source, fill.layout)
  return fill, {
    **_identity.identity_of(source, _views(source), dtype, fill.layout),
    "asked": _identity.asked_of(teacher),
    "teacher": runs.tree_identity(teacher.variables),
  }


def _opened(folder: pathlib.Path, fill: Filler, about: dict[str, Any]) -> Files:
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
    row = row_type(about["arrays"])
    each = _cache_files.shard_records(fill.size, views, row, fill.batch_size)
    # In the order in which batches show them, so that a shard is of whole batches, of a mix too.
    shown = [ids[number] for number in fill.order()]
    made = {**about, "libraries": _identity.libraries()}
    made |= {"shard_records": each, "batch_size": fill.batch_size}
    _cache_files.create(folder, made, shown)
  _check_same(folder, about)
  return Files(folder, ids)


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


def check_source(source: Any) -> None:
  """Raises where a teacher's outputs cannot be kept beside a source's examples.

  Args:
    source: what was given.

  Raises:
    TypeError: it is no source.
    ValueError: it brings outputs along already, is transformed, iterates only, or its views do not
      come again.
  """
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


def _check_arguments(dtype: str, features: Sequence[str], progress: str | None) -> None:
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
  _check_teacher(teacher)
  check_source(source)
  path = _check.folder("folder", folder)
  manifest = _cache_files.read_manifest(path)
  fill = Filler(teacher, source, manifest["dtype"], _features(manifest), 64)
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
      index, made, _ = jax.device_get(fill.outputs(fill.teacher, fill.shared, item))
      for name, values in made.items():
        off = _off(rows[name][index], values)
        if not off <= _ROUNDING:
          lines.append(f"{name} in view {view} is off by {off:.2g} of the largest number")
  return lines


# float16 and TF32 are ten times better than that.
_ROUNDING = 0.01


def _check_repeats(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
  """Raises where a teacher of another program, asked twice about the same, answers twice."""
  for name, values in first.items():
    one, other = np.asarray(values), np.asarray(second.get(name))
    if one.shape != other.shape or not _off(other, one) <= _ROUNDING:
      raise ValueError(
        f"the teacher's {name} for the same {len(one)} examples, asked twice, are two answers: a "
        "cache would keep one of them by chance. Give it a seed of its own at each call, "
        "temperature 0, or its evaluation mode (no dropout)."
      )


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
    devices: Sequence[jax.Device] | None = None,
  ) -> None:
    """Looks at what the teacher puts out, abstractly.

    Args:
      teacher: the teacher.
      source: a source with a ``whole``.
      dtype: of the rows; None for that of what the teacher puts out.
      features: which of the teacher's features are kept.
      batch_size: examples in a batch.
      nan: whether NaN are kept as they are, and no error.
      devices: those that share each batch; a teacher that lies on several already stays there. None
        leaves everything where it lies.
    """
    whole: Any = source.whole
    self.source, self.teacher, self.dtype, self.nan = source, teacher, dtype, nan
    self.shared, self.size, self.whole = source.shared, whole.size, whole
    on_host = asked_on_host(teacher)
    self._mesh: Mesh | None = None
    if not on_host and devices is not None:
      here = Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))
      self._mesh = mesh_of(teacher) or here
      if any(device.process_index != jax.process_index() for device in self._mesh.devices.flat):
        raise ValueError(
          "teacher lies on devices of several processes, and each fills a cache by itself: put it "
          "on those of this one (jax.device_put, teachers.restore), or train with the teacher in "
          "the step, without a cache."
        )
    over = 1 if self._mesh is None else self._mesh.shape.get(AXIS, 1)
    # A multiple of the devices: the last batch repeats an example anyway.
    self.batch_size = -(-min(batch_size, self.size) // over) * over
    self.steps: int = whole.count(self.batch_size)
    if self._mesh is not None:
      everywhere = NamedSharding(self._mesh, PartitionSpec())
      self.shared = jax.device_put(self.shared, everywhere)
      if mesh_of(teacher) is None:
        self.teacher = jax.device_put(teacher, everywhere)
    outputs = _function(source.cut, dtype, features, on_host, self._mesh)
    self._looked_up: tuple[Lookup, ...] = ()
    given = self.teacher, self.shared, self._item(0, 0)
    self._first: Any = None
    self._looked_up = () if on_host else self._lookups(given[2])
    if on_host:
      # Nobody knows what it puts out before it is asked: about those examples by which a cache is
      # told too, once.
      self.outputs = outputs
      few = jax.tree.map(lambda leaf: leaf[:PROBES] if np.ndim(leaf) else leaf, given[2])
      self._first = made = outputs(teacher, self.shared, few)[1]
      _check_repeats(made, outputs(teacher, self.shared, few)[1])
    else:
      _, made, _ = jax.eval_shape(outputs, *given)
      options = by_work(outputs, *given, calls=self.steps * (source.views or 1))
      self.outputs = jax.jit(outputs, compiler_options=options)
    self.layout = {
      name: jax.ShapeDtypeStruct(value.shape[1:], value.dtype) for name, value in made.items()
    }

  def _item(self, view: int, number: int) -> PyTree:
    """What a batch of a view is cut from, on the devices that share it."""
    item = self.whole.item(self.source.data_seed, self.batch_size, view, number)
    if self._mesh is None:
      return item
    mesh, over = self._mesh, self._mesh.shape.get(AXIS, 1)

    def put(leaf: Any) -> Any:
      cut = over > 1 and np.ndim(leaf) and len(leaf) % over == 0
      return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*[AXIS] * bool(cut))))

    return jax.tree.map(put, item)

  def items(self, view: int, numbers: Sequence[int] | None = None) -> Iterator[PyTree]:
    """The batches of a view, or those of some numbers, read ahead and looked at as they come."""
    numbers = range(self.steps) if numbers is None else numbers
    make = functools.partial(self._item, view)
    for item in made_ahead(make, numbers) if self.whole.reads else map(make, numbers):
      self._look_at(None, item)
      yield item

  def order(self) -> np.ndarray:
    """All examples in the order in which the batches of a view show them first."""
    shown = [self.whole.numbers(self.batch_size, number) for number in range(self.steps)]
    every, first = np.unique(np.concatenate(shown), return_index=True)
    ordered: np.ndarray = every[np.argsort(first)]
    return ordered

  def _lookups(self, item: PyTree) -> tuple[Lookup, ...]:
    """What the teacher looks up of the inputs; raises where what is there is not in its tables."""
    source = self.source
    teacher, *given = shapes_of((self.teacher, self.shared, item))
    if not of_integers(jax.eval_shape(source.cut, *given).inputs):
      return ()
    found = looked_up(lambda t, shared, item: t(source.cut(shared, item)), teacher, *given)
    self._looked_up = found
    self._look_at(self.shared, item)
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
      _, made, _ = self.outputs(self.teacher, self.shared, self._item(0, 0))
    return {name: sketch(np.asarray(value[:PROBES])) for name, value in made.items()}

  def alone(self) -> bool:
    """Whether the teacher answers to an example alone, whatever else is in the batch."""
    item, half = self._item(0, 0), self.batch_size // 2

    def twice(leaf: Any) -> Any:  # the first half of the examples in the place of the second
      return np.concatenate([leaf[:half], leaf[: len(leaf) - half]]) if np.ndim(leaf) else leaf

    def answers(item: PyTree) -> Any:
      return jax.device_get(self.outputs(self.teacher, self.shared, item))[1]

    if half == 0:
      return True
    first, second = answers(item), answers(jax.tree.map(twice, item))
    return all(
      _off(second[name][:half], value[:half]) <= _ROUNDING for name, value in first.items()
    )

  def __call__(
    self,
    view: int,
    done: Callable[[int], Any],
    index: np.ndarray | None = None,
    known: int = 0,
    keep: Callable[[Rows, int], None] | None = None,
  ) -> Rows:
    """The rows of a view, or of some of its examples.

    Args:
      view: its number.
      done: told how many more rows there are, after every batch.
      index: which examples, ``[n]``; all by default.
      known: of how many of them, the first ones, the rows are there already, and are left empty.
      keep: told every few seconds of the rows, and of how many, the first ones, there are by then.
    """
    index = np.arange(self.size) if index is None else index
    rows = {name: np.empty((len(index), *r.shape), r.dtype) for name, r in self.layout.items()}
    # Where each example's row is, of those that are asked for: no other is looked at.
    place = np.full(self.size, -1)
    place[index[known:]] = np.arange(known, len(index))
    missing = np.arange(len(index)) >= known
    kept = time.monotonic()

    def take(made: Any) -> None:
      nonlocal kept
      shown, values, problems = jax.device_get(made)
      self._check(view, values, problems)
      at = place[shown]
      for name in self.layout:
        rows[name][at[at >= 0]] = values[name][at >= 0]
      before = int(missing.sum())
      missing[at[at >= 0]] = False
      done(before - int(missing.sum()))
      if keep is not None and missing.any() and time.monotonic() - kept >= PART_SECONDS:
        keep(rows, int(missing.argmax()))
        kept = time.monotonic()

    pending: Any = None
    for item in self.items(view, self._numbers(index[known:])):
      made = self.outputs(self.teacher, self.shared, item)
      # One batch late: the host waits for numbers that are there, while the device computes on.
      if pending is not None:
        take(pending)
      pending = made
    if pending is not None:
      take(pending)
    if missing.any():
      lost = index[missing.argmax()]
      raise RuntimeError(f"{self.source.name!r} did not show example {lost} of a view.")
    return rows

  def _numbers(self, index: np.ndarray) -> list[int]:
    """Which batches show these examples, each for the first time; nothing is read for it."""
    wanted, numbers = np.zeros(self.size, bool), []
    wanted[index] = True
    for number in range(self.steps):
      shown = self.whole.numbers(self.batch_size, number)
      if wanted[shown].any():
        numbers.append(number)
        wanted[shown] = False
    return numbers

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
  mesh: Mesh | None,
) -> Callable[..., Any]:
  """What runs the teacher on a batch; sources that differ in their seed alone compile it once."""
  shown = jax.jit(cut) if on_host else cut

  def outputs(teacher: Teacher, shared: PyTree, item: PyTree) -> Any:
    batch = shown(shared, item)
    if mesh is not None and batch.index.shape[0] % mesh.shape.get(AXIS, 1) == 0:
      # Without it the compiler is free to gather what is cut out of arrays on every device.
      rows = PartitionSpec(*[AXIS] * (AXIS in mesh.shape))
      batch = jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, rows))
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
    raise ValueError(_no_logits(outputs))
  made = {"logits": outputs.logits, **{f"features/{n}": outputs.features[n] for n in features}}
  return {n: v for n, v in {**made, "where": outputs.where}.items() if v is not None}


def _no_logits(outputs: Outputs) -> str:
  """Why what a teacher puts out is not kept, and what it would take."""
  instead = "name features=[...] of it, or leave cached out, so that the steps ask it"
  if outputs.hidden is None or not isinstance(outputs.head, Head):
    return f"the teacher puts out no logits, and a cache holds logits and features: {instead}."
  width, words = outputs.hidden.shape[-1], jax.eval_shape(with_logits, outputs).logits.shape[-1]
  return (
    "the teacher puts out hidden states and a head, and a cache holds logits and features. Each "
    f"token's hidden states are {width:,} numbers, {2 * width:,} bytes in bfloat16, and its logits "
    f"{words:,}, {2 * words:,} bytes, where its 32 most likely tokens would take about 136: "
    f"{instead} (with tokens_at_once= no more of its logits are made than a chunk's), or, where "
    "that many bytes are few, let it put out its logits: networks.linen(module, logits=lambda out: "
    "out.head(out.hidden))."
  )


def _skipped(progress: str | None, count: int, size: int) -> str:
  return f"{progress}: the teacher skipped {count} of {size} examples."


@dataclasses.dataclass(frozen=True)
class Filled:
  """What one process has filled of a cache.

  Attributes:
    shards: how many shards it filled.
    taken_over: how many of them a process had left that died.
    records: how many examples they have, of all views.
    skipped: of how many of these the teacher said nothing.
    lacking: how many examples, of all views, nobody has filled when it ends.
  """

  shards: int = 0
  taken_over: int = 0
  records: int = 0
  skipped: int = 0
  lacking: int = 0

  def more(self, shard: Shard, rows: Rows, *, taken_over: bool) -> Filled:
    """With one shard more."""
    none = int(np.sum(rows["where"] == 0)) if "where" in rows else 0
    return dataclasses.replace(
      self,
      shards=self.shards + 1,
      taken_over=self.taken_over + taken_over,
      records=self.records + shard.records,
      skipped=self.skipped + none,
    )


class _Estimating:
  """Moves a bar on, and says after the first batches how long the rest takes."""

  def __init__(self, shown: Progress, label: str | None, batch_size: int) -> None:
    self._shown, self._label, self._batch = shown, label, batch_size
    self._few = shown.left / 20
    self._calls = self._rows = 0
    self._began, self._said = 0.0, False

  def __call__(self, rows: int) -> None:
    self._shown.update(rows)
    self._calls, now = self._calls + 1, time.monotonic()
    if self._calls == 1:  # the first batch compiles
      self._began = now
    elif not self._said:
      self._rows += rows
      # A few batches alone are as fast as the machine happens to be in that second.
      enough = now - self._began >= _MEASURED_SECONDS or self._rows >= self._few
      if self._calls > _MEASURED and enough and self._rows:
        self._said, each = True, (now - self._began) / self._rows
        self._shown.say(
          f"{self._label}: about {_spoken(each * self._shown.left)} more for one process, by "
          f"{self._calls - 1} batches of {each * self._batch:.2g} s"
        )


def _spoken(seconds: float) -> str:
  """Seconds, as one says them.

  >>> _spoken(11_520), _spoken(150), _spoken(4.2)
  ('3 h 12 min', '2 min 30 s', '4 s')
  """
  whole = round(seconds)
  if whole < 60:
    return f"{whole} s"
  if whole < 3600:
    return f"{whole // 60} min {whole % 60} s"
  return f"{whole // 3600} h {whole % 3600 // 60} min"


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
    self._order = np.argsort(self.place)  # which example each record is
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

  def skipped_in(self, view: int) -> int:
    """Of how many examples the teacher says nothing; a shard at a time."""
    answered = sum(
      int(np.sum(rows["where"] != 0)) if "where" in (rows.dtype.names or ()) else len(rows)
      for rows in _cache_files.read_shards(self.folder, self.manifest, view, self.ids)
    )
    return len(self.place) - answered

  def _placed(self, rows: Rows, place: np.ndarray) -> Rows:
    """Rows with those of skipped examples, which have no record, as 0."""
    if not self.skips:
      return rows
    rows.setdefault("where", np.ones(place.shape, np.uint8))
    for values in rows.values():
      values[place < 0] = 0
    return rows

  def fill(
    self, shards: Sequence[Shard], fill: Filler, progress: str | None, *, wait: bool
  ) -> Filled:
    """Fills those of these shards that nobody has filled or is at.

    Args:
      shards: which.
      fill: the teacher.
      progress: the label of the bar and of the estimate; None for silence.
      wait: whether those that others are at are waited for, and taken over where these die.
    """
    with progress_bar(sum(s.records for s in shards), progress, unit="example") as shown:
      shown.say(f"{progress}: {self._estimate(shards, fill)}")
      update = _Estimating(shown, progress, fill.batch_size)
      made = self._fill(shards, lambda shard: self._filled(shard, fill, update), wait=wait)
      _cache_files.publish(self.folder)
      self.refresh()
      if made.skipped:
        shown.say(_skipped(progress, made.skipped, made.records))
    return dataclasses.replace(made, lacking=_cache_files.lacking(self.folder, self.manifest))

  def _fill(self, shards: Sequence[Shard], make: Callable[[Shard], Rows], *, wait: bool) -> Filled:
    """Goes round the shards until nothing is left to do, or nothing but to wait."""
    left, made = list(shards), Filled()
    while left:
      before = len(left)
      for shard in list(left):
        if not self._complete(shard):
          with claimed(self.folder, shard) as ours:
            if ours is False:
              continue
            if not self._complete(shard):  # by somebody else, since we looked
              rows = make(shard)
              made = made.more(shard, rows, taken_over=ours is None)
        left.remove(shard)
      if not wait:
        break
      if left and len(left) == before:
        time.sleep(_LOOK_AGAIN)
    return made

  def _estimate(self, shards: Sequence[Shard], fill: Filler) -> str:
    """What filling these takes, said before it begins."""
    row = row_type(self.manifest["arrays"])
    size = _cache_files.expected_bytes(row, self.ids, shards)
    rows, of = sum(shard.records for shard in shards), fill.size * self.manifest["view_count"]
    batches = sum(-(-shard.records // fill.batch_size) for shard in shards)
    whole = "" if rows == of else f", of {of:,} in {self.manifest['view_count']} views"
    return (
      f"{rows:,} examples{whole}: {size / 1e6:,.1f} MB in {len(shards)} files of {self.folder}, "
      f"{batches:,} batches of {fill.batch_size}"
    )

  def _complete(self, shard: Shard) -> bool:
    """Whether a shard is there; looks at the folder, to which others write."""
    found = rows_of(self.folder, [shard])[shard]
    if found and found[0].last == shard.last:
      return True
    if not self.has(shard.view) and not found:
      self.refresh()  # the files of a view that is complete may have other names
    return self.has(shard.view)

  def _filled(self, shard: Shard, fill: Filler, update: Callable[[int], None]) -> Rows:
    """Fills a shard that we have claimed, from where a process that died had come to."""
    begun = rows_of(self.folder, [shard])[shard]
    # What is there, in memory as the shard will be.
    parts = list(_cache_files.read_begun(self.manifest, begun, self.ids))
    known = sum(map(len, parts))
    at = [known]  # up to where rows are in files
    index = self._order[shard.first : shard.last]

    def write(rows: Rows, first: int, last: int) -> None:
      these = Shard(shard.view, shard.first + first, shard.first + last)
      cut = {name: values[first:last] for name, values in rows.items()}
      _cache_files.write_rows(self.folder, self.manifest, these, cut, self.ids)

    def keep(rows: Rows, last: int) -> None:
      if last > at[0]:
        write(rows, at[0], last)
        at[0] = last

    rows = fill(shard.view, update, index, known, keep)
    for name, values in rows.items():
      if parts:
        values[:known] = np.concatenate([part[name] for part in parts])
    try:
      write(rows, 0, shard.records)
    except FileNotFoundError:
      # Where we were silent for minutes another one has taken our shard, ended, and cleared away.
      if not self._complete(shard):
        raise
    for path in parts_of(self.folder, shard):
      path.unlink(missing_ok=True)
    if shard.last == len(self.ids):  # a view that is whole is there for others at once
      _cache_files.publish(self.folder)
    return rows

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
    if self.files is not None:
      shards = shards_of(self.files.manifest, missing)
      self.files.fill(shards, self.fill, self.progress, wait=True)
      return
    with progress_bar(len(missing) * self.size, self.progress, unit="example") as shown:
      for view in missing:
        self.views[view] = rows = self.fill(view, shown.update)
        if "where" in rows and (few := int(np.sum(rows["where"] == 0))):
          shown.say(_skipped(self.progress, few, self.size))

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
    if self.files is not None and not self.keep:
      return max(self.files.skipped_in(view) for view in range(self.count))
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
