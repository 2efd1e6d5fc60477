"""The loop over chunks of steps: it logs, validates, saves and stops where that is due.

It never waits for the device inside a chunk, and looks at numbers one chunk late, unless something
has to be decided on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxdistill import mesh as mesh_lib
from jaxdistill.checkpoint import Checkpoints
from jaxdistill.mesh import Dispatch
from jaxdistill.program import Program
from jaxdistill.record import Log, check_counted, check_finite, check_state, check_validation
from jaxdistill.state import State, deployed_variables, from_items, to_items
from jaxdistill.stops import Intervals, Stopped

__all__ = ["begin", "drive"]

PyTree = Any


def begin(program: Program, saved: Checkpoints | None) -> tuple[State, int]:
  """The state to go on from, and its step; all processes take the one that process 0 found.

  Args:
    program: whose state it is.
    saved: the run's checkpoints, or None.

  Returns:
    The last good checkpoint's, else that at step 0.
  """
  found = saved.latest() if saved is not None and jax.process_index() == 0 else None
  step = mesh_lib.agree(-1 if found is None else found)
  if saved is None or step < 0:
    return program.initial(), 0
  shapes, objective = program.shapes, program.objective
  items = saved.restore(step, to_items(shapes, objective))
  return from_items(items, shapes, objective), step


def drive(
  program: Program,
  state: State,
  at: int,
  *,
  every: Intervals,
  dispatch: Dispatch,
  log: Log,
  saved: Checkpoints | None = None,
  validate: Callable[[PyTree], Mapping[str, Any]] | None = None,
  select: str = "accuracy",
  asked_to_stop: Callable[[int], bool] = lambda step: False,
  finite: bool = True,
) -> State:
  """Runs a program from a step to the last one.

  Args:
    program: what is run.
    state: the state at step ``at``; donated.
    at: the step to go on from.
    every: when something is due.
    dispatch: that of the program.
    log: where the numbers go.
    saved: where checkpoints go; process 0 writes them.
    validate: ``variables -> {name: number}``.
    select: the validation metric that scores a checkpoint.
    asked_to_stop: ``step -> whether to save and leave``.
    finite: whether a number that is not finite ends the run. Without, it is logged as it is, and
      whoever calls looks at the students one by one.

  Returns:
    The state after the last step.

  Raises:
    FloatingPointError: a term was not finite.
    Stopped: the process was asked to stop.
  """
  objective, first_process = program.objective, jax.process_index() == 0
  state = dispatch.spread(state)
  pending: dict[str, Any] | None = None
  while at < every.steps:
    end = every.next_stop(at)
    state, sums = program.run(state, at, end - at)
    if pending is not None:
      log.write(**_checked(pending, program, finite))
    pending, at = {"sums": sums, "begin": at, "end": end}, end
    stopping = at < every.steps and asked_to_stop(at)
    validating = validate is not None and every.validates(at)
    saving = saved is not None and (every.saves(at) or stopping)
    if not (validating or saving or at == every.steps):
      continue
    # Nothing is validated or saved before its numbers have been looked at.
    now, extra = dispatch.collect(state), {}
    pending = _checked(pending, program, finite)
    if finite:
      check_state(now, at)
    if validate is not None and validating:
      try:
        extra = check_validation(
          validate(deployed_variables(now, objective)), select if saved else None
        )
      except Exception:
        # What was trained until here is not lost with it.
        if saved is not None and first_process:
          saved.save(at, to_items(now, objective))
        raise
    log.write(**pending, validation=extra)
    pending = None
    if saved is not None and saving and first_process:
      score = float(np.mean(extra[select])) if select in extra else None
      saved.save(at, to_items(now, objective), score=score)
    if stopping:
      message = f"the run was asked to stop, and stands at step {at} of {every.steps}."
      if saved is not None:
        message += f" It is saved in {saved.folder.parent}: start it again, and it goes on."
      log.say(message)
      raise Stopped(message)
  return dispatch.collect(state)


def _checked(pending: dict[str, Any], program: Program, finite: bool) -> dict[str, Any]:
  """The sums on the host, all of them finite where that is asked for."""
  sums = jax.device_get(program.collect(pending["sums"]))
  if finite:
    check_finite(sums, pending["begin"])
  if pending["begin"] == 0:
    check_counted(sums, program.source.num_classes, program.source.name)
  return {**pending, "sums": sums}
