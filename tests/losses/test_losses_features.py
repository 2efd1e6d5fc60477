"""Losses on features against float64 NumPy written from their formulas, and the loss contract."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses
from jaxdistill.losses import features as family
from jaxdistill.losses.pooling import average_pool
from loss_contract import TOLERANCE, assert_finite, check_derivative, jit, n, with_gradients

B, H, W, C = 3, 4, 6, 4
SAME = (B, H, W, C)
MARGIN = np.array([-0.9, -0.4, -0.2, -0.6])
RAW_VARIANCE = np.array([-2.0, 0.5, 1.0, 4.0])


# --- The formulas of the paper page, in float64 NumPy. ---


def pool(x, height, width):
  """Adaptive average pooling, window by window."""
  out = np.zeros((x.shape[0], height, width, x.shape[3]))
  for i, j in itertools.product(range(height), range(width)):
    rows = slice(math.floor(i * x.shape[1] / height), math.ceil((i + 1) * x.shape[1] / height))
    columns = slice(math.floor(j * x.shape[2] / width), math.ceil((j + 1) * x.shape[2] / width))
    out[:, i, j] = x[:, rows, columns].mean((1, 2))
  return out


def meet(s, t):
  if s.ndim != 4:
    return s, t
  size = min(s.shape[1], t.shape[1]), min(s.shape[2], t.shape[2])
  return pool(s, *size), pool(t, *size)


def own(x):
  """Axes of one value: all but the first, of tokens all but the first two."""
  return (2,) if x.ndim == 3 else tuple(range(1, x.ndim))


def ref_hint_l2(s, t):
  s, t = meet(s, t)
  return ((s - t) ** 2).mean(own(s))


def ref_hint_cosine(s, t):
  s, t = meet(s, t)
  lengths = np.sqrt((s**2).sum(-1)) * np.sqrt((t**2).sum(-1))
  return (1 - (s * t).sum(-1) / lengths).mean(own(s)[:-1])


def energy(x):
  return n((x**2).mean(-1).reshape(len(x), -1))


def channels(x):
  return np.moveaxis(x, -1, 1).reshape(len(x), x.shape[-1], -1)


def ref_nst(s, t):
  s, t = (n(channels(x)) for x in meet(s, t))

  def kernel(a, b):
    return ((a[:, :, None] * b[:, None]).sum(-1) ** 2).mean((1, 2))

  return kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)


def ref_fsp(s, t):
  def flow(pair):
    lower, upper = (channels(x) for x in meet(*pair))
    return (lower[:, :, None] * upper[:, None]).mean(-1)

  return ((flow(s) - flow(t)) ** 2).mean((1, 2))


def ref_ab(s, t, margin):
  s, t = meet(s, t)
  off = (s + margin) ** 2 * ((s > -margin) & (t <= 0))
  on = (s - margin) ** 2 * ((s <= margin) & (t > 0))
  return (off + on).sum((1, 2, 3))


def ref_ofd(s, t, margin):
  s, t = meet(s, t)
  m = np.broadcast_to(margin, t.shape)
  values = (s - m) ** 2 * ((s > m) & (t <= m)) + (s - t) ** 2 * ((s > t) & (m < t) & (t <= 0))
  return (values + (s - t) ** 2 * (t > 0)).sum((1, 2, 3))


def ref_hcl(s, t):
  s, t = meet(s, t)
  total, weights, weight = ((s - t) ** 2).mean((1, 2, 3)), 1.0, 1.0
  for level in (4, 2, 1):
    if level < s.shape[1]:
      weight /= 2
      weights += weight
      total += weight * ((pool(s, level, level) - pool(t, level, level)) ** 2).mean((1, 2, 3))
  return total / weights


def ref_vid(s, t, raw_variance):
  s, t = meet(s, t)
  variance = np.log1p(np.exp(raw_variance)) + 1e-5
  return (0.5 * ((s - t) ** 2 / variance + np.log(variance))).mean(own(s))


def ref_ickd(s, t):
  s, t = (channels(x) for x in meet(s, t))
  difference = n(s @ s.swapaxes(1, 2)) - n(t @ t.swapaxes(1, 2))
  return (difference**2).sum((1, 2)) / s.shape[1]


def ref_cwd(s, t, temperature):
  def shares(x):
    e = np.exp(channels(x) / temperature)
    return e / e.sum(-1, keepdims=True)

  q, p = (shares(x) for x in meet(s, t))
  return temperature**2 * (p * np.log(p / q)).sum(-1).mean(-1)


def ref_cat(s, t, size, normalize=False):
  s, t = (channels(pool(x, size, size)) for x in (s, t))
  if normalize:
    s, t = n(s), n(t)
  return ((s - t) ** 2).mean((1, 2))


def max_pool(x, window):
  """Window by window; the last may be cut off."""
  rows, columns = (range(0, x.shape[axis], window) for axis in (1, 2))
  blocks = [[x[:, i : i + window, j : j + window].max((1, 2)) for j in columns] for i in rows]
  return np.moveaxis(np.array(blocks), 2, 0)


def ref_structure(s, t, window):
  def cosines(x):
    x = n(max_pool(x, window)).reshape(len(x), -1, x.shape[-1])
    return x @ x.swapaxes(1, 2)

  s, t = meet(s, t)
  return ((cosines(s) - cosines(t)) ** 2).mean((1, 2))


def ref_normalized(s, t):
  z = (t - t.mean(-1, keepdims=True)) / np.sqrt(t.var(-1, keepdims=True) + 1e-5)
  d = np.abs(s - z)
  return np.where(d < 1, 0.5 * d**2, d - 0.5).mean(-1)


def ref_many(s, t):
  width = t.shape[-1]
  return sum(ref_hint_l2(s[..., i : i + width], t) for i in range(0, s.shape[-1], width))


def ref_relation(s, t, num_heads):
  def attention(x):
    width = x.shape[-1] // num_heads
    heads = np.stack([x[..., i * width : (i + 1) * width] for i in range(num_heads)], 1)
    scores = np.exp(heads @ heads.swapaxes(2, 3) / np.sqrt(width))
    return scores / scores.sum(-1, keepdims=True)

  a, b = attention(t), attention(s)
  return (a * np.log(a / b)).sum(-1).mean(1)


# name: (reference, hyper-parameters, pairs of shapes). The first pair is the one for extremes.
WIDER = (B, H, W, 3)
MORE, LESS = (B, 7, 3, C), (B, 3, 5, C)
FLAT = [((B, 5), (B, 5)), ((2, 3, 5), (2, 3, 5))]
FORMULAS = {
  "hint_l2": (ref_hint_l2, {}, [(SAME, SAME), (MORE, LESS), *FLAT]),
  "hint_cosine": (ref_hint_cosine, {}, [(SAME, SAME), (MORE, LESS), FLAT[1]]),
  "attention_transfer": (
    lambda s, t: ((energy(meet(s, t)[0]) - energy(meet(s, t)[1])) ** 2).mean(-1),
    {},
    [(SAME, WIDER), (MORE, (B, 3, 5, 2))],
  ),
  "factor_transfer": (
    lambda s, t: np.abs(energy(meet(s, t)[0]) - energy(meet(s, t)[1])).mean(-1),
    {},
    [(SAME, WIDER), (MORE, (B, 3, 5, 2))],
  ),
  "neuron_selectivity": (ref_nst, {}, [(SAME, WIDER), (MORE, (B, 3, 5, 2))]),
  "flow_of_solution": (
    ref_fsp,
    {},
    [((SAME, (B, 2, 3, 2)), (SAME, (B, 3, 3, 2))), ((SAME, (B, 5, 2, 3)), (MORE, (B, 3, 1, 3)))],
  ),
  "activation_boundary": (ref_ab, {"margin": 0.7}, [(SAME, SAME), (MORE, LESS)]),
  "overhaul": (ref_ofd, {"margin": MARGIN}, [(SAME, SAME), (MORE, LESS)]),
  "hierarchical_context": (
    ref_hcl,
    {},
    [(SAME, SAME), ((B, 7, 5, C), (B, 5, 6, C))],
  ),
  "variational_information": (
    ref_vid,
    {"raw_variance": RAW_VARIANCE},
    [(SAME, SAME), (MORE, LESS), ((2, 3, C), (2, 3, C))],
  ),
  "inter_channel_correlation": (ref_ickd, {}, [(SAME, SAME), (MORE, LESS)]),
  "channel_wise": (ref_cwd, {"temperature": 1.5}, [(SAME, SAME), (MORE, LESS)]),
  "class_attention": (ref_cat, {"size": 3}, [(SAME, (B, 7, 3, C)), (MORE, LESS)]),
  "pairwise_structure": (ref_structure, {"window": 2}, [(SAME, WIDER), (MORE, (B, 5, 5, 2))]),
  "hint_normalized": (ref_normalized, {}, FLAT),
  "many_to_one": (
    ref_many,
    {},
    [(SAME, SAME), ((B, H, W, 3 * C), SAME), ((B, 7, 3, 2 * C), (B, 3, 5, C))],
  ),
  "attention_relation": (ref_relation, {"num_heads": 2}, [((B, 5, 4), (B, 5, 6))]),
}
NAMES = pytest.mark.parametrize("name", FORMULAS)
# Their value does not change when features are multiplied, so no size of feature is too large.
SCALE_FREE = [
  "hint_cosine",
  "attention_transfer",
  "factor_transfer",
  "neuron_selectivity",
  "inter_channel_correlation",
  "pairwise_structure",
]


def is_shape(x):
  return isinstance(x, tuple) and isinstance(x[0], int)


def normal(seed, shape):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda each: rng.normal(size=each), shape, is_leaf=is_shape)


def features(name, seed, case=0):
  shapes = FORMULAS[name][2][case]
  return normal(seed, shapes[0]), normal(seed + 1, shapes[1])


def as_float(tree, dtype=np.float32):
  return jax.tree.map(lambda x: np.asarray(x).astype(dtype), tree)


def call(name, student, teacher, hyper):
  return getattr(losses, name)(student, teacher, **hyper)


def split(hyper):
  """Hyper-parameters that are traced, and those that are not."""
  static = {k: v for k, v in hyper.items() if isinstance(v, int)}
  return {k: np.asarray(v) for k, v in hyper.items() if k not in static}, static


@functools.cache
def compiled(name):
  """Values, and their gradients by student, teacher and traced hyper-parameters."""
  static = split(FORMULAS[name][1])[1]
  return with_gradients(lambda s, t, h: call(name, s, t, {**h, **static}))


def run(name, student, teacher, **hyper):
  hyper = split({**FORMULAS[name][1], **hyper})[0]
  return compiled(name)(as_float(student), as_float(teacher), as_float(hyper))


# --- Values. ---


def test_every_public_loss_is_here():
  assert sorted([*FORMULAS, "overhaul_margin"]) == sorted(family.__all__)
  assert set(family.__all__) <= set(losses.__all__)


@pytest.mark.device
@NAMES
def test_value_is_the_formula(name):
  reference, hyper, shapes = FORMULAS[name]
  student, teacher = features(name, 0)
  got, gradients = run(name, student, teacher)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, reference(student, teacher, **hyper), **TOLERANCE)
  # By the teacher too, but where only its signs count.
  for gradient in jax.tree.leaves(gradients[: 1 if name == "activation_boundary" else 3]):
    assert np.abs(gradient).max() > 1e-6
  values = jit(lambda s, t: call(name, s, t, hyper))
  for case in range(1, len(shapes)):
    student, teacher = features(name, 10 * case, case)
    got, expected = (
      values(as_float(student), as_float(teacher)),
      reference(student, teacher, **hyper),
    )
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, **TOLERANCE)


@NAMES
def test_float64_stays_and_gradient_is_the_derivative_of_the_formula(name):
  reference, hyper, _ = FORMULAS[name]
  traced, static = split(hyper)
  check_derivative(
    lambda s, t, h: call(name, s, t, {**h, **static}),
    lambda s, t, h: reference(s, t, **h, **static),
    *features(name, 2),
    traced,
  )


@pytest.mark.parametrize(
  "name", [name for name in FORMULAS if name not in ("activation_boundary", "hint_normalized")]
)
def test_agreement_is_a_minimum(name):
  shape = FORMULAS[name][2][0][0]
  student = normal(4, shape)
  values, gradients = run(name, student, student)
  least = 0.0
  if name == "variational_information":
    least = 0.5 * np.log(np.log1p(np.exp(RAW_VARIANCE)) + 1e-5).mean()
  # Differences of equal numbers, but for NST's and the cosine's roundings.
  np.testing.assert_allclose(values, least, rtol=1e-5, atol=1e-6)
  if name != "factor_transfer":  # a kink is there, and roundings choose its side
    for gradient in jax.tree.leaves(gradients[0]):
      np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_activation_boundary_asks_for_the_side_and_the_margin():
  teacher = normal(5, SAME)
  values, gradients = run("activation_boundary", np.where(teacher > 0, 0.71, -0.71), teacher)
  assert not np.any(values)
  assert not np.any(gradients[0])
  values, _ = run("activation_boundary", np.where(teacher > 0, -0.3, 0.3), teacher)
  np.testing.assert_allclose(values, H * W * C * 1.0, rtol=1e-5)


def test_overhaul_margin_is_the_mean_of_what_is_off():
  def mean_when_off(scale, bias):
    off = 0.5 * math.erfc(bias / abs(scale) / math.sqrt(2))
    return bias - abs(scale) * math.exp(-0.5 * (bias / scale) ** 2) / math.sqrt(2 * math.pi) / off

  usual = [(1.0, 0.2), (-0.5, -0.4), (2.0, 1.0), (0.3, 0.5), (1.0, 3.08), (1e4, -1e4), (1e4, 1e4)]
  # Φ(−3.08) = 0.00104 is above 1e-3, Φ(−3.10) = 0.00097 below; the rest hardly vary at all.
  ends = {(1.0, 3.10): -3, (-2.0, 100.0): -6, (0.0, 1.0): 0, (0.0, -2.0): -2, (1e-30, -3.0): -3}
  ends |= {(1e-4, -1e4): -1e4, (0.0, 0.0): 0}
  scale, bias = np.array([*usual, *ends]).T
  function = jit(
    lambda s, b: (losses.overhaul_margin(s, b), jax.jacobian(losses.overhaul_margin, (0, 1))(s, b))
  )
  got, slopes = function(as_float(scale), as_float(bias))
  assert_finite(slopes)
  expected = [mean_when_off(*each) for each in usual] + list(ends.values())
  np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-11)
  draws = np.random.default_rng(0).normal(size=400_000) * 2.0 + 1.0
  # The standard error of a mean of 1e5 draws with a spread of 0.9 is 0.003.
  np.testing.assert_allclose(got[2], draws[draws < 0].mean(), atol=0.015)


# --- Pooling. ---


@pytest.mark.parametrize("size", [(5, 3), (6, 10), (1, 1), (10, 7)])
def test_pooling_is_adaptive(size):
  x = normal(6, (2, 8, 10, 3)) if size != (10, 7) else normal(6, (2, 10, 9, 3))
  got = average_pool(jnp.asarray(as_float(x)), *size)
  np.testing.assert_allclose(got, pool(x, *size), rtol=1e-5, atol=1e-6)


def test_pooling_windows_as_documented_by_hand():
  # 5 to 3: windows [0, 2), [1, 4), [3, 5); 3 to 4, as a level of HCL may ask of a narrow map.
  x = jnp.arange(5.0).reshape(1, 5, 1, 1)
  assert average_pool(x, 3, 1).ravel().tolist() == [0.5, 2.0, 3.5]
  assert average_pool(x[:, :3], 4, 1).ravel().tolist() == [0.0, 0.5, 1.5, 2.0]


def test_hierarchical_context_skips_levels_and_halves_at_those_used():
  # Each level's weight shows in a difference that is constant over the image (1 at every level),
  # and in one whose average is 0 (nothing below full size).
  waves = np.ones((1, 8, 8, 1)) * (-1.0) ** np.arange(8).reshape(1, 8, 1, 1)
  function = jit(losses.hierarchical_context)
  for size, share in ((8, 1 / 1.875), (4, 1 / 1.75), (2, 1 / 1.5), (1, 1.0)):
    both = jnp.concatenate([jnp.ones((1, size, size, 1)), as_float(waves[:, :size, :size])])
    got = function(both, jnp.zeros_like(both))
    np.testing.assert_allclose(got, [1.0, share], rtol=1e-6)


# --- The contract: transformations, dtypes, extremes, masks. ---


@NAMES
def test_order_does_not_matter(name):
  student, teacher = features(name, 20)
  values, _ = run(name, student, teacher)
  order = np.array([2, 0, 1])
  moved, _ = run(name, *jax.tree.map(lambda x: x[order], (student, teacher)))
  np.testing.assert_allclose(moved, values[order], rtol=1e-6, atol=1e-7)


@NAMES
def test_halves_are_computed_in_float32_and_vmap_is_the_batch(name, strict_promotion):
  student, teacher = features(name, 30)
  student, teacher = as_float(student, jnp.bfloat16), as_float(teacher, jnp.float16)
  hyper = FORMULAS[name][1]
  single = jit(jax.vmap(lambda s, t: call(name, s, t, hyper)))
  got = single(*jax.tree.map(lambda x: x[:, None], (student, teacher)))
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(
    np.asarray(got)[:, 0], run(name, student, teacher)[0], rtol=1e-5, atol=1e-6
  )


def extremes(shape, scale_free):
  """Features at their ends: dead, constant, one spike, alternating, tiny, one dead channel."""
  zeros = np.zeros(shape)
  spike, alternating, dead = zeros.copy(), zeros + 1e4, normal(7, shape)
  spike.reshape(len(spike), -1)[:, 0] = 1e4
  alternating.reshape(-1)[::2] *= -1
  dead[..., 0] = 0
  ends = [zeros, zeros + 1e4, zeros - 1e4, spike, alternating, dead]
  ends += [zeros + 1e-20, dead * 1e-12, dead * 1e-6]
  return ends + [dead * 1e30, zeros + 3e38] * scale_free


@pytest.mark.device
@NAMES
def test_extremes_are_finite(name):
  shapes = FORMULAS[name][2][0]
  scale_free = name in SCALE_FREE
  if name == "flow_of_solution":
    sides = [list(zip(*(extremes(s, False) for s in side), strict=True)) for side in shapes]
  else:
    sides = [extremes(shape, scale_free) for shape in shapes]
  for (i, student), (j, teacher) in itertools.product(*map(enumerate, sides)):
    assert_finite(run(name, student, teacher), f"student {i}, teacher {j}: ")


@pytest.mark.parametrize("name", SCALE_FREE)
def test_no_scale_is_too_large(name):
  student, teacher = features(name, 40)
  values, _ = run(name, student, teacher)
  np.testing.assert_allclose(run(name, student * 1e25, teacher * 1e11)[0], values, **TOLERANCE)


def test_extreme_variances_are_finite():
  student, teacher = features("variational_information", 50)
  for raw in (-1e4, 0.0, 1e4):
    got = run("variational_information", student, teacher, raw_variance=np.full(C, raw))
    assert_finite(got)


def test_attention_is_that_of_the_published_code_at_tiny_maps():
  student, teacher = 1e-8 * np.ones(SAME), np.zeros(WIDER)
  values, _ = run("attention_transfer", student, teacher)
  np.testing.assert_allclose(values, (1e-16 / 1e-12) ** 2, rtol=1e-4)


def test_positions_that_are_not_valid_take_no_part():
  student, teacher = features("attention_relation", 60)
  where = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0]])
  filled = (
    as_float(np.where(where[..., None], student, np.nan)),
    as_float(np.where(where[..., None], teacher, np.inf)),
  )

  def masked(s, t, w):
    values = losses.attention_relation(s, t, num_heads=2, where=w)
    return jnp.sum(values), values

  both = jit(jax.value_and_grad(masked, argnums=(0, 1), has_aux=True))
  (_, values), gradients = both(*filled, where)
  kept = np.flatnonzero(where[0])
  expected = ref_relation(student[:1, kept], teacher[:1, kept], 2)[0]
  np.testing.assert_allclose(values[0, kept], expected, **TOLERANCE)
  assert not np.any(np.asarray(values)[where == 0])
  np.testing.assert_allclose(values[2], 0, atol=1e-7)
  assert_finite(gradients)
  assert not np.any(np.asarray(gradients[0])[where == 0])


def test_channel_wise_leaves_positions_out():
  student, teacher = features("channel_wise", 61)
  where = np.ones(SAME[:3])
  where[0, 1:], where[1] = 0, 0

  def total(s, t):
    values = losses.channel_wise(s, t, temperature=1.5, where=where)
    return jnp.sum(values), values

  both = jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
  out = where[..., None] == 0
  (_, values), gradients = both(
    as_float(np.where(out, np.nan, student)), as_float(np.where(out, np.inf, teacher))
  )
  expected = [
    ref_cwd(student[:1, :1], teacher[:1, :1], 1.5)[0],
    0.0,
    ref_cwd(student[2:], teacher[2:], 1.5)[0],
  ]
  np.testing.assert_allclose(values, expected, **TOLERANCE)
  assert_finite(gradients)
  assert not np.any(np.asarray(gradients[0])[np.broadcast_to(out, SAME)])


def test_channel_wise_does_not_see_how_strong_a_channel_is():
  student, teacher = features("channel_wise", 62)
  values, _ = run("channel_wise", student, teacher)
  shifted, _ = run("channel_wise", student + 5, teacher - np.arange(C) * 3)
  np.testing.assert_allclose(shifted, values, rtol=1e-4)  # float32 differences of sixes
  with pytest.raises(ValueError, match=r"meet at \(3, 1, 1, 4\), one position"):
    losses.channel_wise(jnp.zeros((3, 1, 1, C)), jnp.zeros(SAME))


def test_class_attention_of_normalised_maps_is_scale_free():
  student, teacher = features("class_attention", 63)
  call = jit(lambda s, t: losses.class_attention(s, t, size=2, normalize=True))
  values = call(as_float(student), as_float(teacher))
  np.testing.assert_allclose(values, ref_cat(student, teacher, 2, True), **TOLERANCE)
  np.testing.assert_allclose(call(as_float(student * 1e25), as_float(teacher)), values, rtol=1e-5)
  with pytest.raises(ValueError, match="size=0 must be at least 1"):
    losses.class_attention(jnp.zeros(SAME), jnp.zeros(SAME), size=0)


def test_a_normalised_hint_is_least_at_the_z_scores_whatever_the_scale():
  _, teacher = features("hint_normalized", 64)
  z = (teacher - teacher.mean(-1, keepdims=True)) / np.sqrt(teacher.var(-1, keepdims=True) + 1e-5)
  values, gradients = run("hint_normalized", z, teacher)
  np.testing.assert_allclose(values, 0, atol=1e-6)
  np.testing.assert_allclose(gradients[0], 0, atol=1e-6)
  # Without the 1e-5, which no variance of 1e14 or more feels.
  far, _ = run("hint_normalized", z, 3e12 * teacher + 4)
  np.testing.assert_allclose(far, 0, atol=1e-5)
  with pytest.raises(ValueError, match="pool the maps first"):
    losses.hint_normalized(jnp.zeros(SAME), jnp.zeros(SAME))


def test_structure_takes_maps_as_they_are_with_windows_of_one():
  student, teacher = features("pairwise_structure", 65)
  values = losses.pairwise_structure(as_float(student), as_float(teacher), window=1)
  np.testing.assert_allclose(values, ref_structure(student, teacher, 1), **TOLERANCE)
  with pytest.raises(ValueError, match="window=6 leaves one position"):
    losses.pairwise_structure(jnp.zeros(SAME), jnp.zeros(SAME), window=6)
  with pytest.raises(ValueError, match="window=0 must be at least 1"):
    losses.pairwise_structure(jnp.zeros(SAME), jnp.zeros(SAME), window=0)


def test_selectivity_is_about_where_channels_fire_not_which():
  teacher = normal(8, WIDER)
  twice = np.concatenate([teacher, teacher[..., :1]], -1)  # the first channel counts twice as much
  values, _ = run("neuron_selectivity", twice, teacher)
  np.testing.assert_allclose(values, ref_nst(twice, teacher), **TOLERANCE)
  student = normal(9, SAME)
  shuffled, _ = run("neuron_selectivity", student[..., [3, 1, 0, 2]], teacher[..., [2, 0, 1]])
  np.testing.assert_allclose(shuffled, ref_nst(student, teacher), **TOLERANCE)


def test_neuron_selectivity_never_builds_the_broadcast():
  maps = jax.ShapeDtypeStruct((64, 32, 32, 64), jnp.float32)
  function = jax.value_and_grad(lambda s, t: jnp.sum(losses.neuron_selectivity(s, t)), (0, 1))
  held = jax.jit(function).lower(maps, maps).compile().memory_analysis().temp_size_in_bytes
  assert held < 4 * 64 * 64 * 64 * 1024 / 5


# --- Errors. ---

WIDTHS = [
  "hint_l2",
  "hint_cosine",
  "activation_boundary",
  "overhaul",
  "hierarchical_context",
  "variational_information",
  "inter_channel_correlation",
  "channel_wise",
  "class_attention",
]


@pytest.mark.parametrize("name", WIDTHS)
def test_widths_that_differ_are_named(name):
  message = r"\(3, 4, 6, 4\).*\(3, 2, 3, 5\).*use a projector"
  with pytest.raises(ValueError, match=message):
    call(name, jnp.zeros(SAME), jnp.zeros((3, 2, 3, 5)), FORMULAS[name][1])


def test_other_shapes_that_do_not_meet_are_named():
  maps, vectors = jnp.zeros((2, 4, 4, 3)), jnp.zeros((2, 3))
  with pytest.raises(ValueError, match=r"student \(2, 4, 4, 3\) and teacher \(2, 3\) must both be"):
    losses.hint_l2(maps, vectors)
  with pytest.raises(ValueError, match=r"\(2, 4, 3\) and teacher \(2, 5, 3\) .*same positions"):
    losses.hint_cosine(jnp.zeros((2, 4, 3)), jnp.zeros((2, 5, 3)))
  with pytest.raises(ValueError, match=r"student_pair\[1\] \(2, 4, 4, 3\) .*use a projector"):
    losses.flow_of_solution((maps, maps), (maps, maps[..., :2]))
  with pytest.raises(ValueError, match=r"teacher_pair must be \(lower map, upper map\), got 3"):
    losses.flow_of_solution((maps, maps), (maps, maps, maps))
  with pytest.raises(ValueError, match=r"margin \(2,\) differ in width"):
    losses.overhaul(maps, maps, margin=jnp.zeros(2))
  with pytest.raises(ValueError, match=r"raw_variance \(2,\) differ in width"):
    losses.variational_information(maps, maps, raw_variance=jnp.zeros(2))


@pytest.mark.parametrize(("heads", "name"), [(4, "teacher"), (3, "student"), (0, "student")])
def test_heads_that_divide_no_width_are_named(heads, name):
  with pytest.raises(ValueError, match=f"num_heads must divide the width of {name} .*got {heads}"):
    losses.attention_relation(jnp.zeros((1, 2, 4)), jnp.zeros((1, 2, 6)), num_heads=heads)
