"""Recipes that match layers in one stage: AT, NST, VID, OFD; CWD, ICKD, MGD, SKD and VkD.

Each is complete with its published term on the labels. Layers are named as
`jaxdistill.networks.models` sows them; the methods that train the student's layers first are in
`stages`, ReviewKD in `review`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import _check, losses
from jaxdistill.networks.models.layers import default_init, kaiming_init
from jaxdistill.recipes import projectors
from jaxdistill.recipes.parts import (
  STAGES,
  Modules,
  Running,
  both_features,
  feature,
  hard_term,
  layer_names,
  layer_pairs,
  learned,
  map_pairs,
  present,
  recipe,
  stage_weights_or,
)
from jaxdistill.types import Batch, Number, Objective, Outputs, Term, compute_dtype

__all__ = [
  "attention_transfer",
  "cwd",
  "ickd",
  "mgd",
  "nst",
  "overhaul",
  "overhaul_margins",
  "structure",
  "vid",
  "vkd",
]

PyTree = Any
# What OFD compares: behind its ReLU a unit that is off has lost how far off it is.
_BEFORE_RELU = ("stage1_preact", "stage2_preact", "stage3_preact")


@recipe(check=layer_pairs)
def attention_transfer(
  student: Outputs,
  teacher: Outputs | None,
  batch: Batch,
  *,
  student_layers: Sequence[str] = STAGES,
  teacher_layers: Sequence[str] | None = None,
  attention_weight: Number = 1000.0,
  hard_weight: Number | None = 1.0,
) -> dict[str, Term]:
  """Attention transfer (AT): where in the image each stage's energy is, and the labels.

  ``hard_weight * cross_entropy + attention_weight * Σ_stages attention_transfer``. Nothing is
  learned: widths may differ, and of two sizes the larger is average-pooled.

  Args:
    student_layers: maps ``[B, H, W, C]``; all three stages as in RepDistiller and mdistiller.
    teacher_layers: the teacher's, one for each; None for the same names.
    attention_weight: 1000 in RepDistiller, mdistiller and torchdistill (which sums over the last
      two stages of four on ImageNet); a keyword of the objective.
    hard_weight: 1 in all of them; a keyword of the objective. None leaves the labels out.

  Returns:
    An objective with the terms ``labels`` and ``attention``.

  Source: Zagoruyko, Komodakis, "Paying More Attention to Attention: Improving the Performance of
  Convolutional Neural Networks via Attention Transfer", 2017, whose own formula differs from its
  code: it sums f² over the channels and takes ‖·‖ in place of the mean of squares.

  >>> from jaxdistill.types import make_batch
  >>> outputs = Outputs(jnp.zeros((1, 2)), {"conv": jnp.ones((1, 2, 2, 3))})
  >>> batch = make_batch(jnp.ones((1, 1)))
  >>> terms = attention_transfer.function(outputs, outputs, batch, student_layers=("conv",))
  >>> terms["attention"].values.tolist()
  [0.0]
  """
  maps = map_pairs(student, teacher, layer_pairs(student_layers, teacher_layers))
  # [B] for each stage. No projector: the loss takes the mean over channels, whatever their number.
  values = sum(losses.attention_transfer(ours, theirs) for ours, theirs in maps)
  return {
    "labels": hard_term(student, batch, hard_weight),
    "attention": Term(values, weight=attention_weight),
  }


@recipe(check=layer_pairs)
def nst(
  student: Outputs,
  teacher: Outputs | None,
  batch: Batch,
  *,
  student_layers: Sequence[str] = STAGES,
  teacher_layers: Sequence[str] | None = None,
  nst_weight: Number = 50.0,
  hard_weight: Number | None = 1.0,
) -> dict[str, Term]:
  """Neuron selectivity transfer (NST): where each channel fires, and the labels.

  ``hard_weight * cross_entropy + nst_weight * Σ_stages neuron_selectivity``. Nothing is learned:
  widths may differ, and of two sizes the larger is average-pooled.

  Args:
    student_layers: maps ``[B, H, W, C]``; all three stages as in RepDistiller and mdistiller (the
      paper matches the last).
    teacher_layers: the teacher's, one for each; None for the same names.
    nst_weight: 50 in RepDistiller and mdistiller; a keyword of the objective.
    hard_weight: 1 in both; a keyword of the objective. None leaves the labels out.

  Returns:
    An objective with the terms ``labels`` and ``nst``.

  Source: Huang, Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer",
  2017.

  >>> from jaxdistill.types import make_batch
  >>> outputs = Outputs(jnp.zeros((1, 2)), {"conv": jnp.ones((1, 2, 2, 1))})
  >>> batch = make_batch(jnp.ones((1, 1)))
  >>> terms = nst.function(outputs, outputs, batch, student_layers=("conv",))
  >>> terms["nst"].values.tolist()
  [0.0]
  """
  maps = map_pairs(student, teacher, layer_pairs(student_layers, teacher_layers))
  # [B] for each stage. Sets of channels are compared, so that neither order nor number matters.
  values = sum(losses.neuron_selectivity(ours, theirs) for ours, theirs in maps)
  return {
    "labels": hard_term(student, batch, hard_weight),
    "nst": Term(values, weight=nst_weight),
  }


class _VariationalMean(nn.Module):
  """VID's Gaussian of one feature: its mean for each example, and its raw variance."""

  features: int
  init_variance: float
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Any, *, train: bool = False) -> tuple[Any, Any]:
    del train
    for i in range(3):
      # A 1 x 1 convolution is a linear map of the channels. No ReLU after the last: a mean may be
      # negative.
      x = nn.Dense(
        self.features,
        use_bias=False,
        kernel_init=default_init,
        param_dtype=self.param_dtype,
        name=f"conv{i + 1}",
      )(jax.nn.relu(x) if i else x)
    # What softplus takes back to init_variance. Large at first: the error is divided by it while
    # the projector knows nothing.
    raw = math.log(math.expm1(self.init_variance - 1e-5))
    constant = nn.initializers.constant(raw)
    return x, self.param("raw_variance", constant, (self.features,), self.param_dtype)


def vid(
  *,
  student_layers: Sequence[str] = STAGES,
  teacher_layers: Sequence[str] | None = None,
  vid_weight: float = 1.0,
  hard_weight: float | None = 1.0,
  init_variance: float = 5.0,
) -> Objective:
  """Variational information distillation (VID): the teacher's stages, likely given the student's.

  ``hard_weight * cross_entropy + vid_weight * Σ_stages variational_information``. For each stage,
  three 1 x 1 convolutions to the teacher's width, without bias and with ReLUs between them, predict
  the mean; a variance for each channel is learned beside them. So the objective learns, for each
  stage i, ``mean<i>``: ``conv1`` .. ``conv3`` and ``raw_variance``.

  Args:
    student_layers: features of any kind; all three stages as in RepDistiller and mdistiller.
    teacher_layers: the teacher's, one for each; None for the same names.
    vid_weight: 1 in both; a keyword of the objective.
    hard_weight: 1 in both; a keyword of the objective. None leaves the labels out.
    init_variance: where each channel's variance starts; 5 in both. mdistiller never trains it.

  Returns:
    An `Objective` with the terms ``labels`` and ``vid``, which can be negative.

  Of two maps of different size the larger is average-pooled, the student's after its projection;
  RepDistiller pools the student's before.

  Source: Ahn, Hu, Damianou, Lawrence, Dai, "Variational Information Distillation for Knowledge
  Transfer", 2019.

  >>> outputs = Outputs(features={"mid": jnp.ones((1, 3))})
  >>> params, _ = vid(student_layers=("mid",)).init(jax.random.key(0), outputs, outputs)
  >>> round(float(jax.nn.softplus(params["mean0"]["raw_variance"][0])) + 1e-5, 4)
  5.0
  """
  pairs = layer_pairs(student_layers, teacher_layers)
  _check.number("init_variance", init_variance, above=1e-5)

  def modules(student: Outputs, teacher: Outputs | None) -> Modules:
    found = {}
    for i, (ours, theirs) in enumerate(pairs):
      # The student predicts the teacher, so a mean is as wide as the teacher's feature.
      width = feature(teacher, theirs, "teacher_layers").shape[-1]
      given = feature(student, ours, "student_layers")
      found[f"mean{i}"] = (_VariationalMean(width, init_variance), given)
    return found

  def method(
    running: Running, student: Outputs, teacher: Outputs, batch: Batch, *, vid_weight: Any
  ) -> dict[str, Term]:
    # -log q(teacher | student) of a Gaussian for each stage, without its constant.
    values = sum(
      losses.variational_information(mean, teacher.features[name], raw_variance=raw_variance)
      for (mean, raw_variance), (_, name) in zip(running.each(), pairs, strict=True)
    )
    return {"vid": Term(values, weight=vid_weight)}

  return learned(modules, method, {"vid_weight": vid_weight}, hard_weight)


def overhaul(
  *,
  margins: Sequence[Any],
  student_layers: Sequence[str] = _BEFORE_RELU,
  teacher_layers: Sequence[str] | None = None,
  overhaul_weight: float = 1e-3,
  hard_weight: float | None = 1.0,
  stage_weights: Sequence[float] | None = None,
  axis_name: str | None = None,
) -> Objective:
  """Overhaul of feature distillation (OFD): partial L2 before the ReLU, and the labels.

  ``hard_weight * cross_entropy + overhaul_weight * Σ_i stage_weights[i] * overhaul``, where the
  student's map goes through a connector, a 1 x 1 convolution without bias and a BatchNorm, to the
  teacher's width. Connectors (``connector<i>``) are trained with the student.

  Args:
    margins: of each layer ``[C]`` of the teacher's channels, from `overhaul_margins`.
    student_layers: maps from before their activation; all three stages as in mdistiller.
    teacher_layers: the teacher's, one for each; None for the same names.
    overhaul_weight: 1e-3 in the published code and mdistiller (1e-4 for ResNet-50 → MobileNet on
      ImageNet); a keyword of the objective.
    hard_weight: 1 in both; a keyword of the objective. None leaves the labels out.
    stage_weights: one for each layer; by default 1 for the last and half as much for each one
      before it, as published.
    axis_name: the mapped axis over which the connectors' BatchNorm averages, under ``pmap``.

  Returns:
    An `Objective` with the terms ``labels`` and ``overhaul``.

  Raises:
    TypeError, ValueError: layers, weights or margins are not as many as they should be; when it is
      initialised, a layer is missing or no map, or a margin has another width.

  The published code keeps the teacher's BatchNorm in training mode; here the teacher is frozen.

  Source: Heo, Kim, Yun, Park, Kwak, Choi, "A Comprehensive Overhaul of Feature Distillation", 2019.

  >>> overhaul(margins=[jnp.zeros(3)], student_layers=("stage3_preact",)).hyper
  {'overhaul_weight': 0.001, 'hard_weight': 1.0}
  """
  pairs = layer_pairs(student_layers, teacher_layers)
  weights = stage_weights_or(stage_weights, len(pairs))
  if len(margins) != len(pairs):
    raise ValueError(
      f"margins has {len(margins)} entries for {len(pairs)} layers {tuple(student_layers)}; give "
      "one for each, from overhaul_margins."
    )

  def modules(student: Outputs, teacher: Outputs | None) -> Modules:
    found = {}
    for i, (ours, theirs) in enumerate(map_pairs(student, teacher, pairs)):
      # A margin of another layer of the same width would pass: paths are the caller's to get right.
      if np.shape(margins[i]) != theirs.shape[-1:]:
        raise ValueError(
          f"margins[{i}] has the shape {np.shape(margins[i])} and the teacher's {pairs[i][1]!r} "
          f"{tuple(theirs.shape)}; it must be one number for each channel."
        )
      # Its size stays the student's: the loss pools the larger map. No ReLU, since the teacher's
      # map is from before one, and no bias in front of a BatchNorm, which would take it out again.
      module = projectors.Conv(
        theirs.shape[-1],
        tuple(ours.shape[1:3]),
        use_bias=False,
        use_relu=False,
        kernel_init=kaiming_init,
        axis_name=axis_name,
      )
      found[f"connector{i}"] = (module, ours)
    return found

  def method(
    running: Running, student: Outputs, teacher: Outputs, batch: Batch, *, overhaul_weight: Any
  ) -> dict[str, Term]:
    # [B]: the last stage counts in full, each one before it half as much as the next.
    values = sum(
      weight * losses.overhaul(ours, teacher.features[name], margin=margin)
      for weight, ours, (_, name), margin in zip(
        weights, running.each(), pairs, margins, strict=True
      )
    )
    return {"overhaul": Term(values, weight=overhaul_weight)}

  return learned(modules, method, {"overhaul_weight": overhaul_weight}, hard_weight)


def overhaul_margins(variables: Mapping[str, PyTree], norms: Sequence[str]) -> list[jax.Array]:
  """The margins of `overhaul` from the teacher's BatchNorms.

  Args:
    variables: the teacher's, ``{"params": ...}``, as the teacher takes them.
    norms: for each layer the path of the last BatchNorm before the ReLU, among the parameters. Of
      our resnet20: ``("stage1_block2/norm2", "stage2_block2/norm2", "stage3_block2/norm2")``, the
      stages' last blocks (what is added by their shortcuts is left out, as published); of our
      wrn_16_2: ``("stage2_block0/norm1", "stage3_block0/norm1", "final_norm")``.

  Returns:
    ``[C]`` for each norm: the mean of a unit while it is off, of a Gaussian with the norm's scale
    and bias (`losses.overhaul_margin`).

  Raises:
    ValueError: there is no norm with a scale and a bias at a path; the message lists those that
      there are.

  >>> norm = {"scale": jnp.ones(2), "bias": jnp.zeros(2)}
  >>> margins = overhaul_margins({"params": {"block": {"norm": norm}}}, ["block/norm"])
  >>> [round(value, 4) for value in margins[0].tolist()]
  [-0.7979, -0.7979]
  """
  layer_pairs(norms, None)  # refuses a text, which is a sequence of letters
  leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
  flat = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}
  margins = []  # [C] for each norm
  # One compilation instead of one for each operation.
  margin = jax.jit(losses.overhaul_margin)
  for norm in norms:
    scale, bias = (flat.get(f"{norm.removeprefix('params/')}/{name}") for name in ("scale", "bias"))
    if scale is None or bias is None or np.ndim(scale) != 1:
      ends = [name.removesuffix("/scale") for name in flat if name.endswith("/scale")]
      there = sorted(name for name in ends if f"{name}/bias" in flat)
      raise ValueError(
        f"norms names {norm!r}, where the teacher has no scale and bias [C]; it has them at {there}"
        " (of a run over seeds, give those of one: fitted.unstack()[0].variables)."
      )
    margins.append(margin(scale, bias))
  return margins


def cwd(
  *,
  student_layer: str | None = "stage3",
  teacher_layer: str | None = None,
  cwd_weight: float = 50.0,
  hard_weight: float | None = 1.0,
  temperature: float = 4.0,
  axis_name: str | None = None,
) -> Objective:
  """Channel-wise distillation (CWD): where in the image each channel is strongest, and the labels.

  ``hard_weight * cross_entropy + cwd_weight * channel_wise``. Where the widths differ the student's
  map goes through a connector (``connector``), a 1 x 1 convolution without bias, BatchNorm and
  ReLU, which is trained with the student.

  Args:
    student_layer: a map; the last one. None compares the logits of each pixel ``[B, H, W, K]``,
      which need no connector.
    teacher_layer: the teacher's; None for the same name.
    cwd_weight: 50 in the published code for maps, 3 for logits; 5 and 0.3 in CIRKD for SegFormer.
      A keyword of the objective.
    hard_weight: 1 there; a keyword of the objective. None leaves the labels out.
    temperature: 4 there; a keyword of the objective.
    axis_name: the mapped axis over which the connector's BatchNorm averages, under ``pmap``.

  Returns:
    An `Objective` with the terms ``labels`` and ``channels``.

  CIRKD's connector is the convolution alone. Pixels without a weight are in no softmax where both
  maps have the labels' size.

  Source: Shu, Liu, Gao, Yan, Shen, "Channel-wise Knowledge Distillation for Dense Prediction",
  2021.

  >>> cwd().hyper
  {'cwd_weight': 50.0, 'temperature': 4.0, 'hard_weight': 1.0}
  """
  layers = None if student_layer is None else layer_names(student_layer, teacher_layer)

  def maps(student: Outputs, teacher: Outputs | None) -> tuple[Any, Any]:
    if layers is not None:
      return map_pairs(student, teacher, [layers])[0]
    if teacher is None:
      raise ValueError("cwd compares with a teacher, and teacher is None; give fit a teacher.")
    return student.logits, teacher.logits

  def modules(student: Outputs, teacher: Outputs | None) -> Modules:
    ours, theirs = maps(student, teacher)
    if layers is None or ours.shape[-1] == theirs.shape[-1]:
      return {"connector": (None, ours)}
    return {"connector": (_embedding(ours, theirs, axis_name, use_relu=True), ours)}

  def method(
    running: Running,
    student: Outputs,
    teacher: Outputs | None,
    batch: Batch,
    *,
    cwd_weight: Any,
    temperature: Any,
  ) -> dict[str, Term]:
    ours, theirs = running("connector"), maps(student, teacher)[1]
    where = None
    if ours.shape[:3] == theirs.shape[:3]:
      # [B, H, W]: a pixel that is ignored takes no share of a channel from those that are not.
      where = jnp.broadcast_to(present(batch, ours)[..., 0], ours.shape[:3])
    values = losses.channel_wise(ours, theirs, temperature=temperature, where=where)
    return {"channels": Term(values, weight=cwd_weight)}

  return learned(
    modules, method, {"cwd_weight": cwd_weight, "temperature": temperature}, hard_weight
  )


def _embedding(ours: Any, theirs: Any, axis_name: str | None, **options: Any) -> projectors.Conv:
  """A 1 x 1 convolution to the teacher's width, without the bias that its BatchNorm takes out."""
  size = tuple(ours.shape[1:3])  # the student's: of two sizes the loss pools the larger
  return projectors.Conv(theirs.shape[-1], size, use_bias=False, axis_name=axis_name, **options)


def ickd(
  *,
  student_layer: str = "stage3",
  teacher_layer: str | None = None,
  ickd_weight: float = 2.5,
  hard_weight: float | None = 1.0,
  axis_name: str | None = None,
) -> Objective:
  """Inter-channel correlation (ICKD): which channels of one example fire together, and the labels.

  ``hard_weight * cross_entropy + ickd_weight * inter_channel_correlation``. The student's map goes
  through an embedding (``embedding``), a 1 x 1 convolution without bias and a BatchNorm to the
  teacher's width, trained with the student. The paper's results with soft targets add
  ``kd(temperature=4, soft_weight=2, hard_weight=None)``.

  Args:
    student_layer: the last map, as in the published code.
    teacher_layer: the teacher's; None for the same name.
    ickd_weight: 2.5 in the published README, 4 in its script, 500 in torchdistill, which divides by
      the batch's size once more. A keyword of the objective.
    hard_weight: 1 there; a keyword of the objective. None leaves the labels out.
    axis_name: the mapped axis over which the embedding's BatchNorm averages, under ``pmap``.

  Returns:
    An `Objective` with the terms ``labels`` and ``correlation``.

  torchdistill's embedding is a 3 x 3 convolution; the published code has a second one in its
  optimiser, which nothing uses.

  Source: Liu, Huang, Lin, Xie, Wang, Chang, Liang, "Exploring Inter-Channel Correlation for
  Diversity-Preserved Knowledge Distillation", 2021.

  >>> ickd().hyper
  {'ickd_weight': 2.5, 'hard_weight': 1.0}
  """
  layers = layer_names(student_layer, teacher_layer)

  def modules(student: Outputs, teacher: Outputs | None) -> Modules:
    ((ours, theirs),) = map_pairs(student, teacher, [layers])
    return {"embedding": (_embedding(ours, theirs, axis_name, use_relu=False), ours)}

  def method(
    running: Running, student: Outputs, teacher: Outputs, batch: Batch, *, ickd_weight: Any
  ) -> dict[str, Term]:
    # [B]: of each example a table of its channels; the rows' lengths say nothing.
    values = losses.inter_channel_correlation(running("embedding"), teacher.features[layers[1]])
    return {"correlation": Term(values, weight=ickd_weight)}

  return learned(modules, method, {"ickd_weight": ickd_weight}, hard_weight)


def _check_structure(student_layer: Any, teacher_layer: Any, window: Any) -> None:
  layer_names(student_layer, teacher_layer)
  _check.whole("window", window)


@recipe(check=_check_structure)
def structure(
  student: Outputs,
  teacher: Outputs | None,
  batch: Batch,
  *,
  student_layer: str = "stage3",
  teacher_layer: str | None = None,
  window: int = 1,
  structure_weight: Number = 10.0,
  hard_weight: Number | None = 1.0,
) -> dict[str, Term]:
  """Pair-wise structure (SKD): which positions of an image look alike, and the labels.

  ``hard_weight * cross_entropy + structure_weight * pairwise_structure``. Nothing is learned:
  widths may differ, and of two sizes the larger is average-pooled.

  Args:
    student_layer: the last map.
    teacher_layer: the teacher's; None for the same name.
    window: side of the windows that are max-pooled first. 2 in IFVD and half of the map in the
      published code, whose maps are 64 positions wide; 1, no pooling, fits those of small images.
    structure_weight: 10 in the published code and IFVD; a keyword of the objective.
    hard_weight: 1 in both; a keyword of the objective. None leaves the labels out.

  Returns:
    An objective with the terms ``labels`` and ``structure``.

  Source: Liu, Chen, Liu, Qin, Luo, Wang, "Structured Knowledge Distillation for Semantic
  Segmentation", 2019, whose other terms are soft targets at each pixel (`kd`) and a discriminator.

  >>> structure().hyper
  {'structure_weight': 10.0, 'hard_weight': 1.0}
  """
  ((ours, theirs),) = map_pairs(student, teacher, [layer_names(student_layer, teacher_layer)])
  # [B]: of each image a table of its positions, which has no channels.
  values = losses.pairwise_structure(ours, theirs, window=window)
  return {
    "labels": hard_term(student, batch, hard_weight),
    "structure": Term(values, weight=structure_weight),
  }


def _check_share(masked_share: Any) -> None:
  if not callable(masked_share):
    _check.number("masked_share", masked_share, least=0, most=1)


class _Generation(nn.Module):
  """MGD's generator: what is left of the student's map after the mask, to the teacher's map."""

  features: int
  align: bool
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Any, keep: Any, *, train: bool = False) -> Any:
    del train

    def layer(kernel: int, name: str) -> nn.Module:
      sizes, pad = (kernel, kernel), kernel // 2
      options = {"kernel_init": default_init, "param_dtype": self.param_dtype}
      return nn.Conv(self.features, sizes, padding=pad, name=name, **options)

    if self.align:
      x = layer(1, "align")(x)
    # No division by what is kept: dropped entries are to be generated, not made up for.
    x = jax.nn.relu(layer(3, "conv1")(x * keep.astype(x.dtype)))
    return layer(3, "conv2")(x)


def mgd(
  *,
  student_layer: str = "stage3",
  teacher_layer: str | None = None,
  mgd_weight: float = 1.2e-3,
  hard_weight: float | None = 1.0,
  masked: str = "channels",
  masked_share: float = 0.15,
) -> Objective:
  """Masked generative distillation (MGD): the teacher's map from a part of the student's.

  ``hard_weight * cross_entropy + mgd_weight * Σ (G(mask * student) − teacher)²``, the sum over H, W
  and C. The generator (``generation``), trained with the student, is a 3 x 3 convolution, ReLU and
  another one, in front of the mask a 1 x 1 convolution where the widths differ, all with bias.
  The mask is drawn for each example at each step, from the step's key and the example's index.

  Args:
    student_layer: the last map, as in the published code.
    teacher_layer: the teacher's; None for the same name.
    mgd_weight: 1.2e-3 in cls_KD for CIFAR-100, 7e-5 in the published code for ImageNet, 2e-5 for
      COCO and Cityscapes: it multiplies a sum, so that it depends on the map's size. A keyword of
      the objective.
    hard_weight: 1 in all; a keyword of the objective. None leaves the labels out.
    masked: ``"channels"``, as published for classification, or ``"positions"``, for detection and
      segmentation.
    masked_share: how many are dropped, in [0, 1]: 0.15 of the channels there; of the positions
      0.65 (RetinaNet, COCO) or 0.75 (PSPNet, Cityscapes). A keyword of the objective.

  Returns:
    An `Objective` with the terms ``labels`` and ``generation``.

  Raises:
    TypeError, ValueError: an argument is out of its range; when it is initialised, a layer is
      missing or no map.

  Of two sizes, which the published code does not take, the larger is average-pooled, the student's
  after its generation.

  Source: Yang, Li, Shao, Shi, Yuan, Yuan, "Masked Generative Distillation", 2022.

  >>> mgd().hyper
  {'mgd_weight': 0.0012, 'masked_share': 0.15, 'hard_weight': 1.0}
  """
  layers = layer_names(student_layer, teacher_layer)
  if masked not in ("channels", "positions"):
    raise ValueError(f"masked={masked!r} must be 'channels' or 'positions'.")
  _check_share(masked_share)

  def modules(student: Outputs, teacher: Outputs | None) -> Modules:
    ((ours, theirs),) = map_pairs(student, teacher, [layers])
    module = _Generation(theirs.shape[-1], ours.shape[-1] != theirs.shape[-1])
    keep = jax.ShapeDtypeStruct((ours.shape[0], *_mask_shape(ours, theirs)), jnp.float32)
    return {"generation": (module, (ours, keep))}

  def _mask_shape(ours: Any, theirs: Any) -> tuple[int, ...]:
    return (1, 1, theirs.shape[-1]) if masked == "channels" else (*ours.shape[1:3], 1)

  def method(
    running: Running,
    student: Outputs,
    teacher: Outputs,
    batch: Batch,
    *,
    key: Any,
    mgd_weight: Any,
    masked_share: Any,
  ) -> dict[str, Term]:
    _check_share(masked_share)  # once more, now that a schedule has become a number
    ((ours, theirs),) = map_pairs(student, teacher, [layers])
    shape = _mask_shape(ours, theirs)

    def draw(index: Any, view: Any) -> Any:
      # By the example and not by its place: the mask is the same however a batch is split.
      own = jax.random.fold_in(jax.random.fold_in(key, index), view)
      return jax.random.uniform(own, shape) >= masked_share

    keep = jax.vmap(draw)(jnp.asarray(batch.index), jnp.asarray(batch.view))
    values = losses.hint_l2(running("generation", ours, keep), theirs)
    # The published sum is the mean times what it is a mean over, in the smaller size.
    high, wide = map(min, zip(ours.shape[1:3], theirs.shape[1:3], strict=True))
    return {"generation": Term(high * wide * theirs.shape[-1] * values, weight=mgd_weight)}

  hyper = {"mgd_weight": mgd_weight, "masked_share": masked_share}
  return learned(modules, method, hyper, hard_weight)


def vkd(
  *,
  student_layer: str = "pooled",
  teacher_layer: str | None = None,
  vkd_weight: float = 1.0,
  soft_weight: float | None = 1.0,
  hard_weight: float | None = 1.0,
  temperature: float = 1.0,
) -> Objective:
  """VkD: an orthogonal projector to the teacher's normalised feature, soft targets, the labels.

  ``hard_weight * cross_entropy + soft_weight * soft_target_kl + vkd_weight * hint_normalized``. The
  projector (``projector``, `recipes.projectors.Orthogonal`) can turn the student's feature and not
  reshape it.

  Args:
    student_layer: a vector; tokens and maps are averaged over their positions, which the published
      code does over the patches without the class token.
    teacher_layer: the teacher's; None for the same name.
    vkd_weight: 1 in the published code; a keyword of the objective.
    soft_weight: 1 there, on the head of DeiT's distillation token; a keyword of the objective. None
      leaves soft targets out.
    hard_weight: 1 there, with mixup; a keyword of the objective. None leaves the labels out.
    temperature: of the soft targets, 1 there; a keyword of the objective.

  Returns:
    An `Objective` with the terms ``labels``, ``soft`` and ``hint``.

  Source: Miles, Elezi, Deng, "VkD: Improving Knowledge Distillation using Orthogonal Projections",
  2024.

  >>> vkd().hyper
  {'vkd_weight': 1.0, 'temperature': 1.0, 'soft_weight': 1.0, 'hard_weight': 1.0}
  """
  layers = layer_names(student_layer, teacher_layer)

  def pooled(student: Outputs, teacher: Outputs | None) -> list[Any]:
    # [B, D] both. Without positions there is nothing to average over.
    return [
      jnp.mean(x.astype(compute_dtype(x)), axis=tuple(range(1, x.ndim - 1)))
      for x in both_features(student, teacher, layers)
    ]

  def modules(student: Outputs, teacher: Outputs | None) -> Modules:
    ours, theirs = jax.eval_shape(pooled, student, teacher)
    return {"projector": (projectors.Orthogonal(theirs.shape[-1]), ours)}

  def method(
    running: Running,
    student: Outputs,
    teacher: Outputs,
    batch: Batch,
    *,
    vkd_weight: Any,
    temperature: Any,
    soft_weight: Any = None,
  ) -> dict[str, Term]:
    ours, theirs = pooled(student, teacher)
    values = losses.hint_normalized(running("projector", ours), theirs)
    terms = {"hint": Term(values, weight=vkd_weight)}
    if soft_weight is not None:
      soft = losses.soft_target_kl(student.logits, teacher.logits, temperature=temperature)
      terms["soft"] = Term(soft, weight=soft_weight)
    return terms

  hyper = {"vkd_weight": vkd_weight, "temperature": temperature}
  hyper |= {} if soft_weight is None else {"soft_weight": soft_weight}
  return learned(modules, method, hyper, hard_weight)
