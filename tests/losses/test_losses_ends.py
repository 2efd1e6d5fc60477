"""The losses at the ends: exact ties, equal rows, and numbers as large as float32 has."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses

MAX = np.finfo(np.float32).max


def gradient(function, *arrays):
  return jax.grad(lambda *a: jnp.sum(function(*a)))(*map(jnp.asarray, arrays))


def symmetric(function, student, teacher, step=1e-6):
  """Half of the two one-sided slopes, which at a kink is the gradient that PyTorch gives |x|."""
  slopes = np.zeros_like(student)
  for i in np.ndindex(student.shape):
    ends = [student.copy(), student.copy()]
    ends[0][i] += step
    ends[1][i] -= step
    up, down = (float(jnp.sum(function(end, teacher))) for end in ends)
    slopes[i] = (up - down) / (2 * step)
  return slopes


@pytest.mark.slow_but("total_variation-student0-teacher0")
@pytest.mark.parametrize(
  ("name", "student", "teacher"),
  [
    ("total_variation", [[0.0, 1.0, 2.0]], [[0.0, 1.0, 2.0]]),
    ("correlation_congruence", [[1.0, 2.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 5.0]]),
    ("factor_transfer", np.arange(8.0).reshape(1, 2, 2, 2), np.arange(8.0).reshape(1, 2, 2, 2)),
  ],
)
def test_at_a_tie_the_gradient_is_in_the_middle(name, student, teacher):
  function = getattr(losses, name)
  with jax.enable_x64(True):
    student, teacher = np.array(student), np.array(teacher)
    found = gradient(function, student, teacher)
    # A difference quotient over 2e-6 of a smooth function, up to its kink: errors of about 1e-6.
    np.testing.assert_allclose(found, symmetric(function, student, teacher), atol=1e-5)


LABELLED = ("decoupled_kd", "refined_kd", "normalized_kd", "one_for_all", "weighted_soft_labels")
LOGITS = {
  "cross_entropy": lambda s, t, **kw: losses.cross_entropy(s, jnp.array([0, 2, 1])),
  **{
    name: functools.partial(
      lambda function, s, t, **kw: function(s, t, jnp.array([0, 2, 1]), **kw),
      getattr(losses, name),
    )
    for name in LABELLED
  },
  "partition_kl": lambda s, t, **kw: losses.partition_kl(s, t, s > 0, **kw),
  "generalized_decoupled_kd": functools.partial(losses.generalized_decoupled_kd, top=2),
  "transformed_teacher": lambda s, t, temperature: losses.transformed_teacher(
    s, t, power=1 / temperature
  ),
  "weighted_transformed_teacher": lambda s, t, temperature: losses.weighted_transformed_teacher(
    s, t, power=1 / temperature
  ),
  **{
    name: getattr(losses, name)
    for name in (
      "batch_gram",
      "class_gram",
      "generalized_jsd",
      "inter_class_correlation",
      "intra_class_correlation",
      "reverse_kl",
      "skew_kl",
      "skew_reverse_kl",
      "soft_target_kl",
      "total_variation",
    )
  },
}


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1e-3, 4.0, 1e6])
@pytest.mark.parametrize("name", LOGITS)
def test_the_largest_floats_give_finite_values_and_gradients(name, temperature):
  rows = np.array([[MAX, 0, 0], [1, 0, -1], [MAX, -MAX, 0]], np.float32)
  for student, teacher in ((rows, rows[::-1]), (rows[[1, 1, 1]], rows), (rows, rows[[1, 1, 1]])):
    both = jax.value_and_grad(
      lambda s, t: jnp.sum(LOGITS[name](s, t, temperature=temperature)), argnums=(0, 1)
    )(jnp.asarray(student), jnp.asarray(teacher))
    for leaf in jax.tree.leaves(both):
      assert np.isfinite(leaf).all()


def test_z_scores_of_the_largest_floats():
  """What a scale does not change: (1, −1, 0) has the standard deviation 1."""
  z = jnp.array([[MAX, -MAX, 0.0]])
  np.testing.assert_allclose(losses.standardize_logits(z), [[1, -1, 0]], atol=1e-6)
  assert np.isfinite(gradient(losses.standardize_logits, z)).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_a_head_that_starts_at_zero_gets_no_gradient_from_a_ratio_of_nothing(dtype):
  """The formulas' own is 1e7 and more there, which float16 has not."""
  student = jnp.full((3, 7), 0.3, dtype)
  teacher = jnp.asarray(np.random.default_rng(0).normal(size=(3, 7)), dtype)
  weights = jnp.arange(21.0).reshape(3, 7)
  for function in (
    lambda s: losses.standardize_logits(s) * weights,
    lambda s: losses.inter_class_correlation(s, teacher),
    lambda s: losses.intra_class_correlation(s, teacher),
  ):
    np.testing.assert_array_equal(gradient(function, student), 0)


@pytest.mark.slow
def test_a_step_away_from_there_the_gradient_is_the_formulas():
  """Only what is exactly equal is left alone."""
  student = np.zeros((1, 4))
  student[0, 0] = 1e-3
  teacher = np.array([[1.0, 2.0, 0.0, -1.0]])
  with jax.enable_x64(True):
    found = gradient(losses.inter_class_correlation, student, teacher)
    expected = symmetric(losses.inter_class_correlation, student, teacher)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
  assert np.abs(found).max() > 100


def test_units_that_do_not_count_may_be_of_any_size():
  student, teacher = (np.array(x, np.float32).reshape(1, 1, 1, 2) for x in ([MAX, 0.5], [1, 1]))
  margin = jnp.full(2, -1.0)
  large = jnp.asarray(np.array([-MAX, 0.5], np.float32).reshape(1, 1, 1, 2))
  assert losses.activation_boundary(student, teacher).tolist() == [0.25]
  found = gradient(losses.activation_boundary, student, teacher)
  np.testing.assert_array_equal(np.ravel(found), [0, -1])
  off = jnp.asarray(np.array([-2, 1], np.float32).reshape(1, 1, 1, 2))
  assert losses.overhaul(large, off, margin=margin).tolist() == [0.25]
  found = gradient(lambda s: losses.overhaul(s, off, margin=margin), large)
  np.testing.assert_array_equal(np.ravel(found), [0, -1])


@pytest.mark.slow
def test_attention_of_huge_queries_is_finite():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 4)) * 1e20, jnp.float32)
  y = jnp.asarray(np.random.default_rng(1).normal(size=(1, 3, 4)), jnp.float32)
  for a, b in ((x, y), (y, x)):
    both = jax.value_and_grad(lambda s, t: losses.attention_relation(s, t, num_heads=2).sum())(a, b)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(both))


DIVERGENCES = ("soft_target_kl", "reverse_kl", "generalized_jsd", "skew_kl", "skew_reverse_kl")


@pytest.mark.slow
@pytest.mark.parametrize("apart", [1e-1, 1e-3, 1e-5, 1e-7, 0.0])
@pytest.mark.parametrize("name", [*DIVERGENCES, "decoupled_kd"])
def test_a_divergence_of_nearly_equal_logits_is_small_and_not_below_zero(name, apart):
  random = np.random.default_rng(0)
  teacher = random.normal(size=(64, 100)) * 5
  student = teacher + apart * random.normal(size=teacher.shape)
  labels = (jnp.asarray(random.integers(0, 100, 64)),) if name == "decoupled_kd" else ()
  function = getattr(losses, name)

  def values(dtype):
    return function(*(jnp.asarray(x, dtype) for x in (student, teacher)), *labels, temperature=20.0)

  made = values(jnp.float32)
  with jax.enable_x64(True):
    # In float64, of the logits as float32 rounds them.
    student, teacher = (x.astype(np.float32).astype(np.float64) for x in (student, teacher))
    exact = values(jnp.float64)
  assert float(jnp.min(made)) >= 0
  # Log-probabilities are rounded three times, by 6e-8 of up to 10, and the divergence, times the
  # squared temperature, is of the second order in that.
  np.testing.assert_allclose(made, exact, rtol=2e-2, atol=400 * (2e-6) ** 2)
  assert jnp.all(jnp.isfinite(gradient(lambda s, t: function(s, t, *labels), student, teacher)))


@pytest.mark.slow
def test_a_softmax_over_one_output_is_refused_by_every_loss_that_has_one():
  one, two = jnp.ones((4, 1)), jnp.ones((4, 2))
  labels = jnp.zeros(4, jnp.int32)
  labelled = (*LABELLED, "soft_label_weight")
  correlations = ("inter_class_correlation", "intra_class_correlation", "total_variation")
  correlations += ("class_gram", "batch_gram", "transformed_teacher", "generalized_decoupled_kd")
  for name in (*DIVERGENCES, *correlations, *labelled):
    function, rest = getattr(losses, name), (labels,) if name in labelled else ()
    assert jnp.all(jnp.isfinite(function(two, two, *rest)))
    with pytest.raises(ValueError, match=r"\(4, 1\) have one output"):
      function(one, one, *rest)
  for function in (losses.cross_entropy, lambda logits, _: losses.standardize_logits(logits)):
    with pytest.raises(ValueError, match=r"\(4, 1\) have one output"):
      function(one, labels)
  assert losses.logit_l2(one, 3 * one).tolist() == [4.0] * 4
