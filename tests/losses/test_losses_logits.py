"""Losses on logits against float64 NumPy written from their formulas, and the loss contract."""

import functools
import inspect
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from jaxdistill import losses
from jaxdistill.losses import logits
from loss_contract import TOLERANCE, assert_finite, check_derivative, with_gradients

K = 5
SHAPE = (8, 8, K)  # one shape for nearly everything, since compiling is what takes time
LABELS = np.arange(64).reshape(8, 8) * 7 % K


def random_logits(seed, shape=SHAPE, scale=2.0):
  return np.random.default_rng(seed).normal(size=shape) * scale


# --- The formulas of the paper page, in float64 NumPy. ---


def softmax(z, temperature=1.0):
  e = np.exp(z / temperature - np.max(z / temperature, axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


def kl(p, q):
  return np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / np.where(p > 0, q, 1)), 0), -1)


def onehot(labels, classes):
  return np.eye(classes)[labels]


def ref_decoupled(s, t, y, temperature, target_weight, nontarget_weight):
  p, q, y = softmax(t, temperature), softmax(s, temperature), onehot(y, s.shape[-1])
  p_y, q_y = (p * y).sum(-1), (q * y).sum(-1)
  pairs = kl(np.stack([p_y, 1 - p_y], -1), np.stack([q_y, 1 - q_y], -1))
  rest_p, rest_q = p * (1 - y) / (1 - p_y)[..., None], q * (1 - y) / (1 - q_y)[..., None]
  return temperature**2 * (target_weight * pairs + nontarget_weight * kl(rest_p, rest_q))


def pearson(a, b, axis):
  a, b = a - a.mean(axis, keepdims=True), b - b.mean(axis, keepdims=True)
  return (a * b).sum(axis) / (np.sqrt((a**2).sum(axis)) * np.sqrt((b**2).sum(axis)) + 1e-8)


def ref_ofa(s, t, y, power, temperature):
  y = onehot(y, s.shape[-1])
  target = (softmax(t, temperature) + y) ** power - y
  return -(target * np.log(softmax(s, temperature))).sum(-1)


def ref_jsd(s, t, beta, temperature):
  p, q = softmax(t, temperature), softmax(s, temperature)
  m = beta * p + (1 - beta) * q
  return temperature**2 * (beta * kl(p, m) + (1 - beta) * kl(q, m))


def ref_skew(a, b, skew, temperature):
  a, b = softmax(a, temperature), softmax(b, temperature)
  return temperature**2 * kl(a, skew * a + (1 - skew) * b)


def ref_correlation(s, t, temperature, axis):
  return temperature**2 * (1 - pearson(softmax(s, temperature), softmax(t, temperature), axis))


def flat(x):
  return x.reshape(-1, x.shape[-1])


# name: (defaults, other hyper-parameters, reference); all as (student, teacher, labels, hyper).
FORMULAS = {
  "cross_entropy": (
    {"label_smoothing": 0.0},
    {"label_smoothing": 0.3},
    lambda s, t, y, label_smoothing: (
      -(
        ((1 - label_smoothing) * onehot(y, s.shape[-1]) + label_smoothing / s.shape[-1])
        * np.log(softmax(s))
      ).sum(-1)
    ),
  ),
  "soft_target_kl": (
    {"temperature": 4.0},
    {"temperature": 1.5},
    lambda s, t, y, temperature: (
      temperature**2 * kl(softmax(t, temperature), softmax(s, temperature))
    ),
  ),
  "reverse_kl": (
    {"temperature": 1.0},
    {"temperature": 2.5},
    lambda s, t, y, temperature: (
      temperature**2 * kl(softmax(s, temperature), softmax(t, temperature))
    ),
  ),
  "generalized_jsd": (
    {"beta": 0.5, "temperature": 1.0},
    {"beta": 0.2, "temperature": 3.0},
    lambda s, t, y, beta, temperature: ref_jsd(s, t, beta, temperature),
  ),
  "total_variation": (
    {"temperature": 1.0},
    {"temperature": 3.0},
    lambda s, t, y, temperature: (
      temperature**2 * 0.5 * np.abs(softmax(t, temperature) - softmax(s, temperature)).sum(-1)
    ),
  ),
  "skew_kl": (
    {"skew": 0.1, "temperature": 1.0},
    {"skew": 0.6, "temperature": 2.0},
    lambda s, t, y, skew, temperature: ref_skew(t, s, skew, temperature),
  ),
  "skew_reverse_kl": (
    {"skew": 0.1, "temperature": 1.0},
    {"skew": 0.6, "temperature": 2.0},
    lambda s, t, y, skew, temperature: ref_skew(s, t, skew, temperature),
  ),
  "decoupled_kd": (
    {"temperature": 4.0, "target_weight": 1.0, "nontarget_weight": 8.0},
    {"temperature": 1.0, "target_weight": 3.0, "nontarget_weight": 0.5},
    ref_decoupled,
  ),
  "logit_l2": ({}, {}, lambda s, t, y: ((s - t) ** 2).mean(-1)),
  "standardize_logits": (
    {},
    {},
    lambda s, t, y: (s - s.mean(-1, keepdims=True)) / (1e-7 + s.std(-1, ddof=1, keepdims=True)),
  ),
  "inter_class_correlation": (
    {"temperature": 4.0},
    {"temperature": 1.0},
    lambda s, t, y, temperature: ref_correlation(s, t, temperature, -1),
  ),
  "intra_class_correlation": (
    {"temperature": 4.0},
    {"temperature": 1.0},
    lambda s, t, y, temperature: ref_correlation(flat(s), flat(t), temperature, 0),
  ),
  "one_for_all": (
    {"power": 1.0, "temperature": 1.0},
    {"power": 1.7, "temperature": 2.0},
    ref_ofa,
  ),
}
DIVERGENCES = list(FORMULAS)[:8]
# 0 where the two networks agree.
ZERO_AT_TEACHER = [
  name for name in FORMULAS if name not in ("cross_entropy", "standardize_logits", "one_for_all")
]
NAMES = pytest.mark.parametrize("name", FORMULAS)


def call(name, student, teacher, labels, **hyper):
  """Calls a loss with the arguments that it takes."""
  function = getattr(losses, name)
  if name == "standardize_logits":
    return function(student, **hyper)
  if name == "cross_entropy":
    return function(student, labels, **hyper)
  if name in ("decoupled_kd", "one_for_all"):
    return function(student, teacher, labels, **hyper)
  return function(student, teacher, **hyper)


@functools.cache
def compiled(name):
  """Values, and their gradients by student, teacher and hyper-parameters."""
  return with_gradients(lambda s, t, hyper, labels: call(name, s, t, labels, **hyper))


def run(name, student, teacher, labels=LABELS, **hyper):
  """`compiled` with every hyper-parameter traced, so that a shape is compiled once."""
  given = student, teacher, {**FORMULAS[name][0], **hyper}
  return compiled(name)(*jax.tree.map(np.float32, given), np.asarray(labels))


def value(name, student, teacher, labels=LABELS, **hyper):
  return run(name, student, teacher, labels, **hyper)[0]


# --- Values. ---


def test_every_public_loss_is_here():
  assert sorted(FORMULAS) == logits.__all__
  assert set(logits.__all__) <= set(losses.__all__)
  assert list(losses.__all__) == sorted(set(losses.__all__))


@pytest.mark.device
@NAMES
def test_value_is_the_formula(name):
  student, teacher = random_logits(1), random_logits(2)
  defaults, others, reference = FORMULAS[name]
  for hyper in (defaults, others):
    got = value(name, student, teacher, **hyper)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, reference(student, teacher, LABELS, **hyper), **TOLERANCE)


@NAMES
def test_defaults_are_the_published_ones(name):
  parameters = inspect.signature(getattr(losses, name)).parameters.values()
  keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
  keywords.pop("where", None)
  assert keywords == FORMULAS[name][0]


@NAMES
def test_float64_stays_and_gradient_is_the_derivative(name):
  _, hyper, reference = FORMULAS[name]
  check_derivative(
    lambda s, t, h: call(name, s, t, LABELS, **h),
    lambda s, t, h: reference(s, t, LABELS, **h),
    random_logits(3),
    random_logits(4),
    jax.tree.map(np.float64, hyper),
  )


@NAMES
def test_both_networks_get_gradients(name):
  _, gradients = run(name, random_logits(5), random_logits(6))
  used = gradients[:1] if name in ("cross_entropy", "standardize_logits") else gradients[:2]
  for gradient in used:
    assert (np.abs(gradient).max(axis=-1) > 1e-6).all()


@pytest.mark.parametrize("name", ZERO_AT_TEACHER)
def test_agreement_is_a_minimum_at_zero(name):
  z = random_logits(7)
  values, gradients = run(name, z, z)
  # Roundings of 1e-7 times temperature² = 16; DIST's 1e-8 is divided by squared norms over 1e-3.
  np.testing.assert_allclose(values, 0, atol=2e-4 if "correlation" in name else 2e-5)
  np.testing.assert_allclose(gradients[0], 0, atol=2e-4 if "correlation" in name else 2e-5)
  assert (value(name, random_logits(8), z) > 1e-3).all()


def test_cross_entropies_are_least_at_the_target():
  z = random_logits(8)
  p = softmax(z)
  entropy = -(p * np.log(p)).sum(-1)
  values, gradients = run("cross_entropy", z, z, labels=np.float32(p))
  np.testing.assert_allclose(values, entropy, **TOLERANCE)
  np.testing.assert_allclose(gradients[0], 0, atol=1e-6)
  np.testing.assert_allclose(value("one_for_all", z, z), entropy, **TOLERANCE)


# --- The contract: transformations, dtypes, extremes, masks. ---


@pytest.mark.device
@NAMES
def test_half_precision_batches_of_one_and_hyper_parameters_under_vmap(name, strict_promotion):
  student = jnp.asarray(random_logits(9, (2, 1, K)), jnp.bfloat16)
  teacher = jnp.asarray(random_logits(10, (2, 1, K)), jnp.float16)
  labels = np.array([[1], [3]])
  defaults, _, reference = FORMULAS[name]
  hyper = {key: np.array([default, 0.75], np.float32) for key, default in defaults.items()}
  mapped = jax.jit(jax.vmap(lambda s, t, y, h: call(name, s, t, y, **h)))
  got = mapped(student, teacher, labels, hyper)
  assert got.dtype == jnp.float32
  for i in range(2):
    one = {key: float(values[i]) for key, values in hyper.items()}
    expected = reference(np.float64(student[i]), np.float64(teacher[i]), labels[i], **one)
    if name == "intra_class_correlation":  # of one example to nothing
      expected = np.zeros(K)
    np.testing.assert_allclose(got[i], expected, **TOLERANCE)


def extreme_rows(classes):
  """64 pairs of logits: far apart, equal, opposite, one-sided; every sign of ±1e4."""
  big = np.full(classes, -1e4)
  big[0] = 1e4
  rows = [big, -big, big[::-1], np.zeros(classes), np.full(classes, 1e4), np.full(classes, -1e4)]
  rows += [np.linspace(-1e4, 1e4, classes), np.linspace(0, 1e-4, classes)]
  student, teacher = zip(*[(a, b) for a in rows for b in rows], strict=True)
  return np.reshape(student, (8, 8, classes)), np.reshape(teacher, (8, 8, classes))


@pytest.mark.device
@NAMES
def test_extremes_are_finite(name):
  defaults, others, _ = FORMULAS[name]
  ends = [{key: end} for key in ("beta", "skew") if key in defaults for end in (0, 1)]
  for classes in (2, K):
    student, teacher = extreme_rows(classes)
    for label in (0, classes - 1):
      labels = np.full((8, 8), label)
      for hyper in [defaults, others, *ends]:
        assert_finite(run(name, student, teacher, labels, **hyper))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_masked_class_is_a_dropped_class(name):
  hyper = FORMULAS[name][1]
  # Two classes, whose shape is compiled already; the second part of DKD needs a third.
  kept = [0, 2, 3] if name == "decoupled_kd" else [0, 3]
  masked = np.setdiff1d(range(K), kept)
  student, teacher = random_logits(17), random_logits(18)
  student[4:] *= 5e3
  teacher[:, 4:] *= 5e3
  student[..., masked] = teacher[..., masked] = -np.inf
  label = LABELS % len(kept)
  got = run(name, student, teacher, np.asarray(kept)[label], **hyper)
  assert_finite(got)
  values, (by_student, by_teacher, by_hyper) = got
  assert not np.any(by_student[..., masked])
  assert not np.any(by_teacher[..., masked])
  got = values, (by_student[..., kept], by_teacher[..., kept], by_hyper)
  expected = run(name, student[..., kept], teacher[..., kept], label, **hyper)

  def close(a, b):  # relative to the largest: the hyper-parameters' gradients are sums of 64
    np.testing.assert_allclose(a, b, rtol=3e-5, atol=1e-6 * max(1, np.abs(b).max()))

  jax.tree.map(close, got, expected)
  # Some networks mask with the lowest float, which a temperature under 1 would turn into −inf.
  hyper = {**hyper, "temperature": 0.5} if "temperature" in hyper else hyper
  labels = np.asarray(kept)[label]
  expected = run(name, student, teacher, labels, **hyper)
  student[..., masked] = teacher[..., masked] = np.finfo(np.float32).min
  jax.tree.map(close, run(name, student, teacher, labels, **hyper), expected)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_one_class_left_says_nothing(name):
  student, teacher = np.full((2, *SHAPE), -np.inf)
  student[..., 1], teacher[..., 1] = 3.0, -7.0
  values, gradients = run(name, student, teacher, np.ones((8, 8), int))
  np.testing.assert_allclose(values, 0, atol=4e-7)  # the shares of a skew are rounded
  assert_finite(gradients)
  assert not np.any(gradients[0])


def test_a_class_that_the_teacher_alone_masks_contributes_nothing_of_its_own():
  student, teacher = random_logits(19), random_logits(20)
  teacher[..., 1] = -np.inf
  with np.errstate(divide="ignore", invalid="ignore"):
    expected = FORMULAS["soft_target_kl"][2](student, teacher, LABELS, temperature=2.0)
  values, gradients = run("soft_target_kl", student, teacher, temperature=2.0)
  np.testing.assert_allclose(values, expected, **TOLERANCE)
  assert_finite(gradients)
  assert not np.any(gradients[1][..., 1])
  assert np.all(gradients[0][..., 1])  # the student is pushed off the class


def test_nan_is_not_taken_for_a_mask():
  student = jnp.array([[1.0, jnp.nan, 0.0]])
  assert np.isnan(losses.soft_target_kl(student, jnp.zeros((1, 3))))


def count_primitives(jaxpr, counts):
  for equation in jaxpr.eqns:
    counts[equation.primitive.name] += 1
    for inner in jaxprs_in_params(equation.params):
      count_primitives(inner, counts)
  return counts


def test_soft_target_kl_costs_two_log_softmaxes_and_one_sum():
  z = jnp.zeros((2, K))
  counts = count_primitives(jax.make_jaxpr(losses.soft_target_kl)(z, z).jaxpr, Counter())
  assert counts["reduce_max"] == 2
  assert counts["reduce_sum"] == 3
  assert counts["exp"] == 4  # of each side once more, so that no summand is below 0
  assert counts["log"] == 2


# --- Labels. ---


def test_labels_as_integers_or_as_a_distribution():
  z, other = random_logits(19), LABELS[:, ::-1]
  first, second = np.float32(onehot(LABELS, K)), np.float32(onehot(other, K))
  hard = value("cross_entropy", z, z, label_smoothing=0.1)
  soft = value("cross_entropy", z, z, labels=first, label_smoothing=0.1)
  np.testing.assert_allclose(soft, hard, rtol=1e-6)
  mixed = value("cross_entropy", z, z, labels=0.7 * first + 0.3 * second)
  expected = 0.7 * value("cross_entropy", z, z) + 0.3 * value("cross_entropy", z, z, labels=other)
  np.testing.assert_allclose(mixed, expected, rtol=1e-5)


def test_narrow_labels_do_not_wrap():
  z, labels = np.zeros((2, 300)), np.array([3, 200])
  z[0, 3], z[1, 200] = 2.0, 3.0
  expected = FORMULAS["cross_entropy"][2](z, z, labels, label_smoothing=0.0)
  got = value("cross_entropy", z, z, labels=np.uint8(labels))
  np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_smoothing_spreads_over_the_classes_that_are_there():
  z = random_logits(20)
  z[..., 1] = -np.inf
  kept = [0, 2, 3, 4]
  labels = np.where(LABELS == 1, 0, LABELS)
  log_q = np.log(softmax(z[..., kept]))
  label_log_q = np.take_along_axis(log_q, np.searchsorted(kept, labels)[..., None], -1)[..., 0]
  got = value("cross_entropy", z, z, labels=labels, label_smoothing=0.1)
  np.testing.assert_allclose(got, -(0.9 * label_log_q + 0.1 * log_q.mean(-1)), **TOLERANCE)


@pytest.mark.parametrize("label", [-1, K, -100])
def test_a_label_of_no_class_is_finite(label):
  student, teacher, labels = random_logits(21), random_logits(22), np.full_like(LABELS, label)
  assert not np.any(value("cross_entropy", student, teacher, labels))
  got = run("decoupled_kd", student, teacher, labels, temperature=2.0, nontarget_weight=1.0)
  expected = value("soft_target_kl", student, teacher, temperature=2.0)  # all is 'the rest'
  np.testing.assert_allclose(got[0], expected, **TOLERANCE)
  assert_finite(got)


# --- Identities of the papers. ---


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_decoupled_kd_with_the_teachers_own_weight_is_plain_kd(temperature):
  student, teacher = random_logits(23), random_logits(24)
  expected = value("soft_target_kl", student, teacher, temperature=temperature)
  p = softmax(teacher, temperature)
  for i in range(8):
    weight = 1 - p[i, i, LABELS[i, i]]
    hyper = {"temperature": temperature, "nontarget_weight": weight}
    got = value("decoupled_kd", student, teacher, **hyper)
    np.testing.assert_allclose(got[i, i], expected[i, i], **TOLERANCE)


def test_decoupled_kd_of_two_classes_has_no_second_part():
  student, teacher = extreme_rows(2)
  values, gradients = run(
    "decoupled_kd", student, teacher, np.zeros((8, 8), int), target_weight=0.0, nontarget_weight=1e6
  )
  assert not np.any(values)
  assert not np.any(gradients[0])


def test_decoupled_kd_is_right_where_the_published_code_is_infinite():
  # q_y rounds to 1, so log(1 − q_y) is −inf outside log space; by hand: p_y = ½, log q_y = 0 and
  # log(1 − q_y) = log 4 − 60, so the pair's KL is −log 2 + ½ (60 − log 4).
  student = np.broadcast_to([60.0, 0, 0, 0, 0], SHAPE)
  teacher = np.broadcast_to(np.log([0.5, 0.125, 0.125, 0.125, 0.125]), SHAPE)
  got = value("decoupled_kd", student, teacher, np.zeros((8, 8), int), temperature=1.0)
  np.testing.assert_allclose(got, 30 - 2 * np.log(2), rtol=1e-6)


def test_generalized_jsd_mirrors_and_ends():
  student, teacher = random_logits(25), random_logits(26)
  for beta in (0.5, 0.3):
    np.testing.assert_allclose(
      value("generalized_jsd", student, teacher, beta=beta),
      value("generalized_jsd", teacher, student, beta=1 - beta),
      **TOLERANCE,
    )
  assert not np.allclose(
    value("generalized_jsd", student, teacher, beta=0.3),
    value("generalized_jsd", teacher, student, beta=0.3),
    rtol=1e-2,
  )
  for beta in (0.0, 1.0):
    got = value("generalized_jsd", student, teacher, beta=beta)
    np.testing.assert_allclose(got, 0, atol=1e-6)


def test_generalized_jsd_over_its_small_share_tends_to_the_two_kls():
  student, teacher = 0.2 * random_logits(25), 0.2 * random_logits(26)
  share = 2.0**-7  # the remainder is a few times the share; float32 rounding over it is 1e-5
  np.testing.assert_allclose(
    value("generalized_jsd", student, teacher, beta=share) / share,
    value("soft_target_kl", student, teacher, temperature=1.0),
    rtol=0.05,
  )
  np.testing.assert_allclose(
    value("generalized_jsd", student, teacher, beta=1 - share) / share,
    value("reverse_kl", student, teacher),
    rtol=0.05,
  )


@pytest.mark.parametrize(
  ("name", "plain"), [("skew_kl", "soft_target_kl"), ("skew_reverse_kl", "reverse_kl")]
)
def test_skew_ends(name, plain):
  student, teacher = extreme_rows(K)
  labels = np.zeros((8, 8), int)
  expected = value(plain, student, teacher, labels, temperature=1.0)
  assert expected.max() > 1e3  # far beyond what a mixture made outside log space can say
  np.testing.assert_allclose(value(name, student, teacher, labels, skew=0.0), expected, **TOLERANCE)
  np.testing.assert_allclose(value(name, student, teacher, labels, skew=1.0), 0, atol=1e-6)
  between = value(name, student, teacher, labels)
  assert between.min() >= -1e-6
  assert between.max() <= -np.log(0.1) * (1 + 1e-6)


def test_soft_target_kl_gradient_tends_to_logit_matching():
  # Hinton et al.: at high temperature and with centred logits, the gradient is (z − v) / K.
  student, teacher = 0.1 * random_logits(27), 0.1 * random_logits(28)
  student -= student.mean(-1, keepdims=True)
  teacher -= teacher.mean(-1, keepdims=True)
  _, (gradient, _, _) = run("soft_target_kl", student, teacher, temperature=50.0)
  weights = np.cos(np.arange(LABELS.size)).reshape(LABELS.shape)[..., None]
  # Terms of the order of logits / temperature are left out; rounding is 1e-7 · temperature.
  np.testing.assert_allclose(gradient, weights * (student - teacher) / K, rtol=2e-2, atol=5e-4)


def test_standardized_logits_have_no_shift_or_scale():
  z = random_logits(29)
  got = value("standardize_logits", z, z)
  np.testing.assert_allclose(got.mean(-1), 0, atol=1e-6)
  np.testing.assert_allclose(got.std(-1, ddof=1), 1, rtol=1e-5)
  moved = value("standardize_logits", 3 * z + 5, z)
  np.testing.assert_allclose(moved, got, rtol=1e-4, atol=1e-5)
  # 0.1 has no exact mean over the classes; a row of equals must be zeros all the same.
  equal = np.ones(SHAPE) * np.geomspace(7e-9, 1e4 / 3, 8)[:, None]
  assert not np.any(value("standardize_logits", equal, z))
  with pytest.raises(ValueError, match="have one output"):
    losses.standardize_logits(jnp.array([7.0]))


@pytest.mark.parametrize("name", ["inter_class_correlation", "intra_class_correlation"])
def test_correlations_forgive_shift_and_scale(name):
  p = softmax(random_logits(30))
  squeezed = 0.25 * p + 0.75 / K  # still distributions, and an affine image of p
  # 1e-8 over a product of norms of 0.01 or more is 1e-4 of it at most.
  got = value(name, np.log(squeezed), np.log(p), temperature=1.0)
  np.testing.assert_allclose(got, 0, atol=1e-3)
  assert not np.allclose(value(name, np.log(p**3), np.log(p), temperature=1.0), 0, atol=1e-3)


def test_one_for_all_power_one_is_cross_entropy_with_the_teacher():
  student, teacher = random_logits(30), random_logits(31)
  got = value("one_for_all", student, teacher)
  expected = value("cross_entropy", student, teacher, labels=np.float32(softmax(teacher)))
  np.testing.assert_allclose(got, expected, **TOLERANCE)


def test_one_for_all_with_a_root_is_finite_where_the_teacher_is_sure():
  assert_finite(run("one_for_all", *extreme_rows(K), np.zeros((8, 8), int), power=0.5))


# --- Excluded examples. ---


def test_an_excluded_example_is_as_if_dropped():
  student, teacher = random_logits(32, (6, K)), random_logits(33, (6, K))
  where = np.array([[1, 0, 1, 1, 1, 0], [0, 0, 1, 0, 0, 0], [0] * 6], np.float32)
  kept = where[0].astype(bool)
  expected = FORMULAS["intra_class_correlation"][2](
    student[kept], teacher[kept], None, temperature=4.0
  )

  def total(s, t, where):
    values = losses.intra_class_correlation(s, t, where=where)
    return jnp.sum(values), values

  masked = jax.jit(
    jax.vmap(jax.value_and_grad(total, argnums=(0, 1), has_aux=True), in_axes=(None, None, 0))
  )
  clean = masked(np.float32(student), np.float32(teacher), where)
  student[1], teacher[5], student[5] = np.nan, np.inf, -np.inf
  dirty = masked(np.float32(student), np.float32(teacher), where)
  (_, values), gradients = dirty
  np.testing.assert_allclose(values[0], expected, **TOLERANCE)
  assert not np.any(values[1:])
  assert_finite(gradients)
  for gradient in gradients:
    assert np.all(np.abs(gradient[0]).max(axis=-1)[kept] > 1e-6)
    assert not np.any(gradient[0][~kept])
    assert not np.any(gradient[1:])
  jax.tree.map(np.testing.assert_array_equal, dirty, clean)


# --- More rows than anyone would write down. ---

LOGIT = st.floats(-1e4, 1e4, width=32) | st.floats(-3, 3, width=32)
ROWS = st.lists(st.lists(LOGIT, min_size=K, max_size=K), min_size=8, max_size=8).map(np.array)


@given(ROWS, st.integers(0, K - 1))
@settings(max_examples=15, deadline=None, database=None, derandomize=True)
def test_bounds_hold_everywhere(rows, label):
  student, teacher = np.broadcast_to(rows[:, None], SHAPE), np.broadcast_to(rows, SHAPE)
  got = {name: run(name, student, teacher, np.full((8, 8), label)) for name in FORMULAS}
  assert_finite(got)
  values = {name: got[name][0] for name in DIVERGENCES}
  for name, each in values.items():
    # Rounding may take what should be 0 below it: temperature² = 16 times K roundings of 1e-7.
    assert each.min() >= -2e-5, name
    # A constant has no part in a softmax, so no divergence moves along it, but for the rounding of
    # log-probabilities as large as the logits' range.
    drift = np.abs(got[name][1][0].sum(axis=-1)).max()
    assert drift <= 1e-5 + 1e-6 * np.ptp(rows), name
  assert values["total_variation"].max() <= 1 + 1e-6
  assert values["generalized_jsd"].max() <= np.log(2) + 1e-6
  assert values["skew_kl"].max() <= -np.log(0.1) + 1e-5
  # Pinsker: total variation² ≤ KL / 2, whichever way round.
  assert (values["total_variation"] ** 2 <= values["reverse_kl"] / 2 + 1e-5).all()


# --- Errors, as a user without a shape checker meets them. ---


@pytest.fixture
def unchecked():
  import jaxtyping

  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
  "name", [n for n in FORMULAS if n not in ("cross_entropy", "standardize_logits")]
)
def test_shapes_that_differ_are_named(name, unchecked):
  with pytest.raises(ValueError, match=r"student_logits \(2, 3\) and teacher_logits \(2, 4\)"):
    call(name, jnp.zeros((2, 3)), jnp.zeros((2, 4)), jnp.zeros(2, jnp.int32))


def test_labels_that_fit_nothing_are_named(unchecked):
  z = jnp.zeros((2, 3))
  with pytest.raises(
    ValueError, match=r"integers of shape \(2,\) or distributions of shape \(2, 3"
  ):
    losses.cross_entropy(z, jnp.zeros(2))
  with pytest.raises(ValueError, match=r"integers of shape \(2,\) beside logits .* int32 of shape"):
    losses.decoupled_kd(z, z, jnp.zeros((2, 1), jnp.int32))
  with pytest.raises(ValueError, match=r"where must have shape \(2,\), got \(3,\)"):
    losses.intra_class_correlation(z, z, where=jnp.ones(3))


@pytest.mark.parametrize(
  ("name", "hyper", "message"),
  [
    ("soft_target_kl", {"temperature": 0.0}, "temperature must be positive, got 0.0"),
    ("decoupled_kd", {"temperature": -1.0}, "temperature must be positive, got -1.0"),
    ("one_for_all", {"power": 0}, "power must be positive, got 0"),
    ("generalized_jsd", {"beta": 1.5}, r"beta must be in \[0, 1\], got 1.5"),
    ("skew_kl", {"skew": -0.1}, r"skew must be in \[0, 1\], got -0.1"),
    ("skew_reverse_kl", {"skew": float("nan")}, r"skew must be in \[0, 1\] and finite, got nan"),
    ("cross_entropy", {"label_smoothing": 2}, r"label_smoothing must be in \[0, 1\], got 2"),
  ],
)
def test_hyper_parameters_out_of_range_are_named(name, hyper, message):
  with pytest.raises(ValueError, match=message):
    call(name, jnp.zeros((2, 3)), jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32), **hyper)
