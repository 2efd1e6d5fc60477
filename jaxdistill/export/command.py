"""The command ``jaxdistill export``: a finished run's student as files, each one checked.

``--with module:function`` names a function that gives the keywords of `jaxdistill.export.export`
(those of the command line come first). Without it nothing is exported: the files that are there are
looked at again.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdistill import _check
from jaxdistill.export._export import KINDS, Check, export, split_examples, verify_exports
from jaxdistill.export._process import ExportError

__all__ = ["main"]

_WITH = (
  "a function that returns the keywords of jaxdistill.export.export; the options here go first"
)
_KINDS = f"which of {', '.join(KINDS)}; by default all"
_EXAMPLES = """examples:
  jaxdistill export runs/mine                          are the files still what was checked?
  jaxdistill export runs/mine --with my_export:given   given() -> {"held_out": ..., ...}
  jaxdistill export runs/mine --with my_export:given --kinds onnx int8"""


def main(args: Sequence[str] | None = None) -> int:
  """The command; returns the exit code, 1 where a file failed.

  Args:
    args: the command line's words; those of the process by default.
  """
  parser = argparse.ArgumentParser(
    prog="jaxdistill export",
    description=(
      "Exports the student of a finished run, each file checked in a process of its own;\n"
      "without --with nothing is exported, and the files that are there are looked at again."
    ),
    epilog=_EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("run", type=pathlib.Path, help="the run's folder")
  parser.add_argument("--with", dest="given", metavar="MODULE:FUNCTION", help=_WITH)
  parser.add_argument("--kinds", nargs="+", choices=list(KINDS), metavar="KIND", help=_KINDS)
  parser.add_argument(
    "--fold", action="store_true", default=None, help="fold BatchNorm into the layer before it"
  )
  parser.add_argument("--batch-size", type=int, help="of the timed call; by default 1")
  options = parser.parse_args(args)
  asked = {"kinds": options.kinds, "fold": options.fold, "batch_size": options.batch_size}
  asked = {name: value for name, value in asked.items() if value is not None}
  if asked and not options.given:
    words = ", ".join(f"--{name.replace('_', '-')}" for name in asked)
    parser.error(
      f"{words} without --with MODULE:FUNCTION would do nothing: without it nothing is exported, "
      "the files that are there are looked at. Give --with, whose function returns held_out=."
    )
  try:
    if not options.given:
      found = verify_exports(options.run)
      for name, problem in found.items():
        print(
          f"{name}: {problem or 'as it was checked'}", file=sys.stderr if problem else sys.stdout
        )
      return int(any(found.values()))
    listed = export(options.run, **_keywords(options.run, options.given, asked))
  except (ExportError, OSError, ValueError) as error:
    print(error, file=sys.stderr)
    return 1
  for entry in listed["files"]:
    print(_line(entry), file=sys.stdout if entry["passed"] else sys.stderr)
  return int(not all(entry["passed"] for entry in listed["files"]))


def _keywords(folder: pathlib.Path, given: str, asked: dict[str, Any]) -> dict[str, Any]:
  """The keywords of `export`, of ``module:function`` and then of the command line."""
  made = _check.returned("--with", given)
  if not isinstance(made, Mapping):
    raise ValueError(
      f"--with {given} must return a dict of keywords of export.export, got {_check.show(made)}."
    )
  keywords = {**made, **asked}
  if "batch_size" in keywords:
    check = made.get("check", Check())
    keywords["check"] = dataclasses.replace(check, batch_size=keywords.pop("batch_size"))
  try:
    split_examples(inspect.signature(export).bind(folder, **keywords).arguments["held_out"])
  except TypeError as error:
    raise ValueError(f"--with {given} must return keywords of export.export: {error}.") from error
  return keywords


def _line(entry: dict[str, Any]) -> str:
  if not entry["passed"]:
    return f"{entry['file']}: {entry['problem']}"
  accuracy = "" if entry["accuracy"] is None else f"accuracy {entry['accuracy']:.2%}, "
  latency = f"{entry['latency_ms']['median']:.3f} ms" if entry["latency_ms"] else "not timed"
  if entry.get("remaining"):
    read = f"{entry['file']}: {entry['bytes'] / 1e3:.1f} kB, read back by {entry['runtime']}"
    return f"{read}; still to be checked: {entry['remaining']}"
  return (
    f"{entry['file']}: {entry['bytes'] / 1e3:.1f} kB, {accuracy}agrees with the student on "
    f"{entry['agreement']:.2%}, {latency} in {entry['runtime']} on {entry['platform']}"
  )
