"""Losses on features, from hints to attention relations: one value per example.

Student first, teacher second. Features are vectors ``[B, D]``, tokens ``[B, L, D]`` or maps
``[B, H, W, C]``; of two maps the larger is average-pooled to the smaller along each axis (PyTorch's
adaptive average pooling), and a different width is an error: use a projector. Inputs are computed
in float32 (float64 stays float64), nothing is averaged over the batch, and no gradient is ever
stopped: freezing the teacher is the business of the teacher's forward pass.

The losses from `attention_transfer` on compare what a map or a sentence is summed up to: it has no
channel axis or a square one, so that several of them take networks of different widths. They give
one value per example, `attention_relation` one per position.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from jaxdistill import _check
from jaxdistill.losses._log_space import (
  MASKED,
  AnyArray,
  Scalar,
  absolute,
  counted,
  float_arrays,
  kl,
  log_probabilities,
)
from jaxdistill.losses._maps import (
  SMALLEST_NORM,
  Features,
  Maps,
  both_maps,
  huber,
  map_pair,
  pair,
  product,
  same_width,
  tame,
  unit,
)
from jaxdistill.losses.pooling import average_pool

__all__ = [
  "activation_boundary",
  "attention_relation",
  "attention_transfer",
  "channel_wise",
  "class_attention",
  "factor_transfer",
  "flow_of_solution",
  "hierarchical_context",
  "hint_cosine",
  "hint_l2",
  "hint_normalized",
  "inter_channel_correlation",
  "many_to_one",
  "neuron_selectivity",
  "overhaul",
  "overhaul_margin",
  "pairwise_structure",
  "variational_information",
]

# Products of larger queries and keys leave float32.
_LARGEST = 1e15


def hint_l2(student: Features, teacher: Features) -> Float[Array, "B ..."]:
  """Hints (FitNets): squared error of two features.

  mean (student − teacher)² over all axes but the batch's: H, W and C of maps, D of vectors and
  tokens.

  Args:
    student: ``[B, D]``, ``[B, L, D]`` or ``[B, H, W, C]``, projected to the teacher's width.
    teacher: ``[B, D]``, ``[B, L, D]`` or ``[B, H', W', C]``; of two maps the larger is
      average-pooled to the smaller (as PyTorch's ``adaptive_avg_pool2d``).

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
  # A token is a value of its own, so that a mask over padding can still reach it: [B, L].
  return _mean_square(student - teacher)


def many_to_one(student: Maps, teacher: Maps) -> Float[Array, " B"]:
  """Many-to-one matching (NORM): the student's map in several segments, each of them the teacher's.

  Σ_n mean (student_n − teacher)², student_n the n-th of N segments of the student's channels and
  the mean over H, W and C.

  Args:
    student: ``[B, H, W, N · C]``, expanded to a multiple of the teacher's width.
    teacher: ``[B, H', W', C]``; of two sizes the larger is average-pooled to the smaller.

  Returns:
    ``[B]``.

  Raises:
    ValueError: either is no map, or the student's width is no multiple of the teacher's.

  Source: Liu, Li, Li, Yao, "NORM: Knowledge Distillation via N-to-One Representation Matching",
  2023.

  Other codes: this, as the mean over the batch, is the published code's for maps of one size; the
  larger of two (on CIFAR the teacher's alone) it max-pools.

  >>> student = jnp.array([1.0, 2.0, 5.0, 2.0]).reshape(1, 1, 1, 4)
  >>> many_to_one(student, jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)).tolist()
  [12.0]
  """
  wide, narrow = np.shape(student), np.shape(teacher)
  if len(wide) != 4 or len(narrow) != 4 or wide[3] % narrow[3]:
    raise ValueError(
      f"student {wide} must be a map [B, H, W, N * C] for the teacher's [B, H, W, C] {narrow}: "
      "expand it to a multiple of that width (recipes.with_many_to_one)."
    )
  segments = wide[3] // narrow[3]
  # The mean over all N · C channels is a Nth of the sum over segments.
  return segments * hint_l2(student, jnp.tile(jnp.asarray(teacher), (1, 1, 1, segments)))


def hint_cosine(student: Features, teacher: Features) -> Float[Array, "B ..."]:
  """Hints by direction (Lcos of DistilBERT): cosine distance of two features.

  mean over positions of 1 − n(student)·n(teacher), n(v) = v / max(‖v‖, 1e-12) over the last axis,
  so that it is 1 where either is 0.

  Args:
    student: ``[B, D]``, ``[B, L, D]`` or ``[B, H, W, C]``, projected to the teacher's width.
    teacher: ``[B, D]``, ``[B, L, D]`` or ``[B, H', W', C]``; of two maps the larger is
      average-pooled to the smaller (as PyTorch's ``adaptive_avg_pool2d``).

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
  # One cosine at each position, [B, H, W] of maps: a unit that is 0 there has no direction, and
  # `unit` gives it no gradient, where the formula's own would be 1e12.
  distance = 1 - product("...c,...c->...", unit(student), unit(teacher))
  return jnp.mean(distance, axis=_own_axes(student)[:-1])


def hint_normalized(
  student: Float[AnyArray, "B *_ D"], teacher: Float[AnyArray, "B *_ D"]
) -> Float[Array, "B ..."]:
  """Hints to a normalised teacher (VkD): smooth L1 to the teacher's feature as z-scores.

  mean_d Huber(student_d − z_d), z = (teacher − mean_d teacher) / √(mean_d (teacher − mean_d
  teacher)² + 1e-5); Huber(x) = ½x² for |x| < 1, else |x| − ½.

  Args:
    student: ``[B, D]`` or ``[B, L, D]``, projected to the teacher's width.
    teacher: ``[B, D]`` or ``[B, L, D]``; its scale and its mean count for nothing.

  Returns:
    ``[B]``; ``[B, L]`` for tokens.

  Raises:
    ValueError: the widths or the positions differ, or either is a map.

  Source: Miles, Elezi, Deng, "VkD: Improving Knowledge Distillation using Orthogonal Projections",
  2024.

  Other codes: this, as the mean over the batch, is the published code's of classification, where
  the student comes through an orthogonal projector (`recipes.projectors.Orthogonal`); for
  generation and detection it normalises by other means.

  >>> hint_normalized(jnp.zeros((1, 2)), jnp.array([[0.0, 1e6]])).tolist()
  [0.5]
  """
  student, teacher = pair(student, teacher)
  if student.ndim == 4:
    raise ValueError(
      f"student {student.shape} and teacher {teacher.shape} must be vectors [B, D] or tokens "
      "[B, L, D]: pool the maps first."
    )
  # A LayerNorm without scale and bias. Tamed, so that no square leaves float32; the floor of
  # 1e-5 under the variance is for what is nearly constant, and large features have none.
  centred = teacher - jnp.mean(teacher, axis=-1, keepdims=True)
  small = tame(centred, -1)
  z = small / jnp.sqrt(jnp.mean(jnp.square(small), axis=-1, keepdims=True) + 1e-5)
  return jnp.mean(huber(student - z), axis=-1)


def hierarchical_context(student: Maps, teacher: Maps) -> Float[Array, " B"]:
  """Hierarchical context loss (HCL) of ReviewKD: squared errors at several sizes.

  Σ_l weight_l · mean (student_l − teacher_l)² / Σ_l weight_l, student_l and teacher_l the maps
  at level l and the mean over all their axes but the batch's; the levels are the full size with
  weight 1 and the maps average-pooled to 4×4, 2×2 and 1×1. A level that is not smaller than the
  map's height is skipped; the weight halves at each level used (a 4×4 map: 1, then ½ at 2 and
  ¼ at 1).

  Args:
    student: ``[B, H, W, C]``, with the teacher's channels (ReviewKD fuses stages to that end).
    teacher: ``[B, H', W', C]``; the larger map is average-pooled to the smaller first (as PyTorch's
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
  # Averages of differences are differences of averages: one map is pooled, not two.
  difference = student - teacher
  height = difference.shape[1]
  total, weight, weights = _mean_square(difference), 1.0, 1.0
  # Coarse levels ask what is there, the full size where it is.
  for level in (4, 2, 1):
    if level < height:
      weight /= 2
      weights += weight
      total = total + weight * _mean_square(average_pool(difference, level, level))
  return total / weights


def variational_information(
  student_mean: Features, teacher: Features, *, raw_variance: Float[AnyArray, " C"]
) -> Float[Array, "B ..."]:
  """Variational information distillation (VID): likelihood of the teacher's feature.

  mean of ½[(student_mean − teacher)² / σ² + log σ²] over all axes but the batch's,
  σ² = softplus(raw_variance) + 1e-5 for each channel, softplus(x) = log(1 + exp(x)).

  Args:
    student_mean: ``[B, D]``, ``[B, L, D]`` or ``[B, H, W, C]``: the mean that a projector predicts.
    teacher: ``[B, D]``, ``[B, L, D]`` or ``[B, H', W', C]``; of two maps the larger is
      average-pooled to the smaller (as PyTorch's ``adaptive_avg_pool2d``).
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
  # softplus, since an optimiser would walk a variance through 0; the published 1e-5 keeps the
  # quotient finite where it has nearly vanished. [C] meets [..., C].
  raw = jnp.asarray(raw_variance, mean.dtype)
  variance = jax.nn.softplus(raw).reshape((1,) * (mean.ndim - 1) + (-1,)) + 1e-5
  # −log of the Gaussian's density without ½ log 2π: log σ² keeps the variance from growing away.
  values = 0.5 * (jnp.square(mean - teacher) / variance + jnp.log(variance))
  return jnp.mean(values, axis=_own_axes(mean))


def activation_boundary(
  student: Maps, teacher: Maps, *, margin: Scalar = 1.0
) -> Float[Array, " B"]:
  """Activation boundaries (AB): which units are on, with a hinge of width ``margin``.

  Σ over H, W, C of (s + margin)²·[s > −margin, t ≤ 0] + (s − margin)²·[s ≤ margin, t > 0],
  s = student, t = teacher, both before their activation; [·] is 1 where all of it holds, else 0.

  Args:
    student: ``[B, H, W, C]``, with the teacher's channels.
    teacher: ``[B, H', W', C]``; the larger map is average-pooled to the smaller (as
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
  # The hinge that stands in for "are the signs equal?", which has no gradient anywhere.
  # Picked before the square: what does not count may be too large for one.
  off = jnp.where((student > -margin) & (teacher <= 0), student + margin, 0.0)
  on = jnp.where((student <= margin) & (teacher > 0), student - margin, 0.0)
  return jnp.sum(jnp.square(off) + jnp.square(on), axis=(1, 2, 3))


def overhaul(student: Maps, teacher: Maps, *, margin: Float[AnyArray, " C"]) -> Float[Array, " B"]:
  """Overhaul of feature distillation (OFD): partial L2 before the activation.

  Σ over H, W, C of (s − m)²·[s > m, t ≤ m] + (s − t)²·[s > t, m < t ≤ 0] + (s − t)²·[t > 0],
  s = student, t = teacher, m = margin; [·] is 1 where all of it holds, else 0.

  So a unit that the teacher has off need only be below the margin.

  Args:
    student: ``[B, H, W, C]`` before the activation, with the teacher's channels.
    teacher: ``[B, H', W', C]`` before the activation; the larger map is average-pooled to the
      smaller (as PyTorch's ``adaptive_avg_pool2d``).
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
  # A value below the margin is as off as can be: nobody asks how far below.
  target = jnp.where(teacher > margin, teacher, margin)
  # Where the teacher is on, both directions count; where it is off, only being too large does.
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
  # φ/Φ as a difference of logarithms: both underflow for a unit that is hardly ever off.
  log_off = jax.scipy.stats.norm.logcdf(-z)
  mean = bias - spread * jnp.exp(jax.scipy.stats.norm.logpdf(z) - log_off)
  return jnp.where(jnp.exp(log_off) > 1e-3, mean, -3 * jnp.abs(scale))


def attention_transfer(student: Maps, teacher: Maps) -> Float[Array, " B"]:
  """Attention transfer (AT): where in the image the energy of the activations is.

  mean over H·W of (a_student − a_teacher)², a_f = v / max(‖v‖, 1e-12), v = mean_c f² flattened
  to ``[H·W]``, for f = student and f = teacher.

  Args:
    student: ``[B, H, W, C]``; its channels need not be the teacher's.
    teacher: ``[B, H', W', C']``; the larger map is average-pooled to the smaller (as
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
  # Two [B, H, W] without channels, hence of any two widths.
  return jnp.mean(jnp.square(_attention(student) - _attention(teacher)), axis=(1, 2))


def channel_wise(
  student: Maps,
  teacher: Maps,
  *,
  temperature: Scalar = 4.0,
  where: Shaped[AnyArray, "B H W"] | None = None,
) -> Float[Array, " B"]:
  """Channel-wise distillation (CWD): where in the image each channel is strongest.

  temperature² · mean_c KL(a_c ‖ b_c), KL(a ‖ b) = Σ_i a_i log(a_i / b_i) over positions i,
  a_c and b_c = softmax over positions of channel c of teacher / temperature and of
  student / temperature.

  Args:
    student: ``[B, H, W, C]``, with the teacher's channels: a map, or the logits of each pixel.
    teacher: ``[B, H', W', C]``; the larger map is average-pooled to the smaller (as
      PyTorch's ``adaptive_avg_pool2d``).
    temperature: softens both, > 0. 4 is the published code's.
    where: ``[B, H, W]`` of the smaller map, which positions count (not 0); the others may hold
      anything, but for NaN in a map that is pooled. None counts all.

  Returns:
    ``[B]``, in nats · temperature²; 0 where no position counts.

  Raises:
    ValueError: the widths differ, either is not a map, or ``where`` has another size.

  Source: Shu, Liu, Gao, Yan, Shen, "Channel-wise Knowledge Distillation for Dense Prediction",
  2021.

  Other codes: this, as the mean over the batch, is the published code's and CIRKD's; both take
  logarithms of a softmax, −inf at strong peaks, and leave out no position.

  >>> teacher = jnp.array([0.0, 4.0]).reshape(1, 2, 1, 1)
  >>> round(channel_wise(jnp.zeros((1, 2, 1, 1)), teacher).item(), 4)  # 16 · KL(softmax(0, 1) ‖ ½)
  1.7751
  """
  same_width(student, teacher)
  student, teacher = map_pair(student, teacher)
  size = student.shape[1] * student.shape[2]
  if size == 1:
    raise ValueError(
      f"student and teacher meet at {student.shape}, one position, of which a softmax makes 1 "
      "whatever it is: name a layer before the pooling."
    )
  valid = counted(where, student.shape[:3])[..., None]

  def flat(maps: Array) -> Array:
    # [B, C, H·W]: each channel is a distribution over the image, however strong it is. A position
    # that does not count is a class that is masked.
    maps = jnp.where(valid, maps, -jnp.inf)
    return jnp.moveaxis(maps.reshape(maps.shape[0], size, maps.shape[-1]), 1, 2)

  log_q, log_p, squared = log_probabilities(flat(student), flat(teacher), temperature)
  return squared * jnp.mean(kl(log_p, log_q), axis=1)


def class_attention(
  student: Maps, teacher: Maps, *, size: int = 2, normalize: bool = False
) -> Float[Array, " B"]:
  """Class attention (CAT-KD): where in the image the evidence for each class is.

  mean over H, W and K of (s − t)², s and t = student and teacher average-pooled to size × size,
  and with normalize each class's map then divided by max(its norm, 1e-12).

  Args:
    student: ``[B, H, W, K]``, a score of each class at each position, whose mean over positions is
      the logit but for its bias (`recipes.with_class_maps`).
    teacher: ``[B, H', W', K]``, of the same classes.
    size: what both are pooled to (as PyTorch's ``adaptive_avg_pool2d``). 2 is the published code's
      for most pairs of CIFAR-100; 4 with a ShuffleNet, and on ImageNet for ResNet-18.
    normalize: False is the published code's for pairs of one style, True for others.

  Returns:
    ``[B]``.

  Raises:
    ValueError: the classes differ, either is not a map, or ``size`` is not at least 1.

  Source: Guo, Yan, Li, Lu, "Class Attention Transfer Based Knowledge Distillation", 2023.

  Other codes: this, as the mean over the batch, is the published code's.

  >>> maps = jnp.array([1.0, 0.0, 3.0, 0.0]).reshape(1, 2, 2, 1)
  >>> class_attention(maps, jnp.zeros((1, 4, 4, 1)), size=1).tolist()
  [1.0]
  """
  _check.whole("size", size)
  same_width(student, teacher)
  # Each to that size by itself: two that met before would be pooled twice, by uneven windows.
  student, teacher = (average_pool(maps, size, size) for maps in both_maps(student, teacher))
  if normalize:
    student, teacher = unit(student, (1, 2)), unit(teacher, (1, 2))
  return _mean_square(student - teacher)


def pairwise_structure(student: Maps, teacher: Maps, *, window: int = 2) -> Float[Array, " B"]:
  """Pair-wise structure (SKD): which positions of an image look alike.

  mean over positions i and j of (n(s_i)·n(s_j) − n(t_i)·n(t_j))², s and t = student and teacher
  max-pooled over window × window, one vector at each position; n(v) = v / max(‖v‖, 1e-12).

  Args:
    student: ``[B, H, W, C]``; its channels need not be the teacher's.
    teacher: ``[B, H', W', C']``; the larger map is average-pooled to the smaller first (as
      PyTorch's ``adaptive_avg_pool2d``).
    window: side of the windows, which do not overlap; the last may be cut off at the edge. 2 is
      IFVD's; 1 takes the map as it is. Pairs are (H·W / window²)² numbers an example.

  Returns:
    ``[B]``.

  Raises:
    ValueError: either is not a map, ``window`` is not at least 1, or it leaves one position.

  Source: Liu, Chen, Liu, Qin, Luo, Wang, "Structured Knowledge Distillation for Semantic
  Segmentation", 2019.

  Other codes: this, as the mean over the batch, has the published code's and IFVD's values, which
  add 1e-8 to each norm; they take the norms for constants, so that their gradient also pulls on
  the vectors' lengths, which changes no similarity. The published code's windows are half of the
  map.

  >>> maps = jnp.array([[1.0, 0.0], [0.0, 1.0]]).reshape(1, 2, 1, 2)
  >>> value = pairwise_structure(maps, jnp.ones((1, 2, 1, 3)), window=1)
  >>> round(value.item(), 4)  # (0 + 1 + 1 + 0) / 4
  0.5
  """
  _check.whole("window", window)
  student, teacher = map_pair(student, teacher)
  if max(student.shape[1:3]) <= window:
    raise ValueError(
      f"window={window} leaves one position of {student.shape}, which is like itself whatever it "
      "is: take a smaller window, or a layer before the pooling."
    )

  def similarities(maps: Array) -> Array:
    pooled = unit(_max_pool(maps, window))
    nodes = pooled.reshape(maps.shape[0], -1, maps.shape[-1])
    # [B, N, N]: a table of the positions, which has no channels.
    return product("bnc,bmc->bnm", nodes, nodes)

  return jnp.mean(jnp.square(similarities(student) - similarities(teacher)), axis=(1, 2))


def factor_transfer(student: Maps, teacher: Maps) -> Float[Array, " B"]:
  """Factor transfer (FT): distance of two factors' energies over the image.

  mean over H·W of |n(mean_c student²) − n(mean_c teacher²)|, n(v) = v / max(‖v‖, 1e-12) of the
  flattened map, ``[H·W]``.

  Args:
    student: ``[B, H, W, C]``, the translator's output; its channels need not be the teacher's.
    teacher: ``[B, H', W', C']``, the paraphraser's; the larger map is average-pooled to the
      smaller (as PyTorch's ``adaptive_avg_pool2d``).

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
  # L1 of what attention transfer squares; `absolute` has no gradient at a tie, JAX's |x| has one.
  return jnp.mean(absolute(_attention(student) - _attention(teacher)), axis=(1, 2))


def neuron_selectivity(student: Maps, teacher: Maps) -> Float[Array, " B"]:
  """Neuron selectivity transfer (NST): where channels fire, by maximum mean discrepancy.

  mean_cc' k(t_c, t_c') + mean_cc' k(s_c, s_c') − 2 mean_cc' k(s_c, t_c'), k(a, b) = (aᵀb)²,
  s_c = n(channel c of student), t_c = n(channel c of teacher), flattened to ``[H·W]`` after the
  maps have been pooled to one size, n(v) = v / max(‖v‖, 1e-12); every pair counts, c = c' too.

  Args:
    student: ``[B, H, W, C]``; its channels need not be the teacher's.
    teacher: ``[B, H', W', C']``; the larger map is average-pooled to the smaller (as
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
  # Each channel a unit vector over H·W: its pattern counts, not how strongly it fires.
  student, teacher = unit(student, (1, 2)), unit(teacher, (1, 2))

  def mean_kernel(a: Array, b: Array) -> Array:
    # [B, C, C']. The published [B, C, C', H·W] is 1.07 GB for the first stage of resnet32x4 at 64
    # examples; this is 1 MB.
    return jnp.mean(jnp.square(product("bhwc,bhwd->bcd", a, b)), axis=(1, 2))

  # Squared maximum mean discrepancy: how far apart two sets of patterns lie, in no order.
  return (
    mean_kernel(teacher, teacher)
    + mean_kernel(student, student)
    - 2 * mean_kernel(student, teacher)
  )


def flow_of_solution(
  student_pair: Sequence[Maps], teacher_pair: Sequence[Maps]
) -> Float[Array, " B"]:
  """Flow of the solution procedure (FSP): how one layer's channels go with another's.

  mean over c and c' of (F_student − F_teacher)²_cc', F_cc' = mean over positions of
  lower_c · upper_c', (lower, upper) = student_pair or teacher_pair, pooled to one size.

  Args:
    student_pair: (lower map ``[B, H, W, C]``, upper map ``[B, H', W', C']``) of the student; the
      larger is average-pooled to the smaller (as PyTorch's ``adaptive_avg_pool2d``).
      Both widths are the teacher's.
    teacher_pair: (lower map ``[B, H, W, C]``, upper map ``[B, H', W', C']``) of the teacher. They
      may have other sizes than the student's: F has no positions, so that they are not pooled to
      each other.

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
  # [B, C, C'] each: how much channel c of the lower layer goes along with c' of the upper one.
  student, teacher = _flow(lower, upper), _flow(teacher_lower, teacher_upper)
  return jnp.mean(jnp.square(student - teacher), axis=(1, 2))


def inter_channel_correlation(student: Maps, teacher: Maps) -> Float[Array, " B"]:
  """Inter-channel correlation (ICKD): which channels of one example fire together.

  Σ_cc' (G_student − G_teacher)²_cc' / C, G = fᵀf over positions, ``[C, C]``, each row divided by
  max(its norm, 1e-12), for f = student and f = teacher as ``[H·W, C]``.

  Args:
    student: ``[B, H, W, C]``, with the teacher's channels.
    teacher: ``[B, H', W', C]``; the larger map is average-pooled to the smaller (as
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
    # A scale of the whole example cancels in the rows' norms; its square might overflow first.
    maps = tame(maps, (1, 2, 3))
    # [B, C, C], rows of norm 1: which channels fire with c.
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
  valid = counted(where, shapes[0][:2])

  def log_attention(x: Array) -> Array:
    # Before the product as well as after it: a value that is masked only later can still leak NaN.
    # [B, L, D] becomes [B, L, heads, D / heads]: relation heads, whatever the network's own are.
    x = jnp.where(valid[..., None], x, 0.0).reshape(*x.shape[:2], num_heads, -1)
    x = jnp.clip(x, -_LARGEST, _LARGEST)
    # [B, heads, L, L]. MASKED and not −inf: a row in which nobody is valid would be NaN.
    scores = product("bqhd,bkhd->bhqk", x, x) / x.shape[-1] ** 0.5
    return jax.nn.log_softmax(jnp.where(valid[:, None, None, :], scores, MASKED), axis=-1)

  # [B, L]: the mean over heads of the divergence of each position's row.
  values = jnp.mean(kl(log_attention(teacher), log_attention(student)), axis=1)
  return jnp.where(valid, values, 0.0)


def _own_axes(features: Array) -> tuple[int, ...]:
  """The axes that belong to one value: all but the batch's, and of tokens the last."""
  return (2,) if features.ndim == 3 else tuple(range(1, features.ndim))


def _mean_square(x: Array) -> Array:
  """Mean of squares over the axes that belong to one value."""
  return jnp.mean(jnp.square(x), axis=_own_axes(x))


def _max_pool(maps: Array, window: int) -> Array:
  """Largest entries over windows that do not overlap, PyTorch's with ``ceil_mode``."""
  # Not by `jnp.max`: its gradient compares entries with the maximum, and where the compiler makes
  # them twice and rounds them otherwise (XLA, at optimisation level 0), none is equal.
  cut_off = [(0, -side % window) for side in maps.shape[1:3]]
  size = (1, window, window, 1)
  padding = ((0, 0), *cut_off, (0, 0))
  return jax.lax.reduce_window(maps, -jnp.inf, jax.lax.max, size, size, padding)


def _attention(maps: Array) -> Array:
  """Energy per position, ``[B, H, W]``, as a unit vector of each example."""
  # `tame` in front of the square: the scale cancels in the unit vector, and 1e20² is no float32.
  return unit(jnp.mean(jnp.square(tame(maps, (1, 2, 3))), axis=-1), (1, 2))


def _flow(lower: Array, upper: Array) -> Array:
  """Mean over positions of lower ⊗ upper, ``[B, C, C']``."""
  # A later stage is smaller: the earlier one is pooled to it, so that positions meet.
  lower, upper = map_pair(lower, upper)
  return product("bhwc,bhwd->bcd", lower, upper) / (lower.shape[1] * lower.shape[2])
