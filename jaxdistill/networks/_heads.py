"""A language model that nobody here wrote, as hidden states and a head in the place of logits.

Modules return logits, and those of a large vocabulary are what memory goes to. What they are made
of is inside: the input of the last linear map, which an adapter captures as a feature, and the
map's parameters. `with_head` puts the two where `jaxdistill.train.in_chunks`, the metrics of tokens
and the decoder of ours have them; a compiler drops the logits, which nobody reads any more.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

from jaxdistill import _check
from jaxdistill.types import Head, Network, Outputs

__all__ = ["with_head"]

PyTree = Any
# Of the largest logit. A product in bfloat16 is off by less, a bias, a scale or a softcap that was
# left out by more.
_APART = 0.02
# Logits of about 1, in which a bias shows, and of about 100, in which a softcap does.
_SIZES = (1.0, 100.0)


def with_head(network: Network, *, hidden: str, head: Callable[[PyTree], Head]) -> Network:
  """A language model's network that puts out hidden states and its head, and no logits.

  So ``train.with_jit(tokens_at_once=...)`` takes it, and evaluation never has its logits all at
  once. What the two make is compared with what the module itself returns, on made-up numbers, by
  ``init`` and whenever ``apply`` is traced: a head without its module's bias, scale or softcap
  would train another network than the one that is deployed, and nothing would show it.

  In training the module's own steps from ``hidden`` to its logits are not taken: where it drops out
  there, name the dropout's output.

  Args:
    network: from `networks.linen` or `networks.nnx`, with a feature ``[B, L, D]`` that is the input
      of its last linear map.
    hidden: that feature's name.
    head: ``params -> Head``: the last linear map as `jaxdistill.types.Head` has it, made of the
      network's parameters (``variables["params"]``) without a computation, so that it gets their
      gradients and no copy is held.

  Returns:
    The network, with the same variables.

  Raises:
    TypeError: ``network`` is none, or ``head`` no function, or it returns something else.
    ValueError: there is no such feature, the network has no logits, they depend on more than on
      ``hidden``, or ``head`` makes others of it.

  >>> import flax.linen as nn
  >>> from jaxdistill.networks import linen
  >>> module = nn.Sequential([nn.Embed(11, 4), nn.LayerNorm(), nn.Dense(11)])
  >>> network = with_head(
  ...   linen(module, features={"last": "layers_1"}),
  ...   hidden="last",
  ...   head=lambda params: Head(params["layers_2"]["kernel"], bias=params["layers_2"]["bias"]),
  ... )
  >>> tokens = jnp.zeros((2, 3), jnp.int32)
  >>> variables = network.init(jax.random.key(0), tokens)
  >>> outputs, _ = network.apply(variables, tokens, train=False, key=None)
  >>> outputs.logits is None, outputs.hidden.shape, outputs.head(outputs.hidden).shape
  (True, (2, 3, 4), (2, 3, 11))
  """
  if not isinstance(network, Network):
    raise TypeError(
      f"network must be a Network, got {_check.show(network)}; give networks.linen(module, ...)."
    )
  _check.function("head", head, "params -> Head", arguments=1)
  return _Headed(network, hidden, head).made()


@dataclasses.dataclass(frozen=True, eq=False)
class _Headed:
  """What `with_head` makes a network of."""

  network: Network
  hidden: str
  head: Callable[[PyTree], Head]
  # Where parameters are taken as they lie on a mesh: what was compared before, and how.
  compared: _Headed | None = None
  taken: Callable[[PyTree], PyTree] = lambda params: params

  def made(self) -> Network:
    rest, use = self.network.at_rest, self.network.at_use
    return Network(
      self.init,
      self.apply,
      self.network.name,
      None if rest is None else lambda paths: self.at_rest(rest(paths)),
      self.network.axes,
      None if use is None else lambda specs, read: self.at_use(use(specs, read), specs, read),
    )

  def at_rest(self, network: Network) -> Network:
    return dataclasses.replace(self, network=network, compared=None).made()

  def at_use(self, network: Network, specs: Mapping[str, Any], read: Any) -> Network:
    def taken(params: PyTree) -> PyTree:
      def place(path: Any, leaf: Any) -> Any:
        spec = specs.get(f"params/{jax.tree_util.keystr(path, simple=True, separator='/')}")
        return leaf if spec is None else read(leaf, spec)

      return jax.tree_util.tree_map_with_path(place, params)

    before = self.compared or self
    return dataclasses.replace(self, network=network, compared=before, taken=taken).made()

  def init(self, key: Any, inputs: Any) -> dict[str, PyTree]:
    variables = self.network.init(key, inputs)
    self.check(variables, inputs)
    return variables

  def apply(
    self, variables: Mapping[str, PyTree], inputs: Any, *, train: bool, key: Any = None
  ) -> tuple[Outputs, dict[str, PyTree]]:
    self.check(variables, inputs)
    outputs, state = self.network.apply(variables, inputs, train=train, key=key)
    found = outputs.features[self.hidden]
    head = self.head(self.taken(variables["params"]))
    return dataclasses.replace(outputs, logits=None, hidden=found, head=head), state

  def check(self, variables: Mapping[str, PyTree], inputs: Any) -> None:
    """Compares the two ways to logits, once for each shape of the variables and inputs."""
    leaves, tree = jax.tree.flatten((dict(variables), inputs))
    kinds = tuple((jnp.shape(leaf), getattr(leaf, "dtype", None)) for leaf in leaves)
    # An export's sizes may be unknowns, of what was compared before.
    if all(isinstance(size, int) for shape, _ in kinds for size in shape):
      _compared(self.compared or self, tree, kinds)


@functools.lru_cache(maxsize=64)
def _compared(headed: _Headed, tree: Any, kinds: tuple[tuple[Any, Any], ...]) -> None:
  """Raises where the module's logits and those of the head differ."""
  name = headed.network.name
  shapes = [jax.ShapeDtypeStruct(shape, dtype or jnp.result_type(float)) for shape, dtype in kinds]
  variables, inputs = jax.tree.unflatten(tree, shapes)
  outputs = jax.eval_shape(_plain(headed), variables, inputs)
  _check_outputs(headed, outputs)

  def both(params: PyTree, rest: Any, inputs: Any) -> tuple[Any, Any, Any]:
    made = _plain(headed)({**rest, "params": params}, inputs)
    hidden = made.features[headed.hidden]
    try:
      head = headed.head(params)
    except KeyError as error:
      raise ValueError(
        f"head finds no {error} in the parameters of {name}, which has {sorted(params)}."
      ) from error
    if not isinstance(head, Head):
      raise TypeError(f"head returns {_check.show(head)} for {name}; it must return a types.Head.")
    try:
      return hidden, made.logits, head(hidden)
    except TypeError as error:
      raise ValueError(
        f"head= of {name} has a kernel {jnp.shape(head.kernel)} with transposed={head.transposed}, "
        f"which does not take hidden={headed.hidden!r} {hidden.shape}: [D, V], or [V, D] and "
        "transposed=True where it is an embedding."
      ) from error

  rest = {key: value for key, value in variables.items() if key != "params"}
  few = _one_row(inputs, outputs.features[headed.hidden].shape)
  with jax.default_matmul_precision("highest"):
    traced = jax.make_jaxpr(both)(variables["params"], rest, few)
    hidden, *ways = traced.jaxpr.outvars
    if ways[0].aval.shape != ways[1].aval.shape:
      raise ValueError(
        f"{name} puts out logits {ways[0].aval.shape}, and those of head= are of the shape "
        f"{ways[1].aval.shape}: is its kernel the last map's?"
      )
    behind = _behind(traced.jaxpr, hidden, ways)
    if behind is None:  # one compiled piece: there is no looking between
      return
    equations, needed = behind
    known = set(traced.jaxpr.invars[: len(jax.tree.leaves(variables["params"]))])
    if needed - known - set(traced.jaxpr.constvars):
      raise ValueError(
        f"the logits of {name} depend on more than on hidden={headed.hidden!r}: name the feature "
        "that its last linear map is applied to."
      )
    # Now, whatever is being traced around it, and with numbers that nothing else depends on.
    with jax.ensure_compile_time_eval():
      apart = max(_apart(traced, equations, needed, hidden, ways, size) for size in _SIZES)
  if not apart <= _APART:
    raise ValueError(
      f"head= makes other logits of hidden={headed.hidden!r} than {name} does, {apart:.0%} of the "
      "largest apart: give types.Head the bias, scale and softcap that the module has (and hidden "
      "what the last map is applied to, not what is before a norm)."
    )


def _plain(headed: _Headed) -> Callable[[Any, Any], Outputs]:
  return lambda variables, inputs: headed.network.apply(variables, inputs, train=False, key=None)[0]


def _check_outputs(headed: _Headed, outputs: Outputs) -> None:
  """Raises where there is no such feature, or nothing to compare it with."""
  name, there = headed.network.name, outputs.features
  if headed.hidden not in there:
    raise ValueError(
      f"hidden={headed.hidden!r} is no feature of {name}, which has {sorted(there)}: name the "
      "input of its last linear map in features= of its adapter."
    )
  if outputs.logits is None:
    raise ValueError(f"{name} puts out no logits that hidden={headed.hidden!r} could stand for.")
  shape = there[headed.hidden].shape
  if len(shape) != 3 or shape[:2] != outputs.logits.shape[:-1]:
    raise ValueError(
      f"hidden={headed.hidden!r} of {name} is {shape} where its logits are "
      f"{outputs.logits.shape}: it must be [B, L, D] for [B, L, V]."
    )


def _one_row(inputs: Any, shape: tuple[int, ...]) -> Any:
  """The shapes of one example's inputs, since the logits are built here."""

  def cut(leaf: Any) -> Any:
    batch = leaf.shape[:1] == shape[:1]
    return jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype) if batch else leaf

  return jax.tree.map(cut, inputs)


def _behind(jaxpr: Any, hidden: Any, wanted: Sequence[Any]) -> tuple[list[Any], set[Any]] | None:
  """The equations from a value to others, in order, and what else they read; None if inseparable.

  Args:
    jaxpr: of a program.
    hidden: one of its variables.
    wanted: others, which are computed of it.
  """
  needed = {one for one in wanted if not isinstance(one, Literal) and one is not hidden}
  found = []
  for equation in reversed(jaxpr.eqns):
    if needed.isdisjoint(equation.outvars):
      continue
    if hidden in equation.outvars:
      return None
    found.append(equation)
    needed -= set(equation.outvars)
    needed |= {v for v in equation.invars if not isinstance(v, Literal) and v is not hidden}
  return found[::-1], needed


def _apart(
  traced: Any,
  equations: Sequence[Any],
  needed: Collection[Any],
  hidden: Any,
  ways: Sequence[Any],
  size: float,
) -> float:
  """How far apart the two ways are, of the largest, where hidden states make logits of a size."""
  constants = dict(zip(traced.jaxpr.constvars, traced.consts, strict=True))
  values = {v: constants[v] if v in constants else _made_up(v.aval) for v in needed}
  start = _made_up(hidden.aval) * np.asarray(size * hidden.aval.shape[-1] ** -0.5, np.float32)
  values[hidden] = start.astype(hidden.aval.dtype)
  part = traced.jaxpr.replace(invars=[*values], constvars=[], outvars=[*ways], eqns=[*equations])
  run = jax.jit(jaxpr_as_fun(ClosedJaxpr(part, [])))
  theirs, ours = (one.astype(jnp.float32) for one in run(*values.values()))
  return float(jnp.max(jnp.abs(theirs - ours)) / jnp.max(jnp.abs(theirs)))


def _made_up(shape: Any) -> np.ndarray:
  """Numbers of about 1; a few thousand over and over, since a head has hundreds of millions."""
  few = np.random.default_rng(0).normal(size=10_007)  # a prime, so that no two rows are the same
  return np.resize(few, shape.shape).astype(shape.dtype)
