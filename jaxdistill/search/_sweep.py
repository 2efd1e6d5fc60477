"""Many students in one compiled program: the search for temperature, weights and rates.

The students of one ``data_seed`` share every batch and one teacher pass, side by side under
``vmap``; where nothing is augmented, the teacher is run once for the whole sweep. The step is the
one that `jaxdistill.train.fit` runs: every student equals the one trained alone with its values.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxdistill import _check, _compile, _extras, evaluation, runs, teachers, train
from jaxdistill.data import Source
from jaxdistill.search._choice import Choice, Halving, Result, Row, best_of, measured
from jaxdistill.search._grid import Group, Point, Student, grouped, seed_pairs
from jaxdistill.search._trials import Found, Search
from jaxdistill.train import (
  UNROLLED,
  Optimizer,
  Plan,
  Program,
  Run,
  Values,
  at_once,
  claimed_folder,
  example_key,
  inputs_of,
  share_teacher,
  stop_signal,
  students_by,
)
from jaxdistill.types import Model, Network, Objective, ObjectiveFunction, Teacher

__all__ = ["Execution", "Training", "identity", "sweep", "training"]

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Execution:
  """How a sweep is carried out, whatever it finds.

  Attributes:
    devices: over which the points are shared out; all of them by default.
    memory: bytes that a program may take on a device; what is available by default.
    by: ``"vmap"`` or ``"unroll"``; `students_by` decides by default.
    accumulate: into how many micro-batches each batch is cut, to need less memory; the limits are
      those of `jaxdistill.train.with_jit`.
    tokens_at_once: how many tokens' logits there are at any time, likewise: the teacher's once for
      all students that share its batch, and the students' one student after another.

  Raises:
    TypeError: an attribute is of another kind than it must be.
    ValueError: one is out of range.
  """

  devices: Sequence[jax.Device] | None = None
  memory: int | None = None
  by: str | None = None
  accumulate: int = 1
  tokens_at_once: int | None = None

  def __post_init__(self) -> None:
    _check.whole("accumulate", self.accumulate)
    if self.tokens_at_once is not None:
      _check.whole("tokens_at_once", self.tokens_at_once)
    if self.memory is not None:
      _check.whole("memory", self.memory)
    if self.by not in (None, "vmap", "unroll"):
      raise ValueError(f"by={self.by!r} must be 'vmap' or 'unroll', or None.")


def sweep(
  student: Student | Mapping[str, Student],
  objective: Objective | ObjectiveFunction | Callable[..., Objective | ObjectiveFunction],
  *,
  points: Sequence[Point],
  data: Source | Callable[[int], Source],
  optimizer: Optimizer,
  steps: int,
  choice: Choice,
  seeds: Sequence[int] | Sequence[tuple[int, int]] = (0,),
  teacher: Teacher | None = None,
  average: float | None = None,
  execution: Execution | None = None,
  run: Run | str | os.PathLike[str] | None = None,
) -> Result:
  """Trains a student for every point and seed, and chooses the point that validates best.

  Numbers of a point vary inside one compiled program: those of the objective's keywords and of the
  optimizer, where it is a function of them. Everything else (a layer's name, a switch, None) makes
  a program of its own, for which a recipe is called: ``sweep(student, recipes.kd,
  points=product(temperature=range(1, 21), soft_weight=[0.5, 0.9]), ...)``. Keywords that all points
  share are the objective's own, or ``functools.partial(recipes.kd, hard_weight=schedule)``.

  As many points as fit the memory are trained at once, shared out over the devices. Where the data
  are not augmented, the teacher's outputs are computed once. A student that is no longer finite is
  marked, and the others go on. A sweep that was stopped goes on from what its folder holds.

  Args:
    student: the network to train, or a model to start from (of one seed, or of as many as the sweep
      trains from); or several by name, and each point names one:
      ``points=product(student=["small", "large"], temperature=[1, 4])``.
    objective: an objective, or a recipe: a function of keywords that returns one.
    points: dicts with the same keywords, see `product`.
    data: where batches come from; each seed gets it with its own ``data_seed``. Or a function
      ``data_seed -> Source``, e.g. of cached sources with augmentation.
    optimizer: an optax optimiser, or a function of keywords (learning_rate, weight_decay) that
      returns one.
    steps: how many steps a student is trained for.
    choice: the split to choose on, by which metric, and what is done with what was chosen.
    seeds: each point is trained from each of them; a number fixes initialisation and data order, a
      pair ``(seed, data_seed)`` one each.
    teacher: None for objectives without one, and where batches bring its outputs along
      (`teachers.cached`).
    average: the decay of a moving average of the deployed variables, which is then what is
      validated and returned; None for none.
    execution: over which devices, in how much memory; see `Execution`.
    run: where the sweep is saved; see `jaxdistill.train.Run`. The folder gets ``table.md``,
      ``table.csv``, ``chosen.json``, ``sweep.png``, and the students' checkpoints. A path is the
      folder; None saves nothing.

  Returns:
    The `Result`.

  Raises:
    TypeError: an argument is of another kind than it must be.
    ValueError: a keyword is nobody's, a value does not fit, no point fits the memory, the folder
      holds another sweep, or there are several processes.
    FloatingPointError: no point stayed finite.
    jaxdistill.train.Stopped: the process was asked to stop, or ``stop_after`` is over.
  """
  train.with_students()  # says first that a sweep is of one process
  run, execution = train.check_run(run, "sweep"), Execution() if execution is None else execution
  if run.folder is not None:
    _extras.need("search.sweep(run=folder), which draws a picture,", "matplotlib")
  if not isinstance(choice, Choice):
    raise TypeError(f"choice={_check.show(choice)} must be a search.Choice(validation, ...).")
  groups = [
    dataclasses.replace(
      group,
      objective=train.in_chunks(group.objective, tokens_at_once=execution.tokens_at_once),
    )
    for group in grouped(points, student, objective, optimizer, steps)
  ]
  pairs, again = seed_pairs(seeds), [] if choice.retrain is None else seed_pairs(choice.retrain)
  job = training(
    groups,
    (pairs, again),
    data=data,
    optimizer=optimizer,
    steps=steps,
    teacher=teacher,
    average=average,
    choice=choice,
    execution=execution,
    run=run,
  )
  with contextlib.ExitStack() as stack:
    path = None
    settings: dict[str, Any] = {}
    if run.folder is not None or run.trackers:
      settings = {**identity(job, student, pairs, again), "points": list(points)}
    if run.folder is not None:
      path = stack.enter_context(claimed_folder(run.folder, settings, job.traced(groups, pairs)))
    asked = stack.enter_context(stop_signal(listening=path is not None, after=run.stop_after))
    found = job.train(groups, points, pairs, path, asked, choice.halving)
    result = job.result(
      [found[i].row for i in range(len(points))],
      lambda index: _alone(next(g for g in groups if index in g.indices), index),
      lambda index: found[index].variables(),
      (pairs, again),
      path,
      asked,
    )
    job.conclude(result, path, settings, "sweep")
  return result


def training(
  groups: Sequence[Group],
  seeds: tuple[list[tuple[int, int]], list[tuple[int, int]]],
  *,
  data: Source | Callable[[int], Source],
  optimizer: Optimizer,
  steps: int,
  teacher: Teacher | None,
  average: float | None,
  choice: Choice,
  execution: Execution,
  run: Run,
) -> Training:
  """How the groups' points are trained, of the arguments of a search, which are checked here.

  Args:
    groups: the points by program.
    seeds: those of the search, and those that what was chosen is trained anew from.
    data: as `sweep` takes it.
    optimizer: likewise.
    steps: likewise.
    teacher: likewise.
    average: likewise.
    choice: likewise.
    execution: likewise.
    run: likewise.

  Raises:
    TypeError: an argument is of another kind than it must be.
    ValueError: one does not fit.
  """
  for group in groups:
    _check_start(group.student, *seeds)
  plan = Plan.of(
    groups[0].network,
    groups[0].objective,
    data=data(seeds[0][0][1]) if callable(data) else data,
    optimizer=optimizer,
    steps=steps,
    teacher=teacher,
    accumulate=execution.accumulate,
    average=average,
  )
  # Put on the device once, and not wherever it is read.
  plan = dataclasses.replace(plan, teacher=jax.device_put(plan.teacher))
  return Training(plan, data, choice, execution, run, train.data_parallel(execution.devices))


def _check_start(
  student: Student, pairs: Sequence[tuple[int, int]], again: Sequence[tuple[int, int]]
) -> None:
  """Raises where a student is none, or has beginnings for another number of seeds."""
  train.check_student(student)
  counts = {len(some) for some in (pairs, again) if some}
  if isinstance(student, Model) and student.seeds is not None and counts != {student.seeds}:
    raise ValueError(
      f"student holds the variables of {student.seeds} seeds, and the sweep trains from "
      f"{sorted(counts)}: give as many seeds, or one of model.unstack()."
    )


@dataclasses.dataclass(frozen=True)
class Training:
  """How a search's points are trained: what all its students have in common.

  Attributes:
    plan: what they are, one of them.
    data: where batches come from; or a function ``data_seed -> Source``.
    choice: by what one is chosen.
    execution: over which devices, in how much memory.
    run: where it is saved.
    mesh: the devices.
  """

  plan: Plan
  data: Source | Callable[[int], Source]
  choice: Choice
  execution: Execution
  run: Run
  mesh: jax.sharding.Mesh

  @functools.cached_property
  def memory(self) -> int:
    """Bytes that a program may take on a device."""
    given = self.execution.memory
    return _compile.available(list(self.mesh.devices.flat)) if given is None else given

  def plan_of(self, group: Group) -> Plan:
    """What a group's students are, one of them."""
    return dataclasses.replace(self.plan, student=group.network, objective=group.objective)

  def traced(self, groups: list[Group], pairs: list[tuple[int, int]]) -> dict[str, runs.Traced]:
    """What each group's students compute, whatever the numbers in which its points differ."""
    found: dict[str, runs.Traced] = {}
    for group in groups:
      one, seeds = _alone(group, group.indices[0]), [seed for seed, _ in pairs]
      values = {
        kind: {name: np.repeat(value, len(seeds), 0) for name, value in given.items()}
        for kind, given in (("hyper", one.hyper), ("optimizer", one.optimizer))
      }
      plan = dataclasses.replace(
        self.plan_of(group),
        start=group.start,
        sources=self.plan.sources * len(seeds),
        seeds=seeds,
        stacked=True,
      )
      dispatch = train.with_students(self.mesh, seeds_by="vmap", scan=True)
      made = train.traced(plan, Program(plan, dispatch, longest=1, values=values))
      of = f" of points {group.indices}" if len(groups) > 1 else ""
      found |= {f"{name}{of}": one for name, one in made.items()}
    return found

  def train(
    self,
    groups: list[Group],
    points: Sequence[Point],
    pairs: list[tuple[int, int]],
    folder: pathlib.Path | None,
    asked_to_stop: Callable[[int], int],
    halving: Halving | None = None,
  ) -> dict[int, Found]:
    """Trains the groups' points from every pair of seeds."""
    halving, steps = Halving(rungs=1) if halving is None else halving, self.plan.steps
    search = self.search(groups, points, pairs, folder, asked_to_stop, halving.until(0, steps))
    return _rungs(search, steps, self.choice, halving)

  def search(
    self,
    groups: list[Group],
    points: Sequence[Point],
    pairs: list[tuple[int, int]],
    folder: pathlib.Path | None,
    asked_to_stop: Callable[[int], int],
    most: int,
  ) -> Search:
    """The groups' programs, and where their students are kept; nothing is trained yet.

    Args:
      groups: the points by program.
      points: their values.
      pairs: of seeds, each point is trained from all of them.
      folder: where students are kept; None for memory.
      asked_to_stop: ``step -> the signal that asks to save and leave``, 0 for none.
      most: the most steps of one dispatch.
    """
    teacher, sources = self.taught(groups, pairs)
    steps = self.plan.steps
    length = _length(steps, most)
    inputs = inputs_of(sources[0])
    ways = {id(g.network): self.execution.by or students_by(g.network, inputs) for g in groups}

    def program_of(group: Group, values: Values, count: int) -> Program:
      by = ways[id(group.network)]
      plan = dataclasses.replace(
        self.plan_of(group),
        start=group.start_of(count),
        sources=sources * count,
        seeds=[seed for seed, _ in pairs] * count,
        stacked=True,
        teacher=teacher,
      )
      # One after another are those whose convolutions a CPU computes slowly in a loop.
      scan = by == "vmap" or jax.default_backend() != "cpu"
      dispatch = train.with_students(self.mesh, seeds_by=by, scan=scan)
      # A teacher in the step is run once for all that are side by side.
      alone = teacher is None or teachers.decay_of(teacher) is not None
      side_by_side = at_once(group.network, sources[0]) if alone else None
      return Program(plan, dispatch, longest=length, values=values, at_once=side_by_side)

    every = length * math.ceil(max(1000, steps // 10) / length)
    return Search(
      groups=groups,
      values=[dict(point) for point in points],
      seeds=len(pairs),
      steps=steps,
      length=length,
      save_every=self.run.checkpoint_every or every,
      build=program_of,
      validation=self.choice.validation,
      task=self.choice.of,
      memory=self.memory,
      devices=self.mesh.devices.size,
      most=lambda group: len(points) if ways[id(group.network)] == "vmap" else UNROLLED,
      folder=folder,
      asked_to_stop=asked_to_stop,
      progress=self.run.label("sweep"),
      trackers=list(self.run.trackers),
    )

  def conclude(
    self, result: Result, folder: pathlib.Path | None, settings: Mapping[str, Any], what: str
  ) -> None:
    """Writes a search's result, tells the trackers, and says where it is.

    Args:
      result: the search's.
      folder: likewise; None for memory.
      settings: what defines it.
      what: what it is called where nothing else names it.
    """
    label = self.run.label(what)
    runs.track(
      self.run.trackers,
      settings,
      folder=folder,
      name=label or (what if folder is None else folder.name),
      step=self.plan.steps,
      numbers=result.reached(),
      files=[] if folder is None else result.write(folder),
    )
    if folder is not None:
      runs.say_saved(label, folder)

  def result(
    self,
    rows: list[Row],
    group_of: Callable[[int], Group],
    variables: Callable[[int], PyTree],
    seeds: tuple[list[tuple[int, int]], list[tuple[int, int]]],
    folder: pathlib.Path | None,
    asked_to_stop: Callable[[int], int],
  ) -> Result:
    """Chooses a point, trains it anew where that is asked for, and tests it.

    Args:
      rows: what came of the points.
      group_of: ``index -> a point's group``, with that point alone.
      variables: ``index -> the deployed variables``, leaves ``[S, ...]`` over the seeds.
      seeds: those of the search, and those that what was chosen is trained anew from.
      folder: the search's; None for memory.
      asked_to_stop: ``step -> the signal that asks to save and leave``, 0 for none.
    """
    choice, (pairs, again) = self.choice, seeds
    best, ties = best_of(rows, choice.metric, task=choice.task)

    def model(index: int, leaves: PyTree, count: int) -> Model:
      return Model(self.plan_of(group_of(index)).deployed, leaves, count)

    if again:
      below = None if folder is None else folder / "retrained"
      values = [row.values for row in rows]
      anew = self.train([group_of(best)], values, again, below, asked_to_stop)[best]
    chosen = anew.variables() if again else variables(best)
    winner = model(best, chosen, len(again or pairs))
    return Result(
      rows=rows,
      seeds=pairs,
      choice=choice,
      best=best,
      ties=ties,
      model=winner,
      students=lambda index: model(index, variables(index), len(pairs)),
      final_seeds=again or pairs,
      test=None if choice.test is None else _tested(winner, choice),
    )

  def taught(
    self, groups: list[Group], pairs: list[tuple[int, int]]
  ) -> tuple[Teacher | None, list[Source]]:
    """The teacher and the sources; or sources that bring its outputs along."""
    data, teacher = self.data, self.plan.teacher
    sources = [
      data(d) if callable(data) else dataclasses.replace(data, data_seed=d) for _, d in pairs
    ]
    if teacher is not None:
      learners = [(group.network, group.objective) for group in groups]
      # A quarter of the memory, so that the students get the most of it.
      given = self.execution.memory
      most = _compile.quarter("device") if given is None else given // 4
      kept = share_teacher(learners, teacher, sources, most)
      if kept is not None:
        return None, kept
    return teacher, sources


def _rungs(search: Search, steps: int, choice: Choice, halving: Halving) -> dict[int, Found]:
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
    finished = [
      i
      for i in alive
      if found[i].row.status == "finished" and measured(found[i].row, choice.metric)
    ]
    if not finished:
      break
    finished.sort(key=lambda i: (-float(np.mean(choice.score(found[i].row))), i))
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


def _tested(model: Model, choice: Choice) -> dict[str, np.ndarray]:
  assert choice.test is not None
  found = evaluation.evaluate(model, choice.test, task=choice.task)
  return {name: found[name] for name in choice.of.metrics if name in found}


def identity(
  job: Training,
  student: Student | Mapping[str, Student],
  pairs: list[tuple[int, int]],
  again: list[tuple[int, int]],
) -> dict[str, Any]:
  """What a search is known again by, but for its points, as ``config.json`` holds it.

  Args:
    job: how its points are trained.
    student: the network, or the model to start from; or several by name.
    pairs: of seeds.
    again: those that what was chosen is trained anew from.
  """
  plan = job.plan
  source = plan.sources[0]

  def params(network: Network) -> PyTree:
    return jax.eval_shape(network.init, example_key(), inputs_of(source))["params"]

  begun: Any = student.variables if isinstance(student, Model) else None
  found = train.describe(dataclasses.replace(plan, start=begun), params(plan.student))
  del found["data_seed"]  # each pair of seeds has its own
  if isinstance(student, Mapping):
    del found["student"]
    networks = {n: one.network if isinstance(one, Model) else one for n, one in student.items()}
    found["students"] = {
      name: train.described_student(network.name, params(network))
      for name, network in networks.items()
    }
    begun = {n: one.variables for n, one in student.items() if isinstance(one, Model)}
    if begun:
      found["start"] = runs.fingerprint((begun, plan.objective.start))
  given = {**(job.run.config or {}), **found, **job.choice.describe()}
  return {**given, "seeds": pairs, "retrain": again}


def _length(steps: int, most: int) -> int:
  """Steps of one dispatch: a divisor of all where there is a long one, so that one is compiled."""
  most = min(steps, most, 250)
  divisor = max(n for n in range(1, most + 1) if steps % n == 0)
  return divisor if 4 * divisor >= most else most
