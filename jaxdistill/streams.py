"""Batches that are read as they are needed: through Grain, or from any stream that can resume."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxdistill import arguments
from jaxdistill.examples import Examples, Records
from jaxdistill.labels import label_mask
from jaxdistill.sources import (
  Part,
  Source,
  Whole,
  cutter,
  example_shapes,
  index_and_view,
  rows_of,
  rows_padded,
  view_count,
  view_numbers,
)
from jaxdistill.types import PyTree
from jaxdistill.views import Augmentation, Normalize, epoch_order, identity, normalizer

__all__ = ["record_files", "resumable", "streamed"]

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
  prefetch: int = 4,
  workers: int = 0,
) -> Source:
  """Reads batches through Grain; an item carries the rows themselves.

  Args:
    examples: arrays, or `Records` for what memory does not hold.
    batch_size: B, at most the number of examples.
    data_seed: decides order and views, ``0 .. 2**32 - 1``.
    augmentation: applied on the device to the inputs as read.
    views: V, as in `on_device`.
    normalize: see `normalizer`.
    labelled: ``[N]``, whether an example's label may be used, as in `on_device`.
    prefetch: how many batches are read ahead, by as many threads.
    workers: processes that read, for `Records` whose decoding keeps one core busy; each starts
      Python anew, so a script needs its ``if __name__ == "__main__"``. 0 reads in this one.

  Returns:
    The source; the same batches in the same order as `on_device`.

  Raises:
    ValueError: ``batch_size``, ``views``, ``data_seed``, ``labelled``, ``prefetch`` or ``workers``
      does not fit.
    TypeError: the inputs are text, which no device takes.
  """
  arguments.whole("prefetch", prefetch)
  arguments.whole("workers", workers, least=0)
  if not isinstance(examples, Examples | Records):
    raise TypeError(
      f"streamed needs Examples or Records (from load, from_arrays, from_sequence), got "
      f"{arguments.show(examples)}."
    )
  views = view_count(augmentation, views)
  known = label_mask(examples, labelled)
  fetch = functools.partial(_fetch, examples, known, views)

  def every(seed: int, batch: int, view: int) -> Iterator[PyTree]:
    for index in rows_padded(len(examples), batch):
      yield _item(examples, known, index, view_numbers(seed, np.asarray(view), None))

  def start(seed: int, batch: int, part: Part, step: int) -> Iterator[PyTree]:
    return _stream(functools.partial(fetch, seed, batch, part), step, prefetch, workers)

  finish = normalizer(normalize)
  return Source(
    shared=None,
    cut=cutter(augmentation, finish),
    read=resumable(start),
    size=len(examples),
    batch_size=batch_size,
    data_seed=data_seed,
    num_classes=examples.num_classes,
    normalize=finish,
    stored=example_shapes(examples.read(np.arange(1))[0], examples.name),
    views=views,
    name=examples.name,
    version=examples.version,
    augmentation=augmentation.name,
    whole=Whole(len(examples), every, index_and_view, functools.partial(_ids, examples)),
  )


def resumable(
  start: Callable[[int, int, Part, int], Iterator[PyTree]],
) -> Callable[[int, int, int, int, Part], PyTree]:
  """A `Source`'s ``read`` of streams that ``start(data_seed, batch_size, part, step)`` opens."""
  open_streams: dict[Any, tuple[int, Iterator[PyTree]]] = {}

  def read(seed: int, batch: int, step: int, count: int, part: Part) -> PyTree:
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
  examples: Examples | Records,
  known: np.ndarray,
  views: int | None,
  seed: int,
  batch_size: int,
  part: Part,
  step: int,
) -> dict[str, Any]:
  """The item of one step of a stream. NumPy only: it runs in threads and in other processes."""
  epoch, first = divmod(step, len(examples) // batch_size)
  index = rows_of(_remembered_order(seed, epoch, len(examples)), first, batch_size, part)
  return _item(examples, known, index, view_numbers(seed, np.asarray(epoch), views))


def _item(
  examples: Examples | Records, known: np.ndarray, index: np.ndarray, numbers: dict[str, np.ndarray]
) -> dict[str, Any]:
  inputs, labels = examples.read(index)
  return {
    "index": index,
    "inputs": inputs,
    "labels": np.where(known[index] > 0, labels, 0).astype(np.int32),
    "labelled": known[index],
    **numbers,
  }


def _ids(examples: Examples | Records) -> list[str]:
  """The ids of all examples; of records they are read when somebody asks."""
  return examples.ids.tolist() if isinstance(examples, Examples) else examples.read_ids()


def _stream(
  fetch: Callable[[int], PyTree], step: int, prefetch: int, workers: int
) -> Iterator[PyTree]:
  """The items of all steps from ``step`` on, read ahead by Grain."""
  import grain  # a second to import, and only streams need it

  steps = grain.MapDataset.range(step, np.iinfo(np.int32).max).map(fetch)
  stream = steps.to_iter_dataset(grain.ReadOptions(prefetch, prefetch))
  if workers:
    _parse_flags()
    stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
  return iter(stream)


def record_files(paths: Sequence[str]) -> Any:
  """Random access to the records of ArrayRecord files, one after another, by Grain's threads.

  Args:
    paths: the files.

  Returns:
    ``len(records)`` and ``records.__getitems__(numbers)`` -> bytes.
  """
  import grain

  _parse_flags()
  return grain.sources.ArrayRecordDataSource(list(paths))


def _parse_flags() -> None:
  from absl import flags

  if not flags.FLAGS.is_parsed():  # Grain reads its flags, which a plain script never parses
    flags.FLAGS.mark_as_parsed()
