"""Teachers of other programs: asked on the host, cached, evaluated; those that skip examples."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import optax
import pytest
import scipy.special
import sklearn.datasets
import sklearn.ensemble

from jaxdistill import data, evaluation, losses, networks, recipes, reports, runs, teachers, train
from jaxdistill._reach import depend_on
from jaxdistill.networks.models import MLP
from jaxdistill.teachers import _cache, _cache_files, _cache_shards, cache_writer, command
from jaxdistill.train import reduce_terms
from jaxdistill.train._answered import terms_where_answered
from jaxdistill.types import Model, Outputs, Term, as_objective, make_batch
from small_networks import untyped

ROOT = pathlib.Path(__file__).parent.parent.parent
SILENT = train.Run(progress=None)
SIZE, CLASSES, WIDTH = 20, 3, 5


def examples(size=SIZE):
  rng = np.random.default_rng(0)
  inputs = rng.normal(size=(size, WIDTH)).astype(np.float32)
  return data.from_arrays(inputs, rng.integers(0, CLASSES, size), num_classes=CLASSES, name="rows")


def source_of(made=None, **options):
  return data.on_device(made or examples(), **{"batch_size": 4, "data_seed": 0, **options})


WEIGHTS = np.random.default_rng(1).normal(size=(WIDTH, CLASSES))


def said(inputs):
  """Another program's logits, in float64."""
  return np.asarray(inputs, np.float64) @ WEIGHTS


def first_batch(source):
  return source.cut(source.shared, jax.tree.map(lambda leaf: leaf[0], source.items(0, 1)))


def fit(source, objective, *, steps=20, watch=None, run=SILENT, **options):
  student = networks.linen(MLP([8], num_classes=CLASSES), features={"mid": "hidden_layer1"})
  options = {"optimizer": optax.sgd(0.1), **options}
  return train.fit(student, objective, data=source, steps=steps, run=run, **options)


# A teacher of scikit-learn, and nothing written but the call.


@pytest.mark.slow
def test_a_forest_teaches_a_network_and_is_reported(tmp_path):
  digits = sklearn.datasets.load_digits()
  inputs, labels = (digits.data / 16).astype(np.float32), digits.target
  forest = sklearn.ensemble.RandomForestClassifier(50, random_state=0)
  forest.fit(inputs[:1000], labels[:1000])

  teacher = teachers.foreign(forest.predict_proba, gives="probabilities")
  source = data.on_device(
    data.from_arrays(inputs[:1000], labels[:1000]), batch_size=50, data_seed=0
  )
  student = networks.linen(MLP([32], num_classes=10))
  fitted = train.fit(
    student,
    recipes.kd(temperature=1.0),
    data=teachers.cached(teacher, source, progress=None),
    optimizer=optax.adam(1e-2),
    steps=300,
    run=SILENT,
  )
  held = data.evaluation_batches(data.from_arrays(inputs[1000:], labels[1000:]), batch_size=256)
  found = evaluation.evaluate(fitted, held, teacher=teacher)
  # By another way: NumPy over what both say of the 797 images.
  ours = np.asarray(fitted(jnp.asarray(inputs[1000:])).logits, np.float64)
  theirs = forest.predict_proba(inputs[1000:])
  np.testing.assert_allclose(
    found["agreement"], np.mean(ours.argmax(1) == theirs.argmax(1)), atol=2 / 797
  )
  log = scipy.special.log_softmax(ours, 1)
  kl = np.sum(scipy.special.xlogy(theirs, theirs) - theirs * log, axis=1).mean()
  np.testing.assert_allclose(found["kl"], kl, rtol=1e-3)
  assert found["agreement"] > 0.9
  alone = evaluation.evaluate(teacher, held)
  np.testing.assert_allclose(
    alone["accuracy"], forest.score(inputs[1000:], labels[1000:]), atol=2 / 797
  )
  again = evaluation.evaluate(fitted, evaluation.taught(teacher, held))
  assert {n: float(v) for n, v in again.items()} == {n: float(v) for n, v in found.items()}

  measured = {
    name: reports.measure_model(model, held, teacher=teacher, description=name)
    for name, model in (("teacher", teacher), ("student", fitted))
  }
  report = reports.build_report(
    dataset="digits", split="test", examples=797, seeds=[0], varied="nothing", **measured
  )
  jsonschema.validate(report, reports.report_schema())
  assert report["fidelity"]["agreement"]["mean"] == pytest.approx(float(found["agreement"]))
  # What cannot be known of a program is absent, and not 0.
  assert not {"parameters", "bytes", "flops"} & set(report["models"]["teacher"])
  assert report["models"]["teacher"]["latency_ms"]["median"] > 0
  path = reports.write_report(tmp_path, report)
  assert "agrees with teacher" in path.read_text()


# What becomes of an answer.


def test_probabilities_become_their_own_logits():
  rng = np.random.default_rng(0)
  given = scipy.special.softmax(rng.normal(size=(6, 4)) * 5, axis=1)
  given[0] = [0, 1, 0, 0]
  made = cache_writer.outputs_of(given, 6, gives="probabilities", floor=1e-9)["logits"]
  np.testing.assert_allclose(scipy.special.softmax(made, axis=1), given, atol=4e-9)
  assert made[0, 0] == np.log(1e-9)
  # At a temperature: what the probabilities say, tempered.
  tempered = given[1:] ** 0.5 / np.sum(given[1:] ** 0.5, axis=1, keepdims=True)
  np.testing.assert_allclose(scipy.special.softmax(made[1:] / 2, axis=1), tempered, rtol=1e-9)
  yes = np.array([[0.2, 0.9], [1.0, 0.0]])
  binary = cache_writer.outputs_of(yes, 2, gives="binary_probabilities", floor=1e-6)["logits"]
  np.testing.assert_allclose(scipy.special.expit(binary), yes, atol=2e-6)
  half = cache_writer.outputs_of(given.astype(np.float16), 6, gives="probabilities")["logits"]
  assert half.dtype == np.float16
  whole = cache_writer.outputs_of({"logits": np.ones((6, 2), int), "where": np.ones(6)}, 6)
  assert whole["logits"].dtype == np.float32


NAN, INF = np.nan, np.inf
ROWS = np.linspace(-2, 2, SIZE * CLASSES).reshape(SIZE, CLASSES)
SOFT = scipy.special.softmax(ROWS, axis=1)


def with_row(values, row, new):
  made = values.copy()
  made[row] = new
  return made


WRONG = {
  "logits of example 7 .* hold NaN or an infinity": ("logits", with_row(ROWS, 7, NAN)),
  "logits of example 3 .* hold NaN or an infinity: .*-inf": (
    "logits",
    with_row(ROWS, 3, [0, -INF, 1]),
  ),
  "logits lie between 0 and 1 .* probabilities.*gives='probabilities'": ("logits", SOFT),
  "probabilities of example 0 .* are no probabilities.*gives='logits'": ("probabilities", ROWS),
  "probabilities of example 5 .* do not add up to 1: .*binary_probabilities": (
    "probabilities",
    with_row(SOFT, 5, [0.5, 0.5, 0.5]),
  ),
  "binary_probabilities of example 0 .* are no probabilities": ("binary_probabilities", ROWS),
  "features/output of example 9 .* hold NaN": ("features", with_row(ROWS, 9, NAN)),
  r"logits have the shape \[19, 3\] for 20 examples": ("logits", ROWS[:-1]),
  r"logits have the shape \[20\] of int.*not the class that it chooses": ("logits", ROWS.argmax(1)),
  r"probabilities have the shape \[20\]": ("probabilities", np.full(20, 0.5)),
  "logits are list object|no numbers": ("logits", [["a"] * 3] * SIZE),
  "gives .*'logit'.*may give one of logits": ("logits", {"logit": ROWS}),
  "gives .*'logits', 'probabilities'": ("logits", {"logits": ROWS, "probabilities": SOFT}),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_no_answer_is_refused_with_its_row(tmp_path, message):
  gives, rows = WRONG[message]
  teacher = teachers.foreign(lambda inputs: rows, gives=gives)
  with pytest.raises((TypeError, ValueError), match=message):
    teacher(make_batch(np.zeros((SIZE, WIDTH), np.float32)))
  # The file that other programs write with says the same, and leaves nothing.
  with pytest.raises((TypeError, ValueError), match=re.sub(r" \.\*|example \d+ ", ".*", message)):
    teachers.write(tmp_path / "c", rows, [str(i) for i in range(SIZE)], name="rows", gives=gives)
  assert not (tmp_path / "c").exists()


def test_logits_that_lie_between_0_and_1_are_logits():
  """Where their rows add up to something else, or are so few that they may by chance."""
  for rows in (SOFT * 1.2, SOFT[:3], SOFT.sum(1, keepdims=True)):
    made = cache_writer.outputs_of(rows, len(rows))["logits"]
    np.testing.assert_array_equal(made, rows)


@pytest.mark.parametrize("gives", ["logits", "binary_probabilities"])
def test_a_number_an_example_is_one_output(gives):
  one = SOFT[:, 0]
  teacher = teachers.foreign(lambda inputs: one, gives=gives)
  said = teacher(make_batch(np.zeros((SIZE, WIDTH), np.float32))).logits
  wanted = one if gives == "logits" else scipy.special.logit(one)
  np.testing.assert_allclose(said, wanted[:, None], rtol=1e-5)  # float32


def test_arguments_that_are_none_are_refused():
  for options, message in (
    ({"gives": "logit"}, "gives='logit' must be one of logits, probabilities"),
    ({"takes": "items"}, "takes='items' must be one of inputs, batch"),
    ({"floor": 0.0}, "floor must be positive and at most 0.5, got 0.0"),
    ({"name": 3}, "name=3 must be a text"),
  ):
    with untyped(), pytest.raises((TypeError, ValueError), match=message):
      teachers.foreign(said, **options)
  with untyped(), pytest.raises(TypeError, match="function=3 must be a function of arrays"):
    teachers.foreign(3)


# A cache of it.


def test_it_is_asked_once_and_never_in_the_step(tmp_path):
  asked = []

  def function(inputs):
    asked.append(len(inputs))
    assert isinstance(inputs, np.ndarray)
    return said(inputs)

  teacher, source = teachers.foreign(function), source_of(normalize=lambda x: x + 1)
  with pytest.raises(TypeError, match=r"of another program .*data=teachers.cached\(teacher, sou"):
    fit(source, recipes.kd(), teacher=teacher)
  with pytest.raises(TypeError, match="cannot be compiled into a step"):
    jax.jit(lambda batch: teacher(batch))(first_batch(source))
  assert not asked
  cached = teachers.cached(teacher, source, batch_size=8, progress=None)
  # What it puts out is seen on eight, twice, and then on the three batches.
  assert asked == [8, 8, 8, 8, 8]
  batch = first_batch(cached)
  np.testing.assert_allclose(batch.teacher.logits, said(batch.inputs), rtol=1e-5, atol=1e-6)
  fit(cached, recipes.kd())
  assert len(asked) == 5


def test_one_that_draws_its_answers_is_refused(tmp_path):
  drawn = np.random.default_rng(0)
  teacher = teachers.foreign(lambda inputs: said(inputs) + drawn.normal(size=3))
  with pytest.raises(ValueError, match="asked twice, are two answers"):
    teachers.cached(teacher, source_of(), folder=tmp_path / "cache", progress=None)
  assert not (tmp_path / "cache").exists()


def test_it_may_be_asked_by_the_number_of_an_example():
  table = said(examples().inputs)
  teacher = teachers.foreign(lambda batch: table[batch.index], takes="batch")
  batch = first_batch(teachers.cached(teacher, source_of(), progress=None))
  np.testing.assert_allclose(batch.teacher.logits, table[batch.index], rtol=1e-6)
  held = data.evaluation_batches(examples(), batch_size=8)
  np.testing.assert_allclose(
    evaluation.taught(teacher, held).teacher.logits.reshape(-1, CLASSES)[:SIZE], table, rtol=1e-6
  )


def test_members_and_classes_of_it():
  batch = make_batch(examples().inputs)
  mine = teachers.foreign(said)
  network = networks.linen(MLP([4], num_classes=CLASSES))
  model = Model(network, network.init(jax.random.key(0), batch.inputs))
  both = teachers.ensemble([mine, model])
  expected = (said(batch.inputs) + np.asarray(model(batch).logits)) / 2
  np.testing.assert_allclose(both(batch).logits, expected, rtol=1e-5, atol=1e-6)
  few = teachers.subset(both, [2, 0])
  assert all(map(teachers.asked_on_host, (mine, both, few, teachers.grouped(few, [0, 0]))))
  assert not teachers.asked_on_host(teachers.frozen(model))
  cached = teachers.cached(few, source_of(), progress=None)
  shown = first_batch(cached)
  np.testing.assert_allclose(
    shown.teacher.logits, expected[shown.index][:, [2, 0]], rtol=1e-5, atol=1e-6
  )


def test_another_teacher_in_the_same_folder_is_refused(tmp_path):
  make = functools.partial(
    teachers.cached, source=source_of(), folder=tmp_path / "c", progress=None
  )
  make(teachers.foreign(said, name="mine 1"))
  make(teachers.foreign(lambda x: said(x), name="mine 1"))
  with pytest.raises(ValueError, match="asked: .*'mine 1'.* there, .*'mine 2'.* now"):
    make(teachers.foreign(said, name="mine 2"))
  with pytest.raises(ValueError, match="it puts out other logits"):
    make(teachers.foreign(lambda x: said(x) * 2, name="mine 1"))


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[2].split(os.pathsep)
import test_foreign as t
from jaxdistill import teachers
from jaxdistill.teachers import _cache

_cache.PART_SECONDS = 0
calls = []
def function(inputs):
  calls.append(1)
  if len(calls) == int(sys.argv[3]):
    os.kill(os.getpid(), signal.SIGKILL)
  return t.said(inputs)
t.fill(function, sys.argv[1])
"""


def fill(function, folder):
  teacher = teachers.foreign(function, name="mine")
  return teachers.cached(teacher, source_of(), folder=folder, batch_size=4, progress=None)


@pytest.mark.slow
def test_a_view_that_was_begun_is_gone_on_with(tmp_path):
  folder = tmp_path / "c"
  paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "tests" / "teachers")])
  program = [sys.executable, "-c", KILLED, str(folder), paths, "6"]
  killed = subprocess.run(program, capture_output=True, text=True, timeout=120)
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  assert not teachers.verify_cache(folder)
  manifest = _cache_files.read_manifest(folder)
  assert not manifest["views"]
  # Of the five answers, two are of the first look.
  assert _cache_files.lacking(folder, manifest) == SIZE - 12
  asked = []

  def function(inputs):
    asked.append(len(inputs))
    return said(inputs)

  cached = fill(function, folder)
  assert asked == [4, 4, 4, 4]  # a first look, twice, and two of five batches
  batch = first_batch(cached)
  np.testing.assert_allclose(batch.teacher.logits, said(batch.inputs), rtol=1e-5, atol=1e-6)
  manifest = _cache_files.read_manifest(folder)
  assert len(manifest["views"]["0"]) == len(list(folder.glob("view-*"))) == 5
  assert not teachers.verify_cache(folder)
  assert fill(function, folder).teacher == cached.teacher


@pytest.mark.slow_but("mixed-64", "mixed-1")
@pytest.mark.parametrize("shards", [64, 1])  # what there is of a view, and of a shard
@pytest.mark.parametrize("kind", ["streamed", "mixed"])
def test_a_part_is_of_the_right_examples_in_any_source(tmp_path, monkeypatch, kind, shards):
  monkeypatch.setattr(_cache, "PART_SECONDS", 0)
  monkeypatch.setattr(_cache_shards, "SHARDS", shards)
  made = examples()
  if kind == "streamed":
    source = data.streamed(made, batch_size=5, data_seed=0)
  else:
    other = data.from_arrays(made.inputs[::-1][:7] * 2, None, name="more")
    more = data.on_device(other, batch_size=5, data_seed=0)
    source = data.mixed(source_of(batch_size=10), more, share=0.5)
  calls = []

  def function(inputs):
    calls.append(1)
    if len(calls) == 5:
      raise ConnectionError("the server is gone")
    return said(inputs)

  options = {"folder": tmp_path / "c", "batch_size": 4, "progress": None}
  teacher = teachers.foreign(function, name="mine")
  with pytest.raises(ConnectionError):
    teachers.cached(teacher, source, **options)
  manifest = _cache_files.read_manifest(tmp_path / "c")
  assert 0 < _cache_files.lacking(tmp_path / "c", manifest) < source.whole.size
  cached = teachers.cached(teacher, source, **options)
  batch = first_batch(cached)
  np.testing.assert_allclose(batch.teacher.logits, said(batch.inputs), rtol=1e-5, atol=1e-6)


def test_a_damaged_part_is_named_and_dropped(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(_cache, "PART_SECONDS", 0)
  calls = []

  def function(inputs):
    calls.append(1)
    if len(calls) == 5:
      raise ConnectionError
    return said(inputs)

  folder = tmp_path / "c"
  with pytest.raises(ConnectionError):
    fill(function, folder)
  (path, *_) = sorted(folder.glob("*.array_record"))
  path.write_bytes(path.read_bytes()[:-3])
  with pytest.raises(teachers.CacheError, match=path.name):
    fill(said, folder)
  assert command.main(["verify", str(folder), "--drop"]) == 1
  assert path.name in capsys.readouterr().err
  fill(said, folder)
  assert not teachers.verify_cache(folder)


# Features without logits.


@pytest.mark.slow
def test_a_teacher_of_features_alone_teaches_a_hint(tmp_path):
  def embed(inputs):
    return np.asarray(inputs @ np.ones((WIDTH, 8)) / 4, np.float32)

  for folder in (None, tmp_path / "c"):
    teacher = teachers.foreign(embed, gives="features")
    cached = teachers.cached(teacher, source_of(), folder=folder, progress=None)
    batch = first_batch(cached)
    assert batch.teacher.logits is None
    np.testing.assert_allclose(batch.teacher.features["output"], embed(batch.inputs), rtol=1e-5)
    fitted = fit(cached, recipes.hint("mid", "output"), steps=200)
    assert fitted.history[-1]["loss"] < 0.3 * fitted.history[0]["loss"]
  assert not teachers.verify_cache(tmp_path / "c")
  opened = first_batch(teachers.cached(None, source_of(), folder=tmp_path / "c"))
  np.testing.assert_array_equal(opened.teacher.features["output"], batch.teacher.features["output"])


# A teacher that skips examples.

SKIPPED = np.isin(np.arange(SIZE), [1, 2, 8, 13])


def partly(batch):
  """Says nothing of some, and NaN in their place."""
  there = ~SKIPPED[batch.index]
  logits = np.where(there[:, None], said(batch.inputs), np.nan)
  return {"logits": logits, "where": there, "features/mid": np.repeat(logits, 3, axis=1)[:, :8]}


def partly_taught():
  """A batch of all examples with a partial teacher, and a network's outputs for it."""
  made = examples()
  cached = teachers.cached(
    teachers.foreign(partly, takes="batch"), source_of(batch_size=SIZE), progress=None
  )
  batch = first_batch(cached)
  rng = np.random.default_rng(3)
  features = {"mid": jnp.asarray(rng.normal(size=(SIZE, 6)), jnp.float32)}
  logits = jnp.asarray(rng.normal(size=(SIZE, CLASSES)), jnp.float32)
  assert cached.skipped == 4
  assert sorted(np.asarray(batch.index)[np.asarray(batch.teacher.where) == 0]) == [1, 2, 8, 13]
  assert len(made) == SIZE
  return batch, Outputs(logits=logits, features=features)


def cut_to(tree, rows):
  return jax.tree.map(lambda leaf: leaf[rows], tree)


MID = {"student_layer": "mid", "teacher_layer": "mid"}
METHODS = {
  "kd": recipes.kd(),
  "standardized": recipes.kd_standardized(),
  "dkd": recipes.dkd(warmup_steps=0),
  "dist": recipes.dist(),
  "pkt": recipes.pkt(**MID),
  "rkd": recipes.rkd(**MID),
  "similarity": recipes.similarity_preserving(**MID),
  "hint": recipes.combine(recipes.labels(), recipes.hint("mid", "mid")),
  "vid": recipes.vid(student_layers=["mid"], teacher_layers=["mid"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_method_learns_from_those_that_were_answered_alone(method):
  """Terms of the teacher as on a batch without the others; those of labels as on all of it."""
  objective = as_objective(METHODS[method])
  batch, student = partly_taught()
  shapes = jax.eval_shape(lambda: (student, dataclasses.replace(batch.teacher, where=None)))
  params, state = objective.init(jax.random.key(0), *shapes)
  hyper = {n: v for n, v in objective.hyper.items() if not callable(v)}

  def terms_of(ours, teacher, given):
    made = objective.apply(params, state, ours, teacher, given, key=jax.random.key(1), **hyper)
    return made

  def loss(ours):
    def made(teacher, given):
      return terms_of(ours, teacher, given)

    return reduce_terms(terms_where_answered(made, batch.teacher, batch)[0], batch)

  def expected(ours):
    teacher = dataclasses.replace(batch.teacher, where=None)
    there = np.flatnonzero(batch.teacher.where)
    alone = cut_to(batch, there)
    some = terms_of(cut_to(ours, there), cut_to(teacher, there), alone)[0]
    others = {n: t for n, t in some.items() if n != "labels"}
    labels = {"labels": terms_of(ours, teacher, batch)[0]["labels"]}
    one, other = reduce_terms(others, alone), reduce_terms(labels, batch)
    return one[0] + other[0], one[1] | other[1]

  (found, sums), grads = jax.value_and_grad(loss, has_aux=True)(student)
  (right, right_sums), right_grads = jax.value_and_grad(expected, has_aux=True)(student)
  np.testing.assert_allclose(found, right, rtol=1e-5)
  assert set(sums) == set(right_sums)
  for name, (total, count) in sums.items():
    np.testing.assert_allclose(total, right_sums[name][0], rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(count, right_sums[name][1], err_msg=name)
  assert float(sums["labels"][1]) == SIZE
  for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(right_grads), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_counts_each_example_where_it_belongs(accumulate):
  """One step of gradient descent by hand, in float64: labels of all, soft targets of the others."""
  made = examples(SIZE)
  cached = teachers.cached(
    teachers.foreign(partly, takes="batch"), source_of(batch_size=SIZE), progress=None
  )
  network = networks.linen(MLP([], num_classes=CLASSES))
  fitted = train.fit(
    network,
    recipes.kd(temperature=2.0, soft_weight=0.7, hard_weight=0.3),
    data=cached,
    optimizer=optax.sgd(1.0),
    steps=1,
    dispatch=train.with_jit(accumulate=accumulate),
    run=SILENT,
  )
  seeded = train.fit(
    network, recipes.labels(), data=source_of(), optimizer=optax.sgd(0.0), steps=1, run=SILENT
  )
  kernel, bias = (np.asarray(jax.tree.leaves(seeded.variables)[i], np.float64) for i in (1, 0))
  x, y, there = made.inputs.astype(np.float64), made.labels, ~SKIPPED
  z = x @ kernel + bias
  hard = scipy.special.softmax(z, 1) - np.eye(CLASSES)[y]
  soft = 2 * (scipy.special.softmax(z / 2, 1) - scipy.special.softmax(said(x) / 2, 1))
  slope = 0.3 * hard / SIZE + 0.7 * soft * there[:, None] / there.sum()
  after = [np.asarray(leaf) for leaf in jax.tree.leaves(fitted.variables)]
  np.testing.assert_allclose(after[1], kernel - x.T @ slope, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(after[0], bias - slope.sum(0), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_log_says_how_many_were_skipped(capsys, tmp_path):
  cached = teachers.cached(teachers.foreign(partly, takes="batch"), source_of(), progress="mine")
  assert "mine: the teacher skipped 4 of 20 examples." in capsys.readouterr().err
  fit(cached, recipes.kd(), run=train.Run(tmp_path / "run", progress="run"))
  assert "the teacher skipped 4 of 20 examples" in capsys.readouterr().err


def test_held_out_examples_that_were_skipped_are_no_disagreement():
  made = examples()
  held = data.evaluation_batches(made, batch_size=8)
  teacher = teachers.foreign(partly, takes="batch")
  network = networks.linen(MLP([4], num_classes=CLASSES))
  model = Model(network, network.init(jax.random.key(0), made.inputs))
  found = evaluation.evaluate(model, held, teacher=teacher)
  ours, theirs = np.asarray(model(made.inputs).logits), said(made.inputs)
  agree = ours.argmax(1) == theirs.argmax(1)
  np.testing.assert_allclose(found["agreement"], agree[~SKIPPED].mean(), rtol=1e-6)
  np.testing.assert_allclose(found["accuracy"], np.mean(ours.argmax(1) == made.labels), rtol=1e-6)
  nobody = teachers.foreign(
    lambda x: {"logits": np.full((len(x), CLASSES), np.nan), "where": np.zeros(len(x))}
  )
  assert "agreement" not in evaluation.evaluate(model, held, teacher=nobody)


def test_which_terms_look_at_the_teacher():
  def made(x):
    inner = jax.jit(lambda a, b: (a + 1, b * 2))
    one, other = inner(x["a"], jnp.ones(2))
    _, looped = jax.lax.scan(lambda c, v: (c + v, c), 0.0, x["a"])
    ours = losses.soft_target_kl(jnp.ones((2, 3)), x["b"], temperature=2.0)
    mine = losses.cross_entropy(jnp.ones((2, 3)), jnp.zeros(2, jnp.int32))
    return {"1": one, "2": other, "3": looped, "4": ours, "5": mine, "6": jnp.zeros(2)}

  given = {"a": jnp.ones(2), "b": jnp.ones((2, 3))}
  assert depend_on(made, given) == [True, False, True, True, False, False]
  only = depend_on(lambda a: made({"a": a, "b": given["b"]}), given["a"])
  assert only == [True, False, True, False, False, False]


def test_an_objective_of_ones_own_needs_no_word_of_it():
  batch, student = partly_taught()

  def mine(student, teacher, batch):
    apart = jnp.sum(jnp.square(student.logits - teacher.logits), axis=-1)
    return {"apart": Term(apart), "size": Term(jnp.sum(jnp.square(student.logits), axis=-1))}

  terms, _ = terms_where_answered(
    lambda teacher, given: as_objective(mine).apply({}, {}, student, teacher, given, key=None),
    batch.teacher,
    batch,
  )
  sums = reduce_terms(terms, batch)[1]
  assert (float(sums["apart"][1]), float(sums["size"][1])) == (16.0, 20.0)


# The file that other programs write with.

WRITER = pathlib.Path(cache_writer.__file__)
ALONE = """
import sys
for name in ("jax", "jaxlib", "flax", "jaxdistill", "array_record", "grain"):
  sys.modules[name] = None
import numpy as np
import cache_writer
rows = np.load(sys.argv[2])
order = rows["order"]
cache_writer.write(
  sys.argv[1],
  {"probabilities": rows["soft"][order], "features/hidden": rows["hidden"][order]},
  [str(i) for i in order],
  name="rows",
)
"""


def alone(tmp_path, order):
  """Runs a copy of the file in a process that has NumPy and nothing of ours."""
  hidden = np.random.default_rng(5).normal(size=(SIZE, 4)).astype(np.float32)
  runs.write_npz(tmp_path / "rows.npz", {"soft": SOFT, "hidden": hidden, "order": np.array(order)})
  shutil.copy(WRITER, tmp_path)
  program = [sys.executable, "-c", ALONE, str(tmp_path / "cache"), str(tmp_path / "rows.npz")]
  done = subprocess.run(program, capture_output=True, text=True, timeout=120, cwd=tmp_path)
  return done, hidden


@pytest.mark.slow
@pytest.mark.parametrize("where", ["device", "files"])
def test_a_copy_of_the_writer_needs_numpy_alone(tmp_path, monkeypatch, where):
  order = [i for i in np.random.default_rng(1).permutation(SIZE).tolist() if not SKIPPED[i]]
  done, hidden = alone(tmp_path, order)
  assert done.returncode == 0, done.stderr
  assert not teachers.verify_cache(tmp_path / "cache")
  monkeypatch.setattr(_cache, "_fits", lambda size, place: where == "device")
  cached = teachers.cached(None, source_of(), folder=tmp_path / "cache")
  assert cached.skipped == 4
  batch = first_batch(cached)
  there = ~SKIPPED[np.asarray(batch.index)]
  np.testing.assert_array_equal(batch.teacher.where, there)
  expected = np.where(there[:, None], np.log(SOFT)[batch.index], 0)
  np.testing.assert_allclose(batch.teacher.logits, expected, rtol=1e-6)
  expected = np.where(there[:, None], hidden[batch.index], 0)
  np.testing.assert_array_equal(batch.teacher.features["hidden"], expected)
  again, _ = alone(tmp_path, order)  # it is there, to the bit
  assert again.returncode == 0, again.stderr
  other, _ = alone(tmp_path, order[::-1])
  assert other.returncode == 1
  assert other.stderr.strip().splitlines()[-1].endswith("Take another folder, or delete it.")
  assert "is a cache of something else. ids:" in other.stderr


IDS = [str(i) for i in range(SIZE)]


def test_views_are_written_one_after_another(tmp_path):
  source = source_of(augmentation=data.Augmentation(lambda x, key: x, choices=2), views=2)
  write = functools.partial(
    teachers.write,
    tmp_path / "c",
    ids=IDS,
    name="rows",
    views=2,
    augmentation=source.augmentation,
    data_seed=0,
  )
  write(ROWS)
  with pytest.raises(ValueError, match=r"lacks the views \[1\] of 2"):
    teachers.cached(None, source, folder=tmp_path / "c")
  write(ROWS + 1, view=1)
  write(ROWS)
  with pytest.raises(ValueError, match="has view 0 with other numbers"):
    write(ROWS + 2)
  with pytest.raises(ValueError, match="view_count: 2 there, 3 now"):
    write(ROWS, views=3, view=2)
  cached = teachers.cached(None, source, folder=tmp_path / "c")
  items = cached.items(source.steps_per_epoch, 1)
  batch = cached.cut(cached.shared, jax.tree.map(lambda leaf: leaf[0], items))
  np.testing.assert_allclose(batch.teacher.logits, (ROWS + 1)[batch.index], rtol=1e-6)


def test_what_cannot_be_written_is_refused(tmp_path):
  write = functools.partial(teachers.write, tmp_path / "c", name="rows")
  for options, message in (
    ({"rows": ROWS, "ids": [*IDS[:-1], "0"]}, "ids must be different texts"),
    ({"rows": ROWS, "ids": IDS, "view": 1}, r"view=1 must lie in 0 .. 0"),
    ({"rows": ROWS, "ids": IDS, "dtype": "int8"}, "dtype='int8'"),
    ({"rows": ROWS * 1e5, "ids": IDS, "dtype": "float16"}, "number that dtype='float16' has not"),
    ({"rows": ROWS, "ids": IDS, "gives": "logit"}, "gives='logit' must be one of"),
  ):
    with pytest.raises(ValueError, match=message):
      write(**options)
  (tmp_path / "d").mkdir()
  (tmp_path / "d" / "notes.txt").write_text("mine")
  with pytest.raises(ValueError, match=r"holds \['notes.txt'\] and no cache"):
    teachers.write(tmp_path / "d", ROWS, IDS, name="rows")


def test_a_writer_that_was_killed_goes_on(tmp_path, monkeypatch):
  monkeypatch.setattr(cache_writer, "SHARD_BYTES", 100)
  replace, written = os.replace, []

  def dying(source, target):
    written.append(target)
    if len(written) == 5:
      raise KeyboardInterrupt
    replace(source, target)

  monkeypatch.setattr(os, "replace", dying)
  with pytest.raises(KeyboardInterrupt):
    teachers.write(tmp_path / "c", ROWS, IDS, name="rows")
  assert not _cache_files.read_manifest(tmp_path / "c")["views"]
  teachers.write(tmp_path / "c", ROWS, IDS, name="rows")
  assert not teachers.verify_cache(tmp_path / "c")
  assert len(_cache_files.read_manifest(tmp_path / "c")["views"]["0"]) > 2
  batch = first_batch(teachers.cached(None, source_of(), folder=tmp_path / "c"))
  np.testing.assert_allclose(batch.teacher.logits, ROWS[batch.index], rtol=1e-6)


def test_ids_of_other_examples_are_refused(tmp_path):
  teachers.write(tmp_path / "c", ROWS, [f"x{i}" for i in IDS], name="rows")
  with pytest.raises(ValueError, match="is a cache of other examples: 20 of 20 ids are not in it"):
    teachers.cached(None, source_of(), folder=tmp_path / "c")
  teachers.write(tmp_path / "d", ROWS, [*IDS[:-1], "x"], name="rows")
  with pytest.raises(ValueError, match="is a cache of other examples: 1 of 20 .*has 20"):
    teachers.cached(None, source_of(), folder=tmp_path / "d")


def harmed(folder, change):
  """Changes a shard of NumPy and lets the manifest believe in it."""
  (path,) = folder.glob("*.npy")
  np.save(path, change(np.load(path)))
  manifest = json.loads((folder / "manifest.json").read_text())
  manifest["views"]["0"][0] |= runs.size_and_digest(path)
  _cache_files._write_manifest(folder, manifest)
  return path.name


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda records: records[[1, 0, *range(2, SIZE)]], "another record where that of '0' belongs"),
    (lambda records: records[:-1].repeat(2), r"has \[38\] records, 20 were written"),
    (lambda records: records["logits"].repeat(9, 0), "has records of float32"),
  ],
)
def test_shards_of_numpy_are_verified(tmp_path, change, message):
  teachers.write(tmp_path / "c", ROWS, IDS, name="rows")
  name = harmed(tmp_path / "c", change)
  (problem,) = teachers.verify_cache(tmp_path / "c")
  assert re.search(f"{name} .*{message}", problem)
  (tmp_path / "c" / name).write_bytes(b"no array")
  (problem,) = teachers.verify_cache(tmp_path / "c")
  assert f"{name} has 8 bytes" in problem or "is not as it was" in problem or name in problem


def test_a_forest_of_several_labels_answers_as_scikit_learn_has_it():
  """A list of [B, 2] for each label; as many labels as examples are no other thing."""
  x = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
  for labels in (x > 0, x[:, :3] > 0.2):
    forest = sklearn.ensemble.RandomForestClassifier(5, random_state=0).fit(x, labels)
    teacher = teachers.foreign(forest.predict_proba, gives="binary_probabilities", floor=1e-3)
    said = np.asarray(teacher(make_batch(x[:4])).logits)
    yes = np.stack([one[:, 1] for one in forest.predict_proba(x[:4])], axis=1)
    bounded = np.clip(yes, 1e-3, 1 - 1e-3)
    np.testing.assert_allclose(said, np.log(bounded / (1 - bounded)), rtol=1e-5)
