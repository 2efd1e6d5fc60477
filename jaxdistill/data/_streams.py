"""Batches that are read as they are needed: through Grain, or from any stream that can resume.

`streamed` reads examples by number, in the order that a source on the device has. `iterated` takes
a stream that can only be iterated, in the stream's own order.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxdistill import _check, _extras
from jaxdistill.data._examples import (
  IMAGES,
  Examples,
  Fields,
  Records,
  check_classes,
  check_weight,
  label_mask,
  labels_count,
  row_reader,
  told_by,
)
from jaxdistill.data._on_host import OnHost, checked_steps, named
from jaxdistill.data._sources import (
  Part,
  Source,
  contents_of,
  cutter,
  example_shapes,
  read_rows,
  read_shown,
  rows_of,
  rows_to_use,
  sample_of,
  shown_by,
  view_count,
  view_numbers,
  whole_of,
)
from jaxdistill.data._views import Augmentation, Normalize, epoch_order, identity, normalizer
from jaxdistill.types import PyTree

__all__ = ["iterated", "record_files", "resumable", "streamed"]

# Rows that are read at a time where a batch has fewer: what a call of a reader and of Grain costs
# beside its rows is then little of it.
_ROWS = 512

# Several threads ask for the same epoch.
_remembered_order = functools.lru_cache(maxsize=4)(epoch_order)


def streamed(
  examples: Examples | Records,
  *,
  batch_size: int,
  data_seed: int,
  augmentation: Augmentation = identity,
  views: int | None = None,
  normalize: Normalize = None,
  labelled: Any = None,
  on_host: OnHost | Sequence[OnHost] = (),
  prefetch: int = 4,
  workers: int = 0,
) -> Source:
  """Reads batches through Grain; an item carries the rows themselves.

  Args:
    examples: arrays, or `Records` for what memory does not hold.
    batch_size: B, at most the number of examples.
    data_seed: decides order and views, ``0 .. 2**32 - 1``.
    augmentation: applied on the device to the inputs as read.
    views: V, so that epoch e shows view e mod V; None for a new view in every epoch.
    normalize: what ``cut`` does last: a function of the inputs, (mean, std) by channel, or None,
      which scales uint8 to 0 .. 1.
    labelled: ``[N]``, whether an example's label may be used, or the leading axes of the labels; by
      default all may (none where the set has no labels). A label that may not be used does not
      reach the batch.
    on_host: what happens to each picture when it is read, before the device sees it, step by step:
      `random_resized_crop`, `colour_jitter`. Pictures of many sizes become one here.
    prefetch: how many batches are read ahead, by as many threads; where a batch is small, and its
      rows are arrays or TFDS's without a transform, as many pieces of 512 rows.
    workers: processes that read, for `Records` whose decoding keeps one core busy; each starts
      Python anew, so a script needs its ``if __name__ == "__main__"``. 0 reads in this one.

  Returns:
    The source; the same batches in the same order as `on_device`.

  Raises:
    ValueError: ``batch_size``, ``views``, ``data_seed``, ``labelled``, ``prefetch`` or ``workers``
      does not fit, records that the host changes have a transform, or every example's weight is 0.
    TypeError: the inputs are text, which no device takes, or something in ``on_host`` is no step.
  """
  _check.whole("prefetch", prefetch)
  _check.whole("workers", workers, least=0)
  _extras.need("data.streamed", "grain")
  if not isinstance(examples, Examples | Records):
    raise TypeError(
      f"streamed needs Examples or Records (from load, from_arrays, from_sequence), got "
      f"{_check.show(examples)}."
    )
  check_weight(examples)
  steps = checked_steps(on_host)
  views = views if steps else view_count(augmentation, views)
  known = label_mask(examples, labelled)
  read_some = functools.partial(_rows, examples, known, steps)
  fetch = functools.partial(_fetch, read_some, len(examples), views)
  # A user's own rows may each take long to make: of those no batch waits for another.
  quick = isinstance(examples, Examples) or (examples.prepared and examples.transform is None)
  quick = quick and not steps

  def start(seed: int, batch: int, part: Part, step: int) -> Iterator[PyTree]:
    many = max(1, _ROWS * part[1] // batch) if quick else 1
    pieces = functools.partial(fetch, seed, batch, part, many)
    return _stream(pieces, step, many, prefetch, workers)

  finish = normalizer(normalize)
  cut, first = (
    cutter(augmentation, finish, examples.ignore),
    read_some(np.arange(1), 0, np.zeros(1, np.int64)),
  )
  stored = example_shapes(first["inputs"], examples.name)
  return Source(
    shared=None,
    cut=cut,
    read=resumable(start),
    size=len(examples),
    batch_size=batch_size,
    data_seed=data_seed,
    num_classes=examples.num_classes,
    normalize=finish,
    stored=stored,
    views=views,
    name=examples.name,
    version=examples.version,
    augmentation=named(steps, augmentation.name),
    whole=whole_of(examples, functools.partial(_item, read_some), reads=True),
    contents=functools.partial(_contents, examples, known, read_some),
    shown=functools.partial(shown_by, cut, first),
    has_labels=labels_count(examples, known),
    tokenizer=examples.tokenizer if isinstance(examples, Examples) else "",
  )


def _rows(
  examples: Examples | Records,
  known: np.ndarray,
  steps: Sequence[OnHost],
  index: np.ndarray,
  seed: int,
  views: np.ndarray,
) -> dict[str, Any]:
  """Rows as these views of them, one each, show them before they come to a device."""
  if not steps:
    return read_rows(examples, known, index)
  return read_shown(examples, known, steps, seed, index, views)


def _contents(
  examples: Examples | Records, known: np.ndarray, read_some: Callable[..., dict[str, Any]]
) -> dict[str, str]:
  """What is streamed; arrays not once for all, since they are the user's to change."""
  whole = contents_of(rows_to_use(examples, known)) if isinstance(examples, Examples) else {}

  def first_views(rows: np.ndarray) -> dict[str, Any]:
    return read_some(rows, 0, np.zeros_like(rows))

  return whole | sample_of(examples, known, first_views)


def resumable(
  start: Callable[[int, int, Part, int], Iterator[PyTree]],
) -> Callable[[int, int, int, int, Part], PyTree]:
  """A `Source`'s ``read`` of streams that ``start(data_seed, batch_size, part, step)`` opens."""
  open_streams: dict[Any, tuple[int, Iterator[PyTree]]] = {}

  def read(seed: int, batch: int, step: int, count: int, part: Part) -> PyTree:
    # One open stream for each seed: a run over several asks in turn, and none may start anew.
    key = (seed, batch, part)
    at, stream = open_streams.pop(key, (-1, iter(())))
    if at != step:
      stream = start(*key, step)
    pieces = [next(stream) for _ in range(count)]
    open_streams[key] = step + count, stream
    return jax.tree.map(lambda *leaves: np.stack(leaves), *pieces)

  # Also at exit: Grain's threads and processes must end before the modules that end them.
  weakref.finalize(read, open_streams.clear)
  return read


def _fetch(
  read_some: Callable[..., dict[str, Any]],
  size: int,
  views: int | None,
  seed: int,
  batch_size: int,
  part: Part,
  steps: int,
  step: int,
) -> list[dict[str, Any]]:
  """The items of some steps from ``step`` on; by NumPy alone, in threads or other processes."""
  turns = range(step, step + steps)
  places = [divmod(turn, size // batch_size) for turn in turns]
  index = [
    rows_of(_remembered_order(seed, epoch, size), first, batch_size, part)
    for epoch, first in places
  ]
  mine = len(index[0])
  numbers = [view_numbers(seed, np.asarray(epoch), views) for epoch, _ in places]
  joined = np.concatenate(index)
  shown = np.repeat([int(one["view"]) for one in numbers], mine)
  rows = {"index": joined, **read_some(joined, seed, shown)}
  return [
    jax.tree.map(lambda leaf, at=at: leaf[at : at + mine], rows) | one
    for at, one in zip(range(0, mine * steps, mine), numbers, strict=True)
  ]


def _item(
  read_some: Callable[..., dict[str, Any]], index: np.ndarray, numbers: dict[str, np.ndarray]
) -> dict[str, Any]:
  """An item of these rows of one view."""
  shown = np.full(len(index), int(numbers["view"]))
  return {"index": index, **read_some(index, int(numbers["data_seed"]), shown), **numbers}


def _stream(
  fetch: Callable[[int], list[PyTree]], step: int, steps: int, prefetch: int, workers: int
) -> Iterator[PyTree]:
  """The items of all steps from ``step`` on, read ahead by Grain in pieces of so many steps."""
  import grain  # a second to import, and only streams need it

  # Of step numbers, not of examples: an item is one whole batch, and any step can be the first.
  pieces = grain.MapDataset.range(step, np.iinfo(np.int32).max - steps, steps).map(fetch)
  stream = pieces.to_iter_dataset(grain.ReadOptions(prefetch, prefetch))
  if workers:
    _parse_flags()
    stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
  return itertools.chain.from_iterable(iter(stream))


def record_files(paths: Sequence[str]) -> Any:
  """Random access to the records of ArrayRecord files, one after another, by Grain's threads.

  Args:
    paths: the files.

  Returns:
    ``len(records)`` and ``records.__getitems__(numbers)`` -> bytes.
  """
  _extras.need("data.record_files", "grain", "array_record")
  import grain

  _parse_flags()
  return grain.sources.ArrayRecordDataSource(list(paths))


def _parse_flags() -> None:
  from absl import flags

  if not flags.FLAGS.is_parsed():  # Grain reads its flags, which a plain script never parses
    flags.FLAGS.mark_as_parsed()


def iterated(
  open: Callable[[int], Iterable[Mapping[str, Any]]],
  fields: Fields = IMAGES,
  *,
  size: int,
  batch_size: int,
  data_seed: int,
  augmentation: Augmentation = identity,
  views: int | None = None,
  normalize: Normalize = None,
  name: str = "stream",
) -> Source:
  """Batches of a stream that can only be iterated, in the stream's own order.

  To go on from a step, the stream is opened at that step's epoch and read up to the step: a resumed
  run waits for the rows that it skips, though none is made an array. Rows are read by whoever asks
  for them, not ahead: a stream that is slow to read should read ahead itself. A resumed run is
  exact where ``open`` gives the same rows for the same epoch.

  Args:
    open: ``epoch -> iterable of dicts``, anew at every call, e.g. ``lambda epoch: rows``; where
      Hugging Face shuffles a stream, ``lambda epoch: rows.set_epoch(epoch) or rows``.
    fields: what of a row is the input, and what the label; ``num_classes`` unless there are names
      or no labels. Its transform makes, in each process, only that one's rows of a batch.
    size: how many rows an epoch has. Rows beyond it are not shown.
    batch_size: B, at most ``size``.
    data_seed: decides what views show; the order is the stream's own.
    augmentation: applied on the device to the inputs as read.
    views: V, so that epoch e shows view e mod V; None for a new view in every epoch. A batch's
      ``index`` is a row's place in its epoch, so a view comes back only where every epoch has the
      same order.
    normalize: what ``cut`` does last: a function of the inputs, (mean, std) by channel, or None,
      which scales uint8 to 0 .. 1.
    name: for reports.

  Returns:
    The source; the first row has been read once, to see what it holds.

  Raises:
    TypeError: ``open`` does not take an epoch, or gives no iterable of dicts.
    ValueError: a number is out of range, a row does not fit, or ``open`` gives an iterator that it
      gave before.
    RuntimeError: an epoch ended before its last batch; when that is asked for.

  >>> rows = [{"image": [float(row)], "label": row % 2} for row in range(5)]
  >>> fields = Fields(num_classes=2)
  >>> source = iterated(lambda epoch: rows, fields, size=5, batch_size=2, data_seed=0)
  >>> source.items(1, 2)["inputs"][..., 0].tolist()
  [[2.0, 3.0], [0.0, 1.0]]
  """
  # Opened once to look at a row, and once more where it is an iterator: one that is the same
  # object would be empty in the second epoch, hours from here.
  again = _opened(open, 0, name)
  if isinstance(again, Iterator) and _opened(open, 0, name) is again:
    raise ValueError(
      f"open of {name!r} gives the same iterator at every call, which is used up after one epoch: "
      "make a new one at every call, e.g. open=lambda epoch: read_rows()."
    )
  _check.whole("size", size)
  _check.whole("batch_size", batch_size, least=None)
  begun = list(itertools.islice(again, 1))
  reader = told_by(begun, row_reader(again, fields, name))
  first = reader.stack(begun)
  check_classes("iterated", reader, first["labels"])
  views = view_count(augmentation, views)

  def epoch_items(epoch: int, done: int, seed: int, batch: int, part: Part) -> Iterator[PyTree]:
    rows = iter(_opened(open, epoch, name))
    # What a resumed run has seen already is read past, and no array is made of it.
    seen = sum(1 for _ in itertools.islice(rows, done * batch))
    for begin in range(done * batch, size - batch + 1, batch):
      low = begin + part[0] * batch // part[1]
      index = np.arange(low, low + batch // part[1], dtype=np.int32)
      mine = []
      # Every process reads all of a batch, so that all notice where an epoch is too short.
      for row in itertools.islice(rows, batch):
        if index[0] <= seen <= index[-1]:
          mine.append(row)
        seen += 1
      if seen < begin + batch:
        raise RuntimeError(
          f"Epoch {epoch} of {name!r} ended after {seen} rows, but size={size} and batches of "
          f"{batch} need {size // batch * batch}: set size to what an epoch has, and let open "
          "start anew at every call."
        )
      yield {
        "index": index,
        **reader.stack(mine, index),
        "labelled": np.full(index.shape, float(reader.has_labels), np.float32),
        **view_numbers(seed, np.asarray(epoch), views),
      }

  def start(seed: int, batch: int, part: Part, step: int) -> Iterator[PyTree]:
    epoch, done = divmod(step, size // batch)
    while True:
      yield from epoch_items(epoch, done, seed, batch, part)
      epoch, done = epoch + 1, 0

  finish = normalizer(normalize)
  cut, stored = cutter(augmentation, finish, reader.ignore), example_shapes(first["inputs"], name)
  return Source(
    shared=None,
    cut=cut,
    read=resumable(start),
    size=size,
    batch_size=batch_size,
    data_seed=data_seed,
    num_classes=reader.num_classes,
    normalize=finish,
    stored=stored,
    views=views,
    name=name,
    augmentation=augmentation.name,
    shown=functools.partial(shown_by, cut, {**first, "labelled": np.ones(1, np.float32)}),
    has_labels=reader.has_labels,
  )


def _opened(open: Any, epoch: int, name: str) -> Any:
  """What ``open`` gives for an epoch, checked."""
  if not callable(open):
    raise TypeError(
      f"open of {name!r} must be a function of the epoch that starts anew, e.g. "
      f"open=lambda epoch: rows, got {type(open).__name__}."
    )
  try:
    inspect.signature(open).bind(epoch)
  except TypeError as error:
    raise TypeError(
      f"open of {name!r} must take one argument, the epoch's number ({error}): "
      "open=lambda epoch: rows."
    ) from error
  except ValueError:
    pass  # builtins without a signature
  rows = open(epoch)
  if isinstance(rows, Mapping | str | bytes) or not isinstance(rows, Iterable):
    raise TypeError(
      f"open({epoch}) of {name!r} must give an iterable of dicts, got {type(rows).__name__}."
    )
  return rows
