"""Mixed precision: what is multiplied in bfloat16, and everything that stays in float32."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import small_networks
from jaxdistill import data, networks, recipes, teachers, train
from jaxdistill.types import Model, Network, Outputs, make_batch

# bfloat16 keeps 8 bits: a rounding is at most 2^-9 of a number.
ROUNDING = 2.0**-9


def dtypes(tree):
  return {leaf.dtype.name for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")}


def close(actual, wanted, roundings):
  """Whether two arrays differ by no more than some roundings of the largest number."""
  actual, wanted = np.asarray(actual), np.asarray(wanted)
  return np.max(np.abs(actual - wanted)) <= roundings * ROUNDING * np.max(np.abs(wanted))


@pytest.fixture(scope="module")
def trained():
  """A distilled student with BatchNorm after eight steps, in float32 and mixed."""
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 3, 48)
  inputs = (rng.normal(size=(48, 4)) + 2 * np.eye(3, 4)[labels]).astype(np.float32)
  source = data.on_device(
    data.from_arrays(inputs, labels, num_classes=3), batch_size=16, data_seed=0
  )
  plain, teacher = small_networks.dense(8, norm=True), small_networks.dense(7)
  variables = teacher.init(jax.random.key(9), inputs[:1])

  def fit(student, teacher):
    return small_networks.fit(
      student,
      recipes.kd(),
      data=source,
      # Not Adam: a bias before a BatchNorm has no gradient but rounding, which Adam blows up.
      optimizer=optax.sgd(0.02, momentum=0.9),
      steps=8,
      teacher=teachers.frozen(Model(teacher, variables)),
      log_every=1,
      dispatch=train.with_jit(train.data_parallel(jax.devices()[:1])),
      validate_every=8,
    )

  mixed = fit(networks.mixed_precision(plain), networks.mixed_precision(teacher))
  return fit(plain, teacher), mixed


@pytest.mark.slow
@pytest.mark.device
def test_training_stays_close_to_float32(trained):
  plain, mixed = trained
  ours, theirs = ([line["loss"] for line in fitted.history] for fitted in (mixed, plain))
  # Logits of order 1 carry some roundings of 2^-9 each, the loss is of order 1 too and a mean over
  # 16 examples; eight small steps hardly add to that.
  np.testing.assert_allclose(ours, theirs, rtol=8 * ROUNDING)
  assert not np.array_equal(ours, theirs)
  assert theirs[-1] < 0.9 * theirs[0]


@pytest.mark.slow
def test_what_is_kept_is_float32(trained):
  _, mixed = trained
  state = mixed.state
  assert dtypes((state.params, state.model_state)) == {"float32"}
  assert dtypes(state.opt_state) == {"float32"}
  # No parameter is on bfloat16's grid: they move by less than its steps.
  kernel = mixed.variables["params"]["Dense_0"]["kernel"]
  assert np.mean(np.asarray(kernel.astype(jnp.bfloat16), np.float32) != np.asarray(kernel)) > 0.9


def test_batchnorms_averages_are_float32s(trained):
  plain, mixed = (fitted.variables["batch_stats"]["BatchNorm_0"] for fitted in trained)
  # Averages of activations that are rounded some times, by weights that differ a little.
  for name in ("mean", "var"):
    assert mixed[name].dtype == jnp.float32
    assert close(mixed[name], plain[name], 8)
    assert np.any(np.asarray(mixed[name]) != np.asarray(plain[name]))


def losses_of(network, batch):
  def loss(params, rest):
    outputs, state = network.apply(
      {"params": params, **rest}, batch.inputs, train=True, key=jax.random.key(1)
    )
    return jnp.mean(recipes.labels.function(outputs, None, batch)["labels"].values), state

  return loss


def inputs_of(size=8, width=4, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(size, width)), jnp.float32)


def products_in(jaxpr):
  """Output dtypes of the matrix products in a printed jaxpr."""
  return re.findall(r":(\w+)\[[\d,]*\] = dot_general", str(jaxpr))


@functools.cache
def initialised():
  plain = small_networks.dense(8, norm=True)
  return plain, jax.jit(plain.init)(jax.random.key(0), inputs_of())


def init(network):
  """Shapes and dtypes of the variables; with everything that is noticed on the way."""
  return jax.eval_shape(network.init, jax.random.key(0), inputs_of())


def test_products_and_gradients_of_linen():
  (plain, variables), batch = initialised(), make_batch(inputs_of(), jnp.arange(8) % 3)
  network = networks.mixed_precision(plain)
  assert network.name == "Dense (bfloat16)"
  assert init(network) == init(plain)
  rest = {"batch_stats": variables["batch_stats"]}
  grads = {}
  for name, each in (("bf16", network), ("f32", plain)):
    gradient = jax.value_and_grad(losses_of(each, batch), has_aux=True)
    # Two forward; backward two for kernels and one for the hidden layer: all of them.
    assert products_in(jax.make_jaxpr(gradient)(variables["params"], rest)) == [name] * 5
    (loss, state), grads[name] = jax.jit(gradient)(variables["params"], rest)
    assert loss.dtype == jnp.float32
    assert dtypes((state, grads[name])) == {"float32"}
  assert networks.count_products(network, variables, batch.inputs) == {"bfloat16": 2}
  assert networks.count_products(plain, variables, batch.inputs) == {"float32": 2}
  # A gradient is a product of three rounded numbers, summed; BatchNorm makes differences of them.
  ours, theirs = (np.concatenate([g.ravel() for g in jax.tree.leaves(grads[n])]) for n in grads)
  assert np.linalg.norm(ours - theirs) < 16 * ROUNDING * np.linalg.norm(theirs)
  assert np.any(ours != theirs)


@pytest.mark.parametrize("compute", [jnp.bfloat16, "float16"])
def test_teachers(compute):
  (plain, variables), inputs = initialised(), inputs_of()
  network = networks.mixed_precision(plain, compute=compute)
  teacher, batch = teachers.frozen(Model(network, variables)), make_batch(inputs)
  assert set(products_in(jax.make_jaxpr(lambda t, b: t(b))(teacher, batch))) <= {"bf16", "f16"}
  ours, theirs = teacher(batch), Model(plain, variables)(batch)
  assert dtypes(ours) == {"float32"}
  # Inputs, two kernels, two products, a norm: each is rounded once or twice.
  assert close(ours.logits, theirs.logits, 8)
  assert close(ours.features["mid"], theirs.features["mid"], 8)
  assert np.any(ours.logits != theirs.logits)


def test_every_output_comes_back_and_only_floats_go_in(strict_promotion):
  seen = {}

  def apply(variables, inputs, *, train, key):
    seen.update(variables=variables, inputs=inputs)
    table = variables["params"]["table"]
    hidden = table[inputs["tokens"]] * inputs["scale"][:, None]
    counter = variables["statistics"]["count"]
    state = {
      "statistics": {"mean": jnp.mean(hidden), "count": counter + 1},
      "new": {"x": jnp.mean(hidden)},
    }
    features = {"hidden": hidden, "tokens": inputs["tokens"]}
    return Outputs(None, features, hidden=hidden, head={"kernel": table}), state

  network = networks.mixed_precision(Network(lambda key, inputs: {}, apply, "tokens"))
  variables = {
    "params": {"table": jnp.full((5, 2), 1.001), "ids": jnp.arange(2)},
    "statistics": {"mean": jnp.float32(1.001), "count": jnp.int32(3)},
  }
  inputs = {"tokens": jnp.array([1, 4]), "scale": jnp.array([1.0, 2.0])}
  outputs, state = network.apply(variables, inputs, train=True, key=None)
  assert seen["variables"]["params"]["table"].dtype == jnp.bfloat16
  assert seen["variables"]["params"]["ids"].dtype == jnp.int32
  assert seen["variables"]["statistics"]["mean"] is variables["statistics"]["mean"]
  assert seen["inputs"]["scale"].dtype == jnp.bfloat16
  assert seen["inputs"]["tokens"] is inputs["tokens"]
  assert outputs.logits is None
  assert dtypes((outputs.hidden, outputs.head, outputs.features["hidden"])) == {"float32"}
  assert outputs.features["tokens"].dtype == jnp.int32
  assert dtypes(state["statistics"]) == {"float32", "int32"}
  assert int(state["statistics"]["count"]) == 4
  assert state["new"]["x"].dtype == jnp.float32


def test_short_parameters_are_made_long():
  network = networks.mixed_precision(small_networks.dense(4, param_dtype=jnp.bfloat16))
  assert dtypes(init(network)) == {"float32"}


class Stubborn(nn.Module):
  """Three layers, of which some compute in float32 whatever they get."""

  dtypes: tuple

  @nn.compact
  def __call__(self, x, *, train=False):
    for dtype in self.dtypes:
      x = nn.Dense(4, dtype=dtype)(x)
      x = x.astype(jnp.bfloat16) if dtype is None else x
    return x


def test_modules_with_a_dtype_of_their_own_are_noticed():
  def build(*dtypes):
    network = networks.mixed_precision(networks.linen(Stubborn(dtypes)))
    return network, init(network)

  with pytest.raises(
    ValueError, match=r"Stubborn \(bfloat16\) multiplies 3 in float32.*build them with dtype=None"
  ):
    build(*[jnp.float32] * 3)
  with pytest.warns(UserWarning, match="multiplies 2 in float32, 1 in bfloat16"):
    build(None, jnp.float32, jnp.float32)
  # A classifier in float32 is what many networks have, ours among them.
  network, variables = build(None, None, jnp.float32)
  assert networks.count_products(network, variables, inputs_of()) == {"bfloat16": 2, "float32": 1}


class Layer(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return jax.checkpoint(jnp.tanh)(nn.Dense(4)(x)), None


class Looped(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(4, (2,))(x[:, None])[:, 0]
    return nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()(
      x, None
    )[0]


def test_products_inside_loops_and_convolutions_count():
  network = networks.mixed_precision(networks.linen(Looped()))
  assert networks.count_products(network, init(network), inputs_of()) == {"bfloat16": 2}


class NNX(nnx.Module):
  def __init__(self, dtype, rngs):
    self.first = nnx.Linear(4, 6, rngs=rngs)
    self.norm = nnx.BatchNorm(6, dtype=dtype, rngs=rngs)
    self.last = nnx.Linear(6, 3, rngs=rngs)

  def __call__(self, x):
    return self.last(nnx.relu(self.norm(self.first(x))))


def test_nnx():
  plain = networks.nnx(lambda rngs: NNX(jnp.bfloat16, rngs))
  network, batch = networks.mixed_precision(plain), make_batch(inputs_of(), jnp.arange(8) % 3)
  variables = jax.jit(network.init)(jax.random.key(0), batch.inputs)
  rest = {name: value for name, value in variables.items() if name != "params"}
  gradient = jax.jit(jax.value_and_grad(losses_of(network, batch), has_aux=True))
  (_, state), grads = gradient(variables["params"], rest)
  assert dtypes((variables, state, grads)) == {"float32"}
  # The running mean by hand: nnx.BatchNorm takes a hundredth of the batch's.
  first = variables["params"]["first"]
  kernel, bias = np.asarray(first["kernel"]), np.asarray(first["bias"])
  mean = np.mean(np.asarray(batch.inputs) @ kernel + bias, axis=0)
  assert close(state["batch_stats"]["norm"]["mean"], 0.01 * mean, 4)
  assert networks.count_products(network, variables, batch.inputs) == {"bfloat16": 2}


def test_nnxs_batchnorm_promotes_unless_it_is_told_otherwise():
  network = networks.mixed_precision(networks.nnx(lambda rngs: NNX(None, rngs)))
  counts = networks.count_products(network, init(network), inputs_of())
  assert counts == {"bfloat16": 1, "float32": 1}


def test_a_loop_that_can_not_carry_it_says_so():
  class Loop(nnx.Module):
    def __init__(self, rngs):
      self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
      step = nnx.scan(
        lambda norm, x: norm(x),
        in_axes=(nnx.StateAxes({...: None}), nnx.Carry),
        out_axes=nnx.Carry,
        length=2,
      )
      return step(self.norm, x)

  network = networks.mixed_precision(networks.nnx(Loop))
  with pytest.raises(ValueError, match="Loop .bfloat16. runs, but not in bfloat16; where a loop"):
    jax.eval_shape(network.init, jax.random.key(0), jnp.ones((2, 4)))


def test_wrapping_twice_is_wrapping_once():
  plain, variables = initialised()
  once = networks.mixed_precision(plain)
  first, second = (
    jax.make_jaxpr(lambda v, n=n: n.apply(v, inputs_of(), train=False)[0].logits)(variables)
    for n in (once, networks.mixed_precision(once))
  )
  assert products_in(first) == products_in(second) == ["bf16"] * 2
  # What has the dtype already is not cast again.
  assert len(second.eqns) == len(first.eqns)


@pytest.mark.parametrize("compute", [jnp.int8, "float8_e4m3fn", np.float64, "half-ish", None])
def test_a_dtype_that_is_none_says_so(compute):
  with pytest.raises(ValueError, match=r"compute=.* must be a floating dtype of 16 or 32 bits"):
    networks.mixed_precision(small_networks.dense(4), compute=compute)
