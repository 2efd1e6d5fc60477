"""Doors that import what is behind them when it is asked for (PEP 562)."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["lazy"]


def lazy(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
  """What looks up a package's public names, each when it is first asked for.

  The names stand once, in the package itself: as imports under ``if TYPE_CHECKING:``, where readers
  and type checkers look for them. They are read from there, so that no second list can differ.

  Args:
    package: ``__name__`` of the package.

  Returns:
    Its ``__getattr__`` and ``__dir__``.
  """
  module = sys.modules[package]
  assert module.__spec__ is not None
  source = module.__spec__.loader.get_source(package)  # type: ignore[union-attr]
  homes: dict[str, tuple[str, str]] = {}
  for block in ast.parse(source).body:
    if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
      for line in block.body:
        if isinstance(line, ast.ImportFrom) and line.module:
          homes |= {n.asname or n.name: (line.module, n.name) for n in line.names}

  def look_up(name: str) -> Any:
    if name not in homes:
      raise AttributeError(f"module {package!r} has no attribute {name!r}")
    home, inside = homes[name]
    if home == package:  # one of its own files or rooms
      value = importlib.import_module(f"{package}.{inside}")
    else:
      value = getattr(importlib.import_module(home), inside)
    setattr(module, name, value)
    return value

  def names() -> list[str]:
    return sorted({*vars(module), *homes})

  return look_up, names
