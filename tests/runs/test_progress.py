"""Progress: a line every few seconds in a log, a bar in a terminal, and where it was saved."""

import contextlib
import os
import pty
import re
import subprocess
import sys
import termios
import types

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


def in_terminal(program, **variables):
  """What a program writes to a terminal of 100 columns."""
  ours, theirs = pty.openpty()
  termios.tcsetwinsize(theirs, (24, 100))
  done = subprocess.run(
    [sys.executable, "-c", program], stderr=theirs, timeout=120, env={**os.environ, **variables}
  )
  os.close(theirs)
  told = ""
  with contextlib.suppress(OSError):  # what Linux answers where nobody writes any more
    while piece := os.read(ours, 10_000).decode():
      told += piece
  os.close(ours)
  assert done.returncode == 0, told
  return told


@pytest.mark.slow
@pytest.mark.parametrize("terminal", ["xterm", "dumb"])
def test_a_terminal_has_a_bar_where_it_can_be_drawn_over(terminal):
  program = """
from jaxdistill import runs
with runs.progress_bar(3, "student [a]") as shown:
  shown.update(1, {"loss": "0.5"})
  with runs.progress_bar(7, "cache") as inner:
    inner.update(7)
  shown.say("beside [it]")
  shown.update(2)
"""
  told = in_terminal(program, TERM=terminal)
  # Brackets are no markup, and bars may lie within bars.
  assert all(text in told for text in ("student [a]", "loss 0.5", "beside [it]"))
  assert ("3/3" in told) == ("7/7" in told) == (terminal == "xterm")
  assert ("3 of 3" in told) == ("7 of 7" in told) == (terminal == "dumb")


class Kernel:
  """IPython of a notebook, as far as it is asked; `outputs` are what its cell shows."""

  def __init__(self):
    self.kernel, self.outputs, self.shown = object(), {}, 0

  def get_ipython(self):
    return self

  def display(self, data, *, raw, display_id):
    assert raw
    assert display_id
    self.outputs[len(self.outputs)] = data
    return Output(self, len(self.outputs) - 1)


class Output:
  def __init__(self, kernel, place):
    self.kernel, self.place = kernel, place

  def update(self, data, *, raw):
    self.kernel.outputs[self.place] = data
    self.kernel.shown += 1


def test_a_notebook_has_one_output_that_stays(clock, monkeypatch, capsys):
  kernel = Kernel()
  kernel.display_module = types.SimpleNamespace(display=kernel.display)
  fake = types.SimpleNamespace(get_ipython=kernel.get_ipython, display=kernel.display_module)
  monkeypatch.setitem(sys.modules, "IPython", fake)
  monkeypatch.setitem(sys.modules, "IPython.display", fake.display)
  with runs.progress_bar(1000, "a < b") as shown:
    for _ in range(1000):
      clock[0] += 0.01
      shown.update(1, {"loss": "0.5"})
    shown.say("beside it")
  (output,) = kernel.outputs.values()
  assert "a < b: 1,000 of 1,000" in output["text/plain"]
  assert "loss 0.5" in output["text/plain"]
  assert 'value="1000" max="1000"' in output["text/html"]
  assert "a &lt; b" in output["text/html"]
  # Ten seconds of steps are a hundred messages to a browser and not a thousand.
  assert kernel.shown <= 101
  assert capsys.readouterr().err == "beside it\n"


@pytest.mark.slow
def test_a_stored_notebook_shows_how_far_it_came(tmp_path):
  nbformat = pytest.importorskip("nbformat")
  nbclient = pytest.importorskip("nbclient")
  cell = "from jaxdistill import runs\nwith runs.progress_bar(3, 'student') as s:\n  s.update(3)"
  notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
  nbclient.NotebookClient(notebook, kernel_name="python3", timeout=120).execute()
  (output,) = notebook.cells[0].outputs
  assert output.output_type == "display_data"
  assert "3 of 3" in output.data["text/plain"]
  assert "<progress" in output.data["text/html"]
