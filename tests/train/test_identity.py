"""A folder gives back the run that it holds, and no other: what a run is known again by."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import small_networks
from jaxdistill import data, export, networks, search, teachers, train
from jaxdistill.types import Term, as_objective

RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(48, 4)).astype(np.float32)
LABELS = RNG.integers(0, 3, 48)


def source(inputs=INPUTS, labels=LABELS, *, by=data.on_device, **options):
  options = {"batch_size": 8, "data_seed": 0, **options}
  return by(data.from_arrays(inputs, labels, num_classes=3), **options)


def changed(array, place, by):
  other = array.copy()
  other[place] += by
  return other


def network(activation=nn.relu, init=None):
  init = nn.initializers.lecun_normal() if init is None else init
  return networks.linen(nn.Sequential([nn.Dense(5, kernel_init=init), activation, nn.Dense(3)]))


def squared(scale=0.5, more=()):
  """A user's own loss; what it closes over is in no list of settings."""

  def loss(student, teacher, batch):
    off = scale * jnp.mean((student.logits - teacher.logits) ** 2, axis=-1)
    for array in more:
      off += array
    return {"off": Term(off)}

  return loss


def teacher(scale=1.0):
  made = teachers.frozen(small_networks.model(small_networks.dense(7), 1, 4, key=jax.random.key(9)))
  return dataclasses.replace(made, apply=Scaled(scale)) if scale != 1.0 else made


@dataclasses.dataclass(frozen=True)
class Scaled:
  """A teacher's function of a user's own, whose number is in no variables."""

  scale: float

  def __call__(self, variables, batch):
    outputs = teacher().apply(variables, batch)
    return dataclasses.replace(outputs, logits=self.scale * outputs.logits)


PLAIN = {
  "student": network(),
  "objective": squared(),
  "data": source(),
  "optimizer": optax.adam(1e-2),
  "steps": 6,
  "teacher": teacher(),
}


def fit(folder, **options):
  run = train.Run(folder, progress=None, longer=options.pop("longer", False))
  return train.fit(**{**PLAIN, **options}, run=run)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A finished run."""
  made = tmp_path_factory.mktemp("identity") / "run"
  fit(made)
  return made


OTHERS = {
  "a loss of another number": ({"objective": squared(0.4)}, "step: .*0.4.*squared|step: .*0.4"),
  "a loss that is another": (
    {"objective": lambda s, t, b: {"off": Term(jnp.mean(jnp.abs(s.logits - t.logits), axis=-1))}},
    "step: only there: .*only now: .*abs",
  ),
  "an array in a loss": (
    {"objective": squared(more=(np.linspace(0, 1, 8, dtype=np.float32),))},
    r"step: only now: .*float32\[8\]",
  ),
  "another rate": ({"optimizer": optax.adam(2e-2)}, "optimizer: only there: .*0.01.*now: .*0.02"),
  "another optimiser": ({"optimizer": optax.sgd(1e-2)}, "optimizer: "),
  "another schedule": (
    {"optimizer": optax.adam(optax.cosine_decay_schedule(1e-2, 6))},
    "optimizer: only there",
  ),
  "one number of one example": (
    {"data": source(changed(INPUTS, (31, 2), 1e-6))},
    r"data.contents.inputs: '\w+' there, '\w+' now",
  ),
  "one label": ({"data": source(labels=(LABELS + (np.arange(48) == 17)) % 3)}, "contents.labels"),
  "a label that may not be used": (
    {"data": source(labelled=np.arange(48) != 17)},
    "contents.labels",
  ),
  "another normalisation": ({"data": source(normalize=lambda x: 2 * x)}, "shown: only now: .*mul"),
  "a transform": (
    {"data": data.transformed(source(), data.transforms.mixup(3))},
    "step: only there|step: only now",
  ),
  "another function of the teacher": ({"teacher": teacher(2.0)}, "step: only now: .*2.0"),
  "another activation": ({"student": network(nn.tanh)}, "step: .*only now: .*tanh"),
  "another beginning": ({"student": network(init=nn.initializers.zeros)}, "initial: only there"),
  "another number of steps": ({"steps": 7}, "steps: 6 there, 7 now"),
}


@pytest.mark.slow_but(
  "a loss of another number", "another rate", "one label", "a transform", "another number of steps"
)
@pytest.mark.parametrize("case", OTHERS)
def test_another_run_is_refused_by_what_differs(folder, case):
  options, words = OTHERS[case]
  with pytest.raises(ValueError, match="another configuration") as refused:
    fit(folder, **options)
  assert re.search(words, str(refused.value)), str(refused.value)


def renamed(student, teacher, batch):
  # The same numbers by other names, and one that is not used.
  jnp.sum(teacher.logits)
  difference = student.logits - teacher.logits
  return {"off": Term(0.5 * jnp.mean(difference**2, axis=-1))}


SAME = {
  "as it was": {},
  "made anew": {"student": network(), "data": source(), "optimizer": optax.adam(1e-2)},
  "other names": {"objective": renamed},
  "streamed": {"data": source(by=data.streamed)},
  "one device": {"dispatch": train.with_jit(train.data_parallel(jax.devices()[:1]))},
  "one after another": {"dispatch": train.with_jit(scan=False)},
  "a log of other steps": {"watch": train.Watch(log_every=1)},
}


@pytest.mark.slow_but("as it was", "other names")
@pytest.mark.parametrize("case", SAME)
def test_the_same_run_is_found_again_however_it_is_run(folder, case, capsys):
  saved = json.loads((folder / "config.json").read_text())
  again = train.fit(**{**PLAIN, **SAME[case]}, run=train.Run(folder, progress="again"))
  assert again.history[-1]["step"] == 6
  assert "finished" in "".join(capsys.readouterr())
  assert json.loads((folder / "config.json").read_text()) == saved


@pytest.mark.slow
def test_what_is_computed_has_the_same_digest_in_another_process(folder):
  """Nothing of an order of sets, of addresses or of names that JAX makes up is in it."""
  code = f"import test_identity as tests; tests.fit({str(folder)!r})"
  environment = {**os.environ, "PYTHONHASHSEED": "1"}
  environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
  subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=300)


@pytest.mark.slow
def test_other_versions_are_said_and_no_reason_to_refuse(folder, tmp_path):
  there = tmp_path / "run"
  fit(there, steps=3)
  listed = json.loads((there / "operations.json").read_text())
  listed["versions"]["jax"] = "0.0.1"
  (there / "operations.json").write_text(json.dumps(listed))
  fit(there, steps=3)  # the same digests: nothing to say
  with pytest.warns(UserWarning, match="begun with.*0.0.1.*step otherwise.*goes on"):
    fit(there, steps=3, objective=squared(0.4))
  (there / "operations.json").unlink()
  with pytest.raises(ValueError, match="step: it computes something else"):
    fit(there, steps=3, objective=squared(0.4))


@pytest.mark.slow_but("one")
@pytest.mark.parametrize("seed", [0, (0, 1)], ids=["one", "two"])
def test_a_run_is_made_longer_with_its_optimiser_and_its_order(tmp_path, seed):
  whole = fit(tmp_path / "whole", steps=11, seed=seed)
  fit(tmp_path / "run", seed=seed)
  with pytest.raises(ValueError, match="steps: 6 there, 11 now"):
    fit(tmp_path / "run", steps=11, seed=seed)
  with pytest.raises(ValueError, match=r"step: .*0\.4"):
    fit(tmp_path / "run", steps=11, seed=seed, longer=True, objective=squared(0.4))
  longer = fit(tmp_path / "run", steps=11, seed=seed, longer=True)
  for a, b in zip(jax.tree.leaves(longer.variables), jax.tree.leaves(whole.variables), strict=True):
    np.testing.assert_array_equal(a, b)
  assert [line["step"] for line in longer.history][-1] == 11
  # What is deployed is the longer run's, and the folder is its own from now on.
  deployed = export.load_student(tmp_path / "run").variables
  for a, b in zip(jax.tree.leaves(deployed), jax.tree.leaves(whole.variables), strict=True):
    np.testing.assert_array_equal(a, b if seed == 0 else b[0])
  with pytest.raises(ValueError, match="steps: 11 there, 6 now"):
    fit(tmp_path / "run", seed=seed)
  with pytest.raises(ValueError, match="longer=True.*11 steps.*steps=6"):
    fit(tmp_path / "run", seed=seed, longer=True)


@pytest.mark.slow
def test_a_longer_run_may_follow_another_schedule(tmp_path):
  def rate(steps):
    return optax.adam(optax.cosine_decay_schedule(1e-2, steps))

  fit(tmp_path / "run", optimizer=rate(6))
  found = fit(tmp_path / "run", optimizer=rate(12), steps=12, longer=True)
  assert int(found.state.opt_state[0].count) == 12
  with pytest.raises(ValueError, match="optimizer: "):
    fit(tmp_path / "run", optimizer=rate(24), steps=12)


@pytest.mark.slow
def test_a_sweep_is_known_again_by_its_data_and_its_objective(tmp_path):
  held_out = data.evaluation_batches(data.from_arrays(INPUTS, LABELS), batch_size=16)

  def sweep(objective, inputs=INPUTS):
    return search.sweep(
      network(),
      as_objective(objective, weight=1.0),
      points=[{"weight": 0.5}, {"weight": 1.0}],
      data=source(inputs),
      optimizer=optax.adam(1e-2),
      steps=4,
      teacher=teacher(),
      choice=search.Choice(held_out),
      seeds=[0],
      run=train.Run(tmp_path / "sweep", progress=None),
    )

  def weighted(scale):
    def loss(student, teacher, batch, *, weight):
      return {"off": Term(scale * weight * jnp.mean((student.logits - teacher.logits) ** 2, -1))}

    return loss

  first = sweep(weighted(3.0))
  assert sweep(weighted(3.0)).best == first.best
  with pytest.raises(ValueError, match=r"step: only there: .*3\.0.*only now: .*5\.0"):
    sweep(weighted(5.0))
  with pytest.raises(ValueError, match="contents.inputs"):
    sweep(weighted(3.0), changed(INPUTS, (40, 0), 1e-6))


@pytest.mark.slow
def test_streamed_arrays_that_were_changed_are_other_data(tmp_path):
  """They are the user's own, and not copied: what counts is what they hold when it is trained."""
  inputs = INPUTS.copy()
  stream = source(inputs, by=data.streamed)
  fit(tmp_path / "run", data=stream, steps=3)
  inputs[20] += 1
  with pytest.raises(ValueError, match="contents.inputs"):
    fit(tmp_path / "run", data=stream, steps=3)


@pytest.mark.slow
def test_records_are_known_by_a_sample_unless_they_are_drawn_anew(tmp_path):
  rng = np.random.default_rng(0)

  def rows(transform, shift=0.0):
    made = [{"x": INPUTS[i] + shift, "label": int(LABELS[i])} for i in range(48)]
    fields = data.Fields(inputs="x", num_classes=3, transform=transform)
    return data.streamed(data.from_sequence(made, fields), batch_size=8, data_seed=0)

  fit(tmp_path / "plain", data=rows(None), steps=2)
  with pytest.raises(ValueError, match="contents.sample"):
    fit(tmp_path / "plain", data=rows(None, 1.0), steps=2)
  drawn = rows(lambda row: row["x"] + rng.normal(size=4).astype(np.float32))
  assert "sample" not in drawn.contents()
  assert "labels of sample" in drawn.contents()
