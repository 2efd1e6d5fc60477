"""A page of HTML that needs nothing but itself: elements, tables, pictures as data, one style.

Built with the standard library's ElementTree, which escapes every text and attribute. The style,
``page.css`` beside this file, follows the reader's colour scheme; colours of charts are its
variables, so that they follow too.
"""

from __future__ import annotations

import base64
import importlib.resources
import re
from collections.abc import Iterable, Sequence
from typing import Any
from xml.etree import ElementTree

__all__ = [
  "Element",
  "document",
  "element",
  "image",
  "scrolled",
  "section",
  "table",
  "text_of",
  "tile",
]

Element = ElementTree.Element
# What neither HTML nor a font has: controls, and halves of a surrogate pair.
_ODD = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def element(tag: str, /, *children: Any, **attributes: Any) -> Element:
  """An element; texts are escaped when the page is written.

  Args:
    tag: its name.
    *children: elements, texts, lists of them; None is left out.
    **attributes: by name, ``class_`` for ``class`` and ``_`` for ``-``; None is left out.

  Returns:
    The element.

  >>> ElementTree.tostring(element("a", "<b>", class_="x"), encoding="unicode", method="html")
  '<a class="x">&lt;b&gt;</a>'
  """
  named = {
    name.rstrip("_").replace("_", "-"): _clean(value)
    for name, value in attributes.items()
    if value is not None
  }
  made = ElementTree.Element(tag, named)
  _fill(made, children)
  return made


def _fill(parent: Element, children: Iterable[Any]) -> None:
  for child in children:
    if child is None:
      continue
    if isinstance(child, list | tuple):
      _fill(parent, child)
    elif isinstance(child, ElementTree.Element):
      parent.append(child)
    elif len(parent):
      parent[-1].tail = (parent[-1].tail or "") + _clean(child)
    else:
      parent.text = (parent.text or "") + _clean(child)


def _clean(value: Any) -> str:
  if isinstance(value, float):
    return f"{value:.6g}"
  return _ODD.sub("\ufffd", str(value))


def text_of(made: Element) -> str:
  """All the text in an element, for tests and for plain text.

  >>> text_of(element("p", "one ", element("b", "two")))
  'one two'
  """
  return "".join(made.itertext())


def table(
  head: Sequence[Any],
  rows: Iterable[Sequence[Any]],
  *,
  caption: str | None = None,
  prose: bool = False,
) -> Element:
  """A table whose first column names its rows, and which scrolls in its own box where it is wide.

  Args:
    head: texts or elements; the first column is left-aligned, the others right.
    rows: as long as the head.
    caption: above it, and what a screen reader calls it.
    prose: whether the last column is text, which is left-aligned and wrapped.

  Returns:
    The box.

  >>> text_of(table(["", "accuracy"], [["student", "0.9"]], caption="All of it"))
  'All of itaccuracystudent0.9'
  """
  last = len(head) - 1

  def kind(i: int) -> str | None:
    return "wide" if prose and i == last else None

  titles = [element("th", one, scope="col", class_=kind(i)) for i, one in enumerate(head)]
  body = []
  for row in rows:
    cells = [element("td", cell, class_=kind(i)) for i, cell in enumerate(row) if i]
    body.append(element("tr", element("th", row[0], scope="row"), cells))
  made = element(
    "table",
    None if caption is None else element("caption", caption),
    element("thead", element("tr", titles)),
    element("tbody", body),
    class_="few" if len(head) <= 4 else None,
  )
  return scrolled(made, caption or "table")


def scrolled(made: Element, label: str) -> Element:
  """A box that scrolls sideways, with the keyboard too."""
  return element("div", made, class_="scroll", role="region", aria_label=label, tabindex=0)


def section(title: str, *children: Any, name: str) -> Element:
  """A section with its heading and the anchor ``name``."""
  return element("section", element("h2", title), *children, id=name)


def image(png: bytes, alt: str, *, pixelated: bool = False) -> Element:
  """A PNG as part of the page; a small one is shown in whole pixels."""
  source = "data:image/png;base64," + base64.b64encode(png).decode()
  return element("img", src=source, alt=alt, class_="pixels" if pixelated else None)


def document(title: str, *children: Any) -> str:
  """The whole page.

  Args:
    title: of the window.
    *children: what is in ``main``.

  Returns:
    HTML that fetches nothing: a policy in its head forbids that, too.
  """
  policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
  head = element(
    "head",
    element("meta", charset="utf-8"),
    element("meta", http_equiv="Content-Security-Policy", content=policy),
    element("meta", name="viewport", content="width=device-width, initial-scale=1"),
    element("meta", name="color-scheme", content="light dark"),
    element("title", title),
    element(
      "style", (importlib.resources.files("jaxdistill.reports._pages") / "page.css").read_text()
    ),
  )
  page = element("html", head, element("body", element("main", *children)), lang="en")
  return "<!DOCTYPE html>\n" + ElementTree.tostring(page, encoding="unicode", method="html") + "\n"


def tile(label: str, value: str, beside: str) -> Element:
  """A number that decides, with its name above and what it is held against below.

  Args:
    label: its name.
    value: the number.
    beside: what it is held against.

  >>> tile("Size", "16× smaller", "19,578 parameters")[1].text
  '16× smaller'
  """
  return element(
    "div",
    element("dt", label),
    element("dd", value, class_="value"),
    element("dd", beside, class_="beside"),
  )
