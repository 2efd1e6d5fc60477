"""Teachers of models: one, an ensemble, some of its classes, groups of them.

A `jaxdistill.Teacher` holds variables and a function of them. The functions here are values: two
that are made of the same network and ask the same are equal, so ``jit`` compiles for them once.
Variables stay leaves of the teacher, an argument of the program and never a closure of it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxdistill import _check, runs
from jaxdistill._compile import placed
from jaxdistill.data import tokenizers
from jaxdistill.data.tokenizers import Tokenizer
from jaxdistill.networks import int8_weights
from jaxdistill.teachers import _identity
from jaxdistill.teachers._foreign import OnHost
from jaxdistill.teachers._moving import decay_of
from jaxdistill.types import Batch, Model, Network, Outputs, Teacher, compute_dtype, with_logits

__all__ = [
  "RULES",
  "answered",
  "asked_on_host",
  "brought",
  "check_classes",
  "check_tokenizer",
  "class_numbers",
  "combine_logits",
  "ensemble",
  "frozen",
  "group_members",
  "grouped",
  "layers",
  "members_of",
  "networks_of",
  "repeated_classes",
  "restore",
  "subset",
  "tokenizer_of",
  "vocabulary",
  "with_networks",
]

PyTree = Any
RULES = ("mean_logits", "log_mean_probability", "mean_log_probability")


@dataclasses.dataclass(frozen=True)
class _Inference:
  """A network in inference mode, so that its BatchNorm runs on its running averages."""

  network: Network

  def __call__(self, variables: PyTree, batch: Batch) -> Outputs:
    return self.network.apply(variables, batch.inputs, train=False, key=None)[0]


def frozen(
  model: Model,
  *,
  dtype: Any = None,
  tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
) -> Teacher:
  """A network and its variables as a teacher: evaluated in inference mode, gradients stopped.

  Args:
    model: what `jaxdistill.fit` returned; or ``Model(network, variables)``.
    dtype: what its parameters are kept in, ``jnp.bfloat16`` for half of float32's memory, or
      ``"int8"`` for half of that, rounded by qwix (`jaxdistill.networks.int8_weights`, extra
      ``int8``); None as they are. Statistics keep theirs. What a network computes in is its own
      affair: most take the longer one of inputs and parameters,
      `jaxdistill.networks.mixed_precision` the one it is told.
    tokenizer: of a language model, the tokenizer whose tokens it was trained on: it is then refused
      to teach on tokens of another, which as large a vocabulary would not show; or the folder that
      a pretrained model was read from, with its ``tokenizer.json``. None does not ask.

  Returns:
    The teacher; its variables are the model's, no copy of them but for those of another dtype,
    which are converted where they lie, in parts where they lie in parts.

  Raises:
    TypeError: ``model`` is none, ``dtype`` no dtype of real numbers, or ``tokenizer`` none.
    ValueError: it holds the variables of several seeds; or none that could be in eight bits.
    FileNotFoundError: there is no tokenizer in the folder.
    MissingExtraError: ``dtype="int8"`` without qwix; a folder without the library ``tokenizers``.
  """
  if not isinstance(model, Model):
    raise TypeError(
      f"model={_check.show(model)} must be a Model: what fit returns, or Model(network, variables) "
      "with a network from networks.linen(module) or networks.nnx(model)."
    )
  if model.seeds not in (None, 1):
    raise ValueError(
      f"model holds {model.seeds} seeds of {model.network.name!r}: give one of model.unstack(), "
      "or teachers.ensemble(model.unstack())."
    )
  one, read = model.instance(0), {}
  if tokenizer is not None:
    read = {"tokenizer": _read_by(tokenizer).digest}
  if isinstance(dtype, str) and dtype == "int8":
    one, dtype = int8_weights(one), None
  variables = one.variables if dtype is None else _kept_in(dtype, one.variables)
  return Teacher(variables, _Inference(one.network), _asked("frozen", **read))


def _read_by(tokenizer: Any) -> Tokenizer:
  """The tokenizer that was given, or the one in a folder."""
  if isinstance(tokenizer, str | os.PathLike) and os.path.exists(tokenizer):
    return tokenizers.load(tokenizer)
  if not isinstance(tokenizer, Tokenizer):
    raise TypeError(
      f"tokenizer={_check.show(tokenizer)} must be one of data.tokenizers: utf8(), "
      "characters(...), load('tokenizer.json'); or a pretrained model's folder, which is there."
    )
  return tokenizer


def tokenizer_of(teacher: Teacher) -> str | None:
  """The digest of the tokenizer whose tokens a teacher reads; None where nobody said it.

  Args:
    teacher: a teacher; of one that is made of several, the first that says it.

  >>> tokenizer_of(Teacher({}, lambda v, batch: Outputs()))
  """

  def found(asked: Any) -> Any:
    if not isinstance(asked, Mapping):
      return None
    inside = (found(one) for one in asked.get("of", ()))
    return asked.get("tokenizer") or next(filter(None, inside), None)

  digest = found(_identity.asked_of(teacher))
  return digest if isinstance(digest, str) else None


def check_tokenizer(teacher: Teacher | None, read: str, name: str) -> None:
  """Raises where a teacher would read tokens of a tokenizer that is not its own.

  Its numbers would be finite, and mean nothing: token 17 is another text to it.

  Args:
    teacher: a teacher, or None.
    read: the digest of the tokenizer of what it shall read; empty where nobody knows.
    name: what that is, for the message.
  """
  theirs = None if teacher is None or not read else tokenizer_of(teacher)
  if theirs is not None and theirs != read:
    raise ValueError(
      f"teacher reads tokens of the tokenizer {theirs}, and {name!r} has those of {read}: the same "
      "number is another text to it, however large the vocabularies. Make the data of the "
      "teacher's own tokenizer (data.from_text), or take a teacher of this one; where both number "
      "their tokens alike, leave tokenizer= of teachers.frozen out."
    )


def _kept_in(dtype: Any, variables: PyTree) -> PyTree:
  """Variables whose parameters are of a dtype."""
  try:
    kind = jnp.dtype(dtype)
  except TypeError:
    kind = None
  if kind is None or not jnp.issubdtype(kind, jnp.floating):
    raise TypeError(
      f"dtype={_check.show(dtype)} must be of real numbers, jnp.bfloat16, or 'int8', or None."
    )
  if jax.dtypes.canonicalize_dtype(kind) != kind:
    raise ValueError(
      f"dtype={kind} is made float32 while JAX's 64 bits are off: jax.config.update("
      '"jax_enable_x64", True) before, or leave it out.'
    )

  def kept(leaf: Any) -> Any:
    found = getattr(leaf, "dtype", kind)
    if not jnp.issubdtype(found, jnp.floating) or found == kind:
      return leaf
    return leaf.update(dtype=kind) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf.astype(kind)

  if not isinstance(variables, Mapping) or "params" not in variables:
    return jax.tree.map(kept, variables)
  return {**variables, "params": jax.tree.map(kept, variables["params"])}


def _asked(kind: str, *of: Teacher, **what: Any) -> str:
  """What a teacher is asked for, so that `cached` can tell one from another."""
  inner = [_identity.asked_of(one) for one in of]
  return json.dumps({"kind": kind, **what, **({"of": inner} if of else {})})


def _teacher(name: str, given: Model | Teacher) -> Teacher:
  """A model frozen; a teacher as it is."""
  if isinstance(given, Model):
    return frozen(given)
  if not isinstance(given, Teacher):
    raise TypeError(
      f"{name}={_check.show(given)} must be a Model (what fit returns, or Model(network, "
      "variables)) or a Teacher."
    )
  if decay_of(given) is not None:
    raise ValueError(
      f"{name} is teachers.moving_average(), which is made of nothing yet: it teaches by itself, "
      "as teacher= of fit. Of one that was trained, take Model(student, fitted.state.teacher)."
    )
  return given


def members_of(teacher: Teacher) -> list[Model]:
  """The networks that a teacher is made of, as far as they are known.

  Args:
    teacher: a teacher.

  Returns:
    Their models; none for a teacher with a function of the user's own.
  """
  apply, variables = teacher.apply, teacher.variables
  if isinstance(apply, _Inference):
    return [Model(apply.network, variables)]
  if isinstance(apply, _Ensemble):
    each = [Teacher(v, a) for a, v in zip(apply.members, variables, strict=True)]
    return [model for one in each for model in members_of(one)]
  return (
    members_of(Teacher(variables, apply.of))
    if isinstance(apply, _Subset | _Grouped | _Vocabulary)
    else []
  )


def with_networks(teacher: Teacher, change: Callable[[str, Network], Network]) -> Teacher:
  """A teacher whose networks are others, of the same variables.

  Args:
    teacher: a teacher; a function of the user's own stays as it is.
    change: gives each network's place, with the path at which its variables begin in the teacher's:
      ``""``, or ``"0/"`` for the first member of an ensemble.
  """

  def changed(at: str, apply: Any) -> Any:
    if isinstance(apply, _Inference):
      return _Inference(change(at, apply.network))
    if isinstance(apply, _Ensemble):
      members = tuple(changed(f"{at}{m}/", one) for m, one in enumerate(apply.members))
      return dataclasses.replace(apply, members=members)
    if isinstance(apply, _Subset | _Grouped | _Vocabulary):
      return dataclasses.replace(apply, of=changed(at, apply.of))
    return apply

  return dataclasses.replace(teacher, apply=changed("", teacher.apply))


def networks_of(teacher: Teacher) -> list[tuple[str, Network]]:
  """The networks that a teacher is made of, as far as they are known.

  Args:
    teacher: a teacher.

  Returns:
    Each with the path at which its variables begin in the teacher's, see `with_networks`.
  """
  found: list[tuple[str, Network]] = []

  def note(at: str, network: Network) -> Network:
    found.append((at, network))
    return network

  with_networks(teacher, note)
  return found


def brought() -> Teacher:
  """A teacher without variables, whose outputs come along with the batches."""
  return Teacher({}, _brought)


def _brought(variables: Any, batch: Batch) -> Outputs:
  assert batch.teacher is not None
  return batch.teacher


def asked_on_host(teacher: Teacher) -> bool:
  """Whether a teacher, or one that it is made of, is another program's and cannot be compiled.

  Args:
    teacher: a teacher.
  """

  def on_host(apply: Any) -> bool:
    if isinstance(apply, _Ensemble):
      return any(map(on_host, apply.members))
    if isinstance(apply, _Subset | _Grouped | _Vocabulary):
      return on_host(apply.of)
    return isinstance(apply, OnHost)

  return on_host(teacher.apply)


def _answer(variables: PyTree, batch: Batch) -> Outputs:
  """What was said before, whatever the batch."""
  outputs: Outputs = variables
  return outputs


def answered(teacher: Teacher, batch: Batch) -> Teacher:
  """A teacher that can be compiled, for one batch.

  Args:
    teacher: a teacher.
    batch: leaves ``[B, ...]``.

  Returns:
    A teacher that says what another program's, which is asked now, says of this batch; others are
    given back as they are.
  """
  return Teacher(teacher(batch), _answer) if asked_on_host(teacher) else teacher


def combine_logits(
  logits: Sequence[jax.Array], *, rule: str = "mean_logits", weights: Any = None
) -> jax.Array:
  """Combines the members' logits into one teacher's, at temperature 1.

  The objective tempers the result: ``softmax(combined / temperature)``. That is another number
  than the mean of the members' tempered probabilities, and it is the one meant.

  - ``mean_logits``: ``sum_m w_m z_m``.
  - ``log_mean_probability``: ``log sum_m w_m softmax(z_m)``.
  - ``mean_log_probability``: ``sum_m w_m log_softmax(z_m)``.

  Args:
    logits: one array ``[..., K]`` for each member.
    rule: one of `RULES`.
    weights: ``[M]``, not negative; normalised to sum 1. Equal by default.

  Returns:
    ``[..., K]``, float32 at least.

  Raises:
    ValueError: there is no member, the rule is unknown, or the weights do not fit.

  >>> a, b = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.9, 0.1]]))
  >>> [round(float(p), 3) for p in jnp.exp(combine_logits([a, b], rule="log_mean_probability"))[0]]
  [0.7, 0.3]
  """
  if not logits:
    raise ValueError("logits is empty: an ensemble needs at least one member.")
  if rule not in RULES:
    raise ValueError(f"rule={rule!r} is unknown; it is one of {', '.join(RULES)}.")
  share = _shares(weights, len(logits))
  # A member without weight has no say at all: 0 * -inf would be NaN.
  kept = [z for z, w in zip(logits, share, strict=True) if w > 0]
  dtype = compute_dtype(*kept)
  stacked = jnp.stack([z.astype(dtype) for z in kept])
  column = jnp.asarray(share[share > 0], dtype).reshape((-1,) + (1,) * (stacked.ndim - 1))
  if rule == "mean_logits":
    return jnp.sum(column * stacked, axis=0)
  log_probability = jax.nn.log_softmax(stacked, axis=-1)
  if rule == "mean_log_probability":
    return jnp.sum(column * log_probability, axis=0)
  return jax.nn.logsumexp(log_probability, axis=0, b=column)


def _shares(weights: Any, members: int) -> np.ndarray:
  share = np.ones(members) if weights is None else np.asarray(weights, np.float64)
  if share.shape != (members,):
    raise ValueError(f"weights has shape {share.shape}, but there are {members} members.")
  if not np.all(np.isfinite(share)) or np.any(share < 0) or share.sum() <= 0:
    raise ValueError(f"weights={weights!r} must be finite, not negative, and not all zero.")
  return share / share.sum()


@flax.struct.dataclass
class _Heads:
  """The heads of several networks as one, which combines their logits wherever they are made.

  Attributes:
    each: of every member; None for one that has put out logits, which then are its ``hidden``.
    rule: how they are combined.
    shares: one for each.
  """

  each: tuple[Any, ...]
  rule: str = flax.struct.field(pytree_node=False)
  shares: tuple[float, ...] = flax.struct.field(pytree_node=False)

  def __call__(self, hidden: Sequence[Any]) -> jax.Array:
    """The combined logits, of each member's hidden states."""
    made = [h if head is None else head(h) for head, h in zip(self.each, hidden, strict=True)]
    return combine_logits(made, rule=self.rule, weights=self.shares)


@flax.struct.dataclass
class _Narrowed:
  """A head, and what is made of its logits."""

  head: Any
  then: Any = flax.struct.field(pytree_node=False)

  def __call__(self, hidden: Any) -> jax.Array:
    """Logits of hidden states."""
    narrowed: jax.Array = self.then.of_logits(self.head(hidden))
    return narrowed


def _narrowed(outputs: Outputs, then: Any) -> Outputs:
  """The outputs with other logits, made of theirs now, or wherever a head makes those."""
  if outputs.logits is None and outputs.head is not None:
    head, hidden = _Narrowed(outputs.head, then), outputs.hidden
    return Outputs(features=outputs.features, hidden=hidden, head=head, where=outputs.where)
  logits = then.of_logits(outputs.logits)
  return Outputs(logits=logits, features=outputs.features, where=outputs.where)


@dataclasses.dataclass(frozen=True)
class _Ensemble:
  members: tuple[Callable[[PyTree, Batch], Outputs], ...]
  rule: str
  shares: tuple[float, ...]

  def __call__(self, variables: Sequence[PyTree], batch: Batch) -> Outputs:
    outputs = [apply(v, batch) for apply, v in zip(self.members, variables, strict=True)]
    for m, one in enumerate(outputs):
      if not isinstance(one, Outputs):
        raise TypeError(f"members[{m}] must return Outputs, got {_check.show(one)}.")
    lacking = [m for m, one in enumerate(outputs) if one.logits is None and one.head is None]
    if lacking:
      raise ValueError(f"members {lacking} put out no logits, which an ensemble combines.")
    classes = [jax.eval_shape(with_logits, one).logits.shape[-1] for one in outputs]
    if len(set(classes)) > 1:
      raise ValueError(f"the members put out different class counts: {classes}.")
    features = {
      f"{m}/{name}": value for m, one in enumerate(outputs) for name, value in one.features.items()
    }
    # Of an example that one of them skipped, nobody knows what all of them would say.
    masks = [o.where for o in outputs if o.where is not None]
    where = jnp.prod(jnp.stack(masks), axis=0) if masks else None
    combined = _Heads(tuple(o.head for o in outputs), self.rule, self.shares)
    hidden = [o.logits if o.head is None else o.hidden for o in outputs]
    # As soon as there is a vocabulary, logits are made where somebody looks, of some tokens maybe.
    if any(o.logits is None for o in outputs):
      return Outputs(features=features, hidden=hidden, head=combined, where=where)
    logits = combine_logits([o.logits for o in outputs], rule=self.rule, weights=self.shares)
    return Outputs(logits=logits, features=features, where=where)


def ensemble(
  members: Sequence[Model | Teacher], *, rule: str = "mean_logits", weights: Any = None
) -> Teacher:
  """Any number of models, of any architectures, as one teacher.

  Args:
    members: models, or teachers; of a run over several seeds, ``fitted.unstack()``.
    rule: how logits are combined, see `combine_logits`.
    weights: ``[M]``; equal by default.

  Returns:
    A teacher whose variables are a list with one entry for each member; those of members on several
    devices are where the one of the most is. Features are named ``"<member>/<feature>"``, members
    counted from 0.

  Raises:
    TypeError: a member is neither a model nor a teacher.
    ValueError: there is no member, the rule is unknown, or the weights do not fit; and at trace
      time, when the members' class counts differ or one puts out no logits.
  """
  if isinstance(members, Model | Teacher) or not members:
    raise ValueError(
      "members is empty or no sequence; give at least one model or teacher: fitted.unstack(), say."
    )
  if rule not in RULES:
    raise ValueError(f"rule={rule!r} is unknown; it is one of {', '.join(RULES)}.")
  share = _shares(weights, len(members)).tolist()
  taught = [_teacher(f"members[{m}]", member) for m, member in enumerate(members)]
  read = sorted({digest for one in taught if (digest := tokenizer_of(one)) is not None})
  if len(read) > 1:
    raise ValueError(f"members read tokens of different tokenizers, {read}: give those of one.")
  apply = _Ensemble(tuple(one.apply for one in taught), rule, tuple(share))
  asked = _asked("ensemble", *taught, rule=rule, weights=share)
  variables = [one.variables for one in taught]
  return Teacher(placed(variables, variables), apply, asked)


@dataclasses.dataclass(frozen=True)
class _Subset:
  of: Callable[[PyTree, Batch], Outputs]
  classes: tuple[int, ...]

  def __call__(self, variables: PyTree, batch: Batch) -> Outputs:
    return _narrowed(self.of(variables, batch), self)

  def of_logits(self, logits: Any) -> jax.Array:
    chosen = np.array(self.classes)
    check_classes("classes", chosen, logits)
    return jnp.take(logits, chosen, axis=-1)


def subset(teacher: Model | Teacher, classes: Sequence[int] | np.ndarray) -> Teacher:
  """A teacher narrowed to some of its classes, and renormalised over them.

  The logits of the others are left out: a softmax over those that stay is the distribution given
  that one of them is right.

  Args:
    teacher: a model, or a teacher.
    classes: which of its classes, in the order of the student's.

  Returns:
    A teacher with logits ``[..., len(classes)]`` and the other's features.

  Raises:
    TypeError: ``teacher`` is neither a model nor a teacher.
    ValueError: ``classes`` is empty, has a class twice or a negative one; and at trace time, when
      the teacher has no such class.

  >>> from jaxdistill.types import make_batch
  >>> whole = Teacher({}, lambda v, batch: Outputs(logits=jnp.array([[1.0, 2.0, 3.0]])))
  >>> subset(whole, [2, 0])(make_batch(jnp.zeros((1, 1)))).logits.tolist()
  [[3.0, 1.0]]
  """
  chosen = class_numbers("classes", classes)
  if not chosen.size:
    raise ValueError("classes is empty: a teacher keeps at least one class.")
  twice = repeated_classes(chosen)
  if twice:
    raise ValueError(f"classes has {twice} more than once; name each class one time.")
  whole, numbers = _teacher("teacher", teacher), chosen.tolist()
  apply = _Subset(whole.apply, tuple(numbers))
  return Teacher(whole.variables, apply, _asked("subset", whole, classes=numbers))


@dataclasses.dataclass(frozen=True)
class _Grouped:
  of: Callable[[PyTree, Batch], Outputs]
  groups: tuple[tuple[int, ...], ...]
  every: int | None

  def __call__(self, variables: PyTree, batch: Batch) -> Outputs:
    return _narrowed(self.of(variables, batch), self)

  def of_logits(self, logits: Any) -> jax.Array:
    count = check_classes("groups", np.concatenate([*map(np.array, self.groups)]), logits)
    if self.every not in (None, count):
      raise ValueError(
        f"groups has {self.every} entries, but the teacher has {count} classes; give the group of "
        "each, or the classes of each group."
      )
    # Shorter groups are filled up with a class that is never right.
    widest = max(map(len, self.groups))
    index = np.array([[*g, *[count] * (widest - len(g))] for g in self.groups])
    logits = logits.astype(compute_dtype(logits))
    never = jnp.full((*logits.shape[:-1], 1), -jnp.inf, logits.dtype)
    gathered = jnp.take(jnp.concatenate([logits, never], axis=-1), index, axis=-1)
    return jax.nn.logsumexp(gathered, axis=-1)


def grouped(
  teacher: Model | Teacher, groups: Sequence[int] | Sequence[Sequence[int]] | np.ndarray
) -> Teacher:
  """A teacher of fine classes as one of coarse classes, combined at temperature 1.

  ``logit_g = logsumexp(logits of the classes in group g)``, so that a group's probability is the
  sum of its classes'. The objective tempers the result, as with an `ensemble`.

  Args:
    teacher: a model, or a teacher, with K classes.
    groups: ``[K]``, the group of each class, groups counted from 0; or the classes of each group.
      In the second form a class may be in no group: it is left out, and the rest renormalised.

  Returns:
    A teacher with a logit for each group, and the other's features.

  Raises:
    TypeError: ``teacher`` is neither a model nor a teacher.
    ValueError: there is no group, one is empty, a class is in two or negative; and at trace time,
      when the groups do not fit the teacher's classes.

  >>> from jaxdistill.types import make_batch
  >>> logits = jnp.log(jnp.array([[0.1, 0.2, 0.7]]))
  >>> fine = Teacher({}, lambda v, batch: Outputs(logits=logits))
  >>> coarse = jnp.exp(grouped(fine, [0, 1, 0])(make_batch(jnp.zeros((1, 1)))).logits)
  >>> [round(float(p), 3) for p in coarse[0]]
  [0.8, 0.2]
  """
  members, every = group_members(groups)
  fine, numbers = _teacher("teacher", teacher), [m.tolist() for m in members]
  apply = _Grouped(fine.apply, tuple(map(tuple, numbers)), every)
  return Teacher(fine.variables, apply, _asked("grouped", fine, groups=numbers))


@dataclasses.dataclass(frozen=True)
class _Vocabulary:
  of: Callable[[PyTree, Batch], Outputs]
  size: int

  def __call__(self, variables: PyTree, batch: Batch) -> Outputs:
    return _narrowed(self.of(variables, batch), self)

  def of_logits(self, logits: Any) -> jax.Array:
    check_classes("size", np.zeros(0, int), logits)
    missing = self.size - logits.shape[-1]
    if missing <= 0:
      return logits[..., : self.size]
    # Never 0.0, which is a probability like any other's.
    never = jnp.full((*logits.shape[:-1], missing), -jnp.inf, logits.dtype)
    return jnp.concatenate([logits, never], axis=-1)


def vocabulary(
  teacher: Model | Teacher,
  size: int,
  *,
  tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
) -> Teacher:
  """A language model whose vocabulary was padded to another size, as a teacher of this size.

  Vocabularies are padded to please a device (151,936 and 152,064 rows for the same 151,669
  tokens), so that two networks of one tokenizer differ in their last columns alone. Those beyond
  ``size`` are left out, and the rest renormalised; those that are missing get a logit of −∞: no
  probability, and no gradient. (A reverse KL of a student that gives them some is as large as
  floats go: train it with its own padding cut off.)

  The numbers must mean the same tokens, which no size can tell: with ``tokenizer`` it is asked.

  Args:
    teacher: a model, or a teacher, with logits ``[..., V]``.
    size: the student's vocabulary.
    tokenizer: the student's, or a folder that holds it. It must be the teacher's, where that is
      known (`frozen`).

  Returns:
    A teacher with logits ``[..., size]``, which are made where somebody looks at them, and the
    other's features.

  Raises:
    TypeError: ``teacher`` is neither a model nor a teacher, or ``size`` no integer.
    ValueError: ``size`` is below 1, or below the tokenizer's vocabulary, or the tokenizers differ:
      the message has both digests.

  >>> from jaxdistill.types import make_batch
  >>> three = Teacher({}, lambda v, batch: Outputs(logits=jnp.array([[1.0, 2.0, 3.0]])))
  >>> batch = make_batch(jnp.zeros((1, 1)))
  >>> [vocabulary(three, size)(batch).logits.tolist() for size in (2, 4)]
  [[[1.0, 2.0]], [[1.0, 2.0, 3.0, -inf]]]
  """
  _check.whole("size", size)
  whole = _teacher("teacher", teacher)
  if tokenizer is not None:
    read = _read_by(tokenizer)
    check_tokenizer(whole, read.digest, "the student's text")
    if size < read.vocabulary:
      raise ValueError(
        f"size={size} is below the {read.vocabulary} tokens of the tokenizer, of which the last "
        f"would be cut off: give at least {read.vocabulary}."
      )
  return Teacher(
    whole.variables, _Vocabulary(whole.apply, size), _asked("vocabulary", whole, size=size)
  )


def layers(variables: Mapping[str, PyTree], pairs: Mapping[str, str]) -> dict[str, PyTree]:
  """A teacher's layers as a student's beginning: the variables of a ``Model`` given to `fit`.

  Sanh et al., "DistilBERT, a distilled version of BERT", 2019, take every other layer.

  Args:
    variables: the teacher's, ``{"params": ..., "batch_stats": ..., ...}`` of one network.
    pairs: the student's path to the teacher's, of submodules or of single arrays, inside
      ``params``; what the other collections hold at the same path comes along. Where both paths
      begin with a collection's name (``"batch_stats/norm"``), that collection alone is meant.

  Returns:
    The collections with those subtrees alone, under the student's paths; arrays are not copied.

  Raises:
    ValueError: ``pairs`` or a path is empty, a path is not there (the message lists near ones),
      only one path of a pair names its collection, or two of the student's paths overlap.

  >>> large = {"params": {"encoder": {"Dense_3": {"bias": 1.0}}, "head": {"bias": 2.0}}}
  >>> layers(large, {"Dense_0": "encoder/Dense_3"})
  {'params': {'Dense_0': {'bias': 1.0}}}
  """
  texts = isinstance(pairs, Mapping) and all(isinstance(p, str) for i in pairs.items() for p in i)
  if not pairs or not texts:
    raise ValueError(f'pairs={_check.show(pairs)} must be {{"student path": "teacher path", ...}}.')
  if not isinstance(variables, Mapping):
    raise ValueError(
      f"variables={_check.show(variables)} must be the collections of one network, "
      '{"params": ...}; fitted.unstack() takes a run over seeds apart.'
    )
  flat = traverse_util.flatten_dict(variables)
  flat = {tuple(map(str, path)): leaf for path, leaf in flat.items()}
  found: dict[tuple[str, ...], Any] = {}
  for ours, theirs in pairs.items():
    target, source, named = _pair(ours, theirs, variables)
    for collection in named or variables:
      start = (collection, *source)
      new = {
        (collection, *target, *path[len(start) :]): leaf
        for path, leaf in flat.items()
        if path[: len(start)] == start
      }
      if not new and collection in (named or ("params",)):
        raise ValueError(_no_path(theirs, start, flat))
      if any(a[: len(b)] == b[: len(a)] for a in new for b in found):
        raise ValueError(f"pairs has the student's path {ours!r} over another one.")
      found |= new
  return traverse_util.unflatten_dict(found)


def _pair(
  ours: str, theirs: str, collections: Mapping[str, Any]
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
  """The student's path and the teacher's inside a collection, and which one, if they name it."""
  target, source = (tuple(path.strip("/").split("/")) for path in (ours, theirs))
  mine, named = (tuple(c for c in path[:1] if c in collections) for path in (target, source))
  target, source = target[len(mine) :], source[len(named) :]
  if mine != named or (not named and "params" not in collections):
    raise ValueError(
      f"pairs has {ours!r}: {theirs!r}; both paths begin with the same collection, or neither does "
      f"and there is 'params' (variables has the collections {sorted(collections)})."
    )
  if not target or not source or "" in (*target, *source):
    raise ValueError(f"pairs has {ours!r}: {theirs!r}; name a submodule or an array in each.")
  return target, source, named


def _no_path(theirs: str, start: tuple[str, ...], flat: Mapping[tuple[str, ...], Any]) -> str:
  mine = [path[1:] for path in flat if path[0] == start[0]]
  there = sorted({"/".join(path[:i]) for path in mine for i in range(1, len(path) + 1)})
  near = difflib.get_close_matches("/".join(start[1:]), there, n=5, cutoff=0.4) or there[:10]
  return f"pairs has the teacher's path {theirs!r}, which is not in its {start[0]!r}; try {near}."


def restore(run: str | os.PathLike[str], network: Network, *, step: int | None = None) -> Model:
  """Reads the deployed network's variables from a run folder of ours.

  That network is the student (its moving average, where the run kept one), but for recipes that
  deploy another: after `recipes.simkd` it is ``objective.deployed.network(student)``.

  Args:
    run: the folder that `jaxdistill.train.fit` wrote.
    network: the deployed network.
    step: which checkpoint; the last one that verifies by default.

  Returns:
    The model; with its ``seeds`` for a run over a sequence of seeds.

  Raises:
    TypeError: ``network`` is none.
    FileNotFoundError: there is no usable checkpoint.
    CheckpointError: the checkpoint is damaged.
    ValueError: its ``config.json`` is damaged; or the run is not finished (its last usable
      checkpoint is not of its last step), and ``step`` does not ask for an earlier one.
  """
  if not isinstance(network, Network):
    raise TypeError(f"network={_check.show(network)} must be a Network, that of the run's student.")
  folder = _check.folder("run", run) / "checkpoints"
  if not folder.is_dir():
    raise FileNotFoundError(f"run={str(run)!r} holds no checkpoints (no folder {folder}).")
  with runs.Checkpoints(folder) as saved:
    chosen = saved.latest() if step is None else step
    if chosen is None:
      raise FileNotFoundError(f"{folder} holds no checkpoint that verifies.")
    config = runs.read_config(run)
    try:
      steps = runs.entry(config, "steps", int)
      seed = runs.entry(config, "seed", (int, list, type(None)))
    except ValueError as error:
      raise ValueError(f"{folder.parent / 'config.json'} {error}: no run of fit's.") from error
    if step is None and chosen != steps:
      raise ValueError(
        f"the run {os.fspath(run)!r} stands at step {chosen} of {steps}; start it again "
        f"to finish it, or pass step={chosen} to take it as it is."
      )
    # A checkpoint has this item only where the student is not what is deployed.
    item = "deployed" if "deployed" in saved.items(chosen) else "student"
    variables = saved.restore(chosen, {item: None})[item]
  return Model(network, variables, len(seed) if isinstance(seed, list) else None)


def class_numbers(name: str, values: Any) -> np.ndarray:
  """Classes as integers from 0 on.

  >>> class_numbers("classes", [3, 1]).tolist()
  [3, 1]
  """
  found = np.asarray(values)
  if found.ndim != 1 or (found.size and not np.issubdtype(found.dtype, np.integer)):
    raise ValueError(f"{name} must be a sequence of integers, got {values!r}.")
  if np.any(found < 0):
    raise ValueError(f"{name} has {found.min()}: classes are counted from 0.")
  return found.astype(np.int64)


def repeated_classes(found: np.ndarray) -> list[int]:
  """Those that come more than once.

  >>> repeated_classes(np.array([1, 2, 1]))
  [1]
  """
  values, counts = np.unique(found, return_counts=True)
  return values[counts > 1].tolist()


def group_members(groups: Any) -> tuple[list[np.ndarray], int | None]:
  """The classes of each group; and how many classes there are, where ``groups`` says it.

  >>> [m.tolist() for m in group_members([0, 1, 0])[0]], group_members([[0, 2], [1]])[1]
  ([[0, 2], [1]], None)
  """
  if not hasattr(groups, "__len__") or isinstance(groups, str | Mapping) or len(groups) == 0:
    raise ValueError(
      f"groups={_check.show(groups)} must be the group of each class, or the classes of each "
      "group, in a sequence."
    )
  every = None
  if all(np.ndim(g) == 0 for g in groups):
    of_class = class_numbers("groups", groups)
    every = len(of_class)
    found = [np.flatnonzero(of_class == g) for g in range(of_class.max() + 1)]
  else:
    found = [class_numbers(f"groups[{g}]", m) for g, m in enumerate(groups)]
  empty = [g for g, m in enumerate(found) if not m.size]
  if empty:
    raise ValueError(f"groups {empty} of {len(found)} have no class; groups count from 0.")
  twice = repeated_classes(np.concatenate(found))
  if twice:
    raise ValueError(f"groups has the classes {twice} more than once; a class is in one group.")
  return found, every


def check_classes(name: str, found: np.ndarray, logits: Any) -> int:
  """How many classes the teacher has; an error where ``found`` has one beyond them.

  >>> check_classes("classes", np.array([1]), np.zeros((2, 3)))
  3
  """
  if logits is None:
    raise ValueError(f"the teacher puts out no logits, of which {name} could choose.")
  count = logits.shape[-1]
  beyond = sorted(set(found[found >= count].tolist()))
  if beyond:
    raise ValueError(f"{name} has class {beyond}, but the teacher has {count}, counted from 0.")
  return count
