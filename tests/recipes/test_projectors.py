"""Projectors against NumPy written from their formulas, ReviewKD's fusion among them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.recipes import projectors
from jaxdistill.recipes.projectors import ReviewFusion
from small_networks import convolve, drawn

KEY = jax.random.key(0)


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


def parameters(module, *inputs):
  return drawn(jax.eval_shape(module.init, KEY, *inputs)["params"], seed=2)


def as_float64(tree):
  return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def transposed(x, kernel):
  """PyTorch's ConvTranspose2d(kernel 4, stride 2, padding 1): every input pixel is spread out."""
  batch, high, wide, _ = x.shape
  out = np.zeros((batch, 2 * high + 2, 2 * wide + 2, kernel.shape[-1]))
  for i in range(high):
    for j in range(wide):
      # Flax keeps the kernel flipped.
      spread = np.einsum("bc,hwcd->bhwd", x[:, i, j], kernel[::-1, ::-1])
      out[:, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += spread
  return out[:, 1:-1, 1:-1]


@pytest.mark.parametrize("axes", [(2,), (2, 3)])
def test_linear_maps_the_last_axis(axes):
  x = draw(*axes, 4)
  module = projectors.Linear(5)
  params = parameters(module, x)
  dense = as_float64(params["dense"])
  want = np.asarray(x, np.float64) @ dense["kernel"] + dense["bias"]
  # float32 sums of four products of size 1.
  np.testing.assert_allclose(
    module.apply({"params": params}, x, train=True), want, rtol=1e-5, atol=1e-5
  )


def test_linear_takes_another_initialiser_and_no_bias():
  module = projectors.Linear(3, use_bias=False, kernel_init=jax.nn.initializers.constant(2.0))
  params = module.init(KEY, jnp.ones((2, 4)))["params"]["dense"]
  assert params.keys() == {"kernel"}
  assert np.all(params["kernel"] == 2)


def test_mlp():
  x = draw(2, 3, 4)
  module = projectors.MLP(hidden=6, features=5)
  params = parameters(module, x)
  first, second = as_float64(params["dense1"]), as_float64(params["dense2"])
  hidden = np.maximum(x.astype(np.float64) @ first["kernel"] + first["bias"], 0)
  want = hidden @ second["kernel"] + second["bias"]
  # float32 sums of six products of sums of four.
  np.testing.assert_allclose(
    module.apply({"params": params}, x, train=False), want, rtol=1e-5, atol=2e-5
  )


CASES = {
  "equal": ((4, 4), (4, 4), lambda x, k: convolve(x, k, 1, 0), (1, 1)),
  "twice": ((8, 4), (4, 2), lambda x, k: convolve(x, k, 2, 1), (3, 3)),
  "half": ((2, 3), (4, 6), transposed, (4, 4)),
  "else": ((6, 5), (4, 4), lambda x, k: convolve(x, k, 1, 0), (3, 2)),
}


@pytest.mark.parametrize("case", CASES)
def test_conv_is_fitnets_regressor(case):
  ours, theirs, convolution, kernel = CASES[case]
  x = draw(2, *ours, 3)
  module = projectors.Conv(features=5, spatial=theirs, use_norm=False, use_relu=False)
  params = parameters(module, x)["conv"]
  assert params["kernel"].shape == (*kernel, 3, 5)
  got = module.apply({"params": {"conv": params}}, x)
  want = convolution(x.astype(np.float64), np.asarray(params["kernel"], np.float64))
  want = want + np.asarray(params["bias"], np.float64)[None, None, None]
  assert got.shape == (2, *theirs, 5)
  # float32 sums of at most 48 products of size 1.
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)


def test_conv_norm_and_relu():
  x = draw(2, 4, 4, 3)
  plain = projectors.Conv(5, (4, 4), use_norm=False, use_relu=False)
  full = projectors.Conv(5, (4, 4))
  variables = full.init(KEY, x)
  y = np.asarray(plain.apply({"params": {"conv": variables["params"]["conv"]}}, x), np.float64)
  mean, variance = y.mean((0, 1, 2)), y.var((0, 1, 2))
  centred = (y - mean[None, None, None]) / np.sqrt(variance + 1e-5)[None, None, None]
  got, state = full.apply(variables, x, train=True, mutable=["batch_stats"])
  # float32 means of 32 values of size 1.
  close = {"rtol": 1e-4, "atol": 1e-5}
  np.testing.assert_allclose(got, np.maximum(centred, 0), **close)
  stats = state["batch_stats"]["norm"]
  np.testing.assert_allclose(stats["mean"], 0.1 * mean, **close)
  np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * variance, **close)
  # In evaluation: the running statistics, which are still 0 and 1.
  np.testing.assert_allclose(
    full.apply(variables, x), np.maximum(y / np.sqrt(1 + 1e-5), 0), **close
  )
  signed = projectors.Conv(5, (4, 4), use_relu=False)
  np.testing.assert_allclose(
    signed.apply(variables, x, train=True, mutable=["batch_stats"])[0], centred, **close
  )


def test_conv_without_bias():
  params = parameters(projectors.Conv(5, (4, 4), use_bias=False), draw(2, 4, 4, 3))
  assert params["conv"].keys() == {"kernel"}


def test_conv_averages_its_statistics_over_the_devices():
  x = draw(4, 2, 2, 3)
  alone, together = projectors.Conv(2, (2, 2)), projectors.Conv(2, (2, 2), axis_name="devices")
  variables = together.init(KEY, x)
  want = alone.apply(variables, x, train=True, mutable=["batch_stats"])

  def shard(x):
    return together.apply(variables, x, train=True, mutable=["batch_stats"])

  got = jax.pmap(shard, axis_name="devices")(x.reshape(2, 2, 2, 2, 3))
  # The same sums in another order, in float32.
  np.testing.assert_allclose(got[0].reshape(want[0].shape), want[0], rtol=1e-4, atol=1e-5)
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(g[1], w, rtol=1e-4, atol=1e-5), got[1], want[1]
  )


@pytest.mark.parametrize(
  ("student", "teacher", "kind"),
  [
    ((2, 3), (2, 5), projectors.Linear),
    ((2, 7, 3), (2, 7, 5), projectors.Linear),
    ((2, 4, 4, 3), (2, 4, 4, 5), projectors.Conv),
    ((2, 8, 8, 3), (2, 4, 4, 5), projectors.Conv),
    ((2, 4, 6, 3), (2, 8, 12, 5), projectors.Conv),
    ((2, 7, 9, 3), (2, 5, 5, 5), projectors.Conv),
    ((2, 6, 6, 3), (2, 9, 9, 5), projectors.Conv),
    ((2, 8, 2, 3), (2, 4, 4, 5), projectors.Conv),
    ((2, 4, 4, 3), (2, 16, 5), projectors.Resampled),
    ((2, 4, 6, 3), (2, 25, 5), projectors.Resampled),
    ((2, 5, 3), (2, 4, 4, 5), projectors.Resampled),
    ((2, 16, 3), (2, 9, 5), projectors.Resampled),
    ((2, 6, 3), (2, 7, 5), projectors.Resampled),
  ],
)
def test_between_leads_to_the_teachers_shape(student, teacher, kind):
  module = projectors.between(shape(*student), shape(*teacher))
  assert isinstance(module, kind)
  out, _ = jax.eval_shape(
    lambda x: module.init_with_output(KEY, x, train=True),
    jax.ShapeDtypeStruct(student, jnp.float32),
  )
  assert out.shape == teacher


@pytest.mark.parametrize(
  ("student", "teacher", "message"),
  [
    ((2, 3), (2, 4, 4, 5), "Pool or reshape"),
    ((2,), (2,), "must be vectors"),
    ((2, 1, 1, 1, 3), (2, 1, 1, 1, 3), "must be vectors"),
    ((2, 6, 3), (2, 5), "Pool or reshape"),
  ],
)
def test_between_names_both_shapes(student, teacher, message):
  with pytest.raises(ValueError, match=message) as error:
    projectors.between(shape(*student), shape(*teacher))
  assert str(student) in str(error.value)
  assert str(teacher) in str(error.value)


def weights(old, new):
  """Linear interpolation between centres, [new, old]: a triangle, as wide as the larger step."""
  scale = max(old / new, 1)
  centres = (np.arange(new) + 0.5) * old / new - 0.5
  table = np.maximum(0, 1 - np.abs(np.arange(old)[None] - centres[:, None]) / scale)
  return table / table.sum(1, keepdims=True)


def bilinear(x, spatial):
  rows, columns = (weights(*sizes) for sizes in zip(x.shape[1:3], spatial, strict=True))
  return np.einsum("ih,jw,bhwc->bijc", rows, columns, x)


def test_interpolation_by_hand():
  # 2 to 4: a quarter of the neighbour, and the ends repeated; 4 to 2: 3, 3, 1 of four in sevenths.
  np.testing.assert_allclose(weights(2, 4) @ [0.0, 1.0], [0, 0.25, 0.75, 1])
  np.testing.assert_allclose(weights(4, 2)[0], np.array([3, 3, 1, 0]) / 7)


@pytest.mark.parametrize("size", [((4, 4), (6, 6)), ((8, 2), (4, 4)), ((2, 3), (5, 3))])
def test_conv_to_a_size_that_no_convolution_reaches_is_resized(size):
  ours, theirs = size
  x = draw(2, *ours, 3)
  module = projectors.Conv(5, theirs)
  variables = module.init(KEY, x)
  params = as_float64(variables["params"])
  assert params["conv"]["kernel"].shape == (1, 1, 3, 5)
  y = bilinear(
    x @ params["conv"]["kernel"][0, 0] + params["conv"]["bias"].reshape(1, 1, 1, 5), theirs
  )
  want = np.maximum(normalise(y, params["norm"]), 0)
  got, _ = module.apply(variables, x, train=True, mutable=["batch_stats"])
  np.testing.assert_allclose(got, want, **CLOSE)


def resampled(x, old, new):
  """The cases one by one: (tokens in front, grid) of both sides, or None for a sequence."""
  if old is None:
    flat = x.reshape(len(x), -1, x.shape[-1])
    return np.einsum("nl,blc->bnc", weights(flat.shape[1], new), flat)
  (front, size), (fronts, wanted) = old, new
  flat = x.reshape(len(x), -1, x.shape[-1])
  grid = flat[:, front:].reshape(len(x), *size, -1)
  heads = [flat[:, i] if i < front else grid.mean((1, 2)) for i in range(fronts)]
  cells = bilinear(grid, wanted).reshape(len(x), wanted[0] * wanted[1], -1)
  return np.concatenate([*(head[:, None] for head in heads), cells], axis=1)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("ours", "theirs", "old", "new"),
  [
    # A map and tokens: as many, with a class token, with two, on another grid, on none.
    ((4, 4), (16,), (0, (4, 4)), (0, (4, 4))),
    ((4, 4), (17,), (0, (4, 4)), (1, (4, 4))),
    ((4, 4), (18,), (0, (4, 4)), (2, (4, 4))),
    ((6, 6), (10,), (0, (6, 6)), (1, (3, 3))),
    ((4, 6), (6,), (0, (4, 6)), (0, (2, 3))),
    ((4, 6), (16,), None, 16),
    # And back: a class token has no place on a map.
    ((16,), (4, 4), (0, (4, 4)), (0, (4, 4))),
    ((17,), (8, 8), (1, (4, 4)), (0, (8, 8))),
    ((25,), (2, 3), (1, (4, 6)), (0, (2, 3))),
    ((7,), (2, 3), (1, (2, 3)), (0, (2, 3))),
    ((12,), (2, 2), None, 4),
    # Between two sequences.
    ((16,), (9,), (0, (4, 4)), (0, (3, 3))),
    ((17,), (10,), (1, (4, 4)), (1, (3, 3))),
    ((10,), (16,), (1, (3, 3)), (0, (4, 4))),
    ((9,), (18,), (0, (3, 3)), (2, (4, 4))),
    ((3,), (7,), None, 7),
    ((16,), (12,), None, 12),
  ],
)
def test_resampling_is_the_formula(ours, theirs, old, new):
  x = draw(2, *ours, 3)
  module = projectors.between(shape(*x.shape), shape(2, *theirs, 5))
  params = parameters(module, x)
  dense = as_float64(params["dense"])
  projected = x @ dense["kernel"] + dense["bias"]
  want = resampled(projected, old, new).reshape(2, *theirs, 5)
  np.testing.assert_allclose(module.apply({"params": params}, x, train=True), want, **CLOSE)


@pytest.mark.slow
def test_every_position_of_a_larger_feature_has_a_gradient():
  x = draw(1, 12, 12, 3)
  module = projectors.Resampled(2, (5,))
  params = parameters(module, x)
  to_x = jax.grad(lambda x: jnp.sum(module.apply({"params": params}, x)[:, 1:] ** 2))(x)
  assert np.all(np.abs(to_x).max(-1) > 0)


@pytest.mark.parametrize(
  ("module", "sizes"),
  [
    (projectors.Linear(2, dtype=jnp.bfloat16), (2, 3)),
    (projectors.MLP(2, 2, dtype=jnp.bfloat16), (2, 3)),
    (projectors.Conv(2, (4, 4), dtype=jnp.bfloat16), (2, 4, 4, 3)),
    (projectors.Resampled(2, (4,), dtype=jnp.bfloat16), (2, 4, 4, 3)),
  ],
)
def test_dtypes(module, sizes):
  x = jax.ShapeDtypeStruct(sizes, jnp.bfloat16)
  out, variables = jax.eval_shape(lambda x: module.init_with_output(KEY, x), x)
  assert out.dtype == jnp.bfloat16
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


def plain_temperature(theta):
  return 1 + 20 / (1 + np.exp(-np.asarray(theta, np.float64)))


def test_a_learned_temperature_climbs_what_the_others_descend():
  module = projectors.LearnedTemperature()

  @jax.jit
  def loss(theta, student, reversal):
    """A loss that depends on both; its slope in the temperature is 2 * student * temperature."""
    return student * module.apply({"params": {"theta": theta}}, reversal, train=True) ** 2

  grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
  # The plain slope, 2 * 3 * temperature * 20 * s * (1 - s), in float64.
  temperature, s = plain_temperature(0.5), 1 / (1 + np.exp(-0.5))
  plain = 2 * 3 * temperature * 20 * s * (1 - s)
  for reversal in (0.0, 0.25, 1.0):
    # The value is the same bits whatever the reversal.
    assert loss(0.5, 3.0, reversal) == loss(0.5, 3.0, 0.0)
    theta, student, own = grad(0.5, 3.0, reversal)
    assert float(theta) == pytest.approx(-reversal * plain, rel=1e-5)  # float32
    assert float(student) == pytest.approx(temperature**2, rel=1e-5)
    assert float(own) == 0
  # A few steps down the gradient: nowhere at 0, and at 1 to where the loss is larger.
  for reversal, moves in ((0.0, False), (1.0, True)):
    theta, values = 0.5, []
    for _ in range(4):
      values.append(float(loss(theta, 3.0, reversal)))
      theta = theta - 1e-3 * grad(theta, 3.0, reversal)[0]
    assert values == sorted(values)
    assert (values[-1] > values[0]) == moves


def test_a_learned_temperature_starts_and_stays_where_it_should():
  module = projectors.LearnedTemperature()
  start, variables = module.init_with_output(KEY, 1.0)
  assert jax.tree.map(float, variables) == {"params": {"theta": 1.0}}
  assert float(start) == pytest.approx(15.62, abs=0.005)
  values, slopes = jax.vmap(
    jax.value_and_grad(lambda theta: module.apply({"params": {"theta": theta}}, 1.0))
  )(jnp.array([-1e4, -3.0, 0.0, 3.0, 1e4]))
  np.testing.assert_allclose(values, [1, plain_temperature(-3), 11, plain_temperature(3), 21])
  assert np.all(np.isfinite(slopes))
  other = projectors.LearnedTemperature(lowest=2.0, span=4.0, initial=0.0)
  assert float(other.init_with_output(KEY, 1.0)[0]) == 4


def test_a_temperature_for_each_example(strict_promotion):
  module = projectors.LearnedTemperature(hidden=6)
  x = draw(5, 8)
  shapes = jax.eval_shape(module.init, KEY, 1.0, x)["params"]
  params = drawn(shapes, seed=2, scale=1 / 3)

  @jax.jit
  def run(params, x, reversal):
    return jax.vjp(lambda p, x: module.apply({"params": p}, reversal, x), params, x)

  value, pullback = run(params, x, 1.0)
  first, second = as_float64(params["dense1"]), as_float64(params["dense2"])
  hidden = np.maximum(x.astype(np.float64) @ first["kernel"] + first["bias"], 0)
  theta = (hidden @ second["kernel"] + second["bias"])[:, 0]
  np.testing.assert_allclose(value, plain_temperature(theta), rtol=1e-5)  # float32
  to_params, to_x = pullback(jnp.ones(5))
  slopes = (plain_temperature(theta) - 1) * (21 - plain_temperature(theta)) / 20
  np.testing.assert_allclose(to_params["dense2"]["bias"], [-np.sum(slopes)], rtol=1e-5)
  # What it looks at is the student, which nobody turns round.
  assert not np.any(to_x)
  stays, _ = run(params, x, 0.0)[1](jnp.ones(5))
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(stays))
  low = jax.eval_shape(module.apply, {"params": shapes}, 1.0, jnp.zeros((2, 3, 8), jnp.bfloat16))
  assert (low.shape, low.dtype) == ((2, 3), jnp.float32)


def test_a_learned_temperature_takes_predictions_with_hidden_alone():
  for hidden, given in ((None, (1.0, jnp.ones((2, 3)))), (4, (1.0,))):
    with pytest.raises(ValueError, match=f"hidden={hidden} and predictions .*hidden=128"):
      projectors.LearnedTemperature(hidden=hidden).init(KEY, *given)


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
  return {"params": parameters(module, *inputs), "batch_stats": stats}


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
