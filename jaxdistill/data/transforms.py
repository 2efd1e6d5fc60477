"""Transforms of a batch, ``(key, Batch) -> Batch``, that both networks then see.

They run inside the compiled step, before the teacher and the student, so that the teacher answers
for the very inputs that the student gets. They are drawn anew at every step and are no views: a
teacher's outputs that were computed beforehand do not belong to them, and a batch that brings
``batch.teacher`` along can't be mixed.

Labels become ``[B, K]`` distributions in float32, which `losses.cross_entropy` takes, and masks
``[B, H, W]`` that lie on the images ``[B, H, W, K]``; but `cutmix` moves what lies on the images,
and leaves it what it was. A row (a pixel) without a label (``labelled`` 0) is all 0, whatever its
label was, and stays masked by ``labelled``.

Under `pmap` a device mixes the examples of its share, under ``jit`` those of the global batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import _check
from jaxdistill.types import Batch, Transform, compute_dtype

__all__ = ["compose", "cutmix", "mixup", "smooth_labels"]

PyTree = Any


def mixup(num_classes: int, *, concentration: float = 0.2) -> Transform:
  """Mixes every example with another one of the batch, inputs and labels alike.

  λ · x_i + (1 − λ) · x_j and λ · y_i + (1 − λ) · y_j with λ ~ Beta(concentration, concentration),
  one λ for the batch and the partners j a permutation of it, as in the authors' code.

  A mixed example is labelled if both of its parts are (where a tenth is labelled, a hundredth of
  the pairs is), weighs the product of their weights (so that a padded row counts nowhere), and
  keeps i's ``index`` and ``view``.

  Args:
    num_classes: K.
    concentration: > 0; towards 0 examples stay as they are, 1 mixes in any proportion. 0.2 is the
      paper's for ImageNet (1 for CIFAR).

  Returns:
    ``(key, batch) -> batch``. ``batch.inputs`` is a floating array ``[B, ...]`` or a tree of them,
    mixed in float32 (or float64) and of the dtype it was; ``batch.labels`` is ``[B]`` integers or
    ``[B, K]`` floats, or on images ``[B, H, W]`` integers or ``[B, H, W, K]`` floats, of which a
    mixed pixel is labelled if both of its parts are. Masks take K times their memory: `cutmix`
    leaves them integers.

  Raises:
    ValueError: ``num_classes`` or ``concentration`` is out of range; and when traced: the inputs
      are integers, the labels neither of the two, or the batch brings its teacher's outputs.

  Source: Zhang, Cisse, Dauphin, Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", 2018.

  >>> batch = Batch(jnp.zeros((2, 3)), jnp.array([1, 0]), jnp.ones(2), jnp.ones(2), None, None)
  >>> mixed = mixup(4, concentration=1.0)(jax.random.key(0), batch)
  >>> mixed.labels.shape, mixed.labels.sum(axis=1).tolist()
  ((2, 4), [1.0, 1.0])
  """

  def mixed(key: Any, inputs: PyTree, partner: jax.Array) -> tuple[PyTree, jax.Array, None]:
    share = _beta(key, concentration)

    def mix(path: Any, x: Any) -> jax.Array:
      x = jnp.asarray(x)
      if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
          f"mixup averages inputs, and inputs{jax.tree_util.keystr(path)} is {x.dtype}; normalise "
          "to floats first (normalize=... of the data source), or use cutmix."
        )
      dtype = compute_dtype(x)
      return _blend(share, x.astype(dtype), x[partner].astype(dtype)).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(mix, inputs), share, None

  return _mixer("mixup", num_classes, concentration, mixed)


def cutmix(num_classes: int, *, concentration: float = 1.0) -> Transform:
  """Pastes a box of another image of the batch into every image.

  λ ~ Beta(concentration, concentration) and a centre, uniform over the pixels, are drawn once for
  the batch; the box has sides ⌊H √(1 − λ)⌋ and ⌊W √(1 − λ)⌋, made even, and is cut off at the
  image's edges. Labels are λ' · y_i + (1 − λ') · y_j, where 1 − λ' is the exact share of the pixels
  that came from j. Partners are a permutation of the batch; ``labelled`` and ``weight`` are the
  products of both parts', ``index`` and ``view`` those of i, as `mixup` has them.

  Labels that lie on the images (masks, depths: ``[B, H, W, ...]``) are pasted as the images are,
  with which of their pixels are labelled, and weigh if they have weights: exactly, of the dtype
  that they were. A weight ``[B]`` is the product of both parts' there too.

  Args:
    num_classes: K; of no account where the labels lie on the images.
    concentration: > 0. 1, the paper's, makes λ uniform. The authors' code leaves half of CIFAR's
      batches as they are; this one mixes every batch, as theirs does for ImageNet.

  Returns:
    ``(key, batch) -> batch``. ``batch.inputs`` is images ``[B, H, W, C]`` of any dtype, or a tree
    of them with one H and W; ``batch.labels`` is ``[B]`` integers or ``[B, K]`` floats, or
    anything ``[B, H, W, ...]``.

  Raises:
    ValueError: ``num_classes`` or ``concentration`` is out of range; and when traced: the inputs
      are no images, the labels neither of the two, or the batch brings its teacher's outputs.

  Source: Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable
  Features", 2019.

  >>> images = jnp.arange(2.0).reshape(2, 1, 1, 1) * jnp.ones((2, 4, 4, 1))
  >>> batch = Batch(images, jnp.array([0, 1]), jnp.ones(2), jnp.ones(2), None, None)
  >>> mixed = cutmix(2)(jax.random.key(0), batch)
  >>> bool(jnp.all(mixed.inputs.mean(axis=(1, 2, 3)) == mixed.labels[:, 1]))
  True
  """

  def pasted(key: Any, inputs: PyTree, partner: jax.Array) -> tuple[PyTree, jax.Array, jax.Array]:
    inside, share = _box(key, *_image_size(inputs), concentration)
    return jax.tree.map(lambda x: _paste(jnp.asarray(x), partner, inside), inputs), share, inside

  return _mixer("cutmix", num_classes, concentration, pasted)


def smooth_labels(num_classes: int, *, amount: float = 0.1) -> Transform:
  """Spreads a share of every label evenly over the classes.

  (1 − amount) · y + amount / K. Inputs stay as they are. It commutes with `mixup` and `cutmix`, and
  with integer labels is `losses.cross_entropy`'s ``label_smoothing``.

  Args:
    num_classes: K.
    amount: in [0, 1]; 0.1 is the paper's.

  Returns:
    ``(key, batch) -> batch``. ``batch.labels`` is ``[B]`` integers or ``[B, K]`` floats, or on
    images ``[B, H, W]`` integers or ``[B, H, W, K]`` floats; the key is not used.

  Raises:
    ValueError: ``num_classes`` or ``amount`` is out of range; when traced: the labels are neither.

  Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016.

  >>> labels, known = jnp.array([1, 0]), jnp.array([1.0, 0.0])
  >>> batch = Batch(jnp.zeros((2, 3)), labels, jnp.ones(2), known, None, None)
  >>> smooth_labels(2, amount=0.5)(jax.random.key(0), batch).labels.tolist()
  [[0.25, 0.75], [0.0, 0.0]]
  """
  _check_classes(num_classes)
  if isinstance(amount, str) or amount is None or not 0 <= amount <= 1:
    raise ValueError(f"amount={amount} must be in [0, 1]: the share that is spread, such as 0.1.")

  def transform(key: Any, batch: Batch) -> Batch:
    del key
    labels = _distributions("smooth_labels", batch, num_classes)
    keep, spread = (jnp.asarray(v, labels.dtype) for v in (1 - amount, amount / num_classes))
    return dataclasses.replace(batch, labels=_where_labelled(batch, keep * labels + spread))

  return transform


def compose(*transforms: Transform) -> Transform:
  """One transform after another, each with a key of its own.

  Args:
    *transforms: ``(key, batch) -> batch``; the first is applied first. None of them leaves a batch
      as it is.

  Returns:
    ``(key, batch) -> batch``.

  Raises:
    TypeError: one of them can't be called.

  >>> batch = Batch(jnp.zeros((1, 3)), jnp.array([1]), jnp.ones(1), jnp.ones(1), None, None)
  >>> both = compose(smooth_labels(2, amount=0.5), mixup(2))
  >>> both(jax.random.key(0), batch).labels.tolist()
  [[0.25, 0.75]]
  """
  for i, transform in enumerate(transforms):
    if not callable(transform):
      raise TypeError(
        f"transforms[{i}]={transform!r} must be a function (key, batch) -> batch; give "
        "compose(first, second), not a list of them."
      )

  def composed(key: Any, batch: Batch) -> Batch:
    for i, transform in enumerate(transforms):
      batch = transform(jax.random.fold_in(key, i), batch)
    return batch

  return composed


def _beta(key: Any, concentration: float) -> jax.Array:
  """A number from Beta(concentration, concentration): G / (G + G') of two gamma variables."""
  shape = jnp.asarray(concentration, jnp.float32)
  # By their logarithms, since small concentrations underflow; and in one draw, where
  # jax.random.beta compiles two of the same.
  mine, other = jax.random.loggamma(key, shape, (2,), jnp.float32)
  return jax.nn.sigmoid(mine - other)


def _blend(share: jax.Array, mine: jax.Array, others: jax.Array) -> jax.Array:
  share = share.astype(mine.dtype)
  return share * mine + (1 - share) * others


def _box(key: Any, height: int, width: int, concentration: float) -> tuple[jax.Array, jax.Array]:
  """Which pixels ``[H, W]`` are pasted, and the exact share of those that are not."""
  share_key, row_key, column_key = jax.random.split(key, 3)
  side = jnp.sqrt(1 - _beta(share_key, concentration))

  def within(centre_key: Any, length: int) -> jax.Array:
    half = jnp.floor(side * length).astype(jnp.int32) // 2
    centre = jax.random.randint(centre_key, (), 0, length, jnp.int32)
    at = jnp.arange(length, dtype=jnp.int32)
    return (at >= centre - half) & (at < centre + half)

  # Cut off at the edges, so that the area is counted from the pixels and not from λ.
  rows, columns = within(row_key, height), within(column_key, width)
  area = jnp.sum(rows, dtype=jnp.int32) * jnp.sum(columns, dtype=jnp.int32)
  share = 1 - area.astype(jnp.float32) / (height * width)
  return rows[:, None] & columns[None, :], share


def _image_size(inputs: PyTree) -> tuple[int, int]:
  shapes = [tuple(np.shape(leaf)) for leaf in jax.tree.leaves(inputs)]
  sizes = {shape[1:3] for shape in shapes}
  if any(len(shape) != 4 for shape in shapes) or len(sizes) != 1:
    raise ValueError(
      f"cutmix pastes into images [B, H, W, C] of one size, and inputs have shapes {shapes}; use "
      "mixup, or reshape them."
    )
  return sizes.pop()


def _paste(x: jax.Array, partner: jax.Array, inside: jax.Array) -> jax.Array:
  """``[B, H, W, ...]`` with one box ``[H, W]`` of all of the batch taken from the partners."""
  return jnp.where(jnp.expand_dims(inside, (0, *range(3, x.ndim))), x[partner], x)


def _mixer(
  by: str,
  num_classes: int,
  concentration: float,
  mix: Callable[[Any, PyTree, jax.Array], tuple[PyTree, jax.Array, jax.Array | None]],
) -> Transform:
  """A transform: ``mix(key, inputs, partner) -> (inputs, share, box)`` mixes each with its partner.

  ``box`` is which pixels came from it, where that can be said.
  """
  _check_classes(num_classes)
  _check_concentration(concentration)

  def transform(key: Any, batch: Batch) -> Batch:
    _check_mixable(by, batch)
    # One share and one permutation for the whole batch, as published: [] and [B].
    share_key, partner_key = jax.random.split(key)
    partner = jax.random.permutation(partner_key, batch.labels.shape[0])
    inputs, share, inside = mix(share_key, batch.inputs, partner)
    if inside is not None and _lie_on_images(batch):
      return _with_pasted_labels(dataclasses.replace(batch, inputs=inputs), partner, inside)
    labels = _distributions(by, batch, num_classes)
    weight, labelled = (jnp.asarray(v) for v in (batch.weight, batch.labelled))
    batch = dataclasses.replace(
      batch, inputs=inputs, weight=weight * weight[partner], labelled=labelled * labelled[partner]
    )
    # What was half a label is none now.
    mixed = _where_labelled(batch, _blend(share, labels, labels[partner]))
    return dataclasses.replace(batch, labels=mixed)

  return transform


def _lie_on_images(batch: Batch) -> bool:
  """Whether labels are ``[B, H, W, ...]`` beside images ``[B, H, W, C]``."""
  size = jnp.shape(batch.labels)[1:3]
  shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batch.inputs)]
  return len(size) == 2 and any(len(shape) == 4 and shape[1:3] == size for shape in shapes)


def _with_pasted_labels(batch: Batch, partner: jax.Array, inside: jax.Array) -> Batch:
  """A batch whose labels, and what says which of them count, moved with the boxes."""
  labels, labelled, weight = (jnp.asarray(v) for v in (batch.labels, batch.labelled, batch.weight))

  def by_pixel(x: jax.Array) -> jax.Array:
    of_each = jnp.expand_dims(x, tuple(range(x.ndim, 3)))
    return jnp.broadcast_to(of_each, (*labels.shape[:3], *x.shape[3:]))

  return dataclasses.replace(
    batch,
    labels=_paste(labels, partner, inside),
    # A box of an image without labels has none; the pixels around it keep theirs.
    labelled=_paste(by_pixel(labelled), partner, inside),
    weight=weight * weight[partner]
    if weight.ndim == 1
    else _paste(by_pixel(weight), partner, inside),
  )


def _distributions(by: str, batch: Batch, num_classes: int) -> jax.Array:
  """Labels as ``[B, K]``, or ``[B, H, W, K]`` on images; all 0 where there is none."""
  labels = jnp.asarray(batch.labels)
  whole = jnp.issubdtype(labels.dtype, jnp.integer)
  # Without the axis of classes: of each example, or of each of its pixels.
  axes = labels.ndim if whole else labels.ndim - 1
  known = axes == 1 or (axes == 3 and _lie_on_images(batch))
  if whole and known:
    # In int32, since one_hot counts the classes in the labels' dtype and a uint8 would wrap.
    labels = jax.nn.one_hot(labels.astype(jnp.int32), num_classes, dtype=jnp.float32)
  elif not known or labels.shape[-1] != num_classes:
    raise ValueError(
      f"{by}({num_classes}) needs labels [B] of integers or [B, {num_classes}] of floats (or "
      f"[B, H, W] and [B, H, W, {num_classes}] on images of that size), got {labels.dtype} of "
      f"shape {labels.shape}; give num_classes of the data, or jax.nn.one_hot."
    )
  return _where_labelled(batch, labels.astype(compute_dtype(labels)))


def _where_labelled(batch: Batch, labels: jax.Array) -> jax.Array:
  # Replaced, not multiplied: what stands for an unknown label may be NaN.
  known = jnp.asarray(batch.labelled)
  return jnp.where(jnp.expand_dims(known, tuple(range(known.ndim, labels.ndim))) != 0, labels, 0)


def _check_mixable(by: str, batch: Batch) -> None:
  if batch.teacher is not None:
    raise ValueError(
      f"{by}: the batch brings batch.teacher along, which answered for inputs that are not mixed; "
      f"give fit a teacher that sees the batch, or leave {by} out."
    )


def _check_classes(num_classes: int) -> None:
  _check.whole("num_classes", num_classes, instead=": the width of the logits")


def _check_concentration(concentration: float) -> None:
  if isinstance(concentration, str) or concentration is None or not 0 < concentration < math.inf:
    raise ValueError(
      f"concentration={concentration} must be positive, such as 0.2; to mix nothing, leave the "
      "transform out."
    )
