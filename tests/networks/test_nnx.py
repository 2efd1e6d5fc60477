"""NNX modules as strangers write them, unmodified, become networks; compared with direct calls."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen
from flax import nnx as flax_nnx

from jaxdistill import data, losses, networks, recipes, teachers, train
from jaxdistill.networks import Path, nnx
from jaxdistill.types import Model, Term

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4)), jnp.float32)
KEY = jax.random.key(7)
# Other programs, other order of sums: float32 rounding of values of size 1.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def assert_same(first, second):
  assert jax.tree.structure(first) == jax.tree.structure(second)
  jax.tree.map(np.testing.assert_array_equal, first, second)


def host(tree):
  return jax.tree.map(lambda leaf: np.array(leaf, copy=True), tree)


def direct(module, *args, **keywords):
  """The module alone, which sows into itself."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    return module(*args, **keywords)


def everything(module):
  """All that a module holds, random state and modes among it, to see that it was left alone."""
  graph, state = flax_nnx.split(module)
  flat = flax_nnx.to_flat_state(state)
  leaves = [jax.random.key_data(v[...]) if v[...].dtype == KEY.dtype else v[...] for _, v in flat]
  modes = [
    (path, {n: v for n, v in vars(node).items() if isinstance(v, bool | None)}, type(node))
    for path, node in flax_nnx.iter_modules(module)
  ]
  return str(graph), host(leaves), modes


def trace(model, inputs=X, **options):
  """For errors, which come before anything is computed."""
  return jax.eval_shape(nnx(model, **options).init, KEY, inputs)


class Net(flax_nnx.Module):
  """BatchNorm and dropout, as in most published code."""

  def __init__(self, width, *, axis_name=None, rngs):
    self.first = flax_nnx.Linear(4, width, rngs=rngs)
    self.norm = flax_nnx.BatchNorm(width, momentum=0.5, axis_name=axis_name, rngs=rngs)
    self.drop = flax_nnx.Dropout(0.5, rngs=rngs)
    self.again = flax_nnx.Dropout(0.5, rngs=rngs)
    self.head = flax_nnx.Linear(width, 3, rngs=rngs)

  def __call__(self, x):
    x = flax_nnx.relu(self.norm(self.first(x)))
    self.sow(flax_nnx.Intermediate, "hidden", x)
    return self.head(self.again(self.drop(x)))


def build(rngs):
  return Net(4, rngs=rngs)


class Encoder(flax_nnx.Module):
  def __init__(self, *, rngs):
    self.layers = flax_nnx.List([flax_nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
    self.named = flax_nnx.Dict(a=flax_nnx.Linear(4, 4, rngs=rngs), b=Inherits(4, 4, rngs=rngs))

  def __call__(self, x):
    for layer in self.layers:
      x = self.squash(layer(x))
    for name in self.named:
      x = self.named[name](x)
    self.sow(flax_nnx.Intermediate, "mid", x)
    return x

  @staticmethod
  def squash(x):
    return jnp.tanh(x)


class Inherits(flax_nnx.Linear):
  pass


class Nested(flax_nnx.Module):
  def __init__(self, *, rngs):
    self.encoder = Encoder(rngs=rngs)
    self.head = flax_nnx.Sequential(
      flax_nnx.Linear(4, 4, rngs=rngs), flax_nnx.relu, flax_nnx.Linear(4, 3, rngs=rngs)
    )

  def __call__(self, x):
    return self.head(self.encoder(x))


class TestFeatures:
  def test_lists_dicts_sequences_and_sown_values_by_path(self):
    model = Nested(rngs=flax_nnx.Rngs(0))
    before = everything(model)
    names = ["encoder/layers/0", "encoder/layers/1", "encoder/named/a", "encoder/named/b"]
    names += ["encoder/mid", "encoder", "head/layers/0", "head"]
    network = nnx(model, features=names)
    made = network.init(KEY, X)
    outputs, state = network.apply(made, X, train=False)
    enc, head = model.encoder, model.head
    l0 = enc.layers[0](X)
    l1 = enc.layers[1](jnp.tanh(l0))
    a = enc.named["a"](jnp.tanh(l1))
    b = enc.named["b"](a)
    h0 = head.layers[0](b)
    logits = head.layers[2](jax.nn.relu(h0))
    for name, want in zip(names, [l0, l1, a, b, b, b, h0, logits], strict=True):
      np.testing.assert_array_equal(outputs.features[name], want)
    np.testing.assert_array_equal(outputs.logits, logits)
    assert state == {}
    assert set(made) == {"params"}
    assert set(made["params"]["encoder"]["layers"]) == {"0", "1"}
    names = [
      jax.tree_util.keystr(p, simple=True, separator="/")
      for p, _ in jax.tree_util.tree_leaves_with_path(made)
    ]
    assert "params/head/layers/2/kernel" in names
    assert before[0] == everything(model)[0]
    assert before[2] == everything(model)[2]
    assert_same(before[1], everything(model)[1])

  def test_shared_and_tied(self):
    class Shared(flax_nnx.Module):
      def __init__(self, rngs):
        self.layer = flax_nnx.Linear(4, 4, rngs=rngs)
        self.twin = self.layer
        self.out = flax_nnx.Linear(4, 4, rngs=rngs)
        self.out.kernel = self.layer.kernel

      def __call__(self, x):
        x = self.layer(flax_nnx.relu(self.twin(x)))
        self.sow(flax_nnx.Intermediate, "twice", x)
        self.sow(flax_nnx.Intermediate, "twice", 2 * x)
        return self.out(x)

    model = Shared(flax_nnx.Rngs(0))
    places = {"a": "layer:0", "b": Path("twin", call=1), "c": Path("twin", call=-1), "d": "twice:1"}
    network = nnx(Shared, features=places)
    made = networks.nnx_variables(model)
    outputs, _ = network.apply(made, X, train=False)
    first = model.layer(X)
    second = model.layer(jax.nn.relu(first))
    for name, want in {"a": first, "b": second, "c": second, "d": 2 * second}.items():
      np.testing.assert_array_equal(outputs.features[name], want)
    # The tied kernel is there once, and its gradient is that of both uses.
    assert len(jax.tree.leaves(made)) == 3

    def loss(model):
      return jnp.sum(model.out(model.layer(jax.nn.relu(model.layer(X)))))

    want = networks.nnx_variables(model)
    grads = flax_nnx.jit(flax_nnx.grad(loss))(model)
    got = jax.jit(jax.grad(lambda v: jnp.sum(network.apply(v, X, train=True, key=KEY)[0].logits)))(
      want
    )
    np.testing.assert_allclose(
      got["params"]["layer"]["kernel"], grads["layer"]["kernel"][...], **CLOSE
    )
    with pytest.raises(ValueError, match=r"'layer' has 2 values .*'layer:0', 'layer:1'"):
      trace(Shared, features=["layer"])

  def test_elements_and_other_methods(self):
    class Coder(flax_nnx.Module):
      def __init__(self, rngs):
        self.layer = flax_nnx.Linear(4, 3, rngs=rngs)

      def encode(self, x):
        return {"y": self.layer(x), "x": x}

    class Outer(flax_nnx.Module):
      def __init__(self, rngs):
        self.coder = Coder(rngs)

      def __call__(self, x):
        return self.coder.encode(x)["y"]

    model = Outer(flax_nnx.Rngs(0))
    network = nnx(model, features={"code": Path("coder", method="encode", element="y")})
    outputs, _ = network.apply(network.init(KEY, X), X, train=False)
    np.testing.assert_array_equal(outputs.features["code"], model.coder.layer(X))
    with pytest.raises(ValueError, match=r"'coder': .* called by \['encode'\], not by '__call__'"):
      trace(Outer, features=["coder"])
    with pytest.raises(ValueError, match=r"is a dict of .*element="):
      trace(Outer, features={"f": Path("coder", method="encode")})

  def test_not_found_lists_what_there_is(self):
    network = nnx(lambda rngs: Nested(rngs=rngs), features=["encoder/x", "mid"], name="student")
    with pytest.raises(ValueError, match="can't be found") as error:
      jax.eval_shape(network.init, KEY, X)
    text = str(error.value)
    assert text.startswith("student: 2 of the features")
    for line in ["encoder/mid (2, 4)", "encoder/layers/0 (2, 4)", "encoder (2, 4)", "head (2, 3)"]:
      assert f"\n  {line}" in text
    values = networks.nnx_variables(Nested(rngs=flax_nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"'encoder/x': nothing of that name"):
      network.apply(values, X, train=True, key=KEY)
    found = networks.capturable(network, jax.ShapeDtypeStruct((5, 4), jnp.float32))
    assert found["encoder/mid"].shape == (5, 4)
    assert set(found) == set(networks.capturable(Nested(rngs=flax_nnx.Rngs(0)), X))
    trace(lambda rngs: Nested(rngs=rngs), features=list(found))
    with pytest.raises(ValueError, match=r"was not made by networks.linen or networks.nnx"):
      networks.capturable(dataclasses.replace(network, apply=lambda *a, **k: None), X)
    with pytest.raises(ValueError, match="more than once"):
      nnx(build, features=["head", "head"])


class Auxiliary(flax_nnx.Module):
  """A head that exists in training alone."""

  def __init__(self, rngs):
    self.head, self.auxiliary = (flax_nnx.Linear(4, width, rngs=rngs) for width in (3, 5))

  def __call__(self, x, train=False):
    if train:
      self.auxiliary(x)
    return self.head(x)


def test_a_head_that_exists_only_in_training_can_be_given_a_loss():
  examples = data.from_arrays(np.asarray(X), np.array([0, 2]), num_classes=3)
  taught = Model(nnx(lambda rngs: flax_nnx.Linear(4, 3, rngs=rngs), features=[]), {})
  taught = dataclasses.replace(taught, variables=taught.network.init(KEY, X))
  network = nnx(Auxiliary, features=["auxiliary", "head"])
  fitted = train.fit(
    network,
    # A projector from a width that only a call in training shows to the teacher's logits.
    recipes.parts.learned(
      lambda student, teacher: {
        "p": (recipes.projectors.Linear(teacher.logits.shape[-1]), student.features["auxiliary"])
      },
      lambda running, student, teacher, batch, *, hint_weight: {
        "hint": Term(losses.hint_l2(running("p"), teacher.logits), weight=hint_weight)
      },
      {"hint_weight": 1.0},
    ),
    data=data.on_device(examples, batch_size=2, data_seed=0),
    optimizer=optax.sgd(0.1),
    steps=3,
    teacher=teachers.frozen(taught),
    run=train.Run(progress=None),
    watch=train.Watch(log_every=1),
  )
  values = [line["hint"] for line in fitted.history]
  assert values == sorted(values, reverse=True)
  assert values[-1] < values[0]
  outputs, _ = network.apply(fitted.variables, X, train=False, key=None)
  assert set(outputs.features) == {"head"}


class Block(flax_nnx.Module):
  def __init__(self, rngs):
    self.dense = flax_nnx.Linear(4, 4, rngs=rngs)
    self.drop = flax_nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    x = jnp.tanh(self.dense(x))
    self.sow(flax_nnx.Intermediate, "act", x)
    return self.drop(x)


def stacked(forward):
  class Stack(flax_nnx.Module):
    def __init__(self, rngs):
      @flax_nnx.split_rngs(splits=3)
      @flax_nnx.vmap
      def make(rngs):
        return Block(rngs)

      self.blocks = make(rngs)
      self.head = flax_nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
      return self.head(forward(self.blocks, x))

  return Stack


def scanned(axes):
  @flax_nnx.scan(in_axes=(axes, flax_nnx.Carry), out_axes=flax_nnx.Carry)
  def forward(block, x):
    return block(x)

  return stacked(forward)


def by_merge(blocks, x):
  graph, state = flax_nnx.split(blocks)
  return jax.lax.scan(lambda x, one: (flax_nnx.merge(graph, one)(x), None), x, state)[0]


class TestTransforms:
  def test_scan_and_vmap_stack_the_layers(self):
    places = {"all": "blocks/act", "last": Path("blocks/dense", layer=-1), "head": "head"}
    network = nnx(scanned(0), features=places)
    made = network.init(KEY, X)
    outputs, _ = network.apply(made, X, train=False)
    x, want = X, []
    for i in range(3):
      dense = jax.tree.map(lambda leaf: leaf[i], made["params"]["blocks"]["dense"])  # noqa: B023
      linear = x @ dense["kernel"] + dense["bias"][None]
      x = jnp.tanh(linear)
      want.append(x)
    np.testing.assert_allclose(outputs.features["all"], jnp.stack(want), **CLOSE)
    np.testing.assert_allclose(outputs.features["last"], linear, **CLOSE)
    np.testing.assert_array_equal(outputs.features["head"], outputs.logits)
    vmapped = nnx(
      stacked(lambda b, x: flax_nnx.vmap(lambda b, x: b(x), in_axes=(0, None))(b, x)[0]),
      features={"f": Path("blocks/dense", layer=0)},
    )
    outputs, _ = vmapped.apply(made, X, train=False)
    np.testing.assert_allclose(jnp.tanh(outputs.features["f"]), want[0], **CLOSE)

  def test_each_layer_has_its_own_dropout(self):
    network = nnx(scanned(0), features=["blocks", "blocks/act"])
    outputs, _ = network.apply(network.init(KEY, X), X, train=True, key=KEY)
    masks = np.asarray(outputs.features["blocks"]) == 0
    assert 0 < masks.sum() < masks.size
    assert not np.array_equal(masks[0], masks[1])

  def test_a_linen_module_inside_is_one_of_its_submodules(self):
    class Guest(linen.Module):
      @linen.compact
      def __call__(self, x, train):
        x = linen.Dense(4, name="first")(x)
        return linen.BatchNorm(use_running_average=not train, momentum=0.5, name="norm")(x)

    class Host(flax_nnx.Module):
      def __init__(self, rngs):
        self.body = flax_nnx.bridge.ToNNX(Guest(), rngs=rngs).lazy_init(X, train=False)
        self.head = flax_nnx.Linear(4, 3, rngs=rngs)

      def __call__(self, x, train):
        x = self.body(x, train=train, mutable=["batch_stats"] if train else False)
        self.sow(flax_nnx.Intermediate, "mid", x)
        return self.head(x)

    model = Host(flax_nnx.Rngs(0))
    network = nnx(model, features=["body", "mid"])
    made = networks.nnx_variables(model)
    assert set(networks.capturable(network, X)) == {"body", "mid", "head"}
    assert set(made) == {"params", "batch_stats"}

    @jax.jit
    def train(made):
      fresh = flax_nnx.clone(model)
      outputs, state = network.apply(made, X, train=True, key=KEY)
      return outputs, state, direct(fresh, X, True), networks.nnx_variables(fresh)

    outputs, state, want, after = train(made)
    np.testing.assert_allclose(outputs.logits, want, **CLOSE)
    np.testing.assert_array_equal(outputs.features["body"], outputs.features["mid"])
    jax.tree.map(functools.partial(np.testing.assert_allclose, **CLOSE), {**made, **state}, after)
    assert np.all(np.asarray(state["batch_stats"]["body"]["norm"]["mean"]) != 0)
    jax.eval_shape(network.init, KEY, X)

  def test_streams_may_be_split_in_evaluation(self):
    class Splits(flax_nnx.Module):
      def __init__(self, rngs):
        self.drop, self.rngs = flax_nnx.Dropout(0.5), rngs

      def __call__(self, x):
        @flax_nnx.split_rngs(splits=2)
        @flax_nnx.vmap(in_axes=(None, 0, 0))
        def apply(drop, rngs, x):
          return drop(x, rngs=rngs)

        return apply(self.drop, self.rngs, x)

    network = nnx(Splits)
    np.testing.assert_array_equal(network.apply({}, X, train=False)[0].logits, X)
    dropped = network.apply({}, X, train=True, key=KEY)[0].logits
    assert set(np.unique(np.asarray(dropped / X))) == {0.0, 2.0}
    message = r"streams \['rngs/default'\] in training; give apply a key"
    with pytest.raises(ValueError, match=message):
      network.apply({}, X, train=True)
    never = nnx(Splits, train_flag=None)
    with pytest.raises(ValueError, match=r"even with train=False, .* told by no flag"):
      never.apply({}, X, train=False)

  @pytest.mark.parametrize(
    "model",
    [
      scanned(flax_nnx.StateAxes({flax_nnx.Param: 0, flax_nnx.RngState: 0, ...: None})),
      stacked(by_merge),
    ],
  )
  def test_a_transform_that_hides_is_named(self, model):
    message = r"'blocks/dense': 'blocks' runs inside a transform"
    with pytest.raises(ValueError, match=message) as error:
      trace(model, features=["blocks/dense"])
    assert "Available:\n  head (2, 3)\nHidden in a transform: blocks" in str(error.value)
    trace(model, features=["head"])

  def test_the_axis_that_the_message_asks_for(self):
    axes = {flax_nnx.Param: 0, flax_nnx.RngState: 0, flax_nnx.Intermediate: 0, ...: None}
    found = networks.capturable(scanned(flax_nnx.StateAxes(axes)), X)
    assert found["blocks/dense"].shape == (3, 2, 4)

  def test_a_transform_that_keeps_its_structure_is_named(self):
    class Either(flax_nnx.Module):
      def __init__(self, rngs):
        self.a, self.b = Block(rngs), Block(rngs)
        self.head = flax_nnx.Linear(4, 3, rngs=rngs)

      def __call__(self, x):
        first = jnp.sum(x) > 0
        x = flax_nnx.cond(first, lambda a, b, x: a(x), lambda a, b, x: b(x), self.a, self.b, x)
        self.sow(flax_nnx.Intermediate, "chosen", x)
        return self.head(x)

    with pytest.raises(ValueError, match=r"\['a/dense'\] can't be captured") as error:
      trace(Either, features=["a/dense", "chosen"])
    assert "\n  chosen (2, 4)" in str(error.value)
    assert "\n  head (2, 3)" in str(error.value)
    trace(Either, features=["chosen", "head"])

  @pytest.mark.parametrize("lift", [flax_nnx.remat, flax_nnx.jit])
  def test_remat_and_jit_hide_nothing(self, lift):
    class Lifted(flax_nnx.Module):
      def __init__(self, rngs):
        self.block = Block(rngs)

      def __call__(self, x):
        return lift(lambda block, x: block(x))(self.block, x)

    model = Lifted(flax_nnx.Rngs(0))
    network = nnx(model, features=["block/dense", "block/act", "block"])
    features = network.apply(networks.nnx_variables(model), X, train=False)[0].features
    want = model.block.dense(X)
    np.testing.assert_allclose(features["block/dense"], want, **CLOSE)
    np.testing.assert_allclose(features["block"], jnp.tanh(want), **CLOSE)


class TestTraining:
  def test_training_updates_and_evaluation_leaves_alone(self):
    model = build(flax_nnx.Rngs(0))
    before = everything(model)
    network = nnx(model, features=["hidden", "norm"])
    made = network.init(KEY, X)
    assert set(made) == {"params", "batch_stats"}
    kept = host(made)
    outputs, state = network.apply(made, X, train=True, key=KEY)
    linear = model.first(X)
    # BatchNorm may compute the mean in another order: float32 rounding.
    np.testing.assert_allclose(state["batch_stats"]["norm"]["mean"], 0.5 * linear.mean(0), **CLOSE)
    np.testing.assert_allclose(np.mean(outputs.features["norm"], axis=0), 0, atol=1e-5)
    assert jax.tree.structure(state) == jax.tree.structure({"batch_stats": made["batch_stats"]})
    outputs, state = network.apply(made, X, train=False, key=None)
    assert state == {}
    other = build(flax_nnx.Rngs(0))
    other.eval()
    np.testing.assert_array_equal(outputs.logits, direct(other, X))
    jax.tree.map(np.testing.assert_array_equal, kept, host(made))
    assert before[0] == everything(model)[0]
    assert before[2] == everything(model)[2]
    assert_same(before[1], everything(model)[1])

  def test_training_is_what_the_module_does(self):
    network = nnx(build)
    made = network.init(KEY, X)
    model = build(flax_nnx.Rngs(KEY))
    assert_same(made, networks.nnx_variables(model))
    model.train()
    # Without dropout there is nothing random to compare.
    model.drop.rate = model.again.rate = 0.0
    still = nnx(model)
    outputs, state = still.apply(made, X, train=True, key=KEY)
    np.testing.assert_array_equal(outputs.logits, direct(model, X))
    assert_same(state["batch_stats"], networks.nnx_variables(model)["batch_stats"])

  @pytest.mark.slow
  def test_dropout_follows_the_key(self):
    network = nnx(lambda rngs: Net(32, rngs=rngs), features=["hidden", "drop", "again"])
    made = jax.jit(network.init)(KEY, X)
    apply = jax.jit(lambda k: network.apply(made, X, train=True, key=k)[0].features)
    a, b, c = apply(KEY), apply(jax.random.key_data(KEY)), apply(jax.random.key(8))
    np.testing.assert_array_equal(a["drop"], b["drop"])
    on = np.asarray(a["hidden"]) > 0
    assert not np.array_equal(a["drop"], c["drop"])
    kept = np.asarray(a["drop"]) != 0
    assert 0 < kept.sum() < on.sum()
    np.testing.assert_allclose(a["drop"][kept], 2 * a["hidden"][kept], rtol=1e-6)
    # Two layers that were made from one stream drop different units.
    assert not np.array_equal(np.asarray(a["again"])[kept] != 0, kept[kept])
    evaluate = jax.jit(lambda k: network.apply(made, X, train=False, key=k)[0].features)
    still = evaluate(KEY)
    np.testing.assert_array_equal(still["drop"], still["hidden"])
    with pytest.raises(ValueError, match=r"\['again/rngs', 'drop/rngs'\] in training; give"):
      network.apply(made, X, train=True)

  def test_a_module_that_draws_in_evaluation(self):
    class Noisy(flax_nnx.Module):
      def __init__(self, rngs):
        self.noise = rngs.noise.fork()

      def __call__(self, x):
        return x + self.noise.normal(x.shape)

    network = nnx(Noisy, name="noisy")
    made = network.init(KEY, X)
    assert made == {"params": {}}
    message = r"noisy draws from the random streams \['noise'\] even with train=False, .*eval\(\)"
    with pytest.raises(ValueError, match=message):
      network.apply(made, X, train=False)
    a, b = (network.apply(made, X, train=False, key=jax.random.key(i))[0].logits for i in (0, 1))
    assert not np.array_equal(a, b)

  def test_rngs_as_an_argument(self):
    class Asks(flax_nnx.Module):
      def __init__(self, rngs):
        self.drop = flax_nnx.Dropout(0.5)

      def __call__(self, x, *, rngs):
        return self.drop(x, rngs=rngs)

    network = nnx(Asks)
    out = network.apply({}, X, train=True, key=KEY)[0].logits
    assert set(np.unique(np.asarray(out / X))) == {0.0, 2.0}
    np.testing.assert_array_equal(network.apply({}, X, train=False)[0].logits, X)
    with pytest.raises(ValueError, match="give apply a key"):
      network.apply({}, X, train=True)

  def test_other_variables_and_plain_arrays(self):
    class Counter(flax_nnx.Variable):
      pass

    class LowRank(flax_nnx.Param):
      pass

    class Many(flax_nnx.Module):
      def __init__(self, rngs):
        self.low = LowRank(jnp.ones((4, 3)))
        self.calls = Counter({"n": jnp.zeros((), jnp.int32), "pair": (jnp.zeros(2), 1)})
        self.cache = flax_nnx.Cache(jnp.zeros((3,)))
        self.table = jnp.arange(3.0)
        self.nothing = flax_nnx.Param(None)
        self.left_over = flax_nnx.Intermediate((jnp.zeros(2),))

      def __call__(self, x):
        x = x @ self.low[...] + self.table[None]
        self.calls.set_value({**self.calls.get_value(), "n": self.calls.get_value()["n"] + 1})
        self.cache[...] = x[0]
        return x

    network = nnx(Many)
    made = network.init(KEY, X)
    assert set(made) == {"params", "Counter", "cache", "arrays"}
    assert set(made["params"]) == {"low"}
    assert set(made["Counter"]["calls"]) == {"n", "pair"}
    assert made["Counter"]["calls"]["pair"]["1"].dtype == jnp.int32
    outputs, state = network.apply(made, X, train=True, key=KEY)
    assert set(state) == {"Counter", "cache", "arrays"}
    assert int(state["Counter"]["calls"]["n"]) == 1
    np.testing.assert_array_equal(state["cache"]["cache"], outputs.logits[0])
    _, state = network.apply({**made, **state}, X, train=True, key=KEY)
    assert int(state["Counter"]["calls"]["n"]) == 2
    twice = {**made, "arrays": {"table": 2 * made["arrays"]["table"]}}
    moved = network.apply(twice, X, train=False)[0].logits - outputs.logits
    np.testing.assert_allclose(moved, np.broadcast_to(made["arrays"]["table"], (2, 3)), **CLOSE)

  def test_a_state_that_grows_is_refused(self):
    class Grows(flax_nnx.Module):
      def __init__(self, rngs):
        self.past = flax_nnx.Cache(jnp.zeros((1, 4)))

      def __call__(self, x):
        self.past.set_value(jnp.concatenate([self.past.get_value(), x]))
        return x

    network = nnx(Grows)
    made = network.init(KEY, X)
    with pytest.raises(ValueError, match=r"changes the structure or the shape of cache/past"):
      network.apply(made, X, train=True, key=KEY)


class Told(flax_nnx.Module):
  """Puts out what its flags were: 1, 0, or -1 for what nobody told."""

  def __init__(self, rngs):
    self.inner = flax_nnx.Dropout(0.5, deterministic=None)
    self.frozen, self.eval_mode, self.is_training = True, None, "not a flag"

  def __call__(self, x, train=None, deterministic=None, gate=None):
    flags = [train, deterministic, gate, self.eval_mode, self.inner.deterministic]
    flags += [None if self.frozen else False]
    return jnp.array([-1 if flag is None else int(flag) for flag in flags])


class TestFlags:
  @pytest.mark.parametrize(
    ("train_flag", "training", "evaluating"),
    [
      ("auto", [1, 0, -1, 0, 0, -1], [0, 1, -1, 1, 1, -1]),
      ("train", [1, -1, -1, -1, -1, -1], [0, -1, -1, -1, -1, -1]),
      ("not gate", [-1, -1, 0, -1, -1, -1], [-1, -1, 1, -1, -1, -1]),
      ("deterministic", [-1, 0, -1, -1, -1, -1], [-1, 1, -1, -1, -1, -1]),
      ("eval_mode", [-1, -1, -1, 0, -1, -1], [-1, -1, -1, 1, -1, -1]),
      ("frozen", [-1, -1, -1, -1, -1, -1], [-1, -1, -1, -1, -1, 0]),
      (None, [-1] * 6, [-1] * 6),
    ],
  )
  def test_arguments_and_attributes(self, train_flag, training, evaluating):
    network = nnx(Told, train_flag=train_flag)
    assert network.apply({}, X, train=True)[0].logits.tolist() == training
    assert network.apply({}, X, train=False)[0].logits.tolist() == evaluating

  def test_modes_of_the_users_own(self):
    class Modes(flax_nnx.Module):
      def __init__(self, rngs):
        self.part = Part()
        self.word = ""

      def train(self, **attributes):
        super().train(**attributes)
        self.word = "train"

      def __call__(self, x):
        return x * (1 if self.word == "train" else 0) + self.part.shift

    class Part(flax_nnx.Module):
      def __init__(self):
        self.shift = 5

      def set_view(self, deterministic: bool | None = None):
        self.shift = 7 if deterministic else 0

    network = nnx(Modes)
    np.testing.assert_array_equal(network.apply({}, X, train=True)[0].logits, X)
    np.testing.assert_array_equal(network.apply({}, X, train=False)[0].logits, 0 * X + 7)

  def test_a_flag_that_is_not_there(self):
    message = (
      r"train_flag='learn': Net has no such .* takes \['x'\], the attributes .*deterministic"
    )
    with pytest.raises(ValueError, match=message):
      nnx(build, train_flag="learn")


class TestInputsAndOutputs:
  def test_several_inputs_and_methods(self):
    class Pair(flax_nnx.Module):
      def __init__(self, rngs):
        self.embed = flax_nnx.Embed(7, 3, rngs=rngs)

      def __call__(self, ids, mask, *, train: bool):
        return {"logits": self.embed(ids) * mask[..., None], "n": train}

      def half(self, ids):
        return self.embed(ids), 1

    inputs = {"ids": jnp.array([[1, 2], [3, 4]]), "mask": jnp.array([[1.0, 0], [1, 1]])}
    made = networks.nnx_variables(Pair(flax_nnx.Rngs(0)))
    want = made["params"]["embed"]["embedding"][inputs["ids"]]
    for arguments in (lambda i: i, lambda i: (i["ids"], i["mask"])):
      outputs, _ = nnx(Pair, arguments=arguments).apply(made, inputs, train=False)
      np.testing.assert_array_equal(outputs.logits, want * inputs["mask"][..., None])
    for method in ("half", lambda module, ids: module.half(ids)):
      network = nnx(Pair, method=method, logits=lambda out: out[0])
      np.testing.assert_array_equal(network.apply(made, inputs["ids"], train=False)[0].logits, want)
    with pytest.raises(ValueError, match=r"Pair takes \(self, ids, mask.*missing.*'mask'"):
      trace(Pair, inputs=inputs)
    with pytest.raises(ValueError, match=r"arguments returned \['train'\], which train_flag sets"):
      trace(Pair, inputs=inputs, arguments=lambda i: {**i, "train": True})
    with pytest.raises(ValueError, match=r"puts out a tuple of .* with logits=lambda"):
      trace(Pair, inputs=inputs["ids"], method="half")
    with pytest.raises(ValueError, match=r"method='encode' is no method of Pair"):
      nnx(Pair, method="encode")

  @pytest.mark.slow
  def test_attention(self):
    class Layer(flax_nnx.Module):
      def __init__(self, *, rngs):
        self.norm = flax_nnx.LayerNorm(4, rngs=rngs)
        self.attend = flax_nnx.MultiHeadAttention(2, 4, dropout_rate=0.5, decode=False, rngs=rngs)
        self.out = flax_nnx.Linear(4, 3, rngs=rngs)

      def __call__(self, x, mask):
        return self.out(x + self.attend(self.norm(x), mask=mask)).mean(1)

    model = Layer(rngs=flax_nnx.Rngs(0))
    inputs = {
      "x": jnp.stack([X, 2 * X]),
      "mask": jnp.ones((2, 1, 2, 2), bool).at[:, :, 0, 1].set(False),
    }
    network = nnx(model, features=["attend", "attend/query"], arguments=lambda i: i)
    made = network.init(KEY, inputs)
    outputs, _ = network.apply(made, inputs, train=False)
    normed = model.norm(inputs["x"])
    model.eval()
    attended = model.attend(normed, mask=inputs["mask"])
    np.testing.assert_array_equal(outputs.features["attend"], attended)
    np.testing.assert_array_equal(outputs.features["attend/query"], model.attend.query(normed))
    np.testing.assert_array_equal(outputs.logits, model(**inputs))
    dropped, _ = network.apply(made, inputs, train=True, key=KEY)
    assert not np.allclose(dropped.logits, outputs.logits, atol=1e-3)

  def test_convolutions(self):
    class Cnn(flax_nnx.Module):
      def __init__(self, classes, *, rngs):
        self.stem = flax_nnx.Conv(1, 2, (3, 3), rngs=rngs)
        self.norm = flax_nnx.BatchNorm(2, rngs=rngs)
        self.head = flax_nnx.Linear(2, classes, rngs=rngs)

      def __call__(self, x):
        return self.head(jax.nn.relu(self.norm(self.stem(x))).mean((1, 2)))

    images = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 4, 1)), jnp.float32)
    network = nnx(lambda rngs: Cnn(3, rngs=rngs), features=["stem"])
    made = network.init(KEY, images)
    outputs, _ = network.apply(made, images, train=False)
    model = Cnn(3, rngs=flax_nnx.Rngs(KEY))
    model.eval()
    np.testing.assert_array_equal(outputs.features["stem"], model.stem(images))
    np.testing.assert_array_equal(outputs.logits, model(images))

  @pytest.mark.parametrize(
    ("model", "message"),
    [
      (linen.Dense(3), "Dense is a Linen module; use networks.linen"),
      (3, "neither an NNX module nor a function"),
      (Net, r"takes \(width, \*, axis_name=None, rngs\), not rngs alone .*lambda rngs"),
      (lambda rngs: X, "made a .*, not an NNX module"),
    ],
  )
  def test_what_is_no_model(self, model, message):
    with pytest.raises(ValueError, match=message):
      nnx(model)

  def test_variables_of_another_network(self):
    network = nnx(build)
    made = jax.eval_shape(network.init, KEY, X)
    wider = jax.eval_shape(nnx(lambda rngs: Net(8, rngs=rngs)).init, KEY, X)

    def apply(variables):
      return jax.eval_shape(lambda v: network.apply(v, X, train=False), variables)

    apply({**made, "other": made["params"]})
    with pytest.raises(ValueError, match=r"Net: the variables lack \['batch_stats/norm/mean'"):
      apply({"params": made["params"]})
    with pytest.raises(ValueError, match=r"module has not, \['params/x'\]"):
      apply({**made, "params": {**made["params"], "x": made["params"]["head"]["bias"]}})
    with pytest.raises(ValueError, match=r"another shape .*\['batch_stats/norm/mean'"):
      apply(wider)
    with pytest.raises(ValueError, match=r"params/first/bias is a ShapeDtypeStruct.*with values"):
      networks.nnx_variables(flax_nnx.eval_shape(build, flax_nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"is a dict, not an NNX module"):
      networks.nnx_variables({})


class TestPurity:
  @pytest.mark.slow
  def test_seeds_under_vmap_are_single_runs(self):
    network = nnx(build, features=["hidden"])
    keys = jax.random.split(KEY, 2)
    made = jax.jit(jax.vmap(network.init, in_axes=(0, None)))(keys, X)
    apply = lambda v, k: network.apply(v, X, train=True, key=k)  # noqa: E731
    mapped = jax.jit(jax.vmap(apply))(made, keys)
    parallel = jax.pmap(apply)(made, keys)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), mapped, parallel
    )
    for i in range(2):
      one = network.init(keys[i], X)
      pick = lambda tree: jax.tree.map(lambda leaf: leaf[i], tree)  # noqa: B023, E731
      jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), one, pick(made))
      # A norm of two examples magnifies rounding.
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        apply(one, keys[i]),
        pick(mapped),
      )
    assert not np.allclose(
      made["params"]["first"]["kernel"][0], made["params"]["first"]["kernel"][1]
    )

  def test_the_axis_that_a_norm_averages_over(self):
    network = nnx(lambda rngs: Net(4, axis_name="devices", rngs=rngs))
    made = network.init(KEY, X)
    both = jnp.stack([X, X + 1])
    apply = lambda x: network.apply(made, x, train=True, key=KEY)[1]  # noqa: E731
    state = jax.pmap(apply, axis_name="devices")(both)["batch_stats"]["norm"]["mean"]
    np.testing.assert_array_equal(state[0], state[1])
    want = 0.5 * np.mean(both.reshape(4, 4) @ made["params"]["first"]["kernel"], axis=0)
    np.testing.assert_allclose(state[0], want, **CLOSE)

  def test_evaluation_costs_what_the_module_costs(self):
    model = build(flax_nnx.Rngs(0))
    model.eval()
    graph, state = flax_nnx.split(model)

    def count(function, *args):
      primitives = [str(eqn.primitive) for eqn in jax.make_jaxpr(function)(*args).eqns]
      return [name for name in primitives if not name.startswith("random_")]

    want = count(lambda state: direct(flax_nnx.merge(graph, state), X), state)
    for features in ([], ["hidden", "first"]):
      network = nnx(build, features=features)
      apply = functools.partial(network.apply, inputs=X, train=False)
      assert count(apply, networks.nnx_variables(model)) == want

  def test_gradients_are_the_modules(self, strict_promotion):
    network = nnx(lambda rngs: Nested(rngs=rngs), features=["encoder/layers/1"])
    made = network.init(KEY, X)
    model = Nested(rngs=flax_nnx.Rngs(KEY))

    @jax.jit
    @jax.grad
    def grad(params):
      outputs, _ = network.apply({"params": params}, X, train=True, key=KEY)
      return jnp.sum(outputs.features["encoder/layers/1"] ** 2) + jnp.sum(outputs.logits)

    def loss(model):
      layers = model.encoder.layers
      return jnp.sum(layers[1](jnp.tanh(layers[0](X))) ** 2) + jnp.sum(direct(model, X))

    want = flax_nnx.to_pure_dict(flax_nnx.jit(flax_nnx.grad(loss))(model))
    got = grad(made["params"])
    for place in (("encoder", "layers"), ("head", "layers")):
      for i, leaf in want[place[0]][place[1]].items():
        np.testing.assert_allclose(
          got[place[0]][place[1]][str(i)]["kernel"], leaf["kernel"], **CLOSE
        )

  def test_float64(self):
    with jax.enable_x64(True):
      network = nnx(
        lambda rngs: flax_nnx.Linear(4, 3, param_dtype=jnp.float64, rngs=rngs), method="__call__"
      )
      x = jnp.asarray(X, jnp.float64)
      made = network.init(KEY, x)
      outputs, _ = network.apply(made, x, train=False)
      assert outputs.logits.dtype == jnp.float64
      want = np.asarray(x) @ np.asarray(made["params"]["kernel"])
      np.testing.assert_allclose(outputs.logits, want, rtol=1e-12, atol=1e-12)

  def test_an_embedding_computes_in_what_its_table_is(self):
    class Words(flax_nnx.Module):
      def __init__(self, rngs):
        self.table = flax_nnx.Embed(5, 4, rngs=rngs)
        self.head = flax_nnx.Linear(4, 3, rngs=rngs)

      def __call__(self, tokens):
        return self.head(self.table(tokens).mean(axis=1))

    tokens = jnp.zeros((2, 6), jnp.int32)
    network = networks.mixed_precision(nnx(Words))
    assert networks.count_products(network, network.init(KEY, tokens), tokens) == {"bfloat16": 1}

  def test_the_weights_are_copies(self):
    model = flax_nnx.Linear(4, 3, rngs=flax_nnx.Rngs(0))
    network = nnx(model)
    made = network.init(jax.random.key(1), X)
    assert_same(made, network.init(jax.random.key(2), X))
    step = jax.jit(lambda v: jax.tree.map(lambda leaf: leaf + 1, v), donate_argnums=0)
    step(made)
    assert np.isfinite(model(X)).all()


@pytest.mark.slow
def test_distilling_one_nnx_network_into_another():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 3, 16)
  inputs = (rng.normal(size=(16, 4)) + np.eye(3, 4)[labels]).astype(np.float32)
  source = data.on_device(
    data.from_arrays(inputs, labels, num_classes=3), batch_size=8, data_seed=0
  )
  module = Net(7, rngs=flax_nnx.Rngs(1))
  teacher = nnx(module, features=["hidden"], name="teacher")
  student = nnx(build, features={"mid": "norm"})
  before, values = everything(module), networks.nnx_variables(module)
  kept = host(values)
  fitted = train.fit(
    student,
    recipes.combine(recipes.kd(), recipes.hint("mid", "hidden")),
    data=source,
    optimizer=optax.sgd(0.05),
    steps=4,
    teacher=teachers.frozen(Model(teacher, values)),
    run=train.Run(progress=None),
  )
  assert_same(kept, host(values))
  assert_same(before[1], everything(module)[1])
  assert before[2] == everything(module)[2]
  start = student.init(KEY, X)
  assert jax.tree.structure(fitted.variables) == jax.tree.structure(start)
  # The statistics start at mean 0 and variance 1.
  stats = fitted.variables["batch_stats"]["norm"]
  assert np.all(np.abs(stats["mean"]) > 0)
  assert np.all(np.abs(stats["var"] - 1) > 1e-3)
  assert fitted.history[-1]["hint"] > 0


class OwnFlag(flax_nnx.Module):
  """Tells its BatchNorm by a flag that no list of names has."""

  def __init__(self, rngs):
    self.norm = flax_nnx.BatchNorm(4, axis_name=None, rngs=rngs)
    self.head = flax_nnx.Linear(4, 3, rngs=rngs)

  def __call__(self, x, is_train=False):
    return self.head(self.norm(x, use_running_average=not is_train))


@pytest.mark.parametrize("traced", [False, True])
def test_training_that_changes_nothing_is_an_error(traced):
  network = nnx(OwnFlag, name="mine")
  variables = network.init(KEY, X)
  call = lambda v: network.apply(v, X, train=True, key=KEY)[1]  # noqa: E731
  with pytest.raises(ValueError, match="mine leaves batch_stats as before.*name its own flag"):
    (jax.jit(call) if traced else call)(variables)
  for flag, moves in (("is_train", True), (None, False)):
    state = nnx(OwnFlag, train_flag=flag).apply(variables, X, train=True, key=KEY)[1]
    mean = state["batch_stats"]["norm"]["mean"]
    assert bool(jnp.any(mean != variables["batch_stats"]["norm"]["mean"])) is moves


def test_an_axis_that_nobody_made():
  network = nnx(lambda rngs: Net(4, axis_name="batch", rngs=rngs), name="mine")
  variables = network.init(KEY, X)
  with pytest.raises(ValueError, match="mine averages over an axis that nobody made"):
    jax.eval_shape(lambda v: network.apply(v, X, train=True, key=KEY), variables)
