"""What labels mean, and so what evaluation measures: classes, tags, numbers, pixels, tokens.

A `Task` is a small value: pure functions from a batch to sums, which are added over batches,
devices and hosts and divided once at the end, and the metrics that come of it, each with the
direction in which it gets better. `evaluate`, `validator`, the best checkpoint and a sweep's choice
go by it. The library's own are written as a user would write his:

  def sums(outputs, batch):
    error = jnp.abs(outputs.logits[..., 0] - batch.labels)
    return {"mae": tasks.mean(error, tasks.counted(batch, error))}

  mine = tasks.Task("mine", {"mae": tasks.Metric("lower")}, sums)

What no sum can tell (a ranking of all examples, neighbours) goes by `Task.each` and `Task.of_all`:
what is kept of each example, and a function of all of them on the host.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import _check
from jaxdistill._chunks import Chunks
from jaxdistill.evaluation import metrics as _metrics
from jaxdistill.evaluation import ranking
from jaxdistill.types import Batch, Outputs, with_logits

__all__ = [
  "RESERVED",
  "Metric",
  "Shows",
  "Task",
  "TaskError",
  "asked",
  "check_compared",
  "classification",
  "counted",
  "dense",
  "embedding",
  "finished",
  "mean",
  "multilabel",
  "of_shapes",
  "on_host",
  "pairs",
  "ratios",
  "regression",
  "retrieval",
  "tokens",
]

# ``{name: (sum, count)}``.
Sums = Mapping[str, Any]

Given = ParamSpec("Given")


_TAKES = {
  "sums": "(outputs, batch) -> {name: (sum, count)}",
  "compared": "(student, teacher, batch) -> {name: (sum, count)}",
  "each": "(outputs, batch) -> {name: [B, ...]}",
  "keeps": "(outputs, batch) -> {name: [B, ...]}",
  "of_all": "(kept, the teacher's or None) -> {name: number}",
}


# What a report says of a model beside its metrics.
RESERVED = {"description", "instances", "per_seed", "parameters", "bytes", "flops", "xla_flops"}
RESERVED |= {"latency_ms", "throughput", "throughput_batch"}


class TaskError(ValueError):
  """A task's function does not take what the network and the data give, or gives what is none."""


def pairs(task: Task, field: str, *given: Any) -> Sums:
  """What a task's ``sums`` or ``compared`` gives, traced, in words of the task where it fails.

  Raises:
    TaskError: it fails, or gives something else than ``{name: (sum, count)}``.
  """
  found = asked(task, field, *given)
  whole = isinstance(found, Mapping)
  if whole and task.finish is ratios:  # a finish of one's own takes what sums of its own are
    kinds = [(type(pair) is tuple and len(pair) == 2, pair) for pair in found.values()]
    whole = all(two and not any(map(np.ndim, pair)) for two, pair in kinds)
  if not whole:
    shown = _check.shapes(found) if isinstance(found, Mapping) else _check.show(found)
    raise TaskError(
      f"{field} of the task {task.name!r} gives {shown}; it must give {{name: (sum, count)}}, two "
      "numbers each: tasks.mean(values, tasks.counted(batch, values))."
    )
  return found


def asked(task: Task, field: str, *given: Any) -> Any:
  """What one of a task's functions gives, traced, in words of the task where it fails.

  Raises:
    TaskError: it fails.
  """
  try:
    return getattr(task, field)(*given)
  except Exception as error:
    *networks, batch = given
    seen = [
      {name: value.shape for name, value in there.items() if value is not None}
      for there in ({"logits": one.logits, **one.features} for one in networks)
    ]
    shown = ", of the teacher ".join(map(str, seen))
    raise TaskError(
      f"{field} of the task {task.name!r} fails on outputs {shown} and labels "
      f"{np.shape(batch.labels)} of a batch: {_check.short(error)}"
    ) from error


def finished(task: Task, sums: Sums, kept: Any, theirs: Any) -> dict[str, np.ndarray]:
  """What a task makes of a pass, on the host, in words of the task where that fails.

  Args:
    task: the task.
    sums: of all examples, in float64; none where nothing was added up.
    kept: what ``each`` gave of all examples; none where nothing was kept.
    theirs: that of the teacher, or None.

  Raises:
    TaskError: ``finish`` or ``of_all`` fails, gives something else than ``{name: number}``, or both
      give a number of one name.
  """
  found: dict[str, np.ndarray] = {}
  for field, given in (("finish", (sums,)), ("of_all", (kept, theirs))):
    function = getattr(task, field)
    if function is None or not given[0]:
      continue
    try:
      made = {n: np.asarray(value, np.float64) for n, value in dict(function(*given)).items()}
    except Exception as error:
      raise TaskError(
        f"{field} of the task {task.name!r} fails on {sorted(given[0])}, or gives no {{name: "
        f"number}}: {_check.short(error)}"
      ) from error
    _check_apart(task, found, made, field)
    found |= made
  return found


def _check_apart(task: Task, one: Mapping[str, Any], other: Mapping[str, Any], field: str) -> None:
  """Raises where two of a task's functions give something of one name: one would be lost."""
  twice = sorted(set(one) & set(other))
  if twice:
    raise TaskError(
      f"{field} of the task {task.name!r} gives {twice}, which is given already: rename one."
    )


def check_compared(task: Task, quality: Sums, fidelity: Sums) -> None:
  """Raises where what is measured alone and beside a teacher has one name.

  Raises:
    TaskError: a name is in both.
  """
  _check_apart(task, quality, fidelity, "compared")


@dataclasses.dataclass(frozen=True)
class Metric:
  """How a metric is read.

  Attributes:
    better: ``"higher"`` or ``"lower"``.
    percent: whether it is a share, which is shown in percent.
    title: what it is called where it is shown; its name where left out.
    of_examples: whether it is a share of examples, each right or wrong: the error of a single run
      is then binomial.
  """

  better: Literal["higher", "lower"]
  percent: bool = False
  title: str = ""
  of_examples: bool = False

  def __post_init__(self) -> None:
    if self.better not in ("higher", "lower"):
      raise ValueError(f"better={self.better!r} must be 'higher' or 'lower'.")

  @property
  def sign(self) -> int:
    """1 where higher is better, else −1."""
    return 1 if self.better == "higher" else -1


def _once(make: Callable[Given, Task]) -> Callable[Given, Task]:
  """A task of the same arguments is the same one, and its programs are compiled once.

  What cannot be hashed goes to the function, whose checks say what it must be.
  """
  kept: Any = functools.cache(make)

  @functools.wraps(make)
  def made(*args: Given.args, **named: Given.kwargs) -> Task:
    try:
      hash((args, *named.values()))
    except TypeError:
      return make(*args, **named)
    task: Task = kept(*args, **named)
    return task

  return made


def _wholes(name: str, value: Any, least: int = 1) -> tuple[int, ...]:
  """Whole numbers, of any sequence."""
  if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray) or not np.ndim(value):
    raise TypeError(f"{name}={_check.show(value)} must be a sequence of whole numbers, as (1, 5).")
  return tuple(_check.whole(name, one, least=least) for one in value)


def _logits_alone(outputs: Outputs) -> Outputs:
  """What most tasks read."""
  return Outputs(logits=with_logits(outputs).logits)


def ratios(sums: Sums) -> dict[str, Any]:
  """Each sum over its count; what counted nothing was not measured, and is absent.

  Args:
    sums: ``{name: (sum, count)}``, on the host.

  >>> ratios({"mae": (6.0, 4.0), "rmse": (0.0, 0.0)})
  {'mae': 1.5}
  """
  return {name: total / count for name, (total, count) in sums.items() if count > 0}


# What was kept of all examples, ``{name: [N, ...]}``, on the host.
Kept = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Shows:
  """What a report shows of a model beside its metrics: functions of what was kept, on the host.

  Each is of one instance of a model and takes what `Task.each` and `Task.keeps` gave of all
  examples, ``{name: [N, ...]}``; what is left out is not shown. Names are of metrics: of the task's
  `metrics`, or its `others`, which say how they are read.

  Attributes:
    classes: whether what is kept are answers of one class an example (`metrics.answers`): shown
      are then classes, confusions, calibration, examples that were lost and gained, and two runs
      are held against each other by McNemar's test. The others are not asked.
    values: ``kept -> {name: [N]}``: of each example, NaN where it has none. Paired tests and slices
      are made of them; by the first a gain is judged.
    parts: ``kept -> {name: {row: number}}``: a metric apart, by class, label, target or position.
      A row is a text, or a class's number.
    points: ``kept -> {target: (labels [M], outputs [M])}``, which are drawn against each other.
    tells: ``(kept, i) -> (label, said)`` of an example to look at: each a text, a class's number, a
      tuple of such, or a picture ``[H, W]`` of classes (below 0 is none).
  """

  classes: bool = False
  values: Callable[[Kept], Mapping[str, Any]] | None = None
  parts: Callable[[Kept], Mapping[str, Mapping[Any, float]]] | None = None
  points: Callable[[Kept], Mapping[str, tuple[Any, Any]]] | None = None
  tells: Callable[[Kept, int], tuple[Any, Any]] | None = None

  @property
  def forms(self) -> list[str]:
    """The names of those that are there."""
    return [one.name for one in dataclasses.fields(self) if getattr(self, one.name)]


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
  """What labels mean, as pure functions.

  Attributes:
    name: for messages and reports.
    metrics: those by which something may be chosen, each as it is read; the first is what is
      chosen by where nobody says. Others may be measured beside them.
    sums: ``(outputs, batch) -> {name: (sum, count)}``, traced: leaves ``[B, ...]`` come in, and
      what they add up to goes out, in float32. `counted` says what counts, `mean` makes the pair.
    compared: ``(student, teacher, batch) -> {name: (sum, count)}``, likewise, beside a teacher;
      None where nothing is compared.
    finish: ``sums -> {name: number}`` on the host, of sums over all examples, in float64.
    reads: ``outputs -> outputs``: what of them the task looks at. The logits by default; a feature
      for a network that puts out none.
    each: ``(outputs, batch) -> {name: [B, ...]}``: what is kept of every example, traced.
    of_all: ``(kept, the teacher's or None) -> {name: number}``: of all examples, ``[N, ...]`` on
      the host, those of weight 0 left out. What ``each`` gives goes in.
    check: ``(batches, outputs)``: raises where labels and outputs do not fit, before anything is
      computed; outputs are shapes.
    fits: ``(student, teacher)``: raises where what they put out cannot be compared, before anything
      is computed; both are shapes. Left out, classes must be the same ones in the same places.
    classes: whether logits ``[B, ..., K]`` are of classes and labels ``[B, ...]`` one of them each:
      what is asked of probabilities and of chance (`search.preflight`) is asked then.
    unlabelled: whether ``metrics`` are measured of examples without a label too: a split that has
      none may then be chosen by.
    others: how those are read by which nothing is chosen. What is in neither was measured all the
      same, and is shown without a direction.
    fidelity: how those are read that compare with a teacher.
    keeps: ``(outputs, batch) -> {name: [B, ...]}``, traced: what a report keeps of every example
      beside what ``each`` gives, asked by `evaluation.examine` alone.
    leads: metrics, also of those that compare with a teacher, with which a report's table begins;
      the rest follows as it was measured.
    shows: what a report makes of what is kept. Where both are left out and ``finish`` is `ratios`,
      the metrics are means, and a report has them of each example: ``sums`` of it alone.
  """

  name: str
  metrics: Mapping[str, Metric]
  sums: Callable[[Outputs, Batch], Sums] | None = None
  compared: Callable[[Outputs, Outputs, Batch], Sums] | None = None
  finish: Callable[[Sums], Mapping[str, Any]] = ratios
  reads: Callable[[Outputs], Outputs] = _logits_alone
  each: Callable[[Outputs, Batch], Mapping[str, Any]] | None = None
  of_all: Callable[[Mapping[str, Any], Mapping[str, Any] | None], Mapping[str, Any]] | None = None
  check: Callable[[Batch, Outputs], None] | None = None
  classes: bool = False
  unlabelled: bool = False
  others: Mapping[str, Metric] = dataclasses.field(default_factory=dict)
  fidelity: Mapping[str, Metric] = dataclasses.field(default_factory=dict)
  keeps: Callable[[Outputs, Batch], Mapping[str, Any]] | None = None
  shows: Shows | None = None
  leads: tuple[str, ...] = ()
  fits: Callable[[Outputs, Outputs], None] | None = None

  def __post_init__(self) -> None:
    if not isinstance(self.name, str) or not self.name:
      raise TypeError(f"name={_check.show(self.name)} must be a text.")
    for field, count in (("sums", 2), ("compared", 3), ("each", 2), ("keeps", 2), ("of_all", 2)):
      value = getattr(self, field)
      if value is not None:
        _check.function(f"{field} of the task {self.name!r}", value, _TAKES[field], arguments=count)
    if self.sums is None and self.each is None:
      raise ValueError(f"task {self.name!r} measures nothing: give it sums, or each and of_all.")
    if (self.each is None) != (self.of_all is None):
      raise ValueError(f"task {self.name!r} needs each and of_all together, or neither.")
    if not self.metrics or not all(isinstance(one, Metric) for one in self.metrics.values()):
      raise ValueError(
        f"task {self.name!r} needs metrics={{name: Metric('higher')}}, at least one."
      )
    for name in (*self.metrics, *self.others, *self.fidelity):
      if not isinstance(name, str) or name in RESERVED:
        raise ValueError(
          f"task {self.name!r} has the metric {name!r}, which must be a text, and none of what a "
          f"report says beside metrics, {sorted(RESERVED)}: rename it."
        )

  @property
  def first(self) -> str:
    """What is chosen by where nobody says."""
    return next(iter(self.metrics))

  def metric(self, name: str) -> Metric:
    """How a metric is read.

    Raises:
      ValueError: the task has none of this name.
    """
    if name not in self.metrics:
      raise ValueError(
        f"metric={name!r} is not among {sorted(self.metrics)}, those of the task {self.name!r}."
      )
    return self.metrics[name]

  def check_beside(self, student: Outputs, teacher: Outputs) -> None:
    """Raises where a teacher puts out what cannot be compared with what a student does.

    Shapes that do not fit are otherwise JAX's to tell, or are broadcast and measured.

    Args:
      student: its outputs' shapes, as `reads` leaves them.
      teacher: the teacher's.

    Raises:
      ValueError: they do not fit; names both shapes.
    """
    fits = self.fits or (_same_logits if self.classes else None)
    if fits is not None:
      fits(*(of_shapes(dataclasses.replace(one, where=None)) for one in (student, teacher)))

  @property
  def _of_means(self) -> bool:
    """Whether each metric is a mean of what `sums` says of an example alone."""
    nobody_said = self.keeps is None and self.shows is None
    return nobody_said and self.sums is not None and self.finish is ratios

  def kept(self, outputs: Outputs, batch: Batch) -> Mapping[str, Any]:
    """What a report keeps of every example beside `each`, ``{name: [B, ...]}``; traced."""
    if self.keeps is not None:
      return self.keeps(outputs, batch)
    return _alone(self.sums, outputs, batch) if self.sums and self._of_means else {}

  @property
  def shown(self) -> Shows:
    """What a report makes of what is kept."""
    return self.shows or (Shows(values=_means) if self._of_means else Shows())


def _alone(sums: Callable[[Outputs, Batch], Sums], outputs: Outputs, batch: Batch) -> Any:
  """The sums of each example, as if it were a batch of its own."""

  def of_one(outputs: Outputs, batch: Batch) -> Any:
    return sums(*jax.tree.map(lambda leaf: leaf[None], (outputs, batch)))

  outputs = dataclasses.replace(outputs, where=None)
  batch = dataclasses.replace(batch, teacher=None)
  return {
    f"{part}/{name}": pair[i]
    for name, pair in jax.vmap(of_one)(outputs, batch).items()
    for i, part in enumerate(("sum", "count"))
  }


def _means(kept: Kept) -> dict[str, np.ndarray]:
  """What `_alone` kept, as means."""
  names = [name.removeprefix("sum/") for name in kept if name.startswith("sum/")]
  return {name: _quotient(kept[f"sum/{name}"], kept[f"count/{name}"]) for name in names}


def _quotient(total: Any, count: Any) -> np.ndarray:
  """NaN where nothing counts: there the mean is unknown."""
  total, count = (np.asarray(x, np.float64) for x in (total, count))
  return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)


def counted(batch: Batch, values: Any, *, labelled: bool = True) -> Any:
  """How much each value counts: the batch's weights, of the shape of the values.

  Of weights that are NumPy's it is NumPy's, and stays on the host.

  Args:
    batch: leaves ``[B, ...]``; its weights and masks may have any of the values' leading axes. A
      value of a whole example counts as much as that of its positions which counts most.
    values: ``[B, ...]``.
    labelled: whether only what has a label counts.

  >>> labelled = jnp.array([[1.0, 0.0], [1.0, 1.0]])
  >>> batch = Batch(None, None, jnp.array([1.0, 0.0]), labelled, None, None)
  >>> counted(batch, jnp.ones((2, 2))).tolist(), counted(batch, jnp.ones(2)).tolist()
  ([[1.0, 0.0], [0.0, 0.0]], [1.0, 0.0])
  """
  xp: Any = np if isinstance(batch.weight, np.ndarray) else jnp
  made = xp.ones(values.shape, np.float32)
  for mask in (batch.weight, batch.labelled) if labelled else (batch.weight,):
    mask = xp.asarray(mask, np.float32)
    if mask.ndim > values.ndim:
      mask = xp.max(mask, axis=tuple(range(values.ndim, mask.ndim)))
    made = made * xp.expand_dims(mask, tuple(range(mask.ndim, values.ndim)))
  return made


def on_host(batch: Batch) -> Batch:
  """The weights and masks of a batch as NumPy's arrays; nothing else of it."""
  return Batch(None, None, np.asarray(batch.weight), np.asarray(batch.labelled), None, None)


def mean(values: Any, where: Any) -> tuple[jax.Array, jax.Array]:
  """A mean as a pair of sums; a value that does not count may be anything, NaN included.

  Args:
    values: ``[B, ...]``.
    where: how much each counts, of the same shape.

  Returns:
    ``(sum, count)``, float32 scalars.
  """
  values = jnp.where(where > 0, values.astype(jnp.float32), 0)
  return jnp.sum(where * values), jnp.sum(where)


def _same_logits(student: Outputs, teacher: Outputs) -> None:
  """Raises where logits are of other places than the teacher's, or of other classes or targets."""
  ours, theirs = student.logits, teacher.logits
  if ours is None or theirs is None or ours.shape == theirs.shape:
    return
  both = f"{list(ours.shape)} and the teacher {list(theirs.shape)}"
  if ours.shape[:-1] != theirs.shape[:-1]:
    raise ValueError(
      f"the model puts out logits {both}, which answer other places: compare it with a teacher "
      "that answers the same examples, tokens, pixels or positions, or leave the teacher out."
    )
  count = ours.shape[-1]
  raise ValueError(
    f"the model puts out {count} classes and the teacher {theirs.shape[-1]} (logits {both}): "
    "compare it with what both know, teachers.subset or teachers.grouped; or, of one tokenizer's "
    f"tokens, with teachers.vocabulary(teacher, {count})."
  )


def _same_places(name: str, ours: Any, theirs: Any) -> None:
  """Raises where a teacher's vectors, of any width, are of other places than a student's."""
  if ours.shape[:-1] != theirs.shape[:-1]:
    raise ValueError(
      f"the model's {name} are {list(ours.shape)} and the teacher's {list(theirs.shape)}: to be "
      "compared, both need one vector [B, D] an example, or [B, L, D] of the same positions; D may "
      "differ. Name a feature of both that is one, or leave the teacher out."
    )


# Classes.


def _check_classes(shape: str, batches: Batch, outputs: Outputs) -> None:
  """Raises for labels that are no classes of the logits, which would count as errors."""
  labels, logits = np.asarray(batches.labels), outputs.logits
  if logits.ndim not in [one.count(",") + 1 for one in shape.split(" or ")]:
    raise TypeError(
      f"the network's logits are {list(logits.shape)}, and the labels of this task {shape}: take "
      "evaluation.tasks.classification() for one class an example, tokens() for one a token, "
      "dense() for one a pixel."
    )
  axes = labels.shape[1:]  # the batches' own axis in front
  if not np.issubdtype(labels.dtype, np.integer) or axes != logits.shape[:-1]:
    raise TypeError(
      f"the batches' labels must be whole numbers {[len(labels), *logits.shape[:-1]]} ({shape}), a "
      f"class for each place of the logits, got {_check.show(labels)}: of others there is no "
      "accuracy. Agreement with a teacher needs none (say by labelled=0 throughout that there are "
      "none); other tasks are evaluation.tasks.regression(), multilabel(), dense(), tokens()."
    )
  found, classes = labels[counted(on_host(batches), labels) > 0], logits.shape[-1]
  least, largest = found.min(initial=0), found.max(initial=0)
  if least < 0 or largest >= classes:
    raise ValueError(
      f"the batches have the label {least if least < 0 else largest} and the network puts out "
      f"{classes} classes, from 0 on: evaluate on a split of its own classes, and say by "
      "labelled=0 which examples have no label."
    )


def _of_classes(outputs: Outputs, batch: Batch) -> Sums:
  logits, labels, where, known = _flat(outputs.logits, batch)
  return _metrics.classification_sums(logits, labels, where * known)


def _each_place(logits: Any, labels: Any) -> dict[str, jax.Array]:
  """Of each example, token or pixel what its label cost, and whether it was said; NaN never is."""
  logits = logits.astype(jnp.float32)
  nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
  right = (jnp.argmax(logits, axis=-1) == labels) & ~jnp.isnan(logits).any(axis=-1)
  return {"nll": nll, "accuracy": right.astype(jnp.float32)}


def _fidelity(student: Outputs, teacher: Outputs, batch: Batch) -> Sums:
  logits, *rest = _flat(student.logits, batch)
  return _metrics.fidelity_sums(logits, teacher.logits.reshape(logits.shape), *rest)


def _flat(logits: Any, batch: Batch) -> tuple[Any, Any, Any, Any]:
  """Examples, tokens or pixels side by side, ``[N, K]``; labels, weights, which are known."""
  places = logits[..., 0]
  where = counted(batch, places, labelled=False)
  known = counted(dataclasses.replace(batch, weight=batch.labelled), places, labelled=False)
  labels = jnp.asarray(batch.labels)
  flat = logits.reshape(-1, logits.shape[-1])
  return flat, labels.reshape(-1), where.reshape(-1), known.reshape(-1)


_CLASSES = {
  "accuracy": Metric("higher", percent=True, of_examples=True),
  "nll": Metric("lower", title="negative log-likelihood"),
  "ece": Metric("lower", percent=True, title="calibration error"),
}
_OTHERS = {
  "top5": Metric("higher", percent=True, title="top-5"),
  "brier": Metric("lower", title="Brier score"),
}
_FIDELITY = {
  "agreement": Metric("higher", percent=True, title="agrees with teacher"),
  "kl": Metric("lower", title="KL to the teacher, nats"),
  "accuracy_where_teacher_wrong": Metric(
    "higher", percent=True, title="accuracy where the teacher is wrong"
  ),
}


@_once
def classification() -> Task:
  """One class an example: logits ``[B, K]``, labels ``[B]``.

  Measured are ``accuracy``, ``top5``, ``nll`` (nats), ``ece`` (15 bins) and ``brier``; beside a
  teacher ``agreement``, ``kl`` (nats, teacher to student) and ``accuracy_where_teacher_wrong``. See
  `evaluation.metrics`.
  """

  def keeps(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
    return _metrics.answers(outputs.logits, jnp.asarray(batch.labels))

  return Task(
    "classification",
    _CLASSES,
    _of_classes,
    _fidelity,
    finish=_metrics.finish,
    check=functools.partial(_check_classes, "[N, B]"),
    classes=True,
    others=_OTHERS,
    fidelity=_FIDELITY,
    keeps=keeps,
    shows=Shows(classes=True),
  )


def tokens(
  *,
  token_bytes: Sequence[int] | np.ndarray | None = None,
  top_mass: Sequence[int] = (1, 8, 64),
  by_position: int = 0,
  tokens_at_once: int = 1024,
) -> Task:
  """One class a token: logits ``[B, L, K]``, labels and weights ``[B, L]``.

  What `classification` measures, over all tokens that count, and ``perplexity``, exp of the nll.
  Beside a teacher also ``reverse_kl`` (nats, student to teacher), ``acceptance`` (Σ_k of
  min(p_k, q_k), how often speculative decoding keeps what the student drafts), and
  ``top_mass_<k>``, how probable the student's k first classes are to the teacher.

  Of a network that puts out ``hidden`` and ``head`` the logits are made of some positions at a
  time, and never of all tokens.

  Args:
    token_bytes: ``[K]``, how many bytes of text each token is, 0 for special ones. With it
      ``bits_per_byte`` is measured, and chosen by: Σ nll / (log 2 · Σ bytes), which compares
      networks of different tokenizers.
    top_mass: the k's; those above K are left out.
    by_position: into how many parts of a window, from its first position to its last, some metrics
      are split beside: ``nll_by_position``, ``accuracy_by_position``, ``kl_by_position`` and
      ``acceptance_by_position``, arrays of that length. It shows a network that is asked for more
      positions than it was trained for. 0 for none.
    tokens_at_once: how many tokens' logits there are at any time, see `jaxdistill.train.in_chunks`.

  Raises:
    TypeError, ValueError: an argument is no number, or out of range.
  """
  for name, value, least in (
    ("by_position", by_position, 0),
    ("tokens_at_once", tokens_at_once, 1),
  ):
    _check.whole(name, value, least=least)
  lengths = None
  if token_bytes is not None:
    lengths = _wholes("token_bytes", token_bytes, least=0)
  return _tokens(_Tokens(lengths, _wholes("top_mass", top_mass), by_position, tokens_at_once))


@_once
def _tokens(measured: _Tokens) -> Task:
  known = {"nll": _CLASSES["nll"], "perplexity": Metric("lower"), **_CLASSES}
  if measured.token_bytes is not None:
    known = {"bits_per_byte": Metric("lower", title="bits a byte"), **known}
  # Its tokens are no independent draws.
  known["accuracy"] = dataclasses.replace(known["accuracy"], of_examples=False)
  beside = {
    "reverse_kl": Metric("lower", title="reverse KL"),
    "acceptance": Metric("higher", percent=True, title="acceptance of drafts"),
  }
  for k in measured.top_mass:
    beside[f"top_mass_{k}"] = Metric("higher", percent=True, title=f"teacher's mass in top {k}")
  return Task(
    "tokens",
    known,
    measured.sums,
    measured.compared,
    finish=measured.finish,
    reads=_tokens_read,
    check=measured.check,
    classes=True,
    others=_OTHERS | {"position_nll": Metric("lower", title="negative log-likelihood by position")},
    fidelity=_FIDELITY | beside,
    keeps=measured.keeps,
    shows=Shows(values=_of_sequences, parts=_by_position),
    leads=("bits_per_byte", "perplexity", "agreement", "acceptance"),
  )


def _tokens_read(outputs: Outputs) -> Outputs:
  """Logits, or what they are made of."""
  if outputs.logits is not None or outputs.head is None:
    return Outputs(logits=outputs.logits)
  return Outputs(hidden=outputs.hidden, head=outputs.head)


def of_shapes(outputs: Outputs) -> Outputs:
  """The shapes of outputs, with those of logits that are not made yet.

  >>> of_shapes(Outputs(logits=jnp.ones((2, 3)))).logits.shape
  (2, 3)
  """
  made: Outputs = jax.eval_shape(with_logits, outputs)
  return made


@dataclasses.dataclass(frozen=True)
class _Tokens:
  """What is measured of tokens; arguments as `tokens` takes them."""

  token_bytes: tuple[int, ...] | None
  top_mass: tuple[int, ...]
  by_position: int
  at_once: int

  def check(self, batches: Batch, outputs: Outputs) -> None:
    """Raises for labels that are no tokens of the logits, or have no number of bytes."""
    shapes = of_shapes(outputs)
    _check_classes("[N, B, L]", batches, shapes)
    if self.token_bytes is None:
      return
    labels, told = np.asarray(batches.labels), len(self.token_bytes)
    largest = labels[counted(on_host(batches), labels) > 0].max(initial=0)
    # Columns that only pad the logits stand for no token; the other way round there is no such.
    if told <= largest or told > shapes.logits.shape[-1]:
      raise ValueError(
        f"token_bytes tells {told} tokens, the network puts out {shapes.logits.shape[-1]} and a "
        f"label is {largest}: give the bytes of the tokenizer that made the labels, "
        "tokenizer.bytes."
      )

  def sums(self, outputs: Outputs, batch: Batch) -> Sums:
    """Of a batch."""
    return self._over(self._of_labels, batch, outputs)

  def compared(self, student: Outputs, teacher: Outputs, batch: Batch) -> Sums:
    """Of a batch, beside a teacher."""
    return self._over(self._beside, batch, student, teacher)

  def finish(self, sums: Sums) -> dict[str, Any]:
    """What the sums come to."""
    found = dict(_metrics.finish(sums))
    if "nll" in found:
      found["perplexity"] = np.exp(found["nll"])
    if np.any(sums.get("bytes", 0)):
      found["bits_per_byte"] = sums["nll"] / (np.log(2) * sums["bytes"])
    for name, total in sums.items():
      kind, _, measured = name.partition(":")
      counts = sums.get("fidelity_examples" if kind == "beside" else f"{kind}:counted")
      if measured and measured != "counted" and np.any(counts):
        with np.errstate(divide="ignore", invalid="ignore"):  # a part of no token: NaN
          found[measured] = total / counts
    return found

  def _chunks(self, batch: Batch, *outputs: Outputs) -> tuple[Chunks, Callable[[Any], Any]]:
    """Chunks of positions, and ``i -> (batch, parts of the window, *outputs)`` of one."""
    shape = jax.tree.leaves((outputs[0].logits, outputs[0].hidden))[0].shape[:2]
    whole = all(one.logits is not None for one in outputs)
    most = math.prod(shape) if whole else max(self.at_once, shape[0])
    chunks = Chunks.of(shape, tokens=most)
    weight = counted(batch, jnp.zeros(shape), labelled=False)
    batch = dataclasses.replace(batch, weight=weight, teacher=None)
    seen = [(one.logits, one.hidden) for one in outputs]

    def of_chunk(i: Any) -> Any:
      own, cut = chunks.cut((batch, seen), i)
      own = dataclasses.replace(own, weight=own.weight * chunks.fresh(i)[None])
      made = [
        with_logits(dataclasses.replace(one, logits=logits, hidden=hidden))
        for one, (logits, hidden) in zip(outputs, cut, strict=True)
      ]
      places = chunks.start(i) + jnp.arange(chunks.size)
      parts = jnp.broadcast_to(places * self.by_position // chunks.length, own.weight.shape)
      return own, parts.reshape(-1), *made

    return chunks, of_chunk

  def _over(self, function: Callable[..., Sums], batch: Batch, *outputs: Outputs) -> Sums:
    """Adds up ``(batch, parts of the window, *outputs) -> sums`` over chunks of positions."""
    chunks, of_chunk = self._chunks(batch, *outputs)
    if chunks.count == 1:
      return function(*of_chunk(0))

    def body(total: Any, i: Any) -> tuple[Any, None]:
      return jax.tree.map(jnp.add, total, function(*of_chunk(i))), None

    shapes = jax.eval_shape(lambda: function(*of_chunk(0)))
    zeros = jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), shapes)
    total: Sums = jax.lax.scan(body, zeros, jnp.arange(chunks.count))[0]
    return total

  def keeps(self, outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
    """Of each token what it cost, whether it was right, and how much it counts, ``[B, L]``."""
    chunks, of_chunk = self._chunks(batch, outputs)

    def body(total: Any, i: Any) -> tuple[Any, None]:
      own, _, made = of_chunk(i)
      fresh = chunks.fresh(i)[None]
      each = {n: jnp.where(fresh, x, 0) for n, x in _of_tokens(made, own).items()}
      return {n: chunks.add(total[n], x, i) for n, x in each.items()}, None

    zeros = dict.fromkeys(("nll", "accuracy", "where"), jnp.zeros((chunks.batch, chunks.length)))
    kept: dict[str, jax.Array] = jax.lax.scan(body, zeros, jnp.arange(chunks.count))[0]
    return kept

  def _of_labels(self, batch: Batch, parts: Any, outputs: Outputs) -> Sums:
    logits, labels, where, known = _flat(outputs.logits, batch)
    where = where * known
    found = dict(_metrics.classification_sums(logits, labels, where))
    labels = jnp.where(where > 0, labels, 0)
    if self.token_bytes is not None:
      lengths = jnp.asarray(self.token_bytes, jnp.float32)
      found["bytes"] = jnp.sum(where * lengths[labels])
    if self.by_position:
      found |= self._by_part("labels", _each_place(logits, labels), where, parts)
    return found

  def _beside(self, batch: Batch, parts: Any, student: Outputs, teacher: Outputs) -> Sums:
    found = dict(_fidelity(student, teacher, batch))
    ours, _, where, _ = _flat(student.logits, batch)
    theirs = teacher.logits.reshape(ours.shape)
    both = (jnp.where(where[:, None] > 0, x.astype(jnp.float32), 0) for x in (ours, theirs))
    log_q, log_p = (jax.nn.log_softmax(x, axis=-1) for x in both)
    q, p = jnp.exp(log_q), jnp.exp(log_p)
    each = {
      "reverse_kl": jnp.sum(jnp.where(q == 0, 0, q * (log_q - log_p)), axis=-1),
      "acceptance": jnp.sum(jnp.minimum(p, q), axis=-1),
    }
    for k in (k for k in self.top_mass if k <= ours.shape[-1]):
      best = jax.lax.top_k(log_q, k)[1]
      each[f"top_mass_{k}"] = jnp.sum(jnp.take_along_axis(p, best, axis=-1), axis=-1)
    found |= {f"beside:{name}": mean(value, where)[0] for name, value in each.items()}
    if self.by_position:
      kl = jnp.sum(jnp.where(p == 0, 0, p * (log_p - log_q)), axis=-1)
      each = {"kl": kl, "acceptance": each["acceptance"]}
      found |= self._by_part("teacher", each, where, parts)
    return found

  def _by_part(self, kind: str, each: Mapping[str, Any], where: Any, parts: Any) -> dict[str, Any]:
    """Sums of values of tokens by the parts of a window that they are in."""
    zeros = jnp.zeros(self.by_position, jnp.float32)
    found = {f"{kind}:counted": zeros.at[parts].add(where)}
    for name, values in each.items():
      counts = where * jnp.where(where > 0, values.astype(jnp.float32), 0)
      found[f"{kind}:{name}_by_position"] = zeros.at[parts].add(counts)
    return found


def _of_tokens(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
  """Of each token what it cost, whether it was right, and how much it counts."""
  where = counted(batch, outputs.logits[..., 0])
  labels = jnp.where(where > 0, jnp.asarray(batch.labels), 0)
  return {**_each_place(outputs.logits, labels), "where": where}


def _of_sequences(kept: Kept) -> dict[str, np.ndarray]:
  """A sequence's means over its tokens: what lies in one is no independent draw."""
  where = np.asarray(kept["where"], np.float64)
  return {
    name: _quotient(np.where(where > 0, where * kept[name], 0).sum(axis=1), where.sum(axis=1))
    for name in ("nll", "accuracy")
  }


def _by_position(kept: Kept) -> dict[str, dict[str, float]]:
  """The mean over the positions from 0, 1, 2, 4, 8 ... on."""
  where = np.asarray(kept["where"], np.float64)
  length = where.shape[1]
  edges = [0, *(2**i for i in range(length.bit_length()) if 2**i < length), length]
  rows = {}
  for first, end in itertools.pairwise(edges):
    here = where[:, first:end]
    total = np.where(here > 0, here * kept["nll"][:, first:end], 0).sum()
    if here.sum() > 0:
      rows[f"{first}" if end == first + 1 else f"{first} to {end - 1}"] = total / here.sum()
  return {"position_nll": rows}


@_once
def dense(*, boundary: int = 1) -> Task:
  """One class a pixel: logits ``[B, H, W, K]``, labels ``[B, H, W]``; or a voxel, ``[B, D, H, W]``.

  Measured are ``miou`` (the mean of intersection over union, over the classes that are there or
  were predicted), ``pixel_accuracy``, ``class_accuracy`` (the mean over the classes that are
  there), ``boundary_accuracy`` (of the pixels that have another class nearby), and ``nll``; beside
  a teacher ``agreement`` and ``kl``. A pixel of weight 0 counts nowhere, one without a label
  beside the teacher alone, who needs none. Of a volume a report shows the slice in the middle of D.

  Args:
    boundary: how near, in pixels to each side.
  """
  _check.whole("boundary", boundary)

  def sums(outputs: Outputs, batch: Batch) -> Sums:
    logits, classes = outputs.logits.astype(jnp.float32), outputs.logits.shape[-1]
    said, where = jnp.argmax(logits, axis=-1), counted(batch, batch.labels)
    labels = jnp.where(where > 0, batch.labels, 0)
    each = _each_place(logits, labels)
    confusion = jnp.zeros((classes, classes), jnp.float32).at[labels, said].add(where)
    near = _near_boundary(labels, where > 0, boundary)
    return {
      "pixel_accuracy": mean(each["accuracy"], where),
      "boundary_accuracy": mean(each["accuracy"], where * near),
      "nll": mean(each["nll"], where),
      "confusion": confusion,
    }

  def compared(student: Outputs, teacher: Outputs, batch: Batch) -> Sums:
    found = _fidelity(student, teacher, batch)
    return {name: (found[name], found["fidelity_examples"]) for name in ("agreement", "kl")}

  def finish(sums: Sums) -> dict[str, Any]:
    confusion = np.asarray(sums["confusion"])  # [labels, predictions]
    right, there = np.diag(confusion), confusion.sum(axis=1)
    found = ratios({name: pair for name, pair in sums.items() if name != "confusion"})
    if confusion.any():
      found["miou"] = np.nanmean(_ious(confusion))
      found["class_accuracy"] = (right[there > 0] / there[there > 0]).mean()
    return found

  known = {
    "miou": Metric("higher", percent=True, title="mean IoU"),
    **{
      name: Metric("higher", percent=True)
      for name in ("pixel_accuracy", "class_accuracy", "boundary_accuracy")
    },
    "nll": _CLASSES["nll"],
  }
  others = {
    "image_iou": Metric("higher", percent=True, title="mean IoU of an image"),
    "class_iou": Metric("higher", percent=True, title="IoU by class"),
  }
  return Task(
    "dense",
    known,
    sums,
    compared,
    finish=finish,
    check=functools.partial(_check_classes, "[N, B, H, W] or [N, B, D, H, W]"),
    others=others,
    fidelity={
      "agreement": Metric("higher", percent=True, title="pixels as the teacher has them"),
      "kl": _FIDELITY["kl"],
    },
    classes=True,
    keeps=_of_images,
    shows=Shows(values=_each_image, parts=_each_class, tells=_masks),
  )


_SIDE = 96  # pixels of a mask that is kept to be looked at


def _of_images(outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
  """Each image's confusion ``[B, K, K]``; masks as small as they are shown, −1 for no label."""
  classes, where = outputs.logits.shape[-1], counted(batch, batch.labels)
  said = jnp.argmax(outputs.logits, axis=-1).astype(jnp.int32)
  labels = jnp.where(where > 0, batch.labels, 0).astype(jnp.int32)
  image = jnp.arange(len(said)).reshape(-1, *(1 for _ in said.shape[1:]))
  confusion = jnp.zeros((len(said), classes, classes), jnp.float32)
  step = -(-max(said.shape[-2:]) // _SIDE)
  middle = tuple(size // 2 for size in said.shape[1:-2])
  seen = (slice(None), *middle, slice(None, None, step), slice(None, None, step))
  return {
    "confusion": confusion.at[image, labels, said].add(where),
    "said": said[seen],
    "labels": jnp.where(where > 0, labels, -1)[seen],
  }


def _ious(confusion: Any) -> np.ndarray:
  """Intersection over union by class, ``[..., K]``; NaN of one that is neither there nor said."""
  confusion = np.asarray(confusion, np.float64)
  right = np.diagonal(confusion, axis1=-2, axis2=-1)
  return _quotient(right, confusion.sum(axis=-1) + confusion.sum(axis=-2) - right)


def _each_image(kept: Kept) -> dict[str, np.ndarray]:
  confusion = np.asarray(kept["confusion"], np.float64)
  each, there = _ious(confusion), confusion.sum(axis=(1, 2))
  known = ~np.isnan(each)
  return {
    "image_iou": _quotient(np.where(known, each, 0).sum(axis=1), known.sum(axis=1)),
    "pixel_accuracy": _quotient(np.trace(confusion, axis1=1, axis2=2), there),
  }


def _each_class(kept: Kept) -> dict[str, dict[int, float]]:
  found = _ious(np.asarray(kept["confusion"], np.float64).sum(axis=0))
  return {"class_iou": {k: float(iou) for k, iou in enumerate(found) if not np.isnan(iou)}}


def _masks(kept: Kept, i: int) -> tuple[Any, Any]:
  return kept["labels"][i], kept["said"][i]


def _near_boundary(labels: Any, there: Any, pixels: int) -> Any:
  """Which pixels ``[B, H, W]``, or ``[B, D, H, W]``, have another label that counts so near."""
  window = (1, *(2 * pixels + 1 for _ in labels.shape[1:]))
  steps = (1,) * len(window)
  most, least = jnp.int32(2**30), jnp.int32(-(2**30))
  # A pixel that does not count is as high as the lowest and as low as the highest of the others.
  low = jnp.where(there, labels, most).astype(jnp.int32)
  high = jnp.where(there, labels, least).astype(jnp.int32)
  low = jax.lax.reduce_window(low, most, jax.lax.min, window, steps, "SAME")
  high = jax.lax.reduce_window(high, least, jax.lax.max, window, steps, "SAME")
  return low < high


# Several labels at once.


@_once
def multilabel(*, threshold: float = 0.5) -> Task:
  """Any number of K labels an example: logits ``[B, ..., K]``, labels of the same shape, 0 or 1.

  Measured are ``map`` (the mean over labels of the average precision), ``f1_micro``, ``f1_macro``,
  ``accuracy`` (of single labels), ``exact`` (all of an example's right), ``nll`` (nats a label) and
  ``ece`` (of each label's probability in 15 bins, mean over labels); beside a teacher
  ``agreement`` and ``kl`` (nats a label). A label that no example has was not measured: it has no
  part in ``map``, nor in ``f1_macro`` where it was not predicted either. Masks may be of single
  labels.

  Args:
    threshold: of the probability from which on a label is predicted.
  """
  _check.number("threshold", threshold, above=0, most=1 - 1e-9)
  edge = float(np.log(threshold / (1 - threshold)))

  def compared(student: Outputs, teacher: Outputs, batch: Batch) -> Sums:
    ours, theirs = (x.logits.astype(jnp.float32) for x in (student, teacher))
    where = counted(batch, ours, labelled=False)
    p = jax.nn.sigmoid(theirs)
    kl = p * (jax.nn.log_sigmoid(theirs) - jax.nn.log_sigmoid(ours))
    kl += (1 - p) * (jax.nn.log_sigmoid(-theirs) - jax.nn.log_sigmoid(-ours))
    return {"agreement": mean((ours >= edge) == (theirs >= edge), where), "kl": mean(kl, where)}

  def each(outputs: Outputs, batch: Batch) -> Mapping[str, Any]:
    logits = outputs.logits.astype(jnp.float32)
    return {"scores": logits, "labels": batch.labels, "where": counted(batch, logits)}

  known = {
    "map": Metric("higher", percent=True, title="mean average precision"),
    "f1_micro": Metric("higher", percent=True, title="F1, micro"),
    "f1_macro": Metric("higher", percent=True, title="F1, macro"),
    **{name: Metric("higher", percent=True) for name in ("accuracy", "exact")},
    "nll": _CLASSES["nll"],
    "ece": _CLASSES["ece"],
  }

  def tells(kept: Kept, i: int) -> tuple[Any, Any]:
    there = kept["where"][i] > 0
    label, said = (
      # Of several places, those that some place has.
      np.flatnonzero((there & on).reshape(-1, there.shape[-1]).any(axis=0)).tolist()
      for on in (kept["labels"][i] > 0.5, kept["scores"][i] >= edge)
    )
    return tuple(label), tuple(said)

  return Task(
    "multilabel",
    known,
    functools.partial(_of_labels, edge),
    compared,
    finish=_labels_finished,
    each=each,
    of_all=_mean_average_precision,
    check=_check_labels,
    fits=_same_logits,
    others={
      "example_ap": Metric("higher", percent=True, title="average precision of an example"),
      "label_ap": Metric("higher", percent=True, title="average precision by label"),
      "label_ece": Metric("lower", percent=True, title="calibration error by label"),
    },
    fidelity={
      "agreement": Metric("higher", percent=True, title="labels as the teacher has them"),
      "kl": Metric("lower", title="KL to the teacher, nats a label"),
    },
    shows=Shows(values=functools.partial(_each_example, edge), parts=_by_label, tells=tells),
  )


def _each_example(edge: float, kept: Kept) -> dict[str, np.ndarray]:
  """How well an example's labels are ranked, and the share of them that is right."""
  scores, labels, where = _rows(kept, len(kept["scores"]))
  ranked = [
    ranking.average_precision(s, y > 0.5, w) for s, y, w in zip(scores, labels, where, strict=True)
  ]
  right = ((scores >= edge) == (labels > 0.5)) & ~np.isnan(scores)
  return {
    "example_ap": np.array([np.nan if one is None else one for one in ranked], np.float64),
    "accuracy": _quotient((where * right).sum(axis=1), where.sum(axis=1)),
  }


def _rows(kept: Kept, count: int) -> list[np.ndarray]:
  """Scores, labels and weights, all of an example in a row."""
  return [np.asarray(kept[n], np.float64).reshape(count, -1) for n in ("scores", "labels", "where")]


def _by_label(kept: Kept) -> dict[str, dict[int, float]]:
  """Of each label: its average precision where some example has it, and its calibration error."""
  return {"label_ap": _precisions(kept), "label_ece": _calibrations(kept)}


def _columns(kept: Kept) -> list[np.ndarray]:
  """Scores, labels and weights, those of a label in a column."""
  each = (np.asarray(kept[name]) for name in ("scores", "labels", "where"))
  return [one.reshape(-1, one.shape[-1]) for one in each]


def _precisions(kept: Kept) -> dict[int, float]:
  """The average precision of each label that some example has."""
  scores, labels, where = _columns(kept)
  each = {
    k: ranking.average_precision(scores[:, k], labels[:, k] > 0.5, where[:, k])
    for k in range(scores.shape[1])
  }
  return {k: one for k, one in each.items() if one is not None}


def _calibrations(kept: Kept) -> dict[int, float]:
  """The calibration error of each label of which something counts, as `_of_labels` bins it."""
  scores, labels, where = _columns(kept)
  found = {}
  for k in range(scores.shape[1]):
    there = where[:, k] > 0
    weight = where[there, k].astype(np.float64)
    # As the sigmoid, without its overflow; in float32, in which the edges are.
    probability = np.exp(-np.logaddexp(0, -scores[there, k].astype(np.float32)))
    gaps = weight * (labels[there, k].astype(np.float64) - probability)
    bins = np.searchsorted(_metrics.EDGES, probability)  # closed on the right
    if len(weight):
      each = np.bincount(bins, gaps, minlength=_metrics.BINS)
      found[k] = float(np.abs(each).sum() / weight.sum())
  return found


def _of_labels(edge: float, outputs: Outputs, batch: Batch) -> Sums:
  """Pairs, and beside them sums of each label ``[K]``, its calibration ``[K, 15]``."""
  logits, labels = outputs.logits.astype(jnp.float32), jnp.asarray(batch.labels, jnp.float32)
  where = counted(batch, logits)
  labels = jnp.where(where > 0, labels, 0)
  yes, bad = labels > 0.5, jnp.isnan(logits)
  said = (logits >= edge) & ~bad
  right = (said == yes) & ~bad
  over = tuple(range(logits.ndim - 1))
  probability = jax.nn.sigmoid(logits)
  edges = _metrics.EDGES.reshape((1,) * logits.ndim + (-1,))
  bins = jnp.sum(probability[..., None] > edges, axis=-1)
  gaps = where * jnp.where(where > 0, labels - probability, 0)
  shape = (logits.shape[-1], _metrics.BINS)
  at = jnp.broadcast_to(jnp.arange(shape[0]), logits.shape), bins
  return {
    "accuracy": mean(right, where),
    # [B]: an example is right as a whole where each of its labels that counts is.
    "exact": mean(jnp.all(right | (where == 0), axis=-1), jnp.max(where, axis=-1)),
    "nll": mean(jax.nn.softplus(logits) - labels * logits, where),
    "hits": jnp.sum(where * (yes & said), axis=over),
    "false": jnp.sum(where * (~yes & said), axis=over),
    "missed": jnp.sum(where * (yes & ~said), axis=over),
    "gaps": jnp.zeros(shape, jnp.float32).at[at].add(gaps),
    "labels": jnp.sum(where, axis=over),
  }


def _labels_finished(sums: Sums) -> dict[str, Any]:
  """What `_of_labels` adds up to."""
  rest = ("hits", "false", "missed", "gaps", "labels")
  found = ratios({name: pair for name, pair in sums.items() if name not in rest})
  if "labels" not in sums:  # there are none, and what compares with a teacher is all
    return found
  hits, false, missed, gaps, count = (np.asarray(sums[name]) for name in rest)
  there = 2 * hits + false + missed
  if there.any():
    found["f1_micro"] = 2 * hits.sum() / there.sum()
    found["f1_macro"] = (2 * hits[there > 0] / there[there > 0]).mean()
  if count.any():
    found["ece"] = (np.abs(gaps).sum(axis=1)[count > 0] / count[count > 0]).mean()
  return found


def _mean_average_precision(
  kept: Mapping[str, Any], teacher: Mapping[str, Any] | None
) -> dict[str, Any]:
  """The mean over the labels that some example has."""
  del teacher
  known = list(_precisions(kept).values())
  return {"map": float(np.mean(known))} if known else {}


def _check_labels(batches: Batch, outputs: Outputs) -> None:
  """Raises where labels are not of the logits' shape, or neither on nor off."""
  labels, logits = batches.labels, outputs.logits
  if logits.ndim < 2 or np.shape(labels)[1:] != logits.shape:
    raise TypeError(
      "of the task 'multilabel' labels have the shape of the logits, [B, ..., K], which are "
      f"{list(logits.shape)} in a batch, and the batches' are {list(np.shape(labels)[1:])}."
    )
  if not np.isin(np.asarray(labels), (0, 1)).all():
    raise ValueError("of the task 'multilabel' labels are 0 or 1; soft ones are a teacher's.")


# Numbers.


@_once
def regression(*, variance: bool = False) -> Task:
  """Numbers: logits ``[B, D]`` are their predictions, labels ``[B, D]``, or ``[B]`` where D is 1.

  Measured are ``rmse``, ``mae`` and ``r2``, each the mean over the D targets, and with a variance
  ``nll`` (nats a target) and ``interval_error``: how far the shares of labels inside the central
  10, 20 ... 90 % of the predicted normal distributions are from these, on average. Beside a
  teacher, ``rmse_to_teacher``, of all targets together. On the host in float64. A target without
  spread has no ``r2``.

  Args:
    variance: whether logits are ``[B, 2 D]``: predictions, and the logarithms of their variances.
  """
  _check.switch("variance", variance)

  def parts(logits: Any) -> tuple[Any, Any]:
    split = logits.shape[-1] // 2 if variance else logits.shape[-1]
    return logits[..., :split], logits[..., split:]

  def each(outputs: Outputs, batch: Batch) -> Mapping[str, Any]:
    logits = outputs.logits.astype(jnp.float32)
    logits = logits[..., None] if logits.ndim == 1 else logits
    labels = jnp.asarray(batch.labels, jnp.float32)
    labels = labels if labels.ndim == logits.ndim else labels[..., None]
    known = batch.labelled
    if known.ndim < labels.ndim:
      known = jnp.expand_dims(known, range(known.ndim, labels.ndim))
    counts = counted(dataclasses.replace(batch, labelled=known), labels)
    return {"outputs": logits, "labels": labels, "where": counts}

  def compared(student: Outputs, teacher: Outputs, batch: Batch) -> Sums:
    ours, theirs = (parts(one.logits.astype(jnp.float32))[0] for one in (student, teacher))
    where = counted(batch, ours, labelled=False)
    return {"rmse_to_teacher": mean(jnp.square(ours - theirs), where)}

  def finish(sums: Sums) -> dict[str, Any]:
    return {name: np.sqrt(value) for name, value in ratios(sums).items()}

  def of_all(kept: Mapping[str, Any], teacher: Mapping[str, Any] | None) -> dict[str, Any]:
    del teacher
    outputs, labels, where = _targets(kept)
    said, log_variance = parts(outputs)
    found = ranking.errors(said, labels, where)
    if variance:
      found |= ranking.normal_errors(said, log_variance, labels, where)
    return found

  def values(kept: Kept) -> dict[str, np.ndarray]:
    where = np.asarray(kept["where"], np.float64)
    error = np.where(
      where > 0,
      parts(np.asarray(kept["outputs"], np.float64))[0] - np.asarray(kept["labels"], np.float64),
      0,
    )
    of_one = len(error), -1  # an example's targets, wherever they are
    counts = where.reshape(of_one).sum(axis=1)
    return {
      "squared_error": _quotient((where * error**2).reshape(of_one).sum(axis=1), counts),
      "mae": _quotient((where * np.abs(error)).reshape(of_one).sum(axis=1), counts),
    }

  def points(kept: Kept) -> dict[str, tuple[Any, Any]]:
    outputs, labels, where = _targets(kept)
    said, there = parts(outputs)[0], where > 0
    each = range(labels.shape[1])
    return {f"target {d}": (labels[there[:, d], d], said[there[:, d], d]) for d in each}

  def by_target(kept: Kept) -> dict[str, dict[str, float]]:
    drawn = points(kept)
    errors = {name: said - labels for name, (labels, said) in drawn.items() if len(labels)}
    if len(drawn) < 2:
      return {}
    return {"target_rmse": {n: float(np.sqrt(np.mean(e**2))) for n, e in errors.items()}}

  def tells(kept: Kept, i: int) -> tuple[str, str]:
    pair = kept["labels"][i], parts(kept["outputs"][i])[0]
    there = np.asarray(kept["where"][i]) > 0
    told = (np.where(there, one, np.nan).reshape(-1)[:8].tolist() for one in pair)
    label, said = (
      ", ".join("–" if np.isnan(one) else f"{one:.4g}" for one in each) for each in told
    )
    return label, said

  def check(batches: Batch, outputs: Outputs) -> None:
    logits, labels = outputs.logits, np.shape(batches.labels)[1:]
    if variance and (logits.ndim < 2 or logits.shape[-1] % 2):
      raise TypeError(f"variance=True splits the logits {list(logits.shape)} in two halves.")
    shape = logits.shape if logits.ndim > 1 else (*logits.shape, 1)  # [B] is one target's
    wanted = (*shape[:-1], shape[-1] // 2 if variance else shape[-1])
    of_one = wanted[-1] == 1 and labels == wanted[:-1]
    if labels != wanted and not of_one:
      raise TypeError(
        f"of the task 'regression' labels have the shape {list(wanted)} in a batch, and the "
        f"batches' are {list(labels)}."
      )

  known = {
    "rmse": Metric("lower", title="root mean squared error"),
    "mae": Metric("lower", title="mean absolute error"),
    "r2": Metric("higher", title="R²"),
  }
  if variance:
    known |= {"nll": _CLASSES["nll"], "interval_error": Metric("lower", percent=True)}
  return Task(
    "regression",
    known,
    compared=compared,
    finish=finish,
    each=each,
    of_all=of_all,
    check=check,
    fits=_same_logits,
    others={
      "squared_error": Metric("lower", title="squared error"),
      "target_rmse": Metric("lower", title="root mean squared error by target"),
    },
    fidelity={
      "rmse_to_teacher": Metric("lower", title="root mean squared distance to the teacher")
    },
    shows=Shows(values=values, parts=by_target, points=points, tells=tells),
  )


def _targets(kept: Kept) -> list[np.ndarray]:
  """Outputs, labels and weights, those of a target in a column."""
  flat = (np.asarray(kept[name], np.float64) for name in ("outputs", "labels", "where"))
  return [x.reshape(-1, x.shape[-1]) for x in flat]


# Vectors.

_MANY = 1000  # classes, of which each would have too few examples to be told alone


@_once
def embedding(feature: str | None = None, *, neighbours: int = 5) -> Task:
  """Vectors ``[B, D]`` in which what belongs together is near; labels ``[B]`` say what does.

  By cosine similarity among all examples of the split, each asked of the others: ``knn_accuracy``
  (the class of most of the k nearest), ``weighted_knn_accuracy`` (of most by votes of
  exp(similarity / 0.07)), ``recall_at_1`` and ``recall_at_k`` (whether one of the nearest has the
  class), ``alignment`` (mean squared distance within a class) and ``uniformity`` (log of the mean
  of exp(−2 squared distance)) of unit vectors; beside a teacher ``neighbour_agreement``, the share
  of the k nearest that are the same. An example counts in a mean by its weight, a pair by the
  product of both; a neighbour votes once. Time and memory go with the square of the number of
  examples, in blocks.

  Of vectors ``[B, L, D]`` each position is one, with a label ``[B, L]`` of its own, or its
  example's; those of weight 0 are nobody's neighbours.

  Args:
    feature: the name of the feature that is the vector; None for the logits.
    neighbours: k.

  Source: Wang, Isola, "Understanding Contrastive Representation Learning through Alignment and
  Uniformity on the Hypersphere", 2020, for the last two; Wu, Xiong, Yu, Lin, "Unsupervised Feature
  Learning via Non-Parametric Instance Discrimination", 2018, for the votes and their 0.07.
  """
  _check.whole("neighbours", neighbours)
  if feature is not None:
    _check_name("feature", feature)

  def reads(outputs: Outputs) -> Outputs:
    if feature is None:
      return Outputs(logits=outputs.logits)
    # None marks what was read before, and is the logits now.
    vectors = _feature_of(outputs, feature, "feature")
    vectors = outputs.logits if vectors is None else vectors
    return Outputs(logits=vectors, features={feature: None})

  def of_all(kept: Mapping[str, Any], teacher: Mapping[str, Any] | None) -> dict[str, Any]:
    vectors, labels, weight, known, there = _points_of(kept)
    theirs = None if teacher is None else _points_of({**kept, "vectors": teacher["vectors"]})[0]
    if not there.any():
      return {}
    return ranking.neighbourhoods(vectors, labels, weight, known, theirs, neighbours)

  def hits(kept: Kept) -> np.ndarray:
    """``[N, L, 4]``; L is 1 where an example is one vector."""
    vectors, labels, _, known, there = _points_of(kept)
    found = np.full((len(there), len(ranking.HITS)), np.nan)
    found[there] = ranking.hits(vectors, labels, known, neighbours)
    return found.reshape(len(kept["vectors"]), -1, len(ranking.HITS))

  def values(kept: Kept) -> dict[str, np.ndarray]:
    each = hits(kept)
    weight = np.asarray(kept["weight"], np.float64).reshape(each.shape[:2])[..., None]
    weight = np.where(np.isnan(each), 0, weight)
    means = _quotient((weight * np.nan_to_num(each)).sum(axis=1), weight.sum(axis=1))
    return dict(zip(ranking.HITS, means.T, strict=True))

  def by_class(kept: Kept) -> dict[str, dict[int, float]]:
    _, labels, weight, known, there = _points_of(kept)
    voted = hits(kept)[..., 0].reshape(-1)[there]
    known = known & ~np.isnan(voted)
    classes = np.unique(labels[known])
    if len(classes) > _MANY:
      return {}
    each = {int(k): known & (labels == k) for k in classes}
    return {
      "class_knn": {k: float(np.average(voted[i], weights=weight[i])) for k, i in each.items()}
    }

  def tells(kept: Kept, i: int) -> tuple[Any, Any]:
    vectors, labels, _, known, there = _points_of(kept)
    mine = np.arange(len(there)).reshape(len(kept["vectors"]), -1)[i]
    rows = np.flatnonzero(np.isin(np.flatnonzero(there), mine))
    if not len(rows):
      return "no vector", ()
    near = ranking.nearest(vectors, int(rows[0]), neighbours, known)
    return int(labels[rows[0]]) if known[rows[0]] else "no label", tuple(labels[near].tolist())

  titles = ("k-NN accuracy", "weighted k-NN accuracy", "recall at 1", f"recall at {neighbours}")
  shares = {
    name: Metric("higher", percent=True, title=title, of_examples=True)
    for name, title in zip(ranking.HITS, titles, strict=True)
  }
  return Task(
    "embedding",
    {**shares, "alignment": Metric("lower"), "uniformity": Metric("lower")},
    reads=reads,
    each=_each_vector,
    of_all=of_all,
    check=_check_vectors,
    fits=lambda student, teacher: _same_places("vectors", student.logits, teacher.logits),
    others={"class_knn": Metric("higher", percent=True, title="k-NN accuracy by class")},
    fidelity={
      "neighbour_agreement": Metric("higher", percent=True, title="neighbours as the teacher has")
    },
    shows=Shows(values=values, parts=by_class, tells=tells),
  )


def _check_name(argument: str, name: Any) -> None:
  if not isinstance(name, str) or not name:
    raise TypeError(f"{argument}={_check.show(name)} must be a feature's name.")


def _feature_of(outputs: Outputs, name: str, argument: str) -> Any:
  if name not in outputs.features:
    raise ValueError(
      f"{argument}={name!r} is not among the features that the model, or its teacher, puts out, "
      f"{sorted(outputs.features)}."
    )
  return outputs.features[name]


def _each_vector(outputs: Outputs, batch: Batch) -> Mapping[str, Any]:
  """Vectors, and of each of them its label, how much it counts, and whether its label is known."""
  vectors = outputs.logits.astype(jnp.float32)
  known, labels = dataclasses.replace(batch, weight=batch.labelled), jnp.asarray(batch.labels)
  labels = jnp.expand_dims(labels, range(labels.ndim, vectors.ndim - 1))
  return {
    "vectors": vectors,
    "labels": jnp.broadcast_to(labels, vectors.shape[:-1]),
    "weight": counted(batch, vectors[..., 0], labelled=False),
    "known": counted(known, vectors[..., 0], labelled=False),
  }


def _points_of(kept: Kept) -> tuple[np.ndarray, ...]:
  """Vectors, labels, weights and which labels are known, of what counts; which of all do."""
  vectors = np.asarray(kept["vectors"], np.float64)
  labels, weight, known = (np.asarray(kept[n]).reshape(-1) for n in ("labels", "weight", "known"))
  there = weight > 0
  of_those = (labels, weight.astype(np.float64), known > 0)
  return vectors.reshape(-1, vectors.shape[-1])[there], *(x[there] for x in of_those), there


def _check_vectors(batches: Batch, outputs: Outputs) -> None:
  """Raises where outputs are no vectors, or labels no whole number of an example or a vector."""
  shape, labels = outputs.logits.shape, np.asarray(batches.labels)
  if len(shape) not in (2, 3):
    raise TypeError(
      f"of the task 'embedding' an example has one vector [B, D], or one for each position "
      f"[B, L, D], and the network's are {list(shape)}: name a feature that is one ('pooled')."
    )
  if labels.dtype.kind not in "iu" or labels.shape[1:] not in (shape[:1], shape[:-1]):
    raise TypeError(
      "of the task 'embedding' a label is one whole number an example, or a vector, and the "
      f"batches' are {_check.show(labels)} beside vectors {list(shape)} in a batch."
    )


@_once
def retrieval(first: str, second: str, *, at: Sequence[int] = (1, 5, 10)) -> Task:
  """Two towers: whether what is asked by one tower's vector finds its partner among the other's.

  By cosine similarity among all examples of the split: ``<first>_to_<second>_at_<k>`` and
  ``<second>_to_<first>_at_<k>``, the share that find their partner among the k most similar
  (recall at k). A partner is the other tower's vector of the same example, and of those that have
  a label each with the same (several texts of one image, a class). Wrong ones that are as similar
  as the partner are before it. Beside a teacher ``agreement``: the share whose most similar is the
  teacher's, the mean of both ways. Time and memory go with the square of the number of examples,
  in blocks.

  Args:
    first: the name of one tower's feature ``[B, D]``, ``"image"``.
    second: the other's, ``"text"``.
    at: the k's.

  Raises:
    TypeError, ValueError: a k is no whole number of at least 1, or there is none; or the towers are
      one.
  """
  for argument, name in (("first", first), ("second", second)):
    _check_name(argument, name)
  if first == second:
    raise ValueError(f"first={first!r} and second={second!r} are one tower, which finds itself.")
  ways = {(first, second): "there", (second, first): "back"}
  most = _wholes("at", at)
  if not most:
    raise ValueError("at=() has no k; give (1, 5, 10).")
  names = {(way, k): f"{one}_to_{other}_at_{k}" for (one, other), way in ways.items() for k in most}

  def reads(outputs: Outputs) -> Outputs:
    both = {"first": first, "second": second}
    return Outputs(features={n: _feature_of(outputs, n, a) for a, n in both.items()})

  def each(outputs: Outputs, batch: Batch) -> Mapping[str, Any]:
    vectors = {name: outputs.features[name].astype(jnp.float32) for name in (first, second)}
    known = dataclasses.replace(batch, weight=batch.labelled)
    places = vectors[first][:, 0]
    return {
      **vectors,
      "labels": jnp.asarray(batch.labels),
      "weight": counted(batch, places, labelled=False),
      "known": counted(known, places, labelled=False),
    }

  def found(kept: Kept) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Both ways' places and most similar."""
    vectors = {name: np.asarray(kept[name], np.float64) for name in (first, second)}
    about = np.asarray(kept["labels"]), np.asarray(kept["known"]) > 0
    return {way: ranking.places(vectors[a], vectors[b], *about) for (a, b), way in ways.items()}

  def values(kept: Kept) -> dict[str, np.ndarray]:
    rows = found(kept)
    return {name: (rows[way][0] < k).astype(np.float64) for (way, k), name in names.items()}

  def of_all(kept: Mapping[str, Any], teacher: Mapping[str, Any] | None) -> dict[str, Any]:
    weight = np.asarray(kept["weight"], np.float64)
    if not weight.sum():
      return {}
    made = {name: np.average(one, weights=weight) for name, one in values(kept).items()}
    if teacher is not None:
      pairs = zip(found(kept).values(), found(teacher).values(), strict=True)
      same = [np.average(ours[1] == theirs[1], weights=weight) for ours, theirs in pairs]
      made["agreement"] = np.mean(same)
    return made

  def check(batches: Batch, outputs: Outputs) -> None:
    shapes = [outputs.features[name].shape for name in (first, second)]
    if shapes[0] != shapes[1] or len(shapes[0]) != 2:
      raise TypeError(
        f"of the task 'retrieval' both towers have one vector [B, D] an example, and {first!r} is "
        f"{list(shapes[0])}, {second!r} {list(shapes[1])}."
      )
    labels = np.asarray(batches.labels)
    if labels.dtype.kind not in "iu" or labels.ndim != 2:
      raise TypeError(
        "of the task 'retrieval' a label is one whole number an example, or none, and the batches' "
        f"are {_check.show(labels)}."
      )

  def fits(student: Outputs, teacher: Outputs) -> None:
    for name in (first, second):
      _same_places(name, student.features[name], teacher.features[name])

  def tells(kept: Kept, i: int) -> tuple[str, str]:
    there, back = (int(rows[0][i]) + 1 for rows in found(kept).values())
    return "place 1 both ways", f"place {there} by {first}, {back} by {second}"

  known = {
    name: Metric("higher", percent=True, title=name.replace("_", " "), of_examples=True)
    for name in names.values()
  }
  fidelity = {"agreement": Metric("higher", percent=True, title="finds what the teacher finds")}
  return Task(
    "retrieval",
    known,
    reads=reads,
    each=each,
    of_all=of_all,
    check=check,
    fits=fits,
    unlabelled=True,
    fidelity=fidelity,
    shows=Shows(values=values, tells=tells),
  )
