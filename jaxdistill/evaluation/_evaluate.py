"""Evaluation on held-out data: exact averages, fidelity to the teacher, and what it costs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.errors
import jax
import numpy as np

from jaxdistill import _check, _compile
from jaxdistill._compile import BackgroundCompiled
from jaxdistill.evaluation import cost, metrics, predictions
from jaxdistill.types import Batch, Model, Outputs, Teacher

__all__ = [
  "Validator",
  "costs",
  "evaluate",
  "examine",
  "logits_of",
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

  Args:
    model: what `jaxdistill.fit` returned, ``Model(network, variables)``, or a teacher (an ensemble,
      say).
    batches: leaves ``[N, B, ...]``, from `jaxdistill.data.evaluation_batches`.
    teacher: to measure agreement with.

  Returns:
    ``accuracy``, ``top5``, ``nll`` (nats), ``ece`` (15 bins), ``brier``, ``examples``, and with a
    teacher ``agreement``, ``kl`` (nats, teacher to student) and ``accuracy_where_teacher_wrong``;
    each of shape ``[S]`` for a model of S seeds, else ``[]``. NaN where a number is undefined.

  Raises:
    TypeError: an argument is of another kind.
    ValueError: variables do not fit their network, or labels lie beyond its classes.
  """
  sums, _ = _Compiled()(model, teacher, batches)
  return metrics.finish(sums)


def examine(
  model: Model | Teacher, batches: Batch, *, teacher: Teacher | None = None
) -> tuple[dict[str, np.ndarray], predictions.Answers]:
  """What `evaluate` does, and in the same pass what the model said of each example.

  Args:
    model: a model, or a teacher.
    batches: leaves ``[N, B, ...]``, from `jaxdistill.data.evaluation_batches`.
    teacher: to measure agreement with.

  Returns:
    ``(metrics, answers)``: the answers ``[S, N]`` are of the N examples that
    `evaluation.predictions.counted` picks, in their order; S is 1 for a model of one seed.
  """
  sums, each = _Compiled(each=True)(model, teacher, batches)
  where = predictions.counted(batches)
  joined = {
    name: np.atleast_2d(np.concatenate(parts, axis=-1))[:, where]
    for name, parts in jax.device_get(each).items()
  }
  return metrics.finish(sums), predictions.Answers(**joined)


_Sums = dict[str, Any]


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


@dataclasses.dataclass(eq=False)
class _Compiled:
  """One program for a batch, dispatched for each.

  With ``each``, the answers on each example come along, batch by batch. ``calls`` is how often all
  batches are gone through; None for many times.

  No scan over the batches: XLA computes convolutions inside a loop many times slower on a CPU.
  """

  each: bool = False
  calls: int | None = 1
  one: BackgroundCompiled | None = None
  classes: int = 0  # known once `batch` was traced

  def batch(
    self, model: Model | Teacher, teacher: Teacher | None, batches: Batch, i: Any
  ) -> tuple[_Sums, _Sums]:
    """The sums over a batch, and the answers."""
    batch = jax.tree.map(lambda leaf: leaf[i], batches)
    # The teacher is run once a batch, whatever the number of seeds.
    taught = None if teacher is None else logits_of(teacher, batch)
    where = batch.weight * batch.labelled

    def sums_of(model: Model | Teacher) -> tuple[_Sums, _Sums]:
      logits = logits_of(model, batch)
      self.classes = logits.shape[-1]
      sums = metrics.classification_sums(logits, batch.labels, where)
      if taught is not None:
        sums |= metrics.fidelity_sums(logits, taught, batch.labels, where)
      return sums, predictions.answers(logits, batch.labels) if self.each else {}

    if isinstance(model, Teacher) or model.seeds is None:
      return sums_of(model)
    network = model.network
    return jax.vmap(lambda variables: sums_of(Model(network, variables)))(model.variables)

  def check(self, model: Any, teacher: Any, batches: Batch) -> None:
    """Whether the arguments go together."""
    _check_batches(batches)
    _check_model(model)
    if not isinstance(teacher, Teacher | None):
      raise TypeError(
        f"teacher={_check.show(teacher)} must be a Teacher; make one by teachers.frozen(model)."
      )
    seeds = None if isinstance(model, Teacher) else model.seeds
    uneven = () if seeds is None else (ValueError,)  # vmap's, over leaves of different lengths
    try:
      jax.eval_shape(self.batch, model, teacher, batches, 0)
    except (*_MISFITS, *uneven) as error:
      raise ValueError(
        f"the variables (or the teacher's) do not fit the network, with seeds={seeds}: "
        f"{_check.short(error)} The variables of a run over several seeds are "
        "Model(network, variables, seeds=S), those of one Model(network, variables)."
      ) from error
    _check_labels(batches, self.classes)

  def compile(
    self, model: Model | Teacher, teacher: Teacher | None, batches: Batch, calls: int | None
  ) -> BackgroundCompiled:
    """Begins to compile in the background; checked arguments."""
    given, options = (model, teacher, batches, 0), _compile.long()
    if calls is not None:
      options = _compile.by_work(self.batch, *given, calls=calls * len(batches.weight))
    self.one = BackgroundCompiled(self.batch)
    self.one.compile(*given, options=options)
    return self.one

  def __call__(
    self, model: Model | Teacher, teacher: Teacher | None, batches: Batch
  ) -> tuple[_Sums, dict[str, list[jax.Array]]]:
    self.check(model, teacher, batches)
    if isinstance(model, Model):  # without what a run's state and history add to it
      model = Model(model.network, model.variables, model.seeds)
    one = self.one or self.compile(model, teacher, batches, self.calls)
    found = [one(model, teacher, batches, i) for i in range(len(batches.weight))]
    # Added on the host, where nothing has to be compiled for it and float64 counts on.
    sums = jax.tree.map(np.float64, jax.device_get([sums for sums, _ in found]))
    total = functools.reduce(metrics.add_sums, sums)
    return total, {name: [rows[name] for _, rows in found] for name in found[0][1]}


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
  """Raises for a label beyond the logits, which would count as an error and as no loss."""
  if not np.issubdtype(batches.labels.dtype, np.integer):
    return
  counted = np.asarray(batches.weight) * np.asarray(batches.labelled) > 0
  labels = np.asarray(batches.labels)
  largest = labels[counted].max(initial=0) if labels.shape == counted.shape else 0
  if largest >= classes:
    raise ValueError(
      f"the batches have the label {largest} and the network puts out {classes} classes: evaluate "
      "on a split of its own classes."
    )


def validator(batches: Batch) -> Validator:
  """What a run measures on its way (`train.Watch`): compiled once, called often.

  Args:
    batches: the validation split, from `jaxdistill.data.evaluation_batches`.

  Returns:
    ``model -> {"accuracy", "nll", "ece"}``, see `Validator`.
  """
  _check_batches(batches)
  return Validator(_Compiled(calls=None), batches)


@dataclasses.dataclass(frozen=True, eq=False)
class Validator:
  """What `validator` makes: ``model -> {"accuracy", "nll", "ece"}``."""

  _compiled: _Compiled
  _batches: Batch

  def compile(self, model: Model, *, calls: int | None = None) -> None:
    """Begins to compile in the background, so that the first call need not.

    Args:
      model: what it will be called with, or its leaves' shapes, dtypes and shardings.
      calls: how often it will be called: what computes little in all of them is compiled quickly,
        and runs slower. None for many times.
    """
    self._compiled.check(model, None, self._batches)
    self._compiled.compile(model, None, self._batches, calls)

  def __call__(self, model: Model) -> dict[str, np.ndarray]:
    """The metrics of a model; ``[S]`` each for one of S seeds."""
    numbers = metrics.finish(self._compiled(model, None, self._batches)[0])
    return {name: numbers[name] for name in ("accuracy", "nll", "ece")}


def costs(model: Model | Teacher, batches: Batch, *, seconds: float = 1.0) -> dict[str, Any]:
  """What a deployed model costs, on this machine.

  Args:
    model: a model, or a teacher; of several seeds the first is measured.
    batches: leaves ``[N, B, ...]``; the first examples are what is timed.
    seconds: how long to time, for latency and for throughput each.

  Returns:
    ``parameters``, ``bytes`` (of all variables), ``flops`` of one example (by walking the jaxpr, a
    multiply-add being two; None where an operation's cost is unknown), ``xla_flops`` (the
    compiler's own figure, or None), ``latency_ms`` at batch 1 as ``{"median", "p95"}``, and
    ``throughput`` in examples a second at batch B, ``throughput_batch``.
  """
  _check_model(model)
  _check.number("seconds", seconds, above=0)
  _check_batches(batches)
  if isinstance(model, Model):
    model = model.instance(0)
  batch = jax.tree.map(lambda leaf: leaf[0], batches)
  one = jax.tree.map(lambda leaf: leaf[:1], batch)
  size = int(batch.weight.shape[0])
  return {
    "parameters": cost.parameters(model.variables),
    "bytes": cost.size_bytes(model.variables),
    "flops": cost.flops_or_none(logits_of, model, one),
    "xla_flops": cost.xla_flops(logits_of, model, one),
    "latency_ms": cost.latency(logits_of, model, one, seconds=seconds),
    "throughput": cost.throughput(logits_of, model, batch, examples=size, seconds=seconds),
    "throughput_batch": size,
  }
