"""What recipes share: features by name, the labels' term, modules trained with the student."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdistill import arguments, losses
from jaxdistill.types import Batch, Objective, ObjectiveFunction, Outputs, Term

__all__ = ["Running", "check_weights", "feature", "hard_term", "init_modules", "with_labels"]

PyTree = Any
Method = TypeVar("Method", Objective, ObjectiveFunction)


def check_weights(**weights: Any) -> None:
  """Raises for a weight that is neither a number from 0 on nor a schedule.

  >>> check_weights(hard_weight=1.0)
  """
  for name, weight in weights.items():
    arguments.scheduled(name, weight, least=0)


def feature(outputs: Outputs | None, name: str, argument: str) -> Any:
  """A feature, or the error that says how to have it captured.

  Args:
    outputs: the student's or the teacher's; shapes will do.
    name: the feature's name.
    argument: the recipe's argument that named it, ``student_...`` or ``teacher_...``.

  Returns:
    The array, or its shape.

  Raises:
    ValueError: there is no such network, or no such feature.

  >>> feature(Outputs(features={"mid": jnp.ones(2)}), "mid", "student_layer").shape
  (2,)
  """
  side = argument.split("_")[0]
  if outputs is None:
    raise ValueError(f"{argument}={name!r} needs a {side}, and there is none; give fit a {side}.")
  if name not in outputs.features:
    there = {n: tuple(f.shape) for n, f in sorted(outputs.features.items())}
    raise ValueError(
      f"{argument}={name!r} is not among the {side}'s features {there}; name it in "
      "capture.linen(module, features=[...]), or capture_nnx.nnx."
    )
  return outputs.features[name]


def hard_term(student: Outputs, batch: Batch, hard_weight: Any) -> Term:
  """Cross-entropy on the labels that are known.

  >>> import jax.numpy as jnp
  >>> from jaxdistill.types import make_batch
  >>> batch = make_batch(jnp.ones((1, 1)), jnp.array([0]))
  >>> hard_term(Outputs(logits=jnp.zeros((1, 2))), batch, 0.5).weight
  0.5
  """
  arguments.number("hard_weight", hard_weight, least=0)
  values = losses.cross_entropy(student.logits, batch.labels)
  return Term(values, weight=hard_weight, where=batch.labelled)


def with_labels(method: Method, hard_weight: Any) -> Method:
  """Adds ``hard_weight * cross_entropy`` on the labels, as the term ``labels``.

  Args:
    method: an objective without it.
    hard_weight: a number or a schedule, the default of the objective's keyword of that name; None
      for no such term and no such keyword.

  Returns:
    An objective of the same kind, an `Objective` or a bare function.

  >>> method = with_labels(lambda student, teacher, batch, *, own=2.0: {}, 0.5)
  >>> [str(p) for p in inspect.signature(method).parameters.values()][-2:]
  ['own=2.0', 'hard_weight=0.5']
  """
  if hard_weight is None:
    return method
  check_weights(hard_weight=hard_weight)
  if isinstance(method, Objective):
    return _objective_with_labels(method, hard_weight)

  def objective(
    student: Outputs,
    teacher: Outputs | None,
    batch: Batch,
    *,
    hard_weight: Any = hard_weight,
    **own: Any,
  ) -> dict[str, Term]:
    terms = method(student, teacher, batch, **own)
    return {"labels": hard_term(student, batch, hard_weight), **terms}

  # What `types.as_objective` reads the keywords from.
  objective.__signature__ = _one_more(method, hard_weight)  # type: ignore[attr-defined]
  return objective


def _one_more(method: ObjectiveFunction, hard_weight: Any) -> inspect.Signature:
  """A function's signature with the keyword ``hard_weight`` at its end."""
  signature = inspect.signature(method)
  mine = inspect.Parameter("hard_weight", inspect.Parameter.KEYWORD_ONLY, default=hard_weight)
  return signature.replace(parameters=[*signature.parameters.values(), mine])


def _objective_with_labels(method: Objective, hard_weight: Any) -> Objective:
  def apply(
    params: PyTree,
    state: PyTree,
    student: Outputs,
    teacher: Outputs | None,
    batch: Batch,
    *,
    key: Any,
    hard_weight: Any = hard_weight,
    **own: Any,
  ) -> tuple[dict[str, Term], PyTree]:
    terms, state = method.apply(params, state, student, teacher, batch, key=key, **own)
    return {"labels": hard_term(student, batch, hard_weight), **terms}, state

  return dataclasses.replace(
    method, apply=apply, hyper={**method.hyper, "hard_weight": hard_weight}
  )


def init_modules(
  key: Any, modules: Mapping[str, tuple[nn.Module | None, Any]]
) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
  """Parameters and state of modules, from the shapes of what goes into them.

  Args:
    key: a random key.
    modules: ``{name: (module, input)}``: a module ``(x, ..., *, train)`` as `projectors` has them,
      and an array or a shape, or a tuple of them, that goes in; None for no module.

  Returns:
    ``(params, state)``, each ``{name: ...}``; the state holds the other collections of modules
    that have any.

  >>> from jaxdistill.projectors import Linear
  >>> params, state = init_modules(jax.random.key(0), {"a": (Linear(3), jnp.ones((1, 2)))})
  >>> params["a"]["dense"]["kernel"].shape, state
  ((2, 3), {})
  """
  params, state = {}, {}
  for i, (name, (module, given)) in enumerate(modules.items()):
    if module is None:
      continue
    inputs = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), given)
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    variables = dict(module.init(jax.random.fold_in(key, i), *inputs, train=True))
    params[name] = variables.pop("params", {})
    if variables:
      state[name] = variables
  return params, state


class Running:
  """Runs modules and remembers their state.

  Args:
    params: from `init_modules`.
    state: from `init_modules`.

  >>> from jaxdistill.projectors import Linear
  >>> x = jnp.ones((1, 2))
  >>> running = Running(*init_modules(jax.random.key(0), {"a": (Linear(3), x)}))
  >>> running("a", Linear(3), x).shape, running.state
  ((1, 3), {})
  """

  def __init__(self, params: Mapping[str, PyTree], state: Mapping[str, PyTree]) -> None:
    self._params = params
    self.state = dict(state)

  def __call__(self, name: str, module: nn.Module | None, *inputs: Any) -> Any:
    """The module's output, in training; its one input where the module is None."""
    if module is None:
      return inputs[0]
    mine = self.state.get(name, {})
    variables = {"params": self._params[name], **mine}
    out, updated = module.apply(variables, *inputs, train=True, mutable=list(mine))
    if mine:
      self.state[name] = {**mine, **updated}
    return out
