"""NNX modules taken apart and put together: the graph, its variables, its modes, its taps.

`jaxdistill.networks.nnx` makes networks of this. A module that the user gave is only read; whatever
is changed here is a module of our own, which `build` made. A tap (`find_taps`, `run_tapped`) keeps
what a submodule puts out and sows, and notes whether its random streams are drawn from.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from flax.traverse_util import flatten_dict

from jaxdistill.networks._features import Flag, Path
from jaxdistill.runs import is_key

__all__ = [
  "Slot",
  "Tap",
  "build",
  "drawn",
  "find_taps",
  "insert",
  "make",
  "names_of_axes",
  "run_tapped",
  "set_flags",
  "split",
  "stream_key",
  "switches",
  "updated",
  "watched",
]

PyTree = Any


class Slot(NamedTuple):
  """A variable of a module, and where its leaves are among a network's variables.

  Attributes:
    path: in the module's graph.
    variable: the ``nnx.Variable``, or an array that is none.
    places: for each leaf, its path, the collection first; none for random state.
    leaves: the values.
  """

  path: tuple[Any, ...]
  variable: Any
  places: tuple[tuple[str, ...], ...]
  leaves: list[Any]


def make(model: Any, rngs: nnx.Rngs) -> nnx.Module:
  """Calls a function ``rngs -> module``, by name where it takes ``rngs`` so.

  Args:
    model: what the user gave.
    rngs: the random streams to make the module from.

  Returns:
    The module.

  Raises:
    ValueError: ``model`` is no such function, or made no module.

  >>> make(functools.partial(nnx.Linear, 5, 4), nnx.Rngs(0)).out_features
  4
  """
  if isinstance(model, linen.Module):
    raise ValueError(f"model={type(model).__name__} is a Linen module; use networks.linen.")
  if not callable(model):
    raise ValueError(f"model={model!r} is neither an NNX module nor a function rngs -> module.")
  partial = model if isinstance(model, functools.partial) else functools.partial(model)
  # The signature of an NNX class is that of its metaclass, which takes anything.
  function: Any = partial.func
  if isinstance(function, type):
    function = functools.partial(function.__init__, None)  # type: ignore[misc]
  taken = inspect.signature(functools.partial(function, *partial.args, **partial.keywords))
  named = taken.parameters.get("rngs")
  by_name = named is not None and named.kind is named.KEYWORD_ONLY
  args, keywords = ((), {"rngs": rngs}) if by_name else ((rngs,), {})
  try:
    taken.bind(*args, **keywords)
  except TypeError as error:
    raise ValueError(
      f"model={model!r} takes {taken}, not rngs alone ({error}); give "
      "model=lambda rngs: Net(..., rngs=rngs)."
    ) from error
  module = model(*args, **keywords)
  if not isinstance(module, nnx.Module):
    raise ValueError(f"model={model!r} made a {type(module).__name__}, not an NNX module.")
  for _, node in nnx.iter_graph(module):
    for attribute, value in list(vars(node).items()) if isinstance(node, nnx.Pytree) else ():
      if isinstance(value, jax.core.Tracer):
        # Flax takes a plain array for data, but not yet while it is traced.
        setattr(node, attribute, nnx.data(value))
  return module


def split(module: Any) -> tuple[Any, list[Slot]]:
  """Takes a module apart, without changing it.

  Args:
    module: an NNX module, of values or of shapes.

  Returns:
    ``(graph, slots)``: its structure, and its variables in the order of their paths. What the
    deprecated sow outside of ``nnx.capture`` left behind is not among them.

  >>> split(nnx.Linear(5, 4, rngs=nnx.Rngs(0)))[1][0].places
  (('params', 'bias'),)
  """
  # Structure and values apart: the structure is kept once, values come with every call.
  graph, state = nnx.split(module)
  flat = nnx.to_flat_state(state)
  if any(isinstance(variable, nnx.Intermediate) for _, variable in flat):
    module = nnx.merge(graph, state)
    nnx.pop(module, nnx.Intermediate)
    return split(module)
  slots = []
  for path, variable in flat:
    # A variable may hold a tree (a cache, say), whose leaves then have places of their own.
    leaves = jax.tree_util.tree_flatten_with_path(_raw(variable))[0]
    # Random state is no variable of a network: it comes from the key of each call.
    if isinstance(variable, nnx.RngState):
      leaves = []
    base = (_collection(variable), *map(str, path))
    places = tuple(
      (*base, *(jax.tree_util.keystr((part,), simple=True) for part in inside))
      for inside, _ in leaves
    )
    slots.append(Slot(path, variable, places, [leaf for _, leaf in leaves]))
  return graph, slots


def _raw(variable: Any) -> Any:
  return variable.get_raw_value() if isinstance(variable, nnx.Variable) else variable


def _collection(variable: Any) -> str:
  for kind, name in ((nnx.Param, "params"), (nnx.BatchStat, "batch_stats")):
    if isinstance(variable, kind):
      return name
  if not isinstance(variable, nnx.Variable):
    return "arrays"
  try:
    return nnx.variable_name_from_type(type(variable))
  except ValueError:  # not registered
    return type(variable).__name__


def names_of_axes(variable: Any) -> tuple[Any, ...] | None:
  """The names that a module gives the axes of a variable; None where it gives none.

  Args:
    variable: an ``nnx.Variable``, or an array that is none.

  >>> with nnx.use_eager_sharding(False):
  ...   names_of_axes(nnx.Param(jnp.ones((2, 3)), out_sharding=("width", None)))
  ('width', None)
  """
  if not isinstance(variable, nnx.Variable):
    return None
  told = variable.get_metadata()
  # As Flax's versions have called it, the latest first.
  found = [told[n] for n in ("out_sharding", "sharding_names", "sharding") if told.get(n)]
  return tuple(found[0]) if found else None


def stream_key(key: Any, index: int) -> Any:
  """A stream's own key.

  Args:
    key: the key of the whole call, typed or not; None where nothing is to be drawn.
    index: the stream's number.

  Returns:
    A typed key.

  >>> bool(stream_key(jax.random.key(0), 0) == stream_key(jax.random.key(0), 1))
  False
  """
  if key is None:
    return jax.random.key(0)
  return jax.random.fold_in(key if is_key(key) else jax.random.wrap_key_data(key), index)


def _random(variable: Any, key: Any) -> Any:
  like = _raw(variable)
  if not is_key(like):
    return jnp.zeros(like.shape, like.dtype)
  return jax.random.split(key, like.shape) if like.shape else key


def insert(tree: dict[str, Any], place: Sequence[str], value: Any) -> None:
  """Puts a value into nested dicts, in place.

  Args:
    tree: the dicts.
    place: the names that lead there.
    value: what to put.

  >>> tree = {}
  >>> insert(tree, ("params", "kernel"), 1)
  >>> tree
  {'params': {'kernel': 1}}
  """
  for part in place[:-1]:
    if not isinstance(tree.get(part), dict):
      tree[part] = {}
    tree = tree[part]
  tree[place[-1]] = value


def build(
  graph: Any, slots: Sequence[Slot], variables: Mapping[str, PyTree], key: Any, label: str
) -> nnx.Module:
  """A module of our own, of the given variables.

  Args:
    graph: from `split`.
    slots: from `split`.
    variables: nested dicts by collection; collections that the module has not are left out.
    key: for its random streams, or None.
    label: what to call the module in messages.

  Returns:
    The module.

  Raises:
    ValueError: the variables are not those of this module.

  >>> graph, slots = split(nnx.Linear(1, 1, use_bias=False, rngs=nnx.Rngs(0)))
  >>> build(graph, slots, {"params": {"kernel": jnp.ones((1, 1))}}, None, "Linear")(jnp.ones(1))
  Array([1.], dtype=float32)
  """
  # All three kinds of mismatch are named by path, where nnx.merge would fail at the first one.
  expected = {
    place: leaf for slot in slots for place, leaf in zip(slot.places, slot.leaves, strict=True)
  }
  collections = {place[0] for place in expected}
  given = flatten_dict({n: tree for n, tree in variables.items() if n in collections})
  both = set(expected) & set(given)
  for text, wrong in (
    ("the variables lack", set(expected) - set(given)),
    ("the variables have, and the module has not,", set(given) - set(expected)),
    ("of another shape than the module's:", {p for p in both if _differ(given[p], expected[p])}),
  ):
    if wrong:
      listed = sorted("/".join(place) for place in wrong)
      raise ValueError(
        f"{label}: {text} {listed}. Give what the init of this network, or networks.nnx_variables "
        "of a module of the same architecture, returned."
      )
  state = []
  for i, slot in enumerate(slots):
    if isinstance(slot.variable, nnx.RngState):
      # By the slot's number: two layers made from one stream must not drop the same units.
      value = _random(slot.variable, stream_key(key, i))
    else:
      structure = jax.tree.structure(_raw(slot.variable))
      value = jax.tree.unflatten(structure, [given[place] for place in slot.places])
    is_variable = isinstance(slot.variable, nnx.Variable)
    state.append((slot.path, slot.variable.copy(value) if is_variable else value))
  module = nnx.merge(graph, nnx.from_flat_state(state))
  for _, node in nnx.iter_modules(module):
    # An Embed keeps the dtype that it was made in for its default, "same as embedding", so that
    # everything after one would stay in float32 (networks.mixed_precision).
    if isinstance(node, nnx.Embed) and node.dtype == node.param_dtype:
      node.dtype = node.embedding.dtype
  return module


def _differ(one: Any, other: Any) -> bool:
  return np.shape(one) != np.shape(other)


def updated(slots: Sequence[Slot], module: nnx.Module, label: str) -> dict[str, PyTree]:
  """What a module's collections beside ``params`` have become.

  Args:
    slots: those that it was built from.
    module: the module after a call.
    label: what to call the module in messages.

  Returns:
    Nested dicts by collection.

  Raises:
    ValueError: a variable has become of another structure or shape.
  """
  after = {slot.path: slot for slot in split(module)[1]}
  found: dict[str, PyTree] = {}
  for slot in slots:
    if not slot.places or slot.places[0][0] == "params":
      continue
    # A state that grows or changes shape can be no carry of a compiled loop.
    new = after.get(slot.path)
    if new is None or new.places != slot.places or any(map(_differ, new.leaves, slot.leaves)):
      raise ValueError(
        f"{label}: a call in training changes the structure or the shape of "
        f"{'/'.join(slot.places[0])}, which can't be carried from step to step."
      )
    for place, leaf in zip(new.places, new.leaves, strict=True):
      insert(found, place, leaf)
  return found


def switches(module: nnx.Module) -> list[str]:
  """Attributes of a module and its submodules that hold a bool or None, as a flag would.

  >>> switches(nnx.Dropout(0.5))
  ['deterministic', 'rngs']
  """
  nodes = [node for _, node in nnx.iter_modules(module)]
  return sorted({name for node in nodes for name in vars(node) if _switch(node, name)})


def _switch(node: Any, name: str) -> bool:
  # An attribute of such a name may be something else than a flag.
  return name in vars(node) and isinstance(vars(node)[name], bool | None)


def set_flags(module: nnx.Module, flags: Sequence[Flag], auto: bool, train: bool) -> nnx.Module:
  """Tells a module of our own whether it trains, beside what its method takes.

  Args:
    module: the module.
    flags: from `_features.find_flags`; those that are arguments are left out.
    auto: whether to use its ``train()``, ``eval()`` and ``set_view`` too.
    train: what to tell.

  Returns:
    The module to use from here on.

  >>> set_flags(nnx.Dropout(0.5), [], True, False).deterministic
  True
  """
  # From the general to the particular: Flax's own modes, then what the user's class does in
  # train() or eval(), then views, then single attributes.
  if auto:
    word = "train" if train else "eval"
    getattr(nnx.Module, word)(module)
    own = getattr(type(module), word)
    if own is not getattr(nnx.Module, word) and callable(own):
      own(module)
    views = [getattr(type(node), "set_view", None) for _, node in nnx.iter_modules(module)]
    if any(view and not view.__module__.startswith("flax.") for view in views):
      modes = dict.fromkeys(("deterministic", "use_running_average"), not train)
      module = nnx.view(module, raise_if_not_found=False, **modes)
  for flag in flags:
    for _, node in nnx.iter_modules(module):
      if not flag.argument and _switch(node, flag.name):
        setattr(node, flag.name, train != flag.inverted)
  return module


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
      # Its class is changed in place, since the module holds this very stream at several paths.
      stream.__class__ = _Stream
      name = "/".join(str(part) for part in path if part != "")
      setattr(stream, _WATCH, _Watch(frozenset({name}), found))
  return found


def find_taps(wanted: Iterable[Path], module: nnx.Module) -> list[Tap]:
  """Where paths lead in a module: to a submodule, or to a name that one may sow.

  Args:
    wanted: the paths.
    module: a module of our own.

  Returns:
    A tap for each path that leads anywhere.

  >>> model = nnx.Sequential(nnx.Linear(5, 4, rngs=nnx.Rngs(0)))
  >>> [(tap.path, tap.methods) for tap in find_taps([Path("layers/0"), Path("layers/9/x")], model)]
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
    # All of the path is a submodule, or all but the last part, which may be what it sows.
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
    tap: one that `run_tapped` was given.

  Returns:
    Their names; none where ``tap.methods`` was None.
  """
  return getattr(tap.module, _WATCH, _Watch()).called


def run_tapped(
  module: nnx.Module, method: Callable[[], Any], found: Sequence[Tap]
) -> tuple[Any, Any]:
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
  # One entry for each module, though several features may want it: a shared one runs once.
  tapped = {id(tap.module): tap.module for tap in found}
  nodes: Any = tuple(tapped.values())
  where = {id(node): path for path, node in nnx.iter_modules(nodes)}

  def inner(nodes: Any) -> Any:
    # What nnx.capture prepared below the taps is undone: a branch that sows there may not.
    for _, node in nnx.iter_modules(nodes):
      if id(node) not in tapped and hasattr(node, _CAPTURES):
        setattr(node, _CAPTURES, nnx.data(()))
    return method()

  # Two captures: the outer takes away what is sown elsewhere, the inner keeps what the taps have.
  out, state = nnx.capture(lambda _: nnx.capture(inner, nnx.Intermediate)(nodes))(module)
  sown: dict[str, Any] = {}
  for tap in found:
    level = state
    for part in where[id(tap.module)]:
      level = level.get(part, {})
    for name, value in level.items():
      if isinstance(value, nnx.Variable):
        insert(sown, (*tap.path, str(name)), value.get_value())
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

  # What every NNX module has (train, sow, ...) is machinery and no layer of the user's.
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
