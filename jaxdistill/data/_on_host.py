"""What happens to pictures on the host, as they are read: cut out, resized, their colours changed.

Pictures of many sizes become one size here, before a device sees them. What a view of an example
shows is a function of ``(data_seed, index, view)``, as it is on the device (`_views`): the same on
resume, in any process, thread or worker, and in a cache of a teacher's outputs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill import _check, _extras

__all__ = [
  "OnHost",
  "central_crop",
  "checked_steps",
  "colour_jitter",
  "named",
  "random_resized_crop",
  "shown_on_host",
]

# Tells these draws from those of an epoch's order, which have the same key without it.
_WORD = 0x686F7374
# By how much red, green and blue count in grey (ITU-R BT.601).
_GREY = np.array([0.299, 0.587, 0.114], np.float32)
# How often a rectangle is drawn before the middle is taken, as torchvision has it.
_TRIES = 10
Uniform = Callable[[], float]


@dataclasses.dataclass(frozen=True)
class OnHost:
  """One step of what `streamed` does with a picture when it is read.

  Attributes:
    apply: ``(image, uniform) -> image``: of NumPy's arrays ``[H, W, C]``, uint8 as they were
      decoded. ``uniform()`` draws numbers in ``[0, 1)``, which belong to this view of this example;
      nothing else may be random. A function of a module where ``workers`` read.
    name: tells augmentations apart, in a run's and a cache's identity.
  """

  apply: Callable[[np.ndarray, Uniform], np.ndarray]
  name: str


def random_resized_crop(
  size: int,
  *,
  scale: tuple[float, float] = (0.08, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
  flip: float = 0.5,
) -> OnHost:
  """A random rectangle of a picture, resized to a square, and mirrored or not.

  The rectangle's share of the area is uniform in ``scale``, the logarithm of its width over its
  height uniform in that of ``ratio``, its place uniform; after ten that do not fit, the largest one
  of an allowed ratio in the middle.

  Args:
    size: the edge of what comes out, in pixels.
    scale: of the area, between 0 and 1.
    ratio: of width to height, positive.
    flip: how likely the picture is mirrored.

  Returns:
    What `streamed` takes as ``on_host``.

  Raises:
    ValueError: a number is out of range.

  Source: Szegedy et al., "Going Deeper with Convolutions", 2015; the numbers and the ten tries are
  torchvision's ``RandomResizedCrop``.

  >>> draws = iter([0.5] * 9)
  >>> random_resized_crop(4).apply(np.ones((9, 12, 3), np.uint8), lambda: next(draws)).shape
  (4, 4, 3)
  """
  _extras.need("data.random_resized_crop", "cv2")
  _check.whole("size", size)
  _check_range("scale", scale, most=1.0)
  _check_range("ratio", ratio)
  if not 0 <= flip <= 1:
    raise ValueError(f"flip={flip} must lie in 0 .. 1: it is a probability.")
  bounds = (scale[0], scale[1]), (ratio[0], ratio[1])
  apply = functools.partial(_random_crop, size, *bounds, flip)
  numbers = f"{size}, {bounds[0]}, {tuple(round(r, 6) for r in bounds[1])}, {flip:g}"
  return OnHost(apply, f"random_resized_crop({numbers})")


def _random_crop(
  size: int,
  scale: tuple[float, float],
  ratio: tuple[float, float],
  flip: float,
  image: np.ndarray,
  uniform: Uniform,
) -> np.ndarray:
  high, wide = image.shape[:2]
  mirrored = uniform() < flip  # first, so that it does not depend on how many tries there were
  for _ in range(_TRIES):
    area = high * wide * _between(scale, uniform())
    aspect = math.exp(_between((math.log(ratio[0]), math.log(ratio[1])), uniform()))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= wide and 0 < h <= high:
      top, left = int(uniform() * (high - h + 1)), int(uniform() * (wide - w + 1))
      break
  else:
    aspect = min(max(wide / high, ratio[0]), ratio[1])
    w, h = min(wide, round(high * aspect)), min(high, round(wide / aspect))
    top, left = (high - h) // 2, (wide - w) // 2
  made = _resized(image[top : top + h, left : left + w], (size, size))
  return np.ascontiguousarray(made[:, ::-1]) if mirrored else made


def colour_jitter(
  *, brightness: float = 0.4, contrast: float = 0.4, saturation: float = 0.4
) -> OnHost:
  """Changes brightness, contrast and saturation, each by a random factor, in a random order.

  Args:
    brightness: factors are uniform in ``1 - brightness .. 1 + brightness``, not below 0; 0 changes
      nothing.
    contrast: likewise: differences to the mean grey.
    saturation: likewise: differences to a pixel's own grey.

  Returns:
    What `streamed` takes as ``on_host``, for pictures of red, green and blue in uint8.

  Raises:
    ValueError: a number is negative.

  Source: Howard, "Some Improvements on Deep Convolutional Neural Network Based Image
  Classification", 2013; 0.4 as in torch's ImageNet examples.
  """
  amounts = (brightness, contrast, saturation)
  for name, amount in zip(("brightness", "contrast", "saturation"), amounts, strict=True):
    _check.number(name, amount, least=0)
  name = f"colour_jitter({brightness:g}, {contrast:g}, {saturation:g})"
  return OnHost(functools.partial(_jittered, amounts), name)


def _jittered(
  amounts: tuple[float, float, float], image: np.ndarray, uniform: Uniform
) -> np.ndarray:
  if image.dtype != np.uint8 or image.shape[2:] != (3,):
    raise ValueError(
      f"colour_jitter is of pictures [H, W, 3] in uint8, got {image.dtype} of shape {image.shape}."
    )
  pixels = image.astype(np.float32)
  ranks = [uniform() for _ in amounts]
  for which in sorted(range(len(amounts)), key=ranks.__getitem__):
    low = max(0.0, 1 - amounts[which])
    factor = np.float32(_between((low, 1 + amounts[which]), uniform()))
    if which == 0:
      around: Any = np.float32(0)
    else:
      grey = pixels @ _GREY  # [H, W]
      around = grey.mean(dtype=np.float32) if which == 1 else grey[..., None]
    pixels = np.clip(around + factor * (pixels - around), 0, 255)
  made: np.ndarray = np.rint(pixels).astype(np.uint8)
  return made


def central_crop(size: int, *, edge: int | None = None) -> Callable[[np.ndarray], np.ndarray]:
  """What a network is tested on: a picture whose shorter edge is resized, and of it the middle.

  Args:
    size: the edge of what comes out, in pixels.
    edge: what the shorter edge becomes, at least ``size``; by default ``size * 256 / 224``, the
      share that Krizhevsky et al. (2012) began with and the field kept.

  Returns:
    A function of one picture, for ``transform=`` of `records` and of `Fields`.

  Raises:
    ValueError: a number is out of range.

  >>> central_crop(4)(np.ones((9, 12, 3), np.uint8)).shape
  (4, 4, 3)
  """
  _extras.need("data.central_crop", "cv2")
  _check.whole("size", size)
  edge = round(size * 256 / 224) if edge is None else edge
  _check.whole("edge", edge, least=size)
  return functools.partial(_central, size, edge)


def _central(size: int, edge: int, image: Any) -> np.ndarray:
  image = np.asarray(image)
  high, wide = image.shape[:2]
  share = edge / min(high, wide)
  resized = _resized(image, (max(size, round(wide * share)), max(size, round(high * share))))
  top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
  return np.ascontiguousarray(resized[top : top + size, left : left + size])


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """An image with another (width, height)."""
  import cv2  # the extra `data` has it; it lets other threads run meanwhile

  shrinks = size[0] * size[1] < image.shape[0] * image.shape[1]
  # Areas are averaged where pixels are lost: else every picture that is made smaller has moiré.
  way = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
  made: np.ndarray = cv2.resize(image, size, interpolation=way)
  return made.reshape(size[1], size[0], *image.shape[2:])  # OpenCV drops an axis of one channel


def _between(bounds: tuple[float, float], share: float) -> float:
  return bounds[0] + share * (bounds[1] - bounds[0])


def _check_range(name: str, bounds: Any, most: float = math.inf) -> None:
  if not isinstance(bounds, Sequence) or len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] <= most:
    upper = "" if most == math.inf else f", at most {most:g}"
    raise ValueError(f"{name}={bounds} must be (low, high), positive{upper}, low first.")


def checked_steps(on_host: Any) -> tuple[OnHost, ...]:
  """The steps that `streamed` was given.

  Args:
    on_host: one step, or a sequence of them.

  Raises:
    TypeError: something is no step.
  """
  steps = (on_host,) if isinstance(on_host, OnHost) else tuple(on_host)
  for step in steps:
    if not isinstance(step, OnHost):
      raise TypeError(
        f"on_host has {_check.show(step)}, and takes steps such as data.random_resized_crop(224)."
      )
  return steps


def named(steps: Sequence[OnHost], augmentation: str) -> str:
  """What an augmentation of both, on the host and then on the device, is called."""
  both = [step.name for step in steps] + [augmentation] * (augmentation != "identity")
  return " then ".join(both) or augmentation


def shown_on_host(
  steps: Sequence[OnHost], inputs: Any, data_seed: int, index: int, view: int
) -> Any:
  """One example's input as this view of it shows it.

  Args:
    steps: one after another.
    inputs: a picture ``[H, W, C]``.
    data_seed: ``0 .. 2**32 - 1``.
    index: which example.
    view: which view of it.

  Raises:
    TypeError: the inputs are a dict.
  """
  if isinstance(inputs, Mapping):
    raise TypeError(f"on_host is for one picture, but the inputs are a dict with {sorted(inputs)}.")
  image = np.asarray(inputs)
  for number, step in enumerate(steps):
    key = data_seed | (_WORD + number) << 64
    # Raw words, a stream that NumPy guarantees across versions, of which a double has 53 bits. The
    # counter's lowest word counts the draws.
    bits = np.random.Philox(key=key, counter=[0, 0, view, index])
    image = step.apply(image, functools.partial(_uniform, bits))
  return image


def _uniform(bits: np.random.Philox) -> float:
  return float((int(bits.random_raw()) >> 11) * 2.0**-53)
