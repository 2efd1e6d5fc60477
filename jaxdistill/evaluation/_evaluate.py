"""Evaluation on held-out data: exact averages, fidelity to the teacher, and what it costs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.errors
import flax.struct
import jax
import numpy as np

from jaxdistill import _check
from jaxdistill.evaluation import cost, metrics, predictions
from jaxdistill.evaluation._programs import Kept, batches_of, kept, settled
from jaxdistill.teachers import answered, asked_on_host
from jaxdistill.types import Batch, Model, Outputs, Teacher

__all__ = [
  "Validator",
  "costs",
  "evaluate",
  "examine",
  "logits_of",
  "taught",
  "validator",
]

# What comes of variables that belong to another network.
_MISFITS = (
  _check.VariablesError,
  flax.errors.FlaxError,
  TypeError,
  AttributeError,
  IndexError,
)


def evaluate(
  model: Model | Teacher, batches: Batch, *, teacher: Teacher | None = None
) -> dict[str, np.ndarray]:
  """Evaluates a model on a whole split, padded rows excluded exactly.

  A network is compiled for once, whatever is evaluated of it: all its models, on any split in
  batches of one size, with a teacher or without.

  Args:
    model: what `jaxdistill.fit` returned, ``Model(network, variables)``, or a teacher (an ensemble,
      say).
    batches: leaves ``[N, B, ...]``, from `jaxdistill.data.evaluation_batches`.
    teacher: to measure agreement with; by default what the batches bring along of one (`taught`).

  Returns:
    ``accuracy``, ``top5``, ``nll`` (nats), ``ece`` (15 bins), ``brier``, and with a teacher
    ``agreement``, ``kl`` (nats, teacher to student) and ``accuracy_where_teacher_wrong``; each of
    shape ``[S]`` for a model of S seeds, else ``[]``. What could not be measured is absent: without
    labels there are ``agreement`` and ``kl`` alone. NaN says that the model's logits are.

  Raises:
    TypeError: an argument is of another kind, or labels are no classes.
    ValueError: variables do not fit their network, or labels lie beyond its classes.
  """
  return _finished(_measured(model, batches, teacher), batches, teacher)


def examine(
  model: Model | Teacher, batches: Batch, *, teacher: Teacher | None = None
) -> tuple[dict[str, np.ndarray], predictions.Answers]:
  """What `evaluate` does, and in the same pass what the model said of each example.

  Args:
    model: a model, or a teacher.
    batches: leaves ``[N, B, ...]``, from `jaxdistill.data.evaluation_batches`.
    teacher: to measure agreement with, as in `evaluate`.

  Returns:
    ``(metrics, answers)``: the answers ``[S, N]`` are of the N examples that
    `evaluation.predictions.counted` picks, in their order; S is 1 for a model of one seed.
  """
  found = _measured(model, batches, teacher)
  where = predictions.counted(batches)
  each = jax.device_get([one.answers for one in found])
  joined = {
    name: np.atleast_2d(np.concatenate([answers[name] for answers in each], axis=-1))[:, where]
    for name in each[0]
  }
  return _finished(found, batches, teacher), predictions.Answers(**joined)


def taught(teacher: Teacher, batches: Batch) -> Batch:
  """The batches with what a teacher says of them: it is asked once, for any number of students.

  Args:
    teacher: the teacher.
    batches: leaves ``[N, B, ...]``, from `jaxdistill.data.evaluation_batches`.

  Returns:
    The same batches, whose ``teacher`` holds its logits ``[N, B, K]`` on the host.

  Raises:
    TypeError: an argument is of another kind.
    ValueError: the teacher's variables do not fit.
  """
  _check_batches(batches)
  _check_teacher(teacher)
  if asked_on_host(teacher):
    said = [jax.device_get(teacher(batch)) for batch in batches_of(batches)]
    return dataclasses.replace(
      batches, teacher=jax.tree.map(lambda *leaves: np.stack(leaves), *said)
    )
  teacher = settled(teacher)
  with _fitting(None):
    ask = kept(_logits, teacher, next(batches_of(batches))).compiled(len(batches.weight))
  logits = jax.device_get([ask(teacher, batch) for batch in batches_of(batches)])
  return dataclasses.replace(batches, teacher=Outputs(logits=np.stack(logits)))


def logits_of(model: Model | Teacher, batch: Batch) -> jax.Array:
  """What a model says of a batch.

  Args:
    model: a model, or a teacher.
    batch: leaves ``[B, ...]``.

  Returns:
    ``[B, K]``, or ``[B, L, K]`` for tokens.

  Raises:
    TypeError: it puts out no logits.
  """
  outputs = model(batch)
  logits = outputs.logits if isinstance(outputs, Outputs) else None
  if not hasattr(logits, "shape"):
    raise TypeError(f"the model must put out logits [B, K], and gave {_check.show(outputs)}.")
  return logits


_Sums = dict[str, Any]


@flax.struct.dataclass
class _Measured:
  """What is measured of a model on a batch: sums, the teacher's part of them, and its answers."""

  quality: Any
  fidelity: Any
  answers: Any


@dataclasses.dataclass(frozen=True)
class _Measure:
  """The program of a batch; equal for models whose logits come of the same function.

  No scan over the batches: XLA computes convolutions inside a loop many times slower on a CPU.
  """

  logits: Callable[[Model | Teacher, Batch], jax.Array]
  __name__ = "evaluation"  # the program's, where a log of the compiler names it

  def __call__(self, model: Model | Teacher, said: Outputs, batch: Batch) -> _Measured:
    """Measures a model beside the teacher's logits ``[B, K]``, where it gave any (``[B]``)."""
    where, told = batch.weight * batch.labelled, batch.weight * said.where

    def measure(logits: jax.Array) -> _Measured:
      return _Measured(
        quality=metrics.classification_sums(logits, batch.labels, where),
        fidelity=metrics.fidelity_sums(logits, said.logits, batch.labels, told, batch.labelled),
        answers=predictions.answers(logits, batch.labels),
      )

    return (measure if _seeds(model) is None else jax.vmap(measure))(self.logits(model, batch))


def _seeds(model: Model | Teacher) -> int | None:
  return None if isinstance(model, Teacher) else model.seeds


def _logits(model: Model | Teacher, batch: Batch) -> jax.Array:
  """What a model says of a batch: ``[B, K]``, or ``[S, B, K]`` where it has S seeds."""
  if isinstance(model, Teacher) or model.seeds is None:
    return logits_of(model, batch)
  network = model.network
  return jax.vmap(lambda variables: logits_of(Model(network, variables), batch))(model.variables)


class _Pass:
  """A model, and a teacher, on the batches of a split: checked, and compiled at the first call."""

  def __init__(self, model: Any, batches: Batch, teacher: Any) -> None:
    """Checks whether the arguments go together; they may be shapes."""
    _check_batches(batches)
    _check_model(model)
    if teacher is not None:
      _check_teacher(teacher)
    if isinstance(model, Model):  # without what a run's state and history add to it
      model = Model(model.network, model.variables, model.seeds)
    self.model, self.teacher = settled((model, teacher))
    if not predictions.counted(batches).any():  # whatever stands where labels would
      batches = dataclasses.replace(batches, labels=np.zeros(batches.weight.shape, np.int32))
    self.batches, first = batches, next(batches_of(batches))
    self.asked: Kept | None = None
    model = _of_batch(model, first)
    with _fitting(_seeds(model)):
      logits = kept(_logits, model, self._shown(first))
    _check_labels(batches, logits.outputs.shape[-1])
    with _fitting(_seeds(model)):
      # Where no teacher is, a mute one takes its place and what comes of it is not looked at: the
      # program is the same, and compiling another takes longer than its few sums ever will.
      mute = np.zeros((len(first.weight), logits.outputs.shape[-1]), np.float32)
      self.mute = settled((self.model, _said(mute)))[1]
      said: Any = self.mute
      if teacher is not None:
        self.asked = kept(_logits, teacher, first)
        said = dataclasses.replace(said, logits=self.asked.outputs)
      elif first.teacher is not None:
        said = _said(first.teacher.logits, first.teacher.where)
      self.program = kept(_Measure(logits.traced), model, said, self._shown(first))

  def _shown(self, batch: Batch) -> Batch:
    """What the model sees of a batch: a network sees no teacher's outputs."""
    return dataclasses.replace(batch, teacher=None) if isinstance(self.model, Model) else batch

  def compile(self, calls: float) -> None:
    """Begins to compile in the background, for so many passes without a teacher."""
    count = len(self.batches.weight)
    first = self._shown(next(batches_of(self.batches)))
    self.program.compiled(calls * count).compile(self.model, self.mute, first)

  def __call__(self, calls: float = 1) -> list[_Measured]:
    """Goes through the batches, once of so many times; waits for nothing."""
    calls = calls * len(self.batches.weight)
    program = self.program.compiled(calls)
    ask = None if self.asked is None else self.asked.compiled(calls)
    found = []
    for batch in batches_of(self.batches):
      said = self.mute
      if ask is not None:
        said = dataclasses.replace(said, logits=ask(self.teacher, batch))
      elif batch.teacher is not None:
        told = _said(batch.teacher.logits, batch.teacher.where)
        said = settled((self.model, told))[1]
      found.append(program(_of_batch(self.model, batch), said, self._shown(batch)))
    return found


def _said(logits: Any, where: Any = None) -> Outputs:
  """A teacher's logits ``[B, ..., K]``, with the mask of those that it gave."""
  return Outputs(logits=logits, where=np.ones(len(logits), np.float32) if where is None else where)


def _of_batch(model: Any, batch: Batch) -> Any:
  """The model; a teacher of another program as what it says of this batch."""
  return answered(model, batch) if isinstance(model, Teacher) else model


def _measured(model: Any, batches: Batch, teacher: Any) -> list[_Measured]:
  if isinstance(teacher, Teacher) and asked_on_host(teacher):
    batches, teacher = taught(teacher, batches), None
  return _Pass(model, batches, teacher)()


def _finished(
  found: list[_Measured], batches: Batch, teacher: Teacher | None
) -> dict[str, np.ndarray]:
  """The metrics of a pass; without a teacher none that compare with one."""
  compared = teacher is not None or batches.teacher is not None
  each = [{**one.quality, **(one.fidelity if compared else {})} for one in found]
  # Added on the host, where nothing has to be compiled for it and float64 counts on.
  sums = jax.tree.map(np.float64, jax.device_get(each))
  return metrics.finish(functools.reduce(metrics.add_sums, sums))


@contextlib.contextmanager
def _fitting(seeds: int | None) -> Iterator[None]:
  """Says of a failure to trace that variables do not fit."""
  uneven = () if seeds is None else (ValueError,)  # vmap's, over leaves of different lengths
  try:
    yield
  except (*_MISFITS, *uneven) as error:
    raise ValueError(
      f"the variables (or the teacher's) do not fit the network, with seeds={seeds}: "
      f"{_check.short(error)} The variables of a run over several seeds are "
      "Model(network, variables, seeds=S), those of one Model(network, variables)."
    ) from error


def _check_teacher(teacher: Any) -> None:
  if not isinstance(teacher, Teacher):
    raise TypeError(
      f"teacher={_check.show(teacher)} must be a Teacher; make one by teachers.frozen(model)."
    )


def _check_model(model: Any) -> None:
  if not isinstance(model, Model | Teacher):
    raise TypeError(
      f"model={_check.show(model)} must be a Model (what fit returns, or Model(network, "
      "variables)) or a Teacher."
    )


def _check_batches(batches: Any) -> None:
  if not isinstance(batches, Batch) or np.ndim(batches.weight) != 2:
    raise TypeError(
      f"batches must be what data.evaluation_batches makes, leaves [N, B, ...], got "
      f"{_check.show(batches)}."
    )


def _check_labels(batches: Batch, classes: int) -> None:
  """Raises for a label that is no class of the logits', which would count as an error."""
  labels, shape = np.asarray(batches.labels), batches.weight.shape
  if labels.shape != shape or not np.issubdtype(labels.dtype, np.integer):
    raise TypeError(
      f"the batches' labels must be whole numbers {list(shape)}, a class for each example, "
      f"got {_check.show(labels)}: of others there is no accuracy. Agreement with a teacher needs "
      "none; say by labelled=0 throughout that there are none."
    )
  found = labels.reshape(-1)[predictions.counted(batches)]
  least, largest = found.min(initial=0), found.max(initial=0)
  if least < 0 or largest >= classes:
    raise ValueError(
      f"the batches have the label {least if least < 0 else largest} and the network puts out "
      f"{classes} classes, from 0 on: evaluate on a split of its own classes, and say by "
      "labelled=0 which examples have no label."
    )


def validator(batches: Batch) -> Validator:
  """What a run measures on its way (`train.Watch`): compiled once, called often.

  Args:
    batches: the validation split, from `jaxdistill.data.evaluation_batches`.

  Returns:
    ``model -> {"accuracy", "nll", "ece"}``, see `Validator`.

  Raises:
    TypeError: ``batches`` are none.
    ValueError: no example of the split has a label.
  """
  return Validator(batches)


class Validator:
  """What `validator` makes: ``model -> {"accuracy", "nll", "ece"}``."""

  def __init__(self, batches: Batch) -> None:
    """Compiles nothing yet.

    Args:
      batches: the validation split.
    """
    _check_batches(batches)
    if not predictions.counted(batches).any():
      raise ValueError(
        "no example of batches has a label, and all that a validator measures is of labels: give a "
        "split that has some, or a function of your own."
      )
    self._batches, self._calls = batches, math.inf

  def compile(self, model: Model, *, calls: int | None = None) -> None:
    """Begins to compile in the background, so that the first call need not.

    Args:
      model: what it will be called with, or its leaves' shapes, dtypes and shardings.
      calls: how often it will be called: what computes little in all of them is compiled quickly,
        and runs slower. None for many times.
    """
    self._calls = math.inf if calls is None else calls
    _Pass(model, self._batches, None).compile(self._calls)

  def __call__(self, model: Model) -> dict[str, np.ndarray]:
    """The metrics of a model; ``[S]`` each for one of S seeds."""
    numbers = _finished(_Pass(model, self._batches, None)(self._calls), self._batches, None)
    return {name: numbers[name] for name in ("accuracy", "nll", "ece")}


def costs(model: Model | Teacher, batches: Batch, *, seconds: float = 1.0) -> dict[str, Any]:
  """What a deployed model costs, on this machine.

  Args:
    model: a model, or a teacher; of several seeds the first is measured.
    batches: leaves ``[N, B, ...]``; the first examples are what is timed.
    seconds: how long to time, for latency and for throughput each.

  Returns:
    ``parameters``, ``bytes`` (of all variables), ``flops`` of one example (by walking the jaxpr, a
    multiply-add being two), ``xla_flops`` (the compiler's own figure), ``latency_ms`` at batch 1 as
    ``{"median", "p95"}``, and ``throughput`` in examples a second at batch B,
    ``throughput_batch``. ``flops`` is absent where an operation's cost cannot be read off, and
    ``xla_flops`` where the compiler has no figure. Of a teacher of another program
    (`teachers.foreign`) only its times are known.
  """
  _check_model(model)
  _check.number("seconds", seconds, above=0)
  _check_batches(batches)
  model = settled(model.instance(0) if isinstance(model, Model) else model)
  batch = jax.device_get(next(batches_of(dataclasses.replace(batches, teacher=None))))
  one = jax.tree.map(lambda leaf: leaf[:1], batch)
  size = len(batch.weight)
  if isinstance(model, Teacher) and asked_on_host(model):
    times = cost.timed(lambda: model(one), seconds=seconds)
    each = cost.timed(lambda: model(batch), seconds=seconds)["median"] / 1000
    return {"latency_ms": times, "throughput": size / each, "throughput_batch": size}
  # One program for each of the two sizes, whatever is asked of it; nothing is timed before both
  # are compiled, beside one another.
  programs = [kept(_logits, model, given).plain() for given in (one, batch)]
  for program, given in zip(programs, (one, batch), strict=True):
    program.compile(model, given)
  at_one, at_size = (program.ready() for program in programs)
  found = {
    "parameters": cost.parameters(model.variables),
    "bytes": cost.size_bytes(model.variables),
    "flops": cost.flops_or_none(at_one, model, one),
    "xla_flops": cost.xla_flops(at_one, model, one),
    "latency_ms": cost.latency(at_one, model, one, seconds=seconds),
    "throughput": cost.throughput(at_size, model, batch, examples=size, seconds=seconds),
    "throughput_batch": size,
  }
  return {name: value for name, value in found.items() if value is not None}
