"""A study that Optuna proposes: one program, pruning, several processes, killed ones, errors."""

import dataclasses
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import optax
import pytest

import small_networks
from jaxdistill import data, recipes, search, teachers, train
from jaxdistill.search import _study, _trials

optuna = pytest.importorskip("optuna", reason="needs the extra: pip install '.[optuna]'")
from optuna.distributions import (
  CategoricalDistribution,
  FloatDistribution,
  IntDistribution,
)

SPACE = {
  "temperature": FloatDistribution(1, 20, log=True),
  "rate": FloatDistribution(1e-3, 0.3, log=True),
}


def examples(seed=0, size=48):
  random = np.random.RandomState(seed)
  labels = random.randint(0, 3, size)
  inputs = random.normal(size=(size, 4)) + 1.5 * np.eye(3, 4)[labels]
  return data.from_arrays(inputs.astype(np.float32), labels, num_classes=3)


@functools.cache
def taught():
  return teachers.frozen(small_networks.model(small_networks.dense(6), 1, 4, key=jax.random.key(9)))


def studied(folder=None, *, objective=None, space=SPACE, trials=6, metric="nll", **options):
  names = [field.name for field in dataclasses.fields(search.Proposals)]
  proposals = {"at_once": 3, **{n: options.pop(n) for n in names if n in options}}
  settings = {
    "data": data.on_device(examples(), batch_size=16, data_seed=0),
    "optimizer": lambda rate=0.05: optax.adam(rate),
    "steps": 8,
    "choice": search.Choice(data.evaluation_batches(examples(1), batch_size=48), metric=metric),
    "teacher": taught(),
    "execution": search.Execution(devices=jax.devices()[:1]),
    "run": train.Run(folder, progress=None),
    **options,
  }
  student = settings.pop("student", small_networks.dense(3))
  return search.study(
    student,
    recipes.kd() if objective is None else objective,
    proposals=search.Proposals(space, trials, **proposals),
    **settings,
  )


def opened(folder):
  backend = optuna.storages.journal.JournalFileBackend(str(folder / "study.log"))
  return optuna.load_study(study_name="study", storage=optuna.storages.JournalStorage(backend))


class Third(optuna.pruners.BasePruner):
  """Ends every third trial at its first report."""

  def prune(self, study, trial):
    return trial.number % 3 == 1


SAME = {"pruner": Third(), "validate_every": 4, "seeds": [0, 1]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A study with a folder, and what was compiled for it."""
  folder = tmp_path_factory.mktemp("study") / "run"
  with small_networks.compiled() as names:
    result = studied(folder, trials=5, **SAME)
  return result, folder, names


def test_all_batches_are_one_program(whole):
  result, folder, names = whole
  assert len(result.rows) == 5
  assert json.loads((folder / "batches.json").read_text())["batches"] == [[0, 1, 2], [3, 4]]
  assert len([name for name in names if "chunk" in name]) == 1, names


def test_the_pruner_masks_a_trial(whole):
  result, folder, _ = whole
  assert [(row.status, row.step) for row in result.rows] == [
    ("finished", 8),
    ("pruned", 4),
    ("finished", 8),
    ("finished", 8),
    ("pruned", 4),
  ]
  trials = opened(folder).trials
  for trial, row in zip(trials, result.rows, strict=True):
    assert sorted(trial.intermediate_values) == [4, 8][: 1 + (row.status == "finished")]
    assert trial.value == pytest.approx(np.mean(row.metrics["nll"]))
    assert len(row.metrics["nll"]) == 2
  assert result.rows[result.best].status == "finished"


@pytest.mark.slow
def test_each_student_is_the_one_of_a_sweep():
  result = studied(pruner=optuna.pruners.NopPruner())
  swept = search.sweep(
    small_networks.dense(3),
    recipes.kd(),
    points=[row.values for row in result.rows],
    data=data.on_device(examples(), batch_size=16, data_seed=0),
    optimizer=lambda rate: optax.adam(rate),
    steps=8,
    choice=result.choice,
    teacher=taught(),
    run=train.Run(progress=None),
  )
  # The same steps in float32, in programs of other sizes.
  for one, other in zip(result.rows, swept.rows, strict=True):
    np.testing.assert_allclose(one.metrics["nll"], other.metrics["nll"], atol=1e-5)
  assert swept.chosen == result.chosen


def test_the_folder_has_the_table_and_the_picture(whole):
  result, folder, _ = whole
  assert (folder / "sweep.png").stat().st_size > 1000
  assert (folder / "table.md").read_text() == result.table() + "\n"
  assert json.loads((folder / "chosen.json").read_text())["values"] == result.chosen


def test_a_finished_study_is_given_back(whole, monkeypatch):
  result, folder, _ = whole

  def again(*_):
    raise AssertionError("its best student was trained again")

  monkeypatch.setattr(_study._Worker, "trained_again", again)
  with small_networks.compiled() as names:
    again = studied(folder, trials=5, **SAME)
  assert not [name for name in names if "chunk" in name]
  assert_same(again, result)


def assert_same(one, other):
  """The same points, and of the chosen the same bits."""
  assert [row.values for row in one.rows] == [row.values for row in other.rows]
  assert one.best == other.best
  for x, y in zip(*(jax.tree.leaves(r.model.variables) for r in (one, other)), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_a_finished_study_is_made_longer(tmp_path):
  result = studied(tmp_path / "run", trials=3)
  longer = studied(tmp_path / "run", trials=5)
  assert [row.values for row in longer.rows[:3]] == [row.values for row in result.rows]
  assert len(longer.rows) == 5


def test_another_job_is_refused_and_the_difference_named(whole):
  _, folder, _ = whole
  for options, message in (
    ({"steps": 9}, "steps: 8 there, 9 now"),
    ({"space": {**SPACE, "rate": FloatDistribution(1e-3, 0.2, log=True)}}, r"space\.rate\..*high"),
    ({"objective": recipes.kd(hard_weight=0.2)}, "hard_weight"),
  ):
    with pytest.raises(ValueError, match=message):
      studied(storage=folder / "study.log", **{**SAME, **options})
  with pytest.raises(ValueError, match="direction minimize, and of accuracy the higher"):
    studied(storage=folder / "study.log", metric="accuracy", **SAME)
  with pytest.raises(ValueError, match="trials of another study"):
    studied(folder, storage=optuna.storages.InMemoryStorage(), **SAME)
  theirs = optuna.storages.InMemoryStorage()
  study = optuna.create_study(storage=theirs, study_name="study")
  study.tell(study.ask(), 1.0)
  with pytest.raises(ValueError, match="trials of something else"):
    studied(storage=theirs)


@pytest.mark.slow
def test_a_student_that_is_not_finite_ends_its_trial():
  def rated(rate):
    return optax.sgd(rate)

  space = {"rate": CategoricalDistribution([0.01, 1e30])}
  result = studied(space=space, optimizer=rated, trials=4, at_once=2)
  by_rate = {row.values["rate"]: row.status for row in result.rows}
  assert by_rate == {0.01: "finished", 1e30: "not finite"}
  assert result.chosen == {"rate": 0.01}


@pytest.mark.parametrize(
  ("options", "error", "message"),
  [
    ({"space": {"temperature": 4.0}}, TypeError, "give one of optuna.distributions"),
    ({"space": {}}, TypeError, "distributions by keyword"),
    (
      {"space": {"kind": CategoricalDistribution(["a", "b"])}},
      ValueError,
      "kind with 'a', which is no number",
    ),
    ({"space": {"size": FloatDistribution(1, 2)}}, ValueError, "size"),
    ({"trials": 0}, ValueError, "trials=0"),
    ({"sampler": 3}, TypeError, "sampler=3 must be one of Optuna's"),
    ({"pruner": 3}, TypeError, "pruner=3 must be one of Optuna's"),
    ({"storage": 3}, TypeError, "storage=3"),
    ({"grace": 0}, ValueError, "grace"),
    ({"storage": __file__}, ValueError, "storage=.*cannot be opened as Optuna's"),
    ({"storage": "nosuch://host/db"}, ValueError, "storage=.*cannot be opened as Optuna's"),
    ({"student": {"a": small_networks.dense(3)}}, TypeError, "program of its own"),
    (
      {"space": {"temperature": FloatDistribution(-1, 2)}},
      ValueError,
      "temperature must be positive",
    ),
  ],
)
def test_bad_arguments_say_what_to_do(options, error, message):
  with small_networks.untyped(), pytest.raises(error, match=message):
    studied(**options)


def test_values_that_are_part_of_the_program_are_refused():
  def layered(layers, temperature=4.0):
    return recipes.kd(temperature=float(temperature * layers))

  space = {"layers": IntDistribution(1, 3), "rate": SPACE["rate"]}
  with pytest.raises(ValueError, match=r"\['layers'\], which the objective is made with"):
    studied(space=space, objective=layered)
  split = data.evaluation_batches(examples(1), batch_size=48)
  with pytest.raises(ValueError, match="its pruner"):
    studied(choice=search.Choice(split, halving=search.Halving()))


CHILD = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
os.environ["JAX_PLATFORMS"] = "cpu"
import pathlib, small_networks, test_study
with small_networks.compiled() as names:
  test_study.studied(
    sys.argv[1], storage=sys.argv[2], trials=8, at_once=2, grace=3.0, seeds=[0, 1], steps=40
  )
pathlib.Path(sys.argv[1], "compiled").write_text("\\n".join(names))
"""


def start(folder, storage):
  here = pathlib.Path(__file__).parent
  paths = [str(here), str(here.parent), str(here.parent.parent), os.environ.get("PYTHONPATH", "")]
  environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
  command = [sys.executable, "-W", "ignore", "-c", CHILD, str(folder), str(storage)]
  return subprocess.Popen(command, env=environment)


def until(condition, seconds=240):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.1)


def running(storage, name):
  backend = optuna.storages.journal.JournalFileBackend(str(storage))
  try:
    study = optuna.load_study(study_name="study", storage=optuna.storages.JournalStorage(backend))
  except KeyError:
    return []
  return [
    t for t in study.trials if t.state.name == "RUNNING" and t.user_attrs.get("worker") == name
  ]


@pytest.mark.slow
@pytest.mark.parametrize("comes_back", [False, True])
def test_two_processes_work_on_one_study_and_one_is_killed(tmp_path, comes_back):
  storage = tmp_path / "study.log"
  first = start(tmp_path / "a", storage)
  record = tmp_path / "a" / "batches.json"
  children = [first]
  try:
    until(record.is_file)
    name = json.loads(record.read_text())["worker"]
    until(lambda: running(storage, name))
    children.append(start(tmp_path / "b", storage))
    first.send_signal(signal.SIGKILL)
    first.wait()
    if comes_back:
      children.append(start(tmp_path / "a", storage))
    for child in children[1:]:
      assert child.wait(240) == 0
  finally:
    for child in children:
      child.kill()
  chosen = json.loads((tmp_path / "b" / "chosen.json").read_text())
  for folder in ("b", "a") if comes_back else ("b",):
    # Whatever the number of its batches, each process compiled its students once.
    names = (tmp_path / folder / "compiled").read_text().splitlines()
    assert len([name for name in names if "chunk" in name]) == 1, names
  if comes_back:
    assert json.loads((tmp_path / "a" / "chosen.json").read_text()) == chosen
  study = optuna.load_study(
    study_name="study",
    storage=optuna.storages.JournalStorage(
      optuna.storages.journal.JournalFileBackend(str(storage))
    ),
  )
  states = [trial.state.name for trial in study.trials]
  assert set(states) <= {"COMPLETE", "PRUNED", "FAIL"}
  assert len(states) - states.count("FAIL") == 8
  tried = [tuple(t.params.values()) for t in study.trials if t.state.name != "FAIL"]
  assert len(set(tried)) == 8
  # The space is proposed by other histories, and so is not the same; what it has is as good.
  alone = studied(None, trials=8, at_once=2, seeds=[0, 1], steps=40)
  spread = np.std([np.mean(row.metrics["nll"]) for row in alone.rows])
  best = np.mean(alone.rows[alone.best].metrics["nll"])
  assert abs(np.mean(chosen["validation"]["nll"]) - best) < spread


@pytest.mark.slow
def test_a_killed_process_goes_on_with_its_trials_as_if_it_had_not_been_killed(tmp_path):
  whole = studied(tmp_path / "whole", trials=5, at_once=2)

  class KilledError(Exception):
    pass

  def killed(folder, at):
    """Dies in the middle of a batch: no sign of it is left but what lies on the disk."""
    calls = []

    def trained(self, *args):
      calls.append(args)
      if len(calls) == at:
        raise KilledError
      return whole_trained(self, *args)

    whole_trained = _trials.Search.trained
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(_trials.Search, "trained", trained)
      with pytest.raises(KilledError):
        studied(folder, trials=5, at_once=2)

  killed(tmp_path / "run", 6)
  states = [trial.state.name for trial in opened(tmp_path / "run").trials]
  assert "RUNNING" in states
  again = studied(tmp_path / "run", trials=5, at_once=2)
  assert_same(again, whole)
  assert "FAIL" not in [trial.state.name for trial in opened(tmp_path / "run").trials]


@pytest.mark.slow
def test_the_trials_of_a_process_that_is_gone_are_tried_again(tmp_path):
  """A process of which the study has a running trial, and no sign of life."""
  studied(tmp_path / "run", trials=1, at_once=2)
  study = opened(tmp_path / "run")
  gone = study.ask(SPACE)
  gone.set_user_attr("worker", "gone")
  result = studied(tmp_path / "run", trials=3, at_once=2, grace=0.3)
  trials = opened(tmp_path / "run").trials
  assert trials[1].state.name == "FAIL"
  (again,) = [t for t in trials if t.user_attrs.get("again") == 1]
  assert again.params == gone.params
  assert len(result.rows) == 3
