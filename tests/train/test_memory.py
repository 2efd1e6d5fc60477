"""What a run needs on a device: by shapes and by the compiler, before anything is there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import small_networks
from jaxdistill import data, networks, recipes, teachers, train
from jaxdistill.types import Model, make_batch

BATCH = jax.eval_shape(lambda: make_batch(jnp.zeros((8, 6)), jnp.arange(8)))


def two(**axes):
  return train.mesh(devices=jax.devices()[:2], **axes)


def teacher(width=512):
  """Of shapes alone: asked for a value, it would fail."""
  network = small_networks.dense(width)
  return teachers.frozen(
    Model(network, jax.eval_shape(network.init, jax.random.key(0), BATCH.inputs))
  )


def asked(dispatch, **how):
  options = {"data": BATCH, "optimizer": optax.adam(1e-3), "teacher": teacher(), **how}
  return train.memory(small_networks.dense(16), recipes.kd(), dispatch=dispatch, **options)


def test_parts_are_the_bytes_of_a_device_and_nothing_is_made():
  before = len(jax.live_arrays())
  rules = {"sharding": train.fsdp(), "teacher_sharding": train.fsdp()}
  found = asked(train.with_jit(two(fsdp=2), **rules), average=0.9, limit=10_000)
  assert len(jax.live_arrays()) == before
  # 6 x 16 + 16 and 16 x 3 + 3 parameters of four bytes, in two parts but for the last three.
  half = 2 * (6 * 16 + 16 + 16 * 3) + 12
  assert found.student == found.average == half
  assert found.optimizer == 2 * half + 4
  assert found.teacher == 2 * (6 * 512 + 512 + 512 * 3) + 12
  assert found.objective == 0
  assert found.temporaries > 0
  assert found.needed == sum(found.parts.values())
  assert found.whole["student"] == (("params/Dense_1/bias", 12),)
  # It says what to do about the parts that are large, and nothing about the others.
  assert found.fits is False
  first, *advice = found.lines()
  assert "of 10 kB" in first
  assert [line for line in advice if ". teacher" in line and "teacher_sharding" in line]
  assert not [line for line in advice if ". student" in line]
  assert len(dataclasses.replace(found, limit=None).lines()) == 1


@pytest.mark.slow
def test_what_is_whole_on_every_device_is_named():
  found = asked(train.with_jit(two(model=2)), limit=20_000)
  assert dict(found.whole["teacher"])["params/Dense_0/kernel"] == 4 * 6 * 512
  assert "params/Dense_0/kernel" in " ".join(found.lines())
  alone = asked(train.with_jit(train.data_parallel(jax.devices()[:1])))
  assert not alone.whole
  assert alone.limit is None or alone.limit > 0
  examples = data.from_arrays(np.zeros((8, 6), np.float32), np.arange(8) % 3)
  source = data.on_device(examples, batch_size=8, data_seed=0)
  assert asked(train.with_jit(two(data=2)), data=source).teacher == alone.teacher


def test_fit_says_it_where_networks_are_cut(capsys):
  rng = np.random.default_rng(0)
  examples = data.from_arrays(rng.normal(size=(8, 6)).astype(np.float32), rng.integers(0, 3, 8))
  source = data.on_device(examples, batch_size=8, data_seed=0)
  how = {"data": source, "optimizer": optax.sgd(0.1), "steps": 1, "progress": "run"}
  dispatch = train.with_jit(two(fsdp=2), sharding=train.fsdp())
  small_networks.fit(small_networks.dense(16), recipes.labels(), dispatch=dispatch, **how)
  said = capsys.readouterr().err
  assert "memory on each device: student" in said


def test_what_the_compiler_refuses_does_not_fit():
  some = train.Memory(8, 0, 16, 0, 4, 1, temporaries=None, limit=20)
  assert some.fits is False
  assert train.Memory(8, 0, 16, 0, 4, 1, temporaries=None, limit=30).fits is None
  assert "not known" in some.lines()[0]


@pytest.mark.parametrize(
  ("how", "error"),
  [
    ({"data": 3}, TypeError),
    ({"optimizer": optax.adam}, TypeError),
    ({"teacher": networks.linen}, TypeError),
    ({"limit": 0}, ValueError),
    ({"data": jax.eval_shape(lambda: make_batch(jnp.zeros((7, 6)), jnp.arange(7)))}, ValueError),
  ],
)
def test_bad_arguments_are_refused(how, error):
  with small_networks.untyped(), pytest.raises(error):
    asked(train.with_jit(two(data=2)), **how)
  with small_networks.untyped(), pytest.raises(TypeError, match="with_jit"):
    asked(train.with_pmap(jax.devices()[:1]))
