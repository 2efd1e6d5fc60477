"""Text of a language model: tokens drawn one after another, from any causal network.

A network is run again over the whole window for every token, which asks nothing of it; our decoder
keeps the keys and values of the tokens before (`models.decoder.Cache`), and draws the same tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import _check
from jaxdistill.networks.models import Decoder
from jaxdistill.networks.models.decoder import Cache
from jaxdistill.types import Model, Outputs, Teacher, make_batch, with_logits

__all__ = ["sample"]

# Of the logits' size: what rounding may change where later tokens are others.
_ROUNDING = 1e-3


def sample(
  model: Model | Teacher,
  prompts: Any,
  *,
  key: Any,
  length: int,
  temperature: float = 1.0,
  index: Any = None,
  inputs: Callable[[Any], Any] | None = None,
  decoder: Decoder | None = None,
  window: int | None = None,
) -> np.ndarray:
  """Continues prompts, token by token, in one compiled program.

  A token is drawn of ``softmax(logits / temperature)`` in float32, by a key that is folded with the
  row's ``index`` and the token's position: what a row becomes depends neither on its neighbours nor
  on how many there are.

  Args:
    model: a causal network that puts out logits ``[B, L, V]``, or ``hidden`` and ``head``; or a
      teacher.
    prompts: ``[B, P]`` integers, P at least 1.
    key: a random key; with temperature 0 it decides nothing.
    length: how many tokens are drawn for each.
    temperature: 0 takes the most likely token; 1 the model's own distribution.
    index: ``[B]``, which example each row is; ``0 .. B-1`` by default.
    inputs: ``tokens [B, W] -> inputs`` of the network, where it takes other than tokens
      alone. Later tokens than those it is asked about are 0 then, and it must not look at them.
    decoder: where the model is a `models.Decoder`, that module: the cache takes the place of
      running it again, which costs the square of the length.
    window: how many tokens the model sees at most, as many as it was trained on: of longer texts
      the latest. The cache, which forgets nothing, serves up to there. None for all.

  Returns:
    ``[B, P + length]`` int32 on the host: prompts and what was drawn.

  Raises:
    TypeError: an argument is of another kind than it must be.
    ValueError: one is out of range, a prompt has a token that is none, the model holds several
      seeds or puts out no logits of tokens, or it is not causal: earlier logits change with later
      tokens.

  >>> from jaxdistill import networks
  >>> from jaxdistill.networks.models import DecoderConfig
  >>> decoder = Decoder(DecoderConfig(9, 8, layers=1, heads=2, kv_heads=1, head_dim=4, hidden=8))
  >>> network = networks.linen(decoder)
  >>> model = Model(network, network.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))
  >>> sample(model, [[1, 2], [3, 4]], key=jax.random.key(1), length=3).shape
  (2, 5)
  """
  _check.whole("length", length)
  _check.number("temperature", temperature, least=0)
  if not isinstance(model, Model | Teacher) or (isinstance(model, Model) and model.seeds):
    raise TypeError(
      f"model={_check.show(model)} must be a Model of one seed (one of model.unstack()) or a "
      "Teacher."
    )
  if isinstance(model, Model):  # without what a run's state and history add to it
    model = Model(model.network, model.variables)
  if decoder is not None and not isinstance(decoder, Decoder):
    raise TypeError(f"decoder={_check.show(decoder)} must be the models.Decoder of the model.")
  given = np.asarray(prompts)
  if given.ndim != 2 or given.dtype.kind not in "iu" or not given.size:
    raise ValueError(
      f"prompts={_check.show(prompts)} must be integers [B, P], at least one token each."
    )
  rows = np.arange(len(given)) if index is None else np.asarray(index)
  if rows.shape != given.shape[:1] or rows.dtype.kind not in "iu":
    raise ValueError(f"index={_check.show(index)} must be {len(given)} integers, one a prompt.")
  whole = given.shape[1] + length
  seen = whole if window is None else min(whole, _check.whole("window", window))
  asked = jax.ShapeDtypeStruct((len(given), seen), np.int32)
  shapes = jax.eval_shape(
    lambda model, tokens: with_logits(_outputs(model, tokens, inputs)), model, asked
  ).logits
  if shapes is None or shapes.shape[:2] != asked.shape:
    raise ValueError(
      "model must put out logits [B, L, V] (or hidden and head) of tokens [B, L], and puts out "
      f"{None if shapes is None else list(shapes.shape)} of {list(asked.shape)}."
    )
  _check.tokens("prompts", given, shapes.shape[-1])
  drawn = {"length": length, "greedy": temperature == 0}
  rest = (given.astype(np.int32), rows.astype(np.uint32), key, max(temperature, 1e-30))
  if decoder is not None and seen == whole:
    return np.asarray(_by_cache(model.variables, *rest, decoder=decoder, **drawn))
  tokens, apart = jax.device_get(_anew(model, *rest, inputs=inputs, window=seen, **drawn))
  if np.isnan(apart):
    raise ValueError("model puts out NaN for the prompts: look whether it was trained.")
  if not apart <= _ROUNDING:
    raise ValueError(
      f"model is not causal: the logits of a first token change by {apart:.2g} of their size with "
      "the tokens after it, so that it cannot be asked for the next."
    )
  return np.asarray(tokens)


def _outputs(model: Model | Teacher, tokens: Any, inputs: Any) -> Outputs:
  """What a model puts out for a window."""
  seen = tokens if inputs is None else inputs(tokens)
  return model(make_batch(seen) if isinstance(model, Teacher) else seen)


@functools.partial(jax.jit, static_argnames=("inputs", "window", "length", "greedy"))
def _anew(
  model: Model | Teacher,
  prompts: Any,
  index: Any,
  key: Any,
  temperature: Any,
  *,
  inputs: Any,
  window: int,
  length: int,
  greedy: bool,
) -> tuple[Any, Any]:
  """Tokens of a network that is run over the window again for each; and how little it looks ahead.

  The window has one length throughout, so that one program serves. Tokens that are not drawn yet
  are 0, and a causal network does not see them.
  """
  B, P = prompts.shape
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)

  def logits_at(tokens: Any, at: Any) -> Any:
    start = jnp.maximum(at + 1 - window, 0)
    out = _outputs(model, jax.lax.dynamic_slice_in_dim(tokens, start, window, axis=1), inputs)
    whole = out.logits is not None
    one = jax.tree.map(
      lambda x: jax.lax.dynamic_slice_in_dim(x, at - start, 1, axis=1),
      out.logits if whole else out.hidden,
    )
    return (one if whole else out.head(one))[:, 0].astype(jnp.float32)  # [B, V]

  def draw(i: Any, tokens: Any) -> Any:
    made = _drawn(logits_at(tokens, P + i - 1), keys, P + i, temperature, greedy)
    return jax.lax.dynamic_update_slice_in_dim(tokens, made[:, None], P + i, axis=1)

  begin = jnp.concatenate([prompts, jnp.zeros((B, length), jnp.int32)], axis=1)
  # Of the whole window at its first token, where all the rest comes later.
  pair = jnp.concatenate([begin, begin.at[:, 1:].set(begin[:, :1])])
  before, other = jnp.split(logits_at(pair, jnp.int32(0)), 2)
  # −∞ of padded columns is no distance, and no size.
  apart = jnp.max(jnp.where(before == other, 0, jnp.abs(before - other)))
  size = jnp.max(jnp.where(jnp.isinf(before), 0, jnp.abs(before)))
  apart = apart / jnp.maximum(size, 1e-30)
  return jax.lax.fori_loop(0, length, draw, begin), apart


def _drawn(logits: Any, keys: Any, position: Any, temperature: Any, greedy: bool) -> Any:
  """A token for each row ``[B]``, of logits ``[B, V]``."""
  if greedy:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  own = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
  return jax.vmap(jax.random.categorical)(own, logits / temperature).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("decoder", "length", "greedy"))
def _by_cache(
  variables: Any,
  prompts: Any,
  index: Any,
  key: Any,
  temperature: Any,
  *,
  decoder: Decoder,
  length: int,
  greedy: bool,
) -> Any:
  """The same tokens of our decoder, each of which is read once."""
  B, P = prompts.shape
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
  dtype = decoder.dtype or variables["params"]["embed"]["embedding"].dtype

  def read(tokens: Any, cache: Cache) -> tuple[Any, Cache]:
    made: Any = decoder.apply(variables, tokens, cache=cache)
    out, cache = made
    return out.head(out.hidden[:, -1:])[:, 0].astype(jnp.float32), cache

  def draw(carry: tuple[Any, Cache], i: Any) -> tuple[tuple[Any, Cache], Any]:
    logits, cache = carry
    token = _drawn(logits, keys, P + i, temperature, greedy)
    return read(token[:, None], cache), token

  begin = read(prompts, Cache.empty(decoder.config, B, P + length, dtype))
  _, tokens = jax.lax.scan(draw, begin, jnp.arange(length))
  return jnp.concatenate([prompts, tokens.T], axis=1)
