"""``report.html``: one file that opens anywhere, from which one can decide whether to ship.

Made of what `jaxdistill.reports._pages.evidence.read` found in a run's folder. A section that
cannot be made of a broken or older file says so, and the others are made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill.reports._format import DASH, count, percent, signed, size, times
from jaxdistill.reports._pages import analysis, charts, page_files, page_groups, report_text
from jaxdistill.reports._pages.decision import ratio
from jaxdistill.reports._pages.evidence import Evidence
from jaxdistill.reports._pages.markup import Element, document, element, section, table, tile
from jaxdistill.reports._pages.report_text import MODELS
from jaxdistill.reports._pages.run_files import BROKEN

__all__ = ["build"]

_COLOURS = {"Ship it": "good", "Do not ship it": "bad"}


def build(found: Evidence, derived: Mapping[str, Any]) -> str:
  """The page.

  Args:
    found: what the run's folder holds.
    derived: ``decision``, ``classes``, ``slices`` and ``lost`` (an `analysis.Lost` or None).

  Returns:
    HTML.
  """
  problems = list(found.problems)
  parts: list[Element] = []
  for title, name, make in (
    ("Accuracy against what it costs", "cost", lambda: _costs(found)),
    ("The gap to the teacher", "gap", lambda: _gap(found)),
    ("Is its confidence honest?", "calibration", lambda: _calibration(found)),
    ("Classes", "classes", lambda: page_groups.classes(derived["classes"])),
    ("What the student lost", "lost", lambda: page_groups.lost(found, derived["lost"])),
    ("Slices", "slices", lambda: page_groups.slices(derived["slices"])),
    ("Training", "training", lambda: _training(found)),
    ("Exported files", "exports", lambda: page_files.exports(found)),
    ("Pre-flight checks", "preflight", lambda: page_files.findings(found)),
    ("How to repeat it", "repeat", lambda: page_files.repeat(found)),
  ):
    try:
      made = make()
    except BROKEN as error:
      problems.append(f"The section “{title}” could not be made of these files ({error!r}).")
      continue
    if made:
      parts.append(section(title, *made, name=name))
  report = found.report
  title = f"{report.get('dataset') or found.folder.name}, {found.split} split"
  links = [element("a", part[0].text, href=f"#{part.get('id')}") for part in parts]
  return document(
    f"{title}: distillation report",
    element("p", "Distillation report", class_="kicker"),
    element("h1", title),
    element("p", report.get("verdict") or "There is no verdict: see below.", class_="lede"),
    element("p", _conditions(report), class_="note"),
    _ship(found, derived),
    _problems(problems),
    element("nav", links, aria_label="sections"),
    parts,
    element("footer", "Made by jaxdistill of this run's own files; this page fetches nothing."),
  )


def _conditions(report: Mapping[str, Any]) -> str:
  words = []
  if report.get("examples"):
    words.append(f"{report['examples']:,} held-out examples.")
  seeds = report.get("seeds") or []
  if seeds:
    over = f" over {report['varied']}" if report.get("varied") else ""
    words.append(f"{len(seeds)} seed{'s' * (len(seeds) > 1)}; ± is the standard deviation{over}.")
  return " ".join(words)


def _problems(problems: Sequence[str]) -> Element | None:
  if not problems:
    return None
  items = [element("li", one) for one in problems]
  return element(
    "aside", element("h2", "What is missing or broken"), element("ul", items), class_="problems"
  )


def _ship(found: Evidence, derived: Mapping[str, Any]) -> Element:
  decision = derived["decision"]
  sides = {}
  for side, title in (("for", "For"), ("against", "Against"), ("unknown", "Unknown")):
    reasons = [r for r in decision["reasons"] if r["side"] == side]
    reasons.sort(key=lambda r: ("stop", "care", "draw", "note").index(r["weight"]))
    if reasons:
      items = [element("li", r["text"], class_=r["weight"]) for r in reasons]
      sides[side] = [element("h3", title), element("ul", items)]
  colour = _COLOURS.get(decision["word"], "care")
  tiles = []
  for make in (_tile_accuracy, _tile_size, _tile_latency, _tile_calibration):
    try:
      tiles.append(make(found))
    except BROKEN:
      continue
  tiles.append(page_groups.tile(derived["classes"]))
  shown = [tile(*made) for made in tiles if made is not None]
  return element(
    "div",
    element("h2", decision["word"] + "."),
    element("p", decision["sentence"]),
    element("dl", shown, class_="tiles") if shown else None,
    element(
      "div",
      element("div", sides.get("for")),
      element("div", sides.get("against"), sides.get("unknown")),
      class_="sides",
    ),
    class_=f"ship {colour}",
  )


_Tile = tuple[str, str, str] | None


def _tile_accuracy(found: Evidence) -> _Tile:
  report, models = found.report, found.report["models"]
  mean = models["student"]["accuracy"]["mean"]
  if mean is None:
    return None
  beside = []
  gain = report.get("gain") or {}
  if gain.get("mean") is not None:
    error = gain.get("standard_error")
    noise = "" if error is None else f" ± {100 * error:.2f}"
    beside.append(f"{signed(100 * gain['mean'])}{noise} points to labels alone")
  teacher = (models.get("teacher", {}).get("accuracy") or {}).get("mean")
  if teacher is not None:
    beside.append(f"{signed(100 * (mean - teacher))} to the teacher")
  return "Accuracy", f"{100 * mean:.2f}%", "; ".join(beside)


def _times(value: float | None, more: str, less: str) -> str:
  if value is None:
    return DASH
  return f"{times(value)}× {more}" if value >= 1 else f"{times(1 / value)}× {less}"


def _tile_size(found: Evidence) -> _Tile:
  student, teacher = (found.report["models"].get(n) or {} for n in ("student", "teacher"))
  if not student.get("parameters"):
    return None
  smaller = ratio(teacher.get("parameters"), student["parameters"])
  beside = f"{student['parameters']:,} parameters, {size(student.get('bytes'))}"
  return "Size", _times(smaller, "smaller", "larger"), beside


def _tile_latency(found: Evidence) -> _Tile:
  student, teacher = (found.report["models"].get(n) or {} for n in ("student", "teacher"))
  if not student.get("latency_ms"):
    return None
  both = [(m.get("latency_ms") or {}).get("median") for m in (teacher, student)]
  beside = f"{both[1]:.2g} ms for one example"
  if both[0] is not None:
    beside += f"; the teacher {both[0]:.2g} ms"
  exported = [
    (one["latency_ms"]["median"], one.get("batch_size", (found.exports or {}).get("batch_size", 1)))
    for one in (found.exports or {}).get("files") or []
    # Weights alone are no program.
    if one.get("passed") and one.get("latency_ms") and "safetensors" not in one["file"]
  ]
  if exported:
    median, batch = min(exported)
    beside += f"; exported {median:.2g} ms" + ("" if batch == 1 else f" for {batch}")
  return "Latency", _times(ratio(*both), "faster", "slower"), beside


def _tile_calibration(found: Evidence) -> _Tile:
  means: dict[str, float] = {}
  for name, model in found.report["models"].items():
    if (model.get("ece") or {}).get("mean") is not None:
      means[name] = 100 * model["ece"]["mean"]
  if "student" not in means:
    return None
  called = {"teacher": "teacher", "baseline": "labels alone"}
  beside = [f"{called[n]} {means[n]:.2f}%" for n in called if n in means]
  return "Calibration error", f"{means['student']:.2f}%", "; ".join(beside)


def _costs(found: Evidence) -> list[Any]:
  models = {n: m for n, m in found.report["models"].items() if n in MODELS}
  if not models:
    return []
  kinds: tuple[tuple[str, str, Callable[[Mapping[str, Any]], Any], Callable[[float], str]], ...] = (
    ("size", "parameters", lambda m: m.get("parameters"), count),
    ("latency", "latency of one example, ms", lambda m: (m.get("latency_ms") or {}).get("median"),
     "{:.2g}".format),
  )  # fmt: skip
  figures = []
  for what, xlabel, get, show in kinds:
    points = {
      name: (float(get(m)), 100 * m["accuracy"]["mean"], 100 * (m["accuracy"]["std"] or 0) or None)
      for name, m in models.items()
      if get(m) and (m.get("accuracy") or {}).get("mean") is not None
    }
    if points:
      label = f"Accuracy against {what}"
      made = charts.against(points, xlabel=xlabel, show=show, label=label)
      figures.append(element("figure", made, element("figcaption", f"{label}.")))
  rows = report_text.rows(found.report)
  heads = [element("span", charts.WORDS[name], class_=name) for name in rows[0][1:]]
  described = [
    element("li", element("strong", charts.WORDS[name]), f": {m['description']}")
    for name, m in models.items()
    if m.get("description")
  ]
  where = found.report.get("environment") or {}
  measured = ""
  if where:
    measured = (
      f"Latency is for one example, on {where.get('processor')} ({where.get('cores')} cores), JAX "
      f"device {where.get('device')}. The teacher's size is that of all its networks together."
    )
  return [
    element("div", figures, class_="figures") if figures else None,
    table(["", *heads], rows[1:], caption="All of it; mean ± standard deviation over the seeds"),
    element("p", measured, class_="note") if measured else None,
    element("ul", described, class_="small") if described else None,
  ]


def _gap(found: Evidence) -> list[Any]:
  report = found.report
  shares = report.get("gap_closed") or {}
  means = {n: (m.get("accuracy") or {}).get("mean") for n, m in report["models"].items()}
  made: list[Any] = []
  if "gap_closed" in report:
    made.append(element("p", report_text.gap_sentence(shares)))
  if shares.get("value") is not None and all(means.get(name) is not None for name in MODELS):
    ends = None if shares.get("low") is None else (shares["low"], shares["high"])
    label = "How far the student is from labels alone to its teacher"
    made.append(element("figure", charts.gap(shares["value"], ends, label)))
  lines = report_text.fidelity_rows(report)
  if len(lines[0]) > 1:
    heads = [element("span", charts.WORDS[name], class_=name) for name in lines[0][1:]]
    made.append(table(["", *heads], lines[1:], caption="How far they agree with the teacher"))
  return made


def _calibration(found: Evidence) -> list[Any]:
  if found.predictions is None:
    return []
  figures = []
  for name in MODELS:
    if name not in found.predictions.models:
      continue
    error = percent((found.report["models"].get(name) or {}).get("ece"))
    label = f"Reliability of the {charts.WORDS[name]}"
    made = charts.reliability(name, analysis.reliability(found.predictions, name), label)
    bold = element("strong", charts.WORDS[name], class_=name)
    caption = element("figcaption", bold, f": calibration error {error} %")
    figures.append(element("figure", made, caption))
  text = (
    "Each bar is how often answers of that confidence are right; the short line across it is the "
    "confidence. Bars below the diagonal promise more than they keep. Pale bars have few answers."
  )
  return [element("p", text, class_="note"), element("div", figures, class_="figures")]


def _training(found: Evidence) -> list[Any]:
  skipped = {"step", "epoch", "examples_per_second"}
  names: list[str] = []
  for name in ("student", "baseline", "teacher"):
    for record in found.curves.get(name, [])[-1:] + found.curves.get(name, [])[:1]:
      names += [key for key in record if key not in skipped and key not in names]
  # The loss first, its terms, then what was measured beside it.
  beside = [n for n in names if n == "accuracy" or n.startswith("validation/")]
  ordered = [n for n in names if n == "loss"] + [n for n in names if n not in (*beside, "loss")]
  figures, seen = [], set()
  for key in ordered + beside:
    lines = {}
    for name in MODELS:
      traced = _series(found.curves.get(name, []), key)
      if traced is not None:
        lines[name] = traced
    made = charts.curves(lines, xlabel="epochs", label=f"{key} during training") if lines else None
    if made is not None:
      seen |= set(lines)
      title = key.replace("/", " ")
      figures.append(element("figure", element("figcaption", title, class_="over"), made))
  if not figures:
    return []
  note = (
    "The objective's terms before their weights, accuracy on the training batches, and validation. "
    "A line is the mean over seeds, its band from the least to the largest."
  )
  return [
    element("p", note, class_="note"),
    charts.legend([name for name in MODELS if name in seen]),
    element("div", figures, class_="figures"),
  ]


def _series(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray] | None:
  """A key's values ``[N, S]`` over epochs; what is no number is NaN."""
  xs, values = [], []
  for record in lines:
    if key not in record:
      continue
    value = record[key] if isinstance(record[key], list) else [record[key]]
    xs.append(float(record.get("epoch") or record["step"]))
    values.append([float("nan") if v is None else float(v) for v in value])
  wide = max((len(value) for value in values), default=0)
  values = [value for value in values if len(value) == wide]
  if not wide or not values or len(values) != len(xs):
    return None
  return np.array(xs), np.array(values)
