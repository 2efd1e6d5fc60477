"""Architectures that differ: a ResNet teaches a transformer, and the other way, layer by layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import small_networks
from jaxdistill import data, losses, networks, recipes, teachers
from jaxdistill.recipes import projectors
from jaxdistill.train import init_state, make_step
from jaxdistill.types import Model, make_batch

# 8 x 8 pictures: maps of 8 x 8, 8 x 8, 4 x 4 and 2 x 2; four tokens and the class token.
STAGES = ["stem", "stage1", "stage2", "stage3", "pooled"]
BLOCKS = ["embedding", "block1", "block2", "block3", "pooled"]
CONV = networks.linen(networks.models.ResNet(8, 3, width=(2, 2, 3, 4)), features=STAGES)
VIT = networks.linen(
  networks.models.VisionTransformer(
    patch_size=4, width=6, depth=3, num_heads=2, num_classes=3, pooling="cls"
  ),
  features=BLOCKS,
)


def pictures(size):
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 3, size).astype(np.int32)
  inputs = rng.normal(size=(size, 8, 8, 3)) + np.eye(3)[labels][:, None, None]
  return inputs.astype(np.float32), labels


@functools.cache
def frozen(network):
  return teachers.frozen(Model(network, jax.jit(network.init)(jax.random.key(5), pictures(2)[0])))


def distil(student, teacher, layers, **options):
  options = {"log_every": 1, "seed": 0, "optimizer": optax.adam(1e-2), **options}
  examples = data.from_arrays(*pictures(8), num_classes=3)  # one batch: losses fall
  return small_networks.fit(
    student,
    recipes.combine(recipes.kd(), recipes.hint(layers)),
    data=data.on_device(examples, batch_size=8, data_seed=0),
    steps=8,
    teacher=frozen(teacher),
    **options,
  )


FIVE = dict(zip(BLOCKS, STAGES, strict=True))


@pytest.mark.slow
def test_a_resnet_teaches_a_transformer_five_layers_and_a_killed_run_ends_alike(tmp_path):
  whole = distil(VIT, CONV, FIVE, folder=tmp_path / "whole", validate_every=4)
  for layer in FIVE:
    values = [line[f"hint/{layer}"] for line in whole.history]
    assert np.all(np.isfinite(values))
    assert values[-1] < values[0], layer
  kernels = {
    name: params["dense"]["kernel"].shape
    for name, params in whole.state.objective_params["1"].items()
  }
  assert kernels == {f"projector{i}": (6, width) for i, width in enumerate((2, 2, 3, 4, 4))}
  # Nothing of the projectors is deployed.
  assert not any(name.startswith("projector") for name in whole.variables["params"])

  class KilledError(Exception):
    pass

  def kill(step, record):
    if step == 6:
      raise KilledError

  options = {"folder": tmp_path / "killed", "validate_every": 4}
  with pytest.raises(KilledError):
    distil(VIT, CONV, FIVE, callback=kill, **options)
  resumed = distil(VIT, CONV, FIVE, **options)
  for part in ("params", "objective_params", "opt_state"):
    same = (getattr(run.state, part) for run in (whole, resumed))
    jax.tree.map(np.testing.assert_array_equal, *same)


@pytest.mark.slow
def test_a_transformer_teaches_a_resnet_three_layers():
  three = {"stage1": "block1", "stage2": "block2", "stage3": "block3"}
  fitted = distil(CONV, VIT, three)
  for layer in three:
    assert fitted.history[-1][f"hint/{layer}"] < fitted.history[0][f"hint/{layer}"]


@pytest.mark.slow
def test_each_layer_is_its_own_hint_and_padding_counts_in_none():
  inputs, labels = pictures(8)
  there = np.array([1, 1, 0, 1, 0, 1, 1, 1], np.float32)
  objective = recipes.hint(FIVE, hint_weight=2.0, name="match")
  optimizer = optax.sgd(1.0)
  step = jax.jit(make_step(VIT, objective, optimizer))

  def taken(batch):
    state = init_state(jax.random.key(0), VIT, objective, optimizer, batch, teacher=frozen(CONV))
    after, sums = step(state, frozen(CONV), batch)
    return state, (after.params, after.objective_params, sums)

  def padded(fill):
    shown = np.where(there[:, None, None, None] > 0, inputs, np.float32(fill))
    return make_batch(shown, labels, weight=there)

  state, alone = taken(jax.tree.map(lambda x: x[there > 0], padded(0.0)))
  for fill in (7.0, -100.0):
    # float32 sums in another order.
    jax.tree.map(
      lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5),
      taken(padded(fill))[1],
      alone,
    )
  seen, _ = VIT.apply({"params": state.params}, inputs[there > 0], train=True, key=None)
  taught = frozen(CONV)(make_batch(inputs[there > 0]))
  for i, (ours, theirs) in enumerate(FIVE.items()):
    x, y = seen.features[ours], taught.features[theirs]
    module = projectors.between(x, y)
    made = module.apply({"params": state.objective_params[f"projector{i}"]}, x)
    total, count = alone[2][f"match/{ours}"]
    assert float(count) == there.sum()
    assert float(total) == pytest.approx(float(jnp.sum(losses.hint_l2(made, y))), rel=1e-4)
  total = sum(2 * float(alone[2][f"match/{name}"][0]) for name in FIVE)
  assert float(alone[2]["loss"][0] / alone[2]["loss"][1]) == pytest.approx(
    total / there.sum(), rel=1e-4
  )


def test_layers_that_are_no_pairs_are_named():
  with pytest.raises(ValueError, match=r"the mapping says both networks'"):
    recipes.hint({"block1": "stage1"}, "stage2")
  with pytest.raises(ValueError, match="at least one pair"):
    recipes.hint({})
  wrong = pytest.raises(TypeError, match="teacher_layer=3 must be a feature's name")
  with small_networks.untyped(), wrong:
    recipes.hint({"block1": 3})
