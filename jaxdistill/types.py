"""The words of the library as types: Batch, Outputs, Term, Objective, Network, Model, Teacher.

Everything else is functions between these. All of them are pytrees or plain callables,
so they pass through ``jit``, ``vmap``, ``scan`` and ``pmap`` as they are.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxdistill import _check
from jaxdistill._compile import host_view, placed

__all__ = [
  "Batch",
  "Deployed",
  "Head",
  "Model",
  "Network",
  "Number",
  "Objective",
  "ObjectiveFunction",
  "Outputs",
  "Summed",
  "Teacher",
  "Term",
  "Terms",
  "Transform",
  "as_objective",
  "compute_dtype",
  "make_batch",
  "present",
  "with_logits",
]

# A pytree of arrays: parameters, statistics, an objective's state.
PyTree = Any
# An objective's keyword: a number or a scalar array; where a recipe is called, a schedule too.
Number = Any


@flax.struct.dataclass
class Head:
  """The last linear map of a language model, which makes logits of ``hidden``.

  ``softcap · tanh(z / softcap)``, z = scale · (hidden · kernel + bias); without a softcap z itself.

  Attributes:
    kernel: ``[D, V]``; ``[V, D]`` where ``transposed``.
    bias: ``[V]``, or None.
    softcap: bounds the logits to ±softcap, as in Gemma 2; None for no bound. Static.
    scale: multiplies them, as in Cohere's models; static.
    transposed: whether the kernel lies as an embedding does, which a tied head shares without a
      copy; static.

  >>> head = Head(jnp.array([[1.0, 2.0]]), bias=jnp.array([0.0, 1.0]), scale=2.0)
  >>> head(jnp.array([[[3.0]]])).tolist()
  [[[6.0, 14.0]]]
  """

  kernel: Any
  bias: Any = None
  softcap: float | None = flax.struct.field(pytree_node=False, default=None)
  scale: float = flax.struct.field(pytree_node=False, default=1.0)
  transposed: bool = flax.struct.field(pytree_node=False, default=False)

  def __call__(self, hidden: Any) -> jax.Array:
    """The logits ``[..., V]`` of ``hidden`` ``[..., D]``, in float32 (float64 stays)."""
    return self.finish(self.product(hidden), self.bias)

  def product(self, hidden: Any) -> jax.Array:
    """``hidden · kernel``: multiplied in the dtype of ``hidden``, as Flax's layers do it.

    It is summed in float32: logits of a vocabulary in bfloat16 are three digits each.
    """
    hidden = jnp.asarray(hidden)
    # As it is under Flax's own Dense, whose parameters are float32 and whose products need not be.
    kernel = jnp.asarray(self.kernel).astype(hidden.dtype)
    over = ((hidden.ndim - 1,), (int(self.transposed),))
    return jax.lax.dot_general(
      hidden, kernel, (over, ((), ())), preferred_element_type=compute_dtype(hidden)
    )

  def finish(self, product: jax.Array, bias: Any) -> jax.Array:
    """Logits of `product`'s result, which has their shape.

    Args:
      product: ``[..., V]``.
      bias: ``[V]``, or None; an argument, so that it can be had a gradient of in float32.
    """
    if bias is not None:
      added = jnp.asarray(bias).astype(product.dtype)
      product = product + jnp.expand_dims(added, range(product.ndim - 1))
    if self.scale != 1:
      product = product * self.scale
    return product if self.softcap is None else self.softcap * jnp.tanh(product / self.softcap)


@flax.struct.dataclass
class Outputs:
  """What a network puts out for a batch.

  Attributes:
    logits: ``[B, K]``, or ``[B, L, K]`` for tokens; None when ``hidden`` and ``head``
      stand for them (`with_logits` makes them of these).
    features: intermediates by name, each with the batch axis first.
    hidden: ``[B, L, D]``, the input of the last linear map, for language models; a pytree of such
      arrays where the head takes one.
    head: a `Head`, the last linear map, so that nobody has to build ``[tokens, vocabulary]``; of a
      teacher any pytree that is a function ``hidden -> logits``, as that of an ensemble is.
    where: ``[B]``, 0 for examples of which the network says nothing, as a teacher of another
      program may; None where it answers them all. The step leaves these out of every term that
      looks at the teacher, and counts their labels as before.
    members: of a cohort (`jaxdistill.networks.cohort`), by name what each network of it puts out.
    variables: the network's own, in training, for methods that call a part of it once more
      (`jaxdistill.recipes.with_variables`); None of all others.
  """

  logits: Any = None
  features: dict[str, Any] = flax.struct.field(default_factory=dict)
  hidden: Any = None
  head: Any = None
  where: Any = None
  members: dict[str, Outputs] = flax.struct.field(default_factory=dict)
  variables: Any = None

  def named(self, names: Collection[str] | None = None) -> dict[str, Any]:
    """What a network is deployed for, by name: its logits, or all features where it has none.

    Args:
      names: ``"logits"`` and features, in place of those.

    Raises:
      ValueError: one of them is not there, or nothing is.

    >>> Outputs(features={"pooled": 1.0}).named(), Outputs(2.0, {"pooled": 1.0}).named(["pooled"])
    ({'pooled': 1.0}, {'pooled': 1.0})
    """
    there = dict(self.features)
    if self.logits is not None:
      there["logits"] = self.logits
    if names is None:
      names = list(there) if self.logits is None else ["logits"]
    missing = sorted(set(names) - set(there))
    if missing or not names:
      raise ValueError(f"outputs={sorted(names)} must be some of what is put out, {sorted(there)}.")
    return {name: there[name] for name in sorted(names)}


def with_logits(outputs: Outputs) -> Outputs:
  """Outputs whose logits are there: of ``hidden`` by ``head``, where a network gave these alone.

  Args:
    outputs: a network's, whole or of some positions.

  >>> with_logits(Outputs(hidden=jnp.ones((1, 2, 3)), head=Head(jnp.ones((3, 4))))).logits.shape
  (1, 2, 4)
  """
  if outputs.logits is not None or outputs.head is None:
    return outputs
  return dataclasses.replace(outputs, logits=outputs.head(outputs.hidden))


@flax.struct.dataclass
class Batch:
  """Examples side by side; every leaf has the batch axis ``[B]`` first.

  Attributes:
    inputs: what the networks see: an array ``[B, ...]`` or a pytree of such arrays.
    labels: ``[B]`` integers (0 where there is none), or ``[B, K]`` distributions.
    weight: ``[B]``, or ``[B, L]`` for tokens; 0 for padding. Under ``[B]`` all positions of an
      example count. Both networks see padding (a BatchNorm of theirs counts it); objectives and
      their projectors' statistics do not.
    labelled: ``[B]``, 1 where the label is known and may be used, else 0.
    index: ``[B]``, which example of the data set this is.
    view: ``[B]``, which augmentation of it.
    teacher: the teacher's outputs, when a stream brings them along.
    counts: ``{term: Σ of its mask}`` over the batch that this is a part of, a micro-batch or a
      device's share; None where it is a whole one. The step's own.
  """

  inputs: Any
  labels: Any
  weight: Any
  labelled: Any
  index: Any
  view: Any
  teacher: Outputs | None = None
  counts: Mapping[str, Any] | None = None


@flax.struct.dataclass
class Term:
  """One term of an objective, not averaged yet.

  The step reduces it to ``weight * sum(where * values) / sum(where)`` over the global batch; a
  term with nothing in its mask is 0.

  Attributes:
    values: ``[B]`` or ``[B, L]`` when ``axis`` is ``"batch"``, else any shape.
    weight: a number or a scalar array; may follow a schedule. An objective function that gives a
      term the weight None has left it out.
    where: a mask of the shape of ``values`` (or ``[B]`` for ``[B, L]`` values); it must depend on
      the batch alone, never on what the networks put out. None counts everything.
    axis: what the values run over. ``"batch"``: examples or tokens, and the step multiplies the
      mask by ``batch.weight``. Values ``[B]`` under weights ``[B, L]`` are weighed by the largest
      of their example's: by 0 where it is padding throughout. Any other word (``"classes"``,
      ``"pairs"``, ``"parameters"``) names what it is and is averaged as it stands.
  """

  values: Any
  weight: Any = 1.0
  where: Any = None
  axis: str = flax.struct.field(pytree_node=False, default="batch")


@flax.struct.dataclass
class Summed:
  """A term that was summed already, as one in chunks of tokens is: ``weight * total / count``.

  Attributes:
    total: Σ where · values over the batch (this device's share of it, under `pmap`).
    count: Σ where, likewise; of the batch alone, as a `Term`'s mask is.
    weight: as a `Term`'s.
    together: whether its gradient is made with the other terms', as the loss's: alone it has none.
    accuracy: ``(Σ, count)`` of the labels that the student's logits say, where these were there to
      see it and are nowhere else: for the log. None where that is not known.
  """

  total: Any
  count: Any
  weight: Any = 1.0
  together: bool = flax.struct.field(pytree_node=False, default=False)
  accuracy: Any = None


# Terms by name, each a `Term` or a `Summed`.
Terms = dict[str, Any]
# A bare objective: ``(student, teacher, batch, *, <hyper>) -> {name: Term}``.
ObjectiveFunction = Callable[..., dict[str, Term]]


@dataclasses.dataclass(frozen=True)
class Deployed:
  """How the deployed network is made, where it is another than the student (SimKD).

  Attributes:
    network: ``student network -> deployed network``.
    variables: ``(student variables, objective params, objective state) -> deployed variables``;
      it only puts leaves together, so that they may have an axis over seeds, and so that a moving
      average of the whole can be kept.
  """

  network: Callable[[Network], Network]
  variables: Callable[[PyTree, PyTree, PyTree], PyTree]


@dataclasses.dataclass(frozen=True)
class Objective:
  """An objective that learns or remembers something: a pair of functions, as in optax.

  Attributes:
    init: ``(key, student, teacher) -> (params, state)``. The outputs are shapes
      (``jax.ShapeDtypeStruct`` leaves), so nobody types a width in by hand. ``teacher`` is None
      when there is no teacher.
    apply: ``(params, state, student, teacher, batch, *, key, **hyper) -> ({name: Term}, state)``.
    hyper: the names of the keywords that ``apply`` takes beside ``key``, with their values:
      numbers, arrays, or schedules (functions of the step). `as_objective` gives other ones.
    deployed: how the deployed network is made; None where it is the student.
    start: parts of ``(params, state)`` that a run begins from in place of what ``init`` makes, as a
      stage before it left them: ``dataclasses.replace(objective, start=before.state.objective)``.
      With several seeds, leaves may have an axis over them in front.
    check: ``(**keywords)``, raises for a number or a schedule that a keyword cannot have, where it
      is given: a number that is traced, as a sweep's are, nobody looks at. None for any.
  """

  init: Callable[..., tuple[PyTree, PyTree]]
  apply: Callable[..., tuple[Terms, PyTree]]
  hyper: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  deployed: Deployed | None = None
  start: tuple[PyTree, PyTree] | None = None
  check: Callable[..., None] | None = None


def as_objective(objective: Any, **hyper: Any) -> Objective:
  """Promotes a bare objective function to the pair; an `Objective` passes through.

  The function's keyword-only arguments become the objective's ``hyper``. A keyword named ``key``
  receives the step's random key and is not one of them. A term whose weight is None is left out: so
  ``hard_weight=None`` is an objective without labels.

  Args:
    objective: an `Objective`, or a function ``(student, teacher, batch, *, ...) -> {name: Term}``.
    **hyper: other values of its keywords: numbers, arrays, or schedules of the step.

  Returns:
    An `Objective` whose params and state are empty for a bare function.

  Raises:
    TypeError: ``objective`` is neither.
    ValueError: it does not take one of these keywords, or not that value of it.

  >>> def mine(student, teacher, batch, *, temperature=4.0):
  ...   return {"soft": Term(temperature * student.logits[:, 0])}
  >>> as_objective(mine, temperature=2.0).hyper
  {'temperature': 2.0}
  """
  made = objective if isinstance(objective, Objective) else _promoted(objective)
  if not hyper:
    return made
  unknown = sorted(set(hyper) - set(made.hyper))
  if unknown:
    raise ValueError(
      f"hyper has {unknown}, which the objective does not take; it takes {sorted(made.hyper)}."
    )
  for name, value in hyper.items():
    number = isinstance(made.hyper[name], int | float) and not isinstance(made.hyper[name], bool)
    if number and not (callable(value) or value is None or hasattr(value, "dtype")):
      _check.scheduled(name, value)
  if made.check is not None:
    made.check(**{name: value for name, value in hyper.items() if value is not None})
  # Schedules are resolved by the step, which hands their value over; numbers are handed over here,
  # and not through ``hyper`` alone: what nobody gives, each part of a sum keeps as its own.
  constants = {name: value for name, value in hyper.items() if not callable(value)}

  def apply(*args: Any, **given: Any) -> tuple[Terms, PyTree]:
    return made.apply(*args, **{**constants, **given})

  return dataclasses.replace(made, apply=apply, hyper={**made.hyper, **hyper})


def _promoted(objective: Any) -> Objective:
  """A bare function as the pair."""
  _check.function(
    "objective",
    objective,
    "(student, teacher, batch, *, ...) -> {name: Term}, or an Objective",
    arguments=3,
    instead="Call a recipe, recipes.kd(); add several up by recipes.combine(first, second).",
    keywords_may_lack=True,
  )
  parameters = inspect.signature(objective).parameters.values()
  keywords = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
  wants_key = "key" in keywords
  keywords.pop("key", None)

  def init(key: Any, student: Outputs, teacher: Outputs | None) -> tuple[PyTree, PyTree]:
    del key, student, teacher
    return {}, {}

  def apply(
    params: PyTree,
    state: PyTree,
    student: Outputs,
    teacher: Outputs | None,
    batch: Batch,
    *,
    key: Any,
    **hyper: Any,
  ) -> tuple[dict[str, Term], PyTree]:
    del params
    extra = {"key": key} if wants_key else {}
    try:
      terms = objective(student, teacher, batch, **extra, **hyper)
    except AttributeError as error:
      # ``teacher.logits`` of a run without one.
      read = {field.name for field in dataclasses.fields(Outputs)}
      if teacher is not None or error.obj is not None or error.name not in read:
        raise
      name = getattr(getattr(objective, "func", objective), "__name__", "the objective")
      raise ValueError(
        f"{name} compares with a teacher, and teacher is None; give fit a teacher."
      ) from error
    if isinstance(terms, Mapping):  # what is none, or has what is no term, the step refuses
      terms = {n: term for n, term in terms.items() if getattr(term, "weight", 0.0) is not None}
    return terms, state

  return Objective(init=init, apply=apply, hyper=keywords)


@dataclasses.dataclass(frozen=True)
class Network:
  """A pure apply function and how to make its variables.

  Built by `jaxdistill.networks.linen` (or another adapter), never by hand in a training script.

  Attributes:
    init: ``(key, inputs) -> variables``: ``{"params": ..., "batch_stats": ..., ...}``.
    apply: ``(variables, inputs, *, train, key) -> (Outputs, state)``. ``state`` holds the
      collections that the call updated (empty when ``train`` is False). ``key`` is for dropout and
      may be None when ``train`` is False.
    name: for reports and error messages.
    at_rest: ``paths -> Network``, the same network whose normalisations at these paths go by their
      averages in training too, and keep them; None where nobody can tell them.
    axes: ``inputs -> {path: names}``, the names that the module gives the axes of its variables, by
      ``"params/Dense_0/kernel"`` (`flax.linen.with_partitioning`, `flax.nnx.with_partitioning`);
      ``inputs`` may be shapes. None where nobody can tell.
    at_use: ``(specs, read) -> Network``, the same network that takes each parameter as
      ``read(parameter, spec)`` where it uses it, inside the body of a scan of layers too, so that
      what is in parts is gathered layer by layer. ``specs`` is ``{path: PartitionSpec}``; without
      the axis of the layers in such a body. None where nobody can do that.
  """

  init: Callable[..., dict[str, Any]]
  apply: Callable[..., tuple[Outputs, dict[str, Any]]]
  name: str = "network"
  at_rest: Callable[[Collection[str]], Network] | None = None
  axes: Callable[[Any], Mapping[str, tuple[Any, ...]]] | None = None
  at_use: Callable[..., Network] | None = None


@flax.struct.dataclass
class Model:
  """A network and its variables: what `jaxdistill.fit` returns, and what is evaluated and exported.

  A pytree whose leaves are the variables, so it passes through ``jit`` and ``device_put`` as one
  argument.

  Attributes:
    network: the network; static.
    variables: ``{"params": ..., "batch_stats": ..., ...}``; leaves ``[S, ...]`` for a run over S
      seeds.
    seeds: S where the leaves have that axis, else None; static.

  >>> import jax
  >>> from jaxdistill import networks
  >>> from jaxdistill.networks.models import MLP
  >>> network = networks.linen(MLP([4], num_classes=3))
  >>> model = Model(network, network.init(jax.random.key(0), jnp.zeros((1, 5))))
  >>> model(jnp.zeros((2, 5))).logits.shape
  (2, 3)
  """

  network: Network = flax.struct.field(pytree_node=False)
  variables: PyTree
  seeds: int | None = flax.struct.field(pytree_node=False, default=None)

  def __call__(self, inputs: Any) -> Outputs:
    """The outputs in inference mode.

    Args:
      inputs: what the network sees, ``[B, ...]`` or a pytree of such arrays; or a `Batch`. What
        lies on other devices than the variables is copied to theirs.

    Raises:
      ValueError: these are the variables of several seeds.
    """
    if self.seeds is not None:
      raise ValueError(
        f"these are the variables of {self.seeds} seeds of {self.network.name!r}; call one of "
        "model.unstack()."
      )
    inputs = placed(inputs.inputs if isinstance(inputs, Batch) else inputs, self.variables)
    return self.network.apply(self.variables, inputs, train=False, key=None)[0]

  def unstack(self) -> list[Model]:
    """The models of each seed; of a run over one, this model alone."""
    return [self.instance(i) for i in range(self.seeds or 1)]

  def instance(self, index: int) -> Model:
    """The model of one seed, counted from 0; of a run over one, this model alone."""
    if self.seeds is None:
      return Model(self.network, self.variables)
    return Model(self.network, jax.tree.map(lambda leaf: _row(leaf, index), self.variables))


def _row(leaf: Any, index: int) -> Any:
  """One seed's part of an array, where the array lies."""
  view = host_view(leaf) if isinstance(leaf, jax.Array) else None
  if view is None:
    return leaf[index]
  # Of the host's memory no program has to be compiled for it. A copy: the whole may be donated.
  home = leaf.sharding if leaf.committed else None
  return jax.device_put(view[index], home, may_alias=False)


@flax.struct.dataclass
class Teacher:
  """Variables, a function of them, and what it is asked: a pytree, frozen where it is called.

  Made by `jaxdistill.teachers`: of a `Model`, of several, of some of its classes. One of another
  program is ``Teacher(variables, apply)``, with a function of yours.

  It passes through ``jit``, ``vmap`` and ``device_put`` as one argument; its leaves keep their
  dtype and their sharding. Gradients stop at its variables and at its outputs, here and nowhere
  else.

  Attributes:
    variables: a pytree of arrays, in whatever form ``apply`` takes them.
    apply: ``(variables, batch) -> Outputs`` in inference mode; static, so give the same function
      each time.
    asked: what it is asked for beside its variables (a rule, some classes), in words: caches of
      its outputs are told apart by it; static.
  """

  variables: PyTree
  apply: Callable[[PyTree, Batch], Outputs] = flax.struct.field(pytree_node=False)
  asked: str = flax.struct.field(pytree_node=False, default="")

  def __call__(self, batch: Batch) -> Outputs:
    """The outputs, frozen: no gradient gets past them; the batch is brought to the variables."""
    variables = jax.lax.stop_gradient(self.variables)
    return jax.lax.stop_gradient(self.apply(variables, placed(batch, variables)))


# ``(key, batch) -> batch``: mixes or changes examples before both networks see them.
Transform = Callable[[Any, Batch], Batch]


def compute_dtype(*arrays: Any) -> Any:
  """The dtype that sums over these are taken in: float64 if one of them is, else float32.

  Explicit, so that it holds under strict dtype promotion too.

  >>> compute_dtype(jnp.ones(2, jnp.bfloat16)).__name__
  'float32'
  """
  return jnp.float64 if any(a.dtype == jnp.float64 for a in arrays) else jnp.float32


def present(batch: Batch, array: Any = None) -> jax.Array:
  """Which examples are no padding, ``[B]``, or which entries of an array of theirs.

  Args:
    batch: gives the weights.
    array: what the answer has to broadcast against: ``[B, L, ..., D]`` where weights ``[B, L]`` say
      of each position whether it is there; else all of an example is that has a position with a
      weight. An array whose first axis is no batch is there altogether.

  Returns:
    Booleans.

  >>> batch = make_batch(jnp.ones((2, 3)), weight=jnp.array([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
  >>> present(batch).tolist(), present(batch, jnp.ones((2, 3, 1)))[..., 0].tolist()
  ([True, False], [[True, True, False], [False, False, False]])
  """
  there = jnp.asarray(batch.weight) > 0
  # More axes than the weights have: a pooled feature [B, D] may be as wide as sentences are long.
  if array is None or array.ndim <= there.ndim or array.shape[: there.ndim] != there.shape:
    there = jnp.any(there, axis=tuple(range(1, there.ndim)))
  if array is None:
    return there
  if array.shape[:1] != there.shape[:1]:
    return jnp.ones((1,) * array.ndim, bool)
  return jnp.expand_dims(there, range(there.ndim, array.ndim))


def make_batch(
  inputs: Any,
  labels: Any = None,
  *,
  weight: Any = None,
  labelled: Any = None,
  index: Any = None,
  view: Any = None,
  teacher: Outputs | None = None,
) -> Batch:
  """Makes a `Batch` from what there is; the rest gets its neutral value.

  Args:
    inputs: an array ``[B, ...]`` or a pytree of them.
    labels: ``[B]`` or ``[B, K]``; None means that no example is labelled.
    weight: ``[B]``; ones by default.
    labelled: ``[B]``; by default ones when there are labels and zeros when not.
    index: ``[B]``; ``0 .. B-1`` by default.
    view: ``[B]``; zeros by default.
    teacher: the teacher's outputs, if they come along.

  Returns:
    The batch, with float32 weights and int32 indices.

  >>> batch = make_batch(jnp.zeros((2, 3)), jnp.array([1, 0]))
  >>> batch.weight.tolist(), batch.labelled.tolist(), batch.index.tolist()
  ([1.0, 1.0], [1.0, 1.0], [0, 1])
  """
  sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves((inputs, labels, weight, labelled))}
  if len(sizes) != 1 or sizes == {()}:
    raise ValueError(
      f"inputs, labels, weight and labelled must have one batch axis in front, got {sorted(sizes)}."
    )
  ((size,),) = sizes
  known = labels is not None

  def default(value: Any, fill: Any, dtype: Any) -> Any:
    return jnp.asarray(fill, dtype) if value is None else value

  return Batch(
    inputs=inputs,
    labels=default(labels, jnp.zeros(size), jnp.int32),
    weight=default(weight, jnp.ones(size), jnp.float32),
    labelled=default(labelled, jnp.full(size, float(known)), jnp.float32),
    index=default(index, jnp.arange(size), jnp.int32),
    view=default(view, jnp.zeros(size), jnp.int32),
    teacher=teacher,
  )
