"""What is compiled when: in the background, quickly where little is computed, nothing twice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill import (
  _compile,
  data,
  evaluation,
  losses,
  networks,
  recipes,
  runs,
  search,
  teachers,
)
from jaxdistill.networks import models
from jaxdistill.train import Plan, Program, Run, _shared_teacher, with_jit
from jaxdistill.types import Model, Term, as_objective
from small_networks import compiled


@pytest.fixture(autouse=True)
def nothing_compiled_before(monkeypatch):
  monkeypatch.setattr(_compile, "_PROGRAMS", _compile._Programs(most=64))


def parts(size=40):
  random = np.random.RandomState(0)
  examples = data.from_arrays(
    random.normal(size=(size, 6)).astype(np.float32), random.randint(0, 3, size), num_classes=3
  )
  network = networks.linen(models.MLP(widths=(4,), num_classes=3), name="network")
  model = Model(network, network.init(jax.random.key(0), jnp.zeros((1, 6))))
  source = data.on_device(examples, batch_size=8, data_seed=0)
  return model, source, data.evaluation_batches(examples, batch_size=16)


def test_what_is_called_was_compiled_ahead():
  def double(x):
    return 2 * x

  function = _compile.CompiledOnce(double)
  with compiled() as names:
    function.compile(jax.ShapeDtypeStruct((3,), jnp.float32))
    assert function.compiled().memory_analysis().argument_size_in_bytes == 12
    assert function(np.ones(3, np.float32)).tolist() == [2, 2, 2]
  assert names == ["double"]


def test_programs_that_are_the_same_are_compiled_once():
  def made(constant, kept="a"):
    def program(tree):
      return {"made": constant * tree[kept]}

    return _compile.CompiledOnce(program)

  tree = {"a": np.arange(3, dtype=np.float32), "b": np.ones(3, np.float32)}
  two = np.full(3, 2, np.float32)
  with compiled() as names:
    assert made(two)(tree)["made"].tolist() == [0, 2, 4]
    assert made(np.full(3, 2, np.float32))(tree)["made"].tolist() == [0, 2, 4]
    assert names == ["program"]
    # Other constants, another of two arguments, another shape: each is another program.
    assert made(np.full(3, 3, np.float32))(tree)["made"].tolist() == [0, 3, 6]
    assert made(two, "b")(tree)["made"].tolist() == [2, 2, 2]
    longer = {"a": np.ones(4, np.float32), "b": tree["b"]}
    assert made(np.float32(2))(longer)["made"].tolist() == [2, 2, 2, 2]
  assert names == ["program"] * 4


def test_models_of_one_network_share_a_program_and_keep_their_static_parts():
  model, _, _ = parts()
  other = Model(dataclasses.replace(model.network, name="other"), model.variables)

  def program(model, x):
    return Model(model.network, jax.tree.map(lambda leaf: leaf + x, model.variables))

  with compiled() as names:
    first, second = (_compile.CompiledOnce(program)(m, 1.0) for m in (model, other))
  assert names == ["program"]
  assert (first.network.name, second.network.name) == ("network", "other")


def test_programs_on_other_devices_are_others():
  def program(x):
    return x + 1

  found = []
  for device in jax.devices()[:2]:
    made = _compile.CompiledOnce(program)(jax.device_put(np.ones(3, np.float32), device))
    found.append(made.devices())
  assert found == [{device} for device in jax.devices()[:2]]


def test_what_calls_back_into_python_keeps_its_own_function():
  calls = []

  def made(name):
    def program(x):
      jax.debug.callback(lambda: calls.append(name))
      return x

    return _compile.CompiledOnce(program)

  for name in ("first", "second"):
    made(name)(np.ones(3, np.float32))
    jax.effects_barrier()
  assert calls == ["first", "second"]


def test_what_does_not_trace_says_so_where_it_is_compiled():
  function = _compile.CompiledOnce(lambda x: x @ x)
  with pytest.raises(TypeError, match="contracting dimensions"):
    function.compile(jax.ShapeDtypeStruct((2, 3), jnp.float32))
  assert function(np.eye(2, dtype=np.float32)).tolist() == [[1, 0], [0, 1]]


def test_a_program_that_cannot_be_compiled_is_tried_again():
  def program(x):
    return x + 1

  for _ in range(2):
    function = _compile.CompiledOnce(program)
    function.compile(jnp.ones(3), options={"xla_no_such_option": True})
    with pytest.raises(jax.errors.JaxRuntimeError):
      function.compiled()
  assert _compile.CompiledOnce(program)(jnp.ones(3)).tolist() == [2, 2, 2]


def test_pending_arrays_are_shapes_until_they_are_needed():
  calls = []

  def make():
    calls.append(1)
    return jnp.arange(3.0)

  tree = {"a": _compile.Deferred((3,), jnp.float32, make), "b": jnp.ones(3)}
  function = jax.jit(lambda tree: tree["a"] + tree["b"])
  assert jax.eval_shape(function, tree).shape == (3,)
  lowered = function.lower(tree)
  assert not calls
  assert lowered.compile()(_compile.computed(tree)).tolist() == [1, 2, 3]
  assert len(calls) == 1


def test_two_pending_arrays_of_one_shape_are_not_the_same():
  one, other = (_compile.Deferred((3,), jnp.float32, lambda: jnp.zeros(3)) for _ in range(2))
  assert one == one
  assert one != other


def test_loops_count_as_often_as_they_run():
  def loop(x):
    return jax.lax.scan(lambda c, _: (c + 1, None), x, length=5)[0]

  assert _compile.activations(loop, jax.ShapeDtypeStruct((10,), jnp.float32)) == 5 * 40


def test_all_branches_count():
  def branch(x):
    return jax.lax.cond(x[0] > 0, lambda x: 2 * x, lambda x: 3 * x + 1, x)

  straight = _compile.activations(lambda x: 3 * x + 1, jax.ShapeDtypeStruct((10,), jnp.float32))
  assert _compile.activations(branch, jax.ShapeDtypeStruct((10,), jnp.float32)) >= 1.5 * straight


def test_the_compiler_tries_harder_the_more_there_is_to_compute():
  def work(calls):
    shape = jax.ShapeDtypeStruct((2**20,), jnp.float32)  # 4 MiB
    return _compile.by_work(jnp.negative, shape, calls=calls)

  assert work(1) == _compile.quick()
  assert work(100) == _compile.brief()
  assert work(10_000) == _compile.long()
  assert _compile.quick()["xla_backend_optimization_level"] == 0
  for options in (_compile.quick(), _compile.brief(), _compile.long()):
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1.0) == 2


def test_options_that_the_compiler_does_not_know_are_left_out(monkeypatch):
  taken = jax.jit

  def refuses(function, compiler_options):
    if "xla_cpu_use_fusion_emitters" in compiler_options:
      raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: No such compile option")
    return taken(function, compiler_options=compiler_options)

  _compile._known.cache_clear()
  monkeypatch.setattr(jax, "jit", refuses)
  try:
    assert _compile.brief() == {**_compile.long(), "xla_backend_optimization_level": 1}
    assert "xla_cpu_use_fusion_emitters" not in _compile.brief()
  finally:
    _compile._known.cache_clear()


def test_host_arrays_go_to_the_device_without_a_program():
  examples = data.from_arrays(np.ones((3, 5), np.float64), np.arange(3), num_classes=3)
  with compiled() as names:
    made = data.on_device(examples, batch_size=3, data_seed=0).shared
  assert names == []
  assert {name: leaf.dtype for name, leaf in made.items()} == {
    "inputs": jnp.float32,
    "labels": jnp.int32,
    "labelled": jnp.float32,
  }
  assert made["labels"].tolist() == [0, 1, 2]


def test_a_validator_compiled_ahead_compiles_nothing_more():
  model, _, batches = parts()
  validate = evaluation.validator(batches)
  _compile._known()
  with compiled() as names:
    validate.compile(jax.eval_shape(lambda: model))
    found = validate(model)
  assert names == ["evaluation"]
  expected = evaluation.evaluate(model, batches)
  # The same sums from programs of other options: float32's rounding.
  for name, value in found.items():
    np.testing.assert_allclose(value, expected[name], rtol=1e-6)


def test_a_network_is_compiled_for_once_whatever_is_evaluated_of_it():
  """Other variables, trained or read, another split, with a teacher or without: one program."""
  model, _, batches = parts()
  _, _, more = parts(size=70)
  other = Model(model.network, jax.tree.map(lambda leaf: np.asarray(leaf) + 0.1, model.variables))
  spread = Model(model.network, with_jit(jax.make_mesh((1,), ("data",))).spread(model.variables))
  teacher = teachers.frozen(other)
  taught = evaluation.taught(teacher, more)
  with compiled() as names:
    found = evaluation.validator(batches)(model)
    for one, split in ((other, more), (spread, batches), (model, taught)):
      evaluation.evaluate(one, split)
    compared = evaluation.examine(model, more, teacher=teacher)[0]
  assert names == ["evaluation"]
  assert found["accuracy"] == evaluation.evaluate(model, batches)["accuracy"]
  # The teacher's logits by the way or brought along, and no comparison where there is none.
  assert compared == evaluation.evaluate(model, taught)
  assert "agreement" in compared
  assert "agreement" not in evaluation.evaluate(model, more)


def test_what_a_network_costs_compiles_a_program_of_each_size():
  model, _, batches = parts()
  with compiled() as names:
    evaluation.costs(model, batches, seconds=0.01)
    evaluation.taught(teachers.frozen(model), batches)
    evaluation.costs(model, batches, seconds=0.01)
  assert len(names) == 3  # a model's of one example and of a batch; a teacher's of a batch


@pytest.mark.parametrize("own", [False, True])
def test_splits_share_what_normalises_them(own):
  def shifted(inputs):
    return (inputs.astype(jnp.float32) / 255 - 0.5) / 0.25

  normalize = shifted if own else ((0.5,), (0.25,))
  _compile._known()
  splits = [
    data.from_arrays(np.full((size, 2, 2, 1), 255, np.uint8), np.zeros(size, int))
    for size in (5, 40)
  ]
  with compiled() as names:
    made = [data.evaluation_batches(s, batch_size=16, normalize=normalize) for s in splits]
  assert names == (["shifted"] if own else [])  # arithmetic of our own is NumPy's on the host
  # Of a quotient of constants XLA makes a product, which is rounded once more.
  assert [float(batches.inputs.min()) for batches in made] == pytest.approx([2.0, 2.0], rel=1e-6)


def test_what_looks_at_numbers_or_takes_a_seeds_own_compiles_nothing():
  model, _, _ = parts()
  several = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), model.variables)
  several = Model(model.network, jax.device_put(several), 2)
  with compiled() as names:
    one = several.unstack()[1]
    assert runs.holding("not finite", {"a": one.variables, "b": {"x": np.array([np.inf])}}) == ["b"]
    assert runs.holding("nan", {"a": one.variables, "b": {"x": np.array([np.inf])}}) == []
  assert names == []
  for own, whole in zip(*map(jax.tree.leaves, (one.variables, model.variables)), strict=True):
    assert own.tolist() == whole.tolist()


def test_a_sweeps_teacher_runs_when_its_outputs_are_needed():
  model, source, _ = parts()
  learners = [(model.network, as_objective(recipes.kd()))]
  teacher = teachers.frozen(model)
  with compiled() as names:
    (made,) = _shared_teacher.share_teacher(learners, teacher, [source], 2**20)
    logits = made.shared[1]["logits"]
    assert isinstance(logits, _compile.Deferred)
    assert logits.shape == (40, 3)
    found = _compile.computed(made.shared)[1]["logits"]
  assert names.count("outputs") == 1
  expected = teachers.cached(teacher, source, progress=None).shared[1]["logits"]
  assert found.tolist() == expected.tolist()


@pytest.mark.slow
def test_an_objective_may_branch_on_a_keyword_that_is_not_swept():
  """What is swept is traced; the others are the numbers that they are, in training and before."""
  model, source, batches = parts()

  def mine(student, teacher, batch, *, temperature=4.0, squared=True):
    scale = temperature**2 if squared else 1.0
    return {"soft": Term(scale * losses.soft_target_kl(student.logits, teacher.logits))}

  result = search.sweep(
    model.network,
    mine,
    points=search.product(temperature=[1, 2]),
    data=source,
    optimizer=optax.sgd(0.1),
    steps=5,
    choice=search.Choice(batches),
    teacher=teachers.frozen(model),
    run=Run(progress=None),
  )
  assert [row.status for row in result.rows] == ["finished"] * 2


def test_a_sweeps_teacher_that_puts_out_nan_says_so():
  model, source, _ = parts()
  broken = jax.tree.map(lambda leaf: leaf * jnp.nan, teachers.frozen(model))
  learners = [(model.network, as_objective(recipes.kd()))]
  (made,) = _shared_teacher.share_teacher(learners, broken, [source], 2**20)
  with pytest.raises(ValueError, match="logits in view 0 hold NaN"):
    _compile.computed(made.shared)


@pytest.mark.slow_but("20-2")
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("steps", [20, 1200])
def test_a_sweep_compiles_four_programs_once_each(devices, steps):
  model, source, batches = parts()
  _compile._known()
  with compiled() as names:
    search.sweep(
      model.network,
      recipes.kd(),
      points=search.product(temperature=[1, 2]),
      seeds=range(3),
      data=source,
      optimizer=optax.adam(1e-2),
      steps=steps,
      choice=search.Choice(batches),
      teacher=teachers.frozen(model),
      execution=search.Execution(devices=jax.devices()[:devices]),
      run=Run(progress=None),
    )
  assert sorted(names) == ["chunk", "evaluation", "initial_state", "outputs"]


def test_a_states_seed_is_the_key_that_jax_makes_of_it():
  model, source, _ = parts()
  for seed in (0, 5, 2**31, 2**32 - 1):
    plan = Plan.of(
      model.network, recipes.labels(), data=source, optimizer=optax.sgd(0.1), steps=1, seed=seed
    )
    program = Program(plan, with_jit(), longest=1)
    _, _, key = jax.random.split(jax.random.key(seed), 3)
    assert jax.random.key_data(program.initial().key).tolist() == jax.random.key_data(key).tolist()


def pooled_similarity(x, y):
  """A loss whose gradient asks which entry is the maximum of what was computed: [4, 4, 3] each."""

  def similarity(maps):
    highest = jnp.max(maps.reshape(2, 2, 2, 2, 3), axis=(1, 3)).reshape(4, 3)
    return (highest / jnp.linalg.norm(highest, axis=1, keepdims=True)).sum(axis=0)

  return jnp.sum((similarity(1.3 * x + jnp.sin(x)) - similarity(y)) ** 2)


def test_a_gradient_through_a_maximum_is_that_of_each_operation_by_itself():
  """XLA's optimisation level 0 computes the maximum's entries twice, and rounds them apart."""
  x, y = np.random.default_rng(0).normal(size=(2, 50, 4, 4, 3)).astype(np.float32)
  gradient = jax.vmap(jax.grad(pooled_similarity))
  with jax.disable_jit():
    alone = gradient(x, y)
  once = _compile.CompiledOnce(gradient)
  once.compile(x, y, calls=1)
  told = _compile.CompiledOnce(gradient)
  told.compile(x, y, options=_compile.quick())
  for program in (once, told, _compile.quickly(gradient)):
    # float32 in another order; entries are of about 1.
    np.testing.assert_allclose(program(x, y), alone, rtol=1e-4, atol=1e-4)
