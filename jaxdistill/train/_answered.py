"""A teacher that skipped examples: which terms of an objective leave those out, and which do not.

A term says nothing of what it is made of. Whether it looks at the teacher is read off the program
that computes it, so that every objective is right, a user's own too, without a word in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxdistill.types import Batch, Outputs, Summed, Terms

__all__ = ["depend_on", "terms_where_answered"]

PyTree = Any
# What runs its inside more than once, or only some of it: what goes in may come out anywhere.
_LOOPS = ("scan", "while")


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


def depend_on(function: Callable[[PyTree], PyTree], argument: PyTree) -> list[bool]:
  """Whether each of a function's outputs has anything to do with its argument.

  Args:
    function: of arrays; it is traced.
    argument: a pytree of arrays, or of their shapes.

  Returns:
    One answer for each leaf of the output. Where that is hard to tell, in a loop, it is yes.

  >>> depend_on(lambda x: {"a": x["y"] + 1, "b": jnp.ones(2)}, {"y": 1.0})
  [True, False]
  """
  jaxpr = jax.make_jaxpr(function)(argument).jaxpr
  return _reached(jaxpr, [True] * len(jaxpr.invars))


def _reached(jaxpr: Any, inputs: Sequence[bool]) -> list[bool]:
  """Which of a program's outputs its marked inputs reach, from the start to the end."""
  marked = {id(v) for v, is_marked in zip(jaxpr.invars, inputs, strict=True) if is_marked}
  for equation in jaxpr.eqns:
    given = [id(v) in marked for v in equation.invars]
    if not any(given):
      continue
    inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    inner = getattr(inner, "jaxpr", inner)  # some are wrapped together with their constants
    out = [True] * len(equation.outvars)
    once = inner is not None and equation.primitive.name not in _LOOPS
    if once and (len(inner.invars), len(inner.outvars)) == (len(given), len(out)):
      out = _reached(inner, given)  # what is called once, with what the operation is given
    marked |= {id(v) for v, does in zip(equation.outvars, out, strict=True) if does}
  return [id(v) in marked for v in jaxpr.outvars]
