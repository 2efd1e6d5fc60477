"""Recipes on predictions: published sums in NumPy, warm-ups, the temperature that works against."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxdistill import losses, networks, recipes
from jaxdistill.recipes import ctkd, dist, dkd, kd_standardized, ofa, projectors
from jaxdistill.train import init_state, make_step, reduce_terms
from jaxdistill.types import Objective, Outputs, as_objective, make_batch
from small_networks import drawn
from test_losses_logits import kl, pearson, ref_decoupled, ref_ofa, softmax

KEY = jax.random.key(0)
CLASSES = 4
STAGES = ("stage1", "stage2", "stage3")
FACTORIES = {
  "kd_standardized": kd_standardized,
  "dkd": functools.partial(dkd, warmup_steps=8),
  "dist": dist,
  "ofa": ofa,
  "ctkd": functools.partial(ctkd, warmup_steps=8),
}


class Stages(nn.Module):
  """Three dense layers on four patches, each sown as a map."""

  width: int

  @nn.compact
  def __call__(self, x, *, train: bool = False):
    del train
    for name in STAGES:
      x = nn.relu(nn.Dense(self.width)(x))
      self.sow("intermediates", name, x)
    return nn.Dense(CLASSES)(x.reshape(x.shape[0], -1))


class NormedHead(nn.Module):
  """A head of a user's own, which has statistics to keep."""

  classes: int

  @nn.compact
  def __call__(self, x, *, train: bool = False):
    x = nn.BatchNorm(use_running_average=not train)(x)
    return nn.Dense(self.classes)(x.mean((1, 2)))


def digits(size=24, seed=0):
  """Images of 2 x 2 patches, of which one is bright: the class, and what a teacher says."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, CLASSES, size)
  images = rng.normal(size=(size, 2, 2, 4)) * 0.3
  images[np.arange(size), labels // 2, labels % 2] += 1
  logits = 4 * np.eye(CLASSES)[labels] + rng.normal(size=(size, CLASSES))
  teacher = Outputs(jnp.asarray(logits, jnp.float32))
  return make_batch(
    jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.int32), teacher=teacher
  )


def draw(dtype=np.float64, size=8, seed=3):
  """Outputs of both networks, and a batch with padding and without some of the labels."""
  rng = np.random.default_rng(seed)
  features = {"map": rng.normal(size=(size, 2, 2, 3)), "vector": rng.normal(size=(size, 5))}
  features = {name: jnp.asarray(x, dtype) for name, x in features.items()}
  ours, theirs = (jnp.asarray(3 * rng.normal(size=(size, CLASSES)), dtype) for _ in range(2))
  weight = np.array([1, 2, 0, 1, 1, 0, 1, 1.0])[:size]
  labelled = np.array([1, 0, 1, 1, 0, 1, 1, 1.0])[:size]
  labels = np.where(labelled > 0, rng.integers(0, CLASSES, size), 0)
  batch = make_batch(
    jnp.zeros((size, 1)),
    jnp.asarray(labels, jnp.int32),
    weight=jnp.asarray(weight, dtype),
    labelled=jnp.asarray(labelled, dtype),
  )
  return Outputs(ours, features), Outputs(theirs), batch


def of(objective, **keywords):
  """``(params, state, student, teacher, batch) -> (loss, sums)``, as the step reduces it."""

  def loss(params, state, student, teacher, batch):
    terms, _ = objective.apply(params, state, student, teacher, batch, key=KEY, **keywords)
    return reduce_terms(terms, batch)

  return loss


def parameters(objective, student, teacher, seed=2):
  """Parameters without the initialisers, whose compilation would take most of the time."""
  shapes, state = jax.eval_shape(objective.init, KEY, student, teacher)
  assert state == {}
  return drawn(shapes, seed, scale=1 / 3)


# The formulas of the papers, in float64; others are with the losses.


def hard(z, y):
  return -np.log(softmax(z)[np.arange(len(y)), y])


def soft(s, t, temperature):
  return temperature**2 * kl(softmax(t, temperature), softmax(s, temperature))


def z_scores(z):
  return (z - z.mean(-1, keepdims=True)) / (1e-7 + z.std(-1, ddof=1, keepdims=True))


def mean(values, weight):
  return np.sum(values * weight) / np.sum(weight)


def published(name, student, teacher, batch):
  """The sum with the published weights, with weighted rows in the mean and others left out."""
  s, t = np.asarray(student.logits), np.asarray(teacher.logits)
  y, weight = np.asarray(batch.labels), np.asarray(batch.weight)
  known = weight * np.asarray(batch.labelled)
  cross = mean(hard(s, y), known)
  if name == "kd_standardized":
    return 0.1 * cross + 9 * mean(soft(z_scores(s), z_scores(t), 2.0), weight)
  if name == "dkd":
    return cross + 0.25 * mean(ref_decoupled(s, t, y, 4.0, 1.0, 8.0), known)
  if name == "dkd+ls":
    values = ref_decoupled(z_scores(s), z_scores(t), y, 2.0, 1.0, 8.0)
    return cross + 0.25 * 9 * mean(values, known)
  if name == "dist":
    q, p = softmax(s, 4.0), softmax(t, 4.0)
    inter = mean(16 * (1 - pearson(q, p, -1)), weight)
    intra = np.mean(16 * (1 - pearson(q[weight > 0], p[weight > 0], 0)))
    return cross + 2 * (inter + intra)
  assert name == "ctkd"
  temperature = 1 + 20 / (1 + np.exp(-1.0))
  return 0.1 * cross + 0.9 * mean(soft(s, t, temperature), weight)


PUBLISHED = {
  "kd_standardized": (kd_standardized(), {}),
  "dkd": (dkd(), {"dkd_warmup": 0.25}),
  "dkd+ls": (dkd(standardize=True, temperature=2.0, soft_weight=9.0), {"dkd_warmup": 0.25}),
  "dist": (dist(), {}),
  "ctkd": (ctkd(), {"ctkd_reversal": 0.5}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_loss_is_the_published_sum(name, strict_promotion):
  objective, keywords = PUBLISHED[name]
  objective = as_objective(objective)
  with jax.enable_x64(True):
    student, teacher, batch = draw()
    params, state = objective.init(KEY, student, teacher)
    compute = jax.jit(of(objective, **keywords))
    loss, sums = compute(params, state, student, teacher, batch)
    want = published(name, student, teacher, batch)
    # The rows that do not count hold anything.
    wild = jnp.where(batch.weight[:, None] > 0, student.logits, 1e4)
    again, _ = compute(params, state, student.replace(logits=wild), teacher, batch)
    assert float(loss) == pytest.approx(want, rel=1e-6 if name == "ctkd" else 1e-12)
    assert float(again) == pytest.approx(float(loss), rel=1e-12)
  # Labelled rows by their weights: 1, 1, 1 and 1 of 8.
  assert float(sums["labels"][1]) == 4


def test_one_for_all_has_an_exit_for_each_layer(strict_promotion):
  student, teacher, batch = draw(np.float32)
  objective = ofa(student_layers=("map", "vector"), power=1.5, ofa_weight=0.5, soft_weight=2.0)
  params = parameters(objective, student, teacher)
  kernels = {name: p["classifier"]["kernel"].shape for name, p in params.items()}
  assert kernels == {"map": (3, CLASSES), "vector": (5, CLASSES)}
  s, t, y = (np.asarray(x, np.float64) for x in (student.logits, teacher.logits, batch.labels))
  y, known = y.astype(int), np.asarray(batch.weight * batch.labelled)

  def head(name, x):
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params[name]["classifier"])
    return x @ weights["kernel"] + weights["bias"]

  pooled = np.asarray(student.features["map"], np.float64).mean((1, 2))
  exits = [head("map", pooled), head("vector", np.asarray(student.features["vector"]))]
  want = mean(hard(s, y), known) + 2 * mean(ref_ofa(s, t, y, 1.5, 1.0), known)
  want += 0.5 * sum(mean(ref_ofa(z, t, y, 1.5, 1.0), known) for z in exits)
  loss, sums = jax.jit(of(objective))(params, {}, student, teacher, batch)
  # float32 logarithms and sums of four.
  assert float(loss) == pytest.approx(want, rel=1e-5)
  assert {name: float(count) for name, (_, count) in sums.items()} == dict.fromkeys(sums, 4)


def test_heads_take_maps_tokens_and_vectors():
  shapes = {"map": (2, 4, 4, 3), "tokens": (2, 5, 3), "vector": (2, 3)}
  features = {name: jnp.ones(shape) for name, shape in shapes.items()}
  student, teacher = Outputs(jnp.zeros((2, 7)), features), Outputs(jnp.zeros((2, 7)))
  objective = ofa(student_layers=list(shapes))
  params, _ = jax.eval_shape(objective.init, KEY, student, teacher)
  assert {p["classifier"]["kernel"].shape for p in params.values()} == {(3, 7)}


@pytest.mark.parametrize("hidden", [None, 6])
def test_ctkd_tempers_by_one_temperature_or_by_each_examples_own(hidden, strict_promotion):
  student, teacher, batch = draw(np.float32)
  objective = ctkd(learned_temperature=projectors.LearnedTemperature(hidden=hidden))
  params = parameters(objective, student, teacher)
  terms, _ = jax.jit(functools.partial(objective.apply, key=KEY, ctkd_reversal=1.0))(
    params, {}, student, teacher, batch
  )
  s, t = (np.asarray(x.logits, np.float64) for x in (student, teacher))
  if hidden is None:
    temperatures = np.full(8, 1 + 20 / (1 + np.exp(-float(params["temperature"]["theta"]))))
  else:
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["temperature"])
    x = np.maximum(np.concatenate([s, t], -1) @ p["dense1"]["kernel"] + p["dense1"]["bias"], 0)
    theta = (x @ p["dense2"]["kernel"] + p["dense2"]["bias"])[:, 0]
    temperatures = 1 + 20 / (1 + np.exp(-theta))
    assert np.ptp(temperatures) > 1
  logged = terms["learned_temperature"]
  assert logged.axis == ("parameters" if hidden is None else "batch")
  assert logged.weight == 0
  # float32; a KL is a difference of logarithms, here of size 1e-2, times 240.
  np.testing.assert_allclose(np.broadcast_to(logged.values, 8), temperatures, rtol=1e-5)
  want = [soft(a, b, value) for a, b, value in zip(s, t, temperatures, strict=True)]
  np.testing.assert_allclose(terms["soft"].values, want, rtol=1e-4)


def test_another_loss_goes_behind_standardised_logits_and_a_learned_temperature():
  student, teacher, batch = draw(np.float32)
  learned = ctkd(loss=losses.reverse_kl, standardize=True)
  params, state = learned.init(KEY, student, teacher)

  @jax.jit
  def terms(student, teacher, batch):
    def of_function(objective):
      return objective.apply({}, {}, student, teacher, batch, key=None)[0]

    ctkd_terms, _ = learned.apply(
      params, state, student, teacher, batch, key=KEY, ctkd_reversal=0.0
    )
    return (
      of_function(kd_standardized(loss=losses.total_variation))["soft"].values,
      ctkd_terms["soft"].values,
      of_function(dist(standardize=True))["inter"].values,
    )

  by_tvd, by_reverse_kl, inter = terms(student, teacher, batch)
  s, t = (z_scores(np.asarray(x.logits, np.float64)) for x in (student, teacher))
  # float32, where a KL at a temperature of 15.6 is a small difference of logarithms.
  np.testing.assert_allclose(by_tvd, 2 * np.abs(softmax(t, 2) - softmax(s, 2)).sum(-1), rtol=1e-4)
  np.testing.assert_allclose(by_reverse_kl, soft(t, s, 1 + 20 / (1 + np.exp(-1))), rtol=1e-3)
  np.testing.assert_allclose(
    inter, 16 * (1 - pearson(softmax(s, 4), softmax(t, 4), -1)), rtol=1e-4, atol=1e-4
  )


def test_a_class_of_one_example_is_no_relation():
  student, teacher, batch = draw(np.float32)
  alone = batch.replace(weight=jnp.zeros(8).at[3].set(1.0))
  compute = jax.jit(of(as_objective(dist())))
  for given, count in ((batch, CLASSES), (alone, 0)):
    loss, sums = compute({}, {}, student, teacher, given)
    assert float(sums["intra"][1]) == count
    assert np.isfinite(loss)


def test_relations_are_the_same_on_two_devices():
  with jax.enable_x64(True):
    given = draw()
    compute = jax.jit(of(as_objective(dist())))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.device_put(given, NamedSharding(mesh, PartitionSpec("data")))
    # float64 sums of eight, in another order.
    assert float(compute({}, {}, *split)[0]) == pytest.approx(published("dist", *given), rel=1e-12)


@pytest.mark.parametrize("name", FACTORIES)
def test_low_precision_logits_make_float32_terms(name, strict_promotion):
  objective = as_objective(
    FACTORIES[name](**({"student_layers": ["map"]} if name == "ofa" else {}))
  )
  student, teacher, batch = draw(jnp.bfloat16)
  keywords = {n: 0.5 for n in ("dkd_warmup", "ctkd_reversal") if n in objective.hyper}
  params, state = jax.eval_shape(objective.init, KEY, student, teacher)
  loss, _ = jax.eval_shape(of(objective, **keywords), params, state, student, teacher, batch)
  assert loss.dtype == jnp.float32


def test_warm_ups_and_what_turns_them_off():
  # CIFAR-100 at batch size 64: 781 steps an epoch.
  for make, keyword, steps in ((dkd, "dkd_warmup", 15620), (ctkd, "ctkd_reversal", 7810)):
    default = as_objective(make()).hyper[keyword]
    third, two_thirds = (1 / 3, 2 / 3) if make is dkd else (0.25, 0.75)
    for short, length in (
      (default, steps),
      (as_objective(make(warmup_steps=30)).hyper[keyword], 30),
    ):
      at = [
        float(short(s)) for s in (0, length / 3, length / 2, 2 * length / 3, length, 9 * length)
      ]
      np.testing.assert_allclose(at, [0, third, 0.5, two_thirds, 1, 1], atol=1e-6)  # float32
    assert as_objective(make(warmup_steps=0)).hyper[keyword] == 1
    assert callable(recipes.combine(recipes.hint("a", "b"), make()).hyper[keyword])
    with pytest.raises(ValueError, match="warmup_steps=-1"):
      make(warmup_steps=-1)


def test_the_temperature_works_against_the_student(strict_promotion):
  student, teacher, batch = draw(np.float32)
  objective = ctkd()
  params = {"temperature": {"theta": jnp.asarray(1.0)}}

  @jax.jit
  @functools.partial(jax.value_and_grad, argnums=(0, 1))
  def loss(params, student, reversal):
    return of(objective, ctkd_reversal=reversal)(params, {}, student, teacher, batch)[0]

  def theta(tree):
    return float(tree["temperature"]["theta"])

  value, (ours, students) = loss(params, student, 1.0)
  _, (half, same) = loss(params, student, 0.5)
  _, (none, _) = loss(params, student, 0.0)
  # Minus the slope of the loss, by differences: float32 values of size 1, 0.2 apart.
  ends = [
    float(loss({"temperature": {"theta": jnp.asarray(x)}}, student, 1.0)[0]) for x in (1.1, 0.9)
  ]
  assert theta(ours) == pytest.approx(-(ends[0] - ends[1]) / 0.2, rel=2e-2)
  assert theta(half) == pytest.approx(theta(ours) / 2, rel=1e-6)
  assert theta(none) == 0
  # The student's gradient is what it is whatever the temperature's.
  np.testing.assert_array_equal(students.logits, same.logits)
  assert np.any(students.logits != 0)
  # Steps that go down for the student go up for theta.
  values = [float(value)]
  for _ in range(3):
    _, (slope, _) = loss(params, student, 1.0)
    params = jax.tree.map(lambda p, g: p - 30 * g, params, slope)
    values.append(float(loss(params, student, 1.0)[0]))
  assert values == sorted(values)
  assert values[-1] > values[0] + 1e-3


def one_at_a_time(objectives):
  """All of them as one objective, in which keywords 0 or 1 say which one counts."""
  parts = {name: as_objective(objective) for name, objective in objectives.items()}
  scheduled = {n: v for part in parts.values() for n, v in part.hyper.items() if callable(v)}

  def init(key, student, teacher):
    made = {name: part.init(key, student, teacher) for name, part in parts.items()}
    return {n: params for n, (params, _) in made.items()}, {n: s for n, (_, s) in made.items()}

  def apply(params, state, student, teacher, batch, *, key, **hyper):
    terms, states = {}, {}
    for name, part in parts.items():
      given = {n: hyper[n] for n in scheduled if n in part.hyper}
      made, states[name] = part.apply(
        params[name], state[name], student, teacher, batch, key=key, **given
      )
      for term, found in made.items():
        terms[f"{name}.{term}"] = found.replace(weight=found.weight * hyper[name])
    return terms, states

  return Objective(init=init, apply=apply, hyper={**scheduled, **dict.fromkeys(parts, 0.0)})


def seeded(seeds, student, objective, optimizer, batch):
  """States ``[seeds, ...]`` with theta at 1, without compiling the initialisers."""
  shapes = jax.eval_shape(lambda key: init_state(key, student, objective, optimizer, batch), KEY)
  assert jax.tree.leaves(shapes.opt_state) == []
  rng = np.random.default_rng(5)

  def values(path, x):
    return jnp.asarray(
      np.ones((seeds, *x.shape))
      if path[-1].key == "theta"
      else rng.normal(size=(seeds, *x.shape)) / 2,
      x.dtype,
    )

  return shapes.replace(
    step=jnp.zeros(seeds, jnp.int32),
    params=jax.tree_util.tree_map_with_path(values, shapes.params),
    objective_params=jax.tree_util.tree_map_with_path(values, shapes.objective_params),
    objective_state=jax.tree.map(lambda x: jnp.ones((seeds, *x.shape)), shapes.objective_state),
    key=jax.random.split(KEY, seeds),
  )


@pytest.mark.slow
def test_all_train_side_by_side_on_two_devices():
  by_row = projectors.LearnedTemperature(hidden=4)
  special = {"ofa": {"head": lambda feature, classes: NormedHead(classes)}}
  objectives = {name: make(**special.get(name, {})) for name, make in FACTORIES.items()}
  objectives["ctkd by row"] = ctkd(learned_temperature=by_row, warmup_steps=0)
  names, objective, optimizer = list(objectives), one_at_a_time(objectives), optax.sgd(0.03)
  student = networks.linen(Stages(4), features=STAGES)
  mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  batch = jax.device_put(digits(), NamedSharding(mesh, PartitionSpec("data")))

  @jax.jit
  @jax.vmap
  def train(state, chosen):
    hyper = {name: chosen[i] for i, name in enumerate(names)}
    return make_step(student, objective, optimizer, hyper=hyper)(state, None, batch)

  # A seed for each method.
  state = start = seeded(len(names), student, objective, optimizer, batch)
  history, thetas = [], []
  for _ in range(12):
    state, sums = train(state, jnp.eye(len(names)))
    history.append({n: np.asarray(total / count) for n, (total, count) in sums.items()})
    thetas.append(np.asarray(state.objective_params["ctkd"]["temperature"]["theta"]))
  series = {name: np.stack([line[name] for line in history]) for name in history[0]}
  assert all(np.all(np.isfinite(values)) for values in series.values())
  falling = {"dkd": ["dkd"], "dist": ["inter", "intra"], "ofa": ["soft", "ofa"]}
  for i, name in enumerate(names):
    mine = {t: series[f"{name}.{t}"][:, i] for t in falling.get(name, ["soft"])}
    assert all(values[-1] < values[0] for values in mine.values()), (name, mine)
  # The warm-up over eight steps, in the loss that was minimised.
  row, share = names.index("dkd"), np.minimum(np.arange(12) / 8, 1)
  labels, soft = series["dkd.labels"][:, row], series["dkd.dkd"][:, row]
  np.testing.assert_allclose(series["loss"][:, row], labels + share * soft, rtol=1e-5)
  # The first step has no reversed gradient, and then theta climbs; nobody else's moves.
  row = names.index("ctkd")
  assert thetas[0][row] == 1
  assert thetas[-1][row] != 1
  assert np.all(np.delete(thetas[-1], row) == 1)
  moved = jax.tree.map(
    lambda a, b: np.any(np.asarray(a != b).reshape(len(names), -1), axis=1),
    (start.objective_params, start.objective_state),
    (state.objective_params, state.objective_state),
  )
  heads, statistics = moved[0]["ofa"], moved[1]["ofa"]
  assert set(heads) == set(STAGES)
  assert all(leaf[names.index("ofa")] for leaf in jax.tree.leaves(heads))
  assert all(np.all(leaf) for leaf in jax.tree.leaves(statistics))
  # ReLUs may have died; the last map's parameters always have a gradient.
  assert moved[0]["ctkd by row"]["temperature"]["dense2"]["bias"][names.index("ctkd by row")]


@pytest.mark.parametrize("name", FACTORIES)
def test_without_a_teacher_each_says_so(name):
  student, _, batch = draw(np.float32)
  objective = as_objective(
    FACTORIES[name](**({"student_layers": ["map"]} if name == "ofa" else {}))
  )
  with pytest.raises(ValueError, match=f"{name} compares with a teacher"):
    objective.apply({}, {}, student, None, batch, key=KEY)
  if name in ("ofa", "ctkd"):
    with pytest.raises(ValueError, match=f"{name} compares with a teacher"):
      objective.init(KEY, student, None)


def test_errors_name_the_layer_the_keyword_and_the_labels():
  with pytest.raises(ValueError, match=r"student_layers='stage1' must be a sequence"):
    ofa(student_layers="stage1")
  for layers in ((), ("stage1", "stage1")):
    with pytest.raises(ValueError, match="must name one feature at least, and each once"):
      ofa(student_layers=layers)
  student, teacher, batch = draw(np.float32)
  with pytest.raises(
    ValueError, match=r"student_layers='stage1' is not among .*'map': \(8, 2, 2, 3"
  ):
    ofa().init(KEY, student, teacher)
  with pytest.raises(ValueError, match="dkd_warmup is a schedule.*dkd_warmup=1.0"):
    dkd().apply({}, {}, student, teacher, batch, key=None)
  with pytest.raises(ValueError, match="ctkd_reversal is a schedule"):
    ctkd().apply({}, {}, student, teacher, batch, key=KEY)
  twice = recipes.combine(recipes.kd(), ctkd(warmup_steps=0))
  params, state = jax.eval_shape(twice.init, KEY, student, teacher)
  with pytest.raises(ValueError, match=r"name a term \['labels', 'soft'\]"):
    jax.eval_shape(functools.partial(twice.apply, key=KEY), params, state, student, teacher, batch)
