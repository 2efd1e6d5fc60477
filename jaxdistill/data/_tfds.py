"""Data sets by name: TFDS splits, read without TensorFlow.

The builder of `Digits` lives here too. What comes out is `Examples` (arrays in memory) or `Records`
(random access, decoded when read).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxdistill import _check, _extras
from jaxdistill.data._examples import Examples, Records, check_classes, count_classes

_extras.need("reading a data set by its name (data.load)", "tensorflow_datasets")
import tensorflow_datasets as tfds  # noqa: E402

from jaxdistill.data._kept import folder_of, kept  # noqa: E402
from jaxdistill.data._stored import decided_by, opened  # noqa: E402

__all__ = ["Digits", "load", "records", "splits"]

_DIGITS_TEST = 697  # 1,797 less the round 1,100 that train keeps
_BLOCK = 1000  # examples decoded at a time, so that the decoded copy stays small
# What TFDS encodes with NumPy alone; images, audio and video go through TensorFlow.
_PLAIN_FEATURES = (
  tfds.features.ClassLabel,
  tfds.features.Scalar,
  tfds.features.Tensor,
  tfds.features.Text,
)


class Digits(tfds.core.GeneratorBasedBuilder):
  """Handwritten digits that come with scikit-learn, as a TFDS set: no download, no TensorFlow.

  1,797 grey images of 8 by 8 with values 0 to 16, split once and for all into 1,100 for training
  and 697 for the test, stratified by class. Importing this module registers the name ``digits``.

  Source: E. Alpaydin and C. Kaynak, *Optical Recognition of Handwritten Digits*, UCI Machine
  Learning Repository, 1998.
  """

  VERSION = tfds.core.Version("1.0.0")
  # There are no checksums beside this file, and TFDS looks for them through importlib_resources,
  # which it does not install.
  code_path = None

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=(
        "The test set of UCI's optical recognition of handwritten digits, as scikit-learn carries "
        "it: 1,797 images of 8x8 pixels, each the count (0 to 16) of set pixels in a 4x4 block of "
        "a 32x32 bitmap. Split here into train and test, stratified by class."
      ),
      features=tfds.features.FeaturesDict(
        {
          "id": tfds.features.Text(),
          "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
          "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
        }
      ),
      supervised_keys=("image", "label"),
      homepage="https://doi.org/10.24432/C50P49",
      citation=(
        "@misc{alpaydin1998digits, author={Alpaydin, E. and Kaynak, C.}, title={Optical "
        "Recognition of Handwritten Digits}, howpublished={UCI Machine Learning Repository}, "
        "year={1998}, doi={10.24432/C50P49}}"
      ),
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
    del dl_manager
    _extras.need("the data set 'digits'", "sklearn")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.uint8)
    order = _stratified_order(labels)
    return {
      "train": self._generate_examples(images, labels, np.sort(order[_DIGITS_TEST:])),
      "test": self._generate_examples(images, labels, np.sort(order[:_DIGITS_TEST])),
    }

  def _generate_examples(
    self, images: np.ndarray, labels: np.ndarray, rows: np.ndarray
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    for row in rows.tolist():
      yield row, {"id": str(row), "image": images[row], "label": int(labels[row])}


def _stratified_order(labels: np.ndarray) -> np.ndarray:
  """A fixed random order in which every prefix holds the classes in proportion."""
  random = np.random.RandomState(0)  # its stream is frozen across NumPy versions
  quantile = np.zeros(len(labels))
  for label in range(int(labels.max()) + 1):
    rows = random.permutation(np.flatnonzero(labels == label))
    quantile[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
  return np.lexsort((labels, quantile))


def records(
  name: str,
  split: str = "train",
  *,
  data_dir: str | pathlib.Path | None = None,
  inputs: str = "image",
  labels: str | None = "label",
  weight: str | None = None,
  transform: Callable[[Any], Any] | None = None,
  num_classes: int | None = None,
  ignore: float | None = None,
) -> Records:
  """Opens a TFDS split for random access; nothing is decoded yet.

  Args:
    name: TFDS's name, e.g. ``"cifar100"``, ``"glue/sst2"``, ``"cifar10:3.0.2"``; or ``"digits"``.
    split: TFDS's words, e.g. ``"train"``, ``"train[:90%]"``, ``"train+test"``.
    data_dir: where sets are prepared; TFDS's own default (``~/tensorflow_datasets``).
    inputs: the feature that is the input.
    labels: the feature that is the label: a class, a number, an array of one shape in all rows, a
      picture whose pixels are classes; None for sets without.
    weight: the feature that says how much an example counts, or each of its labels; None for 1.
    transform: applied to each input when it is read (a resize and a crop, say).
    num_classes: K, where the set does not say it of integer labels.
    ignore: the label that stands for none, see `Examples`.

  Returns:
    The records. A set that is not there yet is prepared first, where that is possible.

  Raises:
    ValueError: an unknown name, split or feature, an empty split, or integer labels of which nobody
      says how many classes there are.
    ModuleNotFoundError: preparing the set needs TensorFlow; raised before any download.
  """
  builder = _prepared(name, data_dir)
  found = _records(builder, name, split, inputs, labels, weight, num_classes, ignore)
  found = dataclasses.replace(found, transform=transform)
  if labels is not None and not found.num_classes:
    check_classes("records", found, found.read(np.arange(1))["labels"])
  return found


def _records(
  builder: tfds.core.DatasetBuilder,
  name: str,
  split: str,
  inputs: str,
  labels: str | None,
  weight: str | None,
  num_classes: int | None,
  ignore: float | None,
) -> Records:
  """The records of a split of a set that is prepared; all but the builder is checked here."""
  features = builder.info.features
  for argument, feature in (("inputs", inputs), ("labels", labels), ("weight", weight)):
    if feature is not None and feature not in features:
      raise ValueError(
        f"{argument}={feature!r} is not a feature of {name!r}, which has: {sorted(features)}."
      )
  label = None if labels is None else features[labels]
  classes, names = _classes(label)
  if num_classes is not None:
    _check.whole("num_classes", num_classes)
  if label is not None and not (isinstance(label, tfds.features.Image) or _is_number(label)):
    raise ValueError(
      f"labels={labels!r} of {name!r} is no class, number, array or picture of classes but "
      f"{label!r}: read the set with labels=None, make numbers of what you need, and use "
      "from_arrays."
    )
  if weight is not None and not _is_number(features[weight]):
    raise ValueError(
      f"weight={weight!r} of {name!r} is no number or array of numbers but {features[weight]!r}."
    )
  _check_split(builder, name, split)
  # Decoding is most of the reading: leave out pictures that nobody asked for.
  skipped = {
    key
    for key, feature in features.items()
    if isinstance(feature, tfds.features.Image) and key not in (inputs, labels)
  }
  return Records(
    source=opened(builder, split, skipped),
    inputs=inputs,
    labels=labels,
    num_classes=num_classes or classes,
    name=builder.info.name,
    version=str(builder.info.version),
    split=split,
    label_names=names if num_classes in (None, len(names)) else (),
    ids=None if "id" not in features else lambda: _ids(builder, split),
    weight=weight,
    ignore=ignore,
  )


def _is_number(feature: Any) -> bool:
  """Whether a feature is a class, a number or an array of numbers, of one shape in all rows."""
  inner = feature
  while isinstance(inner, tfds.features.Sequence) and None not in feature.shape:
    inner = inner.feature
  tensor = isinstance(inner, tfds.features.Tensor)
  return tensor and np.dtype(feature.np_dtype).kind in "biuf"


def _classes(label: Any) -> tuple[int, tuple[str, ...]]:
  """How many classes a feature has, and what they are called; 0 where it does not say."""
  count = getattr(label, "num_classes", None) or 0
  if not count and _is_number(label) and label.shape and np.dtype(label.np_dtype).kind == "b":
    count = label.shape[-1] or 0  # several labels at once, each on or off
  return count, tuple(getattr(label, "names", None) or ()) if count else ()


def _ids(builder: tfds.core.DatasetBuilder, split: str) -> list[str]:
  """The ids of a split; nothing else of it is decoded."""
  source = opened(builder, split, set(builder.info.features) - {"id"})
  return [
    _text(example["id"])
    for start in range(0, len(source), _BLOCK)
    for example in source.__getitems__(range(start, min(start + _BLOCK, len(source))))
  ]


def load(
  name: str,
  split: str = "train",
  *,
  data_dir: str | pathlib.Path | None = None,
  inputs: str = "image",
  labels: str | None = "label",
  weight: str | None = None,
  cache: bool | str | os.PathLike[str] = True,
  num_classes: int | None = None,
  ignore: float | None = None,
) -> Examples:
  """Reads a whole TFDS split into memory, without TensorFlow.

  What is decoded is kept for the next process, where that is at most 1 GiB and no text: decoding
  CIFAR-100's 50,000 pictures takes a core about 10 seconds, loading them a fraction of one. Kept
  arrays are verified by their SHA-256, and belong to the files they were made of: to those rows,
  names, sizes and times of writing. All entries together take at most 4 GiB; those that were not
  used for longest go. Threads would make decoding slower, not faster (most of the time is Python's
  own, under its lock), so there are none.

  Args:
    name: TFDS's name, e.g. ``"cifar100"``; or ``"digits"``.
    split: TFDS's words, e.g. ``"train[:90%]"``, rounded as TFDS rounds.
    data_dir: where sets are prepared; TFDS's own default (``~/tensorflow_datasets``).
    inputs: the feature that is the input.
    labels: the feature that is the label: a class, a number, an array of one shape in all rows, a
      picture whose pixels are classes; None for sets without.
    weight: the feature that says how much an example counts, or each of its labels; None for 1.
    cache: where decoded arrays are kept: True for ``jaxdistill/data`` in the user's cache folder
      (``$XDG_CACHE_HOME``, else ``~/.cache``), a folder, or False for nowhere. One that cannot be
      written to is no error, but a warning.
    num_classes: K, where the set does not say it of integer labels; one more than the largest where
      nobody does.
    ignore: the label that stands for none, see `Examples`.

  Returns:
    The examples, in the order in which they are stored.

  Raises:
    ValueError: an unknown name, split or feature, an empty split, or labels out of range.
    TypeError: ``cache`` is neither a truth value nor a folder.
    ModuleNotFoundError: preparing the set needs TensorFlow; raised before any download.
  """
  folder = folder_of(cache)
  builder = _prepared(name, data_dir)
  part = _records(builder, name, split, inputs, labels, weight, num_classes, ignore)
  decides = None if folder is None else decided_by(builder, split)
  decode = functools.partial(_decoded, part)
  if folder is None or decides is None:
    arrays = decode()
  else:
    asked = {"inputs": inputs, "labels": labels, "num_classes": num_classes, "ignore": repr(ignore)}
    # Named only where there is one: what was kept of sets without stays good.
    if weight is not None:
      asked["weight"] = weight
    arrays = kept(folder, part.name, {**decides, **asked}, decode)
  counts = part.has_labels and not part.num_classes
  return Examples(
    **arrays,
    num_classes=count_classes(arrays["labels"], ignore) if counts else part.num_classes,
    name=part.name,
    version=part.version,
    split=split,
    label_names=part.label_names,
    has_labels=part.has_labels,
    ignore=ignore,
  )


def _decoded(part: Records) -> dict[str, Any]:
  """The inputs, labels, ids and weights, if any, of all records, named as in `Examples`."""
  size, blocks, ids = len(part), [], []
  for start in range(0, size, _BLOCK):
    rows = np.arange(start, min(start + _BLOCK, size))
    decoded = part.features(rows)
    blocks.append(part.stack(decoded, rows))
    ids += [_text(one.get("id", row)) for row, one in zip(rows.tolist(), decoded, strict=True)]
  return {
    **{key: np.concatenate([block[key] for block in blocks]) for key in blocks[0]},
    "ids": np.array(ids),
  }


def splits(
  name: str, *, published: bool = False, data_dir: str | pathlib.Path | None = None
) -> dict[str, str | None]:
  """Which parts of a TFDS set are train, validation and test: split strings for `load`.

  The set's own validation split is used where it has one and a test split besides; otherwise the
  last tenth of ``train`` is held out (``train[90%:]``). A set with a validation split alone
  (ImageNet) is tested on that, as the field does, and its validation is held out of ``train``.

  Args:
    name: TFDS's name.
    published: the protocol of most papers: train on all of ``train`` and report the last epoch, so
      validation is None.
    data_dir: where sets are prepared; TFDS's own default.

  Returns:
    ``{"train": ..., "validation": ..., "test": ...}``; ``validation`` may be None.

  Raises:
    ValueError: an unknown name, or a set without ``train``, or with nothing to test on.
    ModuleNotFoundError: preparing the set needs TensorFlow; raised before any download.
  """
  # Choices are made on validation, and test is read once: they must never be the same rows.
  has = set(_prepared(name, data_dir).info.splits)
  test = next((split for split in ("test", "validation") if split in has), None)
  if "train" not in has or test is None:
    raise ValueError(
      f"{name!r} needs a split 'train' and one of 'test' and 'validation' for the usual parts, but "
      f"has {sorted(has)}: pass your own split strings to load."
    )
  if published:
    return {"train": "train", "validation": None, "test": test}
  if test == "test" and "validation" in has:
    return {"train": "train", "validation": "validation", "test": test}
  return {"train": "train[:90%]", "validation": "train[90%:]", "test": test}


def _text(value: Any) -> str:
  """An id as a string."""
  return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _check_split(builder: tfds.core.DatasetBuilder, name: str, split: str) -> None:
  """Raises where TFDS does not know the split, or it holds nothing."""
  sizes = {key: info.num_examples for key, info in builder.info.splits.items()}
  try:
    count = builder.info.splits[split].num_examples
  except Exception as error:  # TFDS raises several kinds here
    raise ValueError(
      f"split={split!r} is not a split of {name!r}, which has {sizes}, or a slice of one such as "
      f"'train[:90%]'."
    ) from error
  if not count:
    raise ValueError(f"split={split!r} of {name!r} is empty; its splits have {sizes} examples.")


def _prepared(name: str, data_dir: str | pathlib.Path | None) -> tfds.core.DatasetBuilder:
  """A builder whose files are there, in a format with random access."""
  if not isinstance(name, str) or not name:
    raise TypeError(f"name={_check.show(name)} must be a data set's name, such as 'cifar100'.")
  options = {} if data_dir is None else {"data_dir": str(data_dir)}
  try:
    builder = tfds.builder(name, **options)
  except tfds.core.DatasetNotFoundError as error:
    raise ValueError(_unknown(name)) from error
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(_needs_tensorflow(name), name=error.name) from error
  except ValueError as error:  # a name that cannot be one, or an unknown configuration
    raise ValueError(f"name={name!r} is none of TFDS's: {_check.short(error)}") from error
  if not builder.is_prepared():
    _prepare(builder, name, options)
    builder = tfds.builder(name, **options)
  formats = {value.value for value in builder.info.available_file_formats()}
  if not formats & {"array_record", "parquet"}:
    raise ValueError(
      f"{name!r} is prepared under {builder.data_dir} as {sorted(formats)}, which has no random "
      "access: prepare it again with file_format='array_record', or choose another data_dir."
    )
  return builder


def _prepare(builder: tfds.core.DatasetBuilder, name: str, options: dict[str, str]) -> None:
  """Prepares a set, or stops before the download where TensorFlow is needed and absent."""
  # Before the download: hours of it would end in an ImportError.
  if not _extras.there("tensorflow") and _uses_tensorflow(builder):
    raise ModuleNotFoundError(_needs_tensorflow(name, builder.data_dir), name="tensorflow")
  try:
    builder.download_and_prepare(file_format="array_record")
  except _extras.MissingExtraError:
    raise
  except ModuleNotFoundError as error:
    message = f"Preparing {name!r} needs a package that is missing: pip install {error.name}."
    if error.name == "tensorflow":
      message = _needs_tensorflow(name, builder.data_dir)
    raise ModuleNotFoundError(message, name=error.name) from error
  except OSError:
    # Another process may have finished first; then its files are as good as ours.
    if not tfds.builder(name, **options).is_prepared():
      raise


def _uses_tensorflow(builder: tfds.core.DatasetBuilder) -> bool:
  """Whether preparing the set needs TensorFlow: for its features, or in the builder's own code."""
  plain = all(isinstance(value, _PLAIN_FEATURES) for value in builder.info.features.values())
  return not plain or hasattr(sys.modules[type(builder).__module__], "tf")


def _needs_tensorflow(name: str, folder: str | None = None) -> str:
  """The message for a set that cannot be prepared here."""
  where = "is not prepared here" if folder is None else f"is not prepared under {folder}"
  return (
    f"The data set {name!r} {where}, and preparing it needs TensorFlow, which is not installed "
    "(nothing was downloaded): pip install 'jaxdistill[prepare]', or pass data_dir=, the folder "
    "where it was prepared elsewhere. Reading it afterwards needs no TensorFlow."
  )


def _unknown(name: str) -> str:
  """The message for a name that TFDS does not know, with its nearest neighbours."""
  known = sorted(set(tfds.list_builders(with_community_datasets=False)))
  bare = name.split(":")[0].split("/")[0].lower()
  near = difflib.get_close_matches(bare, known, n=3, cutoff=0.6)
  hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
  some = (
    " Without TensorFlow TFDS lists only some of its sets: pip install 'jaxdistill[prepare]'."
    if not _extras.there("tensorflow")
    else ""
  )
  return (
    f"name={name!r} is not a data set that TFDS knows, nor one prepared under data_dir. {hint}"
    f"tensorflow_datasets.list_builders() lists them; for your own arrays use from_arrays.{some}"
  )
