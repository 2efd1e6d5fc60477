"""Pre-flight checks of a language model's teacher: labels, text, vocabulary, length of its context.

Each is a function of measured numbers alone, from `probe_tokens`, and returns a `Finding`, or None
where all is well. `jaxdistill.search.preflight` asks them. Every threshold is an argument. Errors
are over windows: the tokens of one are no independent draws.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import _check
from jaxdistill._compile import quickly
from jaxdistill.evaluation import tasks
from jaxdistill.search._checks.findings import Finding, percent
from jaxdistill.search._checks.teacher_checks import mean_and_error
from jaxdistill.types import Batch, Outputs, Teacher

__all__ = [
  "ProbedTokens",
  "long_context",
  "memorised",
  "padded_vocabulary",
  "probe_tokens",
  "shifted_labels",
  "targets",
  "tokens_of",
]

# Places beside the label at which it might have been meant, and the k of the first k tokens.
SHIFTS, TOP = (-1, 0, 1), (1, 8, 64)


@dataclasses.dataclass(frozen=True)
class ProbedTokens:
  """What a teacher says of N windows of L tokens; ``[N, L]`` each where nothing else is said.

  Attributes:
    nll: ``[3, N, L]`` nats, of the label of the position before, of its own, and of that after.
    where: how much each position counts.
    between: which positions have all three labels in one document.
    entropy: of its distribution, in nats.
    mass: how probable its first k tokens are, by k.
    beyond: how probable all tokens are that the data's vocabulary has not.
    positions: inside the document.
    vocabulary: V of its logits.
  """

  nll: np.ndarray
  where: np.ndarray
  between: np.ndarray
  entropy: np.ndarray
  mass: Mapping[int, np.ndarray]
  beyond: np.ndarray
  positions: np.ndarray
  vocabulary: int

  @property
  def windows(self) -> np.ndarray:
    """The mean nll of each window that has something that counts."""
    return _by_window(self.nll[1], self.where)


def probe_tokens(
  teacher: Teacher, batches: Iterable[Batch], *, vocabulary: int = 0, most: int = 8192
) -> ProbedTokens:
  """Measures a teacher on some windows, one after another: no array of all tokens' logits.

  Args:
    teacher: with logits ``[B, L, V]``, or what they are made of.
    batches: leaves ``[B, ...]`` with labels ``[B, L]``.
    vocabulary: how many tokens the data has; 0 where nobody knows.
    most: tokens after which no further batch is looked at.
  """

  def run(teacher: Teacher, batch: Batch) -> dict[str, Any]:
    outputs = teacher(batch)
    labels = jnp.asarray(batch.labels)
    where = tasks.counted(batch, labels)
    inputs = batch.inputs if isinstance(batch.inputs, Mapping) else {}
    at = jnp.broadcast_to(jnp.arange(labels.shape[1]), labels.shape)
    segments = inputs.get("segments", jnp.ones_like(labels))
    one = {
      "logits": outputs.logits,
      "hidden": outputs.hidden if outputs.logits is None else None,
      "labels": jnp.where(where > 0, labels, 0),
      "where": where,
      "segments": segments,
    }
    found = jax.lax.map(lambda row: _of_window(row, outputs.head, vocabulary), one)
    return {**found, "where": where, "positions": inputs.get("positions", at)}

  measure = quickly(run)
  parts: list[dict[str, np.ndarray]] = []
  for batch in batches:
    parts.append(jax.device_get(measure(teacher, batch)))
    if sum(part["where"].size for part in parts) >= most:
      break
  joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
  return ProbedTokens(
    nll=np.moveaxis(joined["nll"], 1, 0),
    where=joined["where"],
    between=joined["between"],
    entropy=joined["entropy"],
    mass={k: joined[f"mass {k}"] for k in TOP if f"mass {k}" in joined},
    beyond=joined["beyond"],
    positions=joined["positions"],
    vocabulary=int(joined["vocabulary"][0]),
  )


def _of_window(row: Mapping[str, Any], head: Any, vocabulary: int) -> dict[str, Any]:
  """What `ProbedTokens` has, of one window."""
  logits = row["logits"] if row["hidden"] is None else head(row["hidden"][None])[0]
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)  # [L, V]
  p = jnp.exp(log_p)
  length, size = log_p.shape
  there, nll = jnp.ones(length, bool), []
  for shift in SHIFTS:
    # Rolled labels of the other end are those of another place: at the ends nothing is compared.
    labels, where, segments = (
      jnp.roll(row[name], -shift) for name in ("labels", "where", "segments")
    )
    inside = jnp.arange(length) + shift
    there &= (where > 0) & (segments == row["segments"]) & (inside >= 0) & (inside < length)
    nll.append(-jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0])
  best = jax.lax.top_k(p, min(max(TOP), size))[0]
  return {
    "nll": jnp.stack(nll),
    "between": there,
    "entropy": -jnp.sum(jnp.where(p > 0, p * log_p, 0), axis=-1),
    "beyond": jnp.sum(p[:, vocabulary:], axis=-1) if vocabulary else jnp.zeros(length),
    "vocabulary": jnp.asarray(size),
    **{f"mass {k}": jnp.sum(best[:, :k], axis=-1) for k in TOP if k <= size},
  }


def _by_window(values: np.ndarray, where: Any) -> np.ndarray:
  """The means of the windows ``[N]`` that have something that counts."""
  weights = np.asarray(where, np.float64)
  counts = weights.sum(axis=1)
  total = np.where(weights > 0, weights * np.asarray(values, np.float64), 0).sum(axis=1)
  return total[counts > 0] / counts[counts > 0]


def shifted_labels(
  probed: ProbedTokens, *, share: float = 0.05, errors: float = 2.0
) -> Finding | None:
  """Whether the teacher knows a neighbour's label better than each position's own.

  From shapes nobody can see whether labels were shifted twice, or not at all. A teacher that was
  trained on the right ones knows: its loss is least where they are.

  Args:
    probed: from `probe_tokens`.
    share: by which part the neighbour's loss has to be lower.
    errors: how many standard errors of the mean paired difference are noise.

  Returns:
    A finding with the nll at the shifts −1, 0 and 1, or None.
  """
  if not probed.between.any():
    return None
  here = [_by_window(nll, probed.between) for nll in probed.nll]
  means = [float(one.mean()) for one in here]
  best = int(np.argmin(means))
  drop, error = mean_and_error(here[1] - here[best])
  if best == 1 or not drop > max(share * means[1], errors * error):
    return None
  how = {-1: "shifted once too often", 1: "not shifted at all"}[SHIFTS[best]]
  return Finding(
    "shifted_labels",
    f"The labels look shifted by {-SHIFTS[best]}, {how}: of the label one position "
    f"{'before' if best == 0 else 'later'} the teacher has an nll of {means[best]:.4g} nats, and "
    f"of each position's own {means[1]:.4g}.",
    "labels[l] is what position l predicts, the token after it. data.from_text, data.pack and "
    "data.shifted make such labels, once; nothing else shifts. If the labels are right, the "
    "teacher's own are not: look how it was trained.",
    {"nll": dict(zip(map(str, SHIFTS), means, strict=True)), "shift": SHIFTS[best]},
  )


def memorised(
  train: ProbedTokens, held_out: ProbedTokens, *, share: float = 0.25, errors: float = 3.0
) -> Finding | None:
  """Whether the teacher knows the student's training text far better than other text.

  It has then read that text, often enough to know it by heart, and its distribution there says
  more of the text than of the language: soft targets become hard ones. (Where the held-out text is
  of another kind it is harder by itself, and the finding says only that.)

  Args:
    train: of windows of the student's training text.
    held_out: of windows of other text.
    share: by which part the nll on the training text has to be lower.
    errors: how many standard errors of the difference, over windows, are noise.

  Returns:
    A finding, or None.
  """
  (ours, one), (other, two) = (mean_and_error(x.windows) for x in (train, held_out))
  error = math.hypot(one, two)
  if not other - ours > max(share * other, errors * error):
    return None
  return Finding(
    "memorised",
    f"The teacher seems to know the training text by heart: its nll there is {ours:.4g} nats a "
    f"token, and {other:.4g} on held-out text (standard error of the difference {error:.2g}).",
    "What it says of text that it has learnt is hardly softer than the labels. Distil on text that "
    "it has not read, stop its training earlier, or train it with dropout or on more text. If the "
    "two texts are of different kinds, hold out some of the training text instead.",
    {"train": ours, "held_out": other, "standard_error": error},
  )


def targets(
  probed: ProbedTokens, *, sharp: float = 0.05, flat: float = 0.95, temperature: float | None = None
) -> Finding | None:
  """Whether the teacher's distribution says hardly more than its first token, or nothing at all.

  Args:
    probed: from `probe_tokens`.
    sharp: nats of entropy a token below which it is nearly one-hot.
    flat: which part of the entropy of V tokens that are equally likely is nearly that.
    temperature: the objective's, for the advice.

  Returns:
    A finding with the entropy and the mass of the first 1, 8 and 64 tokens, or None.
  """
  there = probed.where > 0
  if not there.any():
    return None
  entropy = float(probed.entropy[there].mean())
  mass = {k: float(one[there].mean()) for k, one in probed.mass.items()}
  values = {"entropy": entropy, **{f"top_{k}": one for k, one in mass.items()}}
  most = math.log(probed.vocabulary)
  told = f"{entropy:.3g} nats a token of {most:.3g}, the first token with {percent(mass[1])}"
  if entropy < sharp:
    now = "" if temperature is None else f" (it is {temperature:g})"
    return Finding(
      "targets",
      f"The teacher's distribution is all but one token: an entropy of {told}.",
      f"Soft targets then say what labels say: raise the temperature{now}, or distil on text that "
      "the teacher is less sure of.",
      values,
    )
  if entropy > flat * most:
    return Finding(
      "targets",
      f"The teacher's distribution says next to nothing: an entropy of {told}.",
      "Look whether these are the trained variables, and whether its tokens are those of the "
      "data's tokenizer (teachers.frozen(model, tokenizer=...) asks it).",
      values,
    )
  return None


def padded_vocabulary(
  probed: ProbedTokens, vocabulary: int, *, largest: float = 1e-3
) -> Finding | None:
  """Whether the teacher gives probability to columns that are no token of the data.

  Args:
    probed: from `probe_tokens`.
    vocabulary: how many tokens the data has; 0 where nobody knows.
    largest: the mean probability of all of them that is let pass.

  Returns:
    A finding, or None.
  """
  there = probed.where > 0
  if not vocabulary or probed.vocabulary <= vocabulary or not there.any():
    return None
  _check.whole("vocabulary", vocabulary)
  mass = float(probed.beyond[there].mean())
  if mass <= largest:
    return None
  return Finding(
    "vocabulary",
    f"The teacher has {probed.vocabulary} tokens and the data {vocabulary}: those beyond, which "
    f"stand for no text, have {percent(mass)} of its probability.",
    f"teachers.vocabulary(teacher, {vocabulary}) leaves them out, and the student is built with as "
    "many. If they are tokens after all, the data are of another tokenizer.",
    {"teacher": probed.vocabulary, "data": vocabulary, "mass": mass},
  )


def long_context(
  probed: ProbedTokens, *, parts: int = 8, share: float = 0.1, errors: float = 3.0
) -> Finding | None:
  """Whether the teacher grows worse towards the end of a window: it was trained on shorter ones.

  With more context a token is easier to tell, so that the loss falls along the window, or stays.

  Args:
    probed: from `probe_tokens`.
    parts: into how many the positions of a document are split, from the first to the last.
    share: by which part of itself the nll of the last has to be above the least of the others.
    errors: how many standard errors of the difference, over windows, are noise.

  Returns:
    A finding with the nll of every part, or None.
  """
  _check.whole("parts", parts, least=2)
  there = probed.where > 0
  length = 1 + int(probed.positions[there].max(initial=0))
  if length < parts:
    return None
  part = probed.positions * parts // length
  each = [_by_window(probed.nll[1], probed.where * (part == i)) for i in range(parts)]
  if any(len(one) < 2 for one in each):
    return None
  found = [mean_and_error(one) for one in each]
  best = min(range(parts - 1), key=lambda i: found[i][0])
  rise = found[-1][0] - found[best][0]
  error = math.hypot(found[-1][1], found[best][1])
  if not rise > max(share * found[best][0], errors * error):
    return None
  starts = [-(-i * length // parts) for i in range(parts)]
  return Finding(
    "context",
    f"The teacher grows worse along the window: its nll is {found[best][0]:.4g} nats from position "
    f"{starts[best]} on and {found[-1][0]:.4g} from position {starts[-1]} on.",
    f"It was trained on shorter windows than these of {length}, more likely than not: make the "
    "data with a smaller length=, or train it further on long ones. "
    "evaluation.tasks.tokens(by_position=...) shows the same of the student.",
    {"nll": [mean for mean, _ in found], "from": starts},
  )


def tokens_of(outputs: Outputs, batch: Batch) -> bool:
  """Whether logits (of shapes) are of tokens: ``[B, L, V]`` beside labels ``[B, L]`` of integers.

  Args:
    outputs: a network's, with logits.
    batch: leaves ``[B, ...]``.
  """
  logits, labels = outputs.logits, batch.labels
  whole = jnp.issubdtype(labels.dtype, jnp.integer)
  return bool(
    logits is not None and logits.ndim == 3 and whole and logits.shape[:2] == labels.shape
  )
