"""The stages of a compression: costs, the search, an assistant, the final runs."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxdistill import budget, cost, evaluate, preflight, sweep, teachers, train
from jaxdistill import run as run_lib
from jaxdistill.budget import Budget
from jaxdistill.data import Source
from jaxdistill.points import Point, Single, single
from jaxdistill.program import Optimizer
from jaxdistill.recipes import labels
from jaxdistill.selection import METRICS, Result, Row, score, standard_error
from jaxdistill.shortlist import Assistant
from jaxdistill.side_by_side import inputs_of, some_key, students_by
from jaxdistill.types import Batch, Network, Teacher, make_batch

__all__ = ["Job", "kept"]

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Job:
  """What the stages have in common."""

  within: Budget
  teacher: Teacher
  teacher_variables: PyTree
  data: Source
  validation: Batch
  optimizer: Optimizer
  steps: int
  objective: Any
  points: list[Point]
  seeds: list[tuple[int, int]]
  final_seeds: list[tuple[int, int]]
  metric: str
  teacher_network: Network | None
  teacher_run: Any
  progress: bool

  @property
  def taught(self) -> dict[str, Any]:
    """The teacher, as a sweep and a run take it."""
    return {"teacher": self.teacher, "teacher_variables": self.teacher_variables}

  def one(self, network: Network, point: Point, objective: Any = None) -> Single:
    """A point as `train.fit` takes it."""
    objective = self.objective if objective is None else objective
    made = single(point, network, objective, self.optimizer, self.steps)
    if made.objective.deployed is not None:
      raise ValueError(
        "the objective deploys another network than the candidates (as simkd does), and what was "
        "measured would not be what is deployed; take a recipe that deploys the student itself."
      )
    return made

  def costs(self, network: Any, variables: PyTree = None) -> dict[str, Any]:
    """What a network, or a function with its variables, costs as it would be deployed."""
    return budget.measure(
      network,
      self.data.stored,
      variables=variables,
      normalize=self.data.normalize,
      batch_size=self.within.batch_size,
    )

  def teacher_row(self, path: pathlib.Path) -> dict[str, Any]:
    """What the teacher costs and how good it is, on validation."""

    def logits(variables: PyTree, inputs: PyTree) -> Any:
      return self.teacher(variables, make_batch(inputs)).logits

    file = path / "teacher.json"
    costs = kept(file, ["bytes"]) or self.costs(logits, self.teacher_variables)
    run_lib.write_json(file, costs)
    quality = self.teacher_quality
    return {**costs, **{name: float(quality[name]) for name in METRICS}}

  @functools.cached_property
  def teacher_quality(self) -> dict[str, np.ndarray]:
    """The teacher on validation."""
    predict = evaluate.teacher_predictor(self.teacher)
    return evaluate.evaluate(predict, self.teacher_variables, self.validation)

  def validated(self, network: Network, variables: PyTree) -> dict[str, np.ndarray]:
    """Some students on validation, ``[S]`` each."""
    predict = evaluate.predictor(network)
    found = evaluate.evaluate(predict, variables, self.validation, stacked=True)
    return {name: found[name] for name in METRICS}

  def look(
    self,
    student: Network,
    point: Point,
    folder: pathlib.Path,
    baseline: PyTree = None,
    known: Sequence[preflight.Finding] = (),
  ) -> list[preflight.Finding]:
    """The pre-flight checks, with the baseline once there is one; warns of what is not `known`."""
    one = self.one(student, _without_student(point))
    found = preflight.check(
      student,
      one.objective,
      hyper=one.hyper,
      data=self.data,
      steps=self.steps,
      teacher=self.teacher,
      teacher_variables=self.teacher_variables,
      teacher_network=self.teacher_network,
      teacher_run=self.teacher_run,
      validation=self.validation,
      baseline=None if baseline is None else teachers.unstack(baseline),
      folder=folder,
      warn=False,
    )
    before = {finding.check for finding in known}
    for finding in found:
      if finding.check not in before:
        warnings.warn(f"{finding.check}: {finding}", preflight.PreflightWarning, stacklevel=3)
    return found

  def swept(
    self,
    student: Any,
    objective: Any,
    points: Sequence[Point],
    folder: pathlib.Path,
    **options: Any,
  ) -> Result:
    """A sweep with what all of them have in common."""
    return sweep.run(
      student,
      objective,
      points=points,
      data=self.data,
      optimizer=self.optimizer,
      steps=self.steps,
      seeds=self.seeds,
      validation=self.validation,
      metric=self.metric,
      folder=folder,
      progress=folder.name if self.progress else None,
      **options,
    )

  def search(
    self, students: Mapping[str, Network], folder: pathlib.Path, halving: sweep.Halving
  ) -> Result:
    """Every point for every candidate, halved together."""
    points = [{"student": name, **point} for name in students for point in self.points]
    return self.swept(
      students,
      self.objective,
      points,
      folder,
      halving=halving,
      **self.taught,
    )

  def fit(
    self,
    network: Network,
    one: Single,
    folder: pathlib.Path,
    seeds: list[tuple[int, int]],
    **teacher: Any,
  ) -> PyTree:
    """An ordinary run; its variables, leaves over the seeds."""
    by = students_by(network, inputs_of(self.data))
    return train.fit(
      network,
      one.objective,
      data=[dataclasses.replace(self.data, data_seed=data_seed) for _, data_seed in seeds],
      optimizer=one.optimizer,
      steps=self.steps,
      seed=[seed for seed, _ in seeds],
      hyper=one.hyper,
      validate=evaluate.validator(network, self.validation, stacked=True),
      validate_every=max(self.data.steps_per_epoch, self.steps // 10),
      folder=folder,
      config={"optimizer": one.rates},
      seeds_by=by,
      scan=by == "vmap",
      progress=folder.name if self.progress else None,
      **teacher,
    ).variables

  def assist(
    self,
    student: Network,
    direct: Row,
    between: Mapping[str, Network],
    gap: float,
    path: pathlib.Path,
  ) -> Assistant | None:
    """Tries a teaching assistant where the student is too far behind its teacher."""
    behind = float(self.teacher_quality["accuracy"]) - direct.metrics["accuracy"]
    error = standard_error(behind)
    if float(np.mean(behind)) <= max(gap, 2 * error):
      return None
    small, large = (cost.parameters(v) for v in (self.shapes(student), self.teacher_variables))
    sizes = {name: cost.parameters(self.shapes(network)) for name, network in between.items()}
    middle = math.sqrt(small * large)
    usable = [name for name, size in sizes.items() if small < size < large]
    if not usable:
      return Assistant(None, round(middle), float(np.mean(behind)), None, np.zeros(0), False)
    name = min(usable, key=lambda n: abs(math.log(sizes[n] / middle)))
    network, values = between[name], _without_student(direct.values)
    if direct.status == "dropped":  # the others were passed over for what they cost
      direct = self.swept(
        student,
        self.objective,
        [values],
        path / "direct",
        **self.taught,
      ).rows[0]
    learned = self.fit(
      network,
      self.one(network, values),
      path / "assistant",
      self.seeds[:1],
      **self.taught,
    )
    found = self.swept(
      student,
      self.objective,
      self.points,
      path / "assisted",
      teacher=teachers.frozen(network),
      teacher_variables=teachers.unstack(learned)[0],
    )
    row = found.rows[found.best]
    gain = score(row, self.metric) - score(direct, self.metric)
    helps = len(gain) > 1 and float(np.mean(gain)) > max(0.0, standard_error(gain))
    return Assistant(name, sizes[name], float(np.mean(behind)), row, gain, helps, network, learned)

  def shapes(self, network: Network) -> PyTree:
    """A network's variables, as shapes."""
    return jax.eval_shape(network.init, some_key(), inputs_of(self.data))

  def final(
    self, network: Network, best: Row, tried: Assistant | None, path: pathlib.Path
  ) -> dict[str, PyTree]:
    """The chosen network distilled, and on labels alone at the rate that suits it there."""
    teacher, variables, values = self.teacher, self.teacher_variables, best.values
    if tried is not None and tried.helps:
      assert tried.network is not None
      assert tried.row is not None
      teacher, variables = teachers.frozen(tried.network), teachers.unstack(tried.variables)[0]
      values = tried.row.values
    distilled = self.fit(
      network,
      self.one(network, _without_student(values)),
      path / "student",
      self.final_seeds,
      teacher=teacher,
      teacher_variables=variables,
    )
    rates = {repr(one.rates): one.rates for one in (self.one(network, p) for p in self.points)}
    alone = list(rates.values())
    if len(alone) > 1:
      alone = [self.swept(network, labels(), alone, path / "labels").chosen]
    plain = self.fit(
      network, self.one(network, alone[0], labels()), path / "baseline", self.final_seeds
    )
    return {"student": distilled, "baseline": plain}


def _without_student(values: Mapping[str, Any]) -> dict[str, Any]:
  return {name: value for name, value in values.items() if name != "student"}


def kept(path: pathlib.Path, names: Iterable[str]) -> dict[str, Any]:
  """What was measured when a folder was begun: a second measurement might choose otherwise.

  Args:
    path: a JSON file.
    names: what it must have, to be what is asked for.

  Returns:
    What is in it; empty where there is no such file.
  """
  found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
  return found if set(names) <= set(found) else {}
