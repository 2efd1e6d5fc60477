"""The sweep: every student is the one trained alone; memory, halving, NaN, resume, selection."""

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import small_networks
from jaxdistill import _compile, data, networks, recipes, search, teachers, train
from jaxdistill.networks import linen, models
from jaxdistill.search import _choice, _sweep, _trials
from jaxdistill.search._grid import grouped
from jaxdistill.train import _shared_teacher
from jaxdistill.types import Model, Outputs, as_objective, make_batch

SIZE, CLASSES = 96, 3


def examples(dtype=np.float32, seed=0, size=SIZE):
  random = np.random.RandomState(seed)
  labels = random.randint(0, CLASSES, size)
  inputs = random.normal(size=(size, 6)) + 2 * np.eye(CLASSES, 6)[labels]
  return data.from_arrays(inputs.astype(dtype), labels, num_classes=CLASSES)


def taught(features=(), **fields):
  module = models.MLP(widths=(12,), num_classes=CLASSES, **fields)
  network = networks.linen(module, features=features, name="teacher")
  return teachers.frozen(Model(network, network.init(jax.random.key(7), jnp.zeros((1, 6)))))


@pytest.fixture(scope="module")
def parts():
  student = networks.linen(models.MLP(widths=(5,), num_classes=CLASSES), name="student")
  return {
    "student": student,
    "teacher": taught(),
    "data": data.on_device(examples(), batch_size=16, data_seed=0),
    "validation": data.evaluation_batches(examples(seed=1, size=40), batch_size=16),
  }


def swept(parts, points, objective=None, **options):
  settings = {
    **parts,
    "optimizer": lambda learning_rate=0.05, weight_decay=0.0: optax.adamw(
      learning_rate, weight_decay=weight_decay
    ),
    "steps": 50,
    "run": train.Run(options.pop("folder", None), progress=None),
    **options,
  }
  for argument, make in (("choice", search.Choice), ("execution", search.Execution)):
    names = [field.name for field in dataclasses.fields(make)]
    settings[argument] = make(**{n: settings.pop(n) for n in names if n in settings})
  student = settings.pop("student")
  return search.sweep(student, objective or recipes.kd(), points=points, **settings)


def alone(parts, point, seed, data_seed, steps=50, objective=None, **options):
  point = dict(point)
  rates = {n: point.pop(n) for n in ("learning_rate", "weight_decay") if n in point}
  rates = {"learning_rate": 0.05, "weight_decay": 0.0, **rates}
  return train.fit(
    parts["student"],
    as_objective(objective or recipes.kd(), **point),
    data=dataclasses.replace(parts["data"], data_seed=data_seed),
    optimizer=optax.adamw(rates["learning_rate"], weight_decay=rates["weight_decay"]),
    steps=steps,
    seed=seed,
    teacher=parts["teacher"],
    run=train.Run(progress=None),
    **options,
  ).variables


def assert_same(a, b, atol):
  a, b = (one.variables if isinstance(one, Model) else one for one in (a, b))
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=atol)


POINTS = search.product(
  temperature=[1, 4.0, 20], soft_weight=[0.3, 0.9], learning_rate=[0.05, 0.01]
)
SEEDS = [(0, 0), (1, 5)]


@pytest.fixture(scope="module")
def plain(parts):
  return swept(parts, POINTS, seeds=SEEDS, devices=jax.devices()[:1])


def of_seed(model, s):
  return model.unstack()[s]


@pytest.mark.device
def test_every_student_is_the_one_trained_alone(parts, plain):
  """Fifty steps of Adam in float32, to 1e-5; initialisation and data order both vary."""
  for index, s in ((0, 0), (6, 1), (11, 1)):
    expected = alone(parts, POINTS[index], *SEEDS[s])
    assert_same(of_seed(plain.students(index), s), expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [1, 4])
def test_a_few_side_by_side_at_a_time_are_the_same_students(parts, plain, monkeypatch, at_once):
  """On a CPU, caches limit them: fewer than there are data seeds, or some points of all."""
  monkeypatch.setattr(_sweep, "at_once", lambda student, source: at_once)
  result = swept(parts, POINTS[:6], seeds=SEEDS, devices=jax.devices()[:1])
  for index in range(6):
    assert_same(result.students(index), plain.students(index), atol=1e-5)


@pytest.mark.slow
def test_devices_share_the_points(parts, plain):
  result = swept(parts, POINTS[:5], seeds=SEEDS, devices=jax.devices()[:2])
  for index in range(5):
    assert_same(result.students(index), plain.students(index), atol=1e-5)


@pytest.mark.slow
def test_in_float64_over_the_whole_run(parts):
  with jax.enable_x64(True):
    student = networks.linen(models.MLP((5,), CLASSES, param_dtype=jnp.float64), name="student")
    wide = {
      **parts,
      "student": student,
      "teacher": taught(param_dtype=jnp.float64),
      "data": data.on_device(examples(np.float64), batch_size=16, data_seed=0),
      "validation": data.evaluation_batches(examples(np.float64, seed=1), batch_size=16),
    }
    points = search.product(temperature=[1.3, 7], learning_rate=[0.03])
    result = swept(wide, points, steps=300, seeds=[3])
    for index, point in enumerate(points):
      expected = alone(wide, point, 3, 3, steps=300)
      # Rounding alone: 300 steps of Adam amplify 1e-16 by some thousands.
      assert_same(of_seed(result.students(index), 0), expected, atol=1e-10)


@pytest.mark.slow
def test_one_batch_and_one_teacher_pass_for_all_students_of_a_data_seed(parts):
  calls = []

  def counted(variables, batch):
    jax.debug.callback(lambda index: calls.append(np.shape(index)), batch.index)
    return parts["teacher"].apply(variables, batch)

  teacher = dataclasses.replace(parts["teacher"], apply=counted)
  noise = data.Augmentation(lambda x, key: x + jax.random.normal(key, x.shape, x.dtype), None)
  source = data.on_device(examples(), batch_size=16, data_seed=0, augmentation=noise)
  result = swept(
    {**parts, "teacher": teacher, "data": source},
    POINTS[:3],
    seeds=[0],
    steps=10,
    devices=jax.devices()[:1],
  )
  jax.effects_barrier()
  assert len(calls) == 10
  assert set(calls) == {(16,)}
  assert len(result.rows) == 3
  calls.clear()
  # Without augmentation the teacher sees every example once, whatever the seeds; and two batches
  # before, by which it is known to answer to an example alone.
  swept({**parts, "teacher": teacher}, POINTS[:2], seeds=[0, 1], steps=10)
  jax.effects_barrier()
  assert len(calls) == 1 + 2


@pytest.mark.slow
def test_under_augmentation_too(parts):
  noise = data.Augmentation(lambda x, key: x + jax.random.normal(key, x.shape, x.dtype), None)
  source = data.on_device(examples(), batch_size=16, data_seed=0, augmentation=noise)
  result = swept({**parts, "data": source}, POINTS[:2], seeds=SEEDS, steps=20)
  for s, (seed, data_seed) in enumerate(SEEDS):
    expected = alone({**parts, "data": source}, POINTS[1], seed, data_seed, steps=20)
    assert_same(of_seed(result.students(1), s), expected, atol=1e-5)


@pytest.mark.slow
def test_chunks_that_fit_the_memory_are_the_same_students(parts, plain):
  one = jax.devices()[:1]
  result = swept(parts, POINTS, seeds=SEEDS, devices=one, memory=60_000)
  for index in range(len(POINTS)):
    assert_same(result.students(index), plain.students(index), atol=1e-5)
  with pytest.raises(ValueError, match=r"one point .* needs [\d,]+ bytes, and memory is 1,000"):
    swept(parts, POINTS, seeds=SEEDS, devices=one, memory=1000)


@pytest.mark.parametrize(
  ("count", "memory", "multiple", "expected"),
  [(10, 10_000, 1, 10), (50, 350, 1, 25), (50, 349, 1, 17), (7, 130, 2, 4), (7, 10_000, 2, 8)],
)
def test_capacity(count, memory, multiple, expected):
  """100 bytes, and 10 for each point of a device (of ``multiple`` devices)."""
  asked = []

  def cost(points):
    asked.append(points)
    return 100 + 10 * points // multiple

  assert _compile.that_fit(cost, count, memory, multiple=multiple) == expected
  assert len(asked) in (1, 3)
  assert 100 + 10 * expected // multiple <= memory
  assert _compile.available(jax.devices()) > 2**20


@pytest.mark.slow
def test_values_that_are_no_numbers_make_programs_of_their_own(parts):
  def recipe(*, layer, hint_weight=1.0, **soft):
    hint = recipes.hint(layer, layer, hint_weight=hint_weight)
    return recipes.combine(recipes.kd(**soft), hint) if layer else recipes.kd(**soft)

  student = networks.linen(models.MLP((5,), CLASSES), features=["hidden1"], name="student")
  mine = {**parts, "student": student, "teacher": taught(["hidden1"])}
  points = search.product(layer=["hidden1"], hint_weight=[0.1, 1.0], temperature=[2, 4])
  groups = grouped([*points, {**points[0], "layer": None}][:4], student, recipe, optax.sgd(0.1), 10)
  assert [group.indices for group in groups] == [[0, 1, 2, 3]]
  assert sorted(groups[0].hyper) == ["hint_weight", "temperature"]
  some = [{"hint_weight": 0.5, "layer": "hidden1"}, {"hint_weight": 0.1, "layer": "hidden1"}]
  result = swept(mine, some, recipe, optimizer=optax.adam(0.01), steps=20)
  expected = train.fit(
    student,
    recipe(layer="hidden1", hint_weight=0.5),
    data=mine["data"],
    optimizer=optax.adam(0.01),
    steps=20,
    teacher=mine["teacher"],
    run=train.Run(progress=None),
  )
  assert_same(of_seed(result.students(0), 0), expected, atol=1e-5)
  by_rate = grouped(
    search.product(standardize=[False, True], rate=[0.1, 0.2]),
    student,
    lambda *, standardize: recipes.dkd(standardize=standardize),
    lambda rate: optax.sgd(rate),
    10,
  )
  assert [(g.fixed, g.indices, g.optimizer["rate"].tolist()) for g in by_rate] == [
    ({"standardize": False}, [0, 1], [0.1, 0.2]),
    ({"standardize": True}, [2, 3], [0.1, 0.2]),
  ]


@pytest.mark.slow
def test_a_point_that_is_not_finite_is_marked_and_the_others_go_on(parts, plain, tmp_path):
  points = [POINTS[0], {**POINTS[0], "learning_rate": 1e30}, POINTS[6]]
  result = swept(parts, points, seeds=SEEDS, folder=tmp_path / "sweep", devices=jax.devices()[:1])
  assert [row.status for row in result.rows] == ["finished", "not finite", "finished"]
  assert np.isnan(result.rows[1].metrics["accuracy"]).all()
  assert 1 <= result.rows[1].step <= 50
  assert result.best != 1
  assert_same(result.students(0), plain.students(0), atol=1e-5)
  assert_same(result.students(2), plain.students(6), atol=1e-5)
  assert "not finite, step" in result.table()
  with pytest.raises(FloatingPointError, match="no point of the sweep stayed finite"):
    swept(parts, points[1:2])


@pytest.mark.slow
def test_a_point_whose_weights_are_finite_and_whose_outputs_are_not_is_marked_too(parts):
  """One step at that rate: weights of 1e30, and logits beyond float32."""
  points = [POINTS[0], {**POINTS[0], "learning_rate": 1e30}]
  result = swept(parts, points, metric="nll", steps=1)
  assert [row.status for row in result.rows] == ["finished", "not finite"]
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.students(1)))
  assert result.best == 0


@pytest.mark.slow
def test_halving_drops_points_and_the_others_are_trained_as_ever(parts, plain):
  result = swept(
    parts, POINTS, seeds=SEEDS, halving=search.Halving(factor=2, rungs=3), devices=jax.devices()[:1]
  )
  statuses = [row.status for row in result.rows]
  assert statuses.count("finished") == 3
  assert statuses.count("dropped") == 9
  steps = sorted(row.step for row in result.rows)
  assert steps[-3:] == [50] * 3
  assert steps[0] < 25 < steps[6] < 50
  for index, row in enumerate(result.rows):
    if row.status == "finished":
      assert_same(result.students(index), plain.students(index), atol=1e-5)


@pytest.mark.slow
def test_a_sweep_that_was_stopped_goes_on(parts, tmp_path, monkeypatch, plain):
  options = {"seeds": SEEDS, "memory": 60_000, "devices": jax.devices()[:1]}
  from jaxdistill.search import _trials

  real, calls = _trials.Search.trained, []

  def stops(self, *arguments):
    calls.append(arguments[1])
    if len(calls) == 3:
      raise KeyboardInterrupt
    return real(self, *arguments)

  monkeypatch.setattr(_trials.Search, "trained", stops)
  with pytest.raises(KeyboardInterrupt):
    swept(parts, POINTS, folder=tmp_path / "s", **options)
  first = list(calls)
  result = swept(parts, POINTS, folder=tmp_path / "s", **options)
  assert calls[3] == first[2], "the chunk that was stopped comes next, not those that are done"
  for index in range(len(POINTS)):
    assert_same(result.students(index), plain.students(index), atol=1e-5)
  count = len(calls)
  again = swept(parts, POINTS, folder=tmp_path / "s", **options)
  assert len(calls) == count
  assert again.table() == result.table()
  with pytest.raises(ValueError, match="another"):
    swept(parts, POINTS[:3], folder=tmp_path / "s", **options)
  files = {p.name for p in (tmp_path / "s").iterdir()}
  assert files == {
    *("config.json", "operations.json", "students"),
    *("table.md", "table.csv", "chosen.json", "sweep.png"),
  }
  chosen = json.loads((tmp_path / "s" / "chosen.json").read_text())
  assert chosen["values"] == result.chosen
  lines = (tmp_path / "s" / "table.csv").read_text().splitlines()
  assert len(lines) == 1 + len(POINTS) * len(SEEDS)


@pytest.mark.slow
def test_students_in_training_are_saved_and_go_on(parts, tmp_path, monkeypatch, plain):
  options = {
    "seeds": SEEDS,
    "devices": jax.devices()[:1],
    "run": train.Run(tmp_path / "s", checkpoint_every=25, progress=None),
  }
  real, steps = train.Program.run, []

  def stops(self, state, at, count):
    steps.append(at)
    if at >= 25 and steps.count(at) == 1 and len(steps) < 4:
      raise KeyboardInterrupt
    return real(self, state, at, count)

  monkeypatch.setattr(train.Program, "run", stops)
  with pytest.raises(KeyboardInterrupt):
    swept(parts, POINTS[:2], **options)
  before = len(steps)
  result = swept(parts, POINTS[:2], **options)
  assert min(steps[before:]) == 25
  assert_same(result.students(1), plain.students(1), atol=1e-5)


@pytest.mark.slow
def test_the_winner_is_tested_once_and_trained_anew_where_asked(parts):
  held_out = data.evaluation_batches(examples(seed=2, size=50), batch_size=16)
  result = swept(parts, POINTS[:3], test=held_out, retrain=[7, 8, 9])
  assert result.final_seeds == [(7, 7), (8, 8), (9, 9)]
  assert result.test["accuracy"].shape == (3,)
  expected = alone(parts, result.chosen, 8, 8)
  assert_same(of_seed(result.model, 1), expected, atol=1e-5)
  assert "trained anew from 3 seeds" in result.sentence()


@pytest.mark.slow
def test_what_is_deployed_is_what_is_validated(parts):
  student = networks.linen(models.MLP((5,), CLASSES), features=["hidden1"], name="student")
  mine = {**parts, "student": student, "teacher": taught(["hidden1"])}
  objective = as_objective(
    recipes.combine(recipes.kd(), recipes.hint("hidden1", "hidden1")),
    temperature=optax.linear_schedule(1.0, 4.0, 20),
  )
  points = [{"soft_weight": 0.5}, {"soft_weight": 0.7}]
  result = swept(mine, points, objective, steps=20, average=0.9)
  expected = alone(mine, points[1], 0, 0, steps=20, objective=objective, average=0.9)
  assert_same(of_seed(result.students(1), 0), expected, atol=1e-5)


def row(values, status="finished", **point):
  return search.Row(point, {"accuracy": np.array(values)}, 10, status)


@pytest.mark.slow
def test_several_networks_halved_together_are_those_trained_alone(parts, tmp_path):
  """Each network makes a program of its own, and points of all of them compete."""
  wide = linen(models.MLP(widths=(9, 7), num_classes=CLASSES), name="wide")
  networks = {"narrow": parts["student"], "wide": wide}
  points = search.product(student=list(networks), temperature=[1, 4.0], learning_rate=[0.05, 1e-4])
  mine = {**parts, "student": networks}
  options = {"seeds": SEEDS[:1], "halving": search.Halving(factor=2, rungs=2)}
  result = swept(mine, points, folder=tmp_path / "sweep", **options)
  assert sum(row.status == "finished" for row in result.rows) == 4
  assert result.model.network is networks[result.chosen["student"]]
  for index, row in enumerate(result.rows):
    if row.status == "finished":
      rest = dict(points[index])
      student = networks[rest.pop("student")]
      expected = alone({**parts, "student": student}, rest, 0, 0)
      assert_same(of_seed(result.students(index), 0), expected, atol=1e-5)
  config = json.loads((tmp_path / "sweep" / "config.json").read_text())
  assert sorted(config["students"]) == ["narrow", "wide"]


@pytest.mark.parametrize(
  ("students", "points", "options", "error", "match"),
  [
    (None, [{"student": "a"}], {}, ValueError, "there is one student: give several networks by"),
    ({}, [{"temperature": 1}], {}, TypeError, "an empty mapping is none"),
    ("two", [{"temperature": 1}], {}, ValueError, r"student=None, and the students are \['a', 'b"),
    ("two", [{"student": "c"}], {}, ValueError, "student='c', and the students are"),
  ],
)
def test_points_name_their_network(parts, students, points, options, error, match):
  if students == "two":
    students = {name: networks.linen(models.MLP((4,), CLASSES), name=name) for name in "ab"}
  mine = parts if students is None else {**parts, "student": students}
  with pytest.raises(error, match=match):
    swept(mine, points, **options)


def test_ties_and_noise():
  rows = [
    row([0.90, 0.92, 0.94], a=1),  # behind by 0.02 in every seed: clearly
    row([0.92, 0.94, 0.96], a=2),
    row([0.97, 0.90, 0.94], a=3),  # behind by 0.003 ± 0.026: a tie
    row([0.99, 0.99, 0.99], "dropped", a=4),
    row([np.nan] * 3, "not finite", a=5),
  ]
  assert _choice.best_of(rows, "accuracy") == (1, [2])
  # Of three seeds: the sample's deviation, 2, over the root of their number.
  assert _choice.standard_error(np.array([1.0, 3.0, 5.0])) == pytest.approx(2 / np.sqrt(3))
  one = [row([0.5], a=1), row([0.6], a=2), row([0.6], a=3)]
  assert _choice.best_of(one, "accuracy") == (1, [2])
  with pytest.raises(FloatingPointError):
    _choice.best_of(rows[3:], "accuracy")


def test_product_and_seeds():
  assert len(POINTS) == 12
  assert POINTS[1] == {"temperature": 1, "soft_weight": 0.3, "learning_rate": 0.01}


def sgd(momentum=0.9):
  return train.optimizers.sgd(0.1, steps=2, momentum=momentum)


@pytest.mark.parametrize(
  ("points", "options", "match"),
  [
    ([], {}, "points=.* must be a list of dicts"),
    ([{"temperature": 1}, {"soft_weight": 1}], {}, "every point gives a value for the same ones"),
    ([{"temprature": 1}], {}, r"points have \['temprature'\].*'temperature'"),
    ([{"temperature": 0}], {}, "temperature"),
    ([{"temperature": 4}, {"temperature": 4}], {}, "more than once"),
    ([{"seed": 4}], {}, "give seeds="),
    ([{"learning_rate": "high"}], {}, "learning_rate='high' for the optimizer"),
    *[([{"learning_rate": r}], {}, "learning_rate must be") for r in (0.0, -0.1, float("nan"))],
    ([{"momentum": 1.5}], {"optimizer": sgd}, "momentum=1.5 must be in"),
    ([{"soft_weight": -0.5}], {}, "soft_weight must be at least 0"),
    ([{"soft_weight": -0.5}], {"objective": recipes.kd}, "soft_weight must be at least 0"),
    ([{"temperature": 4}], {"seeds": [1, 1]}, "each of them once"),
    ([{"temperature": 4}], {"metric": "f1"}, "metric='f1' is not among"),
    ([{"temperature": 4}], {"steps": 0}, "steps=0"),
  ],
)
def test_errors_say_what_to_do(parts, points, options, match):
  with pytest.raises((ValueError, TypeError), match=match):
    swept(parts, points, **{"steps": 2, **options})


def test_the_rule_for_convolutions():
  dense = networks.linen(models.MLP((4,)), name="a")
  assert train.students_by(dense, jnp.zeros((1, 8, 8, 1)), backend="cpu") == "vmap"
  for conv, by in (("lax", "unroll"), ("patches", "vmap")):
    net = networks.linen(models.ConvNet((2,), (1,), 4, conv=conv), name="b")
    for backend in ("cpu", "gpu"):
      assert train.students_by(net, jnp.zeros((1, 8, 8, 1)), backend=backend) == by
    assert train.students_by(net, jnp.zeros((1, 8, 8, 1)), backend="tpu") == "vmap"


@pytest.mark.slow
def test_one_after_another_is_side_by_side(parts, plain):
  result = swept(parts, POINTS[:3], seeds=SEEDS, by="unroll", steps=50, devices=jax.devices()[:1])
  for index in range(3):
    assert_same(result.students(index), plain.students(index), atol=1e-5)


def test_only_the_features_that_an_objective_looks_at_are_kept():
  student, teacher = (
    Outputs(jax.ShapeDtypeStruct((2, 3), jnp.float32), dict.fromkeys(("a", "b"), shape))
    for shape in (jax.ShapeDtypeStruct((2, 4), jnp.float32), jax.ShapeDtypeStruct((2, 5), "f4"))
  )
  batch = make_batch(jnp.zeros((2, 1)), jnp.zeros(2, jnp.int32))
  hint = recipes.combine(recipes.dkd(), recipes.hint("a", "b"))
  assert _shared_teacher.used_features(hint, student, teacher, batch) == ["b"]
  assert _shared_teacher.used_features(as_objective(recipes.dkd()), student, teacher, batch) == []


@pytest.mark.slow
def test_students_may_start_from_models_and_several_have_names(parts):
  """Each is the one that starts there alone; shared keywords come with the recipe."""
  wide = networks.linen(models.MLP((7,), CLASSES), name="wide")
  begun = {
    network.name: Model(network, network.init(jax.random.key(5), jnp.zeros((1, 6))))
    for network in (parts["student"], wide)
  }
  recipe = functools.partial(recipes.kd, soft_weight=0.3)
  points = search.product(student=[*begun, "new"], temperature=[2.0])
  mine = {**parts, "student": {**begun, "new": wide}}
  result = swept(mine, points, recipe, steps=20, seeds=SEEDS)
  for index, student in enumerate(mine["student"].values()):
    assert result.students(index).network is (wide if index else parts["student"])
    for s, pair in enumerate(SEEDS):
      alike = {**parts, "student": student}
      expected = alone(alike, {"temperature": 2.0}, *pair, steps=20, objective=recipe())
      assert_same(of_seed(result.students(index), s), expected, atol=1e-5)
  # Each seed from a beginning of its own, at every point.
  several = result.students(0)
  grown = swept({**parts, "student": several}, POINTS[:2], recipe, steps=20, seeds=SEEDS)
  for index, point in enumerate(POINTS[:2]):
    for s, pair in enumerate(SEEDS):
      alike = {**parts, "student": several.unstack()[s]}
      expected = alone(alike, point, *pair, steps=20, objective=recipe())
      assert_same(of_seed(grown.students(index), s), expected, atol=1e-5)
  one = swept({**parts, "student": begun["student"]}, [{"temperature": 2.0}], recipe, steps=20)
  assert_same(of_seed(one.model, 0), of_seed(result.students(0), 0), atol=1e-5)


@pytest.mark.parametrize(
  ("change", "match"),
  [
    (lambda p: {"teacher": p["student"]}, r"teachers\.frozen\(Model\(network, variables\)\)"),
    (lambda p: {"teacher": Model(p["student"], {})}, r"give teachers\.frozen\(model\)"),
    (lambda p: {"teacher": p["teacher"].apply}, r"Teacher\(variables, apply\)"),
    (lambda p: {"validation": 3}, "validation=3 must be what data.evaluation_batches makes"),
    (lambda p: {"halving": 3}, "halving=3 must be a search.Halving"),
    (lambda p: {"by": "scan"}, "by='scan' must be"),
    (lambda p: {"memory": 0}, "memory=0 must be"),
    (lambda p: {"accumulate": 0}, "accumulate=0 must be"),
    (lambda p: {"run": 3}, r"run=3 must be a folder, or train\.Run"),
    (
      lambda p: {"student": Model(p["student"], {}, 2)},
      "the variables of 2 seeds.*one of model.unstack",
    ),
  ],
)
def test_what_is_of_another_kind_says_so(parts, change, match):
  with small_networks.untyped(), pytest.raises((TypeError, ValueError), match=match):
    swept(parts, [{"temperature": 1.0}], **{"steps": 2, **change(parts)})


@pytest.mark.slow
def test_what_each_student_starts_from_is_checked_and_told_apart(parts):
  wide = networks.linen(models.MLP((7,), CLASSES), name="wide")
  begun = wide.init(jax.random.key(5), jnp.zeros((1, 6)))
  moved = jax.tree.map(lambda leaf: leaf + 1, begun)
  broken = jax.tree.map(lambda leaf: leaf * jnp.nan, begun)
  points = search.product(student=["plain", "wide"], temperature=[2.0])
  told = {"plain": parts["student"], "wide": Model(wide, broken)}
  with pytest.raises(ValueError, match="holds NaN"):
    swept({**parts, "student": told}, points, recipes.kd)
  kd = recipes.kd()
  plan = train.Plan.of(parts["student"], kd, data=parts["data"], optimizer=optax.sgd(0.1), steps=1)
  job = types.SimpleNamespace(plan=plan, run=train.Run(), choice=search.Choice(parts["validation"]))
  saved = [
    _sweep.identity(job, {"plain": parts["student"], "wide": Model(wide, start)}, [(0, 0)], [])
    for start in (begun, moved)
  ]
  assert saved[0]["students"] == saved[1]["students"]
  assert saved[0]["start"] != saved[1]["start"]


def test_nothing_is_chosen_by_what_is_not_finite():
  def row(*accuracy):
    return search.Row({}, {"accuracy": np.array(accuracy)}, 1, "finished")

  rows = [row(np.nan, np.nan), row(0.9, np.inf), row(0.4, 0.6), row(0.5, 0.5)]
  assert search.best_of(rows, "accuracy") == (2, [3])
  with pytest.raises(FloatingPointError, match="no point of the sweep stayed finite, its accuracy"):
    search.best_of(rows[:2], "accuracy")


def test_by_nll_the_lowest_is_chosen():
  rows = [
    _choice.Row({"a": i}, {"nll": np.array([x])}, 50, "finished")
    for i, x in enumerate([0.7, 0.9, 0.4])
  ]
  assert _choice.best_of(rows, "nll") == (2, [])


def test_halving_of_points_and_steps_that_do_not_divide():
  accuracy, rungs = [0.1, 0.5, 0.3, 0.9, 0.7], []

  class Known(_trials.Search):
    """Points whose metric is known, in chunks of four steps."""

    def __init__(self):
      pass

    groups, length = [types.SimpleNamespace(indices=i) for i in ([0, 3, 1], [2, 4])], 4

    def rung(self, rung, until, alive, before, *, keep):
      rungs.append((until, alive, keep))
      made = {
        i: _choice.Row({"a": i}, {"accuracy": np.array([accuracy[i]])}, until, "finished")
        for i in alive
      }
      return {i: _trials.Found(made[i], dict, None) for i in alive}

  split = data.evaluation_batches(examples(), batch_size=16)
  found = _sweep._rungs(Known(), 50, search.Choice(split), search.Halving(factor=2, rungs=3))
  # Half of five are three, a quarter two; a quarter of 50 steps ends in the fourth chunk.
  assert rungs == [
    (16, [0, 1, 2, 3, 4], True),
    (28, [1, 3, 4], True),
    (50, [3, 4], False),
  ]
  assert [(found[i].row.status, found[i].row.step) for i in range(5)] == [
    ("dropped", 16),
    ("dropped", 28),
    ("dropped", 16),
    ("finished", 50),
    ("finished", 50),
  ]


def test_what_trains_by_itself_is_refused_as_an_objective():
  """Before anything is trained, and with what to do instead."""
  with pytest.raises(TypeError, match="train.born_again does, is neither: search a generation's"):
    grouped([{"generations": 2}], small_networks.dense(3), train.born_again, optax.sgd(0.1), 1)


def test_what_is_no_number_reaches_the_objective(parts):
  # A made objective takes a schedule as it takes a number: each is a program of its own.
  one, other = optax.constant_schedule(2.0), optax.constant_schedule(8.0)
  points = [{"temperature": one}, {"temperature": other}, {"temperature": 3.0}]
  student = small_networks.dense(3)
  groups = grouped(points, student, recipes.kd(), optax.adam(1e-2), 4)
  told = [group.objective.hyper["temperature"] for group in groups if group.fixed]
  assert [schedule(0) for schedule in told] == [2.0, 8.0]
  with pytest.raises((TypeError, ValueError), match="temperature"):
    swept(parts, [{"temperature": "4"}])
