"""Optimisers by hand in NumPy: order, clipping, schedules, and what weight decay touches."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import small_networks
from jaxdistill import recipes
from jaxdistill.networks import models
from jaxdistill.recipes import projectors
from jaxdistill.train import init_state, make_step, optimizers
from jaxdistill.types import Outputs, make_batch


def run(optimizer, params, gradients):
  """Parameters after each gradient; one compilation for all of them."""

  @jax.jit
  def update(params, state, gradient):
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  state, seen = optimizer.init(params), []
  for gradient in gradients:
    params, state = update(params, state, gradient)
    seen.append(params)
  return seen


def draws(steps, seed=0, scale=1.0):
  rng = np.random.default_rng(seed)
  return [
    {"kernel": scale * rng.normal(size=(2, 3)), "bias": scale * rng.normal(size=3)}
    for _ in range(steps)
  ]


def as_float32(tree):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def assert_close(actual, wanted):
  # Float32 against float64 over a handful of steps of order 1: some roundings of 6e-8.
  jax.tree.map(lambda a, w: np.testing.assert_allclose(a, w, rtol=5e-6, atol=5e-6), actual, wanted)


def norm_of(gradient):
  return np.sqrt(sum(np.sum(np.square(leaf)) for leaf in gradient.values()))


@pytest.mark.parametrize("decayed", ["all", "kernels"])
@pytest.mark.parametrize("clip_norm", [None, 1.5])
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_pytorchs_in_this_order(decayed, clip_norm, nesterov):
  """Clip, coupled decay, momentum without dampening, learning rate."""
  gradients = draws(4)
  assert any(norm_of(g) > 1.5 for g in gradients)
  optimizer = optimizers.sgd(
    0.5,
    steps=4,
    milestones=(0.5,),
    weight_decay=0.1,
    nesterov=nesterov,
    clip_norm=clip_norm,
    decayed=decayed,
  )
  params = draws(1, seed=1)[0]
  seen = run(optimizer, as_float32(params), [as_float32(g) for g in gradients])
  buffers = {name: np.zeros_like(value) for name, value in params.items()}
  for at, gradient in enumerate(gradients):
    factor = 1.0 if clip_norm is None else min(1.0, clip_norm / norm_of(gradient))
    for name in params:
      coefficient = 0.1 if decayed == "all" or name == "kernel" else 0.0
      slope = factor * gradient[name] + coefficient * params[name]
      buffers[name] = 0.9 * buffers[name] + slope
      move = slope + 0.9 * buffers[name] if nesterov else buffers[name]
      params[name] = params[name] - (0.5 if at < 2 else 0.05) * move
    assert_close(seen[at], params)


def test_sgd_without_the_new_keywords_keeps_its_state():
  # A run that was saved before goes on: its checkpoint holds the optimiser's state by structure.
  old = optax.chain(
    optax.add_decayed_weights(5e-4),
    optax.sgd(optax.piecewise_constant_schedule(0.05, {5: 0.1}), momentum=0.9, nesterov=False),
  )
  new = optimizers.sgd(0.05, steps=10, milestones=(0.5,))
  params = as_float32(draws(1)[0])
  assert jax.tree.structure(new.init(params)) == jax.tree.structure(old.init(params))
  gradients = [as_float32(g) for g in draws(7)]
  ours, theirs = run(new, params, gradients)[-1], run(old, params, gradients)[-1]
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_milestones_on_one_step_multiply():
  optimizer = optimizers.sgd(1.0, steps=2, milestones=(0.5, 0.6), weight_decay=0.0, momentum=0.0)
  seen = run(optimizer, {"w": jnp.zeros(())}, [{"w": jnp.ones(())}] * 2)
  assert [float(p["w"]) for p in seen] == pytest.approx([-1.0, -1.01], rel=1e-6)


@pytest.mark.parametrize("decayed", ["all", "kernels"])
def test_adamw_by_hand(decayed):
  gradients, params = draws(5), draws(1, seed=1)[0]
  optimizer = optimizers.adamw(
    0.1, steps=5, warmup=0.4, weight_decay=0.3, b1=0.8, b2=0.9, clip_norm=1.0, decayed=decayed
  )
  seen = run(optimizer, as_float32(params), [as_float32(g) for g in gradients])
  # Two steps of warm-up: a third, two thirds; then half a cosine over the three that are left.
  rates = [0.1 / 3, 0.2 / 3, 0.1, 0.1 * (1 + np.cos(np.pi / 3)) / 2]
  rates.append(0.1 * (1 + np.cos(2 * np.pi / 3)) / 2)
  first = {name: np.zeros_like(value) for name, value in params.items()}
  second = {name: np.zeros_like(value) for name, value in params.items()}
  for at, (gradient, rate) in enumerate(zip(gradients, rates, strict=True)):
    factor = min(1.0, 1.0 / norm_of(gradient))
    for name in params:
      slope = factor * gradient[name]
      first[name] = 0.8 * first[name] + 0.2 * slope
      second[name] = 0.9 * second[name] + 0.1 * slope**2
      mean, square = first[name] / (1 - 0.8 ** (at + 1)), second[name] / (1 - 0.9 ** (at + 1))
      shrink = 0.3 * params[name] if decayed == "all" or name == "kernel" else 0.0
      params[name] = params[name] - rate * (mean / (np.sqrt(square) + 1e-8) + shrink)
    assert_close(seen[at], params)


@pytest.mark.parametrize(
  ("steps", "warmup", "wanted"),
  [
    (1, 0.0, [1.0]),
    (1, 0.9, [1.0]),
    (2, 0.9, [0.5, 1.0]),
    (4, 0.0, [1.0, 0.8535534, 0.5, 0.1464466]),
    (300, 5 / 300, [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0]),
  ],
)
def test_adamws_rate(steps, warmup, wanted):
  # Adam's step under a constant gradient is the rate itself.
  optimizer = optimizers.adamw(1.0, steps=steps, warmup=warmup, weight_decay=0.0)
  seen = run(optimizer, {"w": jnp.zeros(())}, [{"w": jnp.ones(())}] * len(wanted))
  rates = -np.diff([0.0, *(float(p["w"]) for p in seen)])
  # Adam's 1 - b2^t is about 1e-3 and has float32's 6e-8 to it; half of that after the root.
  np.testing.assert_allclose(rates, wanted, rtol=4e-5)


def test_pure_decay_shrinks_kernels_and_nothing_else():
  network = small_networks.dense(4, norm=True)
  params = network.init(jax.random.key(0), jnp.ones((2, 3)))["params"]
  params = jax.tree.map(lambda x: x + 1.0, params)
  still = jax.tree.map(jnp.zeros_like, params)
  optimizer = optimizers.sgd(
    1.0, steps=1, milestones=(), weight_decay=0.25, momentum=0.0, decayed="kernels"
  )
  after = run(optimizer, params, [still])[0]
  ratios = jax.tree.map(lambda a, b: (a / b).round(6).reshape(-1)[0].item(), after, params)
  assert ratios == {
    "Dense_0": {"kernel": 0.75, "bias": 1.0},
    "BatchNorm_0": {"scale": 1.0, "bias": 1.0},
    "Dense_1": {"kernel": 0.75, "bias": 1.0},
  }
  everything = optimizers.sgd(1.0, steps=1, milestones=(), weight_decay=0.25, momentum=0.0)
  for new, old in zip(
    jax.tree.leaves(run(everything, params, [still])[0]), jax.tree.leaves(params), strict=True
  ):
    np.testing.assert_allclose(new, 0.75 * old, rtol=1e-6)


def test_any_optax_optimiser_can_use_the_mask():
  optimizer = optax.chain(optax.add_decayed_weights(0.5, mask=optimizers.kernels), optax.sgd(1.0))
  params = {"student": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "objective": {}}
  after = run(optimizer, params, [jax.tree.map(jnp.zeros_like, params)])[0]
  assert after["student"]["kernel"].tolist() == [[0.5, 0.5]] * 2
  assert after["student"]["bias"].tolist() == [1.0, 1.0]


def marked(tree):
  """Paths of the leaves that are marked, and of those that are not."""
  flat = jax.tree_util.tree_leaves_with_path(optimizers.kernels(tree))
  names = {True: set(), False: set()}
  for path, mark in flat:
    assert isinstance(mark, bool)
    names[mark].add(jax.tree_util.keystr(path, simple=True, separator="/"))
  return names[True], names[False]


def shapes_of(module, *inputs):
  return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def test_kernels_of_a_transformer():
  model = models.VisionTransformer(
    patch_size=2, width=4, depth=1, num_heads=2, num_classes=3, pooling="cls"
  )
  chosen, spared = marked(shapes_of(model, jnp.ones((1, 4, 4, 3))))
  assert chosen == {name for name in chosen if name.endswith("/kernel")}
  # An attention's biases have two axes, a class token and positions three.
  assert {"class_token", "position_embedding", "encoder_block1/attention/query/bias"} <= spared
  assert all("kernel" not in name for name in spared)


class Layer(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return nn.LayerNorm()(nn.Dense(4)(x)), None


class Foreign(nn.Module):
  """What other people's modules hold."""

  @nn.compact
  def __call__(self, x):
    x = nn.Embed(5, 4)(x)
    x, _ = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()(
      x, None
    )
    x = nn.WeightNorm(nn.Dense(4))(nn.GroupNorm(2)(x))
    gamma = self.param("layer_gamma", nn.initializers.ones, (1, 1, 4))
    adapter = self.param("lora_a", nn.initializers.ones, (4, 4))
    return (x * gamma) @ adapter


def test_kernels_of_foreign_linen():
  chosen, spared = marked(shapes_of(Foreign(), jnp.zeros((2, 6), jnp.int32)))
  assert {name.rpartition("/")[2] for name in chosen} == {"kernel", "lora_a"}
  assert len(chosen) == 3  # the scanned, the normalised, the adapter
  assert {"Embed_0/embedding", "layer_gamma", "GroupNorm_0/scale"} <= spared
  # Stacked over layers, biases and scales have two axes.
  assert {f"ScanLayer_0/{name}" for name in ("Dense_0/bias", "LayerNorm_0/scale")} <= spared


def test_kernels_of_nnx():
  rngs = nnx.Rngs(0)
  model = nnx.Sequential(
    nnx.Conv(3, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)
  )
  state = nnx.state(model, nnx.Param)
  # As boxes that end in .value, and as the dicts that checkpoints hold.
  for tree in (state, nnx.to_pure_dict(state)):
    chosen, spared = marked(tree)
    assert len(chosen) == 2
    assert all("kernel" in name for name in chosen)
    assert len(spared) == 4


def test_kernels_of_an_objective():
  class Scalars(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
      return x * self.param("log_variance", nn.initializers.ones, x.shape[-1:])[None]

  maps = Outputs(jnp.ones((2, 3)), {"map": jnp.ones((2, 8, 8, 3)), "flat": jnp.ones((2, 3))})
  taught = Outputs(jnp.ones((2, 3)), {"map": jnp.ones((2, 4, 4, 5)), "flat": jnp.ones((2, 5))})
  objective = recipes.combine(
    recipes.hint("map", "map"),
    recipes.hint("flat", "flat", name="flat", projector=lambda s, t: Scalars()),
    recipes.hint("flat", "flat", name="deep", projector=lambda s, t: projectors.MLP(4, 5)),
  )
  params, _ = objective.init(jax.random.key(0), maps, taught)
  chosen, spared = marked({"student": {}, "objective": params})
  assert all(name.endswith("kernel") for name in chosen)
  assert len(chosen) == 3
  assert "objective/0/projector/norm/scale" in spared
  assert "objective/1/projector/log_variance" in spared


@pytest.mark.parametrize("norm", [0.25, 1e3])
@pytest.mark.parametrize("make", [optimizers.sgd, optimizers.adamw])
def test_clipping_is_exact(make, norm):
  plain = make(1.0, steps=3, clip_norm=None, weight_decay=0.0)
  clipped = make(1.0, steps=3, clip_norm=norm, weight_decay=0.0)
  params = as_float32({"student": {"kernel": np.ones((2, 2))}, "objective": {"a": np.ones(2)}})
  # One norm for student and objective together: sqrt(4 * 1 + 4 + 1) = 3.
  gradient = {"student": {"kernel": jnp.ones((2, 2))}, "objective": {"a": jnp.array([2.0, 1.0])}}
  factor = min(1.0, norm / 3.0)
  by_hand = jax.tree.map(lambda g: g * jnp.float32(factor), gradient)
  assert_close(run(clipped, params, [gradient])[0], run(plain, params, [by_hand])[0])


def test_each_seed_is_clipped_by_its_own_norm():
  optimizer = optimizers.sgd(1.0, steps=1, milestones=(), clip_norm=1.0, decayed="kernels")
  params = {"kernel": jnp.zeros((3, 2, 2)), "bias": jnp.zeros((3, 2))}
  long, short = jnp.full((2, 2), 50.0), jnp.full((2, 2), 0.1)
  gradients = {"kernel": jnp.stack([long, short, long * 1e3]), "bias": jnp.zeros((3, 2))}
  state = jax.vmap(optimizer.init)(params)
  updates, _ = jax.vmap(optimizer.update)(gradients, state, params)
  norms = jnp.linalg.norm(updates["kernel"].reshape(3, -1), axis=1)
  np.testing.assert_allclose(norms, [1.0, 0.2, 1.0], rtol=1e-6)


def test_a_sweep_of_rates_under_vmap():
  params, gradient = {"w": jnp.zeros(2)}, {"w": jnp.ones(2)}

  def after(rate):
    optimizer = optimizers.sgd(rate, steps=10, weight_decay=0.0)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    return updates["w"]

  np.testing.assert_allclose(
    jax.vmap(after)(jnp.array([0.1, 0.2])), [[-0.1, -0.1], [-0.2, -0.2]], rtol=1e-6
  )


def test_a_step_trains_with_each():
  student = small_networks.dense(4, norm=True)
  inputs = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
  batch = make_batch(inputs, jnp.arange(8) % 3)
  for optimizer in (
    optimizers.sgd(0.2, steps=20, clip_norm=1.0, decayed="kernels"),
    optimizers.adamw(0.05, steps=20, clip_norm=1.0),
  ):
    state = init_state(jax.random.key(0), student, recipes.labels(), optimizer, batch)
    train = jax.jit(make_step(student, recipes.labels(), optimizer))
    losses = []
    for _ in range(20):
      state, sums = train(state, None, batch)
      losses.append(float(sums["loss"][0]))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
  ("make", "arguments", "message"),
  [
    ("sgd", {"learning_rate": -0.1}, r"learning_rate=-0.1 must be a number of at least 0"),
    ("sgd", {"learning_rate": float("nan")}, r"learning_rate=nan"),
    ("sgd", {"learning_rate": np.sin}, r"learning_rate=.*must be a number"),
    ("sgd", {"steps": 0}, r"steps=0 must be an integer of at least 1"),
    ("sgd", {"steps": 2.5}, r"steps=2.5 must be an integer"),
    ("sgd", {"milestones": (0.5, 150)}, r"milestones=\(0.5, 150\) must be shares of the run"),
    ("sgd", {"milestones": (-0.1,)}, r"milestones=\(-0.1,\)"),
    ("sgd", {"decay": -1.0}, r"decay=-1.0 must be at least 0"),
    ("sgd", {"decay": "kernels"}, r"decay='kernels' must be at least 0: the learning rate's"),
    ("sgd", {"momentum": 1.0}, r"momentum=1.0 must be in \[0, 1\)"),
    ("sgd", {"weight_decay": -1e-4}, r"weight_decay=-0.0001 must be at least 0"),
    ("sgd", {"clip_norm": 0.0}, r"clip_norm=0.0 must be positive, or None"),
    ("sgd", {"decayed": "some"}, r"decayed='some' must be 'all'.*'kernels'"),
    ("adamw", {"learning_rate": -0.1}, r"learning_rate=-0.1"),
    ("adamw", {"steps": -3}, r"steps=-3"),
    ("adamw", {"warmup": 500}, r"warmup=500 must be in \[0, 1\): the share"),
    ("adamw", {"b1": 1.0}, r"b1=1.0 must be in"),
    ("adamw", {"b2": -0.1}, r"b2=-0.1 must be in"),
    ("adamw", {"weight_decay": float("inf")}, r"weight_decay=inf"),
    ("adamw", {"clip_norm": -1.0}, r"clip_norm=-1.0"),
    ("adamw", {"decayed": "none"}, r"decayed='none'"),
  ],
)
def test_bad_arguments_say_what_to_do(make, arguments, message):
  # Without the tests' own checks of types, which nobody has outside of them.
  function = getattr(getattr(optimizers, make), "__wrapped__", getattr(optimizers, make))
  with pytest.raises(ValueError, match=message):
    function(**{"learning_rate": 0.1, "steps": 10, **arguments})
