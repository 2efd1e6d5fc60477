"""Two or four processes of a program, over loopback: one run folder, the numbers of one process."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax._src import array
from jax._src import distributed as distributed_jax
from jax.sharding import NamedSharding, PartitionSpec

import small_networks
from jaxdistill import data, evaluation, export, recipes, runs, search, teachers, train
from jaxdistill.runs import Checkpoints
from jaxdistill.train import _mesh
from jaxdistill.types import Model

CHILD = """
import os, sys
port, process, processes, folder, kind, devices = sys.argv[1:]
os.environ["XLA_FLAGS"] = (
  f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
)
os.environ["JAX_PLATFORMS"] = "cpu"
import jax
jax.distributed.initialize(f"localhost:{port}", int(processes), int(process))
jax.config.update("jax_enable_x64", True)
import test_processes, test_processes_labels
works = {
  "stopped": test_processes.stopped, "left": test_processes.left,
  "parts": test_processes.in_parts, "evaluated": test_processes.evaluated,
  "full": test_processes.full, "filled": test_processes.filled,
  "restored": test_processes.restored,
  "labels": test_processes_labels.work,
}
works.get(kind.split()[0], test_processes.work)(folder, kind)
"""

# Two halves of it, which are accumulated, are shared out over four processes of two devices.
BATCH = 16
# The axes of a mesh over all devices of two processes, or of four.
SHAPES = {
  "parts": {"data": 1, "fsdp": 4},
  "parts both": {"data": 2, "fsdp": 2},
  "parts of four": {"data": 2, "fsdp": 4},
}


def run(folder, kind, dispatch=None, **options):
  """The same run for one process and for several; float64: only additions' order differs."""
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 3, 48)
  inputs = rng.normal(size=(48, 4)) + np.eye(3, 4)[labels]
  examples = data.from_arrays(inputs, labels, num_classes=3)
  make = data.streamed if kind == "streamed" else data.on_device
  sources = [make(examples, batch_size=BATCH, data_seed=seed) for seed in (0, 1)]
  network = small_networks.dense(7, param_dtype=jnp.float64)
  teacher = teachers.frozen(Model(network, network.init(jax.random.key(9), inputs[:1])))
  several = kind != "streamed"
  return small_networks.fit(
    small_networks.dense(5, norm=True, param_dtype=jnp.float64),
    recipes.combine(recipes.kd(), recipes.hint("mid", "mid")),
    data=sources if several else sources[0],
    seed=(0, 1) if several else 0,
    optimizer=optax.sgd(0.1),
    teacher=teacher,
    average=0.9,
    accumulate=2,
    validate=evaluation.validator(data.evaluation_batches(examples, batch_size=16)),
    folder=folder,
    dispatch=dispatch,
    **{"steps": 8, "validate_every": 4, "log_every": 2, **options},
  )


class StopError(Exception):
  """Stands for whatever ends a run."""


def work(folder, kind):
  """What each of the processes does: a run that breaks off, and the same run again."""

  def stop(step, record):
    if step == 6:
      raise StopError

  with pytest.raises(StopError):
    run(folder, kind, callback=stop)
  fitted = run(folder, kind)
  assert fitted.history[-1]["step"] == 8 or jax.process_index() > 0
  student = export.load_student(folder)
  assert np.all(np.isfinite(student(np.zeros((2, 4)))))
  restored = teachers.restore(folder, small_networks.dense(5, norm=True))
  assert restored.variables["params"]["Dense_0"]["kernel"].shape[-2:] == (4, 5)
  with pytest.raises(ValueError, match="use with_jit"):
    train.with_pmap()
  with pytest.raises(ValueError, match="another configuration"):
    run(folder, kind, config={"another": 1})
  with pytest.raises(ValueError, match=rf"of one process, and there are {jax.process_count()}: "):
    search.sweep(None, None, points=[], data=None, optimizer=None, steps=1, choice=None)
  with contextlib.ExitStack() as stack:
    if jax.process_index() == 0:
      stack.enter_context(runs.hold(pathlib.Path(folder)))
    with pytest.raises((FileExistsError, RuntimeError), match="another job's|and says why"):
      run(folder, kind)


def stopped(folder, kind):
  """A run whose time is over in one of the processes, or in which one of them gets SIGTERM."""
  _, how, chunk, who = kind.split()
  options = {"log_every": int(chunk), "validate_every": 800, "steps": 800}

  def terminate(step, record):
    if how == "signal" and jax.process_index() == int(who):
      os.kill(os.getpid(), signal.SIGTERM)

  def slowly(step, record):
    terminate(step, record)
    time.sleep(0.3)  # the notice takes a moment from one process to the other

  with pytest.raises(train.Stopped) as left:
    run(folder, "streamed", callback=slowly, stop_after=0.5 if how == "time" else None, **options)
  assert left.value.code == 143
  print(f"stands at {re.search(r'step ([0-9]+) of 800', str(left.value))[1]}")


def left(folder, kind):
  """A run that one of the two processes leaves by an error of its own."""

  def fail(step, record):
    if step == 4 and jax.process_index() == int(kind.split()[1]):
      raise StopError("of its own")

  run(folder, "streamed", callback=fail, steps=800, validate_every=800)


def of_parts(**axes):
  """Student and teacher in parts on a mesh."""
  devices = jax.devices()[: np.prod(list(axes.values()))]
  mesh = train.mesh(devices=devices, **axes)
  return train.with_jit(mesh, sharding=train.fsdp(), teacher_sharding=train.fsdp())


def break_off(folder, dispatch):
  """A run that ends at step 6 of 8, and is saved at step 4."""

  def stop(step, record):
    if step == 6:
      raise StopError

  with pytest.raises(StopError):
    run(folder, "parts", dispatch, callback=stop)


def in_parts(folder, kind):
  """What each of several processes of two devices does: runs in parts, broken off and gone on."""
  fetched, value = [], array.ArrayImpl._value
  noted = property(lambda self: (fetched.append(self), value.fget(self))[1])
  array.ArrayImpl._value = noted
  folder = pathlib.Path(folder)
  shape = SHAPES[kind]
  dispatch = of_parts(**shape)
  whole = run(folder / "whole", "parts", dispatch)
  break_off(folder / "broken", dispatch)
  if jax.process_index() == 0:
    shutil.copytree(folder / "broken", folder / "left")
  _mesh.barrier("copied")
  again = run(folder / "broken", "parts", dispatch)
  for a, b in zip(jax.tree.leaves(again.state), jax.tree.leaves(whole.state), strict=True):
    assert a.sharding == b.sharding
    assert not a.is_fully_addressable
    if not runs.is_key(a):
      for mine, theirs in zip(a.addressable_shards, b.addressable_shards, strict=True):
        np.testing.assert_array_equal(np.asarray(mine.data), np.asarray(theirs.data))
  kernel = whole.state.params["Dense_0"]["kernel"]
  assert kernel.addressable_shards[0].data.size == kernel.size / shape["fsdp"]
  assert fetched
  assert all(x.is_fully_replicated or len(x.devices()) == 1 for x in fetched), "a whole leaf came"
  run(folder / "begun", "parts", dispatch)  # by one process
  found = run(folder / "whole", "parts", dispatch)  # which is finished, and is left as it is
  assert runs.lies_in_parts(found.variables)
  with pytest.raises(ValueError, match="lies on devices of other processes, and a file of weights"):
    export.as_program(whole.unstack()[0], stored=jax.ShapeDtypeStruct((4,), float))


def restored(folder, kind):
  """What each of two processes of four devices does: it goes on from what four of two saved."""
  seen = []
  dispatch = of_parts(**SHAPES["parts of four"])
  run(folder, "parts", dispatch, callback=lambda step, line: seen.append(step))
  assert seen == [6, 8], "it began anew"


def everything(place, seeds=True):
  """What is evaluated of models whose variables are put somewhere; arrays by name."""
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 3, 71)  # five batches of 16, of which the last has nine of padding
  inputs = (rng.normal(size=(71, 4)) + np.eye(3, 4)[labels]).astype(np.float32)
  examples = data.from_arrays(inputs, labels, num_classes=3)
  network = small_networks.dense(16)
  variables = [network.init(jax.random.key(seed), inputs[:1]) for seed in (1, 2)]
  models = {"one": Model(network, place(variables[0]))}
  if seeds:
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *variables)
    models["two seeds"] = Model(network, stacked, 2)
  teacher = teachers.frozen(Model(network, place(variables[1])))
  found = {}
  for how, most in (("stacked", None), ("streamed", 0)):
    batches = data.evaluation_batches(examples, batch_size=16, most=most)
    taught = evaluation.taught(teacher, batches)
    found[f"{how}/logits"] = taught.teacher.logits
    for name, model in models.items():
      asked = (batches, teacher) if name == "one" else (taught, None)
      metrics, answers = evaluation.examine(model, asked[0], teacher=asked[1])
      near = evaluation.evaluate(model, batches, task=evaluation.tasks.embedding("mid"))
      validated = evaluation.validator(batches)(model)
      validated = {f"validated {metric}": number for metric, number in validated.items()}
      for about in (metrics, vars(answers), near, validated):
        found |= {f"{name}/{how}/{key}": value for key, value in about.items()}
  return found


def on_own_devices(tree):
  """Whole on each device of this process, as `fit` gives a student back."""
  here = train.data_parallel(jax.local_devices()[:2])
  return jax.device_put(tree, NamedSharding(here, PartitionSpec()))


def wrong_label():
  """A stream whose second batch, which process 1 reads, has a label that is none."""
  examples = data.from_arrays(np.ones((8, 4), np.float32), np.zeros(8, int), num_classes=3)
  batches = data.evaluation_batches(examples, batch_size=4, most=0)

  def make(number):
    batch = batches[number]
    return dataclasses.replace(batch, labels=batch.labels + 7 * number)

  return dataclasses.replace(batches, make=make)


def full(folder, kind):
  """A run in parts whose process 1 finds no room on its disk when it saves."""
  if jax.process_index() == 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
  began = time.monotonic()
  try:
    run(folder, "parts", of_parts(data=1, fsdp=4))
  finally:
    print(f"left after {time.monotonic() - began:.0f} s")


def cache_of(folder):
  """A source, a teacher whose outputs are cached, and where."""
  rng = np.random.default_rng(0)
  inputs = rng.integers(0, 256, (96, 3, 3, 1)).astype(np.uint8)
  examples = data.from_arrays(inputs, rng.integers(0, 3, 96))
  source = data.on_device(examples, batch_size=16, data_seed=0, views=4, augmentation=data.crop(1))
  network = small_networks.dense(7)
  variables = on_own_devices(network.init(jax.random.key(9), inputs[:1] / 255))
  return source, teachers.frozen(Model(network, variables)), folder / "outputs"


def filled(folder, kind):
  """What each of several processes does that fill one cache, and train with it."""
  jax.config.update("jax_enable_x64", False)
  source, teacher, place = cache_of(pathlib.Path(folder))
  made = teachers.fill(teacher, source, place, batch_size=16, progress=None)
  print(f"filled {made.records} rows")
  cached = teachers.cached(teacher, source, folder=place, batch_size=16, progress=None)
  fitted = small_networks.fit(
    small_networks.dense(5), recipes.kd(), data=cached, optimizer=optax.sgd(0.1), steps=30
  )
  np.savez(pathlib.Path(folder) / f"{jax.process_index()}.npz", *jax.tree.leaves(fitted.variables))
  everywhere = NamedSharding(train.data_parallel(), PartitionSpec())
  far = jax.tree.map(
    lambda leaf: jax.make_array_from_callback(
      leaf.shape, everywhere, lambda index: np.asarray(leaf)[index]
    ),
    teacher,
  )
  with pytest.raises(ValueError, match="each fills a cache by itself"):
    teachers.fill(far, source, place, batch_size=16, progress=None)


def evaluated(folder, kind):
  """What each of several processes evaluates, and what it says where one of them cannot."""
  jax.config.update("jax_enable_x64", False)
  if kind == "evaluated parts":
    mesh = train.mesh(data=2, fsdp=jax.device_count() // 2)
    found = everything(
      lambda tree: jax.tree.map(_mesh.put, tree, train.shardings(tree, mesh, train.fsdp())), False
    )
  else:
    found = everything(on_own_devices)
    network = small_networks.dense(3)
    model = Model(network, network.init(jax.random.key(0), np.zeros((1, 4))))
    # Of more processes than batches the third and fourth take the two batches too.
    wanted = ValueError if jax.process_index() % 2 else RuntimeError
    with pytest.raises(wanted, match="7" if wanted is ValueError else "process 1: .*7"):
      evaluation.evaluate(model, wrong_label())
    good = wrong_label().make(0)
    alone = []
    whole = jax.tree.map(lambda leaf: leaf[None], good)
    runs.Together().first(lambda: alone.append(evaluation.evaluate(model, whole)))
    assert len(alone) == (jax.process_index() == 0)
  np.savez(pathlib.Path(folder) / f"{jax.process_index()}.npz", **found)


def begin(folder, kind, processes=2, devices=1):
  """Starts so many processes, of so many devices each."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  here = pathlib.Path(__file__).parent
  paths = [str(here), str(here.parent), str(here.parent.parent), os.environ.get("PYTHONPATH", "")]
  environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
  command = [sys.executable, "-W", "ignore", "-c", CHILD, str(port)]
  return [
    subprocess.Popen(
      [*command, str(process), str(processes), str(folder), kind, str(devices)],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for process in range(processes)
  ]


def finish(children):
  """Waits for all of them; what they printed."""
  outputs = []
  for child in children:
    try:
      output, _ = child.communicate(timeout=600)
    finally:
      for other in children:
        if child.returncode != 0:
          other.kill()
    assert child.returncode == 0, output
    outputs.append(output)
  return outputs


@pytest.mark.slow
@pytest.mark.parametrize(
  ("kind", "processes"),
  [
    ("stopped signal 1 0", 2),
    ("stopped signal 4 0", 2),
    ("stopped signal 100 0", 2),
    ("stopped time 4 0", 2),
    ("stopped signal 4 2", 4),
  ],
)
def test_processes_stop_at_the_same_step(tmp_path, kind, processes):
  """Whatever the chunks' length: the service that agrees on a step counts calls."""
  outputs = finish(begin(tmp_path / "run", kind, processes, processes // 2))
  steps = {int(re.search(r"stands at (\d+)", output)[1]) for output in outputs}
  with Checkpoints(tmp_path / "run" / "checkpoints") as saved:
    assert steps == {saved.latest()}
  assert max(steps) < 800


@pytest.mark.slow
@pytest.mark.parametrize("leaves", [0, 1])
def test_an_error_in_one_process_ends_the_other_with_a_sentence(tmp_path, leaves):
  children = begin(tmp_path / "run", f"left {leaves}")
  try:
    outputs = [child.communicate(timeout=240)[0] for child in children]
  finally:
    for child in children:
      child.kill()
  assert [child.returncode for child in children] == [1, 1]
  assert "StopError: of its own" in outputs[leaves]
  said = f"process {leaves} of 2 left the training by StopError: of its own, and process"
  assert said in outputs[1 - leaves]


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_process_ends_all_of_them(tmp_path):
  """Orbax's own barrier would hold the others for five minutes."""
  children = begin(tmp_path / "run", "full", devices=2)
  try:
    outputs = [child.communicate(timeout=200)[0] for child in children]
  finally:
    for child in children:
      child.kill()
  assert [child.returncode for child in children] == [1, 1], outputs
  assert "saving the checkpoint of step 4" in outputs[1]
  assert "saving the checkpoint of step 4" in outputs[0] or "process 1 of 2 left" in outputs[0]
  assert "process 1" in outputs[0]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("kind", "processes", "devices"), [("on device", 2, 1), ("streamed", 2, 1), ("streamed", 4, 2)]
)
def test_several_processes_are_one(tmp_path, kind, processes, devices):
  children = begin(tmp_path / "several", kind, processes, devices)
  with jax.enable_x64(True):
    dispatch = train.with_jit(train.data_parallel(jax.devices()[:2]))
    one = run(tmp_path / "one", kind, dispatch=dispatch)
  finish(children)
  with jax.enable_x64(True), Checkpoints(tmp_path / "several" / "checkpoints") as saved:
    assert saved.steps() == [4, 8]
    several = saved.restore(8)
  expected = jax.tree.leaves(one.variables)
  for a, b in zip(jax.tree.leaves(several["student"]), expected, strict=True):
    # Eight steps in float64 in which only the order of additions differs.
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
  lines = [json.loads(t) for t in (tmp_path / "several" / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == [2, 4, 6, 8]
  for line, other in zip(lines, one.history, strict=True):
    for name in ("loss", *(name for name in other if name.startswith("validation/"))):
      np.testing.assert_allclose(line[name], other[name], rtol=1e-6, err_msg=name)
  assert "validation/nll" in lines[-1]


@pytest.fixture
def unused(monkeypatch):
  """As if nothing of JAX had been used yet, on a machine of no cluster."""
  monkeypatch.setattr(distributed_jax.xla_bridge, "backends_are_initialized", lambda: False)
  for name in list(os.environ):
    if name.startswith(("SLURM", "OMPI", "KUBERNETES", "JAX_", "TPU")):
      monkeypatch.delenv(name)


@pytest.mark.parametrize(
  ("told", "match"),
  [
    ({}, "coordinator, processes, process of .* SLURM .* Open MPI .* Kubernetes .* Cloud TPU"),
    ({"coordinator": "localhost:1"}, "^processes, process of the program's processes were not"),
    ({"coordinator": "localhost:1", "processes": 2}, "^process of the program's processes"),
    ({"coordinator": "localhost"}, "coordinator='localhost' must be 'host:port'"),
    ({"coordinator": "a:1", "processes": 0}, "processes=0"),
    ({"coordinator": "a:1", "processes": 2, "process": 2}, "process=2 must be below processes=2"),
  ],
)
def test_processes_that_are_neither_told_nor_found_say_what_was_looked_for(unused, told, match):
  with pytest.raises(ValueError, match=match):
    train.distributed(**told)
  with pytest.raises(TypeError, match="coordinator=3"), small_networks.untyped():
    train.distributed(3)


def the_same(found, wanted):
  """Eight steps in float64 in which only the order of additions differs."""
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("kind", "processes"), [("parts", 2), ("parts both", 2), ("parts of four", 4)]
)
def test_processes_of_two_devices_in_parts_are_one(tmp_path, kind, processes):
  """To the bit when gone on with; by one process and back; each writes what it holds.

  What four processes of two devices saved is gone on with by one of one, and by two of four.
  """
  with jax.enable_x64(True):
    one = run(tmp_path / "one", "parts", train.with_jit(of_one()))
    break_off(tmp_path / "begun", of_parts(data=1, fsdp=2))
    finish(begin(tmp_path, kind, processes, devices=2))
    by_process = sorted(p.name for p in (tmp_path / "whole/checkpoints/8/student").glob("ocdbt.*"))
    assert by_process == [f"ocdbt.process_{process}" for process in range(processes)]
    ended = ["whole", "broken", "begun"]
    shutil.copytree(tmp_path / "left", tmp_path / "left again")
    if processes == 4:
      shutil.copytree(tmp_path / "left", tmp_path / "left to two")
      finish(begin(tmp_path / "left to two", "restored", devices=4))
      ended.append("left to two")
    fewer = run(tmp_path / "left", "parts", of_parts(data=1, fsdp=2))
    alone = run(tmp_path / "left again", "parts", train.with_jit(of_one()))
    for made in (fewer, alone):
      the_same(made.variables, one.variables)
      np.testing.assert_allclose(losses(made), losses(one), rtol=1e-6)
    for folder in ended:
      with Checkpoints(tmp_path / folder / "checkpoints") as saved:
        the_same(saved.restore(8)["student"], one.variables)
      student = export.load_student(tmp_path / folder)
      the_same(student(np.ones((2, 4))), one.unstack()[0](np.ones((2, 4))).logits)
  lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
  np.testing.assert_allclose([json.loads(t)["loss"] for t in lines], losses(one), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("kind", "processes"), [("evaluated", 2), ("evaluated parts", 2), ("evaluated", 4)]
)
def test_several_processes_evaluate_as_one(tmp_path, kind, processes):
  """Bit for bit where each batch is one process's; in parts, to float32's rounding of its sums."""
  children = begin(tmp_path, kind, processes, devices=2)
  one = everything(on_own_devices, seeds=kind == "evaluated")
  finish(children)
  for process in range(processes):
    with np.load(tmp_path / f"{process}.npz") as found:
      assert sorted(found) == sorted(one)
      for name, value in one.items():
        if kind == "evaluated":
          np.testing.assert_array_equal(found[name], value, err_msg=name)
        else:
          np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_that_talk_fill_one_cache(tmp_path, processes):
  """The files that one process of as many devices writes, and the student trained on them."""
  children = begin(tmp_path, "filled", processes, devices=2)
  (tmp_path / "alone").mkdir()
  source, teacher, place = cache_of(tmp_path / "alone")
  teachers.fill(teacher, source, place, batch_size=16, progress=None)
  outputs = finish(children)
  rows = [int(re.search(r"filled (\d+) rows", output)[1]) for output in outputs]
  assert sum(rows) == 4 * 96
  names = sorted(path.name for path in place.rglob("*.array_record"))
  found = tmp_path / "outputs"
  assert names
  assert names == sorted(path.name for path in found.rglob("*.array_record"))
  for path in place.rglob("*.array_record"):
    assert path.read_bytes() == (found / path.relative_to(place)).read_bytes()
  cached = teachers.cached(teacher, source, folder=place, batch_size=16, progress=None)
  fitted = small_networks.fit(
    small_networks.dense(5), recipes.kd(), data=cached, optimizer=optax.sgd(0.1), steps=30
  )
  for process in range(processes):
    with np.load(tmp_path / f"{process}.npz") as leaves:
      for a, b in zip(leaves.values(), jax.tree.leaves(fitted.variables), strict=True):
        # Thirty steps in float32 in which only the order of additions differs.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def of_one():
  return train.data_parallel(jax.devices()[:1])


def losses(fitted):
  return [line["loss"] for line in fitted.history]
