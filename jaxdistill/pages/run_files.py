"""The small files beside a report, read tolerantly: settings, exports, findings, the budget.

Nothing here raises for a file's content: what cannot be read is a sentence in ``problems``.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from jaxdistill import arguments, manifest

__all__ = ["budget", "config", "exports", "findings", "mapping", "read_json", "sound"]

EXPORTS = 1  # the version of exports.json that is known


def read_json(path: pathlib.Path, what: str, problems: list[str]) -> Any:
  """A file's JSON with None for what is no finite number; None, and a problem, if it is broken."""
  try:
    return _finite(json.loads(path.read_text(encoding="utf-8")))
  except FileNotFoundError:
    return None
  except (OSError, ValueError, RecursionError) as error:
    problems.append(f"{what} ({path.name}) cannot be read: {arguments.short(error)}")
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
    problems.append(f"{what} ({path.name}) is no mapping, but {arguments.show(found)}.")
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
      problems.append(f"exports.json has an entry that is no file: {arguments.show(entry)}.")
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
    digest = manifest.sha256(path)
  except OSError as error:
    return f"cannot be read ({arguments.short(error)})"
  listed = entry.get("bytes")
  if isinstance(listed, int) and listed != size:
    return f"has {size:,} bytes, but had {listed:,} when it was checked"
  if entry.get("sha256") not in (None, digest):
    return "is not the one that was checked: its digest is another"
  return None


def findings(run: pathlib.Path, problems: list[str]) -> list[dict[str, str]]:
  """What checks before the run found: ``check``, ``message`` and ``fix`` of each.

  Args:
    run: the run's folder; ``preflight.json`` is looked for there, and in its ``student/``.
    problems: where sentences go.
  """
  every: list[Any] = []
  for path in (run / "preflight.json", run / "student" / "preflight.json"):
    found = read_json(path, "The checks before the run", problems)
    if found is not None and not isinstance(found, list):
      problems.append("preflight.json is no list of findings.")
    every += found if isinstance(found, list) else []
  keys = ("check", "message", "fix")
  return [{key: str(one.get(key) or "") for key in keys} for one in every if isinstance(one, dict)]


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


def _number(value: Any) -> bool:
  return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _numbers(value: Any) -> bool:
  return isinstance(value, dict) and all(_number(v) or isinstance(v, str) for v in value.values())


def sound(report: dict[str, Any], problems: list[str]) -> dict[str, Any]:
  """A report as it was read, without what has not the form that it should have.

  Args:
    report: its models are mappings.
    problems: where sentences go.

  Returns:
    The report less such entries, which are then like those that are missing.
  """
  lists, texts = ("seeds", "commands"), ("dataset", "split", "varied", "verdict")
  checks: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("gain", "gap_closed", "environment"), _numbers),
    **dict.fromkeys(("fidelity", "baseline_fidelity"), _spreads),
    **dict.fromkeys(lists, lambda value: isinstance(value, list)),
    **dict.fromkeys(texts, lambda value: isinstance(value, str)),
    "examples": lambda value: isinstance(value, int),
  }
  kept = _kept(report, checks, "The report's", problems)
  of_model: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(_SPREADS, _numbers),
    **dict.fromkeys(_NUMBERS, _number),
    "latency_ms": _numbers,
    "accuracy_per_seed": lambda value: isinstance(value, list) and all(map(_number, value)),
    "description": lambda value: isinstance(value, str),
  }
  kept["models"] = {
    name: _kept(model, of_model, f"The {name}'s", problems)
    for name, model in report["models"].items()
  }
  return kept


def _spreads(value: Any) -> bool:
  return isinstance(value, dict) and all(map(_numbers, value.values()))


def _kept(
  values: Mapping[str, Any],
  checks: Mapping[str, Callable[[Any], bool]],
  whose: str,
  problems: list[str],
) -> dict[str, Any]:
  kept = {}
  for name, value in values.items():
    if value is None or name not in checks or checks[name](value):
      kept[name] = value
    else:
      problems.append(f"{whose} {name!r} is not what it should be: {arguments.show(value)}.")
  return kept
