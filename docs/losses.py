"""Writes `docs/losses.md` from the docstrings of `jaxdistill.losses`, or checks that it is current.

    python docs/losses.py            # writes
    python docs/losses.py --check    # fails where the page is not what would be written

It reads the source and imports nothing of it, so that any Python runs it. A loss's docstring is
paragraphs in this order: one line with the acronym in brackets; the formula; remarks, if any; the
sections Args (or Attributes), Returns and Raises; ``Source: authors, "title", year``; ``Other
codes:``, what they do and which one this is; an example. `docs/losses.toml` has the formulas once
more, to be typeset, and what each loss was compared with.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import pathlib
import re
import sys
import tomllib
from collections.abc import Iterable, Sequence

from generated import write_or_check

__all__ = [
  "Docstring",
  "Entry",
  "averaged",
  "command",
  "families",
  "main",
  "page",
  "parse",
  "typeset",
]

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOSSES = ROOT / "jaxdistill" / "losses"
PAGE = ROOT / "docs" / "losses.md"
BESIDE = tomllib.loads((ROOT / "docs" / "losses.toml").read_text("utf-8"))
FAMILIES = (
  "logits",
  "partitions",
  "binary",
  "regression",
  "ranking",
  "self_distillation",
  "views",
  "features",
  "prototypes",
  "relations",
)
SECTIONS = ("Args", "Attributes", "Returns", "Raises")
LABELS = ("Source", "Other codes")
# Public, but nothing to average: transforms and pieces of losses.
PIECES = {
  "Banks",
  "class_means",
  "init_banks",
  "overhaul_margin",
  "region_logits",
  "region_weight",
  "soft_label_weight",
  "standardize_logits",
}

command = "python docs/losses.py"

PREFACE = """\
# Losses

Every loss here is one function: `from jaxdistill import losses`, then `losses.soft_target_kl(...)`.
The page is made from the docstrings by `{command}`; to change it, change those.
`help(losses.soft_target_kl)` has the formula as text, the errors and an example that runs, too.

## What all of them keep to

- **Arguments.** Student first, teacher second, labels third where there are any. What can be chosen
  is a keyword with its full name; all but counts may be arrays, of a schedule or under `vmap`.
- **One value per example.** The axes of the batch stay and nothing is averaged over them: `[B]`, or
  `[B, L]` for tokens. The plain mean of the values is the number that the published code reports.
  The few with another axis are marked †.
- **Gradients are never stopped.** The teacher is frozen where it runs, in its forward pass, so two
  students can teach each other with the same functions. (The banks of `contrastive_bank` are state,
  and nothing passes through them.)
- **Channels last.** Logits `[..., K]`, vectors `[B, D]`, tokens `[B, L, D]`, maps `[B, H, W, C]`.
- **Sizes are matched, widths are not.** Of two maps the larger is average-pooled to the smaller,
  axis by axis: window i of n covers positions from floor(i · size / n) up to, not including,
  ceil((i + 1) · size / n), as in PyTorch's `adaptive_avg_pool2d`. Two widths where one is needed
  are an error, and a projector is the remedy.
- **`where` leaves examples out** of losses that compare examples (or positions) with each other: an
  example that is out is in no pair and no mean, may hold anything, and has the value 0.
- **Precision.** bfloat16 and float16 are computed in float32; float64 stays float64.
- **Finite in, finite out,** value and gradient: logits of any size (beyond ±1e30 they count as
  that), equal rows, features that are all 0, two classes, a batch of one; but squares of features
  leave float32 where these differ by more than 1e19. The divergences also take classes masked to
  −inf in both networks, and leave them out of every sum and mean: all of partitions (`decoupled_kd`
  and its kin), `cross_entropy`, `generalized_jsd`, `reverse_kl`, `skew_kl`, `skew_reverse_kl`,
  `soft_label_weight`, `soft_target_kl`, `total_variation`, `transformed_teacher`,
  `weighted_soft_labels` and `weighted_transformed_teacher`.

Under **Compared with** stands the code beside which value and every gradient are put in float64, to
1e-10 of the largest number (`tests/parity`), and what differs there. PyTorch 2.13 and torchdistill
1.1.5 are run as they were released; of other published codes and papers the formula is written anew
in PyTorch.

Logarithms are natural, ‖·‖ is the Euclidean norm, and `mean_c` is a mean over what the index c
counts.
"""


@dataclasses.dataclass(frozen=True)
class Docstring:
  """A docstring taken apart.

  Attributes:
    summary: its first line.
    paragraphs: the ones between the summary and the sections, as they are laid out.
    sections: of Args and Attributes what each name's text is; of others the text, under "".
    labelled: what stands after ``Source:`` and ``Other codes:``.
  """

  summary: str
  paragraphs: list[str]
  sections: dict[str, dict[str, str]]
  labelled: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Entry:
  """A public name with its docstring.

  Attributes:
    name: as in ``losses.name``.
    defaults: what each argument is by default, as source; None where it has none.
    keywords: the arguments that are keyword-only.
    is_function: whether it is one; a class has no formula.
    doc: the docstring.
  """

  name: str
  defaults: dict[str, str | None]
  keywords: tuple[str, ...]
  is_function: bool
  doc: Docstring

  @property
  def acronym(self) -> str:
    """What the summary has in brackets, before its colon."""
    found = re.match(r"[^:(]*\(([^()]+)\)", self.doc.summary)
    return found.group(1) if found else ""

  @property
  def formula(self) -> str:
    """A function's first paragraph, for code."""
    has_one = self.is_function and self.doc.paragraphs
    return self.doc.paragraphs[0].replace("``", "") if has_one else ""

  @property
  def remarks(self) -> list[str]:
    """The other paragraphs, each on one line."""
    rest = self.doc.paragraphs[self.is_function :]
    return [" ".join(paragraph.split()) for paragraph in rest]

  @property
  def source(self) -> tuple[str, str, str, str]:
    """Authors, title, year, and what follows; all empty where they cannot be told apart."""
    found = re.fullmatch(
      r'([^"]+), "([^"]+)", ((?:19|20)\d\d)(.*)', self.doc.labelled.get("Source", "")
    )
    if not found:
      return "", "", "", ""
    authors, title, year, rest = found.groups()
    return authors, title, year, rest

  @property
  def returns(self) -> str:
    """The text of Returns."""
    return self.doc.sections.get("Returns", {}).get("", "")


def parse(text: str) -> Docstring:
  """Takes a docstring apart.

  Args:
    text: as it stands in the source.

  Returns:
    Its parts; examples are left out.

  Raises:
    ValueError: a paragraph starts like a section that is none of `SECTIONS` or `LABELS`.
  """
  summary, *blocks = inspect.cleandoc(text).split("\n\n")
  paragraphs: list[str] = []
  sections: dict[str, dict[str, str]] = {}
  labelled: dict[str, str] = {}
  for block in blocks:
    head, _, rest = block.partition(":")
    if block.startswith(">>>"):
      break
    if head in SECTIONS and rest.startswith("\n"):
      sections[head] = _items(rest[1:], named=head in ("Args", "Attributes"))
    elif head in LABELS:
      labelled[head] = " ".join(rest.split())
    elif re.fullmatch(r"[A-Z][a-z]+( [a-z]+)?", head):
      raise ValueError(f"'{head}:' is none of {SECTIONS + LABELS}, in the docstring {summary!r}.")
    elif sections or labelled:
      raise ValueError(f"A paragraph comes after the sections, in the docstring {summary!r}.")
    else:
      paragraphs.append(block)
  return Docstring(" ".join(summary.split()), paragraphs, sections, labelled)


def _items(text: str, *, named: bool) -> dict[str, str]:
  """A section's text by name, or under ""."""
  if not named:
    return {"": " ".join(text.split())}
  items: dict[str, str] = {}
  name = ""
  for line in inspect.cleandoc("\n" + text).splitlines():
    if not line.startswith(" "):
      name, _, line = line.partition(":")
    items[name] = f"{items.get(name, '')} {line.strip()}".strip()
  return items


def families() -> dict[str, tuple[str, list[Entry]]]:
  """The public names by family.

  Returns:
    For each family the first line of its module, and its entries in alphabetical order.
  """
  modules = {path.stem: ast.parse(path.read_text("utf-8")) for path in LOSSES.glob("*.py")}
  nodes = {
    node.name: node
    for stem, module in modules.items()
    if not stem.startswith("_")
    for node in module.body
    if isinstance(node, ast.FunctionDef | ast.ClassDef)
  }
  return {
    family: (
      parse(ast.get_docstring(modules[family]) or "").summary,
      [_entry(nodes[name]) for name in sorted(_public(modules[family]), key=str.lower)],
    )
    for family in FAMILIES
  }


def _public(module: ast.Module) -> list[str]:
  """A module's `__all__`."""
  for node in module.body:
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
      return list(ast.literal_eval(node.value))
  raise ValueError("a family has no __all__")


def _entry(node: ast.FunctionDef | ast.ClassDef) -> Entry:
  """A function, or a class of fields."""
  doc = parse(ast.get_docstring(node) or "")
  if isinstance(node, ast.ClassDef):
    fields = [ast.unparse(field.target) for field in node.body if isinstance(field, ast.AnnAssign)]
    return Entry(node.name, dict.fromkeys(fields), (), False, doc)
  defaults: dict[str, str | None] = {argument.arg: None for argument in node.args.args}
  for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
    defaults[argument.arg] = ast.unparse(default) if default else None
  keywords = tuple(argument.arg for argument in node.args.kwonlyargs)
  return Entry(node.name, defaults, keywords, True, doc)


def averaged() -> dict[str, list[str]]:
  """The losses proper, by family.

  Returns:
    The names of the functions whose values are averaged: all but transforms and pieces of losses.
  """
  return {
    family: [entry.name for entry in entries if entry.name not in PIECES]
    for family, (_, entries) in families().items()
  }


def typeset(name: str) -> list[str]:
  """A loss's formula as equations.

  Args:
    name: of the loss.

  Returns:
    LaTeX of each; none for a class.
  """
  lines = BESIDE.get(name, {}).get("formula", "").splitlines()
  return [BESIDE["shared"][line[1:]] if line.startswith("@") else line for line in lines]


def page() -> str:
  """The whole page.

  Returns:
    Markdown.
  """
  everything = families()
  names = [entry.name for _, entries in everything.values() for entry in entries]
  lines = [_prose(PREFACE.format(command=command), names)]
  for family, (summary, entries) in everything.items():
    lines += [f"**{_heading(family)}**: {_prose(_lower(summary), names)}", ""]
    lines += [*_contents(entries, names), ""]
  for family, (_, entries) in everything.items():
    lines += [f"## {_heading(family)}", ""]
    for entry in entries:
      lines += [*_section(entry, names), ""]
  return "\n".join(lines).rstrip() + "\n"


def _heading(family: str) -> str:
  return family.capitalize().replace("_", "-")


def _contents(entries: Sequence[Entry], names: Iterable[str]) -> list[str]:
  """A table of contents."""
  rows = ["| name | acronym | what | gives |", "| --- | --- | --- | --- |"]
  for entry in entries:
    what = entry.doc.summary.replace(f" ({entry.acronym})", "", 1)
    shape = re.match(r"\(?(?:values )?``([^`]+)``", entry.returns)
    gives = f"`{shape.group(1)}`" if shape else ""
    cells = [_link(entry.name) + _mark(entry), entry.acronym, _prose(what, names), gives]
    rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
  return rows


def _section(entry: Entry, names: Iterable[str]) -> list[str]:
  """One name's section."""
  doc = entry.doc
  lines = [f"### {entry.name}", "", _prose(doc.summary, names), ""]
  lines += ["```python", *_signature(entry), "```", ""]
  for equation in typeset(entry.name):
    lines += ["```math", equation, "```", ""]
  for remark in entry.remarks:
    lines += [_prose(remark, names), ""]
  items = doc.sections.get("Args") or doc.sections.get("Attributes") or {}
  lines += [f"- `{name}`: {_prose(text, names)}" for name, text in items.items()]
  if entry.returns:
    lines.append(f"- returns{_mark(entry)} {_prose(_lower(entry.returns), names)}")
  authors, title, year, rest = entry.source
  lines += ["", f"**Paper:** {_prose(authors, names)}, *{title}*, {year}{_prose(rest, names)}", ""]
  lines += [f"**Other codes:** {_prose(doc.labelled.get('Other codes', ''), names)}", ""]
  compared = BESIDE.get(entry.name, {}).get("compared", "none.")
  lines.append(f"**Compared with:** {_prose(compared, names)}")
  return lines


def _signature(entry: Entry) -> list[str]:
  """The call, with defaults; its keywords on a line of their own where it is long."""
  shown = [name if text is None else f"{name}={text}" for name, text in entry.defaults.items()]
  first = len(shown) - len(entry.keywords)
  if not entry.keywords:
    return [f"{entry.name}({', '.join(shown)})"]
  line = f"{entry.name}({', '.join([*shown[:first], '*', *shown[first:]])})"
  if len(line) <= 92:
    return [line]
  return [
    f"{entry.name}(",
    f"  {', '.join(shown[:first])},",
    f"  *, {', '.join(shown[first:])},",
    ")",
  ]


def _mark(entry: Entry) -> str:
  """† on a loss that does not give one value per example, and only that."""
  usual = re.match(r"``\[(\.\.\.|B|B, L)\]``", entry.returns)
  return "" if entry.name in PIECES or usual else " †"


def _lower(text: str) -> str:
  """With a small letter first."""
  return text[:1].lower() + text[1:]


def _link(name: str) -> str:
  return f"[`{name}`](#{name.lower()})"


def _prose(text: str, names: Iterable[str]) -> str:
  """Docstring prose as Markdown: names of this page as links, and nothing taken for markup."""
  names = set(names)
  parts = re.split(r"(``[^`]+``|`[^`]+`)", text)
  for i, part in enumerate(parts):
    if i % 2:
      code = part.strip("`")
      parts[i] = _link(code) if code in names and part[:2] != "``" else f"`{code}`"
    else:
      part = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", part)
      parts[i] = re.sub(r"<(?=[A-Za-z/!?])|~", r"\\\g<0>", part)
  return "".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
  """Writes the page, or checks it.

  Args:
    arguments: of the command line; None takes the process's own.

  Returns:
    The exit status: 1 where ``--check`` finds another page than would be written.
  """
  about = "Writes docs/losses.md from the losses' docstrings."
  return write_or_check(PAGE, page, command, about, arguments)


if __name__ == "__main__":
  sys.exit(main())
