"""What a sweep varies: points, and which of their values one compiled program can take."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import _check, runs
from jaxdistill.train import Transformation, Values, check_hyper, is_optimizer
from jaxdistill.types import Model, Network, Objective, as_objective

__all__ = [
  "Group",
  "OneStudent",
  "Point",
  "Student",
  "check_points",
  "grouped",
  "one_student",
  "product",
  "seed_pairs",
  "stacked_values",
]

# The values of one point by keyword.
Point = Mapping[str, Any]
# A network to train, or a model whose variables it starts from.
Student = Network | Model


def product(**axes: Iterable[Any]) -> list[dict[str, Any]]:
  """Every combination of the values of some keywords; the last keyword varies fastest.

  Args:
    **axes: the values of each keyword.

  Returns:
    One dict for each combination.

  Raises:
    ValueError: a keyword has no values.

  >>> product(temperature=[1, 4], soft_weight=[0.5])
  [{'temperature': 1, 'soft_weight': 0.5}, {'temperature': 4, 'soft_weight': 0.5}]
  """
  values = {}
  for name, axis in axes.items():
    if isinstance(axis, str | Mapping) or not isinstance(axis, Iterable):
      raise TypeError(f"{name}={_check.show(axis)} must be values to go through, such as [1, 4].")
    values[name] = list(axis)
    if not values[name]:
      raise ValueError(f"{name} has no values; give at least one, or leave it out.")
  return [dict(zip(values, made, strict=True)) for made in itertools.product(*values.values())]


@dataclasses.dataclass(frozen=True)
class Group:
  """Points that one compiled program can train side by side.

  Attributes:
    student: the network that they train, or the model that they start from.
    fixed: the values that are part of the program.
    objective: the objective, made with them.
    indices: which points these are.
    hyper: the points' numbers for the objective, by keyword ``[P]``.
    optimizer: their numbers for the optimiser, by keyword ``[P]``.
  """

  student: Student
  fixed: dict[str, Any]
  objective: Objective
  indices: list[int]
  hyper: dict[str, np.ndarray]
  optimizer: dict[str, np.ndarray]

  @property
  def network(self) -> Network:
    """The network that is trained."""
    return self.student.network if isinstance(self.student, Model) else self.student

  @property
  def start(self) -> Any:
    """The variables that it starts from; None for new ones."""
    return self.student.variables if isinstance(self.student, Model) else None

  def start_of(self, points: int) -> Any:
    """What the students of so many points start from; the seed varies fastest.

    A model of several seeds has a beginning for each, which is that of the seed at every point.
    """
    if not isinstance(self.student, Model) or self.student.seeds is None:
      return self.start
    return jax.tree.map(lambda leaf: jnp.concatenate([leaf] * points), self.start)


def grouped(
  points: Sequence[Point],
  student: Student | Mapping[str, Student],
  objective: Any,
  optimizer: Any,
  steps: int,
) -> list[Group]:
  """Sorts points by what has to be a program of its own.

  Args:
    points: dicts with the same keys.
    student: the network of all points, or a model to start from; or several by name, and each
      point's ``student`` is one.
    objective: an objective, or a recipe: a function of keywords that returns one.
    optimizer: an optax optimiser, or a function of keywords that returns one.
    steps: of the run, for the checks of schedules.

  Returns:
    One group for each program, in the order in which the points first need them.

  Raises:
    TypeError: an argument is of another kind than it must be.
    ValueError: a keyword is nobody's, a value does not fit, or a point is there twice.
  """
  keys = check_points(points)
  networks = _check_students(student, points)
  rates = _keywords(optimizer)
  recipe = None if _is_objective(objective) else _keywords(objective)
  if recipe is None:
    as_objective(objective)  # says what is wrong with it
  groups: dict[str, Group] = {}
  members: dict[str, list[Point]] = {}
  for i, point in enumerate(points):
    mine = {name: value for name, value in point.items() if not _takes(rates, name)}
    _check_rates(optimizer, {n: value for n, value in point.items() if n not in mine})
    network = networks[mine.pop("student")] if isinstance(student, Mapping) else student
    if recipe is not None:
      made = _made(objective, {n: v for n, v in mine.items() if _takes(recipe, n)})
    else:
      made = as_objective(objective)
    unknown = sorted(n for n in mine if n not in made.hyper and not _takes(recipe, n))
    if unknown:
      known = sorted({*made.hyper, *(recipe or ()), *(rates or ())} - {"**"})
      raise ValueError(
        f"points have {unknown}, which neither the objective nor the optimizer takes; together "
        f"they take {known}. An optimizer's settings vary where it is a function of them: "
        "optimizer=lambda learning_rate: optax.adam(learning_rate)."
      )
    moving = {n: v for n, v in mine.items() if n in made.hyper and _is_number(v)}
    fixed = {n: v for n, v in mine.items() if n not in moving}
    check_hyper(as_objective(made, **moving), steps)
    if isinstance(student, Mapping):
      fixed["student"] = point["student"]
    key = json.dumps(runs.to_json({n: repr(v) for n, v in fixed.items()}))
    if key not in groups:
      if recipe is not None:  # the moving values are no part of the program
        made = _made(objective, {n: v for n, v in fixed.items() if _takes(recipe, n)})
      # A schedule, say: what is no number is part of the program, and not passed over.
      own = {n: v for n, v in fixed.items() if n in made.hyper and not _takes(recipe, n)}
      made = as_objective(made, **own)
      groups[key], members[key] = Group(network, fixed, made, [], {}, {}), []
    groups[key].indices.append(i)
    members[key].append(point)
  for key, group in groups.items():
    for name in keys:
      if name in group.fixed:
        continue
      target = group.optimizer if _takes(rates, name) else group.hyper
      target[name] = np.array([_number(name, point[name]) for point in members[key]])
  return list(groups.values())


@dataclasses.dataclass(frozen=True)
class OneStudent:
  """One point as `jaxdistill.train.fit` takes it.

  Attributes:
    objective: the objective, made with the point's values.
    optimizer: the optimiser, made with its numbers.
    rates: those numbers.
  """

  objective: Objective
  optimizer: Transformation
  rates: dict[str, float]


def one_student(
  point: Point, student: Student, objective: Any, optimizer: Any, steps: int
) -> OneStudent:
  """A point by itself, to train it alone.

  Args:
    point: its values, without the name of a student.
    student: the network, or a model to start from.
    objective: an objective, or a recipe: a function of keywords that returns one.
    optimizer: an optax optimiser, or a function of keywords that returns one.
    steps: of the run.

  Raises:
    TypeError: an argument is of another kind than it must be.
    ValueError: a keyword is nobody's, or a value does not fit.

  >>> import optax
  >>> from jaxdistill import networks, recipes
  >>> network, rated = networks.linen(networks.models.MLP()), lambda rate=0.1: optax.sgd(rate)
  >>> one_student({"temperature": 2, "rate": 0.5}, network, recipes.kd, rated, 10).rates
  {'rate': 0.5}
  """
  group = grouped([point], student, objective, optimizer, steps)[0]
  hyper, rates = (
    {name: float(values[0]) for name, values in given.items()}
    for given in (group.hyper, group.optimizer)
  )
  made = optimizer if is_optimizer(optimizer) else optimizer(**rates)
  return OneStudent(as_objective(group.objective, **hyper), made, rates)


def stacked_values(group: Group, rows: Sequence[int], seeds: int) -> Values:
  """The values of some of a group's points, once for each seed; the seed varies fastest.

  Args:
    group: from `grouped`.
    rows: which of the group's points, counted within it.
    seeds: how many seeds each has.

  Returns:
    Leaves ``[len(rows) * seeds]``, of JAX's default float.
  """
  dtype = jax.dtypes.canonicalize_dtype(np.float64)

  def of(values: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {n: np.repeat(v[list(rows)], seeds).astype(dtype) for n, v in values.items()}

  return {"hyper": of(group.hyper), "optimizer": of(group.optimizer)}


def seed_pairs(seeds: Any) -> list[tuple[int, int]]:
  """Seeds as ``(seed, data_seed)``; a number stands for both.

  >>> seed_pairs([0, (1, 0)])
  [(0, 0), (1, 0)]
  """
  if isinstance(seeds, str | Mapping) or not isinstance(seeds, Iterable):
    raise TypeError(f"seeds={_check.show(seeds)} must be a sequence, such as range(5).")
  pairs = []
  for entry in seeds:
    pair = tuple(entry) if isinstance(entry, Sequence | np.ndarray) else (entry, entry)
    if len(pair) != 2:
      raise ValueError(f"seeds has {entry!r}; an entry is a number, or (seed, data_seed).")
    words = (_check.whole("seeds", s, least=0, most=2**32 - 1) for s in pair)
    pairs.append((next(words), next(words)))
  if not pairs or len(set(pairs)) < len(pairs):
    raise ValueError(f"seeds={pairs} must be at least one, and each of them once.")
  return pairs


def check_points(points: Any) -> list[str]:
  """The keywords that the points give values for.

  Raises:
    TypeError: it is no sequence of mappings with words for keywords.
    ValueError: points give other keywords than the first, a seed, or the same values twice.
  """
  if isinstance(points, str | Mapping) or not isinstance(points, Sequence) or not points:
    raise TypeError(
      f"points={_check.show(points)} must be a list of dicts with a point in it, such as "
      "search.product(temperature=[1, 2, 4])."
    )
  for point in points:
    if not isinstance(point, Mapping) or not all(isinstance(name, str) for name in point):
      raise TypeError(f"points has {_check.show(point)}; a point is {{keyword: value}}.")
    if set(point) != set(points[0]):
      raise ValueError(
        f"points have the keywords {sorted(points[0])} and {sorted(point)}; every point gives a "
        "value for the same ones."
      )
  reserved = sorted({"seed", "data_seed"} & set(points[0]))
  if reserved:
    raise ValueError(f"points have {reserved}; give seeds=, every point is trained from each.")
  seen = [repr(sorted(point.items())) for point in points]
  twice = [point for point, text in zip(points, seen, strict=True) if seen.count(text) > 1]
  if twice:
    raise ValueError(f"points has {dict(twice[0])} more than once; give each point one time.")
  return list(points[0])


def _check_students(student: Any, points: Sequence[Point]) -> dict[str, Student]:
  """The networks by name; none where all points train the same one."""
  if not isinstance(student, Mapping):
    if "student" in points[0]:
      raise ValueError(
        f"points have student={points[0]['student']!r}, and there is one student: give several "
        "networks by name, student={name: network}."
      )
    return {}
  wrong = [name for name, network in student.items() if not isinstance(network, Network | Model)]
  if wrong or not student:
    raise TypeError(
      f"student must be a Network or a Model, or several by name; {wrong or 'an empty mapping'} is "
      "none. Give networks.linen(module)."
    )
  asked = [point.get("student") for point in points]
  unknown = sorted({repr(name) for name in asked if not _names(student, name)})
  if unknown:
    raise ValueError(
      f"points have student={', '.join(unknown)}, and the students are {sorted(student)}: every "
      "point names one of them, as in search.product(student=list(students), temperature=[1, 4])."
    )
  return dict(student)


def _names(student: Mapping[str, Student], name: Any) -> bool:
  return isinstance(name, str) and name in student


def _is_objective(objective: Any) -> bool:
  """Whether it is one, and no recipe: the function takes student, teacher and batch."""
  if isinstance(objective, Objective) or not callable(objective):
    return True
  kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
  parameters = inspect.signature(objective).parameters.values()
  return sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters) == 3


def _keywords(function: Any) -> set[str] | None:
  """The keywords of a function, ``**`` for any; None for what is no function."""
  if is_optimizer(function) or not callable(function):
    return None
  parameters = inspect.signature(function).parameters.values()
  return {"**" if p.kind is inspect.Parameter.VAR_KEYWORD else p.name for p in parameters}


def _takes(keywords: set[str] | None, name: str) -> bool:
  return keywords is not None and (name in keywords or "**" in keywords)


def _made(recipe: Callable[..., Any], keywords: Mapping[str, Any]) -> Objective:
  try:
    inspect.signature(recipe).bind(**keywords)
  except TypeError as error:
    raise TypeError(
      f"objective={_check.show(recipe)} must be an objective, or a recipe that is called with "
      f"keywords alone, here {dict(keywords)}: {error}. What trains by itself, as "
      "train.born_again does, is neither: search a generation's, with the one before as teacher."
    ) from error
  made = recipe(**keywords)
  if not _is_objective(made) or not callable(getattr(made, "apply", made)):
    raise TypeError(
      f"objective called with {dict(keywords)} must return an objective, got {_check.show(made)}."
    )
  return as_objective(made)


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _check_rates(optimizer: Any, rates: Mapping[str, Any]) -> None:
  """Raises for what the optimizer cannot be made with.

  Inside the program the numbers are traced, and nobody looks at them: at a rate below 0 a student
  climbs, and at 0 it stays where it is, both without a word.
  """
  numbers = {name: _number(name, value) for name, value in rates.items()}
  for name, value in numbers.items():
    if name == "lr" or name.endswith("rate"):
      _check.number(name, value, above=0)
  if numbers:
    optimizer(**numbers)  # which says itself what it refuses, as those of train.optimizers do


def _number(name: str, value: Any) -> float:
  if not _is_number(value):
    raise TypeError(f"points have {name}={_check.show(value)} for the optimizer: give numbers.")
  _check.number(name, value)
  return float(value)
