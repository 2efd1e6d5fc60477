"""What runs in a thread beside something, until that has ended."""

import threading
import time

import pytest

from jaxdistill._beside import beside


@pytest.mark.parametrize("left_by", ["its end", "an exception"])
def test_what_runs_beside_ends_though_a_handler_raises_while_it_is_told(left_by, monkeypatch):
  class Interrupted(threading.Event):
    def set(self):
      if not told and threading.get_ident() == threading.main_thread().ident:
        told.append(True)
        raise KeyboardInterrupt  # as a signal's handler does, between any two instructions
      super().set()

  told, threads = [], []
  monkeypatch.setattr(threading, "Event", Interrupted)

  def work(ended):
    threads.append(threading.current_thread())
    ended.wait()

  def surrounded():
    with beside(work):
      while not threads:
        time.sleep(0.01)
      if left_by == "an exception":
        raise ValueError

  with pytest.raises(KeyboardInterrupt):
    surrounded()
  assert told
  assert not threads[0].is_alive()
