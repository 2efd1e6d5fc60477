"""Paths to features, and what else the adapters of foreign modules share.

Which of the values that a network sowed or captured is meant: Flax keeps them in a nested dict, by
submodule and name, as tuples with one entry for each call; a submodule's output is kept under the
name of its method. `jaxdistill.networks.linen` and `jaxdistill.networks.nnx` find features there,
bind a module's arguments and find its logits, if it has any, with these functions.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxdistill._check import shapes, short
from jaxdistill.networks._int8 import Int8
from jaxdistill.types import Network, Outputs

__all__ = [
  "TRAIN_FLAGS",
  "Adapter",
  "Call",
  "Flag",
  "Hidden",
  "Path",
  "bind",
  "find",
  "find_flags",
  "inside",
  "is_array",
  "listed",
  "names",
  "parse",
  "pick",
  "put_out",
  "signature",
  "statistics",
  "untouched",
]

# The names by which published modules are told whether they train; True where they ask the
# opposite.
TRAIN_FLAGS = {
  "train": False,
  "training": False,
  "is_training": False,
  "deterministic": True,
  "use_running_average": True,
  "eval_mode": True,
  "inference": True,
}


class Call(NamedTuple):
  """One application of a network; as shapes, where it is only looked at."""

  variables: Mapping[str, Any]
  inputs: Any
  train: bool
  key: Any


class Flag(NamedTuple):
  """A way to tell a module whether it trains.

  Attributes:
    name: of an argument of its method, or an attribute of it (or of its submodules);
      ``"config.train"`` is a field of what an attribute holds.
    argument: which of the two.
    inverted: whether it asks the opposite.
  """

  name: str
  argument: bool
  inverted: bool


class Hidden(NamedTuple):
  """Why nothing can be captured at a path, for messages: "runs inside ..., Hidden in ..."."""

  runs_inside: str
  transform: str


@dataclasses.dataclass(frozen=True)
class Path:
  """Where a feature comes from, when a string does not say enough.

  Attributes:
    path: a sown name (``"mid"``, ``"encoder/mid"``) or a submodule's path (``"encoder/Dense_0"``).
    call: which of several calls, counted from 0 (-1 is the last); needed when there are several.
    element: which part of an output that is a tuple, a dict or a dataclass; a tuple of such
      indices for a nested output.
    layer: which entry of the first axis. Under ``nn.scan`` and ``nn.vmap`` the values of all layers
      come stacked along it; without ``layer`` they stay so, and the batch axis is not first.
    method: the submodule's method whose output is meant.

  >>> Path("shared", call=1)
  Path(path='shared', call=1, element=None, layer=None, method='__call__')
  """

  path: str
  call: int | None = None
  element: int | str | tuple[int | str, ...] | None = None
  layer: int | None = None
  method: str = "__call__"


def parse(features: Sequence[str] | Mapping[str, str | Path]) -> dict[str, Path]:
  """Reads what a user gives as features.

  Args:
    features: paths, which are then the features' names too; or names mapped to paths. A string
      ending in ``":1"`` means the second of several calls.

  Returns:
    A `Path` for each name.

  Raises:
    ValueError: a path is empty or comes twice, or ``features`` is one string.

  >>> parse(["encoder/shared:1"])["encoder/shared:1"].call
  1
  """
  if isinstance(features, str):
    raise ValueError(f"features={features!r} must be a sequence of paths: features=[{features!r}].")
  if not isinstance(features, Mapping):
    twice = sorted({f for f in features if list(features).count(f) > 1})
    if twice:
      raise ValueError(f"features has {twice} more than once; name each one time.")
    features = {f: f for f in features}
  found = {}
  for name, place in features.items():
    path = Path(place) if isinstance(place, str) else place
    if not isinstance(name, str) or not isinstance(path, Path):
      raise TypeError(f"features has {name!r}: {place!r}; name a path, as text or as a Path.")
    # A colon and digits at the end are a call; any other colon belongs to the name.
    parts = re.fullmatch(r"(.*):(\d+)", path.path)
    if parts and path.call is None:
      path = dataclasses.replace(path, path=parts[1], call=int(parts[2]))
    # "/encoder/" and "encoder" are one place, and a path is compared part by part.
    path = dataclasses.replace(path, path=path.path.strip("/"))
    if not name or not path.path:
      raise ValueError(
        f"features has an empty name or path ({name!r}: {place!r}); name what is sown, or a "
        "submodule."
      )
    found[name] = path
  return found


def find_flags(
  module: Any,
  signature: inspect.Signature,
  train_flag: str | None,
  *,
  attributes: Sequence[str],
  switches: Sequence[str],
) -> list[Flag]:
  """How a module can be told whether it trains.

  Args:
    module: a foreign module.
    signature: of the method that is called, with the module first.
    train_flag: ``"auto"``; a name, which ``"not frozen"`` inverts; or None.
    attributes: those of the module (and of its submodules) that a name may mean; with a dot, a
      field of what an attribute holds.
    switches: those that hold a bool or None: one of a flag's name may hold something else.

  Returns:
    The flags. ``"auto"`` finds all that are known, arguments first.

  Raises:
    ValueError: there is none of that name.

  >>> def call(module, x, train): ...
  >>> find_flags(None, inspect.signature(call), "auto", attributes=[], switches=["inference"])
  [Flag(name='train', argument=True, inverted=False), \
Flag(name='inference', argument=False, inverted=True)]
  """
  if train_flag is None:
    return []
  if not isinstance(train_flag, str):
    raise TypeError(f"train_flag={train_flag!r} must be a flag's name, 'auto', or None.")
  taken = list(signature.parameters)[1:]  # the first is the module
  if train_flag == "auto":
    known = TRAIN_FLAGS.items()
    arguments = [Flag(name, True, inverted) for name, inverted in known if name in taken]
    return arguments + [
      Flag(place, False, inverted)
      for name, inverted in known
      for place in switches
      if _last(place) == name
    ]
  name = train_flag.removeprefix("not ").strip()
  inverted = TRAIN_FLAGS.get(_last(name), False) or train_flag.startswith("not ")
  # Behind **keywords any name may be understood; an attribute of that name is the better guess.
  anything = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
  if name in taken or (anything and name not in attributes):
    return [Flag(name, True, inverted)]
  if name in attributes:
    return [Flag(name, False, inverted)]
  raise ValueError(
    f"train_flag={train_flag!r}: {type(module).__name__} has no such argument or attribute; its "
    f"method takes {taken}, the attributes are {sorted(attributes)}."
  )


def _last(place: str) -> str:
  """The name at the end of ``"config.deterministic"``."""
  return place.rpartition(".")[2]


def signature(module: Any, method: str | Callable[..., Any] | None) -> inspect.Signature:
  """What the method that an adapter calls takes, the module first.

  Args:
    module: a foreign module.
    method: its name, a function of the module, or None for ``__call__``.

  Returns:
    The signature.

  Raises:
    ValueError: the module has no such method.

  >>> list(signature({}, "get").parameters)
  ['self', 'key', 'default']
  """
  # Of the class, not of the instance: there the module itself is no argument any more.
  if callable(method):
    return inspect.signature(method)
  chosen = getattr(type(module), method or "__call__", None)
  if not callable(chosen):
    raise ValueError(f"method={method or '__call__'!r} is no method of {type(module).__name__}.")
  return inspect.signature(chosen)


def bind(
  signature: inspect.Signature,
  inputs: Any,
  arguments: Callable[[Any], Any] | None,
  told: Mapping[str, Any],
  label: str,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
  """What a module is called with.

  Args:
    signature: of the method, with the module first.
    inputs: what the network sees.
    arguments: ``inputs -> tuple`` or ``dict``; None passes ``inputs`` alone.
    told: what else the module is told by name: the flags that are arguments, with their values.
    label: what to call the module in messages.

  Returns:
    ``(positional arguments, keyword arguments)``.

  Raises:
    ValueError: ``arguments`` returned neither, or a flag, or the arguments do not fit.

  >>> bind(inspect.signature(lambda module, x, train: x), 1, None, {"train": True}, "Net")
  ((1,), {'train': True})
  """
  if not callable(arguments) and arguments is not None:
    raise TypeError(f"{label}: arguments={arguments!r} must be a function inputs -> tuple or dict.")
  given = (inputs,) if arguments is None else arguments(inputs)
  if not isinstance(given, tuple | Mapping):
    raise ValueError(
      f"{label}: arguments returned a {type(given).__name__}; it must return a tuple "
      "(positional) or a dict (keywords)."
    )
  args, keywords = ((), dict(given)) if isinstance(given, Mapping) else (given, {})
  # Whoever sets the flag himself would evaluate in training mode, or train in evaluation's.
  twice = sorted(set(keywords) & set(told))
  if twice:
    raise ValueError(
      f"{label}: arguments returned {twice}, which train_flag sets; leave them out of it, or "
      "give train_flag=None."
    )
  keywords.update(told)
  # Before the call, where it can be told from a TypeError that the module raises inside.
  try:
    signature.bind(None, *args, **keywords)
  except TypeError as error:
    raise ValueError(
      f"{label} takes {signature}, which does not fit: {error}. Say how to call it with "
      "arguments=lambda inputs: ..., which returns a tuple or a dict."
    ) from error
  return args, keywords


def put_out(
  out: Any, finder: Callable[[Any], Any] | Literal[False] | None, label: str
) -> tuple[Any, dict[str, Any]]:
  """Finds the logits in what a module returned, or of one without them what it returns, by name.

  Args:
    out: what the module returned.
    finder: ``out -> array``; None takes an array, or the key or attribute ``logits``; False says
      that there are none.
    label: what to call the module in messages.

  Returns:
    ``(logits, features)``: an array and nothing else; without logits None, and the arrays of a dict
    by their keys, or one array as ``"output"``.

  Raises:
    ValueError: there is none.

  >>> put_out({"logits": np.zeros(2), "aux": None}, None, "Net")[0].tolist()
  [0.0, 0.0]
  >>> sorted(put_out({"image": np.zeros(2), "text": np.ones(2)}, False, "Net")[1])
  ['image', 'text']
  """
  if finder is False:
    named = {"output": out} if is_array(out) else out if isinstance(out, Mapping) else {}
    return None, {str(name): value for name, value in named.items() if is_array(value)}
  # What most modules return is understood; anything else is asked for, never guessed.
  if finder is not None:
    if not callable(finder):
      raise TypeError(
        f"{label}: logits={finder!r} must be a function of what the module returns, or False."
      )
    found = finder(out)
  elif is_array(out):
    found = out
  else:
    found = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
  if not is_array(found):
    how = "no logits were recognised in it" if finder is None else "logits= found no array"
    raise ValueError(
      f"{label} puts out a {type(out).__name__} of {shapes(out)}, and {how}; say "
      "where its logits are with logits=lambda out: ..., which must return an array, or by "
      "logits=False that it has none: what it puts out are then features."
    )
  return found, {}


def find(sown: Any, path: Path) -> Any:
  """Finds what was sown at a path, or else what the submodule there put out.

  Args:
    sown: the collection of sown and captured values.
    path: where to look.

  Returns:
    The value as Flax keeps it, or None.

  >>> find({"encoder": {"mid": (1.0,)}}, Path("encoder/mid"))
  (1.0,)
  """
  # The collection nests as the submodules do; a leaf is a sown value, a dict a submodule, whose own
  # output lies in it under the name of its method.
  node = sown
  for part in path.path.split("/"):
    if not isinstance(node, Mapping) or part not in node:
      return None
    node = node[part]
  return node.get(path.method) if isinstance(node, Mapping) else node


def pick(sown: Any, path: Path, label: str) -> Any:
  """Takes the one array that a path means.

  Args:
    sown: the collection of sown and captured values.
    path: where to look; `find` must find something there.
    label: what to call the feature in messages.

  Returns:
    An array.

  Raises:
    ValueError: there are several values and the path does not say which, or there is no such call,
      element or layer, or the value is no array.

  >>> pick({"mid": (np.zeros(2), np.ones(2))}, Path("mid", call=1), "mid").tolist()
  [1.0, 1.0]
  """
  # From the outside in: which call, which part of what it put out, which layer of a stack.
  calls = _calls(find(sown, path))
  if path.call is None and len(calls) > 1:
    options = ", ".join(repr(f"{path.path}:{i}") for i in range(len(calls)))
    raise ValueError(f"{label} has {len(calls)} values in one call; say which: {options}.")
  call = path.call or 0
  if not -len(calls) <= call < len(calls):
    raise ValueError(
      f"{label} has {len(calls)} value(s), and call={call} is none of them; calls count from 0."
    )
  value = calls[call]
  element = path.element
  for part in () if element is None else element if isinstance(element, tuple) else (element,):
    value = _element(value, part, label)
  if not is_array(value):
    raise ValueError(
      f"{label} is a {type(value).__name__} of {shapes(value)}, not an array; say which part "
      f"with Path({path.path!r}, element=...)."
    )
  if path.layer is None:
    return value
  layers = value.shape[0] if value.ndim else 0
  if not -layers <= path.layer < layers:
    raise ValueError(
      f"{label} has the shape {value.shape}, and layer={path.layer} is not on its first axis."
    )
  return value[path.layer]


def names(sown: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Lists a collection by the names that `parse` understands.

  Args:
    sown: the collection of sown and captured values.
    prefix: the path of the module that it belongs to.

  Returns:
    ``{name: shape}``, or a pytree of shapes (``jax.ShapeDtypeStruct``) for a tuple or a dict.

  >>> names({"encoder": {"__call__": (np.zeros(2), np.zeros(3))}, "mid": (np.zeros(1),)}).keys()
  dict_keys(['encoder:0', 'encoder:1', 'mid'])
  """
  found = {}
  for name, value in sown.items():
    # A submodule's output has the submodule's own name, what is sown below it a longer one.
    here = prefix if name == "__call__" else f"{prefix}/{name}".lstrip("/")
    if isinstance(value, Mapping):
      found.update(names(value, here))
      continue
    calls = _calls(value)
    for i, entry in enumerate(calls):
      found[here if len(calls) == 1 else f"{here}:{i}"] = jax.tree.map(_shape, entry)
  return found


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Adapter:
  """A foreign module and how to call it; ``init`` and ``apply`` are the network's.

  Attributes:
    wanted: the features, by the names that they get.
    signature: of the method that is called.
    arguments: ``inputs -> tuple`` or ``dict``, or None.
    logits: finds them in what the module returns, or None; False where it has none.
    method: the method to call, or None for ``__call__``.
    name: what to call the module in messages.
    told: whether it is to be told that it trains: not where ``train_flag`` is None.
    resting: paths of submodules that normalise by their averages in training too.
    specs: how parameters are cut, ``{path: PartitionSpec}``; of those that `read` is for.
    read: ``(parameter, spec) -> parameter``, at use; None for parameters as they are.
  """

  wanted: dict[str, Path]
  signature: inspect.Signature
  arguments: Callable[[Any], Any] | None
  logits: Callable[[Any], Any] | Literal[False] | None
  method: str | Callable[..., Any] | None
  name: str
  told: bool = True
  resting: frozenset[str] = frozenset()
  specs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  read: Callable[[Any, Any], Any] | None = None

  def network(self) -> Network:
    """What the adapter is for."""
    # An adapter has both; `Adapter` itself knows neither.
    mine: Any = self
    return Network(mine.init, mine.apply, self.name, self.at_rest, mine.axes, self.at_use)

  def at_rest(self, paths: Collection[str]) -> Network:
    """The network with these submodules' normalisations as in evaluation."""
    return dataclasses.replace(self, resting=frozenset(paths)).network()

  def at_use(self, specs: Mapping[str, Any], read: Callable[[Any, Any], Any]) -> Network:
    """The network that reads each of these parameters where it uses it."""
    return dataclasses.replace(self, specs=specs, read=read).network()

  def at_parameters(
    self, variables: Mapping[str, Any], put: Callable[[Any, Any], Any]
  ) -> Mapping[str, Any]:
    """The variables, with ``put(parameter, spec)`` in the place of those that `read` is for."""

    def place(path: Any, leaf: Any) -> Any:
      spec = self.specs.get(jax.tree_util.keystr(path, simple=True, separator="/"))
      return leaf if spec is None else put(leaf, spec)

    if self.read is None:
      return variables
    params = jax.tree_util.tree_map_with_path(
      place, {"params": variables["params"]}, is_leaf=lambda node: isinstance(node, Int8)
    )
    return {**variables, **params}

  def variables(self, key: Any, inputs: Any) -> dict[str, Any]:
    """What the module's own initialisation makes."""
    raise NotImplementedError

  def survey(self, call: Call) -> tuple[dict[str, Any], dict[str, set[str]], dict[str, Hidden]]:
    """Runs the module abstractly and captures every submodule's output.

    Returns:
      ``(shapes by name, methods called by path, what hides a path)``.
    """
    raise NotImplementedError

  def outputs(self, call: Call, out: Any, sown: Mapping[str, Any]) -> Outputs:
    """What the network puts out, from what the module returned and what was captured."""
    there = {name: path for name, path in self.wanted.items() if find(sown, path) is not None}
    missing = [name for name in self.wanted if name not in there]
    if missing and not call.train:
      # An auxiliary head exists in training alone: evaluation and the deployed model lack it.
      missing = [name for name in missing if name not in self.trained_alone(missing, call)]
    if missing:
      raise ValueError(self.explain_missing(missing, call))
    features = {
      name: pick(sown, path, f"{self.name}: feature {name!r}") for name, path in there.items()
    }
    base = out if isinstance(out, Outputs) else Outputs()
    if self.logits is None and base.hidden is not None and base.head is not None:
      # A module that speaks our words: a language model's hidden states and head stand for logits.
      found, returned = base.logits, base.features
    else:
      found, returned = put_out(out, self.logits, self.name)
    features = {**base.features, **returned, **features}
    if found is None and base.head is None and not features:
      raise ValueError(
        f"{self.name} has no logits (logits=False), and neither features= nor a dict that it "
        "returns names anything else that it puts out."
      )
    return dataclasses.replace(base, logits=found, features=features)

  def trained_alone(self, missing: Sequence[str], call: Call) -> set[str]:
    """Those of the features that evaluation lacks and that a call in training has."""
    key = jax.random.key(0) if call.key is None else call.key
    try:
      shapes, called, hidden = self.survey(call._replace(train=True, key=key))
    except ValueError:  # a BatchNorm over an axis that only `pmap` makes: nobody can look
      return set()
    captured = {entry.split(":")[0] for entry in shapes}
    found = set()
    for name in missing:
      path, method = self.wanted[name].path, self.wanted[name].method
      ran = path in captured if method == "__call__" else method in called.get(path, ())
      if ran and not any(inside(path, outer) for outer in hidden):
        found.add(name)
    return found

  def explain_missing(self, missing: Sequence[str], call: Call) -> str:
    """Of each feature that was not found why, and all that there are."""
    # Only now, when there is an error to explain: capturing everything may be slow.
    shapes, called, hidden = self.survey(call)
    lines = [f"{self.name}: {len(missing)} of the features can't be found."]
    for name in missing:
      path, method = self.wanted[name].path, self.wanted[name].method
      label = repr(name) if name == path else f"{name!r} (at {path!r})"
      around = next((outer for outer in hidden if inside(path, outer)), None)
      if around is not None:
        what = repr(around) if around else "the module"
        lines.append(f"{label}: {what} runs inside {hidden[around].runs_inside}")
      elif called.get(path):
        lines.append(
          f"{label}: the submodule is called by {sorted(called[path])}, not by {method!r}; give "
          f"Path({path!r}, method=...)."
        )
      else:
        lines.append(f"{label}: nothing of that name is sown, and no such submodule is called.")
    lines += listed(shapes)
    lines += [f"Hidden in {lift.transform}: {path or 'all'}" for path, lift in hidden.items()]
    return "\n".join(lines)

  def check_training(
    self, before: Mapping[str, Any], after: Mapping[str, Any], *, off: bool = False
  ) -> None:
    """Raises where a call in training was none: the module was not told, or did not listen.

    Its statistics would stay what ``init`` made them, and be deployed so.

    Args:
      before: the variables of the call.
      after: the collections that it changed, as it left them.
      off: whether every layer that is known to train otherwise was seen not to.
    """
    names = statistics(after)
    moving = [untouched(before[name], after[name], self.resting) for name in names]
    same = any(still is not None for still in moving) and False not in moving
    if not self.told or not (off or same):
      return
    what = f"leaves {', '.join(names)} as before" if names else "drops nothing out"
    raise ValueError(
      f"{self.name} {what} in training, as in evaluation: nothing tells it that it trains. Its "
      f"method takes {list(self.signature.parameters)[1:]}: name its own flag, "
      "train_flag='is_train' for example ('not frozen' inverts one); or train_flag=None, if it is "
      "meant to train so."
    )

  def explain_frozen(self) -> str:
    """Why a module that changes its statistics in evaluation is an error."""
    return (
      f"{self.name} changes its statistics with train=False too. Its method takes "
      f"{list(self.signature.parameters)[1:]}: name its own flag with train_flag=..."
    )

  def explain_axis(self, error: Exception) -> str:
    """Why an axis that a layer averages over is not there."""
    return (
      f"{self.name} averages over an axis that nobody made ({short(error)}): under "
      "train.with_jit BatchNorm sees the whole batch, so leave its axis_name out; under "
      "train.with_pmap the axis is 'data'."
    )

  def explain_draw(self, stream: str, told: Sequence[str], train: bool) -> str:
    """Why a random stream that is drawn from is an error."""
    if train:
      return f"{self.name} draws from {stream} in training; give apply a key."
    return (
      f"{self.name} draws from {stream} even with train=False, which it is told by "
      f"{sorted(told) or 'no flag'}; name its own flag with train_flag=..., or give apply a key if "
      "it is meant to be random."
    )


def statistics(collections: Mapping[str, Any]) -> list[str]:
  """Which collections hold statistics of the data, by their names.

  >>> statistics({"params": {"a": 1}, "batch_stats": {"mean": 1}, "my_stats": {}})
  ['batch_stats']
  """
  return [name for name in collections if "stats" in name and jax.tree.leaves(collections[name])]


def untouched(before: Any, after: Any, resting: Collection[str] = ()) -> bool | None:
  """Whether nobody wrote to a collection: all its arrays, or tracers, are the very ones they were.

  What comes out of a transform (nn.remat, nn.scan) is another one, written to or not. Modules that
  rest are not looked at; None where all do.

  >>> one, other = object(), object()
  >>> untouched({"s": {"a": one}}, {"s": {"a": one}})
  True
  >>> untouched({"s": {"a": one}}, {"s": {"a": other}})
  False
  >>> untouched({"s": {"a": one}}, {"s": {"a": one}}, ["s"])
  """
  old, new = (jax.tree_util.tree_leaves_with_path(one) for one in (before, after))
  same = [
    mine is was
    for (path, was), (_, mine) in zip(old, new, strict=True)
    if jax.tree_util.keystr(path[:-1], simple=True, separator="/") not in resting
  ]
  return all(same) if same else None


def inside(path: str, outer: str) -> bool:
  """Whether a path is another one, or below it; ``""`` is the module itself.

  >>> inside("encoder/mid", "encoder"), inside("encoder", "enc"), inside("mid", "")
  (True, False, True)
  """
  return not outer or path == outer or path.startswith(f"{outer}/")


def listed(shapes_by_name: Mapping[str, Any]) -> list[str]:
  """The lines of a message that list what can be captured.

  >>> listed({"mid": jax.ShapeDtypeStruct((2, 3), np.float32)})
  ['Available:', '  mid (2, 3)']
  """
  lines = [f"  {name} {shapes(shape)}" for name, shape in shapes_by_name.items()]
  return ["Available:" if lines else "Nothing is available.", *lines]


def is_array(value: Any) -> bool:
  """Whether a value is an array, or stands for one while a program is traced.

  >>> is_array(np.zeros(2)), is_array([0.0, 0.0])
  (True, False)
  """
  return isinstance(value, jax.Array | np.ndarray)


def _calls(value: Any) -> tuple[Any, ...]:
  # Sow makes a tuple with an entry for each call, unless it is given another way to reduce.
  return value if type(value) is tuple else (value,)


def _element(value: Any, part: int | str, label: str) -> Any:
  # Dataclasses and named tuples by attribute, dicts and tuples by index.
  if isinstance(part, str) and not isinstance(value, Mapping) and hasattr(value, part):
    return getattr(value, part)
  try:
    if is_array(value):
      raise TypeError("an array has no elements of this kind; its first axis is the batch")
    return value[part]
  except (KeyError, IndexError, TypeError) as error:
    raise ValueError(
      f"{label} is a {type(value).__name__} of {shapes(value)}; it has no element {part!r}."
    ) from error


def _shape(leaf: Any) -> Any:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else type(leaf)
