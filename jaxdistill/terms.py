"""From an objective's terms to the loss, and to the sums that the log averages.

Averages are sums until the end: over the global batch, with masks that cannot leak.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxdistill.arguments import show
from jaxdistill.types import Batch, Term, compute_dtype

__all__ = ["reduce_terms"]


def reduce_terms(
  terms: Mapping[str, Term],
  batch: Batch,
  *,
  axis_name: str | None = None,
  counts: Mapping[str, jax.Array] | None = None,
) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
  """Reduces an objective's terms to the loss, and to sums for the log.

  A term is ``weight * sum(where * values) / sum(where)`` over the global batch, and 0 when its
  mask is empty. Masked values cannot leak: they are replaced before they are multiplied, since
  ``inf * 0`` is NaN.

  Args:
    terms: the objective's terms.
    batch: the batch that they were computed on; gives the example weights.
    axis_name: the axis to sum over under `pmap`; the loss is then this device's share, whose
      gradients have to be summed over the axis too.
    counts: each term's ``sum(where)`` over a batch of which this one is a part; the loss is then
      this part's share of that batch's.

  Returns:
    ``(loss, {name: (sum, count)})``: the weighted scalar loss, and for each term the global sum
    of its values and of its mask, in float32 at least.

  Raises:
    TypeError: a term's values are no real numbers.
    ValueError: a term's mask does not fit its values, or its weight is not one number.

  >>> batch = Batch(jnp.zeros((2, 1)), jnp.zeros(2), jnp.ones(2), jnp.ones(2), None, None)
  >>> loss, sums = reduce_terms({"soft": Term(jnp.array([1.0, 3.0]), weight=0.5)}, batch)
  >>> float(loss), float(sums["soft"][0]), float(sums["soft"][1])
  (1.0, 4.0, 2.0)
  """
  loss = jnp.zeros((), jnp.float32)
  sums = {}
  for name, term in terms.items():
    _check(name, term)
    values = jnp.asarray(term.values)
    values = values.astype(compute_dtype(values))
    mask = jax.lax.stop_gradient(_mask(name, term, batch, values))
    total = jnp.sum(jnp.where(mask == 0, 0, values) * mask)
    if counts is not None:
      count = counts[name]
    else:
      count = jnp.sum(mask)
      if axis_name is not None:
        count = jax.lax.psum(count, axis_name)
    mean = total / jnp.where(count == 0, 1, count)
    loss = loss.astype(mean.dtype) + jnp.asarray(term.weight, mean.dtype) * mean
    if axis_name is not None:
      total = jax.lax.psum(total, axis_name)
    sums[name] = (total, count)
  return loss, sums


def _check(name: str, term: Term) -> None:
  """Raises where a term's values or weight are not the numbers that it is made of."""
  if not hasattr(term.values, "dtype") and not isinstance(term.values, float | int):
    raise TypeError(f"term {name!r} has the values {show(term.values)}, which are no array.")
  values = jnp.asarray(term.values)
  if jnp.issubdtype(values.dtype, jnp.complexfloating):
    raise TypeError(f"term {name!r} has values of {values.dtype}; a loss is of real numbers.")
  if jnp.shape(term.weight) != () or isinstance(term.weight, str | bytes) or term.weight is None:
    raise ValueError(
      f"term {name!r} has the weight {show(term.weight)}; it must be one number. What differs "
      "between examples belongs into its values, or into its mask (where)."
    )


def _mask(name: str, term: Term, batch: Batch, values: jax.Array) -> jax.Array:
  mask = jnp.ones(values.shape, values.dtype)
  factors = [term.where] if term.where is not None else []
  if term.axis == "batch":
    factors.append(batch.weight)
  for factor in factors:
    factor = jnp.asarray(factor)
    if factor.shape != values.shape[: factor.ndim]:
      raise ValueError(
        f"term {name!r} has values of shape {values.shape} and a mask of shape {factor.shape}; "
        "a mask has the leading axes of the values. If the values do not run over the batch, "
        "give the Term an axis of its own (axis='classes')."
      )
    factor = jnp.expand_dims(factor, range(factor.ndim, values.ndim))
    mask = mask * factor.astype(values.dtype)
  return mask
