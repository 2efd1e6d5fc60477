"""From a teacher to the best student that a budget allows.

Candidates over the budget are dropped by measuring and counting, before any training. The others
are trained by successive halving, with the sweep over temperature, weights and rates. Where the
best one is far behind the teacher, a teaching assistant in between is tried. What is chosen is
trained anew, beside the same network on labels alone, as two ordinary runs.

`compress` walks through the stages, each a method of `Job`; `Compressed` is what was found.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from jaxdistill import _check, _extras, evaluation, export, networks, runs, teachers, train
from jaxdistill.data import Source
from jaxdistill.evaluation import cost, metrics, tasks
from jaxdistill.recipes import kd, labels
from jaxdistill.reports import Markup, csv_text, figures, grid, plain, with_std
from jaxdistill.search import _budget, _preflight, _sweep
from jaxdistill.search._budget import UNITS, Budget, BudgetError
from jaxdistill.search._checks import findings
from jaxdistill.search._choice import Choice, Halving, Result, Row, standard_error
from jaxdistill.search._grid import (
  OneStudent,
  Point,
  check_points,
  one_student,
  product,
  seed_pairs,
)
from jaxdistill.train import Optimizer, example_key, inputs_of
from jaxdistill.types import Model, Network, Teacher

__all__ = [
  "Affordable",
  "Assistant",
  "Assistants",
  "Candidate",
  "Compressed",
  "Job",
  "affordable",
  "compress",
  "family",
  "measured_before",
  "read_choice",
]

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
    features: of the modules, see `jaxdistill.networks.linen`.
    **axes: the values of each keyword.

  Returns:
    The networks by name.

  >>> from jaxdistill import networks
  >>> from jaxdistill.networks.models import MLP
  >>> list(family(lambda width, depth: MLP([width] * depth), width=[4, 8], depth=[1]))
  ['width 4, depth 1', 'width 8, depth 1']
  """
  made: dict[str, Network] = {}
  for values in product(**axes):
    name = ", ".join(f"{keyword} {value}" for keyword, value in values.items())
    module = build(**values)
    if isinstance(module, nn.Module):
      module = networks.linen(module, features=features)
    if not isinstance(module, Network):
      raise TypeError(
        f"build({name}) returned {_check.show(module)}; it must be a Linen module, or a Network."
      )
    made[name] = dataclasses.replace(module, name=name)
  return made


@dataclasses.dataclass(frozen=True)
class Affordable:
  """Candidates and what each costs, at least one of them inside the budget.

  Attributes:
    candidates: networks by name.
    within: the budget.
    costs: each one's, see `jaxdistill.search.measure_network`.
  """

  candidates: dict[str, Network]
  within: Budget
  costs: dict[str, dict[str, Any]]

  @property
  def inside(self) -> dict[str, Network]:
    """Those that are inside the budget."""
    return {n: one for n, one in self.candidates.items() if self.within.inside(self.costs[n])}


def affordable(candidates: Mapping[str, Network], within: Budget, data: Source) -> Affordable:
  """What all candidates cost; fails at once where none is inside the budget.

  Args:
    candidates: networks by name, see `family`; deployed as they are, so that recipes that deploy
      something else (SimKD) are refused.
    within: the budget.
    data: where batches come from, for what is stored and how it is normalised.

  Returns:
    What `compress` takes.

  Raises:
    TypeError: an argument is of another kind than it must be.
    BudgetError: no candidate is inside the budget; the message has the nearest one.
  """
  if not isinstance(candidates, Mapping) or not candidates:
    raise TypeError(
      f"candidates={_check.show(candidates)} must be networks by name, as search.family makes."
    )
  wrong = [name for name, network in candidates.items() if not isinstance(network, Network)]
  if wrong:
    raise TypeError(f"candidates {wrong} are no networks; give networks.linen(module).")
  if not isinstance(within, Budget):
    raise TypeError(f"within={_check.show(within)} must be a search.Budget.")
  if not isinstance(data, Source):
    raise TypeError(f"data={_check.show(data)} must be a Source, such as data.on_device makes.")
  costs = {
    name: _budget.measure_network(
      network, data.stored, normalize=data.normalize, batch_size=within.batch_size
    )
    for name, network in candidates.items()
  }
  made = Affordable(dict(candidates), within, costs)
  if not made.inside:
    raise BudgetError(_nothing_fits(within, costs))
  return made


@dataclasses.dataclass(frozen=True)
class Assistants:
  """Networks that may stand between teacher and student, and when one is tried.

  Mirzadeh et al., "Improved Knowledge Distillation via Teacher Assistant", 2020.

  Attributes:
    networks: by name; the candidates over the budget by default.
    gap: how far behind the teacher a student has to be before an assistant is tried: in a metric
      that is a share (accuracy) by so much of 1, in another (an error) by so much of the teacher's
      own; and by more than two standard errors over its seeds. The metric is the task's first.

  Raises:
    ValueError: ``gap`` is negative.
  """

  networks: Mapping[str, Network] | None = None
  gap: float = 0.02

  def __post_init__(self) -> None:
    _check.number("gap", self.gap, least=0)


def read_choice(folder: str | pathlib.Path) -> dict[str, Any]:
  """What a finished compression chose: its ``budget.json``.

  Args:
    folder: as `compress` was given it.

  Returns:
    ``chosen`` (the candidate's name), its ``values``, its ``costs`` in a process of its own, which
    ``instance`` of the final seeds is best on validation, the ``sentence``, and more.

  Raises:
    FileNotFoundError: the compression is not finished, or there is none.
    ValueError: the file is damaged.
  """
  path = _check.folder("folder", folder) / "budget.json"
  if not path.is_file():
    raise FileNotFoundError(f"{path} is not there: the compression is not finished; run it again.")
  return runs.read_object(path)


def compress(
  candidates: Affordable,
  *,
  teacher: Teacher,
  data: Source,
  optimizer: Optimizer,
  steps: int,
  choice: Choice,
  run: train.Run | str | pathlib.Path,
  objective: Any = kd,
  points: Sequence[Point] = _POINTS,
  seeds: Sequence[int] | Sequence[tuple[int, int]] = (0, 1, 2),
  assistants: Assistants | None = None,
  teacher_run: str | pathlib.Path | None = None,
) -> Compressed:
  """Chooses, trains and saves the student that does best within a budget.

  The folder gets ``search/`` (the sweep), ``student/`` and ``baseline/`` (the chosen network,
  distilled and, where the choice has a baseline, on labels alone: runs with checkpoints and a
  deployed student each),
  ``candidates.md``, ``candidates.csv``, ``frontier.png``, ``budget.json``, ``preflight.json`` (what
  `jaxdistill.search.preflight` found, which is warned of as well), and ``assistant/`` where one was
  tried. What was stopped goes on there.

  Args:
    candidates: from `affordable`: the networks, the budget, and what they cost.
    teacher: from `jaxdistill.teachers`.
    data: where batches come from.
    optimizer: an optax optimiser, or a function of keywords that ``points`` may vary.
    steps: of every training that goes to its end.
    choice: the split to choose on, what its labels mean, by which metric, and the objective of the
      baseline; its ``retrain`` are the seeds of the chosen student and of its baseline.
    run: where all of it is kept, see `jaxdistill.train.Run`; a path is the folder.
    objective: an objective, or a recipe: a function of keywords that returns one.
    points: what is searched for each candidate, see `search.product`.
    seeds: of the search.
    assistants: networks that may stand in between; the candidates over the budget by default.
    teacher_run: the teacher's run folder, whose curves tell the pre-flight checks whether it was
      trained to the end, where they are long enough.

  Returns:
    What was chosen, and all candidates.

  Warns:
    PreflightWarning: something speaks against this teacher, objective or student.

  Raises:
    BudgetError: no candidate is inside the budget in a process of its own.
    FloatingPointError: no point of the search stayed finite.
    RuntimeError: the student could not be timed in a process of its own.
    TypeError: an argument is of another kind than it must be.
    ValueError: an argument does not fit, or the folder holds another compression.
    jaxdistill.train.Stopped: the process was asked to stop, or ``stop_after`` is over.
  """
  train.with_students()  # says first that its sweeps are of one process
  check_points(points)
  if not isinstance(assistants, Assistants | None):
    raise TypeError(
      f"assistants={_check.show(assistants)} must be search.Assistants(networks, gap=...), or None."
    )
  _extras.need("search.compress, which draws a picture,", "matplotlib")
  job = Job(
    teacher=teacher,
    data=data,
    optimizer=optimizer,
    steps=steps,
    choice=_checked(candidates, choice),
    run=train.check_run(run, "search within a budget"),
    objective=objective,
    points=list(points),
    seeds=seed_pairs(seeds),
    teacher_run=teacher_run,
  )
  train.check_teacher(teacher)
  if teacher is None or teachers.decay_of(teacher) is not None:
    what = "None" if teacher is None else "a moving average of the student, which is not there yet"
    raise TypeError(f"teacher is {what}, and compress needs one; give teachers.frozen(model).")
  for network in candidates.candidates.values():
    job.student_at(network, job.points[0])  # says what is wrong before anything is claimed
  assistants = Assistants() if assistants is None else assistants
  path = job.claim(candidates, assistants.gap)
  with runs.hold(path), train.time_limit(job.run.stop_after):
    return _compressed(job, _costs_before(path, candidates), assistants, path)


def _checked(candidates: Any, choice: Any) -> Choice:
  """The choice with this search's own defaults."""
  if not isinstance(candidates, Affordable):
    raise TypeError(
      f"candidates={_check.show(candidates)} must be what search.affordable(candidates, within, "
      "data) returns."
    )
  if not isinstance(choice, Choice):
    raise TypeError(f"choice={_check.show(choice)} must be a search.Choice(validation, ...).")
  if choice.test is not None:
    raise ValueError("choice has a test split, which compress does not read: report on it after.")
  return dataclasses.replace(
    choice,
    halving=Halving(3, 3) if choice.halving is None else choice.halving,
    retrain=seed_pairs(range(5) if choice.retrain is None else choice.retrain),
  )


def _compressed(
  job: Job, affordable: Affordable, assistants: Assistants, path: pathlib.Path
) -> Compressed:
  """The stages, one after another."""
  costs, fit = affordable.costs, affordable.inside
  within, candidates = affordable.within, affordable.candidates
  largest = max(fit, key=lambda one: costs[one]["parameters"])
  warned = job.preflight(fit[largest], job.points[0], path)
  found = job.search(fit, path / "search")
  name, checked = _first_inside(job, within, fit, found, path)
  student, best = fit[name], found.rows[_best_row(found, name)]
  between = assistants.networks
  if between is None:
    between = {one: network for one, network in candidates.items() if one not in fit}
  tried = job.assist(student, best, between, assistants.gap, path)
  models = job.final(student, best, tried, path)
  job.preflight(student, best.values, path, models.get("baseline"), known=warned)
  values = best.values
  if tried is not None and tried.row is not None and tried.helps:
    values = tried.row.values
  made = Compressed(
    budget=within,
    candidates=[
      _candidate(one, costs[one], found if one in fit else None, checked.get(one))
      for one in candidates
    ],
    teacher=job.teacher_row(path, within),
    chosen=name,
    values=_without_student(values),
    assistant=tried,
    task=job.choice.of,
    metric=job.choice.metric,
    model=models["student"],
    validation={kind: job.validated(model) for kind, model in models.items()},
  )
  made.write(path)
  numbers = {f"{kind}/{n}": of for kind, by in made.validation.items() for n, of in by.items()}
  listed = sorted(path.glob("candidates.*")) + sorted(path.glob("frontier*.png"))
  runs.track(
    job.run.trackers,
    folder=path,
    step=job.steps,
    numbers=numbers,
    files=[*listed, path / "budget.json"],
  )
  runs.say_saved(job.run.label("compress"), path)
  return made


def _first_inside(
  job: Job, within: Budget, students: Mapping[str, Network], found: Result, path: pathlib.Path
) -> tuple[str, dict[str, dict[str, Any]]]:
  """The best candidate that is inside the budget in a process of its own, too."""
  file = path / "checked.json"
  checked: dict[str, dict[str, Any]] = measured_before(file, [])
  for name in sorted(students, key=lambda name: _rank(found.rows[_best_row(found, name)], job)):
    if name not in checked:
      folder = path / "checked"
      model = found.students(_best_row(found, name)).instance(0)
      export.save_student(
        folder,
        model,
        stored=job.data.stored,
        normalize=job.data.normalize,
        outputs=job.run.outputs,
      )
      checked[name] = _budget.measure_in_process(folder, within)
      runs.write_json(file, checked)
    if within.inside(checked[name]):
      return name, checked
  raise BudgetError(_nothing_fits(within, checked, path))


def _rank(row: Row, job: Job) -> tuple[int, float]:
  """Farther trained first, then better."""
  mean = float(np.mean(job.choice.score(row)))
  return -row.step, -mean if math.isfinite(mean) else math.inf


def _best_row(found: Result, name: str) -> int:
  """A candidate's best point, of those that went farthest."""
  mine = [i for i, row in enumerate(found.rows) if row.values["student"] == name]

  def key(i: int) -> tuple[int, float]:
    mean = float(np.mean(found.choice.score(found.rows[i])))
    return found.rows[i].step, mean if math.isfinite(mean) else -math.inf

  return max(mine, key=key)


def _candidate(
  name: str, costs: Mapping[str, Any], found: Result | None, checked: dict[str, Any] | None
) -> Candidate:
  row = None if found is None else found.rows[_best_row(found, name)]
  return Candidate(name=name, costs=dict(costs), row=row, checked=checked)


def _costs_before(path: pathlib.Path, now: Affordable) -> Affordable:
  """The costs that the folder was begun with: a second measurement might choose otherwise."""
  file, batch_size = path / "costs.json", now.within.batch_size
  found = measured_before(file, ["batch_size", "costs"])
  same = found and found["batch_size"] == batch_size
  if same and set(found["costs"]) == set(now.candidates):
    return dataclasses.replace(now, costs={name: found["costs"][name] for name in now.candidates})
  runs.write_json(file, {"batch_size": batch_size, "costs": now.costs})
  return now


def _nothing_fits(
  within: Budget, costs: Mapping[str, Mapping[str, Any]], folder: pathlib.Path | None = None
) -> str:
  name = _budget.nearest_to_budget(within, costs)
  over = [n for n, share in within.shares(costs[name]).items() if share > 1]
  has = ", ".join(f"{plain(costs[name][n])} {_budget.UNITS[n]}" for n in over)
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


@dataclasses.dataclass(frozen=True)
class Job:
  """What the stages have in common."""

  teacher: Teacher
  data: Source
  optimizer: Optimizer
  steps: int
  choice: Choice
  run: train.Run
  objective: Any
  points: list[Point]
  seeds: list[tuple[int, int]]
  teacher_run: Any

  def claim(self, candidates: Affordable, gap: float) -> pathlib.Path:
    """The search's folder."""
    if self.run.folder is None:
      raise ValueError("run has no folder, and compress keeps what it measures and trains in one.")
    # The stages' own folders say what they compute; costs and qualities are of these alone.
    about = {"budget": dataclasses.asdict(candidates.within), "gap": gap}
    about["candidates"] = list(candidates.candidates)
    about["data"] = train.described_data([self.data])
    about["teacher"] = runs.fingerprint(self.teacher.variables)
    return runs.claim(
      _check.folder("folder", self.run.folder), {**(self.run.config or {}), **about}
    )

  def stage(self, folder: pathlib.Path, config: Mapping[str, Any] | None = None) -> train.Run:
    """Where a stage is kept; it shows itself where the search does."""
    progress = None if self.run.label("compress") is None else folder.name
    every = self.run.checkpoint_every
    return train.Run(
      folder,
      config=config,
      checkpoint_every=every,
      progress=progress,
      outputs=self.run.outputs,
      trackers=self.run.trackers,
    )

  def student_at(self, network: Network, point: Point, objective: Any = None) -> OneStudent:
    """A point as `train.fit` takes it."""
    objective = self.objective if objective is None else objective
    made = one_student(point, network, objective, self.optimizer, self.steps)
    if made.objective.deployed is not None:
      raise ValueError(
        "the objective deploys another network than the candidates (as simkd does), and what was "
        "measured would not be what is deployed; take a recipe that deploys the student itself."
      )
    return made

  def teacher_row(self, path: pathlib.Path, within: Budget) -> dict[str, Any]:
    """What the teacher costs and how good it is, on validation."""
    file, data = path / "teacher.json", self.data
    costs = measured_before(file, ["bytes"]) or _budget.measure_network(
      self.teacher, data.stored, normalize=data.normalize, batch_size=within.batch_size
    )
    runs.write_json(file, costs)
    quality = self.teacher_quality
    return {**costs, **{name: float(value) for name, value in quality.items()}}

  @functools.cached_property
  def teacher_quality(self) -> dict[str, np.ndarray]:
    """The teacher on validation."""
    return self.validated(self.teacher)

  def validated(self, model: Model | Teacher) -> dict[str, np.ndarray]:
    """Some students on validation, ``[S]`` each, or the teacher: what could be measured."""
    task = self.choice.of
    found = evaluation.evaluate(model, self.choice.validation, task=task)
    return {name: found[name] for name in task.metrics if name in found}

  def preflight(
    self,
    student: Network,
    point: Point,
    folder: pathlib.Path,
    baseline: Model | None = None,
    known: Sequence[findings.Finding] = (),
  ) -> list[findings.Finding]:
    """The pre-flight checks, with the baseline once there is one; warns of what is not `known`."""
    found = _preflight.preflight(
      student,
      self.student_at(student, _without_student(point)).objective,
      data=self.data,
      steps=self.steps,
      teacher=self.teacher,
      teacher_run=self.teacher_run,
      validation=self.choice.validation,
      task=self.choice.of,
      baseline=baseline,
      folder=folder,
      warn=False,
    )
    before = {finding.check for finding in known}
    for finding in found:
      if finding.check not in before:
        warnings.warn(f"{finding.check}: {finding}", findings.PreflightWarning, stacklevel=3)
    return found

  def swept(
    self,
    student: Any,
    objective: Any,
    points: Sequence[Point],
    folder: pathlib.Path,
    *,
    teacher: Teacher | None,
    halving: Halving | None = None,
  ) -> Result:
    """A sweep with what all of them have in common."""
    return _sweep.sweep(
      student,
      objective,
      points=points,
      data=self.data,
      optimizer=self.optimizer,
      steps=self.steps,
      seeds=self.seeds,
      teacher=teacher,
      choice=dataclasses.replace(self.choice, halving=halving, retrain=None),
      run=self.stage(folder),
    )

  def search(self, students: Mapping[str, Network], folder: pathlib.Path) -> Result:
    """Every point for every candidate, halved together."""
    points = [{"student": name, **point} for name in students for point in self.points]
    halving = self.choice.halving
    return self.swept(
      students, self.objective, points, folder, teacher=self.teacher, halving=halving
    )

  def fit(
    self,
    network: Network,
    one: OneStudent,
    folder: pathlib.Path,
    seeds: Sequence[Any],
    *,
    teacher: Teacher | None = None,
  ) -> Model:
    """An ordinary run over some seeds."""
    made = train.fit(
      network,
      one.objective,
      data=[dataclasses.replace(self.data, data_seed=data_seed) for _, data_seed in seeds],
      optimizer=one.optimizer,
      steps=self.steps,
      seed=[seed for seed, _ in seeds],
      teacher=teacher,
      watch=train.Watch(
        evaluation.validator(self.choice.validation, task=self.choice.of),
        validate_every=max(self.data.steps_per_epoch, self.steps // 10),
      ),
      run=self.stage(folder, {"optimizer": one.rates}),
    )
    return Model(made.network, made.variables, made.seeds)  # without the state of the training

  def assist(
    self,
    student: Network,
    direct: Row,
    between: Mapping[str, Network],
    gap: float,
    path: pathlib.Path,
  ) -> Assistant | None:
    """Tries a teaching assistant where the student is too far behind its teacher."""
    name, metric = self.choice.of.first, self.choice.of.metric(self.choice.of.first)
    taught = self.teacher_quality.get(name)
    if taught is None or name not in direct.metrics:  # what was not measured says nothing
      return None
    behind = metric.sign * (float(taught) - direct.metrics[name])
    error, least = standard_error(behind), gap if metric.percent else gap * abs(float(taught))
    if float(np.mean(behind)) <= max(least, 2 * error):
      return None
    told: dict[str, Any] = {
      "behind": float(np.mean(behind)),
      "metric": name,
      "percent": metric.percent,
    }
    small, large = (cost.parameters(v) for v in (self.shapes(student), self.teacher.variables))
    sizes = {name: cost.parameters(self.shapes(network)) for name, network in between.items()}
    middle = math.sqrt(small * large)
    usable = [name for name, size in sizes.items() if small < size < large]
    if not usable:
      return Assistant(None, round(middle), row=None, gain=np.zeros(0), helps=False, **told)
    name = min(usable, key=lambda n: abs(math.log(sizes[n] / middle)))
    network, values, objective = between[name], _without_student(direct.values), self.objective
    if direct.status == "dropped":  # the others were passed over for what they cost
      found = self.swept(student, objective, [values], path / "direct", teacher=self.teacher)
      direct = found.rows[0]
    one, seeds = self.student_at(network, values), self.seeds[:1]
    learned = self.fit(network, one, path / "assistant", seeds, teacher=self.teacher).instance(0)
    found = self.swept(
      student, objective, self.points, path / "assisted", teacher=teachers.frozen(learned)
    )
    row = found.rows[found.best]
    gain = self.choice.score(row) - self.choice.score(direct)
    helps = len(gain) > 1 and float(np.mean(gain)) > max(0.0, standard_error(gain))
    return Assistant(name, sizes[name], row=row, gain=gain, helps=helps, model=learned, **told)

  def shapes(self, network: Network) -> PyTree:
    """A network's variables, as shapes."""
    return jax.eval_shape(network.init, example_key(), inputs_of(self.data))

  def final(
    self, network: Network, best: Row, tried: Assistant | None, path: pathlib.Path
  ) -> dict[str, Model]:
    """The chosen network distilled, and on labels alone at the rate that suits it there.

    Without an objective on labels alone it is distilled, and that is all.
    """
    teacher, values, seeds = self.teacher, best.values, self.choice.retrain or ()
    if tried is not None and tried.helps:
      assert tried.model is not None
      assert tried.row is not None
      teacher, values = teachers.frozen(tried.model), tried.row.values
    one = self.student_at(network, _without_student(values))
    distilled = self.fit(network, one, path / "student", seeds, teacher=teacher)
    baseline = self.choice.baseline
    if baseline is None and self.choice.of.classes:
      baseline = labels()
    if baseline is None:
      return {"student": distilled}
    rates = {
      repr(one.rates): one.rates for one in (self.student_at(network, p) for p in self.points)
    }
    alone = list(rates.values())
    if len(alone) > 1:
      alone = [self.swept(network, baseline, alone, path / "labels", teacher=None).chosen]
    one = self.student_at(network, alone[0], baseline)
    return {"student": distilled, "baseline": self.fit(network, one, path / "baseline", seeds)}


def _without_student(values: Mapping[str, Any]) -> dict[str, Any]:
  return {name: value for name, value in values.items() if name != "student"}


def measured_before(path: pathlib.Path, names: Iterable[str]) -> dict[str, Any]:
  """What was measured when a folder was begun: a second measurement might choose otherwise.

  Args:
    path: a JSON file.
    names: what it must have, to be what is asked for.

  Returns:
    What is in it; empty where there is no such file.
  """
  found = runs.read_object(path) if path.is_file() else {}
  return found if set(names) <= set(found) else {}


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One candidate.

  Attributes:
    name: its name.
    costs: from `jaxdistill.search.measure_network`, before any training.
    row: its best point; None where it was over the budget and not trained.
    checked: what it costs in a process of its own; None where that was not asked.
  """

  name: str
  costs: dict[str, Any]
  row: Row | None
  checked: dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class Assistant:
  """A teaching assistant that was tried, or wanted.

  Attributes:
    name: the network's; None where none between student and teacher was given.
    parameters: how many it has, or should have.
    behind: how far the student was behind the teacher in the task's first metric.
    row: the best point of the student that it taught.
    gain: of that student over the one taught directly, ``[S]`` over the search's seeds, positive
      for better.
    helps: whether the mean gain is above its standard error (with one seed it has none, and the
      answer is no); the chosen student then learns from the assistant.
    metric: that metric's name.
    percent: whether it is a share.
    model: the assistant's.
  """

  name: str | None
  parameters: int
  behind: float
  row: Row | None
  gain: np.ndarray
  helps: bool
  metric: str = "accuracy"
  percent: bool = True
  model: Model | None = dataclasses.field(default=None, repr=False)

  def sentence(self) -> str:
    """What came of it."""
    far = f"{100 * self.behind:.1f} points" if self.percent else f"{self.behind:.4g}"
    of = "" if self.metric == "accuracy" else f" in {self.metric}"
    behind = f"The student is {far} behind its teacher{of} on validation"
    if self.name is None:
      return (
        f"{behind}, and no network between them was given: a teaching assistant of about "
        f"{self.parameters:,} parameters might help (assistants=)."
      )
    gain = f"{float(np.mean(self.gain)):+.4f}"
    word = "helped, and teaches the student" if self.helps else "did not help beyond noise"
    if len(self.gain) == 1:
      word = "was tried with one seed, which tells no noise"
    assistant = f"a teaching assistant ({self.name}, {self.parameters:,} parameters)"
    return f"{behind}; {assistant} {word} ({gain})."


@dataclasses.dataclass(frozen=True)
class Compressed:
  """What `jaxdistill.search.compress` returns.

  Attributes:
    budget: the budget.
    candidates: all of them.
    teacher: the teacher's costs, and its metrics on validation.
    chosen: the chosen candidate's name.
    values: the chosen point's values.
    assistant: what came of a teaching assistant; None where none was wanted.
    metric: what was chosen by.
    model: the chosen network and its variables, over the final seeds.
    validation: the metrics of ``student`` and, where there is one, ``baseline`` on validation,
      ``[S]`` each.
    task: what the labels mean.
  """

  budget: Budget
  candidates: list[Candidate]
  teacher: dict[str, Any]
  chosen: str
  values: dict[str, Any]
  assistant: Assistant | None
  metric: str
  model: Model = dataclasses.field(repr=False)
  validation: dict[str, dict[str, np.ndarray]]
  task: tasks.Task = dataclasses.field(default_factory=tasks.classification)

  @property
  def instance(self) -> int:
    """Which of the final students is best on validation."""
    sign = self.task.metric(self.metric).sign
    return int(np.argmax(sign * self.validation["student"][self.metric]))

  @property
  def costs(self) -> dict[str, Any]:
    """What the chosen student costs in a process of its own."""
    checked = self._candidate(self.chosen).checked
    assert checked is not None
    return checked

  def sentence(self) -> str:
    """What was chosen, what it costs, and what distillation adds to it."""
    trained = sum(c.row is not None for c in self.candidates)
    values = ", ".join(f"{n} {v:g}" for n, v in self.values.items() if isinstance(v, int | float))
    used = ", ".join(
      f"{plain(self.costs[name])} of {plain(limit)} {UNITS[name]}"
      for name, limit in self.budget.limits().items()
    )
    alone = self.validation.get("baseline")
    beside = {
      name: "" if alone is None else f"{_of(alone, name)} on labels alone and "
      for name in self._shown()
    }
    quality = "; ".join(
      f"{name} {_of(self.validation['student'], name)} against {beside[name]}"
      f"{_of(self.teacher, name)} of the teacher"
      for name in self._shown()
    )
    text = (
      f"Chosen: {self.chosen} ({values}), of {len(self.candidates)} candidates, {trained} of them "
      f"inside the budget. It uses {used}, measured in a process of its own. On validation, "
      f"{quality} (mean ± std over {len(self.validation['student'][self.metric])} seeds)."
    )
    return text if self.assistant is None else f"{text} {self.assistant.sentence()}"

  def front(self, over: str = "latency_ms") -> list[str]:
    """The candidates trained to the end that no other beats in both a cost and the first metric.

    Args:
      over: the cost.

    Returns:
      Their names, by increasing cost.
    """
    first = self.task.first
    sign = self.task.metric(first).sign
    trained = {
      c.name: (c.costs[over], sign * float(np.mean(c.row.metrics[first])))
      for c in self.candidates
      if c.row is not None and c.row.status == "finished" and first in c.row.metrics
    }
    finite = {name: found for name, found in trained.items() if np.isfinite(found[1])}

    def beaten(name: str) -> bool:
      time, value = finite[name]
      return any(
        t <= time and v >= value and (t, v) != (time, value)
        for other, (t, v) in finite.items()
        if other != name
      )

    return sorted((n for n in finite if not beaten(n)), key=lambda n: finite[n][0])

  def table(self) -> str:
    """The candidates as a Markdown table, the teacher's row first, and the sentence.

    Metrics are those on validation, of each candidate's best point as far as it was trained.
    """
    shown, timed = self._shown(), f"ms at batch {self.budget.batch_size}"
    lines = [["", "parameters", "bytes", "FLOPs", timed, *shown, ""]]
    costs = [plain(self.teacher[n]) for n in ("parameters", "bytes", "flops", "latency_ms")]
    values = [_of(self.teacher, name) for name in shown]
    lines.append(["teacher", *costs, *values, ""])
    for candidate in self.candidates:
      costs = [plain(candidate.costs[n]) for n in ("parameters", "bytes", "flops", "latency_ms")]
      row = candidate.row
      values = ["" if row is None else _of(row.metrics, name) for name in shown]
      lines.append([candidate.name, *costs, *values, self._fate(candidate)])
    return "\n".join([grid(lines), "", self.sentence()])

  def write(self, folder: pathlib.Path) -> None:
    """Writes ``candidates.md``, ``candidates.csv``, ``budget.json`` and ``frontier.png``.

    A limit other than latency has a picture of its own, ``frontier-bytes.png``.

    Args:
      folder: where.
    """
    runs.write_text(folder / "candidates.md", self.table() + "\n")
    runs.write_text(folder / "candidates.csv", self._csv())
    found = {
      "budget": dataclasses.asdict(self.budget),
      "chosen": self.chosen,
      "values": self.values,
      "costs": self.costs,
      "inside": self.budget.inside(self.costs),
      "instance": self.instance,
      "metric": self.metric,
      "validation": self.validation,
      "teacher": self.teacher,
      "assistant": None if self.assistant is None else self.assistant.sentence(),
      "sentence": self.sentence(),
    }
    runs.write_json(folder / "budget.json", found)
    self.picture(folder / "frontier.png")
    for name in set(self.budget.limits()) - {"latency_ms"}:
      self.picture(folder / f"frontier-{name}.png", name)

  def picture(self, path: pathlib.Path | None, over: str = "latency_ms") -> Any:
    """Draws the first metric over a cost: candidates, the front of the trained ones, the budget.

    Args:
      path: of the PNG; None writes none.
      over: ``latency_ms``, ``bytes``, ``flops`` or ``parameters``.

    Returns:
      The figure, Matplotlib's.
    """
    first = self.task.first
    scale = 100 if self.task.metric(first).percent else 1
    points: dict[str, tuple[float, float, float | None]]
    points = {"teacher": (self.teacher[over], scale * self.teacher.get(first, math.nan), None)}
    for candidate in self.candidates:
      if candidate.row is not None:
        values = scale * candidate.row.metrics.get(first, np.array([math.nan]))
        whole = np.all(np.isfinite(values))
        mean, std = metrics.mean_std(values) if whole else (math.nan, None)
        points[candidate.name] = (candidate.costs[over], mean, std)
    return figures.frontier(
      path,
      points,
      front=self.front(over),
      chosen=self.chosen,
      hollow=[c.name for c in self.candidates if c.row is not None and c.row.status == "dropped"],
      limit=self.budget.limits().get(over),
      xlabel=over.replace("_ms", f" of a batch of {self.budget.batch_size} (ms)"),
      ylabel=f"validation {first}{' (%)' if scale == 100 else ''}",
      title=f"Candidates within {self.budget.describe()}",
    )

  def _candidate(self, name: str) -> Candidate:
    return next(candidate for candidate in self.candidates if candidate.name == name)

  def _shown(self) -> list[str]:
    """The metric that was chosen by, and the task's first."""
    return list(dict.fromkeys([self.metric, self.task.first]))

  def _fate(self, candidate: Candidate) -> str:
    if candidate.name == self.chosen:
      return Markup("**chosen**")
    if candidate.row is None:
      return f"over the budget: {_over(self.budget, candidate.costs)}"
    if candidate.checked is not None:
      return f"over it in a process of its own: {_over(self.budget, candidate.checked)}"
    return f"{candidate.row.status}, step {candidate.row.step}"

  def _csv(self) -> str:
    known = list(self.task.metrics)
    lines: list[list[Any]] = [["candidate", *UNITS, "seed", *known, "step", "fate"]]
    for candidate in self.candidates:
      costs = [candidate.costs[name] for name in UNITS]
      fate = self._fate(candidate).strip("*")
      row = candidate.row
      if row is None:
        lines.append([candidate.name, *costs, *[""] * (len(known) + 2), fate])
        continue
      for s in range(len(row.metrics[self.metric])):
        values = [float(row.metrics[name][s]) if name in row.metrics else "" for name in known]
        lines.append([candidate.name, *costs, s, *values, row.step, fate])
    return csv_text(lines)


def _over(budget: Budget, costs: dict[str, Any]) -> str:
  over = {name: share for name, share in budget.shares(costs).items() if share > 1}
  return ", ".join(f"{name.removesuffix('_ms')} {share:.3g} times" for name, share in over.items())


def _of(found: Mapping[str, Any], name: str) -> str:
  """A metric of some students, or of the teacher; that it was not measured, where it was not."""
  if name not in found:
    return "not measured"
  return _spread(found[name]) if np.ndim(found[name]) else f"{found[name]:.4f}"


def _spread(values: np.ndarray) -> str:
  whole = np.all(np.isfinite(values))
  return with_std(*metrics.mean_std(values), 4) if whole else "not finite"
