"""What one sees of that which takes its time: a bar in a terminal, lines in a log."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from time import monotonic
from typing import Any

from jaxdistill import _extras

__all__ = ["Progress", "progress_bar", "say_saved"]

_EVERY = 10.0  # seconds between two lines: an hour's log has 360 of them


class Progress:
  """How far something is; `progress_bar` makes it.

  Args:
    total: how many units there are.
    label: what is done; None for silence.
    unit: of what.
    initial: how many were done before.
    every: seconds between two lines.
    bar: a tqdm bar to show it on; None writes lines to the standard error.
  """

  def __init__(
    self, total: int, label: str | None, *, unit: str, initial: int, every: float, bar: Any
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
    if self._bar is not None:
      self._bar.set_postfix(self._shown, refresh=False)
      self._bar.update(count)
    elif self._done != self._said and monotonic() - self._since >= self._every:
      self._line()

  @property
  def left(self) -> int:
    """How many units there are still."""
    return self._total - self._done

  def say(self, text: str) -> None:
    """Writes a line of its own beside it; nothing where there is no label."""
    if self._label is None:
      return
    if self._bar is not None:
      self._bar.clear()
    print(text, file=sys.stderr, flush=True)

  def close(self) -> None:
    """Ends the bar, or writes how far it came."""
    if self._bar is not None:
      self._bar.close()
    elif self._done != self._said:
      self._line()

  def _line(self) -> None:
    """Writes a line; the rate is that since the line before."""
    now = monotonic()
    rate = (self._done - self._said) / max(now - self._since, 1e-9)
    self._said, self._since = self._done, now
    units = f"{self._unit}{'es' if self._unit.endswith('ch') else 's'}"
    parts = [f"{self._unit} {self._done:,} of {self._total:,}"]
    parts += [f"{name} {value}" for name, value in self._shown.items()]
    parts.append(
      f"{rate:,.1f} {units} a second" if rate >= 1 else f"{1 / rate:,.1f} s a {self._unit}"
    )
    self.say(f"{self._label}: {', '.join(parts)}")

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
  bar = None
  if label is not None and _live() and _extras.there("tqdm"):
    import tqdm.auto as tqdm  # a tenth of a second, and only who waits needs it

    bar = tqdm.tqdm(total=total, initial=initial, desc=label, unit=unit)
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


def _live() -> bool:
  """Whether what is shown can be drawn over: a terminal, or a notebook's cell."""
  if sys.stderr is not None and sys.stderr.isatty():
    return True
  ipython = sys.modules.get("IPython")
  return ipython is not None and hasattr(ipython.get_ipython(), "kernel")
