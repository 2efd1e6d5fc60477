"""Calibration of a classifier after the fact: the one temperature that fits its probabilities.

Pure functions of logits and labels that lie side by side; `jaxdistill.evaluation.metrics` measures
the calibration error itself.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import _check
from jaxdistill._compile import quick

__all__ = ["RANGE", "calibrating_temperature", "losses_at", "smoothed_losses"]

# Temperatures beyond are of logits that are all alike, or that separate every example.
RANGE = (0.01, 100.0)
# Each halves the interval of the logarithm, of length 9.2: below float32's resolution after 30.
_HALVINGS = 32
# Stands for a masked class: finite, so that a probability of 0 times it is 0.
_MASKED = -1e30


@functools.cache
def _compiled() -> tuple[Any, Any]:
  def losses(logits: Any, labels: Any, inverse: Any) -> Any:
    scaled = inverse * logits
    mine = jnp.take_along_axis(scaled, labels[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(scaled, axis=1) - mine

  def search(logits: Any, labels: Any) -> Any:
    mine = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]

    def halve(_: Any, ends: Any) -> Any:
      low, high = ends
      middle = (low + high) / 2
      mean = jnp.sum(jax.nn.softmax(jnp.exp(middle) * logits, axis=1) * logits, axis=1)
      # The loss is convex in the inverse temperature, and this is its slope there.
      rising = jnp.mean(mean - mine) > 0
      return jnp.where(rising, low, middle), jnp.where(rising, middle, high)

    ends = tuple(jnp.asarray(-np.log(bound), logits.dtype) for bound in reversed(RANGE))
    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, ends)
    return jnp.exp((low + high) / 2)

  return jax.jit(losses), jax.jit(search, compiler_options=quick())


def _prepared(logits: Any, labels: Any) -> tuple[Any, Any]:
  logits, labels = np.asarray(logits), np.asarray(labels)
  if logits.ndim != 2 or labels.shape != logits.shape[:1] or not labels.size:
    raise ValueError(
      f"logits must be [N, K] and labels [N] with N at least 1, got {_check.show(logits)} and "
      f"{_check.show(labels)}."
    )
  if not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(f"labels must be integers, got {_check.show(labels)}.")
  outside = labels[(labels < 0) | (labels >= logits.shape[1])]
  if outside.size:
    raise ValueError(f"labels has {outside[0]}, and the logits have {logits.shape[1]} classes.")
  dtype = jax.dtypes.canonicalize_dtype(np.float64 if logits.dtype == np.float64 else np.float32)
  return np.maximum(logits.astype(dtype), dtype.type(_MASKED)), labels.astype(np.int32)


def losses_at(logits: Any, labels: Any, temperature: float = 1.0) -> np.ndarray:
  """Each example's negative log-likelihood under ``softmax(logits / temperature)``.

  Args:
    logits: ``[N, K]``.
    labels: ``[N]`` classes.
    temperature: by which the logits are divided.

  Returns:
    ``[N]`` in nats, float64.

  Raises:
    ValueError: shapes or labels do not fit.

  >>> losses_at(np.log([[0.75, 0.25]]), np.array([0])).round(4).tolist()
  [0.2877]
  """
  _check.number("temperature", temperature, above=0)
  logits, labels = _prepared(logits, labels)
  found = _compiled()[0](logits, labels, logits.dtype.type(1 / temperature))
  return np.asarray(found, np.float64)


def calibrating_temperature(logits: Any, labels: Any) -> float:
  """The temperature under which ``softmax(logits / temperature)`` has the least loss on the labels.

  The mean negative log-likelihood is convex in the inverse temperature, so that its one minimum is
  found by halving an interval of the slope.

  Args:
    logits: ``[N, K]`` on held-out examples.
    labels: ``[N]`` classes.

  Returns:
    The temperature, within `RANGE`. Above 1 for a network that is too sure; an end of the range
    where there is no minimum inside: every example right (the lower end), or logits that tell
    nothing (the upper one).

  Raises:
    ValueError: shapes or labels do not fit.

  Source: Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", 2017.

  >>> sure = 6 * np.log([[0.75, 0.25]] * 4)  # right three times out of four
  >>> round(calibrating_temperature(sure, np.array([0, 0, 0, 1])), 3)
  6.0
  """
  return float(1 / _compiled()[1](*_prepared(logits, labels)))


def smoothed_losses(logits: Any, labels: Any) -> np.ndarray:
  """Each example's loss under the same predictions with one confidence for all of them.

  The most likely class gets the accuracy a, and the K − 1 others (1 − a) / (K − 1) each: what
  remains of a network of which nothing is known but its class and how often that is right. It is
  what label smoothing (Szegedy et al., 2016) makes of a label, with the network's own error. A is
  taken with one more success and one more failure (Laplace), so that no loss is infinite.

  Args:
    logits: ``[N, K]``, K at least 2.
    labels: ``[N]`` classes.

  Returns:
    ``[N]`` in nats, float64.

  Raises:
    ValueError: shapes or labels do not fit.

  >>> smoothed_losses(np.eye(3)[[0, 0]], np.array([0, 1])).round(4).tolist()
  [0.6931, 1.3863]
  """
  logits, labels = _prepared(logits, labels)
  right = np.argmax(logits, axis=1) == labels
  accuracy = (right.sum() + 1) / (right.size + 2)
  others = max(logits.shape[1] - 1, 1)
  return np.where(right, -np.log(accuracy), -np.log((1 - accuracy) / others))
