"""Where a run's variables lie on a mesh: rules by path, FSDP, or the names that a module gives.

A rule says along which axes of the mesh the axes of an array are cut, as a `PartitionSpec`. That is
all there is to decide: arrays bring their shardings along, and the compiler propagates from there
and adds what has to be communicated (GSPMD). What follows a parameter (an optimiser's moments, a
moving average) lies as the parameter does. `jaxdistill.train.with_jit` puts arrays there.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdistill import _check
from jaxdistill.networks import Int8
from jaxdistill.runs import is_key
from jaxdistill.types import Model, Teacher

__all__ = [
  "Layout",
  "Rule",
  "Rules",
  "Sharding",
  "Variable",
  "annotated",
  "check_rules",
  "fsdp",
  "laid",
  "lies_on",
  "put",
  "shardings",
]

PyTree = Any
Path = tuple[str, ...]
# The two arrays of a weight in eight bits.
_INTEGERS, _SCALE = (field.name for field in dataclasses.fields(Int8)[:2])


@dataclasses.dataclass(frozen=True)
class Variable:
  """What a rule is told of an array.

  Attributes:
    path: its path in the variables, ``"params/Dense_0/kernel"``; of what an objective learns and
      remembers, ``"objective/..."`` and ``"objective_state/..."``.
    shape: its shape, for one student.
    dtype: its dtype.
    names: the names that its module gives its axes (`flax.linen.with_partitioning`,
      ``with_logical_partitioning``, `flax.nnx.with_partitioning`); None where it gives none.
  """

  path: str
  shape: tuple[int, ...]
  dtype: Any
  names: tuple[Any, ...] | None = None

  @property
  def bytes(self) -> int:
    """Of the whole array."""
    return math.prod(self.shape) * self.dtype.itemsize


# A rule: along which axes of the mesh the array's axes are cut; or a function that says so of each
# array, and None of those that it does not cover.
Rule = PartitionSpec | Callable[[Variable, Mesh], PartitionSpec | None]
# By regular expressions, found anywhere in the path, the first that matches; or one rule for all.
Rules = Mapping[str, Rule] | Sequence[tuple[str, Rule]] | Rule


@dataclasses.dataclass(frozen=True)
class _Fsdp:
  axes: tuple[str, ...]
  least: int

  def __call__(self, variable: Variable, mesh: Mesh) -> PartitionSpec | None:
    """Along the largest axis that divides; of equal ones the last, for the first may be layers."""
    parts = _size(self.axes, mesh, variable)
    if variable.bytes < self.least:
      return None
    sizes = [(size, i) for i, size in enumerate(variable.shape) if size and not size % parts]
    if not sizes:
      return None
    cut = self.axes[0] if len(self.axes) == 1 else self.axes
    return PartitionSpec(*[None] * max(sizes)[1], cut)


def fsdp(axis: str | Sequence[str] = "fsdp", *, least: int = 0) -> Rule:
  """Fully sharded data parallelism: a rule that cuts each array along its largest axis.

  Of the axes that divide by the devices, that is. What has none is not covered: it is on every
  device, and the log lists it.

  Args:
    axis: of the mesh; several for their product.
    least: bytes below which an array is left whole; to gather a small one costs a message for
      little memory.

  Returns:
    A rule, for all variables or for those of a regular expression.

  Raises:
    TypeError: ``axis`` is no name, or ``least`` no integer.

  Source: Rajbhandari et al., "ZeRO", 2020, stage 3.

  >>> kernel = Variable("params/Dense_0/kernel", (3, 64), np.dtype("float32"))
  >>> devices = np.array(jax.devices()[:1]).reshape(1, 1)
  >>> tuple(fsdp()(kernel, Mesh(devices, ("data", "fsdp"))))
  (None, 'fsdp')
  """
  several = isinstance(axis, Sequence) and not isinstance(axis, str)
  axes: Any = tuple(axis) if several else (axis,)
  if not axes or not all(isinstance(one, str) for one in axes):
    raise TypeError(f"axis={_check.show(axis)} must name an axis of the mesh, or several.")
  return _Fsdp(axes, _check.whole("least", least, least=0))


@dataclasses.dataclass(frozen=True)
class _Annotated:
  names: tuple[tuple[str, Any], ...]

  def __call__(self, variable: Variable, mesh: Mesh) -> PartitionSpec | None:
    """The spec of the names; those that nobody maps are the mesh's own."""
    from flax.linen import logical_to_mesh_axes  # half of Flax, for those who name axes alone

    if variable.names is None:
      return None
    known = {name for name, _ in self.names}
    words = [name for name in variable.names if isinstance(name, str)]
    unknown = [name for name in words if name not in known and name not in mesh.axis_names]
    if unknown:
      raise ValueError(
        f"{variable.path} {list(variable.shape)} has the axes {variable.names}, of which {unknown} "
        f"are neither among annotated's names, {sorted(known)}, nor axes of the mesh, "
        f"{dict(mesh.shape)}; say what becomes of them: "
        f"train.annotated({{{unknown[0]!r}: {mesh.axis_names[-1]!r}}}), or None for whole."
      )
    own = tuple((name, name) for name in words if name not in known)
    spec: PartitionSpec | None = logical_to_mesh_axes(variable.names, (*self.names, *own))
    return spec


def annotated(names: Mapping[str, Any] | Sequence[tuple[str, Any]] = ()) -> Rule:
  """A rule that goes by the names that a module gives the axes of its variables.

  Those of `flax.linen.with_partitioning`, ``with_logical_partitioning`` and
  `flax.nnx.with_partitioning`. Variables without names are not covered.

  Args:
    names: from a module's name to the mesh's axis, a tuple of axes, or None for whole; as pairs, in
      Flax's manner, where a name has several, of which the first that is free is taken. A name that
      is not among them is the mesh's own.

  Returns:
    A rule, for all variables or for those of a regular expression.

  Raises:
    TypeError: ``names`` is neither a mapping nor pairs.

  >>> embedding = Variable("params/embed", (256, 8), np.dtype("float32"), ("vocabulary", "width"))
  >>> devices = np.array(jax.devices()[:1]).reshape(1, 1)
  >>> rule = annotated({"vocabulary": "model", "width": None})
  >>> tuple(rule(embedding, Mesh(devices, ("data", "model"))))
  ('model', None)
  """
  several = isinstance(names, Sequence) and not isinstance(names, str)
  pairs: Any = tuple(names.items()) if isinstance(names, Mapping) else names
  if not (isinstance(names, Mapping) or several) or not all(
    isinstance(p, tuple) and len(p) == 2 and isinstance(p[0], str) for p in pairs
  ):
    raise TypeError(
      f"names={_check.show(names)} must say what becomes of a module's names: {{'embed': 'fsdp'}}."
    )
  return _Annotated(tuple(pairs))


def check_rules(name: str, rules: Any) -> tuple[tuple[str, Rule], ...]:
  """Rules as pairs of a regular expression and a rule.

  Args:
    name: the argument's.
    rules: what was given.

  Raises:
    TypeError: they are none.
    ValueError: there is none, or an expression is not well formed.

  >>> ((text, rule),) = check_rules("sharding", {"kernel$": PartitionSpec("model")})
  >>> text, tuple(rule)
  ('kernel$', ('model',))
  """
  how = (
    f"{name} must be train.fsdp(), train.annotated(...), or rules by path such as "
    "{'kernel$': jax.sharding.PartitionSpec(None, 'model')}"
  )
  one = isinstance(rules, PartitionSpec) or callable(rules)
  if not one and (isinstance(rules, str) or not isinstance(rules, Mapping | Sequence)):
    raise TypeError(f"{how}; got {_check.show(rules)}.")
  pairs: Any = (("", rules),) if one else rules
  pairs = tuple(pairs.items() if isinstance(pairs, Mapping) else pairs)
  if not pairs:
    raise ValueError(f"{how}; got none: leave it out for variables that are on every device.")
  for pair in pairs:
    if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
      raise TypeError(f"{how}; got {_check.show(pair)}.")
    if not isinstance(pair[1], PartitionSpec):
      what = f"{how}; {name} of {pair[0]!r}" if pair[0] else name
      _check.function(what, pair[1], "(variable, mesh) -> PartitionSpec or None", arguments=2)
    try:
      re.compile(pair[0])
    except re.error as error:
      raise ValueError(
        f"{name} has {pair[0]!r}, which is no regular expression: {error}."
      ) from None
  return pairs


def _size(axes: Sequence[str], mesh: Mesh, variable: Variable) -> int:
  """Into how many parts these axes of the mesh cut."""
  unknown = [axis for axis in axes if axis not in mesh.axis_names]
  if unknown:
    raise ValueError(
      f"{variable.path} {list(variable.shape)} is to be cut along {unknown[0]!r}, which is no axis "
      f"of the mesh {dict(mesh.shape)}: name one of these, or make it, "
      f"train.mesh({unknown[0]}=...)."
    )
  return math.prod(mesh.shape[axis] for axis in axes)


def _checked(spec: Any, variable: Variable, mesh: Mesh) -> PartitionSpec:
  """A spec that fits the array and the mesh."""
  where = f"{variable.path} {list(variable.shape)}"
  if not isinstance(spec, PartitionSpec):
    raise TypeError(
      f"the rule of {where} gave {_check.show(spec)}; it must give a PartitionSpec, or None."
    )
  if len(spec) > len(variable.shape):
    raise ValueError(
      f"{where} has {len(variable.shape)} axes, and its rule {spec} is of {len(spec)}; write the "
      "expression so that it names no such array ('kernel$'), or a rule for it in front."
    )
  seen: list[str] = []
  for i, entry in enumerate(spec):
    axes = () if entry is None else (entry,) if isinstance(entry, str) else entry
    if not isinstance(axes, tuple) or not all(isinstance(axis, str) for axis in axes):
      raise TypeError(f"{where} has the rule {spec}; it must be of names of axes, and None.")
    parts, size = _size(axes, mesh, variable), variable.shape[i]
    if size % parts:
      raise ValueError(
        f"{where} is to be cut along {entry!r}, and its axis {i} of {size} does not divide by "
        f"{parts}: name another of its axes, None to leave it whole, or train.fsdp(), which takes "
        "one that divides."
      )
    seen.extend(axes)
  twice = sorted({axis for axis in seen if seen.count(axis) > 1})
  if twice:
    raise ValueError(f"{where} has the rule {spec}, which names {twice} twice; one axis has it.")
  return spec


def _named(tree: PyTree, path: Path = ()) -> dict[Path, Any]:
  """Leaves by path."""
  found = jax.tree_util.tree_leaves_with_path(tree)
  return {
    (*path, *(jax.tree_util.keystr((part,), simple=True) for part in where)): leaf
    for where, leaf in found
  }


def _decided(
  name: str, rules: Any, variables: Mapping[Path, Variable], mesh: Mesh
) -> dict[Path, PartitionSpec | None]:
  """Each variable's spec, by the first rule that matches; None where none covers it."""
  pairs = check_rules(name, rules)
  found: dict[Path, PartitionSpec | None] = {}
  used = [False] * len(pairs)
  for path, variable in variables.items():
    if path[-1] == _SCALE and (*path[:-1], _INTEGERS) in found:
      found[path] = _scale_follows(found[(*path[:-1], _INTEGERS)], variable)
      continue
    first = next((i for i, (text, _) in enumerate(pairs) if re.search(text, variable.path)), None)
    spec = None
    if first is not None:
      used[first] = True
      spec = _asked(name, pairs[first][1], variable, mesh)
    found[path] = None if spec is None else _checked(spec, variable, mesh)
  for (text, _), was in zip(pairs, used, strict=True):
    if was:
      continue
    if any(re.search(text, variable.path) for variable in variables.values()):
      raise ValueError(
        f"{name} has the rule {text!r} behind others that match all that it names; the first that "
        "matches is taken, so put it in front."
      )
    some = ", ".join(variable.path for variable in list(variables.values())[:8])
    raise ValueError(
      f"{name} has the rule {text!r}, which matches no variable; there are {some}"
      f"{', ...' if len(variables) > 8 else ''}: mend the expression, or leave it out."
    )
  return found


def _asked(name: str, rule: Any, variable: Variable, mesh: Mesh) -> Any:
  """What a rule says of an array; of a user's own, what it raises is said in words of the rules."""
  if isinstance(rule, PartitionSpec):
    return rule
  if isinstance(rule, _Fsdp | _Annotated):
    return rule(variable, mesh)
  try:
    return rule(variable, mesh)
  except Exception as error:
    raise ValueError(
      f"{name} has the rule {_check.show(rule)}, which fails on {variable.path} "
      f"{list(variable.shape)} ({_check.short(error)}); it must give a PartitionSpec, or None."
    ) from error


def _scale_follows(spec: PartitionSpec | None, scale: Variable) -> PartitionSpec | None:
  """How the scale of a weight in eight bits is cut: as its integers, where it is not 1."""
  if spec is None:
    return None
  entries = [None if scale.shape[i] == 1 else entry for i, entry in enumerate(spec)]
  return PartitionSpec(*entries)


def _told(
  leaves: Mapping[Path, Any], names: Mapping[str, Any], over: int = 0
) -> dict[Path, Variable]:
  """What rules are told of arrays, whose first axis is over students where ``over`` is 1."""
  found = {}
  for path, leaf in leaves.items():
    # A weight in eight bits goes by its own name.
    text = "/".join(path[:-1] if path[-1:] == (_INTEGERS,) else path)
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.result_type(leaf)
    found[path] = Variable(text, tuple(np.shape(leaf)[over:]), dtype, names.get(text))
  return found


def shardings(
  variables: PyTree, mesh: Mesh, rules: Rules, *, names: Mapping[str, Any] | None = None
) -> PyTree:
  """Where variables lie by rules: the tree of shardings that ``jax.device_put`` takes.

  Args:
    variables: arrays, or their shapes; a `Model` or a `Teacher` too.
    mesh: from `train.mesh`.
    rules: `fsdp`, `annotated`, or a mapping (or pairs) from regular expressions to a
      ``PartitionSpec`` or a function; the first found in a path, ``"params/Dense_0/kernel"``, is
      taken. What none covers is on every device.
    names: ``{path: names of its axes}`` for `annotated`, see `Network.axes`.

  Returns:
    The same tree of ``NamedSharding``.

  Raises:
    TypeError: ``rules`` are none, or ``mesh`` is none.
    ValueError: a rule matches nothing, fails, names no axis of the mesh or one twice, or an axis of
      an array does not divide.

  >>> devices = np.array(jax.devices()[:1]).reshape(1, 1)
  >>> tree = {"params": {"kernel": np.ones((2, 4)), "bias": np.ones(4)}}
  >>> made = shardings(tree, Mesh(devices, ("data", "model")), {"kernel": PartitionSpec("model")})
  >>> tuple(made["params"]["kernel"].spec), tuple(made["params"]["bias"].spec)
  (('model',), ())
  """
  if not isinstance(mesh, Mesh):
    raise TypeError(f"mesh={_check.show(mesh)} must be a mesh: train.mesh(model=2), say.")
  if isinstance(variables, Model | Teacher):
    inner = shardings(variables.variables, mesh, rules, names=names)
    return dataclasses.replace(variables, variables=inner)
  specs = _decided("rules", rules, _told(_named(variables), names or {}), mesh)
  return _tree(variables, [NamedSharding(mesh, s or PartitionSpec()) for s in specs.values()])


def _tree(like: PyTree, leaves: Sequence[Any]) -> PyTree:
  return jax.tree.unflatten(jax.tree.structure(like), leaves)


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
  """Where a training state lies.

  Attributes:
    state: the state with a ``NamedSharding`` for each array.
    known: ``{path: (shape, sharding)}`` of what is trained, which other trees follow.
    said: what the log says of what is on every device, a line each.
  """

  state: Any
  known: Mapping[Path, tuple[tuple[int, ...], NamedSharding]]
  said: tuple[str, ...]

  def follow(self, tree: PyTree) -> PyTree:
    """The tree with a sharding for each leaf: that of the parameter which it is of.

    By path and shape: an optimiser's moments, a moving average and a checkpoint's items hold trees
    like the parameters', however deep.

    Args:
      tree: arrays, or their shapes.
    """
    everywhere = self.state.step
    return _tree(tree, [self.of(p, x) or everywhere for p, x in _named(tree).items()])

  def of(self, path: Path, leaf: Any) -> NamedSharding | None:
    """The sharding of the parameter whose path this one ends with; None where there is none."""
    for start in range(len(path)):
      if path[start:] in self.known:
        shape, sharding = self.known[path[start:]]
        return sharding if shape == np.shape(leaf) else None
    return None


@dataclasses.dataclass(frozen=True, eq=False)
class Sharding:
  """Rules for a mesh: a student's, and apart from them a teacher's; None leaves them whole.

  Attributes:
    mesh: the mesh.
    over: its axes over which batches are split.
    student: for the student's variables and what the objective learns.
    teacher: for the teacher's.
  """

  mesh: Mesh
  over: tuple[str, ...]
  student: Rules | None = None
  teacher: Rules | None = None

  def gathered(self, parameter: Any, spec: Sequence[Any]) -> Any:
    """A parameter as a network uses it: whole along the axes over which its batch is split.

    Left to itself the compiler may gather the batch instead, and compute all of it on each device:
    both ways are right, and only one fits into memory. Along other axes it stays cut (a tensor's).

    Args:
      parameter: the array, cut as ``spec`` says.
      spec: a ``PartitionSpec``, or its entries.
    """
    left = [entry if isinstance(entry, tuple) else (entry,) for entry in spec]
    left = [tuple(axis for axis in axes if axis not in (None, *self.over)) for axes in left]
    whole = PartitionSpec(*(axes or None for axes in left))
    # Cut first: so its gradient is summed and cut in one, and no device keeps all of it.
    for at in (PartitionSpec(*spec), whole):
      parameter = jax.lax.with_sharding_constraint(parameter, NamedSharding(self.mesh, at))
    return parameter

  def cut_over(self, tree: PyTree) -> dict[str, tuple[Any, ...]]:
    """The specs, by path, of what is cut along the axes over which batches are split.

    Args:
      tree: arrays, or their shapes, or shardings.
    """
    found = {}
    for path, leaf in _named(tree).items():
      at = leaf if isinstance(leaf, NamedSharding) else getattr(leaf, "sharding", None)
      if isinstance(at, NamedSharding) and at.mesh == self.mesh:
        axes = {a for e in at.spec for a in (e if isinstance(e, tuple) else (e,))}
        if axes & set(self.over):
          found["/".join(path)] = tuple(at.spec)
    return found

  def of_state(self, shapes: Any, names: Callable[[], Mapping[str, Any]], *, over: int) -> Layout:
    """Where a training state lies.

    Args:
      shapes: the state's, as a `State`.
      names: gives ``{path: names of its axes}``, asked where a rule may look at them.
      over: 1 where arrays have an axis over students in front, which is never cut; else 0.

    Raises:
      TypeError: a rule is none.
      ValueError: a rule does not fit, see `shardings`.
    """
    everywhere = NamedSharding(self.mesh, PartitionSpec())
    mine = {"params": shapes.params, **shapes.model_state}
    leaves = _named(mine)
    learned = _named(shapes.objective_params, ("objective",))
    remembered = _named(shapes.objective_state, ("objective_state",))
    every = {**leaves, **learned, **remembered}
    told = _told(every, names() if _looks_at_names(self.student) else {}, over)
    specs = _decided("sharding", self.student, told, self.mesh)
    where = {
      path: NamedSharding(self.mesh, PartitionSpec(*[None] * over, *spec)) if spec else everywhere
      for path, spec in specs.items()
    }
    variables = _tree(mine, [where[path] for path in leaves])
    known = {path: (np.shape(leaf), where[path]) for path, leaf in (leaves | learned).items()}
    # An optimiser sees the parameters as the network has them.
    known |= {path[1:]: at for path, at in known.items() if path[0] == "params"}
    state = jax.tree.map(lambda _: everywhere, shapes)
    state = dataclasses.replace(
      state,
      params=variables["params"],
      model_state={name: variables[name] for name in shapes.model_state},
      objective_params=_tree(shapes.objective_params, [where[path] for path in learned]),
      objective_state=_tree(shapes.objective_state, [where[path] for path in remembered]),
    )
    layout = Layout(state, known, ())
    following = ("opt_state", "average", "teacher")
    rest = {name: layout.follow(getattr(shapes, name)) for name in following}
    covered = _uncovered("sharding", "student", told, specs)
    said = (covered, _not_followed(layout, shapes.opt_state, over))
    state = dataclasses.replace(state, **rest)
    return Layout(state, known, tuple(line for line in said if line))

  def of_teacher(
    self, teacher: Teacher, names: Callable[[], Mapping[str, Any]]
  ) -> tuple[Teacher, tuple[str, ...]]:
    """The teacher where its rules say, and what the log says of it.

    What is in parts on the mesh already stays as it is, and nothing is copied.

    Args:
      teacher: the teacher; the arrays that are moved are read where they lie.
      names: as `of_state` takes it.

    Raises:
      TypeError: a rule is none.
      ValueError: a rule does not fit, see `shardings`.
    """
    leaves = _named(teacher.variables)
    told = _told(leaves, names() if _looks_at_names(self.teacher) else {})
    specs = _decided("teacher_sharding", self.teacher, told, self.mesh)
    where = {p: NamedSharding(self.mesh, spec or PartitionSpec()) for p, spec in specs.items()}
    stays = {path for path, leaf in leaves.items() if _in_parts(self.mesh, leaf)}
    made = [put(leaf, where[path]) for path, leaf in leaves.items()]
    said = _uncovered(
      "teacher_sharding", "teacher", {p: v for p, v in told.items() if p not in stays}, specs
    )
    if all(new is old for new, old in zip(made, leaves.values(), strict=True)):
      return teacher, tuple([said] if said else [])
    variables = _tree(teacher.variables, made)
    return dataclasses.replace(teacher, variables=variables), tuple([said] if said else [])


def _looks_at_names(rules: Any) -> bool:
  """Whether a rule may look at the names of axes, which the network has to be traced for."""
  pairs = check_rules("sharding", rules)
  return any(callable(rule) and not isinstance(rule, PartitionSpec | _Fsdp) for _, rule in pairs)


def _uncovered(
  name: str, whose: str, told: Mapping[Path, Variable], specs: Mapping[Path, Any]
) -> str | None:
  """What the log says of variables that no rule covers: silent copies are how memory runs out."""
  whole = [variable for path, variable in told.items() if specs[path] is None]
  if not whole:
    return None
  total = sum(variable.bytes for variable in whole)
  each = ", ".join(f"{v.path} {list(v.shape)} {v.bytes:,}" for v in whole)
  return (
    f"{name} covers {len(told) - len(whole)} of the {whose}'s {len(told)} variables; the others "
    f"are on every device, {total:,} bytes: {each}."
  )


def _not_followed(layout: Layout, opt_state: PyTree, over: int) -> str | None:
  """What the log says of an optimiser's arrays that are of no parameter's shape."""
  leaves = _named(opt_state)
  whole = [x for p, x in leaves.items() if len(x.shape) > over and layout.of(p, x) is None]
  if not whole:
    return None
  total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in whole)
  return (
    f"{len(whole)} arrays of the optimizer's state are of no parameter's shape, {total:,} bytes, "
    "and on every device."
  )


def lies_on(mesh: Any, leaf: Any) -> bool:
  """Whether an array is laid out over the devices of a mesh, in their order."""
  found = getattr(leaf, "sharding", None)
  return isinstance(found, NamedSharding) and list(found.mesh.devices.flat) == list(
    mesh.devices.flat
  )


def _in_parts(mesh: Mesh, leaf: Any) -> bool:
  return lies_on(mesh, leaf) and not leaf.sharding.is_fully_replicated


def put(leaf: Any, sharding: NamedSharding) -> Any:
  """An array where a rule says, or where it lies, if it lies on the mesh in parts already.

  One that is whole on every device of the mesh is cut where its rule cuts it.

  Args:
    leaf: an array, or its shape and sharding.
    sharding: the rule's.
  """
  if lies_on(sharding.mesh, leaf):
    at = leaf.sharding
    if not at.is_fully_replicated or at.is_equivalent_to(sharding, np.ndim(leaf)):
      return leaf
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return leaf.update(sharding=sharding)
  return laid(leaf, sharding)


def laid(leaf: Any, sharding: NamedSharding) -> Any:
  """An array where a sharding says, on other processes' devices too.

  All processes have the same array, and each puts the parts there that its devices hold.

  Args:
    leaf: an array; one on the devices of several processes stays on them.
    sharding: where to.
  """
  there = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
  if sharding.is_fully_addressable or there:
    return jax.device_put(leaf, sharding)
  if is_key(leaf):
    words = laid(jax.random.key_data(leaf), sharding)
    return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
  host = np.asarray(leaf)
  host = host.astype(jax.dtypes.canonicalize_dtype(host.dtype), copy=False)
  return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
