"""An objective in chunks of tokens: the loss of a large vocabulary without its logits.

At 8,192 tokens and 128,256 words, float32 logits take 4.2 GB, and so does their gradient, for
either network. But an objective adds up over tokens, by masks that depend on the batch alone. So it
is run, whatever it is, on a few positions at a time, whose logits are made of ``hidden`` and
``head`` and thrown away. Its terms come out as sums (`Summed`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxdistill import _check
from jaxdistill._chunks import Chunks
from jaxdistill.train._answered import terms_where_answered
from jaxdistill.train._step import summed
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


def in_chunks(
  objective: Objective | ObjectiveFunction,
  *,
  tokens_at_once: int = 512,
  backward: Literal["kept", "again"] = "kept",
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
  - The teacher and the batch get no gradient.

  Args:
    objective: an `Objective` or a bare function of logits.
    tokens_at_once: how many tokens a chunk has, of all examples together; with B examples it is
      rounded up to a multiple of B. 512 keeps matrix units busy, and at 128,256 words a chunk's
      logits take 0.26 GB; 1,024 may be faster on an accelerator with the memory for it.
    backward: ``"kept"``: gradients are made in the forward pass, where the logits are, which is
      least work: four products with a head's kernel. They are those of the loss; of its terms one
      by one there are none (NaN). ``"again"``: logits are made again in the backward pass: six
      products, less memory between the two passes, and every term's own gradient.

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
  _check.whole("tokens_at_once", tokens_at_once)
  if backward not in ("kept", "again"):
    raise ValueError(f"backward={_check.show(backward)} must be 'kept' or 'again'.")
  made = as_objective(objective)
  chunked = _InChunks(made, tokens_at_once, backward)
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
    given = (*seen, key, rest)
    product = _product_of(head)
    raw = jax.eval_shape(lambda: product(chunks.cut(hidden, 0)))
    # Of logits that are all 0: weights and masks say nothing of them, and the compiler drops what
    # is computed of them. Compiled by itself where nothing else is, for that very reason.
    weights, beside, counts = jax.jit(terms.of_no_logits, static_argnums=2)(learnt, given, raw)
    over = batch.counts or {}
    share = {
      name: jax.lax.stop_gradient(weights[name]).astype(count.dtype)
      / (jnp.where((whole := over.get(name, count)) == 0, 1, whole)).astype(count.dtype)
      for name, count in counts.items()
    }
    sums = _Sums(terms, head, self.backward)
    totals = sums(learnt, hidden, None if head is None else head.kernel, given, share)
    found: Terms = {
      name: Summed(total, counts[name], weights[name], together=self.backward == "kept")
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

  def __call__(
    self, learnt: Any, given: Any, i: Any, logits: jax.Array
  ) -> tuple[dict[str, Any], dict[str, Term]]:
    """Of the i-th chunk: what is summed over its tokens, and what looks at none of them."""
    params, numbers, _ = learnt
    teacher, batch, key, rest = given
    own = self.chunks.cut(batch, i)
    hyper = {**self.fixed, **numbers, **rest, "key": jax.random.fold_in(key, i)}

    def made(target: Outputs | None, batch: Batch) -> tuple[Terms, PyTree]:
      mine = _logits_alone(logits)
      return self.objective.apply(params, self.state, mine, target, batch, **hyper)

    target = None if teacher is None else self._taught(teacher, i)
    if target is None or target.where is None:
      terms, state = made(target, own)
    else:
      terms, state = terms_where_answered(made, target, own)
    if jax.tree.leaves(state):
      raise ValueError("the objective's state has become one with arrays, in chunks of tokens.")
    beside = {name: term for name, term in terms.items() if _looks_at_no_token(term)}
    fresh = self.chunks.fresh(i)
    return {
      name: summed(name, self._counted(name, term, fresh), own)
      for name, term in terms.items()
      if name not in beside
    }, beside

  def _taught(self, teacher: Outputs, i: Any) -> Outputs:
    part = self.chunks.cut((teacher.logits, teacher.hidden), i)
    logits = part[0] if teacher.head is None else teacher.head(part[1])
    return dataclasses.replace(_logits_alone(logits), where=teacher.where)

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
    self, learnt: Any, given: Any, raw: Any
  ) -> tuple[Scalars, dict[str, Term], Scalars]:
    """Of logits that are all 0: the weights, what looks at no token, and the counts."""
    zeros = jnp.zeros(raw.shape, raw.dtype)
    terms, beside = self(learnt, given, 0, zeros)

    def count(i: Any) -> Scalars:
      still = jax.lax.stop_gradient(learnt)
      return {name: one.count for name, one in self(still, given, i, zeros)[0].items()}

    counts = jax.lax.map(count, jnp.arange(self.chunks.count))
    weights = {name: jnp.asarray(one.weight, one.count.dtype) for name, one in terms.items()}
    return weights, beside, {name: jnp.sum(each) for name, each in counts.items()}


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

    def body(totals: Scalars, i: Any) -> tuple[Scalars, None]:
      more = self.of_chunk(learnt, self.product(hidden, kernel, i), given, i)
      return jax.tree.map(jnp.add, totals, more), None

    zeros = jax.tree.map(jnp.zeros_like, share)
    return jax.lax.scan(body, zeros, jnp.arange(self.terms.chunks.count))[0]

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

  def of_chunk(self, learnt: Any, product: jax.Array, given: Any, i: Any) -> Scalars:
    """The sums of a chunk, of what the kernel made of its hidden states."""
    logits = product if self.head is None else self.head.finish(product, learnt[2])
    return {name: one.total for name, one in self.terms(learnt, given, i, logits)[0].items()}

  def product(self, hidden: jax.Array, kernel: Any, i: Any) -> jax.Array:
    """What the kernel makes of a chunk's hidden states."""
    head = None if self.head is None else dataclasses.replace(self.head, kernel=kernel)
    return _product_of(head)(self.terms.chunks.cut(hidden, i))

  def gradients(
    self, learnt: Any, hidden: jax.Array, kernel: Any, given: Any, slopes: Scalars
  ) -> tuple[Scalars, tuple[Any, jax.Array, Any]]:
    """The sums, and the gradient of Σ slope · sum by ``(learnt, hidden, kernel)``."""
    chunks = self.terms.chunks

    def body(carry: Any, i: Any) -> tuple[Any, None]:
      totals, (by_learnt, by_hidden, by_kernel) = carry
      product = self.product(hidden, kernel, i)
      more, pull = jax.vjp(lambda own, made: self.of_chunk(own, made, given, i), learnt, product)
      mine, by_product = pull(slopes)
      totals = jax.tree.map(jnp.add, totals, more)
      by_learnt = jax.tree.map(lambda sum, g: sum + g.astype(sum.dtype), by_learnt, mine)
      if self.head is not None:
        of_hidden, of_kernel = _pulled_back(
          chunks.cut(hidden, i), kernel, by_product, transposed=self.head.transposed
        )
        by_kernel = by_kernel + of_kernel
      else:
        of_hidden = by_product
      return (totals, (by_learnt, chunks.add(by_hidden, of_hidden, i), by_kernel)), None

    # In float32 under a head in bfloat16 too: of many chunks' gradients the later ones would be
    # rounded away. Each position's own comes once, and is as its hidden state.
    def zeros(leaf: Any) -> jax.Array:
      return jnp.zeros(jnp.shape(leaf), compute_dtype(leaf))

    start = (jax.tree.map(zeros, learnt), jnp.zeros_like(hidden), jax.tree.map(zeros, kernel))
    begin = (jax.tree.map(jnp.zeros_like, slopes), start)
    (totals, made), _ = jax.lax.scan(body, begin, jnp.arange(chunks.count))
    return totals, jax.tree.map(
      lambda g, leaf: g.astype(leaf.dtype), made, (learnt, hidden, kernel)
    )


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
