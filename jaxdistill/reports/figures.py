"""Pictures of results: models side by side, curves over a setting, methods in rows.

Each is written as a PNG file, or only returned, for a notebook to show. All of them show a mean and
its standard deviation over seeds. Colours are told apart with any kind
of colour vision (Okabe, Ito, 2008), and series by their markers too.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill import _check, _extras
from jaxdistill.evaluation import metrics
from jaxdistill.reports._format import with_std

__all__ = ["curves", "frontier", "intervals", "models", "png"]

# A mean; or a mean and its standard deviation, None or NaN where there is none.
Value = float | tuple[float, float | None]
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("--", ":", "-.")
_GREY = "#444444"
_KINDS = (_GREY, "#c46a1b", "#1b6ac4")  # teacher, labels alone, distilled


def models(
  path: str | os.PathLike[str] | None,
  values: Mapping[str, Any],
  *,
  ylabel: str,
  title: str = "",
) -> Any:
  """Models side by side: every seed a dot, the mean with its standard deviation.

  Args:
    path: where the PNG goes; None writes none.
    values: for each model, by the text below it, its values ``[S]`` over seeds.
    ylabel: what the values are.
    title: above the picture.

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
    axes.errorbar(i, mean, yerr=std, fmt="D", color=colour, capsize=5, ms=7, label=name)
    axes.annotate(f"{mean:.2f}", (i, mean), (30, 0), textcoords="offset points", va="center")
  axes.set_xticks(range(len(values)), list(values))
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
    axes.plot(at[there], mean[there], marker=marker, ms=5, color=colour, label=name)
    banded = there & np.isfinite(std)
    low, high = (mean - std)[banded], (mean + std)[banded]
    axes.fill_between(at[banded], low, high, color=colour, alpha=0.14, linewidth=0)
  for i, (name, value) in enumerate((lines or {}).items()):
    mean, std = _mean_std(value)
    colour = (_GREY, "#8a8a8a")[i % 2]  # no series is grey
    axes.axhline(mean, color=colour, linestyle=_LINES[i % 3], linewidth=1.4, label=name)
    if std is not None:
      axes.axhspan(mean - std, mean + std, color=colour, alpha=0.1, linewidth=0)
  _name_points(axes, at, [f"{p:g}" for p in points] if ticks is None else list(ticks))
  axes.set_xlabel(xlabel)
  axes.grid(axis="y", alpha=0.25)
  loc = "outside right upper" if beside else "outside upper center"
  figure.legend(loc=loc, ncols=1 if beside else entries, frameon=False, fontsize=9)
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
      label=label,
    )
    if i:
      axes.annotate(f"{i}", (at, value), (7, 4), textcoords="offset points", fontsize=9)
  line = [points[name][:2] for name in front]
  if len(line) > 1:
    axes.plot(*zip(*line, strict=True), color=_KINDS[2], alpha=0.5, label="Pareto front", zorder=0)
  if limit is not None:
    axes.axvline(limit, color="#8a8a8a", linestyle="--", linewidth=1.2, label=f"budget {limit:,g}")
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
    colour = (_KINDS[1], _GREY)[i % 2]
    shown = f"{name} {_shown(mean, std)}"
    axes.axvline(mean, color=colour, linestyle=_LINES[i % 3], linewidth=1.4, label=shown)
    if std is not None:
      axes.axvspan(mean - std, mean + std, color=colour, alpha=0.1, linewidth=0)
  for i, value in enumerate(rows.values()):
    mean, std = _mean_std(value)
    if np.isfinite(mean):
      axes.errorbar(mean, i, xerr=std, fmt="o", color=_KINDS[2], capsize=3, ms=5)
    # At the right end, in a column: a text beside each dot would hide its neighbours'.
    where = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
    axes.annotate(_shown(mean, std), (1.0, i), (4, 0), va="center", fontsize=9, **where)
  axes.set_yticks(range(len(rows)), list(rows))
  axes.set_ylim(len(rows) - 0.5, -0.5)
  axes.set_xlabel(xlabel)
  axes.grid(axis="x", alpha=0.25)
  if lines:
    figure.legend(loc="outside upper center", ncols=len(lines), frameon=False, fontsize=9)
  return _saved(figure, path)


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


def _axes(width: float, height: float, *, ylabel: str = "", title: str = "") -> tuple[Any, Any]:
  _extras.need("a picture", "matplotlib")
  import matplotlib.figure  # a third of a second, which importing the library should not cost

  figure = matplotlib.figure.Figure(figsize=(width, height), dpi=150, layout="constrained")
  axes = figure.add_subplot()
  axes.spines[["top", "right"]].set_visible(False)
  axes.set_ylabel(ylabel)
  if title:
    axes.set_title(title, fontsize=10)
  return figure, axes


def _saved(figure: Any, path: str | os.PathLike[str] | None) -> Any:
  if path is not None:
    figure.savefig(_check.folder("path", path), format="png")
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
