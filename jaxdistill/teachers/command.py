"""The command ``jaxdistill cache``: fills a teacher cache, verifies it, completes it.

``fill PATH --teacher module:function``, where ``function()`` gives ``(teacher, source)``, fills a
cache, beside any number of processes that do the same (`jaxdistill.teachers.fill`); with
``--part 3/16`` the third of sixteen parts of it.

``verify PATH`` reads every file of a cache and checks its digest, its count and its ids. It needs
no JAX, and names the files that are damaged; the exit code is then 1. ``--drop`` drops the views
that they belong to, so that the next run fills them again. ``--complete`` drops them, puts together
what several processes left, and with ``--teacher`` fills what lacks. ``--teacher`` also looks
whether the cache is that teacher's, and computes a sample of it again.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

from jaxdistill.teachers import _cache_files
from jaxdistill.teachers._cache_files import CacheError, verify_cache

__all__ = ["main"]

_TEACHER = "FUNCTION() returns (teacher, source)"
_EXAMPLES = """examples:
  jaxdistill cache verify runs/outputs
  jaxdistill cache verify runs/outputs --drop
  jaxdistill cache verify runs/outputs --teacher my_module:teacher_and_source
  jaxdistill cache verify runs/outputs --teacher my_module:teacher_and_source --complete"""
_FILLING = """examples:
  jaxdistill cache fill runs/outputs --teacher my_module:teacher_and_source
  jaxdistill cache fill runs/outputs --teacher my_module:teacher_and_source --part 3/16
  jaxdistill cache fill runs/outputs --teacher my_module:teacher_and_source \\
    --part $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT      (sbatch --array=1-16)"""


def _part(text: str) -> tuple[int, int]:
  """``3/16``, counted from 1, as (2, 16)."""
  said = re.fullmatch(r"(\d+)/(\d+)", text)
  number, of = (int(said[1]), int(said[2])) if said else (0, 0)
  if not 1 <= number <= of:
    raise argparse.ArgumentTypeError(
      f"{text!r} must be such as 3/16: parts are counted from 1, 1/{of or 16} to {of or 16}/"
      f"{of or 16}"
    )
  return number - 1, of


def _pair(given: str) -> tuple[Any, Any]:
  """The teacher and the source that a function gives."""
  from jaxdistill import _check  # JAX, which the rest does without
  from jaxdistill.data import Source
  from jaxdistill.types import Teacher

  made = _check.returned("--teacher", given)
  pair = isinstance(made, tuple) and len(made) == 2
  if not pair or not (isinstance(made[0], Teacher) and isinstance(made[1], Source)):
    raise ValueError(f"--teacher {given} must return (teacher, source), got {_check.show(made)}.")
  return made


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="jaxdistill cache", description="Fills and verifies the cache of a teacher's outputs."
  )
  commands = parser.add_subparsers(required=True, metavar="{fill,verify}", dest="command")
  raw = argparse.RawDescriptionHelpFormatter
  fill = commands.add_parser(
    "fill",
    help="fill a cache, beside any number of processes that do the same",
    description=(
      "Fills a cache, or what of it nobody else has claimed. Any number of processes may do so\n"
      "at once, on machines that share the folder; any may die, and start again."
    ),
    epilog=_FILLING,
    formatter_class=raw,
  )
  fill.add_argument("path", type=pathlib.Path, help="the cache's folder")
  fill.add_argument("--teacher", metavar="MODULE:FUNCTION", required=True, help=_TEACHER)
  fill.add_argument(
    "--part", type=_part, default=(0, 1), metavar="P/PARTS", help="one part alone, from 1 on"
  )
  fill.add_argument("--dtype", default="float32", help="of what is kept; float32 by default")
  fill.add_argument("--features", nargs="*", default=(), help="those to keep beside the logits")
  fill.add_argument("--batch-size", type=int, default=256, help="over all devices; 256 by default")
  fill.add_argument(
    "--limit-gb", type=float, default=4 * 2**30 / 1e9, help="the most it may take; 4.3 by default"
  )
  verify = commands.add_parser(
    "verify",
    help="check every digest, count and id; complete what lacks",
    description=(
      "Reads every file of a cache and checks its digest, its count and its ids; what is damaged\n"
      "is named, and the exit code is then 1. Needs no JAX without --teacher."
    ),
    epilog=_EXAMPLES,
    formatter_class=raw,
  )
  verify.add_argument("path", type=pathlib.Path, help="the cache's folder")
  verify.add_argument(
    "--teacher",
    metavar="MODULE:FUNCTION",
    help=f"also: is it this teacher's? {_TEACHER}",
  )
  verify.add_argument(
    "--drop", action="store_true", help="drop the damaged views; the next run fills them again"
  )
  verify.add_argument(
    "--complete",
    action="store_true",
    help="drop the damaged views, put together what is there, and fill the rest by --teacher",
  )
  return parser


def main(args: Sequence[str] | None = None) -> int:
  """The command; returns the exit code.

  Args:
    args: the command line's words; those of the process by default.
  """
  options = _parser().parse_args(args)
  try:
    return _fill(options) if options.command == "fill" else _verify(options)
  except (CacheError, OSError, ValueError) as error:
    print(error, file=sys.stderr)
    return 1


def _fill(options: argparse.Namespace) -> int:
  teacher, source = _pair(options.teacher)
  from jaxdistill import _check
  from jaxdistill.teachers._cache import fill  # JAX, which the rest does without

  _check.number("--limit-gb", options.limit_gb, above=0, most=1e9)
  made = fill(
    teacher,
    source,
    options.path,
    part=options.part,
    dtype=options.dtype,
    features=tuple(options.features),
    limit=round(1e9 * options.limit_gb),
    batch_size=options.batch_size,
  )
  dead = f", {made.taken_over} of them left by a process that died" if made.taken_over else ""
  rest = f"{made.lacking:,} examples lack, which others fill" if made.lacking else "it is complete"
  print(f"{options.path}: filled {made.shards} files{dead}; {rest}")
  return 0


def _verify(options: argparse.Namespace) -> int:
  pair = _pair(options.teacher) if options.teacher else None  # before every digest is computed
  problems = verify_cache(options.path)
  for problem, views in problems.items():
    print(f"views {views}: {problem}" if len(views) > 1 else problem, file=sys.stderr)
  if problems and (options.drop or options.complete):
    views = sorted({view for views in problems.values() for view in views})
    _cache_files.forget(options.path, views)
    print(f"dropped views {views}; the next run fills them again", file=sys.stderr)
  if problems and not options.complete:
    return 1
  lacks = options.complete and not _completed(options.path, pair)
  manifest = _cache_files.read_manifest(options.path)
  shards = [shard for found in manifest["views"].values() for shard in found]
  size = manifest["data"]["size"]
  whole = len(manifest["views"]) * size
  begun = manifest["view_count"] * size - _cache_files.lacking(options.path, manifest) - whole
  print(
    f"{options.path}: {len(manifest['views'])} of {manifest['view_count']} views of "
    f"{size} examples of {manifest['data']['name']!r} as {manifest['dtype']}, "
    f"{len(shards)} shards, {sum(shard['bytes'] for shard in shards) / 1e6:.1f} MB"
    + (f", and {begun:,} examples of other views" if begun else "")
    + "; every digest and count is right"
  )
  if pair is None:
    return int(lacks)
  from jaxdistill.teachers._cache import compare_cache  # JAX, which the rest does without

  different = compare_cache(*pair, options.path)
  for line in different:
    print(line, file=sys.stderr)
  if not different:
    print(f"{options.teacher}: the same teacher, and a sample comes out the same")
  return int(bool(different) or lacks)


def _completed(folder: pathlib.Path, given: Any) -> bool:
  """Puts together what is there and fills what lacks, and says so; whether all is there then."""
  put = _cache_files.publish(folder)
  if put:
    print(f"{folder}: put together views {put}, of which all files were there")
  manifest = _cache_files.read_manifest(folder)
  lacking = _cache_files.lacking(folder, manifest)
  if lacking and given is not None:
    from jaxdistill.teachers._cache import fill_as_it_is  # JAX

    teacher, source = given
    made = fill_as_it_is(teacher, source, folder)
    print(f"{folder}: filled {made.shards} files that lacked, {made.taken_over} left by the dead")
    lacking = made.lacking
  if lacking:
    print(
      f"{folder}: {lacking:,} examples lack, of all views: "
      + ("others are at them" if given else "say --teacher, and they are filled"),
      file=sys.stderr,
    )
  return not lacking
