"""The training state: what a run changes, how it begins, and which of it is deployed."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import flax.errors
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import _check
from jaxdistill.teachers import decay_of, frozen
from jaxdistill.train import _optax
from jaxdistill.train._optax import Transformation
from jaxdistill.types import (
  Batch,
  Model,
  Network,
  Objective,
  ObjectiveFunction,
  Outputs,
  Teacher,
  as_objective,
  with_logits,
)

__all__ = [
  "State",
  "deployed_variables",
  "from_items",
  "init_state",
  "latest_variables",
  "student_variables",
  "teacher_now",
  "to_items",
  "trained_variables",
  "with_what_is_there",
]

PyTree = Any


@flax.struct.dataclass
class State:
  """Everything that a training run changes; a frozen teacher is not in it.

  Attributes:
    step: int32, how many steps were taken.
    params: the student's parameters.
    model_state: the student's other collections (``batch_stats``).
    objective_params: what the objective learns (projectors), absent from the deployed network.
    objective_state: what the objective remembers.
    opt_state: the optimiser's state for both kinds of parameters.
    key: the run's random key; each step folds its number into it.
    average: a moving average of the deployed variables, which are the student's unless the
      objective says otherwise; None where none is kept.
    teacher: a moving average of the student's variables, where that is what teaches it
      (`teachers.moving_average`); else None.
  """

  step: Any
  params: Any
  model_state: Any
  objective_params: Any
  objective_state: Any
  opt_state: Any
  key: Any
  average: Any = None
  teacher: Any = None

  @property
  def objective(self) -> tuple[PyTree, PyTree]:
    """What the objective learned and remembers: an `Objective.start` for the next stage."""
    return _evaluated(self)["objective"], self.objective_state


def deployed_variables(state: State, objective: Objective | ObjectiveFunction) -> dict[str, PyTree]:
  """The variables that are evaluated and deployed: the moving average where one is kept."""
  return latest_variables(state, objective) if state.average is None else state.average


def latest_variables(state: State, objective: Objective | ObjectiveFunction) -> dict[str, PyTree]:
  """The deployed network's variables as the last step left them, without an average.

  Where the optimiser has other parameters evaluated than it trains (schedule-free, lookahead),
  these; the statistics beside them are those of the trained ones.
  """
  deployed, student = as_objective(objective).deployed, student_variables(state)
  if deployed is None:
    return student
  return deployed.variables(student, _evaluated(state)["objective"], state.objective_state)


def student_variables(state: State) -> dict[str, PyTree]:
  """The student's variables as the last step left them: what a moving average that teaches is of.

  Where the optimiser has other parameters evaluated than it trains, these.
  """
  return {"params": _evaluated(state)["student"], **state.model_state}


def teacher_now(
  teacher: Teacher | None, student: Network, variables: PyTree | None
) -> Teacher | None:
  """The teacher of a step: where that is a moving average, the one of the run's state.

  Args:
    teacher: as given.
    student: the network.
    variables: the state's average of its variables.
  """
  return teacher if variables is None else frozen(Model(student, variables))


def _evaluated(state: State) -> dict[str, PyTree]:
  trained = {"student": state.params, "objective": state.objective_params}
  if not _optax.evaluates_others(state.opt_state):
    return trained
  # Of several students a step's number has their axis, and so has all that the optimiser knows.
  return (_OF_ONE, _OF_SEVERAL)[jnp.ndim(state.step)](state.opt_state, trained)


_OF_ONE = jax.jit(_optax.evaluated)
_OF_SEVERAL = jax.jit(jax.vmap(_optax.evaluated))


def trained_variables(state: State) -> dict[str, PyTree]:
  """The variables that the optimiser changes, as the student's apply takes them."""
  return {"params": state.params, **state.model_state}


def init_state(
  key: Any,
  student: Network,
  objective: Objective | ObjectiveFunction,
  optimizer: Transformation,
  batch: Batch,
  *,
  teacher: Teacher | None = None,
  start: Mapping[str, Any] | None = None,
  average: bool = False,
  num_classes: int = 0,
) -> State:
  """Initialises a training state; pure, so it can be jitted and vmapped over keys.

  Args:
    key: a random key.
    student: the network to train.
    objective: an `Objective` or a bare function.
    optimizer: an optax optimiser. It sees the student's parameters, and beside them, under
      ``"objective"``, those that the objective trains, where it has any.
    batch: an example batch; only its shapes and dtypes are used beyond the initialisers.
    teacher: the teacher, whose outputs' shapes the objective's parameters may depend on; shapes of
      its variables are enough. A moving average of the student begins as the student.
    start: values for some of the student's variables, or for all, that replace the initialiser's:
      a part of the variables' tree (see `teachers.layers`).
    average: whether the state keeps a moving average of the deployed variables.
    num_classes: how many classes the labels have; 0 where they are no classes, or there are none.

  Returns:
    The state at step 0.

  Raises:
    TypeError: the teacher or the objective does not return what it should.
    ValueError: teacher and student differ in their classes, or do not run on the data with their
      variables; there are two teachers, one of them in the batches; ``start`` (or
      ``objective.start``) has a path that is not there, or another shape.
  """
  objective = as_objective(objective)
  # Three keys, so that an objective with more parameters does not change how the student begins.
  student_key, objective_key, run_key = jax.random.split(key, 3)
  variables = _init(student, student_key, batch.inputs)
  if start is not None:
    variables = _started(variables, start, student.name)
  model_state = {name: value for name, value in variables.items() if name != "params"}
  # Shapes, by tracing alone: the objective builds its projectors for the widths that it finds.
  seen = _seen_in_training(student, variables, batch.inputs)
  online = decay_of(teacher) is not None
  if online and batch.teacher is not None:
    raise ValueError(
      "teacher is a moving average of the student, and the batches bring another teacher's outputs "
      "along, which would be taken in its place: leave one of them out."
    )
  taught = _teacher_shapes(teacher_now(teacher, student, variables if online else None), batch)
  if objective.deployed is None:  # else the student's own logits are not what predicts
    _check_classes(seen, taught)
    _check_labels(seen, num_classes, student.name)
  with with_what_is_there(seen, taught):
    made = objective.init(objective_key, seen, taught)
  if not (isinstance(made, tuple) and len(made) == 2):
    raise TypeError(f"the objective's init must return (params, state), got {_check.show(made)}.")
  objective_params, objective_state = made
  if objective.start is not None:
    params, remembered = objective.start
    objective_params = _started(objective_params, params, "the objective's parameters")
    objective_state = _started(objective_state, remembered, "the objective's state")
  # One optimiser for both, so that a clip by the global norm sees the projectors' gradients too.
  trained = {"student": variables["params"], "objective": objective_params}
  state = State(
    step=jnp.zeros((), jnp.int32),
    params=variables["params"],
    model_state=model_state,
    objective_params=objective_params,
    objective_state=objective_state,
    opt_state=_optax.begin(optimizer, trained),
    key=run_key,
    teacher=variables if online else None,
  )
  if objective.deployed is not None:
    network = objective.deployed.network(student)
    predicted = _predicted(network, latest_variables(state, objective), batch.inputs)
    _check_labels(predicted, num_classes, network.name)
  return dataclasses.replace(state, average=latest_variables(state, objective) if average else None)


def to_items(state: State, objective: Objective) -> dict[str, PyTree]:
  """What a checkpoint holds: the student apart from what only training needs.

  Args:
    state: the training state, or its shapes.
    objective: the run's.

  Returns:
    Trees by name.
  """
  # What is evaluated (an average, or what the optimiser says) is then not the student's.
  other = objective.deployed is not None
  items: dict[str, PyTree] = {
    "student": trained_variables(state) if other else deployed_variables(state, objective),
    "objective": {"params": state.objective_params, "state": state.objective_state},
    "optimizer": state.opt_state,
    "progress": {"step": state.step, "key": state.key},
  }
  if other:
    items["deployed"] = deployed_variables(state, objective)
  elif state.average is not None or _optax.evaluates_others(state.opt_state):
    items["trained"] = trained_variables(state)
  if state.teacher is not None:
    items["teacher"] = state.teacher
  return items


def from_items(items: Mapping[str, PyTree], shapes: State, objective: Objective) -> State:
  """The state again that `to_items` took apart.

  Args:
    items: a checkpoint's.
    shapes: the state's, which say whether it has an average.
    objective: the run's.

  Returns:
    The state.
  """
  student = dict(items["trained" if "trained" in items else "student"])
  averaged = items["student" if objective.deployed is None else "deployed"]
  return State(
    step=items["progress"]["step"],
    params=student.pop("params"),
    model_state=student,
    objective_params=items["objective"]["params"],
    objective_state=items["objective"]["state"],
    opt_state=items["optimizer"],
    key=items["progress"]["key"],
    average=None if shapes.average is None else averaged,
    teacher=items.get("teacher"),
  )


@contextlib.contextmanager
def with_what_is_there(student: Outputs | None, teacher: Outputs | None) -> Iterator[None]:
  """Says of an objective that takes None for an array which network has no logits.

  Raises:
    ValueError: it fails for want of logits that a network does not put out.
  """
  try:
    yield
  except (AttributeError, TypeError) as error:
    both = {"student": student, "teacher": teacher}
    without = [n for n, one in both.items() if one and one.logits is None and one.hidden is None]
    if not without or "NoneType" not in str(error):
      raise
    raise ValueError(
      f"the objective fails on a {without[0]} without logits ({_check.short(error)}): compare "
      "features, by recipes.hint or recipes.rkd, or say which of its outputs are logits, by "
      "logits= of networks.linen or nnx."
    ) from error


def _seen_in_training(network: Network, variables: PyTree, inputs: Any) -> Outputs:
  """The shapes of what the objective sees, heads that exist in training alone among them."""
  try:
    return jax.eval_shape(
      lambda v, x, key: with_logits(network.apply(v, x, train=True, key=key)[0]),
      variables,
      inputs,
      jax.random.key(0),
    )
  except (NameError, ValueError):
    # A BatchNorm over an axis that only the step makes can't train here; other errors come again.
    return _predicted(network, variables, inputs)


def _predicted(network: Network, variables: PyTree, inputs: Any) -> Outputs:
  """The shapes of what a network puts out in inference."""
  return jax.eval_shape(
    lambda v, x: with_logits(network.apply(v, x, train=False, key=None)[0]), variables, inputs
  )


def _init(student: Network, key: Any, inputs: Any) -> dict[str, PyTree]:
  try:
    return student.init(key, inputs)
  except (flax.errors.FlaxError, TypeError, IndexError, AttributeError) as error:
    shapes = jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", inputs)
    raise ValueError(
      f"the student {student.name!r} does not run on the data's inputs, {shapes} once normalised: "
      f"{_check.short(error)}"
    ) from error


def _started(made: Any, start: Any, where: str) -> Any:
  """Puts a part of a tree in the place of what was made there."""
  if not isinstance(made, Mapping):
    if _outline(start) != _outline(made):
      raise ValueError(
        f"start has {_outline(start)} at {where}, where there is {_outline(made)}; give one of the "
        "same shape, or leave it out."
      )
    return jax.tree.map(lambda old, new: jnp.asarray(new, old.dtype), made, start)
  unknown = sorted(set(start) - set(made)) if isinstance(start, Mapping) else [_outline(start)]
  if unknown:
    raise ValueError(f"start has {unknown} at {where}, where there is {sorted(made)}.")
  return {
    name: _started(value, start[name], f"{where}/{name}") if name in start else value
    for name, value in made.items()
  }


def _outline(tree: PyTree) -> str:
  """Containers and shapes, for a comparison and a message."""
  return str(jax.tree.map(np.shape, tree))


def _teacher_shapes(teacher: Teacher | None, batch: Batch) -> Outputs | None:
  if batch.teacher is not None:
    return jax.eval_shape(with_logits, batch.teacher)
  if teacher is None:
    return None
  try:
    outputs = jax.eval_shape(Teacher.__call__, teacher, batch)
  except (
    _check.VariablesError,
    flax.errors.FlaxError,
    TypeError,
    AttributeError,
    KeyError,
    IndexError,
  ) as error:
    shapes = jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", batch.inputs)
    raise ValueError(
      f"the teacher does not run with its variables ({_first(teacher.variables)}) on the data's "
      f"inputs, {shapes} once normalised: {_check.short(error)} Give the variables of this very "
      "network, {'params': ..., ...}; of a run over seeds, one of fitted.unstack()."
    ) from error
  if not isinstance(outputs, Outputs):
    raise TypeError(
      f"the teacher must return Outputs, got {_check.show(outputs)}; give teachers.frozen(model), "
      "or a function that returns Outputs(logits=...)."
    )
  return jax.eval_shape(with_logits, outputs)


def _first(variables: PyTree) -> str:
  """Some of a tree's paths and shapes, for a message."""
  leaves = jax.tree_util.tree_leaves_with_path(variables)
  some = [f"{jax.tree_util.keystr(p, simple=True, separator='/')} {np.shape(x)}" for p, x in leaves]
  return ", ".join(some[:3]) + (", ..." if len(some) > 3 else "") if some else "none"


def _check_labels(student: Outputs, num_classes: int, name: str) -> None:
  logits = student.logits
  if logits is not None and num_classes > logits.shape[-1]:
    raise ValueError(
      f"the data has labels of {num_classes} classes and the student {name!r} puts out "
      f"{logits.shape[-1]} (logits {logits.shape}): build the student with "
      f"num_classes={num_classes}, or map the labels to its classes (labels=None for none)."
    )


def _check_classes(student: Outputs, teacher: Outputs | None) -> None:
  if teacher is None or teacher.logits is None or student.logits is None:
    return
  ours, theirs = student.logits.shape, teacher.logits.shape
  if ours[-1] != theirs[-1]:
    if len(ours) == 3:  # [B, L, V] of tokens: padding, more likely than not
      raise ValueError(
        f"the student puts out a vocabulary of {ours[-1]} and the teacher one of {theirs[-1]}; "
        f"where both read the same tokens, take teachers.vocabulary(teacher, {ours[-1]}), which "
        "cuts the padding off, or adds some without probability."
      )
    raise ValueError(
      f"the student puts out {ours[-1]} classes (logits {ours}) and the teacher {theirs[-1]} "
      f"(logits {theirs}); build the student with num_classes={theirs[-1]}, or give a teacher "
      "for the same classes."
    )
