"""Taps: what a module's submodules put out and sow, and whether its random streams are drawn from.

`jaxdistill.capture_nnx` uses this on modules of its own, which `jaxdistill.nnx_modules.build` made;
they are changed here.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from jaxdistill import nnx_modules
from jaxdistill.paths import Path

__all__ = ["Tap", "drawn", "find", "run", "watched"]

_WATCH = "__watch__"
_TAPPED = "__tapped__"
_CAPTURES = "__captures__"  # where nnx.capture keeps its values while it runs


class Tap(NamedTuple):
  """A module to capture from.

  Attributes:
    path: under which its values are kept.
    module: the module, one of our own.
    methods: those whose output is captured; None where only what it sows is meant.
  """

  path: tuple[str, ...]
  module: nnx.Module
  methods: frozenset[str] | None


@dataclasses.dataclass(eq=False)
class _Watch:
  """Rides on a module or a stream, as a static attribute, into whatever transform runs it."""

  methods: frozenset[str] = frozenset()
  called: set[str] = dataclasses.field(default_factory=set)


class _Stream(nnx.RngStream):
  """A stream that notes when it is drawn from."""

  def __call__(self) -> jax.Array:
    if hasattr(self, _WATCH):
      watch = getattr(self, _WATCH)
      watch.called.update(watch.methods)
    return super().__call__()


def drawn(nodes: Mapping[str, Any]) -> set[str]:
  """Watches the random streams of modules of our own.

  Args:
    nodes: the modules, and ``nnx.Rngs``, by the name to put before their streams'.

  Returns:
    A set that will hold the paths of the streams that somebody draws from.

  >>> rngs = nnx.Rngs(0)
  >>> names = drawn({"rngs": rngs})
  >>> _ = rngs.params()
  >>> names
  {'rngs/default'}
  """
  found: set[str] = set()
  for path, stream in nnx.iter_graph(dict(nodes)):
    if isinstance(stream, nnx.RngStream):
      stream.__class__ = _Stream
      name = "/".join(str(part) for part in path if part != "")
      setattr(stream, _WATCH, _Watch(frozenset({name}), found))
  return found


def find(wanted: Iterable[Path], module: nnx.Module) -> list[Tap]:
  """Where paths lead in a module: to a submodule, or to a name that one may sow.

  Args:
    wanted: the paths.
    module: a module of our own.

  Returns:
    A tap for each path that leads anywhere.

  >>> model = nnx.Sequential(nnx.Linear(5, 4, rngs=nnx.Rngs(0)))
  >>> [(tap.path, tap.methods) for tap in find([Path("layers/0"), Path("layers/9/x")], model)]
  [(('layers', '0'), frozenset({'__call__'}))]
  """
  found = []
  for path in wanted:
    parts = tuple(path.path.split("/"))
    node: Any = module
    last, used = module, 0
    for i, part in enumerate(parts):
      node = _child(node, part)
      if isinstance(node, nnx.Module):
        last, used = node, i + 1
    if used >= len(parts) - 1:
      methods = frozenset({path.method}) if used == len(parts) else None
      found.append(Tap(parts[:used], last, methods))
  return found


def _child(node: Any, part: str) -> Any:
  if isinstance(node, nnx.List | list | tuple):
    return node[int(part)] if part.isdigit() and int(part) < len(node) else None
  if isinstance(node, Mapping) and not isinstance(node, nnx.Module):
    return next((child for name, child in node.items() if str(name) == part), None)
  return vars(node).get(part) if isinstance(node, nnx.Pytree) else None


def watched(tap: Tap) -> set[str]:
  """The methods of a tapped module that were called.

  Args:
    tap: one that `run` was given.

  Returns:
    Their names; none where ``tap.methods`` was None.
  """
  return getattr(tap.module, _WATCH, _Watch()).called


def run(module: nnx.Module, method: Callable[[], Any], found: Sequence[Tap]) -> tuple[Any, Any]:
  """Runs a module of our own and captures at the taps; elsewhere, what is sown is dropped.

  ``nnx.capture(..., method_outputs=)`` is not used: it rewrites the classes of all modules while it
  runs, for every thread, breaks their static methods, and overlooks the methods that they inherit.
  So a tapped module is given a class of its own, whose methods sow what they return.

  Args:
    module: the module.
    method: calls it.
    found: where to capture.

  Returns:
    ``(what the method returned, captured values)``, the latter in nested dicts by path and name.
  """
  for _, node in nnx.iter_graph(module):
    if isinstance(node, nnx.Dict | nnx.bridge.ToNNX):
      node.__class__ = _watched(type(node))
  for tap in found:
    if tap.methods is not None:
      others = getattr(tap.module, _WATCH, _Watch()).methods
      tap.module.__class__ = _watched(type(tap.module))
      setattr(tap.module, _WATCH, _Watch(others | tap.methods))
  tapped = {id(tap.module): tap.module for tap in found}
  nodes: Any = tuple(tapped.values())
  where = {id(node): path for path, node in nnx.iter_modules(nodes)}

  def inner(nodes: Any) -> Any:
    # What nnx.capture prepared below the taps is undone: a branch that sows there may not.
    for _, node in nnx.iter_modules(nodes):
      if id(node) not in tapped and hasattr(node, _CAPTURES):
        setattr(node, _CAPTURES, nnx.data(()))
    return method()

  out, state = nnx.capture(lambda _: nnx.capture(inner, nnx.Intermediate)(nodes))(module)
  sown: dict[str, Any] = {}
  for tap in found:
    level = state
    for part in where[id(tap.module)]:
      level = level.get(part, {})
    for name, value in level.items():
      if isinstance(value, nnx.Variable):
        nnx_modules.insert(sown, (*tap.path, str(name)), value.get_value())
  return out, sown


@functools.cache
def _watched(cls: Any) -> Any:
  """A class whose methods note that they are called, and sow what they are asked for."""
  if _TAPPED in vars(cls):
    return cls

  def observed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **keywords: Any) -> Any:
      out = method(self, *args, **keywords)
      watch = getattr(self, _WATCH, None)
      if watch is not None:
        watch.called.add(name)
        if name in watch.methods:
          self.sow(nnx.Intermediate, name, out)
      return out

    return call

  inherited = set(dir(nnx.Module)) - {"__call__"}
  namespace: dict[str, Any] = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
  for name in set(dir(cls)) - inherited:
    static = inspect.getattr_static(cls, name)
    bound = callable(static) and hasattr(static, "__get__")
    bound = bound and not isinstance(static, type | staticmethod | classmethod)
    if bound and (name == "__call__" or not name.startswith("_")):
      namespace[name] = observed(name, getattr(cls, name))
  # Their names are their attributes, and what is captured is kept in one.
  ours = (_CAPTURES, _WATCH)
  if issubclass(cls, nnx.Dict):
    namespace["__iter__"] = lambda self: (n for n in cls.__iter__(self) if n not in ours)
  if issubclass(cls, nnx.bridge.ToNNX):

    def alone(self: Any, *args: Any, **keywords: Any) -> Any:
      held = {name: vars(self).pop(name) for name in ours if name in vars(self)}
      try:
        return cls.__call__(self, *args, **keywords)
      finally:
        vars(self).update(held)

    namespace["__call__"] = observed("__call__", functools.wraps(cls.__call__)(alone))
  namespace[_TAPPED] = True
  return type(cls)(cls.__name__, (cls,), namespace)
