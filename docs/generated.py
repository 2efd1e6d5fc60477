"""The command line of the scripts that write a page of this folder."""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Callable, Sequence

__all__ = ["write_or_check"]


def write_or_check(
  path: pathlib.Path,
  page: Callable[[], str],
  command: str,
  about: str,
  arguments: Sequence[str] | None,
) -> int:
  """Writes a page, or with ``--check`` checks that it is what would be written.

  Args:
    path: the page's.
    page: makes its text.
    command: what writes it, for whoever finds it stale.
    about: what is written, of what.
    arguments: of the command line; None takes the process's own.

  Returns:
    The exit status: 1 where ``--check`` finds another page than would be written.
  """
  parser = argparse.ArgumentParser(description=about)
  parser.add_argument("--check", action="store_true", help="write nothing, fail if it is stale")
  check = parser.parse_args(arguments).check
  wanted = page()
  present = path.read_text("utf-8") if path.exists() else ""
  if check and present != wanted:
    print(f"docs/{path.name} is stale: run `{command}`.", file=sys.stderr)
    return 1
  if not check:
    path.write_text(wanted, "utf-8")
  return 0
