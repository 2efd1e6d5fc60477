"""Progress: a line every few seconds in a log, a bar in a terminal, and where it was saved."""

import contextlib
import os
import pty
import re
import subprocess
import sys
import termios

import pytest

from jaxdistill import runs
from jaxdistill.runs import _progress


@pytest.fixture
def clock(monkeypatch):
  """Seconds that pass only when they are told to."""
  time = [100.0]
  monkeypatch.setattr(_progress, "monotonic", lambda: time[0])
  return time


def test_a_log_has_a_line_for_each_interval_and_one_at_the_end(clock, capsys):
  with runs.progress_bar(1000, "student", every=5) as shown:
    for _ in range(1000):
      clock[0] += 0.0313
      shown.update(1, {"loss": "0.5000"})
  told = capsys.readouterr().err
  lines = told.splitlines()
  assert "\r" not in told
  assert len(lines) == int(31.3 / 5) + 1
  steps = [int(re.search(r"([\d,]+) of 1,000", line)[1].replace(",", "")) for line in lines]
  assert steps == sorted(steps)
  assert steps[-1] == 1000
  assert all(line.startswith("student:") and "loss 0.5000" in line for line in lines)
  for line in lines:
    assert float(re.search(r"([\d.]+) steps a second", line)[1]) == pytest.approx(31.9, abs=0.1)


def test_what_is_slow_has_its_seconds_and_a_resumed_run_its_own_rate(clock, capsys):
  shown = runs.progress_bar(10, "cache", unit="batch", initial=4, every=5)
  clock[0] += 8
  shown.update(0)  # a long wait, and nothing done
  assert capsys.readouterr().err == ""
  shown.update(2)
  told = capsys.readouterr().err
  assert "6 of 10" in told
  assert "4.0 s a batch" in told  # 8 seconds for two, not for six
  shown.close()
  assert capsys.readouterr().err == ""  # nothing has moved since


def test_no_label_is_silence(clock, capsys):
  with runs.progress_bar(10, None, every=1) as shown:
    clock[0] += 5
    shown.update(10)
    shown.say("unheard")
  runs.say_saved(None, "runs/a")
  assert capsys.readouterr().err == ""
  runs.say_saved("student", "runs/a")
  assert "runs/a" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("tqdm", ["there", "absent"])
def test_a_terminal_has_a_bar_where_it_can(tqdm):
  program = "import sys\n" + ("sys.modules['tqdm'] = None\n" if tqdm == "absent" else "")
  program += "from jaxdistill import runs\n"
  program += "with runs.progress_bar(3, 'student') as shown:\n  shown.update(3, {'loss': '0.5'})\n"
  ours, theirs = pty.openpty()
  termios.tcsetwinsize(theirs, (24, 100))
  done = subprocess.run([sys.executable, "-c", program], stderr=theirs, timeout=120)
  os.close(theirs)
  told = ""
  with contextlib.suppress(OSError):  # what Linux answers where nobody writes any more
    while piece := os.read(ours, 10_000).decode():
      told += piece
  os.close(ours)
  assert done.returncode == 0, told
  assert "loss" in told
  assert ("3/3" in told) == (tqdm == "there")
  assert ("3 of 3" in told) == (tqdm == "absent")
