"""CWD, ICKD, MGD, structure, VkD, SRRL and CAT-KD by hand, in float64, and what they train."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import small_networks
from jaxdistill import data, networks, recipes, teachers
from jaxdistill.recipes import projectors
from jaxdistill.types import Model, Outputs, as_objective, make_batch
from small_networks import convolve, drawn
from test_losses_features import ref_cat, ref_cwd, ref_ickd, ref_normalized, ref_structure
from test_projectors import as_float64, normalise

KEY = jax.random.key(3)
B, CLASSES = 4, 3
LABELS = np.array([0, 2, 1, 0])
OURS = {"map": (4, 6, 3), "same": (4, 6, 5), "pooled": (3,), "tokens": (7, 3), "cams": (4, 4, 3)}
THEIRS = {"map": (4, 6, 5), "same": (4, 6, 5), "pooled": (5,), "tokens": (9, 5), "cams": (2, 2, 3)}


def outputs(shapes, seed):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=(B, *shape)), jnp.float32)  # noqa: E731
  return Outputs(draw(CLASSES), {name: draw(*shape) for name, shape in shapes.items()})


STUDENT, TEACHER = outputs(OURS, 0), outputs(THEIRS, 1)
BATCH = make_batch(jnp.zeros((B, 1)), jnp.asarray(LABELS), index=jnp.array([7, 2, 9, 4]))
HEAD = {"kernel": np.random.default_rng(2).normal(size=(5, CLASSES)), "bias": np.arange(3.0)}


def wide(outputs_, name):
  return np.asarray(outputs_.features[name], np.float64)


def run(objective, key=KEY, student=STUDENT):
  """Terms, parameters, and the gradients that reach parameters and student."""
  objective = as_objective(objective)
  shapes = jax.eval_shape(objective.init, KEY, STUDENT, TEACHER)[0]
  params = drawn(shapes, seed=5)
  _, state = objective.init(KEY, STUDENT, TEACHER)

  @jax.jit
  def total(params, student):
    terms, _ = objective.apply(params, state, student, TEACHER, BATCH, key=key, **objective.hyper)
    return sum(t.weight * jnp.mean(t.values) for t in terms.values()), terms

  (_, terms), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, student)
  return terms, as_float64(params), gradients


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def connect(params, x, relu):
  y = normalise(x @ params["conv"]["kernel"][0, 0], params["norm"])
  return np.maximum(y, 0) if relu else y


CLOSE = {"rtol": 2e-4, "atol": 1e-5}  # float32, behind a BatchNorm


def moved(gradients, spared=()):
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
    assert np.any(leaf) or any(key.key in spared for key in path), path


@pytest.mark.slow
def test_cwd():
  terms, params, gradients = run(recipes.cwd(student_layer="map"))
  want = ref_cwd(connect(params["connector"], wide(STUDENT, "map"), True), wide(TEACHER, "map"), 4)
  np.testing.assert_allclose(terms["channels"].values, want, **CLOSE)
  moved(gradients[0])
  # Equal widths meet as they are; so do the logits of each pixel, [B, H, W, K].
  terms, params, _ = run(recipes.cwd(student_layer="same", temperature=2.0))
  assert not params
  want = ref_cwd(wide(STUDENT, "same"), wide(TEACHER, "same"), 2)
  np.testing.assert_allclose(terms["channels"].values, want, **CLOSE)
  pixels = [Outputs(o.features["same"]) for o in (STUDENT, TEACHER)]
  weight = np.ones((B, 4, 6))
  weight[0, :2], weight[1] = 0, 0
  batch = make_batch(jnp.zeros((B, 1)), jnp.zeros((B, 4, 6), int), weight=jnp.asarray(weight))
  objective = recipes.cwd(student_layer=None, hard_weight=None)
  filled = [o.replace(logits=jnp.where(weight[..., None] > 0, o.logits, jnp.nan)) for o in pixels]
  terms, _ = objective.apply({}, {}, *filled, batch, key=KEY)
  own = [np.asarray(o.logits, np.float64) for o in pixels]
  want = [ref_cwd(*(o[:1, 2:] for o in own), 4)[0], 0, *ref_cwd(*(o[2:] for o in own), 4)]
  np.testing.assert_allclose(terms["channels"].values, want, **CLOSE)
  with pytest.raises(ValueError, match="cwd compares with a teacher"):
    objective.init(KEY, STUDENT, None)


def test_ickd():
  terms, params, gradients = run(recipes.ickd(student_layer="map"))
  embedded = connect(params["embedding"], wide(STUDENT, "map"), False)
  np.testing.assert_allclose(
    terms["correlation"].values, ref_ickd(embedded, wide(TEACHER, "map")), **CLOSE
  )
  moved(gradients[0])


def test_structure():
  terms, _, gradients = run(recipes.structure(student_layer="map", window=2))
  want = ref_structure(wide(STUDENT, "map"), wide(TEACHER, "map"), 2)
  np.testing.assert_allclose(terms["structure"].values, want, **CLOSE)
  assert np.any(gradients[1].features["map"])
  with pytest.raises(ValueError, match="window=0 must be at least 1"):
    recipes.structure(window=0)


def generate(params, x, keep):
  if "align" in params:
    x = x @ params["align"]["kernel"][0, 0] + params["align"]["bias"].reshape(1, 1, 1, -1)
  x = convolve(x * keep, params["conv1"]["kernel"]) + params["conv1"]["bias"].reshape(1, 1, 1, -1)
  x = convolve(np.maximum(x, 0), params["conv2"]["kernel"])
  return x + params["conv2"]["bias"].reshape(1, 1, 1, -1)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("layer", "masked", "shape"),
  [
    ("map", "channels", (1, 1, 5)),
    ("same", "channels", (1, 1, 5)),
    ("map", "positions", (4, 6, 1)),
  ],
)
def test_mgd(layer, masked, shape):
  options = {"student_layer": layer, "masked": masked}
  for share in (0.0, 0.4):
    terms, params, gradients = run(recipes.mgd(**options, masked_share=share))
    keep = np.stack(
      [
        np.asarray(jax.random.uniform(jax.random.fold_in(jax.random.fold_in(KEY, i), 0), shape))
        >= share
        for i in np.asarray(BATCH.index)
      ]
    )
    made = generate(params["generation"], wide(STUDENT, layer), keep)
    want = ((made - wide(TEACHER, layer)) ** 2).sum((1, 2, 3))
    np.testing.assert_allclose(terms["generation"].values, want, rtol=2e-4)
    assert ("align" in params["generation"]) == (layer == "map")
    moved(gradients[0])


def test_mgd_draws_by_the_key_and_the_example_and_not_by_its_place():
  objective = recipes.mgd(student_layer="map", masked_share=0.5)
  params, _ = objective.init(KEY, STUDENT, TEACHER)

  @jax.jit
  def values(order, key):
    taken = jax.tree.map(lambda leaf: leaf[order], (STUDENT, TEACHER, BATCH))
    return objective.apply(params, {}, *taken, key=key, masked_share=0.5)[0]["generation"].values

  straight, turned = jnp.arange(B), jnp.array([2, 0, 3, 1])
  first = values(straight, KEY)
  np.testing.assert_allclose(values(turned, KEY), first[turned], rtol=1e-5)
  assert np.all(np.asarray(values(straight, jax.random.key(4))) != first)


def test_mgd_refuses_what_is_no_share():
  for share in (-0.1, 1.5):
    with pytest.raises(ValueError, match="masked_share must be"):
      recipes.mgd(masked_share=share)
  with pytest.raises(ValueError, match="masked='rows' must be 'channels' or 'positions'"):
    recipes.mgd(masked="rows")


@pytest.mark.parametrize("layer", ["pooled", "tokens", "map"])
def test_vkd(layer):
  terms, params, gradients = run(recipes.vkd(student_layer=layer))
  q, r = np.linalg.qr(params["projector"]["kernel"])
  q = q * np.where(np.diag(r) < 0, -1, 1)[None]
  ours, theirs = (
    x.reshape(B, -1, x.shape[-1]).mean(1) for x in (wide(STUDENT, layer), wide(TEACHER, layer))
  )
  np.testing.assert_allclose(terms["hint"].values, ref_normalized(ours @ q.T, theirs), **CLOSE)
  p, s = (softmax(np.asarray(o.logits, np.float64)) for o in (TEACHER, STUDENT))
  np.testing.assert_allclose(terms["soft"].values, (p * np.log(p / s)).sum(-1), **CLOSE)
  moved(gradients[0])
  assert set(run(recipes.vkd(student_layer=layer, soft_weight=None))[0]) == {"labels", "hint"}


@pytest.mark.slow
@pytest.mark.parametrize(("width", "features"), [(3, 5), (4, 4), (6, 2)])
def test_an_orthogonal_projector_keeps_lengths_at_every_step(width, features):
  module = projectors.Orthogonal(features)
  x = np.random.default_rng(0).normal(size=(7, width)).astype(np.float32)
  target = np.random.default_rng(1).normal(size=(7, features)).astype(np.float32)
  params = module.init(KEY, x)["params"]
  optimizer = optax.adam(0.1)

  def loss(params):
    return jnp.mean((module.apply({"params": params}, x) - target) ** 2)

  @jax.jit
  def step(params, memory):
    value, gradient = jax.value_and_grad(loss)(params)
    updates, memory = optimizer.update(gradient, memory)
    return optax.apply_updates(params, updates), memory, value

  memory, values = optimizer.init(params), []
  for _ in range(20):
    q = np.asarray(module.apply({"params": params}, np.eye(width, dtype=np.float32)))
    identity = q @ q.T if width <= features else q.T @ q
    np.testing.assert_allclose(identity, np.eye(min(width, features)), atol=1e-5)
    params, memory, value = step(params, memory)
    values.append(float(value))
  assert values[-1] < values[0]
  # The gradient, by differences, in float64.
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x, target = x.astype(np.float64), target.astype(np.float64)
    jax.test_util.check_grads(loss, (wide,), order=1, modes="rev", atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", [HEAD, {"kernel": HEAD["kernel"]}])
def test_srrl(head):
  terms, params, gradients = run(recipes.srrl(head, student_layer="map"))
  pooled = connect(params["connector"], wide(STUDENT, "map"), True).mean((1, 2))
  want = ((pooled - wide(TEACHER, "map").mean((1, 2))) ** 2).mean(-1)
  np.testing.assert_allclose(terms["feature"].values, want, **CLOSE)
  read = pooled @ HEAD["kernel"] + head.get("bias", np.zeros(3))[None]
  want = ((read - np.asarray(TEACHER.logits, np.float64)) ** 2).mean(-1)
  np.testing.assert_allclose(terms["regression"].values, want, **CLOSE)
  moved(gradients[0])
  # The classifier is remembered, and nobody trains it.
  objective = recipes.srrl(head, student_layer="map")
  made, state = objective.init(KEY, STUDENT, TEACHER)
  assert set(made) == {"connector"}
  after = objective.apply(made, state, STUDENT, TEACHER, BATCH, key=KEY)[1]
  jax.tree.map(np.testing.assert_array_equal, after["classifier"], state["classifier"])


def test_srrl_refuses_a_classifier_of_another_width():
  objective = recipes.srrl({"kernel": np.ones((4, 3))}, student_layer="map")
  with pytest.raises(ValueError, match=r"kernel \(4, 3\) for the teacher's 'map' \(4, 4, 6, 5\)"):
    objective.init(KEY, STUDENT, TEACHER)


@pytest.mark.parametrize("normalize", [False, True])
def test_catkd(normalize):
  terms, _, gradients = run(recipes.catkd(student_layer="cams", size=2, normalize=normalize))
  want = ref_cat(wide(STUDENT, "cams"), wide(TEACHER, "cams"), 2, normalize)
  np.testing.assert_allclose(terms["attention"].values, want, **CLOSE)
  assert np.any(gradients[1].features["cams"])
  with pytest.raises(ValueError, match="size=0 must be at least 1"):
    recipes.catkd(size=0)


@functools.cache
def network(width):
  made = networks.linen(
    networks.models.ResNet(8, CLASSES, width=(width,) * 4), features=["stage2", "stage3", "pooled"]
  )
  return recipes.with_class_maps(made)


@pytest.mark.slow
def test_class_maps_average_to_the_logits_and_train_the_classifier():
  rng = np.random.default_rng(0)
  inputs = rng.normal(size=(6, 8, 8, 3)).astype(np.float32)
  student = network(2)
  variables = student.init(KEY, inputs)
  params = variables["params"]["classifier"]
  outputs, _ = student.apply(variables, inputs, train=False, key=None)
  read = np.asarray(outputs.features["class_maps"], np.float64).mean((1, 2))
  bias = np.asarray(params["bias"])[None]
  np.testing.assert_allclose(read + bias, outputs.logits, rtol=1e-5, atol=1e-5)
  # With a bias that is not 0, as a trained one is, the whole logits: what SDD's regions are of.
  known = {**params, "bias": params["bias"] + 1.0}
  moved = {**variables, "params": {**variables["params"], "classifier": known}}
  whole = recipes.with_class_maps(student, name="logit_map", bias=True)
  outputs, _ = whole.apply(moved, inputs, train=False, key=None)
  assert np.all(np.asarray(known["bias"]) != 0)
  mean = np.asarray(outputs.features["logit_map"], np.float64).mean((1, 2))
  np.testing.assert_allclose(mean, outputs.logits, rtol=1e-5, atol=1e-5)
  apart = np.asarray(outputs.features["logit_map"]) - np.asarray(outputs.features["class_maps"])
  np.testing.assert_allclose(apart, np.broadcast_to(known["bias"], apart.shape), atol=1e-5)
  examples = data.from_arrays(inputs, rng.integers(0, 3, 6), num_classes=CLASSES)
  taught = teachers.frozen(Model(network(3), network(3).init(jax.random.key(1), inputs)))
  fitted = small_networks.fit(
    student,
    recipes.catkd(hard_weight=None),
    data=data.on_device(examples, batch_size=6, data_seed=0),
    optimizer=optax.sgd(1e-2),
    steps=3,
    teacher=taught,
    log_every=1,
  )
  assert fitted.history[-1]["attention"] < fitted.history[0]["attention"]
  plain = networks.linen(networks.models.ResNet(8, CLASSES, width=(2,) * 4), features=["stage3"])
  for wrong in ({"classifier": "head"}, {"classifier": "classifier/kernel"}):
    with pytest.raises(ValueError, match="name the dense layer"):
      recipes.with_class_maps(plain, **wrong).apply(variables, inputs, train=False, key=None)
  with pytest.raises(ValueError, match="'stage1' is not among"):
    recipes.with_class_maps(plain, layer="stage1").apply(variables, inputs, train=False, key=None)
