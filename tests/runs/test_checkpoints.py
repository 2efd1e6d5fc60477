import asyncio
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import typing
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax._src import array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from jaxdistill import runs
from jaxdistill.runs import (
  CheckpointError,
  Checkpoints,
  CheckpointWarning,
  _checkpoints,
  _manifest,
  _orbax,
  _shards,
  load_variables,
  save_variables,
)


def params(value=1.0):
  kernel = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32) * np.float32(value)
  return {"dense": {"kernel": jnp.array(kernel), "bias": jnp.full(4, float(value))}}


def assert_same(got, want):
  """The same containers, types and bits."""
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for (path, a), b in zip(
    jax.tree_util.tree_flatten_with_path(got)[0], jax.tree.leaves(want), strict=True
  ):
    where = jax.tree_util.keystr(path)
    if isinstance(b, jax.Array) and jax.dtypes.issubdtype(b.dtype, jax.dtypes.prng_key):
      assert isinstance(a, jax.Array), where
      assert a.dtype == b.dtype, where
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    assert isinstance(a, jax.Array) == isinstance(b, jax.Array), where
    assert isinstance(b, jax.Array) or type(a) is type(b), where
    assert np.shape(a) == np.shape(b), where
    assert np.asarray(a).dtype == np.asarray(b).dtype, where
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), where


def largest(folder):
  return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path, at=None):
  data = bytearray(path.read_bytes())
  data[len(data) // 2 if at is None else at] ^= 1
  path.write_bytes(data)


def newest(folder, **keywords):
  with pytest.warns(CheckpointWarning, **keywords) as record:
    step = Checkpoints(folder).latest()
  return step, [str(w.message) for w in record]


@pytest.fixture
def two(tmp_path):
  """A folder with steps 1 and 2."""
  with Checkpoints(tmp_path / "run") as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, {"student": params(step), "extra": {"count": jnp.int32(step)}})
  return checkpoints


class Pair(typing.NamedTuple):
  first: typing.Any
  second: typing.Any


def everything():
  opt_state = optax.adamw(1e-3).init(params())
  return {
    "train": {
      "params": params(),
      "opt_state": opt_state,
      "key": jax.random.key(3),
      "keys": jax.random.split(jax.random.key(1, impl="rbg"), 2),
      "raw_key": jax.random.PRNGKey(2),
    },
    "odd": {
      "pair": Pair((jnp.ones(2), None), [jnp.array(2, jnp.int8), {}]),
      "none": None,
      "empty": {},
      "no_elements": jnp.zeros((0, 3)),
      "names . %20/é": {"a/b": np.arange(3), "a": jnp.ones(())},
      "": jnp.ones(1),
      "scalars": (1, 2.5, True, np.float32(0.1), -0.0),
      "not_a_number": jnp.array([jnp.nan, -jnp.inf, -0.0]),
      "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    },
    "dtypes": {
      str(dtype): jnp.array([0, 1, 3], dtype)
      for dtype in (jnp.bfloat16, jnp.float16, jnp.uint8, jnp.int4, jnp.uint4, jnp.float8_e5m2)
    }
    | {"bool": jnp.array([True, False]), "complex": jnp.array([1 + 2j])},
    "bare": jnp.arange(3),
    "nothing": {},
  }


def test_everything_round_trips_with_equal_bits(tmp_path):
  items = everything()
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(0, items)
    assert checkpoints.latest() == 0
    assert_same(checkpoints.restore(0, items), items)
    # Reading must not change the folder.
    assert checkpoints.latest() == 0
    shapes = jax.eval_shape(lambda: items["train"])
    assert_same(checkpoints.restore(0, {"train": shapes})["train"], items["train"])


def test_without_like_containers_and_types_come_back(tmp_path):
  items = everything()
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(0, items)
    got = checkpoints.restore(0)
  pair = items["odd"]["pair"]
  items["odd"]["pair"] = {"first": pair.first, "second": pair.second}
  items["odd"]["scalars"] = (1, 2.5, True, np.array(np.float32(0.1)), -0.0)
  for item in ("odd", "dtypes", "bare", "nothing"):
    assert_same(got[item], items[item])
  adam = got["train"]["opt_state"][0]
  assert set(adam) == {"count", "mu", "nu"}
  assert_same(adam["mu"], jax.tree.map(jnp.zeros_like, params()))


def test_only_the_items_asked_for_are_read(two):
  flip(largest(two.folder / "2" / "student"))
  like = {"extra": {"count": jax.ShapeDtypeStruct((), jnp.int32)}}
  assert_same(two.restore(2, like), {"extra": {"count": jnp.int32(2)}})
  assert_same(two.restore(2, {"extra": None}), {"extra": {"count": jnp.int32(2)}})
  with pytest.raises(CheckpointError, match="SHA-256"):
    two.restore(2, {"student": params()})


def test_shardings_are_those_of_like(tmp_path):
  mesh = Mesh(np.asarray(jax.devices()[:2]), ("data",), axis_types=(AxisType.Auto,))
  replicated = NamedSharding(mesh, PartitionSpec())
  split = NamedSharding(mesh, PartitionSpec("data"))
  items = {
    "x": {
      "replicated": jax.device_put(jnp.arange(4.0), replicated),
      "split": jax.device_put(jnp.arange(4.0), split),
      "keys": jax.device_put(jax.random.split(jax.random.key(0), 2), split),
      "fresh": jnp.arange(4.0),
    }
  }
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(0, items)
    got = checkpoints.restore(0, items)
    shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), items
    )
    # The other way round: what was replicated is split now.
    shapes["x"]["replicated"] = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=split)
    from_shapes = checkpoints.restore(0, shapes)
  assert_same(got, items)
  assert_same(from_shapes, items)
  for name in ("replicated", "split", "keys"):
    assert got["x"][name].sharding.is_equivalent_to(items["x"][name].sharding, 1)
  assert from_shapes["x"]["replicated"].sharding.is_equivalent_to(split, 1)
  # An uncommitted array stays one, or jit would refuse to mix it with those on the mesh.
  assert not got["x"]["fresh"].committed
  assert jax.jit(jnp.add)(got["x"]["fresh"], got["x"]["split"]).tolist() == [0, 2, 4, 6]


def parts(*shape, dtype=jnp.float32, cut=("data",)):
  """An array that is cut over two devices."""
  mesh = Mesh(np.asarray(jax.devices()[:2]), ("data",), axis_types=(AxisType.Auto,))
  values = jnp.arange(np.prod(shape)).astype(dtype).reshape(shape)
  return jax.device_put(values, NamedSharding(mesh, PartitionSpec(*cut)))


def test_arrays_in_parts_are_saved_and_restored_part_by_part(tmp_path, monkeypatch):
  items = {
    "state": {
      "first": parts(6, 4),
      "second": parts(3, 8, cut=(None, "data")),
      **{name: parts(8, dtype=getattr(jnp, name)) for name in ("bfloat16", "int4", "float8_e5m2")},
      "keys": jax.device_put(jax.random.split(jax.random.key(0), 2), parts(2).sharding),
      "empty": parts(0, 4),
      "everywhere": parts(5, cut=()),
      "host": np.arange(3),
    }
  }
  cut = {leaf.shape for leaf in jax.tree.leaves(items)} - {(5,), (3,), (0, 4)}
  fetched, value = [], array.ArrayImpl._value
  noted = property(lambda self: (fetched.append(self.shape), value.fget(self))[1])
  monkeypatch.setattr(array.ArrayImpl, "_value", noted)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(0, items)
    got = checkpoints.restore(0, items)
    assert (2, 2) not in fetched  # the keys' numbers
    assert not cut & set(fetched), "a whole array was on the host"
    whole = checkpoints.restore(0)["state"]
    fewer = checkpoints.restore(0, {"state": dict.fromkeys(items["state"], None) | whole})
  monkeypatch.undo()
  assert_same(got, items)
  for name, leaf in items["state"].items():
    if isinstance(leaf, jax.Array):
      assert got["state"][name].sharding == leaf.sharding, name
  assert_same(whole, items["state"])
  assert_same(fewer["state"], items["state"])
  at = jax.ShapeDtypeStruct((3, 8), jnp.float32, sharding=parts(2).sharding)
  other = {"state": {**items["state"], "second": at}}
  with pytest.raises(ValueError, match=r"second \[3, 8\] does not divide as like has it"):
    checkpoints.restore(0, other)


def test_what_is_kept_of_an_array_in_parts_lies_once():
  mesh = Mesh(np.asarray(jax.devices()[:2]).reshape(1, 2), ("data", "model"))
  half = jax.device_put(jnp.arange(4.0), NamedSharding(mesh, PartitionSpec("data")))
  assert [part.data.shape for part in _shards.kept(half).addressable_shards] == [(4,)]
  both = _shards.kept(parts(4))
  assert [part.data.shape for part in both.addressable_shards] == [(2,), (2,)]
  pointers = [part.data.unsafe_buffer_pointer() for part in parts(4).addressable_shards]
  assert not set(pointers) & {p.data.unsafe_buffer_pointer() for p in both.addressable_shards}


def test_donation_after_save_does_not_reach_the_file(tmp_path, monkeypatch):
  # Written late, so that the donated buffer is overwritten long before.
  write = _orbax.write
  monkeypatch.setattr(_orbax, "write", lambda *a: (time.sleep(0.3), write(*a)))
  cut = parts(1000)
  state = {"x": jnp.arange(1000.0), "key": jax.random.key(1)}
  update = jax.jit(
    lambda s: {"x": s["x"] * -7, "key": jax.random.fold_in(s["key"], 1)}, donate_argnums=0
  )
  double = jax.jit(lambda x: x * -7, donate_argnums=0)
  with Checkpoints(tmp_path) as checkpoints:
    began = time.perf_counter()
    checkpoints.save(0, {"state": {**state, "cut": cut}})
    assert time.perf_counter() - began < 0.25, "save waits for the writing"
    for _ in range(3):
      state, cut = update(state), double(cut)
    jax.block_until_ready((state["x"], cut))
    got = checkpoints.restore(0)["state"]
  np.testing.assert_array_equal(got["x"], np.arange(1000, dtype=np.float32))
  np.testing.assert_array_equal(got["cut"], np.arange(1000, dtype=np.float32))
  assert (jax.random.key_data(got["key"]) == jax.random.key_data(jax.random.key(1))).all()


def test_numpy_arrays_may_be_changed_after_save(tmp_path):
  array = np.zeros(100_000)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(0, {"x": array})
    array[:] = 1
    assert not checkpoints.restore(0)["x"].any()


def test_the_last_ones_and_the_best_are_kept(tmp_path):
  scores = {0: 0.1, 1: 0.9, 2: float("nan"), 3: 0.9, 4: None, 5: 0.2}
  with Checkpoints(tmp_path, keep_last=2) as checkpoints:
    for step, score in scores.items():
      checkpoints.save(step, {"x": jnp.array(step)}, score=score)
  # Of 1 and 3, which are equal, the earlier; another process knows it from the manifests.
  again = Checkpoints(tmp_path)
  assert again.steps() == [1, 4, 5]
  assert (again.latest(), again.best()) == (5, 1)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "4", "5"]
  with Checkpoints(tmp_path, keep_last=1, keep_best=False) as checkpoints:
    checkpoints.save(6, {"x": jnp.array(6)}, score=0.0)
  assert again.steps() == [6]


def test_the_best_is_the_best_that_verifies(tmp_path):
  with Checkpoints(tmp_path, keep_last=3) as checkpoints:
    for step, score in enumerate([0.5, 0.7, 0.6]):
      checkpoints.save(step, {"x": jnp.array(step)}, score=score)
  flip(largest(tmp_path / "1" / "x"))
  with pytest.warns(CheckpointWarning, match="SHA-256"):
    assert checkpoints.best() == 2


def test_nothing_is_removed_before_the_new_one_is_complete(two, monkeypatch):
  def fail(*_):
    assert two._complete() == [1, 2]
    raise OSError("No space left on device")

  monkeypatch.setattr(_orbax, "write", fail)
  one = Checkpoints(two.folder, keep_last=1)
  one.save(3, {"student": params()})
  with pytest.raises(CheckpointError, match="step 3 .*the disk is full"):
    one.wait()
  one.wait()  # Raised once.
  assert one.steps() == [1, 2]
  one.save(3, {"student": params()})
  with pytest.raises(CheckpointError, match="the disk is full"):
    one.save(4, {"student": params()})
  one.save(4, {"student": params()})
  with pytest.raises(CheckpointError, match="the disk is full"):
    one.close()


def test_a_step_after_going_back_outlives_the_damaged_newer_one(tmp_path):
  with Checkpoints(tmp_path, keep_last=1) as checkpoints:
    checkpoints.save(20, {"x": jnp.ones(2)})
    checkpoints.wait()
    flip(largest(tmp_path / "20" / "x"))
    checkpoints.save(15, {"x": jnp.ones(2)})
  step, _ = newest(tmp_path)
  assert step == 15


@pytest.mark.parametrize("damage", ["flipped", "truncated", "deleted", "added", "empty file"])
def test_damage_is_noticed_and_the_step_before_is_used(two, damage):
  student = two.folder / "2" / "student"
  file = largest(student)
  reason = {"flipped": "SHA-256", "truncated": "bytes", "deleted": "is missing"}.get(damage)
  if damage == "flipped":
    flip(file)
  elif damage == "truncated":
    file.write_bytes(file.read_bytes()[:-1])
  elif damage == "deleted":
    file.unlink()
  elif damage == "added":
    file, reason = student / "d" / "new", "was not written"
    file.write_bytes(b"x")
  else:
    file, reason = student / "manifest.ocdbt", "has 0 bytes"
    file.write_bytes(b"")
  step, (message,) = newest(two.folder)
  assert step == 1
  for part in (str(two.folder / "2"), file.relative_to(two.folder / "2").as_posix(), reason):
    assert part in message
  with pytest.raises(CheckpointError, match=reason):
    two.restore(2)
  assert_same(two.restore(1)["student"], params(1))


@pytest.mark.parametrize("damage", ["no manifest", "half a manifest", "score", "format"])
def test_a_manifest_is_verified_too(two, damage):
  manifest = two.folder / "2" / "manifest.json"
  body = json.loads(manifest.read_text())
  if damage == "no manifest":
    manifest.unlink()
  elif damage == "half a manifest":
    manifest.write_text(manifest.read_text()[:100])
  elif damage == "score":
    manifest.write_text(json.dumps(body | {"score": 1.0}))
  else:
    body["format"] = 99
    manifest.write_text(json.dumps(body | {"digest": runs.digest(body)}))
  reason = {"no manifest": "half written", "half a manifest": "cannot be read"}.get(damage, damage)
  step, (message,) = newest(two.folder)
  assert step == 1
  assert "manifest.json" in message
  assert {"score": "digest"}.get(damage, reason) in message
  assert two.steps() == ([1] if damage == "no manifest" else [1, 2])


def test_all_damaged_is_none_with_a_warning_each(two):
  for step in (1, 2):
    flip(largest(two.folder / str(step) / "student"))
  step, messages = newest(two.folder)
  assert step is None
  assert len(messages) == 2


def test_a_step_is_replaced(two):
  flip(largest(two.folder / "2" / "student"))
  two.save(2, {"student": params(5)}, score=0.5)
  assert two.latest() == 2
  assert_same(two.restore(2, {"student": params()})["student"], params(5))
  two.save(2, {"student": params(6)})
  assert_same(two.restore(2)["student"], params(6))
  assert two.best() is None
  assert sorted(p.name for p in two.folder.iterdir()) == ["1", "2"]


def test_a_kill_while_replacing_loses_nothing(two):
  # As it lies between the two renames: the old one is away and the new one has no name yet.
  os.rename(two.folder / "1", two.folder / "2.removed")
  os.rename(two.folder / "2", two.folder / "2.writing")
  (two.folder / "3.writing").mkdir()
  (two.folder / "3.writing.orbax-checkpoint-tmp").mkdir()
  assert (two.steps(), two.latest()) == ([2], 2)
  assert_same(two.restore(2)["student"], params(2))
  two.save(4, {"student": params()})
  assert two.steps() == [2, 4]
  assert sorted(p.name for p in two.folder.iterdir()) == ["2", "4"]


KILLED = """
import sys, time, jax.numpy as jnp
from jaxdistill import runs
from jaxdistill.runs import _files
checkpoints = runs.Checkpoints(sys.argv[1])
checkpoints.save(1, {"x": jnp.arange(4.0)})
checkpoints.wait()
# Killed after Orbax's commit, before the manifest.
_files.sha256 = lambda path: print("now", flush=True) or time.sleep(60)
checkpoints.save(2, {"x": jnp.arange(4.0)})
checkpoints.wait()
"""


@pytest.mark.slow
def test_sigkill_in_the_midst_of_a_save_leaves_the_earlier_one(tmp_path):
  process = subprocess.Popen(
    [sys.executable, "-c", KILLED, str(tmp_path)],
    stdout=subprocess.PIPE,
    cwd=pathlib.Path(_checkpoints.__file__).parent.parent.parent,
  )
  with process:
    assert process.stdout.readline() == b"now\n"
    process.send_signal(signal.SIGKILL)
  assert process.returncode == -signal.SIGKILL
  assert (tmp_path / "2.writing").is_dir()
  with Checkpoints(tmp_path) as checkpoints:
    assert (checkpoints.steps(), checkpoints.latest()) == ([1], 1)
    assert_same(checkpoints.restore(1, {"x": jnp.zeros(4)})["x"], jnp.arange(4.0))
    checkpoints.save(2, {"x": jnp.zeros(4)})
    assert checkpoints.latest() == 2
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


def other(**leaves):
  return {"student": {"dense": params()["dense"] | leaves}}


@pytest.mark.parametrize(
  ("like", "parts"),
  [
    (other(bias=jnp.zeros(5)), ["dense/bias", "(4,)", "(5,)", "number of classes"]),
    (other(kernel=jnp.zeros((2, 3, 4))), ["dense/kernel", "(3, 4)", "(2, 3, 4)", "pmap"]),
    (other(kernel=jnp.zeros((9, 9))), ["dense/kernel", "(9, 9)", "architecture"]),
    (other(bias=jnp.zeros(4, jnp.bfloat16)), ["dense/bias", "float32", "bfloat16", "precision"]),
    (other(bias=jax.random.split(jax.random.key(0), 4)), ["dense/bias", "key<fry>", "typed key"]),
    (other(scale=jnp.zeros(4)), ["dense/scale", "nothing", "optimiser"]),
    ({"student": {"dense": {"bias": jnp.zeros(4)}}}, ["dense/kernel", "structure"]),
    ({"extra": {"count": 1.5}}, ["count", "int32", "float64"]),
    ({"pupil": {}}, ["'pupil'", "'student'", "'extra'"]),
  ],
)
def test_another_structure_shape_or_dtype_is_an_error(two, like, parts):
  with pytest.raises(ValueError, match="checkpoint") as error:
    two.restore(2, like)
  for part in parts:
    assert part in str(error.value)


def test_what_is_not_there(two, tmp_path):
  with pytest.raises(FileNotFoundError, match=r"step 7 .*there are: 1, 2"):
    two.restore(7)
  nowhere = Checkpoints(tmp_path / "nowhere")
  assert (nowhere.steps(), nowhere.latest(), nowhere.best()) == ([], None, None)
  with pytest.raises(FileNotFoundError, match="no folder"):
    nowhere.restore(1)
  assert not (tmp_path / "nowhere").exists()
  with pytest.raises(FileNotFoundError, match="path="):
    load_variables(tmp_path / "nowhere")


def test_bad_arguments(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  with pytest.raises(ValueError, match="keep_last=0"):
    Checkpoints(tmp_path, keep_last=0)
  with pytest.raises(ValueError, match="step=-1"):
    checkpoints.save(-1, {"x": jnp.ones(1)})
  with pytest.raises(ValueError, match="items is empty"):
    checkpoints.save(0, {})
  with pytest.raises(ValueError, match="'metrics'"):
    checkpoints.save(0, {"metrics": jnp.ones(1)})
  with pytest.raises(ValueError, match="'a/b'"):
    checkpoints.save(0, {"a/b": jnp.ones(1)})
  with pytest.raises(ValueError, match="'a/b'"):
    checkpoints.save(0, {"x": {"a": {"b": 1}, "a/b": 2}})
  with pytest.raises(TypeError, match="x/name is a str"):
    checkpoints.save(0, {"x": {"name": "resnet"}})
  with pytest.raises(TypeError, match="x/many is of dtype object"):
    checkpoints.save(0, {"x": {"many": 2**70}})
  with pytest.raises(TypeError, match="x/long is of dtype float128"):
    checkpoints.save(0, {"x": {"long": np.longdouble(1)}})
  with pytest.raises(TypeError, match="JSON"):
    checkpoints.save(0, {"x": 1}, metadata={"array": np.ones(1)})
  assert checkpoints.steps() == []


def test_metadata(two):
  metadata = {"seed": 1, "name": "é", "list": [1.5, None], 3: {"a": True}, "nan": float("nan")}
  two.save(3, {"x": 1}, metadata=metadata)
  got = two.metadata(3)
  assert np.isnan(got.pop("nan"))
  assert got == {"seed": 1, "name": "é", "list": [1.5, None], "3": {"a": True}}
  assert two.metadata(2) == {}
  assert two.latest() == 3


def test_64_bits_that_are_not_enabled(tmp_path):
  with jax.enable_x64(True):
    wide = {"x": jnp.array([1 / 3], jnp.float64)}
    save_variables(tmp_path / "wide", wide)
    assert_same(load_variables(tmp_path / "wide", wide), wide)
  got = load_variables(tmp_path / "wide")["x"]
  assert (type(got), got.dtype, got[0]) == (np.ndarray, np.float64, 1 / 3)
  with pytest.raises(ValueError, match="jax_enable_x64"):
    load_variables(tmp_path / "wide", {"x": jax.ShapeDtypeStruct((1,), np.float64)})


PATHS = ["lr=[0.1]", "a*b", "what?", "{x,y}", "ünï cödé", "a b", "a%20b", "a#b", "[!a]/[b]"]


@pytest.mark.parametrize("name", PATHS)
def test_a_path_may_have_any_characters(tmp_path, name):
  # What a pattern of that name would find instead.
  for other in ("lr=0", "axb", "whatx", "x", "b/b"):
    save_variables(tmp_path / other / "variables", params(9))
  with Checkpoints(tmp_path / name) as checkpoints:
    checkpoints.save(3, {"params": params(2)})
    checkpoints.wait()
    assert_same(checkpoints.restore(3, {"params": params()})["params"], params(2))
  for target in (tmp_path / name / "variables", tmp_path / f"{name}-variables"):
    save_variables(target, params(3))
    assert_same(load_variables(target, params()), params(3))
    assert not list(target.parent.glob("*.writing"))


@pytest.mark.parametrize("fault", ["lost", "changed", "changed in a part"])
def test_what_cannot_be_read_back_does_not_count(tmp_path, monkeypatch, fault):
  write = _orbax.write

  def wrong(folder, arrays):
    if fault != "lost":
      arrays = jax.tree.map(lambda leaf: leaf + 1, arrays)
    write(folder, arrays)
    if fault == "lost":
      largest(folder).unlink()

  large = {"kernel": jnp.arange(2.0**16).reshape(256, 256)}
  if fault == "changed in a part":
    large = {"kernel": parts(256, 256)}
  with Checkpoints(tmp_path / "run") as checkpoints:
    checkpoints.save(1, {"params": large})
    checkpoints.wait()
    monkeypatch.setattr(_orbax, "write", wrong)
    checkpoints.save(2, {"params": large})
    with pytest.raises(CheckpointError, match=r"cannot be read again|is not what was written"):
      checkpoints.wait()
    assert checkpoints.latest() == 1
  with pytest.raises(CheckpointError):
    save_variables(tmp_path / "variables", large)
  with pytest.raises((FileNotFoundError, CheckpointError)):
    load_variables(tmp_path / "variables")


def test_variables(tmp_path):
  path = tmp_path / "runs" / "teacher"
  variables = {"params": params(), "batch_stats": {"mean": jnp.zeros(3)}}
  save_variables(path, params(3))
  save_variables(path, variables)
  assert_same(load_variables(path), variables)
  assert_same(load_variables(path, jax.eval_shape(lambda: variables)), variables)
  assert [p.name for p in path.parent.iterdir()] == ["teacher"]
  with pytest.raises(FileExistsError, match="runs"):
    save_variables(path.parent, variables)
  flip(largest(path / "variables"))
  with pytest.raises(CheckpointError, match="SHA-256"):
    load_variables(path)


def test_any_flipped_bit_of_any_file_is_noticed(tmp_path):
  save_variables(tmp_path / "x", {"x": jnp.ones(3)})
  for file in sorted(p for p in (tmp_path / "x").rglob("*") if p.is_file() and p.stat().st_size):
    for at in (0, file.stat().st_size // 3, -1):
      flip(file, at)
      with pytest.raises(CheckpointError):
        runs.verify(tmp_path / "x")
      flip(file, at)
  runs.verify(tmp_path / "x")


def test_orbax_reads_a_checkpoint_as_it_is(two):
  got = ocp.load_checkpointables(two.folder / "2", {"student": None})
  np.testing.assert_array_equal(got["student"]["dense/kernel"], params(2)["dense"]["kernel"])


def test_inside_a_running_event_loop_as_in_a_notebook(tmp_path):
  async def cell():
    save_variables(tmp_path / "x", params())
    return load_variables(tmp_path / "x")

  assert_same(asyncio.run(cell()), params())


def test_no_warnings_of_others(tmp_path, capfd):
  with warnings.catch_warnings(record=True) as record:
    warnings.simplefilter("always")
    with Checkpoints(tmp_path) as checkpoints:
      checkpoints.save(0, {"x": jnp.ones(3)})
      checkpoints.restore(0)
  assert not record
  assert capfd.readouterr() == ("", "")


def described_anew(folder, change):
  """Changes a manifest, and its digest with it."""
  body = runs.read_digested(folder / runs.MANIFEST)
  change(body)
  runs.write_digested(folder / runs.MANIFEST, body)


@pytest.mark.parametrize(
  "change",
  [
    lambda leaf: leaf.update(shape=[10**6, 10**6]),
    lambda leaf: leaf.update(shape=[4, 3]),
    lambda leaf: leaf.update(shape=[-1]),
    lambda leaf: leaf.update(shape="34"),
    lambda leaf: leaf.update(dtype="int32"),
    lambda leaf: leaf.update(dtype="|O"),
    lambda leaf: leaf.update(dtype=None),
    lambda leaf: leaf.update(kind="other"),
    lambda leaf: leaf.pop("shape"),
  ],
)
def test_a_manifest_that_claims_other_arrays_than_lie_there_is_not_believed(tmp_path, change):
  save_variables(tmp_path / "a", params())
  described_anew(
    tmp_path / "a",
    lambda body: change(body["items"]["variables"]["leaves"]["dense/kernel"]),
  )
  with pytest.raises(CheckpointError, match="a cannot be used: "):
    load_variables(tmp_path / "a")


@pytest.mark.parametrize(
  "outline", [3, {}, {"leaf": "other"}, {"leaf": []}, {"dict": [1]}, {"list": 3}]
)
def test_an_outline_that_is_none_is_said(tmp_path, outline):
  save_variables(tmp_path / "a", params())
  described_anew(tmp_path / "a", lambda body: body["items"]["variables"].update(outline=outline))
  with pytest.raises(CheckpointError, match="has an outline of variables that is none"):
    load_variables(tmp_path / "a")


def test_arrays_are_no_larger_than_the_manifest_says_before_they_are_read(tmp_path, monkeypatch):
  """Zeros take no room: what Orbax has may be any size."""
  monkeypatch.setattr(_manifest, "_ZEROS", 2**20)
  save_variables(tmp_path / "a", params())
  arrays = {
    "dense/kernel": np.zeros((2**10, 2**11), np.float32),
    "dense/bias": np.zeros(4, np.float32),
  }
  _orbax.write(tmp_path / "b", {"variables": arrays})
  body = runs.read_digested(tmp_path / "a" / runs.MANIFEST)
  _manifest.write_manifest(tmp_path / "b", {k: body[k] for k in ("items", "metadata", "score")})
  with pytest.raises(CheckpointError, match=r"dense/kernel is .*1024.* and not .*\(3, 4\)"):
    load_variables(tmp_path / "b")
  body["items"]["variables"]["leaves"]["dense/kernel"]["shape"] = [2**10, 2**11]
  _manifest.write_manifest(tmp_path / "b", {k: body[k] for k in ("items", "metadata", "score")})
  with pytest.raises(CheckpointError, match="more than ten times what lies there: say .* by like="):
    load_variables(tmp_path / "b")
  like = {"dense": {n.split("/")[1]: jnp.array(a) for n, a in arrays.items()}}
  assert_same(load_variables(tmp_path / "b", like), like)
  shutil.rmtree(tmp_path / "b" / "orbax.checkpoint", ignore_errors=True)
  (tmp_path / "b" / runs.MANIFEST).unlink()  # and now it is a foreign one
  with pytest.raises(CheckpointError, match="more than ten times what lies there"):
    _orbax.read_foreign_orbax(tmp_path / "b", {"params": ""})
  found = _orbax.read_foreign_orbax(tmp_path / "b", {"params": ""}, expected=2**24)
  assert found["params"]["dense/kernel"].shape == (2**10, 2**11)


@pytest.mark.parametrize("what", ["file", "manifest", "folder"])
def test_links_out_of_a_checkpoint_are_not_followed(tmp_path, what):
  save_variables(tmp_path / "a", params())
  where = {"file": largest(tmp_path / "a"), "manifest": tmp_path / "a" / runs.MANIFEST}
  path = where.get(what, tmp_path / "a" / "variables")
  path.rename(tmp_path / "elsewhere")
  path.symlink_to(tmp_path / "elsewhere")
  with pytest.raises(CheckpointError, match="is a link out of its folder|is missing"):
    load_variables(tmp_path / "a")
  save_variables(tmp_path / "a", params(2.0))  # and is written over, where it is and not beyond
  assert (tmp_path / "elsewhere").exists()
  assert_same(load_variables(tmp_path / "a"), params(2.0))
