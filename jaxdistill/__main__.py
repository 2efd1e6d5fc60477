"""The command line: ``jaxdistill report``, ``export``, ``cache`` or ``budget``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import jaxdistill
from jaxdistill._extras import MissingExtraError

__all__ = ["COMMANDS", "main"]

# What a command is called, where its `main` is, and what it does. One is imported when it is named.
COMMANDS = {
  "report": ("jaxdistill.reports.command", "make a run's report again, or compare two runs"),
  "export": ("jaxdistill.export.command", "export a run's student, or look at its exports again"),
  "cache": (
    "jaxdistill.teachers.command",
    "fill a teacher cache, verify it, or compare it with its teacher",
  ),
  "budget": ("jaxdistill.search.command", "measure a run's student, and hold it against a budget"),
}

_HELP = """usage: jaxdistill COMMAND ...

Knowledge distillation in JAX and Flax: what is done with a finished run.

commands:
{commands}

`jaxdistill COMMAND -h` says what a command takes. Training is Python: `jaxdistill.fit`."""


def main(args: Sequence[str] | None = None) -> int:
  """Runs a command.

  Args:
    args: the command line's words; those of the process by default.

  Returns:
    The exit code: the command's, or 2 where there is no such command.
  """
  words = list(sys.argv[1:] if args is None else args)
  listed = "\n".join(f"  {name:<8}{about}" for name, (_, about) in COMMANDS.items())
  if not words or words[0] in ("-h", "--help"):
    print(_HELP.format(commands=listed))
    return 0 if words else 2
  if words[0] == "--version":
    print(f"jaxdistill {jaxdistill.__version__}")
    return 0
  if words[0] not in COMMANDS:
    print(f"There is no command {words[0]!r}. The commands are:\n{listed}", file=sys.stderr)
    return 2
  try:
    code: int = importlib.import_module(COMMANDS[words[0]][0]).main(words[1:])
  except (MissingExtraError, TypeError, ValueError) as error:
    from jaxdistill import _check  # JAX, which a command may do without

    if not _check.is_ours(error):
      raise  # a fault of the library's, or of what it calls: what went wrong is in the frames
    print(error, file=sys.stderr)
    return 1
  return code


if __name__ == "__main__":
  sys.exit(main())
