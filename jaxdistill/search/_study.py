"""A search whose points an Optuna study proposes: on one machine, or on many at once.

Optuna's sampler proposes as many points as one compiled program trains side by side; they are the
students of a sweep, and differ in numbers alone, so that all batches of the study are one program.
What they validate at on the way is reported, and the study's pruner says which of them end. All
that machines know of one another is in the study's storage: which job it is, whose a trial is, what
came of it, and a sign of life of each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import threading
import time
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill import _check, _extras, runs, train
from jaxdistill._beside import beside
from jaxdistill.data import Source
from jaxdistill.search._choice import Choice, Result, Row, measured
from jaxdistill.search._grid import Group, Student, grouped, seed_pairs
from jaxdistill.search._sweep import Execution, Training, identity, training
from jaxdistill.search._trials import Found, Search
from jaxdistill.train import Optimizer, Run, claimed_folder, stop_signal
from jaxdistill.types import Objective, ObjectiveFunction, Teacher

__all__ = ["Proposals", "study"]

PyTree = Any
# What the storage holds beside Optuna's own: of the study its job and each process's sign of life,
# of a trial whose it is and what came of it.
_JOB, _ALIVE, _WORKER, _ROW = "jaxdistill", "alive", "worker", "row"


@dataclasses.dataclass(frozen=True)
class Proposals:
  """What an Optuna study proposes, how many trials it has, and where it is kept.

  Attributes:
    space: ``{keyword: distribution}``, Optuna's, each over numbers: ``FloatDistribution(1, 20,
      log=True)``, ``IntDistribution(1, 8)``, ``CategoricalDistribution([0.5, 0.9])``.
    trials: how many the study has in the end, over all machines, those that were pruned included. A
      finished study goes on where there are to be more.
    at_once: how many are proposed together and trained side by side; fewer where the memory ends. A
      sampler learns from what has finished, so that many at once are quicker and each is chosen by
      less.
    validate_every: steps between the validations by which a trial is pruned; by default there are
      four, the last included.
    sampler: Optuna's; by default its TPE with ``constant_liar``, which keeps those that are
      proposed together apart. The default draws by ``seed`` and the trial's number; give each
      machine another seed of a sampler of your own.
    pruner: Optuna's; its median pruner by default, ``optuna.pruners.NopPruner()`` for none.
    storage: where the study is kept: a path is Optuna's journal file, a text with ``://`` a
      database, else one of Optuna's storages. By default ``study.log`` in the run's folder, or
      memory without one.
    name: the study's in the storage.
    seed: of the default sampler.
    grace: seconds without a sign of life after which the trials of another process are given to
      those that are left.

  Raises:
    MissingExtraError: Optuna is not installed.
    TypeError: an attribute is of another kind than it must be.
    ValueError: one is out of range; a distribution is not over numbers.
  """

  space: Mapping[str, Any]
  trials: int
  at_once: int = 16
  validate_every: int | None = None
  sampler: Any = None
  pruner: Any = None
  storage: Any = None
  name: str = "study"
  seed: int = 0
  grace: float = 60.0

  def __post_init__(self) -> None:
    _extras.need("search.Proposals", "optuna")
    import optuna  # a second, which only who has a study pays

    for name in ("trials", "at_once"):
      _check.whole(name, getattr(self, name))
    if self.validate_every is not None:
      _check.whole("validate_every", self.validate_every)
    _check.whole("seed", self.seed, least=0, most=2**32 - 1)
    _check.number("grace", self.grace, above=0)
    if not isinstance(self.name, str) or not self.name:
      raise TypeError(f"name={_check.show(self.name)} must be the study's name in its storage.")
    for name, kind, such in (
      ("sampler", optuna.samplers.BaseSampler, "optuna.samplers.TPESampler()"),
      ("pruner", optuna.pruners.BasePruner, "optuna.pruners.MedianPruner()"),
    ):
      given = getattr(self, name)
      if given is not None and not isinstance(given, kind):
        raise TypeError(f"{name}={_check.show(given)} must be one of Optuna's, such as {such}.")
    kinds = (str, os.PathLike, optuna.storages.BaseStorage)
    if self.storage is not None and not isinstance(self.storage, kinds):
      raise TypeError(
        f"storage={_check.show(self.storage)} must be the path of a journal file, a database's "
        "address such as 'sqlite:///study.db', or one of Optuna's storages."
      )
    if not isinstance(self.space, Mapping) or not self.space:
      raise TypeError(
        f"space={_check.show(self.space)} must be Optuna's distributions by keyword, such as "
        "{'temperature': FloatDistribution(1, 20, log=True)}."
      )
    for name, one in self.space.items():
      _check_distribution(name, one)

  @property
  def ends(self) -> list[dict[str, Any]]:
    """The space's two ends as points; one, where they are the same."""
    values = {name: _values(one) for name, one in self.space.items()}
    low, high = ({n: end(found) for n, found in values.items()} for end in (min, max))
    return [low] if low == high else [low, high]

  @property
  def stand_in(self) -> list[dict[str, Any]]:
    """As many points as there will be trials, to compile for before any is proposed."""
    ends = self.ends
    return [ends[i % len(ends)] for i in range(self.trials)]

  def describe(self) -> dict[str, Any]:
    """The space, as ``config.json`` and the study hold it."""
    from optuna.distributions import distribution_to_json

    return {name: json.loads(distribution_to_json(one)) for name, one in self.space.items()}


def _check_distribution(name: Any, one: Any) -> None:
  from optuna.distributions import BaseDistribution, CategoricalDistribution

  if not isinstance(name, str) or not isinstance(one, BaseDistribution):
    raise TypeError(
      f"space has {_check.show(name)}: {_check.show(one)}; give one of optuna.distributions for "
      "each keyword, such as FloatDistribution(1, 20, log=True)."
    )
  if isinstance(one, CategoricalDistribution):
    wrong = [v for v in one.choices if isinstance(v, bool) or not isinstance(v, int | float)]
    if wrong:
      raise ValueError(
        f"space has {name} with {_check.show(wrong[0])}, which is no number: each such value is a "
        "program of its own, and a study's trials are one. Give numbers; or a study for each value "
        "(another name= in the same storage); or search.sweep, which sorts points by program."
      )


def _values(one: Any) -> Sequence[float]:
  choices = getattr(one, "choices", None)
  return (one.low, one.high) if choices is None else choices


def study(
  student: Student,
  objective: Objective | ObjectiveFunction | Callable[..., Objective | ObjectiveFunction],
  *,
  proposals: Proposals,
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
  """Trains a student for every point that an Optuna study proposes, and chooses the best.

  A sweep whose points are not known before: ``at_once`` of them are proposed together and trained
  side by side from every seed, and what came of them is told to the sampler, which proposes the
  next. All batches are one compiled program. A student is the one that a `sweep` trains with the
  same values, and the one trained alone.

  A trial's value is the metric's mean over the seeds. It is reported at each validation, and a
  trial that the pruner ends is **masked**: its place in the program is computed on, since the
  program has one size, and nothing of it counts any more. A batch of which none is left ends there.
  A student that is no longer finite ends its trial as pruned, so that the sampler keeps away from
  there.

  Several machines work on one study where they are started with the same arguments and the same
  ``storage``, each with a folder of its own; each comes back when the study is finished, with the
  same choice. A process that was killed and is started again in its folder goes on with its trials
  from their last checkpoint. Where it is not, the others take its trials over after ``grace``
  seconds, from their beginning: they fail in the study, and their points are tried again. No trial
  counts twice. Of a process alone with the default sampler, a study that was killed proposes what
  one proposes that was not.

  Args:
    student: the network to train, or a model to start from.
    objective: an objective, or a recipe: a function of keywords that returns one.
    proposals: the space, the number of trials, and where the study is kept; see `Proposals`.
    data: where batches come from; each seed gets it with its own ``data_seed``. Or a function
      ``data_seed -> Source``.
    optimizer: an optax optimiser, or a function of keywords (learning_rate, weight_decay) that
      returns one.
    steps: how many steps a student is trained for.
    choice: the split to choose on, by which metric, and what is done with what was chosen. It has
      no halving: that is the pruner's.
    seeds: each point is trained from each of them, as in `sweep`.
    teacher: None for objectives without one, and where batches bring its outputs along.
    average: the decay of a moving average of the deployed variables; None for none.
    execution: over which devices, in how much memory; see `Execution`.
    run: where this process keeps what it trains, as in `sweep`; a path is the folder. None keeps
      nothing, and a storage has the study's numbers all the same.

  Returns:
    The `Result`, its rows the study's trials in their order. The chosen students are those of this
    process, or are trained here again where another one trained them; ``students(index)`` has the
    trials of this process alone.

  Raises:
    TypeError: an argument is of another kind than it must be.
    ValueError: a keyword is nobody's, or its values are part of the program; the study goes in
      another direction than the metric, or is another job's; the folder holds another search; or
      there are several JAX processes.
    FloatingPointError: no trial stayed finite to its end.
    jaxdistill.train.Stopped: the process was asked to stop, or ``stop_after`` is over.
  """
  train.with_students()  # says first that a search is of one JAX process
  run, execution = train.check_run(run, "study"), Execution() if execution is None else execution
  if run.folder is not None:
    _extras.need("search.study(run=folder), which draws a picture,", "matplotlib")
  _check_arguments(student, proposals, choice)
  groups = grouped(proposals.ends, student, objective, optimizer, steps)
  _check_one_program(proposals, groups)
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
    path, traced = None, job.traced(groups, pairs)
    settings = {**identity(job, student, pairs, again), "space": proposals.describe()}
    if run.folder is not None:
      path = stack.enter_context(claimed_folder(run.folder, settings, traced))
    asked = stack.enter_context(stop_signal(listening=path is not None, after=run.stop_after))
    opened = _opened(proposals, choice, path)
    _claim(opened, settings, traced)
    group = _of(groups[0], proposals.stand_in)
    worker = _Worker(opened, proposals, job, group, pairs, path, asked)
    with worker.alive():
      worker.work()
    result = worker.result(again)
    job.conclude(result, path, settings, "study")
  return result


def _check_arguments(student: Any, proposals: Any, choice: Any) -> None:
  if not isinstance(proposals, Proposals):
    raise TypeError(
      f"proposals={_check.show(proposals)} must be a search.Proposals(space, trials, ...)."
    )
  if not isinstance(choice, Choice):
    raise TypeError(f"choice={_check.show(choice)} must be a search.Choice(validation, ...).")
  if choice.halving is not None:
    raise ValueError(
      "choice has a halving, and what ends trials early in a study is its pruner: "
      "Proposals(pruner=optuna.pruners.SuccessiveHalvingPruner()), for one."
    )
  if isinstance(student, Mapping):
    raise TypeError(
      f"student is several networks, {sorted(student)}, each of which is a program of its own, and "
      "a study's trials are one: give a study for each, or search.sweep."
    )


def _check_one_program(proposals: Proposals, groups: list[Group]) -> None:
  fixed = sorted(groups[0].fixed)
  if fixed or len(groups) > 1:
    raise ValueError(
      f"space has {fixed}, which the objective is made with: each value would compile a program of "
      "its own, and a study's trials are one. Give what the objective takes as a number while it "
      "runs; or search.sweep, which sorts points by program."
    )


def _of(group: Group, points: Sequence[Mapping[str, Any]]) -> Group:
  """The same program's group of other points."""
  hyper, rates = (
    {name: np.array([float(point[name]) for point in points]) for name in given}
    for given in (group.hyper, group.optimizer)
  )
  return dataclasses.replace(group, indices=list(range(len(points))), hyper=hyper, optimizer=rates)


def _opened(proposals: Proposals, choice: Choice, folder: pathlib.Path | None) -> Any:
  """The study, made where there is none."""
  import optuna

  higher = choice.of.metric(choice.metric).sign > 0
  direction: Any = "maximize" if higher else "minimize"
  try:
    made = optuna.create_study(
      study_name=proposals.name,
      storage=_storage(proposals, folder),
      sampler=_sampler(proposals.seed) if proposals.sampler is None else proposals.sampler,
      pruner=optuna.pruners.MedianPruner() if proposals.pruner is None else proposals.pruner,
      direction=direction,
      load_if_exists=True,
    )
  except Exception as error:  # each kind of storage fails in words of its own
    raise ValueError(
      f"storage={_check.show(proposals.storage or folder)} cannot be opened as Optuna's: "
      f"{_check.short(error)} Give the path of a journal file, a new one or a study's, or the "
      "address of a database that is there, such as 'sqlite:///study.db'."
    ) from error
  found = [one.name.lower() for one in made.directions]
  if found != [direction]:
    raise ValueError(
      f"the study {proposals.name!r} goes in the direction {', '.join(found)}, and of "
      f"{choice.metric} the {'higher' if higher else 'lower'} is better: choose by another metric, "
      "or give another name=."
    )
  return made


def _storage(proposals: Proposals, folder: pathlib.Path | None) -> Any:
  import optuna
  from optuna.storages.journal import JournalFileBackend

  given = proposals.storage
  if given is None:
    given = None if folder is None else folder / "study.log"
  if isinstance(given, str) and "://" in given:
    return optuna.storages.get_storage(given)
  if isinstance(given, str | os.PathLike):
    path = _check.folder("storage", given)
    with runs.writes(path):
      path.parent.mkdir(parents=True, exist_ok=True)
      backend = JournalFileBackend(str(path))
    return optuna.storages.JournalStorage(backend)
  return given


def _sampler(seed: int) -> Any:
  """Optuna's TPE, which draws by a seed and the trial's number.

  So machines that begin at the same moment do not draw the same, and one that goes on draws what it
  would have drawn.
  """
  import optuna

  def drawn(number: int, *words: int) -> Any:
    own = int(np.random.SeedSequence([seed, number, *words]).generate_state(1)[0])
    with warnings.catch_warnings():  # an option that Optuna may still change
      warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
      return optuna.samplers.TPESampler(seed=own, constant_liar=True)

  class Numbered(optuna.samplers.BaseSampler):
    """A sampler made anew for each trial."""

    def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
      return drawn(trial.number).infer_relative_search_space(study, trial)

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Any:
      return drawn(trial.number).sample_relative(study, trial, search_space)

    def sample_independent(
      self, study: Any, trial: Any, param_name: str, param_distribution: Any
    ) -> Any:
      own = drawn(trial.number, zlib.crc32(param_name.encode()))
      return own.sample_independent(study, trial, param_name, param_distribution)

  return Numbered()


def _claim(opened: Any, settings: Mapping[str, Any], traced: Mapping[str, runs.Traced]) -> None:
  """Makes the study this job's, or raises where it is another's."""
  mine = {
    "settings": runs.to_json(settings),
    "computes": {name: one.digest for name, one in traced.items()},
  }
  if _JOB not in opened.user_attrs:
    if any(trial.state.name != "WAITING" for trial in _trials(opened)):
      raise ValueError(
        f"the study {opened.study_name!r} has trials of something else than search.study: give "
        "another name=."
      )
    opened.set_user_attr(_JOB, mine)
  there = opened.user_attrs[_JOB]  # read back: another machine may have been the first
  lines = runs.differing(there["settings"], mine["settings"])
  if not lines:  # another setting says it in fewer words
    computes = mine["computes"]
    lines = [
      f"{name}: it computes something else"
      for name in computes
      if there["computes"].get(name) != computes[name]
    ]
  if lines:
    raise ValueError(
      f"the study {opened.study_name!r} is another job's ({'; '.join(lines)}). Give another name=, "
      "or the same settings to work on that one."
    )


def _trials(opened: Any) -> list[Any]:
  found: list[Any] = opened.get_trials(deepcopy=False)
  return found


@dataclasses.dataclass(eq=False)
class _Worker:
  """This process's part in a study.

  Attributes:
    study: Optuna's.
    proposals: what is proposed, and how.
    job: how points are trained.
    group: their program.
    pairs: of seeds.
    folder: this process's; None for memory.
    asked_to_stop: ``step -> the signal that asks to save and leave``, 0 for none.
    asked: the trials of this process.
    found: what it trained, by trial.
    seen: the others' signs of life, and when they were first seen.
  """

  study: Any
  proposals: Proposals
  job: Training
  group: Group
  pairs: list[tuple[int, int]]
  folder: pathlib.Path | None
  asked_to_stop: Callable[[int], int]
  asked: dict[int, Any] = dataclasses.field(default_factory=dict)
  found: dict[int, Callable[[], PyTree]] = dataclasses.field(default_factory=dict)
  seen: dict[Any, tuple[Any, float]] = dataclasses.field(default_factory=dict)

  @functools.cached_property
  def record(self) -> dict[str, Any]:
    """This process's name, and the trials of each of its batches; kept in its folder."""
    path = None if self.folder is None else self.folder / "batches.json"
    if path is not None and path.is_file():
      found = runs.read_object(path)
      runs.entry(found, "worker", str)
      runs.entry(found, "batches", list)
      return found
    return {"worker": uuid.uuid4().hex, "batches": []}

  @property
  def name(self) -> str:
    """By which the study knows this process."""
    return str(self.record["worker"])

  @functools.cached_property
  def every(self) -> int:
    """Steps between two validations."""
    given, steps = self.proposals.validate_every, self.job.plan.steps
    return min(steps, math.ceil(steps / 4) if given is None else given)

  @functools.cached_property
  def search(self) -> Search:
    """The program of all batches, and where students are kept."""
    points = self.proposals.stand_in
    return self.job.search(
      [self.group], points, self.pairs, self.folder, self.asked_to_stop, self.every
    )

  @functools.cached_property
  def size(self) -> int:
    """How many trials are side by side."""
    return self.search.points_at_once(0, self.proposals.at_once, "batch")

  @functools.cached_property
  def rungs(self) -> list[int]:
    """The steps of the validations; ends of whole dispatches."""
    steps, length = self.search.steps, self.search.length
    due = range(self.every, steps + self.every, self.every)
    return sorted({min(steps, length * math.ceil(step / length)) for step in due})

  @contextlib.contextmanager
  def alive(self) -> Iterator[None]:
    """Gives the other processes a sign of life every now and then."""

    def beat(ended: threading.Event) -> None:
      while True:
        with contextlib.suppress(Exception):  # a storage that is away for a while
          self.study.set_user_attr(f"{_ALIVE} {self.name}", uuid.uuid4().hex)
        if ended.wait(self.proposals.grace / 6):
          return

    with beside(beat):
      yield

  def work(self) -> None:
    """Trains what is this process's, until the study is finished."""
    self.go_on()
    while True:
      self.take_over()
      if numbers := self.ask():
        batches = [*self.record["batches"], numbers]
        self.record["batches"] = batches
        if self.folder is not None:
          runs.write_json(self.folder / "batches.json", self.record)
        self.train(len(batches) - 1)
      elif any(trial.state.name == "RUNNING" for trial in _trials(self.study)):
        self.wait()
      elif self.left() <= 0:
        return

  def go_on(self) -> None:
    """Goes on where a process was that was killed in this folder."""
    batches = self.record["batches"]
    last = batches[-1] if batches else []
    mine = [t for t in _trials(self.study) if t.user_attrs.get(_WORKER) == self.name]
    if not {n for batch in batches for n in batch} <= {trial.number for trial in mine}:
      raise ValueError(
        f"{self.folder} has trials of another study than {self.study.study_name!r} in this "
        "storage: give the storage and the name that it was begun with, or another folder."
      )
    for trial in mine:
      row = trial.user_attrs.get(_ROW)
      if row is not None and trial.state.name != "RUNNING":
        self.found[trial.number] = self.search.kept(0, row["chunk"], row["place"])
      elif trial.state.name == "RUNNING" and trial.number not in last:
        self.give_back(trial)  # asked for, and killed before it was written down
    if batches:
      self.train(len(batches) - 1)

  def left(self) -> int:
    """How many trials the study lacks, those that wait and run not among them."""
    return self.proposals.trials - sum(t.state.name != "FAIL" for t in _trials(self.study))

  def ask(self) -> list[int]:
    """The numbers of the next batch's trials: those that wait first, then new ones."""
    asked: list[int] = []
    while len(asked) < self.size:
      if self.left() <= 0 and not any(t.state.name == "WAITING" for t in _trials(self.study)):
        break
      trial = self.study.ask(dict(self.proposals.space))
      trial.set_user_attr(_WORKER, self.name)
      self.asked[trial.number] = trial
      before = [t for t in _trials(self.study) if t.number <= trial.number]
      if sum(t.state.name != "FAIL" for t in before) > self.proposals.trials:
        self.tell(trial, "FAIL")  # another process asked for the last one at the same moment
      else:
        asked.append(trial.number)
    return asked

  def tell(self, trial: Any, state: str, value: float | None = None) -> bool:
    """Ends a trial; whether it was still to be ended."""
    import optuna

    try:
      self.study.tell(trial.number, value, state=optuna.trial.TrialState[state])
    except (optuna.exceptions.UpdateFinishedTrialError, ValueError):
      return False  # another process has ended it
    return True

  def give_back(self, trial: Any) -> None:
    """Ends a trial that nobody works on, and has its point tried again."""
    if self.tell(trial, "FAIL"):
      self.study.enqueue_trial(trial.params, user_attrs={"again": trial.number})

  def take_over(self) -> None:
    """Gives back the trials of processes that have shown no sign of life for too long."""
    now, signs = time.monotonic(), self.study.user_attrs
    for trial in _trials(self.study):
      owner = trial.user_attrs.get(_WORKER, f"of trial {trial.number}")
      if trial.state.name != "RUNNING" or owner == self.name:
        continue
      sign = signs.get(f"{_ALIVE} {owner}")
      if self.seen.get(owner, (self, now))[0] != sign:
        self.seen[owner] = sign, now
      elif now - self.seen[owner][1] > self.proposals.grace:
        self.give_back(trial)

  def wait(self) -> None:
    """Waits a little for the other processes."""
    if number := self.asked_to_stop(0):
      raise train.stopped(number, "stopped while others work: start it again, and it goes on.")
    time.sleep(min(1.0, self.proposals.grace / 6))

  def train(self, number: int) -> None:
    """Trains a batch, from where its folder has it."""
    batch = self.record["batches"][number]
    trials = {trial.number: trial for trial in _trials(self.study)}
    going = [n for n in batch if trials[n].state.name == "RUNNING"]
    points, label = [dict(trials[n].params) for n in batch], self.job.run.label("study")
    if label is not None:
      label = f"{label}, trials {batch[0]} to {batch[-1]} of {self.proposals.trials}"
    search = dataclasses.replace(
      self.search,
      groups=[_of(self.group, points)],
      values=points,
      progress=label,
      word="trial",
      names=batch,
    )
    places, states = list(range(len(batch))), None
    for k, until in enumerate(self.rungs if going else ()):
      last = until == self.rungs[-1]
      name = f"{number}-{k}"
      found = search.chunk(0, places, self.size, name, until, states, keep=not last)
      going = [n for n in going if self.goes_on(n, found, name, batch.index(n), last=last)]
      if not going:
        return
      states = [found[place].state for place in places]

  def trial(self, number: int) -> Any:
    """A trial of this process, or of the one that was killed in its folder."""
    import optuna

    if number not in self.asked:
      found = next(trial for trial in _trials(self.study) if trial.number == number)
      self.asked[number] = optuna.trial.Trial(self.study, found._trial_id)
    return self.asked[number]

  def goes_on(
    self, number: int, found: Mapping[int, Found], chunk: str, place: int, *, last: bool
  ) -> bool:
    """Reports what a trial validated at, and ends it where it is time."""
    import optuna

    row, metric, trial = found[place].row, self.job.choice.metric, self.trial(number)
    fine = row.status == "finished" and measured(row, metric)
    value = float(np.mean(row.metrics[metric])) if fine else None
    pruned = value is None
    try:
      if value is not None:
        with warnings.catch_warnings():  # it was reported before the process was killed
          warnings.filterwarnings("ignore", "The reported value is ignored")
          trial.report(value, row.step)
        pruned = not last and bool(trial.should_prune())
      if not (pruned or last):
        return True
      status = row.status if value is None else "pruned" if pruned else "finished"
      about = {"metrics": row.metrics, "step": row.step, "status": status}
      trial.set_user_attr(_ROW, runs.to_json({**about, "chunk": chunk, "place": place}))
    except optuna.exceptions.UpdateFinishedTrialError:
      return False  # another process has taken it over
    if self.tell(trial, "PRUNED" if pruned else "COMPLETE", None if pruned else value):
      self.found[number] = found[place].variables
    return False

  def result(self, again: list[tuple[int, int]]) -> Result:
    """The study's choice."""
    told = [t for t in _trials(self.study) if t.state.name in ("COMPLETE", "PRUNED")]
    rows = [_row(trial) for trial in told]

    def group_of(index: int) -> Group:
      return dataclasses.replace(_of(self.group, [rows[index].values]), indices=[index])

    def variables(index: int) -> PyTree:
      known = self.found.get(told[index].number)
      return self.trained_again(rows[index]) if known is None else known()

    return self.job.result(
      rows, group_of, variables, (self.pairs, again), self.folder, self.asked_to_stop
    )

  def trained_again(self, row: Row) -> PyTree:
    """The variables of a trial that another process trained: the same student, trained here."""
    search = dataclasses.replace(
      self.search,
      groups=[_of(self.group, [row.values])],
      values=[row.values],
      folder=None,
      trackers=[],
    )
    return search.chunk(0, [0], self.size, "", row.step, None, keep=False)[0].variables()


def _row(trial: Any) -> Row:
  """A trial as a row of the table."""
  about = trial.user_attrs[_ROW]
  metrics = {name: np.array(found, np.float64) for name, found in about["metrics"].items()}
  return Row(dict(trial.params), metrics, about["step"], about["status"])
