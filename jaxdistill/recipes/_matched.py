"""What the recipes that match layers share: pairs of layers, their maps, objectives that learn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn

from jaxdistill import arguments
from jaxdistill.recipes._pieces import Running, check_weights, feature, init_modules
from jaxdistill.types import Batch, Objective, Outputs, Term

__all__ = ["convolution_init", "layer_pairs", "learned", "map_pairs", "stage_weights_or", "total"]

PyTree = Any
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
        f"{argument}={arguments.show(layers)} must be a sequence of features' names, such as "
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
    arguments.number("stage_weights", weight, least=0)
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
      arguments.number(name, value, least=0)
    running = Running(params, state)
    return terms(running, student, teacher, batch, {**hyper, **given}), running.state

  return Objective(init=init or initial, apply=apply, hyper=dict(hyper))
