"""Adapters: modules that nobody here wrote become a `jaxdistill.types.Network`, unchanged.

Foreign modules differ in the name of their train flag, their random streams, their inputs and where
their logits are; all four are arguments of `linen`. Features are taken where the module sows them,
or at any submodule's output.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.errors
import flax.linen as nn
import jax

from jaxdistill import _check
from jaxdistill.networks import _features
from jaxdistill.networks._features import Call, Path
from jaxdistill.types import Network, Outputs

__all__ = ["linen", "linen_features"]

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
  logits: Callable[[Any], Any] | None = None,
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
      attribute, else not at all. Any other string names the argument or attribute; ``"not
      frozen"`` inverts one. None: not at all.
    rngs: the random streams that the module draws from in training.
    arguments: ``inputs -> tuple`` of positional or ``dict`` of keyword arguments, for several
      inputs; by default ``inputs`` is the one positional argument.
    logits: finds the logits in what the module returns. By default that is an array, or has a key
      or an attribute ``logits``.
    method: the method to call instead of ``__call__``; its name, or a function of the module.
    name: for messages and reports; the module's class by default.

  Returns:
    The network. Its ``init`` gives parameters as ``module.init(key, ...)`` would, unboxed where
    they carry names of axes (``nn.with_partitioning``); its ``apply`` gives each random stream a
    key of its own, and none when ``key`` is None.

  Raises:
    ValueError: a feature is named twice or not at all, or the module has no such train flag.

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
  )
  return Network(init=adapter.init, apply=adapter.apply, name=adapter.name)


def linen_features(network: Network | nn.Module, inputs: Any) -> dict[str, Any]:
  """What can be captured from a network, by abstract evaluation only.

  Args:
    network: from `linen`, or a Linen module that `linen` understands without further arguments.
    inputs: what the network sees, or its shapes (``jax.ShapeDtypeStruct``).

  Returns:
    Names that `linen` takes as ``features``, each with its shape; a tuple or a dict of shapes where
    a `Path` has to say which ``element``. What is hidden in a lifted transform is not among them.

  Raises:
    ValueError: ``network`` was not made by `linen`.

  >>> found = linen_features(nn.Sequential([nn.Dense(4), nn.Dense(3)]), jax.numpy.ones((2, 5)))
  >>> found["layers_0"].shape
  (2, 4)
  """
  if isinstance(network, nn.Module):
    network = linen(network)
  if not isinstance(network, Network):
    raise TypeError(f"network must be from networks.linen, got {_check.show(network)}.")
  adapter = getattr(network.apply, "__self__", None)
  if not isinstance(adapter, _Adapter):
    raise ValueError(
      f"network {network.name!r} was not made by networks.linen; give that one, or the Linen "
      "module."
    )

  key = jax.eval_shape(lambda: jax.random.key(0))
  variables = jax.eval_shape(adapter.variables, key, inputs)
  return adapter.survey(Call(variables, inputs, False, key))[0]


@dataclasses.dataclass(frozen=True, eq=False)
class _Adapter:
  """A module and how to call it; ``init`` and ``apply`` are the network's."""

  module: nn.Module
  wanted: dict[str, Path]
  signature: inspect.Signature
  flags: dict[str, tuple[bool, bool]]  # name -> (is an argument, is inverted)
  rngs: tuple[str, ...]
  arguments: Callable[[Any], Any] | None
  logits: Callable[[Any], Any] | None
  method: str | Callable[..., Any] | None
  name: str

  def init(self, key: Any, inputs: Any) -> dict[str, PyTree]:
    variables = self.variables(key, inputs)
    collections = [name for name in variables if name != "params"]

    def check(variables: PyTree, inputs: Any, key: Any) -> PyTree:
      # In inference mode, since a BatchNorm with an axis name can't train outside of `pmap`.
      call = Call(variables, inputs, False, key)
      out, state = self.run(call, collections)
      self.outputs(call, out, state)
      return {name: state[name] for name in collections if name in state}

    after = jax.eval_shape(check, variables, inputs, key)
    return {name: v for name, v in variables.items() if not _grew(v, after.get(name, v))}

  def apply(
    self, variables: Mapping[str, PyTree], inputs: Any, *, train: bool, key: Any = None
  ) -> tuple[Outputs, dict[str, PyTree]]:
    # Left-over intermediates would be the first of several values.
    variables = {name: value for name, value in variables.items() if name != _SOWN}
    mutable = [name for name in variables if name != "params"] if train else []
    call = Call(variables, inputs, train, key)
    out, state = self.run(call, mutable)
    updated = {n: v for n, v in state.items() if n in mutable and not _grew(variables[n], v)}
    return self.outputs(call, out, state), updated

  def variables(self, key: Any, inputs: Any) -> dict[str, PyTree]:
    # In training mode, since some modules make their auxiliary heads only then.
    module, args, keywords = self.bind(inputs, train=True)
    mutable = nn.DenyList((_SOWN, "perturbations"))
    keys = {"params": key, **self.streams(key)}
    made = module.init(keys, *args, method=self.method, mutable=mutable, **keywords)
    # Names of axes are for model parallelism; boxed, arrays would not be where their names say.
    return {"params": {}, **nn.unbox(made)}

  def streams(self, key: Any) -> dict[str, Any]:
    names = () if key is None else self.rngs
    return {name: jax.random.fold_in(key, i) for i, name in enumerate(names)}

  def bind(self, inputs: Any, train: bool) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    told = {n: (argument, train != inverted) for n, (argument, inverted) in self.flags.items()}
    flags = {name: value for name, (argument, value) in told.items() if argument}
    args, keywords = _features.bind(self.signature, inputs, self.arguments, flags, self.name)
    attributes: dict[str, Any] = {n: value for n, (argument, value) in told.items() if not argument}
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
    except flax.errors.InvalidRngError as error:
      raise ValueError(self.explain_stream(str(error), call)) from error
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

  def outputs(self, call: Call, out: Any, state: Mapping[str, PyTree]) -> Outputs:
    sown = state.get(_SOWN, {})
    missing = [name for name, path in self.wanted.items() if _features.find(sown, path) is None]
    if missing:
      raise ValueError(self.explain_missing(missing, call))
    features = {
      name: _features.pick(sown, path, f"{self.name}: feature {name!r}")
      for name, path in self.wanted.items()
    }
    return Outputs(logits=_features.logits(out, self.logits, self.name), features=features)

  def survey(self, call: Call) -> tuple[dict[str, Any], dict[str, set[str]], dict[str, str]]:
    """Runs the module abstractly and captures every submodule's output.

    Returns:
      ``(shapes by name, methods called by path, lifted class by the path that it hides)``.
    """
    called: dict[str, set[str]] = {}
    hidden: dict[str, str] = {}
    lifted: dict[str | None, str] = {}
    shapes: dict[str, Any] = {}

    def visit(module: nn.Module, method: str) -> bool:
      path = "/".join(module.path)
      if type(module).__module__ == nn.transforms.__name__:
        # Flax checks a lifted module's setup before the module inside takes its place.
        lifted[module.name] = type(module).__name__
      if method in ("setup", "<lambda>"):
        return False
      called.setdefault(path, set()).add(method)
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
    outer = {p: c for p, c in hidden.items() if not any(_inside(p, q) for q in hidden if q != p)}
    return shapes, called, outer

  def explain_missing(self, missing: Sequence[str], call: Call) -> str:
    shapes, called, hidden = self.survey(call)
    lines = [f"{self.name}: {len(missing)} of the features can't be found."]
    for name in missing:
      path, method = self.wanted[name].path, self.wanted[name].method
      label = repr(name) if name == path else f"{name!r} (at {path!r})"
      around = next((outer for outer in hidden if _inside(path, outer)), None)
      if around is not None:
        what = repr(around) if around else "the module"
        lines.append(
          f"{label}: {what} runs inside {_transform(hidden[around])}, which does not lift "
          "'intermediates', so that captures vanish; add 'intermediates': 0 to its variable_axes."
        )
      elif path in called:
        lines.append(
          f"{label}: the submodule is called by {sorted(called[path])}, not by {method!r}; give "
          f"Path({path!r}, method=...)."
        )
      else:
        lines.append(f"{label}: nothing of that name is sown, and no such submodule is called.")
    lines.append("Available:" if shapes else "Nothing is available.")
    lines += [f"  {name} {_check.shapes(shape)}" for name, shape in shapes.items()]
    lines += [f"Hidden in {_transform(lift)}: {path or 'all'}" for path, lift in hidden.items()]
    return "\n".join(lines)

  def explain_stream(self, error: str, call: Call) -> str:
    stream = error.partition('PRNG for "')[2].partition('"')[0]
    draws = f"{self.name} draws from the random stream {stream!r}"
    if call.key is not None:
      return f"{draws}, which is not in rngs={self.rngs!r}; give rngs={(*self.rngs, stream)!r}."
    if call.train:
      return f"{draws} in training; give apply a key."
    told = sorted(self.flags) or "no flag"
    return (
      f"{draws} even with train=False, which it is told by {told}; name its own flag with "
      "train_flag=..., or give apply a key if it is meant to be random."
    )


def _flags(
  module: nn.Module, signature: inspect.Signature, train_flag: str | None
) -> dict[str, tuple[bool, bool]]:
  taken = list(signature.parameters)[1:]
  anything = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
  attributes = [f.name for f in dataclasses.fields(module) if f.init and f.name != "parent"]
  if train_flag is None:
    return {}
  if train_flag == "auto":
    known = _features.TRAIN_FLAGS
    arguments = {n: (True, inverted) for n, inverted in known.items() if n in taken}
    # An attribute of such a name may be something else than a flag.
    switches = [n for n in attributes if isinstance(getattr(module, n), bool | None)]
    return arguments or {n: (False, i) for n, i in known.items() if n in switches}
  name, inverted = _features.parse_flag(train_flag)
  if name in taken or (anything and name not in attributes):
    return {name: (True, inverted)}
  if name in attributes:
    return {name: (False, inverted)}
  raise ValueError(
    f"train_flag={train_flag!r}: {type(module).__name__} has no such argument or attribute; its "
    f"method takes {taken}, its attributes are {attributes}."
  )


def _inside(path: str, outer: str) -> bool:
  return not outer or path == outer or path.startswith(f"{outer}/")


def _grew(before: PyTree, after: PyTree) -> bool:
  """Whether a collection changed in the lengths of its tuples only: the module sows into it."""

  def outline(tree: PyTree, leaf: type | tuple[()]) -> Any:
    return jax.tree.structure(tree, is_leaf=lambda node: isinstance(node, leaf))

  same = outline(before, ()) == outline(after, ())
  return not same and outline(before, tuple) == outline(after, tuple)


def _transform(lifted: str) -> str:
  for word in ("Scan", "Vmap"):
    if word in lifted:
      return f"nn.{word.lower()} ({lifted})"
  return f"a lifted transform (nn.scan, nn.vmap; {lifted or 'a function of the module'})"
