"""Two sources in every batch: labelled examples and unlabelled transfer data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.sources import Part, Source, Whole
from jaxdistill.types import Batch, PyTree

__all__ = ["mixed"]


def mixed(source: Source, transfer: Source, *, share: float) -> Source:
  """Mixes unlabelled transfer data into every batch, at a fixed share of it.

  A batch keeps ``source.batch_size`` rows: first those of ``source``, then ``round(share * B)`` of
  ``transfer``, whose labels, if it has any, do not reach the batch. Epochs are counted by
  ``source``; ``transfer`` runs through epochs of its own, in an order of its own that the mix's
  ``data_seed`` decides (whatever ``data_seed`` and ``batch_size`` it had itself).

  Args:
    source: where the labelled rows come from.
    transfer: any other source: in memory, streamed or iterated.
    share: the part of each batch that is transfer data, between 0 and 1.

  Returns:
    The source. Its ``index`` counts on from ``source.size`` for transfer rows; ``normalize`` and
    ``stored`` are those of ``source``. Each of the two shows its own views; the mix has as many as
    the one with more.

  Raises:
    TypeError: one of the two is no `Source`.
    ValueError: one of them is a mix, one of them would have no row in a batch, or their inputs
      differ in structure, shape or dtype once normalised.

  >>> from jaxdistill.examples import from_arrays
  >>> from jaxdistill.sources import on_device
  >>> def make(value, size):
  ...   examples = from_arrays(np.full((size, 2), value, np.float32), np.ones(size, np.int32))
  ...   return on_device(examples, batch_size=4, data_seed=0)
  >>> mix = mixed(make(0.0, 6), make(5.0, 8), share=0.25)
  >>> batch = mix.cut(mix.shared, jax.tree.map(lambda leaf: leaf[0], mix.items(0, 1)))
  >>> batch.inputs[:, 0].tolist(), batch.labelled.tolist(), mix.steps_per_epoch
  ([0.0, 0.0, 0.0, 5.0], [1.0, 1.0, 1.0, 0.0], 2)
  """
  for argument, one in (("source", source), ("transfer", transfer)):
    if not isinstance(one, Source):
      raise TypeError(
        f"{argument} must be a Source (from on_device, streamed or iterated), got "
        f"{type(one).__name__}."
      )
    if one.teacher is not None:
      raise ValueError(
        f"{argument} brings a teacher's outputs along: mix the sources first, and cache the mix."
      )
    if one.share:
      raise ValueError(f"{argument} is a mix itself; mixed takes two sources that are none.")
  if not isinstance(share, float | int | np.number) or not 0 < share < 1:
    raise ValueError(
      f"share={share} must lie between 0 and 1, without them: for no transfer data leave mixed "
      "out, for nothing else train on the transfer source with labelled all 0."
    )
  seen = [_normalised(one) for one in (source, transfer)]
  if seen[0] != seen[1]:
    raise ValueError(
      f"The inputs of {source.name!r} and of {transfer.name!r} must agree once normalised, but are "
      f"{seen[0]} and {seen[1]}: give both one shape and set of keys, and one dtype by normalize=."
    )

  known = [one.views for one in (source, transfer) if one.views is not None]

  def read(seed: int, batch: int, step: int, count: int, part: Part) -> PyTree:
    more = round(share * batch)
    if more > transfer.size:
      raise ValueError(
        f"share={share} of batch_size={batch} is {more} rows of transfer data, but "
        f"{transfer.name!r} has {transfer.size}: lower share or batch_size."
      )
    return {
      "source": source.read(seed, batch - more, step, count, part),
      "transfer": transfer.read(_other_seed(seed), more, step, count, part),
    }

  def cut(shared: PyTree, item: Mapping[str, Any]) -> Batch:
    mine = source.cut(shared[0], item["source"])
    more = transfer.cut(shared[1], item["transfer"])
    more = dataclasses.replace(
      more,
      labels=jnp.zeros_like(mine.labels, shape=more.labels.shape),
      labelled=jnp.zeros_like(more.labelled),
      index=more.index + jnp.int32(source.size),
    )
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), mine, more)

  return Source(
    shared=(source.shared, transfer.shared),
    cut=cut,
    read=read,
    size=source.size,
    batch_size=source.batch_size,
    data_seed=source.data_seed,
    num_classes=source.num_classes,
    normalize=source.normalize,
    stored=source.stored,
    views=max(known) if len(known) == 2 else None,
    name=f"{source.name} with {share:g} of {transfer.name}",
    share=share,
    version=" with ".join(v for v in (source.version, transfer.version) if v),
    augmentation=" with ".join(dict.fromkeys((source.augmentation, transfer.augmentation))),
    whole=_both(source, transfer),
  )


def _other_seed(seed: int) -> int:
  """The seed of a mix's transfer data."""
  # An odd factor and an even, fixed-point-free shift: seeds stay apart, and none maps to itself.
  return (seed * 2654435761 + 0x7472616E) % 2**32


def _both(source: Source, transfer: Source) -> Whole | None:
  """Every example of a mix: a batch has rows of both, and the smaller of the two comes again."""
  first, second = source.whole, transfer.whole
  if first is None or second is None:
    return None

  def every(seed: int, batch: int, view: int) -> Iterator[PyTree]:
    half = max(1, batch // 2)
    mine = _again(first, seed, half, view % (source.views or view + 1))
    more = _again(second, _other_seed(seed), half, view % (transfer.views or view + 1))
    for _ in range(-(-max(first.size, second.size) // half)):
      yield {"source": next(mine), "transfer": next(more)}

  def rows(items: PyTree) -> tuple[np.ndarray, np.ndarray]:
    mine, more = first.rows(items["source"]), second.rows(items["transfer"])
    return (
      np.concatenate([mine[0], more[0] + np.int32(source.size)], axis=1),
      np.concatenate([mine[1], more[1]], axis=1),
    )

  def ids() -> list[str]:
    return [f"source/{id}" for id in first.ids()] + [f"transfer/{id}" for id in second.ids()]

  return Whole(first.size + second.size, every, rows, ids)


def _again(whole: Whole, seed: int, batch_size: int, view: int) -> Iterator[PyTree]:
  while True:
    yield from whole.every(seed, batch_size, view)


def _normalised(source: Source) -> str:
  """A source's inputs as networks see them: structure, shapes and dtypes, as text."""
  batch = jax.tree.map(lambda one: jax.ShapeDtypeStruct((1, *one.shape), one.dtype), source.stored)
  made = jax.eval_shape(source.normalize, batch)
  return str(jax.tree.map(lambda one: f"{one.dtype}{list(one.shape[1:])}", made))
