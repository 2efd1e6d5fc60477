"""The decoder beside one written anew in NumPy, and beside itself: packed, cached, scanned."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from jaxdistill import networks
from jaxdistill.networks.models import (
  Cache,
  Decoder,
  DecoderConfig,
  Rope,
  spread,
  stacked,
  unstacked,
  with_layers,
)
from jaxdistill.networks.models.decoder import causal_mask
from jaxdistill.types import Head, Outputs
from small_networks import untyped

SMALL = DecoderConfig(37, 24, layers=3, heads=4, kv_heads=2, head_dim=6, hidden=20)
# What each family differs in, at once.
FAMILIES = {
  "llama 2": dataclasses.replace(SMALL, kv_heads=4),
  "llama 3": dataclasses.replace(
    SMALL, norm_epsilon=1e-5, rope=Rope(500.0, "llama3", 8.0, 1.0, 4.0, 16)
  ),
  "qwen 2": dataclasses.replace(SMALL, qkv_bias=True, tied=True, rope=Rope(1e6)),
  "qwen 3": dataclasses.replace(SMALL, qk_norm=True, head_dim=8),
  "mistral": dataclasses.replace(SMALL, window=3, pattern=(True,), kv_heads=1),
  "gemma 2": dataclasses.replace(
    SMALL,
    activation="gelu_tanh",
    post_norms=True,
    centered_norms=True,
    scale_embedding=True,
    query_scale=0.3,
    score_softcap=2.0,
    softcap=3.0,
    window=4,
    pattern=(True, False),
    tied=True,
  ),
  "gemma 3": dataclasses.replace(
    SMALL,
    activation="gelu_tanh",
    post_norms=True,
    centered_norms=True,
    scale_embedding=True,
    qk_norm=True,
    rope=Rope(1e4, "linear", 8.0),
    window_rope=Rope(100.0),
    window=3,
    pattern=(True, True, False),
    tied=True,
  ),
  "biases": dataclasses.replace(
    SMALL, qkv_bias=True, output_bias=True, mlp_bias=True, activation="gelu"
  ),
}


@functools.cache
def made(config, seed=0):
  """Variables whose norms and biases are drawn away from 1 and 0."""
  tokens = jnp.zeros((1, 4), jnp.int32)
  shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    last = path[-1].key
    scale = 0.5 if last in ("scale", "bias") else leaf.shape[0] ** -0.5
    value = rng.normal(size=leaf.shape) * (1.0 if last == "embedding" else scale)
    return jnp.asarray(value + (last == "scale" and not config.centered_norms), leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def applied(config, **options):
  module = Decoder(config, **options)
  return jax.jit(lambda variables, *args: module.apply(variables, *args))


def logits(outputs):
  """What hidden states and head stand for, in float64."""
  head, hidden = outputs.head, np.asarray(outputs.hidden, np.float64)
  kernel = np.asarray(head.kernel, np.float64)
  z = hidden @ (kernel.T if head.transposed else kernel)
  return z if head.softcap is None else head.softcap * np.tanh(z / head.softcap)


def reference(config, variables, tokens):
  """One row of tokens through the whole network, in float64, position by position."""
  c, p = config, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])

  def norm(x, scale):
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_epsilon)
    return y * (scale["scale"] + (1 if c.centered_norms else 0))

  def turn(x, rope, at):  # one head's channels [K] at one position
    half, out = c.head_dim // 2, np.empty(c.head_dim)
    for j in range(half):
      speed = rope.theta ** (-2 * j / c.head_dim)
      if rope.kind == "linear":
        speed /= rope.factor
      elif rope.kind == "llama3":
        wave = 2 * np.pi / speed
        if wave > rope.original_length / rope.low_frequency:
          speed /= rope.factor
        elif wave >= rope.original_length / rope.high_frequency:
          s = (rope.original_length / wave - rope.low_frequency) / (
            rope.high_frequency - rope.low_frequency
          )
          speed = (1 - s) * speed / rope.factor + s * speed
      z = (x[j] + 1j * x[j + half]) * np.exp(1j * at * speed)
      out[j], out[j + half] = z.real, z.imag
    return out

  def act(x):
    if c.activation == "silu":
      return x / (1 + np.exp(-x))
    if c.activation == "gelu":
      import math

      return x * 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

  x = p["embed"]["embedding"][tokens] * (np.sqrt(c.width) if c.scale_embedding else 1)
  L = len(tokens)
  for i in range(c.layers):
    layer = p[f"layer_{i}"]
    a, m = layer["attention"], layer["mlp"]
    windowed = c.windows[i]
    rope = c.window_rope if windowed and c.window_rope else c.rope
    y = norm(x, layer["attention_norm"])

    def heads(name, y=y, a=a):
      return np.einsum("ld,dhk->lhk", y, a[name]["kernel"]) + a[name].get("bias", 0)

    q, k, v = heads("query"), heads("key"), heads("value")
    if c.qk_norm:
      q, k = norm(q, a["query_norm"]), norm(k, a["key_norm"])
    mixed = np.zeros((L, c.heads, c.head_dim))
    for h in range(c.heads):
      g = h // (c.heads // c.kv_heads)
      for at in range(L):
        first = max(0, at - c.window + 1) if windowed else 0
        seen = range(first, at + 1)
        s = np.array([turn(q[at, h], rope, at) @ turn(k[t, g], rope, t) for t in seen])
        s = s * (c.head_dim**-0.5 if c.query_scale is None else c.query_scale)
        if c.score_softcap:
          s = c.score_softcap * np.tanh(s / c.score_softcap)
        s = np.exp(s - s.max())
        mixed[at, h] = sum(w * v[t, g] for w, t in zip(s / s.sum(), seen, strict=True))
    out = np.einsum("lhk,hkd->ld", mixed, a["out"]["kernel"]) + a["out"].get("bias", 0)
    x = x + (norm(out, layer["post_attention_norm"]) if c.post_norms else out)
    y = norm(x, layer["mlp_norm"])

    def dense(name, y, m=m):
      return y @ m[name]["kernel"] + m[name].get("bias", 0)

    out = dense("down", act(dense("gate", y)) * dense("up", y))
    x = x + (norm(out, layer["post_mlp_norm"]) if c.post_norms else out)
  hidden = norm(x, p["final_norm"])
  z = hidden @ (p["embed"]["embedding"].T if c.tied else p["head"])
  return c.softcap * np.tanh(z / c.softcap) if c.softcap else z


def tokens_of(seed, *shape):
  return np.random.default_rng(seed).integers(0, SMALL.vocabulary, shape).astype(np.int32)


@pytest.mark.slow_but("llama 3", "gemma 2", "gemma 3")
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_what_numpy_says(name):
  config = FAMILIES[name]
  tokens = tokens_of(1, 2, 9)
  got = logits(applied(config)(made(config), tokens))
  want = np.stack([reference(config, made(config), row) for row in tokens])
  assert np.abs(want).max() > 0.5
  np.testing.assert_allclose(got, want, rtol=0, atol=5e-6 * np.abs(want).max())


def packed(lengths, length, seed=3):
  """Documents side by side in one row: tokens, positions, segments, and the documents."""
  documents = [tokens_of(seed + i, n) for i, n in enumerate(lengths)]
  row = {name: np.zeros((1, length), np.int32) for name in ("tokens", "positions", "segments")}
  at = 0
  for i, document in enumerate(documents):
    here = slice(at, at + len(document))
    row["tokens"][0, here], row["segments"][0, here] = document, i + 1
    row["positions"][0, here] = np.arange(len(document))
    at += len(document)
  row["tokens"][0, at:] = 5  # padding is a token like another
  return row, documents


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama 3", "gemma 3"])
def test_packed_documents_are_as_each_alone(name):
  config, variables = FAMILIES[name], made(FAMILIES[name])
  row, documents = packed([4, 1, 5], 12)
  together = logits(applied(config)(variables, row))[0]
  # Positions need not be given: they are counted anew in each segment.
  counted = applied(config)(variables, row["tokens"], None, row["segments"])
  np.testing.assert_allclose(logits(counted)[0][:10], together[:10], rtol=0, atol=1e-6)
  at = 0
  for document in documents:
    alone = logits(applied(config)(variables, document[None]))[0]
    np.testing.assert_allclose(together[at : at + len(document)], alone, rtol=0, atol=5e-6)
    at += len(document)


@pytest.mark.slow
def test_a_row_of_padding_makes_nothing_nan():
  config, variables = FAMILIES["gemma 3"], made(FAMILIES["gemma 3"])
  row = {**packed([2], 6)[0], "segments": np.zeros((1, 6), np.int32)}

  def loss(variables):
    outputs = Decoder(config).apply(variables, row)
    return jnp.sum(jnp.square(outputs.hidden)) * 0.0

  value, gradient = jax.jit(jax.value_and_grad(loss))(variables)
  assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((value, gradient)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama 3", "gemma 2", "gemma 3"])
@pytest.mark.parametrize("scan", [False, True])
def test_token_by_token_through_the_cache_is_the_whole(name, scan):
  config, variables = FAMILIES[name], made(FAMILIES[name])
  tokens = tokens_of(5, 2, 9)
  whole = logits(applied(config)(variables, tokens))
  if scan:
    config, variables = dataclasses.replace(config, scan=True), stacked(variables)
  cache, found = Cache.empty(config, 2, 11), []
  for first, last in ((0, 4), *((i, i + 1) for i in range(4, 9))):  # a prompt, then one at a time
    outputs, cache = applied(config)(variables, tokens[:, first:last], None, None, cache)
    found.append(logits(outputs))
  assert int(cache.end) == 9
  atol = 5e-6 * np.abs(whole).max()
  np.testing.assert_allclose(np.concatenate(found, axis=1), whole, rtol=0, atol=atol)


@pytest.mark.slow
def test_the_cache_keeps_documents_apart():
  config, variables = FAMILIES["llama 2"], made(FAMILIES["llama 2"])
  row, _ = packed([3, 4], 7)
  whole = logits(applied(config)(variables, row))
  cache, found = Cache.empty(config, 1, 7), []
  for first, last in ((0, 5), (5, 7)):
    part = [row[name][:, first:last] for name in ("tokens", "positions", "segments")]
    outputs, cache = applied(config)(variables, *part, cache)
    found.append(logits(outputs))
  np.testing.assert_allclose(np.concatenate(found, axis=1), whole, rtol=0, atol=5e-6)


def gradients(config, variables, tokens):
  def loss(variables):
    outputs, sown = Decoder(config).apply(variables, tokens, mutable=["intermediates"])
    return jnp.mean(jnp.square(outputs.hidden) * jnp.arange(config.width)[None, None]), sown

  (value, sown), found = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)
  return value, sown["intermediates"], found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen 3", "gemma 3"])
def test_scanned_and_recomputed_layers_are_the_same_network(name):
  config, variables = FAMILIES[name], made(FAMILIES[name])
  tokens = tokens_of(7, 2, 6)
  value, sown, gradient = gradients(config, variables, tokens)
  for scan, remat in ((True, "none"), (False, "block"), (True, "dots")):
    other = dataclasses.replace(config, scan=scan, remat=remat)
    there = stacked(variables) if scan else variables
    shapes = jax.eval_shape(Decoder(other).init, jax.random.key(0), tokens)
    assert jax.tree.map(jnp.shape, there) == jax.tree.map(jnp.shape, shapes)
    got, captured, found = gradients(other, there, tokens)
    np.testing.assert_allclose(got, value, rtol=2e-6)
    found = unstacked(found) if scan else found
    for path, want in traverse_util.flatten_dict(gradient).items():
      have = traverse_util.flatten_dict(found)[path]
      np.testing.assert_allclose(have, want, rtol=0, atol=2e-6 * np.abs(want).max(), err_msg=path)
    for i in range(config.layers):
      have = captured["layers"]["output"][0][i] if scan else captured[f"layer_{i}"]["output"][0]
      want = sown[f"layer_{i}"]["output"][0]
      np.testing.assert_allclose(have, want, rtol=0, atol=2e-6 * np.abs(want).max())


@pytest.mark.slow
def test_layers_are_stacked_and_back():
  variables = made(SMALL)
  back = unstacked(stacked(variables))
  jax.tree.map(np.testing.assert_array_equal, back, variables)
  with pytest.raises(ValueError, match="layer_0"):
    stacked(stacked(variables))
  with pytest.raises(ValueError, match="layers"):
    unstacked(variables)


def sown(config, variables, tokens):
  """The outputs, and what each layer put out, ``[N, B, L, D]``."""
  module = Decoder(config)
  outputs, there = jax.jit(lambda v: module.apply(v, tokens, mutable=["intermediates"]))(variables)
  there = there["intermediates"]
  if config.scan:
    return outputs, there["layers"]["output"][0]
  return outputs, jnp.stack([there[f"layer_{i}"]["output"][0] for i in range(config.layers)])


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_copied_layers_do_what_the_teachers_do(scan):
  teacher = dataclasses.replace(FAMILIES["gemma 3"], scan=scan)
  plain, tokens = made(FAMILIES["gemma 3"]), tokens_of(3, 2, 9)
  # A layer that adds nothing, so that the last one sees the same without it.
  idle = {**plain["params"]["layer_1"]}
  idle["attention"] = {
    **idle["attention"],
    "out": jax.tree.map(jnp.zeros_like, idle["attention"]["out"]),
  }
  idle["mlp"] = {**idle["mlp"], "down": jax.tree.map(jnp.zeros_like, idle["mlp"]["down"])}
  plain = {"params": {**plain["params"], "layer_1": idle}}
  variables = stacked(plain) if scan else plain
  want, theirs = sown(teacher, variables, tokens)

  first, config = with_layers(variables, teacher, spread(3, 2, how="first"))
  assert (config.layers, config.scan, config.windows) == (2, scan, (True, True))
  np.testing.assert_allclose(sown(config, first, tokens)[1], theirs[:2], rtol=0, atol=1e-6)

  ends, config = with_layers(variables, teacher, spread(3, 2))
  assert config.windows == (True, False)  # the window goes along with the layer
  got, ours = sown(config, ends, tokens)
  np.testing.assert_allclose(ours, theirs[np.array([0, 2])], rtol=0, atol=1e-6)
  np.testing.assert_allclose(logits(got), logits(want), rtol=0, atol=1e-5)

  last, config = with_layers(variables, teacher, [2])
  assert (config.window, config.pattern, config.window_rope) == (None, (), teacher.window_rope)
  shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)
  assert jax.tree.map(jnp.shape, last) == jax.tree.map(jnp.shape, shapes)
  twice, config = with_layers(variables, teacher, (0, 0))
  assert jax.tree.map(jnp.shape, twice) == jax.tree.map(jnp.shape, first)


def test_layers_that_are_not_there_are_refused():
  variables = made(SMALL)
  for layers in ([], [3], [-1]):
    with pytest.raises(ValueError, match="layers="):
      with_layers(variables, SMALL, layers)
  with pytest.raises(TypeError):
    with_layers(variables, SMALL, [0.5])
  for config in (dataclasses.replace(SMALL, layers=4), dataclasses.replace(SMALL, scan=True)):
    with pytest.raises(ValueError, match="variables has"):
      with_layers(variables, config, [0])
  with pytest.raises(ValueError, match="variables has"):
    with_layers(stacked(variables), dataclasses.replace(SMALL, layers=2, scan=True), [0])


def test_layers_are_spread_as_published():
  assert spread(12, 6) == [0, 2, 4, 7, 9, 11]  # DistilBERT's script
  assert spread(24, 6, how="every") == [0, 4, 8, 12, 16, 20]
  for of in range(1, 9):
    for count in range(1, of + 1):
      for how in ("even", "every", "first"):
        found = spread(of, count, how=how)
        assert found == sorted(set(found))
        assert (len(found), found[0]) == (count, 0)
        assert found[-1] < of
  assert all(spread(n, n, how=h) == list(range(n)) for n in (1, 5) for h in ("even", "every"))
  for bad in ({"of": 0, "count": 1}, {"of": 3, "count": 4}, {"of": 3, "count": 2, "how": "last"}):
    with untyped(), pytest.raises(ValueError, match="of=|count=|how="):
      spread(**bad)


@pytest.mark.slow
def test_scanned_layers_drop_each_its_own():
  config = dataclasses.replace(SMALL, scan=True, dropout=0.5)
  network = networks.linen(Decoder(config), features=["layers/output"])
  tokens = tokens_of(0, 2, 5)
  variables = network.init(jax.random.key(0), tokens)

  # One and the same layer, three times: with one mask for all it would drop the same.
  one = jax.tree.map(
    lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), variables["params"]["layers"]
  )
  variables["params"]["layers"] = jax.tree.map(lambda leaf: leaf * 0, one)
  variables["params"]["layers"]["mlp"]["down"]["kernel"] += 1.0
  variables["params"]["layers"]["mlp"]["up"]["kernel"] += 1.0
  variables["params"]["layers"]["mlp"]["gate"]["kernel"] += 1.0
  variables["params"]["layers"]["mlp_norm"]["scale"] += 1.0
  outputs, _ = network.apply(variables, tokens, train=True, key=jax.random.key(1))
  layers = np.asarray(outputs.features["layers/output"])
  steps = np.diff(layers, axis=0) == 0
  assert 0.3 < steps.mean() < 0.7
  assert (steps[0] != steps[1]).any()


@pytest.mark.slow
def test_bfloat16_computes_in_it_and_keeps_parameters():
  config = FAMILIES["gemma 2"]
  variables, tokens = made(config), tokens_of(2, 2, 8)
  module = Decoder(config, dtype=jnp.bfloat16)
  outputs = jax.jit(module.apply)(variables, tokens)
  assert outputs.hidden.dtype == jnp.bfloat16
  assert outputs.head(outputs.hidden).dtype == jnp.float32
  shapes = jax.eval_shape(module.init, jax.random.key(0), tokens)
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
  want = logits(applied(config)(variables, tokens))
  np.testing.assert_allclose(logits(outputs), want, rtol=0, atol=0.05 * np.abs(want).max())
  half = Decoder(config, param_dtype=jnp.bfloat16)
  cast = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
  assert jax.eval_shape(half.apply, cast, tokens).hidden.dtype == jnp.bfloat16


@pytest.mark.slow
@pytest.mark.usefixtures("strict_promotion")
def test_float64_stays_float64():
  with jax.enable_x64(True):
    config = FAMILIES["gemma 3"]
    variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), made(config))
    tokens = tokens_of(4, 1, 7)
    outputs = Decoder(config, param_dtype=jnp.float64).apply(variables, tokens)
    assert outputs.hidden.dtype == jnp.float64
    want = reference(config, variables, tokens[0])
    np.testing.assert_allclose(logits(outputs)[0], want, rtol=0, atol=1e-11)


@pytest.mark.slow
def test_the_adapter_takes_it_as_any_module():
  row, _ = packed([4, 3], 8)
  config = dataclasses.replace(SMALL, dropout=0.1)
  network = networks.linen(
    Decoder(config), features={"mid": "layer_1/output", "first": "embedding"}
  )
  variables = network.init(jax.random.key(0), row)
  assert list(variables) == ["params"]
  outputs, state = network.apply(variables, row, train=False, key=None)
  assert outputs.logits is None
  assert outputs.hidden.shape == (1, 8, 24)
  assert isinstance(outputs.head, Head)
  assert {name: f.shape for name, f in outputs.features.items()} == {
    "mid": (1, 8, 24),
    "first": (1, 8, 24),
  }
  assert state == {}
  dropped, _ = network.apply(variables, row, train=True, key=jax.random.key(1))
  assert np.abs(dropped.hidden - outputs.hidden).max() > 0.01
  assert "layer_2/attention/query" in networks.capturable(network, row)


def test_what_a_module_says_in_our_words_is_passed_on():
  kernel = jnp.ones((3, 5))

  class Speaks(nnx.Module):
    def __init__(self, rngs):
      self.dense = nnx.Linear(2, 3, rngs=rngs)

    def __call__(self, x):
      hidden = self.dense(x)
      return Outputs(hidden=hidden, head=Head(kernel), features={"own": x}, where=x[:, 0])

  x = jnp.ones((4, 2))
  network = networks.nnx(lambda rngs: Speaks(rngs), features=["dense"])
  outputs, _ = network.apply(network.init(jax.random.key(0), x), x, train=False, key=None)
  assert outputs.logits is None
  assert sorted(outputs.features) == ["dense", "own"]
  assert outputs.where.shape == (4,)
  finds = networks.nnx(lambda rngs: Speaks(rngs), logits=lambda out: out.hidden @ out.head.kernel)
  outputs, _ = finds.apply(finds.init(jax.random.key(0), x), x, train=False, key=None)
  assert outputs.logits.shape == (4, 5)
  assert outputs.hidden is not None


def test_a_module_without_logits_or_head_is_refused():
  class Half(nnx.Module):
    def __call__(self, x):
      return Outputs(hidden=x)

  network = networks.nnx(lambda rngs: Half())
  with pytest.raises(ValueError, match=r"no logits were recognised"):
    network.apply({"params": {}}, jnp.ones((1, 2)), train=False, key=None)


def test_segments_and_windows_in_the_mask():
  at = jnp.array([[0, 1, 2, 0, 1, 0]])
  segments = jnp.array([[1, 1, 1, 2, 2, 0]])
  want = np.zeros((6, 6), bool)
  for q in range(6):
    for k in range(6):
      same = segments[0, q] == segments[0, k] and segments[0, k] > 0
      want[q, k] = q == k or (same and 0 <= at[0, q] - at[0, k] < 2)
  np.testing.assert_array_equal(causal_mask(at, segments, at, segments, window=2)[0], want)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"kv_heads": 3}, "kv_heads=3 must divide heads=4"),
    ({"head_dim": 5}, "head_dim=5 must be even"),
    ({"layers": 0}, "layers=0"),
    ({"activation": "relu"}, "activation='relu'"),
    ({"remat": "all"}, "remat='all'"),
    ({"window": 4}, "window=4 and pattern=()"),
    ({"pattern": (True,)}, "window=None and pattern"),
    ({"window": 0, "pattern": (True,)}, "window=0"),
    ({"softcap": 0.0}, "softcap must be positive"),
    ({"dropout": 1.5}, "dropout must be in"),
  ],
)
def test_a_configuration_that_does_not_fit_is_refused(change, message):
  with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
    dataclasses.replace(SMALL, **change)


def test_rotations_and_inputs_that_are_not_there_are_refused():
  with pytest.raises(ValueError, match="kind='yarn'"):
    Rope(kind="yarn")
  with pytest.raises(ValueError, match="high_frequency=1"):
    Rope(kind="llama3", low_frequency=2.0, high_frequency=1.0)
  variables = made(SMALL)
  with pytest.raises(ValueError, match="'tokens'"):
    Decoder(SMALL).apply(variables, {"ids": tokens_of(0, 1, 3)})
  with pytest.raises(ValueError, match="cache has 2 slots, and 3 tokens"):
    Decoder(SMALL).apply(variables, tokens_of(0, 1, 3), None, None, Cache.empty(SMALL, 1, 2))
