"""The program of a run: a plan and a dispatch made into one compiled call, for one student or many.

The way of a batch: `Program.run` reads a chunk's items on the host (`Source.items`), the dispatch
shares them out over the devices, and what is compiled, a loop over `Program.step`, cuts each step's
batch out of them (`Source.cut`) and hands it to the step (`train.make_step`). What comes back is
the next state and each step's sums.

Several students may share one program: their sources, their arrays, and an axis over them.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdistill._check import LabelsError
from jaxdistill._compile import CompiledOnce, computed, quick, shapes_of
from jaxdistill._lookups import Lookup, check_values, looked_up, of_integers
from jaxdistill._reach import depend_on
from jaxdistill.data import Source
from jaxdistill.teachers import decay_of, networks_of, with_networks
from jaxdistill.train._mesh import Dispatch, check_divides
from jaxdistill.train._optax import Transformation, is_optimizer
from jaxdistill.train._plan import Plan
from jaxdistill.train._sharding import Layout
from jaxdistill.train._side_by_side import form_of, inputs_of, turns_must_be_known
from jaxdistill.train._state import State, init_state, trained_variables
from jaxdistill.train._step import counts_of, make_step
from jaxdistill.types import Batch, Model, Network, Objective, Teacher

__all__ = [
  "Program",
  "Values",
  "cut_over",
  "layout_of",
  "nothing_counts",
  "of_group",
  "optimizer_of",
  "over_students",
  "reading",
  "shapes_where_they_lie",
  "shared_arrays",
  "start_axes",
  "step_of",
  "teacher_placed",
  "teacher_reading",
  "turns",
  "with_teacher_placed",
]

PyTree = Any
# Of the items of one dispatch, which are in memory a few times at once: as they are read, stacked,
# on their way and on the device. A hundred batches of photographs would be gigabytes.
_MOST_BYTES = 2**28
# Numbers that differ between the students of one program, an axis over students in front:
# ``{"hyper": {keyword of the objective: [S]}, "optimizer": {keyword: [S]}}``.
Values = dict[str, dict[str, Any]]


class Program:
  """What a run calls: put together and checked abstractly, compiled once for chunks of any length.

  Attributes:
    plan: what is trained.
    dispatch: how the program is compiled, and where its arguments lie.
    longest: the most steps in a chunk.
    source: the first source, for what all of them share.
    values: what differs between students; `with_values` has other ones.
    scan: whether a chunk is one dispatch; the dispatch's choice, or by what is computed.
    seeds_by: whether students are side by side or one after another; likewise.
    shapes: the state's shapes and dtypes.
    layout: where the state lies, by the dispatch's rules; None where all of it is on every device.
    begins: the jaxpr of `initial`.
    first_item: what the first step of the first source is cut from.
  """

  def __init__(
    self,
    plan: Plan,
    dispatch: Dispatch,
    *,
    longest: int,
    values: Values | None = None,
    at_once: int | None = None,
  ) -> None:
    """Puts a program together; nothing is compiled yet.

    Args:
      plan: what is trained. Students whose sources are the same share its batches and the teacher's
        outputs, where the sources come round in turn (a, b, a, b).
      dispatch: how the program is compiled.
      longest: the most steps that `run` is asked for.
      values: numbers that differ between students.
      at_once: how many students are side by side under ``"vmap"``; None for all.

    Raises:
      ValueError: sources do not go together, a batch does not divide by the devices, the networks,
        the objective and the data do not fit together, or the dispatch's rules do not fit them.
    """
    if plan.teacher is not None:  # else it may have been run over the examples, where rules put it
      plan, _ = with_teacher_placed(plan, dispatch)
    self.plan, self.dispatch, self.longest = plan, dispatch, longest
    self.values: Values = {"hyper": {}, "optimizer": {}} if values is None else values
    self.sources = plan.sources[: turns(plan.sources)]
    self.source = self.sources[0]
    self._check_batch()
    shared, axes = shared_arrays(self.sources)
    self._looked_up: list[tuple[str, tuple[Lookup, ...]]] = []  # before anything is known of it
    head = self._read(0, 1)
    self._split(head)  # a batch that does not divide by the devices says so here
    first = jax.tree.map(lambda leaf: leaf[0, 0] if plan.stacked else leaf[0], head)
    self.first_item = first
    seeds: Any = np.array(plan.seeds, np.uint32)
    starts = (plan.start, plan.objective.start)
    initial = self.initial_state
    if plan.stacked:
      initial = jax.vmap(
        initial, in_axes=(0, 0, self._start_axes(starts, shared, axes, first), None, None)
      )
    else:
      seeds = seeds[0]
    example = (of_group(shared, axes, 0), first)
    # Abstract first: what does not fit together says so before anything is compiled. Of a batch of
    # which several processes have read a part each, all of it: a run goes on with fewer or more.
    given = (seeds, self.values, starts, example[0], self._of_all(first))
    begun = jax.make_jaxpr(initial, return_shape=True)(*given)
    self.begins: Any = begun[0]
    self.shapes: State = begun[1]
    self._looked_up = self._lookups(head)
    inputs = functools.partial(inputs_of, plan.sources[0])
    self.layout = layout_of(plan.student, dispatch, self.shapes, inputs, over=int(plan.stacked))
    self._where = None if self.layout is None else self.layout.state
    self._student = reading(plan.student, dispatch, "", self._cut_student())
    self._cut_teacher = cut_over(dispatch, plan.teacher)
    self.scan, self.seeds_by = form_of(dispatch, plan, *example)
    self._begin = _beginning(initial, self._where)
    self._begin_with = lambda values: (seeds, values, starts, *example)
    self._example = example
    self._head = head
    if plan.stacked:
      groups = len(self.sources)
      chunk = over_students(self.step, self.seeds_by, axes, groups, scan=self.scan, at_once=at_once)
    else:
      chunk = _of_one(self.step, scan=self.scan)
    where = () if self._where is None else (self._where,)  # which other dispatches do not take
    self._chunk: CompiledOnce = dispatch.compile(chunk, *where)
    self._whole = self._chunk
    if self.scan and turns_must_be_known():
      length = self._length

      def whole(*given: Any) -> tuple[State, PyTree]:
        return chunk(*given[:-1], length)  # all of its turns: the count is not looked at

      self._whole = dispatch.compile(whole, *where)
    self._abstract = shapes_where_they_lie((plan.teacher, shared))
    once = [(plan.teacher, shared)]
    # Placed at the first call, for this program and its like with other values; what was stacked
    # for it alone is not kept twice.
    self._fixed = functools.cache(lambda: dispatch.place(computed(once.pop())))
    self._count = functools.cache(lambda count: dispatch.place(np.int32(count)))

  def _of_all(self, item: PyTree) -> PyTree:
    """What one step is cut from, as all processes together have it: of several, its shapes."""
    parts = self.dispatch.part[1]
    if parts == 1:
      return item

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
      rows = np.shape(leaf)
      return jax.ShapeDtypeStruct((*(n * parts for n in rows[:1]), *rows[1:]), leaf.dtype)

    return jax.tree.map(shape, item)

  def _check_batch(self) -> None:
    size, devices, accumulate = (
      self.source.batch_size,
      self.dispatch.devices,
      self.plan.accumulate,
    )
    check_divides(size, devices)
    if size % (devices * accumulate):
      raise ValueError(
        f"batch_size={size} does not divide into accumulate={accumulate} micro-batches over "
        f"{devices} devices; take a multiple of {devices * accumulate}."
      )

  def _start_axes(self, starts: Any, shared: PyTree, axes: PyTree, first: PyTree) -> Any:
    """Which of the given starts have an axis over students."""
    if all(start is None for start in starts):
      return (None, None)
    seed, values = jax.tree.map(
      lambda leaf: np.asarray(leaf)[0], (np.array(self.plan.seeds, np.uint32), self.values)
    )
    example = (of_group(shared, axes, 0), first)
    plain = jax.eval_shape(self.initial_state, seed, values, (None, None), *example)
    return start_axes(starts, plain, len(self.plan.seeds))

  @property
  def stacked(self) -> bool:
    """Whether the state has an axis over students."""
    return self.plan.stacked

  @property
  def objective(self) -> Objective:
    """What is minimised."""
    return self.plan.objective

  @property
  def examples_per_step(self) -> int:
    """Over all students."""
    return self.source.batch_size * len(self.plan.seeds)

  def with_values(self, values: Values) -> Program:
    """The same program for other values of the same shapes: nothing is compiled or placed anew."""
    other = copy.copy(self)
    other.values = values
    return other

  def initial_state(
    self, seed: Any, mine: Values, starts: Any, shared: PyTree, item: PyTree
  ) -> State:
    """The state of one student at step 0; pure."""
    plan = self.plan
    return init_state(
      jax.random.key(seed),
      plan.student,
      dataclasses.replace(plan.objective, start=starts[1]),
      optimizer_of(plan, mine),
      self.source.cut(shared, item),
      teacher=shapes_where_they_lie(plan.teacher),  # its outputs' shapes are all that is asked
      start=starts[0],
      average=plan.average is not None,
      num_classes=self.source.num_classes,
    )

  def step(
    self, state: State, teacher: Teacher | None, shared: PyTree, item: PyTree, mine: Values
  ) -> tuple[State, PyTree]:
    """A step of one student, its batch cut out of the arrays; pure."""
    optimizer, axis_name = optimizer_of(self.plan, mine), self.dispatch.axis_name
    plan = dataclasses.replace(self.plan, student=self._student)
    teacher = teacher_reading(teacher, self.dispatch, self._cut_teacher)
    step = step_of(plan, optimizer, mine, axis_name=axis_name, unroll=not self.scan)
    return step(state, teacher, self.dispatch.constrain(self.source.cut(shared, item)))

  def _cut_student(self) -> Mapping[str, Any]:
    """The specs of the student's parameters, without the axis over students."""
    if self._where is None:
      return {}
    found = cut_over(self.dispatch, {"params": self._where.params})
    return {path: spec[int(self.stacked) :] for path, spec in found.items()}

  def _lookups(self, head: PyTree) -> list[tuple[str, tuple[Lookup, ...]]]:
    """What student and teacher look up of the inputs; raises where that is not in their tables.

    Arrays on the device are looked at here, whole, the rows of a stream when they are read.
    """
    source, student = self.source, self.plan.student
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], head) for i in range(len(self.sources))]
    pieces = each if self.stacked else [head]
    given = shapes_of((source.shared, jax.tree.map(lambda leaf: leaf[0], pieces[0])))
    if not of_integers(jax.eval_shape(source.cut, *given).inputs):
      return []

    def said(variables: PyTree, batch: Batch) -> Any:
      return student.apply(variables, batch.inputs, train=False, key=None)[0]

    params, rest = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape[self.stacked :], leaf.dtype),
      (self.shapes.params, self.shapes.model_state),
    )
    asked: dict[str, tuple[Any, Any]] = {
      f"the student {student.name!r}": (said, {"params": params, **rest})
    }
    if self.plan.teacher is not None:
      asked["the teacher"] = (Teacher.__call__, shapes_of(self.plan.teacher))
    found = []
    for who, (ask, variables) in asked.items():
      looked = looked_up(
        lambda fixed, shared, item, ask=ask: ask(fixed, source.cut(shared, item)), variables, *given
      )
      found.append((who, looked))
      for one in {id(one.shared): one for one in self.sources}.values():
        check_values(looked, (one.shared, None), name=repr(one.name), who=who)
    self._check_items(found, pieces)
    return found

  def _check_items(self, found: list[tuple[str, tuple[Lookup, ...]]], pieces: Any) -> None:
    """Looks at what sources have read, ``[count, B, ...]``."""
    for piece, source in zip(pieces, self.sources, strict=True):
      for who, looked in found:
        check_values(looked, (None, piece), name=repr(source.name), who=who, axes=2)

  def _read(self, at: int, count: int) -> PyTree:
    pieces = [source.items(at, count, self.dispatch.part) for source in self.sources]
    self._check_items(self._looked_up, pieces)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *pieces) if self.stacked else pieces[0]

  def _split(self, items: PyTree) -> PyTree:
    return self.dispatch.split(items, 2 if self.stacked else 1)

  @property
  def _length(self) -> int:
    """Steps that the compiled program has room for: of a stream, as many as `_MOST_BYTES` hold."""
    if not self.scan:
      return 1
    step = sum(leaf.nbytes for leaf in jax.tree.leaves(self._head))
    return max(1, min(self.longest, _MOST_BYTES // max(1, step)))

  def _of_length(self, steps: int) -> CompiledOnce:
    """What computes so many steps: whole chunks have a program of their own on a GPU."""
    return self._whole if steps >= self._length else self._chunk

  @property
  def whole(self) -> CompiledOnce:
    """What computes a chunk that has all of its steps."""
    return self._whole

  def arguments(self) -> tuple[Any, ...]:
    """The shapes of the compiled program's arguments, and where they lie."""

    def longer(leaf: Any, head: Any) -> jax.ShapeDtypeStruct:
      axis = leaf.ndim - np.ndim(head) + self.stacked  # pmap has an axis over devices in front
      shape = (*leaf.shape[:axis], self._length, *leaf.shape[axis + 1 :])
      return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)

    state, values = self.spread(self.shapes), self.dispatch.spread(self.values)
    items = jax.tree.map(longer, self._split(self._head), self._head)
    return (state, *self.dispatch.place(self._abstract), items, values, self._count(1))

  def spread(self, state: State) -> State:
    """A state, or its shapes, where `run` takes it; it is given away."""
    where = () if self._where is None else (self._where,)
    placed: State = self.dispatch.spread(state, *where)
    return placed

  def initial(self) -> State:
    """The state at step 0; where rules say how it is cut, it is never whole on a device."""
    self._compile_begin()
    state: State = self._begin(*self._where_it_begins(computed(self._begin_with(self.values))))
    return state

  def _compile_begin(self) -> None:
    if not self._begin.begun:
      given = self._begin_with(self.values)
      if self.layout is not None:
        given = self._where_it_begins(shapes_where_they_lie(given))
      self._begin.compile(*given, options=quick())

  def _where_it_begins(self, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of `initial_state` on the devices among which its result is shared out."""
    if self.layout is None:
      return given
    seeds, values, starts, shared, item = given
    starts = self.dispatch.place(starts, self.layout.follow(starts))
    seeds, values, shared = self.dispatch.place((seeds, values, shared))
    # Where several processes have read a part of it each, it is put together of these.
    alike = self.dispatch.part[1] == 1
    item = self.dispatch.place(item) if alike else self.dispatch.split(self.first_item, 0)
    return (seeds, values, starts, shared, item)

  def lying(self, items: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """The shapes of a checkpoint's items with the places that they are read to.

    Args:
      items: of `to_items`, as shapes.
    """
    if self.layout is None:
      return dict(items)
    state = self.layout.state
    where = {
      **{name: self.layout.follow(tree) for name, tree in items.items()},
      "objective": {"params": state.objective_params, "state": state.objective_state},
      "optimizer": state.opt_state,
    }
    return {
      name: jax.tree.map(lambda leaf, at: leaf.update(sharding=at), tree, where[name])
      for name, tree in items.items()
    }

  def ends(self) -> Model | None:
    """The model that a chunk ends with: shapes, dtypes, and where they lie.

    None where that is not known before: a copy that is taken from one of several, or what is put
    together of a state in parts.
    """
    if self.dispatch.axis_name is not None or jax.process_count() > 1 or self.layout is not None:
      return None
    made: Model = self.dispatch.spread(jax.eval_shape(self.plan.model, self.shapes))
    return made

  def trace(self) -> None:
    """Traces what is compiled, so that what does not fit says so."""
    self._whole.trace(*self.arguments())
    self._check_labels()
    self._check_counted()

  def _check_labels(self) -> None:
    """Raises where the objective takes labels for distributions, and they are none.

    The value of a label is nobody's in a compiled step. So where labels are floats of the logits'
    shape, the objective is run once outside of it: on the first batch's labels, and on zeros in the
    place of what networks put out.
    """
    objective, source, student = self.plan.objective, self.source, self.plan.student
    batch = jax.eval_shape(source.cut, *self._example)
    if not jnp.issubdtype(batch.labels.dtype, jnp.floating) or jax.process_count() > 1:
      return
    shapes = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape[self.stacked :], leaf.dtype),
      (self.shapes.params, self.shapes.model_state),
    )

    def said(params: PyTree, rest: PyTree, inputs: PyTree) -> Any:
      return student.apply({"params": params, **rest}, inputs, train=False, key=None)[0]

    outputs = jax.eval_shape(said, *shapes, batch.inputs)
    if outputs.logits is None or outputs.logits.shape != batch.labels.shape:
      return
    teacher = None if self.plan.teacher is None else shapes_where_they_lie(self.plan.teacher)
    asked = batch.teacher is None and teacher is not None
    target = jax.eval_shape(Teacher.__call__, teacher, batch) if asked else batch.teacher
    outputs, target = jax.tree.map(
      lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (outputs, target)
    )
    hyper = {n: value(0) if callable(value) else value for n, value in objective.hyper.items()}
    try:
      params, state = objective.init(jax.random.key(0), outputs, target)
      real = jax.jit(source.cut, compiler_options=quick())(*computed(self._example))
      objective.apply(params, state, outputs, target, real, key=jax.random.key(0), **hyper)
    except LabelsError:
      raise
    except Exception:  # Whatever else is wrong is wrong in the step too, and said there.
      return

  def _check_counted(self) -> None:
    """Raises where no label may be used, and no term counts an example without one.

    Masks depend on the batch alone. So what counts is asked of the step outside of the program, of
    the first batch as if all of it counted: the compiler leaves both networks out.
    """
    source = self.source
    if source.has_labels or jax.process_count() > 1:
      return  # else said of the first chunk
    plan = dataclasses.replace(self.plan, accumulate=1)
    shapes = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape[self.stacked :], leaf.dtype),
      (dataclasses.replace(self.shapes, opt_state=optax.EmptyState()), shapes_of(self.values)),
    )
    given = (*shapes, None if plan.teacher is None else shapes_where_they_lie(plan.teacher))

    def counts(given: tuple[State, Values, Any], batch: Batch) -> list[Any]:
      state, mine, teacher = given
      return counts_of(step_of(plan, optax.identity(), mine)(state, teacher, batch)[1])

    def of_zeros(batch: Batch) -> list[Any]:
      return counts(
        jax.tree.map(lambda leaf: jax.lax.full(leaf.shape, 0, leaf.dtype), given), batch
      )

    batch = jax.jit(source.cut, compiler_options=quick())(*computed(self._example))
    batch = dataclasses.replace(batch, weight=jnp.ones_like(batch.weight))
    if batch.teacher is not None and batch.teacher.where is not None:
      every = jnp.ones_like(batch.teacher.where)
      batch = dataclasses.replace(batch, teacher=dataclasses.replace(batch.teacher, where=every))
    if any(depend_on(counts, given, batch)):
      return  # a mask of what a network says, or of chance: nobody knows it before
    if not any(np.any(count) for count in jax.jit(of_zeros, compiler_options=quick())(batch)):
      raise nothing_counts(source.name)

  def compile(self, times: int = 1, *, begin: bool = False, count: int | None = None) -> None:
    """Begins to compile what `run` calls, which is then at work in the background.

    Args:
      times: how often the plan's steps are run: what computes little is compiled quickly.
      begin: whether to compile what `initial` calls too.
      count: the steps of the chunk that is meant; ``longest`` where left out.
    """
    if begin:
      self._compile_begin()  # at work while the chunk is traced
    program = self._of_length(self._length if count is None else count)
    if not program.begun:
      # The loop's body counts once, whatever the number of its turns.
      program.compile(*self.arguments(), calls=times * self.plan.steps)

  def bytes_needed(self) -> int:
    """What a chunk needs on a device; waits for the compiler."""
    self._fixed()  # what is pending is computed while the compiler is at work
    used = self._whole.compiled().memory_analysis()
    sizes = (used.argument_size_in_bytes, used.output_size_in_bytes, used.temp_size_in_bytes)
    return int(sum(sizes) - used.alias_size_in_bytes)

  def run(self, state: State, at: int, count: int) -> tuple[State, list[PyTree]]:
    """The next ``count`` steps; donates the state.

    Returns:
      ``(state, sums)``: `fetch` brings the sums to the host.

    Raises:
      ValueError: ``count`` is above ``longest``.
    """
    if count > self.longest:
      raise ValueError(f"count={count} is above longest={self.longest}, the program's chunk.")
    self.compile(count=count)
    values = self.dispatch.spread(self.values)
    sums = []
    for first in range(at, at + count, self._length):
      steps = min(self._length, at + count - first)
      items = jax.tree.map(self._filled, self._read(first, steps))
      given = (*self._fixed(), self._split(items), values, self._count(steps))
      state, each = self._of_length(steps)(state, *given)
      sums.append(each)
    return state, sums

  def _filled(self, leaf: np.ndarray) -> np.ndarray:
    """An item's leaf with room for a whole chunk; what is beyond its steps is never looked at."""
    axis = int(self.stacked)
    if leaf.shape[axis] == self._length:
      return leaf
    made = np.zeros((*leaf.shape[:axis], self._length, *leaf.shape[axis + 1 :]), leaf.dtype)
    made[tuple(slice(size) for size in leaf.shape)] = leaf
    return made

  def fetch(self, sums: Sequence[PyTree], count: int) -> PyTree:
    """What `run` gave, on the host: ``{name: (sum, count)}`` with an axis over the steps last."""
    each = jax.device_get([self.dispatch.collect(one) for one in sums])
    return jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=-1)[..., :count], *each)


def with_teacher_placed(plan: Plan, dispatch: Dispatch) -> tuple[Plan, tuple[str, ...]]:
  """The plan with its teacher where the dispatch's rules for it say, and what the log says of that.

  Args:
    plan: what is trained.
    dispatch: how it is compiled.

  Returns:
    ``(plan, lines)``: the same plan where nothing is moved.

  Raises:
    TypeError: a rule is none.
    ValueError: a rule does not fit the teacher or the mesh; or there is no teacher, or one without
      variables of its own, that it could be for.
  """
  inputs = functools.partial(inputs_of, plan.sources[0])
  placed, said = teacher_placed(plan.teacher, dispatch, inputs)
  return (plan if placed is plan.teacher else dataclasses.replace(plan, teacher=placed)), said


def teacher_placed(
  teacher: Teacher | None, dispatch: Dispatch, inputs: Callable[[], PyTree]
) -> tuple[Any, tuple[str, ...]]:
  """The teacher where the dispatch's rules for it say, and what the log says of that.

  Args:
    teacher: it, or None; shapes are placed as arrays are.
    dispatch: how a step is compiled.
    inputs: gives the shapes of a batch's inputs, asked where a rule may look at names of axes.

  Raises:
    TypeError: a rule is none.
    ValueError: as `with_teacher_placed`.
  """
  rules = dispatch.sharding
  if rules is None or rules.teacher is None:
    return teacher, ()
  if teacher is None or decay_of(teacher) is not None:
    raise ValueError(
      "teacher_sharding is for a teacher with variables of its own, and there is none (a moving "
      "average of the student lies as the student does): leave it out."
    )

  def names() -> dict[str, Any]:
    each, shapes = networks_of(teacher), inputs()
    return {f"{at}{path}": n for at, net in each for path, n in _names_of(net, shapes).items()}

  return rules.of_teacher(teacher, names)


def _names_of(network: Any, inputs: PyTree) -> dict[str, Any]:
  """The names that a network's module gives its axes, by path; none of a network of one's own."""
  return {} if network.axes is None else dict(network.axes(inputs))


def layout_of(
  student: Network,
  dispatch: Dispatch,
  shapes: State,
  inputs: Callable[[], PyTree],
  *,
  over: int,
) -> Layout | None:
  """Where a state lies; None where no rule says so, and all of it is on every device.

  Args:
    student: whose state it is.
    dispatch: how a step is compiled.
    shapes: the state's.
    inputs: as `teacher_placed` takes it.
    over: 1 where arrays have an axis over students in front; else 0.
  """
  rules = dispatch.sharding
  if rules is None or rules.student is None:
    return None
  return rules.of_state(shapes, lambda: _names_of(student, inputs()), over=over)


def cut_over(dispatch: Dispatch, tree: Any) -> Mapping[str, Any]:
  """The specs of what is cut along the axes over which batches are split, by path.

  Args:
    dispatch: how a step is compiled.
    tree: arrays, shapes or shardings; or a teacher.
  """
  tree = tree.variables if isinstance(tree, Teacher) else tree
  return {} if dispatch.sharding is None else dispatch.sharding.cut_over(tree)


def reading(network: Network, dispatch: Dispatch, at: str, specs: Mapping[str, Any]) -> Network:
  """The network that gathers where it uses them the parameters that are cut.

  Args:
    network: as it is.
    dispatch: how a step is compiled.
    at: the path at which its variables begin in those of ``specs``.
    specs: from `cut_over`.
  """
  mine = {path[len(at) :]: spec for path, spec in specs.items() if path.startswith(at)}
  if not mine or network.at_use is None or dispatch.sharding is None:
    return network
  return network.at_use(mine, dispatch.sharding.gathered)


def teacher_reading(
  teacher: Teacher | None, dispatch: Dispatch, specs: Mapping[str, Any]
) -> Teacher | None:
  """The teacher whose networks gather as `reading` has it.

  Args:
    teacher: it, or None.
    dispatch: how a step is compiled.
    specs: from `cut_over`, of the teacher.
  """
  if teacher is None or not specs:
    return teacher
  return with_networks(teacher, lambda at, network: reading(network, dispatch, at, specs))


def _beginning(initial: Callable[..., State], where: PyTree) -> CompiledOnce:
  """What makes the state at step 0, and cuts it where it is made."""
  if where is None:
    return CompiledOnce(initial)
  out = jax.tree.leaves(where)
  return CompiledOnce(initial, functools.partial(jax.jit, keep_unused=True, out_shardings=out))


def optimizer_of(plan: Plan, mine: Values) -> Transformation:
  """One student's optimiser, made with its numbers where it is given as a function of them."""
  given: Any = plan.optimizer
  made: Transformation = given if is_optimizer(given) else given(**mine["optimizer"])
  return made


def nothing_counts(source: str) -> ValueError:
  """What is said of data without labels, of which no term of the objective counts an example.

  Args:
    source: the data's name.
  """
  return ValueError(
    f"{source!r} has no label that may be used, and no term of the objective counts an example "
    "without one: nothing would be learned. Give the data labels (look at labelled= and weight=), "
    "or an objective with a teacher (recipes.kd)."
  )


def step_of(
  plan: Plan,
  optimizer: Transformation,
  mine: Values,
  *,
  axis_name: str | None = None,
  unroll: bool = False,
) -> Callable[..., Any]:
  """One student's step, with its numbers; see `train.make_step`.

  The numbers are traced, and the step is the same: a sweep is another way to call it.
  """
  return make_step(
    plan.student,
    plan.objective,
    optimizer,
    hyper=mine["hyper"],
    axis_name=axis_name,
    transform=plan.sources[0].transform,
    accumulate=plan.accumulate,
    unroll=unroll,
    average=plan.average,
  )


def _chunk(
  step: Callable[..., Any],
  state: State,
  teacher: Teacher | None,
  shared: PyTree,
  items: PyTree,
  values: Values,
  count: Any,
  *,
  scan: bool,
  axis: int = 0,
) -> tuple[State, PyTree]:
  """``lax.scan`` over the first ``count`` of the items, a number that is data.

  So chunks of all lengths are one program. A GPU's loop whose number of turns is data stops at each
  turn, until the host has been told whether to go on; there, a number stands in for it where a
  chunk has all of its steps (see `turns_must_be_known`). What is there of several students is
  inside the loop: JAX traces a loop under ``vmap`` several times.

  Args:
    step: ``(state, teacher, shared, item, values) -> (state, sums)``, of one student or of several.
    state: its state.
    teacher: as the step takes it.
    shared: likewise.
    items: what a step is cut from, the steps on one axis.
    values: as the step takes them.
    count: how many of the steps are done; data, or a number of the program.
    scan: whether it is a loop on the device, which costs no dispatch for each step; without, one
      step is the program, and the host calls it again and again.
    axis: of the steps in the items.

  Returns:
    The next state, and sums with an axis over the steps last: 0 for those beyond ``count``.
  """

  def body(state: State, i: Any) -> tuple[State, PyTree]:
    item = jax.tree.map(
      lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, axis, keepdims=False), items
    )
    return step(state, teacher, shared, item, values)

  if not scan:
    state, one = body(state, 0)
    return state, jax.tree.map(lambda leaf: leaf[..., None], one)
  longest = jax.tree.leaves(items)[0].shape[axis]
  step = jax.jit(step, inline=True)  # traced once, for the sums' shapes and in the loop
  _, one = jax.eval_shape(lambda: body(state, 0))
  sums = jax.tree.map(lambda leaf: jnp.zeros((*leaf.shape, longest), leaf.dtype), one)

  def turn(i: Any, carry: tuple[State, PyTree]) -> tuple[State, PyTree]:
    state, sums = carry
    state, mine = body(state, i)
    return state, jax.tree.map(lambda all, one: all.at[..., i].set(one), sums, mine)

  made: tuple[State, PyTree] = jax.lax.fori_loop(0, count, turn, (state, sums))
  return made


def shapes_where_they_lie(tree: PyTree) -> PyTree:
  """Shapes and dtypes, with the sharding of arrays that have one.

  Args:
    tree: arrays, or shapes.
  """
  shapes = jax.eval_shape(lambda leaves: leaves, tree)
  return jax.tree.map(
    lambda leaf, shape: shape.update(sharding=getattr(leaf, "sharding", None)), tree, shapes
  )


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
    for name in ("size", "batch_size", "transfer", "num_classes", "views", "name", "transform"):
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


def _of_one(step: Callable[..., Any], *, scan: bool) -> Callable[..., Any]:
  """A chunk of steps of one student, as `over_students` has it for several."""

  def chunk(*given: Any) -> tuple[State, PyTree]:
    return _chunk(step, *given, scan=scan)

  return chunk


def over_students(
  step: Callable[..., Any],
  seeds_by: str,
  shared_axes: PyTree,
  groups: int,
  *,
  scan: bool,
  at_once: int | None = None,
) -> Callable[..., Any]:
  """A chunk of steps for students ``[S]``, of which i has the source ``i % groups``.

  Args:
    step: of one student, ``(state, teacher, shared, item, values) -> (state, sums)``.
    seeds_by: ``"vmap"``, or ``"unroll"`` for one after another inside the program.
    shared_axes: from `shared_arrays`.
    groups: from `turns`.
    scan: whether a chunk is a loop on the device, see `_chunk`.
    at_once: how many students at most are side by side under ``"vmap"``, one such set after
      another; None for all.

  Returns:
    ``(state, teacher, shared, items, values, count) -> (state, sums)``: leaves ``[S, ...]``, of the
    items ``[groups, steps, ...]``, of the sums ``[S, steps]``.
  """
  if seeds_by == "vmap":
    return _side_by_side(step, shared_axes, groups, scan, at_once)
  if seeds_by != "unroll":
    raise ValueError(f"seeds_by={seeds_by!r} must be 'vmap' or 'unroll'.")

  def chunk(
    state: State,
    teacher: Teacher | None,
    shared: PyTree,
    items: PyTree,
    values: Values,
    count: Any,
  ) -> Any:
    each = []
    for i in range(state.step.shape[0]):
      mine, its = jax.tree.map(lambda leaf, i=i: leaf[i], (state, values))
      group = i % groups
      its_items = jax.tree.map(lambda leaf, group=group: leaf[group], items)
      its_shared = of_group(shared, shared_axes, group)
      each.append(_chunk(step, mine, teacher, its_shared, its_items, its, count, scan=scan))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

  return chunk


def _side_by_side(
  step: Callable[..., Any], shared_axes: PyTree, groups: int, scan: bool, at_once: int | None
) -> Callable[..., Any]:
  """Under vmap, in two axes: over those of one source nothing of the batch is mapped.

  So its batch is cut once, and the teacher sees it once, whatever the number of students.
  """
  mapped = jax.tree.map(lambda axis: None if axis < 0 else axis, shared_axes)
  of_source = jax.vmap(step, in_axes=(0, None, None, None, 0))
  over = jax.vmap(of_source, in_axes=(1, None, mapped, 0, 1), out_axes=1)

  def chunk(
    state: State,
    teacher: Teacher | None,
    shared: PyTree,
    items: PyTree,
    values: Values,
    count: Any,
  ) -> Any:
    students = state.step.shape[0]
    points, most = students // groups, students if at_once is None else at_once

    def train(
      step: Callable[..., Any], shared: PyTree, items: PyTree, axis: int
    ) -> Callable[[Any], Any]:
      return lambda some: _chunk(
        step, some[0], teacher, shared, items, some[1], count, scan=scan, axis=axis
      )

    def train_group(group: Any, its_items: PyTree, students: Any) -> Any:
      its_shared = of_group(shared, shared_axes, group)
      return _in_sets(train(of_source, its_shared, its_items, 0), students, most)

    if groups == 1:  # the other axis would be traced for nothing
      return train_group(0, jax.tree.map(lambda x: x[0], items), (state, values))
    folded = jax.tree.map(lambda x: x.reshape(points, groups, *x.shape[1:]), (state, values))
    if most >= groups:
      made = _in_sets(train(over, shared, items, 1), folded, most // groups)
    else:
      by_group = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), folded)
      made = jax.lax.map(lambda one: train_group(*one), (jnp.arange(groups), items, by_group))
      made = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), made)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), made)

  return chunk


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
