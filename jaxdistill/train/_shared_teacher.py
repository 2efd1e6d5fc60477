"""A teacher that is run once over the examples, where nothing is augmented."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxdistill import runs
from jaxdistill._compile import Deferred, quarter
from jaxdistill.data import Source
from jaxdistill.teachers import Filler, decay_of, with_outputs
from jaxdistill.train._plan import Plan
from jaxdistill.train._side_by_side import example_key, forward_of
from jaxdistill.types import Batch, Network, Objective, Outputs, Teacher

__all__ = ["share_teacher", "used_features", "with_answers"]

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


def _kept(
  learners: Sequence[tuple[Network, Objective]], teacher: Teacher, source: Source
) -> tuple[tuple[str, ...], int] | None:
  """The features to be kept, and the bytes of an example; None where logits are not all of it."""
  whole: Any = source.whole
  item = next(iter(whole.every(source.data_seed, source.batch_size, 0)))
  batch = jax.eval_shape(source.cut, source.shared, item)
  theirs = jax.eval_shape(Teacher.__call__, teacher, batch)
  if theirs.logits is None or theirs.members:  # what a cohort's members say apart is not kept
    return None

  def used(student: Network, objective: Objective) -> list[str]:
    ours = jax.eval_shape(forward_of(student), example_key(), batch.inputs)
    return used_features(objective, ours, theirs, batch)

  features = sorted({name for learner in learners for name in used(*learner)})
  rows = [theirs.logits, *(theirs.features[name] for name in features)]
  return tuple(features), sum(math.prod(row.shape[1:]) * row.dtype.itemsize for row in rows)


def share_teacher(
  learners: Sequence[tuple[Network, Objective]],
  teacher: Teacher,
  sources: list[Source],
  memory: int,
  *,
  label: str | None = None,
  nan: bool = False,
) -> list[Source] | None:
  """The sources with the teacher's outputs on them, shared by all data seeds.

  Args:
    learners: the students and their objectives, which decide the features that are kept.
    teacher: the teacher.
    sources: one for each data seed.
    memory: how many bytes the outputs may take.
    label: of the progress while the teacher is run; None for silence.
    nan: whether NaN are kept as they are, and no error.

  Returns:
    The sources; None where views depend on the seed, examples cannot be shown all, the outputs take
    more, or an answer depends on the other examples in the batch.
  """
  first = sources[0]
  if decay_of(teacher) is not None:  # it changes with the student
    return None
  if first.augmentation != "identity" or first.whole is None or first.teacher is not None:
    return None
  if first.transform is not None or any(source.read is not first.read for source in sources):
    return None
  if jax.process_count() > 1:  # each would have to hold the same bits
    return None
  try:
    kept = _kept(learners, teacher, first)
  except Exception:
    # What does not fit together says so in better words where the step itself is traced.
    return None
  if kept is None or first.whole.size * kept[1] > memory:
    return None
  features = kept[0]
  fill = Filler(teacher, first, None, features, batch_size=256, nan=nan)
  if not fill.alone():
    return None

  @functools.cache
  def arrays() -> dict[str, jax.Array]:
    with runs.progress_bar(fill.size, label, unit="example") as shown:
      made: dict[str, jax.Array] = jax.device_put(fill(0, shown.update))
    return made

  def deferred(name: str, row: jax.ShapeDtypeStruct) -> Deferred:
    return Deferred((fill.size, *row.shape), row.dtype, lambda: arrays()[name])

  # The teacher runs while the compiler is at the students' program, which takes its shapes alone.
  rows = {name: deferred(name, row) for name, row in fill.layout.items()}
  made = with_outputs(first, rows, fill.size, widen=False)
  return [dataclasses.replace(made, data_seed=source.data_seed) for source in sources]


def with_answers(plan: Plan, label: str | None) -> Plan:
  """The plan with the teacher run once over the examples, where that is the same and less work.

  So it is for data on the device without augmentation and transform, if each example is seen at
  least once and the outputs take no more than a quarter of the device's memory. It is decided by
  the plan alone, so that a run that goes on goes on as it began.

  Args:
    plan: what is trained.
    label: of the progress while the teacher is run; None for silence.
  """
  source = plan.sources[0]
  if plan.teacher is None or source.whole is None:
    return plan
  arrays = jax.tree.leaves(source.shared, is_leaf=lambda leaf: leaf is None)
  passes = plan.steps * source.batch_size * len({one.data_seed for one in plan.sources})
  if any(leaf is None for leaf in arrays) or passes < source.whole.size:
    return plan
  learners = [(plan.student, plan.objective)]
  sources = share_teacher(
    learners, plan.teacher, plan.sources, quarter("device"), label=label, nan=True
  )
  return plan if sources is None else dataclasses.replace(plan, sources=sources, teacher=None)
