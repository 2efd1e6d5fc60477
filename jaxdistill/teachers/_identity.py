"""What tells one teacher cache from another: the teacher, what it is asked, what it is shown.

Bits are compared where they are the same everywhere (names, shapes, integer checksums of variables)
and numbers within a tolerance where another machine computes them otherwise.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxdistill.data import Source
from jaxdistill.teachers.cache_writer import arrays_of
from jaxdistill.types import Teacher

__all__ = [
  "PROBES",
  "asked_of",
  "differences",
  "identity_of",
  "libraries",
  "sketch",
  "views_identity",
]

# How many examples a cache is compared by.
PROBES = 8
# Relative to the size of the numbers: convolutions in TF32 are off by a thousandth.
_OUTPUTS_DIFFER = 0.02
_LOOKS_DIFFER = 1e-3


def asked_of(teacher: Teacher) -> Any:
  """What a teacher is asked for beside its variables: rule, classes, groups.

  Args:
    teacher: a teacher. Those of `jaxdistill.teachers` say it themselves; one with a function of the
      user's own that says nothing is told by the function's name.

  Returns:
    Something that JSON holds.
  """
  if not teacher.asked:
    apply = teacher.apply
    named = getattr(apply, "__qualname__", type(apply).__qualname__)
    return {"function": f"{getattr(apply, '__module__', '')}.{named}"}
  try:
    return json.loads(teacher.asked)
  except ValueError:  # words of a user
    return teacher.asked


def sketch(values: Any) -> list[list[float]]:
  """Four numbers for each example: the size of its numbers, and sums of them with random signs.

  Args:
    values: ``[B, ...]``.

  Returns:
    ``[B, 4]``. A relative error e of the numbers changes each by about e times their size.

  >>> sketch(np.ones((1, 4)))[0][0]
  1.0
  """
  flat = np.asarray(values, np.float64).reshape(len(values), -1)
  flat = np.where(np.isfinite(flat), flat, 1e6)  # a mask's infinities
  words = np.random.Philox(key=0).random_raw(3 * flat.shape[1]).reshape(-1, 3)
  signs = np.where(words >> np.uint64(63), 1.0, -1.0)
  size = np.sqrt(np.mean(flat**2, axis=1, keepdims=True))
  made = np.concatenate([size, flat @ signs / np.sqrt(flat.shape[1])], axis=1)
  return [[float(f"{number:.7g}") for number in row] for row in made]


def views_identity(source: Source, views: int) -> dict[str, Any]:
  """What the first examples look like to a network, in up to three of the views."""
  whole: Any = source.whole
  cut = jax.jit(lambda shared, item: source.cut(shared, item).inputs)
  found = {}
  for view in sorted({0, views // 2, views - 1}):
    item = next(iter(whole.every(source.data_seed, min(PROBES, whole.size), view)))
    inputs = cut(source.shared, item)
    found[str(view)] = [sketch(leaf) for leaf in jax.tree.leaves(inputs)]
  return found


def identity_of(source: Source, views: int, dtype: str, layout: Mapping[str, Any]) -> Any:
  """The manifest's part on data and arrays."""
  whole: Any = source.whole
  contents = {} if source.contents is None else source.contents()
  return {
    "data": {"name": source.name, "version": source.version, "size": whole.size},
    # A teacher looks at no label.
    "contents": {n: digest for n, digest in contents.items() if n in ("inputs", "sample")},
    "augmentation": source.augmentation,
    # Without augmentation nothing depends on it.
    "data_seed": None if source.augmentation == "identity" else source.data_seed,
    "dtype": dtype,
    "arrays": arrays_of(layout),
    "view_count": views,
  }


def libraries() -> dict[str, str]:
  """The versions that a cache was made with."""
  names = ("jaxdistill", "jax", "flax", "numpy", "array_record")
  found = {}
  for name in names:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = "unknown"
  return found


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
  """How a cache's manifest differs from what is asked for now, in words.

  Args:
    there: the manifest.
    now: what it would be now; what it does not say is not compared.

  Returns:
    One line for each difference; none where the cache serves.
  """
  names = ("data", "augmentation", "data_seed", "view_count", "dtype", "arrays", "asked")
  lines = [
    f"{name}: {there.get(name)!r} there, {now[name]!r} now"
    for name in names
    if name in now and there.get(name) != now[name]
  ]
  # Bits of the data, where both know them: arrays in memory are known whole, records by a sample,
  # and what another program wrote may say nothing.
  known, mine = there.get("contents"), now.get("contents", {})
  if isinstance(known, Mapping) and any(
    known[name] != mine[name] for name in known.keys() & mine.keys()
  ):
    lines.append("contents: the data have the same name and size, and other values")
  if not lines and "looks" in now and "looks" in there:
    lines += _other_looks(there["looks"], now["looks"])
  if "teacher" in now:
    lines += _other_teacher(there.get("teacher") or {}, now["teacher"])
  return lines


def _other_looks(there: Any, now: Any) -> list[str]:
  for view, found in now.items():
    if (
      not isinstance(there, dict)
      or view not in there
      or not _alike(there[view], found, _LOOKS_DIFFER)
    ):
      return [
        f"looks: what the first {PROBES} examples show in view {view} is not what it was, so the "
        "data, their normalisation or the augmentation have changed"
      ]
  return []


def _other_teacher(there: Any, now: Any) -> list[str]:
  if not isinstance(there, dict) or not isinstance(there.get("leaves"), list):
    return ["teacher: the cache was filled by another program; open it by cached(None, source)"]
  if there["leaves"] != now["leaves"]:
    pairs = itertools.zip_longest(there["leaves"], now["leaves"])
    first, second = next(pair for pair in pairs if pair[0] != pair[1])
    return [f"teacher: its variables are others, first {first} there, {second} now"]
  if there.get("checksum") != now["checksum"]:
    return ["teacher: its variables have other values (their checksum differs)"]
  if "outputs" in now and isinstance(there.get("outputs"), dict):
    for name, found in now["outputs"].items():
      if name not in there["outputs"] or not _alike(there["outputs"][name], found, _OUTPUTS_DIFFER):
        return [f"teacher: it puts out other {name} for the first {PROBES} examples"]
  return []


def _alike(there: Any, now: Any, tolerance: float) -> bool:
  """Whether two sketches agree; a difference counts relative to the size of the numbers."""
  try:
    one, other = np.asarray(there, np.float64), np.asarray(now, np.float64)
  except (TypeError, ValueError, OverflowError):  # another program may have written anything
    return False
  if one.shape != other.shape:
    return False
  return bool(np.all(np.abs(one - other) <= tolerance * np.maximum(one[..., :1], 1e-6)))
