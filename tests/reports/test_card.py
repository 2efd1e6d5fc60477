"""A student as a folder for a hub of models: loaded back, its card saying what was measured."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import fabricated
from jaxdistill import export, reports
from jaxdistill.types import Model, Network, Outputs

# Markup, HTML, YAML's own signs, a line that would end the metadata.
STRANGE = 'a *data* <script> set: "x" {y} [z](http://a)\n---\n# no heading'


def saved(folder, name="student"):
  """A linear student of three classes in a run's folder, whose program normalises."""

  def apply(variables, x, *, train, key):
    return Outputs(logits=x @ variables["params"]["kernel"]), {}

  variables = {"params": {"kernel": jnp.arange(12.0).reshape(4, 3)}}
  network = Network(init=lambda key, x: variables, apply=apply)
  stored = jax.ShapeDtypeStruct((4,), jnp.uint8)
  export.save_student(
    folder, Model(network, variables), stored=stored, normalize=lambda x: x / 8.0 - 1.0, name=name
  )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  run = tmp_path_factory.mktemp("run")
  found = fabricated.gathered(dataset=STRANGE)
  fabricated.run(run, found, pages=False)
  saved(run / "student", name="stu*dent: <b>")
  (run / "student" / "config.json").write_text("{}")  # a run inside an experiment's folder
  folder = reports.write_model_folder(run, run / "hub", license="apache-2.0")
  return run, folder


def test_the_student_comes_back_with_its_bits(made):
  run, folder = made
  x = np.random.default_rng(0).integers(0, 17, (5, 4)).astype(np.uint8)
  back = export.load_folder(folder)
  np.testing.assert_array_equal(back(x), export.load_student(run)(x))
  assert back.name == "stu*dent: <b>"
  assert set(back.leaves) == {"params/kernel"}


def test_every_figure_of_the_card_is_the_reports(made):
  run, folder = made
  report = json.loads((run / "report.json").read_text())
  card = (folder / "README.md").read_text()
  _, head, body = card.split("---\n", 2)
  told = yaml.safe_load(head)
  assert told["license"] == "apache-2.0"
  assert told["library_name"] == "jaxdistill"
  (model,) = told["model-index"]
  assert model["name"] == "stu*dent: <b>"
  (result,) = model["results"]
  assert result["dataset"]["name"] == STRANGE
  values = {one["type"]: one["value"] for one in result["metrics"]}
  student = report["models"]["student"]
  assert values
  assert values == {name: student[name]["mean"] for name in values}
  # Of what was not measured nothing is said, and the table is the report's own.
  assert set(values) <= set(report["task"]["metrics"])
  for line in reports.table(report).splitlines():
    assert line in body
  assert "<script>" not in body.replace("\\<script>", "")
  assert "\n# no heading" not in body


def test_a_run_without_a_report_has_a_card_without_figures(tmp_path):
  saved(tmp_path / "run")
  (tmp_path / "run" / "config.json").write_text("{}")
  folder = reports.write_model_folder(tmp_path / "run", tmp_path / "hub")
  card = (folder / "README.md").read_text()
  assert "no report" in card
  assert "model-index" not in card
  assert "license" not in card


def test_damage_and_other_peoples_folders_are_noticed(made, tmp_path):
  run, folder = made
  for path in folder.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  export.load_folder(tmp_path)
  weights = tmp_path / "model.safetensors"
  weights.write_bytes(weights.read_bytes()[:-1] + b"?")
  with pytest.raises(export.ExportError, match=r"model\.safetensors"):
    export.load_folder(tmp_path)
  (tmp_path / "config.json").write_text(json.dumps({"files": {"../a": {}}}))
  with pytest.raises(export.ExportError):
    export.load_folder(tmp_path)
  with pytest.raises(FileExistsError, match="folder="):
    export.save_folder(run, tmp_path)
  with pytest.raises(FileNotFoundError, match=r"config\.json"):
    export.load_folder(pathlib.Path(tmp_path, "absent"))


def test_the_hubs_own_reader_takes_the_card(made):
  hub = pytest.importorskip("huggingface_hub")
  card = hub.ModelCard.load(made[1] / "README.md")
  (result,) = [one for one in card.data.eval_results if one.metric_type == "accuracy"]
  report = json.loads((made[0] / "report.json").read_text())
  assert result.metric_value == report["models"]["student"]["accuracy"]["mean"]
