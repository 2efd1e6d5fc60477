"""Methods that match how examples lie beside each other in the batch.

All of them see the batch that the step sees: under ``pmap``, or with ``accumulate``, that is the
device's share or the micro-batch. Under ``jit`` it is the whole batch, however many devices
share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxdistill import _check, losses
from jaxdistill.recipes.parts import (
  Modules,
  Running,
  both_features,
  embed,
  embeddings,
  feature,
  hard_term,
  layer_names,
  learned,
  present,
  recipe,
)
from jaxdistill.types import Batch, Number, Objective, Outputs, Term

__all__ = ["affinity", "correlation_congruence", "pkt", "rkd", "similarity_preserving"]


def _check_towers(student_towers: Any, teacher_towers: Any) -> None:
  """Raises for what is not two names of features."""
  for argument, given in (("student_towers", student_towers), ("teacher_towers", teacher_towers)):
    names = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else []
    if given is None and argument == "teacher_towers":
      continue
    if len(names) != 2 or not all(isinstance(name, str) for name in names):
      raise TypeError(
        f"{argument}={_check.show(given)} must be the names of two features, ('image', 'text')."
      )


@recipe(check=_check_towers)
def affinity(
  student: Outputs,
  teacher: Outputs | None,
  batch: Batch,
  *,
  student_towers: Sequence[str] = ("image", "text"),
  teacher_towers: Sequence[str] | None = None,
  student_temperature: Number = 0.07,
  teacher_temperature: Number = 0.01,
  affinity_weight: Number | None = 1.0,
  pair_weight: Number | None = 1.0,
) -> dict[str, Term]:
  """Affinity of two towers (CLIP-KD's CRD, TinyCLIP): which image goes with which text.

  ``pair_weight * contrastive(image, text) + affinity_weight * affinity``: the student's own pairs,
  as CLIP is trained, and how near the teacher finds each image to each text. No label is looked at.

  Source: Yang, An, Huang, Bi, Yu, Yang, Diao, Xu, "CLIP-KD: An Empirical Study of CLIP Model
  Distillation", 2024. Its features' term is `basics.hint`, for each tower. Its temperatures are
  learned, or the teacher's; here they are numbers, or schedules.

  Args:
    student_towers: the names of the two features ``[B, D]``: what the module returns in a dict,
      with ``networks.linen(module, logits=False)``.
    teacher_towers: the teacher's, in the same order; None for the same names. Widths may differ.
    student_temperature: of the student's products, in both terms; CLIP's at the start. It, the
      other temperature and the weights are keywords of the objective.
    teacher_temperature: of the teacher's; trained CLIP's.
    affinity_weight: 1 as published; None leaves that term out, and the teacher: how a teacher is
      trained.
    pair_weight: 1 as published; None leaves that term out.

  Returns:
    An objective with the terms ``pairs`` and ``affinity``. Both depend on who is in the batch.

  Raises:
    TypeError: a pair of towers is not two names.
    ValueError: at trace time, a feature is missing.

  >>> affinity(pair_weight=None).hyper["student_temperature"]
  0.07
  """
  there, terms = present(batch), {}
  ours = [feature(student, name, "student_towers") for name in student_towers]
  if affinity_weight is not None:
    names = student_towers if teacher_towers is None else teacher_towers
    theirs = [feature(teacher, name, "teacher_towers") for name in names]
    # [B, B] twice: each image's distribution over the batch's texts, and each text's over images.
    values = losses.affinity(
      *ours,
      *theirs,
      student_temperature=student_temperature,
      teacher_temperature=teacher_temperature,
      where=there,
    )
    terms["affinity"] = Term(values, weight=affinity_weight)
  if pair_weight is None:
    return terms
  values = losses.contrastive(*ours, temperature=student_temperature, where=there)
  return {"pairs": Term(values, weight=pair_weight), **terms}


@recipe(check=layer_names)
def similarity_preserving(
  student: Outputs,
  teacher: Outputs | None,
  batch: Batch,
  *,
  student_layer: str = "stage3",
  teacher_layer: str | None = None,
  similarity_weight: Number = 3000.0,
  hard_weight: Number | None = 1.0,
) -> dict[str, Term]:
  """Similarity-preserving distillation (SP): which examples excite the same units.

  Tung, Mori, "Similarity-Preserving Knowledge Distillation", 2019. ``hard_weight · cross_entropy
  + similarity_weight · similarity_preserving``.

  Args:
    student_layer: the last map, as in RepDistiller and mdistiller; any shape will do.
    teacher_layer: the teacher's last map; the same name by default. Sizes and widths may differ.
    similarity_weight: 3000 in RepDistiller and mdistiller; torchdistill has 1, with rows divided
      by another norm.
    hard_weight: weight of the labels, 1 there; None leaves that term out.

  Returns:
    An objective with the terms ``labels`` and ``similarity``.

  >>> similarity_preserving().hyper
  {'similarity_weight': 3000.0, 'hard_weight': 1.0}
  """
  pair = both_features(student, teacher, layer_names(student_layer, teacher_layer))
  # The [B, B] tables of inner products, rows of norm 1; padding is in nobody's row.
  # The weight of 3000 makes up for the mean over all B² pairs of differences of unit rows.
  values = losses.similarity_preserving(*pair, where=present(batch))
  return {
    "labels": hard_term(student, batch, hard_weight),
    "similarity": Term(values, weight=similarity_weight),
  }


@recipe(check=layer_names)
def rkd(
  student: Outputs,
  teacher: Outputs | None,
  batch: Batch,
  *,
  student_layer: str = "pooled",
  teacher_layer: str | None = None,
  distance_weight: Number = 25.0,
  angle_weight: Number = 50.0,
  rkd_weight: Number = 1.0,
  hard_weight: Number | None = 1.0,
) -> dict[str, Term]:
  """Relational knowledge distillation (RKD): distances of pairs and angles of triples.

  Park, Kim, Lu, Cho, "Relational Knowledge Distillation", 2019. ``hard_weight · cross_entropy +
  rkd_weight · (distance_weight · relational_distance + angle_weight · relational_angle)``.

  Args:
    student_layer: the pooled feature, as in RepDistiller and mdistiller.
    teacher_layer: the teacher's pooled feature; the same name by default. Widths may differ.
    distance_weight: 25 in RepDistiller and mdistiller; torchdistill has 1, on the last map.
    angle_weight: 50 in RepDistiller and mdistiller; torchdistill has 2.
    rkd_weight: of both together, 1 in RepDistiller.
    hard_weight: weight of the labels, 1 there; None leaves that term out.

  Returns:
    An objective with the terms ``labels``, ``distance`` and ``angle``.

  >>> rkd(rkd_weight=0.5).hyper
  {'distance_weight': 25.0, 'angle_weight': 50.0, 'rkd_weight': 0.5, 'hard_weight': 1.0}
  """
  pair = both_features(student, teacher, layer_names(student_layer, teacher_layer))
  # Distances and angles within each network: an embedding may be turned and scaled as it likes, and
  # the widths need not agree. Padding would be a point far from everybody, in every mean.
  there = present(batch)
  distance = losses.relational_distance(*pair, where=there)  # of pairs, by the mean distance
  angle = losses.relational_angle(*pair, where=there)  # at each example, between any two others
  return {
    "labels": hard_term(student, batch, hard_weight),
    "distance": Term(distance, weight=rkd_weight * distance_weight),
    "angle": Term(angle, weight=rkd_weight * angle_weight),
  }


@recipe(check=layer_names)
def pkt(
  student: Outputs,
  teacher: Outputs | None,
  batch: Batch,
  *,
  student_layer: str = "pooled",
  teacher_layer: str | None = None,
  pkt_weight: Number = 30000.0,
  hard_weight: Number | None = 1.0,
) -> dict[str, Term]:
  """Probabilistic knowledge transfer (PKT): whom each example would pick as a neighbour.

  Passalis, Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", 2018.
  ``hard_weight · cross_entropy + pkt_weight · probabilistic_transfer``.

  Args:
    student_layer: the pooled feature, as in RepDistiller and mdistiller.
    teacher_layer: the teacher's pooled feature; the same name by default. Widths may differ.
    pkt_weight: 30 000 in RepDistiller and mdistiller, for a mean over all pairs.
    hard_weight: weight of the labels, 1 there; None leaves that term out, as torchdistill does.

  Returns:
    An objective with the terms ``labels`` and ``pkt``.

  >>> pkt().hyper
  {'pkt_weight': 30000.0, 'hard_weight': 1.0}
  """
  pair = both_features(student, teacher, layer_names(student_layer, teacher_layer))
  # [B]: each row is a distribution over the batch, whom this example would pick as a neighbour.
  values = losses.probabilistic_transfer(*pair, where=present(batch))
  return {
    "labels": hard_term(student, batch, hard_weight),
    "pkt": Term(values, weight=pkt_weight),
  }


def correlation_congruence(
  *,
  student_layer: str = "pooled",
  teacher_layer: str | None = None,
  correlation_weight: float = 0.02,
  hard_weight: float | None = 1.0,
  width: int = 128,
) -> Objective:
  """Correlation congruence (CC): the errors of examples that follow each other in the batch.

  Peng, Jin, Liu, Li, Wu, Liu, Zhou, Zhang, "Correlation Congruence for Knowledge Distillation",
  2019, as in RepDistiller: both features pass through a linear map of their own, both maps are
  trained. ``hard_weight · cross_entropy + correlation_weight · correlation_congruence``.
  torchdistill's loss of this name is another function, the paper's.

  Args:
    student_layer: the pooled feature; any other shape is flattened.
    teacher_layer: the teacher's pooled feature; the same name by default.
    correlation_weight: 0.02 in RepDistiller.
    hard_weight: weight of the labels, 1 there; None leaves that term out.
    width: of both embeddings, 128 there.

  Returns:
    An `Objective` with the terms ``labels`` and ``correlation``; it learns the two linear maps
    ``student`` and ``teacher``.

  >>> correlation_congruence().hyper
  {'correlation_weight': 0.02, 'hard_weight': 1.0}
  """
  layers = layer_names(student_layer, teacher_layer)
  _check.whole("width", width)

  def modules(student: Outputs, teacher: Outputs | None) -> Modules:
    return embeddings(student, teacher, layers, width)

  def method(
    running: Running, student: Outputs, teacher: Outputs, batch: Batch, *, correlation_weight: Any
  ) -> dict[str, Term]:
    there = present(batch)
    # [B, width] of both: errors can be subtracted only where features have one width.
    ours, theirs = embed(running, student, teacher, layers, there)
    values = losses.correlation_congruence(ours, theirs, where=there)
    pairs = there[:-1] & there[1:]  # one value for each example and the next
    # [B − 1], so the axis is no batch and the step's weights do not apply: the mask says it all.
    term = Term(values, weight=correlation_weight, where=pairs, axis="pairs")
    return {"correlation": term}

  return learned(modules, method, {"correlation_weight": correlation_weight}, hard_weight)
