"""Reports: what the page shows, that it needs nothing else, and what it says of broken inputs."""

import base64
import dataclasses
import hashlib
import html
import html.parser
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import jax.numpy as jnp
import jsonschema
import numpy as np
import optax
import pytest
import scipy.stats

import fabricated
import small_networks
from jaxdistill import data, evaluation, recipes, reports, teachers, train
from jaxdistill.evaluation import predictions
from jaxdistill.evaluation.predictions import Column
from jaxdistill.reports import command
from jaxdistill.reports._format import escaped
from jaxdistill.reports._pages import analysis, decision, document, evidence
from jaxdistill.reports._pages import page as report_page
from jaxdistill.types import Model, Network, Outputs

HOSTILE = "<script>alert('1')</script> & \"quotes\" | pipes"
VOID = {"meta", "img", "br", "link"}


class Page(html.parser.HTMLParser):
  """A page as a browser takes it: its text, sections, pictures, and all that it refers to."""

  def __init__(self, path):
    super().__init__()
    self.open, self.sections, self.pictures, self.charts, self.links = [], [], [], [], []
    self.words, self.tags = [], set()
    self.source = path.read_text(encoding="utf-8")
    self.feed(self.source)
    assert not self.open, f"{self.open} are not closed"
    self.text = " ".join("".join(self.words).split())

  def handle_starttag(self, tag, attributes):
    given = dict(attributes)
    self.tags.add(tag)
    if tag == "section":
      self.sections.append(given["id"])
    if tag == "img":
      self.pictures.append(given)
    if tag == "svg":
      self.charts.append(given["aria-label"])
    assert not any(name.startswith("on") or name == "style" for name in given)
    self.links += [v for n, v in given.items() if n in ("src", "href", "srcset", "action", "data")]
    if tag not in VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, words):
    # A browser moves words that stand between cells to above the table.
    stray = self.open and self.open[-1] in ("table", "thead", "tbody", "tr", "dl", "ul", "ol")
    assert not (stray and words.strip()), f"{words!r} stands in {self.open[-1]}"
    if self.open and self.open[-1] not in ("style", "script", "title"):
      self.words.append(words)
    if self.open and self.open[-1] in ("td", "th", "li", "p", "dd", "dt", "text"):
      self.words.append(" ")


def page_of(found, derived):
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "report.html"
    path.write_text(report_page.build(found, derived), encoding="utf-8")
    return Page(path)


def page(folder, name="report.html"):
  return Page(folder / name)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A run with everything: metadata, pictures, exports, checks, a budget."""
  random = np.random.default_rng(0)
  found = fabricated.gathered(
    columns={"font": Column(np.arange(400, dtype=np.int32) % 3, ("serif", "sans", "mono", "none"))},
    shown={i: random.integers(0, 17, (8, 8)).astype(np.uint8) for i in range(400)},
    label_names=("cat", "dog", "cow", "emu"),
  )
  folder = fabricated.run(tmp_path_factory.mktemp("run") / "a", found, pages=False)
  fabricated.exported(folder)
  finding = {"check": "capacity_gap", "message": "The teacher is large.", "fix": "Take another."}
  (folder / "preflight.json").write_text(json.dumps([finding]))
  (folder / "budget.json").write_text(json.dumps({"budget": {"parameters": 200, "flops": None}}))
  reports.render_report(folder)
  return folder


def copied(made, tmp_path):
  return pathlib.Path(shutil.copytree(made, tmp_path / "copy"))


def test_a_page_has_all_that_was_promised(made):
  shown = page(made)
  assert shown.sections == [
    "cost", "gap", "paired", "calibration", "classes", "confusions", "lost", "gained", "slices",
    "training", "exports", "preflight", "repeat",
  ]  # fmt: skip
  numbers = json.loads((made / "report.json").read_text())
  assert numbers["verdict"] in shown.text
  assert "Ship it with care." in shown.text
  assert "Pre-flight check: The teacher is large. Take another." in shown.text
  assert "Budget met: parameters at most 200 (it has 100)." in shown.text
  assert "closes" in shown.text
  assert "10 times fewer parameters" in shown.text
  for label in ("Accuracy against size", "Accuracy against latency", "Accuracy by class"):
    assert label in shown.charts
  for name in ("teacher", "labels alone", "student"):
    assert f"Reliability of the {name}" in shown.charts
  for name in ("loss", "soft", "validation/accuracy"):
    assert f"{name} during training" in shown.charts
  assert "onnxruntime 1.22" in shown.text
  assert "0.031" in shown.text  # the latency in the file's own runtime
  assert "python train.py --out runs/a" in shown.text
  assert "serif" in shown.text
  gone = analysis.lost(predictions.load(made / "predictions.npz"))
  assert len(shown.pictures) == len(gone.rows) + len(gone.gained) > len(gone.rows) > 24
  assert f"example {gone.rows[0]}" in shown.pictures[0]["alt"]
  assert len(shown.source.encode()) < 1_000_000


def digest(text):
  return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def test_a_page_fetches_nothing_and_runs_its_own_script_alone(made):
  shown = page(made)
  assert all(link.startswith(("data:image/png;base64,", "#")) for link in shown.links)
  assert not shown.tags & {"link", "iframe", "object", "embed", "base", "form", "use"}
  (style,) = re.findall("<style>(.*?)</style>", shown.source, re.S)
  (script,) = re.findall("<script>(.*?)</script>", shown.source, re.S)
  assert shown.source.count("<script") == shown.source.count("<style") == 1
  assert not re.search(r"url\(|@import|https?:", style + script)
  assert not re.search(r"fetch|XMLHttp|import|eval|innerHTML|WebSocket", script)
  # The policy knows this script and this style sheet by their digests, and nothing else.
  policy = html.unescape(re.search('Content-Security-Policy" content="(.*?)"', shown.source)[1])
  assert dict(part.split(" ", 1) for part in policy.split("; ")) == {
    "default-src": "'none'",
    "img-src": "data:",
    "style-src": f"'sha256-{digest(style)}'",
    "script-src": f"'sha256-{digest(script)}'",
    "base-uri": "'none'",
    "form-action": "'none'",
  }
  assert "prefers-color-scheme: dark" in style
  anchors = {link[1:] for link in shown.links if link.startswith("#")}
  assert anchors == set(shown.sections)


def test_numbers_satisfy_the_schema(made):
  numbers = json.loads((made / "report.json").read_text())
  schema = reports.report_schema()
  jsonschema.Draft202012Validator.check_schema(schema)
  jsonschema.validate(numbers, schema)
  assert len(numbers["classes"]) == 4
  assert [row["name"] for row in numbers["slices"]["font"]] == ["serif", "sans", "mono", "none"]
  assert numbers["decision"]["word"] == "Ship it with care"
  text = (made / "report.md").read_text()
  assert "**Ship it with care.**" in text
  assert "## By font" in text
  with pytest.raises(jsonschema.ValidationError):
    jsonschema.validate({**numbers, "decision": {"word": "Maybe"}}, schema)


@pytest.mark.slow
def test_the_folder_alone_gives_the_same_page(made):
  before = [(made / name).read_bytes() for name in ("report.html", "report.json", "report.md")]
  command = [sys.executable, "-m", "jaxdistill", "report", str(made)]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  assert "Distillation helps" in done.stdout
  assert "Slices of 'font' without an example: none." in done.stderr
  after = [(made / name).read_bytes() for name in ("report.html", "report.json", "report.md")]
  assert after == before


@pytest.mark.slow
def test_a_column_is_added_to_a_finished_run(made, tmp_path, capsys):
  folder = copied(made, tmp_path)
  rows = [f"{'ab'[i % 2]},{i / 7}," for i in range(400)]
  (tmp_path / "more.csv").write_text("\n".join(["scanner,length,note", *rows]))
  assert command.main([str(folder), "--metadata", str(tmp_path / "more.csv")]) == 0
  numbers = json.loads((folder / "report.json").read_text())
  assert list(numbers["slices"]) == ["font", "scanner", "length", "note"]
  assert [row["examples"] for row in numbers["slices"]["scanner"]] == [200, 200]
  assert [row["examples"] for row in numbers["slices"]["length"]] == [100] * 4
  assert [row["name"] for row in numbers["slices"]["note"]] == ["missing"]
  found = predictions.load(folder / "predictions.npz")
  mean = found.correct("student")[:, ::2].mean()
  assert numbers["slices"]["scanner"][0]["accuracy"]["student"]["mean"] == pytest.approx(mean)
  assert "By scanner: accuracy" in page(folder).text
  before = (folder / "predictions.npz").read_bytes()
  capsys.readouterr()
  for text, message in (
    ("scanner\na\nb", "must have one value for each of the 400"),
    ("a,b\n1,2\n3", "row 2 has 1 cells for 2"),
    ("", "a line of names"),
  ):
    (tmp_path / "less.csv").write_text(text)
    assert command.main([str(folder), "--metadata", str(tmp_path / "less.csv")]) == 1
    assert message in capsys.readouterr().err
  assert (folder / "predictions.npz").read_bytes() == before
  (folder / "predictions.npz").unlink()
  with pytest.raises(ValueError, match="no answers on each example that could be sliced"):
    reports.render_report(folder, metadata={"a": range(400)})


def test_hostile_names_are_text(tmp_path):
  found = fabricated.gathered(
    60,
    dataset=HOSTILE,
    label_names=(HOSTILE, "\x00\ud800", "cow", "emu"),
    columns={HOSTILE: Column(np.arange(60, dtype=np.int32) % 2, (HOSTILE, "b"))},
    shown=dict.fromkeys(range(60), HOSTILE),
  )
  described = dataclasses.replace(fabricated.measured(found, "student"), description=HOSTILE)
  folder = fabricated.run(tmp_path / "run", found, pages=False, student=described)
  (folder / "config.json").write_text(json.dumps({HOSTILE: HOSTILE}))
  fabricated.exported(folder, passed=False, problem=HOSTILE, file=f"{HOSTILE}.onnx")
  reports.render_report(folder)
  shown = page(folder)
  assert shown.source.count("<script") == 1
  assert shown.text.count(HOSTILE) >= 6
  text = (folder / "report.md").read_text()
  # A pipe would end a cell, and what is not escaped is HTML.
  rows = [line for line in text.splitlines() if line[:1] == "|"]
  assert any(r"\| pipes" in row for row in rows)
  assert r"\<script>" in text
  assert not re.search(r"(?<!\\)<", text)


def older(folder):
  numbers = json.loads((folder / "report.json").read_text())
  added = ("version", "predictions", *evidence._DERIVED)
  (folder / "report.json").write_text(
    json.dumps({name: value for name, value in numbers.items() if name not in added})
  )
  (folder / "predictions.npz").unlink()


def edited(folder, change, name="report.json"):
  numbers = json.loads((folder / name).read_text())
  change(numbers)
  (folder / name).write_text(json.dumps(numbers))


def appended(path, text):
  path.write_text(path.read_text() + text)


def exports_edited(folder, **changed):
  edited(folder, lambda n: n.update(changed), "exports/exports.json")


BROKEN = {
  "a run from an older version": (older, "made by an older version"),
  "a run from a newer version": (
    lambda f: edited(f, lambda n: n.update(version=9)),
    "made by a newer version of jaxdistill (format 9",
  ),
  "a torn report": (
    lambda f: (f / "report.json").write_text('{"version": 2, "mod'),
    "numbers (report.json) cannot be read",
  ),
  "a report that is none": (
    lambda f: (f / "report.json").write_text("[1, 2]"),
    "report.json is no report",
  ),
  "no report": (lambda f: (f / "report.json").unlink(), "report.json is missing"),
  "models that are none": (
    lambda f: edited(f, lambda n: n.update(models={"student": 3})),
    "report.json is no report",
  ),
  "a model without numbers": (
    lambda f: edited(f, lambda n: n["models"].update(teacher={"accuracy": "high"})),
    "report.json: models.teacher.accuracy should be a mapping, and is 'high'.",
  ),
  "numbers of another kind": (
    lambda f: edited(f, lambda n: n.update(seeds=3, gain=[1], fidelity={"kl": 2}, examples="x")),
    "report.json: seeds should be a list, and is 3.",
  ),
  "a latency that is null": (
    lambda f: edited(f, lambda n: n["models"]["student"]["latency_ms"].update(median=None)),
    "models.student.latency_ms.median should be a number, and is None.",
  ),
  "a latency without its percentile": (
    lambda f: edited(f, lambda n: n["models"]["teacher"]["latency_ms"].pop("p95")),
    "report.json: models.teacher.latency_ms lacks p95.",
  ),
  "examples that are null": (
    lambda f: edited(f, lambda n: n.update(examples=None)),
    "report.json: examples should be a whole number, and is None.",
  ),
  "a gain in words": (
    lambda f: edited(f, lambda n: n["gain"].update(mean="much")),
    "report.json: gain.mean should be a number, and is 'much'.",
  ),
  "an interval with one end": (
    lambda f: edited(f, lambda n: n["gap_closed"].update(high=None)),
    "report.json: gap_closed.high should be a number, and is None.",
  ),
  "instances in words": (
    lambda f: edited(f, lambda n: n["models"]["student"].update(instances="three")),
    "models.student.instances should be a whole number, and is 'three'.",
  ),
  "no size": (
    lambda f: edited(f, lambda n: n["models"]["teacher"].update(parameters=None)),
    "Whether it is smaller than the teacher is unknown.",
  ),
  "an export of another kind": (
    lambda f: fabricated.exported(f, latency_ms="fast"),
    "exports.json: files.0.latency_ms should be a mapping or null, and is 'fast'.",
  ),
  "NaN in the report": (
    lambda f: edited(f, lambda n: n["models"]["student"]["nll"].update(mean=float("nan"))),
    "student's negative log-likelihood is not a finite number",
  ),
  "damaged answers": (
    lambda f: (f / "predictions.npz").write_bytes((f / "predictions.npz").read_bytes()[:-99]),
    "answers on each example cannot be read",
  ),
  "no answers": (lambda f: (f / "predictions.npz").unlink(), "no answers on each example"),
  "answers of another measurement": (
    lambda f: predictions.save(f / "predictions.npz", fabricated.gathered(seed=9)),
    "they are of different measurements",
  ),
  "no logs": (
    lambda f: (f / "student" / "metrics.jsonl").unlink(),
    "student/metrics.jsonl is missing",
  ),
  "a torn log": (
    lambda f: appended(f / "student" / "metrics.jsonl", '{"step": 41, "lo'),
    "1 line of student/metrics.jsonl could not be read",
  ),
  "NaN in the log": (
    lambda f: (f / "baseline" / "metrics.jsonl").write_text(
      '{"step": 1, "loss": [1.0, 2.0]}\n{"step": 2, "loss": [NaN, null]}\n'
    ),
    "baseline's loss is not a finite number in 1 of 2 lines of its log, first at step 2",
  ),
  "a torn configuration": (
    lambda f: (f / "config.json").write_text("{"),
    "The configuration of copy (config.json) cannot be read",
  ),
  "an exported file that is gone": (
    lambda f: (f / "exports" / "student.onnx").unlink(),
    "student.onnx is missing",
  ),
  "an exported file of another size": (
    lambda f: (f / "exports" / "student.onnx").write_bytes(b"other"),
    "student.onnx has 5 bytes, 4 were written",
  ),
  "another exported file": (
    lambda f: fabricated.exported(f, sha256="0" * 64),
    "its SHA-256 differs",
  ),
  "exports that are a folder": (
    lambda f: fabricated.exported(f, file="."),
    "lies outside of the folder exports",
  ),
  "an exported file from elsewhere": (
    lambda f: fabricated.exported(f, file="../config.json"),
    "lies outside of the folder exports",
  ),
  "exports of an unknown version": (
    lambda f: exports_edited(f, version=7),
    "exports.json is of version 7",
  ),
  "torn exports": (
    lambda f: (f / "exports" / "exports.json").write_text("{"),
    "list of exported files (exports.json) cannot be read",
  ),
  "exports that list nothing": (lambda f: exports_edited(f, files=3), "files should be a list"),
  "an export that is none": (
    lambda f: exports_edited(f, files=[3]),
    "exports.json: files.0 should be a mapping, and is 3.",
  ),
  "a failed export": (
    lambda f: fabricated.exported(f, passed=False, problem="logits differ by 0.3"),
    "Exports that failed: student.onnx (logits differ by 0.3)",
  ),
  "findings that are none": (
    lambda f: (f / "preflight.json").write_text("{}"),
    "preflight.json is no list",
  ),
  "a budget that is none": (lambda f: (f / "budget.json").write_text("[]"), "is no mapping"),
}


@pytest.mark.slow_but("a torn report", "NaN in the report", "damaged answers", "no logs")
@pytest.mark.parametrize("name", BROKEN)
def test_broken_inputs_give_a_report_that_says_so(name, made, tmp_path):
  breaks, sentence = BROKEN[name]
  folder = copied(made, tmp_path)
  breaks(folder)
  before = (folder / "report.json").read_bytes() if (folder / "report.json").exists() else None
  reports.render_report(folder)
  shown = page(folder)
  assert sentence in shown.text
  text = (folder / "report.md").read_text()
  assert sentence in text
  assert "The report:" not in text  # what was left out is told once
  assert {"repeat", "training"} & set(shown.sections)
  # What could not be read, or is of another version, is nobody's to overwrite.
  if name.startswith(("a torn report", "a report that", "a run from", "numbers of", "models")):
    assert (folder / "report.json").read_bytes() == before
  if name in ("a torn report", "no report"):
    assert {"calibration", "classes", "lost"} <= set(shown.sections)


def leaves(value, path=()):
  inner = list(value.items()) if isinstance(value, dict) else []
  return [path] * bool(path) + [p for key, one in inner for p in leaves(one, (*path, key))]


@pytest.mark.slow
@pytest.mark.parametrize("junk", [None, "junk", -1, {"mean": []}], ids=repr)
def test_no_number_stops_the_words(made, junk):
  """Whatever stands anywhere: what the schema keeps gives a decision, the text and the page."""
  found = dataclasses.replace(evidence.read(made), predictions=None)
  measured = found.whole
  seen = {}
  for path in leaves({k: measured[k] for k in measured if k not in ("version", "environment")}):
    numbers = json.loads(json.dumps(measured))
    place = numbers
    for key in path[:-1]:
      place = place[key]
    place[path[-1]] = junk
    kept, wrong = document.sound_report(numbers, "report.json")
    if kept is None:  # evidence.read makes a report of the answers then
      assert path in (("models",), ("models", "student"))
      continue
    told = document.complete(kept)
    place = ".".join(path[:1] if path[0] == "gap_closed" else path)  # its ends are held together
    assert (place in " ".join(wrong)) == bool(wrong), (path, wrong)
    decided = decision.decide(dataclasses.replace(found, report=told))
    assert decided["word"], path
    text = reports.markdown({**numbers, "decision": decided})
    assert "How to repeat it" in text
    assert all(escaped(one.partition(": ")[2]) in text for one in wrong), path
    shown = {"decision": decided, "classes": [], "confusions": [], "slices": {}, "lost": None}
    shown |= {"parts": {}, "paired": []}
    # A page is slow to make; what is refused is left out, whatever it was, and models are alike.
    once = junk == {"mean": []} if wrong else True
    if once and path[:2] not in (("models", "teacher"), ("models", "baseline")):
      seen[json.dumps(told)] = told, shown
  for told, shown in seen.values():
    page_of(dataclasses.replace(found, report=told, curves={}), shown)


def test_without_a_baseline_the_gain_is_unknown(tmp_path):
  found = fabricated.gathered(baseline=None)
  numbers = fabricated.built(found)
  jsonschema.validate(numbers, reports.report_schema())
  folder = fabricated.run(tmp_path / "run", found)
  shown = page(folder)
  assert "What distillation gained is unknown: there is no baseline" in shown.text
  assert "Undecided." in shown.text
  assert "There is no baseline (the same network on labels alone)" in shown.text
  assert {"calibration", "classes", "lost"} <= set(shown.sections)
  jsonschema.validate(json.loads((folder / "report.json").read_text()), reports.report_schema())
  assert "undefined. There is no baseline" in (folder / "report.md").read_text()


@pytest.mark.slow
def test_accuracies_that_are_no_numbers_are_left_out_and_said(tmp_path):
  found = fabricated.gathered()
  student = fabricated.measured(found, "student")
  some = {**student.quality, "accuracy": np.array([0.93, np.nan, 0.92]), "nll": np.full(3, np.nan)}
  folder = fabricated.run(
    tmp_path / "some", found, student=dataclasses.replace(student, quality=some)
  )
  shown = page(folder)
  assert "The student's negative log-likelihood is not a finite number" in shown.text
  assert "Ship it with care." in shown.text
  numbers = json.loads((folder / "report.json").read_text())
  assert numbers["models"]["student"]["accuracy"]["mean"] == pytest.approx(0.925)
  assert numbers["models"]["student"]["per_seed"]["accuracy"][1] is None
  jsonschema.validate(numbers, reports.report_schema())
  none = {**student.quality, "accuracy": np.full(3, np.nan)}
  folder = fabricated.run(
    tmp_path / "none", found, student=dataclasses.replace(student, quality=none)
  )
  shown = page(folder)
  assert "Nothing is known of the student" in shown.text
  assert "Undecided." in shown.text
  wrong = {**student.quality, "accuracy": np.array([0.9, 93.0, 0.9])}
  changed = dataclasses.replace(student, quality=wrong)
  with pytest.raises(ValueError, match="a share of labelled examples"):
    fabricated.built(found, student=changed)


@pytest.mark.slow
def test_classes_that_never_appear_and_empty_slices_are_said(tmp_path):
  found = fabricated.gathered(
    40,
    classes=3,
    num_classes=5,
    label_names=("cat", "dog", "cow", "emu", "yak"),
    columns={"font": Column(np.zeros(40, np.int32), ("serif", "sans"))},
  )
  found.models["student"].predicted[found.models["student"].predicted == 2] = 0
  found.models["student"].predicted[0, :2] = -1
  shown = page(fabricated.run(tmp_path / "run", found))
  assert "2 of 5 classes never appear in this split" in shown.text
  assert "emu, yak" in shown.text
  assert "The student never predicts the classes cow, in any seed" in shown.text
  assert "Slices of 'font' without an example: sans" in shown.text
  assert "not numbers (NaN) on 1.7% of its answers" in shown.text


@pytest.mark.slow
def test_a_split_without_a_labelled_example_is_said(tmp_path):
  found = fabricated.gathered(8)
  folder = fabricated.run(tmp_path / "run", found, pages=False)
  predictions.save(folder / "predictions.npz", found.take(np.zeros(0, int)))
  reports.render_report(folder)
  assert "No example of the split has a label" in page(folder).text


def test_a_split_without_labels_has_agreement_and_no_accuracy(tmp_path):
  found = fabricated.gathered(8)
  parts = {name: fabricated.measured(found, name) for name in found.models}
  for name, part in parts.items():
    quality = {key: part.quality[key] for key in ("agreement", "kl") if name != "teacher"}
    parts[name] = dataclasses.replace(part, quality=quality, costs={})
  numbers = fabricated.built(found, **parts)
  jsonschema.validate(numbers, reports.report_schema())
  for name, one in numbers["models"].items():
    assert not {"accuracy", "nll", "ece", "top5", "brier", "per_seed"} & set(one)
    assert one["instances"] == (1 if name == "teacher" else 3)
  assert "gain" not in numbers
  assert set(numbers["gap_closed"]) == {"note"}
  assert numbers["fidelity"].keys() == {"agreement", "kl"}
  agreement = f"{100 * numbers['fidelity']['agreement']['mean']:.2f}"
  reports.write_report(tmp_path, numbers, predictions=found.take(np.zeros(0, int)))
  shown = page(tmp_path)
  assert f"not measured: no example has a label. It agrees with its teacher on {agreement}" in (
    shown.text
  )
  assert "Undecided. The student's accuracy is unknown." in shown.text
  assert "What teacher and student cost was not measured." in shown.text
  assert not {"calibration", "classes", "confusions", "lost", "gained"} & set(shown.sections)
  for text in (shown.text, (tmp_path / "report.md").read_text()):
    assert "Brier" not in text  # no row of dashes
    assert "where the teacher is wrong" not in text
    assert "KL to the teacher" in text
    assert "nan" not in text.lower()
  assert "null" not in (tmp_path / "report.json").read_text()


@pytest.mark.slow
def test_what_is_unknown_is_absent_and_null_is_no_finite_number(made, tmp_path):
  text = (made / "report.json").read_text()
  assert "null" not in text
  numbers = json.loads(text)
  assert "xla_flops" not in numbers["models"]["teacher"]
  assert "std" not in numbers["models"]["teacher"]["accuracy"]
  none = numbers["slices"]["font"][3]
  assert none == {"name": "none", "examples": 0, "accuracy": {}, "changes": {}}
  found = fabricated.gathered()
  student = fabricated.measured(found, "student")
  quality = {**student.quality, "nll": np.full(3, np.inf)}
  del quality["top5"], quality["accuracy_where_teacher_wrong"]
  folder = fabricated.run(
    tmp_path / "a", found, student=dataclasses.replace(student, quality=quality)
  )
  numbers = json.loads((folder / "report.json").read_text())
  jsonschema.validate(numbers, reports.report_schema())
  assert numbers["models"]["student"]["nll"] == {"mean": None}
  assert "top5" not in numbers["models"]["student"]
  assert "accuracy_where_teacher_wrong" not in numbers["fidelity"]
  shown = page(folder)
  assert "The student's negative log-likelihood is not a finite number" in shown.text
  # What an earlier version wrote has null for both.
  before = {**numbers, "version": 2, "gain": None, "predictions": None}
  before["models"]["student"] |= {"flops": None, "xla_flops": None}
  (folder / "report.json").write_text(json.dumps(before))
  read = evidence.read(folder)
  assert not any("should be" in problem for problem in read.problems)
  assert (read.whole, read.predictions, read.report["gain"]) == (None, None, None)


@pytest.mark.slow
def test_a_run_alone_shows_its_training_and_says_what_is_missing(tmp_path):
  fabricated.logs(tmp_path, ("mine",))
  folder = tmp_path / "mine"
  (folder / "config.json").write_text(json.dumps({"rate": 0.1}))
  path = reports.render_report(str(folder))
  shown = page(folder)
  assert path == folder / "report.html"
  assert shown.sections == ["training", "repeat"]
  assert "loss during training" in shown.charts
  assert "Nothing was measured on held-out examples" in shown.text
  assert "reports.compare_students" in shown.text
  assert "Undecided." in shown.text
  assert "accuracy.png" not in (folder / "report.md").read_text()
  assert not (folder / "report.json").exists()  # there are no numbers


@pytest.mark.slow
def test_runs_of_one_seed_are_compared_in_a_folder_given_as_text(tmp_path, monkeypatch):
  monkeypatch.setattr(evaluation, "costs", lambda *rest, **options: fabricated.STUDENT)
  x = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
  examples = data.from_arrays(x, np.argmax(x[:, :3], axis=1))
  network = small_networks.dense(3)
  made = train.fit(
    network,
    recipes.labels(),
    data=data.on_device(examples, batch_size=20, data_seed=0),
    optimizer=optax.sgd(0.1),
    steps=3,
    run=train.Run(tmp_path / "student", progress=None),
  )
  shutil.copytree(tmp_path / "student", tmp_path / "baseline")
  _, numbers = reports.compare_students(
    str(tmp_path),
    network=network,
    teacher=teachers.frozen(made),
    batches=data.evaluation_batches(examples, batch_size=20),
    descriptions=fabricated.DESCRIBED,
    examples=examples,
    dataset="made up",
    split="test",
    seeds=(0,),
    varied="nothing",
  )
  assert numbers["models"]["student"]["instances"] == 1
  assert numbers["gain"].keys() == {"mean"}
  assert "One seed: " in page(tmp_path).text


@pytest.mark.slow
def test_answers_of_an_earlier_measurement_are_not_shown(tmp_path):
  found = fabricated.gathered()
  folder = fabricated.run(tmp_path / "run", found, pages=False)
  reports.write_report(
    folder, fabricated.built(found)
  )  # somebody's own evaluation, without answers
  shown = page(folder)
  assert "classes" not in shown.sections
  assert "There are no answers on each example" in shown.text


def test_a_folder_without_a_report_is_an_error(tmp_path, capsys):
  with pytest.raises(FileNotFoundError, match=r"neither report\.json nor predictions\.npz"):
    reports.render_report(tmp_path)
  assert command.main([str(tmp_path)]) == 1
  assert "measure the run first" in capsys.readouterr().err
  found = dataclasses.replace(fabricated.gathered(40), split="validation")
  folder = fabricated.run(tmp_path / "run", found)
  assert (folder / "report-validation.html").is_file()
  assert (folder / "predictions-validation.npz").is_file()
  with pytest.raises(FileNotFoundError, match=r"report-validation\.json.*--split"):
    reports.render_report(folder)
  assert command.main([str(folder), "--split", "validation"]) == 0


def decided(found, folder, **files):
  fabricated.run(folder, found, pages=False)
  for name, content in files.items():
    (folder / f"{name}.json").write_text(json.dumps(content))
  read = evidence.read(folder)
  return decision.decide(read, analysis.classes(read.predictions))


def test_the_decision_follows_its_rules(tmp_path):
  good = fabricated.gathered()
  assert decided(good, tmp_path / "a")["word"] == "Ship it"
  missed = decided(good, tmp_path / "b", budget={"latency_ms": 0.05})
  assert missed["word"] == "Do not ship it"
  assert missed["sentence"] == "Budget missed: latency at most 0.05 ms at batch 1, but it has 0.1."
  # A latency that another process measured, for that batch.
  costs = {"budget": {"latency_ms": 0.5, "batch_size": 8}, "costs": {"latency_ms": 0.4}}
  assert decided(good, tmp_path / "c", budget=costs)["word"] == "Ship it"
  worse = fabricated.gathered(student=0.8, baseline=0.9)
  found = decided(worse, tmp_path / "d")
  assert found["word"] == "Do not ship it"
  assert "labels alone is" in found["sentence"]
  assert any("closes none of the gap" in reason["text"] for reason in found["reasons"])
  same = fabricated.gathered()
  same.models["student"] = same.models["baseline"]
  assert decided(same, tmp_path / "e")["word"] == "No case for it"
  single = fabricated.gathered(seeds=1)
  assert decided(single, tmp_path / "f")["word"] == "Undecided"
  few = decided(fabricated.gathered(24), tmp_path / "h")
  assert any("at most 6 examples each are too few" in r["text"] for r in few["reasons"])
  labels = good.labels
  share = np.where(labels == 2, 0.6, 0.97)
  fell = fabricated.gathered()
  fell.models["student"] = fabricated.answers(labels, share, 3, seed=2)
  fell.models["baseline"] = fabricated.answers(labels, 0.8, 3, seed=1)
  found = decided(fell, tmp_path / "g")
  assert found["word"] == "Ship it with care"
  texts = [reason["text"] for reason in found["reasons"] if reason["weight"] == "care"]
  assert any("lost beyond noise against labels alone: 2 (−" in text for text in texts)


def test_a_report_of_one_seed_says_no_more_than_it_knows():
  told = fabricated.built(fabricated.gathered(40, seeds=1))
  told = {**told, "varied": "seeds", "commands": []}
  told["models"] = {name: {**one, "description": ""} for name, one in told["models"].items()}
  told["gap_closed"] = {"value": -1e-4}
  text = reports.markdown(told)
  assert "One seed" in text
  assert "±" not in text.replace("there is no ±", "")
  assert "What they are" not in text
  assert "```" not in text
  assert "closed: 0%" in text


def sliced(student, size=6000):
  """Answers of students whose accuracy differs by slice."""
  where = np.arange(size, dtype=np.int32) % len(student)
  found = fabricated.gathered(size, columns={"font": Column(where, ("serif", "sans", "mono"))})
  share = {"teacher": 0.995, "baseline": 0.7, "student": np.asarray(student)[where]}
  for i, (name, right) in enumerate(share.items()):
    seeds = 1 if name == "teacher" else 3
    found.models[name] = fabricated.answers(found.labels, right, seeds, seed=i)
  return found


def test_a_verdict_knows_its_slices(tmp_path):
  forbids = "nothing measured here forbids it"
  for name, student, word in (
    ("one fell", [0.9, 0.98, 0.98], "Ship it with care"),
    ("all fell alike", [0.95, 0.95, 0.95], "Ship it"),
    ("none fell", [0.995, 0.995, 0.995], "Ship it"),
  ):
    found = sliced(student)
    folder = fabricated.run(tmp_path / name, found, pages=False)
    read = dataclasses.replace(evidence.read(folder))
    for one in read.report["models"].values():
      one["ece"] = {"mean": None, "std": None}  # made up, and another reason's matter
    rows = analysis.slices(found)
    decided = decision.decide(read, analysis.classes(found), rows)
    fell = [row["name"] for row in rows["font"] if decision.fell(row["changes"]["teacher"])]
    assert decided["word"] == word, decided
    assert (forbids in decided["sentence"]) == (name == "none fell") == (not fell)
    told = [one for one in decided["reasons"] if one["text"].startswith("Slices of 'font'")]
    assert [one["weight"] for one in told] == {
      "one fell": ["care", "note"],
      "all fell alike": ["note"],
      "none fell": [],
    }[name]
    if name == "one fell":
      assert "against the teacher, more than all examples did: serif (−" in told[0]["text"]


def test_confusions_are_counted_by_hand(made):
  found = predictions.load(made / "predictions.npz")
  said = found.models["student"].predicted
  rows = analysis.confusions(found)
  wrong = said != found.labels
  assert sum(row["examples"]["student"] for row in rows) == pytest.approx(wrong.sum() / 3)
  counts = [row["examples"]["student"] for row in rows]
  assert counts == sorted(counts, reverse=True)
  names = found.label_names
  for row in rows:
    one, other = names.index(row["label"]), names.index(row["taken_for"])
    assert row["examples"]["student"] == np.sum(said[:, found.labels == one] == other) / 3
    assert row["of"] == np.sum(found.labels == one)
  numbers = json.loads((made / "report.json").read_text())
  assert numbers["confusions"] == rows
  shown = page(made)
  assert "Rows are labels, columns what the student says" in shown.text
  assert "## Most frequent confusions" in (made / "report.md").read_text()


@pytest.mark.slow
def test_of_many_classes_the_confusions_alone_are_told(tmp_path):
  found = fabricated.gathered(2000, classes=100)
  shown = page(fabricated.run(tmp_path / "many", found))
  assert "Rows are labels" not in shown.text
  assert "The 100 most frequent" in shown.text


def test_every_example_that_was_lost_or_gained_is_there(made):
  found = predictions.load(made / "predictions.npz")
  gone = analysis.lost(found)
  source = page(made).source
  for name, rows in (("lost", gone.rows), ("gained", gone.gained)):
    section = source.split(f'<section id="{name}">')[1].split("</section>")[0]
    listed = re.findall(r'<th scope="row">(\d+)</th>', section)
    assert listed == [str(found.index[row]) for row in rows] != []
    pictured = re.findall(r'alt="example (\d+):', section)
    assert pictured == listed
    assert f"All {len(rows):,} in a table" in section


def gained(folder, student, baseline):
  """A report of ``[S, N]`` that are right or wrong."""
  found = fabricated.gathered(student.shape[1], seeds=len(student))
  for name, right in (("student", student), ("baseline", baseline)):
    answers = found.models[name]
    predicted = np.where(right, found.labels, (found.labels + 1) % 4).astype(np.int32)
    found.models[name] = dataclasses.replace(answers, predicted=predicted)
  return decided(found, folder), found


def test_a_gain_must_be_beyond_seeds_and_examples(tmp_path):
  # All seeds gain three examples of 400, one a fourth: certain over seeds, not over examples.
  baseline = np.ones((3, 400), bool)
  baseline[:, :60] = False
  baseline[0, 60], student = False, baseline.copy()
  student[:, :3] = True
  few, found = gained(tmp_path / "few", student, baseline)
  right = [found.correct(name).mean(axis=1) for name in ("student", "baseline")]
  # The student does not vary, nearly: SciPy warns of what is constant.
  right[0] = right[0] + [0, 1e-9, 0]
  assert scipy.stats.ttest_ind(*right, equal_var=False).pvalue < 0.03
  assert few["word"] == "Ship it with care"
  assert few["sentence"].startswith("Over these seeds it is better than labels alone (0.83 ± 0.08")
  # 10/3 of 400, ± 1.96 · √((3 + 1/9) / 400 − (1/120)²) / √399 = 0.86; the seeds' part is small.
  text = "on 400 examples a difference of that size is within their noise (95% interval −0.03 to +1"
  assert text in few["sentence"]
  assert not any("beyond the noise" in one["text"] for one in few["reasons"])
  # Four and that one: the normal law's interval excludes 0, five heads of five are no proof.
  student[:, :4] = True
  assert "(p = 0.062)" in gained(tmp_path / "four", student, baseline)[0]["sentence"]
  student[:, :30] = True
  many = gained(tmp_path / "many", student, baseline)[0]
  assert many["sentence"].startswith("It beats labels alone beyond the noise of seeds and of exam")
  assert gained(tmp_path / "less", baseline, student)[0]["word"] == "Do not ship it"
  # Three seeds, 2.4 standard errors: beyond the rule of thumb, p = 0.14 by Welch's test.
  spread = np.ones((3, 400), bool)
  for seed, wrong in enumerate((30, 50, 70)):
    spread[seed, :wrong] = False
  better = np.ones((3, 400), bool)
  better[:, :22] = False
  noise, found = gained(tmp_path / "noise", better, spread)
  change = fabricated.built(found)["gain"]
  assert change["mean"] > 2 * change["standard_error"]
  assert noise["word"] == "No case for it"
  text = json.loads((tmp_path / "noise" / "report.json").read_text())["verdict"]
  assert "seems to help" in text
  assert "over seeds" in text


def test_a_budget_is_told_in_full(tmp_path):
  found = fabricated.gathered()
  limits = {"latency_ms": 0.75, "batch_size": 64, "flops": 1.25e6, "parameters": 100.00001}
  costs = {"latency_ms": 0.4594729, "flops": 93_040.0, "parameters": 100}
  texts = [
    r["text"]
    for r in decided(found, tmp_path, budget={"budget": limits, "costs": costs})["reasons"]
  ]
  assert "Budget met: latency at most 0.75 ms at batch 64 (it has 0.4595)." in texts
  assert "Budget met: FLOPs at most 1,250,000 (it has 93,040)." in texts
  assert "Budget met: parameters at most 100.00001 (it has 100)." in texts


@pytest.mark.slow
def test_checks_that_found_nothing_are_one_line(tmp_path):
  folder = fabricated.run(tmp_path / "run")
  assert "preflight" not in page(folder).sections
  (folder / "preflight.json").write_text("[]")
  reports.render_report(folder)
  assert "Checked, nothing found." in page(folder).text
  (folder / "budget.json").write_text(json.dumps({"budget": {"parameters": 1000}}))
  reports.render_report(folder)
  assert "Checked before and after the training, nothing found." in page(folder).text
  assert "Checked before and after the training" in (folder / "report.md").read_text()


@pytest.mark.slow
def test_an_experiments_end_gathers_everything(tmp_path):
  random = np.random.default_rng(0)
  pictures = random.integers(0, 255, (30, 4, 4, 1)).astype(np.uint8)
  names = ("dark", "light")
  labels = (pictures.mean(axis=(1, 2, 3)) > 127).astype(np.int32)
  examples = data.from_arrays(pictures, labels, label_names=names)
  batches = data.evaluation_batches(examples, batch_size=8)

  def apply(variables, inputs, *, train, key):
    above = 40 * (inputs.mean(axis=(1, 2, 3)) - variables)
    return Outputs(logits=jnp.stack([-above, above], axis=1)), {}

  network = Network(init=lambda key, inputs: {}, apply=apply)
  teacher = teachers.frozen(Model(network, np.float32(0.5)))
  students = Model(network, np.array([0.49, 0.53], np.float32), 2)
  measured = {
    "teacher": reports.measure_model(teacher, batches, costs=fabricated.TEACHER),
    "student": reports.measure_model(students, batches, teacher=teacher, costs=fabricated.STUDENT),
  }
  columns = {"size": predictions.column("size", np.arange(30) % 2, np.arange(30), 30)}
  about = {"dataset": "made up", "split": "test", "seeds": range(2)}
  found = reports.gather_predictions(measured, batches, examples=examples, columns=columns, **about)
  assert found.label_names == names
  assert (len(found), found.num_classes, found.seeds) == (30, 2, (0, 1))
  plain = evaluation.evaluate(teacher, batches)
  assert found.correct("teacher").mean() == pytest.approx(float(plain["accuracy"]))
  wrong = ~found.correct("student").all(axis=0)
  assert set(found.shown) == set(np.flatnonzero(wrong).tolist())
  for index, picture in found.shown.items():
    np.testing.assert_array_equal(picture, pictures[index, ..., 0])
  numbers = reports.build_report(
    dataset="made up", split="test", examples=30, seeds=range(2), varied="nothing", **measured
  )
  reports.write_report(tmp_path, numbers, predictions=found)
  assert "light" in page(tmp_path).text


@pytest.mark.slow
def test_an_experiment_without_a_baseline_ends_with_a_report(tmp_path, monkeypatch):
  x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
  examples = data.from_arrays(x, np.argmax(x, axis=1))
  kernels = np.stack([np.eye(3), np.eye(3) + 0.9 * np.ones((3, 3)) * [1, 0, 0]]).astype(np.float32)

  def apply(variables, inputs, *, train, key):
    return Outputs(logits=inputs @ variables["kernel"]), {}

  network = Network(init=lambda key, inputs: {}, apply=apply)
  asked = []

  def restore(folder, network):
    asked.append(folder.name)
    return Model(network, {"kernel": jnp.asarray(kernels)}, 2)

  monkeypatch.setattr(teachers, "restore", restore)
  monkeypatch.setattr(evaluation, "costs", lambda *rest, **options: fabricated.STUDENT)
  options = {
    "network": network,
    "teacher": teachers.frozen(Model(network, {"kernel": 5 * jnp.eye(3)})),
    "batches": data.evaluation_batches(examples, batch_size=16),
    "descriptions": fabricated.DESCRIBED,
    "examples": examples,
    "show": lambda inputs: f"three numbers: {inputs.round(1)}",
  }
  about = {"dataset": "made up", "split": "test", "seeds": (3, 4), "varied": "nothing"}
  path, numbers = reports.compare_students(
    tmp_path, **options, **about, metadata={"first": x[:, 0] > 0}
  )
  assert path == tmp_path / "report.md"
  assert asked == ["student"]
  assert "baseline" not in numbers["models"]
  shown = page(tmp_path)
  assert "What distillation gained is unknown" in shown.text
  assert "three numbers: [" in shown.text
  assert "By first: accuracy" in shown.text
  with pytest.raises(ValueError, match=r"metadata\['size'\] must have one value for each"):
    reports.compare_students(tmp_path, **options, **about, metadata={"size": [1, 2]})
  assert asked == ["student"]  # a wrong column says so before anything is read


def other(made, tmp_path, change=None, **rest):
  """A second run's folder, of the same data unless something is changed."""
  found = predictions.load(made / "predictions.npz")
  student = fabricated.answers(found.labels, 0.8, 3, seed=7)
  changed = {"models": {**found.models, "student": student}, **rest}
  found = dataclasses.replace(found, **changed)
  return fabricated.run(tmp_path / "b", found if change is None else change(found), pages=False)


def test_two_runs_are_compared_on_their_pairs(made, tmp_path, capsys):
  folder = other(made, tmp_path)
  out = tmp_path / "out" / "both.html"
  assert command.main([str(made), str(folder), "--out", str(out)]) == 0
  printed = capsys.readouterr().out
  numbers = json.loads(out.with_suffix(".json").read_text())
  a, b = (predictions.load(f / "predictions.npz") for f in (made, folder))
  right = [one.correct("student") for one in (a, b)]
  tested = numbers["paired"]["accuracy"]
  assert tested["gain"] == pytest.approx(right[0].mean() - right[1].mean())
  assert tested["low"] > 0
  assert len(numbers["mcnemar"]) == 3
  for s, test in enumerate(numbers["mcnemar"]):
    only = int(np.sum(right[0][s] & ~right[1][s])), int(np.sum(right[1][s] & ~right[0][s]))
    assert (test["first_only"], test["second_only"]) == only
    assert test["p_value"] == pytest.approx(scipy.stats.binomtest(only[1], sum(only)).pvalue)
    assert test["seed_a"] == test["seed_b"] == s
  assert numbers["paired_seeds"]
  assert "a is " in printed
  assert " better than b " in printed
  assert out.with_suffix(".md").read_text() in printed
  shown = page(out.parent, "both.html")
  assert "a against b" in shown.text
  assert shown.sections == ["table", "significance", "classes", "examples"]
  assert all(link.startswith(("data:", "#")) for link in shown.links)
  most = [side.mean(axis=0) > 0.5 for side in right]
  listed = shown.source.split('<section id="examples">')[1]
  every = [str(row) for a, b in (most, most[::-1]) for row in np.flatnonzero(a & ~b)]
  assert sorted(re.findall(r'<th scope="row">(\d+)</th>', listed)) == sorted(every) != []
  assert numbers["only"] == {"a": np.sum(most[0] & ~most[1]), "b": np.sum(most[1] & ~most[0])}


@pytest.mark.slow
def test_a_run_against_itself_is_no_difference(made, tmp_path):
  compared = reports.compare_runs(made, copied(made, tmp_path))
  assert compared.numbers["paired"]["accuracy"]["gain"] == 0
  assert compared.numbers["paired"]["accuracy"]["p_value"] == 1
  assert all(test["p_value"] == 1 for test in compared.numbers["mcnemar"])
  assert "No difference beyond noise" in compared.numbers["verdict"]


@pytest.mark.slow
def test_overlap_is_compared_and_said(made, tmp_path):
  some = np.arange(399, 99, -1)
  folder = other(made, tmp_path, lambda found: found.take(some), seeds=(7, 8, 9))
  compared = reports.compare_runs(made, folder)
  assert compared.numbers["examples"] == 300
  first, second = compared.numbers["notes"]
  assert "Compared on the 300 examples that both were measured on; a has 400, b has 300" in first
  assert "different seeds" in second
  assert not compared.numbers["paired_seeds"]
  a, b = (predictions.load(f / "predictions.npz") for f in (made, folder))
  change = a.correct("student")[:, 100:].mean() - b.correct("student").mean()
  assert compared.numbers["paired"]["accuracy"]["gain"] == pytest.approx(change)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"dataset": "another 2.0"}, "different data: the dataset of a is 'made up 1.0', that of b"),
    ({"index": np.arange(400) + 400}, "a and b have no example in common"),
    (
      {"labels": np.roll(np.arange(400) % 4, 1).astype(np.int32)},
      "400 of the 400 examples.*labels",
    ),
  ],
)
def test_runs_on_other_data_are_refused(made, tmp_path, change, message):
  folder = other(made, tmp_path, lambda found: dataclasses.replace(found, **change))
  with pytest.raises(ValueError, match=message):
    reports.compare_runs(made, folder)


def test_a_run_without_answers_cannot_be_compared(made, tmp_path, capsys):
  folder = copied(made, tmp_path)
  older(folder)
  assert command.main([str(made), str(folder)]) == 1
  said = capsys.readouterr().err
  assert "copy has no student's answers on each example" in said
  assert "made by an older version" in said
  with pytest.raises(ValueError, match=r"must end in \.html"):
    reports.write_comparison(tmp_path / "both.pdf", reports.compare_runs(made, made))


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


MEASURE = """
onload = () => {
  const inside = document.querySelector("iframe").contentWindow
  const page = inside.document.documentElement
  const loaded = inside.performance.getEntriesByType("resource").map(entry => entry.name)
  const dark = inside.getComputedStyle(inside.document.body).backgroundColor
  document.title = JSON.stringify({
    wide: page.scrollWidth, tall: page.scrollHeight, ground: dark,
    loaded: loaded.filter(name => !name.startsWith("data:")),
    small: [...inside.document.querySelectorAll("svg text")].filter(
      text => text.getBoundingClientRect().height < 9).length,
  })
}
"""


TOUCH = """
onload = () => {
  const inside = document.querySelector("iframe").contentWindow
  const table = inside.document.querySelector("#classes table")
  const rows = () => [...table.tBodies[0].rows].filter(row => row.getClientRects().length)
  const column = i => rows().map(row => row.cells[i].textContent)
  const click = i => table.tHead.rows[0].cells[i].querySelector("button").click()
  const found = {}
  click(4); found.up = column(4); found.told = table.tHead.rows[0].cells[4].ariaSort
  click(4); found.down = column(4); click(0); found.names = column(0)
  const settings = inside.document.querySelector("#cost input")
  settings.value = "LATENCY"; settings.oninput()
  found.kept = [...inside.document.querySelectorAll("#cost tbody tr:not([hidden]) th")]
    .map(cell => cell.textContent)
  const script = inside.document.createElement("script")
  script.textContent = "document.body.dataset.broken = 1"
  inside.document.body.append(script)
  found.broken = inside.document.body.dataset.broken ?? null
  document.title = JSON.stringify(found)
}
"""


def in_a_browser(made, folder, script, width=1280, scheme="light"):
  """What a script finds in a page that is drawn in a frame of that width."""
  browser = next(filter(None, map(shutil.which, BROWSERS)), None)
  if browser is None:
    pytest.skip(f"none of {BROWSERS} is installed")
  # In a frame of that width, since a window has a least one; a script beside it looks.
  source = html.escape((made / "report.html").read_text())
  frame = f"<iframe srcdoc='{source}' width={width} height=900 style='border:0'></iframe>"
  (folder / "frame.html").write_text(
    f"<!DOCTYPE html><meta charset=utf-8>{frame}<script>{script}</script>"
  )
  command = [
    browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom",
    f"--user-data-dir={folder / 'profile'}", "--window-size=1400,900",
    f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
    (folder / "frame.html").as_uri(),
  ]  # fmt: skip
  done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
  title = re.search("<title>(.*?)</title>", done.stdout).group(1)
  return json.loads(html.unescape(title))


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_it_at_any_width(made, tmp_path, width, scheme):
  found = in_a_browser(made, tmp_path, MEASURE, width, scheme)
  assert found["wide"] <= width  # wide tables scroll in their own boxes
  assert found["tall"] > 2000
  assert found["loaded"] == []
  assert found["small"] == 0
  ground = [int(part) for part in re.findall(r"\d+", found["ground"])[:3]]
  assert (max(ground) < 64) == (scheme == "dark")


@pytest.mark.slow
def test_a_browser_sorts_and_filters_tables_and_runs_no_other_script(made, tmp_path):
  found = in_a_browser(made, tmp_path, TOUCH)
  numbers = [float(text) for text in found["up"]]
  assert numbers == sorted(numbers)
  assert [float(text) for text in found["down"]] == sorted(numbers, reverse=True)
  assert found["told"] == "ascending"
  assert found["names"] == ["cat", "cow", "dog", "emu"]
  assert found["kept"] == ["latency, ms", "latency, 95th pct, ms"]
  assert found["broken"] is None
