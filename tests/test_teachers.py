"""Teachers: frozen, combined, restored."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

import networks
from jaxdistill import capture, losses, teachers
from jaxdistill.types import make_batch

LOGITS = np.random.default_rng(0).normal(scale=3, size=(3, 4, 5))


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0], [0.0, 1.0, 1.0]])
@pytest.mark.parametrize("rule", teachers.RULES)
def test_rules_are_their_formulas(rule, weights):
  share = np.full(3, 1 / 3) if weights is None else np.asarray(weights) / np.sum(weights)
  share = share[:, None, None]
  log_p = special.log_softmax(LOGITS, axis=-1)
  expected = {
    "mean_logits": (share * LOGITS).sum(0),
    "log_mean_probability": np.log((share * np.exp(log_p)).sum(0)),
    "mean_log_probability": (share * log_p).sum(0),
  }[rule]
  combined = teachers.combine_logits(
    list(jnp.asarray(LOGITS, jnp.float32)), rule=rule, weights=weights
  )
  np.testing.assert_allclose(combined, expected, rtol=1e-5, atol=1e-5)  # float32


def test_members_are_combined_before_they_are_tempered():
  """The mean of the members' tempered probabilities is another number, and not the one meant."""
  members = list(jnp.asarray(LOGITS, jnp.float32))
  combined = teachers.combine_logits(members, rule="log_mean_probability")
  tempered = special.softmax(np.asarray(combined) / 4, axis=-1)
  np.testing.assert_allclose(
    tempered, special.softmax(np.log(special.softmax(LOGITS, -1).mean(0)) / 4, -1), rtol=1e-5
  )
  mean_of_tempered = special.softmax(LOGITS / 4, axis=-1).mean(0)
  assert np.abs(tempered - mean_of_tempered).max() > 0.02
  student = jnp.zeros((4, 5))
  value = losses.soft_target_kl(student, combined, temperature=4.0)
  by_hand = 16 * (tempered * (np.log(tempered) - np.log(1 / 5))).sum(-1)
  np.testing.assert_allclose(value, by_hand, rtol=1e-4)


@pytest.mark.parametrize("rule", teachers.RULES)
def test_a_class_that_all_members_exclude_stays_excluded(rule):
  members = [jnp.array([[1.0, -jnp.inf, 0.0]]), jnp.array([[0.0, -jnp.inf, 2.0]])]
  combined = teachers.combine_logits(members, rule=rule, weights=[1.0, 0.0])
  assert combined[0, 1] == -jnp.inf
  assert np.isfinite(combined[0, [0, 2]]).all()


def test_half_precision_members_are_combined_in_float32(strict_promotion):
  members = [jnp.ones((1, 3), jnp.bfloat16), jnp.ones((1, 3), jnp.float32)]
  for rule in teachers.RULES:
    assert teachers.combine_logits(members, rule=rule).dtype == jnp.float32


def test_an_ensemble_of_different_networks_has_every_members_features():
  members = [networks.dense(4), networks.dense(6, norm=True)]
  batch = make_batch(jnp.ones((2, 3)))
  variables = [m.init(jax.random.key(i), batch.inputs) for i, m in enumerate(members)]
  outputs = teachers.ensemble(members, rule="mean_logits", weights=[3, 1])(variables, batch)
  assert {n: f.shape for n, f in outputs.features.items()} == {"0/mid": (2, 4), "1/mid": (2, 6)}
  alone = [teachers.frozen(m)(v, batch).logits for m, v in zip(members, variables, strict=True)]
  np.testing.assert_allclose(outputs.logits, 0.75 * alone[0] + 0.25 * alone[1], rtol=1e-6)


def test_teachers_stop_gradients_and_run_in_inference_mode():
  class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x, *, train: bool):
      x = nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))
      return nn.Dropout(0.5, deterministic=not train)(x)

  network = capture.linen(Noisy())
  batch = make_batch(jnp.arange(6.0).reshape(2, 3))
  variables = network.init(jax.random.key(0), batch.inputs)
  teach = teachers.frozen(network)
  np.testing.assert_array_equal(teach(variables, batch).logits, teach(variables, batch).logits)
  grads = jax.grad(lambda v: jnp.sum(teach(v, batch).logits ** 2))(variables)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: teachers.ensemble([]), "members is empty"),
    (lambda: teachers.ensemble([networks.dense(3)], rule="mean"), "rule='mean' is unknown"),
    (lambda: teachers.ensemble([networks.dense(3)], weights=[1, 2]), r"shape \(2,\).*1 members"),
    (lambda: teachers.ensemble([networks.dense(3)], weights=[-1]), "not negative"),
    (lambda: teachers.combine_logits([]), "logits is empty"),
    (
      lambda: teachers.ensemble([networks.dense(3)] * 2)([{}], make_batch(jnp.ones((1, 2)))),
      "1 entries for 2 members",
    ),
  ],
)
def test_bad_ensembles_say_what_to_do(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_members_of_different_class_counts_are_refused():
  members = [networks.dense(3, classes=3), networks.dense(3, classes=4)]
  batch = make_batch(jnp.ones((2, 3)))
  variables = [m.init(jax.random.key(0), batch.inputs) for m in members]
  with pytest.raises(ValueError, match=r"different class counts: \[3, 4\]"):
    teachers.ensemble(members)(variables, batch)


def test_restoring_from_a_folder_without_a_run_says_so(tmp_path):
  with pytest.raises(FileNotFoundError, match="holds no checkpoints"):
    teachers.restore(tmp_path)
