"""A network whose backward pass computes again what it would have kept: memory for time.

Modules with blocks of their own say so inside (`flax.linen.remat`; ``DecoderConfig(remat="block")``
of ours). `remat` does it from outside, for modules that nobody here wrote, by what a network can
say of itself: its features, as places between which all is computed again; or its products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.extend.core import Literal as Constant

from jaxdistill import _check
from jaxdistill.types import Network, Outputs

__all__ = ["remat"]

PyTree = Any


def remat(network: Network, *, keep: Literal["dots"] | Sequence[str] = "dots") -> Network:
  """A network that keeps less for its backward pass, and computes the rest again.

  Values, gradients, statistics, features and what is drawn by keys are those of the network, to
  rounding. In evaluation it is the network as it is. Weights that are in parts on several devices
  (`jaxdistill.train.fsdp`) are gathered again too, so that no device keeps all of them. A CPU's
  compiler merges the two computations and saves nothing; those of a GPU and a TPU keep them apart
  (`jaxdistill.train.memory` says what is saved).

  Args:
    network: from `networks.linen` or `networks.nnx`, or of your own.
    keep: ``"dots"`` keeps the results of products with weights, which are most of the work, and
      computes the rest again (norms, activations, attention's own products; of convolutions,
      which count as no such products, nothing is kept). Or features of the network,
      ``["block1", "block2"]``: what lies before each of them, back to the one before, is computed
      again, one part after the other, so that the activations of the longest part are there at
      any time, and beside them the features. What comes after the last one is kept. A feature from
      inside a loop over layers (``nn.scan``) is there at the end of the loop alone, which is then
      one part.

  Returns:
    The network, with the same variables and the same name.

  Raises:
    TypeError: ``network`` is none, or ``keep`` is neither of the two.
    ValueError: ``keep`` is empty; or, where it is traced in training, the network has no such
      feature.

  Source: Chen, Xu, Zhang, Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016.

  >>> import flax.linen as nn
  >>> from jaxdistill.networks import linen
  >>> module = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(4), nn.relu, nn.Dense(3)])
  >>> network = remat(linen(module, features=["layers_2"]), keep=["layers_2"])
  >>> variables = network.init(jax.random.key(0), jax.numpy.ones((2, 5)))
  >>> network.apply(variables, jax.numpy.ones((2, 5)), train=True)[0].logits.shape
  (2, 3)
  """
  if not isinstance(network, Network):
    raise TypeError(
      f"network must be a Network, got {_check.show(network)}; give networks.linen(module, ...)."
    )
  kept = _checked(keep)

  def apply(
    variables: Mapping[str, PyTree], inputs: Any, *, train: bool, key: Any = None
  ) -> tuple[Outputs, dict[str, PyTree]]:
    if not train:
      return network.apply(variables, inputs, train=False, key=key)

    def run(variables: Mapping[str, PyTree], inputs: Any, key: Any) -> Any:
      return network.apply(variables, inputs, train=True, key=key)

    if kept:
      return _in_parts(run, kept, network.name, variables, inputs, key)
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    made: tuple[Outputs, dict[str, PyTree]] = jax.checkpoint(run, policy=policy)(
      variables, inputs, key
    )
    return made

  rest, use = network.at_rest, network.at_use
  return Network(
    network.init,
    apply,
    network.name,
    None if rest is None else lambda paths: remat(rest(paths), keep=keep),
    network.axes,
    None if use is None else lambda *how: remat(use(*how), keep=keep),
  )


def _checked(keep: Any) -> tuple[str, ...]:
  """The features; none for products."""
  if keep == "dots":
    return ()
  names = keep if isinstance(keep, Sequence) and not isinstance(keep, str) else [None]
  if not all(isinstance(name, str) for name in names):
    raise TypeError(f"keep={_check.show(keep)} must be 'dots', or names of features in a list.")
  if not names:
    raise ValueError("keep is empty: name features of the network, or take keep='dots'.")
  return tuple(names)


def _in_parts(run: Callable[..., Any], kept: Sequence[str], name: str, *args: Any) -> Any:
  """Runs a network's operations in parts that end with features; each keeps what it was given."""
  traced, shapes = jax.make_jaxpr(run, return_shape=True)(*args)
  tree, jaxpr = jax.tree.structure(shapes), traced.jaxpr
  features = jax.tree.unflatten(tree, jaxpr.outvars)[0].features
  unknown = sorted(set(kept) - set(features))
  if unknown:
    raise ValueError(
      f"keep has {unknown}, and {name} puts out the features {sorted(features)}: name them in "
      "features= of its adapter, networks.linen(module, features=[...])."
    )
  made_by = {var: i for i, equation in enumerate(jaxpr.eqns) for var in equation.outvars}
  wanted = [var for feature in kept for var in jax.tree.leaves(features[feature])]
  ends = sorted({made_by[var] + 1 for var in wanted if _is_variable(var) and var in made_by})
  values = dict(zip(jaxpr.constvars, traced.consts, strict=True))
  values |= dict(zip(jaxpr.invars, jax.tree.leaves(args), strict=True))
  starts = [0, *ends]
  for start, end in zip(starts, [*ends, len(jaxpr.eqns)], strict=True):
    part = jaxpr.eqns[start:end]
    later = {v for equation in jaxpr.eqns[end:] for v in equation.invars if _is_variable(v)}
    later |= {v for v in jaxpr.outvars if _is_variable(v)}
    outs = [v for equation in part for v in equation.outvars if v in later]
    within = {v for equation in part for v in equation.outvars}
    read = {v: None for equation in part for v in equation.invars if _is_variable(v)}
    given = [v for v in read if v not in within]
    inner = jaxpr.replace(constvars=[], invars=given, outvars=outs, eqns=part)
    compute = jaxpr_as_fun(ClosedJaxpr(inner, []))
    # The last part's activations are read at once: to compute them again would save nothing.
    compute = compute if end == len(jaxpr.eqns) else jax.checkpoint(compute)
    values |= dict(zip(outs, compute(*[values[v] for v in given]), strict=True))
  found = [values[v] if _is_variable(v) else v.val for v in jaxpr.outvars]
  return jax.tree.unflatten(tree, found)


def _is_variable(atom: Any) -> bool:
  return not isinstance(atom, Constant)
