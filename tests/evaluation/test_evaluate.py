"""Models on a whole split: those of several seeds side by side, teachers, what does not fit."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxdistill import data, evaluation, networks, teachers, train
from jaxdistill.types import Model
from small_networks import dense, untyped

NETWORK = dense(5)


class Decomposed(nn.Module):
  """Holds an operation whose cost is in no jaxpr."""

  @nn.compact
  def __call__(self, x):
    logits = nn.Dense(3)(x)
    return jnp.fft.fft(logits).real


@pytest.fixture(scope="module")
def batches():
  rng = np.random.default_rng(0)
  inputs, labels = rng.normal(size=(21, 4)).astype(np.float32), rng.integers(0, 3, 21)
  return data.evaluation_batches(data.from_arrays(inputs, labels), batch_size=8)


@pytest.fixture(scope="module")
def several():
  keys = jax.random.split(jax.random.key(0), 3)
  return Model(NETWORK, jax.vmap(NETWORK.init, (0, None))(keys, jnp.zeros((1, 4))), 3)


@pytest.mark.slow
def test_students_of_convolutions_that_lie_on_two_devices_are_each_of_them():
  # Under vmap these are convolutions in groups, at which XLA's partitioner fails.
  convolutions = nn.Sequential([nn.Conv(2, (3, 3)), nn.relu, nn.Conv(3, (1, 1))])
  network = networks.linen(convolutions)
  rng = np.random.default_rng(0)
  images, masks = rng.normal(size=(6, 4, 4, 1)), rng.integers(0, 3, (6, 4, 4))
  examples = data.from_arrays(images.astype(np.float32), masks)
  batches = data.evaluation_batches(examples, batch_size=4)
  keys = jax.random.split(jax.random.key(0), 4)
  variables = jax.vmap(network.init, (0, None))(keys, jnp.zeros((1, 4, 4, 1)))
  over = jax.sharding.NamedSharding(train.data_parallel(), jax.sharding.PartitionSpec(train.AXIS))
  model = Model(network, jax.device_put(variables, over), 4)
  task = evaluation.tasks.dense()
  found = evaluation.evaluate(model, batches, task=task)
  for s in range(4):
    one = Model(network, jax.tree.map(lambda leaf, s=s: np.asarray(leaf[s]), variables))
    alone = evaluation.evaluate(one, batches, task=task)
    for name, value in alone.items():
      np.testing.assert_allclose(found[name][s], value, rtol=1e-5)


@pytest.mark.slow
def test_several_seeds_are_each_of_them(batches, several):
  each = several.unstack()
  teacher = teachers.ensemble(each[:2])
  found, answers = evaluation.examine(several, batches, teacher=teacher)
  assert answers.predicted.shape == (3, 21)
  for s, model in enumerate(each):
    alone, its = evaluation.examine(model, batches, teacher=teacher)
    np.testing.assert_array_equal(answers.predicted[s], its.predicted[0])
    for name, value in evaluation.evaluate(model, batches, teacher=teacher).items():
      # The same float32 sums by other programs.
      np.testing.assert_allclose(found[name][s] if name != "examples" else 21, value, rtol=1e-5)
      np.testing.assert_allclose(alone[name], value, rtol=1e-6)
  validated = evaluation.validator(batches)(several)
  np.testing.assert_allclose(validated["nll"], found["nll"], rtol=1e-6)


def test_a_teacher_is_evaluated_as_its_model(batches, several):
  model = several.unstack()[0]
  found, same = (
    evaluation.evaluate(one, batches, teacher=teachers.frozen(model))
    for one in (model, teachers.frozen(model))
  )
  assert found == same
  assert found["agreement"] == 1


def test_costs_of_a_model_of_several_seeds_are_those_of_one(batches, several):
  model = several.unstack()[0]
  made = [
    evaluation.costs(one, batches, seconds=0.01) for one in (several, model, teachers.frozen(model))
  ]
  for name in ("parameters", "bytes", "flops", "throughput_batch"):
    assert made[0][name] == made[1][name] == made[2][name]


def test_what_needs_labels_is_absent_without_them(batches, several):
  teacher = teachers.frozen(several.unstack()[0])
  unknown = dataclasses.replace(batches, labelled=np.zeros_like(batches.labelled))
  assert evaluation.evaluate(several, unknown) == {}
  with pytest.raises(ValueError, match="no example of batches has a label"):
    evaluation.validator(unknown)  # before a run, not at its first validation
  # Whatever stands where a label would: nobody looks at it.
  for labels in (batches.labels, np.full((3, 8, 3), 0.5)):
    found, answers = evaluation.examine(
      several, dataclasses.replace(unknown, labels=labels), teacher=teacher
    )
    assert found.keys() == {"agreement", "kl"}
    assert found["agreement"][0] == 1
    assert np.isfinite([*found.values()]).all()
    assert answers.predicted.shape == (3, 0)


def test_numbers_that_a_cost_has_not_are_absent(batches):
  network = networks.linen(Decomposed())
  made = Model(network, network.init(jax.random.key(0), jnp.zeros((1, 4))))
  found = evaluation.costs(made, batches, seconds=0.01)
  assert "flops" not in found
  assert None not in found.values()


@pytest.mark.parametrize(
  ("labels", "error", "match"),
  [
    (lambda b: b.labels.astype(np.float32), TypeError, "whole numbers .*3, 8.* got .*float32"),
    (lambda b: np.eye(3)[b.labels], TypeError, r"whole numbers .*got .*3, 8, 3"),
    (lambda b: b.labels - 1, ValueError, "the label -1 and the network puts out 3 classes"),
    (lambda b: b.labels + 1, ValueError, "the label 3 and the network puts out 3 classes"),
  ],
)
def test_labels_that_are_no_classes_are_refused(batches, several, labels, error, match):
  odd = dataclasses.replace(batches, labels=labels(batches))
  for call in (evaluation.evaluate, evaluation.examine, lambda m, b: evaluation.validator(b)(m)):
    with untyped(), pytest.raises(error, match=match):
      call(several, odd)


@pytest.mark.parametrize(
  ("call", "error", "match"),
  [
    (lambda m, b: evaluation.evaluate(NETWORK, b), TypeError, "must be a Model"),
    (lambda m, b: evaluation.evaluate(m, b, teacher=m), TypeError, r"teachers\.frozen\(model\)"),
    (lambda m, b: evaluation.evaluate(m, 3), TypeError, "what data.evaluation_batches makes"),
    (lambda m, b: evaluation.validator(m), TypeError, "what data.evaluation_batches makes"),
    (lambda m, b: evaluation.costs(NETWORK, b), TypeError, "must be a Model"),
    (
      lambda m, b: evaluation.evaluate(Model(NETWORK, m.variables), b),
      ValueError,
      r"do not fit the network, with seeds=None.*seeds=S",
    ),
  ],
)
def test_what_does_not_fit_says_so(batches, several, call, error, match):
  with untyped(), pytest.raises(error, match=match):
    call(several, batches)


@pytest.mark.slow
def test_a_model_on_one_device_meets_batches_that_are_cut_over_two(batches, several):
  """As where both lie together, to rounding: the model is copied to where the batches are."""
  mesh = train.data_parallel(jax.devices()[:2])
  cut = jax.device_put(batches, NamedSharding(mesh, PartitionSpec(None, "data")))
  for device in jax.devices()[:2]:
    home = Model(several.network, jax.device_put(several.variables, device), several.seeds)
    teacher = teachers.frozen(home.instance(1))
    found = evaluation.evaluate(home, cut, teacher=teacher)
    # A teacher on one device, a model on both.
    spread = jax.device_put(several.variables, NamedSharding(mesh, PartitionSpec()))
    mixed = evaluation.evaluate(Model(several.network, spread, several.seeds), cut, teacher=teacher)
    told = evaluation.evaluate(home, evaluation.taught(teacher, cut))
    whole = evaluation.evaluate(several, batches, teacher=teachers.frozen(several.instance(1)))
    for one in (found, mixed, told):
      assert set(one) == set(whole)
      for name, value in whole.items():
        np.testing.assert_allclose(one[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_what_lies_on_other_devices_comes_to_the_variables(batches, several):
  """Inputs to a model, a batch to a teacher, and members of an ensemble to the largest of them."""
  first, second = jax.devices()[:2]
  mesh = NamedSharding(train.data_parallel([first, second]), PartitionSpec())
  one, batch = several.instance(0), jax.tree.map(lambda leaf: leaf[0], batches)
  want = np.asarray(one(batch).logits)
  on_both, on_second = jax.device_put(one, mesh), jax.device_put(one, second)
  for model, away in ((on_both, first), (on_second, first), (on_second, mesh)):
    there = jax.device_put(batch, away)
    home = jax.tree.leaves(model)[0].sharding.device_set
    for asked in (model, teachers.frozen(model), teachers.ensemble([model, one, model])):
      found = asked(there).logits
      assert found.sharding.device_set == home
      np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-6)
  # Each where it is, and what they say side by side where the model is.
  measured = evaluation.evaluate(on_second, batches, teacher=teachers.frozen(on_both))
  assert measured["agreement"] == 1
