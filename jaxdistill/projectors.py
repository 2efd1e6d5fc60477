"""Projectors: small modules that turn a student's feature into the teacher's shape.

They are trained with the student and absent from the deployed network. Their sizes are never typed
in by hand: `between` takes them from the two features' shapes, and whoever builds one of the
modules directly takes them from an abstract evaluation of both networks too.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = ["MLP", "Conv", "Linear", "between"]


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
  def __call__(
    self, x: Float[Array | np.ndarray, "B *axes D"], *, train: bool = False
  ) -> Float[Array, "B *axes E"]:
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
  def __call__(
    self, x: Float[Array | np.ndarray, "B *axes D"], *, train: bool = False
  ) -> Float[Array, "B *axes E"]:
    """Projects features.

    Args:
      x: ``[B, ..., D]``.
      train: changes nothing here.

    Returns:
      ``[B, ..., features]``.
    """
    del train
    options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = jax.nn.relu(nn.Dense(self.hidden, **options, name="dense1")(x))
    return nn.Dense(self.features, **options, name="dense2")(x)


class Conv(nn.Module):
  """FitNets' regressor for maps: a convolution with bias, BatchNorm, ReLU.

  The convolution brings ``[H, W]`` to ``spatial``: with kernel 3 and stride 2 where it is twice as
  large, transposed with kernel 4 and stride 2 where it is half as large, else with kernel
  ``1 + H - spatial[0]`` by ``1 + W - spatial[1]`` and no padding, which is 1 x 1 at equal sizes.

  Attributes:
    features: the teacher's channels.
    spatial: the teacher's height and width.
    use_bias: whether the convolution adds a bias.
    use_norm: whether BatchNorm follows.
    use_relu: whether a ReLU follows. The projection cannot be negative then: leave it out for
      teacher features from before their ReLU.
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
  axis_name: str | None = None
  dtype: Any = None
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array | np.ndarray, "B H W C"], *, train: bool = False
  ) -> Float[Array, "B H2 W2 D"]:
    """Projects maps.

    Args:
      x: ``[B, H, W, C]``.
      train: use and update the batch's own statistics.

    Returns:
      ``[B, *spatial, features]``.

    Raises:
      ValueError: ``spatial`` can't be reached from ``[H, W]``.
    """
    layer = _convolution(x.shape, (x.shape[0], *self.spatial, self.features))
    options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    y = layer(self.features, use_bias=self.use_bias, **options, name="conv")(x)
    if self.use_norm:
      y = nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        axis_name=self.axis_name,
        **options,
        name="norm",
      )(y)
    return jax.nn.relu(y) if self.use_relu else y


def between(student: Any, teacher: Any, *, axis_name: str | None = None) -> nn.Module:
  """Chooses a projector from a student's feature to a teacher's by their shapes.

  `Linear` for vectors ``[B, D]`` and tokens ``[B, L, D]``, `Conv` for maps ``[B, H, W, C]``.

  Args:
    student: the student's feature, or its shape (``jax.ShapeDtypeStruct``).
    teacher: the teacher's.
    axis_name: for `Conv`'s BatchNorm, under ``pmap``.

  Returns:
    A module ``(x, *, train=False)``.

  Raises:
    ValueError: the features differ in rank or in their number of tokens, are neither vectors,
      tokens nor maps, or have sizes that no convolution of `Conv` connects.

  >>> between(jnp.ones((2, 8, 8, 3)), jnp.ones((2, 4, 4, 5))).spatial
  (4, 4)
  """
  ours, theirs = tuple(student.shape), tuple(teacher.shape)
  if len(ours) != len(theirs) or len(ours) not in (2, 3, 4):
    raise ValueError(
      f"no projector leads from the student's feature {ours} to the teacher's {theirs}: both must "
      "be vectors [B, D], tokens [B, L, D] or maps [B, H, W, C]. Pool or reshape one of them, or "
      "give a projector of your own."
    )
  if len(ours) == 3 and ours[1] != theirs[1]:
    raise ValueError(
      f"the student's feature {ours} has {ours[1]} tokens and the teacher's {theirs} has "
      f"{theirs[1]}; they must be the same tokens. Match other layers, or give a projector of your "
      "own."
    )
  if len(ours) < 4:
    return Linear(features=theirs[-1])
  _convolution(ours, theirs)
  return Conv(features=theirs[-1], spatial=theirs[1:3], axis_name=axis_name)


def _convolution(student: tuple[int, ...], teacher: tuple[int, ...]) -> Any:
  """The class of the layer that leads from one size to the other, but for its channels."""
  ours, theirs = student[1:3], teacher[1:3]
  if all(s == 2 * t for s, t in zip(ours, theirs, strict=True)):
    return functools.partial(nn.Conv, kernel_size=(3, 3), strides=(2, 2), padding=1)
  if all(2 * s == t for s, t in zip(ours, theirs, strict=True)):
    # SAME pads the dilated input by 2 on each side: PyTorch's padding of 1 at kernel 4.
    return functools.partial(nn.ConvTranspose, kernel_size=(4, 4), strides=(2, 2), padding="SAME")
  if ours == theirs:
    product = functools.partial(nn.Conv, kernel_size=(1, 1), padding="VALID")
    return functools.partial(product, conv_general_dilated=_pointwise)
  if all(s >= t for s, t in zip(ours, theirs, strict=True)):
    kernel = tuple(1 + s - t for s, t in zip(ours, theirs, strict=True))
    return functools.partial(nn.Conv, kernel_size=kernel, padding="VALID")
  raise ValueError(
    f"no convolution leads from the student's map {student} to the teacher's {teacher}: a side of "
    "the student's must be half of the teacher's on both axes, or at least as long on both. Match "
    "other layers, or give a projector of your own."
  )


def _pointwise(x: Any, kernel: Any, *args: Any, **options: Any) -> Any:
  """A 1 x 1 convolution as the matrix product that it is: on a CPU its gradients are faster so."""
  del args
  return jnp.matmul(x, kernel[0, 0], precision=options.get("precision"))
