"""Examples as something to look at: pictures where the inputs are pictures, else a text.

`chosen` reads some of a split, which are kept beside the answers; `shown` prepares them for a page.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxdistill import _check
from jaxdistill.data import Examples, Records
from jaxdistill.evaluation.predictions import Predictions, counted
from jaxdistill.reports import figures
from jaxdistill.reports._format import WORDS, Cell, Table, Told
from jaxdistill.reports._pages.rendering import named
from jaxdistill.types import Batch

__all__ = ["Show", "chosen", "shown", "table", "view"]

# The inputs of one example to a text, or to a picture [H, W] or [H, W, C].
Show = Callable[[Any], Any]
_SIDE = 96  # pixels; larger pictures are made smaller, so that a page stays small
_LETTERS = 600
_ROWS = 10_000  # of a table of examples: two megabytes


def chosen(
  rows: Sequence[int] | np.ndarray,
  source: Examples | Records | Batch,
  show: Show | None = None,
) -> dict[int, np.ndarray | str]:
  """Some examples of a split, to look at.

  Args:
    rows: their numbers in the split (``Batch.index``).
    source: the examples as stored, or evaluation batches, whose inputs are as a network sees them.
    show: the inputs of one example, as NumPy arrays, to a text or a picture: a tokenizer's decoder,
      say. By default arrays ``[H, W]`` and ``[H, W, C]`` with 1, 3 or 4 channels are pictures,
      bytes and strings are texts, and all else is written as numbers.

  Returns:
    By number a picture (uint8 ``[H, W]`` or ``[H, W, 3]``; floats are stretched from their least to
    their largest value over all that are shown) or a text.

  Raises:
    TypeError: ``show`` is no function of one example, or gives neither.
  """
  numbers = [int(row) for row in rows]
  if not numbers:
    return {}
  inputs = _inputs(np.array(numbers), source)
  if show is not None:
    _check.function("show", show, "inputs of one example -> text or picture", arguments=1)
  made = []
  for i in range(len(numbers)):
    one = jax.tree.map(lambda leaf, i=i: leaf[i], inputs)
    made.append(view(one) if show is None else _checked(show(one)))
  return dict(zip(numbers, _stretched(made), strict=True))


def view(one: Any) -> np.ndarray | str:
  """One example's inputs as a picture (of any dtype) or a text.

  >>> view({"premise": b"It rains.", "length": np.int32(2)}).splitlines()
  ['premise: It rains.', 'length: 2']
  """
  if isinstance(one, Mapping):
    parts = {key: view(value) for key, value in one.items()}
    pictures = [part for part in parts.values() if not isinstance(part, str)]
    if pictures:
      return pictures[0]
    return "\n".join(f"{key}: {part}" for key, part in parts.items())
  if isinstance(one, bytes):
    return one.decode("utf-8", "replace")[:_LETTERS]
  if isinstance(one, str):
    return one[:_LETTERS]
  if isinstance(one, list | tuple):
    return "\n".join(str(view(part)) for part in one)
  array = np.asarray(one)
  sides = array.shape[:2]
  if array.ndim in (2, 3) and min(sides) >= 4 and (array.ndim == 2 or array.shape[2] in (1, 3, 4)):
    return array
  text = " ".join(f"{value:.4g}" for value in array.reshape(-1)[:40].tolist())
  return text + (" …" if array.size > 40 else "")


def _inputs(numbers: np.ndarray, source: Any) -> Any:
  """Inputs of these examples as host arrays, this axis first."""
  if isinstance(source, Batch):
    every = np.asarray(source.index).reshape(-1)
    real = np.flatnonzero(counted(source))
    places = {int(every[place]): int(place) for place in real}
    where = np.array([places[int(n)] for n in numbers])
    size = source.weight.shape[1]
    return jax.tree.map(lambda leaf: np.asarray(leaf[where // size, where % size]), source.inputs)
  if not isinstance(source, Examples | Records):
    raise TypeError(
      f"source must be Examples, Records or evaluation batches, got {_check.show(source)}."
    )
  return source.read(numbers)["inputs"]


def _checked(made: Any) -> np.ndarray | str:
  if isinstance(made, str):
    return made[:_LETTERS]
  if isinstance(made, bytes):
    return made.decode("utf-8", "replace")[:_LETTERS]
  array = np.asarray(made)
  if array.dtype.kind in "biuf" and (
    array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
  ):
    return array
  raise TypeError(
    f"show must give a text or a picture [H, W] or [H, W, C], got {_check.show(made)}."
  )


def _stretched(made: Sequence[np.ndarray | str]) -> list[np.ndarray | str]:
  """Pictures as uint8, all floats by one scale, and none larger than need be."""
  floats = [m for m in made if not isinstance(m, str) and m.dtype != np.uint8 and m.size]
  low = min((float(np.nanmin(m)) for m in floats), default=0.0)
  high = max((float(np.nanmax(m)) for m in floats), default=1.0)
  out: list[np.ndarray | str] = []
  for one in made:
    if isinstance(one, str):
      out.append(one)
      continue
    if one.dtype != np.uint8:
      span = (high - low) or 1.0
      one = np.nan_to_num((one.astype(np.float64) - low) / span * 255).clip(0, 255).astype(np.uint8)
    if one.ndim == 3 and one.shape[2] == 1:
      one = one[..., 0]
    factor = -(-max(one.shape[:2]) // _SIDE)
    if factor > 1:  # means over blocks
      height, width = (side // factor * factor for side in one.shape[:2])
      blocks = one[:height, :width].reshape(
        height // factor, factor, width // factor, factor, *one.shape[2:]
      )
      one = blocks.mean(axis=(1, 3)).astype(np.uint8)
    out.append(one)
  return out


def shown(
  answers: Predictions,
  rows: Sequence[int] | np.ndarray,
  *,
  words: Mapping[str, str] = WORDS,
) -> list[dict[str, Any]]:
  """Examples with what each model says of them; those that were kept.

  Args:
    answers: of the models.
    rows: places in the answers.
    words: what the models are called.

  Returns:
    One dictionary an example: ``label``, ``index`` (its number in the split), ``text`` or
    ``picture`` (a PNG file's bytes in base 64), ``small`` (whether its pixels should be seen),
    ``said``, pairs of a model's name and its answers, and ``maps``, pairs of a name and a picture
    where labels and answers are pictures.
  """
  pictures = [one for one in answers.shown.values() if not isinstance(one, str)]
  largest = max((int(one.max(initial=0)) for one in pictures), default=255)
  items: list[dict[str, Any]] = []
  for row in map(int, rows):
    index = int(answers.index[row])
    one = answers.shown.get(index)
    if one is None:
      continue
    item: dict[str, Any] = {"index": index, "text": one, "label": "", "said": [], "maps": []}
    if not isinstance(one, str):
      # Pictures of a small range (digits count to 16) are stretched alike, so that one sees them.
      if 0 < largest < 64:
        one = (one.astype(np.float32) * (255 / largest)).clip(0, 255).astype(np.uint8)
      item |= {"text": "", "picture": _encoded(one), "small": max(one.shape[:2]) <= 64}
    if answers.models:
      item["label"] = answers.name(int(answers.labels[row]))
      models = [name for name in words if name in answers.models]
      item["said"] = [(named(name, words), _said(answers, name, row)) for name in models]
    else:
      item |= _told(answers, index, words)
    items.append(item)
  return items


def _encoded(picture: np.ndarray) -> str:
  return base64.b64encode(figures.png(picture)).decode()


def _told(answers: Predictions, index: int, words: Mapping[str, str]) -> dict[str, Any]:
  """What an example's label is, and what each model said, as texts and as pictures."""
  label = answers.truth.get(index, "")
  there = {n: answers.details[n].said.get(index) for n in words if n in answers.details}
  pairs = [(named(name, words), one) for name, one in there.items() if one is not None]
  maps = [(Told("label", ""), label), *pairs]
  sizes = [
    len(answers.label_names),
    *(int(m.max(initial=0)) + 1 for _, m in maps if not isinstance(m, str)),
  ]
  return {
    "label": label if isinstance(label, str) else "",
    "said": [(name, one) for name, one in pairs if isinstance(one, str)],
    "maps": [
      (name, _encoded(figures.classes(one, max(sizes))))
      for name, one in maps
      if not isinstance(one, str)
    ],
  }


def table(
  answers: Predictions,
  rows: Sequence[int] | np.ndarray,
  title: str,
  *,
  words: Mapping[str, str] = WORDS,
) -> list[tuple[str, Table]]:
  """All of some examples with what each model says of them, to be opened by a click.

  Args:
    answers: of the models.
    rows: places in the answers.
    title: what the examples are.
    words: what the models are called.

  Returns:
    ``(what is clicked on, the table)``; nothing of no examples.
  """
  if not len(rows):
    return []
  models = [name for name in words if name in answers.models]
  cells = [
    [
      str(answers.index[row]),
      answers.name(int(answers.labels[row])),
      *(_said(answers, name, row) for name in models),
    ]
    for row in map(int, rows[:_ROWS])
  ]
  some = f"All {len(rows):,}" if len(rows) <= _ROWS else f"{_ROWS:,} of {len(rows):,}"
  rest = "" if len(rows) <= _ROWS else "; predictions.npz has all"
  head: list[Cell] = ["example", "label", *(named(name, words) for name in models)]
  return [(f"{some} in a table{rest}", Table(head, cells, title))]


def _said(answers: Predictions, model: str, row: int) -> str:
  """The classes that a model's instances gave, the most frequent first."""
  one = answers.models[model]
  given, sure = one.predicted[:, row], one.confidence[:, row]
  values, times = np.unique(given, return_counts=True)
  words = []
  for i in np.argsort(-times, kind="stable")[:2]:
    mean = float(np.mean(sure[given == values[i]]))
    share = f"{times[i]} of {len(given)}, " if len(given) > 1 else ""
    words.append(f"{answers.name(int(values[i]))} ({share}{100 * mean:.0f}% sure)")
  return ", ".join(words)
