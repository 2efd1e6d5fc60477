"""What the experiments' command lines have in common."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import pathlib
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxdistill import _check, _extras, runs, train

__all__ = ["check", "first", "look_at", "parse", "run"]

# Of the extra `experiments`, what there is no doing without.
_NEEDED = ("tyro", "tensorflow_datasets", "sklearn", "matplotlib", "scipy", "safetensors")
Config = TypeVar("Config")
Options = TypeVar("Options")
# What a number may be, by the names that the settings of all experiments have in common, the first
# that matches. Any other whole number is at least 1, and any other number at least 0.
_RANGES: dict[str, dict[str, Any]] = {
  "*seed": {"least": 0, "most": 2**31 - 1},
  "*shift": {"least": 0},
  "workers": {"least": 0},
  "prefetch": {"least": 0},
  "process": {"least": 0},
  "*rate": {"above": 0},
  "temperature*": {"above": 0},
  "factors": {"above": 0},
  "stop_after": {"above": 0},
  "max_latency_ms": {"above": 0},
  "cache_limit_gb": {"above": 0},
  "gap": {"least": 0, "most": 1},
  "shares": {"least": 0, "most": 1},
  "held_out": {"above": 0, "most": 0.9},
  "teacher_dropout": {"least": 0, "most": 0.9},
  "fraction": {"least": 1, "most": 100},
}
_MOST = 2**31 - 1  # more than there is of anything that is counted
# The options that say how a run is measured; the others, and all settings, say how it is trained.
_MEASURING = {"evaluate", "split", "data_dir", "text", "workers", "prefetch"}


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


def check(settings: Any) -> None:
  """Raises for a setting that is out of range, before anything is read or trained.

  Args:
    settings: a dataclass of an experiment; numbers, texts, paths, tuples of them, and None.

  Raises:
    TypeError: one is of another kind than it must be.
    ValueError: one is out of range, not finite, or an empty list; the message names its flag.
  """
  for field in dataclasses.fields(settings):
    value, default = getattr(settings, field.name), field.default
    flag = f"--{field.name.replace('_', '-')}"
    if isinstance(default, tuple) and default and not value:
      raise ValueError(f"{flag} has no value: give at least one, or leave it out.")
    if isinstance(value, pathlib.Path) or (field.name == "data_dir" and value):
      _check_path(field.name, flag, _check.folder(flag, value))
    within = next((r for n, r in _RANGES.items() if fnmatch.fnmatch(field.name, n)), {})
    for one in value if isinstance(value, tuple | list) else (value,):
      if isinstance(one, bool) or not isinstance(one, int | float):
        continue
      if isinstance(one, float):
        _check.number(flag, one, **{"least": 0.0, **within} if "above" not in within else within)
      else:
        _check.whole(flag, one, least=within.get("least", 1), most=within.get("most", _MOST))


def _check_path(name: str, flag: str, path: pathlib.Path) -> None:
  """Whether a text is there to be read, and a folder is none of a file's name, and may be written.

  Raises:
    OSError: it is not; the message names the flag.
  """
  if name == "text" and not path.is_file():
    raise FileNotFoundError(f"{flag} {path} is no file: name one that is there.")
  there = next(one for one in (path, *path.parents) if one.exists())
  if name != "text" and not there.is_dir():
    raise NotADirectoryError(f"{flag} {path}: {there} is a file; name a folder.")
  if name == "out" and not os.access(there, os.W_OK | os.X_OK):
    raise PermissionError(f"{flag} {path}: you may not write into {there}; name another folder.")


def look_at(examples: Any, *networks: Any, batch_size: int) -> None:
  """Raises where a network does not take the examples, before the first one is trained.

  Args:
    examples: what it is trained on; pictures are seen as floats.
    *networks: the teacher, the student: they are made of shapes alone.
    batch_size: the largest that any of them is trained with.

  Raises:
    ValueError: there are fewer examples than a batch has, or a network does not take them.
  """
  _check.whole("--batch-size", batch_size, most=len(examples))

  def shown(leaf: Any) -> jax.ShapeDtypeStruct:
    is_picture = leaf.dtype == jnp.uint8
    return jax.ShapeDtypeStruct((1, *leaf.shape[1:]), jnp.float32 if is_picture else leaf.dtype)

  inputs = jax.tree.map(shown, examples.inputs)
  for network in networks:
    jax.eval_shape(network.init, jax.random.key(0), inputs)


def run(main: Callable[[Any, Any], None], parse: Callable[[list[str]], tuple[Any, Any]]) -> None:
  """Runs a script: what the library refuses is said in a line, and not under Python's frames.

  Args:
    main: takes settings and options.
    parse: reads them off the words of the command line.
  """
  try:
    main(*parse(sys.argv[1:]))
  except (OSError, TypeError, ValueError) as error:
    if not _check.is_ours(error):
      raise  # nobody's words: what went wrong is in the frames
    sys.exit(f"{type(error).__name__}: {error}")


def parse(
  args: Sequence[str],
  config: Config,
  options: Options,
  about: str | None,
  *,
  sweeps: bool = False,
  idle: Mapping[str, Sequence[str]] | None = None,
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
    idle: by data set, the settings that change nothing of it.

  Returns:
    Both, with what was said.

  Raises:
    SystemExit: a word is wrong, a number out of range, ``--evaluate`` names no run of this
      experiment or stands beside what it does not use, or a flag is none of the data set's; in a
      line.
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
  try:
    for part in (said.config, said.execution, said.processes):
      check(part)
    _check_measured(said.config, config, said.execution, options)
    vain = _said(said.config, config, (idle or {}).get(getattr(said.config, "dataset", ""), ()))
    if vain:
      raise ValueError(
        f"--dataset {said.config.dataset}: {', '.join(vain)} would change nothing of it. Leave it "
        "out, or name another data set."
      )
  except (OSError, TypeError, ValueError) as error:
    sys.exit(str(error))
  said.processes.begin(sweeps=sweeps)
  if said.keep_compiled:
    runs.keep_compiled()
  return said.config, said.execution


def _said(settings: Any, plain: Any, names: Collection[str]) -> list[str]:
  """The flags of those of these settings that are not as they are where nothing is said."""
  return [
    f"--{field.name.replace('_', '-')}"
    for field in dataclasses.fields(settings)
    if field.name in names and getattr(settings, field.name) != getattr(plain, field.name)
  ]


def _check_measured(config: Any, plain: Any, options: Any, otherwise: Any) -> None:
  """Whether ``--evaluate`` names a run of this experiment, and nothing is said beside it in vain.

  Raises:
    OSError: there is no such run.
    TypeError: its settings are of another kind.
    ValueError: it is another experiment's, or flags beside it would change nothing.
  """
  folder = getattr(options, "evaluate", None)
  if folder is None:
    return
  check(runs.restore_config(folder, type(config)))
  vain = [
    flag
    for one, other in ((config, plain), (options, otherwise))
    for flag in _said(one, other, {field.name for field in dataclasses.fields(one)} - _MEASURING)
  ]
  if vain:
    raise ValueError(
      f"--evaluate {folder} measures that run with the settings that it was trained with: "
      f"{', '.join(vain)} would change nothing. Leave it out, or train another run."
    )
