"""Evaluation on held-out data: exact averages, fidelity to the teacher, and what it costs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.errors
import jax
import numpy as np

from jaxdistill import _check, _compile
from jaxdistill._compile import BackgroundCompiled
from jaxdistill.evaluation import cost, metrics, predictions
from jaxdistill.types import Batch, Network, Teacher

__all__ = [
  "Predict",
  "Validator",
  "costs",
  "evaluate",
  "examine",
  "predictor",
  "teacher_predictor",
  "validator",
]

PyTree = Any
# What comes of variables that belong to another network.
_MISFITS = (
  _check.VariablesError,
  flax.errors.FlaxError,
  TypeError,
  AttributeError,
  IndexError,
)
# ``(variables, batch) -> logits [B, K]`` in inference mode.
Predict = Callable[[PyTree, Batch], jax.Array]


def predictor(network: Network) -> Predict:
  """A network as what is deployed: its logits in inference mode, and nothing else."""

  def predict(variables: PyTree, batch: Batch) -> jax.Array:
    outputs, _ = network.apply(variables, batch.inputs, train=False, key=None)
    return outputs.logits

  return predict


def teacher_predictor(teacher: Teacher) -> Predict:
  """A teacher (an ensemble, say) as something to evaluate."""
  return lambda variables, batch: teacher(variables, batch).logits


def evaluate(
  predict: Predict,
  variables: PyTree,
  batches: Batch,
  *,
  reference: tuple[Predict, PyTree] | None = None,
  stacked: bool = False,
) -> dict[str, np.ndarray]:
  """Evaluates a model on a whole split, padded rows excluded exactly.

  Args:
    predict: ``(variables, batch) -> logits [B, K]``.
    variables: the model's variables; leaves ``[S, ...]`` when ``stacked``.
    batches: leaves ``[N, B, ...]``, from `jaxdistill.data.evaluation_batches`.
    reference: the teacher, as ``(predict, variables)``, to measure agreement with.
    stacked: whether the variables are those of S seeds.

  Returns:
    ``accuracy``, ``top5``, ``nll`` (nats), ``ece`` (15 bins), ``brier``, ``examples``, and with a
    reference ``agreement``, ``kl`` (nats, teacher to student) and
    ``accuracy_where_teacher_wrong``; each of shape ``[S]`` when ``stacked``, else ``[]``. NaN
    where a number is undefined.
  """
  _check_models(predict, reference)
  sums, _ = _compiled(predict, reference[0] if reference else None, stacked)(
    variables, reference[1] if reference else None, batches
  )
  return metrics.finish(sums)


def examine(
  predict: Predict,
  variables: PyTree,
  batches: Batch,
  *,
  reference: tuple[Predict, PyTree] | None = None,
  stacked: bool = False,
) -> tuple[dict[str, np.ndarray], predictions.Answers]:
  """What `evaluate` does, and in the same pass what the model said of each example.

  Args:
    predict: as in `evaluate`.
    variables: as in `evaluate`.
    batches: as in `evaluate`.
    reference: as in `evaluate`.
    stacked: as in `evaluate`.

  Returns:
    ``(metrics, answers)``: the answers ``[S, N]`` are of the N examples that
    `evaluation.predictions.counted` picks, in their order; S is 1 where nothing is stacked.
  """
  _check_models(predict, reference)
  sums, each = _compiled(predict, reference[0] if reference else None, stacked, each=True)(
    variables, reference[1] if reference else None, batches
  )
  where = predictions.counted(batches)
  joined = {
    name: np.atleast_2d(np.concatenate(parts, axis=-1))[:, where]
    for name, parts in jax.device_get(each).items()
  }
  return metrics.finish(sums), predictions.Answers(**joined)


def _check_models(predict: Any, reference: Any) -> None:
  _check.function(
    "predict", predict, "(variables, batch) -> logits", arguments=2, instead="See predictor."
  )
  if reference is not None and not (isinstance(reference, tuple) and len(reference) == 2):
    raise TypeError(f"reference must be (predict, variables), got {_check.show(reference)}.")


_Sums = dict[str, Any]


def _compiled(
  predict: Predict,
  reference: Predict | None,
  stacked: bool,
  *,
  calls: int | None = 1,
  each: bool = False,
) -> _Compiled:
  """One program for a batch, dispatched for each.

  With ``each``, the answers on each example come along, batch by batch. ``calls`` is how often all
  batches are gone through; None for many times.

  No scan over the batches: XLA computes convolutions inside a loop many times slower on a CPU.
  """
  classes: list[int] = []

  def batch_sums(variables: PyTree, taught: Any, batch: Batch) -> tuple[_Sums, _Sums]:
    logits = predict(variables, batch)
    if not hasattr(logits, "shape"):
      raise TypeError(f"predict must return logits [B, K], got {_check.show(logits)}")
    classes.append(logits.shape[-1])
    where = batch.weight * batch.labelled
    sums = metrics.classification_sums(logits, batch.labels, where)
    if taught is not None:
      sums |= metrics.fidelity_sums(logits, taught, batch.labels, where)
    return sums, predictions.answers(logits, batch.labels) if each else {}

  over_models = jax.vmap(batch_sums, in_axes=(0, None, None)) if stacked else batch_sums

  def one_batch(
    variables: PyTree, reference_variables: PyTree, batches: Batch, i: Any
  ) -> tuple[_Sums, _Sums]:
    batch = jax.tree.map(lambda leaf: leaf[i], batches)
    # The reference is run once a batch, whatever the number of seeds.
    taught = None if reference is None else reference(reference_variables, batch)
    return over_models(variables, taught, batch)

  return _Compiled(one_batch, stacked, classes, calls)


@dataclasses.dataclass(eq=False)
class _Compiled:
  """What `_compiled` returns; ``classes`` holds their number once ``function`` was traced."""

  function: Callable[..., Any]
  stacked: bool
  classes: list[int]
  calls: int | None
  one: BackgroundCompiled | None = None

  def check(self, variables: PyTree, reference_variables: PyTree, batches: Batch) -> None:
    """Whether the arguments go together."""
    _check_batches(batches)
    uneven = (ValueError,) if self.stacked else ()  # vmap's, over leaves of different lengths
    try:
      jax.eval_shape(self.function, variables, reference_variables, batches, 0)
    except (*_MISFITS, *uneven) as error:
      raise ValueError(
        f"the variables (or the teacher's, in reference) do not fit the network, with "
        f"stacked={self.stacked}: {_check.short(error)} A run over seeds needs stacked=True, "
        "one alone stacked=False."
      ) from error
    _check_labels(batches, self.classes[-1] if self.classes else None)

  def compile(
    self, variables: PyTree, reference_variables: PyTree, batches: Batch, calls: int | None
  ) -> BackgroundCompiled:
    """Begins to compile in the background; checked arguments."""
    given, options = (variables, reference_variables, batches, 0), _compile.long()
    if calls is not None:
      each = len(batches.weight)
      options = _compile.by_work(self.function, *given, calls=calls * each)
    self.one = BackgroundCompiled(jax.jit(self.function, compiler_options=options))
    self.one.compile(*given)
    return self.one

  def __call__(
    self, variables: PyTree, reference_variables: PyTree, batches: Batch
  ) -> tuple[_Sums, dict[str, list[jax.Array]]]:
    self.check(variables, reference_variables, batches)
    one = self.one or self.compile(variables, reference_variables, batches, self.calls)
    found = [one(variables, reference_variables, batches, i) for i in range(len(batches.weight))]
    # Added on the host, where nothing has to be compiled for it and float64 counts on.
    sums = jax.tree.map(np.float64, jax.device_get([sums for sums, _ in found]))
    total = functools.reduce(metrics.add_sums, sums)
    return total, {name: [rows[name] for _, rows in found] for name in found[0][1]}


def _check_batches(batches: Any) -> None:
  if not isinstance(batches, Batch) or np.ndim(batches.weight) != 2:
    raise TypeError(
      f"batches must be what data.evaluation_batches makes, leaves [N, B, ...], got "
      f"{_check.show(batches)}."
    )


def _check_labels(batches: Batch, classes: int | None) -> None:
  """Raises for a label beyond the logits, which would count as an error and as no loss."""
  if classes is None or not np.issubdtype(batches.labels.dtype, np.integer):
    return
  counted = np.asarray(batches.weight) * np.asarray(batches.labelled) > 0
  labels = np.asarray(batches.labels)
  largest = labels[counted].max(initial=0) if labels.shape == counted.shape else 0
  if largest >= classes:
    raise ValueError(
      f"the batches have the label {largest} and the network puts out {classes} classes: evaluate "
      "on a split of its own classes."
    )


def validator(network: Network, batches: Batch, *, stacked: bool = False) -> Validator:
  """What `jaxdistill.train.fit` takes as ``validate``: compiled once, called often.

  Args:
    network: the network that is trained.
    batches: the validation split, from `jaxdistill.data.evaluation_batches`.
    stacked: whether several seeds are trained at once.

  Returns:
    ``variables -> {"accuracy", "nll", "ece"}``, see `Validator`.
  """
  if not isinstance(network, Network):
    raise TypeError(f"network must be a Network, got {_check.show(network)}.")
  _check_batches(batches)
  return Validator(_compiled(predictor(network), None, stacked, calls=None), batches)


@dataclasses.dataclass(frozen=True, eq=False)
class Validator:
  """What `validator` makes: ``variables -> {"accuracy", "nll", "ece"}``."""

  _compiled: _Compiled
  _batches: Batch

  def compile(self, variables: PyTree, *, calls: int | None = None) -> None:
    """Begins to compile in the background, so that the first call need not.

    Args:
      variables: what it will be called with, or their shapes, dtypes and shardings.
      calls: how often it will be called: what computes little in all of them is compiled quickly,
        and runs slower. None for many times.
    """
    self._compiled.check(variables, None, self._batches)
    self._compiled.compile(variables, None, self._batches, calls)

  def __call__(self, variables: PyTree) -> dict[str, np.ndarray]:
    """The metrics of these variables."""
    numbers = metrics.finish(self._compiled(variables, None, self._batches)[0])
    return {name: numbers[name] for name in ("accuracy", "nll", "ece")}


def costs(
  predict: Predict, variables: PyTree, batches: Batch, *, seconds: float = 1.0
) -> dict[str, Any]:
  """What a deployed model costs, on this machine.

  Args:
    predict: ``(variables, batch) -> logits``.
    variables: one model's variables.
    batches: leaves ``[N, B, ...]``; the first examples are what is timed.
    seconds: how long to time, for latency and for throughput each.

  Returns:
    ``parameters``, ``bytes`` (of all variables), ``flops`` of one example (by walking the jaxpr, a
    multiply-add being two; None where an operation's cost is unknown), ``xla_flops`` (the
    compiler's own figure, or None), ``latency_ms`` at batch 1 as ``{"median", "p95"}``, and
    ``throughput`` in examples a second at batch B, ``throughput_batch``.
  """
  _check.function("predict", predict, "(variables, batch) -> logits", arguments=2)
  _check.number("seconds", seconds, above=0)
  _check_batches(batches)
  batch = jax.tree.map(lambda leaf: leaf[0], batches)
  one = jax.tree.map(lambda leaf: leaf[:1], batch)
  size = int(batch.weight.shape[0])
  return {
    "parameters": cost.parameters(variables),
    "bytes": cost.size_bytes(variables),
    "flops": cost.flops_or_none(predict, variables, one),
    "xla_flops": cost.xla_flops(predict, variables, one),
    "latency_ms": cost.latency(predict, variables, one, seconds=seconds),
    "throughput": cost.throughput(predict, variables, batch, examples=size, seconds=seconds),
    "throughput_batch": size,
  }
