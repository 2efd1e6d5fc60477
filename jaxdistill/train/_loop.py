"""The loop over chunks of steps: it logs, validates, saves and stops where that is due.

It never waits for the device inside a chunk, and looks at numbers one chunk late, unless something
has to be decided on them. A `Log` is what a run shows of itself (its folder, lines, a bar, and a
stop at a bad number), `Intervals` say where it stops on its way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import pathlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxdistill import _check, runs
from jaxdistill._check import show
from jaxdistill.runs import Checkpoints, progress_bar
from jaxdistill.train import _mesh
from jaxdistill.train._program import Program, nothing_counts
from jaxdistill.train._state import State, from_items, to_items
from jaxdistill.train._step import RESERVED, counts_of
from jaxdistill.train._stops import stopped
from jaxdistill.types import Model

__all__ = [
  "Intervals",
  "Log",
  "check_counted",
  "check_finite",
  "check_state",
  "check_validation",
  "claimed_folder",
  "run_steps",
  "start_or_resume",
]

PyTree = Any


def start_or_resume(program: Program, saved: Checkpoints | None) -> tuple[State, int]:
  """The state to go on from, and its step; all processes take the one that process 0 found.

  Args:
    program: whose state it is.
    saved: the run's checkpoints, or None.

  Returns:
    The last good checkpoint's, else that at step 0.
  """
  found = None if saved is None else saved.latest()
  step = _mesh.agree(-1 if found is None else found)
  if step < program.plan.steps:
    program.compile(begin=step < 0)  # in the background, while the state is made or read
  if saved is None or step < 0:
    return program.initial(), 0
  shapes, objective = program.shapes, program.objective
  outline = jax.eval_shape(lambda state: to_items(state, objective), shapes)
  items = saved.restore(step, program.lying(outline))
  return from_items(items, shapes, objective), step


def run_steps(
  program: Program,
  state: State,
  at: int,
  *,
  every: Intervals,
  log: Log,
  saved: Checkpoints | None = None,
  validate: Callable[[Model], Mapping[str, Any]] | None = None,
  select: tuple[str, int] = ("accuracy", 1),
  asked_to_stop: Callable[[int], int] = lambda step: 0,
  finite: bool = True,
) -> State:
  """Runs a program from a step to the last one.

  Args:
    program: what is run.
    state: the state at step ``at``; donated.
    at: the step to go on from.
    every: when something is due.
    log: where the numbers go.
    saved: where checkpoints go; process 0 writes them, or all processes what each holds.
    validate: ``model -> {name: number}``.
    select: the validation metric that scores a checkpoint; 1 where higher is better, else −1.
    asked_to_stop: ``step -> the signal that asks to save and leave``, 0 for none.
    finite: whether a number that is not finite ends the run. Without, it is logged as it is, and
      whoever calls looks at the students one by one.

  Returns:
    The state after the last step.

  Raises:
    FloatingPointError: a term was not finite.
    Stopped: the process was asked to stop.
  """
  objective, dispatch = program.objective, program.dispatch
  state = program.spread(state)
  pending: dict[str, Any] | None = None
  while at < every.steps:
    end = every.next_stop(at)
    state, sums = program.run(state, at, end - at)
    if end < every.steps:  # a chunk of another length may be another program
      program.compile(count=every.next_stop(end) - end)
    # The chunk before the one that was just dispatched: its numbers are there by now, and the
    # device is at work while they are looked at.
    if pending is not None:
      log.write(**_checked(pending, program, finite))
    pending, at = {"sums": sums, "begin": at, "end": end}, end
    stopping = asked_to_stop(at) if at < every.steps else 0
    validating = validate is not None and every.validates(at)
    saving = saved is not None and (every.saves(at) or stopping != 0)
    if not (validating or saving or stopping or at == every.steps):
      continue
    # Nothing is validated or saved before its numbers have been looked at.
    now, extra = dispatch.collect(state), {}
    writes = saved is not None and (jax.process_index() == 0 or runs.lies_in_parts(now))
    pending = _checked(pending, program, finite)
    if finite:
      check_state(now, at)
    try:
      if validate is not None and validating:
        extra = check_validation(validate(program.plan.model(now)), select[0] if saved else None)
      log.write(**pending, validation=extra)  # which calls the user's callback
    except Exception:
      # What was trained until here is not lost with it.
      if saved is not None and writes:
        saved.save(at, to_items(now, objective))
      raise
    pending = None
    if saved is not None and saving and writes:
      score = select[1] * float(np.mean(extra[select[0]])) if select[0] in extra else None
      saved.save(at, to_items(now, objective), score=score)
    if stopping:
      message = f"the run was asked to stop, and stands at step {at} of {every.steps}."
      if saved is not None:
        message += f" It is saved in {saved.folder.parent}: start it again, and it goes on."
      log.say(message)
      raise stopped(stopping, message)
  return dispatch.collect(state)


def _checked(pending: dict[str, Any], program: Program, finite: bool) -> dict[str, Any]:
  """The sums on the host, all of them finite where that is asked for."""
  sums = program.fetch(pending["sums"], pending["end"] - pending["begin"])
  if finite:
    check_finite(sums, pending["begin"])
  if pending["begin"] == 0:
    check_counted(sums, program.source.has_labels, program.source.name)
  return {**pending, "sums": sums}


# ``(step, the line)``, after every line of the log.
Callback = Callable[[int, Mapping[str, Any]], None]


class Log:
  """Turns a chunk's sums into lines of the log, a place on the bar and a call of the callback.

  Args:
    folder: the run's folder; None keeps the lines in memory alone.
    steps: how many steps the run has.
    at: the step that it goes on from.
    epoch: how many steps an epoch has.
    examples: how many examples a step has, over all seeds.
    line: the most steps of a line, where a chunk has more; None for one line a chunk.
    schedules: the objective's keywords that follow a schedule.
    progress: the bar's label; None for no bar.
    tracked: the run's trackers; None for none.
    select: the validation metric that the bar shows.
    callback: ``(step, line)``, after every line.
  """

  def __init__(
    self,
    folder: pathlib.Path | None,
    *,
    steps: int,
    at: int,
    epoch: int,
    examples: int,
    line: int | None = None,
    schedules: Mapping[str, Callable[[int], Any]],
    progress: str | None,
    tracked: runs.Tracked | None,
    select: str,
    callback: Callback | None,
  ) -> None:
    self._metrics = runs.Metrics(folder, resumed_from=at)
    self._bar = progress_bar(steps, progress, unit="step", initial=at)
    self._steps, self._epoch, self._examples = steps, epoch, examples
    self._line, self._schedules = line, schedules
    self._select, self._callback, self._tracked = select, callback, tracked
    self._clock = time.perf_counter()
    self._counted = at > 0  # whether any term counted an example until here, or that was said

  @property
  def history(self) -> list[dict[str, Any]]:
    """The lines so far."""
    return self._metrics.history

  def write(
    self, sums: PyTree, begin: int, end: int, validation: Mapping[str, Any] | None = None
  ) -> None:
    """Writes the line of steps ``begin .. end``, or several of about as many steps.

    Args:
      sums: ``{name: (sum, count)}`` on the host, with an axis over steps last.
      begin: the step before the first.
      end: the last step.
      validation: numbers of a validation at ``end``.
    """
    now = time.perf_counter()
    rate = self._examples * (end - begin) / (now - self._clock)
    self._clock = now
    lines = 1 if self._line is None else math.ceil((end - begin) / self._line)
    cuts = [(end - begin) * i // lines for i in range(lines + 1)]
    for first, last in itertools.pairwise(cuts):
      part = {
        name: (total[..., first:last], count[..., first:last])
        for name, (total, count) in sums.items()
      }
      at = begin + last
      self._write_line(part, at, last - first, rate, (validation or {}) if at == end else {})

  def _write_line(
    self, sums: PyTree, end: int, steps: int, rate: float, validation: Mapping[str, Any]
  ) -> None:
    """Writes the line of so many steps up to ``end``."""
    record = _means(sums)
    for name, schedule in self._schedules.items():
      # A keyword may be called as a term is, or as what else a line has: neither hides the other.
      record[f"schedule/{name}" if name in sums or name in RESERVED else name] = float(
        schedule(end - 1)
      )
    record |= {f"validation/{name}": value for name, value in validation.items()}
    record |= {"epoch": end / self._epoch, "examples_per_second": round(rate, 1)}
    self._metrics.write(end, record)
    self._counted = self._counted or _counts_any(sums)
    if not self._counted and end >= min(self._epoch, self._steps):
      self._counted = True
      warnings.warn(
        f"in {end:,} steps no term of the objective has counted an example: every weight, or every "
        "mask, was 0, and nothing was learned. Look at the data's weights and labels.",
        stacklevel=2,
      )
    if self._tracked is not None:
      self._tracked.log(end, record)
    shown = {"loss": record["loss"]}
    if self._select in validation:
      shown[f"validation {self._select}"] = record[f"validation/{self._select}"]
    self._bar.update(steps, {name: f"{np.mean(value):.4f}" for name, value in shown.items()})
    if self._callback is not None:
      self._callback(end, self.history[-1])

  def say(self, text: str) -> None:
    """Prints a line where the bar is shown."""
    self._bar.say(text)

  def close(self) -> None:
    """Closes the bar, and leaves the trackers where the run did not come to its end."""
    self._bar.close()
    if self._tracked is not None:
      self._tracked.finish()


def _means(sums: PyTree) -> dict[str, Any]:
  """Sums of each step ``[..., steps]`` to means over the chunk ``[...]``.

  What counted no example in any student is left out: a 0 would pass for a measurement.
  """
  means = {}
  for name, (total, count) in sums.items():
    summed = np.asarray(count, np.float64).sum(axis=-1)
    if np.any(summed):
      total = np.asarray(total, np.float64).sum(axis=-1)
      means[name] = np.where(summed == 0, np.nan, total / np.where(summed == 0, 1, summed))
  return means


@contextlib.contextmanager
def claimed_folder(
  folder: str | os.PathLike[str],
  settings: Mapping[str, Any],
  traced: Mapping[str, runs.Traced],
  shorter: Mapping[str, Any] | None = None,
) -> Iterator[pathlib.Path]:
  """The run's folder; one newly claimed is given back where the run fails before a checkpoint.

  Args:
    folder: the run's folder.
    settings: what defines the run, for its ``config.json``.
    traced: what it computes, which defines it too.
    shorter: the settings of the same run with fewer steps, which is made longer; see `runs.claim`.

  Yields:
    The folder.

  Raises:
    FileExistsError: another process is at work in it.
    OSError: it cannot be written.
    ValueError: it holds another run.
  """
  place = _check.folder("folder", folder)
  first = jax.process_index() == 0
  with contextlib.ExitStack() as stack:
    claim = functools.partial(runs.claim, place, settings, traced, shorter=shorter)
    fresh, problem = not (place / "config.json").exists(), None
    if first:
      try:
        stack.enter_context(runs.hold(place))
        claim()
      except (OSError, ValueError) as error:
        problem = error
    refused = _mesh.agree(int(problem is not None))  # the others look after it
    if problem is not None:
      raise problem
    if not first:
      claim()
    if refused:
      raise RuntimeError(f"process 0 was refused the folder {place}, and says why.")
    try:
      yield place
    except BaseException:
      if fresh and first:
        runs.release(place)
      raise


def check_validation(found: Any, select: str | None) -> dict[str, np.ndarray]:
  """What a user's ``validate`` returned, as arrays of numbers.

  Args:
    found: what it returned.
    select: the metric that must be among them, or None.

  Returns:
    ``{name: number}``; arrays over seeds.

  Raises:
    TypeError: it is no mapping to numbers.
    ValueError: ``select`` is not among them.
  """
  if not isinstance(found, Mapping):
    raise TypeError(f"validate must return {{name: number}}, got {show(found)}.")
  numbers = {name: np.asarray(value) for name, value in found.items()}
  for name, value in numbers.items():
    if value.dtype.kind not in "iufb" or value.ndim > 1:
      raise TypeError(
        f"validate must return {{name: number}} (or one number for each seed), and gave "
        f"{show(found[name])} for {name!r}."
      )
  if select is not None and select not in numbers:
    raise ValueError(
      f"select={select!r} is not among what validate returns, {sorted(numbers)}; name one of "
      "these (higher is better, unless better='lower' says so)."
    )
  return numbers


def check_counted(sums: PyTree, has_labels: bool, source: str) -> None:
  """Raises where no example has counted in any term, of data that has no labels.

  Args:
    sums: ``{name: (sum, count)}`` on the host.
    has_labels: whether the data has.
    source: the data's name.

  Raises:
    ValueError: nothing would ever be learned.
  """
  if not has_labels and not _counts_any(sums):
    raise nothing_counts(source)


def _counts_any(sums: PyTree) -> bool:
  """Whether an example counted in any term."""
  return any(np.any(np.asarray(count)) for count in counts_of(sums))


def check_finite(sums: PyTree, begin: int) -> None:
  """Raises for the first step at which a term was not finite; the terms come before their sum.

  Args:
    sums: ``{name: (sum, count)}`` on the host, with an axis over steps last.
    begin: the step before the first of them.

  Raises:
    FloatingPointError: a sum is not finite; names the terms and the step.
  """
  bad = {name: ~np.isfinite(np.asarray(total)) for name, (total, _) in sums.items()}
  first = {
    name: int(np.argmax(b.reshape(-1, b.shape[-1]).any(axis=0)))
    for name, b in bad.items()
    if b.any()
  }
  if not first:
    return
  at = min(first.values())
  names = [name for name, step in first.items() if step == at]
  terms = [name for name in names if name != "loss"] or names
  raise FloatingPointError(
    f"term {', '.join(map(repr, terms))} is not finite at step {begin + at + 1}. The last good "
    "checkpoint is kept; lower the learning rate or the term's weight, clip gradients, or look at "
    "that batch."
  )


def check_state(state: State, at: int) -> None:
  """Raises where a state is not finite: nothing of that is validated or saved.

  A gradient can be NaN where the loss is finite.

  Args:
    state: the training state.
    at: its step.

  Raises:
    FloatingPointError: a part of the state is not finite; names it and the step.
  """
  parts = ("params", "model_state", "objective_params", "objective_state")
  for name in runs.holding("not finite", {name: getattr(state, name) for name in parts}):
    raise FloatingPointError(
      f"{name} is not finite after step {at}, though the loss was: a gradient is not. The last "
      "good checkpoint is kept; look for a square root, a norm or a division at 0 in the loss."
    )


@dataclasses.dataclass(frozen=True)
class Intervals:
  """At which steps the loop stops to log, to validate, to save."""

  steps: int
  log: int
  validate: int
  save: int

  @classmethod
  def of(
    cls, steps: int, epoch: int, log: int | None, validate: int | None, save: int | None
  ) -> Intervals:
    """Fills in what was left out; every number is at least 1."""
    validate = epoch if validate is None else validate
    named = {
      "steps": steps,
      "log_every": min(epoch, 100) if log is None else log,
      "validate_every": validate,
      "checkpoint_every": validate if save is None else save,
    }
    return cls(*(_check.whole(name, value) for name, value in named.items()))

  @property
  def longest(self) -> int:
    """The most steps between two stops."""
    return min(self.steps, self.log, self.validate, self.save)

  def next_stop(self, at: int) -> int:
    """The next step at which something is due; the same grid whatever step a run goes on from."""
    # The log's grid starts anew at each validation: no line is cut in two by one.
    base = at - at % self.validate
    log = base + self.log * ((at - base) // self.log + 1)
    due = (log, *(every * (at // every + 1) for every in (self.validate, self.save)))
    return min(self.steps, *due)

  def validates(self, at: int) -> bool:
    """Whether a validation is due after this step."""
    return at == self.steps or at % self.validate == 0

  def validations(self, at: int) -> int:
    """How many are still due after this step."""
    return math.ceil(self.steps / self.validate) - at // self.validate

  def saves(self, at: int) -> bool:
    """Whether a checkpoint is due after this step."""
    return at == self.steps or at % self.save == 0
