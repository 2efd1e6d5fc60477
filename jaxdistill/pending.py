"""Arrays that are computed when they are first needed; until then their shapes stand for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

__all__ = ["Pending", "ready"]


class Pending(jax.ShapeDtypeStruct):
  """An array's shape and dtype, which is all that tracing and compiling take, and how to get it."""

  __slots__ = ["make"]
  # Shapes that are the same are equal; arrays that are still to come are not.
  __eq__ = object.__eq__
  __hash__ = object.__hash__

  def __init__(self, shape: Sequence[int], dtype: Any, make: Callable[[], jax.Array]) -> None:
    """An array that is not there yet.

    Args:
      shape: its shape.
      dtype: its dtype.
      make: computes it; may be called several times, and is to give the same array.
    """
    super().__init__(tuple(shape), dtype)
    self.make = make


def ready(tree: Any) -> Any:
  """The tree with its pending arrays computed.

  Args:
    tree: any tree.

  Returns:
    The same, without a `Pending`.
  """
  return jax.tree.map(lambda leaf: leaf.make() if isinstance(leaf, Pending) else leaf, tree)
