"""What the processes of a program tell one another, by JAX's own store of words.

The store needs no device, so that a thread can wait while the others compute, and gives back what
it was given, to the bit: float64 too, where JAX's arrays have none.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxdistill import _check

__all__ = ["Meetings", "alone", "company"]

# Milliseconds: a process that has died is noticed elsewhere, see `jaxdistill.train`.
_PATIENCE = 3_600_000
# Bytes that each process tells at once: what the store, which is process 0's, holds is bounded.
_AT_ONCE = 2**20
_LOOK_AGAIN = 0.5  # seconds
_ALONE = contextvars.ContextVar("alone", default=False)


@contextlib.contextmanager
def alone() -> Iterator[None]:
  """Marks what one process does while the others wait for its end: nobody is there to share it."""
  before = _ALONE.set(True)
  try:
    yield
  finally:
    _ALONE.reset(before)


def company() -> tuple[int, int]:
  """``(p, P)``: this process is the p-th of P at the same work; ``(0, 1)`` where it is alone."""
  if _ALONE.get():
    return 0, 1
  return jax.process_index(), jax.process_count()


class Meetings:
  """Where all processes meet, again and again, in the same order.

  What two threads of a process talk about has a place of meeting for each of them.

  Args:
    name: the place's.
  """

  def __init__(self, name: str) -> None:
    self._name, self._numbers = f"jaxdistill/{name}", itertools.count()

  def each(
    self, work: Callable[[], bytes], failed: type[Exception], *, watched: bool = False
  ) -> list[bytes]:
    """What each process has to say, once all of them have done their work.

    Args:
      work: this process's; it returns what it says, no more than a megabyte.
      failed: what is raised where another process's work failed.
      watched: whether the work is left alone, in a thread of its own, as soon as another process's
        has failed: it may wait for that one, and for minutes.

    Raises:
      Exception: what this process's own work raised, or ``failed``, which names the others that
        failed and says why.
    """
    number, problem = next(self._numbers), None
    try:
      word = b"+" + (self._watched(work, number) if watched else work())
    except Exception as error:
      problem, word = error, b"-" + _check.short(error).encode()
    said = self._exchanged(word, number)
    if problem is not None:
      raise problem
    bad = [f"process {i}: {one[1:].decode()}" for i, one in enumerate(said) if one[:1] == b"-"]
    if bad:
      raise failed("; ".join(bad))
    return [one[1:] for one in said]

  def gathered(self, mine: bytes) -> list[bytes]:
    """What every process has, in their order, a megabyte of each at a time.

    Args:
      mine: what this one has; of the same length in all.
    """
    parts: list[list[bytes]] = [[] for _ in range(jax.process_count())]
    for begin in range(0, len(mine), _AT_ONCE):
      said = self._exchanged(mine[begin : begin + _AT_ONCE], next(self._numbers))
      for part, piece in zip(parts, said, strict=True):
        part.append(piece)
    return [b"".join(part) for part in parts]

  def _watched(self, work: Callable[[], bytes], number: int) -> bytes:
    """What a piece of work says; nothing where another process has failed at it meanwhile."""
    done: concurrent.futures.Future[bytes] = concurrent.futures.Future()

    def run() -> None:
      try:
        done.set_result(work())
      except BaseException as error:
        done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    others = [process for process in range(jax.process_count()) if process != jax.process_index()]
    while True:
      with contextlib.suppress(TimeoutError):
        return done.result(_LOOK_AGAIN)
      for process in others:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # it has said nothing yet
          key = f"{self._name}/{number}/{process}"
          if _client().key_value_try_get_bytes(key)[:1] == b"-":
            return b""

  def _exchanged(self, word: bytes, number: int) -> list[bytes]:
    """What all processes say at this meeting, in their order."""
    client, me = _client(), jax.process_index()
    client.key_value_set_bytes(f"{self._name}/{number}/{me}", word)
    said = [
      client.blocking_key_value_get_bytes(f"{self._name}/{number}/{process}", _PATIENCE)
      for process in range(jax.process_count())
    ]
    if number:  # whoever is here has read what was said before
      client.key_value_delete(f"{self._name}/{number - 1}/{me}")
    return said


def _client() -> Any:
  from jax._src import distributed  # JAX has no public name for its store

  return distributed.global_state.client
