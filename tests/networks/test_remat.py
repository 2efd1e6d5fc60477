"""Networks whose backward pass computes again: the same numbers, and less memory."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import small_networks
from jaxdistill import networks
from jaxdistill.networks import models


class Deep(nn.Module):
  """Blocks of one width, with statistics, dropout and a sown feature after each."""

  depth: int = 3
  width: int = 8

  @nn.compact
  def __call__(self, x, *, train=False):
    for i in range(self.depth):
      for j in range(3):
        x = nn.relu(nn.Dense(self.width, name=f"dense{i}_{j}")(x))
      x = nn.BatchNorm(use_running_average=not train, name=f"norm{i}")(x)
      x = nn.Dropout(0.2, deterministic=not train)(x)
      self.sow("intermediates", f"block{i}", x)
    return nn.Dense(3, name="head")(x)


def blocks(depth):
  return [f"block{i}" for i in range(depth)]


def deep(depth=3, **how):
  return networks.linen(Deep(depth, **how), features=blocks(depth))


def of_nnx():
  def build(rngs):
    layers = [nnx.Linear(6, 8, rngs=rngs), nnx.relu, nnx.Dropout(0.2, rngs=rngs)]
    return nnx.Sequential(
      *layers, nnx.Linear(8, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 3, rngs=rngs)
    )

  return networks.nnx(build, features=["layers/3"])


def vit():
  made = models.VisionTransformer(patch_size=4, width=8, depth=2, num_heads=2, num_classes=3)
  return networks.linen(made, features=["block1", "block2"])


def gradients(network, inputs):
  """A function of a key to loss, features, statistics and gradients, and its shapes' variables."""

  def loss(params, rest, key):
    outputs, state = network.apply({"params": params, **rest}, inputs, train=True, key=key)
    # A feature has a gradient of its own too, as a hint's has.
    hints = sum(jnp.sum(jnp.square(value)) for value in outputs.features.values())
    return jnp.sum(jnp.square(outputs.logits)) + 0.1 * hints, (outputs.features, state)

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.slow
@pytest.mark.parametrize(
  ("make", "shape", "keep"),
  [
    (deep, (4, 6), "dots"),
    (deep, (4, 6), ["block0", "block1"]),
    pytest.param(of_nnx, (4, 6), ["layers/3"], marks=pytest.mark.slow),
    pytest.param(vit, (2, 8, 8, 3), ["block1", "block2"], marks=pytest.mark.slow),
    pytest.param(vit, (2, 8, 8, 3), "dots", marks=pytest.mark.slow),
  ],
)
def test_numbers_are_those_of_the_network(make, shape, keep):
  network, key = make(), jax.random.key(1)
  inputs = jnp.asarray(np.random.default_rng(0).normal(size=shape).astype(np.float32))
  again = networks.remat(network, keep=keep)
  shapes = jax.eval_shape(again.init, key, inputs)
  variables = small_networks.drawn(shapes)
  rest = {name: jax.tree.map(jnp.abs, v) for name, v in variables.items() if name != "params"}
  given = (variables["params"], rest, key)
  found, wanted = gradients(again, inputs)(*given), gradients(network, inputs)(*given)
  # The same operations in float32, fused otherwise: a sum's order may differ. Of the largest
  # number, since a gradient that is 0 (of keys' biases) is what rounding leaves of others.
  most = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(wanted))
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * most)


@pytest.mark.parametrize(("keep", "share"), [("dots", 0.6), (blocks(6), 0.4)])
def test_the_backward_pass_keeps_less(keep, share):
  """What it keeps, by JAX: a CPU's compiler merges both computations."""
  inputs = jax.ShapeDtypeStruct((4096, 32), jnp.float32)

  def kept(network):
    shapes = jax.eval_shape(network.init, jax.random.key(0), inputs)

    def pulled(variables, x):
      def loss(params):
        given = {**variables, "params": params}
        outputs = network.apply(given, x, train=True, key=jax.random.key(0))[0]
        return jnp.sum(jnp.square(outputs.logits))

      return jax.vjp(loss, variables["params"])[1]

    leaves = jax.tree.leaves(jax.eval_shape(pulled, shapes, inputs))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

  # Of each block three products and three rectifications, normalisation and dropout; of these the
  # three products are kept, or the last alone.
  network = deep(6, width=32)
  assert kept(networks.remat(network, keep=keep)) < share * kept(network)


@pytest.mark.slow
def test_evaluation_and_variables_are_the_network_s():
  network = deep()
  again = networks.remat(network, keep=["block1"])
  x = jnp.ones((2, 6))
  variables = small_networks.drawn(jax.eval_shape(network.init, jax.random.key(0), x))
  text = [
    str(jax.make_jaxpr(lambda v, one=one: one.apply(v, x, train=False, key=None)[0])(variables))
    for one in (network, again)
  ]
  assert "remat" not in text[1]
  assert len(text[0]) == len(text[1])
  assert again.name == network.name
  resting = again.at_rest(["norm0"])
  _, state = resting.apply(variables, x, train=True, key=jax.random.key(0))
  before = variables["batch_stats"]
  assert np.array_equal(state["batch_stats"]["norm0"]["mean"], before["norm0"]["mean"])
  assert not np.array_equal(state["batch_stats"]["norm1"]["mean"], before["norm1"]["mean"])


def test_bad_arguments_are_refused():
  with small_networks.untyped():
    for keep, error in (([], ValueError), ("block1", TypeError), (3, TypeError), ([3], TypeError)):
      with pytest.raises(error, match="keep"):
        networks.remat(deep(), keep=keep)
    with pytest.raises(TypeError, match="network"):
      networks.remat(Deep())
  again, x = networks.remat(deep(), keep=["block7"]), jnp.ones((2, 6))
  variables = jax.eval_shape(again.init, jax.random.key(0), x)
  with pytest.raises(ValueError, match=r"\['block7'\].*block0"):
    jax.eval_shape(lambda v, k: again.apply(v, x, train=True, key=k), variables, jax.random.key(0))
