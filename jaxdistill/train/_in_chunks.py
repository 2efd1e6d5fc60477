"""An objective in chunks of tokens: the loss of a large vocabulary without its logits.

At 8,192 tokens and 128,256 words, float32 logits take 4.2 GB, and so does their gradient, for
either network. But an objective adds up over tokens, by masks that depend on the batch alone. So it
is run, whatever it is, on a few positions at a time, whose logits are made of ``hidden`` and
``head`` and thrown away. Its terms come out as sums (`Summed`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxdistill import _check
from jaxdistill._chunks import Chunks
from jaxdistill.train._answered import terms_where_answered
from jaxdistill.train._step import mask_of, right, summed
from jaxdistill.types import (
  Batch,
  Head,
  Objective,
  ObjectiveFunction,
  Outputs,
  Summed,
  Term,
  Terms,
  as_objective,
  compute_dtype,
  with_logits,
)

__all__ = ["in_chunks"]

PyTree = Any
# A term's sum over all tokens, or what the loss's gradient by it is, by the term's name.
Scalars = dict[str, jax.Array]
# What is summed with the terms and is none: how many labels are said. No term has this name.
_RIGHT = "labels that are said"


def in_chunks(
  objective: Objective | ObjectiveFunction,
  *,
  tokens_at_once: int | None = 512,
  backward: Literal["kept", "again"] = "kept",
  compact: bool = True,
) -> Objective:
  """The same objective, computed of some tokens at a time: no array ``[tokens, vocabulary]``.

  The networks put out ``hidden`` and ``head`` (`Outputs`); inside, the objective finds
  ``student.logits`` and ``teacher.logits`` ``[B, C, V]`` of C positions, and of the batch's labels,
  weights and inputs those of shape ``[B, L, ...]`` cut likewise. Value and gradients are those of
  the whole, up to rounding. A network that puts out logits ``[B, L, V]`` may be one of the two.

  What holds for it:

  - Its terms have one value a token, ``[B, L]``. One that compares tokens with each other (over
    another axis) is refused, but for ``axis="parameters"``, which looks at no token.
  - Features are for what is beside it: ``recipes.combine(in_chunks(kd()), hint("mid"))``.
  - Nothing that it remembers (its state) may change with tokens; what it draws by ``key`` differs
    from chunk to chunk.
  - The teacher and the batch get no gradient. The loss's own has a derivative by forward mode
    alone, ``jax.jvp`` of ``jax.grad``.
  - Students side by side (several seeds, a sweep's) share what the teacher says of a chunk, and
    their own logits are made one student after another.

  Args:
    objective: an `Objective` or a bare function of logits.
    tokens_at_once: how many tokens a chunk has, of all examples together; with B examples it is
      rounded up to a multiple of B. 512 keeps matrix units busy, and at 128,256 words a chunk's
      logits take 0.26 GB; 1,024 may be faster on an accelerator with the memory for it. None for
      all: the objective as it is.
    backward: ``"kept"``: gradients are made in the forward pass, where the logits are, which is
      least work: four products with a head's kernel. They are those of the loss; of its terms one
      by one there are none (NaN). ``"again"``: logits are made again in the backward pass: six
      products, less memory between the two passes, and every term's own gradient.
    compact: whether positions that no mask counts (prompts, padding) are left out, where weights or
      labels have a mask of tokens ``[B, L]``: each example's others come first, and chunks end with
      the longest example's. False computes all chunks, each of positions side by side.

  Returns:
    An `Objective` with the same keywords, parameters and terms.

  Raises:
    TypeError: an argument is of another kind than it must be.
    ValueError: one is out of range; and at trace time, the outputs are no tokens, there are fewer
      tokens at once than examples, or the objective is not what is said above.

  >>> from jaxdistill import recipes
  >>> sorted(in_chunks(recipes.kd(), tokens_at_once=64).hyper)
  ['hard_weight', 'soft_weight', 'temperature']
  """
  if backward not in ("kept", "again"):
    raise ValueError(f"backward={_check.show(backward)} must be 'kept' or 'again'.")
  _check.switch("compact", compact)
  made = as_objective(objective)
  if tokens_at_once is None:
    return made
  _check.whole("tokens_at_once", tokens_at_once)
  chunked = _InChunks(made, tokens_at_once, backward, compact)
  return dataclasses.replace(made, init=chunked.init, apply=chunked.apply)


@jax.tree_util.register_pytree_node_class
class _NoFeatures(dict[str, Any]):
  """What stands where features would: an error for whoever looks one up, or asks for it."""

  def __missing__(self, name: str) -> Any:
    raise ValueError(
      f"the objective reads features[{name!r}], and in chunks of tokens there are logits alone: "
      "take that term outside, recipes.combine(train.in_chunks(...), recipes.hint(...))."
    )

  def __contains__(self, name: object) -> bool:
    # A recipe that finds it missing would say that the network does not put it out.
    return bool(self.__missing__(str(name)))

  def tree_flatten(self) -> tuple[tuple[()], None]:
    """No leaves."""
    return (), None

  @classmethod
  def tree_unflatten(cls, aux: None, leaves: tuple[()]) -> _NoFeatures:
    """The same again."""
    return cls()


def _logits_alone(logits: Any) -> Outputs:
  return Outputs(logits=logits, features=_NoFeatures())


@dataclasses.dataclass(frozen=True, eq=False)
class _InChunks:
  """The pair of functions that `in_chunks` returns."""

  objective: Objective
  tokens: int
  backward: str
  compact: bool

  def init(self, key: Any, student: Outputs, teacher: Outputs | None) -> tuple[PyTree, PyTree]:
    """The objective's, of the logits' shapes."""

    def shapes(outputs: Outputs | None) -> Outputs | None:
      return None if outputs is None else _logits_alone(jax.eval_shape(with_logits, outputs).logits)

    params, state = self.objective.init(key, shapes(student), shapes(teacher))
    if jax.tree.leaves(state):
      raise ValueError(
        "the objective remembers something (its state has arrays), which chunks of tokens would "
        "change one after another: take it outside, recipes.combine(train.in_chunks(...), it)."
      )
    return params, state

  def apply(
    self,
    params: PyTree,
    state: PyTree,
    student: Outputs,
    teacher: Outputs | None,
    batch: Batch,
    *,
    key: Any,
    **hyper: Any,
  ) -> tuple[Terms, PyTree]:
    """The objective's terms, summed."""
    head, hidden = _head_of(student)
    chunks = Chunks.of(hidden.shape, tokens=self.tokens)
    # An argument where it is traced: a closure's tracer would leak out of the gradient's function.
    traced = {n: v for n, v in hyper.items() if isinstance(v, jax.core.Tracer)}
    numbers = {n: v for n, v in traced.items() if jnp.issubdtype(v.dtype, jnp.inexact)}
    rest = {n: v for n, v in traced.items() if n not in numbers}
    terms = _Terms(self.objective, chunks, state, {n: hyper[n] for n in hyper if n not in traced})
    # The bias in float32, for its gradient's sake; a copy of the kernel would be a large one.
    bias = None if head is None or head.bias is None else head.bias.astype(compute_dtype(head.bias))
    learnt = (params, numbers, bias)
    seen = jax.lax.stop_gradient((teacher, dataclasses.replace(batch, teacher=None, counts=None)))
    given = _Given(*seen, key, rest)
    product = _product_of(head)
    raw = jax.eval_shape(lambda: product(chunks.cut(hidden, 0)))
    # Of logits that are all 0: weights and masks say nothing of them, and the compiler drops what
    # is computed of them. Compiled by itself where nothing else is, for that very reason.
    known = jax.jit(terms.of_no_logits, static_argnums=2)(learnt, given, raw)
    weights, beside, counts, where = known
    if self.compact and max(jnp.ndim(batch.weight), jnp.ndim(batch.labelled)) > 1:
      order, turns = chunks.packed(where)
      given = given._replace(order=order, turns=_most(turns))
    over = batch.counts or {}
    share = {
      name: jax.lax.stop_gradient(weights[name]).astype(count.dtype)
      / (jnp.where((whole := over.get(name, count)) == 0, 1, whole)).astype(count.dtype)
      for name, count in counts.items()
    }
    sums = _Sums(terms, head, self.backward)
    totals = sums(learnt, hidden, None if head is None else head.kernel, given, share)
    said = (totals.pop(_RIGHT), counts[_RIGHT]) if _RIGHT in totals else None
    found: Terms = {
      name: Summed(total, counts[name], weights[name], self.backward == "kept", said)
      for name, total in totals.items()
    }
    return {**found, **beside}, state


def _head_of(student: Outputs) -> tuple[Head | None, jax.Array]:
  """The student's head and what goes in, which are the logits themselves where it has none."""
  head = student.head
  hidden = student.logits if head is None else student.hidden
  if head is not None and not isinstance(head, Head):
    raise TypeError(
      f"the student's head is {_check.show(head)}; its gradient is taken of a types.Head."
    )
  if hidden is None or hidden.ndim != 3:
    shape = None if hidden is None else list(hidden.shape)
    raise ValueError(
      f"the student puts out no tokens: in chunks its hidden is [B, L, D] (or its logits "
      f"[B, L, V]), and it is {shape}."
    )
  return head, hidden


def _product_of(head: Head | None) -> Callable[[jax.Array], jax.Array]:
  """What makes logits of hidden states, but for what `Head.finish` does to each."""
  return (lambda logits: logits) if head is None else head.product


class _Given(NamedTuple):
  """What terms are computed of beside the student, and gets no gradient.

  Attributes:
    teacher: its outputs, or None.
    batch: the batch.
    key: random.
    rest: keywords that are arrays of integers.
    order: in which positions are taken, ``[B, L]``; None for as they lie.
    turns: how many chunks hold all that counts; None for all chunks.
  """

  teacher: Outputs | None
  batch: Batch
  key: Any
  rest: dict[str, Any]
  order: Any = None
  turns: Any = None


class _Seen(NamedTuple):
  """What a chunk's terms are computed of beside the student's logits.

  Attributes:
    teacher: its logits ``[B, C, V]``, or None.
    batch: the chunk's part of the batch.
    key: random.
    rest: keywords that are arrays of integers.
    fresh: ``[C]``, which positions no chunk before had.
  """

  teacher: Outputs | None
  batch: Batch
  key: Any
  rest: dict[str, Any]
  fresh: jax.Array


@jax.custom_batching.custom_vmap
def _most(turns: jax.Array) -> jax.Array:
  """The number itself; of students side by side with batches of their own, their largest.

  Under vmap a loop whose turns differ would copy all that it carries at each of them. What is
  beyond a student's own chunks is masked.
  """
  return turns


@_most.def_vmap
def _most_of_all(size: int, batched: Any, turns: jax.Array) -> tuple[jax.Array, bool]:
  del size, batched
  return _most(jnp.max(turns, axis=0)), False


@dataclasses.dataclass(frozen=True, eq=False)
class _Terms:
  """The terms of a chunk.

  Attributes:
    objective: whose they are.
    chunks: how tokens are cut.
    state: of the objective, without arrays.
    fixed: its keywords that are no arrays.
  """

  objective: Objective
  chunks: Chunks
  state: PyTree
  fixed: Mapping[str, Any]

  def seen(self, given: _Given, i: Any) -> _Seen:
    """What the i-th chunk sees. Students who share a teacher and a batch share all but the key."""
    teacher, order = given.teacher, given.order
    if teacher is not None:
      logits, hidden = self.chunks.cut((teacher.logits, teacher.hidden), i, order)
      logits = logits if teacher.head is None else teacher.head(hidden)
      teacher = dataclasses.replace(_logits_alone(logits), where=teacher.where)
    own = self.chunks.cut(given.batch, i, order)
    return _Seen(teacher, own, jax.random.fold_in(given.key, i), given.rest, self.chunks.fresh(i))

  def __call__(
    self, learnt: Any, seen: _Seen, logits: jax.Array
  ) -> tuple[dict[str, Term], dict[str, Term]]:
    """Of a chunk: what is summed over its tokens, and what looks at none of them."""
    params, numbers, _ = learnt
    target, own = seen.teacher, seen.batch
    hyper = {**self.fixed, **numbers, **seen.rest, "key": seen.key}

    def made(target: Outputs | None, batch: Batch) -> tuple[Terms, PyTree]:
      mine = _logits_alone(logits)
      return self.objective.apply(params, self.state, mine, target, batch, **hyper)

    if target is None or target.where is None:
      terms, state = made(target, own)
    else:
      terms, state = terms_where_answered(made, target, own)
    if jax.tree.leaves(state):
      raise ValueError("the objective's state has become one with arrays, in chunks of tokens.")
    beside = {name: term for name, term in terms.items() if _looks_at_no_token(term)}
    said = right(logits, own)
    if said is not None:
      terms = {**terms, _RIGHT: dataclasses.replace(said, weight=0.0)}
    return {
      name: self._counted(name, term, seen.fresh)
      for name, term in terms.items()
      if name not in beside
    }, beside

  def sums(self, learnt: Any, seen: _Seen, logits: jax.Array) -> Scalars:
    """Each term's sum over a chunk."""
    terms = self(learnt, seen, logits)[0]
    return {name: summed(name, term, seen.batch).total for name, term in terms.items()}

  def _counted(self, name: str, term: Any, fresh: jax.Array) -> Term:
    """The term without the positions that were in the chunk before."""
    shape = (self.chunks.batch, self.chunks.size)
    axis = getattr(term, "axis", "tokens, summed already")
    if axis != "batch" or jnp.shape(term.values) != shape:
      over = f"the axis {axis!r}" if axis != "batch" else f"values {list(jnp.shape(term.values))}"
      raise ValueError(
        f"term {name!r} has {over}; in chunks of tokens a term has one value for each, "
        f"{list(shape)} here, since nothing else adds up: take it outside, "
        "recipes.combine(train.in_chunks(...), it)."
      )
    where = jnp.ones(shape[:1]) if term.where is None else jnp.asarray(term.where)
    where = jnp.expand_dims(where, range(where.ndim, 2))
    return dataclasses.replace(term, where=jnp.where(fresh[None], where, jnp.zeros_like(where)))

  def of_no_logits(
    self, learnt: Any, given: _Given, raw: Any
  ) -> tuple[Scalars, dict[str, Term], Scalars, jax.Array]:
    """Of logits that are all 0: the weights, what looks at no token, the counts, and what counts.

    The last is ``[B, L]``, True where the mask of some term is not 0.
    """
    zeros = jnp.zeros(raw.shape, raw.dtype)
    terms, beside = self(learnt, self.seen(given, 0), zeros)

    def count(i: Any) -> tuple[Scalars, jax.Array]:
      seen = self.seen(given, i)
      found = self(jax.lax.stop_gradient(learnt), seen, zeros)[0]
      masks = {name: mask_of(name, term, seen.batch) for name, term in found.items()}
      none = jnp.zeros((self.chunks.batch, self.chunks.size), bool)
      where = functools.reduce(jnp.logical_or, [mask != 0 for mask in masks.values()], none)
      return {name: jnp.sum(mask) for name, mask in masks.items()}, where

    counts, where = jax.lax.map(count, jnp.arange(self.chunks.count))
    counts = {name: jax.lax.stop_gradient(jnp.sum(each)) for name, each in counts.items()}
    weights = {name: jnp.asarray(terms[name].weight, one.dtype) for name, one in counts.items()}
    return weights, beside, counts, self.chunks.joined(where)


def _looks_at_no_token(term: Any) -> bool:
  return isinstance(term, Term) and term.axis == "parameters"


@dataclasses.dataclass(frozen=True, eq=False)
class _Sums:
  """Sums of the terms over all chunks, with a gradient of their own.

  Attributes:
    terms: those of a chunk.
    head: the student's; None where hidden states are its logits.
    backward: as `in_chunks` takes it.
  """

  terms: _Terms
  head: Head | None
  backward: str

  def __call__(self, *args: Any) -> Scalars:
    """Sums of ``(learnt, hidden, kernel, given, share)``; the last is the loss's slope by each."""
    totals = jax.custom_vjp(self.forward_alone)
    totals.defvjp(self.forward, self.pulled)
    made: Scalars = totals(*args)
    return made

  def forward_alone(
    self, learnt: Any, hidden: jax.Array, kernel: Any, given: Any, share: Scalars
  ) -> Scalars:
    """The sums, where nobody asks for a gradient: one product for each network."""
    of_chunk = _in_turn(
      lambda learnt, hidden, kernel, seen: self.of_chunk(learnt, self.product(hidden, kernel), seen)
    )

    def body(i: Any, totals: Scalars) -> Scalars:
      part = self.terms.chunks.cut(hidden, i, given.order)
      more = of_chunk(learnt, part, kernel, self.terms.seen(given, i))
      return jax.tree.map(jnp.add, totals, more)

    return self.over(given, body, jax.tree.map(jnp.zeros_like, share))

  def forward(self, *args: Any) -> tuple[Scalars, Any]:
    """The sums, and what the backward pass needs."""
    if self.backward == "again":
      return self.forward_alone(*args), args
    share = args[-1]
    totals, gradients = self.gradients(*args)
    return totals, (gradients, share)

  def pulled(self, kept: Any, slopes: Scalars) -> tuple[Any, ...]:
    """Gradients of ``(learnt, hidden, kernel, given, share)``, the last two of which have none."""
    if self.backward == "again":
      learnt, hidden, kernel, given, _ = kept
      _, gradients = self.gradients(learnt, hidden, kernel, given, slopes)
    else:
      gradients, share = kept
      by = _common_factor(slopes, share)
      gradients = jax.tree.map(lambda g: g * by.astype(g.dtype), gradients)
    return (*gradients, None, None)

  def over(self, given: _Given, body: Callable[[Any, Any], Any], start: Any) -> Any:
    """Goes over the chunks, ``body(i, carry) -> carry``, to the last in which something counts."""
    if given.turns is None:
      return jax.lax.fori_loop(0, self.terms.chunks.count, body, start)
    return jax.lax.fori_loop(jnp.zeros_like(given.turns), given.turns, body, start)

  def of_chunk(self, learnt: Any, product: jax.Array, seen: _Seen) -> Scalars:
    """The sums of a chunk, of what the kernel made of its hidden states."""
    logits = product if self.head is None else self.head.finish(product, learnt[2])
    return self.terms.sums(learnt, seen, logits)

  def product(self, hidden: jax.Array, kernel: Any) -> jax.Array:
    """What the kernel makes of a chunk's hidden states."""
    head = None if self.head is None else dataclasses.replace(self.head, kernel=kernel)
    return _product_of(head)(hidden)

  def pulled_of_chunk(
    self, learnt: Any, hidden: jax.Array, kernel: Any, seen: _Seen, slopes: Scalars
  ) -> tuple[Scalars, Any, jax.Array, Any]:
    """The sums of a chunk, and its part of each gradient."""
    product = self.product(hidden, kernel)
    more, pull = jax.vjp(lambda own, made: self.of_chunk(own, made, seen), learnt, product)
    of_learnt, by_product = pull(slopes)
    if self.head is None:
      return more, of_learnt, by_product, None
    pulled = _pulled_back(hidden, kernel, by_product, transposed=self.head.transposed)
    return more, of_learnt, *pulled

  def gradients(
    self, learnt: Any, hidden: jax.Array, kernel: Any, given: _Given, slopes: Scalars
  ) -> tuple[Scalars, tuple[Any, jax.Array, Any]]:
    """The sums, and the gradient of Σ slope · sum by ``(learnt, hidden, kernel)``."""
    chunks, order = self.terms.chunks, given.order
    pulled_of_chunk = _in_turn(self.pulled_of_chunk)

    def body(i: Any, carry: Any) -> Any:
      totals, (by_learnt, by_hidden, by_kernel) = carry
      seen, part = self.terms.seen(given, i), chunks.cut(hidden, i, order)
      more, *parts = pulled_of_chunk(learnt, part, kernel, seen, slopes)
      of_learnt, of_hidden, of_kernel = parts
      totals = jax.tree.map(jnp.add, totals, more)
      by_learnt, by_kernel = jax.tree.map(
        lambda sum, g: sum + g.astype(sum.dtype), (by_learnt, by_kernel), (of_learnt, of_kernel)
      )
      return totals, (by_learnt, chunks.add(by_hidden, of_hidden, i, order), by_kernel)

    # In float32 under a head in bfloat16 too: of many chunks' gradients the later ones would be
    # rounded away. Each position's own comes once, and is as its hidden state.
    def zeros(leaf: Any) -> jax.Array:
      return jnp.zeros(jnp.shape(leaf), compute_dtype(leaf))

    start = (jax.tree.map(zeros, learnt), jnp.zeros_like(hidden), jax.tree.map(zeros, kernel))
    totals, made = self.over(given, body, (jax.tree.map(jnp.zeros_like, slopes), start))
    return totals, jax.tree.map(
      lambda g, leaf: g.astype(leaf.dtype), made, (learnt, hidden, kernel)
    )


def _in_turn(function: Callable[..., Any]) -> Callable[..., Any]:
  """The function, of arrays; under vmap its calls come one after another in a loop.

  So there are the logits of one student at any time. What none of them has of its own (the
  teacher's logits) is an argument without their axis, made once.
  """
  made: Callable[..., Any] = jax.custom_batching.sequential_vmap(function)
  return made


def _pulled_back(
  hidden: jax.Array, kernel: jax.Array, by_product: jax.Array, *, transposed: bool
) -> tuple[jax.Array, jax.Array]:
  """The gradients of `Head.product`: by ``hidden``, and by the kernel in float32."""
  dtype = by_product.dtype
  # In the dtype of the forward product, as backpropagation through it has it.
  slope, kernel = by_product.astype(hidden.dtype), kernel.astype(hidden.dtype)
  over = ((2,), (0,)) if transposed else ((2,), (1,))
  of_hidden = jax.lax.dot_general(slope, kernel, (over, ((), ())), preferred_element_type=dtype)
  flat = [x.reshape(-1, x.shape[-1]) for x in (hidden, slope)]
  first, second = reversed(flat) if transposed else flat
  of_kernel = jax.lax.dot_general(
    first, second, (((0,), (0,)), ((), ())), preferred_element_type=dtype
  )
  return of_hidden.astype(hidden.dtype), of_kernel


def _common_factor(slopes: Scalars, share: Scalars) -> jax.Array:
  """By what the loss's gradient was multiplied; NaN where the terms' were by different numbers."""
  found = jnp.stack([slopes[name] for name in share])
  known = jnp.stack([share[name] for name in share])
  size = jnp.sum(jnp.square(known))
  factor = jnp.sum(found * known) / jnp.where(size == 0, 1, size)
  apart = jnp.max(jnp.abs(found - factor * known))
  same = apart <= 1e-3 * jnp.max(jnp.abs(found))
  return jnp.where(same, factor, jnp.nan)
