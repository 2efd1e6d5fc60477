"""Teachers that learn meanwhile: students that teach each other (DML), a student's own average.

Students that teach each other are a cohort, one network to all that trains, sweeps and saves, whose
members are taken apart again at the end::

    both = networks.cohort({"small": network, "smaller": another})
    fitted = fit(both, recipes.dml(), data=source, optimizer=optimizer, steps=steps, seed=range(3))
    alone = networks.members(fitted)["smaller"]  # a model, over three seeds

A student's own average is a teacher like another, which the run keeps in its state::

    fit(network, recipes.mean_teacher(), teacher=teachers.moving_average(0.999), ...)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxdistill import _check, losses
from jaxdistill.recipes.parts import EPOCH, at_a_step, both_logits, hard_term, recipe
from jaxdistill.types import (
  Batch,
  Number,
  Objective,
  ObjectiveFunction,
  Outputs,
  Term,
  as_objective,
)

__all__ = ["dml", "each", "mean_teacher", "members_of"]

PyTree = Any


def members_of(asked: str, student: Outputs) -> dict[str, Outputs]:
  """What a cohort's members put out, by name.

  Args:
    asked: the recipe that asks, for the message.
    student: the cohort's outputs.

  Raises:
    ValueError: it is one network.
  """
  if not student.members:
    raise ValueError(
      f"{asked} trains several networks, and the student is one: give "
      'networks.cohort({"small": network, "smaller": another}).'
    )
  return student.members


@recipe
def dml(
  student: Outputs,
  teacher: Outputs | None,
  batch: Batch,
  *,
  temperature: Number = 1.0,
  mutual_weight: Number = 1.0,
  hard_weight: Number | None = 1.0,
) -> dict[str, Term]:
  """Deep mutual learning (DML): students that teach each other, in the same step.

  For each member i of a cohort of M, ``hard_weight * cross_entropy_i + mutual_weight * mean_{j≠i}
  soft_target_kl(i, j)``: each of the others is a teacher, through which no gradient passes.

  Source: Zhang, Xiang, Hospedales, Lu, "Deep Mutual Learning", 2018. Its code updates one network
  after another, the second against the first one's new answers; here all of them go by the same
  ones. Of more than two it adds the others up, where the paper and this take their mean. OKDDip's
  code has temperature 3 and lets gradients pass.

  Args:
    temperature: of both networks; 1 as published. It and the weights are keywords of the objective.
    mutual_weight: of the others' answers.
    hard_weight: of the labels; None leaves these terms out.

  Returns:
    An objective with the terms ``<member>/labels`` and ``<member>/mutual`` of each member, for a
    student that is a `networks.cohort`; `networks.members` takes the trained model apart.
    Unlabelled examples take part in the latter only. It needs no teacher; ``combine(dml(),
    each(kd(hard_weight=None)))`` has one beside.

  Raises:
    ValueError: at trace time, the student is no cohort.
  """
  del teacher
  terms, members = {}, members_of("dml", student)
  for name, mine in members.items():
    # [B] from each other: what it says now is a target, so neither can make it easy for the other.
    from_each = [
      losses.soft_target_kl(
        mine.logits, jax.lax.stop_gradient(peer.logits), temperature=temperature
      )
      for other, peer in members.items()
      if other != name
    ]
    terms[f"{name}/labels"] = hard_term(mine, batch, hard_weight)
    terms[f"{name}/mutual"] = Term(sum(from_each) / len(from_each), weight=mutual_weight)
  return terms


def each(objective: Objective | ObjectiveFunction) -> Objective:
  """An objective for each member of a cohort: a method of one student as a method of several.

  ``combine(dml(), each(kd(hard_weight=None)))`` is mutual learning with a teacher beside,
  ``each(combine(kd(), hint("pooled", "pooled")))`` a projector for each member. A member whose
  teacher is the moving average of the cohort is taught by its own.

  Args:
    objective: a pair, or a bare function. Its keywords stay what they are, for all members.

  Returns:
    An `Objective` with the terms ``<member>/<term>``; each member has parameters, a state and
    random keys of its own, for a student that is a `networks.cohort`.

  Raises:
    ValueError: the objective deploys a network of its own, or starts from given values; and when it
      is initialised, the student is no cohort.

  >>> from jaxdistill.recipes import kd
  >>> sorted(each(kd()).hyper)
  ['hard_weight', 'soft_weight', 'temperature']
  """
  one = as_objective(objective)
  if one.deployed is not None or one.start is not None:
    raise ValueError(
      "objective deploys a network of its own, or has a start: each() takes those of the student "
      "alone; train such a member by itself."
    )

  def taught_by(teacher: Outputs | None, name: str) -> Outputs | None:
    # A cohort that teaches a cohort (its own average): each member has its own teacher.
    return teacher.members.get(name, teacher) if teacher is not None else None

  def init(key: Any, student: Outputs, teacher: Outputs | None) -> tuple[PyTree, PyTree]:
    params, state = {}, {}
    for i, (name, mine) in enumerate(members_of("each", student).items()):
      own = jax.random.fold_in(key, i)
      params[name], state[name] = one.init(own, mine, taught_by(teacher, name))
    return params, state

  def apply(
    params: PyTree,
    state: PyTree,
    student: Outputs,
    teacher: Outputs | None,
    batch: Batch,
    *,
    key: Any,
    **hyper: Any,
  ) -> tuple[dict[str, Term], PyTree]:
    terms: dict[str, Term] = {}
    states = {}
    for i, (name, mine) in enumerate(members_of("each", student).items()):
      own, theirs = jax.random.fold_in(key, i), taught_by(teacher, name)
      found, states[name] = one.apply(
        params[name], state[name], mine, theirs, batch, key=own, **hyper
      )
      terms |= {f"{name}/{term}": value for term, value in found.items()}
    return terms, states

  return Objective(init=init, apply=apply, hyper=one.hyper, check=one.check)


def _ramp(warmup_steps: Any) -> Any:
  """Mean teacher's ramp exp(−5 (1 − t)²), t = step / warmup_steps up to 1; a schedule of it."""
  _check.whole("warmup_steps", warmup_steps, least=0, instead=": 0 turns the warm-up off")
  if not warmup_steps:
    return 1.0
  return lambda step: jnp.exp(-5.0 * (1.0 - jnp.minimum(step / warmup_steps, 1.0)) ** 2)


@recipe(follows={"consistency_warmup": _ramp})
def mean_teacher(
  student: Outputs,
  teacher: Outputs | None,
  batch: Batch,
  *,
  consistency_weight: Number = 100.0,
  warmup_steps: int = 5 * EPOCH,
  hard_weight: Number | None = 1.0,
  consistency_warmup: Number = 1.0,
) -> dict[str, Term]:
  """Mean teacher: the student says what a moving average of itself says, labelled or not.

  ``hard_weight * cross_entropy + consistency_weight * consistency_warmup * consistency``, with
  ``teacher=teachers.moving_average()``; any other teacher does too.

  Source: Tarvainen, Valpola, "Mean Teachers Are Better Role Models: Weight-Averaged Consistency
  Targets Improve Semi-Supervised Deep Learning Results", 2017. Its code shows the two networks
  different views of an example and has dropout in both; here both see the batch, and the teacher is
  in inference mode. Its labels' term is divided by the size of the batch, here by the number of
  labels in it.

  Args:
    consistency_weight: of the consistency, 100 for CIFAR-10. It, the warm-up and ``hard_weight``
      are keywords of the objective.
    warmup_steps: in how many steps ``consistency_warmup`` rises, as exp(−5 (1 − t)²); 5 epochs as
      published, of CIFAR-100 at batch size 64. 0 is none.
    hard_weight: of the labels; None leaves that term out.
    consistency_warmup: the ramp's value, what ``warmup_steps`` says by default.

  Returns:
    An objective with the terms ``labels`` and ``consistency``. Unlabelled examples take part in the
    latter only.

  Raises:
    TypeError: ``warmup_steps`` is no integer.
    ValueError: it is negative; there is no teacher.
  """
  del warmup_steps  # of which consistency_warmup is the schedule, and here the number of this step
  ours, theirs = both_logits("mean_teacher", student, teacher)
  share = at_a_step("consistency_warmup", consistency_warmup)
  return {
    "labels": hard_term(student, batch, hard_weight),
    "consistency": Term(losses.consistency(ours, theirs), weight=consistency_weight * share),
  }
