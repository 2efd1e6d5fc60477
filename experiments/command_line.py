"""What the experiments' command lines have in common."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from jaxdistill import _extras, runs, train

__all__ = ["first", "parse"]

# Of the extra `experiments`, what there is no doing without.
_NEEDED = ("tyro", "tensorflow_datasets", "sklearn", "matplotlib", "scipy", "safetensors")
Config = TypeVar("Config")
Options = TypeVar("Options")


@dataclasses.dataclass(frozen=True)
class Processes:
  """Several processes, on one host or on many; each runs this script with the same settings."""

  distributed: bool = False
  """One of several: they are found by SLURM, Open MPI, Kubernetes or Cloud TPU, or told here."""
  coordinator: str | None = None
  """host:port of process 0; told where nothing finds it."""
  processes: int | None = None
  """How many there are; likewise."""
  process: int | None = None
  """Which one this is, from 0 on; likewise."""

  def begin(self, *, sweeps: bool) -> None:
    """Makes this process one of them, before anything else of JAX is used."""
    told = (self.coordinator, self.processes, self.process)
    if not self.distributed and told == (None, None, None):
      return
    if sweeps:
      sys.exit(
        "--distributed: this experiment sweeps over many students, which share the devices of one "
        "process; start it in one, on a host with several devices."
      )
    try:
      train.distributed(*told)
    except (TypeError, ValueError, RuntimeError) as error:
      sys.exit(f"--distributed: {error}")


def first(work: Callable[..., Any], *args: Any) -> None:
  """Does in process 0 what one process does, a report for example; the others wait for its end."""
  runs.Together().first(lambda: work(*args))


def parse(
  args: Sequence[str],
  config: Config,
  options: Options,
  about: str | None,
  *,
  sweeps: bool = False,
) -> tuple[Config, Options]:
  """Reads a command line into two dataclasses, whose docstrings head their options in the help.

  And keeps what is compiled in the user's cache folder, unless ``--no-keep-compiled`` is said: a
  script that is started again compiles nothing anew. With ``--distributed`` the process is one of
  several from here on.

  Args:
    args: the words.
    config: what defines a run, as it is where nothing is said.
    options: how a run is carried out, likewise.
    about: the script's docstring; the help begins with its first line.
    sweeps: whether it trains many students at once, which one process does.

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
      ("processes", Processes, Processes()),
      ("keep_compiled", bool, True),
    ],
  )
  said = tyro.cli(
    both,
    args=args,
    config=(tyro.conf.OmitArgPrefixes,),
    description=(about or "").partition("\n")[0],
  )
  said.processes.begin(sweeps=sweeps)
  if said.keep_compiled:
    runs.keep_compiled()
  return said.config, said.execution
