"""Losses on what a map or a sentence is summed up to; public through `features`.

One value per example (per position for `attention_relation`). What is compared has no channel axis
or a square one, so that several of them take networks of different widths.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from jaxdistill.losses._log_space import MASKED, AnyArray, absolute, float_arrays, kl
from jaxdistill.losses._maps import map_pair, product, same_width, tame, unit

__all__ = [
  "attention_relation",
  "attention_transfer",
  "factor_transfer",
  "flow_of_solution",
  "inter_channel_correlation",
  "neuron_selectivity",
]

# Products of larger queries and keys leave float32.
_LARGEST = 1e15


def attention_transfer(
  student: Float[AnyArray, "B _ _ _"], teacher: Float[AnyArray, "B _ _ _"]
) -> Float[Array, " B"]:
  """Attention transfer (AT): where in the image the energy of the activations is.

  mean over H·W of (a_student − a_teacher)², a_f = v / max(‖v‖, 1e-12), v = mean_c f² flattened
  to ``[H·W]``, for f = student and f = teacher.

  Args:
    student: ``[B, H, W, C]``; its channels need not be the teacher's.
    teacher: likewise; the larger map is average-pooled to the smaller (as
      PyTorch's ``adaptive_avg_pool2d``).

  Returns:
    ``[B]``.

  Raises:
    ValueError: either is not a map.

  Source: Zagoruyko, Komodakis, "Paying More Attention to Attention: Improving the Performance of
  Convolutional Neural Networks via Attention Transfer", 2017.

  Other codes: this is the published code's, RepDistiller's, mdistiller's and torchdistill's (mode
  "code", which does not pool). The paper's own formula, torchdistill's mode "paper", sums f² over
  channels and takes ‖a_student − a_teacher‖; KD_Lib does not reduce the channels.

  >>> maps = jnp.array([1.0, 0.0]).reshape(1, 2, 1, 1)
  >>> attention_transfer(maps, maps[:, ::-1]).tolist()
  [1.0]
  """
  student, teacher = map_pair(student, teacher)
  return jnp.mean(jnp.square(_attention(student) - _attention(teacher)), axis=(1, 2))


def factor_transfer(
  student: Float[AnyArray, "B _ _ _"], teacher: Float[AnyArray, "B _ _ _"]
) -> Float[Array, " B"]:
  """Factor transfer (FT): distance of two factors' energies over the image.

  mean over H·W of |n(mean_c student²) − n(mean_c teacher²)|, n(v) = v / max(‖v‖, 1e-12) of the
  flattened map, ``[H·W]``.

  Args:
    student: ``[B, H, W, C]``, the translator's output; its channels need not be the teacher's.
    teacher: likewise, the paraphraser's; the larger map is average-pooled to the smaller (as
      PyTorch's ``adaptive_avg_pool2d``).

  Returns:
    ``[B]``.

  Raises:
    ValueError: either is not a map.

  Source: Kim, Park, Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer",
  2018.

  Other codes: this is RepDistiller's (p1 = 2, p2 = 1); torchdistill normalises without the mean
  over channels.

  >>> maps = jnp.array([1.0, 0.0]).reshape(1, 2, 1, 1)
  >>> factor_transfer(maps, maps[:, ::-1]).tolist()
  [1.0]
  """
  student, teacher = map_pair(student, teacher)
  return jnp.mean(absolute(_attention(student) - _attention(teacher)), axis=(1, 2))


def neuron_selectivity(
  student: Float[AnyArray, "B _ _ _"], teacher: Float[AnyArray, "B _ _ _"]
) -> Float[Array, " B"]:
  """Neuron selectivity transfer (NST): where channels fire, by maximum mean discrepancy.

  mean_cc' k(t_c, t_c') + mean_cc' k(s_c, s_c') − 2 mean_cc' k(s_c, t_c'), k(a, b) = (aᵀb)²,
  s_c = n(channel c of student), t_c = n(channel c of teacher), flattened to ``[H·W]`` after the
  maps have been pooled to one size, n(v) = v / max(‖v‖, 1e-12); every pair counts, c = c' too.

  Args:
    student: ``[B, H, W, C]``; its channels need not be the teacher's.
    teacher: likewise; the larger map is average-pooled to the smaller (as
      PyTorch's ``adaptive_avg_pool2d``).

  Returns:
    ``[B]``, ≥ 0 but for rounding.

  Raises:
    ValueError: either is not a map.

  Source: Huang, Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer",
  2017.

  Other codes: this, with its polynomial kernel, is the number of RepDistiller and mdistiller, which
  build ``[B, C, C', H·W]``; a matrix product per example gives the same. TextBrewer's loss of this
  name compares products of hidden states.

  >>> maps = jnp.array([1.0, 0.0]).reshape(1, 2, 1, 1)
  >>> neuron_selectivity(maps, maps[:, ::-1]).tolist()
  [2.0]
  """
  student, teacher = map_pair(student, teacher)
  student, teacher = unit(student, (1, 2)), unit(teacher, (1, 2))

  def mean_kernel(a: Array, b: Array) -> Array:
    return jnp.mean(jnp.square(product("bhwc,bhwd->bcd", a, b)), axis=(1, 2))

  return (
    mean_kernel(teacher, teacher)
    + mean_kernel(student, student)
    - 2 * mean_kernel(student, teacher)
  )


def flow_of_solution(
  student_pair: Sequence[Float[AnyArray, "B _ _ _"]],
  teacher_pair: Sequence[Float[AnyArray, "B _ _ _"]],
) -> Float[Array, " B"]:
  """Flow of the solution procedure (FSP): how one layer's channels go with another's.

  mean over c and c' of (F_student − F_teacher)²_cc', F_cc' = mean over positions of
  lower_c · upper_c', (lower, upper) = student_pair or teacher_pair, pooled to one size.

  Args:
    student_pair: (lower map ``[B, H, W, C]``, upper map ``[B, H', W', C']``) of the student; the
      larger is average-pooled to the smaller (as PyTorch's ``adaptive_avg_pool2d``).
      Both widths are the teacher's.
    teacher_pair: likewise of the teacher. Its maps may have other sizes than the student's: F has
      no positions, so that they are not pooled to each other.

  Returns:
    ``[B]``.

  Raises:
    ValueError: a pair is not two maps, or the widths differ.

  Source: Yim, Joo, Bae, Kim, "A Gift from Knowledge Distillation: Fast Optimization, Network
  Minimization and Transfer Learning", 2017.

  Other codes: this is RepDistiller's; torchdistill max-pools the larger map and sums norms of
  columns, TextBrewer compares products of two layers' tokens.

  >>> ones = jnp.ones((1, 2, 2, 1))
  >>> flow_of_solution((ones, ones), (ones, 3 * ones[:, :1, :1])).tolist()
  [4.0]
  """
  for name, maps in (("student_pair", student_pair), ("teacher_pair", teacher_pair)):
    if len(maps) != 2:
      raise ValueError(f"{name} must be (lower map, upper map), got {len(maps)} of them.")
  for i in range(2):
    same_width(student_pair[i], teacher_pair[i], (f"student_pair[{i}]", f"teacher_pair[{i}]"))
  lower, upper, teacher_lower, teacher_upper = float_arrays(*student_pair, *teacher_pair)
  student, teacher = _flow(lower, upper), _flow(teacher_lower, teacher_upper)
  return jnp.mean(jnp.square(student - teacher), axis=(1, 2))


def inter_channel_correlation(
  student: Float[AnyArray, "B _ _ _"], teacher: Float[AnyArray, "B _ _ _"]
) -> Float[Array, " B"]:
  """Inter-channel correlation (ICKD): which channels of one example fire together.

  Σ_cc' (G_student − G_teacher)²_cc' / C, G = fᵀf over positions, ``[C, C]``, each row divided by
  max(its norm, 1e-12), for f = student and f = teacher as ``[H·W, C]``.

  Args:
    student: ``[B, H, W, C]``, with the teacher's channels.
    teacher: likewise; the larger map is average-pooled to the smaller (as
      PyTorch's ``adaptive_avg_pool2d``).

  Returns:
    ``[B]``.

  Raises:
    ValueError: the widths differ, or either is not a map.

  Source: Liu, Huang, Lin, Xie, Wang, Chang, Liang, "Exploring Inter-Channel Correlation for
  Diversity-Preserved Knowledge Distillation", 2021.

  Other codes: this, as the mean over the batch, divides the batch's sum by C·B; torchdistill
  divides it by C·B², so that its weight (500) means B times less.

  >>> student, teacher = jnp.ones((1, 1, 1, 2)), jnp.array([[[[1.0, 0.0]]]])
  >>> round(inter_channel_correlation(student, teacher).item(), 4)
  0.7929
  """
  same_width(student, teacher)
  student, teacher = map_pair(student, teacher)

  def correlations(maps: Array) -> Array:
    maps = tame(maps, (1, 2, 3))
    return unit(product("bhwc,bhwd->bcd", maps, maps))

  difference = correlations(student) - correlations(teacher)
  return jnp.sum(jnp.square(difference), axis=(1, 2)) / difference.shape[-1]


def attention_relation(
  student: Float[AnyArray, "B L _"],
  teacher: Float[AnyArray, "B L _"],
  *,
  num_heads: int,
  where: Shaped[AnyArray, "B L"] | None = None,
) -> Float[Array, "B L"]:
  """Self-attention relations (MiniLMv2): how positions attend to each other, by head.

  At each position the mean over relation heads of Σ_j A_teacher log(A_teacher / A_student)_j,
  A_j = softmax over valid positions j of (X Xᵀ / √(D / num_heads)) in this position's row,
  X = student or teacher of one head, ``[L, D / num_heads]``, D each network's own width.

  Args:
    student: ``[B, L, D]``, queries, keys or values of all heads side by side.
    teacher: ``[B, L, D']``; D' may differ from D.
    num_heads: relation heads, the same for both; it divides D and D', and need not be either
      network's own number of heads. MiniLMv2 takes 48 for a base model, 64 for a large one.
    where: ``[B, L]``, which positions are valid (not 0); the others may hold anything. None is all.

  Returns:
    ``[B, L]``, in nats; 0 at positions that are not valid.

  Raises:
    ValueError: ``num_heads`` does not divide a width, or the positions differ.

  Source: Wang, Bao, Huang, Dong, Wei, "MiniLMv2: Multi-Head Self-Attention Relation Distillation
  for Compressing Pretrained Transformers", 2021.

  Other codes: this is the paper's formula; TextBrewer's attention losses compare the networks' own
  attention scores, with equal numbers of heads.

  >>> student, teacher = jnp.zeros((1, 2, 1)), jnp.array([[[1.0], [0.0]]])
  >>> values = attention_relation(student, teacher, num_heads=1)
  >>> [round(value, 4) for value in values[0].tolist()]
  [0.1109, 0.0]
  """
  shapes = np.shape(student), np.shape(teacher)
  if shapes[0][:2] != shapes[1][:2]:
    raise ValueError(f"student {shapes[0]} and teacher {shapes[1]} must have the same positions.")
  for name, shape in zip(("student", "teacher"), shapes, strict=True):
    if num_heads < 1 or shape[-1] % num_heads:
      raise ValueError(
        f"num_heads must divide the width of {name} {shape}, got {num_heads}: choose another "
        "number, or use a projector."
      )
  student, teacher = float_arrays(student, teacher)
  valid = jnp.ones(shapes[0][:2], bool) if where is None else jnp.asarray(where).astype(bool)
  if valid.shape != shapes[0][:2]:
    raise ValueError(f"where must have shape {shapes[0][:2]}, got {valid.shape}.")

  def log_attention(x: Array) -> Array:
    # Before the product as well as after it: a value that is masked only later can still leak NaN.
    x = jnp.where(valid[..., None], x, 0.0).reshape(*x.shape[:2], num_heads, -1)
    x = jnp.clip(x, -_LARGEST, _LARGEST)
    scores = product("bqhd,bkhd->bhqk", x, x) / x.shape[-1] ** 0.5
    return jax.nn.log_softmax(jnp.where(valid[:, None, None, :], scores, MASKED), axis=-1)

  values = jnp.mean(kl(log_attention(teacher), log_attention(student)), axis=1)
  return jnp.where(valid, values, 0.0)


def _attention(maps: Array) -> Array:
  """Energy per position, ``[B, H, W]``, as a unit vector of each example."""
  return unit(jnp.mean(jnp.square(tame(maps, (1, 2, 3))), axis=-1), (1, 2))


def _flow(lower: Array, upper: Array) -> Array:
  """Mean over positions of lower ⊗ upper, ``[B, C, C']``."""
  lower, upper = map_pair(lower, upper)
  return product("bhwc,bhwd->bcd", lower, upper) / (lower.shape[1] * lower.shape[2])
