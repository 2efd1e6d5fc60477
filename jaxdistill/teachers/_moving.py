"""A teacher that is a moving average of its student: it has no variables but those of the run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from jaxdistill import _check
from jaxdistill.types import Batch, Outputs, Teacher

__all__ = ["decay_of", "moving_average"]

PyTree = Any
# A number, or a function of the step.
Decay = float | Callable[[Any], Any]


def moving_average(decay: Decay = 0.999) -> Teacher:
  """A teacher whose variables are a moving average of the student's: mean teacher.

  ``fit(student, objective, teacher=teachers.moving_average(), ...)``, with any objective that
  compares outputs (`recipes.mean_teacher`, `recipes.kd`, a hint). After each step it moves towards
  the student by ``1 - min(decay, (1 + t) / (2 + t))`` at step t, so that it leaves the random
  beginning behind in a few steps. It runs in inference mode, and its BatchNorm's averages are the
  averages of the student's; in the published code they are those of passes of its own in training.

  It is a part of the run's state: saved with it, gone on with by the same bits, one for each
  student of a sweep. Afterwards it is ``Model(student, fitted.state.teacher, fitted.seeds)``.
  What is deployed is the student; ``fit(average=decay)`` deploys a moving average, of any decay.

  Args:
    decay: 0.999 in the published code, and 0.97 to 0.99 for CIFAR-10 with 1000 to 4000 labels; a
      number in [0, 1], or a schedule of the step (BYOL's and DINO's rises to 1 in a cosine).

  Returns:
    The teacher, for `jaxdistill.fit`, `search.sweep` and `train.make_step`. It answers nobody else:
    neither `cached` nor `ensemble` can ask what does not exist yet.

  Raises:
    TypeError: ``decay`` is no number and no function.
    ValueError: it is out of range.

  Source: Tarvainen, Valpola, "Mean Teachers Are Better Role Models: Weight-Averaged Consistency
  Targets Improve Semi-Supervised Deep Learning Results", 2017.
  """
  if callable(decay):
    _check.scheduled("decay", decay)
  else:
    _check.number("decay", decay, least=0, most=1)
  asked = {"kind": "moving_average", "decay": None if callable(decay) else float(decay)}
  return Teacher({}, _Moving(decay), json.dumps(asked))


def decay_of(teacher: Any) -> Decay | None:
  """The decay of a teacher that is a moving average of its student; None of any other, and of none.

  >>> decay_of(moving_average(0.99)), decay_of(None)
  (0.99, None)
  """
  apply = getattr(teacher, "apply", None)
  return apply.decay if isinstance(apply, _Moving) else None


@dataclasses.dataclass(frozen=True)
class _Moving:
  """The apply function of a teacher that the step finds in its own state."""

  decay: Decay

  def __call__(self, variables: PyTree, batch: Batch) -> Outputs:
    raise ValueError(
      "teachers.moving_average() is a moving average of the student that it teaches, and exists in "
      "that run alone: give it to fit, search.sweep or train.make_step, as teacher=. What it has "
      "become is teachers.frozen(Model(student, fitted.state.teacher)), which answers anywhere."
    )
