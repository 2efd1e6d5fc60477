"""Language models that nobody here wrote: Flax's own examples, in Linen and in NNX, as they are."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxdistill as jd
from foreign import flax_gemma, flax_lm1b
from jaxdistill import data, networks, recipes, teachers, train
from jaxdistill.evaluation import tasks
from jaxdistill.networks.models import Decoder
from jaxdistill.networks.models.decoder import causal_mask
from jaxdistill.types import Head, Model, Outputs, make_batch, with_logits
from small_networks import untyped
from test_decoder import FAMILIES, made

V, L = 256, 12  # bytes
TEXT = ["To be, or not to be:", "that is the question.", "Whether 'tis nobler", "in the mind"] * 4


@pytest.fixture(autouse=True)
def _foreign_ranks():
  # Both add [D] to [B, L, D].
  with jax.numpy_rank_promotion("allow"):
    yield


def unshifted(inputs):
  """What a network reads that shifts by itself: the labels, of which it sees those before."""
  return {
    "inputs": jnp.roll(inputs["tokens"], -1, axis=1),
    "inputs_positions": inputs["positions"],
    "inputs_segmentation": inputs["segments"],
  }


def lm1b(width=16, layers=1, head=True, **options):
  """`examples/lm1b`, Linen: it shifts by itself, and its config says whether it trains."""
  config = flax_lm1b.TransformerConfig(
    vocab_size=V,
    output_vocab_size=V,
    emb_dim=width,
    num_heads=2,
    num_layers=layers,
    qkv_dim=width,
    mlp_dim=2 * width,
    max_len=32,
    **options,
  )
  module = flax_lm1b.TransformerLM(config)
  last = {"last": "decoder/encoderdecoder_norm"}
  network = networks.linen(module, features=last, arguments=unshifted)

  def made(params):
    if config.logits_via_embedding:
      table = params["decoder"]["Embed_0"]["embedding"]
      return Head(table, scale=width**-0.5, transposed=True)
    dense = params["decoder"]["logitdense"]
    return Head(dense["kernel"], bias=dense["bias"])

  return networks.with_head(network, hidden="last", head=made) if head else network


def gemma_config(width=16, layers=2, **options):
  kinds = flax_gemma.AttentionType
  return flax_gemma.TransformerConfig(
    num_layers=layers,
    num_embed=V,
    embed_dim=width,
    hidden_dim=2 * width,
    num_heads=2,
    head_dim=8,
    num_kv_heads=1,
    final_logit_softcap=5.0,
    use_post_attn_norm=True,
    use_post_ffw_norm=True,
    attention_types=(kinds.LOCAL_SLIDING, kinds.GLOBAL)[:layers],
    attn_logits_soft_cap=50.0,
    sliding_window_size=4,
    **options,
  )


def packed_mask(inputs):
  """The arguments of Gemma's transformer."""
  at, segment = inputs["positions"], inputs["segments"]
  mask = causal_mask(at, segment, at, segment)
  return {
    "last_tokens": inputs["tokens"],
    "positions": at,
    "cache": None,
    "attention_mask": mask,
  }


def gemma(head=True, softcap=5.0, **options):
  """`examples/gemma`, NNX: it is given its mask, and its embedding is its head."""
  config = gemma_config(**options)
  network = networks.nnx(
    lambda rngs: flax_gemma.Transformer(config, rngs=rngs),
    features={"last": "final_dropout"},
    arguments=packed_mask,
    logits=lambda out: out[0],
  )

  def made(params):
    return Head(params["embedder"]["embedding"], softcap=softcap, transposed=True)

  return networks.with_head(network, hidden="last", head=made) if head else network


FOREIGN = {
  "lm1b": lm1b,
  "lm1b, tied": functools.partial(lm1b, logits_via_embedding=True),
  "gemma": gemma,
}


@functools.cache
def examples():
  return data.from_text(TEXT, data.tokenizers.utf8(), length=L)


def source():
  return data.on_device(examples(), batch_size=4, data_seed=0)


def rows(count=3):
  return jax.tree.map(lambda leaf: jnp.asarray(leaf[:count]), examples().inputs)


def started(network, seed=0):
  return jax.jit(network.init)(jax.random.key(seed), rows())


@pytest.mark.slow
@pytest.mark.parametrize(
  "name", ["lm1b", pytest.param("lm1b, tied", marks=pytest.mark.slow), "gemma"]
)
def test_hidden_states_and_head_make_the_modules_own_logits(name):
  inside, plain = FOREIGN[name](), FOREIGN[name](head=False)
  variables = started(inside)
  jax.tree.map(np.testing.assert_array_equal, variables, started(plain))

  @jax.jit
  def both(variables, inputs):
    return [n.apply(variables, inputs, train=False, key=None)[0] for n in (inside, plain)]

  outputs, wanted = both(variables, rows())
  assert outputs.logits is None
  got, want = with_logits(outputs).logits, wanted.logits
  # Two orders of one product in float32.
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("lm1b", marks=pytest.mark.slow), "gemma"])
def test_position_l_says_what_follows_it_and_sees_nothing_later(name):
  network = FOREIGN[name]()
  variables, inputs = started(network), rows(1)

  @jax.jit
  def logits(tokens):
    outputs, _ = network.apply(variables, {**inputs, "tokens": tokens}, train=False, key=None)
    return with_logits(outputs).logits[0]

  first = int(np.argmax(np.asarray(inputs["segments"][0]) != 1)) or L  # where the next begins
  at = min(first, L) - 3
  moved = logits(inputs["tokens"].at[0, at].add(1)) - logits(inputs["tokens"])
  changed = np.abs(np.asarray(moved)).max(-1) > 1e-6
  assert not changed[:at].any()
  assert changed[at : min(first, L)].all()
  # Nor does another document; what padding sees is nobody's.
  assert not changed[first:][np.asarray(inputs["segments"][0][first:]) > 0].any()


@pytest.mark.slow
def test_a_flag_in_a_modules_config_is_told():
  network = lm1b(dropout_rate=0.5, attention_dropout_rate=0.5)
  variables = started(network)

  @jax.jit
  def put_out(key):
    drawn, _ = network.apply(variables, rows(1), train=True, key=key)
    still, _ = network.apply(variables, rows(1), train=False, key=None)  # none is asked for
    return drawn.hidden, still.hidden

  (first, still), (second, again) = (put_out(jax.random.key(seed)) for seed in (0, 1))
  assert (first != second).any()
  assert (first != still).any()
  np.testing.assert_array_equal(still, again)
  named = networks.linen(
    flax_lm1b.TransformerLM(flax_lm1b.TransformerConfig(V, V, deterministic=True)),
    train_flag="config.deterministic",
    arguments=unshifted,
  )
  assert named.name == "TransformerLM"
  with pytest.raises(ValueError, match=r"config\.deterministic"):
    networks.linen(
      flax_lm1b.TransformerLM(flax_lm1b.TransformerConfig(V, V)), train_flag="deterministic"
    )


def model_of(network, seed=0):
  return Model(network, started(network, seed))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "of"), [("lm1b", "gemma"), ("gemma", "lm1b, tied")])
def test_each_teaches_the_other_and_is_deployed(name, of, tmp_path):
  teacher = teachers.frozen(model_of(FOREIGN[of](width=24)))
  how = {"optimizer": optax.adam(3e-3), "steps": 2, "data": source()}
  how["dispatch"] = train.with_jit(tokens_at_once=20)
  run = train.Run(tmp_path / "run", progress=None)
  fitted = train.fit(FOREIGN[name](), recipes.kd(), teacher=teacher, run=run, **how)
  batches = data.evaluation_batches(examples(), batch_size=4)
  task = tasks.tokens(token_bytes=np.ones(V, np.int32))
  report = jd.evaluation.evaluate(fitted, batches, teacher=teacher, task=task)
  assert 0 < report["bits_per_byte"] < 20
  assert 0 < report["acceptance"] < 1
  deployed = jd.export.load_student(tmp_path / "run")
  want = with_logits(fitted(rows())).logits
  np.testing.assert_allclose(deployed(rows()), want, rtol=0, atol=1e-5)


class Small(nn.Module):
  """Somebody's: a bias, a scale or a softcap behind its last map, and its own half precision."""

  scale: float = 1.0
  softcap: float | None = None
  bias: bool = True
  dtype: object = None

  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(V, 8, name="embed", dtype=self.dtype)(tokens)
    x = nn.LayerNorm(name="norm", dtype=self.dtype)(x)
    z = self.scale * nn.Dense(V, use_bias=self.bias, name="out", dtype=self.dtype)(x)
    return z if self.softcap is None else self.softcap * jnp.tanh(z / self.softcap)


def small(head, hidden="norm", **options):
  network = networks.linen(Small(**options), features=["embed", "norm", "out"], train_flag=None)
  return networks.with_head(network, hidden=hidden, head=head)


def dense(params, **options):
  out = params["out"]
  return Head(out["kernel"], bias=out.get("bias"), **options)


TOKENS = jnp.zeros((2, 5), jnp.int32)


@pytest.mark.parametrize(
  ("made", "message"),
  [
    (lambda: small(lambda p: Head(p["out"]["kernel"])), "makes other logits"),
    (lambda: small(dense, scale=0.7), "makes other logits"),
    (lambda: small(dense, softcap=30.0), "makes other logits"),
    (lambda: small(functools.partial(dense, softcap=30.0)), "makes other logits"),
    (lambda: small(dense, hidden="embed"), "makes other logits"),
    (lambda: small(lambda p: Head(p["embed"]["embedding"])), "transposed=False"),
    (lambda: small(lambda p: Head(p["out"]["kernel"][:, :9])), "of the shape"),
    (lambda: small(dense, hidden="last"), r"hidden='last' is no feature"),
    (lambda: small(lambda p: p["out"]["kernel"]), "types.Head"),
  ],
)
def test_a_head_that_is_another_is_refused(made, message):
  with pytest.raises((TypeError, ValueError), match=message):
    made().init(jax.random.key(0), TOKENS)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_a_head_that_is_the_modules_is_taken(dtype):
  made = small(
    functools.partial(dense, softcap=30.0, scale=0.7), softcap=30.0, scale=0.7, dtype=dtype
  )
  variables = made.init(jax.random.key(0), TOKENS)
  # Under a trace, and mapped over several students, as fit and sweep have it.
  both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), variables)

  @jax.jit
  def loss(both):
    def one(variables):
      return jnp.mean(with_logits(made.apply(variables, TOKENS, train=True, key=None)[0]).logits)

    return jnp.sum(jax.vmap(one)(both))

  assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(jax.grad(loss)(both)))
  mapped = jax.pmap(lambda v: made.apply(v, TOKENS, train=False, key=None)[0].hidden, "data")
  assert mapped(both).shape == (2, *TOKENS.shape, 8)


def test_a_head_keeps_the_names_of_axes_and_reads_what_is_cut():
  class Named(nn.Module):
    @nn.compact
    def __call__(self, tokens):
      x = nn.Embed(V, 8, name="embed")(tokens)
      ways = nn.with_partitioning(nn.initializers.lecun_normal(), ("width", "words"))
      return nn.Dense(V, name="out", kernel_init=ways)(x)

  plain = networks.linen(Named(), features=["embed"], train_flag=None)
  headed = networks.with_head(plain, hidden="embed", head=dense)
  assert headed.axes is not None
  assert headed.axes(TOKENS) == plain.axes(TOKENS)
  seen = []
  spec = jax.sharding.PartitionSpec("data")
  cut = headed.at_use({"params/out/kernel": spec}, lambda leaf, at: seen.append(at) or leaf * 2)
  variables = plain.init(jax.random.key(0), TOKENS)
  outputs, _ = cut.apply(variables, TOKENS, train=False, key=None)
  assert spec in seen
  np.testing.assert_array_equal(outputs.head.kernel, 2 * variables["params"]["out"]["kernel"])


def test_a_head_needs_logits_and_a_network():
  with untyped():
    with pytest.raises(TypeError, match=r"networks\.linen"):
      networks.with_head(Small(), hidden="norm", head=dense)
    with pytest.raises(TypeError, match="head must be a function"):
      networks.with_head(networks.linen(Small(), train_flag=None), hidden="norm", head=3)

  # Attention between what is named and the logits: they depend on more than it.
  class Later(nn.Module):
    @nn.compact
    def __call__(self, tokens):
      x = nn.Embed(V, 8, name="embed")(tokens)
      return nn.Dense(V, name="out")(x + nn.Embed(V, 8)(tokens))

  network = networks.linen(Later(), features=["embed"], train_flag=None)
  later = networks.with_head(network, hidden="embed", head=dense)
  with pytest.raises(ValueError, match="depend on more than"):
    later.init(jax.random.key(0), TOKENS)

  class Without(nn.Module):
    @nn.compact
    def __call__(self, tokens):
      return Outputs(hidden=nn.Embed(V, 8, name="embed")(tokens), head=Head(jnp.ones((8, V))))

  network = networks.linen(Without(), features=["embed"], train_flag=None)
  with pytest.raises(ValueError, match="puts out no logits"):
    networks.with_head(network, hidden="embed", head=dense).init(jax.random.key(0), TOKENS)


def test_normalisations_at_rest_stay_so_behind_a_head():
  class Normed(nn.Module):
    @nn.compact
    def __call__(self, tokens, train):
      x = nn.Embed(V, 8, name="embed")(tokens)
      x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
      return nn.Dense(V, name="out")(x)

  network = networks.with_head(
    networks.linen(Normed(), features=["norm"]), hidden="norm", head=dense
  )
  variables = network.init(jax.random.key(0), TOKENS)
  _, moved = network.apply(variables, TOKENS, train=True, key=None)
  still = network.at_rest(["norm"])
  assert still.name == network.name
  _, kept = still.apply(variables, TOKENS, train=True, key=None)
  jax.tree.map(np.testing.assert_array_equal, kept["batch_stats"], variables["batch_stats"])
  assert any(
    (a != b).any()
    for a, b in zip(
      jax.tree.leaves(moved["batch_stats"]), jax.tree.leaves(variables["batch_stats"]), strict=True
    )
  )


@pytest.mark.slow
def test_a_linen_and_an_nnx_module_in_chunks_have_the_gradients_of_the_whole():
  class Theirs(nnx.Module):
    def __init__(self, rngs):
      self.embed = nnx.Embed(V, 8, rngs=rngs)
      self.norm = nnx.LayerNorm(8, rngs=rngs)

    def __call__(self, tokens):
      return 3.0 * jnp.tanh(self.embed.attend(self.norm(self.embed(tokens))) / 3.0)

  tied = networks.with_head(
    networks.nnx(Theirs, features=["norm"]),
    hidden="norm",
    head=lambda params: Head(params["embed"]["embedding"], softcap=3.0, transposed=True),
  )
  student = small(dense)
  same_in_chunks(student, model_of_tokens(tied), V)
  same_in_chunks(tied, model_of_tokens(student), V)


def model_of_tokens(network):
  return Model(network, network.init(jax.random.key(7), TOKENS))


def same_in_chunks(student, teacher, vocabulary, start=None):
  """Value and gradients of a distillation in chunks are those of the whole."""
  variables = student.init(jax.random.key(1), TOKENS) if start is None else start
  tokens = np.random.default_rng(0).integers(0, vocabulary, (2, *TOKENS.shape)).astype(np.int32)
  ones = jnp.ones(TOKENS.shape)
  batch = dataclasses.replace(
    make_batch(tokens[0]), labels=jnp.asarray(tokens[1]), weight=ones, labelled=ones
  )
  objective = recipes.kd(temperature=2.0)

  def loss(params, objective, shown):
    outputs, _ = student.apply({**variables, "params": params}, batch.inputs, train=True, key=None)
    terms, _ = objective.apply(
      {}, {}, shown(outputs), shown(teacher(batch.inputs)), batch, key=jax.random.key(3), **HYPER
    )
    return train.reduce_terms(terms, batch)[0]

  @jax.jit
  def both(params):
    chunked = train.in_chunks(objective, tokens_at_once=4)
    ways = ((objective, with_logits), (chunked, lambda outputs: outputs))
    return [jax.value_and_grad(loss)(params, *way) for way in ways]

  want, got = (jax.tree.leaves(each) for each in both(variables["params"]))
  assert float(want[0]) > 0.1
  for mine, wanted in zip(got, want, strict=True):
    assert mine.dtype == wanted.dtype
    # Two orders of one sum in float32; in bfloat16 each of a few sums is rounded to eight bits.
    within = 2e-6 if mine.dtype == jnp.float32 else 2**-6
    apart = np.abs(np.subtract(mine, wanted, dtype=np.float32)).max()
    assert apart <= within * max(1e-3, np.abs(np.asarray(wanted, np.float32)).max())


HYPER = recipes.kd(temperature=2.0).hyper


# A teacher in its own dtype, whose head has what heads have.


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("qwen 2", marks=pytest.mark.slow), "gemma 2"])
def test_a_decoder_in_bfloat16_teaches_in_chunks_as_whole(name):
  teacher = short_decoder(name)
  assert teacher(TOKENS).hidden.dtype == jnp.bfloat16
  same_in_chunks(small(dense), teacher, V)


def short_decoder(name):
  """A decoder whose weights and computation are in bfloat16: a bias or softcaps; tied."""
  config = dataclasses.replace(FAMILIES[name], layers=1, vocabulary=V)
  short = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), made(config))
  return Model(networks.linen(Decoder(config, param_dtype=jnp.bfloat16)), short)


@pytest.mark.slow
def test_a_student_in_bfloat16_learns_in_chunks_as_whole():
  student, teacher = short_decoder("gemma 2"), model_of_tokens(small(dense))
  same_in_chunks(student.network, teacher, V, start=student.variables)
