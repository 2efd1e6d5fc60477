"""The comparison of all recipes as a user runs it, at a tiny setting."""

import csv
import importlib
import pathlib
import sys

import jax
import numpy as np
import pytest

from jaxdistill import recipes
from jaxdistill.types import as_objective

ROOT = pathlib.Path(__file__).parent.parent
# One stage, and two.
SOME = ["--short", "--factors", "1", "10", "--methods", "kd", "fsp"]


@pytest.fixture(scope="module")
def script():
  sys.path.insert(0, str(ROOT / "experiments"))
  yield importlib.import_module("methods")
  sys.path.remove(str(ROOT / "experiments"))


@pytest.fixture(scope="module")
def finished(script, tmp_path_factory):
  folder = tmp_path_factory.mktemp("methods")
  data_dir = str(tmp_path_factory.mktemp("tfds"))
  arguments = [*SOME, "--out", str(folder), "--data-dir", data_dir]
  script.main(*script.parse(arguments))
  return folder, arguments


def rows(path):
  with path.open() as file:
    return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_table_has_a_row_for_each_method(finished):
  folder, _ = finished
  baseline, *others = rows(folder / "methods.csv")
  assert (baseline["method"], baseline["factor"], baseline["gain"]) == ("labels alone", "", "")
  assert sorted(row["method"] for row in others) == ["fsp", "kd"]
  accuracy = [float(row["accuracy_mean"]) for row in others]
  assert accuracy == sorted(accuracy, reverse=True)
  published = {"kd": ("soft_weight", 0.9), "fsp": ("fsp_weight", 1.0)}
  for row in others:
    name, weight = published[row["method"]]
    assert float(row["factor"]) in (1.0, 10.0)
    assert row["weights"] == f"{name}={weight * float(row['factor']):g}"
    gain = float(row["accuracy_mean"]) - float(baseline["accuracy_mean"])
    assert float(row["gain"]) == pytest.approx(gain)
    seeds = np.array(row["seeds"].split(), float)
    assert seeds.std(ddof=1) == pytest.approx(float(row["accuracy_std"]), abs=1e-3)  # 4 digits
  text = (folder / "methods.md").read_text()
  assert "| labels alone |" in text
  assert "python experiments/methods.py --seeds 2 --factors 1.0 10.0" in text
  assert (folder / "methods.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_finished_run_is_measured_again_without_training(script, finished):
  folder, arguments = finished
  logs = {path: path.read_text() for path in sorted(folder.rglob("metrics.jsonl"))}
  script.main(*script.parse([*arguments, "--split", "validation"]))
  assert {path: path.read_text() for path in logs} == logs
  for row in rows(folder / "methods-validation.csv"):
    # What the choice was made by, measured anew.
    assert float(row["accuracy_mean"]) == pytest.approx(float(row["validation_mean"]))
  assert rows(folder / "methods.csv")


def test_every_recipe_is_a_method_whose_own_weights_are_scaled(script):
  parts = {"combine", "each", "hint", "labels", "overhaul_margins", "recipe", "with_class_maps"}
  parts |= {"with_views", "with_variables", "with_many_to_one", "fold_many_to_one"}
  parts |= {"dafl", "with_generator"}  # without data, which is another protocol
  parts |= {"multi_label", "regression", "teacher_bounded", "gaussian_regression"}  # other tasks
  parts |= {"affinity"}  # two towers
  # Recipes in another form of theirs, or put together, as others have published them.
  more = {"mimic", "wttm_crd", "mlkd_standardized", "mlkd_two_views", "born_again", "dot"}
  assert set(script.METHODS) == set(recipes.__all__) - parts | more
  assert len(script.METHODS) >= 40
  network = script.Bench.network
  config = script.Config()
  bench = type("Bench", (), {"config": config})
  teacher = network(bench, config.teacher_depth, config.teacher_width, "teacher")
  shapes = jax.eval_shape(teacher.init, jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))
  variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
  known = script.Known(config, 480, np.zeros(9, int), variables, lambda: np.zeros((9, 64)))
  for method in script.METHODS.values():
    stages = [as_objective(method.make(known))]
    stages += [] if method.first is None else [as_objective(method.first())]
    (weighed,) = (stage for stage in stages if set(method.weights) <= set(stage.hyper))
    if not method.weights:  # a schedule is no weight to scale: the method comes as it is, once
      assert script.scaled(weighed, (), (1.0, 10.0)) == [{}]
      continue
    one, ten = script.scaled(weighed, method.weights, (1.0, 10.0))
    assert one == {name: weighed.hyper[name] for name in method.weights}
    assert ten == {name: 10 * value for name, value in one.items()}
    assert "hard_weight" not in one
  assert (known.share(20), known.share(10)) == (40, 20)


def test_a_wrong_method_claims_no_folder(script, tmp_path):
  config, options = script.parse(["--methods", "fitnets", "--out", str(tmp_path / "run")])
  with pytest.raises(SystemExit, match="--methods has .'fitnets'.; there are kd, .* fitnet, "):
    script.main(config, options)
  assert not list(tmp_path.iterdir())


def test_cifar100_is_the_published_pair(script):
  config, _ = script.parse(["--dataset", "cifar100"])
  assert (config.teacher_depth, config.student_depth, config.epochs) == (32, 8, 240)
  assert config == script.CIFAR100
  short, _ = script.parse(["--short", "--dataset", "cifar100"])
  assert (short.dataset, short.epochs) == ("cifar100", script.SHORT.epochs)
  assert script.parse([])[0] == script.Config()
