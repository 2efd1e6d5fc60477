"""Distillation without data (DAFL): a generator learns to make what the teacher is sure of.

Nothing of the step is bent for it. What is trained is one network, `with_generator`, whose inputs
are noise and which puts out the images that it made and what the student says of them; the
objective, `dafl`, keeps the teacher in its state, as `simkd` keeps a classifier, and asks it about
the images, through which the generator is trained; and what is deployed is the student.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxdistill import losses
from jaxdistill.recipes.parts import Modules, Running, feature, learned, present
from jaxdistill.types import (
  Batch,
  Deployed,
  Model,
  Network,
  Objective,
  Outputs,
  Term,
  compute_dtype,
)

__all__ = ["dafl", "with_generator"]

PyTree = Any
_PARTS = ("student", "generator")


def with_generator(student: Network, generator: Network) -> Network:
  """A student that sees what a generator makes of noise; both are trained, apart.

  Its logits and features are the student's, of the generator's images, which are the feature
  ``images``. No gradient of the student's reaches the generator. Its parameters are
  ``{"student": ..., "generator": ...}``, so that an optimiser may treat them differently::

      optax.multi_transform({"student": one, "generator": other}, dict.fromkeys(params, ...))

  In training both BatchNorms go by the batch.

  Args:
    student: of images.
    generator: of noise, which puts out images where others put out logits:
      ``networks.linen(module)``.

  Returns:
    The network, of noise. Give noise the shape of the student's inputs, and the deployed student
    takes what the source says that inputs are.

  >>> import flax.linen as nn
  >>> from jaxdistill import networks
  >>> network = with_generator(networks.linen(nn.Dense(3)), networks.linen(nn.Dense(5)))
  >>> variables = network.init(jax.random.key(0), jnp.zeros((2, 5)))
  >>> outputs, _ = network.apply(variables, jnp.zeros((2, 5)), train=False, key=None)
  >>> outputs.logits.shape, outputs.features["images"].shape, sorted(variables["params"])
  ((2, 3), (2, 5), ['generator', 'student'])
  """

  def made(variables: PyTree, noise: Any, train: bool, key: Any) -> tuple[Any, PyTree]:
    outputs, state = generator.apply(_part(variables, "generator"), noise, train=train, key=key)
    return outputs.logits, state

  def init(key: Any, noise: Any) -> dict[str, PyTree]:
    keys = dict(zip(_PARTS, jax.random.split(key), strict=True))
    theirs = generator.init(keys["generator"], noise)
    shape = jax.eval_shape(lambda v: generator.apply(v, noise, train=False, key=None)[0], theirs)
    ours = student.init(keys["student"], jnp.zeros(shape.logits.shape, shape.logits.dtype))
    parts = {"student": ours, "generator": theirs}
    rest = {name: {c: v for c, v in part.items() if c != "params"} for name, part in parts.items()}
    return {"params": {name: part["params"] for name, part in parts.items()}, **rest}

  def apply(
    variables: Mapping[str, PyTree], inputs: Any, *, train: bool, key: Any = None
  ) -> tuple[Outputs, dict[str, PyTree]]:
    keys = (None, None) if key is None else jax.random.split(key)
    images, moved = made(variables, inputs, train, keys[0])
    # The student learns from the images, and they are not made to please it.
    seen = jax.lax.stop_gradient(images)
    outputs, state = student.apply(_part(variables, "student"), seen, train=train, key=keys[1])
    features = {**outputs.features, "images": images}
    after = {"student": state, "generator": moved} if train else {}
    after = {name: {**variables[name], **new} for name, new in after.items()}
    return dataclasses.replace(outputs, features=features), after

  name = f"{student.name} and {generator.name}"
  return Network(init=init, apply=apply, name=name)


def _part(variables: PyTree, name: str) -> dict[str, PyTree]:
  return {"params": variables["params"][name], **variables[name]}


def dafl(
  teacher: Model,
  student: Network,
  *,
  layer: str = "pooled",
  one_hot_weight: float = 1.0,
  balance_weight: float = 5 / math.log(10),
  activation_weight: float = 0.1,
  soft_weight: float = 1.0,
  temperature: float = 1.0,
) -> Objective:
  """Data-free learning (DAFL): images that the teacher is sure of, of all classes, and its answers.

  ``soft_weight * soft_target_kl`` for the student; for the generator ``one_hot_weight *
  cross_entropy(t, argmax t) + balance_weight * Σ_k m_k log m_k - activation_weight * mean |f|``,
  t and f the teacher's logits and its feature of the images, m the batch's mean of softmax(t).

  Source: Chen, Wang, Xu, Yang, Liu, Shi, Xu, Xu, Tian, "Data-Free Learning of Student Networks",
  2019. Both are trained in every step, as in its code, which reports the best epoch. In the
  protocol of Fast-Datafree the generator has one step in five of the student's, (one_hot_weight,
  balance_weight, activation_weight) are (1, 20, 1e-3) and the temperature is 20.

  Args:
    teacher: the teacher, asked in inference mode; its variables are the objective's state and never
      change. Of several seeds side by side each has a copy.
    student: the network that was given to `with_generator`, which is what is deployed.
    layer: a feature of the teacher's, which is to be large: of the layer before its classifier.
    one_hot_weight: of the teacher's being sure of an image. It, the other weights and the
      temperature are keywords of the objective.
    balance_weight: of all classes' being as frequent in a batch, which depends on who is in it:
      under ``pmap`` or gradient accumulation, the device's share or the micro-batch. 5 in the
      published code, whose logarithm there is to base 10.
    activation_weight: of large features.
    soft_weight: of the student's soft targets.
    temperature: of those.

  Returns:
    An `Objective` with the terms ``soft``, ``one_hot``, ``activation`` and ``balance`` (one value a
    class), and with `Objective.deployed`. It takes no teacher from ``fit``, and no labels.

  Raises:
    ValueError: a weight is negative, or ``teacher`` holds several seeds; when it is initialised,
      the network is not of `with_generator`, or the teacher has no such feature.

  >>> from jaxdistill import networks
  >>> network = networks.linen(networks.models.MLP([4], num_classes=3))
  >>> teacher = Model(network, network.init(jax.random.key(0), jnp.zeros((1, 5))))
  >>> dafl(teacher, network).hyper["activation_weight"]
  0.1
  """
  if teacher.seeds is not None:
    raise ValueError(
      f"teacher holds {teacher.seeds} seeds of {teacher.network.name!r}: give one of "
      "teacher.unstack()."
    )

  def asked(variables: PyTree, images: Any) -> Outputs:
    return teacher.network.apply(variables, images, train=False, key=None)[0]

  def modules(student: Outputs, teacher: Outputs | None) -> Modules:
    return {}

  def init(key: Any, student: Outputs, _: Outputs | None) -> tuple[PyTree, PyTree]:
    images = feature(student, "images", "student_layer")
    feature(jax.eval_shape(asked, teacher.variables, images), layer, "teacher_layer")
    return {}, {"teacher": jax.tree.map(jnp.asarray, teacher.variables)}

  def method(
    running: Running,
    student: Outputs,
    teacher: Outputs | None,
    batch: Batch,
    *,
    one_hot_weight: Any,
    balance_weight: Any,
    activation_weight: Any,
    soft_weight: Any,
    temperature: Any,
  ) -> dict[str, Term]:
    # The gradient goes through the teacher to the images, and stops at its variables.
    kept = jax.lax.stop_gradient(running.state["teacher"])
    told = asked(kept, student.features["images"])
    logits, held = told.logits, told.features[layer]
    # [B]. What the teacher takes for real, it names without doubt, and its features are large.
    sure = losses.cross_entropy(logits, jnp.argmax(logits, axis=-1))
    size = jnp.mean(jnp.abs(held.astype(compute_dtype(held))), axis=tuple(range(1, held.ndim)))
    soft = losses.soft_target_kl(
      student.logits, jax.lax.stop_gradient(logits), temperature=temperature
    )
    return {
      "soft": Term(soft, weight=soft_weight),
      "one_hot": Term(sure, weight=one_hot_weight),
      "activation": Term(-size, weight=activation_weight),
      "balance": Term(_imbalance(logits, batch), weight=balance_weight, axis="classes"),
    }

  hyper = {
    "one_hot_weight": one_hot_weight,
    "balance_weight": balance_weight,
    "activation_weight": activation_weight,
    "soft_weight": soft_weight,
    "temperature": temperature,
  }
  deployed = Deployed(network=lambda _: student, variables=_student_alone)
  return learned(modules, method, hyper, init=init, deployed=deployed)


def _imbalance(logits: Any, batch: Batch) -> jax.Array:
  """``[K]`` values whose mean is Σ_k m_k log m_k: less, the more alike all classes are."""
  values = logits.astype(compute_dtype(logits))
  there = present(batch, values)
  count = jnp.maximum(jnp.sum(present(batch), dtype=jnp.int32), 1).astype(values.dtype)
  # In log space: a class that nobody is of would be 0 times the logarithm of 0.
  each = jnp.where(there, jax.nn.log_softmax(values, axis=-1), -1e30)
  log_mean = jax.nn.logsumexp(each, axis=0) - jnp.log(count)
  return values.shape[-1] * jnp.exp(log_mean) * jnp.maximum(log_mean, -1e30)


def _student_alone(variables: PyTree, params: PyTree, state: PyTree) -> dict[str, PyTree]:
  """The deployed network's variables."""
  del params, state
  return _part(variables, "student")
