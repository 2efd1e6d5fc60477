"""Checks of single arguments, whose errors name the argument, its value and what it must be."""

from __future__ import annotations

import errno
import importlib
import inspect
import math
import operator
import os
import pathlib
import re
import sys
import traceback
from typing import Any

import jax
import numpy as np

__all__ = [
  "LabelsError",
  "VariablesError",
  "folder",
  "function",
  "is_ours",
  "number",
  "returned",
  "scheduled",
  "shapes",
  "short",
  "show",
  "switch",
  "tokens",
  "unmasked",
  "whole",
]


# So long may a name be that is put below a folder: a checkpoint's, say.
_BELOW = 128


class LabelsError(ValueError):
  """Labels are taken for what they are not."""


class VariablesError(ValueError):
  """Variables do not fit the network that they are given to, or the inputs do not."""


def show(value: Any) -> str:
  """A value as a message names it: arrays by dtype and shape, the rest cut off where it is long.

  >>> show(np.ones(3)), show("4")
  ('an array of float64 and shape (3,)', "'4'")
  """
  if hasattr(value, "shape") and hasattr(value, "dtype") and np.shape(value) != ():
    return f"an array of {value.dtype} and shape {tuple(value.shape)}"
  try:
    text = " ".join(repr(value).split())
  except Exception:  # it is nested too deeply, or its own repr fails
    return f"something of type {type(value).__name__}"
  return text if len(text) <= 100 else f"{text[:100]}... ({type(value).__name__})"


def short(error: BaseException) -> str:
  """The kind and the first line of an error, which may be a page long.

  >>> short(ValueError("one"))
  'ValueError: one'
  """
  return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"


def whole(
  name: str, value: Any, *, least: int | None = 1, most: int | None = None, instead: str = ""
) -> int:
  """An integer of a range; neither a bool nor a float, not even 4.0.

  Args:
    name: the argument's.
    value: what was given.
    least: the least that it may be; None where the caller looks at that.
    most: the most, or None.
    instead: what else may be given, for the message: ``", or None for none"``.

  Returns:
    The integer.

  Raises:
    TypeError: it is no integer.
    ValueError: it is out of range.

  >>> whole("steps", np.int64(3))
  3
  """
  within = f"at least {least}" if most is None else f"in {least} .. {most}"
  must = "an integer" if least is None else f"an integer, {within}"
  try:
    if isinstance(value, bool | np.bool_):
      raise TypeError("a bool counts nothing")
    found = operator.index(value)
  except TypeError as error:
    raise TypeError(
      f"{name}={show(value)} must be {must}{instead}; got {type(value).__name__}."
    ) from error
  if (least is not None and found < least) or (most is not None and found > most):
    raise ValueError(f"{name}={show(found)} must be {within}{instead}.")
  return found


def number(
  name: str,
  value: Any,
  *,
  least: float = -math.inf,
  most: float = math.inf,
  above: float | None = None,
) -> None:
  """A finite number or scalar array of a range; one that is traced passes unread.

  Args:
    name: the argument's.
    value: what was given.
    least: the least that it may be.
    most: the most.
    above: what it must be larger than, or None.

  Raises:
    TypeError: it is no number.
    ValueError: it is an array of several, not finite, or out of range.

  >>> number("temperature", 4.0, above=0)
  """
  if above is not None:
    wanted = "positive" if above == 0 else f"above {above:g}"
    wanted += f" and at most {most:g}" if math.isfinite(most) else ""
  elif math.isfinite(least) and math.isfinite(most):
    wanted = f"in [{least:g}, {most:g}]"
  else:
    wanted = f"at least {least:g}" if math.isfinite(least) else "finite"
  if isinstance(value, bool | str | bytes) or value is None or np.shape(value) != ():
    kind = ValueError if hasattr(value, "shape") else TypeError
    raise kind(f"{name} must be {wanted}: one number, got {show(value)}.")
  if isinstance(value, jax.core.Tracer):
    return
  try:
    found = float(value)
  except OverflowError as error:
    raise ValueError(f"{name} must be {wanted} and finite, got {show(value)}.") from error
  except (TypeError, ValueError) as error:
    raise TypeError(f"{name} must be {wanted}: one number, got {show(value)}.") from error
  inside = least <= found <= most and (above is None or found > above)
  if not math.isfinite(found) and wanted != "finite":
    raise ValueError(f"{name} must be {wanted} and finite, got {found}.")
  if not inside or not math.isfinite(found):
    raise ValueError(f"{name} must be {wanted}, got {found}.")


def scheduled(
  name: str, value: Any, *, above: float | None = None, least: float = -math.inf
) -> None:
  """What `number` takes, or a schedule: a function of the step.

  >>> scheduled("soft_weight", lambda step: 0.5, least=0)
  """
  if callable(value):
    function(name, value, "step -> number", arguments=1)
  else:
    number(name, value, above=above, least=least)


def function(
  name: str,
  value: Any,
  takes: str,
  *,
  arguments: int,
  instead: str = "",
  keywords_may_lack: bool = False,
) -> None:
  """A function of so many positional arguments.

  Args:
    name: the argument's.
    value: what was given.
    takes: what it should look like: ``"variables -> {name: number}"``.
    arguments: with how many positional arguments it is called.
    instead: advice, for the message.
    keywords_may_lack: whether keywords without a default are given later.

  Raises:
    TypeError: it is none, or cannot be called so.

  >>> function("callback", print, "(step, record)", arguments=2)
  """
  advice = f" {instead}" if instead else ""
  if not callable(value):
    raise TypeError(f"{name} must be a function {takes}, got {show(value)}.{advice}")
  try:
    signature = inspect.signature(value)
    (signature.bind_partial if keywords_may_lack else signature.bind)(*[None] * arguments)
  except TypeError as error:
    raise TypeError(
      f"{name} must be a function {takes}, and {show(value)} does not take that: {error}.{advice}"
    ) from error
  except ValueError:
    pass  # builtins without a signature


def returned(option: str, given: str) -> Any:
  """What a function returns that a command line names, ``module:function``, without arguments.

  Args:
    option: the command line's: ``"--with"``.
    given: what was given. The module is found from the current folder too.

  Raises:
    ValueError: it is not written so, there is no such module or function, or it wants arguments.

  >>> returned("--with", "os:getpid") == os.getpid()
  True
  """
  module, _, name = given.partition(":")
  if not (module and name and module[0] != "."):
    raise ValueError(f"{option} {given} must be module:function, as in my_module:given.")
  sys.path.insert(0, os.getcwd())  # as `python -m` has it, and a console script has not
  try:
    make = getattr(importlib.import_module(module), name, None)
  except Exception as error:  # what is imported is the user's
    raise ValueError(
      f"{option} {given}: {short(error)}{_place(error)}. MODULE is a name as import takes it, "
      "found from the current folder; what it imports must be installed."
    ) from error
  if not callable(make):
    raise ValueError(f"{option} {given}: {module} has no function {name}.")
  try:
    inspect.signature(make).bind()
  except TypeError as error:
    raise ValueError(f"{option} {given} must take no arguments: {error}.") from error
  except ValueError:
    pass  # builtins without a signature
  try:
    return make()
  except Exception as error:
    raise ValueError(
      f"{option} {given}: {short(error)}{_place(error)}. It must run, and what it imports must be "
      "installed."
    ) from error


def _place(error: BaseException) -> str:
  """Where an error was raised, for a message that shows no frames."""
  frames = list(traceback.walk_tb(error.__traceback__))
  frame, line = frames[-1]
  return f" ({frame.f_code.co_filename}, line {line})"


def is_ours(error: BaseException) -> bool:
  """Whether an error was raised by a line of this package, and so says what to do in its message.

  >>> is_ours(ValueError("raised by nobody"))
  False
  """
  frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
  here = pathlib.Path(__file__).parent
  return bool(frames) and here in pathlib.Path(frames[-1].f_code.co_filename).parents


def switch(name: str, value: Any) -> None:
  """A bool, where a word would pass for True.

  >>> switch("scan", False)
  """
  if not isinstance(value, bool | np.bool_):
    raise TypeError(f"{name}={show(value)} must be True or False.")


def tokens(name: str, value: np.ndarray, vocabulary: int | None) -> None:
  """Integers of a vocabulary, ``[..., L]`` on the host.

  A lookup beyond an embedding's rows is no error on a device: it gives NaN, or another row.

  Args:
    name: the argument's.
    value: what was given.
    vocabulary: V, which they must lie below; None for all that int32 holds.

  Raises:
    ValueError: one is out of range; the message names its row and position.

  >>> tokens("prompts", np.array([[3, 1, 4]]), 5)
  """
  most = vocabulary or 2**31
  bad = (value < 0) | (value >= most)
  if bad.any():
    *row, position = np.argwhere(bad)[0].tolist()
    where = f"{name}{row}" if row else name
    raise ValueError(
      f"{where} has the token {value[(*row, position)]} at position {position}; tokens lie in "
      f"0 .. {most - 1}{' (vocabulary)' if vocabulary else ''}."
    )


def unmasked(name: str, value: Any) -> np.ndarray:
  """An array of NumPy's, where nothing is masked: what a mask hides would count as it stands.

  Args:
    name: the argument's.
    value: an array, or what becomes one.

  Raises:
    ValueError: a number is masked.

  >>> unmasked("weight", [1.0, 0.5]).shape
  (2,)
  """
  hidden = int(np.ma.getmaskarray(value).sum()) if isinstance(value, np.ma.MaskedArray) else 0
  if hidden:
    raise ValueError(
      f"{name} has {hidden} masked numbers, which would count as they stand: fill them, "
      ".filled(...), and say by weight= or ignore= what does not count."
    )
  return np.asarray(value)


def folder(name: str, value: Any) -> pathlib.Path:
  """An absolute path of this machine, whatever the working directory is later.

  ``~/`` in front is the user's home, as a shell has it; ``--out=~/run`` comes as it was typed.

  >>> folder("run", "runs/a").name
  'a'
  >>> folder("run", "~/a") == pathlib.Path.home() / "a"
  True
  >>> folder("run", "gs://bucket/run")
  Traceback (most recent call last):
  ValueError: run='gs://bucket/run' is an address, and runs are kept on local disks, where files \
can be verified and replaced whole: give a local folder, and copy it there when the run is over.
  """
  if not isinstance(value, str | os.PathLike) or not os.fspath(value):
    raise TypeError(f"{name}={show(value)} must be a path, such as 'runs/first'.")
  # pathlib makes "gs:/bucket" of an address, a folder "gs:" that nobody asked for.
  if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", os.fspath(value)):
    raise ValueError(
      f"{name}={os.fspath(value)!r} is an address, and runs are kept on local disks, where files "
      "can be verified and replaced whole: give a local folder, and copy it there when the run is "
      "over."
    )
  path = pathlib.Path(value)
  if "\0" in os.fspath(path):
    raise ValueError(f"{name}={os.fspath(path)!r} holds the character 0, which no path may.")
  # Left alone it would be a folder "~" in the working directory, which nobody asked for.
  whole = (path.expanduser() if path.parts[:1] == ("~",) else path).absolute()
  try:
    os.lstat(whole / ("_" * _BELOW))
  except UnicodeEncodeError as error:
    raise ValueError(
      f"{name}={os.fspath(path)!r} has a character that no file's name can have here: {error}."
    ) from error
  except OSError as error:
    if error.errno == errno.ENAMETOOLONG:
      raise ValueError(
        f"{name}={show(os.fspath(path))} is too long: a name has {max(map(len, whole.parts))} "
        f"characters and the path {len(os.fspath(whole))}, more than the disk takes. Give a "
        "shorter one."
      ) from error
  return whole


def shapes(value: Any) -> str:
  """A value's shapes, for a message.

  >>> shapes({"c": np.zeros((2, 3)), "h": np.zeros(2)})
  "{'c': (2, 3), 'h': (2,)}"
  """
  return str(jax.tree.map(lambda leaf: getattr(leaf, "shape", type(leaf).__name__), value))
