"""The loop: devices, pmap, seeds, resuming, and what goes wrong."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import networks
from jaxdistill import data, evaluate, losses, mesh, recipes, teachers, train
from jaxdistill.checkpoint import Checkpoints
from jaxdistill.stops import Intervals
from jaxdistill.types import Term

STEPS = 8


def examples(size=48, dtype=np.float32, seed=0):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, 3, size)
  inputs = rng.normal(size=(size, 4)) + np.eye(3, 4)[labels]
  return data.from_arrays(inputs.astype(dtype), labels, num_classes=3)


def source(data_seed=0, batch_size=8, **options):
  return data.on_device(examples(**options), batch_size=batch_size, data_seed=data_seed)


def a_teacher(width=7):
  network = networks.dense(width)
  return teachers.frozen(network), network.init(jax.random.key(9), jnp.zeros((1, 4)))


def distil(*, student=None, objective=None, steps=STEPS, devices=2, dispatch=None, **options):
  teacher, variables = a_teacher()
  options.setdefault("data", source())
  options.setdefault("progress", None)
  options.setdefault("optimizer", optax.adam(1e-2))
  options.setdefault("teacher", teacher)
  options.setdefault("teacher_variables", variables)
  return train.fit(
    networks.dense(5) if student is None else student,
    recipes.combine(recipes.kd(), recipes.hint("mid", "mid")) if objective is None else objective,
    steps=steps,
    dispatch=dispatch or mesh.with_jit(mesh.data_parallel(jax.devices()[:devices])),
    **options,
  )


def assert_close(first, second, *, tolerance):
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def assert_same_bits(first, second):
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def differ(first, second, *, tolerance):
  pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
  return any(not np.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in pairs)


def relational(student, teacher, batch):
  """A loss that relates examples: the Gram matrices of two feature maps."""
  s, t = student.features["mid"], teacher.features["mid"]
  gram = (s @ s.T) / s.shape[1] - (t @ t.T) / t.shape[1]
  return {"relation": Term(jnp.mean(gram**2, axis=1))}


@pytest.mark.parametrize("norm", [False, True])
def test_one_device_is_two_devices_under_jit(norm):
  # BatchNorm and losses between examples see the global batch, so the count changes no more than
  # the order of additions: in float64 that is below 1e-12 a step; eight steps stay under 1e-9.
  with jax.enable_x64(True):
    options = {
      "student": networks.dense(5, norm=norm, param_dtype=jnp.float64),
      "objective": recipes.combine(recipes.kd(), relational),
      "data": source(dtype=np.float64),
    }
    one, two = distil(devices=1, **options), distil(devices=2, **options)
    assert jax.tree.leaves(one.variables["params"])[0].dtype == jnp.float64
  assert_close(one.variables, two.variables, tolerance=1e-9)
  moved = distil(devices=1, steps=1)
  assert differ(one.variables["params"], moved.variables["params"], tolerance=1e-3)


def test_pmap_is_jit_without_state_across_examples():
  # float32 Adam: a gradient's last bit moves a parameter by up to the learning rate's share of it.
  jitted, mapped = distil(), distil(dispatch=mesh.with_pmap())
  assert_close(jitted.variables, mapped.variables, tolerance=1e-4)
  for line, other in zip(jitted.history, mapped.history, strict=True):
    for name in ("loss", "soft", "labels", "hint", "accuracy"):
      assert line[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5)


def test_the_limit_of_pmap_batchnorm_sees_its_share_unless_it_has_the_axis():
  def run(dispatch, axis_name=None):
    student = networks.dense(5, norm=True, axis_name=axis_name)
    return distil(student=student, dispatch=dispatch, optimizer=optax.sgd(0.1)).variables

  jitted = run(mesh.with_jit())
  # The axis exists only inside pmap; init runs outside of it, with the same parameters.
  with_axis = run(mesh.with_pmap(), axis_name=mesh.AXIS)
  without = run(mesh.with_pmap())
  assert_close(jitted, with_axis, tolerance=1e-5)  # float32, eight steps of SGD
  assert differ(jitted, without, tolerance=1e-3)


def test_the_limit_of_pmap_relations_see_their_share():
  def run(dispatch):
    return distil(objective=relational, dispatch=dispatch, optimizer=optax.sgd(0.1)).variables

  assert differ(run(mesh.with_jit()), run(mesh.with_pmap()), tolerance=1e-3)


@pytest.mark.device
@pytest.mark.parametrize(("seeds_by", "scan"), [("vmap", True), ("unroll", False)])
def test_every_seed_of_one_program_is_the_run_alone(seeds_by, scan):
  seeds = (3, 11)
  together = distil(seed=seeds, data=[source(s) for s in seeds], seeds_by=seeds_by, scan=scan)
  for i, seed in enumerate(seeds):
    alone = distil(seed=seed, data=source(seed))
    mine = jax.tree.map(lambda leaf, i=i: leaf[i], together.variables)
    assert_close(mine, alone.variables, tolerance=1e-5)  # float32, eight steps
  assert differ(*teachers.unstack(together.variables), tolerance=1e-2)


@pytest.mark.parametrize("dispatch", [mesh.with_jit, mesh.with_pmap])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, dispatch):
  student = networks.dense(5, norm=True, dropout=0.3)
  options = {"student": student, "dispatch": dispatch(), "log_every": 3, "validate_every": 4}
  whole = distil(folder=tmp_path / "whole", **options)

  class KilledError(Exception):
    pass

  def kill(step, record):
    if step == 7:
      raise KilledError

  with pytest.raises(KilledError):
    distil(folder=tmp_path / "killed", callback=kill, **options)
  with Checkpoints(tmp_path / "killed" / "checkpoints") as saved:
    assert saved.latest() == 4
  resumed = distil(folder=tmp_path / "killed", **options)
  assert_same_bits(
    jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, whole.state),
    jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, resumed.state),
  )
  lines = [json.loads(t) for t in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == [3, 4, 7, 8]
  for line, other in zip(lines, whole.history, strict=True):
    assert line["loss"] == other["loss"]
  # A run that is complete is not trained again.
  again = distil(folder=tmp_path / "killed", callback=kill, **options)
  assert_same_bits(again.variables, whole.variables)


def is_key(x):
  return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


@pytest.mark.device
def test_the_teacher_is_in_no_checkpoint_and_unchanged(tmp_path):
  teacher, variables = a_teacher()
  before = jax.tree.map(np.array, variables)
  distil(teacher=teacher, teacher_variables=variables, folder=tmp_path)
  assert_same_bits(before, variables)
  with Checkpoints(tmp_path / "checkpoints") as saved:
    items = saved.restore(saved.latest())
  assert set(items) == {"student", "objective", "optimizer", "progress"}
  kernels = [leaf.shape for leaf in jax.tree.leaves(items)]
  assert (4, 7) not in kernels  # the teacher's first layer


def test_the_best_and_the_last_checkpoints_are_kept(tmp_path):
  scores = iter([0.1, 0.9, 0.2, 0.3])
  distil(
    folder=tmp_path,
    validate=lambda variables: {"accuracy": next(scores)},
    validate_every=2,
    keep_last=1,
  )
  with Checkpoints(tmp_path / "checkpoints") as saved:
    assert saved.steps() == [4, 8]
    assert saved.best() == 4


def test_a_folder_of_another_configuration_is_refused(tmp_path):
  distil(folder=tmp_path, config={"temperature": 4})
  with pytest.raises(ValueError, match="temperature: 4 there, 2 now"):
    distil(folder=tmp_path, config={"temperature": 2})
  teacher, variables = a_teacher()
  other = jax.tree.map(lambda leaf: leaf + 1, variables)
  with pytest.raises(ValueError, match="teacher: "):
    distil(folder=tmp_path, config={"temperature": 4}, teacher=teacher, teacher_variables=other)


def test_a_term_that_is_not_finite_stops_at_its_step(tmp_path):
  def explodes(student, teacher, batch, *, scale=1.0):
    values = losses.cross_entropy(student.logits, batch.labels)
    return {"labels": Term(values), "odd": Term(values * jnp.where(scale > 5, jnp.nan, 1.0))}

  with pytest.raises(FloatingPointError, match="term 'odd' is not finite at step 7"):
    distil(
      objective=explodes,
      hyper={"scale": lambda step: step.astype(jnp.float32) if hasattr(step, "astype") else step},
      folder=tmp_path,
      checkpoint_every=4,
      log_every=2,
    )
  with Checkpoints(tmp_path / "checkpoints") as saved:
    assert saved.latest() == 4


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"data": lambda: source(batch_size=9)}, "batch_size=9 does not divide by the 2 devices"),
    ({"steps": 0}, "steps=0 must be at least 1"),
    ({"seed": ()}, "seed is an empty sequence"),
    ({"seed": (1, 2, 3), "data": lambda: [source(1), source(2)]}, "2 sources for 3 seeds"),
    ({"seed": (1, 2), "seeds_by": "pmap"}, "seeds_by='pmap'"),
    ({"checkpoint_every": 0}, "checkpoint_every=0"),
    ({"tensorboard": True}, "tensorboard=True writes into the run's folder"),
    ({"teacher": None}, "needs a teacher, and there is none|teacher is None"),
  ],
)
def test_bad_arguments_say_what_to_do(options, message):
  made = {name: value() if callable(value) else value for name, value in options.items()}
  with pytest.raises(ValueError, match=message):
    distil(**made)


def test_a_mesh_without_devices_is_refused():
  with pytest.raises(ValueError, match="devices is empty"):
    mesh.data_parallel([])


def test_schedules_and_tensorboard_are_logged(tmp_path):
  fitted = distil(
    objective=recipes.kd(),
    hyper={"temperature": optax.linear_schedule(4.0, 2.0, STEPS)},
    folder=tmp_path,
    tensorboard=True,
    log_every=4,
  )
  assert [line["temperature"] for line in fitted.history] == pytest.approx(
    [3.25, 2.25, 2.25], abs=1
  )
  assert list((tmp_path / "tensorboard").glob("events*"))


def test_padded_evaluation_is_ragged_evaluation():
  held_out = examples(size=21)
  network = networks.dense(5)
  variables = network.init(jax.random.key(0), jnp.zeros((1, 4)))
  predict = evaluate.predictor(network)
  teacher, taught = a_teacher()
  reference = (evaluate.teacher_predictor(teacher), taught)
  whole = evaluate.evaluate(
    predict, variables, data.evaluation_batches(held_out, batch_size=21), reference=reference
  )
  padded = evaluate.evaluate(
    predict, variables, data.evaluation_batches(held_out, batch_size=8), reference=reference
  )
  assert whole.keys() == padded.keys()
  for name, value in whole.items():
    # Sums of 21 float32 numbers in another order.
    np.testing.assert_allclose(padded[name], value, rtol=1e-6, err_msg=name)
  logits = np.asarray(network.apply(variables, held_out.inputs, train=False, key=None)[0].logits)
  assert whole["accuracy"] == np.mean(logits.argmax(1) == held_out.labels)


def test_evaluation_over_seeds_is_each_alone():
  network, held_out = networks.dense(5, norm=True), examples(size=21)
  batches = data.evaluation_batches(held_out, batch_size=8)
  init = jax.vmap(lambda key: network.init(key, jnp.zeros((1, 4))))
  stacked = init(jax.random.split(jax.random.key(0), 3))
  predict = evaluate.predictor(network)
  together = evaluate.evaluate(predict, stacked, batches, stacked=True)
  for i, variables in enumerate(teachers.unstack(stacked)):
    alone = evaluate.evaluate(predict, variables, batches)
    assert together["nll"][i] == pytest.approx(float(alone["nll"]), rel=1e-6)
  assert dataclasses.is_dataclass(batches)


def test_chunks_have_few_lengths():
  """Each length compiles once: a log grid that drifts against the epochs makes a hundred."""
  for epoch in (703, 781):
    every = Intervals.of(240 * epoch, epoch, None, None, None)
    at, lengths = 0, set()
    while at < every.steps:
      end = every.next_stop(at)
      lengths.add(end - at)
      at = end
    assert len(lengths) == 2


def test_a_gradient_that_is_not_finite_is_not_saved(tmp_path):
  def kink(student, teacher, batch, *, on=0.0):
    # sqrt's gradient at 0 is infinite, and 0 * inf is NaN, while the value is finite.
    trouble = jnp.sqrt(jnp.where(on > 3, 0.0, 1.0) * (1 + jnp.sum(student.logits**2, axis=-1)))
    return {"labels": Term(losses.cross_entropy(student.logits, batch.labels) + trouble)}

  options = {"objective": kink, "hyper": {"on": lambda step: step * 1.0}, "folder": tmp_path}
  with pytest.raises(FloatingPointError, match="params is not finite after step 5"):
    distil(checkpoint_every=1, **options)
  with Checkpoints(tmp_path / "checkpoints") as saved:
    assert saved.latest() == 4


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"data": lambda: source(batch_size=4)}, "data: .*'batch_size': 8"),
    ({"student": lambda: networks.dense(6)}, "student: "),
    ({"hyper": lambda: {"temperature": 2.0}}, "hyper: "),
  ],
)
def test_another_run_is_not_taken_for_this_one(tmp_path, changed, message):
  distil(folder=tmp_path, steps=2)
  with pytest.raises(ValueError, match=message):
    distil(folder=tmp_path, steps=2, **{name: make() for name, make in changed.items()})


def test_an_unfinished_run_is_no_teacher(tmp_path):
  class KilledError(Exception):
    pass

  def kill(step, record):
    if step == 4:
      raise KilledError

  with pytest.raises(KilledError):
    distil(folder=tmp_path, log_every=2, validate_every=2, callback=kill)
  with pytest.raises(ValueError, match="stands at step 2 of 8.*step=2"):
    teachers.restore(tmp_path)
  assert "params" in teachers.restore(tmp_path, step=2)


def test_a_selection_that_validation_does_not_return_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"select='accuracy' is not among .*\['acc'\]"):
    distil(folder=tmp_path, validate=lambda variables: {"acc": 1.0})
