"""The step: terms and their averages, the frozen teacher, schedules, projectors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import small_networks
from jaxdistill import recipes, teachers, train
from jaxdistill.train import init_state, reduce_terms
from jaxdistill.types import Model, Outputs, Term, as_objective, make_batch


def batch_of(size=8, classes=3, seed=0):
  rng = np.random.default_rng(seed)
  inputs = jnp.asarray(rng.normal(size=(size, 6)), jnp.float32)
  return make_batch(inputs, jnp.asarray(rng.integers(0, classes, size), jnp.int32))


def test_a_term_is_a_sum_over_a_sum():
  batch = make_batch(jnp.zeros((4, 1)), weight=jnp.array([1.0, 2.0, 1.0, 0.0]))
  values, where = jnp.array([1.0, 2.0, 4.0, 8.0]), jnp.array([1.0, 1.0, 0.0, 1.0])
  loss, sums = reduce_terms({"x": Term(values, weight=3.0, where=where)}, batch)
  assert float(loss) == pytest.approx(3 * (1 + 2 * 2) / (1 + 2))
  assert [float(v) for v in sums["x"]] == [5.0, 3.0]


def test_tokens_carry_their_own_weight():
  batch = make_batch(jnp.zeros((2, 3)), weight=jnp.array([[1.0, 1, 0], [1, 0, 0]]))
  values = jnp.arange(6.0).reshape(2, 3)
  loss, _ = reduce_terms({"x": Term(values, where=jnp.array([1.0, 0.5]))}, batch)
  assert float(loss) == pytest.approx((0 + 1 + 0.5 * 3) / 2.5)


def test_an_empty_mask_gives_zero_value_and_gradient():
  batch = make_batch(jnp.zeros((2, 1)))

  def loss(x):
    return reduce_terms({"x": Term(x, where=jnp.zeros(2))}, batch)[0]

  value, grad = jax.value_and_grad(loss)(jnp.array([1.0, 2.0]))
  assert float(value) == 0
  assert grad.tolist() == [0, 0]


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_masked_value_cannot_leak(bad):
  batch = make_batch(jnp.zeros((2, 1)), weight=jnp.array([1.0, 0.0]))
  grad = jax.grad(lambda x: reduce_terms({"x": Term(x)}, batch)[0])
  values = jnp.array([3.0, bad])
  assert float(reduce_terms({"x": Term(values)}, batch)[0]) == 3
  assert grad(values).tolist() == [1, 0]


def test_a_term_with_an_axis_of_its_own_ignores_the_examples_weights():
  batch = make_batch(jnp.zeros((2, 1)), weight=jnp.zeros(2))
  loss, _ = reduce_terms({"x": Term(jnp.array([1.0, 2.0, 6.0]), axis="classes")}, batch)
  assert float(loss) == 3


def test_a_mask_that_does_not_fit_says_so():
  batch = make_batch(jnp.zeros((4, 1)))
  with pytest.raises(ValueError, match=r"term 'x' has values of shape \(3,\).*axis='classes'"):
    reduce_terms({"x": Term(jnp.zeros(3))}, batch)


def test_bfloat16_terms_are_averaged_in_float32(strict_promotion):
  batch = make_batch(jnp.zeros((300, 1)))
  values = jnp.ones(300, jnp.bfloat16)
  loss, _ = reduce_terms({"x": Term(values, weight=0.5)}, batch)
  assert loss.dtype == jnp.float32
  assert float(loss) == 0.5


def build(objective, *, teacher_width=7, batch=None, hyper=None, optimizer=None):
  batch = batch_of() if batch is None else batch
  student = small_networks.dense(5, norm=True)
  network = small_networks.dense(teacher_width, norm=True)
  teacher = teachers.frozen(Model(network, network.init(jax.random.key(1), batch.inputs)))
  optimizer = optax.sgd(0.1) if optimizer is None else optimizer
  state = jax.jit(
    lambda key: init_state(key, student, objective, optimizer, batch, teacher=teacher)
  )(jax.random.key(0))
  run = train.make_step(student, objective, optimizer, hyper=hyper)
  return state, teacher, batch, run


def test_the_teacher_is_frozen():
  state, teacher, batch, run = build(recipes.combine(recipes.kd(), recipes.hint("mid", "mid")))
  before = jax.tree.map(np.array, teacher)
  jitted = jax.jit(run)
  for _ in range(3):
    state, _ = jitted(state, teacher, batch)
  jax.tree.map(np.testing.assert_array_equal, before, teacher)
  # Nor does a gradient reach it, BatchNorm statistics included.
  grads = jax.jit(jax.grad(lambda t: run(state, t, batch)[1]["soft"][0]))(teacher)
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_student_statistics_and_projector_move():
  state, teacher, batch, run = build(recipes.combine(recipes.kd(), recipes.hint("mid", "mid")))
  after, sums = jax.jit(run)(state, teacher, batch)
  moved = jax.tree.map(
    lambda a, b: bool(np.any(a != b)),
    (state.objective_params, state.model_state),
    (after.objective_params, after.model_state),
  )
  assert all(jax.tree.leaves(moved))
  assert set(sums) == {"loss", "labels", "soft", "hint", "accuracy"}
  # The projector's shape came from the two networks.
  kernel = state.objective_params["1"]["projector"]["dense"]["kernel"]
  assert kernel.shape == (5, 7)


def test_equal_widths_need_no_projector():
  state, *_ = build(recipes.hint("mid", "mid"), teacher_width=5)
  assert state.objective_params == {}


def test_the_loss_is_what_the_terms_say():
  state, teacher, batch, run = build(recipes.kd(temperature=2.0, soft_weight=0.7, hard_weight=0.3))
  _, sums = jax.jit(run)(state, teacher, batch)
  mean = {name: float(total / count) for name, (total, count) in sums.items()}
  assert mean["loss"] == pytest.approx(0.7 * mean["soft"] + 0.3 * mean["labels"], rel=1e-6)


def test_unlabelled_examples_reach_the_soft_term_alone():
  batch = batch_of()
  batch = batch.replace(labelled=jnp.zeros(8), labels=jnp.zeros(8, jnp.int32))
  state, teacher, batch, run = build(recipes.kd(), batch=batch)
  _, sums = jax.jit(run)(state, teacher, batch)
  assert [float(v) for v in sums["labels"]] == [0, 0]
  assert float(sums["soft"][1]) == 8


def test_a_schedule_of_a_keyword_does_not_recompile():
  schedule = optax.linear_schedule(4.0, 1.0, 3)
  state, teacher, batch, run = build(recipes.kd(), hyper={"temperature": schedule})
  traced = []

  def counted(*args):
    traced.append(args)
    return run(*args)

  jitted = jax.jit(counted)
  fixed = jax.jit(build(recipes.kd(), hyper={"temperature": 4.0})[3])
  _, at_start = fixed(state, teacher, batch)
  values = []
  for _ in range(4):
    state, sums = jitted(state, teacher, batch)
    values.append(float(sums["soft"][0]))
  assert len(traced) == 1
  assert values[0] == pytest.approx(float(at_start["soft"][0]), rel=1e-6)


def test_numeric_keywords_vary_under_vmap():
  state, teacher, batch, _ = build(recipes.kd())
  student = small_networks.dense(5, norm=True)

  def loss_at(temperature):
    hyper = {"temperature": temperature}
    run = train.make_step(student, recipes.kd(), optax.sgd(0.1), hyper=hyper)
    return run(state, teacher, batch)[1]["soft"][0]

  temperatures = jnp.array([1.0, 4.0])
  together = jax.jit(jax.vmap(loss_at))(temperatures)
  alone_at = jax.jit(loss_at)
  alone = jnp.stack([alone_at(t) for t in temperatures])
  np.testing.assert_allclose(together, alone, rtol=1e-6)  # float32 rounding


def test_a_batch_can_bring_the_teachers_outputs_along():
  state, teacher, batch, run = build(recipes.kd())
  outputs = teacher(batch)
  jitted = jax.jit(run)
  _, in_step = jitted(state, teacher, batch)
  _, brought = jitted(state, None, batch.replace(teacher=outputs))
  # To float32's rounding: what is fused with what differs between the two programs.
  np.testing.assert_allclose(in_step["soft"][0], brought["soft"][0], rtol=1e-6)


def test_an_unknown_keyword_names_those_there_are():
  state, teacher, batch, run = build(recipes.kd(), hyper={"temprature": 2.0})
  with pytest.raises(ValueError, match=r"\['temprature'\].*'temperature'"):
    run(state, teacher, batch)


def test_class_counts_that_differ_are_refused():
  batch = batch_of()
  taught = small_networks.model(small_networks.dense(4, classes=5), 1, 6, key=jax.random.key(0))
  with pytest.raises(ValueError, match="3 classes.*the teacher 5"):
    init_state(
      jax.random.key(0),
      small_networks.dense(4),
      recipes.kd(),
      optax.sgd(0.1),
      batch,
      teacher=teachers.frozen(taught),
    )


def test_a_layer_nobody_has_names_those_there_are():
  with pytest.raises(ValueError, match=r"student_layer='middle' is not among.*'mid': \(8, 5\)"):
    build(recipes.hint("middle", "mid"))


def test_two_terms_of_one_name_are_refused():
  both = recipes.combine(recipes.kd(), recipes.labels())
  state, teacher, batch, run = build(both)
  with pytest.raises(ValueError, match="name a term.*labels"):
    run(state, teacher, batch)


def test_a_bare_function_with_a_key_gets_one():
  seen = []

  def objective(student, teacher, batch, *, key, scale=2.0):
    seen.append(key)
    return {"x": Term(scale * jnp.sum(student.logits**2, axis=-1))}

  promoted = as_objective(objective)
  assert dict(promoted.hyper) == {"scale": 2.0}
  state, teacher, batch, run = build(objective)
  run(state, teacher, batch)
  assert jnp.issubdtype(seen[0].dtype, jax.dtypes.prng_key)


def test_what_is_no_objective_is_refused():
  with pytest.raises(TypeError, match="objective must be"):
    as_objective("kd")


@pytest.mark.slow
def test_objectives_run_under_strict_promotion(strict_promotion):
  outputs = Outputs(logits=jnp.ones((2, 3), jnp.bfloat16), features={"f": jnp.ones((2, 4))})
  batch = make_batch(jnp.zeros((2, 1)), jnp.array([0, 1], jnp.int32))
  objective = recipes.combine(recipes.kd(), recipes.hint("f", "f"))
  params, state = objective.init(jax.random.key(0), outputs, outputs)
  terms, _ = objective.apply(params, state, outputs, outputs, batch, key=jax.random.key(0))
  loss, _ = reduce_terms(terms, batch)
  assert np.isfinite(loss)


def test_the_logs_own_names_are_reserved():
  def objective(student, teacher, batch):
    return {"loss": Term(jnp.sum(student.logits, axis=-1))}

  state, teacher, batch, run = build(objective)
  with pytest.raises(ValueError, match=r"named \['loss'\]"):
    run(state, teacher, batch)


def test_keywords_that_are_given_reach_the_objective_and_each_part_keeps_its_own():
  both = recipes.combine(recipes.kd(soft_weight=0.5), recipes.hint("mid", "mid", hint_weight=2.0))
  given = {"soft_weight": 0.25, "temperature": optax.linear_schedule(2.0, 1.0, 10)}
  told = as_objective(both, **given)
  assert told.hyper["soft_weight"] == 0.25
  state, teacher, batch, run = build(told)
  _, sums = jax.jit(run)(state, teacher, batch)
  _, by_hand = jax.jit(build(both, hyper={"soft_weight": 0.25, "temperature": 2.0})[3])(
    state, teacher, batch
  )
  for name, (total, _) in by_hand.items():
    assert float(sums[name][0]) == pytest.approx(float(total), rel=1e-6), name
  with pytest.raises(ValueError, match=r"\['temprature'\].*'temperature'"):
    as_objective(both, temprature=2.0)


def test_training_accuracy_is_of_what_is_labelled():
  weight, labelled = jnp.array([2.0, 1, 0, 1, 1, 3, 1, 1]), jnp.array([1.0, 1, 1, 0, 0, 1, 1, 0])
  batch = batch_of().replace(weight=weight, labelled=labelled)
  state, _, _, run = build(recipes.labels(), batch=batch)
  variables = {"params": state.params, **state.model_state}
  network = small_networks.dense(5, norm=True)
  logits = network.apply(variables, batch.inputs, train=True, key=jax.random.key(0))[0].logits
  right = np.argmax(np.asarray(logits), axis=1) == np.asarray(batch.labels)
  total, count = jax.jit(run)(state, None, batch)[1]["accuracy"]
  mask = np.asarray(weight * labelled)
  assert (float(total), float(count)) == ((mask * right).sum(), mask.sum())
  assert (mask * right).sum() != (np.asarray(weight) * right).sum()


def test_what_an_objective_learns_begins_by_the_seed():
  batch, objective = batch_of(), recipes.hint("mid", "mid")
  wide = small_networks.dense(7)
  teacher = teachers.frozen(small_networks.model(wide, 1, 6, key=jax.random.key(1)))

  def kernel(seed):
    given = (jax.random.key(seed), small_networks.dense(5), objective, optax.sgd(0.1), batch)
    return init_state(*given, teacher=teacher).objective_params["projector"]["dense"]["kernel"]

  np.testing.assert_array_equal(kernel(0), kernel(0))
  assert not np.any(np.asarray(kernel(0)) == np.asarray(kernel(1)))


def test_only_the_student_is_deployed():
  objective = recipes.hint("mid", "mid")
  state, *_ = build(objective)
  assert state.objective_params
  deployed = train.deployed_variables(state, objective)
  made = small_networks.dense(5, norm=True).init(jax.random.key(0), batch_of().inputs)
  assert jax.tree.map(jnp.shape, deployed) == jax.tree.map(jnp.shape, dict(made))
