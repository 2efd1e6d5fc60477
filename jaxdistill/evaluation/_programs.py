"""Programs that are compiled once for all that is evaluated by them.

`jax.jit` knows a program by its function, its arguments' shapes and its compiler's options. Here
the function is one for everybody, and what was compiled for much work serves where there is little;
so a validation, a final evaluation and a measurement of time share what they have in common.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxdistill._compile import BackgroundCompiled, for_work, host_view, weighed
from jaxdistill.data import Batches
from jaxdistill.types import Batch

__all__ = ["Kept", "batches_of", "beside", "count_of", "first_of", "kept", "settled"]

PyTree = Any
# How many programs are kept. Each holds its network and what was compiled of it, and a search may
# go through any number of networks.
_MOST = 64


class Kept:
  """A function of arguments of some shapes, compiled for the most work that was asked of it.

  Attributes:
    traced: the function, for what calls it inside of a program; it is traced once.
    outputs: the shapes of what it gives.
  """

  def __init__(self, function: Callable[..., Any], shapes: tuple[PyTree, ...]) -> None:
    """Traces the function.

    Args:
      function: of arrays.
      shapes: of its arguments.
    """

    # JAX's caches hold a function weakly: what was compiled of one of its own goes with this.
    def own(*args: Any) -> Any:
      return function(*args)

    own.__name__ = getattr(function, "__name__", type(function).__name__)
    self._own, self._shapes = own, shapes
    self.traced: Any = jax.jit(own, inline=True)
    self.outputs: Any = self.traced.eval_shape(*shapes)
    self._compiled: BackgroundCompiled | None = None
    self._work = 0.0
    self._plain = False

  @functools.cached_property
  def jaxpr(self) -> Any:
    """The program as it was traced, closed."""
    return self.traced.trace(*self._shapes).jaxpr

  @functools.cached_property
  def _weighed(self) -> tuple[int, bool]:
    return weighed(self._own, *self._shapes)

  def compiled(self, calls: float) -> BackgroundCompiled:
    """The function under ``jax.jit``, which compiles it at its first call.

    Args:
      calls: how many of them its compilation is to pay for; infinity for many.

    Returns:
      What was compiled before, where that was for as much work.
    """
    if self._plain and self._compiled is not None:
      return self._compiled
    each, exact = self._weighed
    work = max(1, each) * calls
    options = for_work(max(work, self._work), exact=exact)
    if self._compiled is None or options != for_work(self._work, exact=exact):
      self._compiled = BackgroundCompiled(jax.jit(self._own, compiler_options=options))
    self._work = max(work, self._work)
    return self._compiled

  def plain(self) -> BackgroundCompiled:
    """The function under ``jax.jit`` without options, as a user's program is compiled."""
    if not self._plain or self._compiled is None:
      self._plain, self._compiled = True, BackgroundCompiled(jax.jit(self._own))
    return self._compiled


def kept(function: Callable[..., Any], *args: Any) -> Kept:
  """The program of a function and of arguments like these; the same for equal ones.

  Args:
    function: pure, of arrays; hashable by what it computes.
    *args: pytrees whose static parts are hashable, or their shapes.
  """
  leaves, structure = jax.tree.flatten(args)
  return _kept(function, structure, tuple(map(_outline, leaves)))


def _outline(leaf: Any) -> tuple[tuple[int, ...], Any]:
  """The shape and the dtype that an array, a shape or a number has in a program."""
  dtype = leaf.dtype if hasattr(leaf, "dtype") else np.result_type(leaf)
  return np.shape(leaf), jax.dtypes.canonicalize_dtype(dtype, allow_extended_dtype=True)


@functools.lru_cache(_MOST)
def _kept(function: Callable[..., Any], structure: Any, leaves: tuple[Any, ...]) -> Kept:
  shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in leaves]
  return Kept(function, jax.tree.unflatten(structure, shapes))


def settled(tree: PyTree) -> PyTree:
  """The tree on its one device, and committed to it; one of several devices as it is.

  To ``jax.jit`` an array on a mesh of one device, one that is committed to that device and one that
  is not are three, each of which is compiled for: what was trained, what was read, what was made.

  Args:
    tree: arrays, or their shapes and shardings; nothing is copied that lies there already.
  """

  def there(leaf: Any) -> Any:
    return leaf.sharding if getattr(leaf, "committed", True) else None

  known = [there(leaf) for leaf in jax.tree.leaves(tree) if hasattr(leaf, "sharding")]
  known = [sharding for sharding in known if sharding is not None]
  devices = {device for sharding in known for device in sharding.device_set}
  if not devices:
    devices = jax.device_put(np.zeros(())).devices()
  home = SingleDeviceSharding(*devices) if len(devices) == 1 else None
  if home is None or {sharding.memory_kind for sharding in known} - {None, home.memory_kind}:
    return tree

  def shaped(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)

  if not any(map(shaped, jax.tree.leaves(tree))):
    return jax.device_put(tree, home)  # of all leaves at once
  return jax.tree.map(
    lambda leaf: leaf.update(sharding=home) if shaped(leaf) else jax.device_put(leaf, home), tree
  )


def beside(tree: PyTree, batch: Batch) -> PyTree:
  """The tree where a program can read it together with a batch that is cut over several devices.

  What lies on a single device is copied to each of the batch's, which ``jax.jit`` does not do of
  itself; what lies on several stays as it is.

  Args:
    tree: arrays, or their shapes and shardings.
    batch: leaves ``[B, ...]``.
  """
  over = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(batch))
  meshes = [s.mesh for s in over if isinstance(s, NamedSharding) and s.mesh.size > 1]
  if not meshes:
    return tree
  everywhere = NamedSharding(meshes[0], PartitionSpec())

  def put(leaf: Any) -> Any:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None or len(sharding.device_set) > 1:
      return leaf
    shaped = isinstance(leaf, jax.ShapeDtypeStruct)
    return leaf.update(sharding=everywhere) if shaped else jax.device_put(leaf, everywhere)

  return jax.tree.map(put, tree)


def batches_of(batches: Batch | Batches, numbers: Sequence[int] | None = None) -> Iterator[Batch]:
  """The batches of a split one by one, so that no program knows how many there are.

  Args:
    batches: leaves ``[N, B, ...]``, or what makes them.
    numbers: which of them, from 0 on; all where left out.

  Yields:
    Batches, leaves ``[B, ...]``: views of the host's memory where they lie there.
  """
  if isinstance(batches, Batches):
    yield from batches if numbers is None else batches.some(numbers)
    return
  leaves, structure = jax.tree.flatten(batches)
  views = [host_view(leaf) for leaf in leaves]
  for i in range(len(batches.weight)) if numbers is None else numbers:
    if any(view is None for view in views):
      yield _cut(batches, i)
    else:
      yield jax.tree.unflatten(structure, [view[i] for view in views if view is not None])


def first_of(batches: Batch | Batches) -> Batch:
  """The first batch of a split.

  Args:
    batches: leaves ``[N, B, ...]``, or what makes them.
  """
  return batches[0] if isinstance(batches, Batches) else next(batches_of(batches))


def count_of(batches: Batch | Batches) -> int:
  """How many batches a split has.

  Args:
    batches: leaves ``[N, B, ...]``, or what makes them.
  """
  return len(batches) if isinstance(batches, Batches) else len(batches.weight)


@jax.jit
def _cut(batches: Batch, i: Any) -> Batch:
  return jax.tree.map(lambda leaf: leaf[i], batches)
