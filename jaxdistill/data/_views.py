"""What an epoch shows: its order, the views of an example, augmentation and normalisation.

Everything random here is a function of numbers: an epoch's order of ``(data_seed, epoch)``, what a
view shows of ``(data_seed, index, view)``; what its second look shows, of the same and a word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32, Integer, PyTree, Shaped

from jaxdistill import _check

__all__ = [
  "CIFAR",
  "DIGITS",
  "Arithmetic",
  "Augmentation",
  "Normalize",
  "augment",
  "augment_labels",
  "check_augmentation",
  "check_seed",
  "choice",
  "crop",
  "crop_flip",
  "divide_by",
  "epoch_order",
  "identity",
  "normalizer",
  "two_views",
]

# A function of a batch of inputs; or (mean, standard deviation) by channel; or None.
Normalize = Callable[[Any], Any] | tuple[tuple[float, ...], tuple[float, ...]] | None
# The word of a key that a plain seed leaves 0, so that no view shares its bits with a dropout mask.
_VIEWS = np.uint32(0x76696577)
# That of the strong looks, which must not follow from the weak ones.
_STRONG = np.uint32(0x7374726F)


class Arithmetic:
  """A normalisation by arithmetic alone: NumPy's arrays give NumPy's, and compile nothing."""


@dataclasses.dataclass(frozen=True)
class _Divided(Arithmetic):
  """As float32, divided; a value, so that all of the same number are compiled for once."""

  largest: float

  def __call__(self, inputs: Any) -> Array | np.ndarray:
    _check_one_array("divide_by", inputs, f"divide_by({self.largest:g})")
    return inputs.astype(np.float32) / np.float32(self.largest)


def divide_by(largest: float) -> Callable[[Any], Any]:
  """A normalisation that casts to float32 and divides.

  Args:
    largest: what becomes 1.

  Returns:
    A function of the inputs, of any shape.

  >>> divide_by(16.0)(jnp.array([0, 8, 16], jnp.uint8)).tolist()
  [0.0, 0.5, 1.0]
  """
  _check.number("largest", largest, above=0)
  return _Divided(float(largest))


# The channels' mean and standard deviation over CIFAR-100's training pixels, scaled to 0 .. 1, as
# distillation code has them since RepDistiller (Tian et al., Contrastive Representation
# Distillation, 2020).
CIFAR = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
# scikit-learn's digits are stored as 0 .. 16.
DIGITS = divide_by(16.0)


def normalizer(normalize: Normalize) -> Callable[[Any], Any]:
  """The function that a ``normalize`` argument stands for.

  Args:
    normalize: a function of the inputs ``[B, ...]`` (of the dict of them, where there are several);
      or ``(mean, std)`` over the last axis, for one array of inputs in 0 .. 1 (uint8 is divided by
      255 first); or None, which scales every uint8 array to 0 .. 1 and leaves others alone.

  Returns:
    A pure function of the inputs; float32 where they were uint8.

  Raises:
    ValueError: ``(mean, std)`` is not two rows of one length, or a std is not positive; when it is
      applied: to a dict, to another number of channels, or to uint8 and it is of 0 .. 255.

  >>> float(normalizer(((0.5,), (0.25,)))(jnp.full((1, 2, 2, 1), 255, jnp.uint8))[0, 0, 0, 0])
  2.0
  """
  if callable(normalize):
    _check.function("normalize", normalize, "of the inputs [B, ...]", arguments=1)
    return normalize
  if normalize is None:
    return _Scaled()
  if isinstance(normalize, str) or not hasattr(normalize, "__len__") or len(normalize) != 2:
    raise ValueError(f"normalize must be (mean, std), a function or None, got {normalize!r}.")
  channels = np.shape(normalize[0])
  if len(channels) != 1 or np.shape(normalize[1]) != channels or not _positive(*normalize):
    raise ValueError(
      "normalize=(mean, std) needs one mean and one positive std for each channel, got "
      f"{normalize!r}."
    )
  mean, std = (tuple(np.asarray(row, np.float64).tolist()) for row in normalize)
  return _Standardized(mean, std)


@dataclasses.dataclass(frozen=True)
class _Standardized(Arithmetic):
  """Less the mean, by the std."""

  mean: tuple[float, ...]
  std: tuple[float, ...]

  def __call__(self, inputs: Any) -> Array | np.ndarray:
    _check_one_array("normalize=(mean, std)", inputs, "data.normalizer((mean, std))")
    channels = len(self.mean)
    if 1 not in (channels, inputs.shape[-1]) and channels != inputs.shape[-1]:
      raise ValueError(
        f"normalize=(mean, std) is of {channels} channels, but the inputs {inputs.shape} have "
        f"{inputs.shape[-1]} on their last axis: give as many, or one for all."
      )
    scale = 255.0 if inputs.dtype == jnp.uint8 else 1.0
    if scale > 1 and max(self.mean + self.std) > 1:  # no numbers in 0 .. 1 have these
      raise ValueError(
        f"normalize={(self.mean, self.std)} is of numbers up to 255, and inputs of uint8 are "
        "divided by 255 first: divide mean and std by 255, or give a function."
      )
    shape = (1,) * (inputs.ndim - 1) + (-1,)
    # A difference and a quotient leave the compiler nothing to fuse into other bits.
    mean, std = (
      np.multiply(v, scale).astype(np.float32).reshape(shape) for v in (self.mean, self.std)
    )
    return (inputs.astype(np.float32) - mean) / std


def _positive(mean: Any, std: Any) -> bool:
  return bool(
    np.all(np.isfinite(mean)) and np.all(np.isfinite(std)) and np.all(np.asarray(std) > 0)
  )


@dataclasses.dataclass(frozen=True)
class _Scaled(Arithmetic):
  """Every array of uint8 scaled to 0 .. 1."""

  def __call__(self, inputs: Any) -> Any:
    return jax.tree.map(_scaled, inputs)


def _scaled(leaf: Any) -> Any:
  if leaf.dtype == np.uint16 and leaf.ndim > 3:
    raise ValueError(
      f"the inputs {leaf.shape} are uint16, of which nobody but you knows what is white: give "
      "normalize=data.divide_by(65535.0) (4095.0 for 12 bits), or (mean, std) and floats."
    )
  return divide_by(255.0)(leaf) if leaf.dtype == np.uint8 else leaf


def _check_one_array(what: str, inputs: Any, instead: str) -> None:
  """Raises where a function of one array meets a dict of inputs."""
  if isinstance(inputs, Mapping):
    key = sorted(inputs)[0]
    raise ValueError(
      f"{what} is for one array, but the inputs are a dict with {sorted(inputs)}: pass a function "
      f"that says which, e.g. lambda inputs: {{**inputs, {key!r}: {instead}(inputs[{key!r}])}}."
    )


def epoch_order(data_seed: int, epoch: int, size: int) -> Int32[np.ndarray, " size"]:
  """The order in which an epoch shows the examples: a permutation of ``0 .. size-1``.

  The rows sorted by raw Philox words, a stream that NumPy guarantees across versions; JAX, its
  version, its flags and its devices have no part in it.

  Args:
    data_seed: ``0 .. 2**32 - 1``.
    epoch: counted from 0.
    size: the number of examples.

  Returns:
    ``[size]`` int32.

  >>> sorted(epoch_order(0, 3, 5).tolist())
  [0, 1, 2, 3, 4]
  """
  check_seed(data_seed)
  # The counter's lowest word counts the draws, so that epochs cannot overlap.
  bits = np.random.Philox(key=data_seed, counter=[0, 0, 0, epoch])
  return np.argsort(bits.random_raw(size), kind="stable").astype(np.int32)


def _view_key(data_seed: Any, index: Any, word: np.uint32 = _VIEWS) -> Array:
  """The key of an example's views."""
  # The implementation by name: a user's default_prng_impl would change what every view shows.
  words = jnp.stack([word, jnp.asarray(data_seed, jnp.uint32)])
  return jax.random.fold_in(jax.random.wrap_key_data(words, impl="threefry2x32"), index)


def choice(
  data_seed: Integer[Any, ""] | int,
  index: Integer[Any, ""] | int,
  view: Integer[Any, ""] | int,
  choices: int,
) -> Int[Array, ""]:
  """Which of finitely many augmentations a view of an example shows.

  Views ``0 .. choices-1`` of an example run through all choices in a random order of its own, the
  next ``choices`` views through all of them in another. The order is uniform over all
  permutations: every view of a round gets a random word, and shows the rank of its own. That costs
  ``choices`` hashes and comparisons, no sort: 0.3 ms for a batch of 128 and 162 choices on one CPU
  core. The words come from threefry's ``fold_in`` alone, so that no flag of JAX changes them.

  Args:
    data_seed: ``0 .. 2**32 - 1``.
    index: which example.
    view: which view of it, from 0.
    choices: how many augmentations there are.

  Returns:
    A number in ``0 .. choices-1``, int32.

  >>> shown = jax.jit(jax.vmap(lambda view: choice(0, 7, view, 4)))(jnp.arange(4))
  >>> sorted(shown.tolist())
  [0, 1, 2, 3]
  """
  return _choice(data_seed, index, view, choices, _VIEWS)


def _choice(data_seed: Any, index: Any, view: Any, choices: int, word: np.uint32) -> Array:
  if choices == 1:
    return jnp.zeros((), jnp.int32)
  view = jnp.asarray(view, jnp.int32)
  mine = view % jnp.int32(choices)
  candidates = jnp.arange(choices, dtype=jnp.int32)
  # One word for each view of this round, of which there are as many as choices.
  keys = jax.vmap(jax.random.fold_in, (None, 0))(
    _view_key(data_seed, index, word), view - mine + candidates
  )
  words = jax.random.key_data(keys)[:, 0]
  # Its rank among the round's words: a permutation without a sort. Ties go by the view's number.
  before = (words < words[mine]) | ((words == words[mine]) & (candidates < mine))
  return jnp.sum(before, dtype=jnp.int32)


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """What may happen to an input before it is normalised; never changes its shape or dtype.

  Attributes:
    apply: ``(input, choice) -> input`` for one example (the dict of its inputs, where there are
      several), pure, to be mapped over a batch: ``choice``
      is a number in ``0 .. choices-1`` (int32), or a random key where ``choices`` is None.
    choices: how many augmentations there are; None for infinitely many.
    name: tells augmentations apart, in a cache of a teacher's outputs.
    on_labels: ``(labels, choice) -> labels`` for one example whose labels lie on its image,
      ``[H, W, ...]``: what moves the image moves them too, and gives 0 where nothing was. It is
      called with what says which of them count, too. None where nothing says what becomes of them.
    strong: a second augmentation, of which a batch shows a look beside this one's: `two_views`.
  """

  apply: Callable[[Any, Any], Any]
  choices: int | None
  name: str = "custom"
  on_labels: Callable[[Any, Any], Any] | None = None
  strong: Augmentation | None = None

  def __post_init__(self) -> None:
    if self.choices is not None and self.choices < 1:
      raise ValueError(f"choices must be at least 1, or None, got {self.choices}.")


def _as_it_is(inputs: Any, number: Any) -> Any:
  return inputs


identity = Augmentation(_as_it_is, choices=1, name="identity", on_labels=_as_it_is)


def crop(padding: int) -> Augmentation:
  """Random crops of a padded image, all numbered: shifts by up to ``padding`` pixels.

  The image is framed by ``padding`` black pixels (before normalisation) and a crop of the old size
  is taken out of it: ``(2 * padding + 1)**2`` choices. Choice c is the crop at row ``c // n`` and
  column ``c % n``, with ``n = 2 * padding + 1``; the middle one is the image itself.

  Args:
    padding: in pixels, not negative; 0 is `identity`.

  Returns:
    An augmentation of images ``[H, W, C]``, and of labels that lie on them: beyond the image's edge
    there are none.

  Raises:
    ValueError: ``padding`` is negative.

  >>> crop(1).apply(jnp.arange(4).reshape(2, 2, 1), jnp.int32(0))[..., 0].tolist()
  [[0, 0], [0, 0]]
  """
  _check.whole("padding", padding, least=0)
  if padding == 0:
    return identity
  positions = 2 * padding + 1

  def apply(image: Any, number: Any) -> Array:
    if isinstance(image, Mapping):
      key = "image" if "image" in image else sorted(image)[0]
      raise ValueError(
        f"crops are of images [H, W, C], but the inputs are a dict with {sorted(image)}: make an "
        "Augmentation that says which of them, e.g. Augmentation(lambda inputs, number: "
        f"{{**inputs, {key!r}: crops.apply(inputs[{key!r}], number)}}, choices=crops.choices)."
      )
    if image.ndim != 3:
      raise ValueError(f"crops are of images [H, W, C], got inputs of shape {image.shape}.")
    return shifted(image, number)

  def shifted(maps: Any, number: Any) -> Array:
    # A slice of a framed image [H, W, ...] at a start that is data: one program for all choices.
    framed = jnp.pad(maps, ((padding, padding),) * 2 + ((0, 0),) * (maps.ndim - 2))
    start = (number // jnp.int32(positions), number % jnp.int32(positions))
    return jax.lax.dynamic_slice(framed, start + (jnp.int32(0),) * (maps.ndim - 2), maps.shape)

  return Augmentation(apply, positions**2, f"crop({padding})", on_labels=shifted)


def crop_flip(padding: int = 4) -> Augmentation:
  """Random crops and their mirror images, all numbered: what CIFAR is trained with.

  Choice c is `crop`'s choice ``c // 2``, mirrored where c is odd: 162 choices for padding 4.

  Args:
    padding: in pixels; 4 as in He et al., Deep Residual Learning, 2016.

  Returns:
    An augmentation of images ``[H, W, C]``, and of labels that lie on them, as `crop` has it.

  Raises:
    ValueError: ``padding`` is negative.
  """
  crops = crop(padding)

  def mirrored(move: Any) -> Callable[[Any, Any], Array]:
    def apply(image: Any, number: Any) -> Array:
      cropped = move(image, number // jnp.int32(2))
      return jnp.where(number % jnp.int32(2) == 1, cropped[:, ::-1], cropped)

    return apply

  return Augmentation(
    mirrored(crops.apply),
    choices=2 * (crops.choices or 1),
    name=f"crop_flip({padding})",
    on_labels=mirrored(crops.on_labels),
  )


def two_views(weak: Augmentation, strong: Augmentation) -> Augmentation:
  """Two looks at every example in a batch: weakly augmented, and strongly.

  A batch's inputs are ``{"weak": inputs, "strong": inputs}``, each normalised, and all else is the
  example's and there once: label, mask, weight, ``index`` and ``view``. Networks see both by
  `jaxdistill.recipes.with_views`. A view's number decides both looks, the strong one by a word of
  its own, so that the same augmentation twice is two looks; views that are counted
  (``views=8``) show each pair again, and a cache of a teacher that sees both is exact. `mixup` and
  `cutmix` mix both looks of an example with those of the same other one. Evaluation and the
  deployed network have one input, as stored.

  Args:
    weak: as published, crops and flips: `crop_flip`.
    strong: `rand_augment` after those, say.

  Returns:
    An augmentation for any source.

  Raises:
    TypeError: one of the two is no augmentation.
    ValueError: one of the two has two views itself.

  >>> pair = two_views(crop(1), crop(1))
  >>> made = augment(pair, jnp.arange(32.0).reshape(2, 4, 4, 1), 0, jnp.arange(2), 0)
  >>> sorted(made), made["weak"].shape, bool(jnp.all(made["weak"] == made["strong"]))
  (['strong', 'weak'], (2, 4, 4, 1), False)
  """
  for name, one in (("weak", weak), ("strong", strong)):
    check_augmentation(one, name)
    if one.strong is not None:
      raise ValueError(f"{name}={one.name!r} has two views itself: give one that has one.")
  return dataclasses.replace(weak, name=f"two_views({weak.name}, {strong.name})", strong=strong)


def augment(
  augmentation: Augmentation,
  inputs: PyTree[Shaped[Any, "B ..."]],
  data_seed: Integer[Any, ""] | int,
  index: Integer[Any, " B"],
  view: Integer[Any, ""] | int,
) -> PyTree[Shaped[Any, "B ..."]]:
  """Augments a batch: each example by the choice, or the key, of this view of it.

  Args:
    augmentation: what may happen.
    inputs: as stored: an array, or a dict of them.
    data_seed: ``0 .. 2**32 - 1``.
    index: which examples these are.
    view: which view of them, from 0.

  Returns:
    Inputs of the same shape and dtype; of `two_views`, a dict of them.

  Raises:
    ValueError: the augmentation changes structure, shape or dtype.

  >>> images = jnp.ones((2, 4, 4, 1), jnp.uint8)
  >>> made = jax.jit(lambda view: augment(crop_flip(1), images, 0, jnp.arange(2), view))(5)
  >>> made.shape, made.dtype.name
  ((2, 4, 4, 1), 'uint8')
  """
  weak = _augmented(augmentation, inputs, data_seed, index, view, _VIEWS)
  if augmentation.strong is None:
    return weak
  strong = _augmented(augmentation.strong, inputs, data_seed, index, view, _STRONG)
  return {"weak": weak, "strong": strong}


def _augmented(
  augmentation: Augmentation, inputs: PyTree, data_seed: Any, index: Any, view: Any, word: np.uint32
) -> PyTree:
  """One look at each example."""
  if augmentation.apply is identity.apply:
    return inputs
  chosen = _chosen(augmentation, data_seed, index, view, word)
  # Each example by its own index, seed and view, so that the batch it comes in does not matter:
  # what a cache of a teacher's outputs relies on.
  made = jax.vmap(augmentation.apply)(inputs, chosen)
  before, after = (jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", t) for t in (inputs, made))
  if before != after:
    raise ValueError(
      f"An augmentation keeps the inputs' shapes and dtypes, but {before} became {after}: resize "
      "when the data is read, scale in normalize=."
    )
  return made


def _chosen(
  augmentation: Augmentation, data_seed: Any, index: Any, view: Any, word: np.uint32 = _VIEWS
) -> Array:
  """What `Augmentation.apply` is told of each example, ``[B]``: a choice, or a key."""
  choices = augmentation.choices
  if choices is None:
    return jax.vmap(lambda i: jax.random.fold_in(_view_key(data_seed, i, word), view))(index)
  return jax.vmap(lambda i: _choice(data_seed, i, view, choices, word))(index)


def augment_labels(
  augmentation: Augmentation,
  inputs: PyTree[Shaped[Any, "B ..."]],
  labels: dict[str, Any],
  data_seed: Integer[Any, ""] | int,
  index: Integer[Any, " B"],
  view: Integer[Any, ""] | int,
) -> dict[str, Any]:
  """Moves labels that lie on an image as `augment` moves the image; others stay as they are.

  They lie on it where they have its height and width, ``[B, H, W, ...]`` of ``[B, H, W, C]``.

  Args:
    augmentation: what may happen.
    inputs: as stored.
    labels: ``labels``, and what says of each how much it counts.
    data_seed: ``0 .. 2**32 - 1``.
    index: which examples these are.
    view: which view of them, from 0.

  Returns:
    The same, moved; ``labelled`` is 0 where the view shows what is beyond the image's edge.

  Raises:
    ValueError: labels lie on the image, and the augmentation does not say what becomes of them, or
      shows two views, which move them apart.
  """
  of = labels["labels"]
  size = of.shape[1:3]
  on_image = of.ndim > 2 and any(
    leaf.ndim == 4 and leaf.shape[1:3] == size for leaf in jax.tree.leaves(inputs)
  )
  if on_image and augmentation.strong is not None:
    raise ValueError(
      f"the labels {of.shape} lie on the image, of which {augmentation.name!r} shows two views "
      "with one label: give it one view, or labels of whole images."
    )
  if not on_image or augmentation.apply is identity.apply:
    return labels
  move = augmentation.on_labels
  if move is None:
    raise ValueError(
      f"the labels {of.shape} lie on the image, and the augmentation {augmentation.name!r} moves "
      "the image alone: give it on_labels=(labels, choice) -> labels, which moves them likewise "
      "(lambda labels, choice: labels where it moves nothing)."
    )
  chosen = _chosen(augmentation, data_seed, index, view)

  def moved(leaf: Any) -> Any:
    while leaf.ndim < 3:  # a weight [B] of a whole mask: which of its pixels count moves with them
      leaf = jnp.repeat(leaf[..., None], size[leaf.ndim - 1], axis=-1)
    return jax.vmap(move)(leaf, chosen)

  return {
    name: leaf if name == "weight" and leaf.ndim < 3 else moved(leaf)
    for name, leaf in labels.items()
  }


def check_seed(data_seed: int) -> None:
  """Raises where a seed does not fit the 32 bits that every part of this file gives it."""
  try:
    _check.whole("data_seed", data_seed, least=0, most=2**32 - 1)
  except ValueError:
    raise ValueError(f"data_seed must lie in 0 .. 2**32 - 1, got {data_seed}.") from None


def check_augmentation(augmentation: Any, argument: str = "augmentation") -> None:
  """Raises for what is no augmentation."""
  if not isinstance(augmentation, Augmentation):
    raise TypeError(
      f"{argument}={_check.show(augmentation)} must be an Augmentation, such as crop_flip(4)."
    )
