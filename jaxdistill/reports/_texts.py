"""Sample texts of a report: what teacher, baseline and student make of the same beginnings.

They are kept in ``texts.json`` beside the report, with the seed, temperature and length that they
were drawn with, so that pages are made again without running a network.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import _check, networks, runs
from jaxdistill.data import Examples
from jaxdistill.data.tokenizers import Tokenizer
from jaxdistill.reports._format import MODELS
from jaxdistill.reports._pages.evidence import TEXTS, suffix
from jaxdistill.types import Model, Teacher

__all__ = ["Texts", "write_texts"]


@dataclasses.dataclass(frozen=True)
class Texts:
  """How sample texts of a report are drawn.

  Attributes:
    tokenizer: of the examples' tokens.
    count: how many beginnings are gone on with; they are taken from all over the split.
    prompt: how many tokens each has.
    length: how many are drawn. A model sees the latest of them, as many as the examples' windows
      have: it was hardly trained on more.
    temperature: 0 takes the most likely token throughout; 1 the model's own distribution.
    seed: of the random key, which every model is given: the same noise for all.
    decoders: by the model's name, its module where that keeps a cache (`networks.CachingDecoder`,
      as `networks.models.Decoder` is), which saves running it again for each token.

  Raises:
    TypeError: an attribute is of another kind.
    ValueError: a number is out of range.
  """

  tokenizer: Tokenizer
  count: int = 4
  prompt: int = 32
  length: int = 128
  temperature: float = 0.8
  seed: int = 0
  decoders: Mapping[str, networks.CachingDecoder] = dataclasses.field(default_factory=dict)

  def __post_init__(self) -> None:
    if not isinstance(self.tokenizer, Tokenizer):
      raise TypeError(
        f"tokenizer={_check.show(self.tokenizer)} must be one of data.tokenizers: utf8(), "
        "characters(...), load('tokenizer.json')."
      )
    for name in ("count", "prompt", "length"):
      _check.whole(name, getattr(self, name))
    _check.number("temperature", self.temperature, least=0)
    _check.whole("seed", self.seed, least=0)
    if not isinstance(self.decoders, Mapping) or not set(self.decoders) <= set(MODELS):
      raise TypeError(
        f"decoders={_check.show(self.decoders)} must be modules by the names of models, of "
        f"{list(MODELS)}."
      )
    for name, one in self.decoders.items():
      networks.check_decoder(f"decoders[{name!r}]", one)


def write_texts(
  folder: str | os.PathLike[str],
  texts: Texts,
  models: Mapping[str, Model | Teacher],
  examples: Examples,
  *,
  split: str = "test",
) -> pathlib.Path:
  """Draws sample texts and writes them where a report finds them.

  Args:
    folder: the report's, made if need be.
    texts: how they are drawn.
    models: ``teacher``, ``baseline`` and ``student``, or some of them; of several seeds the first
      is asked.
    examples: of `data.from_text`, held out: their windows begin the texts.
    split: which split they are of.

  Returns:
    The path of ``texts.json``.

  Raises:
    TypeError: ``examples`` are no tokens, or a model is none.
    ValueError: the examples are of another tokenizer, no window is long enough, or see
      `networks.sample`.
  """
  place = _check.folder("folder", folder)
  if not isinstance(models, Mapping):
    raise TypeError(f"models={_check.show(models)} must be models by name, of {list(MODELS)}.")
  unknown = sorted(set(models) - set(MODELS))
  if unknown or not models:
    raise ValueError(f"models has {unknown or 'none'}; they are some of {list(MODELS)}.")
  rows, prompts = _beginnings(texts, examples)
  path = place / TEXTS.format(suffix(split))
  found: dict[str, Any] = {}
  for name in (name for name in MODELS if name in models):
    model = models[name]
    found[name] = networks.sample(
      model.instance(0) if isinstance(model, Model) else model,
      prompts,
      key=jax.random.key(texts.seed),
      length=texts.length,
      temperature=texts.temperature,
      index=rows,
      inputs=_inputs_of(examples),
      decoder=texts.decoders.get(name),
      window=examples.labels.shape[1],
    )
  told = texts.tokenizer.decode
  place.mkdir(parents=True, exist_ok=True)
  runs.write_json(
    path,
    {
      "version": 1,
      "split": split,
      "seed": texts.seed,
      "temperature": float(texts.temperature),
      "length": texts.length,
      "texts": [
        {
          "index": int(row),
          "prompt": told(prompts[i]),
          "goes_on": told(_rest(examples, int(row), texts).tolist()),
          "said": {name: told(made[i, texts.prompt :]) for name, made in found.items()},
        }
        for i, row in enumerate(rows)
      ],
    },
  )
  return path


def _beginnings(texts: Texts, examples: Any) -> tuple[np.ndarray, np.ndarray]:
  """Windows from all over the split, and the tokens with which each begins ``[count, prompt]``."""
  inputs = examples.inputs if isinstance(examples, Examples) else None
  tokens = inputs.get("tokens") if isinstance(inputs, Mapping) else inputs
  if not isinstance(tokens, np.ndarray) or tokens.ndim != 2 or tokens.dtype.kind not in "iu":
    raise TypeError(
      f"examples={_check.show(examples)} must be Examples of tokens [N, L], from data.from_text."
    )
  if examples.tokenizer and examples.tokenizer != texts.tokenizer.digest:
    raise ValueError(
      f"examples are of the tokenizer {examples.tokenizer} and texts.tokenizer is "
      f"{texts.tokenizer.digest}: their tokens would be read as other text."
    )
  length = tokens.shape[1]
  whole = np.full(len(tokens), texts.prompt <= length)
  if isinstance(inputs, Mapping) and "segments" in inputs and texts.prompt <= length:
    # All of a beginning is of one document.
    whole &= (inputs["segments"][:, : texts.prompt] == inputs["segments"][:, :1]).all(axis=1)
    whole &= inputs["segments"][:, 0] > 0
  there = np.flatnonzero(whole)
  if not len(there):
    raise ValueError(
      f"texts.prompt={texts.prompt}, and no window of {length} tokens begins with as many of one "
      "document: take a shorter prompt."
    )
  at = np.unique(np.linspace(0, len(there) - 1, texts.count).round().astype(int))
  rows = there[at]
  return rows, tokens[rows, : texts.prompt]


def _inputs_of(examples: Examples) -> Callable[[Any], Any] | None:
  """What makes of a window what networks read of these examples; None where that is the tokens."""
  if not isinstance(examples.inputs, Mapping):
    return None
  names = tuple(sorted(examples.inputs))
  unknown = sorted(set(names) - {"tokens", "positions", "segments"})
  if unknown:
    raise TypeError(
      f"examples have the inputs {unknown} beside tokens, positions and segments, of which nobody "
      "knows how they go on: draw texts by networks.sample(..., inputs=)."
    )
  return _named(names)


@functools.cache  # one function for the same names: programs are told apart by it
def _named(names: tuple[str, ...]) -> Callable[[Any], Any]:
  def inputs(tokens: Any) -> dict[str, Any]:
    at = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    made = {"tokens": tokens, "positions": at, "segments": jnp.ones_like(tokens)}
    return {name: made[name] for name in names}

  return inputs


def _rest(examples: Examples, row: int, texts: Texts) -> np.ndarray:
  """How the text itself goes on, as far as its window does."""
  first = texts.prompt - 1  # whose label is the token after the prompt
  inputs = examples.inputs
  same = np.ones(examples.labels.shape[1], bool)
  if isinstance(inputs, Mapping) and "segments" in inputs:
    same = inputs["segments"][row] == inputs["segments"][row, 0]
  labels: np.ndarray = examples.labels[row, first:][same[first:]]
  return labels[: texts.length]
