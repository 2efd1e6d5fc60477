"""Two runs side by side: is one student better than the other, beyond noise?

Both were measured on the same split, so each example is its own control: McNemar's exact test for
every pair of instances, and a bootstrap over examples and seeds for the mean over all of them.
``jaxdistill report RUN_A RUN_B`` writes the page.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill import _check, _extras, runs
from jaxdistill.evaluation.predictions import Predictions
from jaxdistill.reports import figures
from jaxdistill.reports._format import (
  Cell,
  Table,
  change,
  count,
  escaped,
  interval,
  plain,
)
from jaxdistill.reports._pages import analysis, evidence, exhibits, significance, summary
from jaxdistill.reports._pages.decision import ratio
from jaxdistill.reports._pages.document import known, model, spread
from jaxdistill.reports._pages.evidence import Evidence
from jaxdistill.reports._pages.page import change_cell, marks
from jaxdistill.reports._pages.rendering import (
  Figure,
  Gallery,
  Section,
  Tile,
  legend,
  named,
  render,
)

__all__ = ["Compared", "compare_runs", "markdown", "write_comparison"]

VERSION = 1
# The colours and marks of two of the three models stand for the two runs.
_AS = {"a": "student", "b": "baseline"}
_ROWS = (
  "accuracy, %",
  "negative log-likelihood",
  "calibration error, %",
  "instances",
  "parameters",
  "FLOPs an example",
  "latency, ms",
)
_SHOWN = 12  # examples that only one of the two knows, seen without a click


@dataclasses.dataclass(frozen=True, eq=False)
class Compared:
  """Two runs, compared.

  Attributes:
    numbers: what ``comparison.json`` holds, but for what is None, which it leaves out.
    answers: of both students on the examples that both were measured on, as the models ``student``
      (the first run) and ``baseline`` (the second).
    only: examples that most instances of one side get right and most of the other wrong, by side.
  """

  numbers: dict[str, Any]
  answers: Predictions
  only: dict[str, np.ndarray]


def compare_runs(
  first: str | os.PathLike[str],
  second: str | os.PathLike[str],
  *,
  split: str = "test",
  resamples: int = 10_000,
) -> Compared:
  """Compares the students of two runs on the examples that both were measured on.

  Args:
    first: a run's folder, with ``predictions.npz``.
    second: another's, of the same data set and split.
    split: which split's report.
    resamples: of the bootstrap.

  Returns:
    The comparison.

  Raises:
    FileNotFoundError: a folder has no report.
    ValueError: a run has no answers on each example; or they are of another data set or split, of
      other labels, or have no example in common.
  """
  _extras.need("reports.compare_runs", "matplotlib", "scipy", "jinja2", "jsonschema")
  found = {"a": evidence.read(first, split), "b": evidence.read(second, split)}
  names = _names(first, second)
  a, b = (_answers(found[side], names[side]) for side in ("a", "b"))
  a, b, notes = _matched(a, b, names)
  answers = dataclasses.replace(
    a,
    models={"student": a.models["student"], "baseline": b.models["student"]},
    shown={**b.shown, **a.shown},
  )
  paired = a.seeds == b.seeds
  right = {"a": answers.correct("student"), "b": answers.correct("baseline")}
  tested = significance.bootstrap(right["a"], right["b"], paired=paired, resamples=resamples)
  share = {side: values.mean(axis=0) for side, values in right.items()}
  only = {
    "a": _clearest(share["a"], share["b"]),
    "b": _clearest(share["b"], share["a"]),
  }
  numbers = {
    "version": VERSION,
    "dataset": a.dataset,
    "split": a.split,
    "examples": len(answers),
    "paired_seeds": paired,
    "runs": {side: _side(found[side], names[side], answers, _AS[side]) for side in ("a", "b")},
    "accuracy": tested,
    "mcnemar": _tests(right["a"], right["b"], a.seeds, b.seeds),
    "agreement": _agreement(answers),
    "only": {side: len(rows) for side, rows in only.items()},
    "classes": _classes(answers),
    "notes": notes,
    "problems": [f"{names[s]}: {p}" for s in ("a", "b") for p in found[s].problems],
  }
  numbers["verdict"] = _verdict(numbers)
  return Compared(runs.to_json(numbers), answers, only)


def _names(first: Any, second: Any) -> dict[str, str]:
  """What the runs are called: their folders' names, or as much of the path as tells them apart."""
  paths = [_check.folder("run", one) for one in (first, second)]
  for depth in range(1, 1 + max(len(path.parts) for path in paths)):
    short = ["/".join(path.parts[-depth:]) for path in paths]
    if short[0] != short[1]:
      return {"a": short[0], "b": short[1]}
  return {"a": f"{paths[0].name} (first)", "b": f"{paths[1].name} (second)"}


def _answers(found: Evidence, name: str) -> Predictions:
  answers = found.predictions
  if answers is None or "student" not in answers.models or not len(answers):
    why = " ".join(p for p in found.problems if "answers" in p or "version" in p)
    raise ValueError(
      f"{name} has no student's answers on each example, which a comparison is made of. {why} "
      "Measure the run again (its experiment's --evaluate)."
    )
  return answers


def _matched(
  a: Predictions, b: Predictions, names: Mapping[str, str]
) -> tuple[Predictions, Predictions, list[str]]:
  """Both on the examples that they share, in one order."""
  for what in ("dataset", "split"):
    both = getattr(a, what), getattr(b, what)
    if both[0] != both[1]:
      raise ValueError(
        f"the runs were measured on different data: the {what} of {names['a']} is {both[0]!r}, "
        f"that of {names['b']} is {both[1]!r}. Compare runs on the same data set and split."
      )
  common, in_a, in_b = np.intersect1d(a.index, b.index, return_indices=True)
  if not len(common):
    raise ValueError(
      f"{names['a']} and {names['b']} have no example in common: measure both on the same split."
    )
  notes = []
  if len(common) < max(len(a), len(b)):
    notes.append(
      f"Compared on the {len(common):,} examples that both were measured on; {names['a']} has "
      f"{len(a):,}, {names['b']} has {len(b):,}."
    )
  a, b = a.take(in_a), b.take(in_b)
  differing = int(np.sum(a.labels != b.labels))
  if differing:
    raise ValueError(
      f"{differing} of the {len(common)} examples that {names['a']} and {names['b']} share have "
      "different labels: they are not of the same data."
    )
  if a.seeds != b.seeds:
    notes.append("The runs have different seeds, which are therefore not paired.")
  return a, b, notes


def _clearest(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
  """Examples that most of ours get right and most of theirs wrong, the clearest first."""
  rows = np.flatnonzero((ours > 0.5) & (theirs < 0.5))
  return rows[np.argsort((theirs - ours)[rows], kind="stable")]


def _side(found: Evidence, name: str, answers: Predictions, called: str) -> dict[str, Any]:
  student = model(found.report, "student")
  quality = analysis.quality(answers, called)
  return {
    "name": name,
    "description": student["description"],
    "instances": len(quality["accuracy"]),
    **{key: spread(values) for key, values in quality.items()},
    "accuracy_per_seed": quality["accuracy"],
    **{key: student[key] for key in ("parameters", "bytes", "flops", "latency_ms")},
  }


def _tests(
  a: np.ndarray, b: np.ndarray, seeds_a: Sequence[int], seeds_b: Sequence[int]
) -> list[dict[str, Any]]:
  """McNemar's test for each pair of instances, in their order."""
  tests = []
  for i in range(min(len(a), len(b))):
    seeds = [s[i] if i < len(s) else None for s in (seeds_a, seeds_b)]
    tests.append({"seed_a": seeds[0], "seed_b": seeds[1], **significance.mcnemar(a[i], b[i])})
  return tests


def _agreement(answers: Predictions) -> float:
  """How often an instance of one and an instance of the other say the same."""
  a, b = (answers.models[name].predicted for name in ("student", "baseline"))
  return float(np.mean([np.mean(one == other) for one in a for other in b]))


def _classes(answers: Predictions) -> list[dict[str, Any]]:
  rows = []
  for row in analysis.classes(answers):
    shares = {side: row["accuracy"].get(model) for side, model in _AS.items()}
    change = row["changes"].get("baseline")
    rows.append(
      {"name": row["name"], "examples": row["examples"], "accuracy": shares, "change": change}
    )
  return rows


def _verdict(numbers: Mapping[str, Any]) -> str:
  tested, runs = numbers["accuracy"], numbers["runs"]
  ends = f"95% bootstrap interval {interval(tested['low'], tested['high'])}"
  points = f"{100 * abs(tested['change']):.2f} points"
  means = [100 * runs[side]["accuracy"]["mean"] for side in ("a", "b")]
  where = f"({means[0]:.2f}% against {means[1]:.2f}%; {ends}, p = {tested['p_value']:.2g})"
  if tested["p_value"] >= significance.LEVEL:
    return (
      f"No difference beyond noise between {runs['a']['name']} and {runs['b']['name']} {where}."
    )
  better, worse = ("a", "b") if tested["change"] > 0 else ("b", "a")
  return f"{runs[better]['name']} is {points} better than {runs[worse]['name']} {where}."


def _table(numbers: Mapping[str, Any]) -> Table:
  """Both runs side by side."""
  return summary.side_by_side({one["name"]: one for one in numbers["runs"].values()}, _ROWS)


def _mcnemar(numbers: Mapping[str, Any]) -> Table:
  """McNemar's tests, by seed."""
  names = [numbers["runs"][side]["name"] for side in ("a", "b")]
  body = []
  for test in numbers["mcnemar"]:
    seeds = [str(seed) for seed in dict.fromkeys((test["seed_a"], test["seed_b"]))]
    only = [str(test["first_only"]), str(test["second_only"])]
    body.append([" and ".join(seeds), *only, f"{test['p_value']:.3g}"])
  return Table(["seed", f"only {names[0]} right", f"only {names[1]} right", "p"], body)


def markdown(numbers: Mapping[str, Any]) -> str:
  """The comparison in words and tables.

  Args:
    numbers: from `compare_runs`.

  Returns:
    Markdown that reads as plain text too.
  """
  names = [escaped(numbers["runs"][side]["name"]) for side in ("a", "b")]
  dataset, split = escaped(numbers["dataset"]), escaped(numbers["split"])
  lines = [
    f"# {names[0]} against {names[1]}",
    "",
    escaped(numbers["verdict"]),
    "",
    f"{dataset}, {split} split, {numbers['examples']:,} examples.",
    *map(escaped, numbers["notes"]),
    "",
    _table(numbers).markdown(),
    "",
    "McNemar's exact test, by seed:",
    "",
    _mcnemar(numbers).markdown(),
    "",
  ]
  changed = [r for r in numbers["classes"] if (r["change"] or {}).get("beyond_noise")]
  if changed:
    lines += [f"Classes that differ beyond noise ({names[0]} less {names[1]}):", ""]
    lines += [
      f"- {escaped(r['name'])}: {change(r['change']['change'], None, 1)} points" for r in changed
    ]
    lines.append("")
  lines += [f"- {escaped(problem)}" for problem in numbers["problems"]]
  return "\n".join(lines).rstrip() + "\n"


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
  runs.write_json(path.with_suffix(".json"), known(compared.numbers))
  runs.write_text(path.with_suffix(".md"), markdown(compared.numbers))
  runs.write_text(path, _page(compared))
  return path


def _page(compared: Compared) -> str:
  numbers = compared.numbers
  words = {model: numbers["runs"][side]["name"] for side, model in _AS.items()}
  title = f"{words['student']} against {words['baseline']}"
  sure = numbers["accuracy"]["p_value"] < significance.LEVEL
  return render(
    "page.html.j2",
    title=f"{title}: comparison",
    kicker="Comparison of two runs",
    heading=title,
    verdict=numbers["verdict"],
    conditions=f"{numbers['dataset']}, {numbers['split']} split; {numbers['examples']:,} examples, "
    "paired.",
    colour="good" if sure else "care",
    decision="A difference." if sure else "No difference beyond noise.",
    why="",
    tiles=_tiles(numbers, words),
    sides=[],
    problems_title="Worth knowing",
    problems=numbers["problems"] + numbers["notes"],
    sections=[
      _side_by_side(numbers, words),
      _significance(numbers),
      _class_section(numbers, words),
      _examples(compared, words),
    ],
  )


def _tiles(numbers: Mapping[str, Any], words: Mapping[str, str]) -> list[Tile]:
  tested, (a, b) = numbers["accuracy"], (numbers["runs"][side] for side in ("a", "b"))
  ends = f"95% interval {interval(tested['low'], tested['high'])}; p = {tested['p_value']:.2g}"
  tiles = [
    Tile("Difference in accuracy", f"{change(tested['change'], None)} points", ends),
    Tile(
      "Same answer", f"{100 * numbers['agreement']:.1f}%", "an instance of one and of the other"
    ),
  ]
  for label, one, other, unit in (
    ("Parameters", a["parameters"], b["parameters"], ""),
    ("Latency", a["latency_ms"]["median"], b["latency_ms"]["median"], " ms"),
  ):
    times = ratio(one, other)
    if times is not None:
      beside = f"{plain(one)} against {plain(other)}{unit}"
      names = f"{words['student']} over {words['baseline']}"
      tiles.append(Tile(label, f"{times:.3g}×", f"{beside}: {names}"))
  return tiles


def _side_by_side(numbers: Mapping[str, Any], words: Mapping[str, str]) -> Section:
  points = {}
  for side, name in _AS.items():
    one = numbers["runs"][side]
    mean, std = one["accuracy"]["mean"], one["accuracy"]["std"]
    if one["parameters"] and mean is not None:
      points[name] = (float(one["parameters"]), 100 * mean, None if std is None else 100 * std)
  drawn = []
  if len({point[0] for point in points.values()}) == 2:  # of one size there is nothing to see
    picture = figures.against(None, points, xlabel="parameters", show=count, words=words)
    drawn = [Figure(picture, "Accuracy against size")]
  head: list[Cell] = ["", *(named(name, words) for name in _AS.values())]
  table = dataclasses.replace(_table(numbers), head=head)
  return Section("table", "Side by side", figures=drawn, tables=[table])


def _significance(numbers: Mapping[str, Any]) -> Section:
  pairing = (
    "with the same seeds for both" if numbers["paired_seeds"] else "with seeds drawn independently"
  )
  note = (
    f"The interval above is a bootstrap over examples and seeds, {pairing}. Below is McNemar's "
    "exact test for each pair of instances: of the examples that only one gets right, either "
    "side is as likely if both are equally good. One of several seeds below 0.05 is no finding."
  )
  return Section("significance", "Significance", note=note, tables=[_mcnemar(numbers)])


def _class_section(numbers: Mapping[str, Any], words: Mapping[str, str]) -> Section:
  ordered = sorted(
    (row for row in numbers["classes"] if row["examples"]),
    key=lambda row: -abs((row["change"] or {}).get("change") or 0),
  )
  body = [
    [
      row["name"],
      f"{row['examples']:,}",
      *(f"{100 * row['accuracy'][side]['mean']:.1f}" for side in _AS),
      change_cell(row["change"], ("lower", "higher")),
    ]
    for row in ordered[:40]
  ]
  heads = [named(name, words) for name in _AS.values()]
  picture = figures.groups(None, marks(ordered[:14], _AS), xlabel="accuracy, %", words=words)
  return Section(
    "classes",
    "Classes",
    note="Those that differ most come first; “lower” and “higher” are said only beyond the "
    "noise of examples and seeds, corrected for the number of classes.",
    legend=legend(list(words), words),
    figures=[Figure(picture, "Accuracy by class")],
    tables=[
      Table(
        ["class", "examples", *heads, "difference"], body, "Accuracy in %, difference in points"
      )
    ],
  )


def _examples(compared: Compared, words: Mapping[str, str]) -> Section:
  galleries, folded = [], []
  for side, name in _AS.items():
    rows = compared.only[side]
    items = exhibits.shown(compared.answers, rows, words=words)
    title = f"Only {words[name]}: {len(rows):,}"
    galleries.append(Gallery(items[:_SHOWN], title, more=items[_SHOWN:]))
    folded += [
      (f"Only {words[name]}: {summary}", table)
      for summary, table in exhibits.table(compared.answers, rows, title, words=words)
    ]
  return Section("examples", "Examples that only one knows", galleries=galleries, folded=folded)
