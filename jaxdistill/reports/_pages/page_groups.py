"""The parts of a report's page about examples: classes, slices, and what the student lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill.evaluation.predictions import Predictions
from jaxdistill.reports import figures
from jaxdistill.reports._format import DASH, signed
from jaxdistill.reports._pages import charts
from jaxdistill.reports._pages.analysis import Lost
from jaxdistill.reports._pages.evidence import Evidence, names
from jaxdistill.reports._pages.markup import Element, element, image, table
from jaxdistill.reports._pages.report_text import MODELS

__all__ = ["by_change", "change_cell", "classes", "gallery", "lost", "slices", "tile"]

_MANY = 14  # rows of a chart or a table that are shown at once
_MOST = 60  # rows of a slice's table
_GALLERY = 24  # examples


def by_change(
  rows: Sequence[Mapping[str, Any]], references: Sequence[str] = ("teacher", "baseline")
) -> list[Mapping[str, Any]]:
  """Groups that lost most against the first reference that there is come first; empty ones last."""

  def key(row: Mapping[str, Any]) -> tuple[bool, float]:
    changes = [row["changes"][r]["change"] for r in references if r in row["changes"]]
    known = [change for change in changes if change is not None]
    return not row["examples"], known[0] if known else 0.0

  return sorted(rows, key=key)


def tile(rows: Sequence[Mapping[str, Any]]) -> tuple[str, str, str] | None:
  """The class that lost most, as one of the numbers that decide."""
  counted = [row for row in rows if row["examples"] and row["changes"]]
  if not counted:
    return None
  worst = by_change(counted)[0]
  reference = "teacher" if "teacher" in worst["changes"] else "baseline"
  change = worst["changes"][reference]
  if change["change"] is None:
    return None
  called = {"teacher": "the teacher", "baseline": "labels alone"}[reference]
  noise = "beyond noise" if change["beyond_noise"] else "within noise"
  mean = 100 * worst["accuracy"]["student"]["mean"]
  beside = f"{signed(100 * change['change'], 1)} points to {called}, {noise}; {mean:.1f}% right"
  name = str(worst["name"])
  return "Class that lost most", f"class {name}" if name.isdigit() else name, beside


def change_cell(
  change: Mapping[str, Any] | None, words: tuple[str, str] = ("lost", "gained")
) -> Element | str:
  """A change in points with its standard error, marked where it is beyond noise."""
  if not change or change.get("change") is None:
    return DASH
  points = 100 * change["change"]
  shown = signed(points, 1) if abs(points) >= 0.05 else "0.0"
  text = f"{shown} ± {100 * (change.get('error') or 0):.1f}"
  if not change.get("beyond_noise"):
    return text
  worse = change["change"] < 0
  word = words[0] if worse else words[1]
  return element("strong", f"{word} {text}", class_="bad-text" if worse else "good-text")


def _accuracy_cell(share: Mapping[str, Any] | None, *, interval: bool = False) -> str:
  if not share or share.get("mean") is None:
    return DASH
  text = f"{100 * share['mean']:.1f}"
  return f"{text} ({100 * share['low']:.1f}–{100 * share['high']:.1f})" if interval else text


def _table(
  rows: Sequence[Mapping[str, Any]], what: str, caption: str, *, interval: bool, taken: bool
) -> Element:
  models = [name for name in MODELS if rows and name in rows[0]["accuracy"]]
  references = [name for name in ("teacher", "baseline") if any(name in r["changes"] for r in rows)]
  called = {"teacher": "teacher", "baseline": "labels alone"}
  head: list[Any] = [
    what,
    "examples",
    *(element("span", charts.WORDS[name], class_=name) for name in models),
  ]
  head += [f"change from {called[name]}" for name in references]
  head += ["mostly taken for"] if taken else []
  body = []
  for row in rows:
    cells: list[Any] = [str(row["name"]), f"{row['examples']:,}" if row["examples"] else "none"]
    cells += [_accuracy_cell(row["accuracy"].get(name), interval=interval) for name in models]
    cells += [change_cell(row["changes"].get(name)) for name in references]
    if taken:
      found = [f"{name} ({times:.3g})" for name, times in row.get("taken_for") or []]
      cells.append(", ".join(found) or DASH)
    body.append(cells)
  return table(head, body, caption=caption, prose=taken)


def classes(rows: Sequence[Mapping[str, Any]]) -> list[Any]:
  """The section about classes: a chart and a table, those that lost most first."""
  if not rows:
    return []
  ordered = by_change(rows)
  counted = [row for row in ordered if row["examples"]]
  shown = counted if len(counted) <= _MANY else counted[: _MANY - 3] + counted[-3:]
  marks = [
    (
      str(row["name"]),
      {
        model: None if share["mean"] is None else 100 * share["mean"]
        for model, share in row["accuracy"].items()
        if model in MODELS
      },
    )
    for row in shown
  ]
  models = [name for name in MODELS if counted and name in counted[0]["accuracy"]]
  fell = {
    reference: [str(r["name"]) for r in counted if _beyond(r, reference)]
    for reference in ("teacher", "baseline")
  }
  words = {"teacher": "the teacher", "baseline": "labels alone"}
  sentences = [
    f"Lost against {words[reference]}, beyond noise: {names(found)}."
    for reference, found in fell.items()
    if found
  ]
  text = " ".join(sentences) or "No class lost beyond noise."
  note = (
    "Those that lost most against the teacher come first. ± is the standard error over examples "
    "and seeds; “lost” and “gained” are said only beyond the noise of both, corrected for the "
    "number of classes. What a class is taken for is counted in examples, a mean over seeds."
  )
  made: list[Any] = [element("p", text), element("p", note, class_="note")]
  if marks:
    few = (
      "" if len(shown) == len(counted) else f"; {len(shown) - 3} that lost most, 3 that did best"
    )
    made += [
      charts.legend(models),
      element("figure", charts.dots(marks, xlabel="accuracy, %", label="Accuracy by class" + few),
              element("figcaption", "Accuracy by class" + few + ".")),
    ]  # fmt: skip
  caption = "Accuracy in %, changes of the student in points"
  first = ordered[:_MANY]
  made.append(_table(first, "class", caption, interval=False, taken="taken_for" in ordered[0]))
  if len(ordered) > len(first):
    every = _table(ordered, "class", caption, interval=False, taken=True)
    made.append(element("details", element("summary", f"All {len(ordered)} classes"), every))
  return made


def _beyond(row: Mapping[str, Any], reference: str) -> bool:
  change = row["changes"].get(reference) or {}
  return bool(change.get("beyond_noise") and (change.get("change") or 0) < 0)


def slices(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Any]:
  """The section about slices: a table for each column of metadata."""
  made: list[Any] = []
  for name, rows in found.items():
    caption = f"By {name}: accuracy in % with its 95% interval (Wilson), changes in points"
    shown = list(rows)
    if len(shown) > _MOST:
      shown = by_change(rows)[:_MOST]
      caption += f"; the {_MOST} of {len(rows)} slices that lost most"
    made += [
      element("h3", name),
      _table(shown, name, caption, interval=True, taken=False),
    ]
  return made


def lost(found: Evidence, gone: Lost | None) -> list[Any]:
  """The section about examples that the teacher knew and the student does not."""
  answers = found.predictions
  if answers is None or gone is None:
    return []
  text = (
    f"On {gone.known:,} examples the teacher is right and gives the label a probability of "
    f"{gone.sure:g} or more. Most students get {_many(gone.most)} of them wrong, and at least one "
    f"student {_many(len(gone.rows))}."
  )
  if gone.baseline_right is not None and gone.most:
    known = _many(gone.baseline_right)
    text += f" Trained on labels alone, the same network knows {known} of those that most lost."
  gained = _many(gone.gained)
  text += f" The other way round, most students are right on {gained} where the teacher is wrong."
  return [element("p", text), gallery(answers, gone.rows)]


def _many(number: int) -> str:
  return f"{number:,}" if number else "none"


def gallery(
  answers: Predictions,
  rows: Sequence[int] | np.ndarray,
  *,
  words: Mapping[str, str] | None = None,
) -> Element | None:
  """Examples with what each model says of them, as pictures or texts; those that were kept."""
  called = {**charts.WORDS, **(words or {})}
  items: list[Element] = []
  texts = False
  largest = max([int(v.max(initial=0)) for v in answers.shown.values() if not isinstance(v, str)],
                default=255)  # fmt: skip
  for row in rows:
    shown = answers.shown.get(int(answers.index[row]))
    if shown is None or len(items) == _GALLERY:
      continue
    label = answers.name(int(answers.labels[row]))
    about = f"example {int(answers.index[row])}: {label}"
    if isinstance(shown, str):
      texts = True
      view = element("blockquote", shown)
    else:
      view = image(_png(shown, largest), about, pixelated=max(shown.shape[:2]) <= 64)
    said = [
      element(
        "div", element("span", called[name], class_=name), f": {_said(answers, name, int(row))}"
      )
      for name in MODELS
      if name in answers.models
    ]
    title = element("div", element("strong", label), f" · example {int(answers.index[row])}")
    items.append(element("li", view, title, said))
  if not items:
    return None
  return element("ul", items, class_="gallery texts" if texts else "gallery")


def _png(shown: np.ndarray, largest: int) -> bytes:
  """Pictures of a small range (digits count to 16) are stretched alike, so that one sees them."""
  if 0 < largest < 64:
    shown = (shown.astype(np.float32) * (255 / largest)).clip(0, 255).astype(np.uint8)
  return figures.png(shown)


def _said(answers: Predictions, model: str, row: int) -> str:
  """The classes that a model's instances gave, the most frequent first."""
  one = answers.models[model]
  given, sure = one.predicted[:, row], one.confidence[:, row]
  values, times = np.unique(given, return_counts=True)
  words = []
  for i in np.argsort(-times, kind="stable")[:2]:
    mean = float(np.mean(sure[given == values[i]]))
    share = f"{times[i]} of {len(given)}, " if len(given) > 1 else ""
    words.append(f"{answers.name(int(values[i]))} ({share}{100 * mean:.0f}% sure)")
  return ", ".join(words)
