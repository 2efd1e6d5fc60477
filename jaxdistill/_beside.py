"""What is done in a thread beside something, for as long as that lasts."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["beside"]


@contextlib.contextmanager
def beside(work: Callable[[threading.Event], Any]) -> Iterator[None]:
  """Runs a function in a thread while what this surrounds is done, and waits for its end.

  Args:
    work: gets an event that is set when what this surrounds has ended.
  """
  ended = threading.Event()
  thread = threading.Thread(target=work, args=(ended,), daemon=True)

  def finish() -> None:
    ended.set()
    if thread.is_alive():
      thread.join()

  try:
    thread.start()
    yield
  finally:
    # A signal's handler may raise anywhere, here too, and what never heard of its end would go on,
    # sending signals to whoever listens after us.
    try:
      finish()
    finally:
      finish()
