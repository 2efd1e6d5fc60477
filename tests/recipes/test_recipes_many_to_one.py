"""NORM: the block in the student, what is matched, and the student that is left of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax

import small_networks
from jaxdistill import data, networks, recipes, teachers
from jaxdistill.types import Model, Outputs, make_batch

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
INPUTS = RNG.normal(size=(4, 8, 8, 3)).astype(np.float32)


@functools.cache
def plain():
  return networks.linen(
    networks.models.ResNet(8, 3, width=(2, 2, 2, 4)), features=["stage3", "pooled"]
  )


@functools.cache
def grown():
  return recipes.with_many_to_one(plain(), 5, segments=2)


@functools.cache
def applied(train):
  return jax.jit(lambda v, x: grown().apply(v, x, train=train, key=None))


def trained():
  """Variables whose statistics, scales and biases are not what they begin with."""
  variables = grown().init(KEY, INPUTS)
  rng = np.random.default_rng(1)

  def moved(path, leaf):
    noise = rng.uniform(0.5, 1.5, leaf.shape) if "var" in str(path) else rng.normal(size=leaf.shape)
    return (leaf if "var" not in str(path) else 0) + noise.astype(np.float32)

  return jax.tree_util.tree_map_with_path(moved, variables)


@pytest.mark.slow
def test_the_block_stands_behind_the_last_map_and_beside_the_network():
  variables = grown().init(KEY, INPUTS)
  alone = plain().init(KEY, INPUTS)
  for collection, tree in alone.items():
    rest = {name: leaf for name, leaf in variables[collection].items() if name != "many_to_one"}
    jax.tree.map(np.testing.assert_array_equal, rest, tree)
  variables = trained()
  own, seen = (variables[c]["many_to_one"] for c in ("params", "batch_stats"))
  outputs, _ = applied(False)(variables, INPUTS)
  x = np.asarray(outputs.features["stage3"], np.float64)

  def normed(x, part, mean, var):
    scale, bias = (np.asarray(own[part][n], np.float64) for n in ("scale", "bias"))
    return scale * (x - mean) / np.sqrt(var + 1e-5) + bias

  wide = normed(
    x @ np.asarray(own["conv1"]["kernel"], np.float64), "norm1", *moments(seen["norm1"])
  )
  np.testing.assert_allclose(outputs.features["many_to_one"], wide, rtol=1e-4, atol=1e-4)
  back = normed(
    wide @ np.asarray(own["conv2"]["kernel"], np.float64), "norm2", *moments(seen["norm2"])
  )
  head = variables["params"]["classifier"]
  want = (x + back).mean((1, 2)) @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
  np.testing.assert_allclose(outputs.logits, want, rtol=1e-4, atol=1e-4)


def moments(seen):
  return tuple(np.asarray(seen[name], np.float64) for name in ("mean", "var"))


@pytest.mark.slow
def test_in_training_it_goes_by_the_batch_and_moves_its_averages():
  variables = trained()
  outputs, state = applied(True)(variables, INPUTS)
  wide = np.asarray(outputs.features["many_to_one"], np.float64)
  norm = variables["params"]["many_to_one"]["norm1"]
  np.testing.assert_allclose(wide.mean((0, 1, 2)), norm["bias"], rtol=1e-3, atol=1e-3)
  assert set(state["batch_stats"]) == set(variables["batch_stats"])
  before, after = (t["batch_stats"]["many_to_one"]["norm2"]["mean"] for t in (variables, state))
  assert np.all(np.asarray(before) != np.asarray(after))


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [None, 2])
def test_folded_it_is_the_plain_student_that_says_the_same(seeds):
  variables = trained()
  if seeds:
    second = jax.tree.map(lambda leaf: leaf * 1.1, variables)
    variables = jax.tree.map(lambda a, b: jnp.stack([a, b]), variables, second)
  model = Model(grown(), variables, seeds)
  folded = recipes.fold_many_to_one(model, plain())
  assert "many_to_one" not in folded.variables["params"]
  for ours, theirs in zip(folded.unstack(), model.unstack(), strict=True):
    assert jax.tree.structure(ours.variables) == jax.tree.structure(plain().init(KEY, INPUTS))
    want = applied(False)(theirs.variables, INPUTS)[0].logits
    np.testing.assert_allclose(ours(INPUTS).logits, want, rtol=1e-3, atol=1e-3)
    before, _ = plain().apply(
      {c: {n: v for n, v in t.items() if n != "many_to_one"} for c, t in theirs.variables.items()},
      INPUTS,
      train=False,
      key=None,
    )
    assert np.max(np.abs(before.logits - want)) > 0.1  # the block does something
  with pytest.raises(ValueError, match="model has no block 'many_to_one'"):
    recipes.fold_many_to_one(folded, plain())


def test_the_objective():
  rng = np.random.default_rng(2)
  student, teacher = (rng.normal(size=(3, 2, 2, c)) for c in (8, 4))
  logits = rng.normal(size=(2, 3, 5))
  labels = np.array([1, 4, 0])
  batch = make_batch(jnp.ones((3, 1)), jnp.asarray(labels))
  ours = Outputs(
    jnp.asarray(logits[0], jnp.float32), {"many_to_one": jnp.asarray(student, jnp.float32)}
  )
  theirs = Outputs(
    jnp.asarray(logits[1], jnp.float32), {"stage3": jnp.asarray(teacher, jnp.float32)}
  )
  terms = recipes.many_to_one.function(ours, theirs, batch, soft_weight=0.5, norm_share=0.1)
  want = sum(((student[..., i : i + 4] - teacher) ** 2).mean((1, 2, 3)) for i in (0, 4))
  np.testing.assert_allclose(terms["norm"].values, want, rtol=1e-5)
  assert terms["norm"].weight == pytest.approx(0.1)

  def sharp(z):
    return 2.5 * (z - z.mean(1, keepdims=True)) / np.sqrt(z.var(1, keepdims=True) + 1e-7)

  log_q = log_softmax(sharp(logits[0]), axis=1)
  np.testing.assert_allclose(terms["labels"].values, -log_q[np.arange(3), labels], rtol=1e-5)
  log_p, log_q = (log_softmax(sharp(z) / 4, axis=1) for z in (logits[1], logits[0]))
  want = 16 * np.sum(np.exp(log_p) * (log_p - log_q), axis=1)
  np.testing.assert_allclose(terms["soft"].values, want, rtol=1e-4, atol=1e-6)
  assert set(recipes.many_to_one.function(ours, theirs, batch)) == {"labels", "norm"}
  flat = recipes.many_to_one.function(ours, theirs, batch, sharpness=None)["labels"].values
  want = -log_softmax(logits[0], axis=1)[np.arange(3), labels]
  np.testing.assert_allclose(flat, want, rtol=1e-5)


def test_its_weight_goes_in_the_published_stairs():
  share = recipes.many_to_one(run_steps=480).hyper["norm_share"]
  epochs = {0: 0.1, 9: 0.1, 11: 0.5, 21: 1.0, 179: 1.0, 181: 0.5, 211: 0.1, 239: 0.1}
  for epoch, want in epochs.items():
    assert float(share(2 * epoch)) == pytest.approx(want)
  assert recipes.many_to_one(run_steps=0).hyper["norm_share"] == 1.0


@pytest.mark.slow
def test_the_block_is_trained_with_the_student():
  examples = data.from_arrays(INPUTS, np.array([0, 1, 2, 0]), num_classes=3)
  wide = networks.linen(networks.models.ResNet(8, 3, width=(2, 2, 2, 5)), features=["stage3"])
  fitted = small_networks.fit(
    grown(),
    recipes.many_to_one(run_steps=0),
    data=data.on_device(examples, batch_size=4, data_seed=0),
    optimizer=optax.sgd(1e-1),
    steps=5,
    teacher=teachers.frozen(Model(wide, wide.init(KEY, INPUTS))),
    log_every=1,
  )
  assert fitted.history[-1]["norm"] < fitted.history[0]["norm"]


@pytest.mark.slow
def test_what_does_not_fit_is_refused():
  with pytest.raises(ValueError, match="classifier='head' has a kernel None"):
    recipes.with_many_to_one(plain(), 5, segments=2, classifier="head").apply(
      trained(), INPUTS, train=False, key=None
    )
  batch = make_batch(jnp.ones((2, 1)), jnp.array([0, 1]))
  ours, theirs = (
    Outputs(jnp.zeros((2, 3)), {n: jnp.zeros((2, 2, 2, c))})
    for n, c in (("many_to_one", 8), ("stage3", 3))
  )
  with pytest.raises(ValueError, match="must be a map .* multiple of that width"):
    recipes.many_to_one.function(ours, theirs, batch)
