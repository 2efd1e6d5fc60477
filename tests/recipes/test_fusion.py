"""ReviewKD's fusion against NumPy written from its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.recipes import projectors
from jaxdistill.recipes.projectors import ReviewFusion
from test_projectors import KEY, as_float64, convolve, draw, parameters

# float32 sums of at most 45 products of size 1, divided by a deviation of size 1.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def normalise(x, params):
  """BatchNorm in training."""
  axes = tuple(range(x.ndim - 1))
  centred = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)
  shape = (1,) * (x.ndim - 1) + (-1,)
  return centred * params["scale"].reshape(shape) + params["bias"].reshape(shape)


def nearest(x, spatial):
  """One output pixel after the other."""
  out = np.zeros((x.shape[0], *spatial, x.shape[3]))
  for i, j in np.ndindex(*spatial):
    out[:, i, j] = x[:, i * x.shape[1] // spatial[0], j * x.shape[2] // spatial[1]]
  return out


def fuse(params, x, residual, spatial):
  """The fusion in training, as the docstring has it; all in float64."""
  params, x = as_float64(params), np.asarray(x, np.float64)
  y = normalise(x @ params["conv1"]["kernel"], params["norm1"])
  if residual is not None:
    above = nearest(np.asarray(residual, np.float64), x.shape[1:3])
    scores = np.concatenate([y, above], -1) @ params["attention"]["kernel"]
    shares = 1 / (1 + np.exp(-scores - params["attention"]["bias"].reshape(1, 1, 1, 2)))
    y = y * shares[..., :1] + above * shares[..., 1:]
  y = nearest(y, spatial)
  return normalise(convolve(y, params["conv2"]["kernel"], 1, 1), params["norm2"]), y


def given(module, *inputs):
  """Parameters that are all drawn, and fresh running averages."""
  shapes = jax.eval_shape(module.init, KEY, *inputs)["batch_stats"]
  stats = jax.tree.map(lambda s: jnp.zeros(s.shape), shapes)
  stats = {name: {**stat, "var": stat["var"] + 1} for name, stat in stats.items()}
  shapes = jax.eval_shape(module.init, KEY, *inputs)["params"]
  rng = np.random.default_rng(3)
  params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)
  return {"params": params, "batch_stats": stats}


@pytest.mark.parametrize(
  ("size", "above", "spatial"),
  [
    ((4, 4), None, (4, 4)),
    ((4, 6), (2, 3), (4, 6)),
    ((5, 3), (3, 2), (7, 2)),  # nothing divides, one axis grows and one shrinks
  ],
)
def test_fusion_is_the_formula(size, above, spatial):
  x = draw(2, *size, 3)
  residual = None if above is None else draw(2, *above, 4, seed=1)
  module = ReviewFusion(mid=4, features=5, spatial=spatial)
  inputs = (x,) if residual is None else (x, residual)
  variables = given(module, *inputs)
  assert ("attention" in variables["params"]) == (residual is not None)
  apply = jax.jit(lambda v, *inputs: module.apply(v, *inputs, train=True, mutable=["batch_stats"]))
  (out, left), state = apply(variables, *inputs)
  want, want_left = fuse(variables["params"], x, residual, spatial)
  assert out.shape == (2, *spatial, 5)
  np.testing.assert_allclose(left, want_left, **CLOSE)
  np.testing.assert_allclose(out, want, **CLOSE)
  first = (x.astype(np.float64) @ as_float64(variables["params"]["conv1"]["kernel"])).mean(
    (0, 1, 2)
  )
  np.testing.assert_allclose(state["batch_stats"]["norm1"]["mean"], 0.1 * first, **CLOSE)


def test_evaluation_uses_the_averages_and_changes_nothing():
  x = draw(2, 2, 2, 3)
  module = ReviewFusion(mid=4, features=5, spatial=(2, 2))
  variables = given(module, x)
  alone, _ = module.apply(variables, x[:1])
  both, _ = module.apply(variables, x)
  np.testing.assert_allclose(both[:1], alone, rtol=1e-5, atol=1e-5)  # float32


def test_initialisers_are_the_published_ones():
  module = ReviewFusion(mid=64, features=64, spatial=(1, 1))
  residual = jnp.ones((1, 1, 1, 64))
  params = module.init(KEY, jnp.ones((1, 1, 1, 48)), residual)["params"]
  for name, bound in (
    ("conv1", np.sqrt(3 / 48)),
    ("conv2", np.sqrt(3 / (9 * 64))),
    ("attention", 1 / np.sqrt(128)),
  ):
    kernel = np.abs(np.asarray(params[name]["kernel"]))
    # Uniform within ±bound: the largest of 256 draws or more is beyond 95 % of it (1 - 0.95^256).
    assert 0.95 * bound < kernel.max() <= bound * (1 + 1e-6)
  assert "bias" not in params["conv1"]
  assert "bias" not in params["conv2"]


def test_statistics_are_averaged_over_the_devices():
  x, residual = draw(4, 2, 2, 3), draw(4, 1, 1, 4, seed=1)
  alone = ReviewFusion(4, 2, (2, 2))
  together = ReviewFusion(4, 2, (2, 2), axis_name="devices")
  variables = given(together, x, residual)

  def run(module):
    return lambda x, r: module.apply(variables, x, r, train=True, mutable=["batch_stats"])

  want = jax.jit(run(alone))(x, residual)
  shards = (x.reshape(2, 2, 2, 2, 3), residual.reshape(2, 2, 1, 1, 4))
  got = jax.pmap(run(together), axis_name="devices")(*shards)
  # The same sums in another order, in float32.
  np.testing.assert_allclose(got[0][0].reshape(want[0][0].shape), want[0][0], **CLOSE)
  jax.tree.map(lambda g, w: np.testing.assert_allclose(g[1], w, **CLOSE), got[1], want[1])


def test_errors_and_dtypes():
  module = ReviewFusion(mid=4, features=5, spatial=(2, 2), dtype=jnp.bfloat16)
  x = jax.ShapeDtypeStruct((2, 2, 2, 3), jnp.float32)

  def made(channels):
    residual = jax.ShapeDtypeStruct((2, 1, 1, channels), jnp.float32)
    return jax.eval_shape(lambda x, r: module.init_with_output(KEY, x, r), x, residual)

  (out, left), variables = made(4)
  assert out.dtype == left.dtype == jnp.bfloat16
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
  with pytest.raises(ValueError, match=r"residual \(2, 1, 1, 3\) must have mid=4 channels"):
    made(3)


def test_it_is_a_projector():
  assert projectors.ReviewFusion is ReviewFusion


def test_conv_takes_an_initialiser():
  module = projectors.Conv(3, (2, 2), kernel_init=jax.nn.initializers.constant(2.0))
  kernel = module.init(KEY, jnp.ones((1, 2, 2, 2)))["params"]["conv"]["kernel"]
  assert np.all(kernel == 2)
  assert parameters(module, jnp.ones((1, 2, 2, 2)))["conv"]["kernel"].shape == (1, 1, 2, 3)
