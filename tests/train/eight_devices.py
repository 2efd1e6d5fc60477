"""Networks in parts over eight devices; run by `test_sharding.py` in a process that has them.

Loss, gradients and parameters of three steps are those of one device: a ResNet with its statistics,
a vision transformer and the decoder, the student cut by one set of rules and the teacher by others.
"""

import functools
import gc
import os
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax._src import array
from jax.sharding import PartitionSpec as P

import small_networks
from jaxdistill import data, export, losses, networks, recipes, runs, teachers, train
from jaxdistill.networks import models
from jaxdistill.types import Head, Model, Outputs, Term, make_batch

assert jax.device_count() == 8, "run by test_sharding.py, with eight devices"

WITHIN = {"float32": 2e-5, "float64": 1e-10}  # sums over shares in another order
RATE = 0.05


def decoder(width, dtype, *, layers=2, vocabulary=64, **how):
  config = models.decoder.DecoderConfig(
    vocabulary, width, layers=layers, heads=8, kv_heads=8, head_dim=8, hidden=2 * width, **how
  )  # fmt: skip
  return networks.linen(models.Decoder(config, dtype=dtype, param_dtype=dtype))


def network(kind, width, dtype):
  how = {"dtype": dtype, "param_dtype": dtype}
  if kind == "resnet":
    widths = (width // 2, width // 2, width, width)
    return networks.linen(models.ResNet(depth=8, num_classes=8, width=widths, **how))
  if kind == "mlp":
    return small_networks.dense(width, classes=8, norm=True, param_dtype=dtype)
  if kind == "vit":
    vit = models.VisionTransformer(
      patch_size=4, width=width, depth=2, num_heads=8, num_classes=8, **how
    )
    return networks.linen(vit)
  return decoder(width, dtype)


@functools.cache
def source(kind, dtype):
  rng = np.random.default_rng(0)
  if kind == "decoder":
    words = rng.integers(0, 64, (32, 9)).astype(np.int32)
    weight = (np.arange(8) < rng.integers(3, 9, (32, 1))).astype(dtype)
    examples = data.from_arrays(words[:, :-1], words[:, 1:], num_classes=64, weight=weight)
    return data.on_device(examples, batch_size=16, data_seed=0)
  images = rng.normal(size=(32, 8, 8, 3)).astype(dtype)
  examples = data.from_arrays(images, rng.integers(0, 8, 32), num_classes=8)
  labelled = (rng.random(32) < 0.7).astype(dtype)
  return data.on_device(examples, batch_size=16, data_seed=0, labelled=labelled)


@functools.cache
def taught(kind, dtype):
  return taught_of(network(kind, 32, dtype), train.inputs_of(source(kind, dtype)))


def taught_of(made, inputs):
  shapes = jax.eval_shape(made.init, jax.random.key(1), inputs)
  drawn = small_networks.drawn(shapes, scale=0.1)
  statistics = {n: jax.tree.map(lambda x: 1 + abs(x), drawn[n]) for n in drawn if n != "params"}
  return teachers.frozen(Model(made, {**drawn, **statistics}))


def noting_gradients():
  """Plain SGD whose state is the last gradient, which lies as the parameters do."""

  def update(gradients, state, params=None):
    del state, params
    return jax.tree.map(lambda g: -RATE * g, gradients), gradients

  return optax.GradientTransformation(lambda p: jax.tree.map(jnp.zeros_like, p), update)


def fitted(kind, dtype, dispatch, **how):
  options = {
    "data": source(kind, dtype),
    "optimizer": noting_gradients(),
    "steps": 3,
    "teacher": taught(kind, dtype),
    "dispatch": dispatch,
    "log_every": 1,
    "progress": None,
    **how,
  }
  objective = recipes.kd(hard_weight=0.5)
  return small_networks.fit(network(kind, 16, dtype), objective, **options)


@functools.cache
def alone(kind, dtype):
  made = fitted(kind, dtype, train.with_jit(train.data_parallel(jax.devices()[:1])))
  return jax.device_get((made.state.params, made.state.opt_state, made.state.model_state)), [
    line["loss"] for line in made.history
  ]


def close(found, wanted, within):
  """Asserts it, and gives the largest difference."""
  most = 0.0
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True
  ):
    # Of the array's own size: gradients are small.
    scale = max(1e-3, float(np.max(np.abs(b), initial=0)))
    off = float(np.max(np.abs(np.asarray(a) - b), initial=0)) / scale
    assert off < within, (jax.tree_util.keystr(path), off)
    most = max(most, off)
  return most


# Tensor parallelism by hand: heads and hidden channels are cut, where made and where summed up.
TENSOR = {
  "(query|key|value)/kernel": P(None, "model"),
  "attention/out/kernel": P("model"),
  "(gate|up)/kernel": P(None, "model"),
  "down/kernel": P("model"),
  "embed|head": train.fsdp("model"),
  "norm": P(),
}
MESHES = [("fsdp", 1), *((second, n) for second in ("fsdp", "model") for n in (2, 4, 8))]
CASES = [
  pytest.param(kind, dtype, second, parts, id=f"{kind} {dtype} {8 // parts}x{parts} {second}")
  for kind in ("resnet", "vit", "decoder")
  for dtype in WITHIN
  for second, parts in MESHES
]


@pytest.mark.parametrize(("kind", "dtype", "second", "parts"), CASES)
def test_three_steps_are_those_of_one_device(kind, dtype, second, parts):
  with jax.enable_x64(dtype == "float64"):
    mesh = train.mesh(data=8 // parts, **{second: parts})
    if second == "fsdp":  # the teacher along the other axis
      student, teacher = train.fsdp(), train.fsdp(["data", "fsdp"])
    else:
      student = TENSOR if kind == "decoder" else train.fsdp("model")
      teacher = train.fsdp("data")
    made = fitted(kind, dtype, train.with_jit(mesh, sharding=student, teacher_sharding=teacher))
    (params, gradients, statistics), losses = alone(kind, dtype)
    within = WITHIN[dtype]
    off = {
      "loss": close([line["loss"] for line in made.history], losses, within),
      "parameters": close(made.state.params, params, within),
      "gradients": close(made.state.opt_state, gradients, within),
      "statistics": close(made.state.model_state, statistics, within),
    }
    print({name: f"{value:.1e}" for name, value in off.items()})  # pytest -rP shows it
    if parts > 1:
      assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(made.state.params))


def held(tree):
  """The most bytes on a device."""
  found = dict.fromkeys(jax.devices(), 0)
  for leaf in jax.tree.leaves(tree):
    for shard in leaf.addressable_shards:
      found[shard.device] += shard.data.nbytes
  return max(found.values())


def size(tree):
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def pointers(tree):
  leaves = jax.tree.leaves(tree)
  return [shard.data.unsafe_buffer_pointer() for x in leaves for shard in x.addressable_shards]


@pytest.mark.parametrize("kind", ["resnet", "vit", "decoder"])
def test_a_device_holds_an_eighth_and_the_teacher_is_there_once(kind, monkeypatch):
  mesh = train.mesh(fsdp=8)
  large = Model(network(kind, 32, "float32"), taught(kind, "float32").variables)
  teacher = teachers.frozen(large, dtype=jnp.bfloat16)
  placed = jax.device_put(teacher, train.shardings(teacher, mesh, train.fsdp()))
  params = placed.variables["params"]
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
  assert held(params) <= size(params) / 8
  del teacher
  gc.collect()

  def of_the_teacher():
    every = [x for x in jax.live_arrays() if x.dtype == jnp.bfloat16]
    return sum(x.nbytes for x in every if len(x.sharding.device_set) == 8)

  there, before, seen, fetched = of_the_teacher(), pointers(params), [], []
  value = array.ArrayImpl._value

  def noted(self):
    fetched.append((self.nbytes, self.dtype))
    return value.fget(self)

  monkeypatch.setattr(array.ArrayImpl, "_value", property(noted))
  made = fitted(
    kind,
    "float32",
    train.with_jit(mesh, sharding=train.fsdp(), teacher_sharding=train.fsdp()),
    teacher=placed,
    optimizer=optax.adam(1e-3),
    callback=lambda step, line: seen.append(of_the_teacher()),
  )
  assert fetched, "nothing was counted: the loss at least comes to the host"
  assert not [n for n, dtype in fetched if dtype == jnp.bfloat16], "the teacher was on the host"
  # Labels, what the teacher says of 32 images, sums: not what the student has, nor its optimiser.
  assert sum(n for n, _ in fetched) < size(made.state.params) / 4, fetched
  assert pointers(params) == before
  assert seen == [there] * 3
  parts = {"parameters": made.state.params, "optimizer": made.state.opt_state, "teacher": params}
  for part in (made.state.params, made.state.opt_state):
    assert held(part) <= 1.15 * size(part) / 8
  print({name: (held(part), f"{8 * held(part) / size(part):.3f}") for name, part in parts.items()})


def test_several_seeds_in_parts_are_those_of_one_device():
  """An axis over students in front is never cut; accumulated gradients, and an NNX student."""
  from flax import nnx

  def build(rngs):
    layers = nnx.Linear(192, 16, rngs=rngs), nnx.relu, nnx.Linear(16, 8, rngs=rngs)
    return nnx.Sequential(lambda x: x.reshape(x.shape[0], -1), *layers)

  def of(dispatch):
    return small_networks.fit(
      networks.nnx(build),
      recipes.kd(),
      data=[source("mlp", "float32")] * 2,
      optimizer=optax.sgd(RATE),
      steps=2,
      seed=[0, 1],
      accumulate=2,
      teacher=taught("mlp", "float32"),
      dispatch=dispatch,
      progress=None,
    )

  one = of(train.with_jit(train.data_parallel(jax.devices()[:1])))
  made = of(train.with_jit(train.mesh(fsdp=8), sharding=train.fsdp()))
  close(made.variables, jax.device_get(one.variables), 2e-5)
  cut = [leaf.sharding.spec for leaf in jax.tree.leaves(made.state.params)]
  assert all(not spec or spec[0] is None for spec in cut)
  assert any("fsdp" in spec for spec in cut)


def gathered(compiled):
  """The shapes of all that a program gathers."""
  found = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", compiled.as_text())
  return {tuple(int(n) for n in shape.split(",") if n) for shape in found}


@pytest.mark.parametrize("scan", [False, True])
def test_a_teachers_layers_are_gathered_one_at_a_time(scan):
  made = decoder(64, "float32", scan=scan, layers=6)
  tokens = jax.ShapeDtypeStruct((16, 8), jnp.int32)
  shapes = jax.eval_shape(made.init, jax.random.key(1), tokens)
  teacher = teachers.frozen(Model(made, small_networks.drawn(shapes, scale=0.1)))
  options = {"data": source("decoder", "float32"), "optimizer": optax.sgd(0.1), "steps": 1}
  plan = train.Plan.of(decoder(16, "float32"), recipes.kd(), teacher=teacher, **options)
  mesh = train.mesh(fsdp=8)
  program = train.Program(plan, train.with_jit(mesh, teacher_sharding=train.fsdp()), longest=1)
  program.compile()
  found = gathered(program.whole.compiled())
  layers = shapes["params"]["layers" if scan else "layer_0"]
  one = {leaf.shape[scan:] for leaf in jax.tree.leaves(layers) if leaf.size > 64 * 6}
  # A layer's weights, as they are cut out of those of all layers or as they are; never all of them.
  assert one <= {tuple(n for n in shape if n != 1) for shape in found}
  assert not {(6, *shape) for shape in one} & found
  # And not the batch, [16, 8, 64], in their place.
  assert (16, 8, 64) not in found


def test_a_teacher_in_eight_bits_is_gathered_as_integers():
  """Layer by layer of a scan, by the rules of its floats; a device holds an eighth."""
  made, batches = decoder(64, "float32", scan=True, layers=6), source("decoder", "float32")
  floats = taught_of(made, train.inputs_of(batches))
  teacher = teachers.frozen(Model(made, floats.variables), dtype="int8")
  mesh = train.mesh(fsdp=8)

  def of(dispatch, teacher):
    return fitted("decoder", "float32", dispatch, teacher=teacher)

  one = of(train.with_jit(train.data_parallel(jax.devices()[:1])), teacher)
  placed = jax.device_put(teacher, train.shardings(teacher, mesh, train.fsdp()))
  assert held(placed.variables) <= 1.15 * size(placed.variables) / 8
  rules = {"sharding": train.fsdp(), "teacher_sharding": train.fsdp()}
  cut = of(train.with_jit(mesh, **rules), placed)
  close(cut.state.params, jax.device_get(one.state.params), 2e-5)
  options = {"data": batches, "optimizer": optax.sgd(0.1), "steps": 1, "teacher": placed}
  plan = train.Plan.of(decoder(16, "float32"), recipes.kd(), **options)
  program = train.Program(plan, train.with_jit(mesh, **rules), longest=1)
  program.compile()
  text = program.whole.compiled().as_text()
  kernels = set(re.findall(r"= (\w+)\[(?:1,)?(?:64,128|128,64)\]\S* all-gather", text))
  assert kernels == {"s8"}
  print({"int8": held(placed.variables), "float32": size(floats.variables) // 8})


# A vocabulary of a size that nothing else has, which divides by four.
VOCABULARY = 1004
# Beside `adaptive_kl`, which sorts a vocabulary and so gathers it.
OF_LOGITS = {
  "soft_target_kl": lambda s, t, y: losses.soft_target_kl(s, t),
  "reverse_kl": lambda s, t, y: losses.reverse_kl(s, t),
  "generalized_jsd": lambda s, t, y: losses.generalized_jsd(s, t),
  "total_variation": lambda s, t, y: losses.total_variation(s, t),
  "skew_kl": lambda s, t, y: losses.skew_kl(s, t),
  "skew_reverse_kl": lambda s, t, y: losses.skew_reverse_kl(s, t),
  "alpha_beta": lambda s, t, y: losses.alpha_beta(s, t),
  "negative_log_acceptance": lambda s, t, y: losses.negative_log_acceptance(s, t),
  "cross_entropy": lambda s, t, y: losses.cross_entropy(s, y, label_smoothing=0.1),
  "z_loss": lambda s, t, y: losses.z_loss(s),
  "weighted_soft_labels": losses.weighted_soft_labels,
  "transformed_teacher": lambda s, t, y: losses.transformed_teacher(s, t),
  "logit_l2": lambda s, t, y: losses.logit_l2(s, t),
  "one_for_all": losses.one_for_all,
  "decoupled_kd": losses.decoupled_kd,
  "generalized_decoupled_kd": lambda s, t, y: losses.generalized_decoupled_kd(s, t),
  "normalized_kd": losses.normalized_kd,
  "inter_class_correlation": lambda s, t, y: losses.inter_class_correlation(s, t),
}


def communicated(compiled, size):
  """The results of a program's collectives in which an axis has a size: operations and shapes."""
  kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
  found = re.findall(rf"= (.+?) ({kinds})(?:-start)?\(", compiled.as_text())
  each = ((kind, s) for shapes, kind in found for s in re.findall(r"\[([\d,]+)\]", shapes))
  return {(kind, shape) for kind, shape in each if str(size) in shape.split(",")}


@pytest.mark.parametrize("backward", ["kept", "again"])
@pytest.mark.parametrize("name", OF_LOGITS)
def test_a_vocabulary_in_parts_is_never_put_together(name, backward):
  """Of the head's parts come parts of logits, and sums of those: nothing of the vocabulary's size.

  One pass back to hidden states and head, the teacher's head cut along with the student's.
  """
  rng = np.random.default_rng(0)
  rows, length = 8, 12

  def objective(student, teacher, batch):
    return {name: Term(OF_LOGITS[name](student.logits, teacher.logits, batch.labels))}

  chunked = train.in_chunks(objective, tokens_at_once=32, backward=backward)

  def passed(hidden, kernel, taught, head, labels):
    batch = make_batch(labels, labels, weight=jnp.ones((rows, length)))

    def loss(hidden, kernel):
      student = Outputs(hidden=hidden, head=Head(kernel))
      teacher = Outputs(hidden=taught, head=Head(head, transposed=True))
      terms, _ = chunked.apply({}, {}, student, teacher, batch, key=jax.random.key(0))
      return train.reduce_terms(terms, batch)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, kernel)

  def drawn(*shape, by=1.0):
    return (by * rng.normal(size=shape)).astype(np.float32)

  given = [
    drawn(rows, length, 24),
    drawn(24, VOCABULARY, by=0.3),
    drawn(rows, length, 16),
    drawn(VOCABULARY, 16, by=0.3),
    rng.integers(0, VOCABULARY, (rows, length)).astype(np.int32),
  ]
  mesh = train.mesh(data=2, model=4)
  specs = [P("data"), P(None, "model"), P("data"), P("model"), P("data")]
  where = [jax.NamedSharding(mesh, spec) for spec in specs]
  compiled = jax.jit(passed, in_shardings=where).lower(*given).compile()
  assert not communicated(compiled, VOCABULARY)
  found = compiled(*jax.device_put(given, where))
  assert found[1][1].sharding.is_equivalent_to(where[1], 2)
  print(f"{close(found, jax.device_get(jax.jit(passed)(*given)), 2e-5):.1e}")


@pytest.mark.parametrize("teachers_head", ["in parts", "whole"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_student_with_its_vocabulary_in_parts_is_the_one_on_one_device(tied, teachers_head):
  """Three whole steps: embeddings looked up, the loss in chunks, gradients, accuracy."""
  how = {"vocabulary": VOCABULARY, "tied": tied}
  student, large = decoder(16, "float32", **how), decoder(32, "float32", **how)
  batches = source("decoder", "float32")
  teacher = taught_of(large, train.inputs_of(batches))
  heads = {"embed": P("model"), "head": P(None, "model")}
  rules = {name: heads[name] for name in ("embed", "head")[: 2 - tied]}
  other = {"teacher_sharding": rules} if teachers_head == "in parts" else {}
  options = {
    "data": batches,
    "optimizer": noting_gradients(),
    "steps": 3,
    "teacher": teacher,
    "log_every": 1,
    "progress": None,
  }

  def of(mesh, **rules):
    dispatch = train.with_jit(mesh, tokens_at_once=32, **rules)
    objective = recipes.kd(hard_weight=0.5)
    return small_networks.fit(student, objective, dispatch=dispatch, **options)

  mesh = train.mesh(data=2, model=4)
  made, one = of(mesh, sharding=rules, **other), of(train.data_parallel(jax.devices()[:1]))
  close(made.state.params, jax.device_get(one.state.params), 2e-5)
  close(made.state.opt_state, jax.device_get(one.state.opt_state), 2e-5)
  for name in ("loss", "accuracy"):
    close([line[name] for line in made.history], [line[name] for line in one.history], 2e-5)
  plan = train.Plan.of(
    student,
    recipes.kd(hard_weight=0.5),
    data=batches,
    optimizer=optax.adam(1e-3),
    steps=1,
    teacher=teacher,
    tokens_at_once=32,
  )
  dispatch = train.with_jit(mesh, sharding=rules, tokens_at_once=32, **other)
  program = train.Program(plan, dispatch, longest=1)
  program.compile()
  assert not communicated(program.whole.compiled(), VOCABULARY)


def test_a_vocabulary_that_does_not_divide_is_refused_and_padded():
  student = decoder(16, "float32", vocabulary=66)
  rules = {"head": P(None, "model")}
  dispatch = train.with_jit(train.mesh(data=2, model=4), sharding=rules, tokens_at_once=32)
  how = {"data": source("decoder", "float32"), "optimizer": optax.sgd(0.1), "steps": 1}
  with pytest.raises(ValueError, match=r"params/head \[16, 66\].*its axis 1 of 66"):
    small_networks.fit(student, recipes.labels(), dispatch=dispatch, progress=None, **how)
  # A student of more words than there are, and its teacher's padded to them without probability.
  padded = decoder(16, "float32", vocabulary=68)
  teacher = teachers.vocabulary(taught_of(student, train.inputs_of(how["data"])), 68)
  made = [
    small_networks.fit(padded, recipes.kd(), dispatch=one, teacher=teacher, progress=None, **how)
    for one in (dispatch, train.with_jit(train.data_parallel(jax.devices()[:1])))
  ]
  close(made[0].state.params, jax.device_get(made[1].state.params), 2e-5)


def test_a_checkpoint_in_parts_goes_on_to_the_bit_and_on_other_meshes(tmp_path, monkeypatch):
  rules = {"sharding": train.fsdp(), "teacher_sharding": train.fsdp()}
  options = {"steps": 4, "checkpoint_every": 2, "validate_every": 2, "average": 0.9}

  def at(folder, data_axis, **how):
    over = {"fsdp": 8 // data_axis} if data_axis < 8 else {"fsdp": 1}
    dispatch = train.with_jit(train.mesh(data=data_axis, **over), **rules)
    return fitted("mlp", "float32", dispatch, folder=tmp_path / folder, **options, **how)

  fetched, value = [], array.ArrayImpl._value
  noted = property(lambda self: (fetched.append(self), value.fget(self))[1])
  monkeypatch.setattr(array.ArrayImpl, "_value", noted)
  unbroken = at("unbroken", 4)
  with pytest.raises(train.Stopped):
    at("broken", 4, callback=lambda step, line: step == 2 and os.kill(os.getpid(), signal.SIGTERM))
  for copy in ("8x1", "2x4", "one"):
    shutil.copytree(tmp_path / "broken", tmp_path / copy)
  again = at("broken", 4)
  monkeypatch.undo()
  # Neither a save nor a restore nor a look at the numbers takes the whole of what is in parts; the
  # teacher's outputs for all examples are another thing.
  state = {leaf.shape for leaf in jax.tree.leaves(again.state)}
  assert fetched
  assert not [x.shape for x in fetched if not x.is_fully_replicated and x.shape in state]
  for a, b in zip(jax.tree.leaves(again.state), jax.tree.leaves(unbroken.state), strict=True):
    assert a.sharding == b.sharding
    if not runs.is_key(a):
      np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
  one = train.with_jit(train.data_parallel(jax.devices()[:1]))
  others = [at("8x1", 8), at("2x4", 2)]
  others.append(fitted("mlp", "float32", one, folder=tmp_path / "one", **options))
  for made in others:
    close(made.variables, jax.device_get(unbroken.variables), 2e-5)
  x = np.random.default_rng(2).normal(size=(8, 8, 8, 3)).astype(np.float32)
  deployed = export.load_student(tmp_path / "broken")
  np.testing.assert_allclose(deployed(x), unbroken(x).logits, rtol=1e-5, atol=1e-5)
