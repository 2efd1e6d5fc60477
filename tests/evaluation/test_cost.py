"""Costs: the counted operations against sums done by hand, and the clocks against themselves."""

import functools
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from jaxdistill.evaluation import cost
from jaxdistill.networks.models import resnet


def shape(*sizes, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(sizes, dtype)


def square(x):
  return x @ x


def convolve(x, kernel, strides=(1, 1), padding="SAME", **options):
  return lax.conv_general_dilated(
    x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
  )


# ------------------------------------------------------------------------------ sizes


def test_parameters_and_bytes_of_a_network():
  module = nn.Sequential([nn.Dense(5), nn.BatchNorm(use_running_average=True)])
  variables = jax.eval_shape(module.init, jax.random.key(0), shape(1, 3))
  # Dense 3·5 + 5, BatchNorm's scale and bias 2·5; its running mean and variance are 2·5 more.
  assert cost.parameters(variables) == 30
  assert cost.parameters(variables["params"]) == 30
  assert cost.parameters(variables["batch_stats"]) == 10
  assert cost.size_bytes(variables) == 4 * 40
  assert cost.parameters({}) == cost.size_bytes({}) == 0


def test_bytes_follow_the_dtype():
  sizes = {jnp.bfloat16: 14, jnp.int8: 7, jnp.bool_: 7, jnp.int4: 4}
  for dtype, expected in sizes.items():
    assert cost.size_bytes({"x": shape(7, dtype=dtype)}) == expected, dtype
  assert cost.size_bytes(jnp.zeros((2, 3))) == 24


# ------------------------------------------------------------------------------ products


def test_dot_products():
  assert cost.flops(jnp.dot, shape(3), shape(3)) == 2 * 3
  assert cost.flops(jnp.matmul, shape(4, 5), shape(5, 6)) == 2 * 4 * 5 * 6
  batched = functools.partial(jnp.einsum, "bij,bkj->bik")
  assert cost.flops(batched, shape(7, 4, 5), shape(7, 6, 5)) == 2 * 7 * 4 * 5 * 6
  int8 = functools.partial(jnp.matmul, preferred_element_type=jnp.int32)
  assert cost.flops(int8, shape(4, 5, dtype=jnp.int8), shape(5, 6, dtype=jnp.int8)) == 240
  vmapped = jax.vmap(square)
  assert cost.flops(vmapped, shape(9, 4, 4)) == 9 * cost.flops(square, shape(4, 4)) == 9 * 128


def test_a_dense_layer():
  module = nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(2)])
  variables = jax.eval_shape(module.init, jax.random.key(0), shape(1, 3))
  # Products, the two biases, the relu.
  by_hand = 2 * (3 * 5 + 5 * 2) + (5 + 2) + 5
  assert cost.flops(module.apply, variables, shape(1, 3)) == by_hand
  assert cost.flops(module.apply, variables, shape(8, 3)) == 8 * by_hand


@pytest.mark.parametrize(
  ("options", "channels", "outputs"),
  [
    ({}, 4, 8 * 8),
    ({"padding": "VALID"}, 4, 6 * 6),
    ({"strides": (2, 2)}, 4, 4 * 4),
    ({"strides": (2, 1), "padding": ((1, 1), (0, 2))}, 4, 4 * 8),
    ({"feature_group_count": 2}, 2, 8 * 8),
    ({"feature_group_count": 4}, 1, 8 * 8),
    ({"rhs_dilation": (2, 2), "padding": "VALID"}, 4, 4 * 4),
  ],
)
def test_convolutions(options, channels, outputs):
  """Two images of 8 × 8 with 4 channels, 12 kernels of 3 × 3; padding counts as data."""
  function = functools.partial(convolve, **options)
  products = 2 * outputs * 12 * 3 * 3 * channels
  assert cost.flops(function, shape(2, 8, 8, 4), shape(3, 3, channels, 12)) == 2 * products


def test_the_holes_of_a_dilated_input_are_free():
  transposed = nn.ConvTranspose(6, (4, 4), (2, 2), use_bias=False)
  variables = jax.eval_shape(transposed.init, jax.random.key(0), shape(1, 8, 8, 3))
  # Every input pixel is multiplied by the whole kernel once.
  by_hand = 2 * (8 * 8) * (4 * 4) * 3 * 6
  assert cost.flops(transposed.apply, variables, shape(1, 8, 8, 3)) == by_hand


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_of_a_convolution(groups):
  def forward(x, kernel):
    return convolve(x, kernel, (2, 2), "VALID", feature_group_count=groups)

  def gradients(x, kernel, cotangent):
    return jax.vjp(forward, x, kernel)[1](cotangent)

  args = shape(2, 9, 9, 4), shape(3, 3, 4 // groups, 6), shape(2, 4, 4, 6)
  once = cost.flops(forward, *args[:2])
  assert once == 2 * (2 * 4 * 4 * 6) * (3 * 3 * 4 // groups)
  # Each product of the forward pass has one in the kernel's gradient.
  assert cost.flops(lambda *args: gradients(*args)[1], *args) == once
  # The input's gradient slides over 4 pixels with a hole between each two and 2 pixels of padding
  # around: along an axis 5 positions see two taps and 4 see one, where forward 4 see three.
  to_input = once * (5 * 2 + 4) ** 2 // (4 * 3) ** 2
  assert cost.flops(lambda *args: gradients(*args)[0], *args) == to_input
  # The forward pass itself is dead code here: a convolution is linear in each of its arguments.
  assert cost.flops(gradients, *args) == once + to_input


def test_vmap_over_kernels_becomes_groups():
  function = jax.vmap(convolve, in_axes=(None, 0))
  single = cost.flops(convolve, shape(1, 8, 8, 4), shape(3, 3, 4, 5))
  assert cost.flops(function, shape(1, 8, 8, 4), shape(6, 3, 3, 4, 5)) == 6 * single
  both = jax.vmap(convolve)
  assert cost.flops(both, shape(6, 1, 8, 8, 4), shape(6, 3, 3, 4, 5)) == 6 * single


def test_resnet20_has_the_published_cost():
  """41 million multiply-adds for a CIFAR image (He et al. 2016, ResNet-20)."""
  module = resnet.resnet20()
  variables = jax.eval_shape(module.init, jax.random.key(0), shape(1, 32, 32, 3))
  counted = cost.flops(lambda v, x: module.apply(v, x, train=False), variables, shape(1, 32, 32, 3))
  products = 32 * 32 * 9 * 16 * (3 + 6 * 16)  # the stem and three blocks of 16
  products += 16 * 16 * (9 * 32 * (16 + 5 * 32) + 16 * 32)  # three blocks of 32, one shortcut
  products += 8 * 8 * (9 * 64 * (32 + 5 * 64) + 32 * 64) + 64 * 100
  assert round(products / 1e6) == 41
  # The norms, relus and additions around them are 2 to 3 % more.
  assert 1.005 < counted / (2 * products) < 1.05


# ------------------------------------------------------------------------------ the rest


def test_elements_reductions_windows_and_what_is_free():
  x = shape(4, 6)
  assert cost.flops(lambda x: jnp.exp(x) + 1, x) == 2 * 24
  assert cost.flops(lambda x: x.sum(axis=1), x) == 24
  assert cost.flops(lambda x: x.T.reshape(3, 8)[1:, ::2].astype(jnp.bfloat16), x) == 0
  assert cost.flops(lambda i: i * 2 + 1, shape(4, dtype=jnp.int32)) == 0
  assert cost.flops(lambda x: x[jnp.array([0, 2])], x) == 0
  assert cost.flops(lambda x, y: x.at[jnp.array([0, 2])].add(y), x, shape(2, 6)) == 12
  image = shape(1, 4, 4, 3)
  assert cost.flops(lambda x: nn.max_pool(x, (2, 2), (2, 2)), image) == 4 * 12
  # Average pooling divides each of its outputs.
  assert cost.flops(lambda x: nn.avg_pool(x, (2, 2), (2, 2)), image) == 4 * 12 + 12
  product = functools.partial(lax.reduce, computation=lambda a, b: a * b, dimensions=(0,))
  assert cost.flops(lambda x: product(x, jnp.float32(1)), x) == 24


def test_what_no_output_depends_on_is_left_out():
  def two(x):
    return {"logits": x + 1, "features": x @ x}

  inner = jax.jit(two)
  assert cost.flops(two, shape(3, 3)) == 9 + 54
  assert cost.flops(lambda x: two(x)["logits"], shape(3, 3)) == 9
  assert cost.flops(lambda x: inner(x)["logits"], shape(3, 3)) == 9
  assert cost.flops(lambda x: inner(x)["features"], shape(3, 3)) == 54


def test_scan_counts_its_body_times_its_length():
  def loop(x):
    return lax.scan(lambda c, _: (c @ c + 1, None), x, length=7)[0]

  assert cost.flops(loop, shape(3, 3)) == 7 * (54 + 9)
  assert cost.flops(lambda x: lax.fori_loop(0, 7, lambda _, c: c @ c, x), shape(3, 3)) == 7 * 54
  assert cost.flops(lambda x: lax.map(square, x), shape(5, 3, 3)) == 5 * 54
  assert cost.flops(
    lambda x: lax.scan(lambda c, _: (loop(c), None), x, length=2)[0], shape(3, 3)
  ) == (2 * 7 * 63)


def test_while_counts_once_and_cond_its_dearest_branch():
  def until(x):
    return lax.while_loop(lambda c: c[0, 0] < 9, lambda c: c @ c, x)

  assert cost.flops(until, shape(3, 3)) == 1 + 54

  def choose(index, x):
    return lax.switch(index, [lambda x: x, square, lambda x: x + 1], x)

  assert cost.flops(choose, shape(dtype=jnp.int32), shape(3, 3)) == 54


def test_calls_are_looked_into():
  @jax.custom_vjp
  def doubled(x):
    return square(x)

  doubled.defvjp(lambda x: (square(x), x), lambda x, g: (g,))

  @jax.custom_jvp
  def tripled(x):
    return square(x)

  tripled.defjvp(lambda p, t: (square(*p), t[0]))
  for function in (jax.jit(square), jax.checkpoint(square), doubled, tripled):
    assert cost.flops(function, shape(3, 3)) == 54
  mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
  sharded = jax.shard_map(
    lambda x, w: x @ w,
    mesh=mesh,
    in_specs=(PartitionSpec("data"), PartitionSpec()),
    out_specs=PartitionSpec("data"),
  )
  # Both shards together do what one device would.
  assert cost.flops(sharded, shape(4, 3), shape(3, 3)) == 2 * 4 * 3 * 3
  # Rematerialisation repeats the forward product in the backward pass: 1 + 1 + 2 products.
  loss = jax.value_and_grad(lambda x: jax.checkpoint(lambda y: jnp.sin(y @ y))(x).sum())
  assert 4 * 54 <= cost.flops(loss, shape(3, 3)) < 5 * 54


def test_no_number_rather_than_a_wrong_one():
  with pytest.raises(ValueError, match=r"'fft'.*xla_flops"):
    cost.flops(jnp.fft.fft, shape(8))
  with pytest.raises(ValueError, match="svd"):
    cost.flops(lambda x: jnp.linalg.svd(x)[1], shape(3, 3))


def test_xla_counts_a_product_alike_and_a_loop_once():
  assert cost.xla_flops(square, shape(32, 32)) == cost.flops(square, shape(32, 32)) == 2 * 32**3

  def loop(x):
    return lax.scan(lambda c, _: (c @ c, None), x, length=50)[0]

  assert cost.flops(loop, shape(32, 32)) == 50 * 2 * 32**3
  assert cost.xla_flops(loop, shape(32, 32)) < 3 * 2 * 32**3


# ------------------------------------------------------------------------------ clocks


def sleeping(milliseconds):
  """A jittable function that takes at least so long on the host."""

  def wait(x):
    time.sleep(milliseconds / 1000)
    return np.asarray(x)

  return lambda x: jax.pure_callback(wait, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def test_latency_waits_for_the_result():
  measured = cost.latency(sleeping(20), np.zeros(2, np.float32), repeats=5, warmup=1)
  assert measured["calls"] == 5
  assert 20 <= measured["median"] <= measured["p95"]

  # A callback makes its call synchronous; a product is dispatched and returns at once.
  @jax.jit
  def work(x):
    return lax.fori_loop(0, 500, lambda _, c: c @ x, x)

  x = jax.block_until_ready(work(jnp.eye(128)))

  def fastest():
    times = []
    for _ in range(3):
      start = time.perf_counter()
      jax.block_until_ready(work(x))
      times.append(1000 * (time.perf_counter() - start))
    return min(times)

  # Before and after, since other work on the machine comes and goes.
  before, median = fastest(), cost.latency(work, x, repeats=3, warmup=1)["median"]
  assert median > min(before, fastest()) / 2


def test_latency_keeps_to_its_time():
  start = time.perf_counter()
  measured = cost.latency(
    sleeping(20), np.zeros(2, np.float32), repeats=10**6, warmup=10**6, seconds=0.2
  )
  assert 1 <= measured["calls"] <= 10
  # Two phases of 0.2 s and a compilation, with room for a busy machine.
  assert time.perf_counter() - start < 10
  once = cost.latency(sleeping(20), np.zeros(2, np.float32), seconds=0.0)
  assert once["calls"] == 1


def test_throughput_counts_examples():
  rate = cost.throughput(sleeping(10), np.zeros(2, np.float32), examples=8, seconds=0.3, warmup=1)
  # 10 ms for each call of 8; no more than 5 can be on their way at once.
  assert 0 < rate <= 5 * 8 / 0.010


@pytest.mark.parametrize("measure", [cost.latency, functools.partial(cost.throughput, examples=1)])
def test_clocks_refuse_nonsense(measure):
  with pytest.raises(ValueError, match="warmup"):
    measure(square, np.zeros((2, 2)), warmup=0)


def test_clocks_name_what_is_wrong():
  with pytest.raises(ValueError, match=r"repeats.*got 0"):
    cost.latency(square, np.zeros((2, 2)), repeats=0)
  with pytest.raises(ValueError, match=r"examples.*got 0"):
    cost.throughput(square, np.zeros((2, 2)), examples=0)
