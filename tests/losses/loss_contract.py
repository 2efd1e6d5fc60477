"""What the tests of all losses share: values with their gradients, and what each must keep to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.test_util import check_vjp

# float32 has 24 bits: sums over a few hundred numbers of size 1.
TOLERANCE = {"rtol": 3e-5, "atol": 3e-6}
# Most of the time here is the compiler's, and half of that is spent on speed that no test needs.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def n(x, axis=-1):
  return x / np.maximum(np.sqrt((x**2).sum(axis, keepdims=True)), 1e-12)


def weighted(values):
  """A sum in which no value can hide behind another."""
  weights = jnp.cos(jnp.arange(values.size, dtype=values.dtype)).reshape(values.shape)
  return jnp.sum(weights * values)


def with_gradients(loss, argnums=(0, 1, 2), **options):
  """Compiled: a loss's values, and the gradients of their weighted sum; what else it gives, too."""

  def total(*arguments):
    values, *rest = found if isinstance(found := loss(*arguments), tuple) else (found,)
    return weighted(values), (values, *rest)

  compiled = jit(jax.value_and_grad(total, argnums=argnums, has_aux=True, **options))

  def run(*arguments):
    (_, found), gradients = compiled(*arguments)
    return jax.tree.map(np.asarray, (*found, gradients))

  return run


def check_derivative(loss, formula, *arguments):
  """In float64, the loss is the formula, and its gradients are the formula's derivatives."""

  @jit
  def pull(arguments, cotangent):
    values, back = jax.vjp(loss, *arguments)
    return values, back(cotangent)

  def with_pullback(*arguments):
    values = pull(arguments, np.zeros_like(expected))[0]
    return values, lambda cotangent: pull(arguments, cotangent)[1]

  expected = formula(*arguments)
  with jax.enable_x64(True):
    got = with_pullback(*arguments)[0]
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-12)
    check_vjp(formula, with_pullback, arguments, atol=1e-6, rtol=1e-6)


def assert_finite(tree, message=""):
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    assert np.isfinite(leaf).all(), f"{message}{jax.tree_util.keystr(path)} is not finite: {leaf}"
