"""The parts of a report's page about files: exports, pre-flight checks, how to repeat it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jaxdistill.reports._format import DASH, percent, size
from jaxdistill.reports._pages.evidence import Evidence
from jaxdistill.reports._pages.markup import element, scrolled, table

__all__ = ["exports", "findings", "nothing_found", "repeat"]


def exports(found: Evidence) -> list[Any]:
  """The section about exported files: each with its check, and its latency in its own runtime."""
  if not found.exports:
    return []
  rows = []
  for one in found.exports["files"]:
    latency = one.get("latency_ms") or {}
    passed = bool(one.get("passed"))
    least = f"; needs jax {one['least_jax']} or newer" if one.get("least_jax") else ""
    other = _of_earlier_export(one, found.exports)
    told = f"{one.get('problem') or ''}" if not passed else f"passed{least}{other}"
    rows.append(
      [
        one["file"],
        one.get("runtime") or DASH,
        size(one.get("bytes")),
        _milliseconds(latency),
        percent({"mean": one.get("accuracy")}),
        percent({"mean": one.get("agreement")}),
        _scientific(one.get("largest_difference")),
        element("span", told, class_="good-text" if passed else "bad-text"),
      ]
    )
  head = [
    "file",
    "runtime",
    "size",
    "latency, ms (95th pct)",
    "accuracy, %",
    "same answer, %",
    "largest difference",
    "check",
  ]
  many, batch = found.exports.get("examples"), found.exports.get("batch_size")
  split = found.exports.get("split")
  text = "Each file was loaded in a process of its own, with its own runtime, and compared there"
  text += f" with the student on {many:,} held-out examples" if many else " with the student"
  text += f" ({split} split)" if split else ""
  text += f"; its latency is of batch {batch}." if batch else "."
  return [
    element("p", text, class_="note"),
    table(head, rows, caption="Exported files", prose=True),
  ]


def _of_earlier_export(one: Mapping[str, Any], listed: Mapping[str, Any]) -> str:
  """What was another for a file that an earlier export left than the text above the table says."""
  forms = {"batch_size": "batch {}", "examples": "{} examples", "split": "{} split"}
  other = [
    form.format(one[name])
    for name, form in forms.items()
    if one.get(name) and one[name] != listed.get(name)
  ]
  return f"; of an earlier export: {', '.join(other)}" if other else ""


def _milliseconds(latency: Mapping[str, Any]) -> str:
  median, high = latency.get("median"), latency.get("p95")
  if median is None:
    return DASH
  return f"{median:.3g}" if high is None else f"{median:.3g} ({high:.3g})"


def _scientific(value: Any) -> str:
  return DASH if value is None else f"{value:.2g}"


def findings(found: Evidence) -> list[Any]:
  """The section about the pre-flight checks; one line where they found nothing."""
  if found.findings is None:
    return []
  rows = [
    [one["check"] or "check", element("span", f"{one['message']} {one['fix']}")]
    for one in found.findings
  ]
  if not rows:
    return [element("p", nothing_found(found))]
  head = ["check", "what it found, and what to do"]
  return [table(head, rows, caption="Warnings", prose=True)]


def nothing_found(found: Evidence) -> str:
  """That the checks found nothing; a compression, which has a budget, checks twice."""
  when = " before and after the training" if found.budget else ""
  return f"Checked{when}, nothing found."


def repeat(found: Evidence) -> list[Any]:
  """The section with the commands, versions and settings that repeat the run."""
  made: list[Any] = []
  commands = [str(one) for one in found.report.get("commands") or []]
  if commands:
    made.append(element("pre", element("code", "\n".join(commands)), tabindex=0))
  where = found.report.get("environment") or {}
  if where:
    words = ", ".join(f"{key} {value}" for key, value in where.items() if value is not None)
    made.append(element("p", f"Versions and hardware: {words}.", class_="small"))
  called = {"": "of all", "teacher": "of the teacher's run"}
  called |= {"baseline": "of the run on labels alone", "student": "of the student's run"}
  for name, config in found.configs.items():
    if not config:
      continue
    rows = [
      element(
        "tr", element("th", str(key), scope="row"), element("td", element("code", _json(one)))
      )
      for key, one in config.items()
    ]
    title = f"Configuration {called.get(name, name)} ({len(rows)} settings)"
    made.append(
      element(
        "details",
        element("summary", title),
        scrolled(element("table", element("tbody", rows), class_="settings"), title),
      )
    )
  return made


def _json(value: Any) -> str:
  return json.dumps(value, ensure_ascii=False)
