"""Compression: what a network costs, who is inside a budget, the choice, the assistant, resume."""

import dataclasses
import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill import data, export, networks, recipes, runs, search, teachers, train
from jaxdistill.evaluation import cost, tasks
from jaxdistill.networks import models
from jaxdistill.search import _budget, _compress, command
from jaxdistill.types import Model, Term
from small_networks import untyped

# The teachers here are not trained, and the checks say so.
pytestmark = pytest.mark.filterwarnings("ignore::jaxdistill.search.PreflightWarning")
SIZE, CLASSES = 96, 3


def examples(seed=0, size=SIZE):
  random = np.random.RandomState(seed)
  labels = random.randint(0, CLASSES, size)
  inputs = random.normal(size=(size, 6)) + 2 * np.eye(CLASSES, 6)[labels]
  return data.from_arrays(inputs.astype(np.float32), labels, num_classes=CLASSES)


def mlps(*widths):
  return search.family(lambda width: models.MLP((width,), CLASSES), width=list(widths))


def source():
  return data.on_device(examples(), batch_size=16, data_seed=0)


def affordable(*widths, parameters=60):
  return search.affordable(mlps(*widths), search.Budget(parameters=parameters), source())


def settings(folder, **options):
  teacher = networks.linen(models.MLP((32,), CLASSES), name="teacher")
  variables = teacher.init(jax.random.key(7), jnp.zeros((1, 6)))
  validation = data.evaluation_batches(examples(seed=1, size=40), batch_size=20)
  return {
    "teacher": teachers.frozen(Model(teacher, variables)),
    "data": source(),
    "choice": search.Choice(validation, halving=search.Halving(2, 2), retrain=[0, 1]),
    "optimizer": lambda rate=0.05: optax.adam(rate),
    "steps": 18,
    "points": search.product(temperature=[1.0, 4.0], rate=[0.05, 1e-4]),
    "seeds": [0],
    "assistants": search.Assistants(gap=1.0),
    "run": train.Run(folder, progress=None),
    **options,
  }


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
  folder = tmp_path_factory.mktemp("compress") / "run"
  return folder, search.compress(affordable(2, 4, 12), **settings(folder))


def test_costs_are_those_of_the_network():
  """6·4 + 4 + 4·3 + 3 parameters; two operations for each weight and one for each bias and relu."""
  network = networks.linen(models.MLP((4,), CLASSES))
  found = search.measure_network(network, jax.ShapeDtypeStruct((6,), "float32"), seconds=0.01)
  assert (found["parameters"], found["bytes"]) == (43, 172)
  assert found["flops"] == 2 * (6 * 4 + 4 * 3) + 4 + 4 + 3
  assert 0 < found["latency_ms"] < 1000
  model = Model(network, network.init(jax.random.key(0), jnp.zeros((1, 6))))
  for one in (model, teachers.frozen(model)):
    same = search.measure_network(one, jax.ShapeDtypeStruct((6,), "float32"), seconds=0.01)
    assert all(same[name] == found[name] for name in ("parameters", "bytes", "flops"))


def test_normalisation_counts_and_integers_are_stored_as_they_are():
  network = networks.linen(models.MLP((4,), CLASSES))
  stored = jax.ShapeDtypeStruct((2, 3), "uint8")
  plain, seen = (
    search.measure_network(network, stored, normalize=normalize, seconds=0.01)["flops"]
    for normalize in (lambda x: x.astype(jnp.float32), lambda x: x.astype(jnp.float32) / 16)
  )
  assert seen == plain + 6


@pytest.mark.parametrize(
  ("limits", "shares", "inside"),
  [
    ({"bytes": 200}, {"bytes": 0.5}, True),
    ({"bytes": 100, "parameters": 25}, {"bytes": 1.0, "parameters": 1.0}, True),
    ({"bytes": 50, "latency_ms": 2.0, "spare": 0}, {"bytes": 2.0, "latency_ms": 0.25}, False),
    ({"latency_ms": 0.52, "spare": 0}, {"latency_ms": 0.5 / 0.52}, True),
    ({"latency_ms": 0.52, "spare": 0.1}, {"latency_ms": 0.5 / 0.468}, False),
    ({"flops": 10**9}, {"flops": np.inf}, False),
  ],
)
def test_a_budget_is_all_of_its_limits(limits, shares, inside):
  costs = {"bytes": 100, "parameters": 25, "latency_ms": 0.5, "flops": None}
  assert search.Budget(**limits).shares(costs) == pytest.approx(shares)
  assert search.Budget(**limits).inside(costs) is inside


@pytest.mark.parametrize(
  ("limits", "match"),
  [
    ({}, "the budget has no limit"),
    ({"bytes": 0}, "bytes must be positive, got 0"),
    ({"latency_ms": float("nan")}, "latency_ms must be .*nan"),
    ({"bytes": 10, "batch_size": 0}, "batch_size=0"),
  ],
)
def test_a_budget_that_is_none(limits, match):
  with pytest.raises(ValueError, match=match):
    search.Budget(**limits)


@pytest.mark.slow
def test_what_is_over_the_budget_is_dropped_and_the_best_of_the_rest_is_chosen(compressed):
  folder, found = compressed
  fates = {candidate.name: candidate.row is None for candidate in found.candidates}
  assert fates == {"width 2": False, "width 4": False, "width 12": True}
  best = max(
    (candidate for candidate in found.candidates if candidate.row is not None),
    key=lambda c: (c.row.step, np.mean(c.row.metrics["accuracy"])),
  )
  assert np.mean(found._candidate(found.chosen).row.metrics["accuracy"]) == np.mean(
    best.row.metrics["accuracy"]
  )
  assert search.read_choice(folder)["chosen"] == found.chosen
  # Both final runs are of the chosen network and from all final seeds.
  for name in ("student", "baseline"):
    student = export.load_student(folder / name)
    assert student.instances == 2
    assert student.info["parameters"] == found.costs["parameters"] <= 60
  loaded = export.load_student(folder / "student", instance=1)
  x = np.asarray(examples(seed=3).inputs)
  own = found.model.unstack()[1](x).logits
  # The same arithmetic by another program; float32.
  np.testing.assert_allclose(loaded.predict(x), own, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_baseline_has_no_teacher_and_its_own_rate(compressed):
  folder, _ = compressed
  config = json.loads((folder / "baseline" / "config.json").read_text())
  assert config["teacher"] is None
  assert (
    config["optimizer"] == json.loads((folder / "labels" / "chosen.json").read_text())["values"]
  )
  assert json.loads((folder / "student" / "config.json").read_text())["teacher"] is not None


@pytest.mark.slow
def test_the_folder_tells_it(compressed):
  folder, found = compressed
  table = (folder / "candidates.md").read_text()
  assert "over the budget: parameters 2.05 times" in table
  assert table.count("**chosen**") == 1
  assert found.sentence() in table
  told = json.loads((folder / "budget.json").read_text())
  assert told["inside"] is True
  assert told["costs"]["parameters"] == found.costs["parameters"]
  assert (folder / "frontier.png").read_bytes()[:4] == b"\x89PNG"
  rows = (folder / "candidates.csv").read_text().splitlines()
  assert len(rows) == 1 + 2 + 1  # one seed each, and the one that was not trained


@pytest.mark.slow
def test_what_speaks_against_it_is_told(compressed):
  """A teacher at chance, and what comes of that once the baseline is known."""
  folder, _ = compressed
  told = json.loads((folder / "preflight.json").read_text())
  assert {"not_trained", "hardly_better"} <= {finding["check"] for finding in told}
  mine, student = job(folder), mlps(2)["width 2"]
  with pytest.warns(search.PreflightWarning, match="not_trained: .*chance"):
    mine.preflight(student, {"temperature": 4.0}, folder)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    known = [search.Finding(**finding) for finding in told]
    mine.preflight(student, {"temperature": 4.0}, folder, known=known)


@pytest.mark.slow
def test_a_compression_that_was_stopped_goes_on(compressed, tmp_path, monkeypatch):
  """Another choice by other timings is impossible: what was measured is kept."""
  folder, whole = compressed
  shutil.copytree(folder, tmp_path / "run")
  for name in ("student", "baseline"):
    shutil.rmtree(tmp_path / "run" / name)
  (tmp_path / "run" / "budget.json").unlink()
  with pytest.raises(FileNotFoundError, match="not finished; run it again"):
    search.read_choice(tmp_path / "run")
  candidates, fewer = affordable(2, 4, 12), affordable(2, 4)
  slower = {name: {**one, "latency_ms": 1e9} for name, one in candidates.costs.items()}
  candidates = dataclasses.replace(candidates, costs=slower)
  monkeypatch.setattr(
    _budget, "measure_in_process", lambda *args, **options: pytest.fail("timed again")
  )
  found = search.compress(candidates, **settings(tmp_path / "run"))
  assert max(one.costs["latency_ms"] for one in found.candidates) < 1e9
  assert found.chosen == whole.chosen == search.read_choice(tmp_path / "run")["chosen"]
  for one, other in zip(jax.tree.leaves(found.model), jax.tree.leaves(whole.model), strict=True):
    np.testing.assert_array_equal(one, other)
  with pytest.raises(ValueError, match="another configuration|other"):
    search.compress(fewer, **settings(tmp_path / "run"))


def test_what_is_needed_is_enough():
  """Also where it is rounded, and where some of the latency is kept free."""
  costs = {"latency_ms": 0.7, "bytes": 93_043, "flops": None, "parameters": 3}
  small = search.Budget(latency_ms=0.7, bytes=10, parameters=3)
  needed = small.needed(costs)
  assert set(needed) == {"latency_ms", "bytes"}
  assert dataclasses.replace(small, **needed).inside(costs)
  tight = {"latency_ms": 0.99 * needed["latency_ms"], "bytes": needed["bytes"] - 1}
  for name, limit in tight.items():
    assert not dataclasses.replace(small, **{**needed, name: limit}).inside(costs)


def test_a_budget_that_nothing_meets_names_the_nearest():
  match = (
    "no candidate .* 20 parameters. The nearest of 2, 'width 2', has 23 parameters: a budget of "
  )
  with pytest.raises(search.BudgetError, match=match + "parameters=23 would do; or give smaller"):
    affordable(4, 2, parameters=20)


@pytest.mark.slow
def test_one_that_is_slow_in_a_process_of_its_own_is_passed_over(tmp_path, monkeypatch):
  """The better one of two, by timings that are made up; the answers are kept."""
  students = mlps(2, 4)
  rows = [row([0.7], student="width 2"), row([0.9], student="width 4")]
  made = [network.init(jax.random.key(0), jnp.zeros((1, 6))) for network in students.values()]
  found = search.Result(
    rows=rows,
    seeds=[(0, 0)],
    choice=settings(tmp_path)["choice"],
    best=1,
    ties=[],
    model=Model(students["width 4"], made[1]),
    students=lambda index: Model(
      list(students.values())[index], jax.tree.map(lambda leaf: leaf[None], made[index]), 1
    ),
    final_seeds=[(0, 0)],
  )
  times = iter([9.0, 0.1])
  asked = []

  def separately(run, within, instance=0):
    asked.append(json.loads((run / "student" / "student.json").read_text())["parameters"])
    return {"latency_ms": next(times), "bytes": 1, "flops": 1, "parameters": 1}

  monkeypatch.setattr(_budget, "measure_in_process", separately)
  mine, within = job(tmp_path), search.Budget(latency_ms=5.0)
  name, checked = _compress._first_inside(mine, within, students, found, tmp_path)
  assert (name, asked) == ("width 2", [43, 23])
  assert _compress._first_inside(mine, within, students, found, tmp_path) == (name, checked)
  (tmp_path / "checked.json").unlink()
  times = iter([9.0, 7.0])
  with pytest.raises(
    search.BudgetError, match=r"has 7 ms: a budget of latency_ms=7.778 would do, in"
  ):
    _compress._first_inside(mine, within, students, found, tmp_path)


def row(accuracy, **values):
  accuracy = np.array(accuracy)
  return search.Row({"temperature": 1.0, **values}, {"accuracy": accuracy}, 18, "finished")


def job(folder, **options):
  given, pairs = settings(folder, **options), [(0, 0), (1, 1)]
  del given["assistants"]
  given |= {"seeds": pairs, "choice": dataclasses.replace(given["choice"], retrain=pairs)}
  return _compress.Job(objective=recipes.kd, teacher_run=None, **given)


@pytest.mark.slow
def test_an_assistant_is_tried_where_the_gap_is_wide(tmp_path, monkeypatch):
  """The one nearest to the geometric mean teaches, if its student is better beyond noise."""
  mine = job(tmp_path, points=[{"temperature": 4.0}])
  student = mlps(2)["width 2"]
  between = mlps(3, 8, 20, 50)  # student 23, teacher 323 parameters: the mean is 86
  monkeypatch.setattr(
    _compress.Job, "teacher_quality", property(lambda self: {"accuracy": np.array(0.9)})
  )
  assert mine.assist(student, row([0.89, 0.89]), between, 0.02, tmp_path) is None
  assert mine.assist(student, row([0.6, 1.0]), between, 0.02, tmp_path) is None  # noise
  tried = mine.assist(student, row([0.0, 0.01]), between, 0.02, tmp_path)
  assert (tried.name, tried.parameters) == ("width 8", 83)
  assert tried.helps  # anything is better than none right
  alone = dataclasses.replace(mine, seeds=[(0, 0)])
  assert not alone.assist(student, row([0.0]), between, 0.02, tmp_path / "one").helps
  assert "a teaching assistant (width 8, 83 parameters) helped" in tried.sentence()
  learned = export.load_student(tmp_path / "assistant")
  assert learned.info["parameters"] == 83
  final = mine.final(student, row([0.0, 0.01]), tried, tmp_path)
  config = json.loads((tmp_path / "student" / "config.json").read_text())
  assert config["teacher"] == runs.fingerprint(tried.model.variables)
  assert sorted(final) == ["baseline", "student"]


def test_an_assistant_that_is_not_there_is_asked_for(tmp_path, monkeypatch):
  mine = job(tmp_path)
  monkeypatch.setattr(
    _compress.Job, "teacher_quality", property(lambda self: {"accuracy": np.array(0.9)})
  )
  tried = mine.assist(mlps(2)["width 2"], row([0.5, 0.5]), mlps(99), 0.02, tmp_path)
  assert not tried.helps
  assert "40.0 points behind" in tried.sentence()
  assert "about 86 parameters might help" in tried.sentence()


def test_the_front_has_nobody_that_another_beats():
  def candidate(name, latency, accuracy, status="finished"):
    mine = dataclasses.replace(row([accuracy]), status=status)
    return search.Candidate(name, {"latency_ms": latency}, mine, None)

  found = search.Compressed(
    budget=search.Budget(bytes=1),
    candidates=[
      candidate("fast", 1.0, 0.5),
      candidate("good", 3.0, 0.9),
      candidate("beaten", 2.0, 0.4),
      candidate("middle", 2.0, 0.7),
      candidate("early", 0.5, 0.95, "dropped"),
    ],
    teacher={},
    chosen="good",
    values={},
    assistant=None,
    metric="accuracy",
    model=Model(mlps(2)["width 2"], None),
    validation={},
  )
  assert found.front() == ["fast", "middle", "good"]


BUDGET = search.Budget(parameters=60)
AFFORDABLE = search.Affordable(mlps(2), BUDGET, {"width 2": {"parameters": 23}})
SIMKD = recipes.simkd({"kernel": np.zeros((4, 3)), "bias": np.zeros(3)})


@pytest.mark.parametrize(
  ("options", "error", "match"),
  [
    ({"candidates": mlps(2)}, TypeError, r"must be what search.affordable\(candidates"),
    ({"choice": None}, TypeError, "choice=None must be a search.Choice"),
    ({"run": None}, ValueError, "run has no folder"),
    ({"teacher": Model(mlps(2)["width 2"], {})}, TypeError, r"teachers\.frozen\(model\)"),
    ({"objective": SIMKD, "points": [{}]}, ValueError, "deploys another network"),
    ({"points": [{"heat": 1}]}, ValueError, r"points have \['heat'\]"),
  ],
)
def test_errors_come_before_a_folder_is_claimed(tmp_path, options, error, match):
  given = {"candidates": AFFORDABLE, **settings(tmp_path / "run"), **options}
  with untyped(), pytest.raises(error, match=match):
    search.compress(given.pop("candidates"), **given)
  assert not (tmp_path / "run").exists()


def test_the_test_split_is_not_read(tmp_path):
  given = settings(tmp_path / "run")
  choice = dataclasses.replace(given["choice"], test=given["choice"].validation)
  with pytest.raises(ValueError, match="choice has a test split, which compress does not read"):
    search.compress(AFFORDABLE, **{**given, "choice": choice})


@pytest.mark.parametrize(
  ("make", "match"),
  [
    (lambda: search.affordable({}, BUDGET, source()), "candidates=.* must be networks by name"),
    (lambda: search.affordable({"a": 3}, BUDGET, source()), r"candidates \['a'\] are no networks"),
    (lambda: search.affordable(mlps(2), 3, source()), "within=3 must be a search.Budget"),
    (lambda: search.Assistants(gap=-1.0), "gap must be at least 0, got -1.0"),
  ],
)
def test_errors_come_before_anything_is_measured(monkeypatch, make, match):
  monkeypatch.setattr(_budget, "measure_network", lambda *args, **options: pytest.fail("measured"))
  with untyped(), pytest.raises((TypeError, ValueError), match=match):
    make()


def test_a_family_is_every_combination():
  made = search.family(
    lambda width, depth: models.MLP((width,) * depth, CLASSES), width=[2, 4], depth=[1, 2]
  )
  assert list(made) == [f"width {w}, depth {d}" for w in (2, 4) for d in (1, 2)]
  sizes = [
    cost.parameters(jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 6))))
    for network in made.values()
  ]
  assert sizes == [23, 29, 43, 63]
  with pytest.raises(TypeError, match=r"build\(width 2\) returned 2; it must be a Linen module"):
    search.family(lambda width: width, width=[2])


@pytest.mark.slow
def test_the_command_measures_a_run_and_fails_beyond_the_budget(compressed, capsys):
  folder, found = compressed
  run = str(folder / "student")
  assert command.main([run]) == 0
  assert command.main([run, "--parameters", "60", "--latency-ms", "1000"]) == 0
  assert "inside the budget of 1,000 ms at batch 1, 60 parameters" in capsys.readouterr().out
  assert command.main([run, "--bytes", "10"]) == 1
  assert "NOT inside the budget of 10 bytes" in capsys.readouterr().out
  # flops were counted when it was saved: a loaded program tells none.
  assert found.costs["flops"] == found._candidate(found.chosen).costs["flops"]


@pytest.mark.slow
def test_a_process_that_fails_is_told(tmp_path):
  with pytest.raises(RuntimeError, match="in a process of its own failed: .*no such folder"):
    search.measure_in_process(tmp_path / "nothing", search.Budget(bytes=1))


@pytest.mark.slow
def test_numbers_are_compressed_by_their_own_metric(tmp_path):
  """No accuracy anywhere: a task of the user's own, lower is better; with a baseline, and none."""

  def errors(outputs, batch):
    apart = jnp.abs(outputs.logits - batch.labels).mean(1)
    return {"off": tasks.mean(apart, tasks.counted(batch, apart))}

  task = tasks.Task("mine", {"off": tasks.Metric("lower")}, errors)
  random = np.random.RandomState(0)
  inputs = random.normal(size=(SIZE, 6)).astype(np.float32)
  numbers = data.from_arrays(inputs, inputs[:, :2] * 2 - 1)
  source = data.on_device(numbers, batch_size=16, data_seed=0)
  validation = data.evaluation_batches(numbers, batch_size=20)
  large = networks.linen(models.MLP((32,), 2))
  teacher = teachers.frozen(Model(large, large.init(jax.random.key(7), jnp.zeros((1, 6)))))
  built = search.family(lambda width: models.MLP((width,), 2), width=[2, 12])
  candidates = search.affordable(built, search.Budget(parameters=60), source)

  def method(student, teacher, batch, *, share=0.1):
    return {
      "labels": Term(jnp.square(student.logits - batch.labels).mean(1)),
      "teacher": Term(jnp.square(student.logits - teacher.logits).mean(1), weight=share),
    }

  def alone(student, teacher, batch):
    return {"labels": Term(jnp.square(student.logits - batch.labels).mean(1))}

  for baseline in (None, alone):
    choice = search.Choice(
      validation, halving=search.Halving(rungs=1), retrain=[0], task=task, baseline=baseline
    )
    folder = tmp_path / str(baseline is None)
    given = settings(folder, data=source, teacher=teacher, choice=choice, objective=method)
    given |= {"points": search.product(share=[0.0, 10.0]), "optimizer": optax.adam(0.05)}
    found = search.compress(candidates, **given)
    assert found.metric == "off"
    # The teacher is not trained: whoever listens to it less is nearer to the numbers.
    assert found.values == {"share": 0.0}
    said = np.asarray(export.load_student(folder / "student").predict(inputs))
    wanted = np.abs(np.float64(said) - numbers.labels).mean()
    np.testing.assert_allclose(found.validation["student"]["off"], [wanted], rtol=1e-5)
    assert set(found.validation) == {"student"} | ({"baseline"} if baseline else set())
    assert (folder / "baseline").is_dir() == (baseline is not None)
    assert "accuracy" not in found.table()
    assert ("on labels alone" in found.sentence()) == (baseline is not None)
    assert search.read_choice(folder)["metric"] == "off"
    assert (folder / "candidates.csv").read_text().splitlines()[0].split(",")[6] == "off"
