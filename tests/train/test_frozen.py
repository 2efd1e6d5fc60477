"""What an optimiser never moves is frozen with its statistics; what only stands still is not."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax import contrib

import small_networks
from jaxdistill import data, networks, recipes, train
from jaxdistill.train import _optax, init_state, make_step
from jaxdistill.types import Network, Outputs, make_batch

RNG = np.random.default_rng(0)
INPUTS = (3 + 2 * RNG.normal(size=(12, 4))).astype(np.float32)
LABELS = (np.arange(12) % 3).astype(np.int32)
BATCH = make_batch(jnp.asarray(INPUTS), jnp.asarray(LABELS))


class Block(nn.Module):
  affine: bool = True

  @nn.compact
  def __call__(self, x, *, train=False):
    x = nn.Dense(5)(x)
    # Told at the call, and not by its attribute.
    norm = nn.BatchNorm(momentum=0.5, use_scale=self.affine, use_bias=self.affine)
    return nn.relu(norm(x, use_running_average=not train))


class Linen(nn.Module):
  affine: bool = True

  @nn.compact
  def __call__(self, x, *, train=False):
    x = Block(self.affine, name="backbone")(x, train=train)
    x = nn.BatchNorm(use_running_average=not train, momentum=0.5, name="norm")(nn.Dense(5)(x))
    return nn.Dense(3, name="head")(x)


class NNX(nnx.Module):
  def __init__(self, *, rngs):
    linear, norm = nnx.Linear(4, 5, rngs=rngs), nnx.BatchNorm(5, momentum=0.5, rngs=rngs)
    self.backbone = nnx.List([linear, norm])
    self.norm = nnx.BatchNorm(5, momentum=0.5, rngs=rngs)
    self.head = nnx.Linear(5, 3, rngs=rngs)

  def __call__(self, x):
    for layer in self.backbone:
      x = layer(x)
    return self.head(self.norm(nnx.relu(x)))


NETWORKS = {
  "linen": lambda: networks.linen(Linen()),
  "linen without scale and bias": lambda: networks.linen(Linen(affine=False)),
  "nnx": lambda: networks.nnx(lambda rngs: NNX(rngs=rngs)),
  "bfloat16": lambda: networks.mixed_precision(networks.linen(Linen())),
}


def backbone(params):
  return {name: name == "backbone" for name in params}


def labelled(params):
  return {name: "frozen" if name == "backbone" else "moving" for name in params}


def parts(moving):
  return optax.multi_transform({"frozen": optax.set_to_zero(), "moving": moving}, labelled)


FREEZING = {
  "multi_transform": parts(optax.adamw(0.1)),
  "frozen before Adam": optax.chain(optax.masked(optax.set_to_zero(), backbone), optax.adam(0.1)),
  "frozen after AdamW": optax.chain(optax.adamw(0.1), optax.masked(optax.set_to_zero(), backbone)),
  "before clipping": optax.chain(
    optax.masked(optax.set_to_zero(), backbone),
    optax.clip_by_global_norm(1.0),
    optax.sgd(optax.cosine_decay_schedule(0.1, 10), momentum=0.9, nesterov=True),
  ),
  "accumulated": optax.MultiSteps(parts(optax.adam(0.1)), 2),
  "injected": optax.inject_hyperparams(lambda rate: parts(optax.sgd(rate)))(rate=0.1),
  "finite": optax.apply_if_finite(parts(optax.sgd(0.1)), 3),
  "schedule-free beside it": parts(contrib.schedule_free_sgd(0.1)),
  "a line search beside it": optax.chain(
    parts(optax.sgd(0.1)), optax.scale_by_backtracking_linesearch(3)
  ),
}
MOVING = {
  "plain": optax.adam(0.1),
  "decayed after it": optax.chain(
    optax.masked(optax.set_to_zero(), backbone), optax.adamw(0.1, weight_decay=0.1)
  ),
  "warming up from 0": optax.sgd(optax.linear_schedule(0.0, 0.1, 4)),
  "accumulating": optax.MultiSteps(optax.sgd(0.1), 4),
  "masked, by which gradients pass": optax.masked(
    optax.sgd(0.1), lambda p: {n: n != "backbone" for n in p}
  ),
}


def begun(network, optimizer):
  begin = lambda key: init_state(key, network, recipes.labels(), optimizer, BATCH)  # noqa: E731
  return jax.jit(begin)(jax.random.key(0))


def after(network, optimizer, *, steps=3, **options):
  state = begun(network, optimizer)
  step, states = jax.jit(make_step(network, recipes.labels(), optimizer, **options)), [state]
  for _ in range(steps):
    states.append(step(states[-1], None, BATCH)[0])
  return states[0], states[-1]


def moved(first, last):
  """By module at the top, whether any of its leaves has changed."""
  differs = jax.tree.map(lambda a, b: bool(np.any(a != b)), first, last)
  return {name: any(jax.tree.leaves(part)) for name, part in differs.items()}


def check(first, last):
  assert moved(first.params, last.params)["backbone"] is False
  assert moved(first.params, last.params)["head"] is True
  statistics = moved(first.model_state["batch_stats"], last.model_state["batch_stats"])
  assert statistics == {"backbone": False, "norm": True}


@pytest.mark.slow
@pytest.mark.parametrize("name", FREEZING)
def test_however_it_is_frozen_its_averages_stay(name):
  check(*after(NETWORKS["linen"](), FREEZING[name]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORKS)
def test_whatever_the_network(kind):
  check(*after(NETWORKS[kind](), FREEZING["multi_transform"], accumulate=2))


@pytest.mark.parametrize("name", MOVING)
def test_what_only_stands_still_is_not_frozen(name):
  params = jax.eval_shape(NETWORKS["linen"]().init, jax.random.key(0), BATCH.inputs)["params"]
  zero = _optax.unmoved(MOVING[name], {"student": params, "objective": {}})
  assert not any(jax.tree.leaves(zero))


@pytest.mark.slow
def test_statistics_move_while_the_rate_is_0():
  first, last = after(NETWORKS["linen"](), optax.sgd(0.0))
  assert not any(moved(first.params, last.params).values())
  assert all(moved(first.model_state["batch_stats"], last.model_state["batch_stats"]).values())


@pytest.mark.parametrize("kind", ["linen", "nnx", "linen without scale and bias"])
def test_a_frozen_layer_normalises_by_its_averages(kind):
  network = NETWORKS[kind]()
  variables = network.init(jax.random.key(0), BATCH.inputs)
  # Averages that nobody would take from this batch.
  spread = lambda leaf: leaf + 0.5 + jnp.arange(leaf.size, dtype=leaf.dtype)  # noqa: E731
  variables["batch_stats"] = jax.tree.map(spread, variables["batch_stats"])
  # All at rest, training is inference; and it is not, where one is left.
  norms = ["backbone/BatchNorm_0", "backbone/1", "norm"]
  trains = lambda net: net.apply(variables, BATCH.inputs, train=True, key=jax.random.key(1))  # noqa: E731
  inference, _ = network.apply(variables, BATCH.inputs, train=False, key=None)
  rested, state = trains(network.at_rest(norms))
  np.testing.assert_allclose(rested.logits, inference.logits, rtol=1e-6, atol=1e-6)
  for some in ([], norms[:2]):
    assert not np.allclose(trains(network.at_rest(some))[0].logits, inference.logits, atol=1e-2)
  jax.tree.map(np.testing.assert_array_equal, state["batch_stats"], variables["batch_stats"])


def test_a_flag_that_is_not_heard_is_an_error_where_others_are_frozen():
  class Deaf(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
      x = nn.BatchNorm(use_running_average=not train, name="heard")(x)
      return nn.Dense(3)(nn.BatchNorm(use_running_average=True, name="deaf")(x))

  network = networks.linen(Deaf())
  freeze = lambda p: {name: name == "heard" for name in p}  # noqa: E731
  optimizer = optax.chain(optax.sgd(0.1), optax.masked(optax.set_to_zero(), freeze))
  with pytest.raises(ValueError, match="leaves batch_stats as before in training"):
    after(network, optimizer)
  # All frozen but the head: nothing is left that could move.
  freeze = lambda p: {name: name != "Dense_0" for name in p}  # noqa: E731
  first, last = after(
    network, optax.chain(optax.sgd(0.1), optax.masked(optax.set_to_zero(), freeze))
  )
  assert not any(moved(first.model_state["batch_stats"], last.model_state["batch_stats"]).values())


@pytest.mark.slow
@pytest.mark.parametrize("dispatch", [train.with_jit, train.with_pmap])
def test_in_a_run_over_two_devices_and_seeds(dispatch, capsys):
  source = data.on_device(data.from_arrays(INPUTS, LABELS), batch_size=6, data_seed=0)
  network = NETWORKS["linen"]()
  options = {"data": source, "optimizer": parts(optax.adam(0.1)), "dispatch": dispatch()}
  options |= {"steps": 5, "seed": (3, 11), "average": 0.9, "progress": "frozen"}
  seen = small_networks.fit(network, recipes.labels(), **options)
  said = "".join(capsys.readouterr())
  assert "never moves 4 of the student's 10 parameters (backbone)" in said
  assert "the statistics of 1 of its modules" in said
  for seed, state in zip((3, 11), (0, 1), strict=True):
    begun = network.init(jax.random.split(jax.random.key(seed), 3)[0], BATCH.inputs)
    final = jax.tree.map(lambda leaf, i=state: leaf[i], seen.state.model_state["batch_stats"])
    deployed = jax.tree.map(lambda leaf, i=state: leaf[i], seen.variables["batch_stats"])
    for mine in (final, deployed):
      assert moved(begun["batch_stats"], mine) == {"backbone": False, "norm": True}


def test_a_network_of_ones_own_keeps_them_too():
  def apply(variables, inputs, *, train, key):
    mean = jnp.mean(inputs, axis=0)
    state = {"batch_stats": {"scale": {"mean": mean}}} if train else {}
    return Outputs(
      inputs[:, :3] * variables["params"]["scale"]["w"] + variables["params"]["b"]
    ), state

  def init(key, inputs):
    zeros = {"batch_stats": {"scale": {"mean": jnp.zeros(4)}}}
    return {"params": {"scale": {"w": jnp.ones((1, 1))}, "b": jnp.zeros((1, 3))}, **zeros}

  optimizer = optax.multi_transform(
    {"a": optax.set_to_zero(), "b": optax.sgd(0.1)}, {"scale": "a", "b": "b"}
  )
  first, last = after(Network(init, apply), optimizer)
  assert not np.any(last.model_state["batch_stats"]["scale"]["mean"])
  assert np.any(first.params["b"] != last.params["b"])
