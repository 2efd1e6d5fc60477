"""How several students of one network are best trained in one program: the rule for a CPU."""

from __future__ import annotations

from typing import Any

import jax

from jaxdistill import _compile
from jaxdistill.data import Source
from jaxdistill.types import Network

__all__ = ["UNROLLED", "at_once", "example_key", "inputs_of", "students_by"]

PyTree = Any
# Bytes of activations that students side by side may have on a CPU, about what its caches hold.
# Beyond, a student-step of the digits' convolutions costs up to two and a half times as much.
_CACHE = 2 * 2**20
# How many students one after another one program has at most: each adds to its compilation.
UNROLLED = 8


def students_by(student: Network, inputs: PyTree, *, backend: str | None = None) -> str:
  """The rule for how several students of one network are trained in one program.

  ``"vmap"``, side by side, but for networks with ``lax`` convolutions on a CPU: vmap makes grouped
  convolutions of those, and a loop computes them slowly, so ``"unroll"`` trains a few students one
  after another in programs of one step. Networks whose convolutions are matrix products (our
  models' ``conv="patches"``, or `networks.models.patches_convolution` as a Flax convolution's
  ``conv_general_dilated``) are trained under ``vmap``, which is the fastest of the three there. The
  figures behind the rule are in ``benchmarks/README.md``.

  Args:
    student: the network.
    inputs: its inputs, ``[B, ...]``, or their shapes.
    backend: JAX's; the default one where left out.

  Returns:
    ``"vmap"`` or ``"unroll"``.
  """

  def forward(key: Any, inputs: PyTree) -> Any:
    variables = student.init(key, inputs)
    return student.apply(variables, inputs, train=False, key=None)

  if (backend or jax.default_backend()) != "cpu":
    return "vmap"
  traced = jax.make_jaxpr(forward)(example_key(), inputs)
  return "unroll" if "conv_general_dilated" in str(traced) else "vmap"


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
