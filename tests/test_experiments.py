"""The experiments as a user runs them, at a tiny setting; and what they leave behind."""

import csv
import dataclasses
import functools
import importlib
import json
import math
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import jsonschema
import numpy as np
import pytest

from jaxdistill import data, reports, runs

ROOT = pathlib.Path(__file__).parent.parent

DIGITS = ["--teachers", "2", "--seeds", "2", "--teacher-epochs", "2", "--epochs", "2"]
DIGITS += ["--teacher-channels", "4", "4", "--teacher-dense", "16", "--student-dense", "8"]
CIFAR = ["--teacher", "resnet14", "--student", "resnet8", "--seeds", "2", "--epochs", "1"]
CIFAR += ["--teacher-epochs", "1", "--fraction", "1", "--batch-size", "50", "--hint-weight", "0.1"]
FEW = ["--shares", "0", "0.02", "1", "--seeds", "2", "--teacher-epochs", "2", "--epochs", "2"]
FEW += ["--teacher-channels", "4", "4", "--teacher-dense", "16"]
FEW += ["--student-channels", "2", "2", "--student-dense", "8"]
COARSE = ["--short", "--teacher", "convnet-4", "--student", "convnet-2", "--seeds", "2"]
COARSE += ["--teacher-epochs", "1", "--epochs", "1", "--fraction", "20", "--batch-size", "32"]
# Without validation, and seeds side by side: less to compile.
COARSE += ["--published", "--seeds-by", "vmap"]


TEMPERATURE = ["--temperatures", "1", "4", "--soft-weights", "0.5", "--seeds", "2", "--epochs", "1"]
TEMPERATURE += ["--teacher-epochs", "1"]


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


@pytest.mark.slow
def test_a_run_leaves_what_was_promised(digits):
  folder, _ = digits
  files = {"report.json", "report.md", "report.html", "predictions.npz", "accuracy.png"}
  assert {"config.json", *files} <= set(os.listdir(folder))
  for part in ("teacher", "baseline", "student"):
    assert {"config.json", "metrics.jsonl", "checkpoints"} <= set(os.listdir(folder / part))
  assert "_CHECK" not in os.listdir(folder)
  text = (folder / "report.md").read_text()
  assert "| accuracy, %" in text
  assert "python experiments/digits.py --evaluate" in text
  assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_report_satisfies_its_schema(digits):
  found = read(digits[0])
  schema = reports.report_schema()
  jsonschema.Draft202012Validator.check_schema(schema)
  jsonschema.validate(found, schema)
  assert found["examples"] == 697
  assert found["seeds"] == [0, 1]
  # One ensemble has no spread; saying 0 would be saying that it was measured.
  assert "std" not in found["models"]["teacher"]["accuracy"]
  assert found["models"]["student"]["accuracy"]["std"] > 0
  student, teacher = found["models"]["student"], found["models"]["teacher"]
  assert student["parameters"] < teacher["parameters"]
  broken = {**found, "models": {}}
  with pytest.raises(jsonschema.ValidationError):
    jsonschema.validate(broken, schema)


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_that_is_started_again_goes_on(digits, capsys):
  folder, data_dir = digits
  before = (folder / "student" / "metrics.jsonl").read_text()
  run("digits", [*DIGITS, "--out", folder, "--data-dir", data_dir])
  assert (folder / "student" / "metrics.jsonl").read_text() == before
  assert "Report: " in capsys.readouterr().out


@pytest.mark.slow
def test_another_configuration_in_the_same_folder_is_refused(digits):
  folder, data_dir = digits
  with pytest.raises(ValueError, match="temperature: .* there, 9"):
    run("digits", [*DIGITS, "--temperature", "9", "--out", folder, "--data-dir", data_dir])


@pytest.mark.slow
def test_cifar100_trains_and_reports(tfds_dir, tmp_path, monkeypatch):
  script, load = importlib.import_module("cifar100"), data.load
  # A hundredth of what is evaluated: the residual networks are slow on a test machine.
  fewer = {"test": "test[:1%]", "train[90%:]": "train[99%:]"}
  monkeypatch.setattr(
    script.data, "load", lambda name, split, **rest: load(name, fewer.get(split, split), **rest)
  )
  run("cifar100", [*CIFAR, "--out", tmp_path, "--data-dir", tfds_dir])
  found = read(tmp_path)
  jsonschema.validate(found, reports.report_schema())
  assert found["examples"] == 100
  assert found["models"]["student"]["parameters"] == 83_892
  assert found["models"]["teacher"]["parameters"] == 181_108


@pytest.mark.slow
def test_fine_classes_teach_coarse_ones(tfds_dir, tmp_path, monkeypatch):
  script, records = importlib.import_module("cifar100_coarse"), data.records
  fewer = {"train": "train[:3%]", "test": "test[:1%]"}
  monkeypatch.setattr(
    script.data, "records", lambda name, split, **rest: records(name, fewer[split], **rest)
  )
  quick = functools.partial(script.evaluation.costs, seconds=0.1)
  monkeypatch.setattr(script.evaluation, "costs", quick)
  run("cifar100_coarse", [*COARSE, "--out", tmp_path, "--data-dir", tfds_dir])
  found = read(tmp_path)
  jsonschema.validate(found, reports.report_schema())
  assert found["examples"] == 100
  groups = read(tmp_path, "coarse_of_fine.json")
  assert np.bincount(groups).tolist() == [5] * 20
  assert groups[:3] == [4, 1, 14]  # apple, aquarium fish, baby: fruit and vegetables, fish, people
  assert "python experiments/cifar100_coarse.py" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_few_labels_fills_its_table(digits, tmp_path):
  run("few_labels", [*FEW, "--out", tmp_path, "--data-dir", digits[1]])
  with (tmp_path / "few_labels.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert [row["labels"] for row in rows] == ["0", "20", "990"]
  assert [row["alone_mean"] == "" for row in rows] == [True, False, False]
  assert all(float(row["distilled_std"]) >= 0 for row in rows)
  assert (tmp_path / "few_labels.png").read_bytes().startswith(b"\x89PNG")
  text = (tmp_path / "few_labels.md").read_text()
  assert "| 2 % | 20 |" in text
  assert "python experiments/few_labels.py --evaluate" in text
  # Both kinds took the same number of steps.
  steps = [read(tmp_path / name, "config.json")["steps"] for name in ("labels", "distilled")]
  assert steps == [30, 30]


SHAKESPEARE = ["--short", "--length", "16", "--few", "2000", "--characters", "6000"]
SHAKESPEARE += ["--teacher-steps", "20", "--steps", "20", "--teacher-layers", "1"]


@pytest.mark.slow
def test_shakespeare_fills_its_table(tfds_dir, tmp_path):
  if not (tfds_dir / "tiny_shakespeare").is_dir():
    pytest.skip("no tiny_shakespeare beside CIFAR-100")
  run("shakespeare", [*SHAKESPEARE, "--out", tmp_path, "--data-dir", tfds_dir])
  with (tmp_path / "shakespeare.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert [(row["text"], row["name"]) for row in rows] == [
    ("full", "teacher"),
    *(("few", name) for name in ("labels", "seconds", "taught", "distilled")),
    *(("full", name) for name in ("labels", "seconds", "distilled")),
  ]
  by = {(row["text"], row["name"]): row for row in rows}
  assert all(1 < float(row["bits"]) < 8 for row in rows)
  few = by["few", "labels"]
  assert float(few["gain"]) == pytest.approx(
    float(few["bits"]) - float(by["few", "distilled"]["bits"]), abs=1e-6
  )
  # What was measured decides how long students without a teacher train at equal seconds.
  found = read(tmp_path, "few-seconds.json")
  took = found["seconds"]
  there = took["distilled"] + took["answers"]
  assert all(0 < one < 600 for one in took.values())
  for name, seconds in (("seconds", there), ("taught", there + took["teacher"])):
    steps = max(1, round(20 * seconds / took["labels"]))
    assert int(by["few", name]["steps"]) == found["steps"][name] == steps
  assert float(few["seconds"]) == pytest.approx(took["labels"])
  # Started again it keeps those steps, by whatever clock, and finds all runs finished.
  before = (tmp_path / "shakespeare.csv").read_text()
  took["labels"] *= 3
  (tmp_path / "few-seconds.json").write_text(json.dumps(found))
  run("shakespeare", [*SHAKESPEARE, "--out", tmp_path, "--data-dir", tfds_dir])
  assert (tmp_path / "shakespeare.csv").read_text() == before
  assert "python experiments/shakespeare.py --evaluate" in (tmp_path / "shakespeare.md").read_text()
  for part in ("few", "full"):
    report, texts = read(tmp_path / part), read(tmp_path / part, "texts.json")
    bits = report["models"]["student"]["bits_per_byte"]["mean"]
    assert bits == pytest.approx(float(by[part, "distilled"]["bits"]), abs=1e-6)
    assert {len(one["said"]) for one in texts["texts"]} == {3}
    assert "Sample texts" in (tmp_path / part / "report.html").read_text()


@pytest.mark.slow
def test_shakespeare_reads_any_text_by_an_encoding_of_its_own(tmp_path):
  pytest.importorskip("tokenizers")
  words = np.random.default_rng(0).choice(["to", "be", "or", "not", "naïve"], 20_000)
  (tmp_path / "text.txt").write_text(" ".join(words), encoding="utf-8")
  given = ["--text", tmp_path / "text.txt", "--vocabulary", "270", "--tokens-at-once", "64"]
  given += ["--dtype", "bfloat16", *SHAKESPEARE, "--characters", "6000"]
  given += ["--out", tmp_path / "run"]
  run("shakespeare", given)
  with (tmp_path / "run" / "shakespeare.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == 8
  assert all(0 < float(row["bits"]) < 8 for row in rows)
  assert all(float(row["text_error"]) > 0 for row in rows if row.get("gain"))
  assert f"--text {tmp_path}" in (tmp_path / "run" / "shakespeare.md").read_text()


@pytest.mark.slow
def test_data_free_fills_its_table_and_goes_on(tmp_path):
  given = ["--seeds", "2", "--teacher-epochs", "1", "--steps", "2", "--epochs", "1"]
  given += ["--teacher-channels", "4", "4", "--teacher-dense", "16", "--student-channels", "2", "2"]
  given += ["--student-dense", "8", "--generator-width", "4", "--out", tmp_path]
  run("data_free", given)
  with (tmp_path / "data_free.csv").open() as file:
    first = list(csv.DictReader(file))
  assert [row["name"] for row in first] == ["teacher", "labels", "noise", "data-free"]
  run("data_free", given)  # finished runs are given back as they are
  with (tmp_path / "data_free.csv").open() as file:
    assert list(csv.DictReader(file)) == first


def test_few_labels_uses_no_other_label():
  script = importlib.import_module("few_labels")
  labels = np.arange(40) % 4 + 1
  examples = data.from_arrays(np.arange(40.0, dtype=np.float32)[:, None], labels)
  source = data.on_device(examples, batch_size=20, data_seed=0)
  mask = np.isin(np.arange(40), [3, 8, 21])

  def batch(made):
    return made.cut(made.shared, jax.tree.map(lambda leaf: leaf[0], made.items(0, 1)))

  alone = script.labelled_alone(source, mask)
  assert alone.shared is source.shared
  shown = batch(alone)
  assert set(np.asarray(shown.index).tolist()) == {3, 8, 21}
  np.testing.assert_array_equal(shown.labels, labels[shown.index])


@pytest.mark.parametrize("name", ["cifar100", "cifar100_coarse"])
def test_short_starts_from_the_short_setting(name):
  script = importlib.import_module(name)
  config, _ = script.parse(["--short", "--epochs", "1"])
  assert (config.epochs, config.fraction) == (1, script.SHORT.fraction)
  assert script.parse([])[0] == script.Config()


def test_a_wrong_network_claims_no_folder(tfds_dir, tmp_path):
  with pytest.raises(SystemExit, match="'resnet57' is no CIFAR network.*resnet56"):
    run("cifar100", ["--short", "--teacher", "resnet57", "--out", tmp_path, "--data-dir", tfds_dir])
  assert not list(tmp_path.iterdir())


EXPERIMENTS = sorted(
  path.stem for path in (ROOT / "experiments").glob("*.py") if path.stem != "command_line"
)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_help_has_the_options_under_what_they_are_for(name, capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "100")
  script = importlib.import_module(name)
  with pytest.raises(SystemExit) as stopped:
    script.parse(["--help"])
  assert stopped.value.code == 0
  shown = capsys.readouterr().out
  # Each group is a title between rules, the dataclass's docstring, and its options.
  title = re.compile(r"^\W*(\w+) options\W*$", re.MULTILINE)
  titles, parts = title.findall(shown), title.split(shown)[2::2]
  assert not any(title.isdigit() for title in titles), titles
  kinds = (script.Config, script.Options, sys.modules["command_line"].Processes)
  for part, kind in zip(parts, kinds, strict=True):
    assert kind.__doc__.split(";")[0] in " ".join(part.split())
    for field in dataclasses.fields(kind):
      assert f"--{field.name.replace('_', '-')}" in part
  assert script.__doc__.partition("\n")[0] in " ".join(shown.split())


@pytest.mark.parametrize("name", ["compress", "methods", "temperature"])
def test_a_sweep_of_several_processes_is_refused_before_any_work(name, tmp_path):
  with pytest.raises(SystemExit, match="sweeps over many students.*start it in one"):
    run(name, ["--distributed", "--out", tmp_path / "run"])
  assert not (tmp_path / "run").exists()


def test_processes_that_do_not_go_together_are_refused_before_any_work():
  with pytest.raises(SystemExit, match="--distributed: process=2 must be below processes=2"):
    importlib.import_module("digits").parse(
      ["--coordinator", "localhost:1", "--processes", "2", "--process", "2"]
    )


@pytest.mark.slow
def test_two_processes_that_slurm_started_write_one_report(tmp_path):
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  said = {"SLURM_JOB_ID": 7, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": 2}
  said |= {"SLURM_LOCALID": 0, "JAX_COORDINATOR_PORT": port, "JAX_PLATFORMS": "cpu"}
  said |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
  command = [sys.executable, str(ROOT / "experiments" / "digits.py"), "--distributed", *DIGITS]
  command += ["--out", str(tmp_path / "run")]
  children = [
    subprocess.Popen(
      command,
      env={**os.environ, **{n: str(v) for n, v in said.items()}, "SLURM_PROCID": str(process)},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for process in (0, 1)
  ]
  try:
    outputs = [child.communicate(timeout=300)[0] for child in children]
  finally:
    for child in children:
      child.kill()
  assert [child.returncode for child in children] == [0, 0], outputs
  assert ["Report: " in output for output in outputs] == [True, False]
  assert set(read(tmp_path / "run")["models"]) == {"teacher", "baseline", "student"}


def test_without_its_extra_an_experiment_says_so_before_any_work(monkeypatch):
  monkeypatch.setitem(sys.modules, "tyro", None)
  with pytest.raises(SystemExit, match=r"tyro.*jaxdistill\[experiments\]"):
    importlib.import_module("digits").parse([])


@pytest.mark.slow_but("digits")
@pytest.mark.parametrize("name", ["digits", "cifar100"])
def test_help_is_a_page_and_loads_no_data(name):
  command = [sys.executable, str(ROOT / "experiments" / f"{name}.py"), "--help"]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
  assert "--out" in done.stdout
  assert "--evaluate" in done.stdout


def test_evaluating_what_is_no_run_says_so(tmp_path):
  with pytest.raises(SystemExit, match="is not a run's folder"):
    run("digits", ["--evaluate", tmp_path])
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(SystemExit, match="is a run of another experiment"):
    run("digits", ["--evaluate", tmp_path])


def test_what_would_change_nothing_is_refused_beside_evaluate(tmp_path):
  script = importlib.import_module("digits")
  runs.write_json(tmp_path / "config.json", dataclasses.asdict(script.Config()))
  script.parse(["--evaluate", str(tmp_path), "--split", "validation"])
  with pytest.raises(SystemExit, match="--epochs, --dispatch would change nothing"):
    script.parse(["--evaluate", str(tmp_path), "--epochs", "3", "--dispatch", "pmap"])
  runs.write_json(tmp_path / "config.json", dataclasses.asdict(script.Config()) | {"seeds": 0})
  with pytest.raises(SystemExit, match="--seeds=0 must be"):
    script.parse(["--evaluate", str(tmp_path)])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_numbers_have_a_range_in_every_experiment(name):
  script = importlib.import_module(name)
  command_line = sys.modules["command_line"]
  settings = [one for one in vars(script).values() if isinstance(one, script.Config)]
  for given in (script.Config(), script.Options(), *settings):
    command_line.check(given)
    for field in dataclasses.fields(given):
      value = getattr(given, field.name)
      one = value[0] if isinstance(value, tuple) and value else value
      bad = [math.nan, math.inf, -0.5] if isinstance(one, float) else [-1, 10**12]
      if isinstance(one, bool) or not isinstance(one, int | float):
        continue
      for number in bad:
        other = (number,) if isinstance(value, tuple) else number
        with pytest.raises(ValueError, match=f"--{field.name.replace('_', '-')}"):
          command_line.check(dataclasses.replace(given, **{field.name: other}))


@pytest.mark.parametrize(
  ("name", "words", "said"),
  [
    ("digits", ["--rate", "0"], "--rate must be positive"),
    ("digits", ["--epochs", "0"], "--epochs=0 must be in 1"),
    ("digits", ["--student-channels"], "--student-channels has no value"),
    ("digits", ["--out", __file__], "is a file; name a folder"),
    ("digits", ["--out", f"{__file__}/run"], "is a file; name a folder"),
    ("digits", ["--data-dir", __file__], "is a file; name a folder"),
    ("digits", ["--out", "gs://bucket/run"], "is an address"),
    ("digits", ["--stop-after", "nan"], "--stop-after must be positive"),
    ("few_labels", ["--shares", "0.1", "2"], "--shares must be in"),
    ("shakespeare", ["--text", "gone.txt"], "gone.txt is no file"),
    ("shakespeare", ["--short", "--large"], "say one of them"),
    ("imagenet", ["--cache-part", "4/3"], "--cache-part 4/3"),
    ("compress", ["--fraction", "50"], "digits: --fraction would change nothing"),
    ("compress", ["--short", "--teacher-shift", "2"], "cifar100: --teacher-shift would change"),
    ("methods", ["--dataset", "cifar100", "--teacher-shift", "2"], "--teacher-shift would change"),
  ],
)
def test_a_wrong_flag_is_said_in_a_line_before_anything_is_read(name, words, said):
  with pytest.raises(SystemExit, match=re.escape(said)):
    importlib.import_module(name).parse(words)


def test_a_network_that_does_not_fit_is_refused_before_the_first_is_trained(tmp_path):
  for words, said in (
    (["--student-channels", "8"], "strides"),
    (["--batch-size", "100000"], "--batch-size=100000 must be in"),
  ):
    with pytest.raises(ValueError, match=said):
      run("digits", [*words, "--out", tmp_path / "run", "--data-dir", tmp_path / "tfds"])
    assert not (tmp_path / "run").exists()


def test_a_script_says_what_the_library_refuses_in_a_line(monkeypatch):
  importlib.import_module("digits")
  command_line = sys.modules["command_line"]

  def refused(config, options):
    runs.read_config("gone")

  def broken(config, options):
    raise ValueError("of the script")

  with pytest.raises(SystemExit, match="FileNotFoundError: 'gone' is not a run's folder"):
    command_line.run(refused, lambda words: (None, None))
  with pytest.raises(ValueError, match="of the script"):
    command_line.run(broken, lambda words: (None, None))


@pytest.mark.slow
def test_temperatures_are_swept_and_one_is_chosen(tmp_path, capsys):
  run("temperature", [*TEMPERATURE, "--out", tmp_path / "t", "--data-dir", tmp_path])
  assert "Labels alone: " in capsys.readouterr().out
  chosen = read(tmp_path / "t" / "sweep", "chosen.json")
  assert chosen["values"]["temperature"] in (1, 4)
  assert len(chosen["test"]["accuracy"]) == 2
  files = set(os.listdir(tmp_path / "t" / "sweep"))
  assert {"table.md", "table.csv", "sweep.png"} <= files


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::jaxdistill.search.PreflightWarning")
def test_a_student_is_chosen_exported_and_reported_within_a_budget(tmp_path, capsys):
  few = ["--epochs", "2", "--teacher-epochs", "2", "--search-seeds", "1", "--seeds", "2"]
  few += ["--temperatures", "4", "--soft-weights", "0.9", "--rungs", "1", "--max-bytes", "6000"]
  run("compress", [*few, "--out", tmp_path / "c", "--data-dir", tmp_path])
  told = read(tmp_path / "c", "budget.json")
  assert told["inside"] is True
  assert told["costs"]["bytes"] <= 6000
  assert {"frontier.png", "frontier-bytes.png", "report.html"} <= set(os.listdir(tmp_path / "c"))
  listed = read(tmp_path / "c" / "exports", "exports.json")
  assert all(file["passed"] for file in listed["files"])
  assert "Budget met: bytes at most 6,000" in (tmp_path / "c" / "report.html").read_text()
  assert "NOT" not in capsys.readouterr().out


def some_files(folder):
  """Files of a few kinds, written here: so many that a batch of them is left over."""
  for number in range(24):
    code = "".join(f"def f{number}_{i}(x):\n  return x + {i}\n" for i in range(9 + number))
    (folder / f"{number}.py").write_text(code)
    rows = [{"number": number + i, "name": "one"} for i in range(40)]
    (folder / f"{number}.json").write_text(json.dumps(rows, indent=2))
    (folder / f"{number}.css").write_text(f"body {{ margin: {number}px; }}\n" * 30)
    (folder / f"{number}.unknown").write_bytes(np.random.default_rng(number).bytes(3000))
  return folder


def test_a_file_is_looked_at_as_magika_does(tmp_path):
  magika = pytest.importorskip("magika")
  script = importlib.import_module("file_types")
  contents = {
    "short": b" \n a few words, and no more than these \n",
    "long": bytes(range(256)) * 40,
  }
  for name, content in contents.items():
    path = tmp_path / name
    path.write_bytes(content)
    with path.open("rb") as file:
      seekable = importlib.import_module("magika.types").Seekable(file)
      theirs = magika.Magika._extract_features_from_seekable(
        seekable, 1024, 0, 1024, 256, 4096, False
      )
    np.testing.assert_array_equal(script.look_at(path), [*theirs.beg, *theirs.end])


@pytest.mark.slow
def test_a_network_out_of_a_package_teaches_a_small_one(tmp_path):
  pytest.importorskip("magika")
  files = tmp_path / "files"
  files.mkdir()
  given = ["--short", "--each", "20", "--roots", some_files(files), "--out", tmp_path / "run"]
  run("file_types", given)
  found = read(tmp_path / "run")
  jsonschema.validate(found, reports.report_schema())
  assert found["examples"] == 20  # a quarter of four endings' twenty
  assert "parameters" not in found["models"]["teacher"]
  assert found["models"]["student"]["parameters"] < 79_000
  # Four endings, of which one tells no kind.
  assert 0 < found["models"]["teacher"]["accuracy"]["mean"] <= 1
  assert "python experiments/file_types.py" in (tmp_path / "run" / "report.md").read_text()


def test_compress_takes_the_budget_that_is_given():
  script = importlib.import_module("compress")
  given, _ = script.parse(["--max-bytes", "5"])
  assert script.within(given).limits() == {"bytes": 5}
  assert script.within(script.parse([])[0]).limits() == {"latency_ms": 0.75}
  short, _ = script.parse(["--short", "--max-bytes", "150000"])
  assert (short.dataset, short.epochs, short.max_bytes) == ("cifar100", 3, 150000)
  assert all(name.startswith("depth 8") for name in script.build_networks(short)[1])
