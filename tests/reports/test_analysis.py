"""Answers and what they say: against the metrics of the same logits, by hand, and from a file."""

import dataclasses
import json
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

import fabricated
from jaxdistill import data, evaluation, teachers
from jaxdistill.evaluation import metrics, predictions
from jaxdistill.evaluation.predictions import Answers, Column, Predictions
from jaxdistill.reports._pages import analysis, evidence, exhibits
from jaxdistill.types import Model, Network, Outputs


@pytest.mark.slow
def test_answers_give_the_metrics_of_the_same_logits():
  random = np.random.default_rng(0)
  logits = random.normal(0, 2, (500, 6)).astype(np.float32)
  logits[7, 2] = np.nan
  labels = random.integers(0, 6, 500).astype(np.int32)
  made = metrics.answers(jnp.asarray(logits), jnp.asarray(labels))
  one = Answers(**{name: np.asarray(values)[None] for name, values in made.items()})
  assert one.predicted[0, 7] == -1
  found = Predictions(np.arange(500), labels, {"student": one}, "made up", "test")
  there = np.arange(500) != 7
  known = metrics.finish(
    metrics.classification_sums(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(there))
  )
  quality = analysis.quality(found.take(np.flatnonzero(there)), "student")
  for name, values in quality.items():
    assert values[0] == pytest.approx(known[name], abs=1e-5), name  # sums of 500 in float32
  whole = analysis.quality(found, "student")
  assert whole["accuracy"][0] == pytest.approx(known["accuracy"] * 499 / 500)
  assert np.isnan([whole["nll"][0], whole["ece"][0]]).all()
  assert analysis.quality(found.take(np.zeros(0, int)), "student") == {}


@pytest.mark.slow
def test_examine_is_evaluate_with_answers():
  random = np.random.default_rng(1)
  x = random.normal(size=(23, 3)).astype(np.float32)
  examples = data.from_arrays(x, np.argmax(x, axis=1))
  known = np.ones(23, bool)
  known[[0, 11]] = False
  batches = data.evaluation_batches(examples, batch_size=5, labelled=known)
  variables = {"w": jnp.asarray(random.normal(size=(4, 3, 3)).astype(np.float32))}

  def apply(variables, inputs, *, train, key):
    return Outputs(logits=inputs @ variables["w"]), {}

  model = Model(Network(lambda key, inputs: {}, apply), variables, seeds=4)
  one = model.unstack()[0]
  quality, found = evaluation.examine(model, batches, teacher=teachers.frozen(one))
  plain = evaluation.evaluate(model, batches, teacher=teachers.frozen(one))
  assert quality.keys() == plain.keys()
  for name, values in plain.items():
    np.testing.assert_array_equal(quality[name], values)
  index = np.asarray(batches.index).reshape(-1)[predictions.counted(batches)]
  assert index.tolist() == np.flatnonzero(known).tolist()
  logits = np.einsum("nd,sdk->snk", x[index], variables["w"])
  np.testing.assert_array_equal(found.predicted, logits.argmax(axis=-1))
  chances = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
  np.testing.assert_allclose(found.confidence, chances.max(axis=-1), rtol=1e-5)
  _, alone = evaluation.examine(one, batches)
  np.testing.assert_array_equal(alone.predicted, found.predicted[:1])


def test_reliability_puts_edges_to_the_left_and_nan_nowhere():
  sure = np.array([[1 / 15, 0.5, 1.0, np.nan]], np.float32)
  one = Answers(np.array([[0, 0, 1, -1]], np.int32), sure, sure)
  found = Predictions(np.arange(4), np.zeros(4, np.int32), {"student": one}, "made up", "test")
  bins = analysis.reliability(found, "student")
  assert np.flatnonzero(bins["count"][0]).tolist() == [0, 7, 14]
  assert bins["correct"][0, [0, 7, 14]].tolist() == [1, 1, 0]
  assert bins["confidence"].sum() == pytest.approx(1.5 + 1 / 15)


def test_a_class_that_fell_is_found_and_noise_is_not():
  labels = (np.arange(600) % 6).astype(np.int32)
  # Class 4 is lost by half; the others are as the baseline is.
  share = np.where(labels == 4, 0.5, 0.9)
  models = {
    "teacher": fabricated.answers(labels, 0.97, 1, classes=6),
    "baseline": fabricated.answers(labels, 0.9, 4, classes=6, seed=1),
    "student": fabricated.answers(labels, share, 4, classes=6, seed=2),
  }
  found = Predictions(np.arange(600), labels, models, "made up", "test", num_classes=6)
  rows = analysis.classes(found)
  fell = [row["name"] for row in rows if row["changes"]["baseline"]["beyond_noise"]]
  assert fell == ["4"]
  right = found.correct("student")[:, labels == 4]
  assert rows[4]["accuracy"]["student"]["mean"] == right.mean()
  assert (
    rows[4]["accuracy"]["student"]["low"] < right.mean() < rows[4]["accuracy"]["student"]["high"]
  )
  assert rows[4]["examples"] == 100
  taken = models["student"].predicted[:, labels == 4]
  assert sum(times for _, times in rows[4]["taken_for"]) <= (taken != 4).sum() / 4
  assert rows[4]["predicted"] == (models["student"].predicted == 4).sum() / 4


def test_classes_that_are_absent_are_rows_without_numbers():
  found = fabricated.gathered(40, classes=4, num_classes=6, label_names=tuple("abcdef"))
  rows = analysis.classes(found)
  assert [row["name"] for row in rows] == list("abcdef")
  assert rows[5]["examples"] == 0
  assert rows[5]["accuracy"] == rows[5]["changes"] == {}


def test_what_was_lost_is_what_a_sure_teacher_knew():
  labels = np.zeros(6, np.int32)
  sure = np.array([[0.9, 0.9, 0.9, 0.7, 0.9, 0.9]], np.float32)
  teacher = Answers(np.array([[0, 0, 0, 0, 1, 0]], np.int32), sure, sure)
  said = np.array([[1, 1, 0, 1, 0, 0], [1, 0, 0, 1, 0, 0], [1, 1, 0, 1, 0, 1]], np.int32)
  student = Answers(said, np.full((3, 6), 0.6, np.float32), np.full((3, 6), 0.3, np.float32))
  baseline = Answers(np.zeros((1, 6), np.int32), sure, sure)
  models = {"teacher": teacher, "baseline": baseline, "student": student}
  found = analysis.lost(Predictions(np.arange(6), labels, models, "made up", "test"))
  assert found.rows.tolist() == [0, 1, 5]  # wrong in 3, 2 and 1 of 3
  assert (found.known, found.most, found.baseline_right) == (4, 2, 2)
  assert found.gained.tolist() == [4]
  del models["baseline"]
  assert analysis.lost(
    Predictions(np.arange(6), labels, models, "made up", "test"), sure=0.6
  ).rows.tolist() == [0, 3, 1, 5]


@pytest.mark.parametrize(
  ("values", "codes", "names"),
  [
    ([True, False, True], [1, 0, 1], ("no", "yes")),
    ([3, 1, 3], [1, 0, 1], ("1", "3")),
    ([0.5, np.nan, 0.5], [0, -1, 0], ("0.5",)),
    (["b", "", "a"], [1, -1, 0], ("a", "b")),
    (np.array([b"x", None, "y"], dtype=object), [0, -1, 1], ("x", "y")),
    (([1, -1, 0], ["a", "b", "never"]), [1, -1, 0], ("a", "b", "never")),
  ],
)
def test_columns_become_slices(values, codes, names):
  found = predictions.column("it", values, np.arange(3))
  assert (found.codes.tolist(), found.names) == (codes, names)


def test_many_numbers_are_cut_at_their_quartiles():
  values = np.random.default_rng(0).normal(size=1000)
  found = predictions.column("length", values, np.arange(1000))
  assert np.bincount(found.codes).tolist() == [250] * 4
  edges = [float(name.split(" to ")[1]) for name in found.names]
  np.testing.assert_allclose(edges[:3], np.quantile(values, [0.25, 0.5, 0.75]), rtol=1e-3)
  ids = predictions.column("id", [f"n{i}" for i in range(1000)], np.arange(1000))
  assert len(ids.names) == 200
  assert ids.names[-1] == "801 others"
  assert np.sum(ids.codes == 199) == 801


def test_a_column_that_does_not_fit_is_named():
  with pytest.raises(ValueError, match=r"metadata\['font'\] must have one value for each of the 5"):
    predictions.column("font", ["a", "b"], np.arange(5), 5)
  with pytest.raises(
    ValueError, match=r"metadata\['font'\] has codes that are no numbers of its 2"
  ):
    predictions.column("font", ([0, 2], ["a", "b"]), np.arange(2))


def test_predictions_come_back_as_they_were(tmp_path):
  hostile = "<script>\x00'\"&日本\udc80"
  shown = {3: np.arange(12, dtype=np.uint8).reshape(3, 4), 5: hostile}
  columns = {hostile: Column(np.arange(8, dtype=np.int32) % 3 - 1, ("a", hostile))}
  found = fabricated.gathered(8, columns=columns, shown=shown, label_names=(*"abc", hostile))
  path = predictions.save(tmp_path / "predictions.npz", found)
  back = predictions.load(path)
  for name in ("dataset", "split", "seeds", "label_names", "num_classes"):
    assert getattr(back, name) == getattr(found, name)
  np.testing.assert_array_equal(back.shown[3], shown[3])
  assert back.shown[5] == hostile
  assert back.columns[hostile].names == ("a", hostile)
  for name, one in found.models.items():
    for field in ("predicted", "confidence", "probability"):
      kept = getattr(back.models[name], field)
      np.testing.assert_array_equal(kept, getattr(one, field))
      assert kept.dtype == getattr(one, field).dtype
  assert [p.name for p in tmp_path.iterdir()] == ["predictions.npz"]


def flipped(path):
  """One bit, in the middle of the first array's bytes."""
  whole = bytearray(path.read_bytes())
  with zipfile.ZipFile(path) as archive:
    entry = archive.getinfo("labels.npy")
  whole[entry.header_offset + 40 + entry.compress_size // 2] ^= 4
  path.write_bytes(whole)


def about(path, **changed):
  with np.load(path) as archive:
    parts = dict(archive)
  text = json.loads(parts.pop("about").tobytes()) | changed
  np.savez(path, about=np.frombuffer(json.dumps(text).encode(), np.uint8), **parts)


def labelled(path, label):
  with np.load(path) as archive:
    np.savez(path, **{**archive, "labels": np.full_like(archive["labels"], label)})


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (lambda p: p.write_bytes(p.read_bytes()[:-40]), "is damaged"),
    (lambda p: p.write_bytes(b""), "is damaged"),
    (flipped, "is damaged"),
    (lambda p: np.savez(p, labels=np.zeros(3)), "is damaged"),
    (lambda p: np.savez(p, about=np.array([{}], dtype=object)), "is damaged"),
    (lambda p: about(p, models=["teacher", "nobody"]), "is damaged"),
    (lambda p: about(p, num_classes=2**40), "is damaged .*more than 1,000,000 classes"),
    (lambda p: labelled(p, 2**31 - 1), "is damaged .*more than 1,000,000 classes"),
    (lambda p: about(p, format=9), "is of format 9 and this version reads 2"),
  ],
)
def test_a_damaged_file_is_an_error_that_says_so(tmp_path, damage, message):
  path = predictions.save(tmp_path / "predictions.npz", fabricated.gathered(8))
  damage(path)
  with pytest.raises(ValueError, match=message):
    predictions.load(path)


def test_no_file_is_an_error_of_its_own(tmp_path):
  with pytest.raises(FileNotFoundError, match="measure the run again"):
    predictions.load(tmp_path / "predictions.npz")


def test_examples_are_pictures_or_texts():
  pictures = np.random.default_rng(0).integers(0, 17, (5, 8, 8, 1)).astype(np.uint8)
  examples = data.from_arrays(pictures, np.zeros(5, np.int32), num_classes=2)
  found = exhibits.chosen([4, 1], examples)
  np.testing.assert_array_equal(found[4], pictures[4, ..., 0])
  assert list(found) == [4, 1]
  # As a network sees them: stretched to what a picture holds, all by one scale.
  batches = data.evaluation_batches(examples, batch_size=2, normalize=((0.1,), (0.5,)))
  seen = exhibits.chosen([4, 1], batches)
  assert seen[4].dtype == np.uint8
  whole = np.stack([seen[4], seen[1]]).astype(float)
  assert (whole.min(), whole.max()) == (0, 255)
  order = np.argsort(np.stack([pictures[4, ..., 0], pictures[1, ..., 0]]).ravel(), kind="stable")
  assert np.all(np.diff(whole.ravel()[order]) >= 0)
  large = np.zeros((300, 200, 3), np.uint8)
  shrunk = exhibits.chosen([0], data.from_arrays(large[None], [0], num_classes=1))[0]
  assert shrunk.shape == (75, 50, 3)
  tokens = data.from_arrays(np.arange(6).reshape(2, 3), [0, 1])
  assert exhibits.chosen([1], tokens) == {1: "3 4 5"}
  words = ["zero", "one", "two", "three", "four", "five"]
  decoded = exhibits.chosen([1], tokens, lambda ids: " ".join(words[i] for i in ids))
  assert decoded == {1: "three four five"}
  both = {"image": pictures, "length": np.arange(5)}
  assert exhibits.chosen([2], data.from_arrays(both, None))[2].shape == (8, 8)
  assert exhibits.chosen([], tokens) == {}
  with pytest.raises(TypeError, match="show must give a text or a picture"):
    exhibits.chosen([0], tokens, lambda ids: None)
  with pytest.raises(TypeError, match="show must be a function"):
    exhibits.chosen([0], tokens, lambda: "decoded")


def test_a_part_of_the_answers_is_all_of_some_examples():
  found = fabricated.gathered(
    10, columns={"it": Column(np.arange(10, dtype=np.int32), tuple("0123456789"))}
  )
  some = found.take(np.array([7, 2]))
  assert some.index.tolist() == [7, 2]
  assert some.columns["it"].codes.tolist() == [7, 2]
  for name in found.models:
    np.testing.assert_array_equal(some.correct(name), found.correct(name)[:, [7, 2]])
  assert dataclasses.replace(found, label_names=("zero",)).name(3) == "3"


def test_a_class_of_many_that_fell_is_found_with_few_seeds():
  labels = (np.arange(3000) % 100).astype(np.int32)
  share = np.where(labels == 7, 0.3, 0.85)
  models = {
    "teacher": fabricated.answers(labels, 0.92, 1, classes=100),
    "baseline": fabricated.answers(labels, 0.85, 2, classes=100, seed=1),
    "student": fabricated.answers(labels, share, 2, classes=100, seed=2),
  }
  found = Predictions(np.arange(3000), labels, models, "made up", "test", num_classes=100)
  rows = analysis.classes(found)
  for reference in ("baseline", "teacher"):
    fell = [row["name"] for row in rows if row["changes"][reference]["beyond_noise"]]
    assert fell == ["7"]


def test_an_example_that_weighs_twice_is_there_twice(tmp_path):
  font = Column(np.arange(60, dtype=np.int32) % 3, ("serif", "sans", "mono"))
  even = fabricated.gathered(60, columns={"font": font})
  times = np.random.default_rng(0).integers(1, 4, 60)
  heavy = dataclasses.replace(even, weight=(times / 2).astype(np.float32))
  often = even.take(np.repeat(np.arange(60), times))
  for name in even.models:
    ours, wanted = (analysis.quality(one, name) for one in (heavy, often))
    for metric, values in wanted.items():
      np.testing.assert_allclose(ours[metric], values, rtol=1e-12, err_msg=metric)  # float64
  fonts = zip(*(analysis.slices(one)["font"] for one in (heavy, often)), strict=True)
  for ours, wanted in fonts:
    for model, share in wanted["accuracy"].items():
      assert ours["accuracy"][model]["mean"] == pytest.approx(share["mean"])
      assert ours["accuracy"][model]["low"] <= share["low"] + 1e-9  # fewer examples know less
    assert ours["changes"]["teacher"]["change"] == pytest.approx(
      wanted["changes"]["teacher"]["change"]
    )
  gains = [[row["gain"] for row in analysis.paired(one, {})] for one in (heavy, often)]
  np.testing.assert_allclose(*gains, rtol=1e-12)
  assert not np.allclose(gains[0], [row["gain"] for row in analysis.paired(even, {})])
  # What was kept weighs the same, and gives the report's own accuracy.
  folder = fabricated.run(tmp_path / "a", heavy, pages=False)
  read = evidence.read(folder)
  np.testing.assert_array_equal(read.predictions.weight, heavy.weight)
  assert not any("another accuracy" in problem for problem in read.problems)


def test_weights_of_batches_are_those_of_the_examples_that_count():
  x, weight = np.ones((5, 1), np.float32), np.array([1.0, 0, 2, 0.5, 1])
  for given, wanted in ((weight, [1, 2, 0.5, 1]), (weight > 0, None), (None, None)):
    examples = data.from_arrays(x, [0, 1, 0, 1, 1], weight=given)
    batches = data.evaluation_batches(examples, batch_size=2)  # padded
    found = predictions.weight_of(batches, predictions.counted(batches))
    assert wanted is found if wanted is None else found.tolist() == wanted
