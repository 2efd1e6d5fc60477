"""What a deployed network accepts: inputs of its shapes and dtypes, or what callers mean by it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import _check

__all__ = ["as_batch", "padded_batches", "stored_shape"]

PyTree = Any


def as_batch(inputs: PyTree, expected: PyTree, name: str) -> tuple[PyTree, int]:
  """The inputs as arrays of the expected shapes and dtypes, and how many examples they are.

  Args:
    inputs: arrays, or lists of numbers, in the containers of ``expected``.
    expected: shapes and dtypes, batch axis first; the batch axis itself may be of any size.
    name: of the network, for messages.

  Returns:
    ``(arrays, B)``. Numbers change their dtype only where no value is lost but floats' precision.

  Raises:
    TypeError: other containers, or a dtype that may mean something else.
    ValueError: another shape, no batch axis, or batches of different sizes.

  >>> as_batch([[1, 2]], jax.ShapeDtypeStruct((1, 2), jnp.float32), "student")[0].dtype.name
  'float32'
  """
  given: list[Any] = []
  try:  # A leaf of the first tree stands for anything in the second.
    whole = dict(inputs) if isinstance(inputs, Mapping) else inputs
    jax.tree.map(lambda _, value: given.append(value), expected, whole)
  except (ValueError, TypeError) as error:
    what = f"the keys {list(inputs)}" if isinstance(inputs, Mapping) else type(inputs).__name__
    raise TypeError(
      f"{name} takes a batch of {_check.shapes(expected)}, and inputs has {what}."
    ) from error
  leaves, structure = jax.tree_util.tree_flatten_with_path(expected)
  labels = [f"inputs{jax.tree_util.keystr(path)}" for path, _ in leaves]
  arrays = [_array(n, v, leaf) for n, v, (_, leaf) in zip(labels, given, leaves, strict=True)]
  sizes = {label: array.shape[0] for label, array in zip(labels, arrays, strict=True)}
  if 0 in sizes.values() or len(set(sizes.values())) > 1:
    raise ValueError(f"the batch sizes must be equal and at least 1; they are {sizes}.")
  return jax.tree.unflatten(structure, arrays), sizes[labels[0]]


def padded_batches(inputs: PyTree, size: int, batch_size: int) -> Iterator[PyTree]:
  """The examples in batches of one size, so that one program is compiled for all of them.

  Args:
    inputs: arrays ``[N, ...]``.
    size: N.
    batch_size: how many at once; no more than N.

  Yields:
    Batches; what the last one lacks is filled up with the first example.

  >>> [batch.tolist() for batch in padded_batches(np.arange(3), 3, 2)]
  [[0, 1], [2, 0]]
  """
  _check.whole("batch_size", batch_size)
  for begin in range(0, size, batch_size):
    rows = np.arange(begin, begin + min(batch_size, size))
    rows = np.where(rows < size, rows, 0)
    yield jax.tree.map(lambda leaf, rows=rows: leaf[rows], inputs)


def stored_shape(leaf: Any) -> jax.ShapeDtypeStruct:
  """The shape of one example as it is stored, in a dtype that JAX has enabled.

  Args:
    leaf: anything with a shape and a dtype.

  Raises:
    TypeError: it has neither, or a dtype that JAX has not.

  >>> stored_shape(np.zeros((2, 3)))
  ShapeDtypeStruct(shape=(2, 3), dtype=float32)
  """
  if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
    raise TypeError(f"stored has {leaf!r} for a leaf; give jax.ShapeDtypeStruct(shape, dtype).")
  if not any(jnp.issubdtype(leaf.dtype, kind) for kind in (jnp.number, jnp.bool_)):
    raise TypeError(f"stored has the dtype {leaf.dtype}, which JAX has not; tokenize text first.")
  return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))


def _array(label: str, value: Any, expected: Any) -> Any:
  """A value as an array of the expected shape and dtype, cast only where its meaning is sure."""
  if isinstance(value, np.ma.MaskedArray):
    _check.unmasked(label, value)
  try:
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    if array.dtype == np.object_:
      raise TypeError("it holds no numbers")
  except (ValueError, TypeError) as error:
    raise TypeError(f"{label} is a {type(value).__name__} that makes no array: {error}") from error
  inner, wanted = expected.shape[1:], expected.dtype
  should = f"[B{''.join(f', {n}' for n in inner)}] {wanted}"
  if array.shape == inner:
    raise ValueError(
      f"{label} is a single example of shape {array.shape}; it must be a batch {should}: add the "
      f"axis with {label}[None], and take logits[0]."
    )
  if array.shape[1:] != inner or array.ndim != len(inner) + 1:
    raise ValueError(f"{label} has the shape {array.shape}; it must be {should}.")
  if array.dtype == wanted:
    return array
  numbers = not hasattr(value, "dtype") and array.dtype == np.int64  # a list of Python's
  given = np.float64 if numbers and jnp.issubdtype(wanted, jnp.floating) else array.dtype
  whole = jnp.issubdtype(wanted, jnp.integer)
  if not jnp.issubdtype(given, jnp.integer if whole else jnp.floating) or wanted == np.bool_:
    raise TypeError(
      f"{label} is {array.dtype}; it must be {should}, as the data set stores it. If its values "
      f"mean the same, convert it with .astype({str(wanted)!r})."
    )
  if whole and array.size and not np.can_cast(array.dtype, wanted):
    if isinstance(array, jax.core.Tracer):
      raise TypeError(f"{label} is {array.dtype}; inside jit, convert it to {wanted} first.")
    limits, low, high = jnp.iinfo(wanted), array.min(), array.max()
    if not limits.min <= low <= high <= limits.max:
      raise ValueError(f"{label} has values in {low} .. {high}, which do not fit {wanted}.")
  with np.errstate(over="ignore"):
    made = array.astype(wanted)
  if isinstance(made, np.ndarray) and not whole and (np.isinf(made) & np.isfinite(array)).any():
    raise ValueError(f"{label} has numbers that are infinite in {wanted}: scale them.")
  return made
