"""The form of a program: a loop on the device or not, students side by side or one by one.

The rules for a CPU, on which XLA computes ``lax`` convolutions slowly in a loop and under ``vmap``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxdistill import _compile
from jaxdistill.data import Source
from jaxdistill.teachers import decay_of
from jaxdistill.train._mesh import Dispatch
from jaxdistill.train._plan import Plan
from jaxdistill.types import Network, Outputs, Teacher

__all__ = [
  "UNROLLED",
  "at_once",
  "example_key",
  "form_of",
  "forward_of",
  "inputs_of",
  "students_by",
  "turns_must_be_known",
]

PyTree = Any
# Bytes of activations that students side by side may have on a CPU, about what its caches hold.
# Beyond, a student-step of the digits' convolutions costs up to two and a half times as much.
_CACHE = 2 * 2**20
# How many students one after another one program has at most: each adds to its compilation.
UNROLLED = 8


def students_by(student: Network, inputs: PyTree, *, backend: str | None = None) -> str:
  """The rule for how several students of one network are trained in one program.

  ``"vmap"``, side by side, but for networks with ``lax`` convolutions on a CPU or a GPU: vmap makes
  grouped convolutions of those, which are slow on both, so ``"unroll"`` trains a few students one
  after another in a program (of one step on a CPU, whose loops compute convolutions slowly too).
  Networks whose convolutions are matrix products (our models' ``conv="patches"``, or
  `networks.models.patches_convolution` as a Flax convolution's ``conv_general_dilated``) are
  trained under ``vmap``, which is the fastest of the three there. The figures behind the rule are
  in ``benchmarks/README.md``; on a TPU nothing has been measured.

  Args:
    student: the network.
    inputs: its inputs, ``[B, ...]``, or their shapes.
    backend: JAX's; the default one where left out.

  Returns:
    ``"vmap"`` or ``"unroll"``.
  """
  if (backend or jax.default_backend()) not in ("cpu", "gpu"):
    return "vmap"
  return "unroll" if _compile.convolves(forward_of(student), example_key(), inputs) else "vmap"


def forward_of(student: Network) -> Callable[[Any, PyTree], Outputs]:
  """``(key, inputs) -> outputs`` in inference mode, of new variables; to trace."""

  def forward(key: Any, inputs: PyTree) -> Outputs:
    return student.apply(student.init(key, inputs), inputs, train=False, key=None)[0]

  return forward


def form_of(dispatch: Dispatch, plan: Plan, shared: PyTree, item: PyTree) -> tuple[bool, str]:
  """Whether a chunk of a plan's steps is a loop on the device, and how its students lie.

  Args:
    dispatch: what it says stands; None in it is decided here.
    plan: what is trained.
    shared: the arrays of a source.
    item: one of its items.

  Returns:
    ``(scan, seeds_by)``.
  """
  scan, seeds_by = dispatch.scan, dispatch.seeds_by
  on_cpu = jax.default_backend() == "cpu"
  asked = (scan is None and on_cpu) or (seeds_by is None and plan.stacked)
  if not asked:
    return scan is not False, seeds_by or "vmap"
  batch = jax.eval_shape(plan.sources[0].cut, shared, item)
  ours = students_by(plan.student, batch.inputs) == "unroll"
  taught = plan.teacher
  # A moving average of the student has the student's own convolutions.
  other = taught is not None and decay_of(taught) is None
  theirs = other and _compile.convolves(Teacher.__call__, taught, batch)
  if seeds_by is None:
    # Each of them adds to the compilation.
    seeds_by = "unroll" if ours and len(plan.seeds) <= UNROLLED else "vmap"
  return (not (on_cpu and (ours or theirs)) if scan is None else scan), seeds_by


def turns_must_be_known() -> bool:
  """Whether a loop goes faster where the program says how many turns it has.

  On a GPU the host launches the kernels of each turn. Where the number of turns is data, it waits
  at each until a flag has come over from the device, and the device then waits for its kernels. A
  CPU and a TPU decide where they compute.
  """
  return jax.default_backend() == "gpu"


def at_once(student: Network, source: Source) -> int | None:
  """How many students a CPU trains best side by side; None for as many as there are."""
  if jax.default_backend() != "cpu":
    return None
  variables = jax.eval_shape(student.init, example_key(), inputs_of(source))

  def forward(variables: PyTree, inputs: PyTree) -> Any:
    return student.apply(variables, inputs, train=False, key=None)

  batch = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct((source.batch_size, *leaf.shape[1:]), leaf.dtype),
    inputs_of(source),
  )
  return max(1, _CACHE // max(1, _compile.activations(forward, variables, batch)))


def example_key() -> Any:
  """A random key's shape, to trace with."""
  return jax.eval_shape(lambda: jax.random.key(0))


def inputs_of(source: Source) -> PyTree:
  """The shapes of a batch's inputs, as the networks see them."""
  stored = jax.tree.map(lambda one: jax.ShapeDtypeStruct((1, *one.shape), one.dtype), source.stored)
  return jax.eval_shape(source.normalize, stored)
