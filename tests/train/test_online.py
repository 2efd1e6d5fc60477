"""Teachers that learn meanwhile: cohorts and mutual learning, moving averages, generations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import small_networks
from jaxdistill import data, evaluation, export, networks, recipes, search, teachers, train
from jaxdistill.networks import models
from jaxdistill.train import init_state, make_step
from jaxdistill.train._shared_teacher import with_answers
from jaxdistill.types import Model, Network, Outputs, make_batch

STEPS = 6


def examples(size=24, seed=0):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, 3, size)
  inputs = rng.normal(size=(size, 4, 4, 1)) + labels[:, None, None, None]
  return data.from_arrays(inputs.astype(np.float32), labels, num_classes=3)


def source(data_seed=0, **options):
  return data.on_device(examples(**options), batch_size=8, data_seed=data_seed)


def held_out():
  return data.evaluation_batches(examples(seed=1), batch_size=16)


def mlp(width=5):
  return networks.linen(models.MLP((width,), num_classes=3), features=["hidden1"], name="mlp")


def conv():
  return networks.linen(models.ConvNet((2,), (2,), 3, num_classes=3), name="conv")


def cohort(**options):
  return networks.cohort({"conv": conv(), "mlp": mlp()}, **options)


def twins(**fields):
  """Two of dense layers, with what has a state across examples and a draw of its own."""
  wide, narrow = (small_networks.dense(width, **fields) for width in (6, 4))
  return networks.cohort({"wide": wide, "narrow": narrow})


def fit(student, objective=None, **options):
  given = {"data": source(), "optimizer": optax.sgd(0.1, momentum=0.9), "steps": STEPS, **options}
  return small_networks.fit(student, recipes.dml() if objective is None else objective, **given)


def assert_same_bits(first, second):
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def assert_close(first, second, tolerance=1e-5):
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def raw(state):
  """A state whose random key is its words."""
  return dataclasses.replace(state, key=jax.random.key_data(state.key))


def killed(folder, **options):
  """A run that is killed after four steps and gone on with."""

  class KilledError(Exception):
    pass

  def kill(step, record):
    if step == 4:
      raise KilledError

  every = {"log_every": 2, "checkpoint_every": 2, "folder": folder}
  with pytest.raises(KilledError):
    fit(callback=kill, **every, **options)
  return fit(**every, **options)


# --- A cohort. ---


@pytest.mark.slow
def test_a_cohort_is_its_members_side_by_side():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4, 4, 1)), jnp.float32)
  both, alone = twins(norm=True, dropout=0.5), small_networks.dense(6, norm=True, dropout=0.5)
  variables = both.init(jax.random.key(0), x)
  assert set(variables) == {"params", "batch_stats"}
  mine = {name: tree["wide"] for name, tree in variables.items()}
  key = jax.random.key(1)
  outputs, state = both.apply(variables, x, train=True, key=key)
  theirs, moved = alone.apply(mine, x, train=True, key=jax.random.fold_in(key, 0))
  assert_close(outputs.members["wide"].logits, theirs.logits)
  assert_close(state["batch_stats"]["wide"], moved["batch_stats"])
  assert_close(outputs.features["wide/mid"], theirs.features["mid"])
  mean = (outputs.members["wide"].logits + outputs.members["narrow"].logits) / 2
  assert_close(outputs.logits, mean)
  # In inference nothing is drawn and nothing moves.
  assert both.apply(variables, x, train=False, key=None)[1] == {}


def test_members_of_one_architecture_begin_and_drop_out_apart():
  one = small_networks.dense(6, dropout=0.5)
  both, x = networks.cohort({"a": one, "b": one}), jnp.ones((4, 8))
  variables = both.init(jax.random.key(0), x)
  first, second = (variables["params"][name]["Dense_0"]["kernel"] for name in "ab")
  assert not np.allclose(first, second)
  same = {"params": {"a": variables["params"]["a"], "b": variables["params"]["a"]}}
  members = both.apply(same, x, train=True, key=jax.random.key(1))[0].members
  assert not np.allclose(members["a"].logits, members["b"].logits)


def test_the_cohorts_own_logits_are_the_leads():
  x = jnp.ones((2, 4, 4, 1))
  led = cohort(lead="mlp")
  variables = led.init(jax.random.key(0), x)
  outputs, _ = led.apply(variables, x, train=False, key=None)
  assert_same_bits(outputs.logits, outputs.members["mlp"].logits)
  unequal = {"a": small_networks.dense(3), "b": small_networks.dense(3, classes=4)}
  mixed = networks.cohort(unequal)
  variables = mixed.init(jax.random.key(0), x)
  with pytest.raises(ValueError, match=r"have no mean; name the member .* lead='a'"):
    mixed.apply(variables, x, train=False, key=None)
  assert networks.cohort(unequal, lead="b").init(jax.random.key(0), x)


@pytest.mark.parametrize(
  ("given", "options", "message"),
  [
    ({"a": None}, {}, "two or more by name"),
    ([1, 2], {}, "two or more by name"),
    ({"a": 1, "b": 2}, {}, r"networks\['a'\]=1 must be a Network"),
    ({"a/b": 1, "b": 2}, {}, "'a/b'; take a word without a slash"),
  ],
)
def test_what_is_no_cohort_is_refused(given, options, message):
  with small_networks.untyped(), pytest.raises((TypeError, ValueError), match=message):
    networks.cohort(given, **options)


def test_what_no_cohort_is_needed_for_says_so():
  with pytest.raises(ValueError, match="lead='c' is no member; there are"):
    cohort(lead="c")
  with pytest.raises(TypeError, match="must be the model of a networks.cohort"):
    networks.members(small_networks.model(mlp(), 1, 4, 4, 1, key=jax.random.key(0)))
  for objective in (recipes.dml(), recipes.each(recipes.kd(hard_weight=None))):
    with pytest.raises(ValueError, match=r"trains several networks, and the student is one: give"):
      fit(mlp(), objective)
  simkd = recipes.simkd({"kernel": np.ones((3, 3))})
  with pytest.raises(ValueError, match="deploys a network of its own"):
    recipes.each(simkd)


# --- Deep mutual learning. ---


def softmax(z):
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_dml_by_hand_and_no_gradient_passes_a_peer(temperature):
  """Value and gradient in float64 NumPy, for three networks, with masks of both kinds."""
  rng = np.random.default_rng(3)
  logits = {name: rng.normal(size=(5, 4)) for name in "abc"}
  labels = np.array([0, 3, 1, 2, 0])
  weight, labelled = np.array([1.0, 1, 1, 1, 0]), np.array([1.0, 0, 1, 1, 1])
  with jax.enable_x64(True):
    batch = make_batch(jnp.zeros((5, 1)), labels, weight=weight, labelled=labelled)
    objective = recipes.dml(mutual_weight=0.7, hard_weight=0.4, temperature=temperature)

    def loss(logits):
      student = Outputs(members={n: Outputs(z) for n, z in logits.items()})
      terms, _ = objective.apply({}, {}, student, None, batch, key=None)
      return train.reduce_terms(terms, batch)[0]

    value, gradient = jax.value_and_grad(loss)({n: jnp.asarray(z) for n, z in logits.items()})
  total, t = 0.0, temperature
  for name, z in logits.items():
    q, hard, soft = softmax(z), softmax(z / t), np.zeros(5)
    slope = 0.4 * (q - np.eye(4)[labels]) * (weight * labelled)[:, None] / (weight * labelled).sum()
    total += 0.4 * np.sum(-np.log(q[range(5), labels]) * weight * labelled) / 3
    for other in set(logits) - {name}:
      p = softmax(logits[other] / t)
      soft += t**2 * (p * np.log(p / hard)).sum(-1) / 2
      # Of KL(p || q) with p fixed: the gradient is q − p, times T of the T² and the 1 / T.
      slope += 0.7 * t * (hard - p) / 2 * weight[:, None] / weight.sum()
    total += 0.7 * np.sum(soft * weight) / 4
    np.testing.assert_allclose(gradient[name], slope, rtol=1e-10, atol=1e-12)
  assert float(value) == pytest.approx(total, rel=1e-6)  # sums are float32's at least


def test_padding_of_a_member_leaks_nowhere():
  """What a member says of padding is NaN, by an addend, so that its own gradient has none."""

  def member(width):
    def init(key, x):
      return {"params": {"kernel": jax.random.normal(key, (width, 3))}}

    def apply(variables, x, *, train, key):
      logits = x[:, :width] @ variables["params"]["kernel"] + x[:, 4:]
      return Outputs(logits, {"mid": logits}), {}

    return Network(init, apply)

  student = networks.cohort({"a": member(4), "b": member(2)})
  objective = recipes.combine(recipes.dml(), recipes.each(recipes.hint("mid", "mid")))
  x = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
  batch = make_batch(jnp.asarray(x), jnp.arange(6) % 3)
  network = small_networks.dense(3)
  teacher = teachers.frozen(small_networks.model(network, 1, 5, key=jax.random.key(9)))
  given = (student, objective, optax.sgd(0.1))
  state = init_state(jax.random.key(0), *given, batch, teacher=teacher)
  step = jax.jit(make_step(*given))
  alone, _ = step(state, teacher, jax.tree.map(lambda leaf: leaf[:4], batch))
  x[4:, 4] = np.nan
  weight = jnp.asarray([1.0, 1, 1, 1, 0, 0])
  padded, _ = step(state, teacher, batch.replace(inputs=jnp.asarray(x), weight=weight))
  assert_close(padded.params, alone.params)


def test_a_member_that_is_frozen_keeps_its_statistics():
  student, label = twins(norm=True), lambda params: {name: name for name in params}
  parts = {"wide": optax.set_to_zero(), "narrow": optax.sgd(0.1)}
  state, step = begun(student, recipes.dml(), optimizer=optax.multi_transform(parts, label))
  after = steps_of(state, step, None, count=1)[-1]
  for tree, moved in ((state.params, after.params), (state.model_state, after.model_state)):
    pick = lambda tree, name: tree.get("batch_stats", tree)[name]  # noqa: E731
    assert_same_bits(pick(moved, "wide"), pick(tree, "wide"))
    assert not np.allclose(*(jax.tree.leaves(pick(t, "narrow"))[0] for t in (tree, moved)))


def begun(student, objective, teacher=None, optimizer=None, **options):
  """A state, and the compiled step."""
  optimizer = optax.sgd(0.1) if optimizer is None else optimizer
  batch = make_batch(jnp.zeros((2, 4, 4, 1)), jnp.zeros(2, int))
  average = options.get("average") is not None
  given = (jax.random.key(0), student, objective, optimizer, batch)
  state = init_state(*given, teacher=teacher, average=average)
  return state, jax.jit(make_step(student, objective, optimizer, **options))


@pytest.fixture(scope="module")
def taught_each_other():
  return fit(cohort(), seed=[3, 4])


@pytest.mark.slow
def test_a_trained_cohort_comes_apart(taught_each_other, tmp_path):
  """Each member is a model over the seeds: evaluated, saved, loaded, one seed by itself."""
  each = networks.members(taught_each_other)
  assert list(each) == ["conv", "mlp"]
  assert [one.seeds for one in each.values()] == [2, 2]
  x = held_out().inputs[0]
  whole = taught_each_other.instance(1)(x)
  assert_close(each["mlp"].instance(1)(x).logits, whole.members["mlp"].logits)
  measured = {name: evaluation.evaluate(one, held_out()) for name, one in each.items()}
  assert measured["conv"]["accuracy"].shape == (2,)
  assert not np.allclose(measured["conv"]["nll"], measured["mlp"]["nll"])
  stored = jax.ShapeDtypeStruct((4, 4, 1), jnp.float32)
  export.save_student(tmp_path, each["mlp"], stored=stored)
  loaded = export.load_student(tmp_path, instance=1)
  assert_close(loaded(x), each["mlp"].instance(1)(x).logits)


@pytest.mark.slow
def test_a_mutual_run_goes_on_with_the_same_bits(tmp_path):
  options = {"student": twins(norm=True, dropout=0.4), "seed": [0, 1]}
  whole = fit(**options, log_every=2)
  assert_same_bits(raw(killed(tmp_path, **options).state), raw(whole.state))
  restored = teachers.restore(tmp_path, options["student"])
  assert_same_bits(
    networks.members(restored)["wide"].variables["params"],
    networks.members(whole)["wide"].variables["params"],
  )


@pytest.mark.slow
def test_a_mutual_run_is_the_same_however_it_is_run():
  whole = fit(twins()).variables
  one = train.data_parallel(jax.devices()[:1])
  for options in (
    {"dispatch": train.with_jit(one)},
    {"dispatch": train.with_pmap()},
    {"accumulate": 2},
  ):
    assert_close(fit(twins(), **options).variables, whole)


@pytest.mark.slow
def test_a_sweep_over_dmls_weight_of_two_architectures(tmp_path, monkeypatch):
  """Every student is the cohort that was trained alone; stopped, it goes on to the same bits."""
  student, weights, seeds = cohort(), [0.0, 2.0], [0, 1]

  def swept(folder):
    return search.sweep(
      student,
      recipes.dml,
      points=search.product(mutual_weight=weights),
      data=source(),
      optimizer=optax.sgd(0.1, momentum=0.9),
      steps=STEPS,
      seeds=seeds,
      choice=search.Choice(held_out(), metric="nll"),
      run=train.Run(folder, checkpoint_every=3, progress=None),
    )

  real, calls = train.Program.run, []

  def stops(self, state, at, count):
    calls.append(at)
    if at >= 3 and len(calls) < 9:
      raise KeyboardInterrupt
    return real(self, state, at, count)

  found = swept(tmp_path / "whole")
  monkeypatch.setattr(train.Program, "run", stops)
  with pytest.raises(KeyboardInterrupt):
    swept(tmp_path / "stopped")
  monkeypatch.setattr(train.Program, "run", real)
  assert_same_bits(swept(tmp_path / "stopped").model.variables, found.model.variables)
  for i, weight in enumerate(weights):
    for s, seed in enumerate(seeds):
      alone = fit(student, recipes.dml(mutual_weight=weight), data=source(seed), seed=seed)
      assert_close(found.students(i).instance(s).variables, alone.variables, 1e-4)
  assert not np.allclose(found.rows[0].metrics["nll"], found.rows[1].metrics["nll"])
  each = networks.members(found.model)
  assert each["conv"].seeds == each["mlp"].seeds == 2
  assert evaluation.evaluate(each["mlp"], held_out())["accuracy"].shape == (2,)


@pytest.mark.slow
def test_mutual_learning_beside_a_frozen_teacher():
  teacher = teachers.frozen(small_networks.model(mlp(9), 1, 4, 4, 1, key=jax.random.key(9)))
  before = jax.tree.map(np.array, teacher)
  soft = recipes.each(recipes.combine(recipes.kd(hard_weight=None), recipes.hint("mid", "hidden1")))
  fitted = fit(twins(), recipes.combine(recipes.dml(), soft), teacher=teacher)
  names = {f"{m}/{t}" for m in ("wide", "narrow") for t in ("labels", "mutual", "soft", "hint")}
  assert names <= set(fitted.history[-1])
  assert_same_bits(before, teacher)
  # A projector for each: widths 6 and 4 to the teacher's 9.
  learned = fitted.state.objective_params["1"]
  shapes = {m: jax.tree.leaves(jax.tree.map(jnp.shape, learned[m])) for m in learned}
  assert shapes["wide"] != shapes["narrow"]


def test_a_cohort_that_teaches_is_asked_in_the_step():
  """Its outputs for every example could be kept beforehand, but for what its members say apart."""
  student = twins()
  teacher = teachers.frozen(small_networks.model(student, 1, 4, 4, 1, key=jax.random.key(9)))
  plan = train.Plan.of(
    student,
    recipes.each(recipes.kd(hard_weight=None)),
    data=source(),
    optimizer=optax.sgd(0.1),
    steps=STEPS,
    teacher=teacher,
  )
  assert with_answers(plan, None) is plan
  moving = dataclasses.replace(plan, teacher=teachers.moving_average())
  assert with_answers(moving, None) is moving


# --- A moving average. ---


def steps_of(state, step, teacher, count=3, seed=0):
  """The states along the way, on batches of their own."""
  rng, states = np.random.default_rng(seed), [state]
  for _ in range(count):
    inputs = jnp.asarray(rng.normal(size=(6, 4, 4, 1)), jnp.float32)
    batch = make_batch(inputs, jnp.asarray(rng.integers(0, 3, 6)))
    states.append(step(states[-1], teacher, batch)[0])
  return states


def test_the_teacher_is_the_closed_form_after_three_steps():
  teacher = teachers.moving_average(0.6)
  student = small_networks.dense(5, norm=True)
  state, step = begun(student, recipes.mean_teacher(warmup_steps=0), teacher)
  states = steps_of(state, step, teacher)
  seen = [
    jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), {"params": s.params, **s.model_state})
    for s in states
  ]
  # d = min(0.6, (1 + t) / (2 + t)) is 1/2, 0.6 and 0.6: the weights of the four states.
  shares = [0.5 * 0.36, 0.5 * 0.36, 0.4 * 0.6, 0.4]
  assert sum(shares) == pytest.approx(1)
  wanted = jax.tree.map(lambda *x: sum(w * a for w, a in zip(shares, x, strict=True)), *seen)
  assert_close(states[-1].teacher, wanted, 1e-6)
  assert_close(states[0].teacher, seen[0], 0)
  assert not np.allclose(*(s.teacher["batch_stats"]["BatchNorm_0"]["mean"] for s in states[::3]))


def test_the_loss_is_the_averages_answers_in_inference():
  """A step by hand: what the term compares with, and that nothing is differentiated through it."""
  teacher, student = teachers.moving_average(0.5), small_networks.dense(5, norm=True)
  objective = recipes.kd(hard_weight=None, soft_weight=1.0)
  state, step = begun(student, objective, teacher)
  # Two networks, and not twins: otherwise the KL is 0.
  other = student.init(jax.random.key(5), jnp.zeros((1, 4, 4, 1)))
  state = dataclasses.replace(state, teacher=other)
  inputs = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4, 4, 1)), jnp.float32)
  batch = make_batch(inputs, jnp.zeros(6, int))
  got, sums = step(state, teacher, batch)
  fixed = teachers.frozen(Model(student, other))
  alone, want = step(dataclasses.replace(state, teacher=None), fixed, batch)
  assert_close(sums, want)
  assert_close(got.params, alone.params)


@pytest.mark.slow_but("None")
@pytest.mark.parametrize("average", [None, 0.9])
def test_a_run_with_a_moving_teacher_goes_on_with_the_same_bits(tmp_path, average):
  options = {
    "student": small_networks.dense(5, norm=True, dropout=0.4),
    "objective": recipes.mean_teacher(warmup_steps=3),
    "teacher": teachers.moving_average(0.9),
    "average": average,
    "seed": [0, 1],
  }
  whole = fit(**options, log_every=2)
  assert_same_bits(raw(killed(tmp_path, **options).state), raw(whole.state))
  # What is deployed is the student, or the average that is asked for.
  deployed = whole.state.params if average is None else whole.state.average["params"]
  assert_same_bits(whole.variables["params"], deployed)
  assert_same_bits(teachers.restore(tmp_path, options["student"]).variables, whole.variables)
  # Another decay is another run.
  with pytest.raises(ValueError, match=r'teacher: .*"decay": 0.9.* there, .*"decay": 0.8'):
    fit(**options | {"teacher": teachers.moving_average(0.8)}, folder=tmp_path)


def test_the_average_of_a_decay_is_one_however_it_is_used():
  """Deployed or teaching, it is one formula, but for the first steps' warm-up."""
  teacher, student = teachers.moving_average(0.05), small_networks.dense(5, norm=True)
  objective = recipes.mean_teacher(warmup_steps=0)
  state, step = begun(student, objective, teacher, average=0.05)
  state = steps_of(state, step, teacher)[-1]
  assert_same_bits(state.teacher, state.average)  # both warm-ups are above 0.05


def test_a_decay_may_follow_the_step():
  rising = teachers.moving_average(lambda step: jnp.minimum(0.2 * step, 1.0))
  state, step = begun(mlp(), recipes.kd(), rising)
  states = steps_of(state, step, rising, count=2)
  assert_same_bits(states[1].teacher["params"], states[1].params)  # at step 0 it is 0
  moved = jax.tree.map(lambda a, b: 0.2 * a + 0.8 * b, states[1].params, states[2].params)
  assert_close(states[2].teacher["params"], moved, 1e-6)


def test_a_moving_teacher_begins_as_the_student_and_a_frozen_one_stays_in_its_bits():
  frozen = teachers.frozen(small_networks.model(mlp(), 1, 4, 4, 1, key=jax.random.key(9)))
  before = jax.tree.map(np.array, frozen)
  state, step = begun(mlp(), recipes.kd(), frozen)
  assert state.teacher is None
  steps_of(state, step, frozen)
  assert_same_bits(frozen, before)
  moving = teachers.moving_average()
  state, _ = begun(mlp(), recipes.kd(), moving)
  assert_same_bits(state.teacher["params"], state.params)


@pytest.mark.slow
def test_moving_teachers_of_a_sweep_are_each_students_own():
  student, teacher = mlp(), teachers.moving_average(0.9)
  weights, make = (
    [1.0, 30.0],
    lambda weight: recipes.mean_teacher(consistency_weight=weight, warmup_steps=0),
  )
  found = search.sweep(
    student,
    make(1.0),
    points=search.product(consistency_weight=weights),
    data=source(),
    optimizer=optax.sgd(0.1, momentum=0.9),
    steps=STEPS,
    seeds=[0, 1],
    teacher=teacher,
    choice=search.Choice(held_out()),
    run=train.Run(progress=None),
  )
  for i, weight in enumerate(weights):
    for s in range(2):
      alone = fit(student, make(weight), data=source(s), seed=s, teacher=teacher)
      assert_close(found.students(i).instance(s).variables, alone.variables, 1e-4)


def test_a_cohort_is_taught_by_its_own_average():
  teacher, objective = teachers.moving_average(0.5), recipes.each(recipes.kd(hard_weight=None))
  student = twins()
  state, step = begun(student, objective, teacher)
  other = student.init(jax.random.key(5), jnp.zeros((1, 4, 4, 1)))
  state = dataclasses.replace(state, teacher=other)
  inputs = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4, 4, 1)), jnp.float32)
  _, sums = step(state, teacher, make_batch(inputs, jnp.zeros(6, int)))
  for name, width in (("wide", 6), ("narrow", 4)):
    alone, _ = small_networks.dense(width), None
    logits = [
      np.float64(alone.apply({"params": p[name]}, inputs, train=False, key=None)[0].logits)
      for p in (other["params"], state.params)
    ]
    p, q = (softmax(z / 4) for z in logits)
    wanted = 16 * (p * np.log(p / q)).sum()
    assert float(sums[f"{name}/soft"][0]) == pytest.approx(wanted, rel=1e-4)


def test_what_a_moving_average_cannot_be_is_refused():
  moving = teachers.moving_average()
  other = small_networks.model(mlp(), 1, 4, 4, 1, key=jax.random.key(0))
  with pytest.raises(ValueError, match="is made of nothing yet"):
    teachers.ensemble([moving, other])
  with pytest.raises(ValueError, match="is made of nothing yet"):
    teachers.subset(moving, [0])
  with pytest.raises(ValueError, match="exists in that run alone"):
    evaluation.evaluate(other, held_out(), teacher=moving)
  with pytest.raises(ValueError, match="exists in that run alone"):
    teachers.cached(moving, source())
  cached = teachers.cached(teachers.frozen(other), source(), progress=None)
  with pytest.raises(ValueError, match="the batches bring another teacher's outputs along"):
    fit(mlp(), recipes.kd(), data=cached, teacher=moving)
  for wrong in (-0.1, 1.5, float("nan")):
    with pytest.raises(ValueError, match="decay"):
      teachers.moving_average(wrong)
  with pytest.raises(TypeError, match="decay"), small_networks.untyped():
    teachers.moving_average("0.9")


@pytest.mark.slow
def test_what_is_deployed_is_said(capsys, tmp_path):
  given = {"teacher": teachers.moving_average(), "steps": 1, "progress": "run"}
  fit(mlp(), recipes.kd(), **given)
  fit(mlp(), recipes.kd(), average=0.99, **given)
  said = "".join(capsys.readouterr())
  assert "moving average of the student; the student is deployed" in said
  assert "moving average of the student; its average (average=0.99) is deployed" in said


# --- Generations. ---


@pytest.mark.slow
def test_a_run_that_learns_from_its_past_goes_on_with_the_same_bits(tmp_path):
  given = {"student": mlp(), "objective": recipes.pskd(24, growth_steps=4), "seed": [0, 1]}
  whole = fit(**given, log_every=2)
  assert_same_bits(raw(killed(tmp_path, **given).state), raw(whole.state))
  past = np.asarray(whole.state.objective_state["past"])
  assert past.shape == (2, 24, 3)
  np.testing.assert_allclose(past.sum(-1), 1, rtol=1e-5)
  assert not np.allclose(past[0], past[1])
  one = fit(mlp(), given["objective"], seed=0)
  mapped = recipes.pskd(24, growth_steps=4, axis_name=train.AXIS)
  spread = fit(mlp(), mapped, seed=0, dispatch=train.with_pmap())
  assert_close(spread.state.objective_state["past"], one.state.objective_state["past"], 1e-4)
  assert_close(spread.variables, one.variables, 1e-4)


@pytest.mark.slow
def test_generations_that_were_killed_within_one_end_with_the_same_bits(tmp_path):
  class KilledError(Exception):
    pass

  def born(folder, kill=None):
    seen = []

    def called(step, record):
      seen.append(step)
      if kill is not None and len(seen) == kill:
        raise KilledError

    return train.born_again(
      mlp(),
      generations=3,
      data=source(),
      optimizer=optax.sgd(0.1, momentum=0.9),
      steps=STEPS,
      watch=train.Watch(callback=called, log_every=2),
      run=train.Run(folder, checkpoint_every=2, progress=None),
    )

  whole = born(tmp_path / "whole")
  # Three records a generation: the fifth is within the second.
  with pytest.raises(KilledError):
    born(tmp_path / "killed", kill=5)
  assert not (tmp_path / "killed" / "generation3").exists()
  for again, one in zip(born(tmp_path / "killed"), whole, strict=True):
    assert_same_bits(raw(again.state), raw(one.state))


@pytest.mark.slow
def test_each_seed_is_taught_by_its_own_predecessor(tmp_path):
  given = {"data": source(), "optimizer": optax.sgd(0.1), "steps": STEPS}
  found = train.born_again(
    mlp(), generations=2, seed=[0, 1], run=train.Run(tmp_path, progress=None), **given
  )
  assert [one.seeds for one in found] == [2, 2]
  soft = recipes.kd(temperature=1.0, soft_weight=1.0, hard_weight=1.0)
  for i in range(2):
    first = fit(mlp(), recipes.labels(), **given, seed=i)
    assert_close(found[0].instance(i).variables, first.variables)
    before = teachers.frozen(found[0].instance(i))
    second = fit(mlp(), soft, **given, seed=2 + i, teacher=before)
    assert_close(found[1].instance(i).variables, second.variables)
  # Started again, it is finished, and found.
  again = train.born_again(
    mlp(), generations=2, seed=[0, 1], run=train.Run(tmp_path, progress=None), **given
  )
  assert_same_bits(again[1].variables, found[1].variables)
  assert teachers.ensemble([one.instance(0) for one in found])


@pytest.mark.slow
def test_one_seed_has_its_teacher_in_the_step():
  given = {
    "data": source(),
    "optimizer": optax.sgd(0.1),
    "steps": STEPS,
    "run": train.Run(progress=None),
  }
  found = train.born_again(mlp(), recipes.hint("hidden1"), generations=2, seed=5, **given)
  before = teachers.frozen(found[0])
  alone = fit(
    mlp(), recipes.hint("hidden1"), teacher=before, seed=6, data=source(), optimizer=optax.sgd(0.1)
  )
  assert_close(found[1].variables, alone.variables)
