"""The experiments as a user runs them, at a tiny setting; and what they leave behind."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import jsonschema
import pytest

from jaxdistill import data, report

ROOT = pathlib.Path(__file__).parent.parent

DIGITS = ["--teachers", "2", "--seeds", "2", "--teacher-epochs", "2", "--epochs", "2"]
DIGITS += ["--teacher-channels", "4", "4", "--teacher-dense", "16", "--student-dense", "8"]
CIFAR = ["--teacher", "resnet14", "--student", "resnet8", "--seeds", "2", "--epochs", "1"]
CIFAR += ["--teacher-epochs", "1", "--fraction", "1", "--batch-size", "50", "--hint-weight", "0.1"]


@pytest.fixture(scope="module", autouse=True)
def scripts():
  sys.path.insert(0, str(ROOT / "experiments"))
  yield
  sys.path.remove(str(ROOT / "experiments"))


def run(name, arguments):
  """Runs an experiment's main in this process, so that compiled programs are shared."""
  script = importlib.import_module(name)
  script.main(*script.parse([str(a) for a in arguments]))


def read(folder, name="report.json"):
  return json.loads((folder / name).read_text())


def without_clock(found):
  """A report without what a clock decides."""
  for model in found["models"].values():
    for name in ("latency_ms", "throughput"):
      del model[name]
  return found


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
  folder = tmp_path_factory.mktemp("digits")
  data_dir = tmp_path_factory.mktemp("tfds")
  run("digits", [*DIGITS, "--out", folder, "--data-dir", data_dir])
  return folder, data_dir


def test_a_run_leaves_what_was_promised(digits):
  folder, _ = digits
  assert {"config.json", "report.json", "report.md", "accuracy.png"} <= set(os.listdir(folder))
  for part in ("teacher", "baseline", "student"):
    assert {"config.json", "metrics.jsonl", "checkpoints"} <= set(os.listdir(folder / part))
  assert "_CHECK" not in os.listdir(folder)
  text = (folder / "report.md").read_text()
  assert "| accuracy, %" in text
  assert "python experiments/digits.py --evaluate" in text
  assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_satisfies_its_schema(digits):
  found = read(digits[0])
  schema = report.schema()
  jsonschema.Draft202012Validator.check_schema(schema)
  jsonschema.validate(found, schema)
  assert found["examples"] == 697
  assert found["seeds"] == [0, 1]
  # One ensemble has no spread; saying 0 would be saying that it was measured.
  assert found["models"]["teacher"]["accuracy"]["std"] is None
  assert found["models"]["student"]["accuracy"]["std"] is not None
  student, teacher = found["models"]["student"], found["models"]["teacher"]
  assert student["parameters"] < teacher["parameters"]
  broken = {**found, "models": {}}
  with pytest.raises(jsonschema.ValidationError):
    jsonschema.validate(broken, schema)


def test_a_finished_run_is_evaluated_again_elsewhere(digits, tmp_path):
  folder, data_dir = digits
  moved = tmp_path / "moved"
  folder.rename(moved)
  try:
    before = read(moved)
    run("digits", ["--evaluate", moved, "--data-dir", data_dir])
    again = read(moved)
    assert without_clock(again)["models"] == without_clock(before)["models"]
    run("digits", ["--evaluate", moved, "--split", "validation", "--data-dir", data_dir])
    assert read(moved, "report-validation.json")["examples"] == 110
    assert read(moved)["split"] == "test"
  finally:
    moved.rename(folder)


def test_a_run_that_is_started_again_goes_on(digits, capsys):
  folder, data_dir = digits
  before = (folder / "student" / "metrics.jsonl").read_text()
  run("digits", [*DIGITS, "--out", folder, "--data-dir", data_dir])
  assert (folder / "student" / "metrics.jsonl").read_text() == before
  assert "Report: " in capsys.readouterr().out


def test_another_configuration_in_the_same_folder_is_refused(digits):
  folder, data_dir = digits
  with pytest.raises(ValueError, match="temperature: .* there, 9"):
    run("digits", [*DIGITS, "--temperature", "9", "--out", folder, "--data-dir", data_dir])


def test_cifar100_trains_and_reports(tfds_dir, tmp_path, monkeypatch):
  script, load = importlib.import_module("cifar100"), data.load
  # A hundredth of what is evaluated: the residual networks are slow on a test machine.
  fewer = {"test": "test[:1%]", "train[90%:]": "train[99%:]"}
  monkeypatch.setattr(
    script.data, "load", lambda name, split, **rest: load(name, fewer.get(split, split), **rest)
  )
  run("cifar100", [*CIFAR, "--out", tmp_path, "--data-dir", tfds_dir])
  found = read(tmp_path)
  jsonschema.validate(found, report.schema())
  assert found["examples"] == 100
  assert found["models"]["student"]["parameters"] == 83_892
  assert found["models"]["teacher"]["parameters"] == 181_108


def test_short_starts_from_the_short_setting():
  script = importlib.import_module("cifar100")
  config, _ = script.parse(["--short", "--epochs", "1"])
  assert (config.epochs, config.fraction) == (1, script.SHORT.fraction)
  assert script.parse([])[0] == script.Config()


def test_a_wrong_network_claims_no_folder(tfds_dir, tmp_path):
  with pytest.raises(SystemExit, match="'resnet57' is no CIFAR network.*resnet56"):
    run("cifar100", ["--short", "--teacher", "resnet57", "--out", tmp_path, "--data-dir", tfds_dir])
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["digits", "cifar100"])
def test_help_is_a_page_and_loads_no_data(name):
  command = [sys.executable, str(ROOT / "experiments" / f"{name}.py"), "--help"]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
  assert "--out" in done.stdout
  assert "--evaluate" in done.stdout


def test_evaluating_what_is_no_run_says_so(tmp_path):
  with pytest.raises(FileNotFoundError, match="is not a run's folder"):
    run("digits", ["--evaluate", tmp_path])
