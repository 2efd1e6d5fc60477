"""A bar for what takes its time."""

from __future__ import annotations

from typing import Any

__all__ = ["progress_bar"]


def progress_bar(total: int, label: str | None, *, unit: str = "step", initial: int = 0) -> Any:
  """A progress bar; ``update(count)`` moves it and ``close()`` ends it.

  Args:
    total: how many units there are.
    label: what is done; None for silence.
    unit: of what.
    initial: how many were done before.

  Returns:
    A tqdm bar.

  >>> with progress_bar(2, None) as shown:
  ...   _ = shown.update(2)
  """
  import tqdm.auto as tqdm  # a tenth of a second, and only who waits needs it

  return tqdm.tqdm(total=total, initial=initial, desc=label, unit=unit, disable=label is None)
