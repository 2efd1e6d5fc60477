"""What recipes share: features by name, the labels' term, pairs of layers, trained modules."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdistill import _check, losses
from jaxdistill.recipes import projectors
from jaxdistill.types import Batch, Objective, ObjectiveFunction, Outputs, Term, compute_dtype

__all__ = [
  "EPOCH",
  "LogitLoss",
  "Running",
  "at_a_step",
  "both_features",
  "both_logits",
  "check_layers",
  "check_weights",
  "convolution_init",
  "embed",
  "feature",
  "hard_term",
  "init_embeddings",
  "init_modules",
  "layer_pairs",
  "learned",
  "map_pairs",
  "present",
  "stage_weights_or",
  "total",
  "with_labels",
]

PyTree = Any
Method = TypeVar("Method", Objective, ObjectiveFunction)


def check_weights(**weights: Any) -> None:
  """Raises for a weight that is neither a number from 0 on nor a schedule.

  >>> check_weights(hard_weight=1.0)
  """
  for name, weight in weights.items():
    _check.scheduled(name, weight, least=0)


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
      "networks.linen(module, features=[...]), or networks.nnx."
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
  _check.number("hard_weight", hard_weight, least=0)
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

  >>> from jaxdistill.recipes.projectors import Linear
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

  >>> from jaxdistill.recipes.projectors import Linear
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


# Steps of an epoch of CIFAR-100 at the published batch size of 64.
EPOCH = 781
# ``(student_logits, teacher_logits, *, temperature) -> [...]``.
LogitLoss = Callable[..., jax.Array]


def both_logits(
  recipe: str, student: Outputs, teacher: Outputs | None, *, standardize: bool = False
) -> tuple[Any, Any]:
  """Both networks' logits, as they are or as z-scores.

  Args:
    recipe: who asks, for the message.
    student: the student's outputs.
    teacher: the teacher's.
    standardize: whether each row becomes z-scores (`losses.standardize_logits`).

  Returns:
    ``(student logits, teacher logits)``.

  Raises:
    ValueError: there is no teacher.

  >>> outputs = Outputs(jax.numpy.array([[1.0, 2.0, 3.0]]))
  >>> both_logits("dkd", outputs, outputs, standardize=True)[1].round(3).tolist()
  [[-1.0, 0.0, 1.0]]
  """
  if teacher is None:
    raise ValueError(f"{recipe} compares with a teacher, and teacher is None; give fit a teacher.")
  if not standardize:
    return student.logits, teacher.logits
  return losses.standardize_logits(student.logits), losses.standardize_logits(teacher.logits)


def at_a_step(name: str, value: Any) -> Any:
  """A keyword's number, where the train step has put the schedule's value in its place.

  Args:
    name: the keyword's.
    value: what the objective was given.

  Returns:
    The value.

  Raises:
    ValueError: it is the schedule still.

  >>> at_a_step("dkd_warmup", 0.5)
  0.5
  """
  if callable(value):
    raise ValueError(
      f"{name} is a schedule of the step, which is unknown here: give a number, {name}=1.0, or "
      "train by train.fit or train.make_step, which follow schedules."
    )
  return value


def check_layers(student_layer: Any, teacher_layer: Any) -> tuple[str, str]:
  """The names of both features, the teacher's being the student's where it is None.

  >>> check_layers("pooled", None)
  ('pooled', 'pooled')
  """
  teacher_layer = student_layer if teacher_layer is None else teacher_layer
  for argument, layer in (("student_layer", student_layer), ("teacher_layer", teacher_layer)):
    if not isinstance(layer, str):
      raise TypeError(f"{argument}={_check.show(layer)} must be a feature's name.")
  return student_layer, teacher_layer


def both_features(
  student: Outputs, teacher: Outputs | None, layers: tuple[str, str]
) -> tuple[Any, Any]:
  """The features of both networks, or their shapes; an error that names the one that is missing.

  >>> outputs = Outputs(features={"a": jnp.ones((2, 3))})
  >>> [x.shape for x in both_features(outputs, outputs, ("a", "a"))]
  [(2, 3), (2, 3)]
  """
  ours = feature(student, layers[0], "student_layer")
  return ours, feature(teacher, layers[1], "teacher_layer")


def present(batch: Batch) -> jax.Array:
  """Which examples are no padding, ``[B]``.

  >>> from jaxdistill.types import make_batch
  >>> present(make_batch(jnp.ones((2, 1)), weight=jnp.array([1.0, 0.0]))).tolist()
  [True, False]
  """
  there = batch.weight > 0
  return jnp.any(there, axis=tuple(range(1, there.ndim)))


def init_embeddings(
  key: Any, student: Outputs, teacher: Outputs | None, layers: tuple[str, str], width: int
) -> dict[str, PyTree]:
  """Parameters of a linear map for either network's flattened feature.

  >>> outputs = Outputs(features={"a": jnp.ones((1, 2, 3))})
  >>> params = init_embeddings(jax.random.key(0), outputs, outputs, ("a", "a"), 4)
  >>> params["teacher"]["dense"]["kernel"].shape
  (6, 4)
  """
  shapes = jax.eval_shape(
    lambda pair: [_flattened(x) for x in pair], _pair(student, teacher, layers)
  )
  modules = {
    name: (projectors.Linear(width), shape)
    for name, shape in zip(("student", "teacher"), shapes, strict=True)
  }
  return init_modules(key, modules)[0]


def embed(
  params: Mapping[str, PyTree],
  student: Outputs,
  teacher: Outputs | None,
  layers: tuple[str, str],
  width: int,
  where: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Both networks' flattened features in the embeddings' width, ``[B, width]``.

  Features of examples that are not in ``where`` count as 0: whatever they hold, the gradient of
  the linear map multiplies it.

  >>> outputs = Outputs(features={"a": jnp.ones((1, 2, 3))})
  >>> params = init_embeddings(jax.random.key(0), outputs, outputs, ("a", "a"), 4)
  >>> where = jnp.ones(1, bool)
  >>> [x.shape for x in embed(params, outputs, outputs, ("a", "a"), 4, where)]
  [(1, 4), (1, 4)]
  """
  running = Running(params, {})
  linear = projectors.Linear(width)

  def embedded(name: str, x: jax.Array) -> jax.Array:
    return running(name, linear, jnp.where(where[:, None], _flattened(x), 0.0))

  ours, theirs = both_features(student, teacher, layers)
  return embedded("student", ours), embedded("teacher", theirs)


def _pair(student: Outputs, teacher: Outputs | None, layers: tuple[str, str]) -> tuple[Any, Any]:
  """The features as shapes, of which alone an initialiser needs to know."""
  pair = both_features(student, teacher, layers)
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), pair)


def _flattened(x: jax.Array) -> jax.Array:
  return x.reshape(x.shape[0], -1).astype(compute_dtype(x))


Pairs = Sequence[tuple[str, str]]
Modules = Mapping[str, tuple[Any, Any]]
# PyTorch's default for a convolution.
convolution_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def layer_pairs(
  student_layers: Sequence[str], teacher_layers: Sequence[str] | None, *, least: int = 1
) -> list[tuple[str, str]]:
  """Pairs of features' names, the teacher's being the student's where they are None.

  >>> layer_pairs(("stage1",), None), layer_pairs(("a", "b"), ("c", "d"))
  ([('stage1', 'stage1')], [('a', 'c'), ('b', 'd')])
  """
  teacher_layers = student_layers if teacher_layers is None else teacher_layers
  named = {"student_layers": student_layers, "teacher_layers": teacher_layers}
  for argument, layers in named.items():
    words = not isinstance(layers, str) and isinstance(layers, Sequence)
    if not words or not all(isinstance(name, str) for name in layers):
      raise TypeError(
        f"{argument}={_check.show(layers)} must be a sequence of features' names, such as "
        "('stage1', 'stage2')."
      )
  if len(student_layers) != len(teacher_layers) or len(student_layers) < least:
    raise ValueError(
      f"student_layers={tuple(student_layers)} and teacher_layers={tuple(teacher_layers)} must be "
      f"equally many, at least {least}: they are compared one by one."
    )
  return list(zip(student_layers, teacher_layers, strict=True))


def map_pairs(student: Outputs, teacher: Outputs | None, pairs: Pairs) -> list[tuple[Any, Any]]:
  """The maps of both networks, or their shapes; an error where one is no map.

  >>> import jax.numpy as jnp
  >>> outputs = Outputs(features={"a": jnp.ones((1, 2, 2, 3))})
  >>> [(s.shape, t.shape) for s, t in map_pairs(outputs, outputs, [("a", "a")])]
  [((1, 2, 2, 3), (1, 2, 2, 3))]
  """
  found = []
  for ours, theirs in pairs:
    pair = (feature(student, ours, "student_layers"), feature(teacher, theirs, "teacher_layers"))
    for side, name, value in zip(("student", "teacher"), (ours, theirs), pair, strict=True):
      if len(value.shape) != 4:
        raise ValueError(
          f"{side}_layers names {name!r}, of shape {tuple(value.shape)}, which is no map "
          "[B, H, W, C]; name a layer before the pooling."
        )
    found.append(pair)
  return found


def stage_weights_or(given: Sequence[float] | None, count: int) -> tuple[float, ...]:
  """Weights of stages: those given, else 1 for the last and half as much at each one before it.

  >>> stage_weights_or(None, 3)
  (0.25, 0.5, 1.0)
  """
  if given is None:
    return tuple(2.0 ** (i - count + 1) for i in range(count))
  if len(given) != count:
    raise ValueError(
      f"stage_weights={tuple(given)} must be one number for each of the {count} pairs of layers."
    )
  for weight in given:
    _check.number("stage_weights", weight, least=0)
  return tuple(given)


def total(values: Iterable[Any]) -> Any:
  """Σ over layers, without a 0 of another dtype to start from.

  >>> total([1, 2])
  3
  """
  first, *others = values
  for value in others:
    first = first + value
  return first


def learned(
  modules: Callable[[Outputs, Outputs | None], Modules],
  terms: Callable[..., dict[str, Term]],
  hyper: Mapping[str, Any],
  *,
  init: Callable[..., tuple[PyTree, PyTree]] | None = None,
) -> Objective:
  """An objective whose modules are trained with the student.

  Args:
    modules: ``(student, teacher) -> {name: (module or None, what goes in)}``, see `init_modules`;
      from shapes too.
    terms: ``(running, student, teacher, batch, hyper) -> {name: Term}``, with `Running`.
    hyper: the keywords and their defaults, checked to be at least 0 or schedules.
    init: the objective's; None for parameters and state of ``modules``.

  Returns:
    The objective.

  >>> learned(lambda student, teacher: {}, lambda *_: {}, {"hard_weight": 1.0}).hyper
  {'hard_weight': 1.0}
  """
  check_weights(**hyper)

  def initial(key: Any, student: Outputs, teacher: Outputs | None) -> tuple[PyTree, PyTree]:
    return init_modules(key, modules(student, teacher))

  def apply(
    params: PyTree,
    state: PyTree,
    student: Outputs,
    teacher: Outputs | None,
    batch: Batch,
    *,
    key: Any,
    **given: Any,
  ) -> tuple[dict[str, Term], PyTree]:
    del key
    for name, value in given.items():
      _check.number(name, value, least=0)
    running = Running(params, state)
    return terms(running, student, teacher, batch, {**hyper, **given}), running.state

  return Objective(init=init or initial, apply=apply, hyper=dict(hyper))
