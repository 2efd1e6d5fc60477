"""What a student may cost, what networks do cost where they run, and whether one is inside.

Costs are those of the deployed call: stored inputs in, NumPy logits (or other outputs) out,
normalisation included.
``jaxdistill budget RUN --latency-ms 0.2`` measures a finished run's student in a process
of its own and fails where it costs more, in a build's pipeline for example.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np

from jaxdistill import _check, _compile, export
from jaxdistill._reach import narrowed
from jaxdistill.evaluation import cost
from jaxdistill.reports import plain
from jaxdistill.types import Model, Network, Teacher, make_batch

__all__ = [
  "UNITS",
  "Budget",
  "BudgetError",
  "measure_in_process",
  "measure_network",
  "measure_run",
  "nearest_to_budget",
]

PyTree = Any
# Of rounds of timing the slowest counts: a student is inside its budget on a machine's worse days.
_ROUNDS = 3
_TIME_LIMIT = 600
UNITS = {"latency_ms": "ms", "bytes": "bytes", "flops": "FLOPs", "parameters": "parameters"}


class BudgetError(ValueError):
  """No candidate is inside the budget; the message has the nearest one and what it costs."""


@dataclasses.dataclass(frozen=True)
class Budget:
  """What a student may cost; None is no limit, and at least one is given.

  Attributes:
    latency_ms: milliseconds of one call, from stored inputs to NumPy logits, on this device.
    batch_size: of that call.
    bytes: of all variables as they are stored.
    flops: floating-point operations of one example, see `jaxdistill.evaluation.cost.flops`.
    parameters: how many there are, see `jaxdistill.evaluation.cost.parameters`.
    spare: the share of the latency that is kept free, since clocks differ from one process to the
      next. A tenth is more than they did on the machines that this was tried on.

  Raises:
    ValueError: there is no limit, one is not positive, or ``spare`` is not in [0, 0.9].
  """

  latency_ms: float | None = None
  batch_size: int = 1
  bytes: int | None = None
  flops: int | None = None
  parameters: int | None = None
  spare: float = 0.1

  def __post_init__(self) -> None:
    _check.whole("batch_size", self.batch_size)
    if not self.limits():
      raise ValueError(
        "the budget has no limit; give latency_ms, bytes, flops or parameters, or several of them."
      )
    for name, limit in self.limits().items():
      _check.number(name, limit, above=0)
    _check.number("spare", self.spare, least=0, most=0.9)

  def limits(self) -> dict[str, float]:
    """The limits that are given, by name."""
    given = {name: getattr(self, name) for name in UNITS}
    return {name: limit for name, limit in given.items() if limit is not None}

  def shares(self, costs: Mapping[str, Any]) -> dict[str, float]:
    """What part of each limit is used, of the latency's without what is to be spared.

    Infinite where a cost is not known.

    Args:
      costs: from `measure_network`.

    >>> Budget(bytes=100, parameters=10).shares({"bytes": 150, "parameters": 5})
    {'bytes': 1.5, 'parameters': 0.5}
    """

    def share(name: str, limit: float) -> float:
      cost = costs.get(name)
      usable = limit * (1 - self.spare) if name == "latency_ms" else limit
      return math.inf if cost is None else cost / usable

    return {name: share(name, limit) for name, limit in self.limits().items()}

  def needed(self, costs: Mapping[str, Any]) -> dict[str, float]:
    """Which limits would have to be raised for such costs, and to what.

    Args:
      costs: from `measure_network`.

    >>> Budget(latency_ms=1.0, bytes=50).needed({"latency_ms": 1.8, "bytes": 40})
    {'latency_ms': 2.0}
    """
    over = [name for name, share in self.shares(costs).items() if 1 < share < math.inf]
    raised = {}
    for name in over:
      if name == "latency_ms":
        raised[name] = math.ceil(1000 * costs[name] / (1 - self.spare)) / 1000
      else:
        raised[name] = math.ceil(costs[name])
    return raised

  def inside(self, costs: Mapping[str, Any]) -> bool:
    """Whether no limit is exceeded.

    Args:
      costs: from `measure_network`.
    """
    return all(share <= 1 for share in self.shares(costs).values())

  def describe(self) -> str:
    """The limits in words."""
    words = [f"{plain(limit)} {UNITS[name]}" for name, limit in self.limits().items()]
    if self.latency_ms is not None:
      words[0] += f" at batch {self.batch_size}"
      words[0] += f" ({100 * self.spare:g}% of it to spare)" if self.spare else ""
    return ", ".join(words)


def measure_network(
  network: Network | Model | Teacher,
  stored: PyTree,
  *,
  normalize: Callable[[Any], Any] | None = None,
  batch_size: int = 1,
  seconds: float = 0.3,
  outputs: Collection[str] | None = None,
) -> dict[str, Any]:
  """What a network costs as it would be deployed, trained or not.

  Args:
    network: a network, whose new variables cost what trained ones do; or a model, or a teacher.
    stored: shapes and dtypes of the inputs of one example, as the data set stores them.
    normalize: what is done to stored inputs before the network sees them.
    batch_size: of the timed call.
    seconds: of each of three rounds of timing, the slowest of which counts.
    outputs: what it puts out, by name; see `jaxdistill.export.as_program`.

  Returns:
    ``latency_ms`` (the median of a round's calls), ``bytes``, ``flops`` of one example (None where
    they cannot be counted) and ``parameters``.

  >>> from jaxdistill import networks
  >>> network = networks.linen(networks.models.MLP(widths=(4,), num_classes=3))
  >>> found = measure_network(network, jax.ShapeDtypeStruct((5,), "float32"), seconds=0.01)
  >>> found["parameters"], found["bytes"], found["flops"]
  (39, 156, 75)
  """
  _check.whole("batch_size", batch_size)
  _check.number("seconds", seconds, above=0)

  def seen(inputs: PyTree) -> PyTree:
    return inputs if normalize is None else normalize(inputs)

  def whole(inputs: PyTree, model: Model | Teacher) -> Any:
    return model(make_batch(seen(inputs))).named(outputs)

  def example(size: int) -> PyTree:
    return jax.tree.map(lambda leaf: np.zeros((size, *leaf.shape), leaf.dtype), stored)

  if isinstance(network, Network):
    init = jax.jit(
      lambda x: network.init(jax.random.key(0), seen(x)), compiler_options=_compile.quick()
    )
    model: Model | Teacher = Model(network, init(example(1)))
  else:
    model = network.instance(0) if isinstance(network, Model) else network
  infer, left, _ = narrowed(whole, example(1), model)
  inputs, compiled = example(batch_size), jax.jit(infer)
  if isinstance(left, Mapping):  # what is deployed takes what it reads
    inputs = {key: inputs[key] for key in left}
  expected = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), inputs)
  model = jax.device_put(model)

  def call() -> Any:
    return jax.device_get(compiled(export.as_batch(inputs, expected, "network")[0], model))

  return {
    "latency_ms": _slowest(call, seconds),
    "bytes": cost.size_bytes(model.variables),
    "flops": cost.flops_or_none(infer, left, model),
    "parameters": cost.parameters(model.variables),
  }


def measure_run(
  run: str | pathlib.Path, *, batch_size: int = 1, instance: int = 0, seconds: float = 0.3
) -> dict[str, Any]:
  """What the student of a finished run costs, by its saved program alone.

  Args:
    run: the run's folder, see `jaxdistill.export.load_student`.
    batch_size: of the timed call.
    instance: which of its networks.
    seconds: of each of three rounds of timing.

  Returns:
    As `measure_network`.

  Raises:
    FileNotFoundError: there is no finished run.
    IndexError: there is no such instance.
    ValueError: the inputs of a batch do not fit into memory.
  """
  student = export.load_student(run, instance=instance)
  try:
    some = jax.tree.map(
      lambda leaf: np.zeros((batch_size, *leaf.shape), leaf.dtype), student.inputs
    )
  except (MemoryError, OverflowError, ValueError) as error:  # "array is too big"
    raise ValueError(
      f"batch_size={batch_size}: no memory holds so many inputs ({_check.short(error)})."
    ) from error
  return {
    "latency_ms": _slowest(lambda: jax.device_get(student(some)), seconds),
    "bytes": cost.size_bytes(student.variables),
    "flops": student.info.get("flops"),  # a program that is loaded cannot be counted
    "parameters": student.info["parameters"],
  }


def measure_in_process(
  run: str | pathlib.Path, budget: Budget, *, instance: int = 0
) -> dict[str, Any]:
  """`measure_run` in a process of its own, as another program would run the student.

  Args:
    run: the run's folder.
    budget: its ``batch_size`` is timed.
    instance: which of the run's networks.

  Returns:
    As `measure_network`.

  Raises:
    RuntimeError: the process failed; the message has its last line.
  """
  command = [sys.executable, "-m", "jaxdistill", "budget", str(run), "--json"]
  command += ["--batch-size", str(budget.batch_size), "--instance", str(instance)]
  # A GPU's memory is mostly this process's, and the other one needs little of it.
  environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
  environment.pop("XLA_FLAGS", None)  # such as devices that are made up
  failed = f"timing the student of {run} in a process of its own failed"
  try:
    made = subprocess.run(
      command, env=environment, capture_output=True, text=True, timeout=_TIME_LIMIT
    )
  except subprocess.TimeoutExpired as error:
    raise RuntimeError(f"{failed}: it was not done after {_TIME_LIMIT} s.") from error
  if made.returncode:
    last = (made.stderr.strip().splitlines() or [f"exit status {made.returncode}"])[-1]
    raise RuntimeError(f"{failed}: {last}")
  found: dict[str, Any] = json.loads(made.stdout.splitlines()[-1])
  return found


def nearest_to_budget(budget: Budget, costs: Mapping[str, Mapping[str, Any]]) -> str:
  """The candidate that exceeds a budget least, by its worst limit.

  Args:
    budget: the budget.
    costs: each candidate's, from `measure_network`.

  >>> nearest_to_budget(Budget(bytes=10), {"large": {"bytes": 90}, "small": {"bytes": 30}})
  'small'
  """
  return min(costs, key=lambda name: (max(budget.shares(costs[name]).values()), name))


def _slowest(call: Callable[[], Any], seconds: float) -> float:
  """The largest median of some rounds of calls, in milliseconds."""
  medians = [cost.timed(call, repeats=1000, seconds=seconds)["median"] for _ in range(_ROUNDS)]
  return max(medians)
