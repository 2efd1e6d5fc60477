"""What methods are written with: `recipe` and `learned`, labels, features by name, trained modules.

A method of published form is a decorated function (`recipe`). One that trains something of its own,
a projector or a variance, is a function too, whose first argument runs it (`learned`). Whoever
copies either into a file of his own finds here what its body calls.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, Protocol, cast, overload, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdistill import _check, losses
from jaxdistill.recipes import projectors
from jaxdistill.types import (
  Batch,
  Deployed,
  Number,
  Objective,
  ObjectiveFunction,
  Outputs,
  Term,
  as_objective,
  compute_dtype,
  present,
)

__all__ = [
  "EPOCH",
  "STAGES",
  "STRONG",
  "LogitLoss",
  "Modules",
  "Recipe",
  "Running",
  "at_a_step",
  "both_features",
  "both_logits",
  "check_keywords",
  "check_loss",
  "embed",
  "embeddings",
  "feature",
  "hard_term",
  "head_of",
  "init_modules",
  "label_numbers",
  "layer_names",
  "layer_pairs",
  "learned",
  "loss_of_numbers",
  "map_pairs",
  "present",
  "recipe",
  "rising",
  "stage_weights_or",
  "strong_view",
]

PyTree = Any
P = ParamSpec("P")
# ``(student_logits, teacher_logits, *, temperature) -> [...]``.
LogitLoss = Callable[..., jax.Array]
# The student's feature and the teacher's that it is compared with.
Pairs = Sequence[tuple[str, str]]
# ``{name: (module or None, what goes in)}``.
Modules = Mapping[str, tuple[Any, Any]]
# Steps of an epoch of CIFAR-100 at the published batch size of 64: 50,000 // 64. Published warm-ups
# are in epochs; a schedule here is of the step, and batches are never padded.
EPOCH = 781
# The three stages of a CIFAR ResNet, as `jaxdistill.networks.models` sows them.
STAGES = ("stage1", "stage2", "stage3")
# What the names begin with of what a network of two views (`with_views`) says of the strong one.
STRONG = "strong"


# --- A method is a function. ---


@runtime_checkable
class Recipe(Protocol[P]):
  """A published method: called with keywords, it gives the objective with those as its defaults.

  Attributes:
    function: the method itself, ``(student, teacher, batch, *, ...) -> {name: Term}``.
  """

  function: ObjectiveFunction

  def __call__(self, *args: P.args, **keywords: P.kwargs) -> Objective:
    """The objective."""
    ...


Method = Callable[Concatenate[Outputs, Any, Batch, P], dict[str, Term]]


@overload
def recipe(function: Method[P], /) -> Recipe[P]: ...


@overload
def recipe(
  *,
  check: Callable[..., Any] | None = None,
  follows: Mapping[str, Callable[..., Any]] | None = None,
) -> Callable[[Method[P]], Recipe[P]]: ...


def recipe(
  function: Any = None,
  /,
  *,
  check: Callable[..., Any] | None = None,
  follows: Mapping[str, Callable[..., Any]] | None = None,
) -> Any:
  """Makes a recipe of a method, for whoever wants to set its keywords where it is named.

  The method stays a function, ``recipe.function``. Called with keywords, the recipe gives an
  `Objective` with those in place of the function's defaults. Its numbers are the objective's
  keywords (``hyper``), which may be schedules and which a sweep varies inside one program: what is
  called a temperature must be positive, a weight or a warm-up at least 0. Unless an annotation
  forbids it, None is no keyword of the objective, and a term of that weight is left out. Texts,
  switches, sequences and what ``check`` or ``follows`` take are fixed: another value is another
  program.

  Args:
    function: ``(student, teacher, batch, *, ...) -> {name: Term}``. A keyword named ``key``
      receives the step's random key.
    check: a function of some of the keywords, by their names, which raises for what they can't be.
    follows: ``{keyword: function}``, keywords that follow from fixed ones, unless they are given:
      each function takes those by their names, once, and returns the default: a schedule, say.

  Returns:
    The recipe. ``help`` and the type checker see its keywords.

  >>> @recipe
  ... def squares(student, teacher, batch, *, square_weight=1.0, layer="pooled"):
  ...   apart = student.features[layer] - teacher.features[layer]
  ...   return {"square": Term(jnp.sum(apart**2, axis=-1), weight=square_weight)}
  >>> squares(square_weight=0.5).hyper
  {'square_weight': 0.5}
  >>> squares(weight=0.5)
  Traceback (most recent call last):
  TypeError: squares has no keywords ['weight']; it has ['layer', 'square_weight'].
  """
  if function is None:
    return functools.partial(recipe, check=check, follows=follows)
  follows = follows or {}
  signature = inspect.signature(function)
  keywords = [
    p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY and p.name != "key"
  ]
  defaults = {p.name: p.default for p in keywords}
  # A keyword that a check or a follower reads has to be a plain value when the objective is made.
  taken = {maker: _names_of(maker, defaults) for maker in (check, *follows.values()) if maker}
  fixed = {name for names in taken.values() for name in names}
  # Annotated as a number, it may be None only where the annotation says so.
  optional = {p.name for p in keywords if p.annotation is p.empty or "None" in str(p.annotation)}

  @functools.wraps(function)
  def made(*args: Any, **given: Any) -> Objective:
    unknown = sorted(set(given) - set(defaults))
    if args or unknown:
      wrong = f"keywords {unknown}" if unknown else "positional arguments"
      own = f"; the method itself is {function.__name__}.function" if args else ""
      raise TypeError(f"{function.__name__} has no {wrong}; it has {sorted(defaults)}{own}.")
    # From here on the recipe is its method with other defaults: functools.partial, and no more.
    values = {**defaults, **given}
    if check is not None:
      check(**{name: values[name] for name in taken[check]})
    for name, maker in follows.items():
      if name not in given:
        values[name] = maker(**{other: values[other] for other in taken[maker]})
    # What may change from step to step, or along a sweep's axis, is an argument of the program;
    # the rest is part of it.
    hyper = {
      name: value
      for name, value in values.items()
      if name not in fixed
      and (_is_number(defaults[name]) or _is_number(value))
      and not (value is None and name in optional)
    }
    return _objective(function, values, hyper)

  made.__annotations__ = {**{p.name: p.annotation for p in keywords}, "return": Objective}
  # A recipe takes keywords, its function outputs and a batch: two signatures of one name.
  # What help() shows, and where `jaxdistill.search` sees that it is called with keywords.
  shown = signature.replace(parameters=keywords, return_annotation=Objective)
  vars(made).update(function=function, __signature__=shown)
  return cast(Any, made)


def _objective(
  function: ObjectiveFunction, values: Mapping[str, Any], hyper: Mapping[str, Any]
) -> Objective:
  """The promoted function with these values, whose numbers are looked at, now and at a step."""
  empty = inspect.Parameter.empty  # a keyword without a default: fit asks for it
  check_keywords(**{name: value for name, value in hyper.items() if value is not empty})
  bound = functools.partial(function, **{n: v for n, v in values.items() if v is not empty})
  promoted = as_objective(bound)

  # Looked at twice: a number when it is given, a schedule's value when a step asks for it.
  def apply(*args: Any, key: Any, **now: Any) -> tuple[dict[str, Term], PyTree]:
    check_keywords(**now)
    return promoted.apply(*args, key=key, **now)

  return Objective(init=promoted.init, apply=apply, hyper=dict(hyper), check=check_keywords)


def _names_of(maker: Callable[..., Any], keywords: Mapping[str, Any]) -> list[str]:
  """Those of the keywords that a function takes."""
  return [name for name in inspect.signature(maker).parameters if name in keywords]


def _is_number(value: Any) -> bool:
  """Whether it may change from step to step: a number, a scalar array or a schedule."""
  if callable(value):
    try:
      inspect.signature(value).bind(0)  # a loss takes two
    except TypeError:
      return False
    except ValueError:
      pass  # builtins without a signature
    return True
  number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
  return number or getattr(value, "shape", None) == ()


def check_keywords(**values: Any) -> None:
  """Raises for a number or a schedule that its name does not allow.

  >>> check_keywords(temperature=4.0, hard_weight=lambda step: 0.1 * step)
  """
  # By the name alone: a temperature of 0 divides by 0, and below a weight of 0 the student climbs
  # what it should descend.
  for name, value in values.items():
    above = 0 if name.endswith("temperature") else None
    least = 0 if name.endswith(("weight", "warmup")) else -math.inf
    _check.scheduled(name, value, above=above, least=least)


def at_a_step(name: str, value: Any) -> Any:
  """A keyword's number, where the train step has put the schedule's value in its place.

  Args:
    name: the keyword's.
    value: what the objective was given.

  Returns:
    The value.

  Raises:
    ValueError: it is the schedule still.

  >>> at_a_step("dkd_warmup", 0.5)
  0.5
  """
  if callable(value):
    raise ValueError(
      f"{name} is a schedule of the step, which is unknown here: give a number, {name}=1.0, or "
      "train by train.fit or train.make_step, which follow schedules."
    )
  return value


def rising(warmup_steps: Any) -> Any:
  """A warm-up: from 0 to 1 in a line, as a schedule of the step; 1 where it takes no steps.

  >>> float(rising(10)(5)), rising(0)
  (0.5, 1.0)
  """
  # By the step, where published warm-ups go by the epoch, in stairs: smooth, and the same line.
  _check.whole("warmup_steps", warmup_steps, least=0, instead=": 0 turns the warm-up off")
  return optax.linear_schedule(0.0, 1.0, warmup_steps) if warmup_steps else 1.0


def check_loss(loss: Any) -> None:
  """Raises for what is no loss on two networks' logits.

  >>> check_loss(losses.soft_target_kl)
  """
  takes = "(student_logits, teacher_logits, *, temperature) -> [...]"
  _check.function("loss", loss, takes, arguments=2, keywords_may_lack=True)


def hard_term(student: Outputs, batch: Batch, hard_weight: Number | None, *looks: Outputs) -> Term:
  """Cross-entropy on the labels that are known; with the weight None nothing is computed.

  That of what the student says of further looks at the examples is added.

  >>> from jaxdistill.types import make_batch
  >>> batch = make_batch(jnp.ones((1, 1)), jnp.array([0]))
  >>> term = hard_term(Outputs(logits=jnp.zeros((1, 2))), batch, 0.5)
  >>> term.weight, round(term.values.item(), 4)  # log 2
  (0.5, 0.6931)
  """
  # No logits, no labels needed then: an embedding network has neither.
  if hard_weight is None:
    return Term(None, weight=None)
  values = losses.cross_entropy(student.logits, batch.labels)
  for look in looks:
    values = values + losses.cross_entropy(look.logits, batch.labels)
  return Term(values, weight=hard_weight, where=batch.labelled)


def label_numbers(batch: Batch, outputs: Any, *, each: int = 1) -> Any:
  """Labels that are numbers, ``[B, D]`` beside outputs; one an example, ``[B]``, is ``[B, 1]``.

  Args:
    batch: whose labels they are.
    outputs: ``[B, D]`` numbers, or ``[B, 2D]`` means and logarithms of variances.
    each: how many outputs there are for a number: 1, or 2.

  Raises:
    ValueError: there are not as many numbers as outputs for them.

  >>> from jaxdistill.types import make_batch
  >>> batch = make_batch(jnp.ones((2, 1)), jnp.array([0.5, 1.5]))
  >>> label_numbers(batch, jnp.zeros((2, 1))).tolist()
  [[0.5], [1.5]]
  """
  values = jnp.asarray(batch.labels)
  values = values[..., None] if values.ndim == outputs.ndim - 1 else values
  if values.ndim != outputs.ndim or each * values.shape[-1] != outputs.shape[-1]:
    wanted = f"{outputs.shape[-1] // each} numbers an example"
    raise ValueError(
      f"the data's labels are of shape {jnp.shape(batch.labels)} beside outputs of "
      f"{outputs.shape}: they must be {wanted}, [B, {outputs.shape[-1] // each}], or the student "
      f"puts out {each * values.shape[-1]}."
    )
  return values


def _each_counts(batch: Batch) -> bool:
  """Whether each of an example's numbers has a weight, or may be known or not, by itself."""
  axes = max(jnp.ndim(batch.weight), jnp.ndim(batch.labelled))
  return 1 < axes == jnp.ndim(batch.labels)


def loss_of_numbers(
  loss: Callable[..., jax.Array], batch: Batch, pair: Sequence[jax.Array]
) -> jax.Array:
  """A loss that is a mean over an example's numbers; that of each number, where each counts alone.

  Where all of them count, the step's average is the same.

  Args:
    loss: ``(student, target) -> [B]``, of ``[B, D]`` numbers, or ``[B, 2D]`` means and variances.
    batch: whose weights or masks ``[B, D]`` say that each counts by itself.
    pair: what the loss is of.

  Returns:
    ``[B]``, or ``[B, D]``.

  >>> from jaxdistill.types import make_batch
  >>> two = jnp.ones((1, 2))
  >>> batch = make_batch(two, two).replace(labelled=jnp.array([[1.0, 0.0]]))
  >>> loss_of_numbers(losses.logit_l2, batch, (two, jnp.array([[0.0, 9.0]]))).tolist()
  [[1.0, 64.0]]
  """
  if not _each_counts(batch):
    return loss(*pair)
  # Means and variances, [B, 2D], are [B, D, 2] of D numbers alone.
  numbers = jnp.shape(batch.labels)[-1]
  apart = (jnp.stack(jnp.split(x, x.shape[-1] // numbers, axis=-1), axis=-1) for x in pair)
  return loss(*apart)


# --- What a method looks at. ---


def both_logits(
  recipe: str, student: Outputs, teacher: Outputs | None, *, standardize: bool = False
) -> tuple[Any, Any]:
  """Both networks' logits, as they are or as z-scores.

  Args:
    recipe: who asks, for the message.
    student: the student's outputs.
    teacher: the teacher's.
    standardize: whether each row becomes z-scores (`losses.standardize_logits`).

  Returns:
    ``(student logits, teacher logits)``.

  Raises:
    ValueError: there is no teacher.

  >>> outputs = Outputs(jnp.array([[1.0, 2.0, 3.0]]))
  >>> both_logits("dkd", outputs, outputs, standardize=True)[1].round(3).tolist()
  [[-1.0, 0.0, 1.0]]
  """
  if teacher is None:
    raise ValueError(f"{recipe} compares with a teacher, and teacher is None; give fit a teacher.")
  # [B, K] both, and as many classes: the losses refuse two numbers of them.
  if not standardize:
    return student.logits, teacher.logits
  return losses.standardize_logits(student.logits), losses.standardize_logits(teacher.logits)


def feature(outputs: Outputs | None, name: str, argument: str) -> Any:
  """A feature, or the error that says how to have it captured.

  Args:
    outputs: the student's or the teacher's; shapes will do.
    name: the feature's name.
    argument: the recipe's argument that named it, ``student_...`` or ``teacher_...``.

  Returns:
    The array, or its shape.

  Raises:
    ValueError: there is no such network, or no such feature.

  >>> feature(Outputs(features={"mid": jnp.ones(2)}), "mid", "student_layer").shape
  (2,)
  """
  # Both networks' features are asked for by one function, so the argument says whose is missing.
  side = argument.split("_")[0]
  if outputs is None:
    raise ValueError(f"{argument}={name!r} needs a {side}, and there is none; give fit a {side}.")
  if name not in outputs.features:
    there = {n: tuple(f.shape) for n, f in sorted(outputs.features.items())}
    raise ValueError(
      f"{argument}={name!r} is not among the {side}'s features {there}; name it in "
      "networks.linen(module, features=[...]), or networks.nnx."
    )
  return outputs.features[name]


def strong_view(outputs: Outputs | None, side: str) -> Outputs:
  """What a network of two views (`jaxdistill.recipes.with_views`) puts out for the strong one.

  Args:
    outputs: the student's or the teacher's; shapes will do.
    side: ``"student"`` or ``"teacher"``, for the message.

  Returns:
    Logits and features by their plain names.

  Raises:
    ValueError: it saw one view alone.

  >>> seen = Outputs(jnp.zeros((1, 2)), {"strong/logits": jnp.ones((1, 2)), "mid": jnp.ones(1)})
  >>> strong_view(seen, "student").logits.tolist()
  [[1.0, 1.0]]
  """
  found = {} if outputs is None else outputs.features
  named = {n.removeprefix(f"{STRONG}/"): x for n, x in found.items() if n.startswith(f"{STRONG}/")}
  if not named:
    raise ValueError(
      f"the {side} saw one view of each example: give recipes.with_views(network), and data with "
      "augmentation=data.two_views(weak, strong)."
    )
  return Outputs(logits=named.pop("logits", None), features=named)


def head_of(variables: Mapping[str, Any], classifier: str, maps: Any, whose: str) -> Any:
  """The dense layer of a network that reads the mean of a map.

  Args:
    variables: the network's.
    classifier: its path among the parameters, ``"classifier"`` or ``"head/dense"``.
    maps: ``[B, H, W, C]``, or their shape.
    whose: of which map and network they are, for the message.

  Returns:
    ``{"kernel": [C, K], ...}``.

  Raises:
    ValueError: there is no such layer, or it reads another width.

  >>> params = {"head": {"kernel": jnp.ones((4, 3))}}
  >>> sorted(head_of({"params": params}, "head", jnp.ones((1, 2, 2, 4)), "'stage3' of resnet8"))
  ['kernel']
  """
  head: Any = variables["params"]
  for part in classifier.split("/"):
    head = head.get(part) if isinstance(head, Mapping) else None
  kernel: Any = head.get("kernel") if isinstance(head, Mapping) else None
  if np.ndim(kernel) != 2 or len(maps.shape) != 4 or np.shape(kernel)[0] != maps.shape[-1]:
    raise ValueError(
      f"classifier={classifier!r} has a kernel {np.shape(kernel) or None} for the map {whose}, "
      f"{tuple(maps.shape)}; name the dense layer [C, K] that reads the mean of a map "
      f"[B, H, W, C]. The parameters are {sorted(variables['params'])}."
    )
  return head


def layer_names(student_layer: Any, teacher_layer: Any = None) -> tuple[str, str]:
  """The names of both features, the teacher's being the student's where it is None.

  >>> layer_names("pooled", None)
  ('pooled', 'pooled')
  """
  teacher_layer = student_layer if teacher_layer is None else teacher_layer
  for argument, layer in (("student_layer", student_layer), ("teacher_layer", teacher_layer)):
    if not isinstance(layer, str):
      raise TypeError(f"{argument}={_check.show(layer)} must be a feature's name.")
  return student_layer, teacher_layer


def both_features(
  student: Outputs, teacher: Outputs | None, layers: tuple[str, str]
) -> tuple[Any, Any]:
  """The features of both networks, or their shapes; an error that names the one that is missing.

  >>> outputs = Outputs(features={"a": jnp.ones((2, 3))})
  >>> [x.shape for x in both_features(outputs, outputs, ("a", "a"))]
  [(2, 3), (2, 3)]
  """
  ours = feature(student, layers[0], "student_layer")
  return ours, feature(teacher, layers[1], "teacher_layer")


def layer_pairs(
  student_layers: Sequence[str], teacher_layers: Sequence[str] | None, *, least: int = 1
) -> list[tuple[str, str]]:
  """Pairs of features' names, the teacher's being the student's where they are None.

  >>> layer_pairs(("stage1",), None), layer_pairs(("a", "b"), ("c", "d"))
  ([('stage1', 'stage1')], [('a', 'c'), ('b', 'd')])
  """
  # Pairs by name: positions in two lists of features would match wrong stages without a word.
  teacher_layers = student_layers if teacher_layers is None else teacher_layers
  named = {"student_layers": student_layers, "teacher_layers": teacher_layers}
  for argument, layers in named.items():
    # "stage1" is a sequence too, of six letters.
    words = not isinstance(layers, str) and isinstance(layers, Sequence)
    if not words or not all(isinstance(name, str) for name in layers):
      raise TypeError(
        f"{argument}={_check.show(layers)} must be a sequence of features' names, such as "
        "('stage1', 'stage2')."
      )
  if len(student_layers) != len(teacher_layers) or len(student_layers) < least:
    raise ValueError(
      f"student_layers={tuple(student_layers)} and teacher_layers={tuple(teacher_layers)} must be "
      f"equally many, at least {least}: they are compared one by one."
    )
  return list(zip(student_layers, teacher_layers, strict=True))


def map_pairs(student: Outputs, teacher: Outputs | None, pairs: Pairs) -> list[tuple[Any, Any]]:
  """The maps of both networks, or their shapes; an error where one is no map.

  >>> outputs = Outputs(features={"a": jnp.ones((1, 2, 2, 3))})
  >>> [(s.shape, t.shape) for s, t in map_pairs(outputs, outputs, [("a", "a")])]
  [((1, 2, 2, 3), (1, 2, 2, 3))]
  """
  # The losses refuse what is no map too, but know neither the argument nor the feature's name.
  found = []
  for ours, theirs in pairs:
    pair = (feature(student, ours, "student_layers"), feature(teacher, theirs, "teacher_layers"))
    for side, name, value in zip(("student", "teacher"), (ours, theirs), pair, strict=True):
      if len(value.shape) != 4:
        raise ValueError(
          f"{side}_layers names {name!r}, of shape {tuple(value.shape)}, which is no map "
          "[B, H, W, C]; name a layer before the pooling."
        )
    found.append(pair)
  return found


def stage_weights_or(given: Sequence[float] | None, count: int) -> tuple[float, ...]:
  """Weights of stages: those given, else 1 for the last and half as much at each one before it.

  >>> stage_weights_or(None, 3)
  (0.25, 0.5, 1.0)
  """
  if given is None:
    # AB's and OFD's published weights, 2^(i − n + 1): later stages are nearer to the decision.
    return tuple(2.0 ** (i - count + 1) for i in range(count))
  if len(given) != count:
    raise ValueError(
      f"stage_weights={tuple(given)} must be one number for each of the {count} pairs of layers."
    )
  for weight in given:
    _check.number("stage_weights", weight, least=0)
  return tuple(given)


# --- A method that trains something: the same function, and modules. ---


class Running:
  """Runs the modules of a method and remembers their state.

  Attributes:
    state: by the module's name, and whatever else the method remembers; what it is after the method
      is what the next step begins with.

  Args:
    modules: ``{name: (module or None, what goes in)}``.
    params: from `init_modules`.
    state: from `init_modules`.
    batch: whose padding a module's BatchNorm leaves out of its statistics; None counts all.

  >>> from jaxdistill.recipes.projectors import Linear
  >>> modules = {"a": (Linear(3), jnp.ones((1, 2)))}
  >>> running = Running(modules, *init_modules(jax.random.key(0), modules))
  >>> running("a").shape, running("a", jnp.ones((5, 2))).shape, running.state
  ((1, 3), (5, 3), {})
  """

  def __init__(
    self,
    modules: Modules,
    params: Mapping[str, PyTree],
    state: Mapping[str, PyTree],
    batch: Batch | None = None,
  ) -> None:
    self._modules, self._params, self._batch = modules, params, batch
    self.state = dict(state)

  def __call__(self, name: str, *inputs: Any) -> Any:
    """The module's output, in training, of what goes in or of other inputs.

    Where the module is None that is its one input.
    """
    module, given = self._modules[name]
    inputs = inputs or (given if isinstance(given, tuple) else (given,))
    if module is None:
      return inputs[0]
    # Beside the parameters a module may hold statistics, which a call in training moves.
    mine = self.state.get(name, {})
    variables = {"params": self._params[name], **mine}
    with nn.intercept_methods(self._without_padding):
      out, updated = module.apply(variables, *inputs, train=True, mutable=list(mine))
    if mine:
      self.state[name] = {**mine, **updated}
    return out

  def _without_padding(self, call: Any, args: Any, keywords: Any, context: Any) -> Any:
    """A call of a module's layer; one of a BatchNorm is told which examples are padding."""
    if self._batch is not None and isinstance(context.module, nn.BatchNorm) and args:
      there = present(self._batch, args[0])
      # Where all is padding there would be no mean, but NaN, which no later batch moves.
      keywords = {"mask": there | ~jnp.any(there), **keywords}
    return call(*args, **keywords)

  def each(self) -> list[Any]:
    """The outputs of all modules, in their order."""
    return [self(name) for name in self._modules]


def learned(
  modules: Callable[[Outputs, Outputs | None], Modules],
  method: ObjectiveFunction,
  hyper: Mapping[str, Any],
  hard_weight: Any = None,
  *,
  init: Callable[..., tuple[PyTree, PyTree]] | None = None,
  deployed: Deployed | None = None,
) -> Objective:
  """The objective of a method whose modules are trained with the student.

  Args:
    modules: ``(student, teacher) -> {name: (module or None, what goes in)}``, a module ``(x, ...,
      *, train)`` as `projectors` has them. It is called with arrays, and before the first step
      with their shapes.
    method: ``(running, student, teacher, batch, *, ...) -> {name: Term}``, with `Running`; its
      keywords are those of ``hyper``, and ``key`` if it wants the step's random key.
    hyper: the keywords with their defaults.
    hard_weight: of the labels, whose term comes before the method's; a keyword too. None leaves
      them out.
    init: the objective's; None for parameters and state of ``modules``.
    deployed: the objective's.

  Returns:
    The objective, whose numbers are looked at as `recipe`'s are.

  >>> def method(running, student, teacher, batch, *, hint_weight):
  ...   return {"hint": Term(losses.hint_l2(running("projector"), teacher.logits), hint_weight)}
  >>> def modules(student, teacher):
  ...   return {"projector": (projectors.Linear(teacher.logits.shape[-1]), student.logits)}
  >>> objective = learned(modules, method, {"hint_weight": 1.0})
  >>> student, teacher = Outputs(jnp.ones((1, 2))), Outputs(jnp.ones((1, 3)))
  >>> params, state = objective.init(jax.random.key(0), student, teacher)
  >>> params["projector"]["dense"]["kernel"].shape
  (2, 3)
  """
  # Without a weight there is no such keyword either: a sum of recipes has the labels once.
  labels = {} if hard_weight is None else {"hard_weight": hard_weight}
  check_keywords(**hyper, **labels)

  def initial(key: Any, student: Outputs, teacher: Outputs | None) -> tuple[PyTree, PyTree]:
    return init_modules(key, modules(student, teacher))

  def apply(
    params: PyTree,
    state: PyTree,
    student: Outputs,
    teacher: Outputs | None,
    batch: Batch,
    *,
    key: Any,
    **now: Any,
  ) -> tuple[dict[str, Term], PyTree]:
    check_keywords(**now)
    now = {**hyper, **labels, **now}
    # The labels' term is the same in all methods, so the method itself says nothing of it.
    made = {"labels": hard_term(student, batch, now.pop("hard_weight"))} if labels else {}
    # Made anew from the shapes at every trace: modules hold no arrays, so nothing is kept in them.
    running = Running(modules(student, teacher), params, state, batch)
    bare = as_objective(functools.partial(method, running))
    terms, _ = bare.apply({}, {}, student, teacher, batch, key=key, **now)
    return {**made, **terms}, running.state

  known = {**hyper, **labels}
  return Objective(
    init=init or initial, apply=apply, hyper=known, deployed=deployed, check=check_keywords
  )


def init_modules(key: Any, modules: Modules) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
  """Parameters and state of modules, from the shapes of what goes into them.

  Args:
    key: a random key.
    modules: ``{name: (module, input)}``: a module ``(x, ..., *, train)`` as `projectors` has them,
      and an array or a shape, or a tuple of them, that goes in; None for no module.

  Returns:
    ``(params, state)``, each ``{name: ...}``; the state holds the other collections of modules
    that have any.

  >>> from jaxdistill.recipes.projectors import Linear
  >>> params, state = init_modules(jax.random.key(0), {"a": (Linear(3), jnp.ones((1, 2)))})
  >>> params["a"]["dense"]["kernel"].shape, state
  ((2, 3), {})
  """
  params, state = {}, {}
  for i, (name, (module, given)) in enumerate(modules.items()):
    # Folded in by place, so that two modules of one shape do not start as twins.
    if module is None:
      continue
    # Of shapes or arrays alike: initialisation looks at no value.
    inputs = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), given)
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    # In training mode, since a module may make some of its variables only then.
    variables = dict(module.init(jax.random.fold_in(key, i), *inputs, train=True))
    params[name] = variables.pop("params", {})
    if variables:
      state[name] = variables
  return params, state


def embeddings(
  student: Outputs, teacher: Outputs | None, layers: tuple[str, str], width: int
) -> Modules:
  """The modules ``student`` and ``teacher``: a linear map for either network's flattened feature.

  >>> outputs = Outputs(features={"a": jnp.ones((1, 2, 3))})
  >>> modules = embeddings(outputs, outputs, ("a", "a"), 4)
  >>> init_modules(jax.random.key(0), modules)[0]["teacher"]["dense"]["kernel"].shape
  (6, 4)
  """
  found = {}
  for name, x in zip(("student", "teacher"), both_features(student, teacher, layers), strict=True):
    # [B, ...] flattened: a pooled feature is as it is, a map becomes one long row.
    flat = jax.ShapeDtypeStruct((x.shape[0], math.prod(x.shape[1:])), compute_dtype(x))
    found[name] = (projectors.Linear(width), flat)
  return found


def embed(
  running: Running,
  student: Outputs,
  teacher: Outputs | None,
  layers: tuple[str, str],
  where: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Both networks' flattened features in the width of `embeddings`, ``[B, width]``.

  Features of examples that are not in ``where`` count as 0: whatever they hold, the gradient of
  the linear map multiplies it.

  >>> outputs = Outputs(features={"a": jnp.ones((1, 2, 3))})
  >>> modules = embeddings(outputs, outputs, ("a", "a"), 4)
  >>> running = Running(modules, *init_modules(jax.random.key(0), modules))
  >>> [x.shape for x in embed(running, outputs, outputs, ("a", "a"), jnp.ones(1, bool))]
  [(1, 4), (1, 4)]
  """
  # Replaced in front of the product: behind it, NaN would be in the kernel's gradient already.
  ours, theirs = (
    jnp.where(where[:, None], x.reshape(x.shape[0], -1).astype(compute_dtype(x)), 0.0)
    for x in both_features(student, teacher, layers)
  )
  return running("student", ours), running("teacher", theirs)
