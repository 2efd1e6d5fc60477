"""SimKD: what is trained, validated, returned and exported is what predicts; and a run goes on."""

import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import small_networks
from jaxdistill import data, evaluation, export, networks, teachers, train
from jaxdistill.recipes import combine, crd, projectors, simkd
from jaxdistill.train import init_state, reduce_terms
from jaxdistill.types import Model, Outputs, make_batch
from test_train import assert_same_bits

# Two float32 programs that add up in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class Images(nn.Module):
  """One convolution with BatchNorm, a map, its mean, a classifier."""

  width: int
  classes: int
  stride: int = 1

  @nn.compact
  def __call__(self, x, *, train: bool = False):
    x = nn.Conv(self.width, (3, 3), strides=self.stride, padding=1, use_bias=False)(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
    self.sow("intermediates", "stage3", x)
    pooled = jnp.mean(x, axis=(1, 2))
    self.sow("intermediates", "pooled", pooled)
    return nn.Dense(self.classes, name="classifier")(pooled)


def network(width, classes, stride=1):
  return networks.linen(Images(width, classes, stride), features=["stage3", "pooled"])


INPUTS = np.random.default_rng(0).normal(size=(24, 4, 4, 2)).astype(np.float32)
LABELS = np.random.default_rng(1).integers(0, 3, 24)
EXAMPLES = data.from_arrays(INPUTS + LABELS[:, None, None, None], LABELS, num_classes=3)
# The student's map is larger than the teacher's, and its own classifier knows other classes.
STUDENT, TEACHER = network(3, 5), network(6, 3, stride=2)
TAUGHT = jax.jit(TEACHER.init)(jax.random.key(9), INPUTS[:1])
BEGUN = jax.jit(STUDENT.init)(jax.random.key(8), INPUTS[:1])
CLASSIFIER = TAUGHT["params"]["classifier"]


# --- The deployed network in NumPy. ---


def by_hand(variables, maps):
  """The logits of one network from the student's map [B, 4, 4, C], in inference."""
  params, averages = variables["params"]["projector"], variables["projector"]["batch_stats"]
  params, averages, classifier = jax.tree.map(
    lambda leaf: np.asarray(leaf, np.float64), (params, averages, variables["params"]["classifier"])
  )
  x = np.asarray(maps, np.float64).reshape(-1, 2, 2, 2, 2, maps.shape[-1]).mean((2, 4))
  for i in (1, 2, 3):
    kernel = params[f"conv{i}"]["kernel"]
    reach = len(kernel) // 2
    padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    rows, columns = np.mgrid[: len(kernel), : len(kernel)]
    x = sum(
      padded[:, r : r + 2, c : c + 2] @ kernel[r, c]
      for r, c in zip(rows.ravel(), columns.ravel(), strict=True)
    )
    scale, bias = params[f"norm{i}"]["scale"], params[f"norm{i}"]["bias"]
    mean, variance = averages[f"norm{i}"]["mean"], averages[f"norm{i}"]["var"]
    x = np.maximum((x - mean) / np.sqrt(variance + 1e-5) * scale + bias, 0)
  return x.mean((1, 2)) @ classifier["kernel"] + classifier["bias"]


def student_map(variables, inputs):
  mine = {"params": variables["params"]["student"], **variables["student"]}
  return jax.jit(lambda v, x: STUDENT.apply(v, x, train=False, key=None)[0].features["stage3"])(
    mine, inputs
  )


# --- A run over two seeds, with CRD beside it, a moving average and a validation. ---


def fit(folder):
  objective = combine(simkd(CLASSIFIER), crd(LABELS, negatives=24, width=8, hard_weight=None))
  batches = data.evaluation_batches(EXAMPLES, batch_size=12)
  return small_networks.fit(
    Model(STUDENT, BEGUN),
    objective,
    data=data.on_device(EXAMPLES, batch_size=8, data_seed=0),
    optimizer=optax.sgd(0.1, momentum=0.9),
    steps=18,
    seed=(0, 1),
    teacher=teachers.frozen(Model(TEACHER, TAUGHT)),
    average=0.8,
    log_every=3,
    validate=evaluation.validator(batches),
    validate_every=9,
    folder=folder,
    dispatch=train.with_jit(scan=False),  # compiles sooner
  )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp("simkd") / "run"
  return folder, fit(folder)


@pytest.mark.slow
def test_it_learns_through_the_projector_and_leaves_both_classifiers(run):
  _, fitted = run
  first, last = fitted.history[0], fitted.history[-1]
  for line in fitted.history:
    assert np.isfinite(line["simkd"]).all()
    assert np.isfinite(line["labels"]).all()
    assert "accuracy" not in line  # the student's own logits are not what predicts
  assert (np.asarray(last["simkd"]) < 0.7 * np.asarray(first["simkd"])).all()
  state, variables = fitted.state, fitted.variables
  own = state.params["classifier"]
  begun = BEGUN["params"]["classifier"]
  for seed in range(2):
    kept = jax.tree.map(lambda leaf, seed=seed: leaf[seed], variables["params"]["classifier"])
    assert_same_bits(kept, CLASSIFIER)
    assert_same_bits(jax.tree.map(lambda leaf, seed=seed: leaf[seed], own), begun)
  moved = state.objective_params["0"]["projector"]["norm3"]["bias"]
  assert np.abs(moved).max() > 0.01
  # The average is of the projector and of its statistics too, not only of the student.
  averages = state.objective_state["0"]["projector"]["batch_stats"]["norm3"]["mean"]
  averaged = variables["projector"]["batch_stats"]["norm3"]["mean"]
  assert np.abs(np.asarray(variables["params"]["projector"]["norm3"]["bias"]) - moved).max() > 1e-4
  assert np.abs(np.asarray(averaged) - averages).max() > 1e-4


@pytest.mark.slow
def test_what_is_loaded_is_what_was_trained_and_validated(run):
  folder, fitted = run
  for seed, model in enumerate(fitted.unstack()):
    loaded = export.load_student(folder, instance=seed)
    assert (loaded.classes, loaded.instances) == (3, 2)
    inputs = jnp.asarray(EXAMPLES.inputs)
    logits = loaded(inputs)
    np.testing.assert_allclose(logits, model(inputs).logits, **CLOSE)
    want = by_hand(model.variables, student_map(model.variables, inputs))
    np.testing.assert_allclose(logits, want, **CLOSE)
    right = float(np.mean(np.argmax(logits, axis=1) == LABELS))
    assert fitted.history[-1]["validation/accuracy"][seed] == pytest.approx(right)


@pytest.mark.slow
def test_the_folder_gives_back_what_is_deployed(run):
  folder, fitted = run
  restored = teachers.restore(folder, fitted.network)
  assert restored.seeds == fitted.seeds == 2
  assert_same_bits(restored.variables, fitted.variables)


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_bits(run, tmp_path):
  folder, whole = run
  # As a run that was killed at step 12 left it: its last checkpoint is that of step 9.
  shutil.copytree(folder, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "student")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "18")
  resumed = fit(tmp_path / "run")
  assert [line["step"] for line in resumed.history] == [3, 6, 9, 12, 15, 18]
  assert_same_bits(whole.variables, resumed.variables)
  for part in ("params", "model_state", "objective_params", "objective_state", "opt_state"):
    assert_same_bits(getattr(whole.state, part), getattr(resumed.state, part))
  banks = resumed.state.objective_state["1"]["banks"]
  assert banks.normalized.all()


# --- The pieces. ---


def outputs_of(side, width, seed, classes=3):
  rng = np.random.default_rng(seed)
  maps = jnp.asarray(rng.normal(size=(6, side, side, width)), jnp.float32)
  logits = jnp.asarray(rng.normal(size=(6, classes)), jnp.float32)
  return Outputs(logits=logits, features={"stage3": maps, "pooled": jnp.mean(maps, (1, 2))})


def shapes_of(*outputs):
  return jax.eval_shape(lambda: outputs)


@pytest.mark.parametrize(("side", "taught"), [(4, 2), (2, 4)])
def test_the_loss_is_the_squared_error_of_what_the_classifier_reads(side, taught):
  student, teacher = outputs_of(side, 3, 0), outputs_of(taught, 6, 1)
  labelled = jnp.array([1.0, 0, 1, 1, 1, 1])
  batch = make_batch(jnp.zeros((6, 1)), jnp.array([0, 1, 2, 0, 1, 2]), labelled=labelled)
  # A projector whose output NumPy knows without BatchNorm.
  linear = projectors.Conv(6, (2, 2), use_norm=False, use_relu=False)
  objective = simkd(CLASSIFIER, hard_weight=0.5, projector=lambda ours, theirs: linear)
  params, state = objective.init(jax.random.key(0), *shapes_of(student, teacher))
  assert state["target"].shape == (2, 2, 6)
  terms, after = objective.apply(params, state, student, teacher, batch, key=None)
  loss, _ = reduce_terms(terms, batch)

  def small(maps):
    maps = np.asarray(maps, np.float64)
    return maps if maps.shape[1] == 2 else maps.reshape(6, 2, 2, 2, 2, -1).mean((2, 4))

  layer = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["projector"]["conv"])
  projected = small(student.features["stage3"]) @ layer["kernel"][0, 0] + layer["bias"]
  squared = ((projected - small(teacher.features["stage3"])) ** 2).mean((1, 2, 3))
  logits = projected.mean((1, 2)) @ np.asarray(CLASSIFIER["kernel"], np.float64)
  logits = logits + np.asarray(CLASSIFIER["bias"], np.float64)
  hard = np.log(np.exp(logits).sum(1)) - logits[np.arange(6), np.asarray(batch.labels)]
  expected = squared.mean() + 0.5 * np.delete(hard, 1).mean()
  assert float(loss) == pytest.approx(expected, rel=1e-5)
  assert_same_bits(after, state)


def test_the_default_projector_is_the_published_one():
  objective = simkd(CLASSIFIER, factor=2)
  shapes = shapes_of(outputs_of(4, 3, 0), outputs_of(2, 6, 1))
  params, state = jax.eval_shape(objective.init, jax.random.key(0), *shapes)
  layers = jax.tree.map(lambda leaf: leaf.shape, params["projector"])
  kernels = {name: layer.get("kernel") for name, layer in layers.items() if "conv" in name}
  assert kernels == {"conv1": (1, 1, 3, 3), "conv2": (3, 3, 3, 3), "conv3": (1, 1, 3, 6)}
  assert {name: sorted(layer) for name, layer in layers.items() if "norm" in name} == {
    f"norm{i}": ["bias", "scale"] for i in (1, 2, 3)
  }
  assert sorted(state) == ["classifier", "projector", "target"]


def test_the_head_on_the_teachers_map_is_the_teacher():
  """With a head of the user's own, of several layers."""
  outputs, _ = TEACHER.apply(TAUGHT, jnp.asarray(INPUTS), train=False, key=None)

  def head(classifier, maps):
    return (
      jnp.mean(maps, axis=(1, 2)) @ classifier["last"]["kernel"] + classifier["last"]["bias"][None]
    )

  identity = simkd({"last": CLASSIFIER}, head=head, projector=lambda ours, theirs: _Same())
  student = Outputs(features=outputs.features)  # no logits of its own at all
  params, state = identity.init(jax.random.key(0), *shapes_of(student, outputs))
  batch = make_batch(jnp.asarray(INPUTS), jnp.asarray(LABELS))
  terms, _ = identity.apply(params, state, student, outputs, batch, key=None)
  assert not np.any(terms["simkd"].values)
  network = identity.deployed.network(TEACHER)
  variables = identity.deployed.variables(TAUGHT, params, state)
  logits = network.apply(variables, jnp.asarray(INPUTS), train=False, key=None)[0].logits
  np.testing.assert_allclose(logits, outputs.logits, **CLOSE)


class _Same(nn.Module):
  @nn.compact
  def __call__(self, x, *, train: bool = False):
    return x


@pytest.mark.slow
def test_the_deployed_network_can_be_trained_on(run):
  _, fitted = run
  variables, inputs = fitted.unstack()[0].variables, jnp.asarray(INPUTS[:8])
  shape = jax.eval_shape(
    lambda v: fitted.network.apply(v, inputs, train=True, key=jax.random.key(0)), variables
  )
  assert shape[0].logits.shape == (8, 3)
  for part in ("student", "projector"):
    assert jax.tree.structure(shape[1][part]) == jax.tree.structure(variables[part])
  with pytest.raises(NotImplementedError, match="is made by training"):
    fitted.network.init(jax.random.key(0), inputs)


def test_what_does_not_fit_is_named():
  ours, theirs = shapes_of(outputs_of(4, 3, 0), outputs_of(2, 6, 1))

  def begin(*outputs, classifier=CLASSIFIER, **options):
    return jax.eval_shape(simkd(classifier, **options).init, jax.random.key(0), *outputs)

  with pytest.raises(ValueError, match="student_layer='stage9' is not among the student's"):
    begin(ours, theirs, student_layer="stage9", teacher_layer="stage3")
  with pytest.raises(ValueError, match=r"teacher_layer='pooled' has the shape \(6, 6\), .*no map"):
    begin(ours, theirs, teacher_layer="pooled")
  with pytest.raises(ValueError, match="teacher_layer='stage3' needs a teacher"):
    begin(ours, None)
  with pytest.raises(ValueError, match=r"map \(6, 4, 4, 3\) with the classifier's.*very teacher"):
    begin(ours, ours)
  with pytest.raises(ValueError, match=r"head must return logits \[B, K\]"):
    begin(ours, theirs, head=lambda classifier, maps: maps)
  with pytest.raises(TypeError, match="classifier must be a dense layer's .*Got"):
    simkd(TAUGHT["params"])
  with pytest.raises(ValueError, match="factor=7 is more than the teacher's 6 channels"):
    begin(ours, theirs, factor=7)
  with pytest.raises(ValueError, match="simkd_weight must be at least 0, got -1"):
    simkd(CLASSIFIER, simkd_weight=-1.0)
  with pytest.raises(ValueError, match="2 objectives deploy a network of their own"):
    combine(simkd(CLASSIFIER), simkd(CLASSIFIER))


def test_labels_beyond_the_classifiers_classes_are_refused():
  batch = make_batch(jnp.asarray(INPUTS[:4]), jnp.asarray(LABELS[:4]))
  with pytest.raises(
    ValueError, match="labels of 4 classes and the student .*reused classifier' puts out 3"
  ):
    jax.eval_shape(
      lambda key: init_state(
        key,
        STUDENT,
        simkd(CLASSIFIER),
        optax.sgd(0.1),
        batch,
        teacher=teachers.frozen(Model(TEACHER, TAUGHT)),
        num_classes=4,
      ),
      jax.random.key(0),
    )
