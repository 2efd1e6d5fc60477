"""A method is a function: what the decorator makes of one, and that shipped recipes are such."""

import ast
import functools
import importlib
import inspect
import pydoc
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdistill
from jaxdistill import losses, recipes, search
from jaxdistill.recipes import recipe
from jaxdistill.recipes.parts import init_modules
from jaxdistill.search import _grid
from jaxdistill.types import Objective, Outputs, Term, as_objective
from test_recipes_labels import BATCH, GIVEN, OF_ALL, OTHER_LABELS, STUDENT, TEACHER

KEY = jax.random.key(0)
# Those that learn nothing of their own.
FUNCTIONS = [name for name in OF_ALL if hasattr(getattr(recipes, name), "function")]


@recipe
def mine(student, teacher, batch, *, key, temperature=4, soft_weight=0.5, layer=None, on=True):
  """A user's own."""
  assert key is not None
  values = losses.soft_target_kl(student.logits, teacher.logits, temperature=temperature)
  return {"soft": Term(values, weight=soft_weight if on else 0.0), "none": Term(None, weight=layer)}


def applied(objective, student=STUDENT, teacher=TEACHER, batch=BATCH, **hyper):
  hyper = {n: v(0) for n, v in objective.hyper.items() if callable(v)} | hyper
  return objective.apply({}, {}, student, teacher, batch, key=jax.random.key(0), **hyper)[0]


def test_recipes_that_learn_nothing_are_functions():
  assert len(FUNCTIONS) == 28
  assert {"labels", "kd", "dkd", "attention_transfer", "pkt"} < set(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_copied_body_is_the_method(name):
  """Its source, in a file that imports what is public and nothing else."""
  shipped = getattr(recipes, name)
  home = importlib.import_module(shipped.__module__)
  tree = ast.parse(textwrap.dedent(inspect.getsource(shipped.function)))
  (function,) = tree.body
  function.decorator_list = []
  used = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
  there = {n: getattr(home, n) for n in used if hasattr(home, n)}
  assert not [n for n in there if n.startswith("_")]
  copied = {"__name__": "users_own", **there}
  exec(compile(ast.fix_missing_locations(tree), "own.py", "exec"), copied)
  own = copied[name]

  given = GIVEN.get(name, {})
  batch = BATCH.replace(labels=OTHER_LABELS.get(name, BATCH.labels))
  defaults = {n: p.default for n, p in inspect.signature(shipped).parameters.items()}

  def both(student, teacher):
    bare = as_objective(functools.partial(own, **given))
    objective = shipped(**given)
    # A schedule's place is taken by what the function has for it.
    full = {n: defaults[n] for n, value in objective.hyper.items() if callable(value)}
    terms = bare.apply({}, {}, student, teacher, batch, key=None)[0]
    return terms, applied(objective, student, teacher, batch, **full)

  pair = STUDENT, TEACHER
  if name == "gaussian_regression":  # a mean and a variance
    pair = [outputs.replace(logits=outputs.logits[:, :2]) for outputs in pair]
  bare, promoted = jax.jit(both)(*pair)
  assert bare.keys() == promoted.keys()
  for got, want in zip(bare.values(), promoted.values(), strict=True):
    np.testing.assert_array_equal(got.values, want.values)
    assert got.axis == want.axis
    assert got.weight == want.weight


@pytest.mark.parametrize("name", OF_ALL)
def test_every_keyword_is_told(name):
  shipped = getattr(recipes, name)
  keywords = inspect.signature(shipped).parameters
  assert "student" not in keywords
  arguments = inspect.getdoc(shipped).split("Args:")[1]
  assert [k for k in keywords if f"\n  {k}: " not in arguments] == []
  assert "temperature: " in pydoc.render_doc(recipes.kd, renderer=pydoc.plaintext).splitlines()[2]


def test_a_call_gives_the_objective_with_these_defaults():
  assert inspect.signature(mine).return_annotation is Objective
  assert list(inspect.signature(mine).parameters) == ["temperature", "soft_weight", "layer", "on"]
  assert isinstance(mine(), Objective)
  assert mine().hyper == {"temperature": 4, "soft_weight": 0.5}
  # A number in place of None is a keyword; a switch and a text are not.
  assert mine(layer=2.0, on=False).hyper == {"temperature": 4, "soft_weight": 0.5, "layer": 2.0}
  falling = lambda step: 1.0 - step  # noqa: E731
  assert mine(soft_weight=falling).hyper["soft_weight"] is falling
  assert set(applied(mine())) == {"soft"}
  assert set(applied(mine(layer=1.0))) == {"soft", "none"}
  assert applied(mine(soft_weight=0.25))["soft"].weight == 0.25
  assert applied(mine(soft_weight=0.25), soft_weight=0.75)["soft"].weight == 0.75
  assert applied(mine(on=False))["soft"].weight == 0
  # Without an annotation nothing forbids None, which leaves a term out.
  assert applied(mine(soft_weight=None)) == {}


def test_what_a_recipe_does_not_take_is_refused():
  with pytest.raises(TypeError, match=r"kd has no keywords \['tau'\]; it has \['hard_weight', "):
    recipes.kd(tau=2.0)
  with pytest.raises(TypeError, match="the method itself is kd.function"):
    recipes.kd(STUDENT, TEACHER, BATCH)
  for value, kind in ((None, TypeError), ("4", TypeError), (jnp.ones(2), ValueError)):
    with pytest.raises(kind, match="soft_weight must be at least 0: one number"):
      recipes.kd(soft_weight=value)
  with pytest.raises(TypeError, match="hard_weight must be at least 0: one number, got None"):
    recipes.labels(hard_weight=None)
  with pytest.raises(ValueError, match="temperature must be positive, got -1"):
    applied(mine(), temperature=-1)
  with pytest.raises(TypeError, match=r"loss must be a function \(student_logits, teacher_logits"):
    recipes.kd_standardized(loss=lambda logits: logits)


def test_a_bare_function_that_reads_no_teacher_says_so():
  def method(student, teacher, batch):
    return {"soft": Term(losses.soft_target_kl(student.logits, teacher.logits))}

  with pytest.raises(ValueError, match="method compares with a teacher, and teacher is None"):
    applied(as_objective(method), teacher=None)
  with pytest.raises(AttributeError, match="nothing"):
    applied(as_objective(lambda student, teacher, batch: student.nothing), teacher=None)


def test_a_sweep_tells_a_recipe_from_a_method():
  points = search.product(temperature=[1.0, 2.0], standardize=[False, True])
  network = jaxdistill.networks.linen(jaxdistill.networks.models.MLP())
  groups = _grid.grouped(points, network, recipes.dkd, None, 4)
  assert [group.fixed for group in groups] == [{"standardize": False}, {"standardize": True}]
  assert [group.hyper["temperature"].tolist() for group in groups] == [[1, 2]] * 2
  without = [{"hard_weight": None}, {"hard_weight": 0.5}]
  groups = _grid.grouped(without, network, recipes.kd, None, 4)
  assert ["hard_weight" in group.objective.hyper for group in groups] == [False, True]
  (one,) = _grid.grouped([{"temperature": 2.0}], network, recipes.kd.function, None, 4)
  assert one.hyper["temperature"].tolist() == [2]
  with pytest.raises(TypeError, match=r"Call a recipe, recipes\.kd\(\)"):
    as_objective(recipes.kd)


def test_outputs_without_logits_need_no_labels_term():
  embedded = Outputs(features={"pooled": STUDENT.features["pooled"]})
  objective = recipes.pkt(hard_weight=None)
  terms = jax.eval_shape(lambda: applied(objective, embedded, embedded))
  assert set(terms) == {"pkt"}


def test_parts_of_a_sum_draw_and_begin_each_for_itself():
  def draws(name):
    def objective(student, teacher, batch, *, key):
      return {name: Term(jax.random.uniform(key, (2,)))}

    return objective

  both = recipes.combine(draws("one"), draws("two"))
  terms, _ = both.apply(
    *both.init(jax.random.key(0), STUDENT, TEACHER), STUDENT, TEACHER, BATCH, key=KEY
  )
  assert not np.any(np.asarray(terms["one"].values) == np.asarray(terms["two"].values))
  wider = Outputs(features={"mid": jnp.ones((2, 5))})
  hints = [recipes.hint("mid", "mid", name=name) for name in ("one", "two")]
  params, _ = recipes.combine(*hints).init(KEY, Outputs(features={"mid": jnp.ones((2, 4))}), wider)
  kernels = [np.asarray(params[i]["projector"]["dense"]["kernel"]) for i in ("0", "1")]
  assert not np.any(kernels[0] == kernels[1])


def test_modules_of_one_shape_begin_apart():
  given = jnp.ones((2, 4))
  modules = {name: (recipes.projectors.Linear(3), given) for name in ("one", "two")}
  params, _ = init_modules(KEY, modules)
  kernels = [np.asarray(params[name]["dense"]["kernel"]) for name in modules]
  assert not np.any(kernels[0] == kernels[1])
