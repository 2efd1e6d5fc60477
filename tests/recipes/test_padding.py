"""Padding counts nowhere: a step on a padded batch is the step on the batch without it.

Values, gradients, what a recipe learns and what it remembers, whatever the padding holds.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill import losses, recipes
from jaxdistill.train import init_state, make_step, reduce_terms
from jaxdistill.types import Network, Outputs, Teacher, Term, make_batch

SIZE, LENGTH = 8, 4  # examples, padding among them, and the tokens of each
LABELS = np.array([0, 2, 1, 1, 0, 2, 0, 1], np.int32)
PLACES = np.array([0, 1, 3, 5, 6])  # where the examples lie
# Of five examples the first has all tokens, the last has none.
TOKENS = np.arange(LENGTH) < np.array([4, 3, 2, 1, 0])[:, None]
MAPS = ("a", "b")


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def features(shapes, seed):
  return {name: normal(seed + i, SIZE, *shape) for i, (name, shape) in enumerate(shapes.items())}


# What two networks put out: logits, maps, vectors and tokens, of other widths.
OURS = {"logits": (3,), "a": (4, 4, 3), "b": (2, 2, 4), "v": (5,), "h": (LENGTH, 3)}
OURS["strong/logits"] = (3,)  # of a second look
THEIRS = {
  "logits": (3,),
  "a": (4, 4, 4),
  "b": (2, 2, 6),
  "v": (6,),
  "h": (LENGTH, 5),
  "d": (2, 2, 3),
  "strong/logits": (3,),
}
WHOLE = {"ours": features(OURS, 0), "theirs": features(THEIRS, 10)}


def outputs(arrays):
  return Outputs(logits=arrays["logits"], features={k: arrays[k] for k in arrays if k != "logits"})


# A batch's inputs are both networks' outputs. The student adds parameters to its own, which start
# at 0: what a step of SGD makes of them is the gradient that reaches the student, but for its sign.
STUDENT = Network(
  init=lambda key, inputs: {"params": jax.tree.map(jnp.zeros_like, inputs["ours"])},
  apply=lambda variables, inputs, **_: (
    outputs(jax.tree.map(jnp.add, inputs["ours"], variables["params"])),
    {},
  ),
)
TEACHER = Teacher({}, lambda variables, batch: outputs(batch.inputs["theirs"]))


def steps(objective, *batches):
  """What the objective learned at first; then of each batch gradients, learned, state and sums."""
  optimizer = optax.sgd(1.0)
  step = jax.jit(make_step(STUDENT, objective, optimizer))
  yield init_state(
    jax.random.key(0), STUDENT, objective, optimizer, batches[0], teacher=TEACHER
  ).objective_params
  for batch in batches:
    given = (jax.random.key(0), STUDENT, objective, optimizer, batch)
    after, sums = step(init_state(*given, teacher=TEACHER), TEACHER, batch)
    yield after.params, after.objective_params, after.objective_state, sums


def with_labels(objective, labels):
  """The objective with other labels, of the examples that the batch's own index names."""

  def apply(params, state, student, teacher, batch, **rest):
    batch = batch.replace(labels=jnp.asarray(labels, jnp.float32)[batch.index])
    return objective.apply(params, state, student, teacher, batch, **rest)

  return dataclasses.replace(objective, apply=apply)


def as_maps_of_logits(objective):
  """The objective on maps of as many channels as there are classes."""

  def apply(params, state, student, teacher, *rest, **keywords):
    narrow = [
      outputs.replace(features={"a": outputs.features["a"][..., :3]})
      for outputs in (student, teacher)
    ]
    return objective.apply(params, state, *narrow, *rest, **keywords)

  return dataclasses.replace(objective, apply=apply)


def rest(variables, maps, **unused):
  """A teacher from its map "a" on, [B, 4, 4, 4]: the map "b", [B, 2, 2, 6], and logits."""
  del unused
  b = jnp.tanh(maps[:, ::2, ::2] @ variables["b"])
  return Outputs(b.mean((1, 2)) @ variables["logits"], {"b": b}), {}


MANY = {
  "labels": recipes.labels,
  "kd": recipes.kd,
  "kd_standardized": recipes.kd_standardized,
  "dkd": functools.partial(recipes.dkd, warmup_steps=0),
  "dist": recipes.dist,
  "gdkd": functools.partial(recipes.gdkd, top=2, warmup_steps=0),
  "rld": functools.partial(recipes.rld, warmup_steps=0),
  "nkd": recipes.nkd,
  "ttm": recipes.ttm,
  "wttm": recipes.wttm,
  "wsl": recipes.wsl,
  "mlkd": recipes.mlkd,
  "mlkd of two views": functools.partial(recipes.mlkd, two_views=True),
  "crld": functools.partial(recipes.crld, weak_threshold=0.5),
  "many_to_one": functools.partial(
    recipes.many_to_one, student_layer="a", teacher_layer="d", run_steps=0
  ),
  "sdd": lambda: as_maps_of_logits(recipes.sdd(student_layer="a", teacher_layer="a")),
  "tfkd": recipes.tfkd,
  "pskd": functools.partial(recipes.pskd, growth_steps=0),
  "mean_teacher": functools.partial(recipes.mean_teacher, warmup_steps=0),
  "uskd": functools.partial(recipes.uskd, student_layer="a"),
  "norm_direction": functools.partial(
    recipes.norm_direction, normal(8, 3, 6), student_layer="v", warmup_steps=0
  ),
  "multi_label": lambda: with_labels(recipes.multi_label(), np.eye(3)[LABELS]),
  "regression": lambda: with_labels(recipes.regression(loss=losses.huber), normal(9, SIZE, 3)),
  "teacher_bounded": lambda: with_labels(recipes.teacher_bounded(), normal(9, SIZE, 3)),
  "ofa": functools.partial(recipes.ofa, student_layers=MAPS),
  "ctkd": functools.partial(recipes.ctkd, warmup_steps=0),
  "hint": functools.partial(recipes.hint, "v", "v"),
  "hint of tokens": functools.partial(recipes.hint, "h", "h", loss=losses.hint_cosine),
  "hint of kinds": functools.partial(recipes.hint, {"a": "h", "h": "b", "b": "a", "v": "v"}),
  "fitnet": functools.partial(recipes.fitnet, "a", "a"),
  "attention_transfer": functools.partial(recipes.attention_transfer, student_layers=MAPS),
  "nst": functools.partial(recipes.nst, student_layers=MAPS),
  "vid": functools.partial(recipes.vid, student_layers=("a", "v")),
  "overhaul": functools.partial(
    recipes.overhaul, margins=(-np.ones(4), -np.ones(6)), student_layers=MAPS
  ),
  "reviewkd": functools.partial(
    recipes.reviewkd, student_layers=("b", "v"), teacher_layers=None, warmup_steps=0
  ),
  "cwd": functools.partial(recipes.cwd, student_layer="a"),
  "ickd": functools.partial(recipes.ickd, student_layer="a"),
  "mgd": functools.partial(recipes.mgd, student_layer="a", masked_share=0.5),
  "structure": functools.partial(recipes.structure, student_layer="a"),
  "fcfd": functools.partial(
    recipes.fcfd,
    {"a": Network(init=lambda key, inputs: {}, apply=rest)},
    {"b": normal(7, 4, 6), "logits": normal(6, 6, 3)},
    student_layers=MAPS,
    warmup_steps=0,
  ),
  "srrl": functools.partial(recipes.srrl, {"kernel": normal(7, 6, 3)}, student_layer="b"),
  "catkd": functools.partial(recipes.catkd, student_layer="a", teacher_layer="d"),
  "vkd": functools.partial(recipes.vkd, student_layer="v"),
  "affinity": functools.partial(recipes.affinity, student_towers=("v", "v")),
  "similarity_preserving": functools.partial(recipes.similarity_preserving, student_layer="a"),
  "rkd": functools.partial(recipes.rkd, student_layer="v"),
  "pkt": functools.partial(recipes.pkt, student_layer="h"),
  "correlation_congruence": functools.partial(recipes.correlation_congruence, student_layer="v"),
  "crd": functools.partial(recipes.crd, LABELS, student_layer="v", negatives=8),
  "simkd": functools.partial(
    recipes.simkd, {"kernel": normal(7, 6, 3)}, student_layer="b", hard_weight=1.0
  ),
  "fsp": functools.partial(recipes.fsp, student_layers=MAPS),
  "activation_boundary": functools.partial(recipes.activation_boundary, student_layers=MAPS),
  "factor_transfer": functools.partial(recipes.factor_transfer, student_layer="b"),
}


@pytest.mark.slow_but("kd", "dist", "fitnet", "hint", "crd", "hint of tokens")
@pytest.mark.parametrize("name", MANY)
def test_padded_examples_count_nowhere(name):
  places = PLACES
  if name == "correlation_congruence":  # relates neighbours, so that padding may not part them
    places = np.arange(5)
  there = np.isin(np.arange(SIZE), places)
  batch = make_batch(jnp.zeros((SIZE, 1)), LABELS, index=np.arange(SIZE))

  def padded(fill):
    inputs = jax.tree.map(np.copy, WHOLE)
    for leaf in jax.tree.leaves(inputs):
      leaf[~there] = fill
    return batch.replace(inputs=inputs, weight=there.astype(np.float32))

  alone = jax.tree.map(lambda leaf: leaf[places], batch.replace(inputs=WHOLE))
  objective = MANY[name]()
  _, (moved, *learned), *others = steps(objective, alone, padded(np.nan), padded(1e30))
  assert any(np.any(leaf) for leaf in jax.tree.leaves(moved))
  # float32 sums over five or eight rows, with published weights up to 30 000 before them.
  close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5)
  for gradients, *also in others:
    assert not any(np.any(leaf[~there]) for leaf in jax.tree.leaves(gradients))
    jax.tree.map(close, jax.tree.map(lambda leaf: leaf[there], gradients), moved)
    jax.tree.map(close, also, learned)


@pytest.mark.slow_but("hint", "pkt", "kd")
@pytest.mark.parametrize(
  "name", ["hint", "vid", "pkt", "rkd", "similarity_preserving", "dist", "kd"]
)
def test_padded_positions_count_nowhere(name):
  layer = {"student_layer": "h"}
  given = {"hint": {"teacher_layer": "h", **layer}, "vid": {"student_layers": ("h",)}}
  given |= dict.fromkeys(("pkt", "rkd", "similarity_preserving"), layer)
  objective = getattr(recipes, name)(**given.get(name, {}))
  ours, theirs = ({"h": arrays["h"][:5]} for arrays in WHOLE.values())
  for seed, arrays in enumerate((ours, theirs)):
    arrays["logits"] = normal(seed, 5, LENGTH, 3)

  def padded(fill):
    tree = {"ours": ours, "theirs": theirs}
    labels = np.tile(LABELS[:5, None], (1, LENGTH))
    weight = TOKENS.astype(np.float32)
    inputs = jax.tree.map(lambda x: np.where(TOKENS[..., None], x, np.float32(fill)), tree)
    return make_batch(inputs, labels, weight=weight, labelled=np.ones_like(weight))

  begun, first, *others = steps(objective, padded(0.0), padded(np.nan), padded(-1e30))
  for other in others:
    jax.tree.map(np.testing.assert_array_equal, other, first)
  assert not any(np.any(leaf[~TOKENS]) for leaf in jax.tree.leaves(first[0]))
  if name == "hint":  # by hand: the mean over ten tokens, not over twenty positions
    layer = jax.tree.map(np.asarray, begun["projector"]["dense"])
    apart = ours["h"] @ layer["kernel"] + layer["bias"] - theirs["h"]
    total, count = first[-1]["hint"]
    assert float(total) == pytest.approx((apart[TOKENS] ** 2).mean(-1).sum(), rel=1e-5)
    assert float(count) == TOKENS.sum() == 10


def test_a_hint_on_tokens_takes_positions_where_weights_have_none():
  inputs = {name: {"logits": x["logits"][:5], "h": x["h"][:5]} for name, x in WHOLE.items()}
  weight = np.array([1.0, 2.0, 0.0, 1.0, 1.0], np.float32)
  batch = make_batch({**inputs, "mask": TOKENS.astype(np.int32)}, LABELS[:5], weight=weight)
  objective = recipes.hint("h", "h", positions=lambda batch: batch.inputs["mask"])
  begun, (moved, *_, sums) = steps(objective, batch)
  layer = jax.tree.map(np.asarray, begun["projector"]["dense"])
  apart = inputs["ours"]["h"] @ layer["kernel"] + layer["bias"] - inputs["theirs"]["h"]
  mask = TOKENS * weight[:, None]  # [B, L]
  total, count = sums["hint"]
  assert float(total) == pytest.approx((mask * (apart**2).mean(-1)).sum(), rel=1e-5)
  assert float(count) == mask.sum() == 4 + 2 * 3 + 1
  assert not np.any(np.asarray(moved["h"])[mask == 0])


def test_a_batch_that_is_all_padding_leaves_finite_statistics():
  batch = make_batch(WHOLE, LABELS, weight=np.zeros(SIZE, np.float32))
  _, made = steps(MANY["fitnet"](), batch)
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(made))


def test_one_value_an_example_counts_as_its_heaviest_token():
  weight = jnp.array([[0.5, 2.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
  batch = make_batch(jnp.zeros((3, 3)), weight=weight)
  _, sums = reduce_terms({"x": Term(jnp.array([1.0, np.nan, 3.0]))}, batch)
  assert [float(value) for value in sums["x"]] == [2 * 1.0 + 3.0, 3.0]


def test_a_pooled_feature_as_wide_as_sentences_are_long_is_no_feature_of_tokens():
  inputs = {"ours": {"logits": normal(0, 5, 3)}, "theirs": {"logits": normal(1, 5, 3)}}
  for seed, arrays in enumerate(inputs.values()):
    arrays["v"] = normal(seed, 5, LENGTH)
  batch = make_batch(inputs, LABELS[:5])
  weight = TOKENS.astype(np.float32)
  objective = recipes.pkt(student_layer="v", hard_weight=None)
  _, (by_token, *_), (by_example, *_) = steps(
    objective, batch.replace(weight=weight), batch.replace(weight=weight[:, 0])
  )
  np.testing.assert_allclose(by_token["v"], by_example["v"], rtol=1e-5)


def test_positions_of_another_number_are_refused():
  batch = make_batch(jnp.zeros((2, 3)), weight=jnp.ones((2, 3)))
  with pytest.raises(ValueError, match="name a layer with the positions of the batch's weights"):
    reduce_terms({"hint": Term(jnp.ones((2, 4)))}, batch)
