"""From a teacher to the best student that a budget allows.

Candidates over the budget are dropped by measuring and counting, before any training. The others
are trained by successive halving, with the sweep over temperature, weights and rates. Where the
best one is far behind the teacher, a teaching assistant in between is tried. What is chosen is
trained anew, beside the same network on labels alone, as two ordinary runs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from jaxdistill import arguments, budget, capture, deployed, sweep
from jaxdistill import run as run_lib
from jaxdistill.budget import Budget, BudgetError
from jaxdistill.compression import Job, kept
from jaxdistill.data import Source
from jaxdistill.points import Point, product, seed_pairs
from jaxdistill.program import Optimizer
from jaxdistill.recipes import kd
from jaxdistill.selection import Result, Row, score
from jaxdistill.shortlist import Candidate, Compressed
from jaxdistill.types import Batch, Network, Teacher

__all__ = ["Budget", "BudgetError", "Compressed", "family", "run", "told"]

PyTree = Any

# Hinton et al. 2015 have 1 to 20, and most papers one of these.
_POINTS = tuple(
  {"temperature": temperature, "soft_weight": soft, "hard_weight": round(1 - soft, 3)}
  for temperature in (1.0, 2.0, 4.0, 8.0)
  for soft in (0.5, 0.9)
)


def family(
  build: Callable[..., nn.Module | Network],
  *,
  features: Sequence[str] | Mapping[str, str] = (),
  **axes: Iterable[Any],
) -> dict[str, Network]:
  """Networks of one kind, for every combination of depth, width and whatever else it takes.

  Args:
    build: a function of the keywords that returns a Linen module, or a network.
    features: of the modules, see `jaxdistill.capture.linen`.
    **axes: the values of each keyword.

  Returns:
    The networks by name.

  >>> from jaxdistill import models
  >>> list(family(lambda width, depth: models.MLP([width] * depth), width=[4, 8], depth=[1]))
  ['width 4, depth 1', 'width 8, depth 1']
  """
  made: dict[str, Network] = {}
  for values in product(**axes):
    name = ", ".join(f"{keyword} {value}" for keyword, value in values.items())
    module = build(**values)
    if isinstance(module, nn.Module):
      module = capture.linen(module, features=features)
    if not isinstance(module, Network):
      raise TypeError(
        f"build({name}) returned {arguments.show(module)}; it must be a Linen module, or a Network."
      )
    made[name] = dataclasses.replace(module, name=name)
  return made


def told(folder: str | pathlib.Path) -> dict[str, Any]:
  """What a finished compression chose: its ``budget.json``.

  Args:
    folder: as `run` was given it.

  Returns:
    ``chosen`` (the candidate's name), its ``values``, its ``costs`` in a process of its own, which
    ``instance`` of the final seeds is best on validation, the ``sentence``, and more.

  Raises:
    FileNotFoundError: the compression is not finished, or there is none.
  """
  path = arguments.folder("folder", folder) / "budget.json"
  if not path.is_file():
    raise FileNotFoundError(f"{path} is not there: the compression is not finished; run it again.")
  found: dict[str, Any] = json.loads(path.read_text())
  return found


def run(
  candidates: Mapping[str, Network],
  *,
  within: Budget,
  teacher: Teacher,
  teacher_variables: PyTree,
  data: Source,
  validation: Batch,
  optimizer: Optimizer,
  steps: int,
  folder: str | pathlib.Path,
  objective: Any = kd,
  points: Sequence[Point] = _POINTS,
  seeds: Sequence[int] | Sequence[tuple[int, int]] = (0, 1, 2),
  final_seeds: Sequence[int] | Sequence[tuple[int, int]] = (0, 1, 2, 3, 4),
  halving: sweep.Halving | None = None,
  assistants: Mapping[str, Network] | None = None,
  gap: float = 0.02,
  metric: str = "accuracy",
  teacher_run: str | pathlib.Path | None = None,
  config: Mapping[str, Any] | None = None,
  progress: bool = True,
) -> Compressed:
  """Chooses, trains and saves the student that does best within a budget.

  The folder gets ``search/`` (the sweep), ``student/`` and ``baseline/`` (the chosen network,
  distilled and on labels alone: runs with checkpoints and a deployed student each),
  ``candidates.md``, ``candidates.csv``, ``frontier.png``, ``budget.json``, ``preflight.json`` (what
  `jaxdistill.preflight` found, which is warned of as well), and ``assistant/`` where one was tried.
  What was stopped goes on there.

  Args:
    candidates: networks by name, see `family`; deployed as they are, so that recipes that deploy
      something else (SimKD) are refused.
    within: the budget.
    teacher: ``(variables, batch) -> Outputs``.
    teacher_variables: its variables.
    data: where batches come from.
    validation: the split to choose on; never the test split.
    optimizer: an optax optimiser, or a function of keywords that ``points`` may vary.
    steps: of every training that goes to its end.
    folder: where all of it is kept.
    objective: an objective, or a recipe: a function of keywords that returns one.
    points: what is searched for each candidate, see `sweep.product`.
    seeds: of the search.
    final_seeds: of the chosen student and its baseline.
    halving: how points are dropped; a third is kept in each of three rungs by default.
    assistants: networks that may stand in between; the candidates over the budget by default.
    gap: how far behind the teacher, as a share of the validation examples, a student has to be
      before an assistant is tried; and by more than two standard errors over its seeds.
    metric: the validation metric to choose by.
    teacher_run: the teacher's run folder, whose curves tell whether it was trained to the end.
    config: what else defines the search, the optimiser's settings for example.
    progress: whether to show progress bars.

  Returns:
    What was chosen, and all candidates.

  Warns:
    PreflightWarning: something speaks against this teacher, objective or student.

  Raises:
    BudgetError: no candidate is inside the budget; the message has the nearest one.
    ValueError: an argument does not fit.

  Source of the assistant: Mirzadeh et al., "Improved Knowledge Distillation via Teacher Assistant",
  2020.
  """
  _check(candidates, within, gap)
  job = Job(
    within=within,
    teacher=teacher,
    teacher_variables=teacher_variables,
    data=data,
    validation=validation,
    optimizer=optimizer,
    steps=steps,
    objective=objective,
    points=list(points),
    seeds=seed_pairs(seeds),
    final_seeds=seed_pairs(final_seeds),
    metric=metric,
    progress=progress,
  )
  for network in candidates.values():
    job.one(network, job.points[0])  # says what is wrong before anything is measured
  path = arguments.folder("folder", folder)
  costs = kept(path / "costs.json", candidates) or {
    one: job.costs(network) for one, network in candidates.items()
  }
  fit = {one: candidates[one] for one in candidates if within.inside(costs[one])}
  if not fit:
    raise BudgetError(_nothing_fits(within, costs))
  about = {"budget": dataclasses.asdict(within), "candidates": list(candidates), "gap": gap}
  path = run_lib.claim(path, {**(config or {}), **about})
  run_lib.write_json(path / "costs.json", costs)
  warned = job.look(teacher_run)
  found = job.search(fit, path / "search", sweep.Halving(3, 3) if halving is None else halving)
  name, checked = _first_inside(job, fit, found, path)
  student, best = fit[name], found.rows[_best_row(found, name)]
  if assistants is None:
    assistants = {one: network for one, network in candidates.items() if one not in fit}
  tried = job.assist(student, best, assistants, gap, path)
  variables = job.final(student, best, tried, path)
  job.look(teacher_run, student, best, variables["baseline"], folder=path, known=warned)
  quality = {kind: job.validated(student, each) for kind, each in variables.items()}
  values = best.values
  if tried is not None and tried.row is not None and tried.helps:
    values = tried.row.values
  made = Compressed(
    budget=within,
    candidates=[
      _candidate(one, costs[one], found if one in fit else None, checked.get(one))
      for one in candidates
    ],
    teacher=job.teacher_row(path),
    chosen=name,
    values={keyword: value for keyword, value in values.items() if keyword != "student"},
    assistant=tried,
    metric=metric,
    network=student,
    variables=variables["student"],
    validation=quality,
  )
  made.write(path)
  return made


def _check(candidates: Any, within: Any, gap: Any) -> None:
  if not isinstance(candidates, Mapping) or not candidates:
    raise TypeError(
      f"candidates={arguments.show(candidates)} must be networks by name, as compress.family makes."
    )
  wrong = [name for name, network in candidates.items() if not isinstance(network, Network)]
  if wrong:
    raise TypeError(f"candidates {wrong} are no networks; give capture.linen(module).")
  if not isinstance(within, Budget):
    raise TypeError(f"within={arguments.show(within)} must be a compress.Budget.")
  arguments.number("gap", gap, least=0)


def _first_inside(
  job: Job, students: Mapping[str, Network], found: Result, path: pathlib.Path
) -> tuple[str, dict[str, dict[str, Any]]]:
  """The best candidate that is inside the budget in a process of its own, too."""
  file = path / "checked.json"
  checked: dict[str, dict[str, Any]] = kept(file, [])
  for name in sorted(students, key=lambda name: _rank(found.rows[_best_row(found, name)], job)):
    if name not in checked:
      folder = path / "checked"
      variables = jax.tree.map(lambda leaf: leaf[0], found.students(_best_row(found, name)))
      deployed.save_student(
        folder, students[name], variables, stored=job.data.stored, normalize=job.data.normalize
      )
      checked[name] = budget.separately(folder, job.within)
      run_lib.write_json(file, checked)
    if job.within.inside(checked[name]):
      return name, checked
  raise BudgetError(_nothing_fits(job.within, checked))


def _rank(row: Row, job: Job) -> tuple[int, float]:
  """Farther trained first, then better."""
  mean = float(np.mean(score(row, job.metric)))
  return -row.step, -mean if math.isfinite(mean) else math.inf


def _best_row(found: Result, name: str) -> int:
  """A candidate's best point, of those that went farthest."""
  mine = [i for i, row in enumerate(found.rows) if row.values["student"] == name]

  def key(i: int) -> tuple[int, float]:
    mean = float(np.mean(score(found.rows[i], found.metric)))
    return found.rows[i].step, mean if math.isfinite(mean) else -math.inf

  return max(mine, key=key)


def _candidate(
  name: str, costs: dict[str, Any], found: Result | None, checked: dict[str, Any] | None
) -> Candidate:
  row = None if found is None else found.rows[_best_row(found, name)]
  return Candidate(name=name, costs=costs, row=row, checked=checked)


def _nothing_fits(within: Budget, costs: Mapping[str, Mapping[str, Any]]) -> str:
  name = budget.nearest(within, costs)
  over = {n: share for n, share in within.shares(costs[name]).items() if share > 1}
  beyond = ", ".join(
    f"{costs[name][n]:,.4g} {budget.UNITS[n]} ({share:.2f} times what is allowed)"
    if costs[name][n] is not None
    else f"an unknown number of {budget.UNITS[n]}"
    for n, share in over.items()
  )
  return (
    f"no candidate is inside the budget of {within.describe()}. The nearest of {len(costs)}, "
    f"{name!r}, has {beyond}: raise the budget to that, or give smaller candidates."
  )
