"""CRLD and MLKD of two views, against what they are in float64, written anew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from jaxdistill import recipes
from jaxdistill.types import Outputs, make_batch

RNG = np.random.default_rng(0)
B, K = 5, 4
LABELS = np.array([0, 3, 1, 2, 0])
LOGITS = {(side, look): 4 * RNG.normal(size=(B, K)) for side in "st" for look in ("weak", "strong")}
BATCH = make_batch(jnp.ones((B, 1)), jnp.asarray(LABELS), labelled=jnp.array([1.0, 1, 1, 0, 1]))
KEY = jax.random.key(0)


def outputs(side):
  weak, strong = (jnp.asarray(LOGITS[side, look], jnp.float32) for look in ("weak", "strong"))
  return Outputs(weak, {"strong/logits": strong})


def kl(ours, theirs, temperature):
  p, q = (log_softmax(LOGITS[one] / temperature, axis=1) for one in (theirs, ours))
  return temperature**2 * np.sum(np.exp(p) * (p - q), axis=1)


def run(objective, student=None, teacher=None):
  return objective.apply(
    {}, {}, student or outputs("s"), teacher or outputs("t"), BATCH, key=KEY, **objective.hyper
  )[0]


def ce(look):
  return -log_softmax(LOGITS["s", look], axis=1)[np.arange(B), LABELS]


@pytest.mark.parametrize("thresholds", [(0.8, 0.9), (0.7, 0.8)])
def test_crld(thresholds):
  weak, strong = thresholds
  terms = run(recipes.crld(weak_threshold=weak, strong_threshold=strong))
  sure = [
    softmax(LOGITS["t", look], axis=1).max(1) >= least
    for look, least in (("weak", weak), ("strong", strong))
  ]
  within = sum(kl(("s", look), ("t", look), 4.0) for look in ("weak", "strong"))
  across = kl(("s", "strong"), ("t", "weak"), 4.0) + kl(("s", "weak"), ("t", "strong"), 4.0)
  want = 2.0 * sure[0] * within + 0.5 * sure[1] * across
  assert all(np.sum(one) > 0 for one in sure)
  assert not all(np.all(one) for one in sure)
  np.testing.assert_allclose(terms["views"].values, want, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(terms["labels"].values, ce("weak") + ce("strong"), rtol=1e-5)
  np.testing.assert_array_equal(terms["labels"].where, BATCH.labelled)
  assert terms["labels"].weight == 1.0
  assert set(run(recipes.crld(hard_weight=None))) == {"views"}


def test_mlkd_of_two_views_has_the_strong_ones_labels_and_soft_targets():
  both, one = run(recipes.mlkd(two_views=True)), run(recipes.mlkd())
  assert set(both) - set(one) == {"strong"}
  for name in set(one) - {"labels"}:
    np.testing.assert_array_equal(one[name].values, both[name].values)
  want = sum(kl(("s", "strong"), ("t", "strong"), t) for t in (4.0, 3.0, 5.0, 2.0, 6.0))
  np.testing.assert_allclose(both["strong"].values, want, rtol=1e-5)
  np.testing.assert_allclose(both["labels"].values, ce("weak") + ce("strong"), rtol=1e-5)
  np.testing.assert_allclose(one["labels"].values, ce("weak"), rtol=1e-5)
  assert (both["strong"].weight, both["labels"].weight) == (0.9, 0.1)
  sharp = run(recipes.mlkd(two_views=True, standardize=True))
  assert not np.allclose(sharp["strong"].values, want)


@pytest.mark.parametrize("objective", [recipes.crld(), recipes.mlkd(two_views=True)])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_network_that_saw_one_view_is_named(objective, side):
  alone = Outputs(jnp.zeros((B, K)))
  with pytest.raises(ValueError, match=f"the {side} saw one view .* recipes.with_views"):
    run(objective, **{side: alone})
