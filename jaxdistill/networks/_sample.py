"""Text of a language model: tokens drawn one after another, from any causal network.

A network is run again over the whole window for every token, which asks nothing of it; our decoder
keeps the keys and values of the tokens before (`models.decoder.Cache`), and draws the same tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
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
# And where a cache takes the place of the whole window; bfloat16, of three digits, changes 1e-2.
_BY_CACHE = 0.05


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
      seeds or puts out no logits of tokens, or NaN, or it is not causal: earlier logits change with
      later tokens; or ``decoder`` is another than the model's.

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
  _check_key(key)
  if inputs is not None:
    _check.function("inputs", inputs, "tokens -> inputs", arguments=1)
  given, rows = _rows(prompts, index)
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
  by_cache = decoder is not None and seen == whole
  if by_cache:
    _check_decoder(decoder, model.variables)
    made = _by_cache(model, *rest, inputs=inputs, decoder=decoder, **drawn)
  else:
    made = _anew(model, *rest, inputs=inputs, window=seen, **drawn)
  tokens, apart, finite = jax.device_get(made)
  _check_drawn(apart, finite, by_cache=by_cache)
  return np.asarray(tokens)


def _rows(prompts: Any, index: Any) -> tuple[np.ndarray, np.ndarray]:
  """Prompts ``[B, P]``, and which example each is ``[B]``."""
  try:
    given = np.asarray(prompts)
  except ValueError as error:  # of several lengths
    raise ValueError(
      f"prompts={_check.show(prompts)} must be integers [B, P], of one length: draw those of "
      "another apart."
    ) from error
  if given.ndim != 2 or given.dtype.kind not in "iu" or not given.size:
    raise ValueError(
      f"prompts={_check.show(prompts)} must be integers [B, P], at least one token each."
    )
  rows = np.arange(len(given)) if index is None else np.asarray(index)
  if rows.shape != given.shape[:1] or rows.dtype.kind not in "iu":
    raise ValueError(f"index={_check.show(index)} must be {len(given)} integers, one a prompt.")
  return given, rows


def _check_drawn(apart: Any, finite: Any, *, by_cache: bool) -> None:
  """Raises where tokens were drawn of no numbers, or of others than the model's."""
  if np.isnan(apart) or not finite:
    raise ValueError("model puts out NaN: look whether it was trained.")
  if by_cache and not apart <= _BY_CACHE:
    raise ValueError(
      f"decoder is not what the model is: their logits are {apart:.2g} of their size apart. Give "
      "the models.Decoder that the network was made of, or leave it out."
    )
  if not by_cache and not apart <= _ROUNDING:
    raise ValueError(
      f"model is not causal: the logits of a first token change by {apart:.2g} of their size with "
      "the tokens after it, so that it cannot be asked for the next."
    )


def _check_key(key: Any) -> None:
  """A random key, new or old, and one of them."""
  dtype: Any = getattr(key, "dtype", np.dtype(object))
  typed = jnp.issubdtype(dtype, jax.dtypes.prng_key) and np.shape(key) == ()
  if not typed and (dtype != np.uint32 or np.shape(key) != (2,)):
    raise TypeError(f"key={_check.show(key)} must be one random key: jax.random.key(0).")


def _check_decoder(decoder: Any, variables: Any) -> None:
  """Raises where a decoder has other parameters than there are."""
  tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
  own = jax.eval_shape(decoder.init, jax.random.key(0), tokens)["params"]
  found = variables.get("params") if isinstance(variables, Mapping) else None
  shapes = [jax.tree.map(np.shape, tree) for tree in (own, found)]
  if shapes[0] != shapes[1]:
    raise ValueError(
      "decoder has other parameters than the model: give the models.Decoder that the network was "
      "made of, or leave it out."
    )


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
) -> tuple[Any, Any, Any]:
  """Tokens of a network that is run over the window again for each; how little it looks ahead.

  And whether no logit was NaN.

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

  def draw(i: Any, carry: Any) -> Any:
    tokens, finite = carry
    logits = logits_at(tokens, P + i - 1)
    made = _drawn(logits, keys, P + i, temperature, greedy)
    tokens = jax.lax.dynamic_update_slice_in_dim(tokens, made[:, None], P + i, axis=1)
    return tokens, finite & ~jnp.isnan(logits).any()

  begin = jnp.concatenate([prompts, jnp.zeros((B, length), jnp.int32)], axis=1)
  # Of the whole window at its first token, where all the rest comes later.
  pair = jnp.concatenate([begin, begin.at[:, 1:].set(begin[:, :1])])
  before, other = jnp.split(logits_at(pair, jnp.int32(0)), 2)
  tokens, finite = jax.lax.fori_loop(0, length, draw, (begin, jnp.array(True)))
  return tokens, _apart(before, other), finite


def _apart(before: Any, other: Any) -> Any:
  """How far apart logits are, of the size of the first; −∞ of padded columns is neither."""
  apart = jnp.max(jnp.where(before == other, 0, jnp.abs(before - other)))
  size = jnp.max(jnp.where(jnp.isinf(before), 0, jnp.abs(before)))
  return apart / jnp.maximum(size, 1e-30)


def _drawn(logits: Any, keys: Any, position: Any, temperature: Any, greedy: bool) -> Any:
  """A token for each row ``[B]``, of logits ``[B, V]``."""
  if greedy:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  own = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
  return jax.vmap(jax.random.categorical)(own, logits / temperature).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("inputs", "decoder", "length", "greedy"))
def _by_cache(
  model: Model | Teacher,
  prompts: Any,
  index: Any,
  key: Any,
  temperature: Any,
  *,
  inputs: Any,
  decoder: Decoder,
  length: int,
  greedy: bool,
) -> tuple[Any, Any, Any]:
  """The same tokens of our decoder, each of which is read once; how far it is from the model.

  And whether no logit was NaN.
  """
  B, P = prompts.shape
  variables: Any = model.variables
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
  dtype = decoder.dtype or variables["params"]["embed"]["embedding"].dtype

  def read(tokens: Any, cache: Cache) -> tuple[Any, Cache]:
    made: Any = decoder.apply(variables, tokens, cache=cache)
    out, cache = made
    return out.head(out.hidden[:, -1:])[:, 0].astype(jnp.float32), cache

  def draw(carry: tuple[Any, Cache], i: Any) -> tuple[tuple[Any, Cache], Any]:
    logits, cache = carry
    token = _drawn(logits, keys, P + i, temperature, greedy)
    return read(token[:, None], cache), (token, ~jnp.isnan(logits).any())

  begin = read(prompts, Cache.empty(decoder.config, B, P + length, dtype))
  (end, _), (tokens, finite) = jax.lax.scan(draw, begin, jnp.arange(length))
  whole = jnp.concatenate([prompts, tokens.T], axis=1)
  # At its end, where all that the cache kept has a part.
  out = _outputs(model, whole, inputs)
  last = out.logits[:, -1] if out.hidden is None else out.head(out.hidden[:, -1:])[:, 0]
  same = last.shape == end.shape
  apart = _apart(last.astype(jnp.float32), end) if same else jnp.array(jnp.inf)
  return whole, apart, finite.all()
