"""What importing the library brings along: a sweep of small students lasts as long as an import."""

import subprocess
import sys

import pytest

# From a tenth to half a second each; imported by the first call that needs them.
HEAVY = (
  "grain",
  "jax2onnx",
  "matplotlib",
  "onnxruntime",
  "orbax",
  "qwix",
  "safetensors",
  "scipy",
  "sklearn",
  "tensorboardX",
  "tensorflow_datasets",
  "tqdm",
)


MODULES = "train, recipes, evaluate, teachers, models, capture, data, checkpoint, deployed, mesh"


def test_heavy_libraries_are_imported_where_they_are_used():
  program = (
    f"from jaxdistill import {MODULES}\n"
    "import sys\n"
    f"print(sorted({{name.split('.')[0] for name in sys.modules}} & {set(HEAVY)}))"
  )
  made = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
  )
  assert made.stdout.strip() == "[]", made.stderr or made.stdout


def test_names_of_the_data_door_are_there_without_tfds():
  from jaxdistill import data, tfds_data

  assert data.load is tfds_data.load
  with pytest.raises(AttributeError, match="'loda'"):
    data.loda  # noqa: B018
