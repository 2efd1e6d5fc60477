"""Writes a teacher's outputs for another program to learn from. Copy it: it needs NumPy alone.

A teacher that is not in JAX (PyTorch, Keras, an API) leaves its outputs in a folder by `write`, and
``teachers.cached(None, source, folder=...)`` opens it where the student is trained. Nothing of
jaxdistill is imported here, so the file runs wherever the teacher does. ``docs/cache.md`` has the
format; what a teacher's answers must be to be logits is decided here and nowhere else.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = [
  "FLOOR",
  "FORMAT",
  "GIVES",
  "IDS",
  "MANIFEST",
  "SHARD_BYTES",
  "arrays_of",
  "outputs_of",
  "row_type",
  "write",
]

FORMAT = 1
MANIFEST = "manifest.json"
IDS = "ids.json"
SHARD_BYTES = 256 * 2**20
# What an array that a teacher gives may be; all but features become logits.
GIVES = ("logits", "probabilities", "binary_probabilities", "features")
# A probability below it counts as it, since log 0 is no number: −16.1 as a logit. A forest of a
# hundred trees knows no probability between 0 and 0.01 divided by the size of a leaf.
FLOOR = 1e-7
# How far from 1 a row of probabilities may add up: float16 is off by a thousandth.
_SUM_IS_OFF = 1e-3
# So few rows between 0 and 1 may add up to 1 by chance, where logits are small and classes two.
_TOO_FEW = 4
Rows = dict[str, np.ndarray]


def outputs_of(
  given: Any,
  size: int,
  *,
  gives: str = "logits",
  floor: float = FLOOR,
  name_of: Callable[[int], str] = "row {}".format,
) -> Rows:
  """What a teacher gave for some examples, as a cache holds it: logits and features, checked.

  Args:
    given: an array ``[B, ...]`` of the kind ``gives``; or a mapping of such arrays, whose names
      say what each is: one of ``"logits"``, ``"probabilities"`` and ``"binary_probabilities"``
      ``[B, ..., K]`` (floats ``[B]`` of the first and last are one output), any
      ``"features/<name>"``, and ``"where"`` ``[B]``, 0 for examples that the teacher skipped
      (whatever stands in their rows).
    size: B.
    gives: what an array is. ``"probabilities"`` are a softmax's, whose rows add up to 1, and become
      ``log(max(p, floor))``: the same softmax, up to ``floor`` for each class. Those of K yes-or-no
      questions, ``"binary_probabilities"``, become ``log(p) - log(1 - p)``, p in ``floor ..
      1 - floor``.
    floor: the least probability.
    name_of: what row i is called, where something is wrong with it.

  Returns:
    ``{"logits": [B, ..., K], "features/<name>": [B, ...], "where": [B]}``: those that there are;
    ``where`` as uint8.

  Raises:
    TypeError: something is no array of numbers.
    ValueError: an array is not of B examples, or has a name that means nothing; a number is NaN or
      infinite; probabilities are none; logits are probabilities.

  >>> outputs_of(np.array([[0.25, 0.75], [1.0, 0.0]]), 2, gives="probabilities")["logits"].round(2)
  array([[ -1.39,  -0.29],
         [  0.  , -16.12]])
  """
  if not isinstance(given, Mapping):
    given = {"features/output" if gives == "features" else gives: given}
  arrays = {str(name): _array(str(name), value, size) for name, value in given.items()}
  unknown = [n for n in arrays if n not in ("where", *GIVES[:3]) and not n.startswith("features/")]
  kinds = [name for name in GIVES[:3] if name in arrays]
  if unknown or len(kinds) > 1 or not arrays.keys() - {"where"}:
    raise ValueError(
      f"the teacher gives {sorted(arrays)}, and may give one of {', '.join(GIVES[:3])}, any "
      "'features/<name>', and 'where'."
    )
  made: Rows = {}
  answered = np.ones(size, bool)
  if "where" in arrays:
    if arrays["where"].size != size or not np.isin(arrays["where"], (0, 1)).all():
      raise ValueError(
        f"the teacher's where must be 0 or 1 for each of {size} examples: whether it has an answer."
      )
    answered = arrays["where"].reshape(size) != 0
    made["where"] = answered.astype(np.uint8)
  rows = np.flatnonzero(answered)
  for name, values in arrays.items():
    if name == "where":
      continue
    # Rows of examples that were skipped are 0: a cache holds no NaN that a mask would have to hide.
    new = np.zeros(values.shape, values.dtype if values.dtype.kind == "f" else np.float32)
    new[rows] = _logits(values[rows], name, floor, lambda i: name_of(int(rows[i])))
    made["logits" if name in kinds else name] = new
  return made


def _array(name: str, value: Any, size: int) -> np.ndarray:
  """An array of numbers with an example a row."""
  each = value if name == "binary_probabilities" and isinstance(value, list | tuple) else ()
  # As scikit-learn's predict_proba has several labels: for each [B, 2], of no and of yes.
  if len(each) and all(np.shape(one) == (size, 2) for one in each):
    value = np.stack([np.asarray(one)[:, 1] for one in each], axis=1)
  if isinstance(value, np.ma.MaskedArray) and np.ma.getmaskarray(value).any():
    raise ValueError(f"the teacher's {name} have masked numbers: fill them, .filled(...).")
  try:
    array = np.asarray(value)
  except ValueError as error:  # rows of several lengths
    raise ValueError(f"the teacher's {name} are no array: {error}") from error
  if array.dtype.kind not in "fiub":
    raise TypeError(f"the teacher's {name} are {type(value).__name__} {array.dtype}, no numbers.")
  if array.shape[:1] != (size,):
    raise ValueError(
      f"the teacher's {name} have the shape {list(array.shape)} for {size} examples; it must be "
      f"[{size}, ...]."
    )
  if name not in GIVES[:3] or array.ndim > 1:
    return array
  if name == "probabilities" or array.dtype.kind != "f":
    raise ValueError(
      f"the teacher's {name} have the shape {list(array.shape)} of {array.dtype}; give "
      f"[{size}, K], of a classifier what it makes of each class (predict_proba), not the class "
      "that it chooses."
    )
  return array[:, None]  # one number an example, as a regressor's predict gives it


def _logits(
  values: np.ndarray, kind: str, floor: float, name_of: Callable[[int], str]
) -> np.ndarray:
  """Rows of a kind as logits, or features as they are; raises with the first row that is wrong."""
  if not len(values):
    return values
  exact = values.astype(np.float64)
  flat = exact.reshape(len(exact), -1)

  def refuse(wrong: np.ndarray, what: str) -> None:
    if wrong.any():
      row = int(wrong.reshape(len(wrong), -1).any(1).argmax())
      raise ValueError(f"the teacher's {kind} of {name_of(row)} {what.format(flat[row])}")

  refuse(
    ~np.isfinite(flat),
    "hold NaN or an infinity: {}. Where it has no answer, let it say so by 'where'; a class that "
    "it cannot mean gets a large negative number.",
  )
  if kind not in GIVES[:3]:
    return values
  inside = (exact >= 0) & (exact <= 1)
  sums = exact.sum(-1)
  if kind == "logits":
    one = np.abs(sums - 1) <= _SUM_IS_OFF
    if exact.shape[-1] > 1 and sums.size >= _TOO_FEW and inside.all() and one.all():
      raise ValueError(
        "the teacher's logits lie between 0 and 1 and every row adds up to 1: these are "
        "probabilities, whose softmax is nearly flat. Say gives='probabilities'."
      )
    return values
  # Rounding may leave a probability of 1 + 1e-7.
  outside = (exact < -_SUM_IS_OFF) | (exact > 1 + _SUM_IS_OFF)
  refuse(outside, "are no probabilities: {}. If they are logits, say gives='logits'.")
  if kind == "binary_probabilities":
    bounded = np.clip(exact, floor, 1 - floor)
    return np.log(bounded) - np.log1p(-bounded)
  refuse(
    np.abs(sums - 1) > _SUM_IS_OFF,
    "do not add up to 1: {}. Of K yes-or-no questions, say gives='binary_probabilities'.",
  )
  return np.log(np.maximum(exact, floor))


def arrays_of(layout: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The manifest's ``arrays`` of rows with these shapes and dtypes.

  >>> arrays_of({"logits": np.zeros(3, np.float16)})
  [{'name': 'logits', 'dtype': '<f2', 'shape': [3]}]
  """
  return [
    {"name": name, "dtype": np.dtype(row.dtype).newbyteorder("<").str, "shape": list(row.shape)}
    for name, row in layout.items()
  ]


def row_type(arrays: Sequence[Mapping[str, Any]]) -> np.dtype:
  """What follows the id in a record, as a NumPy type with one field for each array.

  >>> row_type([{"name": "logits", "dtype": "<f2", "shape": [3]}]).itemsize
  6
  """
  return np.dtype([(a["name"], a["dtype"], tuple(a["shape"])) for a in arrays])


def write(
  folder: str | os.PathLike[str],
  rows: Any,
  ids: Sequence[str],
  *,
  name: str,
  version: str = "",
  gives: str = "logits",
  floor: float = FLOOR,
  dtype: str = "float32",
  view: int = 0,
  views: int = 1,
  augmentation: str = "identity",
  data_seed: int | None = None,
) -> None:
  """Writes what a teacher said of every example of a view, or goes on with a cache by another view.

  One program writes at a time. It may be killed at any moment: started again, it writes what is not
  there, and what is there already, to the bit, is left as it is.

  Args:
    folder: the cache; made where it is not there.
    rows: what the teacher gave for the examples of ``ids``, in their order, as `outputs_of` takes
      it: an array ``[N, K]``, or a mapping of arrays.
    ids: N different strings, as the student's source has them (``source.whole.ids()``; of
      ``data.from_arrays`` the row's number). Those that the teacher skipped may be left out.
    name: of the data set, as the source has it.
    version: likewise.
    gives: what an array is: ``"logits"``, ``"probabilities"``, ``"binary_probabilities"`` or
      ``"features"``.
    floor: the least probability.
    dtype: of what is kept: ``"float32"``, ``"float16"`` or ``"float64"``.
    view: the number of the view.
    views: how many there are.
    augmentation: its name; ``"identity"`` for none, which has one view.
    data_seed: decides what the views show; None for ``"identity"``.

  Raises:
    TypeError: an argument is of another kind than it must be.
    ValueError: ``rows`` cannot be a teacher's outputs (see `outputs_of`), ids are there twice, or
      the folder holds something else, or is none; the message names it.
  """
  _check_words(folder, ids, name=name, version=version, augmentation=augmentation)
  _check_numbers(floor, view=view, views=views, data_seed=data_seed)
  folder, named = pathlib.Path(folder).expanduser(), [str(id) for id in ids]
  if len(set(named)) < len(named) or not named or any("\0" in id for id in named):
    raise ValueError("ids must be different texts, at least one, without the character 0.")
  if not 0 <= view < views:
    raise ValueError(f"view={view} must lie in 0 .. {views - 1}: views={views}.")
  if gives not in GIVES or dtype not in ("float16", "float32", "float64") or not 0 < floor < 0.5:
    raise ValueError(
      f"gives={gives!r} must be one of {', '.join(GIVES)}, dtype={dtype!r} float16, float32 or "
      f"float64, and floor={floor} between 0 and 0.5."
    )
  given = outputs_of(
    rows, len(named), gives=gives, floor=floor, name_of=lambda i: f"example {named[i]!r}"
  )
  with np.errstate(over="ignore"):  # said below, by name
    found = {n: v if n == "where" else v.astype(dtype) for n, v in given.items()}
  for key, values in found.items():
    if not np.isfinite(values).all():
      raise ValueError(f"the teacher's {key} have a number that dtype={dtype!r} has not.")
  text = json.dumps(named).encode()
  one = {n: np.empty(v.shape[1:], v.dtype) for n, v in found.items()}
  body = {
    "format": FORMAT,
    "data": {"name": name, "version": version, "size": len(named)},
    "ids": {"file": IDS, "sha256": hashlib.sha256(text).hexdigest()},
    "augmentation": augmentation,
    "data_seed": data_seed,
    "view_count": views,
    "dtype": dtype,
    "arrays": arrays_of(one),
  }
  there = _begun(folder, body, text)
  shards = _shards(found, named, there["arrays"], view)
  known = there["views"].get(str(view))
  if known is not None:
    if known != [about for about, _ in shards]:
      raise ValueError(
        f"folder={str(folder)!r} has view {view} with other numbers: take another folder, or "
        "delete it."
      )
    return
  for about, content in shards:
    _replace(folder / about["file"], content)
  _write_manifest(folder, {**there, "views": {**there["views"], str(view): [a for a, _ in shards]}})


def _check_words(folder: Any, ids: Any, **texts: Any) -> None:
  """Raises for what `write` takes as text, and is none, or is an address."""
  for argument, value in texts.items():
    if not isinstance(value, str):
      raise TypeError(f"{argument}={value!r} must be a text, as the source has it.")
  if "://" in os.fspath(folder):  # pathlib makes a folder "gs:" of an address
    raise ValueError(f"folder={os.fspath(folder)!r} is an address: give a local folder.")
  if isinstance(ids, str):
    raise TypeError(f"ids={ids[:20]!r} must be several texts, one an example.")


def _check_numbers(floor: Any, **integers: Any) -> None:
  """Raises for what `write` takes as a number, and is none."""
  for argument, value in integers.items():
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole and (argument != "data_seed" or value is not None):
      raise TypeError(f"{argument}={value!r} must be an integer.")
  if isinstance(floor, bool) or not isinstance(floor, int | float):
    raise TypeError(f"floor={floor!r} must be a number between 0 and 0.5.")


def _begun(folder: pathlib.Path, body: dict[str, Any], ids: bytes) -> dict[str, Any]:
  """The manifest of the cache that is there, if it is this one; or of one that is begun."""
  path = folder / MANIFEST
  if folder.exists() and not folder.is_dir():
    raise ValueError(f"folder={str(folder)!r} is a file: name another one.")
  if not path.exists():
    folder.mkdir(parents=True, exist_ok=True)
    others = sorted(one.name for one in folder.iterdir())
    others = [n for n in others if n != IDS and not n.startswith("view-") and ".writing" not in n]
    if others:
      raise ValueError(f"folder={str(folder)!r} holds {others[:3]} and no cache: name another one.")
    _replace(folder / IDS, ids)
    _write_manifest(folder, {**body, "views": {}})
    return {**body, "views": {}}
  try:
    there = json.loads(path.read_text())
    if not isinstance(there, dict) or not isinstance(there.get("views"), dict):
      raise ValueError("it is no manifest")
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f"folder={str(folder)!r} has a damaged {MANIFEST} ({error}): take another folder, or delete "
      "it."
    ) from error
  there.pop("digest", None)
  for key, value in body.items():
    if there.get(key) != value:
      raise ValueError(
        f"folder={str(folder)!r} is a cache of something else. {key}: {there.get(key)!r} there, "
        f"{value!r} now. Take another folder, or delete it."
      )
  return there


def _shards(
  found: Rows, ids: Sequence[str], arrays: Sequence[Mapping[str, Any]], view: int
) -> list[tuple[dict[str, Any], bytes]]:
  """A view's files, with what the manifest says of each."""
  # [N] records: the id, so that rows in another order are noticed, and the arrays side by side.
  texts = np.array([id.encode() for id in ids])
  records = np.empty(len(ids), [("id", texts.dtype), *row_type(arrays).descr])
  records["id"] = texts
  for name, values in found.items():
    records[name] = values
  each = max(1, SHARD_BYTES // records.itemsize)
  count = -(-len(ids) // each)
  made = []
  for number in range(count):
    part, file = records[number * each : (number + 1) * each], io.BytesIO()
    np.save(file, part, allow_pickle=False)
    content = file.getvalue()
    about = {
      "file": f"view-{view:05d}-{number:05d}-of-{count:05d}.npy",
      "records": len(part),
      "bytes": len(content),
      "sha256": hashlib.sha256(content).hexdigest(),
    }
    made.append((about, content))
  return made


def _write_manifest(folder: pathlib.Path, body: Mapping[str, Any]) -> None:
  # Last: whoever is killed before it leaves files that no manifest names, and writes them again.
  digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
  _replace(folder / MANIFEST, json.dumps({**body, "digest": digest}).encode())


def _replace(path: pathlib.Path, content: bytes) -> None:
  """A file that is there whole or not at all."""
  writing = path.with_name(f"{path.name}.{os.getpid()}.writing")
  with writing.open("wb") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  os.replace(writing, path)
