"""``comparison.html``: two runs side by side on a page, and the same as text and numbers."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill import _check, runs
from jaxdistill.reports._format import count, signed
from jaxdistill.reports._pages import charts, page_groups, significance
from jaxdistill.reports._pages.decision import ratio
from jaxdistill.reports._pages.markup import Element, document, element, section, table, tile
from jaxdistill.reports._pages.versus import AS, Compared, markdown, rows, test_rows

__all__ = ["write_comparison"]

_SHOWN, _LISTED = 12, 40  # examples that only one of the two knows
# The colours and marks of two of the three models stand for the two runs.


def write_comparison(path: str | os.PathLike[str], compared: Compared) -> pathlib.Path:
  """Writes the page, and beside it the same as ``.md`` and ``.json``.

  Args:
    path: the page's file, ``comparison.html``; a folder gets one of that name.
    compared: from `compare_runs`.

  Returns:
    The page's path.
  """
  path = _check.folder("path", path)
  if path.is_dir():
    path = path / "comparison.html"
  if path.suffix != ".html":
    raise ValueError(f"path={os.fspath(path)!r} must end in .html; .md and .json go beside it.")
  path.parent.mkdir(parents=True, exist_ok=True)
  runs.write_json(path.with_suffix(".json"), compared.numbers)
  runs.write_text(path.with_suffix(".md"), markdown(compared.numbers))
  runs.write_text(path, _page(compared))
  return path


def _page(compared: Compared) -> str:
  numbers = compared.numbers
  names = {side: numbers["runs"][side]["name"] for side in ("a", "b")}
  heads = [element("span", names[side], class_=AS[side]) for side in ("a", "b")]
  title = f"{names['a']} against {names['b']}"
  lines = rows(numbers)
  where = (
    f"{numbers['dataset']}, {numbers['split']} split; {numbers['examples']:,} examples, paired."
  )
  problems = [element("li", one) for one in numbers["problems"] + numbers["notes"]]
  sure = numbers["accuracy"]["p_value"] < significance.LEVEL
  return document(
    f"{title}: comparison",
    element("p", "Comparison of two runs", class_="kicker"),
    element("h1", title),
    element("p", numbers["verdict"], class_="lede"),
    element("p", where, class_="note"),
    element(
      "div",
      element("h2", "A difference." if sure else "No difference beyond noise."),
      element("dl", [tile(*t) for t in _tiles(numbers, names)], class_="tiles"),
      class_=f"ship {'good' if sure else 'care'}",
    ),
    element("aside", element("h2", "Worth knowing"), element("ul", problems), class_="problems")
    if problems
    else None,
    section("Side by side", table(["", *heads], lines[1:]), _points(numbers), name="table"),
    section("Significance", *_significance(numbers, names), name="significance"),
    section("Classes", *_class_parts(numbers, names, heads), name="classes"),
    section("Examples that only one knows", *_examples(compared, names), name="examples"),
  )


def _tiles(numbers: Mapping[str, Any], names: Mapping[str, str]) -> list[tuple[str, str, str]]:
  tested, (a, b) = numbers["accuracy"], (numbers["runs"][side] for side in ("a", "b"))
  low, high = 100 * tested["low"], 100 * tested["high"]
  tiles = [
    (
      "Difference in accuracy",
      f"{signed(100 * tested['change'])} points",
      f"95% interval {signed(low)} to {signed(high)}; p = {tested['p_value']:.2g}",
    ),
    ("Same answer", f"{100 * numbers['agreement']:.1f}%", "an instance of one and of the other"),
  ]
  medians = [(m["latency_ms"] or {}).get("median") for m in (a, b)]
  for label, values, unit in (
    ("Parameters", (a["parameters"], b["parameters"]), ""),
    ("Latency", medians, " ms"),
  ):
    times = ratio(*values)
    if times is not None:
      beside = f"{values[0]:,.4g} against {values[1]:,.4g}{unit}"
      tiles.append((label, f"{times:.3g}×", f"{beside}: {names['a']} over {names['b']}"))
  return tiles


def _points(numbers: Mapping[str, Any]) -> Element | None:
  points = {}
  for side, name in AS.items():
    one = numbers["runs"][side]
    if one["parameters"] and one["accuracy"]["mean"] is not None:
      std = one["accuracy"]["std"]
      accuracy = 100 * one["accuracy"]["mean"]
      points[name] = (float(one["parameters"]), accuracy, None if std is None else 100 * std)
  if len({point[0] for point in points.values()}) < 2:
    return None  # of one size there is nothing to see
  words = {AS[side]: numbers["runs"][side]["name"] for side in ("a", "b")}
  made = charts.against(
    points, xlabel="parameters", show=count, label="Accuracy against size", words=words
  )
  return element("figure", made)


def _significance(numbers: Mapping[str, Any], names: Mapping[str, str]) -> list[Any]:
  pairing = (
    "with the same seeds for both" if numbers["paired_seeds"] else "with seeds drawn independently"
  )
  text = (
    f"The interval above is a bootstrap over examples and seeds, {pairing}. Below is McNemar's "
    "exact test for each pair of instances: of the examples that only one gets right, either "
    "side is as likely if both are equally good. One of several seeds below 0.05 is no finding."
  )
  head = ["seed", f"only {names['a']} right", f"only {names['b']} right", "p"]
  return [element("p", text, class_="note"), table(head, test_rows(numbers))]


def _class_parts(
  numbers: Mapping[str, Any], names: Mapping[str, str], heads: Sequence[Element]
) -> list[Any]:
  ordered = sorted(
    (row for row in numbers["classes"] if row["examples"]),
    key=lambda row: -abs((row["change"] or {}).get("change") or 0),
  )
  marks = [
    (
      str(row["name"]),
      {
        model: None
        if row["accuracy"][side]["mean"] is None
        else 100 * row["accuracy"][side]["mean"]
        for side, model in AS.items()
      },
    )
    for row in ordered[:14]
  ]
  body = [
    [
      str(row["name"]),
      f"{row['examples']:,}",
      *(f"{100 * row['accuracy'][side]['mean']:.1f}" for side in ("a", "b")),
      page_groups.change_cell(row["change"], ("lower", "higher")),
    ]
    for row in ordered[:40]
  ]
  head = ["class", "examples", *heads, "difference"]
  words = {AS[side]: name for side, name in names.items()}
  return [
    element("p", "Those that differ most come first; “lower” and “higher” are said only beyond the "
            "noise of examples and seeds, corrected for the number of classes.", class_="note"),
    charts.legend(list(words), words),
    element("figure", charts.dots(marks, xlabel="accuracy, %", label="Accuracy by class")),
    table(head, body, caption="Accuracy in %, difference in points"),
  ]  # fmt: skip


def _examples(compared: Compared, names: Mapping[str, str]) -> list[Any]:
  made: list[Any] = []
  words = {AS[side]: name for side, name in names.items()}
  for side, name in names.items():
    only = compared.only[side]
    made.append(element("h3", f"Only {name}: {len(only):,}"))
    there = only[np.isin(compared.answers.index[only], list(compared.answers.shown))]
    if len(there) < len(only):
      listed = ", ".join(str(int(compared.answers.index[row])) for row in only[:_LISTED])
      more = " …" if len(only) > _LISTED else ""
      made.append(element("p", f"Examples {listed}{more}.", class_="small"))
    made.append(page_groups.gallery(compared.answers, there[:_SHOWN], words=words))
  return made
