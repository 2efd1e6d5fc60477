"""The one command for a machine with an accelerator: what it keeps when it is killed, and says."""

import dataclasses
import importlib.util
import json
import pathlib
import random
import re
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "accelerator.py"


@pytest.fixture(scope="module")
def accelerator():
  spec = importlib.util.spec_from_file_location("accelerator", SCRIPT)
  module = importlib.util.module_from_spec(spec)
  sys.modules["accelerator"] = module  # dataclasses look there for their module
  spec.loader.exec_module(module)
  return module


def settings(accelerator, tmp_path, **options):
  work = tmp_path / "work"
  work.mkdir()
  return accelerator.Settings(out=str(tmp_path), work=str(work), tiny=True, **options)


def start(out, log, data_dir):
  command = [sys.executable, str(SCRIPT), "--tiny", "--seconds", "3000", "--out", str(out)]
  if data_dir is not None:
    command += ["--data-dir", str(data_dir)]
  return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


@pytest.mark.slow
def test_killed_ten_times_and_started_again_every_figure_is_measured_once(accelerator, tmp_path):
  shared = ROOT.parent / "shared" / "tfds"
  data_dir = shared if (shared / "cifar100").is_dir() else None
  out, draw = tmp_path / "out", random.Random(0)
  with open(tmp_path / "printed", "w") as log:
    for _ in range(10):
      process = start(out, log, data_dir)
      time.sleep(draw.uniform(0.2, 12))
      process.kill()
      process.wait()
    assert start(out, log, data_dir).wait() == 0
  printed = (tmp_path / "printed").read_text()
  results = json.loads((out / "accelerator.json").read_text())
  asked = accelerator.Settings(out="", work="", tiny=True)
  every = {figure: part for part in accelerator.parts(asked) for figure in part.figures}
  missing = {name for name in every if name not in results["figures"]}
  for name in missing:  # nothing is missing in silence
    needs = [n for n in every[name].needs if importlib.util.find_spec(n) is None]
    if needs:
      assert needs[0] in results["left_out"][name]
    else:
      assert every[name].name == "cifar100", (name, results["failed"].get(name), printed[-3000:])
      assert data_dir is None
  for name in set(every) - missing:
    assert len(re.findall(rf"^  {re.escape(name)}: ", printed, re.MULTILINE)) <= 1, name
  assert results["figures"]["smoke/run"]["value"]["beside"]["differs_by"] < 1e-4  # another program
  tests = results["figures"]["tests/outcome"]["value"]
  assert tests["passed"] > 0
  assert tests["failed"] == 0, tests["failures"]
  if data_dir is not None:
    assert results["figures"]["cifar100/training"]["value"]["done"]
    assert all(path.stat().st_size < 16e6 for path in out.glob("cifar100*.tar"))
  assert accelerator.tables(results)
  # Once more: nothing is left to do.
  with open(tmp_path / "again", "w") as log:
    assert start(out, log, data_dir).wait() == 0
  assert not re.search(r"^  (step|students|smoke)", (tmp_path / "again").read_text(), re.MULTILINE)


@pytest.mark.slow
def test_a_part_that_takes_too_long_or_fails_is_named_and_the_rest_is_kept(accelerator, tmp_path):
  """A process that is given a moment, in which it measures nothing; and one that fails."""
  told = settings(accelerator, tmp_path)
  results = accelerator.Results(tmp_path)
  part = next(p for p in accelerator.parts(told) if p.name == "vocabulary")
  accelerator.run_part(part, ["bfloat16"], told, results, 0.05)
  assert "ended after" in results.body["failed"]["vocabulary/bfloat16"]
  accelerator.run_part(part, ["float7"], told, results, 60)
  assert "left with" in results.body["failed"]["vocabulary/float7"]
  results.add("vocabulary/bfloat16", {"milliseconds": 1.0}, 0.1)
  read = accelerator.Results(tmp_path)
  assert list(read.figures) == ["vocabulary/bfloat16"]
  assert list(read.body["failed"]) == ["vocabulary/float7"]


def test_figures_are_taken_over_from_the_same_device_and_versions_alone(accelerator, tmp_path):
  kept = tmp_path / "kept"
  kept.mkdir()
  mine = {"device": "H100", "jax": "0.11.2", "torch": "2.11.0"}
  for name, theirs in {"a": mine, "b": {**mine, "device": "H200"}}.items():
    figures = {
      "machine/versions": {"value": theirs},
      f"cache/{name}": {"value": 1, "commit": "c0ffee"},
    }
    (kept / f"accelerator-{name}.json").write_text(json.dumps({"figures": figures}))
  results = accelerator.Results(tmp_path)
  accelerator.earlier(results, mine, kept)
  assert results.figures["cache/a"]["commit"] == "c0ffee"
  assert "cache/b" not in results.figures


def test_a_training_goes_on_from_its_archives(accelerator, tmp_path):
  (tmp_path / "one").mkdir()
  told = settings(accelerator, tmp_path / "one")
  folder = pathlib.Path(told.work) / "cifar100"
  for name in ("teacher", "baseline"):
    (folder / name / "checkpoints" / "8").mkdir(parents=True)
    (folder / name / "checkpoints" / "8" / "manifest.json").write_text(name)
    (folder / name / "checkpoints" / "9.writing").mkdir()
  (folder / "config.json").write_text("{}")
  accelerator.pack(told)
  kept = tmp_path / "kept" / "runs"
  kept.mkdir(parents=True)
  for path in (tmp_path / "one").glob("*.tar"):
    path.rename(kept / path.name)
  assert len(list(kept.iterdir())) == 3
  (tmp_path / "two").mkdir()
  elsewhere = dataclasses.replace(settings(accelerator, tmp_path / "two"), tiny=False)
  accelerator.unpack(elsewhere, tmp_path / "kept")
  there = pathlib.Path(elsewhere.work) / "cifar100"
  assert (there / "config.json").read_text() == "{}"
  for name in ("teacher", "baseline"):
    assert [path.name for path in (there / name / "checkpoints").iterdir()] == ["8"]
    assert (there / name / "checkpoints" / "8" / "manifest.json").read_text() == name


def test_the_readme_has_the_tables_of_the_figures_that_there_are(accelerator, tmp_path, capsys):
  copy = tmp_path / "README.md"
  copy.write_text((ROOT / "benchmarks" / "README.md").read_text())
  accelerator.write_tables(copy, ROOT / "benchmarks" / "results")
  assert copy.read_text() == (ROOT / "benchmarks" / "README.md").read_text()
  copy.write_text("no place")
  with pytest.raises(SystemExit, match="accelerator"):
    accelerator.write_tables(copy, tmp_path)


def test_every_figure_comes_to_the_tables(accelerator):
  """Made-up figures of every part; each kind shows, and what is missing is said."""
  step = {"images_per_second": 1234.0, "step_in_chunk_ms": 5.0, "over_the_floor": 1.02}
  values = {
    "machine/versions": {"device": "Some GPU", "jax": "0.11.2", "flax": "0.12", "torch": None},
    "smoke/run": {"steps": 300, "seconds": 4.0, "beside": {"differs_by": 1e-6}},
    "tests/outcome": {"passed": 90, "failed": 1, "skipped": 2},
    "step, ours float32/64": {**step, "compilation_seconds": 20.0},
    "step, PyTorch loop/64": {"images_per_second": 99.0, "step_ms": 6.0, "first_steps_seconds": 1},
    "students, digits/lax, vmap, 1": {"ms_a_student_step": 0.5},
    "sweep, 300 MLP/sweep": {"seconds": 10.0},
    "sweep, 300 MLP/stacked": {"seconds": 25.0},
    "cache/epoch": {"sides": {"plain": {"seconds an epoch": 3.0, "of plain": 1.0}}},
    "vocabulary/float32": {"milliseconds": 7.0, "logits_bytes": 4.2e9, "temporary_bytes": 8.4e9},
    "cifar100/training": {
      "done": False,
      "runs": {"teacher": {"epoch": 77.0, "examples_per_second": 12345.0}},
    },
  }
  about = {"at": "2026-11-26T00:00:00+00:00", "commit": "c0ffee1", "source": "abc"}
  results = {
    "figures": {name: {"value": value, **about} for name, value in values.items()},
    "left_out": {"step, PyTorch compiled/64": "not installed: torch"},
    "failed": {},
  }
  text = accelerator.tables(results)
  for shown in ("Some GPU", "c0ffee1", "2026-11-26", "90 passed, 1 failed", "1,234", "1.02", "0.5"):
    assert shown in text
  assert "| 300 MLP, stacked | 25 | 2.5 |" in text
  assert "| teacher | 77 | 12,345 |" in text
  assert "PyTorch compiled/64 (not installed: torch)" in text


def test_the_vocabularys_table_has_every_cell_and_what_was_not_run(accelerator, tmp_path):
  used = {"arguments": 1e9, "results": 1e9, "temporaries": 2e9}
  less = {**used, "temporaries": 0.0}
  cells = [
    {
      "tokens": 8,
      "vocabulary": 9000,
      "left out": "seconds",
      "bytes": {"naive": used, "kept": less},
    },
    {
      "tokens": 8,
      "vocabulary": 50,
      "seconds": {"naive": 2.0, "kept": 1.5, "PyTorch eager": 4.0},
      "bytes": {"naive": used, "kept": less},
    },
  ]
  widths = ("memory_width", "memory_teacher_width", "width", "teacher_width")
  found = {
    "cells": cells,
    "options": dict.fromkeys(widths, 16),
    "environment": {"cores": 2, "processor": "X", "jax": "0"},
    "megabytes a token": {"kept": {"with bfloat16 in and out": 0.0164}},
  }
  (tmp_path / "vocabulary.json").write_text(json.dumps(found))
  copy = tmp_path / "README.md"
  copy.write_text((ROOT / "benchmarks" / "README.md").read_text())
  accelerator.write_tables(copy, tmp_path)
  lines = copy.read_text().splitlines()
  assert (
    "| words | tokens | GB, naive | GB, kept | s, naive | s, kept | s, PyTorch eager |" in lines
  )
  small, large = (
    "| 50 | 8 | 4 | 2 (0.50) | 2 | 1.5 (0.75) | 4 (2.00) |",
    "| 9,000 | 8 | 4 | 2 (0.50) |",
  )
  assert small in lines
  assert f"{large} – | – | – |" in lines
  assert "kept 0.016" in copy.read_text()
