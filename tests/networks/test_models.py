"""Models: published sizes, sown features, and forward passes written again in NumPy."""

import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.networks import models
from small_networks import convolve

# At 100 classes, from the public PyTorch definitions.
PARAMETERS = {
  "resnet8": 83_892,
  "resnet14": 181_108,
  "resnet20": 278_324,
  "resnet32": 472_756,
  "resnet44": 667_188,
  "resnet56": 861_620,
  "resnet110": 1_736_564,
  "resnet8x4": 1_233_540,
  "resnet32x4": 7_433_860,
  "wrn_16_1": 180_916,
  "wrn_16_2": 703_284,
  "wrn_40_1": 569_780,
  "wrn_40_2": 2_255_156,
}
RESNET = models.ResNet(depth=14, num_classes=5, width=(2, 3, 4, 5))  # projections in every stage
WIDE = models.WideResNet(depth=16, widen_factor=1, num_classes=5)  # stage1 keeps its width
VIT = models.VisionTransformer(
  patch_size=4, width=8, depth=2, num_heads=2, mlp_ratio=2, num_classes=5, pooling="cls"
)
CONVNET = models.ConvNet(channels=(4, 6), strides=(1, 2), dense=8, num_classes=5)
MLP = models.MLP(widths=(7, 6), num_classes=5)
# One block in each stage: what is compiled for training.
STATISTICS = {
  "resnet": models.ResNet(depth=8, num_classes=5, width=(2, 3, 4, 5)),
  "wide": models.WideResNet(depth=10, widen_factor=1, num_classes=5),
}
SMALL = {"resnet": RESNET, "wide": WIDE, "vit": VIT, "convnet": CONVNET, "mlp": MLP}


def shapes_of(model, inputs):
  """Variables as shapes; compiles nothing."""
  return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(inputs, jnp.float32))


def random_variables(model, inputs, dtype=np.float32):
  """Variables from NumPy, statistics included, of a size that keeps activations near 1."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    name = path[-1].key
    value = rng.normal(size=leaf.shape) / np.sqrt(max(1, np.prod(leaf.shape[:-1])))
    offset = 1.0 if name in ("scale", "var") else 0.0
    return (offset + (np.abs(value) if name == "var" else value)).astype(dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes_of(model, inputs))


def images(shape, dtype=np.float32):
  return np.random.default_rng(1).normal(size=shape).astype(dtype)


@functools.partial(jax.jit, static_argnums=(0, 3))
def forward(model, variables, x, train=False, key=None):
  """Logits, and the collections sown or updated."""
  rngs = None if key is None else {"dropout": key}
  mutable = ["intermediates", "batch_stats"]
  return model.apply(variables, x, train=train, rngs=rngs, mutable=mutable)


def features_of(state):
  return {name: value for name, (value,) in state["intermediates"].items() if "_block" not in name}


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_equal_the_published_ones(name):
  params = shapes_of(getattr(models, name)(num_classes=100), (1, 32, 32, 3))["params"]
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PARAMETERS[name]


def test_vit_tiny_has_the_parameters_of_its_formula():
  D, N, K = 192, 64, 100
  block = 12 * D * D + 13 * D  # attention 4D² + 4D, MLP 8D² + 5D, two norms 4D
  expected = 12 * block + (48 * D + D) + N * D + 2 * D + (D * K + K)
  params = shapes_of(models.vit_tiny(num_classes=K), (1, 32, 32, 3))["params"]
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


STAGES = {
  f"stage{s}{suffix}": (2, 32 // 2 ** (s - 1), 32 // 2 ** (s - 1), width)
  for s, width in ((1, 1), (2, 2), (3, 4))
  for suffix in ("", "_preact")
}
FEATURES = [
  (
    models.resnet8(),
    {k: (*v[:3], 16 * v[3]) for k, v in STAGES.items()}
    | {"stem": (2, 32, 32, 16), "pooled": (2, 64)},
  ),
  (
    models.resnet8x4(),
    {k: (*v[:3], 64 * v[3]) for k, v in STAGES.items()}
    | {"stem": (2, 32, 32, 32), "pooled": (2, 256)},
  ),
  (
    models.wrn_16_2(),
    {k: (*v[:3], 32 * v[3]) for k, v in STAGES.items()}
    | {"stem": (2, 32, 32, 16), "pooled": (2, 128)},
  ),
  (
    models.VisionTransformer(width=12, depth=2, num_heads=3),
    {"embedding": (2, 64, 12), "block1": (2, 64, 12), "block2": (2, 64, 12), "pooled": (2, 12)},
  ),
  (
    models.VisionTransformer(width=12, depth=1, num_heads=3, pooling="cls"),
    {"embedding": (2, 65, 12), "block1": (2, 65, 12), "pooled": (2, 12)},
  ),
  (
    models.ConvNet(num_classes=100),
    {
      "conv1": (2, 32, 32, 32),
      "conv2": (2, 16, 16, 64),
      "conv3": (2, 16, 16, 64),
      "hidden": (2, 256),
    },
  ),
  (models.MLP(widths=(16, 8), num_classes=100), {"hidden1": (2, 16), "hidden2": (2, 8)}),
]


@pytest.mark.parametrize(("model", "expected"), FEATURES, ids=lambda v: type(v).__name__)
def test_features_are_sown_under_their_names(model, expected):
  x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
  apply = functools.partial(model.apply, mutable=["intermediates"])
  logits, state = jax.eval_shape(apply, shapes_of(model, x.shape), x)
  assert {k: v.shape for k, v in features_of(state).items()} == expected
  assert logits.shape == (2, 100)


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_compute_keeps_float32_parameters_statistics_and_logits(name):
  model, x = SMALL[name].clone(dtype=jnp.bfloat16), jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
  variables = shapes_of(model, x.shape)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}
  apply = functools.partial(model.apply, mutable=["intermediates"])
  logits, state = jax.eval_shape(apply, variables, x)
  assert logits.dtype == jnp.float32
  features = features_of(state)
  assert features.pop("pooled", jnp.float32(0)).dtype == jnp.float32
  assert {v.dtype for v in features.values()} == {np.dtype(jnp.bfloat16)}


def test_bfloat16_logits_are_not_rounded_to_bfloat16():
  x = images((3, 8, 8, 1))
  variables = random_variables(CONVNET, x.shape)
  logits, _ = forward(CONVNET.clone(dtype=jnp.bfloat16), variables, x)
  assert np.any(np.asarray(logits) != np.asarray(logits.astype(jnp.bfloat16), np.float32))


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_small_networks_need_no_dtype_promotion(dtype):
  for model in (CONVNET.clone(dtype=dtype), CONVNET.clone(dtype=dtype, conv="lax"), MLP):
    assert shapes_of(model, (2, 8, 8, 1))["params"]["classifier"]["bias"].shape == (5,)


# Forward passes written again in float64 NumPy, from the papers' block diagrams.


def relu(x):
  return np.maximum(x, 0)


class Layers:
  """A scope of variables, with convolution and inference-time BatchNorm by name."""

  def __init__(self, variables, *path):
    self.variables, self.path = variables, path

  def __getitem__(self, name):
    return Layers(self.variables, *self.path, name)

  def get(self, collection, name, leaf):
    return functools.reduce(
      lambda tree, key: tree[key], (*self.path, name, leaf), self.variables[collection]
    )

  def has(self, name):
    scope = functools.reduce(lambda tree, key: tree[key], self.path, self.variables["params"])
    return name in scope

  def conv(self, name, x, stride=1, pad=1):
    return convolve(x, self.get("params", name, "kernel"), stride, pad)

  def norm(self, name, x):
    mean, var = (self.get("batch_stats", name, leaf) for leaf in ("mean", "var"))
    scale, bias = (self.get("params", name, leaf) for leaf in ("scale", "bias"))
    return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

  def dense(self, name, x):
    return x @ self.get("params", name, "kernel") + self.get("params", name, "bias")


def numpy_resnet(variables, x, blocks):
  net, out = Layers(variables), {}
  x = out["stem"] = relu(net.norm("stem_norm", net.conv("stem_conv", x)))
  for stage in (1, 2, 3):
    for block in range(blocks):
      here = net[f"stage{stage}_block{block}"]
      stride = 2 if stage > 1 and block == 0 else 1
      assert here.has("shortcut_conv") == (block == 0)
      y = relu(here.norm("norm1", here.conv("conv1", x, stride)))
      y = here.norm("norm2", here.conv("conv2", y))
      if block == 0:
        x = here.norm("shortcut_norm", here.conv("shortcut_conv", x, stride, pad=0))
      x = x + y
      out[f"stage{stage}_preact"] = x
      x = out[f"stage{stage}"] = relu(x)
  out["pooled"] = x.mean((1, 2))
  return net.dense("classifier", out["pooled"]), out


def numpy_wide_resnet(variables, x, blocks):
  net, out = Layers(variables), {}
  x = out["stem"] = net.conv("stem_conv", x)
  for stage in (1, 2, 3):
    for block in range(blocks):
      here = net[f"stage{stage}_block{block}"]
      stride = 2 if stage > 1 and block == 0 else 1
      assert here.has("shortcut_conv") == (stage > 1 and block == 0)
      normalised = here.norm("norm1", x)
      if stage > 1 and block == 0:
        out[f"stage{stage - 1}_preact"] = normalised
        x = here.conv("shortcut_conv", relu(normalised), stride, pad=0)
      y = relu(here.norm("norm2", here.conv("conv1", relu(normalised), stride)))
      x = x + here.conv("conv2", y)
    out[f"stage{stage}"] = x
  out["stage3_preact"] = net.norm("final_norm", x)
  out["pooled"] = relu(out["stage3_preact"]).mean((1, 2))
  return net.dense("classifier", out["pooled"]), out


def layer_norm(params, x):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * params["scale"] + params["bias"]


def gelu(x):
  return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attention(params, x):
  q, k, v = (
    np.einsum("bnd,dhe->bhne", x, params[name]["kernel"]) + params[name]["bias"][:, None]
    for name in ("query", "key", "value")
  )
  scores = np.exp(q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]))
  mixed = scores / scores.sum(-1, keepdims=True) @ v
  return np.einsum("bhne,hed->bnd", mixed, params["out"]["kernel"]) + params["out"]["bias"]


def numpy_vit(variables, x, blocks):
  params, net, out = variables["params"], Layers(variables), {}
  size = params["patch_embedding"]["kernel"].shape[0]
  x = net.conv("patch_embedding", x, size, pad=0) + params["patch_embedding"]["bias"]
  x = x.reshape(len(x), -1, x.shape[-1])
  x = np.concatenate([np.repeat(params["class_token"], len(x), 0), x], 1)
  x = out["embedding"] = x + params["position_embedding"]
  for i in range(1, blocks + 1):
    here = params[f"encoder_block{i}"]
    x = x + attention(here["attention"], layer_norm(here["attention_norm"], x))
    scope = net[f"encoder_block{i}"]
    hidden = gelu(scope.dense("mlp_hidden", layer_norm(here["mlp_norm"], x)))
    x = out[f"block{i}"] = x + scope.dense("mlp_output", hidden)
  out["pooled"] = layer_norm(params["final_norm"], x)[:, 0]
  return net.dense("classifier", out["pooled"]), out


@pytest.mark.parametrize(
  ("model", "reference"),
  [(RESNET, numpy_resnet), (WIDE, numpy_wide_resnet), (VIT, numpy_vit)],
  ids=["resnet", "wide", "vit"],
)
def test_forward_pass_equals_numpy_and_leaves_the_statistics_alone(model, reference):
  x = images((2, 8, 8, 3), np.float64)
  variables = random_variables(model, x.shape, np.float64)
  expected, features = reference(variables, x, 2)
  with jax.enable_x64(True):
    logits, state = forward(model, variables, x)
    assert logits.dtype == jnp.float64
    # Sixteen layers of float64 sums of at most 600 terms.
    np.testing.assert_allclose(logits, expected, rtol=1e-10, atol=1e-11)
    stats = variables.get("batch_stats", {})
    jax.tree.map(np.testing.assert_array_equal, state.get("batch_stats", {}), stats)
    got = features_of(state)
    assert got.keys() == features.keys()
    for name in features:
      np.testing.assert_allclose(got[name], features[name], rtol=1e-10, atol=1e-11, err_msg=name)


def test_stride_two_pads_one_pixel_on_both_sides():
  """The block that halves the image reads pixels -1, 1, 3, ...; ``SAME`` would start at 0."""
  x = images((1, 8, 8, 3))
  kernel = images((3, 3, 3, 2))
  same = nn.Conv(2, (3, 3), (2, 2), use_bias=False)
  block = models.BasicBlock(channels=2, stride=2)
  variables = flax.core.unfreeze(random_variables(block, x.shape))
  variables["params"]["conv1"]["kernel"] = kernel
  _, state = jax.jit(
    functools.partial(
      block.apply,
      mutable=["intermediates"],
      capture_intermediates=lambda module, _: module.name == "conv1",
    )
  )(variables, x)
  got = state["intermediates"]["conv1"]["__call__"][0]
  # Float32 sums of 27 terms of order 1.
  np.testing.assert_allclose(got, convolve(x, kernel, 2, 1), rtol=1e-5, atol=1e-5)
  shifted = jax.jit(same.apply)({"params": {"kernel": kernel}}, x)
  assert np.abs(got - shifted).max() > 0.1


@pytest.mark.parametrize("name", ["resnet", "wide"])
def test_training_updates_the_statistics(name):
  model, x = STATISTICS[name], images((4, 8, 8, 3)) + 1
  variables = random_variables(model, x.shape)
  _, state = forward(model, variables, x, True)
  changed = jax.tree.map(
    lambda new, old: bool(np.any(new != old)), state["batch_stats"], variables["batch_stats"]
  )
  assert all(jax.tree.leaves(changed))
  path = ("stem_norm",) if name == "resnet" else ("stage1_block0", "norm1")
  new, old = (
    functools.reduce(lambda tree, key: tree[key], path, tree["batch_stats"])
    for tree in (state, variables)
  )
  y = convolve(x.astype(np.float64), variables["params"]["stem_conv"]["kernel"])
  # Flax's momentum 0.9 weighs the old value: PyTorch's 0.1. Float32 moments of 256 values.
  for leaf, moment in (("mean", y.mean((0, 1, 2))), ("var", y.var((0, 1, 2)))):
    np.testing.assert_allclose(new[leaf], 0.9 * old[leaf] + 0.1 * moment, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet", "wide"])
def test_axis_name_gives_shards_the_statistics_of_the_whole_batch(name):
  model, x = STATISTICS[name], images((4, 8, 8, 3))
  x[2:] += 1  # each half alone has other statistics than the whole
  variables = random_variables(model, x.shape)
  whole, state = forward(model, variables, x, True)
  apply = functools.partial(
    model.clone(axis_name="devices").apply, train=True, mutable=["batch_stats"]
  )
  shards = jax.jit(jax.vmap(apply, in_axes=(None, 0), axis_name="devices"))
  logits, shard_state = shards(variables, x.reshape(2, 2, 8, 8, 3))
  # Float32 through ten layers, with moments summed in another order.
  np.testing.assert_allclose(logits.reshape(4, -1), whole, rtol=1e-3, atol=1e-4)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-3, atol=1e-4),
    shard_state["batch_stats"],
    state["batch_stats"],
  )


def test_initialisation_is_the_published_one():
  x = jnp.zeros((1, 8, 8, 3))

  @jax.jit  # draws only what it returns; the key below is one that compiles quickly
  def initial(key):
    resnet = models.ResNet(8, 100, width=(8, 8, 32, 64)).init(key, x)["params"]
    wide = models.WideResNet(10, 1, 100).init(key, x)["params"]
    blocks = resnet["stage3_block0"], wide["stage3_block0"]
    kernels = {
      "conv1": (blocks[0]["conv2"]["kernel"], 9 * 64),
      "shortcut": (blocks[0]["shortcut_conv"]["kernel"], 64),
      "wide": (blocks[1]["conv2"]["kernel"], 9 * 64),
    }
    return kernels, resnet["classifier"], wide["classifier"]

  kernels, classifier, wide_classifier = initial(jax.random.key(0, impl="unsafe_rbg"))
  for name, (kernel, fan_out) in kernels.items():
    expected = np.sqrt(2 / fan_out)
    # A standard deviation from n draws is known to 1/sqrt(2n); n >= 2048, so five sigma is 8 %.
    np.testing.assert_allclose(np.std(kernel), expected, rtol=0.08, err_msg=name)
    # Not truncated: among n draws some exceed two standard deviations of a cut normal.
    assert np.abs(kernel).max() > 2.5 * expected
  bound = 1 / np.sqrt(64)
  for leaf in (*classifier.values(), wide_classifier["kernel"]):
    assert 0.9 * bound < np.abs(leaf).max() <= bound
    # Uniform: the standard deviation is bound / sqrt(3); a hundred draws know it to 5 %.
    np.testing.assert_allclose(np.std(leaf), bound / np.sqrt(3), rtol=0.25)
  assert not np.any(wide_classifier["bias"])


def test_dropout_is_deterministic_given_its_key_and_absent_in_evaluation():
  x, model = images((2, 8, 8, 3)), VIT.clone(depth=1, dropout_rate=0.5)
  variables = random_variables(model, x.shape)
  keys = [jax.random.key(seed, impl="unsafe_rbg") for seed in (0, 0, 1)]  # compiles quickly
  first, again, other = (forward(model, variables, x, True, key)[0] for key in keys)
  np.testing.assert_array_equal(first, again)
  assert np.any(first != other)
  evaluated, _ = forward(model, variables, x, False)
  # The reference knows no dropout; float32 through eight layers.
  np.testing.assert_allclose(evaluated, numpy_vit(variables, x, 1)[0], rtol=1e-4, atol=1e-5)
  with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
    jax.eval_shape(functools.partial(model.apply, train=True), variables, x)


@pytest.mark.parametrize("name", ["convnet", "mlp"])
def test_train_flag_changes_nothing_without_statistics_or_dropout(name):
  model, x = SMALL[name], images((2, 8, 8, 1))
  variables = random_variables(model, x.shape)
  assert set(variables) == {"params"}
  programs = [
    jax.make_jaxpr(functools.partial(model.apply, train=train))(variables, x)
    for train in (False, True)
  ]
  assert str(programs[0]) == str(programs[1])


@pytest.mark.parametrize(("size", "stride"), [(8, 1), (8, 2), (1, 2)])
def test_patches_equal_the_convolution_and_its_gradients(size, stride):
  x, kernel = images((2, size, size + 1, 3)), images((3, 3, 3, 4))

  def lax_convolution(x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
      x, kernel, (stride, stride), "SAME", dimension_numbers=numbers
    )

  @jax.jit
  def both(x, kernel):
    results = []
    for function in (lambda x, k: models.patches_convolution(x, k, stride), lax_convolution):
      y, pullback = jax.vjp(function, x, kernel)
      results.append((y, *pullback(jnp.sin(lax_convolution(x, kernel)))))
    return results

  patches, expected = both(x, kernel)
  for got, want in zip(patches, expected, strict=True):
    # Float32 sums of at most 2 * 72 terms of order 1 to 3, in another order.
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_conv_choices_share_parameters_and_numbers():
  x = images((3, 8, 8, 1))
  shapes = [shapes_of(CONVNET.clone(conv=conv), x.shape) for conv in ("patches", "lax")]
  assert shapes[0] == shapes[1]

  @jax.jit  # draws only what it returns
  def first_kernels(key):
    networks = (CONVNET.clone(conv=conv) for conv in ("patches", "lax"))
    return [net.init(key, x)["params"]["convolution1"]["kernel"] for net in networks]

  np.testing.assert_array_equal(*first_kernels(jax.random.key(3, impl="unsafe_rbg")))
  variables = random_variables(CONVNET, x.shape)
  patches, state = forward(CONVNET.clone(conv="patches"), variables, x)
  lax, _ = forward(CONVNET.clone(conv="lax"), variables, x)
  # Float32 through four layers.
  np.testing.assert_allclose(patches, lax, rtol=1e-5, atol=1e-5)
  # Flax's own layer takes the same parameters.
  features = features_of(state)
  flax_layer = jax.jit(nn.Conv(6, (3, 3), (2, 2)).apply)
  expected = relu(flax_layer({"params": variables["params"]["convolution2"]}, features["conv1"]))
  np.testing.assert_allclose(features["conv2"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (lambda: models.ResNet(18, 10), ("depth", "18", "6n + 2", "use 8, 14, 20")),
    (lambda: models.ResNet(2, 10), ("depth", "got 2", "use 8")),
    (lambda: models.ResNet(8, 10, width=(16, 32, 64)), ("width", "(16, 32, 64)", "use")),
    (lambda: models.ResNet(8, 10, after="stage4"), ("after", "stem, stage1", "got 'stage4'")),
    (lambda: models.WideResNet(20, 2, 10), ("depth", "20", "6n + 4", "use 10, 16")),
    (lambda: models.WideResNet(16, 0, 10), ("widen_factor", "got 0", "use")),
    (lambda: models.vit_tiny(num_heads=5), ("num_heads", "192", "got 5", "use")),
    (lambda: models.vit_tiny(dropout_rate=1.0), ("dropout_rate", "1.0", "use")),
    (
      lambda: shapes_of(models.vit_tiny(patch_size=5), (1, 32, 32, 3)),
      ("patch_size", "32x32", "got 5", "use"),
    ),
    (
      lambda: models.ConvNet(channels=(8, 8), strides=(1, 2, 1)),
      ("strides", "(1, 2, 1)", "use e.g. (1, 1)"),
    ),
  ],
)
def test_errors_name_the_argument_the_value_and_the_fix(make, words):
  with pytest.raises(ValueError, match=r"got|divide") as error:
    make()
  for word in words:
    assert word in str(error.value)


@pytest.mark.slow
def test_a_resnet_of_patches_is_the_resnet():
  x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
  lax, patches = (
    models.ResNet(depth=8, num_classes=3, width=(2, 2, 4, 4), conv=conv)
    for conv in ("lax", "patches")
  )
  variables = jax.jit(lax.init)(jax.random.key(0), x)

  def loss(params, model):
    out, state = model.apply({**variables, "params": params}, x, train=True, mutable="batch_stats")
    return jnp.sum(jnp.sin(out)), (out, state)

  results = [
    jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)(variables["params"], model)
    for model in (lax, patches)
  ]
  for a, b in zip(*map(jax.tree.leaves, results), strict=True):
    # float32, eight layers; gradients go up to about ten.
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
