"""A training run: what it is given, checked first; its program; the loop into a run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import flax.struct
import jax
import numpy as np

from jaxdistill import _check, export, runs
from jaxdistill.data import Source
from jaxdistill.evaluation import Validator
from jaxdistill.runs import Checkpoints
from jaxdistill.teachers import decay_of
from jaxdistill.train import _identity, _mesh
from jaxdistill.train._frozen import never_moved
from jaxdistill.train._loop import (
  Intervals,
  Log,
  claimed_folder,
  run_steps,
  start_or_resume,
)
from jaxdistill.train._memory import of_program
from jaxdistill.train._mesh import Dispatch
from jaxdistill.train._optax import Transformation, is_optimizer
from jaxdistill.train._plan import Plan
from jaxdistill.train._processes import together
from jaxdistill.train._program import Program, with_teacher_placed
from jaxdistill.train._shared_teacher import with_answers
from jaxdistill.train._state import State
from jaxdistill.train._stops import stop_signal
from jaxdistill.types import (
  Model,
  Network,
  Objective,
  ObjectiveFunction,
  Teacher,
  with_logits,
)

__all__ = ["Fitted", "Run", "Watch", "check_run", "fit"]

PyTree = Any


class _History(list[dict[str, Any]]):
  """The lines of a log; hashed by identity, since a pytree's static parts are hashed."""

  __hash__ = object.__hash__  # type: ignore[assignment]


@flax.struct.dataclass
class Fitted(Model):
  """What `fit` returns: the deployed model, and how it came to be.

  Attributes:
    network: the deployed network: the student, unless the objective says otherwise (SimKD).
    variables: its variables after the last step (their moving average, where one is kept); leaves
      ``[S, ...]`` over seeds.
    seeds: S for a sequence of seeds, else None.
    state: the whole training state.
    history: the lines of ``metrics.jsonl``.
  """

  state: State | None = None
  history: list[dict[str, Any]] = flax.struct.field(pytree_node=False, default_factory=_History)


@dataclasses.dataclass(frozen=True)
class Run:
  """Where a run, a sweep or a search is saved, and what it says on its way.

  Attributes:
    folder: nothing is written without one. What was stopped goes on there.
    config: what else defines the run, for whoever reads ``config.json``. There it stands beside
      seeds, steps, digests of the data, of the teacher and of what is computed (the objective, the
      optimiser, with their constants). All of it has to be the same when the run goes on; what
      differs is named.
    checkpoint_every: steps between checkpoints. By default `fit` saves as often as it validates,
      and a sweep about ten times, but not more often than every thousand steps.
    stop_after: seconds from the call on after which it ends as SIGTERM ends it: it finishes its
      chunk, saves, leaves by `Stopped`, and goes on when it is started again, with the same bits.
      For a machine that is there for a while; leave room for a chunk and a checkpoint. It changes
      no number, and so is no part of what has to be the same when the run goes on.
    progress: the label of the progress, a bar in a terminal and lines elsewhere; True for the
      folder's name, None or False for silence.
    longer: whether `fit` may go on with a run of fewer steps that the folder holds, with its
      optimiser's state and in its order of the data. The optimiser may follow another schedule from
      there on; everything else has to be the same.
    trackers: where else the numbers go: `jaxdistill.runs.TensorBoard`, `MLflow`, `Wandb`, `CSV`, or
      an object of your own, see `jaxdistill.runs.Tracker`. A search tracks each student as a run of
      its own when its chunk is done, and then itself. One that fails is said once, and the run goes
      on.
    outputs: what the deployed network that is saved puts out: ``"logits"`` and features by name; by
      default the logits, or all features of a network that has none.

  Raises:
    TypeError: an attribute is of another kind than it must be.
    ValueError: one is out of range; ``stop_after`` without a folder to save in.
  """

  folder: str | os.PathLike[str] | None = None
  config: Mapping[str, Any] | None = None
  checkpoint_every: int | None = None
  stop_after: float | None = None
  progress: str | bool | None = True
  longer: bool = False
  outputs: Collection[str] | None = None
  trackers: Sequence[runs.Tracker] = ()

  def __post_init__(self) -> None:
    runs.check_trackers(self.trackers, self.folder)
    if self.folder is not None:
      _check.folder("folder", self.folder)
    if self.config is not None:
      runs.check_config(self.config)
    if self.checkpoint_every is not None:
      _check.whole("checkpoint_every", self.checkpoint_every)
    if not isinstance(self.progress, str | bool | None):
      raise TypeError(f"progress={self.progress!r} must be the bar's label, or None for no bar.")
    _check.switch("longer", self.longer)
    names = self.outputs if isinstance(self.outputs, Collection) else [self.outputs]
    if self.outputs is not None and not all(isinstance(name, str) for name in names):
      raise TypeError(
        f"outputs={_check.show(self.outputs)} must be 'logits' and names of features, or None."
      )
    if self.stop_after is not None:
      _check.number("stop_after", self.stop_after, above=0)
      if self.folder is None:
        raise ValueError(f"stop_after={self.stop_after:g} needs a folder=... to save the run in.")

  def label(self, default: str) -> str | None:
    """The label of the progress; None for silence.

    Args:
      default: where nothing names it.
    """
    if isinstance(self.progress, str):
      return self.progress
    named = default if self.folder is None else pathlib.Path(self.folder).name
    return named if self.progress else None


@dataclasses.dataclass(frozen=True)
class Watch:
  """What `fit` looks at on its way, and which checkpoints it keeps by that.

  Attributes:
    validate: ``model -> {name: number}``, see `jaxdistill.evaluation.validator`. The next step
      overwrites the model's variables: copy what is to be kept.
    validate_every: steps between validations; an epoch by default. The last step is always one.
    select: the validation metric by which the best checkpoint is kept: by default the first of a
      `jaxdistill.evaluation.validator`'s task, else ``"accuracy"``.
    better: whether ``"higher"`` or ``"lower"`` is; by default what the validator's task says of the
      metric, else higher.
    keep_last: how many of the last checkpoints are kept, beside the best one.
    log_every: steps in a chunk, which is one dispatch and one line of ``metrics.jsonl``; an epoch
      or 100 steps by default, whichever is less.
    callback: ``(step, record)`` after every line.

  Raises:
    TypeError: an attribute is of another kind than it must be.
    ValueError: one is out of range, or something is selected by and nothing validated.
  """

  validate: Callable[[Model], Mapping[str, Any]] | None = None
  validate_every: int | None = None
  select: str | None = None
  better: Literal["higher", "lower"] | None = None
  keep_last: int = 2
  log_every: int | None = None
  callback: Callable[[int, Mapping[str, Any]], None] | None = None

  def __post_init__(self) -> None:
    for name, value, takes, count, instead in (
      ("validate", self.validate, "model -> {name: number}", 1, "See evaluation.validator."),
      ("callback", self.callback, "(step, record)", 2, ""),
    ):
      if value is not None:
        _check.function(name, value, takes, arguments=count, instead=instead)
    _check.whole("keep_last", self.keep_last)
    for name in ("validate_every", "log_every"):
      if getattr(self, name) is not None:
        _check.whole(name, getattr(self, name))
    if self.validate is None and self.select is not None:
      raise ValueError(f"select={self.select!r} chooses by a validation, and validate is None.")
    if self.better not in (None, "higher", "lower"):
      raise ValueError(f"better={self.better!r} must be 'higher' or 'lower', or None.")
    if self.select is not None and isinstance(self.validate, Validator):
      self.validate.task.metric(self.select)


def _chosen_by(watch: Watch) -> tuple[str, int]:
  """The metric that the best checkpoint is kept by, and 1 where higher is better, else −1."""
  task = watch.validate.task if isinstance(watch.validate, Validator) else None
  name = watch.select or ("accuracy" if task is None else task.first)
  known = "higher" if task is None else task.metric(name).better
  return name, -1 if (watch.better or known) == "lower" else 1


def check_run(run: Any, kind: str) -> Run:
  """A `Run`, of a folder's path too, whose folder is not another kind's.

  Args:
    run: a `Run`, a path, or None for a run that is not saved.
    kind: what is kept in the folder, see `jaxdistill.runs.check_place`.

  Raises:
    TypeError: it is none of these.
    OSError: the folder is something else's, or cannot be made.
  """
  if not isinstance(run, Run | str | os.PathLike | None):
    raise TypeError(f"run={_check.show(run)} must be a folder, or train.Run(folder, ...).")
  run = run if isinstance(run, Run) else Run(run)
  if run.folder is not None:
    runs.check_place(run.folder, kind)
  return run


@together()
def fit(
  student: Network | Model,
  objective: Objective | ObjectiveFunction,
  *,
  data: Source | Sequence[Source],
  optimizer: Transformation,
  steps: int,
  seed: int | Sequence[int] = 0,
  teacher: Teacher | None = None,
  average: float | None = None,
  dispatch: Dispatch | None = None,
  watch: Watch | None = None,
  run: Run | str | os.PathLike[str] | None = None,
) -> Fitted:
  """Trains a student, or the same student from several seeds as one compiled program.

  A run that is started again with the same arguments goes on from its last good checkpoint. One
  that gets SIGTERM or Ctrl-C, or whose ``stop_after`` is over, finishes its chunk, saves, and
  leaves by `Stopped`; at the second Ctrl-C it leaves at once. A run that comes to its end leaves
  the deployed network in its folder, see `jaxdistill.export.load_student`.

  In a program of several processes, every process calls this with the same arguments; the folder
  is one that all of them see, and process 0 writes it, but for what lies in parts over several of
  them: of that, each writes its own. Where one of them dies, the others end within seconds, to be
  started again together, or as fewer or more.

  Args:
    student: the network to train; or a model whose variables it starts from: all of them, or a part
      of their tree, such as some of the teacher's layers (`teachers.layers`). With several seeds,
      leaves may have an axis over them in front.
    objective: what to minimise, see `jaxdistill.recipes`. Its keywords are numbers, arrays, or
      schedules of the step: ``recipes.kd(temperature=schedule)``,
      ``as_objective(mine, temperature=2.0)``.
    data: where batches come from. With several seeds, one source for each: they share their
      arrays, but for those that differ, and have each their ``data_seed``.
    optimizer: an optax optimiser, see `jaxdistill.train.optimizers`; `optax.MultiSteps` too. What
      it never moves is frozen with its statistics.
    steps: how many steps the whole run has.
    seed: fixes initialisation and dropout. A sequence trains one student for each in one program.
    teacher: from `jaxdistill.teachers`; None for training without one. Its variables are never
      changed and never checkpointed, and stay where they lie on the devices. Or a moving average of
      the student (`teachers.moving_average`), which is a part of the run's state.
    average: the decay of a moving average of the deployed network's variables, which is then what
      is validated, returned and deployed; None for none.
    dispatch: how a step is run, `train.with_jit` (the default, over all devices; with ``sharding=``
      networks that are larger than one) or `train.with_pmap`; where it needs less memory,
      ``train.with_jit(accumulate=4)`` cuts batches into micro-batches, and ``tokens_at_once=1024``
      makes a language model's logits in chunks.
    watch: what is looked at on the way: validation, log, callback; see `Watch`.
    run: where it is saved; see `Run`. A path is the run's folder; None saves nothing.

  Returns:
    `Fitted`, a model with the variables after the last step.

  Raises:
    TypeError: an argument is of another kind than it must be.
    ValueError: sources and seeds do not pair up; a batch does not divide by the devices; the
      folder holds another configuration; a keyword of the objective has no value; the variables to
      start from do not fit.
    CheckpointError: the folder's last checkpoint is not what this library writes.
    FileExistsError: another process is at work in the folder, or it holds something else than a
      run: a cache, a sweep, a report.
    OSError: the folder cannot be written, or a file of it not be read.
    FloatingPointError: a term was not finite; the message says which, and at which step.
    Stopped: the process was asked to stop, or ``stop_after`` is over.
  """
  called = time.monotonic()
  run, watch = check_run(run, "run"), Watch() if watch is None else watch
  dispatch = _mesh.with_jit() if dispatch is None else dispatch
  _check_machinery(optimizer, dispatch, watch)
  plan = Plan.of(
    student,
    objective,
    data=data,
    optimizer=optimizer,
    steps=steps,
    seed=seed,
    teacher=teacher,
    accumulate=dispatch.accumulate,
    tokens_at_once=dispatch.tokens_at_once,
    average=average,
  )
  epoch = plan.sources[0].steps_per_epoch
  every = Intervals.of(steps, epoch, watch.log_every, watch.validate_every, run.checkpoint_every)
  label = run.label("train") if jax.process_index() == 0 else None
  plan, said = with_teacher_placed(plan, dispatch)  # first: it may be run over the examples at once
  program = Program(with_answers(plan, label), dispatch, longest=every.longest)
  program.trace()  # what does not fit says so before a folder is claimed
  if run.outputs is not None:
    _put_out(plan, program, run.outputs)
  left = None if run.stop_after is None else max(0, run.stop_after - time.monotonic() + called)
  return _trained(plan, program, every, watch, run, seed, left, said)


def _trained(
  plan: Plan,
  program: Program,
  every: Intervals,
  watch: Watch,
  run: Run,
  seed: int | Sequence[int],
  left: float | None,
  said: Sequence[str],
) -> Fitted:
  """Runs a plan's program in its folder; stops after so many seconds, where that is not None."""
  with contextlib.ExitStack() as stack:
    # First, and so the last to go: a signal that is handed on finds everything saved.
    listening = stop_signal(listening=run.folder is not None, after=left)
    asked_to_stop = stack.enter_context(listening)
    path = saved = None
    settings: dict[str, Any] = {}
    if run.folder is not None or run.trackers:
      about = _identity.describe(plan, program.shapes.params)
      settings = {**(run.config or {}), "seed": seed, **about}
    if run.folder is not None:
      path = stack.enter_context(_claimed(run, plan, program, settings))
      kept = Checkpoints(path / "checkpoints", keep_last=watch.keep_last, together=True)
      saved = stack.enter_context(kept)
    state, at = start_or_resume(program, saved)
    if path is not None and at < plan.steps:
      _drop_deployed(path)
    tracked = _tracked(run, settings, path, at)
    log = _log_of(program, watch, path, at, run.label("train"), tracked)
    stack.callback(log.close)
    if path is not None:
      log.say(_found(at, plan.steps, path))
    if at < plan.steps:
      _say_form(plan, program, log, said)
      if isinstance(watch.validate, Validator) and (ends := program.ends()) is not None:
        watch.validate.compile(ends, calls=every.validations(at))  # beside the steps' program
      _say_memory(program, log)
    final = run_steps(
      program,
      state,
      at,
      every=every,
      log=log,
      saved=saved,
      validate=watch.validate,
      select=_chosen_by(watch),
      asked_to_stop=asked_to_stop,
    )
    made = plan.model(final)
    fitted = Fitted(made.network, made.variables, made.seeds, final, _History(log.history))
    if path is not None and saved is not None:
      saved.wait()
      _save_deployed(path, plan, program, fitted, run.outputs)
    if tracked is not None:
      tracked.finish([] if path is None else _worth_keeping(path))
  if path is not None:
    runs.say_saved(run.label("train") if jax.process_index() == 0 else None, path)
  return fitted


def _tracked(
  run: Run, settings: Mapping[str, Any], path: pathlib.Path | None, at: int
) -> runs.Tracked | None:
  """The run's trackers, of process 0 alone."""
  if not run.trackers or jax.process_index() > 0:
    return None
  name = run.label("train") or ("train" if path is None else path.name)
  return runs.Tracked(run.trackers, settings, name=name, folder=path, resumed_from=at)


def _worth_keeping(path: pathlib.Path) -> list[pathlib.Path]:
  """What of a finished run's folder is kept with its numbers: small files, and no checkpoints."""
  deployed = sorted((path / "student").rglob("*"))
  return [path / "config.json", path / "metrics.jsonl", *deployed]


def _claimed(
  run: Run, plan: Plan, program: Program, settings: Mapping[str, Any]
) -> contextlib.AbstractContextManager[pathlib.Path]:
  """The run's folder, which is this run's, or the same run's with fewer steps."""
  folder: Any = run.folder
  shorter = None
  if run.longer and (pathlib.Path(folder) / "config.json").exists():
    before = runs.read_config(folder).get("steps")
    if not isinstance(before, int) or before > plan.steps:
      raise ValueError(
        f"longer=True, and the run in {os.fspath(folder)} has {_check.show(before)} steps, which "
        f"steps={plan.steps} does not go beyond."
      )
    shorter = {**settings, **_identity.until(plan, before)}
  return claimed_folder(folder, settings, _identity.traced(plan, program), shorter=shorter)


def _log_of(
  program: Program,
  watch: Watch,
  path: pathlib.Path | None,
  at: int,
  label: str | None,
  tracked: runs.Tracked | None,
) -> Log:
  """The run's log; process 0 alone writes and shows it."""
  plan = program.plan
  first_process = jax.process_index() == 0
  return Log(
    path if first_process else None,
    steps=plan.steps,
    at=at,
    epoch=program.source.steps_per_epoch,
    examples=program.examples_per_step,
    schedules={n: value for n, value in plan.objective.hyper.items() if callable(value)},
    progress=label if first_process else None,
    tracked=tracked,
    select=_chosen_by(watch)[0],
    callback=watch.callback,
  )


def _found(at: int, steps: int, path: pathlib.Path) -> str:
  """What a folder held of the run: a user is to know whether these are numbers of today."""
  if at >= steps:
    return f"the run in {path} is finished: it is given back as it is, and nothing is trained."
  return f"goes on at step {at:,} of {steps:,} in {path}." if at else f"starts in {path}."


def _say_form(plan: Plan, program: Program, log: Log, said: Sequence[str]) -> None:
  """Says what was decided for the user: where it lies, how the teacher is run, what is frozen."""
  for line in (*(program.layout.said if program.layout else ()), *said):
    log.say(line)
  if program.plan.teacher is not plan.teacher:
    size = program.source.size
    log.say(f"the teacher is run once over the {size} examples, since nothing is augmented.")
  if rounded := _rounded(plan, program.dispatch):
    log.say(rounded)
  if decay_of(plan.teacher) is not None:
    what = "the student" if plan.average is None else f"its average (average={plan.average:g})"
    log.say(f"the teacher is a moving average of the student; {what} is deployed.")
  if source := next((one for one in plan.sources if one.skipped), None):
    log.say(
      f"the teacher skipped {source.skipped:,} of {source.size:,} examples: they count in the "
      "terms that do not look at it."
    )
  if frozen := never_moved(plan.optimizer, program.shapes, stacked=plan.stacked):
    log.say(frozen)
  if program.dispatch.scan is None and not program.scan:
    log.say(
      "steps are dispatched one by one: a CPU computes lax convolutions slowly in a loop "
      "(dispatch=train.with_jit(scan=True) for a loop all the same)."
    )


def _rounded(plan: Plan, dispatch: Dispatch) -> str:
  """A line where chunks have more tokens than were asked for; empty where they have as many."""
  shares = dispatch.accumulate * (1 if dispatch.axis_name is None else dispatch.devices)
  asked, rows = dispatch.tokens_at_once, plan.sources[0].batch_size // shares
  if asked is None or asked % rows == 0:
    return ""
  return (
    f"tokens_at_once={asked:,} is taken as {-(-asked // rows) * rows:,}, a multiple of the {rows} "
    "examples that a step sees at once: each has a position in every chunk."
  )


def _say_memory(program: Program, log: Log) -> None:
  """Says what a device holds, where it is an accelerator, or networks are cut by rules."""
  rules = program.dispatch.sharding
  cut = rules is not None and not (rules.student is None and rules.teacher is None)
  if cut or jax.default_backend() != "cpu":
    for line in of_program(program).lines():  # the first step would wait for the compiler as well
      log.say(line)


def _put_out(plan: Plan, program: Program, outputs: Collection[str] | None) -> list[str]:
  """What the deployed network puts out, by name, by shapes alone; raises for what it does not."""
  asked = (outputs,) if isinstance(outputs, str) else outputs

  def named(state: Any, inputs: Any) -> Any:
    return with_logits(plan.model(state).instance(0)(inputs)).named(asked)

  source = program.source
  batch = jax.eval_shape(source.cut, source.shared, program.first_item)
  return sorted(jax.eval_shape(named, program.shapes, batch.inputs))


def _drop_deployed(path: pathlib.Path) -> None:
  """Removes the deployed network of a run that is not at its end, as one made longer is not."""
  if jax.process_index() == 0:
    shutil.rmtree(path / "student", ignore_errors=True)


def _save_deployed(
  path: pathlib.Path,
  plan: Plan,
  program: Program,
  fitted: Fitted,
  outputs: Collection[str] | None,
) -> None:
  """Leaves the deployed network in the folder, once; anew where it is asked for other outputs.

  What lies in parts, each process writes its own of. Process 0 alone looks at what is there, and
  says it to the others, which would read while it is cleared away.
  """
  missing = False
  if jax.process_index() == 0:
    missing = not (path / "student").is_dir()
    if not missing:
      there = runs.read_object(path / "student" / "student.json").get("outputs")
      listed = sorted(map(str, there)) if isinstance(there, list) else None
      missing = listed != _put_out(plan, program, outputs)
      if missing:
        _drop_deployed(path)
  missing = bool(_mesh.agree(int(missing)))
  if missing and (jax.process_index() == 0 or runs.lies_in_parts(fitted.variables)):
    source = program.source
    stored, normalize = source.stored, source.normalize
    export.save_student(path, fitted, stored=stored, normalize=normalize, outputs=outputs)
  _mesh.barrier("deployed")


def _check_machinery(optimizer: Any, dispatch: Any, watch: Any) -> None:
  """Whether these are an optimiser, a dispatch and a watch, outside of another program's trace."""
  if isinstance(jax.device_put(np.zeros(())), jax.core.Tracer):  # of which nothing is compiled
    raise TypeError("fit compiles its steps itself; call it outside of jit, vmap and grad.")
  if not is_optimizer(optimizer):
    how = "call it: optax.adam(1e-3)" if callable(optimizer) else "such as optax.adam(1e-3)"
    raise TypeError(f"optimizer must be an optax optimiser, got {_check.show(optimizer)}; {how}.")
  if not isinstance(dispatch, Dispatch):
    raise TypeError(
      f"dispatch must be what train.with_jit(mesh) or train.with_pmap(devices) returns, got "
      f"{_check.show(dispatch)}."
    )
  if not isinstance(watch, Watch):
    raise TypeError(f"watch={_check.show(watch)} must be a train.Watch: Watch(validator(batches)).")
