"""Records that TFDS stored: the same values as TFDS's own data source gives, and its slices."""

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.features import image_feature

from jaxdistill import data
from jaxdistill.data import _stored


def assert_same(one, other):
  """The same containers, types and values, to any depth."""
  assert type(one) is type(other)
  if isinstance(one, dict):
    assert one.keys() == other.keys()
    for key in one:
      assert_same(one[key], other[key])
  elif isinstance(one, list) or (isinstance(one, np.ndarray) and one.dtype == object):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
      assert_same(a, b)
  elif isinstance(one, np.ndarray):
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    np.testing.assert_array_equal(one, other)
  else:
    assert one == other


def encoded(pixels, kind, **options):
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, kind, **options)
  return file.getvalue()


class Odd(tfds.core.GeneratorBasedBuilder):
  """A made-up set with a feature of every kind that TFDS decodes without TensorFlow."""

  VERSION = tfds.core.Version("1.0.0")
  code_path = None

  def _info(self):
    f = tfds.features
    numbers = f.Sequence({"word": f.Text(), "place": f.Scalar(np.int32)})
    return tfds.core.DatasetInfo(
      builder=self,
      features=f.FeaturesDict(
        {
          "image": f.Image(shape=(None, None, 3)),
          "mask": f.Image(shape=(None, None, 1)),
          "label": f.ClassLabel(num_classes=3),
          "text": f.Text(),
          "flag": f.Scalar(np.bool_),
          "small": f.Scalar(np.uint8),
          "half": f.Scalar(np.float32),
          "double": f.Tensor(shape=(2,), dtype=np.float64),
          "large": f.Tensor(shape=(2, 1), dtype=np.uint64),
          "open": f.Tensor(shape=(None, 2), dtype=np.int64),
          "packed": f.Tensor(shape=(2, 3), dtype=np.float64, encoding="zlib"),
          "maybe": f.Scalar(np.int64, optional=True),
          "box": f.BBoxFeature(),
          "nested": {"a": f.Text(), "b": {"c": f.Scalar(np.int64)}},
          "list": f.Sequence(f.Scalar(np.int64)),
          "pictures": f.Sequence(f.Image(shape=(2, 2, 3))),
          "words": numbers,
          "spoken": f.Translation(languages=["de", "en"]),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(0, 12), "test": self._generate_examples(12, 17)}

  def _generate_examples(self, start, stop):
    for row in range(start, stop):
      random = np.random.default_rng(row)
      pixels = random.integers(0, 256, (4, 5, 3)).astype(np.uint8)
      grey = pixels[..., 0]
      kind, options = [("PNG", {}), ("JPEG", {}), ("WEBP", {"lossless": True}), ("BMP", {})][
        row % 4
      ]
      yield (
        row,
        {
          "image": encoded(grey if row % 5 == 4 else pixels, kind, **options),
          "mask": encoded(grey, "PNG"),
          "label": row % 3,
          "text": "é" * row,
          "flag": row % 2 == 0,
          "small": row,
          "half": row / 3,
          "double": random.normal(size=2),
          "large": np.array([[2**64 - 1 - row], [row]], np.uint64),
          "open": np.arange(2 * row).reshape(row, 2),
          "packed": random.normal(size=(2, 3)),
          "maybe": None if row % 2 else row,
          "box": tfds.features.BBox(0.0, 0.25, 0.5, 1.0),
          "nested": {"a": str(row), "b": {"c": row}},
          "list": list(range(row)),
          "pictures": [encoded(pixels[:2, k : k + 2], "PNG") for k in range(2)],
          "words": [{"word": str(k), "place": k} for k in range(row % 3)],
          "spoken": {"de": f"eins {row}", "en": f"one {row}"},
        },
      )


@pytest.fixture(scope="module")
def odd_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("odd")
  Odd(data_dir=str(folder)).download_and_prepare(file_format="array_record")
  return folder


def both(name, split, folder, skipped=()):
  """The examples as TFDS reads them, and as we do."""
  builder = tfds.builder(name, data_dir=str(folder))
  decoders = {key: tfds.decode.SkipDecoding() for key in skipped}
  theirs = builder.as_data_source(split, decoders=decoders or None)
  ours = _stored.opened(builder, split, skipped)
  assert isinstance(ours, _stored.Stored)
  assert len(theirs) == len(ours)
  return theirs, ours


@pytest.fixture(params=["as installed", "Pillow"])
def decoder(request, monkeypatch):
  """What TFDS decodes pictures with: OpenCV where there is any, else Pillow."""
  if request.param == "Pillow":
    monkeypatch.setattr(image_feature, "cv2", None)


@pytest.mark.parametrize("split", ["train", "train[25%:75%]", "test+train[-2:]"])
@pytest.mark.parametrize("skipped", [(), ("image", "mask")])
def test_every_feature_has_tfds_values(odd_dir, decoder, split, skipped):
  theirs, ours = both("odd", split, odd_dir, skipped)
  rows = range(len(theirs))
  assert_same(ours.__getitems__(rows), theirs.__getitems__(rows))
  assert_same(ours.__getitems__(rows[::-2]), theirs.__getitems__(rows[::-2]))


@pytest.mark.parametrize(
  ("name", "split"),
  [
    ("cifar100", "train[24990:25010]"),  # on both sides of where one file ends
    ("cifar100", "test[:5]+train[:5]"),
    ("sst2_sentence", "validation[:20]"),
    ("tiny_shakespeare", "train"),
  ],
)
def test_shared_sets_have_tfds_values(tfds_dir, decoder, name, split):
  theirs, ours = both(name, split, tfds_dir)
  rows = range(len(theirs))
  assert_same(ours.__getitems__(rows), theirs.__getitems__(rows))


class Listed(list):
  """Records in memory."""

  def __getitems__(self, rows):
    return [self[row] for row in rows]


def test_ragged_features_have_tfds_values():
  features = tfds.features.FeaturesDict(
    {"ragged": tfds.features.Sequence(tfds.features.Sequence(np.int64)), "plain": np.int64}
  )
  example = _stored.tf_example_pb2.Example()
  for key, values in (
    ("ragged/ragged_flat_values", [5, 6, 7]),
    ("ragged/ragged_row_lengths_0", [2, 0, 1]),
    ("plain", [3]),
  ):
    example.features.feature[key].int64_list.value.extend(values)
  record = example.SerializeToString()
  (ours,) = _stored.Stored(Listed([record]), features, ()).__getitems__([0])
  assert_same(dict(sorted(ours.items())), features.deserialize_example_np(record))
  assert [part.tolist() for part in ours["ragged"]] == [[5, 6], [], [7]]


@pytest.mark.parametrize(
  ("record", "message"),
  [(b"\xff", "record 1: Error parsing"), (b"", "record 1: ")],
)
def test_a_record_that_cannot_be_read_is_named(odd_dir, record, message):
  builder = tfds.builder("odd", data_dir=str(odd_dir))
  whole = _stored.opened(builder, "train")._records.__getitem__(0)
  stored = _stored.Stored(Listed([whole, record]), builder.info.features, ())
  with pytest.raises(ValueError, match=message):
    stored.__getitems__([0, 1])


def test_the_reader_opens_a_set_of_odd_features(odd_dir):
  part = data.load("odd", "test", data_dir=odd_dir, inputs="packed")
  assert (part.inputs.shape, part.inputs.dtype) == ((5, 2, 3), np.float64)
  assert part.labels.tolist() == [
    int(row) % 3 for row in data.load("odd", "test", data_dir=odd_dir, inputs="small").inputs
  ]
