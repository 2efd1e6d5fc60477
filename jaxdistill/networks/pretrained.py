"""Language models in Hugging Face's folders, read into `models.Decoder`, and written back.

A folder holds ``config.json`` and safetensors, in one file or in several with an index. `config`
reads the first, `variables` the others, tensor by tensor; `save` writes both, so that transformers
(or a server that reads its folders) loads a student. Nothing is unpickled, and nothing of a
configuration is guessed: an architecture, an activation or a kind of rotation that is not known is
refused by its name, since a network that is almost the right one puts out almost the right text.

>>> import tempfile
>>> small = DecoderConfig(32, 8, layers=1, heads=2, kv_heads=1, head_dim=4, hidden=16)
>>> made = Decoder(small).init(jax.random.key(0), np.zeros((1, 4), np.int32))
>>> with tempfile.TemporaryDirectory() as folder:
...   save(folder, made, small)
...   read = variables(folder, config(folder))
>>> jax.tree.all(jax.tree.map(np.array_equal, made, read))
True
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxdistill import _check, _extras, runs
from jaxdistill.networks import weights
from jaxdistill.networks.models import Decoder, DecoderConfig, Rope
from jaxdistill.runs import first_few

__all__ = ["config", "save", "variables"]

PyTree = Any
_CONFIG = "config.json"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class _Family:
  """An architecture of transformers: which of its fields mean something, and what is always so.

  Attributes:
    name: its ``model_type``.
    fields: those that not all families have, with what transformers takes where one is not there.
    always: what of a `DecoderConfig` no field of it says.
    common: its own defaults of fields that all have.
  """

  name: str
  fields: Mapping[str, Any]
  always: Mapping[str, Any]
  common: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_QWEN = {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}
_GEMMA = {"centered_norms": True, "scale_embedding": True}
_GEMMA_COMMON = {"head_dim": 256, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"}
_GEMMA_FIELDS = {
  "attention_bias": False,
  "hidden_activation": None,
  "use_bidirectional_attention": False,
}
_GEMMA_2_FIELDS = {
  **_GEMMA_FIELDS,
  "query_pre_attn_scalar": 256,
  "sliding_window": 4096,
  "layer_types": None,
}
# By the class's name in ``architectures``.
_FAMILIES = {
  "LlamaForCausalLM": _Family("llama", {"attention_bias": False, "mlp_bias": False}, {}),
  "MistralForCausalLM": _Family("mistral", {"sliding_window": 4096}, {}),
  "Qwen2ForCausalLM": _Family("qwen2", {**_QWEN, "layer_types": None}, {"qkv_bias": True}),
  "Qwen3ForCausalLM": _Family(
    "qwen3",
    {**_QWEN, "layer_types": None, "attention_bias": False},
    {"qk_norm": True},
    {"head_dim": 128},
  ),
  "GemmaForCausalLM": _Family("gemma", _GEMMA_FIELDS, _GEMMA, _GEMMA_COMMON),
  "Gemma2ForCausalLM": _Family(
    "gemma2",
    {**_GEMMA_2_FIELDS, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    {**_GEMMA, "post_norms": True},
    _GEMMA_COMMON,
  ),
  "Gemma3ForCausalLM": _Family(
    "gemma3_text",
    {
      **_GEMMA_2_FIELDS,
      "final_logit_softcapping": None,
      "attn_logit_softcapping": None,
      "sliding_window_pattern": 6,
      "rope_local_base_freq": 10_000.0,
    },
    {**_GEMMA, "post_norms": True, "qk_norm": True},
    {**_GEMMA_COMMON, "rope_theta": 1_000_000.0},
  ),
}
_ACTIVATIONS = {
  "silu": "silu",
  "gelu": "gelu",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_new": "gelu_tanh",
}
# Fields of a `DecoderConfig` by those that every family has.
_SIZES = {
  "vocabulary": "vocab_size",
  "width": "hidden_size",
  "layers": "num_hidden_layers",
  "heads": "num_attention_heads",
  "hidden": "intermediate_size",
}


def config(source: str | os.PathLike[str] | Mapping[str, Any]) -> DecoderConfig:
  """What ``config.json`` says, as a `DecoderConfig`.

  Families: Llama 2 and 3 (SmolLM 1 and 2 are such), Mistral, Qwen 2, 2.5 and 3 (dense), Gemma 1, 2
  and 3 (text). Rotations are read in the fields of transformers 4 (``rope_theta``,
  ``rope_scaling``) and 5 (``rope_parameters``).

  Where a folder's config says that the head is the embedding, and a head that differs lies beside
  it, that head is the one that was trained: the result has ``tied=False``, with a warning.

  Args:
    source: the folder, its ``config.json``, or that file's content.

  Returns:
    The configuration, without dropout, remat or scan, which are of the training: choose them by
    ``dataclasses.replace``.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: an architecture, activation, kind of rotation or of layer is not known, a field is
      missing or does not fit, or the weights are quantised.

  >>> told = {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "vocab_size": 32,
  ...         "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
  ...         "intermediate_size": 16, "rope_theta": 500_000.0}
  >>> config(told).rope
  Rope(theta=500000.0, kind='default', factor=1.0, low_frequency=1.0, high_frequency=4.0, \
original_length=8192)
  """
  if isinstance(source, Mapping):
    return _parsed(source)
  place = _check.folder("source", source)
  file = place / _CONFIG if place.is_dir() else place
  if not file.is_file():
    raise FileNotFoundError(f"source={place} has no {_CONFIG}.")
  found = _parsed(runs.read_object(file))
  if found.tied and _other_head(file.parent):
    warnings.warn(
      f"{file} says that the head is the embedding, and the {_HEAD} beside it differs from it: "
      "that head is taken, tied=False.",
      stacklevel=2,
    )
    return dataclasses.replace(found, tied=False)
  return found


def _other_head(folder: pathlib.Path) -> bool:
  """Whether a folder has a head that is not the embedding."""
  if not any(path.suffix == ".safetensors" for path in folder.iterdir()):
    return False
  with weights.opened(folder) as there:
    head, embedding = there.get(_HEAD), there.get(_EMBEDDING)
    if head is None or embedding is None:
      return False
    return head.shape != embedding.shape or not np.array_equal(head.read(), embedding.read())


def _parsed(told: Mapping[str, Any]) -> DecoderConfig:
  family = _family(told)
  # What is absent, or null, is what transformers takes for this family.
  known = {"hidden_act": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
  known |= {**family.fields, **family.common}
  given = {**known, **{name: value for name, value in told.items() if value is not None}}
  for name in ("sliding_window", "final_logit_softcapping", "attn_logit_softcapping"):
    if name in told:  # null says that there is none
      given[name] = told[name]
  missing = sorted(name for name in _SIZES.values() if name not in given)
  if missing:
    raise ValueError(f"config.json has no {first_few(missing)}; every decoder has these.")
  _refuse(given)
  sizes: dict[str, Any] = {
    ours: _check.whole(theirs, given[theirs]) for ours, theirs in _SIZES.items()
  }
  _check.switch("tie_word_embeddings", given["tie_word_embeddings"])
  if sizes["heads"] > sizes["width"] and not given.get("head_dim"):
    raise ValueError(
      f"hidden_size={sizes['width']} has no channel for each of num_attention_heads="
      f"{sizes['heads']}: config.json lacks head_dim."
    )
  pattern = _pattern(given, family)
  rope, window_rope = _ropes(given, family)
  attention_bias = bool("attention_bias" in family.fields and given["attention_bias"])
  scalar = given["query_pre_attn_scalar"] if "query_pre_attn_scalar" in family.fields else None

  def own(name: str) -> Any:
    return given[name] if name in family.fields else None

  return DecoderConfig(
    **sizes,
    kv_heads=given.get("num_key_value_heads") or sizes["heads"],
    head_dim=given.get("head_dim") or sizes["width"] // sizes["heads"],
    norm_epsilon=given["rms_norm_eps"],
    rope=rope,
    window_rope=window_rope if any(pattern) else None,
    activation=_activation(given, family),
    output_bias=attention_bias,
    mlp_bias=bool(own("mlp_bias")),
    query_scale=None if scalar is None else scalar**-0.5,
    score_softcap=own("attn_logit_softcapping"),
    softcap=own("final_logit_softcapping"),
    window=given["sliding_window"] if any(pattern) else None,
    pattern=pattern if any(pattern) else (),
    tied=bool(given["tie_word_embeddings"]),
    **{"qkv_bias": attention_bias, **family.always},
  )


def _family(told: Mapping[str, Any]) -> _Family:
  """By ``architectures``, or ``model_type`` where there are none; both must be known."""
  architectures, kind = told.get("architectures") or (), told.get("model_type")
  if not isinstance(architectures, list | tuple):
    raise ValueError(f"architectures={_check.show(architectures)} of config.json must be a list.")
  known = {family.name: family for family in _FAMILIES.values()}
  for name in architectures:
    if name not in _FAMILIES:
      raise ValueError(
        f"architectures={list(architectures)} of config.json: {name!r} is not one of "
        f"{sorted(_FAMILIES)}."
      )
  found = [_FAMILIES[name] for name in architectures]
  if not found and kind in known:
    found = [known[kind]]
  if len(found) != 1 or (kind is not None and found[0].name != kind):
    raise ValueError(
      f"config.json has architectures={list(architectures)} and model_type={kind!r}; it must name "
      f"one of {sorted(_FAMILIES)}, or its model_type, one of {sorted(known)}."
    )
  return found[0]


def _refuse(given: Mapping[str, Any]) -> None:
  """What would change the network, and is not built here."""
  if given.get("quantization_config"):
    method = given["quantization_config"].get("quant_method", "an unnamed method")
    raise ValueError(f"quantization_config: weights quantised by {method} are not read.")
  if given.get("use_bidirectional_attention"):
    raise ValueError("use_bidirectional_attention=true: the decoder is causal.")
  if given.get("partial_rotary_factor", 1.0) != 1.0:
    raise ValueError(
      f"partial_rotary_factor={given['partial_rotary_factor']}: all channels are turned here."
    )


def _activation(given: Mapping[str, Any], family: _Family) -> str:
  name = given["hidden_act"]
  if "hidden_activation" in family.fields:
    # Gemma's first configs say "gelu", and its code has always meant the approximation.
    name = given["hidden_activation"] or ("gelu_pytorch_tanh" if name == "gelu" else name)
  if name not in _ACTIVATIONS:
    raise ValueError(f"hidden_act={name!r} of config.json is not one of {sorted(_ACTIVATIONS)}.")
  return _ACTIVATIONS[name]


def _pattern(given: Mapping[str, Any], family: _Family) -> tuple[bool, ...]:
  """Which layers see a window, as each family says it."""
  N, window = given["num_hidden_layers"], given.get("sliding_window")
  types = given.get("layer_types") if "layer_types" in family.fields else None
  if "use_sliding_window" in family.fields and not given["use_sliding_window"]:
    window = None  # Qwen's configs have a number there, whether it is used or not
  if types is not None:
    known = {"full_attention": False, "sliding_attention": True}
    odd = sorted(set(types) - set(known))
    if odd or len(types) != N:
      raise ValueError(
        f"layer_types of config.json has {len(types)} entries for num_hidden_layers={N}"
        f"{f', and {odd}, which are not among {sorted(known)}' if odd else ''}."
      )
    pattern = tuple(known[one] for one in types)
    if any(pattern) and window is None:
      raise ValueError("layer_types has 'sliding_attention', and sliding_window is null or unused.")
    return pattern
  if "sliding_window" not in family.fields or window is None:
    return ()
  if family.name == "mistral":
    return (True,) * N
  if "use_sliding_window" in family.fields:
    return tuple(i >= given["max_window_layers"] for i in range(N))
  every = given["sliding_window_pattern"] if "sliding_window_pattern" in family.fields else 2
  return tuple((i + 1) % every != 0 for i in range(N))


def _ropes(given: Mapping[str, Any], family: _Family) -> tuple[Rope, Rope | None]:
  """The rotations, and those of layers with a window where the family has two."""
  theta = given.get("rope_theta", 10_000.0)
  two = "rope_local_base_freq" in family.fields
  told = given.get("rope_parameters")  # transformers 5
  if told is None:  # transformers 4, whose scaling is of the layers that see everything
    told = given.get("rope_scaling") or {}
  if not isinstance(told, Mapping):
    raise ValueError(
      f"the rotations of config.json are {_check.show(told)}, and must be an object."
    )
  if "full_attention" in told or "sliding_attention" in told:
    full, near = told.get("full_attention") or {}, told.get("sliding_attention") or {}
  else:
    full, near = told, {}
  local = _rope(near, given["rope_local_base_freq"]) if two else None
  if near and not two and near != full:
    raise ValueError(f"rope_parameters={told}: {family.name} has one kind of rotation, not two.")
  return _rope(full, theta), local


def _rope(told: Mapping[str, Any], theta: float) -> Rope:
  kind = told.get("rope_type", told.get("type", "default"))
  needs = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
      "factor": "factor",
      "low_frequency": "low_freq_factor",
      "high_frequency": "high_freq_factor",
      "original_length": "original_max_position_embeddings",
    },
  }
  if kind not in needs:
    raise ValueError(f"rope_type={kind!r} of config.json is not one of {sorted(needs)}.")
  missing = sorted(name for name in needs[kind].values() if told.get(name) is None)
  if missing:
    raise ValueError(f"rope_type={kind!r} of config.json lacks {missing}.")
  if told.get("partial_rotary_factor", 1.0) != 1.0:
    raise ValueError(
      f"partial_rotary_factor={told['partial_rotary_factor']}: all channels are turned here."
    )
  numbers = {ours: told[theirs] for ours, theirs in needs[kind].items()}
  return Rope(theta=told.get("rope_theta", theta), kind=kind, **numbers)


def variables(
  folder: str | os.PathLike[str],
  config: DecoderConfig,
  *,
  dtype: Any = None,
  sharding: Any = None,
) -> dict[str, PyTree]:
  """Reads a folder's weights into the variables of ``models.Decoder(config)``.

  Each tensor is read, turned and put where it belongs before the next: the host holds one at a time
  (under ``config.scan`` one of all layers), whatever the model's size.

  Args:
    folder: with ``model.safetensors``, or with an index and what it names.
    config: from `config`, or one of its own for the same weights.
    dtype: of the variables; None for the files' own, which is often bfloat16.
    sharding: where they go: a ``jax.sharding.Sharding`` for all, or a pytree of them in the
      structure of the variables; None for the default device.

  Returns:
    ``{"params": ...}``.

  Raises:
    FileNotFoundError: there are no weights.
    ValueError: names are missing, unexpected or of other shapes, of which the message has the
      first; a tensor is no float; or the head differs from the embedding and ``config.tied``.
    CheckpointError: a file is damaged.
  """
  try:
    kind = None if dtype is None else jnp.dtype(dtype)
  except TypeError:
    kind = np.dtype(object)
  if kind is not None and not jnp.issubdtype(kind, jnp.floating):
    raise TypeError(f"dtype={_check.show(dtype)} must be of real numbers, jnp.bfloat16, or None.")
  shapes = traverse_util.flatten_dict(_shapes(config))
  one = sharding is None or isinstance(sharding, jax.sharding.Sharding)
  places = dict.fromkeys(shapes, sharding) if one else _shardings(sharding, shapes)
  found = {}
  with weights.opened(folder) as there:
    _compare(folder, there, config)
    for path, (names, _) in _tensors(config).items():
      like = shapes[path]
      several = path[1] == "layers"
      shape = like.shape[1:] if several else like.shape
      read = (_ours(there[name].read(), name, shape) for name in names)
      value = _stacked(read, like.shape) if several else next(read)
      wanted = jax.ShapeDtypeStruct(value.shape, dtype or value.dtype, sharding=places[path])
      placed = weights.as_like(f"{names[0]} of {os.fspath(folder)}", value, wanted)
      # Until it is there the host's copy is held, and the next is read sooner than it is sent.
      found[path] = placed.block_until_ready()
      del value  # nor beside the next one
  return traverse_util.unflatten_dict(found)


def _stacked(layers: Iterator[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
  """All layers' arrays as one, each put there as it is read: never all of them beside it."""
  first = next(layers)
  whole = np.empty(shape, first.dtype)
  whole[0] = first
  for i, one in enumerate(layers, start=1):
    if one.dtype != whole.dtype:
      whole = whole.astype(np.promote_types(one.dtype, whole.dtype))
    whole[i] = one
  return whole


def _shardings(sharding: PyTree, shapes: Mapping[tuple[str, ...], Any]) -> dict[Any, Any]:
  """A sharding for each path."""
  given = traverse_util.flatten_dict(sharding) if isinstance(sharding, Mapping) else {}
  if set(given) != set(shapes):
    odd = sorted("/".join(path) for path in set(given) ^ set(shapes))
    raise ValueError(
      "sharding must be a jax.sharding.Sharding, or a pytree of them for each of the variables; "
      f"these are in one alone: {first_few(odd)}."
    )
  return given


def _shapes(config: DecoderConfig) -> dict[str, PyTree]:
  """The variables' shapes."""
  tokens = jax.ShapeDtypeStruct((1, 2), np.int32)
  key = jax.eval_shape(lambda: jax.random.key(0))
  return jax.eval_shape(Decoder(config).init, key, tokens)


def _tensors(
  config: DecoderConfig,
) -> dict[tuple[str, ...], tuple[list[str], tuple[int, ...]]]:
  """Of each of our leaves the tensors that it is made of, and the shape of each of these."""
  c = config
  D, V = c.width, c.vocabulary
  found: dict[tuple[str, ...], tuple[list[str], tuple[int, ...]]] = {
    ("params", "embed", "embedding"): ([_EMBEDDING], (V, D)),
    ("params", "final_norm", "scale"): (["model.norm.weight"], (D,)),
  }
  if not c.tied:
    found["params", "head"] = ([_HEAD], (V, D))
  for theirs, (path, shape) in _layer(c).items():
    names = [f"model.layers.{i}.{theirs}" for i in range(c.layers)]
    inside = tuple(path.split("/"))
    if c.scan:
      found["params", "layers", *inside] = (names, shape)
    else:
      found |= {("params", f"layer_{i}", *inside): ([n], shape) for i, n in enumerate(names)}
  return found


def _layer(c: DecoderConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
  """A layer's tensors by their names: our path, and their shape."""
  D, K = c.width, c.head_dim
  maps = {
    "self_attn.q_proj": ("attention/query", (c.heads * K, D), c.qkv_bias),
    "self_attn.k_proj": ("attention/key", (c.kv_heads * K, D), c.qkv_bias),
    "self_attn.v_proj": ("attention/value", (c.kv_heads * K, D), c.qkv_bias),
    "self_attn.o_proj": ("attention/out", (D, c.heads * K), c.output_bias),
    "mlp.gate_proj": ("mlp/gate", (c.hidden, D), c.mlp_bias),
    "mlp.up_proj": ("mlp/up", (c.hidden, D), c.mlp_bias),
    "mlp.down_proj": ("mlp/down", (D, c.hidden), c.mlp_bias),
  }
  # One name, two places: where what a layer adds is normed, the MLP's norm is "pre_feedforward".
  norms = {"input_layernorm": ("attention_norm", D)}
  if c.post_norms:
    norms["post_attention_layernorm"] = ("post_attention_norm", D)
    norms["pre_feedforward_layernorm"] = ("mlp_norm", D)
    norms["post_feedforward_layernorm"] = ("post_mlp_norm", D)
  else:
    norms["post_attention_layernorm"] = ("mlp_norm", D)
  if c.qk_norm:
    norms |= {
      f"self_attn.{one}_norm": (f"attention/{name}_norm", K)
      for one, name in (("q", "query"), ("k", "key"))
    }
  found: dict[str, tuple[str, tuple[int, ...]]] = {
    f"{name}.weight": (f"{path}/scale", (size,)) for name, (path, size) in norms.items()
  }
  for name, (path, shape, bias) in maps.items():
    found[f"{name}.weight"] = (f"{path}/kernel", shape)
    if bias:
      found[f"{name}.bias"] = (f"{path}/bias", shape[:1])
  return found


def _ours(value: np.ndarray, name: str, shape: tuple[int, ...]) -> np.ndarray:
  """PyTorch's ``[out, in]`` as Flax's ``[in, out]``, with an axis of heads where there is one."""
  if not jax.dtypes.issubdtype(value.dtype, np.floating):
    raise ValueError(f"{name} is {value.dtype}, and no float: quantised weights are not read.")
  return value if name == _EMBEDDING else value.T.reshape(shape)


def _theirs(value: np.ndarray, name: str, shape: tuple[int, ...]) -> np.ndarray:
  """The way back."""
  return value if name == _EMBEDDING else value.reshape(shape[::-1]).T


def _compare(folder: Any, there: Mapping[str, weights.Tensor], config: DecoderConfig) -> None:
  """Raises where the tensors of a folder are not those of the decoder: says all that is wrong."""
  wanted = {name: shape for names, shape in _tensors(config).values() for name in names}
  surplus = [n for n in there if n not in wanted and not n.endswith("rotary_emb.inv_freq")]
  if config.tied and _HEAD in surplus and _EMBEDDING in there:
    if not np.array_equal(there[_HEAD].read(), there[_EMBEDDING].read()):
      raise ValueError(
        f"{_HEAD} of {os.fspath(folder)} differs from the embedding, and config has tied=True: "
        "take dataclasses.replace(config, tied=False), as pretrained.config(folder) does."
      )
    surplus.remove(_HEAD)  # a copy that some programs write
  missing = sorted(set(wanted) - set(there))
  shapes = [
    f"{name} is {there[name].shape}, not {shape}"
    for name, shape in wanted.items()
    if name in there and there[name].shape != shape
  ]
  if missing or surplus or shapes:
    raise ValueError(
      f"the tensors of {os.fspath(folder)} are not those of config. Missing: "
      f"{first_few(missing)}. Unexpected: {first_few(sorted(surplus))}. Other shapes: "
      f"{first_few(shapes)}."
    )


def save(
  folder: str | os.PathLike[str],
  variables: Mapping[str, PyTree],
  config: DecoderConfig,
  *,
  more: Mapping[str, Any] | None = None,
  shard_bytes: int = 5 * 10**9,
) -> None:
  """Writes ``config.json`` and safetensors, so that transformers loads the network.

  The architecture is the first of the known families that computes what ``config`` says. Rotations
  are written in the fields of transformers 4 and of 5.

  Args:
    folder: made where it is not there; ``config.json`` is written last.
    variables: of ``models.Decoder(config)``, in the dtype that the files shall have.
    config: of the decoder; its dropout, remat and scan leave no trace.
    more: further fields of ``config.json``, such as ``eos_token_id`` and
      ``max_position_embeddings``.
    shard_bytes: how large a file may be, if it holds more than one tensor; as transformers has it.

  Raises:
    ValueError: the variables do not fit or hold NaN, no family is such a network, ``more``
      contradicts it, or the folder holds other safetensors.
  """
  _extras.need("networks.pretrained.save", "safetensors")
  _check.whole("shard_bytes", shard_bytes)
  runs.check_place(folder, "pretrained model")
  place = _check.folder("folder", folder)
  runs.check_nan("variables", variables)
  leaves = traverse_util.flatten_dict(dict(variables))
  told = _told(config)
  given = dict(more or {})
  twice = sorted(name for name in given if name in told and given[name] != told[name])
  if twice:
    raise ValueError(f"more has {twice}, which config decides: leave them out.")
  tensors = _theirs_of(leaves, config)
  shards = _shards(tensors, shard_bytes)
  names = ["model.safetensors"]
  if len(shards) > 1:
    count = len(shards)
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
  index = "model.safetensors.index.json"
  with runs.writes(place):
    place.mkdir(parents=True, exist_ok=True)
  mine = {*names, *([index] if len(shards) > 1 else [])}
  there = {path.name for path in place.iterdir() if ".safetensors" in path.name}
  if there - mine:
    raise ValueError(
      f"folder={place} holds {first_few(sorted(there - mine))} of something else: give another."
    )
  for name, shard in zip(names, shards, strict=True):
    # One shard at a time on the host.
    made = {one: _theirs(np.asarray(leaf), one, shape) for one, (leaf, shape) in shard.items()}
    weights.save_safetensors(place / name, made, metadata={"format": "pt"})
  if len(shards) > 1:
    size = sum(leaf.nbytes for leaf, _ in tensors.values())
    at = {one: name for name, shard in zip(names, shards, strict=True) for one in shard}
    runs.write_json(place / index, {"metadata": {"total_size": size}, "weight_map": at})
  dtype = str(next(iter(leaves.values())).dtype)
  runs.write_json(place / _CONFIG, {**told, "dtype": dtype, "torch_dtype": dtype, **given})


def _theirs_of(
  leaves: Mapping[tuple[str, ...], Any], config: DecoderConfig
) -> dict[str, tuple[Any, tuple[int, ...]]]:
  """Our arrays, one a tensor of theirs, with its shape; not turned yet."""
  shapes = traverse_util.flatten_dict(_shapes(config))
  odd = sorted(
    f"{'/'.join(path)} is {np.shape(leaves[path]) if path in leaves else 'missing'}, not "
    f"{shapes[path].shape if path in shapes else 'there'}"
    for path in {*leaves, *shapes}
    if path not in leaves or path not in shapes or np.shape(leaves[path]) != shapes[path].shape
  )
  if odd:
    raise ValueError(f"variables are not those of config: {first_few(odd)}.")
  found = {}
  for path, (names, shape) in _tensors(config).items():
    for i, name in enumerate(names):
      found[name] = (leaves[path][i] if path[1] == "layers" else leaves[path]), shape
  return found


def _shards(tensors: Mapping[str, Any], most: int) -> list[dict[str, Any]]:
  """The tensors in files of at most so many bytes, or one tensor."""
  shards: list[dict[str, Any]] = [{}]
  size = 0
  for name, (leaf, shape) in tensors.items():
    if shards[-1] and size + leaf.nbytes > most:
      shards.append({})
      size = 0
    shards[-1][name] = leaf, shape
    size += leaf.nbytes
  return shards


def _told(config: DecoderConfig) -> dict[str, Any]:
  """The ``config.json`` of the first family that computes this."""
  wanted = _plain(config)
  for architecture, family in _FAMILIES.items():
    told = _fields(wanted, architecture, family)
    try:
      if _plain(_parsed(told)) == wanted:
        return json.loads(json.dumps(told))
    except ValueError:  # a window where the family can have none
      continue
  raise ValueError(
    f"config={config} is none of {sorted(_FAMILIES)}, so that transformers has no class for it: "
    "save it by networks.weights.save_safetensors."
  )


def _plain(config: DecoderConfig) -> DecoderConfig:
  """A configuration with what it leaves to defaults, and without what is of the training."""
  scale = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
  windows = config.windows if any(config.windows) else ()
  return dataclasses.replace(
    config,
    # Families write the scale as its inverse square, in which the last digits are lost.
    query_scale=float(np.float32(scale)),
    pattern=windows,
    window_rope=(config.window_rope or config.rope) if windows else None,
    dropout=0.0,
    remat="none",
    scan=False,
  )


def _fields(c: DecoderConfig, architecture: str, family: _Family) -> dict[str, Any]:
  """``config.json`` as a family writes it; whether it says all is for the caller to see."""
  activation = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}[c.activation]
  scalar = (c.query_scale or 1.0) ** -2
  scalar = round(scalar) if math.isclose(scalar, round(scalar), rel_tol=1e-6) else scalar
  every = {
    "attention_bias": c.output_bias,
    "mlp_bias": c.mlp_bias,
    "hidden_activation": activation,
    "query_pre_attn_scalar": scalar,
    "attn_logit_softcapping": c.score_softcap,
    "final_logit_softcapping": c.softcap,
    "sliding_window": c.window,
    "use_sliding_window": c.window is not None,
    "layer_types": [
      "sliding_attention" if windowed else "full_attention" for windowed in c.windows
    ],
    "rope_local_base_freq": (c.window_rope or c.rope).theta,
  }
  rope = _rope_fields(c.rope)
  two = "rope_local_base_freq" in family.fields
  near = _rope_fields(c.window_rope or Rope())
  scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
  return {
    "architectures": [architecture],
    "model_type": family.name,
    **{theirs: getattr(c, ours) for ours, theirs in _SIZES.items()},
    "num_key_value_heads": c.kv_heads,
    "head_dim": c.head_dim,
    "rms_norm_eps": c.norm_epsilon,
    "hidden_act": activation,
    "tie_word_embeddings": c.tied,
    "rope_theta": c.rope.theta,
    "rope_scaling": None if c.rope.kind == "default" else scaling,
    "rope_parameters": {"full_attention": rope, "sliding_attention": near} if two else rope,
    **{name: every[name] for name in family.fields if name in every},
  }


def _rope_fields(rope: Rope) -> dict[str, Any]:
  told: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
  if rope.kind != "default":
    told["factor"] = rope.factor
  if rope.kind == "llama3":
    told["low_freq_factor"] = rope.low_frequency
    told["high_freq_factor"] = rope.high_frequency
    told["original_max_position_embeddings"] = rope.original_length
  return told
