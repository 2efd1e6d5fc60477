"""DAFL: what its terms are, who is trained by which of them, and what is deployed."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax

import small_networks
from jaxdistill import data, networks, recipes
from jaxdistill.recipes.data_free import _imbalance
from jaxdistill.types import Model, make_batch

KEY = jax.random.key(0)
B, D = 6, 5
NOISE = np.random.default_rng(0).normal(size=(B, D)).astype(np.float32)
WEIGHT = np.array([1.0, 1, 1, 1, 0, 1])
BATCH = make_batch(jnp.asarray(NOISE), weight=jnp.asarray(WEIGHT))


class Made(nn.Module):
  """Noise to images, with a BatchNorm."""

  @nn.compact
  def __call__(self, x, *, train: bool = False):
    x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(7)(x))
    return nn.Dense(D)(nn.relu(x))


def dense(width, name):
  return networks.linen(small_networks.Dense(width, norm=True), features=["mid"], name=name)


@functools.cache
def built():
  large, small = dense(8, "large"), dense(3, "small")
  variables = large.init(jax.random.key(1), NOISE)
  statistics = jax.tree.map(lambda leaf: leaf + 0.5, variables["batch_stats"])
  teacher = Model(large, {**variables, "batch_stats": statistics})
  both = recipes.with_generator(small, networks.linen(Made(), name="generator"))
  return teacher, small, both, both.init(KEY, NOISE)


def terms_of(variables, train=True):
  teacher, small, both, _ = built()
  objective = recipes.dafl(teacher, small, layer="mid")
  outputs, state = both.apply(variables, jnp.asarray(NOISE), train=train, key=KEY)
  params, kept = objective.init(KEY, outputs, None)
  terms, after = objective.apply(params, kept, outputs, None, BATCH, key=KEY, **objective.hyper)
  return terms, outputs, state, (kept, after)


@pytest.mark.slow
def test_the_terms_are_the_papers():
  teacher, _, _, variables = built()
  terms, outputs, state, (kept, after) = terms_of(variables)
  jax.tree.map(np.testing.assert_array_equal, kept, after)
  jax.tree.map(np.testing.assert_array_equal, kept["teacher"], teacher.variables)
  told = teacher(outputs.features["images"])  # in inference mode
  t = np.asarray(told.logits, np.float64)
  log_t = log_softmax(t, axis=1)
  np.testing.assert_allclose(terms["one_hot"].values, -log_t.max(1), rtol=1e-4, atol=1e-6)
  held = np.abs(np.asarray(told.features["mid"], np.float64)).mean(1)
  np.testing.assert_allclose(terms["activation"].values, -held, rtol=1e-5)
  mean = np.exp(log_t)[WEIGHT > 0].mean(0)  # padding is of no class
  np.testing.assert_allclose(
    np.mean(terms["balance"].values), np.sum(mean * np.log(mean)), rtol=1e-5
  )
  log_s = log_softmax(np.asarray(outputs.logits, np.float64), axis=1)
  np.testing.assert_allclose(
    terms["soft"].values, np.sum(np.exp(log_t) * (log_t - log_s), axis=1), rtol=1e-4, atol=1e-6
  )
  weights = {name: term.weight for name, term in terms.items()}
  want = {"soft": 1.0, "one_hot": 1.0, "activation": 0.1, "balance": 5 / np.log(10)}
  assert weights == pytest.approx(want)
  # Both networks' statistics move; a call in inference moves none.
  for name in ("student", "generator"):
    before, moved = variables[name]["batch_stats"], state[name]["batch_stats"]
    apart = jax.tree.map(lambda a, b: np.any(np.asarray(a) != np.asarray(b)), before, moved)
    assert any(jax.tree.leaves(apart))
  assert terms_of(variables, train=False)[2] == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["soft", "one_hot", "activation", "balance"])
def test_the_student_is_trained_by_the_soft_targets_and_the_generator_by_the_rest(name):
  *_, variables = built()

  def total(params):
    return jnp.sum(terms_of({**variables, "params": params})[0][name].values)

  gradients = jax.grad(total)(variables["params"])
  moved = {
    part: any(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(tree))
    for part, tree in gradients.items()
  }
  assert moved == {"student": name == "soft", "generator": name != "soft"}


def test_classes_that_nobody_is_of_cost_nothing():
  values = _imbalance(jnp.array([[0.0, -2e4], [0.0, -3e4]]), cut(2))
  np.testing.assert_array_equal(values, [0.0, 0.0])
  even = _imbalance(jnp.array([[9e3, 0.0], [0.0, 9e3]]), cut(2))
  np.testing.assert_allclose(even, [np.log(0.5)] * 2, rtol=1e-5)


def cut(count):
  return make_batch(jnp.zeros((count, 1)))


@pytest.mark.slow
def test_a_run_deploys_the_student_alone_for_inputs_of_the_noises_shape():
  teacher, small, both, _ = built()
  source = data.on_device(
    data.from_arrays(np.zeros((12, D), np.float32), None),
    batch_size=6,
    data_seed=0,
    augmentation=data.Augmentation(
      lambda x, key: jax.random.normal(key, x.shape, x.dtype), None, "noise"
    ),
  )
  each = {"student": optax.adam(1e-2), "generator": optax.adam(1e-2)}
  fitted = small_networks.fit(
    both,
    recipes.dafl(teacher, small, layer="mid"),
    data=source,
    optimizer=optax.multi_transform(each, {name: name for name in each}),
    steps=40,
    log_every=1,
  )
  first, last = (fitted.history[i] for i in (0, -1))
  assert last["one_hot"] < first["one_hot"]
  assert last["activation"] < first["activation"]
  assert fitted.network is small
  assert jax.tree.structure(fitted.variables) == jax.tree.structure(small.init(KEY, NOISE))
  assert fitted(NOISE).logits.shape == (B, 3)
  kept = fitted.state.objective_state["teacher"]
  jax.tree.map(np.testing.assert_array_equal, kept, teacher.variables)


def test_what_does_not_fit_is_named():
  teacher, small, _, _ = built()
  outputs, _ = small.apply(small.init(KEY, NOISE), NOISE, train=False, key=None)
  with pytest.raises(ValueError, match="'images' is not among the student's features"):
    recipes.dafl(teacher, small, layer="mid").init(KEY, outputs, None)
  *_, both, variables = built()
  outputs, _ = both.apply(variables, NOISE, train=False, key=None)
  with pytest.raises(ValueError, match="'pooled' is not among the teacher's features"):
    recipes.dafl(teacher, small).init(KEY, outputs, None)
  with pytest.raises(ValueError, match="teacher holds 2 seeds of 'large'"):
    recipes.dafl(dataclasses.replace(teacher, seeds=2), small)
