"""Where a training run stops on its way: to log, to validate, to save; or when it is asked to."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from jaxdistill import arguments

__all__ = ["Intervals", "Stopped", "stop_signal"]


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
    return cls(*(arguments.whole(name, value) for name, value in named.items()))

  def next_stop(self, at: int) -> int:
    """The next step at which something is due; the same grid whatever step a run goes on from."""
    # The log's grid starts anew at each validation, so that chunks have two or three lengths, each
    # of which is compiled once, and not as many as two grids that drift apart have gaps.
    base = at - at % self.validate
    log = base + self.log * ((at - base) // self.log + 1)
    due = (log, *(every * (at // every + 1) for every in (self.validate, self.save)))
    return min(self.steps, *due)

  def validates(self, at: int) -> bool:
    """Whether a validation is due after this step."""
    return at == self.steps or at % self.validate == 0

  def saves(self, at: int) -> bool:
    """Whether a checkpoint is due after this step."""
    return at == self.steps or at % self.save == 0


class Stopped(SystemExit):
  """A run was asked to stop (SIGTERM): it has saved where it stands, and goes on from there.

  Where nobody catches it, Python leaves with the status 143, as a process does that SIGTERM ends.
  """

  def __init__(self, message: str) -> None:
    super().__init__(128 + signal.SIGTERM)
    self.message = message

  def __str__(self) -> str:
    return self.message


@contextlib.contextmanager
def stop_signal(*, listening: bool) -> Iterator[Callable[[int], bool]]:
  """Gives ``step -> whether SIGTERM came``; the former handler is put back afterwards."""
  if not listening:
    yield lambda step: False
  elif jax.process_count() > 1:
    # JAX's own service: one process that gets the signal stops all of them at the same step.
    yield multihost_utils.reached_preemption_sync_point
  elif threading.current_thread() is not threading.main_thread():
    yield lambda step: False  # Python takes signals in its main thread alone
  else:
    asked = threading.Event()
    former = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
      yield lambda step: asked.is_set()
    finally:
      signal.signal(signal.SIGTERM, former)
