"""All examples of a split once, in their own order: as one `Batch`, or batch by batch.

What fits lies on the device, normalised. What does not (pictures as bytes in memory, records that
are read) stays as it is stored until its batch is asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from jaxdistill import _check, _extras
from jaxdistill._compile import brief, quarter
from jaxdistill.data._examples import Examples, Records, label_mask, labels_count
from jaxdistill.data._sources import (
  check_in_memory,
  counted_labels,
  example_shapes,
  read_rows,
)
from jaxdistill.data._views import Arithmetic, Normalize, normalizer
from jaxdistill.types import Batch, Outputs, PyTree

__all__ = ["Batches", "evaluation_batches", "made_ahead"]

Made = TypeVar("Made")

# How many batches are made before they are asked for, by as many threads.
_AHEAD = 2


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
  """The batches of a split, made one by one: what evaluation takes of more than the device holds.

  Attributes:
    count: N, how many there are.
    make: ``number -> Batch``, leaves ``[B, ...]`` on the host; the same whenever it is called.
    has_labels: whether any example may have a label that counts.
    teacher: a teacher's outputs ``[N, B, ...]`` on the host, which the batches then bring along.
  """

  count: int
  make: Callable[[int], Batch]
  has_labels: bool = True
  teacher: Outputs | None = None

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, number: int) -> Batch:
    """One batch, from 0 on."""
    if not 0 <= number < self.count:
      raise IndexError(f"number={number} must lie in 0 .. {self.count - 1}.")
    batch = self.make(int(number))
    if self.teacher is None:
      return batch
    said = jax.tree.map(lambda leaf: leaf[number], self.teacher)
    return dataclasses.replace(batch, teacher=said)

  def __iter__(self) -> Iterator[Batch]:
    """All batches in their order; a few are made ahead, and no more are in memory."""
    return self.some(range(self.count))

  def some(self, numbers: Sequence[int]) -> Iterator[Batch]:
    """Batches by number, in this order, as a process of several takes its share of them.

    Args:
      numbers: each from 0 on; a few are made ahead.
    """
    _extras.need("data.evaluation_batches of what is streamed", "grain")
    return made_ahead(self.__getitem__, numbers)


def made_ahead(make: Callable[[int], Made], numbers: Sequence[int]) -> Iterator[Made]:
  """What ``make`` makes of these numbers, in their order, two of them ahead by Grain's threads."""
  import grain  # a second to import, and only streams need it

  made = grain.MapDataset.source(numbers).map(make)
  return iter(made.to_iter_dataset(grain.ReadOptions(_AHEAD, _AHEAD)))


def evaluation_batches(
  examples: Examples | Records,
  *,
  batch_size: int,
  normalize: Normalize = None,
  labelled: Any = None,
  most: int | None = None,
) -> Batch | Batches:
  """All examples in batches in their own order, the last one padded.

  A padded row repeats row 0 with label 0, ``weight`` 0 and ``labelled`` 0, so that it counts for
  nothing and is still an input that a network can take.

  Examples in memory become one `Batch` on the device, if it holds them; what is larger, and records
  (`from_sequence`, `records`), are `Batches` that are made as they are asked for: bytes stay bytes
  until then. What is evaluated takes either, and the numbers are the same.

  Args:
    examples: from `load`, `from_arrays` or `from_dicts`; or records.
    batch_size: B; may exceed the number of examples.
    normalize: of the inputs: a function, (mean, std) by channel, or None, which scales uint8 to
      0 .. 1.
    labelled: ``[N]``, whether an example's label may be used, or the leading axes of the labels; by
      default all may (none where the set has no labels).
    most: bytes that may lie on the device; by default a quarter of its memory.

  Returns:
    A `Batch` whose leaves have the axes ``[N, B]`` first: scan over N, or index it; or `Batches`.

  Raises:
    ValueError: ``batch_size``, ``labelled`` or ``most`` does not fit.
    TypeError: the inputs cannot lie on a device.

  >>> from jaxdistill.data import from_arrays
  >>> examples = from_arrays(np.ones((3, 1), np.float32), [0, 1, 1])
  >>> batches = evaluation_batches(examples, batch_size=2)
  >>> batches.weight.tolist(), batches.labels.tolist()
  ([[1.0, 1.0], [1.0, 0.0]], [[0, 1], [1, 0]])
  >>> evaluation_batches(examples, batch_size=2, most=0)[1].weight.tolist()
  [1.0, 0.0]
  """
  _check.whole("batch_size", batch_size)
  if most is not None:
    _check.whole("most", most, least=0)
  if not isinstance(examples, Records):
    check_in_memory("evaluation_batches", examples)
  known = label_mask(examples, labelled)
  finish = _finisher(normalizer(normalize))
  count = -(-len(examples) // batch_size)

  def make(number: int) -> Batch:
    return _batch(examples, known, finish, np.arange(batch_size) + number * batch_size)

  made = Batches(count, make, has_labels=labels_count(examples, known))
  first = read_rows(examples, known, np.arange(1))
  example_shapes(first["inputs"], examples.name)  # says of text that no device takes it
  if isinstance(examples, Records):
    return made
  shown = jax.eval_shape(finish, first["inputs"])
  each = [*jax.tree.leaves(shown), *jax.tree.leaves({**first, "inputs": ()})]
  needed = count * batch_size * sum(math.prod(x.shape) * x.dtype.itemsize for x in each)
  if needed > (quarter("device") if most is None else most):
    return made
  return jax.device_put(jax.tree.map(lambda *x: np.stack(x), *map(make, range(count))))


def _batch(
  examples: Examples | Records,
  known: np.ndarray,
  finish: Callable[[PyTree], PyTree],
  rows: np.ndarray,
) -> Batch:
  """These rows on the host; those that are not there repeat row 0, and count for nothing."""
  real = rows < len(examples)
  # A row of zeros may be NaN behind a user's normalisation.
  rows = np.where(real, rows, 0).astype(np.int32)

  def of_real(leaf: np.ndarray) -> np.ndarray:
    return np.where(np.expand_dims(real, tuple(range(1, leaf.ndim))), leaf, leaf.dtype.type(0))

  used = read_rows(examples, known, rows)
  labels, labelled = counted_labels(used["labels"], used["labelled"], examples.ignore)
  return Batch(
    inputs=jax.device_get(finish(used["inputs"])),
    labels=of_real(labels),
    weight=of_real(used.get("weight", np.ones(len(rows), np.float32))),
    labelled=of_real(labelled),
    index=rows,
    view=np.zeros_like(rows),
  )


@functools.lru_cache(32)
def _finisher(finish: Callable[[Any], Any]) -> Callable[[PyTree], PyTree]:
  """A normalisation of a batch, compiled once for all splits that are shown in such batches."""
  if isinstance(finish, Arithmetic):
    return finish
  made: Callable[[PyTree], PyTree] = jax.jit(finish, compiler_options=brief())
  return made
