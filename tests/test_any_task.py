"""Of each task: a user's own network and arrays, to the loaded student, in at most fifteen lines.

The lines are the body of a function each, counted here; what they measure is scikit-learn's number,
of the loaded student's outputs, on batches that are ragged, padded and weighted, and students that
were trained on two devices.
"""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sklearn.datasets
import sklearn.metrics
import sklearn.neighbors

import jaxdistill as jd
from jaxdistill import data, evaluation, export, losses, networks, recipes
from jaxdistill.evaluation import tasks
from jaxdistill.types import Model, Term

QUIET = {"optimizer": optax.adam(1e-2), "steps": 12}


def teacher_of(module, inputs, **options):
  """A larger network, not trained: what it says is as good to compare with."""
  network = networks.linen(module, **options)
  first = jax.tree.map(lambda leaf: jnp.asarray(leaf[:1]), inputs)
  return jd.teachers.frozen(Model(network, network.init(jax.random.key(3), first)))


def dense_net(width, out):
  return nn.Sequential([nn.Dense(width), nn.tanh, nn.Dense(out)])


def convolve(width):
  return nn.Sequential([nn.Conv(width, (3, 3)), nn.relu, nn.Conv(3, (1, 1))])


def reader(width):
  return nn.Sequential([nn.Embed(11, width), nn.Dense(11)])


def numbers(folder, x, y, weight):
  cut = len(x) // 2
  train = data.from_arrays(x[:cut], y[:cut])
  held_out = data.from_arrays(x[cut:], y[cut:], weight=weight[cut:])
  batches = data.evaluation_batches(held_out, batch_size=64)
  teacher = teacher_of(dense_net(32, 2), x)
  student = networks.linen(dense_net(4, 2))
  source = data.on_device(train, batch_size=32, data_seed=0)
  jd.fit(student, recipes.regression(), data=source, teacher=teacher, run=folder, **QUIET)
  loaded = export.load_student(folder)
  model = Model(student, loaded.variables)
  return evaluation.evaluate(model, batches, task=tasks.regression(), teacher=teacher), loaded


def tags(folder, x, y, weight):
  cut = len(x) // 2
  train = data.from_arrays(x[:cut], y[:cut])
  held_out = data.from_arrays(x[cut:], y[cut:], weight=weight[cut:])
  batches = data.evaluation_batches(held_out, batch_size=64)
  teacher = teacher_of(dense_net(32, 5), x)
  student = networks.linen(dense_net(4, 5))
  source = data.on_device(train, batch_size=32, data_seed=0)
  jd.fit(student, recipes.multi_label(), data=source, teacher=teacher, run=folder, **QUIET)
  loaded = export.load_student(folder)
  model = Model(student, loaded.variables)
  return evaluation.evaluate(model, batches, task=tasks.multilabel(), teacher=teacher), loaded


def pixels(folder, images, masks):
  cut = len(images) // 2
  train, held_out = (
    data.from_arrays(images[part], masks[part], ignore=255, num_classes=3)
    for part in (slice(cut), slice(cut, None))
  )
  batches = data.evaluation_batches(held_out, batch_size=64, normalize=data.DIGITS)
  teacher = teacher_of(convolve(8), images.astype(np.float32))
  student = networks.linen(convolve(2))
  source = data.on_device(train, batch_size=32, data_seed=0, normalize=data.DIGITS)
  jd.fit(student, recipes.kd(), data=source, teacher=teacher, run=folder, **QUIET)
  loaded = export.load_student(folder)
  return evaluation.evaluate(Model(student, loaded.variables), batches, task=tasks.dense()), loaded


def words(folder, ids, following, there):
  cut = len(ids) // 2
  train, held_out = (
    data.from_arrays(ids[part], following[part], weight=there[part])
    for part in (slice(cut), slice(cut, None))
  )
  batches = data.evaluation_batches(held_out, batch_size=16)
  teacher = teacher_of(reader(16), ids)
  student = networks.linen(reader(4))
  source = data.on_device(train, batch_size=8, data_seed=0)
  jd.fit(student, recipes.kd(), data=source, teacher=teacher, run=folder, **QUIET)
  loaded = export.load_student(folder)
  return evaluation.evaluate(Model(student, loaded.variables), batches, task=tasks.tokens()), loaded


class Pair(nn.Module):
  """Two towers of vectors of length one."""

  width: int

  @nn.compact
  def __call__(self, inputs):
    read = {name: nn.tanh(nn.Dense(self.width)(inputs[name])) for name in ("image", "text")}
    made = {name: nn.Dense(8, name=name)(x) for name, x in read.items()}
    return {name: x / jnp.linalg.norm(x, axis=-1, keepdims=True) for name, x in made.items()}


def affinity(student, teacher, batch):
  ours, theirs = (one.features["image"] @ one.features["text"].T for one in (student, teacher))
  return {"affinity": Term(losses.soft_target_kl(ours, theirs, temperature=0.2))}


def towers(folder, inputs, labels):
  cut = len(labels) // 2
  train = data.from_arrays({name: x[:cut] for name, x in inputs.items()}, labels[:cut])
  held_out = data.from_arrays({name: x[cut:] for name, x in inputs.items()}, labels[cut:])
  batches = data.evaluation_batches(held_out, batch_size=64)
  teacher = teacher_of(Pair(32), inputs, logits=False)
  student = networks.linen(Pair(4), logits=False)
  source = data.on_device(train, batch_size=32, data_seed=0)
  jd.fit(student, affinity, data=source, teacher=teacher, run=folder, **QUIET)
  loaded, task = export.load_student(folder), tasks.embedding("image")
  model = Model(student, loaded.variables)
  return evaluation.evaluate(model, batches, task=task, teacher=teacher), loaded


@pytest.mark.parametrize("lines", [numbers, tags, pixels, words, towers])
def test_the_lines_are_no_more_than_fifteen(lines):
  body = inspect.getsource(lines).splitlines()[1:]
  # A bracket that is closed three lines further down is one thing that is said.
  assert len(body) <= 15


def close(found, name, wanted):
  np.testing.assert_allclose(found[name], wanted, rtol=2e-5, err_msg=name)


def test_numbers(tmp_path):
  x, y = sklearn.datasets.load_diabetes(return_X_y=True)
  both = np.stack([y / 100, np.sin(y)], 1)
  weight = np.arange(len(x)) % 3 / 2
  found, loaded = numbers(tmp_path, 10 * x.astype(np.float32), both, weight)
  cut = len(x) // 2
  said = loaded.predict(10 * x[cut:].astype(np.float32))
  y, w = both[cut:], weight[cut:]
  per = {"sample_weight": w, "multioutput": "uniform_average"}
  close(found, "mae", sklearn.metrics.mean_absolute_error(y, said, **per))
  close(found, "r2", sklearn.metrics.r2_score(y, said, **per))
  each = sklearn.metrics.mean_squared_error(y, said, sample_weight=w, multioutput="raw_values")
  close(found, "rmse", np.sqrt(each).mean())
  assert found["rmse_to_teacher"] > 0


@pytest.mark.slow
def test_tags(tmp_path):
  x, y = sklearn.datasets.make_multilabel_classification(151, 6, n_classes=5, random_state=0)
  x, weight = x.astype(np.float32) / 10, np.arange(151) % 3 / 2
  found, loaded = tags(tmp_path, x, y.astype(bool), weight)
  cut = 151 // 2
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
  found, loaded = pixels(tmp_path, images, masks)
  cut = 151 // 2
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
  found, loaded = words(tmp_path, ids, following, there)
  cut = 41 // 2
  logits, where = np.float64(loaded.predict(ids[cut:])), there[cut:] > 0
  y, scores = following[cut:][where], logits[where]
  shares = np.exp(scores - scores.max(1, keepdims=True))
  shares /= shares.sum(1, keepdims=True)
  close(found, "accuracy", sklearn.metrics.accuracy_score(y, scores.argmax(1)))
  loss = sklearn.metrics.log_loss(y, shares, labels=range(11))
  close(found, "nll", loss)
  close(found, "perplexity", np.exp(loss))


@pytest.mark.slow
def test_two_towers(tmp_path):
  digits = sklearn.datasets.load_digits()
  labels = digits.target[:151]
  inputs = {"image": digits.data[:151].astype(np.float32) / 16}
  inputs["text"] = np.eye(10, dtype=np.float32)[labels]
  found, loaded = towers(tmp_path, inputs, labels)
  cut = 151 // 2
  assert loaded.outputs == ("image", "text")
  vectors = np.float64(loaded.predict({name: x[cut:] for name, x in inputs.items()})["image"])
  y = labels[cut:]
  # A vector's own place is left out by asking for one neighbour more.
  near = sklearn.neighbors.NearestNeighbors(n_neighbors=6, metric="cosine").fit(vectors)
  places = near.kneighbors(return_distance=False, n_neighbors=5)
  close(found, "recall_at_1", (y[places[:, 0]] == y).mean())
  close(found, "recall_at_k", (y[places] == y[:, None]).any(1).mean())
  assert 0 <= found["neighbour_agreement"] <= 1
