"""What one sees of that which takes its time: a bar in a terminal or a notebook, lines in a log."""

from __future__ import annotations

import functools
import html
import os
import sys
from collections.abc import Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
  from rich.console import Console

__all__ = ["Progress", "progress_bar", "say_saved"]

_EVERY = 10.0  # seconds between two lines: an hour's log has 360 of them
_REDRAWN = 0.1  # seconds between two drawings of a bar; each is bytes to a terminal or a browser


class _Bar(Protocol):
  """What is drawn over as things go on."""

  def show(self, done: int, said: str) -> None: ...

  def say(self, text: str) -> None: ...

  def close(self) -> None: ...


@functools.cache
def _console() -> Console:
  """The terminal's: bars within bars need one that knows of all of them."""
  from rich.console import Console

  return Console(stderr=True)


class _InTerminal:
  """Rich's bar. It is drawn when something is shown, not by a thread."""

  def __init__(self, total: int, label: str, initial: int) -> None:
    from rich import progress

    self._drawn = progress.Progress(
      progress.TextColumn("{task.description}", markup=False),
      progress.BarColumn(),
      progress.MofNCompleteColumn(),
      progress.TimeRemainingColumn(),
      progress.TextColumn("{task.fields[said]}", markup=False),
      console=_console(),
      auto_refresh=False,
    )
    self._task = self._drawn.add_task(label, total=total, completed=initial, said="")
    self._drawn.start()

  def show(self, done: int, said: str) -> None:
    self._drawn.update(self._task, completed=done, said=said, refresh=True)

  def say(self, text: str) -> None:
    _console().print(text, markup=False, highlight=False, soft_wrap=True)

  def close(self) -> None:
    self._drawn.stop()


class _InNotebook:
  """A browser's own bar, in one output that is replaced: what a stored notebook shows is the last.

  It needs nothing but the notebook's IPython; bars made of widgets are blank where no kernel runs.
  """

  def __init__(self, total: int, label: str, initial: int) -> None:
    from IPython import display

    self._total, self._label = total, label
    self._output: Any = display.display(self._made(initial, ""), raw=True, display_id=True)

  def _made(self, done: int, said: str) -> dict[str, str]:
    text = f"{self._label}: {done:,} of {self._total:,}{', ' if said else ''}{said}"
    bar = f'<progress value="{done}" max="{self._total}"></progress> {html.escape(text)}'
    return {"text/plain": text, "text/html": bar}

  def show(self, done: int, said: str) -> None:
    self._output.update(self._made(done, said), raw=True)

  def say(self, text: str) -> None:
    print(text, file=sys.stderr, flush=True)

  def close(self) -> None:
    """The last output stays as it is."""


class Progress:
  """How far something is; `progress_bar` makes it.

  Args:
    total: how many units there are.
    label: what is done; None for silence.
    unit: of what.
    initial: how many were done before.
    every: seconds between two lines.
    bar: what to show it on; None writes lines to the standard error.
  """

  def __init__(
    self, total: int, label: str | None, *, unit: str, initial: int, every: float, bar: _Bar | None
  ) -> None:
    self._total, self._label, self._unit, self._every, self._bar = total, label, unit, every, bar
    self._done = self._said = initial
    self._since = monotonic()
    self._shown: Mapping[str, str] = {}

  def update(self, count: int, shown: Mapping[str, str] | None = None) -> None:
    """Moves on.

    Args:
      count: by how many units.
      shown: numbers to show beside it, by name.
    """
    self._done += count
    self._shown = self._shown if shown is None else shown
    every = self._every if self._bar is None else _REDRAWN
    if self._done != self._said and monotonic() - self._since >= every:
      self._tell()

  @property
  def left(self) -> int:
    """How many units there are still."""
    return self._total - self._done

  def say(self, text: str) -> None:
    """Writes a line of its own beside it; nothing where there is no label."""
    if self._label is None:
      return
    if self._bar is not None:
      self._bar.say(text)
    else:
      print(text, file=sys.stderr, flush=True)

  def close(self) -> None:
    """Ends the bar, or writes how far it came."""
    if self._done != self._said:
      self._tell()
    if self._bar is not None:
      self._bar.close()

  def _tell(self) -> None:
    """Draws the bar, or writes a line; the rate is that since the one before."""
    now = monotonic()
    rate = (self._done - self._said) / max(now - self._since, 1e-9)
    self._said, self._since = self._done, now
    units = f"{self._unit}{'es' if self._unit.endswith('ch') else 's'}"
    parts = [f"{name} {value}" for name, value in self._shown.items()]
    parts.append(
      f"{rate:,.1f} {units} a second" if rate >= 1 else f"{1 / rate:,.1f} s a {self._unit}"
    )
    if self._bar is not None:
      self._bar.show(self._done, ", ".join(parts))
    else:
      self.say(
        f"{self._label}: {', '.join([f'{self._unit} {self._done:,} of {self._total:,}', *parts])}"
      )

  def __enter__(self) -> Progress:
    return self

  def __exit__(self, *error: object) -> None:
    self.close()


def progress_bar(
  total: int,
  label: str | None,
  *,
  unit: str = "step",
  initial: int = 0,
  every: float = _EVERY,
) -> Progress:
  """A bar in a terminal or a notebook; elsewhere, as in a log, a line every few seconds.

  Args:
    total: how many units there are.
    label: what is done; None for silence.
    unit: of what.
    initial: how many were done before.
    every: seconds between two lines, where there is no bar.

  Returns:
    ``update(count)`` moves it and ``close()`` ends it.

  >>> with progress_bar(2, None) as shown:
  ...   shown.update(2)
  """
  bar: _Bar | None = None
  if label is not None and _notebook():
    bar = _InNotebook(total, label, initial)
  elif label is not None and _terminal():
    bar = _InTerminal(total, label, initial)
  return Progress(total, label, unit=unit, initial=initial, every=every, bar=bar)


def say_saved(label: str | None, folder: str | os.PathLike[str]) -> None:
  """Says, beside the progress, where something was saved.

  Args:
    label: that of the progress; None for silence.
    folder: where.

  >>> say_saved(None, "runs/a")
  """
  if label is not None:
    print(f"{label}: saved in {os.fspath(folder)}", file=sys.stderr, flush=True)


def _terminal() -> bool:
  """Whether lines can be drawn over."""
  there = sys.stderr is not None and sys.stderr.isatty()
  return there and os.environ.get("TERM") not in ("dumb", "unknown")


def _notebook() -> bool:
  """Whether this is a notebook's kernel."""
  ipython = sys.modules.get("IPython")
  return ipython is not None and hasattr(ipython.get_ipython(), "kernel")
