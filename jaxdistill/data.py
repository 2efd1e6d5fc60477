"""From examples to batches, on the device or streamed by Grain.

A `Source` hands out items (which rows, which view) and one pure function, ``cut``, that makes a
`Batch` of an item inside the compiled program. Sources on the device and streamed ones differ in
where the rows come from and in nothing else, so their batches are equal bit by bit.

What a training script needs beside it can be had from here too: `load` and `splits` by name
(`jaxdistill.tfds_data`), arrays (`jaxdistill.examples`), order and augmentation
(`jaxdistill.views`).
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.examples import Examples, Records, from_arrays
from jaxdistill.tfds_data import Digits, load, records, splits
from jaxdistill.types import Batch, PyTree
from jaxdistill.views import (
  CIFAR,
  DIGITS,
  Augmentation,
  Normalize,
  augment,
  check_seed,
  choice,
  crop,
  crop_flip,
  divide_by,
  epoch_order,
  identity,
  normalizer,
)

__all__ = [
  "CIFAR",
  "DIGITS",
  "Augmentation",
  "Digits",
  "Examples",
  "Normalize",
  "Records",
  "Source",
  "choice",
  "crop",
  "crop_flip",
  "divide_by",
  "epoch_order",
  "evaluation_batches",
  "from_arrays",
  "identity",
  "load",
  "normalizer",
  "on_device",
  "records",
  "splits",
  "streamed",
]

# For streams, where several threads ask for the same epoch.
_remembered_order = functools.lru_cache(maxsize=4)(epoch_order)


@dataclasses.dataclass(frozen=True)
class Source:
  """Where training batches come from, from the first step to the last.

  Batches are never padded: an epoch has ``size // batch_size`` steps, and what is left over at its
  end is not shown in that epoch. Another seed is ``dataclasses.replace(source, data_seed=...)``,
  which shares the arrays and the function: the items of several seeds may be stacked and cut under
  ``vmap``, since an item carries its seed.

  Attributes:
    shared: arrays on the device, an argument of the compiled program; None for streams.
    cut: ``(shared, item) -> Batch``: pure; augments and normalises.
    read: ``(data_seed, step, count) -> items``; call `items` instead.
    size: the number of examples.
    batch_size: B.
    data_seed: decides order and views.
    num_classes: K.
    views: V; epoch e shows view e mod V of every example. None: every epoch shows a new one.
    name: of the data, for reports.
  """

  shared: PyTree
  cut: Callable[[PyTree, PyTree], Batch]
  read: Callable[[int, int, int], PyTree]
  size: int
  batch_size: int
  data_seed: int
  num_classes: int
  views: int | None = None
  name: str = "data"

  def __post_init__(self) -> None:
    check_seed(self.data_seed)
    if not 1 <= self.batch_size <= self.size:
      raise ValueError(
        f"batch_size={self.batch_size} must lie in 1 .. {self.size}, the size of {self.name!r}: "
        "training batches are never padded."
      )
    if self.views is not None and self.views < 1:
      raise ValueError(f"views must be at least 1, or None, got {self.views}.")

  @property
  def steps_per_epoch(self) -> int:
    """How many whole batches an epoch has."""
    return self.size // self.batch_size

  def items(self, step: int, count: int) -> PyTree:
    """What steps ``step .. step+count-1`` need, stacked: leaves ``[count, ...]``.

    Any step may be asked for, and ``count`` may cross the end of an epoch. Streams are fast where
    every call goes on from the last.
    """
    if step < 0 or count < 1:
      raise ValueError(f"items needs step >= 0 and count >= 1, got {step} and {count}.")
    return self.read(self.data_seed, step, count)


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
    examples: from `load` or `from_arrays`.
    batch_size: B, at most the number of examples.
    data_seed: decides order and views, ``0 .. 2**32 - 1``.
    augmentation: applied to the inputs as stored.
    views: V, so that epoch e shows view e mod V; None for a new view in every epoch.
    normalize: see `normalizer`.
    labelled: ``[N]``, whether an example's label may be used; by default all may (none where the
      set has no labels). A label that may not be used does not reach the batch.

  Returns:
    The source.

  Raises:
    ValueError: ``batch_size``, ``views``, ``data_seed`` or ``labelled`` does not fit.
    TypeError: the inputs cannot lie on a device.

  >>> examples = from_arrays(np.arange(6, dtype=np.float32)[:, None], [0, 1, 0, 1, 0, 1])
  >>> source = on_device(examples, batch_size=2, data_seed=0)
  >>> items = source.items(step=0, count=3)
  >>> batch = source.cut(source.shared, jax.tree.map(lambda leaf: leaf[1], items))
  >>> source.steps_per_epoch, items["index"].shape, batch.inputs.shape
  (3, (3, 2), (2, 1))
  """
  if not isinstance(examples, Examples) or examples.inputs.dtype == object:
    raise TypeError(
      "on_device needs Examples with numeric inputs (from load or from_arrays), got "
      f"{type(examples).__name__} {getattr(getattr(examples, 'inputs', None), 'dtype', '')}: "
      "use streamed for Records, and tokenize text first."
    )
  known = _known(examples, labelled)
  steps = len(examples) // batch_size if batch_size > 0 else 0
  latest: dict[int, tuple[int, np.ndarray]] = {}

  def order(seed: int, epoch: int) -> np.ndarray:
    if seed not in latest or latest[seed][0] != epoch:
      latest[seed] = epoch, epoch_order(seed, epoch, len(examples))
    return latest[seed][1]

  def read(seed: int, step: int, count: int) -> PyTree:
    numbers = np.arange(step, step + count)
    rows = [_rows(order(seed, n // steps), n % steps, batch_size) for n in numbers.tolist()]
    return {"index": np.stack(rows), **_numbers(seed, numbers // steps, views)}

  return Source(
    shared={
      "inputs": jnp.asarray(examples.inputs),
      "labels": jnp.asarray(np.where(known > 0, examples.labels, 0)),
      "labelled": jnp.asarray(known),
    },
    cut=_cutter(augmentation, normalize),
    read=read,
    size=len(examples),
    batch_size=batch_size,
    data_seed=data_seed,
    num_classes=examples.num_classes,
    views=views,
    name=examples.name,
  )


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
    views: V, so that epoch e shows view e mod V; None for a new view in every epoch.
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
  """
  if prefetch < 1 or workers < 0:
    raise ValueError(f"prefetch must be >= 1 and workers >= 0, got {prefetch} and {workers}.")
  fetch = functools.partial(_fetch, examples, _known(examples, labelled), batch_size, views)
  open_streams: dict[int, tuple[int, Iterator[PyTree]]] = {}

  def read(seed: int, step: int, count: int) -> PyTree:
    at, stream = open_streams.pop(seed, (-1, iter(())))
    if at != step:
      stream = _stream(functools.partial(fetch, seed), step, prefetch, workers)
    pieces = [next(stream) for _ in range(count)]
    open_streams[seed] = step + count, stream
    return jax.tree.map(lambda *leaves: np.stack(leaves), *pieces)

  # Also at exit: Grain's threads and processes must end before the modules that end them.
  weakref.finalize(read, open_streams.clear)
  return Source(
    shared=None,
    cut=_cutter(augmentation, normalize),
    read=read,
    size=len(examples),
    batch_size=batch_size,
    data_seed=data_seed,
    num_classes=examples.num_classes,
    views=views,
    name=examples.name,
  )


def evaluation_batches(
  examples: Examples, *, batch_size: int, normalize: Normalize = None, labelled: Any = None
) -> Batch:
  """All examples as stacked batches ``[N, B, ...]`` in their own order, the last one padded.

  A padded row repeats row 0 with label 0, ``weight`` 0 and ``labelled`` 0, so that it counts for
  nothing and is still an input that a network can take.

  Args:
    examples: from `load` or `from_arrays`.
    batch_size: B; may exceed the number of examples.
    normalize: see `normalizer`.
    labelled: ``[N]``, as in `on_device`.

  Returns:
    A `Batch` whose leaves have the axes ``[N, B]`` first: scan over N, or index it.

  Raises:
    ValueError: ``batch_size`` or ``labelled`` does not fit.

  >>> examples = from_arrays(np.ones((3, 1), np.float32), [0, 1, 1])
  >>> batches = evaluation_batches(examples, batch_size=2)
  >>> batches.weight.tolist(), batches.labels.tolist()
  ([[1.0, 1.0], [1.0, 0.0]], [[0, 1], [1, 0]])
  """
  if batch_size < 1:
    raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
  known = _known(examples, labelled)
  size = len(examples)
  count = -(-size // batch_size)
  rows = np.arange(count * batch_size, dtype=np.int32)
  real = rows < size
  rows = np.where(real, rows, 0).astype(np.int32)
  inputs = jax.jit(normalizer(normalize))(jnp.asarray(examples.inputs[rows]))

  def batched(leaf: Any) -> Array:
    return jnp.reshape(jnp.asarray(leaf), (count, batch_size, *leaf.shape[1:]))

  return Batch(
    inputs=jax.tree.map(batched, inputs),
    labels=batched(np.where(real & (known[rows] > 0), examples.labels[rows], 0)),
    weight=batched(real.astype(np.float32)),
    labelled=batched(np.where(real, known[rows], np.float32(0))),
    index=batched(rows),
    view=batched(np.zeros_like(rows)),
  )


def _cutter(augmentation: Augmentation, normalize: Normalize) -> Callable[[PyTree, PyTree], Batch]:
  """The ``cut`` of a source: the same for every kind, so that their bits are the same."""
  finish = normalizer(normalize)

  def cut(shared: PyTree, item: Mapping[str, Any]) -> Batch:
    index = item["index"]
    rows = (
      item if shared is None else {k: jnp.take(v, index, 0, mode="clip") for k, v in shared.items()}
    )
    inputs = augment(augmentation, rows["inputs"], item["data_seed"], index, item["view"])
    return Batch(
      inputs=finish(inputs),
      labels=rows["labels"],
      weight=jnp.ones(index.shape, jnp.float32),
      labelled=rows["labelled"],
      index=index,
      view=jnp.broadcast_to(item["view"], index.shape),
    )

  return cut


def _rows(order: np.ndarray, step: int, batch_size: int) -> np.ndarray:
  """The rows of one step of an epoch."""
  return order[step * batch_size : (step + 1) * batch_size]


def _numbers(seed: int, epochs: np.ndarray, views: int | None) -> dict[str, np.ndarray]:
  """The part of an item that has no batch axis: the view and the seed."""
  view = epochs if views is None else epochs % views
  return {"view": np.asarray(view, np.int32), "data_seed": np.full(view.shape, seed, np.uint32)}


def _fetch(
  examples: Examples | Records,
  known: np.ndarray,
  batch_size: int,
  views: int | None,
  seed: int,
  step: int,
) -> dict[str, np.ndarray]:
  """The item of one step of a stream. NumPy only: it runs in threads and in other processes."""
  epoch, first = divmod(step, len(examples) // batch_size)
  index = _rows(_remembered_order(seed, epoch, len(examples)), first, batch_size)
  inputs, labels = examples.read(index)
  return {
    "index": index,
    "inputs": inputs,
    "labels": np.where(known[index] > 0, labels, 0).astype(np.int32),
    "labelled": known[index],
    **_numbers(seed, np.asarray(epoch), views),
  }


def _stream(
  fetch: Callable[[int], PyTree], step: int, prefetch: int, workers: int
) -> Iterator[PyTree]:
  """The items of all steps from ``step`` on, read ahead by Grain."""
  import grain  # a second to import, and only streams need it

  steps = grain.MapDataset.range(step, np.iinfo(np.int32).max).map(fetch)
  stream = steps.to_iter_dataset(grain.ReadOptions(prefetch, prefetch))
  if workers:
    from absl import flags

    if not flags.FLAGS.is_parsed():  # Grain reads its flags, which a plain script never parses
      flags.FLAGS.mark_as_parsed()
    stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
  return iter(stream)


def _known(examples: Examples | Records, labelled: Any) -> np.ndarray:
  """The mask of labels that may be used, ``[N]`` float32."""
  if labelled is None:
    return np.full(len(examples), float(examples.num_classes > 0), np.float32)
  mask = np.asarray(labelled)
  if mask.shape != (len(examples),) or not np.isin(mask, (0, 1)).all():
    raise ValueError(
      f"labelled must be {len(examples)} zeros and ones, one for each example of "
      f"{examples.name!r}, got {mask.dtype} of shape {mask.shape}."
    )
  if examples.num_classes == 0 and mask.any():
    raise ValueError(f"labelled must be all 0: {examples.name!r} has no labels.")
  return mask.astype(np.float32)
