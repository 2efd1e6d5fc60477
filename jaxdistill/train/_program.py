"""The program of a training run: a step, a source and a dispatch made into one compiled call.

Several students may share one: their sources, their arrays, and an axis over them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdistill import _check
from jaxdistill._compile import BackgroundCompiled, by_work, computed, quick
from jaxdistill.data import Source
from jaxdistill.train._mesh import Dispatch, check_divides
from jaxdistill.train._state import State, init_state, trained_variables
from jaxdistill.train._step import make_step
from jaxdistill.types import Network, Objective, Teacher

__all__ = [
  "Optimizer",
  "Program",
  "Values",
  "build_program",
  "check_seeds",
  "of_group",
  "over_students",
  "run_identity",
  "shared_arrays",
  "start_axes",
  "turns",
]

PyTree = Any
# An optax optimiser, or what makes one of the optimiser's keywords in `Values`.
Optimizer = optax.GradientTransformation | Callable[..., optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Program:
  """What a run calls: put together and checked abstractly, compiled at the first call.

  Attributes:
    source: the first source, for what all of them share.
    student: the student's name.
    objective: the objective.
    data_seeds: one for each source.
    examples_per_step: over all students.
    stacked: whether the state has an axis over students.
    shapes: the state's shapes and dtypes.
    values: what differs between students. Other ones of the same shapes, by
      ``dataclasses.replace(program, values=...)``, compile nothing anew.
    make: ``values -> the state at step 0``.
    call: ``(state, step, count, values) -> (state, sums)``; donates the state.
    compile: ``(count, times) -> (() -> the memory that a chunk of so many steps needs)``, in bytes;
      what `make` and `call` then run, so many times in a training. The compiler is at work until
      the inner call returns. None where the dispatch cannot say (``pmap``).
    trace: ``count ->``; traces a chunk, so that what does not fit says so.
    collect: one copy of a tree that `call` returned.
  """

  source: Source
  student: str
  objective: Objective
  data_seeds: list[int]
  examples_per_step: int
  stacked: bool
  shapes: State
  values: Values
  make: Callable[[Values], State]
  call: Callable[[State, int, int, Values], tuple[State, PyTree]]
  compile: Callable[[int, int], Callable[[], int]] | None
  trace: Callable[[int], None]
  collect: Callable[[PyTree], PyTree]

  def initial(self) -> State:
    """The state at step 0."""
    return self.make(self.values)

  def run(self, state: State, at: int, count: int) -> tuple[State, PyTree]:
    """The next ``count`` steps; sums have a step axis last."""
    return self.call(state, at, count, self.values)

  def describe(self) -> dict[str, Any]:
    """What of the arguments a run folder has to hold, so that another run is not taken for it."""
    return {
      "data_seed": self.data_seeds,
      **run_identity(self.source, self.student, self.shapes.params),
    }


def run_identity(source: Source, student: str, params: PyTree) -> dict[str, Any]:
  """The data and the student, as ``config.json`` holds them.

  Args:
    source: where batches come from.
    student: its name.
    params: its parameters, or their shapes.
  """
  shapes = jax.tree_util.tree_leaves_with_path(params)
  return {
    "data": {
      "name": source.name,
      "size": source.size,
      "batch_size": source.batch_size,
      "views": source.views,
      "transfer": source.transfer,
      "teacher": source.teacher,
    },
    "student": {
      "name": student,
      "shapes": {jax.tree_util.keystr(p, simple=True, separator="/"): v.shape for p, v in shapes},
    },
  }


def build_program(
  student: Network,
  objective: Objective,
  data: Source | Sequence[Source],
  optimizer: Optimizer,
  seed: int | Sequence[int],
  teacher: Teacher | None,
  teacher_variables: PyTree,
  dispatch: Dispatch,
  *,
  values: Values | None = None,
  start: PyTree = None,
  objective_start: tuple[PyTree, PyTree] | None = None,
  seeds_by: str = "vmap",
  at_once: int | None = None,
  scan: bool = True,
  accumulate: int = 1,
  average: float | None = None,
  **options: Any,
) -> Program:
  """Builds a run's program; the arguments are those of `jaxdistill.train.fit`.

  Args:
    student: the network to train.
    objective: the objective.
    data: one source, or one for each seed. Students whose sources are the same share its batches
      and the teacher's outputs, where the sources come round in turn (a, b, a, b).
    optimizer: an optax optimiser, or a function that makes one of the optimiser's ``values``.
    seed: one, or several.
    teacher: the teacher, or None.
    teacher_variables: its variables.
    dispatch: how the program is compiled.
    values: numbers that differ between students.
    start: values for some of the student's variables.
    objective_start: likewise for the objective's parameters and state.
    seeds_by: ``"vmap"`` or ``"unroll"``.
    at_once: how many students are side by side under ``"vmap"``; None for all.
    scan: whether a chunk is one dispatch.
    accumulate: micro-batches in a batch.
    average: the decay of the moving average, or None.
    **options: what `jaxdistill.train.make_step` takes beside these.

  Returns:
    The program.

  Raises:
    ValueError: sources and seeds do not pair up, a batch does not divide by the devices, or the
      networks, the objective and the data do not fit together.
  """
  seeds, sources = check_seeds(seed, data, twice=values is not None)
  source = sources[0]
  _check.whole("accumulate", accumulate)
  check_divides(source.batch_size, dispatch.devices)
  if source.batch_size % (dispatch.devices * accumulate):
    raise ValueError(
      f"batch_size={source.batch_size} does not divide into accumulate={accumulate} micro-batches "
      f"over {dispatch.devices} devices; take a multiple of {dispatch.devices * accumulate}."
    )
  made = _Made(
    student=student,
    objective=objective,
    sources=sources[: turns(sources)],
    optimizer=optimizer,
    teacher=teacher,
    dispatch=dispatch,
    stacked=np.ndim(seed) > 0,
    seeds_by=seeds_by,
    at_once=at_once,
    scan=scan,
    options={
      **options,
      "accumulate": accumulate,
      "average": average,
      "axis_name": dispatch.axis_name,
      "unroll": not scan,
    },
  )
  values = {"hyper": {}, "optimizer": {}} if values is None else values
  return made.program(
    np.array(seeds, np.uint32), values, teacher_variables, (start, objective_start)
  )


@dataclasses.dataclass(frozen=True, eq=False)
class _Made:
  """What `build_program` puts together; the sources are those that come round in turn."""

  student: Network
  objective: Objective
  sources: list[Source]
  optimizer: Optimizer
  teacher: Teacher | None
  dispatch: Dispatch
  stacked: bool
  seeds_by: str
  at_once: int | None
  scan: bool
  options: dict[str, Any]

  def optimizer_of(self, mine: Values) -> optax.GradientTransformation:
    given: Any = self.optimizer
    if isinstance(given, optax.GradientTransformation):
      return given
    made: optax.GradientTransformation = given(**mine["optimizer"])
    return made

  def initial(
    self, seed: Any, mine: Values, starts: Any, variables: PyTree, shared: PyTree, item: PyTree
  ) -> State:
    source = self.sources[0]
    return init_state(
      jax.random.key(seed),
      self.student,
      self.objective,
      self.optimizer_of(mine),
      source.cut(shared, item),
      teacher=self.teacher,
      teacher_variables=variables,
      start=starts[0],
      objective_start=starts[1],
      average=self.options["average"] is not None,
      num_classes=source.num_classes,
    )

  def chunk(
    self, state: State, variables: PyTree, shared: PyTree, items: PyTree, mine: Values
  ) -> tuple[State, PyTree]:
    # The values are traced, and the step is the same: a sweep is another way to call it.
    options = {**self.options, "hyper": {**(self.options.get("hyper") or {}), **mine["hyper"]}}
    optimizer = self.optimizer_of(mine)
    step = make_step(self.student, self.teacher, self.objective, optimizer, **options)

    def body(state: State, item: PyTree) -> tuple[State, Any]:
      return step(state, variables, self.dispatch.constrain(self.sources[0].cut(shared, item)))

    if self.scan:
      return jax.lax.scan(body, state, items)
    state, sums = body(state, jax.tree.map(lambda leaf: leaf[0], items))
    return state, jax.tree.map(lambda leaf: leaf[None], sums)

  def read(self, at: int, count: int) -> PyTree:
    pieces = [source.items(at, count, self.dispatch.part) for source in self.sources]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *pieces) if self.stacked else pieces[0]

  def split(self, items: PyTree) -> PyTree:
    return self.dispatch.split(items, 2 if self.stacked else 1)

  def program(
    self, seeds: Any, values: Values, teacher_variables: PyTree, starts: tuple[PyTree, PyTree]
  ) -> Program:
    stacked, dispatch, students = self.stacked, self.dispatch, len(seeds)
    shared, shared_axes = shared_arrays(self.sources)
    head = self.read(0, 1)
    self.split(head)  # a batch that does not divide by the devices says so here
    first = jax.tree.map(lambda leaf: leaf[0, 0] if stacked else leaf[0], head)
    given = (teacher_variables, of_group(shared, shared_axes, 0), first)
    initial, chunk, seeds = self.initial, self.chunk, seeds if stacked else seeds[0]
    if stacked:
      one = jax.tree.map(lambda leaf: np.asarray(leaf)[0], (seeds, values))
      axes: Any = (None, None)
      if any(start is not None for start in starts):
        plain = jax.eval_shape(initial, *one, (None, None), *given)
        axes = start_axes(starts, plain, students)
      initial = jax.vmap(initial, in_axes=(0, 0, axes, None, None, None))
      chunk = over_students(chunk, self.seeds_by, shared_axes, len(self.sources), self.at_once)
    # Abstract first: what does not fit together says so before anything is compiled.
    shapes = jax.eval_shape(initial, seeds, values, starts, *given)
    begin = BackgroundCompiled(jax.jit(initial, compiler_options=quick()))
    calls = _Calls(self, chunk, teacher_variables, shared, shapes, values, head)

    def compile_both(count: int, times: int) -> Callable[[], int]:
      begin.compile(seeds, values, starts, *given)  # at work while the chunk is traced
      return calls.compile(count, times)

    can_trace = dispatch.axis_name is None
    return Program(
      source=self.sources[0],
      student=self.student.name,
      objective=self.objective,
      data_seeds=[self.sources[i % len(self.sources)].data_seed for i in range(students)],
      examples_per_step=self.sources[0].batch_size * students,
      stacked=stacked,
      shapes=shapes,
      values=values,
      make=lambda values: begin(seeds, values, starts, *computed(given)),
      call=calls.run,
      compile=compile_both if can_trace else None,
      trace=calls.trace if can_trace else lambda count: None,
      collect=dispatch.collect,
    )


class _Calls:
  """The compiled chunk: how it is traced, compiled ahead, and called."""

  def __init__(
    self,
    made: _Made,
    chunk: Callable[..., Any],
    teacher_variables: PyTree,
    shared: PyTree,
    shapes: State,
    values: Values,
    head: PyTree,
  ) -> None:
    dispatch = made.dispatch
    self.made = made
    self.jitted: Any = dispatch.compile(chunk)
    self.given: Any = (teacher_variables, shared)
    self.abstract = jax.eval_shape(lambda given: given, self.given)
    self.shapes, self.values, self.head = shapes, values, head
    self.compiled: dict[int, Callable[..., Any]] = {}

  @functools.cached_property
  def fixed(self) -> tuple[PyTree, PyTree]:
    """The teacher's variables and the shared arrays, where the program takes them."""
    placed: tuple[PyTree, PyTree] = self.made.dispatch.place(computed(self.given))
    self.given = None  # what was stacked for this program alone is not kept twice
    return placed

  def arguments(self, count: int) -> tuple[Any, ...]:
    """The shapes of a chunk's arguments, and where they lie."""
    lead, length = (1, count) if self.made.stacked else (0, count)

    def longer(leaf: Any) -> jax.ShapeDtypeStruct:
      shape = (*leaf.shape[:lead], length, *leaf.shape[lead + 1 :])
      return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)

    state, values = self.made.dispatch.spread((self.shapes, self.values))
    items = jax.tree.map(longer, self.made.split(self.head))
    fixed = self.made.dispatch.place(self.abstract)
    return (state, *fixed, items, values)

  def trace(self, count: int) -> None:
    self.jitted.eval_shape(*self.arguments(count if self.made.scan else 1))  # jit keeps the trace

  def compile(self, count: int, times: int) -> Callable[[], int]:
    length = count if self.made.scan else 1
    given = self.arguments(length)
    options = by_work(self.jitted.__wrapped__, *given, calls=times * count // length)
    ahead = BackgroundCompiled(self.jitted)
    ahead.compile(*given, options=options)

    def finish() -> int:
      _ = self.fixed  # what is pending is computed while the compiler is at work
      made = self.compiled[length] = ahead.compiled()
      used = made.memory_analysis()
      sizes = (used.argument_size_in_bytes, used.output_size_in_bytes, used.temp_size_in_bytes)
      return int(sum(sizes) - used.alias_size_in_bytes)

    return finish

  def chunk(self, state: State, at: int, count: int, values: Values) -> tuple[State, PyTree]:
    items = self.made.split(self.made.read(at, count))
    call = self.compiled.get(count, self.jitted)
    return call(state, *self.fixed, items, values)

  def run(self, state: State, at: int, count: int, values: Values) -> tuple[State, PyTree]:
    values = self.made.dispatch.spread(values)
    if self.made.scan:
      return self.chunk(state, at, count, values)
    each = []
    for step in range(at, at + count):
      state, sums = self.chunk(state, step, 1, values)
      each.append(sums)
    return state, jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), *each)


# Numbers that differ between the students of one program, an axis over students in front:
# ``{"hyper": {keyword of the objective: [S]}, "optimizer": {keyword: [S]}}``.
Values = dict[str, dict[str, Any]]


def start_axes(starts: tuple[PyTree, PyTree], shapes: State, seeds: int) -> PyTree:
  """Which leaves of the given starts have an axis over students in front.

  Args:
    starts: of the student's variables, and of the objective's parameters and state.
    shapes: the state of one student.
    seeds: the number of students.

  Returns:
    ``in_axes`` for the starts: 0 for leaves that have one axis more than the state's, else None.
  """

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


def shared_arrays(sources: Sequence[Source]) -> tuple[PyTree, PyTree]:
  """The arrays of all sources, and each one's axis over them: 0 where they differ, else -1.

  Args:
    sources: those of the students, each once.

  Returns:
    ``(arrays, axes)``; arrays that are the same are there once.

  Raises:
    ValueError: the sources differ in more than arrays and data seed.
  """
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


def turns(sources: Sequence[Source]) -> int:
  """How many different sources come round in turn: a, b, a, b has two.

  Args:
    sources: one for each student.

  Returns:
    The number, or that of the students where sources do not come round.
  """
  alike = [(id(s.read), id(s.shared), s.data_seed) for s in sources]
  count = len(set(alike))
  rounds, rest = divmod(len(alike), count)
  return count if not rest and alike == alike[:count] * rounds else len(alike)


def of_group(shared: PyTree, axes: PyTree, group: Any) -> PyTree:
  """One source's arrays out of those of `shared_arrays`."""
  return jax.tree.map(lambda leaf, axis: leaf if axis < 0 else leaf[group], shared, axes)


def over_students(
  chunk: Callable[..., Any],
  seeds_by: str,
  shared_axes: PyTree,
  groups: int,
  at_once: int | None = None,
) -> Callable[..., Any]:
  """A chunk of steps of one student, for students ``[S]`` of which i has the source ``i % groups``.

  Args:
    chunk: ``(state, teacher variables, shared, items, values) -> (state, sums)``.
    seeds_by: ``"vmap"``, or ``"unroll"`` for one after another inside the program.
    shared_axes: from `shared_arrays`.
    groups: from `turns`.
    at_once: how many students at most are side by side under ``"vmap"``, one such set after
      another; None for all.

  Returns:
    The same function of leaves ``[S, ...]``; those of the items are ``[groups, ...]``.
  """
  if seeds_by == "vmap":
    return _side_by_side(chunk, shared_axes, groups, at_once)
  if seeds_by != "unroll":
    raise ValueError(f"seeds_by={seeds_by!r} must be 'vmap' or 'unroll'.")

  def one_after_another(
    state: State, variables: PyTree, shared: PyTree, items: PyTree, values: Values
  ) -> Any:
    each = []
    for i in range(state.step.shape[0]):
      mine, its = jax.tree.map(lambda leaf, i=i: leaf[i], (state, values))
      group = i % groups
      its_items = jax.tree.map(lambda leaf, group=group: leaf[group], items)
      its_shared = of_group(shared, shared_axes, group)
      each.append(chunk(mine, variables, its_shared, its_items, its))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

  return one_after_another


def _side_by_side(
  chunk: Callable[..., Any], shared_axes: PyTree, groups: int, at_once: int | None
) -> Callable[..., Any]:
  """Under vmap, in two axes: over those of one source nothing of the batch is mapped.

  So its batch is cut once, and the teacher sees it once, whatever the number of students.
  """
  mapped = jax.tree.map(lambda axis: None if axis < 0 else axis, shared_axes)
  of_source = jax.vmap(chunk, in_axes=(0, None, None, None, 0))
  over = jax.vmap(of_source, in_axes=(1, None, mapped, 0, 1), out_axes=1)

  def run(state: State, variables: PyTree, shared: PyTree, items: PyTree, values: Values) -> Any:
    count = state.step.shape[0]
    points, most = count // groups, count if at_once is None else at_once

    def train_group(group: Any, its_items: PyTree, students: Any) -> Any:
      its_shared = of_group(shared, shared_axes, group)
      return _in_sets(
        lambda some: of_source(some[0], variables, its_shared, its_items, some[1]), students, most
      )

    if groups == 1:  # the other axis would be traced for nothing
      return train_group(0, jax.tree.map(lambda x: x[0], items), (state, values))
    folded = jax.tree.map(lambda x: x.reshape(points, groups, *x.shape[1:]), (state, values))
    if most >= groups:
      made = _in_sets(
        lambda some: over(some[0], variables, shared, items, some[1]), folded, most // groups
      )
    else:
      by_group = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), folded)
      made = jax.lax.map(lambda one: train_group(*one), (jnp.arange(groups), items, by_group))
      made = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), made)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), made)

  return run


def _in_sets(train: Callable[[Any], Any], students: Any, most: int) -> Any:
  """Trains sets of so many students at most, one set after another in a loop."""
  count = jax.tree.leaves(students)[0].shape[0]
  if most >= count:
    return train(students)
  size = _divisor(count, most)
  sets = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), students)
  made = jax.lax.map(train, sets)
  return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), made)


def _divisor(number: int, most: int) -> int:
  """The largest divisor that is no larger."""
  return max(n for n in range(1, min(number, most) + 1) if number % n == 0)


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
