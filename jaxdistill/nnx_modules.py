"""NNX modules taken apart and put together: the graph, its variables by name, its modes.

`jaxdistill.capture_nnx` makes networks of this. A module that the user gave is only read; whatever
is changed here is a module of our own, which `build` made.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from jaxdistill import paths

__all__ = [
  "Flag",
  "Slot",
  "build",
  "find_flags",
  "insert",
  "make",
  "split",
  "stream_key",
  "tell",
  "updated",
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


class Flag(NamedTuple):
  """A way to tell a module whether it trains.

  Attributes:
    name: of an argument of its method, or an attribute of it and its submodules.
    argument: which of the two.
    inverted: whether it asks the opposite.
  """

  name: str
  argument: bool
  inverted: bool


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
    raise ValueError(f"model={type(model).__name__} is a Linen module; use capture.linen.")
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
  graph, state = nnx.split(module)
  flat = nnx.to_flat_state(state)
  if any(isinstance(variable, nnx.Intermediate) for _, variable in flat):
    module = nnx.merge(graph, state)
    nnx.pop(module, nnx.Intermediate)
    return split(module)
  slots = []
  for path, variable in flat:
    leaves = jax.tree_util.tree_flatten_with_path(_raw(variable))[0]
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
  typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
  return jax.random.fold_in(key if typed else jax.random.wrap_key_data(key), index)


def _random(variable: Any, key: Any) -> Any:
  like = _raw(variable)
  if not jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
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


def _leaves(tree: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
  if not isinstance(tree, Mapping):
    yield place, tree
    return
  for name, child in tree.items():
    yield from _leaves(child, (*place, name))


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
  expected = {
    place: leaf for slot in slots for place, leaf in zip(slot.places, slot.leaves, strict=True)
  }
  collections = {place[0] for place in expected}
  given = dict(_leaves({n: tree for n, tree in variables.items() if n in collections}))
  both = set(expected) & set(given)
  for text, wrong in (
    ("the variables lack", set(expected) - set(given)),
    ("the variables have, and the module has not,", set(given) - set(expected)),
    ("of another shape than the module's:", {p for p in both if _differ(given[p], expected[p])}),
  ):
    if wrong:
      listed = sorted("/".join(place) for place in wrong)
      raise ValueError(
        f"{label}: {text} {listed}. Give what the init of this network, or capture_nnx.variables "
        "of a module of the same architecture, returned."
      )
  state = []
  for i, slot in enumerate(slots):
    if isinstance(slot.variable, nnx.RngState):
      value = _random(slot.variable, stream_key(key, i))
    else:
      structure = jax.tree.structure(_raw(slot.variable))
      value = jax.tree.unflatten(structure, [given[place] for place in slot.places])
    is_variable = isinstance(slot.variable, nnx.Variable)
    state.append((slot.path, slot.variable.copy(value) if is_variable else value))
  module = nnx.merge(graph, nnx.from_flat_state(state))
  for _, node in nnx.iter_modules(module):
    # An Embed keeps the dtype that it was made in for its default, "same as embedding", so that
    # everything after one would stay in float32 (precision.mixed).
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
    new = after.get(slot.path)
    if new is None or new.places != slot.places or any(map(_differ, new.leaves, slot.leaves)):
      raise ValueError(
        f"{label}: a call in training changes the structure or the shape of "
        f"{'/'.join(slot.places[0])}, which can't be carried from step to step."
      )
    for place, leaf in zip(new.places, new.leaves, strict=True):
      insert(found, place, leaf)
  return found


def find_flags(
  module: nnx.Module, signature: inspect.Signature, train_flag: str | None
) -> list[Flag]:
  """How a module can be told whether it trains, beside ``train()`` and ``eval()``.

  Args:
    module: the module, of values or of shapes.
    signature: of its method, with the module first.
    train_flag: ``"auto"``, a name, or None, see `jaxdistill.capture_nnx.nnx`.

  Returns:
    The flags.

  Raises:
    ValueError: there is none of that name.

  >>> find_flags(nnx.Dropout(0.5), inspect.signature(nnx.Dropout.__call__), "auto")[1]
  Flag(name='deterministic', argument=False, inverted=True)
  """
  if train_flag is None:
    return []
  taken = list(signature.parameters)[1:]
  anything = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
  nodes = [node for _, node in nnx.iter_modules(module)]
  switches = {name for node in nodes for name in vars(node) if _switch(node, name)}
  if train_flag == "auto":
    known = paths.TRAIN_FLAGS.items()
    arguments = [Flag(name, True, inverted) for name, inverted in known if name in taken]
    return arguments + [Flag(name, False, inverted) for name, inverted in known if name in switches]
  name, inverted = paths.parse_flag(train_flag)
  if name in taken or (anything and name not in switches):
    return [Flag(name, True, inverted)]
  if name in switches:
    return [Flag(name, False, inverted)]
  raise ValueError(
    f"train_flag={train_flag!r}: {type(module).__name__} has no such argument or attribute; its "
    f"method takes {taken}, the attributes of it and its submodules are {sorted(switches)}."
  )


def _switch(node: Any, name: str) -> bool:
  # An attribute of such a name may be something else than a flag.
  return name in vars(node) and isinstance(vars(node)[name], bool | None)


def tell(module: nnx.Module, flags: Sequence[Flag], auto: bool, train: bool) -> nnx.Module:
  """Tells a module of our own whether it trains, beside what its method takes.

  Args:
    module: the module.
    flags: from `find_flags`; those that are arguments are left out.
    auto: whether to use its ``train()``, ``eval()`` and ``set_view`` too.
    train: what to tell.

  Returns:
    The module to use from here on.

  >>> tell(nnx.Dropout(0.5), [], True, False).deterministic
  True
  """
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
