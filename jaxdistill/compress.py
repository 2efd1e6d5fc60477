"""From a teacher to the best student that a budget allows.

Candidates over the budget are dropped by measuring and counting, before any training. The others
are trained by successive halving, with the sweep over temperature, weights and rates. Where the
best one is far behind the teacher, a teaching assistant in between is tried. What is chosen is
trained anew, beside the same network on labels alone, as two ordinary runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

__all__ = ["Budget", "BudgetError", "Compressed", "affordable", "family", "run", "told"]

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


def affordable(
  candidates: Mapping[str, Network], within: Budget, data: Source
) -> dict[str, dict[str, Any]]:
  """What all candidates cost; fails at once where none is inside the budget.

  Args:
    candidates: networks by name.
    within: the budget.
    data: where batches come from, for what is stored and how it is normalised.

  Returns:
    Each one's costs, see `jaxdistill.budget.measure`.

  Raises:
    BudgetError: no candidate is inside the budget; the message has the nearest one.
  """
  _check(candidates, within, 0)
  costs = {
    name: budget.measure(
      network, data.stored, normalize=data.normalize, batch_size=within.batch_size
    )
    for name, network in candidates.items()
  }
  if not any(within.inside(found) for found in costs.values()):
    raise BudgetError(_nothing_fits(within, costs))
  return costs


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
  costs: Mapping[str, Mapping[str, Any]] | None = None,
  teacher_network: Network | None = None,
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
    costs: what `affordable` measured; measured here by default.
    teacher_network: the network whose variables ``teacher_variables`` are, for the pre-flight check
      whether a few more steps still improve it.
    teacher_run: the teacher's run folder, whose curves tell that where they are long enough.
    config: what else defines the search, the optimiser's settings for example.
    progress: whether to show progress bars.

  Returns:
    What was chosen, and all candidates.

  Warns:
    PreflightWarning: something speaks against this teacher, objective or student.

  Raises:
    BudgetError: no candidate is inside the budget; the message has the nearest one.
    FloatingPointError: no point of the search stayed finite.
    RuntimeError: the student could not be timed in a process of its own.
    ValueError: an argument does not fit, or the folder holds another compression.
    jaxdistill.train.Stopped: the process was asked to stop.

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
    teacher_network=teacher_network,
    teacher_run=teacher_run,
    progress=progress,
  )
  for network in candidates.values():
    job.one(network, job.points[0])  # says what is wrong before anything is measured
  about = {"budget": dataclasses.asdict(within), "candidates": list(candidates), "gap": gap}
  path = run_lib.claim(arguments.folder("folder", folder), {**(config or {}), **about})
  with _given_back(path):
    known = costs or _kept_costs(path, candidates, within) or affordable(candidates, within, data)
    costs = {one: dict(known[one]) for one in candidates}
    fit = {one: candidates[one] for one in candidates if within.inside(costs[one])}
    if not fit:
      raise BudgetError(_nothing_fits(within, costs))
  run_lib.write_json(path / "costs.json", {"batch_size": within.batch_size, "costs": costs})
  largest = max(fit, key=lambda one: costs[one]["parameters"])
  warned = job.look(fit[largest], job.points[0], path)
  found = job.search(fit, path / "search", sweep.Halving(3, 3) if halving is None else halving)
  name, checked = _first_inside(job, fit, found, path)
  student, best = fit[name], found.rows[_best_row(found, name)]
  if assistants is None:
    assistants = {one: network for one, network in candidates.items() if one not in fit}
  tried = job.assist(student, best, assistants, gap, path)
  variables = job.final(student, best, tried, path)
  job.look(student, best.values, path, variables["baseline"], known=warned)
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
  raise BudgetError(_nothing_fits(job.within, checked, path))


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
  name: str, costs: Mapping[str, Any], found: Result | None, checked: dict[str, Any] | None
) -> Candidate:
  row = None if found is None else found.rows[_best_row(found, name)]
  return Candidate(name=name, costs=dict(costs), row=row, checked=checked)


@contextlib.contextmanager
def _given_back(path: pathlib.Path) -> Iterator[None]:
  """Gives the folder back where no candidate is inside the budget: a larger one may have it."""
  begun = (path / "costs.json").is_file()
  try:
    yield
  except BudgetError:
    if not begun:
      (path / "config.json").unlink(missing_ok=True)
      with contextlib.suppress(OSError):
        path.rmdir()  # if there is nothing else in it
    raise


def _kept_costs(
  path: pathlib.Path, candidates: Mapping[str, Network], within: Budget
) -> dict[str, dict[str, Any]]:
  """The costs that the folder was begun with, if they are of these candidates and this batch."""
  found = kept(path / "costs.json", ["batch_size", "costs"])
  same = found and found["batch_size"] == within.batch_size
  return dict(found["costs"]) if same and set(found["costs"]) == set(candidates) else {}


def _nothing_fits(
  within: Budget, costs: Mapping[str, Mapping[str, Any]], folder: pathlib.Path | None = None
) -> str:
  name = budget.nearest(within, costs)
  over = [n for n, share in within.shares(costs[name]).items() if share > 1]
  has = ", ".join(f"{budget.number(costs[name][n])} {budget.UNITS[n]}" for n in over)
  raised = within.needed(costs[name])
  enough = " and ".join(f"{n}={limit:,}" for n, limit in raised.items())
  where = "" if folder is None else f", in another folder than {folder}"
  fix = f"a budget of {enough} would do{where}"
  if len(raised) < len(over):
    fix = "some of it cannot be counted, and a budget must not limit that"
  return (
    f"no candidate is inside the budget of {within.describe()}. The nearest of {len(costs)}, "
    f"{name!r}, has {has}: {fix}; or give smaller candidates."
  )
