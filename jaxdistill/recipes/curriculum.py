"""A temperature that is learned against the student: CTKD."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxdistill import arguments, losses, projectors
from jaxdistill.recipes._pieces import Running, init_modules, with_labels
from jaxdistill.recipes._predictions import (
  EPOCH,
  LogitLoss,
  at_a_step,
  both_logits,
)
from jaxdistill.types import Batch, Objective, Outputs, Term, compute_dtype

__all__ = ["ctkd"]

PyTree = Any


def ctkd(
  *,
  loss: LogitLoss = losses.soft_target_kl,
  learned_temperature: projectors.LearnedTemperature | None = None,
  soft_weight: float = 0.9,
  hard_weight: float | None = 0.1,
  warmup_steps: int = 10 * EPOCH,
  standardize: bool = False,
) -> Objective:
  """Curriculum temperature (CTKD): the temperature is learned against the student.

  ``hard_weight * cross_entropy + soft_weight * loss(student, teacher, temperature)``, where the
  gradient of the temperature's parameters is multiplied by ``-ctkd_reversal``, so that they climb
  what the student descends; temperature ** 2 is part of what they climb.

  ctkd_reversal(step) = (1 - cos(pi * min(step / warmup_steps, 1))) / 2, from 0 to 1.

  Source: Li, Li, Yang, Zhao, Song, Luo, Li, Yang, "Curriculum Temperature for Knowledge
  Distillation", 2023. Its code's curriculum goes by the epoch, counted from 1; this one by the
  step, from 0. Its parameter is in the student's optimiser, weight decay included, and so it is
  here. Its instance-wise form, one temperature for each example, loops over the batch; this one,
  ``learned_temperature=projectors.LearnedTemperature(hidden=128)``, does not.

  Args:
    loss: ``(student_logits, teacher_logits, *, temperature) -> [B]``.
    learned_temperature: the published 1 + 20 * sigmoid(theta), theta from 1, by default.
    soft_weight: of the loss. 0.9 and 0.1 as published for CIFAR-100; keywords of the objective.
    hard_weight: of the labels; None leaves them out.
    warmup_steps: of the curriculum; 10 epochs of CIFAR-100 at batch size 64 by default, as
      published. 0 turns it off: the gradient is reversed in full from the first step on.
    standardize: whether logits are standardised first (see `kd_standardized`).

  Returns:
    An `Objective` with the terms ``labels``, ``soft`` and, for the log alone (its weight is 0),
    ``learned_temperature``. Unlabelled examples take part in all but the first.

  Raises:
    TypeError: ``warmup_steps`` is no integer.
    ValueError: it is negative; and when it is initialised, there is no teacher.

  >>> reversal = ctkd(warmup_steps=100).hyper["ctkd_reversal"]
  >>> [round(float(reversal(step)), 3) for step in (0, 50, 100, 900)]
  [0.0, 0.5, 1.0, 1.0]
  """
  arguments.whole("warmup_steps", warmup_steps, least=0)
  module = learned_temperature or projectors.LearnedTemperature()
  falling = optax.cosine_decay_schedule(1.0, warmup_steps) if warmup_steps else None
  hyper = {
    "soft_weight": soft_weight,
    "ctkd_reversal": 1.0 if falling is None else lambda step: 1 - falling(step),
  }

  def seen(student: Outputs, teacher: Outputs | None) -> tuple[Any, ...]:
    """What the module looks at beside the reversal: both networks' logits, or nothing."""
    if module.hidden is None:
      return ()
    pair = both_logits("ctkd", student, teacher, standardize=standardize)
    dtype = compute_dtype(*pair)
    return (jnp.concatenate([z.astype(dtype) for z in pair], axis=-1),)

  def init(key: Any, student: Outputs, teacher: Outputs | None) -> tuple[PyTree, PyTree]:
    both_logits("ctkd", student, teacher)
    given = jax.eval_shape(lambda s, t: (jnp.zeros(()), *seen(s, t)), student, teacher)
    return init_modules(key, {"temperature": (module, given)})

  def apply(
    params: PyTree,
    state: PyTree,
    student: Outputs,
    teacher: Outputs | None,
    batch: Batch,
    *,
    key: Any,
    **given: Any,
  ) -> tuple[dict[str, Term], PyTree]:
    del key
    now = {**hyper, **given}
    ours, theirs = both_logits("ctkd", student, teacher, standardize=standardize)
    running = Running(params, state)
    reversal = at_a_step("ctkd_reversal", now["ctkd_reversal"])
    temperature = running("temperature", module, reversal, *seen(student, teacher))
    axis = "parameters" if temperature.ndim == 0 else "batch"
    logged = jax.lax.stop_gradient(temperature)
    return {
      "soft": Term(_tempered(loss, ours, theirs, temperature), weight=now["soft_weight"]),
      "learned_temperature": Term(logged, weight=0.0, axis=axis),
    }, running.state

  return with_labels(Objective(init=init, apply=apply, hyper=hyper), hard_weight)


def _tempered(loss: LogitLoss, student: Any, teacher: Any, temperature: Any) -> Any:
  """The loss at one temperature for all, or at one for each row."""
  if temperature.ndim == 0:
    return loss(student, teacher, temperature=temperature)
  rows = [z.reshape(-1, z.shape[-1]) for z in (student, teacher)]
  by_row = jax.vmap(lambda s, t, value: loss(s, t, temperature=value))
  return by_row(rows[0], rows[1], temperature.reshape(-1)).reshape(temperature.shape)
