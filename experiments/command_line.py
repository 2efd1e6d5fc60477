"""What the experiments' command lines have in common."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import TypeVar

from jaxdistill import _extras, runs

__all__ = ["parse"]

# Of the extra `experiments`, what there is no doing without.
_NEEDED = ("tyro", "tensorflow_datasets", "sklearn", "matplotlib", "scipy", "safetensors")
Config = TypeVar("Config")
Options = TypeVar("Options")


def parse(
  args: Sequence[str], config: Config, options: Options, about: str | None
) -> tuple[Config, Options]:
  """Reads a command line into two dataclasses, whose docstrings head their options in the help.

  And keeps what is compiled in the user's cache folder, unless ``--no-keep-compiled`` is said: a
  script that is started again compiles nothing anew.

  Args:
    args: the words.
    config: what defines a run, as it is where nothing is said.
    options: how a run is carried out, likewise.
    about: the script's docstring; the help begins with its first line.

  Returns:
    Both, with what was said.
  """
  try:  # now, and not where the first picture is drawn, after the training
    _extras.need(f"python {sys.argv[0]}", *_NEEDED)
  except _extras.MissingExtraError as error:
    sys.exit(str(error))
  import tyro

  # Fields have names, which a tuple's entries have not: the help has a group for each.
  both = dataclasses.make_dataclass(
    "Command",
    [
      ("config", type(config), config),
      ("execution", type(options), options),
      ("keep_compiled", bool, True),
    ],
  )
  said = tyro.cli(
    both,
    args=args,
    config=(tyro.conf.OmitArgPrefixes,),
    description=(about or "").partition("\n")[0],
  )
  if said.keep_compiled:
    runs.keep_compiled()
  return said.config, said.execution
