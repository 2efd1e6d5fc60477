"""Pages of HTML that need nothing but themselves: templates, one style sheet, a short script.

The templates escape every text. A policy in the head of each page allows the style sheet, the
script and pictures that are in it, by their digests, and nothing else.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import importlib.resources
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxdistill.reports._format import WORDS, Cell, Table, Told, clean
from jaxdistill.reports._svg import svg

__all__ = ["Figure", "Gallery", "Sample", "Section", "Tile", "legend", "named", "render"]

_MARKS = {"teacher": "■", "baseline": "▲", "student": "●"}


class Tile(NamedTuple):
  """A number that decides, with its name above and what it is held against below."""

  label: str
  value: str
  beside: str


@dataclasses.dataclass(frozen=True)
class Figure:
  """A figure with its caption.

  Attributes:
    picture: Matplotlib's, from `jaxdistill.reports.figures`.
    label: what it shows, for whoever does not see it.
    caption: below it, in parts; by default the label.
    above: whether the caption stands above.
  """

  picture: Any
  label: str
  caption: Sequence[Cell] = ()
  above: bool = False

  @property
  def drawn(self) -> str:
    """The ``svg`` element."""
    return svg(self.picture, self.label)


@dataclasses.dataclass(frozen=True)
class Gallery:
  """Examples to look at, from `exhibits.shown`, with what is said of them above.

  Attributes:
    items: those that are seen at once.
    title: above them.
    text: below the title.
    more: those that a click opens.
  """

  items: Sequence[Mapping[str, Any]]
  title: str = ""
  text: str = ""
  more: Sequence[Mapping[str, Any]] = ()

  @property
  def kind(self) -> str:
    """What it is for a style sheet: texts need more room than a picture, and several pictures."""
    if any(item["maps"] for item in self.items):
      return "wide"
    return "texts" if any(item["text"] for item in self.items) else ""


@dataclasses.dataclass(frozen=True)
class Sample:
  """A text's beginning, and how it goes on by whom, side by side.

  Attributes:
    prompt: the beginning.
    said: pairs of whose it is and the text.
    about: which example it is.
  """

  prompt: str
  said: Sequence[tuple[Cell, str]]
  about: str = ""


@dataclasses.dataclass(frozen=True)
class Section:
  """A part of a page with its heading; what it has is shown in this order.

  Attributes:
    name: its anchor.
    title: its heading.
    text: what it says.
    note: how that came about.
    legend: from `legend`.
    figures: side by side where there is room.
    tables: one below the other.
    after: what the numbers above need to be understood.
    items: what things are, ``(name, text)``.
    galleries: of examples.
    samples: texts side by side.
    code: lines to copy.
    folded: tables that are opened by a click on what they are.
  """

  name: str
  title: str
  text: str = ""
  note: str = ""
  legend: Sequence[tuple[str, Told]] = ()
  figures: Sequence[Figure] = ()
  tables: Sequence[Table] = ()
  code: Sequence[str] = ()
  after: str = ""
  items: Sequence[tuple[Told, str]] = ()
  galleries: Sequence[Gallery] = ()
  samples: Sequence[Sample] = ()
  folded: Sequence[tuple[str, Table]] = ()

  def __bool__(self) -> bool:
    empty = ("name", "title", "note", "legend")
    return any(getattr(self, one.name) for one in dataclasses.fields(self) if one.name not in empty)


def named(model: str, words: Mapping[str, str] = WORDS) -> Told:
  """What a model is called, in its colour."""
  return Told(words[model], model)


def legend(models: Sequence[str], words: Mapping[str, str] = WORDS) -> list[tuple[str, Told]]:
  """The models' marks and what they are called."""
  return [(_MARKS[name], named(name, words)) for name in models]


def render(template: str, **context: Any) -> str:
  """A page from its template, of the package's folder ``templates``."""
  text = {name: _file(f"page.{name}") for name in ("css", "js")}
  digests = {name: _digest(one) for name, one in text.items()}
  policy = (
    f"default-src 'none'; img-src data:; style-src 'sha256-{digests['css']}'; "
    f"script-src 'sha256-{digests['js']}'; base-uri 'none'; form-action 'none'"
  )
  page = _environment().get_template(template).render(policy=policy, **text, **context)
  return page.rstrip() + "\n"


@functools.cache
def _environment() -> Any:
  import jinja2

  def cleaned(value: Any) -> Any:
    return value if hasattr(value, "__html__") else clean(value)  # which a template has made

  return jinja2.Environment(
    loader=jinja2.PackageLoader("jaxdistill.reports._pages"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=cleaned,
  )


def _file(name: str) -> str:
  folder = importlib.resources.files("jaxdistill.reports._pages") / "templates"
  return (folder / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
  return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
