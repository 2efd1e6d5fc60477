"""A report of each task: metrics against scikit-learn, directions, what a page shows and lacks."""

import dataclasses
import html
import json
import re

import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
import scipy.stats
from sklearn import metrics as known
from sklearn import neighbors

import fabricated
import small_networks
from jaxdistill import data, evaluation, reports, teachers
from jaxdistill.evaluation import metrics, predictions, tasks
from jaxdistill.reports import command
from jaxdistill.reports._pages import analysis, document, evidence
from jaxdistill.types import Model, Network, Outputs

SIZE, SEEDS = 37, 3
HOSTILE = "<script>alert('1')</script> & \"quotes\" | pipes"


def apply(variables, inputs, *, train, key):
  rows = inputs[:, 0].astype(jnp.int32)
  return Outputs(
    logits=None if "logits" not in variables else variables["logits"][rows],
    features={name: x[rows] for name, x in variables.items() if name != "logits"},
  ), {}


NETWORK = Network(init=lambda key, inputs: {}, apply=apply)  # says of example i its i-th row


def says(array, name="logits", seeds=None):
  return Model(NETWORK, {name: jnp.asarray(array, jnp.float32)}, seeds)


def reported(folder, task, truth, outputs, *, name="logits", metadata=None, **given):
  """The report of outputs ``[N, ...]`` of a teacher and ``[S, N, ...]`` of the others, as JSON."""
  inputs = np.arange(len(truth), dtype=np.float32)[:, None]
  examples = data.from_arrays(inputs, truth, **given)
  batches = data.evaluation_batches(examples, batch_size=8)  # ragged
  path, _ = reports.compare_students(
    folder,
    network={n: says(x, name, len(x)) for n, x in outputs.items() if n != "teacher"},
    teacher=teachers.frozen(says(outputs["teacher"], name)),
    batches=batches,
    examples=examples,
    task=task,
    metadata=metadata,
  )
  numbers = json.loads((folder / "report.json").read_text())
  jsonschema.validate(numbers, reports.report_schema())
  assert path.read_text().startswith("# arrays, test split")
  assert "null" not in (folder / "report.json").read_text()
  for text in (path.read_text(), (folder / "report.html").read_text()):
    assert not re.search(r"\bnan\b", text, re.IGNORECASE)
  return numbers


def text_of(folder, name="report.html"):
  """The words of a page."""
  source = re.sub(r"<(style|script).*?</\1>", "", (folder / name).read_text(), flags=re.DOTALL)
  return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", source)).split())


def sections(folder):
  return re.findall(r'<section id="(\w+)">', (folder / "report.html").read_text())


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
  """Costs that nobody has to wait for."""

  def costs(model, batches, **options):
    return fabricated.STUDENT if isinstance(model, Model) else fabricated.TEACHER

  monkeypatch.setattr(evaluation, "costs", costs)


def noisy(truth, scales, seed=0):
  """Outputs near the truth: the teacher's, and those of three seeds of the others."""
  random = np.random.default_rng(seed)
  shapes = {"teacher": (), "baseline": (SEEDS,), "student": (SEEDS,)}
  return {
    name: truth + scales[name] * random.normal(size=(*shape, *np.shape(truth)))
    for name, shape in shapes.items()
  }


NEAR = {"teacher": 0.2, "baseline": 1.0, "student": 0.5}


@pytest.mark.slow
def test_a_regression(tmp_path):
  truth = 10 + 3 * np.random.default_rng(1).normal(size=(SIZE, 2))
  outputs = noisy(truth, NEAR)
  where = np.arange(SIZE) % 2
  numbers = reported(tmp_path, tasks.regression(), truth, outputs, metadata={"sort": where})
  each = {}
  for name in ("baseline", "student"):
    said = outputs[name]
    each[name] = [known.root_mean_squared_error(truth, one) for one in said]
    model = numbers["models"][name]
    assert model["per_seed"]["rmse"] == pytest.approx(each[name], rel=1e-5)
    assert model["rmse"]["mean"] == pytest.approx(np.mean(each[name]), rel=1e-5)
    assert model["rmse"]["std"] == pytest.approx(np.std(each[name], ddof=1), rel=1e-4)
    for metric, function in (("mae", known.mean_absolute_error), ("r2", known.r2_score)):
      mean = np.mean([function(truth, one) for one in said])
      assert model[metric]["mean"] == pytest.approx(mean, rel=1e-5)
  teacher = known.root_mean_squared_error(truth, outputs["teacher"])
  base, ours = (np.mean(each[name]) for name in ("baseline", "student"))
  assert base > ours > teacher
  # Lower is better: what is gained is what it went down by, and so is the gap.
  assert numbers["gain"]["mean"] == pytest.approx(base - ours, rel=1e-4)
  assert numbers["gap_closed"]["value"] == pytest.approx((base - ours) / (base - teacher), rel=1e-4)
  assert numbers["verdict"].startswith("Distillation helps: ")
  assert "under labels alone (root mean squared error" in numbers["verdict"]
  distance = np.mean(
    [np.sqrt(np.mean((one - outputs["teacher"]) ** 2)) for one in outputs["student"]]
  )
  assert numbers["fidelity"]["rmse_to_teacher"]["mean"] == pytest.approx(distance, rel=1e-5)
  squares = {n: ((outputs[n] - truth) ** 2).mean(axis=-1) for n in ("student", "baseline")}
  tested = {(row["metric"], row["reference"]): row for row in numbers["paired"]}
  gained = squares["baseline"].mean() - squares["student"].mean()
  assert tested["squared_error", "baseline"]["gain"] == pytest.approx(gained, rel=1e-4)
  assert tested["squared_error", "baseline"]["low"] > 0 > tested["squared_error", "teacher"]["high"]
  rows = numbers["parts"]["target_rmse"]
  assert [row["name"] for row in rows] == ["target 0", "target 1"]
  for d, row in enumerate(rows):
    mean = np.mean([np.sqrt(np.mean((one - truth)[:, d] ** 2)) for one in outputs["student"]])
    assert row["values"]["student"]["mean"] == pytest.approx(mean, rel=1e-5)
  no, yes = numbers["slices"]["sort"]
  assert (no["examples"], yes["examples"]) == (19, 18)
  mean = squares["student"][:, where == 1].mean()
  assert yes["values"]["student"]["mean"] == pytest.approx(mean, rel=1e-4)
  assert no["changes"]["baseline"]["change"] > 0 > no["changes"]["teacher"]["change"]
  assert (tmp_path / "rmse.png").exists()
  assert {"cost", "gap", "paired", "points", "examples", "slices"} <= set(sections(tmp_path))
  assert not {"classes", "confusions", "calibration", "lost"} & set(sections(tmp_path))
  shown = text_of(tmp_path)
  assert "Root mean squared error against what it costs" in shown
  assert "Of several seeds the first is shown" in shown
  before = (tmp_path / "report.json").read_bytes()
  assert command.main([str(tmp_path)]) == 0  # from the folder alone
  assert (tmp_path / "report.json").read_bytes() == before


def one_hot(labels, classes, scale, shape=(), seed=0):
  """Logits that say the labels, as far as noise lets them."""
  random = np.random.default_rng(seed)
  return np.eye(classes)[labels] + scale * random.normal(size=(*shape, *labels.shape, classes))


def outputs_of(labels, classes, scales=NEAR):
  shapes = {"teacher": (), "baseline": (SEEDS,), "student": (SEEDS,)}
  return {
    n: one_hot(labels, classes, scales[n], shape, seed)
    for seed, (n, shape) in enumerate(shapes.items())
  }


@pytest.mark.slow
def test_dense(tmp_path):
  random = np.random.default_rng(2)
  masks = random.integers(0, 3, (SIZE, 6, 5))
  outputs = outputs_of(masks, 3)
  ignored = masks.copy()
  ignored[:, 0] = 255
  names = ("road", "sky", HOSTILE)
  numbers = reported(
    tmp_path, tasks.dense(), ignored, outputs, num_classes=3, ignore=255, label_names=names
  )
  truth = masks[:, 1:].reshape(-1)
  said = outputs["student"].argmax(axis=-1)[:, :, 1:]
  ious = [known.jaccard_score(truth, one.reshape(-1), average=None) for one in said]
  mean = np.mean([each.mean() for each in ious])
  assert numbers["models"]["student"]["miou"]["mean"] == pytest.approx(mean, rel=1e-6)
  rows = numbers["parts"]["class_iou"]
  assert [row["name"] for row in rows] == list(names)
  for k, row in enumerate(rows):
    each = np.mean([one[k] for one in ious])
    assert row["values"]["student"]["mean"] == pytest.approx(each, rel=1e-6)
  right = (said == masks[:, 1:]).mean(axis=(2, 3))
  found = predictions.load(tmp_path / "predictions.npz")
  values = found.values("student")
  np.testing.assert_allclose(values["pixel_accuracy"], right, rtol=1e-6)
  one = known.jaccard_score(
    masks[4, 1:].reshape(-1), said[0, 4].reshape(-1), average="macro", labels=np.arange(3)
  )
  assert values["image_iou"][0, 4] == pytest.approx(one, rel=1e-6)
  for index, mask in found.truth.items():
    np.testing.assert_array_equal(mask, np.where(ignored[index] == 255, -1, masks[index]))
    np.testing.assert_array_equal(
      found.details["student"].said[index], outputs["student"][0, index].argmax(axis=-1)
    )
  source = (tmp_path / "report.html").read_text()
  assert {"part0", "examples"} <= set(sections(tmp_path))
  assert source.count('class="maps"') == len(found.truth) > 4
  assert source.count("<script") == 1
  assert HOSTILE in text_of(tmp_path)


@pytest.mark.slow
def test_several_labels(tmp_path):
  random = np.random.default_rng(3)
  labels = (random.random((SIZE, 4)) < [0.3, 0.4, 0.6, 0.5]).astype(int)
  outputs = noisy(2.0 * labels - 1, {"teacher": 0.3, "baseline": 2.5, "student": 1.0})
  names = ("cat", "dog", "cow", "emu")
  about = {"num_classes": 4, "label_names": names}
  numbers = reported(tmp_path, tasks.multilabel(), labels, outputs, **about)
  average = np.array(
    [known.average_precision_score(labels, one, average=None) for one in outputs["student"]]
  )
  student = numbers["models"]["student"]
  assert student["map"]["mean"] == pytest.approx(average.mean(), rel=1e-6)
  f1 = np.mean([known.f1_score(labels, one >= 0, average="micro") for one in outputs["student"]])
  assert student["f1_micro"]["mean"] == pytest.approx(f1, rel=1e-6)
  for k, row in enumerate(numbers["parts"]["label_ap"]):
    assert row["name"] == names[k]
    assert row["values"]["student"]["mean"] == pytest.approx(average[:, k].mean(), rel=1e-6)
  values = predictions.load(tmp_path / "predictions.npz").values("student")
  there = labels.any(axis=1)
  np.testing.assert_allclose(np.isfinite(values["example_ap"][0]), there)
  ranked = known.label_ranking_average_precision_score(labels[there], outputs["student"][0, there])
  assert values["example_ap"][0, there].mean() == pytest.approx(ranked, rel=1e-6)
  right = ((outputs["student"] >= 0) == labels).mean(axis=2)
  np.testing.assert_allclose(values["accuracy"], right)
  assert student["accuracy"]["mean"] == pytest.approx(right.mean(), rel=1e-6)
  assert "examples" in sections(tmp_path)


@pytest.mark.slow
def test_vectors_without_logits(tmp_path):
  labels = np.arange(SIZE) % 4
  centres = np.random.default_rng(4).normal(size=(4, 6))
  outputs = noisy(centres[labels], {"teacher": 0.1, "baseline": 2.0, "student": 0.8})
  task = tasks.embedding("pooled", neighbours=3)
  numbers = reported(tmp_path, task, labels, outputs, name="pooled", label_names=tuple("abcd"))

  def recall(vectors):
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    near = neighbors.NearestNeighbors(n_neighbors=2).fit(units).kneighbors(units)[1][:, 1]
    return labels[near] == labels

  hits = np.array([recall(one) for one in outputs["student"]])
  student = numbers["models"]["student"]
  assert student["recall_at_1"]["mean"] == pytest.approx(hits.mean())
  found = predictions.load(tmp_path / "predictions.npz")
  np.testing.assert_array_equal(found.values("student")["recall_at_1"], hits)
  rows = numbers["parts"]["class_knn"]
  assert [row["name"] for row in rows] == list("abcd")
  voted = found.values("student")["knn_accuracy"]
  for k, row in enumerate(rows):
    assert row["values"]["student"]["mean"] == pytest.approx(voted[:, labels == k].mean())
  assert 0 < numbers["fidelity"]["neighbour_agreement"]["mean"] < 1
  index = next(iter(found.truth))
  assert found.truth[index] == "abcd"[labels[index]]
  assert re.fullmatch(r"[abcd](, [abcd]){2}", found.details["student"].said[index])
  assert "k-NN accuracy" in numbers["verdict"]


@pytest.mark.slow
def test_tokens(tmp_path):
  random = np.random.default_rng(5)
  labels = random.integers(0, 5, (SIZE, 6))
  outputs = outputs_of(labels, 5)
  weight = (np.arange(6) < random.integers(1, 7, SIZE)[:, None]).astype(float)
  numbers = reported(tmp_path, tasks.tokens(), labels, outputs, num_classes=5, weight=weight)

  def nll(logits):
    log = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return -np.take_along_axis(log, labels[..., None], axis=-1)[..., 0]

  each = np.array([nll(one) for one in outputs["student"]])
  mean = np.mean([np.average(one, weights=weight) for one in each])
  assert numbers["models"]["student"]["nll"]["mean"] == pytest.approx(mean, rel=1e-5)
  values = predictions.load(tmp_path / "predictions.npz").values("student")["nll"]
  by_hand = (each * weight).sum(axis=2) / weight.sum(axis=1)
  np.testing.assert_allclose(values, by_hand, rtol=1e-4)
  rows = numbers["parts"]["position_nll"]
  assert [row["name"] for row in rows] == ["0", "1", "2 to 3", "4 to 5"]
  here = slice(2, 4)
  late = np.mean([np.average(one[:, here], weights=weight[:, here]) for one in each])
  assert rows[2]["values"]["student"]["mean"] == pytest.approx(late, rel=1e-4)
  assert "perplexity" in numbers["models"]["student"]
  rows = [line.split("|")[1].strip() for line in table_of(tmp_path)]
  assert rows[:3] == ["perplexity", "agrees with teacher, %", "acceptance of drafts, %"]
  assert "negative log-likelihood" in rows


def table_of(folder):
  """The lines of the first table of a report, without its head."""
  text = (folder / "report.md").read_text()
  return (
    text[text.index("| perplexity") if "| bits" not in text else text.index("| bits") :]
    .split("\n\n")[0]
    .splitlines()
  )


PLAY = "to be<script>alert(1)</script> or not `to` be & so | on\n" * 12


def writer(tokenizer, seed, count=None):
  """A network that says of each token which it saw after it, and of the rest little."""
  tokens = tokenizer.encode(PLAY)
  table = np.random.default_rng(seed).normal(scale=0.5, size=(tokenizer.vocabulary,) * 2)
  np.add.at(table, (tokens[:-1], tokens[1:]), 0.1)

  def apply(variables, inputs, *, train, key):
    return Outputs(logits=variables["table"][inputs["tokens"]]), {}

  network = Network(init=lambda key, inputs: {}, apply=apply)
  table = jnp.asarray(table, jnp.float32)
  return Model(network, {"table": table if count is None else jnp.stack([table] * count)}, count)


def written(folder, *, seed=1, **options):
  """A report of language models with sample texts."""
  tokenizer = data.tokenizers.characters(PLAY)
  examples = data.from_text(PLAY, tokenizer, length=24)
  folder.mkdir()
  _, numbers = reports.compare_students(
    folder,
    network={"baseline": writer(tokenizer, 3, 2), "student": writer(tokenizer, seed, 2)},
    teacher=teachers.frozen(writer(tokenizer, 0), tokenizer=tokenizer),
    batches=data.evaluation_batches(examples, batch_size=8),
    examples=examples,
    task=tasks.tokens(token_bytes=tokenizer.bytes),
    texts=reports.Texts(tokenizer, prompt=10, length=30, **options),
  )
  return numbers, json.loads((folder / "texts.json").read_text())


@pytest.mark.slow
def test_a_report_of_language_models_begins_with_bits_and_shows_texts(tmp_path):
  numbers, told = written(tmp_path / "a", count=3, temperature=0.5, seed=1)
  jsonschema.validate(
    json.loads((tmp_path / "a" / "report.json").read_text()), reports.report_schema()
  )
  rows = [line.split("|")[1].strip() for line in table_of(tmp_path / "a")]
  leads = ["bits a byte", "perplexity", "agrees with teacher, %", "acceptance of drafts, %"]
  assert rows[:4] == leads
  assert numbers["models"]["student"]["bits_per_byte"]["mean"] == pytest.approx(
    numbers["models"]["student"]["nll"]["mean"] / np.log(2), rel=1e-6
  )  # each of these characters is one byte
  assert told["temperature"] == 0.5
  assert [len(one["prompt"]) for one in told["texts"]] == [10] * 3
  assert all(one["prompt"] + one["goes_on"] in PLAY for one in told["texts"])
  voices = [
    one["said"][name] for one in told["texts"] for name in ("teacher", "baseline", "student")
  ]
  assert {len(text) for text in voices} == {30}
  assert len(set(voices)) == 9
  page = (tmp_path / "a" / "report.html").read_text()
  assert "texts" in sections(tmp_path / "a")
  assert "<script>alert" not in page
  seen, text = text_of(tmp_path / "a"), (tmp_path / "a" / "report.md").read_text()
  assert "temperature 0.5" in seen
  assert "seed 0" in seen
  for one in voices:
    assert " ".join(one.split()) in seen
    assert one.splitlines()[0] in text
  # Pages are made again without a network, and of texts that were damaged they say so.
  (tmp_path / "a" / "texts.json").write_text('{"texts": [{"prompt": 3}]}')
  assert command.main([str(tmp_path / "a")]) == 0
  assert "texts" not in sections(tmp_path / "a")
  assert "A sample text of texts.json is none" in text_of(tmp_path / "a")


@pytest.mark.slow
def test_two_runs_show_what_both_students_write(tmp_path, capsys):
  told = {
    name: written(tmp_path / name, seed=seed, count=2)[1] for name, seed in (("a", 1), ("b", 2))
  }
  out = tmp_path / "both.html"
  assert command.main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)]) == 0
  seen, printed = text_of(tmp_path, "both.html"), capsys.readouterr().out
  for one in told.values():
    for row in one["texts"]:
      assert " ".join(row["said"]["student"].split()) in seen
      assert row["said"]["student"].splitlines()[0] in printed
      assert " ".join(row["said"]["teacher"].split()) not in seen
  other = json.loads((tmp_path / "b" / "texts.json").read_text())
  (tmp_path / "b" / "texts.json").write_text(json.dumps({**other, "seed": 5}))
  compared = reports.compare_runs(tmp_path / "a", tmp_path / "b", resamples=100)
  assert compared.numbers["texts"] is None  # other noise: nothing to hold side by side


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"prompt": 0}, "prompt=0"),
    ({"temperature": -1.0}, "temperature must be at least 0"),
    ({"prompt": 25}, "texts.prompt=25, and no window of 24"),
    ({"tokenizer": data.tokenizers.utf8()}, "examples are of the tokenizer"),
  ],
)
def test_texts_that_cannot_be_drawn_are_refused(tmp_path, options, message):
  tokenizer = data.tokenizers.characters(PLAY)
  examples = data.from_text(PLAY, tokenizer, length=24)
  models = {"student": writer(tokenizer, 0)}

  def write():
    texts = reports.Texts(**{"tokenizer": tokenizer, **options})
    reports.write_texts(tmp_path, texts, models, examples)

  with pytest.raises(ValueError, match=message):
    write()
  assert not (tmp_path / "texts.json").exists()


def test_a_teacher_of_another_tokenizer_is_refused_before_the_work(tmp_path):
  tokenizer, bytes_ = data.tokenizers.characters(PLAY), data.tokenizers.utf8()
  examples = data.from_text(PLAY, tokenizer, length=24)
  with pytest.raises(ValueError, match=rf"{bytes_.digest}.*{tokenizer.digest}"):
    reports.compare_students(
      tmp_path,
      network={"student": writer(tokenizer, 1)},
      teacher=teachers.frozen(writer(tokenizer, 0), tokenizer=bytes_),
      batches=data.evaluation_batches(examples, batch_size=8),
      examples=examples,
      task=tasks.tokens(),
    )


def sums(outputs, batch):
  error = jnp.abs(outputs.logits[..., 0] - batch.labels)
  where = tasks.counted(batch, error)
  return {
    "miss": tasks.mean(error, where),
    "off": tasks.mean(error > 1, where),
    "n": (error.sum(),) * 2,
  }


METRICS = {"miss": tasks.Metric("lower", title=HOSTILE), "off": tasks.Metric("lower", percent=True)}


def test_a_task_of_ones_own(tmp_path):
  truth = np.random.default_rng(6).normal(size=SIZE).astype(np.float32)
  outputs = {name: x[..., None] for name, x in noisy(truth, NEAR).items()}
  mine = tasks.Task("mine", METRICS, sums)
  numbers = reported(tmp_path, mine, truth, outputs)
  error = {name: np.abs(x[..., 0] - truth) for name, x in outputs.items()}
  student = numbers["models"]["student"]
  assert student["miss"]["mean"] == pytest.approx(error["student"].mean(), rel=1e-5)
  assert student["off"]["mean"] == pytest.approx((error["student"] > 1).mean(), rel=1e-5)
  # What sums says of an example alone is what it is paired by, without a word about it.
  tested = {(row["metric"], row["reference"]): row for row in numbers["paired"]}
  gained = error["baseline"].mean() - error["student"].mean()
  assert tested["miss", "baseline"]["gain"] == pytest.approx(gained, rel=1e-4)
  assert numbers["gain"]["mean"] == pytest.approx(gained, rel=1e-4)
  # "n" was measured, and nobody said which way it is better.
  assert numbers["task"]["metrics"]["n"] == {"title": "n"}
  assert numbers["fidelity"] == {}
  source, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
  assert source.count("<script") == 1
  assert HOSTILE in text_of(tmp_path)
  assert not re.search(r"(?<!\\)<", text)
  assert (tmp_path / "miss.png").exists()


def test_means_are_of_one_example_whatever_the_sums_were_replaced_by():
  mine = tasks.Task("mine", METRICS, sums)
  other = dataclasses.replace(
    mine,
    sums=lambda outputs, batch: {
      "miss": tasks.mean(batch.labels, tasks.counted(batch, batch.labels))
    },
  )
  examples = data.from_arrays(np.arange(4.0, dtype=np.float32)[:, None], np.arange(4.0))
  batches = data.evaluation_batches(examples, batch_size=3)
  _, kept = evaluation.examine(says(np.zeros((4, 1))), batches, task=other)
  assert other.shown.values({n: x[0] for n, x in kept.items()})["miss"].tolist() == [0, 1, 2, 3]


def test_a_metric_may_not_be_called_as_a_cost():
  with pytest.raises(ValueError, match="'mine' has the metric 'bytes'.*rename it"):
    tasks.Task("mine", {"bytes": tasks.Metric("lower")}, lambda o, b: {"bytes": (0.0, 1.0)})
  assert set(document._MODEL) == tasks.RESERVED  # what a report has is what a task may not have


@pytest.mark.slow
def test_what_was_not_measured_is_absent(tmp_path):
  """Labels that nobody knows: what compares with the teacher is all there is."""
  truth = np.full((SIZE, 1), np.nan)
  outputs = noisy(np.zeros((SIZE, 1)), NEAR)
  numbers = reported(tmp_path, tasks.regression(), truth, outputs, ignore=float("nan"))
  student = numbers["models"]["student"]
  assert not {"rmse", "mae", "r2", "per_seed"} & set(student)
  assert "gain" not in numbers
  assert set(numbers["gap_closed"]) == {"note"}
  assert numbers["fidelity"]["rmse_to_teacher"]["mean"] > 0
  assert "root mean squared error was not measured" in numbers["verdict"]
  assert numbers["decision"]["word"] == "Undecided"
  assert numbers["paired"] == []


@pytest.mark.slow
def test_what_is_not_finite_is_told_and_judges_nothing(tmp_path):
  truth = np.random.default_rng(7).normal(size=(SIZE, 1))
  outputs = noisy(truth, NEAR)
  outputs["student"][:, 3] = np.nan
  inputs = np.arange(SIZE, dtype=np.float32)[:, None]
  examples = data.from_arrays(inputs, truth)
  path, _ = reports.compare_students(
    tmp_path,
    network={"student": says(outputs["student"], seeds=SEEDS)},
    teacher=teachers.frozen(says(outputs["teacher"])),
    batches=data.evaluation_batches(examples, batch_size=8),
    examples=examples,
    task=tasks.regression(),
  )
  numbers = json.loads((tmp_path / "report.json").read_text())
  assert numbers["models"]["student"]["rmse"] == {"mean": None}
  assert numbers["decision"]["word"] == "Undecided"
  assert "error is not a number in any seed" in path.read_text()
  assert all(row["examples"] == SIZE - 1 for row in numbers["paired"])


@pytest.mark.slow
def test_two_runs_are_judged_the_right_way_round(tmp_path, capsys):
  truth = np.random.default_rng(8).normal(size=(SIZE, 1))
  near, far = (noisy(truth, {**NEAR, "student": scale}, seed) for seed, scale in ((1, 0.3), (2, 1)))
  for name, outputs in (("near", near), ("far", far)):
    (tmp_path / name).mkdir()
    reported(tmp_path / name, tasks.regression(), truth, outputs)
  out = tmp_path / "both.html"
  # The worse one first: its error is the higher, and higher is not better.
  assert command.main([str(tmp_path / "far"), str(tmp_path / "near"), "--out", str(out)]) == 0
  assert "near is " in capsys.readouterr().out
  numbers = json.loads(out.with_suffix(".json").read_text())
  rmse = [
    [known.root_mean_squared_error(truth, one) for one in outputs["student"]]
    for outputs in (far, near)
  ]
  assert numbers["metrics"]["rmse"]["gain"] == pytest.approx(
    np.mean(rmse[1]) - np.mean(rmse[0]), rel=1e-4
  )
  p_value = scipy.stats.ttest_ind(*rmse, equal_var=False).pvalue
  assert numbers["metrics"]["rmse"]["p_value"] == pytest.approx(p_value, rel=1e-3)
  assert numbers["metrics"]["rmse"]["gain"] < 0
  assert numbers["metrics"]["r2"]["gain"] < 0  # of which higher is better
  squares = [((one["student"] - truth) ** 2).mean() for one in (far, near)]
  tested = numbers["paired"]["squared_error"]
  assert tested["gain"] == pytest.approx(squares[1] - squares[0], rel=1e-4)
  assert tested["high"] < 0
  assert "mcnemar" not in numbers
  assert "near is " in text_of(tmp_path, "both.html")
  same = reports.compare_runs(tmp_path / "far", tmp_path / "far", resamples=100)
  assert same.numbers["verdict"].startswith("No difference beyond noise")
  (tmp_path / "other").mkdir()
  reported(tmp_path / "other", tasks.Task("mine", METRICS, sums), truth[:, 0], far)
  with pytest.raises(ValueError, match="different tasks: far was measured by 'regression'"):
    reports.compare_runs(tmp_path / "far", tmp_path / "other")


@pytest.mark.slow
def test_runs_of_which_nothing_is_kept_are_compared_over_seeds(tmp_path):
  def finish(found):
    return {"root": np.sqrt(found["miss"][0] / found["miss"][1])}

  task = tasks.Task("root", {"root": tasks.Metric("lower")}, sums, finish=finish)
  truth = np.random.default_rng(9).normal(size=SIZE).astype(np.float32)
  for name, scale in (("near", 0.3), ("far", 1.0)):
    outputs = noisy(truth, {**NEAR, "student": scale})
    (tmp_path / name).mkdir()
    numbers = reported(tmp_path / name, task, truth, {n: x[..., None] for n, x in outputs.items()})
    assert "predictions" not in numbers
    assert not any("answers on each example" in one for one in numbers["problems"])
  compared = reports.compare_runs(tmp_path / "far", tmp_path / "near")
  assert compared.answers is None
  assert compared.numbers["verdict"].startswith("near is ")
  assert "over seeds, p = " in compared.numbers["verdict"]
  assert "over their seeds alone" in compared.numbers["notes"][0]
  reports.write_comparison(tmp_path / "both.html", compared)


def test_a_report_of_version_3_is_read_as_it_was(tmp_path):
  found = fabricated.gathered()
  folder = fabricated.run(tmp_path / "run", found)
  numbers = json.loads((folder / "report.json").read_text())
  before = {key: value for key, value in numbers.items() if key not in ("task", "parts", "paired")}
  before["version"] = 3
  for one in before["models"].values():
    one["accuracy_per_seed"] = one.pop("per_seed")["accuracy"]
  (folder / "report.json").write_text(json.dumps(before))
  read = evidence.read(folder)
  assert read.problems == []
  assert read.whole is None  # an earlier version's, which is nobody's to overwrite
  each = read.report["models"]["student"]["per_seed"]["accuracy"]
  np.testing.assert_allclose(each, found.correct("student").mean(axis=1))
  assert document.first(read.report).name == "accuracy"


@pytest.mark.slow
def test_answers_alone_tell_what_they_can(tmp_path):
  truth = np.random.default_rng(1).normal(size=(SIZE, 1))
  outputs = noisy(truth, NEAR)
  reported(tmp_path, tasks.regression(), truth, outputs)
  (tmp_path / "report.json").unlink()
  reports.render_report(tmp_path)
  text = (tmp_path / "report.md").read_text()
  assert "report.json is missing" in text
  squares = ((outputs["student"] - truth) ** 2).mean(axis=(1, 2))
  read = evidence.read(tmp_path)
  assert read.report["models"]["student"]["squared_error"]["mean"] == pytest.approx(
    squares.mean(), rel=1e-4
  )
  assert read.report["task"]["name"] == "regression"


@pytest.mark.slow
def test_details_are_kept_as_they_were_and_damage_is_said(tmp_path):
  truth = np.random.default_rng(1).normal(size=(SIZE, 2))
  reported(tmp_path, tasks.regression(), truth, noisy(truth, NEAR))
  path = tmp_path / "predictions.npz"
  found = predictions.load(path)
  predictions.save(tmp_path / "again.npz", found)
  again = predictions.load(tmp_path / "again.npz")
  assert (again.task, again.truth) == (found.task, found.truth)
  for name, one in found.details.items():
    for field in ("values", "parts", "points"):
      for key, values in getattr(one, field).items():
        np.testing.assert_array_equal(getattr(again.details[name], field)[key], values)
    assert again.details[name].said == one.said
  kept = found.take(np.array([3, 1]))
  np.testing.assert_array_equal(
    kept.values("student")["mae"], found.values("student")["mae"][:, [3, 1]]
  )
  assert analysis.parts(kept) == analysis.parts(found)
  short = {n: np.zeros((SEEDS, 5)) for n in found.values("student")}
  found.details["student"].values.update(short)
  predictions.save(path, found)
  with pytest.raises(ValueError, match="is damaged"):
    predictions.load(path)


def test_a_gap_may_be_closed_downwards():
  sides = ([1.0], [4.0, 5.0], [2.0, 2.5])
  down = metrics.gap_closed(*sides, better="lower")
  up = metrics.gap_closed(*(-np.array(side) for side in sides))
  assert down["value"] == up["value"] == pytest.approx(2.25 / 3.5)
  assert (down["low"], down["high"]) == (up["low"], up["high"])
  none = metrics.gap_closed([5.0], [4.0, 4.1], [2.0, 2.5], better="lower")
  assert "not below the baseline beyond noise" in none["note"]
  with small_networks.untyped(), pytest.raises(ValueError, match="better='less' must be"):
    metrics.gap_closed(*sides, better="less")


@pytest.mark.slow
def test_what_is_no_task_or_no_model_is_said(tmp_path):
  examples = data.from_arrays(np.zeros((4, 1), np.float32), np.zeros(4))
  batches = data.evaluation_batches(examples, batch_size=4)
  rest = {"teacher": teachers.frozen(says(np.zeros((4, 1)))), "batches": batches, "examples": 4}
  network = {"student": says(np.zeros((4, 1)))}
  with small_networks.untyped():
    with pytest.raises(TypeError, match="task='regression' must be an evaluation.tasks.Task"):
      reports.compare_students(tmp_path, network=network, task="regression", **rest)
    for wrong in ({"baseline": network["student"]}, network["student"]):
      with pytest.raises(TypeError, match="must be the Network of both runs, or the models"):
        reports.compare_students(tmp_path, network=wrong, **rest)


def test_all_models_are_measured_by_one_task():
  found = fabricated.gathered(seeds=1)
  teacher = dataclasses.replace(fabricated.measured(found, "teacher"), task=tasks.regression())
  with pytest.raises(ValueError, match="by the task 'regression' and the student by another"):
    fabricated.built(found, teacher=teacher)
