"""Numbers and names as texts and rows as tables, each form once, so that equal things look equal.

What is unknown or undefined is a dash.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = [
  "DASH",
  "MODELS",
  "WORDS",
  "Cell",
  "Markup",
  "Reading",
  "Table",
  "Told",
  "change",
  "clean",
  "count",
  "csv_text",
  "escaped",
  "exact",
  "fenced",
  "grid",
  "interval",
  "listed",
  "number",
  "percent",
  "plain",
  "signed",
  "size",
  "tenths",
  "times",
  "whole",
  "with_std",
]

DASH = "–"
MODELS = ("teacher", "baseline", "student")
WORDS = {"teacher": "teacher", "baseline": "labels alone", "student": "student"}
# What neither HTML nor a font has: controls, and halves of a surrogate pair.
_ODD = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_MARKUP = re.compile(r"[\\`*\[\]<]")  # what begins markup inside of a line
_TICKS = re.compile(r"`+")


class Told(NamedTuple):
  """A text with what it is, for a page to show: a model's name, something good or bad."""

  text: str
  kind: str

  def __str__(self) -> str:
    return self.text


Cell = str | Told


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows of cells with their head, for a page or as Markdown.

  Attributes:
    head: one cell a column; the first column names the rows.
    rows: each as long as the head.
    caption: above it, and what a screen reader calls it.
    prose: whether the last column is text, which a page wraps.
    sortable: whether rows are of one kind, so that it says something to sort them.
  """

  head: Sequence[Cell]
  rows: Sequence[Sequence[Cell]]
  caption: str = ""
  prose: bool = False
  sortable: bool = True

  @property
  def kinds(self) -> str:
    """What it is for a style sheet."""
    kinds = {"few": len(self.head) <= 4, "sortable": self.sortable, "prose": self.prose}
    return " ".join(kind for kind, is_so in kinds.items() if is_so)

  def markdown(self) -> str:
    """As `grid` writes it."""
    return grid([[str(cell) for cell in line] for line in (self.head, *self.rows)])


def clean(value: Any) -> str:
  r"""A text without characters that neither a page nor a picture can hold.

  >>> clean("a\x00b") == "a\ufffdb"
  True
  """
  return _ODD.sub("\ufffd", str(value))


class Markup(str):
  """A cell of our own Markdown, which `grid` leaves as it is."""

  __slots__ = ()


def escaped(value: Any) -> str:
  r"""A text as one line of Markdown that shows it as it is: no markup, no HTML, no picture.

  >>> print(escaped("<script>[a](b) *c* snake_case"))
  \<script>\[a\](b) \*c\* snake_case
  """
  return _MARKUP.sub(r"\\\g<0>", clean(value)).replace("\n", " ")


def fenced(lines: Sequence[str]) -> list[str]:
  """Lines as a block of code, in a fence that is longer than any in it.

  >>> fenced(["python a.py"])
  ['```', 'python a.py', '```']
  """
  runs = [len(run) for line in lines for run in _TICKS.findall(line)]
  fence = "`" * max(3, 1 + max(runs, default=0))
  return [fence, *(clean(line) for line in lines), fence]


def listed(values: Sequence[str], most: int = 8) -> str:
  """Some names in a row, and how many there are beside.

  >>> listed(["a", "b", "c"], most=2)
  'a, b and 1 more'
  """
  shown = ", ".join(values[:most])
  return shown if len(values) <= most else f"{shown} and {len(values) - most} more"


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

  >>> number({"mean": 0.5, "std": None}), number({"mean": 2e-6, "std": 1e-7})
  ('0.5000', '0.000002000 ± 0.000000100')
  """
  mean, std = ((spread or {}).get(name) for name in ("mean", "std"))
  return with_std(mean, std, _places(mean))


def _places(value: float | None) -> int:
  """Of a number: four, and of one that is very small or large as many as show four digits."""
  size = abs(value or 1.0)
  if 1e-3 <= size < 1e3 or not math.isfinite(size):
    return 4
  return min(12, max(0, 3 - math.floor(math.log10(size))))


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


def tenths(value: float) -> str:
  """A mean number of examples, to a tenth.

  >>> tenths(5 / 3), tenths(2.0), tenths(0.01)
  ('1.7', '2', '<0.1')
  """
  return "<0.1" if 0 < value < 0.05 else f"{value:,.1f}".removesuffix(".0")


def signed(value: float, places: int = 2) -> str:
  """A number with its sign, a true minus.

  >>> signed(-1.234), signed(0.5, 1)
  ('−1.23', '+0.5')
  """
  return f"{value:+.{places}f}".replace("-", "−")


def change(points: float | None, error: float | None, places: int = 2) -> str:
  """A difference of shares in points, with its standard error where it has one.

  >>> change(0.01234, 0.002), change(-0.0001, None, 1), change(None, None)
  ('+1.23 ± 0.20', '0.0', '–')
  """
  if points is None:
    return DASH
  small = abs(100 * points) < 0.5 * 10**-places
  text = f"{0:.{places}f}" if small else signed(100 * points, places)
  return text if error is None else f"{text} ± {100 * error:.{places}f}"


@dataclasses.dataclass(frozen=True)
class Reading:
  """How a metric is told, by its name, direction and unit: a share in percent, or a number.

  Attributes:
    name: the metric's.
    title: what it is called.
    better: ``"higher"``, ``"lower"``, or None where nobody said.
    percent: whether it is a share.
    of_examples: whether it is a share of examples.

  >>> error = Reading("rmse", "error", "lower")
  >>> error.label, error.value(0.25), error.change(-0.5, 0.25), error.gain(-0.5)
  ('error', '0.2500', '−0.5000 ± 0.2500', 0.5)
  >>> share = Reading("accuracy", "accuracy", "higher", percent=True)
  >>> share.label, share.value(0.25), share.change(-0.5, 0.25), share.amount(-0.5)
  ('accuracy, %', '25.00%', '−50.00 ± 25.00', '50.00 points')
  """

  name: str
  title: str
  better: str | None = None
  percent: bool = False
  of_examples: bool = False

  @property
  def label(self) -> str:
    """The title with its unit."""
    return f"{self.title}, %" if self.percent else self.title

  @property
  def points(self) -> str:
    """The unit of a difference, after it."""
    return " points" if self.percent else ""

  @property
  def called(self) -> str:
    """The title before a value, where a percentage alone would not say it."""
    return "" if self.title == "accuracy" else f"{self.title} "

  @property
  def inside(self) -> str:
    """The title after a difference, likewise."""
    return "" if self.title == "accuracy" else f" in {self.title}"

  @property
  def more(self) -> str:
    """What a model is that has a better value."""
    return "more accurate" if self.title == "accuracy" else f"better in {self.title}"

  @property
  def less(self) -> str:
    """What a model is that has a worse value: of accuracies there is less."""
    return "less accuracy" if self.title == "accuracy" else f"worse {self.title}"

  def gain(self, difference: float) -> float:
    """A difference as what was gained: positive where it is for the better."""
    return -difference if self.better == "lower" else difference

  def spread(self, spread: Mapping[str, Any] | None) -> str:
    """A mean with its standard deviation, in a table whose row has the `label`."""
    return percent(spread) if self.percent else number(spread)

  def told(self, mean: float, std: float | None) -> str:
    """The same of a picture, in whose units the mean is."""
    return with_std(mean, std, 2 if self.percent else _places(mean))

  def scaled(self, value: float) -> float:
    """In the unit of the `label`."""
    return 100 * value if self.percent else value

  def value(self, value: float) -> str:
    """A value in a sentence."""
    return f"{100 * value:.2f}%" if self.percent else f"{value:.{_places(value)}f}"

  def amount(self, difference: float, error: float | None = None) -> str:
    """How large a difference is, whatever its sign, with its standard error."""
    error = None if error is None else self.scaled(error)
    size = abs(self.scaled(difference))
    return with_std(size, error, 2 if self.percent else _places(size)) + self.points

  def bare(self, size: float) -> str:
    """A difference's size or its error without a unit."""
    return f"{self.scaled(size):.{2 if self.percent else _places(size)}f}"

  def change(self, difference: float | None, error: float | None, places: int = 2) -> str:
    """A difference with its sign, and its standard error where it has one."""
    if self.percent or difference is None:
      return change(difference, error, places)
    digits = _places(max(abs(difference), abs(error or 0)) or 1.0)
    text = signed(difference, digits)
    return text if error is None else f"{text} ± {error:.{digits}f}"

  def interval(self, low: float | None, high: float | None) -> str:
    """The ends of a difference's interval; empty where they are unknown."""
    if self.percent or low is None or high is None:
      return interval(low, high)
    digits = _places(max(abs(low), abs(high)) or 1.0)
    return f"{signed(low, digits)} to {signed(high, digits)}"


def interval(low: float | None, high: float | None, places: int = 2) -> str:
  """The ends of a difference's interval, in points; empty where they are unknown.

  >>> interval(-0.01, 0.025), interval(None, 0.1)
  ('−1.00 to +2.50', '')
  """
  if low is None or high is None:
    return ""
  return f"{signed(100 * low, places)} to {signed(100 * high, places)}"


def grid(lines: Sequence[Sequence[str]]) -> str:
  """Rows as a Markdown table that is aligned as plain text too; the first is its head.

  >>> print(grid([["", "a"], ["b", "1"]]))  # a text is shown as it is; `Markup` is not
  |   |  a |
  | - | -: |
  | b |  1 |
  """
  cells = [
    [c if isinstance(c, Markup) else escaped(c).replace("|", "\\|") for c in row] for row in lines
  ]
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


def whole(value: int | None) -> str:
  """A count in full.

  >>> whole(19_578), whole(None)
  ('19,578', '–')
  """
  return DASH if value is None else f"{value:,}"


def exact(value: float | None, places: int = 3) -> str:
  """A number to some places, milliseconds for example.

  >>> exact(0.4), exact(None)
  ('0.400', '–')
  """
  return with_std(value, None, places)


def csv_text(lines: Iterable[Sequence[Any]]) -> str:
  """Rows as CSV; the first is its head.

  >>> csv_text([["a", "b"], [1, "x, y"]]).splitlines()
  ['a,b', '1,"x, y"']
  """
  text = io.StringIO()
  csv.writer(text, lineterminator="\n").writerows(lines)
  return text.getvalue()
