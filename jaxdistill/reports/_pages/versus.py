"""Two runs side by side: is one student better than the other, beyond noise?

Both were measured on the same split, so each example is its own control: a bootstrap over examples
and seeds of each metric that an example has, and of one class an example McNemar's exact test for
every pair of instances. What only the whole split has is compared over seeds.
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
  DASH,
  Cell,
  Reading,
  Table,
  count,
  escaped,
  fenced,
  plain,
  whole,
)
from jaxdistill.reports._pages import (
  analysis,
  document,
  evidence,
  exhibits,
  significance,
  summary,
)
from jaxdistill.reports._pages.decision import ratio
from jaxdistill.reports._pages.document import known, model, readings, spread
from jaxdistill.reports._pages.evidence import Evidence
from jaxdistill.reports._pages.page import SHARE, change_cell, drawn_with, marks, window_of
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

__all__ = ["Compared", "compare_runs", "markdown", "write_comparison"]

VERSION = 2  # 1 knew accuracies alone
# The colours and marks of two of the three models stand for the two runs.
_AS = {"a": "student", "b": "baseline"}
_COSTS = ("instances", "parameters", "FLOPs an example", "latency, ms")
# Of both runs, of which one may have measured again what the other's answers say.
_FROM_ANSWERS = ("accuracy", "nll", "ece")
_SHOWN = 12  # examples that only one of the two knows, seen without a click


@dataclasses.dataclass(frozen=True, eq=False)
class Compared:
  """Two runs, compared.

  Attributes:
    numbers: what ``comparison.json`` holds, but for what is None, which it leaves out.
    answers: of both students on the examples that both were measured on, as the models ``student``
      (the first run) and ``baseline`` (the second); None where nothing was kept of an example.
    only: examples that most instances of one side get right and most of the other wrong, by side.
  """

  numbers: dict[str, Any]
  answers: Predictions | None
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
    ValueError: the runs are of other tasks; of classes, a run has no answers on each example; or
      they are of another data set or split, of other labels, or have no example in common.
  """
  _extras.need("reports.compare_runs", "matplotlib", "scipy", "jinja2", "jsonschema")
  found = {"a": evidence.read(first, split), "b": evidence.read(second, split)}
  names = _names(first, second)
  _check_tasks(found, names)
  reports = {side: one.report for side, one in found.items()}
  told = readings(reports["a"])
  answers, notes = _answers(found, names), []
  if answers is None:
    _check_data(reports, names)
    paired_seeds = reports["a"]["seeds"] == reports["b"]["seeds"]
    notes.append(
      "Nothing was kept of single examples: the runs are compared over their seeds alone."
    )
    both = None
  else:
    a, b, notes = _matched(*answers, names)
    paired_seeds = a.seeds == b.seeds
    both = dataclasses.replace(
      a,
      models=_as_sides(a.models, b.models),
      details=_as_sides(a.details, b.details),
      shown={**b.shown, **a.shown},
    )
  sides = {side: _side(found[side], names[side], both, _AS[side]) for side in ("a", "b")}
  numbers = {
    "version": VERSION,
    "task": reports["a"]["task"],
    "dataset": reports["a"]["dataset"] if both is None else both.dataset,
    "split": split,
    "examples": reports["a"]["examples"] if both is None else len(both),
    "paired_seeds": paired_seeds,
    "runs": sides,
    "metrics": _over_seeds(sides, told),
    "paired": {} if both is None else _paired(both, told, paired_seeds, resamples),
    "texts": _texts(found),
    "notes": notes,
    "problems": [f"{names[s]}: {p}" for s in ("a", "b") for p in found[s].problems],
  }
  only: dict[str, np.ndarray] = {}
  if both is not None and both.models:
    right = {"a": both.correct("student"), "b": both.correct("baseline")}
    share = {side: values.mean(axis=0) for side, values in right.items()}
    only = {"a": _clearest(share["a"], share["b"]), "b": _clearest(share["b"], share["a"])}
    numbers |= {
      "mcnemar": _tests(right["a"], right["b"], a.seeds, b.seeds),
      "agreement": _agreement(both),
      "only": {side: len(rows) for side, rows in only.items()},
      "classes": _classes(both),
    }
  numbers["verdict"] = _verdict(numbers)
  return Compared(runs.to_json(numbers), both, only)


def _texts(found: Mapping[str, Evidence]) -> dict[str, Any] | None:
  """The beginnings that both students go on with, with what each writes; None where none are."""
  a, b = (found[side].texts for side in ("a", "b"))
  drawn = ("seed", "temperature", "length")
  if a is None or b is None or any(a[name] != b[name] for name in drawn):
    return None
  theirs = {(one["index"], one["prompt"]): one["said"].get("student") for one in b["texts"]}
  rows = []
  for one in a["texts"]:
    ours, other = one["said"].get("student"), theirs.get((one["index"], one["prompt"]))
    if ours is not None and other is not None:
      rows.append({**one, "said": {"a": ours, "b": other}})
  return {**{name: a[name] for name in drawn}, "texts": rows} if rows else None


def _as_sides(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
  """The students of two runs as the two models of one."""
  return {_AS[side]: one["student"] for side, one in (("a", a), ("b", b)) if "student" in one}


def _check_tasks(found: Mapping[str, Evidence], names: Mapping[str, str]) -> None:
  """Raises for runs that were judged by other metrics."""
  tasks = {side: one.report["task"] for side, one in found.items()}
  a, b = (tasks[side].get("name") for side in ("a", "b"))
  judged = [document.first(found[side].report) for side in ("a", "b")]
  if a != b or judged[0] != judged[1]:
    raise ValueError(
      f"the runs are of different tasks: {names['a']} was measured by {a!r} ({judged[0].title}), "
      f"{names['b']} by {b!r} ({judged[1].title}). Measure both by one."
    )


def _check_data(reports: Mapping[str, Any], names: Mapping[str, str]) -> None:
  """Raises for runs whose reports are of other data."""
  for what in ("dataset", "split"):
    both = [reports[side][what] for side in ("a", "b")]
    if both[0] != both[1]:
      raise ValueError(
        f"the runs were measured on different data: the {what} of {names['a']} is {both[0]!r}, "
        f"that of {names['b']} is {both[1]!r}. Compare runs on the same data set and split."
      )


def _over_seeds(sides: Mapping[str, Any], told: Mapping[str, Reading]) -> dict[str, dict[str, Any]]:
  """By metric how much better the first run is, and Welch's test over seeds where both have some.

  A metric of which nobody said which way is better has neither.
  """
  made = {}
  for name, reading in told.items():
    means = [sides[side].get(name, {}).get("mean") for side in ("a", "b")]
    if None in means or reading.better is None:
      continue
    each = [[v for v in sides[s]["per_seed"].get(name, []) if v is not None] for s in ("a", "b")]
    p_value = significance.welch(*each) if min(map(len, each)) > 1 else None
    made[name] = {"gain": reading.gain(means[0] - means[1]), "p_value": p_value}
  return made


def _paired(
  both: Predictions, told: Mapping[str, Reading], paired: bool, resamples: int
) -> dict[str, dict[str, Any]]:
  """By metric that an example has: how much better the first run is, on the same examples."""
  made = {}
  ours, theirs = (both.values(name) for name in ("student", "baseline"))
  for name in (name for name in ours if name in theirs):
    there = np.isfinite(ours[name]).all(axis=0) & np.isfinite(theirs[name]).all(axis=0)
    if there.any():
      sign = told[name].gain(1.0) if name in told else 1.0
      pair = (both.weighed(sign * side[name], there) for side in (ours, theirs))
      tested = significance.bootstrap(*pair, paired=paired, resamples=resamples)
      made[name] = {"gain": tested.pop("change"), **tested, "examples": int(there.sum())}
  return made


def _names(first: Any, second: Any) -> dict[str, str]:
  """What the runs are called: their folders' names, or as much of the path as tells them apart."""
  paths = [_check.folder("run", one) for one in (first, second)]
  for depth in range(1, 1 + max(len(path.parts) for path in paths)):
    short = ["/".join(path.parts[-depth:]) for path in paths]
    if short[0] != short[1]:
      return {"a": short[0], "b": short[1]}
  return {"a": f"{paths[0].name} (first)", "b": f"{paths[1].name} (second)"}


def _answers(
  found: Mapping[str, Evidence], names: Mapping[str, str]
) -> tuple[Predictions, Predictions] | None:
  """What both students said of each example; None where a task keeps nothing, or a run lacks it."""
  given = [found[side].predictions for side in ("a", "b")]
  there = [one for one in given if one is not None and len(one) and one.values("student")]
  if len(there) == 2:
    return there[0], there[1]
  for side, answers in zip(("a", "b"), given, strict=True):
    if "classes" in found[side].report["task"]["shows"] and answers not in there:
      why = " ".join(p for p in found[side].problems if "answers" in p or "version" in p)
      raise ValueError(
        f"{names[side]} has no student's answers on each example, which a comparison is made of. "
        f"{why} Measure the run again (its experiment's --evaluate)."
      )
  return None


def _matched(
  a: Predictions, b: Predictions, names: Mapping[str, str]
) -> tuple[Predictions, Predictions, list[str]]:
  """Both on the examples that they share, in one order."""
  _check_data({side: vars(one) for side, one in (("a", a), ("b", b))}, names)
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
  differing = int(np.sum(a.labels != b.labels)) if len(a.labels) == len(b.labels) else len(a)
  if differing:
    raise ValueError(
      f"{differing} of the {len(common)} examples that {names['a']} and {names['b']} share have "
      "different labels: they are not of the same data."
    )
  if not np.array_equal(a.weights(), b.weights()):
    notes.append(f"The runs weigh the examples differently: they count as in {names['a']}.")
  if a.seeds != b.seeds:
    notes.append("The runs have different seeds, which are therefore not paired.")
  return a, b, notes


def _clearest(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
  """Examples that most of ours get right and most of theirs wrong, the clearest first."""
  rows = np.flatnonzero((ours > 0.5) & (theirs < 0.5))
  return rows[np.argsort((theirs - ours)[rows], kind="stable")]


def _side(found: Evidence, name: str, both: Predictions | None, called: str) -> dict[str, Any]:
  student = model(found.report, "student")
  told = {key: student[key] for key in readings(found.report) if student[key]["mean"] is not None}
  per_seed, instances = dict(student["per_seed"]), student["instances"]
  if both is not None and both.models:  # on the examples that both have
    quality = analysis.quality(both, called)
    told = {key: spread(quality[key]) for key in _FROM_ANSWERS if key in quality}
    per_seed, instances = {key: quality[key] for key in told}, len(quality["accuracy"])
  return {
    "name": name,
    "description": student["description"],
    "instances": instances,
    **told,
    "per_seed": per_seed,
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


def _judged(numbers: Mapping[str, Any]) -> tuple[Reading, Reading, Mapping[str, Any]]:
  """What the runs are judged by, what is tested for it, and the test.

  The first metric that an example has is tested; of a task that has none, the metric over seeds.
  """
  told, judged = readings(numbers), document.first(numbers)
  for name, tested in numbers["paired"].items():
    return judged, told.get(name, judged), tested
  return judged, judged, numbers["metrics"].get(judged.name, {"gain": None, "p_value": None})


def _ends(reading: Reading, tested: Mapping[str, Any]) -> str:
  """The interval of a paired test as the difference is told; empty for one over seeds."""
  if tested.get("low") is None:
    return ""
  return reading.interval(*sorted(reading.gain(tested[key]) for key in ("low", "high")))


def _verdict(numbers: Mapping[str, Any]) -> str:
  """By the metric, as far as the test of it, or of what an example has of it, says so."""
  (judged, one, tested), runs = _judged(numbers), numbers["runs"]
  names = [runs[side]["name"] for side in ("a", "b")]
  means = [runs[side].get(judged.name, {}).get("mean") for side in ("a", "b")]
  if None in means:
    return f"Nothing is known of the difference: {judged.title} was not measured in both runs."
  where = f"{judged.called}{judged.value(means[0])} against {judged.value(means[1])}"
  if tested["p_value"] is None:
    change = f"{judged.change(means[0] - means[1], None)}{judged.points}"
    return (
      f"Whether {names[0]} and {names[1]} differ is unknown: {where} ({change}), of one seed, and "
      "nothing is known of single examples."
    )
  ends = _ends(one, tested)
  how = f"95% bootstrap interval {ends}" if ends else "over seeds"
  how += one.inside if one.name != judged.name else ""
  where = f"({where}; {how}, p = {tested['p_value']:.2g})"
  gain = judged.gain(means[0] - means[1])
  # A test of what an example has says nothing of a metric that moved the other way.
  if tested["p_value"] >= significance.LEVEL or gain * tested["gain"] < 0:
    return f"No difference beyond noise between {names[0]} and {names[1]} {where}."
  better, worse = names if tested["gain"] > 0 else names[::-1]
  amount = judged.amount(means[0] - means[1])
  return f"{better} is {amount} better than {worse} {where}."


def _table(numbers: Mapping[str, Any]) -> Table:
  """Both runs side by side."""
  models = {one["name"]: one for one in numbers["runs"].values()}
  leads = numbers["task"].get("leads", [])
  return summary.side_by_side(models, summary.in_order(readings(numbers), leads), _COSTS)


def _differences(numbers: Mapping[str, Any]) -> Table:
  """Every metric's difference, over examples where an example has it, else over seeds."""
  told, names = readings(numbers), [numbers["runs"][side]["name"] for side in ("a", "b")]
  body = []
  tests = {**numbers["metrics"], **numbers["paired"]}
  for name in dict.fromkeys((*told, *numbers["paired"])):
    if name not in tests:
      continue
    one, tested = told.get(name, Reading(name, name)), tests[name]
    how = "examples and seeds" if name in numbers["paired"] else "seeds"
    p_value, better = "", ""
    if tested["p_value"] is not None:
      sure = tested["p_value"] < significance.LEVEL
      p_value = f"{tested['p_value']:.2g}"
      better = (names[0] if tested["gain"] > 0 else names[1]) if sure else "within noise"
    change = one.change(one.gain(tested["gain"]), None)
    body.append([one.label, change, _ends(one, tested) or DASH, p_value or DASH, how, better])
  head = ["metric", "difference", "95% interval", "p", "over", "better"]
  return Table(head, body, f"{names[0]} less {names[1]}", sortable=False)


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
    f"{dataset}, {split} split, {_examples_of(numbers)}.",
    *map(escaped, numbers["notes"]),
    "",
    _table(numbers).markdown(),
    "",
    "What differs, by metric (the first less the second):",
    "",
    _differences(numbers).markdown(),
    "",
  ]
  if numbers.get("mcnemar"):
    lines += ["McNemar's exact test, by seed:", "", _mcnemar(numbers).markdown(), ""]
  changed = [r for r in numbers.get("classes", []) if (r["change"] or {}).get("beyond_noise")]
  if changed:
    lines += [f"Classes that differ beyond noise ({names[0]} less {names[1]}):", ""]
    lines += [
      f"- {escaped(r['name'])}: {SHARE.change(r['change']['change'], None, 1)} points"
      for r in changed
    ]
    lines.append("")
  for one in (numbers["texts"] or {"texts": []})["texts"]:
    voices = {"Beginning": one["prompt"], names[0]: one["said"]["a"], names[1]: one["said"]["b"]}
    for name, text in voices.items():
      lines += [f"{name}:", "", *fenced(text.splitlines() or [""]), ""]
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
  _, _, tested = _judged(numbers)
  sure = not numbers["verdict"].startswith(("No difference", "Whether", "Nothing"))
  unknown = tested["p_value"] is None
  made = [_side_by_side(numbers, words), _significance(numbers)]
  if compared.answers is not None and compared.answers.models:
    made += [_class_section(numbers, words), _examples(compared, compared.answers, words)]
  made.append(_samples(numbers, words))
  return render(
    "page.html.j2",
    title=f"{title}: comparison",
    kicker="Comparison of two runs",
    heading=title,
    verdict=numbers["verdict"],
    conditions=f"{numbers['dataset']}, {numbers['split']} split; {_examples_of(numbers)}"
    f"{', paired' if numbers['paired'] else ''}.",
    colour="good" if sure else "care",
    decision="A difference."
    if sure
    else "A difference that nobody knows."
    if unknown
    else "No difference beyond noise.",
    why="",
    tiles=_tiles(numbers, words),
    sides=[],
    problems_title="Worth knowing",
    problems=numbers["problems"] + numbers["notes"],
    sections=[section for section in made if section],
  )


def _examples_of(numbers: Mapping[str, Any]) -> str:
  return f"{whole(numbers['examples'])} examples"


def _tiles(numbers: Mapping[str, Any], words: Mapping[str, str]) -> list[Tile]:
  (_, one, tested), (a, b) = _judged(numbers), (numbers["runs"][side] for side in ("a", "b"))
  tiles = []
  if tested["p_value"] is not None:
    ends = _ends(one, tested)
    beside = f"95% interval {ends}; p = {tested['p_value']:.2g}"
    difference = f"{one.change(one.gain(tested['gain']), None)}{one.points}"
    told = beside if ends else beside.partition("; ")[2]
    tiles.append(Tile(f"Difference in {one.title}", difference, told))
  if "agreement" in numbers:
    agree = f"{100 * numbers['agreement']:.1f}%"
    tiles.append(Tile("Same answer", agree, "an instance of one and of the other"))
  for label, ours, theirs, unit in (
    ("Parameters", a["parameters"], b["parameters"], ""),
    ("Latency", a["latency_ms"]["median"], b["latency_ms"]["median"], " ms"),
  ):
    times = ratio(ours, theirs)
    if times is not None:
      beside = f"{plain(ours)} against {plain(theirs)}{unit}"
      names = f"{words['student']} over {words['baseline']}"
      tiles.append(Tile(label, f"{times:.3g}×", f"{beside}: {names}"))
  return tiles


def _side_by_side(numbers: Mapping[str, Any], words: Mapping[str, str]) -> Section:
  points, drawn, judged = {}, [], document.first(numbers)
  for side, name in _AS.items():
    one = numbers["runs"][side]
    mean, std = (one.get(judged.name, {}).get(key) for key in ("mean", "std"))
    if one["parameters"] and mean is not None:
      spread = None if std is None else judged.scaled(std)
      points[name] = (float(one["parameters"]), judged.scaled(mean), spread)
  if len({point[0] for point in points.values()}) == 2:  # of one size there is nothing to see
    picture = figures.against(
      None,
      points,
      xlabel="parameters",
      show=count,
      ylabel=judged.label,
      tell=judged.told,
      words=words,
    )
    drawn = [Figure(picture, f"{judged.title} against size")]
  head: list[Cell] = ["", *(named(name, words) for name in _AS.values())]
  table = dataclasses.replace(_table(numbers), head=head)
  return Section("table", "Side by side", figures=drawn, tables=[table])


def _significance(numbers: Mapping[str, Any]) -> Section:
  pairing = (
    "with the same seeds for both" if numbers["paired_seeds"] else "with seeds drawn independently"
  )
  note = f"Over examples and seeds it is a bootstrap, {pairing}; over seeds alone Welch's test."
  tables = [_differences(numbers)]
  if numbers.get("mcnemar"):
    note += (
      " Below is McNemar's exact test for each pair of instances: of the examples that only one "
      "gets right, either side is as likely if both are equally good. One of several seeds below "
      "0.05 is no finding."
    )
    tables.append(_mcnemar(numbers))
  return Section("significance", "Significance", note=note, tables=tables)


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


def _samples(numbers: Mapping[str, Any], words: Mapping[str, str]) -> Section:
  """The same beginnings as both students go on with them."""
  title, texts = "Sample texts", numbers["texts"]
  if texts is None:
    return Section("texts", title)
  samples = [
    Sample(
      one["prompt"],
      [(named(name, words), one["said"][side]) for side, name in _AS.items()],
      window_of(one),
    )
    for one in texts["texts"]
  ]
  return Section("texts", title, note=drawn_with(texts), samples=samples)


def _examples(compared: Compared, answers: Predictions, words: Mapping[str, str]) -> Section:
  galleries, folded = [], []
  for side, name in _AS.items():
    rows = compared.only[side]
    items = exhibits.shown(answers, rows, words=words)
    title = f"Only {words[name]}: {len(rows):,}"
    galleries.append(Gallery(items[:_SHOWN], title, more=items[_SHOWN:]))
    folded += [
      (f"Only {words[name]}: {summary}", table)
      for summary, table in exhibits.table(answers, rows, title, words=words)
    ]
  return Section("examples", "Examples that only one knows", galleries=galleries, folded=folded)
