"""Networks in parts: rules, what follows them, what is refused; on two devices, and on eight."""

import inspect
import os
import pathlib
import subprocess
import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax._src import array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import small_networks
from jaxdistill import data, evaluation, networks, recipes, runs, teachers, train
from jaxdistill.train import _mesh, _program, _sharding
from jaxdistill.types import Model

TREE = {
  "params": {
    "embed": {"embedding": np.zeros((32, 16), np.float32)},
    "Dense_0": {"kernel": np.zeros((16, 24), np.float32), "bias": np.zeros(24, np.float32)},
    "Dense_1": {"kernel": np.zeros((24, 3), np.float32), "bias": np.zeros(3, np.float32)},
  },
  "batch_stats": {"BatchNorm_0": {"mean": np.zeros(24, np.float32)}},
}


def a_mesh(**axes):
  """One for rules alone: as many axes as are wanted, of devices that nothing is put on."""
  device = types.SimpleNamespace(process_index=0, platform="cpu")
  devices = np.full(tuple(axes.values()), device, object)
  made = types.SimpleNamespace(shape=axes, axis_names=tuple(axes), devices=devices)
  return made


def specs(rules, names=None, tree=TREE, **axes):
  told = _sharding._told(_sharding._named(tree), names or {})
  mesh = a_mesh(**(axes or {"data": 2, "model": 4}))
  with small_networks.untyped():
    found = _sharding._decided("sharding", rules, told, mesh)
  return {"/".join(path): spec for path, spec in found.items()}


def test_the_first_rule_that_is_found_in_a_path_is_taken():
  first = {"Dense_0/kernel": P(None, "model"), "kernel$": P("model"), "^batch_stats": P()}
  found = specs(first)
  assert found["params/Dense_0/kernel"] == P(None, "model")
  assert found["params/Dense_1/kernel"] == P("model")
  # On every device on purpose, and by no rule: the two are told apart, and only the last is listed.
  assert found["batch_stats/BatchNorm_0/mean"] == P()
  assert found["params/Dense_0/bias"] is None
  assert found == specs(list(first.items()))
  both = specs({"embed": P(("data", "model"))}, data=2, model=4)
  assert both["params/embed/embedding"] == P(("data", "model"))


def test_fsdp_cuts_the_largest_axis_that_divides():
  found = specs(train.fsdp(), data=2, fsdp=8)
  assert found == {
    "params/embed/embedding": P("fsdp"),
    "params/Dense_0/kernel": P(None, "fsdp"),
    "params/Dense_0/bias": P("fsdp"),
    "params/Dense_1/kernel": P("fsdp"),
    "params/Dense_1/bias": None,
    "batch_stats/BatchNorm_0/mean": P("fsdp"),
  }
  # 24 does not divide by 16: the other axis is cut where that one does.
  found = specs(train.fsdp(["data", "fsdp"]), data=2, fsdp=8)
  assert found["params/Dense_0/kernel"] == P(("data", "fsdp"))
  assert found["params/Dense_1/kernel"] is None
  assert specs(train.fsdp(least=1025), data=2, fsdp=8)["params/Dense_0/kernel"] is not None
  assert specs(train.fsdp(least=2000), data=2, fsdp=8)["params/Dense_0/kernel"] is None
  square = {"a": np.zeros((8, 8), np.float32), "b": np.float32(0)}
  assert specs(train.fsdp(), tree=square, fsdp=8) == {"a": P(None, "fsdp"), "b": None}


@pytest.mark.parametrize(
  ("rules", "match"),
  [
    ({"Dense_7": P("model")}, "rule 'Dense_7', which matches no variable; there are batch_stats/"),
    ({".": P(), "kernel": P("model")}, "rule 'kernel' behind others"),
    ({"embed": P("modle")}, r"embedding \[32, 16\].*'modle'.*no axis of the mesh.*'model': 4"),
    ({"Dense_1/kernel": P(None, "model")}, r"Dense_1/kernel \[24, 3\].*axis 1 of 3.*by 4"),
    ({"Dense_0": P(None, "model")}, r"Dense_0/bias \[24\] has 1 axes, and its rule .* of 2"),
    ({"Dense_0/kernel": P("model", "model")}, r"names \['model'\] twice"),
    ({"Dense_0/kernel": P(("model", "model"))}, "twice|does not divide"),
    (train.fsdp("shard"), "no axis of the mesh"),
    ({"(": P("model")}, "no regular expression"),
    ({}, "got none"),
  ],
)
def test_a_rule_that_does_not_fit_names_the_parameter_and_what_to_do(rules, match):
  with pytest.raises(ValueError, match=match):
    specs(rules)


@pytest.mark.parametrize("rules", [3, "fsdp", {"kernel": "model"}, [("kernel",)], {3: P()}])
def test_what_is_no_rule_is_refused(rules):
  with small_networks.untyped(), pytest.raises(TypeError, match=r"must be train\.fsdp\(\)"):
    train.with_jit(sharding=rules)


def test_a_rule_of_ones_own_is_a_function_of_the_variable():
  def wide(variable, mesh):
    return P(*[None] * (len(variable.shape) - 1), "model") if variable.bytes > 600 else None

  found = specs(wide)
  assert found["params/Dense_0/kernel"] == P(None, "model")
  assert found["params/Dense_0/bias"] is None
  with pytest.raises(TypeError, match="must give a PartitionSpec"):
    specs({"kernel": lambda variable, mesh: "model"})


class Named(nn.Module):
  """A Linen module that names its axes: the mesh's, or its own."""

  logical: bool = False

  @nn.compact
  def __call__(self, x):
    how = nn.with_logical_partitioning if self.logical else nn.with_partitioning
    start = how(nn.initializers.lecun_normal(), ("width", "model"))
    x = nn.relu(nn.Dense(8, kernel_init=start)(x))
    return nn.Dense(4)(x)


@pytest.mark.parametrize("logical", [False, True])
def test_the_names_that_a_linen_module_gives_are_rules(logical):
  network = networks.linen(Named(logical))
  shape = jax.ShapeDtypeStruct((2, 6), jnp.float32)
  assert network.axes(shape) == {"params/Dense_0/kernel": ("width", "model")}
  assert networks.mixed_precision(network).axes(shape) == network.axes(shape)
  cohort = networks.cohort({"a": network, "b": networks.linen(nn.Dense(4))})
  assert cohort.axes(shape) == {"params/a/Dense_0/kernel": ("width", "model")}
  variables = jax.eval_shape(network.init, jax.random.key(0), shape)
  found = specs(train.annotated({"width": None}), network.axes(shape), variables)
  assert found["params/Dense_0/kernel"] == P(None, "model")
  assert found["params/Dense_1/kernel"] is None
  mapped = train.annotated([("width", "data"), ("model", None)])
  assert specs(mapped, network.axes(shape), variables)["params/Dense_0/kernel"] == P("data", None)
  with pytest.raises(ValueError, match=r"\['width'\] are neither.*annotated\(\{'width': 'model'\}"):
    specs(train.annotated(), network.axes(shape), variables)


def test_the_names_that_an_nnx_module_gives_are_rules():
  def build(rngs):
    start = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
    with nnx.use_eager_sharding(False):
      return nnx.Linear(6, 4, kernel_init=start, rngs=rngs)

  network = networks.nnx(build)
  assert network.axes(None) == {"params/kernel": (None, "model")}
  kernel = {"params": {"kernel": np.zeros((6, 4), np.float32)}}
  found = specs(train.annotated(), network.axes(None), kernel)
  assert found == {"params/kernel": P(None, "model")}


def test_a_mesh_has_the_axes_that_are_named():
  devices = jax.devices()[:2]
  assert dict(train.mesh(fsdp=2, devices=devices).shape) == {"data": 1, "fsdp": 2}
  assert dict(train.mesh(data=2, model=1, devices=devices).shape) == {"data": 2, "model": 1}
  assert dict(train.mesh(devices=devices).shape) == {"data": 2}
  assert set(train.mesh(fsdp=2, devices=devices).axis_types) == {AxisType.Auto}
  with pytest.raises(ValueError, match=r"'data': 2, 'fsdp': 2\} are of 4 devices, and there are 2"):
    train.mesh(data=2, fsdp=2, devices=devices)
  with pytest.raises(ValueError, match="of 0 devices|are of"):
    train.mesh(fsdp=3, devices=devices)
  with pytest.raises(ValueError, match="batch_axes='model' must be axes of the mesh"):
    train.with_jit(train.mesh(model=2, devices=devices), batch_axes="model")


@pytest.mark.parametrize(
  ("axes", "over", "owners", "parts"),
  [
    ({"data": 4}, ("data",), [0, 0, 1, 1], [(0, 2), (1, 2)]),
    # The parts of a network lie in two processes, which read the same rows.
    ({"data": 2, "model": 2}, ("data",), [0, 1, 0, 1], [(0, 1), (0, 1)]),
    ({"data": 2, "model": 2}, ("data",), [0, 0, 1, 1], [(0, 2), (1, 2)]),
    ({"data": 2, "fsdp": 2}, ("data", "fsdp"), [0, 0, 1, 1], [(0, 2), (1, 2)]),
    ({"model": 2, "data": 2}, ("data",), [0, 1, 0, 1], [(0, 2), (1, 2)]),
    ({"data": 4}, ("data",), [0, 1, 0, 1], None),
    ({"data": 4}, ("data",), [0, 0, 0, 1], None),
  ],
)
def test_processes_that_hold_parts_of_one_network_read_the_same_rows(
  axes, over, owners, parts, monkeypatch
):
  mesh = a_mesh(**axes)
  devices = np.empty(4, object)
  devices[:] = [types.SimpleNamespace(process_index=p) for p in owners]
  mesh.devices = devices.reshape(tuple(axes.values()))
  part = inspect.unwrap(_mesh._part)  # without the tests' check of types: the devices are made up
  for process in (0, 1):
    monkeypatch.setattr(jax, "process_index", lambda process=process: process)
    if parts is None:
      with pytest.raises(ValueError, match="same number of devices of each process"):
        part(mesh, over)
    else:
      assert part(mesh, over) == parts[process]


class Looking(nn.Module):
  """One that looks into its variables itself, beside one that asks for them."""

  @nn.compact
  def __call__(self, x):
    x = nn.WeightNorm(nn.Dense(4))(x)
    return nn.Dense(3)(x)


class Stack(nn.Module):
  """Layers under a scan, and one beside it."""

  @nn.compact
  def __call__(self, x):
    layers = nn.scan(
      lambda layer, x, _: (layer(x), None),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=5,
    )
    x, _ = layers(nn.Dense(6, name="layer"), x, None)
    return nn.Dense(3, name="head")(x)


@pytest.mark.parametrize("module", [Stack(), Looking()])
def test_parameters_are_read_where_they_are_used(module):
  network = networks.linen(module)
  x = jnp.ones((2, 6))
  shapes = jax.eval_shape(network.init, jax.random.key(0), x)
  leaves = _sharding._named({"params": shapes["params"]})
  specs = {"/".join(path): (None, "fsdp") for path in leaves if path[-1] == "kernel"}
  seen = []

  def read(leaf, spec):
    seen.append((leaf.shape, spec))
    return 2 * leaf

  @jax.jit
  def both(variables):
    doubled = jax.tree_util.tree_map_with_path(
      lambda p, leaf: 2 * leaf if p[-1].key == "kernel" else leaf, variables["params"]
    )
    using = network.at_use(specs, read).apply(variables, x, train=False, key=None)[0]
    wanted = network.apply({**variables, "params": doubled}, x, train=False, key=None)[0]
    return using.logits, wanted.logits

  found, wanted = both(small_networks.drawn(shapes))
  np.testing.assert_allclose(found, wanted, rtol=1e-5)
  assert ((6, 3) if isinstance(module, Stack) else (4, 3), (None, "fsdp")) in seen
  if isinstance(module, Stack):  # one layer's, without the axis over layers; never all of them
    assert ((6, 6), ("fsdp",)) in seen
    assert all(shape != (5, 6, 6) for shape, _ in seen)


SIZE, WIDTH = 8, 16


def source(batch_size=4):
  rng = np.random.default_rng(0)
  inputs = rng.normal(size=(SIZE, 6)).astype(np.float32)
  labelled = np.array([1, 1, 1, 0, 1, 1, 0, 1], np.float32)
  examples = data.from_arrays(inputs, rng.integers(0, 3, SIZE), num_classes=3)
  return data.on_device(examples, batch_size=batch_size, data_seed=0, labelled=labelled)


def taught(**how):
  network = small_networks.dense(WIDTH)
  shapes = jax.eval_shape(network.init, jax.random.key(1), jnp.zeros((1, 6)))
  return teachers.frozen(Model(network, small_networks.drawn(shapes)), **how)


def two(**axes):
  return train.mesh(devices=jax.devices()[:2], **axes)


def fitted(dispatch, *, student=None, steps=3, teacher=None, **how):
  options = {
    "data": source(),
    # No Adam, which makes steps of the rounding of a gradient that is 0: of biases under BatchNorm.
    "optimizer": optax.sgd(0.1, momentum=0.9),
    "steps": steps,
    "teacher": taught() if teacher is None else teacher,
    "average": 0.9,
    "dispatch": dispatch,
    "progress": None,
  }
  objective = recipes.combine(recipes.kd(hard_weight=0.5), recipes.hint("mid", "mid"))
  network = small_networks.dense(8, norm=True) if student is None else student
  return small_networks.fit(network, objective, **{**options, **how})


def bytes_a_device(tree):
  held = {}
  for leaf in jax.tree.leaves(tree):
    for shard in leaf.addressable_shards:
      held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
  return max(held.values())


def size(tree):
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def alone():
  return fitted(train.with_jit(train.data_parallel(jax.devices()[:1])))


def same(found, wanted, within=2e-5):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=within, atol=within)


def test_a_student_in_parts_is_the_one_on_one_device(alone, capsys):
  dispatch = train.with_jit(
    two(fsdp=2), sharding=train.fsdp(), teacher_sharding={"kernel": P(None, "fsdp"), ".": P()}
  )
  with pytest.raises(ValueError, match=r"Dense_1/kernel \[16, 3\].*its axis 1 of 3"):
    fitted(dispatch)
  rules = {"Dense_0/kernel": P(None, "fsdp"), "Dense_1/kernel": P("fsdp"), ".": P()}
  dispatch = train.with_jit(two(fsdp=2), sharding=train.fsdp(), teacher_sharding=rules)
  made = fitted(dispatch, progress="run")
  assert "sharding covers 9 of the student's" in capsys.readouterr().err
  state, wanted = made.state, alone.state
  same((state.params, state.objective_params), (wanted.params, wanted.objective_params))
  same((state.model_state, state.average), (wanted.model_state, wanted.average))
  for line, known in zip(made.history, alone.history, strict=True):
    np.testing.assert_allclose(line["loss"], known["loss"], rtol=2e-5)
  # The head's three biases do not divide; the moments, the average and the projector follow.
  for part in (state.params, state.opt_state, state.average, state.objective_params):
    rest = sum(x.nbytes for x in jax.tree.leaves(part) if 8 % 2 or all(n % 2 for n in x.shape))
    assert bytes_a_device(part) == (size(part) - rest) // 2 + rest
  kernel = state.params["Dense_0"]["kernel"]
  assert state.opt_state[0].trace["Dense_0"]["kernel"].sharding == kernel.sharding
  assert state.average["params"]["Dense_0"]["kernel"].sharding == kernel.sharding
  assert not kernel.is_fully_replicated


def test_parameters_that_no_rule_covers_are_listed_with_their_bytes():
  rules = {"sharding": {"Dense_0/kernel": P(None, "model")}, "teacher_sharding": {"kernel": P()}}
  dispatch = train.with_jit(two(model=2), **rules)
  how = {"data": source(), "optimizer": optax.adafactor(1e-2), "steps": 1, "teacher": taught()}
  plan = train.Plan.of(small_networks.dense(8), recipes.kd(), **how)
  plan, (teacher,) = _program.with_teacher_placed(plan, dispatch)
  student, optimizer = train.Program(plan, dispatch, longest=1).layout.said
  assert "covers 1 of" in student
  assert "params/Dense_1/kernel [8, 3] 96" in student
  assert "params/Dense_0/kernel" not in student
  # Adafactor keeps a number for each row, and lies on every device with it.
  assert "of no parameter's shape" in optimizer
  assert "params/Dense_0/bias [16] 64" in teacher
  assert "kernel" not in teacher


def test_a_teacher_in_parts_is_moved_once_and_kept_in_its_dtype():
  mesh = two(model=2)
  teacher = taught(dtype=jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(teacher.variables)} == {jnp.dtype(jnp.bfloat16)}
  rules = {"Dense_0/kernel": P(None, "model"), "Dense_1/kernel": P("model"), ".": P()}
  # By device_put, as a user has it: a tree of shardings.
  placed = jax.device_put(teacher, train.shardings(teacher, mesh, rules))
  kernel = placed.variables["params"]["Dense_0"]["kernel"]
  assert kernel.sharding.spec == P(None, "model")
  how = {"data": source(), "optimizer": optax.sgd(0.1), "steps": 1, "teacher": placed}
  plan = train.Plan.of(small_networks.dense(8), recipes.kd(), **how)
  for rules_of_the_run in (None, train.fsdp("model")):
    # In parts on the mesh already: it stays as it is, whatever the run's rules say.
    dispatch = train.with_jit(mesh, teacher_sharding=rules_of_the_run)
    program = train.Program(plan, dispatch, longest=1)
    assert program._fixed()[0].variables["params"]["Dense_0"]["kernel"] is kernel
  # What is whole on every device of the mesh is cut where its rules cut it, and else stays.
  whole = jax.device_put(teacher, NamedSharding(mesh, P()))
  sharding = _sharding.Sharding(mesh, ("data",), None, rules)
  cut, _ = sharding.of_teacher(whole, dict)
  assert cut.variables["params"]["Dense_0"]["kernel"].sharding.spec == P(None, "model")
  assert cut.variables["params"]["Dense_1"]["bias"] is whole.variables["params"]["Dense_1"]["bias"]


def test_what_follows_a_parameter_is_told_by_path_and_shape():
  mesh = two(model=2)
  cut, everywhere = NamedSharding(mesh, P("model")), NamedSharding(mesh, P())
  known = {("a", "kernel"): ((4, 2), cut), ("kernel",): ((8,), cut)}
  layout = _sharding.Layout(types.SimpleNamespace(step=everywhere), known, ())
  tree = {
    "mu": {"a": {"kernel": np.zeros((4, 2))}, "kernel": np.zeros(8)},
    "row": {"a": {"kernel": np.zeros(4)}},  # factored: of another shape than its parameter
    "count": np.zeros(()),
  }
  found = layout.follow(tree)
  assert found["mu"]["a"]["kernel"] is cut
  assert found["mu"]["kernel"] is cut
  assert found["row"]["a"]["kernel"] is everywhere
  assert found["count"] is everywhere


def test_nan_is_found_in_trees_that_lie_on_several_meshes():
  one = jax.device_put(jnp.array([1.0, np.nan]), NamedSharding(two(data=2), P("data")))
  back = Mesh(np.array(jax.devices()[:2][::-1]), ("data",), axis_types=(AxisType.Auto,))
  other = jax.device_put(jnp.ones(2), NamedSharding(back, P("data")))
  trees = {"other": other, "one": {"a": other, "b": one}, "third": jnp.ones(2)}
  assert runs.holding("nan", trees) == ["one"]


def test_what_looks_at_every_number_of_an_array_in_parts_leaves_it_there(monkeypatch):
  whole = {"a": jnp.arange(12.0).reshape(4, 3), "b": jnp.ones(6, jnp.bfloat16)}
  cut = {n: jax.device_put(x, NamedSharding(two(data=2), P("data"))) for n, x in whole.items()}
  wanted = runs.fingerprint(whole)
  fetched, value = [], array.ArrayImpl._value
  noted = property(lambda self: (fetched.append(self.shape), value.fget(self))[1])
  monkeypatch.setattr(array.ArrayImpl, "_value", noted)
  assert runs.fingerprint(cut) == wanted
  assert runs.holding("not finite", {"cut": cut}) == []
  assert fetched
  assert not {x.shape for x in cut.values()} & set(fetched)


def test_a_model_in_parts_is_evaluated_where_it_lies():
  x = np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)
  split = data.from_arrays(x, np.arange(4) % 3, num_classes=3)
  batches = data.evaluation_batches(split, batch_size=4)
  teacher = taught()
  model = Model(small_networks.dense(WIDTH), teacher.variables)
  at = train.shardings(model, two(model=2), train.fsdp("model"))
  found = evaluation.evaluate(jax.device_put(model, at), batches)
  for name, value in evaluation.evaluate(model, batches).items():
    np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)


def test_rules_without_what_they_are_for_are_refused():
  dispatch = train.with_jit(two(model=2), teacher_sharding=train.fsdp("model"))
  with pytest.raises(ValueError, match="teacher_sharding is for a teacher"):
    small_networks.fit(
      small_networks.dense(4),
      recipes.labels(),
      data=source(),
      optimizer=optax.sgd(0.1),
      steps=1,
      dispatch=dispatch,
    )


@pytest.mark.slow
def test_on_eight_devices():
  """`eight_devices.py`, in a process that has them."""
  here = pathlib.Path(__file__).parent
  flags = "--xla_force_host_platform_device_count=8"
  command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "", "-p", "no:cacheprovider"]
  done = subprocess.run(
    [*command, str(here / "eight_devices.py")],
    cwd=here.parent.parent,
    env={**os.environ, "XLA_FLAGS": flags},
    capture_output=True,
    text=True,
    timeout=3600,
  )
  assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
