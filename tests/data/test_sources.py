"""One's own data: dicts, streams that only iterate, mixes, parts for processes, some labels."""

import dataclasses
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from jaxdistill import data
from test_data import assert_same, pick


def untyped(function):
  """Without the tests' own type checks: what a user's mistake meets."""
  return inspect.unwrap(function)


def numbered(size, *, first=0, classes=3, name="numbered"):
  """Examples whose one input is their own number (plus ``first``): a batch tells its rows."""
  inputs = (first + np.arange(size, dtype=np.float32))[:, None]
  return data.from_arrays(inputs, np.arange(size) % classes, name=name)


# What `rows_of` makes.
FIELDS = data.Fields(inputs="x", num_classes=3)


def rows_of(examples):
  """The same examples as a list of dicts."""
  return [
    {"x": x, "label": int(label)} for x, label in zip(examples.inputs, examples.labels, strict=True)
  ]


def make(kind, size=11, batch_size=4, data_seed=5, **options):
  """A source of each kind over `numbered`."""
  examples = numbered(size, first=options.pop("first", 0))
  options = {"batch_size": batch_size, "data_seed": data_seed, **options}
  if kind == "on_device":
    return data.on_device(examples, **options)
  if kind == "streamed":
    return data.streamed(examples, **options)
  if kind == "records":
    return data.streamed(data.from_sequence(rows_of(examples), FIELDS), **options)
  rows = rows_of(examples)
  return data.iterated(lambda epoch: rows, FIELDS, size=size, **options)


KINDS = ["on_device", "streamed", "records", "iterated"]


def mix(first, second, *, share=0.5, batch_size=4, data_seed=5):
  source = make(first, batch_size=batch_size, data_seed=data_seed)
  return data.mixed(source, make(second, size=6, batch_size=2, first=100), share=share)


# The parts of several processes.


@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
def test_parts_are_the_batch(kind):
  source = mix("on_device", "records") if kind == "mixed" else make(kind)
  whole = source.items(1, 5)
  parts = [source.items(1, 5, part=(p, 2)) for p in range(2)]

  def joined(leaf, *pieces):
    if leaf.ndim == 1:  # numbers
      for piece in pieces:
        np.testing.assert_array_equal(piece, leaf)
      return leaf
    return np.concatenate(pieces, axis=1)

  assert_same(jax.tree.map(joined, whole, *parts), whole)


@pytest.mark.parametrize("kind", ["records", "iterated"])
def test_a_process_makes_no_rows_of_the_others(kind):
  made = []

  def transform(row):
    made.append(int(row["x"][0]))
    return row["x"]

  rows, fields = rows_of(numbered(8)), dataclasses.replace(FIELDS, transform=transform)
  options = {"batch_size": 4, "data_seed": 0}
  if kind == "records":
    source = data.streamed(data.from_sequence(rows, fields), prefetch=1, **options)
  else:
    source = data.iterated(lambda epoch: rows, fields, size=8, **options)
  made.clear()
  mine = source.items(0, 2, part=(1, 2))["index"]
  assert mine.shape == (2, 2)
  # Two steps were asked for; a stream may have read a step further, into the next epoch.
  assert made[:4] == mine.ravel().tolist()
  assert len(made) <= 8


def test_parts_explain():
  source = make("on_device", batch_size=3)
  with pytest.raises(ValueError, match="batch_size=3 does not divide by the 2 processes"):
    source.items(0, 1, part=(0, 2))
  with pytest.raises(ValueError, match=r"part must be \(p, P\) with 0 <= p < P, got \(2, 2\)"):
    source.items(0, 1, part=(2, 2))
  with pytest.raises(ValueError, match="batch_size=4, of which 1 are transfer data, does not"):
    mix("on_device", "on_device", share=0.25).items(0, 1, part=(0, 2))


# What a source tells of itself.


@pytest.mark.parametrize("kind", KINDS)
def test_another_batch_size_is_another_source(kind):
  source = dataclasses.replace(make(kind), batch_size=3)
  assert source.steps_per_epoch == 3
  assert_same(source.items(2, 3), make(kind, batch_size=3).items(2, 3))
  with pytest.raises(ValueError, match="batch_size=12 must lie in 1 .. 11"):
    dataclasses.replace(source, batch_size=12)


@pytest.mark.parametrize("kind", KINDS)
def test_normalize_and_stored_are_what_cut_applies_and_takes(kind):
  source = make(kind, normalize=((3.0,), (2.0,)))
  assert source.stored == jax.ShapeDtypeStruct((1,), jnp.float32)
  batch = source.cut(source.shared, pick(source.items(0, 1), 0))
  rows = np.asarray(batch.index, np.float32)[:, None]
  np.testing.assert_array_equal(batch.inputs, source.normalize(rows))
  np.testing.assert_array_equal(batch.inputs, (rows - 3) / 2)


def test_stored_is_what_a_device_holds():
  wide = data.from_arrays({"a": np.zeros((3, 2)), "b": np.zeros((3, 4), np.int64)}, None)
  assert data.on_device(wide, batch_size=1, data_seed=0).stored == {
    "a": jax.ShapeDtypeStruct((2,), jnp.float32),
    "b": jax.ShapeDtypeStruct((4,), jnp.int32),
  }
  words = data.from_arrays(np.array([b"a", b"b"], dtype=object), [0, 1], name="words")
  with pytest.raises(TypeError, match="inputs of 'words' are text, .* tokenize it first"):
    data.streamed(words, batch_size=1, data_seed=0)


# Several inputs.


@pytest.fixture(scope="module")
def pairs():
  """Five examples of a picture and a mask."""
  images = np.arange(5 * 3 * 3, dtype=np.uint8).reshape(5, 3, 3, 1)
  mask = (np.arange(5)[:, None] > np.arange(4)).astype(np.int32)
  return data.from_arrays({"image": images, "mask": mask}, [0, 1, 0, 1, 0], name="pairs")


def test_dicts_of_inputs_go_all_the_way(pairs, strict_promotion):
  crops = data.crop(1)
  pictures = data.Augmentation(
    lambda inputs, number: {**inputs, "image": crops.apply(inputs["image"], number)}, crops.choices
  )
  options = {"batch_size": 2, "data_seed": 1, "augmentation": pictures}
  one, other = data.on_device(pairs, **options), data.streamed(pairs, **options)
  batch = jax.jit(one.cut)(one.shared, pick(one.items(0, 3), 2))
  assert_same(batch, jax.jit(other.cut)(None, pick(other.items(0, 3), 2)))
  np.testing.assert_array_equal(batch.inputs["mask"], pairs.inputs["mask"][batch.index])
  # The same pictures alone see the same views.
  alone = data.from_arrays(pairs.inputs["image"], pairs.labels)
  source = data.on_device(alone, batch_size=2, data_seed=1, augmentation=crops)
  cut = jax.jit(source.cut)(source.shared, pick(source.items(2, 1), 0))
  np.testing.assert_array_equal(batch.inputs["image"], cut.inputs)
  assert batch.inputs["image"].dtype == jnp.float32  # uint8 is scaled by default,
  assert batch.inputs["mask"].dtype == jnp.int32  # and nothing else

  batches = data.evaluation_batches(pairs, batch_size=4)
  assert {k: v.shape for k, v in batches.inputs.items()} == {
    "image": (2, 4, 3, 3, 1),
    "mask": (2, 4, 4),
  }
  np.testing.assert_array_equal(batches.inputs["mask"][1, 0], pairs.inputs["mask"][4])
  np.testing.assert_allclose(batches.inputs["image"][1, 0], pairs.inputs["image"][4] / 255, 2e-7)


def test_what_is_for_one_array_says_so(pairs):
  with pytest.raises(
    ValueError, match=r"normalize=\(mean, std\) is for one array.*'image', 'mask'"
  ):
    data.evaluation_batches(pairs, batch_size=2, normalize=((0.5,), (0.5,)))
  with pytest.raises(ValueError, match=r"divide_by is for one array.*divide_by\(16\)\(inputs\["):
    data.DIGITS({"image": np.zeros((1, 2), np.uint8)})
  source = data.on_device(pairs, batch_size=2, data_seed=0, augmentation=data.crop_flip(1))
  with pytest.raises(ValueError, match=r"make an Augmentation .*\*\*inputs, 'image': crops.apply"):
    jax.eval_shape(source.cut, source.shared, pick(source.items(0, 1), 0))


@pytest.mark.parametrize(
  ("inputs", "message"),
  [
    ({"a": np.zeros((3, 1)), "b": np.zeros((2, 1))}, r"one length, .*{'a': 3, 'b': 2}"),
    ({"a": {"b": np.zeros((3, 1))}}, r"inputs\['a'\] is a dict within a dict"),
    ({}, "one length"),
    ({"a": np.zeros(())}, r"inputs\['a'\] must hold at least one example"),
    ([[1.0, 2.0], [3.0], [4.0]], "inputs cannot be made one array"),
    (
      {"a": np.array([[1.0], [np.nan], [np.inf]])},
      "'a' of 'arrays' hold NaN in 1 of 3 rows.*row 1",
    ),
  ],
)
def test_from_arrays_explains_inputs(inputs, message):
  with pytest.raises(ValueError, match=message):
    data.from_arrays(inputs, [0, 1, 1])


def test_arrays_without_labels_have_none():
  examples = data.from_arrays(np.zeros((3, 1), np.float32), None)
  assert examples.num_classes == 0
  assert data.evaluation_batches(examples, batch_size=3).labelled.tolist() == [[0.0] * 3]
  with pytest.raises(ValueError, match="labels is None"):
    data.from_arrays(np.zeros((3, 1)), None, num_classes=3)
  with pytest.raises(ValueError, match="labels is text, namely 'cat'"):
    data.from_arrays(np.zeros((2, 1)), ["cat", "dog"])


@pytest.mark.parametrize(
  ("normalize", "message"),
  [
    (((0.5,), (0.5, 0.5)), "one mean and one positive std for each channel"),
    (((0.5,), (0.0,)), "one positive std"),
    ((0.5, 0.5), "one mean"),
    (((0.1, 0.2), (1.0, 1.0)), r"is of 2 channels, but the inputs \(1, 2, 2, 3\) have 3"),
  ],
)
def test_normalisation_explains(normalize, message):
  with pytest.raises(ValueError, match=message):
    untyped(data.normalizer)(normalize)(np.zeros((1, 2, 2, 3), np.float32))


@pytest.mark.parametrize("normalize", [((123.7,), (58.4,)), ((0.0,), (16.0,))])
def test_bytes_are_not_normalised_by_numbers_of_bytes(normalize):
  scaled = data.normalizer(normalize)
  with pytest.raises(ValueError, match="divide mean and std by 255"):
    scaled(np.zeros((1, 2, 2, 3), np.uint8))
  assert np.isfinite(scaled(np.ones((1, 2, 2, 3), np.float32))).all()  # floats may be anything


def test_augmentations_of_one_choice_are_applied_and_none_changes_shapes():
  inputs, index = jnp.ones((2, 4)), jnp.arange(2)
  double = data.Augmentation(lambda x, number: 2 * x, choices=1)
  doubled = jax.jit(lambda: data.augment(double, inputs, 0, index, 0))()
  np.testing.assert_array_equal(doubled, 2 * inputs)
  halved = data.Augmentation(lambda x, number: x[::2], choices=2)
  with pytest.raises(ValueError, match=r"float32\[2, 4\] became float32\[2, 2\]"):
    jax.eval_shape(lambda: data.augment(halved, inputs, 0, index, 0))


# Dicts.


class ClassLabel:
  names = ("cat", "dog")


class HuggingFace:
  """What their `Dataset` has: rows by iteration, by number and by numbers, and features."""

  def __init__(self, rows, features=None):
    self.rows, self.features = rows, features

  def __iter__(self):
    return iter(self.rows)

  def __len__(self):
    return len(self.rows)

  def __getitem__(self, row):
    return self.rows[row]

  def __getitems__(self, rows):
    return [self.rows[row] for row in rows]


def test_from_dicts_takes_what_numpy_takes():
  pictures = np.arange(3 * 2 * 2, dtype=np.uint8).reshape(3, 2, 2)
  rows = [
    {"image": PIL.Image.fromarray(p), "label": jnp.int32(n % 2)} for n, p in enumerate(pictures)
  ]
  examples = data.from_dicts(HuggingFace(rows, {"label": ClassLabel()}), name="pets")
  np.testing.assert_array_equal(examples.inputs, pictures[..., None])
  assert (examples.inputs.dtype, examples.labels.tolist()) == (np.uint8, [0, 1, 0])
  assert (examples.num_classes, examples.label_names) == (2, ("cat", "dog"))
  tokens = ({"tokens": [n, 1], "mask": jnp.ones(2), "text": "!"} for n in range(9))
  both = data.Fields(inputs=("tokens", "mask"), labels=None)
  examples = data.from_dicts(tokens, both, limit=4)
  assert examples.inputs["tokens"].tolist() == [[n, 1] for n in range(4)]
  assert (sorted(examples.inputs), examples.num_classes) == (["mask", "tokens"], 0)
  words = [{"text": "ab", "label": "dog"}, {"text": "ba", "label": b"cat"}]
  letters = data.Fields(
    transform=lambda row: {"letters": [ord(letter) for letter in row["text"]]},
    label_names=("cat", "dog", "cow"),
  )
  examples = data.from_dicts(words, letters)
  assert examples.inputs["letters"].tolist() == [[97, 98], [98, 97]]
  assert (examples.labels.tolist(), examples.num_classes) == ([1, 0], 3)


GOOD = {"image": [1.0, 2.0], "label": 0}


@pytest.mark.parametrize(
  ("rows", "options", "message"),
  [
    ([GOOD, ([1.0], 0)], {}, "must be dicts, but row 1 is a tuple"),
    ({"train": [GOOD]}, {}, r"one dict with \['train'\]: of splits pass one"),
    ("cifar100", {}, "got the text 'cifar100'"),
    (7, {}, "needs an iterable of dicts, got int"),
    ([GOOD, {"image": [1.0, 2.0]}], {}, r"row 1 of 'rows' has no 'label'; it has \['image'\]"),
    ([{"img": [1.0], "label": 0}], {}, r"no 'image'.*Did you mean 'img'"),
    ([{"img": [1.0], "fine_label": 0}], {"inputs": "img"}, "Did you mean 'fine_label'"),
    ([GOOD, GOOD, {"image": [1.0], "label": 0}], {}, r"row 0 has \(2,\), row 2 has \(1,\)"),
    ([GOOD, {"image": [[1.0], [2.0, 3.0]], "label": 0}], {}, "row 1 of 'rows' cannot be made one"),
    ([{"image": "a cat", "label": 0}], {}, "'image' of row 0 of 'rows' is text.*tokenize"),
    ([{"image": PIL.Image.new("P", (2, 2)), "label": 0}], {}, r"palette.*convert\('RGB'\)"),
    ([GOOD, {"image": None, "label": 0}], {}, "'image' of row 1 of 'rows' is None"),
    ([GOOD, {"image": [np.nan, 2.0], "label": 0}], {}, "NaN in 1 of 2 rows, first in row 1"),
    (iter([]), {}, "gave no rows: it is empty, or an iterator that was used up"),
    ([{**GOOD, "label": "cat"}], {}, "is text, namely 'cat': pass label_names="),
    ([{**GOOD, "label": "cat"}], {"label_names": ("dog",)}, "not one of label_names=.*'cat'"),
    ([GOOD, {**GOOD, "label": 3}], {"num_classes": 3}, "lie in 0 .. 2 .*row 1 has 3"),
    ([GOOD, {**GOOD, "label": -1}], {}, "row 1 has -1.*withheld"),
    ([GOOD, {**GOOD, "label": [0, 1]}], {}, "labels of .* differ in shape: .*row 1"),
    ([{**GOOD, "label": np.nan}], {}, "not finite in row 0.*ignore"),
    ([{**GOOD, "label": [0, -1]}], {}, "row 0 has -1.*ignore"),
    ([{**GOOD, "weight": -1.0}], {"weight": "weight"}, "weight of .*not negative"),
    ([{**GOOD, "weight": [1.0, 1.0]}], {"weight": "weight"}, "weight of .*leading axes"),
    ([GOOD], {"limit": 0}, "limit=0 must be at least 1"),
    ([GOOD], {"num_classes": 2, "label_names": ("a",)}, "label_names must be 2"),
    ([GOOD], {"num_classes": 0}, "num_classes=0 must be at least 1"),
    ([GOOD], {"labels": None, "num_classes": 2}, "labels is None: leave them out"),
    ([GOOD], {"inputs": ()}, "inputs of row 0 of 'rows' are an empty dict"),
  ],
)
def test_from_dicts_explains(rows, options, message):
  fields = {name: value for name, value in options.items() if name != "limit"}
  with pytest.raises((TypeError, ValueError), match=message):
    data.from_dicts(rows, data.Fields(**fields), limit=options.get("limit"))


def test_what_a_transform_raises_names_the_row():
  with pytest.raises(KeyError) as caught:
    data.from_dicts([GOOD], data.Fields(transform=lambda row: row["pixels"]))
  assert caught.value.__notes__ == ["raised by transform at row 0 of 'rows'"]


def test_a_sequence_is_read_when_its_turn_comes():
  rows = rows_of(numbered(11))
  arrays = data.streamed(numbered(11), batch_size=4, data_seed=5).items(1, 3)
  for lazy in (rows, HuggingFace(rows)):
    opened = data.from_sequence(lazy, FIELDS)
    assert_same(data.streamed(opened, batch_size=4, data_seed=5).items(1, 3), arrays)
  # A row that is wrong later is an error then, with its number.
  rows[7] = {"x": np.zeros(2, np.float32), "label": 0}
  with pytest.raises(ValueError, match=r"differ in shape.*\(2,\)"):
    data.streamed(data.from_sequence(rows, FIELDS), batch_size=11, data_seed=0).items(0, 1)


class Broken(HuggingFace):
  def __getitems__(self, rows):
    raise OSError("disk gone")


@pytest.mark.parametrize(
  ("rows", "options", "error", "message"),
  [
    (
      (row for row in [GOOD]),
      {},
      TypeError,
      "rows with a length .* goes to from_dicts .* iterated",
    ),
    ([], {}, ValueError, "are empty"),
    ([GOOD], {"num_classes": None}, ValueError, "num_classes must be given: from_sequence"),
    ([GOOD], {"inputs": "pixels"}, ValueError, "row 0 of 'rows' has no 'pixels'"),
    (Broken([GOOD]), {}, RuntimeError, r"Rows \[0\] of 'rows' cannot be read \(OSError: disk gone"),
    ({"train": [GOOD]}, {}, TypeError, "of splits pass one"),
  ],
)
def test_from_sequence_explains(rows, options, error, message):
  with pytest.raises(error, match=message):
    data.from_sequence(rows, data.Fields(**{"num_classes": 2, **options}))


# Streams that can only be iterated.


def test_a_stream_keeps_its_order_and_resumes():
  def open_(epoch):
    return ({"x": [float(10 * epoch + n)], "label": n % 2} for n in range(7))

  fields, sizes = data.Fields(inputs="x", num_classes=2), {"size": 7, "batch_size": 3}

  def fresh():
    return data.iterated(open_, fields, **sizes, data_seed=0, views=2)

  whole = fresh().items(0, 7)
  np.testing.assert_array_equal(
    whole["inputs"][..., 0],
    [[10 * (s // 2) + 3 * (s % 2) + n for n in range(3)] for s in range(7)],
  )
  np.testing.assert_array_equal(whole["index"][3], [3, 4, 5])
  np.testing.assert_array_equal(whole["view"], [0, 0, 1, 1, 0, 0, 1])
  np.testing.assert_array_equal(whole["labels"][1], [1, 0, 1])
  assert whole["labelled"].all()
  source = fresh()
  for step, count in ((3, 2), (5, 1), (0, 4), (6, 1)):
    assert_same(source.items(step, count), pick(whole, slice(step, step + count)))
  bare = data.iterated(open_, data.Fields(inputs="x", labels=None), **sizes, data_seed=0)
  assert not bare.items(0, 1)["labelled"].any()
  assert bare.num_classes == 0


USED_UP = iter([{"image": [1.0, 2.0], "label": 0}])


def stream(open_, batch_size=2, **fields):
  fields = data.Fields(**{"num_classes": 2, **fields})
  return untyped(data.iterated)(open_, fields, size=4, batch_size=batch_size, data_seed=0)


def test_a_short_epoch_is_an_error_for_every_process():
  def open_(epoch):
    return iter([GOOD] * (4 if epoch == 0 else 3))

  for part in ((0, 1), (0, 2), (1, 2)):
    source = stream(open_)
    assert source.items(0, 3, part)["labels"].shape == (3, 2 // part[1])
    with pytest.raises(RuntimeError, match="Epoch 1 of 'stream' ended after 3 rows, but size=4"):
      source.items(3, 1, part)


@pytest.mark.parametrize(
  ("open_", "options", "error", "message"),
  [
    ([GOOD], {}, TypeError, "open of 'stream' must be a function of the epoch"),
    (lambda: [GOOD], {}, TypeError, "must take one argument, the epoch's number"),
    (
      lambda epoch: 3,
      {},
      TypeError,
      r"open\(0\) of 'stream' must give an iterable of dicts, got int",
    ),
    (lambda epoch: USED_UP, {}, ValueError, "gives the same iterator at every"),
    (lambda epoch: [], {}, ValueError, "'stream' gave no rows"),
    (
      lambda epoch: [GOOD],
      {"num_classes": None},
      ValueError,
      "num_classes must be given: iterated",
    ),
    (lambda epoch: [GOOD], {"batch_size": 5}, ValueError, "batch_size=5 must lie in 1 .. 4"),
    (lambda epoch: [GOOD], {"inputs": "x"}, ValueError, "row 0 of 'stream' has no 'x'"),
  ],
)
def test_iterated_explains(open_, options, error, message):
  with pytest.raises(error, match=message):
    stream(open_, **options)


# Mixes.


@pytest.mark.parametrize(
  ("first", "second"),
  [("on_device", "records"), ("streamed", "on_device"), ("iterated", "iterated")],
)
def test_a_mix_is_both_in_their_shares(first, second):
  source = mix(first, second, share=0.3, batch_size=5)
  assert (source.batch_size, source.transfer, source.size) == (5, 2, 11)
  assert source.steps_per_epoch == 3  # of 11 examples by 3, not by 5
  alone = make(first, batch_size=3)
  items, wanted = source.items(1, 8), alone.items(1, 8)
  cut, cut_alone = jax.jit(source.cut), jax.jit(alone.cut)
  shown = []
  for step in range(8):
    batch = cut(source.shared, pick(items, step))
    mine = cut_alone(alone.shared, pick(wanted, step))
    assert_same(jax.tree.map(lambda leaf: np.asarray(leaf)[:3], batch), mine)
    batch = jax.tree.map(np.asarray, batch)
    assert batch.labelled[3:].tolist() == batch.labels[3:].tolist() == [0, 0]
    assert batch.weight.tolist() == [1.0] * 5
    # Transfer rows hold 100 + their number, and are counted on from the first source's size.
    np.testing.assert_array_equal(batch.inputs[3:, 0], batch.index[3:] - 11 + 100)
    shown.append(batch.index[3:])
  # Its own epochs: 6 examples by 2, whole from step 3 to 5 and from 6 to 8.
  for epoch in (shown[2:5], shown[5:8]):
    assert sorted(np.concatenate(epoch).tolist()) == list(range(11, 17))


def test_a_seed_reaches_both_streams_of_a_mix():
  source = mix("on_device", "on_device")
  again = dataclasses.replace(source, data_seed=6)
  one, other = source.items(0, 3), again.items(0, 3)
  for part in ("source", "transfer"):
    assert not np.array_equal(one[part]["index"], other[part]["index"])
  assert_same(other, mix("on_device", "on_device", data_seed=6).items(0, 3))
  # Mixed with itself, a set is not shown in the same order twice.
  alone = make("on_device")
  twice = data.mixed(alone, alone, share=0.5).items(0, 2)
  assert not np.array_equal(twice["source"]["index"], twice["transfer"]["index"])
  # Seeds side by side, as a run of several seeds has them.
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves)[:, 1], one, other)
  both = jax.jit(jax.vmap(source.cut, (None, 0)))(source.shared, stacked)
  cut = jax.jit(source.cut)
  for number, items in enumerate((one, other)):
    assert_same(pick(both, number), cut(source.shared, pick(items, 1)))


def test_a_mix_takes_another_batch_size():
  source = dataclasses.replace(mix("on_device", "streamed"), batch_size=6)
  assert (source.transfer, source.steps_per_epoch) == (3, 3)
  assert_same(source.items(1, 2), mix("on_device", "streamed", batch_size=6).items(1, 2))
  with pytest.raises(ValueError, match="batch_size=1 is 0 rows of transfer data, but both"):
    dataclasses.replace(source, batch_size=1)
  with pytest.raises(ValueError, match="batch_size=14 is 7 rows of transfer .* 'numbered' has 6"):
    dataclasses.replace(source, batch_size=14).items(0, 1)


def test_a_mix_explains():
  source = make("on_device")
  for share in (0, 1.0, -0.1, float("nan")):
    with pytest.raises(ValueError, match=f"share={share} must lie between 0 and 1"):
      data.mixed(source, source, share=share)
  with pytest.raises(ValueError, match=r"share=0.1 of batch_size=4 is 0 rows"):
    data.mixed(source, source, share=0.1)
  with pytest.raises(ValueError, match=r"share=0.95 of batch_size=4 is 4 rows"):
    data.mixed(source, source, share=0.95)
  with pytest.raises(TypeError, match="transfer must be a Source .* got Examples"):
    untyped(data.mixed)(source, numbered(6), share=0.5)
  with pytest.raises(ValueError, match="source is a mix itself"):
    data.mixed(data.mixed(source, source, share=0.5), source, share=0.5)
  wide = data.from_arrays(np.zeros((6, 2), np.uint8), None, name="wide")
  with pytest.raises(
    ValueError, match=re.escape("'numbered' and of 'wide' must agree") + r".*float32\[1\].*\[2\]"
  ):
    data.mixed(source, data.on_device(wide, batch_size=2, data_seed=0), share=0.5)
  # uint8 is float32 once scaled: what counts is what the networks see.
  grey = data.from_arrays(np.zeros((6, 1), np.uint8), None, name="grey")
  assert data.mixed(source, data.on_device(grey, batch_size=2, data_seed=0), share=0.5)


# Some labels.


@pytest.fixture(scope="module")
def uneven():
  """Classes of 400, 150, 45 and 5, shuffled."""
  labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), [400, 150, 45, 5]))
  return data.from_arrays(np.zeros((600, 1), np.float32), labels, num_classes=5, name="uneven")


def test_labels_are_given_out_evenly_and_nested(uneven):
  before = np.zeros(600)
  for share in (0, 0.01, 0.05, 0.1, 0.333, 0.5, 1):
    mask = data.some_labels(uneven, share, data_seed=3)
    assert (mask.dtype, mask.sum()) == (np.float32, round(share * 600))
    assert (mask >= before).all()
    before = mask
    if share:
      counts = np.bincount(uneven.labels, mask, minlength=4)
      assert counts.min() >= 1
      # In proportion to within one; the one that the smallest class must have costs others one.
      assert abs(counts - share * np.array([400, 150, 45, 5])).max() <= 2
  assert not np.array_equal(
    data.some_labels(uneven, 0.1, data_seed=3), data.some_labels(uneven, 0.1, data_seed=4)
  )
  source = data.on_device(
    uneven,
    batch_size=600,
    data_seed=3,
    labelled=data.some_labels(uneven, 0.05, data_seed=3),
  )
  assert source.cut(source.shared, pick(source.items(0, 1), 0)).labelled.sum() == 30


def test_the_chosen_labels_are_pinned():
  examples = data.from_arrays(np.zeros((8, 1)), [0, 0, 0, 0, 0, 0, 1, 1])
  assert data.some_labels(examples, 0.5, data_seed=0).tolist() == [0, 0, 1, 0, 1, 1, 1, 0]


def test_some_labels_explains(uneven):
  with pytest.raises(
    ValueError, match=r"is 3 labels, too few for one of each of the 4 classes"
  ) as e:
    data.some_labels(uneven, 0.005, data_seed=0)
  least = float(re.search(r"at least ([\d.]+),", str(e.value)).group(1))
  assert data.some_labels(uneven, least, data_seed=0).sum() == 4
  for share in (-0.1, 1.1):
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\]"):
      data.some_labels(uneven, share, data_seed=0)
  with pytest.raises(ValueError, match="has no labels to choose from"):
    data.some_labels(data.from_arrays(np.zeros((3, 1)), None), 0.5, data_seed=0)
  opened = data.from_sequence([GOOD], data.Fields(num_classes=1))
  with pytest.raises(TypeError, match="needs Examples"):
    untyped(data.some_labels)(opened, 0.5, data_seed=0)
