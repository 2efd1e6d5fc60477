"""A figure as part of a page: SVG in the page's own colours, with a text over each of its marks.

Matplotlib writes SVG for a file of its own: styles, identifiers, a white ground. Inside a page it
has the page's colours, light or dark, no style that the page's policy would have to allow, and no
identifier that two figures could share.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from jaxdistill.reports._format import MODELS, clean

__all__ = ["BASELINE", "RULE", "STUDENT", "TEACHER", "hover", "svg"]

TEACHER, BASELINE, STUDENT = "#565a61", "#b4590c", "#1a62b7"
RULE = "#dedfd9"
# page.css has these by name, for a light and for a dark ground.
_VARIABLES = dict(zip((TEACHER, BASELINE, STUDENT), (f"var(--{m})" for m in MODELS), strict=True))
_VARIABLES |= {"#000000": "var(--soft)", "#ffffff": "var(--surface)", RULE: "var(--line)"}
# An artist's gid carries the texts; what stands between them survives in an XML attribute.
_HOVER, _BETWEEN = "hover:", "\u2028"
_KEPT = {"d", "x", "y", "transform", "viewBox"}
_STYLES = {"fill", "fill-opacity", "opacity", "stroke", "stroke-dasharray", "stroke-linecap",
           "stroke-opacity", "stroke-width", "text-anchor"}  # fmt: skip


def hover(artist: Any, *texts: str) -> None:
  """What is shown where a pointer rests on an artist, or on each of its marks in turn."""
  artist.set_gid(_HOVER + _BETWEEN.join(clean(text) for text in texts))


def svg(figure: Any, label: str) -> str:
  """A figure as an element of a page.

  Args:
    figure: Matplotlib's, from `jaxdistill.reports.figures`.
    label: what it shows, for whoever does not see it.

  Returns:
    An ``svg`` element, without styles and identifiers; the same bytes for the same figure.
  """
  import matplotlib

  figure.patch.set_visible(False)
  for axes in figure.axes:
    axes.patch.set_visible(False)
  file = io.StringIO()
  with matplotlib.rc_context({"svg.fonttype": "none"}), warnings.catch_warnings():
    # The reader's font has what Matplotlib's own lacks.
    warnings.filterwarnings("ignore", message="Glyph .* missing from")
    figure.savefig(file, format="svg", metadata={"Date": None})
  drawn = ElementTree.fromstring(file.getvalue())
  shapes = {node.get("id"): node for node in drawn.iter() if _tag(node) == "path"}
  made = ElementTree.Element(
    "svg",
    {
      "viewBox": drawn.attrib["viewBox"],
      "role": "img",
      "aria-label": clean(label),
      "fill": "var(--soft)",
      "stroke-linejoin": "round",
      "font-size": "11",
    },
  )
  ElementTree.SubElement(made, "title").text = clean(label)
  for child in drawn:
    made.extend(_inlined(child, shapes))
  return ElementTree.tostring(made, encoding="unicode")


def _tag(node: ElementTree.Element) -> str:
  return node.tag.rpartition("}")[2]


def _inlined(
  node: ElementTree.Element, shapes: dict[str | None, ElementTree.Element]
) -> list[ElementTree.Element]:
  """An element as the page has it; a mark that refers to a shape becomes that shape, moved."""
  tag = _tag(node)
  if tag in ("defs", "metadata"):
    return []
  given = {**node.attrib, **_styles(node.get("style", ""))}
  if tag == "use":
    shape = shapes[next(v for name, v in given.items() if name.endswith("href"))[1:]]
    given |= {"d": shape.attrib["d"], "transform": f"translate({given.pop('x')} {given.pop('y')})"}
    tag = "path"
  kept = {
    name: _rounded(value) if name in _KEPT else _VARIABLES.get(value, value)
    for name, value in given.items()
    if name in _KEPT | _STYLES | {"font-size", "font-weight"}
  }
  kept = {name: value for name, value in kept.items() if value}
  inner = [one for child in node for one in _inlined(child, shapes)]
  told = node.get("id", "")
  if tag == "g" and not told.startswith(_HOVER) and not kept:
    return inner
  made = ElementTree.Element(tag, kept)
  if tag == "text":
    made.text = node.text
  made.extend(inner)
  if told.startswith(_HOVER):
    _tell(made, told.removeprefix(_HOVER).split(_BETWEEN))
  return [made]


def _tell(group: ElementTree.Element, texts: Sequence[str]) -> None:
  """One text over all of a group; of several, one over each of its marks."""
  marks = [group] if len(texts) == 1 else [one for one in group.iter() if one.tag == "path"]
  for mark, text in zip(marks, texts, strict=True):
    title = ElementTree.Element("title")
    title.text = text
    mark.insert(0, title)


def _styles(text: str) -> dict[str, str]:
  """A style's properties as attributes; of a font, its size and weight: the family is the page's.

  >>> _styles("font: bold 11px 'DejaVu Sans'; fill: #000000; white-space: pre")
  {'font-size': '11', 'font-weight': 'bold', 'fill': '#000000'}
  """
  found: dict[str, str] = {}
  for one in text.split(";"):
    name, _, value = (part.strip() for part in one.partition(":"))
    if name in ("font", "font-size"):
      size = re.search(r"([\d.]+)px", value)
      found |= {"font-size": size[1]} if size else {}
      found |= {"font-weight": "bold"} if "bold" in value or "700" in value else {}
    elif name in _STYLES:
      found[name] = value
  return found


def _rounded(text: str) -> str:
  """Coordinates to a tenth of a point.

  >>> _rounded("M 10.123456 2.04  L 1 2"), _rounded("rotate(-0 1.5 2)")
  ('M 10.1 2 L 1 2', '')
  """
  if text.startswith("rotate(-0 "):
    return ""
  short = re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):.1f}".removesuffix(".0"), text)
  return " ".join(short.split())
