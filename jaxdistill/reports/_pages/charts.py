"""Charts as SVG inside a page: their colours and texts are the page's, in light and in dark.

Every chart is about 340 units wide, so that its text keeps its size on a phone; the three models
have one colour and one mark each throughout. `jaxdistill.reports.figures` draws the files beside a
report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill.reports._pages.markup import Element, element

__all__ = ["MARKS", "against", "curves", "dots", "gap", "legend", "reliability"]

MARKS = {"teacher": "■", "baseline": "▲", "student": "●"}
WORDS = {"teacher": "teacher", "baseline": "labels alone", "student": "student"}
WIDTH = 340
Point = tuple[float, float, float | None]


def legend(names: Sequence[str], words: Mapping[str, str] | None = None) -> Element:
  """The models' marks and what they are called."""
  called = {**WORDS, **(words or {})}
  items = [
    element("li", called.get(name, name), class_=_kind(name), data_mark=MARKS.get(name, "●"))
    for name in names
  ]
  return element("ul", items, class_="legend")


def _kind(name: str) -> str:
  return name if name in MARKS else "student"


class _Axes:
  """A frame with its scales: numbers to places, ticks and grid."""

  def __init__(
    self,
    x: tuple[float, float],
    y: tuple[float, float],
    *,
    height: int = 220,
    left: int = 40,
    bottom: int = 34,
    top: int = 10,
    right: int = 10,
    log_x: bool = False,
    log_y: bool = False,
  ) -> None:
    self.box = (left, top, WIDTH - right, height - bottom)
    self.height = height
    self._x, self._y, self._log_x, self._log_y = x, y, log_x, log_y

  def x(self, value: float) -> float:
    """Where a value is, from the left."""
    return self.box[0] + (self.box[2] - self.box[0]) * _share(value, self._x, self._log_x)

  def y(self, value: float) -> float:
    """Where a value is, from the top."""
    return self.box[3] - (self.box[3] - self.box[1]) * _share(value, self._y, self._log_y)

  def frame(
    self,
    xlabel: str,
    *,
    ylabel: str = "",
    x_ticks: Sequence[float] | None = None,
    y_ticks: Sequence[float] | None = None,
    show_x: Callable[[float], str] = "{:g}".format,
    show_y: Callable[[float], str] = "{:g}".format,
  ) -> list[Element]:
    """Grid, axes, ticks and labels."""
    left, top, right, bottom = self.box
    if x_ticks is None:
      x_ticks = _log_ticks(*self._x) if self._log_x else _ticks(*self._x)
    if y_ticks is None:
      y_ticks = _log_ticks(*self._y) if self._log_y else _ticks(*self._y)
    drawn = []
    for value in y_ticks:
      at = self.y(value)
      drawn.append(_line(left, at, right, at, "grid"))
      drawn.append(element("text", show_y(value), x=left - 5, y=at + 4, text_anchor="end"))
    for value in x_ticks:
      at = self.x(value)
      drawn.append(_line(at, bottom, at, bottom + 3, "axis"))
      anchor = "end" if at > right - 12 else "middle"
      drawn.append(element("text", show_x(value), x=at, y=bottom + 15, text_anchor=anchor))
    drawn.append(_line(left, bottom, right, bottom, "axis"))
    if xlabel:
      at = (left + right) / 2
      drawn.append(element("text", xlabel, x=at, y=self.height - 4, text_anchor="middle"))
    if ylabel:
      drawn.append(element("text", ylabel, x=2, y=top - 8))
    return drawn


def _share(value: float, ends: tuple[float, float], log: bool) -> float:
  low, high = (math.log(end) for end in ends) if log else ends
  value = math.log(value) if log else value
  return 0.5 if high == low else (value - low) / (high - low)


def _ticks(low: float, high: float, about: int = 4) -> list[float]:
  """Round numbers within the ends."""
  if not high > low:
    return [low]
  rough = (high - low) / about
  scale = 10.0 ** math.floor(math.log10(rough))
  step = next(scale * m for m in (1, 2, 2.5, 5, 10) if scale * m >= rough * 0.999)
  first = math.ceil(low / step - 1e-9)
  last = math.floor(high / step + 1e-9)
  return [round(i * step, 12) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
  """Powers of ten, or 1, 2 and 5 times them where there are few."""
  powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  for factors in ((1,), (1, 3), (1, 2, 5)):
    found = [f * 10.0**p for p in powers for f in factors]
    found = [v for v in found if low * 0.999 <= v <= high * 1.001]
    if len(found) >= 3:
      break
  return found[:: -(-len(found) // 5)]


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Element:
  return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def _mark(name: str, x: float, y: float, size: float = 5) -> Element:
  """Square, triangle or circle, by the model."""
  if name == "teacher":
    return element(
      "rect", x=x - size, y=y - size, width=2 * size, height=2 * size, class_="mark teacher"
    )
  if name == "baseline":
    points = f"{x:.1f},{y - size * 1.2:.1f} {x - size * 1.15:.1f},{y + size:.1f} "
    points += f"{x + size * 1.15:.1f},{y + size:.1f}"
    return element("polygon", points=points, class_="mark baseline")
  return element("circle", cx=x, cy=y, r=size, class_=f"mark {_kind(name)}")


def _svg(height: float, label: str, *children: Any) -> Element:
  return element(
    "svg", element("title", label), *children, viewBox=f"0 0 {WIDTH} {height:g}", role="img",
    aria_label=label,
  )  # fmt: skip


def _padded(
  values: Sequence[float], share: float = 0.12, least: float = 0.5
) -> tuple[float, float]:
  low, high = min(values), max(values)
  room = max((high - low) * share, least)
  return low - room, high + room


def against(
  points: Mapping[str, Point],
  *,
  xlabel: str,
  show: Callable[[float], str],
  label: str,
  words: Mapping[str, str] | None = None,
) -> Element:
  """Accuracy against what it costs: one mark a model, its standard deviation as a bar.

  Args:
    points: by model ``(cost, accuracy in %, standard deviation or None)``.
    xlabel: what the cost is.
    show: a cost as a tick's text.
    label: what the chart is, for whoever does not see it.
    words: what the models are called.

  Returns:
    The SVG.
  """
  called = {**WORDS, **(words or {})}
  costs = [cost for cost, _, _ in points.values()]
  heights = [a + s * (std or 0) for _, a, std in points.values() for s in (-1, 1)]
  wide = max(costs) / min(costs)
  ends = (min(costs) / max(1.5, wide**0.12), max(costs) * max(1.5, wide**0.12))
  axes = _Axes(ends, _padded(heights), log_x=True, top=22)
  drawn = axes.frame(xlabel, ylabel="accuracy, %", show_x=show)
  placed: list[tuple[float, float]] = []
  for name, (cost, accuracy, std) in sorted(points.items(), key=lambda item: -item[1][1]):
    x, y = axes.x(cost), axes.y(accuracy)
    bar = [] if not std else [_line(x, axes.y(accuracy - std), x, axes.y(accuracy + std), "span")]
    drawn.append(element("g", bar, _mark(name, x, y), class_=_kind(name)))
    right = x < (axes.box[0] + axes.box[2]) / 2
    at = y + 4
    while any(abs(at - other) < 13 and abs(x - beside) < 90 for beside, other in placed):
      at += 3
    placed.append((x, at))
    text = f"{called.get(name, name)} {accuracy:.2f}"
    anchor = "start" if right else "end"
    drawn.append(
      element("text", text, x=x + (10 if right else -10), y=at, text_anchor=anchor, class_=name)
    )
  return _svg(axes.height, label, drawn)


def gap(share: float, interval: tuple[float, float] | None, label: str) -> Element:
  """How far the student is on the way from labels alone (0) to its teacher (1).

  Args:
    share: of the way that it went.
    interval: of that share, or None.
    label: what the chart is.

  Returns:
    The SVG; what lies far outside is drawn at the edge.
  """
  every = [min(max(s, -0.6), 1.6) for s in (0.0, 1.0, share, *(interval or ()))]
  ends = _padded(every, 0.0, 0.0)
  axes = _Axes(ends, (0, 1), height=82, left=44, right=44, bottom=30)

  def at(value: float) -> float:
    return axes.x(min(max(value, ends[0]), ends[1]))

  middle = 34.0
  drawn = [_line(at(0), middle, at(1), middle, "axis")]
  for value, name in ((0.0, "baseline"), (1.0, "teacher")):
    called = f"{WORDS[name]}, {100 * value:.0f}%" if value else f"{WORDS[name]}, 0"
    drawn.append(_mark(name, at(value), middle))
    drawn.append(element("text", called, x=at(value), y=62, text_anchor="middle", class_=name))
  bar: list[Element] = []
  if interval is not None:
    low, high = (at(end) for end in interval)
    bar = [_line(end, middle - 5, end, middle + 5, "span") for end in (low, high)]
    bar.append(_line(low, middle, high, middle, "span"))
  here = at(share)
  drawn.append(element("g", bar, _mark("student", here, middle, 6.5), class_="student"))
  text = f"student {100 * share:.0f}%"
  drawn.append(element("text", text, x=here, y=16, text_anchor="middle", class_="student"))
  return _svg(82, label, drawn)


def reliability(name: str, bins: Mapping[str, np.ndarray], label: str) -> Element:
  """Accuracy by confidence: on the diagonal, confidence is what it says.

  Args:
    name: the model's.
    bins: from `jaxdistill.reports._pages.analysis.reliability`, ``[S, bins]``; drawn over all seeds
      together.
    label: what the chart is.

  Returns:
    The SVG; below the diagram, how many answers each bin has.
  """
  count, sure, right = (bins[k].sum(axis=0) for k in ("count", "confidence", "correct"))
  axes = _Axes((0, 1), (0, 1), height=300, top=22, bottom=84)
  percent = "{:.0%}".format
  drawn = axes.frame("", ylabel="accuracy", show_x=percent, show_y=percent)
  drawn.append(_line(axes.x(0), axes.y(0), axes.x(1), axes.y(1), "dashed"))
  total, most = max(count.sum(), 1), math.log1p(max(count.max(), 1))
  width = (axes.box[2] - axes.box[0]) / len(count)
  bars = []
  for i, n in enumerate(count):
    if not n:
      continue
    left, accuracy, confidence = axes.box[0] + i * width, right[i] / n, sure[i] / n
    top = axes.y(accuracy)
    few = n < 0.002 * total or n < 5
    bars.append(
      element("rect", element("title", f"confidence {confidence:.0%}: accuracy {accuracy:.0%}, "
              f"{int(n)} answers"), x=left + 1, y=top, width=width - 2, height=axes.box[3] - top,
              class_="faint" if few else "bar")
    )  # fmt: skip
    bars.append(_line(left + 1, axes.y(confidence), left + width - 1, axes.y(confidence), "span"))
    tall = 34 * math.log1p(n) / most
    bars.append(
      element("rect", x=left + 1, y=282 - tall, width=width - 2, height=tall, class_="faint")
    )
  drawn.append(element("g", bars, class_=_kind(name)))
  drawn.append(_line(axes.box[0], 282, axes.box[2], 282, "axis"))
  drawn.append(
    element("text", "confidence; below, how many answers (logarithm)", x=axes.box[2], y=296,
            text_anchor="end")
  )  # fmt: skip
  return _svg(300, label, drawn)


def dots(
  rows: Sequence[tuple[str, Mapping[str, float | None]]], *, xlabel: str, label: str
) -> Element:
  """A row for each class or slice with a mark for each model, in %.

  Args:
    rows: ``(name, {model: accuracy in %, or None})``, from top to bottom.
    xlabel: what the values are.
    label: what the chart is.

  Returns:
    The SVG.
  """
  values = [v for _, marks in rows for v in marks.values() if v is not None]
  if not values:
    values = [0.0, 100.0]
  low, high = _padded(values, 0.06)
  height = 22 * len(rows) + 48
  longest = max((len(name) for name, _ in rows), default=1)
  left = int(min(120, 14 + 6.2 * longest))
  axes = _Axes((max(low, -2.0), min(high, 102.0)), (0, 1), height=height, left=left, top=4)
  ticks = [tick for tick in _ticks(max(low, 0), min(high, 100)) if tick <= 100]
  drawn = axes.frame(xlabel, x_ticks=ticks, y_ticks=[])
  for tick in ticks:
    drawn.append(_line(axes.x(tick), 4, axes.x(tick), axes.box[3], "grid"))
  for i, (name, marks) in enumerate(rows):
    y = 16 + 22 * i
    shown = name if len(name) <= 18 else name[:17] + "…"
    drawn.append(element("text", shown, element("title", name), x=left - 8, y=y + 4,
                         text_anchor="end"))  # fmt: skip
    there = {model: value for model, value in marks.items() if value is not None}
    if there:
      ends = axes.x(min(there.values())), axes.x(max(there.values()))
      drawn.append(_line(ends[0], y, ends[1], y, "axis"))
    for model in sorted(there, key=lambda m: m == "student"):
      drawn.append(element("g", _mark(model, axes.x(there[model]), y, 4.4), class_=_kind(model)))
  return _svg(height, label, drawn)


def curves(
  lines: Mapping[str, tuple[np.ndarray, np.ndarray]], *, xlabel: str, label: str
) -> Element | None:
  """Training curves: the mean over seeds, and the seeds' range as a band.

  Args:
    lines: by model ``(x [N], values [N, S])``; what is not finite is a gap.
    xlabel: what x is.
    label: what the chart is.

  Returns:
    The SVG, logarithmic where values are positive and span more than a factor of 20; None where no
    value is finite.
  """
  finite = [v[np.isfinite(v)] for _, v in lines.values()]
  every = np.concatenate(finite) if finite else np.zeros(0)
  if not every.size:
    return None
  low, high = float(every.min()), float(every.max())
  log = low > 0 and high / low > 20
  ends = (low / 1.15, high * 1.15) if log else _padded([low, high], 0.06, 1e-9 + abs(high) * 0.01)
  last = max(float(x.max()) for x, _ in lines.values())
  axes = _Axes((0.0, last), ends, height=190, left=46, top=10, log_y=log)
  drawn = axes.frame(xlabel, show_y="{:.3g}".format)
  for name, (x, values) in lines.items():
    drawn.append(element("g", _traced(axes, x, values), class_=_kind(name)))
  return _svg(axes.height, label, drawn)


def _traced(axes: _Axes, x: np.ndarray, values: np.ndarray, most: int = 160) -> list[Element]:
  """A line's pieces between gaps, thinned to what can be seen."""
  step = -(-len(x) // most)
  kept = np.unique(np.append(np.arange(0, len(x), step), len(x) - 1))
  x, values = x[kept], values[kept]
  good = np.isfinite(values).all(axis=1)
  drawn: list[Element] = []
  for piece in np.split(np.arange(len(x)), np.flatnonzero(np.diff(good)) + 1):
    if not len(piece) or not good[piece[0]]:
      continue

    def path(ys: np.ndarray, rows: np.ndarray = piece) -> str:
      return " ".join(f"{axes.x(x[r]):.1f},{axes.y(y):.1f}" for r, y in zip(rows, ys, strict=True))

    if values.shape[1] > 1:
      upper, lower = values[piece].max(axis=1), values[piece].min(axis=1)
      outline = path(upper) + " " + path(lower[::-1], piece[::-1])
      drawn.append(element("polygon", points=outline, class_="band"))
    middle = values[piece].mean(axis=1)
    drawn.append(element("polyline", points=path(middle), class_="line"))
    if len(piece) == 1:  # no line
      at = axes.x(x[piece[0]]), axes.y(middle[0])
      drawn.append(element("circle", cx=at[0], cy=at[1], r=2.5, class_="bar"))
  return drawn
