"""The parts that methods are put together from: labels, soft targets, a matched layer, sums."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdistill import _check, losses
from jaxdistill.recipes import projectors
from jaxdistill.recipes.parts import (
  Modules,
  Running,
  both_features,
  both_logits,
  hard_term,
  label_numbers,
  layer_names,
  learned,
  loss_of_numbers,
  recipe,
)
from jaxdistill.types import (
  Batch,
  Deployed,
  Number,
  Objective,
  ObjectiveFunction,
  Outputs,
  Term,
  Terms,
  as_objective,
)

__all__ = [
  "combine",
  "fitnet",
  "gaussian_regression",
  "hint",
  "kd",
  "labels",
  "multi_label",
  "regression",
  "teacher_bounded",
]

PyTree = Any


def _check_smoothing(label_smoothing: Any) -> None:
  _check.number("label_smoothing", label_smoothing, least=0, most=1)


@recipe(check=_check_smoothing)
def labels(
  student: Outputs,
  teacher: Outputs | None,
  batch: Batch,
  *,
  hard_weight: Number = 1.0,
  label_smoothing: float = 0.0,
) -> dict[str, Term]:
  """Cross-entropy on the labels alone: the baseline that distillation has to beat.

  Args:
    hard_weight: the term's weight; a keyword of the objective.
    label_smoothing: how much of the target is spread evenly over the classes.

  Returns:
    An objective with the one term ``labels``. It needs no teacher.
  """
  del teacher
  # [B]. An example without a label is left out by the mask, so its label may be anything.
  values = losses.cross_entropy(student.logits, batch.labels, label_smoothing=label_smoothing)
  return {"labels": Term(values, weight=hard_weight, where=batch.labelled)}


@recipe
def kd(
  student: Outputs,
  teacher: Outputs,
  batch: Batch,
  *,
  temperature: Number = 4.0,
  soft_weight: Number = 0.9,
  hard_weight: Number | None = 0.1,
) -> dict[str, Term]:
  """Soft targets and hard labels: Hinton, Vinyals, Dean, "Distilling the Knowledge", 2015.

  ``hard_weight * cross_entropy + soft_weight * soft_target_kl`` (the latter carries
  ``temperature ** 2``). Unlabelled examples take part in the soft term only.

  Args:
    temperature: default 4 and weights 0.9 and 0.1 as in RepDistiller and mdistiller's CIFAR-100
      protocol; all three are keywords of the objective and may follow a schedule.
    soft_weight: weight of the soft targets.
    hard_weight: weight of the labels; None leaves them out.

  Returns:
    An objective with the terms ``labels`` and ``soft``.
  """
  # [B]: T² KL(softmax(teacher / T) ‖ softmax(student / T)), which keeps its gradient's size.
  # It asks no label of the example, so it has no mask: the teacher knows something of all of them.
  soft = losses.soft_target_kl(student.logits, teacher.logits, temperature=temperature)
  return {
    "labels": hard_term(student, batch, hard_weight),
    "soft": Term(soft, weight=soft_weight),
  }


@recipe
def multi_label(
  student: Outputs,
  teacher: Outputs | None,
  batch: Batch,
  *,
  temperature: Number = 1.0,
  soft_weight: Number | None = 10.0,
  hard_weight: Number | None = 1.0,
) -> dict[str, Term]:
  """Multi-label logits distillation (MLD): labels that are each on or off, and soft ones.

  ``hard_weight * binary_cross_entropy + soft_weight * binary_soft_target_kl``, both summed over an
  example's labels. Where ``batch.labelled`` has the shape of the labels, it says of each label
  whether it is known; the teacher teaches all of them.

  Source: Yang, Xie, Zong, Feng, Niu, Sugiyama, Huang, "Multi-Label Knowledge Distillation", 2023.
  Its code sums the labels' term over the batch as well, and divides the soft one by the batch, so
  that their ratio is 10 to 64 at its batch size; its label-wise embeddings are not here.

  Args:
    temperature: of the soft labels; it and the weights are keywords of the objective.
    soft_weight: of the soft labels; None leaves that term out, and the teacher.
    hard_weight: of the labels; None leaves that term out.

  Returns:
    An objective with the terms ``labels`` and ``soft``. Unlabelled examples take part in the latter
    only. Labels must be ``[B, C]`` numbers, one for each logit.
  """
  terms: dict[str, Term] = {}
  if soft_weight is not None:
    pair = both_logits("multi_label", student, teacher)
    soft = losses.binary_soft_target_kl(*pair, temperature=temperature)
    terms["soft"] = Term(soft, weight=soft_weight)
  if hard_weight is None:
    return terms
  ours, known = student.logits, jnp.asarray(batch.labelled)
  each = known if known.ndim == ours.ndim else None
  values = losses.binary_cross_entropy(ours, batch.labels, where=each)
  # An example counts where any of its labels is known.
  where = known if each is None else jnp.any(each != 0, axis=-1)
  return {"labels": Term(values, weight=hard_weight, where=where), **terms}


def _check_regression(loss: Any) -> None:
  _check.function("loss", loss, "(student, target) -> [B]", arguments=2)


@recipe(check=_check_regression)
def regression(
  student: Outputs,
  teacher: Outputs | None,
  batch: Batch,
  *,
  loss: Callable[[Any, Any], jax.Array] = losses.logit_l2,
  soft_weight: Number | None = 0.5,
  hard_weight: Number | None = 0.5,
) -> dict[str, Term]:
  """Regression towards the labels and towards the teacher's numbers.

  ``hard_weight * loss(student, labels) + soft_weight * loss(student, teacher)``, where logits are
  the networks' numbers. The weights are ours: no paper's choice is common.

  Args:
    loss: ``(student, target) -> [B]``: `losses.logit_l2`, the squared error, or `losses.huber`.
    soft_weight: of the teacher's numbers; None leaves that term out, and the teacher: the baseline,
      or how a teacher is trained. It and the other weight are keywords of the objective.
    hard_weight: of the labels; None leaves that term out.

  Returns:
    An objective with the terms ``labels`` and ``soft``. Unlabelled examples take part in the latter
    only. Labels must be numbers ``[B, D]`` of as many outputs, or ``[B]`` of one; of a table with
    holes (``batch.labelled`` ``[B, D]``) each number counts by itself.
  """
  terms: dict[str, Term] = {}
  if soft_weight is not None:
    soft = loss_of_numbers(loss, batch, both_logits("regression", student, teacher))
    terms["soft"] = Term(soft, weight=soft_weight)
  if hard_weight is None:
    return terms
  values = loss_of_numbers(loss, batch, (student.logits, label_numbers(batch, student.logits)))
  return {"labels": Term(values, weight=hard_weight, where=batch.labelled), **terms}


@recipe
def teacher_bounded(
  student: Outputs,
  teacher: Outputs | None,
  batch: Batch,
  *,
  margin: Number = 0.0,
  bounded_weight: Number = 0.5,
  hard_weight: Number | None = 1.0,
) -> dict[str, Term]:
  """Teacher-bounded regression: the labels' error once more, where the student is no better.

  ``hard_weight * huber(student, labels) + bounded_weight * teacher_bounded``, where logits are the
  networks' numbers.

  Source: Chen, Choi, Yu, Han, Chandraker, "Learning Efficient Object Detection Models with
  Knowledge Distillation", 2017. Its numbers are boxes, in a detector.

  Args:
    margin: by how much, squared, the student has to be better; a keyword, as the weights are.
    bounded_weight: of the bounded error; 0.5 in the paper.
    hard_weight: of the labels; None leaves that term out.

  Returns:
    An objective with the terms ``labels`` and ``bounded``; both count labelled examples only.
    Labels must be numbers ``[B, D]`` of as many outputs, or ``[B]`` of one.
  """
  ours, theirs = both_logits("teacher_bounded", student, teacher)
  target, known = label_numbers(batch, ours), jnp.asarray(batch.labelled)
  # Who is nearer to the target is asked of an example's numbers together: those that are known.
  there = jnp.expand_dims(known, range(known.ndim, target.ndim))
  seen = (jnp.where(there > 0, x, jnp.zeros_like(x)) for x in (ours, theirs, target))
  bounded = losses.teacher_bounded(*seen, margin=margin)
  where = known if known.ndim < target.ndim else jnp.max(known, axis=-1)
  terms = {"bounded": Term(bounded, weight=bounded_weight, where=where)}
  if hard_weight is None:
    return terms
  values = loss_of_numbers(losses.huber, batch, (ours, target))
  return {"labels": Term(values, weight=hard_weight, where=known), **terms}


@recipe
def gaussian_regression(
  student: Outputs,
  teacher: Outputs | None,
  batch: Batch,
  *,
  floor: Number = 1e-6,
  soft_weight: Number | None = 0.5,
  hard_weight: Number | None = 0.5,
) -> dict[str, Term]:
  """Heteroscedastic regression (UDD): the student learns the teacher's numbers and its doubt.

  ``hard_weight * gaussian_nll(student, labels) + soft_weight * gaussian_kl(student, teacher)``,
  where logits ``[B, 2D]`` are D means and then D logarithms of variances. The weights are ours.

  Args:
    floor: the least variance, > 0; a keyword of the objective, as the weights are.
    soft_weight: of the teacher's Gaussians; None leaves that term out, and the teacher.
    hard_weight: of the labels; None leaves that term out.

  Returns:
    An objective with the terms ``labels`` and ``soft``. Unlabelled examples take part in the latter
    only. Labels must be numbers ``[B, D]``, or ``[B]`` where D is 1; of a table with holes
    (``batch.labelled`` ``[B, D]``) each number counts by itself.
  """
  terms: dict[str, Term] = {}
  if soft_weight is not None:
    pair = both_logits("gaussian_regression", student, teacher)
    soft = loss_of_numbers(functools.partial(losses.gaussian_kl, floor=floor), batch, pair)
    terms["soft"] = Term(soft, weight=soft_weight)
  if hard_weight is None:
    return terms
  loss, numbers = (
    functools.partial(losses.gaussian_nll, floor=floor),
    label_numbers(batch, student.logits, each=2),
  )
  values = loss_of_numbers(loss, batch, (student.logits, numbers))
  return {"labels": Term(values, weight=hard_weight, where=batch.labelled), **terms}


def hint(
  student_layer: str | Mapping[str, str],
  teacher_layer: str | None = None,
  *,
  hint_weight: float = 1.0,
  loss: Callable[[jax.Array, jax.Array], jax.Array] = losses.hint_l2,
  projector: Callable[[Any, Any], nn.Module] = projectors.between,
  positions: Callable[[Batch], Any] | None = None,
  name: str = "hint",
) -> Objective:
  """Matches intermediate layers, one or several, through projectors where the shapes differ.

  Romero et al., "FitNets: Hints for Thin Deep Nets", 2015. The projector is trained with the
  student and is no part of the deployed network. A convolution's map and a transformer's tokens
  meet too (`projectors.between`)::

      hint({"stage1": "block3", "stage2": "block6", "stage3": "block11"})

  Args:
    student_layer: a feature's name in the student's `Outputs`; or several, each with the teacher's
      that it is matched with, ``{student's: teacher's}``.
    teacher_layer: a feature's name in the teacher's; ``"0/hidden"`` for an ensemble's member 0.
      None for the same name, and where ``student_layer`` says it.
    hint_weight: the term's weight; the objective's keyword for it is ``"<name>_weight"``. Of
      several layers each has it.
    loss: ``(student, teacher) -> [B]``.
    projector: ``(student, teacher) -> module`` from the two features' shapes; it is left out when
      the shapes are equal. Of several layers each has its own, ``projector<i>``.
    positions: ``batch -> [B, L]``, which tokens count (not 0), where the batch's weights are
      ``[B]`` and say nothing of them: ``lambda batch: batch.inputs["attention_mask"]``. None for
      all that the weights have.
    name: the term's name.

  Returns:
    An `Objective` with the one term ``name``; of several layers with a term for each,
    ``<name>/<student's layer>``, since tokens and maps count by other masks.

  Raises:
    TypeError, ValueError: a layer is no name, or several have none; when it is initialised and a
      layer is not among the features, or two layers can't be matched.

  >>> sorted(hint({"stage1": "block3", "stage2": "block6"}, name="match").hyper)
  ['match_weight']
  """
  _check.function("loss", loss, "(student, teacher) -> [B]", arguments=2)
  if positions is not None:
    _check.function("positions", positions, "batch -> [B, L]", arguments=1)
  if not isinstance(student_layer, Mapping):
    pairs = {"": layer_names(student_layer, teacher_layer)}
  elif teacher_layer is not None or not student_layer:
    raise ValueError(
      f"student_layer={student_layer!r} and teacher_layer={teacher_layer!r}: of several layers the "
      "mapping says both networks', {'stage1': 'block3', ...}, at least one pair."
    )
  else:
    pairs = {f"/{layer}": layer_names(layer, taught) for layer, taught in student_layer.items()}
  return _matched(pairs, projector, loss, name, hint_weight, positions=positions)


def fitnet(
  student_layer: str = "stage2",
  teacher_layer: str = "stage2",
  *,
  hint_weight: float = 100.0,
  hard_weight: float | None = 1.0,
  projector: Callable[[Any, Any], nn.Module] = projectors.between,
) -> Objective:
  """FitNets in one stage, as RepDistiller and mdistiller run it: labels and one matched map.

  Romero et al., "FitNets: Hints for Thin Deep Nets", 2015 (the paper trains the hint first).

  Args:
    student_layer: the guided layer; the second stage in the published code.
    teacher_layer: the hint layer.
    hint_weight: 100 in the published code.
    hard_weight: 1 in the published code; None leaves the labels out.
    projector: ``(student, teacher) -> module`` from the two features' shapes; it is left out when
      the shapes are equal.

  Returns:
    An `Objective` with the terms ``labels`` and ``hint``.
  """
  pairs = {"": layer_names(student_layer, teacher_layer)}
  return _matched(pairs, projector, losses.hint_l2, "hint", hint_weight, hard_weight)


def _matched(
  pairs: Mapping[str, tuple[str, str]],
  projector: Callable[[Any, Any], nn.Module],
  loss: Callable[[jax.Array, jax.Array], jax.Array],
  name: str,
  weight: float,
  hard_weight: float | None = None,
  *,
  positions: Callable[[Batch], Any] | None = None,
) -> Objective:
  """Layers matched, by what their terms add to the name; one keyword for all."""
  _check.function("projector", projector, "(student, teacher) -> module", arguments=2)

  def modules(student: Outputs, teacher: Outputs | None) -> Modules:
    found: dict[str, tuple[Any, Any]] = {}
    for i, layers in enumerate(pairs.values()):
      # Shapes here, from an abstract evaluation of both networks: nobody types a width in by hand.
      ours, theirs = both_features(student, teacher, layers)
      # Where the shapes are the same, the student's own feature is the teacher's to match.
      same = ours.shape[1:] == theirs.shape[1:]
      found[_numbered(i, pairs)] = (None if same else projector(ours, theirs), ours)
    return found

  def method(
    running: Running, student: Outputs, teacher: Outputs, batch: Batch, **now: Any
  ) -> dict[str, Term]:
    where = None if positions is None else jnp.asarray(positions(batch)) != 0
    terms = {}
    for i, (added, (_, theirs)) in enumerate(pairs.items()):
      # The projector meets the teacher; the layers below it get their gradient through it.
      values = loss(running(_numbered(i, pairs)), teacher.features[theirs])
      terms[name + added] = Term(values, weight=now[f"{name}_weight"], where=where)
    return terms

  return learned(modules, method, {f"{name}_weight": weight}, hard_weight)


def _numbered(i: int, pairs: Mapping[str, Any]) -> str:
  """The name of a layer's projector; of the only one, without a number."""
  # By number: a feature's name may have slashes, which part a path in a checkpoint.
  return f"projector{i}" if len(pairs) > 1 or "" not in pairs else "projector"


def combine(*objectives: Objective | ObjectiveFunction) -> Objective:
  """Adds objectives up: the union of their terms, each with parameters and state of its own.

  Every recipe has a term on the labels, and a sum needs one of them at most: ``hard_weight=None``
  leaves it out, ``combine(kd(), pkt(hard_weight=None))``.

  Args:
    *objectives: pairs or bare functions. A keyword that several of them take goes to all of them.

  Returns:
    One `Objective`.

  Raises:
    ValueError: there is none; or, at trace time, two of them name a term alike.

  >>> sorted(combine(kd(), hint("pooled", "pooled")).hyper)
  ['hard_weight', 'hint_weight', 'soft_weight', 'temperature']
  """
  if not objectives:
    raise ValueError("combine needs at least one objective.")
  parts = [as_objective(o) for o in objectives]
  # Below, each part's parameters and state lie under its number: two may name a module alike.

  def init(key: Any, student: Outputs, teacher: Outputs | None) -> tuple[PyTree, PyTree]:
    keys = jax.random.split(key, len(parts))
    pairs = [part.init(k, student, teacher) for part, k in zip(parts, keys, strict=True)]
    return (
      {str(i): params for i, (params, _) in enumerate(pairs)},
      {str(i): state for i, (_, state) in enumerate(pairs)},
    )

  def apply(
    params: PyTree, state: PyTree, *seen: Any, key: Any, **hyper: Any
  ) -> tuple[Terms, PyTree]:
    terms: Terms = {}
    states = {}
    for i, part in enumerate(parts):
      own = {name: value for name, value in hyper.items() if name in part.hyper}
      # A key of its own, or two parts that draw would draw the same.
      own["key"] = jax.random.fold_in(key, i)
      found, states[str(i)] = part.apply(params[str(i)], state[str(i)], *seen, **own)
      # Of two terms of one name a log would show one, and a sum count one.
      twice = sorted(set(found) & set(terms))
      if twice:
        raise ValueError(
          f"two objectives name a term {twice}: leave the labels out of all recipes but one, "
          "hard_weight=None; give another term another name, name=..."
        )
      terms.update(found)
    return terms, states

  def check(**values: Any) -> None:
    for part in parts:
      if part.check is not None:
        part.check(**{name: value for name, value in values.items() if name in part.hyper})

  # An earlier objective's default is the one that is shown; each part keeps its own.
  hyper = {name: value for part in reversed(parts) for name, value in part.hyper.items()}
  return Objective(init=init, apply=apply, hyper=hyper, deployed=_deployed_of(parts), check=check)


def _deployed_of(parts: list[Objective]) -> Deployed | None:
  """The one part's deployed network, which finds its own parameters and state."""
  found = {str(i): part.deployed for i, part in enumerate(parts) if part.deployed is not None}
  if not found:
    return None
  if len(found) > 1:
    raise ValueError(f"{len(found)} objectives deploy a network of their own; combine one at most.")
  ((name, deployed),) = found.items()
  # Of the combined trees it sees its own branch, as if it were alone.
  return Deployed(
    network=deployed.network,
    variables=lambda student, params, state: deployed.variables(student, params[name], state[name]),
  )
