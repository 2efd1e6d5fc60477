"""A layer that is frozen is frozen with its statistics.

Which parameters are frozen is the optimiser's word (`optax.multi_transform` with
`optax.set_to_zero`, `optax.freeze`, a mask), and nothing beside it has to be told. A normalisation
whose layer is frozen then normalises by its averages in training too, as PyTorch's does under
``.eval()`` and Keras's without ``trainable``: averages that only stood still while it normalised by
the batch would not be those of the network that was trained.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax

from jaxdistill.train._optax import unmoved
from jaxdistill.train._state import State
from jaxdistill.types import Network

__all__ = ["frozen_modules", "hold", "never_moved", "without_moving"]

PyTree = Any
Module = tuple[str, ...]


def without_moving(
  student: Network, optimizer: Any, trained: dict[str, PyTree], model_state: PyTree
) -> tuple[Network, set[Module]]:
  """The student with its frozen statistics at rest, and the modules whose these are.

  Args:
    student: the network.
    optimizer: what freezes.
    trained: ``{"student": parameters, "objective": parameters}``, or their shapes.
    model_state: the student's other collections.
  """
  if not jax.tree.leaves(model_state):
    return student, set()
  held = frozen_modules(unmoved(optimizer, trained)["student"], model_state)
  if held and student.at_rest is not None:
    student = student.at_rest({"/".join(module) for module in held})
  return student, held


def never_moved(optimizer: Any, shapes: State, *, stacked: bool) -> str | None:
  """What the log says of the student's frozen parameters; None where there are none.

  Args:
    optimizer: what freezes.
    shapes: of a training state.
    stacked: whether its leaves have an axis over students.
  """
  trained, model_state = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape[stacked:], leaf.dtype),
    ({"student": shapes.params, "objective": shapes.objective_params}, shapes.model_state),
  )
  frozen = unmoved(optimizer, trained)["student"]
  flags = [(_names(path), flag) for path, flag in jax.tree_util.tree_leaves_with_path(frozen)]
  still = [path for path, flag in flags if flag]
  if not still:
    return None
  tops = ", ".join(dict.fromkeys(path[0] for path in still if path))
  held = len(frozen_modules(frozen, model_state))
  return (
    f"the optimizer never moves {len(still)} of the student's {len(flags)} parameters ({tops}): "
    f"they are frozen, with the statistics of {held} of its modules."
  )


def frozen_modules(frozen: PyTree, model_state: PyTree) -> set[Module]:
  """The modules with statistics whose parameters are all frozen.

  A module without parameters of its own (a BatchNorm without scale and bias) goes with the closest
  one around it that has some.

  Args:
    frozen: the parameters' tree with a bool for each.
    model_state: ``{collection: tree}``; its modules lie as those of the parameters.

  Returns:
    Paths of modules.

  >>> frozen = {"a": {"dense": {"kernel": True}, "norm": {"scale": True}}, "b": {"kernel": False}}
  >>> statistics = {"a": {"norm": {"mean": 0.0}}, "norm": {"mean": 0.0}}
  >>> frozen_modules(frozen, {"batch_stats": statistics})
  {('a', 'norm')}
  """
  flags = [(_names(path), flag) for path, flag in jax.tree_util.tree_leaves_with_path(frozen)]

  def at_rest(module: Module) -> bool:
    for depth in range(len(module), -1, -1):
      around = module[:depth]
      inside = [flag for path, flag in flags if path[:depth] == around and len(path) > depth]
      if inside:
        return all(inside)
    return False

  paths = jax.tree_util.tree_leaves_with_path(model_state)
  return {module for module in {_module(path) for path, _ in paths} if at_rest(module)}


def hold(new: PyTree, old: PyTree, modules: Collection[Module]) -> PyTree:
  """Collections in which these modules have what they had."""
  if not modules:
    return new
  return jax.tree_util.tree_map_with_path(
    lambda path, n, o: o if _module(path) in modules else n, new, old
  )


def _module(path: Any) -> Module:
  """The module of a collection's leaf: without the collection's and the leaf's own name."""
  return _names(path)[1:-1]


def _names(path: Any) -> Module:
  return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)
