"""Text of a language model: tokens drawn one after another, from any causal network.

A network is run again over the whole window for every token, which asks nothing of it. One that
keeps what it made of the tokens before (`CachingDecoder`, as `models.Decoder` is) reads each token
once, and the same ones are drawn.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import _check
from jaxdistill.types import Model, Outputs, Teacher, make_batch, with_logits

__all__ = ["CachingDecoder", "check_decoder", "sample"]

PyTree = Any

# Of the logits' size: what rounding may change where later tokens are others.
_ROUNDING = 1e-3
# And where a cache takes the place of the whole window; bfloat16, of three digits, changes 1e-2.
_BY_CACHE = 0.05


@runtime_checkable
class CachingDecoder(Protocol):
  """What `sample` asks of a module in order that each token is read once.

  A Linen module whose ``__call__`` takes ``cache`` has the second already; of an NNX module, or of
  functions, two methods of a frozen dataclass are enough. It is hashed: programs are told apart by
  it.
  """

  def empty_cache(self, variables: PyTree, batch_size: int, length: int) -> PyTree:
    """A cache in which no token is.

    Args:
      variables: the model's.
      batch_size: B, how many rows are gone on with.
      length: how many tokens of each it has to have room for.

    Returns:
      Arrays, in a tree of the module's own.
    """

  def apply(self, variables: PyTree, tokens: Any, *, cache: PyTree) -> tuple[Outputs, PyTree]:
    """Reads the next tokens of every row, after those that are in the cache.

    Args:
      variables: the model's.
      tokens: ``[B, L]`` int32; all of a prompt, then one at a time.
      cache: with the tokens before.

    Returns:
      ``(outputs, cache)``: logits ``[B, L, V]``, or ``hidden`` and ``head``; and a cache of the
      same shapes that these tokens are in too.
    """


def sample(
  model: Model | Teacher,
  prompts: Any,
  *,
  key: Any,
  length: int,
  temperature: float = 1.0,
  index: Any = None,
  inputs: Callable[[Any], Any] | None = None,
  decoder: CachingDecoder | None = None,
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
    decoder: the model's module where it keeps a cache (`CachingDecoder`; `models.Decoder` is one):
      that takes the place of running it again, which costs the square of the length.
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
  >>> from jaxdistill.networks.models import Decoder, DecoderConfig
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
  check_decoder("decoder", decoder)
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
  caching = decoder if seen == whole else None
  if caching is not None:
    _check_fits(caching, model.variables, asked)
    made = _by_cache(model, *rest, inputs=inputs, decoder=caching, **drawn)
  else:
    made = _anew(model, *rest, inputs=inputs, window=seen, **drawn)
  tokens, apart, finite = jax.device_get(made)
  _check_drawn(apart, finite, by_cache=caching is not None)
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
      "the module that the network was made of, or leave it out."
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


def check_decoder(name: str, value: Any) -> None:
  """Raises where an argument is neither None nor a `CachingDecoder`.

  Args:
    name: the argument's.
    value: what was given.

  Raises:
    TypeError: it is a class, or lacks a method, or cannot be hashed.
  """
  if value is None:
    return
  if isinstance(value, type) or not isinstance(value, CachingDecoder):
    raise TypeError(
      f"{name}={_check.show(value)} must be a networks.CachingDecoder, with empty_cache(variables, "
      "batch_size, length) and apply(variables, tokens, cache=): the model's models.Decoder, or a "
      "module of your own. Any other is run without: leave it out."
    )
  try:
    hash(value)
  except TypeError as error:
    raise TypeError(
      f"{name}={_check.show(value)} must have a hash, by which programs are told apart: a Linen "
      "module, or a frozen dataclass."
    ) from error


def _check_fits(decoder: CachingDecoder, variables: Any, asked: Any) -> None:
  """Raises where a decoder cannot read a token with the model's variables, or keeps none."""
  tokens = jax.ShapeDtypeStruct((asked.shape[0], 1), np.int32)
  caches: list[dict[str, str]] = []  # their arrays by name, before and after

  def read(variables: Any, tokens: Any) -> Any:
    before = decoder.empty_cache(variables, *asked.shape)
    outputs, after = decoder.apply(variables, tokens, cache=before)
    for cache in (before, after):
      leaves = jax.tree_util.tree_leaves_with_path(cache)
      caches.append({jax.tree_util.keystr(path): str(jnp.shape(leaf)) for path, leaf in leaves})
    return with_logits(outputs).logits

  try:
    logits = jax.eval_shape(read, variables, tokens)
  except Exception as error:
    raise ValueError(
      f"decoder cannot read a token with the model's variables ({_check.short(error)}): give the "
      "module that the network was made of, or leave it out."
    ) from error
  if logits is None or logits.shape[:2] != tokens.shape or caches[0] != caches[1]:
    raise ValueError(
      f"decoder must give (outputs, cache) with logits {[*tokens.shape, 'V']}, or hidden and head, "
      "and a cache of the shapes that it had; it gives logits "
      f"{None if logits is None else list(logits.shape)}, and of a cache {caches[0]} one "
      f"{caches[1]}."
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


def _last(out: Outputs) -> Any:
  """Logits ``[B, V]`` of the last position; of hidden states, no other's are made."""
  if out.logits is not None:
    return out.logits[:, -1]
  assert out.head is not None  # of one that has neither nothing is asked
  return out.head(out.hidden[:, -1:])[:, 0]


@functools.partial(jax.jit, static_argnames=("inputs", "decoder", "length", "greedy"))
def _by_cache(
  model: Model | Teacher,
  prompts: Any,
  index: Any,
  key: Any,
  temperature: Any,
  *,
  inputs: Any,
  decoder: CachingDecoder,
  length: int,
  greedy: bool,
) -> tuple[Any, Any, Any]:
  """The same tokens of a decoder, which reads each once; how far it is from the model.

  And whether no logit was NaN.
  """
  B, P = prompts.shape
  variables: Any = model.variables
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)

  def read(tokens: Any, cache: Any) -> tuple[Any, Any]:
    out, cache = decoder.apply(variables, tokens, cache=cache)
    return _last(out).astype(jnp.float32), cache

  def draw(carry: tuple[Any, Any], i: Any) -> tuple[tuple[Any, Any], Any]:
    logits, cache = carry
    token = _drawn(logits, keys, P + i, temperature, greedy)
    return read(token[:, None], cache), (token, ~jnp.isnan(logits).any())

  begin = read(prompts, decoder.empty_cache(variables, B, P + length))
  (end, _), (tokens, finite) = jax.lax.scan(draw, begin, jnp.arange(length))
  whole = jnp.concatenate([prompts, tokens.T], axis=1)
  # At its end, where all that the cache kept has a part.
  last = _last(_outputs(model, whole, inputs))
  same = last.shape == end.shape
  apart = _apart(last.astype(jnp.float32), end) if same else jnp.array(jnp.inf)
  return whole, apart, finite.all()
