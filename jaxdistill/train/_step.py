"""The train step: ``(state, teacher, batch) -> (state, sums)``, pure.

It knows nothing about devices, files or loops; `jaxdistill.train.fit` compiles and drives it.
`reduce_terms` makes the loss of an objective's terms: averages are sums until the end, over the
global batch, with masks that cannot leak.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxdistill._check import show, whole
from jaxdistill.teachers import decay_of
from jaxdistill.train import _optax
from jaxdistill.train._answered import terms_where_answered
from jaxdistill.train._frozen import hold, without_moving
from jaxdistill.train._optax import Transformation
from jaxdistill.train._state import (
  State,
  latest_variables,
  student_variables,
  teacher_now,
  with_what_is_there,
)
from jaxdistill.types import (
  Batch,
  Network,
  Objective,
  ObjectiveFunction,
  Outputs,
  Summed,
  Teacher,
  Term,
  Terms,
  Transform,
  as_objective,
  compute_dtype,
  present,
  with_logits,
)

__all__ = ["RESERVED", "counts_of", "make_step", "mask_of", "reduce_terms", "right", "summed"]

PyTree = Any
# What a line of the log says beside the terms.
RESERVED = {"loss", "accuracy", "step", "epoch", "examples_per_second"}


def _resolve(hyper: Mapping[str, Any], objective: Objective, step: jax.Array) -> dict[str, Any]:
  unknown = sorted(set(hyper) - set(objective.hyper))
  if unknown:
    raise ValueError(
      f"hyper has {unknown}, which the objective does not take; it takes {sorted(objective.hyper)}."
    )
  scheduled = {name: value for name, value in objective.hyper.items() if callable(value)}
  given = {**scheduled, **hyper}
  return {name: value(step) if callable(value) else value for name, value in given.items()}


def make_step(
  student: Network,
  objective: Objective | ObjectiveFunction,
  optimizer: Transformation,
  *,
  hyper: Mapping[str, Any] | None = None,
  axis_name: str | None = None,
  transform: Transform | None = None,
  accumulate: int = 1,
  unroll: bool = False,
  average: float | None = None,
) -> Callable[[State, Teacher | None, Batch], tuple[State, dict[str, Any]]]:
  """Builds the pure train step.

  Args:
    student: the network to train.
    objective: an `Objective` or a bare function.
    optimizer: an optax optimiser, as given to `train.init_state`. One that takes more than the
      gradient gets it (``value``, ``grad``, ``value_fn``: the loss, over all devices), and one that
      wants some terms' gradients apart (`train.TermsApart`) gets them from the same pass forward.
    hyper: values of the objective's keywords in place of its own: numbers, arrays, or schedules of
      the step; they may be traced, as a sweep's are.
    axis_name: the axis to sum over under `pmap`.
    transform: ``(key, batch) -> batch``, before both networks (see `jaxdistill.data.transforms`).
    accumulate: into how many micro-batches a batch is cut, to need less memory. The gradient is the
      whole batch's: the terms' denominators are known before the first micro-batch. BatchNorm and
      losses that relate examples see the micro-batch.
    unroll: micro-batches one after another in the program instead of a loop, in which XLA computes
      convolutions slowly on a CPU.
    average: the decay of a moving average of the deployed variables, ``min(average, (1 + step) /
      (10 + step))`` so that the first steps do not weigh on it; None for none.

  Returns:
    ``step(state, teacher, batch) -> (state, sums)``. ``teacher`` is None for training without one,
    and the one that the state was made for where that is a moving average of the student;
    when a batch brings ``batch.teacher`` along, that is used and the teacher is not run; where that
    has a mask ``where``, the examples outside of it are padding to the terms that look at the
    teacher, and count in the others. ``sums``
    maps each term, ``"loss"`` and (for integer labels, where the student is what is deployed)
    ``"accuracy"`` to ``(sum, count)``.

  Raises:
    ValueError: ``accumulate`` or ``average`` is out of range; and at trace time, ``hyper`` names a
      keyword that the objective does not take, or the batch does not divide by ``accumulate``.
  """
  return _Step(
    student=student,
    objective=as_objective(objective),
    optimizer=optimizer,
    hyper=dict(hyper or {}),
    axis_name=axis_name,
    transform=transform,
    accumulate=accumulate,
    unroll=unroll,
    average=average,
  )


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
  """What `make_step` returns; calling it is the step."""

  student: Network
  objective: Objective
  optimizer: Transformation
  hyper: dict[str, Any]
  axis_name: str | None
  transform: Transform | None
  accumulate: int
  unroll: bool
  average: float | None

  def __post_init__(self) -> None:
    whole("accumulate", self.accumulate)
    if self.average is not None and not 0 <= self.average < 1:
      raise ValueError(f"average={self.average} must be None or a decay in [0, 1), 0.999 say.")

  def __call__(
    self, state: State, teacher: Teacher | None, batch: Batch
  ) -> tuple[State, dict[str, Any]]:
    # The run's key stays as it is and the step's number is folded in: a run that is resumed at step
    # n draws what it would have drawn, and nothing has to be remembered but n.
    step_key = jax.random.fold_in(state.key, state.step)
    if self.axis_name is not None:
      step_key = jax.random.fold_in(step_key, jax.lax.axis_index(self.axis_name))
    student_key, objective_key, transform_key = jax.random.split(step_key, 3)
    if self.transform is not None:
      batch = _transformed(self.transform(transform_key, batch), batch)
    trained = {"student": state.params, "objective": state.objective_params}
    # What the optimiser never moves is frozen with the statistics beside it.
    student, held = without_moving(self.student, self.optimizer, trained, state.model_state)
    pass_ = _Pass(
      student=student,
      trained=trained,
      states=(state.model_state, state.objective_state),
      teacher=teacher_now(teacher, self.student, state.teacher),
      batch=batch,
      keys=(student_key, objective_key),
      keywords=_resolve(self.hyper, self.objective, state.step),
      groups=_optax.term_groups(state.opt_state),
    )
    if self.accumulate == 1:
      # Outside of what is differentiated: the teacher's activations need not be kept for a backward
      # pass that would be stopped anyway.
      target = self.target(pass_)
      pass_ = self.counted(pass_, target)
      parts, states, sums = self.gradients(pass_, target)
      again = lambda trained: self.loss_again(trained, pass_, target)  # noqa: E731
    else:
      parts, states, sums = self.accumulated(pass_)
      again = _not_in_parts
    trained, opt_state = _optax.update(
      self.optimizer, parts, state.opt_state, trained, value=sums["loss"][0], loss=again
    )
    new_state = State(
      step=state.step + 1,
      params=trained["student"],
      model_state=hold(states[0], state.model_state, held),
      objective_params=trained["objective"],
      objective_state=states[1],
      opt_state=opt_state,
      key=state.key,
      average=state.average,
      teacher=state.teacher,
    )
    if self.average is not None:
      latest = latest_variables(new_state, self.objective)
      average = _moved(state.average, latest, state.step, self.average, settled=10)
      new_state = dataclasses.replace(new_state, average=average)
    decay = decay_of(teacher)
    if decay is not None:
      decay = decay(state.step) if callable(decay) else decay
      taught = _moved(state.teacher, student_variables(new_state), state.step, decay, settled=2)
      new_state = dataclasses.replace(new_state, teacher=taught)
    return new_state, sums

  def forward(self, trained: PyTree, at: _Pass, target: Outputs | None) -> tuple[Any, Any, Any]:
    """The terms, the states after them, and how right the student is if it is what is deployed."""
    model_state, objective_state = at.states
    outputs, updated = at.student.apply(
      {"params": trained["student"], **model_state}, at.batch.inputs, train=True, key=at.keys[0]
    )

    def made(target: Outputs | None, batch: Batch) -> tuple[Terms, PyTree]:
      seen = _without_padding(outputs, batch), _without_padding(target, batch)
      with with_what_is_there(*seen):
        found = self.objective.apply(
          trained["objective"], objective_state, *seen, batch, key=at.keys[1], **at.keywords
        )
      return _checked(found, objective_state)

    if target is None or target.where is None:
      terms, remembered = made(target, at.batch)
    else:
      terms, remembered = terms_where_answered(made, target, at.batch)
    said = _progress(outputs, terms, at.batch) if self.objective.deployed is None else None
    return terms, ({**model_state, **updated}, remembered), said

  def target(self, at: _Pass) -> Outputs | None:
    if at.batch.teacher is not None or at.teacher is None:
      return at.batch.teacher
    return at.teacher(at.batch)

  def counted(self, at: _Pass, target: Outputs | None) -> _Pass:
    """The same, told the counts of all devices, where terms are summed already under `pmap`.

    Those are divided where their gradients are made.
    """

    def terms() -> dict[str, Any]:
      return self.forward(at.trained, at, target)[0]

    if self.axis_name is None:
      return at
    if not any(isinstance(term, Summed) for term in jax.eval_shape(terms).values()):
      return at
    counts = _counts(reduce_terms(terms(), at.batch, axis_name=self.axis_name)[1])
    return dataclasses.replace(at, batch=dataclasses.replace(at.batch, counts=counts))

  def losses(
    self, trained: PyTree, at: _Pass, target: Outputs | None
  ) -> tuple[list[jax.Array], Any]:
    """This device's share of each group's loss; the states after it, and sums."""
    terms, states, said = self.forward(trained, at, target)
    together = [n for n, term in terms.items() if isinstance(term, Summed) and term.together]
    if at.groups and together:
      raise ValueError(
        f"the optimizer wants some terms' gradients apart, and those of {together} are made as one "
        'in chunks of tokens: give it train.in_chunks(objective, backward="again").'
      )
    reduced = [
      reduce_terms(some, at.batch, axis_name=self.axis_name)
      for some in _optax.grouped_terms(terms, at.groups)
    ]
    sums = {name: both for _, each in reduced for name, both in each.items()}
    sums = {name: sums[name] for name in terms}
    if said is not None:
      sums |= reduce_terms({"accuracy": said}, at.batch, axis_name=self.axis_name)[1]
    return [loss for loss, _ in reduced], (states, sums)

  def loss_again(self, trained: PyTree, at: _Pass, target: Outputs | None) -> jax.Array:
    """The loss of the same batch, with the same dropout, at other parameters: for a line search."""
    if self.axis_name is None:
      return _added(self.losses(trained, at, target)[0])
    # Each device has a copy of the parameters, and to differentiate is its own affair: of a sum
    # over devices it would get as many times its own share. The mean over the copies, whose value
    # is the parameters to the bit, makes of those the gradient of the whole.
    mean = jax.lax.pmean(trained, self.axis_name)
    still = jax.lax.stop_gradient
    trained = jax.tree.map(lambda p, m: still(p) + (m - still(m)), trained, mean)
    return jax.lax.psum(_added(self.losses(trained, at, target)[0]), self.axis_name)

  def gradients(
    self, at: _Pass, target: Outputs | None
  ) -> tuple[list[PyTree], PyTree, dict[str, Any]]:
    """The gradients of this batch's share of the loss, the states after it, and its sums.

    There is one gradient, but for an optimiser that wants some terms' apart: then one of each group
    of terms, from one pass forward and a pass back for each.
    """

    def share(trained: PyTree) -> tuple[list[jax.Array], Any]:
      each, rest = self.losses(trained, at, target)
      _check_reached(each, trained)
      return each, rest

    each, back, (states, sums) = jax.vjp(share, at.trained, has_aux=True)
    ones = [[jnp.full_like(x, i == j) for j, x in enumerate(each)] for i in range(len(each))]
    parts, loss = [back(one)[0] for one in ones], _added(each)
    # Under jit the batch is one global array, and its sums are global. Under pmap each device has
    # its share of the loss, divided by the global count already: gradients are summed.
    if self.axis_name is not None:
      parts, loss = jax.lax.psum((parts, loss), self.axis_name)
      states = _mean_over(self.axis_name, states)
    sums = {"loss": (loss, jnp.ones_like(loss)), **sums}
    return parts, _keep_dtypes(states, at.states), sums

  def accumulated(self, at: _Pass) -> tuple[list[PyTree], PyTree, dict[str, Any]]:
    """The same as `gradients` does, from micro-batches one after another.

    The mean of the micro-batches' means is not the mean of the batch where their masks differ: a
    micro-batch with few labels would weigh as much as one with many. So each term's count over the
    whole batch is known first, and every micro-batch adds its sum over that count.
    """
    parts = _micro_batches(at.batch, self.accumulate)
    numbers = jnp.arange(self.accumulate)
    keys = [jax.vmap(jax.random.fold_in, (None, 0))(key, numbers) for key in at.keys]

    def count(part: Batch) -> dict[str, jax.Array]:
      # Masks depend on the batch alone, so the compiler drops both networks from this program.
      mine = dataclasses.replace(at, batch=part)
      terms, _, _ = self.forward(at.trained, mine, self.target(mine))
      return _counts(reduce_terms(terms, part)[1])

    counts = jax.tree.map(lambda c: jnp.sum(c, axis=0), jax.lax.map(count, parts))
    if self.axis_name is not None:
      counts = jax.lax.psum(counts, self.axis_name)

    def body(carry: PyTree, item: PyTree) -> tuple[PyTree, Any]:
      gradients, states = carry
      part, its_keys = item
      part = dataclasses.replace(part, counts=counts)
      mine = dataclasses.replace(at, states=states, batch=part, keys=its_keys)
      more, states, sums = self.gradients(mine, self.target(mine))
      return (jax.tree.map(jnp.add, gradients, more), states), sums

    zeros = [jax.tree.map(jnp.zeros_like, at.trained)] * (len(at.groups) + 1)
    (gradients, states), sums = jax.lax.scan(
      body, (zeros, at.states), (parts, keys), unroll=self.accumulate if self.unroll else 1
    )
    sums = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), sums)
    known = {**counts, "loss": jnp.ones_like(sums["loss"][1])}
    return gradients, states, {**sums, **{name: (sums[name][0], c) for name, c in known.items()}}


def _added(losses: list[jax.Array]) -> jax.Array:
  dtype = compute_dtype(*losses)
  return functools.reduce(jnp.add, [loss.astype(dtype) for loss in losses])


def _counts(sums: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
  return {name: count for name, (_, count) in sums.items()}


def _without_padding(outputs: Outputs | None, batch: Batch) -> Outputs | None:
  """Outputs that are 0 wherever padding is, before a loss or a projector sees them.

  Their logits are there in any case: where nobody looks at them, the compiler leaves them out.
  """
  # Masking a term's values comes too late: behind a square or a product, the gradient of what was
  # left out is 0 times whatever padding held, and 0 * NaN is NaN.
  if outputs is None:
    return None
  values = {"logits": outputs.logits, "features": outputs.features, "hidden": outputs.hidden}
  there = jax.tree.map(lambda x: jnp.where(present(batch, x), x, jnp.zeros_like(x)), values)
  members: dict[str, Any] = {n: _without_padding(one, batch) for n, one in outputs.members.items()}
  return with_logits(dataclasses.replace(outputs, **there, members=members))


def _not_in_parts(trained: PyTree) -> jax.Array:
  raise ValueError(
    "it evaluates the loss again (a line search), which is of the whole batch, and the batch comes "
    "in parts: leave accumulate out, or take an optimizer without a line search."
  )


def _transformed(new: Any, old: Batch) -> Batch:
  """What a transform returned, if it is a batch of as many examples."""
  if not isinstance(new, Batch):
    raise TypeError(f"transform must return a Batch, got {show(new)}.")
  sizes = {leaf.shape[0] for leaf in jax.tree.leaves(dataclasses.replace(new, teacher=None))}
  if sizes != {old.weight.shape[0]}:
    raise ValueError(
      f"transform made a batch of {sorted(sizes)} examples of one of {old.weight.shape[0]}; it "
      "must keep their number (give those that do not count the weight 0)."
    )
  return new


def _check_reached(losses: Sequence[jax.Array], trained: PyTree) -> None:
  """Raises, while a gradient is traced, where all of it is 0: that trains nothing, and passes.

  What depends on a parameter is traced as the parameters are; what is cut off from them (a
  comparison, an integer, `jax.lax.stop_gradient`) is not.
  """
  kinds = {type(leaf) for leaf in jax.tree.leaves(trained)}
  if kinds and not any(type(loss) in kinds for loss in losses):
    raise ValueError(
      "no term of the objective has a gradient by what is trained: its values are constants, whole "
      "numbers, comparisons, or behind a stop_gradient. Make a term of the student's outputs."
    )


def _checked(made: Any, state: PyTree) -> tuple[Terms, PyTree]:
  """What an objective returned, if it is what an objective returns."""
  if not (isinstance(made, tuple) and len(made) == 2):
    raise TypeError(f"the objective's apply must return (terms, state), got {show(made)}.")
  terms, remembered = made
  if not isinstance(terms, Mapping) or not terms:
    raise TypeError(
      f"the objective must return {{name: Term}} with a term in it, got {show(terms)}."
    )
  for name, term in terms.items():
    if not isinstance(name, str) or not isinstance(term, Term | Summed):
      raise TypeError(
        f"the objective's term {name!r} is {show(term)}; it must be a Term under a name of text: "
        "Term(values), with values [B] that the step averages."
      )
  reserved = sorted(RESERVED & set(terms))
  if reserved:
    raise ValueError(f"a term is named {reserved}, which is the log's own; rename the term.")
  shapes = [jax.tree.map(jnp.shape, tree) for tree in (state, remembered)]
  if shapes[0] != shapes[1]:
    raise ValueError(
      f"the objective's state must keep its structure and shapes: it was {shapes[0]} and has "
      f"become {shapes[1]}."
    )
  return dict(terms), remembered


@dataclasses.dataclass(frozen=True)
class _Pass:
  """What one gradient is taken of."""

  student: Network
  trained: PyTree
  states: tuple[PyTree, PyTree]
  teacher: Teacher | None
  batch: Batch
  keys: Any
  keywords: dict[str, Any]
  groups: tuple[tuple[str, ...], ...]


def _micro_batches(batch: Batch, count: int) -> Batch:
  """Leaves ``[count, B / count, ...]``; every device keeps its own rows, so nothing moves."""
  size = batch.weight.shape[0]
  if size % count:
    raise ValueError(
      f"accumulate={count} does not divide the batch of {size} examples (each device's share, "
      "under pmap); take a batch size that is a multiple of it."
    )

  def cut(leaf: jax.Array) -> jax.Array:
    # Row i goes to micro-batch i % count: [B, ...] -> [B/count, count, ...], and count in front. A
    # device's rows, which lie side by side in B, stay side by side in B/count.
    return jnp.moveaxis(leaf.reshape(size // count, count, *leaf.shape[1:]), 1, 0)

  return jax.tree.map(cut, batch)


def _moved(average: PyTree, latest: PyTree, step: jax.Array, decay: Any, *, settled: int) -> PyTree:
  """The average moved towards the new variables; counters and the like are copied."""
  # a <- a + (1 - d) (w - a), with d = min(decay, (1 + t) / (settled + t)) at step t: the first
  # weights are random, and a decay of 0.999 would keep a third of them for a thousand steps.
  past = step.astype(jnp.float32)
  share = 1 - jnp.minimum(decay, (1 + past) / (settled + past))

  def move(old: jax.Array, new: jax.Array) -> jax.Array:
    if not jnp.issubdtype(new.dtype, jnp.inexact):
      return new
    return old + share.astype(new.dtype) * (new - old)

  moved: PyTree = jax.tree.map(move, average, latest)
  return moved


def _keep_dtypes(new: PyTree, old: PyTree) -> PyTree:
  """State keeps its dtype: Flax's BatchNorm starts in float32 and takes on its inputs' dtype."""
  return jax.tree.map(lambda n, o: n.astype(o.dtype), new, old)


def _mean_over(axis_name: str, tree: PyTree) -> PyTree:
  """Makes statistics that each device took of its share the same everywhere."""

  def mean(leaf: jax.Array) -> jax.Array:
    inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
    return jax.lax.pmean(leaf, axis_name) if inexact else leaf

  return jax.tree.map(mean, tree)


def _progress(outputs: Outputs, terms: Terms, batch: Batch) -> Term | Summed | None:
  """The training accuracy, of logits that are there, or as it was seen where they were."""
  done = [term for term in terms.values() if isinstance(term, Summed)]
  for term in done:
    if term.accuracy is not None:
      return Summed(*term.accuracy)
  # Those in chunks are never there as a whole.
  return right((outputs if done else with_logits(outputs)).logits, batch)


def right(logits: jax.Array | None, batch: Batch) -> Term | None:
  """Which labels the logits say, as a term: one argmax.

  Args:
    logits: ``[B, K]``, or ``[B, L, K]``.
    batch: gives the labels, and which are known.

  Returns:
    The term; None where there are no logits, or labels are no integers of their shape.

  >>> batch = Batch(None, jnp.array([1, 0]), jnp.ones(2), jnp.ones(2), None, None)
  >>> right(jnp.array([[0.0, 1.0], [0.0, 1.0]]), batch).values.tolist()
  [1.0, 0.0]
  """
  labels = batch.labels
  if logits is None or not jnp.issubdtype(labels.dtype, jnp.integer):
    return None
  known = batch.labelled  # [B], of sentences too
  if labels.shape != logits.shape[:-1] or known.shape != labels.shape[: known.ndim]:
    return None
  return Term((jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32), where=known)


def reduce_terms(
  terms: Mapping[str, Term | Summed], batch: Batch, *, axis_name: str | None = None
) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
  """Reduces an objective's terms to the loss, and to sums for the log.

  A term is ``weight * sum(where * values) / sum(where)`` over the global batch, and 0 when its
  mask is empty. Masked values cannot leak: they are replaced before they are multiplied, since
  ``inf * 0`` is NaN.

  Args:
    terms: the objective's terms.
    batch: the batch that they were computed on; gives the example weights. Where it is a part of
      another one, whose ``counts`` it has, the loss is its share of that one's.
    axis_name: the axis to sum over under `pmap`; the loss is then this device's share, whose
      gradients have to be summed over the axis too.

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
    one = term if isinstance(term, Summed) else summed(name, term, batch)
    total, count = one.total, one.count
    if batch.counts is not None and name in batch.counts:
      count = batch.counts[name]
    elif axis_name is not None:
      count = jax.lax.psum(count, axis_name)
    mean = total / jnp.where(count == 0, 1, count)  # nothing in the mask: 0, not 0/0
    loss = loss.astype(mean.dtype) + jnp.asarray(one.weight, mean.dtype) * mean
    if axis_name is not None:
      total = jax.lax.psum(total, axis_name)
    sums[name] = (total, count)
  return loss, sums


def counts_of(sums: Mapping[str, Any]) -> list[Any]:
  """How much counted in each term of what a step measured, ``{name: (sum, count)}``."""
  return [count for name, (_, count) in sums.items() if name not in ("loss", "accuracy")]


def summed(name: str, term: Term, batch: Batch) -> Summed:
  """A term's sums over a batch, or over a part of one.

  Args:
    name: its name, for messages.
    term: the term.
    batch: gives the example weights.

  Raises:
    TypeError, ValueError: as `reduce_terms` does.

  >>> batch = Batch(None, None, jnp.array([1.0, 0.0]), None, None, None)
  >>> one = summed("soft", Term(jnp.array([3.0, jnp.nan])), batch)
  >>> one.total.item(), one.count.item()
  (3.0, 1.0)
  """
  _check(name, term)
  values = jnp.asarray(term.values)
  values = values.astype(compute_dtype(values))
  mask = jax.lax.stop_gradient(mask_of(name, term, batch))
  # Replaced before it is multiplied: 0 * inf is NaN, in the value and again in the gradient.
  total = jnp.sum(jnp.where(mask == 0, 0, values) * mask)
  return Summed(total, jnp.sum(mask), term.weight)


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


def mask_of(name: str, term: Term, batch: Batch) -> jax.Array:
  """How much each of a term's values counts: its own mask times the batch's weights.

  Args:
    name: the term's, for messages.
    term: gives the mask, and what its values run over.
    batch: gives the example weights.

  Returns:
    An array of the values' shape, in the dtype in which they are summed.

  Raises:
    ValueError: a mask does not fit the values.

  >>> batch = Batch(None, None, jnp.array([1.0, 0.0]), None, None, None)
  >>> mask_of("soft", Term(jnp.ones((2, 2))), batch).tolist()
  [[1.0, 1.0], [0.0, 0.0]]
  """
  values = jnp.asarray(term.values)
  mask = jnp.ones(values.shape, compute_dtype(values))
  factors = [term.where] if term.where is not None else []
  if term.axis == "batch":
    weight = jnp.asarray(batch.weight)
    if weight.ndim > values.ndim > 0 and weight.shape[: values.ndim] == values.shape:
      # One value for each example of tokens: it counts as much as that of its tokens which counts
      # most, so that an example is left out if it is padding throughout.
      weight = jnp.max(weight, axis=tuple(range(values.ndim, weight.ndim)))
    factors.append(weight)
  for factor in factors:
    factor = jnp.asarray(factor)
    if factor.shape != values.shape[: factor.ndim]:
      raise ValueError(
        f"term {name!r} has values of shape {values.shape} and a mask of shape {factor.shape}; "
        "a mask has the leading axes of the values: name a layer with the positions of the "
        "batch's weights, or sum the values up for each example, [B]. If the values do not run "
        "over the batch, give the Term an axis of its own (axis='classes')."
      )
    factor = jnp.expand_dims(factor, range(factor.ndim, values.ndim))
    mask = mask * factor.astype(mask.dtype)
  return mask
