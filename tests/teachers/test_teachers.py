"""Teachers: frozen, combined, restored."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

import small_networks
from jaxdistill import data, losses, networks, recipes, runs, teachers, train, types
from jaxdistill.types import Model, Outputs, Teacher, make_batch

BATCH = make_batch(jnp.ones((2, 3)))
LOGITS = np.random.default_rng(0).normal(scale=3, size=(3, 4, 5))


def model(width, *, key=0, **fields):
  network = small_networks.dense(width, **fields)
  return Model(network, network.init(jax.random.key(key), BATCH.inputs))


def over_seeds(width=3):
  network = small_networks.dense(width)
  made = jax.vmap(network.init, (0, None))(jax.random.split(jax.random.key(0)), BATCH.inputs)
  return Model(network, made, 2)


def no_gradient(teacher, batch):
  grads = jax.grad(lambda teacher: jnp.sum(teacher(batch).logits ** 2))(teacher)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0], [0.0, 1.0, 1.0]])
@pytest.mark.parametrize("rule", teachers.RULES)
def test_rules_are_their_formulas(rule, weights):
  share = np.full(3, 1 / 3) if weights is None else np.asarray(weights) / np.sum(weights)
  share = share[:, None, None]
  log_p = special.log_softmax(LOGITS, axis=-1)
  expected = {
    "mean_logits": (share * LOGITS).sum(0),
    "log_mean_probability": np.log((share * np.exp(log_p)).sum(0)),
    "mean_log_probability": (share * log_p).sum(0),
  }[rule]
  combined = teachers.combine_logits(
    list(jnp.asarray(LOGITS, jnp.float32)), rule=rule, weights=weights
  )
  np.testing.assert_allclose(combined, expected, rtol=1e-5, atol=1e-5)  # float32


def test_members_are_combined_before_they_are_tempered():
  """The mean of the members' tempered probabilities is another number, and not the one meant."""
  members = list(jnp.asarray(LOGITS, jnp.float32))
  combined = teachers.combine_logits(members, rule="log_mean_probability")
  tempered = special.softmax(np.asarray(combined) / 4, axis=-1)
  np.testing.assert_allclose(
    tempered, special.softmax(np.log(special.softmax(LOGITS, -1).mean(0)) / 4, -1), rtol=1e-5
  )
  mean_of_tempered = special.softmax(LOGITS / 4, axis=-1).mean(0)
  assert np.abs(tempered - mean_of_tempered).max() > 0.02
  student = jnp.zeros((4, 5))
  value = losses.soft_target_kl(student, combined, temperature=4.0)
  by_hand = 16 * (tempered * (np.log(tempered) - np.log(1 / 5))).sum(-1)
  np.testing.assert_allclose(value, by_hand, rtol=1e-4)


@pytest.mark.parametrize("rule", teachers.RULES)
def test_a_class_that_all_members_exclude_stays_excluded(rule):
  members = [jnp.array([[1.0, -jnp.inf, 0.0]]), jnp.array([[0.0, -jnp.inf, 2.0]])]
  combined = teachers.combine_logits(members, rule=rule, weights=[1.0, 0.0])
  assert combined[0, 1] == -jnp.inf
  assert np.isfinite(combined[0, [0, 2]]).all()


def test_half_precision_members_are_combined_in_float32(strict_promotion):
  members = [jnp.ones((1, 3), jnp.bfloat16), jnp.ones((1, 3), jnp.float32)]
  for rule in teachers.RULES:
    assert teachers.combine_logits(members, rule=rule).dtype == jnp.float32


def test_an_ensemble_of_different_networks_has_every_members_features():
  members = [model(4), model(6, key=1, norm=True)]
  outputs = teachers.ensemble(members, rule="mean_logits", weights=[3, 1])(BATCH)
  assert {n: f.shape for n, f in outputs.features.items()} == {"0/mid": (2, 4), "1/mid": (2, 6)}
  alone = [teachers.frozen(member)(BATCH).logits for member in members]
  np.testing.assert_allclose(outputs.logits, 0.75 * alone[0] + 0.25 * alone[1], rtol=1e-6)


def test_teachers_stop_gradients_and_run_in_inference_mode():
  class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x, *, train: bool):
      x = nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))
      return nn.Dropout(0.5, deterministic=not train)(x)

  network = networks.linen(Noisy())
  batch = make_batch(jnp.arange(6.0).reshape(2, 3))
  variables = network.init(jax.random.key(0), batch.inputs)
  teach = teachers.frozen(Model(network, variables))
  # By hand: averages of 0 and 1, nothing dropped. The batch's own statistics are far from those.
  dense = np.float64(batch.inputs) @ np.float64(variables["params"]["Dense_0"]["kernel"])
  np.testing.assert_allclose(teach(batch).logits, dense / np.sqrt(1 + 1e-5), rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(teach(batch).logits, teach(batch).logits)
  no_gradient(teach, batch)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: teachers.ensemble([]), "members is empty"),
    (lambda: teachers.ensemble([model(3)], rule="mean"), "rule='mean' is unknown"),
    (lambda: teachers.ensemble([model(3)], weights=[1, 2]), r"shape \(2,\).*1 members"),
    (lambda: teachers.ensemble([model(3)], weights=[-1]), "not negative"),
    (lambda: teachers.combine_logits([]), "logits is empty"),
    (lambda: teachers.frozen(over_seeds()), r"holds 2 seeds of .*model\.unstack\(\)"),
  ],
)
def test_bad_ensembles_say_what_to_do(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_members_of_different_class_counts_are_refused():
  with pytest.raises(ValueError, match=r"different class counts: \[3, 4\]"):
    teachers.ensemble([model(3, classes=3), model(3, classes=4)])(BATCH)


def test_a_function_of_the_users_is_frozen_too():
  linear = Teacher(jnp.eye(3), lambda kernel, batch: Outputs(batch.inputs @ kernel))
  no_gradient(linear, BATCH)
  # Nor does one get past its outputs, to what its inputs were made of.
  through = jax.grad(lambda x: linear(make_batch(x)).logits.sum())(BATCH.inputs)
  assert not np.any(through)


def test_a_teacher_is_one_argument_and_compiles_once_for_a_network():
  network = small_networks.dense(4)
  first, second = (
    teachers.frozen(Model(network, network.init(jax.random.key(i), BATCH.inputs))) for i in (0, 1)
  )
  function = jax.jit(lambda teacher, batch: teacher(batch).logits)
  for teacher in (first, second):
    np.testing.assert_allclose(function(teacher, BATCH), teacher(BATCH).logits, rtol=1e-6)
  assert function._cache_size() == 1
  assert function.lower(first, BATCH).in_tree == function.lower(second, BATCH).in_tree
  for make in (
    lambda t: teachers.ensemble([t, t], weights=[1, 3]),
    lambda t: teachers.subset(t, [2, 0]),
    lambda t: teachers.grouped(t, [0, 1, 0]),
  ):
    assert jax.tree.structure(make(first)) == jax.tree.structure(make(second))
  both = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)
  mapped = jax.vmap(lambda teacher: teacher(BATCH).logits)(both)
  np.testing.assert_allclose(mapped[1], second(BATCH).logits, rtol=1e-6)
  there = jax.device_put(first, jax.devices()[-1])
  assert there.apply == first.apply
  assert all(leaf.devices() == {jax.devices()[-1]} for leaf in jax.tree.leaves(there))


def test_a_frozen_model_shares_its_arrays_and_its_members_are_known():
  one, other = model(4), model(6, norm=True)
  inner = teachers.ensemble([teachers.subset(one, [1, 0]), teachers.grouped(other, [0, 1, 0])])
  found = teachers.members_of(teachers.ensemble([inner, inner]))
  assert [member.network for member in found] == [one.network, other.network] * 2
  for member, made in zip(found, [one, other] * 2, strict=True):
    assert all(map(lambda a, b: a is b, *map(jax.tree.leaves, (member.variables, made.variables))))
  assert teachers.members_of(says(np.zeros((2, 3)))) == []
  mixed = teachers.ensemble([one, says(np.zeros((2, 3), np.float32))])
  assert [member.network for member in teachers.members_of(mixed)] == [one.network]


@pytest.mark.parametrize(
  ("make", "match"),
  [
    (lambda network: teachers.frozen(network), "must be a Model"),
    (lambda network: teachers.ensemble([model(3), network]), r"members\[1\].* must be a Model"),
    (lambda network: teachers.subset(network, [0]), "must be a Model .* or a Teacher"),
    (lambda network: teachers.grouped(lambda v, b: Outputs(), [0]), "or a Teacher"),
  ],
)
def test_what_is_no_model_says_so(make, match):
  with small_networks.untyped(), pytest.raises(TypeError, match=match):
    make(small_networks.dense(3))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, [0], [0, 1]])
def test_a_run_is_restored_with_its_seeds(tmp_path, seed):
  examples = data.from_arrays(LOGITS[0].astype(np.float32), np.arange(4) % 3, num_classes=3)
  network = small_networks.dense(3)
  made = train.fit(
    network,
    recipes.labels(),
    data=data.on_device(examples, batch_size=4, data_seed=0),
    optimizer=optax.sgd(0.1),
    steps=2,
    seed=seed,
    run=train.Run(tmp_path / "run", progress=None),
  )
  found = teachers.restore(tmp_path / "run", network)
  assert type(found) is Model
  assert found.network is network
  assert found.seeds == made.seeds == (None if seed == 0 else len(seed))
  jax.tree.map(np.testing.assert_array_equal, found.variables, made.variables)
  assert len(found.unstack()) == len(made.unstack()) == (found.seeds or 1)


def lying_on(mesh, spec, leaf):
  return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec))


def test_a_teachers_leaves_stay_where_and_as_they_are():
  """Sharded over ``data`` or replicated, in bfloat16: the program takes the very buffers."""
  mesh = train.data_parallel()
  spec = jax.sharding.PartitionSpec
  kernel = lying_on(mesh, spec("data"), jnp.ones((4, 3), jnp.bfloat16))
  bias = lying_on(mesh, spec(), jnp.arange(3.0))
  teacher = Teacher(
    {"kernel": kernel, "bias": bias},
    lambda v, batch: Outputs(batch.inputs @ v["kernel"].astype(jnp.float32) + v["bias"][None]),
  )
  before = runs.fingerprint(teacher.variables)
  examples = data.from_arrays(np.ones((8, 4), np.float32), np.arange(8) % 3, num_classes=3)
  given = {
    "data": data.on_device(examples, batch_size=4, data_seed=0),
    "optimizer": optax.sgd(0.1),
    "steps": 2,
    "teacher": teacher,
  }
  student = small_networks.dense(3)
  with jax.transfer_guard_device_to_host("disallow"):  # counts on an accelerator; on a CPU no copy
    plan = train.Plan.of(student, recipes.kd(), **given)
  assert plan.teacher is teacher
  program = train.Program(plan, train.with_jit(mesh), longest=3)
  placed = program._fixed()[0].variables
  assert placed["kernel"] is kernel
  assert placed["bias"] is bias
  shards = [shard.data.unsafe_buffer_pointer() for shard in kernel.addressable_shards]
  train.fit(student, recipes.kd(), **given, run=train.Run(progress=None))
  assert [s.data.unsafe_buffer_pointer() for s in kernel.addressable_shards] == shards
  assert (kernel.dtype, kernel.sharding.spec) == (jnp.bfloat16, spec("data"))
  assert runs.fingerprint(teacher.variables) == before


def test_restoring_from_a_folder_without_a_run_says_so(tmp_path):
  with pytest.raises(FileNotFoundError, match="holds no checkpoints"):
    teachers.restore(tmp_path, small_networks.dense(3))


def says(logits, **features):
  """A teacher that puts these logits out, whatever it sees."""
  return Teacher({}, lambda variables, batch: Outputs(jnp.asarray(logits), features))


GROUPS = {
  "group of each class": [1, 0, 1, 2, 0],
  "classes of each group": [[4, 1], [0, 2], [3]],
}


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_groups_probability_is_the_sum_of_its_classes(groups, scale):
  logits = scale * LOGITS  # [3, 4, 5]: tokens have an axis more
  outputs = teachers.grouped(says(logits.astype(np.float32)), groups)(BATCH)
  fine = np.exp(logits - special.logsumexp(logits, axis=-1, keepdims=True))
  expected = np.stack([fine[..., [1, 4]].sum(-1), fine[..., [0, 2]].sum(-1), fine[..., 3]], -1)
  assert outputs.logits.shape == (3, 4, 3)
  # Logits of some hundreds have a rounding of 1e-5 in float32, and probabilities follow.
  np.testing.assert_allclose(special.softmax(outputs.logits, -1), expected, rtol=1e-4, atol=1e-7)


def test_groups_are_made_before_they_are_tempered():
  outputs = teachers.grouped(says(np.array([[2.0, 2.0, 1.0]], np.float32)), [0, 0, 1])(BATCH)
  value = losses.soft_target_kl(jnp.zeros((1, 2)), outputs.logits, temperature=4.0)
  tempered = special.softmax(np.array([2 + np.log(2), 1]) / 4)
  by_hand = 16 * (tempered * np.log(2 * tempered)).sum()
  np.testing.assert_allclose(value, [by_hand], rtol=1e-4)  # float32, after a cancellation
  # The sum of tempered probabilities would be another target.
  assert abs(tempered[0] - special.softmax(np.array([2, 2, 1]) / 4)[:2].sum()) > 0.05


def test_classes_in_no_group_are_left_out_and_the_rest_renormalised():
  probability = np.array([[0.1, 0.2, 0.3, 0.4]])
  logits = np.log(probability).astype(np.float32)
  coarse = teachers.grouped(says(logits), [[3], [0, 1]])(BATCH).logits
  np.testing.assert_allclose(special.softmax(coarse, -1), [[4 / 7, 3 / 7]], rtol=1e-6)
  fine = teachers.subset(says(logits), [3, 0])(BATCH).logits
  np.testing.assert_allclose(special.softmax(fine, -1), [[0.8, 0.2]], rtol=1e-6)


def test_a_group_that_the_teacher_excludes_stays_excluded():
  logits = np.array([[-np.inf, -np.inf, 0.0, 1.0]], np.float32)
  coarse = teachers.grouped(says(logits), [0, 0, 1, 1])(BATCH).logits
  assert coarse[0, 0] == -np.inf
  np.testing.assert_allclose(coarse[0, 1], np.log(1 + np.e), rtol=1e-6)


def test_half_precision_is_grouped_in_float32(strict_promotion):
  coarse = teachers.grouped(says(jnp.ones((2, 3), jnp.bfloat16)), [0, 0, 1])(BATCH).logits
  assert coarse.dtype == jnp.float32
  np.testing.assert_allclose(coarse[0], [1 + np.log(2), 1], rtol=1e-6)


@pytest.mark.parametrize(
  "narrow",
  [lambda t: teachers.subset(t, [2, 0]), lambda t: teachers.grouped(t, [1, 0, 1])],
  ids=["subset", "grouped"],
)
def test_a_network_is_frozen_and_its_features_pass_through(narrow):
  one = model(4)
  whole, teach = teachers.frozen(one)(BATCH), narrow(one)
  no_gradient(teach, BATCH)
  outputs = teach(BATCH)
  assert outputs.logits.shape == (2, 2)
  np.testing.assert_array_equal(outputs.features["mid"], whole.features["mid"])
  # A teacher made of a teacher is a teacher: an ensemble of narrowed ones, for instance.
  both = teachers.ensemble([teach, narrow(teachers.frozen(one))])(BATCH)
  np.testing.assert_allclose(both.logits, outputs.logits, rtol=1e-6)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda t: teachers.subset(t, []), "classes is empty"),
    (lambda t: teachers.subset(t, [0, 2, 0]), r"classes has \[0\] more than once"),
    (lambda t: teachers.subset(t, [0, -1]), "classes has -1"),
    (lambda t: teachers.subset(t, [True, False, True]), "sequence of integers"),
    (lambda t: teachers.grouped(t, []), "must be the group of each class"),
    (lambda t: teachers.grouped(t, [0, 2, 2]), r"groups \[1\] of 3 have no class"),
    (lambda t: teachers.grouped(t, [[0, 1], []]), r"groups \[1\] of 2 have no class"),
    (lambda t: teachers.grouped(t, [0, -1, 1]), "groups has -1"),
    (lambda t: teachers.grouped(t, [[0, -1], [1]]), r"groups\[0\] has -1"),
    (lambda t: teachers.grouped(t, [[0, 1], [1, 2]]), r"groups has the classes \[1\] more"),
    # At trace time, when the teacher's class count is known.
    (lambda t: teachers.subset(t, [0, 7])(BATCH), r"classes has class \[7\].*has 3"),
    (lambda t: teachers.grouped(t, [[0, 3], [1]])(BATCH), r"groups has class \[3\].*has 3"),
    (lambda t: teachers.grouped(t, [0, 1])(BATCH), "groups has 2 entries.* 3 classes"),
    (
      lambda t: teachers.grouped(t, np.array([0, 1, 0, 1]))(BATCH),
      r"groups has class \[3\].*has 3",
    ),
    (lambda t: teachers.subset(Teacher({}, lambda v, b: Outputs()), [0])(BATCH), "no logits"),
  ],
)
def test_wrong_classes_and_groups_say_what_is_wrong(make, message):
  with pytest.raises(ValueError, match=message):
    make(says(np.zeros((2, 3), np.float32)))


VARIABLES = {
  "params": {
    "encoder": {
      "Dense_3": {"kernel": np.ones((2, 2)), "bias": np.zeros(2)},
      "norm": {"scale": np.ones(2)},
    },
    "head": {"kernel": np.full((2, 3), 5.0)},
  },
  "batch_stats": {"encoder": {"norm": {"mean": np.full(2, 3.0)}}},
}


def test_layers_are_found_with_their_statistics_and_nothing_else():
  start = teachers.layers(
    VARIABLES,
    {"Dense_0": "encoder/Dense_3", "inner/norm": "encoder/norm", "out/kernel": "head/kernel"},
  )
  norm = VARIABLES["params"]["encoder"]["norm"]
  expected = {
    "params": {
      "Dense_0": VARIABLES["params"]["encoder"]["Dense_3"],
      "inner": {"norm": norm},
      "out": VARIABLES["params"]["head"],
    },
    "batch_stats": {"inner": {"norm": VARIABLES["batch_stats"]["encoder"]["norm"]}},
  }
  assert jax.tree.structure(start) == jax.tree.structure(expected)
  for mine, theirs in zip(jax.tree.leaves(start), jax.tree.leaves(expected), strict=True):
    assert mine is theirs


def test_a_path_that_names_its_collection_means_that_one_alone():
  alone = teachers.layers(VARIABLES, {"batch_stats/n": "batch_stats/encoder/norm"})
  assert list(alone) == ["batch_stats"]
  assert alone["batch_stats"]["n"]["mean"][0] == 3
  assert list(teachers.layers(VARIABLES, {"params/n": "params/encoder/norm"})) == ["params"]


def test_layers_of_a_real_network_start_a_student():
  large, small = small_networks.dense(4, norm=True), small_networks.dense(4)
  teacher = large.init(jax.random.key(0), BATCH.inputs)
  start = teachers.layers(teacher, {"Dense_0": "Dense_0", "Dense_1": "Dense_1"})
  student = small.init(jax.random.key(1), BATCH.inputs)
  assert jax.tree.map(jnp.shape, start) == jax.tree.map(jnp.shape, dict(student))


@pytest.mark.parametrize(
  ("pairs", "message"),
  [
    ({}, "pairs={} must be"),
    (
      {"a": "encoder/Dense_4"},
      r"'encoder/Dense_4', which is not in its 'params'; .*encoder/Dense_3",
    ),
    ({"a": "qqq"}, r"which is not in its 'params'; .*'encoder'"),
    ({"batch_stats/a": "batch_stats/encoder/Dense_3"}, "not in its 'batch_stats'"),
    ({"a": "params/head"}, "begin with the same collection"),
    ({"params/a": "batch_stats/encoder/norm"}, "begin with the same collection"),
    ({"": "head"}, "name a submodule or an array"),
    ({"params": "params"}, "name a submodule or an array"),
    ({"a": "encoder/norm", "a/scale": "head/kernel"}, "'a/scale' over another one"),
    ({"a/scale/x": "head/kernel", "a": "encoder/norm"}, "'a' over another one"),
  ],
)
def test_wrong_layers_say_what_is_wrong(pairs, message):
  with pytest.raises(ValueError, match=message):
    teachers.layers(VARIABLES, pairs)


def test_layers_of_bare_parameters_are_refused():
  with pytest.raises(ValueError, match=r"there is 'params'.*\['encoder', 'head'\]"):
    teachers.layers(VARIABLES["params"], {"a": "b"})


@pytest.mark.slow
def test_a_restored_model_knows_its_seeds_however_they_were_given(tmp_path):
  network = small_networks.dense(3, classes=4)
  examples = data.from_arrays(np.eye(4, 5, dtype=np.float32), np.arange(4))
  source = data.on_device(examples, batch_size=2, data_seed=0)
  for i, (seed, seeds) in enumerate(((3, None), ([3], 1), ((3, 4), 2), (range(2), 2))):
    trained = train.fit(
      network,
      recipes.labels(),
      data=source if seeds is None else [source] * seeds,
      optimizer=optax.sgd(0.1),
      steps=1,
      seed=seed,
      run=train.Run(tmp_path / f"run{i}", progress=None),
    )
    found = teachers.restore(tmp_path / f"run{i}", network)
    assert found.seeds == trained.seeds == seeds
    assert len(found.unstack()) == (seeds or 1)


def test_no_gradient_of_the_inputs_gets_past_a_teacher():
  teach = teachers.frozen(model(3))
  grads = jax.grad(lambda x: jnp.sum(teach(BATCH.replace(inputs=x)).logits ** 2))(BATCH.inputs)
  assert not np.any(grads)


def test_a_subset_keeps_the_order_that_it_was_given():
  one = model(4)
  whole = teachers.frozen(one)(BATCH).logits
  np.testing.assert_array_equal(teachers.subset(one, [2, 0])(BATCH).logits, whole[:, [2, 0]])


def tokenizers_of(*texts):
  return [data.tokenizers.characters(text) for text in texts]


@pytest.mark.slow
def test_a_padded_vocabulary_is_cut_or_gets_columns_without_probability():
  logits = jnp.asarray(LOGITS, jnp.float32)  # [3, 4, 5]
  whole = Teacher({}, lambda variables, batch: Outputs(logits=logits, features={"mid": logits}))
  batch = make_batch(jnp.ones((3, 4)))
  cut, same, padded = (teachers.vocabulary(whole, size)(batch) for size in (3, 5, 7))
  np.testing.assert_array_equal(cut.logits, logits[..., :3])
  np.testing.assert_array_equal(same.logits, logits)
  np.testing.assert_array_equal(padded.logits[..., :5], logits)
  p = jax.nn.softmax(padded.logits, axis=-1)
  np.testing.assert_array_equal(p[..., 5:], 0)
  np.testing.assert_allclose(p[..., :5], jax.nn.softmax(logits, axis=-1), rtol=1e-6)  # float32
  assert cut.features["mid"] is logits
  # A student with the padding learns nothing of it but that it is not there.
  student = jnp.zeros((3, 4, 7))
  value, slope = jax.value_and_grad(
    lambda z: jnp.mean(losses.soft_target_kl(z, padded.logits, temperature=2.0))
  )(student)
  assert np.isfinite(value)
  assert np.isfinite(slope).all()
  assert (slope[..., 5:] > 0).all()  # downwards


def test_a_vocabulary_is_padded_where_logits_are_made():
  hidden = jnp.asarray(LOGITS, jnp.float32)
  head = types.Head(jnp.asarray(np.random.default_rng(1).normal(size=(5, 6)), jnp.float32))
  whole = Teacher(head, lambda head, batch: Outputs(hidden=hidden, head=head))
  found = teachers.vocabulary(whole, 8)(make_batch(jnp.ones((3, 4))))
  assert found.logits is None
  np.testing.assert_array_equal(found.head(found.hidden)[..., :6], head(hidden))
  assert types.with_logits(found).logits.shape == (3, 4, 8)


def test_a_pretrained_teacher_reads_the_tokens_of_its_folder(tmp_path):
  pytest.importorskip("tokenizers")
  own = data.tokenizers.trained(["to be, or not to be"] * 9, 260)
  (tmp_path / "tokenizer.json").write_text(own.definition)
  for folder in (tmp_path, str(tmp_path), tmp_path / "tokenizer.json"):
    taught = teachers.frozen(model(3), tokenizer=folder)
    assert teachers.tokenizer_of(taught) == own.digest
  with pytest.raises(ValueError, match="size=9 is below the"):
    teachers.vocabulary(taught, 9, tokenizer=tmp_path)
  with pytest.raises(TypeError, match="must be one of .* which is there"):
    teachers.frozen(model(3), tokenizer=tmp_path / "elsewhere")
  (tmp_path / "empty").mkdir()
  with pytest.raises(FileNotFoundError, match="no tokenizer"):
    teachers.frozen(model(3), tokenizer=tmp_path / "empty")


def test_a_teacher_reads_the_tokens_of_its_own_tokenizer():
  ours, theirs = tokenizers_of("abc", "abd")
  assert ours.vocabulary == theirs.vocabulary  # which proves nothing
  made = model(3)
  taught = teachers.frozen(made, tokenizer=theirs)
  assert teachers.tokenizer_of(taught) == theirs.digest
  assert teachers.tokenizer_of(teachers.frozen(made)) is None
  combined = teachers.ensemble([teachers.frozen(made), teachers.subset(taught, [0, 1])])
  assert teachers.tokenizer_of(combined) == theirs.digest
  digests = rf"{theirs.digest}.*{ours.digest}"
  with pytest.raises(ValueError, match=digests):
    teachers.vocabulary(taught, 3, tokenizer=ours)
  assert teachers.tokenizer_of(teachers.vocabulary(taught, 3, tokenizer=theirs)) == theirs.digest
  with pytest.raises(TypeError, match="tokenizer=3 must be one of"):
    teachers.frozen(made, tokenizer=3)
  read = data.from_text("abcabcab", ours, length=2)
  assert read.tokenizer == ours.digest
  for make in (data.on_device, data.streamed):
    source = make(read, batch_size=2, data_seed=0)
    assert source.tokenizer == ours.digest
    with pytest.raises(ValueError, match=digests):
      teachers.cached(taught, dataclasses.replace(source, views=1))
  other = data.on_device(data.from_text("abdabd", theirs, length=2), batch_size=2, data_seed=0)
  with pytest.raises(ValueError, match="of tokenizer"):
    data.mixed(source, other, share=0.5)
  with pytest.raises(ValueError, match="different tokenizers"):
    teachers.ensemble([taught, teachers.frozen(made, tokenizer=ours)])
