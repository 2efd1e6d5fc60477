"""What a training run shows of itself: its folder, lines, a bar; and a stop at a bad number."""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import arguments
from jaxdistill import mesh as mesh_lib
from jaxdistill import run as run_lib
from jaxdistill.arguments import show
from jaxdistill.progress import bar
from jaxdistill.state import State

__all__ = ["Log", "check_counted", "check_finite", "check_state", "check_validation", "claimed"]

PyTree = Any

# ``(step, the line)``, after every line of the log.
Callback = Callable[[int, Mapping[str, Any]], None]


class Log:
  """Turns a chunk's sums into a line of the log, a place on the bar and a call of the callback.

  Args:
    folder: the run's folder; None keeps the lines in memory alone.
    steps: how many steps the run has.
    at: the step that it goes on from.
    epoch: how many steps an epoch has.
    examples: how many examples a step has, over all seeds.
    schedules: the objective's keywords that follow a schedule.
    progress: the bar's label; None for no bar.
    tensorboard: whether to write TensorBoard's files too.
    select: the validation metric that the bar shows.
    callback: ``(step, line)``, after every line.
  """

  def __init__(
    self,
    folder: pathlib.Path | None,
    *,
    steps: int,
    at: int,
    epoch: int,
    examples: int,
    schedules: Mapping[str, Callable[[int], Any]],
    progress: str | None,
    tensorboard: bool,
    select: str,
    callback: Callback | None,
  ) -> None:
    self._metrics = run_lib.Metrics(folder, resumed_from=at, tensorboard=tensorboard)
    self._bar = bar(steps, progress, unit="step", initial=at)
    self._epoch, self._examples, self._schedules = epoch, examples, schedules
    self._select, self._callback = select, callback
    self._clock = time.perf_counter()
    self._shown = progress is not None

  @property
  def history(self) -> list[dict[str, Any]]:
    """The lines so far."""
    return self._metrics.history

  def write(
    self, sums: PyTree, begin: int, end: int, validation: Mapping[str, Any] | None = None
  ) -> None:
    """Writes the line of steps ``begin .. end``.

    Args:
      sums: ``{name: (sum, count)}`` on the host, with an axis over steps last.
      begin: the step before the first.
      end: the last step.
      validation: numbers of a validation at ``end``.
    """
    record = _means(sums)
    now = time.perf_counter()
    rate = self._examples * (end - begin) / (now - self._clock)
    self._clock = now
    record |= {name: float(schedule(end - 1)) for name, schedule in self._schedules.items()}
    record |= {f"validation/{name}": value for name, value in (validation or {}).items()}
    record |= {"epoch": end / self._epoch, "examples_per_second": round(rate, 1)}
    self._metrics.write(end, record)
    self._bar.update(end - begin)
    shown = {"loss": record["loss"]}
    if self._select in (validation or {}):
      shown[f"validation {self._select}"] = record[f"validation/{self._select}"]
    self._bar.set_postfix({name: f"{np.mean(value):.4f}" for name, value in shown.items()})
    if self._callback is not None:
      self._callback(end, self.history[-1])

  def say(self, text: str) -> None:
    """Prints a line where the bar is shown."""
    if self._shown:
      self._bar.clear()
      print(text, file=sys.stderr)

  def close(self) -> None:
    """Closes the bar and the files."""
    self._bar.close()
    self._metrics.close()


def _means(sums: PyTree) -> dict[str, Any]:
  """Sums of each step ``[..., steps]`` to means over the chunk ``[...]``."""
  means = {}
  for name, (total, count) in sums.items():
    summed = np.asarray(count, np.float64).sum(axis=-1)
    means[name] = np.asarray(total, np.float64).sum(axis=-1) / np.where(summed == 0, 1, summed)
  return means


@contextlib.contextmanager
def claimed(folder: str | os.PathLike[str], settings: Mapping[str, Any]) -> Iterator[pathlib.Path]:
  """The run's folder; one newly claimed is given back where the run fails before a checkpoint.

  Args:
    folder: the run's folder.
    settings: what defines the run, for its ``config.json``.

  Yields:
    The folder.

  Raises:
    FileExistsError: it holds something else under a name of a run's.
    ValueError: it holds another run.
  """
  place = arguments.folder("folder", folder)
  for taken in (place / "checkpoints", place / "student"):
    ours = taken.is_dir() and (taken.name == "checkpoints" or (taken / "manifest.json").is_file())
    if taken.exists() and not ours:
      raise FileExistsError(f"{taken} is not a run's; move it, or take another folder.")
  fresh = not (place / "config.json").exists()
  path = _claim(place, settings)
  try:
    yield path
  except BaseException:
    if fresh and jax.process_index() == 0:
      run_lib.release(path)
    raise


def _claim(folder: pathlib.Path, settings: Mapping[str, Any]) -> pathlib.Path:
  """Process 0 claims the folder, and the others see after it whether it is theirs."""
  first = jax.process_index() == 0
  try:
    path = run_lib.claim(folder, settings) if first else folder
  finally:
    mesh_lib.barrier("claim")
  return path if first else run_lib.claim(folder, settings)


def check_validation(found: Any, select: str | None) -> dict[str, np.ndarray]:
  """What a user's ``validate`` returned, as arrays of numbers.

  Args:
    found: what it returned.
    select: the metric that must be among them, or None.

  Returns:
    ``{name: number}``; arrays over seeds.

  Raises:
    TypeError: it is no mapping to numbers.
    ValueError: ``select`` is not among them.
  """
  if not isinstance(found, Mapping):
    raise TypeError(f"validate must return {{name: number}}, got {show(found)}.")
  numbers = {name: np.asarray(value) for name, value in found.items()}
  for name, value in numbers.items():
    if value.dtype.kind not in "iufb" or value.ndim > 1:
      raise TypeError(
        f"validate must return {{name: number}} (or one number for each seed), and gave "
        f"{show(found[name])} for {name!r}."
      )
  if select is not None and select not in numbers:
    raise ValueError(
      f"select={select!r} is not among what validate returns, {sorted(numbers)}; name one of "
      "these, higher being better."
    )
  return numbers


def check_counted(sums: PyTree, num_classes: int, source: str) -> None:
  """Raises where no example has counted in any term, of data that has no labels.

  Args:
    sums: ``{name: (sum, count)}`` on the host.
    num_classes: of the data; 0 where it has no labels.
    source: the data's name.

  Raises:
    ValueError: nothing would ever be learned.
  """
  counts = [count for name, (_, count) in sums.items() if name not in ("loss", "accuracy")]
  if num_classes == 0 and not any(np.any(np.asarray(count)) for count in counts):
    raise ValueError(
      f"{source!r} has no labels, and no term of the objective counts an example without one: "
      "nothing would be learned. Give the data labels, or an objective with a teacher (recipes.kd)."
    )


def check_finite(sums: PyTree, begin: int) -> None:
  """Raises for the first step at which a term was not finite; the terms come before their sum.

  Args:
    sums: ``{name: (sum, count)}`` on the host, with an axis over steps last.
    begin: the step before the first of them.

  Raises:
    FloatingPointError: a sum is not finite; names the terms and the step.
  """
  bad = {name: ~np.isfinite(np.asarray(total)) for name, (total, _) in sums.items()}
  first = {
    name: int(np.argmax(b.reshape(-1, b.shape[-1]).any(axis=0)))
    for name, b in bad.items()
    if b.any()
  }
  if not first:
    return
  at = min(first.values())
  names = [name for name, step in first.items() if step == at]
  terms = [name for name in names if name != "loss"] or names
  raise FloatingPointError(
    f"term {', '.join(map(repr, terms))} is not finite at step {begin + at + 1}. The last good "
    "checkpoint is kept; lower the learning rate or the term's weight, clip gradients, or look at "
    "that batch."
  )


@jax.jit
def _finite(tree: PyTree) -> Any:
  leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
  return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in leaves] or [True]))


def check_state(state: State, at: int) -> None:
  """Raises where a state is not finite: nothing of that is validated or saved.

  A gradient can be NaN where the loss is finite.

  Args:
    state: the training state.
    at: its step.

  Raises:
    FloatingPointError: a part of the state is not finite; names it and the step.
  """
  for name in ("params", "model_state", "objective_params", "objective_state"):
    if not _finite(getattr(state, name)):
      raise FloatingPointError(
        f"{name} is not finite after step {at}, though the loss was: a gradient is not. The last "
        "good checkpoint is kept; look for a square root, a norm or a division at 0 in the loss."
      )
