"""One decoder for the language models that people distil: Llama, Qwen, Gemma, Mistral, SmolLM.

They are one transformer. Tokens become vectors; each layer adds to them what attention finds at
earlier positions, then what a gated MLP makes of every position alone; a last norm and one matrix
give the next token's logits. What the families differ in are the fields of `DecoderConfig`:

- Llama 2, Llama 3, SmolLM: nothing beyond that; Llama 3 stretches its slow rotations (`Rope`);
- Mistral: every layer sees a window of the latest positions only;
- Qwen 2, Qwen 2.5: biases on queries, keys and values; Qwen 3: norms on queries and keys instead;
- Gemma 2, Gemma 3: some layers see a window and some everything, what a layer adds is normed too,
  embeddings are scaled by √width, and Gemma 2 bounds its scores and logits by a tanh.

It is an ordinary Linen module: `jaxdistill.networks.linen` takes it as it takes any other, and
`jaxdistill.networks.pretrained` fills it from a folder of Hugging Face's. It puts out the last
hidden states and the head rather than logits, since at 128,256 words a batch of 8,192 tokens would
have 4 GB of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxdistill import _check
from jaxdistill.types import Head, Outputs, compute_dtype

__all__ = [
  "Attention",
  "Cache",
  "Decoder",
  "DecoderBlock",
  "DecoderConfig",
  "GatedMLP",
  "RMSNorm",
  "Rope",
  "Shared",
  "attend",
  "causal_mask",
  "rotate",
  "spread",
  "stacked",
  "unstacked",
  "with_layers",
]

PyTree = Any
Tokens = Int[Array | np.ndarray, "B L"]
# The published activations of the gate, by our names.
_ACTIVATIONS = {
  "silu": nn.silu,
  "gelu": lambda x: nn.gelu(x, approximate=False),
  "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
}
# What the backward pass keeps of a layer and what it computes again. "dots" keeps the results of
# products with weights (all but attention's own) and recomputes what is cheap.
_REMAT: dict[str, Any] = {
  "block": None,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary positions: how fast each pair of a head's channels turns with the position.

  Pair j of K/2 turns by ``theta ** (-2j / K)`` radians a position: the first ones are the hands of
  a fast clock, the last ones of a slow one. The product of a query and a key that both were turned
  depends on the distance between them alone.

  Attributes:
    theta: the base; 10,000 as published, 500,000 in Llama 3, 1,000,000 in Qwen.
    kind: ``"default"``; ``"linear"``, which divides all positions by ``factor``; or ``"llama3"``,
      which divides only where a turn takes longer than ``original_length / low_frequency``
      positions, not where it takes less than ``original_length / high_frequency``, and blends in
      between.
    factor: by how much longer texts may be than those of the first training.
    low_frequency: see ``kind``; Llama 3's is 1.
    high_frequency: see ``kind``; Llama 3's is 4.
    original_length: of the texts of the first training; Llama 3's is 8,192.

  Source: Su et al., "RoFormer", 2021; Llama 3.1's stretching as Meta's code has it.

  >>> Rope().frequencies(4).tolist()
  [1.0, 0.01]
  """

  theta: float = 10_000.0
  kind: str = "default"
  factor: float = 1.0
  low_frequency: float = 1.0
  high_frequency: float = 4.0
  original_length: int = 8192

  def __post_init__(self) -> None:
    if self.kind not in ("default", "linear", "llama3"):
      raise ValueError(f"kind={self.kind!r} must be 'default', 'linear' or 'llama3'.")
    for name in ("theta", "factor", "low_frequency", "high_frequency", "original_length"):
      _check.number(name, getattr(self, name), above=0)
    if self.kind == "llama3" and self.high_frequency <= self.low_frequency:
      raise ValueError(
        f"high_frequency={self.high_frequency} must be above low_frequency={self.low_frequency}."
      )

  def frequencies(self, head_dim: int) -> np.ndarray:
    """Radians a position, ``[head_dim / 2]`` float64."""
    turns = self.theta ** -(np.arange(0, head_dim, 2) / head_dim)
    if self.kind == "default":
      return turns
    if self.kind == "linear":
      return turns / self.factor
    # How many whole turns a pair makes in a text of the first training's length.
    rounds = self.original_length * turns / (2 * math.pi)
    blend = (rounds - self.low_frequency) / (self.high_frequency - self.low_frequency)
    blend = np.clip(blend, 0.0, 1.0)  # 1: fast enough to be left alone
    return blend * turns + (1 - blend) * turns / self.factor


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """What a decoder is, and how it is computed.

  Attributes:
    vocabulary: V, rows of the embedding; padded rows count.
    width: D, of the residual stream.
    layers: N.
    heads: H, of the queries.
    kv_heads: of keys and values; divides ``heads``. As many as ``heads``: multi-head attention, 1:
      multi-query, in between: grouped-query.
    head_dim: K, even; need not be ``width / heads``.
    hidden: F, of the MLP.
    norm_epsilon: under the root of every RMSNorm.
    rope: rotations of queries and keys.
    window_rope: those of the layers with a window, where they are others (Gemma 3); None: the same.
    activation: of the gate: ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``, its approximation.
    qkv_bias: whether queries, keys and values have biases (Qwen 2).
    output_bias: whether attention's output has one.
    mlp_bias: whether the MLP's three maps have biases.
    qk_norm: an RMSNorm on each head's queries and keys before they are turned (Qwen 3, Gemma 3).
    post_norms: an RMSNorm on what attention and MLP add, too (Gemma 2, 3).
    centered_norms: scales are kept as their difference from 1, and multiply before the result is
      rounded to the network's dtype (Gemma); else they multiply after it (Llama).
    scale_embedding: multiplies embeddings by √width (Gemma).
    query_scale: of the scores; None for 1/√head_dim.
    score_softcap: c in c·tanh(score / c), Gemma 2's 50; None without.
    softcap: likewise for the logits, Gemma 2's 30. It is the head's.
    window: how many positions a layer with a window sees, itself included; None where none has one.
    pattern: which layers have the window, from the first; repeated over the depth. Empty where
      ``window`` is None.
    tied: the head is the embedding.
    dropout: rate, after the embedding and on what each half of a layer adds; 0 in all published.
    remat: what the backward pass computes again instead of keeping it: ``"none"``, all of a
      ``"block"``, or all but the products with weights (``"dots"``).
    scan: compiles one layer and runs it N times; the parameters of ``layers`` then have an axis
      ``[N]`` in front, and so has what is captured of them (`stacked`, `unstacked`).

  Raises:
    ValueError: a number is out of range, or two do not fit.

  >>> small = DecoderConfig(256, 64, layers=2, heads=4, kv_heads=2, head_dim=16, hidden=128)
  >>> small.windows
  (False, False)
  """

  vocabulary: int
  width: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  hidden: int
  norm_epsilon: float = 1e-6
  rope: Rope = Rope()
  window_rope: Rope | None = None
  activation: str = "silu"
  qkv_bias: bool = False
  output_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False
  post_norms: bool = False
  centered_norms: bool = False
  scale_embedding: bool = False
  query_scale: float | None = None
  score_softcap: float | None = None
  softcap: float | None = None
  window: int | None = None
  pattern: tuple[bool, ...] = ()
  tied: bool = False
  dropout: float = 0.0
  remat: str = "none"
  scan: bool = False

  def __post_init__(self) -> None:
    for name in ("vocabulary", "width", "layers", "heads", "kv_heads", "head_dim", "hidden"):
      _check.whole(name, getattr(self, name))
    if self.heads % self.kv_heads:
      raise ValueError(
        f"kv_heads={self.kv_heads} must divide heads={self.heads}: each serves as many queries."
      )
    if self.head_dim % 2:
      raise ValueError(f"head_dim={self.head_dim} must be even: rotations turn pairs of channels.")
    if self.activation not in _ACTIVATIONS:
      raise ValueError(f"activation={self.activation!r} must be one of {sorted(_ACTIVATIONS)}.")
    if self.remat not in ("none", *_REMAT):
      raise ValueError(f"remat={self.remat!r} must be 'none', 'block' or 'dots'.")
    for name in ("query_scale", "score_softcap", "softcap"):
      if getattr(self, name) is not None:
        _check.number(name, getattr(self, name), above=0)
    _check.number("norm_epsilon", self.norm_epsilon, least=0)
    _check.number("dropout", self.dropout, least=0, most=1)
    if self.window is not None:
      _check.whole("window", self.window, instead=", or None for none")
    if (self.window is None) == any(self.pattern):
      raise ValueError(
        f"window={self.window} and pattern={self.pattern} must be given together: how far, and "
        "which layers; (True,) for all."
      )

  @property
  def windows(self) -> tuple[bool, ...]:
    """Of each layer whether it sees a window only."""
    cycle = self.pattern or (False,)
    return tuple(cycle[i % len(cycle)] for i in range(self.layers))


@flax.struct.dataclass
class Cache:
  """Keys and values of the tokens so far, so that a next one need not look at their inputs again.

  A token costs ``2 · layers · kv_heads · head_dim`` numbers: grouped queries are there to make that
  small. Slots that were not written yet have segment 0, which nobody attends to.

  Attributes:
    keys: ``[N, B, S, kv_heads, K]``, turned already.
    values: likewise.
    positions: ``[B, S]`` of the tokens in the slots.
    segments: ``[B, S]``, likewise.
    end: how many slots are full, in every row.
  """

  keys: Array
  values: Array
  positions: Array
  segments: Array
  end: Array

  @classmethod
  def empty(
    cls, config: DecoderConfig, batch_size: int, length: int, dtype: Any = jnp.float32
  ) -> Cache:
    """One for ``length`` tokens of each of ``batch_size`` rows, of the network's dtype.

    >>> small = DecoderConfig(256, 64, layers=2, heads=4, kv_heads=2, head_dim=16, hidden=128)
    >>> Cache.empty(small, batch_size=3, length=10).keys.shape
    (2, 3, 10, 2, 16)
    """
    _check.whole("batch_size", batch_size)
    _check.whole("length", length)
    slots = (batch_size, length)
    shape = (config.layers, *slots, config.kv_heads, config.head_dim)
    return cls(
      keys=jnp.zeros(shape, dtype),
      values=jnp.zeros(shape, dtype),
      positions=jnp.zeros(slots, jnp.int32),
      segments=jnp.zeros(slots, jnp.int32),
      end=jnp.zeros((), jnp.int32),
    )


class Shared(NamedTuple):
  """What all layers see and none changes: made once, not in each.

  Attributes:
    cos: ``[T, B, L, K/2]``, of the angles by which each position turns; T is 2 where some layers
      have a window (entry 1 is theirs), else 1.
    sin: likewise.
    mask: ``[T, B, L, S]``, which of S keys each of L queries may see.
    end: the cache's slot of the first query; None without a cache.
  """

  cos: Array
  sin: Array
  mask: Array
  end: Array | None


def rotate(
  x: Float[Array, "B L H K"], cos: Float[Array, "B L half"], sin: Float[Array, "B L half"]
) -> Float[Array, "B L H K"]:
  """Turns each pair of channels of every head by its position's angle.

  The pairs are channels j and j + K/2, as Hugging Face stores weights, not 2j and 2j + 1 as the
  papers write; the two differ by a permutation of the rows of the query and key weights.

  Args:
    x: queries or keys.
    cos: of the angles.
    sin: of the angles.

  Returns:
    The turned ones, in their dtype.

  >>> cos, sin = jnp.zeros((1, 1, 1)), jnp.ones((1, 1, 1))  # a quarter of a turn
  >>> rotate(jnp.array([[[[2.0, 1.0]]]]), cos, sin).tolist()
  [[[[-1.0, 2.0]]]]
  """
  cos, sin = cos[:, :, None, :], sin[:, :, None, :]  # the same for all heads
  first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
  turned = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def causal_mask(
  positions: Int[Array, "B L"],
  segments: Int[Array, "B L"],
  key_positions: Int[Array, "B S"],
  key_segments: Int[Array, "B S"],
  *,
  window: int | None = None,
  start: Any = 0,
) -> Bool[Array, "B L S"]:
  """Which keys each query may see: its own document's, at its own position and before.

  Several documents may share a row, told apart by ``segments``; 0 is padding, which nobody sees but
  itself. It has to see something: a softmax over nothing is 0/0, and its gradient makes every
  parameter NaN, whatever weight the loss gives that position.

  Args:
    positions: of the queries, inside their document.
    segments: of the queries.
    key_positions: of the keys: the queries' own, or all slots of a cache.
    key_segments: likewise.
    window: how many positions a query sees, its own included; None for all.
    start: the slot of the first query among the keys.

  Returns:
    True where it may.

  >>> at, segment = jnp.array([[0, 1, 0, 0]]), jnp.array([[1, 1, 2, 0]])
  >>> causal_mask(at, segment, at, segment)[0].astype(int).tolist()
  [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
  """
  distance = positions[:, :, None] - key_positions[:, None, :]  # [B, L, S]
  same = segments[:, :, None] == key_segments[:, None, :]
  mask = same & (distance >= 0) & (key_segments[:, None, :] > 0)
  if window is not None:
    mask &= distance < window
  slots = start + jnp.arange(positions.shape[1])
  return mask | (slots[:, None] == jnp.arange(key_positions.shape[1])[None, :])[None]


def attend(
  query: Float[Array, "B L H K"],
  key: Float[Array, "B S G K"],
  value: Float[Array, "B S G K"],
  mask: Bool[Array, "B L S"],
  *,
  scale: float,
  softcap: float | None = None,
) -> Float[Array, "B L H K"]:
  """Softmax attention with grouped queries: heads h·H/G .. (h+1)·H/G - 1 share keys and values h.

  Keys and values are not repeated for the queries that share them: the queries get an axis for it.

  Args:
    query: turned already, as are the keys.
    key: of G heads; G divides H.
    value: likewise.
    mask: which keys each query may see; at least one each.
    scale: of the scores.
    softcap: c in c·tanh(score / c), which keeps scores within ±c; None without.

  Returns:
    Means of the values, in their dtype; scores and softmax are in float32 at least.

  >>> one = jnp.ones((1, 2, 2, 4))
  >>> attend(one, one[:, :, :1], one[:, :, :1], jnp.ones((1, 2, 2), bool), scale=0.5).shape
  (1, 2, 2, 4)
  """
  B, L, H, K = query.shape
  groups = key.shape[2]
  query = query.reshape(B, L, groups, H // groups, K)
  wide = compute_dtype(query)
  scores = scale * jnp.einsum("blghk,bsgk->bghls", query, key, preferred_element_type=wide)
  if softcap is not None:
    scores = softcap * jnp.tanh(scores / softcap)
  scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
  shares = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
  return jnp.einsum("bghls,bsgk->blghk", shares, value).reshape(B, L, H, K)


class RMSNorm(nn.Module):
  """``x / √(mean(x²) + ε)``, times a learned scale: LayerNorm without its mean and bias.

  Attributes:
    epsilon: under the root.
    centered: the scale is kept as its difference from 1, which starts at 0 (Gemma).
    param_dtype: of the scale.

  Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.

  >>> made, _ = RMSNorm().init_with_output(jax.random.key(0), jnp.array([[3.0, 3.0, 0.0]]))
  >>> round(float(jnp.mean(made**2)), 4)
  1.0
  """

  epsilon: float = 1e-6
  centered: bool = False
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Norms the last axis, in float32 at least; the result has the dtype of ``x``."""
    start = nn.initializers.zeros if self.centered else nn.initializers.ones
    scale = self.param("scale", start, x.shape[-1:], self.param_dtype)
    scale = jnp.expand_dims(scale, range(x.ndim - 1))
    wide = x.astype(compute_dtype(x))
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
    # In bfloat16 the two orders differ in the last of three digits, and a layer was trained to one.
    if self.centered:
      return (wide * (1.0 + scale.astype(wide.dtype))).astype(x.dtype)
    return wide.astype(x.dtype) * scale.astype(x.dtype)


class Attention(nn.Module):
  """Attention of one layer: maps to queries, keys and values, rotations, and a map back.

  Attributes:
    config: of the decoder.
    dtype: of the computation; None promotes from inputs and parameters.
    param_dtype: of the parameters.
  """

  config: DecoderConfig
  dtype: Any = None
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "B L D"], kind: Any, layer: Any, shared: Shared, memory: Any
  ) -> tuple[Float[Array, "B L D"], Any]:
    """Attends.

    Args:
      x: the normed residual stream.
      kind: which of the masks and rotations of ``shared`` are this layer's.
      layer: its number, for the cache.
      shared: what all layers see.
      memory: the cache's keys and values of all layers; None without a cache.

    Returns:
      What to add to the stream, and ``memory`` with this layer's new keys and values in it.
    """
    c = self.config
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def heads(name: str, count: int) -> Array:
      return nn.DenseGeneral((count, c.head_dim), use_bias=c.qkv_bias, name=name, **dtypes)(x)

    query, key, value = (
      heads("query", c.heads),
      heads("key", c.kv_heads),
      heads("value", c.kv_heads),
    )
    if c.qk_norm:
      query = RMSNorm(c.norm_epsilon, c.centered_norms, self.param_dtype, name="query_norm")(query)
      key = RMSNorm(c.norm_epsilon, c.centered_norms, self.param_dtype, name="key_norm")(key)
    cos, sin = shared.cos[kind], shared.sin[kind]
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    if memory is not None:
      memory, (key, value) = _remember(memory, layer, shared.end, key, value)
    out = attend(
      query,
      key,
      value,
      shared.mask[kind],
      scale=c.head_dim**-0.5 if c.query_scale is None else c.query_scale,
      softcap=c.score_softcap,
    )
    out = nn.DenseGeneral(c.width, axis=(-2, -1), use_bias=c.output_bias, name="out", **dtypes)(out)
    return out, memory


def _remember(memory: Any, layer: Any, end: Any, key: Array, value: Array) -> tuple[Any, Any]:
  """Writes a layer's new keys and values at the cache's end; returns all of the layer's, too."""
  # Into the one array of all layers, so that under jit the cache is changed where it lies.
  at = [jnp.asarray(i, jnp.int32) for i in (layer, 0, end, 0, 0)]
  new = (key, value)
  memory = tuple(
    jax.lax.dynamic_update_slice(old, one.astype(old.dtype)[None], at)
    for old, one in zip(memory, new, strict=True)
  )
  return memory, tuple(
    jax.lax.dynamic_index_in_dim(all_, layer, 0, keepdims=False).astype(key.dtype)
    for all_ in memory
  )


class GatedMLP(nn.Module):
  """``down(activation(gate(x)) · up(x))``: SwiGLU, or GeGLU in Gemma.

  Attributes:
    config: of the decoder.
    dtype: of the computation; None promotes from inputs and parameters.
    param_dtype: of the parameters.

  Source: Shazeer, "GLU Variants Improve Transformer", 2020.
  """

  config: DecoderConfig
  dtype: Any = None
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    """Maps every position alone."""
    c = self.config

    def dense(name: str, width: int, x: Array) -> Array:
      options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
      return nn.Dense(width, use_bias=c.mlp_bias, name=name, **options)(x)

    gate = _ACTIVATIONS[c.activation](dense("gate", c.hidden, x))
    return dense("down", c.width, gate * dense("up", c.hidden, x))


class DecoderBlock(nn.Module):
  """One layer: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``; sows ``output``.

  Attributes:
    config: of the decoder.
    train: whether to drop.
    dtype: of the computation; None promotes from inputs and parameters.
    param_dtype: of the parameters.
  """

  config: DecoderConfig
  train: bool = False
  dtype: Any = None
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, carry: Any, kind: Any, layer: Any, shared: Shared) -> tuple[Any, None]:
    """Applies the layer, in the form that `flax.linen.scan` wants.

    Args:
      carry: the residual stream ``[B, L, D]``, and the cache's keys and values or None.
      kind: which of the masks and rotations of ``shared`` are this layer's.
      layer: its number, from 0.
      shared: what all layers see.

    Returns:
      The carry, and nothing beside it.
    """
    c = self.config
    x, memory = carry
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def norm(name: str, x: Array) -> Array:
      return RMSNorm(c.norm_epsilon, c.centered_norms, self.param_dtype, name=name)(x)

    def add(x: Array, name: str, made: Array) -> Array:
      made = norm(name, made) if c.post_norms else made
      return x + nn.Dropout(c.dropout, deterministic=not self.train)(made)

    y, memory = Attention(c, name="attention", **dtypes)(
      norm("attention_norm", x), kind, layer, shared, memory
    )
    x = add(x, "post_attention_norm", y)
    x = add(x, "post_mlp_norm", GatedMLP(c, name="mlp", **dtypes)(norm("mlp_norm", x)))
    self.sow("intermediates", "output", x)
    return (x, memory), None


class Decoder(nn.Module):
  """A causal language model of the families above.

  Sows ``embedding`` and ``layer_i/output``, all ``[B, L, D]``; under ``config.scan`` the layers'
  as one, ``layers/output`` ``[N, B, L, D]`` (``networks.Path("layers/output", layer=i)``).

  Attributes:
    config: what it is.
    dtype: of the computation; None promotes from the parameters. Norms, scores and softmax are in
      float32 at least.
    param_dtype: of the parameters.

  >>> config = DecoderConfig(256, 64, layers=2, heads=4, kv_heads=2, head_dim=16, hidden=128)
  >>> tokens = jnp.zeros((1, 8), jnp.int32)
  >>> outputs, variables = Decoder(config).init_with_output(jax.random.key(0), tokens)
  >>> outputs.hidden.shape, outputs.head.kernel.shape
  ((1, 8, 64), (64, 256))
  """

  config: DecoderConfig
  dtype: Any = None
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    tokens: Tokens | Mapping[str, Any],
    positions: Tokens | None = None,
    segments: Tokens | None = None,
    cache: Cache | None = None,
    *,
    train: bool = False,
  ) -> Outputs | tuple[Outputs, Cache]:
    """Reads tokens; position l says what it can of the token after it.

    Args:
      tokens: ``[B, L]``; or a dict of ``tokens``, ``positions`` and ``segments``, as
        `jaxdistill.data.from_text` makes them.
      positions: ``[B, L]`` of each token inside its document. By default counted from 0 in each
        segment, or on from what ``cache`` holds.
      segments: ``[B, L]``, which document of its row a token is of, from 1; 0 is padding. By
        default each row is one document.
      cache: of the tokens before these; it must have room for them, which cannot be seen where its
        end is traced.
      train: drop, with the random stream ``dropout``.

    Returns:
      ``Outputs`` with ``hidden`` ``[B, L, D]`` and ``head``; with a cache ``(outputs, cache)``,
      where these tokens are in it.

    Raises:
      ValueError: a dict lacks ``tokens`` or has something else, or the cache is of fewer slots.
    """
    c = self.config
    if isinstance(tokens, Mapping):
      tokens, positions, segments = _arguments(tokens)
    positions, segments = _places(tokens, positions, segments, cache)
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    normal = nn.initializers.normal(0.02)  # the published standard deviation
    embed = nn.Embed(c.vocabulary, c.width, embedding_init=normal, name="embed", **dtypes)
    x = embed(tokens)
    if c.scale_embedding:
      # In the network's dtype, as it was trained: √3072 is 55.5 in bfloat16.
      x = x * jnp.asarray(c.width**0.5, x.dtype)
    self.sow("intermediates", "embedding", x)
    x = nn.Dropout(c.dropout, deterministic=not train)(x)

    if cache is not None:
      cache = _noted(cache, positions, segments)
    shared = _shared(c, positions, segments, cache, compute_dtype(x))
    memory = None if cache is None else (cache.keys, cache.values)
    x, memory = self._layers(x, memory, shared, train)
    if cache is not None:
      keys, values = memory
      end = cache.end + x.shape[1]
      cache = dataclasses.replace(cache, keys=keys, values=values, end=end)

    hidden = RMSNorm(c.norm_epsilon, c.centered_norms, self.param_dtype, name="final_norm")(x)
    # The embedding serves as the head as it lies, [V, D]: turned, it would be held twice.
    kernel = (
      embed.embedding
      if c.tied
      else self.param("head", normal, (c.width, c.vocabulary), self.param_dtype)
    )
    outputs = Outputs(hidden=hidden, head=Head(kernel, softcap=c.softcap, transposed=c.tied))
    return outputs if cache is None else (outputs, cache)

  @nn.nowrap
  def empty_cache(self, variables: PyTree, batch_size: int, length: int) -> Cache:
    """A cache without tokens, of the dtype in which the variables are computed with.

    See `jaxdistill.networks.CachingDecoder`, which this module is.

    Args:
      variables: the module's.
      batch_size: how many rows it has.
      length: how many tokens of each there is room for.
    """
    dtype = self.dtype or variables["params"]["embed"]["embedding"].dtype
    return Cache.empty(self.config, batch_size, length, dtype)

  def _layers(self, x: Array, memory: Any, shared: Shared, train: bool) -> tuple[Array, Any]:
    """All layers, one after the other."""
    c = self.config
    block: Any = DecoderBlock
    if c.remat != "none":
      # Inside a scan no optimisation can undo the recomputation, so nothing need prevent it.
      block = nn.remat(block, policy=_REMAT[c.remat], prevent_cse=not c.scan)
    options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    if not c.scan:
      for i, windowed in enumerate(c.windows):
        made = block(c, train, name=f"layer_{i}", **options)
        (x, memory), _ = made((x, memory), int(windowed), i, shared)
      return x, memory
    # Layers that differ by their window are still one program: which mask is theirs is data.
    block = nn.scan(
      block,
      variable_axes={"params": 0, "intermediates": 0},
      split_rngs={"params": True, "dropout": True},
      in_axes=(0, 0, nn.broadcast),
      length=c.layers,
    )
    kinds, numbers = jnp.asarray(c.windows, jnp.int32), jnp.arange(c.layers, dtype=jnp.int32)
    return block(c, train, name="layers", **options)((x, memory), kinds, numbers, shared)[0]


def _arguments(inputs: Mapping[str, Any]) -> tuple[Any, Any, Any]:
  """Tokens, positions and segments of a dict."""
  known = ("tokens", "positions", "segments")
  if "tokens" not in inputs or not set(inputs) <= set(known):
    raise ValueError(
      f"inputs has {sorted(map(str, inputs))}; the decoder takes 'tokens', and beside them "
      "'positions' and 'segments'. Say how else to call it by arguments= of networks.linen."
    )
  tokens, positions, segments = (inputs.get(name) for name in known)
  return tokens, positions, segments


def _places(tokens: Any, positions: Any, segments: Any, cache: Cache | None) -> tuple[Array, Array]:
  """Positions and segments ``[B, L]``, made up where they were not given."""
  B, L = tokens.shape
  if cache is not None and cache.positions.shape[1] < L:
    raise ValueError(
      f"cache has {cache.positions.shape[1]} slots, and {L} tokens are to go into it: "
      "Cache.empty(config, batch_size, length) makes a longer one."
    )
  if segments is None:
    segments = jnp.ones((B, L), jnp.int32)
  index = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32)[None], (B, L))
  if positions is None and cache is not None:
    positions = cache.end + index
  elif positions is None:
    # Counted from where the segment begins: the latest place at which the number changed.
    changed = jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0
    positions = index - jax.lax.cummax(jnp.where(changed, index, 0), axis=1)
  return jnp.asarray(positions), jnp.asarray(segments)


def _noted(cache: Cache, positions: Array, segments: Array) -> Cache:
  """The cache with the places of the new tokens; their keys and values, each layer writes."""
  at = (jnp.zeros((), jnp.int32), cache.end)

  def write(old: Array, new: Array) -> Array:
    return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), at)

  return dataclasses.replace(
    cache, positions=write(cache.positions, positions), segments=write(cache.segments, segments)
  )


def _shared(
  config: DecoderConfig, positions: Array, segments: Array, cache: Cache | None, dtype: Any
) -> Shared:
  """Rotations and masks of layers without a window, and of those with one where there are any."""
  keys = (positions, segments) if cache is None else (cache.positions, cache.segments)
  start = 0 if cache is None else cache.end
  kinds: list[tuple[Rope, int | None]] = [(config.rope, None)]
  if any(config.windows):
    kinds.append((config.window_rope or config.rope, config.window))
  angles = jnp.stack(
    [
      positions[..., None].astype(dtype)
      * jnp.asarray(rope.frequencies(config.head_dim), dtype)[None, None]
      for rope, _ in kinds
    ]
  )
  masks = [causal_mask(positions, segments, *keys, window=w, start=start) for _, w in kinds]
  end = None if cache is None else cache.end
  return Shared(jnp.cos(angles), jnp.sin(angles), jnp.stack(masks), end)


def stacked(variables: Mapping[str, PyTree]) -> dict[str, PyTree]:
  """Variables of a decoder without ``scan`` as those with it: one array for all layers.

  Args:
    variables: ``{"params": {"layer_0": ..., "layer_1": ..., ...}}``.

  Returns:
    ``{"params": {"layers": ..., ...}}``, whose leaves have an axis ``[N]`` in front.

  Raises:
    ValueError: there is no ``layer_0``.

  >>> stacked({"params": {"layer_0": {"a": jnp.ones(2)}}})["params"]["layers"]["a"].shape
  (1, 2)
  """
  params = dict(variables["params"])
  layers = [params.pop(f"layer_{i}") for i in range(len(params)) if f"layer_{i}" in params]
  if not layers:
    raise ValueError(f"variables has no layer_0 in params: {sorted(params)}.")
  params["layers"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
  return {**variables, "params": params}


def unstacked(variables: Mapping[str, PyTree]) -> dict[str, PyTree]:
  """Variables of a decoder with ``scan`` as those without it, by which layers can be chosen.

  Args:
    variables: ``{"params": {"layers": ..., ...}}``.

  Returns:
    ``{"params": {"layer_0": ..., ...}}``.

  Raises:
    ValueError: there are no ``layers``.

  >>> sorted(unstacked({"params": {"layers": {"a": jnp.ones((2, 3))}}})["params"])
  ['layer_0', 'layer_1']
  """
  params = dict(variables["params"])
  if "layers" not in params:
    raise ValueError(f"variables has no layers in params: {sorted(params)}.")
  layers = params.pop("layers")
  for i in range(len(jax.tree.leaves(layers)[0])):
    params[f"layer_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], layers)
  return {**variables, "params": params}


def spread(of: int, count: int, *, how: Literal["even", "every", "first"] = "even") -> list[int]:
  """Which of a teacher's layers a student begins with.

  Args:
    of: N, how many layers the teacher has.
    count: n, how many the student has; at most N.
    how: ``"even"``: from the first to the last, as evenly as whole numbers allow; of 12 layers
      DistilBERT's published code takes these six. ``"every"``: every (N // n)-th from the first,
      which leaves the last ones out; ``"first"``: the first n, whose activations are the teacher's
      own.

  Returns:
    Their numbers from 0, ascending.

  Raises:
    ValueError: a number is out of range, or there is no such way.

  Source: Sanh et al., "DistilBERT, a distilled version of BERT", 2019 ("one layer out of two"), and
  its script, which takes 0, 2, 4, 7, 9 and 11.

  >>> spread(12, 6), spread(12, 6, how="every"), spread(12, 3, how="first")
  ([0, 2, 4, 7, 9, 11], [0, 2, 4, 6, 8, 10], [0, 1, 2])
  """
  _check.whole("of", of)
  _check.whole("count", count)
  if count > of:
    raise ValueError(f"count={count} must be at most of={of}: a layer is taken once.")
  if how == "even":
    return [round(i * (of - 1) / max(count - 1, 1)) for i in range(count)]
  if how == "every":
    return [i * (of // count) for i in range(count)]
  if how == "first":
    return list(range(count))
  raise ValueError(f"how={_check.show(how)} must be 'even', 'every' or 'first'.")


def with_layers(
  variables: Mapping[str, PyTree], config: DecoderConfig, layers: Sequence[int]
) -> tuple[dict[str, PyTree], DecoderConfig]:
  """A decoder of some of another's layers: what a student begins with.

  All else (embedding, last norm, head) is the other's, so the widths are too; whether a layer sees
  a window goes along with it. ``jaxdistill.Model(networks.linen(Decoder(config)), variables)`` is
  then the student that `jaxdistill.fit` is given, and ``dataclasses.replace`` may change the
  config's dropout, remat and the like before.

  Args:
    variables: the teacher's, ``{"params": ...}`` of ``Decoder(config)``, scanned or not.
    config: the teacher's.
    layers: their numbers from 0, in the order in which the student has them; `spread` chooses.

  Returns:
    ``(variables, config)`` of the smaller decoder. Arrays are the teacher's own, but for those of
    layers under ``config.scan``, which are cut.

  Raises:
    ValueError: there is no such layer, or none, or the variables are not the config's.

  >>> config = DecoderConfig(256, 64, layers=4, heads=4, kv_heads=2, head_dim=16, hidden=128)
  >>> variables = Decoder(config).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
  >>> smaller, own = with_layers(variables, config, spread(4, 2))
  >>> own.layers, smaller["params"]["layer_1"] is variables["params"]["layer_3"]
  (2, True)
  """
  if not isinstance(variables, Mapping) or not isinstance(variables.get("params"), Mapping):
    raise TypeError(
      f"variables={_check.show(variables)} must be {{'params': ...}} of Decoder(config): of a "
      "model, model.variables."
    )
  if isinstance(layers, str) or not isinstance(layers, Iterable):
    raise TypeError(f"layers={_check.show(layers)} must be the numbers of layers: spread(4, 2).")
  numbers = [_check.whole("layers", i, least=None) for i in layers]
  if not numbers or min(numbers) < 0 or max(numbers) >= config.layers:
    raise ValueError(
      f"layers={numbers} must be some of the numbers from 0 to {config.layers - 1}, of the "
      f"config.layers={config.layers} that there are."
    )
  params = dict(variables["params"])
  names = ["layers"] if config.scan else [f"layer_{i}" for i in range(config.layers)]
  there = {name: params.pop(name) for name in names if name in params}
  depth = {len(leaf) for leaf in jax.tree.leaves(there)} if config.scan else {config.layers}
  if len(there) != len(names) or depth != {config.layers}:
    raise ValueError(
      f"variables has {sorted(variables['params'])} in params, and a decoder with "
      f"layers={config.layers} and scan={config.scan} has {names[0]!r}"
      f"{'' if config.scan else f' to {names[-1]!r}'}: give the config that they were made by "
      "(stacked and unstacked turn one form into the other)."
    )
  if config.scan:
    params["layers"] = jax.tree.map(lambda leaf: leaf[np.asarray(numbers)], there["layers"])
  else:
    params |= {f"layer_{i}": there[f"layer_{number}"] for i, number in enumerate(numbers)}
  windows = tuple(config.windows[number] for number in numbers)
  windowed = any(windows)
  own = dataclasses.replace(
    config,
    layers=len(numbers),
    window=config.window if windowed else None,
    pattern=windows if windowed else (),
  )
  return {**variables, "params": params}, own
