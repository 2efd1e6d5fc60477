"""Data sets that give rows as dicts: Hugging Face's, a list, a generator, a class of one's own.

No such library is imported here: rows are iterated, or asked for by number, and nothing more.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill import arguments
from jaxdistill.examples import Examples, Records, from_arrays

__all__ = ["check_classes", "from_dicts", "from_sequence", "row_reader"]


def from_dicts(
  rows: Any,
  *,
  inputs: str | tuple[str, ...] = "image",
  labels: str | None = "label",
  transform: Callable[[Any], Any] | None = None,
  num_classes: int | None = None,
  label_names: Sequence[str] = (),
  name: str = "rows",
  limit: int | None = None,
) -> Examples:
  """Reads rows that are dicts into memory: all of them, once.

  Values are whatever `numpy.asarray` takes: pictures of PIL (grey ones become ``[H, W, 1]``),
  lists, arrays of NumPy, JAX or torch.

  Args:
    rows: any iterable of dicts: a split of Hugging Face's ``datasets``, a list, a generator.
    inputs: the key of the input, or a tuple of keys, for a dict of inputs.
    labels: the key of the label, an integer or one of ``label_names``; None without labels.
    transform: makes the inputs (an array or a dict of arrays) of a whole row; ``inputs`` is not
      looked at then.
    num_classes: K; by default as many as there are names, or one more than the largest label.
    label_names: K names; by default those that ``rows.features`` tells, as Hugging Face's do.
    name: for reports.
    limit: how many rows to read at most, for an iterable without an end.

  Returns:
    The examples, in the order in which the rows came.

  Raises:
    TypeError: ``rows`` is no iterable of dicts.
    ValueError: there is no row, a key is missing, shapes differ, an input is text or NaN, or a
      label is text or out of range; the message names the row.

  >>> rows = [{"image": [0.0, 1.0], "label": "cat"}, {"image": [1.0, 1.0], "label": "dog"}]
  >>> examples = from_dicts(rows, label_names=("cat", "dog"))
  >>> examples.inputs.shape, examples.labels.tolist()
  ((2, 2), [0, 1])
  """
  _check_rows("from_dicts", rows)
  if not isinstance(rows, Iterable):
    raise TypeError(f"from_dicts needs an iterable of dicts, got {type(rows).__name__}.")
  if limit is not None:
    arguments.whole("limit", limit, instead=", or None for all rows")
  reader = row_reader(
    rows,
    inputs=inputs,
    labels=labels,
    transform=transform,
    num_classes=num_classes,
    label_names=label_names,
    name=name,
  )
  stacked, numbers = reader.stack(itertools.islice(rows, limit))
  return from_arrays(
    stacked,
    None if labels is None else numbers,
    num_classes=reader.num_classes or None,
    name=name,
    label_names=reader.label_names,
  )


def from_sequence(
  rows: Any,
  *,
  inputs: str | tuple[str, ...] = "image",
  labels: str | None = "label",
  transform: Callable[[Any], Any] | None = None,
  num_classes: int | None = None,
  label_names: Sequence[str] = (),
  name: str = "rows",
) -> Records:
  """Opens rows that can be asked for by number; `data.streamed` reads them when their turn comes.

  Args:
    rows: has ``__len__``, and gives a dict by ``rows[number]`` or a list of dicts by
      ``rows.__getitems__(numbers)``: a split of Hugging Face's ``datasets``, a torch ``Dataset``
      of dicts, a list. Several threads read it at once.
    inputs: the key of the input, or a tuple of keys, for a dict of inputs.
    labels: the key of the label, an integer or one of ``label_names``; None without labels.
    transform: makes the inputs (an array or a dict of arrays) of a whole row, as in `from_dicts`.
    num_classes: K; may be left out only where there are names, since not all labels are read.
    label_names: K names; by default those that ``rows.features`` tells.
    name: for reports.

  Returns:
    The records; row 0 has been read, to see that it can be.

  Raises:
    TypeError: ``rows`` has no length or no rows by number, or they are no dicts.
    ValueError: ``rows`` is empty, ``num_classes`` is missing, or row 0 does not fit.

  >>> rows = [{"tokens": [5, 7], "mask": [1, 0], "label": 1}]
  >>> records = from_sequence(rows, inputs=("tokens", "mask"), num_classes=2)
  >>> records.read(np.array([0]))[0]["tokens"].tolist()
  [[5, 7]]
  """
  _check_rows("from_sequence", rows)
  if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
    raise TypeError(
      f"from_sequence needs rows with a length and rows by number, got {type(rows).__name__}: what "
      "can only be iterated goes to from_dicts (into memory) or to iterated (a stream)."
    )
  if len(rows) == 0:
    raise ValueError(f"rows of {name!r} are empty: a source needs at least one example.")
  reader = row_reader(
    rows,
    inputs=inputs,
    labels=labels,
    transform=transform,
    num_classes=num_classes,
    label_names=label_names,
    name=name,
  )
  check_classes("from_sequence", reader)
  records = dataclasses.replace(reader, source=rows)
  records.read(np.arange(1))
  return records


def row_reader(
  rows: Any,
  *,
  inputs: str | tuple[str, ...],
  labels: str | None,
  transform: Callable[[Any], Any] | None,
  num_classes: int | None,
  label_names: Sequence[str],
  name: str,
) -> Records:
  """`Records` without a source, whose `Records.stack` makes arrays of rows; see `from_dicts`.

  Its ``num_classes`` is 0 where neither the caller nor the rows' ``features`` tell it.
  """
  if isinstance(inputs, list):
    inputs = tuple(inputs)
  if labels is None and (num_classes or label_names):
    raise ValueError(
      "num_classes and label_names are of labels, and labels is None: leave them out."
    )
  if num_classes is not None:
    arguments.whole("num_classes", num_classes)
  names = tuple(label_names)
  if names and num_classes not in (None, len(names)):
    raise ValueError(f"label_names must be {num_classes} (num_classes), got {len(names)}.")
  features = getattr(rows, "features", None)
  if labels is not None and not names and isinstance(features, Mapping):
    names = tuple(getattr(features.get(labels), "names", None) or ())
    names = names if num_classes in (None, len(names)) else ()
  return Records(
    source=(),
    inputs=None if transform else inputs,
    labels=labels,
    num_classes=num_classes or len(names),
    name=name,
    label_names=names,
    transform=transform,
    prepared=False,
  )


def check_classes(where: str, reader: Records) -> None:
  """Raises where there are labels and nobody said how many classes."""
  if reader.labels is not None and not reader.num_classes:
    raise ValueError(
      f"num_classes must be given: {where} does not read every label of {reader.name!r} first. "
      "(label_names do as well; or labels=None.)"
    )


def _check_rows(where: str, rows: Any) -> None:
  """Raises for what people pass for rows by mistake."""
  if isinstance(rows, Mapping):
    keys = sorted(map(str, rows))
    raise TypeError(
      f"{where} needs rows, one dict for each example, got one {type(rows).__name__} with {keys}: "
      "of splits pass one, e.g. rows['train']; columns of arrays go to from_arrays."
    )
  if isinstance(rows, str | bytes):
    raise TypeError(f"{where} needs rows that are dicts, got the text {rows!r}: open it first.")
