"""Every recipe with a term on the labels can leave it out, to be one part of a sum."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import recipes
from jaxdistill.types import Network, Outputs, as_objective, make_batch

LABELS = np.array([0, 1, 2, 0])
BATCH = make_batch(jnp.zeros((4, 1)), jnp.asarray(LABELS), labelled=jnp.array([1.0, 1, 0, 1]))
# The rest of a network whose stages change nothing and whose logits are the mean of its map.
REST = Network(
  init=lambda key, x: {},
  apply=lambda variables, x, **_: (
    Outputs(x.mean((1, 2)), dict.fromkeys(("stage2", "stage3"), x)),
    {},
  ),
)
# What a recipe cannot be made without.
GIVEN = {
  "crd": {"labels": LABELS, "negatives": 2, "width": 4},
  "fcfd": {"tails": {"stage1": REST, "stage2": REST}, "variables": {}},
  "norm_direction": {"means": np.ones((3, 3))},
  "overhaul": {"margins": [np.zeros(3, np.float32)] * 3},
  "sdd": {"student_layer": "stage3", "teacher_layer": "stage3"},
  "simkd": {"classifier": {"kernel": jnp.ones((3, 3))}},
  "srrl": {"classifier": {"kernel": jnp.ones((3, 3))}},
}
# Labels that are no classes: on or off, numbers, and one number of a mean and a variance.
OTHER_LABELS = {
  "multi_label": np.eye(3)[LABELS],
  "regression": np.ones((4, 3)),
  "teacher_bounded": np.ones((4, 3)),
  "gaussian_regression": np.ones(4),
}
PARTS = ("combine", "fold_many_to_one", "hint", "overhaul_margins", "recipe")
PARTS += ("with_class_maps", "with_generator", "with_many_to_one", "with_views")
PARTS += ("fcfd_back", "with_variables")  # what is added to `fcfd`, which has the labels
PARTS += ("dafl",)  # without data there are no labels either
PARTS += ("affinity",)  # of two towers, without logits or labels
PARTS += ("dml", "each")  # what takes a cohort (`test_online.py`)
OF_ALL = [name for name in recipes.__all__ if name not in PARTS]
RECIPES = [name for name in OF_ALL if name != "labels"]


def outputs(seed):
  rng = np.random.default_rng(seed)
  maps = jnp.asarray(rng.normal(size=(4, 2, 2, 3)), jnp.float32)
  stages = ["stem", "class_maps", *(f"stage{i}{end}" for i in (1, 2, 3) for end in ("", "_preact"))]
  features = dict.fromkeys([*stages, "many_to_one"], maps) | {"pooled": maps.mean((1, 2))}
  weak, strong = (jnp.asarray(rng.normal(size=(4, 3)), jnp.float32) for _ in range(2))
  return Outputs(weak, {**features, "strong/logits": strong})


STUDENT, TEACHER = outputs(0), outputs(1)


def terms_of(objective, name=None, **hyper):
  """The terms' shapes, with every schedule's last value."""
  hyper |= {name: value(10**9) for name, value in objective.hyper.items() if callable(value)}
  batch = BATCH.replace(labels=OTHER_LABELS.get(name, BATCH.labels))
  both = [
    outputs.replace(logits=outputs.logits[:, :2]) if name == "gaussian_regression" else outputs
    for outputs in (STUDENT, TEACHER)
  ]

  def apply(key):
    params, state = objective.init(key, *both)
    return objective.apply(params, state, *both, batch, key=key, **hyper)[0]

  return jax.eval_shape(apply, jax.random.key(0))


@pytest.mark.parametrize("name", RECIPES)
def test_without_a_weight_there_is_no_such_term(name, strict_promotion):
  recipe, given = getattr(recipes, name), GIVEN.get(name, {})
  both = as_objective(recipe(**given))
  alone = as_objective(recipe(**given, hard_weight=None))
  assert {n: v for n, v in both.hyper.items() if n != "hard_weight" and not callable(v)} == {
    n: v for n, v in alone.hyper.items() if not callable(v)
  }
  assert both.hyper["hard_weight"] == inspect.signature(recipe).parameters["hard_weight"].default
  assert "hard_weight" not in alone.hyper
  assert set(terms_of(both, name)) == {*terms_of(alone, name), "labels"}
  assert terms_of(both, name)["labels"].where is not None


@pytest.mark.parametrize("name", RECIPES)
def test_a_weight_below_0_is_refused(name):
  recipe, given = getattr(recipes, name), GIVEN.get(name, {})
  with pytest.raises(ValueError, match="hard_weight must be at least 0, got -1"):
    recipe(**given, hard_weight=-1.0)


@pytest.mark.parametrize("name", ["kd", "pkt", "vid"])
def test_the_term_is_the_mean_over_what_is_labelled(name):
  objective = as_objective(getattr(recipes, name)())
  params, state = objective.init(jax.random.key(0), STUDENT, TEACHER)
  given = {"key": None, "hard_weight": 0.5}
  terms, _ = objective.apply(params, state, STUDENT, TEACHER, BATCH, **given)
  logits = np.asarray(STUDENT.logits, np.float64)
  hard = np.log(np.exp(logits).sum(1)) - logits[np.arange(4), LABELS]
  np.testing.assert_allclose(terms["labels"].values, hard, rtol=1e-5)  # float32
  assert terms["labels"].weight == 0.5
  np.testing.assert_array_equal(terms["labels"].where, BATCH.labelled)


def test_a_sum_needs_the_term_once():
  twice = recipes.combine(recipes.kd(), recipes.crd(**GIVEN["crd"]))
  with pytest.raises(ValueError, match=r"name a term \['labels'\]: leave .* hard_weight=None"):
    terms_of(twice)
  once = recipes.combine(recipes.kd(), recipes.crd(**GIVEN["crd"], hard_weight=None))
  assert set(terms_of(once)) == {"labels", "soft", "crd"}
  assert once.hyper["hard_weight"] == 0.1


@pytest.mark.parametrize("name", ["fsp", "activation_boundary"])
def test_a_second_stage_is_the_labels_alone(name):
  with pytest.raises(ValueError, match="hard_weight=None leaves nothing: stage=2 is the labels"):
    getattr(recipes, name)(stage=2, hard_weight=None)
