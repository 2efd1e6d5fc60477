"""Pictures of results: models side by side, curves over a setting, methods in rows, calibration.

One code for files and for pages: each function writes a PNG file, or only returns Matplotlib's
figure, for a notebook to show or for a page to hold. Models have one colour and one mark each
throughout; colours are told apart with any kind of colour vision (Okabe, Ito, 2008), and series by
their markers too.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill import _check, _extras, runs
from jaxdistill.evaluation import metrics
from jaxdistill.reports._format import MODELS, WORDS, clean, with_std
from jaxdistill.reports._svg import BASELINE, RULE, STUDENT, TEACHER, hover

__all__ = [
  "against",
  "classes",
  "colours",
  "curves",
  "drawable",
  "frontier",
  "gap",
  "groups",
  "intervals",
  "models",
  "panels",
  "png",
  "reliability",
  "scatter",
  "training",
]

# A mean; or a mean and its standard deviation, None or NaN where there is none.
Value = float | tuple[float, float | None]
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("--", ":", "-.")
_KINDS = (TEACHER, BASELINE, STUDENT)
_LOOKS = dict(zip(MODELS, zip(_KINDS, "s^o", strict=True), strict=True))
_PALE = "#8a8a8a"
_DOTS = 300  # of a scatter; more hide one another, and a page grows with each
_WIDE = 340  # points of a picture in a page: its text keeps its size on a phone


def models(
  path: str | os.PathLike[str] | None,
  values: Mapping[str, Any],
  *,
  ylabel: str,
  title: str = "",
  show: Callable[[float], str] = "{:.2f}".format,
) -> Any:
  """Models side by side: every seed a dot, the mean with its standard deviation.

  Args:
    path: where the PNG goes; None writes none.
    values: for each model, by the text below it, its values ``[S]`` over seeds.
    ylabel: what the values are.
    title: above the picture.
    show: a mean as the text beside it.

  Returns:
    The figure, Matplotlib's.

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   values = {"teacher": [98.6], "labels alone": [96.5, 96.9], "distilled": [97.6, 97.9]}
  ...   figure = models(f"{folder}/accuracy.png", values, ylabel="accuracy, %")
  ...   os.listdir(folder), figure.axes[0].get_ylabel()
  (['accuracy.png'], 'accuracy, %')
  """
  _check_entries("values", values)
  figure, axes = _axes(6.4, 4.0, ylabel=ylabel, title=title)
  for i, (name, found) in enumerate(values.items()):
    each = np.atleast_1d(np.asarray(found, np.float64))
    mean, std = metrics.mean_std(each)
    colour = (*_KINDS, *_COLOURS)[i % 10]
    beside = np.linspace(-0.12, 0.12, len(each)) if len(each) > 1 else np.zeros(1)
    axes.scatter(i + beside, each, s=22, color=colour, alpha=0.45, linewidths=0)
    axes.errorbar(i, mean, yerr=std, fmt="D", color=colour, capsize=5, ms=7, label=_text(name))
    axes.annotate(show(mean), (i, mean), (30, 0), textcoords="offset points", va="center")
  axes.set_xticks(range(len(values)), [_text(name) for name in values])
  axes.set_xlim(-0.5, len(values) - 0.2)
  axes.grid(axis="y", alpha=0.25)
  return _saved(figure, path)


def curves(
  path: str | os.PathLike[str] | None,
  x: Any,
  series: Mapping[str, tuple[Any, Any]],
  *,
  xlabel: str,
  ylabel: str,
  title: str = "",
  lines: Mapping[str, Value] | None = None,
  ticks: Sequence[str] | None = None,
  log: bool | None = None,
) -> Any:
  """A line for each series over a setting, with a band of a standard deviation to either side.

  Args:
    path: where the PNG goes; None writes none.
    x: ``[N]``, the setting.
    series: by name ``(mean [N], std [N])``. A point whose mean is NaN is left out, and a std that
      is NaN has no band; None in a std's place is no band at all.
    xlabel: what the setting is.
    ylabel: what the values are.
    title: above the picture.
    lines: values that have no setting, by name, as horizontal lines: a mean, or ``(mean, std)``.
    ticks: ``[N]`` texts for the points, which are then drawn at equal distances; by default their
      numbers.
    log: whether the axis of the setting is logarithmic; None where that spaces the points better.

  Returns:
    The figure, Matplotlib's.

  Raises:
    ValueError: a series is not as long as ``x``.

  >>> series = {"soft weight 0.9": ([97.1, 97.6, np.nan], [0.3, 0.2, np.nan])}
  >>> figure = curves(None, [1, 2, 4], series, xlabel="temperature", ylabel="accuracy, %")
  >>> figure.axes[0].get_lines()[0].get_xdata().tolist()
  [1.0, 2.0]
  """
  _check_entries("series", series)
  points = np.atleast_1d(np.asarray(x, np.float64))
  at = points if ticks is None else np.arange(len(points), dtype=np.float64)
  names = [*series, *(lines or {})]
  entries = len(names)
  # Where the legend has its place: above, there is one row of about so many letters.
  beside = entries > 4 or sum(map(len, names)) > 70 - 6 * entries
  figure, axes = _axes(7.6 if beside else 6.4, 4.0, ylabel=ylabel, title=title)
  if _spread_by_factors(at) if log is None else log:
    axes.set_xscale("log")
  for i, (name, (mean, std)) in enumerate(series.items()):
    mean, std = (_as_long(name, values, len(points)) for values in (mean, std))
    there = np.isfinite(mean)
    colour, marker = _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]
    axes.plot(at[there], mean[there], marker=marker, ms=5, color=colour, label=_text(name))
    banded = there & np.isfinite(std)
    _band(axes, at[banded], (mean - std)[banded], (mean + std)[banded], colour)
  for i, (name, value) in enumerate((lines or {}).items()):
    mean, std = _mean_std(value)
    colour = (_KINDS[0], _PALE)[i % 2]  # no series is grey
    axes.axhline(mean, color=colour, linestyle=_LINES[i % 3], linewidth=1.4, label=_text(name))
    if std is not None:
      axes.axhspan(mean - std, mean + std, color=colour, alpha=0.1, linewidth=0)
  _name_points(axes, at, [f"{p:g}" for p in points] if ticks is None else list(ticks))
  axes.set_xlabel(xlabel)
  axes.grid(axis="y", alpha=0.25)
  loc = "outside right upper" if beside else "outside upper center"
  figure.legend(loc=loc, ncols=1 if beside else entries, frameon=False, fontsize=9)
  return _saved(figure, path)


def panels(
  path: str | os.PathLike[str] | None,
  settings: Mapping[str, Any],
  values: Any,
  *,
  ylabel: str,
  title: str = "",
  chosen: int | None = None,
  hollow: Sequence[int] = (),
) -> Any:
  """Points over each of their settings, side by side: where many settings vary at once.

  Args:
    path: where the PNG goes; None writes none.
    settings: by name ``[N]``, a panel for each.
    values: ``[N]``, what the points reached; NaN is left out.
    ylabel: what that is.
    title: above the panels.
    chosen: the point that is set off.
    hollow: points that did not come to their end, drawn open.

  Returns:
    The figure, Matplotlib's.

  Raises:
    ValueError: a setting has not as many entries as there are points.

  >>> figure = panels(None, {"rate": [0.1, 0.2], "width": [4, 8]}, [90.0, 91.0], ylabel="accuracy")
  >>> [axes.get_xlabel() for axes in figure.axes]
  ['rate', 'width']
  """
  _check_entries("settings", settings)
  reached = np.asarray(values, np.float64)
  there = np.isfinite(reached)
  whole = there & ~np.isin(np.arange(len(reached)), list(hollow))
  figure = _figure(1.2 + 2.6 * len(settings), 3.4, "constrained")
  every = figure.subplots(1, len(settings), sharey=True, squeeze=False)[0]
  for axes, (name, given) in zip(every, settings.items(), strict=True):
    at = _as_long(name, given, len(reached))
    rest = {"ls": "none", "marker": _MARKERS[0], "ms": 6, "mec": _COLOURS[0]}
    axes.plot(at[there & ~whole], reached[there & ~whole], mfc="none", **rest)
    axes.plot(at[whole], reached[whole], mfc=_COLOURS[0], **rest)
    if chosen is not None and there[chosen]:
      axes.plot(at[chosen], reached[chosen], ls="none", marker="*", ms=15, color=_COLOURS[1])
    if np.min(at) > 0 and np.max(at) >= 20 * np.min(at):
      axes.set_xscale("log")
    axes.set_xlabel(_text(name))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
  every[0].set_ylabel(_text(ylabel))
  if title:
    figure.suptitle(_text(title), fontsize=10)
  return _saved(figure, path)


def frontier(
  path: str | os.PathLike[str] | None,
  points: Mapping[str, tuple[float, float, float | None]],
  *,
  front: Sequence[str] = (),
  chosen: str | None = None,
  hollow: Sequence[str] = (),
  limit: float | None = None,
  xlabel: str,
  ylabel: str,
  title: str = "",
) -> Any:
  """Models by what they cost and how good they are, the first entry set off as the teacher.

  Args:
    path: where the PNG goes; None writes none.
    points: by name ``(cost, value, std of the value or None)``; numbered in the picture, and named
      beside it.
    front: those on the Pareto front, by increasing cost, joined by a line.
    chosen: the one that was chosen.
    hollow: those that were not trained to the end.
    limit: of the cost, as a vertical line.
    xlabel: what the cost is; its axis is logarithmic.
    ylabel: what the values are.
    title: above the picture.

  Returns:
    The figure, Matplotlib's.

  >>> points = {"teacher": (0.3, 99.0, None), "a": (0.1, 97.0, 0.2), "b": (0.05, 96.0, 0.4)}
  >>> figure = frontier(None, points, front=["b", "a"], xlabel="ms", ylabel="accuracy, %")
  >>> figure.axes[0].get_xscale()
  'log'
  """
  _check_entries("points", points)
  figure, axes = _axes(8.2, 4.4, ylabel=ylabel, title=title)
  axes.set_xscale("log")
  axes.xaxis.set_major_formatter("{x:g}")
  axes.xaxis.set_minor_formatter("{x:g}")
  axes.tick_params(axis="x", which="both", labelsize=8)
  for i, (name, (at, value, std)) in enumerate(points.items()):
    colour = _KINDS[0] if i == 0 else _KINDS[1] if name == chosen else _KINDS[2]
    marker, size = ("s", 6) if i == 0 else ("*", 13) if name == chosen else ("o", 6)
    label = f"{i}  {name}" if i else name
    label += ", chosen" if name == chosen else ", stopped early" if name in hollow else ""
    axes.errorbar(
      at,
      value,
      yerr=std,
      color=colour,
      fmt=marker,
      ms=size,
      mfc="white" if name in hollow else colour,
      capsize=3,
      elinewidth=1,
      label=_text(label),
    )
    if i:
      axes.annotate(f"{i}", (at, value), (7, 4), textcoords="offset points", fontsize=9)
  line = [points[name][:2] for name in front]
  if len(line) > 1:
    axes.plot(*zip(*line, strict=True), color=_KINDS[2], alpha=0.5, label="Pareto front", zorder=0)
  if limit is not None:
    axes.axvline(limit, color=_PALE, linestyle="--", linewidth=1.2, label=f"budget {limit:,g}")
  axes.set_xlabel(xlabel)
  axes.margins(x=0.1)
  axes.grid(alpha=0.2)
  figure.legend(loc="outside right upper", frameon=False, fontsize=9)
  return _saved(figure, path)


def intervals(
  path: str | os.PathLike[str] | None,
  rows: Mapping[str, Value],
  *,
  xlabel: str,
  title: str = "",
  lines: Mapping[str, Value] | None = None,
) -> Any:
  """One row for each method: its mean as a dot, its standard deviation to either side.

  A row that lies far away from all others, such as a training that diverged, is a triangle at the
  edge: drawn to scale, it would leave the others no room to differ.

  Args:
    path: where the PNG goes; None writes none.
    rows: by name a mean, or ``(mean, std)``; from top to bottom. NaN leaves a row empty.
    xlabel: what the values are.
    title: above the picture.
    lines: what the rows are held against, by name, as vertical lines with a band of a std.

  Returns:
    The figure, Matplotlib's.

  >>> rows, lines = {"kd": (97.6, 0.3), "pkt": (97.1, 0.4)}, {"labels alone": (96.7, 0.5)}
  >>> figure = intervals(None, rows, xlabel="accuracy, %", lines=lines)
  >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
  ['kd', 'pkt']
  """
  _check_entries("rows", rows)
  figure, axes = _axes(7.0, 1.3 + 0.27 * len(rows), title=title)
  for i, (name, value) in enumerate((lines or {}).items()):
    mean, std = _mean_std(value)
    colour = (_KINDS[1], _KINDS[0])[i % 2]
    shown = f"{name} {_shown(mean, std)}"
    axes.axvline(mean, color=colour, linestyle=_LINES[i % 3], linewidth=1.4, label=_text(shown))
    if std is not None:
      axes.axvspan(mean - std, mean + std, color=colour, alpha=0.1, linewidth=0)
  least, most = _fences([_mean_std(value)[0] for value in rows.values()])
  for i, value in enumerate(rows.values()):
    mean, std = _mean_std(value)
    if not least <= mean <= most and np.isfinite(mean):
      mark = {"color": _KINDS[2], "clip_on": False, "transform": axes.get_yaxis_transform()}
      axes.plot(float(mean > most), i, "<" if mean < least else ">", ms=6, **mark)
    elif np.isfinite(mean):
      axes.errorbar(mean, i, xerr=std, fmt="o", color=_KINDS[2], capsize=3, ms=5)
    # At the right end, in a column: a text beside each dot would hide its neighbours'.
    where = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
    axes.annotate(_shown(mean, std), (1.0, i), (4, 0), va="center", fontsize=9, **where)
  axes.set_yticks(range(len(rows)), [_text(name) for name in rows])
  axes.set_ylim(len(rows) - 0.5, -0.5)
  axes.set_xlabel(xlabel)
  axes.grid(axis="x", alpha=0.25)
  if lines:
    figure.legend(loc="outside upper center", ncols=len(lines), frameon=False, fontsize=9)
  return _saved(figure, path)


def against(
  path: str | os.PathLike[str] | None,
  points: Mapping[str, tuple[float, float, float | None]],
  *,
  xlabel: str,
  show: Callable[[float], str],
  ylabel: str = "accuracy, %",
  tell: Callable[[float, float | None], str] = with_std,
  words: Mapping[str, str] = WORDS,
) -> Any:
  """A metric against what it costs: one mark a model with its name, its std as a bar.

  Args:
    path: where the PNG goes; None writes none.
    points: by model (``teacher``, ``baseline``, ``student``) ``(cost, value, standard deviation or
      None)``.
    xlabel: what the cost is; its axis is logarithmic.
    show: a cost as a tick's text.
    ylabel: what the values are, with their unit.
    tell: a value and its standard deviation as a text.
    words: what the models are called.

  Returns:
    The figure, Matplotlib's.

  >>> points = {"teacher": (1000.0, 97.0, None), "student": (100.0, 93.0, 0.4)}
  >>> figure = against(None, points, xlabel="parameters", show="{:g}".format)
  >>> [text.get_text() for text in figure.axes[0].texts]
  ['teacher 97.00', 'student 93.00 ± 0.40']
  """
  _check_entries("points", points)
  figure, axes = _small(220, xlabel=xlabel, above=ylabel, left=46, top=28)
  costs = [cost for cost, _, _ in points.values()]
  room = max(1.5, (max(costs) / min(costs)) ** 0.14)
  ends = (min(costs) / room, max(costs) * room)
  axes.set(xscale="log", xlim=ends)
  for name, (cost, value, std) in points.items():
    axes.errorbar(cost, value, yerr=std, fmt="none", color=_LOOKS[name][0], elinewidth=1.4)
    told = f"{words[name]}: {show(cost)}, {tell(value, std)}{'%' * ylabel.endswith('%')}"
    _marks(axes, name, [cost], [value], [told])
  axes.margins(y=0.18)
  axes.autoscale(axis="y")
  ticks = _log_ticks(*ends)
  axes.set_xticks(ticks, [show(tick) for tick in ticks])
  axes.set_xticks([], minor=True)
  placed: list[tuple[float, float]] = []
  for name, (cost, value, std) in sorted(points.items(), key=lambda item: -item[1][1]):
    x, y = axes.transData.transform((cost, value)) * 72 / figure.dpi
    left, shift = x > 0.6 * _WIDE, 0.0
    while any(abs(y + shift - other) < 13 and abs(x - beside) < 110 for beside, other in placed):
      shift -= 3
    placed.append((x, y + shift))
    told, at = _text(f"{words[name]} {tell(value, std)}"), (-10 if left else 10, shift)
    axes.annotate(told, (cost, value), at, textcoords="offset points", va="center", fontsize=11,
                  ha="right" if left else "left", color=_LOOKS[name][0])  # fmt: skip
  return _saved(figure, path)


def gap(
  path: str | os.PathLike[str] | None, share: float, interval: tuple[float, float] | None = None
) -> Any:
  """How far the student is on the way from labels alone (0) to its teacher (1).

  Args:
    path: where the PNG goes; None writes none.
    share: of the way that it went.
    interval: of that share.

  Returns:
    The figure, Matplotlib's; what lies far outside is drawn at the edge.

  >>> [text.get_text() for text in gap(None, 0.4, (0.2, 0.6)).axes[0].texts]
  ['labels alone, 0', 'teacher, 100%', 'student 40%']
  """
  figure, axes = _small(84, left=44, right=44, top=26, bottom=30)
  axes.axis("off")
  low, high = (min(max(end, -0.6), 1.6) for end in interval or (share, share))
  here = min(max(share, -0.6), 1.6)
  axes.set(xlim=(min(0.0, low, here), max(1.0, high, here)), ylim=(-1, 1))
  axes.plot([0, 1], [0, 0], color="black", linewidth=1)
  if interval is not None:
    axes.errorbar(here, 0, xerr=[[max(here - low, 0)], [max(high - here, 0)]], fmt="none",
                  color=STUDENT, capsize=5, elinewidth=1.4)  # fmt: skip
  ends = "" if interval is None else f" (95% interval {interval[0]:.0%} to {interval[1]:.0%})"
  for name, at, told, shown in (
    ("baseline", 0.0, f"{WORDS['baseline']}, 0", "labels alone: 0%"),
    ("teacher", 1.0, f"{WORDS['teacher']}, 100%", "teacher: 100%"),
    ("student", here, f"student {share:.0%}", f"student: {share:.0%}{ends}"),
  ):
    large = name == "student"
    _marks(axes, name, [at], [0.0], [shown], size=13 if large else 10)
    axes.annotate(told, (at, 0), (0, 18 if large else -24), textcoords="offset points", fontsize=11,
                  ha="center", va="center", color=_LOOKS[name][0])  # fmt: skip
  return _saved(figure, path)


def reliability(
  path: str | os.PathLike[str] | None, name: str, bins: Mapping[str, np.ndarray]
) -> Any:
  """Accuracy by confidence: on the diagonal, confidence is what it says.

  Args:
    path: where the PNG goes; None writes none.
    name: the model's, ``teacher``, ``baseline`` or ``student``: whose colour it has.
    bins: ``count``, ``confidence`` and ``correct``, sums ``[S, bins]`` over equal bins, drawn over
      all seeds together.

  Returns:
    The figure, Matplotlib's; below the diagram, how many answers each bin has.

  >>> ones = np.ones((1, 2))
  >>> figure = reliability(None, "student", {"count": ones, "confidence": ones, "correct": ones})
  >>> [len(axes.patches) for axes in figure.axes]
  [2, 2]
  """
  count, sure, right = (bins[key].sum(axis=0) for key in ("count", "confidence", "correct"))
  figure, axes = _small(300, above="accuracy", right=18, top=28, bottom=84)
  below = figure.add_axes((40 / _WIDE, 20 / 300, (_WIDE - 58) / _WIDE, 40 / 300))
  colour, width = _LOOKS[name][0], 1 / len(count)
  axes.plot([0, 1], [0, 1], color="black", linestyle=(0, (3, 3)), linewidth=1)
  few = max(0.002 * count.sum(), 5)
  for i in np.flatnonzero(count):
    left, accuracy, confidence = i * width, right[i] / count[i], sure[i] / count[i]
    told = f"confidence {confidence:.0%}: accuracy {accuracy:.0%}, {count[i]:,.0f} answers"
    for on, height, opacity in (
      (axes, accuracy, 0.3 if count[i] < few else 0.75),
      (below, math.log1p(count[i]), 0.3),
    ):
      (bar,) = on.bar(left, height, 0.92 * width, align="edge", color=colour, alpha=opacity)
      hover(bar, told)
    axes.hlines(confidence, left, left + 0.92 * width, color=colour, linewidth=1.6)
  ticks = [0, 0.25, 0.5, 0.75, 1]
  axes.set(xlim=(0, 1), ylim=(0, 1), xticks=ticks, yticks=ticks)
  for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_formatter("{x:.0%}")
  below.set(xlim=(0, 1), xticks=[], yticks=[])
  below.spines[["top", "left", "right"]].set_visible(False)
  below.set_xlabel("confidence; below, how many answers (logarithm)", fontsize=11)
  return _saved(figure, path)


def groups(
  path: str | os.PathLike[str] | None,
  rows: Sequence[tuple[str, Mapping[str, float | None]]],
  *,
  xlabel: str,
  tell: Callable[[float], str] = "{:.1f}".format,
  words: Mapping[str, str] = WORDS,
) -> Any:
  """A row for each class or slice with a mark for each model.

  Args:
    path: where the PNG goes; None writes none.
    rows: ``(name, {model: accuracy in %, or None})``, from top to bottom.
    xlabel: what the values are.
    tell: a value as a text.
    words: what the models are called.

  Returns:
    The figure, Matplotlib's.

  >>> figure = groups(None, [("cat", {"teacher": 97.0, "student": 93.0})], xlabel="accuracy, %")
  >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
  ['cat']
  """
  if not rows:
    raise ValueError("rows is empty; give at least one class or slice.")
  names = [name for name, _ in rows]
  left = int(min(120, 16 + 6.2 * max(map(len, names))))
  figure, axes = _small(26 * len(rows) + 48, xlabel=xlabel, left=left, top=4)
  for i, (_, marks) in enumerate(rows):
    there = [value for value in marks.values() if value is not None]
    if there:
      axes.plot([min(there), max(there)], [i, i], color=RULE, linewidth=5, solid_capstyle="round")
  drawn = [model for model in MODELS if any(marks.get(model) is not None for _, marks in rows)]
  # A lane for each model: equal marks would hide each other.
  for lane, model in zip(np.linspace(-0.48, 0.48, len(drawn) + 2)[1:-1], drawn, strict=True):
    known = [(i, name, value) for i, (name, marks) in enumerate(rows)
             if (value := marks.get(model)) is not None]  # fmt: skip
    told = [f"{name}, {words[model]}: {tell(value)}" for _, name, value in known]
    at = [i + lane for i, *_ in known]
    _marks(axes, model, [value for *_, value in known], at, told, size=8)
  short = [name if len(name) <= 18 else name[:17] + "…" for name in names]
  axes.set_yticks(range(len(rows)), [_text(name) for name in short])
  for label, name in zip(axes.get_yticklabels(), names, strict=True):
    hover(label, name)
  axes.set_ylim(len(rows) - 0.5, -0.5)
  axes.grid(False, axis="y")
  axes.grid(axis="x", color=RULE)
  axes.tick_params(axis="y", length=0)
  axes.spines["left"].set_visible(False)
  axes.margins(x=0.06)
  return _saved(figure, path)


def training(
  path: str | os.PathLike[str] | None,
  lines: Mapping[str, tuple[np.ndarray, np.ndarray]],
  *,
  xlabel: str,
  words: Mapping[str, str] = WORDS,
) -> Any:
  """Training curves: the mean over seeds, and the seeds' range as a band.

  Args:
    path: where the PNG goes; None writes none.
    lines: by model ``(x [N], values [N, S])``, of which at least one is `drawable`; what is not is
      a gap.
    xlabel: what x is.
    words: what the models are called.

  Returns:
    The figure, Matplotlib's: logarithmic where values are positive and span more than a factor of
    20.

  >>> lines = {"student": (np.arange(3), np.array([[1.0, 2.0], [np.nan, 1.0], [0.5, 0.5]]))}
  >>> training(None, lines, xlabel="epochs").axes[0].get_lines()[0].get_ydata().tolist()
  [1.5, nan, 0.5]
  """
  lines = {name: (drawable(x), drawable(values)) for name, (x, values) in lines.items()}
  every = np.concatenate([values[np.isfinite(values)] for _, values in lines.values()])
  if not every.size:
    raise ValueError("lines has no value to draw; leave out what was never measured.")
  figure, axes = _small(190, xlabel=xlabel, left=46)
  if every.min() > 0 and np.log(every.max()) - np.log(every.min()) > np.log(20):
    axes.set_yscale("log")
    ticks = _log_ticks(every.min() / 1.15, every.max() * 1.15)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
  for name, (x, values) in lines.items():
    kept = np.unique(np.linspace(0, len(x) - 1, 160).round().astype(int))  # all that can be seen
    x, values = np.asarray(x, np.float64)[kept], values[kept]
    whole = np.isfinite(values).all(axis=1) & np.isfinite(x)
    values = np.where(whole[:, None], values, np.nan)
    mean, low, high = values.mean(axis=1), values.min(axis=1), values.max(axis=1)
    colour, marker = _LOOKS[name]
    # A value between two gaps is no line, and would not be seen.
    lonely = whole & ~np.r_[False, whole[:-1]] & ~np.r_[whole[1:], False]
    axes.plot(x, mean, color=colour, linewidth=1.6)
    axes.plot(x[lonely], mean[lonely], ls="none", marker=marker, ms=5, color=colour)
    _band(axes, x, low, high, colour)
    some = np.flatnonzero(whole)[:: max(1, -(-int(whole.sum()) // 24))]
    several = values.shape[1] > 1
    told = [
      f"{words[name]}, {x[i]:.4g} {xlabel}: {mean[i]:.4g}"
      + f" ({low[i]:.4g} to {high[i]:.4g})" * several
      for i in some
    ]
    if len(some):
      _marks(axes, name, x[some], mean[some], told, size=9, alpha=0)
  axes.set_xlim(left=0)
  return _saved(figure, path)


def scatter(
  path: str | os.PathLike[str] | None,
  name: str,
  points: np.ndarray,
  *,
  ends: tuple[float, float],
  reach: float,
  words: Mapping[str, str] = WORDS,
) -> Any:
  """What a model put out against the labels: on the diagonal, it is right; below, its residuals.

  Args:
    path: where the PNG goes; None writes none.
    name: the model's, ``teacher``, ``baseline`` or ``student``: whose colour it has.
    points: ``[2, M]``, labels and outputs; of many some are drawn.
    ends: of both axes, the same for all models that are compared.
    reach: how far residuals are drawn, likewise.
    words: what the models are called.

  Returns:
    The figure, Matplotlib's.

  >>> figure = scatter(None, "student", np.array([[1.0, 2.0], [1.5, 2.0]]), ends=(0, 3), reach=1)
  >>> [axes.get_xlabel() for axes in figure.axes]
  ['', 'label; below, output − label']
  """
  labels, said = points[:, np.isfinite(points).all(axis=0)]
  figure, axes = _small(300, above="output", left=48, right=18, top=28, bottom=106)
  below = figure.add_axes((48 / _WIDE, 38 / 300, (_WIDE - 66) / _WIDE, 56 / 300))
  some = np.unique(np.linspace(0, len(labels) - 1, _DOTS).round().astype(int))
  some = some if len(labels) else np.zeros(0, int)
  colour, _ = _LOOKS[name]
  rest = {"ls": "none", "marker": "o", "ms": 4, "color": colour, "mec": "none", "alpha": 0.5}
  axes.plot(ends, ends, color="black", linestyle=(0, (3, 3)), linewidth=1)
  axes.plot(labels[some], said[some], **rest)
  below.axhline(0, color="black", linewidth=1)
  below.plot(labels[some], (said - labels)[some], **rest)
  axes.set(xlim=ends, ylim=ends)
  axes.set_xticklabels([])
  below.set_xlim(ends)
  below.set_ylim(-reach, reach)
  below.spines[["top", "left", "right"]].set_visible(False)
  below.tick_params(labelsize=11, length=3)
  below.tick_params(axis="y", length=0)
  for one in (axes, below):
    one.locator_params(axis="x", nbins=5)
  below.locator_params(axis="y", nbins=3)
  below.set_xlabel("label; below, output − label", fontsize=11)
  hover(axes.get_lines()[1], f"{words[name]}: {len(labels):,} examples")
  return _saved(figure, path)


def colours(path: str | os.PathLike[str] | None, names: Sequence[str]) -> Any:
  """What the colours of `classes` mean.

  Args:
    path: where the PNG goes; None writes none.
    names: of the classes, in the order of their numbers.

  Returns:
    The figure, Matplotlib's.

  >>> [text.get_text() for text in colours(None, ["road", "sky"]).axes[0].texts]
  ['road', 'sky']
  """
  columns = 3
  lines = -(-len(names) // columns)
  figure = _figure(_WIDE / 72, 20 * lines / 72)
  axes = figure.add_axes((0, 0, 1, 1))
  axes.axis("off")
  axes.set(xlim=(0, columns), ylim=(lines, 0))
  for k, name in enumerate(names):
    at = k % columns, k // columns + 0.5
    colour = "#{:02x}{:02x}{:02x}".format(*_palette(len(names))[k].tolist())
    axes.plot([at[0] + 0.08], [at[1]], marker="s", ms=10, color=colour, ls="none")
    short = name if len(name) <= 15 else name[:14] + "…"
    axes.text(at[0] + 0.18, at[1], _text(short), fontsize=11, va="center")
  return _saved(figure, path)


def classes(numbers: np.ndarray, count: int) -> np.ndarray:
  """A map of classes as a picture; what is below 0 is grey.

  Args:
    numbers: ``[H, W]`` whole numbers.
    count: how many classes there are.

  Returns:
    uint8 ``[H, W, 3]``.

  >>> classes(np.array([[0, -1]]), 2).tolist()
  [[[0, 114, 178], [200, 200, 200]]]
  """
  table = np.concatenate([_palette(max(count, int(numbers.max(initial=0)) + 1)), [[200] * 3]])
  return table[np.where(numbers < 0, len(table) - 1, numbers)].astype(np.uint8)


def _palette(count: int) -> np.ndarray:
  """A colour for each of so many classes, ``[count, 3]``: those of the series, then shades."""
  base = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in _COLOURS])
  shade = 1 / (1 + np.arange(count) // len(base))
  return (base[np.arange(count) % len(base)] * shade[:, None]).round().astype(int)


def png(picture: np.ndarray) -> bytes:
  """A picture as a PNG file's bytes, for a page to hold.

  Args:
    picture: uint8 ``[H, W]`` or ``[H, W, 1]`` grey, ``[H, W, 3]`` colours, ``[H, W, 4]`` with an
      opacity.

  Returns:
    The file.

  >>> png(np.zeros((2, 2), np.uint8))[1:4]
  b'PNG'
  """
  _extras.need("reports.figures.png", "matplotlib")
  import matplotlib.image

  if picture.ndim == 2:
    picture = picture[..., None]
  if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] not in (1, 3, 4):
    raise ValueError(
      f"picture must be uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], got "
      f"{_check.show(picture)}."
    )
  if picture.shape[2] == 1:
    picture = np.repeat(picture, 3, axis=2)
  file = io.BytesIO()
  matplotlib.image.imsave(file, picture, format="png")
  return file.getvalue()


def _figure(width: float, height: float, layout: Any = None) -> Any:
  _extras.need("a picture", "matplotlib")
  import matplotlib.figure  # a third of a second, which importing the library should not cost

  return matplotlib.figure.Figure(figsize=(width, height), dpi=150, layout=layout)


def _axes(width: float, height: float, *, ylabel: str = "", title: str = "") -> tuple[Any, Any]:
  """A picture for a file, whose margins are as wide as its texts need."""
  figure = _figure(width, height, "constrained")
  axes = figure.add_subplot()
  axes.spines[["top", "right"]].set_visible(False)
  axes.set_ylabel(_text(ylabel))
  if title:
    axes.set_title(_text(title), fontsize=10)
  return figure, axes


def _small(
  height: int,
  *,
  xlabel: str = "",
  above: str = "",
  left: int = 40,
  right: int = 10,
  top: int = 10,
  bottom: int = 38,
) -> tuple[Any, Any]:
  """A picture for a page's column, with its margins in points."""
  figure = _figure(_WIDE / 72, height / 72)
  box = left / _WIDE, bottom / height, 1 - (left + right) / _WIDE, 1 - (top + bottom) / height
  axes = figure.add_axes(box)
  axes.spines[["top", "right", "left"]].set_visible(False)
  axes.tick_params(labelsize=11, length=3)
  axes.tick_params(axis="y", length=0)
  axes.grid(axis="y", color=RULE)
  axes.set_axisbelow(True)
  axes.locator_params(nbins=5)
  axes.set_xlabel(_text(xlabel), fontsize=11)
  axes.set_title(_text(above), loc="left", fontsize=11, x=-left / (_WIDE - left - right), pad=9)
  return figure, axes


def _marks(
  axes: Any, name: str, x: Any, y: Any, told: Sequence[str], *, size: float = 10, alpha: float = 1
) -> None:
  """A model's marks, each with the text that is shown where a pointer rests on it."""
  colour, marker = _LOOKS[name]
  (drawn,) = axes.plot(
    x, y, ls="none", marker=marker, ms=size, color=colour, mec="white", alpha=alpha, clip_on=False
  )
  hover(drawn, *told)


def _band(axes: Any, x: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str) -> None:
  axes.fill_between(x, low, high, color=colour, alpha=0.14, linewidth=0)


def _text(value: Any) -> str:
  r"""A name as a text: two dollars are no formula.

  >>> _text("$a$")
  '\\$a\\$'
  """
  return clean(value).replace("$", r"\$")


def drawable(values: np.ndarray) -> np.ndarray:
  """The values that a picture has room for, float32's: NaN for what is larger, 0 for smaller ones.

  What is beyond them comes of a training that has diverged, or of a file that says what nothing
  measured; no other value could be told apart beside it, and ticks would overflow.

  >>> drawable(np.array([1.0, 1e308, np.inf, 1e-308])).tolist()
  [1.0, nan, nan, 0.0]
  """
  size, limits = np.abs(values), np.finfo(np.float32)
  return np.where(size <= limits.max, np.where(size >= limits.tiny, values, 0.0), np.nan)


def _log_ticks(low: float, high: float) -> list[float]:
  """Powers of ten, or 1, 2 and 5 times them where there are few.

  >>> _log_ticks(80, 1200), _log_ticks(0.8, 2e6)
  ([100.0, 300.0, 1000.0], [1.0, 100.0, 10000.0, 1000000.0])
  """
  powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  found: list[float] = []
  for factors in ((1,), (1, 3), (1, 2, 5)):
    found = [f * 10.0**p for p in powers for f in factors]
    found = [v for v in found if low * 0.999 <= v <= high * 1.001]
    if len(found) >= 3:
      break
  return found[:: -(-len(found) // 5)] if found else [low, high]


def _saved(figure: Any, path: str | os.PathLike[str] | None) -> Any:
  if path is not None:
    with runs.replacing(_check.folder("path", path)) as writing:
      figure.savefig(writing, format="png")
  return figure


def _check_entries(name: str, entries: Any) -> None:
  if not isinstance(entries, Mapping) or not entries:
    raise ValueError(
      f"{name} must be a mapping with at least one entry by its name, got {entries}."
    )


def _as_long(name: str, values: Any, length: int) -> np.ndarray:
  """Values ``[N]`` with NaN for None; NaN throughout for None alone."""
  found = np.full(length, np.nan) if values is None else np.asarray(values, np.float64)
  if found.shape != (length,):
    raise ValueError(
      f"series[{name!r}] has values of shape {found.shape} for {length} points of x; give one for "
      "each, NaN where there is none."
    )
  return found


def _mean_std(value: Value) -> tuple[float, float | None]:
  """A mean and its standard deviation, None where there is none."""
  mean, std = value if isinstance(value, tuple) else (value, None)
  return float(mean), None if std is None or not np.isfinite(std) else float(std)


def _shown(mean: float, std: float | None) -> str:
  return with_std(mean if np.isfinite(mean) else None, std)


def _fences(values: Sequence[float]) -> tuple[float, float]:
  """Outside of them a value lies far away from the others: six times the quartiles' distance.

  Tukey's fences for what is far out are at three times; a method that is only bad stays in sight.

  >>> _fences([97.0, 98.0, 97.5, 96.0, 10.0])
  (87.0, 106.5)
  """
  there = np.asarray(values, float)[np.isfinite(values)]
  if there.size < 4:
    return -np.inf, np.inf
  low, high = np.quantile(there, [0.25, 0.75])
  reach = 6 * (high - low)
  return (float(low - reach), float(high + reach)) if reach else (-np.inf, np.inf)


def _spread_by_factors(at: np.ndarray) -> bool:
  """Whether points lie more evenly by their factors than by their differences: 1, 2, 4, 8."""
  points = np.unique(at)
  if len(points) < 3 or points[0] <= 0:
    return False
  steps, factors = np.diff(points), np.diff(np.log(points))
  return bool(steps.max() / steps.min() > 2 * factors.max() / factors.min())


def _name_points(axes: Any, at: np.ndarray, names: Sequence[str]) -> None:
  """Ticks at the points, or at some of them where they are many."""
  step = -(-len(at) // 12)
  axes.set_xticks(at[::step], list(names)[::step])
  axes.set_xticks([], minor=True)
