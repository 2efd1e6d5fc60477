"""What importing the library brings along: a sweep of small students lasts as long as an import."""

import subprocess
import sys

import pytest

# From a tenth to half a second each; imported by the first call that needs them.
HEAVY = (
  "grain",
  "jax2onnx",
  "matplotlib",
  "mlflow",
  "onnxruntime",
  "optuna",
  "orbax",
  "qwix",
  "safetensors",
  "scipy",
  "sklearn",
  "tensorboardX",
  "tensorflow_datasets",
  "tokenizers",
  "wandb",
)


ROOMS = (
  "data",
  "evaluation",
  "export",
  "losses",
  "networks",
  "recipes",
  "reports",
  "runs",
  "search",
  "teachers",
  "train",
)


def imported(program):
  """What a program has imported at its end."""
  program += "\nimport sys; print(*sorted(sys.modules))"
  made = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
  )
  return set(made.stdout.split())


# What is there for one of these libraries, and imports it.
THEIRS = {
  "data": {"Digits", "load", "records", "splits"},
  "export": {"KINDS", "Check", "export", "export_file", "verify_exports"},
  "networks": {"pretrained", "weights"},
  "runs": {"find_collections", "nested_dicts", "read_foreign_orbax"},
}


def test_heavy_libraries_are_imported_where_they_are_used():
  program = f"""
import importlib
for room in {ROOMS}:
  door = importlib.import_module("jaxdistill." + room)
  for name in set(door.__all__) - {THEIRS}.get(room, set()):
    getattr(door, name)
"""
  assert not {name.split(".")[0] for name in imported(program)} & set(HEAVY)


def test_the_package_opens_one_room_at_a_time():
  found = imported("import jaxdistill as jd")
  assert {name for name in found if name.startswith("jaxdistill")} == {
    "jaxdistill",
    "jaxdistill._door",
  }
  assert "jax" not in found
  found = imported("import jaxdistill as jd\njd.losses.soft_target_kl")
  rooms = {name.split(".")[1] for name in found if name.startswith("jaxdistill.")}
  assert rooms == {"_check", "_door", "losses"}
  assert not {name.split(".")[0] for name in found} & {*HEAVY, "flax", "optax"}


def test_the_seven_words_and_fit_are_at_the_top():
  import jaxdistill as jd
  from jaxdistill import train, types

  for name in ("Batch", "Model", "Network", "Objective", "Outputs", "Teacher", "Term"):
    assert getattr(jd, name) is getattr(types, name)
  assert jd.fit is train.fit
  assert {*ROOMS} < {*jd.__all__} <= {*dir(jd)}
  assert len(jd.__all__) == 7 + 1 + len(ROOMS)


def test_a_door_says_what_it_has_not():
  from jaxdistill import data
  from jaxdistill.data import _tfds

  assert data.load is _tfds.load
  with pytest.raises(AttributeError, match="'loda'"):
    data.loda  # noqa: B018
