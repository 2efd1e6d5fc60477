"""Hugging Face's folders: read, refused, written. transformers itself is in tests/parity."""

import dataclasses
import json
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy as files
from jax.sharding import NamedSharding, PartitionSpec

import test_decoder
from jaxdistill import teachers
from jaxdistill.networks import pretrained
from jaxdistill.networks.models import Decoder, DecoderConfig, Rope, stacked
from jaxdistill.runs import CheckpointError
from test_decoder import FAMILIES, SMALL, applied, made, tokens_of

# What the configs of published models say, with their own fields, small numbers in place of large.
SIZES = {
  "vocab_size": 50,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 4,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-05,
}
LLAMA_3 = SIZES | {
  "architectures": ["LlamaForCausalLM"],
  "attention_bias": False,
  "hidden_act": "silu",
  "mlp_bias": False,
  "model_type": "llama",
  "rope_scaling": {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
  },
  "rope_theta": 500000.0,
  "tie_word_embeddings": True,
}
QWEN_2 = SIZES | {
  "architectures": ["Qwen2ForCausalLM"],
  "hidden_act": "silu",
  "max_window_layers": 2,
  "model_type": "qwen2",
  "rope_theta": 1000000.0,
  "sliding_window": 32768,
  "tie_word_embeddings": False,
  "use_sliding_window": False,
}
GEMMA_2 = SIZES | {
  "architectures": ["Gemma2ForCausalLM"],
  "attn_logit_softcapping": 50.0,
  "final_logit_softcapping": 30.0,
  "head_dim": 8,
  "hidden_act": "gelu_pytorch_tanh",
  "hidden_activation": "gelu_pytorch_tanh",
  "model_type": "gemma2",
  "query_pre_attn_scalar": 16,
  "rope_theta": 10000.0,
  "sliding_window": 4096,
}
GEMMA_3 = SIZES | {
  "architectures": ["Gemma3ForCausalLM"],
  "head_dim": 8,
  "hidden_activation": "gelu_pytorch_tanh",
  "model_type": "gemma3_text",
  "query_pre_attn_scalar": 16,
  "rope_local_base_freq": 10000,
  "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
  "rope_theta": 1000000,
  "sliding_window": 512,
  "sliding_window_pattern": 3,
}


def test_published_configs_are_read():
  llama = pretrained.config(LLAMA_3)
  assert llama == DecoderConfig(
    50,
    16,
    layers=4,
    heads=4,
    kv_heads=2,
    head_dim=4,
    hidden=24,
    norm_epsilon=1e-5,
    rope=Rope(5e5, "llama3", 32.0, 1.0, 4.0, 8192),
    tied=True,
  )
  qwen = pretrained.config(QWEN_2)
  assert (qwen.qkv_bias, qwen.output_bias, qwen.window, qwen.rope) == (True, False, None, Rope(1e6))
  windowed = pretrained.config(QWEN_2 | {"use_sliding_window": True})
  assert windowed.windows == (False, False, True, True)
  mistral = LLAMA_3 | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
  assert pretrained.config(mistral | {"sliding_window": None}).window is None
  assert pretrained.config(mistral | {"sliding_window": 7}).windows == (True,) * 4
  gemma = pretrained.config(GEMMA_2)
  assert gemma.windows == (True, False, True, False)
  assert (gemma.tied, gemma.softcap, gemma.score_softcap, gemma.query_scale) == (True, 30, 50, 0.25)
  assert gemma.activation == "gelu_tanh"
  gemma = pretrained.config(GEMMA_3)
  assert gemma.windows == (True, True, False, True)
  assert gemma.rope == Rope(1e6, "linear", 8.0)
  assert gemma.window_rope == Rope(1e4)
  assert (gemma.qk_norm, gemma.post_norms, gemma.softcap) == (True, True, None)


def test_fields_of_both_versions_mean_the_same():
  v5 = dict(LLAMA_3)
  scaling = v5.pop("rope_scaling")
  v5["rope_parameters"] = {**scaling, "rope_theta": v5.pop("rope_theta")}
  assert pretrained.config(v5) == pretrained.config(LLAMA_3)
  old = {**scaling, "type": scaling["rope_type"]}
  del old["rope_type"]
  assert pretrained.config(LLAMA_3 | {"rope_scaling": old}) == pretrained.config(LLAMA_3)
  v5 = dict(GEMMA_3)
  v5["rope_parameters"] = {
    "full_attention": {**v5.pop("rope_scaling"), "rope_theta": v5.pop("rope_theta")},
    "sliding_attention": {"rope_type": "default", "rope_theta": v5.pop("rope_local_base_freq")},
  }
  del v5["sliding_window_pattern"]
  kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
  assert pretrained.config(v5 | {"layer_types": kinds}) == pretrained.config(GEMMA_3)


@pytest.mark.parametrize(
  ("told", "message"),
  [
    (LLAMA_3 | {"architectures": ["MixtralForCausalLM"]}, "'MixtralForCausalLM' is not one of"),
    (LLAMA_3 | {"model_type": "qwen2"}, "model_type='qwen2'"),
    (SIZES, "architectures="),
    (LLAMA_3 | {"hidden_act": "relu"}, "hidden_act='relu'"),
    ({k: v for k, v in LLAMA_3.items() if k != "hidden_act"}, "hidden_act=None"),
    (LLAMA_3 | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
    (LLAMA_3 | {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "lacks ..high_freq"),
    (LLAMA_3 | {"quantization_config": {"quant_method": "awq"}}, "quantised by awq"),
    (LLAMA_3 | {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({k: v for k, v in LLAMA_3.items() if k != "hidden_size"}, "has no hidden_size"),
    (GEMMA_2 | {"layer_types": ["full_attention"]}, "1 entries for num_hidden_layers=4"),
    (GEMMA_2 | {"layer_types": ["chunked_attention"] * 4}, "'chunked_attention'"),
    (GEMMA_2 | {"layer_types": ["sliding_attention"] * 4, "sliding_window": None}, "is null"),
    (GEMMA_3 | {"use_bidirectional_attention": True}, "causal"),
    (LLAMA_3 | {"num_key_value_heads": 3}, "kv_heads=3 must divide"),
  ],
)
def test_what_is_not_known_is_refused_by_name(told, message):
  with pytest.raises(ValueError, match=message):
    pretrained.config(told)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_comes_back_as_it_was_saved(name, tmp_path):
  config, there = FAMILIES[name], made(FAMILIES[name])
  pretrained.save(tmp_path / "out", there, config, more={"eos_token_id": 3})
  read = pretrained.config(tmp_path / "out")
  assert read.windows == config.windows
  assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 3
  back = pretrained.variables(tmp_path / "out", read)
  jax.tree.map(np.testing.assert_array_equal, back, there)
  tokens = tokens_of(1, 1, 8)
  want, got = (applied(c)(v, tokens) for c, v in ((config, there), (read, back)))
  np.testing.assert_allclose(got.head(got.hidden), want.head(want.hidden), rtol=0, atol=1e-6)


def theirs(config, seed=0, dtype=np.float32):
  """Tensors by Hugging Face's names, written by hand for a Llama."""
  rng, c = np.random.default_rng(seed), config
  D, K = c.width, c.head_dim
  shapes = {"model.embed_tokens.weight": (c.vocabulary, D), "model.norm.weight": (D,)}
  if not c.tied:
    shapes["lm_head.weight"] = (c.vocabulary, D)
  for i in range(c.layers):
    p = f"model.layers.{i}."
    shapes |= {
      f"{p}self_attn.q_proj.weight": (c.heads * K, D),
      f"{p}self_attn.k_proj.weight": (c.kv_heads * K, D),
      f"{p}self_attn.v_proj.weight": (c.kv_heads * K, D),
      f"{p}self_attn.o_proj.weight": (D, c.heads * K),
      f"{p}mlp.gate_proj.weight": (c.hidden, D),
      f"{p}mlp.up_proj.weight": (c.hidden, D),
      f"{p}mlp.down_proj.weight": (D, c.hidden),
      f"{p}input_layernorm.weight": (D,),
      f"{p}post_attention_layernorm.weight": (D,),
    }
  return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def folder_of(path, told, tensors, name="model.safetensors"):
  path.mkdir(exist_ok=True)
  (path / "config.json").write_text(json.dumps(told))
  files.save_file(tensors, path / name)
  return path


def test_maps_are_turned_and_heads_have_their_axis(tmp_path):
  config = pretrained.config(LLAMA_3)
  tensors = theirs(config)
  read = pretrained.variables(folder_of(tmp_path, LLAMA_3, tensors), config)["params"]
  x = np.random.default_rng(1).normal(size=16).astype(np.float32)
  layer = read["layer_2"]
  # PyTorch computes weight @ x, and has head h in rows h·K .. (h+1)·K - 1.
  query = tensors["model.layers.2.self_attn.q_proj.weight"] @ x
  np.testing.assert_allclose(
    np.einsum("d,dhk->hk", x, layer["attention"]["query"]["kernel"]), query.reshape(4, 4), rtol=1e-5
  )
  out = tensors["model.layers.2.self_attn.o_proj.weight"] @ x
  np.testing.assert_allclose(
    np.einsum("hk,hkd->d", x.reshape(4, 4), layer["attention"]["out"]["kernel"]), out, rtol=1e-4
  )
  np.testing.assert_array_equal(
    layer["mlp_norm"]["scale"], tensors["model.layers.2.post_attention_layernorm.weight"]
  )
  assert "head" not in read


@pytest.mark.slow
def test_shards_dtypes_layouts_and_shardings(tmp_path):
  there = made(SMALL)
  pretrained.save(tmp_path, there, SMALL, shard_bytes=9_000)
  names = sorted(path.name for path in tmp_path.iterdir())
  assert names[0] == "config.json"
  assert "model.safetensors.index.json" in names
  assert len(names) > 3
  index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(there))
  assert index["metadata"]["total_size"] == size
  jax.tree.map(np.testing.assert_array_equal, pretrained.variables(tmp_path, SMALL), there)

  half = pretrained.variables(tmp_path, SMALL, dtype=jnp.bfloat16)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(half)} == {"bfloat16"}
  scanned = dataclasses.replace(SMALL, scan=True)
  read = pretrained.variables(tmp_path, scanned)
  jax.tree.map(np.testing.assert_array_equal, read, stacked(there))
  pretrained.save(tmp_path / "scanned", read, scanned)
  jax.tree.map(
    np.testing.assert_array_equal, pretrained.variables(tmp_path / "scanned", SMALL), there
  )

  mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
  whole = NamedSharding(mesh, PartitionSpec())
  placed = pretrained.variables(tmp_path, SMALL, sharding=whole)
  assert {leaf.sharding for leaf in jax.tree.leaves(placed)} == {whole}
  split = NamedSharding(mesh, PartitionSpec(None, "model"))
  rules = jax.tree.map(lambda leaf: split if leaf.shape[1:] == (20,) else whole, there)
  placed = pretrained.variables(tmp_path, SMALL, sharding=rules)
  assert placed["params"]["layer_0"]["mlp"]["up"]["kernel"].sharding == split
  with pytest.raises(ValueError, match="sharding must be a jax.sharding.Sharding, or a pytree"):
    pretrained.variables(tmp_path, SMALL, sharding={"params": {"head": split}})


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_the_host_holds_one_leaf_at_a_time(scan, tmp_path, monkeypatch):
  config = DecoderConfig(
    2048, 256, layers=8, heads=2, kv_heads=2, head_dim=128, hidden=256, tied=True, scan=scan
  )
  tensors = theirs(config)
  index = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(tensors)}
  for file in sorted(set(index.values())):
    files.save_file({n: tensors[n] for n in tensors if index[n] == file}, tmp_path / file)
  (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
  whole = sum(tensor.nbytes for tensor in tensors.values())
  del tensors
  sizes = []

  def placed(where, value, like):
    sizes.append(value.nbytes)
    return jnp.zeros(())

  # What is placed is the devices', and when JAX lets go of the host's copy is its own affair.
  monkeypatch.setattr(pretrained.weights, "as_like", placed)
  pretrained.variables(tmp_path, config)  # what is traced once
  tracemalloc.start()
  pretrained.variables(tmp_path, config)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  # A leaf, and of its last tensor what was read and what is turned; NumPy's memory is traced. What
  # Python and JAX take beside it depends on which tests ran before; two leaves are more than that.
  tensor = max(sizes) // (config.layers if scan else 1)
  assert peak < max(sizes) + 2 * tensor + 1_500_000 < whole / 2, (peak, sizes, whole)


def test_files_in_bfloat16_stay_so(tmp_path):
  config = pretrained.config(LLAMA_3)
  tensors = theirs(config, dtype=ml_dtypes.bfloat16)
  read = pretrained.variables(folder_of(tmp_path / "a", LLAMA_3, tensors), config)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(read)} == {"bfloat16"}
  pretrained.save(tmp_path / "b", read, config)
  assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"
  for name, value in files.load_file(tmp_path / "b" / "model.safetensors").items():
    np.testing.assert_array_equal(value, tensors[name])


def test_a_head_that_differs_wins_over_the_flag(tmp_path):
  config = pretrained.config(LLAMA_3)
  tensors = theirs(config)
  copied = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
  same = folder_of(tmp_path / "same", LLAMA_3, copied)
  assert pretrained.config(same).tied
  assert "head" not in pretrained.variables(same, config)["params"]
  own = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}
  folder = folder_of(tmp_path / "own", LLAMA_3, own)
  with pytest.warns(UserWarning, match="that head is taken"):
    read = pretrained.config(folder)
  assert read == dataclasses.replace(config, tied=False)
  head = pretrained.variables(folder, read)["params"]["head"]
  np.testing.assert_array_equal(head, own["lm_head.weight"].T)
  with pytest.raises(ValueError, match=r"tied=False"):
    pretrained.variables(folder, config)


def test_all_that_is_wrong_with_names_is_said_at_once(tmp_path):
  config = pretrained.config(LLAMA_3 | {"tie_word_embeddings": False})
  tensors = theirs(config)
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
  del tensors["lm_head.weight"], tensors["model.layers.3.mlp.up_proj.weight"]
  tensors["model.layers.9.mlp.up_proj.weight"] = np.ones((2, 2), np.float32)
  tensors["model.norm.weight"] = np.ones(3, np.float32)
  folder = folder_of(tmp_path, LLAMA_3, tensors)
  with pytest.raises(ValueError, match="are not those of config") as caught:
    pretrained.variables(folder, config)
  message = str(caught.value)
  for part in (
    "Missing: lm_head.weight, model.layers.3.mlp.up_proj.weight",
    "Unexpected: model.layers.9.mlp.up_proj.weight.",
    "model.norm.weight is (3,), not (16,)",
  ):
    assert part in message
  assert "inv_freq" not in message


def test_what_cannot_be_read_or_written_is_said(tmp_path):
  config = pretrained.config(LLAMA_3)
  with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
    pretrained.config(tmp_path)
  folder = folder_of(tmp_path / "int8", LLAMA_3, theirs(config, dtype=np.int8))
  with pytest.raises(ValueError, match="int8, and no float"):
    pretrained.variables(folder, config)
  (tmp_path / "int8" / "model.safetensors").write_bytes(b"no such thing")
  with pytest.raises(CheckpointError, match="truncated, or no safetensors"):
    pretrained.variables(folder, config)
  (tmp_path / "pickled").mkdir()
  (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
  with pytest.raises(ValueError, match="nothing is unpickled"):
    pretrained.variables(tmp_path / "pickled", config)
  there = made(SMALL)
  with pytest.raises(ValueError, match=r"params/head is missing"):
    pretrained.save(tmp_path / "no", {"params": {}}, SMALL)
  with pytest.raises(ValueError, match=r"more has \['vocab_size'\]"):
    pretrained.save(tmp_path / "no", there, SMALL, more={"vocab_size": 3})
  odd = dataclasses.replace(SMALL, softcap=3.0)
  with pytest.raises(ValueError, match="is none of"):
    pretrained.save(tmp_path / "no", there, odd)
  assert not (tmp_path / "no").exists()
  with pytest.raises(ValueError, match="something else"):
    pretrained.save(tmp_path / "int8", there, SMALL, shard_bytes=9_000)


def test_a_student_starts_from_layers_of_its_teacher():
  teacher = made(SMALL)
  config = dataclasses.replace(SMALL, layers=2)
  kept = {"layer_0": "layer_0", "layer_1": "layer_2"}
  rest = {name: name for name in ("embed", "final_norm", "head")}
  student = teachers.layers(teacher, {**kept, **rest})
  shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens_of(0, 1, 3))
  assert jax.tree.map(jnp.shape, student) == jax.tree.map(jnp.shape, shapes)
  tokens = tokens_of(1, 1, 6)
  want = test_decoder.reference(config, student, tokens[0])
  got = applied(config)(student, tokens)
  np.testing.assert_allclose(got.head(got.hidden)[0], want, rtol=0, atol=1e-4)
