"""Optimisers as published recipes run them, and which parameters weight decay is for.

All of it is optax, and any other optimiser of optax's does as well. `kernels` is a mask for those:
``optax.add_decayed_weights(1e-4, mask=kernels)``.

What an optimiser sees is the student's own tree of parameters, so masks and labels are written as
for the network alone. Where the objective trains some of its own (projectors), they lie beside the
student's modules under ``"objective"``: ``{**labels, "objective": "adam"}``.

What asks for more than the gradient gets it. ``value`` is the loss of the global batch
(`optax.contrib.reduce_on_plateau`, `optax.polyak_sgd`), ``grad`` the gradient before any
transformation, and ``value_fn`` the loss of that batch at other parameters, with the same dropout
(`optax.lbfgs`, line searches; of a batch in one piece, without ``accumulate``). `optax.MultiSteps`
goes in as it is. An optimiser with `jaxdistill.train.TermsApart` in its state is handed the
gradients of some of the objective's terms by themselves, as `dot` is.

What is validated, chosen, averaged, deployed and exported is what the optimiser says is to be
evaluated: `optax.contrib.schedule_free_eval_params`, lookahead's slow parameters, SAM's without its
look around. BatchNorm's averages beside them are those of the parameters that were trained.

A layer that the optimiser never moves is frozen with its statistics, and the log says so: by
`optax.multi_transform` with `optax.set_to_zero`, `optax.freeze`, a mask. Its normalisations go by
their averages in training too, as under PyTorch's ``.eval()``; what they are told at the call is
overruled in Linen, and heard in NNX. That it never moves is proved from the optimiser's own
program; put the freezing outermost or first, since what comes later may move it again (weight
decay).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdistill.train._optax import TermsApart, masked

__all__ = ["DotState", "adamw", "dot", "kernels", "sgd"]

PyTree = Any
Decayed = Literal["all", "kernels"]
# The words of a name that say what a parameter is, whatever its rank. With several in a name,
# what is multiplied with decides: "embedding_kernel" is a kernel.
_MULTIPLIED = {"kernel", "weight", "w"}
_SPARED = {"bias", "b", "offset", "beta", "gamma", "scale", "scales", "token", "tokens"}
_SPARED |= {"embed", "embeds", "embedding", "embeddings", "pos", "position", "positions", "cls"}


def sgd(
  learning_rate: float | jax.Array,
  *,
  steps: int,
  milestones: Sequence[float] = (150 / 240, 180 / 240, 210 / 240),
  decay: float = 0.1,
  momentum: float = 0.9,
  weight_decay: float = 5e-4,
  nesterov: bool = False,
  clip_norm: float | None = None,
  decayed: Decayed = "all",
) -> optax.GradientTransformation:
  """SGD as the field's CIFAR recipes run it, in PyTorch's order of operations.

  The gradient is clipped, then coupled weight decay is added to it, then come momentum without
  dampening and the learning rate, which falls by ``decay`` at each milestone. Clipping is first as
  in PyTorch, where it is done before the optimiser's step: it bounds what a batch can do and leaves
  the decay, which needs no bound, as strong as in any other step.

  Args:
    learning_rate: 0.05 at batch 64 in RepDistiller and mdistiller. A scalar array, in a sweep
      under ``vmap``, is not checked.
    steps: the length of the run, in optimiser steps.
    milestones: shares of the run; by default epochs 150, 180 and 210 of 240.
    decay: the learning rate's factor at each milestone.
    momentum: 0.9 in all published recipes.
    weight_decay: 5e-4 in all published CIFAR recipes.
    nesterov: ReviewKD's own recipe uses it, the others do not.
    clip_norm: the largest norm that the gradient of student and objective together may have;
      a longer one is scaled down to it. None, as published, clips nothing.
    decayed: what weight decay is for. ``"all"``, as published: every trained tensor, BatchNorm's
      and the projectors' included. ``"kernels"``: what `kernels` marks.

  Returns:
    An optax optimiser. Under ``vmap`` over seeds each seed's gradient is clipped by its own norm.

  Raises:
    ValueError: an argument is out of its range.

  >>> optimizer = sgd(0.05, steps=240, clip_norm=1.0, decayed="kernels")
  >>> params = {"bias": jax.numpy.ones(2)}
  >>> gradients = {"bias": jax.numpy.array([30.0, 40.0])}
  >>> updates, _ = optimizer.update(gradients, optimizer.init(params), params)
  >>> [round(update, 4) for update in updates["bias"].tolist()]
  [-0.03, -0.04]
  """
  _check_run(learning_rate, steps, weight_decay, clip_norm, decayed)
  _check("momentum", momentum, _below_one, "in [0, 1), such as 0.9")
  schedule = _stairs(learning_rate, steps, milestones, decay)
  return optax.chain(
    *_clipping(clip_norm),
    optax.add_decayed_weights(weight_decay, mask=_mask(decayed)),
    optax.sgd(schedule, momentum=momentum, nesterov=nesterov),
  )


def _stairs(
  learning_rate: Any, steps: int, milestones: Sequence[float], decay: Any
) -> optax.Schedule:
  """A rate that falls by a factor at shares of the run."""
  _check("decay", decay, _not_negative, "at least 0: the learning rate's factor, such as 0.1")
  shares = tuple(milestones)
  in_run = all(0 <= share <= 1 for share in shares)
  _check("milestones", shares, lambda _: in_run, "shares of the run in [0, 1], not steps or epochs")
  # Milestones of a short run can fall on the same step: their factors multiply.
  boundaries: dict[int, float] = {}
  for share in shares:
    at = round(share * steps)
    boundaries[at] = boundaries.get(at, 1.0) * decay
  return optax.piecewise_constant_schedule(learning_rate, boundaries)


class DotState(NamedTuple):
  """What `dot` remembers.

  Attributes:
    wants: which terms' gradients it wants apart.
    labels: the momentum of their gradient, weight decay included.
    distilled: the momentum of all other terms' gradient.
    met: for each parameter ``[2]``, whether either gradient was ever not 0.
    count: of steps, for the rate.
  """

  wants: TermsApart
  labels: PyTree
  distilled: PyTree
  met: PyTree
  count: Any


def dot(
  learning_rate: float | jax.Array,
  *,
  steps: int,
  milestones: Sequence[float] = (150 / 240, 180 / 240, 210 / 240),
  decay: float = 0.1,
  momentum: float = 0.9,
  delta: float | jax.Array = 0.075,
  weight_decay: float = 5e-4,
  apart: Sequence[str] = ("labels",),
  decayed: Decayed = "all",
) -> optax.GradientTransformationExtraArgs:
  """The distillation-oriented trainer (DOT): SGD that follows the teacher longer than the labels.

  Two momenta, of the labels' gradient and of all other terms', each with its term's weight in it::

      v_labels    ← (momentum − delta) · v_labels    + g_labels + weight_decay · w
      v_distilled ← (momentum + delta) · v_distilled + g_distilled
      w           ← w − rate · (v_labels + v_distilled)

  A parameter that one of the two never reaches (a projector, the layers above a hint) has plain
  momentum, as in the published code. With ``delta=0`` it is `sgd`. The step hands over the two
  gradients, of one pass forward and two back; so it works under ``accumulate``, ``pmap`` and in a
  sweep (over ``delta`` too), and goes outermost: what an optax chain does to the gradient in front
  of it (a clip) would not be seen. Parts of a network are frozen around it as ever
  (`optax.multi_transform`).

  Args:
    learning_rate: 0.05 at batch 64 in mdistiller's CIFAR recipes, 0.2 at batch 256 on
      Tiny-ImageNet. A scalar array, in a sweep under ``vmap``, is not checked.
    steps: the length of the run, in optimiser steps.
    milestones: shares of the run at which the rate falls; by default epochs 150, 180, 210 of 240.
    decay: the learning rate's factor at each milestone.
    momentum: 0.9 in the published recipes.
    delta: 0.075 on CIFAR-100 and Tiny-ImageNet, 0.09 on ImageNet.
    weight_decay: 5e-4 on CIFAR-100.
    apart: the labels' terms, by name; ``"labels"`` in all recipes, and that of each of a cohort's
      members. At least one of these names must be a term of the objective.
    decayed: what weight decay is for, as in `sgd`.

  Returns:
    An optax optimiser.

  Raises:
    ValueError: an argument is out of its range; at the first step, no term is called so.

  Source: Zhao, Cui, Song, Liang, "DOT: A Distillation-Oriented Trainer", 2023.
  """
  _check_run(learning_rate, steps, weight_decay, None, decayed)
  _check("momentum", momentum, _below_one, "in [0, 1), such as 0.9")
  # A momentum that is traced is not looked at, nor what depends on it.
  room = 1.0 if isinstance(momentum, jax.Array) else min(momentum, 1 - momentum)
  _check(
    "delta",
    delta,
    lambda d: d == 0 or 0 < d < room,
    "at least 0 and below momentum and 1 - momentum: both momenta, momentum ± delta, lie in [0, 1)",
  )
  names = tuple(apart) if not isinstance(apart, str) else ()
  named = bool(names) and all(isinstance(name, str) for name in names)
  _check("apart", apart, lambda _: named, "a sequence of terms' names, such as ('labels',)")
  schedule = _stairs(learning_rate, steps, milestones, decay)
  decaying = optax.add_decayed_weights(weight_decay, mask=_mask(decayed))

  def init(params: PyTree) -> DotState:
    zeros = jax.tree.map(jnp.zeros_like, params)
    met = jax.tree.map(lambda _: jnp.zeros(2, bool), params)
    return DotState(TermsApart((names,)), zeros, zeros, met, jnp.zeros((), jnp.int32))

  def update(
    updates: PyTree,
    state: DotState,
    params: PyTree = None,
    *,
    gradients: Sequence[PyTree] = (),
    **extra: Any,
  ) -> tuple[PyTree, DotState]:
    del extra
    if len(gradients) != 2:
      raise ValueError(
        f"dot takes the gradients of {list(names)} and of all other terms apart, which "
        "train.make_step hands over; in a loop of your own, update(..., gradients=[first, second])."
      )
    # Inside a mask, what is hidden from it is hidden in these as well.
    labels, distilled = (masked(part, updates) for part in gradients)
    met = jax.tree.map(
      lambda m, *both: m | jnp.stack([jnp.any(g != 0) for g in both]), state.met, labels, distilled
    )
    labels, _ = decaying.update(labels, decaying.init(params), params)

    def moved(sign: int) -> Callable[..., jax.Array]:
      def move(velocity: jax.Array, gradient: jax.Array, met: jax.Array) -> jax.Array:
        now = jnp.where(jnp.all(met), momentum + sign * delta, momentum)
        return now.astype(velocity.dtype) * velocity + gradient

      return move

    first = jax.tree.map(moved(-1), state.labels, labels, met)
    second = jax.tree.map(moved(1), state.distilled, distilled, met)
    rate = jnp.asarray(schedule(state.count))
    steps = jax.tree.map(lambda a, b: -rate.astype(a.dtype) * (a + b), first, second)
    return steps, DotState(state.wants, first, second, met, state.count + 1)

  return optax.GradientTransformationExtraArgs(init, update)


def adamw(
  learning_rate: float | jax.Array,
  *,
  steps: int,
  warmup: float = 5 / 300,
  weight_decay: float = 0.05,
  b1: float = 0.9,
  b2: float = 0.999,
  clip_norm: float | None = None,
  decayed: Decayed = "kernels",
) -> optax.GradientTransformation:
  """AdamW with a linear warm-up and a cosine decay to 0: how transformers are trained.

  The gradient is clipped, then come Adam's moments (ε = 1e-8), then decoupled weight decay, then
  the learning rate, which multiplies both. Over the first w = ``warmup`` · ``steps`` steps the rate
  is ``learning_rate`` · (s + 1) / (w + 1) at step s, so that the very first step counts; after them
  ``learning_rate`` · (1 + cos(π (s − w) / (steps − w))) / 2.

  Args:
    learning_rate: the peak. DeiT's is 5e-4 · batch size / 512. A scalar array is not checked.
    steps: the length of the run, in optimiser steps.
    warmup: the share of the run that warms up; by default DeiT's 5 of 300 epochs.
    weight_decay: 0.05 is DeiT's.
    b1: Adam's decay of the first moment; 0.9 is Adam's own.
    b2: of the second; 0.999 is Adam's own.
    clip_norm: the largest norm that the gradient of student and objective together may have;
      a longer one is scaled down to it. None, as in DeiT, clips nothing.
    decayed: what weight decay is for. ``"kernels"``, as in DeiT: what `kernels` marks. ``"all"``:
      every trained tensor.

  Returns:
    An optax optimiser. Under ``vmap`` over seeds each seed's gradient is clipped by its own norm.

  Raises:
    ValueError: an argument is out of its range.

  Source: Loshchilov, Hutter, "Decoupled Weight Decay Regularization", 2019; numbers from Touvron et
  al., "Training data-efficient image transformers & distillation through attention", 2021.

  >>> optimizer = adamw(1e-3, steps=100, warmup=0.1)
  >>> params = {"kernel": jax.numpy.ones((2, 2))}
  >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
  >>> round(1e3 * updates["kernel"][0, 0].item(), 4)  # -(1 + 0.05) / 11
  -0.0955
  """
  _check_run(learning_rate, steps, weight_decay, clip_norm, decayed)
  _check("warmup", warmup, _below_one, "in [0, 1): the share of the run that warms up, not steps")
  _check("b1", b1, _below_one, "in [0, 1), such as 0.9")
  _check("b2", b2, _below_one, "in [0, 1), such as 0.999")
  # At least one step comes after the warm-up, however short the run is.
  warm = min(round(warmup * steps), steps - 1)
  schedule = optax.cosine_decay_schedule(learning_rate, steps - warm)
  if warm:
    rise = optax.linear_schedule(learning_rate / (warm + 1), learning_rate, warm)
    schedule = optax.join_schedules([rise, schedule], [warm])
  return optax.chain(
    *_clipping(clip_norm),
    optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=_mask(decayed)),
  )


def kernels(params: PyTree) -> PyTree:
  """Marks the parameters that weight decay is meant for: what inputs are multiplied with.

  That is what has at least two axes, unless its name says otherwise. Not marked are: norms' scales
  and biases, and any other bias or scale (an attention's bias has two axes, and so has a bias that
  ``nn.scan`` stacked over layers); vectors and numbers (VID's variances, a learned temperature);
  embedding tables, positions and class tokens, which are looked up or added, not multiplied with:
  decay would shrink the rows that a batch does not use.

  Only a parameter's own name counts (``kernel``, ``scale``, ``pos_embedding``), not those of the
  modules around it. A name that says nothing is judged by its axes.

  Args:
    params: parameters of any Linen or NNX module, of a projector, or a tree of such trees, one
      seed's (under ``vmap`` that is what an optimiser sees).

  Returns:
    A tree of the same structure with a bool for each leaf.

  >>> zeros = jax.numpy.zeros
  >>> kernels({"dense": {"kernel": zeros((3, 4)), "bias": zeros(4)}, "norm": {"scale": zeros(4)}})
  {'dense': {'bias': False, 'kernel': True}, 'norm': {'scale': False}}
  """
  return jax.tree_util.tree_map_with_path(lambda path, leaf: _is_kernel(path, leaf), params)


def _is_kernel(path: tuple[Any, ...], leaf: Any) -> bool:
  words = set(_name(path).lower().split("_"))
  if np.ndim(leaf) < 2:
    return False
  return bool(words & _MULTIPLIED) or not words & _SPARED


def _name(path: tuple[Any, ...]) -> str:
  """A parameter's own name: the last word of its path that is one."""
  for entry in reversed(path):
    name = getattr(entry, "key", getattr(entry, "name", None))
    # A parameter in a box (NNX's variables, Linen's partitioned ones) ends in ".value".
    boxed = isinstance(entry, jax.tree_util.GetAttrKey) and name in ("value", "raw_value")
    if isinstance(name, str) and not name.isdigit() and not boxed:
      return name
  return ""


def _mask(decayed: Decayed) -> Callable[[PyTree], PyTree] | None:
  return kernels if decayed == "kernels" else None


def _clipping(clip_norm: float | None) -> list[optax.GradientTransformation]:
  # No link at all without a norm: the state of a run saved without clipping keeps its structure.
  return [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]


def _check_run(
  learning_rate: Any, steps: Any, weight_decay: Any, clip_norm: Any, decayed: Any
) -> None:
  """Checks what both optimisers take."""
  _check("learning_rate", learning_rate, _not_negative, "a number of at least 0, such as 0.05")
  whole = isinstance(steps, int | np.integer) and bool(steps >= 1)
  _check(
    "steps", steps, lambda _: whole, "an integer of at least 1: the optimiser steps of the run"
  )
  _check("weight_decay", weight_decay, _not_negative, "at least 0; 0 turns it off")
  if clip_norm is not None:
    _check("clip_norm", clip_norm, lambda norm: norm > 0, "positive, or None to clip nothing")
  words = "'all' (every trained tensor) or 'kernels' (what train.optimizers.kernels marks)"
  _check("decayed", decayed, lambda word: word in ("all", "kernels"), words)


def _not_negative(value: Any) -> bool:
  return bool(0 <= value < math.inf)


def _below_one(value: Any) -> bool:
  return bool(0 <= value < 1)


def _check(name: str, value: Any, good: Callable[[Any], bool], must_be: str) -> None:
  # An array may be traced, in a sweep under vmap, and passes unread.
  if isinstance(value, jax.Array):
    return
  try:
    fine = good(value)
  except TypeError:
    fine = False
  if not fine:
    raise ValueError(f"{name}={value!r} must be {must_be}.")
