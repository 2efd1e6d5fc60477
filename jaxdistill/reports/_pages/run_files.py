"""The small files beside a report, read tolerantly: settings, exports, findings, the budget.

Nothing here raises for a file's content: what cannot be read is a sentence in ``problems``.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from jaxdistill import _check, runs

__all__ = [
  "BROKEN",
  "as_expected",
  "budget",
  "config",
  "exports",
  "mapping",
  "preflight",
  "read_json",
]

EXPORTS = 1  # the version of exports.json that is known
# What a broken or foreign file can bring about in the code that shows it.
BROKEN = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError)


def read_json(path: pathlib.Path, what: str, problems: list[str]) -> Any:
  """A file's JSON with None for what is no finite number; None, and a problem, if it is broken."""
  try:
    return _finite(json.loads(path.read_text(encoding="utf-8")))
  except FileNotFoundError:
    return None
  except (OSError, ValueError, RecursionError) as error:
    problems.append(f"{what} ({path.name}) cannot be read: {_check.short(error)}")
    return None


def _finite(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _finite(one) for key, one in value.items()}
  if isinstance(value, list):
    return [_finite(one) for one in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def mapping(path: pathlib.Path, what: str, problems: list[str]) -> dict[str, Any]:
  """A file's JSON, which should be a mapping; empty where it is not."""
  found = read_json(path, what, problems)
  if found is not None and not isinstance(found, dict):
    problems.append(f"{what} ({path.name}) is no mapping, but {_check.show(found)}.")
  return found if isinstance(found, dict) else {}


def config(run: pathlib.Path, problems: list[str]) -> dict[str, Any]:
  """A run's settings; empty where there are none."""
  return mapping(run / "config.json", f"The configuration of {run.name}", problems)


def exports(run: pathlib.Path, problems: list[str]) -> dict[str, Any] | None:
  """The list of exported files, each looked at: whether it is there, and as it was checked.

  Args:
    run: the run's folder; ``exports/`` is looked for there, and in its ``student/``.
    problems: where sentences go.

  Returns:
    The list, a file that is not as it was being one that did not pass; None where there is none.
  """
  folders = [run / "exports", run / "student" / "exports"]
  folder = next((one for one in folders if (one / "exports.json").exists()), folders[0])
  path = folder / "exports.json"
  found = read_json(path, "The list of exported files", problems)
  if found is None:
    return None
  if not isinstance(found, dict) or not isinstance(found.get("files"), list):
    problems.append("The list of exported files (exports.json) lists no files.")
    return None
  if found.get("version") != EXPORTS:
    problems.append(
      f"exports.json is of version {found.get('version')!r} and this version of jaxdistill knows "
      f"{EXPORTS}: it is shown as far as it is understood. Export again to be sure."
    )
  files = []
  for entry in found["files"]:
    if not isinstance(entry, dict):
      problems.append(f"exports.json has an entry that is no file: {_check.show(entry)}.")
      continue
    entry = {**entry, "file": str(entry.get("file") or entry.get("kind") or "?")}
    problem = _file_problem(folder, entry)
    if problem:
      problems.append(f"The exported file {entry['file']} {problem}: export again.")
      entry |= {"passed": False, "problem": f"it {problem}"}
    files.append(entry)
  return {**found, "files": files}


def _file_problem(folder: pathlib.Path, entry: Mapping[str, Any]) -> str | None:
  if not entry.get("passed"):
    return None  # it is not there, and the list says why
  name = pathlib.PurePath(entry["file"])
  if name.is_absolute() or ".." in name.parts:
    return "lies outside of the folder exports"
  path = folder / name
  try:
    if not path.is_file():
      return "is listed, but missing"
    size = path.stat().st_size
    digest = runs.sha256(path)
  except OSError as error:
    return f"cannot be read ({_check.short(error)})"
  listed = entry.get("bytes")
  if isinstance(listed, int) and listed != size:
    return f"has {size:,} bytes, but had {listed:,} when it was checked"
  if entry.get("sha256") not in (None, digest):
    return "is not the one that was checked: its digest is another"
  return None


def preflight(run: pathlib.Path, problems: list[str]) -> list[dict[str, str]] | None:
  """What the pre-flight checks found: ``check``, ``message`` and ``fix`` of each.

  Args:
    run: the run's folder; ``preflight.json`` is looked for there, and in its ``student/``.
    problems: where sentences go.

  Returns:
    The findings; none of them where all was well, and None where nothing was checked.
  """
  every: list[Any] = []
  checked = False
  for path in (run / "preflight.json", run / "student" / "preflight.json"):
    found = read_json(path, "What the pre-flight checks found", problems)
    checked |= isinstance(found, list)
    if found is not None and not isinstance(found, list):
      problems.append("preflight.json is no list of findings.")
    every += found if isinstance(found, list) else []
  keys = ("check", "message", "fix")
  rows = [{key: str(one.get(key) or "") for key in keys} for one in every if isinstance(one, dict)]
  return rows if checked else None


def budget(path: pathlib.Path, problems: list[str]) -> dict[str, dict[str, Any]]:
  """``{"limits": {name: number}, "costs": {name: number}}``, as far as there are such."""
  found = mapping(path, "The budget", problems)
  inner = next((found[k] for k in ("limits", "budget") if isinstance(found.get(k), dict)), found)
  costs = found.get("costs") if isinstance(found.get("costs"), dict) else {}

  def numbers(values: Any) -> dict[str, Any]:
    return {
      str(name): value
      for name, value in (values or {}).items()
      if isinstance(value, int | float) and not isinstance(value, bool)
    }

  return {"limits": numbers(inner), "costs": numbers(costs)} if found else {}


_SPREADS = ("accuracy", "top5", "nll", "ece", "brier")
_NUMBERS = ("parameters", "bytes", "flops", "xla_flops", "throughput", "throughput_batch")
# What report.schema.json allows to be null; and what is null where it was no finite number.
_NULL = {"gain", "baseline_fidelity", "flops", "xla_flops"}


def _number(value: Any) -> bool:
  return value is None or _known(value)


def _known(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _positive(value: Any) -> bool:
  return _known(value) and value > 0


def _whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _texts(value: Any) -> bool:
  return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _spread(value: Any) -> bool:
  return isinstance(value, dict) and _number(value.get("mean")) and _number(value.get("std"))


def _gain(value: Any) -> bool:
  error = value.get("standard_error") if isinstance(value, dict) else None
  return isinstance(value, dict) and _known(value.get("mean")) and _number(error)


def _gap(value: Any) -> bool:
  if not isinstance(value, dict) or not isinstance(value.get("note") or "", str):
    return False
  ends = [value.get("low"), value.get("high")]
  return _number(value.get("value")) and (ends == [None, None] or all(map(_known, ends)))


def _latency(value: Any) -> bool:
  return isinstance(value, dict) and all(_positive(value.get(key)) for key in ("median", "p95"))


def as_expected(report: dict[str, Any], problems: list[str]) -> dict[str, Any]:
  """A report as it was read, without what has not the form that it should have.

  Args:
    report: its models are mappings.
    problems: where sentences go.

  Returns:
    The report less such entries, which are then like those that are missing.
  """
  texts = ("dataset", "split", "varied", "verdict")
  checks: dict[str, Callable[[Any], bool]] = {
    "gain": _gain,
    "gap_closed": _gap,
    "environment": lambda value: isinstance(value, dict),
    **dict.fromkeys(("fidelity", "baseline_fidelity"), _spreads),
    "seeds": lambda value: isinstance(value, list),
    "commands": _texts,
    **dict.fromkeys(texts, lambda value: isinstance(value, str)),
    "examples": _whole,
  }
  kept = _kept(report, checks, "The report's", problems)
  of_model: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(_SPREADS, _spread),
    **dict.fromkeys(_NUMBERS, _positive),
    "latency_ms": _latency,
    "instances": _whole,
    "accuracy_per_seed": lambda value: isinstance(value, list) and all(map(_number, value)),
    "description": lambda value: isinstance(value, str),
  }
  kept["models"] = {
    name: _kept(model, of_model, f"The {name}'s", problems)
    for name, model in report["models"].items()
  }
  return kept


def _spreads(value: Any) -> bool:
  return isinstance(value, dict) and all(map(_spread, value.values()))


def _kept(
  values: Mapping[str, Any],
  checks: Mapping[str, Callable[[Any], bool]],
  whose: str,
  problems: list[str],
) -> dict[str, Any]:
  kept = {}
  for name, value in values.items():
    if name not in checks or (value is None and name in _NULL) or checks[name](value):
      kept[name] = value
    else:
      problems.append(f"{whose} {name!r} is not what it should be: {_check.show(value)}.")
  return kept
