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
from jaxdistill.networks.models import Decoder

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


def network_of(name):
  family, options = FAMILIES[name]
  config_class = {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config")
  config = getattr(transformers, config_class)(**{**SIZES, **options})
  config._attn_implementation = "eager"
  network = getattr(transformers, f"{family}ForCausalLM")(config).eval()
  rng = np.random.default_rng(7)
  with torch.no_grad():
    for parameter in network.parameters():
      # Maps that keep the size of what they map: larger ones amplify both sides' rounding.
      width = 0.3 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
      drawn = rng.normal(size=tuple(parameter.shape)) * width
      parameter.copy_(torch.tensor(drawn + (parameter.ndim == 1) * 0.7))
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


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers_both_ways(name, tmp_path):
  network = network_of(name)
  tokens = np.random.default_rng(1).integers(0, 83, (3, 29)).astype(np.int32)
  want = logits_of(network, tokens)
  network.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
  config = pretrained.config(tmp_path / "theirs")
  variables = pretrained.variables(tmp_path / "theirs", config)
  scale = np.abs(want).max()
  assert scale > 1
  got = ours_of(config, variables, tokens)
  print(f"{name}: {np.abs(got - want).max() / scale:.2e} of the largest")
  assert np.abs(got - want).max() <= 5e-6 * scale

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
