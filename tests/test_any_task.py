"""Of each task: a user's own network and arrays, to report and loaded student, in fifteen lines.

The lines are the body of a function each, counted here: a teacher that is trained, the same network
on labels alone, the student, the report, the student loaded again. What the report says is
scikit-learn's number, of the loaded student's outputs, on batches that are ragged, padded and
weighted, and students that were trained on two devices.
"""

import inspect

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
import sklearn.datasets
import sklearn.metrics
import sklearn.neighbors

import fabricated
import jaxdistill as jd
from jaxdistill import data, evaluation, networks, recipes
from jaxdistill.evaluation import tasks
from jaxdistill.types import Model


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
  """What the networks cost was measured before: a clock says nothing of a task."""

  def costs(model, batches, **options):
    return fabricated.STUDENT if isinstance(model, Model) else fabricated.TEACHER

  monkeypatch.setattr(evaluation, "costs", costs)


def dense_net(width, out):
  return networks.linen(nn.Sequential([nn.Dense(width), nn.tanh, nn.Dense(out)]))


def convolve(width):
  return networks.linen(nn.Sequential([nn.Conv(width, (3, 3)), nn.relu, nn.Conv(3, (1, 1))]))


def reader(width):
  return networks.linen(nn.Sequential([nn.Embed(11, width), nn.Dense(11)]))


class Seen(nn.Module):
  """Digits as vectors of eight, and a class of each."""

  width: int

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(8, name="pooled")(nn.tanh(nn.Dense(self.width)(x)))
    return nn.Dense(10)(nn.tanh(x))


def seen(width):
  return networks.linen(Seen(width), features=["pooled"])


class Pair(nn.Module):
  """Two towers of vectors of length one."""

  width: int

  @nn.compact
  def __call__(self, inputs):
    read = {name: nn.tanh(nn.Dense(self.width)(inputs[name])) for name in ("image", "text")}
    made = {name: nn.Dense(8, name=name)(x) for name, x in read.items()}
    return {name: x / jnp.linalg.norm(x, axis=-1, keepdims=True) for name, x in made.items()}


def towers(width):
  return networks.linen(Pair(width), logits=False)


def classes(folder, x, y, weight):
  cut, steps = len(x) // 2, {"optimizer": optax.adam(1e-2), "steps": 12}
  train = data.from_arrays(x[:cut], y[:cut])
  held_out = data.from_arrays(x[cut:], y[cut:], weight=weight[cut:])
  batches = data.evaluation_batches(held_out, batch_size=32)
  source = data.on_device(train, batch_size=16, data_seed=0)
  large, small = dense_net(32, 3), dense_net(4, 3)
  teacher = jd.teachers.frozen(jd.fit(large, recipes.labels(), data=source, **steps))
  jd.fit(small, recipes.labels(), data=source, run=folder / "baseline", **steps)
  jd.fit(small, recipes.kd(), data=source, teacher=teacher, run=folder / "student", **steps)
  beside = {"teacher": teacher, "batches": batches, "examples": held_out}
  _, report = jd.reports.compare_students(folder, network=small, **beside)
  return report, jd.export.load_student(folder / "student")


def numbers(folder, x, y, weight):
  cut, steps = len(x) // 2, {"optimizer": optax.adam(1e-2), "steps": 12}
  train = data.from_arrays(x[:cut], y[:cut])
  held_out = data.from_arrays(x[cut:], y[cut:], weight=weight[cut:])
  batches = data.evaluation_batches(held_out, batch_size=64)
  source = data.on_device(train, batch_size=32, data_seed=0)
  large, small, task = dense_net(32, 2), dense_net(4, 2), tasks.regression()
  alone, taught = recipes.regression(soft_weight=None), recipes.regression()
  teacher = jd.teachers.frozen(jd.fit(large, alone, data=source, **steps))
  jd.fit(small, alone, data=source, run=folder / "baseline", **steps)
  jd.fit(small, taught, data=source, teacher=teacher, run=folder / "student", **steps)
  beside = {"teacher": teacher, "batches": batches, "examples": held_out}
  _, report = jd.reports.compare_students(folder, network=small, task=task, **beside)
  return report, jd.export.load_student(folder / "student")


def doubts(folder, x, y, weight):
  cut, steps = len(x) // 2, {"optimizer": optax.adam(1e-2), "steps": 12}
  train = data.from_arrays(x[:cut], y[:cut])
  held_out = data.from_arrays(x[cut:], y[cut:], weight=weight[cut:])
  batches = data.evaluation_batches(held_out, batch_size=64)
  source = data.on_device(train, batch_size=32, data_seed=0)
  large, small, task = dense_net(32, 2), dense_net(4, 2), tasks.regression(variance=True)
  alone, taught = recipes.gaussian_regression(soft_weight=None), recipes.gaussian_regression()
  teacher = jd.teachers.frozen(jd.fit(large, alone, data=source, **steps))
  jd.fit(small, alone, data=source, run=folder / "baseline", **steps)
  jd.fit(small, taught, data=source, teacher=teacher, run=folder / "student", **steps)
  beside = {"teacher": teacher, "batches": batches, "examples": held_out}
  _, report = jd.reports.compare_students(folder, network=small, task=task, **beside)
  return report, jd.export.load_student(folder / "student")


def tags(folder, x, y, weight):
  cut, steps = len(x) // 2, {"optimizer": optax.adam(1e-2), "steps": 12}
  train = data.from_arrays(x[:cut], y[:cut])
  held_out = data.from_arrays(x[cut:], y[cut:], weight=weight[cut:])
  batches = data.evaluation_batches(held_out, batch_size=64)
  source = data.on_device(train, batch_size=32, data_seed=0)
  large, small, task = dense_net(32, 5), dense_net(4, 5), tasks.multilabel()
  alone, taught = recipes.multi_label(soft_weight=None), recipes.multi_label()
  teacher = jd.teachers.frozen(jd.fit(large, alone, data=source, **steps))
  jd.fit(small, alone, data=source, run=folder / "baseline", **steps)
  jd.fit(small, taught, data=source, teacher=teacher, run=folder / "student", **steps)
  beside = {"teacher": teacher, "batches": batches, "examples": held_out}
  _, report = jd.reports.compare_students(folder, network=small, task=task, **beside)
  return report, jd.export.load_student(folder / "student")


def pixels(folder, images, masks):
  cut, steps = len(images) // 2, {"optimizer": optax.adam(1e-2), "steps": 12}
  known, scale = {"ignore": 255, "num_classes": 3}, {"normalize": data.DIGITS}
  train = data.from_arrays(images[:cut], masks[:cut], **known)
  held_out = data.from_arrays(images[cut:], masks[cut:], **known)
  batches = data.evaluation_batches(held_out, batch_size=64, **scale)
  source = data.on_device(train, batch_size=32, data_seed=0, **scale)
  large, small, task = convolve(8), convolve(2), tasks.dense()
  teacher = jd.teachers.frozen(jd.fit(large, recipes.labels(), data=source, **steps))
  jd.fit(small, recipes.labels(), data=source, run=folder / "baseline", **steps)
  jd.fit(small, recipes.kd(), data=source, teacher=teacher, run=folder / "student", **steps)
  beside = {"teacher": teacher, "batches": batches, "examples": held_out}
  _, report = jd.reports.compare_students(folder, network=small, task=task, **beside)
  return report, jd.export.load_student(folder / "student")


def words(folder, ids, following, there):
  cut, steps = len(ids) // 2, {"optimizer": optax.adam(1e-2), "steps": 12}
  train = data.from_arrays(ids[:cut], following[:cut], weight=there[:cut])
  held_out = data.from_arrays(ids[cut:], following[cut:], weight=there[cut:])
  batches = data.evaluation_batches(held_out, batch_size=16)
  source = data.on_device(train, batch_size=8, data_seed=0)
  large, small, task = reader(16), reader(4), tasks.tokens()
  teacher = jd.teachers.frozen(jd.fit(large, recipes.labels(), data=source, **steps))
  jd.fit(small, recipes.labels(), data=source, run=folder / "baseline", **steps)
  jd.fit(small, recipes.kd(), data=source, teacher=teacher, run=folder / "student", **steps)
  beside = {"teacher": teacher, "batches": batches, "examples": held_out}
  _, report = jd.reports.compare_students(folder, network=small, task=task, **beside)
  return report, jd.export.load_student(folder / "student")


def vectors(folder, x, y, weight):
  cut, steps = len(x) // 2, {"optimizer": optax.adam(1e-2), "steps": 12}
  train = data.from_arrays(x[:cut], y[:cut])
  held_out = data.from_arrays(x[cut:], y[cut:], weight=weight[cut:])
  batches = data.evaluation_batches(held_out, batch_size=64)
  source = data.on_device(train, batch_size=32, data_seed=0)
  large, small, task = seen(32), seen(4), tasks.embedding("pooled")
  teacher = jd.teachers.frozen(jd.fit(large, recipes.labels(), data=source, **steps))
  jd.fit(small, recipes.labels(), data=source, run=folder / "baseline", **steps)
  run = jd.train.Run(folder / "student", outputs=["pooled"])  # the vectors are deployed
  jd.fit(small, recipes.rkd(), data=source, teacher=teacher, run=run, **steps)
  beside = {"teacher": teacher, "batches": batches, "examples": held_out}
  _, report = jd.reports.compare_students(folder, network=small, task=task, **beside)
  return report, jd.export.load_student(folder / "student")


def pairs(folder, image, text, weight):
  cut, steps = len(image) // 2, {"optimizer": optax.adam(1e-2), "steps": 12}
  train = data.from_arrays({"image": image[:cut], "text": text[:cut]}, None)
  seen_late = {"image": image[cut:], "text": text[cut:]}
  held_out = data.from_arrays(seen_late, None, weight=weight[cut:])
  batches = data.evaluation_batches(held_out, batch_size=64)
  source = data.on_device(train, batch_size=32, data_seed=0)
  large, small, task = towers(32), towers(4), tasks.retrieval("image", "text", at=(1, 5))
  alone, taught = recipes.affinity(affinity_weight=None), recipes.affinity()
  teacher = jd.teachers.frozen(jd.fit(large, alone, data=source, **steps))
  jd.fit(small, alone, data=source, run=folder / "baseline", **steps)
  jd.fit(small, taught, data=source, teacher=teacher, run=folder / "student", **steps)
  beside = {"teacher": teacher, "batches": batches, "examples": held_out}
  _, report = jd.reports.compare_students(folder, network=small, task=task, **beside)
  return report, jd.export.load_student(folder / "student")


@pytest.mark.parametrize(
  "lines", [classes, numbers, doubts, tags, pixels, words, vectors, pairs], ids=lambda f: f.__name__
)
def test_the_lines_are_no_more_than_fifteen(lines):
  assert len(inspect.getsource(lines).splitlines()[1:]) <= 15


def measured(report):
  """What the report says of the student, of its one seed; that teacher and baseline are there."""
  assert set(report["models"]) == {"teacher", "baseline", "student"}
  assert report["verdict"]
  return {name: values[0] for name, values in report["models"]["student"]["per_seed"].items()}


def close(found, name, wanted):
  np.testing.assert_allclose(found[name], wanted, rtol=2e-5, err_msg=name)


def weights(size):
  """Some of them 0: they count nowhere."""
  return np.arange(size) % 3 / 2


def shares_of(logits):
  shares = np.exp(logits - logits.max(-1, keepdims=True))
  return shares / shares.sum(-1, keepdims=True)


@pytest.mark.slow
def test_classes(tmp_path):
  x, y = sklearn.datasets.load_wine(return_X_y=True)
  order = np.random.default_rng(0).permutation(len(x))
  x, y, weight = ((x - x.mean(0)) / x.std(0)).astype(np.float32)[order], y[order], weights(len(x))
  report, loaded = classes(tmp_path, x, y, weight)
  found, cut = measured(report), len(x) // 2
  logits, y, w = np.float64(loaded.predict(x[cut:])), y[cut:], weight[cut:]
  accuracy = sklearn.metrics.accuracy_score(y, logits.argmax(1), sample_weight=w)
  close(found, "accuracy", accuracy)
  close(found, "nll", sklearn.metrics.log_loss(y, shares_of(logits), sample_weight=w))


@pytest.mark.slow
def test_numbers(tmp_path):
  x, y = sklearn.datasets.load_diabetes(return_X_y=True)
  both, weight = np.stack([y / 100, np.sin(y)], 1), weights(len(x))
  report, loaded = numbers(tmp_path, 10 * x.astype(np.float32), both, weight)
  found, cut = measured(report), len(x) // 2
  said = loaded.predict(10 * x[cut:].astype(np.float32))
  y, w = both[cut:], weight[cut:]
  per = {"sample_weight": w, "multioutput": "uniform_average"}
  close(found, "mae", sklearn.metrics.mean_absolute_error(y, said, **per))
  close(found, "r2", sklearn.metrics.r2_score(y, said, **per))
  each = sklearn.metrics.mean_squared_error(y, said, sample_weight=w, multioutput="raw_values")
  close(found, "rmse", np.sqrt(each).mean())
  assert report["fidelity"]["rmse_to_teacher"]["mean"] > 0


@pytest.mark.slow
def test_doubts(tmp_path):
  x, y = sklearn.datasets.load_diabetes(return_X_y=True)
  x, y, weight = 10 * x.astype(np.float32), y / 100, weights(len(x))
  report, loaded = doubts(tmp_path, x, y, weight)
  found, cut = measured(report), len(x) // 2
  mean, log_variance = np.float64(loaded.predict(x[cut:])).T
  y, w = y[cut:], weight[cut:]
  normal = scipy.stats.norm(mean, np.exp(log_variance / 2))
  close(found, "nll", np.average(-normal.logpdf(y), weights=w))
  close(found, "rmse", sklearn.metrics.root_mean_squared_error(y, mean, sample_weight=w))
  levels = np.arange(1, 10) / 10
  ends = [normal.interval(level) for level in levels]
  shares = [np.average((low <= y) & (y <= high), weights=w) for low, high in ends]
  close(found, "interval_error", np.abs(shares - levels).mean())


@pytest.mark.slow
def test_tags(tmp_path):
  x, y = sklearn.datasets.make_multilabel_classification(151, 6, n_classes=5, random_state=0)
  x, weight = x.astype(np.float32) / 10, weights(151)
  report, loaded = tags(tmp_path, x, y.astype(bool), weight)
  found, cut = measured(report), 151 // 2
  logits, y, w = loaded.predict(x[cut:]), y[cut:], weight[cut:]
  said = logits >= 0
  precision = sklearn.metrics.average_precision_score
  each = [precision(y[:, k], logits[:, k], sample_weight=w) for k in range(5)]
  close(found, "map", np.mean(each))
  for kind in ("micro", "macro"):
    wanted = sklearn.metrics.f1_score(y, said, average=kind, sample_weight=w)
    close(found, f"f1_{kind}", wanted)
  close(found, "exact", sklearn.metrics.accuracy_score(y, said, sample_weight=w))
  loss = [
    sklearn.metrics.log_loss(y[:, k], 1 / (1 + np.exp(-np.float64(logits[:, k]))), sample_weight=w)
    for k in range(5)
  ]
  close(found, "nll", np.mean(loss))


@pytest.mark.slow
def test_pixels(tmp_path):
  images = sklearn.datasets.load_digits().images[:151, ..., None].astype(np.uint8)
  masks = np.digitize(images[..., 0], [4, 12]).astype(np.uint8)
  masks[:, :, 0] = 255
  report, loaded = pixels(tmp_path, images, masks)
  found, cut = measured(report), 151 // 2
  said, y = loaded.predict(images[cut:]).argmax(-1), masks[cut:]
  assert loaded.inputs.dtype == np.uint8
  there = y != 255
  close(found, "pixel_accuracy", sklearn.metrics.accuracy_score(y[there], said[there]))
  each = sklearn.metrics.jaccard_score(y[there], said[there], average=None)
  close(found, "miou", each.mean())
  wanted = sklearn.metrics.balanced_accuracy_score(y[there], said[there])
  close(found, "class_accuracy", wanted)


@pytest.mark.slow
def test_words(tmp_path):
  rng = np.random.default_rng(0)
  ids = rng.integers(0, 11, (41, 9)).astype(np.int32)
  following = (ids * 3 + 1) % 11
  there = (np.arange(9) < rng.integers(2, 10, 41)[:, None]).astype(np.float32)
  report, loaded = words(tmp_path, ids, following, there)
  found, cut = measured(report), 41 // 2
  logits, where = np.float64(loaded.predict(ids[cut:])), there[cut:] > 0
  y, scores = following[cut:][where], logits[where]
  close(found, "accuracy", sklearn.metrics.accuracy_score(y, scores.argmax(1)))
  loss = sklearn.metrics.log_loss(y, shares_of(scores), labels=range(11))
  close(found, "nll", loss)
  close(found, "perplexity", np.exp(loss))


@pytest.mark.slow
def test_vectors(tmp_path):
  digits = sklearn.datasets.load_digits()
  x, y, weight = digits.data[:151].astype(np.float32) / 16, digits.target[:151], weights(151)
  report, loaded = vectors(tmp_path, x, y, weight)
  found, cut = measured(report), 151 // 2
  there = weight[cut:] > 0
  said = np.float64(loaded.predict(x[cut:]))[there]
  y, w = y[cut:][there], weight[cut:][there]
  # A vector's own place is left out by asking for no rows: those of the fit are meant then.
  near = sklearn.neighbors.NearestNeighbors(n_neighbors=5, metric="cosine").fit(said)
  rows = near.kneighbors(return_distance=False)
  close(found, "recall_at_1", np.average(y[rows[:, 0]] == y, weights=w))
  close(found, "recall_at_k", np.average((y[rows] == y[:, None]).any(1), weights=w))
  assert 0 <= report["fidelity"]["neighbour_agreement"]["mean"] <= 1


@pytest.mark.slow
def test_pairs(tmp_path):
  digits = sklearn.datasets.load_digits()
  image = digits.data[:151].astype(np.float32) / 16
  text = np.concatenate([np.eye(10)[digits.target[:151]], image[:, 3::8]], 1).astype(np.float32)
  weight = weights(151)
  report, loaded = pairs(tmp_path, image, text, weight)
  found, cut = measured(report), 151 // 2
  assert loaded.outputs == ("image", "text")
  there = weight[cut:] > 0
  said = loaded.predict({"image": image[cut:], "text": text[cut:]})
  scores = np.float64(said["image"][there]) @ np.float64(said["text"][there]).T
  for way, one in (("image_to_text", scores), ("text_to_image", scores.T)):
    for k in (1, 5):
      # scikit-learn asks whether the class of a row is among its k highest scores.
      wanted = sklearn.metrics.top_k_accuracy_score(
        np.arange(len(one)), one, k=k, sample_weight=weight[cut:][there]
      )
      close(found, f"{way}_at_{k}", wanted)
