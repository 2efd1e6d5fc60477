"""Tokenizers: bytes and characters without any library, byte-pair encodings by `tokenizers`.

A `Tokenizer` is two functions and what has to be known of its tokens: how many there are, how many
bytes of text each stands for, and a digest. Two networks read the same tokens where the digests are
equal; that their vocabularies are as large proves nothing.

How many bytes a token stands for makes losses comparable: nats a token depend on how a text is cut,
bits a byte do not.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxdistill import _check, _extras, runs

__all__ = ["Tokenizer", "characters", "load", "trained", "utf8"]


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Text to numbers and back.

  Attributes:
    encode: ``text -> [T]`` int32; adds no tokens of its own.
    decode: ``[T] -> text``; the library's own refuse a token that is none.
    vocabulary: V; tokens are 0 .. V-1.
    bytes: ``[V]`` int32, UTF-8 bytes of text that each stands for, 0 for special ones: bits a
      byte are Σ nll / (ln 2 · Σ bytes). None where the tokenizer's kind does not tell, or where it
      changes a text before it cuts it. One that puts a space in front has a byte more a text.
    digest: of all that decides what it does.
    definition: the content of its ``tokenizer.json``, which belongs beside a saved network; None
      where it has none.
  """

  encode: Callable[[str], np.ndarray] = dataclasses.field(repr=False)
  decode: Callable[[Sequence[int]], str] = dataclasses.field(repr=False)
  vocabulary: int
  bytes: np.ndarray | None = dataclasses.field(repr=False)
  digest: str
  definition: str | None = dataclasses.field(default=None, repr=False)


def utf8() -> Tokenizer:
  """The bytes of UTF-8 as tokens: V is 256, any text can be told, nothing is learnt.

  >>> tokenizer = utf8()
  >>> tokenizer.encode("né").tolist(), tokenizer.decode([110, 195, 169])
  ([110, 195, 169], 'né')
  """
  return Tokenizer(
    encode=_bytes_of,
    decode=lambda tokens: bytes(_known(tokens, 256)).decode("utf-8", "replace"),
    vocabulary=256,
    bytes=np.ones(256, np.int32),
    digest=runs.short_digest({"kind": "utf8"}),
  )


def _bytes_of(text: str) -> np.ndarray:
  try:
    return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)
  except UnicodeEncodeError as error:
    raise ValueError(
      f"the text has {text[error.start]!r} at {error.start}, half of a character, as reading bytes "
      "that are no text leaves it: read the file by its own encoding, or errors='replace'."
    ) from error


def characters(texts: str | Iterable[str]) -> Tokenizer:
  """The characters that occur in texts as tokens, in their order: 65 in Shakespeare's.

  Args:
    texts: a text, or several.

  Returns:
    The tokenizer, whose ``encode`` refuses other characters.

  Raises:
    ValueError: there is no character.

  >>> tokenizer = characters("to be")
  >>> tokenizer.vocabulary, tokenizer.encode("bet").tolist(), tokenizer.decode([1, 2, 4])
  (5, [1, 2, 4], 'bet')
  """
  alphabet = sorted(set().union(*([texts] if isinstance(texts, str) else texts)))
  if not alphabet:
    raise ValueError("texts has no character: give what the network shall read.")
  number = {character: i for i, character in enumerate(alphabet)}

  def encode(text: str) -> np.ndarray:
    try:
      return np.fromiter((number[character] for character in text), np.int32, len(text))
    except KeyError as error:
      raise ValueError(
        f"the character {error.args[0]!r} is none of the tokenizer's {len(alphabet)}: make it of "
        "all texts, or use utf8()."
      ) from None

  return Tokenizer(
    encode=encode,
    decode=lambda tokens: "".join(alphabet[i] for i in _known(tokens, len(alphabet))),
    vocabulary=len(alphabet),
    bytes=np.array([len(character.encode()) for character in alphabet], np.int32),
    digest=runs.short_digest({"kind": "characters", "alphabet": alphabet}),
  )


def load(path: str | os.PathLike[str]) -> Tokenizer:
  """A ``tokenizer.json``, as nearly every published language model has one.

  Args:
    path: the file, or a folder that holds it.

  Raises:
    MissingExtraError: the library ``tokenizers`` is not installed.
    FileNotFoundError: there is no such file.
    ValueError: it is no tokenizer.
  """
  _extras.need("data.tokenizers.load", "tokenizers")
  import tokenizers

  file = _check.folder("path", path)
  file = file / "tokenizer.json" if file.is_dir() else file
  if not file.is_file():
    raise FileNotFoundError(f"there is no tokenizer at path={file}.")
  try:
    found = tokenizers.Tokenizer.from_file(str(file))
  except Exception as error:  # the library raises plain Exceptions
    raise ValueError(f"path={file} is no tokenizer.json: {error}.") from error
  return _wrapped(found)


def trained(texts: Iterable[str], vocabulary: int, *, special: Sequence[str] = ()) -> Tokenizer:
  """Trains a byte-pair encoding on bytes, as GPT-2's and Llama 3's are; nothing in it is random.

  Args:
    texts: what to train on.
    vocabulary: V, at most; 256 bytes and the special tokens are among them.
    special: texts of special tokens, which get the first numbers.

  Returns:
    The tokenizer; any text can be told.

  Raises:
    MissingExtraError: the library ``tokenizers`` is not installed.
    ValueError: ``vocabulary`` has no room for the bytes.
  """
  _extras.need("data.tokenizers.trained", "tokenizers")
  import tokenizers

  _check.whole("vocabulary", vocabulary, least=256 + len(special))
  if isinstance(texts, str):
    raise TypeError("texts must be several texts, got one: give [text].")
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocabulary,
    show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    special_tokens=list(special),
  )
  made.train_from_iterator(texts, trainer)
  return _wrapped(made)


def _wrapped(made: Any) -> Tokenizer:
  """A tokenizer of the library as one of ours."""
  definition = made.to_str(pretty=True)
  # A vocabulary may have holes; the network has rows for them.
  vocabulary = max(made.get_vocab(with_added_tokens=True).values()) + 1
  return Tokenizer(
    encode=lambda text: np.array(made.encode(text, add_special_tokens=False).ids, np.int32),
    decode=lambda tokens: made.decode(_known(tokens, vocabulary), skip_special_tokens=False),
    vocabulary=vocabulary,
    bytes=_bytes(json.loads(definition), made.get_vocab(with_added_tokens=True), vocabulary),
    digest=runs.short_digest(json.loads(definition)),
    definition=definition,
  )


def _known(tokens: Any, vocabulary: int) -> list[int]:
  """Tokens of the vocabulary: others would be wrapped, or counted from the end, to other text."""
  numbers = np.asarray(tokens)
  if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
    raise ValueError(f"tokens={_check.show(tokens)} must be integers [T].")
  _check.tokens("tokens", numbers, vocabulary)
  return [int(one) for one in numbers]


# Where a step of `tokenizers` that is a sequence has its own.
_PARTS = ("decoders", "pretokenizers", "normalizers")


def _bytes(told: Any, numbers: dict[str, int], vocabulary: int) -> np.ndarray | None:
  """UTF-8 bytes of each token, by the way in which its text is written in the vocabulary."""

  def kinds(node: Any) -> set[str]:
    if not isinstance(node, dict):
      return set()
    inside = [one for name in _PARTS for one in node.get(name, ())]
    return {node.get("type", "")}.union(*map(kinds, inside))

  there = kinds(told.get("decoder")) | kinds(told.get("pre_tokenizer"))
  special = {entry["content"]: entry["special"] for entry in told.get("added_tokens", ())}
  # A text in small letters, or composed otherwise, has other bytes than what was read.
  changes = kinds(told.get("normalizer")) - {"Prepend", "Replace", "Sequence"}
  if changes or not there & {"ByteLevel", "ByteFallback", "Metaspace"}:
    return None
  found = np.zeros(vocabulary, np.int32)
  for text, number in numbers.items():
    if text in special:
      found[number] = 0 if special[text] else len(text.encode())
    elif "ByteLevel" in there:
      found[number] = len(text)  # one printable character stands for each byte
    elif len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
      found[number] = 1  # a byte that no token of text has
    else:
      found[number] = len(text.replace("▁", " ").encode())
  return found
