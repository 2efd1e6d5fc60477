"""What is trained: `fit`, `sweep`, `compress` and `preflight` make one value of their arguments.

Whatever is wrong with an argument by itself says so here, before anything is traced.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import _check
from jaxdistill.data import Source
from jaxdistill.runs import check_nan
from jaxdistill.teachers import asked_on_host, check_tokenizer, decay_of
from jaxdistill.train._in_chunks import in_chunks
from jaxdistill.train._optax import Transformation
from jaxdistill.train._state import State, deployed_variables
from jaxdistill.types import Deployed, Model, Network, Objective, Teacher

__all__ = [
  "Optimizer",
  "Plan",
  "check_hyper",
  "check_seeds",
  "check_start",
  "check_student",
  "check_teacher",
]

PyTree = Any
# An optax optimiser, or what makes one of numbers that differ between students.
Optimizer = Transformation | Callable[..., Transformation]


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """What is trained, from what, by what: the arguments that `fit` and its like share.

  Attributes:
    student: the network.
    objective: what is minimised.
    sources: where each student's batches come from.
    optimizer: an optax optimiser; in a sweep, a function that makes one.
    steps: how many steps the whole run has.
    seeds: one for each student.
    stacked: whether the students have an axis, as those of a sequence of seeds do.
    teacher: the teacher, or None.
    start: the variables that the student starts from, all or some; None for new ones.
    accumulate: micro-batches in a batch.
    average: the decay of the moving average, or None.
  """

  student: Network
  objective: Objective
  sources: list[Source]
  optimizer: Optimizer
  steps: int
  seeds: list[int]
  stacked: bool
  teacher: Teacher | None = None
  start: PyTree = None
  accumulate: int = 1
  average: float | None = None

  @classmethod
  def of(
    cls,
    student: Network | Model,
    objective: Any,
    *,
    data: Source | Sequence[Source],
    optimizer: Optimizer,
    steps: int,
    seed: int | Sequence[int] = 0,
    teacher: Teacher | None = None,
    accumulate: int = 1,
    tokens_at_once: int | None = None,
    average: float | None = None,
  ) -> Plan:
    """Checks the arguments of `jaxdistill.train.fit` that say what is trained.

    Args:
      student: a network, or a model whose variables it starts from.
      objective: an `Objective` or a bare function.
      data: one source, or one for each seed.
      optimizer: an optax optimiser, or a function that makes one.
      steps: how many there are.
      seed: one, or several.
      teacher: the teacher, or None.
      accumulate: micro-batches in a batch.
      tokens_at_once: how many tokens' logits there are at any time; None for those of the batch.
      average: the decay of the moving average, or None.

    Raises:
      TypeError: an argument is of another kind than it must be.
      ValueError: one is out of range, or holds NaN; sources and seeds do not pair up; the teacher
        reads other tokens than the data has.
    """
    network, start = check_student(student)
    check_teacher(teacher)
    check_start("objective.start", getattr(objective, "start", None))
    _check.whole("steps", steps, most=2**31 - 1)  # the state counts them in int32
    _check.whole("accumulate", accumulate)
    if average is not None:
      _check.number("average", average, least=0, most=1)
    made = in_chunks(objective, tokens_at_once=tokens_at_once)
    check_hyper(made, steps)
    if callable(decay := decay_of(teacher)):
      _check_schedule("the teacher's decay", decay, steps, least=0, most=1)
    seeds, sources = check_seeds(seed, data)
    for source in sources:
      check_tokenizer(teacher, source.tokenizer, source.name)
    several = np.ndim(seed) > 0
    if isinstance(student, Model) and student.seeds not in (None, len(seeds)):
      raise ValueError(
        f"student holds the variables of {student.seeds} seeds, and seed has {len(seeds)}."
      )
    return cls(
      network, made, sources, optimizer, steps, seeds, several, teacher, start, accumulate, average
    )

  @property
  def deployed(self) -> Network:
    """The network that is evaluated and deployed: the student, unless the objective says else."""
    deployed = self.objective.deployed
    return self.student if deployed is None else _deployed_network(deployed, self.student)

  def model(self, state: State) -> Model:
    """The deployed model as a training state has it."""
    seeds = len(self.seeds) if self.stacked else None
    return Model(self.deployed, deployed_variables(state, self.objective), seeds)


@functools.lru_cache(maxsize=16)
def _deployed_network(deployed: Deployed, student: Network) -> Network:
  """One object for the same question: programs are told apart by it, and would compile anew."""
  return deployed.network(student)


def check_student(student: Any) -> tuple[Network, PyTree]:
  """The network, and the variables that it starts from where a model is given.

  Raises:
    TypeError: it is neither.
    ValueError: some variables are NaN.
  """
  if isinstance(student, Model):
    check_start("student.variables", student.variables)
    return student.network, student.variables
  if not isinstance(student, Network):
    raise TypeError(
      f"student must be a Network, or a Model to start from, got {_check.show(student)}; "
      f"{_adapter(student)}."
    )
  return student, None


def check_teacher(teacher: Any) -> None:
  """A teacher whose variables are arrays without NaN, looked at where they lie.

  Raises:
    TypeError: it is no teacher.
    ValueError: some variables are NaN.
  """
  if teacher is None:
    return
  if isinstance(teacher, Model):
    raise TypeError(f"teacher is the model {teacher.network.name!r}; give teachers.frozen(model).")
  if not isinstance(teacher, Teacher):
    how = "teachers.frozen(model), or Teacher(variables, apply) with a function of yours"
    if isinstance(teacher, Network):
      how = "teachers.frozen(Model(network, variables))"
    elif type(teacher).__module__.startswith("flax.") or hasattr(teacher, "scope"):
      how = f"{_adapter(teacher)}, and teachers.frozen(Model(network, variables))"
    raise TypeError(f"teacher={_check.show(teacher)} must be a Teacher: {how}.")
  if asked_on_host(teacher):
    raise TypeError(
      f"teacher={teacher.asked} is of another program and cannot be compiled into a step. Ask it "
      "once: fit(..., data=teachers.cached(teacher, source)), without teacher=."
    )
  check_start("teacher.variables", teacher.variables)


def _adapter(module: Any) -> str:
  """Which adapter makes a network of this."""
  if isinstance(module, type):
    return f"make a module of the class, {module.__name__}(...), and give networks.linen(module)"
  kinds = {kind.__module__.split(".")[1] for kind in type(module).__mro__ if _is_flax(kind)}
  if "nnx" in kinds:
    return "give networks.nnx(module)"
  return "give networks.linen(module), or networks.nnx(module) of an NNX one"


def _is_flax(kind: type) -> bool:
  return kind.__module__.startswith("flax.")


def check_start(name: str, tree: PyTree) -> None:
  """Raises for what is no array, is traced, or is NaN; infinities may be meant (a mask).

  The numbers are looked at on the device where they lie: no leaf is brought to the host.
  """
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    where = f"{name}{jax.tree_util.keystr(path)}"
    if isinstance(leaf, jax.core.Tracer):
      raise TypeError(f"{where} is traced; call fit outside of jit, vmap and grad.")
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float | complex):
      how = "runs.load_variables and weights read files" if isinstance(leaf, str) else ""
      raise TypeError(f"{where} is no array, but {_check.show(leaf)}; {how or 'leave it out'}.")
  check_nan(name, tree)


def check_hyper(objective: Objective, steps: int) -> None:
  """The objective's keywords: complete, with finite numbers, and schedules that give numbers.

  Raises:
    ValueError: one is missing, not finite, or a temperature that is not positive.
  """
  missing = sorted(n for n, v in objective.hyper.items() if v is inspect.Parameter.empty)
  if missing:
    raise ValueError(
      f"the objective has no default for {missing}; give it some by "
      f"as_objective(objective, {missing[0]}=...)."
    )
  for name, value in objective.hyper.items():
    if callable(value):
      above = 0 if name == "temperature" else None
      _check_schedule(f"the schedule {name}", value, steps, above=above)
    elif not _numeric(value) or isinstance(value, jax.core.Tracer):
      continue  # a switch, a layer's name: the objective's own affair
    elif name == "temperature":
      _check.number("temperature", value, above=0)
    elif not np.all(np.isfinite(np.asarray(value))):
      raise ValueError(f"the objective's {name}={_check.show(value)} must be finite.")


def _numeric(value: Any) -> bool:
  dtype = getattr(value, "dtype", None)
  if dtype is not None:
    return bool(jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_))
  return isinstance(value, bool | int | float)


def _check_schedule(label: str, schedule: Callable[[Any], Any], steps: int, **within: Any) -> None:
  """A schedule on the host, at three steps, and once as the compiled step will call it."""
  for step in sorted({0, steps // 2, steps - 1}):
    try:
      value = schedule(step)
    except Exception as error:
      raise ValueError(f"{label} fails at step {step}: {_check.short(error)}") from error
    _check.number(f"{label} at step {step}", value, **within)
  try:
    jax.eval_shape(schedule, jax.ShapeDtypeStruct((), jnp.int32))
  except Exception as error:
    raise ValueError(
      f"{label} cannot be compiled ({_check.short(error)}); the step is traced in it: take "
      "optax's schedules, or jnp.where in place of if."
    ) from error


def check_seeds(
  seed: int | Sequence[int], data: Any, *, twice: bool = False
) -> tuple[list[int], list[Source]]:
  """Seeds as numbers and sources, one for each; a pair of them ``twice`` where students differ.

  Raises:
    TypeError: a seed is no integer, or a source no `Source`.
    ValueError: a seed is out of range, two runs would be the same, or they do not pair up.
  """
  if np.ndim(seed) > 1 or isinstance(seed, str | set | frozenset | Mapping):
    raise TypeError(f"seed={_check.show(seed)} must be an integer or a sequence of them.")
  one: Any = seed
  several = list(one) if np.ndim(one) == 1 or isinstance(one, Sequence) else [one]
  if not several:
    raise ValueError("seed is an empty sequence; give at least one seed.")
  seeds = [_check.whole("seed", s, least=0, most=2**32 - 1) for s in several]
  sources = list(data) if isinstance(data, Sequence) else [data]
  for source in sources:
    if not isinstance(source, Source):
      raise TypeError(
        f"data must be a Source, or one for each seed, and has {_check.show(source)}; make one "
        "with data.on_device(data.from_arrays(inputs, labels), batch_size=..., data_seed=...)."
      )
  if len(sources) == 1:
    sources = sources * len(seeds)
  if len(sources) != len(seeds):
    raise ValueError(
      f"data has {len(sources)} sources for {len(seeds)} seeds; give one for each seed, or one "
      "for all of them (which then see the same order)."
    )
  pairs = [(s, id(d.read), d.data_seed) for s, d in zip(seeds, sources, strict=True)]
  same = sorted({pair[0] for pair in pairs if pairs.count(pair) > 1})
  if same and not twice:
    raise ValueError(
      f"seed has {same} more than once with the same data and data_seed, which is the same run; "
      "give other seeds, or sources of other data seeds."
    )
  return seeds, sources
