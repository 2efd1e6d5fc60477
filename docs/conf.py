"""How the documentation site is built: `python -m sphinx -W docs build/site`.

Pages are Markdown, the reference is read from the library's own docstrings, and the theme is
NumPy's. Nothing is fetched when a page is opened: no font, no script, no search index. Formulas are
MathML, which browsers draw by themselves: MathJax would be a megabyte of script on each page.
"""

import pathlib
import re
import sys
from typing import Any

import latex2mathml.converter
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

DOCS = pathlib.Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS)]

import curves  # noqa: E402

import jaxdistill  # noqa: E402
import losses  # noqa: E402

project, release = "jaxdistill", jaxdistill.__version__
copyright = "the authors of jaxdistill, Apache-2.0"
extensions = [
  "myst_parser",
  "sphinx.ext.autodoc",
  "sphinx.ext.napoleon",
  "sphinx.ext.viewcode",
  "sphinx_copybutton",
]
exclude_patterns = ["how/_setting.md"]
# Names in single backticks are the library's own, where there is one of that name.
default_role = "py:obj"

myst_enable_extensions = ["colon_fence"]
myst_fence_as_directive = ["math"]  # as on GitHub, too
myst_heading_anchors = 3  # `losses.md#soft_target_kl`, as on GitHub
html_math_renderer = "mathml"
autodoc_member_order = "alphabetical"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_use_ivar = True
napoleon_use_rtype = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80

html_theme = "pydata_sphinx_theme"
html_title = "jaxdistill"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_sidebars = {"start": [], "methods": []}  # pages without others below them
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
  "logo": {"text": "jaxdistill"},
  "icon_links": [
    {
      "name": "Source",
      "url": "https://github.com/jaxdistill/jaxdistill",
      "icon": "fa-brands fa-github",
    }
  ],
  "footer_start": ["copyright"],
  "footer_end": [],
  "secondary_sidebar_items": ["page-toc"],
  "show_toc_level": 2,
  "header_links_before_dropdown": 7,
  "navbar_persistent": ["search-button"],
}


class Door(SphinxDirective):
  """`.. door:: jaxdistill.data`: a room's names, each with the line that its door has for it."""

  required_arguments = 1

  def run(self) -> list[nodes.Node]:
    """The table, as it would be written by hand."""
    (room,) = self.arguments
    path = ROOT.joinpath(*room.split("."), "__init__.py")
    self.env.note_dependency(str(path))
    rows = [".. list-table::", "   :widths: 30 70", ""]
    for name, line in re.findall(r'^  "(\w+)",  # (.*)$', path.read_text("utf-8"), re.M):
      rows += [f"   * - :py:obj:`{name} <{room}.{name}>`", f"     - {line[0].upper()}{line[1:]}."]
    return self.parse_text_to_nodes("\n".join(rows))


def mathml(latex: str) -> str:
  """A displayed equation; a name of several letters is one word of it, and no operator."""
  made = latex2mathml.converter.convert(latex, display="block")
  return re.sub(r"<mo>([A-Za-z]{2,})</mo>", r"<mi>\1</mi>", made)


def equation(translator: Any, node: nodes.math_block) -> None:
  """Writes an equation, which scrolls where it is wider than the page."""
  translator.body.append(f'<div class="formula">{mathml(node.astext())}</div>\n')
  raise nodes.SkipNode


def with_curves(app: Sphinx, doctree: nodes.document) -> None:
  """Puts each loss's curve below its formula."""
  if app.env.docname != "losses":
    return
  drawn = curves.curves(losses.averaged())
  for section in doctree.findall(nodes.section):
    name = section.next_node(nodes.title).astext()
    if name not in drawn:
      continue
    curve = drawn[name]
    last = [child for child in section.children if isinstance(child, nodes.math_block)][-1]
    caption = f"Along the line: {curve.moves}."
    if curve.equal is not None:
      caption += " Dashed: where the student is as the teacher."
    figure = f'{curves.drawing(name, curve)}\n<p class="caption">{caption}</p>'
    section.insert(section.index(last) + 1, nodes.raw("", figure, format="html"))


def setup(app: Sphinx) -> None:
  """What these pages need beyond the extensions."""
  app.add_directive("door", Door)
  app.add_html_math_renderer("mathml", (None, None), (equation, None))
  app.connect("doctree-read", with_curves)
