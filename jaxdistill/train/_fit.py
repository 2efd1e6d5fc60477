"""A training run: what it is given, checked first; its program; the loop into a run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdistill import _check, _extras, export, runs
from jaxdistill.data import Source
from jaxdistill.runs import Checkpoints, fingerprint
from jaxdistill.train import _mesh
from jaxdistill.train._loop import (
  Intervals,
  Log,
  claimed_folder,
  run_steps,
  start_or_resume,
  stop_signal,
)
from jaxdistill.train._mesh import Dispatch
from jaxdistill.train._program import Program, build_program
from jaxdistill.train._state import State, deployed_variables
from jaxdistill.types import (
  Model,
  Network,
  Objective,
  ObjectiveFunction,
  Teacher,
  Transform,
  as_objective,
)

__all__ = [
  "Fitted",
  "check_functions",
  "check_hyper",
  "check_machinery",
  "check_networks",
  "fit",
]

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Fitted:
  """What `fit` returns.

  Attributes:
    variables: the deployed network's variables after the last step (their moving average, where
      one is kept); leaves ``[S, ...]`` over seeds.
    network: the deployed network: the student, unless the objective says otherwise (SimKD).
    state: the whole training state.
    history: the lines of ``metrics.jsonl``.
  """

  variables: dict[str, PyTree]
  network: Network
  state: State
  history: list[dict[str, Any]]


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
  start: Mapping[str, Any] | None = None,
  objective_start: tuple[PyTree, PyTree] | None = None,
  transform: Transform | None = None,
  accumulate: int = 1,
  average: float | None = None,
  dispatch: _mesh.Dispatch | None = None,
  log_every: int | None = None,
  validate: Callable[[PyTree], Mapping[str, Any]] | None = None,
  validate_every: int | None = None,
  select: str = "accuracy",
  folder: str | os.PathLike[str] | None = None,
  config: Mapping[str, Any] | None = None,
  checkpoint_every: int | None = None,
  keep_last: int = 2,
  stop_after: float | None = None,
  seeds_by: str = "vmap",
  scan: bool = True,
  progress: str | None = "train",
  tensorboard: bool = False,
  callback: Callable[[int, Mapping[str, Any]], None] | None = None,
) -> Fitted:
  """Trains a student, or the same student from several seeds as one compiled program.

  A run that is started again with the same arguments goes on from its last good checkpoint. One
  that gets SIGTERM, or whose ``stop_after`` is over, finishes its chunk, saves, and leaves by
  `Stopped`. A run that comes to its end leaves the deployed network in its folder, see
  `jaxdistill.export.load_student`.

  In a program of several processes, every process calls this with the same arguments; the folder
  is one that all of them see, and process 0 writes it.

  Args:
    student: the network to train.
    objective: what to minimise, see `jaxdistill.recipes`.
    data: where batches come from. With several seeds, one source for each: they share their
      arrays, but for those that differ, and have each their ``data_seed``.
    optimizer: an optax optimiser, see `jaxdistill.train.optimizers`.
    steps: how many steps the whole run has.
    seed: fixes initialisation and dropout. A sequence trains one student for each under ``vmap``.
    teacher: ``(variables, batch) -> Outputs``; None for training without one.
    teacher_variables: the teacher's variables; never changed, never checkpointed.
    hyper: the objective's keywords: numbers, arrays, or schedules of the step.
    start: values that the student starts from in place of the initialiser's: all its variables, or
      a part of their tree, such as some of the teacher's layers (`teachers.layers`). With several
      seeds, leaves may have an axis over them in front.
    objective_start: likewise for the objective: parts of ``(params, state)``, as the run of an
      earlier stage has them in its ``state``.
    transform: ``(key, batch) -> batch`` before both networks: mixup, label smoothing, see
      `jaxdistill.data.transforms`.
    accumulate: into how many micro-batches each batch is cut, to need less memory; the same
      gradient for a network without state across examples and without dropout. BatchNorm, and
      losses that relate examples, see the micro-batch.
    average: the decay of a moving average of the deployed network's variables, which is then what
      is validated, returned and deployed; None for none.
    dispatch: `train.with_jit` (the default, over all devices) or `train.with_pmap`.
    log_every: steps in a chunk, which is one dispatch and one line of ``metrics.jsonl``; an epoch
      or 100 steps by default, whichever is less.
    validate: ``variables -> {name: number}``, see `jaxdistill.evaluation.validator`. The variables
      are those that the next step overwrites: copy what is to be kept.
    validate_every: steps between validations; an epoch by default. The last step is always one.
    select: the validation metric, higher is better, by which the best checkpoint is kept.
    folder: the run's folder; nothing is written without one.
    config: what else defines the run, the optimiser's settings above all; goes into ``config.json``
      beside seeds, steps, data, the student's shapes, the objective's keywords and the teacher's
      fingerprint, and has to be the same when the run goes on.
    checkpoint_every: steps between checkpoints; as often as validation by default.
    keep_last: how many of the last checkpoints are kept, beside the best one.
    stop_after: seconds from the call on after which the run ends as SIGTERM ends it: it finishes
      its chunk, saves, leaves by `Stopped`, and goes on when it is started again, with the same
      bits. For a machine that is there for a while; leave room for a chunk and a checkpoint. It
      changes no number, and so is no part of what has to be the same when the run goes on.
    seeds_by: whether several seeds are trained side by side (``"vmap"``) or one after another
      inside the program (``"unroll"``), which is faster for ``lax`` convolutions on a CPU.
    scan: whether a chunk is one dispatch, by ``lax.scan``. Without, its steps are dispatched one by
      one: XLA computes convolutions inside a loop twenty times slower on a CPU.
    progress: the label of the progress, a bar in a terminal and lines elsewhere; None for silence.
    tensorboard: also write TensorBoard event files into the folder.
    callback: ``(step, record)`` after every line.

  Returns:
    `Fitted`, with the variables after the last step.

  Raises:
    TypeError: an argument is of another kind than it must be.
    ValueError: sources and seeds do not pair up; a batch does not divide by the devices; the
      folder holds another configuration; an unknown keyword in ``hyper``; ``start`` does not fit;
      ``stop_after`` without a folder to save in.
    FloatingPointError: a term was not finite; the message says which, and at which step.
    Stopped: the process was asked to stop, or ``stop_after`` is over.
  """
  called = time.monotonic()
  dispatch = _mesh.with_jit() if dispatch is None else dispatch
  check_machinery(
    optimizer,
    dispatch,
    average=average,
    seeds_by=seeds_by,
    progress=progress,
    scan=scan,
    tensorboard=tensorboard,
  )
  check_networks(student, teacher, teacher_variables, start)
  check_functions(
    transform=transform, validate=validate, callback=callback, config=config, select=select
  )
  _check.whole("steps", steps)
  _check.whole("keep_last", keep_last)
  if stop_after is not None:
    _check.number("stop_after", stop_after, above=0)
    if folder is None:
      raise ValueError(f"stop_after={stop_after:g} needs a folder=... to save the run in.")
  objective = as_objective(objective)
  hyper = check_hyper(hyper, objective, steps)
  program = build_program(
    student,
    objective,
    data,
    optimizer,
    seed,
    teacher,
    teacher_variables,
    dispatch,
    hyper=hyper,
    start=start,
    objective_start=objective_start,
    transform=transform,
    accumulate=accumulate,
    average=average,
    seeds_by=seeds_by,
    scan=scan,
  )
  epoch = program.source.steps_per_epoch
  every = Intervals.of(steps, epoch, log_every, validate_every, checkpoint_every)
  program.trace(every.next_stop(0))
  first_process = jax.process_index() == 0
  path = saved = None
  left = None if stop_after is None else max(0, stop_after - (time.monotonic() - called))
  with contextlib.ExitStack() as stack:
    # First, and so the last to go: a signal that is handed on finds everything saved.
    listening = stop_signal(listening=folder is not None, after=left)
    asked_to_stop = stack.enter_context(listening)
    if folder is not None:
      settings = {**(config or {}), "steps": steps, "seed": seed, **program.describe()}
      settings |= {"accumulate": accumulate, "average": average}
      settings["objective"] = {n: _shown(value, steps) for n, value in objective.hyper.items()}
      settings["hyper"] = {name: _shown(value, steps) for name, value in hyper.items()}
      settings["teacher"] = None if teacher is None else fingerprint(teacher_variables)
      started = (start, objective_start)
      settings["start"] = None if started == (None, None) else fingerprint(started)
      path = stack.enter_context(claimed_folder(folder, settings))
      saved = stack.enter_context(Checkpoints(path / "checkpoints", keep_last=keep_last))
    state, at = start_or_resume(program, saved)
    log = Log(
      path if first_process else None,
      steps=steps,
      at=at,
      epoch=epoch,
      examples=program.examples_per_step,
      schedules={n: value for n, value in {**objective.hyper, **hyper}.items() if callable(value)},
      progress=progress if first_process else None,
      tensorboard=tensorboard and first_process,
      select=select,
      callback=callback,
    )
    stack.callback(log.close)
    final = run_steps(
      program,
      state,
      at,
      every=every,
      dispatch=dispatch,
      log=log,
      saved=saved,
      validate=validate,
      select=select,
      asked_to_stop=asked_to_stop,
    )
    variables = deployed_variables(final, objective)
    network = student if objective.deployed is None else objective.deployed.network(student)
    if path is not None and saved is not None:
      saved.wait()
      _save_deployed(path, program, network, variables)
  if path is not None:
    runs.say_saved(progress if first_process else None, path)
  return Fitted(variables=variables, network=network, state=final, history=log.history)


def _save_deployed(
  path: pathlib.Path, program: Program, network: Network, variables: PyTree
) -> None:
  """Leaves the deployed network in the folder, once."""
  if jax.process_index() == 0 and not (path / "student").is_dir():
    model = Model(network, variables, len(program.data_seeds) if program.stacked else None)
    source = program.source
    export.save_student(path, model, stored=source.stored, normalize=source.normalize)
  _mesh.barrier("deployed")


def _shown(value: Any, steps: int) -> Any:
  """A keyword as ``config.json`` holds it: a schedule by its values at three steps."""
  return [float(value(s)) for s in (0, steps // 2, steps)] if callable(value) else value


def check_networks(student: Any, teacher: Any, teacher_variables: PyTree, start: PyTree) -> None:
  """The student, the teacher, and the variables that they bring along.

  Raises:
    TypeError: the student is no network, or the teacher no function.
    ValueError: there are variables and no teacher, or some of them are NaN.
  """
  if not isinstance(student, Network):
    raise TypeError(f"student must be a Network, got {_check.show(student)}; {_adapter(student)}.")
  if isinstance(teacher, Network):
    raise TypeError(f"teacher is the network {teacher.name!r}; give teachers.frozen(network).")
  if teacher is None and teacher_variables is not None:
    raise ValueError(
      "teacher_variables are given and teacher is None; give fit a teacher "
      "(teachers.frozen(network)), or leave its variables out."
    )
  if teacher is not None:
    how = f"{_adapter(teacher)}, and teachers.frozen of that."
    _check.function("teacher", teacher, "(variables, batch) -> Outputs", arguments=2, instead=how)
    if type(teacher).__module__.startswith("flax.") or hasattr(teacher, "scope"):
      raise TypeError(f"teacher={_check.show(teacher)} is a bare module; {how}")
  _check_values("teacher_variables", teacher_variables)
  _check_values("start", start)


def _adapter(module: Any) -> str:
  """Which adapter makes a network of this."""
  if isinstance(module, type):
    return f"make a module of the class, {module.__name__}(...), and give networks.linen(module)"
  kinds = {kind.__module__.split(".")[1] for kind in type(module).__mro__ if _is_flax(kind)}
  if "nnx" in kinds:
    return "give networks.nnx(module)"
  return "give networks.linen(module), or networks.nnx(module) of an NNX one"


def _is_flax(kind: type) -> bool:
  return kind.__module__.startswith("flax.")


def _check_values(name: str, tree: PyTree) -> None:
  """Raises for what is no array, is traced, or is NaN; infinities may be meant (a mask)."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    where = f"{name}{jax.tree_util.keystr(path)}"
    if isinstance(leaf, jax.core.Tracer):
      raise TypeError(f"{where} is traced; call fit outside of jit, vmap and grad.")
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float | complex):
      how = "runs.load_variables and weights read files" if isinstance(leaf, str) else ""
      raise TypeError(f"{where} is no array, but {_check.show(leaf)}; {how or 'leave it out'}.")
    if not jnp.issubdtype(getattr(leaf, "dtype", float), jnp.inexact):
      continue
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      continue
    if np.isnan(np.asarray(leaf)).any():
      raise ValueError(f"{where} holds NaN; take a checkpoint from before the run went wrong.")


def check_machinery(
  optimizer: Any, dispatch: Any, *, average: Any, seeds_by: Any, progress: Any, **switches: Any
) -> None:
  """How the run is carried out.

  Raises:
    TypeError: an argument is of another kind than it must be, or the call is inside a jit.
    ValueError: ``average`` or ``seeds_by`` is none of those that there are.
  """
  if isinstance(jnp.zeros(()), jax.core.Tracer):
    raise TypeError("fit compiles its steps itself; call it outside of jit, vmap and grad.")
  if not all(callable(getattr(optimizer, name, None)) for name in ("init", "update")):
    how = "call it: optax.adam(1e-3)" if callable(optimizer) else "such as optax.adam(1e-3)"
    raise TypeError(f"optimizer must be an optax optimiser, got {_check.show(optimizer)}; {how}.")
  if not isinstance(dispatch, Dispatch):
    raise TypeError(
      f"dispatch must be what train.with_jit(mesh) or train.with_pmap(devices) returns, got "
      f"{_check.show(dispatch)}."
    )
  if average is not None:
    _check.number("average", average, least=0, most=1)
  if seeds_by not in ("vmap", "unroll"):
    raise ValueError(f"seeds_by={seeds_by!r} must be 'vmap' or 'unroll'.")
  if not isinstance(progress, str | None):
    raise TypeError(f"progress={progress!r} must be the bar's label, or None for no bar.")
  for name, value in switches.items():
    _check.switch(name, value)
  if switches.get("tensorboard"):
    _extras.need("tensorboard=True", "tensorboardX")


def check_functions(
  *, transform: Any, validate: Any, callback: Any, config: Any, select: str
) -> None:
  """The user's functions, by how they are called.

  Raises:
    TypeError: one of them is no such function, or ``config`` no mapping.
    ValueError: something is selected by, and nothing validated.
  """
  for name, value, takes, count, instead in (
    ("transform", transform, "(key, batch) -> batch", 2, "See jaxdistill.data.transforms."),
    ("validate", validate, "variables -> {name: number}", 1, "See evaluation.validator."),
    ("callback", callback, "(step, record)", 2, ""),
  ):
    if value is not None:
      _check.function(name, value, takes, arguments=count, instead=instead)
  if config is not None and not isinstance(config, Mapping):
    raise TypeError(f"config must be a mapping of settings, got {_check.show(config)}.")
  if validate is None and select != "accuracy":
    raise ValueError(f"select={select!r} chooses by a validation, and validate is None.")


def check_hyper(hyper: Any, objective: Objective, steps: int) -> dict[str, Any]:
  """The objective's keywords: known, complete, and numbers or schedules that give numbers.

  Raises:
    TypeError: one is no number, array or function of the step.
    ValueError: one is unknown, missing, not finite, or a temperature that is not positive.
  """
  if not isinstance(hyper, Mapping | None):
    raise TypeError(f"hyper must be a mapping of keywords, got {_check.show(hyper)}.")
  hyper = dict(hyper or {})
  unknown = sorted(set(hyper) - set(objective.hyper))
  if unknown:
    raise ValueError(
      f"hyper has {unknown}, which the objective does not take; it takes {sorted(objective.hyper)}."
    )
  empty = inspect.Parameter.empty
  missing = sorted(n for n, v in objective.hyper.items() if v is empty and n not in hyper)
  if missing:
    raise ValueError(f"hyper lacks {missing}, for which the objective has no default.")
  for name, value in hyper.items():
    if callable(value):
      _check_schedule(name, value, steps)
    elif not _numeric(value):
      raise TypeError(
        f"hyper[{name!r}] must be a number, an array or a function of the step, got "
        f"{_check.show(value)}."
      )
    elif name == "temperature":
      _check.number("temperature", value, above=0)
    elif not isinstance(value, jax.core.Tracer) and not np.all(np.isfinite(np.asarray(value))):
      raise ValueError(f"hyper[{name!r}]={_check.show(value)} must be finite.")
  return hyper


def _numeric(value: Any) -> bool:
  dtype = getattr(value, "dtype", None)
  if dtype is not None:
    return bool(jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_))
  return isinstance(value, bool | int | float)


def _check_schedule(name: str, schedule: Callable[[Any], Any], steps: int) -> None:
  """A schedule on the host, at three steps, and once as the compiled step will call it."""
  label = f"the schedule hyper[{name!r}]"
  for step in sorted({0, steps // 2, steps - 1}):
    try:
      value = schedule(step)
    except Exception as error:
      raise ValueError(f"{label} fails at step {step}: {_check.short(error)}") from error
    above = 0 if name == "temperature" else None
    _check.number(f"{label} at step {step}", value, above=above)
  try:
    jax.eval_shape(schedule, jax.ShapeDtypeStruct((), jnp.int32))
  except Exception as error:
    raise ValueError(
      f"{label} cannot be compiled ({_check.short(error)}); the step is traced in it: take "
      "optax's schedules, or jnp.where in place of if."
    ) from error
