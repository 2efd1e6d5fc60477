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
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import _check
from jaxdistill.evaluation import metrics as _metrics
from jaxdistill.evaluation import ranking
from jaxdistill.types import Batch, Outputs

__all__ = [
  "Metric",
  "Task",
  "classification",
  "counted",
  "dense",
  "embedding",
  "mean",
  "multilabel",
  "on_host",
  "ratios",
  "regression",
  "tokens",
]

# ``{name: (sum, count)}``.
Sums = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Metric:
  """How a metric is read.

  Attributes:
    better: ``"higher"`` or ``"lower"``.
    percent: whether it is a share, which is shown in percent.
    title: what it is called where it is shown; its name where left out.
  """

  better: Literal["higher", "lower"]
  percent: bool = False
  title: str = ""

  def __post_init__(self) -> None:
    if self.better not in ("higher", "lower"):
      raise ValueError(f"better={self.better!r} must be 'higher' or 'lower'.")

  @property
  def sign(self) -> int:
    """1 where higher is better, else −1."""
    return 1 if self.better == "higher" else -1


def _logits_alone(outputs: Outputs) -> Outputs:
  """What most tasks read."""
  return Outputs(logits=outputs.logits)


def ratios(sums: Sums) -> dict[str, Any]:
  """Each sum over its count; what counted nothing was not measured, and is absent.

  Args:
    sums: ``{name: (sum, count)}``, on the host.

  >>> ratios({"mae": (6.0, 4.0), "rmse": (0.0, 0.0)})
  {'mae': 1.5}
  """
  return {name: total / count for name, (total, count) in sums.items() if count > 0}


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
    classes: whether logits ``[B, ..., K]`` are of classes and labels ``[B, ...]`` one of them each:
      what is asked of probabilities and of chance (`search.preflight`) is asked then.
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

  def __post_init__(self) -> None:
    if self.sums is None and self.each is None:
      raise ValueError(f"task {self.name!r} measures nothing: give it sums, or each and of_all.")
    if (self.each is None) != (self.of_all is None):
      raise ValueError(f"task {self.name!r} needs each and of_all together, or neither.")
    if not self.metrics or not all(isinstance(one, Metric) for one in self.metrics.values()):
      raise ValueError(
        f"task {self.name!r} needs metrics={{name: Metric('higher')}}, at least one."
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


# Classes.


def _check_classes(shape: str, batches: Batch, outputs: Outputs) -> None:
  """Raises for labels that are no classes of the logits, which would count as errors."""
  labels, logits = np.asarray(batches.labels), outputs.logits
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
  "accuracy": Metric("higher", percent=True),
  "nll": Metric("lower", title="negative log-likelihood"),
  "ece": Metric("lower", percent=True, title="calibration error"),
}


@functools.cache
def classification() -> Task:
  """One class an example: logits ``[B, K]``, labels ``[B]``.

  Measured are ``accuracy``, ``top5``, ``nll`` (nats), ``ece`` (15 bins) and ``brier``; beside a
  teacher ``agreement``, ``kl`` (nats, teacher to student) and ``accuracy_where_teacher_wrong``. See
  `evaluation.metrics`.
  """
  check = functools.partial(_check_classes, "[N, B]")
  return Task(
    "classification",
    _CLASSES,
    _of_classes,
    _fidelity,
    finish=_metrics.finish,
    check=check,
    classes=True,
  )


@functools.cache
def tokens() -> Task:
  """One class a token: logits ``[B, L, K]``, labels and weights ``[B, L]``.

  What `classification` measures, over all tokens that count, and ``perplexity``, exp of the nll.
  """

  def finish(sums: Sums) -> dict[str, Any]:
    found = dict(_metrics.finish(sums))
    return found | ({"perplexity": np.exp(found["nll"])} if "nll" in found else {})

  known = {"nll": _CLASSES["nll"], "perplexity": Metric("lower"), **_CLASSES}
  check = functools.partial(_check_classes, "[N, B, L]")
  return Task("tokens", known, _of_classes, _fidelity, finish=finish, check=check, classes=True)


@functools.cache
def dense(*, boundary: int = 1) -> Task:
  """One class a pixel: logits ``[B, H, W, K]``, labels ``[B, H, W]``.

  Measured are ``miou`` (the mean of intersection over union, over the classes that are there or
  were predicted), ``pixel_accuracy``, ``class_accuracy`` (the mean over the classes that are
  there), ``boundary_accuracy`` (of the pixels that have another class nearby), and ``nll``; beside
  a teacher ``agreement`` and ``kl``. A pixel of weight 0, or without a label, counts nowhere.

  Args:
    boundary: how near, in pixels to each side.
  """
  _check.whole("boundary", boundary)

  def sums(outputs: Outputs, batch: Batch) -> Sums:
    logits, classes = outputs.logits.astype(jnp.float32), outputs.logits.shape[-1]
    said, where = jnp.argmax(logits, axis=-1), counted(batch, batch.labels)
    labels = jnp.where(where > 0, batch.labels, 0)
    right = (said == labels) & ~jnp.isnan(logits).any(axis=-1)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
    confusion = jnp.zeros((classes, classes), jnp.float32).at[labels, said].add(where)
    near = _near_boundary(labels, where > 0, boundary)
    return {
      "pixel_accuracy": mean(right, where),
      "boundary_accuracy": mean(right, where * near),
      "nll": mean(nll, where),
      "confusion": confusion,
    }

  def compared(student: Outputs, teacher: Outputs, batch: Batch) -> Sums:
    found = _fidelity(student, teacher, batch)
    return {name: (found[name], found["fidelity_examples"]) for name in ("agreement", "kl")}

  def finish(sums: Sums) -> dict[str, Any]:
    confusion = np.asarray(sums["confusion"])  # [labels, predictions]
    right, there = np.diag(confusion), confusion.sum(axis=1)
    union = there + confusion.sum(axis=0) - right
    found = ratios({name: pair for name, pair in sums.items() if name != "confusion"})
    if union.any():
      found["miou"] = (right[union > 0] / union[union > 0]).mean()
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
  check = functools.partial(_check_classes, "[N, B, H, W]")
  return Task("dense", known, sums, compared, finish=finish, check=check, classes=True)


def _near_boundary(labels: Any, there: Any, pixels: int) -> Any:
  """Which pixels ``[B, H, W]`` have another label that counts within so many pixels."""
  window = (1, 2 * pixels + 1, 2 * pixels + 1)
  most, least = jnp.int32(2**30), jnp.int32(-(2**30))
  # A pixel that does not count is as high as the lowest and as low as the highest of the others.
  low = jnp.where(there, labels, most).astype(jnp.int32)
  high = jnp.where(there, labels, least).astype(jnp.int32)
  low = jax.lax.reduce_window(low, most, jax.lax.min, window, (1, 1, 1), "SAME")
  high = jax.lax.reduce_window(high, least, jax.lax.max, window, (1, 1, 1), "SAME")
  return low < high


# Several labels at once.


@functools.cache
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
  return Task(
    "multilabel",
    known,
    functools.partial(_of_labels, edge),
    compared,
    finish=_labels_finished,
    each=each,
    of_all=_mean_average_precision,
    check=_check_labels,
  )


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
  scores, labels, where = (
    kept[name].reshape(-1, kept[name].shape[-1]) for name in ("scores", "labels", "where")
  )
  each = [
    ranking.average_precision(scores[:, k], labels[:, k] > 0.5, where[:, k])
    for k in range(scores.shape[1])
  ]
  known = [one for one in each if one is not None]
  return {"map": float(np.mean(known))} if known else {}


def _check_labels(batches: Batch, outputs: Outputs) -> None:
  """Raises where labels are not of the logits' shape, or neither on nor off."""
  labels, logits = batches.labels, outputs.logits
  if np.shape(labels)[1:] != logits.shape:
    raise TypeError(
      "of the task 'multilabel' labels have the shape of the logits, "
      f"{list(logits.shape)} in a batch, and the batches' are {list(np.shape(labels)[1:])}."
    )
  if not np.isin(np.asarray(labels), (0, 1)).all():
    raise ValueError("of the task 'multilabel' labels are 0 or 1; soft ones are a teacher's.")


# Numbers.


@functools.cache
def regression(*, variance: bool = False) -> Task:
  """Numbers: logits ``[B, D]`` are their predictions, labels ``[B, D]``, or ``[B]`` where D is 1.

  Measured are ``rmse``, ``mae`` and ``r2``, each the mean over the D targets, and with a variance
  ``nll`` (nats a target) and ``interval_error``: how far the shares of labels inside the central
  10, 20 ... 90 % of the predicted normal distributions are from these, on average. Beside a
  teacher, ``rmse_to_teacher``. On the host in float64. A target without spread has no ``r2``.

  Args:
    variance: whether logits are ``[B, 2 D]``: predictions, and the logarithms of their variances.
  """

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
    flat = {name: np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for name, x in kept.items()}
    said, log_variance = parts(flat["outputs"])
    found = ranking.errors(said, flat["labels"], flat["where"])
    if variance:
      found |= ranking.normal_errors(said, log_variance, flat["labels"], flat["where"])
    return found

  def check(batches: Batch, outputs: Outputs) -> None:
    logits, labels = outputs.logits, np.shape(batches.labels)[1:]
    wanted = (*logits.shape[:-1], logits.shape[-1] // 2 if variance else logits.shape[-1])
    of_one = wanted[-1] == 1 and labels == wanted[:-1]
    if variance and logits.shape[-1] % 2:
      raise TypeError(f"variance=True splits the logits {list(logits.shape)} in two halves.")
    if logits.ndim > 1 and labels != wanted and not of_one:
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
  return Task("regression", known, None, compared, finish, _logits_alone, each, of_all, check)


# Vectors.


@functools.cache
def embedding(feature: str | None = None, *, neighbours: int = 5) -> Task:
  """Vectors ``[B, D]`` in which what belongs together is near; labels ``[B]`` say what does.

  By cosine similarity among all examples of the split, each asked of the others: ``knn_accuracy``
  (the class of most of the k nearest), ``recall_at_1`` and ``recall_at_k`` (whether one of the
  nearest has the class), ``alignment`` (mean squared distance within a class) and ``uniformity``
  (log of the mean of exp(−2 squared distance)) of unit vectors; beside a teacher
  ``neighbour_agreement``, the share of the k nearest that are the same. Time and memory go with
  the square of the number of examples, in blocks.

  Args:
    feature: the name of the feature that is the vector; None for the logits.
    neighbours: k.

  Source: Wang, Isola, "Understanding Contrastive Representation Learning through Alignment and
  Uniformity on the Hypersphere", 2020, for the last two.
  """
  _check.whole("neighbours", neighbours)

  def reads(outputs: Outputs) -> Outputs:
    if feature is None:
      return Outputs(logits=outputs.logits)
    if feature not in outputs.features:
      raise ValueError(
        f"feature={feature!r} is not among the network's, {sorted(outputs.features)}."
      )
    return Outputs(logits=outputs.features[feature])

  def each(outputs: Outputs, batch: Batch) -> Mapping[str, Any]:
    vectors = outputs.logits.astype(jnp.float32)
    known = counted(batch, vectors[:, 0])
    return {"vectors": vectors, "labels": batch.labels, "known": known}

  def of_all(kept: Mapping[str, Any], teacher: Mapping[str, Any] | None) -> dict[str, Any]:
    theirs = None if teacher is None else np.asarray(teacher["vectors"], np.float64)
    vectors = np.asarray(kept["vectors"], np.float64)
    return ranking.neighbourhoods(vectors, kept["labels"], kept["known"] > 0, theirs, neighbours)

  def check(batches: Batch, outputs: Outputs) -> None:
    if outputs.logits.ndim != 2:
      raise TypeError(
        f"of the task 'embedding' an example has one vector [B, D], and the network's are "
        f"{list(outputs.logits.shape)}: name a feature that is one ('pooled')."
      )
    if np.ndim(batches.labels) != 2 or np.asarray(batches.labels).dtype.kind not in "iu":
      raise TypeError("of the task 'embedding' a label is one whole number an example.")

  known = {
    name: Metric("higher", percent=True) for name in ("knn_accuracy", "recall_at_1", "recall_at_k")
  }
  known |= {"alignment": Metric("lower"), "uniformity": Metric("lower")}
  return Task("embedding", known, reads=reads, each=each, of_all=of_all, check=check)
