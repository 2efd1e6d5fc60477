"""What `jaxdistill.search.preflight` looks at: predictions, terms' gradients, a few steps, a curve.

Nothing here changes what it is given: the steps of `taught_further` are taken on a copy.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdistill import _check, evaluation, losses, runs
from jaxdistill._compile import quickly
from jaxdistill.data import Batches, Source
from jaxdistill.evaluation import logits_of, tasks
from jaxdistill.search._checks.calibration import calibrating_temperature, losses_at
from jaxdistill.train import State, init_state, reduce_terms
from jaxdistill.types import (
  Batch,
  Model,
  Network,
  Objective,
  Outputs,
  Teacher,
  as_objective,
  with_logits,
)

__all__ = [
  "ProbedTerm",
  "batches_of",
  "curve",
  "probe_terms",
  "said_of",
  "taught_further",
]

PyTree = Any
# Rates of the probe steps: that of Adam's authors, and a tenth of it for what is at rest already.
RATES = (1e-3, 1e-4)


@dataclasses.dataclass(frozen=True)
class ProbedTerm:
  """One term of an objective on a batch, at the student's initialisation.

  Attributes:
    weight: the term's weight; of a schedule, the one under which the weighted norm is largest.
    value: its mean over what counts, not weighted.
    counted: how much counts: the sum of its mask.
    norm: the Euclidean norm of the gradient of ``value`` by the student's parameters, not weighted.
    objective_norm: that of its gradient by what the objective learns (projectors).
    label_change: by how much other labels change those gradients, relative to their size: 0 for a
      term that does not read labels.
  """

  weight: float
  value: float
  counted: float
  norm: float
  objective_norm: float
  label_change: float


def batches_of(source: Source, step: int, count: int, *, seed: int = 0) -> Batch:
  """Training batches as a run would see them, stacked.

  Args:
    source: where they come from.
    step: the first step.
    count: how many.
    seed: for the source's transform.

  Returns:
    A `Batch` with leaves ``[count, B, ...]``.
  """
  items = source.items(step, count)
  key, transform = jax.random.key(seed), source.transform

  @jax.jit
  def cut(shared: PyTree, item: PyTree, number: Any) -> Batch:
    batch = source.cut(shared, item)
    return batch if transform is None else transform(jax.random.fold_in(key, number), batch)

  each = [cut(source.shared, jax.tree.map(lambda x, i=i: x[i], items), i) for i in range(count)]
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def curve(run: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray, int | None]:
  """The training loss of a run, from the lines of its ``metrics.jsonl``.

  Args:
    run: its folder.

  Returns:
    ``(steps [N], losses [N], planned)``: the mean over seeds, NaN where it was not finite; and how
    many steps its ``config.json`` speaks of, or None.

  Raises:
    FileNotFoundError: there is no such file.
  """
  folder = _check.folder("run", run)
  try:
    lines, _ = runs.read_metrics(folder)
  except FileNotFoundError:
    raise FileNotFoundError(f"{os.fspath(run)!r} holds no run: it has no metrics.jsonl.") from None
  steps, values = [], []
  for line in lines:
    try:
      mean = np.mean(np.asarray(line["loss"], np.float64))  # null becomes NaN
    except (ValueError, KeyError, TypeError):
      continue
    steps.append(line["step"])
    values.append(float(mean))
  planned = runs.read_config(folder).get("steps") if (folder / "config.json").exists() else None
  return np.array(steps), np.array(values), planned if isinstance(planned, int) else None


def said_of(
  models: Sequence[Model | Teacher], batches: Batch | Batches, *, most: int = 10_000
) -> tuple[np.ndarray, np.ndarray]:
  """What models say of the labelled examples of a split.

  Args:
    models: models or teachers, one after another.
    batches: leaves ``[N, B, ...]``, or what makes them, with integer labels.
    most: examples (or tokens) after which no further batch is looked at.

  Returns:
    ``(logits [models, examples, K], labels [examples])`` on the host, without padding and without
    what has no label.

  Raises:
    ValueError: logits and labels do not fit.
  """
  one = jax.jit(logits_of)  # of models of one network, jit knows the program
  logits: list[list[np.ndarray]] = [[] for _ in models]
  labels: list[np.ndarray] = []
  for batch in evaluation.batches_of(batches):
    known = np.asarray(batch.labels)
    counted = np.asarray(tasks.counted(batch, batch.labels)) > 0
    for mine, model in zip(logits, models, strict=True):
      found = np.asarray(one(model, batch))
      found = found.astype(np.float32) if found.dtype.itemsize < 4 else found
      if found.shape[:-1] != known.shape:
        raise ValueError(
          f"the logits have the shape {found.shape} and the labels {known.shape}; labels must be "
          "integers, one for each row of logits."
        )
      mine.append(found[counted])
    labels.append(known[counted])
    if sum(map(len, labels)) >= most:
      break
  return np.stack([np.concatenate(mine) for mine in logits]), np.concatenate(labels)


def taught_further(
  model: Model, batches: Batch, held_out: Batch, *, steps: int = 20, rates: Sequence[float] = RATES
) -> tuple[np.ndarray, np.ndarray]:
  """What a few more steps on the labels would do to a trained network's loss.

  Adam's steps (Kingma, Ba, 2015) on a copy of the parameters, in inference mode: BatchNorm runs on
  its averages and nothing is dropped out. Both losses are those at the temperature that calibrates
  the network (Guo et al., 2017): a network that was trained with smoothed or mixed labels would
  otherwise seem to learn as soon as it becomes surer.

  Args:
    model: the network and its variables (an ensemble's member's), which are not changed.
    batches: leaves ``[N, B, ...]``, to learn from; they come round where there are fewer than
      ``steps``.
    held_out: leaves ``[N, B, ...]``: other training batches, to measure the loss on.
    steps: how many steps.
    rates: learning rates, each of which starts from the copy; the one that does best counts.

  Returns:
    ``(before, after)``: each held-out example's loss in nats, ``[examples]``.
  """
  network, variables = model.network, model.variables
  adam = optax.scale_by_adam()

  def loss(params: PyTree, rest: PyTree, batch: Batch) -> Any:
    now = Model(network, {"params": params, **rest})
    values = losses.cross_entropy(logits_of(now, batch), batch.labels)
    total, count = tasks.mean(values, tasks.counted(batch, values))
    return total / jnp.maximum(count, 1)

  def step(params: PyTree, moments: Any, rest: PyTree, batches: Batch, i: Any, rate: Any) -> Any:
    batch = jax.tree.map(lambda leaf: leaf[i], batches)
    updates, moments = adam.update(jax.grad(loss)(params, rest, batch), moments, params)
    return optax.apply_updates(params, jax.tree.map(lambda u: -rate * u, updates)), moments

  compiled = quickly(step)
  begin: Any = jax.jit(adam.init)
  rest = {name: value for name, value in variables.items() if name != "params"}

  def taught(rate: float) -> Model:
    # A step of 1e-4 would be lost in bfloat16's eight bits.
    now = jax.tree.map(
      lambda p: p.astype(jnp.promote_types(p.dtype, jnp.float32)), variables["params"]
    )
    moments = begin(now)
    for i in range(steps):
      now, moments = compiled(now, moments, rest, batches, i % len(batches.weight), rate)
    return Model(network, {"params": now, **rest})

  logits, labels = said_of([model, *map(taught, rates)], held_out)
  before, *after = [losses_at(z, labels, calibrating_temperature(z, labels)) for z in logits]
  return before, min(after, key=lambda values: np.nan_to_num(values.mean(), nan=np.inf))


def probe_terms(
  student: Network,
  objective: Objective,
  batch: Batch,
  *,
  teacher: Teacher | None = None,
  hyper: Sequence[Mapping[str, Any]] = ({},),
  start: Mapping[str, Any] | None = None,
  num_classes: int = 0,
  seed: int = 0,
) -> dict[str, ProbedTerm]:
  """Each term's gradient on a batch at initialisation, and whether it depends on the labels.

  Args:
    student: the network that will be trained.
    objective: the objective; what it learns or remembers comes from its own ``init``.
    batch: leaves ``[B, ...]``.
    teacher: not run where the batch brings its outputs along.
    hyper: the objective's keywords as numbers, once for each step of the run that is looked at.
    start: variables that the student starts from, all or some.
    num_classes: of the data; 0 where its labels are no classes.
    seed: of the initialisation.

  Returns:
    ``{name: ProbedTerm}``; each term as it is where its weighted gradient is largest.

  Raises:
    TypeError: the objective does not return what it should.
    ValueError: networks, objective and data do not fit together.
  """
  objective = as_objective(objective)
  begin = quickly(
    lambda key, teacher, batch: init_state(
      key,
      student,
      objective,
      optax.identity(),
      batch,
      teacher=teacher,
      start=start,
      num_classes=num_classes,
    ),
  )
  state = begin(jax.random.key(seed), teacher, batch)
  gradients = _gradients(student, objective, hyper)
  # The labels of a batch with few of them may all be hidden: what reads labels is asked about all.
  known = dataclasses.replace(batch, labelled=jnp.ones_like(batch.labelled))
  hidden = bool(np.any(np.asarray(batch.labelled) != 1))
  other = dataclasses.replace(known, labels=_other(batch.labels, num_classes))
  found: dict[str, ProbedTerm] = {}
  for keywords in hyper:
    given = {n: v for n, v in keywords.items() if _differs(n, hyper)}
    first, second = (gradients(state, teacher, b, given) for b in (known, other))
    real = gradients(state, teacher, batch, given) if hidden else first
    for name, (weight, value, count, grads) in real.items():
      term = ProbedTerm(
        weight=float(f"{float(weight):.7g}"),  # float32's digits
        value=float(value),
        counted=float(count),
        norm=_norm(grads[0]),
        objective_norm=_norm(grads[1]),
        label_change=_change(first[name][-1], second[name][-1]),
      )
      old = found.get(name)
      if old is None or abs(term.weight) * term.norm > abs(old.weight) * old.norm:
        found[name] = term
  return found


def _differs(name: str, hyper: Sequence[Mapping[str, Any]]) -> bool:
  return any(each[name] is not hyper[0][name] for each in hyper)


def _gradients(
  student: Network,
  objective: Objective,
  hyper: Sequence[Mapping[str, Any]],
) -> Any:
  """``(state, teacher, batch, keywords) -> {name: (weight, value, count, gradients)}``.

  Keywords that stay the same are constants of the program, as in a step; a schedule's are not.
  """
  fixed = {name: value for name, value in hyper[0].items() if not _differs(name, hyper)}

  def run(state: State, teacher: Teacher | None, batch: Batch, given: Mapping[str, Any]) -> Any:
    target: Outputs | None = batch.teacher
    if target is None and teacher is not None:
      target = with_logits(teacher(batch))
    keys = jax.random.split(state.key)

    def values_of(params: PyTree, learned: PyTree) -> Any:
      outputs, _ = student.apply(
        {"params": params, **state.model_state}, batch.inputs, train=True, key=keys[0]
      )
      outputs = with_logits(outputs)
      terms, _ = objective.apply(
        learned, state.objective_state, outputs, target, batch, key=keys[1], **fixed, **given
      )
      weights = {name: jnp.asarray(term.weight, jnp.float32) for name, term in terms.items()}
      plain = {name: dataclasses.replace(term, weight=1.0) for name, term in terms.items()}
      reduced = {name: reduce_terms({name: term}, batch) for name, term in plain.items()}
      counts = {name: sums[name][1] for name, (_, sums) in reduced.items()}
      return {name: mean for name, (mean, _) in reduced.items()}, (weights, counts)

    values, back, (weights, counts) = jax.vjp(
      values_of, state.params, state.objective_params, has_aux=True
    )
    zeros = jax.tree.map(jnp.zeros_like, values)
    return {
      name: (weights[name], value, counts[name], back({**zeros, name: jnp.ones_like(value)}))
      for name, value in values.items()
    }

  return quickly(run)


def _other(labels: Any, num_classes: int) -> Any:
  """A label that is wrong for every example."""
  if jnp.issubdtype(labels.dtype, jnp.integer):
    return (labels + 1) % max(num_classes, 2)
  # Of a distribution another one; of a number, or of the one target of an example, a larger.
  several = labels.ndim > 1 and labels.shape[-1] > 1
  return jnp.roll(labels, 1, axis=-1) if several else labels + 1


def _float64_leaves(tree: PyTree) -> list[np.ndarray]:
  return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]


def _norm(tree: PyTree) -> float:
  return float(np.sqrt(sum(np.sum(leaf**2) for leaf in _float64_leaves(tree))))


def _change(first: PyTree, second: PyTree) -> float:
  """The difference of two gradients relative to the larger one; 0 where both are 0."""
  apart = _norm(
    [a - b for a, b in zip(_float64_leaves(first), _float64_leaves(second), strict=True)]
  )
  largest = max(_norm(first), _norm(second))
  return apart / largest if largest > 0 else 0.0
