"""Evaluation on held-out data: exact averages, fidelity to the teacher, and what it costs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import flax.errors
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdistill import _check
from jaxdistill._among import company
from jaxdistill._compile import placed
from jaxdistill._devices import AXIS, batch_axes, mesh_of
from jaxdistill._lookups import Lookup, check_values, in_jaxpr, of_integers
from jaxdistill._reach import depend_on
from jaxdistill.data import Batches
from jaxdistill.evaluation import cost, predictions, tasks
from jaxdistill.evaluation._programs import (
  Kept,
  batches_of,
  beside,
  count_of,
  first_of,
  kept,
  settled,
)
from jaxdistill.evaluation._shared import Rows, everywhere, gathered, over, share, whole
from jaxdistill.evaluation.tasks import Task
from jaxdistill.teachers import answered, asked_on_host
from jaxdistill.types import Batch, Model, Outputs, Teacher, with_logits

__all__ = [
  "Validator",
  "costs",
  "evaluate",
  "examine",
  "logits_of",
  "taught",
  "validator",
]

Split = TypeVar("Split", bound=Batch | Batches)
# What comes of variables that belong to another network.
_MISFITS = (
  _check.VariablesError,
  flax.errors.FlaxError,
  TypeError,
  AttributeError,
  IndexError,
)


def evaluate(
  model: Model | Teacher,
  batches: Batch | Batches,
  *,
  teacher: Teacher | None = None,
  task: Task | None = None,
) -> dict[str, np.ndarray]:
  """Evaluates a model on a whole split, padded rows excluded exactly.

  A network is compiled for once, whatever is evaluated of it: all its models, on any split in
  batches of one size, with a teacher or without. Where a model of one seed lies on several devices,
  as after a training over them, these share each batch whose size they divide. Sums of batches are
  added up in float64 on the host; of a split that is streamed, five batches at most are in memory.

  In a program of several processes all of them call this, with the same arguments, and get the same
  numbers. Each reads and evaluates every P-th batch on its own devices, and all add up the sums of
  all batches in their order: to the bit what one process of as many devices gives, since a batch's
  sums come of the same program. A model or a teacher that lies in parts over the processes goes
  through every batch with all of them, which each reads; then the numbers are those of one device,
  to float32's rounding. What process 0 is to evaluate alone, it does so in
  ``runs.Together().first(...)``.

  Args:
    model: what `jaxdistill.fit` returned, ``Model(network, variables)``, or a teacher (an ensemble,
      say).
    batches: leaves ``[N, B, ...]``, or `jaxdistill.data.Batches`, from
      `jaxdistill.data.evaluation_batches`.
    teacher: to measure agreement with; by default what the batches bring along of one (`taught`).
    task: what the labels mean, see `evaluation.tasks`; one class an example where left out.

  Returns:
    What the task measures; of `evaluation.tasks.classification` ``accuracy``, ``top5``, ``nll``
    (nats), ``ece`` (15 bins), ``brier``, and with a teacher ``agreement``, ``kl`` (nats, teacher to
    student) and ``accuracy_where_teacher_wrong``. Each is of shape ``[S]`` for a model of S seeds,
    else ``[]``. What could not be measured is absent: without labels there is what compares with
    the teacher alone. NaN says that the model's outputs are; what a task makes NaN of finite ones
    is absent, and a warning says so.

  Raises:
    TypeError: an argument is of another kind, or labels are not what the task takes.
    ValueError: variables do not fit their network, or labels lie beyond its classes.
    RuntimeError: another process could not evaluate its batches; says which, and why.
  """
  return _Pass(model, batches, teacher, _task(task)).finished()


def examine(
  model: Model | Teacher,
  batches: Batch | Batches,
  *,
  teacher: Teacher | None = None,
  task: Task | None = None,
) -> tuple[dict[str, np.ndarray], predictions.Answers | dict[str, np.ndarray]]:
  """What `evaluate` does, and in the same pass what was said of each example.

  Args:
    model: a model, or a teacher.
    batches: leaves ``[N, B, ...]``, or `jaxdistill.data.Batches`, from
      `jaxdistill.data.evaluation_batches`.
    teacher: to measure agreement with, as in `evaluate`.
    task: what the labels mean; one class an example where left out.

  Returns:
    ``(metrics, answers)``: the answers ``[S, N]`` are of the N examples that
    `evaluation.predictions.counted` picks, in their order; S is 1 for a model of one seed. Of a
    task that is not of one class an example, what it keeps of those that
    `evaluation.predictions.present` picks, ``{name: [S, N, ...]}``.
  """
  one = _Pass(model, batches, teacher, _task(task), examined=True)
  found = one()
  of_classes = one.task.shown.classes
  where = [(predictions.counted if of_classes else _present)(said.there) for said in found]
  parts = [x.answers if of_classes else {**x.each, **x.answers} for x in found]
  axis = int(_seeds(one.model) is not None)
  joined = _joined(parts, where, axis)
  joined = {name: values if axis else values[None] for name, values in joined.items()}
  return one.finished(found), predictions.Answers(**joined) if of_classes else joined


def taught(teacher: Teacher, batches: Split, *, task: Task | None = None) -> Split:
  """The batches with what a teacher says of them: it is asked once, for any number of students.

  Args:
    teacher: the teacher.
    batches: leaves ``[N, B, ...]``, or `jaxdistill.data.Batches`, from
      `jaxdistill.data.evaluation_batches`.
    task: which of its outputs are kept: those that the task reads, logits where left out.

  Returns:
    The same batches, whose ``teacher`` holds its outputs ``[N, B, ...]`` on the host.

  Raises:
    TypeError: an argument is of another kind.
    ValueError: the teacher's variables do not fit.
  """
  _check_batches(batches)
  _check_teacher(teacher)
  task = _task(task)
  count, at = count_of(batches), None if asked_on_host(teacher) else over(teacher)
  say, every = _saying(teacher, batches, task, at), at is not None
  each = batches_of(batches, share(count, every=every))
  told, heads = Rows(count), list[Any]()

  def one() -> list[Outputs]:
    said = say(next(each))
    if not heads:  # the first one's is everybody's
      heads.append(said.head)
    return [dataclasses.replace(said, head=None)]

  together = 1 if every else company()[1]
  for begin in range(0, count, together):  # a batch of each process at a time
    for i, said in enumerate(gathered(one, min(together, count - begin), every=every)):
      told.put(begin + i, said)
  head = jax.tree.map(lambda x: np.broadcast_to(x, (count, *np.shape(x))), heads[0])
  return dataclasses.replace(batches, teacher=dataclasses.replace(told.tree, head=head))


def _saying(
  teacher: Teacher, batches: Batch | Batches, task: Task, at: NamedSharding | None
) -> Callable[[Batch], Outputs]:
  """What gives a teacher's outputs of a batch, on the host; the head with the first alone."""
  if asked_on_host(teacher):

    def on_host(batch: Batch) -> Outputs:
      said = jax.device_get(teacher(batch))
      return dataclasses.replace(task.reads(said), where=said.where)

    return on_host
  first = first_of(batches)
  teacher = beside(settled(teacher), first) if at is None else everywhere(teacher, at)
  with _fitting(None):
    asked = _Teacher(task, teacher, first)
  ask, given = asked.compiled(count_of(batches)), list[bool]()

  def say(batch: Batch) -> Outputs:
    said = ask(teacher, placed(batch, teacher) if at is None else everywhere(batch, at))
    said = dataclasses.replace(said, where=None, head=None if given else said.head)
    given[:] = [True]
    return jax.device_get(said if at is None else whole(said, at))

  return say


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
  return _read(model, batch, tasks.classification()).logits


def _read(model: Model | Teacher, batch: Batch, task: Task) -> Outputs:
  """What a task reads of a model's outputs."""
  outputs = model(batch)
  if not isinstance(outputs, Outputs):
    raise TypeError(f"the model must put out Outputs, and gave {_check.show(outputs)}.")
  read = task.reads(outputs)
  if not jax.tree.leaves(read):
    raise tasks.TaskError(
      f"the model must put out logits [B, K], and has {sorted(outputs.features)} alone: of a "
      "network without logits the task says what it reads, evaluation.tasks.embedding('pooled')."
    )
  return read


@flax.struct.dataclass
class _Measured:
  """What is measured of a model on a batch: sums, the teacher's part of them, each example."""

  quality: Any
  fidelity: Any
  each: Any
  answers: Any
  # Of the teacher: what is kept of each example, and which examples it answered.
  beside: Any = None
  # On the host: the batch's weights and which of its labels are known.
  there: Any = None


@dataclasses.dataclass(frozen=True)
class _Asked:
  """The program of what a task reads of a model, or of a teacher, on a batch.

  Students that lie on several devices stay there: each device computes its own. (The compiler, left
  to share out what vmap makes of their convolutions, fails at those in groups.)
  """

  task: Task
  mesh: Mesh | None = None
  part: Literal["all", "head", "rest"] = "all"
  __name__ = "outputs"

  def __call__(self, model: Model | Teacher, batch: Batch) -> Outputs:
    """``[B, ...]``, or ``[S, B, ...]`` where the model has S seeds."""
    if isinstance(model, Teacher) or model.seeds is None:
      return self.of_one(model, batch)
    network = model.network

    def of_all(variables: Any, batch: Batch) -> Outputs:
      return jax.vmap(lambda mine: self.of_one(Model(network, mine), batch))(variables)

    if self.mesh is None:
      return of_all(model.variables, batch)
    over = PartitionSpec(self.mesh.axis_names[0])
    shared: Any = jax.shard_map(
      of_all, mesh=self.mesh, in_specs=(over, PartitionSpec()), out_specs=over, check_vma=False
    )
    return shared(model.variables, batch)

  def of_one(self, model: Model | Teacher, batch: Batch) -> Outputs:
    """Of one model."""
    read = _read(model, batch, self.task)
    if self.part != "all":
      rest = dataclasses.replace(read, head=None)
      read = Outputs(head=read.head) if self.part == "head" else rest
    # It answers all of them; made here, so that the mask lies where the outputs do.
    return dataclasses.replace(read, where=jnp.ones(batch.weight.shape[0], jnp.float32))


class _Teacher:
  """Asks a teacher what a task reads: of each batch, and once for its head, which no batch changes.

  A head is a kernel ``[D, V]``, which a program that gives it back would copy at each call.

  Attributes:
    program: of all that it says of a batch.
    outputs: its shapes.
  """

  def __init__(self, task: Task, teacher: Teacher, batch: Batch) -> None:
    """Traces it.

    Args:
      task: says what is read.
      teacher: the teacher, or its shapes.
      batch: one like those that it will be asked about.
    """
    self.program = kept(_Asked(task), teacher, batch)
    self._each, self._head = self.program, None
    self.outputs: Outputs = self.program.outputs
    if not jax.tree.leaves(self.outputs.head):
      return
    parts = [_Asked(task, part="rest"), _Asked(task, part="head")]

    def head(batch: Batch, teacher: Teacher) -> Any:
      return parts[1](teacher, batch).head

    if not any(depend_on(head, batch, teacher)):
      self._each, self._head = (kept(part, teacher, batch) for part in parts)

  def compiled(self, calls: float) -> Callable[[Teacher, Batch], Outputs]:
    """``(teacher, batch) -> outputs``, compiled for so many calls, for one teacher of these."""
    each, once = self._each.compiled(calls), self._head
    if once is None:
      return each
    made: list[Outputs] = []

    def ask(teacher: Teacher, batch: Batch) -> Outputs:
      if not made:
        made.append(once.compiled(1)(teacher, batch))
      said: Outputs = each(teacher, batch)
      return dataclasses.replace(said, head=made[0].head)

    return ask


@dataclasses.dataclass(frozen=True)
class _Measure:
  """The program of a batch; equal for models whose outputs come of the same function.

  No scan over the batches: XLA computes convolutions inside a loop many times slower on a CPU.
  """

  outputs: Callable[[Model | Teacher, Batch], Outputs]
  task: Task
  labels: bool
  examined: bool
  __name__ = "evaluation"  # the program's, where a log of the compiler names it

  def __call__(self, model: Model | Teacher, said: Outputs, batch: Batch) -> _Measured:
    """Measures a model beside the teacher's outputs ``[B, ...]``, where it gave any, ``[B]``."""
    task = self.task
    told = jnp.expand_dims(said.where, range(1, batch.weight.ndim))
    both = dataclasses.replace(batch, weight=batch.weight * told)

    def each_of(outputs: Outputs) -> Any:
      none = task.each is None or not self.labels
      return {} if none else tasks.asked(task, "each", outputs, batch)

    def measure(outputs: Outputs) -> _Measured:
      # Of classes three numbers an example, which cost less than a program without them.
      asked = self.labels and self.examined
      quality = tasks.pairs(task, "sums", outputs, batch) if task.sums and self.labels else {}
      fidelity = tasks.pairs(task, "compared", outputs, said, both) if task.compared else {}
      tasks.check_compared(task, quality, fidelity)
      return _Measured(
        quality=quality,
        fidelity=fidelity,
        each=each_of(outputs),
        answers=tasks.asked(task, "kept", outputs, batch) if asked else {},
      )

    found = (measure if _seeds(model) is None else jax.vmap(measure))(self.outputs(model, batch))
    return dataclasses.replace(found, beside=(each_of(said), said.where))


def _lookups(program: Kept, model: Any, batch: Batch) -> tuple[Lookup, ...]:
  """What the program of a model and a batch looks up of the batch's inputs."""
  if not of_integers(batch.inputs):
    return ()
  return in_jaxpr(program.jaxpr, len(jax.tree.leaves(model)), (batch,))


def _outputs(model: Model | Teacher, batch: Batch) -> Any:
  """What is timed: what the model is deployed for."""
  outputs = model(batch)
  return with_logits(outputs).named() if isinstance(outputs, Outputs) else outputs


def _seeds(model: Model | Teacher) -> int | None:
  return None if isinstance(model, Teacher) else model.seeds


def _said(outputs: Outputs, count: int, where: Any = None) -> Outputs:
  """A teacher's outputs ``[B, ...]``, with the mask ``[B]`` of the examples that it answered."""
  return dataclasses.replace(outputs, where=np.ones(count, np.float32) if where is None else where)


def _of_batch(model: Any, batch: Batch) -> Any:
  """The model; a teacher of another program as what it says of this batch."""
  return answered(model, batch) if isinstance(model, Teacher) else model


def _mesh_of(model: Any) -> Mesh | None:
  """The devices over which the students of a model are shared out; None where they are not."""
  leaves = [] if _seeds(model) is None else jax.tree.leaves(model.variables)
  found = {getattr(leaf, "sharding", None) for leaf in leaves}
  one = found.pop() if len(found) == 1 else None
  mesh = one.mesh if isinstance(one, NamedSharding) else None
  if one is None or not isinstance(mesh, Mesh) or mesh.size == 1 or len(mesh.axis_names) != 1:
    return None
  return mesh if tuple(one.spec)[:1] == mesh.axis_names else None


def _shares_of(model: Any) -> NamedSharding | None:
  """How batches are shared out over the devices on which one model lies; None for one device.

  Students of several seeds are left as they are: the compiler, left to share out what vmap makes of
  their convolutions, fails at those in groups.
  """
  mesh = mesh_of(model) if _seeds(model) is None else None
  if mesh is None or mesh.shape.get(AXIS, 1) == 1:
    return None
  return NamedSharding(mesh, PartitionSpec(batch_axes(mesh)))


def _task(task: Any) -> Task:
  if task is None:
    return tasks.classification()
  if not isinstance(task, Task):
    raise TypeError(
      f"task={_check.show(task)} must be an evaluation.tasks.Task, such as tasks.regression()."
    )
  return task


class _Pass:
  """A model, and a teacher, on the batches of a split: checked, and compiled at the first call."""

  def __init__(
    self,
    model: Any,
    batches: Batch | Batches,
    teacher: Any,
    task: Task,
    *,
    examined: bool = False,
  ) -> None:
    """Checks whether the arguments go together; they may be shapes."""
    _check_batches(batches)
    _check_model(model)
    if teacher is not None:
      _check_teacher(teacher)
    if isinstance(teacher, Teacher) and asked_on_host(teacher):
      batches, teacher = taught(teacher, batches, task=task), None
    if isinstance(model, Model):  # without what a run's state and history add to it
      model = Model(model.network, model.variables, model.seeds)
    first = first_of(batches)
    # The devices of several processes, of which each then takes part in every batch.
    self.over, self.examined = over((model, teacher)), examined
    both = model, teacher
    if self.over is None:
      self.model, self.teacher = beside(settled(both), first)
    else:
      self.model, self.teacher = everywhere(both, self.over)
    self.shares = _shares_of(self.model)
    self.task, self.compared = task, teacher is not None or batches.teacher is not None
    self.asked: _Teacher | None = None
    asks = _Asked(task, _mesh_of(self.model))
    with _fitting(_seeds(model)):
      model = _of_batch(model, first)
      outputs = kept(asks, model, self._shown(first))
    self.looked_up = [("the model", _lookups(outputs, model, self._shown(first)))]
    of_one = outputs.outputs
    if _seeds(model) is not None:
      of_one = jax.tree.map(lambda leaf: leaf.update(shape=leaf.shape[1:]), of_one)
    self.batches, self.of_one = batches, of_one
    if isinstance(batches, Batch):
      self.batches, self.labels = _with_labels(batches, of_one, task)
      first = first_of(self.batches)
    else:
      first, self.labels = _with_labels_of_one(first, of_one, task, batches.has_labels)
    with _fitting(_seeds(model)):
      # Where no teacher is, a mute one takes its place and what comes of it is not looked at: the
      # program is the same, and compiling another takes longer than its few sums ever will.
      mute = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), of_one)
      self.mute = self._beside_model(_said(mute, len(first.weight)))
      said: Any = self.mute
      if teacher is not None:
        self.asked = _Teacher(task, teacher, first)
        self.looked_up.append(("the teacher", _lookups(self.asked.program, teacher, first)))
        said = self.asked.outputs
      elif first.teacher is not None:
        said = _said(self.task.reads(first.teacher), len(first.weight), first.teacher.where)
      if said is not self.mute:
        task.check_beside(of_one, said)
      if isinstance(self.batches, Batch):
        self._check_inputs(self.batches, axes=2)
      self.first = self._shown(first)
      # Of classes what is said of each example costs little, and one program serves both.
      measures = _Measure(outputs.traced, task, self.labels, examined or task.shown.classes)
      self.program = kept(measures, model, said, self.first)

  def _check_inputs(self, batch: Batch, axes: int) -> None:
    """Raises where a network would look up what is not in its tables."""
    for who, looked in self.looked_up:
      check_values(looked, (batch,), name="batches", who=who, axes=axes)

  def _shown(self, batch: Batch) -> Batch:
    """What the model sees of a batch, on its devices: a network sees no teacher's outputs."""
    shown = dataclasses.replace(batch, teacher=None) if isinstance(self.model, Model) else batch
    # Each device has its rows of the batch, and their sums are added up by the program.
    at = self.shares
    if at is not None and len(batch.weight) % math.prod(at.mesh.shape.values()):
      at = None
    if self.over is not None:
      return everywhere(shown, at or self.over)
    if at is None:
      return placed(shown, self.model)
    return jax.tree.map(lambda leaf: jax.device_put(leaf, at), shown)

  def _beside_model(self, said: Outputs) -> Outputs:
    """A teacher's outputs, of the host, where the model lies."""
    beside_it: Outputs = (
      placed(settled((self.model, said))[1], self.model)
      if self.over is None
      else everywhere(said, self.over)
    )
    return beside_it

  def compile(self, calls: float) -> None:
    """Begins to compile in the background, for so many passes without a teacher."""
    count = count_of(self.batches)
    self.program.compiled(calls * count).compile(self.model, self.mute, self.first)

  def _each(self, numbers: Sequence[int]) -> Iterator[Batch]:
    """Batches by number; those that are streamed are checked when they come."""
    for batch in batches_of(self.batches, numbers):
      if isinstance(self.batches, Batches):
        batch, _ = _with_labels_of_one(batch, self.of_one, self.task, self.labels)
        self._check_inputs(batch, axes=1)
      yield batch

  def __call__(self, calls: float = 1) -> list[_Measured]:
    """Goes through the batches, once of so many times; waits for nothing but a stream's."""
    count, every = count_of(self.batches), self.over is not None
    numbers = share(count, every=every)
    return gathered(lambda: self._measured(numbers, calls * count), count, every=every)

  def _measured(self, numbers: Sequence[int], calls: float) -> list[_Measured]:
    """What is measured on these batches, by programs that are compiled for so many calls."""
    program = self.program.compiled(calls)
    ask = None if self.asked is None else self.asked.compiled(calls)
    found: list[_Measured] = []
    for batch in self._each(numbers):
      said = self.mute
      if ask is not None:
        if self.over is None:
          said = placed(ask(self.teacher, placed(batch, self.teacher)), self.model)
        else:
          said = ask(self.teacher, everywhere(batch, self.over))
      elif batch.teacher is not None:
        told = _said(self.task.reads(batch.teacher), len(batch.weight), batch.teacher.where)
        said = self._beside_model(told)
      made = program(_of_batch(self.model, batch), said, self._shown(batch))
      made = made if self.over is None else whole(made, self.over)
      if not self.examined:
        made = dataclasses.replace(made, answers={})
      found.append(dataclasses.replace(made, there=tasks.on_host(batch)))
      if isinstance(self.batches, Batches) and len(found) > 2:
        jax.block_until_ready(found[-3].quality)  # no more of a stream lies on the device
    return found

  def finished(self, found: list[_Measured] | None = None) -> dict[str, np.ndarray]:
    """The metrics of a pass; without a teacher none that compare with one."""
    found = self() if found is None else found
    # Added on the host, where nothing has to be compiled for it and float64 counts on.
    parts = [{"quality": one.quality, "fidelity": one.fidelity} for one in found]
    sums = jax.tree.map(np.float64, jax.device_get(parts))
    total = functools.reduce(functools.partial(jax.tree.map, np.add), sums)
    sums = {**total["quality"], **(total["fidelity"] if self.compared else {})}
    seeds = _seeds(self.model)
    there = [_present(one.there) for one in found]
    rows, theirs = _joined([one.each for one in found], there, axis=int(seeds is not None)), None
    if rows and self.compared:
      beside, told = zip(*(one.beside for one in found), strict=True)
      # Of examples that a teacher skipped nobody knows their neighbours.
      if all(np.all(where > 0) for where in jax.device_get(told)):
        theirs = _joined(beside, there, axis=0)
    if seeds is None:
      return self._known(tasks.finished(self.task, sums, rows, theirs))
    each = [jax.tree.map(lambda leaf, s=s: leaf[s], (sums, rows)) for s in range(seeds)]
    made = [tasks.finished(self.task, mine, kept_of_it, theirs) for mine, kept_of_it in each]
    # What some students lack, of all that were measured alike, is NaN: 0 / 0.
    names = list(dict.fromkeys(name for one in made for name in one))
    none = np.array(np.nan)
    return self._known({n: np.stack([one.get(n, none) for one in made]) for n in names})

  def _known(self, numbers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The numbers that were measured: NaN of finite outputs is none, and is said and left out."""
    unknown = [name for name, value in numbers.items() if np.isnan(value).all()]
    if not unknown or not self._finite():
      return numbers
    warnings.warn(
      f"the task {self.task.name!r} gives NaN for {', '.join(unknown)}, though the model's outputs "
      "are finite: these are left out, as what was not measured. Give no number, or a count of 0.",
      stacklevel=4,
    )
    return {name: value for name, value in numbers.items() if name not in unknown}

  def _finite(self) -> bool:
    """Whether all that the model says of the examples is finite, for which it is asked again."""
    ask = kept(_Asked(self.task, _mesh_of(self.model)), self.model, self.first).compiled(1)
    for batch in self._each(range(count_of(self.batches))):
      said = ask(_of_batch(self.model, batch), self._shown(batch))
      said = said if self.over is None else whole(said, self.over)
      there = _present(tasks.on_host(batch))
      axis = int(_seeds(self.model) is not None)
      leaves = jax.device_get(jax.tree.leaves(dataclasses.replace(said, where=None, head=None)))
      if not all(np.isfinite(np.compress(there, leaf, axis)).all() for leaf in leaves):
        return False
    return True


def _present(host: Batch) -> np.ndarray:
  """Which examples of a batch ``[B]`` are no padding."""
  present: np.ndarray = tasks.counted(host, np.zeros(len(host.weight)), labelled=False) > 0
  return present


def _joined(each: Sequence[Any], where: Sequence[np.ndarray], axis: int) -> dict[str, np.ndarray]:
  """What was kept of the examples of all batches, which lie on this axis: those of the masks."""
  if not each or not each[0]:
    return {}
  picked, parts = np.concatenate(where), jax.device_get(list(each))
  return {
    name: np.compress(picked, np.concatenate([part[name] for part in parts], axis), axis)
    for name in parts[0]
  }


@contextlib.contextmanager
def _fitting(seeds: int | None) -> Iterator[None]:
  """Says of a failure to trace that variables do not fit."""
  uneven = () if seeds is None else (ValueError,)  # vmap's, over leaves of different lengths
  try:
    yield
  except tasks.TaskError:  # the network ran, and what was asked of it did not
    raise
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


def _with_labels(batches: Batch, outputs: Outputs, task: Task) -> tuple[Batch, bool]:
  """The batches, checked, and whether what needs labels can be asked of them."""
  if predictions.counted(batches).any():
    if task.check is not None:
      task.check(batches, outputs)
    return batches, True
  # Whatever stands where labels would: it is not looked at.
  weight = np.shape(batches.weight)
  logits = tasks.of_shapes(outputs).logits
  one = jax.tree.leaves(outputs)[0] if logits is None else logits
  places = (weight[0], *one.shape[: max(1, one.ndim - 1)])
  none = np.zeros(places, np.int32), np.zeros(weight[:2], np.float32)
  batches = dataclasses.replace(batches, labels=none[0], labelled=none[1])
  try:
    if task.check is not None:
      task.check(batches, outputs)
  except TypeError:  # labels of another kind: what compares with a teacher is all there is
    return batches, False
  return batches, True


def _with_labels_of_one(
  batch: Batch, outputs: Outputs, task: Task, may: bool
) -> tuple[Batch, bool]:
  """`_with_labels` of one batch of a stream, of which some may have a label, or none has."""
  if may and not predictions.counted(batch).any():
    return batch, True
  found, labels = _with_labels(jax.tree.map(lambda leaf: leaf[None], batch), outputs, task)
  return jax.tree.map(lambda leaf: leaf[0], found), labels


def _check_batches(batches: Any) -> None:
  if isinstance(batches, Batches):
    return
  if isinstance(batches, Batch) and np.ndim(batches.weight) > 1 and not len(batches.weight):
    raise ValueError("batches hold no batch: give a split that has examples.")
  if not isinstance(batches, Batch) or np.ndim(batches.weight) < 2:
    raise TypeError(
      f"batches must be what data.evaluation_batches makes, leaves [N, B, ...], got "
      f"{_check.show(batches)}."
    )


def validator(batches: Batch | Batches, *, task: Task | None = None) -> Validator:
  """What a run measures on its way (`train.Watch`): compiled once, called often.

  Args:
    batches: the validation split, from `jaxdistill.data.evaluation_batches`.
    task: what the labels mean; one class an example where left out.

  Returns:
    ``model -> {name: number}`` of the task's metrics, see `Validator`: ``accuracy``, ``nll`` and
    ``ece`` of `evaluation.tasks.classification`.

  Raises:
    TypeError: ``batches`` are none.
    ValueError: no example of the split has a label.
  """
  return Validator(batches, task)


class Validator:
  """What `validator` makes: ``model -> {name: number}`` of its task's metrics.

  Attributes:
    task: what the labels mean.
  """

  def __init__(self, batches: Batch | Batches, task: Task | None = None) -> None:
    """Compiles nothing yet.

    Args:
      batches: the validation split.
      task: what the labels mean; one class an example where left out.
    """
    _check_batches(batches)
    self.task = _task(task)
    if not self.task.unlabelled and not predictions.labelled(batches):
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
    _Pass(model, self._batches, None, self.task).compile(self._calls)

  def __call__(self, model: Model) -> dict[str, np.ndarray]:
    """The metrics of a model; ``[S]`` each for one of S seeds."""
    one = _Pass(model, self._batches, None, self.task)
    numbers = one.finished(one(self._calls))
    return {name: numbers[name] for name in self.task.metrics if name in numbers}


def costs(
  model: Model | Teacher, batches: Batch | Batches, *, seconds: float = 1.0
) -> dict[str, Any]:
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
  batch = jax.device_get(first_of(dataclasses.replace(batches, teacher=None)))
  one = jax.tree.map(lambda leaf: leaf[:1], batch)
  size = len(batch.weight)
  if isinstance(model, Teacher) and asked_on_host(model):
    times = cost.timed(lambda: model(one), seconds=seconds)
    each = cost.timed(lambda: model(batch), seconds=seconds)["median"] / 1000
    return {"latency_ms": times, "throughput": size / each, "throughput_batch": size}
  # One program for each of the two sizes, whatever is asked of it; nothing is timed before both
  # are compiled, beside one another.
  programs = [kept(_outputs, model, given).plain() for given in (one, batch)]
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
