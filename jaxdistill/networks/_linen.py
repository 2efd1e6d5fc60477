"""Adapters: modules that nobody here wrote become a `jaxdistill.types.Network`, unchanged.

Foreign modules differ in the name of their train flag, their random streams, their inputs and where
their logits are; all four are arguments of `linen`. Features are taken where the module sows them,
or at any submodule's output.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import flax.errors
import flax.linen as nn
import flax.struct
import jax

from jaxdistill import _check
from jaxdistill.networks import _features
from jaxdistill.networks._features import Adapter, Call, Flag, Hidden, Path
from jaxdistill.types import Network, Outputs

__all__ = ["linen"]

PyTree = Any
_Filter = Callable[[nn.Module, str], bool]
_SOWN = "intermediates"


def linen(
  module: nn.Module,
  *,
  features: Sequence[str] | Mapping[str, str | Path] = (),
  train_flag: str | None = "auto",
  rngs: Sequence[str] = ("dropout",),
  arguments: Callable[[Any], tuple[Any, ...] | Mapping[str, Any]] | None = None,
  logits: Callable[[Any], Any] | Literal[False] | None = None,
  method: str | Callable[..., Any] | None = None,
  name: str | None = None,
) -> Network:
  """A Linen module as a `Network`.

  A feature is first looked up among the values that the module sows into ``intermediates``, then
  among its submodules, whose output is captured; nothing else is. ``"shared:1"`` means the
  second call of a submodule (or the second value sown). A feature that is not there is an error
  that lists those that are, raised by ``init`` and whenever ``apply`` is traced.

  In training, the collections of ``variables`` beside ``params`` are updated and returned; in
  evaluation, nothing is. A collection into which the module sows at every call would grow without
  end; it is no state and is left out.

  Args:
    module: any Linen module, as it is.
    features: paths, which are then the features' names too; or names of your own mapped to paths.
    train_flag: how the module is told whether it trains. ``"auto"``: by each of ``train``,
      ``training``, ``is_training``, and (inverted) ``deterministic``, ``use_running_average``,
      ``eval_mode``, ``inference`` that its method takes as an argument, else that it has as an
      attribute or as a field of a dataclass that is one (``"config.deterministic"``), else not at
      all. Any other string names the argument, attribute or field; ``"not frozen"`` inverts one.
      None: not at all.
    rngs: the random streams that the module draws from in training.
    arguments: ``inputs -> tuple`` of positional or ``dict`` of keyword arguments, for several
      inputs; by default ``inputs`` is the one positional argument.
    logits: finds the logits in what the module returns. By default that is an array, or has a key
      or an attribute ``logits``, or is an `Outputs`, which is passed on with all that it has:
      ``hidden`` and ``head`` may stand for the logits. False for a network without (embeddings, two
      towers): what the module returns is then a feature, ``"output"``, or several by the keys of a
      dict.
    method: the method to call instead of ``__call__``; its name, or a function of the module.
    name: for messages and reports; the module's class by default.

  Returns:
    The network. Its ``init`` gives parameters as ``module.init(key, ...)`` would, unboxed where
    they carry names of axes (``nn.with_partitioning``); its ``apply`` gives each random stream a
    key of its own, and none when ``key`` is None.

  Raises:
    ValueError: a feature is named twice or not at all, or the module has no such train flag; and
      where it is traced in training: its statistics stay as they were, or nothing is dropped out.

  >>> network = linen(nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(3)]), features=["layers_0"])
  >>> x = jax.numpy.ones((2, 5))
  >>> variables = network.init(jax.random.key(0), x)
  >>> outputs, state = network.apply(variables, x, train=False, key=None)
  >>> outputs.logits.shape, outputs.features["layers_0"].shape, state
  ((2, 3), (2, 4), {})
  """
  if not isinstance(module, nn.Module):
    how = "make one, module(...)" if isinstance(module, type) else "networks.nnx takes NNX's"
    raise TypeError(f"module must be a Linen module, got {_check.show(module)}; {how}.")
  if isinstance(rngs, str):
    raise ValueError(f"rngs={rngs!r} must be a sequence of names: rngs=({rngs!r},).")
  # What the module takes decides how it is told that it trains, before anything is run.
  signature = _features.signature(module, method)
  adapter = _Adapter(
    module=module,
    wanted=_features.parse(features),
    signature=signature,
    flags=_flags(module, signature, train_flag),
    rngs=tuple(rngs),
    arguments=arguments,
    logits=logits,
    method=method,
    name=name or type(module).__name__,
    told=train_flag is not None,
  )
  return adapter.network()


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _Adapter(Adapter):
  """A Linen module, which is given its variables at every call."""

  module: nn.Module
  flags: list[Flag]
  rngs: tuple[str, ...]

  def init(self, key: Any, inputs: Any) -> dict[str, PyTree]:
    variables = self.variables(key, inputs)
    collections = [name for name in variables if name != "params"]

    def check(variables: PyTree, inputs: Any, key: Any) -> PyTree:
      # In inference mode, since a BatchNorm with an axis name can't train outside of `pmap`.
      call = Call(variables, inputs, False, key)
      out, state = self.run(call, collections)
      self.outputs(call, out, state.get(_SOWN, {}))
      return {name: state[name] for name in collections if name in state}

    # By shapes alone: a missing feature is an error here, before anything is computed.
    after = jax.eval_shape(check, variables, inputs, key)
    return {name: v for name, v in variables.items() if not _grew(v, after.get(name, v))}

  def apply(
    self, variables: Mapping[str, PyTree], inputs: Any, *, train: bool, key: Any = None
  ) -> tuple[Outputs, dict[str, PyTree]]:
    # Left-over intermediates would be the first of several values.
    variables = {name: value for name, value in variables.items() if name != _SOWN}
    # Statistics move in training only; what is not mutable, Flax lets no module write.
    mutable = [name for name in variables if name != "params"] if train else []

    def ran(put: Callable[[Any, Any], Any]) -> tuple[Call, list[bool], Any]:
      call = Call(self.at_parameters(variables, put), inputs, train, key)
      with _switches(keyed=key is not None, resting=self.resting) as off:
        return call, off, self.run(call, mutable)

    try:
      call, off, (out, state) = ran(lambda leaf, spec: _AtUse(leaf, spec, self.read))
    except Exception:
      if self.read is None:
        raise
      # A module that looks into its variables itself (nn.WeightNorm) finds arrays there, read at
      # once. Whatever else is wrong is wrong again.
      call, off, (out, state) = ran(self.read)
    updated = {n: v for n, v in state.items() if n in mutable and not _grew(variables[n], v)}
    if train:
      self.check_training(variables, updated, off=bool(off) and all(off))
    return self.outputs(call, out, state.get(_SOWN, {})), updated

  def variables(self, key: Any, inputs: Any) -> dict[str, PyTree]:
    # Boxed with the names of their axes, arrays would not be where their own names say: `axes`.
    return {"params": {}, **nn.unbox(self.boxed(key, inputs))}

  def boxed(self, key: Any, inputs: Any) -> dict[str, PyTree]:
    # In training mode, since some modules make their auxiliary heads only then.
    module, args, keywords = self.bind(inputs, train=True)
    mutable = nn.DenyList((_SOWN, "perturbations"))
    keys = {"params": key, **self.streams(key)}
    return module.init(keys, *args, method=self.method, mutable=mutable, **keywords)

  def axes(self, inputs: Any) -> dict[str, tuple[Any, ...]]:
    def boxes(node: Any) -> bool:
      return isinstance(node, nn.meta.AxisMetadata)

    made = jax.eval_shape(self.boxed, jax.random.key(0), inputs)
    found = jax.tree_util.tree_leaves_with_path(made, is_leaf=boxes)
    named = [(path, box) for path, box in found if isinstance(box, nn.Partitioned)]
    return {
      jax.tree_util.keystr(path, simple=True, separator="/"): tuple(box.names)
      for path, box in named
    }

  def streams(self, key: Any) -> dict[str, Any]:
    # Folded by the stream's place, or two streams of one key would draw the same numbers.
    names = () if key is None else self.rngs
    return {name: jax.random.fold_in(key, i) for i, name in enumerate(names)}

  def bind(self, inputs: Any, train: bool) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    told = {flag.name: train != flag.inverted for flag in self.flags if flag.argument}
    args, keywords = _features.bind(self.signature, inputs, self.arguments, told, self.name)
    # A flag that is an attribute is set on a copy: the module itself is the user's.
    attributes: Any = {}
    for flag in self.flags:
      if not flag.argument:
        first, _, rest = flag.name.partition(".")
        held = attributes.get(first, getattr(self.module, first))
        attributes[first] = _with_field(held, rest, train != flag.inverted)
    return self.module.clone(**attributes) if attributes else self.module, args, keywords

  def run(
    self, call: Call, mutable: Sequence[str], capture: _Filter | None = None
  ) -> tuple[Any, dict[str, PyTree]]:
    module, args, keywords = self.bind(call.inputs, call.train)
    places = {(tuple(path.path.split("/")), path.method) for path in self.wanted.values()}
    if places and capture is None:
      # Only what is asked for is captured, so that nothing else is kept alive.
      capture = lambda module, method: (module.path, method) in places  # noqa: E731
    try:
      out, state = module.apply(
        call.variables,
        *args,
        rngs=self.streams(call.key),
        method=self.method,
        mutable=[*mutable, _SOWN] if capture else [*mutable],
        capture_intermediates=capture or False,
        **keywords,
      )
    # Flax's messages speak of scopes; the user's words are the network, its flags and its key.
    except flax.errors.InvalidRngError as error:
      raise ValueError(self.explain_stream(str(error), call)) from error
    except flax.errors.ModifyScopeVariableError as error:
      raise ValueError(self.explain_frozen()) from error
    except NameError as error:
      if "axis name" not in str(error):
        raise
      raise ValueError(self.explain_axis(error)) from error
    except (
      flax.errors.ScopeCollectionNotFound,
      flax.errors.ScopeParamNotFoundError,
      flax.errors.ScopeParamShapeError,
    ) as error:
      raise _check.VariablesError(
        f"{self.name}: the variables, or the inputs, do not fit: {_check.short(error)} Give what "
        "the init of this network returns, or a checkpoint of the same architecture."
      ) from error
    return out, dict(state)

  def survey(self, call: Call) -> tuple[dict[str, Any], dict[str, set[str]], dict[str, Hidden]]:
    called: dict[str, set[str]] = {}
    hidden: dict[str, str] = {}
    lifted: dict[str | None, str] = {}
    shapes: dict[str, Any] = {}

    # Flax asks this of every method that is called: a filter that also notes who was there.
    def visit(module: nn.Module, method: str) -> bool:
      path = "/".join(module.path)
      if type(module).__module__ == nn.transforms.__name__:
        # Flax checks a lifted module's setup before the module inside takes its place.
        lifted[module.name] = type(module).__name__
      if method in ("setup", "<lambda>"):
        return False
      called.setdefault(path, set()).add(method)
      # In a transform that does not lift the collection, sow drops its values without a word.
      if not module.is_mutable_collection(_SOWN):
        hidden[path] = lifted.get(module.name, "")
      return method == "__call__" and path != ""

    def collect(capture: _Filter) -> None:
      def body(variables: PyTree, inputs: Any, key: Any) -> int:
        collections = [name for name in variables if name != "params"]
        _, state = self.run(Call(variables, inputs, call.train, key), collections, capture)
        shapes.update(_features.names(state.get(_SOWN, {})))
        return 0

      jax.eval_shape(body, call.variables, call.inputs, call.key)

    try:
      collect(visit)
    except TypeError:
      # The branches of an nn.cond can't differ in what they capture.
      collect(lambda module, method: visit(module, method) and False)
    # What is inside a hidden module is hidden by the same transform.
    outer = {
      path: _hidden(lift)
      for path, lift in hidden.items()
      if not any(_features.inside(path, other) for other in hidden if other != path)
    }
    return shapes, called, outer

  def explain_stream(self, error: str, call: Call) -> str:
    stream = repr(error.partition('PRNG for "')[2].partition('"')[0])
    if call.key is not None:
      more = (*self.rngs, stream.strip("'"))
      return (
        f"{self.name} draws from the random stream {stream}, which is not in rngs={self.rngs!r}; "
        f"give rngs={more!r}."
      )
    told = [flag.name for flag in self.flags]
    return self.explain_draw(f"the random stream {stream}", told, call.train)


@flax.struct.dataclass
class _AtUse(nn.meta.AxisMetadata):
  """A parameter that is read through a function where a module asks for it.

  Flax unboxes it there, and tells it of the axis that a lifted scan takes away: so in the body of a
  scan a layer's parameters are read, and not those of all layers before it.
  """

  value: Any
  spec: tuple[Any, ...] = flax.struct.field(pytree_node=False)
  read: Any = flax.struct.field(pytree_node=False)

  def unbox(self) -> Any:
    return self.read(self.value, self.spec)

  def replace_boxed(self, val: Any) -> _AtUse:
    return dataclasses.replace(self, value=val)

  def add_axis(self, index: int, params: dict[Any, Any]) -> _AtUse:
    spec = [*self.spec, *[None] * (index - len(self.spec))]
    return dataclasses.replace(self, spec=(*spec[:index], None, *spec[index:]))

  def remove_axis(self, index: int, params: dict[Any, Any]) -> _AtUse:
    return dataclasses.replace(self, spec=self.spec[:index] + self.spec[index + 1 :])


def _flags(module: nn.Module, signature: inspect.Signature, train_flag: str | None) -> list[Flag]:
  fields = {f.name: getattr(module, f.name) for f in dataclasses.fields(module) if f.init}
  fields.pop("parent", None)
  # Published networks keep their settings together, and whether they train may be one of them.
  for name, value in list(fields.items()):
    if dataclasses.is_dataclass(value) and not isinstance(value, type | nn.Module):
      own = [f.name for f in dataclasses.fields(value) if f.init]
      fields |= {f"{name}.{one}": getattr(value, one) for one in own}
  attributes = list(fields)
  switches = [name for name, value in fields.items() if isinstance(value, bool | None)]
  flags = _features.find_flags(
    module, signature, train_flag, attributes=attributes, switches=switches
  )
  # Told by an argument, a module's attribute of such a name is its own affair.
  return [flag for flag in flags if flag.argument] or flags


def _with_field(held: Any, field: str, value: bool) -> Any:
  """What an attribute holds, with another value in a field; the value itself without one."""
  return dataclasses.replace(held, **{field: value}) if field else value


@contextlib.contextmanager
def _switches(*, keyed: bool, resting: Collection[str]) -> Iterator[list[bool]]:
  """Of each of Flax's own layers that train otherwise and are called, whether that is off.

  Layers at the paths that rest are switched off here, and not among them.
  """
  off: list[bool] = []

  def watch(call: Any, args: Any, keywords: Any, context: nn.module.InterceptorContext) -> Any:
    layer: Any = context.module
    rests = "/".join(layer.path) in resting and hasattr(layer, "use_running_average")
    if rests and context.method_name == "__call__":
      # Told twice, by its attribute and at the call, Flax's BatchNorm raises: by the first alone.
      told = layer.use_running_average
      object.__setattr__(layer, "use_running_average", True)
      keywords = {name: v for name, v in keywords.items() if name != "use_running_average"}
      try:
        return call(*(args[:1] if isinstance(layer, nn.BatchNorm) else args), **keywords)
      finally:
        object.__setattr__(layer, "use_running_average", told)
    named = {nn.BatchNorm: "use_running_average", nn.Dropout: "deterministic"}.get(type(layer))
    draws = not isinstance(layer, nn.Dropout) or (keyed and layer.rate > 0)
    if named and context.method_name == "__call__" and draws:
      given = keywords.get(named, args[1] if len(args) > 1 else None)
      off.append((getattr(layer, named) if given is None else given) is True)
    return call(*args, **keywords)

  with nn.intercept_methods(watch):
    yield off


def _grew(before: PyTree, after: PyTree) -> bool:
  """Whether a collection changed in the lengths of its tuples only: the module sows into it."""

  def outline(tree: PyTree, leaf: type | tuple[()]) -> Any:
    return jax.tree.structure(tree, is_leaf=lambda node: isinstance(node, leaf))

  # sow appends to a tuple: leaves are added, while with tuples as leaves all is as it was.
  same = outline(before, ()) == outline(after, ())
  return not same and outline(before, tuple) == outline(after, tuple)


def _hidden(lifted: str) -> Hidden:
  words = [f"nn.{word.lower()} ({lifted})" for word in ("Scan", "Vmap") if word in lifted]
  other = f"a lifted transform (nn.scan, nn.vmap; {lifted or 'a function of the module'})"
  transform = words[0] if words else other
  vanish = (
    f"{transform}, which does not lift 'intermediates', so that captures vanish; add "
    "'intermediates': 0 to its variable_axes."
  )
  return Hidden(vanish, transform)
