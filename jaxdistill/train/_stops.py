"""How trainings end before their time: signals, a limit, and of several at once the end of one.

A handler of signals raises nothing under a training: it keeps what it heard, and whoever trains
asks at the end of each chunk, saves, and leaves by `Stopped`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils

from jaxdistill import _check
from jaxdistill._beside import beside

__all__ = ["Stopped", "concurrently", "stop_signal", "stopped", "time_limit"]

T = TypeVar("T")


class Stopped(SystemExit):
  """A run was asked to stop (SIGTERM, Ctrl-C, its time is up): it is saved, and goes on from there.

  Where nobody catches it, Python leaves with the status 143, as a process does that SIGTERM ends;
  with 130 after Ctrl-C, which is a ``KeyboardInterrupt`` too.
  """

  status = 128 + signal.SIGTERM

  def __init__(self, message: str) -> None:
    super().__init__(self.status)
    self.message = message

  def __str__(self) -> str:
    return self.message


class _Interrupted(Stopped, KeyboardInterrupt):
  status = 128 + signal.SIGINT


def stopped(number: int, message: str) -> Stopped:
  """What a run is left by that a signal has stopped.

  Args:
    number: the signal's.
    message: how far it is, and how it goes on.

  >>> isinstance(stopped(signal.SIGINT, "saved."), KeyboardInterrupt)
  True
  """
  return (_Interrupted if number == signal.SIGINT else Stopped)(message)


class _Notice:
  """A handler of signals that keeps what it heard.

  What a handler raises is lost where a destructor or a callback of the garbage collector is at
  work: Python prints it and goes on. So whoever listens asks the notice.

  Args:
    answer: what else is done when a signal is heard.

  Attributes:
    heard: the SIGTERMs, shared with the notices that it was set up within.
    own: what only this one heard: Ctrl-C.
    called: what stops those that train `concurrently` beside one that has ended, shared likewise.
  """

  def __init__(self, answer: Callable[[], None]) -> None:
    outer = signal.getsignal(signal.SIGTERM)
    # Lists, for a handler may append at any moment; the lock of an Event its own thread may hold.
    self.heard: list[int] = outer.heard if isinstance(outer, _Notice) else []
    self.called: list[int] = outer.called if isinstance(outer, _Notice) else []
    self.own: list[int] = []
    self._answer = answer

  def __call__(self, number: int, frame: object) -> None:
    if signal.SIGINT in self.own and number == signal.SIGINT:
      raise KeyboardInterrupt("left at once, at the second Ctrl-C: what was saved before is kept.")
    (self.own if number == signal.SIGINT else self.heard).append(number)
    self._answer()

  @contextlib.contextmanager
  def listening(self, *numbers: int) -> Iterator[None]:
    """Hears these signals, and puts their former handlers back."""
    with contextlib.ExitStack() as stack:
      for number in numbers:
        stack.callback(signal.signal, number, signal.signal(number, self))
      yield


@contextlib.contextmanager
def stop_signal(*, listening: bool, after: float | None = None) -> Iterator[Callable[[int], int]]:
  """Gives ``step -> the signal to stop by``, 0 for none; former handlers are put back afterwards.

  SIGTERM, Ctrl-C (the second leaves at once), and what a `time_limit` around it heard. A signal
  that came too late to stop what runs under it is handed on.

  Args:
    listening: whether signals are heard here.
    after: seconds after which it says so without a signal; None for never.
  """
  several, before_us = jax.process_count() > 1, signal.getsignal(signal.SIGINT)
  # Several processes stop at the same step by JAX's own service, which hears of SIGTERM alone.
  notice = _Notice(_terminate if several else lambda: None)
  known, over = len(notice.heard), list[int]()
  with contextlib.ExitStack() as stack:
    if after is not None:
      finish = _terminate if several else functools.partial(over.append, signal.SIGTERM)
      stack.enter_context(beside(lambda ended: ended.wait(after) or finish()))
    if listening and threading.current_thread() is threading.main_thread():
      # Python takes signals there alone. A Ctrl-C that is ignored or somebody else's stays so.
      ours = before_us is signal.default_int_handler or isinstance(before_us, _Notice)
      numbers = ([] if several else [signal.SIGTERM]) + ([signal.SIGINT] if ours else [])
      stack.enter_context(notice.listening(*numbers))
    if several and listening:
      yield lambda step: signal.SIGTERM if _agreed() else 0
    else:
      yield lambda step: (notice.heard + notice.own + notice.called + over + [0])[0]
  if listening and not several:
    # They came when there was nothing left to stop: whoever listens outside has to hear of it, or a
    # script would begin its next training as if nobody had asked.
    for number in notice.heard[known:] + notice.own:
      os.kill(os.getpid(), number)


@contextlib.contextmanager
def concurrently() -> Iterator[Callable[..., Future[Any]]]:
  """Trains in a thread what the next trainings need nothing of: a baseline beside its teacher.

  Small networks leave a core idle, and large ones their device while they are compiled: a training
  by itself traces, compiles and steps in turn. Here what is handed to the context's function goes
  on in a thread of its own while the script goes on too. The numbers are those of one after
  another; memory is that of both. To be used in the main thread, which alone hears of signals; what
  is set of JAX by ``with`` is of the thread that said it.

  Where there are several devices or processes, what is handed in is done at once, before the script
  goes on: sums over devices of two programs could wait for each other for ever.

  Yields:
    ``start(function, *args, **kwargs)``, which returns a `concurrent.futures.Future`; the end of
    the context waits for all of them.

  Raises:
    Stopped: SIGTERM, Ctrl-C or a `time_limit` around it has ended all of them; each is saved.
    Exception: what one of them was left by; the others have been stopped and saved before.

  >>> with concurrently() as start:
  ...   beside = start(sum, [1, 2])
  ...   alone = sum([3, 4])
  >>> beside.result(), alone
  (3, 7)
  """
  alone = jax.local_device_count() == jax.process_count() == 1
  started: list[Future[Any]] = []

  notice = _Notice(_leaving("SIGTERM"))
  notice.called = []  # those outside of this are nothing to those inside

  def ended(future: Future[Any]) -> None:
    if future.exception() is not None:
      notice.called.append(signal.SIGTERM)

  def start(function: Callable[..., T], *args: Any, **kwargs: Any) -> Future[T]:
    if not alone:
      done: Future[T] = Future()
      done.set_result(function(*args, **kwargs))
      return done
    future = pool.submit(function, *args, **kwargs)
    future.add_done_callback(ended)
    started.append(future)
    return future

  pool = concurrent.futures.ThreadPoolExecutor(thread_name_prefix="concurrently")
  try:
    with notice.listening(*([signal.SIGTERM] if alone else [])), pool:
      try:
        yield start
        for future in started:
          future.result()
      except BaseException:
        notice.called.append(signal.SIGTERM)
        raise
  except Stopped:
    # One of them stopped the others by what it was left by: that is what happened.
    for future in started:
      error = future.exception()
      if error is not None and not isinstance(error, Stopped):
        raise error from None
    raise


def _agreed() -> bool:
  """Whether the processes stop at this call, since one of them was asked to.

  JAX's service answers at the call after the highest that it was asked for, so calls are counted,
  and not steps: the next chunk ends many steps later.
  """
  return bool(multihost_utils.reached_preemption_sync_point(next(_CALLS)))


# Over all runs of a process, as the service counts; all processes make the same calls.
_CALLS = itertools.count(1)
_AGAIN = 0.5  # seconds until a signal is sent again by which nobody has left


@contextlib.contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
  """Ends what a script trains after so many seconds, as SIGTERM would: saved, to be gone on with.

  For a script of several trainings, sweeps or searches that share one limit, as the experiments'
  ``--stop-after`` does; a single one takes `jaxdistill.train.Run`'s ``stop_after``. Whatever is
  under way then finishes its chunk of steps, saves, and leaves by `Stopped`; between two trainings
  there is nothing to save, and the script leaves at once (one of several processes, when this
  ends). Leave room for a chunk and a checkpoint. To be used in the main thread, which alone hears
  of signals.

  Args:
    seconds: from now on; None for no limit.

  Raises:
    ValueError: the number is not above 0.
    Stopped: the time is up.
  """
  if seconds is None:
    yield
    return
  _check.number("seconds", seconds, above=0)
  end, several = time.monotonic() + seconds, jax.distributed.is_initialized()
  leave = _leaving(f"SIGTERM, or the time limit of {seconds:g} s")
  notice = _Notice(leave)

  def insist(ended: threading.Event) -> None:
    # Until it is left: what the first signal raised may have been lost, see `_Notice`.
    late = False
    while not ended.wait(_AGAIN if late else min(_AGAIN, max(0, end - time.monotonic()))):
      late = time.monotonic() >= end or bool(notice.heard)
      if late:
        _terminate()

  # The service of several processes hears SIGTERM itself, and no longer where Python does.
  with notice.listening(*([] if several else [signal.SIGTERM])), beside(insist):
    yield
  if notice.heard or (several and _agreed()):
    leave()


def _leaving(why: str) -> Callable[[], None]:
  """What leaves a script between two trainings, where there is nothing to save."""

  def leave() -> None:
    if not isinstance(sys.exception(), Stopped):  # else it is being left already
      raise Stopped(f"stopped between two trainings ({why}): start it again, and it goes on.")

  return leave


def _terminate() -> None:
  os.kill(os.getpid(), signal.SIGTERM)
