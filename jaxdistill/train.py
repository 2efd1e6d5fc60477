"""A training run: data to steps (`jaxdistill.loop`), steps to a run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from jaxdistill import arguments, deployed
from jaxdistill import mesh as mesh_lib
from jaxdistill.checkpoint import Checkpoints
from jaxdistill.data import Source
from jaxdistill.fit_arguments import (
  check_functions,
  check_hyper,
  check_machinery,
  check_networks,
)
from jaxdistill.loop import begin, drive
from jaxdistill.program import Program, build
from jaxdistill.record import Log, claimed
from jaxdistill.state import State, deployed_variables
from jaxdistill.stops import Intervals, Stopped, stop_signal, time_limit
from jaxdistill.types import (
  Network,
  Objective,
  ObjectiveFunction,
  Teacher,
  Transform,
  as_objective,
)

__all__ = ["Fitted", "Stopped", "fingerprint", "fit", "time_limit"]

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
  start: Mapping[str, Any] | None = None,
  objective_start: tuple[PyTree, PyTree] | None = None,
  transform: Transform | None = None,
  accumulate: int = 1,
  average: float | None = None,
  dispatch: mesh_lib.Dispatch | None = None,
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
  `jaxdistill.deployed.load_student`.

  In a program of several processes, every process calls this with the same arguments; the folder
  is one that all of them see, and process 0 writes it.

  Args:
    student: the network to train.
    objective: what to minimise, see `jaxdistill.recipes`.
    data: where batches come from. With several seeds, one source for each: they share their
      arrays, but for those that differ, and have each their ``data_seed``.
    optimizer: an optax optimiser, see `jaxdistill.optimizers`.
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
      `jaxdistill.transforms`.
    accumulate: into how many micro-batches each batch is cut, to need less memory; the same
      gradient for a network without state across examples and without dropout. BatchNorm, and
      losses that relate examples, see the micro-batch.
    average: the decay of a moving average of the deployed network's variables, which is then what
      is validated, returned and deployed; None for none.
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
    stop_after: seconds from the call on after which the run ends as SIGTERM ends it: it finishes
      its chunk, saves, leaves by `Stopped`, and goes on when it is started again, with the same
      bits. For a machine that is there for a while; leave room for a chunk and a checkpoint. It
      changes no number, and so is no part of what has to be the same when the run goes on.
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
    TypeError: an argument is of another kind than it must be.
    ValueError: sources and seeds do not pair up; a batch does not divide by the devices; the
      folder holds another configuration; an unknown keyword in ``hyper``; ``start`` does not fit;
      ``stop_after`` without a folder to save in.
    FloatingPointError: a term was not finite; the message says which, and at which step.
    Stopped: the process was asked to stop, or ``stop_after`` is over.
  """
  called = time.monotonic()
  dispatch = mesh_lib.with_jit() if dispatch is None else dispatch
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
  arguments.whole("steps", steps)
  arguments.whole("keep_last", keep_last)
  if stop_after is not None:
    arguments.number("stop_after", stop_after, above=0)
    if folder is None:
      raise ValueError(f"stop_after={stop_after:g} needs a folder=... to save the run in.")
  objective = as_objective(objective)
  hyper = check_hyper(hyper, objective, steps)
  program = build(
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
  with contextlib.ExitStack() as stack:
    if folder is not None:
      settings = {**(config or {}), "steps": steps, "seed": seed, **program.describe()}
      settings |= {"accumulate": accumulate, "average": average}
      settings["objective"] = {n: _shown(value, steps) for n, value in objective.hyper.items()}
      settings["hyper"] = {name: _shown(value, steps) for name, value in hyper.items()}
      settings["teacher"] = None if teacher is None else fingerprint(teacher_variables)
      started = (start, objective_start)
      settings["start"] = None if started == (None, None) else fingerprint(started)
      path = stack.enter_context(claimed(folder, settings))
      saved = stack.enter_context(Checkpoints(path / "checkpoints", keep_last=keep_last))
    state, at = begin(program, saved)
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
    left = None if stop_after is None else max(0, stop_after - (time.monotonic() - called))
    final = drive(
      program,
      state,
      at,
      every=every,
      dispatch=dispatch,
      log=log,
      saved=saved,
      validate=validate,
      select=select,
      asked_to_stop=stack.enter_context(stop_signal(listening=saved is not None, after=left)),
    )
  variables = deployed_variables(final, objective)
  network = student if objective.deployed is None else objective.deployed.network(student)
  if path is not None:
    _save_deployed(path, program, network, variables)
  return Fitted(variables=variables, network=network, state=final, history=log.history)


def _save_deployed(
  path: pathlib.Path, program: Program, network: Network, variables: PyTree
) -> None:
  """Leaves the deployed network in the folder, once."""
  if jax.process_index() == 0 and not (path / "student").is_dir():
    deployed.save_student(
      path,
      network,
      variables,
      stored=program.source.stored,
      normalize=program.source.normalize,
      stacked=program.stacked,
    )
  mesh_lib.barrier("deployed")


def _shown(value: Any, steps: int) -> Any:
  """A keyword as ``config.json`` holds it: a schedule by its values at three steps."""
  return [float(value(s)) for s in (0, steps // 2, steps)] if callable(value) else value
