"""What a run needs on a device, in bytes: said before its first step, or before there is any array.

What lies there is known from shapes and from where they lie: the student, its optimiser, the
teacher, the batch. What a step makes on its way (activations, gathered weights, gradients), the
compiler says of the program that it made. `memory` asks it of shapes alone, for the devices of this
machine or of one that is not there (`jax.experimental.topologies`); `fit` says it in its log.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxdistill import _check
from jaxdistill._compile import CompiledOnce, limit_of, shapes_of
from jaxdistill.data import Source
from jaxdistill.train import _mesh
from jaxdistill.train._in_chunks import in_chunks
from jaxdistill.train._mesh import Dispatch, check_divides
from jaxdistill.train._optax import Transformation, is_optimizer
from jaxdistill.train._program import (
  Program,
  cut_over,
  layout_of,
  reading,
  shapes_where_they_lie,
  teacher_placed,
  teacher_reading,
)
from jaxdistill.train._state import State, init_state
from jaxdistill.train._step import make_step
from jaxdistill.types import Batch, Model, Network, Objective, ObjectiveFunction, Teacher

__all__ = ["Memory", "memory", "of_program"]

PyTree = Any
# How many arrays that are whole on every device a line names; the largest are what counts.
_NAMED = 3


@dataclasses.dataclass(frozen=True)
class Memory:
  """What a train step needs on one device, in bytes.

  Attributes:
    student: its parameters and statistics.
    objective: what the objective learns and remembers.
    optimizer: its state.
    average: moving averages of the student.
    teacher: its variables.
    data: the batch, or the chunk of steps that is on its way, and arrays that all steps share.
    temporaries: what the step makes on its way, by the compiler's analysis: activations, gathered
      weights, gradients. None where the compiler found that the step does not fit, or was not
      asked.
    limit: what a device has; None where nobody said and the device does not.
    whole: ``{part: ((path, bytes), ...)}`` of arrays that are whole on each of several devices, the
      largest first.
  """

  student: int
  objective: int
  optimizer: int
  average: int
  teacher: int
  data: int
  temporaries: int | None = None
  limit: int | None = None
  whole: Mapping[str, tuple[tuple[str, int], ...]] = dataclasses.field(default_factory=dict)

  @property
  def parts(self) -> dict[str, int]:
    """The bytes of each part that has some."""
    named = ("student", "objective", "optimizer", "average", "teacher", "data", "temporaries")
    return {name: size for name in named if (size := getattr(self, name))}

  @property
  def needed(self) -> int:
    """All of it."""
    return sum(self.parts.values())

  @property
  def fits(self) -> bool | None:
    """Whether it fits the limit; None where that is not known.

    >>> Memory(8, 0, 16, 0, 4, 1, temporaries=3, limit=30).fits
    False
    """
    if self.limit is None or (self.temporaries is None and self.needed <= self.limit):
      return None
    return self.needed <= self.limit

  def lines(self) -> tuple[str, ...]:
    """What the log says: the parts; and where they do not fit, what to cut or to compute again.

    >>> print(*Memory(8_000_000, 0, 16_000_000, 0, 0, 0, 4_000_000).lines())
    memory on each device: student 8.0 MB, optimizer 16.0 MB, temporaries 4.0 MB; 28.0 MB in all.
    """
    each = ", ".join(f"{name} {_shown(size)}" for name, size in self.parts.items())
    of = "in all" if self.limit is None else f"of {_shown(self.limit)}"
    if self.temporaries is None:
      of += ", and the temporaries are not known"
    said = (f"memory on each device: {each}; {_shown(self.needed)} {of}.",)
    return said if self.fits is not False else (*said, *self._advice())

  def _advice(self) -> list[str]:
    """What to do about the parts that are large, the largest first."""
    advice = {
      "student": "cut it: train.with_jit(train.mesh(fsdp=...), sharding=train.fsdp())",
      "optimizer": "it is cut with the student (sharding=train.fsdp()); others keep less of each "
      "parameter (optax.adafactor, or mu_dtype=jnp.bfloat16 of optax.adamw)",
      "teacher": "cut it (teacher_sharding=train.fsdp()), or keep it shorter: "
      "teachers.frozen(model, dtype=jnp.bfloat16)",
      "temporaries": "cut batches (train.with_jit(accumulate=4)), make a language model's logits "
      "in chunks (tokens_at_once=512), or compute again what the backward pass reads "
      "(networks.remat, DecoderConfig(remat='block'))",
      "data": "take smaller batches, or fewer steps in a chunk (train.Watch(log_every=...))",
      "average": "it is cut with the student; average=None keeps none",
      "objective": "it is cut with the student, by the same rules",
    }
    found = []
    for name, size in sorted(self.parts.items(), key=lambda part: -part[1]):
      if size < self.needed / 10:
        continue
      whole = self.whole.get(name, ())
      rest = f" and {len(whole) - _NAMED} more" if len(whole) > _NAMED else ""
      some = ", ".join(f"{path} {_shown(each)}" for path, each in whole[:_NAMED])
      where = f"; whole on every device are {some}{rest}" if whole else ""
      found.append(f"it does not fit. {name}, {_shown(size)}{where}: {advice[name]}.")
    return found


def _shown(size: int) -> str:
  return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:.3g} kB"


def memory(
  student: Network | Model,
  objective: Objective | ObjectiveFunction,
  *,
  data: Source | Batch,
  optimizer: Transformation,
  teacher: Teacher | None = None,
  average: float | None = None,
  dispatch: Dispatch | None = None,
  limit: int | None = None,
  platform: str | None = None,
) -> Memory:
  """What a train step needs on a device, before there is anything: no array is made, nothing run.

  The step of these arguments of `fit` is compiled for the dispatch's devices, which need not be on
  this machine: ``jax.experimental.topologies`` describes others to their compiler, a TPU's to
  libtpu. A student or a teacher of any size is asked about by shapes,
  ``teachers.frozen(Model(network, jax.eval_shape(network.init, key, inputs)))``.

  Args:
    student: the network to train, or a model of it; its variables are not looked at.
    objective: as `fit` takes it.
    data: a source; or one global batch, of arrays or of shapes:
      ``jax.eval_shape(lambda: types.make_batch(jnp.zeros((256, 32, 32, 3)), jnp.arange(256)))``.
    optimizer: an optax optimiser.
    teacher: from `jaxdistill.teachers`; shapes of its variables are enough.
    average: as `fit` takes it.
    dispatch: `train.with_jit`, whose mesh, rules and micro-batches it is for; all devices of this
      machine by default.
    limit: bytes of a device; None for what the devices say, which a CPU does not.
    platform: ``"cuda"`` or ``"tpu"``, where the devices only stand for others whose compiler is not
      here: the step is lowered for it, which shows that all of it can be, and not compiled.

  Returns:
    `Memory`, whose ``temporaries`` are None where the compiler itself says that they do not fit,
    and with ``platform``.

  Raises:
    TypeError: an argument is of another kind than it must be, or the dispatch is not `with_jit`'s.
    ValueError: the batch does not divide by the devices, a rule does not fit, or networks,
      objective and data do not go together.

  >>> import optax
  >>> from jaxdistill import networks, recipes, types
  >>> import jax.numpy as jnp
  >>> network = networks.linen(networks.models.MLP([64], num_classes=8))
  >>> batch = jax.eval_shape(lambda: types.make_batch(jnp.zeros((32, 16)), jnp.zeros(32, int)))
  >>> one = _mesh.with_jit(_mesh.data_parallel(jax.devices()[:1]))
  >>> found = memory(network, recipes.labels(), data=batch, optimizer=optax.adam(0.1), dispatch=one)
  >>> found.student, found.optimizer  # 1,608 parameters; two moments each, and a count
  (6432, 12868)
  """
  dispatch = _mesh.with_jit() if dispatch is None else dispatch
  network = student.network if isinstance(student, Model) else student
  _check_kinds(network, optimizer, teacher, dispatch, limit)
  batch = _shapes_of(data)
  rows = np.shape(jax.tree.leaves(batch.inputs)[0])[0]
  check_divides(rows, dispatch.devices * dispatch.accumulate)
  made = in_chunks(objective, tokens_at_once=dispatch.tokens_at_once)
  if teacher is not None:
    teacher = shapes_where_they_lie(teacher)
    teacher, _ = teacher_placed(teacher, dispatch, lambda: batch.inputs)

  def begin(batch: Batch) -> State:
    key = jax.random.key(0)
    keep = average is not None
    return init_state(key, network, made, optimizer, batch, teacher=teacher, average=keep)

  shapes = jax.eval_shape(begin, batch)
  layout = layout_of(network, dispatch, shapes, lambda: batch.inputs, over=0)
  where = () if layout is None else (layout.state,)
  cut = {} if layout is None else cut_over(dispatch, {"params": layout.state.params})
  step = make_step(
    reading(network, dispatch, "", cut),
    made,
    optimizer,
    accumulate=dispatch.accumulate,
    average=average,
  )
  taught = cut_over(dispatch, teacher)

  def run(state: State, teacher: Teacher | None, batch: Batch) -> tuple[State, PyTree]:
    return step(state, teacher_reading(teacher, dispatch, taught), dispatch.constrain(batch))

  state = dispatch.spread(shapes, *where)
  given = (state, dispatch.place(teacher), dispatch.split(batch, 0))
  program = dispatch.compile(run, *where)
  if platform is None:
    program.compile(*given)
  else:
    program.lower(platform, *given)
  return _measured(program if platform is None else None, state, given[1], given[2], limit)


def of_program(program: Program) -> Memory:
  """What a run's program needs on a device; waits for the compiler.

  Args:
    program: one that is being compiled.
  """
  state, teacher, *data = program.arguments()
  return _measured(program.whole, state, teacher, data, None)


def _check_kinds(network: Any, optimizer: Any, teacher: Any, dispatch: Any, limit: Any) -> None:
  if not isinstance(network, Network):
    raise TypeError(f"student must be a Network or a Model, got {_check.show(network)}.")
  if not is_optimizer(optimizer):
    raise TypeError(f"optimizer must be an optax optimiser, got {_check.show(optimizer)}.")
  if not isinstance(teacher, Teacher | None):
    raise TypeError(f"teacher={_check.show(teacher)} must be a Teacher: teachers.frozen(model).")
  if not isinstance(dispatch, Dispatch) or dispatch.sharding is None:
    raise TypeError(f"dispatch must be what train.with_jit returns, got {_check.show(dispatch)}.")
  if limit is not None:
    _check.whole("limit", limit)


def _shapes_of(data: Any) -> Batch:
  """A batch's shapes."""
  if isinstance(data, Source):
    item = jax.tree.map(lambda leaf: leaf[0], data.items(0, 1, (0, 1)))
    cut: Batch = jax.eval_shape(data.cut, data.shared, item)
    return cut
  if not isinstance(data, Batch):
    raise TypeError(
      f"data={_check.show(data)} must be a Source, or a Batch of arrays or shapes: "
      "types.make_batch(inputs, labels)."
    )
  shapes: Batch = shapes_of(data)
  return shapes


def _measured(
  program: CompiledOnce | None,
  state: State,
  teacher: Teacher | None,
  data: PyTree,
  limit: int | None,
) -> Memory:
  """The bytes of a program's arguments and of what it makes on its way."""
  parts = {
    "student": {"params": state.params, **state.model_state},
    "objective": {"params": state.objective_params, "state": state.objective_state},
    "optimizer": state.opt_state,
    "average": {"average": state.average, "teacher": state.teacher},
    "teacher": None if teacher is None else teacher.variables,
    "data": data,
  }
  leaves = jax.tree.leaves(parts)
  devices = sorted({d for leaf in leaves for d in leaf.sharding.device_set}, key=lambda d: d.id)
  several = len(devices) > 1
  cuttable = {name: tree for name, tree in parts.items() if name != "data" and several}
  return Memory(
    **{name: _bytes(tree) for name, tree in parts.items()},
    temporaries=None if program is None else _temporaries(program.compiled),
    limit=limit_of(devices) if limit is None else limit,
    whole={name: found for name, tree in cuttable.items() if (found := _whole(tree))},
  )


def _temporaries(compiled: Callable[[], Any]) -> int | None:
  """Beside a program's arguments; None where the compiler says that they do not fit."""
  try:
    used = compiled().memory_analysis()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return None
  # What comes out in the place of what was donated is there already.
  new = used.output_size_in_bytes - used.alias_size_in_bytes
  return int(used.temp_size_in_bytes + max(new, 0))


def _of_leaf(leaf: Any) -> int:
  """On one device."""
  shape = leaf.sharding.shard_shape(leaf.shape)
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return 0  # some words
  return math.prod(shape) * int(leaf.dtype.itemsize)


def _bytes(tree: PyTree) -> int:
  return sum(map(_of_leaf, jax.tree.leaves(tree)))


def _whole(tree: PyTree) -> tuple[tuple[str, int], ...]:
  """What is whole on every device, the largest first."""
  found = [
    (jax.tree_util.keystr(path, simple=True, separator="/"), _of_leaf(leaf))
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if leaf.sharding.is_fully_replicated
  ]
  return tuple(sorted((one for one in found if one[1]), key=lambda one: -one[1]))
