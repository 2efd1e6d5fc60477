"""Numbers as texts and rows as tables, each form once, so that equal things look equal.

What is unknown or undefined is a dash.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = [
  "DASH",
  "count",
  "csv_text",
  "grid",
  "number",
  "percent",
  "plain",
  "signed",
  "size",
  "times",
  "with_std",
]

DASH = "–"


def with_std(mean: float | None, std: float | None, places: int = 2) -> str:
  """A mean and its standard deviation, which one run has not.

  >>> with_std(0.5, 0.01), with_std(0.5, None, 4), with_std(None, None)
  ('0.50 ± 0.01', '0.5000', '–')
  """
  if mean is None:
    return DASH
  return f"{mean:.{places}f}" + ("" if std is None else f" ± {std:.{places}f}")


def percent(spread: Mapping[str, Any] | None) -> str:
  """A share as a percentage, with its standard deviation where it has one.

  >>> percent({"mean": 0.5, "std": 0.01}), percent(None)
  ('50.00 ± 1.00', '–')
  """
  mean, std = ((spread or {}).get(name) for name in ("mean", "std"))
  return with_std(None if mean is None else 100 * mean, None if std is None else 100 * std)


def number(spread: Mapping[str, Any] | None) -> str:
  """A number to four places, with its standard deviation where it has one.

  >>> number({"mean": 0.5, "std": None})
  '0.5000'
  """
  mean, std = ((spread or {}).get(name) for name in ("mean", "std"))
  return with_std(mean, std, 4)


def count(value: float | None) -> str:
  """A count to three digits.

  >>> count(909_312), count(None)
  ('909 k', '–')
  """
  if value is None:
    return DASH
  for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
    if value >= unit:
      return f"{value / unit:.3g} {name}"
  return f"{value:.3g}"


def signed(value: float, places: int = 2) -> str:
  """A number with its sign, a true minus.

  >>> signed(-1.234), signed(0.5, 1)
  ('−1.23', '+0.5')
  """
  return f"{value:+.{places}f}".replace("-", "−")


def grid(lines: Sequence[Sequence[str]]) -> str:
  """Rows as a Markdown table that is aligned as plain text too; the first is its head.

  >>> print(grid([["", "a"], ["b", "1"]]))
  |   |  a |
  | - | -: |
  | b |  1 |
  """
  cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in lines]
  widths = [max(2 * (i > 0), *(len(row[i]) for row in cells)) for i in range(len(cells[0]))]

  def line(row: Sequence[str]) -> str:
    padded = [
      row[0].ljust(widths[0]),
      *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
    ]
    return "| " + " | ".join(padded) + " |"

  rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
  return "\n".join([line(cells[0]), line(rule), *(line(row) for row in cells[1:])])


def size(value: float | None) -> str:
  """Bytes in a unit that suits them.

  >>> size(16_040)
  '16 kB'
  """
  if value is None:
    return DASH
  return f"{value:g} bytes" if value < 1e3 else f"{count(value)}B"


def plain(value: float | None, digits: int = 4) -> str:
  """A number in full, a cost for example: below a thousand to that many digits.

  >>> plain(93_040), plain(0.45953), plain(None)
  ('93,040', '0.4595', '–')
  """
  if value is None:
    return DASH
  if abs(value) < 1000:
    return f"{value:,.{digits}g}"
  return f"{value:,.0f}" if float(value).is_integer() or digits < 6 else f"{value:,.{digits}g}"


def times(value: float) -> str:
  """How many times, to two digits.

  >>> times(0.4271), times(1234.5)
  ('0.43', '1,234')
  """
  return f"{value:.2g}" if value < 100 else f"{value:,.0f}"


def csv_text(lines: Iterable[Sequence[Any]]) -> str:
  """Rows as CSV; the first is its head.

  >>> csv_text([["a", "b"], [1, "x, y"]]).splitlines()
  ['a,b', '1,"x, y"']
  """
  text = io.StringIO()
  csv.writer(text, lineterminator="\n").writerows(lines)
  return text.getvalue()
