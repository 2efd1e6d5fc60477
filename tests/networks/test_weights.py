import asyncio
import json
import os
import pathlib
import pickle
import shutil
import socket
import subprocess
import sys
from typing import Any

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy as safetensors_numpy
from flax.training import train_state
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxdistill import runs
from jaxdistill.networks import weights
from jaxdistill.runs import CheckpointError, _orbax

HALF = np.array([1.5, -2.0, 0.0, 3.0], ml_dtypes.bfloat16)
PARAMS = {
  "Dense_0": {
    "kernel": np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32),
    "bias": HALF,
  }
}
STATISTICS = {"BatchNorm_0": {"mean": np.arange(4, dtype=np.float32)}}
VARIABLES = {"params": PARAMS, "batch_stats": STATISTICS}


class TrainState(train_state.TrainState):
  batch_stats: Any = None


def state(params=PARAMS, batch_stats=STATISTICS):
  return TrainState.create(
    apply_fn=None,
    params=jax.tree.map(jnp.asarray, params),
    tx=optax.chain(optax.clip(1.0), optax.adamw(1e-3)),
    batch_stats=jax.tree.map(jnp.asarray, batch_stats),
  )


def over_two_devices(tree):
  mesh = Mesh(np.asarray(jax.devices()[:2]), ("data",), axis_types=(AxisType.Auto,))

  def put(leaf):
    spec = PartitionSpec("data") if np.shape(leaf)[:1] else PartitionSpec()
    return jax.device_put(leaf, NamedSharding(mesh, spec))

  return jax.tree.map(put, tree)


def assert_same(got, want, kind=jax.Array):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert isinstance(a, kind)
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture(autouse=True)
def nothing_is_unpickled(monkeypatch):
  def refuse(*_, **__):
    raise AssertionError("something was unpickled")

  monkeypatch.setattr(pickle, "load", refuse)
  monkeypatch.setattr(pickle, "loads", refuse)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
  """What each of Orbax's writers leaves behind."""
  folder = tmp_path_factory.mktemp("foreign")
  with ocp.StandardCheckpointer() as standard:
    standard.save(folder / "train_state", over_two_devices(state()))
  with ocp.PyTreeCheckpointer() as writer:
    writer.save(folder / "nested", {"model": VARIABLES, "note": "text", "lists": [{"a": 1.5}, []]})
    writer.save(folder / "params_alone", PARAMS)
    writer.save(folder / "variables_in_params", state(VARIABLES, None))
    writer.save(folder / "two", {"state": VARIABLES, "ema": [{"params": PARAMS}], "step": 3})
  # Steps that are no manager's, in lexical order another last.
  for step in (9, 10):
    with ocp.PyTreeCheckpointer() as writer:
      scaled = jax.tree.map(lambda leaf, by=step - 9: leaf * np.array(by, leaf.dtype), VARIABLES)
      writer.save(folder / "steps" / f"checkpoint_{step}", scaled)
  with ocp.CheckpointManager(folder / "manager") as manager:
    manager.save(2, args=ocp.args.StandardSave({"params": {"w": np.zeros(3, np.float32)}}))
    manager.save(10, args=ocp.args.StandardSave(state()), metrics={"accuracy": 1.0})
    manager.wait_until_finished()
  with ocp.CheckpointManager(folder / "items") as manager:
    items = {"state": ocp.args.PyTreeSave(state()), "config": ocp.args.JsonSave({"width": 4})}
    manager.save(0, args=ocp.args.Composite(**items))
    manager.wait_until_finished()
  # Of other names from Orbax 0.12 on.
  save = getattr(ocp.v1, "save", None) or ocp.v1.save_pytree
  save(folder / "v1", VARIABLES)
  ocp.v1.save_checkpointables(folder / "v1_items", {**VARIABLES, "opt_state": state().opt_state})
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as writer:
    trained = {**VARIABLES, "opt_state": {"momentum": np.ones(3, np.float32)}}
    writer.save(folder / "apart", args=ocp.args.PyTreeSave(trained))
  return folder


WHOLE = ["train_state", "variables_in_params", "nested", "steps", "manager", "manager/10", "items"]


@pytest.mark.parametrize("name", [*WHOLE, "v1", "v1_items"])
def test_orbax_reads_what_each_writer_wrote(foreign, name, capfd):
  before = sorted(foreign.rglob("*"))
  got = weights.orbax(foreign / name)
  assert_same(got, VARIABLES)
  for leaf in jax.tree.leaves(got):
    assert leaf.devices() == {jax.devices()[0]}
    assert not leaf.committed
  assert_same(runs.read_foreign_orbax(foreign / name), VARIABLES, np.ndarray)
  assert_same(weights.orbax(foreign / name, collections=("params",)), {"params": PARAMS})
  assert sorted(foreign.rglob("*")) == before
  assert capfd.readouterr() == ("", "")


def test_orbax_inside_a_running_event_loop_as_in_a_notebook(foreign):
  async def cell():
    return weights.orbax(foreign / "manager")

  assert_same(asyncio.run(cell()), VARIABLES)


def test_orbax_reads_parameters_alone(foreign):
  assert_same(weights.orbax(foreign / "params_alone"), {"params": PARAMS})
  whole = weights.orbax(foreign / "params_alone", collections={"batch_stats": ""})
  assert_same(whole, {"batch_stats": PARAMS})


def test_links_out_of_somebody_elses_checkpoint_are_not_followed(foreign, tmp_path):
  shutil.copytree(foreign / "v1", tmp_path / "a")
  inside = next(path for path in (tmp_path / "a").rglob("*") if path.name == "manifest.ocdbt")
  inside.rename(tmp_path / "outside")
  inside.symlink_to(tmp_path / "outside")
  with pytest.raises(CheckpointError, match="manifest.ocdbt is a link out of"):
    weights.orbax(tmp_path / "a")


def test_orbax_does_not_read_the_optimizer(foreign, tmp_path):
  shutil.copytree(foreign / "apart", tmp_path / "apart")
  # The numbers are taken away, what says their shapes stays. Of one array only: Orbax closes its
  # event loop at the first one that fails, and others that are on their way then complain.
  moments = [p for p in (tmp_path / "apart").glob("opt_state*/*") if p.name != ".zarray"]
  assert moments
  for moment in moments:
    moment.unlink()
  assert_same(weights.orbax(tmp_path / "apart"), VARIABLES)
  with pytest.raises(CheckpointError, match="cannot be read by Orbax"):
    weights.orbax(tmp_path / "apart", collections={"moments": "opt_state"})


def test_orbax_says_what_is_there(foreign, tmp_path):
  with pytest.raises(
    ValueError, match=r"'params' at several places \(ema/0/params, state/params\)"
  ):
    weights.orbax(foreign / "two")
  chosen = weights.orbax(foreign / "two", collections={"params": "ema/0/params"})
  assert_same(chosen, {"params": PARAMS})
  with pytest.raises(ValueError, match=r"no collection 'lora'; it holds: .*params/Dense_0"):
    weights.orbax(foreign / "v1", collections=("lora",))
  with pytest.raises(
    ValueError, match=r"'params': 'nowhere'.* holds: .*lists/0, model/batch_stats"
  ):
    weights.orbax(foreign / "nested", collections={"params": "nowhere"})
  with pytest.raises(ValueError, match="note of .* is no array"):
    weights.orbax(foreign / "nested", collections={"all": ""})
  with pytest.raises(ValueError, match=r"collections='params' must be"):
    weights.orbax(foreign / "nested", collections="params")
  with pytest.raises(FileNotFoundError, match="no checkpoint at path=.*nowhere"):
    weights.orbax(foreign / "nowhere")
  with pytest.raises(ValueError, match="no checkpoint of Orbax's.*holds: .*manager"):
    weights.orbax(foreign)
  (tmp_path / "file").touch()
  with pytest.raises(ValueError, match="is a file"):
    weights.orbax(tmp_path / "file")
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match="holds: nothing"):
    weights.orbax(tmp_path / "empty")


@pytest.mark.parametrize("damage", ["metadata", "data", "half written"])
def test_a_damaged_checkpoint_of_orbax(foreign, tmp_path, damage):
  folder = tmp_path / "2"
  shutil.copytree(foreign / "manager" / "2", folder)
  item = folder / "default"
  if damage == "metadata":
    (item / "_METADATA").write_text((item / "_METADATA").read_text()[:50])
  elif damage == "data":
    shutil.rmtree(item / "d")
  else:
    folder = folder.rename(tmp_path / "2.orbax-checkpoint-tmp")
  with pytest.raises(
    ValueError if damage == "half written" else CheckpointError, match="half written|cannot be read"
  ):
    weights.orbax(folder)


def test_our_own_folders_are_not_foreign(tmp_path):
  runs.save_variables(tmp_path / "teacher", VARIABLES)
  with pytest.raises(ValueError, match="runs.load_variables reads"):
    weights.orbax(tmp_path / "teacher")
  with pytest.raises(ValueError, match="export.load_student"):
    weights.orbax(tmp_path)
  run = tmp_path / "run"
  with runs.Checkpoints(run / "checkpoints") as checkpoints:
    checkpoints.save(3, {"student": VARIABLES})
  (run / "config.json").write_text("{}")
  for folder in (run, run / "checkpoints"):
    with pytest.raises(ValueError, match=r"use teachers.restore\('.*run'\)"):
      weights.orbax(folder)
  with pytest.raises(ValueError, match=r"use teachers.restore\('.*run', step=3\)"):
    weights.orbax(run / "checkpoints" / "3")


@pytest.mark.parametrize(
  ("content", "want"),
  [
    (lambda: VARIABLES, VARIABLES),
    (lambda: PARAMS, {"params": PARAMS}),
    (state, VARIABLES),
    (lambda: state(VARIABLES, None), VARIABLES),
  ],
)
def test_msgpack(tmp_path, content, want):
  file = tmp_path / "networks.weights.msgpack"
  file.write_bytes(flax.serialization.to_bytes(content()))
  assert_same(weights.msgpack(file), want)
  shapes = jax.eval_shape(lambda: want)
  assert_same(weights.msgpack(file, like=shapes), want)


def test_msgpack_that_is_none(tmp_path):
  file = tmp_path / "networks.weights.msgpack"
  content = flax.serialization.to_bytes(VARIABLES)
  for damaged in (content[:-1], content[:40], content + b"\0", b""):
    file.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="truncated, or no msgpack"):
      weights.msgpack(file)
  file.write_bytes(flax.serialization.msgpack_serialize({"opt_state": {"params": {"w": HALF}}}))
  with pytest.raises(ValueError, match="no collection 'params'; it holds: opt_state/params"):
    weights.msgpack(file)
  with pytest.raises(ValueError, match="is a folder.*networks.weights.orbax"):
    weights.msgpack(tmp_path)
  with pytest.raises(FileNotFoundError, match="no weights at path=.*absent"):
    weights.msgpack(tmp_path / "absent")
  file.write_bytes(pickle.dumps(VARIABLES))
  with pytest.raises(ValueError, match="nothing is unpickled"):
    weights.msgpack(file)


def test_like_gives_structure_dtype_and_sharding(tmp_path):
  file = tmp_path / "a.safetensors"
  tree = {"params": {"w": np.array([1, 1 + 2.0**-20], np.float64), "n": np.int8(3)}}
  weights.save_safetensors(file, tree)
  device = jax.sharding.SingleDeviceSharding(jax.devices()[1])
  like = {
    "params": {
      "w": jax.ShapeDtypeStruct((2,), jnp.bfloat16, sharding=device),
      "n": jax.ShapeDtypeStruct((), jnp.int32),
    }
  }
  got = weights.safetensors(file, like=flax.core.freeze(like))
  assert isinstance(got, flax.core.FrozenDict)
  assert got["params"]["w"].devices() == {jax.devices()[1]}
  assert not got["params"]["n"].committed
  want = {"params": {"w": np.ones(2, ml_dtypes.bfloat16), "n": np.int32(3)}}
  assert_same(flax.core.unfreeze(got), want)
  # Without like: as it is, though JAX would halve 64 bits.
  plain = weights.safetensors(file)["params"]
  assert (type(plain["w"]), plain["w"].dtype) == (np.ndarray, np.float64)
  np.testing.assert_array_equal(plain["w"], tree["params"]["w"])
  assert isinstance(plain["n"], jax.Array)


@pytest.mark.parametrize(
  ("like", "parts"),
  [
    (
      {"params": {"w": np.zeros((3, 2), np.float32), "v": np.zeros(1)}, "batch_stats": {"m": 1.0}},
      ["Missing: batch_stats/m, params/v", "Unexpected: params/n", "(2, 3)", "(3, 2)", "linear"],
    ),
    ({"params": {"w": np.zeros((2, 4)), "n": np.zeros(())}}, ["params/w is (2, 3)", "(2, 4)"]),
    ({"params": {"w": np.zeros((2, 3), int), "n": np.int32(0)}}, ["params/w", "float32", "int64"]),
    ({"params": {"w": np.zeros((2, 3)), "n": np.int32(0)}}, ["float64", "jax_enable_x64"]),
    ({"params": {"w": np.ones((2, 3), "f2"), "n": np.int32(0)}}, ["params/w", "too large"]),
    ({"params": {"w": np.ones((2, 3), "f4"), "n": np.int8(0)}}, ["params/n", "int32", "int8"]),
  ],
)
def test_like_that_does_not_fit(tmp_path, like, parts):
  file = tmp_path / "a.safetensors"
  tree = {"params": {"w": np.full((2, 3), 1e30, np.float32), "n": np.int32(3)}}
  weights.save_safetensors(file, tree)
  with pytest.raises(ValueError, match="like") as error:
    weights.safetensors(file, like=like)
  for part in parts:
    assert part in str(error.value)


def test_save_safetensors_round_trips(tmp_path):
  file = tmp_path / "new" / "a.safetensors"
  tree = VARIABLES | {
    "other": {
      "turned": np.arange(6.0, dtype=np.float32).reshape(2, 3).T,
      "scalar": jnp.array(2, jnp.int16),
      "flags": np.array([True, False]),
    }
  }
  weights.save_safetensors(file, PARAMS)
  weights.save_safetensors(file, tree)
  assert_same(weights.safetensors(file), tree)
  assert [p.name for p in file.parent.iterdir()] == ["a.safetensors"]
  with pytest.raises(TypeError, match="params/key is of key<fry>"):
    weights.save_safetensors(file, {"params": {"key": jax.random.key(0)}})
  with pytest.raises(TypeError, match="params/small is of float8"):
    weights.save_safetensors(file, {"params": {"small": jnp.ones(2, jnp.float8_e5m2)}})
  with pytest.raises(ValueError, match=r"a.bin must end in \.safetensors"):
    weights.save_safetensors(tmp_path / "a.bin", PARAMS)
  assert_same(weights.safetensors(file), tree)


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
  file = tmp_path / "a.safetensors"
  weights.save_safetensors(file, VARIABLES)

  def fail(_, path, **_options):
    pathlib.Path(path).write_bytes(b"half")
    raise OSError("No space left on device")

  monkeypatch.setattr(safetensors_numpy, "save_file", fail)
  with pytest.raises(OSError, match="the disk is full"):
    weights.save_safetensors(file, PARAMS)
  assert_same(weights.safetensors(file), VARIABLES)


class Net(nn.Module):
  """What the PyTorch module below is in Flax."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(4, (3, 2), padding="VALID", feature_group_count=2)(x)
    x = nn.BatchNorm(use_running_average=True, epsilon=1e-5)(x)
    return nn.Dense(3)(nn.relu(x).mean((1, 2)))


def torch_weights():
  rng = np.random.default_rng(1)
  shapes = {
    "conv.weight": (4, 1, 3, 2),
    "conv.bias": (4,),
    "bn.weight": (4,),
    "bn.bias": (4,),
    "bn.running_mean": (4,),
    "bn.running_var": (4,),
    "fc.weight": (3, 4),
    "fc.bias": (3,),
  }
  tensors = {
    name: rng.uniform(0.5, 1.5, shape).astype(np.float32) for name, shape in shapes.items()
  }
  return tensors | {"bn.num_batches_tracked": np.array(7, np.int64)}


def torch_forward(w, x):
  """PyTorch's definitions in float64: NCHW correlation in groups, BatchNorm, mean, x W^T + b."""
  B, _, H, W = x.shape
  y = np.zeros((B, 4, H - 2, W - 1))
  for o in range(4):
    for i in range(H - 2):
      for j in range(W - 1):
        window = x[:, o // 2, i : i + 3, j : j + 2]
        y[:, o, i, j] = (window * w["conv.weight"][o, 0]).sum((1, 2)) + w["conv.bias"][o]
  per_channel = {name: w[f"bn.{name}"][:, None, None] for name in ("weight", "bias")}
  mean, var = w["bn.running_mean"][:, None, None], w["bn.running_var"][:, None, None]
  y = (y - mean) / np.sqrt(var + 1e-5) * per_channel["weight"] + per_channel["bias"]
  return np.maximum(y, 0).mean((2, 3)) @ w["fc.weight"].T + w["fc.bias"]


NAMES = {
  "conv.weight": ("params/Conv_0/kernel", weights.convolution),
  "conv.bias": "params/Conv_0/bias",
  "bn.weight": "params/BatchNorm_0/scale",
  "bn.bias": "params/BatchNorm_0/bias",
  "bn.running_mean": "batch_stats/BatchNorm_0/mean",
  "bn.running_var": "batch_stats/BatchNorm_0/var",
  "bn.num_batches_tracked": None,
  "fc.weight": ("params/Dense_0/kernel", weights.linear),
  "fc.bias": "params/Dense_0/bias",
}


def test_a_network_of_pytorch_computes_the_same_here(tmp_path):
  tensors = torch_weights()
  safetensors_numpy.save_file(tensors, tmp_path / "model.safetensors")
  images = np.random.default_rng(2).normal(size=(2, 2, 5, 4)).astype(np.float32)
  x = jnp.asarray(images.transpose(0, 2, 3, 1))
  like = jax.eval_shape(Net().init, jax.random.key(0), x)
  for names in (NAMES, NAMES.get):
    variables = weights.safetensors(tmp_path / "model.safetensors", names, like=like)
  want = torch_forward({n: t.astype(np.float64) for n, t in tensors.items()}, images)
  # float32 sums of at most 12 terms of order 1.
  np.testing.assert_allclose(jax.jit(Net().apply)(variables, x), want, rtol=2e-5, atol=2e-5)


def test_convolutions_of_one_and_three_dimensions():
  weight = np.random.default_rng(0).normal(size=(2, 3, 4))
  x = np.random.default_rng(1).normal(size=(3, 4))  # [in, W], as wide as the kernel: one output.
  kernel = weights.convolution(weight)
  np.testing.assert_allclose(
    np.einsum("wi,wio->o", x.T, kernel), [(x * weight[o]).sum() for o in range(2)], rtol=1e-12
  )
  weight = np.arange(2 * 3 * 4 * 5 * 6).reshape(2, 3, 4, 5, 6)
  kernel = weights.convolution(weight)
  assert kernel.shape == (4, 5, 6, 3, 2)
  assert kernel[3, 2, 1, 0, 1] == weight[1, 0, 3, 2, 1]
  for shape in ((2, 3), (1,) * 6):
    with pytest.raises(ValueError, match=r"needs \[out, in, \*space\]"):
      weights.convolution(np.zeros(shape))
  with pytest.raises(ValueError, match=r"needs \[out, in\]"):
    weights.linear(np.zeros(2))


@pytest.mark.parametrize(
  ("change", "error", "match"),
  [
    ({"fc.wieght": "params/a"}, ValueError, "Only in names: fc.wieght"),
    ({"fc.bias": ...}, ValueError, "Only in the file: fc.bias .map a tensor to None"),
    ({"fc.bias": "params/Conv_0/bias"}, ValueError, "both go to 'params/Conv_0/bias'"),
    ({"fc.bias": "params/Conv_0/bias/x"}, ValueError, "below the path of 'conv.bias'"),
    ({"fc.bias": "bias"}, ValueError, "'fc.bias' would go to the path 'bias'"),
    ({"fc.bias": 3}, TypeError, "gives 3 for 'fc.bias'"),
    ({"fc.bias": ("params/a", "linear")}, TypeError, "'fc.bias'"),
    ({"fc.bias": ("params/a", weights.linear)}, ValueError, r"'fc.bias' failed.*\(3,\)"),
  ],
)
def test_names_that_do_not_fit_the_file(tmp_path, change, error, match):
  safetensors_numpy.save_file(torch_weights(), tmp_path / "model.safetensors")
  names = {name: place for name, place in (NAMES | change).items() if place is not ...}
  with pytest.raises(error, match=match):
    weights.safetensors(tmp_path / "model.safetensors", names)
  with pytest.raises(ValueError, match=r"'.*' would go to the path '.*\..*'.*names says which"):
    weights.safetensors(tmp_path / "model.safetensors")


def shards(folder, *, index=True):
  folder.mkdir()
  tensors = torch_weights()
  parts = [dict(list(tensors.items())[:4]), dict(list(tensors.items())[4:])]
  where = {}
  for i, part in enumerate(parts):
    name = f"model-0000{i + 1}-of-00002.safetensors"
    safetensors_numpy.save_file(part, folder / name)
    where |= dict.fromkeys(part, name)
  (folder / "config.json").write_text("{}")
  if index:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
  return folder


def test_sharded_safetensors(tmp_path):
  safetensors_numpy.save_file(torch_weights(), tmp_path / "model.safetensors")
  want = weights.safetensors(tmp_path / "model.safetensors", NAMES)
  folder = shards(tmp_path / "indexed")
  assert_same(weights.safetensors(folder, NAMES), want)
  index = folder / "model.safetensors.index.json"
  assert_same(weights.safetensors(index, NAMES), want)
  assert_same(weights.safetensors(shards(tmp_path / "plain", index=False), NAMES), want)
  body = json.loads(index.read_text())
  index.write_text(
    json.dumps({"weight_map": body["weight_map"] | {"head": "model-00001-of-00002.safetensors"}})
  )
  with pytest.raises(CheckpointError, match="no file has: head"):
    weights.safetensors(folder, NAMES)
  (folder / "model-00002-of-00002.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match="not beside it: model-00002"):
    weights.safetensors(folder, NAMES)
  for body in ("{}", '{"weight_map": 3}', "[" * 100_000):
    index.write_text(body)
    with pytest.raises(CheckpointError, match="no index of safetensors"):
      weights.safetensors(index, NAMES)
  for name in ("../model.safetensors", str(tmp_path / "model.safetensors"), 3, ["a"]):
    index.write_text(json.dumps({"weight_map": {"head": name}}))
    with pytest.raises(CheckpointError, match="index.json (names|is no index)"):
      weights.safetensors(index, NAMES)
  shutil.copy(tmp_path / "model.safetensors", tmp_path / "plain")
  with pytest.raises(ValueError, match="is in two of its files"):
    weights.safetensors(tmp_path / "plain", NAMES)


class Evil:
  """Makes a file when it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (self.path,)


def test_safetensors_that_are_none(tmp_path):
  file = tmp_path / "model.safetensors"
  safetensors_numpy.save_file(torch_weights(), file)
  content = file.read_bytes()
  for damaged in (content[:-1], content[:5], b"", content + b"\0"):
    file.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="truncated, or no safetensors"):
      weights.safetensors(file, NAMES)
  evil = pickle.dumps(Evil(str(tmp_path / "evil")))
  for name, data in (("a.safetensors", evil), ("a.bin", b""), ("a.pt", b"PK\x03\x04")):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match="nothing is unpickled.*Convert"):
      weights.safetensors(tmp_path / name, NAMES)
  (tmp_path / "torch").mkdir()
  with pytest.raises(ValueError, match=r"no \.safetensors file in it; it holds: nothing"):
    weights.safetensors(tmp_path / "torch", NAMES)
  (tmp_path / "torch" / "pytorch_model.bin").write_bytes(evil)
  with pytest.raises(ValueError, match="pytorch_model.bin is a pickle"):
    weights.safetensors(tmp_path / "torch", NAMES)
  assert not (tmp_path / "evil").exists()
  with pytest.raises(FileNotFoundError, match="no weights at path=.*absent"):
    weights.safetensors(tmp_path / "absent", NAMES)


# Each process in turn, while the other waits for its file: a barrier would hang both.
ALONE = """
import pathlib, sys, time
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
me, folder = int(sys.argv[2]), pathlib.Path(sys.argv[3])
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=me)
import numpy as np
from jax.experimental import multihost_utils
from jaxdistill.runs import _orbax, read_foreign_orbax
assert jax.process_count() == 2

def read(step):
  got = _orbax.read(folder / str(step), ["student"])
  assert list(got) == ["student"]
  assert got["student"]["Dense_0/kernel"].tolist() == [[step, step]]
  assert got["student"]["n"].shape == ()
  foreign = read_foreign_orbax(folder / "1", {"params": "student"})
  assert foreign["params"]["Dense_0/kernel"].tolist() == [[1, 1]]

if me == 0:
  for step in (1, 2):
    student = {"Dense_0/kernel": np.full((1, 2), step, np.float32), "n": np.array(step)}
    _orbax.write(folder / str(step), {"student": student, "best": {"x": np.ones(1)}})
  read(1)
  (folder / "written").touch()
  while not (folder / "read").exists():
    time.sleep(0.01)
else:
  while not (folder / "written").exists():
    time.sleep(0.01)
  for step in (1, 2, 2):
    read(step)
  try:
    _orbax.write(folder / "3", {"student": {"x": np.ones(1)}})
  except RuntimeError as error:
    assert "process 1 of 2" in str(error)
    (folder / "read").touch()
multihost_utils.sync_global_devices("both have come so far")
(folder / f"well_{me}").touch()
"""


@pytest.mark.slow
def test_one_process_of_two_writes_and_each_reads_alone(tmp_path):
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    address = f"localhost:{probe.getsockname()[1]}"
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", ALONE, address, str(me), str(tmp_path)],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      cwd=pathlib.Path(weights.__file__).parent.parent.parent,
    )
    for me in range(2)
  ]
  try:
    for process in processes:
      output, _ = process.communicate(timeout=90)
      assert process.returncode == 0, output
  finally:
    for process in processes:
      process.kill()
      process.wait()
  assert all((tmp_path / f"well_{me}").exists() for me in range(2))
  got = _orbax.read(tmp_path / "2", ["student", "best"])
  assert got["student"]["Dense_0/kernel"].tolist() == [[2, 2]]
  assert got["best"]["x"].tolist() == [1]
