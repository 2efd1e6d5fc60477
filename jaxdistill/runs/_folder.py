"""A run's folder: ``config.json``, ``metrics.jsonl``; and what it ran on."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
import shlex
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import jax
import numpy as np

from jaxdistill import _check
from jaxdistill._beside import beside
from jaxdistill.runs._files import parse_json, read_object, read_text, write_text, writes
from jaxdistill.runs._manifest import MANIFEST, listing
from jaxdistill.runs._traced import Traced, difference

__all__ = [
  "Metrics",
  "check_config",
  "check_place",
  "claim",
  "command",
  "commands",
  "differing",
  "environment",
  "hold",
  "other_kind",
  "read_config",
  "read_metrics",
  "release",
  "restore_config",
  "to_json",
  "write_json",
]

_METRICS, _LOCK = "metrics.jsonl", "lock"
# What a run computes, for whoever wants to know in what another differs; its digests are in
# ``config.json`` under the other name.
_OPERATIONS, _TRACED = "operations.json", "traced"
# What a folder of each kind is known by: some of the settings in its ``config.json``.
_KINDS = {
  "run": {"data_seed", "accumulate", "average", "student"},
  "sweep": {"points", "seeds", "retrain"},
  "study": {"space", "seeds", "retrain"},
  "search within a budget": {"candidates", "budget", "gap"},
  "network of export.save_folder": {"library_name", "outputs"},
  "pretrained model": {"architectures"},
}
# And by a file, where there is no ``config.json``.
_MARKS = {
  "report.json": "report of a run that is gone",
  "study.log": "study's journal",
  "exports.json": "run's exports",
  "generation1/config.json": "series of generations",
}
# What lies in the folder of one of these too: a report of a run, its deployed student.
_PARTS = {"report", "deployed student"}
_WHOLES = {"run", "sweep", "study", "search within a budget", *_MARKS.values()} - {"run's exports"}
# Folders below that are the kind's own.
_OWN: dict[str, tuple[str, ...]] = {
  **dict.fromkeys(("run", "sweep", "study"), ("checkpoints", "student")),
  "deployed student": ("student",),
}
_BELOW = {"checkpoints": "checkpoints", "student": "deployed student"}
_TOUCHED = 4  # seconds after which a lock's file is touched again


def to_json(value: Any) -> Any:
  """Turns arrays, paths and numbers that JSON does not know into ones that it does.

  NaN and infinity become None: JSON has neither. A set is sorted, and a function or object is told
  without its address, so that the same value is the same text in every process.

  Raises:
    ValueError: it holds itself, is nested too deeply, or has two keys that are one in JSON.

  >>> to_json({"a": np.array([1.0, np.nan]), "b": pathlib.PurePosixPath("x"), "c": range(2)})
  {'a': [1.0, None], 'b': 'x', 'c': [0, 1]}
  """
  try:
    return _to_json(value)
  except RecursionError as error:
    raise ValueError("a value for JSON holds itself, or is nested too deeply.") from error


def _to_json(value: Any) -> Any:
  if isinstance(value, Mapping):
    found = {str(k): _to_json(v) for k, v in value.items()}
    if len(found) < len(value):
      raise ValueError(
        f"{_check.show(dict(value))} has two keys that are one in JSON, where keys are texts."
      )
    return found
  if isinstance(value, list | tuple | range):
    return [_to_json(v) for v in value]
  if isinstance(value, set | frozenset):  # in whose order each process has its own
    return sorted((_to_json(v) for v in value), key=repr)
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if value is None or isinstance(value, bool | int | str):
    return value
  if hasattr(value, "tolist"):  # NumPy and JAX arrays and scalars
    return _to_json(np.asarray(value).tolist())
  return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def check_config(config: Any) -> dict[str, Any]:
  """What defines a run, as its folder keeps it.

  Args:
    config: a mapping of settings, of anything that `to_json` takes.

  Raises:
    TypeError: it is no mapping.
    ValueError: JSON cannot hold it.

  >>> check_config({"rate": np.float32(0.5)})
  {'rate': 0.5}
  """
  if not isinstance(config, Mapping):
    raise TypeError(f"config must be a mapping of settings, got {_check.show(config)}.")
  try:
    found: dict[str, Any] = to_json(config)
  except ValueError as error:
    raise ValueError(f"config cannot be kept as JSON: {error}") from error
  return found


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes JSON so that the file is never seen half written."""
  write_text(path, json.dumps(to_json(value), indent=2, ensure_ascii=False) + "\n")


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
  """Reads a run's configuration.

  Raises:
    FileNotFoundError: the folder holds no run.
    ValueError: its ``config.json`` is damaged.
  """
  path = _check.folder("folder", folder) / "config.json"
  if not path.is_file():
    raise FileNotFoundError(f"{os.fspath(folder)!r} is not a run's folder: it has no config.json.")
  return read_object(path)


def restore_config(folder: str | os.PathLike[str], kind: type[Any]) -> Any:
  """Reads a run's configuration back into the dataclass that it was written from.

  Args:
    folder: the run's folder.
    kind: the dataclass; entries that are no fields of it are left out.

  Returns:
    An instance of ``kind``.

  Raises:
    FileNotFoundError: the folder holds no run.
    ValueError: the configuration lacks a field.
  """
  saved = read_config(folder)
  if not dataclasses.is_dataclass(kind):
    raise TypeError(f"kind={_check.show(kind)} must be a dataclass.")
  names = [field.name for field in dataclasses.fields(kind)]
  missing = [name for name in names if name not in saved]
  if missing:
    raise ValueError(
      f"{os.fspath(folder)!r} is a run of another experiment: its config.json has no {missing}."
    )
  # JSON has lists where the dataclass has tuples.
  values = {n: tuple(saved[n]) if isinstance(saved[n], list) else saved[n] for n in names}
  return kind(**values)


def command(script: str, config: Any = None, **options: Any) -> str:
  """The command that repeats a run: the settings that differ from the dataclass's defaults.

  Args:
    script: the script's path.
    config: a dataclass of settings; None for none.
    **options: further flags; one that is None is left out.

  Returns:
    A line for a shell.

  >>> Config = dataclasses.make_dataclass("Config", [("rate", float, 0.1), ("on", bool, False)])
  >>> command("train.py", Config(rate=0.5, on=True), out="runs/a")
  'python train.py --rate 0.5 --on --out runs/a'
  """
  words = ["python", script]
  fields = [] if config is None else dataclasses.fields(config)
  settings = {
    f.name: getattr(config, f.name) for f in fields if getattr(config, f.name) != f.default
  }
  for name, value in {**settings, **options}.items():
    flag = name.replace("_", "-")
    if isinstance(value, bool):
      words.append(f"--{flag}" if value else f"--no-{flag}")
    elif value is not None:
      parts = value if isinstance(value, list | tuple) else [value]
      words += [f"--{flag}", *map(str, parts)]
  return shlex.join(words)


def commands(
  script: str, config: Any, folder: pathlib.Path, split: str, data_dir: str | None
) -> list[str]:
  """The two commands of a report: the one that repeats the run, the one that measures it again.

  Args:
    script: the experiment's path.
    config: its dataclass of settings.
    folder: the run's folder.
    split: the split that was read.
    data_dir: where the data sets are; None for the default.

  Returns:
    Two lines for a shell.
  """
  return [
    command(script, config, out=folder, data_dir=data_dir),
    command(script, evaluate=folder, split=split, data_dir=data_dir),
  ]


def claim(
  folder: str | os.PathLike[str],
  config: Mapping[str, Any],
  traced: Mapping[str, Traced] | None = None,
  *,
  shorter: Mapping[str, Any] | None = None,
) -> pathlib.Path:
  """Makes a run's folder, or goes on in one that holds the same configuration.

  Args:
    folder: the run's folder.
    config: what defines the run; anything that JSON can hold.
    traced: what the run computes, by name: their digests define it too, and their operations tell
      in what another differs.
    shorter: the configuration of the same run with fewer steps, which the folder may hold instead,
      whatever its optimiser: it is made longer.

  Returns:
    The folder.

  Raises:
    OSError: the folder is a file, or cannot be written.
    TypeError: ``folder`` is no path, or ``config`` no mapping.
    ValueError: the folder holds a run of another configuration; the message names what differs.
    UserWarning: what is computed is traced otherwise, by other versions of the libraries than the
      run began with; whether it is the same, nobody can tell.
  """
  folder, wanted = _check.folder("folder", folder), check_config(config)
  besides = None if (folder / "config.json").exists() else other_kind(folder, "run")
  if besides is not None:
    raise FileExistsError(f"folder={os.fspath(folder)!r} holds a {besides}; name another.")
  traced = {} if traced is None else traced
  digests = {name: one.digest for name, one in traced.items()}
  longer = False
  if (folder / "config.json").exists():
    there = read_config(folder)
    known = there.pop(_TRACED, None)
    longer = shorter is not None and not differing(there, to_json(shorter))
    lines = [] if longer else differing(there, wanted)
    known = known if isinstance(known, dict) else {}
    other = [name for name in digests if known.get(name) != digests[name]]
    if longer:
      other = [name for name in other if name != "optimizer"]
    if other and not lines:  # another setting says it in fewer words
      lines = _traced_otherwise(folder, other, traced)
    if lines:
      raise ValueError(
        f"{folder} holds a run of another configuration ({'; '.join(lines)}). Take another folder, "
        "or the same settings to go on with that run."
      )
    if not longer:
      return folder
  _make(folder)
  if traced:  # first: what has a config.json is claimed
    listed = {name: one.operations for name, one in traced.items()}
    write_json(folder / _OPERATIONS, {"versions": _versions(), **listed})
  write_json(folder / "config.json", wanted | ({_TRACED: digests} if digests else {}))
  return folder


def check_place(folder: str | os.PathLike[str], kind: str, *, name: str = "folder") -> None:
  """Raises, before anything is traced, where something else lies in a folder, or none can be made.

  What a run of the same kind has there is `claim`'s to compare.

  Args:
    folder: where something is to be kept.
    kind: what: ``"run"``, ``"sweep"``, ``"study"``, ``"search within a budget"``, ``"series of
      generations"``, ``"cache"``, ``"saved variables"``, ``"checkpoints"``, ``"network of
      export.save_folder"``, ``"pretrained model"``; or what lies in a run's or a search's folder
      too, ``"report"``, ``"deployed student"``.
    name: the argument's.

  Raises:
    FileExistsError: it is another kind's, or a link to nothing.
    OSError: it is a file, or lies below one, or you may not write there.
  """
  place = _check.folder(name, folder)
  there = next(one for one in (place, *place.parents) if os.path.lexists(one))
  if os.path.islink(there) and not os.path.exists(there):
    raise FileExistsError(
      f"{name}={os.fspath(place)!r}: {there} is a link to {os.readlink(there)!r}, which is not "
      "there. Remove it, or make what it leads to."
    )
  if there == place and not place.is_dir():
    raise NotADirectoryError(
      f"{name}={os.fspath(place)!r} is a file; name a folder for the {kind}."
    )
  if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
    with writes(place):
      raise OSError(errno.EACCES if there.is_dir() else errno.ENOTDIR, "")
  if there != place:
    return
  other = other_kind(place, kind)
  if other is not None:
    raise FileExistsError(
      f"{name}={os.fspath(place)!r} holds a {other}: a {kind} needs a folder of its own."
    )
  for taken in map(place.joinpath, _OWN.get(kind, ())):
    ours = taken.is_dir() and (taken.name == "checkpoints" or (taken / MANIFEST).is_file())
    ours = ours and other_kind(taken, _BELOW[taken.name]) is None
    if os.path.lexists(taken) and not ours:
      raise FileExistsError(f"{taken} is not a {kind}'s; move it, or take another folder.")


def other_kind(place: pathlib.Path, kind: str) -> str | None:
  """What else than this kind a folder holds, if it is one of ours; see `check_place`."""
  if (place / "config.json").is_file():
    try:
      settings = set(read_object(place / "config.json"))
    except (OSError, ValueError):
      return None  # whoever reads it says how it is damaged
    if _KINDS.get(kind, {kind}) <= settings:  # settings of a user's may be called as another kind's
      return None
    found = next((other for other, known in _KINDS.items() if known <= settings), None)
  else:
    found = next((what for name, what in _MARKS.items() if (place / name).is_file()), None)
    found = found or _saved_in(place, kind)
  return None if found == kind or (kind in _PARTS and found in _WHOLES) else found


def _saved_in(place: pathlib.Path, kind: str) -> str | None:
  """What was saved as a folder with a manifest, or with a folder like that for each step."""
  if not (place / MANIFEST).is_file():
    steps = any(p.name.isdigit() and (p / MANIFEST).is_file() for p in listing(place))
    return "checkpoints" if steps else None
  try:
    body = read_object(place / MANIFEST)
  except (OSError, ValueError):  # the kind's own reader says how it is damaged
    return None if kind in ("cache", "saved variables", *_PARTS) else "damaged manifest"
  if "items" in body:
    return "saved variables" if body.get("step") is None else "checkpoint of a run"
  return "cache" if "views" in body else "deployed student" if "kind" in body else "manifest"


def differing(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
  """In which settings two configurations differ, down to the innermost, in words.

  Args:
    there: the one that was found, as JSON holds it.
    now: the one that is asked for.

  >>> differing({"steps": 10, "seed": 0}, {"steps": 20, "seed": 0})
  ['steps: 10 there, 20 now']
  """
  lines = []
  for name in sorted({*there, *now}):
    one, other = there.get(name), now.get(name)
    if isinstance(one, dict) and isinstance(other, dict):
      lines += [f"{name}.{line}" for line in differing(one, other)]
    elif one != other:
      lines.append(f"{name}: {_check.show(one)} there, {_check.show(other)} now")
  return lines


def _traced_otherwise(
  folder: pathlib.Path, names: Sequence[str], traced: Mapping[str, Traced]
) -> list[str]:
  """How what is computed differs from what the folder's run computes, in words."""
  try:
    there = read_object(folder / _OPERATIONS)
    versions = {name: there["versions"].get(name) for name in _versions()}
    found = [difference(there[name], traced[name].operations) for name in names]
  except (OSError, LookupError, AttributeError, TypeError, ValueError):  # it says no more
    return [f"{name}: it computes something else" for name in names]
  if versions == _versions():
    return [f"{name}: {said}" for name, said in zip(names, found, strict=True)]
  warnings.warn(
    f"The run in {folder} was begun with {versions}, and this is {_versions()}: they trace "
    f"{' and '.join(names)} otherwise, so that nobody can tell whether it is the same. It goes on.",
    stacklevel=5,
  )
  return []


def _versions() -> dict[str, str | None]:
  """Of what traces a run's functions."""
  return {"jax": jax.__version__, **{name: _version(name) for name in ("flax", "optax")}}


def _make(folder: pathlib.Path) -> None:
  if folder.exists() and not folder.is_dir():
    raise NotADirectoryError(f"folder={os.fspath(folder)!r} is a file; name a folder for the run.")
  with writes(folder):
    folder.mkdir(parents=True, exist_ok=True)


def release(folder: pathlib.Path) -> None:
  """Gives back a folder whose run failed before its first checkpoint: there is nothing to go on.

  Without its ``config.json`` the corrected run can have it, whatever is changed. A folder with a
  checkpoint stays as it is.
  """
  if not any(folder.rglob("checkpoints/*/manifest.json")):
    for name in ("config.json", _OPERATIONS):
      (folder / name).unlink(missing_ok=True)


@contextlib.contextmanager
def hold(folder: pathlib.Path) -> Iterator[None]:
  """Holds a run's folder for this process: of two jobs in one, the second is refused.

  The system takes its lock back from a process that is killed; the file names who has it. On file
  systems whose locks do not reach other machines, one is at work there whose file is touched.

  Args:
    folder: the run's folder; made where there is none. One that is empty at the end is removed.

  Raises:
    FileExistsError: another process is at work in it; names that.
    OSError: it cannot be written.
  """
  _make(folder)
  path = folder / _LOCK
  with contextlib.ExitStack() as stack:
    with writes(path):
      file = stack.enter_context(_locked(path))
    here = {"host": platform.node(), "process": os.getpid(), "since": time.strftime("%F %T")}
    with writes(path):
      file.truncate(0)
      file.write(json.dumps(here))
      file.flush()
    stack.enter_context(beside(functools.partial(_touch, path)))
    yield


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[IO[str]]:
  """The file of a lock that this process has."""
  with path.open("a+", encoding="utf-8") as file:
    free: bool | None = True
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      # Who had it may have removed it since it was opened here: another one may have a new one.
      free = path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except BlockingIOError:
      free = False
    except OSError:  # a file system that has no locks
      free = None
    holder = _holder(path)
    mine = holder.get("host") == platform.node()
    # What forked from a process that was killed holds the lock on, and does no work of ours.
    alive = _is_process(holder.get("process")) if mine else bool(holder) and _is_touched(path)
    if (alive and not (free and mine)) or (free is False and not holder):
      raise FileExistsError(
        f"{path.parent} is another job's: process {holder.get('process', '?')} on "
        f"{holder.get('host', '?')} has been at work in it since {holder.get('since', '?')}. Wait "
        f"for its end, or name another folder; if it is gone, remove {path}."
      )
    try:
      yield file
    finally:
      with contextlib.suppress(OSError):
        path.unlink()
        path.parent.rmdir()  # if there is nothing else in it


def _holder(path: pathlib.Path) -> dict[str, Any]:
  """Who holds a lock; nobody, where nothing is said."""
  with contextlib.suppress(OSError, ValueError):
    return read_object(path)
  return {}


def _is_process(number: Any) -> bool:
  """Whether there is such a process on this machine."""
  try:
    os.kill(int(number), 0)
  except (ProcessLookupError, TypeError, ValueError, OverflowError):
    return False
  except PermissionError:
    pass  # somebody else's
  return True


def _is_touched(path: pathlib.Path) -> bool:
  """Whether somebody on another machine touches a file; their clock need not be ours."""
  seen = set()
  for _ in range(1 + 4 * _TOUCHED):
    with path.open("rb"):  # by which a network file system looks anew
      seen.add(path.stat().st_mtime_ns)
    if len(seen) > 1:
      return True
    time.sleep(1)
  return False


def _touch(path: pathlib.Path, ended: threading.Event) -> None:
  while not ended.wait(_TOUCHED):
    with contextlib.suppress(OSError):
      os.utime(path)


class Metrics:
  """Appends to ``metrics.jsonl``, each step once."""

  def __init__(self, folder: pathlib.Path | None, *, resumed_from: int = 0) -> None:
    """Opens the file and drops what a killed run wrote after its last checkpoint.

    Args:
      folder: the run's folder; None keeps the history in memory alone.
      resumed_from: the step of the checkpoint that the run goes on from.
    """
    self.history: list[dict[str, Any]] = []
    self._path = None if folder is None else folder / _METRICS
    if folder is not None and self._path is not None and os.path.lexists(self._path):
      self.history = [r for r in read_metrics(folder)[0] if r["step"] <= resumed_from]
      write_text(self._path, "".join(json.dumps(r) + "\n" for r in self.history))

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Writes one line; a value may have a leading axis over seeds."""
    record = {"step": step, **to_json(values)}
    self.history.append(record)
    if self._path is not None:
      with writes(self._path), self._path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read_metrics(folder: pathlib.Path) -> tuple[list[dict[str, Any]], int]:
  """Reads the lines of a run's ``metrics.jsonl``; a kill can leave the last one torn.

  Args:
    folder: the run's folder.

  Returns:
    ``(lines, torn)``: the lines that are whole, each with its ``step``; and how many are not.

  Raises:
    OSError: there is no such file, or it cannot be read.
  """
  lines, torn = [], 0
  for text in read_text(folder / _METRICS).splitlines():
    try:
      line = parse_json(text)
    except ValueError:
      line = None
    if isinstance(line, dict) and type(line.get("step")) is int:
      lines.append(line)
    else:
      torn += 1
  return lines, torn


def environment() -> dict[str, Any]:
  """Hardware and versions that the numbers were produced with."""
  return {
    "device": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
    "processor": _processor(),
    "cores": os.cpu_count(),
    "python": platform.python_version(),
    "jax": jax.__version__,
    "numpy": np.__version__,
    **{name: _version(name) for name in ("flax", "optax", "jaxdistill")},
  }


def _version(name: str) -> str | None:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:  # a checkout on the path
    return None


def _processor() -> str:
  """The processor's own name where the system tells it."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
  except (OSError, StopIteration):
    return platform.processor() or platform.machine()
