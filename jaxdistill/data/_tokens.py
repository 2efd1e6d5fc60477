"""Text as batches of tokens: the one shift, documents packed into rows, prompts masked.

Everywhere else ``labels[b, l]`` is what position l predicts, and nobody shifts anything: losses,
metrics, caches and samplers all see predictions at the position that makes them. So the shift is
here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import pathlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxdistill import _check
from jaxdistill.data._examples import Examples, from_arrays
from jaxdistill.data._views import check_seed, epoch_order
from jaxdistill.data.tokenizers import Tokenizer

__all__ = ["Packed", "from_text", "pack", "shifted"]

# In the place of an epoch's number, for the order in which documents are packed.
_PACKING = 0x7061636B


@dataclasses.dataclass(frozen=True)
class Packed:
  """Documents side by side in rows of one length; N rows of L predictions.

  Attributes:
    tokens: ``[N, L]`` int32, what the network reads.
    labels: ``[N, L]`` int32, the token after each: what position l predicts.
    weight: ``[N, L]`` float32, 0 where there is nothing to predict or nothing to be learnt.
    segments: ``[N, L]`` int32, which document of its row a token is of, from 1; 0 is padding.
    positions: ``[N, L]`` int32, inside the document, from 0.
    documents: ``[N, L]`` int32, which of the documents given a token is of, from 0, all pieces of
      one that was cut alike; −1 at padding.
    lost: how many predictions were left out (``split="drop"``).
  """

  tokens: np.ndarray
  labels: np.ndarray
  weight: np.ndarray
  segments: np.ndarray
  positions: np.ndarray
  documents: np.ndarray
  lost: int = 0

  @property
  def inputs(self) -> dict[str, np.ndarray]:
    """What `networks.models.Decoder` takes: ``tokens``, ``positions`` and ``segments``."""
    return {"tokens": self.tokens, "positions": self.positions, "segments": self.segments}


def shifted(
  tokens: Any, *, where: Any = None, vocabulary: int | None = None
) -> tuple[Any, Any, Any]:
  """Windows of a text as what is read, what is predicted, and what of it counts.

  Args:
    tokens: ``[B, L+1]`` integers; NumPy's or JAX's.
    where: ``[B, L+1]``, which tokens may be learnt: 0 for a prompt's, which are read and not
      predicted. None for all.
    vocabulary: V, which all tokens must lie below; None does not ask. The values of tokens and
      weights are looked at where they are NumPy's, on the host.

  Returns:
    ``(inputs, labels, weight)``, each ``[B, L]``: ``labels[b, l]`` is ``tokens[b, l + 1]`` and
    ``weight[b, l]`` is ``where[b, l + 1]``, float32.

  Raises:
    ValueError: the shapes or dtypes are others, a window has fewer than two tokens, or a token or a
      weight is out of range; the message names the row and the position.

  >>> inputs, labels, weight = shifted(np.array([[5, 6, 7, 8]]), where=[[0, 0, 1, 1]])
  >>> inputs.tolist(), labels.tolist(), weight.tolist()
  ([[5, 6, 7]], [[6, 7, 8]], [[0.0, 1.0, 1.0]])
  """
  dtype, shape = getattr(tokens, "dtype", None), np.shape(tokens)
  if dtype is None or not jnp.issubdtype(dtype, jnp.integer) or len(shape) != 2:
    raise ValueError(f"tokens={_check.show(tokens)} must be an array of integers [B, L + 1].")
  if shape[1] < 2:
    raise ValueError(f"tokens has the shape {shape}: the last of L + 1 tokens is predicted alone.")
  if vocabulary is not None:
    _check.whole("vocabulary", vocabulary)
  xp = np if isinstance(tokens, np.ndarray) else jnp
  if where is None:
    known = xp.ones(shape, np.float32)
  else:
    try:
      known = xp.asarray(where, np.float32)
    except (TypeError, ValueError) as error:
      raise ValueError(
        f"where={_check.show(where)} must be numbers, one a token: {_check.short(error)}."
      ) from error
  if known.shape != shape:
    raise ValueError(f"where has the shape {known.shape}, and tokens {shape}; give one a token.")
  if xp is np:
    _check.tokens("tokens", tokens, vocabulary)
    _check_weights("where", known)
  return tokens[:, :-1], tokens[:, 1:], known[:, 1:]


def pack(
  documents: Sequence[Any],
  *,
  length: int,
  where: Sequence[Any] | None = None,
  split: str = "cut",
  pad: int = 0,
  vocabulary: int | None = None,
  data_seed: int = 0,
) -> Packed:
  """Lays documents side by side into rows, each prediction of each document exactly once.

  A document of T tokens has T - 1 predictions and takes as many places: its last token is a label
  only. So no place predicts the next document's first token, and a real end-of-text token is
  learnt, whatever number padding has: the weight says what counts, never a token.

  Documents go, in an order that ``data_seed`` decides, each into the first row with room for it.

  Args:
    documents: ``[T]`` integers each, T at least 2.
    length: L, predictions of a row.
    where: for each document ``[T]``, which of its tokens may be learnt (answers, not prompts): 0 or
      1, or how much. None for all.
    split: what becomes of a document of more than L predictions. ``"cut"``: pieces, which overlap
      by the one token that ends one and begins the next, so that no prediction is lost; each is a
      segment with positions from 0. ``"drop"``: nothing, and its predictions are counted in
      ``lost``. ``"pad"``: it is cut, and every piece has a row to itself, in the order given.
    pad: the token at places without one.
    vocabulary: V, which all tokens must lie below; None does not ask.
    data_seed: decides the order.

  Returns:
    The rows.

  Raises:
    ValueError: there is nothing to predict, a document is too short, or a token or a weight is out
      of range; the message names the document and the place.

  >>> packed = pack([np.array([1, 2, 3]), np.array([4, 5])], length=4)
  >>> packed.weight.sum(), sorted(set(packed.segments[0].tolist()))
  (np.float32(3.0), [0, 1, 2])
  """
  _check.whole("length", length)
  _check.whole("pad", pad, least=0, most=(vocabulary or 2**31) - 1)
  check_seed(data_seed)
  if split not in ("cut", "drop", "pad"):
    raise ValueError(f"split={split!r} must be 'cut', 'drop' or 'pad'.")
  documents = _several("documents", documents)
  if where is not None and len(where := _several("where", where)) != len(documents):
    raise ValueError(f"where has {len(where)} entries for {len(documents)} documents.")
  pieces: list[tuple[np.ndarray, np.ndarray, int]] = []
  lost = 0
  for i, document in enumerate(documents):
    tokens = _document(document, i, vocabulary)
    known = np.ones(len(tokens), np.float32) if where is None else _known(where[i], i, len(tokens))
    if split == "drop" and len(tokens) - 1 > length:
      lost += len(tokens) - 1
      continue
    for start in range(0, len(tokens) - 1, length):
      here = slice(start, start + length + 1)
      pieces.append((tokens[here], known[here], i))
  if not pieces:
    raise ValueError(
      f"documents has {len(documents)} entries, and none of at most length={length} predictions: "
      "nothing is left to predict."
    )
  if split == "pad":
    order, rows = np.arange(len(pieces)), list(range(len(pieces)))
  else:
    order = epoch_order(data_seed, _PACKING, len(pieces))
    rows = _first_fit([len(pieces[i][0]) - 1 for i in order.tolist()], length)
  return dataclasses.replace(_laid(pieces, order, rows, length, pad), lost=lost)


def _laid(
  pieces: Sequence[tuple[np.ndarray, np.ndarray, int]],
  order: np.ndarray,
  rows: Sequence[int],
  length: int,
  pad: int,
) -> Packed:
  """Pieces, in this order, in these rows."""
  shape = (max(rows) + 1, length)
  tokens, labels = np.full(shape, pad, np.int32), np.full(shape, pad, np.int32)
  segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  weight, documents = np.zeros(shape, np.float32), np.full(shape, -1, np.int32)
  ends, counts = np.zeros(shape[0], int), np.zeros(shape[0], int)
  for i, row in zip(order.tolist(), rows, strict=True):
    piece, known, document = pieces[i]
    size = len(piece) - 1
    here = slice(ends[row], ends[row] + size)
    ends[row] += size
    counts[row] += 1
    tokens[row, here], labels[row, here], weight[row, here] = piece[:-1], piece[1:], known[1:]
    segments[row, here], positions[row, here] = counts[row], np.arange(size)
    documents[row, here] = document
  return Packed(tokens, labels, weight, segments, positions, documents)


def _first_fit(sizes: Sequence[int], length: int) -> list[int]:
  """For each size the first row that has room for it beside those before."""
  # A tree over the rows whose nodes know the most room below them: a million documents are found
  # their rows in log(rows) steps each.
  leaves = 1 << (len(sizes) - 1).bit_length()
  room = [length] * (2 * leaves)
  rows = []
  for size in sizes:
    node = 1
    while node < leaves:
      node = 2 * node + (room[2 * node] < size)  # the left one, if it has the room
    rows.append(node - leaves)
    room[node] -= size
    while node > 1:
      node //= 2
      room[node] = max(room[2 * node], room[2 * node + 1])
  return rows


def _several(name: str, value: Any) -> Sequence[Any]:
  """What can be gone through, once for all: of a generator its values."""
  if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
    raise TypeError(f"{name}={_check.show(value)} must be a sequence, one entry a document.")
  return value if isinstance(value, Sequence) else list(value)


def _document(document: Any, number: int, vocabulary: int | None) -> np.ndarray:
  """A document's tokens as int32."""
  try:
    tokens = np.asarray(document)
  except ValueError as error:  # nested and of several lengths
    raise ValueError(
      f"documents[{number}]={_check.show(document)} must be integers [T]: {_check.short(error)}."
    ) from error
  if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
    raise ValueError(
      f"documents[{number}] must be integers [T], got {tokens.dtype} of shape {tokens.shape}."
    )
  if len(tokens) < 2:
    raise ValueError(
      f"documents[{number}] has {len(tokens)} tokens, and nothing to predict: leave it out, or "
      "join it with its neighbour."
    )
  _check.tokens(f"documents[{number}]", tokens, vocabulary)
  return tokens.astype(np.int32)


def _known(where: Any, number: int, size: int) -> np.ndarray:
  """Which of a document's tokens may be learnt."""
  known = np.asarray(where)
  if known.shape != (size,) or known.dtype.kind not in "biuf":
    raise ValueError(
      f"where[{number}] must be numbers [{size}], one a token, got {_check.show(known)}."
    )
  known = known.astype(np.float32)
  _check_weights(f"where[{number}]", known)
  return known


def _check_weights(name: str, known: np.ndarray) -> None:
  """Raises for a weight that is negative or not finite."""
  bad = ~np.isfinite(known) | (known < 0)
  if bad.any():
    *row, position = np.argwhere(bad)[0].tolist()
    raise ValueError(
      f"{name}{row or ''} must be finite and not negative, and is {known[(*row, position)]} at "
      f"position {position}."
    )


def from_text(
  texts: Any,
  tokenizer: Tokenizer,
  *,
  length: int,
  field: str = "text",
  prompt: str | None = None,
  end: int | None = None,
  split: str = "cut",
  data_seed: int = 0,
  name: str = "text",
) -> Examples:
  """Text as examples of packed tokens, for any source: on the device, or streamed.

  Args:
    texts: a text, or a file (``pathlib.Path``) of UTF-8; an iterable of texts, bytes or files, each
      a document; `Examples` whose inputs are such (``load("tiny_shakespeare", inputs="text",
      labels=None)``); or rows that are dicts.
    tokenizer: of `jaxdistill.data.tokenizers`.
    length: L, predictions of an example.
    field: the key of a row's text, where rows are dicts.
    prompt: the key of what comes before it, which is read and not learnt; None for nothing.
    end: the token that ends every document, such as the tokenizer's end of text; None for none.
    split: what becomes of documents longer than ``length``, see `pack`.
    data_seed: decides which documents lie side by side.
    name: for reports.

  Returns:
    Examples: ``inputs`` a dict of ``tokens``, ``positions`` and ``segments`` ``[N, L]``, ``labels``
    and ``weight`` ``[N, L]``, ``num_classes`` V. ``version`` has the tokenizer's digest, so that a
    run or a cache of other tokens is another, and ``tokenizer`` is it. ``documents`` says which
    text each token is of.

  Raises:
    TypeError: ``texts`` is nothing of these, or ``tokenizer`` is none.
    ValueError: a row lacks a field, or see `pack`.

  >>> from jaxdistill.data import tokenizers
  >>> examples = from_text(["To be, or not", "to be"], tokenizers.utf8(), length=8)
  >>> examples.labels.shape, int(examples.weight.sum())
  ((2, 8), 16)
  """
  if not isinstance(tokenizer, Tokenizer):
    raise TypeError(
      f"tokenizer={_check.show(tokenizer)} must be one of data.tokenizers: utf8(), "
      "characters(...), load('tokenizer.json')."
    )
  if end is not None:
    _check.whole("end", end, least=0, most=tokenizer.vocabulary - 1)
  close = np.array([] if end is None else [end], np.int32)
  documents, known = [], []
  for before, text in _texts(texts, field, prompt):
    parts = [tokenizer.encode(before) if before else close[:0], tokenizer.encode(text), close]
    documents.append(np.concatenate(parts))
    if len(documents[-1]) < 2:
      raise ValueError(
        f"texts[{len(documents) - 1}] has {len(documents[-1])} tokens, and nothing to predict: "
        "leave it out, or join it with its neighbour."
      )
    known.append(np.arange(len(documents[-1])) >= len(parts[0]))
  packed = pack(
    documents,
    length=length,
    where=known,
    split=split,
    vocabulary=tokenizer.vocabulary,
    data_seed=data_seed,
  )
  if packed.lost:
    warnings.warn(
      f"split='drop' left out {packed.lost} predictions of documents longer than length={length}.",
      stacklevel=2,
    )
  examples = from_arrays(
    packed.inputs, packed.labels, num_classes=tokenizer.vocabulary, weight=packed.weight, name=name
  )
  digest = tokenizer.digest
  return dataclasses.replace(
    examples, version=f"tokenizer {digest}", tokenizer=digest, documents=packed.documents
  )


def _texts(texts: Any, field: str, prompt: str | None) -> Iterator[tuple[str, str]]:
  """``(prompt, text)`` of each document."""
  if isinstance(texts, Examples):
    texts = texts.inputs
  if isinstance(texts, str | bytes | pathlib.Path):
    texts = [texts]
  if isinstance(texts, Mapping) or not isinstance(texts, Iterable):
    raise TypeError(
      f"texts={_check.show(texts)} must be a text, a pathlib.Path, or an iterable of texts, paths "
      "or rows that are dicts."
    )
  for i, one in enumerate(texts):
    if not isinstance(one, Mapping):
      if prompt is not None:
        raise ValueError(f"prompt={prompt!r} is a row's key, and texts[{i}] is no dict.")
      yield "", _text(one, i)
      continue
    lacking = [key for key in (field, prompt) if key is not None and key not in one]
    if lacking:
      raise ValueError(f"texts[{i}] has no {lacking}; it has {sorted(map(str, one))}.")
    yield "" if prompt is None else _text(one[prompt], i), _text(one[field], i)


# The longest name that a file has on common systems: what is longer names none.
_NAME = 255


def _text(value: Any, number: int) -> str:
  if isinstance(value, pathlib.Path):
    if not value.is_file():
      kind = "a folder" if value.is_dir() else "not there"
      raise FileNotFoundError(f"texts[{number}]={str(value)!r} is {kind}: give files of UTF-8.")
    value = value.read_bytes()
  short = isinstance(value, str) and len(value) <= _NAME and value.isprintable()
  if short and pathlib.Path(value).is_file():  # it would be trained on its name
    raise ValueError(
      f"texts[{number}]={value!r} is the name of a file, and texts are taken as they are: give "
      "pathlib.Path(...) for what is in it."
    )
  if isinstance(value, bytes):
    try:
      return value.decode("utf-8")
    except UnicodeDecodeError as error:
      raise ValueError(f"texts[{number}] is no UTF-8: {error}.") from error
  if not isinstance(value, str):
    raise TypeError(f"texts[{number}]={_check.show(value)} must be text, bytes or a pathlib.Path.")
  return value
