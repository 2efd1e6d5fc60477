"""The decoder beside transformers' own, with random weights, norms and biases far from 1 and 0."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

REASON = "no PyTorch or transformers here: CONTRIBUTING.md has the command that makes their place"
torch = pytest.importorskip("torch", reason=REASON)
with warnings.catch_warnings():
  warnings.simplefilter("ignore")
  transformers = pytest.importorskip("transformers", reason=REASON)

from jaxdistill.networks import pretrained
from jaxdistill.networks.models import Cache, Decoder, stacked

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

SIZES = {
  "vocab_size": 83,
  "hidden_size": 40,
  "intermediate_size": 56,
  "num_hidden_layers": 4,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 512,
  "rms_norm_eps": 2e-5,
  "pad_token_id": 0,
  "bos_token_id": 1,
  "eos_token_id": 2,
}
LLAMA_3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 64,
}
FAMILIES = {
  "llama 2": ("Llama", {"num_key_value_heads": 4}),
  "llama 3": ("Llama", {"rope_parameters": {**LLAMA_3, "rope_theta": 5e5}}),
  "llama biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
  "smollm": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
  "mistral": ("Mistral", {"sliding_window": 6, "head_dim": 14}),
  "qwen 2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
  "qwen 2 windows": (
    "Qwen2",
    {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3},
  ),
  "qwen 3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
  "gemma": ("Gemma", {"head_dim": 12}),
  "gemma 2": ("Gemma2", {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 5}),
  "gemma 3": (
    "Gemma3",
    {
      "head_dim": 12,
      "query_pre_attn_scalar": 20,
      "sliding_window": 5,
      "sliding_window_pattern": 3,
      "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
  ),
}


def drawn(name, seed):
  """A family of sizes that nobody chose: ``(class, options)``."""
  rng = np.random.default_rng([seed, *name.encode()])
  family, options = FAMILIES[name]
  groups, each = int(rng.integers(1, 4)), int(rng.integers(1, 4))
  sizes = {
    "vocab_size": int(rng.integers(50, 400)),
    "num_attention_heads": groups * each,
    "num_key_value_heads": groups,
    "hidden_size": groups * each * int(rng.integers(4, 9)) * 2,
    "intermediate_size": int(rng.integers(30, 200)),
    "num_hidden_layers": int(rng.integers(3, 8)),
    "rms_norm_eps": float(10 ** rng.uniform(-6, -4)),
  }
  others = {
    "head_dim": int(rng.integers(3, 14)) * 2,
    "sliding_window": int(rng.integers(2, 12)),
    "query_pre_attn_scalar": int(rng.integers(8, 40)),
  }
  # What a family has none of, or leaves to the widths, stays so.
  return family, {**options, **sizes, **{n: v for n, v in others.items() if n in options}}


def network_of(name, seed=None):
  family, options = FAMILIES[name] if seed is None else drawn(name, seed)
  config_class = {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config")
  config = getattr(transformers, config_class)(**{**SIZES, **options})
  config._attn_implementation = "eager"
  network = getattr(transformers, f"{family}ForCausalLM")(config).eval()
  rng = np.random.default_rng(7 if seed is None else seed)
  with torch.no_grad():
    for parameter in network.parameters():
      # Maps that keep the size of what they map: larger ones amplify both sides' rounding.
      width = 0.3 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
      value = rng.normal(size=tuple(parameter.shape)) * width
      parameter.copy_(torch.tensor(value + (parameter.ndim == 1) * 0.7))
  return network


def logits_of(network, tokens):
  with torch.no_grad():
    return network(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def ours_of(config, variables, tokens, **options):
  module = Decoder(config, **options)

  def call(variables, tokens):
    outputs = module.apply(variables, tokens)
    return outputs.head(outputs.hidden)

  return np.asarray(jax.jit(call)(variables, tokens))


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers_both_ways(name, seed, tmp_path):
  network = network_of(name, seed)
  vocabulary = network.config.vocab_size
  tokens = np.random.default_rng(1).integers(0, vocabulary, (3, 29)).astype(np.int32)
  want = logits_of(network, tokens)
  network.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
  config = pretrained.config(tmp_path / "theirs")
  variables = pretrained.variables(tmp_path / "theirs", config)
  scale = np.abs(want).max()
  assert scale > 1
  got = ours_of(config, variables, tokens)
  print(f"{name}, {seed}: {np.abs(got - want).max() / scale:.2e} of the largest")
  # Of drawn sizes some amplify both sides' rounding more: Gemma's of seed 1 comes to 5.0e-6.
  assert np.abs(got - want).max() <= (5e-6 if seed is None else 1e-5) * scale

  # And back, the layers scanned, in several files.
  scanned = dataclasses.replace(config, scan=True)
  pretrained.save(
    tmp_path / "ours",
    pretrained.variables(tmp_path / "theirs", scanned),
    scanned,
    shard_bytes=50_000,
  )
  back = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "ours", attn_implementation="eager"
  ).eval()
  assert type(back) is type(network)
  np.testing.assert_array_equal(logits_of(back, tokens), want)


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in ("gemma", "llama biases")])
def test_however_it_is_run_it_is_the_same(name, tmp_path):
  network = network_of(name, seed=3)
  network.save_pretrained(tmp_path)
  config = pretrained.config(tmp_path)
  variables = pretrained.variables(tmp_path, config)
  rng = np.random.default_rng(4)
  lengths, length = (7, 1, 13), 24
  documents = [rng.integers(0, config.vocabulary, (1, n)).astype(np.int32) for n in lengths]
  row = {n: np.zeros((1, length), np.int32) for n in ("tokens", "positions", "segments")}
  at, want = 0, []
  for i, document in enumerate(documents):
    here = slice(at, at := at + document.shape[1])
    row["tokens"][0, here], row["segments"][0, here] = document[0], i + 1
    row["positions"][0, here] = np.arange(document.shape[1])
    want.append(logits_of(network, document)[0])
  want = np.concatenate(want)
  within = 5e-6 * np.abs(want).max()
  ways = {
    "packed": {},
    "scanned": {"scan": True},
    "scanned, recomputed": {"scan": True, "remat": "dots"},
    "recomputed": {"remat": "block"},
  }
  for way, how in ways.items():
    other = dataclasses.replace(config, **how)
    there = stacked(variables) if other.scan else variables
    apart = np.abs(ours_of(other, there, row)[0, :at] - want).max()
    print(f"{name}, {way}: {apart / np.abs(want).max():.2e} of the largest")
    assert apart <= within, way

  step = jax.jit(Decoder(config).apply)
  cache, found = Cache.empty(config, 1, length), []
  for i in range(documents[2].shape[1]):
    outputs, cache = step(variables, documents[2][:, i : i + 1], None, None, cache)
    found.append(np.asarray(outputs.head(outputs.hidden))[0, 0])
  apart = np.abs(np.stack(found) - want[-len(found) :]).max()
  print(f"{name}, token by token: {apart / np.abs(want).max():.2e} of the largest")
  assert apart <= within


@pytest.mark.parametrize("name", FAMILIES)
def test_the_first_choice_is_the_same_in_bfloat16(name, tmp_path):
  network = network_of(name)
  network.save_pretrained(tmp_path)
  config = pretrained.config(tmp_path)
  tokens = np.random.default_rng(5).integers(0, 83, (64, 40)).astype(np.int32)
  variables = pretrained.variables(tmp_path, config)
  exact = ours_of(config, variables, tokens)
  short = ours_of(config, variables, tokens, dtype=jnp.bfloat16)
  first = np.sort(exact, axis=-1)
  # Of the largest logit: where the first two are closer than bfloat16's rounding, either may win.
  clear = first[..., -1] - first[..., -2] > 0.05 * np.abs(exact).max()
  same = (exact.argmax(-1) == short.argmax(-1))[clear]
  print(f"{name}: {same.mean():.2%} of {same.size} positions")
  assert same.size > 100
  assert same.mean() >= 0.999


@pytest.mark.parametrize("name", ["llama 3", "gemma 2"])
def test_bfloat16_agrees_where_it_can(name, tmp_path):
  network = network_of(name)
  network.save_pretrained(tmp_path)
  config = pretrained.config(tmp_path)
  tokens = np.random.default_rng(2).integers(0, 83, (8, 40)).astype(np.int32)
  variables = pretrained.variables(tmp_path, config)
  exact = ours_of(config, variables, tokens)
  ours = ours_of(config, variables, tokens, dtype=jnp.bfloat16)
  # As far from the exact logits as PyTorch's own bfloat16 is.
  with torch.no_grad():
    theirs = network.bfloat16()(torch.tensor(tokens, dtype=torch.long)).logits.float().numpy()
  off = [np.sqrt(np.mean(np.square(found - exact))) for found in (ours, theirs)]
  assert off[0] <= 1.2 * off[1], off
