"""Projectors: small modules that turn a student's feature into the teacher's shape.

They are trained with the student and absent from the deployed network. Their sizes are never typed
in by hand: `between` takes them from the two features' shapes, and whoever builds one of the
modules directly takes them from an abstract evaluation of both networks too. `Resampled` leads
across kinds, from a convolution's map to a transformer's tokens and back. `ReviewFusion` is
ReviewKD's: it fuses a stage with what came from the stages above it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdistill.networks.models.layers import Images, batch_norm, default_init
from jaxdistill.types import compute_dtype

__all__ = [
  "MLP",
  "Conv",
  "LearnedTemperature",
  "Linear",
  "Orthogonal",
  "Resampled",
  "ReviewFusion",
  "between",
]

# A vector or tokens, whose last axis is mapped.
Features = Float[Array | np.ndarray, "B *axes D"]


class Linear(nn.Module):
  """A linear map of the last axis, with bias: for vectors ``[B, D]`` and tokens ``[B, L, D]``.

  Attributes:
    features: the teacher's width.
    use_bias: whether to add a bias.
    kernel_init: initialises the kernel; Flax's default.
    dtype: of the computation; None promotes from inputs and parameters.
    param_dtype: of the parameters.

  >>> module = Linear(features=4)
  >>> module.init(jax.random.key(0), jnp.ones((2, 3)))["params"]["dense"]["kernel"].shape
  (3, 4)
  """

  features: int
  use_bias: bool = True
  kernel_init: Any = dataclasses.field(default_factory=nn.initializers.lecun_normal)
  dtype: Any = None
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Features, *, train: bool = False) -> Float[Array, "B *axes E"]:
    """Projects features.

    Args:
      x: ``[B, ..., D]``.
      train: changes nothing here.

    Returns:
      ``[B, ..., features]``.
    """
    del train
    return nn.Dense(
      self.features,
      use_bias=self.use_bias,
      kernel_init=self.kernel_init,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name="dense",
    )(x)


class LearnedTemperature(nn.Module):
  """A temperature in [1, 21] that is trained against the student (CTKD).

  lowest + span * sigmoid(theta). In the backward pass its gradient is multiplied by ``-reversal``,
  so that an optimiser that makes the loss smaller moves theta to where the loss is larger.

  Theta is one parameter, or with ``hidden`` the output of two linear maps with a ReLU between them
  for each example's predictions: one temperature for each example.

  Attributes:
    lowest: 1 in the published code.
    span: 20 in the published code.
    initial: where theta starts (with ``hidden``, its bias); 1 in the published code, which makes a
      temperature of 15.6.
    hidden: None for one temperature; else the width between the linear maps, which are the paper's
      and not in its code.
    param_dtype: of the parameters.

  Source: Li, Li, Yang, Zhao, Song, Luo, Li, Yang, "Curriculum Temperature for Knowledge
  Distillation", 2023.

  >>> module = LearnedTemperature()
  >>> value, variables = module.init_with_output(jax.random.key(0), 0.5)
  >>> round(value.item(), 2), variables["params"]["theta"].item()
  (15.62, 1.0)
  >>> slope = jax.grad(lambda reversal, v: module.apply(v, reversal), argnums=1)
  >>> [round(slope(r, variables)["params"]["theta"].item(), 3) for r in (0.5, 1.0)]
  [-1.966, -3.932]
  """

  lowest: float = 1.0
  span: float = 20.0
  initial: float = 1.0
  hidden: int | None = None
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    reversal: Any,
    predictions: Float[Array | np.ndarray, "*batch D"] | None = None,
    *,
    train: bool = False,
  ) -> Float[Array, "*rows"]:
    """The temperature.

    Args:
      reversal: how much of the gradient is turned round, a number: 0 is none of it, and the
        temperature stays; 1 is all. May follow a schedule.
      predictions: ``[..., D]``, with ``hidden`` only: both networks' logits side by side. No
        gradient goes back into them.
      train: changes nothing here.

    Returns:
      One number ``[]``, or ``[...]`` with ``hidden``.

    Raises:
      ValueError: there are predictions without ``hidden``, or the other way round.
    """
    del train
    if (predictions is None) != (self.hidden is None):
      raise ValueError(
        f"hidden={self.hidden} and predictions {'without' if predictions is None else 'with'} "
        "values: a temperature for each example needs both, hidden=128 say; one for all neither."
      )
    # The last layer's bias where there are layers, so that both forms start at one temperature.
    start = nn.initializers.constant(self.initial)
    if predictions is None:
      theta = self.param("theta", start, (), self.param_dtype)
    else:
      # Or the student would be trained to please the module that is trained against it.
      x = jax.lax.stop_gradient(jnp.asarray(predictions))
      options = {"dtype": compute_dtype(x), "param_dtype": self.param_dtype}
      x = jax.nn.relu(nn.Dense(self.hidden or 0, **options, name="dense1")(x))
      theta = nn.Dense(1, bias_init=start, **options, name="dense2")(x)[..., 0]
    # A sigmoid keeps it in its range: climbing a loss that T² multiplies, it would never stop.
    value = self.lowest + self.span * jax.nn.sigmoid(theta)
    fixed = jax.lax.stop_gradient(value)
    # Gradient reversal in one line: forwards the difference is 0 exactly, backwards its slope is
    # −reversal times the plain one, so that descending this is climbing the loss.
    return fixed - jnp.asarray(reversal, value.dtype) * (value - fixed)


class MLP(nn.Module):
  """Two linear maps of the last axis with a ReLU between them.

  Attributes:
    hidden: width of the layer between.
    features: the teacher's width.
    dtype: of the computation; None promotes from inputs and parameters.
    param_dtype: of the parameters.

  >>> module = MLP(hidden=8, features=4)
  >>> variables = module.init(jax.random.key(0), jnp.ones((2, 3)))
  >>> module.apply(variables, jnp.ones((2, 3))).shape
  (2, 4)
  """

  hidden: int
  features: int
  dtype: Any = None
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Features, *, train: bool = False) -> Float[Array, "B *axes E"]:
    """Projects features.

    Args:
      x: ``[B, ..., D]``.
      train: changes nothing here.

    Returns:
      ``[B, ..., features]``.
    """
    del train
    options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    # One ReLU between: two linear maps in a row would be one.
    x = jax.nn.relu(nn.Dense(self.hidden, **options, name="dense1")(x))
    return nn.Dense(self.features, **options, name="dense2")(x)


class Conv(nn.Module):
  """FitNets' regressor for maps: a convolution with bias, BatchNorm, ReLU.

  The convolution brings ``[H, W]`` to ``spatial``: with kernel 3 and stride 2 where it is twice as
  large, transposed with kernel 4 and stride 2 where it is half as large, where neither side is to
  grow with kernel ``1 + H - spatial[0]`` by ``1 + W - spatial[1]`` and no padding, which is 1 x 1
  at equal sizes. To any other size, where the published code has nothing, it is 1 x 1 and its
  output is resized, as `Resampled` does it.

  Attributes:
    features: the teacher's channels.
    spatial: the teacher's height and width.
    use_bias: whether the convolution adds a bias.
    use_norm: whether BatchNorm follows.
    use_relu: whether a ReLU follows. The projection cannot be negative then: leave it out for
      teacher features from before their ReLU.
    kernel_init: initialises the kernel; Flax's default.
    axis_name: the mapped axis over which BatchNorm averages its statistics, under ``pmap``.
    dtype: of the computation; None promotes from inputs and parameters.
    param_dtype: of the parameters.

  Source: Romero et al., "FitNets: Hints for Thin Deep Nets", 2015; BatchNorm, ReLU and the choice
  of the kernel as in the code of Tian, Krishnan, Isola, "Contrastive Representation Distillation",
  2020.

  >>> module = Conv(features=4, spatial=(4, 4))
  >>> y, _ = module.init_with_output(jax.random.key(0), jnp.ones((2, 8, 8, 3)))
  >>> y.shape
  (2, 4, 4, 4)
  """

  features: int
  spatial: tuple[int, int]
  use_bias: bool = True
  use_norm: bool = True
  use_relu: bool = True
  kernel_init: Any = dataclasses.field(default_factory=nn.initializers.lecun_normal)
  axis_name: str | None = None
  dtype: Any = None
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Images, *, train: bool = False) -> Float[Array, "B H2 W2 D"]:
    """Projects maps.

    Args:
      x: ``[B, H, W, C]``.
      train: use and update the batch's own statistics.

    Returns:
      ``[B, *spatial, features]``.
    """
    # Which convolution follows from the two sizes alone, so that nobody chooses one by hand.
    layer = _convolution(x.shape, (x.shape[0], *self.spatial, self.features))
    options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    kernel = {"use_bias": self.use_bias, "kernel_init": self.kernel_init}
    # Resized in front of the BatchNorm, so that what is compared has the statistics it gives.
    y = _resized(layer(self.features, **kernel, **options, name="conv")(x), self.spatial)
    if self.use_norm:
      y = batch_norm(self, train, "norm")(y)
    # A teacher's map behind its ReLU has no negative values; one before it has.
    return jax.nn.relu(y) if self.use_relu else y


class Orthogonal(nn.Module):
  """VkD's projector: a linear map that keeps lengths and angles, or as many of them as fit.

  ``x @ Qᵀ`` to a larger width, Q ``[features, D]`` with orthonormal columns; ``x @ Q`` to a smaller
  one, Q ``[D, features]``. Q is the orthogonal factor of a free kernel (QR, the diagonal of R above
  0), so that it is orthogonal at every step and any optimiser may train it. The projector can turn
  the student's features and not reshape them, so that what is learned is learned by the student.
  Weight decay has no effect on Q: the kernel's scale does not count.

  Attributes:
    features: the teacher's width.
    kernel_init: initialises the kernel; Flax's default.
    dtype: of the product; None promotes from inputs and parameters.
    param_dtype: of the parameters, and of the factorisation.

  Source: Miles, Elezi, Deng, "VkD: Improving Knowledge Distillation using Orthogonal Projections",
  2024. The paper takes the exponential of a skew matrix, its code PyTorch's parametrisation by
  Householder reflections: other coordinates of the same maps.

  >>> x = jnp.array([[3.0, 4.0]])
  >>> y, _ = Orthogonal(5).init_with_output(jax.random.key(0), x)
  >>> round(jnp.linalg.norm(y).item(), 4)
  5.0
  """

  features: int
  kernel_init: Any = dataclasses.field(default_factory=nn.initializers.lecun_normal)
  dtype: Any = None
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Features, *, train: bool = False) -> Float[Array, "B *axes E"]:
    """Projects features.

    Args:
      x: ``[B, ..., D]``.
      train: changes nothing here.

    Returns:
      ``[B, ..., features]``.
    """
    del train
    width = x.shape[-1]
    tall = (max(width, self.features), min(width, self.features))
    q, r = jnp.linalg.qr(self.param("kernel", self.kernel_init, tall, self.param_dtype))
    # QR leaves each column's sign open; fixed, Q is a continuous function of the kernel.
    q = q * jnp.where(jnp.diagonal(r) < 0, -1, 1).astype(q.dtype)[None]
    x, q = nn.dtypes.promote_dtype(x, q, dtype=self.dtype)
    return jnp.matmul(x, q.T if width < self.features else q)


class Resampled(nn.Module):
  """A linear map of the channels, then other positions: between maps and tokens of any number.

  Tokens are taken for a grid with up to two tokens in front (a class token, a distillation token)
  wherever their number allows it: ``L = h * w``, ``h * w + 1`` or ``h * w + 2`` with h : w as on
  the map on the other side, or a square between two sequences. Grids are resized by bilinear
  interpolation. Tokens in front go to tokens in front; those that the student lacks are the mean
  over its positions, as a network without a class token pools; those that the teacher lacks are
  left out. Other numbers of tokens are no grid, and the whole sequence, a map row by row, is
  interpolated along its positions.

  Interpolation is between centres of positions, ``(i + 1/2) * size / new size - 1/2``, and with
  fewer positions the kernel widens so that none of the old ones is lost: PyTorch's ``interpolate``
  with ``align_corners=False, antialias=True``. It comes after the linear map, as a published 1 x 1
  projection does (OFA-KD); both are linear, so that the order changes no value but where the bias
  would be.

  Attributes:
    features: the teacher's width.
    positions: the teacher's: ``(L,)`` of tokens, ``(H, W)`` of a map.
    use_bias: whether the linear map adds a bias.
    kernel_init: initialises the kernel; Flax's default.
    dtype: of the computation; None promotes from inputs and parameters.
    param_dtype: of the parameters.

  >>> module = Resampled(features=4, positions=(17,))
  >>> module.init_with_output(jax.random.key(0), jnp.ones((2, 8, 8, 3)))[0].shape
  (2, 17, 4)
  """

  features: int
  positions: tuple[int, ...]
  use_bias: bool = True
  kernel_init: Any = dataclasses.field(default_factory=nn.initializers.lecun_normal)
  dtype: Any = None
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Features, *, train: bool = False) -> Float[Array, "B *positions E"]:
    """Projects features.

    Args:
      x: ``[B, L, D]`` or ``[B, H, W, D]``.
      train: changes nothing here.

    Returns:
      ``[B, *positions, features]``.
    """
    del train
    dense = nn.Dense(
      self.features,
      use_bias=self.use_bias,
      kernel_init=self.kernel_init,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name="dense",
    )
    return _resampled(dense(x), self.positions)


def between(student: Any, teacher: Any, *, axis_name: str | None = None) -> nn.Module:
  """Chooses a projector from a student's feature to a teacher's by their shapes.

  `Linear` for vectors ``[B, D]`` and as many tokens ``[B, L, D]``, `Conv` between maps
  ``[B, H, W, C]``, `Resampled` between maps and tokens and between different numbers of tokens.

  Args:
    student: the student's feature, or its shape (``jax.ShapeDtypeStruct``).
    teacher: the teacher's.
    axis_name: for `Conv`'s BatchNorm, under ``pmap``.

  Returns:
    A module ``(x, *, train=False)``.

  Raises:
    ValueError: one of the features is a vector and the other is not, or one is neither a vector,
      tokens nor a map.

  >>> between(jnp.ones((2, 8, 8, 3)), jnp.ones((2, 4, 4, 5))).spatial
  (4, 4)
  >>> between(jnp.ones((2, 8, 8, 3)), jnp.ones((2, 17, 5))).positions
  (17,)
  """
  # Shapes alone, so that it works on an abstract evaluation as on arrays.
  ours, theirs = tuple(student.shape), tuple(teacher.shape)
  ranks = {len(ours), len(theirs)}
  if not (ranks == {2} or ranks <= {3, 4}):
    raise ValueError(
      f"no projector leads from the student's feature {ours} to the teacher's {theirs}: both must "
      "be vectors [B, D], or both tokens [B, L, D] or maps [B, H, W, C]. Pool or reshape one of "
      "them, or give a projector of your own."
    )
  if ranks == {4}:
    return Conv(features=theirs[-1], spatial=theirs[1:3], axis_name=axis_name)
  if ours[1:-1] == theirs[1:-1]:
    return Linear(features=theirs[-1])
  return Resampled(features=theirs[-1], positions=theirs[1:-1])


def _resampled(x: Any, positions: tuple[int, ...]) -> Any:
  """Tokens or a map ``[B, ..., D]`` at other positions, ``[B, *positions, D]``."""
  old = x.shape[1:-1]
  # A grid has the proportions of the map on either side: that is where they are known.
  shape = old if len(old) == 2 else positions if len(positions) == 2 else (1, 1)
  ours, theirs = _grid(old, shape), _grid(positions, shape)
  if ours is None or theirs is None:
    # No grid: row by row and along the sequence, [B, L, D] to [B, L', D].
    flat = x.reshape(x.shape[0], math.prod(old), x.shape[-1])
    sizes = (x.shape[0], math.prod(positions), x.shape[-1])
    return jax.image.resize(flat, sizes, "linear").reshape(x.shape[0], *positions, x.shape[-1])
  (front, size), (fronts, wanted) = ours, theirs
  tokens = x.reshape(x.shape[0], -1, x.shape[-1])
  grid = tokens[:, front:].reshape(x.shape[0], *size, x.shape[-1])
  kept = tokens[:, : min(front, fronts)]
  # What pools its grid says of the image what a class token says.
  mean = jnp.mean(grid, axis=(1, 2))[:, None]
  kept = jnp.concatenate([kept, *[mean] * (fronts - kept.shape[1])], axis=1)
  resized = _resized(grid, wanted).reshape(x.shape[0], math.prod(wanted), x.shape[-1])
  return jnp.concatenate([kept, resized], axis=1).reshape(x.shape[0], *positions, x.shape[-1])


def _grid(positions: tuple[int, ...], shape: tuple[int, int]) -> tuple[int, tuple[int, int]] | None:
  """How many tokens stand in front of a grid of these proportions, and its size; None without."""
  if len(positions) == 2:
    return 0, positions
  common = math.gcd(*shape)
  high, wide = shape[0] // common, shape[1] // common
  for front in range(3):
    # L - front = (n * high) * (n * wide): no L has two answers, as squares lie too far apart.
    cells = positions[0] - front
    n = math.isqrt(max(cells, 0) // (high * wide))
    # One position behind two tokens is no grid: a text of three has them too.
    if n * n * high * wide == cells > min(front, 1):
      return front, (n * high, n * wide)
  return None


def _resized(maps: Any, spatial: tuple[int, int]) -> Any:
  """Maps at another size, by bilinear interpolation that widens where they shrink."""
  if maps.shape[1:3] == tuple(spatial):
    return maps
  return jax.image.resize(maps, (maps.shape[0], *spatial, maps.shape[-1]), "bilinear")


def _convolution(student: tuple[int, ...], teacher: tuple[int, ...]) -> Any:
  """The class of the layer that leads from one size to the other, but for its channels."""
  ours, theirs = student[1:3], teacher[1:3]
  # FitNets matches two sizes by a convolution that learns how, where the losses only average.
  if all(s == 2 * t for s, t in zip(ours, theirs, strict=True)):
    return functools.partial(nn.Conv, kernel_size=(3, 3), strides=(2, 2), padding=1)
  if all(2 * s == t for s, t in zip(ours, theirs, strict=True)):
    # SAME pads the dilated input by 2 on each side: PyTorch's padding of 1 at kernel 4.
    return functools.partial(nn.ConvTranspose, kernel_size=(4, 4), strides=(2, 2), padding="SAME")
  if ours != theirs and all(s >= t for s, t in zip(ours, theirs, strict=True)):
    # Without padding a kernel of size k takes k − 1 pixels off a side.
    kernel = tuple(1 + s - t for s, t in zip(ours, theirs, strict=True))
    return functools.partial(nn.Conv, kernel_size=kernel, padding="VALID")
  # 1 x 1; where that leaves another size, `Conv` resizes what comes out.
  product = functools.partial(nn.Conv, kernel_size=(1, 1), padding="VALID")
  return functools.partial(product, conv_general_dilated=_pointwise)


def _pointwise(x: Any, kernel: Any, *args: Any, **options: Any) -> Any:
  """A 1 x 1 convolution as the matrix product that it is: on a CPU its gradients are faster so."""
  del args
  return jnp.matmul(x, kernel[0, 0], precision=options.get("precision"))


# PyTorch's kaiming_uniform_(a=1), which the published fusions set.
_fusion_init = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")


class ReviewFusion(nn.Module):
  """Attention-based fusion (ABF) of ReviewKD: one stage of the student, reviewed from above.

  ``y = bn(conv1x1(x))``; with a residual r from the stage above, brought to the size of x,
  ``y = y * a + r * b`` with ``[a, b] = sigmoid(conv1x1([y, r]))`` ``[B, H, W, 2]``. y, brought to
  ``spatial``, is the residual for the stage below, and ``bn(conv3x3(y))`` is what is compared with
  the teacher's stage. Sizes are changed by taking the nearest pixel, floor(i * size / new size).

  Attributes:
    mid: channels of y and of the residuals, the same in all stages.
    features: the teacher's channels.
    spatial: the teacher's height and width.
    axis_name: the mapped axis over which BatchNorm averages its statistics, under ``pmap``.
    dtype: of the computation; None promotes from inputs and parameters.
    param_dtype: of the parameters.

  Source: Chen, Liu, Zhao, Jia, "Distilling Knowledge via Knowledge Review", 2021.

  >>> module = ReviewFusion(mid=4, features=5, spatial=(8, 8))
  >>> x, residual = jnp.ones((2, 8, 8, 3)), jnp.ones((2, 4, 4, 4))
  >>> shapes = jax.eval_shape(module.init_with_output, jax.random.key(0), x, residual)
  >>> [y.shape for y in shapes[0]]
  [(2, 8, 8, 5), (2, 8, 8, 4)]
  """

  mid: int
  features: int
  spatial: tuple[int, int]
  axis_name: str | None = None
  dtype: Any = None
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: Images,
    residual: Float[Array | np.ndarray, "B H2 W2 mid"] | None = None,
    *,
    train: bool = False,
  ) -> tuple[Float[Array, "B H3 W3 D"], Float[Array, "B H3 W3 mid"]]:
    """Fuses a stage with the residual from above.

    Args:
      x: the student's stage ``[B, H, W, C]``.
      residual: the second output of the fusion above, ``[B, H2, W2, mid]``; None for the topmost.
      train: use and update the batch's own statistics.

    Returns:
      What is compared with the teacher, ``[B, *spatial, features]``, and the residual for the
      stage below, ``[B, *spatial, mid]``.

    Raises:
      ValueError: ``residual`` has another number of channels than ``mid``.
    """
    if residual is not None and residual.shape[-1] != self.mid:
      raise ValueError(
        f"residual {residual.shape} must have mid={self.mid} channels: give all fusions one mid."
      )
    options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    # [B, H, W, mid]. A 1 x 1 convolution is a linear map of the channels.
    y = nn.Dense(self.mid, use_bias=False, kernel_init=_fusion_init, **options, name="conv1")(x)
    y = batch_norm(self, train, "norm1")(y)
    if residual is not None:
      # The stage above is smaller: its pixels are repeated, [B, H, W, mid].
      above = _nearest(residual, (x.shape[1], x.shape[2])).astype(y.dtype)
      both = jnp.concatenate([y, above], axis=-1)
      attention = nn.Dense(2, kernel_init=default_init, **options, name="attention")(both)
      # Two gates for each pixel, [B, H, W, 2], that need not add up to 1.
      attention = jax.nn.sigmoid(attention)
      y = y * attention[..., :1] + above * attention[..., 1:]
    # To the teacher's size only now: the gates see the student's own positions.
    y = _nearest(y, self.spatial)
    # [B, *spatial, features]. 3 × 3: nearest pixels are copies, and neighbours tell them apart.
    out = nn.Conv(
      self.features,
      (3, 3),
      padding=1,
      use_bias=False,
      kernel_init=_fusion_init,
      **options,
      name="conv2",
    )(y)
    return batch_norm(self, train, "norm2")(out), y


def _nearest(maps: Any, spatial: tuple[int, int]) -> Any:
  """PyTorch's nearest interpolation; `jax.image.resize` takes pixels from their centres instead."""
  for axis, size in zip((1, 2), spatial, strict=True):
    old = maps.shape[axis]
    if old != size:
      maps = jnp.take(maps, np.arange(size) * old // size, axis=axis)
  return maps
