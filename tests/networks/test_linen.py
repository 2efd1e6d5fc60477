"""Capture: modules as strangers write them, unmodified, become networks with named features."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import networks
from jaxdistill.networks import Path, _features

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4)), jnp.float32)
KEY = jax.random.key(7)


def dense(params, x):
  return x @ params["kernel"] + params["bias"][None]


def draw(shapes, seed=0):
  """Parameters without the initialisers, whose compilation would take most of the time."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda s: jnp.asarray(rng.uniform(-1, 1, s.shape), s.dtype), shapes)


def run(module, *, train=False, key=None, inputs=X, **options):
  network = networks.linen(module, **options)
  variables = draw(jax.eval_shape(network.init, KEY, inputs))
  outputs, state = network.apply(variables, inputs, train=train, key=key)
  return outputs, state, variables


def trace(module, inputs=X, **options):
  """For errors, which come before anything is computed."""
  network = networks.linen(module, **options)
  return jax.eval_shape(network.init, KEY, inputs)


class Encoder(nn.Module):
  """Compact style, sows."""

  @nn.compact
  def __call__(self, x):
    x = nn.tanh(nn.Dense(4)(x))
    self.sow("intermediates", "mid", x)
    return nn.Dense(5)(x)


class Nested(nn.Module):
  """Setup style, a module in a module."""

  def setup(self):
    self.encoder = Encoder()
    self.head = nn.Dense(3)

  def __call__(self, x):
    return self.head(nn.relu(self.encoder(x)))


class Published(nn.Module):
  """BatchNorm and dropout, as in most published code."""

  axis_name: Any = None

  @nn.compact
  def __call__(self, x, train: bool = True):
    x = nn.Dense(6)(x)
    x = nn.BatchNorm(use_running_average=not train, momentum=0.5, axis_name=self.axis_name)(x)
    self.sow("intermediates", "normed", x)
    x = nn.Dropout(0.5, deterministic=not train)(x)
    self.sow("intermediates", "dropped", x)
    return nn.Dense(3)(x)


class Shared(nn.Module):
  @nn.compact
  def __call__(self, x):
    layer = nn.Dense(4, name="shared")
    x = layer(nn.relu(layer(x)))
    self.sow("intermediates", "twice", x)
    self.sow("intermediates", "twice", 2 * x)
    self.sow("intermediates", "total", x, init_fn=lambda: 0.0, reduce_fn=lambda a, b: a + b)
    self.sow("intermediates", "total", x, init_fn=lambda: 0.0, reduce_fn=lambda a, b: a + b)
    return x


class TestFeatures:
  def test_sown_and_submodules_by_name(self):
    names = ["encoder/mid", "encoder/Dense_0", "encoder", "head"]
    outputs, state, variables = run(Nested(), features=names)
    params = variables["params"]
    first = dense(params["encoder"]["Dense_0"], X)
    second = dense(params["encoder"]["Dense_1"], jnp.tanh(first))
    logits = dense(params["head"], jax.nn.relu(second))
    for name, want in zip(names, [jnp.tanh(first), first, second, logits], strict=True):
      np.testing.assert_array_equal(outputs.features[name], want)
    np.testing.assert_array_equal(outputs.logits, logits)
    assert state == {}
    assert set(variables) == {"params"}

  def test_names_of_your_own(self):
    places = {"hint": "encoder/Dense_0", "late": Path("/encoder/mid/")}
    outputs, _, variables = run(Nested(), features=places)
    first = dense(variables["params"]["encoder"]["Dense_0"], X)
    assert list(outputs.features) == ["hint", "late"]
    np.testing.assert_array_equal(outputs.features["hint"], first)
    np.testing.assert_array_equal(outputs.features["late"], jnp.tanh(first))

  def test_a_submodule_called_twice_has_two_outputs(self):
    places = {"a": "shared:0", "b": Path("shared", call=1), "c": Path("shared", call=-1)}
    outputs, _, variables = run(Shared(), features={**places, "d": "twice:1", "e": "total"})
    params = variables["params"]["shared"]
    first = dense(params, X)
    second = dense(params, jax.nn.relu(first))
    for name, want in {"a": first, "b": second, "c": second, "d": 2 * second}.items():
      np.testing.assert_array_equal(outputs.features[name], want)
    np.testing.assert_array_equal(outputs.features["e"], second + second)

  def test_several_values_need_a_call(self):
    with pytest.raises(ValueError, match=r"'shared' has 2 values .*'shared:0', 'shared:1'"):
      trace(Shared(), features=["shared"])
    with pytest.raises(ValueError, match=r"'twice' has 2 values"):
      trace(Shared(), features=["twice"])
    with pytest.raises(ValueError, match=r"has 2 value\(s\), and call=2 is none"):
      trace(Shared(), features=["shared:2"])

  def test_elements_of_outputs_that_are_no_arrays(self):
    class Cell(nn.Module):
      @nn.compact
      def __call__(self, x):
        (c, h), y = nn.LSTMCell(4, name="cell")((x, x), x)
        y = nn.Dense(4, name="out")(y)
        return Inner(name="inner")(c + h + y)["logits"]

    class Inner(nn.Module):
      @nn.compact
      def __call__(self, x):
        return {"logits": nn.Dense(3)(x), "x": x}

    places = {
      "c": Path("cell", element=(0, 0)),
      "y": Path("cell", element=1),
      "x": Path("inner", element="x"),
      "z": Path("inner", element="logits"),
    }
    outputs, _, variables = run(Cell(), features=places)
    params = variables["params"]
    (c, h), y = nn.LSTMCell(4).apply({"params": params["cell"]}, (X, X), X)
    x = c + h + dense(params["out"], y)
    for name, want in {"c": c, "y": y, "x": x, "z": outputs.logits}.items():
      np.testing.assert_array_equal(outputs.features[name], want)
    with pytest.raises(ValueError, match=r"'cell' is a tuple of .*element="):
      trace(Cell(), features=["cell"])
    with pytest.raises(ValueError, match=r"it has no element 2"):
      trace(Cell(), features={"f": Path("cell", element=2)})
    with pytest.raises(ValueError, match=r"it has no element 'z'"):
      trace(Cell(), features={"f": Path("inner", element="z")})
    with pytest.raises(ValueError, match=r"it has no element 0"):
      trace(Cell(), features={"f": Path("out", element=0)})

  def test_another_method_of_a_submodule(self):
    class Coder(nn.Module):
      def setup(self):
        self.layer = nn.Dense(3)

      def encode(self, x):
        return self.layer(x)

    class Net(nn.Module):
      def setup(self):
        self.coder = Coder()

      def __call__(self, x):
        return self.coder.encode(x)

    outputs, _, _ = run(Net(), features={"code": Path("coder", method="encode")})
    np.testing.assert_array_equal(outputs.features["code"], outputs.logits)
    with pytest.raises(ValueError, match=r"'coder': .* called by \['encode'\], not by '__call__'"):
      trace(Net(), features=["coder"])

  def test_not_found_lists_what_there_is(self):
    network = networks.linen(Nested(), features=["encoder/Dense_7", "mid"], name="student")
    with pytest.raises(ValueError, match="can't be found") as error:
      jax.eval_shape(network.init, KEY, X)
    text = str(error.value)
    assert text.startswith("student: 2 of the features")
    assert "'encoder/Dense_7'" in text
    for line in ["encoder/mid (2, 4)", "encoder/Dense_1 (2, 5)", "encoder (2, 5)", "head (2, 3)"]:
      assert f"\n  {line}" in text
    variables = networks.linen(Nested()).init(KEY, X)
    with pytest.raises(ValueError, match="encoder/mid"):
      jax.eval_shape(lambda v: network.apply(v, X, train=True, key=KEY), variables)

  def test_a_batch_norm_in_training_does_not_hide_the_error(self):
    network = networks.linen(Published(), features=["Dense_9"])
    variables = draw(trace(Published()))
    with pytest.raises(ValueError, match=r"Dense_9.*\n(.*\n)*  normed \(2, 6\)"):
      network.apply(variables, X, train=True, key=KEY)

  def test_available_evaluates_nothing(self):
    shapes = jax.ShapeDtypeStruct((5, 4), jnp.bfloat16)
    found = networks.capturable(Shared(), shapes)
    assert {name: leaf.shape for name, leaf in found.items()} == dict.fromkeys(
      ["shared:0", "shared:1", "twice:0", "twice:1", "total"], (5, 4)
    )
    broken = networks.linen(Nested(), features=["nowhere"])
    assert "encoder/mid" in networks.capturable(broken, X)
    trace(Shared(), features=list(found))
    with pytest.raises(ValueError, match=r"was not made by networks.linen"):
      networks.capturable(dataclasses.replace(broken, apply=lambda *a, **k: None), X)

  @pytest.mark.parametrize(
    ("features", "message"),
    [
      ("mid", "must be a sequence of paths"),
      (["mid", "mid"], "more than once"),
      ([""], "empty name or path"),
      ({"": "mid"}, "empty name or path"),
      ({"mid": "/"}, "empty name or path"),
    ],
  )
  def test_features_are_checked_at_once(self, features, message):
    with pytest.raises(ValueError, match=message):
      networks.linen(Nested(), features=features)

  def test_left_over_intermediates_do_no_harm(self):
    network = networks.linen(Nested(), features=["encoder/mid"])
    variables = network.init(KEY, X)
    _, sown = Nested().apply(variables, X, mutable=["intermediates"])
    a, _ = network.apply(variables, X, train=False, key=None)
    b, _ = network.apply({**variables, **sown}, X + 0, train=False, key=None)
    np.testing.assert_array_equal(a.features["encoder/mid"], b.features["encoder/mid"])


class Layer(nn.Module):
  @nn.compact
  def __call__(self, x, _=None):
    x = nn.tanh(nn.Dense(4, name="dense")(x))
    self.sow("intermediates", "act", x)
    return x, None


def stacked(lift):
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      x, _ = lift(Layer)(name="stack")(x, None)
      return nn.Dense(3, name="head")(x)

  return Net()


def scanned(**axes):
  return stacked(
    lambda layer: nn.scan(
      layer, variable_axes={"params": 0, **axes}, split_rngs={"params": True}, length=3
    )
  )


class Towers(nn.Module):
  axes: Any = dataclasses.field(default_factory=dict)

  @nn.compact
  def __call__(self, x):
    tower = nn.vmap(
      Encoder,
      in_axes=None,
      axis_size=2,
      variable_axes={"params": 0, **self.axes},
      split_rngs={"params": True},
    )
    return jnp.mean(tower(name="towers")(x), axis=0)


class TestTransforms:
  def test_scan_stacks_the_layers(self):
    places = {
      "all": "stack/act",
      "second": Path("stack/act", layer=1),
      "last": Path("stack/dense", layer=-1),
      "carry": Path("stack", element=0, layer=0),
    }
    outputs, _, variables = run(scanned(intermediates=0), features=places)
    x, want = X, []
    for layer in range(3):
      linear = dense(jax.tree.map(lambda p: p[layer], variables["params"]["stack"]["dense"]), x)  # noqa: B023
      x = jnp.tanh(linear)
      want.append(x)
    # A scan's body is compiled and the loop above is not: float32 rounding, values below 1.
    close = {"rtol": 0, "atol": 1e-6}
    np.testing.assert_allclose(outputs.features["all"], jnp.stack(want), **close)
    np.testing.assert_allclose(outputs.features["second"], want[1], **close)
    np.testing.assert_allclose(outputs.features["last"], linear, **close)
    np.testing.assert_allclose(outputs.features["carry"], want[0], **close)
    with pytest.raises(ValueError, match=r"shape \(3, 2, 4\), and layer=3 is not"):
      trace(scanned(intermediates=0), features={"f": Path("stack/act", layer=3)})

  @pytest.mark.parametrize(
    ("module", "path", "transform"),
    [
      (scanned(), "stack/dense", r"nn.scan \(ScanLayer\)"),
      (scanned(), "stack/act", r"nn.scan \(ScanLayer\)"),
      (scanned(), "stack", r"nn.scan \(ScanLayer\)"),
      (Towers(), "towers/mid", r"nn.vmap \(VmapEncoder\)"),
      (Towers(), "towers/Dense_0", r"nn.vmap \(VmapEncoder\)"),
    ],
  )
  def test_a_transform_that_hides_is_named(self, module, path, transform):
    message = rf"'{path}': '{path.split('/')[0]}' runs inside {transform}.*'intermediates': 0"
    with pytest.raises(ValueError, match=message) as error:
      trace(module, features=[path])
    assert "Hidden in nn." in str(error.value)

  def test_a_function_that_is_scanned_hides_too(self):
    class Net(nn.Module):
      @nn.compact
      def __call__(self, x):
        scan = nn.scan(
          lambda mdl, c, _: (nn.Dense(4, name="layer")(c), None),
          variable_axes={"params": 0},
          split_rngs={"params": True},
          length=2,
        )
        return scan(self, x, None)[0]

    with pytest.raises(ValueError, match=r"'layer': .* inside a lifted transform \(nn.scan, nn"):
      trace(Net(), features=["layer"])

  def test_vmap_with_intermediates(self):
    module = Towers({"intermediates": 0})
    outputs, _, variables = run(module, features={"mid": Path("towers/mid", layer=1)})
    params = jax.tree.map(lambda p: p[1], variables["params"]["towers"]["Dense_0"])
    # The batched product may be summed in another order: float32 rounding, values below 1.
    np.testing.assert_allclose(
      outputs.features["mid"], jnp.tanh(dense(params, X)), rtol=0, atol=1e-6
    )

  @pytest.mark.parametrize("lift", [nn.remat, nn.jit])
  def test_remat_and_jit_hide_nothing(self, lift):
    module, plain = stacked(lift), stacked(lambda layer: layer)
    outputs, _, variables = run(module, features=["stack/dense", "stack/act"])
    other = networks.linen(plain, features=["stack/dense", "stack/act"])
    want, _ = other.apply(variables, X, train=False, key=None)
    for name in want.features:
      np.testing.assert_allclose(outputs.features[name], want.features[name], rtol=0, atol=1e-6)

  def test_a_cond_leaves_the_rest_to_capture(self):
    class Net(nn.Module):
      def setup(self):
        self.a, self.b, self.head = nn.Dense(4), nn.Dense(4), nn.Dense(3)

      def __call__(self, x):
        if self.is_initializing():
          self.a(x), self.b(x)
        x = nn.cond(jnp.sum(x) > 0, lambda m, y: m.a(y), lambda m, y: m.b(y), self, x)
        self.sow("intermediates", "chosen", x)
        return self.head(x)

    network = networks.linen(Net(), features=["chosen"])
    variables = network.init(KEY, X)
    chosen = network.apply(variables, X, train=False)[0].features["chosen"]
    branch = "a" if float(jnp.sum(X)) > 0 else "b"
    np.testing.assert_allclose(chosen, dense(variables["params"][branch], X), rtol=0, atol=1e-6)
    network = networks.linen(Net(), features=["nowhere"])
    with pytest.raises(ValueError, match=r"Available:\n  chosen \(2, 4\)"):
      network.apply(variables, X, train=False)


class TestTraining:
  def test_training_updates_and_evaluation_leaves_alone(self):
    network = networks.linen(Published(), features=["normed"])
    variables = network.init(KEY, X)
    assert set(variables) == {"params", "batch_stats"}
    before = jax.tree.map(np.array, variables)
    outputs, state = network.apply(variables, X, train=True, key=KEY)
    linear = dense(variables["params"]["Dense_0"], X)
    mean = np.mean(linear, axis=0)
    # BatchNorm may compute the mean in another order: float32 rounding.
    np.testing.assert_allclose(state["batch_stats"]["BatchNorm_0"]["mean"], 0.5 * mean, atol=1e-6)
    np.testing.assert_allclose(np.mean(outputs.features["normed"], axis=0), 0, atol=1e-5)
    assert set(state) == {"batch_stats"}
    outputs, state = network.apply(variables, X, train=False, key=None)
    assert state == {}
    assert not np.allclose(np.mean(outputs.features["normed"], axis=0), 0, atol=1e-2)
    jax.tree.map(np.testing.assert_array_equal, before, variables)

  def test_parameters_with_names_of_axes_are_plain(self):
    named = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))

    class Layer(nn.Module):
      @nn.compact
      def __call__(self, x, _):
        return nn.with_logical_constraint(nn.Dense(4, kernel_init=named)(x), ("b", "mlp")), None

    module = nn.scan(
      Layer,
      variable_axes={"params": 0, "intermediates": 0},
      split_rngs={"params": True},
      length=2,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )()
    network = networks.linen(
      module,
      features=["Dense_0"],
      arguments=lambda inputs: (inputs, None),
      logits=lambda out: out[0],
    )
    made = network.init(KEY, X)
    shapes = jax.eval_shape(module.init, KEY, X, None)
    assert isinstance(shapes["params"]["Dense_0"]["kernel"], nn.LogicallyPartitioned)
    # Where their names say, so that a checkpoint's plain dicts are these variables again.
    assert made["params"]["Dense_0"]["kernel"].shape == (2, 4, 4)
    boxed = jax.tree.unflatten(jax.tree.structure(shapes), jax.tree.leaves(made))

    @jax.jit
    def each(made, boxed):
      call = lambda variables: network.apply(variables, X, train=False)[0]  # noqa: E731
      return module.apply(boxed, X, None)[0], call(made), call(boxed)

    want, *found = each(made, boxed)
    for outputs in found:
      np.testing.assert_array_equal(outputs.logits, want)
      np.testing.assert_array_equal(outputs.features["Dense_0"][-1], want)

  def test_init_gives_what_the_module_gives(self):
    mine = networks.linen(Published()).init(KEY, X)
    theirs = Published().init(KEY, X, train=False)
    jax.tree.map(np.testing.assert_array_equal, mine, theirs)

  def test_dropout_follows_the_key(self):
    network = networks.linen(Published(), features=["normed", "dropped"])
    variables = network.init(KEY, X)
    apply = jax.jit(lambda k: network.apply(variables, X, train=True, key=k)[0].features)
    a, b, c = apply(KEY), apply(KEY), apply(jax.random.key(8))
    np.testing.assert_array_equal(a["dropped"], b["dropped"])
    assert not np.array_equal(a["dropped"], c["dropped"])
    kept = np.asarray(a["dropped"]) != 0
    assert 0 < kept.sum() < kept.size
    np.testing.assert_allclose(a["dropped"][kept], 2 * a["normed"][kept], rtol=1e-6)
    still = network.apply(variables, X, train=False, key=KEY)[0].features
    np.testing.assert_array_equal(still["dropped"], still["normed"])

  def test_streams_are_independent(self):
    class Noisy(nn.Module):
      @nn.compact
      def __call__(self, x, train=False):
        a, b = (jax.random.normal(self.make_rng(n), x.shape) for n in ("noise", "mask"))
        self.sow("intermediates", "a", a)
        self.sow("intermediates", "b", b)
        return x + a

    options = {"features": ["a", "b"], "rngs": ("noise", "mask")}
    outputs, _, _ = run(Noisy(), train=True, key=KEY, **options)
    assert not np.allclose(outputs.features["a"], outputs.features["b"])
    assert np.all(run(Noisy(), key=KEY, **options)[0].features["a"] != 0)
    with pytest.raises(ValueError, match=r"'noise' even with train=False.*\['train'\]"):
      run(Noisy(), **options)
    with pytest.raises(ValueError, match=r"'noise' in training; give apply a key"):
      run(Noisy(), train=True, **options)
    with pytest.raises(ValueError, match=r"'mask', which is not in rngs=.*\('noise', 'mask'\)"):
      run(Noisy(), train=True, key=KEY, rngs=("noise",))
    with pytest.raises(ValueError, match=r"rngs=\('noise',\)"):
      networks.linen(Noisy(), rngs="noise")

  def test_a_collection_that_grows_is_no_state(self):
    class Mixture(nn.Module):
      """Sows a loss in training, counts its calls, perturbs."""

      @nn.compact
      def __call__(self, x, train=False):
        calls = self.variable("counts", "calls", lambda: jnp.zeros(()))
        if self.is_mutable_collection("counts") and not self.is_initializing():
          calls.value = calls.value + 1
        if train:
          self.sow("losses", "balance", jnp.mean(x))
        self.sow("more_losses", "balance", jnp.mean(x))
        return self.perturb("perturbed", nn.Dense(3)(x))

    network = networks.linen(Mixture())
    variables = network.init(KEY, X)
    assert set(variables) == {"params", "counts", "losses"}
    _, state = network.apply(variables, X, train=True, key=KEY)
    assert set(state) == {"counts"}
    assert float(state["counts"]["calls"]) == 1

  def test_parameters_made_only_in_training_are_there(self):
    class Auxiliary(nn.Module):
      @nn.compact
      def __call__(self, x, train=False):
        logits = nn.Dense(3, name="head")(x)
        return (logits, nn.Dense(3, name="auxiliary")(x)) if train else (logits, None)

    _, _, variables = run(Auxiliary(), logits=lambda out: out[0])
    assert set(variables["params"]) == {"head", "auxiliary"}

  def test_a_head_that_exists_only_in_training_is_a_feature_there(self):
    class Auxiliary(nn.Module):
      @nn.compact
      def __call__(self, x, train=False):
        if train:
          doubled = nn.Dropout(0.0, deterministic=False)(2 * nn.Dense(4, name="auxiliary")(x))
          self.sow("intermediates", "doubled", doubled)
        return nn.Dense(3, name="head")(x)

    names = ["auxiliary", "doubled", "head"]
    network = networks.linen(Auxiliary(), features=names)
    variables = network.init(KEY, X)
    seen, _ = network.apply(variables, X, train=True, key=KEY)
    kernel, bias = (variables["params"]["auxiliary"][name] for name in ("kernel", "bias"))
    assert sorted(seen.features) == names
    np.testing.assert_allclose(seen.features["auxiliary"], X @ kernel + bias[None], rtol=1e-5)
    np.testing.assert_array_equal(seen.features["doubled"], 2 * seen.features["auxiliary"])
    # Evaluation has no such head, and what is asked for there is what there is.
    assert set(network.apply(variables, X, train=False, key=None)[0].features) == {"head"}
    with pytest.raises(ValueError, match="1 of the features can't be found.\n'auxiliry': nothing"):
      networks.linen(Auxiliary(), features=["auxiliry", "head"]).init(KEY, X)

  def test_a_module_without_parameters(self):
    class Flat(nn.Module):
      @nn.compact
      def __call__(self, x):
        return x

    outputs, _, variables = run(Flat())
    assert variables == {"params": {}}
    np.testing.assert_array_equal(outputs.logits, X)


class Told(nn.Module):
  """Puts out what its flags were: 1, 0, or -1 for what nobody told."""

  @nn.compact
  def __call__(
    self,
    x,
    train=None,
    training=None,
    is_training=None,
    deterministic=None,
    use_running_average=None,
    eval_mode=None,
    inference=None,
    frozen=None,
  ):
    flags = [train, training, is_training, deterministic, use_running_average]
    flags += [eval_mode, inference, frozen]
    return jnp.array([-1 if flag is None else int(flag) for flag in flags])


class TestFlags:
  @pytest.mark.parametrize(
    ("train_flag", "want"),
    [
      ("auto", [1, 1, 1, 0, 0, 0, 0, -1]),
      ("training", [-1, 1, -1, -1, -1, -1, -1, -1]),
      ("inference", [-1, -1, -1, -1, -1, -1, 0, -1]),
      ("not deterministic", [-1, -1, -1, 0, -1, -1, -1, -1]),
      ("frozen", [-1, -1, -1, -1, -1, -1, -1, 1]),
      ("not frozen", [-1, -1, -1, -1, -1, -1, -1, 0]),
      (None, [-1, -1, -1, -1, -1, -1, -1, -1]),
    ],
  )
  def test_arguments(self, train_flag, want):
    network = networks.linen(Told(), train_flag=train_flag)
    training, _ = network.apply({}, X, train=True)
    evaluating, _ = network.apply({}, X, train=False)
    assert training.logits.tolist() == want
    assert evaluating.logits.tolist() == [v if v < 0 else 1 - v for v in want]

  def test_a_flag_among_any_keywords(self):
    class Any(nn.Module):
      @nn.compact
      def __call__(self, x, **keywords):
        return x * keywords["learn"]

    network = networks.linen(Any(), train_flag="learn")
    assert not np.any(network.apply({}, X, train=False)[0].logits)

  def test_attributes(self):
    class Attribute(nn.Module):
      deterministic: bool = True
      train: str = "not a flag"

      @nn.compact
      def __call__(self, x):
        assert self.train == "not a flag"
        return nn.Dropout(0.5)(x, deterministic=self.deterministic)

    network = networks.linen(Attribute())
    kept, _ = network.apply({}, X, train=False)
    np.testing.assert_array_equal(kept.logits, X)
    dropped, _ = network.apply({}, X, train=True, key=KEY)
    assert set(np.unique(np.asarray(dropped.logits / X))) <= {0.0, 2.0}
    assert np.any(np.asarray(dropped.logits) == 0)
    named = networks.linen(Attribute(), train_flag="deterministic")
    np.testing.assert_array_equal(named.apply({}, X, train=False)[0].logits, X)

  def test_a_flag_that_is_not_there(self):
    message = r"train_flag='train': Nested has no such .* takes \['x'\], the attributes are .*name"
    with pytest.raises(ValueError, match=message):
      networks.linen(Nested(), train_flag="train")


class TestInputsAndOutputs:
  def test_several_inputs(self):
    class Pair(nn.Module):
      @nn.compact
      def __call__(self, ids, mask, *, train: bool):
        return nn.Embed(7, 3)(ids) * mask[..., None]

    inputs = {"ids": jnp.array([[1, 2], [3, 4]]), "mask": jnp.array([[1.0, 0], [1, 1]])}
    by_name, _, variables = run(Pair(), inputs=inputs, arguments=lambda i: i)
    by_place, _, _ = run(Pair(), inputs=inputs, arguments=lambda i: (i["ids"], i["mask"]))
    want = variables["params"]["Embed_0"]["embedding"][inputs["ids"]] * inputs["mask"][..., None]
    np.testing.assert_array_equal(by_name.logits, want)
    np.testing.assert_array_equal(by_place.logits, want)
    with pytest.raises(ValueError, match=r"Pair takes \(self, ids, mask.*missing.*'mask'"):
      trace(Pair(), inputs=inputs)
    with pytest.raises(ValueError, match=r"arguments returned a list"):
      trace(Pair(), inputs=inputs, arguments=lambda i: [i["ids"], i["mask"]])
    with pytest.raises(ValueError, match=r"arguments returned \['train'\], which train_flag sets"):
      trace(Pair(), inputs=inputs, arguments=lambda i: {**i, "train": True})

  def test_one_input_that_is_a_pytree(self):
    class Sum(nn.Module):
      @nn.compact
      def __call__(self, pair):
        return pair["a"] + pair["b"]

    outputs, _, _ = run(Sum(), inputs={"a": X, "b": X})
    np.testing.assert_array_equal(outputs.logits, X + X)

  def test_where_logits_are(self):
    @dataclasses.dataclass
    class Record:
      logits: Any

    class Returns(nn.Module):
      wrap: Any

      @nn.compact
      def __call__(self, x):
        return self.wrap(x)

    for wrap in (lambda x: {"logits": x, "y": 0}, Record):
      np.testing.assert_array_equal(run(Returns(wrap))[0].logits, X)
    outputs, _, _ = run(Returns(lambda x: (x, 2 * x)), logits=lambda out: out[1])
    np.testing.assert_array_equal(outputs.logits, 2 * X)
    with pytest.raises(ValueError, match=r"puts out a tuple of .*\(2, 4\).* with logits=lambda"):
      trace(Returns(lambda x: (x, x)))
    with pytest.raises(ValueError, match=r"puts out a dict of .*'score': \(2, 4\)"):
      trace(Returns(lambda x: {"score": x}))
    with pytest.raises(ValueError, match=r"and logits= found no array"):
      trace(Returns(lambda x: (x, x)), logits=lambda out: out)

  @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
  def test_the_dtype_is_the_networks(self, dtype):
    outputs, _, _ = run(nn.Sequential([nn.Dense(3, dtype=dtype)]), features=["layers_0"])
    assert outputs.logits.dtype == outputs.features["layers_0"].dtype == dtype

  @pytest.mark.parametrize("method", ["features", lambda module, x: module.features(x)])
  def test_another_method(self, method):
    class Net(nn.Module):
      def setup(self):
        self.body, self.head = nn.Dense(4), nn.Dense(3)

      def features(self, x):
        return self.body(x)

      def __call__(self, x):
        return self.head(self.features(x))

    outputs, _, variables = run(Net(), method=method, features=["body"])
    assert set(variables["params"]) == {"body"}
    np.testing.assert_array_equal(outputs.logits, dense(variables["params"]["body"], X))
    np.testing.assert_array_equal(outputs.logits, outputs.features["body"])
    with pytest.raises(ValueError, match=r"method='encode' is no method of Net"):
      networks.linen(Net(), method="encode")


def count(function, *args):
  return [str(eqn.primitive) for eqn in jax.make_jaxpr(function)(*args).eqns]


class TestPurity:
  @pytest.mark.parametrize("train", [True, False])
  def test_a_network_costs_what_its_module_costs(self, train):
    module = Published()
    variables = module.init(KEY, X, train=False)

    def plain(variables, key):
      rngs = {"dropout": jax.random.fold_in(key, 0)} if train else {}
      mutable = ["batch_stats"] if train else False
      return module.apply(variables, X, train=train, rngs=rngs, mutable=mutable)

    def through(features):
      network = networks.linen(module, features=features)
      return count(
        lambda v, k: network.apply(v, X, train=train, key=k if train else None), variables, KEY
      )

    want = count(plain, variables, KEY)
    assert through([]) == want
    assert through(["normed", "Dense_0"]) == want

  def test_only_what_is_wanted_is_captured(self):
    network = networks.linen(scanned(intermediates=0), features=["stack/act"])
    variables = network.init(KEY, X)
    jaxpr = jax.make_jaxpr(lambda v: network.apply(v, X, train=False))(variables)
    scan = next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
    # The carry and one stacked value; neither the dense layer's output nor the layer's own.
    assert len(scan.outvars) == 2

  def test_jit_vmap_pmap_and_eval_shape(self):
    network = networks.linen(Published(), features=["normed"])
    keys = jax.random.split(KEY, 2)
    init = jax.vmap(network.init, in_axes=(0, None))
    variables = draw(jax.eval_shape(init, keys, X))

    def apply(variables, key):
      return network.apply(variables, X, train=True, key=key)

    shapes = jax.eval_shape(jax.vmap(apply), variables, keys)
    assert shapes[0].features["normed"].shape == (2, 2, 6)
    mapped = jax.jit(jax.vmap(apply))(variables, keys)
    parallel = jax.pmap(apply)(variables, keys)
    # Other programs, other order of sums: float32 rounding, magnified by a norm of two examples.
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), mapped, parallel
    )

  def test_init_outside_of_the_axis_that_a_norm_averages_over(self):
    network = networks.linen(Published(axis_name="devices"), features=["normed"])
    variables = network.init(KEY, X)
    assert set(variables) == {"params", "batch_stats"}

  def test_gradient_through_a_captured_feature(self):
    network = networks.linen(Nested(), features=["encoder/Dense_0"])
    variables = network.init(KEY, X)

    @jax.jit
    @jax.grad
    def grad(params):
      outputs, _ = network.apply({"params": params}, X, train=True, key=KEY)
      return jnp.sum(outputs.features["encoder/Dense_0"] ** 2)

    got = grad(variables["params"])
    linear = np.asarray(dense(variables["params"]["encoder"]["Dense_0"], X), np.float64)
    want = 2 * np.asarray(X, np.float64).T @ linear
    # float32 products of four terms of size 1.
    np.testing.assert_allclose(got["encoder"]["Dense_0"]["kernel"], want, rtol=1e-5, atol=1e-5)
    assert not np.any(got["head"]["kernel"])
    assert not np.any(got["encoder"]["Dense_1"]["kernel"])

  def test_strict_promotion(self, strict_promotion):
    places = {"f": Path("stack/act", call=0, layer=1), "g": Path("stack", element=0)}
    network = networks.linen(scanned(intermediates=0), features=places)
    variables = jax.eval_shape(network.init, KEY, X)
    outputs, _ = jax.eval_shape(lambda v: network.apply(v, X, train=True, key=KEY), variables)
    assert outputs.features["f"].dtype == jnp.float32


def test_parse_keeps_colons_that_are_no_calls():
  assert _features.parse(["a:b"])["a:b"].path == "a:b"
  assert _features.parse({"f": Path("a:1", element=0)})["f"] == Path("a", call=1, element=0)


# A flag that was not found.


class OwnFlag(nn.Module):
  """Tells its layers by a flag that no list of names has."""

  norm: bool = True
  rate: float = 0.5
  default: bool = False

  @nn.compact
  def __call__(self, x, is_train=None):
    train = self.default if is_train is None else is_train
    x = nn.Dense(3)(x)
    if self.norm:
      x = nn.BatchNorm(use_running_average=not train)(x)
    if self.rate:
      x = nn.Dropout(self.rate)(x, not train)
    return nn.Dense(2)(x)


class OwnNorm(nn.Module):
  """Statistics of a class that nobody knows."""

  @nn.compact
  def __call__(self, x, is_train=False):
    mean = self.variable("running_stats", "mean", jnp.zeros, x.shape[-1:])
    if is_train:
      mean.value = 0.9 * mean.value + 0.1 * x.mean(0)
    return nn.Dense(2)(x - mean.value[None])


@pytest.mark.parametrize("seen", ["traced", "eager", "lifted"])
@pytest.mark.parametrize(
  ("module", "what"),
  [
    (OwnFlag(), "leaves batch_stats as before"),
    (OwnFlag(rate=0.0), "leaves batch_stats as before"),
    (OwnFlag(norm=False), "drops nothing out"),
    (OwnNorm(), "leaves running_stats as before"),
  ],
)
def test_training_that_changes_nothing_is_an_error(module, what, seen):
  if seen == "lifted":
    if isinstance(module, OwnNorm):
      pytest.skip("what a foreign layer does inside of a transform is not seen")
    fields = {"norm": module.norm, "rate": module.rate}

    class Lifted(nn.Module):
      @nn.compact
      def __call__(self, x):
        return nn.remat(OwnFlag)(**fields)(x)

    module = Lifted()
  network = networks.linen(module, name="mine")
  variables = draw(jax.eval_shape(network.init, KEY, X))
  call = lambda v, k: network.apply(v, X, train=True, key=k)  # noqa: E731
  with pytest.raises(ValueError, match=f"mine {what} in training.*takes .*name its own flag"):
    (call if seen == "eager" else jax.jit(call))(variables, KEY)
  network.apply(variables, X, train=False, key=None)  # for evaluation it is well


@pytest.mark.parametrize("module", [OwnFlag(), OwnFlag(norm=False), OwnNorm()])
def test_a_flag_that_is_named_or_meant_to_be_none(module):
  _, state, variables = run(module, train=True, key=KEY, train_flag="is_train")
  moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state, {n: variables[n] for n in state})
  assert all(jax.tree.leaves(moved))
  _, same, variables = run(module, train=True, key=KEY, train_flag=None)
  assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, same, {n: variables[n] for n in same})))


def test_a_module_that_trains_in_evaluation():
  network = networks.linen(OwnFlag(default=True, rate=0.0), name="mine")
  variables = jax.eval_shape(network.init, KEY, X)
  with pytest.raises(ValueError, match="mine changes its statistics with train=False too"):
    jax.eval_shape(lambda v: network.apply(v, X, train=False, key=None), variables)


def test_an_axis_that_nobody_made():
  module = Published(axis_name="batch")
  network = networks.linen(module, name="mine")
  variables = jax.eval_shape(network.init, KEY, X)
  with pytest.raises(ValueError, match="mine averages over an axis that nobody made .*'data'"):
    jax.eval_shape(lambda v: network.apply(v, X, train=True, key=KEY), variables)
