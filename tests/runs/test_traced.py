"""What tells one traced function from another, and what does not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxdistill.runs import Traced, traced
from jaxdistill.runs._traced import difference

X = jnp.arange(6.0)


def of(function, *args) -> Traced:
  return traced(jax.make_jaxpr(function)(*(args or (X,))))


def looped(factor, times=3):
  return lambda x: jax.lax.fori_loop(0, times, lambda i, y: factor * y + i, x)


def branched(factor):
  return lambda x: jax.lax.cond(x[0] > 0, lambda y: factor * y, lambda y: y, x)


@jax.custom_vjp
def halved(x):
  return x


halved.defvjp(lambda x: (x, None), lambda _, g: (0.5 * g,))


CHANGES = {
  "a constant": (lambda x: 2.0 * x, lambda x: 3.0 * x),
  "a constant in the last bit": (
    lambda x: np.float32(0.1) * x,
    lambda x: np.nextafter(np.float32(0.1), np.float32(1)) * x,
  ),
  "an array": (lambda x: x + np.arange(6.0, dtype="f4"), lambda x: x + np.ones(6, "f4")),
  "a device's array": (
    functools.partial(jnp.add, X),
    functools.partial(jnp.add, X.at[3].set(9.0)),
  ),
  "what is subtracted": (lambda x: x - jnp.sin(x), lambda x: jnp.sin(x) - x),
  "which argument": (lambda x, y: x - y, lambda x, y: y - x),
  "how often": (lambda x: jnp.sin(x), lambda x: jnp.sin(jnp.sin(x))),
  "a loop's body": (looped(2.0), looped(3.0)),
  "a loop's turns": (looped(2.0, 3), looped(2.0, 4)),
  "a branch": (branched(2.0), branched(3.0)),
  "a gradient of one's own": (jax.grad(lambda x: jnp.sum(halved(x))), jax.grad(jnp.sum)),
  "inside of jit": (jax.jit(lambda x: 2.0 * x), jax.jit(lambda x: 3.0 * x)),
  "an axis": (lambda x: x.reshape(2, 3).sum(0), lambda x: x.reshape(3, 2).sum(1)),
  "a dtype": (lambda x: x.astype("bfloat16"), lambda x: x.astype("float16")),
  "a key": (
    lambda x: x * jax.random.uniform(jax.random.key(0), (6,)),
    lambda x: x * jax.random.uniform(jax.random.key(1), (6,)),
  ),
  "which output comes first": (lambda x: (x + 1, x * 2), lambda x: (x * 2, x + 1)),
  "a stopped gradient": (
    jax.grad(lambda x: jnp.sum(x * jnp.sin(x))),
    jax.grad(lambda x: jnp.sum(x * jax.lax.stop_gradient(jnp.sin(x)))),
  ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_is_computed_is_told_apart(case):
  one, other = CHANGES[case]
  args = (X, X + 1) if case == "which argument" else (X,)
  assert of(one, *args).digest != of(other, *args).digest
  assert difference(of(one, *args).operations, of(other, *args).operations)


def shuffled(x):
  b = jnp.cos(x)
  a = jnp.sin(x)
  return a + b


def with_waste(x):
  jnp.tan(x)
  jax.debug.print("{}", x)
  a = jnp.sin(x)
  return a + jnp.cos(x)


def constrained(x):
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
  x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec("data")))
  return jnp.sin(x) + jnp.cos(x)


SAME = {
  "again": lambda x: jnp.sin(x) + jnp.cos(x),
  "in another order": shuffled,
  "with what is never used": with_waste,
  "through jit": lambda x: jax.jit(jnp.sin)(x) + jax.jit(jax.jit(jnp.cos))(x),
  "with its inputs kept for later": jax.checkpoint(lambda x: jnp.sin(x) + jnp.cos(x)),
  "shared out over devices": constrained,
}


@pytest.mark.parametrize("case", SAME)
def test_what_is_the_same_has_one_digest(case):
  assert of(SAME[case]).digest == of(lambda x: jnp.sin(x) + jnp.cos(x)).digest


def test_a_difference_names_the_operation_and_its_line():
  said = difference(of(looped(2.0)).operations, of(looped(3.0)).operations)
  assert "mul(2.0" in said
  assert "mul(3.0" in said
  assert "runs/test_traced.py" in said


def test_a_difference_begins_with_what_the_other_has_not_at_all():
  one = of(lambda x: jnp.sin(x) * 0.5 + 1.0)
  other = of(lambda x: jnp.sin(x) * 0.5 + jnp.tanh(x) + jnp.sin(x + 2.0) * 0.25)
  said = difference(one.operations, other.operations, most=1)
  assert "only now: tanh" in said
  assert "more" in said


def test_the_same_operations_put_together_otherwise_are_said_so():
  one, other = of(lambda x: x + jnp.sin(x)), of(lambda x: x + jnp.sin(x + x * 0) * 0)
  assert one.digest != other.digest
  swapped = of(lambda x, y: x - y, X, X), of(lambda x, y: y - x, X, X)
  assert difference(*(each.operations for each in swapped)) == (
    "the same operations, put together otherwise"
  )
