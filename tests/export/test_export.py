"""Exported files: each kind checked in a process of its own, folded, in int8, damaged, older."""

import dataclasses
import functools
import importlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdistill import data, export, networks
from jaxdistill.export import _coreml, _onnx, _process, _program, command
from jaxdistill.export.runtimes import run_stablehlo
from jaxdistill.networks import models, weights
from jaxdistill.types import Model

Shape = jax.ShapeDtypeStruct
QUICK = export.Check(seconds=0.02)
LOOSE = export.Check(seconds=0.02, accuracy_loss=0.1)
RUNTIMES = pathlib.Path(_process.__file__).parent / "runtimes"
RAN = {".onnx": "onnxruntime", ".tflite": "ai-edge-litert"}
# Extras of their own, which the other tests' environment need not have.
LITERT = all(map(importlib.util.find_spec, ("ai_edge_litert", "litert_converter")))
COREML = all(map(importlib.util.find_spec, ("coremltools", "stablehlo_coreml")))
needs_litert = pytest.mark.skipif(not LITERT, reason="needs the extra: pip install '.[litert]'")
needs_coreml = pytest.mark.skipif(not COREML, reason="needs the extra: pip install '.[coreml]'")
EVERY = [k for k in export.KINDS if {"litert": LITERT, "coreml": COREML}.get(k, True)]


class Small(nn.Module):
  """Convolutions with BatchNorm, a dense layer with BatchNorm."""

  @nn.compact
  def __call__(self, x, train: bool = False):
    x = nn.Conv(8, (3, 3), use_bias=False)(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
    x = nn.relu(nn.Conv(16, (3, 3), strides=2)(x)).reshape(x.shape[0], -1)
    x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(32)(x)))
    return nn.Dense(5)(x)


def normalize(x):
  return x.astype(jnp.float32) / 8 - 1


def filled(network, inputs, seed=0, dtype=None):
  """Variables whose statistics, scales and biases are none of the defaults."""
  variables = jax.jit(network.init)(jax.random.key(seed), inputs)
  rng = np.random.default_rng(seed)

  def leaf(path, value):
    name = jax.tree_util.keystr(path, simple=True)
    low = 0.2 if "var" in name or "scale" in name else -0.5
    random = rng.uniform(low, 1.5, value.shape) if value.ndim == 1 else np.asarray(value)
    return jnp.asarray(random, dtype or value.dtype)

  return jax.tree_util.tree_map_with_path(leaf, variables)


@pytest.fixture(scope="module")
def small():
  """A network, its variables, held-out examples that it gets right nine times of ten, its run."""
  network = networks.linen(Small())
  variables = filled(network, jnp.zeros((1, 8, 8, 1)))
  images = np.random.default_rng(0).integers(0, 17, (150, 8, 8, 1)).astype(np.uint8)
  logits = np.asarray(jax.jit(lambda x: applied(network, variables, x))(normalize(images)))
  labels = np.where(np.arange(150) % 10, logits.argmax(1), (logits.argmax(1) + 1) % 5)
  return network, variables, images, labels.astype(np.int32), logits


@pytest.fixture(scope="module")
def program(small):
  network, variables, *_ = small
  stored = Shape((8, 8, 1), jnp.uint8)
  return export.as_program(Model(network, variables), stored=stored, normalize=normalize)


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
  """A run's folder with two exports that needed no network."""
  network, variables, images, labels, _ = small
  run = tmp_path_factory.mktemp("run")
  stored = Shape((8, 8, 1), jnp.uint8)
  export.save_student(run, Model(network, variables), stored=stored, normalize=normalize)
  listed = export.export(run, (images, labels), kinds=["stablehlo", "safetensors"], check=QUICK)
  return run, listed


@pytest.fixture
def copied(finished, tmp_path):
  """A copy of it, to be damaged."""
  return pathlib.Path(shutil.copytree(finished[0], tmp_path / "run"))


@pytest.fixture
def folder(small, tmp_path):
  network, variables, *_ = small
  stored = Shape((8, 8, 1), jnp.uint8)
  export.save_student(tmp_path, Model(network, variables), stored=stored, normalize=normalize)
  return tmp_path


def applied(network, variables, inputs):
  return network.apply(variables, inputs, train=False, key=None)[0].logits


def primitives(made):
  return [equation.primitive.name for equation in _program.traced(made).equations]


@pytest.mark.slow
@pytest.mark.parametrize(
  "kinds",
  [
    ["stablehlo", "onnx", "safetensors", "int8_weights_onnx", "int8"],
    pytest.param(EVERY, marks=pytest.mark.slow),
  ],
)
def test_every_kind_is_checked_in_its_own_process(small, folder, kinds):
  pytest.importorskip("jax2onnx")
  pytest.importorskip("qwix")
  network, _, images, labels, logits = small
  held_out = data.from_arrays(images, labels)
  options = {"network": network, "normalize": normalize, "calibration": images[:50]}
  options |= {"kinds": None if kinds == EVERY else kinds}
  listed = export.export(folder, held_out, fold=True, check=LOOSE, **options)
  assert listed == json.loads((folder / "exports" / "exports.json").read_text())
  assert [entry["kind"] for entry in listed["files"]] == kinds
  assert listed["student_accuracy"] == pytest.approx(0.9)
  files = {entry["kind"]: entry for entry in listed["files"]}
  for entry in listed["files"]:
    path = folder / "exports" / entry["file"]
    assert entry["passed"]
    assert entry["problem"] is None
    assert path.stat().st_size == entry["bytes"]
    assert entry["folded"] == ["BatchNorm_0", "BatchNorm_1"]
    assert not entry["unfolded"]
    if entry["kind"] == "coreml":
      assert "Mac" in entry["remaining"]
      assert entry["agreement"] is entry["accuracy"] is entry["latency_ms"] is None
      continue
    assert 0 < entry["latency_ms"]["median"] <= entry["latency_ms"]["p95"]
    assert entry["runtime"].startswith(RAN.get(path.suffix, "jax "))
  for kind in {"stablehlo", "onnx", "safetensors", "litert"} & set(kinds):
    assert files[kind]["accuracy"] == pytest.approx(0.9)
    assert files[kind]["agreement"] == 1
    assert files[kind]["largest_difference"] <= files[kind]["tolerance"]
    # A float32 of the size of the logits is known to 6e-8 of it, and there are four layers.
    assert files[kind]["tolerance"] == pytest.approx(1e-4 * np.abs(logits).max(), rel=1e-3)
  for kind in {"int8", "int8_onnx"} & set(kinds):
    assert files[kind]["largest_difference"] > files["onnx"]["tolerance"]
  for kind in {"int8_weights_onnx", "int8_weights_safetensors", "int8_onnx"} & set(kinds):
    whole = files[kind.removeprefix("int8_weights_").removeprefix("int8_")]
    assert files[kind]["bytes"] < 0.5 * whole["bytes"]
  assert files["stablehlo"]["least_jax"] == jax.__version__
  assert files["onnx"]["least_jax"] is None
  names = {entry["file"] for entry in listed["files"]}
  beside = {f"{name}.json" for name in names if name.endswith("stablehlo")}
  left = {path.name for path in (folder / "exports").iterdir()}
  assert left == names | beside | {"exports.json", "example.npz"}


BLOCKED = """
import runpy, sys
class Blocked:
  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] in {blocked!r}:
      raise ImportError(f"{{name}} is not installed here")
sys.meta_path.insert(0, Blocked())
sys.argv = {argv!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  ("suffix", "blocked"),
  [
    ("onnx", {"jax", "jaxlib", "flax", "jaxdistill", "jax2onnx", "optax"}),
    ("stablehlo", {"flax", "jaxdistill", "optax", "orbax", "qwix"}),
    pytest.param(
      "tflite",
      {"jax", "jaxlib", "flax", "jaxdistill", "litert_converter", "optax", "tensorflow"},
      marks=needs_litert,
    ),
  ],
)
def test_it_runs_where_the_libraries_that_made_it_are_absent(
  small, program, tmp_path, suffix, blocked
):
  if suffix == "onnx":
    pytest.importorskip("jax2onnx")
  _, _, images, labels, logits = small
  path = tmp_path / f"net.{suffix}"
  made = export.export_file(path, program, (images, labels), check=QUICK)
  np.savez(tmp_path / "in.npz", inputs=images, logits=logits)
  script = str(RUNTIMES / _process._PROGRAMS[f".{suffix}"])
  argv = [script, str(path), str(tmp_path / "in.npz"), str(tmp_path / "out"), "--calls", "0"]
  code = BLOCKED.format(blocked=blocked, argv=argv)
  done = subprocess.run(
    [sys.executable, "-P", "-c", code],
    capture_output=True,
    text=True,
    timeout=120,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )
  assert done.returncode == 0, done.stderr
  assert "largest difference from the student's logits" in done.stdout
  found = np.load(tmp_path / "out.npz", allow_pickle=False)["logits"]
  ordered = np.sort(logits, axis=1)
  clear = ordered[:, -1] - ordered[:, -2] > made["tolerance"]
  assert clear.mean() > 0.9
  np.testing.assert_array_equal(found.argmax(1)[clear], logits.argmax(1)[clear])
  np.testing.assert_allclose(found, logits, atol=made["tolerance"])


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3, 64])
def test_any_batch_size(small, program, size):
  runtime = pytest.importorskip("onnxruntime")
  pytest.importorskip("jax2onnx")
  _, _, images, _, logits = small
  called = jax.export.deserialize(bytearray(_program.stablehlo(program)[0])).call(images[:size])
  np.testing.assert_allclose(called, logits[:size], atol=1e-4)
  runtime.set_default_logger_severity(3)
  session = runtime.InferenceSession(_onnx.onnx_bytes(program))
  (found,) = session.run(None, {"inputs": images[:size]})
  np.testing.assert_allclose(found, logits[:size], atol=1e-4)


@pytest.mark.slow
@needs_litert
def test_litert_takes_several_inputs_in_batches_of_its_own_size(tmp_path):
  stored = {"b": Shape((4,), jnp.float32), "a": Shape((3,), jnp.int32)}

  def call(leaves, inputs):
    return inputs["b"] @ leaves["params/kernel"] + inputs["a"].sum(1, keepdims=True)

  kernel = np.arange(8, dtype=np.float32).reshape(4, 2)
  made = export.Program("two", {"params/kernel": kernel}, call, stored)
  rng = np.random.default_rng(0)
  inputs = {
    "b": rng.normal(size=(7, 4)).astype(np.float32),
    "a": rng.integers(0, 5, (7, 3), np.int32),
  }
  check = export.Check(seconds=0.02, batch_size=3)
  entry = export.export_file(tmp_path / "two.tflite", made, (inputs, None), check=check)
  # One example, three and seven: a call takes three, and what fills it up is cut off.
  for rows in (1, 3, 7):
    some = {f"inputs/{name}": array[:rows] for name, array in inputs.items()}
    ran = export.run_file(tmp_path / "two.tflite", some, calls=0)
    expected = inputs["b"][:rows] @ kernel + inputs["a"][:rows].sum(1, keepdims=True)
    # float32's rounding of sums of a dozen terms below 40.
    np.testing.assert_allclose(ran.outputs["logits"], expected, rtol=1e-5, atol=1e-5)
  assert entry["batch_size"] == 3


@pytest.mark.slow
@needs_coreml
def test_core_ml_is_read_back_with_the_students_inputs_and_outputs(tmp_path):
  stored = {"b": Shape((4,), jnp.float32), "a": Shape((3,), jnp.uint8)}

  def call(leaves, inputs):
    whole = inputs["a"].astype(jnp.float32).sum(1, keepdims=True)
    logits = inputs["b"] @ leaves["params/kernel"] + whole
    return {"hidden": jnp.tanh(logits), "logits": logits}

  leaves = {"params/kernel": np.ones((4, 2), np.float32)}
  made = export.Program("two", leaves, call, stored, outputs=("hidden", "logits"))
  inputs = {"b": np.ones((7, 4), np.float32), "a": np.ones((7, 3), np.uint8)}
  path = tmp_path / "two.mlpackage.zip"
  entry = export.export_file(
    path, made, (inputs, None), check=dataclasses.replace(QUICK, batch_size=3)
  )
  assert entry["runtime"].endswith("not run")
  told = tmp_path / "told.json"
  _process.run_script("check_coreml.py", [str(path), str(told)], 100, path)
  found = json.loads(told.read_text())
  assert found["inputs"] == {"inputs_a": [[3, 3], "INT32"], "inputs_b": [[3, 4], "FLOAT32"]}
  assert set(found["outputs"]) == {"hidden", "logits"}
  # One that holds another program's inputs is not kept.
  other = made.changed(inputs={"b": stored["b"], "a": Shape((5,), jnp.uint8)})
  with pytest.raises(export.ExportError, match="inputs_a"):
    _coreml.check_coreml(path, other, 3, 100)


@pytest.mark.slow
@needs_litert
def test_what_litert_cannot_hold_is_said(tmp_path):
  def call(leaves, x):
    return jnp.real(jnp.fft.fft(x.astype(jnp.complex64) * leaves["params/scale"]))

  made = export.Program("waves", {"params/scale": np.ones((1, 4))}, call, Shape((4,), jnp.float32))
  x = np.eye(4, dtype=np.float32)
  with pytest.raises(export.ExportError, match="waves as LiteRT"):
    export.export_file(tmp_path / "waves.tflite", made, (x, None), check=QUICK)
  assert not list(tmp_path.iterdir())


def test_a_calibration_is_for_onnx_alone(small, program, tmp_path):
  _, _, images, labels, _ = small
  with pytest.raises(ValueError, match=r"calibration .* quantize_activations"):
    export.export_file(
      tmp_path / "net.stablehlo", program, (images, labels), calibration=images[:50]
    )


@pytest.mark.slow
def test_a_run_folder_is_enough_for_what_needs_no_network(small, finished, copied):
  pytest.importorskip("qwix")
  _, _, images, _, _ = small
  _, listed = finished
  assert [entry["passed"] for entry in listed["files"]] == [True, True]
  # A kind exported later stands beside the others, if it is the same student's.
  check = dataclasses.replace(LOOSE, batch_size=2)
  later = export.export(copied, (images[:100], None), kinds="int8_weights", check=check)
  assert [e["kind"] for e in later["files"]] == ["stablehlo", "safetensors", "int8_weights"]
  assert later["student_accuracy"] is None
  assert later["files"][-1]["accuracy"] is None
  # Each file has the batch and the examples that were its own; the list those of the latest.
  for entry, size, number, right in zip(
    later["files"], (1, 1, 2), (150, 150, 100), (0.9, 0.9, None), strict=True
  ):
    assert (entry["batch_size"], entry["examples"], entry["split"]) == (size, number, "")
    assert entry["student_accuracy"] == (None if right is None else pytest.approx(right))
  assert (later["batch_size"], later["examples"], later["instance"]) == (2, 100, 0)
  read = weights.safetensors(copied / "exports" / "student.safetensors")
  saved = export.load_student(copied).variables
  jax.tree.map(np.testing.assert_array_equal, read, saved)


@pytest.mark.slow
def test_a_list_that_told_nothing_of_each_file_is_read_as_it_was(small, copied):
  _, _, images, labels, _ = small
  path = copied / "exports" / "exports.json"
  listed = json.loads(path.read_text())
  own = ("batch_size", "split", "student_accuracy")
  listed["files"] = [{k: e[k] for k in e if k not in own} for e in listed["files"]]
  path.write_text(json.dumps({**listed, "batch_size": 7, "split": "validation"}))
  held_out = data.from_arrays(images, labels)
  later = export.export(
    copied, held_out, kinds="safetensors", check=dataclasses.replace(QUICK, batch_size=2)
  )
  found = {entry["kind"]: entry for entry in later["files"]}
  assert (found["stablehlo"]["batch_size"], found["stablehlo"]["split"]) == (7, "validation")
  assert (found["safetensors"]["batch_size"], found["safetensors"]["split"]) == (2, held_out.split)


@pytest.mark.slow
def test_files_of_another_student_do_not_stay(small, copied):
  network, variables, images, labels, _ = small
  other = jax.tree.map(lambda leaf: leaf * 1.5, variables)
  stored = Shape((8, 8, 1), jnp.uint8)
  export.save_student(copied, Model(network, other), stored=stored, normalize=normalize)
  listed = export.export(copied, (images, labels), kinds=["safetensors"], check=QUICK)
  assert [entry["kind"] for entry in listed["files"]] == ["safetensors"]
  assert not (copied / "exports" / "student.stablehlo").exists()


@pytest.mark.slow
def test_a_file_that_fails_its_check_is_not_left(small, program, folder):
  _, _, images, labels, logits = small
  path = folder / "net.stablehlo"
  path.write_text("of an earlier export")
  with pytest.raises(export.ExportError, match="differ from the student by up to 1"):
    export.export_file(path, program, (images, labels), student=logits + 1, check=QUICK)
  assert not path.exists()
  assert not list(folder.glob(".checking-*"))
  pytest.importorskip("qwix")
  kinds = ["int8_weights_safetensors"]
  check = dataclasses.replace(QUICK, accuracy_loss=-0.2)
  listed = export.export(folder, (images, labels), kinds=kinds, check=check)
  (entry,) = listed["files"]
  assert entry["passed"] is False
  assert "accuracy is" in entry["problem"]
  assert not (folder / "exports" / entry["file"]).exists()
  assert command.main([str(folder)]) == 0  # nothing is listed as good


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "one bit", "missing"])
def test_damage_is_noticed_and_named(copied, damage, capsys):
  path = copied / "exports" / "student.stablehlo"
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  if damage == "missing":
    path.unlink()
  else:
    path.write_bytes(content[:200] if damage == "truncated" else content)
  problem = export.verify_exports(copied)["student.stablehlo"]
  words = {"truncated": "has 200 bytes", "one bit": "SHA-256", "missing": "missing"}
  assert words[damage] in problem
  assert command.main([str(copied)]) == 1
  assert words[damage] in capsys.readouterr().err


@pytest.mark.slow
def test_unreadable_and_newer_files_say_so(small, program, tmp_path):
  _, _, images, _, _ = small
  path = tmp_path / "net.stablehlo"
  serialized, about = _program.stablehlo(program)
  # An operation that this version's StableHLO does not know, as jax 0.12's shape assertion in 0.10.
  assert b"broadcast_in_dim" in serialized
  path.write_bytes(serialized.replace(b"broadcast_in_dim", b"broadcast_in_dxx"))
  pathlib.Path(f"{path}.json").write_text(json.dumps({**about, "jax": "9.1", "least_jax": "9.0"}))
  given = {"inputs": images[:2]}
  with pytest.raises(export.ExportError, match=r"made by jax 9\.1 and needs at least 9\.0"):
    export.run_file(path, given, calls=0)
  pathlib.Path(f"{path}.json").unlink()
  path.write_bytes(serialized[:500])
  with pytest.raises(export.ExportError, match="cannot be read by jax"):
    export.run_file(path, given, calls=0)
  pytest.importorskip("onnxruntime")
  other = tmp_path / "net.onnx"
  other.write_bytes(b"no ONNX")
  with pytest.raises(export.ExportError, match="cannot be loaded by onnxruntime"):
    export.run_file(other, given, calls=0)


def test_a_list_that_is_damaged_or_of_another_version_says_so(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"export\.export makes it"):
    export.verify_exports(tmp_path)
  (tmp_path / "exports").mkdir()
  path = tmp_path / "exports" / "exports.json"
  path.write_text('{"version": 7}')
  with pytest.raises(export.ExportError, match="version 7"):
    export.verify_exports(tmp_path)
  path.write_text('{"vers')
  with pytest.raises(export.ExportError, match="damaged"):
    export.verify_exports(tmp_path)
  assert command.main([str(tmp_path)]) == 1


@pytest.mark.slow
def test_a_process_that_hangs_or_dies_says_so(small, program, tmp_path, monkeypatch):
  path = tmp_path / "net.stablehlo"
  path.write_bytes(_program.stablehlo(program)[0])
  with pytest.raises(export.ExportError, match=r"not done after 0\.01 s"):
    export.run_file(path, {"inputs": small[2]}, time_limit=0.01)
  script = tmp_path / "dies.py"
  script.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
  monkeypatch.setitem(_process._PROGRAMS, ".stablehlo", str(script))
  with pytest.raises(export.ExportError, match="ended by signal 9"):
    export.run_file(path, {"inputs": small[2]})


def test_the_rule_of_the_top_1():
  student = np.array([[0.0, 1.0, 0.5], [0.5, 0.5001, 0.0]])
  close = student + np.array([[0, -1e-3, 0], [1e-3, 0, 0]])
  found = _process.compare_outputs(student, close, 2e-3)
  assert found["problem"] is None
  assert found["decided"] == 1
  assert found["agreement"] == 0.5
  assert "differ" in _process.compare_outputs(student, close, 5e-4)["problem"]
  apart = np.array([[0.0, 1.0, 0.999], [0.0, 2.0, 0.0]])
  swapped = apart + np.array([[0, -6e-4, 6e-4], [0, 0, 0]])
  # Within 6e-4 of every logit, and the other class: the margin was above that.
  assert "top-1" in _process.compare_outputs(apart, swapped, 6.1e-4)["problem"]
  found = _process.compare_outputs(student, student * np.nan, 1.0, within=False)
  assert "not finite" in found["problem"]
  assert "shape" in _process.compare_outputs(student, student[:1], 1.0)["problem"]


class Tower(nnx.Module):
  """An NNX module."""

  def __init__(self, *, rngs):
    self.first = nnx.Linear(8, 16, rngs=rngs)
    self.norm = nnx.BatchNorm(16, rngs=rngs)
    self.head = nnx.Linear(16, 3, rngs=rngs)

  def __call__(self, x):
    return self.head(nnx.relu(self.norm(self.first(x))))


class Awkward(nn.Module):
  """What can be folded among what cannot: a shared kernel, an output used twice, norm first."""

  @nn.compact
  def __call__(self, x, train: bool = False):
    norm = functools.partial(nn.BatchNorm, not train)
    x = nn.Conv(8, (3, 3), name="first")(norm(name="before")(x))
    shared = nn.Conv(8, (3, 3), name="shared")
    x = norm(name="shared_norm_0")(shared(x)) + norm(name="shared_norm_1")(shared(nn.relu(x)))
    twice = nn.Conv(8, (1, 1), name="twice")(x)
    x = norm(name="twice_norm")(twice) + nn.relu(twice)
    x = nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x)
    x = nn.relu(norm(name="depthwise_norm", use_bias=False, use_scale=False)(x))
    x = nn.ConvTranspose(4, (2, 2), name="transposed")(x)
    x = norm(name="transposed_norm")(x).mean((1, 2))
    return nn.Dense(3, name="head")(x)


def resnet(conv):
  fields = {"width": (2, 2, 4, 4), "num_classes": 3, "param_dtype": jnp.float64}
  return networks.linen(models.ResNet(8, conv=conv, **fields))


@pytest.mark.slow
@pytest.mark.parametrize(
  ("network", "shape", "folded", "unfolded"),
  [
    (resnet("lax"), (8, 8, 3), 9, ()),
    pytest.param(resnet("patches"), (8, 8, 3), 9, (), marks=pytest.mark.slow),
    (networks.nnx(lambda rngs: Tower(rngs=rngs)), (8,), 1, ()),
    (
      networks.linen(Awkward()),
      (8, 8, 3),
      2,
      ("before", "shared_norm_0", "shared_norm_1", "twice_norm"),
    ),
  ],
  ids=["resnet", "patches", "nnx", "awkward"],
)
def test_folded_is_the_same_to_the_last_bits(network, shape, folded, unfolded):
  with jax.enable_x64(True):
    variables = filled(network, jnp.zeros((1, *shape)), dtype=jnp.float64)
    stored = Shape(shape, jnp.float64)
    whole = export.as_program(Model(network, variables), stored=stored)
    less = export.fold(whole)
    inputs = np.random.default_rng(1).normal(size=(5, *shape))
    wanted = np.asarray(jax.jit(applied, static_argnums=0)(network, variables, inputs))
    # 1e-10 is far above float64's rounding, and far below float32's.
    np.testing.assert_allclose(less.predict(inputs), wanted, rtol=1e-10, atol=1e-10)
    assert len(less.folded) == folded
    assert less.unfolded == unfolded
    assert primitives(less).count("rsqrt") == len(unfolded)
    assert primitives(less).count("sub") == len(unfolded)
    gone = {name for name in whole.leaves if any(f"/{norm}/" in name for norm in less.folded)}
    assert not gone & set(less.leaves)
    if shape == (8,):
      assert export.fold(less).folded == less.folded  # there is nothing more to fold


def test_a_folded_kernel_is_multiplied_and_its_bias_moved():
  layers = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True, epsilon=0.1)])
  network = networks.linen(layers)
  variables = filled(network, jnp.zeros((1, 4)))
  whole = export.as_program(Model(network, variables), stored=Shape((4,), jnp.float32))
  less = export.fold(whole)
  old = {name: np.asarray(leaf, np.float64) for name, leaf in whole.leaves.items()}
  factor = old["params/layers_1/scale"] / np.sqrt(old["batch_stats/layers_1/var"] + 0.1)
  kernel = old["params/layers_0/kernel"] * factor
  shift = (old["params/layers_0/bias"] - old["batch_stats/layers_1/mean"]) * factor
  # One rounding of float32 an operation.
  np.testing.assert_allclose(less.leaves["params/layers_0/kernel"], kernel, rtol=1e-6)
  bias = shift + old["params/layers_1/bias"]
  np.testing.assert_allclose(less.leaves["params/layers_0/bias"], bias, rtol=1e-5, atol=1e-6)


def test_int8_weights_are_within_half_a_step(program):
  pytest.importorskip("qwix")
  small_program = export.quantize_weights(program)
  kernels = [name for name, leaf in small_program.leaves.items() if leaf.dtype == jnp.int8]
  assert kernels == [name for name in program.leaves if name.endswith("kernel")]
  for name in kernels:
    whole, scale = (
      np.asarray(program.leaves[name]),
      np.asarray(small_program.leaves[f"{name}_scale"]),
    )
    axes = tuple(range(whole.ndim - 1))
    np.testing.assert_allclose(scale.ravel(), np.abs(whole).max(axes) / 127.5, rtol=0.01)
    error = np.abs(np.asarray(small_program.leaves[name], np.float64) * scale - whole)
    assert np.all(error <= 0.5001 * scale + (np.abs(whole) > 127 * scale) * scale)


def test_int8_activations_multiply_integers():
  pytest.importorskip("qwix")

  def call(leaves, x):
    return x @ leaves["params/kernel"] + leaves["params/bias"]

  rng = np.random.default_rng(0)
  kernel = rng.normal(size=(6, 3)).astype(np.float32)
  bias = rng.normal(size=(1, 3)).astype(np.float32)
  leaves = {"params/kernel": kernel, "params/bias": bias}
  whole = export.Program("net", leaves, call, Shape((6,), jnp.float32))
  inputs = rng.normal(size=(20, 6)).astype(np.float32)
  small_program = export.quantize_activations(whole, inputs[:10])
  stored = np.asarray(small_program.leaves["params/kernel"], np.int64)
  scale = np.asarray(small_program.leaves["params/kernel_scale"], np.float64)
  assert small_program.leaves["params/kernel"].dtype == jnp.int8
  # The scale of what goes in is the calibration's: what is larger later is clipped.
  step = np.abs(inputs[:10]).max() / 127.5
  assert np.abs(inputs[10:]).max() > np.abs(inputs[:10]).max()
  rounded = np.clip(np.round(inputs / step), -128, 127)
  wanted = (rounded @ stored) * step * scale + bias
  rows = (
    np.arange(20) != np.abs(inputs[:10]).max(1).argmax()
  )  # half a step, which may go either way
  found = small_program.predict(inputs)
  np.testing.assert_allclose(found[rows], wanted[rows], rtol=1e-5, atol=1e-5)
  traced = _program.traced(small_program).equations
  (product,) = [e for e in traced if e.primitive.name == "dot_general"]
  assert {atom.aval.dtype for atom in product.invars} == {jnp.dtype(jnp.int8)}
  assert product.outvars[0].aval.dtype == jnp.int32


@pytest.mark.slow
def test_int8_of_foreign_networks_and_skipped_kernels(small, program):
  pytest.importorskip("qwix")
  images, logits = small[2], small[4]
  names = [name for name in program.leaves if name.endswith("kernel")]
  part = export.quantize_activations(program, images[:20], skip=names[:1])
  assert part.leaves[names[0]].dtype == jnp.float32
  assert all(part.leaves[name].dtype == jnp.int8 for name in names[1:])
  # An eighth of a percent of the range for each of a few roundings.
  assert np.abs(part.predict(images[:20]) - logits[:20]).max() < 0.05 * np.abs(logits).max()
  network = networks.nnx(lambda rngs: Tower(rngs=rngs))
  x = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
  variables = filled(network, x)
  whole = export.as_program(Model(network, variables), stored=Shape((8,), jnp.float32))
  made = export.quantize_activations(export.fold(whole), x)
  assert sum(leaf.dtype == jnp.int8 for leaf in made.leaves.values()) == 2
  assert np.abs(made.predict(x) - whole.predict(x)).max() < 0.05 * np.abs(whole.predict(x)).max()


class Pair(nn.Module):
  """Two inputs; logits for each token."""

  @nn.compact
  def __call__(self, tokens, gain):
    x = nn.Embed(11, 16)(tokens) * gain[:, None, None]
    return nn.Dense(11)(nn.relu(nn.Dense(16)(x)))


@pytest.mark.slow
def test_several_inputs_and_tokens(tmp_path):
  pytest.importorskip("jax2onnx")
  rng = np.random.default_rng(0)
  inputs = {
    "gain": rng.normal(size=20).astype(np.float32),
    "tokens": rng.integers(0, 11, (20, 7)).astype(np.int32),
  }
  network = networks.linen(Pair(), arguments=lambda x: (x["tokens"], x["gain"]))
  variables = jax.jit(network.init)(jax.random.key(0), inputs)
  stored = {"tokens": Shape((7,), jnp.int32), "gain": Shape((), jnp.float32)}
  made = export.as_program(Model(network, variables), stored=stored)
  labels = applied(network, variables, inputs).argmax(-1)
  for suffix in ("onnx", "stablehlo", "safetensors"):
    entry = export.export_file(tmp_path / f"net.{suffix}", made, (inputs, labels), check=QUICK)
    assert entry["accuracy"] == 1
    assert entry["decided"] > 100


class AsksSize(nn.Module):
  """Python has to know the batch size."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(x if x.shape[0] > 4 else x * 1.0)


def test_a_network_of_fixed_batch_sizes_computes_each_example_alone():
  network = networks.linen(AsksSize())
  x = np.ones((7, 4), np.float32)
  variables = network.init(jax.random.key(0), x)
  made = export.as_program(Model(network, variables), stored=Shape((4,), jnp.float32))
  called = jax.export.deserialize(bytearray(_program.stablehlo(made)[0])).call(x)
  np.testing.assert_allclose(called, applied(network, variables, x), rtol=1e-6)


def test_what_does_not_fit_is_named_before_long_work(small, folder, monkeypatch):
  network, _, images, labels, _ = small
  held_out = images, labels
  for options, message in [
    ({"kinds": ["onxn"]}, "onxn"),
    ({"kinds": ["onnx"]}, "need network="),
    ({"kinds": "onxn"}, "onxn"),
    ({"kinds": []}, "kinds is empty"),
    ({"kinds": "int8_weights_onnx"}, r"kinds=\['int8_weights_onnx'\] need network="),
    ({"kinds": ["int8"], "network": network}, "need calibration="),
    ({"fold": True}, "needs network="),
    ({"network": network, "kinds": ["stablehlo"]}, "normalize="),
  ]:
    with pytest.raises(ValueError, match=message):
      export.export(folder, held_out, **options)
  with pytest.raises(ValueError, match="batch_size=0"):
    export.Check(batch_size=0)
  with pytest.raises(ValueError, match="tolerance must be at least 0"):
    export.Check(tolerance=-1.0)
  with pytest.raises(ValueError, match="as many inputs as labels"):
    export.export(folder, (images, labels[:3]))
  with pytest.raises(TypeError, match="held_out"):
    export.export(folder, images)
  with pytest.raises(FileNotFoundError):
    export.export(folder / "nothing", held_out)
  with pytest.raises(ValueError, match="cannot be folded"):
    export.fold(export.load_student(folder))
  with pytest.raises(ValueError, match=r"must end in .*\.stablehlo"):
    export.export_file(folder / "net.pb", export.load_student(folder), held_out)
  assert not (folder / "exports").exists()
  monkeypatch.setitem(sys.modules, "jax2onnx", None)
  with pytest.raises(ImportError, match=r"jaxdistill\[export\]"):
    _onnx.onnx_bytes(export.load_student(folder))


@pytest.mark.slow
def test_the_command(small, folder, monkeypatch, capsys):
  network, _, images, labels, _ = small
  module = type(sys)("my_export")
  module.given = lambda: {"held_out": (images, labels), "network": network, "normalize": normalize}
  monkeypatch.setitem(sys.modules, "my_export", module)
  words = [str(folder), "--with", "my_export:given", "--kinds", "stablehlo", "--fold"]
  assert command.main(words) == 0
  assert "accuracy 90.00%" in capsys.readouterr().out
  assert command.main([str(folder)]) == 0
  assert "student.stablehlo: as it was checked" in capsys.readouterr().out
  for given in ("my_export", ".my_export:given"):
    assert command.main([str(folder), "--with", given]) == 1
    assert f"--with {given} must be module:function" in capsys.readouterr().err
  with pytest.raises(SystemExit):
    command.main([str(folder), "--fold"])
  assert "--fold without --with" in capsys.readouterr().err
  with pytest.raises(SystemExit):
    command.main([str(folder), "--kinds", "onnx", "--batch-size", "4"])
  assert "--kinds, --batch-size without --with" in capsys.readouterr().err
  # What the function says of the kinds holds where the command line says nothing.
  module.given = lambda: {"held_out": (images, labels), "kinds": "safetensors", "check": QUICK}
  assert command.main([str(folder), "--with", "my_export:given", "--batch-size", "3"]) == 0
  listed = json.loads((folder / "exports" / "exports.json").read_text())
  assert [(e["kind"], e["batch_size"]) for e in listed["files"]] == [
    ("stablehlo", 1),
    ("safetensors", 3),
  ]


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ("no_such_module:given", "No module named 'no_such_module'"),
    ("my_export:absent", "my_export has no function absent"),
    ("my_export:number", "has no function number"),
    ("my_export:needs", "No module named 'no_such_library'"),
    ("my_export:nothing", "must return a dict of keywords of export.export, got None"),
    ("my_export:misspelt", "unexpected keyword argument 'netwrok'"),
    ("my_export:without", "'held_out'"),
    ("my_export:strange", "held_out must be data.Examples"),
  ],
)
def test_a_wrong_function_is_one_line(tmp_path, monkeypatch, capsys, given, message):
  module = type(sys)("my_export")
  module.number, module.nothing, module.without = 3, lambda: None, dict
  module.misspelt = lambda: {"held_out": ([0], [0]), "netwrok": None}
  module.strange = lambda: {"held_out": 3}
  module.needs = lambda: importlib.import_module("no_such_library")
  monkeypatch.setitem(sys.modules, "my_export", module)
  monkeypatch.setattr(sys, "path", [*sys.path])
  assert command.main([str(tmp_path), "--with", given]) == 1
  told = capsys.readouterr().err
  assert message in told
  assert told.startswith(f"--with {given}")
  assert told.count("\n") == 1


def test_stablehlo_is_timed_from_numpy_to_numpy_as_onnx_is(program, tmp_path, monkeypatch):
  path = tmp_path / "net.stablehlo"
  path.write_bytes(_program.stablehlo(program)[0])
  np.savez(tmp_path / "in.npz", inputs=np.zeros((4, 8, 8, 1), np.uint8))
  given, asked = [], []

  class Answer:
    def __array__(self, dtype=None, copy=None):
      asked.append(True)
      return np.zeros((4, 5), np.float32)

  def call(*leaves):
    given.extend(map(type, leaves))
    return Answer()

  monkeypatch.setattr(jax, "jit", lambda program: call)
  run_stablehlo.main([str(path), str(tmp_path / "in.npz"), str(tmp_path / "out"), "--calls", "5"])
  # Once for the logits, three to warm up, five that are timed.
  assert given == [np.ndarray] * 9
  assert len(asked) == 9


@pytest.mark.slow
def test_the_page_of_documentation_runs(tmp_path, monkeypatch, capsys):
  pytest.importorskip("jax2onnx")
  pytest.importorskip("qwix")
  monkeypatch.chdir(tmp_path)
  page = (pathlib.Path(__file__).parent.parent.parent / "docs" / "export.md").read_text()
  (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
  exec(compile(code, "export.md", "exec"), {})
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in lines] == ["student.onnx", "student.int8.stablehlo"]
  assert all(line.endswith("True ['layers_1']") for line in lines)


@pytest.mark.slow
def test_float64_bfloat16_and_a_mesh(tmp_path):
  x = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
  for dtype, share in ((jnp.float64, 1e-9), (jnp.bfloat16, 0.05)):
    with jax.enable_x64(dtype == jnp.float64):
      network = networks.linen(nn.Sequential([nn.Dense(16, dtype=dtype), nn.relu, nn.Dense(3)]))
      variables = network.init(jax.random.key(0), x)
      if dtype == jnp.float64:
        variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables)
      # On two devices, as training left them.
      mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
      variables = jax.device_put(variables, spread)
      made = export.as_program(Model(network, variables), stored=Shape((8,), jnp.float32))
      entry = export.export_file(tmp_path / "net.stablehlo", made, (x, None), check=QUICK)
      logits = np.asarray(applied(network, jax.device_get(variables), x), np.float64)
    assert entry["tolerance"] == pytest.approx(share * np.abs(logits).max(), rel=0.05)
