"""Decoded arrays kept on disk: the same arrays, whole or made anew, and no more than fits."""

import os
import shutil

import numpy as np
import pytest

from jaxdistill import data
from jaxdistill.data import _kept


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tfds")
  data.load("digits", "test[:1]", data_dir=folder, cache=False)
  return folder


@pytest.fixture
def made(monkeypatch):
  """How often arrays were decoded."""
  from jaxdistill.data import _tfds

  calls, decoded = [], _tfds._decoded
  monkeypatch.setattr(_tfds, "_decoded", lambda part: calls.append(part.split) or decoded(part))
  return calls


def load(prepared, cache, split="train", **options):
  return data.load("digits", split, data_dir=prepared, cache=cache, **options)


def assert_same(one, other):
  for name in ("inputs", "labels", "ids"):
    a, b = getattr(one, name), getattr(other, name)
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)
  assert (one.name, one.version, one.split, one.num_classes, one.label_names) == (
    other.name,
    other.version,
    other.split,
    other.num_classes,
    other.label_names,
  )


def test_what_was_decoded_once_is_loaded(prepared, tmp_path, made):
  cache = tmp_path / "a" / "b"
  plain = load(prepared, False)
  first, again = load(prepared, cache), load(prepared, str(cache))
  assert made == ["train"] * 2
  assert_same(first, plain)
  assert_same(again, plain)
  assert again.inputs.flags.writeable
  again.inputs[:] = 0  # nobody else's
  assert_same(load(prepared, cache), plain)
  assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".npz"]


def test_the_users_cache_is_the_default(prepared, tmp_path, made, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  for _ in range(2):
    data.load("digits", "test", data_dir=prepared)
  assert made == ["test"]
  assert {path.parent for path in tmp_path.rglob("digits-*")} == {tmp_path / "jaxdistill" / "data"}


def test_other_rows_features_and_files_are_other_arrays(prepared, tmp_path, made):
  cache = tmp_path / "cache"
  load(prepared, cache)
  assert len(load(prepared, cache, "train[:50%]")) == 550
  assert load(prepared, cache, labels=None).num_classes == 0
  assert load(prepared, cache, inputs="label").inputs.shape == (1100,)
  moved = tmp_path / "moved"
  shutil.copytree(prepared, moved)  # with the files' times
  load(moved, cache)
  assert len(made) == 4
  (file,) = (moved / "digits" / "1.0.0").glob("*train*")
  os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
  load(moved, cache)
  assert len(made) == 5


@pytest.mark.parametrize("damage", ["flipped", "cut", "arrays gone", "manifest"])
def test_what_is_damaged_is_made_anew(prepared, tmp_path, made, damage):
  plain = load(prepared, tmp_path)
  (arrays,), (manifest,) = tmp_path.glob("*.npz"), tmp_path.glob("*.json")
  path = manifest if damage == "manifest" else arrays
  raw = bytearray(path.read_bytes())
  raw[len(raw) // 2] ^= 1
  if damage == "arrays gone":
    path.unlink()
  else:
    path.write_bytes(raw[: -1 if damage == "cut" else None])
  with pytest.warns(UserWarning, match="is decoded anew"):
    assert_same(load(prepared, tmp_path), plain)
  assert_same(load(prepared, tmp_path), plain)
  assert len(made) == 2


def test_a_cache_that_cannot_be_written_is_said(prepared, tmp_path, made):
  (tmp_path / "file").write_text("")
  with pytest.warns(UserWarning, match=r"cannot be kept under .*file.*cache=False"):
    load(prepared, tmp_path / "file" / "cache")
  assert made == ["train"]


def test_text_and_large_sets_are_not_kept(prepared, tmp_path, monkeypatch):
  load(prepared, tmp_path, inputs="id")
  monkeypatch.setattr(_kept, "_LARGEST", 1000)
  load(prepared, tmp_path)
  assert not list(tmp_path.iterdir())


def test_what_was_not_used_for_longest_goes(prepared, tmp_path, made, monkeypatch):
  (tmp_path / ".writing-of-a-killed-process").mkdir()
  os.utime(tmp_path / ".writing-of-a-killed-process", (0, 0))
  for age, split in ((300, "train[:90%]"), (200, "train[10%:]"), (100, "train[5%:95%]")):
    load(prepared, tmp_path, split)
    newest = max(tmp_path.glob("*.json"), key=lambda path: path.stat().st_mtime)
    os.utime(newest, (newest.stat().st_mtime - age,) * 2)
  load(prepared, tmp_path, "train[:90%]")  # used last now, though written first
  assert len(list(tmp_path.iterdir())) == 6
  size = max(path.stat().st_size for path in tmp_path.glob("*.npz"))
  monkeypatch.setattr(_kept, "_ALL", 3 * size)
  load(prepared, tmp_path, "train")
  assert len(made) == 4
  for split in ("train", "train[:90%]"):
    load(prepared, tmp_path, split)
  assert len(made) == 4
  load(prepared, tmp_path, "train[10%:]")
  assert len(made) == 5
