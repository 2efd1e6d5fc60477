"""Examples of a data set before they are batches: arrays in memory, or records read one by one.

Inputs are one array, or a dict of arrays where a network takes several (tokens and a mask, say).
Data sets that give rows as dicts (Hugging Face's, a list, a generator, a class of one's own) are
read by `from_dicts` and `from_sequence`: no such library is imported here, rows are iterated, or
asked for by number, and nothing more. `some_labels` and `label_mask` say which labels may be used.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from jaxdistill import _check
from jaxdistill.data._views import epoch_order

__all__ = [
  "IMAGES",
  "Examples",
  "Fields",
  "Records",
  "as_labels",
  "as_weight",
  "check_classes",
  "check_tokens",
  "check_weight",
  "count_classes",
  "from_arrays",
  "from_dicts",
  "from_sequence",
  "ignored",
  "label_mask",
  "labels_count",
  "row_reader",
  "some_labels",
  "told_by",
]

# A label is an int32.
_MOST_CLASSES = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Examples:
  """A split in memory, as stored: not normalised, not augmented.

  Attributes:
    inputs: ``[N, ...]``: uint8 images, floats, or bytes (an object array) for text; or a dict of
      such arrays.
    labels: ``[N, ...]``: integers, one an example or one for each token or pixel; or float32, for
      what is no class: targets of a regression, several labels at once, embeddings. Zeros ``[N]``
      where the set has none.
    ids: ``[N]`` strings, unique within the set.
    num_classes: K; integer labels are 0 .. K-1. 0 where labels are no classes, or there are none.
    name: of the data set, for reports.
    version: of the data set, for reports.
    split: TFDS's words for the part that was read.
    label_names: what the classes are called; empty where nobody said.
    has_labels: whether there are labels.
    ignore: the label that stands for none (255 in many segmentations, NaN in a table of numbers):
      a batch has a 0 in its place, and 0 in ``labelled``. None where every label is one.
    weight: ``[N]``, or the leading axes of the labels: how much each counts in losses and metrics;
      None for 1.
    tokenizer: the digest of the tokenizer whose tokens they are; empty where nobody said.
    documents: ``[N, L]`` int32, which document each token is of, from 0, −1 at padding; None where
      the examples are no tokens, or nobody said. See `evaluation.metrics.over_documents`.
  """

  inputs: Any
  labels: np.ndarray
  ids: np.ndarray
  num_classes: int
  name: str
  version: str = ""
  split: str = ""
  label_names: tuple[str, ...] = ()
  has_labels: bool = True
  ignore: float | None = None
  weight: np.ndarray | None = None
  tokenizer: str = ""
  documents: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self.labels)

  def read(self, rows: np.ndarray | slice) -> dict[str, Any]:
    """``inputs`` and ``labels`` of these rows, in this order, and their ``weight`` if they have."""
    found = {"inputs": jax.tree.map(lambda leaf: leaf[rows], self.inputs)}
    found["labels"] = self.labels[rows]
    return found if self.weight is None else {**found, "weight": self.weight[rows]}

  def read_ids(self) -> list[str]:
    """The ids of all rows, in their order."""
    return self.ids.tolist()


@dataclasses.dataclass(frozen=True)
class Fields:
  """What of a row is the input and what is the label, where rows are dicts.

  Values are whatever `numpy.asarray` takes: pictures of PIL (grey ones become ``[H, W, 1]``),
  lists, arrays of NumPy, JAX or torch.

  Attributes:
    inputs: the key of the input, or a tuple of keys, for a dict of inputs.
    labels: the key of the label: an integer, one of ``label_names``, or an array of either or of
      other numbers, of one shape in all rows; None without labels.
    transform: makes the inputs (an array or a dict of arrays) of a whole row; ``inputs`` is not
      looked at then.
    num_classes: K; by default as many as there are names, or as truth values in a label. Where
      there are neither, `from_dicts`, which reads every label, takes one more than the largest.
    label_names: K names; by default those that ``rows.features`` tells, as Hugging Face's do.
    weight: the key of how much a row counts, a number or an array of the label's leading axes; None
      where all count alike.
    ignore: the label that stands for none, see `Examples`.
  """

  inputs: str | tuple[str, ...] = "image"
  labels: str | None = "label"
  transform: Callable[[Any], Any] | None = None
  num_classes: int | None = None
  label_names: Sequence[str] = ()
  weight: str | None = None
  ignore: float | None = None


# What sets of images call theirs.
IMAGES = Fields()


@dataclasses.dataclass(frozen=True)
class Records:
  """Random access to dicts of features, decoded when read. For sets that memory does not hold.

  Attributes:
    source: ``source.__getitems__(rows)``, or ``source[row]`` where there is no such method, gives
      dicts of features.
    inputs: the feature that is the input, or a tuple of features that become a dict of inputs; None
      where ``transform`` makes the inputs of the whole dict.
    labels: the feature that is the label, or None.
    num_classes: K; 0 where labels are no classes, or there are none.
    name: of the data set, for reports.
    version: of the data set, for reports.
    split: TFDS's words for the part that was read.
    label_names: what the classes are called; labels that are such names become their numbers.
    transform: applied to each input when it is read, and must give one shape for all.
    prepared: whether TFDS wrote the files, so that what cannot be read is damaged.
    ids: ``() -> [N]`` ids, unique within the set; None where the row's number is all there is.
    weight: the feature that says how much a row counts, or None.
    ignore: the label that stands for none, see `Examples`.
  """

  source: Any  # not Sequence: whoever checks the type would read a record
  inputs: str | tuple[str, ...] | None
  labels: str | None
  num_classes: int
  name: str
  version: str = ""
  split: str = ""
  label_names: tuple[str, ...] = ()
  transform: Callable[[Any], Any] | None = None
  prepared: bool = True
  ids: Callable[[], Sequence[str]] | None = None
  weight: str | None = None
  ignore: float | None = None

  def __len__(self) -> int:
    return len(self.source)

  @property
  def has_labels(self) -> bool:
    """Whether there are labels."""
    return self.labels is not None

  def features(self, rows: np.ndarray) -> list[dict[str, Any]]:
    """The decoded features of these rows, one dict each."""
    # A set that TFDS prepared and that can't be read is damaged; a user's own rows are his to mend,
    # so that their error is shown as it is.
    problem = "some of its records are empty"  # so reads a file cut off at a block's border
    wanted = [int(row) for row in rows]
    try:
      many = getattr(self.source, "__getitems__", None)
      examples = many(wanted) if many else [self.source[row] for row in wanted]
    except (RuntimeError, OSError, LookupError, TypeError, ValueError) as error:
      if not self.prepared:
        raise RuntimeError(
          f"Rows {wanted[:5]} of {self.name!r} cannot be read ({type(error).__name__}: {error})."
        ) from error
      examples, problem = [], str(error)
    if not self.prepared and len(examples) != len(wanted):
      raise RuntimeError(
        f"{len(wanted)} rows of {self.name!r} were asked for, but __getitems__ of "
        f"{type(self.source).__name__} gave {len(examples)}."
      )
    empty = self.prepared and any(example[self.inputs] is None for example in examples)
    if not examples or empty:
      raise RuntimeError(
        f"Split {self.split!r} of {self.name!r} cannot be read, its files are damaged ({problem}): "
        "delete the prepared data set and prepare it again."
      )
    return examples

  def read(self, rows: np.ndarray) -> dict[str, Any]:
    """``inputs`` and ``labels`` of these rows, in this order, and their ``weight`` if they have."""
    return self.stack(self.features(rows), rows)

  def read_ids(self) -> list[str]:
    """The ids of all rows, in their order."""
    return [str(row) for row in range(len(self))] if self.ids is None else list(self.ids())

  def stack(
    self, examples: Iterable[Any], rows: Iterable[int] | np.ndarray | None = None
  ) -> dict[str, Any]:
    """Decoded features as `read` gives them; ``rows`` are their numbers, for messages."""
    # At once where that is all there is to it; what is odd is found, and named, row by row.
    block = self._block(examples, rows) if isinstance(examples, list) else None
    if block is not None:
      return block
    numbers: list[int] = []
    made: dict[str, list[Any]] = {"inputs": [], "labels": []}
    for example, row in zip(examples, itertools.count() if rows is None else rows, strict=False):
      # One by one, so that the message names the row; a stack of a million says "inhomogeneous".
      at = int(row)
      numbers.append(at)
      made["inputs"].append(self._inputs(example, at))
      made["labels"].append(np.int32(0) if self.labels is None else self._label(example, at))
      if self.weight is not None:
        weight = self._array(self._feature(example, at, self.weight), at, self.weight)
        made.setdefault("weight", []).append(weight)
      for name, values in made.items():
        self._check_alike(name, values, numbers)
    if not numbers:
      raise ValueError(
        f"{self.name!r} gave no rows: it is empty, or an iterator that was used up before."
      )
    first, inputs = made["inputs"][0], made["inputs"]
    joined: Any = (
      {k: _joined([one[k] for one in inputs], k, self.name, numbers) for k in first}
      if isinstance(first, dict)
      else _joined(inputs, self.inputs, self.name, numbers)
    )
    return self._found(joined, np.stack(made["labels"]), made.get("weight"), numbers)

  def _found(
    self, inputs: Any, labels: np.ndarray, weight: list[Any] | None, rows: Any
  ) -> dict[str, Any]:
    """What is read, with labels and weights checked."""
    found = {"inputs": inputs, "labels": np.zeros(len(labels), np.int32)}
    if self.labels is not None:
      found["labels"] = as_labels(labels, self, rows=rows)
    check_tokens(inputs, found["labels"], self.name, rows)
    if weight is not None:
      found["weight"] = as_weight(np.stack(weight), found["labels"], self.name)
    return found

  def _block(self, examples: list[Any], rows: Any) -> dict[str, Any] | None:
    """What `stack` makes of rows that want stacking and no more; None where one may want more."""
    more = self.transform is not None or self.weight is not None
    if not examples or more or not isinstance(self.inputs, str):
      return None
    try:
      values = [example[self.inputs] for example in examples]
      labels = [0 if self.labels is None else example[self.labels] for example in examples]
    except (LookupError, TypeError):
      return None
    first = values[0]
    arrays = isinstance(first, np.ndarray) and all(
      type(value) is np.ndarray and value.shape == first.shape and value.dtype == first.dtype
      for value in values
    )
    numbers = all(isinstance(label, (int, np.integer)) for label in labels)
    if not arrays or first.dtype.kind not in "biuf" or not numbers:
      return None
    joined = _joined(values, self.inputs, self.name, rows)
    return self._found(joined, np.array(labels, np.int64), None, rows)

  def _inputs(self, example: Any, row: int) -> Any:
    """One example's inputs as arrays (or bytes, for text)."""
    if self.inputs is None:
      value = self._checked(example, row)
    elif isinstance(self.inputs, tuple):
      value = {key: self._feature(example, row, key) for key in self.inputs}
    else:
      value = self._feature(example, row, self.inputs)
    if self.transform is not None:
      _check.function("transform", self.transform, "of a row (or its input)", arguments=1)
      try:
        value = self.transform(value)
      except Exception as error:
        error.add_note(f"raised by transform at row {row} of {self.name!r}")
        raise
    if isinstance(value, Mapping):
      if not value:
        raise ValueError(f"The inputs of row {row} of {self.name!r} are an empty dict.")
      return {key: self._array(one, row, key) for key, one in value.items()}
    return self._array(value, row, self.inputs)

  def _checked(self, example: Any, row: int) -> Mapping[str, Any]:
    if not isinstance(example, Mapping):
      raise TypeError(
        f"rows of {self.name!r} must be dicts, but row {row} is a {type(example).__name__}: make "
        "dicts of them, e.g. ({'image': x, 'label': y} for x, y in rows), or use from_arrays. (A "
        "data frame gives rows by to_dict('records').)"
      )
    return example

  def _feature(self, example: Any, row: int, key: str) -> Any:
    example = self._checked(example, row)
    if key not in example:
      key = str(key)
      # What contains the key or is contained comes first: "label" finds "fine_label".
      near = [one for one in example if key in str(one) or str(one) in key]
      near = near or difflib.get_close_matches(key, map(str, example), n=2, cutoff=0.5)
      hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
      raise ValueError(
        f"row {row} of {self.name!r} has no {key!r}; it has {sorted(map(str, example))}.{hint} "
        "Name what is the input by inputs= and what is the label by labels= (None without labels)."
      )
    if example[key] is None:
      raise ValueError(
        f"{key!r} of row {row} of {self.name!r} is None: leave such rows out, or, where it is the "
        "label, put 0 there and mark the row as unlabelled by labelled= of the source."
      )
    return example[key]

  def _array(self, value: Any, row: int, key: Any) -> Any:
    if self.prepared and isinstance(value, bytes):
      return value
    where = f"{key or 'what transform made'!r} of row {row} of {self.name!r}"
    if getattr(value, "mode", None) == "P" and hasattr(value, "getbands"):
      raise ValueError(
        f"{where} is a picture with a palette, whose numbers are no colours: convert it, e.g. "
        "transform=lambda row: row['image'].convert('RGB')."
      )
    array = _as_numpy(value, where)
    if array.dtype.kind in "OSU":
      raise ValueError(
        f"{where} is {'text' if array.dtype.kind in 'SU' else type(value).__name__}, not numbers: "
        "make numbers of it (tokenize text) in transform=."
      )
    # Grey pictures get the axis of channels that networks and crops expect.
    return array[..., None] if hasattr(value, "getbands") and array.ndim == 2 else array

  def _check_alike(self, what: str, made: list[Any], numbers: list[int]) -> None:
    """Raises where the last of what was made has other keys or another shape than the first."""
    first, last = (
      {k: np.shape(v) for k, v in one.items()} if isinstance(one, dict) else np.shape(one)
      for one in (made[0], made[-1])
    )
    if first != last:
      raise ValueError(
        f"The {what} of {self.name!r} differ in shape: row {numbers[0]} has {first}, row "
        f"{numbers[-1]} has {last}. Give all rows one shape (crop, resize, pad, convert)"
        f"{' by transform=' if what == 'inputs' else ''}."
      )

  def _label(self, example: Any, row: int) -> Any:
    value = self._feature(example, row, str(self.labels))
    if hasattr(value, "getbands"):  # a picture of classes; those with a palette hold their numbers
      return np.asarray(value)
    where = f"{self.labels!r} of row {row} of {self.name!r}"
    value = _numbered(_as_numpy(value, where), self.label_names, where)
    label = self._array(value, row, self.labels)
    # As TFDS decodes a mask, which has no channels to speak of.
    return label[..., 0] if self.prepared and label.ndim == 3 and label.shape[-1] == 1 else label


def _joined(values: list[Any], key: Any, name: str, rows: Any) -> np.ndarray:
  if isinstance(values[0], bytes):  # NumPy would cut trailing zeros off fixed-length strings
    return np.array(values, dtype=object)
  joined = np.stack(values)
  _check_numbers(joined, key, name, rows)
  return joined


def _check_numbers(array: np.ndarray, key: Any, name: str, rows: Any = None) -> None:
  """Raises for inputs that are no number, or another one on a device; infinities may be meant.

  A device holds 64 bits as 32, unless JAX is told otherwise (``jax_enable_x64``): a hashed id of
  2³² would be row 0 of an embedding.
  """
  floats = jnp.issubdtype(array.dtype, jnp.floating)
  if not (floats or jnp.issubdtype(array.dtype, jnp.integer)) or not array.size:
    return
  what = "inputs" if key is None else f"inputs {key!r}"
  held = jax.dtypes.canonicalize_dtype(array.dtype)
  with np.errstate(invalid="ignore"):
    low, high = np.min(array), np.max(array)  # no copy, unlike isnan of the whole
  if np.isnan(low):
    bad = np.flatnonzero(np.isnan(array).reshape(len(array), -1).any(axis=1))
    raise ValueError(
      f"The {what} of {name!r} hold NaN in {len(bad)} of {len(array)} rows, first in row "
      f"{bad[0] if rows is None else rows[bad[0]]}: fill them in, or leave those rows out."
    )
  if held == array.dtype:
    return
  range_: Any = np.finfo(held) if floats else np.iinfo(held)
  if low >= range_.min and high <= range_.max:
    return
  outside = ((array < range_.min) | (array > range_.max)) & (np.isfinite(array) if floats else True)
  if outside.any():
    raise ValueError(
      f"The {what} of {name!r} are {array.dtype} with {array[outside].flat[0]} in "
      f"{_place(outside, rows)}, which {held} does not hold: number them anew "
      "(np.unique(..., return_inverse=True), say), scale them, or set jax_enable_x64."
    )


def _place(wrong: np.ndarray, rows: Any = None) -> str:
  """Where the first of what is wrong stands, for a message.

  >>> _place(np.array([[False, False], [False, True]]))
  'row 1 at position 1'
  """
  row, *inside = np.argwhere(wrong)[0].tolist()
  at = f" at position {', '.join(map(str, inside))}" if inside else ""
  return f"row {row if rows is None else rows[row]}{at}"


def check_tokens(inputs: Any, labels: np.ndarray, name: str, rows: Any = None) -> None:
  """Raises for inputs of a language model that no network reads as they are meant.

  Such inputs are a dict with ``tokens`` ``[N, L]``, as `from_text` makes them, and beside these
  ``positions`` and ``segments``. Of tokens that lie alone, as an array, only the length is known.

  Args:
    inputs: the examples' inputs, as arrays.
    labels: theirs; ``[N, L]`` integers where there is one a token.
    name: of the data, for messages.
    rows: the rows' numbers, for messages.

  Raises:
    ValueError: tokens, positions or segments are no integers or negative; a segment goes on after
      another began; or there is one label more, or one fewer, than tokens.
  """
  given = inputs if isinstance(inputs, Mapping) else {"tokens": inputs}
  tokens = given.get("tokens")
  if not isinstance(tokens, np.ndarray) or tokens.ndim != 2:
    return
  length, ours = tokens.shape[1], labels.shape[-1] if labels.ndim == 2 else None
  whole = tokens.dtype.kind in "iu" and labels.dtype.kind in "iu"
  if whole and ours is not None and abs(ours - length) == 1:
    raise ValueError(
      f"labels of {name!r} have {ours} positions and tokens {length}: position l predicts "
      "labels[l], so both have L. data.shifted(windows of L + 1 tokens) makes the two, and weights."
    )
  if not isinstance(inputs, Mapping):
    return
  for key in ("tokens", "positions", "segments"):
    one = given.get(key)
    if not isinstance(one, np.ndarray):
      continue
    if one.shape != tokens.shape or one.dtype.kind not in "iu":
      raise ValueError(
        f"inputs {key!r} of {name!r} must be integers {list(tokens.shape)}, one a token, got "
        f"{_check.show(one)}: a tokenizer's encode gives them."
      )
    if one.dtype.kind == "i" and one.min(initial=0) < 0:
      where = one < 0
      raise ValueError(
        f"inputs {key!r} of {name!r} have {one[where][0]} in {_place(where, rows)}: they count "
        "from 0, and what counts nowhere is told by weight=, never by -100."
      )
  segments = given.get("segments")
  if isinstance(segments, np.ndarray):
    before = np.maximum.accumulate(segments, axis=1)
    again = (segments > 0) & (segments < before)
    if again.any():
      raise ValueError(
        f"inputs 'segments' of {name!r} have {segments[again][0]} in {_place(again, rows)}, after "
        f"{before[again][0]}: a row's documents are numbered as they come, 1, 1, 2, 2, 2, 0 "
        "(padding), as data.pack has them."
      )


def _as_numpy(value: Any, what: str) -> np.ndarray:
  """An array of NumPy, JAX, torch or lists as NumPy's, none of whose values gets lost on the way.

  Args:
    value: the array.
    what: it is, for messages: ``"labels"``.

  Raises:
    ValueError: it cannot be made one array, or some of its values are masked.
  """
  if isinstance(value, np.ma.MaskedArray):
    _check.unmasked(what, value)
  try:
    return np.asarray(value)
  except (TypeError, ValueError, RuntimeError, OSError) as error:
    raise ValueError(
      f"{what} cannot be made one array ({error}): give all examples one shape."
    ) from error


def ignored(labels: Any, ignore: float | None) -> Any:
  """Which labels stand for none; of NumPy's arrays, or JAX's. None where none does."""
  if ignore is None:
    return None
  return labels != labels if math.isnan(ignore) else labels == ignore


def _numbered(labels: np.ndarray, names: tuple[str, ...], what: str) -> np.ndarray:
  """Labels that are texts as the numbers of their names, int32; all others as they are.

  Raises:
    ValueError: a text is none of the names.
  """
  if labels.dtype.kind not in "OSTU":
    return labels
  given = labels.ravel().tolist()
  texts = [one.decode("utf-8", "replace") if isinstance(one, bytes) else one for one in given]
  if not all(isinstance(one, str) for one in texts):
    return labels  # who reads them says what is wrong
  numbers = {name: number for number, name in enumerate(names)}
  unknown = next((one for one in texts if one not in numbers), None)
  if unknown is not None:
    kind = f"not one of label_names={names!r}" if names else "text"
    raise ValueError(
      f"{what} is {kind}, namely {unknown!r}: pass label_names=, all class names in the order of "
      "their numbers, the same for every split: sorted(set(labels)) of all labels, say."
    )
  return np.array([numbers[one] for one in texts], np.int32).reshape(labels.shape)


def _names(label_names: Any) -> tuple[str, ...]:
  """The names of classes as a tuple.

  Raises:
    ValueError: they are no texts, have no order, or two are the same.
  """
  ordered = not isinstance(label_names, str | bytes | set | frozenset | Mapping)
  names = tuple(label_names) if ordered and isinstance(label_names, Iterable) else None
  if (
    names is None
    or not all(isinstance(name, str) for name in names)
    or len(set(names)) < len(names)
  ):
    raise ValueError(
      f"label_names={_check.show(label_names)} must be texts in the order of the classes' numbers, "
      "one a class, and no two the same."
    )
  return tuple(map(str, names))  # NumPy's texts are of another type


def as_labels(labels: np.ndarray, of: Any, *, rows: Any = None) -> np.ndarray:
  """Labels as they are kept: integers, or float32.

  Args:
    labels: ``[N, ...]``; truth values are several labels at once, 0.0 and 1.0.
    of: an `Examples` or `Records`: its ``num_classes`` (0 where nobody knows), ``ignore``, names.
    rows: the rows' numbers, for messages.

  Raises:
    ValueError: one is no number, or no class.
  """
  numbers = range(len(labels)) if rows is None else rows
  if 0 in labels.shape[1:]:
    raise ValueError(
      f"labels of {of.name!r} are of shape {labels.shape}, which holds none: labels=None is of a "
      "set without labels."
    )
  if labels.dtype.kind == "b":
    labels = labels.astype(np.float32)
  none = ignored(labels, of.ignore)

  def first(wrong: np.ndarray) -> tuple[int, ...] | None:
    wrong = wrong if none is None else wrong & ~none
    found = np.argwhere(wrong)
    return tuple(found[0].tolist()) if len(found) else None

  if jax.dtypes.issubdtype(labels.dtype, np.floating):  # bfloat16 too, which NumPy does not know
    at = first(~np.isfinite(labels))
    if at is not None:
      raise ValueError(
        f"labels of {of.name!r} are not finite in row {numbers[at[0]]}: leave such rows out, or "
        "say by ignore=float('nan') that NaN stands for no label."
      )
    return labels.astype(np.float32, copy=False)
  if labels.dtype.kind not in "iu":
    raise ValueError(
      f"labels must be integers or floats, or names that label_names= lists, got {labels.dtype}."
    )
  # A label beyond K would be a one-hot row of zeros: no error anywhere, and a loss of 0.
  most = of.num_classes or _MOST_CLASSES
  at = first((labels < 0) | (labels >= most))
  if at is not None:
    raise ValueError(_wrong_label(int(labels[at]), numbers[at[0]], at[1:], of))
  # Of an example one number each; a mask of bytes stays what it is.
  compact = labels.ndim > 1 and labels.dtype.itemsize < 4
  return labels if compact else labels.astype(np.int32, copy=False)


def as_weight(weight: Any, labels: np.ndarray, name: str) -> np.ndarray:
  """How much each example, or each of its labels, counts: float32, of leading axes of the labels.

  Raises:
    ValueError: its shape is another, or a weight is negative or not finite.
  """
  found = _as_numpy(weight, f"weight of {name!r}")
  number = found.dtype.kind in "biu" or jax.dtypes.issubdtype(found.dtype, np.floating)
  if found.ndim == 0 or found.shape != labels.shape[: found.ndim] or not number:
    raise ValueError(
      f"weight of {name!r} must be numbers of the leading axes of the labels {labels.shape}, got "
      f"{found.dtype} of shape {found.shape}."
    )
  with np.errstate(over="ignore"):  # said below
    made = found.astype(np.float32)
  if not np.isfinite(made).all() or (made < 0).any():
    raise ValueError(f"weight of {name!r} must be finite and not negative.")
  if ((found > 0) & (made < np.finfo(np.float32).tiny)).any():
    raise ValueError(
      f"weight of {name!r} has {found[found > 0].min()}, which is 0 to a device in float32: scale "
      "all of them, since only their ratios count."
    )
  return made


def _wrong_label(label: int, row: int, inside: tuple[int, ...], of: Any) -> str:
  K = of.num_classes
  where = f"split {of.split!r} of {of.name!r}" if of.split else repr(of.name)
  range_ = f"in 0 .. {K - 1} (num_classes={K})" if K else "at 0 or more"
  at = f" at position {', '.join(map(str, inside))}" if inside else ""
  return (
    f"labels of {where} must lie {range_}, but row {row} has {label}{at}. -1 stands for a label "
    "that is withheld: choose a split that has them, or labels=None; a number that stands for no "
    "label (255 in many segmentations, -100 in Hugging Face's) is told by ignore=."
  )


def _as_arrays(inputs: Any) -> Any:
  """Inputs as an array or a dict of arrays, all of one length."""

  def as_array(key: str | None, value: Any) -> np.ndarray:
    what = "inputs" if key is None else f"inputs[{key!r}]"
    if isinstance(value, Mapping):
      raise ValueError(f"{what} is a dict within a dict: inputs are an array or a dict of arrays.")
    array = _as_numpy(value, what)
    if (
      array.dtype.kind in "cMm"
      or array.dtype.names
      or (
        array.dtype.kind == "O" and not all(isinstance(x, bytes | str) for x in array.ravel()[:8])
      )
    ):
      raise ValueError(f"{what} must be real numbers (or text), got {_check.show(array)}.")
    if array.ndim == 0 or len(array) == 0:
      raise ValueError(f"{what} must hold at least one example, got an array of {array.shape}.")
    if array.size == 0:
      raise ValueError(f"{what} must hold a number at least of each example, got {array.shape}.")
    return array

  if not isinstance(inputs, Mapping):
    return as_array(None, inputs)
  odd = [key for key in inputs if not isinstance(key, str)]
  if odd:
    raise TypeError(f"inputs has the key {odd[0]!r}, which must be a text: files keep it as one.")
  made = {key: as_array(key, value) for key, value in inputs.items()}
  sizes = {key: len(value) for key, value in made.items()}
  if len(set(sizes.values())) != 1:
    raise ValueError(f"inputs must be arrays of one length, one row an example, got {sizes}.")
  return made


def from_arrays(
  inputs: Any,
  labels: Any,
  *,
  num_classes: int | None = None,
  ids: Any = None,
  name: str = "arrays",
  split: str = "",
  label_names: Sequence[str] = (),
  weight: Any = None,
  ignore: float | None = None,
) -> Examples:
  """Makes `Examples` of a user's own arrays.

  Args:
    inputs: ``[N, ...]``, or a dict of such arrays; uint8 images are scaled to 0 .. 1 later,
      everything else stays.
    labels: ``[N]`` integers, 0 for an example without one, which a source's ``labelled`` then
      marks; ``[N, ...]`` integers (a class for each token or pixel); the same by names, of
      ``label_names``; floats or truth values of any shape (a regression's targets, several labels
      at once); None where the set has no labels.
    num_classes: K; by default as many as there are names, or as truth values in a label. Where
      there are neither, one more than the largest of integer labels, and 0 for floats.
    ids: ``[N]``; the row's number by default.
    name: for reports.
    split: for reports.
    label_names: K names in the order of their numbers, or none.
    weight: ``[N]``, or the leading axes of the labels: how much each counts; None for 1.
    ignore: the label that stands for none: 255 in many segmentations, NaN in a table of numbers.

  Returns:
    The examples; arrays are not copied where their types fit.

  Raises:
    TypeError: a key of the inputs, or ``name``, is no text.
    ValueError: lengths differ, there is no example, an input is NaN, something is masked, a label
      is out of range or none of the names, or two classes have one name.

  >>> examples = from_arrays(np.zeros((3, 2), np.float32), [0, 2, 1])
  >>> len(examples), examples.num_classes, examples.labels.dtype.name
  (3, 3, 'int32')
  >>> names = ("cat", "dog")
  >>> from_arrays(np.zeros((2, 2), np.float32), ["dog", "cat"], label_names=names).labels.tolist()
  [1, 0]
  >>> from_arrays(np.zeros((3, 2), np.float32), [0.5, 2.0, 1.0]).labels.dtype.name
  'float32'
  """
  inputs = _as_arrays(inputs)
  for key, leaf in inputs.items() if isinstance(inputs, dict) else [(None, inputs)]:
    _check_numbers(leaf, key, name)
  size = len(jax.tree.leaves(inputs)[0])
  has_labels = labels is not None
  if not has_labels:
    if num_classes or label_names or ignore is not None:
      raise ValueError(
        "num_classes, label_names and ignore are of labels, and labels is None: leave them out."
      )
    labels, num_classes = np.zeros(size, np.int32), 0
  names = _names(label_names)
  labels = _numbered(_as_numpy(labels, "labels"), names, "labels")
  if labels.shape[:1] != (size,):
    raise ValueError(
      f"labels must have the {size} examples of inputs on their first axis, got {labels.shape}."
    )
  if num_classes is None:
    num_classes = count_classes(labels, ignore, len(names))
  _check.whole("num_classes", num_classes, least=0, most=_MOST_CLASSES)
  ids = np.arange(size).astype(str) if ids is None else np.asarray(ids).astype(str)
  if ids.shape != (size,):
    raise ValueError(f"ids must be of shape ({size},) like inputs, got {ids.shape}.")
  if not isinstance(name, str):
    raise TypeError(f"name={_check.show(name)} must be a text.")
  if names and len(names) != num_classes:
    raise ValueError(f"label_names must be {num_classes} (num_classes), got {len(names)}.")
  examples = Examples(
    inputs=inputs,
    labels=labels,
    ids=ids,
    num_classes=num_classes,
    name=name,
    split=split,
    label_names=names,
    has_labels=has_labels,
    ignore=ignore,
  )
  labels = as_labels(labels, examples) if has_labels else labels
  check_tokens(inputs, labels, name)
  weight = None if weight is None else as_weight(weight, labels, name)
  return dataclasses.replace(examples, labels=labels, weight=weight)


def count_classes(labels: np.ndarray, ignore: float | None, names: int = 0) -> int:
  """K where nobody said it: of integers the largest is that of one split, so names come first."""
  if labels.dtype.kind == "b" and labels.ndim > 1:
    return int(labels.shape[-1])
  if names or labels.dtype.kind not in "iu":
    return names
  none = ignored(labels, ignore)
  some = labels if none is None else labels[~none]
  return max(0, int(some.max()) + 1) if some.size else 0


def from_dicts(
  rows: Any, fields: Fields = IMAGES, *, name: str = "rows", limit: int | None = None
) -> Examples:
  """Reads rows that are dicts into memory: all of them, once.

  Args:
    rows: any iterable of dicts: a split of Hugging Face's ``datasets``, a list, a generator.
    fields: what of a row is the input, and what the label.
    name: for reports.
    limit: how many rows to read at most, for an iterable without an end.

  Returns:
    The examples, in the order in which the rows came.

  Raises:
    TypeError: ``rows`` is no iterable of dicts.
    ValueError: there is no row, a key is missing, shapes differ, an input is text or NaN, or a
      label is text or out of range; the message names the row.

  >>> rows = [{"image": [0.0, 1.0], "label": "cat"}, {"image": [1.0, 1.0], "label": "dog"}]
  >>> examples = from_dicts(rows, Fields(label_names=("cat", "dog")))
  >>> examples.inputs.shape, examples.labels.tolist()
  ((2, 2), [0, 1])
  """
  _check_rows("from_dicts", rows)
  if not isinstance(rows, Iterable):
    raise TypeError(f"from_dicts needs an iterable of dicts, got {type(rows).__name__}.")
  if limit is not None:
    _check.whole("limit", limit, instead=", or None for all rows")
  ahead = itertools.islice(rows, limit)
  begun = list(itertools.islice(ahead, 1))
  reader = told_by(begun, row_reader(rows, fields, name))
  found = reader.stack(itertools.chain(begun, ahead))
  return from_arrays(
    found["inputs"],
    None if fields.labels is None else found["labels"],
    num_classes=reader.num_classes or None,
    name=name,
    label_names=reader.label_names,
    weight=found.get("weight"),
    ignore=reader.ignore,
  )


def from_sequence(rows: Any, fields: Fields = IMAGES, *, name: str = "rows") -> Records:
  """Opens rows that can be asked for by number; `data.streamed` reads them when their turn comes.

  Args:
    rows: has ``__len__``, and gives a dict by ``rows[number]`` or a list of dicts by
      ``rows.__getitems__(numbers)``: a split of Hugging Face's ``datasets``, a torch ``Dataset``
      of dicts, a list. Several threads read it at once.
    fields: what of a row is the input, and what the label. Not all labels are read, so it says
      ``num_classes`` unless there are names.
    name: for reports.

  Returns:
    The records; row 0 has been read, to see that it can be.

  Raises:
    TypeError: ``rows`` has no length or no rows by number, or they are no dicts.
    ValueError: ``rows`` is empty, ``num_classes`` is missing, or row 0 does not fit.

  >>> rows = [{"tokens": [5, 7], "mask": [1, 0], "label": 1}]
  >>> records = from_sequence(rows, Fields(inputs=("tokens", "mask"), num_classes=2))
  >>> records.read(np.array([0]))["inputs"]["tokens"].tolist()
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
  records = dataclasses.replace(row_reader(rows, fields, name), source=rows)
  first = records.features(np.arange(1))
  records = told_by(first, records)
  check_classes("from_sequence", records, records.stack(first)["labels"])
  return records


def row_reader(rows: Any, fields: Fields, name: str) -> Records:
  """`Records` without a source, whose `Records.stack` makes arrays of rows.

  Its ``num_classes`` is 0 where neither the caller nor the rows' ``features`` tell it.
  """
  if not isinstance(fields, Fields):
    raise TypeError(f"fields={_check.show(fields)} must be data.Fields(inputs=..., labels=...).")
  labels, num_classes, names = fields.labels, fields.num_classes, _names(fields.label_names)
  if labels is None and (num_classes or names):
    raise ValueError(
      "num_classes and label_names are of labels, and labels is None: leave them out."
    )
  if num_classes is not None:
    _check.whole("num_classes", num_classes)
  if names and num_classes not in (None, len(names)):
    raise ValueError(f"label_names must be {num_classes} (num_classes), got {len(names)}.")
  features = getattr(rows, "features", None)
  if labels is not None and not names and isinstance(features, Mapping):
    names = tuple(getattr(features.get(labels), "names", None) or ())
    names = names if num_classes in (None, len(names)) else ()
  inputs = tuple(fields.inputs) if isinstance(fields.inputs, list) else fields.inputs
  return Records(
    source=(),
    inputs=None if fields.transform else inputs,
    labels=labels,
    num_classes=num_classes or len(names),
    name=name,
    label_names=names,
    transform=fields.transform,
    prepared=False,
    weight=fields.weight,
    ignore=fields.ignore,
  )


def told_by(first: Sequence[Any], reader: Records) -> Records:
  """The reader with K, where nobody said it and labels are several truth values, as many in each.

  Args:
    first: the first row; or none, of rows that are empty.
    reader: from `row_reader`.
  """
  if not first or reader.labels is None or reader.num_classes:
    return reader
  labels = np.asarray(reader._label(first[0], 0))[None]
  several = count_classes(labels, reader.ignore) if labels.dtype.kind == "b" else 0
  return dataclasses.replace(reader, num_classes=several)


def check_classes(where: str, reader: Records, labels: np.ndarray) -> None:
  """Raises where labels are classes, and nobody said how many."""
  classes = reader.has_labels and labels.dtype.kind in "iu"
  if classes and not reader.num_classes:
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


# In the place of an epoch's number, for the order in which labels are given out.
_LABELS = 0x6C6162656C


def label_mask(examples: Examples | Records, labelled: Any) -> np.ndarray:
  """The mask of labels that may be used, ``[N]`` float32, or of the leading axes of the labels."""
  # In the loss it is a mask; a set without labels is the mask that is 0 everywhere.
  if labelled is None:
    return np.full(len(examples), float(examples.has_labels), np.float32)
  mask = _as_numpy(labelled, "labelled")
  shape = examples.labels.shape if isinstance(examples, Examples) else (len(examples),)
  if not mask.ndim or mask.shape != shape[: mask.ndim] or not np.isin(mask, (0, 1)).all():
    raise ValueError(
      f"labelled must be {len(examples)} zeros and ones, one for each example of "
      f"{examples.name!r} (or one for each of its labels, {list(shape)}), got {mask.dtype} of "
      f"shape {mask.shape}."
    )
  if not examples.has_labels and mask.any():
    raise ValueError(f"labelled must be all 0: {examples.name!r} has no labels.")
  return mask.astype(np.float32)


def labels_count(examples: Examples | Records, known: np.ndarray) -> bool:
  """Whether any label of a split counts, as far as that is known before its rows are read.

  Args:
    examples: the split.
    known: from `label_mask`.
  """
  if not isinstance(examples, Examples) or not known.any():
    return bool(known.any())
  none, counts = ignored(examples.labels, examples.ignore), known > 0
  for also in (examples.weight, None if none is None else ~none):
    if also is not None:
      rank = max(also.ndim, counts.ndim)
      one, other = (np.expand_dims(x, tuple(range(x.ndim, rank))) for x in (counts, also > 0))
      counts = one & other
  return bool(counts.any())


def check_weight(examples: Examples | Records) -> None:
  """Raises for what is to be trained on where no example counts.

  A batch in which nothing counts is none of anybody's faults, and a step on it moves nothing. A
  whole training of such steps would end like any other.

  Raises:
    ValueError: the weight of each is 0.
  """
  weight = examples.weight if isinstance(examples, Examples) else None
  if weight is not None and not weight.any():
    raise ValueError(
      f"weight of {examples.name!r} is 0 for all {len(examples)} examples: nothing would be "
      "learned. Look at the weights; of text, whether all of it is prompt."
    )


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

  >>> from jaxdistill.data import from_arrays
  >>> examples = from_arrays(np.zeros((8, 1)), [0, 0, 0, 0, 0, 0, 1, 1])
  >>> few = some_labels(examples, 0.5, data_seed=0)
  >>> float(few.sum()), float(few[6:].sum())
  (4.0, 1.0)
  """
  if not isinstance(examples, Examples):
    raise TypeError(
      f"some_labels needs Examples, whose labels are in memory, got {type(examples).__name__}."
    )
  if not examples.has_labels:
    raise ValueError(f"{examples.name!r} has no labels to choose from.")
  if examples.labels.ndim != 1 or examples.labels.dtype.kind != "i":
    raise ValueError(
      f"the labels of {examples.name!r} are {examples.labels.dtype}{list(examples.labels.shape)}, "
      "and some_labels takes each class in proportion: of others choose rows yourself, by "
      "labelled= of the source."
    )
  _check.number("share", share, least=0, most=1)
  size = len(examples)
  present, count = np.unique(examples.labels), round(share * size)
  if share > 0 and count < len(present):
    raise ValueError(
      f"share={share} of {size} examples is {count} labels, too few for one of each of the "
      f"{len(present)} classes: take a share of at least {_rounded_up(len(present), size)}, or 0."
    )
  # Each class's rows are spread over 0 .. 1 in random order, so that any prefix of all rows by
  # that number has the classes in proportion; the first of each class is set to 0, to be in all.
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
