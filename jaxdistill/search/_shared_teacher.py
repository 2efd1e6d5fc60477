"""A sweep's teacher, run once over the examples where nothing is augmented."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import runs
from jaxdistill._compile import Deferred
from jaxdistill.data import Source
from jaxdistill.search._side_by_side import example_key
from jaxdistill.teachers import Filler, with_outputs
from jaxdistill.types import Batch, Network, Objective, Outputs, Teacher

__all__ = ["share_teacher", "used_features"]

PyTree = Any


def used_features(
  objective: Objective, student: Outputs, teacher: Outputs, batch: Batch
) -> list[str]:
  """Which of the teacher's features an objective looks at.

  Args:
    objective: the objective.
    student: what the student puts out, as shapes.
    teacher: what the teacher puts out, as shapes.
    batch: a batch, as shapes.

  Returns:
    Their names: those whose array goes into an operation.
  """
  key = example_key()
  params, state = jax.eval_shape(lambda key: objective.init(key, student, teacher), key)
  # Schedules and what has no default are traced as numbers: any will do. On the host, where an
  # objective may branch on one.
  dtype = jax.dtypes.canonicalize_dtype(float)
  given = {
    name: np.asarray(value if isinstance(value, int | float) else 1.0, dtype)
    for name, value in objective.hyper.items()
  }

  def apply(teacher: Outputs, rest: PyTree) -> Any:
    params, state, student, batch, key = rest
    return objective.apply(params, state, student, teacher, batch, key=key, **given)

  traced = jax.make_jaxpr(apply)(teacher, (params, state, student, batch, key)).jaxpr
  seen = {id(v) for equation in traced.eqns for v in equation.invars}
  seen |= {id(v) for v in traced.outvars}
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(teacher)]
  # The teacher's leaves come first, and paths end there.
  used = [path for path, v in zip(paths, traced.invars, strict=False) if id(v) in seen]
  return [str(path[1].key) for path in used if path[0].name == "features"]


def share_teacher(
  learners: Sequence[tuple[Network, Objective]],
  teacher: Teacher,
  sources: list[Source],
  memory: int,
) -> list[Source] | None:
  """The sources with the teacher's outputs on them, shared by all data seeds.

  Args:
    learners: the students and their objectives, which decide the features that are kept.
    teacher: the teacher.
    sources: one for each data seed.
    memory: how many bytes the outputs may take.

  Returns:
    The sources; None where views depend on the seed, examples cannot be shown all, or the outputs
    take more.
  """
  first = sources[0]
  if first.augmentation != "identity" or first.whole is None or first.teacher is not None:
    return None
  if any(source.read is not first.read for source in sources):
    return None
  item = next(iter(first.whole.every(first.data_seed, first.batch_size, 0)))
  batch = jax.eval_shape(first.cut, first.shared, item)
  theirs = jax.eval_shape(Teacher.__call__, teacher, batch)
  if theirs.logits is None:
    return None

  def used(student: Network, objective: Objective) -> list[str]:
    def forward(key: Any, inputs: PyTree) -> Outputs:
      return student.apply(student.init(key, inputs), inputs, train=False, key=None)[0]

    ours = jax.eval_shape(forward, example_key(), batch.inputs)
    return used_features(objective, ours, theirs, batch)

  features = sorted({name for learner in learners for name in used(*learner)})
  kept = [theirs.logits, *(theirs.features[name] for name in features)]
  each = sum(math.prod(leaf.shape[1:]) * max(leaf.dtype.itemsize, 4) for leaf in kept)
  if first.whole.size * each > memory:
    return None
  dtype = "float64" if theirs.logits.dtype == jnp.float64 else "float32"
  fill = Filler(teacher, first, dtype, tuple(features), batch_size=256)

  @functools.cache
  def arrays() -> dict[str, jax.Array]:
    made: dict[str, jax.Array] = jax.device_put(fill(0, lambda batches: None))
    return made

  def deferred(name: str, row: jax.ShapeDtypeStruct) -> Deferred:
    return Deferred((fill.size, *row.shape), row.dtype, lambda: arrays()[name])

  # The teacher runs while the compiler is at the students' program, which takes its shapes alone.
  made = with_outputs(first, {n: deferred(n, row) for n, row in fill.layout.items()}, fill.size)
  made = dataclasses.replace(made, teacher=runs.fingerprint(teacher.variables))
  return [dataclasses.replace(made, data_seed=source.data_seed) for source in sources]
