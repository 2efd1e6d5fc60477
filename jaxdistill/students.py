"""How several students share one program: their sources, their arrays, an axis over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.data import Source
from jaxdistill.state import State, trained_variables

__all__ = ["Values", "of_group", "over_students", "shared_arrays", "start_axes", "turns"]

PyTree = Any

# Numbers that differ between the students of one program, an axis over students in front:
# ``{"hyper": {keyword of the objective: [S]}, "optimizer": {keyword: [S]}}``.
Values = dict[str, dict[str, Any]]


def start_axes(starts: tuple[PyTree, PyTree], shapes: State, seeds: int) -> PyTree:
  """Which leaves of the given starts have an axis over students in front.

  Args:
    starts: of the student's variables, and of the objective's parameters and state.
    shapes: the state of one student.
    seeds: the number of students.

  Returns:
    ``in_axes`` for the starts: 0 for leaves that have one axis more than the state's, else None.
  """

  def axes(start: Any, made: Any) -> Any:
    if isinstance(start, Mapping):
      inner = made if isinstance(made, Mapping) else {}
      return {name: axes(value, inner.get(name)) for name, value in start.items()}
    known = [leaf.shape for leaf in jax.tree.leaves(made)]
    given = jax.tree.leaves(start)
    over = len(given) == len(known) and all(
      np.shape(leaf) == (seeds, *shape) for leaf, shape in zip(given, known, strict=True)
    )
    return 0 if over and given else None

  student, objective = starts
  mine = (shapes.objective_params, shapes.objective_state)
  return (
    None if student is None else axes(student, trained_variables(shapes)),
    None if objective is None else tuple(axes(s, m) for s, m in zip(objective, mine, strict=True)),
  )


def shared_arrays(sources: Sequence[Source]) -> tuple[PyTree, PyTree]:
  """The arrays of all sources, and each one's axis over them: 0 where they differ, else -1.

  Args:
    sources: those of the students, each once.

  Returns:
    ``(arrays, axes)``; arrays that are the same are there once.

  Raises:
    ValueError: the sources differ in more than arrays and data seed.
  """
  first = sources[0]
  for source in sources[1:]:
    for name in ("size", "batch_size", "transfer", "num_classes", "views", "name"):
      if getattr(source, name) != getattr(first, name):
        raise ValueError(
          f"data has sources that differ in {name} ({getattr(first, name)!r}, "
          f"{getattr(source, name)!r}); those of one program may differ in the values of their "
          "arrays and in data_seed, no more."
        )

  def same(*leaves: Any) -> bool:
    return all(leaf is leaves[0] or np.array_equal(leaf, leaves[0]) for leaf in leaves)

  trees = [source.shared for source in sources]
  axes = jax.tree.map(lambda *leaves: -1 if same(*leaves) else 0, *trees)
  shared = jax.tree.map(
    lambda axis, *leaves: leaves[0] if axis < 0 else jnp.stack(leaves), axes, *trees
  )
  return shared, axes


def turns(sources: Sequence[Source]) -> int:
  """How many different sources come round in turn: a, b, a, b has two.

  Args:
    sources: one for each student.

  Returns:
    The number, or that of the students where sources do not come round.
  """
  alike = [(id(s.read), id(s.shared), s.data_seed) for s in sources]
  count = len(set(alike))
  rounds, rest = divmod(len(alike), count)
  return count if not rest and alike == alike[:count] * rounds else len(alike)


def of_group(shared: PyTree, axes: PyTree, group: Any) -> PyTree:
  """One source's arrays out of those of `shared_arrays`."""
  return jax.tree.map(lambda leaf, axis: leaf if axis < 0 else leaf[group], shared, axes)


def over_students(
  chunk: Callable[..., Any],
  seeds_by: str,
  shared_axes: PyTree,
  groups: int,
  at_once: int | None = None,
) -> Callable[..., Any]:
  """A chunk of steps of one student, for students ``[S]`` of which i has the source ``i % groups``.

  Args:
    chunk: ``(state, teacher variables, shared, items, values) -> (state, sums)``.
    seeds_by: ``"vmap"``, or ``"unroll"`` for one after another inside the program.
    shared_axes: from `shared_arrays`.
    groups: from `turns`.
    at_once: how many students at most are side by side under ``"vmap"``, one such set after
      another; None for all.

  Returns:
    The same function of leaves ``[S, ...]``; those of the items are ``[groups, ...]``.
  """
  if seeds_by == "vmap":
    return _side_by_side(chunk, shared_axes, groups, at_once)
  if seeds_by != "unroll":
    raise ValueError(f"seeds_by={seeds_by!r} must be 'vmap' or 'unroll'.")

  def one_after_another(
    state: State, variables: PyTree, shared: PyTree, items: PyTree, values: Values
  ) -> Any:
    each = []
    for i in range(state.step.shape[0]):
      mine, its = jax.tree.map(lambda leaf, i=i: leaf[i], (state, values))
      group = i % groups
      its_items = jax.tree.map(lambda leaf, group=group: leaf[group], items)
      its_shared = of_group(shared, shared_axes, group)
      each.append(chunk(mine, variables, its_shared, its_items, its))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

  return one_after_another


def _side_by_side(
  chunk: Callable[..., Any], shared_axes: PyTree, groups: int, at_once: int | None
) -> Callable[..., Any]:
  """Under vmap, in two axes: over those of one source nothing of the batch is mapped.

  So its batch is cut once, and the teacher sees it once, whatever the number of students.
  """
  mapped = jax.tree.map(lambda axis: None if axis < 0 else axis, shared_axes)
  of_source = jax.vmap(chunk, in_axes=(0, None, None, None, 0))
  over = jax.vmap(of_source, in_axes=(1, None, mapped, 0, 1), out_axes=1)

  def run(state: State, variables: PyTree, shared: PyTree, items: PyTree, values: Values) -> Any:
    count = state.step.shape[0]
    points, most = count // groups, count if at_once is None else at_once

    def train_group(group: Any, its_items: PyTree, students: Any) -> Any:
      its_shared = of_group(shared, shared_axes, group)
      return _in_sets(
        lambda some: of_source(some[0], variables, its_shared, its_items, some[1]), students, most
      )

    if groups == 1:  # the other axis would be traced for nothing
      return train_group(0, jax.tree.map(lambda x: x[0], items), (state, values))
    folded = jax.tree.map(lambda x: x.reshape(points, groups, *x.shape[1:]), (state, values))
    if most >= groups:
      made = _in_sets(
        lambda some: over(some[0], variables, shared, items, some[1]), folded, most // groups
      )
    else:
      by_group = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), folded)
      made = jax.lax.map(lambda one: train_group(*one), (jnp.arange(groups), items, by_group))
      made = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), made)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), made)

  return run


def _in_sets(train: Callable[[Any], Any], students: Any, most: int) -> Any:
  """Trains sets of so many students at most, one set after another in a loop."""
  count = jax.tree.leaves(students)[0].shape[0]
  if most >= count:
    return train(students)
  size = _divisor(count, most)
  sets = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), students)
  made = jax.lax.map(train, sets)
  return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), made)


def _divisor(number: int, most: int) -> int:
  """The largest divisor that is no larger."""
  return max(n for n in range(1, min(number, most) + 1) if number % n == 0)
