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
from jaxdistill.reports._format import DASH, count, grid, number, percent, signed
from jaxdistill.reports._pages import analysis, evidence, significance
from jaxdistill.reports._pages.evidence import Evidence

__all__ = ["AS", "Compared", "compare_runs", "markdown", "rows", "test_rows"]

VERSION = 1
# The colours and marks of two of the three models stand for the two runs.
AS = {"a": "student", "b": "baseline"}


@dataclasses.dataclass(frozen=True, eq=False)
class Compared:
  """Two runs, compared.

  Attributes:
    numbers: what ``comparison.json`` holds.
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
  _extras.need("reports.compare_runs", "matplotlib", "scipy")
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
    "runs": {side: _side(found[side], names[side], answers, AS[side]) for side in ("a", "b")},
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
  paths = [pathlib.Path(_check.folder("run", one)).absolute() for one in (first, second)]
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


def _side(found: Evidence, name: str, answers: Predictions, model: str) -> dict[str, Any]:
  student = (found.report.get("models") or {}).get("student") or {}
  quality = analysis.quality(answers, model)
  return {
    "name": name,
    "description": student.get("description") or "",
    "instances": len(quality["accuracy"]),
    **{key: evidence.spread(values) for key, values in quality.items()},
    "accuracy_per_seed": quality["accuracy"],
    **{key: student.get(key) for key in ("parameters", "bytes", "flops", "latency_ms")},
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
    shares = {side: row["accuracy"][model] for side, model in AS.items()}
    change = row["changes"].get("baseline")
    rows.append(
      {"name": row["name"], "examples": row["examples"], "accuracy": shares, "change": change}
    )
  return rows


def _verdict(numbers: Mapping[str, Any]) -> str:
  tested, runs = numbers["accuracy"], numbers["runs"]
  interval = (
    f"95% bootstrap interval {signed(100 * tested['low'])} to {signed(100 * tested['high'])}"
  )
  points = f"{100 * abs(tested['change']):.2f} points"
  means = [100 * runs[side]["accuracy"]["mean"] for side in ("a", "b")]
  where = f"({means[0]:.2f}% against {means[1]:.2f}%; {interval}, p = {tested['p_value']:.2g})"
  if tested["p_value"] >= significance.LEVEL:
    return (
      f"No difference beyond noise between {runs['a']['name']} and {runs['b']['name']} {where}."
    )
  better, worse = ("a", "b") if tested["change"] > 0 else ("b", "a")
  return f"{runs[better]['name']} is {points} better than {runs[worse]['name']} {where}."


def rows(numbers: Mapping[str, Any]) -> list[list[str]]:
  """Both runs in a table, its head first."""
  a, b = (numbers["runs"][side] for side in ("a", "b"))

  def both(label: str, show: Any) -> list[str]:
    return [label, show(a), show(b)]

  return [
    ["", a["name"], b["name"]],
    both("accuracy, %", lambda m: percent(m["accuracy"])),
    both("negative log-likelihood", lambda m: number(m["nll"])),
    both("calibration error, %", lambda m: percent(m["ece"])),
    both("instances", lambda m: str(m["instances"])),
    both("parameters", lambda m: DASH if m["parameters"] is None else f"{m['parameters']:,}"),
    both("FLOPs an example", lambda m: count(m["flops"])),
    both(
      "latency, ms",
      lambda m: DASH if not m["latency_ms"] else f"{m['latency_ms'].get('median') or 0:.3f}",
    ),
  ]


def test_rows(numbers: Mapping[str, Any]) -> list[list[str]]:
  """McNemar's tests in a table, without its head."""
  return [
    [
      str(test["seed_a"]) if test["seed_a"] == test["seed_b"] else
      f"{test['seed_a']} and {test['seed_b']}",
      str(test["first_only"]),
      str(test["second_only"]),
      f"{test['p_value']:.3g}",
    ]
    for test in numbers["mcnemar"]
  ]  # fmt: skip


def markdown(numbers: Mapping[str, Any]) -> str:
  """The comparison in words and tables.

  Args:
    numbers: from `compare_runs`.

  Returns:
    Markdown that reads as plain text too.
  """
  names = [numbers["runs"][side]["name"] for side in ("a", "b")]
  lines = [
    f"# {names[0]} against {names[1]}",
    "",
    numbers["verdict"],
    "",
    f"{numbers['dataset']}, {numbers['split']} split, {numbers['examples']:,} examples.",
    *numbers["notes"],
    "",
    grid(rows(numbers)),
    "",
    "McNemar's exact test, by seed:",
    "",
    grid([["seed", f"only {names[0]} right", f"only {names[1]} right", "p"], *test_rows(numbers)]),
    "",
  ]
  changed = [r for r in numbers["classes"] if (r["change"] or {}).get("beyond_noise")]
  if changed:
    lines += [f"Classes that differ beyond noise ({names[0]} less {names[1]}):", ""]
    lines += [
      f"- {r['name']}: {signed(100 * r['change']['change'], 1)} points" for r in changed
    ] + [""]
  lines += [f"- {problem}" for problem in numbers["problems"]]
  return "\n".join(lines).rstrip() + "\n"
