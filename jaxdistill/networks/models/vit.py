"""A small vision transformer: the other architecture of cross-architecture distillation."""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdistill.networks.models.layers import Images, Logits

__all__ = ["EncoderBlock", "VisionTransformer", "vit_tiny"]


class EncoderBlock(nn.Module):
  """A pre-norm block: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``.

  Attributes:
    num_heads: of the attention; divides the width.
    mlp_ratio: width of the hidden layer over the width of the tokens.
    dropout_rate: on the attention's output, after the hidden layer and on the MLP's output.
    dtype: of the computation; None promotes from inputs and parameters.
    param_dtype: of the parameters.

  Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021.

  >>> import jax
  >>> block = EncoderBlock(num_heads=2)
  >>> x = jnp.ones((1, 3, 4))
  >>> jax.eval_shape(block.init_with_output, jax.random.key(0), x)[0].shape
  (1, 3, 4)
  """

  num_heads: int
  mlp_ratio: float | int = 4.0
  dropout_rate: float | int = 0.0
  dtype: Any = None
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "B N D"], *, train: bool = False) -> Float[Array, "B N D"]:
    """Applies the block.

    Args:
      x: tokens ``[B, N, D]``.
      train: drop, with the random stream ``dropout``.

    Returns:
      Tokens ``[B, N, D]``, not normalised.
    """
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    dropout = nn.Dropout(self.dropout_rate, deterministic=not train)
    xavier = nn.initializers.xavier_uniform()
    # Norms come first in each half, so that the residual stream itself is never normalised.
    y = nn.LayerNorm(name="attention_norm", **dtypes)(x)
    y = nn.MultiHeadDotProductAttention(
      self.num_heads, kernel_init=xavier, deterministic=True, name="attention", **dtypes
    )(y)
    x = x + dropout(y)
    y = nn.LayerNorm(name="mlp_norm", **dtypes)(x)
    hidden = round(self.mlp_ratio * x.shape[-1])
    y = nn.Dense(hidden, kernel_init=xavier, name="mlp_hidden", **dtypes)(y)
    y = dropout(nn.gelu(y))
    y = nn.Dense(x.shape[-1], kernel_init=xavier, name="mlp_output", **dtypes)(y)
    return x + dropout(y)


class VisionTransformer(nn.Module):
  """Patches, learned positions, pre-norm blocks, a LayerNorm, pooling, a linear layer.

  Sows ``embedding`` (patches with positions) and ``block1`` ... ``blockN``, all ``[B, N, D]`` with
  the class token, if there is one, first; ``pooled`` ``[B, D]``.

  Attributes:
    patch_size: edge of a patch in pixels; divides the image's.
    width: D, of the tokens.
    depth: number of blocks.
    num_heads: of the attention; divides ``width``.
    mlp_ratio: width of the blocks' hidden layer over ``width``.
    num_classes: K.
    dropout_rate: after the embedding and in the blocks; not on the attention's weights.
    pooling: ``"mean"`` over the tokens, or ``"cls"`` for a class token.
    dtype: of the computation; None promotes from inputs and parameters. Pooling and the classifier
      compute in float32 at least.
    param_dtype: of the parameters.

  Raises:
    ValueError: ``num_heads`` does not divide ``width``, ``dropout_rate`` is outside [0, 1),
      ``pooling`` is neither word, or, when called, ``patch_size`` does not divide the image.

  Source: Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition at
  Scale", 2021.

  >>> import jax
  >>> model = VisionTransformer(patch_size=4, width=8, depth=1, num_heads=2, num_classes=10)
  >>> x = jnp.ones((1, 8, 8, 3))
  >>> jax.eval_shape(model.init_with_output, jax.random.key(0), x)[0].shape
  (1, 10)
  """

  patch_size: int = 4
  width: int = 192
  depth: int = 12
  num_heads: int = 3
  mlp_ratio: float | int = 4.0
  num_classes: int = 100
  dropout_rate: float | int = 0.0
  pooling: Literal["mean", "cls"] = "mean"
  dtype: Any = None
  param_dtype: Any = jnp.float32

  def __post_init__(self) -> None:
    """Checks the attributes before anything is built."""
    if self.num_heads < 1 or self.width % self.num_heads:
      raise ValueError(
        f"num_heads must divide width {self.width}, got {self.num_heads}: "
        "use e.g. width = 64 * num_heads."
      )
    if not 0 <= self.dropout_rate < 1:
      raise ValueError(f"dropout_rate must be in [0, 1), got {self.dropout_rate}: use e.g. 0.1.")
    if self.pooling not in ("mean", "cls"):
      raise ValueError(f"pooling must be 'mean' or 'cls', got {self.pooling!r}: use 'mean'.")
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Images, *, train: bool = False) -> Logits:
    """Classifies images.

    Args:
      x: normalised images ``[B, H, W, C]``, of the size that the network was initialised with.
      train: drop, with the random stream ``dropout``.

    Returns:
      Logits ``[B, K]`` in float32 (float64 where the network computes in it).
    """
    if x.shape[1] % self.patch_size or x.shape[2] % self.patch_size:
      raise ValueError(
        f"patch_size must divide the image's {x.shape[1]}x{x.shape[2]} pixels, "
        f"got {self.patch_size}: use another patch_size, or pad the images."
      )
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    tokens = self._embed(x)  # [B, H·W / patch², width], one more with a class token
    self.sow("intermediates", "embedding", tokens)
    tokens = nn.Dropout(self.dropout_rate, deterministic=not train)(tokens)
    for i in range(self.depth):
      tokens = EncoderBlock(
        self.num_heads, self.mlp_ratio, self.dropout_rate, name=f"encoder_block{i + 1}", **dtypes
      )(tokens, train=train)
      self.sow("intermediates", f"block{i + 1}", tokens)
    tokens = nn.LayerNorm(name="final_norm", **dtypes)(tokens)
    # Logits in bfloat16 carry three digits: too few to distil from, and the layer is tiny.
    tokens = tokens.astype(np.promote_types(tokens.dtype, np.float32))
    pooled = tokens.mean(axis=1) if self.pooling == "mean" else tokens[:, 0]
    self.sow("intermediates", "pooled", pooled)
    return nn.Dense(self.num_classes, param_dtype=self.param_dtype, name="classifier")(pooled)

  def _embed(self, x: Images) -> Float[Array, "B N D"]:
    """Patches as tokens, after the class token if there is one, plus positions."""
    # A convolution whose stride is its size: a linear map of each patch.
    normal = nn.initializers.normal(0.02)
    patch = (self.patch_size, self.patch_size)
    tokens = nn.Conv(
      self.width,
      patch,
      patch,
      padding="VALID",
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name="patch_embedding",
    )(x)
    tokens = tokens.reshape(x.shape[0], -1, self.width)
    # First, where ViT has it; one vector for all images, which attention fills for each.
    if self.pooling == "cls":
      token = self.param("class_token", normal, (1, 1, self.width), self.param_dtype)
      token = jnp.broadcast_to(token.astype(tokens.dtype), (x.shape[0], 1, self.width))
      tokens = jnp.concatenate([token, tokens], axis=1)
    shape = (1, tokens.shape[1], self.width)
    positions = self.param("position_embedding", normal, shape, self.param_dtype)
    return tokens + positions.astype(tokens.dtype)


def vit_tiny(num_classes: int = 100, **options: Any) -> VisionTransformer:
  """ViT-Ti/4 for 32x32 images: 64 tokens of width 192, 12 blocks of 3 heads, 5.4 M parameters.

  Args:
    num_classes: K.
    **options: further attributes of `VisionTransformer`, such as ``dropout_rate``.

  Returns:
    The module.

  Source: Touvron et al., "Training Data-Efficient Image Transformers", 2021 (width and heads).

  >>> vit_tiny(num_classes=10).width
  192
  """
  return VisionTransformer(num_classes=num_classes, **options)
