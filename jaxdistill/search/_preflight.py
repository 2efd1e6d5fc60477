"""Pre-flight checks: what is wrong with a distillation run, before it costs anything.

`preflight` takes what `jaxdistill.train.fit` takes, and runs every check that its arguments allow.
The checks themselves are functions of ``_checks``: `teacher_checks`, `pair_checks`, `token_checks`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxdistill import _check, evaluation, runs, teachers
from jaxdistill.data import Batches, Source
from jaxdistill.evaluation import cost, logits_of, predictions, tasks
from jaxdistill.search._checks import pair_checks, teacher_checks, token_checks
from jaxdistill.search._checks.findings import Finding, PreflightError, PreflightWarning
from jaxdistill.search._checks.probes import (
  batches_of,
  curve,
  probe_terms,
  said_of,
  taught_further,
)
from jaxdistill.train import check_hyper, check_student, check_teacher
from jaxdistill.types import (
  Batch,
  Model,
  Network,
  Objective,
  Outputs,
  Teacher,
  as_objective,
  present,
  with_logits,
)

__all__ = ["FILE", "preflight"]

PyTree = Any
# In the run's folder: [{"check", "message", "fix", "values"}].
FILE = "preflight.json"
# Of these a run learns something else than it is meant to, whatever comes of it.
_STOPS = ("shifted_labels",)
# Steps on a copy of the teacher, and the most examples in each: seconds on two cores of a CPU.
_PROBE_STEPS, _PROBE_BATCH = 20, 64
# Tokens that a language model's teacher is asked about, of training and of held-out text each.
_TOKENS = 8192


def preflight(
  student: Network | Model | None = None,
  objective: Any = None,
  *,
  data: Source | Sequence[Source] | None = None,
  teacher: Teacher | None = None,
  steps: int = 1,
  seed: int = 0,
  validation: Batch | Batches | None = None,
  task: tasks.Task | None = None,
  baseline: Any = None,
  teacher_run: str | os.PathLike[str] | None = None,
  folder: str | os.PathLike[str] | None = None,
  warn: bool = True,
) -> list[Finding]:
  """Runs all checks that the arguments allow, and warns of what it finds; shifted labels stop it.

  =================  ===============================================================
  check              needs
  =================  ===============================================================
  hardly_better      ``teacher``, ``validation``, ``baseline``
  not_trained        ``teacher_run``; or, of classes, ``teacher``, of networks that
                     are known, and ``data``; or ``teacher`` and ``validation``
  capacity_gap       ``student``, ``teacher``, ``data`` or ``validation``
  labels             ``student``, ``data`` or ``validation``: what the task says of
                     them; and where they are numbers, their size
  no_labels          ``student``, ``objective``, ``data``
  collapsed          ``teacher``, ``data``: it says the same of every example
  uniform_targets    ``objective`` with a ``temperature``, ``teacher``, ``data``; of
                     classes
  unequal_gradients  ``student``, ``objective``, ``data``
  calibration        ``teacher``, ``validation``; of classes
  shifted_labels     ``teacher``, ``data`` or ``validation``; of tokens, as all below
  targets            likewise: entropy and mass of its first tokens
  vocabulary         likewise: columns that are no token of the data
  context            ``teacher``, ``validation``: windows longer than its own
  memorised          ``teacher``, ``data``, ``validation``: it has read the text
  =================  ===============================================================

  What asks for probabilities is left out where the task has no classes (`evaluation.tasks.Task`);
  there a teacher is compared with the baseline by the task's first metric, in its direction.

  Nothing that is given is changed. What is measured takes seconds: a few batches, at most 10,000
  held-out examples, and 20 steps on a copy of the teacher.

  Args:
    student: the network that will be trained, or the model that it starts from.
    objective: what will be minimised.
    data: where training batches come from; of several sources the first is looked at.
    teacher: from `jaxdistill.teachers`. None where the data brings the teacher's outputs along.
      Probe steps are taken on the networks that it is made of (`teachers.members_of`). One of
      another program (`teachers.foreign`) is asked about ``validation`` once, and about the first
      batch of ``data``, unless that brings its outputs along (`teachers.cached`).
    steps: how many the run will have: schedules are looked at in its first, middle and last step.
    seed: of the initialisation and of the random keys.
    validation: held-out batches, from `data.evaluation_batches`; never the test split.
    task: what the labels mean, see `jaxdistill.evaluation.tasks`; one class an example, or a token,
      where left out.
    baseline: students trained on labels alone: their accuracies on ``validation`` (the task's first
      metric), ``[S]``, or their model, which gives a sharper comparison.
    teacher_run: the teacher's run folder: its curve then stands in for probe steps, unless it is
      too short or too noisy to tell.
    folder: a run's folder, made if need be, into which ``preflight.json`` goes: a list of
      ``{"check", "message", "fix", "values"}``.
    warn: whether each finding is a `PreflightWarning` as well.

  Returns:
    The findings; an empty list where all is well.

  Raises:
    TypeError: an argument is of another kind than it must be.
    ValueError: the arguments allow no check, or do not fit together; the teacher reads tokens of
      another tokenizer than the data has.
    PreflightError: the labels look shifted (``shifted_labels``), so that a run would learn to
      predict something else; it has all findings, which are written and warned of before.
    FileNotFoundError: ``teacher_run`` holds no run.
  """
  _check.switch("warn", warn)
  network, start = (None, None) if student is None else check_student(student)
  asked = _Asked(
    student=network,
    objective=None if objective is None else as_objective(objective),
    source=data[0] if isinstance(data, Sequence) and data else data,
    teacher=teacher,
    steps=steps,
    seed=seed,
    start=start,
    validation=validation,
    task=task,
    baseline=baseline,
    teacher_run=teacher_run,
  )
  place = None if folder is None else _made(folder)
  findings = asked.findings()
  if place is not None:
    runs.write_json(place / FILE, [dataclasses.asdict(finding) for finding in findings])
  for finding in findings if warn else ():
    if finding.check not in _STOPS:
      warnings.warn(f"{finding.check}: {finding}", PreflightWarning, stacklevel=2)
  stops = [finding for finding in findings if finding.check in _STOPS]
  if stops:
    raise PreflightError(" ".join(map(str, stops)), findings)
  return findings


def _made(folder: str | os.PathLike[str]) -> pathlib.Path:
  runs.check_place(folder, "report")
  place = _check.folder("folder", folder)
  with runs.writes(place):
    place.mkdir(parents=True, exist_ok=True)
  return place


def _deployed(model: Model | Teacher, batch: Batch) -> dict[str, Any]:
  """What a model is deployed for, of a batch."""
  return model(batch).named()


@dataclasses.dataclass(frozen=True, eq=False)
class _Asked:
  """What `preflight` was given; what several checks need is measured once."""

  student: Network | None
  objective: Objective | None
  source: Any
  teacher: Teacher | None
  steps: int
  seed: int
  start: PyTree
  validation: Batch | Batches | None
  task: tasks.Task | None
  baseline: Any
  teacher_run: Any
  # A teacher of another program; what it said comes along with the batches, as ``teacher`` reads.
  foreign: Teacher | None = None

  def __post_init__(self) -> None:
    _check.whole("steps", self.steps)
    _check.whole("seed", self.seed, least=0)
    if self.source is not None and not isinstance(self.source, Source):
      raise TypeError(f"data must be a Source, got {_check.show(self.source)}.")
    split = self.validation
    stacked = isinstance(split, Batch) and np.ndim(split.weight) >= 2
    if split is not None and not (stacked or isinstance(split, Batches)):
      raise TypeError(
        f"validation must be what data.evaluation_batches makes, got {_check.show(split)}."
      )
    if not isinstance(self.task, tasks.Task | None):
      raise TypeError(
        f"task={_check.show(self.task)} must be an evaluation.tasks.Task, such as "
        "tasks.regression()."
      )
    if isinstance(self.teacher, Teacher) and teachers.asked_on_host(self.teacher):
      if split is not None:
        told = evaluation.taught(self.teacher, split, task=self.task)
        object.__setattr__(self, "validation", told)
      object.__setattr__(self, "foreign", self.teacher)
      object.__setattr__(self, "teacher", teachers.brought())
    check_teacher(self.teacher)
    if teachers.decay_of(self.teacher) is not None:
      raise ValueError(
        "teacher is a moving average of the student, of which there is nothing to check before the "
        "run: it begins as the student."
      )
    if self.source is not None:
      teachers.check_tokenizer(self.teacher, self.source.tokenizer, self.source.name)
    _ = self.ran  # what is amiss with it says so before anything is measured
    if self.baseline is not None and not (self.student and self.teacher and self.has_labels):
      raise ValueError(
        "baseline is compared with the teacher on held-out labels; give student, teacher and "
        "validation too."
      )

  def findings(self) -> list[Finding]:
    """All checks that can be made, in the order of the table."""
    asked: list[tuple[Any, Callable[[], list[Finding | None]]]] = [
      (self.baseline is not None, self.hardly_better),
      (self.teacher_run or self.held_out or self.can_probe, self.not_trained),
      (self.student and self.size_of_teacher and self.example is not None, self.capacity_gap),
      (self.student and self.task and self.example is not None, self.labels),
      (self.student and self.objective and self.source, self.terms),
      (self.source and self.taught, self.collapsed),
      (
        self.classes and self.temperatures and self.source and self.taught,
        self.uniform_targets,
      ),
      (self.held_out, self.calibration),
      (self.of_tokens, self.tokens),
    ]
    if not any(able for able, _ in asked):
      raise ValueError(
        "check was given nothing to look at: give it what train.fit gets (student, objective, "
        "data=, teacher=), and validation= for the teacher's quality."
      )
    found = [one for able, ask in asked if able for one in ask()]
    return [finding for finding in found if finding is not None]

  @functools.cached_property
  def taught(self) -> Teacher | None:
    """The teacher, from wherever its outputs come."""
    if self.source is not None and self.source.teacher is not None:
      return teachers.brought()
    return self.teacher

  def asked(self, batch: Batch) -> Batch:
    """A training batch, with what a teacher of another program says of it."""
    if self.foreign is None or batch.teacher is not None:
      return batch
    return dataclasses.replace(batch, teacher=self.foreign(batch))

  @functools.cached_property
  def batch(self) -> Batch:
    """The run's first training batch."""
    stacked = batches_of(self.source, 0, 1, seed=self.seed)
    return self.asked(jax.tree.map(lambda leaf: leaf[0], stacked))

  @functools.cached_property
  def held_first(self) -> Batch:
    """The first validation batch."""
    assert self.validation is not None
    return evaluation.first_of(self.validation)

  @functools.cached_property
  def example(self) -> Batch | None:
    """A single example."""
    if self.source is not None:
      return jax.tree.map(lambda leaf: leaf[:1], self.batch)
    if self.validation is not None:
      return jax.tree.map(lambda leaf: leaf[:1], self.held_first)
    return None

  @functools.cached_property
  def ran(self) -> tuple[np.ndarray, np.ndarray, int | None] | None:
    """The curve of the teacher's own run."""
    return None if self.teacher_run is None else curve(self.teacher_run)

  @property
  def classes(self) -> bool:
    """Whether labels are classes; where nobody said, the labels' dtype does."""
    return self.task is None or self.task.classes

  @functools.cached_property
  def has_labels(self) -> bool:
    """Whether there is a validation split with labels: with classes, where nobody said."""
    split = self.validation
    if split is None or not predictions.labelled(split):
      return False
    return self.task is not None or bool(np.issubdtype(self.held_first.labels.dtype, np.integer))

  @functools.cached_property
  def held_out(self) -> tuple[np.ndarray, np.ndarray] | None:
    """The teacher's logits and the labels on validation, where both are there."""
    if self.teacher is None or not self.has_labels or not self.classes:
      return None
    assert self.validation is not None
    logits, labels = said_of([self.teacher], self.validation)
    return logits[0], labels

  @functools.cached_property
  def of_tokens(self) -> bool:
    """Whether the teacher puts out a distribution for each token."""
    if self.taught is None or not self.classes or (self.source is None and not self.has_labels):
      return False
    batch = self.held_first if self.source is None else self.batch
    shapes = jax.eval_shape(lambda teacher, b: with_logits(teacher(b)), self.taught, batch)
    return token_checks.tokens_of(shapes, batch)

  @functools.cached_property
  def right(self) -> np.ndarray:
    """Which held-out examples the teacher is right on."""
    assert self.held_out is not None
    return np.argmax(self.held_out[0], axis=1) == self.held_out[1]

  @functools.cached_property
  def keywords(self) -> list[dict[str, Any]]:
    """The objective's keywords at the run's first, middle and last step; once if they stay."""
    assert self.objective is not None
    check_hyper(self.objective, self.steps)
    scheduled = {n: value for n, value in self.objective.hyper.items() if callable(value)}
    at = sorted({0, self.steps // 2, self.steps - 1}) if scheduled else [0]
    return [{n: float(schedule(s)) for n, schedule in scheduled.items()} for s in at]

  @functools.cached_property
  def temperatures(self) -> list[float]:
    """The objective's temperatures, in the steps that are looked at."""
    if self.objective is None:
      return []
    every = [{**self.objective.hyper, **keywords} for keywords in self.keywords]
    found = [v for each in every for n, v in each.items() if n.split("_")[-1] == "temperature"]
    return [float(np.max(np.asarray(value))) for value in found if value is not None]

  @functools.cached_property
  def size_of_teacher(self) -> int:
    return 0 if self.teacher is None else cost.parameters(self.teacher.variables)

  @functools.cached_property
  def members(self) -> list[Model]:
    """The networks that the teacher is made of, as far as they are known."""
    return [] if self.teacher is None else teachers.members_of(self.teacher)

  @functools.cached_property
  def can_probe(self) -> bool:
    of_classes = self.classes and self.source is not None and self.source.num_classes > 0
    return bool(self.members) and of_classes

  def hardly_better(self) -> list[Finding | None]:
    assert self.student is not None
    assert self.validation is not None
    if not self.classes:
      return [self.hardly_better_by_metric()]
    assert self.held_out is not None
    given, labels = self.baseline, self.held_out[1]
    if not isinstance(given, Model):
      return [teacher_checks.hardly_better(float(self.right.mean()), given, examples=len(labels))]
    logits, _ = said_of(given.unstack(), self.validation)
    right = np.argmax(logits, axis=-1) == labels
    _, error = teacher_checks.mean_and_error(self.right.astype(np.float64) - right.mean(axis=0))
    accuracies = right.mean(axis=1)
    found = teacher_checks.hardly_better(
      float(self.right.mean()), accuracies, examples=len(labels), paired_error=error
    )
    return [found]

  def hardly_better_by_metric(self) -> Finding | None:
    """Of what has no classes: by the task's first metric."""
    task, split = self.task, self.validation
    assert task is not None
    assert split is not None
    name = task.first

    def measured(model: Any) -> Any:
      found = evaluation.evaluate(model, split, task=task)
      if name not in found:
        raise ValueError(f"{name} of the task {task.name!r} cannot be measured on validation.")
      return found[name]

    given = measured(self.baseline) if isinstance(self.baseline, Model) else self.baseline
    teacher = float(measured(self.teacher))
    return teacher_checks.hardly_better_by(name, task.metric(name), teacher, given)

  def not_trained(self) -> list[Finding | None]:
    found, told = None, False
    if self.held_out is not None:
      labels = self.held_out[1]
      chance = float(np.bincount(labels).max() / len(labels))
      found = teacher_checks.near_chance(
        float(self.right.mean()), examples=len(labels), chance=chance
      )
    if found is None and self.ran is not None:
      steps, losses, planned = self.ran
      found = teacher_checks.still_falling(steps, losses, planned=planned)
      told = teacher_checks.curve_tells(losses)
    if found is None and not told and self.can_probe:
      found = next(filter(None, self.probed()), None)
    return [found]

  def probed(self) -> Iterator[Finding | None]:
    """A few steps on a copy of each member, on batches of the epoch that are not measured."""
    small = self.source
    if not small.share:
      small = dataclasses.replace(small, batch_size=min(small.batch_size, _PROBE_BATCH))
    epoch = small.steps_per_epoch
    aside = max(1, min(16, epoch // 3))
    held_out = batches_of(small, 0, aside)
    if not np.issubdtype(held_out.labels.dtype, np.integer) or not np.any(held_out.labelled):
      return
    # An epoch of one batch has no other.
    learned = batches_of(small, aside if epoch > 1 else 0, min(_PROBE_STEPS, max(epoch - aside, 1)))
    for model in self.members:
      before, after = taught_further(model, learned, held_out, steps=_PROBE_STEPS)
      yield teacher_checks.still_learning(before, after)

  def capacity_gap(self) -> list[Finding | None]:
    assert self.student is not None
    assert self.taught is not None
    key = jax.random.key(self.seed)
    variables = jax.eval_shape(lambda one: self.student.init(key, one.inputs), self.example)  # type: ignore[union-attr]
    student = Model(self.student, variables)
    found = pair_checks.capacity_gap(
      self.size_of_teacher,
      cost.parameters(variables),
      teacher_flops=cost.flops_or_none(_deployed, self.taught, self.example),
      student_flops=cost.flops_or_none(_deployed, student, self.example),
    )
    return [found]

  def labels(self) -> list[Finding | None]:
    """What the task says of labels beside the student's outputs, in the first batches."""
    assert self.student is not None
    assert self.task is not None
    key, task = jax.random.key(self.seed), self.task
    found: list[Finding | None] = []
    given = {"data": self.batch} if self.source is not None else {}
    if self.validation is not None:
      given["validation"] = self.held_first
    for name, first in given.items():
      if not predictions.counted(first).any():
        continue

      def said(batch: Batch) -> Outputs:
        started = self.start if isinstance(self.start, Mapping) else {}
        variables = {**self.student.init(key, batch.inputs), **started}  # type: ignore[union-attr]
        return task.reads(Model(self.student, variables)(batch.inputs))  # type: ignore[arg-type]

      shapes = jax.eval_shape(said, first)
      try:
        if task.check is not None:
          task.check(jax.tree.map(lambda leaf: leaf[None], first), shapes)
      except (TypeError, ValueError) as error:
        found.append(pair_checks.unfit_labels(name, error))
        continue
      logits = shapes.logits
      numbers = np.issubdtype(first.labels.dtype, np.floating) and logits is not None
      if numbers and logits.shape == first.labels.shape and name == "data":
        where = tasks.counted(first, first.labels)
        outputs = jax.jit(said)(first).logits
        found.append(pair_checks.labels_scale(outputs, first.labels, where))
    return found

  def collapsed(self) -> list[Finding | None]:
    """Whether the teacher says the same of every example of the first batch."""
    outputs = jax.jit(lambda teacher, batch: (teacher(batch), present(batch)))
    said, there = jax.device_get(outputs(self.taught, self.batch))
    if said.where is not None:
      there = there & (said.where > 0)
    alone = {"hidden": said.hidden} if said.hidden is not None else said.features
    found = alone if said.logits is None else {"logits": said.logits}
    return [pair_checks.collapsed({name: x[there] for name, x in found.items()})]

  def terms(self) -> list[Finding | None]:
    """What is asked about the objective's terms."""
    assert self.student is not None
    assert self.objective is not None
    terms = probe_terms(
      self.student,
      self.objective,
      self.batch,
      teacher=self.teacher,
      hyper=self.keywords,
      start=self.start,
      num_classes=self.source.num_classes,
      seed=self.seed,
    )
    no_labels = pair_checks.no_labels(terms, labelled=self.source.has_labels)
    return [no_labels, pair_checks.unequal_gradients(terms)]

  def uniform_targets(self) -> list[Finding | None]:
    assert self.taught is not None
    logits = jax.jit(logits_of)(self.taught, self.batch)
    logits = np.asarray(logits).reshape(-1, logits.shape[-1])
    return [pair_checks.uniform_targets(logits, self.temperatures)]

  def tokens(self) -> list[Finding | None]:
    """What is asked of a language model's teacher."""
    assert self.taught is not None
    size, train, held_out = 0 if self.source is None else self.source.num_classes, None, None
    if self.source is not None and self.source.has_labels:
      count = min(self.source.steps_per_epoch, -(-_TOKENS // self.batch.labels.size))
      stacked = batches_of(self.source, 0, count, seed=self.seed)
      each = (self.asked(jax.tree.map(lambda leaf, i=i: leaf[i], stacked)) for i in range(count))
      train = token_checks.probe_tokens(self.taught, each, vocabulary=size, most=_TOKENS)
    if self.teacher is not None and self.has_labels:
      assert self.validation is not None
      batches = evaluation.batches_of(self.validation)
      held_out = token_checks.probe_tokens(self.teacher, batches, vocabulary=size, most=_TOKENS)
    first = train if held_out is None else held_out
    if first is None:
      return []
    temperature = max(self.temperatures, default=None)
    found = [
      token_checks.shifted_labels(first),
      token_checks.targets(first, temperature=temperature),
      token_checks.padded_vocabulary(first, size),
    ]
    if held_out is not None:
      found.append(token_checks.long_context(held_out))
      found += [] if train is None else [token_checks.memorised(train, held_out)]
    return found

  def calibration(self) -> list[Finding | None]:
    assert self.held_out is not None
    temperature = max(self.temperatures, default=None)
    return [teacher_checks.misleading(*self.held_out, temperature=temperature)]
