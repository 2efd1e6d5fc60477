"""Losses on features, from hints to attention relations: one value per example.

Student first, teacher second. Features are vectors ``[B, D]``, tokens ``[B, L, D]`` or maps
``[B, H, W, C]``; of two maps the larger is average-pooled to the smaller along each axis (PyTorch's
adaptive average pooling), and a different width is an error: use a projector. Inputs are computed
in float32 (float64 stays float64), nothing is averaged over the batch, and no gradient is ever
stopped: freezing the teacher is the business of the teacher's forward pass.

The losses that compare a summary of each map or its relations inside (attention, Gram matrices)
are written in `summaries`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdistill.losses._log_space import AnyArray, Scalar, float_arrays
from jaxdistill.losses._maps import (
  SMALLEST_NORM,
  map_pair,
  pair,
  product,
  same_width,
  unit,
)
from jaxdistill.losses.summaries import (
  attention_relation,
  attention_transfer,
  factor_transfer,
  flow_of_solution,
  inter_channel_correlation,
  neuron_selectivity,
)
from jaxdistill.pooling import average_pool

__all__ = [
  "activation_boundary",
  "attention_relation",
  "attention_transfer",
  "factor_transfer",
  "flow_of_solution",
  "hierarchical_context",
  "hint_cosine",
  "hint_l2",
  "inter_channel_correlation",
  "neuron_selectivity",
  "overhaul",
  "overhaul_margin",
  "variational_information",
]


def hint_l2(
  student: Float[AnyArray, "B ..."], teacher: Float[AnyArray, "B ..."]
) -> Float[Array, "B ..."]:
  """Hints (FitNets): squared error of two features.

  mean (student − teacher)² over all axes but the batch's: H, W and C of maps, D of vectors and
  tokens.

  Args:
    student: ``[B, D]``, ``[B, L, D]`` or ``[B, H, W, C]``, projected to the teacher's width.
    teacher: likewise; of two maps the larger is average-pooled to the smaller (as
      PyTorch's ``adaptive_avg_pool2d``).

  Returns:
    ``[B]``; ``[B, L]`` for tokens.

  Raises:
    ValueError: the widths differ, or the shapes cannot be matched.

  Source: Romero, Ballas, Kahou, Chassang, Gatta, Bengio, "FitNets: Hints for Thin Deep Nets", 2015.

  Other codes: this, as the mean over the batch, is the number of RepDistiller, mdistiller and (over
  tokens) TextBrewer; the paper has half of the sum, and torchdistill's FitNet configurations sum.

  >>> hint_l2(jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 0.0]])).tolist()
  [2.0]
  """
  student, teacher = pair(student, teacher)
  return jnp.mean(jnp.square(student - teacher), axis=_own_axes(student))


def hint_cosine(
  student: Float[AnyArray, "B ..."], teacher: Float[AnyArray, "B ..."]
) -> Float[Array, "B ..."]:
  """Hints by direction (Lcos of DistilBERT): cosine distance of two features.

  mean over positions of 1 − n(student)·n(teacher), n(v) = v / max(‖v‖, 1e-12) over the last axis,
  so that it is 1 where either is 0.

  Args:
    student: ``[B, D]``, ``[B, L, D]`` or ``[B, H, W, C]``, projected to the teacher's width.
    teacher: likewise; of two maps the larger is average-pooled to the smaller (as
      PyTorch's ``adaptive_avg_pool2d``).

  Returns:
    ``[B]``, in [0, 2]; ``[B, L]`` for tokens, each of which is a position.

  Raises:
    ValueError: the widths differ, or the shapes cannot be matched.

  Source: Sanh, Debut, Chaumond, Wolf, "DistilBERT, a distilled version of BERT: smaller, faster,
  cheaper and lighter", 2019 (for hidden states).

  Other codes: PyTorch's ``cosine_embedding_loss``, which DistilBERT and TextBrewer use, is this but
  for vectors near 0; Tunix has no floor under the norms and divides 0 by 0 there.

  >>> hint_cosine(jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 3.0]])).tolist()
  [1.0]
  """
  student, teacher = pair(student, teacher)
  distance = 1 - product("...c,...c->...", unit(student), unit(teacher))
  return jnp.mean(distance, axis=_own_axes(student)[:-1])


def hierarchical_context(
  student: Float[AnyArray, "B _ _ _"], teacher: Float[AnyArray, "B _ _ _"]
) -> Float[Array, " B"]:
  """Hierarchical context loss (HCL) of ReviewKD: squared errors at several sizes.

  Σ_l weight_l · mean (student_l − teacher_l)² / Σ_l weight_l, student_l and teacher_l the maps
  at level l and the mean over all their axes but the batch's; the levels are the full size with
  weight 1 and the maps average-pooled to 4×4, 2×2 and 1×1. A level that is not smaller than the
  map's height is skipped; the weight halves at each level used (a 4×4 map: 1, then ½ at 2 and
  ¼ at 1).

  Args:
    student: ``[B, H, W, C]``, with the teacher's channels (ReviewKD fuses stages to that end).
    teacher: likewise; the larger map is average-pooled to the smaller first (as PyTorch's
      ``adaptive_avg_pool2d``, and so are the levels).

  Returns:
    ``[B]``.

  Raises:
    ValueError: the widths differ, or either is not a map.

  Source: Chen, Liu, Zhao, Jia, "Distilling Knowledge via Knowledge Review", 2021.

  Other codes: levels and weights are here the published code's, mdistiller's and torchdistill's,
  whose number is the sum over stages of the mean over the batch.

  >>> maps = jnp.array([1.0, -1.0]).reshape(1, 2, 1, 1)
  >>> value = hierarchical_context(maps, jnp.zeros((1, 2, 1, 1)))
  >>> round(value.item(), 4)  # (1 + ½ · 0) / 1.5
  0.6667
  """
  same_width(student, teacher)
  student, teacher = map_pair(student, teacher)
  # Averages of differences are differences of averages.
  difference = student - teacher
  height = difference.shape[1]
  total, weight, weights = _mean_square(difference), 1.0, 1.0
  for level in (4, 2, 1):
    if level < height:
      weight /= 2
      weights += weight
      total = total + weight * _mean_square(average_pool(difference, level, level))
  return total / weights


def variational_information(
  student_mean: Float[AnyArray, "B ..."],
  teacher: Float[AnyArray, "B ..."],
  *,
  raw_variance: Float[AnyArray, " C"],
) -> Float[Array, "B ..."]:
  """Variational information distillation (VID): likelihood of the teacher's feature.

  mean of ½[(student_mean − teacher)² / σ² + log σ²] over all axes but the batch's,
  σ² = softplus(raw_variance) + 1e-5 for each channel, softplus(x) = log(1 + exp(x)).

  Args:
    student_mean: ``[B, D]``, ``[B, L, D]`` or ``[B, H, W, C]``: the mean that a projector predicts.
    teacher: likewise; of two maps the larger is average-pooled to the smaller (as
      PyTorch's ``adaptive_avg_pool2d``).
    raw_variance: ``[C]``, learned with the student. The published code starts at σ² = 5:
      log(exp(5 − 1e-5) − 1).

  Returns:
    ``[B]``; ``[B, L]`` for tokens. It can be negative, and is least where σ² is the mean squared
    error (½(1 + log σ²) there).

  Raises:
    ValueError: the widths differ, or the shapes cannot be matched.

  Source: Ahn, Hu, Damianou, Lawrence, Dai, "Variational Information Distillation for Knowledge
  Transfer", 2019.

  Other codes: this, as the mean over the batch, is RepDistiller's and torchdistill's number for one
  stage; mdistiller never trains the variance, which stays 5 there.

  >>> at_five = jnp.log(jnp.expm1(jnp.array([5.0 - 1e-5])))
  >>> mean, teacher = jnp.array([[1.0]]), jnp.array([[3.0]])
  >>> round(variational_information(mean, teacher, raw_variance=at_five).item(), 4)
  1.2047
  """
  same_width(student_mean, raw_variance, ("student_mean", "raw_variance"))
  mean, teacher = pair(student_mean, teacher)
  raw = jnp.asarray(raw_variance, mean.dtype)
  variance = jax.nn.softplus(raw).reshape((1,) * (mean.ndim - 1) + (-1,)) + 1e-5
  values = 0.5 * (jnp.square(mean - teacher) / variance + jnp.log(variance))
  return jnp.mean(values, axis=_own_axes(mean))


def activation_boundary(
  student: Float[AnyArray, "B _ _ _"],
  teacher: Float[AnyArray, "B _ _ _"],
  *,
  margin: Scalar = 1.0,
) -> Float[Array, " B"]:
  """Activation boundaries (AB): which units are on, with a hinge of width ``margin``.

  Σ over H, W, C of (s + margin)²·[s > −margin, t ≤ 0] + (s − margin)²·[s ≤ margin, t > 0],
  s = student, t = teacher, both before their activation; [·] is 1 where all of it holds, else 0.

  Args:
    student: ``[B, H, W, C]``, with the teacher's channels.
    teacher: likewise; the larger map is average-pooled to the smaller (as
      PyTorch's ``adaptive_avg_pool2d``).
    margin: how far on the teacher's side a unit has to be, ≥ 0. 1 is the published code's.

  Returns:
    ``[B]``, a sum and no mean.

  Raises:
    ValueError: the widths differ, or either is not a map.

  Source: Heo, Lee, Yun, Choi, "Knowledge Transfer via Distillation of Activation Boundaries Formed
  by Hidden Neurons", 2019.

  Other codes: this, as the mean over the batch, is one stage of RepDistiller and torchdistill;
  RepDistiller weighs stage i of n by 2^(i − n + 1) and the sum of stages by 3/1000, torchdistill
  every stage by 1.

  >>> student = jnp.array([0.5, 0.5, -2.0]).reshape(1, 1, 1, 3)
  >>> teacher = jnp.array([-1.0, 1.0, -1.0]).reshape(1, 1, 1, 3)
  >>> activation_boundary(student, teacher).tolist()  # 1.5² + 0.5² + 0
  [2.5]
  """
  same_width(student, teacher)
  student, teacher = map_pair(student, teacher)
  margin = jnp.asarray(margin, student.dtype)
  # Picked before the square: what does not count may be too large for one.
  off = jnp.where((student > -margin) & (teacher <= 0), student + margin, 0.0)
  on = jnp.where((student <= margin) & (teacher > 0), student - margin, 0.0)
  return jnp.sum(jnp.square(off) + jnp.square(on), axis=(1, 2, 3))


def overhaul(
  student: Float[AnyArray, "B _ _ _"],
  teacher: Float[AnyArray, "B _ _ _"],
  *,
  margin: Float[AnyArray, " C"],
) -> Float[Array, " B"]:
  """Overhaul of feature distillation (OFD): partial L2 before the activation.

  Σ over H, W, C of (s − m)²·[s > m, t ≤ m] + (s − t)²·[s > t, m < t ≤ 0] + (s − t)²·[t > 0],
  s = student, t = teacher, m = margin; [·] is 1 where all of it holds, else 0.

  So a unit that the teacher has off need only be below the margin.

  Args:
    student: ``[B, H, W, C]`` before the activation, with the teacher's channels.
    teacher: likewise; the larger map is average-pooled to the smaller (as
      PyTorch's ``adaptive_avg_pool2d``).
    margin: ``[C]``, ≤ 0, from `overhaul_margin`.

  Returns:
    ``[B]``, a sum and no mean.

  Raises:
    ValueError: the widths differ, or either is not a map.

  Source: Heo, Kim, Yun, Park, Kwak, Choi, "A Comprehensive Overhaul of Feature Distillation", 2019.

  Other codes: this, as the mean over the batch, is one stage of the published code and of
  mdistiller, which divide stage i of n by 2^(n − i − 1), weigh the sum by 1e-3, and keep the
  teacher's BatchNorm in training mode; here the teacher is frozen.

  >>> student = jnp.array([0.0, 0.5, -3.0]).reshape(1, 1, 1, 3)
  >>> teacher = jnp.array([-9.0, 1.0, -0.5]).reshape(1, 1, 1, 3)
  >>> overhaul(student, teacher, margin=jnp.full(3, -1.0)).tolist()  # 1² + 0.5² + 0
  [1.25]
  """
  same_width(student, teacher)
  same_width(student, margin, ("student", "margin"))
  student, teacher = map_pair(student, teacher)
  margin = jnp.asarray(margin, student.dtype).reshape(1, 1, 1, -1)
  target = jnp.where(teacher > margin, teacher, margin)
  counts = (teacher > 0) | (student > target)
  # Picked before the square: what does not count may be too large for one.
  return jnp.sum(jnp.square(jnp.where(counts, student - target, 0.0)), axis=(1, 2, 3))


def overhaul_margin(
  scale: Float[AnyArray, " C"], bias: Float[AnyArray, " C"]
) -> Float[Array, " C"]:
  """Margins of the overhaul (OFD): what a teacher's unit is on average while it is off.

  m = E[x | x < 0] of x ~ N(bias, scale²) = bias − |scale|·φ(bias / |scale|) / Φ(−bias / |scale|),
  or −3·|scale| where x < 0 has a probability Φ(−bias / |scale|) ≤ 1e-3;
  φ and Φ are the density and the distribution function of N(0, 1).

  Args:
    scale: ``[C]``, the weight of the teacher's last BatchNorm before the activation.
    bias: ``[C]``, its bias.

  Returns:
    ``[C]``, ≤ 0; for `overhaul`, once before training.

  Source: Heo, Kim, Yun, Park, Kwak, Choi, "A Comprehensive Overhaul of Feature Distillation", 2019.

  Other codes: 1e-3 and −3 are here the published code's and mdistiller's.

  >>> margin = overhaul_margin(jnp.array([1.0, -2.0]), jnp.array([0.0, 9.0]))
  >>> [round(value, 4) for value in margin.tolist()]
  [-0.7979, -6.0]
  """
  scale, bias = float_arrays(scale, bias)
  # A floor and a clip, so that a channel that BatchNorm has switched off stays finite. Beyond them
  # the ratio below is 0, or the rule of thumb holds.
  spread = jnp.maximum(jnp.abs(scale), SMALLEST_NORM)
  z = jnp.clip(bias, -20 * spread, 4 * spread) / spread
  log_off = jax.scipy.stats.norm.logcdf(-z)
  mean = bias - spread * jnp.exp(jax.scipy.stats.norm.logpdf(z) - log_off)
  return jnp.where(jnp.exp(log_off) > 1e-3, mean, -3 * jnp.abs(scale))


def _mean_square(x: Array) -> Array:
  """Mean of squares over all axes but the first."""
  return jnp.mean(jnp.square(x), axis=tuple(range(1, x.ndim)))


def _own_axes(features: Array) -> tuple[int, ...]:
  """The axes that belong to one value: all but the batch's, and of tokens the last."""
  return (2,) if features.ndim == 3 else tuple(range(1, features.ndim))
