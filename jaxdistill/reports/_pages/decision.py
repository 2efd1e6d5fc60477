"""Whether to ship the student, and why: reasons for and against, taken from the numbers.

The rules are few and stand here. A reason *stops* (labels alone are better; a budget is missed; no
exported file passed its check), asks for *care* (a class or a slice fell beyond noise against
labels alone, or against the teacher by more than all examples did; confidence is worse, a check
warned, a file failed, a gain over these seeds is within the noise of examples), or is a *note*.
A gain is by the first of the task's metrics, whichever way that gets better. It is beyond noise
where Welch's test over seeds says so and, with answers on each example, the interval over examples
and seeds (of the first metric that an example has) excludes 0; a class or a slice where
`jaxdistill.reports._pages.analysis.groups` says so, and a calibration error beyond two standard
errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill.reports._format import Reading, listed, plain, times
from jaxdistill.reports._pages import significance
from jaxdistill.reports._pages.document import first, model, readings
from jaxdistill.reports._pages.evidence import Evidence

__all__ = ["decide", "fell", "nothing_found", "ratio"]

# What a limit in budget.json is held against beside the task's metrics; more is better for those of
# the second.
_AT_MOST: dict[str, Callable[[Mapping[str, Any]], Any]] = {
  "parameters": lambda m: m["parameters"],
  "bytes": lambda m: m["bytes"],
  "flops": lambda m: m["flops"],
  "latency_ms": lambda m: m["latency_ms"]["median"],
  "latency_ms_p95": lambda m: m["latency_ms"]["p95"],
}
_AT_LEAST: dict[str, Callable[[Mapping[str, Any]], Any]] = {
  "throughput": lambda m: m["throughput"],
}
_FEW = 10  # examples of a class, of which nothing short of a collapse would be seen
_CALLED = {
  "latency_ms": "latency",
  "latency_ms_p95": "95th percentile of the latency",
  "flops": "FLOPs",
  "throughput": "examples a second",
}


def decide(
  found: Evidence,
  classes: Sequence[Mapping[str, Any]] = (),
  slices: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> dict[str, Any]:
  """The decision and its reasons; what could not be judged is a reason itself.

  Args:
    found: what the run's folder holds.
    classes: from `analysis.classes`; empty where there are no answers on each example.
    slices: from `analysis.slices`.

  Returns:
    ``word`` (``"Ship it"``, ``"Ship it with care"``, ``"No case for it"``, ``"Do not ship it"`` or
    ``"Undecided"``), ``sentence``, and ``reasons``: ``{"side": "for" | "against" | "unknown",
    "weight": "stop" | "care" | "note", "text"}``.
  """
  report = found.report
  teacher, student = model(report, "teacher"), model(report, "student")
  reasons: list[dict[str, str]] = []

  def add(side: str, text: str, weight: str = "note") -> None:
    reasons.append({"side": side, "weight": weight, "text": text})

  beats = _gain(found, add)
  _accuracy(report, teacher, student, add)
  _cost(student, teacher, add)
  _calibration(report["models"], add)
  if "classes" in report["task"]["shows"] and not classes:
    add("unknown", "Whether some classes lost more than others is unknown.")
  answers, told = found.predictions, readings(report)
  names = [] if answers is None else [n for n in answers.values("student") if n in told]
  fallen = _groups(classes, slices or {}, add, told[names[0]] if names else first(report))
  _exported((found.exports or {}).get("files", []), add)
  _budget(found.budget, student, told, add)
  _checks(found, add)
  for doubt in found.doubts:
    add("against", doubt, "care")
  judged = first(report)
  unknown = f"The student's {judged.title} is unknown."
  if student[judged.name]["mean"] is not None:
    unknown = ""
  return {**_verdict(reasons, unknown, beats, fallen), "reasons": reasons}


_Add = Callable[..., None]


def _gain(found: Evidence, add: _Add) -> str:
  """Whether it beats labels alone; returns the sentence on it for a student that may be shipped."""
  if found.report["gain"] is None:
    add("unknown", "What distillation gained over labels alone was not measured.", "care")
    return ""
  change, error = found.report["gain"]["mean"], found.report["gain"]["standard_error"]
  judged = first(found.report)
  told = f"{judged.change(judged.gain(change), error)}{judged.points}{judged.inside}"
  if error is None:
    add("unknown", f"One seed: {told} over labels alone may be noise.", "care")
    return ""
  amount = judged.amount(change, error)
  if not _beyond_seeds(found.report, judged, change, error):
    text = f"Its gain over labels alone ({told}, standard error over seeds) is noise."
    add("against", text, "draw")
    return ""
  tested = _over_examples(found, judged, change > 0)
  within = "" if tested is None or tested[0] else tested[1]
  if change < 0:
    better = f"{amount} better{judged.inside}"
    text = f"The same network on labels alone is {better}: ship that."
    if within:
      text = f"The same network on labels alone is {better} over these seeds"
      text += f" (though {within}): ship that."
    add("against", text, "stop")
    return ""
  if within:
    text = f"Over these seeds it is better than labels alone ({amount}{judged.inside}), but"
    text = f"{text} {within}."
    add("against", text, "care")
    return text
  ends = "" if tested is None else f"; {tested[1]} over examples and seeds"
  text = f"It is {amount} {judged.more} than the same network trained on labels alone"
  add("for", f"{text} (standard error over seeds{ends}).")
  if tested is None:
    text = "whether other examples would say the same is unknown, without answers on each"
    add("unknown", f"Its gain is beyond the noise of seeds; {text}.")
    return "It beats labels alone beyond the noise of seeds."
  return "It beats labels alone beyond the noise of seeds and of examples."


def _beyond_seeds(report: Mapping[str, Any], judged: Reading, change: float, error: float) -> bool:
  each = [
    [value for value in model(report, name)["per_seed"].get(judged.name, []) if value is not None]
    for name in ("student", "baseline")
  ]
  if min(map(len, each)) < 2:  # an older file: all that is left is the rule of thumb
    return abs(change) > 2 * error
  return significance.welch(*each) < significance.LEVEL


def _over_examples(found: Evidence, judged: Reading, more: bool) -> tuple[bool, str] | None:
  """Whether a gain (a loss, if not `more`) is beyond the noise of examples and seeds; in words.

  By the first metric that an example has; in words its interval, or that it is within the noise.
  """
  answers = found.predictions
  if answers is None or not len(answers):
    return None
  ours, theirs = (answers.values(name) for name in ("student", "baseline"))
  name = next((name for name in ours if name in theirs), None)
  if name is None:
    return None
  one = readings(found.report).get(name, judged)
  there = np.isfinite(ours[name]).all(axis=0) & np.isfinite(theirs[name]).all(axis=0)
  if not there.any():
    return None
  sign = one.gain(1.0)
  tested = significance.change(*(sign * side[name][:, there] for side in (ours, theirs)))
  change, error, p_value = (tested[key] for key in ("change", "error", "p_value"))
  low, high = change - 1.96 * error, change + 1.96 * error
  ends = sorted(one.gain(end) for end in (low, high))
  other = "" if one.name == judged.name else one.inside
  shown = f"95% interval {one.interval(*ends)}{other}"
  beyond = low > 0 if more else high < 0
  # So few examples may differ that the normal law's interval is too short.
  if beyond and p_value < significance.LEVEL:
    return True, shown
  if beyond:
    shown = f"p = {p_value:.2g}"
  what = "a difference of that size" if not other else f"the difference{other}"
  return False, f"on {there.sum():,} examples {what} is within their noise ({shown})"


def _accuracy(
  report: Mapping[str, Any], teacher: Mapping[str, Any], student: Mapping[str, Any], add: _Add
) -> None:
  judged = first(report)
  ours, theirs = student[judged.name]["mean"], teacher[judged.name]["mean"]
  gap = report["gap_closed"]
  if gap["value"] is not None:
    share, ends = f"{100 * gap['value']:z.0f}%", ""
    if gap["low"] is not None:
      ends = f"95% interval {100 * gap['low']:z.0f} to {100 * gap['high']:z.0f}%"
    if gap["value"] > 0:
      told = f" ({ends})" if ends else ""
      add("for", f"It closes {share} of the gap to the teacher{told}.")
    else:
      told = f"share {share}, {ends}" if ends else f"share {share}"
      add("against", f"It closes none of the gap to the teacher ({told}).")
  elif report["gain"] is not None and gap["note"]:
    add("unknown", gap["note"])
  if ours is not None and theirs is not None:
    if judged.gain(ours - theirs) < 0:
      price = f"{judged.amount(theirs - ours)} {judged.less}"
      add("against", f"The price: {price} than the teacher.")
    else:
      as_good = "accurate" if not judged.inside else "good"
      text = f"{judged.change(ours - theirs, None)}{judged.points}{judged.inside}"
      add("for", f"It is as {as_good} as the teacher ({text}).")


def ratio(more: float | None, less: float | None) -> float | None:
  """How many times more; None where one is unknown.

  >>> ratio(6, 2), ratio(None, 2)
  (3.0, None)
  """
  if not more or not less or not math.isfinite(more) or not math.isfinite(less):
    return None
  return more / less


def _cost(student: Mapping[str, Any], teacher: Mapping[str, Any], add: _Add) -> None:
  size = ratio(teacher["parameters"], student["parameters"])
  speed = ratio(teacher["latency_ms"]["median"], student["latency_ms"]["median"])
  if size is None and speed is None:
    add("unknown", "What teacher and student cost was not measured.")
    return
  smaller = f"{times(size)} times fewer parameters than the teacher" if size else ""
  faster = f"its latency is {times(speed)} times lower" if speed else ""
  if size is None:
    add("unknown", "Whether it is smaller than the teacher is unknown.")
    if (speed or 0) >= 1:
      add("for", f"{faster.capitalize()} than the teacher's.")
    else:
      add("against", f"It is no faster than the teacher here (×{speed or 0:.2g}).", "care")
  elif size > 1 and (speed is None or speed >= 1):
    add("for", f"It has {' and '.join(part for part in (smaller, faster) if part)}.")
  elif size > 1:
    add("against", f"It has {smaller}, but is no faster here (×{speed or 0:.2g}).", "care")
  else:
    add("against", "It is no smaller than the teacher.", "care")


def _mean(model: Mapping[str, Any], name: str) -> float | None:
  """A metric's, which a task may not have."""
  mean: float | None = model.get(name, {}).get("mean")
  return mean


def _calibration(models: Mapping[str, Any], add: _Add) -> None:
  spreads = {name: one["ece"] for name, one in models.items() if _mean(one, "ece") is not None}
  means = {name: one["mean"] for name, one in spreads.items()}
  if "student" not in means:
    return
  beside = {"teacher": "the teacher's", "baseline": "labels alone"}
  others = ", ".join(f"{beside[n]} {100 * means[n]:.2f}%" for n in beside if n in means)
  text = f"calibration error {100 * means['student']:.2f}%" + (f" ({others})" if others else "")
  reference = "baseline" if "baseline" in means else "teacher"
  if reference not in means:
    return
  if spreads["student"]["std"] is None:  # a single teacher is held fixed, as in the gap
    add("unknown", f"Of one seed, how honest its confidence is may be noise: {text}.")
    return
  error = math.sqrt(
    sum(
      (spreads[n]["std"] or 0.0) ** 2 / (models[n]["instances"] or 1)
      for n in (reference, "student")
    )
  )
  change = means["student"] - means[reference]
  if change > max(2 * error, 0.005):  # half a point is nobody's concern
    add("against", f"Its confidence is less honest: {text}.", "care")
  elif change < -2 * error:
    add("for", f"Its confidence is more honest: {text}.")
  else:
    add("for", f"Its confidence is about as honest: {text}.")


def _groups(
  classes: Sequence[Mapping[str, Any]],
  slices: Mapping[str, Sequence[Mapping[str, Any]]],
  add: _Add,
  reading: Reading,
) -> bool:
  """Which classes and slices lost beyond noise; returns whether any did, however little."""
  looked = [("Classes", classes), *((f"Slices of {name!r}", rows) for name, rows in slices.items())]
  fallen = False
  for what, rows in looked:
    alone, price = (
      [row for row in rows if fell(row["changes"].get(name))] for name in ("baseline", "teacher")
    )
    # Below its teacher all that is large falls: that is the price, which was said above.
    more = _beyond_the_whole(rows)
    for those, reference, weight, called in (
      (alone, "baseline", "care", "labels alone"),
      (more, "teacher", "care", "the teacher, more than all examples did"),
      ([row for row in price if row not in more], "teacher", "note", "the teacher"),
    ):
      lost = sorted((row["changes"][reference]["change"], row["name"]) for row in those)
      told = [
        f"{name} ({reading.change(reading.gain(change), None, 1)}{reading.points})"
        for change, name in lost
      ]
      if told:
        text = f"{what} that lost beyond noise against {called}: {listed(told, 5)}."
        add("against", text, weight)
    fallen |= bool(alone or price)
  sizes = [row["examples"] for row in classes if row["examples"]]
  kinds = [one for row in classes for one in row["changes"].values()]
  if not kinds or any(fell(one) for one in kinds):
    return fallen
  if max(sizes, default=0) < _FEW:
    text = f"at most {max(sizes, default=0)} examples each are too few to tell"
    add("unknown", f"Whether some classes lost more than others is unknown: {text}.")
    return fallen
  few = f" (the smallest has {min(sizes)} examples)" if min(sizes) < 3 * _FEW else ""
  add("for", f"No class lost beyond noise, neither against labels alone nor the teacher{few}.")
  return fallen


def _beyond_the_whole(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  """Groups that lost more against the teacher than all examples did, beyond their own noise.

  A one-sided normal test of each group's change against the mean over all, corrected (Holm).
  """
  import scipy.special

  there = [row for row in rows if "teacher" in row["changes"]]
  sizes = [row["examples"] for row in there]
  changes, errors = (
    np.array([row["changes"]["teacher"][key] for row in there]) for key in ("change", "error")
  )
  behind = changes - np.average(changes, weights=sizes) if there else changes
  # A group whose error is 0 has one answer to all: what it lost is certain.
  p_values = scipy.special.ndtr(behind / np.maximum(errors, 1e-12))
  below = [p < significance.LEVEL for p in significance.holm(p_values.tolist())]
  return [
    row for row, less in zip(there, below, strict=True) if less and fell(row["changes"]["teacher"])
  ]


def fell(change: Mapping[str, Any] | None) -> bool:
  """Whether a group lost beyond noise."""
  return change is not None and change["beyond_noise"] and change["change"] < 0


def _exported(files: Sequence[Mapping[str, Any]], add: _Add) -> None:
  if not files:
    add("unknown", "No exported file was checked in its own runtime.")
    return
  good = [one["file"] + _timed(one) for one in files if one["passed"]]
  bad = [
    f"{one['file']} ({one['problem'] or 'no reason given'})" for one in files if not one["passed"]
  ]
  if good:
    add("for", f"Exported, and checked in a process of its own: {listed(good)}.")
  if bad:
    add("against", f"Exports that failed: {listed(bad, 3)}.", "care" if good else "stop")


def _timed(entry: Mapping[str, Any]) -> str:
  """An exported file's latency in its own runtime, where it was measured."""
  if entry["latency_ms"] is None:
    return ""
  at = "" if entry["batch_size"] == 1 else f" at batch {entry['batch_size']}"
  return f" ({entry['latency_ms']['median']:.2g} ms{at})"


def _checks(found: Evidence, add: _Add) -> None:
  if found.findings is None:
    return
  for one in found.findings:
    fix = f" {one['fix']}" if one["fix"] else ""
    add("against", f"Pre-flight check: {one['message']}{fix}", "care")
  if not found.findings:
    add("for", nothing_found(found))


def nothing_found(found: Evidence) -> str:
  """That the checks found nothing; a compression, which has a budget, checks twice."""
  when = " before and after the training" if found.budget else ""
  return f"Checked{when}, nothing found."


def _plain(limit: float, value: float) -> tuple[str, str]:
  """Two numbers in full, to as few digits as tell them apart.

  >>> _plain(1.25e6, 93_040), _plain(0.75, 0.4594729)
  (('1,250,000', '93,040'), ('0.75', '0.4595'))
  """
  texts = plain(limit), plain(value)
  return texts if texts[0] != texts[1] or limit == value else (plain(limit, 12), plain(value, 12))


def _budget(
  budget: Mapping[str, Any],
  student: Mapping[str, Any],
  told: Mapping[str, Reading],
  add: _Add,
) -> None:
  limits, costs = budget.get("limits", {}), budget.get("costs", {})
  batch = limits.get("batch_size", 1)
  for name, limit in limits.items():
    get, least = (_AT_LEAST if name in _AT_LEAST else _AT_MOST).get(name), name in _AT_LEAST
    if get is not None:
      # The report's own latency is of one example.
      own, called = get(student), _CALLED.get(name, name)
      own = None if name.startswith("latency") and batch != 1 else own
    elif name in told and told[name].better is not None:
      own, called, least = _mean(student, name), told[name].title, told[name].better == "higher"
    else:
      continue
    value = costs.get(name, own)
    texts = _plain(limit, limit if value is None else value)
    unit = f" ms at batch {batch:g}" if name.startswith("latency") else ""
    words = f"{called} at {'least' if least else 'most'} {texts[0]}{unit}"
    if value is None:
      add("unknown", f"Budget: {words} could not be looked at.", "care")
    elif value >= limit if least else value <= limit:
      add("for", f"Budget met: {words} (it has {texts[1]}).")
    else:
      add("against", f"Budget missed: {words}, but it has {texts[1]}.", "stop")


def _verdict(
  reasons: Sequence[Mapping[str, str]], unmeasured: str, beats: str, fallen: bool
) -> dict[str, str]:
  def of(side: str, weight: str) -> list[str]:
    return [r["text"] for r in reasons if r["side"] == side and r["weight"] == weight]

  stops, cares, unknown = of("against", "stop"), of("against", "care"), of("unknown", "care")
  if stops:
    return {"word": "Do not ship it", "sentence": stops[0]}
  if unmeasured:
    return {"word": "Undecided", "sentence": unmeasured}
  if unknown:
    return {"word": "Undecided", "sentence": unknown[0]}
  if of("against", "draw"):
    text = "Nothing here speaks for distillation over labels alone, nor against it."
    return {"word": "No case for it", "sentence": text}
  others = [text for text in cares if text != beats]
  if others:
    more = "One point speaks" if len(others) == 1 else f"{len(others)} points speak"
    more += " against it as well" if len(others) < len(cares) else " against it"
    text = f"{beats} {more}; read below before you ship."
    return {"word": "Ship it with care", "sentence": text}
  if cares:
    return {"word": "Ship it with care", "sentence": beats}
  rest = "nothing measured here forbids it"
  if fallen:
    rest = "what some classes or slices lost of its teacher beyond noise is no more than all lost"
  text = f"{beats.removesuffix('.')}, and {rest}."
  return {"word": "Ship it", "sentence": text}
