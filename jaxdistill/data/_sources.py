"""Where batches come from: what a source is, arrays on the device, and two sources in every batch.

A `Source` hands out items (which rows, which view) and one pure function, ``cut``, that makes a
`Batch` of an item inside the compiled program. Sources differ in where the rows come from and in
nothing else, so the batches of those on the device (`on_device`) and of streamed ones
(`jaxdistill.data.streamed`) are equal bit by bit.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import _check, runs
from jaxdistill.data._examples import (
  Examples,
  Records,
  check_weight,
  ignored,
  label_mask,
  labels_count,
)
from jaxdistill.data._on_host import OnHost, shown_on_host
from jaxdistill.data._views import (
  Augmentation,
  Normalize,
  augment,
  augment_labels,
  check_augmentation,
  check_seed,
  epoch_order,
  identity,
  normalizer,
)
from jaxdistill.types import Batch, PyTree, Transform

__all__ = [
  "Part",
  "Source",
  "Whole",
  "check_in_memory",
  "contents_of",
  "counted_labels",
  "cutter",
  "example_shapes",
  "mixed",
  "on_device",
  "read_rows",
  "read_shown",
  "rows_of",
  "rows_to_use",
  "sample_of",
  "shown_by",
  "transformed",
  "usable_labels",
  "view_count",
  "view_numbers",
  "whole_of",
]

# Of how many rows a sample of records is: each is read and decoded for it, twice.
_SAMPLE = 16

# Of several processes that share every batch: which one this is, and how many there are.
Part = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Whole:
  """Every example of a source once, in its own order: what a cache of a teacher is filled from.

  Attributes:
    size: how many examples, transfer data included: what a batch's ``index`` counts.
    count: ``batch_size -> number of batches`` that show every example at least once. A batch
      repeats an example rather than be smaller than the others.
    numbers: ``(batch_size, number) -> [B]`` int32: which examples that batch shows, the same in
      every view. Nothing is read for it.
    item: ``(data_seed, batch_size, view, number) -> item`` for ``cut``: that batch of this view.
    rows: ``items -> (index, view)`` on the host, each ``[count, B]``, as ``cut`` will give them.
    ids: ``() -> [size]`` strings, unique.
    reads: whether an item's rows are read, so that they are better read ahead.
  """

  size: int
  count: Callable[[int], int]
  numbers: Callable[[int, int], np.ndarray]
  item: Callable[[int, int, int, int], PyTree]
  rows: Callable[[PyTree], tuple[np.ndarray, np.ndarray]]
  ids: Callable[[], Sequence[str]]
  reads: bool = False

  def every(self, data_seed: int, batch_size: int, view: int) -> Iterator[PyTree]:
    """Items for ``cut``, one by one, of this view of every example."""
    for number in range(self.count(batch_size)):
      yield self.item(data_seed, batch_size, view, number)


@dataclasses.dataclass(frozen=True)
class Source:
  """Where training batches come from, from the first step to the last.

  Batches are never padded: an epoch has ``size // (batch_size - transfer)`` steps, and what is left
  over at its end is not shown in that epoch. Another seed is
  ``dataclasses.replace(source, data_seed=...)``, which shares the arrays and the function: the
  items of several seeds may be stacked and cut under ``vmap``, since an item carries its seed.
  Another batch size is ``dataclasses.replace(source, batch_size=...)``.

  Attributes:
    shared: arrays on the device (or `jaxdistill._compile` ones), an argument of the compiled
      program; None for streams.
    cut: ``(shared, item) -> Batch``: pure; augments, and normalises last.
    read: ``(data_seed, batch_size, step, count, part) -> items``; call `items` instead.
    size: the number of examples.
    batch_size: B.
    data_seed: decides order and views.
    num_classes: K; 0 where labels are no classes, or there are none.
    normalize: what ``cut`` applies last: a function of the inputs as stored, ``[B, ...]``.
    stored: one example's inputs as stored: ``jax.ShapeDtypeStruct``, or a dict of them.
    views: V; epoch e shows view e mod V of every example. None: every epoch shows a new one.
    name: of the data, for reports.
    share: which part of each batch comes from a second, unlabelled stream.
    version: of the data.
    augmentation: its name. Where it is ``"identity"``, no view depends on ``data_seed``.
    whole: how every example is shown once; None for streams that only iterate.
    teacher: where batches bring a teacher's outputs along, which teacher's: a fingerprint.
    skipped: of how many examples that teacher says nothing.
    transform: ``(key, batch) -> batch`` before both networks: mixup, label smoothing, see
      `jaxdistill.data.transforms` and `transformed`. The step calls it, with a key of its own.
    contents: ``() -> digests`` of what the examples hold, by which a run and a cache know them
      again: ``inputs`` and ``labels`` (those that may be used) where they are arrays, and of the
      inputs of some rows, ``sample``; where they are read, of these rows alone. None for streams
      that only iterate, of which name and size are all that is known.
    shown: ``() -> what is computed`` of an example before a network sees it, augmentation and
      normalisation, whichever way its rows come: by this too a run knows its data again.
    has_labels: whether any example has a label that may be used and counts, as far as that is known
      before rows are read.
    tokenizer: the digest of the tokenizer whose tokens the examples are; empty where nobody said.
  """

  shared: PyTree
  cut: Callable[[PyTree, PyTree], Batch]
  read: Callable[[int, int, int, int, Part], PyTree]
  size: int
  batch_size: int
  data_seed: int
  num_classes: int
  normalize: Callable[[Any], Any]
  stored: PyTree
  views: int | None = None
  name: str = "data"
  share: float = 0.0
  version: str = ""
  augmentation: str = "identity"
  whole: Whole | None = None
  teacher: str | None = None
  skipped: int = 0
  transform: Transform | None = None
  contents: Callable[[], Mapping[str, str]] | None = None
  shown: Callable[[], Mapping[str, runs.Traced]] | None = None
  has_labels: bool = True
  tokenizer: str = ""

  def __post_init__(self) -> None:
    # Here and not in `on_device`: dataclasses.replace makes sources too.
    check_seed(self.data_seed)
    _check.whole("size", self.size)
    _check.whole("batch_size", self.batch_size, least=None)
    if self.share and not 1 <= self.transfer < self.batch_size:
      raise ValueError(
        f"share={self.share} of batch_size={self.batch_size} is {self.transfer} rows of transfer "
        "data, but both streams need at least one row of every batch: choose another share, or a "
        "larger batch_size."
      )
    if not 1 <= self.batch_size - self.transfer <= self.size:
      raise ValueError(
        f"batch_size={self.batch_size} must lie in 1 .. {self.size}, the size of {self.name!r}"
        f"{' beside transfer data' if self.share else ''}: training batches are never padded."
      )
    if self.views is not None:
      _check.whole("views", self.views, instead=", or None")

  @property
  def transfer(self) -> int:
    """How many examples of each batch come from a second, unlabelled stream."""
    return round(self.share * self.batch_size)

  @property
  def steps_per_epoch(self) -> int:
    """How many whole batches an epoch has."""
    return self.size // (self.batch_size - self.transfer)

  def items(self, step: int, count: int, part: Part = (0, 1)) -> PyTree:
    """What steps ``step .. step+count-1`` need, stacked: leaves ``[count, ...]``.

    Any step may be asked for, and ``count`` may cross the end of an epoch. Streams are fast where
    every call goes on from the last.

    Args:
      step: the first step, from 0.
      count: how many steps.
      part: ``(p, P)``: process p of P gets rows ``p*B/P .. (p+1)*B/P`` of every batch (of both
        streams' shares of it, where there are two), and reads no others.

    Returns:
      A tree. Leaves ``[count]`` are numbers; those with more axes have the batch axis second.

    Raises:
      ValueError: ``step`` or ``count`` is out of range, or a batch does not divide by P.
    """
    _check.whole("step", step, least=0)
    _check.whole("count", count, least=1)
    process, processes = part
    if not 0 <= process < processes:
      raise ValueError(f"part must be (p, P) with 0 <= p < P, got {part}.")
    if self.batch_size % processes or self.transfer % processes:
      of_them = f", of which {self.transfer} are transfer data," if self.transfer else ""
      raise ValueError(
        f"batch_size={self.batch_size}{of_them} does not divide by the {processes} processes that "
        f"share every batch: take multiples of {processes}."
      )
    return self.read(self.data_seed, self.batch_size, step, count, part)


def on_device(
  examples: Examples,
  *,
  batch_size: int,
  data_seed: int,
  augmentation: Augmentation = identity,
  views: int | None = None,
  normalize: Normalize = None,
  labelled: Any = None,
) -> Source:
  """Keeps all examples on the device; an item is a row of indices.

  Args:
    examples: from `load`, `from_arrays` or `from_dicts`.
    batch_size: B, at most the number of examples.
    data_seed: decides order and views, ``0 .. 2**32 - 1``.
    augmentation: applied to the inputs as stored.
    views: V, so that epoch e shows view e mod V; None for a new view in every epoch (for the one
      view that there is, without augmentation).
    normalize: what ``cut`` does last: a function of the inputs, (mean, std) by channel, or None,
      which scales uint8 to 0 .. 1.
    labelled: ``[N]``, whether an example's label may be used, or the leading axes of the labels; by
      default all may (none where the set has no labels). A label that may not be used does not
      reach the batch.

  Returns:
    The source.

  Raises:
    ValueError: ``batch_size``, ``views``, ``data_seed`` or ``labelled`` does not fit; or every
      example's weight is 0.
    TypeError: the inputs cannot lie on a device.

  >>> from jaxdistill.data import from_arrays
  >>> examples = from_arrays(np.arange(6, dtype=np.float32)[:, None], [0, 1, 0, 1, 0, 1])
  >>> source = on_device(examples, batch_size=2, data_seed=0)
  >>> items = source.items(step=0, count=3)
  >>> batch = source.cut(source.shared, jax.tree.map(lambda leaf: leaf[1], items))
  >>> source.steps_per_epoch, items["index"].shape, batch.inputs.shape
  (3, (3, 2), (2, 1))
  """
  check_in_memory("on_device", examples)
  check_weight(examples)
  views = view_count(augmentation, views)
  known = label_mask(examples, labelled)
  latest: dict[int, tuple[int, np.ndarray]] = {}

  def order(seed: int, epoch: int) -> np.ndarray:
    if seed not in latest or latest[seed][0] != epoch:
      latest[seed] = epoch, epoch_order(seed, epoch, len(examples))
    return latest[seed][1]

  def read(seed: int, batch: int, step: int, count: int, part: Part) -> PyTree:
    # A step's rows follow from its number alone, so that a run can go on at any step, and a chunk
    # may cross the end of an epoch.
    numbers = np.arange(step, step + count)
    steps = len(examples) // batch
    rows = [rows_of(order(seed, n // steps), n % steps, batch, part) for n in numbers.tolist()]
    return {"index": np.stack(rows), **view_numbers(seed, numbers // steps, views)}

  finish = normalizer(normalize)
  cut = cutter(augmentation, finish, examples.ignore)
  stored = example_shapes(examples.inputs, examples.name)
  # Not by jnp.asarray, which compiles a program for each shape.
  shared = jax.device_put(rows_to_use(examples, known))
  return Source(
    shared=shared,
    cut=cut,
    read=read,
    size=len(examples),
    batch_size=batch_size,
    data_seed=data_seed,
    num_classes=examples.num_classes,
    normalize=finish,
    stored=stored,
    views=views,
    name=examples.name,
    version=examples.version,
    augmentation=augmentation.name,
    whole=whole_of(examples, lambda index, numbers: {"index": index, **numbers}),
    contents=functools.cache(lambda: contents_of(shared) | sample_of(examples, known)),
    shown=functools.partial(shown_by, cut, shared),
    has_labels=labels_count(examples, known),
    tokenizer=examples.tokenizer,
  )


def contents_of(rows: Mapping[str, Any]) -> dict[str, str]:
  """The digests of a source's examples.

  Args:
    rows: from `rows_to_use`, where they lie.
  """
  labels = {name: leaf for name, leaf in rows.items() if name != "inputs"}
  return {"inputs": runs.fingerprint(rows["inputs"]), "labels": runs.fingerprint(labels)}


def sample_of(
  examples: Examples | Records,
  known: np.ndarray,
  read_some: Callable[[np.ndarray], dict[str, Any]] | None = None,
) -> dict[str, str]:
  """The digests of a few rows, read anew; of their labels too, where nobody knows them all.

  Args:
    examples: the rows.
    known: which labels may be used.
    read_some: reads rows by number; `read_rows` by default.
  """
  read_some = read_some or functools.partial(read_rows, examples, known)
  rows = np.unique(np.linspace(0, len(examples) - 1, _SAMPLE).round().astype(np.int32))

  def read() -> dict[str, str]:
    found = read_some(rows)
    digests = {"sample": runs.fingerprint(found.pop("inputs"))}
    if isinstance(examples, Records):
      digests["labels of sample"] = runs.fingerprint(tuple(found.values()))
    return digests

  one, other = read(), read()
  # What a transform draws anew at every reading says nothing of the rows.
  return {name: digest for name, digest in one.items() if digest == other[name]}


def shown_by(cut: Callable[[PyTree, PyTree], Batch], rows: PyTree) -> dict[str, runs.Traced]:
  """What a `cutter` makes of rows.

  Args:
    cut: from `cutter`.
    rows: some, or all of them: of their shapes the first axis is not looked at.
  """
  one = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      (1, *leaf.shape[1:]), jax.dtypes.canonicalize_dtype(leaf.dtype)
    ),
    rows,
  )
  of_one = {
    **one,
    "index": jax.ShapeDtypeStruct((1,), np.int32),
    **jax.eval_shape(lambda: view_numbers(0, np.zeros((), np.int32), None)),
  }
  return {"shown": runs.traced(jax.make_jaxpr(functools.partial(cut, None))(of_one))}


def rows_to_use(examples: Examples, known: np.ndarray) -> dict[str, Any]:
  """All examples as batches show them: a label that may not be used is 0."""
  return _usable(examples.read(slice(None)), known)


def read_rows(examples: Examples | Records, known: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
  """These rows as batches show them."""
  return _usable(examples.read(rows), known[rows])


def read_shown(
  examples: Examples | Records,
  known: np.ndarray,
  steps: Sequence[OnHost],
  data_seed: int,
  rows: np.ndarray,
  views: np.ndarray,
) -> dict[str, Any]:
  """These rows as views of them show them, whose pictures the host changes; one view each."""

  def shown(inputs: Any, at: int) -> Any:
    return shown_on_host(steps, inputs, data_seed, int(rows[at]), int(views[at]))

  if isinstance(examples, Records):
    key = examples.inputs
    if not isinstance(key, str) or examples.transform is not None:
      raise ValueError(
        f"on_host is for records of one picture without a transform, and {examples.name!r} has "
        f"inputs={key!r}{' and a transform' if examples.transform is not None else ''}: make an "
        "OnHost of the transform, and put it first."
      )
    found = examples.features(rows)
    made = [{**one, key: shown(one[key], at)} for at, one in enumerate(found)]
    return _usable(examples.stack(made, rows), known[rows])
  read = read_rows(examples, known, rows)
  return {**read, "inputs": np.stack([shown(x, at) for at, x in enumerate(read["inputs"])])}


def _usable(rows: dict[str, Any], known: np.ndarray) -> dict[str, Any]:
  return {**rows, "labels": usable_labels(rows["labels"], known), "labelled": known}


def usable_labels(labels: np.ndarray, known: np.ndarray) -> np.ndarray:
  """Labels as a batch has them: 0 where one may not be used."""
  may = np.expand_dims(known > 0, tuple(range(known.ndim, labels.ndim)))
  return np.where(may, labels, labels.dtype.type(0))


def _batch_of_one(stored: PyTree) -> PyTree:
  """The shapes of a batch's inputs that has one example."""
  return jax.tree.map(lambda one: jax.ShapeDtypeStruct((1, *one.shape), one.dtype), stored)


def cutter(
  augmentation: Augmentation, finish: Callable[[Any], Any], ignore: float | None = None
) -> Callable[[PyTree, PyTree], Batch]:
  """The ``cut`` of a source: the same for every kind, so that their bits are the same."""
  check_augmentation(augmentation)

  def shown(inputs: Any, *which: Any) -> Any:
    looks = augment(augmentation, inputs, *which)
    if augmentation.strong is None:
      return finish(looks)
    return {name: finish(look) for name, look in looks.items()}

  def cut(shared: PyTree, item: Mapping[str, Any]) -> Batch:
    # [B]. Arrays on the device are gathered inside the program; a stream's item brings its rows.
    index, seed, view = item["index"], item["data_seed"], item["view"]
    rows = item
    if shared is not None:
      rows = jax.tree.map(lambda leaf: jnp.take(leaf, index, 0, mode="clip"), shared)
    labels, labelled = counted_labels(rows["labels"], rows["labelled"], ignore)
    weight = {"weight": rows["weight"]} if "weight" in rows else {}
    moved = augment_labels(
      augmentation,
      rows["inputs"],
      {"labels": labels, "labelled": labelled, **weight},
      *(seed, index, view),
    )
    return Batch(
      inputs=shown(rows["inputs"], seed, index, view),
      **{"weight": jnp.ones(index.shape, jnp.float32), **moved},
      index=index,
      view=jnp.broadcast_to(view, index.shape),
    )

  return cut


def counted_labels(labels: Any, labelled: Any, ignore: float | None) -> tuple[Any, Any]:
  """Labels as a batch has them, int32 or float32, and which of them count.

  Args:
    labels: as stored, ``[B, ...]``.
    labelled: ``[B]``, or the leading axes of the labels.
    ignore: the label that stands for none.

  Returns:
    ``(labels, labelled)``: 0 in both where a label stands for none; ``labelled`` has the shape of
    the labels where some do.
  """
  xp: Any = np if isinstance(labels, np.ndarray) else jnp  # a host's arrays stay there
  none = ignored(labels, ignore)
  if none is not None:
    labels = xp.where(none, xp.zeros_like(labels), labels)
    labelled = xp.expand_dims(labelled, tuple(range(labelled.ndim, labels.ndim)))
    labelled = xp.where(none, xp.zeros((), labelled.dtype), labelled)
  integers = jnp.issubdtype(labels.dtype, jnp.integer)
  return labels.astype(np.int32 if integers else np.float32), labelled


def rows_of(order: np.ndarray, step: int, batch_size: int, part: Part) -> np.ndarray:
  """The rows that a process gets of one step of an epoch."""
  process, processes = part
  # Contiguous shares, which a mesh over all processes puts together to this very batch.
  mine = batch_size // processes
  first = step * batch_size + process * mine
  return order[first : first + mine]


def whole_of(
  examples: Examples | Records,
  make: Callable[[np.ndarray, dict[str, np.ndarray]], PyTree],
  *,
  reads: bool = False,
) -> Whole:
  """Every example of a source that is no mix; ``make`` makes what ``cut`` takes of row numbers."""
  size = len(examples)

  def numbers(batch: int, number: int) -> np.ndarray:
    # The last row comes again at the end: a smaller batch would be another program.
    first = number * batch
    return np.minimum(np.arange(first, first + batch, dtype=np.int32), size - 1)

  def item(seed: int, batch: int, view: int, number: int) -> PyTree:
    return make(numbers(batch, number), view_numbers(seed, np.asarray(view), None))

  def rows(items: PyTree) -> tuple[np.ndarray, np.ndarray]:
    index = np.asarray(items["index"])
    return index, np.broadcast_to(np.asarray(items["view"])[:, None], index.shape)

  def count(batch: int) -> int:
    return -(-size // batch)

  return Whole(size, count, numbers, item, rows, examples.read_ids, reads)


def view_count(augmentation: Augmentation, views: int | None) -> int | None:
  """V: what was asked for; 1 where all views are the same."""
  check_augmentation(augmentation)
  looks = [one for one in (augmentation, augmentation.strong) if one is not None]
  return 1 if views is None and all(one.choices == 1 for one in looks) else views


def view_numbers(seed: int, epochs: np.ndarray, views: int | None) -> dict[str, np.ndarray]:
  """The part of an item that has no batch axis: the view and the seed."""
  view = epochs if views is None else epochs % views
  return {"view": np.asarray(view, np.int32), "data_seed": np.full(view.shape, seed, np.uint32)}


def check_in_memory(argument: str, examples: Any) -> None:
  """Raises where examples are not arrays that a device takes."""
  arrays = isinstance(examples, Examples)
  dtypes = [leaf.dtype for leaf in jax.tree.leaves(examples.inputs)] if arrays else []
  if not arrays or any(dtype.kind in "OSU" for dtype in dtypes):
    raise TypeError(
      f"{argument} needs Examples with numeric inputs (from load, from_arrays or from_dicts), got "
      f"{type(examples).__name__} {' '.join(map(str, dtypes))}: use streamed for Records, and "
      "tokenize text first."
    )


def example_shapes(inputs: PyTree, name: str) -> PyTree:
  """The shape and dtype of one of these inputs as a device holds it."""

  def shape_of(leaf: np.ndarray) -> jax.ShapeDtypeStruct:
    if leaf.dtype.kind in "OSU":
      raise TypeError(f"The inputs of {name!r} are text, which no device takes: tokenize it first.")
    return jax.ShapeDtypeStruct(leaf.shape[1:], jax.dtypes.canonicalize_dtype(leaf.dtype))

  return jax.tree.map(shape_of, inputs)


def transformed(source: Source, transform: Transform) -> Source:
  """The source with a transform of whole batches, which both networks then see.

  Args:
    source: where batches come from.
    transform: ``(key, batch) -> batch``: mixup, label smoothing, see `jaxdistill.data.transforms`.
      It takes the place of one that the source has; `transforms.compose` makes one of several.

  Returns:
    The source; the step calls the transform, with a key of its own.

  Raises:
    TypeError: an argument is of another kind.
  """
  if not isinstance(source, Source):
    raise TypeError(f"source must be a Source, got {_check.show(source)}.")
  _check.function(
    "transform",
    transform,
    "(key, batch) -> batch",
    arguments=2,
    instead="See jaxdistill.data.transforms.",
  )
  return dataclasses.replace(source, transform=transform)


def mixed(source: Source, transfer: Source, *, share: float) -> Source:
  """Mixes unlabelled transfer data into every batch, at a fixed share of it.

  A batch keeps ``source.batch_size`` rows: first those of ``source``, then ``round(share * B)`` of
  ``transfer``, whose labels, if it has any, do not reach the batch. Epochs are counted by
  ``source``; ``transfer`` runs through epochs of its own, in an order of its own that the mix's
  ``data_seed`` decides (whatever ``data_seed`` and ``batch_size`` it had itself).

  Args:
    source: where the labelled rows come from.
    transfer: any other source: in memory, streamed or iterated.
    share: the part of each batch that is transfer data, between 0 and 1.

  Returns:
    The source. Its ``index`` counts on from ``source.size`` for transfer rows; ``normalize`` and
    ``stored`` are those of ``source``. Each of the two shows its own views; the mix has as many as
    the one with more.

  Raises:
    TypeError: one of the two is no `Source`.
    ValueError: one of them is a mix, one of them would have no row in a batch, or their inputs
      differ in structure, shape or dtype once normalised; when a batch is cut, one of them alone
      shows two views.

  >>> from jaxdistill.data import from_arrays
  >>> from jaxdistill.data import on_device
  >>> def make(value, size):
  ...   examples = from_arrays(np.full((size, 2), value, np.float32), np.ones(size, np.int32))
  ...   return on_device(examples, batch_size=4, data_seed=0)
  >>> mix = mixed(make(0.0, 6), make(5.0, 8), share=0.25)
  >>> batch = mix.cut(mix.shared, jax.tree.map(lambda leaf: leaf[0], mix.items(0, 1)))
  >>> batch.inputs[:, 0].tolist(), batch.labelled.tolist(), mix.steps_per_epoch
  ([0.0, 0.0, 0.0, 5.0], [1.0, 1.0, 1.0, 0.0], 2)
  """
  _check_mix(source, transfer, share)
  known = [one.views for one in (source, transfer) if one.views is not None]

  def read(seed: int, batch: int, step: int, count: int, part: Part) -> PyTree:
    more = round(share * batch)
    if more > transfer.size:
      raise ValueError(
        f"share={share} of batch_size={batch} is {more} rows of transfer data, but "
        f"{transfer.name!r} has {transfer.size}: lower share or batch_size."
      )
    return {
      "source": source.read(seed, batch - more, step, count, part),
      "transfer": transfer.read(_other_seed(seed), more, step, count, part),
    }

  def cut(shared: PyTree, item: Mapping[str, Any]) -> Batch:
    # Both are cut as they would be alone, each with its own views, and joined along the batch.
    mine = source.cut(shared[0], item["source"])
    more = transfer.cut(shared[1], item["transfer"])
    count = more.index.shape[0]
    structures: list[Any] = [jax.tree.structure(one.inputs) for one in (mine, more)]
    if structures[0] != structures[1]:
      raise ValueError(
        f"{source.name!r} shows {source.augmentation!r} and {transfer.name!r} shows "
        f"{transfer.augmentation!r}, of which one has two views: give both data.two_views."
      )

    def of_mine(leaf: Any, fill: float) -> Any:
      return jnp.full((count, *leaf.shape[1:]), fill, leaf.dtype)

    weight = jnp.expand_dims(more.weight, range(more.weight.ndim, mine.weight.ndim))
    fits = weight.ndim == mine.weight.ndim
    more = dataclasses.replace(
      more,
      labels=of_mine(mine.labels, 0),
      labelled=of_mine(mine.labelled, 0),
      weight=weight * of_mine(mine.weight, 1) if fits else of_mine(mine.weight, 1),
      index=more.index + jnp.int32(source.size),
    )
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), mine, more)

  return Source(
    shared=(source.shared, transfer.shared),
    cut=cut,
    read=read,
    size=source.size,
    batch_size=source.batch_size,
    data_seed=source.data_seed,
    num_classes=source.num_classes,
    normalize=source.normalize,
    stored=source.stored,
    views=max(known) if len(known) == 2 else None,
    name=f"{source.name} with {share:g} of {transfer.name}",
    share=share,
    version=" with ".join(v for v in (source.version, transfer.version) if v),
    augmentation=" with ".join(dict.fromkeys((source.augmentation, transfer.augmentation))),
    whole=_both(source, transfer),
    contents=functools.partial(_both_contents, source, transfer),
    shown=functools.partial(_both_shown, source, transfer),
    has_labels=source.has_labels,
    tokenizer=source.tokenizer or transfer.tokenizer,
  )


def _both_contents(source: Source, transfer: Source) -> dict[str, str]:
  """What a mix holds: of a part that only iterates, nothing."""
  known = [one.contents() for one in (source, transfer) if one.contents is not None]
  return {
    name: runs.short_digest(*(one.get(name) for one in known))
    for name in sorted(set().union(*known))
  }


def _both_shown(source: Source, transfer: Source) -> dict[str, runs.Traced]:
  found = {} if source.shown is None else dict(source.shown())
  more = {} if transfer.shown is None else transfer.shown()
  return found | {f"{name} of transfer": one for name, one in more.items()}


def _check_mix(source: Any, transfer: Any, share: Any) -> None:
  """Raises where two sources can't be shown side by side."""
  for argument, one in (("source", source), ("transfer", transfer)):
    if not isinstance(one, Source):
      raise TypeError(
        f"{argument} must be a Source (from on_device, streamed or iterated), got "
        f"{type(one).__name__}."
      )
    if one.teacher is not None:
      raise ValueError(
        f"{argument} brings a teacher's outputs along: mix the sources first, and cache the mix."
      )
    if one.transform is not None:
      raise ValueError(f"{argument} has a transform of its own: mix first, and transform the mix.")
    if one.share:
      raise ValueError(f"{argument} is a mix itself; mixed takes two sources that are none.")
  if not isinstance(share, float | int | np.number) or not 0 < share < 1:
    raise ValueError(
      f"share={share} must lie between 0 and 1, without them: for no transfer data leave mixed "
      "out, for nothing else train on the transfer source with labelled all 0."
    )
  read = [one.tokenizer for one in (source, transfer)]
  if all(read) and read[0] != read[1]:
    raise ValueError(
      f"{source.name!r} has the tokens of tokenizer {read[0]} and {transfer.name!r} those of "
      f"{read[1]}: make both of one tokenizer, data.from_text(texts, tokenizer)."
    )
  seen = [_normalised(one) for one in (source, transfer)]
  if seen[0] != seen[1]:
    raise ValueError(
      f"The inputs of {source.name!r} and of {transfer.name!r} must agree once normalised, but are "
      f"{seen[0]} and {seen[1]}: give both one shape and set of keys, and one dtype by normalize=."
    )


def _other_seed(seed: int) -> int:
  """The seed of a mix's transfer data."""
  # An odd factor and an even, fixed-point-free shift: seeds stay apart, and none maps to itself.
  return (seed * 2654435761 + 0x7472616E) % 2**32


def _both(source: Source, transfer: Source) -> Whole | None:
  """Every example of a mix: a batch has rows of both, and the smaller of the two comes again."""
  first, second = source.whole, transfer.whole
  if first is None or second is None:
    return None

  # Both halves every time, whatever the share: one program, and each example at least once. The
  # smaller of the two begins again.
  def count(batch: int) -> int:
    half = max(1, batch // 2)
    return max(first.count(half), second.count(half))

  def numbers(batch: int, number: int) -> np.ndarray:
    half = max(1, batch // 2)
    mine = first.numbers(half, number % first.count(half))
    more = second.numbers(half, number % second.count(half))
    return np.concatenate([mine, more + np.int32(source.size)])

  def item(seed: int, batch: int, view: int, number: int) -> PyTree:
    half = max(1, batch // 2)
    views = (view % (one.views or view + 1) for one in (source, transfer))
    at = (number % one.count(half) for one in (first, second))
    return {
      "source": first.item(seed, half, next(views), next(at)),
      "transfer": second.item(_other_seed(seed), half, next(views), next(at)),
    }

  def rows(items: PyTree) -> tuple[np.ndarray, np.ndarray]:
    mine, more = first.rows(items["source"]), second.rows(items["transfer"])
    return (
      np.concatenate([mine[0], more[0] + np.int32(source.size)], axis=1),
      np.concatenate([mine[1], more[1]], axis=1),
    )

  def ids() -> list[str]:
    return [f"source/{id}" for id in first.ids()] + [f"transfer/{id}" for id in second.ids()]

  size, reads = first.size + second.size, first.reads or second.reads
  return Whole(size, count, numbers, item, rows, ids, reads)


def _normalised(source: Source) -> str:
  """A source's inputs as networks see them: structure, shapes and dtypes, as text."""
  made = jax.eval_shape(source.normalize, _batch_of_one(source.stored))
  return str(jax.tree.map(lambda one: f"{one.dtype}{list(one.shape[1:])}", made))
