"""Recipes that relate examples, against float64 NumPy with the published weights; and as runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import small_networks
from jaxdistill import recipes, train
from jaxdistill.recipes import (
  combine,
  correlation_congruence,
  crd,
  hint,
  pkt,
  rkd,
  similarity_preserving,
)
from jaxdistill.train import reduce_terms
from jaxdistill.train._answered import terms_where_answered
from jaxdistill.types import Outputs, as_objective, make_batch
from test_losses_relations import n, ref_angle, ref_cc, ref_distance, ref_pkt, ref_sp
from test_train import assert_close, differ, distil, examples, source

# Of 48 examples in three classes.
LABELS = examples().labels
RECIPES = {
  "similarity_preserving": similarity_preserving,
  "rkd": rkd,
  "pkt": pkt,
  "correlation_congruence": correlation_congruence,
  "crd": functools.partial(crd, LABELS, negatives=48),
}
# Two float32 sums in another order.
TOLERANCE = {"rtol": 2e-5, "atol": 1e-6}


# --- What the objective's loss is. ---


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


LAYERS = {"similarity_preserving": "stage3"}
WEIGHT = np.array([1, 1, 2, 1, 0, 1, 1.0])  # one is padding, one counts twice
LABELLED = np.array([1, 0, 1, 1, 1, 1, 1.0])
INDEX = np.array([4, 0, 8, 31, 0, 47, 20])


def a_batch(name):
  """Seven examples, their outputs, and what NumPy needs of them."""
  layer = LAYERS.get(name, "pooled")
  shapes = ((7, 2, 2, 3), (7, 4, 4, 2)) if layer == "stage3" else ((7, 5), (7, 6))
  ours, theirs = normal(0, *shapes[0]), normal(1, *shapes[1])
  logits = normal(2, 7, 3)

  def outputs(x, fill):
    x = x.astype(np.float32)
    x[4] = fill  # the padding may hold anything
    return Outputs(logits=jnp.asarray(logits, jnp.float32), features={layer: jnp.asarray(x)})

  batch = make_batch(
    jnp.zeros((7, 1)),
    jnp.asarray(LABELS[INDEX], jnp.int32),
    weight=jnp.asarray(WEIGHT, jnp.float32),
    labelled=jnp.asarray(LABELLED, jnp.float32),
    index=jnp.asarray(INDEX, jnp.int32),
  )
  arrays = (ours.reshape(7, -1), theirs.reshape(7, -1), logits)
  return outputs(ours, np.nan), outputs(theirs, np.inf), batch, arrays


def made(name, *outputs, **options):
  objective = as_objective(RECIPES[name](**options))
  shapes = jax.eval_shape(lambda: outputs)
  return objective, *objective.init(jax.random.key(3), *shapes)


def ref_labels(logits):
  log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  return averaged(-log_p[np.arange(7), LABELS[INDEX]], WEIGHT * LABELLED)


def averaged(values, weight):
  return (weight * values).sum() / weight.sum()


def dense(params, name, x):
  layer = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params[name]["dense"])
  return x @ layer["kernel"] + layer["bias"]


def ref_bank(s, t, banks, index):
  """CRD where all rows of other classes are negatives, each as often as makes 48 of them."""
  values, zs = np.zeros(len(index)), []
  for v, bank in ((n(s), banks.teacher), (n(t), banks.student)):
    scores = np.exp(v @ np.asarray(bank, np.float64).T / 0.07)
    own = scores[np.arange(len(index)), index]
    others = [scores[i, LABELS[row] != LABELS] for i, row in enumerate(index)]
    z = np.mean([(o + 48 * rest.mean()) / 49 for o, rest in zip(own, others, strict=True)]) * 48
    share = 48 / 48  # negatives over the banks' rows
    for i, (o, rest) in enumerate(zip(own / z, others, strict=True)):
      terms = np.log((rest / z + share + 1e-7) / share)
      values[i] += np.log((o + share + 1e-7) / o) + 48 * terms.mean()
    zs.append(np.log(z))
  return values, zs


def expected(name, params, arrays):
  ours, theirs, logits = arrays
  kept = np.flatnonzero(WEIGHT)
  s, t, w = ours[kept], theirs[kept], WEIGHT[kept]
  if name == "similarity_preserving":
    soft = 3000 * averaged(ref_sp(s, t), w)
  elif name == "rkd":
    soft = 25 * averaged(ref_distance(s, t), w) + 50 * averaged(ref_angle(s, t), w)
  elif name == "pkt":
    soft = 30000 * averaged(ref_pkt(s, t), w)
  else:
    s, t = dense(params, "student", ours), dense(params, "teacher", theirs)
    pairs = (WEIGHT[:-1] > 0) & (WEIGHT[1:] > 0)
    soft = 0.02 * ref_cc(s, t)[pairs].mean()
  return ref_labels(logits) + soft


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "crd"])
def test_the_loss_is_the_published_sum(name, strict_promotion):
  student, teacher, batch, arrays = a_batch(name)
  objective, params, state = made(name, student, teacher)

  @jax.jit
  def loss(params, student, teacher):
    terms, _ = objective.apply(params, state, student, teacher, batch, key=jax.random.key(0))
    return reduce_terms(terms, batch)[0]

  value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(params, student, teacher)
  np.testing.assert_allclose(value, expected(name, params, arrays), rtol=1e-4)
  (by_feature,) = gradients[1].features.values()
  by_feature = np.abs(np.asarray(by_feature).reshape(7, -1)).max(1)
  assert ((by_feature > 0) == (WEIGHT > 0)).all()
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients[0]))


@functools.cache
def crd_applied():
  student, teacher, batch, arrays = a_batch("crd")
  objective, params, state = made("crd", student, teacher)

  def loss(params, batch, state):
    terms, state = objective.apply(params, state, student, teacher, batch, key=jax.random.key(0))
    return reduce_terms(terms, batch)[0], (terms, state)

  return jax.jit(jax.value_and_grad(loss, has_aux=True)), params, state, batch, arrays


def test_crd_is_the_published_sum_with_other_classes_as_negatives(strict_promotion):
  function, params, state, batch, (ours, theirs, logits) = crd_applied()
  (value, (terms, after)), gradients = function(params, batch, state)
  known = np.flatnonzero(WEIGHT * LABELLED)
  s, t = dense(params, "student", ours), dense(params, "teacher", theirs)
  values, zs = ref_bank(s[known], t[known], state["banks"], INDEX[known])
  np.testing.assert_allclose(np.asarray(terms["crd"].values)[known], values, rtol=1e-4)
  np.testing.assert_allclose(after["banks"].log_normalizers, zs, rtol=1e-4)
  total = ref_labels(logits) + 0.8 * averaged(values, WEIGHT[known])
  np.testing.assert_allclose(value, total, rtol=1e-4)
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))

  # Rows of the examples that are known move; padding and the unlabelled example move nothing.
  for side, v in (("student", s), ("teacher", t)):
    old, new = (np.asarray(getattr(each["banks"], side)) for each in (state, after))
    moved = np.flatnonzero((old != new).any(1))
    assert moved.tolist() == sorted(INDEX[known])
    row = n(0.5 * old[INDEX[known]] + 0.5 * n(v[known]))
    np.testing.assert_allclose(new[INDEX[known]], row, **TOLERANCE)

  # Were row 20's class another, it would be a negative of its own class no more, and so on.
  labels = state["banks"].labels
  other = state["banks"]._replace(labels=labels.at[1].set((labels[1] + 1) % 3))
  (_, (changed, _)), _ = function(params, batch, {"banks": other})
  assert differ(changed["crd"].values, terms["crd"].values, tolerance=1e-4)


def test_crd_takes_classes_from_the_data_set_and_no_row_beyond_it(strict_promotion):
  function, params, state, batch, _ = crd_applied()
  (_, (terms, _)), _ = function(params, batch, state)
  # Whatever a transform has made of the batch's.
  (_, (changed, _)), _ = function(params, batch.replace(labels=0 * batch.labels), state)
  np.testing.assert_array_equal(changed["crd"].values, terms["crd"].values)
  (value, _), _ = function(params, batch.replace(index=batch.index.at[0].set(48)), state)
  assert np.isnan(value)


# --- One run of all of them: two seeds on two devices under jit. ---


@pytest.fixture(scope="module")
def fitted():
  first, *others = RECIPES.values()
  parts = (make(student_layer="mid", hard_weight=None) for make in others)
  return distil(
    objective=combine(first(student_layer="mid"), *parts),
    seed=(0, 1),
    steps=24,
    log_every=6,
    data=[source(0), source(1)],
    # The published weights are for features of hundreds of units, and large for five.
    optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-2)),
    form={"scan": False},  # compiles sooner
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  "term", ["loss", "labels", "similarity", "distance", "angle", "pkt", "correlation", "crd"]
)
def test_a_run_over_seeds_and_devices_learns(fitted, term):
  lines = np.array([line[term] for line in fitted.history])
  assert lines.shape == (4, 2)
  assert np.isfinite(lines).all()
  assert (lines[-1] < 0.95 * lines[0]).all(), lines


@pytest.mark.slow
def test_both_embeddings_are_trained(fitted):
  for part in ("3", "4"):
    embeddings = fitted.state.objective_params[part]
    assert embeddings["teacher"]["dense"]["kernel"].shape == (2, 7, 128)
    for side in ("student", "teacher"):
      # They begin at 0.
      assert np.abs(embeddings[side]["dense"]["bias"]).max() > 1e-2


@pytest.mark.slow
def test_crd_banks_hold_every_example_that_was_seen(fitted):
  banks = fitted.state.objective_state["4"]["banks"]
  assert banks.student.shape == banks.teacher.shape == (2, 48, 128)
  np.testing.assert_allclose(np.linalg.norm(banks.student, axis=-1), 1, rtol=1e-5)
  np.testing.assert_array_equal(banks.labels, np.stack([LABELS] * 2))
  assert banks.normalized.all()
  # 24 steps of 8 are four epochs: rows of one class are nearer to each other than to the others,
  # which random rows of 128 numbers are not by more than 0.01, a mean of 1500 cosines of 0.09.
  closeness = np.einsum("snd,smd->snm", banks.student, banks.teacher)
  apart = LABELS[:, None] != LABELS[None]
  assert closeness[:, ~apart].mean() > closeness[:, apart].mean() + 0.05


@pytest.mark.slow
def test_under_pmap_crd_has_one_device_s_banks_where_it_has_the_axis(strict_promotion):
  # All rows of other classes are negatives, so the devices' keys, which are not jit's, draw alike.
  function, params, state, batch, _ = crd_applied()
  student, teacher, _, _ = a_batch("crd")
  (_, (terms, after)), gradients = function(params, batch, state)

  @functools.partial(jax.pmap, axis_name=train.AXIS, in_axes=(0, 0))
  def share(each, key):
    def loss(params, axis_name):
      objective = RECIPES["crd"](axis_name=axis_name)
      terms, after = objective.apply(params, state, *each, key=key)
      return reduce_terms(terms, each[2], axis_name=train.AXIS)[0], (terms["crd"].values, after)

    gradients, (values, after) = jax.grad(loss, has_aux=True)(params, train.AXIS)
    _, (_, apart) = loss(params, None)
    return values, after["banks"], apart["banks"], jax.lax.psum(gradients, train.AXIS)

  def halves(leaf):  # eight examples, of which the last is padding
    padded = jnp.concatenate([leaf, jnp.zeros_like(leaf[:1])])
    return padded.reshape(2, 4, *leaf.shape[1:])

  each = jax.tree.map(halves, (student, teacher, batch))
  values, banks, apart, summed = share(each, jax.random.split(jax.random.key(1)))
  np.testing.assert_allclose(values.reshape(8)[:7], terms["crd"].values, **TOLERANCE)
  for device in range(2):
    here = jax.tree.map(lambda leaf, device=device: leaf[device], (banks, summed))
    assert_close(here, (after["banks"], gradients), tolerance=1e-4)  # float32, values near 50
  # The limit: without the axis, each device remembers its own share.
  assert differ(apart.student[0], apart.student[1], tolerance=1e-3)


def test_weights_are_keywords_and_recipes_add_up():
  both = combine(RECIPES["crd"](crd_weight=0.5), hint("pooled", "pooled"))
  assert both.hyper["crd_weight"] == 0.5
  assert both.hyper["hint_weight"] == 1.0
  assert "temperature" not in both.hyper
  student, teacher, batch, _ = a_batch("rkd")
  weights = []

  def look():
    given = {"key": None, "angle_weight": 3.0}
    terms, _ = rkd(rkd_weight=2.0).apply({}, {}, student, teacher, batch, **given)
    weights.extend(terms[name].weight for name in ("distance", "angle"))

  jax.eval_shape(look)
  assert weights == [50.0, 6.0]


def test_what_is_missing_or_wrong_is_named():
  student, teacher, batch, _ = a_batch("rkd")
  for name in RECIPES:
    objective = as_objective(RECIPES[name](student_layer="pooled", teacher_layer="there"))

    def call(objective=objective):
      params, state = objective.init(jax.random.key(0), student, teacher)
      objective.apply(params, state, student, teacher, batch, key=None)

    with pytest.raises(ValueError, match="teacher_layer='there' is not among the teacher's.*pool"):
      call()
    with pytest.raises(ValueError, match="hard_weight must be at least 0, got -1"):
      RECIPES[name](hard_weight=-1.0)
  with pytest.raises(ValueError, match="teacher_layer='pooled' needs a teacher"):
    pkt().apply({}, {}, student, None, batch, key=None)
  with pytest.raises(TypeError, match="labels must be the data set's integer labels"):
    crd(np.ones(4))
  with pytest.raises(ValueError, match=r"labels must be .*got \(2, 2\)"):
    crd(np.ones((2, 2), int))
  with pytest.raises(ValueError, match="crd_temperature must be positive, got 0"):
    crd(LABELS, crd_temperature=0)
  with pytest.raises(ValueError, match="negatives=0 must be at least 1"):
    crd(LABELS, negatives=0)


@pytest.mark.slow
@pytest.mark.parametrize("answered", [(1, 1, 1, 0, 1, 1, 1), (1, 0, 1, 0, 1, 0, 1), (0,) * 7])
def test_correlation_congruence_leaves_pairs_with_a_skipped_example_out(answered):
  """Of seven neighbours, and of one padded: the pairs of which the teacher knows both."""
  features = [normal(seed, 7, 5) for seed in (0, 1)]
  skipped = np.array(answered) == 0
  theirs = np.where(skipped[:, None], np.nan, features[1])
  weight = np.array([1, 1, 1, 1, 1, 1, 0.0])
  batch = make_batch(jnp.ones((7, 1)), jnp.zeros(7, jnp.int32), weight=jnp.asarray(weight))
  objective = correlation_congruence(width=4, hard_weight=None)
  teacher = Outputs(None, {"pooled": jnp.asarray(theirs, jnp.float32)}, where=jnp.array(answered))
  shapes = jax.eval_shape(lambda: Outputs(None, {"pooled": jnp.ones((7, 5))}))
  params, state = objective.init(jax.random.key(0), shapes, shapes)

  def loss(params, ours):
    def made(target, given):
      student = Outputs(None, {"pooled": ours})
      key = jax.random.key(1)
      return objective.apply(params, state, student, target, given, key=key, **objective.hyper)

    return train.reduce_terms(terms_where_answered(made, teacher, batch)[0], batch)

  ours = jnp.asarray(features[0], jnp.float32)
  (found, sums), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, ours)

  def embedded(side, x):
    dense = params[side]["dense"]
    return x @ np.asarray(dense["kernel"], np.float64) + np.asarray(dense["bias"], np.float64)

  apart = np.abs(embedded("student", features[0]) - embedded("teacher", features[1]))
  there = ~skipped & (weight > 0)
  pairs = [i for i in range(6) if there[i] and there[i + 1]]
  want = sum(apart[i] @ apart[i + 1] for i in pairs)
  np.testing.assert_allclose(sums["correlation"][0], want, **TOLERANCE)
  assert float(sums["correlation"][1]) == len(pairs)
  np.testing.assert_allclose(found, 0.02 * want / max(len(pairs), 1), **TOLERANCE)
  moved = np.any(np.asarray(grads[1]) != 0, axis=1)
  assert sorted(np.flatnonzero(moved)) == sorted({j for i in pairs for j in (i, i + 1)})
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_affinity_of_two_towers_by_hand():
  """Both terms in float64; padding is nobody's pair, and without a weight no teacher is asked."""
  names = ("image", "text")
  ours, theirs = (
    {n: normal(s + i, 5, w) for i, n in enumerate(names)} for s, w in ((0, 4), (5, 6))
  )
  weight = np.array([1, 1, 1, 1, 0.0])
  batch = make_batch(jnp.ones((5, 1)), None, weight=jnp.asarray(weight))
  student, teacher = (
    Outputs(None, {n: jnp.asarray(x) for n, x in one.items()}) for one in (ours, theirs)
  )
  objective = recipes.affinity(student_temperature=0.5, teacher_temperature=0.2)
  terms, _ = as_objective(objective).apply({}, {}, student, teacher, batch, key=None)
  _, sums = train.reduce_terms(terms, batch)

  def shares(arrays, temperature):
    a, b = (x[:4] / np.linalg.norm(x[:4], axis=1, keepdims=True) for x in map(np.float64, arrays))
    scores = [np.exp(s / temperature) for s in (a @ b.T, b @ a.T)]
    return [s / s.sum(1, keepdims=True) for s in scores]

  q, p = shares(ours.values(), 0.5), shares(theirs.values(), 0.2)
  want = {
    "pairs": -0.5 * sum(np.log(np.diag(one)).sum() for one in q),
    "affinity": 0.5 * sum((b * np.log(b / a)).sum() for a, b in zip(q, p, strict=True)),
  }
  for name, value in want.items():
    np.testing.assert_allclose(sums[name][0], value, rtol=1e-5)
    assert float(sums[name][1]) == 4
  alone = as_objective(recipes.affinity(affinity_weight=None))
  assert set(alone.apply({}, {}, student, None, batch, key=None)[0]) == {"pairs"}
  for wrong in ("image", ("image",), ("image", 1)):
    with pytest.raises(TypeError, match="student_towers"), small_networks.untyped():
      recipes.affinity(student_towers=wrong)
  with pytest.raises(ValueError, match="teacher_towers='text'"):
    as_objective(objective).apply(
      {}, {}, student, Outputs(None, {"image": teacher.features["image"]}), batch, key=None
    )
