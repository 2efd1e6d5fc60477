"""Students without logits, and inputs that only the teacher or the loss reads."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill import data, evaluation, export, losses, networks, search, teachers, train
from jaxdistill.export import _process
from jaxdistill.types import Model, Term
from small_networks import untyped

QUICK = export.Check(seconds=0.02)
RNG = np.random.default_rng(0)


class Towers(nn.Module):
  """Two towers, of which each puts out a vector of length one; no logits."""

  width: int = 8

  @nn.compact
  def __call__(self, image, text):
    made = {}
    for name, x in (("image", image), ("text", text)):
      x = nn.Dense(self.width, name=name)(nn.relu(nn.Dense(16, name=f"{name}_in")(x)))
      made[name] = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    return made


def towers(width=8):
  def both(inputs):
    return {"image": inputs["image"], "text": inputs["text"]}

  return networks.linen(Towers(width), arguments=both, logits=False)


@pytest.fixture(scope="module")
def pairs():
  """Pictures and texts of one hidden thing each, and what only a teacher reads."""
  hidden = RNG.normal(size=(50, 4)).astype(np.float32)
  return {
    "image": hidden @ RNG.normal(size=(4, 6)).astype(np.float32),
    "text": hidden @ RNG.normal(size=(4, 5)).astype(np.float32),
    "types": np.arange(50, dtype=np.int32),
  }


def two_towers(student, teacher, batch):
  """Radford et al. 2021, equation by equation: symmetric cross-entropy over the batch's pairs."""
  sims = student.features["image"] @ student.features["text"].T / 0.1
  own = jnp.arange(sims.shape[0])
  both = losses.cross_entropy(sims, own) + losses.cross_entropy(sims.T, own)
  return {"pairs": Term(both / 2)}


@pytest.mark.slow
def test_two_towers_from_arrays_to_the_loaded_student(tmp_path, pairs):
  examples = data.from_arrays(pairs, np.arange(50) % 5)
  source = data.on_device(examples, batch_size=16, data_seed=0)
  batches = data.evaluation_batches(examples, batch_size=16)

  def fit():
    return train.fit(
      towers(), two_towers, data=source, optimizer=optax.adam(1e-2), steps=6, run=tmp_path / "run"
    )

  fit()
  # What was deployed is made of what was trained: where it says no outputs, it is made anew.
  path = tmp_path / "run" / "student" / "student.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"outputs": 2**63}))
  fitted = fit()
  task = evaluation.tasks.embedding("image")
  found = evaluation.evaluate(fitted, batches, task=task)
  student = export.load_student(tmp_path / "run")
  assert "accuracy" not in fitted.history[-1]
  assert student.outputs == ("image", "text")
  assert student.classes is None
  # What neither tower reads is no input: not asked for, and let pass where it is given.
  assert sorted(student.inputs) == ["image", "text"]
  taken = {name: pairs[name] for name in ("image", "text")}
  made = student.predict(taken, batch_size=16)
  # Written anew in float64.
  params = jax.tree.map(np.float64, jax.device_get(fitted.variables["params"]))
  for name in ("image", "text"):
    x = np.maximum(pairs[name] @ params[f"{name}_in"]["kernel"] + params[f"{name}_in"]["bias"], 0)
    x = x @ params[name]["kernel"] + params[name]["bias"]
    np.testing.assert_allclose(made[name], x / np.linalg.norm(x, axis=1, keepdims=True), atol=1e-5)
    np.testing.assert_array_equal(student.predict(pairs, 16)[name], made[name])
  vectors = np.float64(made["image"])
  near = vectors @ vectors.T
  np.fill_diagonal(near, -np.inf)
  right = (examples.labels[near.argmax(1)] == examples.labels).mean()
  assert found["recall_at_1"] == pytest.approx(right)
  with pytest.raises(TypeError, match=r"inputs has the keys \['image', 'txt'\]"):
    student({"image": pairs["image"], "txt": pairs["text"]})


@pytest.mark.slow
def test_a_chosen_output_is_what_every_file_puts_out(tmp_path, pairs):
  pytest.importorskip("jax2onnx")
  stored = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in pairs.items()}
  network = towers()
  model = Model(network, network.init(jax.random.key(0), pairs))
  for outputs, files in (
    (("text",), ["safetensors"]),
    (("image", "text"), ["stablehlo", "onnx"]),
  ):
    run = tmp_path / "-".join(outputs)
    export.save_student(run, model, stored=stored, outputs=outputs)
    info = json.loads((run / "student" / "student.json").read_text())
    assert info["outputs"] == list(outputs)
    # Of one tower alone, the other's input is none.
    assert sorted(info["inputs"]) == list(outputs)
    wanted = export.load_student(run).predict(pairs)
    listed = export.export(run, (pairs, None), kinds=files, network=network, check=QUICK)
    assert [one["problem"] for one in listed["files"]] == [None] * len(files)
    assert [one["agreement"] for one in listed["files"]] == pytest.approx([1] * len(files))
    assert listed["student_accuracy"] is None
    with np.load(run / "exports" / "example.npz") as example:
      assert sorted(example.files) == sorted([*outputs, *(f"inputs/{n}" for n in outputs)])
      for name in outputs:
        one = wanted[name] if len(outputs) > 1 else wanted
        np.testing.assert_allclose(example[name], one[:16], atol=1e-5)
  assert set(export.verify_exports(run).values()) == {None}
  # A file that puts out one thing less, or another, is not what was checked.
  (entry,) = (one for one in listed["files"] if one["kind"] == "onnx")
  assert sorted(entry["tolerance"]) == ["image", "text"]
  less = _process.compare(wanted, {"image": wanted["image"]}, entry["tolerance"])
  assert less["problem"] == "it puts out ['image'], not ['image', 'text']"
  swapped = {"image": wanted["text"], "text": wanted["image"]}
  assert "its image differ" in _process.compare(wanted, swapped, entry["tolerance"])["problem"]
  with pytest.raises(ValueError, match=r"outputs=\['pooled'\] .* \['image', 'text'\]"):
    export.save_student(tmp_path / "no", model, stored=stored, outputs=("pooled",))


def test_int8_of_what_has_no_classes_is_judged_by_the_variance_that_is_left():
  student = RNG.normal(size=(100, 4))
  off = student + 0.1 * RNG.normal(size=student.shape)
  found = _process.compare_outputs(student, off, 0.0, within=False, name="pooled")
  spread = ((student - student.mean(0)) ** 2).sum()
  assert found["agreement"] == pytest.approx(1 - ((off - student) ** 2).sum() / spread)
  # One number an example has no top-1: argmax would agree whatever the file computes.
  one = _process.compare_outputs(student[:, :1], -student[:, :1], 0.0, within=False)
  assert one["agreement"] < 0
  # And numbers are no classes: there is no accuracy of them.
  assert _process.top1(student, student[:, 0]) is None
  assert _process.top1(student[:, :1], np.zeros(100, int)) is None
  ignored = np.where(np.arange(100) < 50, student.argmax(1), -1)
  assert _process.top1(student, ignored) == 1


@pytest.mark.slow
def test_what_only_the_teacher_and_the_loss_read_is_no_input(tmp_path, pairs):
  inputs = {"x": pairs["image"], "types": pairs["types"], "target": pairs["text"]}

  def normalize(inputs):  # of all, as a user's own would be
    return {"x": inputs["x"] / 2, "types": inputs["types"], "target": inputs["target"] * 3}

  student = networks.linen(nn.Dense(5), arguments=lambda inputs: (inputs["x"],))
  both = lambda inputs: (jnp.concatenate([inputs["x"], inputs["target"]], 1),)  # noqa: E731
  large = networks.linen(nn.Dense(5), arguments=both)
  examples = data.from_arrays(inputs, None)
  source = data.on_device(examples, batch_size=10, data_seed=0, normalize=normalize)
  seen = normalize(inputs)
  teacher = teachers.frozen(Model(large, large.init(jax.random.key(1), seen)))

  def objective(student, teacher, batch):
    error = jnp.square(student.logits - batch.inputs["target"]).mean(1)
    apart = jnp.square(student.logits - teacher.logits).mean(1)
    return {"target": Term(error), "teacher": Term(apart)}

  fitted = train.fit(
    student,
    objective,
    data=source,
    optimizer=optax.sgd(1e-2),
    steps=3,
    teacher=teacher,
    run=tmp_path,
  )
  loaded = export.load_student(tmp_path)
  assert sorted(loaded.inputs) == ["x"]
  assert loaded.ignored == ("target", "types")
  wanted = np.asarray(fitted(seen).logits)
  for given in ({"x": inputs["x"]}, inputs):
    np.testing.assert_allclose(loaded(given), wanted, atol=1e-5)
  costs = search.measure_network(student, source.stored, normalize=normalize, seconds=0.01)
  assert costs["flops"] == 6 + 2 * 6 * 5 + 5  # halved, multiplied, moved


def test_a_module_says_that_it_has_no_logits():
  x = jnp.ones((2, 3))
  network = networks.linen(nn.Dense(4), logits=False)
  outputs, _ = network.apply(network.init(jax.random.key(0), x), x, train=False, key=None)
  assert outputs.logits is None
  assert outputs.features["output"].shape == (2, 4)
  unsaid = networks.linen(Towers(), arguments=lambda x: (x, x))
  with pytest.raises(ValueError, match="logits=False that it has none"):
    unsaid.init(jax.random.key(0), x)


def squared(student, teacher, batch):
  return {"soft": Term(jnp.sum((student.logits - teacher.logits) ** 2, axis=-1))}


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_an_objective_on_logits_names_the_network_without_them(which):
  x = np.ones((4, 2), np.float32)
  source = data.on_device(data.from_arrays(x, [0, 1, 2, 0]), batch_size=2, data_seed=0)
  vectors = networks.linen(nn.Sequential([nn.Dense(3)]), logits=False, features=["layers_0"])
  classes = networks.linen(nn.Dense(3))
  pair = (vectors, classes) if which == "student" else (classes, vectors)
  taught = Model(pair[1], pair[1].init(jax.random.key(0), x))
  options = {"teacher": teachers.frozen(taught), "optimizer": optax.sgd(0.1), "steps": 2}
  with pytest.raises(ValueError, match=f"{which}.*logits.* say which of its outputs"):
    train.fit(pair[0], squared, data=source, **options)


def test_a_loss_names_the_logits_that_are_none():
  there = jnp.ones((2, 3))
  for given, name in (((None, there), "student_logits"), ((there, None), "teacher_logits")):
    with untyped(), pytest.raises(ValueError, match=f"{name} is None"):
      losses.soft_target_kl(*given)
