"""What recipes on predictions share: both networks' logits, schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxdistill import losses
from jaxdistill.types import Outputs

__all__ = ["EPOCH", "LogitLoss", "at_a_step", "both_logits"]

# Steps of an epoch of CIFAR-100 at the published batch size of 64.
EPOCH = 781

# ``(student_logits, teacher_logits, *, temperature) -> [...]``.
LogitLoss = Callable[..., jax.Array]


def both_logits(
  recipe: str, student: Outputs, teacher: Outputs | None, *, standardize: bool = False
) -> tuple[Any, Any]:
  """Both networks' logits, as they are or as z-scores.

  Args:
    recipe: who asks, for the message.
    student: the student's outputs.
    teacher: the teacher's.
    standardize: whether each row becomes z-scores (`losses.standardize_logits`).

  Returns:
    ``(student logits, teacher logits)``.

  Raises:
    ValueError: there is no teacher.

  >>> outputs = Outputs(jax.numpy.array([[1.0, 2.0, 3.0]]))
  >>> both_logits("dkd", outputs, outputs, standardize=True)[1].round(3).tolist()
  [[-1.0, 0.0, 1.0]]
  """
  if teacher is None:
    raise ValueError(f"{recipe} compares with a teacher, and teacher is None; give fit a teacher.")
  if not standardize:
    return student.logits, teacher.logits
  return losses.standardize_logits(student.logits), losses.standardize_logits(teacher.logits)


def at_a_step(name: str, value: Any) -> Any:
  """A keyword's number, where the train step has put the schedule's value in its place.

  Args:
    name: the keyword's.
    value: what the objective was given.

  Returns:
    The value.

  Raises:
    ValueError: it is the schedule still.

  >>> at_a_step("dkd_warmup", 0.5)
  0.5
  """
  if callable(value):
    raise ValueError(
      f"{name} is a schedule of the step, which is unknown here: give a number, {name}=1.0, or "
      "train by train.fit or step.make_step, which follow schedules."
    )
  return value
