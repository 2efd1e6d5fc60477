"""The adapter for Flax NNX: any NNX module becomes a `jaxdistill.types.Network`, unchanged.

An NNX module holds its variables; a network is given them. So the adapter keeps the module's
structure, and each call builds a module of its own from it and the variables, which is thrown away
afterwards: what the user gave is never touched. Words, paths and messages are those of
`jaxdistill.networks.linen`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx as flax_nnx

from jaxdistill.networks import _features, _nnx_graph
from jaxdistill.networks._features import Adapter, Call, Flag, Hidden, Path
from jaxdistill.networks._nnx_graph import Slot, Tap
from jaxdistill.runs import is_key
from jaxdistill.types import Network, Outputs

__all__ = ["nnx", "nnx_variables"]

PyTree = Any


def nnx(
  model: Any,
  *,
  features: Sequence[str] | Mapping[str, str | Path] = (),
  train_flag: str | None = "auto",
  arguments: Callable[[Any], tuple[Any, ...] | Mapping[str, Any]] | None = None,
  logits: Callable[[Any], Any] | Literal[False] | None = None,
  method: str | Callable[..., Any] | None = None,
  name: str | None = None,
) -> Network:
  """An NNX module as a `Network`.

  A feature is a submodule's output, by its path (``"layers/0"``, ``"encoder/linear1"``), or what a
  submodule sows as ``nnx.Intermediate``, by its path and name. ``"shared:1"`` means the second call
  of a submodule (or the second value sown). A Linen module inside (``nnx.bridge.ToNNX``) is one
  submodule. A feature that is not there is an error that lists those that are, raised by ``init``
  and whenever ``apply`` is traced.

  The variables are nested dicts by collection: ``params`` (``nnx.Param`` and its subclasses, which
  are trained), ``batch_stats``, every other variable type by its name, and ``arrays`` for arrays
  that are no ``nnx.Variable``. A variable that several submodules share is there once. In training,
  the collections beside ``params`` are updated and returned; in evaluation, nothing is.

  Random streams are no variables: in training each gets a key of its own, folded from the key of
  ``apply``; in evaluation none is needed. A method that takes ``rngs`` is given them.

  Args:
    model: a function ``rngs -> module`` (``lambda rngs: Net(10, rngs=rngs)``), from which ``init``
      makes variables that follow its key: a student. Or a module, whose own weights ``init``
      returns as copies, whatever the key: a teacher.
    features: paths, which are then the features' names too; or names of your own mapped to paths.
    train_flag: how the module is told whether it trains. ``"auto"``: by its ``train()`` and
      ``eval()``, by ``set_view`` where a submodule has its own, by each attribute and each argument
      of its method called ``train``, ``training``, ``is_training``, and (inverted)
      ``deterministic``, ``use_running_average``, ``eval_mode``, ``inference``. Any other string
      names the one argument, or attribute of any submodule; ``"not frozen"`` inverts it. None: not
      at all.
    arguments: ``inputs -> tuple`` of positional or ``dict`` of keyword arguments, for several
      inputs; by default ``inputs`` is the one positional argument.
    logits: finds the logits in what the module returns. By default that is an array, or has a key
      or an attribute ``logits``, or is an `Outputs`, which is passed on with all that it has. False
      for a network without (embeddings, two towers): what the module returns is then a feature,
      ``"output"``, or several by the keys of a dict.
    method: the method to call instead of ``__call__``; its name, or a function of the module.
    name: for messages and reports; the module's class by default.

  Returns:
    The network. The function is run here once, abstractly.

  Raises:
    ValueError: ``model`` is neither; a feature is named twice or not at all; or the module has no
      such train flag.

  >>> def build(rngs):
  ...   layers = flax_nnx.Linear(5, 4, rngs=rngs), flax_nnx.relu, flax_nnx.Linear(4, 3, rngs=rngs)
  ...   return flax_nnx.Sequential(*layers)
  >>> network = nnx(build, features=["layers/0"])
  >>> x = jax.numpy.ones((2, 5))
  >>> values = network.init(jax.random.key(0), x)
  >>> outputs, state = network.apply(values, x, train=False, key=None)
  >>> outputs.logits.shape, outputs.features["layers/0"].shape, state
  ((2, 3), (2, 4), {})
  """
  if isinstance(model, flax_nnx.Module):
    module: Any = model
    make: Callable[[flax_nnx.Rngs], Any] = lambda rngs: model  # noqa: E731
  else:
    make = functools.partial(_nnx_graph.make, model)
    module = flax_nnx.eval_shape(make, flax_nnx.Rngs(0))
  signature = _features.signature(module, method)
  # From shapes where the model is a function: no weight is drawn before `init` has a key.
  graph, slots = _nnx_graph.split(module)
  switches = _nnx_graph.switches(module)
  adapter = _Adapter(
    make=make,
    graph=graph,
    slots=slots,
    wanted=_features.parse(features),
    signature=signature,
    flags=_features.find_flags(
      module, signature, train_flag, attributes=switches, switches=switches
    ),
    auto=train_flag == "auto",
    told=train_flag is not None,
    arguments=arguments,
    logits=logits,
    method=method,
    name=name or type(module).__name__,
  )
  return adapter.network()


def nnx_variables(module: Any) -> dict[str, PyTree]:
  """The variables of a module, as its network takes them.

  Args:
    module: an NNX module with values.

  Returns:
    ``{"params": ..., "batch_stats": ..., ...}``, nested dicts by path, a collection for each type
    of variable. The arrays are copies, since a training step overwrites its own.

  Raises:
    ValueError: ``module`` is no NNX module, or holds shapes instead of values.

  >>> found = nnx_variables(flax_nnx.Linear(5, 4, rngs=flax_nnx.Rngs(0)))
  >>> found["params"]["kernel"].shape
  (5, 4)
  """
  if not isinstance(module, flax_nnx.Module):
    raise ValueError(f"module={module!r} is a {type(module).__name__}, not an NNX module.")
  found: dict[str, PyTree] = {"params": {}}
  for slot in _nnx_graph.split(module)[1]:
    for where, leaf in zip(slot.places, slot.leaves, strict=True):
      if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
        what = "/".join(where)
        raise ValueError(
          f"{type(module).__name__}: {what} is a {type(leaf).__name__}, not an array; give a "
          "module with values (a ShapeDtypeStruct comes from nnx.eval_shape)."
        )
      # A copy, since a training step donates its variables and would take the module's weights.
      value = leaf
      if not is_key(leaf):
        value = jnp.array(leaf, dtype=jnp.asarray(leaf).dtype, copy=True)  # strongly typed
      _nnx_graph.insert(found, where, value)
  return found


class _Ran(NamedTuple):
  module: flax_nnx.Module
  out: Any
  sown: dict[str, Any]
  drawn: set[str]
  taps: list[Tap]


_Taps = Callable[[flax_nnx.Module], list[Tap]]
_HIDDEN = Hidden(
  "a transform (nnx.scan, nnx.vmap, jax.lax.scan of nnx.merge) that does not hand captured values "
  "out; give nnx.scan or nnx.vmap the module itself, with an axis for nnx.Intermediate among its "
  "StateAxes.",
  "a transform",
)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _Adapter(Adapter):
  """An NNX module's structure, of which every call builds a module of its own."""

  make: Callable[[flax_nnx.Rngs], flax_nnx.Module]
  graph: Any
  slots: list[Slot]
  flags: list[Flag]
  auto: bool

  def init(self, key: Any, inputs: Any) -> dict[str, PyTree]:
    made = self.variables(key, inputs)
    # A call by shapes: a feature that is not there, or inputs that do not fit, show here.
    # In inference mode, since a BatchNorm with an axis name can't train outside of `pmap`.
    check = lambda made, inputs, key: self.call(Call(made, inputs, False, key))[0]  # noqa: E731
    jax.eval_shape(check, made, inputs, key)
    return made

  def apply(
    self, variables: Mapping[str, PyTree], inputs: Any, *, train: bool, key: Any = None
  ) -> tuple[Outputs, dict[str, PyTree]]:
    # Of a scan's layers all at once: NNX tells nobody where a variable is used.
    variables = self.at_parameters(variables, self.read or (lambda leaf, spec: leaf))
    call = Call(variables, inputs, train, key)
    outputs, state, drawn = self.call(call)
    if drawn:
      # To split a stream is harmless as long as nothing comes of it: no output may differ between
      # two keys, which `vmap` knows without computing.
      def arrays(key: Any) -> list[Any]:
        return jax.tree.leaves(self.call(call._replace(key=key))[:2])

      keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
      try:
        jax.eval_shape(jax.vmap(arrays, out_axes=None), keys)
      except ValueError as error:
        raise ValueError(self.explain_stream(drawn, train)) from error
    if train:
      self.check_training(variables, state)
    return outputs, state

  def axes(self, inputs: Any) -> dict[str, tuple[Any, ...]]:
    del inputs
    found = {}
    for slot in self.slots:
      names = _nnx_graph.names_of_axes(slot.variable)
      if names is not None:
        found.update({"/".join(place): names for place in slot.places})
    return found

  def variables(self, key: Any, inputs: Any) -> dict[str, PyTree]:
    del inputs  # an NNX module has its shapes from its own arguments
    return nnx_variables(self.make(flax_nnx.Rngs(key)))

  def call(self, call: Call) -> tuple[Outputs, dict[str, PyTree], set[str]]:
    try:
      ran = self.run(call, functools.partial(_nnx_graph.find_taps, list(self.wanted.values())))
    except NameError as error:
      if "axis name" not in str(error):
        raise
      raise ValueError(self.explain_axis(error)) from error
    except (TypeError, ValueError) as error:
      # The module's own error, or one of ours for capturing where nothing can be added? Whoever
      # runs without the capture and not with it is stuck.
      stuck = [n for n, path in self.wanted.items() if not self.traces(call, [path])]
      if not stuck or not self.traces(call, []):
        raise
      raise ValueError(self.explain_stuck(stuck, call)) from error
    outputs = self.outputs(call, ran.out, ran.sown)
    state = _nnx_graph.updated(self.slots, ran.module, self.name) if call.train else {}
    return outputs, state, ran.drawn

  def traces(self, call: Call, wanted: Sequence[Path]) -> bool:
    """Whether the module runs, abstractly, while these are captured."""
    try:
      self.capture(call, functools.partial(_nnx_graph.find_taps, wanted))
    except Exception:
      return False
    return True

  def capture(self, call: Call, taps: _Taps) -> tuple[dict[str, Any], list[Tap]]:
    """Runs the module abstractly: the shapes of what is captured, and the modules watched."""
    # Filled while tracing: a captured value can't leave eval_shape but as a shape.
    seen: list[Tap] = []
    shapes: dict[str, Any] = {}

    def body(variables: PyTree, inputs: Any, key: Any) -> int:
      ran = self.run(Call(variables, inputs, call.train, key), taps)
      seen.extend(ran.taps)
      shapes.update(_features.names(ran.sown))
      return 0

    jax.eval_shape(body, call.variables, call.inputs, call.key)
    return shapes, seen

  def run(self, call: Call, find: _Taps) -> _Ran:
    # A module of this call's own; the user's is never written to.
    module = _nnx_graph.build(self.graph, self.slots, call.variables, call.key, self.name)
    module = _nnx_graph.set_flags(module, self.flags, self.auto, call.train)
    for path, node in flax_nnx.iter_modules(module) if self.resting else ():
      if "/".join(map(str, path)) in self.resting and hasattr(node, "use_running_average"):
        node.use_running_average = True
    told: dict[str, Any] = {f.name: call.train != f.inverted for f in self.flags if f.argument}
    if "rngs" in list(self.signature.parameters)[1:]:
      told["rngs"] = flax_nnx.Rngs(_nnx_graph.stream_key(call.key, len(self.slots)))
    args, keywords = _features.bind(self.signature, call.inputs, self.arguments, told, self.name)
    streams = {"": module, "rngs": told.get("rngs")}
    # Without a key nobody may draw: the streams are watched, and `apply` says who did.
    drawn = _nnx_graph.drawn(streams) if call.key is None else set()

    def method() -> Any:
      if callable(self.method):
        return self.method(module, *args, **keywords)
      return getattr(module, self.method or "__call__")(*args, **keywords)

    found = find(module)
    out, sown = _nnx_graph.run_tapped(module, method, found)
    return _Ran(module, out, sown, drawn, found)

  def survey(self, call: Call) -> tuple[dict[str, Any], dict[str, set[str]], dict[str, Hidden]]:
    output = frozenset({"__call__"})

    def every(module: flax_nnx.Module) -> list[Tap]:
      return [
        Tap(tuple(map(str, path)), node, output if path else frozenset())
        for path, node in flax_nnx.iter_modules(module)
      ]

    try:
      shapes, seen = self.capture(call, every)
    except (TypeError, ValueError):
      # Some transform allows no capture inside it: one module after the other shows which.
      shapes, seen = {}, []
      counts: list[int] = []

      def none(module: flax_nnx.Module) -> list[Tap]:
        counts.append(len(every(module)))
        return []

      def one_module(i: int, module: flax_nnx.Module) -> list[Tap]:
        return every(module)[i : i + 1]

      self.capture(call, none)
      for i in range(counts[0]):
        with contextlib.suppress(TypeError, ValueError):
          more, tapped = self.capture(call, functools.partial(one_module, i))
          shapes.update(more)
          seen += tapped
    # A module that ran, and of whose output nothing came out, is inside a transform that hides it.
    called = {"/".join(tap.path): _nnx_graph.watched(tap) for tap in seen}
    hidden = [
      path
      for path, methods in called.items()
      if path and "__call__" in methods and not any(n.split(":")[0] == path for n in shapes)
    ]
    # What is inside a hidden module is hidden by the same transform.
    outer = [p for p in hidden if not any(_features.inside(p, q) for q in hidden if q != p)]
    return shapes, called, dict.fromkeys(outer, _HIDDEN)

  def explain_stuck(self, stuck: Sequence[str], call: Call) -> str:
    where = [self.wanted[name].path for name in stuck]
    lines = [
      f"{self.name}: {where} can't be captured: inside a transform whose branches or carry keep "
      "their structure (nnx.cond, nnx.switch, nnx.while_loop, a module carried by nnx.scan), "
      "nothing can be added."
    ]
    return "\n".join(lines + _features.listed(self.survey(call)[0]))

  def explain_stream(self, drawn: set[str], train: bool) -> str:
    told = {flag.name for flag in self.flags} | ({"eval()"} if self.auto else set())
    return self.explain_draw(f"the random streams {sorted(drawn)}", list(told), train)
