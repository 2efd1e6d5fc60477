"""optax's protocols, whole: what an optimiser sees, is handed, and would have evaluated.

An optimiser is two functions, but more than the gradient may be asked of a step: the loss and a way
to evaluate it again (line searches), or that other parameters than the trained ones be evaluated
(schedule-free, lookahead). All that the trainer knows of optax's own states is in this file.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from optax.contrib import DifferentiallyPrivateAggregateState, SAMState, ScheduleFreeState

from jaxdistill import _check
from jaxdistill.train._zeros import zero_outputs

__all__ = [
  "TermsApart",
  "Transformation",
  "begin",
  "evaluated",
  "evaluates_others",
  "grouped_terms",
  "is_optimizer",
  "masked",
  "term_groups",
  "unmoved",
  "update",
]

PyTree = Any
# An optimiser as optax has them: `optax.MultiSteps` is an object of its own.
Transformation = optax.GradientTransformation | optax.MultiSteps
# ``{"student": parameters, "objective": parameters}``: what a step takes the gradient of.
Trained = dict[str, PyTree]
_FAILURES = (TypeError, ValueError, KeyError, AttributeError, IndexError)


class _Lookahead(NamedTuple):
  """`optax.lookahead` trains pairs: the fast parameters are the step's, the slow ones lie here."""

  slow: PyTree
  inner: Any


@flax.struct.dataclass
class TermsApart:
  """In an optimiser's state: it wants the gradients of some of the objective's terms by themselves.

  Its ``update`` is then called with the keyword ``gradients``: a list of trees like the gradient,
  which is their sum, one of each group of terms and one of all other terms. A node without leaves:
  nothing is computed for it but what it asks for, a pass back through the network for each group.

  Attributes:
    groups: names of terms; ``"labels"`` is also the term ``"small/labels"`` of a cohort's member.
  """

  groups: tuple[tuple[str, ...], ...] = flax.struct.field(pytree_node=False)


_EVALUATED = (_Lookahead, SAMState, ScheduleFreeState)


def is_optimizer(given: Any) -> bool:
  """Whether it is an optimiser: any object with ``init`` and ``update``, as `optax.MultiSteps`."""
  return all(callable(getattr(given, name, None)) for name in ("init", "update"))


def begin(optimizer: Any, trained: Trained) -> Any:
  """The optimiser's state at step 0.

  It sees the student's parameters as the network has them, so masks and labels are those of the
  model's own tree; what the objective trains besides lies under one more key, ``"objective"``.

  Args:
    optimizer: any object with ``init`` and ``update``.
    trained: the parameters.

  Raises:
    ValueError: the optimiser does not start on these parameters, or asks for what no step has.
  """
  tree = _joined(trained)
  pair = optax.LookaheadParams.init_synced(tree)
  if _holds(optax.LookaheadState, optimizer.init, pair):
    return _Lookahead(tree, optimizer.init(pair))
  try:
    state = optimizer.init(tree)
  except _FAILURES as error:
    alone = trained["student"]
    if tree is not alone and _holds(object, optimizer.init, alone):
      raise ValueError(
        "the optimizer's masks or labels are for the student's parameters alone, and the objective "
        'trains some of its own, which lie beside them under "objective". Say what is to become of '
        f'those: {{**mask, "objective": True}}, say, or {{**labels, "objective": "adam"}}. '
        f"({_check.short(error)})"
      ) from error
    raise ValueError(
      f"the optimizer does not start on the parameters, {_outline(tree)}: {_check.short(error)}"
    ) from error
  if _found(state, optax.LookaheadState):
    raise ValueError(
      "optax.lookahead trains pairs of parameters, for which masks and labels are not made; put "
      "them inside: optax.lookahead(optax.masked(...), ...)."
    )
  if _found(state, DifferentiallyPrivateAggregateState):
    raise ValueError(
      "the optimizer (optax.contrib.dpsgd) takes each example's gradient by itself, and a training "
      "step has that of the batch's mean; train with it in a loop of your own, around "
      "jaxdistill.losses."
    )
  if any(term_groups(one.inner_opt_state) for one in _found(state, optax.MultiStepsState)):
    raise ValueError(
      "the optimizer takes the gradients of some terms apart, and optax.MultiSteps around it would "
      "hand on those of its last batch alone; let the step add batches up, with_jit(accumulate=...)"
    )
  term_groups(state)
  try:
    jax.eval_shape(evaluated, state, trained)
  except _FAILURES as error:
    raise ValueError(
      "the optimizer has other parameters evaluated than it trains (schedule-free, SAM), and keeps "
      "them in another form: put what changes it (optax.flatten) inside, as in "
      f"schedule_free(optax.flatten(optimizer), ...). ({_check.short(error)})"
    ) from error
  return state


def term_groups(state: Any) -> tuple[tuple[str, ...], ...]:
  """The groups of terms of which an optimiser wants the gradients apart, by its state; mostly none.

  Raises:
    ValueError: parts of it want different ones.
  """
  found = {one.groups for one in _found(state, TermsApart)}
  if len(found) > 1:
    raise ValueError(f"parts of the optimizer want other terms apart, {sorted(found)}: name one.")
  return found.pop() if found else ()


def grouped_terms(
  terms: Mapping[str, Any], groups: tuple[tuple[str, ...], ...]
) -> list[dict[str, Any]]:
  """The terms of each group, and all others; all of them together where there is no group.

  Raises:
    ValueError: a group is empty.

  >>> grouped_terms({"labels": 1, "soft": 2, "hint": 3}, (("labels",),))
  [{'labels': 1}, {'soft': 2, 'hint': 3}]
  """
  rest, made = dict(terms), []
  for group in groups:
    mine = {n: term for n, term in rest.items() if n in group or n.rpartition("/")[2] in group}
    if not mine:
      raise ValueError(
        f"the optimizer wants the gradient of {list(group)} apart, and the objective has the terms "
        f"{sorted(terms)}: name those of the labels, train.optimizers.dot(apart=[...])."
      )
    rest = {name: term for name, term in rest.items() if name not in mine}
    made.append(mine)
  return [*made, rest]


def update(
  optimizer: Any,
  parts: Sequence[Trained],
  state: Any,
  trained: Trained,
  *,
  value: jax.Array,
  loss: Callable[[Trained], jax.Array],
) -> tuple[Trained, Any]:
  """The parameters after a step, and the optimiser's state.

  Args:
    optimizer: any object with ``init`` and ``update``.
    parts: gradients of the global batch, whose sum is the loss's: one, or those of `term_groups`.
    state: the optimiser's.
    trained: the parameters.
    value: the loss that the gradient is of, ``[]``.
    loss: that loss at other parameters; traced where the optimiser asks for it.

  Raises:
    ValueError: the optimiser's update fails, or asks for what no step has.
  """
  tree, each = _joined(trained), [_joined(part) for part in parts]
  gradient = jax.tree.map(lambda *leaves: functools.reduce(jnp.add, leaves), *each)

  def value_fn(params: PyTree, obj_fn: Any = None, grad_fn: Any = None) -> jax.Array:
    # A line search hands on what it does not know to this function: two names that others ask for.
    del obj_fn, grad_fn
    return loss(_parted(_filled(params, tree), trained))  # under a mask, all else as it is

  offered = _offered(value, gradient, value_fn, each)
  steps, state = _called(optimizer, gradient, state, tree, offered)
  return _parted(optax.apply_updates(tree, steps), trained), state


def _offered(
  value: Any, gradient: PyTree, value_fn: Callable[..., jax.Array], parts: Sequence[PyTree]
) -> dict[str, Any]:
  """What optimisers ask for beside the gradient, by the names that optax has for it."""
  apart = {"gradients": list(parts)} if len(parts) > 1 else {}
  return {
    **apart,
    "value": value,
    "grad": gradient,
    "value_fn": value_fn,
    "obj_fn": value_fn,  # Sophia's
    "grad_fn": lambda params, i: jax.grad(value_fn)(params),  # SAM's
  }


def _called(
  optimizer: Any, gradient: PyTree, state: Any, tree: PyTree, offered: Mapping[str, Any]
) -> tuple[PyTree, Any]:
  """The optimiser's updates and its state, called with all of what is offered that it takes."""
  if isinstance(state, _Lookahead):
    pair = optax.LookaheadParams(tree, state.slow)
    steps, inner = _called(optimizer, gradient, state.inner, pair, offered)
    return steps.fast, _Lookahead(optax.apply_updates(state.slow, steps.slow), inner)
  kinds = inspect.signature(optimizer.update).parameters
  every = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in kinds.values())
  given = {name: value for name, value in offered.items() if every or name in kinds}
  while True:
    try:
      made = optimizer.update(gradient, state, tree, **given)
    except _FAILURES as error:
      # A chain takes whatever comes, and one of its links may not: Python says what.
      refused = re.search(r"unexpected keyword argument '(\w+)'", str(error))
      if isinstance(error, TypeError) and refused and given.pop(refused[1], None) is not None:
        continue
      raise ValueError(
        f"the optimizer's update fails on a training step: {_check.short(error)} It is called with "
        f"the gradient, its state, the parameters, and of {sorted(offered)} with what it takes "
        "(under a mask, mask_compatible_extra_args=True masks grad too)."
      ) from error
    return _checked(made, tree)


def _checked(made: Any, tree: PyTree) -> tuple[PyTree, Any]:
  """What an update gave, if each parameter has one of its shape: another would be broadcast."""
  if not isinstance(made, tuple) or len(made) != 2:
    raise ValueError(
      f"the optimizer's update gives {_check.show(made)}; it must give (updates, state)."
    )
  steps: Any = made[0]
  wanted, given = (str(jax.tree.structure(one)) for one in (tree, steps))
  if given != wanted:
    raise ValueError(
      f"the optimizer's update gives {_check.show(steps)} as the updates; they must have the "
      f"parameters' structure, {wanted}."
    )
  pairs = zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(steps), strict=True)
  for (path, leaf), step in pairs:
    if jnp.shape(step) != jnp.shape(leaf):
      raise ValueError(
        f"the optimizer's update gives {list(jnp.shape(step))} for the parameter "
        f"{jax.tree_util.keystr(path)}, which is {list(jnp.shape(leaf))}: give each its own shape."
      )
  return made


def evaluates_others(state: Any) -> bool:
  """Whether other parameters than the trained ones are to be evaluated, by an optimiser's state."""
  return bool(_found(state, *_EVALUATED))


def evaluated(state: Any, trained: Trained) -> Trained:
  """The parameters that an optimiser would have evaluated and deployed, wherever it is nested.

  `optax.contrib.schedule_free`: its ``schedule_free_eval_params``. `optax.lookahead`: the slow
  ones. `optax.contrib.sam` between two steps: those from which it went to look around. Of all
  others: the trained ones.
  """
  return _parted(_evaluated(state, _joined(trained)), trained)


def _evaluated(state: Any, tree: PyTree) -> PyTree:
  for one in _found(state, *_EVALUATED):
    if isinstance(one, _Lookahead):
      tree = one.slow
    elif isinstance(one, ScheduleFreeState):
      mine = optax.contrib.schedule_free_eval_params(one, masked(tree, one.z))
      tree = _filled(mine, tree)
    elif isinstance(one, SAMState):
      if one.cache is not None:
        there = one.steps_since_sync == 0
        mine = masked(tree, one.cache)
        mine = jax.tree.map(lambda p, c, at=there: jnp.where(at, p, c), mine, one.cache)
        tree = _filled(mine, tree)
      tree = _evaluated(one.opt_state, tree)
  return tree


def unmoved(optimizer: Any, trained: Trained) -> Trained:
  """Which parameters an optimiser leaves as they are, whatever the gradients: a bool for each.

  Proved from its own program, not tried out: a rate that is 0 at the first step, or a step that
  only accumulates, is no frozen layer. Its updates are zero if they are zero for any gradient where
  what is zero in its state at step 0 stays so (a moment of zeros). An optimiser that moves nothing
  at all leaves nothing as it is in this sense.

  Args:
    optimizer: any object with ``init`` and ``update``.
    trained: the parameters, or their shapes.
  """
  tree = jax.eval_shape(_joined, trained)
  value = jax.ShapeDtypeStruct((), jnp.float32)

  def step(state: Any, gradient: PyTree, params: PyTree, value: Any) -> tuple[Any, PyTree]:
    def some(params: PyTree, obj_fn: Any = None, grad_fn: Any = None) -> jax.Array:
      parts = [jnp.sum(p).astype(value.dtype) for p in jax.tree.leaves(params)]
      return value * jnp.stack(parts).sum()

    parts = [gradient] * (len(term_groups(state)) + 1)
    offered = _offered(value, gradient, some, parts)
    steps, after = _called(optimizer, gradient, state, params, offered)
    return after, steps

  first, shapes = jax.make_jaxpr(lambda t: begin(optimizer, t), return_shape=True)(trained)
  zero = zero_outputs(first, [False] * len(first.in_avals))
  traced = jax.make_jaxpr(step)(shapes, tree, tree, value)
  rest = [False] * (len(traced.in_avals) - len(zero))
  while True:
    out = zero_outputs(traced, [*zero, *rest])
    kept = [old and new for old, new in zip(zero, out, strict=False)]
    if kept == zero:
      still = out[len(zero) :]
      # What moves nothing at all freezes no layer: averages are taken anew at a rate of 0.
      still = [False] * len(still) if all(still) else still
      return _parted(jax.tree.unflatten(jax.tree.structure(tree), still), trained)
    zero = kept


def _joined(trained: Trained) -> PyTree:
  """The tree that an optimiser sees."""
  params, more = trained["student"], trained["objective"]
  if not jax.tree.leaves(more):
    return params
  if not isinstance(params, dict):
    return dict(trained)
  if "objective" in params:
    raise ValueError(
      'the student has a module called "objective", under which the optimizer finds what the '
      "objective trains; give the module another name."
    )
  return {**params, "objective": more}


def _parted(tree: PyTree, trained: Trained) -> Trained:
  """The other way round."""
  if not jax.tree.leaves(trained["objective"]):
    return {"student": tree, "objective": trained["objective"]}
  if not isinstance(trained["student"], dict):
    return dict(tree)
  student = {name: value for name, value in tree.items() if name != "objective"}
  return {"student": student, "objective": tree["objective"]}


def _hidden(node: Any) -> bool:
  return isinstance(node, optax.MaskedNode)


def masked(tree: PyTree, like: PyTree) -> PyTree:
  """A tree with holes where another one has them: what `optax.masked` hides from who is inside."""
  return jax.tree.map(lambda hole, t: hole if _hidden(hole) else t, like, tree, is_leaf=_hidden)


def _filled(part: PyTree, tree: PyTree) -> PyTree:
  """A tree whose holes are filled from a whole one."""
  return jax.tree.map(lambda p, t: t if _hidden(p) else p, part, tree, is_leaf=_hidden)


def _found(state: Any, *kinds: type) -> list[Any]:
  """The outermost states of these kinds, however deep they are nested."""
  leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))
  return [leaf for leaf in leaves if isinstance(leaf, kinds)]


def _holds(kind: type, init: Callable[[PyTree], Any], params: PyTree) -> bool:
  """Whether these are parameters to start on, with such a state in what is made of them."""
  try:
    return bool(_found(jax.eval_shape(init, params), kind))
  except _FAILURES:  # masks and labels are written for another tree
    return False


def _outline(tree: PyTree) -> str:
  return str(sorted(map(str, tree)) if isinstance(tree, Mapping) else _check.show(tree))
