"""The rows of a teacher cache: computed, kept in memory, written to files, found again."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import arguments, cache_files
from jaxdistill.capacity import by_work
from jaxdistill.fingerprints import PROBES, sketch
from jaxdistill.progress import bar
from jaxdistill.sources import Source
from jaxdistill.streams import record_files
from jaxdistill.types import Outputs, Teacher

__all__ = ["Files", "Filler", "Store"]

PyTree = Any
# One view's rows, by example: ``{"logits": [N, ...], "features/<name>": [N, ...]}``.
Rows = dict[str, np.ndarray]


class Filler:
  """Runs the teacher over every example of a view."""

  def __init__(
    self,
    teacher: Teacher,
    variables: PyTree,
    source: Source,
    dtype: str,
    features: tuple[str, ...],
    batch_size: int,
  ) -> None:
    """Looks at what the teacher puts out, abstractly.

    Args:
      teacher: the teacher.
      variables: its variables.
      source: a source with a ``whole``.
      dtype: of the rows.
      features: which of the teacher's features are kept.
      batch_size: examples in a batch.
    """
    whole: Any = source.whole
    self.source, self.variables, self.dtype = source, variables, dtype
    self.size, self.every = whole.size, whole.every
    self.batch_size = min(batch_size, self.size)
    self.steps = -(-self.size // self.batch_size)

    outputs = _function(teacher, source.cut, dtype, features)
    given = variables, source.shared, next(self.items(0))
    _, made, _ = jax.eval_shape(outputs, *given)
    options = by_work(outputs, *given, calls=self.steps * (source.views or 1))
    self.outputs = jax.jit(outputs, compiler_options=options)
    self.layout = {
      name: jax.ShapeDtypeStruct(value.shape[1:], value.dtype) for name, value in made.items()
    }

  def items(self, view: int) -> Iterator[PyTree]:
    """The batches of a view."""
    return iter(self.every(self.source.data_seed, self.batch_size, view))

  def probe(self) -> dict[str, Any]:
    """What the teacher puts out for the first examples, as sketches."""
    _, made, _ = self.outputs(self.variables, self.source.shared, next(self.items(0)))
    return {name: sketch(np.asarray(value[:PROBES])) for name, value in made.items()}

  def __call__(self, view: int, done: Callable[[int], Any]) -> Rows:
    """The rows of one view, in the order of the examples."""
    rows = {name: np.empty((self.size, *r.shape), r.dtype) for name, r in self.layout.items()}
    missing = np.ones(self.size, bool)

    def take(made: Any) -> None:
      index, values, problems = jax.device_get(made)
      for name, bad in problems.items():
        if bad:
          raise ValueError(
            f"the teacher's {name} in view {view} hold NaN, or a number that {self.dtype} has "
            "not: look at the teacher's variables, or take dtype='float32'."
          )
        rows[name][index] = values[name]
      missing[index] = False
      done(1)

    pending: Any = None
    for item in self.items(view):
      made = self.outputs(self.variables, self.source.shared, item)
      if pending is not None:
        take(pending)  # while the device is at the next batch
      pending = made
    take(pending)
    if missing.any():
      raise RuntimeError(f"{self.source.name!r} did not show example {missing.argmax()} of a view.")
    return rows


@functools.lru_cache(maxsize=4)
def _function(
  teacher: Teacher, cut: Callable[[PyTree, PyTree], Any], dtype: str, features: tuple[str, ...]
) -> Callable[..., Any]:
  """What runs the teacher on a batch; sources that differ in their seed alone compile it once."""

  def outputs(variables: PyTree, shared: PyTree, item: PyTree) -> Any:
    batch = cut(shared, item)
    made = _picked(teacher(variables, batch), features)
    kept = {name: value.astype(dtype) for name, value in made.items()}
    problems = {
      name: jnp.any(jnp.isnan(value) | (jnp.isfinite(value) & ~jnp.isfinite(kept[name])))
      for name, value in made.items()
    }
    return batch.index, kept, problems

  return outputs


def _picked(outputs: Any, features: Sequence[str]) -> dict[str, jax.Array]:
  """What is kept of a teacher's outputs."""
  if not isinstance(outputs, Outputs):
    raise TypeError(f"teacher must return Outputs, got {arguments.show(outputs)}.")
  if outputs.logits is None:
    raise ValueError(
      "the teacher puts out no logits (hidden and head stand for them), and a cache holds logits "
      "and features: let the teacher multiply them out, or leave cached out."
    )
  lacking = [name for name in features if name not in outputs.features]
  if lacking:
    raise ValueError(
      f"features has {lacking}, which the teacher does not put out; it has "
      f"{sorted(outputs.features)}."
    )
  return {"logits": outputs.logits, **{f"features/{n}": outputs.features[n] for n in features}}


class Files:
  """A cache's folder, read in the order of a source's examples."""

  def __init__(self, folder: pathlib.Path, ids: Sequence[str]) -> None:
    """Opens it.

    Args:
      folder: the cache.
      ids: of the source's examples, in their order.

    Raises:
      ValueError: the cache is of other examples.
    """
    self.folder = folder
    self.manifest = cache_files.read_manifest(folder)
    self.ids = cache_files.read_ids(folder, self.manifest)
    place = {id: number for number, id in enumerate(self.ids)}
    lacking = [id for id in ids if id not in place]
    if lacking or len(place) != len(ids):
      raise ValueError(
        f"folder={str(folder)!r} is a cache of other examples: {len(lacking)} of {len(ids)} ids "
        f"are not in it ({', '.join(lacking[:3])}). Take another folder."
      )
    # Where each example's record stands in a view; who wrote it may have had another order.
    self.place = np.array([place[id] for id in ids])
    self._open: dict[int, Any] = {}

  def has(self, view: int) -> bool:
    """Whether the view is complete."""
    return str(view) in self.manifest["views"]

  def refresh(self) -> None:
    """Sees what another process has filled."""
    self.manifest = cache_files.read_manifest(self.folder)

  def load(self, view: int) -> Rows:
    """All rows of a view, verified."""
    rows = cache_files.read_view(self.folder, self.manifest, view, self.ids)
    if np.array_equal(self.place, np.arange(len(self.place))):
      return rows
    return {name: values[self.place] for name, values in rows.items()}

  def write(self, view: int, rows: Rows) -> None:
    """Adds a view."""
    order = np.argsort(self.place)
    moved = {name: values[order] for name, values in rows.items()}
    self.manifest = cache_files.write_view(self.folder, view, moved, self.ids)

  def read(self, view: int, index: np.ndarray) -> Rows:
    """Some rows of a view, through Grain; its shards are verified when they are opened."""
    shards = self.manifest["views"][str(view)]
    if view not in self._open:
      for shard in shards:
        cache_files.check_shard(self.folder, shard)
      opened = record_files([str(self.folder / shard["file"]) for shard in shards])
      if len(opened) != len(self.ids):
        raise cache_files.CacheError(
          f"View {view} of {self.folder} has {len(opened)} records for {len(self.ids)} examples."
        )
      self._open[view] = opened
    kind = cache_files.row_type(self.manifest["arrays"])
    places = self.place[index.reshape(-1)].tolist()
    records = self._open[view].__getitems__(places)
    starts = [cache_files.prefix(self.ids[place]) for place in places]
    for record, start in zip(records, starts, strict=True):
      if not record.startswith(start) or len(record) != len(start) + kind.itemsize:
        raise cache_files.CacheError(
          f"View {view} of {self.folder} has another record where {start[4:]!r} belongs."
        )
    joined = b"".join(r[len(s) :] for r, s in zip(records, starts, strict=True))
    packed = np.frombuffer(joined, kind).reshape(index.shape)
    return {name: np.ascontiguousarray(packed[name]) for name in kind.names or ()}


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
      self.files.refresh()
      missing = [view for view in wanted if not self.has(view)]
    if not missing:
      return
    if self.fill is None:
      raise ValueError(f"the cache lacks the views {missing[:5]}, and there is no teacher.")
    with bar(len(missing) * self.fill.steps, self.progress, unit="batch") as shown:
      for view in missing:
        rows = self.fill(view, shown.update)
        if self.files is not None:
          self.files.write(view, rows)
        if self.keep:
          self.views[view] = rows

  def complete(self) -> None:
    """Fills all views."""
    self.make(range(self.count))

  def view(self, view: int) -> Rows:
    """All rows of a view that is there."""
    if view in self.views:
      return self.views[view]
    assert self.files is not None  # else it would be in memory
    rows = self.files.load(view)
    if self.keep:
      self.views[view] = rows
    return rows

  def rows(self, index: np.ndarray, view: np.ndarray) -> Rows:
    """The rows of these examples in these views, each ``[count, B]``."""
    wanted = np.unique(view).tolist()
    self.make(wanted)
    if len(wanted) == 1:
      return self._some(wanted[0], index)
    made = {name: np.empty((*index.shape, *r.shape), r.dtype) for name, r in self.layout.items()}
    for one in wanted:
      chosen = view == one
      for name, rows in self._some(one, index[chosen]).items():
        made[name][chosen] = rows
    return made

  def _some(self, view: int, index: np.ndarray) -> Rows:
    if self.files is not None and not self.keep:
      return self.files.read(view, index)
    return {name: rows[index] for name, rows in self.view(view).items()}
