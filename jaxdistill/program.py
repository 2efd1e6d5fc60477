"""The program of a training run: a step, a source and a dispatch made into one compiled call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdistill.data import Source
from jaxdistill.fit_arguments import check_seeds
from jaxdistill.mesh import Dispatch, check_divides
from jaxdistill.state import State, init_state, trained_variables
from jaxdistill.step import make_step
from jaxdistill.types import Network, Objective, Teacher

__all__ = ["Program", "build"]

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Program:
  """What a run calls: put together and checked abstractly, compiled at the first call.

  Attributes:
    source: the first source, for what all of them share.
    student: the student's name.
    objective: the objective.
    data_seeds: one for each source.
    examples_per_step: over all seeds.
    stacked: whether the state has an axis over seeds.
    shapes: the state's shapes and dtypes.
    initial: makes the state at step 0.
    check: ``count ->``; traces a chunk of so many steps, so that what does not fit says so.
    run: ``(state, step, count) -> (state, sums)``: the next ``count`` steps; donates the state.
      Sums have a step axis last.
    collect: one copy of a tree that `run` returned.
  """

  source: Source
  student: str
  objective: Objective
  data_seeds: list[int]
  examples_per_step: int
  stacked: bool
  shapes: State
  initial: Callable[[], State]
  check: Callable[[int], None]
  run: Callable[[State, int, int], tuple[State, PyTree]]
  collect: Callable[[PyTree], PyTree]

  def describe(self) -> dict[str, Any]:
    """What of the arguments a run folder has to hold, so that another run is not taken for it."""
    source, shapes = self.source, jax.tree_util.tree_leaves_with_path(self.shapes.params)
    return {
      "data_seed": self.data_seeds,
      "data": {
        "name": source.name,
        "size": source.size,
        "batch_size": source.batch_size,
        "views": source.views,
        "transfer": source.transfer,
      },
      "student": {
        "name": self.student,
        "shapes": {jax.tree_util.keystr(p, simple=True, separator="/"): v.shape for p, v in shapes},
      },
    }


def build(
  student: Network,
  objective: Objective,
  data: Source | Sequence[Source],
  optimizer: optax.GradientTransformation,
  seed: int | Sequence[int],
  teacher: Teacher | None,
  teacher_variables: PyTree,
  dispatch: Dispatch,
  *,
  start: PyTree = None,
  objective_start: tuple[PyTree, PyTree] | None = None,
  average: float | None = None,
  accumulate: int = 1,
  seeds_by: str = "vmap",
  scan: bool = True,
  **options: Any,
) -> Program:
  """Builds a run's program; the arguments are those of `jaxdistill.train.fit`.

  Args:
    student: the network to train.
    objective: the objective.
    data: one source, or one for each seed.
    optimizer: an optax optimiser.
    seed: one, or several.
    teacher: the teacher, or None.
    teacher_variables: its variables.
    dispatch: how the program is compiled.
    start: values for some of the student's variables.
    objective_start: likewise for the objective's parameters and state.
    average: the decay of the moving average, or None.
    accumulate: micro-batches in a batch.
    seeds_by: ``"vmap"`` or ``"unroll"``.
    scan: whether a chunk is one dispatch.
    **options: what `jaxdistill.step.make_step` takes beside these.

  Returns:
    The program.

  Raises:
    ValueError: sources and seeds do not pair up, a batch does not divide by the devices, or the
      networks, the objective and the data do not fit together.
  """
  seeds, sources = check_seeds(seed, data)
  stacked, source = np.ndim(seed) > 0, sources[0]
  step = make_step(
    student,
    teacher,
    objective,
    optimizer,
    axis_name=dispatch.axis_name,
    accumulate=accumulate,
    unroll=not scan,
    average=average,
    **options,
  )
  check_divides(source.batch_size, dispatch.devices)
  if source.batch_size % (dispatch.devices * accumulate):
    raise ValueError(
      f"batch_size={source.batch_size} does not divide into accumulate={accumulate} micro-batches "
      f"over {dispatch.devices} devices; take a multiple of {dispatch.devices * accumulate}."
    )
  shared, shared_axes = _shared(sources)

  def initial(
    key: Any, variables: PyTree, shared: PyTree, item: PyTree, starts: tuple[PyTree, PyTree]
  ) -> State:
    return init_state(
      key,
      student,
      objective,
      optimizer,
      source.cut(shared, item),
      teacher=teacher,
      teacher_variables=variables,
      start=starts[0],
      objective_start=starts[1],
      average=average is not None,
      num_classes=source.num_classes,
    )

  def chunk(state: State, variables: PyTree, shared: PyTree, items: PyTree) -> Any:
    def body(state: State, item: PyTree) -> tuple[State, Any]:
      return step(state, variables, dispatch.constrain(source.cut(shared, item)))

    if scan:
      return jax.lax.scan(body, state, items)
    state, sums = body(state, jax.tree.map(lambda leaf: leaf[0], items))
    return state, jax.tree.map(lambda leaf: leaf[None], sums)

  def read(at: int, count: int) -> PyTree:
    # One source for several seeds is read once.
    each = {id(s): s.items(at, count, dispatch.part) for s in {id(s): s for s in sources}.values()}
    pieces = [each[id(s)] for s in sources]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *pieces) if stacked else pieces[0]

  def split(items: PyTree) -> PyTree:
    return dispatch.split(items, 2 if stacked else 1)

  head = read(0, 1)
  split(head)  # a batch that does not divide by the devices says so here
  keys = jnp.stack([jax.random.key(s) for s in seeds])
  first = jax.tree.map(lambda leaf: leaf[0, 0] if stacked else leaf[0], head)
  one = _of_seed(shared, shared_axes, 0)
  starts = (start, objective_start)
  arguments = (keys if stacked else keys[0], teacher_variables, one, first, starts)
  if stacked:
    plain = jax.eval_shape(initial, keys[0], teacher_variables, one, first, (None, None))
    axes = _start_axes(starts, plain, len(seeds))
    initial = jax.vmap(initial, in_axes=(0, None, None, None, axes))
    chunk = _over_seeds(chunk, seeds_by, shared_axes)
  # Abstract first: what does not fit together says so before anything is compiled.
  shapes = jax.eval_shape(initial, *arguments)
  compiled = dispatch.compile(chunk)

  def check(count: int) -> None:
    lead = 1 if stacked else 0
    length = count if scan else 1
    items = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        (*leaf.shape[:lead], length, *leaf.shape[lead + 1 :]), leaf.dtype
      ),
      head,
    )
    # jit keeps what it traced; pmap cannot trace without compiling.
    if hasattr(compiled, "eval_shape"):
      compiled.eval_shape(shapes, teacher_variables, shared, items)

  fixed = (dispatch.place(teacher_variables), dispatch.place(shared))

  def run(state: State, at: int, count: int) -> tuple[State, PyTree]:
    if scan:
      return compiled(state, *fixed, split(read(at, count)))
    each = []
    for step in range(at, at + count):
      state, sums = compiled(state, *fixed, split(read(step, 1)))
      each.append(sums)
    return state, jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), *each)

  return Program(
    source=source,
    student=student.name,
    objective=objective,
    data_seeds=[s.data_seed for s in sources],
    examples_per_step=source.batch_size * len(seeds),
    stacked=stacked,
    shapes=shapes,
    initial=lambda: jax.jit(initial, compiler_options=_quick())(*arguments),
    check=check,
    run=run,
    collect=dispatch.collect,
  )


def _start_axes(starts: tuple[PyTree, PyTree], shapes: State, seeds: int) -> PyTree:
  """Which leaves of the given starts have an axis over seeds in front: those with one axis more."""

  def axes(start: Any, made: Any) -> Any:
    if isinstance(start, Mapping):
      inner = made if isinstance(made, Mapping) else {}
      return {name: axes(value, inner.get(name)) for name, value in start.items()}
    known = [leaf.shape for leaf in jax.tree.leaves(made)]
    given = jax.tree.leaves(start)
    over = len(given) == len(known) and all(
      np.shape(leaf) == (seeds, *shape) for leaf, shape in zip(given, known, strict=True)
    )
    return 0 if over and given else None

  student, objective = starts
  mine = (shapes.objective_params, shapes.objective_state)
  return (
    None if student is None else axes(student, trained_variables(shapes)),
    None if objective is None else tuple(axes(s, m) for s, m in zip(objective, mine, strict=True)),
  )


def _shared(sources: Sequence[Source]) -> tuple[PyTree, PyTree]:
  """The arrays of all sources, and each one's axis over seeds: 0 where they differ, else -1."""
  first = sources[0]
  for source in sources[1:]:
    for name in ("size", "batch_size", "transfer", "num_classes", "views", "name"):
      if getattr(source, name) != getattr(first, name):
        raise ValueError(
          f"data has sources that differ in {name} ({getattr(first, name)!r}, "
          f"{getattr(source, name)!r}); those of one program may differ in the values of their "
          "arrays and in data_seed, no more."
        )

  def same(*leaves: Any) -> bool:
    return all(leaf is leaves[0] or np.array_equal(leaf, leaves[0]) for leaf in leaves)

  trees = [source.shared for source in sources]
  axes = jax.tree.map(lambda *leaves: -1 if same(*leaves) else 0, *trees)
  shared = jax.tree.map(
    lambda axis, *leaves: leaves[0] if axis < 0 else jnp.stack(leaves), axes, *trees
  )
  return shared, axes


def _of_seed(shared: PyTree, axes: PyTree, seed: int) -> PyTree:
  return jax.tree.map(lambda leaf, axis: leaf if axis < 0 else leaf[seed], shared, axes)


def _quick() -> dict[str, Any] | None:
  """Options for a program that runs once: on a CPU, random initialisers compile for long."""
  if jax.default_backend() != "cpu":
    return None
  return {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def _over_seeds(
  chunk: Callable[..., Any], seeds_by: str, shared_axes: PyTree
) -> Callable[..., Any]:
  if seeds_by == "vmap":
    mapped = jax.tree.map(lambda axis: None if axis < 0 else axis, shared_axes)
    return jax.vmap(chunk, in_axes=(0, None, mapped, 0))
  if seeds_by != "unroll":
    raise ValueError(f"seeds_by={seeds_by!r} must be 'vmap' or 'unroll'.")

  def one_after_another(state: State, variables: PyTree, shared: PyTree, items: PyTree) -> Any:
    count = jax.tree.leaves(items)[0].shape[0]
    each = []
    for i in range(count):
      mine, its = jax.tree.map(lambda leaf, i=i: leaf[i], (state, items))
      each.append(chunk(mine, variables, _of_seed(shared, shared_axes, i), its))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

  return one_after_another
