"""Methods that match how examples lie beside each other in the batch.

All of them see the batch that the step sees: under ``pmap``, or with ``accumulate``, that is the
device's share or the micro-batch. Under ``jit`` it is the whole batch, however many devices
share it.
"""

from __future__ import annotations

from typing import Any

from jaxdistill import _check, losses
from jaxdistill.recipes._parts import (
  both_features,
  check_layers,
  check_weights,
  embed,
  init_embeddings,
  present,
  with_labels,
)
from jaxdistill.types import Batch, Objective, ObjectiveFunction, Outputs, Term

__all__ = ["correlation_congruence", "pkt", "rkd", "similarity_preserving"]

PyTree = Any


def similarity_preserving(
  *,
  student_layer: str = "stage3",
  teacher_layer: str | None = None,
  similarity_weight: float = 3000.0,
  hard_weight: float | None = 1.0,
) -> ObjectiveFunction:
  """Similarity-preserving distillation (SP): which examples excite the same units.

  Tung, Mori, "Similarity-Preserving Knowledge Distillation", 2019. ``hard_weight · cross_entropy
  + similarity_weight · similarity_preserving``.

  Args:
    student_layer: the last map, as in RepDistiller and mdistiller; any shape will do.
    teacher_layer: likewise of the teacher; the same name by default. Sizes and widths may differ.
    similarity_weight: 3000 in RepDistiller and mdistiller; torchdistill has 1, with rows divided
      by another norm.
    hard_weight: weight of the labels, 1 there; None leaves that term out.

  Returns:
    An objective function with the terms ``labels`` and ``similarity``.

  >>> from jaxdistill.types import as_objective
  >>> as_objective(similarity_preserving()).hyper
  {'similarity_weight': 3000.0, 'hard_weight': 1.0}
  """
  layers = check_layers(student_layer, teacher_layer)
  check_weights(similarity_weight=similarity_weight)

  def objective(
    student: Outputs,
    teacher: Outputs | None,
    batch: Batch,
    *,
    similarity_weight: Any = similarity_weight,
  ) -> dict[str, Term]:
    pair = both_features(student, teacher, layers)
    values = losses.similarity_preserving(*pair, where=present(batch))
    return {"similarity": Term(values, weight=similarity_weight)}

  return with_labels(objective, hard_weight)


def rkd(
  *,
  student_layer: str = "pooled",
  teacher_layer: str | None = None,
  distance_weight: float = 25.0,
  angle_weight: float = 50.0,
  rkd_weight: float = 1.0,
  hard_weight: float | None = 1.0,
) -> ObjectiveFunction:
  """Relational knowledge distillation (RKD): distances of pairs and angles of triples.

  Park, Kim, Lu, Cho, "Relational Knowledge Distillation", 2019. ``hard_weight · cross_entropy +
  rkd_weight · (distance_weight · relational_distance + angle_weight · relational_angle)``.

  Args:
    student_layer: the pooled feature, as in RepDistiller and mdistiller.
    teacher_layer: likewise of the teacher; the same name by default. Widths may differ.
    distance_weight: 25 in RepDistiller and mdistiller; torchdistill has 1, on the last map.
    angle_weight: 50 in RepDistiller and mdistiller; torchdistill has 2.
    rkd_weight: of both together, 1 in RepDistiller.
    hard_weight: weight of the labels, 1 there; None leaves that term out.

  Returns:
    An objective function with the terms ``labels``, ``distance`` and ``angle``.

  >>> from jaxdistill.types import as_objective
  >>> as_objective(rkd(rkd_weight=0.5)).hyper
  {'distance_weight': 25.0, 'angle_weight': 50.0, 'rkd_weight': 0.5, 'hard_weight': 1.0}
  """
  layers = check_layers(student_layer, teacher_layer)
  check_weights(
    distance_weight=distance_weight,
    angle_weight=angle_weight,
    rkd_weight=rkd_weight,
  )

  def objective(
    student: Outputs,
    teacher: Outputs | None,
    batch: Batch,
    *,
    distance_weight: Any = distance_weight,
    angle_weight: Any = angle_weight,
    rkd_weight: Any = rkd_weight,
  ) -> dict[str, Term]:
    pair, there = both_features(student, teacher, layers), present(batch)
    distance = losses.relational_distance(*pair, where=there)
    angle = losses.relational_angle(*pair, where=there)
    return {
      "distance": Term(distance, weight=rkd_weight * distance_weight),
      "angle": Term(angle, weight=rkd_weight * angle_weight),
    }

  return with_labels(objective, hard_weight)


def pkt(
  *,
  student_layer: str = "pooled",
  teacher_layer: str | None = None,
  pkt_weight: float = 30000.0,
  hard_weight: float | None = 1.0,
) -> ObjectiveFunction:
  """Probabilistic knowledge transfer (PKT): whom each example would pick as a neighbour.

  Passalis, Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", 2018.
  ``hard_weight · cross_entropy + pkt_weight · probabilistic_transfer``.

  Args:
    student_layer: the pooled feature, as in RepDistiller and mdistiller.
    teacher_layer: likewise of the teacher; the same name by default. Widths may differ.
    pkt_weight: 30 000 in RepDistiller and mdistiller, for a mean over all pairs.
    hard_weight: weight of the labels, 1 there; None leaves that term out, as torchdistill does.

  Returns:
    An objective function with the terms ``labels`` and ``pkt``.

  >>> from jaxdistill.types import as_objective
  >>> as_objective(pkt()).hyper
  {'pkt_weight': 30000.0, 'hard_weight': 1.0}
  """
  layers = check_layers(student_layer, teacher_layer)
  check_weights(pkt_weight=pkt_weight)

  def objective(
    student: Outputs,
    teacher: Outputs | None,
    batch: Batch,
    *,
    pkt_weight: Any = pkt_weight,
  ) -> dict[str, Term]:
    pair = both_features(student, teacher, layers)
    values = losses.probabilistic_transfer(*pair, where=present(batch))
    return {"pkt": Term(values, weight=pkt_weight)}

  return with_labels(objective, hard_weight)


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
    teacher_layer: likewise of the teacher; the same name by default.
    correlation_weight: 0.02 in RepDistiller.
    hard_weight: weight of the labels, 1 there; None leaves that term out.
    width: of both embeddings, 128 there.

  Returns:
    An `Objective` with the terms ``labels`` and ``correlation``; it learns the two linear maps
    ``student`` and ``teacher``.

  >>> correlation_congruence().hyper
  {'correlation_weight': 0.02, 'hard_weight': 1.0}
  """
  layers = check_layers(student_layer, teacher_layer)
  check_weights(correlation_weight=correlation_weight)
  _check.whole("width", width)
  defaults = {"correlation_weight": correlation_weight}

  def init(key: Any, student: Outputs, teacher: Outputs | None) -> tuple[PyTree, PyTree]:
    return init_embeddings(key, student, teacher, layers, width), {}

  def apply(
    params: PyTree,
    state: PyTree,
    student: Outputs,
    teacher: Outputs | None,
    batch: Batch,
    *,
    key: Any,
    correlation_weight: Any = correlation_weight,
  ) -> tuple[dict[str, Term], PyTree]:
    del key
    there = present(batch)
    ours, theirs = embed(params, student, teacher, layers, width, there)
    values = losses.correlation_congruence(ours, theirs, where=there)
    pairs = there[:-1] & there[1:]
    term = Term(values, weight=correlation_weight, where=pairs, axis="pairs")
    return {"correlation": term}, state

  return with_labels(Objective(init=init, apply=apply, hyper=defaults), hard_weight)
