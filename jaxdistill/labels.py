"""Which labels may be used: masks over the examples of a set."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float32

from jaxdistill import arguments
from jaxdistill.examples import Examples, Records
from jaxdistill.views import epoch_order

__all__ = ["label_mask", "some_labels"]

# In the place of an epoch's number, for the order in which labels are given out.
_LABELS = 0x6C6162656C


def label_mask(examples: Examples | Records, labelled: Any) -> np.ndarray:
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


def some_labels(examples: Examples, share: float, *, data_seed: int) -> Float32[np.ndarray, " N"]:
  """Chooses which labels may be used: a share of them, the classes in proportion.

  Exactly ``round(share * N)`` labels, at least one of each class, and of each class its share of
  them to within one where that leaves every class its one. With one ``data_seed``, a larger share
  contains a smaller one.

  Args:
    examples: with labels.
    share: ``0 .. 1``; 0 leaves no label.
    data_seed: decides which; a number that other sources use may be used here too.

  Returns:
    ``[N]``: 1 where the label may be used, for the argument ``labelled`` of a source.

  Raises:
    TypeError: the labels are not in memory.
    ValueError: ``share`` is out of range or too small for one label of each class, or there are
      no labels.

  >>> from jaxdistill.examples import from_arrays
  >>> examples = from_arrays(np.zeros((8, 1)), [0, 0, 0, 0, 0, 0, 1, 1])
  >>> few = some_labels(examples, 0.5, data_seed=0)
  >>> float(few.sum()), float(few[6:].sum())
  (4.0, 1.0)
  """
  if not isinstance(examples, Examples):
    raise TypeError(
      f"some_labels needs Examples, whose labels are in memory, got {type(examples).__name__}."
    )
  if examples.num_classes == 0:
    raise ValueError(f"{examples.name!r} has no labels to choose from.")
  arguments.number("share", share, least=0, most=1)
  size = len(examples)
  present, count = np.unique(examples.labels), round(share * size)
  if share > 0 and count < len(present):
    raise ValueError(
      f"share={share} of {size} examples is {count} labels, too few for one of each of the "
      f"{len(present)} classes: take a share of at least {_rounded_up(len(present), size)}, or 0."
    )
  order = epoch_order(data_seed, _LABELS, size)
  quantile = np.zeros(size)
  for label in present:
    rows = order[examples.labels[order] == label]
    quantile[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    quantile[rows[0]] = 0.0
  # A prefix of one order for all shares, so that the larger contains the smaller.
  chosen = order[np.argsort(quantile[order], kind="stable")][:count]
  mask = np.zeros(size, np.float32)
  mask[chosen] = 1
  return mask


def _rounded_up(count: int, size: int) -> float:
  """The least share of a few digits that still makes ``count`` of ``size``."""
  share = float(np.ceil(count / size * 1e6) / 1e6)
  return share if round(share * size) >= count else count / size
