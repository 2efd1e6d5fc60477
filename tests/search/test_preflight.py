"""Pre-flight checks: each on a case that deserves it and on one that does not."""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
import scipy.special

import small_networks
from jaxdistill import data, evaluation, losses, networks, recipes, search, teachers, train
from jaxdistill.networks import models
from jaxdistill.search._checks import (
  calibration,
  pair_checks,
  probes,
  teacher_checks,
  token_checks,
)
from jaxdistill.types import Model, Objective, Outputs, Teacher, Term, as_objective, make_batch

CLASSES = 3


def examples(size=512, spread=0.5, seed=0):
  random = np.random.default_rng(seed)
  labels = random.integers(0, CLASSES, size)
  inputs = 2 * np.eye(CLASSES, 4)[labels] + spread * random.normal(size=(size, 4))
  return data.from_arrays(inputs.astype(np.float32), labels, num_classes=CLASSES)


def source(batch_size=32, **options):
  return data.on_device(examples(), batch_size=batch_size, data_seed=0, **options)


def validation(size=256):
  return data.evaluation_batches(examples(size, seed=1), batch_size=64)


def trained(steps, *, rate=1e-2, width=16, seed=0, **options):
  """A model after so many of Adam's steps, its rate going to zero."""
  fitted = train.fit(
    small_networks.dense(width),
    recipes.labels(),
    data=source(),
    optimizer=optax.adam(optax.cosine_decay_schedule(rate, max(steps, 1))),
    steps=steps,
    seed=seed,
    **{"run": train.Run(progress=None), **options},
  )
  return Model(fitted.network, fitted.variables)


def untrained(width, key=9):
  network = small_networks.dense(width)
  return Model(network, network.init(jax.random.key(key), jnp.zeros((1, 4))))


@pytest.fixture(scope="module")
def taught():
  return trained(320)


@pytest.fixture(scope="module")
def hasty():
  """A teacher that was stopped at its beginning."""
  return trained(12, rate=3e-3)


def names(findings):
  return [finding.check for finding in findings]


def quiet(*args, **options):
  return search.preflight(*args, warn=False, **options)


def test_a_teacher_within_noise_of_the_students_is_hardly_better():
  # Half a point above, each with a binomial error of about a point.
  found = teacher_checks.hardly_better(0.905, [0.90, 0.898, 0.902], examples=1000)
  assert found.check == "hardly_better"
  assert "beyond noise" in found.message
  gap, error = found.values["gap"], found.values["standard_error"]
  assert gap == pytest.approx(0.005)
  # Agresti and Coull by hand, for both sides, and the seeds' own variance over three of them.
  shares = [(905 + 2) / 1004, (900 + 2) / 1004]
  expected = sum(p * (1 - p) / 1004 for p in shares) + 0.002**2 / 3
  assert error == pytest.approx(np.sqrt(expected), rel=1e-12)
  # 2 standard errors of the examples' part alone are the gap at the number that is advised.
  needed = int(found.fix.split("takes ")[1].split(" examples")[0].replace(",", ""))
  assert 4 * sum(p * (1 - p) for p in shares) / needed == pytest.approx(gap**2, rel=0.01)


def test_a_teacher_with_hardly_fewer_errors_is_named_however_many_examples_there_are():
  found = teacher_checks.hardly_better(0.903, [0.90] * 3, examples=10**7)
  assert "hardly better" in found.message


def test_a_better_teacher_is_let_pass():
  assert teacher_checks.hardly_better(0.95, [0.90, 0.898, 0.902], examples=1000) is None
  # What is within the unpaired error can be beyond the paired one.
  close = {"teacher": 0.91, "baseline": [0.90], "examples": 1000}
  assert teacher_checks.hardly_better(**close) is not None
  assert teacher_checks.hardly_better(**close, paired_error=0.004) is None


def test_near_chance():
  found = teacher_checks.near_chance(0.12, examples=500, chance=0.1)
  assert found.check == "not_trained"
  assert teacher_checks.near_chance(0.2, examples=500, chance=0.1) is None


def curve_of(kind, lines, tau, noise=0.0, seed=0):
  at = np.arange(1, lines + 1) / lines
  shape = {
    "exponential": np.exp(-at * tau),
    # Noise that the rate keeps up, of a cosine that ends at zero: flat at its end.
    "cosine": 0.3 * np.exp(-8 * at) + 0.7 * np.cos(np.pi * at / 2) ** 2,
  }[kind]
  return 100 * np.arange(1, lines + 1), shape + noise * np.random.default_rng(seed).normal(
    size=lines
  )


@pytest.mark.parametrize("noise", [0.0, 0.003])
def test_a_curve_that_is_still_falling(noise):
  found = teacher_checks.still_falling(*curve_of("exponential", 100, 1.5, noise))
  assert found.check == "not_trained"
  assert "still falling" in found.message


@pytest.mark.parametrize("seed", range(5))
def test_a_curve_that_has_ended_is_let_pass(seed):
  for kind, tau in (("exponential", 8.0), ("cosine", 0.0)):
    assert teacher_checks.still_falling(*curve_of(kind, 100, tau, 0.003, seed)) is None
  # Noise alone, and a few lines, tell nothing.
  flat = np.random.default_rng(seed).normal(size=60)
  assert teacher_checks.still_falling(np.arange(60), flat) is None
  assert teacher_checks.still_falling(np.arange(19), -np.arange(19.0)) is None
  assert not teacher_checks.curve_tells(flat)


def test_the_documented_time_constant_is_the_rules():
  fires = [
    teacher_checks.still_falling(*curve_of("exponential", 2000, tau)) is not None
    for tau in (3.0, 3.2)
  ]
  assert fires == [True, False]


def test_an_unfinished_run_is_named():
  found = teacher_checks.still_falling([10, 20], [1.0, 0.5], planned=30)
  assert "not finished" in found.message
  assert found.values == {"step": 20, "steps": 30}


def test_a_runs_curve_is_the_mean_over_seeds_without_torn_lines(tmp_path):
  lines = [{"step": 1, "loss": [1.0, 3.0]}, {"step": 2, "loss": [None, 1.0]}]
  (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "lo')
  (tmp_path / "config.json").write_text('{"steps": 9}')
  steps, values, planned = probes.curve(tmp_path)
  np.testing.assert_array_equal(steps, [1, 2])
  np.testing.assert_array_equal(values, [2.0, np.nan])
  assert planned == 9
  with pytest.raises(FileNotFoundError, match="no metrics"):
    quiet(teacher_run=tmp_path / "elsewhere")


@pytest.mark.slow
def test_probe_steps_find_the_hasty_teacher_and_let_the_trained_one_pass(taught, hasty):
  for model, expected in ((hasty, ["not_trained"]), (taught, [])):
    assert names(quiet(data=source(), teacher=teachers.frozen(model))) == expected


def test_probe_steps_change_nothing(hasty):
  before = jax.tree.map(np.array, hasty.variables)
  quiet(
    small_networks.dense(5),
    recipes.kd(),
    data=source(),
    teacher=teachers.frozen(hasty),
    validation=validation(),
  )
  jax.tree.map(np.testing.assert_array_equal, before, hasty.variables)


def test_a_teacher_that_is_only_unsure_does_not_seem_to_learn(taught):
  # As label smoothing leaves it: every step would lower the plain loss by making it surer.
  params = jax.tree.map(lambda p: p, taught.variables["params"])
  params["Dense_1"] = jax.tree.map(lambda p: 0.2 * p, params["Dense_1"])
  softer = dataclasses.replace(taught, variables={**taught.variables, "params": params})
  batches = probes.batches_of(source(), 0, 4)
  before, after = probes.taught_further(softer, batches, batches)
  assert teacher_checks.still_learning(before, after) is None
  logits, labels = probes.said_of([softer], batches)
  assert calibration.losses_at(logits[0], labels).mean() > before.mean() + 0.05


@pytest.mark.slow
def test_a_finished_curve_stands_in_for_probe_steps(tmp_path):
  run = train.Run(tmp_path / "run", checkpoint_every=400, progress=None)
  model = trained(400, run=run, watch=train.Watch(log_every=16))
  given = {"data": source(), "teacher": teachers.frozen(model)}
  assert quiet(**given, teacher_run=tmp_path / "run") == []
  config = json.loads((tmp_path / "run" / "config.json").read_text())
  (tmp_path / "run" / "config.json").write_text(json.dumps({**config, "steps": 500}))
  assert names(quiet(**given, teacher_run=tmp_path / "run")) == ["not_trained"]


@pytest.mark.parametrize(
  ("teacher", "student"),
  [
    # ResNet-56 to 20, ResNet-32x4 to 8x4, ResNet-50 to MobileNetV2: parameters and operations.
    ((860e3, 125e6), (270e3, 41e6)),
    ((7.4e6, 1.08e9), (1.2e6, 0.18e9)),
    ((23.7e6, 1.3e9), (0.81e6, 7e6)),
    ((215e3, None), (4e3, None)),
  ],
)
def test_usual_pairs_have_no_capacity_gap(teacher, student):
  found = pair_checks.capacity_gap(
    int(teacher[0]), int(student[0]), teacher_flops=teacher[1], student_flops=student[1]
  )
  assert found is None


def test_a_capacity_gap_asks_for_assistants_in_geometric_steps():
  found = pair_checks.capacity_gap(400 * 10_000, 10_000)
  assert found.values["assistants"] == [200_000]
  assert "a teaching assistant of about 200,000 parameters" in found.fix
  chain = pair_checks.capacity_gap(10**9, 1000).values["assistants"]
  assert chain == [10**7, 10**5]
  assert pair_checks.capacity_gap(1000, 100, largest=5.0).values["ratio"] == pytest.approx(10)


def probed(objective, hyper=({},), batch=None, student=None):
  inputs, labels = examples(16).inputs, examples(16).labels
  return probes.probe_terms(
    student or small_networks.dense(5),
    as_objective(objective),
    make_batch(jnp.asarray(inputs), jnp.asarray(labels)) if batch is None else batch,
    teacher=teachers.frozen(untrained(7)),
    hyper=hyper,
    num_classes=CLASSES,
  )


def misnamed(student, teacher, batch):
  """A term that is called labels and does not read them."""
  return {"labels": Term(losses.soft_target_kl(student.logits, teacher.logits, temperature=2.0))}


@pytest.fixture(scope="module")
def terms():
  """Three terms: labels, soft, mid."""
  return probed(recipes.combine(recipes.kd(), recipes.hint("mid", "mid", name="mid")))


def weighed(terms, **weights):
  return {n: dataclasses.replace(t, weight=weights.get(n, t.weight)) for n, t in terms.items()}


def test_an_objective_without_labels(terms):
  without = {name: term for name, term in terms.items() if name != "labels"}
  found = pair_checks.no_labels(without)
  assert "none of its terms ('mid', 'soft')" in found.message
  assert "all is well where that is meant" in found.fix
  assert "the weight of 'labels' is 0" in pair_checks.no_labels(weighed(terms, labels=0.0)).message


@pytest.mark.parametrize("objective", [misnamed, recipes.labels(label_smoothing=1.0)])
def test_labels_by_name_alone_are_none(objective):
  found = pair_checks.no_labels(probed(objective))
  assert "none of its terms ('labels')" in found.message


def test_an_objective_with_labels_is_let_pass(terms):
  assert pair_checks.no_labels(terms) is None
  assert pair_checks.no_labels(weighed(terms, labels=1e-4)) is None
  assert terms["soft"].label_change == terms["mid"].label_change == 0
  # One that reads the labels in its own term, and a warm-up from 0.
  for objective, name in (
    (recipes.dkd(hard_weight=None, warmup_steps=5), "dkd_warmup"),
    (recipes.kd(), "hard_weight"),
  ):
    assert pair_checks.no_labels(probed(objective, ({name: 0.0}, {name: 1.0}))) is None


def test_hidden_labels_of_a_batch_do_not_hide_what_the_objective_reads():
  some = examples(16)
  batch = make_batch(jnp.asarray(some.inputs), jnp.asarray(some.labels), labelled=jnp.zeros(16))
  terms = probed(recipes.kd(), batch=batch)
  assert pair_checks.no_labels(terms) is None
  assert pair_checks.unequal_gradients(terms) is None  # nothing counts, which is no zero gradient
  assert "no label that may be used" in pair_checks.no_labels(terms, labelled=False).message


def test_data_without_labels_is_said(taught):
  bare = data.on_device(data.from_arrays(examples().inputs, None), batch_size=32, data_seed=0)
  teacher = teachers.frozen(taught)
  (found,) = quiet(small_networks.dense(5), recipes.kd(), data=bare, teacher=teacher)
  assert found.check == "no_labels"
  assert "no label that may be used" in found.message


def test_a_zero_head_still_reads_labels():
  # Its loss is log K whatever the labels are; the gradient is not.
  network = small_networks.dense(5)

  def init(key, inputs):
    variables = network.init(key, inputs)
    head = jax.tree.map(jnp.zeros_like, variables["params"]["Dense_1"])
    return {**variables, "params": {**variables["params"], "Dense_1": head}}

  zero = dataclasses.replace(network, init=init)
  assert pair_checks.no_labels(probed(recipes.kd(), student=zero)) is None


def test_targets_uniform_to_within_rounding():
  logits = np.random.default_rng(0).normal(size=(50, 10)).astype(np.float32)
  found = pair_checks.uniform_targets(logits, [1.0, 1e8])
  assert found.values["temperature"] == 1e8
  assert "Lower the temperature" in found.fix
  assert pair_checks.uniform_targets(logits, 20.0) is None
  # bfloat16 tells 2^16 times less than float32.
  half = jnp.asarray(logits, jnp.bfloat16)
  assert pair_checks.uniform_targets(half, 200.0) is not None
  assert pair_checks.uniform_targets(half, 200.0, dtype=jnp.float32) is None
  assert pair_checks.uniform_targets(half, 4.0) is None
  alike = pair_checks.uniform_targets(np.ones((5, 4), np.float32), 4.0)
  assert "look whether the teacher is trained" in alike.fix
  # A masked class has no share, and makes no target uneven.
  masked = np.where(np.arange(10) == 3, -np.inf, logits)
  assert pair_checks.uniform_targets(masked, 1e8, dtype=np.float32) is not None
  assert pair_checks.uniform_targets(masked, 4.0) is None


@pytest.mark.parametrize("temperature", [10.0, 1e3, 1e5, 3e7])
def test_the_resolution_is_where_float32_loses_the_targets(temperature):
  # What the rule calls noise: the float32 target's error is of the size of its deviation.
  logits = np.random.default_rng(1).uniform(-5, 5, size=(200, 10))
  exact = scipy.special.softmax(logits / temperature, axis=1)
  computed = np.asarray(jax.nn.softmax(jnp.asarray(logits / temperature, jnp.float32), axis=1))
  wrong = np.median(np.abs(10 * (computed - exact)).max(axis=1))
  deviation = np.median(np.abs(10 * exact - 1).max(axis=1))
  found = pair_checks.uniform_targets(logits.astype(np.float32), temperature)
  assert wrong <= 3 * np.finfo(np.float32).eps
  if found is None:
    assert wrong < 0.1 * deviation
  else:
    assert wrong > 0.05 * deviation


def test_terms_a_hundredfold_apart(terms):
  assert pair_checks.unequal_gradients(terms) is None
  heavy = weighed(terms, mid=1e4)
  found = pair_checks.unequal_gradients(heavy)
  assert "'labels' has next to no say" in found.message
  norms = {name: term.weight * term.norm for name, term in heavy.items()}
  assert found.values["ratio"] == pytest.approx(norms["mid"] / norms["labels"])
  # Without weight a term is not counted, however large its gradient.
  assert pair_checks.unequal_gradients(weighed(heavy, labels=0.0, soft=0.0)) is None


def test_norms_are_those_of_the_students_parameters():
  def objective(student, teacher, batch):
    return {"plain": Term(jnp.sum(student.logits, axis=1), weight=-3.0)}

  term = probed(objective)["plain"]
  network, inputs = small_networks.dense(5), jnp.asarray(examples(16).inputs)

  variables = network.init(jax.random.split(jax.random.key(0), 3)[0], inputs)

  def loss(params):
    outputs, _ = network.apply({**variables, "params": params}, inputs, train=True, key=None)
    return jnp.mean(jnp.sum(outputs.logits, axis=1))

  grads = jax.tree.leaves(jax.grad(loss)(variables["params"]))
  norm = np.sqrt(sum(np.sum(np.asarray(g, np.float64) ** 2) for g in grads))
  # float32 sums of 16 examples in another order.
  assert term.norm == pytest.approx(norm, rel=1e-5)
  assert (term.weight, term.label_change) == (-3.0, 0.0)


def test_a_term_without_a_gradient_is_said_unless_it_teaches_the_objective():
  def idle(student, teacher, batch):
    hard = losses.cross_entropy(student.logits, batch.labels)
    return {"labels": Term(hard), "idle": Term(jnp.sum(teacher.logits, axis=1))}

  found = pair_checks.unequal_gradients(probed(idle))
  assert "'idle' is zero at initialisation" in found.message
  assert "'labels'" not in found.message

  def apply(params, state, student, teacher, batch, *, key):
    terms = idle(student, teacher, batch)
    return {**terms, "idle": Term(params * jnp.sum(teacher.logits, axis=1))}, state

  learned = Objective(init=lambda key, student, teacher: (jnp.ones(()), {}), apply=apply)
  assert pair_checks.unequal_gradients(probed(learned)) is None

  def broken(student, teacher, batch):
    return {"root": Term(jnp.sqrt(jnp.sum(0 * student.logits, axis=1)))}

  assert "not finite" in pair_checks.unequal_gradients(probed(broken)).message


def calibrated_logits(size=2000, classes=10, sharpness=2.5, seed=0):
  """Logits under which the labels were drawn: calibrated by their making."""
  random = np.random.default_rng(seed)
  logits = sharpness * random.normal(size=(size, classes))
  odds = scipy.special.softmax(logits, axis=1)
  labels = (odds.cumsum(axis=1) > random.uniform(size=(size, 1))).argmax(axis=1)
  return logits.astype(np.float32), labels


@pytest.mark.parametrize("factor", [0.1, 1.0, 7.0])
def test_the_calibrating_temperature_is_scipys(factor):
  logits, labels = calibrated_logits(300)
  logits = factor * logits

  def loss(log_temperature):
    z = logits.astype(np.float64) / np.exp(log_temperature)
    return np.mean(scipy.special.logsumexp(z, axis=1) - z[np.arange(len(z)), labels])

  best = scipy.optimize.minimize_scalar(loss, bounds=(-4, 4), method="bounded")
  found = calibration.calibrating_temperature(logits, labels)
  # scipy stops within 1e-5 of the logarithm; float32's slope loses a few 1e-5 at its zero.
  assert np.log(found) == pytest.approx(best.x, abs=2e-4)
  assert calibration.losses_at(logits, labels, found).mean() == pytest.approx(best.fun, rel=1e-5)


@pytest.mark.parametrize(("factor", "cause"), [(6.0, "too sure"), (0.02, "not sure enough")])
def test_a_teacher_whose_probabilities_mislead(factor, cause):
  logits, labels = calibrated_logits()
  found = teacher_checks.misleading(factor * logits, labels, temperature=2.0)
  assert found.check == "calibration"
  assert cause in found.fix
  # The factor is taken back, to the noise of 2,000 labels.
  assert found.values["temperature"] == pytest.approx(factor, rel=0.1)
  assert f"temperature={2 * found.values['temperature']:.3g} here" in found.fix
  assert found.values["ece_calibrated"] < 0.04 < found.values["ece"]


def test_probabilities_that_no_temperature_puts_right():
  logits, labels = calibrated_logits()
  found = teacher_checks.misleading(logits, (labels + 1) % 10)
  assert "No temperature puts that right" in found.fix


def test_usual_miscalibration_is_let_pass():
  logits, labels = calibrated_logits()
  for factor in (0.7, 1.0, 1.6):
    assert teacher_checks.misleading(factor * logits, labels) is None
  # A teacher that was trained with a label smoothing of 0.1: right on 98 of 100, at 0.91.
  right = np.arange(1000) % 50 > 0
  smoothed = np.log(np.where(np.eye(10)[np.where(right, 0, 1)] > 0, 0.91, 0.01))
  assert teacher_checks.misleading(smoothed, np.zeros(1000, int)) is None
  # One that is always right, and sure.
  assert teacher_checks.misleading(9 * np.eye(10)[labels], labels) is None


def test_check_warns_and_writes_what_it_returns(tmp_path):
  given = {"data": source(), "teacher": teachers.frozen(untrained(7))}
  with pytest.warns(search.PreflightWarning) as caught:
    found = search.preflight(
      small_networks.dense(5),
      recipes.kd(temperature=1e9),
      folder=tmp_path / "a",
      **given,
    )
  # Beside these, the square of the temperature blows up what is only noise.
  assert {"not_trained", "uniform_targets"} <= set(names(found))
  assert [str(w.message) for w in caught] == [f"{one.check}: {one}" for one in found]
  written = json.loads((tmp_path / "a" / "preflight.json").read_text())
  assert [one["check"] for one in written] == names(found)
  assert all(set(one) == {"check", "message", "fix", "values"} for one in written)
  assert all(isinstance(one["message"], str) and one["fix"] for one in written)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert names(quiet(small_networks.dense(5), recipes.kd(hard_weight=None), **given))


def test_what_check_cannot_take_says_so(taught):
  with pytest.raises(ValueError, match="nothing to look at"):
    quiet()
  with pytest.raises(ValueError, match="baseline is compared"):
    quiet(small_networks.dense(5), baseline=[0.9])
  with pytest.raises(TypeError, match="data"):
    quiet(data=[1])
  with pytest.raises(TypeError, match="validation"):
    quiet(validation=3)
  with (
    small_networks.untyped(),
    pytest.raises(TypeError, match=r"is the model .*teachers\.frozen\(model\)"),
  ):
    quiet(data=source(), teacher=taught)


@pytest.mark.slow
def test_a_cached_teacher_and_an_ensemble(taught):
  cached = teachers.cached(teachers.frozen(taught), source(), progress=None)
  found = quiet(small_networks.dense(5), recipes.kd(temperature=1e9), data=cached)
  assert "uniform_targets" in names(found)
  both = teachers.ensemble([taught, taught])
  assert quiet(small_networks.dense(5), recipes.kd(), data=source(), teacher=both) == []


@pytest.mark.slow
def test_schedules_are_looked_at_in_the_whole_run(taught):
  given = {"data": source(), "teacher": teachers.frozen(taught)}
  kd = recipes.kd(hard_weight=lambda step: 0.1 * (step > 10), temperature=lambda step: 2.0 + step)
  assert quiet(small_networks.dense(5), kd, steps=100, **given) == []
  kd = recipes.kd(temperature=lambda step: 10.0**step)
  found = quiet(small_networks.dense(5), kd, steps=11, **given)
  assert "uniform_targets" in names(found)


@pytest.mark.slow
def test_a_baseline_by_its_model_or_by_its_accuracies(taught):
  network = taught.network
  split = data.evaluation_batches(examples(300, spread=1.2, seed=2), batch_size=64)
  given = {"teacher": teachers.frozen(taught), "validation": split}
  own = float(evaluation.evaluate(taught, split)["accuracy"])
  # The student's own network is no better than itself.
  for baseline in (taught, [own], np.array([own, own])):
    (found,) = quiet(network, **given, baseline=baseline)
    assert found.check == "hardly_better"
    # float32 sums of 300 whole numbers are exact; their share is rounded once.
    assert found.values["teacher"] == pytest.approx(own, abs=1e-7)
    assert found.values["gap"] == pytest.approx(0, abs=1e-7)
  # In pairs they are never apart, so that the examples bring no noise.
  (found,) = quiet(network, **given, baseline=taught)
  assert found.values["standard_error"] == 0
  poor = [untrained(16, key).variables for key in (1, 2)]
  poor = Model(network, jax.tree.map(lambda *leaves: jnp.stack(leaves), *poor), 2)
  assert quiet(network, **given, baseline=poor) == []
  assert quiet(network, **given, baseline=[0.3, 0.4]) == []


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
  """The pair of the digits experiment, briefly trained."""
  parts = data.splits("digits")
  loaded = data.load("digits", parts["train"])
  batches = data.evaluation_batches(
    data.load("digits", parts["test"]), batch_size=256, normalize=data.DIGITS
  )
  source = data.on_device(loaded, batch_size=64, data_seed=0, normalize=data.DIGITS)
  made = [
    networks.linen(models.ConvNet(channels=c, strides=(1, 2), dense=d), features=["hidden"])
    for c, d in (((16, 32), 128), ((8, 8), 24))
  ]

  def fit(network, seeds, epochs=12):
    sources = [dataclasses.replace(source, data_seed=seed) for seed in seeds]
    steps = epochs * source.steps_per_epoch
    fitted = train.fit(
      network,
      recipes.labels(),
      data=sources,
      optimizer=optax.adam(optax.cosine_decay_schedule(6e-3, steps)),
      steps=steps,
      seed=seeds,
      run=train.Run(progress=None),
    )
    return fitted

  return made, source, batches, fit(made[0], [100, 101]), fit(made[1], [0, 1, 2])


@pytest.mark.slow
def test_the_digits_pair_gives_no_false_alarm(digits):
  (_, student), source, batches, taught, baseline = digits
  objective = recipes.combine(
    recipes.kd(temperature=2.0), recipes.hint("hidden", "0/hidden", hint_weight=0.3)
  )
  given = {
    "data": source,
    "teacher": teachers.ensemble(taught.unstack()),
    "validation": batches,
    "baseline": baseline,
  }
  assert quiet(student, objective, steps=1000, **given) == []


def numbers(size=64, scale=1.0, seed=0):
  random = np.random.default_rng(seed)
  inputs = random.normal(size=(size, 4)).astype(np.float32)
  return data.from_arrays(inputs, scale * (inputs @ random.normal(size=(4, 2)) + 3))


def of_numbers(scale=1.0, **options):
  task = evaluation.tasks.regression()
  student = small_networks.dense(4, classes=2)
  source = data.on_device(numbers(scale=scale), batch_size=32, data_seed=0)
  held_out = data.evaluation_batches(numbers(seed=1, scale=scale), batch_size=24)
  return quiet(student, data=source, validation=held_out, task=task, **options)


def test_numbers_of_another_size_than_the_outputs_are_said():
  assert "labels" not in names(of_numbers())
  (found,) = of_numbers(scale=1e4)
  assert found.check == "labels"
  assert found.values["ratio"] > 1e3
  # What does not count is not looked at, and what is not finite is.
  outputs, labels = np.ones((3, 2)), np.array([[1e9, 1.0], [1.0, 2.0], [0.5, 1.0]])
  where = np.array([[0, 1], [1, 1], [1, 1]])
  assert pair_checks.labels_scale(outputs, labels, where) is None
  labels[1, 0] = np.nan
  assert pair_checks.labels_scale(outputs, labels, where).values == {"not_finite": 1}
  ratio = pair_checks.labels_scale(outputs, 200 * outputs, where).values["ratio"]
  assert ratio == pytest.approx(200)


def test_a_teacher_of_numbers_is_compared_by_the_metric_and_its_direction():
  task = evaluation.tasks.regression()
  metric = task.metric("rmse")
  better = teacher_checks.hardly_better_by
  assert better("rmse", metric, 0.5, [1.0, 1.1]) is None
  assert better("rmse", metric, 1.5, [1.0, 1.1]).values["gap"] == pytest.approx(-0.45)
  assert better("rmse", metric, 0.98, [0.9, 1.1]) is not None  # within the seeds' noise
  assert better("r2", task.metric("r2"), 1.5, [1.0, 1.1]) is None
  # A share that is better when higher lacks something of 1: 0.96 leaves two fifths of 0.9's errors.
  map_ = evaluation.tasks.multilabel().metric("map")
  assert better("map", map_, 0.96, [0.9]) is None
  assert better("map", map_, 0.904, [0.9]) is not None
  network = small_networks.dense(8, classes=2)
  model = small_networks.model(network, 1, 4, key=jax.random.key(0))
  worse = of_numbers(teacher=teachers.frozen(model), baseline=[1e-3])
  (found,) = (one for one in worse if one.check == "hardly_better")
  batches = data.evaluation_batches(numbers(seed=1), batch_size=24)
  assert found.values["teacher"] == pytest.approx(
    float(evaluation.evaluate(model, batches, task=task)["rmse"])
  )
  # Nothing of what asks for probabilities.
  assert not {"calibration", "uniform_targets"} & set(names(worse))


@pytest.mark.slow
def test_what_a_task_refuses_of_labels_is_a_finding():
  x = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
  student = small_networks.dense(4, classes=3)
  for labels, task, said in (
    (np.full((40, 3), 0.5), evaluation.tasks.multilabel(), "labels are 0 or 1"),
    (np.full(40, 255), evaluation.tasks.classification(), "the label 255"),
    (np.zeros((40, 2)), evaluation.tasks.regression(), "the shape"),
  ):
    source = data.on_device(data.from_arrays(x, labels), batch_size=20, data_seed=0)
    found = [one for one in quiet(student, data=source, task=task) if one.check == "labels"]
    assert len(found) == 1
    assert said in found[0].message
  right = data.from_arrays(x, np.random.default_rng(1).random((40, 3)) < 0.5)
  source = data.on_device(right, batch_size=20, data_seed=0)
  assert quiet(student, data=source, task=evaluation.tasks.multilabel()) == []
  with (
    pytest.raises(TypeError, match=r"task='regression' must be an evaluation\.tasks\.Task"),
    small_networks.untyped(),
  ):
    quiet(student, data=source, task="regression")


def test_a_teacher_that_says_the_same_of_all_is_said():
  vectors = np.random.default_rng(0).normal(size=(16, 8))
  assert pair_checks.collapsed({"pooled": vectors}) is None
  same = np.ones((16, 8)) + 1e-6 * vectors
  found = pair_checks.collapsed({"pooled": same})
  assert found.check == "collapsed"
  deviation = np.sqrt(np.mean((same - same.mean(0)) ** 2)) / np.sqrt(np.mean(same**2))
  assert found.values["spread"]["pooled"] == pytest.approx(deviation)
  assert pair_checks.collapsed({"logits": np.zeros((16, 3))}) is not None
  assert pair_checks.collapsed({"logits": np.ones((1, 3))}) is None
  network = small_networks.dense(8)
  model = small_networks.model(network, 1, 4, key=jax.random.key(0))
  dead = Model(network, jax.tree.map(jnp.zeros_like, model.variables))
  found = quiet(data=source(), teacher=teachers.frozen(dead))
  assert "collapsed" in names(found)


WORDS, LENGTH = 11, 16


def chain(count=64, seed=0, noise=0.1):
  """Windows ``[count, LENGTH + 1]``: each token's successor is its own, but for some noise."""
  random = np.random.default_rng(seed)
  after = np.random.default_rng(5).permutation(WORDS)
  tokens = [random.integers(0, WORDS, count)]
  for _ in range(LENGTH):
    other = random.random(count) < noise
    tokens.append(np.where(other, random.integers(0, WORDS, count), after[tokens[-1]]))
  return np.stack(tokens, axis=1), after


def knows(sure=4.0, size=WORDS, late=0.0):
  """A teacher that knows each token's successor; towards a window's end less so, by ``late``."""
  _, after = chain()
  table = np.zeros((WORDS, size), np.float32)
  table[np.arange(WORDS), after] = sure

  def apply(variables, batch):
    tokens = batch.inputs["tokens"]
    fade = jnp.linspace(1.0, 1.0 - late, tokens.shape[1], dtype=jnp.float32) if late else 1.0
    z = variables["table"][tokens]
    return Outputs(logits=z * (fade[None, :, None] if late else 1.0))

  return Teacher({"table": jnp.asarray(table)}, apply)


def told_of(tokens, shift=0, **options):
  """Examples of windows whose labels are shifted once too often (1), or not at all (−1)."""
  inputs, labels = tokens[:, 1:-2], tokens[:, 2 + shift : tokens.shape[1] - 1 + shift]
  return data.from_arrays({"tokens": inputs}, labels, num_classes=WORDS, **options)


def read(examples):
  """What `preflight` is given of these: training batches, and held-out ones."""
  return data.on_device(examples, batch_size=16, data_seed=0)


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_labels_that_are_shifted_wrongly_are_seen_by_the_teachers_loss(shift):
  examples = told_of(chain()[0], shift)
  if shift == 0:
    assert quiet(data=read(examples), teacher=knows()) == []
  else:
    with pytest.raises(search.PreflightError, match=f"shifted by {shift}") as stopped:
      quiet(data=read(examples), teacher=knows())
    assert names(stopped.value.findings) == ["shifted_labels"]
    (one,) = stopped.value.findings
    assert one.values["shift"] == -shift
    assert "data.shifted" in one.fix
    assert min(one.values["nll"], key=one.values["nll"].get) == str(-shift)
  # Held out they are seen as well, without any training data.
  held_out = data.evaluation_batches(examples, batch_size=16)
  asked = token_checks.probe_tokens(knows(), [jax.tree.map(lambda x: x[0], held_out)])
  assert (token_checks.shifted_labels(asked) is None) == (shift == 0)


def test_a_teacher_of_another_tokenizer_is_refused_before_anything_is_asked():
  ours, theirs = (data.tokenizers.characters(text) for text in ("abcde", "bcdef"))
  examples = data.from_text("abcdeabcdeabcde", ours, length=4)
  model = Model(networks.linen(models.MLP([4], num_classes=5)), {})  # which is not run
  teacher = teachers.frozen(model, tokenizer=theirs)
  with pytest.raises(ValueError, match=f"{theirs.digest}.*{ours.digest}"):
    quiet(data=data.on_device(examples, batch_size=2, data_seed=0), teacher=teacher)


def test_labels_of_other_documents_and_of_prompts_say_nothing_of_the_shift():
  examples = told_of(chain()[0], 0, weight=np.tile(np.arange(LENGTH - 2) % 2, (64, 1)))
  probed = token_checks.probe_tokens(
    knows(),
    [
      make_batch(
        {"tokens": jnp.asarray(examples.inputs["tokens"])},
        jnp.asarray(examples.labels),
        weight=jnp.asarray(examples.weight),
      )
    ],
  )
  assert not probed.between.any()  # no two neighbours count
  assert token_checks.shifted_labels(probed) is None


def test_what_a_teacher_says_of_tokens_by_hand():
  examples = told_of(chain(4)[0])
  batch = make_batch(
    {"tokens": jnp.asarray(examples.inputs["tokens"])}, jnp.asarray(examples.labels)
  )
  probed = token_checks.probe_tokens(knows(2.0, size=WORDS + 2), [batch], vocabulary=WORDS)
  p = scipy.special.softmax(np.r_[2.0, np.zeros(WORDS + 1)])
  np.testing.assert_allclose(probed.entropy, -(p * np.log(p)).sum(), rtol=1e-5)  # float32
  np.testing.assert_allclose(probed.mass[1], p[0], rtol=1e-5)
  np.testing.assert_allclose(probed.mass[8], p[:8].sum(), rtol=1e-5)
  np.testing.assert_allclose(probed.beyond, 2 * p[1], rtol=1e-5)
  assert sorted(probed.mass) == [1, 8]  # there are no 64
  assert probed.vocabulary == WORDS + 2
  z = np.asarray(knows(2.0).variables["table"])[examples.inputs["tokens"]]
  by_hand = -np.take_along_axis(
    scipy.special.log_softmax(np.concatenate([z, np.zeros((*z.shape[:2], 2))], axis=-1), axis=-1),
    examples.labels[..., None],
    axis=-1,
  )[..., 0]
  np.testing.assert_allclose(probed.nll[1], by_hand, rtol=1e-5)


@pytest.mark.parametrize(
  ("teacher", "expected"),
  [
    (knows(30.0), ["targets"]),
    (knows(0.01), ["targets"]),
    (knows(4.0, size=WORDS + 9), ["vocabulary"]),
    (knows(4.0, late=0.9), ["context"]),
    (knows(4.0), []),
  ],
)
def test_what_a_language_models_teacher_is_asked(teacher, expected):
  train_text, held_out = (told_of(chain(64, seed)[0]) for seed in (1, 2))
  found = quiet(
    data=read(train_text),
    teacher=teacher,
    validation=data.evaluation_batches(held_out, batch_size=16),
    task=evaluation.tasks.tokens(),
  )
  ours = {"shifted_labels", "targets", "vocabulary", "context", "memorised"}
  assert [name for name in names(found) if name in ours] == expected


def test_a_teacher_that_has_read_the_text_is_named():
  # It knows the training text's own successors; the held-out text has others, half of the time.
  train_text, _ = chain(64, 1, noise=0.02)
  held_out, _ = chain(64, 2, noise=0.6)
  batches = [
    token_checks.probe_tokens(
      knows(),
      [
        make_batch(
          {"tokens": jnp.asarray(told_of(text).inputs["tokens"])}, jnp.asarray(told_of(text).labels)
        )
      ],
    )
    for text in (train_text, held_out)
  ]
  found = token_checks.memorised(*batches)
  assert found.check == "memorised"
  assert found.values["train"] < found.values["held_out"]
  assert token_checks.memorised(*batches[::-1]) is None
  assert token_checks.memorised(batches[0], batches[0]) is None


@pytest.mark.slow
@pytest.mark.parametrize("kept", [False, True], ids=["asked", "cached"])
def test_a_teacher_of_another_program_is_checked_like_ours(kept):
  """The findings are those of the same numbers from a function that JAX can trace."""
  rng = np.random.default_rng(0)
  inputs = rng.normal(size=(64, 6)).astype(np.float32)
  wrong = rng.normal(size=(6, 3)).astype(np.float32)  # it is sure, and knows nothing
  labels = np.argmax(inputs[:, :3], axis=1)
  examples = data.from_arrays(inputs, labels)
  source = data.on_device(examples, batch_size=16, data_seed=0)
  batches = data.evaluation_batches(examples, batch_size=16)
  student = networks.linen(models.MLP((4,), num_classes=3))
  given = {"objective": recipes.kd(temperature=4.0), "validation": batches, "warn": False}

  def findings(teacher, source):
    return search.preflight(student, data=source, teacher=teacher, baseline=[0.9], **given)

  foreign = teachers.foreign(lambda x: 50 * np.asarray(x) @ wrong, gives="logits")
  ours = Teacher(jnp.asarray(wrong), lambda v, batch: Outputs(50 * batch.inputs @ v))
  seen = teachers.cached(foreign, source, progress=None) if kept else source
  found, wanted = findings(foreign, seen), findings(ours, source)
  names = [one.check for one in wanted]
  assert "hardly_better" in names
  assert "calibration" in names
  # Of a foreign network the size is not known, by which two networks are compared.
  assert [one.check for one in found] == [name for name in names if name != "capacity_gap"]
