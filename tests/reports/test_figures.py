"""Pictures show the numbers they were given, leave out what is missing, and say what is wrong."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from jaxdistill.reports import figures
from jaxdistill.reports._svg import svg

AXES = {"xlabel": "temperature", "ylabel": "accuracy, %"}


def test_a_curve_has_its_points_and_its_band():
  mean, std = [1.0, np.nan, 3.0, 5.0], [0.5, 0.5, np.nan, 0.25]
  series = {"a": (mean, std), "b": (np.zeros(4), None)}
  axes = figures.curves(None, [1, 2, 3, 4], series, **AXES).axes[0]
  a, b = axes.get_lines()
  assert a.get_xydata().tolist() == [[1, 1], [3, 3], [4, 5]]
  assert b.get_xydata().tolist() == [[1, 0], [2, 0], [3, 0], [4, 0]]
  band, empty = (collection.get_paths() for collection in axes.collections)
  corners = {tuple(corner) for path in band for corner in path.vertices.tolist()}
  assert corners == {(1, 0.5), (1, 1.5), (4, 4.75), (4, 5.25)}
  assert not any(len(path.vertices) for path in empty)
  assert (axes.get_xscale(), axes.get_xlabel()) == ("linear", "temperature")
  assert a.get_color() != b.get_color()
  assert a.get_marker() != b.get_marker()


def test_factors_are_drawn_by_their_logarithms_unless_the_points_have_names():
  series = {"a": (np.arange(5), np.ones(5))}
  factors = [1, 2, 4, 8, 16]
  by_factors = figures.curves(None, factors, series, **AXES).axes[0]
  assert by_factors.get_xscale() == "log"
  assert [text.get_text() for text in by_factors.get_xticklabels()] == ["1", "2", "4", "8", "16"]
  assert figures.curves(None, factors, series, **AXES, log=False).axes[0].get_xscale() == "linear"
  named = figures.curves(None, factors, series, **AXES, ticks=list("abcde")).axes[0]
  assert named.get_lines()[0].get_xdata().tolist() == [0, 1, 2, 3, 4]
  assert [text.get_text() for text in named.get_xticklabels()] == list("abcde")


def test_lines_are_in_the_legend():
  lines = {"labels alone": (96.5, 0.5), "teacher": 98.0}
  figure = figures.curves(None, [1, 2], {"kd": ([97, 98], [1, 1])}, **AXES, lines=lines)
  (legend,) = figure.legends
  assert [text.get_text() for text in legend.get_texts()] == ["kd", *lines]
  heights = [line.get_ydata()[0] for line in figure.axes[0].get_lines()]
  assert heights == [97, 96.5, 98]


def test_a_row_for_each_method(tmp_path):
  rows = {"kd": (97.5, 0.25), "pkt": (96.0, None), "lost": (float("nan"), None)}
  lines = {"labels alone": (96.5, 0.5)}
  path = tmp_path / "methods.png"
  figure = figures.intervals(path, rows, xlabel="accuracy, %", lines=lines)
  assert path.read_bytes().startswith(b"\x89PNG")
  axes = figure.axes[0]
  assert axes.yaxis_inverted()  # the first is on top
  shown = [text.get_text() for text in axes.texts]
  assert shown == ["97.50 ± 0.25", "96.00", "–"]
  dots = [container.lines[0].get_xydata().tolist() for container in axes.containers]
  assert dots == [[[97.5, 0]], [[96, 1]]]
  (legend,) = figure.legends
  assert legend.get_texts()[0].get_text() == "labels alone 96.50 ± 0.50"


def test_models_show_every_seed():
  axes = figures.models(None, {"teacher": [98.0], "student": [96.0, 97.0]}, ylabel="%").axes[0]
  seeds = [collection.get_offsets()[:, 1].tolist() for collection in axes.collections[::2]]
  assert [98.0] in seeds
  assert [text.get_text() for text in axes.texts] == ["98.00", "96.50"]


def test_what_cannot_be_drawn_is_named():
  with pytest.raises(ValueError, match=r"series\['a'\] has values of shape \(3,\) for 2 points"):
    figures.curves(None, [1, 2], {"a": ([1, 2, 3], None)}, **AXES)
  with pytest.raises(ValueError, match="series must be a mapping with at least one entry"):
    figures.curves(None, [1, 2], {}, **AXES)
  with pytest.raises(ValueError, match="rows must be a mapping with at least one entry"):
    figures.intervals(None, {}, xlabel="accuracy")
  with pytest.raises(ValueError, match="rows is empty; give at least one class"):
    figures.groups(None, [], xlabel="accuracy")
  with pytest.raises(ValueError, match="lines has no value to draw"):
    figures.training(None, {"student": (np.zeros(1), np.full((1, 1), np.nan))}, xlabel="epochs")


@pytest.mark.parametrize("huge", [1e39, 1.7e308])
def test_numbers_that_no_training_has_are_gaps_in_its_curves(huge):
  values = np.array([[1.0, 2.0], [huge, 1.0], [30.0, 0.5], [0.5, 5e-324]])
  figure = figures.training(None, {"student": (np.array([0, 1, huge, 3]), values)}, xlabel="epochs")
  (line,) = figure.axes[0].get_lines()[:1]
  np.testing.assert_array_equal(line.get_xdata(), [0, 1, np.nan, 3])
  np.testing.assert_array_equal(line.get_ydata(), [1.5, np.nan, np.nan, 0.25])
  assert svg(figure, "loss")


def test_a_figure_in_a_page_has_the_pages_colours_and_tells_its_marks():
  names = ["$\\frac{$ $x", "\x00\ud800日本"]
  rows = [(name, {"teacher": 97.0, "student": 93.0 - i}) for i, name in enumerate(names)]
  drawn = svg(figures.groups(None, rows, xlabel="a $b$"), "<classes> & $b$")
  assert drawn == svg(figures.groups(None, rows, xlabel="a $b$"), "<classes> & $b$")
  root = ElementTree.fromstring(drawn)
  assert root.attrib["aria-label"] == root[0].text == "<classes> & $b$"
  told = {node.text for node in root.iter("title")}
  assert {"$\\frac{$ $x, teacher: 97.0", "\ufffd\ufffd日本, student: 92.0", names[0]} <= told
  assert "a $b$" in {node.text for node in root.iter("text")}  # no formula
  used = {name for node in root.iter() for name in node.attrib}
  assert not used & {"style", "id", "href", "clip-path", "class"}
  assert "var(--teacher)" in drawn
  assert "var(--student)" in drawn
  # White is the page's ground, black the ink, and both change with the reader's scheme.
  assert not re.search("#(000000|ffffff)", drawn)


def test_outputs_lie_where_they_are_and_their_residuals_below():
  points = np.array([[1.0, 2.0, np.nan], [1.5, 1.75, 3.0]])
  above, below = figures.scatter(None, "student", points, ends=(0, 3), reach=1).axes
  diagonal, dots = above.get_lines()
  assert diagonal.get_xydata().tolist() == [[0, 0], [3, 3]]
  assert dots.get_xydata().tolist() == [[1, 1.5], [2, 1.75]]
  assert below.get_lines()[1].get_xydata().tolist() == [[1, 0.5], [2, -0.25]]
  assert (above.get_xlim(), above.get_ylim(), below.get_ylim()) == ((0, 3), (0, 3), (-1, 1))
  assert figures.scatter(None, "student", np.zeros((2, 0)), ends=(0, 1), reach=1)


def test_a_class_has_its_colour_and_its_name():
  numbers = np.arange(-1, 11).reshape(3, 4)
  picture = figures.classes(numbers, 11)
  assert (picture.shape, picture.dtype) == ((3, 4, 3), np.uint8)
  assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 12
  names = [f"class {k}" for k in range(11)]
  axes = figures.colours(None, names).axes[0]
  assert [text.get_text() for text in axes.texts] == names
  shown = [line.get_color() for line in axes.get_lines()]
  assert shown == ["#{:02x}{:02x}{:02x}".format(*rgb) for rgb in picture.reshape(-1, 3)[1:]]
