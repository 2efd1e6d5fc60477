"""More than the device holds is evaluated batch by batch: the same numbers, in bounded memory."""

import dataclasses
import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxdistill import data, evaluation, networks, recipes, search, teachers, train
from jaxdistill.evaluation import _evaluate, _shared, tasks
from jaxdistill.train import _program
from jaxdistill.types import Batch, Model
from small_networks import dense, untyped

RNG = np.random.default_rng(0)
SIZE = 21


def case(name):
  """Examples of a task, the task, and a network for them."""
  x = RNG.normal(size=(SIZE, 4)).astype(np.float32)
  weight = (np.arange(SIZE) % 4).astype(np.float32)
  if name == "classification":
    return data.from_arrays(x, RNG.integers(0, 3, SIZE), weight=weight), tasks.classification(), 3
  if name == "regression":
    y = RNG.normal(size=(SIZE, 2))
    y[3] = np.nan
    return data.from_arrays(x, y, ignore=float("nan")), tasks.regression(), 2
  if name == "multilabel":
    return data.from_arrays(x, RNG.random((SIZE, 3)) < 0.4, weight=weight), tasks.multilabel(), 3
  images = RNG.integers(0, 256, (SIZE, 4, 4, 1)).astype(np.uint8)
  masks = RNG.integers(0, 3, (SIZE, 4, 4)).astype(np.uint8)
  masks[:, 0] = 255
  return data.from_arrays(images, masks, ignore=255, num_classes=3), tasks.dense(), 3


def pair(examples, **options):
  """The batches on the device, and the same ones streamed."""
  whole = data.evaluation_batches(examples, batch_size=8, **options)
  parts = data.evaluation_batches(examples, batch_size=8, most=0, **options)
  assert isinstance(whole, Batch)
  assert isinstance(parts, data.Batches)
  return whole, parts


def models(task, classes, batches):
  network = networks.linen(nn.Dense(classes))
  first = jax.tree.map(lambda leaf: leaf[0], batches.inputs)
  keys = jax.random.split(jax.random.key(0), 2)
  return Model(network, jax.vmap(network.init, (0, None))(keys, first), 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["classification", "regression", "multilabel", "dense"])
def test_streamed_batches_give_the_same_numbers(name):
  examples, task, classes = case(name)
  whole, parts = pair(examples)
  for i, batch in enumerate(parts):
    for leaf, wanted in zip(jax.tree.leaves(batch), jax.tree.leaves(whole), strict=True):
      np.testing.assert_array_equal(leaf, wanted[i])
  assert i == len(parts) - 1 == 2
  model = models(task, classes, whole)
  teacher = teachers.frozen(model.instance(1))
  for beside in (None, teacher):
    found = [evaluation.evaluate(model, b, teacher=beside, task=task) for b in (whole, parts)]
    assert found[0].keys() == found[1].keys() >= {task.first}
    for metric, value in found[0].items():
      np.testing.assert_array_equal(found[1][metric], value, err_msg=metric)
  told = evaluation.taught(teacher, parts, task=task)
  again = evaluation.evaluate(model, told, task=task)
  assert again.keys() == found[0].keys()
  for metric, value in found[0].items():
    np.testing.assert_allclose(again[metric], value, rtol=1e-6, err_msg=metric)
  validated = evaluation.validator(parts, task=task)(model)
  np.testing.assert_array_equal(validated[task.first], found[0][task.first])


class Rows:
  """Pictures as bytes, each made when it is asked for; counts what was."""

  def __init__(self, examples):
    self.examples, self.asked, self.lock = examples, [], threading.Lock()

  def __len__(self):
    return len(self.examples)

  def __getitem__(self, row):
    with self.lock:
      self.asked.append(row)
    return {"image": self.examples.inputs[row], "label": int(self.examples.labels[row])}


def test_records_are_read_as_they_are_evaluated():
  images = RNG.integers(0, 256, (SIZE, 4, 4, 1)).astype(np.uint8)
  examples = data.from_arrays(images, RNG.integers(0, 3, SIZE))
  rows = Rows(examples)
  records = data.from_sequence(rows, data.Fields(num_classes=3))
  normalize = ((0.5,), (0.25,))
  whole = data.evaluation_batches(examples, batch_size=8, normalize=normalize)
  parts = data.evaluation_batches(records, batch_size=8, normalize=normalize)
  rows.asked.clear()
  assert parts[1].inputs.dtype == np.float32
  assert rows.asked == list(range(8, 16))  # these, and no others
  model = Model(dense(3), dense(3).init(jax.random.key(0), whole.inputs[0]))
  metrics, answers = evaluation.examine(model, parts)
  wanted, theirs = evaluation.examine(model, whole)
  assert metrics == wanted
  np.testing.assert_array_equal(answers.probability, theirs.probability)
  assert evaluation.costs(model, parts, seconds=0.01)["throughput_batch"] == 8
  # Of a stream of a thousand batches two are made ahead, and no more.
  many = dataclasses.replace(parts, count=1000, make=lambda number: parts.make(number % 3))
  rows.asked.clear()
  stream = iter(many)
  next(stream)
  assert len(rows.asked) <= 8 * 6


def test_labels_of_a_stream_are_checked_where_they_come():
  labels = np.zeros(SIZE, np.int32)
  labels[-1] = 4
  examples = data.from_arrays(RNG.normal(size=(SIZE, 4)).astype(np.float32), labels)
  _, parts = pair(examples)
  network = networks.linen(nn.Dense(3))
  model = Model(network, network.init(jax.random.key(0), jnp.zeros((1, 4))))
  with pytest.raises(ValueError, match="the label 4 and the network puts out 3 classes"):
    evaluation.evaluate(model, parts)
  # Without labels there is what compares with a teacher alone.
  unknown = data.from_arrays(examples.inputs, None)
  _, parts = pair(unknown)
  found = evaluation.evaluate(model, parts, teacher=teachers.frozen(model))
  assert found.keys() == {"agreement", "kl"}
  with pytest.raises(ValueError, match="no example of batches has a label"):
    evaluation.validator(parts)
  with untyped(), pytest.raises(ValueError, match="most=-1"):
    data.evaluation_batches(examples, batch_size=8, most=-1)
  with pytest.raises(IndexError, match=r"number=3 must lie in 0 \.\. 2"):
    parts[3]


@pytest.mark.slow
def test_a_search_chooses_on_a_stream():
  examples, _, _ = case("classification")
  whole, parts = pair(examples)
  source = data.on_device(examples, batch_size=7, data_seed=0)
  teacher = models(tasks.classification(), 3, whole).instance(0)
  options = {
    "points": search.product(temperature=[1.0, 4.0]),
    "data": source,
    "optimizer": optax.sgd(0.1),
    "steps": 3,
    "teacher": teachers.frozen(teacher),
    "run": train.Run(progress=None),
  }
  student = networks.linen(nn.Dense(3))
  found = [
    search.sweep(student, recipes.kd, choice=search.Choice(b), **options) for b in (whole, parts)
  ]
  assert found[0].best == found[1].best
  for one, other in zip(*(each.rows for each in found), strict=True):
    np.testing.assert_array_equal(one.metrics["accuracy"], other.metrics["accuracy"])
  findings = [
    [
      one.check
      for one in search.preflight(student, validation=b, teacher=options["teacher"], warn=False)
    ]
    for b in (whole, parts)
  ]
  assert findings[0] == findings[1]


def test_a_chunk_of_a_stream_has_no_more_bytes_than_it_may(monkeypatch):
  examples, _, _ = case("classification")
  student = networks.linen(nn.Dense(3))
  made, counts = [], []
  for most in (2**28, 8 * 40):
    monkeypatch.setattr(_program, "_MOST_BYTES", most)
    source = data.streamed(examples, batch_size=8, data_seed=0)
    read = source.read

    def watched(*args, read=read):
      counts.append(args[3])
      return read(*args)

    fitted = train.fit(
      student,
      recipes.labels(),
      data=dataclasses.replace(source, read=watched),
      optimizer=optax.sgd(0.1),
      steps=6,
      dispatch=train.with_jit(scan=True),
      watch=train.Watch(log_every=6, validate_every=6),
      run=train.Run(progress=None),
    )
    made.append(jax.device_get(fitted.variables))
    if most == 2**28:
      assert max(counts) == 6
      counts.clear()
  assert max(counts) < 6
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *made)


@pytest.mark.slow
def test_devices_share_each_batch(strict_promotion):
  examples, task, classes = case("classification")
  whole, parts = pair(examples)
  one = models(task, classes, whole).instance(0)
  everywhere = NamedSharding(train.data_parallel(), PartitionSpec())
  both = jax.device_put(one, everywhere)
  asked = _evaluate._Pass(both, parts, None, task)
  assert {len(shard.data) for shard in asked.first.inputs.addressable_shards} == {4}  # of 8
  for batches in (whole, parts):
    found = [
      evaluation.evaluate(model, batches, teacher=teachers.frozen(model)) for model in (one, both)
    ]
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():  # the padded rows of the last batch are on one device
      np.testing.assert_allclose(found[1][name], value, rtol=1e-6, atol=1e-7, err_msg=name)
  odd = data.evaluation_batches(examples, batch_size=7, most=0)  # no two equal shares
  assert evaluation.evaluate(both, odd)["accuracy"] == evaluation.evaluate(one, odd)["accuracy"]


def test_what_a_teacher_said_lies_in_a_file_where_it_is_large():
  rows = [{"a": np.full((2, 3), i, np.float32), "none": np.zeros(0)} for i in range(4)]
  for most, kind in ((0, np.memmap), (2**20, np.ndarray)):
    told = _shared.Rows(4, most=most)
    for number in (2, 0, 3, 1):
      told.put(number, rows[number])
    assert type(told.tree["a"]) is kind
    np.testing.assert_array_equal(told.tree["a"], np.stack([row["a"] for row in rows]))
    assert told.tree["none"].shape == (4, 0)
