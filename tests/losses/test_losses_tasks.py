"""Losses of other tasks (labels on or off, numbers, scores of pairs), of views and of no teacher.

Each against float64 NumPy written from its formula, with the loss contract.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses
from jaxdistill.losses import binary, prototypes, ranking, regression, self_distillation, views
from loss_contract import TOLERANCE, assert_finite, check_derivative, n, with_gradients
from test_losses_logits import kl, onehot, random_logits, softmax

SHAPE = (3, 2, 4)
LABELS = np.arange(6).reshape(3, 2) * 5 % 4
ON = (random_logits(7, SHAPE) > 0).astype(float)
MEANS = random_logits(8, (4, 4))


def sigmoid(z):
  return 1 / (1 + np.exp(-z))


def ref_bce(z, y):
  return -(y * np.log(sigmoid(z)) + (1 - y) * np.log(sigmoid(-z))).sum(-1)


def ref_focal(z, y, focus, positive_share):
  p = sigmoid(z)
  on = positive_share * y * (1 - p) ** focus * np.log(p)
  off = (1 - positive_share) * (1 - y) * p**focus * np.log(1 - p)
  return -(on + off).sum(-1)


def ref_binary_kl(s, t, temperature):
  pairs = [np.stack([sigmoid(z / temperature), sigmoid(-z / temperature)], -1) for z in (t, s)]
  return temperature**2 * kl(*pairs).sum(-1)


def ref_huber(s, y, delta):
  e = np.abs(s - y)
  return np.where(e <= delta, e**2 / 2, delta * (e - delta / 2)).mean(-1)


def ref_bounded(s, t, y, margin):
  ours, theirs = ((x - y) ** 2 for x in (s, t))
  return np.where(ours.sum(-1) + margin > theirs.sum(-1), ours.sum(-1), 0)


def gaussian(x, floor):
  mean, log_variance = np.split(x, 2, axis=-1)
  return mean, floor + np.exp(log_variance)


def ref_nll(s, y, floor):
  mean, variance = gaussian(s, floor)
  return ((mean - y) ** 2 / variance + np.log(variance)).mean(-1) / 2


def ref_gaussian_kl(s, t, floor):
  (m, v), (k, w) = gaussian(s, floor), gaussian(t, floor)
  return ((np.log(v / w) + (w + (m - k) ** 2) / v - 1) / 2).mean(-1)


def ref_margin(s, t):
  return (((s[..., :1] - s[..., 1:]) - (t[..., :1] - t[..., 1:])) ** 2).mean(-1)


def ref_affinity(a, b, c, d, student_temperature, teacher_temperature):
  ours, theirs = n(a) @ n(b).T / student_temperature, n(c) @ n(d).T / teacher_temperature
  return (kl(softmax(theirs), softmax(ours)) + kl(softmax(theirs.T), softmax(ours.T))) / 2


def ref_virtual(z, y, correct, temperature):
  y = onehot(y, z.shape[-1])
  u = correct * y + (1 - correct) / (z.shape[-1] - 1) * (1 - y)
  return kl(softmax(u, temperature), softmax(z))


def ref_self_target(z, y, fixed=None):
  """With P of other logits where they are given: to a difference quotient it is a constant."""
  q, known = (
    (softmax(x) * onehot(y, z.shape[-1])).sum(-1) for x in (z, z if fixed is None else fixed)
  )
  return -(1 + known**2 - (known**2).mean()) * np.log(q)


def ref_self_nontarget(z, w, y):
  y = onehot(y, z.shape[-1]).astype(bool)
  q, p = softmax(z), softmax(w)
  order = sum(x / (1 - x[y].reshape(y.shape[:-1])[..., None] + 1e-6) for x in (q, p))
  rank = 1 + np.argsort(np.argsort(-order, axis=-1, kind="stable"), axis=-1)
  zipf = np.where(y, 0, 1 / rank)
  zipf /= zipf.sum(-1, keepdims=True)
  q = np.where(y, 1, q / (1 - q[y].reshape(y.shape[:-1])[..., None]))
  return -(zipf * np.log(q)).sum(-1)


def ref_direction(s, t, y, means):
  longest = np.maximum(np.linalg.norm(s, axis=-1), np.linalg.norm(t, axis=-1))
  return 1 - (s * n(means)[y]).sum(-1) / longest


def ref_regions(s, t, y, temperature):
  values = temperature**2 * kl(softmax(t, temperature), softmax(s, temperature))
  right = t.argmax(-1) == y[..., None]
  return (values * np.where(right == right[..., :1], 1, 2)).mean(-1)


def ref_views(
  a, b, c, d, temperature, weak_threshold, strong_threshold, within_weight, cross_weight
):
  def apart(s, t):
    return temperature**2 * kl(softmax(t, temperature), softmax(s, temperature))

  weak, strong = softmax(c).max(-1) >= weak_threshold, softmax(d).max(-1) >= strong_threshold
  within, across = apart(a, c) + apart(b, d), apart(b, c) + apart(a, d)
  return within_weight * weak * within + cross_weight * strong * across


Z, T, W = (random_logits(seed, SHAPE) for seed in (1, 2, 3))
TOWERS = tuple(random_logits(seed, (5, 3)) for seed in (11, 12, 13, 14))
# name: (arguments with a gradient, those without, defaults, other hyper-parameters, reference)
FORMULAS = {
  "binary_cross_entropy": ((Z, ON), (), {}, {}, ref_bce),
  "binary_focal": (
    (Z, ON),
    (),
    {"focus": 2.0, "positive_share": 0.25},
    {"focus": 0.5, "positive_share": 0.6},
    ref_focal,
  ),
  "binary_soft_target_kl": ((Z, T), (), {"temperature": 1.0}, {"temperature": 2.5}, ref_binary_kl),
  "huber": ((Z, T), (), {"delta": 1.0}, {"delta": 2.5}, ref_huber),
  "teacher_bounded": ((Z, T, W), (), {"margin": 0.0}, {"margin": 3.0}, ref_bounded),
  "gaussian_nll": ((Z, T[..., :2]), (), {"floor": 1e-6}, {"floor": 0.5}, ref_nll),
  "gaussian_kl": ((Z, T), (), {"floor": 1e-6}, {"floor": 0.5}, ref_gaussian_kl),
  "margin_mse": ((Z, T), (), {}, {}, ref_margin),
  "affinity": (
    TOWERS,
    (),
    {"student_temperature": 0.07, "teacher_temperature": 0.01},
    {"student_temperature": 0.5, "teacher_temperature": 1.5},
    ref_affinity,
  ),
  "virtual_teacher": (
    (Z,),
    (LABELS,),
    {"correct": 0.99, "temperature": 20.0},
    {"correct": 0.7, "temperature": 0.5},
    ref_virtual,
  ),
  "consistency": ((Z, T), (), {}, {}, lambda s, t: ((softmax(s) - softmax(t)) ** 2).mean(-1)),
  "self_target": ((Z,), (LABELS,), {}, {}, ref_self_target),
  "self_nontarget": ((Z, W), (LABELS,), {}, {}, ref_self_nontarget),
  "scale_decoupled_kd": (
    (Z, T),
    (LABELS[:, 0],),
    {"temperature": 4.0},
    {"temperature": 1.5},
    ref_regions,
  ),
  "cross_view_kd": (
    (Z, T, W, random_logits(4, SHAPE)),
    (),
    {
      "temperature": 4.0,
      "weak_threshold": 0.9,
      "strong_threshold": 0.2,
      "within_weight": 2.0,
      "cross_weight": 0.5,
    },
    {
      "temperature": 1.5,
      "weak_threshold": 0.7,
      "strong_threshold": 0.8,
      "within_weight": 0.5,
      "cross_weight": 3.0,
    },
    ref_views,
  ),
  "norm_and_direction": ((Z, T), (LABELS, MEANS), {}, {}, ref_direction),
}
NAMES = pytest.mark.parametrize("name", FORMULAS)
ROOMS = (binary, prototypes, ranking, regression, self_distillation, views)
MASKED = ("binary_cross_entropy", "binary_focal", "binary_soft_target_kl")


def of_first(name, first, *rest, **hyper):
  """Values, and the gradient by the first argument."""
  return with_gradients(lambda x: getattr(losses, name)(x, *rest, **hyper), (0,))(first)


def values(name, *arguments, **hyper):
  return np.asarray(getattr(losses, name)(*map(jnp.asarray, arguments), **hyper))


def test_every_public_loss_is_here():
  assert sorted([*FORMULAS, "class_means", "region_logits", "region_weight"]) == sorted(
    name for room in ROOMS for name in room.__all__
  )


@NAMES
def test_value_is_the_formula_and_the_defaults_the_published_ones(name):
  given, rest, defaults, others, reference = FORMULAS[name]
  parameters = inspect.signature(getattr(losses, name)).parameters.values()
  keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
  keywords.pop("where", None)
  assert keywords == defaults
  for hyper in (defaults, others):
    single = [np.float32(x) for x in given]
    got = values(name, *single, *rest, **hyper)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, reference(*given, *rest, **hyper), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in FORMULAS if name != "self_target"])
def test_float64_stays_and_gradient_is_the_derivative(name):
  given, rest, _, hyper, reference = FORMULAS[name]
  check_derivative(
    lambda h, *x: getattr(losses, name)(*x, *rest, **h),
    lambda h, *x: reference(*x, *rest, **h),
    jax.tree.map(np.float64, hyper),
    *given,
  )


def test_a_soft_label_of_ones_own_is_a_constant_to_its_gradient():
  check_derivative(
    lambda z: losses.self_target(z, LABELS), lambda z: ref_self_target(z, LABELS, fixed=Z), Z
  )


@NAMES
def test_half_precision_is_computed_in_float32(name, strict_promotion):
  given, rest, _, hyper, reference = FORMULAS[name]
  half = [jnp.asarray(x, jnp.bfloat16) for x in given]
  got = values(name, *half, *rest, **hyper)
  assert got.dtype == np.float32
  expected = reference(*(np.float64(x) for x in half), *rest, **hyper)
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@NAMES
@pytest.mark.slow
def test_extremes_are_finite(name):
  given, rest, defaults, others, _ = FORMULAS[name]
  wild = [np.zeros_like, lambda x: 1e4 * np.sign(x), lambda x: 1e4 * x]
  function = getattr(losses, name)
  for hyper in (defaults, others):
    run = with_gradients(
      lambda *x, hyper=hyper: function(*x, *rest, **hyper), argnums=range(len(given))
    )
    for one in wild:
      for other in wild:
        assert_finite(run(*(np.float32((one, other)[i % 2](x)) for i, x in enumerate(given))))


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("size", [3e38, 1e30])
def test_the_largest_logits_of_labels_are_finite(name, size):
  z = np.float32(size * np.sign(Z))
  other = z[::-1] if name == "binary_soft_target_kl" else np.float32(ON)
  run = with_gradients(getattr(losses, name), argnums=(0,))
  assert_finite(run(z, other))


@pytest.mark.parametrize("name", MASKED)
def test_a_label_that_is_not_known_is_as_if_dropped(name):
  (z, other), _, defaults, _, reference = FORMULAS[name]
  z, other = np.float32(z), np.float32(other)
  where = np.ones(SHAPE)
  where[..., 1] = where[0, 1] = 0
  kept = [0, 2, 3]
  expected = reference(np.float64(z[..., kept]), np.float64(other[..., kept]), **defaults)
  expected[0, 1] = 0
  z[where == 0], other[where == 0] = np.nan, np.inf
  function = getattr(losses, name)
  got, gradients = with_gradients(lambda s, t: function(s, t, where=where), (0,))(z, other)
  np.testing.assert_allclose(got, expected, **TOLERANCE)
  assert_finite(gradients)
  assert not np.any(gradients[0][where == 0])
  assert np.all(gradients[0][where == 1])


@pytest.mark.parametrize("name", ["affinity", "self_target"])
def test_an_excluded_example_is_as_if_dropped(name):
  given, rest, _, hyper, reference = FORMULAS[name]
  given = [np.float32(x.reshape(-1, x.shape[-1])) for x in given]
  rest = [x.reshape(-1) for x in rest]
  where = np.ones(len(given[0]))
  where[[1, 4]] = 0
  kept = where == 1
  expected = reference(*(np.float64(x[kept]) for x in given), *(x[kept] for x in rest), **hyper)
  for x in given:
    x[~kept] = [[np.nan], [np.inf]]
  function = getattr(losses, name)
  run = with_gradients(
    lambda *x: function(*x, *rest, **hyper, where=where), argnums=range(len(given))
  )
  got, gradients = run(*given)
  np.testing.assert_allclose(got[kept], expected, rtol=1e-4, atol=1e-5)
  assert not np.any(got[~kept])
  assert_finite(gradients)
  for gradient in gradients:
    assert not np.any(gradient[~kept])
    assert np.all(np.any(gradient[kept], axis=-1))
  nobody = function(*map(jnp.asarray, given), *rest, **hyper, where=np.zeros_like(where))
  assert not np.any(nobody)


def test_two_towers_of_one_example_say_nothing_and_equal_ones_agree():
  one = [np.float32(x[:1]) for x in TOWERS]
  np.testing.assert_allclose(values("affinity", *one), 0, atol=1e-6)
  a, b, *_ = map(np.float32, TOWERS)
  # Of any scale and width: a tower of zeros beside it changes no product.
  wide = [np.concatenate([3 * x, np.zeros_like(x)], -1) for x in (a, b)]
  got = values("affinity", a, b, *wide, student_temperature=0.2, teacher_temperature=0.2)
  np.testing.assert_allclose(got, 0, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_label_that_is_on_or_off_is_a_softmax_of_two(temperature):
  pairs = [np.stack([z, np.zeros_like(z)], -1) for z in (Z, T)]
  expected = losses.soft_target_kl(*map(jnp.float32, pairs), temperature=temperature).sum(-1)
  got = values("binary_soft_target_kl", np.float32(Z), np.float32(T), temperature=temperature)
  np.testing.assert_allclose(got, expected, **TOLERANCE)
  hard = losses.cross_entropy(jnp.float32(pairs[0]), 1 - ON.astype(int)).sum(-1)
  np.testing.assert_allclose(values("binary_cross_entropy", np.float32(Z), ON), hard, **TOLERANCE)
  plain = {"focus": 0.0, "positive_share": 0.5}
  got = values("binary_focal", np.float32(Z), ON, **plain)
  np.testing.assert_allclose(got, hard / 2, **TOLERANCE)
  assert np.all(values("binary_focal", np.float32(Z), ON, focus=4.0, positive_share=0.5) < got)


def test_agreement_is_zero_and_soft_labels_are_between():
  z = np.float32(Z)
  for name in ("binary_soft_target_kl", "gaussian_kl", "margin_mse", "huber"):
    np.testing.assert_array_equal(values(name, z, z), 0)
  # Between 0 and 1 a label's cross-entropy is least where the probability is the label.
  gradient = jax.grad(lambda s: losses.binary_cross_entropy(s, sigmoid(Z)).sum())(z)
  np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_gaussians_of_one_variance_are_half_a_squared_error():
  same = [np.concatenate([x[..., :2], np.zeros_like(x[..., 2:])], -1) for x in (Z, T)]
  expected = losses.logit_l2(*(jnp.float32(x[..., :2]) for x in (Z, T))) / 2
  got = values("gaussian_kl", *map(np.float32, same))
  np.testing.assert_allclose(got, expected, rtol=1e-5)
  got = values("gaussian_nll", np.float32(same[0]), np.float32(T[..., :2]))
  np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_a_teacher_that_is_sure_of_its_number_is_finite():
  sure = np.float32(np.concatenate([T[..., :2], np.full((3, 2, 2), -np.inf)], -1))
  run = with_gradients(losses.gaussian_kl, argnums=(0,))
  got = run(np.float32(Z), sure)
  assert_finite(got)
  floored = np.where(np.isinf(sure), np.log(1e-6), sure)
  expected = ref_gaussian_kl(Z, np.float64(floored), 0.0)
  # Twice the floor would be log 2 / 2 away.
  np.testing.assert_allclose(got[0], expected, rtol=1e-3)


def test_scores_may_be_shifted_by_query():
  shift = np.arange(6.0).reshape(3, 2, 1)
  got = values("margin_mse", np.float32(Z + 7 * shift), np.float32(T - shift))
  np.testing.assert_allclose(got, ref_margin(Z, T), rtol=1e-4)
  assert not np.allclose(values("margin_mse", np.float32(2 * Z), np.float32(T)), got)


def test_a_student_that_is_better_by_the_margin_is_left_alone():
  student, teacher, y = np.float32([[1.0], [1.0], [3.0]]), np.float32([[2.0]] * 3), np.zeros((3, 1))
  run = with_gradients(lambda s, t: losses.teacher_bounded(s, t, y, margin=4.0), argnums=(0, 1))
  got, (by_student, by_teacher) = run(student, teacher)
  assert got.tolist() == [1, 1, 9]  # 1 + 4 > 4
  assert not np.any(by_teacher)
  got = values("teacher_bounded", student, teacher, y, margin=0.0)
  assert got.tolist() == [0, 0, 9]
  assert np.all(by_student)


def test_zipf_of_two_classes_is_nothing_and_the_weak_logits_rank_only():
  z = np.float32(random_logits(5, (6, 2)))
  labels = np.array([0, 1, 0, 1, 0, 1])
  run = with_gradients(lambda s, w: losses.self_nontarget(s, w, labels), argnums=(0, 1))
  got, gradients = run(z, z[::-1])
  assert not np.any(got)
  assert not np.any(gradients[0])
  rank = with_gradients(lambda s, w: losses.self_nontarget(s, w, LABELS), argnums=(0, 1))
  _, (by_student, by_weak) = rank(np.float32(Z), np.float32(W))
  assert np.all(np.abs(by_student).max(-1) > 1e-6)
  assert not np.any(by_weak)


@pytest.mark.parametrize("label", [-1, 4, -100])
def test_a_label_of_no_class_is_finite(label):
  labels = np.full_like(LABELS, label)
  z, t = np.float32(Z), np.float32(T)
  for name in ("self_target", "norm_and_direction"):
    rest = () if name == "self_target" else (t, np.float32(MEANS))
    got, gradients = of_first(name, z, *rest[:1], labels, *rest[1:])
    assert not np.any(got)
    assert not np.any(gradients[0])
  assert_finite(values("self_nontarget", z, t, labels))
  uniform = kl(np.full(SHAPE, 0.25), softmax(Z))
  np.testing.assert_allclose(values("virtual_teacher", z, labels), uniform, rtol=1e-4)


def test_a_designed_teacher_is_nearly_uniform_smoothing():
  z = np.float32(random_logits(6, (2, 100)))
  labels = np.array([3, 90])
  got, gradients = with_gradients(lambda s: losses.virtual_teacher(s, labels), (0,))(z)
  share = np.exp(0.99 / 20) / (np.exp(0.99 / 20) + 99 * np.exp(0.01 / 99 / 20))
  assert round(share, 4) == 0.0105
  smoothed = losses.cross_entropy(
    jnp.asarray(z), labels, label_smoothing=1 - (share - (1 - share) / 99)
  )
  entropy = -(share * np.log(share) + (1 - share) * np.log((1 - share) / 99))
  np.testing.assert_allclose(got, smoothed - entropy, rtol=1e-3)
  assert_finite(gradients)


def test_direction_pushes_length_up_to_the_teachers():
  means, labels = np.float32([[1, 0]]), np.zeros(2, int)
  student, teacher = np.float32([[1, 1], [4, 4]]), np.float32([[2, 0], [2, 0]])
  run = with_gradients(lambda s: losses.norm_and_direction(s, teacher, labels, means), (0,))
  got, (gradient,) = run(student)
  np.testing.assert_allclose(got, [0.5, 1 - 0.5**0.5], rtol=1e-6)
  along = (gradient * student).sum(-1)
  assert abs(along[0]) > 0.1  # shorter than the teacher: longer is better
  np.testing.assert_allclose(along[1], 0, atol=1e-6)  # a cosine
  nothing = np.zeros((2, 2), np.float32)
  zero = with_gradients(lambda s, t: losses.norm_and_direction(s, t, labels, means), (0, 1))
  got, gradients = zero(nothing, nothing)
  assert got.tolist() == [1, 1]
  assert_finite(gradients)


@pytest.mark.parametrize(("size", "scales"), [((4, 4), (1, 2)), ((5, 3), (1, 2, 4))])
def test_regions_are_means_of_a_map_and_the_first_is_the_whole(size, scales):
  x = random_logits(5, (2, *size, 3))
  got = np.asarray(losses.region_logits(jnp.asarray(x, jnp.float32), scales=scales))
  windows = [
    [(i * length // n, -(-(i + 1) * length // n)) for i in range(n)]
    for n in scales
    for length in size
  ]
  expected = [
    x[:, top:bottom, left:right].mean((1, 2))
    for rows, columns in zip(windows[::2], windows[1::2], strict=True)
    for top, bottom in rows
    for left, right in columns
  ]
  np.testing.assert_allclose(got, np.stack(expected, 1), **TOLERANCE)
  np.testing.assert_allclose(got[:, 0], x.mean((1, 2)), **TOLERANCE)
  for wrong in ((2, 1), ()):
    with pytest.raises(ValueError, match="must begin with 1"):
      losses.region_logits(jnp.asarray(x), scales=wrong)


def test_a_region_counts_twice_where_it_and_the_whole_differ_in_being_right():
  right, wrong, other = [3.0, 0, 0], [0, 3.0, 0], [0, 0, 3.0]
  regions = np.float32([[right, right, wrong], [wrong, right, other]])
  got = losses.region_weight(jnp.asarray(regions), np.array([0, 0]))
  assert got.tolist() == [[1, 1, 2], [1, 2, 1]]


def test_a_teacher_that_is_not_sure_teaches_neither_view():
  given = [np.float32(x) for x in FORMULAS["cross_view_kd"][0]]
  nobody = {"weak_threshold": 1.1, "strong_threshold": 1.1}
  assert not np.any(values("cross_view_kd", *given, **nobody))
  # Of equal views what is within is what is across.
  one, teacher = given[0], given[2]
  everybody = {"weak_threshold": 0.0, "strong_threshold": 0.0}
  got = values("cross_view_kd", one, one, teacher, teacher, **everybody)
  expected = 5 * losses.soft_target_kl(jnp.asarray(one), jnp.asarray(teacher))
  np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_class_means_are_means():
  features, labels = random_logits(9, (20, 3)), np.arange(20) % 3
  labels[:2] = -1, 7
  got = losses.class_means(jnp.asarray(features, jnp.bfloat16), labels, 5)
  rounded = np.asarray(jnp.asarray(features, jnp.bfloat16), np.float64)
  expected = [rounded[labels == k].mean(0) if k < 3 else np.zeros(3) for k in range(5)]
  np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.fixture
def unchecked():
  import jaxtyping

  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
  ("name", "shapes", "message"),
  [
    ("binary_cross_entropy", [(2, 3), (2,)], r"labels must have the logits' shape \(2, 3\)"),
    ("binary_soft_target_kl", [(2, 3), (2, 4)], r"must have one shape"),
    ("huber", [(2, 1), (2,)], r"labels\[..., None\]"),
    ("gaussian_nll", [(2, 3), (2, 1)], r"student \(2, 3\) must be \[..., 2D\]"),
    ("gaussian_nll", [(2, 4), (2, 4)], r"student \(2, 2\) and target \(2, 4\)"),
    ("teacher_bounded", [(2, 3), (2, 4), (2, 3)], r"student \(2, 3\) and teacher \(2, 4\)"),
    ("margin_mse", [(2, 1), (2, 1)], "at least one other"),
    ("affinity", [(2, 3), (2, 4), (2, 3), (2, 3)], r"student_texts \(2, 4\) must have one shape"),
    ("norm_and_direction", [(2, 3), (2, 4), (2,), (5, 3)], "use a projector"),
  ],
)
def test_shapes_that_do_not_fit_are_named(name, shapes, message, unchecked):
  with pytest.raises(ValueError, match=message):
    values(name, *(np.zeros(shape, int if len(shape) == 1 else np.float32) for shape in shapes))


@pytest.mark.parametrize(
  ("name", "hyper", "message"),
  [
    ("binary_focal", {"focus": -1.0}, "focus must be at least 0"),
    ("binary_focal", {"positive_share": 2.0}, r"positive_share must be in \[0, 1\]"),
    ("binary_soft_target_kl", {"temperature": 0.0}, "temperature must be positive"),
    ("huber", {"delta": 0.0}, "delta must be positive"),
    ("gaussian_kl", {"floor": 0.0}, "floor must be positive"),
    ("affinity", {"teacher_temperature": 0.0}, "teacher_temperature must be positive"),
    ("virtual_teacher", {"correct": 1.5}, r"correct must be in \[0, 1\]"),
  ],
)
def test_hyper_parameters_out_of_range_are_named(name, hyper, message):
  given, rest, *_ = FORMULAS[name]
  with pytest.raises(ValueError, match=message):
    values(name, *map(np.float32, given), *rest, **hyper)
