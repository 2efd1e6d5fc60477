"""Contrastive representation distillation: an example against all others that were ever seen."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import _check, losses
from jaxdistill.recipes.parts import (
  Modules,
  Running,
  embed,
  embeddings,
  init_modules,
  layer_names,
  learned,
  present,
)
from jaxdistill.types import Batch, Objective, Outputs, Term

__all__ = ["crd"]

PyTree = Any


def crd(
  labels: Any,
  *,
  student_layer: str = "pooled",
  teacher_layer: str | None = None,
  crd_weight: float = 0.8,
  hard_weight: float | None = 1.0,
  crd_temperature: float = 0.07,
  negatives: int = 16384,
  momentum: float = 0.5,
  width: int = 128,
  axis_name: str | None = None,
) -> Objective:
  """Contrastive representation distillation (CRD), with banks of all training examples.

  Tian, Krishnan, Isola, "Contrastive Representation Distillation", 2020, as in RepDistiller.
  ``hard_weight · cross_entropy + crd_weight · contrastive_bank`` of n(linear(feature)), one linear
  map for each network, both trained. ``batch.index`` says which rows of the banks the examples
  are. A row's class is the one in ``labels``, whatever a transform made of ``batch.labels``.

  The banks, ``[N, width]`` twice, are the objective's state: checkpointed, and one pair for each of
  several seeds. Views of an example share its row. Examples that are padding or unlabelled have no
  value here and change neither rows nor normalisers.

  Under ``jit`` over several devices the banks are those of one device. Under ``pmap`` they are so
  with ``axis_name``, over which every device then gathers all embeddings and scores them. Without
  it there, a device knows its own share alone: the step averages the banks over the devices, so
  that a row moves 1 / devices of its way and is not of norm 1, and each device sets normalisers of
  its own, which are averaged too. With ``accumulate``, a micro-batch meets the banks that
  the one before it left, and the first one sets the normalisers.

  Args:
    labels: ``[N]`` integers, the class of every training example in the order of its index: the
      data set's labels. From equal classes no negatives are drawn. Give an example that has no
      label a number of its own. An index beyond N makes the term NaN, which ends the run.
    student_layer: the pooled feature; any other shape is flattened.
    teacher_layer: the teacher's pooled feature; the same name by default.
    crd_weight: 0.8 in RepDistiller and mdistiller.
    hard_weight: weight of the labels, 1 there; None leaves that term out.
    crd_temperature: divides the scores, 0.07 there. Not ``temperature``, which is `kd`'s.
    negatives: 16384 there, drawn from other classes; all of them where they are fewer.
    momentum: how much of a row is kept at an update, 0.5 there.
    width: of both embeddings and of the banks, 128 there.
    axis_name: `train.AXIS` under ``pmap``; None under ``jit``.

  Returns:
    An `Objective` with the terms ``labels`` and ``crd``; it learns the linear maps ``student`` and
    ``teacher`` and remembers ``banks`` (`losses.Banks`).

  Raises:
    TypeError: ``labels`` are no integers.
    ValueError: they are not ``[N]``, or a number is out of range.

  >>> crd(jnp.array([0, 1, 1])).hyper["crd_weight"]
  0.8
  """
  layers = layer_names(student_layer, teacher_layer)
  _check.number("momentum", momentum, least=0, most=1)
  _check.whole("negatives", negatives)
  _check.whole("width", width)
  classes = _classes(labels)

  # Two linear maps, [B, D] to [B, width] each: scores are cosines, which need one width.
  def modules(student: Outputs, teacher: Outputs | None) -> Modules:
    return embeddings(student, teacher, layers, width)

  def init(key: Any, student: Outputs, teacher: Outputs | None) -> tuple[PyTree, PyTree]:
    # Two keys: from one, the maps would be drawn from the words that the banks begin with.
    key, banks_key = jax.random.split(key)
    params, _ = init_modules(key, modules(student, teacher))
    return params, {"banks": losses.init_banks(banks_key, jnp.asarray(classes), width)}

  def method(
    running: Running,
    student: Outputs,
    teacher: Outputs | None,
    batch: Batch,
    *,
    key: Any,
    crd_weight: Any,
    crd_temperature: Any,
  ) -> dict[str, Term]:
    banks, index = running.state["banks"], batch.index
    # Padding is nobody's example, and without a label there are no others "of another class".
    known = present(batch) & (batch.labelled > 0)
    ours, theirs = embed(running, student, teacher, layers, known)
    rows = index
    if axis_name is not None:
      # Every device scores the whole batch, so that all banks make the same step and stay one.
      (ours, theirs, rows, known), key = _gathered((ours, theirs, rows, known), key, axis_name)
    # A gather beyond the end would be clamped without a word; said here, and made NaN below.
    rows = jnp.clip(rows, 0, len(banks.labels) - 1)
    values, running.state["banks"] = losses.contrastive_bank(
      ours,
      theirs,
      banks.labels[rows],
      rows,
      banks,
      key=key,
      negatives=negatives,
      temperature=crd_temperature,
      momentum=momentum,
      where=known,
    )
    if axis_name is not None:
      # Back to the examples of this device: the step averages over the devices itself.
      start = jax.lax.axis_index(axis_name) * index.shape[0]
      values = jax.lax.dynamic_slice_in_dim(values, start, index.shape[0])
    # A wrong row would be scored without a word.
    values = jnp.where((index >= 0) & (index < len(banks.labels)), values, jnp.nan)
    return {"crd": Term(values, weight=crd_weight, where=batch.labelled)}

  # ``negatives`` and ``width`` are shapes of the program, so no step can change them: no keywords.
  hyper = {"crd_weight": crd_weight, "crd_temperature": crd_temperature}
  return learned(modules, method, hyper, hard_weight, init=init)


def _gathered(seen: PyTree, key: Any, axis_name: str) -> tuple[PyTree, Any]:
  """The examples of all devices, and the first one's key: the same on every device."""
  seen = jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, axis_name, tiled=True), seen)
  # Each device has a key of its own; drawn with it, negatives and normalisers would drift apart.
  words = jax.lax.all_gather(jax.random.key_data(key), axis_name)[0]
  return seen, jax.random.wrap_key_data(words, impl=jax.random.key_impl(key))


def _classes(labels: Any) -> np.ndarray:
  """The data set's labels, as integers ``[N]``."""
  # A soft label has no class to draw "others" from, so that only integers will do.
  classes = np.asarray(labels)
  if not np.issubdtype(classes.dtype, np.integer):
    raise TypeError(f"labels must be the data set's integer labels [N], got {_check.show(labels)}.")
  if classes.ndim != 1 or not classes.size:
    raise ValueError(
      f"labels must be the data set's labels [N], one for each example, got {classes.shape}."
    )
  return classes.astype(np.int32)
