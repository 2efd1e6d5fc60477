"""Trackers: what they are told, what a failing one costs, a run that goes on, each of the four."""

import csv
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.request

import jax
import numpy as np
import optax
import pytest

import small_networks
from jaxdistill import data, recipes, runs, search, train


class Recorder:
  """A tracker that writes down what it is told; copies share the list."""

  def __init__(self):
    self.told = []

  def start(self, config):
    self.name = config["run"]["name"]
    self.told.append(("start", self.name, config))

  def log(self, step, numbers):
    self.told.append(("log", self.name, step, numbers))

  def finish(self, files):
    self.told.append(("finish", self.name, [path.name for path in files]))

  def of(self, what, name=None):
    return [one[2:] for one in self.told if one[0] == what and name in (None, one[1])]


class Failing:
  """A tracker whose server is away from a call on."""

  def __init__(self, at):
    self.at, self.calls = at, []

  def ask(self, what):
    self.calls.append(what)
    if len(self.calls) >= self.at:
      raise OSError("the server is away")

  def start(self, config):
    self.ask("start")

  def log(self, step, numbers):
    self.ask("log")

  def finish(self, files):
    self.ask("finish")


def tracked(trackers, folder=None, **options):
  return runs.Tracked(trackers, {"steps": 4, "seed": [0, 1]}, name="mine", folder=folder, **options)


@pytest.mark.parametrize(
  ("at", "calls"),
  [(1, ["start"]), (2, ["start", *["log"] * 3]), (5, ["start", *["log"] * 4, "finish"])],
)
def test_a_tracker_that_fails_is_said_once_and_asked_no_more_after_a_few_tries(at, calls):
  failing, recorder = Failing(at), Recorder()

  def whole():
    told = tracked([failing, recorder])
    for step in range(1, 5):
      told.log(step, {"loss": [1.0, 2.0]})
    told.finish()
    told.finish()
    return told

  with pytest.warns(runs.TrackerWarning, match="Failing failed to .*server is away") as said:
    told = whole()
  assert len(said) == 1
  assert failing.calls == calls
  assert told.working == [told.trackers[1]] or at == 5
  assert recorder.of("log") == [(step, {"loss": 1.5}) for step in range(1, 5)]
  assert recorder.of("finish") == [([],)]


@pytest.mark.parametrize(
  ("trackers", "error", "message"),
  [
    ("csv", TypeError, "must be a list"),
    ([runs.CSV], TypeError, r"runs\.CSV\(\), or an object with start, log and finish"),
    ([print], TypeError, "which is none"),
    ([runs.CSV()], ValueError, "CSV, which writes into the run's folder"),
  ],
)
def test_what_is_no_tracker_is_refused(trackers, error, message):
  with small_networks.untyped(), pytest.raises(error, match=message):
    train.Run(trackers=trackers)


def table(folder):
  with (folder / "metrics.csv").open(newline="") as file:
    return list(csv.DictReader(file))


def test_a_table_goes_on_without_a_step_twice_and_takes_new_columns(tmp_path):
  told = tracked([runs.CSV()], tmp_path)
  told.log(1, {"loss": 2.0})
  told.log(2, {"loss": 1.5, "validation/accuracy": 0.5})
  told.log(3, {"loss": 1.2})  # of which the checkpoint knows nothing
  told = tracked([runs.CSV()], tmp_path, resumed_from=2)
  told.log(3, {"loss": 1.25})
  assert [(row["step"], row["loss"], row["validation/accuracy"]) for row in table(tmp_path)] == [
    ("1", "2.0", ""),
    ("2", "1.5", "0.5"),
    ("3", "1.25", ""),
  ]


def examples():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 3, 24)
  inputs = rng.normal(size=(24, 4)) + np.eye(3, 4)[labels]
  return data.from_arrays(inputs.astype(np.float32), labels, num_classes=3)


@pytest.mark.slow
def test_fit_tells_what_its_log_has_and_goes_on_in_the_same_run(tmp_path):
  recorder, folder = Recorder(), tmp_path / "runs" / "a"

  def stop(step, line):
    if step == 4 and not recorder.of("finish"):
      raise KeyboardInterrupt

  def fit(callback=None):
    return small_networks.fit(
      small_networks.dense(3),
      recipes.labels(),
      data=data.on_device(examples(), batch_size=8, data_seed=0),
      optimizer=optax.adam(0.1),
      steps=6,
      dispatch=train.with_jit(train.data_parallel(jax.devices()[:1])),
      log_every=1,
      checkpoint_every=3,
      callback=callback,
      folder=folder,
      config={"note": "mine"},
      trackers=[recorder, runs.CSV()],
    )

  with pytest.raises(KeyboardInterrupt):
    fit(stop)
  assert recorder.of("finish") == [([],)]
  fitted = fit()
  (first,), (second,) = recorder.of("start")
  assert first["note"] == "mine"
  assert first["steps"] == 6
  assert first["run"] == {
    "name": "a",
    "group": "runs",
    "folder": str(folder),
    "search": None,
    "resumed_from": 0,
  }
  assert second["run"]["resumed_from"] == 3
  steps = [step for step, _ in recorder.of("log")]
  assert steps == [1, 2, 3, 4, 4, 5, 6]
  for step, numbers in recorder.of("log"):
    line = {**numbers, "step": step}
    known = dict(fitted.history[step - 1])
    for one in (line, known):
      del one["examples_per_second"]
    assert line == known
  assert [row["step"] for row in table(folder)] == list("123456")
  files = recorder.of("finish")[-1][0]
  assert files[:2] == ["config.json", "metrics.jsonl"]
  assert "manifest.json" in files


@pytest.mark.slow
def test_a_sweep_tells_of_each_student_as_a_run_of_its_own(tmp_path):
  recorder = Recorder()
  found = search.sweep(
    small_networks.dense(3),
    recipes.labels(),
    points=search.product(rate=[0.01, 0.1]),
    data=data.on_device(examples(), batch_size=8, data_seed=0),
    optimizer=lambda rate: optax.adam(rate),
    steps=12,
    seeds=[0, 1],
    choice=search.Choice(
      data.evaluation_batches(examples(), batch_size=24), halving=search.Halving(2, 2)
    ),
    run=train.Run(tmp_path / "sweep", progress=None, trackers=[recorder, runs.CSV()]),
  )
  for point, row in enumerate(found.rows):
    for s in range(2):
      name = f"point {point}, student {s}"
      lines = recorder.of("log", name)
      assert [step for step, _ in lines] == sorted({step for step, _ in lines})
      assert lines[-1][0] == row.step
      assert len(lines) > 3, "a line is no curve"
      assert lines[-1][1]["validation/accuracy"] == pytest.approx(row.metrics["accuracy"][s])
      assert np.isfinite(lines[0][1]["loss"])
      (told,) = recorder.of("start", name)[:1]
      assert told[0]["run"]["group"] == "sweep"
      written = table(tmp_path / "sweep" / "tracked" / name)
      assert [int(line["step"]) for line in written] == [step for step, _ in lines]
  assert recorder.of("finish", "sweep") == [
    (["table.md", "table.csv", "chosen.json", "sweep.png"],)
  ]
  ((_, numbers),) = recorder.of("log", "sweep")
  best = found.rows[found.best]
  assert numbers["validation/accuracy"] == pytest.approx(np.mean(best.metrics["accuracy"]))


def first_part(tracker, folder):
  """A run up to step 3, where it is killed; its last checkpoint is that of step 2."""
  folder.mkdir(parents=True)
  told = tracked([tracker], folder)
  for step in (1, 2, 3):
    told.log(step, {"loss": 1 / step, "validation/top-5, %": 50.0})
  assert told.working, "the tracker failed"


def second_part(tracker, folder):
  """The same run from its checkpoint to its end."""
  (folder / "note.txt").write_text("kept")
  told = tracked([tracker], folder, resumed_from=2)
  for step in (3, 4):
    told.log(step, {"loss": 1 / step})
  told.finish([folder / "note.txt"])
  assert told.working, "the tracker failed"


def found_in(tracking_uri, run="mine"):
  """A run of MLflow: its id, its parameters, its history of the loss, its status, its files."""
  from mlflow.tracking import MlflowClient

  client = MlflowClient(tracking_uri=tracking_uri)
  experiment = client.get_experiment_by_name("tests")
  (one,) = [
    made for made in client.search_runs([experiment.experiment_id]) if made.info.run_name == run
  ]
  steps = sorted(metric.step for metric in client.get_metric_history(one.info.run_id, "loss"))
  files = [file.path for file in client.list_artifacts(one.info.run_id)]
  return one, steps, files


@pytest.mark.slow
def test_mlflow_in_a_local_store(tmp_path, monkeypatch):
  pytest.importorskip("mlflow", reason="needs the extra: pip install '.[mlflow]'")
  monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # which it keeps for those that have one
  uri = (tmp_path / "mlruns").as_uri()
  for part in (first_part, second_part):
    part(runs.MLflow(uri, experiment="tests"), tmp_path / "runs" / "mine")
  one, steps, files = found_in(uri)
  assert steps == [1, 2, 3, 4]
  assert files == ["note.txt"]
  assert one.info.status == "FINISHED"
  assert one.data.params == {"steps": "4", "seed": "[0, 1]"}
  assert one.data.tags["jaxdistill.group"] == "runs"
  assert one.data.metrics["validation/top-5_ _"] == 50.0


@pytest.mark.slow
def test_an_mlflow_server_shows_a_sweeps_students(tmp_path, capfd):
  pytest.importorskip("mlflow", reason="needs the extra: pip install '.[mlflow]'")
  pytest.importorskip("flask", reason="MLflow's server is in the package mlflow")
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  address = f"http://127.0.0.1:{port}"
  command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
  command += ["--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db"]
  command += ["--artifacts-destination", str(tmp_path / "artifacts")]
  with (tmp_path / "log").open("w") as log:
    server = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path)
  try:
    end = time.monotonic() + 240
    while True:
      try:
        urllib.request.urlopen(f"{address}/health", timeout=5)
        break
      except OSError:
        assert server.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < end
        time.sleep(1)
    search.sweep(
      small_networks.dense(3),
      recipes.labels(),
      points=search.product(rate=[0.01, 0.1]),
      data=data.on_device(examples(), batch_size=8, data_seed=0),
      optimizer=lambda rate: optax.adam(rate),
      steps=6,
      choice=search.Choice(data.evaluation_batches(examples(), batch_size=24)),
      run=train.Run(
        tmp_path / "sweep", progress=None, trackers=[runs.MLflow(address, experiment="tests")]
      ),
    )
    said = capfd.readouterr().out
    assert "point" not in said, said  # MLflow's lines of each run are printed of the search alone
    parent = json.loads((tmp_path / "sweep" / "mlflow.json").read_text())["run"]
    whole, _, _ = found_in(address, "sweep")
    assert (whole.info.run_id, whole.info.status) == (parent, "FINISHED")
    assert whole.data.params["steps"] == "6"
    for point in range(2):
      one, steps, _ = found_in(address, f"point {point}, student 0")
      assert steps == [1, 2, 3, 4, 5, 6]
      assert one.data.tags["mlflow.parentRunId"] == parent
      assert one.data.tags["jaxdistill.group"] == "sweep"
      assert "validation/accuracy" in one.data.metrics
      assert one.data.params["rate"] == str([0.01, 0.1][point])
    runs.track(
      [runs.MLflow(address, experiment="tests")],
      folder=tmp_path / "sweep",
      files=[tmp_path / "sweep" / "config.json"],
    )
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=address)
    files = {file.path for file in client.list_artifacts(parent)}
    assert files == {"table.md", "table.csv", "chosen.json", "sweep.png", "config.json"}
  finally:
    server.terminate()
    server.wait()


WANDB = """
import os, pathlib, sys
import test_trackers
from jaxdistill import runs
import wandb
settings = wandb.Settings(silent=True, x_disable_stats=True)
tracker = runs.Wandb("tests", mode="offline", settings=settings)
getattr(test_trackers, sys.argv[2])(tracker, pathlib.Path(sys.argv[1]))
if sys.argv[2] == "first_part":
  os._exit(9)
"""


@pytest.mark.slow
def test_weights_and_biases_offline(tmp_path):
  """In processes of their own, of which the first is killed."""
  pytest.importorskip("wandb", reason="needs the extra: pip install '.[wandb]'")
  folder, here = tmp_path / "runs" / "mine", pathlib.Path(__file__).parent
  paths = [str(here), str(here.parent), *sys.path]
  for part, code in (("first_part", 9), ("second_part", 0)):
    done = subprocess.run(
      [sys.executable, "-W", "error", "-c", WANDB, str(folder), part],
      env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
      capture_output=True,
      text=True,
    )
    assert done.returncode == code, done.stderr
  note = json.loads((folder / "wandb.json").read_text())
  assert note["last"] == 4
  parts = sorted((folder / "wandb").glob("offline-run-*"))
  assert len(parts) == 2
  assert all(part.name.endswith(note["id"]) for part in parts)
