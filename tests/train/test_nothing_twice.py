"""What `fit` runs and compiles once: a teacher over the examples, chunks of all lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill import data, evaluation, networks, recipes, train
from jaxdistill.networks import models
from jaxdistill.types import Outputs, Teacher
from small_networks import compiled

SIZE = 24


def source(augmentation=data.identity):
  random = np.random.default_rng(0)
  images = random.normal(size=(SIZE, 4, 4, 1)).astype(np.float32)
  examples = data.from_arrays(images, random.integers(0, 3, SIZE), num_classes=3)
  return data.on_device(examples, batch_size=8, data_seed=0, augmentation=augmentation)


def network(*widths):
  return networks.linen(models.MLP(widths=widths, num_classes=3), features=["hidden1"])


def counting(calls, *, mixes=False):
  """A teacher that notes how many examples it is shown."""
  inner = network(16)
  variables = inner.init(jax.random.key(1), jnp.zeros((1, 4, 4, 1)))

  def apply(variables, batch):
    jax.debug.callback(lambda index: calls.append(len(index)), batch.index)
    outputs = inner.apply(variables, batch.inputs, train=False, key=None)[0]
    logits = outputs.logits
    if mixes:  # as BatchNorm on the batch's own statistics does
      logits = logits - jnp.mean(logits, axis=0, keepdims=True)
    return Outputs(logits, outputs.features)

  return Teacher(variables, apply)


def trained(teacher, given, steps=12, **options):
  objective = recipes.combine(recipes.kd(), recipes.hint("hidden1", "hidden1"))
  return train.fit(
    network(4),
    objective,
    data=given,
    optimizer=optax.sgd(0.1),
    steps=steps,
    teacher=teacher,
    run=train.Run(progress=None),
    **options,
  )


@pytest.mark.slow
@pytest.mark.parametrize("dispatch", [train.with_jit, train.with_pmap])
def test_a_teacher_run_once_gives_what_it_gives_in_every_step(dispatch):
  calls, in_step = [], []
  once = trained(counting(calls), source(), dispatch=dispatch())
  jax.effects_barrier()
  # The set once, and two batches by which it is known to answer to an example alone.
  assert calls == [SIZE] * 3
  same = data.Augmentation(lambda x, key: x, None)  # an augmentation, for all that is known of it
  each = trained(counting(in_step), source(same), dispatch=dispatch())
  jax.effects_barrier()
  assert sum(in_step) >= 12 * 8
  for a, b in zip(jax.tree.leaves(once.variables), jax.tree.leaves(each.variables), strict=True):
    # Twelve steps in float32, of programs that the compiler fuses each in its own way.
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_teacher_whose_answers_depend_on_the_batch_is_run_in_every_step():
  calls = []
  trained(counting(calls, mixes=True), source())
  jax.effects_barrier()
  assert sum(calls) >= 12 * 8


def test_a_run_shorter_than_the_examples_asks_of_those_it_sees_alone():
  calls = []
  trained(counting(calls), source(), steps=2)
  jax.effects_barrier()
  assert sum(calls) == 2 * 8


def on_labels(watch):
  return train.fit(
    network(5),
    recipes.labels(),
    data=source(),
    optimizer=optax.sgd(0.1),
    steps=17,
    watch=watch,
    run=train.Run(progress=None),
  )


def test_chunks_of_all_lengths_are_one_program():
  steps = []
  watch = train.Watch(
    log_every=5,
    validate_every=7,
    validate=lambda model: {},
    callback=lambda at, _: steps.append(at),
  )
  with compiled() as names:
    made = on_labels(watch)
  assert steps == [5, 7, 12, 14, 17]
  assert [name for name in names if "chunk" in name] == ["chunk"]
  whole = on_labels(train.Watch(log_every=17))
  for a, b in zip(jax.tree.leaves(made.variables), jax.tree.leaves(whole.variables), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow_but("0")
@pytest.mark.parametrize("seed", [0, [0, 1]])
def test_whole_chunks_know_their_turns_on_a_gpu(monkeypatch, seed):
  def made():
    return train.fit(
      network(5),
      recipes.labels(),
      data=source(),
      optimizer=optax.sgd(0.1),
      steps=12,
      seed=seed,
      watch=train.Watch(log_every=5),
      run=train.Run(progress=None),
    )

  counted = made()
  monkeypatch.setattr("jaxdistill.train._program.turns_must_be_known", lambda: True)
  with compiled() as names:
    known = made()
  # Twice five steps by a program of five turns, and two by the one whose turns are data.
  assert sorted(name for name in names if name in ("chunk", "whole")) == ["whole"]  # chunk is there
  pairs = zip(jax.tree.leaves(counted.variables), jax.tree.leaves(known.variables), strict=True)
  for a, b in pairs:
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("seed", [0, [0, 1, 2]])
def test_what_is_compiled_for_validations_beside_the_steps_serves_them_all(devices, seed):
  split = data.from_arrays(np.ones((5, 4, 4, 1), np.float32), np.zeros(5, int), num_classes=3)
  calls = []
  validator = evaluation.validator(data.evaluation_batches(split, batch_size=4))
  dispatch = train.with_jit(train.data_parallel(jax.devices()[:devices]))
  seeds = seed if isinstance(seed, list) else [seed]
  with compiled() as names:
    train.fit(
      network(7),
      recipes.labels(),
      data=[source() for _ in seeds] if isinstance(seed, list) else source(),
      optimizer=optax.sgd(0.1),
      steps=9,
      seed=seed,
      dispatch=dispatch,
      watch=train.Watch(validator, validate_every=4, callback=lambda *_: calls.append(len(names))),
      run=train.Run(progress=None),
    )
  assert [name for name in names if "evaluation" in name] == ["evaluation"]
  assert len(calls) == 5
  assert calls[1] == len(names)


@pytest.mark.parametrize(
  ("conv", "form"), [("lax", (False, "unroll")), ("patches", (True, "vmap"))]
)
def test_convolutions_stay_out_of_a_cpus_loop_unless_asked(conv, form):
  module = models.ConvNet(channels=(2,), strides=(1,), dense=4, num_classes=3, conv=conv)
  plan = train.Plan.of(
    networks.linen(module),
    recipes.labels(),
    data=source(),
    optimizer=optax.sgd(0.1),
    steps=2,
    seed=(0, 1),
  )
  program = train.Program(plan, train.with_jit(), longest=1)
  assert (program.scan, program.seeds_by) == form
  asked = train.Program(plan, train.with_jit(scan=True, seeds_by="vmap"), longest=1)
  assert (asked.scan, asked.seeds_by) == (True, "vmap")
