"""What a run is known again by: all of it.

A folder that holds a run is gone on with by the same run alone. So its ``config.json`` says what
decides its numbers: seeds and steps, digests of the data, of the teacher's variables and of those
that the student starts from, and digests of what is computed, by `jaxdistill.runs.traced`. What is
computed is traced for one student and without the optimiser, wherever and however it is run: a run
may go on on other devices, and may be made longer with another schedule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdistill import runs
from jaxdistill.data import Source
from jaxdistill.runs import fingerprint
from jaxdistill.teachers import decay_of
from jaxdistill.train import _optax
from jaxdistill.train._plan import Plan
from jaxdistill.train._program import Program, optimizer_of, step_of
from jaxdistill.types import Batch, Teacher

__all__ = ["describe", "described_data", "described_student", "traced", "until"]

PyTree = Any


def describe(plan: Plan, params: PyTree) -> dict[str, Any]:
  """What a run's folder says of it, beside what is computed.

  Args:
    plan: what is trained.
    params: the student's parameters, or their shapes.
  """
  starts = (plan.start, plan.objective.start)
  return {
    **until(plan, plan.steps),
    "data_seed": [source.data_seed for source in plan.sources],
    "data": described_data(plan.sources),
    "student": described_student(plan.student.name, params),
    "accumulate": plan.accumulate,
    "average": plan.average,
    "teacher": _described_teacher(plan.teacher),
    "start": None if starts == (None, None) else fingerprint(starts),
  }


def _described_teacher(teacher: Teacher | None) -> str | None:
  if teacher is None:
    return None
  # A moving average has no variables yet: what it is asked for has its decay.
  return fingerprint(teacher.variables) if decay_of(teacher) is None else teacher.asked


def until(plan: Plan, steps: int) -> dict[str, Any]:
  """What `describe` says of a run's length: of a schedule, its values at three steps.

  Args:
    plan: what is trained.
    steps: how many steps the run has.
  """
  shown = {
    name: [float(value(s)) for s in (0, steps // 2, steps)] if callable(value) else value
    for name, value in plan.objective.hyper.items()
  }
  return {"steps": steps, "objective": shown}


def described_data(sources: Sequence[Source]) -> Any:
  """The data, as ``config.json`` holds them.

  Args:
    sources: where batches come from; often the same but for the data seed.

  Returns:
    A dict; or one for each source, where they differ.
  """
  contents: dict[int, Any] = {}  # those that share their examples are asked once
  for source in sources:
    if id(source.contents) not in contents:
      found = None if source.contents is None else dict(source.contents())
      contents[id(source.contents)] = found
  every = [
    {
      "name": source.name,
      "version": source.version,
      "size": source.size,
      "batch_size": source.batch_size,
      "views": source.views,
      "transfer": source.transfer,
      "teacher": source.teacher,
      "contents": contents[id(source.contents)],
    }
    for source in sources
  ]
  return every[0] if all(one == every[0] for one in every) else every


def described_student(name: str, params: PyTree) -> dict[str, Any]:
  """The student, as ``config.json`` holds it.

  Args:
    name: its own.
    params: its parameters, or their shapes.
  """
  shapes = jax.tree_util.tree_leaves_with_path(params)
  return {
    "name": name,
    "shapes": {jax.tree_util.keystr(p, simple=True, separator="/"): v.shape for p, v in shapes},
  }


def traced(plan: Plan, program: Program) -> dict[str, runs.Traced]:
  """What is computed: the beginning, a step, and the optimiser's part of it.

  Args:
    plan: what is trained, with its teacher, whether or not the program runs that in its steps.
    program: made of the plan.
  """
  source = plan.sources[0]

  def one(tree: PyTree) -> PyTree:
    # Shapes alone, without the axis over students.
    over = int(plan.stacked)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[over:], leaf.dtype), tree)

  # As optax takes it: what is behind it has nothing to do with the gradient.
  state = dataclasses.replace(one(program.shapes), opt_state=optax.EmptyState())
  values = one(jax.tree.map(np.asarray, program.values))
  trained = {"student": state.params, "objective": state.objective_params}

  def step(state: Any, teacher: Any, batch: Batch, mine: Any) -> Any:
    return step_of(plan, optax.identity(), mine)(state, teacher, batch)

  def update(grads: Any, opt_state: Any, params: Any, value: Any, mine: Any) -> Any:
    # A loss for those that evaluate it again: the step has the real one.
    loss = lambda params: value * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params))  # noqa: E731
    parts = [grads] * (len(_optax.term_groups(opt_state)) + 1)
    return _optax.update(optimizer_of(plan, mine), parts, opt_state, params, value=value, loss=loss)

  # All of it: several processes have read a part each.
  batch = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct((source.batch_size, *leaf.shape[1:]), leaf.dtype),
    jax.eval_shape(source.cut, source.shared, program.first_item),
  )
  value = jax.ShapeDtypeStruct((), np.float32)
  opt_state = one(program.shapes).opt_state
  # By shapes: JAX writes otherwise what is traced of arrays that lie on a mesh.
  teacher = jax.eval_shape(lambda leaves: leaves, plan.teacher)
  return {
    "initial": runs.traced(program.begins),
    **({} if source.shown is None else source.shown()),
    "step": runs.traced(jax.make_jaxpr(step)(state, teacher, batch, values)),
    "optimizer": runs.traced(jax.make_jaxpr(update)(trained, opt_state, trained, value, values)),
  }
