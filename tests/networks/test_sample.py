"""Text drawn token by token: the distribution, keys of rows, the cache, what is refused."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import small_networks
from jaxdistill import networks, teachers
from jaxdistill.networks.models import Decoder, DecoderConfig
from jaxdistill.types import Head, Model, Outputs

V = 7
DECODER = Decoder(
  DecoderConfig(
    V, 8, layers=1, heads=2, kv_heads=1, head_dim=4, hidden=8, window=3, pattern=(True,)
  )
)
KEY = jax.random.key(3)


class Table(nn.Module):
  """Logits of the token alone, of what was seen the least so far, or of later tokens too."""

  sees: str = "one"

  @nn.compact
  def __call__(self, tokens):
    z = self.param("table", nn.initializers.normal(1.5), (V, V))[tokens]
    ahead = {"one": z, "past": -jnp.cumsum(z, axis=1), "all": z + jnp.sum(z, axis=1, keepdims=True)}
    return ahead[self.sees]


def model(module, key=0):
  network = networks.linen(module, train_flag=None)
  return Model(network, network.init(jax.random.key(key), jnp.zeros((1, 4), jnp.int32)))


def test_tokens_have_the_networks_distribution():
  made, draws = model(Table()), 4000
  table = np.asarray(made.variables["params"]["table"])
  for temperature in (1.0, 0.5):
    found = networks.sample(
      made, np.full((draws, 1), 2), key=KEY, length=1, temperature=temperature
    )
    share = np.bincount(found[:, 1], minlength=V) / draws
    p = np.exp(table[2] / temperature) / np.exp(table[2] / temperature).sum()
    # Five standard errors of a share.
    assert (np.abs(share - p) < 5 * np.sqrt(p * (1 - p) / draws) + 1e-3).all()
  greedy = networks.sample(made, [[2], [4]], key=KEY, length=3, temperature=0)
  for row in greedy.tolist():
    assert row[1:] == [int(np.argmax(table[token])) for token in row[:-1]]


@pytest.mark.slow
def test_a_row_does_not_depend_on_its_neighbours():
  made = model(Table("past"))
  prompts = np.array([[1, 2], [3, 4], [5, 6]])
  whole = networks.sample(made, prompts, key=KEY, length=6, temperature=9.0)
  assert whole.dtype == np.int32
  np.testing.assert_array_equal(whole[:, :2], prompts)
  assert len({tuple(row) for row in whole[:, 2:].tolist()}) == 3
  for i in (2, 0):
    alone = networks.sample(made, prompts[i : i + 1], key=KEY, length=6, temperature=9.0, index=[i])
    np.testing.assert_array_equal(alone[0], whole[i])
  shorter = networks.sample(teachers.frozen(made), prompts, key=KEY, length=4, temperature=9.0)
  np.testing.assert_array_equal(shorter, whole[:, :6])


@pytest.mark.slow
def test_the_cache_draws_the_same_tokens():
  made = model(DECODER)
  # Far from the initialiser's small numbers, so that tokens differ.
  made = dataclasses.replace(made, variables=jax.tree.map(lambda x: 8 * x, made.variables))
  options = {"prompts": np.array([[1, 2, 3], [3, 4, 0]]), "key": KEY, "length": 8}
  again = networks.sample(made, **options)
  np.testing.assert_array_equal(networks.sample(made, **options, decoder=DECODER), again)
  assert len(set(again[:, 3:].ravel().tolist())) > 2
  # A decoder that is not the model's draws of other numbers, and one of NaN always draws 0.
  other = Decoder(dataclasses.replace(DECODER.config, window=None, pattern=()))
  with pytest.raises(ValueError, match="decoder is not what the model is"):
    networks.sample(made, **options, decoder=other)
  narrower = teachers.vocabulary(made, V - 1)
  with pytest.raises(ValueError, match="decoder is not what the model is"):
    networks.sample(narrower, **options, decoder=DECODER)
  lost = dataclasses.replace(made, variables=jax.tree.map(lambda x: x * np.nan, made.variables))
  with pytest.raises(ValueError, match="puts out NaN"):
    networks.sample(lost, **options, decoder=DECODER)


@dataclasses.dataclass(frozen=True)
class Sums:
  """Somebody's functions beside `Table("past")`: its sums of all tokens so far are the cache."""

  gives: str = "both"

  def empty_cache(self, variables, batch_size, length):
    return {"sums": jnp.zeros((batch_size, V)), "read": jnp.int32(0)}

  def apply(self, variables, tokens, *, cache):
    sums = cache["sums"][:, None] + jnp.cumsum(variables["params"]["table"][tokens], axis=1)
    if self.gives == "hidden":  # and a head, whose logits are made of the last place alone
      out = Outputs(hidden=-sums, head=Head(jnp.eye(V)))
    else:
      out = Outputs(logits=-sums)
    after = {"sums": sums[:, -1], "read": cache["read"] + tokens.shape[1]}
    return out, {"sums": after["sums"]} if self.gives == "less" else after


def test_a_cache_of_ones_own_draws_the_same_tokens():
  made = model(Table("past"))
  options = {"prompts": [[1, 2], [4, 0]], "key": KEY, "length": 5, "temperature": 3.0}
  again = networks.sample(made, **options)
  assert isinstance(Sums(), networks.CachingDecoder)
  assert isinstance(DECODER, networks.CachingDecoder)
  for gives in ("both", "hidden"):
    found = networks.sample(made, **options, decoder=Sums(gives))
    np.testing.assert_array_equal(found, again)
  # The latest tokens alone: there the cache, which forgets nothing, has no part.
  some = networks.sample(made, **options, window=3)
  np.testing.assert_array_equal(networks.sample(made, **options, window=3, decoder=Sums()), some)
  with pytest.raises(ValueError, match="a cache of the shapes that it had.*'read'"):
    networks.sample(made, **options, decoder=Sums("less"))
  with pytest.raises(ValueError, match="decoder cannot read a token with the model's variables"):
    networks.sample(made, **options, decoder=DECODER)
  for wrong in (Sums, Table(), "decoder"):
    with pytest.raises(TypeError, match="decoder=.* must be a networks.CachingDecoder"):
      networks.sample(made, **options, decoder=wrong)
  unhashable = dataclasses.make_dataclass("Unhashable", [], bases=(Sums,), eq=True, frozen=True)()
  object.__setattr__(unhashable, "gives", [])
  with pytest.raises(TypeError, match="must have a hash"):
    networks.sample(made, **options, decoder=unhashable)


def test_of_a_long_text_the_latest_tokens_are_seen():
  made = model(Table("past"))
  table = np.asarray(made.variables["params"]["table"])
  (row,) = networks.sample(made, [[1, 2, 3]], key=KEY, length=9, temperature=0, window=4).tolist()
  (far,) = networks.sample(made, [[1, 2, 3]], key=KEY, length=9, temperature=0).tolist()
  for at in range(3, 12):
    assert row[at] == int(np.argmin(table[row[max(0, at - 4) : at]].sum(axis=0)))
    assert far[at] == int(np.argmin(table[far[:at]].sum(axis=0)))
  assert row != far


def test_inputs_may_be_others_than_tokens():
  made = model(Table())
  network = networks.linen(Table(), train_flag=None, arguments=lambda x: (x["ids"],))
  named = Model(network, made.variables)
  options = {"key": KEY, "length": 4}
  np.testing.assert_array_equal(
    networks.sample(named, [[1]], **options, inputs=lambda tokens: {"ids": tokens}),
    networks.sample(made, [[1]], **options),
  )


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"length": 0}, "length=0"),
    ({"temperature": -1.0}, "temperature must be at least 0"),
    ({"prompts": [[]]}, "prompts=.* at least one token"),
    ({"prompts": [1, 2]}, r"prompts=.* integers \[B, P\]"),
    ({"prompts": [[0.5]]}, "prompts=.* integers"),
    ({"prompts": [[1, V]]}, rf"prompts\[0\] has the token {V} at position 1"),
    ({"index": [1, 2]}, "index=.* 1 integers"),
    ({"window": 0}, "window=0"),
    ({"prompts": [[1, 2], [3]]}, "prompts=.* of one length"),
    ({"decoder": DECODER}, "decoder cannot read a token"),
    ({"model": model(Table("all"))}, "is not causal"),
    ({"model": model(nn.Embed(V, 3), 1)}, "prompts"),
  ],
)
def test_what_cannot_be_drawn_is_refused(options, message):
  given = {"model": model(Table()), "prompts": [[1, 2]], "key": KEY, "length": 2, **options}
  if message == "prompts":  # three classes, of which the prompt is none
    given["prompts"] = [[1, 3]]
  with pytest.raises(ValueError, match=message):
    networks.sample(given.pop("model"), given.pop("prompts"), **given)


def test_no_token_is_drawn_of_nan():
  class Late(nn.Module):  # finite for the prompt, and not for what comes of it
    @nn.compact
    def __call__(self, tokens):
      z = self.param("table", nn.initializers.normal(1.5), (V, V))[tokens]
      return jnp.where(jnp.arange(tokens.shape[1])[:, None] > 1, jnp.nan, z)

  with pytest.raises(ValueError, match="puts out NaN"):
    networks.sample(model(Late()), [[1]], key=KEY, length=4)


def test_models_of_several_seeds_are_refused():
  made = model(Table())
  several = Model(made.network, jax.tree.map(lambda x: x[None], made.variables), 1)
  for wrong in (several, made.network):
    with small_networks.untyped(), pytest.raises(TypeError, match="must be a Model of one seed"):
      networks.sample(wrong, [[1]], key=KEY, length=1)
