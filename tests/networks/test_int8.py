"""Weights in eight bits: what they take, how far their network is from that of floats."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import small_networks
from jaxdistill import data, losses, networks, recipes, teachers, train
from jaxdistill.networks import models
from jaxdistill.types import Model

pytest.importorskip("qwix")


def decoder(dtype=jnp.float32, **how):
  config = models.DecoderConfig(
    97, 64, layers=2, heads=4, kv_heads=2, head_dim=16, hidden=128, **how
  )
  return networks.linen(models.Decoder(config, dtype=dtype, param_dtype=dtype))


def drawn(network, inputs):
  return small_networks.drawn(jax.eval_shape(network.init, jax.random.key(0), inputs), scale=0.1)


def logits(model, inputs):
  made = model.network.apply(model.variables, inputs, train=False, key=None)[0]
  return made.logits if made.head is None else made.head(made.hidden)


TOKENS = np.random.default_rng(0).integers(0, 97, (4, 12)).astype(np.int32)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_a_decoder_says_nearly_what_it_said(scan):
  network = decoder(scan=scan, tied=not scan)
  model = Model(network, drawn(network, TOKENS))
  short = networks.int8_weights(model)
  apart = losses.soft_target_kl(logits(short, TOKENS), logits(model, TOKENS), temperature=1.0)
  # Half of a 127th of the largest of a channel's weights is the most that one is off.
  assert 0 < float(jnp.max(apart)) < 0.005
  for path, leaf in jax.tree_util.tree_leaves_with_path(
    short.variables["params"], is_leaf=lambda n: isinstance(n, networks.Int8)
  ):
    whole = model.variables["params"]
    for part in path:
      whole = whole[part.key]
    if isinstance(leaf, networks.Int8):
      step = np.broadcast_to(leaf.int8_scale, whole.shape)
      assert np.all(np.abs(np.asarray(leaf.floats()) - whole) <= 0.501 * step)
    else:
      assert whole.ndim - scan < 2 or max(whole.shape[scan:-1]) < 32
      np.testing.assert_array_equal(leaf, whole)


def test_half_of_bfloat16_of_shapes_alone():
  config = models.DecoderConfig(
    32_000, 2048, layers=4, heads=32, kv_heads=8, head_dim=64, hidden=8192, scan=True
  )
  network = networks.linen(models.Decoder(config, param_dtype=jnp.float32))
  tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  model = Model(network, jax.eval_shape(network.init, jax.random.key(0), tokens))

  def size(teacher):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(teacher.variables))

  half, short = (teachers.frozen(model, dtype=dtype) for dtype in (jnp.bfloat16, "int8"))
  assert size(half) / size(short) > 1.9
  # A scale for each channel and each layer; an embedding's for each word.
  params = short.variables["params"]
  assert params["layers"]["mlp"]["up"]["kernel"].int8_scale.shape == (4, 1, 8192)
  assert params["embed"]["embedding"].int8_scale.shape == (32_000, 1)


@pytest.mark.slow
def test_it_teaches_frozen_and_in_one_program():
  network = small_networks.dense(64)
  x = np.random.default_rng(1).normal(size=(8, 40)).astype(np.float32)
  model = Model(network, drawn(network, x))
  teacher = teachers.frozen(model, dtype="int8")
  apart = losses.soft_target_kl(
    teachers.members_of(teacher)[0](x).logits, logits(model, x), temperature=1.0
  )
  assert 0 < float(jnp.max(apart)) < 0.005
  again = teachers.frozen(Model(network, drawn(network, x)), dtype="int8")
  assert jax.tree.structure(teacher) == jax.tree.structure(again)  # nothing is compiled anew
  before = jax.device_get(teacher.variables)
  source = data.on_device(data.from_arrays(x, np.arange(8) % 3), batch_size=8, data_seed=0)
  how = {"data": source, "optimizer": optax.sgd(0.1), "steps": 2, "progress": None}
  made = small_networks.fit(small_networks.dense(4), recipes.kd(), teacher=teacher, **how)
  assert np.isfinite(made.history[-1]["loss"])
  for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(teacher.variables), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_other_modules_and_precisions():
  x = np.random.default_rng(1).normal(size=(8, 40)).astype(np.float32)

  def build(rngs):
    return nnx.Sequential(nnx.Linear(40, 64, rngs=rngs), nnx.relu, nnx.Linear(64, 3, rngs=rngs))

  for network in (networks.nnx(build), networks.mixed_precision(small_networks.dense(64))):
    model = Model(network, drawn(network, x))
    short = networks.int8_weights(model)
    found, wanted = logits(short, x), logits(model, x)
    assert found.dtype == wanted.dtype
    np.testing.assert_allclose(found, wanted, atol=0.02 * float(jnp.max(jnp.abs(wanted))))
  inputs = jnp.zeros((8, 40), jnp.float32)
  assert networks.count_products(short.network, short.variables, inputs) == {"bfloat16": 2}


def test_rules_name_a_weight_and_its_scale_follows():
  network = small_networks.dense(64)
  x = jax.ShapeDtypeStruct((8, 40), jnp.float32)
  shapes = jax.eval_shape(network.init, jax.random.key(0), x)
  teacher = teachers.frozen(Model(network, shapes), dtype="int8")
  mesh = train.mesh(data=1, model=2, devices=jax.devices()[:2])
  rules = {"Dense_0/kernel$": jax.P("model", None), "Dense_1/kernel$": jax.P("model")}
  at = train.shardings(teacher, mesh, rules).variables["params"]
  assert at["Dense_0"]["kernel"].int8.spec == jax.P("model", None)
  assert at["Dense_0"]["kernel"].int8_scale.spec == jax.P(None, None)
  cut = train.shardings(teacher, mesh, {"Dense_0/kernel": jax.P(None, "model")})
  assert cut.variables["params"]["Dense_0"]["kernel"].int8_scale.spec == jax.P(None, "model")


def test_what_cannot_be_is_refused():
  network = small_networks.dense(4)
  small = Model(network, drawn(network, np.zeros((1, 6), np.float32)))
  with pytest.raises(ValueError, match="eight bits"):
    teachers.frozen(small, dtype="int8")
  with pytest.raises(TypeError, match="'int8'"):
    teachers.frozen(small, dtype="int4")
  with small_networks.untyped(), pytest.raises(TypeError, match="model"):
    networks.int8_weights(network)
