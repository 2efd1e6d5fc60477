"""Where a training run stops on its way: to log, to validate, to save; or when it is asked to."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from jaxdistill import arguments

__all__ = ["Intervals", "Stopped", "stop_signal", "time_limit"]


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
  """A run was asked to stop (SIGTERM, or its time is up): it has saved, and goes on from there.

  Where nobody catches it, Python leaves with the status 143, as a process does that SIGTERM ends.
  """

  def __init__(self, message: str) -> None:
    super().__init__(128 + signal.SIGTERM)
    self.message = message

  def __str__(self) -> str:
    return self.message


@contextlib.contextmanager
def stop_signal(*, listening: bool, after: float | None = None) -> Iterator[Callable[[int], bool]]:
  """Gives ``step -> whether to stop``; the former handler of SIGTERM is put back afterwards.

  Args:
    listening: whether to hear of anything at all.
    after: seconds after which it says so without a signal; None for never.
  """
  if not listening:
    yield lambda step: False
    return
  asked = threading.Event()
  several = jax.process_count() > 1
  with contextlib.ExitStack() as stack:
    if after is not None:
      # Several processes stop at the same step by JAX's own service, which hears of SIGTERM alone.
      stack.enter_context(_timer(after, _terminate if several else asked.set))
    if several:
      # One process that gets the signal stops all of them at the same call. The service answers at
      # the call after the highest that it was asked for, so calls are counted, and not steps: the
      # next chunk ends many steps later.
      yield lambda step: bool(multihost_utils.reached_preemption_sync_point(next(_CALLS)))
      return
    if threading.current_thread() is threading.main_thread():  # Python takes signals there alone
      former = signal.signal(signal.SIGTERM, lambda *_: asked.set())
      stack.callback(signal.signal, signal.SIGTERM, former)
    yield lambda step: asked.is_set()


# Over all runs of a process, as the service counts; all processes make the same calls.
_CALLS = itertools.count(1)


@contextlib.contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
  """Ends what a script trains after so many seconds, as SIGTERM would: saved, to be gone on with.

  For a script of several trainings, sweeps or searches that share one limit, as the experiments'
  ``--stop-after`` does; a single one takes `jaxdistill.train.fit`'s ``stop_after``. Whatever is
  under way then finishes its chunk of steps, saves, and leaves by `Stopped`; between two trainings
  there is nothing to save, and the script leaves at once. Leave room for a chunk and a checkpoint.
  To be used in the main thread, which alone hears of signals.

  Args:
    seconds: from now on; None for no limit.

  Raises:
    ValueError: the number is not above 0.
    Stopped: the time is up.
  """
  if seconds is None:
    yield
    return
  arguments.number("seconds", seconds, above=0)

  def leave(*_: Any) -> None:
    raise Stopped(f"the time limit of {seconds:g} s is over; start it again to go on.")

  former = signal.signal(signal.SIGTERM, leave)
  try:
    with _timer(seconds, _terminate):
      yield
  finally:
    signal.signal(signal.SIGTERM, former)


def _terminate() -> None:
  os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def _timer(seconds: float, call: Callable[[], None]) -> Iterator[None]:
  timer = threading.Timer(seconds, call)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()
    timer.join()
