"""Labels of any shape and dtype, with weights and masks, from every constructor to the batch."""

import dataclasses
import io

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jaxdistill import data, losses, networks, recipes, train
from jaxdistill.types import Term

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 255, (6, 4, 4, 3)).astype(np.uint8)
MASKS = RNG.integers(0, 3, (6, 4, 4)).astype(np.uint8)
MASKS[0, 0, 0] = MASKS[3, 2] = 255
TARGETS = RNG.normal(size=(6, 2))
TARGETS[1, 0] = np.nan
KINDS = {
  "classes": ([0, 1, 2, 0, 1, 2], {}),
  "pixels": (MASKS, {"ignore": 255}),
  "tokens": (RNG.integers(0, 9, (6, 5)), {"weight": RNG.integers(0, 2, (6, 5)).astype(float)}),
  "tags": (RNG.random((6, 3)) < 0.5, {"weight": np.arange(6.0)}),
  "targets": (TARGETS, {"ignore": float("nan")}),
}


@pytest.fixture(autouse=True)
def same_numbers(monkeypatch):
  """Each test draws the same, in whatever order they run."""
  monkeypatch.setitem(globals(), "RNG", np.random.default_rng(1))


def cut(source, step=0):
  item = jax.tree.map(lambda leaf: leaf[0], source.items(step, 1))
  return jax.jit(source.cut)(source.shared, item)


def rows(labels, weight=None):
  for i in range(6):
    more = {} if weight is None else {"weight": weight[i]}
    yield {"image": IMAGES[i], "label": np.asarray(labels)[i], **more}


def sources(labels, given):
  """The same examples by every way there is, all in batches of three."""
  kind = {"num_classes": given.get("num_classes"), "ignore": given.get("ignore")}
  fields = data.Fields(**kind, weight="weight" if "weight" in given else None)
  if np.asarray(labels).dtype.kind in "iu":
    fields = dataclasses.replace(fields, num_classes=9)
  given = {**given, "num_classes": fields.num_classes}
  examples = data.from_arrays(IMAGES, labels, **given)
  every = list(rows(labels, given.get("weight")))
  options = {"batch_size": 3, "data_seed": 0}
  return {
    "on_device": data.on_device(examples, **options),
    "streamed": data.streamed(examples, **options),
    "from_dicts": data.on_device(data.from_dicts(every, fields), **options),
    "from_sequence": data.streamed(data.from_sequence(every, fields), **options),
  }, data.iterated(lambda epoch: every, fields, size=6, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_any_shape_come_as_they_are_by_every_way(kind):
  labels, given = KINDS[kind]
  labels = np.asarray(labels)
  found, iterated = sources(labels, given)
  ignore = given.get("ignore")
  none = np.zeros(labels.shape, bool)
  if ignore is not None:
    none = np.isnan(labels) if np.isnan(ignore) else labels == ignore
  wanted = np.where(none, 0, labels)
  weight = given.get("weight", np.ones(6))
  for name, source in [*found.items(), ("iterated", iterated)]:
    batch = cut(source, step=1)
    index = np.asarray(batch.index)
    np.testing.assert_allclose(batch.labels, wanted[index], rtol=1e-6, err_msg=name)
    assert batch.labels.dtype == (jnp.int32 if labels.dtype.kind in "iu" else jnp.float32)
    np.testing.assert_array_equal(batch.weight, weight[index], err_msg=name)
    mask = ~none if ignore is not None else np.ones(6)
    np.testing.assert_array_equal(batch.labelled, mask[index], err_msg=name)
    assert source.has_labels


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_batches_have_every_label_once_and_padding_counts_nowhere(kind):
  labels, given = KINDS[kind]
  labels = np.asarray(labels)
  batches = data.evaluation_batches(data.from_arrays(IMAGES, labels, **given), batch_size=4)
  flat = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[2:]), batches)
  assert not flat.weight[6:].any()
  assert not flat.labelled[6:].any()
  there = flat.labelled[:6].astype(bool)
  there = np.broadcast_to(
    there.reshape(there.shape + (1,) * (labels.ndim - there.ndim)), labels.shape
  )
  np.testing.assert_allclose(flat.labels[:6][there], labels[there], rtol=1e-6)
  np.testing.assert_array_equal(flat.weight[:6], given.get("weight", np.ones(6)))


def test_a_label_that_may_not_be_used_does_not_reach_the_batch():
  pixels = np.zeros((6, 4, 4))
  pixels[2:, :2] = 1
  for labelled in ([0, 0, 1, 1, 1, 1], pixels):
    examples = data.from_arrays(IMAGES, MASKS, ignore=255)
    source = data.on_device(examples, batch_size=6, data_seed=0, labelled=labelled)
    batch = cut(source)
    index = np.asarray(batch.index)
    may = np.asarray(labelled, float).reshape(6, *np.shape(labelled)[1:] or (1, 1))
    may = np.broadcast_to(may, MASKS.shape) * (MASKS != 255)
    np.testing.assert_array_equal(batch.labelled, may[index])
    np.testing.assert_array_equal(batch.labels, (MASKS * may)[index])


@pytest.mark.parametrize("make", [data.crop, data.crop_flip])
def test_a_mask_moves_with_its_image(make):
  # An image that is its own mask: wherever the crop and the mirror put a pixel, its label is there.
  masks = RNG.integers(1, 200, (6, 5, 5)).astype(np.uint8)
  masks[1, 1, 1] = 255
  examples = data.from_arrays(masks[..., None], masks, ignore=255)
  source = data.on_device(
    examples, batch_size=6, data_seed=3, augmentation=make(2), normalize=lambda x: x
  )
  moved = set()
  for step in range(4):
    batch = cut(source, step)
    shown = np.asarray(batch.inputs[..., 0])
    there = np.isin(shown, (0, 255), invert=True)
    np.testing.assert_array_equal(batch.labelled, there)  # 0 is beyond the edge, 255 is ignored
    np.testing.assert_array_equal(batch.labels, np.where(there, shown, 0))
    moved.add(shown[int(np.argmax(np.asarray(batch.index) == 0))].tobytes())
  assert len(moved) > 1


def test_a_mask_that_an_augmentation_would_leave_behind_is_refused():
  noise = data.Augmentation(lambda image, key: image, None, "noise")
  examples = data.from_arrays(IMAGES, MASKS, ignore=255)
  source = data.on_device(examples, batch_size=2, data_seed=0, augmentation=noise)
  with pytest.raises(ValueError, match="on_labels"):
    cut(source)
  still = dataclasses.replace(noise, on_labels=lambda labels, key: labels)
  batch = cut(data.on_device(examples, batch_size=6, data_seed=0, augmentation=still))
  np.testing.assert_array_equal(batch.labelled, (MASKS != 255)[np.asarray(batch.index)])


def test_transfer_data_take_the_shape_of_the_labels():
  labelled = data.on_device(data.from_arrays(IMAGES, MASKS, ignore=255), batch_size=4, data_seed=0)
  other = data.on_device(data.from_arrays(IMAGES, None), batch_size=4, data_seed=0)
  batch = cut(data.mixed(labelled, other, share=0.5))
  assert batch.labels.shape == batch.labelled.shape == (4, 4, 4)
  assert not np.any(batch.labelled[2:])
  assert np.any(batch.labelled[:2])
  np.testing.assert_array_equal(batch.weight, 1)


def test_what_labels_hold_is_part_of_what_a_run_is():
  def contents(**given):
    source = data.on_device(
      data.from_arrays(IMAGES, given.pop("labels", MASKS), **given), batch_size=2, data_seed=0
    )
    shown = {name: one.digest for name, one in source.shown().items()}
    return {**source.contents(), **shown}

  one = contents(ignore=255)
  assert one == contents(ignore=255)
  other = MASKS.copy()
  other[5, 3, 3] = 2 - other[5, 3, 3] // 2
  assert one != contents(ignore=255, labels=other)
  assert one != contents(ignore=255, weight=np.arange(6.0))
  assert one != contents(ignore=2, num_classes=256)


@pytest.mark.slow
def test_numbers_are_not_taken_for_distributions():
  """The loss of a regression's targets under a softmax is a number like any other: said before."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(32, 4)).astype(np.float32)
  student = networks.linen(nn.Dense(3))
  soft = rng.dirichlet(np.ones(3), 32).astype(np.float32)
  few = np.where(np.arange(32)[:, None] % 4 == 0, soft, 0)

  def squared(student, teacher, batch):
    return {"labels": Term(jnp.square(student.logits - batch.labels).mean(1))}

  def fitted(labels, objective, **options):
    source = data.on_device(data.from_arrays(x, labels), batch_size=16, data_seed=0)
    return train.fit(
      student,
      objective,
      data=source,
      optimizer=optax.sgd(0.1),
      steps=1,
      run=train.Run(progress=None),
      **options,
    )

  numbers = rng.normal(size=(32, 3))
  for seed in (0, [0, 1]):
    with pytest.raises(ValueError, match=r"no distributions over the 3 classes: a row is \["):
      fitted(numbers, recipes.labels(), seed=seed)
  with pytest.raises(ValueError, match="recipes.regression"):
    losses.cross_entropy(jnp.zeros((32, 3)), jnp.asarray(10 * soft))
  # What is one, some of which is hidden; several at once; numbers to whom they are numbers.
  several = rng.random((32, 3)) < 0.5
  for labels, objective in (
    (soft, recipes.labels()),
    (few, recipes.labels()),
    (several, recipes.labels()),
    (numbers, squared),
  ):
    assert np.isfinite(fitted(labels, objective).history[-1]["loss"])


class MadeShapes(tfds.core.GeneratorBasedBuilder):
  """Pictures with a mask of classes, a picture of numbers and how much each of them counts."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    floats = tfds.features.Tensor(shape=(4, 3), dtype=np.float32)
    kind = tfds.features.ClassLabel(names=["a", "b", "c"])
    features = {
      "image": tfds.features.Image(shape=(4, 3, 3)),
      "mask": tfds.features.Image(shape=(4, 3, 1)),
      "depth": floats,
      "sure": floats,
      "counts": tfds.features.Scalar(np.float32),
      "sides": tfds.features.Sequence(kind, length=2),
      "several": tfds.features.Sequence(kind),
    }
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for i, row in enumerate(made_shapes()):
      # As files: TFDS encodes arrays with TensorFlow.
      yield i, {**row, **{name: png(row[name]) for name in ("image", "mask")}}


def png(array):
  file = io.BytesIO()
  Image.fromarray(array.squeeze()).save(file, "PNG")
  file.seek(0)
  return file


def made_shapes():
  rng = np.random.default_rng(0)
  return [
    {
      "image": rng.integers(0, 256, (4, 3, 3)).astype(np.uint8),
      "mask": rng.integers(0, 5, (4, 3, 1)).astype(np.uint8),
      "depth": np.full((4, 3), i, np.float32),
      "sure": rng.random((4, 3), np.float32),
      "counts": np.float32(i + 0.5),
      "sides": [i % 3, 1],
      "several": [0, 1, 2][:i],
    }
    for i in range(4)
  ]


def test_masks_numbers_and_weights_of_a_set_that_tfds_prepared(tmp_path):
  MadeShapes(data_dir=str(tmp_path)).download_and_prepare(file_format="array_record")
  given = {"data_dir": tmp_path, "cache": tmp_path / "kept"}
  depth = data.load("made_shapes", labels="depth", weight="sure", **given)
  # TFDS stores rows in an order of its own; what a row's depth is says which it was.
  rows = [made_shapes()[int(i)] for i in depth.labels[:, 0, 0]]
  assert sorted(depth.labels[:, 0, 0]) == [0, 1, 2, 3]

  def stored(name):
    return np.stack([row[name] for row in rows])

  np.testing.assert_array_equal(depth.inputs, stored("image"))
  np.testing.assert_array_equal(depth.weight, stored("sure"))
  # What was kept of the one is not taken for the other, and is read again with its weights.
  masks = data.load("made_shapes", labels="mask", weight="counts", num_classes=5, **given)
  np.testing.assert_array_equal(masks.labels, stored("mask")[..., 0])
  np.testing.assert_array_equal(masks.weight, stored("counts"))
  assert data.load("made_shapes", labels="depth", **given).weight is None
  again = data.load("made_shapes", labels="depth", weight="sure", **given)
  np.testing.assert_array_equal(again.weight, depth.weight)
  sides = data.load("made_shapes", labels="sides", **given)
  assert sides.labels.tolist() == [row["sides"] for row in rows]
  assert sides.label_names == ("a", "b", "c")
  with pytest.raises(ValueError, match="labels='several' of .* is no class, number, array"):
    data.load("made_shapes", labels="several", **given)  # as many as an example has
  opened = data.records("made_shapes", data_dir=tmp_path, labels="depth", weight="sure")
  order = np.array([2, 0])
  np.testing.assert_array_equal(opened.read(order)["weight"], depth.weight[order])


def test_no_label_gets_lost_on_its_way():
  """A number lies under each of NumPy's masks; bfloat16 is a float; an axis of 0 holds no label."""
  inputs = np.zeros((4, 2), np.float32)
  classes = np.ma.masked_array([0, 1, 2, 0], mask=[0, 0, 1, 0])
  rows = [{"image": x, "label": y} for x, y in zip(inputs, classes, strict=True)]
  for read in (lambda: data.from_arrays(inputs, classes), lambda: data.from_dicts(rows)):
    with pytest.raises(ValueError, match="masked.*ignore="):
      read()
  filled = data.from_arrays(inputs, classes.filled(255), ignore=255)
  assert filled.num_classes == 2
  for given in (inputs, classes[:, None] * inputs, classes):
    with pytest.raises(ValueError, match="masked"):
      data.from_arrays(given, None if given is not inputs else [0, 1, 0, 1], weight=classes)
  half = jnp.asarray([[0.5], [1.0], [2.0], [3.0]], jnp.bfloat16)
  found = data.from_arrays(inputs, half, weight=half[:, 0])
  assert found.labels.dtype == found.weight.dtype == np.float32
  np.testing.assert_array_equal(found.labels, np.asarray(half, np.float32))
  with pytest.raises(ValueError, match="holds none"):
    data.from_arrays(inputs, np.zeros((4, 0)))
  with pytest.raises(ValueError, match="labels cannot be made one array"):
    data.from_arrays(inputs, [[0], [1, 2], [3], [4]])


def test_truth_values_are_as_many_classes_by_every_way():
  several = np.array([[True, False, True], [False, False, True]])
  rows = [{"image": [float(i)], "label": one} for i, one in enumerate(several)]
  made = [
    data.from_arrays(np.ones((2, 1)), several),
    data.from_dicts(rows),
    data.from_dicts(iter(rows)),
    data.from_sequence(rows),
    data.iterated(lambda epoch: rows, data.Fields(), size=2, batch_size=1, data_seed=0),
  ]
  assert [one.num_classes for one in made] == [3] * 5
  np.testing.assert_array_equal(made[2].labels, several)
  once = data.from_dicts([{"image": [0.0], "label": True}])
  assert once.num_classes == data.from_arrays(np.ones((1, 1)), [True]).num_classes == 0


def test_labels_count_where_they_may_be_used_and_weigh_and_are_some():
  inputs, masks = np.ones((2, 1), np.float32), np.array([[255, 1], [255, 255]])

  def counted(labelled, weight=None):
    examples = data.from_arrays(inputs, masks, ignore=255, weight=weight)
    made = data.on_device(examples, batch_size=1, data_seed=0, labelled=labelled)
    return made.has_labels

  assert counted(None)
  assert counted([1, 0])
  assert not counted([0, 1])
  assert not counted([[1, 0], [1, 1]])
  assert not counted(None, weight=[0.0, 1.0])
  assert not counted(None, weight=[[1.0, 0.0], [1.0, 1.0]])


@pytest.mark.parametrize("texts", [str, bytes, object, "T"], ids=str)
def test_labels_by_name_are_their_numbers_by_every_way(texts):
  names = ("cow", "cat", "dog")
  each = np.array([["dog", "cat"], ["cat", "cat"]])
  labels = each.astype(bytes) if texts is bytes else each.astype(texts)
  rows = [{"image": [float(i)], "label": one} for i, one in enumerate(labels)]
  fields, where = data.Fields(label_names=names), np.arange(2)
  made = [
    data.from_arrays(np.ones((2, 1)), labels, label_names=list(names)),
    data.from_dicts(rows, fields),
    data.from_sequence(rows, fields),
  ]
  for examples in made:
    found = examples.read(where)["labels"]
    assert (found.dtype, found.tolist()) == (np.int32, [[2, 1], [1, 1]])
    assert (examples.num_classes, examples.label_names) == (3, names)


def test_names_say_how_many_classes_there_are():
  x, names = np.ones((2, 1)), ("dark", "left", "far")
  tags = data.from_arrays(x, [[1, 0, -1], [0, 0, 1]], label_names=names, ignore=-1)
  classes = data.from_arrays(x, [0, 1], label_names=names)  # none of this split is the last
  assert tags.num_classes == classes.num_classes == 3
