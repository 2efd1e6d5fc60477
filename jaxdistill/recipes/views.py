"""Methods of two looks at each example, weakly and strongly augmented: CRLD, and what shows them.

The batches are of `jaxdistill.data.two_views`, the networks of `with_views`; MLKD of two views is
`logits.mlkd` with ``two_views=True``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax

from jaxdistill import losses
from jaxdistill.recipes.parts import STRONG, both_logits, hard_term, recipe, strong_view
from jaxdistill.types import Batch, Network, Number, Outputs, Term

__all__ = ["crld", "with_views"]

PyTree = Any


def with_views(network: Network) -> Network:
  """A network that is shown two looks at each example, and puts out what it says of either.

  Of inputs ``{"weak": ..., "strong": ...}``, as `jaxdistill.data.two_views` makes them, its logits
  and features are those of the weak look; those of the strong one are features too, by the names
  ``"strong/logits"`` and ``"strong/<feature>"``. Any other inputs, of evaluation and of the
  deployed network, it takes as ever. A method that knows of one look sees the weak one.

  As in the published codes, each look is a call of its own: in training a BatchNorm normalises
  either by its own batch and moves its averages twice, first by the weak one; dropout differs. A
  teacher is in inference mode, so that nothing of the batch matters to it; a cache keeps its
  answers to both looks where it is asked for the features
  (``teachers.cached(..., features=["strong/logits"])``).

  Args:
    network: of one image.

  Returns:
    The network, with the same variables.

  >>> import jax.numpy as jnp
  >>> from jaxdistill import networks
  >>> network = with_views(networks.linen(networks.models.MLP([4], num_classes=3)))
  >>> looks = {"weak": jnp.zeros((2, 5)), "strong": jnp.ones((2, 5))}
  >>> variables = network.init(jax.random.key(0), looks)
  >>> outputs, _ = network.apply(variables, looks, train=False, key=None)
  >>> outputs.logits.shape, outputs.features["strong/logits"].shape
  ((2, 3), (2, 3))
  """

  def init(key: Any, inputs: Any) -> dict[str, Any]:
    return network.init(key, inputs["weak"] if _two(inputs) else inputs)

  def apply(
    variables: Mapping[str, PyTree], inputs: Any, *, train: bool, key: Any = None
  ) -> tuple[Outputs, dict[str, PyTree]]:
    if not _two(inputs):
      return network.apply(variables, inputs, train=train, key=key)
    outputs, state = network.apply(variables, inputs["weak"], train=train, key=key)
    other = None if key is None else jax.random.fold_in(key, 1)
    # With the statistics that the weak look left, as two calls in a row have it.
    strong, moved = network.apply({**variables, **state}, inputs["strong"], train=train, key=other)
    seen = {"logits": strong.logits, **strong.features}
    named = {f"{STRONG}/{name}": value for name, value in seen.items() if value is not None}
    features = {**outputs.features, **named}
    return dataclasses.replace(outputs, features=features), {**state, **moved}

  def at_rest(paths: Collection[str]) -> Network:
    assert network.at_rest is not None
    return with_views(network.at_rest(paths))

  return dataclasses.replace(
    network, init=init, apply=apply, at_rest=None if network.at_rest is None else at_rest
  )


def _two(inputs: Any) -> bool:
  return isinstance(inputs, Mapping) and set(inputs) == {"weak", "strong"}


@recipe
def crld(
  student: Outputs,
  teacher: Outputs | None,
  batch: Batch,
  *,
  temperature: Number = 4.0,
  weak_threshold: Number = 0.9,
  strong_threshold: Number = 0.2,
  within_weight: Number = 2.0,
  cross_weight: Number = 0.5,
  hard_weight: Number | None = 1.0,
) -> dict[str, Term]:
  """Cross-view consistency (CRLD): two looks, each taught by what the teacher says of either.

  ``hard_weight * (cross_entropy(weak) + cross_entropy(strong)) + cross_view_kd``, which has both
  weights inside. Batches show two looks (`jaxdistill.data.two_views`), and both networks see them
  (`with_views`).

  Source: Zhang, Liu, Cai, Ma, "Cross-View Consistency Regularisation for Knowledge Distillation",
  2024. On ImageNet its temperature is 1 and hard_weight 2.

  Args:
    temperature: the published code's for CIFAR-100. It, the thresholds and the weights are keywords
      of the objective.
    weak_threshold: how sure the teacher must be of the weak look, for what stays within one look.
    strong_threshold: how sure of the strong one, for what goes across.
    within_weight: of each look's own soft targets.
    cross_weight: of the other look's.
    hard_weight: of the labels, with both looks; None leaves that term out.

  Returns:
    An objective with the terms ``labels``, of both looks, and ``views``; unlabelled examples take
    part in the latter only. An example of which the teacher is not sure counts there as 0.

  Raises:
    ValueError: at the first step, there is no teacher, or a network saw one look alone.

  >>> crld(hard_weight=None).hyper["cross_weight"]
  0.5
  """
  ours, theirs = both_logits("crld", student, teacher)
  strong, taught = strong_view(student, "student"), strong_view(teacher, "teacher")
  # [B]. What both looks have in common is the object, which is all that is to be learned.
  values = losses.cross_view_kd(
    ours,
    strong.logits,
    theirs,
    taught.logits,
    temperature=temperature,
    weak_threshold=weak_threshold,
    strong_threshold=strong_threshold,
    within_weight=within_weight,
    cross_weight=cross_weight,
  )
  return {
    "labels": hard_term(student, batch, hard_weight, strong),
    "views": Term(values),
  }
