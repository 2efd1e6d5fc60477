"""A training run: several seeds, devices, folders, micro-batches, averages, starts, SIGTERM."""

import dataclasses
import functools
import gc
import json
import os
import shutil
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import small_networks
from jaxdistill import data, evaluation, losses, recipes, runs, teachers, train
from jaxdistill.runs import Checkpoints
from jaxdistill.train import (
  Intervals,
  _loop,
  _program,
  deployed_variables,
  init_state,
  make_step,
  optimizers,
)
from jaxdistill.types import Model, Objective, Term, as_objective, make_batch

STEPS = 8


def examples(size=48, dtype=np.float32, seed=0):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, 3, size)
  inputs = rng.normal(size=(size, 4)) + np.eye(3, 4)[labels]
  return data.from_arrays(inputs.astype(dtype), labels, num_classes=3)


def source(data_seed=0, batch_size=8, **options):
  return data.on_device(examples(**options), batch_size=batch_size, data_seed=data_seed)


def a_model(width=7):
  return small_networks.model(small_networks.dense(width), 1, 4, key=jax.random.key(9))


def a_teacher(width=7):
  return teachers.frozen(a_model(width))


def distil(*, student=None, objective=None, devices=2, dispatch=None, form=None, **options):
  mesh = train.data_parallel(jax.devices()[:devices])
  return small_networks.fit(
    small_networks.dense(5) if student is None else student,
    recipes.combine(recipes.kd(), recipes.hint("mid", "mid")) if objective is None else objective,
    **{
      "data": source(),
      "optimizer": optax.adam(1e-2),
      "steps": STEPS,
      "teacher": a_teacher(),
      "dispatch": dispatch or train.with_jit(mesh, **(form or {})),
      **options,
    },
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


@pytest.mark.slow_but("True")
@pytest.mark.parametrize("norm", [False, True])
def test_one_device_is_two_devices_under_jit(norm):
  # BatchNorm and losses between examples see the global batch, so the count changes no more than
  # the order of additions: in float64 that is below 1e-12 a step; eight steps stay under 1e-9.
  with jax.enable_x64(True):
    options = {
      "student": small_networks.dense(5, norm=norm, param_dtype=jnp.float64),
      "objective": recipes.combine(recipes.kd(), relational),
      "data": source(dtype=np.float64),
    }
    one, two = distil(devices=1, **options), distil(devices=2, **options)
    assert jax.tree.leaves(one.variables["params"])[0].dtype == jnp.float64
  assert_close(one.variables, two.variables, tolerance=1e-9)
  moved = distil(devices=1, steps=1)
  assert differ(one.variables["params"], moved.variables["params"], tolerance=1e-3)


def test_pmap_is_jit_without_state_across_examples():
  # Labels lie unevenly: a mean of the devices' means is another number than the batch's mean.
  known = np.arange(48) % 5 < 2
  shown = data.on_device(examples(), batch_size=8, data_seed=0, labelled=known)
  # float32 Adam: a gradient's last bit moves a parameter by up to the learning rate's share of it.
  jitted, mapped = distil(data=shown), distil(data=shown, dispatch=train.with_pmap())
  assert_close(jitted.variables, mapped.variables, tolerance=1e-4)
  for line, other in zip(jitted.history, mapped.history, strict=True):
    for name in ("loss", "soft", "labels", "hint", "accuracy"):
      assert line[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("seed", [0, (0, 1)])
def test_labels_that_nobody_may_use_are_said_before_the_first_step(monkeypatch, seed):
  class BegunError(Exception):
    pass

  def begin(*_):
    raise BegunError

  monkeypatch.setattr(_program.Program, "initial", begin)
  nobody = data.on_device(examples(), batch_size=8, data_seed=0, labelled=np.zeros(48))
  with pytest.raises(ValueError, match="no label that may be used"):
    distil(objective=recipes.labels(), data=nobody, teacher=None, seed=seed)
  with pytest.raises(BegunError):  # the teacher knows something of all of them
    distil(objective=recipes.kd(), data=nobody, seed=seed)


def test_an_epoch_in_which_nothing_counted_is_said_once():
  def line(log, count, end):
    sums = {"a": (np.zeros(1), np.full(1, count)), "loss": (np.zeros(1), np.ones(1))}
    log.write(sums, end - 1, end)

  def log(at=0):
    told = {"schedules": {}, "progress": None, "tracked": None, "callback": None}
    return _loop.Log(None, steps=8, at=at, epoch=2, examples=1, select="accuracy", **told)

  one, other, later = log(), log(), log(at=4)
  line(one, 0.0, 1)  # a batch in which nothing counts is no fault
  with pytest.warns(UserWarning, match="no term of the objective has counted an example"):
    line(one, 0.0, 2)
  line(one, 0.0, 3)
  for count, end in ((1.0, 1), (0.0, 2)):
    line(other, count, end)
  line(later, 0.0, 6)  # what was before is not known here


def test_a_schedule_hides_nothing_of_a_line():
  schedules = {name: lambda step: 7.0 for name in ("a", "step", "temperature")}
  told = {"schedules": schedules, "progress": None, "tracked": None, "callback": None}
  log = _loop.Log(None, steps=8, at=0, epoch=2, examples=1, select="accuracy", **told)
  log.write({name: (np.full(1, 2.0), np.ones(1)) for name in ("a", "loss")}, 0, 1)
  line = log.history[0]
  assert (line["a"], line["step"], line["temperature"]) == (2.0, 1, 7.0)
  assert line["schedule/a"] == line["schedule/step"] == 7.0


def test_a_long_chunk_is_several_lines_of_the_log():
  class Recorder:
    def __init__(self):
      self.told = {}

    def log(self, step, numbers):
      self.told[step] = numbers

  recorder, quiet = Recorder(), {"schedules": {}, "progress": None, "callback": None}
  log = _loop.Log(
    None, steps=9, at=2, epoch=2, examples=1, line=3, select="accuracy", tracked=recorder, **quiet
  )
  total, count = np.array([[2.0, 4, 0, 9, 1, 2, 3], [1, 1, 1, 1, 1, 1, 1]]), np.ones(7)
  count[2] = 0.0
  log.write({"loss": (total, count)}, 2, 9, {"accuracy": np.array([0.5, 0.25])})
  # Seven steps in three lines, of as many steps as can be: 2 to 4, to 6, to 9.
  lines = {line["step"]: line for line in log.history}
  assert {step: line["loss"] for step, line in lines.items()} == {
    4: [3.0, 1.0],
    6: [9.0, 2.0],  # of the two steps, one counted nothing
    9: [2.0, 1.0],
  }
  assert [step for step, line in lines.items() if "validation/accuracy" in line] == [9]
  assert {line["epoch"] for line in lines.values()} == {2.0, 3.0, 4.5}
  assert list(recorder.told) == list(lines)


@pytest.mark.slow
def test_the_limit_of_pmap_batchnorm_sees_its_share_unless_it_has_the_axis():
  def run(dispatch, axis_name=None):
    student = small_networks.dense(5, norm=True, axis_name=axis_name)
    return distil(student=student, dispatch=dispatch, optimizer=optax.sgd(0.1)).variables

  jitted = run(train.with_jit())
  # The axis exists only inside pmap; init runs outside of it, with the same parameters.
  with_axis = run(train.with_pmap(), axis_name=train.AXIS)
  without = run(train.with_pmap())
  assert_close(jitted, with_axis, tolerance=1e-5)  # float32, eight steps of SGD
  assert differ(jitted, without, tolerance=1e-3)


@pytest.mark.slow
def test_the_limit_of_pmap_relations_see_their_share():
  def run(dispatch):
    return distil(objective=relational, dispatch=dispatch, optimizer=optax.sgd(0.1)).variables

  assert differ(run(train.with_jit()), run(train.with_pmap()), tolerance=1e-3)


@pytest.mark.slow
@pytest.mark.device
@pytest.mark.parametrize(("seeds_by", "scan"), [("vmap", True), ("unroll", False)])
def test_every_seed_of_one_program_is_the_run_alone(seeds_by, scan):
  seeds = (3, 11)
  form = {"seeds_by": seeds_by, "scan": scan}
  together = distil(seed=seeds, data=[source(s) for s in seeds], form=form)
  assert together.seeds == 2
  for seed, mine in zip(seeds, together.unstack(), strict=True):
    alone = distil(seed=seed, data=source(seed))
    assert_close(mine.variables, alone.variables, tolerance=1e-5)  # float32, eight steps
  assert differ(*together.unstack(), tolerance=1e-2)


@pytest.mark.slow_but("with_jit")
@pytest.mark.parametrize("dispatch", [train.with_jit, train.with_pmap])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, dispatch):
  student = small_networks.dense(5, norm=True, dropout=0.3)
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
  teacher = a_teacher()
  before = jax.tree.map(np.array, teacher)
  distil(teacher=teacher, folder=tmp_path)
  assert_same_bits(before, teacher)
  with Checkpoints(tmp_path / "checkpoints") as saved:
    items = saved.restore(saved.latest())
  assert set(items) == {"student", "objective", "optimizer", "progress"}
  kernels = [leaf.shape for leaf in jax.tree.leaves(items)]
  assert (4, 7) not in kernels  # the teacher's first layer


def test_the_best_and_the_last_checkpoints_are_kept(tmp_path):
  scores = iter([0.1, 0.9, 0.2, 0.3])
  distil(
    folder=tmp_path,
    validate=lambda model: {"accuracy": next(scores)},
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
  other = jax.tree.map(lambda leaf: leaf + 1, a_teacher())
  with pytest.raises(ValueError, match="teacher: "):
    distil(folder=tmp_path, config={"temperature": 4}, teacher=other)


def test_a_term_that_is_not_finite_stops_at_its_step(tmp_path):
  def explodes(student, teacher, batch, *, scale=1.0):
    values = losses.cross_entropy(student.logits, batch.labels)
    return {"labels": Term(values), "odd": Term(values * jnp.where(scale > 5, jnp.nan, 1.0))}

  with pytest.raises(FloatingPointError, match="term 'odd' is not finite at step 7"):
    distil(
      objective=as_objective(explodes, scale=lambda step: jnp.float32(1) * step),
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
    ({"steps": 0}, "steps=0 must be in 1"),
    ({"seed": ()}, "seed is an empty sequence"),
    ({"seed": (1, 2, 3), "data": lambda: [source(1), source(2)]}, "2 sources for 3 seeds"),
    ({"form": {"seeds_by": "pmap"}}, "seeds_by='pmap'"),
    ({"checkpoint_every": 0}, "checkpoint_every=0"),
    ({"trackers": lambda: [runs.TensorBoard()]}, "TensorBoard, which writes into the run's folder"),
    ({"teacher": None}, "needs a teacher, and there is none|teacher is None"),
  ],
)
def test_bad_arguments_say_what_to_do(options, message):
  made = {name: value() if callable(value) else value for name, value in options.items()}
  with pytest.raises(ValueError, match=message):
    distil(**made)


def test_a_mesh_without_devices_is_refused():
  with pytest.raises(ValueError, match="devices is empty"):
    train.data_parallel([])


@pytest.mark.slow
def test_schedules_and_tensorboard_are_logged(tmp_path):
  fitted = distil(
    objective=recipes.kd(temperature=optax.linear_schedule(4.0, 2.0, STEPS)),
    folder=tmp_path,
    trackers=[runs.TensorBoard()],
    log_every=4,
  )
  assert [line["temperature"] for line in fitted.history] == pytest.approx(
    [3.25, 2.25, 2.25], abs=1
  )
  assert list((tmp_path / "tensorboard").glob("events*"))


def test_padded_evaluation_is_ragged_evaluation():
  held_out = examples(size=21)
  model = small_networks.model(small_networks.dense(5), 1, 4, key=jax.random.key(0))
  whole, padded = (
    evaluation.evaluate(
      model, data.evaluation_batches(held_out, batch_size=size), teacher=a_teacher()
    )
    for size in (21, 8)
  )
  assert whole.keys() == padded.keys()
  for name, value in whole.items():
    # Sums of 21 float32 numbers in another order.
    np.testing.assert_allclose(padded[name], value, rtol=1e-6, err_msg=name)
  logits = np.asarray(model(held_out.inputs).logits)
  assert whole["accuracy"] == np.mean(logits.argmax(1) == held_out.labels)


@pytest.mark.slow
def test_evaluation_over_seeds_is_each_alone():
  network, held_out = small_networks.dense(5, norm=True), examples(size=21)
  batches = data.evaluation_batches(held_out, batch_size=8)
  init = jax.vmap(lambda key: network.init(key, jnp.zeros((1, 4))))
  stacked = Model(network, init(jax.random.split(jax.random.key(0), 3)), seeds=3)
  together = evaluation.evaluate(stacked, batches)
  for i, model in enumerate(stacked.unstack()):
    alone = evaluation.evaluate(model, batches)
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

  options = {"objective": as_objective(kink, on=lambda step: step * 1.0), "folder": tmp_path}
  with pytest.raises(FloatingPointError, match="params is not finite after step 5"):
    distil(checkpoint_every=1, **options)
  with Checkpoints(tmp_path / "checkpoints") as saved:
    assert saved.latest() == 4


@pytest.mark.slow
@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"data": lambda: source(batch_size=4)}, "data.batch_size: 8 there, 4 now"),
    ({"student": lambda: small_networks.dense(6)}, r"student.shapes.Dense_0/bias: \[5\] there"),
    ({"objective": lambda: recipes.kd(temperature=2.0)}, "objective.temperature: 4.0 there"),
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
  # What a callback ended was saved on the way out, at the step of which it was told.
  with pytest.raises(ValueError, match="stands at step 4 of 8.*step=4"):
    teachers.restore(tmp_path, small_networks.dense(5))
  assert "params" in teachers.restore(tmp_path, small_networks.dense(5), step=2).variables


def test_a_selection_that_validation_does_not_return_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"select='accuracy' is not among .*\['acc'\]"):
    distil(folder=tmp_path, validate=lambda model: {"acc": 1.0})


def unlabelled(size=24, dtype=np.float32):
  """A batch whose labels lie unevenly over any cut into micro-batches."""
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 3, size).astype(np.int32)
  known = (np.arange(size) < size // 3).astype(np.float32)
  inputs = jnp.asarray(rng.normal(size=(size, 4)), dtype)
  return make_batch(inputs, jnp.asarray(np.where(known, labels, 0)), labelled=jnp.asarray(known))


def prepared(batch, *, student, objective, rate=0.5, **options):
  """A state at step 0, the step, and the teacher."""
  teacher, optimizer, average = a_teacher(), optax.sgd(rate), options.get("average") is not None
  given = (jax.random.key(0), student, objective, optimizer, batch)
  state = init_state(*given, teacher=teacher, average=average)
  return state, make_step(student, objective, optimizer, **options), teacher


def one_step(batch, **options):
  state, step, teacher = prepared(batch, **options)
  return state, *jax.jit(step)(state, teacher, batch)


@pytest.mark.device
@pytest.mark.parametrize(("unroll", "parts"), [(False, 8), (True, 3)])
def test_accumulated_is_whole_in_float64(unroll, parts):
  with jax.enable_x64(True):
    options = {
      "student": small_networks.dense(5, param_dtype=jnp.float64),
      "objective": recipes.combine(recipes.kd(), recipes.hint("mid", "mid")),
    }
    batch = unlabelled(dtype=np.float64)
    _, whole, sums = one_step(batch, **options)
    _, accumulated, others = one_step(batch, accumulate=parts, unroll=unroll, **options)
  # Sums of 24 numbers in another order: 1e-15 each. A third of the labels are in the first rows,
  # so an average of averages would differ in the first digit.
  assert_close(whole.params, accumulated.params, tolerance=1e-12)
  # The projector's parameters, and masks and weights, are float32.
  assert_close(whole.objective_params, accumulated.objective_params, tolerance=1e-6)
  assert_close(sums, others, tolerance=1e-6)


@pytest.mark.slow
def test_the_denominators_cost_no_forward_pass():
  """Masks depend on the batch alone: nothing of the networks is left in the program for them."""
  batch, student = unlabelled(), small_networks.dense(64)
  flops = {}
  for parts in (1, 2):
    state, step, teacher = prepared(
      batch, student=student, objective=recipes.kd(), rate=0.1, accumulate=parts, unroll=True
    )
    analysis = jax.jit(step).lower(state, teacher, batch).compile().cost_analysis()
    flops[parts] = analysis["flops"]
  # Adding up gradients and looping cost something; a second forward pass would be a third more.
  assert flops[2] < 1.15 * flops[1]


def test_accumulation_keeps_the_rows_of_every_device_and_works_under_pmap():
  whole, jitted = distil(), distil(accumulate=2)
  mapped = distil(accumulate=2, dispatch=train.with_pmap())
  # float32 Adam: a gradient's last bit moves a parameter by up to the learning rate's share of it.
  assert_close(whole.variables, jitted.variables, tolerance=1e-4)
  assert_close(whole.variables, mapped.variables, tolerance=1e-4)
  # Adam does not see a gradient that is twice as large; the sums do.
  for line, *others in zip(whole.history, jitted.history, mapped.history, strict=True):
    for name in ("loss", "soft", "labels", "hint", "accuracy"):
      for other in others:
        assert line[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_the_limit_of_accumulation_batchnorm_and_relations_see_the_micro_batch():
  batch = unlabelled()

  def relational(student, teacher, batch):
    s = student.features["mid"]
    return {"relation": Term(jnp.mean((s @ s.T) ** 2, axis=1))}

  for student, objective in (
    (small_networks.dense(5, norm=True), recipes.kd()),
    (small_networks.dense(5), relational),
  ):
    _, whole, _ = one_step(batch, student=student, objective=objective)
    _, parts, _ = one_step(batch, student=student, objective=objective, accumulate=3)
    assert differ(whole.params, parts.params, tolerance=1e-4)


def test_micro_batches_move_batchnorm_one_after_another():
  student = small_networks.dense(5, norm=True)
  batch = unlabelled()
  state, after, _ = one_step(batch, student=student, objective=recipes.kd(), accumulate=2)
  # By hand: momentum 0.9, twice, over the even rows and then over the odd ones.
  kernel, bias = (np.asarray(state.params["Dense_0"][n], np.float64) for n in ("kernel", "bias"))
  hidden = np.asarray(batch.inputs, np.float64) @ kernel + bias
  mean = np.zeros(5)
  for rows in (hidden[0::2], hidden[1::2]):
    mean = 0.9 * mean + 0.1 * rows.mean(axis=0)
  np.testing.assert_allclose(after.model_state["batch_stats"]["BatchNorm_0"]["mean"], mean, 1e-5)


def test_the_moving_average_is_by_hand():
  batch, objective = unlabelled(), recipes.kd()
  state, step, teacher = prepared(
    batch, student=small_networks.dense(5, norm=True), objective=objective, rate=0.3, average=0.3
  )
  step = jax.jit(step)
  average = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.average)
  for number in range(5):
    state, _ = step(state, teacher, batch)
    decay = min(0.3, (1 + number) / (10 + number))  # 0.1, 0.18, 0.25, 0.3, 0.3
    now = {"params": state.params, **state.model_state}
    average = jax.tree.map(
      lambda a, leaf, d=decay: d * a + (1 - d) * np.asarray(leaf, np.float64), average, now
    )
  assert_close(state.average, average, tolerance=1e-5)  # float32
  assert deployed_variables(state, objective) is state.average


@pytest.mark.device
def test_a_run_with_an_average_resumes_with_the_same_bits(tmp_path):
  student = small_networks.dense(5, norm=True, dropout=0.3)
  options = {"student": student, "average": 0.9, "log_every": 2, "validate_every": 4}
  whole = distil(folder=tmp_path / "whole", **options)

  class KilledError(Exception):
    pass

  def kill(step, record):
    if step == 6:
      raise KilledError

  with pytest.raises(KilledError):
    distil(folder=tmp_path / "killed", callback=kill, **options)
  resumed = distil(folder=tmp_path / "killed", **options)
  assert_same_bits(whole.variables, resumed.variables)
  assert_same_bits(whole.state.params, resumed.state.params)
  restored = teachers.restore(tmp_path / "killed", student)
  assert_same_bits(restored.variables, whole.variables)
  assert differ(whole.state.params, whole.variables["params"], tolerance=1e-4)


def test_a_student_starts_from_layers_of_the_teacher():
  def look(student, teacher, batch):
    return {"labels": Term(losses.cross_entropy(student.logits, batch.labels))}

  taught = a_model(width=5)
  variables = taught.variables
  start = Model(small_networks.dense(5), teachers.layers(variables, {"Dense_0": "Dense_0"}))
  options = {
    "student": start,
    "teacher": teachers.frozen(taught),
    "objective": look,
    "optimizer": optax.sgd(0.0),
    "steps": 1,
  }
  fitted = distil(**options)
  assert_same_bits(fitted.variables["params"]["Dense_0"], variables["params"]["Dense_0"])
  assert differ(fitted.variables["params"]["Dense_1"], variables["params"]["Dense_1"], tolerance=0)
  for one in distil(seed=(1, 2), **options).unstack():
    assert_same_bits(one.variables["params"]["Dense_0"], variables["params"]["Dense_0"])


@pytest.mark.parametrize(
  ("start", "message"),
  [
    ({"params": {"Dense_7": {}}}, r"start has \['Dense_7'\] at .*'Dense_0', 'Dense_1'"),
    ({"params": {"Dense_0": {"bias": np.zeros(7)}}}, r"start has \(7,\) at .*there is \(5,\)"),
    ({"params": {"Dense_0": np.zeros(5)}}, r"start has \['\(5,\)'\] at .*there is \['bias'"),
    ({"params": {"Dense_0": {"bias": {"x": np.zeros(5)}}}}, r"start has {'x': \(5,\)} at"),
  ],
)
def test_a_start_that_does_not_fit_is_refused(start, message):
  with pytest.raises(ValueError, match=message):
    distil(student=Model(small_networks.dense(5), start))


def test_a_transform_is_what_both_networks_see_and_has_a_key_of_its_own():
  seen = []

  def disturb(key, batch):
    return batch.replace(inputs=batch.inputs + jax.random.normal(key, batch.inputs.shape))

  def look(student, teacher, batch):
    jax.debug.callback(lambda x: seen.append(np.asarray(x)), batch.inputs)
    s, t = student.logits, teacher.logits
    return {"soft": Term(losses.soft_target_kl(s, t, temperature=2.0))}

  options = {
    "student": a_model(width=5),
    "teacher": a_teacher(width=5),
    "objective": look,
    "optimizer": optax.sgd(0.0),
    "log_every": 1,
    "steps": 2,
    "devices": 1,
  }
  # Teacher and student are the same network: whatever both see, they agree on it.
  fitted = distil(data=data.transformed(source(), disturb), **options)
  jax.effects_barrier()
  assert all(line["soft"] == pytest.approx(0, abs=1e-6) for line in fitted.history)
  assert not np.allclose(seen[0], seen[1])


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"accumulate": 0}, "accumulate=0 must be at least 1"),
    ({"accumulate": 3}, "batch_size=8 does not divide into accumulate=3 micro-batches over 2"),
    ({"accumulate": 8}, "take a multiple of 16"),
    ({"average": 1.0}, r"average=1.0 must be None or a decay in \[0, 1\)"),
  ],
)
def test_bad_options_say_what_to_do(options, message):
  with pytest.raises(ValueError, match=message):
    distil(**options)


@pytest.mark.slow
def test_clipping_in_the_optimiser_bounds_the_whole_gradient():
  moved = distil(optimizer=optimizers.sgd(1.0, steps=1, momentum=0.0, weight_decay=0.0), steps=1)
  options = {"momentum": 0.0, "weight_decay": 0.0, "clip_norm": 1e-3}
  clipped = distil(optimizer=optimizers.sgd(1.0, steps=1, **options), steps=1)
  start = distil(optimizer=optax.sgd(0.0), steps=1)

  def length(fitted):
    trained = (fitted.state.params, fitted.state.objective_params)
    begun = (start.state.params, start.state.objective_params)
    gaps = jax.tree.map(lambda a, b: np.sum((np.asarray(a) - np.asarray(b)) ** 2), trained, begun)
    return np.sqrt(sum(jax.tree.leaves(gaps)))

  assert length(clipped) == pytest.approx(1e-3, rel=1e-3)  # differences of float32 parameters
  assert length(moved) > 0.01


@pytest.mark.device
def test_sigterm_saves_and_leaves_and_the_run_goes_on_with_the_same_bits(tmp_path):
  whole = distil(folder=tmp_path / "whole", log_every=1, validate_every=8)
  former = signal.getsignal(signal.SIGTERM)

  def terminate(step, record):
    if step == 3:
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(0.05)  # the handler runs between two bytecodes

  with pytest.raises(train.Stopped, match=r"asked to stop.*step \d of 8") as stopped:
    distil(folder=tmp_path / "stopped", log_every=1, validate_every=8, callback=terminate)
  assert stopped.value.code == 143
  assert signal.getsignal(signal.SIGTERM) is former
  with Checkpoints(tmp_path / "stopped" / "checkpoints") as saved:
    assert saved.latest() in (4, 5)  # the numbers are looked at one chunk late
  resumed = distil(folder=tmp_path / "stopped", log_every=1, validate_every=8)
  assert_same_bits(whole.variables, resumed.variables)
  assert [line["step"] for line in resumed.history] == list(range(1, 9))


def slowly(step, record):
  time.sleep(0.2)


@pytest.mark.slow
def test_a_run_stops_when_its_time_is_over_and_a_copy_goes_on_elsewhere(tmp_path):
  """Saved and left as by SIGTERM; what goes on is the folder's content, wherever it lies."""
  whole = distil(folder=tmp_path / "whole", log_every=2, validate_every=8)
  options = {"log_every": 2, "validate_every": 8, "callback": slowly}
  # The clock runs from the call on, compilation included, so that one chunk is trained at least.
  with pytest.raises(train.Stopped, match=r"step \d of 8") as stopped:
    distil(folder=tmp_path / "here", stop_after=1e-3, **options)
  assert stopped.value.code == 143
  with Checkpoints(tmp_path / "here" / "checkpoints") as saved:
    assert 1 <= saved.latest() < 8
  shutil.copytree(tmp_path / "here", tmp_path / "elsewhere" / "copy")
  shutil.rmtree(tmp_path / "here")
  for _ in range(4):  # a chunk a time, however slow the machine is
    try:
      resumed = distil(folder=tmp_path / "elsewhere" / "copy", stop_after=1e-3, **options)
      break
    except train.Stopped:
      pass
  assert_same_bits(whole.variables, resumed.variables)
  assert [line["step"] for line in resumed.history] == [2, 4, 6, 8]


@pytest.mark.slow
def test_time_that_is_not_over_stops_nothing(tmp_path):
  handler, threads = signal.getsignal(signal.SIGTERM), threading.active_count()
  with train.time_limit(None), _loop.time_limit(1000):
    fitted = distil(folder=tmp_path / "a", stop_after=1000)
  assert fitted.history[-1]["step"] == 8
  assert signal.getsignal(signal.SIGTERM) is handler
  assert threading.active_count() == threads


@pytest.mark.slow
def test_a_time_limit_of_a_script_stops_what_is_under_way(tmp_path):
  """One limit over several trainings: it ends the second, which goes on."""
  whole = distil(folder=tmp_path / "whole", log_every=1)
  handler = signal.getsignal(signal.SIGTERM)
  began = threading.Event()

  def wait(step, record):
    if began.is_set() and step == 2:
      time.sleep(1.5)  # the limit is over meanwhile

  def script():
    with train.time_limit(None if not began.is_set() else 1.0):
      distil(folder=tmp_path / "first", log_every=1)
      return distil(folder=tmp_path / "second", seed=1, log_every=1, callback=wait)

  distil(folder=tmp_path / "first", log_every=1)
  began.set()
  with pytest.raises(train.Stopped):
    script()
  assert signal.getsignal(signal.SIGTERM) is handler
  began.clear()
  again = script()
  assert again.history[-1]["step"] == 8
  alone = distil(folder=tmp_path / "alone", seed=1, log_every=1)
  assert_same_bits(again.variables, alone.variables)
  assert differ(whole.variables, alone.variables, tolerance=1e-6)


@pytest.mark.slow
def test_a_signal_in_the_last_chunk_is_not_lost(tmp_path):
  """The run is whole, its student is saved, and the script does not begin what comes next."""

  def terminate(step, record):
    if step == 8:
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(0.05)  # the handler runs between two bytecodes

  went_on = []

  def script():
    with train.time_limit(1000):
      distil(folder=tmp_path / "run", log_every=1, callback=terminate)
      went_on.append(True)

  with pytest.raises(train.Stopped):
    script()
  assert not went_on
  with Checkpoints(tmp_path / "run" / "checkpoints") as saved:
    assert saved.latest() == 8
  assert (tmp_path / "run" / "student" / "manifest.json").is_file()


class Swallows:
  """A destructor in which SIGTERM arrives: what its handler raises is printed and forgotten."""

  def __del__(self):
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(100):  # the handler runs between two bytecodes
      pass


@pytest.mark.slow_but("the end-destructor", "the end-collector")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("where", ["destructor", "collector"])
@pytest.mark.parametrize("then", ["the end", "a wait", "a run", "a run without a folder"])
def test_a_swallowed_stop_is_heard_by_what_comes_next(tmp_path, monkeypatch, where, then):
  went_on = []
  if "run" in then:
    monkeypatch.setattr(_loop, "_AGAIN", 1000)  # or the signal that is sent again ends it before

  def swallow(phase, info):
    gc.callbacks.remove(swallow)
    Swallows.__del__(None)

  def script():
    with train.time_limit(1000):
      if where == "destructor":
        Swallows()
      else:
        gc.callbacks.append(swallow)
        gc.collect()
      went_on.append(True)
      if then == "a wait":
        time.sleep(20)
      elif then != "the end":
        distil(
          folder=tmp_path / "run" if then == "a run" else None,
          log_every=1,
          validate_every=8,
          callback=slowly,
        )

  begun = time.monotonic()
  with pytest.raises(
    train.Stopped, match=r"at step \d of 8" if "run" in then else "start it again"
  ):
    script()
  assert went_on  # it was swallowed
  if then == "a wait":
    assert time.monotonic() - begun < 10
  if then == "a run":
    with Checkpoints(tmp_path / "run" / "checkpoints") as saved:
      assert saved.latest() in (1, 2)


@pytest.fixture
def heard():
  """Ctrl-C is heard, which a shell's background job, as the tests may be one, is not told of."""
  former = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, former)


@pytest.mark.slow
@pytest.mark.usefixtures("heard")
def test_ctrl_c_saves_too_and_the_second_leaves_at_once(tmp_path):
  whole = distil(folder=tmp_path / "whole", log_every=1, validate_every=8)
  former = signal.getsignal(signal.SIGINT)

  def interrupt(step, record, *, twice):
    if step == 3:
      for _ in range(1 + twice):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)  # the handler runs between two bytecodes

  for twice in (True, False):
    with pytest.raises(KeyboardInterrupt) as left:
      distil(
        folder=tmp_path / "run",
        log_every=1,
        validate_every=8,
        callback=functools.partial(interrupt, twice=twice),
      )
    assert signal.getsignal(signal.SIGINT) is former
    with Checkpoints(tmp_path / "run" / "checkpoints") as saved:
      assert saved.latest() in ((None,) if twice else (4, 5))
    assert isinstance(left.value, train.Stopped) is not twice
  assert left.value.code == 130
  assert str(tmp_path / "run") in str(left.value)
  resumed = distil(folder=tmp_path / "run", log_every=1, validate_every=8)
  assert_same_bits(whole.variables, resumed.variables)


@pytest.mark.slow
def test_ctrl_c_that_is_ignored_stays_so(tmp_path):
  """As in a shell's background, where a terminal's Ctrl-C is for somebody else."""
  former = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    fitted = distil(
      folder=tmp_path, callback=lambda step, record: signal.raise_signal(signal.SIGINT)
    )
  finally:
    signal.signal(signal.SIGINT, former)
  assert fitted.history[-1]["step"] == 8


@pytest.mark.slow
def test_of_two_jobs_in_one_folder_the_second_is_refused_before_work(tmp_path):
  def second(step, record):
    if step == 4:
      with pytest.raises(FileExistsError, match=f"process {os.getpid()} on .* another folder"):
        distil(folder=tmp_path / "run")

  distil(folder=tmp_path / "run", callback=second, log_every=4)
  assert not (tmp_path / "run" / "lock").exists()


def test_a_time_limit_between_two_trainings_leaves_at_once():
  with pytest.raises(train.Stopped, match="time limit"), train.time_limit(0.05):
    time.sleep(10)


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan")])
def test_a_time_limit_that_is_none_is_refused(tmp_path, seconds):
  with pytest.raises(ValueError, match="seconds"), train.time_limit(seconds):
    pass
  with pytest.raises(ValueError, match="stop_after"):
    distil(folder=tmp_path / "run", stop_after=seconds)
  assert not (tmp_path / "run").exists()


def test_a_run_that_saves_nothing_has_no_time_to_stop_at():
  with pytest.raises(ValueError, match="folder"):
    distil(stop_after=10)


@pytest.mark.slow
def test_sources_of_seeds_may_differ_in_their_arrays():
  """Other labels for each seed: the arrays that differ get an axis over seeds."""
  masks = [np.arange(48) % 4 == i for i in range(2)]

  def of(seed):
    return data.on_device(examples(), batch_size=8, data_seed=seed, labelled=masks[seed])

  together = distil(seed=(0, 1), data=[of(0), of(1)])
  unrolled = distil(seed=(0, 1), data=[of(0), of(1)], form={"seeds_by": "unroll"})
  for seed in (0, 1):
    alone = distil(seed=seed, data=of(seed))
    for several in (together, unrolled):
      mine = several.unstack()[seed]
      assert_close(mine.variables, alone.variables, tolerance=1e-5)  # float32, eight steps
  with pytest.raises(ValueError, match="differ in batch_size"):
    distil(seed=(0, 1), data=[source(0), source(1, batch_size=4)])


@pytest.mark.slow
def test_a_relative_folder_stays_where_it_was(tmp_path, monkeypatch):
  (tmp_path / "elsewhere").mkdir()
  monkeypatch.chdir(tmp_path)
  leave = lambda *_: os.chdir(tmp_path / "elsewhere")  # noqa: E731
  distil(folder="runs/a", checkpoint_every=2, log_every=1, callback=leave)
  assert (tmp_path / "runs/a/student/manifest.json").is_file()
  assert not list((tmp_path / "elsewhere").iterdir())


def test_what_no_example_counts_in_is_absent(tmp_path):
  rows = examples()
  unlabelled = data.on_device(data.from_arrays(rows.inputs, None), batch_size=8, data_seed=0)
  made = distil(data=unlabelled, objective=recipes.kd(hard_weight=0.1), log_every=2)
  assert all({"loss", "soft"} <= set(line) for line in made.history)
  assert not any({"accuracy", "labels"} & set(line) for line in made.history)
  # A chunk without a labelled example has no accuracy, and the next one has its own.
  labelled = np.zeros(48, np.float32)
  labelled[:4] = 1
  some = data.on_device(rows, batch_size=8, data_seed=0, labelled=labelled)
  made = distil(data=some, objective=recipes.kd(), log_every=1, steps=6)
  assert 0 < sum("accuracy" in line for line in made.history) < 6


def test_under_pmap_statistics_are_the_mean_of_the_shares():
  begun, shown = (
    small_networks.model(small_networks.dense(5, norm=True), 1, 4, key=jax.random.key(9)),
    source(),
  )
  batch = shown.cut(shown.shared, jax.tree.map(lambda leaf: leaf[0], shown.items(0, 1)))
  fitted = distil(
    student=begun, objective=recipes.labels(), teacher=None, steps=1, dispatch=train.with_pmap()
  )
  layer = jax.tree.map(lambda x: np.asarray(x, np.float64), begun.variables["params"]["Dense_0"])
  shares = (np.asarray(batch.inputs, np.float64) @ layer["kernel"] + layer["bias"]).reshape(2, 4, 5)
  stats = fitted.variables["batch_stats"]["BatchNorm_0"]
  # Momentum 0.9 from 0 and 1. The mean of the shares' variances is not the batch's variance.
  mean, variance = shares.mean(1).mean(0), shares.var(1).mean(0)
  np.testing.assert_allclose(stats["mean"], 0.1 * mean, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * variance, rtol=1e-5)
  assert not np.allclose(shares.var(1)[0], variance, rtol=1e-3)


def test_steps_devices_and_micro_batches_draw_each_for_itself():
  def init(key, student, teacher):
    return {}, {"moments": jnp.zeros(2), "last": jnp.zeros(2)}

  def apply(params, state, student, teacher, batch, *, key):
    drawn = jax.random.uniform(key)
    # What devices draw is averaged over them: E[x²] is E[x]² only where all drew the same.
    moments, last = jnp.stack([drawn, drawn**2]), jnp.stack([state["last"][1], drawn])
    values = losses.cross_entropy(student.logits, batch.labels)
    return {"labels": Term(values)}, {"moments": moments, "last": last}

  drawing = Objective(init=init, apply=apply)
  options = {"objective": drawing, "teacher": None, "steps": 1}
  mapped = distil(dispatch=train.with_pmap(), **options).state.objective_state["moments"]
  assert mapped[1] - mapped[0] ** 2 > 1e-5
  for given in ({"accumulate": 2}, {"steps": 2}):
    fitted = distil(devices=1, **{**options, **given})
    first, second = fitted.state.objective_state["last"]
    assert first != second
