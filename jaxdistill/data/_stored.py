"""The records that TFDS stored as ArrayRecord, parsed and decoded without its wrappers.

TFDS's own data source spends most of its time around the work: it walks every record's features as
nested dicts, twice, and looks through all of Pillow's formats for that of each picture. Here each
feature's way is settled once, when a split is opened; what decodes is still TFDS's (or, for common
pictures where OpenCV is not installed, Pillow as TFDS calls it), and what is less plain than one
value goes TFDS's whole way.
"""

from __future__ import annotations

import functools
import io
import pathlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.features import image_feature
from tensorflow_datasets.proto import tf_example_pb2

__all__ = ["Stored", "decided_by", "opened"]

# How a file begins, and the one format that Pillow then need try.
_FORMATS = {b"\x89PN": ("PNG",), b"\xff\xd8\xff": ("JPEG",), b"RIF": ("WEBP",)}

# What values parsed from a record are, where NumPy would make nothing else of them.
_AS_PARSED = {np.dtype(np.object_): bytes, np.dtype(np.int64): int, np.dtype(np.float32): float}


def opened(builder: tfds.core.DatasetBuilder, split: str, skipped: Collection[str] = ()) -> Any:
  """Random access to a split's examples, dicts of features.

  Args:
    builder: of a set that is prepared, in a format with random access.
    split: TFDS's words, which TFDS itself turns into files and rows.
    skipped: features that stay as they are stored.

  Returns:
    ``len(examples)`` and ``examples.__getitems__(rows)``; the same values as TFDS's data source
    gives, which is what is returned for files other than ArrayRecord.
  """
  raw = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
  if builder.info.file_format.value == "array_record":
    return Stored(raw.data_source, builder.info.features, frozenset(skipped))
  decoders = {key: tfds.decode.SkipDecoding() for key in skipped}
  return builder.as_data_source(split, decoders=decoders or None)


def decided_by(builder: tfds.core.DatasetBuilder, split: str) -> dict[str, Any] | None:
  """All that decides a split's decoded examples, as JSON has it: its files' rows, what reads them.

  None where the files are not on this machine's disk.
  """
  try:
    rows = [
      (pathlib.Path(part.filename), part.skip, part.take)
      for part in builder.info.splits[split].file_instructions
    ]
    files = [
      [file.name, file.stat().st_size, file.stat().st_mtime_ns, skip, take]
      for file, skip, take in rows
    ]
  except OSError:
    return None
  return {
    "set": builder.info.full_name,
    "files": files,
    "features": builder.info.features.to_json(),
    # A decoder's next version may round a pixel of a JPEG in another way.
    "readers": [tfds.__version__, _version(image_feature.PIL_Image), _version(image_feature.cv2)],
  }


def _version(module: Any) -> str | None:
  return getattr(module, "__version__", None)


class Stored:
  """Examples by number, each parsed and decoded when it is asked for.

  Args:
    records: ``len(records)`` and ``records.__getitems__(rows)``, serialized ``tf.train.Example``.
    features: what TFDS says is in them.
    skipped: features that stay as they are stored.
  """

  def __init__(
    self, records: Any, features: tfds.features.FeaturesDict, skipped: Collection[str]
  ) -> None:
    self._records = records
    plain = {key: feature for key, feature in features.items() if _is_one_value(feature)}
    rest = {key: feature for key, feature in features.items() if key not in plain}
    self._plain = [
      (key, _parser(feature), _same if key in skipped else _decoder(feature))
      for key, feature in plain.items()
    ]
    self._rest = tfds.features.FeaturesDict(rest) if rest else None

  def __len__(self) -> int:
    return len(self._records)

  def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
    """The examples of these rows; ValueError for one that cannot be parsed or decoded."""
    examples = []
    for row, record in zip(rows, self._records.__getitems__(rows), strict=True):
      try:
        examples.append(self._example(record))
      except Exception as error:  # protobuf's, Pillow's, TFDS's own kinds
        raise ValueError(f"record {row}: {error}") from error
    return examples

  def _example(self, record: bytes) -> dict[str, Any]:
    stored = tf_example_pb2.Example.FromString(record).features.feature
    example = {}
    for key, parse, decode in self._plain:
      # As TFDS does: what a record lacks is None, which optional features may be.
      example[key] = decode(parse(stored[key]) if key in stored else None)
    if self._rest is not None:
      example |= self._rest.deserialize_example_np(record)
    return example


def _is_one_value(feature: tfds.features.FeatureConnector) -> bool:
  """Whether a record holds the feature as one list of one shape, under its own name."""
  info = feature.get_serialized_info()
  return (
    isinstance(info, tfds.features.TensorInfo)
    and info.sequence_rank == info.dataset_lvl == 0
    and info.shape.count(None) < 2
  )


def _parser(feature: tfds.features.FeatureConnector) -> Callable[[Any], Any]:
  """What makes one value, or one array of the stored shape, of a ``tf.train.Feature``."""
  info = feature.get_serialized_info()
  dtype = np.dtype(info.np_dtype)
  if info.shape:
    return functools.partial(_array, dtype, [-1 if n is None else n for n in info.shape])
  return functools.partial(_one, dtype, _AS_PARSED.get(dtype))


def _one(dtype: np.dtype, parsed: type | None, stored: Any) -> Any:
  values = getattr(stored, stored.WhichOneof("kind")).value
  if len(values) == 1 and type(values[0]) is parsed:
    return values[0]
  return np.array(values, dtype).item()  # raises unless there is one


def _array(dtype: np.dtype, shape: list[int], stored: Any) -> np.ndarray:
  return np.array(getattr(stored, stored.WhichOneof("kind")).value, dtype).reshape(shape)


def _same(value: Any) -> Any:
  return value


def _decoder(feature: tfds.features.FeatureConnector) -> Callable[[Any], Any]:
  """What makes the feature of its stored value."""
  by_pillow = type(feature) is tfds.features.Image and image_feature.cv2 is None
  if by_pillow and feature.np_dtype == np.uint8:
    return functools.partial(_picture, feature)
  return feature.decode_example_np


def _picture(feature: tfds.features.Image, encoded: bytes | None) -> np.ndarray:
  """A picture as TFDS decodes it without OpenCV, but one format is tried and not forty."""
  formats = None if encoded is None else _FORMATS.get(encoded[:3])
  if encoded is None or formats is None:
    return feature.decode_example_np(encoded)
  with image_feature.PIL_Image.open(io.BytesIO(encoded), formats=formats) as image:
    pixels = np.asarray(image, np.uint8)
  # A grey picture in a set of coloured ones has its one channel repeated.
  return np.repeat(pixels[..., None], feature.shape[-1], -1) if pixels.ndim == 2 else pixels
