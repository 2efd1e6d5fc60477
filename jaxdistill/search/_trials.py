"""How a sweep's points are trained: chunks that fit the memory, rungs, and what is on disk."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import _check, _compile, evaluation, runs
from jaxdistill.data import Batches
from jaxdistill.runs import Checkpoints, is_key
from jaxdistill.search._choice import Row
from jaxdistill.search._grid import Group, stacked_values
from jaxdistill.train import (
  Intervals,
  Log,
  Program,
  State,
  Values,
  deployed_variables,
  run_steps,
  start_or_resume,
)
from jaxdistill.types import Batch, Model, Objective

__all__ = ["Found", "Search"]

PyTree = Any

_LINES = 20  # of a student's curve: a dispatch may be all of a short search, and a line of it none


@dataclasses.dataclass(frozen=True)
class Found:
  """What came of one point's students at the end of a rung.

  Attributes:
    row: its numbers.
    variables: reads the deployed variables, leaves ``[S, ...]`` over its seeds.
    state: the whole state of the same, on the host, where another rung goes on from it.
  """

  row: Row
  variables: Callable[[], PyTree]
  state: State | None


@dataclasses.dataclass(frozen=True, eq=False)
class Search:
  """The points' programs, and where their students are kept.

  Attributes:
    groups: the points by program.
    values: each point's values, in the order in which they were given.
    seeds: how many students a point has.
    steps: of the last rung.
    length: steps of one dispatch.
    save_every: steps between checkpoints.
    build: ``(a group, values, how many points) -> Program``.
    validation: the split to choose on.
    task: what its labels mean.
    memory: bytes for a program, on each device.
    devices: how many devices share the points.
    most: ``a group -> the most points in one program``, whatever the memory.
    folder: where students are kept; None for memory.
    asked_to_stop: ``step -> the signal that asks to save and leave``, 0 for none.
    progress: the bar's label.
    trackers: what each student is told to, as a run of its own; those that failed are dropped.
    word: what a point is called there, before its name.
    names: each point's name there.
    programs: those that were built, by group and number of points, and the bytes that they need.
    validators: what measures each group's students.
    told: the trackers of the students that were told of, by which another rung goes on.
  """

  groups: list[Group]
  values: list[dict[str, Any]]
  seeds: int
  steps: int
  length: int
  save_every: int
  build: Callable[[Group, Values, int], Program]
  validation: Batch | Batches
  task: evaluation.tasks.Task
  memory: int
  devices: int
  most: Callable[[Group], int]
  folder: pathlib.Path | None
  asked_to_stop: Callable[[int], int]
  progress: str | None
  trackers: list[runs.Tracker] = dataclasses.field(default_factory=list)
  word: str = "point"
  names: Sequence[int] | None = None
  programs: dict[tuple[int, int], tuple[Program, int]] = dataclasses.field(default_factory=dict)
  validators: dict[int, evaluation.Validator] = dataclasses.field(default_factory=dict)
  told: dict[str, list[runs.Tracker]] = dataclasses.field(default_factory=dict)

  def rung(
    self, number: int, until: int, alive: Sequence[int], before: dict[int, Found], *, keep: bool
  ) -> dict[int, Found]:
    """Trains points up to a step.

    Args:
      number: of the rung.
      until: the step.
      alive: which points.
      before: what came of them in the rung before; empty for the first.
      keep: whether another rung goes on from their states.

    Returns:
      What came of each point.
    """
    found: dict[int, Found] = {}
    for g, group in enumerate(self.groups):
      rows = [row for row, index in enumerate(group.indices) if index in set(alive)]
      if not rows:
        continue
      size = self.points_at_once(g, len(rows), f"{number}-{g}")
      for c in range(0, len(rows), size):
        chunk, name = rows[c : c + size], f"{number}-{g}-{c // size}"
        states = [before[group.indices[row]].state for row in chunk] if before else None
        found |= self.chunk(g, chunk, size, name, until, states, keep=keep)
    return found

  def points_at_once(self, g: int, count: int, name: str) -> int:
    """How many points of a group one program trains; what a folder was begun with stays."""
    plan = None if self.folder is None else self.folder / "students" / f"{name}.json"
    if plan is not None and plan.is_file():
      found = runs.read_object(plan)
      return _check.whole(f"points_at_once in {plan}", found.get("points_at_once"))
    cap = self.devices * math.ceil(min(count, self.most(self.groups[g])) / self.devices)
    size = _compile.that_fit(
      lambda points: self.program(g, points)[1], cap, self.memory, multiple=self.devices
    )
    if plan is not None:
      plan.parent.mkdir(exist_ok=True)
      runs.write_json(plan, {"points_at_once": size})
    return size

  def program(self, g: int, points: int) -> tuple[Program, int]:
    """The program of so many points of a group, and the bytes that it needs."""
    if (g, points) not in self.programs:
      group = self.groups[g]
      some = [i % len(group.indices) for i in range(points)]
      program = self.build(group, stacked_values(group, some, self.seeds), points)
      chunks = math.ceil(len(group.indices) / points)
      # What a chunk ends with is compiled while its own program is traced.
      ends = program.ends()
      assert ends is not None  # a sweep is of one process, under jit
      self.validator(g).compile(ends, calls=chunks)
      program.compile(times=chunks, begin=True)
      self.programs[g, points] = program, program.bytes_needed()
    return self.programs[g, points]

  def validator(self, g: int) -> evaluation.Validator:
    """What measures a group's students."""
    if g not in self.validators:
      self.validators[g] = evaluation.validator(self.validation, task=self.task)
    return self.validators[g]

  def chunk(
    self,
    g: int,
    rows: list[int],
    size: int,
    name: str,
    until: int,
    states: list[State | None] | None,
    *,
    keep: bool,
  ) -> dict[int, Found]:
    """Trains some points of a group side by side, or reads what was trained before."""
    group, path = self.groups[g], None
    if self.folder is not None:
      path = self.folder / "students" / name
      path.mkdir(parents=True, exist_ok=True)
    outcome = None if path is None else _outcome(path)
    state = None
    if outcome is None or keep:
      state, outcome = self.trained(g, rows, size, path, until, states)
    found, deployed = {}, None
    if path is None:
      deployed = jax.device_get(deployed_variables(state, group.objective)) if state else None
    host = _to_host(state) if keep and state is not None else None
    for i, row in enumerate(rows):
      mine = slice(i * self.seeds, (i + 1) * self.seeds)
      index = group.indices[row]
      found[index] = Found(
        row=_row(self.values[index], outcome, mine, until),
        variables=_reader(path, group.objective, deployed, mine),
        state=None if host is None else _cut(host, mine),
      )
    return found

  def kept(self, g: int, name: str, place: int) -> Callable[[], PyTree]:
    """Reads the deployed variables of one point of a chunk that the folder holds."""
    assert self.folder is not None  # what is in memory is known
    mine = slice(place * self.seeds, (place + 1) * self.seeds)
    return _reader(self.folder / "students" / name, self.groups[g].objective, None, mine)

  def trained(
    self,
    g: int,
    rows: list[int],
    size: int,
    path: pathlib.Path | None,
    until: int,
    states: list[State | None] | None,
  ) -> tuple[State, dict[str, Any]]:
    """The students' state at a step, and their numbers there."""
    group = self.groups[g]
    filled = rows + [rows[-1]] * (size - len(rows))  # a chunk of another length compiles anew
    program = self.program(g, size)[0].with_values(stacked_values(group, filled, self.seeds))
    kept = None if path is None else Checkpoints(path / "checkpoints", keep_last=1, keep_best=False)
    # Without checkpoints nothing stops a dispatch short, which would compile one of that length.
    save = until if kept is None else self.save_every
    try:
      state, at = start_or_resume(program, kept)
      if states is not None and at == 0:
        state, at = _joined(states + [states[-1]] * (size - len(rows)))
      log = Log(
        path,
        steps=until,
        at=at,
        epoch=program.source.steps_per_epoch,
        examples=program.examples_per_step,
        line=max(1, self.steps // _LINES),
        schedules={},
        progress=self.progress,
        tracked=None,
        select=self.task.first,
        callback=None,
      )
      try:
        state = run_steps(
          program,
          state,
          at,
          every=Intervals(until, log=self.length, validate=until, save=save),
          log=log,
          saved=kept,
          asked_to_stop=self.asked_to_stop,
          finite=False,
        )
        history = log.history
      finally:
        log.close()
    finally:
      if kept is not None:
        kept.close()
    outcome = self.measured(g, program.plan.model(state), state, history)
    if self.trackers:
      begin = 0 if states is None else int(states[0].step[0])  # type: ignore[union-attr]
      for i, row in enumerate(rows):
        for s in range(self.seeds):
          place = i * self.seeds + s
          self.tell(group.indices[row], s, history, _of_student(outcome, place), place, begin)
    if path is not None:
      runs.write_json(path / "outcome.json", outcome)
    return state, outcome

  def tell(
    self,
    index: int,
    s: int,
    history: list[dict[str, Any]],
    validation: Mapping[str, float],
    place: int,
    begin: int,
  ) -> None:
    """Tells the trackers of one student: its lines of the log, and what it validated at.

    At once and not on the way: so one run of a tracker is open, whatever the number of students.

    Args:
      index: the point.
      s: which of its seeds.
      history: the lines of all students that were trained beside it.
      validation: its own numbers.
      place: which of those students it is.
      begin: the step before the first of the lines.
    """
    number = index if self.names is None else self.names[index]
    name, folder = f"{self.word} {number}, student {s}", None
    if self.folder is not None:
      folder = self.folder / "tracked" / name
      folder.mkdir(parents=True, exist_ok=True)
    config = {**self.values[index], "student_of_point": s, self.word: number}
    trackers = self.told.get(name, self.trackers)
    tracked = runs.Tracked(
      trackers, config, name=name, folder=folder, search=self.folder, resumed_from=begin
    )
    for i, line in enumerate(history):
      own = {n: found[place] if isinstance(found, list) else found for n, found in line.items()}
      del own["step"], own["examples_per_second"]  # the latter is of all students together
      if i == len(history) - 1:
        own |= {f"validation/{n}": found for n, found in validation.items()}
      tracked.log(line["step"], own)
    tracked.finish()
    self.told[name] = tracked.trackers
    if len(tracked.working) < len(self.trackers):  # not once more for each student
      self.trackers[:] = tracked.working
      self.told.clear()

  def measured(
    self, g: int, model: Model, state: State, history: list[dict[str, Any]]
  ) -> dict[str, Any]:
    """Validation of each student, and the step at which one was seen to be no longer finite."""
    numbers = self.validator(g)(model)
    # Weights may be finite and what they compute not.
    sane = np.all([np.isfinite(values) for values in numbers.values()], axis=0)
    finite = _finite_students((state.params, state.model_state)) & sane
    bad: list[int | None] = []
    for s, good in enumerate(finite):
      # The log's NaN is JSON's null.
      steps = [line["step"] for line in history if line["loss"][s] is None]
      last = int(history[-1]["step"]) if history else 0
      bad.append(steps[0] if steps else None if good else last)
    return {"metrics": {name: np.asarray(found) for name, found in numbers.items()}, "bad": bad}


def _of_student(outcome: Mapping[str, Any], place: int) -> dict[str, float]:
  """One student's numbers of a chunk's."""
  return {name: float(found[place]) for name, found in outcome["metrics"].items()}


def _finite_students(tree: PyTree) -> np.ndarray:
  """Which students are finite, ``[S]``: on the device where that spares the way to the host."""
  if jax.default_backend() == "cpu":  # there is no way, and nothing has to be compiled
    return _finite(np, jax.tree.map(np.asarray, tree))
  return np.asarray(jax.jit(_finite, static_argnums=0)(jnp, tree))


def _finite(xp: Any, tree: PyTree) -> Any:
  leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
  each = [xp.all(xp.isfinite(leaf).reshape(leaf.shape[0], -1), axis=1) for leaf in leaves]
  return xp.all(xp.stack(each), axis=0)


def _outcome(path: pathlib.Path) -> dict[str, Any] | None:
  """What a finished chunk wrote; a damaged file is as none, and the chunk goes on from its save."""
  try:
    found = runs.read_object(path / "outcome.json")
    found["metrics"] = {n: np.array(v, np.float64) for n, v in found["metrics"].items()}
    return found if isinstance(found["bad"], list) else None
  except (OSError, ValueError, KeyError, AttributeError, TypeError):
    return None


def _row(values: dict[str, Any], outcome: dict[str, Any], mine: slice, until: int) -> Row:
  bad = outcome["bad"][mine]
  metrics = {
    name: np.where([b is None for b in bad], np.asarray(found[mine], np.float64), np.nan)
    for name, found in outcome["metrics"].items()
  }
  seen = [b for b in bad if b is not None]
  if seen:
    return Row(values, metrics, min(seen), "not finite")
  return Row(values, metrics, until, "finished")


def _reader(
  path: pathlib.Path | None, objective: Objective, deployed: PyTree, mine: slice
) -> Callable[[], PyTree]:
  def read() -> PyTree:
    variables = deployed
    if path is not None:
      with Checkpoints(path / "checkpoints") as saved:
        step = saved.latest()
        if step is None:
          raise FileNotFoundError(
            f"{path} holds no checkpoint that verifies; remove it, run again."
          )
        variables = saved.restore(step)["student" if objective.deployed is None else "deployed"]
    return jax.tree.map(lambda leaf: np.asarray(leaf)[mine], variables)

  return read


def _to_host(state: State) -> PyTree:
  """Arrays on the host; a random key as its words and its kind."""

  def bring(leaf: Any) -> Any:
    if is_key(leaf):
      return _Key(np.asarray(jax.random.key_data(leaf)), str(jax.random.key_impl(leaf)))
    return np.asarray(leaf)

  return jax.tree.map(bring, state)


@dataclasses.dataclass(frozen=True)
class _Key:
  """A random key on the host."""

  words: np.ndarray
  kind: str


def _cut(host: PyTree, mine: slice) -> PyTree:
  def cut(leaf: Any) -> Any:
    return _Key(leaf.words[mine], leaf.kind) if isinstance(leaf, _Key) else leaf[mine]

  return jax.tree.map(cut, host)


def _joined(states: Sequence[State | None]) -> tuple[State, int]:
  """Some points' states side by side again, and their step."""

  def join(*leaves: Any) -> Any:
    if isinstance(leaves[0], _Key):
      words = np.concatenate([leaf.words for leaf in leaves])
      return jax.random.wrap_key_data(jnp.asarray(words), impl=leaves[0].kind)
    return np.concatenate(leaves)

  state = jax.tree.map(join, *states)
  return state, int(state.step[0])
