"""What each model said of each example, kept beside a report so that no network is run again.

`answers` turns logits into three numbers an example; `jaxdistill.evaluation.examine` gathers them
over a split; `Predictions` holds them for all models with the labels, and `save` and `load` keep it
as ``predictions.npz``. Comparisons, slices and the page of a report are made of nothing else. Of a
task that is not of one class an example, `Details` are in the answers' place.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill import _check, runs
from jaxdistill.data import Batches
from jaxdistill.evaluation import tasks
from jaxdistill.types import Batch

__all__ = [
  "Answers",
  "Column",
  "Details",
  "Predictions",
  "column",
  "counted",
  "labelled",
  "load",
  "present",
  "read_columns",
  "save",
  "weight_of",
]

FORMAT = 2  # of a task that has no classes; of classes it is 1, which earlier versions read
FEW = 20  # as many different numbers, and each is a slice of its own; else quartiles
CLASSES = 1_000_000  # more than any task has; a file's number of them is a size to be taken
MANY = 200  # slices of a column; the rarest are put together
# What comes of a file that is no archive, is cut off, has a flipped bit or lacks a part.
_DAMAGE = (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError)


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
  """One model's answers on N examples, for each of its S instances.

  Attributes:
    predicted: ``[S, N]`` int32, the first of the largest logits; −1 where a logit is NaN.
    confidence: ``[S, N]`` float32, the probability of that class.
    probability: ``[S, N]`` float32, the probability of the label.
  """

  predicted: np.ndarray
  confidence: np.ndarray
  probability: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Column:
  """What slices a split: a value of each example, as the number of its slice.

  Attributes:
    codes: ``[N]`` int32; −1 where the value is missing.
    names: what the slices are called. One that no example belongs to stays, and is empty.
  """

  codes: np.ndarray
  names: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Details:
  """What one model did, whatever the labels mean; what its task does not give is empty.

  Attributes:
    values: ``[S, N]`` by metric, of each example; NaN where it has none.
    parts: ``[S, R]`` by metric, apart by ``rows[metric]``; NaN where a row has none.
    rows: what the R parts are called.
    points: ``[2, M]`` by target: labels, and what the first instance put out.
    said: of some examples, by ``index``, what its first instance said: a text, or a picture
      ``[H, W]`` of classes, below 0 for none.
  """

  values: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  parts: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  rows: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  points: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  said: dict[int, np.ndarray | str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
  """The answers of several models on the labelled examples of a split.

  Attributes:
    index: ``[N]``, which example of the split each is; pairs two runs.
    labels: ``[N]`` int32; empty where the labels are no classes.
    models: answers by the model's name (``teacher``, ``baseline``, ``student``); empty likewise.
    dataset: the data set's name and version.
    split: which split was read.
    seeds: those of baseline and student, in the order of S.
    label_names: what the classes are called; empty where nobody said.
    num_classes: K.
    columns: metadata by name, see `column`.
    shown: some examples to look at, by ``index``: a picture ``[H, W]`` or ``[H, W, 3]`` uint8, or a
      text.
    details: by the model's name, of any other task.
    truth: of some examples, by ``index``, what their label is, as `Details.said` has it.
    task: what the metrics are called and how they are read, as a report has it; empty for classes.
    weight: ``[N]``, how much each counts, above 0; None where all count alike.
  """

  index: np.ndarray
  labels: np.ndarray
  models: dict[str, Answers]
  dataset: str
  split: str
  seeds: tuple[int, ...] = ()
  label_names: tuple[str, ...] = ()
  num_classes: int = 0
  columns: dict[str, Column] = dataclasses.field(default_factory=dict)
  shown: dict[int, np.ndarray | str] = dataclasses.field(default_factory=dict)
  details: dict[str, Details] = dataclasses.field(default_factory=dict)
  truth: dict[int, np.ndarray | str] = dataclasses.field(default_factory=dict)
  task: dict[str, Any] = dataclasses.field(default_factory=dict)
  weight: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self.index)

  def weights(self) -> np.ndarray:
    """How much each example counts, ``[N]`` float64."""
    return np.ones(len(self)) if self.weight is None else self.weight.astype(np.float64)

  def weighed(self, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """``[S, M]`` of ``[S, N]``: those of some examples, whose plain mean is the weighted one."""
    if self.weight is None or not rows.any():
      return values[:, rows]
    weight = self.weights()[rows]
    return values[:, rows] * (weight / weight.mean())

  def values(self, model: str) -> dict[str, np.ndarray]:
    """Metrics of each example, ``[S, N]`` by name: of classes whether it is right."""
    if model in self.models:
      return {"accuracy": self.correct(model).astype(np.float64)}
    return self.details[model].values if model in self.details else {}

  def correct(self, model: str) -> np.ndarray:
    """Whether each instance of a model is right on each example, ``[S, N]``."""
    return self.models[model].predicted == self.labels

  def name(self, label: int) -> str:
    """What a class is called, or its number; "not a number" for a prediction that is none."""
    if label < 0:
      return "not a number"
    return self.label_names[label] if label < len(self.label_names) else str(int(label))

  def take(self, rows: np.ndarray) -> Predictions:
    """The same of some examples, by their place in ``index``."""
    models = {
      name: Answers(**{f: getattr(one, f)[:, rows] for f in _FIELDS})
      for name, one in self.models.items()
    }
    details = {
      name: dataclasses.replace(one, values={n: x[:, rows] for n, x in one.values.items()})
      for name, one in self.details.items()
    }
    columns = {name: Column(one.codes[rows], one.names) for name, one in self.columns.items()}
    return dataclasses.replace(
      self,
      index=self.index[rows],
      labels=self.labels[rows] if len(self.labels) else self.labels,
      models=models,
      columns=columns,
      details=details,
      weight=None if self.weight is None else self.weight[rows],
    )


_FIELDS = ("predicted", "confidence", "probability")


def labelled(batches: Batch | Batches) -> bool:
  """Whether any place of a split counts and has a label; of what is streamed, whether it may."""
  return batches.has_labels if isinstance(batches, Batches) else bool(counted(batches).any())


def counted(batches: Batch) -> np.ndarray:
  """Which places of stacked batches count and have a label: ``[N · B]`` for one an example."""
  host = tasks.on_host(batches)
  finer = max(host.weight, host.labelled, key=np.ndim)
  return tasks.counted(host, finer).reshape(-1) > 0


def present(batches: Batch) -> np.ndarray:
  """Which examples of stacked batches are no padding, ``[N · B]``: some place of theirs counts."""
  return _weight(batches) > 0


def weight_of(batches: Batch, there: np.ndarray) -> np.ndarray | None:
  """How much each of some examples counts, ``[N]`` float32; None where all count alike.

  Args:
    batches: stacked, ``[N, B, ...]``.
    there: ``[N · B]``, which: from `counted` or `present`.
  """
  weight = _weight(batches)[there]
  return None if not weight.size or (weight == weight[0]).all() else weight.astype(np.float32)


def _weight(batches: Batch) -> np.ndarray:
  """How much each example counts, ``[N · B]``: as much as that place of it which counts most."""
  host = tasks.on_host(batches)
  given = tasks.counted(host, np.zeros(host.weight.shape[:2]), labelled=False)
  return np.asarray(given).reshape(-1)


def column(name: str, values: Any, index: np.ndarray, size: int | None = None) -> Column:
  """A column of metadata as slices.

  Texts, truth values and whole numbers of at most 20 different values are a slice each; other
  numbers are cut at their quartiles. None, NaN and empty texts are missing.

  Args:
    name: the column's, for messages.
    values: one for each example of the split; or ``(codes, names)``, where a name that no example
      has is a slice that is empty.
    index: ``[N]``, the examples that answers are of.
    size: how many examples the split has; None where nobody knows.

  Returns:
    The slices of those examples.

  Raises:
    ValueError: the column is not as long as the split, or a code has no name.

  >>> found = column("font", ["serif", "sans", None], np.arange(3))
  >>> found.codes.tolist(), found.names
  ([1, 0, -1], ('sans', 'serif'))
  """
  names: Sequence[Any] | None = None
  if isinstance(values, tuple) and len(values) == 2 and np.ndim(values[0]) == 1:
    values, names = values
  found = np.asarray(values)
  least = int(index.max(initial=-1)) + 1
  if found.ndim != 1 or len(found) < least or (size is not None and len(found) != size):
    raise ValueError(
      f"metadata[{name!r}] must have one value for each of the {size or least} examples of the "
      f"split, got {_check.show(found)}."
    )
  found = found[index]
  if names is not None:
    if (
      found.dtype.kind not in "iu"
      or found.min(initial=0) < -1
      or found.max(initial=-1) >= len(names)
    ):
      raise ValueError(
        f"metadata[{name!r}] has codes that are no numbers of its {len(names)} names (−1 is "
        "missing)."
      )
    return Column(found.astype(np.int32), tuple(str(one) for one in names))
  if found.dtype.kind == "b":
    return Column(found.astype(np.int32), ("no", "yes"))
  if found.dtype.kind in "iuf":
    return _numbers(found.astype(np.float64))
  return _texts(np.array([_text(one) for one in found], dtype=object))


def read_columns(path: str | os.PathLike[str]) -> dict[str, list[Any]]:
  """Columns of metadata from a CSV file with a head; a column of numbers alone is numbers.

  Args:
    path: the file; a row for each example of the split, in its order.

  Returns:
    What `column` takes, by name; an empty cell is missing.

  Raises:
    OSError: there is no such file, or it cannot be read.
    ValueError: it is no UTF-8, has no head, or rows of different lengths.
  """
  path = _check.folder("path", path)
  try:
    with path.open(newline="", encoding="utf-8-sig") as file:
      head, *rows = list(csv.reader(file)) or [[]]
  except (FileNotFoundError, IsADirectoryError) as error:
    raise type(error)(f"{path} is no file: name a CSV file that is there.") from error
  except (UnicodeDecodeError, csv.Error) as error:
    raise ValueError(f"{path} must be CSV in UTF-8: {error}.") from error
  uneven = [i for i, row in enumerate(rows) if len(row) != len(head)]
  if not head or uneven:
    at = f"; row {uneven[0] + 1} has {len(rows[uneven[0]])} cells for {len(head)}" if uneven else ""
    raise ValueError(f"{path} must be CSV: a line of names, and a row for each example{at}.")
  columns: dict[str, list[Any]] = {}
  for i, name in enumerate(head):
    cells = [row[i].strip() for row in rows]
    try:
      columns[name] = [float(cell) if cell else float("nan") for cell in cells]
    except ValueError:
      columns[name] = cells
  return columns


def _numbers(found: np.ndarray) -> Column:
  there = np.isfinite(found)
  values, codes = np.unique(found[there], return_inverse=True)
  if len(values) > FEW:
    edges = np.unique(np.quantile(found[there], [0, 0.25, 0.5, 0.75, 1]))
    codes = np.clip(np.searchsorted(edges, found[there], side="left") - 1, 0, len(edges) - 2)
    names = tuple(f"{a:.4g} to {b:.4g}" for a, b in itertools.pairwise(edges))
  else:
    names = tuple(f"{value:g}" for value in values)
  every = np.full(len(found), -1, np.int32)
  every[there] = codes
  return Column(every, names)


def _texts(found: np.ndarray) -> Column:
  there = found != ""
  values, codes, counts = np.unique(
    found[there].astype(str), return_inverse=True, return_counts=True
  )
  names = [str(value) for value in values]
  if len(names) > MANY:
    kept = np.sort(np.argsort(-counts, kind="stable")[: MANY - 1])
    renumbered = np.full(len(names), MANY - 1)
    renumbered[kept] = np.arange(MANY - 1)
    codes, names = renumbered[codes], [names[k] for k in kept] + [f"{len(names) - MANY + 1} others"]
  every = np.full(len(found), -1, np.int32)
  every[there] = codes
  return Column(every, tuple(names))


def _text(value: Any) -> str:
  if value is None or (isinstance(value, float) and np.isnan(value)):
    return ""
  return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def save(path: str | os.PathLike[str], found: Predictions) -> pathlib.Path:
  """Writes ``predictions.npz``, so that the file is never seen half written.

  Args:
    path: the file.
    found: what goes in.

  Returns:
    The file's path.
  """
  path = _check.folder("path", path)
  arrays: dict[str, np.ndarray] = {
    "index": np.asarray(found.index, np.int64),
    "labels": np.asarray(found.labels, np.int32),
  }
  for name, one in found.models.items():
    for field in _FIELDS:
      kind = np.int32 if field == "predicted" else np.float32
      arrays[f"model/{name}/{field}"] = np.asarray(getattr(one, field), kind)
  for i, sliced in enumerate(found.columns.values()):
    arrays[f"column/{i}"] = np.asarray(sliced.codes, np.int32)
  if found.weight is not None:
    arrays["weight"] = np.asarray(found.weight, np.float32)
  texts = _told(found.shown, "shown", np.uint8, arrays)
  about = {
    "format": FORMAT if found.task else 1,
    "dataset": found.dataset,
    "split": found.split,
    "seeds": [int(seed) for seed in found.seeds],
    "label_names": list(found.label_names),
    "num_classes": int(found.num_classes),
    "models": list(found.models),
    "columns": [[name, list(one.names)] for name, one in found.columns.items()],
    "texts": texts,
  }
  if found.task:
    about |= {
      "task": found.task,
      "truth": _told(found.truth, "truth", np.int32, arrays),
      "details": {name: _details(name, one, arrays) for name, one in found.details.items()},
    }
  # As bytes: an array of text would lose a zero at its end.
  arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
  runs.write_npz(path, arrays)
  return path


def _told(
  given: Mapping[int, Any], name: str, kind: Any, arrays: dict[str, np.ndarray]
) -> dict[str, str]:
  """Texts by index; what is none of them is put beside."""
  arrays |= {f"{name}/{i}": np.asarray(x, kind) for i, x in given.items() if not isinstance(x, str)}
  return {str(index): one for index, one in given.items() if isinstance(one, str)}


def _heard(
  texts: Mapping[str, str], name: str, parts: Mapping[str, np.ndarray]
) -> dict[int, np.ndarray | str]:
  """What `_told` told."""
  found: dict[int, np.ndarray | str] = {int(index): str(text) for index, text in texts.items()}
  begin = f"{name}/"
  return found | {int(n.removeprefix(begin)): x for n, x in parts.items() if n.startswith(begin)}


_ARRAYS = ("values", "parts", "points")  # of `Details`


def _details(name: str, one: Details, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
  """The names of what a model has; its numbers are put into the arrays."""
  about: dict[str, Any] = {"rows": {metric: list(rows) for metric, rows in one.rows.items()}}
  for field in _ARRAYS:
    given = getattr(one, field)
    about[field] = list(given)
    for i, values in enumerate(given.values()):  # a name may be anything, and is none of a file's
      arrays[f"details/{name}/{field}/{i}"] = np.asarray(values, np.float64)
  about["said"] = _told(one.said, f"said/{name}", np.int32, arrays)
  return about


def load(path: str | os.PathLike[str]) -> Predictions:
  """Reads ``predictions.npz``; every part is checked by the archive's own checksum.

  Args:
    path: the file.

  Returns:
    What was saved.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is damaged, or was written by a newer version.
  """
  path = _check.folder("path", path)
  if not path.is_file():
    raise FileNotFoundError(f"{path} is not there; measure the run again to make it.")
  try:
    parts = runs.read_npz(path)
    about = runs.parse_json(parts["about"].tobytes())
    version = about["format"]
    found = _assembled(about, parts) if version in (1, FORMAT) else None
  except _DAMAGE as error:
    raise ValueError(
      f"{path} is damaged ({_check.short(error)}): measure the run again."
    ) from error
  if found is None:
    raise ValueError(
      f"{path} is of format {version!r} and this version reads {FORMAT}: use the version of "
      "jaxdistill that wrote it, or measure the run again."
    )
  return found


def _assembled(about: Mapping[str, Any], parts: Mapping[str, np.ndarray]) -> Predictions:
  models = {
    name: Answers(**{field: parts[f"model/{name}/{field}"] for field in _FIELDS})
    for name in about["models"]
  }
  details = {
    name: _read_details(name, one, parts) for name, one in about.get("details", {}).items()
  }
  size = len(parts["index"])
  columns = {
    name: Column(parts[f"column/{i}"], tuple(names))
    for i, (name, names) in enumerate(about["columns"])
  }
  lengths = [len(one.codes) for one in columns.values()]
  lengths += [] if about.get("task") else [len(parts["labels"])]
  lengths += [x.shape[1] for one in details.values() for x in one.values.values()]
  for one in models.values():
    if one.predicted.ndim != 2 or one.predicted.shape != one.confidence.shape:
      raise ValueError("a model's answers are not [S, N]")
    lengths += [one.predicted.shape[1], one.probability.shape[1]]
  weight = parts.get("weight")
  if weight is not None:
    lengths.append(len(weight))
    if weight.ndim != 1 or not (np.isfinite(weight) & (weight > 0)).all():
      raise ValueError("a weight is not above 0")
  if set(lengths) - {size}:
    raise ValueError(f"its parts are of {sorted(set(lengths) | {size})} examples")
  said = [one.predicted for one in models.values()]
  largest = max(int(one.max(initial=0)) for one in (parts["labels"], *said))
  if max(largest, int(about["num_classes"])) > CLASSES:
    raise ValueError(f"it has more than {CLASSES:,} classes")
  if parts["labels"].min(initial=0) < 0 or len(np.unique(parts["index"])) != size:
    raise ValueError("a label is below 0, or an example is there twice")
  if any(one.codes.max(initial=-1) >= len(one.names) for one in columns.values()):
    raise ValueError("a slice has no name")
  return Predictions(
    index=parts["index"],
    labels=parts["labels"],
    models=models,
    dataset=str(about["dataset"]),
    split=str(about["split"]),
    seeds=tuple(about["seeds"]),
    label_names=tuple(map(str, about["label_names"])),
    num_classes=int(about["num_classes"]),
    columns=columns,
    shown=_heard(about["texts"], "shown", parts),
    details=details,
    truth=_heard(about.get("truth", {}), "truth", parts),
    task=dict(about.get("task", {})),
    weight=weight,
  )


def _read_details(name: str, about: Mapping[str, Any], parts: Mapping[str, np.ndarray]) -> Details:
  found = {
    field: {str(n): parts[f"details/{name}/{field}/{i}"] for i, n in enumerate(about[field])}
    for field in _ARRAYS
  }
  rows = {str(metric): tuple(map(str, names)) for metric, names in about["rows"].items()}
  if {n: x.shape[1:] for n, x in found["parts"].items()} != {n: (len(r),) for n, r in rows.items()}:
    raise ValueError("a part has no name")
  if any(x.shape[:1] != (2,) or x.ndim != 2 for x in found["points"].values()):
    raise ValueError("points are not [2, M]")
  if any(x.ndim != 2 for x in found["values"].values()):
    raise ValueError("a model's values are not [S, N]")
  return Details(**found, rows=rows, said=_heard(about["said"], f"said/{name}", parts))
