"""Gradients of terms apart, and DOT: by hand, the sum is the whole, and however it is run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import small_networks
from jaxdistill import data, recipes, search, teachers, train
from jaxdistill.train import TermsApart, init_state, make_step, optimizers
from jaxdistill.types import Model, Term, make_batch

STEPS = 6


def examples(size=24, dtype=np.float32):
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 3, size)
  return data.from_arrays(rng.normal(size=(size, 4)).astype(dtype), labels, num_classes=3)


def source(data_seed=0):
  return data.on_device(examples(), batch_size=8, data_seed=data_seed)


def a_batch(size=6, dtype=np.float32, seed=0):
  rng = np.random.default_rng(seed)
  inputs = jnp.asarray(rng.normal(size=(size, 4)), dtype)
  known = jnp.asarray(rng.integers(0, 2, size), jnp.float32)
  return make_batch(inputs, jnp.asarray(rng.integers(0, 3, size)), labelled=known)


def a_teacher(**fields):
  network = small_networks.dense(7, **fields)
  return teachers.frozen(small_networks.model(network, 1, 4, key=jax.random.key(9)))


def keeps(groups=(("labels",),)):
  """An optimiser that moves nothing and shows what it was handed."""

  def init(params):
    return TermsApart(groups), [jax.tree.map(jnp.zeros_like, params)] * (len(groups) + 2)

  def update(updates, state, params=None, *, gradients):
    return jax.tree.map(jnp.zeros_like, updates), (state[0], [updates, *gradients])

  return optax.GradientTransformationExtraArgs(init, update)


def shown(objective, batch, *, groups=(("labels",),), student=None, **options):
  student = small_networks.dense(5) if student is None else student
  given = (student, objective, keeps(groups))
  state = init_state(jax.random.key(0), *given, batch, teacher=a_teacher())
  step = jax.jit(make_step(*given, **options))
  after, sums = step(state, a_teacher(), batch)
  return state, after.opt_state[1], sums


def assert_close(first, second, tolerance=1e-6):
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def gradient_of(objective, batch, student):
  """The plain gradient, of a step whose optimiser asks for nothing."""
  optimizer = optax.sgd(1.0)
  given = (student, objective, optimizer)
  state = init_state(jax.random.key(0), *given, batch, teacher=a_teacher())
  after, sums = jax.jit(make_step(*given))(state, a_teacher(), batch)
  return jax.tree.map(jnp.subtract, state.params, after.params), sums


def test_gradients_apart_are_each_terms_and_sum_to_the_whole():
  batch, student = a_batch(), small_networks.dense(5)
  whole = recipes.kd()
  _, (total, labels, rest), sums = shown(whole, batch)
  assert_close(total, jax.tree.map(jnp.add, labels, rest), 1e-7)
  wanted, plain = gradient_of(whole, batch, student)
  assert_close(total, wanted)
  assert_close(sums, plain)
  assert_close(labels, gradient_of(recipes.labels(hard_weight=0.1), batch, student)[0])
  assert_close(rest, gradient_of(recipes.kd(hard_weight=None), batch, student)[0])


def test_gradients_apart_of_micro_batches_are_the_batchs():
  batch = a_batch()
  _, whole, sums = shown(recipes.kd(), batch)
  _, parts, others = shown(recipes.kd(), batch, accumulate=3)
  assert_close(whole, parts)
  assert_close(sums, others)


def test_more_groups_than_one_and_a_members_labels():
  """DeepKD's kind: three groups; of a cohort, ``labels`` is that of each member."""
  batch, hint = a_batch(), recipes.hint("mid", "mid")
  objective = recipes.combine(recipes.kd(), hint)
  groups = (("labels",), ("hint",))
  _, (total, *each), _ = shown(objective, batch, groups=groups)
  assert len(each) == 3
  assert_close(total, jax.tree.map(lambda a, b, c: a + b + c, *each))
  names = train._optax.grouped_terms({"a/labels": 1, "b/labels": 2, "a/soft": 3}, (("labels",),))
  assert [set(one) for one in names] == [{"a/labels", "b/labels"}, {"a/soft"}]


def test_it_costs_nothing_where_nobody_asks():
  """As many products as one pass forward and one back have; with two groups, one more back."""
  batch, student, teacher = a_batch(), small_networks.dense(5), a_teacher()

  def products(optimizer):
    given = (student, recipes.kd(), optimizer)
    state = init_state(jax.random.key(0), *given, batch, teacher=teacher)
    text = str(jax.make_jaxpr(make_step(*given))(state, teacher, batch))
    return text.count("dot_general")

  def loss(params):
    outputs = student.apply({"params": params}, batch.inputs, train=True, key=jax.random.key(0))[0]
    terms, _ = recipes.kd().apply({}, {}, outputs, outputs, batch, key=None)
    return train.reduce_terms(terms, batch)[0]

  params = student.init(jax.random.key(0), batch.inputs)["params"]
  alone = str(jax.make_jaxpr(jax.value_and_grad(loss))(params)).count("dot_general")
  forward = str(jax.make_jaxpr(loss)(params)).count("dot_general")
  plain, apart = products(optax.sgd(0.1)), products(optimizers.dot(0.1, steps=1))
  assert plain == alone + forward  # the teacher's two layers
  assert apart == plain + (alone - forward)


def by_hand(gradients, params, *, rate, momentum=0.9, delta=0.075, decay=5e-4):
  """DOT of a list of (labels, distilled) gradients, in float64; one momentum where one is 0."""
  first, second, w = np.zeros_like(params), np.zeros_like(params), np.float64(params)
  met = np.zeros(2, bool)
  for g, d in gradients:
    met |= [np.any(g), np.any(d)]
    apart = delta * met.all()
    first = (momentum - apart) * first + g + decay * w
    second = (momentum + apart) * second + d
    w = w - rate * (first + second)
  return w


@pytest.mark.parametrize("delta", [0.075, 0.0])
def test_dot_by_hand(delta):
  rng = np.random.default_rng(0)
  params = {"both": rng.normal(size=(3, 2)), "task": rng.normal(size=2), "far": rng.normal(size=2)}
  steps = []
  for _ in range(4):
    g, d = ({n: rng.normal(size=x.shape) for n, x in params.items()} for _ in range(2))
    steps.append((g | {"far": np.zeros(2)}, d | {"task": np.zeros(2)}))
  with jax.enable_x64(True):
    optimizer = optimizers.dot(0.3, steps=10, milestones=(), delta=delta)
    now = jax.tree.map(jnp.asarray, params)
    state = optimizer.init(now)
    for g, d in steps:
      parts = [jax.tree.map(jnp.asarray, x) for x in (g, d)]
      whole = jax.tree.map(jnp.add, *parts)
      updates, state = optimizer.update(whole, state, now, gradients=parts)
      now = optax.apply_updates(now, updates)
    plain, alone = optimizers.sgd(0.3, steps=10, milestones=()), jax.tree.map(jnp.asarray, params)
    state = plain.init(alone)
    for g, d in steps:
      whole = jax.tree.map(lambda a, b: jnp.asarray(a + b), g, d)
      updates, state = plain.update(whole, state, alone)
      alone = optax.apply_updates(alone, updates)
  for name in params:
    wanted = by_hand([(g[name], d[name]) for g, d in steps], params[name], rate=0.3, delta=delta)
    np.testing.assert_allclose(now[name], wanted, rtol=1e-12)
    # A parameter that one of the two never reaches is SGD's.
    same = np.allclose(now[name], alone[name], rtol=1e-12, atol=0)
    assert same == (name != "both" or delta == 0)


def fit(**options):
  given = {
    "data": source(),
    "optimizer": optimizers.dot(0.1, steps=STEPS),
    "steps": STEPS,
    "teacher": a_teacher(),
    **options,
  }
  return small_networks.fit(small_networks.dense(5), recipes.kd(), **given)


@pytest.mark.slow
def test_without_a_difference_it_is_sgd_with_momentum():
  same = fit(optimizer=optimizers.dot(0.1, steps=STEPS, delta=0.0, decayed="kernels"))
  sgd = fit(optimizer=optimizers.sgd(0.1, steps=STEPS, decayed="kernels"))
  assert_close(same.variables, sgd.variables)
  other = fit()
  assert not np.allclose(*(jax.tree.leaves(x.variables)[1] for x in (other, sgd)), rtol=1e-3)


@pytest.mark.slow
def test_a_run_is_the_same_however_it_is_run(tmp_path):
  whole = fit().variables
  one = train.data_parallel(jax.devices()[:1])
  for options in (
    {"dispatch": train.with_jit(one)},
    {"dispatch": train.with_pmap()},
    {"accumulate": 2},
  ):
    assert_close(fit(**options).variables, whole, 1e-5)

  def stop(step, record):
    if step == 4:
      raise KeyboardInterrupt

  every = {"log_every": 2, "checkpoint_every": 2, "folder": tmp_path}
  with pytest.raises(KeyboardInterrupt):
    fit(callback=stop, **every)
  resumed = fit(**every).variables
  for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_sweep_over_delta_is_each_alone():
  rates, deltas = {"steps": STEPS}, [0.0, 0.09]
  found = search.sweep(
    small_networks.dense(5),
    recipes.kd(),
    points=search.product(delta=deltas),
    data=source(),
    optimizer=lambda delta: optimizers.dot(0.1, delta=delta, **rates),
    steps=STEPS,
    seeds=[0, 1],
    teacher=a_teacher(),
    choice=search.Choice(data.evaluation_batches(examples(), batch_size=8)),
    run=train.Run(progress=None),
  )
  for i, delta in enumerate(deltas):
    for s in range(2):
      optimizer = optimizers.dot(0.1, delta=delta, **rates)
      alone = fit(optimizer=optimizer, seed=s, data=source(s))
      assert_close(found.students(i).instance(s).variables, alone.variables, 1e-5)


@pytest.mark.slow
def test_a_part_of_the_network_is_frozen_around_it():
  label = lambda params: {n: "still" if n == "Dense_0" else "dot" for n in params}  # noqa: E731
  parts = {"dot": optimizers.dot(0.1, steps=STEPS), "still": optax.set_to_zero()}
  given = {"optimizer": optax.multi_transform(parts, label)}
  held, free = fit(**given), fit()
  start = small_networks.dense(5).init(jax.random.split(jax.random.key(0), 3)[0], jnp.zeros((1, 4)))
  np.testing.assert_array_equal(
    held.variables["params"]["Dense_0"]["kernel"], start["params"]["Dense_0"]["kernel"]
  )
  kernels = [x.variables["params"]["Dense_1"]["kernel"] for x in (held, free)]
  assert not np.allclose(*kernels)
  assert not np.allclose(kernels[0], start["params"]["Dense_1"]["kernel"])


def test_what_cannot_be_taken_apart_says_so():
  dot = optimizers.dot(0.1, steps=STEPS)
  with pytest.raises(
    ValueError, match=r"wants the gradient of \['truth'\] apart, and the objective"
  ):
    fit(optimizer=optimizers.dot(0.1, steps=STEPS, apart=["truth"]))
  with pytest.raises(ValueError, match=r"optax.MultiSteps around it .*with_jit\(accumulate=\.\.\."):
    fit(optimizer=optax.MultiSteps(dot, 2))
  mixed = optax.chain(dot, optimizers.dot(0.1, steps=STEPS, apart=["soft"]))
  with pytest.raises(ValueError, match="parts of the optimizer want other terms apart"):
    fit(optimizer=mixed)
  params = {"a": jnp.ones(2)}
  with pytest.raises(ValueError, match=r"dot takes the gradients of \['labels'\] and of all other"):
    dot.update(params, dot.init(params), params)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"delta": 0.1}, "delta=0.1 must be at least 0 and below momentum and 1 - momentum"),
    ({"delta": -0.1}, "delta=-0.1 must be"),
    ({"momentum": 1.0}, "momentum=1.0 must be"),
    ({"apart": "labels"}, "apart="),
    ({"apart": ()}, "apart="),
    ({"milestones": [150]}, "milestones="),
    ({"decay": -1.0}, "decay=-1.0"),
  ],
)
def test_bad_arguments_say_what_to_do(options, message):
  with small_networks.untyped(), pytest.raises(ValueError, match=message):
    optimizers.dot(0.1, steps=10, **options)


def test_a_term_that_is_not_finite_elsewhere_is_seen():
  """A loss that ends a run ends it as before."""

  def objective(student, teacher, batch):
    return {
      "labels": Term(student.logits[:, 0]),
      "bad": Term(jnp.log(-jnp.abs(student.logits[:, 0]))),
    }

  with pytest.raises(FloatingPointError, match="bad"):
    small_networks.fit(
      small_networks.dense(5),
      objective,
      data=source(),
      steps=2,
      optimizer=optimizers.dot(0.1, steps=2),
    )


def test_an_objectives_own_parameters_have_plain_momentum():
  """The projector of a hint: no label reaches it, so it is SGD's."""
  objective = recipes.combine(recipes.labels(), recipes.hint("mid", "mid"))
  batch, teacher = a_batch(), a_teacher()

  def after(optimizer):
    given = (small_networks.dense(5), objective, optimizer)
    state = init_state(jax.random.key(0), *given, batch, teacher=teacher)
    return jax.jit(make_step(*given))(state, teacher, batch)[0]

  dot = after(optimizers.dot(0.1, steps=2))
  met = {
    jax.tree_util.keystr(p): v for p, v in jax.tree_util.tree_leaves_with_path(dot.opt_state.met)
  }
  projector = [v for name, v in met.items() if "objective" in name]
  assert projector
  assert all(v.tolist() == [False, True] for v in projector)
  assert [v.tolist() for n, v in met.items() if "Dense_0" in n] == [[True, True]] * 2
  assert [v.tolist() for n, v in met.items() if "Dense_1" in n] == [[True, False]] * 2


@pytest.mark.slow
def test_models_of_a_cohort_have_labels_apart():
  student = recipes.each(recipes.kd())
  networks = small_networks.networks
  cohort = networks.cohort({"a": small_networks.dense(5), "b": small_networks.dense(4)})
  fitted = small_networks.fit(
    cohort,
    student,
    data=source(),
    steps=2,
    teacher=a_teacher(),
    optimizer=optimizers.dot(0.1, steps=2),
  )
  assert isinstance(networks.members(fitted)["b"], Model)
