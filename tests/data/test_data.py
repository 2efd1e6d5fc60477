"""Data sets, order, views, augmentation, and both kinds of source."""

import dataclasses
import os
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import data


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
  """A folder in which the digits are prepared, once."""
  folder = tmp_path_factory.mktemp("tfds")
  data.load("digits", data_dir=folder)
  return folder


@pytest.fixture(scope="session")
def digits(digits_dir):
  return data.load("digits", "train", data_dir=digits_dir)


@pytest.fixture(scope="session")
def few():
  """Seven tiny images with values that tell pixels apart."""
  images = np.arange(7 * 5 * 4 * 2, dtype=np.uint8).reshape(7, 5, 4, 2)
  return data.from_arrays(images, np.arange(7) % 3, name="few")


def pick(items, step):
  return jax.tree.map(lambda leaf: leaf[step], items)


def assert_same(one, other):
  """The same structure, types and bits."""
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


# Data sets.


def test_digits_are_scikit_learns_split_once_and_for_all(digits, digits_dir):
  from sklearn.datasets import load_digits

  images, labels = load_digits(return_X_y=True)
  test = data.load("digits", "test", data_dir=digits_dir)
  assert (len(digits), len(test)) == (1100, 697)
  assert digits.inputs.shape == (1100, 8, 8, 1)
  assert (digits.inputs.dtype, digits.labels.dtype) == (np.uint8, np.int32)
  assert (digits.num_classes, digits.version, digits.split) == (10, "1.0.0", "train")
  assert digits.label_names == tuple("0123456789")
  for part in (digits, test):
    rows = part.ids.astype(int)
    np.testing.assert_array_equal(part.inputs.reshape(-1, 64), images[rows])
    np.testing.assert_array_equal(part.labels, labels[rows])
  assert sorted([*digits.ids.astype(int), *test.ids.astype(int)]) == list(range(1797))
  # Stratified: a class's share of the test set is within one example of its share of all.
  np.testing.assert_array_less(
    abs(np.bincount(test.labels) - np.bincount(labels) * 697 / 1797), 1.0
  )
  # Which examples are where, and in which order, must never change: published numbers hang on it.
  assert digits.ids[:5].tolist() == ["1680", "1456", "499", "837", "1647"]
  assert sum(i * int(row) for i, row in enumerate(test.ids)) == 215_390_769


def test_parts_do_not_overlap(digits_dir):
  parts = data.splits("digits", data_dir=digits_dir)
  assert parts == {"train": "train[:90%]", "validation": "train[90%:]", "test": "test"}
  ids = {part: data.load("digits", split, data_dir=digits_dir).ids for part, split in parts.items()}
  assert [len(ids[part]) for part in parts] == [990, 110, 697]
  assert len(set(np.concatenate(list(ids.values())))) == 1797
  published = data.splits("digits", published=True, data_dir=digits_dir)
  assert published == {"train": "train", "validation": None, "test": "test"}


def test_reads_images_and_text_that_tfds_prepared(tfds_dir):
  part = data.load("cifar100", "train[:1%]", data_dir=tfds_dir)
  assert (part.inputs.shape, part.inputs.dtype) == ((500, 32, 32, 3), np.uint8)
  assert (part.num_classes, len(part.label_names), len(set(part.ids))) == (100, 100, 500)
  # Random access reads the same rows as the whole.
  rows = np.array([499, 0, 7])
  opened = data.records("cifar100", "train[:1%]", data_dir=tfds_dir)
  found = opened.read(rows)
  for read, whole in ((found["inputs"], part.inputs), (found["labels"], part.labels)):
    np.testing.assert_array_equal(read, whole[rows])
  assert data.splits("sst2_sentence", data_dir=tfds_dir)["validation"] == "validation"
  text = data.load("sst2_sentence", "test[:3]", data_dir=tfds_dir, inputs="sentence")
  assert [type(sentence) for sentence in text.inputs] == [bytes] * 3
  assert text.num_classes == 2


def test_what_needs_tensorflow_stops_before_the_download(tmp_path):
  with pytest.raises(ModuleNotFoundError, match=r"pip install 'jaxdistill\[prepare\]'"):
    data.load("cifar10", data_dir=tmp_path)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"name": "digitz"}, "Did you mean 'digits'"),
    ({"name": "no_such_thing_anywhere"}, "not a data set that TFDS knows"),
    ({"split": "validation"}, r"split='validation' is not a split.*'train': 1100"),
    ({"split": "train[:0%]"}, "is empty"),
    ({"inputs": "picture"}, r"inputs='picture' is not a feature.*'image'"),
    ({"labels": "id"}, "labels='id' of 'digits' is no class"),
    ({"weight": "many"}, "weight='many' is not a feature"),
    ({"weight": "id"}, "weight='id' of 'digits' is no number"),
  ],
)
def test_load_explains(digits_dir, arguments, message):
  with pytest.raises(ValueError, match=message):
    data.load(**{"name": "digits", "data_dir": digits_dir, **arguments})


def test_sets_without_labels(digits_dir):
  part = data.load("digits", "train[:4]", data_dir=digits_dir, labels=None)
  assert (part.num_classes, part.labels.tolist()) == (0, [0] * 4)
  batch = pick(data.evaluation_batches(part, batch_size=4), 0)
  assert batch.labelled.tolist() == [0] * 4
  assert batch.weight.tolist() == [1] * 4


@pytest.mark.parametrize("damage", ["cut at a block", "cut elsewhere", "flipped"])
def test_damaged_files_are_noticed(digits_dir, tmp_path, damage):
  shutil.copytree(digits_dir / "digits", tmp_path / "digits")
  (file,) = (tmp_path / "digits" / "1.0.0").glob("*train*")
  raw = bytearray(file.read_bytes())
  if damage == "flipped":
    raw[len(raw) // 2] ^= 1
  else:
    raw = raw[: 65536 if damage == "cut at a block" else 100_000]
  file.write_bytes(raw)
  with pytest.raises(RuntimeError, match="'train' of 'digits' cannot be read"):
    data.load("digits", data_dir=tmp_path)


def test_scikit_learn_absent_is_named(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "sklearn", None)
  with pytest.raises(ImportError, match=r"sklearn.*jaxdistill\[data\]"):
    data.load("digits", data_dir=tmp_path)


@pytest.mark.slow
def test_tensorflow_is_not_imported_even_where_it_is_installed(digits_dir, tmp_path):
  (tmp_path / "tensorflow").mkdir()
  (tmp_path / "tensorflow" / "__init__.py").write_text("raise RuntimeError('TensorFlow imported')")
  script = f"""
    import sys
    from jaxdistill import data
    examples = data.load("digits", "train[:9]", data_dir={str(digits_dir)!r})
    data.streamed(examples, batch_size=4, data_seed=0).items(0, 1)
    assert "tensorflow" not in sys.modules
  """
  paths = [str(tmp_path), *filter(None, sys.path)]
  result = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(script)],
    env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  assert "Exception ignored" not in result.stderr  # Grain's threads ended in time


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"labels": [0, 1]}, "labels must have the 3 examples"),
    ({"labels": ["a", "b", "c"]}, "labels is text, namely 'a'.*label_names="),
    ({"labels": ["a", None, "c"]}, "labels must be integers or floats"),
    ({"labels": ["a", "b", "c"], "label_names": ("a", "c")}, "not one of label_names=.*'b'"),
    ({"labels": [0.0, np.inf, 2.0]}, "not finite in row 1"),
    ({"labels": [0, 255, 2], "num_classes": 3}, "row 1 has 255.*ignore="),
    ({"labels": [0, 1, 2], "weight": [1.0, -1.0, 1.0]}, "weight of .*not negative"),
    ({"labels": [0, 1, 2], "weight": [1.0, 1.0]}, "weight of .*leading axes"),
    ({"labels": [0, -1, 2]}, r"must lie in 0 .. 2 .* row 1 has -1"),
    ({"labels": [0, 1, 5], "num_classes": 3}, r"num_classes=3.* row 2 has 5"),
    ({"inputs": np.zeros((0, 2)), "labels": []}, "at least one example"),
    ({"labels": [0, 1, 1], "label_names": ("a",)}, r"num_classes=1.* row 1 has 1"),
    ({"labels": [0, 1, 1], "label_names": ("a",), "num_classes": 2}, "label_names must be 2"),
    ({"labels": np.ones((3, 2), bool), "label_names": ("a",)}, "label_names must be 2"),
    ({"labels": [0, 1, 1], "ids": ["a"]}, r"ids must be of shape \(3,\)"),
  ],
)
def test_from_arrays_explains(arguments, message):
  with pytest.raises(ValueError, match=message):
    data.from_arrays(**{"inputs": np.zeros((3, 2), np.float32), **arguments})


# Order and views.


def test_order_is_pinned_for_good():
  assert data.epoch_order(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
  assert data.epoch_order(0, 1, 8).tolist() == [7, 4, 2, 6, 5, 0, 1, 3]
  assert data.epoch_order(1, 0, 8).tolist() == [3, 5, 2, 7, 0, 6, 1, 4]
  assert data.epoch_order(2**32 - 1, 7, 8).tolist() == [4, 2, 1, 7, 0, 5, 3, 6]


def test_every_epoch_is_its_own_permutation():
  orders = [data.epoch_order(seed, epoch, 1000) for seed in (0, 5) for epoch in range(3)]
  for order in orders:
    np.testing.assert_array_equal(np.sort(order), np.arange(1000))
  # Two random permutations agree in one place on average (Poisson): ten would be a miracle.
  agree = [np.sum(a == b) for i, a in enumerate(orders) for b in orders[:i]]
  assert max(agree) < 10


views_of = jax.jit(
  jax.vmap(jax.vmap(data.choice, (None, None, 0, None)), (None, 0, None, None)), static_argnums=3
)


def test_views_run_through_all_choices_in_an_order_of_their_own():
  table = np.asarray(views_of(3, jnp.arange(300), jnp.arange(2 * 18), 18))
  for round_ in (table[:, :18], table[:, 18:]):
    np.testing.assert_array_equal(np.sort(round_, axis=1), np.tile(np.arange(18), (300, 1)))
  assert not (table[:, :18] == table[:, 18:]).all(axis=1).any()
  # Uniform in every view, and a step from one view to the next goes to all others alike: counts
  # are binomial(300, 1/18) and (10,200 pairs over 306); six standard deviations either way.
  counts = np.stack([np.bincount(column, minlength=18) for column in table.T])
  assert abs(counts - 300 / 18).max() < 6 * np.sqrt(300 / 18)
  pairs = np.zeros((18, 18))
  np.add.at(pairs, (table[:, :17].ravel(), table[:, 1:18].ravel()), 1)
  off_diagonal = pairs[~np.eye(18, dtype=bool)]
  assert pairs.trace() == 0
  assert abs(off_diagonal - 300 * 17 / 306).max() < 6 * np.sqrt(300 * 17 / 306)


def test_choices_are_pinned_whatever_the_flags():
  def some():
    return jax.jit(data.choice, static_argnums=3)(3, 7, 11, 162)

  pinned = 130
  assert int(some()) == pinned
  with jax.threefry_partitionable(False):
    assert int(some()) == pinned
  with jax.enable_x64(True):
    assert int(some()) == pinned
    assert some().dtype == jnp.int32


@pytest.mark.parametrize("padding", [0, 2])
def test_crop_flip_equals_numpy(padding):
  image = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
  augmentation = data.crop_flip(padding)
  assert augmentation.choices == 2 * (2 * padding + 1) ** 2
  made = jax.vmap(augmentation.apply, (None, 0))(image, jnp.arange(augmentation.choices))
  framed = np.zeros((5 + 2 * padding, 6 + 2 * padding, 3), np.uint8)
  framed[padding : padding + 5, padding : padding + 6] = image
  wanted = []
  for row in range(2 * padding + 1):
    for column in range(2 * padding + 1):
      crop = framed[row : row + 5, column : column + 6]
      wanted += [crop, crop[:, ::-1]]
  assert made.dtype == jnp.uint8
  np.testing.assert_array_equal(made, wanted)
  np.testing.assert_array_equal(made[4 * padding * (padding + 1)], image)


def test_normalisation_against_float64():
  images = np.random.default_rng(0).integers(0, 256, (2, 3, 3, 3), dtype=np.uint8)
  made = jax.jit(data.normalizer(data.CIFAR))(images)
  mean, std = (np.array(values) for values in data.CIFAR)
  assert made.dtype == jnp.float32
  # Four float32 roundings of values up to 255 / 65.
  np.testing.assert_allclose(made, (images / 255 - mean) / std, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(data.normalizer(None)(images), images / 255, rtol=2e-7)
  floats = np.ones((1, 2), np.float32)
  assert data.normalizer(None)(floats) is floats
  for normalize in (data.CIFAR, data.DIGITS, None):
    on_host = data.normalizer(normalize)(images)
    assert isinstance(on_host, np.ndarray)
    # XLA may multiply by a reciprocal, which is rounded once more.
    np.testing.assert_array_max_ulp(on_host, jax.jit(data.normalizer(normalize))(images), 2)
  np.testing.assert_array_equal(data.normalizer(((0.5,), (0.25,)))(floats), 2 * floats)


@pytest.mark.parametrize(
  ("values", "wrong", "held"),
  [
    (np.array([1, 2**32 + 1]), "4294967297", "int32"),
    (np.array([-(2**31) - 1, 0]), "-2147483649", "int32"),
    (np.array([0, 2**63], np.uint64), "9223372036854775808", "uint32"),
    (np.array([0.0, 1e300]), r"1e\+300", "float32"),
  ],
)
def test_numbers_that_a_device_would_change_are_refused(values, wrong, held):
  with pytest.raises(
    ValueError, match=rf"inputs 'id' of 'rows' are {values.dtype} with {wrong}.*{held}"
  ):
    data.from_arrays({"id": values, "x": np.ones(2)}, [0, 1], name="rows")
  kept = np.array([5, np.inf]) if values.dtype.kind == "f" else values // 2**34
  made = data.from_arrays({"id": kept}, [0, 1])
  source = data.on_device(made, batch_size=2, data_seed=0)
  assert source.shared["inputs"]["id"].tolist() == kept.tolist()
  with jax.enable_x64(True):
    assert data.from_arrays({"id": values}, [0, 1]).inputs["id"].dtype == values.dtype


def test_pictures_of_16_bits_say_what_is_white():
  examples = data.from_arrays(np.full((2, 2, 2, 1), 65535, np.uint16), [0, 1])
  source = data.on_device(examples, batch_size=1, data_seed=0)
  item = jax.tree.map(lambda leaf: leaf[0], source.items(0, 1))
  with pytest.raises(ValueError, match=r"uint16.*divide_by\(65535"):
    jax.eval_shape(source.cut, source.shared, item)
  with pytest.raises(ValueError, match=r"uint16.*divide_by\(65535"):
    data.evaluation_batches(examples, batch_size=2)
  made = data.evaluation_batches(examples, batch_size=2, normalize=data.divide_by(65535.0))
  assert made.inputs.min() == 1
  tokens = data.from_arrays(np.ones((2, 7), np.uint16), [0, 1])
  assert data.evaluation_batches(tokens, batch_size=2).inputs.dtype == jnp.uint16


# Sources.

NOISE = data.Augmentation(
  lambda image, key: image + jax.random.key_data(key)[0].astype(jnp.uint8), choices=None
)


@pytest.mark.parametrize("augmentation", [data.crop_flip(1), NOISE, data.identity])
def test_both_kinds_of_source_give_the_same_bits(digits, strict_promotion, augmentation):
  options = {
    "batch_size": 400,
    "data_seed": 3,
    "augmentation": augmentation,
    "views": 2,
    "normalize": data.CIFAR if augmentation is NOISE else data.DIGITS,
    "labelled": np.arange(1100) % 3 > 0,
  }
  one = data.on_device(digits, **options)
  other = data.streamed(digits, **options)
  assert one.steps_per_epoch == other.steps_per_epoch == 2
  cut_one, cut_other = jax.jit(one.cut), jax.jit(other.cut)
  items_one, items_other = one.items(1, 5), other.items(1, 5)
  for step in range(5):
    batch = cut_one(one.shared, pick(items_one, step))
    assert_same(batch, cut_other(None, pick(items_other, step)))
    epoch, first = divmod(1 + step, 2)
    rows = data.epoch_order(3, epoch, 1100)[400 * first : 400 * (first + 1)]
    np.testing.assert_array_equal(batch.index, rows)
    np.testing.assert_array_equal(batch.view, np.full(400, epoch % 2))
    np.testing.assert_array_equal(batch.labelled, rows % 3 > 0)
    np.testing.assert_array_equal(batch.labels, np.where(rows % 3 > 0, digits.labels[rows], 0))
    np.testing.assert_array_equal(batch.weight, np.ones(400))
    if augmentation is data.identity:
      np.testing.assert_array_equal(batch.inputs, digits.inputs[rows] / np.float32(16))


def test_a_view_comes_back_when_its_turn_does(few):
  source = data.on_device(few, batch_size=7, data_seed=1, augmentation=data.crop_flip(2), views=2)
  cut = jax.jit(source.cut)
  items = source.items(0, 4)
  shown = []
  for step in range(4):
    batch = cut(source.shared, pick(items, step))
    shown.append(np.asarray(batch.inputs)[np.argsort(batch.index)])
  np.testing.assert_array_equal(shown[0], shown[2])
  np.testing.assert_array_equal(shown[1], shown[3])
  assert all((a != b).any() for a, b in zip(shown[0], shown[1], strict=True))


@pytest.mark.parametrize("kind", [data.on_device, data.streamed])
def test_resumes_at_any_step_in_any_chunks(few, kind):
  whole = kind(few, batch_size=2, data_seed=9).items(0, 11)
  again = kind(few, batch_size=2, data_seed=9)
  for step, count in ((4, 3), (7, 4), (2, 1), (0, 2), (2, 5)):
    assert_same(again.items(step, count), pick(whole, slice(step, step + count)))


@pytest.mark.parametrize(
  ("kind", "augmentation"), [(data.on_device, data.crop_flip(1)), (data.streamed, data.identity)]
)
def test_seeds_share_arrays_and_program(few, kind, augmentation):
  first = kind(few, batch_size=3, data_seed=0, augmentation=augmentation)
  seeds = [first, dataclasses.replace(first, data_seed=8)]
  assert seeds[1].shared is first.shared
  assert seeds[1].cut is first.cut
  items = jax.tree.map(lambda *leaves: np.stack(leaves), *(source.items(1, 1) for source in seeds))
  both = jax.jit(jax.vmap(first.cut, (None, 0)))(first.shared, pick(items, np.s_[:, 0]))
  cut = jax.jit(first.cut)
  for number, seed in enumerate((0, 8)):
    alone = kind(few, batch_size=3, data_seed=seed)
    assert_same(pick(both, number), cut(first.shared, pick(alone.items(1, 1), 0)))
  assert not np.array_equal(both.index[0], both.index[1])


def test_records_stream_like_arrays(tfds_dir):
  options = {"batch_size": 10, "data_seed": 2, "normalize": data.CIFAR}
  arrays = data.streamed(data.load("cifar100", "train[:50]", data_dir=tfds_dir), **options)
  opened = data.records("cifar100", "train[:50]", data_dir=tfds_dir)
  assert_same(data.streamed(opened, **options).items(3, 4), arrays.items(3, 4))
  half = dataclasses.replace(opened, transform=lambda image: image[::2, ::2])
  assert data.streamed(half, **options).items(0, 1)["inputs"].shape == (1, 10, 16, 16, 3)


def test_an_unreadable_record_is_an_error_and_not_a_gap(few):
  def transform(image):
    raise ValueError("no such picture")

  class Pictures(list):
    def __getitems__(self, rows):
      return [self[row] for row in rows]

  source = Pictures({"image": image, "label": 0} for image in few.inputs)
  broken = data.Records(source, "image", "label", 3, "broken", transform=transform)
  with pytest.raises(ValueError, match="no such picture"):
    data.streamed(broken, batch_size=2, data_seed=0).items(0, 1)


def test_evaluation_pads_the_last_batch_and_nothing_else(few, strict_promotion):
  batches = data.evaluation_batches(few, batch_size=3)
  assert batches.inputs.shape == (3, 3, 5, 4, 2)
  assert batches.inputs.dtype == jnp.float32
  flat = jax.tree.map(lambda leaf: np.reshape(leaf, (9, *leaf.shape[2:])), batches)
  np.testing.assert_array_equal(flat.index[:7], np.arange(7))
  np.testing.assert_array_equal(flat.labels, [0, 1, 2, 0, 1, 2, 0, 0, 0])
  np.testing.assert_array_equal(flat.weight, [1] * 7 + [0] * 2)
  np.testing.assert_array_equal(flat.labelled, [1] * 7 + [0] * 2)
  np.testing.assert_allclose(flat.inputs[:7], few.inputs / 255, rtol=2e-7)
  np.testing.assert_array_equal(flat.inputs[7:], flat.inputs[np.array([0, 0])])
  # One whole batch: no padding.
  assert data.evaluation_batches(few, batch_size=7).weight.tolist() == [[1.0] * 7]


@pytest.mark.parametrize("kind", [data.on_device, data.streamed])
@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"batch_size": 8}, r"batch_size=8 must lie in 1 .. 7, the size of 'few'"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"data_seed": -1}, "data_seed must lie in 0"),
    ({"data_seed": 2**32}, "data_seed must lie in 0"),
    ({"views": 0}, "views=0 must be at least 1"),
    ({"labelled": [1, 0]}, "labelled must be 7 zeros and ones"),
    ({"labelled": np.arange(7)}, "labelled must be 7 zeros and ones"),
  ],
)
def test_sources_explain(few, kind, arguments, message):
  with pytest.raises(ValueError, match=message):
    kind(few, **{"batch_size": 2, "data_seed": 0, **arguments})


def test_other_mistakes_are_explained(few):
  source = data.on_device(few, batch_size=2, data_seed=0)
  with pytest.raises(ValueError, match="step=-1 must be at least 0"):
    source.items(-1, 2)
  with pytest.raises(ValueError, match="data_seed must lie in 0"):
    dataclasses.replace(source, data_seed=-3)
  with pytest.raises(ValueError, match="padding=-1 must be at least 0"):
    data.crop_flip(-1)
  with pytest.raises(ValueError, match="choices must be at least 1"):
    data.Augmentation(lambda image, number: image, choices=0)
  with pytest.raises(ValueError, match="prefetch=0 must be at least 1"):
    data.streamed(few, batch_size=2, data_seed=0, prefetch=0)
  words = data.from_arrays(np.array([b"a", b"b"], dtype=object), [0, 1])
  with pytest.raises(TypeError, match="tokenize text first"):
    data.on_device(words, batch_size=1, data_seed=0)
  flat = data.from_arrays(np.zeros((4, 6), np.float32), [0, 1, 0, 1])
  source = data.on_device(flat, batch_size=2, data_seed=0, augmentation=data.crop_flip(1))
  item = pick(source.items(0, 1), 0)
  with pytest.raises(ValueError, match=r"crops are of images \[H, W, C\]"):
    jax.eval_shape(source.cut, source.shared, item)
