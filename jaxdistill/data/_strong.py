"""Strong augmentation: a few of fourteen operations of random strength, and a grey square.

What the published codes of two views do with PIL, here inside the compiled program, with PIL's own
rounding: images are 0 .. 255 in whole numbers while they are changed, whatever they are stored as.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdistill import _check
from jaxdistill.data._views import Augmentation, check_augmentation, identity

__all__ = ["MOVES", "PIXELS", "changed", "moved", "rand_augment"]

Image = Float[Array, "H W C"]
Value = Float[Array, ""]
# Luminance, as PIL has it.
_GREY = (0.299, 0.587, 0.114)


def _grey(image: Image) -> Float[Array, "H W 1"]:
  """Luminance of RGB, in whole numbers; of other channels their mean."""
  channels = image.shape[-1]
  weights = _GREY if channels == 3 else (1 / channels,) * channels
  return jnp.round(image @ jnp.array(weights, jnp.float32)[:, None])


def _blended(degenerate: Image, image: Image, share: Value) -> Image:
  """PIL's blend, which cuts the fraction off."""
  return jnp.floor(degenerate + share * (image - degenerate))


def _autocontrast(image: Image, value: Value) -> Image:
  low, high = jnp.min(image, (0, 1), keepdims=True), jnp.max(image, (0, 1), keepdims=True)
  span = jnp.where(high > low, high - low, 255.0)
  # Whole numbers: 255 is to stay 255 where a quotient comes out a rounding below.
  stretched = jnp.floor((image - low) * 255.0 / span + 1e-3)
  return jnp.where(high > low, stretched, image)


def _equalize(image: Image, value: Value) -> Image:
  def channel(pixels: Any) -> Any:
    # PIL's table of a histogram, of which only how many pixels are darker is needed.
    ordered = jnp.sort(pixels)
    darker = jnp.searchsorted(ordered, pixels, side="left").astype(jnp.int32)
    brightest = jnp.sum(pixels == ordered[-1], dtype=jnp.int32)
    step = (jnp.int32(pixels.size) - brightest) // jnp.int32(255)
    spread = jnp.minimum((step // 2 + darker) // jnp.maximum(step, 1), 255)
    return jnp.where(step > 0, spread.astype(pixels.dtype), pixels)

  flat = image.reshape(-1, image.shape[-1])
  return jax.vmap(channel, in_axes=1, out_axes=1)(flat).reshape(image.shape)


def _posterize(image: Image, value: Value) -> Image:
  cell = 2.0 ** (8 - jnp.floor(value))  # that many of 8 bits are kept
  return jnp.floor(image / cell) * cell


def _sharpness(image: Image, value: Value) -> Image:
  if min(image.shape[:2]) < 3:
    return image
  around = sum(
    image[i : i + image.shape[0] - 2, j : j + image.shape[1] - 2]
    for i in range(3)
    for j in range(3)
  )
  smooth = jnp.floor((around + 4 * image[1:-1, 1:-1]) / 13 + 0.5)
  # The frame has no neighbours on one side, and stays.
  return _blended(image.at[1:-1, 1:-1].set(smooth), image, value)


# What changes pixels where they are: ``{name: (function of image and value, lowest, highest)}``.
PIXELS: dict[str, tuple[Callable[[Image, Value], Image], float, float]] = {
  "identity": (lambda image, value: image, 0.0, 1.0),
  "autocontrast": (_autocontrast, 0.0, 1.0),
  "brightness": (lambda image, value: jnp.floor(value * image), 0.05, 0.95),
  "color": (
    lambda image, value: _blended(jnp.broadcast_to(_grey(image), image.shape), image, value),
    0.05,
    0.95,
  ),
  "contrast": (
    lambda image, value: _blended(
      jnp.full(image.shape, jnp.floor(jnp.mean(_grey(image)) + 0.5)), image, value
    ),
    0.05,
    0.95,
  ),
  "equalize": (_equalize, 0.0, 1.0),
  "posterize": (_posterize, 4.0, 8.0),
  "sharpness": (_sharpness, 0.05, 0.95),
  "solarize": (lambda image, value: jnp.where(image < value, image, 255.0 - image), 0.0, 256.0),
}


def _rotation(value: Value, height: int, width: int) -> tuple[Any, ...]:
  angle = -jnp.deg2rad(value)
  cos, sin, x, y = jnp.cos(angle), jnp.sin(angle), width / 2, height / 2
  return cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y


# What moves pixels: the pixel at (x, y) is taken from (a x + b y + c, d x + e y + f).
MOVES: dict[str, tuple[Callable[..., tuple[Any, ...]], float, float]] = {
  "rotate": (_rotation, -30.0, 30.0),
  "shear_x": (lambda v, h, w: (1, v, 0, 0, 1, 0), -0.3, 0.3),
  "shear_y": (lambda v, h, w: (1, 0, 0, v, 1, 0), -0.3, 0.3),
  "translate_x": (lambda v, h, w: (1, 0, v * w, 0, 1, 0), -0.3, 0.3),
  "translate_y": (lambda v, h, w: (1, 0, 0, 0, 1, v * h), -0.3, 0.3),
}
_STAY = (1, 0, 0, 0, 1, 0)
_RANGES = tuple((low, high) for _, low, high in (*PIXELS.values(), *MOVES.values()))


def moved(image: Image, matrix: Float[Array, " six"]) -> Image:
  """The image with its pixels moved, black where none comes from: PIL's ``transform(AFFINE)``."""
  height, width, _ = image.shape
  a, b, c, d, e, f = matrix
  x, y = jnp.arange(width, dtype=jnp.float32)[None] + 0.5, jnp.arange(height) + 0.5
  y = y.astype(jnp.float32)[:, None]
  column, row = (jnp.floor(at).astype(jnp.int32) for at in (a * x + b * y + c, d * x + e * y + f))
  inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
  taken = image[jnp.clip(row, 0, height - 1), jnp.clip(column, 0, width - 1)]
  return jnp.where(inside[..., None], taken, 0.0)


def changed(image: Image, number: Any, share: Any) -> Image:
  """One of the operations, those of `PIXELS` before those of `MOVES`.

  Args:
    image: ``[H, W, C]`` in 0 .. 255, whole numbers as float32.
    number: which one, int32.
    share: 0 .. 1, how far from the lowest to the highest of its values.

  Returns:
    The image, likewise.
  """
  low, high = jnp.array(_RANGES, jnp.float32)[number]
  value = low + share * (high - low)
  # Under vmap all of a switch is computed: so each kind is one operation, and moves are one gather.
  matrices = [_STAY] * len(PIXELS) + [make(value, *image.shape[:2]) for make, *_ in MOVES.values()]
  matrix = jnp.stack([jnp.stack([jnp.float32(v) for v in row]) for row in matrices])[number]
  pixels = [function for function, *_ in PIXELS.values()]
  here = jnp.where(number < len(pixels), number, 0)
  return moved(jax.lax.switch(here, pixels, image, value), matrix)


def _uniform(key: Any, number: int) -> Value:
  """A number in [0, 1), by ``fold_in`` alone: no flag of JAX changes what a view shows."""
  word = jax.random.key_data(jax.random.fold_in(key, number))[0]
  return (word >> jnp.uint32(8)).astype(jnp.float32) * jnp.float32(2.0**-24)


def rand_augment(
  *,
  after: Augmentation = identity,
  operations: int = 2,
  largest: float = 255.0,
  cutout: float = 0.5,
) -> Augmentation:
  """Strong augmentation: a few of fourteen operations, and a grey square.

  Each operation is drawn from autocontrast, brightness, colour, contrast, equalising, none,
  posterising, rotation, sharpness, shears, solarising and translations, one after another and with
  replacement, its strength uniformly within its range; what moves in is black. Then a square of
  random place and size is made grey. As the published codes of CRLD and MLKD have it, after their
  crops and flips: ``two_views(crop_flip(4), rand_augment(after=crop_flip(4)))``.

  Args:
    after: what happens to the image before.
    operations: how many; 2 is published.
    largest: what white is in the images as stored: 255, or 16 of scikit-learn's digits.
    cutout: the largest side of the square, as a share of the width; 0.5 is published, 0 is none.

  Returns:
    An augmentation of images ``[H, W, C]`` with a random key in place of a numbered choice: views
    are finite where the source counts them (``views=8``). Labels that lie on the image have no
    view.

  Raises:
    TypeError, ValueError: an argument is out of its range; when it is applied: no image.

  Source: Cubuk, Zoph, Shlens, Le, "RandAugment: Practical Automated Data Augmentation with a
  Reduced Search Space", 2020, whose strength is the same for all; ranges and square are those of
  Zhang, Liu, Cai, Ma, "Cross-View Consistency Regularisation for Knowledge Distillation", 2024.

  >>> key = jax.random.key(0)
  >>> rand_augment(operations=1).apply(jnp.ones((8, 8, 3), jnp.uint8), key).shape
  (8, 8, 3)
  """
  check_augmentation(after, "after")
  if after.strong is not None:
    raise ValueError(f"after={after.name!r} has two views: give one of the two.")
  _check.whole("operations", operations, least=0)
  _check.number("largest", largest, above=0)
  _check.number("cutout", cutout, least=0, most=1)

  def apply(image: Any, key: Any) -> Array:
    if after.choices is None:
      image = after.apply(image, jax.random.fold_in(key, 0))
    else:
      image = after.apply(image, (_uniform(key, 0) * after.choices).astype(jnp.int32))
    if getattr(image, "ndim", 0) != 3:
      raise ValueError(f"rand_augment is of images [H, W, C], got {_check.show(image)}.")
    made = jnp.round(image.astype(jnp.float32) * (255.0 / largest))
    for turn in range(operations):
      number = (_uniform(key, 4 + 2 * turn) * len(_RANGES)).astype(jnp.int32)
      made = changed(made, number, _uniform(key, 5 + 2 * turn))
    made = _square(made, cutout * _uniform(key, 1), _uniform(key, 2), _uniform(key, 3))
    made = made * (largest / 255.0)
    return (made if jnp.issubdtype(image.dtype, jnp.floating) else jnp.round(made)).astype(
      image.dtype
    )

  name = f"rand_augment({operations}, {largest:g}, {cutout:g}) after {after.name}"
  return Augmentation(apply, None, name)


def _square(image: Image, share: Value, x: Value, y: Value) -> Image:
  """The image with a grey square, cut off at the edges."""
  height, width, _ = image.shape
  side = share * width
  left, top = (
    jnp.floor(jnp.maximum(at * length - side / 2, 0)) for at, length in ((x, width), (y, height))
  )
  columns, rows = jnp.arange(width, dtype=jnp.float32), jnp.arange(height, dtype=jnp.float32)
  # To the whole pixel and past it, as PIL draws a rectangle; nothing where there is no side.
  within = (columns >= left) & (columns <= jnp.floor(left + side))
  within = within[None] & ((rows >= top) & (rows <= jnp.floor(top + side)))[:, None]
  return jnp.where(within[..., None] & (side > 0), 127.0, image)
