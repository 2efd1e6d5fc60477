"""A teacher that skipped examples: which terms of an objective leave those out, and which do not.

A term says nothing of what it is made of. Whether it looks at the teacher is read off the program
that computes it, so that every objective is right, a user's own too, without a word in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdistill._reach import depend_on
from jaxdistill.types import Batch, Outputs, Summed, Terms

__all__ = ["terms_where_answered"]

PyTree = Any


def terms_where_answered(
  made: Callable[[Outputs, Batch], tuple[Terms, PyTree]], target: Outputs, batch: Batch
) -> tuple[Terms, PyTree]:
  """The terms where the teacher skipped examples, which count in those that ask it nothing.

  To a term that looks at the teacher a skipped example is padding: relations between examples, a
  projector's statistics and what the objective remembers leave it out, and not its own value alone.
  To a term of the labels it is like any other. So the objective is written out for both batches,
  and of each the terms are taken for which it is right; the compiler drops the rest.

  Args:
    made: ``(teacher's outputs, batch) -> (terms, what the objective remembers)``.
    target: the teacher's outputs, with ``where`` ``[B]``.
    batch: the batch; nothing else decides the masks.

  Returns:
    The terms, and what is remembered of the examples that the teacher answered.
  """
  answers = jnp.asarray(target.where) > 0
  weight = jnp.asarray(batch.weight)
  fewer = dataclasses.replace(batch, weight=_masked(weight, answers))
  compared, remembered = made(target, fewer)
  alone, _ = made(target, batch)

  # What is summed already was so by whoever knew of the mask: in chunks of tokens, this function.
  done = {name: term for name, term in alone.items() if isinstance(term, Summed)}

  def values(outputs: Outputs) -> dict[str, Any]:
    found = made(outputs, batch)[0]
    return {name: jnp.asarray(term.values) for name, term in found.items() if name not in done}

  # A dict's leaves come in the order of its sorted keys.
  looks = depend_on(values, dataclasses.replace(target, where=None))
  looking = {
    name for name, does in zip(sorted(set(compared) - set(done)), looks, strict=True) if does
  }
  chosen = {}
  for name, term in compared.items():
    if name not in looking:
      term = alone[name]
    elif term.axis == "batch":
      # The step multiplies by the whole batch's weights.
      own = jnp.ones(answers.shape, jnp.float32) if term.where is None else jnp.asarray(term.where)
      term = dataclasses.replace(term, where=_masked(own, answers))
    chosen[name] = term
  return chosen, remembered


def _masked(mask: jax.Array, answers: jax.Array) -> jax.Array:
  """A mask ``[B, ...]`` that is 0 where the teacher said nothing."""
  return mask * jnp.expand_dims(answers, range(1, mask.ndim)).astype(mask.dtype)
