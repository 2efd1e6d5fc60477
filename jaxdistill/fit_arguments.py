"""What `jaxdistill.train.fit` is given, checked before anything is built, claimed or compiled."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import arguments
from jaxdistill.data import Source
from jaxdistill.mesh import Dispatch
from jaxdistill.types import Network, Objective

__all__ = ["check_functions", "check_hyper", "check_machinery", "check_networks", "check_seeds"]

PyTree = Any


def check_networks(student: Any, teacher: Any, teacher_variables: PyTree, start: PyTree) -> None:
  """The student, the teacher, and the variables that they bring along.

  Raises:
    TypeError: the student is no network, or the teacher no function.
    ValueError: there are variables and no teacher, or some of them are NaN.
  """
  if not isinstance(student, Network):
    raise TypeError(
      f"student must be a Network, got {arguments.show(student)}; {_adapter(student)}."
    )
  if isinstance(teacher, Network):
    raise TypeError(f"teacher is the network {teacher.name!r}; give teachers.frozen(network).")
  if teacher is None and teacher_variables is not None:
    raise ValueError(
      "teacher_variables are given and teacher is None; give fit a teacher "
      "(teachers.frozen(network)), or leave its variables out."
    )
  if teacher is not None:
    how = f"{_adapter(teacher)}, and teachers.frozen of that."
    arguments.function(
      "teacher", teacher, "(variables, batch) -> Outputs", arguments=2, instead=how
    )
    if type(teacher).__module__.startswith("flax.") or hasattr(teacher, "scope"):
      raise TypeError(f"teacher={arguments.show(teacher)} is a bare module; {how}")
  _check_values("teacher_variables", teacher_variables)
  _check_values("start", start)


def _adapter(module: Any) -> str:
  """Which adapter makes a network of this."""
  if isinstance(module, type):
    return f"make a module of the class, {module.__name__}(...), and give capture.linen(module)"
  kinds = {kind.__module__.split(".")[1] for kind in type(module).__mro__ if _is_flax(kind)}
  if "nnx" in kinds:
    return "give capture_nnx.nnx(module)"
  return "give capture.linen(module), or capture_nnx.nnx(module) of an NNX one"


def _is_flax(kind: type) -> bool:
  return kind.__module__.startswith("flax.")


def _check_values(name: str, tree: PyTree) -> None:
  """Raises for what is no array, is traced, or is NaN; infinities may be meant (a mask)."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    where = f"{name}{jax.tree_util.keystr(path)}"
    if isinstance(leaf, jax.core.Tracer):
      raise TypeError(f"{where} is traced; call fit outside of jit, vmap and grad.")
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float | complex):
      how = "checkpoint.load_variables and weights read files" if isinstance(leaf, str) else ""
      raise TypeError(f"{where} is no array, but {arguments.show(leaf)}; {how or 'leave it out'}.")
    if not jnp.issubdtype(getattr(leaf, "dtype", float), jnp.inexact):
      continue
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      continue
    if np.isnan(np.asarray(leaf)).any():
      raise ValueError(f"{where} holds NaN; take a checkpoint from before the run went wrong.")


def check_seeds(
  seed: int | Sequence[int], data: Any, *, twice: bool = False
) -> tuple[list[int], list[Source]]:
  """Seeds as numbers and sources, one for each; a pair of them ``twice`` where students differ.

  Raises:
    TypeError: a seed is no integer, or a source no `Source`.
    ValueError: a seed is out of range, two runs would be the same, or they do not pair up.
  """
  if np.ndim(seed) > 1 or isinstance(seed, str | set | frozenset | Mapping):
    raise TypeError(f"seed={arguments.show(seed)} must be an integer or a sequence of them.")
  one: Any = seed
  several = list(one) if np.ndim(one) == 1 or isinstance(one, Sequence) else [one]
  if not several:
    raise ValueError("seed is an empty sequence; give at least one seed.")
  seeds = [arguments.whole("seed", s, least=0, most=2**32 - 1) for s in several]
  sources = list(data) if isinstance(data, Sequence) else [data]
  for source in sources:
    if not isinstance(source, Source):
      raise TypeError(
        f"data must be a Source, or one for each seed, and has {arguments.show(source)}; make one "
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


def check_machinery(
  optimizer: Any, dispatch: Any, *, average: Any, seeds_by: Any, progress: Any, **switches: Any
) -> None:
  """How the run is carried out.

  Raises:
    TypeError: an argument is of another kind than it must be, or the call is inside a jit.
    ValueError: ``average`` or ``seeds_by`` is none of those that there are.
  """
  if isinstance(jnp.zeros(()), jax.core.Tracer):
    raise TypeError("fit compiles its steps itself; call it outside of jit, vmap and grad.")
  if not all(callable(getattr(optimizer, name, None)) for name in ("init", "update")):
    how = "call it: optax.adam(1e-3)" if callable(optimizer) else "such as optax.adam(1e-3)"
    raise TypeError(
      f"optimizer must be an optax optimiser, got {arguments.show(optimizer)}; {how}."
    )
  if not isinstance(dispatch, Dispatch):
    raise TypeError(
      f"dispatch must be what mesh.with_jit(mesh) or mesh.with_pmap(devices) returns, got "
      f"{arguments.show(dispatch)}."
    )
  if average is not None:
    arguments.number("average", average, least=0, most=1)
  if seeds_by not in ("vmap", "unroll"):
    raise ValueError(f"seeds_by={seeds_by!r} must be 'vmap' or 'unroll'.")
  if not isinstance(progress, str | None):
    raise TypeError(f"progress={progress!r} must be the bar's label, or None for no bar.")
  for name, value in switches.items():
    arguments.switch(name, value)


def check_functions(
  *, transform: Any, validate: Any, callback: Any, config: Any, select: str
) -> None:
  """The user's functions, by how they are called.

  Raises:
    TypeError: one of them is no such function, or ``config`` no mapping.
    ValueError: something is selected by, and nothing validated.
  """
  for name, value, takes, count, instead in (
    ("transform", transform, "(key, batch) -> batch", 2, "See jaxdistill.transforms."),
    ("validate", validate, "variables -> {name: number}", 1, "See evaluate.validator."),
    ("callback", callback, "(step, record)", 2, ""),
  ):
    if value is not None:
      arguments.function(name, value, takes, arguments=count, instead=instead)
  if config is not None and not isinstance(config, Mapping):
    raise TypeError(f"config must be a mapping of settings, got {arguments.show(config)}.")
  if validate is None and select != "accuracy":
    raise ValueError(f"select={select!r} chooses by a validation, and validate is None.")


def check_hyper(hyper: Any, objective: Objective, steps: int) -> dict[str, Any]:
  """The objective's keywords: known, complete, and numbers or schedules that give numbers.

  Raises:
    TypeError: one is no number, array or function of the step.
    ValueError: one is unknown, missing, not finite, or a temperature that is not positive.
  """
  if not isinstance(hyper, Mapping | None):
    raise TypeError(f"hyper must be a mapping of keywords, got {arguments.show(hyper)}.")
  hyper = dict(hyper or {})
  unknown = sorted(set(hyper) - set(objective.hyper))
  if unknown:
    raise ValueError(
      f"hyper has {unknown}, which the objective does not take; it takes {sorted(objective.hyper)}."
    )
  empty = inspect.Parameter.empty
  missing = sorted(n for n, v in objective.hyper.items() if v is empty and n not in hyper)
  if missing:
    raise ValueError(f"hyper lacks {missing}, for which the objective has no default.")
  for name, value in hyper.items():
    if callable(value):
      _check_schedule(name, value, steps)
    elif not _numeric(value):
      raise TypeError(
        f"hyper[{name!r}] must be a number, an array or a function of the step, got "
        f"{arguments.show(value)}."
      )
    elif name == "temperature":
      arguments.number("temperature", value, above=0)
    elif not isinstance(value, jax.core.Tracer) and not np.all(np.isfinite(np.asarray(value))):
      raise ValueError(f"hyper[{name!r}]={arguments.show(value)} must be finite.")
  return hyper


def _numeric(value: Any) -> bool:
  dtype = getattr(value, "dtype", None)
  if dtype is not None:
    return bool(jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_))
  return isinstance(value, bool | int | float)


def _check_schedule(name: str, schedule: Callable[[Any], Any], steps: int) -> None:
  """A schedule on the host, at three steps, and once as the compiled step will call it."""
  label = f"the schedule hyper[{name!r}]"
  for step in sorted({0, steps // 2, steps - 1}):
    try:
      value = schedule(step)
    except Exception as error:
      raise ValueError(f"{label} fails at step {step}: {arguments.short(error)}") from error
    above = 0 if name == "temperature" else None
    arguments.number(f"{label} at step {step}", value, above=above)
  try:
    jax.eval_shape(schedule, jax.ShapeDtypeStruct((), jnp.int32))
  except Exception as error:
    raise ValueError(
      f"{label} cannot be compiled ({arguments.short(error)}); the step is traced in it: take "
      "optax's schedules, or jnp.where in place of if."
    ) from error
