"""The training loop: data to steps, steps to a run folder.

The loop dispatches chunks of steps (one ``lax.scan`` each) and never waits for the device inside
one; it looks at numbers one chunk late, unless something has to be decided on them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm.auto as tqdm

from jaxdistill import mesh as mesh_lib
from jaxdistill import run as run_lib
from jaxdistill.checkpoint import Checkpoints
from jaxdistill.data import Source
from jaxdistill.program import Program, build
from jaxdistill.step import State, student_variables
from jaxdistill.types import Network, Objective, ObjectiveFunction, Teacher, as_objective

__all__ = ["Fitted", "fingerprint", "fit", "sgd"]

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Fitted:
  """What `fit` returns.

  Attributes:
    variables: the student's variables after the last step; leaves ``[S, ...]`` over seeds.
    state: the whole training state.
    history: the lines of ``metrics.jsonl``.
  """

  variables: dict[str, PyTree]
  state: State
  history: list[dict[str, Any]]


def sgd(
  learning_rate: float,
  *,
  steps: int,
  milestones: Sequence[float] = (150 / 240, 180 / 240, 210 / 240),
  decay: float = 0.1,
  momentum: float = 0.9,
  weight_decay: float = 5e-4,
  nesterov: bool = False,
) -> optax.GradientTransformation:
  """SGD as the field's CIFAR recipes run it, in PyTorch's order of operations.

  Coupled weight decay on every trained tensor, then momentum without dampening, then the learning
  rate, which falls by ``decay`` at each milestone.

  Args:
    learning_rate: 0.05 at batch 64 in RepDistiller and mdistiller.
    steps: the length of the run.
    milestones: shares of the run; by default epochs 150, 180 and 210 of 240.
    decay: the factor at each milestone.
    momentum: 0.9 in all published recipes.
    weight_decay: 5e-4 in all published CIFAR recipes.
    nesterov: ReviewKD's own recipe uses it, the others do not.

  Returns:
    An optax optimiser.
  """
  # Milestones of a short run can fall on the same step: their factors multiply.
  boundaries: dict[int, float] = {}
  for share in milestones:
    at = round(share * steps)
    boundaries[at] = boundaries.get(at, 1.0) * decay
  schedule = optax.piecewise_constant_schedule(learning_rate, boundaries)
  return optax.chain(
    optax.add_decayed_weights(weight_decay),
    optax.sgd(schedule, momentum=momentum, nesterov=nesterov),
  )


def fingerprint(variables: PyTree) -> str:
  """A digest of a pytree's paths, shapes, dtypes and values.

  >>> fingerprint({"a": np.zeros(2)}) == fingerprint({"a": np.ones(2)})
  False
  """
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
    value = np.asarray(leaf)
    digest.update(f"{jax.tree_util.keystr(path)} {value.shape} {value.dtype}".encode())
    digest.update(np.ascontiguousarray(value).tobytes())
  return digest.hexdigest()[:16]


def fit(
  student: Network,
  objective: Objective | ObjectiveFunction,
  *,
  data: Source | Sequence[Source],
  optimizer: optax.GradientTransformation,
  steps: int,
  seed: int | Sequence[int] = 0,
  teacher: Teacher | None = None,
  teacher_variables: PyTree = None,
  hyper: Mapping[str, Any] | None = None,
  dispatch: mesh_lib.Dispatch | None = None,
  log_every: int | None = None,
  validate: Callable[[PyTree], Mapping[str, Any]] | None = None,
  validate_every: int | None = None,
  select: str = "accuracy",
  folder: str | os.PathLike[str] | None = None,
  config: Mapping[str, Any] | None = None,
  checkpoint_every: int | None = None,
  keep_last: int = 2,
  seeds_by: str = "vmap",
  scan: bool = True,
  progress: str | None = "train",
  tensorboard: bool = False,
  callback: Callable[[int, Mapping[str, Any]], None] | None = None,
) -> Fitted:
  """Trains a student, or the same student from several seeds as one compiled program.

  A run that is started again with the same arguments goes on from its last good checkpoint.

  Args:
    student: the network to train.
    objective: what to minimise, see `jaxdistill.recipes`.
    data: where batches come from. With several seeds, one source for each: they share their
      arrays and differ in their ``data_seed``.
    optimizer: an optax optimiser.
    steps: how many steps the whole run has.
    seed: fixes initialisation and dropout. A sequence trains one student for each under ``vmap``.
    teacher: ``(variables, batch) -> Outputs``; None for training without one.
    teacher_variables: the teacher's variables; never changed, never checkpointed.
    hyper: the objective's keywords: numbers, arrays, or schedules of the step.
    dispatch: `mesh.with_jit` (the default, over all devices) or `mesh.with_pmap`.
    log_every: steps in a chunk, which is one dispatch and one line of ``metrics.jsonl``; an epoch
      or 100 steps by default, whichever is less.
    validate: ``variables -> {name: number}``, see `jaxdistill.evaluate.validator`. The variables
      are those that the next step overwrites: copy what is to be kept.
    validate_every: steps between validations; an epoch by default. The last step is always one.
    select: the validation metric, higher is better, by which the best checkpoint is kept.
    folder: the run's folder; nothing is written without one.
    config: what else defines the run, the optimiser's settings above all; goes into ``config.json``
      beside seeds, steps, data, the student's shapes, the objective's keywords and the teacher's
      fingerprint, and has to be the same when the run goes on.
    checkpoint_every: steps between checkpoints; as often as validation by default.
    keep_last: how many of the last checkpoints are kept, beside the best one.
    seeds_by: whether several seeds are trained side by side (``"vmap"``) or one after another
      inside the program (``"unroll"``), which is faster for ``lax`` convolutions on a CPU.
    scan: whether a chunk is one dispatch, by ``lax.scan``. Without, its steps are dispatched one by
      one: XLA computes convolutions inside a loop twenty times slower on a CPU.
    progress: the progress bar's label; None for silence.
    tensorboard: also write TensorBoard event files into the folder.
    callback: ``(step, record)`` after every line.

  Returns:
    `Fitted`, with the variables after the last step.

  Raises:
    ValueError: sources and seeds do not pair up; a batch does not divide by the devices; the
      folder holds another configuration; an unknown keyword in ``hyper``.
    FloatingPointError: a term was not finite; the message says which, and at which step.
  """
  dispatch = mesh_lib.with_jit() if dispatch is None else dispatch
  hyper = dict(hyper or {})
  program = build(
    student,
    as_objective(objective),
    data,
    optimizer,
    seed,
    teacher,
    teacher_variables,
    hyper,
    dispatch,
    seeds_by,
    scan,
  )
  every = _Intervals(steps, program.source.steps_per_epoch, log_every, validate_every)
  every.check(checkpoint_every)
  settings = {**(config or {}), "steps": steps, "seed": seed, **program.describe()}
  settings["hyper"] = {name: _shown(value, steps) for name, value in hyper.items()}
  settings["teacher"] = None if teacher is None else fingerprint(teacher_variables)
  path = None if folder is None else run_lib.claim(folder, settings)
  saved = None if path is None else Checkpoints(path / "checkpoints", keep_last=keep_last)
  state, at = _start(program, saved)
  log = _Log(path, program, steps, at, hyper, progress, tensorboard, select, callback)
  state = dispatch.place(state)
  pending: dict[str, Any] | None = None
  try:
    while at < steps:
      end = every.next_stop(at)
      state, sums = program.run(state, at, end - at)
      if pending is not None:
        log.write(**pending)
      pending, at = {"sums": sums, "begin": at, "end": end}, end
      validating = validate is not None and every.validates(at)
      saving = saved is not None and every.saves(at)
      if not (validating or saving or at == steps):
        continue
      # Nothing is validated or saved before its numbers have been looked at.
      now, extra = dispatch.collect(state), {}
      _check_finite(dispatch.collect(sums), pending["begin"])
      _check_state(now, at)
      if validate is not None and validating:
        extra = {name: np.asarray(v) for name, v in validate(student_variables(now)).items()}
        if saved is not None and select not in extra:
          raise ValueError(
            f"select={select!r} is not among what validate returns, {sorted(extra)}; name one of "
            "these, higher being better."
          )
      log.write(**pending, validation=extra)
      pending = None
      if saved is not None and saving:
        score = float(np.mean(extra[select])) if select in extra else None
        saved.save(at, _items(now), score=score)
  finally:
    log.close()
    if saved is not None:
      saved.close()
  final = dispatch.collect(state)
  return Fitted(variables=student_variables(final), state=final, history=log.history)


@dataclasses.dataclass
class _Intervals:
  """At which steps the loop stops to log, to validate, to save."""

  steps: int
  epoch: int
  log: int | None
  validate: int | None
  save: int | None = None

  def check(self, save: int | None) -> None:
    """Fills in what was left out; every number is at least 1."""
    self.log = min(self.epoch, 100) if self.log is None else self.log
    self.validate = self.epoch if self.validate is None else self.validate
    self.save = self.validate if save is None else save
    named = {
      "steps": self.steps,
      "log_every": self.log,
      "validate_every": self.validate,
      "checkpoint_every": self.save,
    }
    for name, value in named.items():
      if value < 1:
        raise ValueError(f"{name}={value} must be at least 1 step.")

  def next_stop(self, at: int) -> int:
    """The next step at which something is due; the same grid whatever step a run goes on from."""
    log, validate, save = (i or self.steps for i in (self.log, self.validate, self.save))
    # The log's grid starts anew at each validation, so that chunks have two or three lengths, each
    # of which is compiled once, and not as many as two grids that drift apart have gaps.
    base = at - at % validate
    nearest = (base + log * ((at - base) // log + 1), validate * (at // validate + 1))
    return min(self.steps, *nearest, save * (at // save + 1))

  def validates(self, at: int) -> bool:
    return at == self.steps or (bool(self.validate) and at % (self.validate or 1) == 0)

  def saves(self, at: int) -> bool:
    return at == self.steps or (bool(self.save) and at % (self.save or 1) == 0)


class _Log:
  """Turns a chunk's sums into a line of the log, a place on the bar and a call of the callback."""

  def __init__(
    self,
    folder: Any,
    program: Program,
    steps: int,
    at: int,
    hyper: Mapping[str, Any],
    progress: str | None,
    tensorboard: bool,
    select: str,
    callback: Callable[[int, Mapping[str, Any]], None] | None,
  ) -> None:
    self._metrics = run_lib.Metrics(folder, resumed_from=at, tensorboard=tensorboard)
    self._bar = tqdm.tqdm(
      total=steps, initial=at, desc=progress, unit="step", disable=progress is None
    )
    self._program, self._select, self._callback = program, select, callback
    self._schedules = {name: value for name, value in hyper.items() if callable(value)}
    self._clock = time.perf_counter()

  @property
  def history(self) -> list[dict[str, Any]]:
    return self._metrics.history

  def write(
    self, sums: PyTree, begin: int, end: int, validation: Mapping[str, Any] | None = None
  ) -> None:
    record = _means(self._program.collect(sums), begin)
    now = time.perf_counter()
    rate = self._program.examples_per_step * (end - begin) / (now - self._clock)
    self._clock = now
    record |= {name: float(schedule(end - 1)) for name, schedule in self._schedules.items()}
    record |= {f"validation/{name}": value for name, value in (validation or {}).items()}
    record |= {"epoch": end / self._program.source.steps_per_epoch}
    record |= {"examples_per_second": round(rate, 1)}
    self._metrics.write(end, record)
    self._bar.update(end - begin)
    shown = {"loss": record["loss"]}
    if self._select in (validation or {}):
      shown[f"validation {self._select}"] = record[f"validation/{self._select}"]
    self._bar.set_postfix({name: f"{np.mean(value):.4f}" for name, value in shown.items()})
    if self._callback is not None:
      self._callback(end, self.history[-1])

  def close(self) -> None:
    self._bar.close()
    self._metrics.close()


def _start(program: Program, saved: Checkpoints | None) -> tuple[State, int]:
  latest = None if saved is None else saved.latest()
  if saved is None or latest is None:
    return program.initial(), 0
  return _restore(saved, latest, program.shapes), latest


def _items(state: State) -> dict[str, PyTree]:
  """What a checkpoint holds: the student apart from what only training needs."""
  return {
    "student": student_variables(state),
    "objective": {"params": state.objective_params, "state": state.objective_state},
    "optimizer": state.opt_state,
    "progress": {"step": state.step, "key": state.key},
  }


def _restore(saved: Checkpoints, step: int, shapes: State) -> State:
  items = saved.restore(step, _items(shapes))
  student = dict(items["student"])
  return State(
    step=items["progress"]["step"],
    params=student.pop("params"),
    model_state=student,
    objective_params=items["objective"]["params"],
    objective_state=items["objective"]["state"],
    opt_state=items["optimizer"],
    key=items["progress"]["key"],
  )


def _means(sums: PyTree, begin: int) -> dict[str, Any]:
  """Sums of each step ``[..., steps]`` to means over the chunk ``[...]``."""
  _check_finite(sums, begin)
  means = {}
  for name, (total, count) in jax.device_get(sums).items():
    summed = np.asarray(count, np.float64).sum(axis=-1)
    means[name] = np.asarray(total, np.float64).sum(axis=-1) / np.where(summed == 0, 1, summed)
  return means


def _shown(value: Any, steps: int) -> Any:
  """A keyword as ``config.json`` holds it: a schedule by its values at three steps."""
  return [float(value(s)) for s in (0, steps // 2, steps)] if callable(value) else value


@jax.jit
def _finite(tree: PyTree) -> Any:
  leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
  return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in leaves] or [True]))


def _check_state(state: State, at: int) -> None:
  """A gradient can be NaN where the loss is finite: nothing of that is validated or saved."""
  for name in ("params", "model_state", "objective_params", "objective_state"):
    if not _finite(getattr(state, name)):
      raise FloatingPointError(
        f"{name} is not finite after step {at}, though the loss was: a gradient is not. The last "
        "good checkpoint is kept; look for a square root, a norm or a division at 0 in the loss."
      )


def _check_finite(sums: PyTree, begin: int) -> None:
  """Raises for the first step at which a term was not finite; the terms come before their sum."""
  host = {name: np.asarray(total) for name, (total, _) in jax.device_get(sums).items()}
  bad = {name: ~np.isfinite(total) for name, total in host.items()}
  first = {
    name: int(np.argmax(b.reshape(-1, b.shape[-1]).any(axis=0)))
    for name, b in bad.items()
    if b.any()
  }
  if not first:
    return
  at = min(first.values())
  names = [name for name, step in first.items() if step == at]
  terms = [name for name in names if name != "loss"] or names
  raise FloatingPointError(
    f"term {', '.join(map(repr, terms))} is not finite at step {begin + at + 1}. The last good "
    "checkpoint is kept; lower the learning rate or the term's weight, clip gradients, or look at "
    "that batch."
  )
