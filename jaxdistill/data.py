"""From examples to batches: the one door to data sets, sources, order and augmentation.

- `load` and `splits` by name (`jaxdistill.tfds_data`), `from_arrays`, `from_dicts`,
  `from_sequence` of one's own: examples.
- `on_device` (`jaxdistill.sources`), `streamed` (`jaxdistill.streams`), `mixed`
  (`jaxdistill.mixtures`), and here `iterated`: sources of training batches. `evaluation_batches`:
  all examples, once.
- `some_labels` (`jaxdistill.labels`): which labels may be used.
- `crop_flip`, `normalizer` and the like (`jaxdistill.views`): what a batch shows of an example.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxdistill import arguments
from jaxdistill.capacity import by_work
from jaxdistill.dicts import check_classes, from_dicts, from_sequence, row_reader
from jaxdistill.examples import Examples, Records, from_arrays
from jaxdistill.labels import label_mask, some_labels
from jaxdistill.mixtures import mixed
from jaxdistill.sources import (
  Part,
  Source,
  check_in_memory,
  cutter,
  example_shapes,
  on_device,
  view_count,
  view_numbers,
)
from jaxdistill.streams import resumable, streamed
from jaxdistill.types import Batch, PyTree
from jaxdistill.views import (
  CIFAR,
  DIGITS,
  Augmentation,
  Normalize,
  augment,
  choice,
  crop,
  crop_flip,
  divide_by,
  epoch_order,
  identity,
  normalizer,
)

if TYPE_CHECKING:
  from jaxdistill.tfds_data import Digits, load, records, splits

__all__ = [
  "CIFAR",
  "DIGITS",
  "Augmentation",
  "Digits",
  "Examples",
  "Normalize",
  "Records",
  "Source",
  "augment",
  "choice",
  "crop",
  "crop_flip",
  "divide_by",
  "epoch_order",
  "evaluation_batches",
  "from_arrays",
  "from_dicts",
  "from_sequence",
  "identity",
  "iterated",
  "load",
  "mixed",
  "normalizer",
  "on_device",
  "records",
  "some_labels",
  "splits",
  "streamed",
]


def __getattr__(name: str) -> Any:
  # TFDS takes a quarter of a second to import, and data of one's own does without it.
  if name not in ("Digits", "load", "records", "splits"):
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  from jaxdistill import tfds_data

  return getattr(tfds_data, name)


def evaluation_batches(
  examples: Examples, *, batch_size: int, normalize: Normalize = None, labelled: Any = None
) -> Batch:
  """All examples as stacked batches ``[N, B, ...]`` in their own order, the last one padded.

  A padded row repeats row 0 with label 0, ``weight`` 0 and ``labelled`` 0, so that it counts for
  nothing and is still an input that a network can take.

  Args:
    examples: from `load`, `from_arrays` or `from_dicts`.
    batch_size: B; may exceed the number of examples.
    normalize: see `normalizer`.
    labelled: ``[N]``, as in `on_device`.

  Returns:
    A `Batch` whose leaves have the axes ``[N, B]`` first: scan over N, or index it.

  Raises:
    ValueError: ``batch_size`` or ``labelled`` does not fit.
    TypeError: the inputs cannot lie on a device.

  >>> examples = from_arrays(np.ones((3, 1), np.float32), [0, 1, 1])
  >>> batches = evaluation_batches(examples, batch_size=2)
  >>> batches.weight.tolist(), batches.labels.tolist()
  ([[1.0, 1.0], [1.0, 0.0]], [[0, 1], [1, 0]])
  """
  arguments.whole("batch_size", batch_size)
  check_in_memory("evaluation_batches", examples)
  known = label_mask(examples, labelled)
  size = len(examples)
  count = -(-size // batch_size)
  rows = np.arange(count * batch_size, dtype=np.int32)
  real = rows < size
  rows = np.where(real, rows, 0).astype(np.int32)
  stored = jax.tree.map(lambda leaf: leaf[rows], examples.inputs)
  finish = normalizer(normalize)

  def batched(leaf: Any) -> Any:
    return leaf.reshape(count, batch_size, *leaf.shape[1:])

  def shown(stored: PyTree) -> PyTree:
    return jax.tree.map(batched, finish(stored))

  rest = {
    "labels": np.where(real & (known[rows] > 0), examples.labels[rows], 0),
    "weight": real.astype(np.float32),
    "labelled": np.where(real, known[rows], np.float32(0)),
    "index": rows,
    "view": np.zeros_like(rows),
  }
  options = by_work(shown, stored, calls=1)
  return Batch(
    inputs=jax.jit(shown, compiler_options=options)(stored),
    **jax.device_put(jax.tree.map(batched, rest)),
  )


def iterated(
  open: Callable[[int], Iterable[Mapping[str, Any]]],
  *,
  size: int,
  batch_size: int,
  data_seed: int,
  inputs: str | tuple[str, ...] = "image",
  labels: str | None = "label",
  transform: Callable[[Any], Any] | None = None,
  num_classes: int | None = None,
  label_names: Sequence[str] = (),
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
    size: how many rows an epoch has. Rows beyond it are not shown.
    batch_size: B, at most ``size``.
    data_seed: decides what views show; the order is the stream's own.
    inputs: as in `from_dicts`.
    labels: as in `from_dicts`.
    transform: as in `from_dicts`; each process makes only its own rows of a batch.
    num_classes: K; may be left out where there are names or no labels.
    label_names: as in `from_dicts`.
    augmentation: applied on the device to the inputs as read.
    views: V, as in `on_device`. A batch's ``index`` is a row's place in its epoch, so a view comes
      back only where every epoch has the same order.
    normalize: see `normalizer`.
    name: for reports.

  Returns:
    The source; the first row has been read once, to see what it holds.

  Raises:
    TypeError: ``open`` does not take an epoch, or gives no iterable of dicts.
    ValueError: a number is out of range, a row does not fit, or ``open`` gives an iterator that it
      gave before.
    RuntimeError: an epoch ended before its last batch; when that is asked for.

  >>> rows = [{"image": [float(row)], "label": row % 2} for row in range(5)]
  >>> source = iterated(lambda epoch: rows, size=5, batch_size=2, data_seed=0, num_classes=2)
  >>> source.items(1, 2)["inputs"][..., 0].tolist()
  [[2.0, 3.0], [0.0, 1.0]]
  """
  again = _opened(open, 0, name)
  if isinstance(again, Iterator) and _opened(open, 0, name) is again:
    raise ValueError(
      f"open of {name!r} gives the same iterator at every call, which is used up after one epoch: "
      "make a new one at every call, e.g. open=lambda epoch: read_rows()."
    )
  arguments.whole("size", size)
  arguments.whole("batch_size", batch_size, least=None)
  reader = row_reader(
    again,
    inputs=inputs,
    labels=labels,
    transform=transform,
    num_classes=num_classes,
    label_names=label_names,
    name=name,
  )
  check_classes("iterated", reader)
  first, _ = reader.stack(itertools.islice(again, 1))
  views = view_count(augmentation, views)

  def start(seed: int, batch: int, part: Part, step: int) -> Iterator[PyTree]:
    epoch, done = divmod(step, size // batch)
    while True:
      rows = iter(_opened(open, epoch, name))
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
        made, numbers = reader.stack(mine, index)
        known = np.full(index.shape, float(labels is not None), np.float32)
        yield {
          "index": index,
          "inputs": made,
          "labels": numbers,
          "labelled": known,
          **view_numbers(seed, np.asarray(epoch), views),
        }
      epoch, done = epoch + 1, 0

  finish = normalizer(normalize)
  return Source(
    shared=None,
    cut=cutter(augmentation, finish),
    read=resumable(start),
    size=size,
    batch_size=batch_size,
    data_seed=data_seed,
    num_classes=reader.num_classes,
    normalize=finish,
    stored=example_shapes(first, name),
    views=views,
    name=name,
    augmentation=augmentation.name,
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
