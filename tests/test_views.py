"""The experiment on views: students of every V side by side see what a cache of V views shows."""

import csv
import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import data, teachers
from jaxdistill.types import Outputs, Teacher

ROOT = pathlib.Path(__file__).parent.parent

SMALL = ["--views", "1", "9", "--seeds", "2", "--teacher-epochs", "1", "--epochs", "2"]
SMALL += ["--teacher-channels", "2", "2", "--teacher-dense", "8"]
SMALL += ["--student-channels", "2", "2", "--student-dense", "4"]


@pytest.fixture(scope="module")
def script():
  sys.path.insert(0, str(ROOT / "experiments"))
  import views

  yield views
  sys.path.remove(str(ROOT / "experiments"))


@pytest.mark.slow
def test_a_run_leaves_table_and_picture(script, tmp_path):
  script.main(*script.parse([*SMALL, "--out", str(tmp_path), "--data-dir", str(tmp_path / "tfds")]))
  with (tmp_path / "views.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert [row["views"] for row in rows] == ["1", "9"]
  assert all(0 <= float(row["distilled_mean"]) <= 100 for row in rows)
  assert (tmp_path / "views.png").read_bytes().startswith(b"\x89PNG")
  assert "9 views are all that a shift by 1 has" in (tmp_path / "views.md").read_text()


def test_students_side_by_side_see_what_a_cache_of_their_views_shows(script):
  rng = np.random.default_rng(0)
  examples = data.from_arrays(rng.integers(0, 9, (6, 4, 4, 1)).astype(np.uint8), np.arange(6) % 2)

  def cached(views):
    source = data.on_device(
      examples, batch_size=3, data_seed=1, augmentation=data.crop(1), views=views
    )
    return teachers.cached(Teacher({}, brightness), source, in_advance=True, progress=None)

  def brightness(variables, batch):
    ramp = jnp.arange(32, dtype=jnp.float32).reshape(2, 16)
    return Outputs(logits=batch.inputs.reshape(-1, 16) @ ramp.T)

  largest = cached(9)
  unbounded = data.on_device(examples, batch_size=3, data_seed=1, augmentation=data.crop(1))
  ours = script.shown(dataclasses.replace(largest, read=unbounded.read), 4)
  theirs = cached(4)
  steps = 2 * 10  # beyond nine epochs
  batches = [
    jax.jit(jax.vmap(lambda item, one=one: one.cut(one.shared, item)))(one.items(0, steps))
    for one in (ours, theirs)
  ]
  for a, b in zip(*map(jax.tree.leaves, batches), strict=True):
    np.testing.assert_array_equal(a, b)
  assert len(np.unique(batches[0].view)) == 4
