"""The rest of training: micro-batches, moving averages, transforms, given starts, SIGTERM."""

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

import networks
from jaxdistill import losses, mesh, optimizers, recipes, teachers, train
from jaxdistill.checkpoint import Checkpoints
from jaxdistill.state import deployed_variables, init_state
from jaxdistill.step import make_step
from jaxdistill.types import Term, make_batch
from test_train import a_teacher, assert_close, assert_same_bits, differ, distil, source


def unlabelled(size=24, dtype=np.float32):
  """A batch whose labels lie unevenly over any cut into micro-batches."""
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 3, size).astype(np.int32)
  known = (np.arange(size) < size // 3).astype(np.float32)
  inputs = jnp.asarray(rng.normal(size=(size, 4)), dtype)
  return make_batch(inputs, jnp.asarray(np.where(known, labels, 0)), labelled=jnp.asarray(known))


def prepared(batch, *, student, objective, rate=0.5, **options):
  """A state at step 0, the step, and the teacher's variables."""
  network, variables = a_teacher()
  optimizer = optax.sgd(rate)
  state = init_state(
    jax.random.key(0),
    student,
    objective,
    optimizer,
    batch,
    teacher=network,
    teacher_variables=variables,
    average=options.get("average") is not None,
  )
  return state, make_step(student, network, objective, optimizer, **options), variables


def one_step(batch, **options):
  state, step, variables = prepared(batch, **options)
  return state, *jax.jit(step)(state, variables, batch)


@pytest.mark.device
@pytest.mark.parametrize(("unroll", "parts"), [(False, 8), (True, 3)])
def test_accumulated_is_whole_in_float64(unroll, parts):
  with jax.enable_x64(True):
    options = {
      "student": networks.dense(5, param_dtype=jnp.float64),
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


def test_the_denominators_cost_no_forward_pass():
  """Masks depend on the batch alone: nothing of the networks is left in the program for them."""
  batch, student = unlabelled(), networks.dense(64)
  flops = {}
  for parts in (1, 2):
    state, step, variables = prepared(
      batch, student=student, objective=recipes.kd(), rate=0.1, accumulate=parts, unroll=True
    )
    analysis = jax.jit(step).lower(state, variables, batch).compile().cost_analysis()
    flops[parts] = analysis["flops"]
  # Adding up gradients and looping cost something; a second forward pass would be a third more.
  assert flops[2] < 1.15 * flops[1]


def test_accumulation_keeps_the_rows_of_every_device_and_works_under_pmap():
  whole, jitted = distil(), distil(accumulate=2)
  mapped = distil(accumulate=2, dispatch=mesh.with_pmap())
  # float32 Adam: a gradient's last bit moves a parameter by up to the learning rate's share of it.
  assert_close(whole.variables, jitted.variables, tolerance=1e-4)
  assert_close(whole.variables, mapped.variables, tolerance=1e-4)
  for line, other in zip(whole.history, jitted.history, strict=True):
    for name in ("loss", "soft", "labels", "hint", "accuracy"):
      assert line[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5)


def test_the_limit_of_accumulation_batchnorm_and_relations_see_the_micro_batch():
  batch = unlabelled()

  def relational(student, teacher, batch):
    s = student.features["mid"]
    return {"relation": Term(jnp.mean((s @ s.T) ** 2, axis=1))}

  for student, objective in (
    (networks.dense(5, norm=True), recipes.kd()),
    (networks.dense(5), relational),
  ):
    _, whole, _ = one_step(batch, student=student, objective=objective)
    _, parts, _ = one_step(batch, student=student, objective=objective, accumulate=3)
    assert differ(whole.params, parts.params, tolerance=1e-4)


def test_micro_batches_move_batchnorm_one_after_another():
  student = networks.dense(5, norm=True)
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
  state, step, variables = prepared(
    batch, student=networks.dense(5, norm=True), objective=objective, rate=0.3, average=0.3
  )
  step = jax.jit(step)
  average = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.average)
  for number in range(5):
    state, _ = step(state, variables, batch)
    decay = min(0.3, (1 + number) / (10 + number))  # 0.1, 0.18, 0.25, 0.3, 0.3
    now = {"params": state.params, **state.model_state}
    average = jax.tree.map(
      lambda a, leaf, d=decay: d * a + (1 - d) * np.asarray(leaf, np.float64), average, now
    )
  assert_close(state.average, average, tolerance=1e-5)  # float32
  assert deployed_variables(state, objective) is state.average


@pytest.mark.device
def test_a_run_with_an_average_resumes_with_the_same_bits(tmp_path):
  student = networks.dense(5, norm=True, dropout=0.3)
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
  assert_same_bits(teachers.restore(tmp_path / "killed"), whole.variables)
  assert differ(whole.state.params, whole.variables["params"], tolerance=1e-4)


def test_a_student_starts_from_layers_of_the_teacher():
  _, variables = a_teacher(width=5)

  def look(student, teacher, batch):
    return {"labels": Term(losses.cross_entropy(student.logits, batch.labels))}

  teacher, _ = a_teacher(width=5)
  start = teachers.layers(variables, {"Dense_0": "Dense_0"})
  fitted = distil(
    teacher=teacher,
    teacher_variables=variables,
    objective=look,
    start=start,
    optimizer=optax.sgd(0.0),
    steps=1,
  )
  assert_same_bits(fitted.variables["params"]["Dense_0"], variables["params"]["Dense_0"])
  assert differ(fitted.variables["params"]["Dense_1"], variables["params"]["Dense_1"], tolerance=0)
  several = distil(
    seed=(1, 2),
    start=start,
    teacher=teacher,
    teacher_variables=variables,
    objective=look,
    optimizer=optax.sgd(0.0),
    steps=1,
  )
  for one in teachers.unstack(several.variables):
    assert_same_bits(one["params"]["Dense_0"], variables["params"]["Dense_0"])


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
    distil(start=start)


def test_a_transform_is_what_both_networks_see_and_has_a_key_of_its_own():
  seen = []

  def disturb(key, batch):
    return batch.replace(inputs=batch.inputs + jax.random.normal(key, batch.inputs.shape))

  def look(student, teacher, batch):
    jax.debug.callback(lambda x: seen.append(np.asarray(x)), batch.inputs)
    s, t = student.logits, teacher.logits
    return {"soft": Term(losses.soft_target_kl(s, t, temperature=2.0))}

  network, variables = a_teacher(width=5)
  student = networks.dense(5)
  options = {
    "student": student,
    "teacher": network,
    "teacher_variables": variables,
    "objective": look,
    "start": variables,
    "optimizer": optax.sgd(0.0),
    "log_every": 1,
    "steps": 2,
    "devices": 1,
  }
  # Teacher and student are the same network: whatever both see, they agree on it.
  fitted = distil(transform=disturb, **options)
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


def test_a_run_stops_when_its_time_is_over_and_a_copy_goes_on_elsewhere(tmp_path):
  """Saved and left as by SIGTERM; what goes on is the folder's content, wherever it lies."""
  whole = distil(folder=tmp_path / "whole", log_every=1, validate_every=8)
  options = {"log_every": 1, "validate_every": 8, "callback": slowly}
  # The clock runs from the call on, compilation included, so that one chunk is trained at least.
  with pytest.raises(train.Stopped, match=r"step \d of 8") as stopped:
    distil(folder=tmp_path / "here", stop_after=1e-3, **options)
  assert stopped.value.code == 143
  with Checkpoints(tmp_path / "here" / "checkpoints") as saved:
    assert 1 <= saved.latest() < 8
  shutil.copytree(tmp_path / "here", tmp_path / "elsewhere" / "copy")
  shutil.rmtree(tmp_path / "here")
  for _ in range(8):  # a chunk a time, however slow the machine is
    try:
      resumed = distil(folder=tmp_path / "elsewhere" / "copy", stop_after=1e-3, **options)
      break
    except train.Stopped:
      pass
  assert_same_bits(whole.variables, resumed.variables)
  assert [line["step"] for line in resumed.history] == list(range(1, 9))


def test_time_that_is_not_over_stops_nothing(tmp_path):
  handler = signal.getsignal(signal.SIGTERM)
  with train.time_limit(None), train.time_limit(1000):
    fitted = distil(folder=tmp_path / "a", stop_after=1000)
  assert fitted.history[-1]["step"] == 8
  assert signal.getsignal(signal.SIGTERM) is handler
  assert not any(isinstance(thread, threading.Timer) for thread in threading.enumerate())


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


def test_sources_of_seeds_may_differ_in_their_arrays():
  """Other labels for each seed: the arrays that differ get an axis over seeds."""
  masks = [np.arange(48) % 4 == i for i in range(2)]
  from jaxdistill import data
  from test_train import examples

  def of(seed):
    return data.on_device(examples(), batch_size=8, data_seed=seed, labelled=masks[seed])

  together = distil(seed=(0, 1), data=[of(0), of(1)])
  unrolled = distil(seed=(0, 1), data=[of(0), of(1)], seeds_by="unroll")
  for seed in (0, 1):
    alone = distil(seed=seed, data=of(seed))
    for several in (together, unrolled):
      mine = jax.tree.map(lambda leaf, seed=seed: leaf[seed], several.variables)
      assert_close(mine, alone.variables, tolerance=1e-5)  # float32, eight steps
  with pytest.raises(ValueError, match="differ in batch_size"):
    distil(seed=(0, 1), data=[source(0), source(1, batch_size=4)])
