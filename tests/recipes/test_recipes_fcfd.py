"""FCFD: its terms by hand, the teacher that goes on from a map, and the student that is left."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax

import small_networks
from jaxdistill import data, networks, teachers
from jaxdistill.recipes import combine, fcfd, fcfd_back, with_variables
from jaxdistill.types import Model, Network, Outputs, make_batch

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
LABELS = np.array([0, 1, 2, 0])
BATCH = make_batch(jnp.zeros((4, 1)), jnp.asarray(LABELS))
STAGES = ("stage1", "stage2", "stage3")
# A teacher whose stages are products at each position: 3 channels to 4 to 5, and 3 classes.
TAUGHT = {
  name: RNG.normal(size=shape).astype(np.float32)
  for name, shape in (("stage2", (3, 4)), ("stage3", (4, 5)), ("logits", (5, 3)))
}
FIRST = RNG.normal(size=(4, 4, 4, 3)).astype(np.float32)
OURS = {n: RNG.normal(size=(4, 4, 4, 2)).astype(np.float32) for n in STAGES}
SAID = RNG.normal(size=(4, 3)).astype(np.float32)


def goes_on(variables, maps, after, xp=np):
  """The teacher's later maps, and its logits."""
  found = {}
  for name in STAGES[STAGES.index(after) + 1 :]:
    maps = found[name] = xp.tanh(maps @ variables[name])
  return found, maps.mean((1, 2)) @ variables["logits"]


def tail(after):
  def apply(variables, maps, *, train, key):
    assert not train
    assert key is None
    found, logits = goes_on(variables, maps, after, jnp)
    return Outputs(logits, found), {}

  return Network(init=lambda key, maps: {}, apply=apply)


TAILS = {name: tail(name) for name in STAGES[:2]}


def outputs(logits, features):
  return Outputs(*jax.tree.map(jnp.asarray, (logits, features)))


def both():
  found, logits = goes_on(TAUGHT, FIRST, "stage1")
  return outputs(SAID, OURS), outputs(logits, {"stage1": FIRST, **found})


def made(objective, params=None, **hyper):
  """The terms and the states before and after."""
  begun, state = objective.init(KEY, *both())
  given = (begun if params is None else params, state, *both(), BATCH)
  return *objective.apply(*given, key=None, **hyper), state, begun


def bridged(params, maps):
  """The published bridge in training, in float64."""
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  x = small_networks.convolve(maps.astype(np.float64), params["conv"]["kernel"])
  x = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
  x = params["norm"]["scale"] * x + params["norm"]["bias"]
  return np.where(x > 0, x, 0.1 * x)


def divergence(logits, taught, temperature):
  log_q, log_p = (log_softmax(z / temperature, axis=1) for z in (logits, taught))
  return temperature**2 * np.sum(np.exp(log_p) * (log_p - log_q), axis=1)


@pytest.mark.slow
def test_the_terms_are_the_codes():
  objective = fcfd(TAILS, TAUGHT)
  params = small_networks.drawn(objective.init(KEY, *both())[0], seed=3)
  terms, after, before, _ = made(objective, params)
  own, logits = goes_on(jax.tree.map(np.float64, TAUGHT), FIRST.astype(np.float64), "stage1")
  own["stage1"] = FIRST
  maps = {n: bridged(params[f"bridge{i}"], OURS[n]) for i, n in enumerate(STAGES)}
  (first, first_logits), (second, second_logits) = (
    goes_on(TAUGHT, maps[name], name) for name in STAGES[:2]
  )

  def apart(x, y):
    return ((x - y) ** 2).mean((1, 2, 3))

  def pooled(x):
    return ((np.maximum(x, 0).mean((1, 2)) - np.maximum(own["stage3"], 0).mean((1, 2))) ** 2).mean(
      1
    )

  want = {
    "labels": -log_softmax(SAID.astype(np.float64), axis=1)[np.arange(4), LABELS],
    "soft": divergence(SAID.astype(np.float64), logits, 4.0),
    "appearance": sum(apart(maps[n], own[n]) for n in STAGES) + pooled(maps["stage3"]),
    "function": apart(first["stage2"], own["stage2"])
    + sum(apart(x["stage3"], own["stage3"]) + pooled(x["stage3"]) for x in (first, second)),
    "mixed": sum(divergence(z, logits, 4.0) for z in (first_logits, second_logits)),
  }
  assert set(terms) == set(want)
  for name, values in want.items():
    np.testing.assert_allclose(terms[name].values, values, rtol=1e-3, atol=1e-5, err_msg=name)
  weights = {name: term.weight for name, term in terms.items()}
  assert weights == {"labels": 1.0, "soft": 1.0, "appearance": 5.0, "function": 5.0, "mixed": 1.0}
  # What the bridges remember moves, and what the teacher is does not.
  jax.tree.map(np.testing.assert_array_equal, after["teacher"], before["teacher"])
  jax.tree.map(np.testing.assert_array_equal, after["teacher"], TAUGHT)
  mean = [s["bridge0"]["batch_stats"]["norm"]["mean"] for s in (before, after)]
  assert np.all(np.asarray(mean[0]) != np.asarray(mean[1]))


def test_only_the_maps_warm_up():
  objective = fcfd(TAILS, TAUGHT, warmup_steps=10)
  assert float(objective.hyper["map_warmup"](5)) == pytest.approx(0.5)
  terms = made(objective, map_warmup=0.5, map_weight=3.0, mixed_weight=0.2)[0]
  weights = {name: term.weight for name, term in terms.items()}
  assert weights == {"labels": 1.0, "soft": 1.0, "appearance": 1.5, "function": 1.5, "mixed": 0.2}
  assert fcfd(TAILS, TAUGHT, warmup_steps=0).hyper["map_warmup"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "learns"),
  [
    ("appearance", (True, True, True)),
    ("function", (True, True, False)),
    ("mixed", (True, True, False)),
    ("soft", (False, False, False)),
  ],
)
def test_the_teachers_stages_teach_the_bridges_below_them(name, learns):
  objective = fcfd(TAILS, TAUGHT)
  total = lambda params: jnp.sum(made(objective, params)[0][name].values)  # noqa: E731
  gradients = jax.grad(total)(objective.init(KEY, *both())[0])
  assert set(gradients) == {"bridge0", "bridge1", "bridge2"}
  for i, learn in enumerate(learns):
    leaves = jax.tree.leaves(gradients[f"bridge{i}"])
    assert all(np.any(np.asarray(leaf) != 0) == learn for leaf in leaves)


@pytest.mark.parametrize("size", [8, 4, 2])
def test_a_bridge_leads_from_any_size(size):
  _, teacher = both()
  student = outputs(SAID, {n: np.ones((4, size, size, 2), np.float32) for n in STAGES})
  objective = fcfd(TAILS, TAUGHT)
  params, state = objective.init(KEY, student, teacher)
  made = params["bridge1"]["conv"]
  assert ("conv" in made) == (size != 4)
  layer = made.get("conv", made)
  assert layer["kernel"].shape == (*((4, 4) if size == 2 else (3, 3)), 2, 4)
  assert ("bias" in layer) == (size != 4)
  terms, _ = objective.apply(params, state, student, teacher, BATCH, key=None)
  assert all(term.values.shape == (4,) for term in terms.values())


class Small(nn.Module):
  """Three products at each position, and a classifier of their mean."""

  @nn.compact
  def __call__(self, x, *, train: bool = False):
    del train
    for name in STAGES:
      x = nn.relu(nn.Dense(2, name=name)(x))
    return nn.Dense(3)(x.mean((1, 2)))


@pytest.mark.slow
def test_a_run_deploys_the_student_alone():
  def whole(variables, inputs, **_):
    rest, _ = TAILS["stage1"].apply(variables, inputs, train=False, key=None)
    return rest.replace(features={"stage1": inputs, **rest.features}), {}

  teacher = Model(Network(init=lambda key, x: TAUGHT, apply=whole), TAUGHT)
  student = networks.linen(Small(), features=STAGES)
  fitted = small_networks.fit(
    student,
    fcfd(TAILS, teacher.variables, warmup_steps=0),
    data=data.on_device(data.from_arrays(FIRST, LABELS, num_classes=3), batch_size=4, data_seed=0),
    optimizer=optax.adam(1e-2),
    steps=30,
    teacher=teachers.frozen(teacher),
    log_every=1,
  )
  first, last = (fitted.history[i] for i in (0, -1))
  for name in ("appearance", "function", "mixed"):
    assert last[name] < first[name]
  assert fitted.network is student
  own = jax.eval_shape(student.init, KEY, FIRST)
  assert jax.tree.structure(fitted.variables) == jax.tree.structure(own)
  kept = fitted.state.objective_state["teacher"]
  jax.tree.map(np.testing.assert_array_equal, kept, TAUGHT)


# --- With a ResNet. ---


INPUTS = RNG.normal(size=(4, 8, 8, 3)).astype(np.float32)
MODULE = networks.models.ResNet(8, 3, width=(2, 2, 3, 4))
ask = jax.jit(lambda model, inputs: model(inputs))


@functools.cache
def taught():
  network = networks.linen(MODULE, features=["stem", *STAGES])
  variables = jax.jit(network.init)(KEY, INPUTS)
  statistics = jax.tree.map(lambda leaf: leaf + 0.5, variables["batch_stats"])
  return Model(network, {**variables, "batch_stats": statistics})


def resnet_tail(after):
  names = STAGES[STAGES.index(after) + 1 :] if after in STAGES else STAGES
  return networks.linen(MODULE.clone(after=after), features=names)


@pytest.mark.slow
@pytest.mark.parametrize("after", ["stem", *STAGES])
def test_a_resnet_goes_on_from_its_own_map(after):
  whole = ask(taught(), INPUTS)
  network = resnet_tail(after)
  rest = Model(network, taught().variables)
  seen = ask(rest, whole.features[after])
  np.testing.assert_allclose(seen.logits, whole.logits, rtol=1e-5, atol=1e-6)
  for name, maps in seen.features.items():
    np.testing.assert_allclose(maps, whole.features[name], rtol=1e-5, atol=1e-6)
  # It has no parameters but those that it reads, under the names they have in the whole.
  own = jax.eval_shape(network.init, KEY, whole.features[after])["params"]
  stem = {"stem_conv", "stem_norm"}
  left = [
    n for n in taught().variables["params"] if n not in stem and (after == "stem" or n[:6] > after)
  ]
  assert set(own) == {*left, "classifier"}


@pytest.mark.slow
def test_a_student_that_is_the_teacher_has_nothing_to_learn():
  tails = {name: resnet_tail(name) for name in STAGES[:2]}
  objective = fcfd(tails, taught().variables, projector=lambda student, teacher: None)
  whole = ask(taught(), INPUTS)
  params, state = objective.init(KEY, whole, whole)
  assert params == {}
  apply = jax.jit(lambda s: objective.apply(params, s, whole, whole, BATCH, key=None)[0])
  terms = apply(state)
  assert np.all(np.asarray(terms.pop("labels").values) > 0)
  for name, term in terms.items():
    np.testing.assert_allclose(term.values, np.zeros(4), atol=1e-6, err_msg=name)


def test_what_does_not_fit_is_named():
  with (
    small_networks.untyped(),
    pytest.raises(TypeError, match="tails=.* must map layers to networks"),
  ):
    fcfd({"stage1": goes_on, "stage2": goes_on}, TAUGHT)
  with pytest.raises(ValueError, match=r"tails are of \['stage1'\] and must be of \['stage1', 's"):
    fcfd({"stage1": TAILS["stage1"]}, TAUGHT)
  with pytest.raises(ValueError, match="must be equally many, at least 2"):
    fcfd({}, TAUGHT, student_layers=("stage3",))
  with pytest.raises(ValueError, match="map_weight must be at least 0"):
    fcfd(TAILS, TAUGHT, map_weight=-1.0)
  other = {**TAUGHT, "logits": np.ones((5, 7), np.float32)}
  with pytest.raises(ValueError, match=r"tails\['stage1'\] says .*'logits': \(4, 7\). of"):
    fcfd(TAILS, other).init(KEY, *both())
  swapped = {"stage1": TAILS["stage1"], "stage2": tail("stage3")}
  with pytest.raises(ValueError, match=r"tails\['stage2'\] does not take .* \(4, 4, 4, 4\) of"):
    fcfd(swapped, TAUGHT).init(KEY, *both())
  silent = dataclasses.replace(TAILS["stage1"], apply=lambda *_, **__: (Outputs(), {}))
  with pytest.raises(ValueError, match="'stage2' is not among the teacher's features"):
    fcfd({**TAILS, "stage1": silent}, TAUGHT).init(KEY, *both())
  with pytest.raises(ValueError, match="teacher, and there is none"):
    fcfd(TAILS, TAUGHT).init(KEY, both()[0], None)


def back_tail(after):
  """The rest of a student of three products and a classifier, in training."""

  def apply(variables, maps, *, train, key):
    del train, key
    found = {}
    for name in STAGES[STAGES.index(after) + 1 :]:
      maps = found[name] = nn.relu(maps @ variables["params"][name]["kernel"])
    return Outputs(maps.mean((1, 2)) @ variables["params"]["out"]["kernel"], found), {}

  return Network(init=lambda key, maps: {}, apply=apply)


BACK = {name: back_tail(name) for name in STAGES[:2]}


@pytest.mark.slow
def test_the_student_goes_on_from_the_teachers_maps():
  """By hand; what is taught are the student's later stages, and never the teacher's maps."""
  own = {name: RNG.normal(size=(2, 2)).astype(np.float32) for name in STAGES[1:]}
  own = {name: {"kernel": leaf} for name, leaf in own.items()}
  own["out"] = {"kernel": RNG.normal(size=(2, 3)).astype(np.float32)}
  seen, _ = back_tail("stage1").apply({"params": own}, OURS["stage1"], train=True, key=None)
  student = outputs(seen.logits, {"stage1": OURS["stage1"], **seen.features})
  student = student.replace(variables={"params": jax.tree.map(jnp.asarray, own)})
  _, teacher = both()
  objective = fcfd_back(BACK)
  params, state = objective.init(KEY, student, teacher)
  assert set(params) == {"bridge0", "bridge1"}
  params = small_networks.drawn(params, seed=4)

  def value(params, variables, taught):
    seen = student.replace(variables=variables)
    said = teacher.replace(features=taught)
    terms, _ = objective.apply(params, state, seen, said, BATCH, key=None)
    assert set(terms) == {"back"}
    return jnp.sum(terms["back"].values), terms["back"].values

  (_, found), gradients = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(
    params, student.variables, teacher.features
  )
  weights = jax.tree.map(np.float64, own)
  want = 0
  for i, name in enumerate(STAGES[:2]):
    x = bridged(params[f"bridge{i}"], np.asarray(teacher.features[name]))
    for later in STAGES[i + 1 :]:
      x = np.maximum(x @ weights[later]["kernel"], 0)
    said = x.mean((1, 2)) @ weights["out"]["kernel"]
    want = want + divergence(said, np.float64(teacher.logits), 4.0)
  np.testing.assert_allclose(found, want, rtol=1e-5)
  assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(gradients))


def test_a_student_without_its_variables_is_told_how_to_bring_them():
  with pytest.raises(ValueError, match=r"with_variables\(student\)"):
    fcfd_back(BACK).init(KEY, *both())
  with pytest.raises(ValueError, match="and must be of .*student_layers"):
    fcfd_back({"stage1": BACK["stage1"]})


@pytest.mark.slow
def test_a_run_both_ways_deploys_the_student_alone():
  def whole(variables, inputs, **_):
    rest, _ = TAILS["stage1"].apply(variables, inputs, train=False, key=None)
    return rest.replace(features={"stage1": inputs, **rest.features}), {}

  def rest(after):
    def apply(variables, maps, *, train, key):
      names = (*STAGES[STAGES.index(after) + 1 :], "Dense_0")
      found = {}
      for name in names[:-1]:
        layer = variables["params"][name]
        maps = found[name] = nn.relu(nn.Dense(2).apply({"params": layer}, maps))
      layer = variables["params"]["Dense_0"]
      return Outputs(nn.Dense(3).apply({"params": layer}, maps.mean((1, 2))), found), {}

    return Network(init=lambda key, maps: {}, apply=apply)

  teacher = Model(Network(init=lambda key, x: TAUGHT, apply=whole), TAUGHT)
  plain = networks.linen(Small(), features=STAGES)
  student = with_variables(plain)
  there = fcfd(TAILS, teacher.variables, warmup_steps=0)
  fitted = small_networks.fit(
    student,
    combine(there, fcfd_back({name: rest(name) for name in STAGES[:2]})),
    data=data.on_device(data.from_arrays(FIRST, LABELS, num_classes=3), batch_size=4, data_seed=0),
    optimizer=optax.adam(1e-2),
    steps=30,
    teacher=teachers.frozen(teacher),
    log_every=1,
    seed=[0, 1],
  )
  first, last = (fitted.history[i] for i in (0, -1))
  assert np.all(np.asarray(last["back"]) < np.asarray(first["back"]))
  own = jax.eval_shape(plain.init, KEY, FIRST)
  one = fitted.instance(0)
  assert jax.tree.structure(one.variables) == jax.tree.structure(own)
  assert one(FIRST).variables is None
