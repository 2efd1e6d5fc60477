"""optax's protocols against optax itself: what a loop by hand hands over, evaluates and freezes."""

import functools
import shutil
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import small_networks
from jaxdistill import data, evaluation, export, losses, networks, recipes, teachers, train
from jaxdistill.train import deployed_variables, init_state, make_step
from jaxdistill.types import Model, make_batch

STEPS = 5


def batch_of(size=8, seed=0):
  rng = np.random.default_rng(seed)
  labels = jnp.asarray(rng.integers(0, 3, size), jnp.int32)
  return make_batch(jnp.asarray(rng.normal(size=(size, 4)), jnp.float32), labels)


BATCH = batch_of()
BATCHES = jax.tree.map(lambda leaf: leaf[None], BATCH)


def source(data_seed=0):
  rows = np.asarray(BATCH.inputs), np.asarray(BATCH.labels)
  return data.on_device(data.from_arrays(*rows, num_classes=3), batch_size=4, data_seed=data_seed)


def network(**fields):
  return small_networks.dense(5, **fields)


def trained(optimizer, *, steps=STEPS, objective=None, student=None, teacher=None, **options):
  """Every state from the first on, and each step's loss."""
  student, objective = student or network(), objective or recipes.labels()
  given = {"teacher": teacher, "average": options.get("average") is not None}
  begin = lambda key: init_state(key, student, objective, optimizer, BATCH, **given)  # noqa: E731
  state = jax.jit(begin)(jax.random.key(0))
  step, states, values = jax.jit(make_step(student, objective, optimizer, **options)), [state], []
  for _ in range(steps):
    state, sums = step(state, teacher, BATCH)
    states.append(state)
    values.append(float(sums["loss"][0]))
  return states, values


def loss_by_hand(params):
  outputs, _ = network().apply({"params": params}, BATCH.inputs, train=True, key=jax.random.key(0))
  return jnp.mean(losses.cross_entropy(outputs.logits, BATCH.labels))


def by_hand(optimizer, params, *, fast=lambda params: params, **extra):
  """The loop of optax's own documentation."""

  @jax.jit
  def step(params, state):
    value, grad = jax.value_and_grad(loss_by_hand)(fast(params))
    offered = {"value": value, "grad": grad, "value_fn": loss_by_hand}
    given = {name: offered[name] for name in extra}
    updates, state = optimizer.update(grad, state, params, **given)
    return optax.apply_updates(params, updates), state

  state, seen = jax.jit(optimizer.init)(params), [params]
  for _ in range(STEPS):
    params, state = step(params, state)
    seen.append(params)
  return seen, state


def assert_close(actual, wanted, tolerance=2e-6):
  jax.tree.map(
    lambda a, w: np.testing.assert_allclose(a, w, rtol=tolerance, atol=tolerance), actual, wanted
  )


def assert_same_bits(actual, wanted):
  jax.tree.map(np.testing.assert_array_equal, actual, wanted)


ALL = ("value", "grad", "value_fn")
EXTRA = {
  "plateau": (
    optax.chain(optax.sgd(0.5), contrib.reduce_on_plateau(patience=1, rtol=0.2)),
    ("value",),
  ),
  "polyak": (optax.polyak_sgd(), ("value",)),
  "momo": (contrib.momo(), ("value",)),
  "lbfgs": (optax.lbfgs(), ALL),
  "backtracking": (
    optax.chain(optax.sgd(4.0), optax.scale_by_backtracking_linesearch(10, store_grad=True)),
    ALL,
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXTRA)
def test_extra_arguments_are_those_of_a_loop_by_hand(name):
  optimizer, extra = EXTRA[name]
  states, _ = trained(optimizer)
  wanted, _ = by_hand(optimizer, states[0].params, **dict.fromkeys(extra))
  for state, params in zip(states, wanted, strict=True):
    # The same sums in another program: a line search divides by differences of roundings.
    assert_close(state.params, params, tolerance=1e-4 if "value_fn" in extra else 2e-6)
  assert float(optax.tree.norm(optax.tree.sub(wanted[-1], wanted[0]))) > 0.1


def test_a_rate_falls_on_a_plateau():
  states, values = trained(optax.chain(optax.sgd(1e-6), contrib.reduce_on_plateau(patience=2)))
  scales = [float(optax.tree.get(state.opt_state, "scale")) for state in states]
  assert max(values) - min(values) < 1e-4 * values[0]
  assert scales == pytest.approx([1, 1, 1, 0.1, 0.1, 0.01], rel=1e-6)


class Seen(NamedTuple):
  value: jax.Array
  grad: dict
  again: jax.Array
  slope: dict
  curved: dict


def watching(rate=0.1):
  """Descends, and keeps what it was given: the loss again, its slope, its curvature along that."""

  def init(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return Seen(jnp.zeros(()), zeros, jnp.zeros(()), zeros, zeros)

  def update(updates, state, params, *, value, grad, value_fn):
    again, slope = jax.value_and_grad(value_fn)(params)
    curved = jax.jvp(jax.grad(value_fn), (params,), (grad,))[1]
    return jax.tree.map(lambda g: -rate * g, updates), Seen(value, grad, again, slope, curved)

  return optax.GradientTransformationExtraArgs(init, update)


def fit(optimizer, *, student=None, **options):
  return small_networks.fit(
    student or network(),
    options.pop("objective", recipes.labels()),
    **{"data": source(), "optimizer": optimizer, "steps": STEPS, **options},
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  "dispatch", [train.with_jit, train.with_pmap], ids=["jit over two", "pmap over two"]
)
def test_what_is_handed_on_is_of_the_global_batch(dispatch):
  student = network(dropout=0.0)
  one = fit(
    watching(), student=student, dispatch=train.with_jit(train.data_parallel(jax.devices()[:1]))
  )
  two = fit(watching(), student=student, dispatch=dispatch())
  seen = two.state.opt_state
  assert float(seen.value) == pytest.approx(two.history[-1]["loss"], rel=1e-1)
  np.testing.assert_array_equal(seen.again, seen.value)
  assert_close(seen.slope, seen.grad)
  assert_close(seen, one.state.opt_state, tolerance=1e-5)


def test_the_loss_again_has_the_same_dropout_and_batchnorm():
  student = network(norm=True, dropout=0.5)
  states, values = trained(watching(), student=student)
  for state, value in zip(states[1:], values, strict=True):
    assert float(state.opt_state.value) == value
    np.testing.assert_allclose(state.opt_state.again, value, rtol=1e-6)
    assert_close(state.opt_state.slope, state.opt_state.grad)


@pytest.mark.slow
def test_the_value_of_micro_batches_is_the_batchs():
  optimizer = optax.chain(optax.sgd(0.1), contrib.reduce_on_plateau())
  whole, _ = trained(optimizer)
  parts, _ = trained(optimizer, accumulate=4)
  best = [float(optax.tree.get(states[-1].opt_state, "best_value")) for states in (whole, parts)]
  assert best[0] == pytest.approx(best[1], rel=1e-6)
  with pytest.raises(ValueError, match="evaluates the loss again.*leave accumulate out"):
    trained(optax.lbfgs(), accumulate=2)


@pytest.mark.slow
def test_every_seed_searches_its_own_line():
  together = fit(optax.lbfgs(), seed=(3, 11))
  for seed, mine in zip((3, 11), together.unstack(), strict=True):
    # Eight roundings apart, and a line search's decisions on them.
    assert_close(mine.variables, fit(optax.lbfgs(), seed=seed).variables, tolerance=1e-3)


@pytest.mark.slow
def test_multisteps_is_the_mean_of_gradients_by_hand():
  optimizer = optax.MultiSteps(optax.sgd(0.3), every_k_schedule=2)
  states, _ = trained(optimizer, steps=4)
  grad = jax.jit(jax.grad(loss_by_hand))
  params = states[0].params
  for state in states[1:]:
    if state.step % 2 == 0:
      params = jax.tree.map(lambda p, g: p - 0.3 * g, params, grad(params))
    assert_close(state.params, params)
  # With what its inner optimiser asks for, and inside a run.
  inner = optax.chain(optax.sgd(0.3), contrib.reduce_on_plateau())
  states, _ = trained(optax.MultiSteps(inner, 2), steps=4)
  assert_close(states[-1].params, params)
  assert fit(optimizer).state.opt_state.gradient_step == STEPS // 2


def of_parts(**transforms):
  return optax.multi_transform(
    transforms, lambda params: {name: name.split("_")[0] for name in params}
  )


FREE = contrib.schedule_free_sgd(0.3)
SCHEDULE_FREE = {
  "alone": (FREE, lambda state: state),
  "chain": (optax.chain(optax.clip_by_global_norm(1.0), FREE), lambda state: state[1]),
  "injected": (
    optax.inject_hyperparams(contrib.schedule_free_sgd)(learning_rate=0.3),
    lambda state: state.inner_state,
  ),
  "accumulated": (optax.MultiSteps(FREE, 2), lambda state: state.inner_opt_state),
  "finite": (optax.apply_if_finite(FREE, 3), lambda state: state.inner_state),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_schedule_free_is_evaluated_where_optax_says(name):
  optimizer, find = SCHEDULE_FREE[name]
  fitted = fit(optimizer)
  state = fitted.state
  wanted = jax.jit(contrib.schedule_free_eval_params)(find(state.opt_state), state.params)
  assert_same_bits(fitted.variables["params"], wanted)
  far = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), wanted, state.params)
  assert max(map(float, jax.tree.leaves(far))) > 1e-3


def labelled(params, name):
  return {key: "free" if key == name else "rest" for key in params}


@pytest.mark.slow
def test_schedule_free_in_a_part_of_the_network():
  label = functools.partial(labelled, name="Dense_0")
  fitted = fit(optax.multi_transform({"free": FREE, "rest": optax.sgd(0.1)}, label))
  state, made = fitted.state, fitted.variables["params"]
  inner = state.opt_state.inner_states["free"].inner_state
  part = {"Dense_0": state.params["Dense_0"]}
  alone = contrib.schedule_free_eval_params(inner._replace(z={"Dense_0": inner.z["Dense_0"]}), part)
  assert_close(made["Dense_0"], alone["Dense_0"], tolerance=1e-7)
  assert_same_bits(made["Dense_1"], state.params["Dense_1"])
  assert np.any(made["Dense_0"]["kernel"] != state.params["Dense_0"]["kernel"])


@pytest.mark.slow
def test_what_is_evaluated_is_validated_chosen_deployed_and_averaged(tmp_path):
  seen = []

  def validate(model):
    seen.append(jax.tree.map(np.array, model.variables))
    return {"accuracy": float(len(seen))}

  objective = recipes.combine(recipes.kd(), recipes.hint("mid", "mid"))
  taught = small_networks.model(small_networks.dense(7), 1, 4, key=jax.random.key(9))
  options = {"objective": objective, "teacher": teachers.frozen(taught), "steps": 4}
  fitted = fit(FREE, folder=tmp_path / "run", validate=validate, validate_every=2, **options)
  # With projectors beside the student.
  tree = {**fitted.state.params, "objective": fitted.state.objective_params}
  wanted = jax.jit(contrib.schedule_free_eval_params)(fitted.state.opt_state, tree)
  projector = wanted.pop("objective")
  assert_same_bits(fitted.variables["params"], wanted)
  assert_same_bits(seen[-1]["params"], wanted)
  assert_same_bits(fitted.state.objective[0], projector)
  restored = teachers.restore(tmp_path / "run", network())
  assert_same_bits(restored.variables["params"], wanted)
  loaded = export.load_student(tmp_path / "run")
  logits = fitted(BATCH.inputs).logits
  np.testing.assert_allclose(loaded(np.asarray(BATCH.inputs)), logits, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_an_average_is_of_what_would_be_deployed_without_it():
  states, _ = trained(FREE, average=0.5)
  plain, _ = trained(FREE)
  assert_close(states[-1].params, plain[-1].params)
  latest = [deployed_variables(state, recipes.labels())["params"] for state in plain]
  average = latest[0]
  for t, now in enumerate(latest[1:]):
    share = 1 - min(0.5, (1 + t) / (10 + t))
    average = jax.tree.map(lambda a, w, s=share: a + s * (w - a), average, now)
  assert_close(deployed_variables(states[-1], recipes.labels())["params"], average)


@pytest.mark.slow
@pytest.mark.parametrize(
  "optimizer",
  [
    FREE,
    optax.lookahead(optax.adam(1e-2), 3, 0.5),
    optax.MultiSteps(optax.chain(optax.sgd(0.1), contrib.reduce_on_plateau(patience=1)), 3),
    contrib.sam(optax.sgd(0.1), optax.chain(contrib.normalize(), optax.sgd(0.05))),
    optax.lbfgs(),
  ],
  ids=["schedule-free", "lookahead", "multisteps", "sam", "lbfgs"],
)
def test_a_run_goes_on_with_the_same_bits(tmp_path, optimizer):
  options = {"student": network(dropout=0.3), "log_every": 1, "validate_every": 1, "steps": 5}
  whole = fit(optimizer, folder=tmp_path / "whole", keep_last=5, **options)
  shutil.copytree(tmp_path / "whole", tmp_path / "killed")
  for step in (4, 5):
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / str(step))
  shutil.rmtree(tmp_path / "killed" / "student")
  again = fit(optimizer, folder=tmp_path / "killed", keep_last=5, **options)
  assert_same_bits(again.variables, whole.variables)
  assert_same_bits(again.state.params, whole.state.params)
  assert_same_bits(again.state.opt_state, whole.state.opt_state)


@pytest.mark.slow
@pytest.mark.parametrize("dispatch", [train.with_jit, train.with_pmap])
@pytest.mark.parametrize("optimizer", [FREE, optax.lookahead(optax.sgd(0.3), 2, 0.5)])
def test_every_seed_is_evaluated_by_itself(optimizer, dispatch):
  taken = source()
  validate = evaluation.validator(BATCHES)
  together = fit(optimizer, seed=(3, 11), dispatch=dispatch(), validate=validate)
  for i, (seed, mine) in enumerate(zip((3, 11), together.unstack(), strict=True)):
    alone = fit(optimizer, seed=seed, data=taken, dispatch=dispatch())
    assert_close(mine.variables, alone.variables, tolerance=1e-5)
    found = evaluation.evaluate(Model(alone.network, alone.variables), BATCHES)
    assert together.history[-1]["validation/nll"][i] == pytest.approx(float(found["nll"]), rel=1e-4)


def test_lookahead_trains_the_fast_and_deploys_the_slow():
  optimizer = optax.lookahead(optax.adam(0.05), sync_period=3, slow_step_size=0.4)
  states, _ = trained(optimizer)
  pair = optax.LookaheadParams.init_synced(states[0].params)
  wanted, _ = by_hand(optimizer, pair, fast=lambda params: params.fast)
  for state, params in zip(states, wanted, strict=True):
    assert_close(state.params, params.fast)
    assert_close(deployed_variables(state, recipes.labels())["params"], params.slow)
  assert np.any(wanted[-1].fast["Dense_0"]["kernel"] != wanted[-1].slow["Dense_0"]["kernel"])


@pytest.mark.slow
def test_sam_is_evaluated_where_it_stands_and_not_where_it_looks():
  around = optax.chain(contrib.normalize(), optax.sgd(0.5))
  states, _ = trained(contrib.sam(optax.sgd(0.1), around, sync_period=2), steps=4)
  evaluated = [deployed_variables(state, recipes.labels())["params"] for state in states]
  assert_same_bits(evaluated[0], states[0].params)
  assert_same_bits(evaluated[1], states[0].params)
  assert_same_bits(evaluated[2], states[2].params)
  assert_same_bits(evaluated[3], states[2].params)
  assert np.any(states[3].params["Dense_0"]["kernel"] != states[2].params["Dense_0"]["kernel"])
  # Opaque, it asks for the gradient elsewhere, and every step is two of the others.
  opaque, _ = trained(contrib.sam(optax.sgd(0.1), around, opaque_mode=True), steps=2)
  assert_close(opaque[1].params, states[2].params)
  assert_close(opaque[2].params, states[4].params)


def test_masks_and_labels_are_of_the_models_own_tree():
  own = {"Dense_0": "still", "Dense_1": "moves"}  # as Flax's guides have them
  parts = {"still": optax.set_to_zero(), "moves": optax.sgd(0.1)}
  states, _ = trained(optax.multi_transform(parts, own))
  assert_same_bits(states[-1].params["Dense_0"], states[0].params["Dense_0"])
  assert np.any(states[-1].params["Dense_1"]["bias"] != states[0].params["Dense_1"]["bias"])
  taught = small_networks.model(small_networks.dense(7), 1, 4, key=jax.random.key(9))
  given = {"objective": recipes.hint("mid", "mid"), "teacher": teachers.frozen(taught)}
  with pytest.raises(ValueError, match=r'lie beside them under "objective".*\{\*\*mask, "obj'):
    trained(optax.multi_transform(parts, own), **given)
  # A function of names at the top means the same, whatever the objective.
  by_name = lambda params: {n: own.get(n, "moves") for n in params}  # noqa: E731
  for labels in ({**own, "objective": "moves"}, by_name):
    states, _ = trained(optax.multi_transform(parts, labels), **given)
    assert_same_bits(states[-1].params["Dense_0"], states[0].params["Dense_0"])
    before, after = (jax.tree.leaves(state.objective_params) for state in (states[0], states[-1]))
    assert all(np.any(a != b) for a, b in zip(before, after, strict=True))


class Named(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(nn.Dense(5, name="objective")(x))


@pytest.mark.parametrize(
  ("optimizer", "message"),
  [
    (contrib.differentially_private_aggregate(1.0, 0.1, 0), "each example's gradient by itself"),
    (optax.flatten(FREE), r"put what changes it \(optax.flatten\) inside"),
    (
      optax.multi_transform(
        {"a": optax.lookahead(optax.sgd(0.1), 2, 0.5)}, lambda p: dict.fromkeys(p, "a")
      ),
      "put them inside",
    ),
    (
      optax.GradientTransformationExtraArgs(lambda p: (), lambda u, s, p, *, hessian: (u, s)),
      "update fails on a training step.*hessian",
    ),
    (optax.masked(optax.sgd(0.1), {"Dense_0": True, "gone": True}), "does not start on the par"),
  ],
  ids=["dpsgd", "flat", "lookahead in a mask", "a hessian", "another tree's mask"],
)
def test_what_cannot_be_taken_is_refused_before_work(tmp_path, optimizer, message):
  with pytest.raises(ValueError, match=message):
    fit(optimizer, folder=tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_module_of_the_objectives_name_is_refused_where_it_would_be_hidden():
  student = networks.linen(Named(), features={"mid": "objective"})
  trained(optax.sgd(0.1), student=student)
  taught = small_networks.model(small_networks.dense(7), 1, 4, key=jax.random.key(9))
  given = {"objective": recipes.hint("mid", "mid"), "teacher": teachers.frozen(taught)}
  with pytest.raises(ValueError, match='a module called "objective"'):
    trained(optax.sgd(0.1), student=student, **given)
