"""Born-again networks: generations of one network, each taught by the one before."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxdistill import _check, recipes
from jaxdistill.data import Source
from jaxdistill.teachers import cached, check_source, frozen
from jaxdistill.train._fit import Fitted, Run, Watch, check_run, fit
from jaxdistill.train._mesh import Dispatch, with_jit
from jaxdistill.train._optax import Transformation
from jaxdistill.train._plan import Plan, check_seeds
from jaxdistill.train._program import Program
from jaxdistill.train._side_by_side import example_key, inputs_of
from jaxdistill.types import Model, Network, Objective, ObjectiveFunction, Outputs, Teacher

__all__ = ["born_again"]


def born_again(
  student: Network,
  objective: Objective | ObjectiveFunction | None = None,
  *,
  generations: int = 3,
  data: Source | Sequence[Source],
  optimizer: Transformation,
  steps: int,
  seed: int | Sequence[int] = 0,
  average: float | None = None,
  dispatch: Dispatch | None = None,
  watch: Watch | None = None,
  run: Run | str | os.PathLike[str] | None = None,
) -> list[Fitted]:
  """Born-again networks (BAN): generations of one network, each taught by the one before.

  The first generation learns from the labels, by `recipes.labels`; each later one begins anew, with
  another seed, and learns by ``objective`` from the one before. Their ensemble, which the paper
  reports beside them, is ``teachers.ensemble([one.instance(i) for one in found])`` of seed i.

  Of several seeds, each one's student is taught by its own predecessor: the predecessors' logits
  are kept in memory beside the data (`teachers.cached`), whose views must be finite for that, and
  features are not. A weight is chosen by a sweep of a generation, whose teacher is the one before::

      search.sweep(student, recipes.kd, points=search.product(soft_weight=[0.5, 1.0]),
                   teacher=teachers.frozen(found[-1].instance(0)), ...)

  Source: Furlanello, Lipton, Tschannen, Itti, Anandkumar, "Born-Again Neural Networks", 2018.

  Args:
    student: the network.
    objective: of the generations after the first; by default labels and soft targets at temperature
      1, with weight 1 each.
    generations: how many there are, the first included.
    data: as `fit` takes it.
    optimizer: likewise; each generation starts it anew.
    steps: of each generation.
    seed: of the first generation, one or several. Those of the next are higher by as much as leaves
      none twice: by 1 for one, by 3 for 0, 1 and 2.
    average: as `fit` takes it; the average is then what teaches.
    dispatch: likewise.
    watch: likewise.
    run: likewise; each generation has a folder in the run's, ``generation1`` and so on, and one
      that was stopped goes on where it was.

  Returns:
    What `fit` returned of each generation, from the first to the last.

  Raises:
    TypeError, ValueError: as `fit` does, of all generations before the first is trained; and of
      several seeds, the data have no finite views.
    Stopped: as `fit` does; ``stop_after`` is of all generations together.
  """
  called = time.monotonic()
  _check.whole("generations", generations)
  if not isinstance(student, Network):
    raise TypeError(
      f"student={_check.show(student)} must be a Network, which each generation begins anew: of a "
      "model, model.network."
    )
  run = check_run(run, "series of generations")
  seeds, sources = check_seeds(seed, data)
  stride = max(seeds) - min(seeds) + 1
  last = max(seeds) + (generations - 1) * stride
  if last >= 2**32:
    raise ValueError(
      f"seed={_check.show(seed)}: the last of {generations} generations would have {last}, which "
      "is beyond 2**32 - 1; begin lower."
    )
  later = _soft_targets() if objective is None else objective
  if generations > 1:  # before the first is trained
    how = {"optimizer": optimizer, "steps": steps, "seed": seeds[0], "average": average}
    _check_later(student, later, sources, dispatch, alone=len(seeds) == 1, **how)
  found: list[Fitted] = []
  for g in range(generations):
    mine = [one + g * stride for one in seeds]
    taught: dict[str, Any] = {"data": data}
    if found:
      teachers = [frozen(model) for model in found[-1].unstack()]
      if len(teachers) == 1:
        taught["teacher"] = teachers[0]
      else:
        pairs = zip(teachers, sources, strict=True)
        taught["data"] = [cached(teacher, one, progress=None) for teacher, one in pairs]
    fitted = fit(
      student,
      later if found else recipes.labels(),
      optimizer=optimizer,
      steps=steps,
      seed=mine if np.ndim(seed) else mine[0],
      average=average,
      dispatch=dispatch,
      watch=watch,
      run=_of_generation(run, g + 1, time.monotonic() - called),
      **taught,
    )
    found.append(fitted)
  return found


def _check_later(
  student: Network,
  objective: Any,
  sources: Sequence[Source],
  dispatch: Dispatch | None,
  *,
  alone: bool,
  **how: Any,
) -> None:
  """Raises for what only the generations after the first would say, by shapes alone."""
  source = sources[0]
  variables = jax.eval_shape(student.init, example_key(), inputs_of(source))
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variables)
  teacher = frozen(Model(student, zeros))
  if not alone:  # what a cache in memory keeps
    for one in sources:
      check_source(one)
    whole = teacher
    teacher = Teacher(zeros, lambda _, batch: Outputs(logits=whole(batch).logits))
  plan = Plan.of(student, objective, data=source, teacher=teacher, **how)
  Program(plan, with_jit() if dispatch is None else dispatch, longest=1).trace()


def _soft_targets() -> Objective:
  return recipes.kd(temperature=1.0, soft_weight=1.0, hard_weight=1.0)


def _of_generation(run: Run, number: int, gone: float) -> Run:
  """A generation's part of a run, of which so many seconds are over."""
  name = f"generation{number}"
  folder = None if run.folder is None else pathlib.Path(run.folder) / name
  left = None if run.stop_after is None else max(1e-3, run.stop_after - gone)
  label = run.progress if isinstance(run.progress, bool | None) else f"{run.progress}, {name}"
  return dataclasses.replace(run, folder=folder, stop_after=left, progress=label)
