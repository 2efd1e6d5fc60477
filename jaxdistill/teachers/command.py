"""The command ``jaxdistill cache``: verifies a teacher cache, and compares it with its teacher.

``verify PATH`` reads every file of a cache and checks its digest, its count and its ids. It needs
no JAX, and names the files that are damaged; the exit code is then 1. ``--drop`` drops the views
that they belong to, so that the next run fills them again. ``--teacher module:function``, where
``function()`` gives ``(teacher, source)``, also looks whether the cache is that
teacher's, and computes a sample of it again.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from jaxdistill.teachers import _cache_files
from jaxdistill.teachers._cache_files import CacheError, verify_cache

__all__ = ["main"]

_TEACHER = "also: is it this teacher's? FUNCTION() returns (teacher, source)"
_EXAMPLES = """examples:
  jaxdistill cache verify runs/outputs
  jaxdistill cache verify runs/outputs --drop
  jaxdistill cache verify runs/outputs --teacher my_module:teacher_and_source"""


def _pair(given: str) -> tuple[Any, Any]:
  """The teacher and the source that a function gives."""
  from jaxdistill import _check  # JAX, which the rest does without

  made = _check.returned("--teacher", given)
  if not isinstance(made, tuple) or len(made) != 2:
    raise ValueError(f"--teacher {given} must return (teacher, source), got {_check.show(made)}.")
  return made


def main(args: Sequence[str] | None = None) -> int:
  """The command; returns the exit code.

  Args:
    args: the command line's words; those of the process by default.
  """
  parser = argparse.ArgumentParser(
    prog="jaxdistill cache", description="Looks at the cache of a teacher's outputs."
  )
  commands = parser.add_subparsers(required=True, metavar="verify")
  command = commands.add_parser(
    "verify",
    help="check every digest, count and id",
    description=(
      "Reads every file of a cache and checks its digest, its count and its ids; what is damaged\n"
      "is named, and the exit code is then 1. Needs no JAX."
    ),
    epilog=_EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  command.add_argument("path", type=pathlib.Path, help="the cache's folder")
  command.add_argument("--teacher", metavar="MODULE:FUNCTION", help=_TEACHER)
  command.add_argument(
    "--drop", action="store_true", help="drop the damaged views; the next run fills them again"
  )
  options = parser.parse_args(args)
  try:
    pair = _pair(options.teacher) if options.teacher else None  # before every digest is computed
    problems = verify_cache(options.path)
    manifest = _cache_files.read_manifest(options.path)
  except (CacheError, OSError, ValueError) as error:
    print(error, file=sys.stderr)
    return 1
  for problem, views in problems.items():
    print(f"views {views}: {problem}" if len(views) > 1 else problem, file=sys.stderr)
  if problems and options.drop:
    views = sorted({view for views in problems.values() for view in views})
    _cache_files.forget(options.path, views)
    print(f"dropped views {views}; the next run fills them again", file=sys.stderr)
  if problems:
    return 1
  shards = [shard for found in manifest["views"].values() for shard in found]
  print(
    f"{options.path}: {len(manifest['views'])} of {manifest['view_count']} views of "
    f"{manifest['data']['size']} examples of {manifest['data']['name']!r} as {manifest['dtype']}, "
    f"{len(shards)} shards, {sum(shard['bytes'] for shard in shards) / 1e6:.1f} MB; every digest "
    "and count is right"
  )
  different = []
  if pair is not None:
    from jaxdistill.teachers._cache import compare_cache

    different = compare_cache(*pair, options.path)
  for line in different:
    print(line, file=sys.stderr)
  if options.teacher and not different:
    print(f"{options.teacher}: the same teacher, and a sample comes out the same")
  return 1 if different else 0
