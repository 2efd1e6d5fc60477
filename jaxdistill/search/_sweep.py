"""Many students in one compiled program: the search for temperature, weights and rates.

The students of one ``data_seed`` share every batch and one teacher pass, side by side under
``vmap``; where nothing is augmented, the teacher is run once for the whole sweep. The step is the
one that `jaxdistill.train.fit` runs: every student equals the one trained alone with its values.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxdistill import _check, _compile, _extras, evaluation, runs, train
from jaxdistill.data import Source
from jaxdistill.runs import fingerprint
from jaxdistill.search._choice import METRICS, Result, best_of, score
from jaxdistill.search._grid import Group, Point, grouped, seed_pairs
from jaxdistill.search._shared_teacher import share_teacher
from jaxdistill.search._side_by_side import UNROLLED, at_once, example_key, inputs_of, students_by
from jaxdistill.search._trials import Found, Search
from jaxdistill.train import (
  Optimizer,
  Program,
  Values,
  build_program,
  check_functions,
  check_networks,
  claimed_folder,
  run_identity,
  stop_signal,
)
from jaxdistill.types import Batch, Network, Objective, ObjectiveFunction, Teacher, Transform

__all__ = ["Halving", "sweep"]

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Halving:
  """Successive halving: after each rung the best 1/factor of the points go on.

  Jamieson, Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization",
  2016; 3 is the factor of Li et al., "Hyperband", 2018. A rung has ``factor`` times the steps of
  the one before it, the last one all of them; schedules run over all of them throughout.

  Attributes:
    factor: of points and of steps.
    rungs: how many there are, the last included.
  """

  factor: int = 3
  rungs: int = 3

  def __post_init__(self) -> None:
    _check.whole("factor", self.factor, least=2)
    _check.whole("rungs", self.rungs)

  def until(self, rung: int, steps: int) -> int:
    """The step at which a rung ends, of so many in all."""
    return math.ceil(steps / self.factor ** (self.rungs - 1 - rung))


def sweep(
  student: Network | Mapping[str, Network],
  objective: Objective | ObjectiveFunction | Callable[..., Objective | ObjectiveFunction],
  *,
  points: Sequence[Point],
  data: Source | Callable[[int], Source],
  optimizer: Optimizer,
  steps: int,
  validation: Batch,
  seeds: Sequence[int] | Sequence[tuple[int, int]] = (0,),
  teacher: Teacher | None = None,
  teacher_variables: PyTree = None,
  hyper: Mapping[str, Any] | None = None,
  start: Mapping[str, Any] | None = None,
  objective_start: tuple[PyTree, PyTree] | None = None,
  transform: Transform | None = None,
  accumulate: int = 1,
  average: float | None = None,
  metric: str = "accuracy",
  test: Batch | None = None,
  retrain: Sequence[int] | Sequence[tuple[int, int]] | None = None,
  halving: Halving | None = None,
  memory: int | None = None,
  by: str | None = None,
  devices: Sequence[jax.Device] | None = None,
  folder: str | os.PathLike[str] | None = None,
  config: Mapping[str, Any] | None = None,
  checkpoint_every: int | None = None,
  progress: str | None = "sweep",
) -> Result:
  """Trains a student for every point and seed, and chooses the point that validates best.

  Numbers of a point vary inside one compiled program: those of the objective's keywords (``hyper``)
  and of the optimizer, where it is a function of them. Everything else (a layer's name, a switch,
  None) makes a program of its own, for which a recipe is called: ``run(student, recipes.kd,
  points=product(temperature=range(1, 21), soft_weight=[0.5, 0.9]), ...)``.

  As many points as fit the memory are trained at once, shared out over the devices. Where the data
  are not augmented, the teacher's outputs are computed once. A student that is no longer finite is
  marked, and the others go on. A sweep that was stopped goes on from what its folder holds.

  Args:
    student: the network to train; or several by name, and each point names one:
      ``points=product(student=["small", "large"], temperature=[1, 4])``.
    objective: an objective, or a recipe: a function of keywords that returns one.
    points: dicts with the same keywords, see `product`.
    data: where batches come from; each seed gets it with its own ``data_seed``. Or a function
      ``data_seed -> Source``, e.g. of cached sources with augmentation.
    optimizer: an optax optimiser, or a function of keywords (learning_rate, weight_decay) that
      returns one.
    steps: how many steps a student is trained for.
    validation: the split to choose on, from `jaxdistill.data.evaluation_batches`; never the test
      split.
    seeds: each point is trained from each of them; a number fixes initialisation and data order, a
      pair ``(seed, data_seed)`` one each.
    teacher: ``(variables, batch) -> Outputs``; None for objectives without one, and where batches
      bring its outputs along (`teachers.cached`).
    teacher_variables: its variables.
    hyper: keywords of the objective that all points share: numbers or schedules.
    start: as in `jaxdistill.train.fit`, for all students.
    objective_start: likewise.
    transform: as in `jaxdistill.train.fit`; each student gets its own, as alone.
    accumulate: as in `jaxdistill.train.fit`.
    average: as in `jaxdistill.train.fit`.
    metric: the validation metric to choose by: accuracy, nll or ece (lower is better for these).
    test: the test split; read once, for the chosen point alone.
    retrain: seeds from which the chosen point is trained anew before it is tested; by default its
      students are taken as they are. A few seeds that won are better than their point is.
    halving: to drop hopeless points early; None trains all of them to the end.
    memory: bytes that a program may take on a device; what is available by default.
    by: ``"vmap"`` or ``"unroll"``; `students_by` decides by default.
    devices: over which the points are shared out; all of them by default.
    folder: the sweep's folder: ``table.md``, ``table.csv``, ``chosen.json``, ``sweep.png``, and
      the students' checkpoints.
    config: what else defines the sweep, for ``config.json``.
    checkpoint_every: steps between checkpoints of the students in training; about a tenth of the
      run, but at least a thousand steps, by default.
    progress: the label of the progress, a bar in a terminal and lines elsewhere; None for silence.

  Returns:
    The `Result`.

  Raises:
    TypeError: an argument is of another kind than it must be.
    ValueError: a keyword is nobody's, a value does not fit, no point fits the memory, or the folder
      holds another sweep.
    FloatingPointError: no point stayed finite.
    jaxdistill.train.Stopped: the process was asked to stop.
  """
  if folder is not None:
    _extras.need("search.sweep(folder=...), which draws a picture,", "matplotlib")
  groups = grouped(points, student, objective, optimizer, hyper, steps)
  pairs = seed_pairs(seeds)
  again = [] if retrain is None else seed_pairs(retrain)
  _check.whole("steps", steps)
  if metric not in METRICS:
    raise ValueError(f"metric={metric!r} is not among {sorted(METRICS)}; name one of these.")
  check_networks(groups[0].student, teacher, teacher_variables, start)
  if start is not None and len({id(group.student) for group in groups}) > 1:
    raise ValueError("start holds the variables of one network, and the points have several.")
  check_functions(
    transform=transform, validate=None, callback=None, config=config, select="accuracy"
  )
  first = data(pairs[0][1]) if callable(data) else data
  if not isinstance(first, Source):
    raise TypeError(f"data must be a Source or make one, got {_check.show(first)}.")
  settings = {
    **(config or {}),
    **_described(first, student),
    "points": list(points),
    "seeds": pairs,
    "retrain": again,
    "steps": steps,
    "halving": None if halving is None else dataclasses.asdict(halving),
    "metric": metric,
    "teacher": None if teacher is None else fingerprint(teacher_variables),
    "hyper": sorted(hyper or {}),
    "accumulate": accumulate,
    "average": average,
    "start": None
    if start is None and objective_start is None
    else fingerprint((start, objective_start)),
  }
  mesh = train.data_parallel(devices)
  job = _Job(
    data=data,
    optimizer=optimizer,
    steps=steps,
    teacher=teacher,
    teacher_variables=jax.device_put(teacher_variables),  # once, and not wherever it is read
    validation=validation,
    memory=_compile.available(list(mesh.devices.flat)) if memory is None else memory,
    by=by,
    mesh=mesh,
    save_every=checkpoint_every,
    progress=progress,
    options={
      "hyper": dict(hyper or {}),
      "start": start,
      "objective_start": objective_start,
      "transform": transform,
      "accumulate": accumulate,
      "average": average,
    },
  )
  with contextlib.ExitStack() as stack:
    path = None if folder is None else stack.enter_context(claimed_folder(folder, settings))
    asked = stack.enter_context(stop_signal(listening=path is not None))
    found = job.train(groups, points, pairs, path, asked, metric, halving)
    rows = [found[i].row for i in range(len(points))]
    best, ties = best_of(rows, metric)
    group = next(group for group in groups if best in group.indices)
    winners, final = found[best], pairs
    if again:
      below = None if path is None else path / "retrained"
      winners = job.train([_alone(group, best)], points, again, below, asked, metric, None)[best]
      final = again
    network = _deployed(group)
    result = Result(
      rows=rows,
      seeds=pairs,
      metric=metric,
      best=best,
      ties=ties,
      network=network,
      variables=winners.variables(),
      students=lambda index: found[index].variables(),
      final_seeds=final,
      test=None if test is None else _tested(network, winners.variables(), test),
    )
    if path is not None:
      result.write(path)
      runs.say_saved(progress, path)
  return result


@dataclasses.dataclass(frozen=True)
class _Job:
  """What all students of a sweep have in common."""

  data: Source | Callable[[int], Source]
  optimizer: Optimizer
  steps: int
  teacher: Teacher | None
  teacher_variables: PyTree
  validation: Batch
  memory: int
  by: str | None
  mesh: jax.sharding.Mesh
  save_every: int | None
  progress: str | None
  options: dict[str, Any]

  def train(
    self,
    groups: list[Group],
    points: Sequence[Point],
    pairs: list[tuple[int, int]],
    folder: pathlib.Path | None,
    asked_to_stop: Callable[[int], bool],
    metric: str,
    halving: Halving | None,
  ) -> dict[int, Found]:
    """Trains the groups' points from every pair of seeds."""
    teacher, variables, sources = self.taught(groups, pairs)
    halving = Halving(rungs=1) if halving is None else halving
    dispatch = train.with_students(self.mesh)
    length = _length(self.steps, halving.until(0, self.steps))

    ways = {
      id(group.student): self.by or students_by(group.student, inputs_of(sources[0]))
      for group in groups
    }

    def program_of(group: Group, values: Values, count: int) -> Program:
      by = ways[id(group.student)]
      return build_program(
        group.student,
        group.objective,
        sources * count,
        self.optimizer,
        [seed for seed, _ in pairs] * count,
        teacher,
        variables,
        dispatch,
        values=values,
        seeds_by=by,
        # A teacher in the step is run once for all that are side by side.
        at_once=at_once(group.student, sources[0]) if teacher is None else None,
        scan=by == "vmap",
        **self.options,
      )

    search = Search(
      groups=groups,
      values=[dict(point) for point in points],
      seeds=len(pairs),
      steps=self.steps,
      length=length,
      save_every=length * math.ceil(max(1000, self.steps // 10) / length)
      if self.save_every is None
      else self.save_every,
      build=program_of,
      deployed=_deployed,
      validation=self.validation,
      memory=self.memory,
      devices=self.mesh.devices.size,
      most=lambda group: len(points) if ways[id(group.student)] == "vmap" else UNROLLED,
      dispatch=dispatch,
      folder=folder,
      asked_to_stop=asked_to_stop,
      progress=self.progress,
    )
    return _rungs(search, self.steps, metric, halving)

  def taught(
    self, groups: list[Group], pairs: list[tuple[int, int]]
  ) -> tuple[Teacher | None, PyTree, list[Source]]:
    """The teacher and the sources; or sources that bring its outputs along."""
    data = self.data
    sources = [
      data(d) if callable(data) else dataclasses.replace(data, data_seed=d) for _, d in pairs
    ]
    if self.teacher is not None and self.options["transform"] is None:
      learners = [(group.student, group.objective) for group in groups]
      # A quarter of the memory, so that the students get the most of it.
      kept = share_teacher(
        learners, self.teacher, self.teacher_variables, sources, self.memory // 4
      )
      if kept is not None:
        return None, None, kept
    return self.teacher, self.teacher_variables, sources


def _rungs(search: Search, steps: int, metric: str, halving: Halving) -> dict[int, Found]:
  """Trains all points, rung by rung, and drops those that are behind."""
  alive = sorted(index for group in search.groups for index in group.indices)
  points, found, before = len(alive), dict[int, Found](), dict[int, Found]()
  for rung in range(halving.rungs):
    last = rung == halving.rungs - 1
    until = halving.until(rung, steps)
    until = min(steps, search.length * math.ceil(until / search.length))
    before = search.rung(rung, until, alive, before, keep=not last)
    found |= before
    if last:
      break
    finished = [i for i in alive if found[i].row.status == "finished"]
    if not finished:
      break
    finished.sort(key=lambda i: (-float(np.mean(score(found[i].row, metric))), i))
    alive = sorted(finished[: math.ceil(points / halving.factor ** (rung + 1))])
    for i in set(finished) - set(alive):
      row = dataclasses.replace(found[i].row, status="dropped")
      found[i] = dataclasses.replace(found[i], row=row)
  return found


def _alone(group: Group, index: int) -> Group:
  """One point of a group."""
  row = group.indices.index(index)
  hyper, rates = (
    {name: values[row : row + 1] for name, values in given.items()}
    for given in (group.hyper, group.optimizer)
  )
  return dataclasses.replace(group, indices=[index], hyper=hyper, optimizer=rates)


def _tested(network: Network, variables: PyTree, test: Batch) -> dict[str, np.ndarray]:
  found = evaluation.evaluate(evaluation.predictor(network), variables, test, stacked=True)
  return {name: found[name] for name in ("accuracy", "nll", "ece")}


def _deployed(group: Group) -> Network:
  student, deployed = group.student, group.objective.deployed
  return student if deployed is None else deployed.network(student)


def _described(source: Source, student: Network | Mapping[str, Network]) -> dict[str, Any]:
  """The data and the students, as ``config.json`` holds them."""

  def described(network: Network) -> dict[str, Any]:
    variables = jax.eval_shape(network.init, example_key(), inputs_of(source))
    return run_identity(source, network.name, variables["params"])

  if isinstance(student, Network):
    return described(student)
  every = {name: described(network) for name, network in student.items()}
  data = next(iter(every.values()))["data"]
  return {"data": data, "students": {name: found["student"] for name, found in every.items()}}


def _length(steps: int, most: int) -> int:
  """Steps of one dispatch: a divisor of all where there is a long one, so that one is compiled."""
  most = min(steps, most, 250)
  divisor = max(n for n in range(1, most + 1) if steps % n == 0)
  return divisor if 4 * divisor >= most else most
