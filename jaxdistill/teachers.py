"""Teachers: ``(variables, batch) -> Outputs``, frozen here and nowhere else.

Gradients stop at a teacher's variables and outputs, its BatchNorm runs on its running averages,
and its variables are an argument of the program, never a closure.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import checkpoint
from jaxdistill import run as run_lib
from jaxdistill.types import Batch, Network, Outputs, Teacher, compute_dtype

__all__ = ["RULES", "combine_logits", "ensemble", "frozen", "restore", "unstack"]

PyTree = Any
RULES = ("mean_logits", "log_mean_probability", "mean_log_probability")


def frozen(network: Network) -> Teacher:
  """A network as a teacher: evaluated in inference mode, gradients stopped.

  Args:
    network: from `jaxdistill.capture`.

  Returns:
    ``teach(variables, batch) -> Outputs``.
  """

  def teach(variables: PyTree, batch: Batch) -> Outputs:
    variables = jax.lax.stop_gradient(variables)
    outputs, _ = network.apply(variables, batch.inputs, train=False, key=None)
    return jax.lax.stop_gradient(outputs)

  return teach


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


def ensemble(
  members: Sequence[Network | Teacher], *, rule: str = "mean_logits", weights: Any = None
) -> Teacher:
  """Any number of networks, of any architectures, as one teacher.

  Args:
    members: networks, or teachers.
    rule: how logits are combined, see `combine_logits`.
    weights: ``[M]``; equal by default.

  Returns:
    ``teach(variables, batch) -> Outputs`` where ``variables`` is a sequence with one entry for
    each member. Features are named ``"<member>/<feature>"``, members counted from 0.

  Raises:
    ValueError: there is no member, the rule is unknown, or the weights do not fit; and at trace
      time, when the members' class counts differ or the variables are not one for each member.
  """
  if not members:
    raise ValueError("members is empty: an ensemble needs at least one network.")
  if rule not in RULES:
    raise ValueError(f"rule={rule!r} is unknown; it is one of {', '.join(RULES)}.")
  share = _shares(weights, len(members))
  taught = [frozen(m) if isinstance(m, Network) else m for m in members]

  def teach(variables: Sequence[PyTree], batch: Batch) -> Outputs:
    if len(variables) != len(taught):
      raise ValueError(
        f"variables has {len(variables)} entries for {len(taught)} members; give a sequence with "
        "one pytree for each member (teachers.unstack makes it from a run over seeds)."
      )
    outputs = [member(v, batch) for member, v in zip(taught, variables, strict=True)]
    classes = [o.logits.shape[-1] for o in outputs]
    if len(set(classes)) > 1:
      raise ValueError(f"the members put out different class counts: {classes}.")
    features = {
      f"{m}/{name}": value for m, o in enumerate(outputs) for name, value in o.features.items()
    }
    combined = combine_logits([o.logits for o in outputs], rule=rule, weights=share)
    return Outputs(logits=combined, features=features)

  return teach


def unstack(variables: PyTree) -> list[PyTree]:
  """Takes a run over seeds apart: leaves ``[S, ...]`` become S pytrees.

  >>> [v["w"].tolist() for v in unstack({"w": jnp.array([[1.0], [2.0]])})]
  [[1.0], [2.0]]
  """
  count = jax.tree.leaves(variables)[0].shape[0]
  return [jax.tree.map(lambda leaf, i=i: leaf[i], variables) for i in range(count)]


def restore(run: str | os.PathLike[str], *, step: int | None = None, like: PyTree = None) -> PyTree:
  """Reads the trained network's variables from a run folder of ours.

  Args:
    run: the folder that `jaxdistill.train.fit` wrote.
    step: which checkpoint; the last one that verifies by default.
    like: variables (or their shapes) that the result must have the structure of.

  Returns:
    The variables of the student of that run; with leaves ``[S, ...]`` for a run over seeds.

  Raises:
    FileNotFoundError: there is no usable checkpoint.
    ValueError: the run is not finished (its last usable checkpoint is not of its last step), and
      ``step`` does not ask for an earlier one.
  """
  folder = pathlib.Path(run) / "checkpoints"
  if not folder.is_dir():
    raise FileNotFoundError(f"run={str(run)!r} holds no checkpoints (no folder {folder}).")
  with checkpoint.Checkpoints(folder) as saved:
    chosen = saved.latest() if step is None else step
    if chosen is None:
      raise FileNotFoundError(f"{folder} holds no checkpoint that verifies.")
    steps = run_lib.read_config(run)["steps"]
    if step is None and chosen != steps:
      raise ValueError(
        f"the run {os.fspath(run)!r} stands at step {chosen} of {steps}; start it again to finish "
        f"it, or pass step={chosen} to take it as it is."
      )
    if like is not None:
      return saved.restore(chosen, {"student": like})["student"]
    return saved.restore(chosen)["student"]
