"""Inputs that a module looks up in a table: found in its program, and named where none is there."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxdistill as jd
from jaxdistill import data, networks, recipes, teachers
from jaxdistill._lookups import looked_up
from jaxdistill.types import Model

V, L = 7, 5

TOKENS = jd.evaluation.tasks.tokens()


class Reads(nn.Module):
  """Tokens and positions, each in a table of its own."""

  rows: int = V

  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(self.rows, 4)(tokens)
    return nn.Dense(V)(x)


class ReadsNNX(nnx.Module):
  def __init__(self, rngs):
    self.table = nnx.Embed(V, 4, rngs=rngs)
    self.out = nnx.Linear(4, V, rngs=rngs)

  def __call__(self, tokens):
    return self.out(self.table(jnp.roll(tokens, 1, axis=1)))


def windows(row=3, place=2, value=V, many=8):
  tokens = np.arange(many * L, dtype=np.int32).reshape(many, L) % V
  labels = tokens.copy()
  tokens[row, place] = value
  return data.from_arrays(tokens, labels, num_classes=V, name="windows")


def source(examples, kind="on_device"):
  how = {"batch_size": 4, "data_seed": 0}
  return getattr(data, kind)(examples, **how)


def fit(network, where, **options):
  how = {"optimizer": optax.sgd(0.1), "steps": 2, "data": where, "run": None}
  return jd.fit(network, recipes.labels(), **{**how, **options})


def model(network):
  return Model(network, network.init(jax.random.key(0), jnp.zeros((1, L), jnp.int32)))


@pytest.mark.parametrize("value", [V, -1])
@pytest.mark.parametrize("kind", ["on_device", "streamed"])
def test_a_token_beyond_the_table_is_named_with_row_and_position(kind, value):
  asked = re.escape(f"row 3 of 'windows' has {value} at position 2 in its inputs")
  with pytest.raises(ValueError, match=asked):
    fit(networks.linen(Reads()), source(windows(value=value), kind))


def test_the_tables_of_an_nnx_module_are_found_behind_a_roll():
  with pytest.raises(ValueError, match=f"row 3 of 'windows' has {V} at position 2.*ReadsNNX"):
    fit(networks.nnx(lambda rngs: ReadsNNX(rngs=rngs)), source(windows()))


def test_of_the_teacher_too_wherever_it_is_asked():
  small = teachers.frozen(model(networks.linen(Reads(V - 1))))
  where = source(windows(value=V - 1))
  told = f"the teacher looks them up in a table of {V - 1} rows"
  with pytest.raises(ValueError, match=told):
    jd.fit(
      networks.linen(Reads()), recipes.kd(), data=where, optimizer=optax.sgd(0.1), steps=1,
      teacher=small,
    )  # fmt: skip
  with pytest.raises(ValueError, match=told):
    teachers.cached(small, where)
  batches = data.evaluation_batches(windows(value=V - 1), batch_size=4)
  with pytest.raises(ValueError, match=told):
    jd.evaluation.evaluate(model(networks.linen(Reads())), batches, teacher=small, task=TOKENS)


def test_what_is_evaluated_names_its_row_of_the_split():
  batches = data.evaluation_batches(windows(row=6), batch_size=4)
  with pytest.raises(ValueError, match=f"row 6 of batches has {V} at position 2"):
    jd.evaluation.evaluate(model(networks.linen(Reads())), batches, task=TOKENS)


@pytest.mark.parametrize(
  ("read", "rows"),
  [
    (lambda table, x: table[x], {"['inputs']": 6}),
    (lambda table, x: jnp.take(table, x, axis=0, mode="clip"), {"['inputs']": 6}),
    (lambda table, x: table.T[:, x], {"['inputs']": 6}),
    (jax.checkpoint(lambda table, x: table[x[:, ::-1]] + table[:4][x]), {"['inputs']": 4}),
    (lambda table, x: jax.lax.map(lambda row: table[row], x), {"['inputs']": 6}),
    (lambda table, x: jax.vmap(lambda t: t[x])(table[None]), {"['inputs']": 6}),
    # What the module changes itself is its own affair: -1 may stand for no token.
    (lambda table, x: table[jnp.where(x < 0, 0, x)], {}),
    (lambda table, x: table[jnp.clip(x, 0, 5)], {}),
    (lambda table, x: jax.nn.one_hot(x, 6) @ table, {}),
    (lambda table, x: table[jnp.argsort(x, axis=1)], {}),
  ],
)
def test_which_inputs_are_looked_up(read, rows):
  table = jax.ShapeDtypeStruct((6, 3), jnp.float32)
  inputs = {"inputs": jax.ShapeDtypeStruct((2, 5), jnp.int32)}
  found = looked_up(lambda table, batch: read(table, batch["inputs"]), table, inputs)
  assert {one.path.removeprefix("[0]"): one.rows for one in found} == rows
