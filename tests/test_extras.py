"""The core alone: what needs more says so in a sentence that names the extra, before any work."""

import ast
import pathlib
import re
import subprocess
import sys
import tomllib

import flax.linen as nn
import numpy as np
import optax
import pytest

import jaxdistill as jd
from jaxdistill import (
  _extras,
  data,
  export,
  networks,
  recipes,
  reports,
  runs,
  search,
  teachers,
)
from jaxdistill.__main__ import main
from jaxdistill.types import Model

ROOT = pathlib.Path(jd.__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BROUGHT = PROJECT["optional-dependencies"]
# Where what is imported is not what is installed.
DISTRIBUTIONS = {
  "cv2": "opencv-python-headless",
  "mlflow": "mlflow-skinny",
  "sklearn": "scikit-learn",
}


def names(requirements):
  return {re.match(r"[\w.-]+", one).group().lower().replace("_", "-") for one in requirements}


def test_each_library_is_in_the_extra_that_is_named():
  for library, extra in _extras.EXTRAS.items():
    name = DISTRIBUTIONS.get(library, library).lower().replace("_", "-")
    assert name in names(BROUGHT[extra]), f"{library} does not come with {extra}"
    assert name not in names(PROJECT["dependencies"])


def test_what_is_imported_comes_with_the_core_or_with_an_extra():
  core = {
    "IPython",
    "absl",
    "flax",
    "jax",
    "jaxtyping",
    "numpy",
    "optax",
    "orbax",
    "rich",
    "jaxdistill",
  }  # absl: optax; IPython: the notebook, in which alone it is asked for
  for path in (ROOT / "jaxdistill").rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      found = []
      if isinstance(node, ast.Import):
        found = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom):
        found = [node.module]
      for name in (one.split(".")[0] for one in found):
        known = name in core or name in sys.stdlib_module_names or name in _extras.EXTRAS
        assert known, f"{path.name} imports {name}, which nothing brings"


# SciPy comes with JAX, and TensorFlow is nobody's but who prepares images.
HIDDEN = sorted(set(_extras.EXTRAS) - {"scipy", "tensorflow"})
ABSENT = f"""
import runpy, sys

sys.modules.update(dict.fromkeys({HIDDEN}))
runpy.run_path({str(ROOT / "tests" / "core_alone.py")!r}, run_name="__main__")
"""


@pytest.mark.slow
def test_the_core_trains_measures_and_loads(tmp_path):
  command = [sys.executable, "-c", ABSENT, str(tmp_path / "run")]
  done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
  assert done.returncode == 0, done.stderr
  assert "accuracy" in done.stdout
  lines = done.stderr.splitlines()
  assert any("40 of 40" in line for line in lines)
  assert lines[-1].endswith(str(tmp_path / "run"))


def source():
  x = np.eye(4, dtype=np.float32)
  return data.on_device(data.from_arrays(x, np.arange(4)), batch_size=2, data_seed=0)


def network():
  return networks.linen(nn.Dense(4))


def teacher():
  return teachers.frozen(Model(network(), {}))


def batches():
  examples = data.from_arrays(np.eye(4, dtype=np.float32), np.arange(4))
  return data.evaluation_batches(examples, batch_size=2)


def sweep(folder):
  search.sweep(
    network(),
    recipes.kd,
    points=search.product(temperature=[1, 2]),
    data=source(),
    optimizer=optax.adam(0.1),
    steps=1,
    choice=search.Choice(batches()),
    run=folder,
  )


def compress(folder):
  search.compress(
    search.affordable({"small": network()}, search.Budget(bytes=1000), source()),
    teacher=teacher(),
    data=source(),
    optimizer=optax.adam(0.1),
    steps=1,
    choice=search.Choice(batches()),
    run=folder,
  )


def stream(folder):
  data.streamed(data.from_arrays(np.eye(4), np.arange(4)), batch_size=2, data_seed=0)


def export_kinds(kind):
  def call(folder):
    x = np.eye(4, dtype=np.float32)
    export.export(folder, (x, None), kinds=[kind], network=network(), calibration=x)

  return call


def compare(folder):
  reports.compare_students(
    folder,
    network=network(),
    teacher=teacher(),
    batches=batches(),
    descriptions={},
    examples=4,
  )


DECODER = networks.models.DecoderConfig(8, 4, layers=1, heads=1, kv_heads=1, head_dim=4, hidden=4)
NEEDS = [
  ("array_record", lambda f: teachers.cached(None, source(), folder=f)),
  ("array_record", lambda f: teachers.verify_cache(f)),
  ("cv2", lambda f: data.central_crop(8)),
  ("cv2", lambda f: data.random_resized_crop(8)),
  ("grain", lambda f: teachers.cached(None, source(), folder=f)),
  ("grain", stream),
  ("jax2onnx", export_kinds("onnx")),
  ("jinja2", lambda f: reports.render_report(f)),
  ("jsonschema", compare),
  ("jsonschema", lambda f: reports.compare_runs(f, f)),
  ("litert_converter", export_kinds("litert")),
  ("matplotlib", sweep),
  ("matplotlib", compress),
  ("matplotlib", compare),
  ("matplotlib", lambda f: reports.write_report(f, {})),
  (
    "matplotlib",
    lambda f: reports.figures.curves(None, [1], {"a": ([1], None)}, xlabel="", ylabel=""),
  ),
  ("mlflow", lambda f: runs.MLflow()),
  ("onnx", export_kinds("int8_onnx")),
  ("onnxruntime", export_kinds("onnx")),
  ("optuna", lambda f: search.Proposals({"temperature": None}, trials=1)),
  ("qwix", export_kinds("int8")),
  ("qwix", export_kinds("int8_weights")),
  ("qwix", lambda f: teachers.frozen(Model(None, {"params": {}}), dtype="int8")),
  ("safetensors", export_kinds("safetensors")),
  ("safetensors", lambda f: networks.weights.safetensors(f)),
  ("safetensors", lambda f: networks.weights.save_safetensors(f / "a.safetensors", {})),
  ("safetensors", lambda f: networks.pretrained.save(f, {}, DECODER)),
  ("scipy", lambda f: reports.compare_runs(f, f)),
  ("scipy", lambda f: reports.render_report(f)),
  ("sklearn", lambda f: data.load("digits", data_dir=f)),
  ("stablehlo_coreml", export_kinds("coreml")),
  ("tensorboardX", lambda f: runs.TensorBoard()),
  ("tensorflow_datasets", lambda f: data.load("digits", data_dir=f)),
  ("tokenizers", lambda f: data.tokenizers.load(f)),
  ("tokenizers", lambda f: data.tokenizers.trained(["a text"], 300)),
  ("wandb", lambda f: runs.Wandb()),
]


@pytest.mark.parametrize(
  ("library", "call"), NEEDS, ids=[f"{library}{i}" for i, (library, _) in enumerate(NEEDS)]
)
def test_a_call_that_needs_more_names_the_extra(library, call, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, library, None)
  if library == "tensorflow_datasets":  # as if nobody had asked for it yet
    for name in ("Digits", "load", "records", "splits"):
      monkeypatch.delitem(vars(data), name, raising=False)
    monkeypatch.delitem(sys.modules, "jaxdistill.data._tfds", raising=False)
  folder = tmp_path / "run"
  with pytest.raises(ImportError) as told:
    call(folder)
  assert told.value.name == library
  (sentence,) = str(told.value).splitlines()
  assert library in sentence
  assert f"pip install 'jaxdistill[{_extras.EXTRAS[library]}]'" in sentence
  assert not (folder / "config.json").exists()


def test_every_library_has_a_call_that_names_it():
  # TensorFlow is asked for by TFDS (test_data), tyro and magika by the experiments; LiteRT's
  # interpreter and Apple's tools come with the converters.
  elsewhere = {"ai_edge_litert", "coremltools", "magika", "tensorflow", "tyro"}
  assert {library for library, _ in NEEDS} == set(_extras.EXTRAS) - elsewhere


def test_the_command_says_it_without_a_traceback(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  assert main(["report", str(tmp_path)]) == 1
  assert "jaxdistill[report]" in capsys.readouterr().err
