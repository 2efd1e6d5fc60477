"""Losses that place features ``[..., D]`` by the mean of their class, and those means."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from jaxdistill.losses._log_space import AnyArray, PerExample, float_arrays
from jaxdistill.losses._maps import SMALLEST_NORM, norm, same_width, tame, unit

__all__ = ["class_means", "norm_and_direction"]


def class_means(
  features: Float[AnyArray, "N D"], labels: Integer[AnyArray, " N"], num_classes: int
) -> Float[Array, "{num_classes} D"]:
  """Class means of features (for ND): what `norm_and_direction` points at.

  m_k = Σ_i features_i / Σ_i 1 over the examples i with labels_i = k, k < num_classes.

  Args:
    features: ``[N, D]``, the teacher's of the whole training set, in evaluation mode.
    labels: ``[N]`` integers. An example of no class is in no mean.
    num_classes: how many classes there are.

  Returns:
    ``[num_classes, D]``; 0 for a class without an example.

  Source: Wang, Cheng, Duan, Wang, Feng, Kong, "Improving Knowledge Distillation via Regularizing
  Feature Norm and Direction", 2023.

  Other codes: the published code rounds them to four decimals; this one does not.

  >>> class_means(jnp.array([[1.0], [3.0], [5.0]]), jnp.array([0, 0, 1]), 2).tolist()
  [[2.0], [5.0]]
  """
  (features,) = float_arrays(features)
  # A sum by class as one product, [K, N] by [N, D], would be large: N is a whole training set.
  labels = jnp.where(jnp.asarray(labels) < 0, num_classes, jnp.asarray(labels))
  sums = jax.ops.segment_sum(features, labels, num_segments=num_classes)
  counts = jax.ops.segment_sum(jnp.ones_like(features[:, :1]), labels, num_segments=num_classes)
  return sums / jnp.maximum(counts, 1)


def norm_and_direction(
  student: Float[AnyArray, "*batch D"],
  teacher: Float[AnyArray, "*batch D"],
  labels: Integer[AnyArray, "*batch"],
  means: Float[AnyArray, "K D"],
) -> PerExample:
  """Norm and direction (ND, of KD++): towards the class's mean, and at least as far as the teacher.

  1 − s·n(m_y) / max(‖s‖, ‖t‖), s = student, t = teacher, m = means, y = labels,
  n(v) = v / max(‖v‖, 1e-12).

  Where the student is longer than the teacher, it is a cosine; where it is shorter, its length is
  pushed up as well.

  Args:
    student: ``[..., D]``, a pooled feature, projected where the widths differ.
    teacher: ``[..., D]``.
    labels: ``[...]`` integers. One outside ``0 .. K-1`` has the value 0.
    means: ``[K, D]``, the teacher's mean feature of each class: `class_means`.

  Returns:
    ``[...]``, in [0, 2].

  Raises:
    ValueError: the shapes do not fit.

  Source: Wang, Cheng, Duan, Wang, Feng, Kong, "Improving Knowledge Distillation via Regularizing
  Feature Norm and Direction", 2023.

  Other codes: these are the values of the published code, example by example in a loop there; here
  two features of 0 give 1 instead of a division by 0.

  >>> s, t, means = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 4.0]]), jnp.array([[2.0, 0.0]])
  >>> norm_and_direction(s, t, jnp.array([0]), means).tolist()  # 1 − 1/4
  [0.75]
  """
  same_width(student, teacher)
  same_width(student, means, ("student", "means"))
  labels = jnp.asarray(labels)
  if np.shape(student) != np.shape(teacher) or labels.shape != np.shape(student)[:-1]:
    raise ValueError(
      f"student {np.shape(student)} and teacher {np.shape(teacher)} must have one shape [..., D], "
      f"and labels {labels.shape} theirs without D."
    )
  student, teacher, means = float_arrays(student, teacher, means)
  known = (labels >= 0) & (labels < means.shape[0])
  towards = unit(means)[jnp.where(known, labels, 0)]
  # Both by one scale, so that no square leaves float32.
  both = tame(jnp.stack([student, teacher], axis=-2), (-1, -2))
  sizes = norm(both, -1)[..., 0]
  # No maximum: at a tie that would halve the gradient.
  longest = jnp.where(sizes[..., 0] > sizes[..., 1], sizes[..., 0], sizes[..., 1])
  longest = jnp.where(longest > SMALLEST_NORM, longest, 1.0)
  return jnp.where(known, 1 - jnp.sum(both[..., 0, :] * towards, axis=-1) / longest, 0.0)
