"""The deployed student: saved, loaded without any of its code, called, damaged."""

import json
import pathlib
import re
import shutil
import subprocess
import sys
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import small_networks
from jaxdistill import data, export, networks, runs
from jaxdistill.runs import _manifest
from jaxdistill.types import Model, Network, Outputs

Shape = jax.ShapeDtypeStruct
VECTOR = Shape((5,), jnp.float32)


class Convolutions(nn.Module):
  """BatchNorm with statistics, dropout, a flag of another name, logits in a dict."""

  @nn.compact
  def __call__(self, image, is_training):
    x = nn.Conv(4, (3, 3))(image)
    x = nn.BatchNorm(use_running_average=not is_training, bias_init=nn.initializers.ones)(x)
    x = nn.Dropout(0.5, deterministic=not is_training)(nn.relu(x)).mean((1, 2))
    return {"logits": nn.Dense(3)(x), "pooled": x}


class Tokens(nn.Module):
  """Self-attention over tokens; logits for each of them."""

  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(11, 8)(tokens)
    return nn.Dense(11)(x + nn.MultiHeadDotProductAttention(2)(x, x))


class Pair(nn.Module):
  """Two inputs."""

  @nn.compact
  def __call__(self, a, b):
    return nn.Dense(3)(a) * b[:, None]


class AsksSize(nn.Module):
  """Python has to know the batch size."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(x if x.shape[0] > 4 else x * 1.0)


class CallsPython(nn.Module):
  """The host is called at run time."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(jax.pure_callback(lambda v: np.asarray(v), Shape(x.shape, x.dtype), x))


def save(folder, network, stored, example, normalize=None, seed=0, **options):
  seen = example if normalize is None else normalize(example)
  variables = jax.jit(network.init)(jax.random.key(seed), seen)
  model = Model(network, variables)
  export.save_student(folder, model, stored=stored, normalize=normalize, **options)
  return variables


def expected(network, variables, inputs):
  apply = jax.jit(lambda v, x: network.apply(v, x, train=False, key=None)[0].logits)
  return np.asarray(apply(variables, inputs))


def close(given, wanted):
  """The same operations in the same order but for XLA's fusions: a few roundings apart."""
  assert given.dtype == wanted.dtype
  np.testing.assert_allclose(np.asarray(given), wanted, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
  """A saved network of five numbers, whose copies may be damaged: folder, network, variables."""
  folder = tmp_path_factory.mktemp("dense")
  network = small_networks.dense(4)
  return folder, network, save(folder, network, VECTOR, jnp.ones((2, 5)), name="five")


@pytest.fixture(scope="module")
def student(dense):
  return export.load_student(dense[0])


@pytest.fixture
def copied(dense, tmp_path):
  return pathlib.Path(shutil.copytree(dense[0], tmp_path / "copy"))


# Networks.


@pytest.mark.slow
@pytest.mark.device
def test_images_with_norm_and_dropout_from_uint8(tmp_path):
  network = networks.linen(Convolutions())
  normalize = data.normalizer(((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
  images = np.random.default_rng(0).integers(0, 256, (3, 6, 6, 3)).astype(np.uint8)
  save(tmp_path, network, Shape((6, 6, 3), jnp.uint8), jnp.asarray(images), normalize)
  student = export.load_student(tmp_path)
  variables = runs.load_variables(tmp_path / "student" / "variables")
  # The formula by hand: mean and standard deviation of values in 0 .. 1.
  seen = (images / 255.0 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
  wanted = expected(network, variables, jnp.asarray(seen, jnp.float32))
  close(student(images), wanted)
  close(student(images[:1]), wanted[:1])
  assert set(student.variables) == {"params", "batch_stats"}
  assert student.info["batch"] == "symbolic"
  assert student.info["platforms"] == ["cpu", "cuda", "tpu"]
  assert student.info["inputs"] == {"shape": [6, 6, 3], "dtype": "uint8"}
  assert student.info["parameters"] == 3 * 3 * 3 * 4 + 4 + 2 * 4 + 4 * 3 + 3
  assert student.info["jax"] == student.info["jax_least"] == jax.__version__
  assert (student.classes, student.instances) == (3, 1)


@pytest.mark.slow
def test_tokens(tmp_path):
  network = networks.linen(Tokens())
  tokens = np.arange(12).reshape(2, 6) % 11
  # As NumPy has them: JAX takes int32.
  variables = save(tmp_path, network, Shape((6,), np.int64), jnp.asarray(tokens))
  student = export.load_student(tmp_path)
  logits = student(tokens)
  assert logits.shape == (2, 6, 11)
  close(logits, expected(network, variables, jnp.asarray(tokens)))
  close(student(tokens.tolist()), np.asarray(logits))
  with pytest.raises(ValueError, match=r"values in 0 \.\. 2147483648, which do not fit int32"):
    student(np.array([[0, 1, 2, 3, 4, 2**31]]))
  with pytest.raises(TypeError, match=r"float32; it must be \[B, 6\] int32"):
    student(tokens.astype(np.float32))


def test_dict_of_inputs(tmp_path):
  network = networks.linen(Pair(), arguments=lambda inputs: (inputs["a"], inputs["b"]))
  inputs = {"a": jnp.ones((3, 5)), "b": jnp.arange(3, dtype=jnp.float32)}
  stored = {"a": VECTOR, "b": Shape((), jnp.float32)}
  variables = save(tmp_path, network, stored, inputs)
  student = export.load_student(tmp_path)
  close(student(inputs), expected(network, variables, inputs))
  close(student.predict(inputs, batch_size=2), expected(network, variables, inputs))
  for wrong in ({"a": inputs["a"]}, inputs["a"], {**inputs, "c": 1}):
    with pytest.raises(TypeError, match=r"takes a batch of {'a': "):
      student(wrong)
  with pytest.raises(ValueError, match=r"inputs\['a'\]\": 3, \"inputs\['b'\]\": 2"):
    student({"a": inputs["a"], "b": np.zeros(2, np.float32)})
  with pytest.raises(ValueError, match=r"add the axis with inputs\['b'\]\[None\]"):
    student({"a": inputs["a"], "b": 1.0})


@pytest.mark.slow
@pytest.mark.device
def test_bfloat16(tmp_path):
  module = nn.Dense(3, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
  network = networks.linen(module)
  inputs = jax.random.normal(jax.random.key(1), (3, 5))
  variables = save(tmp_path, network, VECTOR, inputs)
  student = export.load_student(tmp_path)
  assert student.variables["params"]["kernel"].dtype == jnp.bfloat16
  logits = student(inputs)
  assert logits.dtype == jnp.bfloat16
  # One unit in the last of eight bits, should the sums be ordered differently.
  wanted = expected(network, variables, inputs).astype(np.float32)
  np.testing.assert_allclose(np.asarray(logits, np.float32), wanted, rtol=2**-7, atol=2**-7)


def test_variables_of_any_container_and_of_several_devices(tmp_path):
  mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  kernel = np.arange(12, dtype=np.float32).reshape(4, 3)
  variables = {
    "params": [jax.device_put(kernel, everywhere), (kernel[0], None)],
    "state": Outputs(logits=jnp.ones(3)),
    "scale": 2.0,
  }

  def apply(variables, x, *, train, key):
    first, (second, _) = variables["params"]
    x = jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec("data"))
    return Outputs((x @ first * second + variables["state"].logits) * variables["scale"]), {}

  with jax.set_mesh(mesh):  # of two devices, while the program is for one
    network = Network(
      init=lambda key, x: variables, apply=lambda v, x, **k: by_row(apply)(v, x, **k)
    )
    export.save_student(tmp_path, Model(network, variables), stored=Shape((4,), jnp.float32))
  student = export.load_student(tmp_path)
  inputs = np.arange(4, dtype=np.float32)[None]
  wanted = (inputs @ kernel * kernel[0] + 1) * 2
  np.testing.assert_array_equal(np.asarray(student(inputs)), wanted)  # small integers: exact
  assert student.info["parameters"] == 12 + 3


def by_row(apply):
  """Rank promotion raises in the tests; vectors are meant to be added to every row here."""

  def allowed(*args, **keywords):
    with jax.numpy_rank_promotion("allow"):
      return apply(*args, **keywords)

  return allowed


def test_stacked_over_seeds(tmp_path):
  network = small_networks.dense(4, norm=True)
  inputs = jax.random.normal(jax.random.key(1), (3, 5))
  stacked = jax.jit(jax.vmap(network.init, (0, None)))(
    jax.random.split(jax.random.key(0), 3), inputs
  )
  several = [jax.tree.map(lambda leaf, s=s: leaf[s], stacked) for s in range(3)]
  export.save_student(tmp_path, Model(network, stacked, seeds=3), stored=VECTOR)
  for instance in (0, 2):
    student = export.load_student(tmp_path, instance=instance)
    close(student(inputs), expected(network, several[instance], inputs))
  assert student.instances == 3
  assert student.info["parameters"] == 5 * 4 + 4 + 2 * 4 + 4 * 3 + 3
  for wrong in (3, -1):
    with pytest.raises(IndexError, match=rf"instance={wrong} must lie in 0 \.\. 2"):
      export.load_student(tmp_path, instance=wrong)
  ragged = {"few": jnp.zeros(3), "more": jnp.zeros(7)}
  with pytest.raises(ValueError, match=r"seeds=3 .* have \[\(3,\), \(7,\)\]"):
    export.save_student(tmp_path, Model(network, ragged, seeds=3), stored=VECTOR)


# What can't be exported as meant.


@pytest.mark.slow
def test_batch_size_in_python_is_mapped(tmp_path):
  network = networks.linen(AsksSize())
  inputs = jax.random.normal(jax.random.key(1), (3, 5))
  with pytest.warns(export.DeployedWarning, match=r"AsksSize .*every example alone.*x\.shape"):
    variables = save(tmp_path, network, VECTOR, inputs)
  student = export.load_student(tmp_path)
  assert student.info["batch"] == "mapped"
  assert "Inconclusive" in student.info["problem"]
  close(student(inputs), expected(network, variables, inputs))


@pytest.mark.slow
def test_program_of_one_example_is_looped(tmp_path):
  def apply(variables, x, *, train, key):
    np.zeros(x.shape[0])  # no symbol
    if isinstance(x, jax.core.Tracer) and "Batch" in type(x).__name__:
      raise NotImplementedError("no batching rule")
    return Outputs(x @ variables["kernel"]), {}

  network = Network(init=lambda key, x: {}, apply=apply, name="odd")
  kernel = np.arange(10, dtype=np.float32).reshape(5, 2)
  with pytest.warns(export.DeployedWarning, match="odd .*every example alone"):
    export.save_student(tmp_path, Model(network, {"kernel": kernel}), stored=VECTOR)
  student = export.load_student(tmp_path)
  assert student.info["batch"] == "looped"
  inputs = np.arange(15, dtype=np.float32).reshape(3, 5)
  np.testing.assert_array_equal(np.asarray(student(inputs)), inputs @ kernel)  # integers: exact
  with pytest.raises(ValueError, match=r"it must be \[B, 5\] float32"):
    student(inputs[:, :4])


@pytest.mark.slow
def test_one_platform_where_lowering_is_known_for_no_other(tmp_path):
  primitive = jax.extend.core.Primitive("only_here")
  primitive.def_abstract_eval(lambda x: x)
  jax.interpreters.mlir.register_lowering(primitive, lambda context, x: [x], platform="cpu")
  network = Network(
    init=lambda key, x: {}, apply=lambda v, x, **_: (Outputs(primitive.bind(x) * v["s"]), {})
  )
  with pytest.warns(export.DeployedWarning, match=r"only_here.* is for cpu alone"):
    export.save_student(tmp_path, Model(network, {"s": jnp.float32(2)}), stored=VECTOR)
  student = export.load_student(tmp_path)
  assert (student.info["batch"], student.info["platforms"]) == ("symbolic", ["cpu"])
  assert student(np.ones((2, 5))).tolist() == [[2.0] * 5] * 2


def test_without_program_the_weights_are_kept(tmp_path):
  network = networks.linen(CallsPython())
  with pytest.warns(export.DeployedWarning, match=r"host_callbacks.*pure_callback"):
    variables = save(tmp_path, network, VECTOR, jnp.ones((1, 5)))
  assert not (tmp_path / "student" / "program").exists()
  with pytest.raises(
    ValueError, match=r"without a program.*host_callbacks.*load_variables\('(.*)'"
  ) as e:
    export.load_student(tmp_path)
  path = re.search(r"load_variables\('(.*)'\)", str(e.value))[1]
  assert jax.tree.all(jax.tree.map(np.array_equal, runs.load_variables(path), variables))


def test_logits_that_do_not_follow_the_batch_are_no_student(tmp_path):
  network = networks.linen(nn.Sequential([nn.Dense(3), lambda x: x.mean(0, keepdims=True)]))
  with pytest.warns(export.DeployedWarning, match="computes every example alone"):
    save(tmp_path, network, VECTOR, jnp.ones((1, 5)))


# Inputs.


def test_any_batch_size_and_safe_conversions(dense, student):
  _, network, variables = dense
  inputs = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
  wanted = expected(network, variables, inputs)
  close(student(inputs), wanted)
  close(student(inputs[:1].astype(np.float64)), wanted[:1])
  close(student(inputs[:1].tolist()), wanted[:1])
  close(student(jnp.asarray(inputs[:1])), wanted[:1])
  close(student([[1, 2, 3, 4, 5]]), expected(network, variables, np.float32([[1, 2, 3, 4, 5]])))
  close(jax.jit(student)(inputs), wanted)
  assert isinstance(student(inputs), jax.Array)


def test_predict_pads_the_last_batch(dense, student):
  _, network, variables = dense
  inputs = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
  compiled = student.compiled._cache_size()
  logits = student.predict(inputs, batch_size=3)
  assert student.compiled._cache_size() == compiled + 1
  assert type(logits) is np.ndarray
  close(logits, expected(network, variables, inputs))
  close(student.predict(inputs), logits)
  with pytest.raises(ValueError, match="batch_size=0"):
    student.predict(inputs, batch_size=0)


@pytest.mark.parametrize(
  ("inputs", "error", "message"),
  [
    (np.zeros(5), ValueError, r"single example of shape \(5,\).*\[B, 5\] float32.*inputs\[None\]"),
    (np.zeros((2, 4)), ValueError, r"has the shape \(2, 4\); it must be \[B, 5\] float32"),
    (np.zeros((2, 1, 5)), ValueError, r"has the shape \(2, 1, 5\)"),
    (np.zeros((0, 5)), ValueError, r"at least 1; they are {'inputs': 0}"),
    (np.zeros((2, 5), np.uint8), TypeError, r"is uint8; .*float32, as the data set stores it"),
    (np.zeros((2, 5), bool), TypeError, "is bool"),
    (jnp.zeros((2, 5), jnp.int32), TypeError, "is int32"),
    ([["a"] * 5], TypeError, "is <U1"),
    ([[1, 2], [3]], TypeError, "inputs is a list that makes no array"),
    ({"x": 1}, TypeError, "inputs is a dict that makes no array"),
    (None, (TypeError, ValueError), "inputs"),
  ],
)
def test_wrong_inputs_are_named(student, inputs, error, message):
  with pytest.raises(error, match=message):
    student(inputs)


# Folders.


@pytest.mark.slow
def test_a_fresh_process_needs_nothing_but_the_folder(dense):
  folder, network, variables = dense
  inputs = np.linspace(-1, 1, 15, dtype=np.float32).reshape(3, 5)
  code = (
    "import sys, numpy, jax\n"
    "from jaxdistill import export\n"
    "inputs = numpy.linspace(-1, 1, 15, dtype='float32').reshape(3, 5)\n"
    "print(export.load_student(sys.argv[1])(inputs).tolist())\n"
    "assert not {'jaxdistill.networks', 'small_networks'} & set(sys.modules)\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  close(np.float32(json.loads(done.stdout)), expected(network, variables, inputs))


def files_of(folder):
  return sorted(p for p in (folder / "student").rglob("*") if p.is_file() and p.stat().st_size)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_to_any_file_is_noticed_and_named(copied, damage):
  files = files_of(copied)
  assert len(files) > 6
  for path in files:
    whole = path.read_bytes()
    if damage == "flip":
      path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    elif damage == "truncate":
      path.write_bytes(whole[:-1])
    else:
      path.unlink()
    name = path.relative_to(copied / "student").as_posix()
    # A manifest's last bytes are white space and brackets: what is wrong with it varies.
    with pytest.raises(runs.CheckpointError, match=re.escape(name)):
      export.load_student(copied)
    path.write_bytes(whole)
  export.load_student(copied)


def test_weights_of_another_student_are_noticed(copied, tmp_path):
  other = small_networks.dense(4)
  save(tmp_path / "other", other, VECTOR, jnp.ones((1, 5)), seed=1)
  shutil.rmtree(copied / "student" / "variables")
  shutil.copytree(tmp_path / "other" / "student" / "variables", copied / "student" / "variables")
  with pytest.raises(runs.CheckpointError, match="variables/"):
    export.load_student(copied)


def test_saved_again_it_is_replaced_and_leftovers_go(copied):
  leftover = copied / "student.writing"
  leftover.mkdir()
  (leftover / "program").write_bytes(b"half")
  network = small_networks.dense(6)
  inputs = jnp.ones((2, 5))
  variables = save(copied, network, VECTOR, inputs)
  close(export.load_student(copied)(inputs), expected(network, variables, inputs))
  assert sorted(p.name for p in copied.iterdir()) == ["student"]


def test_a_kill_before_the_rename_loses_nothing(copied):
  (copied / "student").rename(copied / "student.writing")
  assert export.load_student(copied).info["name"] == "five"


def test_a_foreign_folder_is_not_overwritten(tmp_path):
  (tmp_path / "student").mkdir()
  (tmp_path / "student" / "essay.txt").write_text("mine")
  with pytest.raises(FileExistsError, match="student is not a deployed student's"):
    export.save_student(tmp_path, Model(small_networks.dense(4), {"params": {}}), stored=VECTOR)
  assert (tmp_path / "student" / "essay.txt").read_text() == "mine"


def test_folders_without_a_student(tmp_path, dense):
  with pytest.raises(FileNotFoundError, match="there is no such folder"):
    export.load_student(tmp_path / "none")
  with pytest.raises(FileNotFoundError, match=r"no run's folder: it has neither student/"):
    export.load_student(tmp_path)
  runs.write_json(tmp_path / "config.json", {"steps": 80})
  with pytest.raises(FileNotFoundError, match=r"at step 0 of 80.*Start it again"):
    export.load_student(tmp_path)
  with runs.Checkpoints(tmp_path / "checkpoints") as saved:
    saved.save(40, {"student": dense[2]})
  with pytest.raises(FileNotFoundError, match=r"at step 40 of 80.*teachers\.restore\(.*step=40\)"):
    export.load_student(tmp_path)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    # Beartype says it before our own message does.
    ({"stored": VECTOR, "normalize": ((0.5,), (0.5,))}, "normalize"),
    ({"stored": None}, "stored has None"),
    ({"stored": {}}, "has no arrays"),
    ({"stored": (5,)}, "stored has 5"),
    ({"stored": np.array(["text"])}, "tokenize"),
  ],
)
def test_wrong_arguments_are_named(tmp_path, options, message):
  with pytest.raises(TypeError, match=message):
    export.save_student(tmp_path, Model(small_networks.dense(4), {"w": jnp.ones(2)}), **options)
  assert not list(tmp_path.iterdir())


def rewrite(folder, program=None, **info):
  """Changes a student as another version would have written it, digests and all."""
  student = folder / "student"
  if program is not None:
    (student / "program").write_bytes(program)
  known = json.loads((student / "student.json").read_text())
  runs.write_json(student / "student.json", {**known, **info})
  _manifest.write_manifest(student, {"kind": "student"})


def test_a_program_of_a_later_jax_says_so(copied):
  whole = (copied / "student" / "program").read_bytes()
  # Unreadable inside, which JAX would notice at the first call; and as a whole.
  for program in (whole.replace(b"ML\xefR", b"ML\xefS"), b"\x00" * 64):
    assert program != whole
    rewrite(copied, program, jax="99.1.0", jax_least="99.1.0")
    with pytest.raises(
      RuntimeError, match=rf"by jax 99\.1\.0, and jax {jax.__version__} cannot.*jax>=99\.1\.0"
    ):
      export.load_student(copied)


@pytest.mark.parametrize(
  "said",
  [
    {"name": 3},
    {"instances": "one"},
    {"stacked": None},
    {"platforms": "cpu"},
    {"batch": []},
    {"classes": {}},
    {"stacked": True, "instances": 10**6},
  ],
)
def test_what_is_said_of_a_student_is_what_must_be_said(copied, said):
  rewrite(copied, **said)
  with pytest.raises(runs.CheckpointError, match=re.escape(str(copied / "student"))):
    export.load_student(copied)


def test_a_program_of_other_weights_than_lie_beside_it_says_so(copied, tmp_path):
  save(tmp_path / "other", small_networks.dense(6), VECTOR, jnp.ones((1, 5)))
  rewrite(copied, (tmp_path / "other" / "student" / "program").read_bytes())
  with pytest.raises(
    runs.CheckpointError, match="program takes other weights than .*variables has"
  ):
    export.load_student(copied)


@pytest.mark.slow
def test_settings_that_a_program_needs(tmp_path):
  network = Network(
    init=lambda key, x: {}, apply=lambda v, x, **_: (Outputs(x @ v["kernel"]), {}), name="wide"
  )
  kernel = np.arange(10.0).reshape(5, 2)
  with jax.enable_x64(True):
    export.save_student(
      tmp_path, Model(network, {"kernel": kernel}), stored=Shape((5,), np.float64)
    )
    logits = export.load_student(tmp_path)(np.ones((1, 5)))
    assert logits.dtype == np.float64
    np.testing.assert_array_equal(np.asarray(logits), kernel.sum(0)[None])
  with pytest.raises(RuntimeError, match=r"takes float64: set JAX_ENABLE_X64=1"):
    export.load_student(tmp_path)


def test_a_program_for_other_platforms_says_so(dense, monkeypatch):
  monkeypatch.setattr(jax.export, "default_export_platform", lambda: "rocm")
  with pytest.raises(
    RuntimeError, match=r"for cpu, cuda, tpu, and this is rocm: set JAX_PLATFORMS"
  ):
    export.load_student(dense[0])


def test_no_warning_where_all_is_well(tmp_path):
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    save(tmp_path, small_networks.dense(4), VECTOR, jnp.ones((1, 5)))
