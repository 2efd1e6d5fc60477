"""Methods of two stages: both at once by hand, one stage after the other through two runs."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import small_networks
from jaxdistill import data, recipes, teachers, train
from jaxdistill.types import Model, Outputs, make_batch
from test_losses_features import energy, meet, ref_ab, ref_fsp
from test_projectors import as_float64, convolve
from test_recipes_features import (
  BEFORE,
  KEY,
  NAMES,
  STUDENT_SHAPES,
  TEACHER_SHAPES,
  check,
  connect,
  maps,
  normalise,
  pictures,
  quick,
  shapes,
  steps,
  tiny,
  traced,
)

__all__ = ["quick"]


def by_hand_fsp(params):
  names = ("stem", *NAMES)
  # The stem and the second stage are as wide as the teacher's: no connector.
  assert set(params) == {"connector1", "connector3"}
  pairs = [
    (connect(params[f"connector{i}"], s, relu=True) if i in (1, 3) else s, t)
    for i, (s, t) in enumerate(maps(names, names))
  ]
  return sum(
    ref_fsp((low[0], high[0]), (low[1], high[1])) for low, high in itertools.pairwise(pairs)
  )


def by_hand_boundary(params):
  assert set(params) == {"connector0", "connector2"}
  total = 0
  for i, (ours, theirs) in enumerate(maps(BEFORE, BEFORE)):
    connected = ours if i == 1 else connect(params[f"connector{i}"], ours)
    total = total + 2.0 ** (i - 2) * ref_ab(connected, theirs, 1.0)
  return total


def encode(params, x, *, norm):
  params = as_float64(params)
  for i in (1, 2, 3):
    conv = params[f"conv{i}"]
    x = convolve(x, conv["kernel"], 1, 1) + conv["bias"].reshape(1, 1, 1, -1)
    x = normalise(x, params[f"norm{i}"]) if norm else x
    x = np.where(x < 0, 0.1 * x, x)
  return x


def by_hand_reconstruction(params):
  ((_, theirs),) = maps(("stage3",), ("stage3",))
  factor = encode(params["paraphraser"]["encoder"], theirs, norm=False)
  assert factor.shape[-1] == 2  # half of five
  decoded = encode(params["paraphraser"]["decoder"], factor, norm=False)
  return ((decoded - theirs) ** 2).mean((1, 2, 3))


def by_hand_factor(params):
  ((ours, theirs),) = maps(("stage3",), ("stage3",))
  factor = encode(params["paraphraser"]["encoder"], theirs, norm=False)
  translated, factor = meet(encode(params["translator"], ours, norm=True), factor)
  return np.abs(energy(translated) - energy(factor)).mean(-1)


# name: (both stages at once, terms by hand with the published weight).
RECIPES = {
  "fsp": (recipes.fsp, {"fsp": (by_hand_fsp, 50)}),
  "activation_boundary": (recipes.activation_boundary, {"boundary": (by_hand_boundary, 3e-3)}),
  "factor_transfer": (
    recipes.factor_transfer,
    {"factor": (by_hand_factor, 200), "reconstruction": (by_hand_reconstruction, 1)},
  ),
}


@functools.cache
def ran():
  return steps({name: recipe() for name, (recipe, _) in RECIPES.items()})


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_both_stages_at_once_are_the_formula_and_train(name):
  for term, (by_hand, weight) in RECIPES[name][1].items():
    check(ran(), name, term, by_hand, weight)


# --- One stage after the other. ---


STUDENT, TEACHER = tiny(3), tiny(4)


@functools.cache
def examples():
  inputs, labels = pictures(8)
  return data.from_arrays(inputs[:, ::4, ::4], labels, num_classes=3)


@functools.cache
def taught():
  return jax.jit(TEACHER.init)(KEY, jnp.zeros((1, 2, 2, 2)))


def fit(objective, *, student=None, count=2, **options):
  seeds = options.get("seed", 0)
  one = data.on_device(examples(), batch_size=8, data_seed=0)
  several = [
    data.on_device(examples(), batch_size=8, data_seed=s) for s in np.atleast_1d(seeds).tolist()
  ]
  options.setdefault("optimizer", optax.sign_sgd(1e-2))
  return small_networks.fit(
    STUDENT if student is None else student,
    objective,
    data=one if np.ndim(seeds) == 0 else several,
    steps=count,
    dispatch=train.with_jit(train.data_parallel(jax.devices()[:1])),
    teacher=teachers.frozen(Model(TEACHER, taught())),
    log_every=1,
    **options,
  )


@functools.cache
def untrained():
  return fit(recipes.labels(), count=1, optimizer=optax.sgd(0.0))


def moved(old, new):
  """Which of the student's layers are not what they were, to the bit."""
  differ = jax.tree.map(lambda a, b: not np.array_equal(a, b), old, new)
  return {name for name, layer in differ["params"].items() if any(jax.tree.leaves(layer))}


def entropy(variables):
  """Cross-entropy of the whole set, which is one batch."""
  source = data.on_device(examples(), batch_size=8, data_seed=0)
  item = jax.tree.map(lambda leaf: leaf[0], source.items(0, 1))
  whole = source.cut(source.shared, item)
  outputs = jax.jit(lambda v, x: STUDENT.apply(v, x, train=False, key=None)[0])(
    variables, whole.inputs
  )
  logits = np.asarray(outputs.logits, np.float64)
  return np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(8), np.asarray(whole.labels)])


METHODS = {
  "fitnet": (recipes.hint("stage1", "stage1"), recipes.kd(), "hint"),
  "fsp": (
    recipes.fsp(stage=1, student_layers=("stem", "stage1")),
    recipes.fsp(stage=2),
    "fsp",
  ),
  "activation_boundary": (
    recipes.activation_boundary(stage=1, student_layers=("stage1_preact",)),
    recipes.activation_boundary(stage=2),
    "boundary",
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_second_stage_goes_on_from_the_first(method):
  before, after, term = METHODS[method]
  first = fit(before)
  assert set(first.history[0]) & {"labels", term} == {term}
  assert first.history[-1][term] < first.history[0][term]
  # Nothing above the named layer has a gradient.
  assert moved(untrained().variables, first.variables) == {"Dense_0", "stage1_dense"}
  for connector in first.state.objective_params.values():
    assert np.all(connector["norm"]["bias"] != 0)  # where it started
  second = fit(after, student=first)
  assert second.history[0]["labels"] == pytest.approx(entropy(first.variables), rel=1e-5)  # float32
  assert second.history[-1]["loss"] < second.history[0]["loss"]
  assert moved(first.variables, second.variables) == {"Dense_0", "stage1_dense", "classifier"}
  assert term not in second.history[0]
  # What the first stage trained beside the student is gone.
  assert second.state.objective_params == {}


@pytest.mark.slow
def test_the_paraphraser_is_handed_over_and_frozen():
  before = recipes.factor_transfer(stage=1, student_layer="stage1")
  first = fit(before, seed=(0, 1), student=untrained())
  for line, later in zip(first.history, first.history[1:], strict=False):
    assert np.all(later["reconstruction"] < line["reconstruction"])
  # The student takes no part.
  for one in first.unstack():
    assert moved(untrained().variables, one.variables) == set()
  trained = first.state.objective_params
  assert set(trained) == {"paraphraser"}
  after = recipes.factor_transfer(stage=2, student_layer="stage1")
  second = fit(dataclasses.replace(after, start=({}, trained)), seed=(0, 1))
  assert set(second.state.objective_params) == {"translator"}
  remembered = second.state.objective_state
  assert set(remembered) == {"paraphraser", "translator"}
  jax.tree.map(np.testing.assert_array_equal, remembered["paraphraser"], trained["paraphraser"])
  assert np.any(np.asarray(remembered["translator"]["batch_stats"]["norm1"]["mean"]) != 0)
  assert np.all(second.history[-1]["loss"] < second.history[0]["loss"])
  for line in second.history:
    want = np.asarray(line["labels"]) + 200 * np.asarray(line["factor"])
    np.testing.assert_allclose(line["loss"], want, rtol=1e-5)  # float32
  # Each seed reads the paraphraser of its own.
  kernels = np.asarray(remembered["paraphraser"]["encoder"]["conv1"]["kernel"])
  assert np.all(kernels[0] != kernels[1])


@pytest.mark.slow
def test_a_paraphraser_that_was_not_handed_over_is_noticed_at_once():
  with pytest.raises(FloatingPointError, match="factor"):
    fit(recipes.factor_transfer(stage=2, student_layer="stage1"), count=1)


# --- What needs no compilation. ---


def test_each_stage_has_its_terms_and_keywords():
  layers = {"student_layers": ("a", "b")}
  found = {
    name: [(set(traced(make(stage))), set(make(stage).hyper)) for stage in (1, 2, None)]
    for name, make in {
      "fsp": lambda stage: recipes.fsp(stage=stage, **layers),
      "boundary": lambda stage: recipes.activation_boundary(stage=stage, student_layers=("a",)),
    }.items()
  }
  assert found["fsp"] == [
    ({"fsp"}, {"fsp_weight"}),
    ({"labels"}, {"hard_weight"}),
    ({"fsp", "labels"}, {"fsp_weight", "hard_weight"}),
  ]
  own = {"boundary_weight", "margin"}
  assert found["boundary"] == [
    ({"boundary"}, own),
    ({"labels"}, {"hard_weight"}),
    ({"boundary", "labels"}, {*own, "hard_weight"}),
  ]
  assert recipes.fsp(stage=1).hyper["fsp_weight"] == 1
  assert recipes.fsp(stage=1, fsp_weight=7.0).hyper["fsp_weight"] == 7
  for stage, names in (
    (1, {"reconstruction"}),
    (2, {"labels", "factor"}),
    (None, {"reconstruction", "labels", "factor"}),
  ):
    assert set(traced(recipes.factor_transfer(stage=stage, student_layer="a"))) == names


@pytest.mark.usefixtures("strict_promotion")
def test_strict_promotion():
  for objective in (
    recipes.fsp(student_layers=("a", "b")),
    recipes.activation_boundary(student_layers=("a",)),
    recipes.factor_transfer(student_layer="b"),
    recipes.factor_transfer(student_layer="b", stage=2),
  ):
    for name, term in traced(objective).items():
      assert term.values.shape == (2,), name
      assert term.values.dtype == jnp.float32, name


def test_the_paraphraser_gets_no_gradient_from_the_factor():
  rng = np.random.default_rng(0)
  pixels = jnp.asarray(rng.normal(size=(1, 2, 2, 2)), jnp.float32)
  both = Outputs(jnp.zeros((1, 2)), {"a": pixels})
  one = make_batch(jnp.zeros((1, 1)), jnp.zeros(1, jnp.int32))
  objective = recipes.factor_transfer(student_layer="a")

  def gradient_of(key):
    params, state = objective.init(key, both, both)

    def loss(params):
      return objective.apply(params, state, both, both, one, key=KEY)[0]["factor"].values[0]

    return jax.grad(loss)(params)

  gradient = jax.jit(gradient_of)(KEY)
  assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient["paraphraser"]))
  assert np.any(gradient["translator"]["conv3"]["kernel"] != 0)


def test_equal_shapes_need_no_connector():
  same = shapes(a=(2, 4, 4, 2), b=(2, 2, 2, 4))
  for objective in (
    recipes.fsp(student_layers=("a", "b"), connect=False),
    recipes.activation_boundary(student_layers=("a", "b")),
  ):
    assert objective.init(KEY, same, same) == ({}, {})
    assert "labels" in traced(objective, same, same)


@pytest.mark.parametrize(
  "recipe",
  [
    lambda axis: recipes.fsp(student_layers=("a", "b"), axis_name=axis),
    lambda axis: recipes.activation_boundary(student_layers=("a",), axis_name=axis),
    lambda axis: recipes.factor_transfer(student_layer="a", axis_name=axis),
  ],
)
def test_norms_take_the_mapped_axis(recipe):
  traced(recipe(None))
  with pytest.raises(NameError, match="unbound axis name"):
    traced(recipe("devices"))


def test_connectors_are_fitnets_regressors_but_for_boundaries():
  teacher = shapes(a=(2, 2, 2, 3), b=(2, 3, 3, 4))
  objective = recipes.activation_boundary(stage=1, student_layers=("a",))
  params, _ = jax.eval_shape(objective.init, KEY, STUDENT_SHAPES, teacher)
  assert params["connector0"]["conv"]["kernel"].shape == (3, 3, 2, 3)  # to half the size
  # To a size that no convolution reaches, where the published code has nothing: 1 x 1, resized.
  objective = recipes.activation_boundary(stage=1, student_layers=("b",), teacher_layers=("a",))
  params, _ = jax.eval_shape(objective.init, KEY, shapes(b=(2, 3, 3, 4)), TEACHER_SHAPES)
  assert params["connector0"]["conv"]["kernel"].shape == (1, 1, 4, 3)
  # FSP has no positions to match: the student keeps its own.
  objective = recipes.fsp(stage=1, student_layers=("a", "b"))
  params, _ = jax.eval_shape(objective.init, KEY, STUDENT_SHAPES, teacher)
  assert params.keys() == {"connector0"}
  assert params["connector0"]["conv"]["kernel"].shape == (1, 1, 2, 3)


LAYERS = {"student_layers": ("a", "b")}


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: recipes.fsp(stage=3), "stage=3 must be 1, 2, or None"),
    (lambda: recipes.fsp(student_layers=("a",)), "at least 2"),
    (lambda: recipes.activation_boundary(teacher_layers=("a",)), "equally many"),
    (lambda: recipes.activation_boundary(margin=-1), "margin must be at least 0"),
    (lambda: recipes.activation_boundary(stage_weights=(1,)), "one number for each of the 3"),
    (lambda: recipes.factor_transfer(ratio=0), "ratio must be positive"),
    (
      lambda: traced(recipes.fsp(**LAYERS, connect=False)),
      r"equal widths: the student's 'a' is \(2, 4, 4, 2\) and the teacher's 'a' \(2, 4, 4, 3\)",
    ),
    (lambda: traced(recipes.fsp()), "'stem' is not among the student's features"),
    (lambda: traced(recipes.activation_boundary(student_layers=("v",))), "'v', of shape .* no map"),
    (lambda: traced(recipes.factor_transfer(student_layer="a"), teacher=None), "needs a teacher"),
    (
      lambda: traced(recipes.factor_transfer(student_layer="a", teacher_layer="z")),
      "teacher_layers='z' is not among the teacher's features",
    ),
  ],
)
def test_errors_name_the_argument(make, message):
  with pytest.raises((TypeError, ValueError), match=message):
    make()
