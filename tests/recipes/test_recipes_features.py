"""Recipes that match layers: their losses by hand, what they train, what they refuse."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import small_networks
from jaxdistill import data, networks, recipes, teachers, train
from jaxdistill.train import init_state, make_step
from jaxdistill.types import Model, Objective, Outputs, as_objective, make_batch
from test_losses_features import energy, meet, ref_hcl, ref_nst, ref_ofd, ref_vid
from test_projectors import as_float64, fuse, normalise

# A generator that compiles in a fraction of the time of the default one.
GENERATOR = "unsafe_rbg"
KEY = jax.random.key(0, impl=GENERATOR)
NAMES = ("stage1", "stage2", "stage3")
BEFORE = tuple(f"{name}_preact" for name in NAMES)


@pytest.fixture(autouse=True)
def quick():
  with jax.default_prng_impl(GENERATOR):
    yield


class Staged(nn.Module):
  """The layers of a ResNet under a ResNet's names, without what makes it slow to compile."""

  widths: tuple[int, ...]
  norm: bool = True

  @nn.compact
  def __call__(self, x, *, train: bool = False):
    x = nn.relu(nn.Dense(self.widths[0])(x))
    self.sow("intermediates", "stem", x)
    for i, width in enumerate(self.widths[1:], start=1):
      if i > 1:
        batch, height, wide, channels = x.shape
        x = x.reshape(batch, height // 2, 2, wide // 2, 2, channels).mean((2, 4))
      x = nn.Dense(width, name=f"stage{i}_dense")(x)
      if self.norm:
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"stage{i}_norm")(x)
      self.sow("intermediates", f"stage{i}_preact", x)
      x = nn.relu(x)
      self.sow("intermediates", f"stage{i}", x)
    x = x.mean((1, 2))
    self.sow("intermediates", "pooled", x)
    return nn.Dense(3, name="classifier")(x)


def staged(*widths):
  return networks.linen(Staged(widths), features=["stem", *NAMES, *BEFORE, "pooled"])


def tiny(width):
  """One stage without a norm."""
  names = ["stem", "stage1_preact", "stage1", "pooled"]
  return networks.linen(Staged((2, width), norm=False), features=names)


# Two of the widths are the same in both, so that there are connectors and places without one.
STUDENT, WIDE = staged(3, 2, 4, 3), staged(3, 4, 4, 5)


def pictures(size, seed=0):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, 3, size).astype(np.int32)
  inputs = 0.5 * rng.normal(size=(size, 8, 8, 2)) + np.eye(3, 2)[labels][:, None, None]
  return inputs.astype(np.float32), labels


@functools.cache
def batch():
  """Sixteen examples; a quarter of them have no label."""
  inputs, labels = pictures(16)
  known = (np.arange(16) % 4 > 0).astype(np.float32)
  labels = np.where(known, labels, 0).astype(np.int32)
  return make_batch(jnp.asarray(inputs), jnp.asarray(labels), labelled=jnp.asarray(known))


@functools.cache
def teacher():
  """A teacher whose BatchNorms are not the neutral ones."""
  variables = jax.jit(WIDE.init)(jax.random.key(7, impl=GENERATOR), batch().inputs)
  rng = np.random.default_rng(1)
  move = lambda leaf: leaf + jnp.asarray(0.2 * rng.random(leaf.shape), leaf.dtype)  # noqa: E731
  return teachers.frozen(Model(WIDE, jax.tree.map(move, variables)))


@functools.cache
def outputs():
  """What both networks put out before the first step of `steps`, in float64."""

  def both(params, state):
    ours = STUDENT.apply({"params": params, **state}, batch().inputs, train=True, key=KEY)[0]
    return ours, teacher()(batch())

  (state,) = BEGUN
  return as_float64(jax.jit(both)(state.params, state.model_state))


# The first state of `steps`, which is called once in a file.
BEGUN = []
# Every parameter moves by as much, whatever the weights; and it compiles quickly.
OPTIMIZER = optax.sign_sgd(1e-3)


def initial(objective):
  def make(key, example, teacher):
    return init_state(key, STUDENT, objective, OPTIMIZER, example, teacher=teacher)

  return jax.jit(make)(KEY, batch(), teacher())


class Side:
  """Several recipes in one program, each with terms, parameters and state of its own.

  Their compilation is most of what these tests cost, and the two networks are most of that.
  """

  def __init__(self, parts):
    self.parts = {name: as_objective(part) for name, part in parts.items()}
    self.weights = {}

  def init(self, key, student, teacher):
    made = {name: part.init(key, student, teacher) for name, part in self.parts.items()}
    return {n: params for n, (params, _) in made.items()}, {n: s for n, (_, s) in made.items()}

  def apply(self, params, state, student, teacher, batch, *, key):
    terms, states = {}, {}
    for name, part in self.parts.items():
      found, states[name] = part.apply(params[name], state[name], student, teacher, batch, key=key)
      for term, value in found.items():
        terms[f"{name}/{term}"] = value
        self.weights[f"{name}/{term}"] = value.weight
    return terms, states


def steps(parts, count=4):
  """Steps on one batch over two devices: the first state, the last one, terms and weights."""
  devices = train.data_parallel(jax.devices()[:2])
  rows = NamedSharding(devices, PartitionSpec(devices.axis_names[0]))
  everywhere = NamedSharding(devices, PartitionSpec())
  side = Side(parts)
  objective = Objective(init=side.init, apply=side.apply)
  begun = initial(objective)
  BEGUN[:] = [begun]
  state, taught = jax.device_put((begun, teacher()), everywhere)
  shared = jax.device_put(batch(), rows)
  step = jax.jit(make_step(STUDENT, objective, OPTIMIZER))
  lines = []
  for _ in range(count):
    state, sums = step(state, taught, shared)
    lines.append({name: float(total / count) for name, (total, count) in sums.items()})
  return begun, state, lines, side.weights


def cross_entropy():
  """Mean over the rows that have a label."""
  logits, labels = outputs()[0].logits, np.asarray(batch().labels)
  values = np.log(np.exp(logits).sum(1)) - logits[np.arange(16), labels]
  return values[np.asarray(batch().labelled) > 0].mean()


def maps(ours=NAMES, theirs=NAMES):
  student, teacher = (o.features for o in outputs())
  return [(student[s], teacher[t]) for s, t in zip(ours, theirs, strict=True)]


def connect(params, x, *, relu=False):
  """A 1 x 1 convolution and BatchNorm in training."""
  params = as_float64(params)
  bias = params["conv"].get("bias", np.zeros(1)).reshape(1, 1, 1, -1)
  y = normalise(x @ params["conv"]["kernel"][0, 0] + bias, params["norm"])
  return np.maximum(y, 0) if relu else y


def by_hand_attention(params):
  return sum(((energy(meet(s, t)[0]) - energy(meet(s, t)[1])) ** 2).mean(-1) for s, t in maps())


def by_hand_nst(params):
  return sum(ref_nst(s, t) for s, t in maps())


def by_hand_vid(params):
  total = 0
  for i, (mean, target) in enumerate(maps()):
    mine = as_float64(params[f"mean{i}"])
    # σ² = 5 at the start.
    np.testing.assert_allclose(np.log1p(np.exp(mine["raw_variance"])) + 1e-5, 5, rtol=1e-6)
    for name in ("conv1", "conv2", "conv3"):
      mean = (np.maximum(mean, 0) if name != "conv1" else mean) @ mine[name]["kernel"]
    total = total + ref_vid(mean, target, mine["raw_variance"])
  return total


@functools.cache
def margins():
  return recipes.overhaul_margins(teacher().variables, [f"{name}_norm" for name in NAMES])


def by_hand_overhaul(params):
  total = 0
  for i, (ours, theirs) in enumerate(maps(BEFORE, BEFORE)):
    connected = connect(params[f"connector{i}"], ours)
    total = total + 2.0 ** (i - 2) * ref_ofd(connected, theirs, np.asarray(margins()[i]))
  return total


def by_hand_review(params):
  layers = ((*NAMES, "pooled"), (*BEFORE, "pooled"))
  pairs = [tuple(f if f.ndim == 4 else f[:, None, None] for f in pair) for pair in maps(*layers)]
  total, residual = 0, None
  for i in (3, 2, 1, 0):
    ours, theirs = pairs[i]
    fused, residual = fuse(params[f"fusion{i}"], ours, residual, theirs.shape[1:3])
    total = total + ref_hcl(fused, theirs)
  return total


# name: (the recipe with its defaults, its term by hand, the published weight).
RECIPES = {
  "attention": (recipes.attention_transfer, by_hand_attention, 1000),
  "nst": (recipes.nst, by_hand_nst, 50),
  "vid": (recipes.vid, by_hand_vid, 1),
  "overhaul": (lambda: recipes.overhaul(margins=margins()), by_hand_overhaul, 1e-3),
  "review": (lambda: recipes.reviewkd(warmup_steps=0), by_hand_review, 5),
}


@functools.cache
def ran():
  return steps({name: recipe() for name, (recipe, _, _) in RECIPES.items()})


def check(run, name, term, by_hand, weight, *, hard_weight=1):
  """One recipe's first line by hand, what it learns and remembers, and that its loss falls."""
  begun, ended, lines, weights = run
  params = begun.objective_params[name], ended.objective_params[name]
  values = [line[f"{name}/{term}"] for line in lines]
  # float32 sums over maps of size 1, 1e-6 of each; BatchNorm divides by deviations down to 0.1.
  assert values[0] == pytest.approx(by_hand(params[0]).mean(), rel=1e-4)
  assert weights[f"{name}/{term}"] == weight
  total = [weight * value for value in values]
  if hard_weight:
    assert lines[0][f"{name}/labels"] == pytest.approx(cross_entropy(), rel=1e-4)
    assert weights[f"{name}/labels"] == hard_weight
    total = [t + line[f"{name}/labels"] for t, line in zip(total, lines, strict=True)]
  assert np.all(np.isfinite(values))
  assert total[-1] < total[0]
  assert values[-1] < values[0]
  remembered = begun.objective_state[name], ended.objective_state[name]
  for old, new in (params, remembered):
    moved = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))), old, new)
    for path, leaf in jax.tree_util.tree_leaves_with_path(moved):
      # A bias in front of a BatchNorm has no gradient.
      assert leaf or path[-1].key == "bias", path


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_its_formula_and_trains(name):
  _, by_hand, weight = RECIPES[name]
  check(ran(), name, name, by_hand, weight)
  learned = {"vid": "mean", "overhaul": "connector", "review": "fusion"}.get(name)
  count = 0 if learned is None else (4 if name == "review" else 3)
  begun = ran()[0]
  assert set(begun.objective_params[name]) == {f"{learned}{i}" for i in range(count)}
  remembers = set() if name == "vid" else set(begun.objective_params[name])
  assert set(begun.objective_state[name]) == remembers


def test_the_loss_is_all_terms_with_their_weights():
  _, _, lines, weights = ran()
  total = sum(lines[0][name] * weight for name, weight in weights.items())
  assert lines[0]["loss"] == pytest.approx(total, rel=1e-5)  # float32


@pytest.mark.slow
def test_the_review_warms_up_in_a_run_over_seeds():
  inputs, labels = pictures(24)
  examples = data.from_arrays(inputs[:, ::4, ::4], labels, num_classes=3)
  student, wide = tiny(3), tiny(4)
  objective = recipes.reviewkd(
    student_layers=("stage1", "pooled"), teacher_layers=("stage1_preact", "pooled"), warmup_steps=4
  )
  fitted = small_networks.fit(
    student,
    objective,
    data=[data.on_device(examples, batch_size=8, data_seed=i) for i in range(2)],
    optimizer=OPTIMIZER,
    steps=6,
    seed=(0, 1),
    teacher=teachers.frozen(Model(wide, jax.jit(wide.init)(KEY, inputs[:1, ::4, ::4]))),
    log_every=1,
  )
  assert [line["review_warmup"] for line in fitted.history] == [0, 0.25, 0.5, 0.75, 1, 1]
  for line in fitted.history:
    for i in range(2):
      want = line["labels"][i] + 5 * line["review_warmup"] * line["review"][i]
      assert line["loss"][i] == pytest.approx(want, rel=1e-5)  # float32
  kernels = fitted.state.objective_params["fusion0"]["conv1"]["kernel"]
  assert kernels.shape == (2, 3, 3)
  assert np.all(kernels[0] != kernels[1])
  # Nothing of the fusions is deployed.
  assert fitted.variables["params"].keys() == {"Dense_0", "stage1_dense", "classifier"}


def test_warm_up_steps():
  warmup = recipes.reviewkd().hyper["review_warmup"]
  assert [float(warmup(step)) for step in (0, 7810, 15620, 10**6)] == [0, 0.5, 1, 1]
  assert recipes.reviewkd(warmup_steps=0).hyper["review_warmup"] == 1


def shapes(**sizes):
  return Outputs(
    logits=jax.ShapeDtypeStruct((2, 3), jnp.float32),
    features={name: jax.ShapeDtypeStruct(size, jnp.float32) for name, size in sizes.items()},
  )


STUDENT_SHAPES = shapes(a=(2, 4, 4, 2), b=(2, 2, 2, 4), v=(2, 4), t=(2, 3, 4))
TEACHER_SHAPES = shapes(a=(2, 4, 4, 3), b=(2, 3, 3, 4), v=(2, 5), t=(2, 3, 4))


def traced(objective, student=STUDENT_SHAPES, teacher=TEACHER_SHAPES, **keywords):
  """Terms of an objective by abstract evaluation alone; bare ones too."""
  objective = as_objective(objective)
  whole = make_batch(jnp.zeros((2, 1)), jnp.zeros(2, jnp.int32))

  def run(student, teacher):
    params, state = objective.init(KEY, student, teacher)
    return objective.apply(params, state, student, teacher, whole, key=KEY, **keywords)

  return jax.eval_shape(run, student, teacher)[0]


@pytest.mark.usefixtures("strict_promotion")
def test_strict_promotion():
  def cast(tree, dtype):
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), tree)

  bare = (
    recipes.attention_transfer(student_layers=("a", "b")),
    recipes.nst(student_layers=("a", "b")),
  )
  learned = (
    recipes.vid(student_layers=("a", "v", "b")),
    recipes.overhaul(margins=[jnp.zeros(3)], student_layers=("a",)),
    recipes.reviewkd(student_layers=("a", "b", "v"), teacher_layers=None),
  )
  # Flax's layers promote bfloat16 features and float32 parameters implicitly.
  for objective, dtype in [(o, jnp.float32) for o in bare + learned] + [
    (o, jnp.bfloat16) for o in bare
  ]:
    terms = traced(objective, cast(STUDENT_SHAPES, dtype), cast(TEACHER_SHAPES, dtype))
    for name, term in terms.items():
      assert term.values.shape == (2,), name
      assert term.values.dtype == jnp.float32, name


def test_apply_without_a_step_is_warmed_up_and_weights_are_keywords():
  """Traced weights are not seen from outside, so they are looked at while it is traced."""
  seen = []
  side = Side({"review": recipes.reviewkd(student_layers=("a", "v"), teacher_layers=None)})
  for keywords in ({}, {"review_warmup": 0.5, "review_weight": 2.0}):
    part = side.parts["review"]

    def apply(*args, part=part, keywords=keywords, **others):
      terms, state = part.apply(*args, **others, **keywords)
      seen.append(terms["review"].weight)
      return terms, state

    traced(Objective(init=part.init, apply=apply))
  assert seen == [5, 1]
  attention = recipes.attention_transfer(student_layers=("a",))
  assert as_objective(attention).hyper == {"attention_weight": 1000, "hard_weight": 1}


def test_the_widest_fusion():
  objective = recipes.reviewkd(student_layers=("a", "v"), teacher_layers=None, max_mid=3)
  params, _ = jax.eval_shape(objective.init, KEY, STUDENT_SHAPES, TEACHER_SHAPES)
  assert params["fusion0"]["conv1"]["kernel"].shape == (2, 3)
  assert params["fusion1"]["conv1"]["kernel"].shape == (4, 3)


@pytest.mark.parametrize(
  "recipe",
  [
    lambda axis: recipes.overhaul(margins=[jnp.zeros(3)], student_layers=("a",), axis_name=axis),
    lambda axis: recipes.reviewkd(student_layers=("a", "v"), teacher_layers=None, axis_name=axis),
  ],
)
def test_norms_take_the_mapped_axis(recipe):
  traced(recipe(None))
  with pytest.raises(NameError, match="unbound axis name"):
    traced(recipe("devices"))


def test_margins_are_found_by_path():
  norms = {"params": {"block": {"norm": {"scale": jnp.array([1.0]), "bias": jnp.array([0.0])}}}}
  for path in ("block/norm", "params/block/norm"):
    (margin,) = recipes.overhaul_margins({**norms, "batch_stats": {}}, [path])
    # E[x | x < 0] of x ~ N(0, 1) is -√(2/π).
    assert margin.tolist() == pytest.approx([-math.sqrt(2 / math.pi)], rel=1e-6)
  with pytest.raises(ValueError, match=r"norms names 'norm'.*it has them at \['block/norm'\]"):
    recipes.overhaul_margins(norms, ["norm"])
  stacked = jax.tree.map(lambda leaf: leaf[None], norms)
  with pytest.raises(ValueError, match=r"fitted\.unstack"):
    recipes.overhaul_margins(stacked, ["block/norm"])


def test_weights_of_stages_can_be_given():
  layers = {"margins": [jnp.zeros(3), jnp.zeros(4)], "student_layers": ("a", "b")}
  assert set(traced(recipes.overhaul(**layers, stage_weights=(1, 0)))) == {"labels", "overhaul"}
  with pytest.raises(
    ValueError, match=r"stage_weights=\(1,\) must be one number for each of the 2"
  ):
    recipes.overhaul(**layers, stage_weights=(1,))


MISSING = ("stage7",)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: recipes.attention_transfer(student_layers="stage1"), "'stage1' must be a sequence"),
    (lambda: recipes.nst(student_layers=()), "at least 1"),
    (lambda: recipes.vid(teacher_layers=("a",)), "must be equally many"),
    (lambda: recipes.vid(init_variance=0), "init_variance must be above 1e-05"),
    (lambda: recipes.nst(nst_weight=-1), "nst_weight must be at least 0"),
    (lambda: recipes.overhaul(margins=[jnp.zeros(3)]), "margins has 1 entries for 3 layers"),
    (lambda: recipes.reviewkd(warmup_steps=-1), "warmup_steps=-1 must be at least 0"),
    (lambda: recipes.reviewkd(max_mid=0), "max_mid=0 must be at least 1"),
    (lambda: traced(recipes.attention_transfer(student_layers=MISSING)), "'stage7' is not among"),
    (lambda: traced(recipes.attention_transfer(student_layers=("v",))), "'v', of shape .*no map"),
    (lambda: traced(recipes.nst(student_layers=("a",), teacher_layers=MISSING)), "teacher_layers"),
    (lambda: traced(recipes.nst(student_layers=("a",)), teacher=None), "needs a teacher"),
    (lambda: traced(recipes.vid(student_layers=MISSING)), "'stage7' is not among the"),
    (lambda: traced(recipes.vid(student_layers=("a",), teacher_layers=("v",))), "must both be"),
    (
      lambda: traced(recipes.overhaul(margins=[jnp.zeros(2)], student_layers=("a",))),
      r"margins\[0\] has the shape \(2,\) and the teacher's 'a' \(2, 4, 4, 3\)",
    ),
    (
      lambda: traced(recipes.reviewkd(student_layers=("t",), teacher_layers=None)),
      r"'t' has the shape \(2, 3, 4\)",
    ),
    (lambda: traced(recipes.reviewkd()), "'stage1' is not among the student's features"),
    (
      lambda: traced(recipes.vid(student_layers=("a",)), vid_weight=-2.0),
      "vid_weight must be at least 0",
    ),
  ],
)
def test_errors_name_the_argument(make, message):
  with pytest.raises((TypeError, ValueError), match=message):
    make()
