"""``report.html``: one file that opens anywhere, from which one can decide whether to ship.

Made of what `jaxdistill.reports._pages.evidence.read` found in a run's folder, section by section;
what is missing there has no section, and is told above.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill.reports import figures
from jaxdistill.reports._format import (
  DASH,
  MODELS,
  WORDS,
  Cell,
  Reading,
  Table,
  Told,
  count,
  listed,
  percent,
  plain,
  size,
  tenths,
  times,
)
from jaxdistill.reports._pages import analysis, exhibits, summary
from jaxdistill.reports._pages.analysis import Lost
from jaxdistill.reports._pages.decision import fell, nothing_found, ratio
from jaxdistill.reports._pages.document import first, model, readings
from jaxdistill.reports._pages.evidence import Evidence, values
from jaxdistill.reports._pages.rendering import (
  Figure,
  Gallery,
  Sample,
  Section,
  Tile,
  legend,
  named,
  render,
)

__all__ = ["SHARE", "build", "change_cell", "drawn_with", "marks", "window_of"]

SHARE = Reading("accuracy", "accuracy", "higher", percent=True)  # what classes are told by
_COLOURS = {"Ship it": "good", "Do not ship it": "bad"}
_CALLED = {"teacher": "the teacher", "baseline": "labels alone"}
_MANY = 14  # rows of a figure or a table that are shown at once
_MOST = 60  # rows of a slice's table
_SQUARE = 20  # classes of a confusion matrix; of more only those that are confused are told
_TARGETS = 4  # of a regression, whose outputs are drawn
_AT_ONCE = 24  # examples that are seen without a click


def build(found: Evidence, derived: Mapping[str, Any]) -> str:
  """The page.

  Args:
    found: what the run's folder holds.
    derived: ``decision``, ``classes``, ``confusions``, ``slices``, ``parts``, ``paired`` and
      ``lost`` (an `analysis.Lost` or None).

  Returns:
    HTML.
  """
  decision = derived["decision"]
  report = {**found.report, "parts": derived["parts"], "paired": derived["paired"]}
  sections = (
    _costs(report),
    _gap(report),
    _paired(report),
    _calibration(found),
    _classes(derived["classes"]),
    _confusions(found, derived["confusions"]),
    *_changed(found, derived["lost"]),
    *_parts(report),
    _points(found),
    _samples(found),
    _examples(found),
    _slices(derived["slices"], summary.of_example(report)),
    _training(found),
    _exports(found.exports),
    _findings(found),
    _repeat(found),
  )
  heading = f"{report['dataset'] or found.folder.name}, {found.split} split"
  made = (
    _tile_metric(report),
    _tile_size(report),
    _tile_latency(found),
    _tile_calibration(report),
    _tile_class(derived["classes"]),
  )
  return render(
    "page.html.j2",
    title=f"{heading}: distillation report",
    kicker="Distillation report",
    heading=heading,
    verdict=report["verdict"] or "There is no verdict: see below.",
    conditions=_conditions(report),
    colour=_COLOURS.get(decision["word"], "care"),
    decision=f"{decision['word']}.",
    why=decision["sentence"],
    tiles=[tile for tile in made if tile is not None],
    sides=_sides(decision["reasons"]),
    problems_title="What is missing or broken",
    problems=found.problems,
    sections=[section for section in sections if section],
  )


def _conditions(report: Mapping[str, Any]) -> str:
  words = [f"{report['examples']:,} held-out examples."] if report["examples"] else []
  if report["seeds"]:
    seeds = len(report["seeds"])
    over = f" over {report['varied']}" if report["varied"] else ""
    words.append(f"{seeds} seed{'s' * (seeds > 1)}; ± is the standard deviation{over}.")
  return " ".join(words)


def _sides(reasons: Sequence[Mapping[str, str]]) -> list[list[tuple[str, list[Any]]]]:
  """What speaks for it in one column, all else in another, the weightiest first."""
  order = ("stop", "care", "draw", "note")
  weighed = sorted(reasons, key=lambda reason: order.index(reason["weight"]))
  columns = []
  for column in (("for",), ("against", "unknown")):
    sides = [(side.capitalize(), [r for r in weighed if r["side"] == side]) for side in column]
    columns.append([(title, found) for title, found in sides if found])
  return columns


def _tile_metric(report: Mapping[str, Any]) -> Tile | None:
  judged = first(report)
  mean = model(report, "student")[judged.name]["mean"]
  if mean is None:
    return None
  beside = []
  if report["gain"] is not None:
    gain = judged.change(judged.gain(report["gain"]["mean"]), report["gain"]["standard_error"])
    beside.append(f"{gain}{judged.points} to labels alone")
  teacher = model(report, "teacher")[judged.name]["mean"]
  if teacher is not None:
    beside.append(f"{judged.change(mean - teacher, None)} to the teacher")
  return Tile(_capital(judged.title), judged.value(mean), "; ".join(beside))


def _capital(text: str) -> str:
  return text[:1].upper() + text[1:]


def _times(value: float | None, more: str, less: str) -> str:
  if value is None:
    return DASH
  return f"{times(value)}× {more}" if value >= 1 else f"{times(1 / value)}× {less}"


def _tile_size(report: Mapping[str, Any]) -> Tile | None:
  ours, theirs = (model(report, name)["parameters"] for name in ("student", "teacher"))
  if ours is None:
    return None
  beside = f"{ours:,} parameters, {size(model(report, 'student')['bytes'])}"
  if theirs is not None:  # what it replaces, whose accuracy and latency stand beside its own
    beside += f"; the teacher {theirs:,}"
  return Tile("Size", _times(ratio(theirs, ours), "smaller", "larger"), beside)


def _tile_latency(found: Evidence) -> Tile | None:
  ours, theirs = (model(found.report, n)["latency_ms"]["median"] for n in ("student", "teacher"))
  if ours is None:
    return None
  beside = f"{ours:.2g} ms for one example"
  if theirs is not None:
    beside += f"; the teacher {theirs:.2g} ms"
  exported = [
    (one["latency_ms"]["median"], one["batch_size"])
    for one in (found.exports or {}).get("files", [])
    # Weights alone are no program.
    if one["passed"] and one["latency_ms"] and "safetensors" not in one["file"]
  ]
  if exported:
    median, batch = min(exported)
    beside += f"; exported {median:.2g} ms" + ("" if batch == 1 else f" for {batch}")
  return Tile("Latency", _times(ratio(theirs, ours), "faster", "slower"), beside)


def _tile_calibration(report: Mapping[str, Any]) -> Tile | None:
  means = {name: one.get("ece", {}).get("mean") for name, one in report["models"].items()}
  shown = {name: f"{100 * mean:.2f}%" for name, mean in means.items() if mean is not None}
  if "student" not in shown:
    return None
  beside = [f"{WORDS[name]} {shown[name]}" for name in ("teacher", "baseline") if name in shown]
  return Tile("Calibration error", shown["student"], "; ".join(beside))


def _tile_class(rows: Sequence[Mapping[str, Any]]) -> Tile | None:
  counted = [row for row in rows if row["examples"] and row["changes"]]
  if not counted:
    return None
  worst = _by_change(counted)[0]
  reference = "teacher" if "teacher" in worst["changes"] else "baseline"
  lost = worst["changes"][reference]
  noise = "beyond noise" if lost["beyond_noise"] else "within noise"
  points = f"{SHARE.change(lost['change'], None, 1)} points to {_CALLED[reference]}, {noise}"
  beside = f"{points}; {100 * worst['accuracy']['student']['mean']:.1f}% right"
  name = worst["name"]
  return Tile("Class that lost most", f"class {name}" if name.isdigit() else name, beside)


def _costs(report: Mapping[str, Any]) -> Section:
  models, judged, drawn = report["models"], first(report), []
  title = _capital(judged.title)
  for what, xlabel, costs, show in (
    ("size", "parameters", {n: m["parameters"] for n, m in models.items()}, count),
    (
      "latency",
      "latency of one example, ms",
      {n: m["latency_ms"]["median"] for n, m in models.items()},
      "{:.2g}".format,
    ),
  ):
    points = {}
    for name, one in models.items():
      mean, std = one[judged.name]["mean"], one[judged.name]["std"]
      if costs[name] and mean is not None:
        spread = None if std is None else judged.scaled(std)
        points[name] = (float(costs[name]), judged.scaled(mean), spread)
    if points:
      picture = figures.against(
        None, points, xlabel=xlabel, show=show, ylabel=judged.label, tell=judged.told
      )
      drawn.append(Figure(picture, f"{title} against {what}"))
  where = {**dict.fromkeys(("processor", "cores", "device")), **report["environment"]}
  measured = (
    f"Latency is for one example, on {where['processor']} ({where['cores']} cores), JAX "
    f"device {where['device']}. The teacher's size is that of all its networks together."
  )
  described = [(named(name), m["description"]) for name, m in models.items() if m["description"]]
  return Section(
    "cost",
    f"{title} against what it costs",
    figures=drawn,
    tables=[_of_models(summary.measured(report))] if models else [],
    after=measured if report["environment"] else "",
    items=described,
  )


def _of_models(table: Table) -> Table:
  """A table whose columns are models, in their colours."""
  head = [named(str(name)) if name in WORDS else name for name in table.head]
  return dataclasses.replace(table, head=head)


def _gap(report: Mapping[str, Any]) -> Section:
  shares = report["gap_closed"]
  means = [model(report, name)[first(report).name]["mean"] for name in MODELS]
  drawn = []
  if shares["value"] is not None and None not in means:
    ends = None if shares["low"] is None else (shares["low"], shares["high"])
    label = "How far the student is from labels alone to its teacher"
    drawn = [Figure(figures.gap(None, shares["value"], ends), label)]
  agree = summary.agreement(report)
  return Section(
    "gap",
    "The gap to the teacher",
    text=summary.gap_sentence(shares) if shares["value"] is not None or shares["note"] else "",
    figures=drawn,
    tables=[_of_models(agree)] if len(agree.head) > 1 else [],
  )


def _calibration(found: Evidence) -> Section:
  answers, drawn = found.predictions, []
  for name in MODELS:
    if answers is None or name not in answers.models:
      continue
    bins = analysis.reliability(answers, name)
    if not bins["count"].any():
      continue
    picture = figures.reliability(None, name, bins)
    error = percent(model(found.report, name)["ece"])
    caption = (named(name), f": calibration error {error} %")
    drawn.append(Figure(picture, f"Reliability of the {WORDS[name]}", caption))
  note = (
    "Each bar is how often answers of that confidence are right; the short line across it is the "
    "confidence. Bars below the diagonal promise more than they keep. Pale bars have few answers."
  )
  return Section("calibration", "Is its confidence honest?", note=note, figures=drawn)


def _by_change(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  """Groups that lost most against the first reference that there is come first; empty ones last."""

  def key(row: Mapping[str, Any]) -> tuple[bool, float]:
    changes = [row["changes"][name]["change"] for name in _CALLED if name in row["changes"]]
    return not row["examples"], changes[0] if changes else 0.0

  return sorted(rows, key=key)


def change_cell(
  found: Mapping[str, Any] | None,
  words: tuple[str, str] = ("lost", "gained"),
  reading: Reading = SHARE,
) -> Cell:
  """A change in points with its standard error, marked where it is beyond noise.

  Args:
    found: from `analysis.groups`, or None.
    words: what a change for the worse, and one for the better, is called.
    reading: how the metric is told.
  """
  if found is None:
    return DASH
  text = reading.change(reading.gain(found["change"]), found["error"], 1)
  if not found["beyond_noise"]:
    return text
  worse = found["change"] < 0
  return Told(f"{words[0] if worse else words[1]} {text}", "bad-text" if worse else "good-text")


def _group_table(
  rows: Sequence[Mapping[str, Any]],
  what: str,
  caption: str,
  *,
  interval: bool = False,
  reading: Reading = SHARE,
) -> Table:
  models = [name for name in MODELS if any(name in summary.shares(row) for row in rows)]
  references = [name for name in ("teacher", "baseline") if any(name in r["changes"] for r in rows)]
  taken = any("taken_for" in row for row in rows)
  head: list[Cell] = [what, "examples", *map(named, models)]
  head += [f"change from {WORDS[name]}" for name in references] + ["mostly taken for"] * taken
  body = []
  for row in rows:
    cells: list[Cell] = [row["name"], f"{row['examples']:,}" if row["examples"] else "none"]
    cells += [_share(summary.shares(row).get(name), reading, interval) for name in models]
    cells += [change_cell(row["changes"].get(name), reading=reading) for name in references]
    if taken:
      others = [f"{name} ({tenths(often)})" for name, often in row.get("taken_for", [])]
      cells.append(", ".join(others) or DASH)
    body.append(cells)
  return Table(head, body, caption, prose=taken)


def _share(share: Mapping[str, Any] | None, reading: Reading, interval: bool) -> str:
  """A group's mean, with the interval over its examples."""
  if not share:
    return DASH
  mean, low, high = (reading.scaled(share[key]) for key in ("mean", "low", "high"))
  if reading.percent:
    return f"{mean:.1f}" + (f" ({low:.1f}–{high:.1f})" if interval else "")
  return f"{mean:.4g}" + (f" ({low:.4g}–{high:.4g})" if interval else "")


def marks(
  rows: Sequence[Mapping[str, Any]], sides: Mapping[str, str]
) -> list[tuple[str, dict[str, float | None]]]:
  """Groups for `figures.groups`: a row's name, and by model its accuracy in %.

  Args:
    rows: of groups.
    sides: models, by what they are called in the rows.
  """
  return [
    (row["name"], {model: _hundredfold(row["accuracy"].get(side)) for side, model in sides.items()})
    for row in rows
  ]


def _hundredfold(share: Mapping[str, Any] | None) -> float | None:
  return None if share is None else 100 * share["mean"]


def _classes(rows: Sequence[Mapping[str, Any]]) -> Section:
  """A figure and a table, classes that lost most first."""
  if not rows:
    return Section("classes", "Classes")
  ordered = _by_change(rows)
  counted = [row for row in ordered if row["examples"]]
  shown = counted if len(counted) <= _MANY else counted[: _MANY - 3] + counted[-3:]
  few = "" if len(shown) == len(counted) else f"; {len(shown) - 3} that lost most, 3 that did best"
  models = [name for name in MODELS if counted and name in counted[0]["accuracy"]]
  drawn = []
  if shown:
    told = marks(shown, {name: name for name in models})
    picture = figures.groups(None, told, xlabel="accuracy, %")
    drawn = [Figure(picture, f"Accuracy by class{few}")]
  lost = [
    (name, [row["name"] for row in counted if fell(row["changes"].get(name))]) for name in _CALLED
  ]
  sentences = [
    f"Lost against {_CALLED[name]}, beyond noise: {listed(found)}." for name, found in lost if found
  ]
  note = (
    "Those that lost most against the teacher come first. ± is the standard error over examples "
    "and seeds; “lost” and “gained” are said only beyond the noise of both, corrected for the "
    "number of classes. What a class is taken for is counted in examples, a mean over seeds."
  )
  caption = "Accuracy in %, changes of the student in points"
  every = (f"All {len(ordered)} classes", _group_table(ordered, "class", caption))
  return Section(
    "classes",
    "Classes",
    text=" ".join(sentences) or "No class lost beyond noise.",
    note=note,
    legend=legend(models),
    figures=drawn,
    tables=[_group_table(ordered[:_MANY], "class", caption)],
    folded=[every] if len(ordered) > _MANY else [],
  )


def _slices(found: Mapping[str, Sequence[Mapping[str, Any]]], reading: Reading) -> Section:
  """A table for each column of metadata."""
  tables = []
  for name, rows in found.items():
    caption = f"By {name}: accuracy in % with its 95% interval (Wilson), changes in points"
    if any("values" in row for row in rows):
      caption = f"By {name}: {reading.label} of an example, a mean with its 95% interval"
    shown = list(rows)
    if len(shown) > _MOST:
      shown = _by_change(rows)[:_MOST]
      caption += f"; the {_MOST} of {len(rows)} slices that lost most"
    tables.append(_group_table(shown, name, caption, interval=True, reading=reading))
  return Section("slices", "Slices", tables=tables)


def _paired(report: Mapping[str, Any]) -> Section:
  """How much better the student is on the same examples."""
  title = "On the same examples"
  if not report["paired"]:
    return Section("paired", title)
  size = max(row["examples"] for row in report["paired"])
  note = (
    f"Each of {size:,} examples is its own control. The interval is a bootstrap over examples and "
    "seeds, with the same seeds for both where there are as many; a difference is the student less "
    "what it is held against, of the mean over examples."
  )
  if len(report["seeds"]) == 1:
    note += " Of one seed it is over examples alone: what another would say is unknown."
  made = summary.paired(report)
  kinds = {"better": "good-text", "worse": "bad-text"}
  body = [[*row[:-1], Told(str(row[-1]), kinds.get(str(row[-1]), ""))] for row in made.rows]
  table = dataclasses.replace(made, rows=body, sortable=False)
  return Section("paired", title, note=note, tables=[table])


def _parts(report: Mapping[str, Any]) -> list[Section]:
  """Metrics apart: a figure of what the student is furthest behind in, and a table of all."""
  made = []
  for i, (reading, table) in enumerate(summary.apart(report)):
    rows = report["parts"][reading.name]
    models = [name for name in MODELS if any(name in row["values"] for row in rows)]
    ordered = sorted(rows, key=functools.partial(_behind, reading=reading))
    shown = rows if len(rows) <= _MANY else ordered[:_MANY]
    drawn = [
      (
        row["name"],
        {name: reading.scaled(one["mean"]) for name, one in row["values"].items()},
      )
      for row in shown
    ]
    tell = functools.partial(reading.told, std=None)
    picture = figures.groups(None, drawn, xlabel=reading.label, tell=tell)
    few = "" if len(shown) == len(rows) else f"; {len(shown)} of {len(rows)}, the furthest behind"
    every = _of_models(table)
    many = len(rows) > _MANY
    section = Section(
      f"part{i}",
      _capital(reading.title),
      legend=legend(models),
      figures=[Figure(picture, f"{_capital(reading.title)}{few}")],
      tables=[] if many else [every],
      folded=[(f"All {len(rows)}", every)] if many else [],
    )
    made.append(section)
  return made


def _behind(row: Mapping[str, Any], reading: Reading) -> float:
  """How much better the student is than its teacher, or how good it is where there is none."""
  values = row["values"]
  ours, theirs = (values.get(name, {}).get("mean") for name in ("student", "teacher"))
  return reading.gain((ours or 0.0) - (theirs or 0.0))


def _points(found: Evidence) -> Section:
  """What was put out against the labels, by target and model."""
  answers, drawn = found.predictions, []
  details = {} if answers is None else answers.details
  targets = list(dict.fromkeys(name for one in details.values() for name in one.points))
  for target in targets[:_TARGETS]:
    there = {m: details[m].points[target] for m in MODELS if target in _points_of(details, m)}
    every = np.concatenate([points[np.isfinite(points)] for points in there.values()])
    if not every.size:
      continue
    errors = np.concatenate([np.abs(said - labels) for labels, said in there.values()])
    reach = 1.1 * float(np.nanmax(np.where(np.isfinite(errors), errors, 0))) or 1.0
    room = 0.05 * float(np.ptp(every)) or 1.0
    ends = (float(every.min()) - room, float(every.max()) + room)
    for name, points in there.items():
      caption: list[Cell] = [named(name)]
      caption += [f", {target}"] if len(targets) > 1 else []
      picture = figures.scatter(None, name, points, ends=ends, reach=reach)
      drawn.append(Figure(picture, f"Outputs of the {WORDS[name]} against labels", caption))
  note = (
    "Each dot is an example: on the dashed line the output is its label. Below, what is wrong with "
    "it. Of several seeds the first is shown."
  )
  if len(targets) > _TARGETS:
    note += f" The first {_TARGETS} of {len(targets)} targets."
  return Section("points", "Outputs against labels", note=note, figures=drawn)


def _points_of(details: Mapping[str, Any], name: str) -> Mapping[str, Any]:
  return details[name].points if name in details else {}


def _examples(found: Evidence) -> Section:
  """Some examples with what each model says of them."""
  title, answers = "Examples", found.predictions
  if answers is None or not answers.truth:
    return Section("examples", title)
  rows = analysis.outstanding(answers, readings(found.report))
  titles = {
    "worst": "Where the student is furthest behind its teacher",
    "gained": "Where it is furthest ahead of labels alone",
    "others": "Others, as they come",
  }
  galleries = [
    Gallery(exhibits.shown(answers, rows[name]), text)
    for name, text in titles.items()
    if len(rows[name])
  ]
  maps = [one for one in answers.truth.values() if not isinstance(one, str)]
  drawn = []
  if maps:
    said = [x for one in answers.details.values() for x in one.said.values()]
    size = 1 + max(int(x.max(initial=0)) for x in (*maps, *said) if not isinstance(x, str))
    size = max(size, len(answers.label_names))
    names = [answers.name(k) for k in range(size)]
    drawn = [Figure(figures.colours(None, names), "Colours of the classes", ["Grey is no label."])]
  note = "Of several seeds the first is shown." if len(answers.seeds) > 1 else ""
  return Section("examples", title, note=note, figures=drawn, galleries=galleries)


def drawn_with(texts: Mapping[str, Any]) -> str:
  """How sample texts were drawn, in a sentence.

  Args:
    texts: from `evidence.read`.
  """
  shown = {name: DASH if texts[name] is None else f"{texts[name]:g}" for name in _DRAWN}
  return (
    f"{shown['length']} tokens each, drawn at temperature {shown['temperature']} with the key of "
    f"seed {shown['seed']}, folded with the example's number and the position: the same noise for "
    "all. A few texts show what a model writes, not how well."
  )


_DRAWN = ("length", "temperature", "seed")


def window_of(one: Mapping[str, Any]) -> str:
  """Which of a split's windows a sample text begins with; empty where nobody said."""
  return "" if one["index"] is None else f"Held-out window {one['index']}"


def _samples(found: Evidence) -> Section:
  """The same beginnings as each model goes on with them."""
  title, texts = "Sample texts", found.texts
  if texts is None:
    return Section("texts", title)
  samples = []
  for one in texts["texts"]:
    said: list[tuple[Cell, str]] = [(named(name), text) for name, text in one["said"].items()]
    itself: list[tuple[Cell, str]] = [("the text itself", one["goes_on"])] if one["goes_on"] else []
    samples.append(Sample(one["prompt"], said + itself, window_of(one)))
  note = drawn_with(texts)
  if len(found.report["seeds"]) > 1:
    note += " Of several seeds the first is shown."
  return Section("texts", title, note=note, samples=samples)


def _confusions(found: Evidence, rows: Sequence[Mapping[str, Any]]) -> Section:
  """What is taken for what: all of it of few classes, and what happens most of many."""
  title = "What is taken for what"
  if not rows or found.predictions is None:
    return Section("confusions", title)
  answers = found.predictions
  counts, tables = analysis.answered(answers, "student"), []
  size = 1 + max(max(pair) for pair in counts)
  if size <= _SQUARE:
    names = [answers.name(label) for label in range(size)]
    sizes = np.bincount(answers.labels, minlength=size).tolist()
    body = [
      [names[i], *(_shaded(counts.get((i, j), 0.0), sizes[i], i == j) for j in range(size))]
      for i in range(size)
    ]
    tables.append(Table(["", *names], body, sortable=False))
  shown = _of_models(summary.confused(rows[:_MANY]))
  folded = []
  if len(rows) > _MANY:
    folded = [(f"The {len(rows)} most frequent", _of_models(summary.confused(rows)))]
  how = "Rows are labels, columns what the student says: examples, a mean over seeds."
  return Section(
    "confusions", title, note=how if tables else "", tables=[*tables, shown], folded=folded
  )


def _shaded(number: float, of: int, right: bool) -> Cell:
  """A number of a confusion matrix, the darker the larger a share of its label's it is."""
  if not number:
    return ""
  degree = 1 + sum(number / of >= share for share in (0.02, 0.1, 0.3))
  return Told(tenths(number), "cell right" if right else f"cell wrong{degree}")


def _changed(found: Evidence, gone: Lost | None) -> list[Section]:
  """The examples that the teacher knew and the student does not, and the other way round."""
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
  gained = _many(len(gone.gained))
  made = []
  for name, title, told, rows in (
    ("lost", "What the student lost", text, gone.rows),
    (
      "gained",
      "What it gained",
      f"Most students are right on {gained} where the teacher is wrong.",
      gone.gained,
    ),
  ):
    items = exhibits.shown(answers, rows)
    gallery = Gallery(items[:_AT_ONCE], more=items[_AT_ONCE:])
    every = exhibits.table(answers, rows, title)
    made.append(Section(name, title, text=told, galleries=[gallery], folded=every))
  return made


def _many(number: int) -> str:
  return f"{number:,}" if number else "none"


def _training(found: Evidence) -> Section:
  """The loss first, its terms, then what was measured beside it."""
  keys: list[str] = []
  for name in ("student", "baseline", "teacher"):
    for record in found.curves.get(name, [])[-1:] + found.curves.get(name, [])[:1]:
      keys += [key for key in record if key not in keys]
  skipped = ("step", "epoch", "examples_per_second", "loss")
  terms = [key for key in keys if key not in skipped]
  beside = [key for key in terms if key == "accuracy" or key.startswith("validation/")]
  drawn, seen = [], set()
  for key in ("loss", *(key for key in terms if key not in beside), *beside):
    traced = {name: _series(found.curves.get(name, []), key) for name in MODELS}
    lines = {name: line for name, line in traced.items() if np.isfinite(line[1]).any()}
    if lines:
      seen |= set(lines)
      picture = figures.training(None, lines, xlabel="epochs")
      title = key.replace("/", " ")
      drawn.append(Figure(picture, f"{key} during training", [title], above=True))
  note = (
    "The objective's terms before their weights, accuracy on the training batches, and validation. "
    "A line is the mean over seeds, its band from the least to the largest."
  )
  models = [name for name in MODELS if name in seen]
  return Section("training", "Training", note=note, legend=legend(models), figures=drawn)


def _series(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
  """A key's values ``[N, S]`` over epochs ``[N]``; none where lines have not as many seeds each."""
  there = [record for record in lines if key in record]
  found = [values(record, key) for record in there]
  if len({len(one) for one in found}) != 1:
    return np.zeros(0), np.zeros((0, 0))
  epochs = [(values(record, "epoch") or [float("nan")])[0] for record in there]
  steps = [float(record["step"]) for record in there]
  x = [
    step if not epoch or np.isnan(epoch) else epoch
    for epoch, step in zip(epochs, steps, strict=True)
  ]
  return np.array(x), figures.drawable(np.array(found))


def _exports(exports: Mapping[str, Any] | None) -> Section:
  """Each exported file with its check, and its latency in its own runtime."""
  title = "Exported files"
  if not exports or not exports["files"]:
    return Section("exports", title)
  head = ["file", "runtime", "size", "latency, ms (95th pct)", "accuracy, %", "same answer, %"]
  many, split, batch = exports["examples"], exports["split"], exports["batch_size"]
  note = "Each file was loaded in a process of its own, with its own runtime, and compared there"
  note += f" with the student on {many:,} held-out examples" if many else " with the student"
  note += f" ({split} split)" if split else ""
  table = Table(
    [*head, "largest difference", "check"],
    [_exported(one, exports) for one in exports["files"]],
    title,
    prose=True,
  )
  return Section("exports", title, note=f"{note}; its latency is of batch {batch}.", tables=[table])


def _exported(one: Mapping[str, Any], exports: Mapping[str, Any]) -> list[Cell]:
  latency = one["latency_ms"] or {}
  median, high = latency.get("median"), latency.get("p95")
  told = f"{one['problem'] or ''}"
  if one["passed"]:
    told = f"passed; needs jax {one['least_jax']} or newer" if one["least_jax"] else "passed"
    if one.get("remaining"):  # it could be read back, and not be run
      told = f"read back; still to be checked: {one['remaining']}"
    # What was another for a file that an earlier export left than the text above the table says.
    forms = {"batch_size": "batch {}", "examples": "{} examples", "split": "{} split"}
    other = [form.format(one[n]) for n, form in forms.items() if one[n] != exports[n]]
    told += f"; of an earlier export: {', '.join(other)}" if other else ""
  return [
    one["file"],
    one["runtime"] or DASH,
    size(one["bytes"]),
    plain(median, 3) + ("" if high is None else f" ({plain(high, 3)})"),
    percent({"mean": one["accuracy"]}),
    percent({"mean": one["agreement"]}),
    plain(one["largest_difference"], 2),
    Told(told, "good-text" if one["passed"] else "bad-text"),
  ]


def _findings(found: Evidence) -> Section:
  """What the pre-flight checks found; one line where that is nothing."""
  title = "Pre-flight checks"
  if not found.findings:
    text = nothing_found(found) if found.findings is not None else ""
    return Section("preflight", title, text=text)
  rows = [[one["check"] or "check", f"{one['message']} {one['fix']}"] for one in found.findings]
  table = Table(["check", "what it found, and what to do"], rows, "Warnings", prose=True)
  return Section("preflight", title, tables=[table])


def _repeat(found: Evidence) -> Section:
  """The commands, versions and settings that repeat the run."""
  where = found.report["environment"]
  words = ", ".join(f"{key} {value}" for key, value in where.items() if value is not None)
  called = {"": "of all", "teacher": "of the teacher's run"}
  called |= {"baseline": "of the run on labels alone", "student": "of the student's run"}
  folded = []
  for name, config in found.configs.items():
    if config:
      rows = [[key, json.dumps(value, ensure_ascii=False)] for key, value in config.items()]
      title = f"Configuration {called[name]} ({len(rows)} settings)"
      folded.append((title, Table(["setting", "value"], rows, title, prose=True)))
  return Section(
    "repeat",
    "How to repeat it",
    code=found.report["commands"],
    after=f"Versions and hardware: {words}." if words else "",
    folded=folded,
  )
