"""Examples of a data set before they are batches: arrays in memory, or records on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__ = ["Examples", "Records", "from_arrays"]


@dataclasses.dataclass(frozen=True)
class Examples:
  """A split in memory, as stored: not normalised, not augmented.

  Attributes:
    inputs: ``[N, ...]``: uint8 images, floats, or bytes (an object array) for text.
    labels: ``[N]`` int32; zeros where the set has none.
    ids: ``[N]`` strings, unique within the set.
    num_classes: K; labels are 0 .. K-1. 0 where the set has no labels.
    name: of the data set, for reports.
    version: of the data set, for reports.
    split: TFDS's words for the part that was read.
    label_names: what the classes are called; empty where nobody said.
  """

  inputs: np.ndarray
  labels: np.ndarray
  ids: np.ndarray
  num_classes: int
  name: str
  version: str = ""
  split: str = ""
  label_names: tuple[str, ...] = ()

  def __len__(self) -> int:
    return len(self.labels)

  def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The inputs and labels of these rows, in this order."""
    return self.inputs[rows], self.labels[rows]


@dataclasses.dataclass(frozen=True)
class Records:
  """A split on disk: random access, decoded when read. For sets that memory does not hold.

  Attributes:
    source: TFDS's data source: ``source.__getitems__(rows)`` gives dicts of features.
    inputs: the feature that is the input.
    labels: the feature that is the label, or None.
    num_classes: K; 0 where the set has no labels.
    transform: applied to each input when it is read, and must give one shape for all.
    name: of the data set, for reports.
    version: of the data set, for reports.
    split: TFDS's words for the part that was read.
    label_names: what the classes are called.
  """

  source: Any  # not Sequence: whoever checks the type would read a record
  inputs: str
  labels: str | None
  num_classes: int
  name: str
  version: str = ""
  split: str = ""
  label_names: tuple[str, ...] = ()
  transform: Callable[[Any], Any] | None = None

  def __len__(self) -> int:
    return len(self.source)

  def features(self, rows: np.ndarray) -> list[dict[str, Any]]:
    """The decoded features of these rows, one dict each."""
    problem = "some of its records are empty"  # so reads a file cut off at a block's border
    try:
      examples = self.source.__getitems__([int(row) for row in rows])
    except (RuntimeError, OSError, IndexError, TypeError, ValueError) as error:
      examples, problem = [], str(error)
    if not examples or any(example[self.inputs] is None for example in examples):
      raise RuntimeError(
        f"Split {self.split!r} of {self.name!r} cannot be read, its files are damaged ({problem}): "
        "delete the prepared data set and prepare it again."
      )
    return examples

  def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The inputs and labels of these rows, in this order."""
    return self.stack(self.features(rows))

  def stack(self, examples: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Decoded features as arrays of inputs and labels."""
    values = [example[self.inputs] for example in examples]
    if self.transform is not None:
      values = [self.transform(value) for value in values]
    shapes = {np.shape(value) for value in values}
    if len(shapes) > 1:
      raise ValueError(
        f"The inputs {self.inputs!r} of {self.name!r} differ in shape ({sorted(shapes)[:3]}, ...): "
        "open them by records(..., transform=...) with a transform that gives them one shape."
      )
    # NumPy would cut trailing zeros off fixed-length byte strings.
    inputs = np.array(values, dtype=object if isinstance(values[0], bytes) else None)
    if self.labels is None:
      return inputs, np.zeros(len(values), np.int32)
    labels = np.array([example[self.labels] for example in examples], np.int32)
    _check_labels(labels, self.num_classes, self.name, self.split)
    return inputs, labels


def _check_labels(labels: np.ndarray, num_classes: int, name: str, split: str = "") -> None:
  """Raises where a label is not one of the classes."""
  wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
  if len(wrong):
    where = f"split {split!r} of {name!r}" if split else repr(name)
    raise ValueError(
      f"labels of {where} must lie in 0 .. {num_classes - 1} (num_classes={num_classes}), but row "
      f"{wrong[0]} of those read has {labels[wrong[0]]}, and {len(wrong)} in all are outside. "
      "TFDS writes -1 where a label is withheld: choose a split that has them, or labels=None."
    )


def from_arrays(
  inputs: Any,
  labels: Any,
  *,
  num_classes: int | None = None,
  ids: Any = None,
  name: str = "arrays",
  split: str = "",
  label_names: Sequence[str] = (),
) -> Examples:
  """Makes `Examples` of a user's own arrays.

  Args:
    inputs: ``[N, ...]``; uint8 images are scaled to 0 .. 1 later, everything else stays.
    labels: ``[N]`` integers, 0 for an example without one (see `data.on_device`'s ``labelled``);
      None where the set has no labels.
    num_classes: K; one more than the largest label by default.
    ids: ``[N]``; the row's number by default.
    name: for reports.
    split: for reports.
    label_names: K names, or none.

  Returns:
    The examples; arrays are not copied where their types fit.

  Raises:
    ValueError: lengths differ, there is no example, or a label is out of range.

  >>> examples = from_arrays(np.zeros((3, 2), np.float32), [0, 2, 1])
  >>> len(examples), examples.num_classes, examples.labels.dtype.name
  (3, 3, 'int32')
  """
  inputs = np.asarray(inputs)
  size = len(inputs) if inputs.ndim else 0
  if size == 0:
    raise ValueError(f"inputs must hold at least one example, got an array of {inputs.shape}.")
  labels = np.zeros(size, np.int32) if labels is None else np.asarray(labels)
  if labels.shape != (size,):
    raise ValueError(f"labels must be of shape ({size},) like inputs, got {labels.shape}.")
  if not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(f"labels must be integers, got {labels.dtype}.")
  num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
  _check_labels(labels, num_classes or 1, name, split)
  ids = np.arange(size).astype(str) if ids is None else np.asarray(ids).astype(str)
  if ids.shape != (size,):
    raise ValueError(f"ids must be of shape ({size},) like inputs, got {ids.shape}.")
  if label_names and len(label_names) != num_classes:
    raise ValueError(f"label_names must be {num_classes} (num_classes), got {len(label_names)}.")
  return Examples(
    inputs=inputs,
    labels=labels.astype(np.int32, copy=False),
    ids=ids,
    num_classes=num_classes,
    name=name,
    split=split,
    label_names=tuple(label_names),
  )
