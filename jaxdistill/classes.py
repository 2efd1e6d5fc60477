"""Some of a teacher's classes, and groups of them, as a user names them; checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdistill import arguments

__all__ = ["check", "members", "numbers", "repeated"]


def numbers(name: str, values: Any) -> np.ndarray:
  """Classes as integers from 0 on.

  >>> numbers("classes", [3, 1]).tolist()
  [3, 1]
  """
  found = np.asarray(values)
  if found.ndim != 1 or (found.size and not np.issubdtype(found.dtype, np.integer)):
    raise ValueError(f"{name} must be a sequence of integers, got {values!r}.")
  if np.any(found < 0):
    raise ValueError(f"{name} has {found.min()}: classes are counted from 0.")
  return found.astype(np.int64)


def repeated(found: np.ndarray) -> list[int]:
  """Those that come more than once.

  >>> repeated(np.array([1, 2, 1]))
  [1]
  """
  values, counts = np.unique(found, return_counts=True)
  return values[counts > 1].tolist()


def members(groups: Any) -> tuple[list[np.ndarray], int | None]:
  """The classes of each group; and how many classes there are, where ``groups`` says it.

  >>> [m.tolist() for m in members([0, 1, 0])[0]], members([[0, 2], [1]])[1]
  ([[0, 2], [1]], None)
  """
  if not hasattr(groups, "__len__") or isinstance(groups, str | Mapping) or len(groups) == 0:
    raise ValueError(
      f"groups={arguments.show(groups)} must be the group of each class, or the classes of each "
      "group, in a sequence."
    )
  every = None
  if all(np.ndim(g) == 0 for g in groups):
    of_class = numbers("groups", groups)
    every = len(of_class)
    found = [np.flatnonzero(of_class == g) for g in range(of_class.max() + 1)]
  else:
    found = [numbers(f"groups[{g}]", m) for g, m in enumerate(groups)]
  empty = [g for g, m in enumerate(found) if not m.size]
  if empty:
    raise ValueError(f"groups {empty} of {len(found)} have no class; groups count from 0.")
  twice = repeated(np.concatenate(found))
  if twice:
    raise ValueError(f"groups has the classes {twice} more than once; a class is in one group.")
  return found, every


def check(name: str, found: np.ndarray, logits: Any) -> int:
  """How many classes the teacher has; an error where ``found`` has one beyond them.

  >>> check("classes", np.array([1]), np.zeros((2, 3)))
  3
  """
  if logits is None:
    raise ValueError(f"the teacher puts out no logits, of which {name} could choose.")
  count = logits.shape[-1]
  beyond = sorted(set(found[found >= count].tolist()))
  if beyond:
    raise ValueError(f"{name} has class {beyond}, but the teacher has {count}, counted from 0.")
  return count
