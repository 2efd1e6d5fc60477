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
from jaxdistill.losses import logits, partitions
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


def spread_among(z, temperature, among):
  """A softmax over some of the classes, and 0 for the others."""
  p = softmax(z, temperature) * among
  total = p.sum(-1, keepdims=True)
  return np.where(total > 0, p / np.where(total > 0, total, 1), 0)


def in_parts(s, t, inside, temperature):
  """KLs of (inside, outside), inside, and outside."""
  pairs = [
    np.stack([(softmax(z, temperature) * part).sum(-1) for part in (inside, ~inside)], -1)
    for z in (t, s)
  ]
  parts = [kl(*(spread_among(z, temperature, part) for z in (t, s))) for part in (inside, ~inside)]
  return kl(*pairs), *parts


def positive(z):
  """A set of classes, the same whichever others are dropped."""
  return z > 0


def first(z, count):
  """The largest logits, of equal ones those with the smaller index."""
  places = np.argsort(np.argsort(-z, axis=-1, kind="stable"), axis=-1)
  return places < count


def ref_partition(s, t, inside, temperature, pair_weight, inside_weight, outside_weight):
  pairs, within, without = in_parts(s, t, inside, temperature)
  parts = pair_weight * pairs + inside_weight * within + outside_weight * without
  return temperature**2 * parts


def ref_refined(s, t, y, temperature, target_temperature, target_weight, nontarget_weight):
  y = onehot(y, s.shape[-1])
  p = softmax(t, target_temperature).max(-1)
  q = (softmax(s, target_temperature) * y).sum(-1)
  pairs = kl(np.stack([p, 1 - p], -1), np.stack([q, 1 - q], -1))
  below = t < (t * y).sum(-1, keepdims=True)
  rest = kl(spread_among(t, temperature, below), spread_among(s, temperature, below))
  return target_weight * target_temperature**2 * pairs + nontarget_weight * temperature**2 * rest


def ref_normalized(s, t, y, temperature, nontarget_weight):
  y = onehot(y, s.shape[-1])
  p, q = (spread_among(z, temperature, 1 - y) for z in (t, s))
  others = -(p * np.log(q + y)).sum(-1)
  label = -(softmax(t) * y).sum(-1) * np.log((softmax(s) * y).sum(-1))
  return label + nontarget_weight * temperature**2 * others


def ref_transformed(s, t, power):
  """Matching, and the sum of powers."""
  powers = softmax(t) ** power
  total = powers.sum(-1, keepdims=True)
  return kl(powers / total, softmax(s)), total[..., 0]


def ref_label_weight(s, t, y):
  y = onehot(y, s.shape[-1])
  ours, theirs = (-np.log((softmax(z) * y).sum(-1)) for z in (s, t))
  return 1 - np.exp(-ours / (theirs + 1e-7))


def ref_class_gram(s, t, temperature):
  q, p = (flat(softmax(z, temperature)) for z in (s, t))
  return ((p.T @ p - q.T @ q) ** 2).sum(-1)


def ref_batch_gram(s, t, temperature):
  q, p = (flat(softmax(z, temperature)) for z in (s, t))
  return ((p @ p.T - q @ q.T) ** 2).sum(-1).reshape(s.shape[:-1])


def ref_alpha_beta(s, t, alpha, beta, temperature):
  p, q, both = softmax(t, temperature), softmax(s, temperature), alpha + beta
  sums = alpha / both * p**both + beta / both * q**both - p**alpha * q**beta
  return temperature**2 / (alpha * beta) * sums.sum(-1)


def ref_adaptive(s, t, head, temperature):
  p, q = flat(softmax(t, temperature)), flat(softmax(s, temperature))
  shares = []
  for one, other in zip(p, q, strict=True):
    ranked = np.argsort(-one)
    likely = [k for i, k in enumerate(ranked) if not i or one[ranked[: i + 1]].sum() <= head]
    shares.append(np.abs(one - other)[likely].sum() / np.abs(one - other).sum())
  share = np.reshape(shares, s.shape[:-1])
  both = softmax(t, temperature), softmax(s, temperature)
  return temperature**2 * (share * kl(*both) + (1 - share) * kl(*both[::-1]))


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
  "alpha_beta": (
    {"alpha": 0.2, "beta": 0.7, "temperature": 1.0},
    {"alpha": 0.9, "beta": 0.3, "temperature": 2.0},
    lambda s, t, y, **hyper: ref_alpha_beta(s, t, **hyper),
  ),
  "adaptive_kl": (
    {"head": 0.5, "temperature": 1.0},
    {"head": 0.7, "temperature": 2.0},
    lambda s, t, y, **hyper: ref_adaptive(s, t, **hyper),
  ),
  "negative_log_acceptance": (
    {"temperature": 1.0},
    {"temperature": 2.0},
    lambda s, t, y, temperature: (
      -(temperature**2)
      * np.log(np.minimum(softmax(t, temperature), softmax(s, temperature)).sum(-1))
    ),
  ),
  "decoupled_kd": (
    {"temperature": 4.0, "target_weight": 1.0, "nontarget_weight": 8.0},
    {"temperature": 1.0, "target_weight": 3.0, "nontarget_weight": 0.5},
    ref_decoupled,
  ),
  "partition_kl": (
    {"temperature": 4.0, "pair_weight": 1.0, "inside_weight": 1.0, "outside_weight": 8.0},
    {"temperature": 1.5, "pair_weight": 3.0, "inside_weight": 0.5, "outside_weight": 0.25},
    lambda s, t, y, **hyper: ref_partition(s, t, positive(s), **hyper),
  ),
  "generalized_decoupled_kd": (
    {"top": 5, "temperature": 4.0, "pair_weight": 1.0, "top_weight": 2.0, "rest_weight": 8.0},
    {"top": 2, "temperature": 1.5, "pair_weight": 3.0, "top_weight": 0.5, "rest_weight": 0.25},
    lambda s, t, y, top, temperature, pair_weight, top_weight, rest_weight: ref_partition(
      s, t, first(t, top), temperature, pair_weight, top_weight, rest_weight
    ),
  ),
  "refined_kd": (
    {
      "temperature": 4.0,
      "target_temperature": 1.0,
      "target_weight": 1.0,
      "nontarget_weight": 8.0,
    },
    {
      "temperature": 1.5,
      "target_temperature": 2.0,
      "target_weight": 3.0,
      "nontarget_weight": 0.5,
    },
    ref_refined,
  ),
  "normalized_kd": (
    {"temperature": 1.0, "nontarget_weight": 1.5},
    {"temperature": 3.0, "nontarget_weight": 0.5},
    ref_normalized,
  ),
  "transformed_teacher": (
    {"power": 0.1},
    {"power": 0.7},
    lambda s, t, y, power: ref_transformed(s, t, power)[0],
  ),
  "weighted_transformed_teacher": (
    {"power": 0.2},
    {"power": 1.5},
    lambda s, t, y, power: np.prod(ref_transformed(s, t, power), axis=0),
  ),
  "soft_label_weight": ({}, {}, ref_label_weight),
  "weighted_soft_labels": (
    {"temperature": 2.0},
    {"temperature": 0.8},
    lambda s, t, y, temperature: (
      -ref_label_weight(s, t, y)
      * temperature**2
      * (softmax(t, temperature) * np.log(softmax(s, temperature))).sum(-1)
    ),
  ),
  "logit_l2": ({}, {}, lambda s, t, y: ((s - t) ** 2).mean(-1)),
  "z_loss": ({}, {}, lambda s, t, y: np.log(np.exp(s).sum(-1)) ** 2),
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
  "class_gram": (
    {"temperature": 4.0},
    {"temperature": 1.0},
    lambda s, t, y, temperature: ref_class_gram(s, t, temperature),
  ),
  "batch_gram": (
    {"temperature": 4.0},
    {"temperature": 1.0},
    lambda s, t, y, temperature: ref_batch_gram(s, t, temperature),
  ),
  "one_for_all": (
    {"power": 1.0, "temperature": 1.0},
    {"power": 1.7, "temperature": 2.0},
    ref_ofa,
  ),
}
# Which take masked classes.
DIVERGENCES = list(FORMULAS)[: list(FORMULAS).index("logit_l2")]
# 0 where the two networks agree.
ELSEWHERE = ("transformed_teacher", "weighted_transformed_teacher", "refined_kd")
CROSS_ENTROPIES = (
  "z_loss",
  "cross_entropy",
  "normalized_kd",
  "one_for_all",
  "weighted_soft_labels",
)
TRANSFORMS = ("standardize_logits", "soft_label_weight")
ZERO_AT_TEACHER = [
  name for name in FORMULAS if name not in (*ELSEWHERE, *CROSS_ENTROPIES, *TRANSFORMS)
]
# A weight made from the student is a constant to its gradient.
STOPPED = ("soft_label_weight", "weighted_soft_labels", "adaptive_kl")
NAMES = pytest.mark.parametrize("name", FORMULAS)


def call(name, student, teacher, labels, **hyper):
  """Calls a loss with the arguments that it takes."""
  function = getattr(losses, name)
  parameters = inspect.signature(function).parameters
  given = {
    "logits": student,
    "student_logits": student,
    "teacher_logits": teacher,
    "labels": labels,
    "inside": positive(student),
  }
  return function(*(given[n] for n in parameters if n in given), **hyper)


@functools.cache
def compiled(name, **counts):
  """Values, and their gradients by student, teacher and hyper-parameters."""
  return with_gradients(lambda s, t, hyper, labels: call(name, s, t, labels, **hyper, **counts))


def run(name, student, teacher, labels=LABELS, **hyper):
  """`compiled` with every hyper-parameter but counts traced, so that a shape is compiled once."""
  hyper = {**FORMULAS[name][0], **hyper}
  counts = {key: hyper.pop(key) for key in ("top",) if key in hyper}
  given = jax.tree.map(np.float32, (student, teacher, hyper))
  return compiled(name, **counts)(*given, np.asarray(labels))


def value(name, student, teacher, labels=LABELS, **hyper):
  return run(name, student, teacher, labels, **hyper)[0]


# --- Values. ---


def test_every_public_loss_is_here():
  assert sorted(FORMULAS) == sorted(logits.__all__ + partitions.__all__)
  assert set(FORMULAS) <= set(losses.__all__)
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


@pytest.mark.parametrize("name", [name for name in FORMULAS if name not in STOPPED])
def test_float64_stays_and_gradient_is_the_derivative(name):
  _, hyper, reference = FORMULAS[name]
  counts = {key: hyper[key] for key in ("top",) if key in hyper}
  check_derivative(
    lambda s, t, h: call(name, s, t, LABELS, **counts, **h),
    lambda s, t, h: reference(s, t, LABELS, **counts, **h),
    random_logits(3),
    random_logits(4),
    {key: np.float64(value) for key, value in hyper.items() if key not in counts},
  )


def test_a_weight_made_from_the_student_is_a_constant_to_its_gradient():
  student, teacher = random_logits(3), random_logits(4)
  q, p = softmax(student, 0.8), softmax(teacher, 0.8)
  weight = ref_label_weight(student, teacher, LABELS)
  with jax.enable_x64(True):
    values, back = jax.vjp(
      lambda s, t: losses.weighted_soft_labels(s, t, LABELS, temperature=0.8), student, teacher
    )
    by_student, by_teacher = back(np.ones_like(values))
  assert values.dtype == np.float64
  np.testing.assert_allclose(by_student, 0.8 * weight[..., None] * (q - p), rtol=1e-9, atol=1e-12)
  surprise = -np.log(q)
  expected = 0.8 * weight[..., None] * p * (surprise - (p * surprise).sum(-1, keepdims=True))
  np.testing.assert_allclose(by_teacher, expected, rtol=1e-9, atol=1e-12)
  _, gradients = run("soft_label_weight", random_logits(3), random_logits(4))
  assert not np.any(gradients[0])
  assert not np.any(gradients[1])


@pytest.mark.parametrize("name", [name for name in FORMULAS if name != "soft_label_weight"])
def test_both_networks_get_gradients(name):
  _, gradients = run(name, random_logits(5), random_logits(6))
  alone = ("cross_entropy", "standardize_logits", "z_loss")
  used = gradients[:1] if name in alone else gradients[:2]
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
@pytest.mark.slow
def test_half_precision_batches_of_one_and_hyper_parameters_under_vmap(name, strict_promotion):
  student = jnp.asarray(random_logits(9, (2, 1, K)), jnp.bfloat16)
  teacher = jnp.asarray(random_logits(10, (2, 1, K)), jnp.float16)
  labels = np.array([[1], [3]])
  defaults, _, reference = FORMULAS[name]
  counts = {key: defaults[key] for key in ("top",) if key in defaults}
  hyper = {
    key: np.array([default, 0.75], np.float32)
    for key, default in defaults.items()
    if key not in counts
  }
  mapped = jax.jit(jax.vmap(lambda s, t, y, h: call(name, s, t, y, **counts, **h)))
  got = mapped(student, teacher, labels, hyper)
  assert got.dtype == jnp.float32
  for i in range(2):
    one = {key: float(values[i]) for key, values in hyper.items()} | counts
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
  kept = [0, 2, 3] if name in partitions.__all__ else [0, 3]
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


def test_a_partition_weighed_by_its_own_masses_is_plain_kd():
  student, teacher = random_logits(23), random_logits(24)
  expected = value("soft_target_kl", student, teacher, temperature=2.0)
  mass = (softmax(teacher, 2.0) * positive(student)).sum(-1)
  for i in range(8):
    own = {"inside_weight": mass[i, i], "outside_weight": 1 - mass[i, i]}
    got = value("partition_kl", student, teacher, temperature=2.0, **own)
    np.testing.assert_allclose(got[i, i], expected[i, i], **TOLERANCE)


def test_partitions_of_the_label_of_the_top_and_of_what_is_right_are_one():
  student, teacher = random_logits(23), random_logits(24)
  best = teacher.argmax(-1)
  hyper = {"temperature": 2.0, "target_weight": 3.0, "nontarget_weight": 0.5}
  expected = value("decoupled_kd", student, teacher, best, **hyper)
  # The teacher's first class alone, which is one class and so has no inner part.
  top = {"pair_weight": 3.0, "top_weight": 9.0, "rest_weight": 0.5}
  got = value("generalized_decoupled_kd", student, teacher, top=1, temperature=2.0, **top)
  np.testing.assert_allclose(got, expected, **TOLERANCE)
  # A teacher that is right puts nothing above the label.
  got = value("refined_kd", student, teacher, best, target_temperature=2.0, **hyper)
  np.testing.assert_allclose(got, expected, **TOLERANCE)
  # NKD's second part is DKD's and an entropy.
  p = spread_among(teacher, 2.0, 1 - onehot(best, K))
  entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(-1)
  got = value("normalized_kd", student, teacher, best, temperature=2.0, nontarget_weight=0.5)
  label = -softmax(teacher).max(-1) * np.log((softmax(student) * onehot(best, K)).sum(-1))
  only = value("decoupled_kd", student, teacher, best, **(hyper | {"target_weight": 0.0}))
  np.testing.assert_allclose(got - label, only + 4 * 0.5 * entropy, rtol=1e-4, atol=1e-5)


def test_all_classes_at_the_top_are_plain_kd():
  student, teacher = random_logits(23), random_logits(24)
  given = {"temperature": 2.0, "top_weight": 1.0}
  expected = value("soft_target_kl", student, teacher, temperature=2.0)
  for top in (K, K + 3):
    got = value("generalized_decoupled_kd", student, teacher, top=top, **given)
    np.testing.assert_allclose(got, expected, **TOLERANCE)


def test_refined_kd_teaches_nothing_beside_the_pair_where_the_teacher_is_most_wrong():
  student, teacher = random_logits(23), random_logits(24)
  worst, last_but_one = np.argsort(teacher, -1)[..., 0], np.argsort(teacher, -1)[..., 1]
  for labels in (worst, last_but_one):
    got = run("refined_kd", student, teacher, labels, target_weight=0.0, nontarget_weight=1e6)
    assert not np.any(got[0])
    assert not np.any(got[1][0])
  tied = np.zeros(SHAPE)
  assert not np.any(value("refined_kd", student, tied, target_weight=0.0))


@pytest.mark.parametrize("label", [-1, K, -100])
@pytest.mark.parametrize("name", ["refined_kd", "weighted_soft_labels", "soft_label_weight"])
def test_a_label_of_no_class_counts_for_nothing(name, label):
  values, gradients = run(name, random_logits(21), random_logits(22), np.full_like(LABELS, label))
  assert not np.any(values)
  assert not np.any(gradients[0])


def test_normalized_kd_of_two_classes_is_the_labels_part():
  student, teacher = random_logits(23, (8, 8, 2)), random_logits(24, (8, 8, 2))
  labels = LABELS % 2
  y = onehot(labels, 2)
  expected = -(softmax(teacher) * y).sum(-1) * np.log((softmax(student) * y).sum(-1))
  got = value("normalized_kd", student, teacher, labels, nontarget_weight=1e6)
  np.testing.assert_allclose(got, expected, **TOLERANCE)


@pytest.mark.parametrize("power", [0.1, 0.5, 3.0])
def test_a_transformed_teacher_is_a_tempered_one(power):
  student, teacher = random_logits(23), random_logits(24)
  expected = value("soft_target_kl", student, power * teacher, temperature=1.0)
  got = value("transformed_teacher", student, teacher, power=power)
  np.testing.assert_allclose(got, expected, **TOLERANCE)
  # The sum of powers is in [1, K^(1 − power)] below a power of 1, and 1 at a power of 1.
  weighted = value("weighted_transformed_teacher", student, teacher, power=power)
  sums = weighted / got
  least, most = sorted((1.0, K ** (1 - power)))
  assert sums.min() >= least * (1 - 1e-5)
  assert sums.max() <= most * (1 + 1e-5)
  unsure = np.zeros(SHAPE)
  np.testing.assert_allclose(
    value("weighted_transformed_teacher", student, unsure, power=power),
    K ** (1 - power) * value("transformed_teacher", student, unsure, power=power),
    rtol=1e-5,
  )


def test_a_power_keeps_what_the_teachers_probabilities_lose():
  # p = e^−100 is 4e-44, which float32 rounds; to the power 0.1 it is e^−10.
  teacher = np.broadcast_to([0.0, -100, -200, -400, -1000], SHAPE)
  expected = kl(softmax(0.1 * teacher), np.full(SHAPE, 1 / K))
  got = value("transformed_teacher", np.zeros(SHAPE), teacher, power=0.1)
  np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_soft_labels_count_where_the_student_lags():
  sure, lost = 9 * onehot(LABELS, K), -9 * onehot(LABELS, K)
  assert value("soft_label_weight", sure, lost).max() < 1e-3
  assert value("soft_label_weight", lost, sure).min() > 0.999
  same = random_logits(23)
  np.testing.assert_allclose(value("soft_label_weight", same, same), 1 - np.exp(-1), rtol=1e-4)
  assert not np.any(value("soft_label_weight", 1e4 * sure, 1e4 * sure))


def test_grams_sum_to_one_number():
  """Both compare the same products of probabilities, of rows or of columns."""
  student, teacher = random_logits(23), random_logits(24)
  uniform = np.zeros(SHAPE)
  p = flat(softmax(teacher, 4.0))
  by_class = value("class_gram", uniform, teacher).sum()
  by_example = value("batch_gram", uniform, teacher).sum()
  # ‖PᵀP‖ = ‖PPᵀ‖, so that the two differ by cross terms alone, which agree as well.
  np.testing.assert_allclose(by_class, ((p.T @ p - 64 / K**2) ** 2).sum(), rtol=1e-4)
  np.testing.assert_allclose(by_example, ((p @ p.T - 1 / K) ** 2).sum(), rtol=1e-4)
  swapped = value("batch_gram", teacher, student), value("class_gram", teacher, student)
  np.testing.assert_allclose(swapped[0], value("batch_gram", student, teacher), rtol=1e-4)
  np.testing.assert_allclose(swapped[1], value("class_gram", student, teacher), rtol=1e-4)


def test_alpha_and_beta_at_their_ends_are_the_divergences_of_the_paper():
  student, teacher = random_logits(25), random_logits(26)
  p, q = softmax(teacher), softmax(student)
  ends = {
    (1.0, 0.0): kl(p, q),
    (0.0, 1.0): kl(q, p),
    (1.0, 1.0): ((p - q) ** 2).sum(-1) / 2,
    (0.5, 0.5): 4 * (1 - np.sqrt(p * q).sum(-1)),
    (1.0, 1e-5): kl(p, q),
    (1e-5, 1.0): kl(q, p),
  }
  for (alpha, beta), expected in ends.items():
    given = {"alpha": alpha, "beta": beta}
    got, gradients = run("alpha_beta", student, teacher, **given)
    np.testing.assert_allclose(got, expected, rtol=3e-4, atol=3e-6)
    swapped = value("alpha_beta", teacher, student, alpha=beta, beta=alpha)
    np.testing.assert_allclose(got, swapped, **TOLERANCE)
    assert_finite(gradients)
    far = run("alpha_beta", *extreme_rows(K), **given)
    assert_finite(far)
  for alpha, beta in ((-0.1, 1.0), (0.0, 0.0)):
    with pytest.raises(ValueError, match="must be"):
      losses.alpha_beta(student, teacher, alpha=alpha, beta=beta)


def test_acceptance_is_what_total_variation_leaves():
  student, teacher = random_logits(25), random_logits(26)
  got = value("negative_log_acceptance", student, teacher)
  left = 1 - value("total_variation", student, teacher)
  np.testing.assert_allclose(got, -np.log(left), rtol=1e-4)
  np.testing.assert_allclose(got, value("negative_log_acceptance", teacher, student), rtol=1e-5)
  sure = 1e4 * onehot(LABELS, K)
  got, gradients = run("negative_log_acceptance", student, sure)
  wanted, known = run("cross_entropy", student, student)
  np.testing.assert_allclose(got, wanted, rtol=1e-5)
  np.testing.assert_allclose(gradients[0], known[0], atol=1e-6)


def test_an_adaptive_weight_is_a_constant_to_the_gradient():
  student, teacher = random_logits(25), random_logits(26)
  _, forward = run("soft_target_kl", student, teacher, temperature=1.0)
  _, reverse = run("reverse_kl", student, teacher)
  _, (got, _, by_hyper) = run("adaptive_kl", student, teacher)
  p, q = softmax(teacher), softmax(student)
  share = (ref_adaptive(student, teacher, 0.5, 1.0) - kl(q, p)) / (kl(p, q) - kl(q, p))
  expected = share[..., None] * forward[0] + (1 - share)[..., None] * reverse[0]
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
  assert not np.any(by_hyper["head"])


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


@pytest.mark.parametrize("name", ["intra_class_correlation", "class_gram", "batch_gram"])
def test_an_excluded_example_is_as_if_dropped(name):
  student, teacher = random_logits(32, (6, K)), random_logits(33, (6, K))
  where = np.array([[1, 0, 1, 1, 1, 0], [0, 0, 1, 0, 0, 0], [0] * 6], np.float32)
  kept = where[0].astype(bool)
  expected = FORMULAS[name][2](student[kept], teacher[kept], None, temperature=4.0)

  def total(s, t, where):
    values = getattr(losses, name)(s, t, where=where)
    return jnp.sum(values), values

  masked = jax.jit(
    jax.vmap(jax.value_and_grad(total, argnums=(0, 1), has_aux=True), in_axes=(None, None, 0))
  )
  clean = masked(np.float32(student), np.float32(teacher), where)
  student[1], teacher[5], student[5] = np.nan, np.inf, -np.inf
  dirty = masked(np.float32(student), np.float32(teacher), where)
  (_, values), gradients = dirty
  got = values[0]
  if name == "batch_gram":  # by example, 0 for who is out
    assert not np.any(got[~kept])
    got = got[kept]
  np.testing.assert_allclose(got, expected, **TOLERANCE)
  assert not np.any(values[2:])
  assert_finite(gradients)
  for gradient in gradients:
    assert np.all(np.abs(gradient[0]).max(axis=-1)[kept] > 1e-6)
    assert not np.any(gradient[0][~kept])
    assert not np.any(gradient[2:])
    if name == "intra_class_correlation":  # one example alone is no relation within a class
      assert not np.any(values[1])
      assert not np.any(gradient[1])
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
  "name", [n for n in FORMULAS if n not in ("cross_entropy", "standardize_logits", "z_loss")]
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
  with pytest.raises(ValueError, match=r"inside must be booleans of .* shape \(2, 3\), got int32"):
    losses.partition_kl(z, z, jnp.zeros((2, 3), jnp.int32))
  with pytest.raises(ValueError, match=r"where must have shape \(2,\), got \(3,\)"):
    losses.intra_class_correlation(z, z, where=jnp.ones(3))


@pytest.mark.parametrize(
  ("name", "hyper", "message"),
  [
    ("soft_target_kl", {"temperature": 0.0}, "temperature must be positive, got 0.0"),
    ("decoupled_kd", {"temperature": -1.0}, "temperature must be positive, got -1.0"),
    ("one_for_all", {"power": 0}, "power must be positive, got 0"),
    ("transformed_teacher", {"power": 0.0}, "power must be positive, got 0.0"),
    ("refined_kd", {"target_temperature": 0}, "target_temperature must be positive, got 0"),
    ("generalized_decoupled_kd", {"top": 0}, "top=0"),
    ("generalized_jsd", {"beta": 1.5}, r"beta must be in \[0, 1\], got 1.5"),
    ("skew_kl", {"skew": -0.1}, r"skew must be in \[0, 1\], got -0.1"),
    ("skew_reverse_kl", {"skew": float("nan")}, r"skew must be in \[0, 1\] and finite, got nan"),
    ("cross_entropy", {"label_smoothing": 2}, r"label_smoothing must be in \[0, 1\], got 2"),
  ],
)
def test_hyper_parameters_out_of_range_are_named(name, hyper, message):
  with pytest.raises(ValueError, match=message):
    call(name, jnp.zeros((2, 3)), jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32), **hyper)


@pytest.mark.parametrize("soft", [False, True])
def test_the_derivative_of_cross_entropy_is_that_of_autodiff(soft):
  """Of a masked class and of a label that names none too; once, twice, forward and backward."""
  with jax.enable_x64(True):
    z = jnp.asarray(random_logits(3, (4, K))).at[1, 2].set(-jnp.inf)
    labels = jnp.array([0, 4, K, 2])
    if soft:
      labels = jnp.asarray(softmax(random_logits(4, (4, K)))).at[1, 2].set(0)

    def plain(z, smoothing, labels):
      targets = labels if soft else jax.nn.one_hot(labels, K, dtype=z.dtype)
      valid = jnp.isfinite(z)
      shares = valid / jnp.sum(valid, axis=-1, keepdims=True)
      targets = (1 - smoothing) * targets + smoothing * shares
      low = jnp.where(valid, jnp.where(valid, z, 0), -1e30)
      return -jnp.sum(targets * jax.nn.log_softmax(low), axis=-1)

    def ours(z, smoothing, labels):
      return losses.cross_entropy(z, labels, label_smoothing=smoothing)

    @functools.partial(jax.jit, static_argnums=0)
    def of(loss, z, labels):
      def total(*args):  # each row has a cotangent of its own
        return jnp.sum(jnp.square(loss(*args)))

      given, along = (
        (z, jnp.float64(0.1), labels),
        jnp.cos(jnp.arange(z.size * 1.0)).reshape(z.shape),
      )
      return (
        loss(*given),
        jax.grad(total, (0, 1, 2) if soft else (0, 1))(*given),
        jax.jvp(lambda z: loss(z, *given[1:]), (z,), (along,)),
        jax.hessian(total)(*given),
        jax.jacrev(jax.grad(total))(*given),
      )

    for found, wanted in zip(
      *(jax.tree.leaves(of(f, z, labels)) for f in (ours, plain)), strict=True
    ):
      np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)
