"""The train step: ``(state, teacher variables, batch) -> (state, sums)``, pure.

It knows nothing about devices, files or loops; `jaxdistill.train` compiles and drives it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxdistill.types import (
  Batch,
  Network,
  Objective,
  ObjectiveFunction,
  Outputs,
  Teacher,
  Term,
  as_objective,
  compute_dtype,
)

__all__ = ["State", "init_state", "make_step", "reduce_terms", "student_variables"]

PyTree = Any


@flax.struct.dataclass
class State:
  """Everything that a training run changes; the teacher is not in it.

  Attributes:
    step: int32, how many steps were taken.
    params: the student's parameters.
    model_state: the student's other collections (``batch_stats``).
    objective_params: what the objective learns (projectors), absent from the deployed network.
    objective_state: what the objective remembers.
    opt_state: the optimiser's state for both kinds of parameters.
    key: the run's random key; each step folds its number into it.
  """

  step: Any
  params: Any
  model_state: Any
  objective_params: Any
  objective_state: Any
  opt_state: Any
  key: Any


def student_variables(state: State) -> dict[str, PyTree]:
  """The student's variables as its network's apply takes them."""
  return {"params": state.params, **state.model_state}


def init_state(
  key: Any,
  student: Network,
  objective: Objective | ObjectiveFunction,
  optimizer: optax.GradientTransformation,
  batch: Batch,
  *,
  teacher: Teacher | None = None,
  teacher_variables: PyTree = None,
) -> State:
  """Initialises a training state; pure, so it can be jitted and vmapped over keys.

  Args:
    key: a random key.
    student: the network to train.
    objective: an `Objective` or a bare function.
    optimizer: an optax optimiser; it sees ``{"student": ..., "objective": ...}``.
    batch: an example batch; only its shapes and dtypes are used beyond the initialisers.
    teacher: the teacher, whose outputs' shapes the objective's parameters may depend on.
    teacher_variables: its variables, or their shapes.

  Returns:
    The state at step 0.
  """
  objective = as_objective(objective)
  student_key, objective_key, run_key = jax.random.split(key, 3)
  variables = student.init(student_key, batch.inputs)
  model_state = {name: value for name, value in variables.items() if name != "params"}
  seen, _ = jax.eval_shape(
    lambda v, x: student.apply(v, x, train=False, key=None), variables, batch.inputs
  )
  taught = _teacher_shapes(teacher, teacher_variables, batch)
  _check_classes(seen, taught)
  objective_params, objective_state = objective.init(objective_key, seen, taught)
  trained = {"student": variables["params"], "objective": objective_params}
  return State(
    step=jnp.zeros((), jnp.int32),
    params=variables["params"],
    model_state=model_state,
    objective_params=objective_params,
    objective_state=objective_state,
    opt_state=optimizer.init(trained),
    key=run_key,
  )


def _teacher_shapes(
  teacher: Teacher | None, teacher_variables: PyTree, batch: Batch
) -> Outputs | None:
  if batch.teacher is not None:
    return jax.eval_shape(lambda: batch.teacher)
  if teacher is None:
    return None
  return jax.eval_shape(teacher, teacher_variables, batch)


def _check_classes(student: Outputs, teacher: Outputs | None) -> None:
  if teacher is None or teacher.logits is None or student.logits is None:
    return
  ours, theirs = student.logits.shape, teacher.logits.shape
  if ours[-1] != theirs[-1]:
    raise ValueError(
      f"the student puts out {ours[-1]} classes (logits {ours}) and the teacher {theirs[-1]} "
      f"(logits {theirs}); build the student with num_classes={theirs[-1]}, or give a teacher "
      "for the same classes."
    )


def reduce_terms(
  terms: Mapping[str, Term], batch: Batch, *, axis_name: str | None = None
) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
  """Reduces an objective's terms to the loss, and to sums for the log.

  A term is ``weight * sum(where * values) / sum(where)`` over the global batch, and 0 when its
  mask is empty. Masked values cannot leak: they are replaced before they are multiplied, since
  ``inf * 0`` is NaN.

  Args:
    terms: the objective's terms.
    batch: the batch that they were computed on; gives the example weights.
    axis_name: the axis to sum over under `pmap`; the loss is then this device's share, whose
      gradients have to be summed over the axis too.

  Returns:
    ``(loss, {name: (sum, count)})``: the weighted scalar loss, and for each term the global sum
    of its values and of its mask, in float32 at least.

  Raises:
    ValueError: a term's mask does not fit its values.

  >>> batch = Batch(jnp.zeros((2, 1)), jnp.zeros(2), jnp.ones(2), jnp.ones(2), None, None)
  >>> loss, sums = reduce_terms({"soft": Term(jnp.array([1.0, 3.0]), weight=0.5)}, batch)
  >>> float(loss), float(sums["soft"][0]), float(sums["soft"][1])
  (1.0, 4.0, 2.0)
  """
  loss = jnp.zeros((), jnp.float32)
  sums = {}
  for name, term in terms.items():
    values = jnp.asarray(term.values)
    values = values.astype(compute_dtype(values))
    mask = jax.lax.stop_gradient(_mask(name, term, batch, values))
    total = jnp.sum(jnp.where(mask == 0, 0, values) * mask)
    count = jnp.sum(mask)
    if axis_name is not None:
      count = jax.lax.psum(count, axis_name)
    mean = total / jnp.where(count == 0, 1, count)
    loss = loss.astype(mean.dtype) + jnp.asarray(term.weight, mean.dtype) * mean
    if axis_name is not None:
      total = jax.lax.psum(total, axis_name)
    sums[name] = (total, count)
  return loss, sums


def _mask(name: str, term: Term, batch: Batch, values: jax.Array) -> jax.Array:
  mask = jnp.ones(values.shape, values.dtype)
  factors = [term.where] if term.where is not None else []
  if term.axis == "batch":
    factors.append(batch.weight)
  for factor in factors:
    factor = jnp.asarray(factor)
    if factor.shape != values.shape[: factor.ndim]:
      raise ValueError(
        f"term {name!r} has values of shape {values.shape} and a mask of shape {factor.shape}; "
        "a mask has the leading axes of the values. If the values do not run over the batch, "
        "give the Term an axis of its own (axis='classes')."
      )
    factor = jnp.expand_dims(factor, range(factor.ndim, values.ndim))
    mask = mask * factor.astype(values.dtype)
  return mask


def _resolve(hyper: Mapping[str, Any], objective: Objective, step: jax.Array) -> dict[str, Any]:
  unknown = sorted(set(hyper) - set(objective.hyper))
  if unknown:
    raise ValueError(
      f"hyper has {unknown}, which the objective does not take; it takes {sorted(objective.hyper)}."
    )
  return {name: value(step) if callable(value) else value for name, value in hyper.items()}


def make_step(
  student: Network,
  teacher: Teacher | None,
  objective: Objective | ObjectiveFunction,
  optimizer: optax.GradientTransformation,
  *,
  hyper: Mapping[str, Any] | None = None,
  axis_name: str | None = None,
) -> Callable[[State, PyTree, Batch], tuple[State, dict[str, Any]]]:
  """Builds the pure train step.

  Args:
    student: the network to train.
    teacher: ``(variables, batch) -> Outputs``; None for training without one. When a batch brings
      ``batch.teacher`` along, that is used and the teacher is not run.
    objective: an `Objective` or a bare function.
    optimizer: an optax optimiser, as given to `init_state`.
    hyper: keywords of the objective: numbers, arrays, or schedules of the step.
    axis_name: the axis to sum over under `pmap`.

  Returns:
    ``step(state, teacher_variables, batch) -> (state, sums)``. ``sums`` maps each term, ``"loss"``
    and (for integer labels) ``"accuracy"`` to ``(sum, count)``.

  Raises:
    ValueError: ``hyper`` names a keyword that the objective does not take (at trace time).
  """
  objective = as_objective(objective)
  hyper = dict(hyper or {})

  def step(state: State, teacher_variables: PyTree, batch: Batch) -> tuple[State, dict[str, Any]]:
    target = batch.teacher
    if target is None and teacher is not None:
      target = teacher(teacher_variables, batch)
    step_key = jax.random.fold_in(state.key, state.step)
    if axis_name is not None:
      step_key = jax.random.fold_in(step_key, jax.lax.axis_index(axis_name))
    student_key, objective_key = jax.random.split(step_key)
    keywords = _resolve(hyper, objective, state.step)

    def loss_of(trained: dict[str, PyTree]) -> tuple[jax.Array, Any]:
      outputs, model_state = student.apply(
        {"params": trained["student"], **state.model_state},
        batch.inputs,
        train=True,
        key=student_key,
      )
      terms, objective_state = objective.apply(
        trained["objective"],
        state.objective_state,
        outputs,
        target,
        batch,
        key=objective_key,
        **keywords,
      )
      reserved = sorted({"loss", "accuracy"} & set(terms))
      if reserved:
        raise ValueError(f"a term is named {reserved}, which is the log's own; rename the term.")
      loss, sums = reduce_terms(terms, batch, axis_name=axis_name)
      return loss, ({**state.model_state, **model_state}, objective_state, sums, outputs.logits)

    trained = {"student": state.params, "objective": state.objective_params}
    (loss, (model_state, objective_state, sums, logits)), grads = jax.value_and_grad(
      loss_of, has_aux=True
    )(trained)
    if axis_name is not None:
      grads, loss = jax.lax.psum((grads, loss), axis_name)
      model_state, objective_state = _mean_over(axis_name, (model_state, objective_state))
    model_state = _keep_dtypes(model_state, state.model_state)
    objective_state = _keep_dtypes(objective_state, state.objective_state)
    updates, opt_state = optimizer.update(grads, state.opt_state, trained)
    trained = optax.apply_updates(trained, updates)
    sums = _add_progress({"loss": (loss, jnp.ones_like(loss)), **sums}, logits, batch, axis_name)
    new_state = State(
      step=state.step + 1,
      params=trained["student"],
      model_state=model_state,
      objective_params=trained["objective"],
      objective_state=objective_state,
      opt_state=opt_state,
      key=state.key,
    )
    return new_state, sums

  return step


def _keep_dtypes(new: PyTree, old: PyTree) -> PyTree:
  """State keeps its dtype: Flax's BatchNorm starts in float32 and takes on its inputs' dtype."""
  return jax.tree.map(lambda n, o: n.astype(o.dtype), new, old)


def _mean_over(axis_name: str, tree: PyTree) -> PyTree:
  """Makes statistics that each device took of its share the same everywhere."""

  def mean(leaf: jax.Array) -> jax.Array:
    inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
    return jax.lax.pmean(leaf, axis_name) if inexact else leaf

  return jax.tree.map(mean, tree)


def _add_progress(
  sums: dict[str, Any], logits: jax.Array | None, batch: Batch, axis_name: str | None
) -> dict[str, Any]:
  """Adds the training accuracy, where labels are integers: one argmax, no pass of its own."""
  labels = batch.labels
  if logits is None or not jnp.issubdtype(labels.dtype, jnp.integer):
    return sums
  if labels.shape != logits.shape[:-1] or batch.labelled.shape != labels.shape:
    return sums
  mask = batch.weight * batch.labelled
  hits = jnp.sum(mask * (jnp.argmax(logits, axis=-1) == labels))
  count = jnp.sum(mask)
  if axis_name is not None:
    hits, count = jax.lax.psum((hits, count), axis_name)
  return {**sums, "accuracy": (hits, count)}
