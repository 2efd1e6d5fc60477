"""Bad input, tried from outside: every error is ours, names the argument, and nothing is lost.

The package is imported once more without the type checker of the other tests, which users do not
have either: what it would refuse must be refused by the package itself.
"""

import dataclasses
import functools
import importlib
import json
import pathlib
import sys
import traceback
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tensorflow_datasets.core import registered

import small_networks

MODULES = [
  "data",
  "evaluation",
  "export",
  "losses",
  "networks",
  "recipes",
  "reports",
  "runs",
  "search",
  "teachers",
  "train",
  "types",
]
X, Y = np.zeros((16, 4), np.float32), np.arange(16) % 3
NAN, ONE = float("nan"), np.ones(8)
Wrong = (TypeError, ValueError)


@pytest.fixture(scope="module")
def j():
  """The package as a user has it."""

  def ours():
    return {n: m for n, m in sys.modules.items() if n.split(".")[0] == "jaxdistill"}

  # TFDS knows a data set by its name, once.
  checked, finders, builders = ours(), sys.meta_path[:], registered._DATASET_REGISTRY
  digits = builders.pop("digits", None)
  for name in checked:
    del sys.modules[name]
  sys.meta_path[:] = [f for f in finders if type(f).__module__ != "typecheck"]
  try:
    user = {n: importlib.import_module(f"jaxdistill.{n}") for n in MODULES}
    for room in user.values():  # a door imports what is asked for
      for name in room.__all__:
        getattr(room, name)
  finally:
    sys.meta_path[:] = finders
    for name in ours():
      del sys.modules[name]
    sys.modules.update(checked)
  yield types.SimpleNamespace(**user)
  builders.pop("digits", None)
  if digits is not None:
    builders["digits"] = digits


class Net(nn.Module):
  """Two layers; sows ``mid``."""

  width: int = 5
  classes: int = 3

  @nn.compact
  def __call__(self, x, train: bool = False):
    x = nn.relu(nn.Dense(self.width)(x))
    self.sow("intermediates", "mid", x)
    return nn.Dropout(0.1, deterministic=not train)(nn.Dense(self.classes)(x))


class Words(nn.Module):
  """The least of a language model: hidden states and logits of V words."""

  words: int = 9

  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(self.words, 4, name="embed")(tokens)
    self.sow("intermediates", "mid", x)
    return nn.Dense(self.words)(x)


def network(j, *fields, **options):
  return j.networks.linen(Net(*fields), **{"features": ["mid"], **options})


@functools.cache
def begun(width, classes):
  return Net(width, classes).init(jax.random.key(9), jnp.zeros((1, 4)))


def variables(width=7, classes=3):
  return {"params": dict(begun(width, classes)["params"])}


def source(j, data_seed=0, batch_size=8, **options):
  examples = j.data.from_arrays(X, Y, num_classes=3)
  return j.data.on_device(examples, batch_size=batch_size, data_seed=data_seed, **options)


def teacher(j, values=None):
  return j.teachers.frozen(j.types.Model(network(j, 7), variables() if values is None else values))


TOKENS = np.arange(16 * 5).reshape(16, 5) % 9


def windows(tokens=TOKENS[:, :-1], labels=TOKENS[:, 1:], **options):
  """Examples of tokens as a user has them, with whatever else stands beside these."""
  beside = {name: options.pop(name) for name in ("segments", "positions") if name in options}
  inputs = {"tokens": tokens, **beside}
  return lambda j: j.data.from_arrays(inputs, labels, **{"num_classes": 9, **options})


def of_words(words=9, objective=None, **options):
  """What `fit` takes of a language model, with a teacher of so many words."""

  def make(j):
    student = j.networks.linen(Words(), features=["mid"])
    other = j.networks.linen(Words(words), features=["mid"])
    made = j.types.Model(other, other.init(jax.random.key(0), TOKENS[:1]))
    read = {"tokenizer": options.get("tokenizer")}
    examples = j.data.from_arrays(TOKENS[:, :-1], TOKENS[:, 1:], num_classes=9)
    if read["tokenizer"] is not None:
      read["tokenizer"] = read["tokenizer"](j)
      examples = dataclasses.replace(examples, tokenizer=j.data.tokenizers.utf8().digest)
    given = {
      "student": student,
      "objective": j.recipes.kd() if objective is None else objective(j),
      "data": j.data.on_device(examples, batch_size=8, data_seed=0),
      "teacher": j.teachers.frozen(made, **read),
    }
    return given | {n: value for n, value in options.items() if n != "tokenizer"}

  return make


def fit(j, folder=None, *, student=None, objective=None, devices=2, hyper=None, **options):
  options = {"data": source(j), "optimizer": optax.adam(1e-2), "steps": 2, **options}
  options.setdefault("teacher", teacher(j, options.pop("taught", None)))
  if "transform" in options:
    options["data"] = j.data.transformed(options["data"], options.pop("transform"))
  options.setdefault("dispatch", j.train.with_jit(j.train.data_parallel(jax.devices()[:devices])))
  student = network(j) if student is None else student
  objective = j.recipes.kd() if objective is None else objective
  if hyper is not None:
    objective = j.types.as_objective(objective, **hyper)
  return small_networks.fit(student, objective, room=j.train, folder=folder, **options)


def sharded(j, rules=None, *, teacher=None):
  """A fit whose networks are cut by these rules over two devices."""
  return fit(j, dispatch=j.train.with_jit(sharding=rules, teacher_sharding=teacher))


def check(call, error, message):
  """The call raises this, and from a line of the package."""
  with pytest.raises(error, match=message) as caught:
    call()
  place = pathlib.Path(traceback.extract_tb(caught.value.__traceback__)[-1].filename)
  assert "jaxdistill" in place.parts, f"raised by {place}"
  assert "site-packages" not in place.parts


def term(values=None, **fields):
  """An objective of one term."""
  make = (lambda s: s.logits[:, 0] ** 2) if values is None else values
  return lambda j: lambda s, t, b: {"a": j.types.Term(make(s), **fields)}


def told(**options):
  return lambda j: options


STACKED = jax.tree.map(lambda leaf: leaf[None], variables())
BAD = jax.tree.map(lambda leaf: leaf * NAN, variables())
OTHER = {"params": {"other": jnp.zeros(3)}}
KERNEL = {"params": {"Dense_0": {"kernel": jnp.zeros((4, 9))}}}
HALF = {"temperature": lambda step: 4.0 if step < 2 else 2.0}


def term_of(values):
  """An objective of one term, of the student's logits."""
  return lambda j: {"objective": lambda s, t, b: {"a": j.types.Term(values(s.logits))}}


def update_of(made):
  """An optimiser whose update gives this of the gradient."""
  return optax.GradientTransformation(lambda params: (), lambda g, state, params=None: made(g))


FIT = [
  # the networks
  (lambda j: {"student": network(j, 5, 4)}, "4 classes.* and the teacher 3"),
  (lambda j: {"student": Net()}, r"student must be a Network.*networks\.linen"),
  (lambda j: {"student": nnx.Linear(4, 3, rngs=nnx.Rngs(0))}, r"networks\.nnx"),
  (lambda j: {"student": network(j, features=["gone"])}, "'gone': nothing of that name"),
  (lambda j: {"objective": j.recipes.hint("gone", "mid")}, "student_layer='gone' is not among"),
  (lambda j: {"objective": j.recipes.hint("mid", "gone")}, "teacher_layer='gone' is not among"),
  (lambda j: {"objective": unprojected(j)}, "differ in width.*use a projector"),
  (lambda j: {"teacher": network(j, 7)}, r"teachers\.frozen\(Model\(network, variables\)\)"),
  (lambda j: {"teacher": model(j)}, r"teachers\.frozen\(model\)"),
  (told(teacher=Net(7)), r"must be a Teacher: give networks\.linen"),
  (told(teacher=lambda v, b: b.labels), r"must be a Teacher: .*Teacher\(variables, apply\)"),
  (told(teacher=None), "teacher is None"),
  (told(taught={}), r"does not run with its variables \(none\)"),
  (told(taught=variables(9)), "does not run with its variables"),
  (told(taught=OTHER), r"params/other \(3,\)"),
  (told(taught=STACKED), r"one of fitted\.unstack\(\)"),
  (told(taught="runs/teacher"), "teacher.variables is no array"),
  (told(taught=BAD), r"\['kernel'\] holds NaN|\['bias'\] holds NaN"),
  (
    lambda j: {"teacher": j.types.Teacher({}, lambda v, b: b.labels)},
    "teacher must return Outputs",
  ),
  (lambda j: {"student": model(j, KERNEL)}, r"start has \(4, 9\) at"),
  (lambda j: {"student": model(j, "runs/first")}, "student.variables is no array"),
  (lambda j: {"student": model(j, STACKED, seeds=1), "seed": (0, 1)}, "1 seeds, and seed has 2"),
  (lambda j: moving(j, lambda step: -1.0), r"decay at step 0 must be in \[0, 1\]"),
  (lambda j: moving(j, lambda step: NAN), "decay at step 0 must be in"),
  (lambda j: moving(j, lambda step: 0.9 if step < 2 else 0.99), "decay cannot be compiled"),
  # the objective
  (told(objective="kd"), "objective must be a function"),
  (lambda j: {"objective": j.recipes.kd}, r"Call a recipe, recipes\.kd\(\)"),
  (lambda j: {"objective": [j.recipes.kd()]}, r"recipes\.combine"),
  (told(objective=lambda s, t, b: None), "must return {name: Term}.*got None"),
  (told(objective=lambda s, t, b: {}), "with a term in it"),
  (told(objective=lambda s, t, b: {"a": s.logits}), "term 'a' is an array.*must be a Term"),
  (term_of(lambda x: x.argmax(axis=1)), "no term of the objective has a gradient"),
  (term_of(lambda x: x[:, 0] > 0), "no term of the objective has a gradient"),
  (term_of(jax.lax.stop_gradient), "no term of the objective has a gradient"),
  (told(optimizer=update_of(lambda g: None)), "update gives None; it must give"),
  (told(optimizer=update_of(lambda g: (None, ()))), "None as the updates"),
  (told(optimizer=update_of(lambda g: (jax.tree.map(jnp.mean, g), ()))), r"update gives \[\] for"),
  (lambda j: {"objective": term(lambda s: jnp.mean(s.logits))(j)}, r"values of shape \(\)"),
  (lambda j: {"objective": term(weight=jnp.ones(8))(j)}, "it must be one number"),
  (lambda j: {"objective": term(weight="1")(j)}, "it must be one number"),
  (lambda j: {"objective": forgetful(j)}, "the objective's state must keep its structure"),
  (told(hyper={"temprature": 2.0}), r"hyper has \['temprature'\]"),
  (told(hyper={"temperature": 0.0}), "temperature must be positive, got 0.0"),
  (told(hyper={"temperature": -1.0}), "temperature must be positive, got -1.0"),
  (told(hyper={"temperature": NAN}), "temperature must be .*finite"),
  (told(hyper={"temperature": ONE}), r"temperature must be positive: one number.*\(8,\)"),
  (told(hyper={"temperature": "4"}), "temperature must be finite: one number, got '4'"),
  (told(hyper={"temperature": optax.linear_schedule(1.0, -1.0, 2)}), "must be positive, got"),
  (told(hyper=HALF), "cannot be compiled"),
  (told(hyper={"soft_weight": -1.0}), "soft_weight must be at least 0, got -1.0"),
  (lambda j: of_numbers(j), r"labels are of shape \(8,\) beside outputs of \(8, 3\)"),
  # the data
  (told(data=[X, Y]), r"data must be a Source.*data\.on_device"),
  (lambda j: {"data": j.data.from_arrays(X, Y)}, "data must be a Source"),
  (told(data=[]), "0 sources for 1 seeds"),
  (lambda j: {"data": source(j, batch_size=9)}, "batch_size=9 does not divide by the 2 devices"),
  (lambda j: {"data": source(j, normalize=lambda x: x[..., :3])}, r"float32\[8, 3\] once normali"),
  (lambda j: {"student": network(j, 5, 2), "teacher": None}, "labels of 3 classes.*puts out 2"),
  (
    lambda j: {"data": source(j, labelled=np.zeros(16)), "objective": j.recipes.labels()},
    "no label that may be used",
  ),
  # tokens
  (of_words(11), r"vocabulary of 9 and the teacher one of 11.*teachers\.vocabulary\(teacher, 9\)"),
  (of_words(tokenizer=lambda j: j.data.tokenizers.characters("abc")), "teacher reads tokens of"),
  (of_words(tokens_at_once=0), "tokens_at_once=0"),
  (of_words(tokens_at_once=7), "tokens_at_once=7 is below the 8 examples"),
  (of_words(tokens_at_once=2.5), "tokens_at_once=2.5"),
  (of_words(tokens_at_once=8, objective=lambda j: j.recipes.dist()), "has the axis 'classes'"),
  (
    of_words(tokens_at_once=8, objective=lambda j: j.recipes.hint("mid", "mid")),
    r"outside, recipes\.combine",
  ),
  # numbers and functions
  *[(told(steps=n), "steps=") for n in (0, -3, 4.0, None, "4", True, 2**31)],
  *[(told(seed=s), "seed") for s in (-1, 1.5, None, "a", (1, 1), (), 2**40, {1, 2}, [1, 2.5])],
  *[
    (told(**{f"{name}_every": 0}), f"{name}_every=0") for name in ("log", "validate", "checkpoint")
  ],
  (told(log_every=2.0), "log_every=2.0 must be an integer"),
  (told(keep_last=0), "keep_last=0"),
  *[(told(accumulate=n), f"accumulate={n}") for n in (0, 3, 2.0)],
  *[(told(average=a), "average") for a in (1.0, -0.1, NAN, "0.9")],
  (lambda j: {"dispatch": j.train.with_jit(seeds_by="pmap")}, "seeds_by='pmap'"),
  (lambda j: {"dispatch": j.train.with_pmap(scan="yes")}, "scan='yes' must be True or False"),
  (told(select="nll"), "validate is None"),
  (told(validate={"accuracy": 1}), r"validate must be a function.*evaluation\.validator"),
  (told(validate=lambda: {}), "validate must be a function"),
  (told(callback=3), "callback must be a function"),
  (lambda j: {"transform": j.data.transforms.mixup}, "transform must be a function"),
  (told(transform=lambda key, batch: None), "transform must return a Batch"),
  (told(config=[1]), "config must be a mapping"),
  (told(optimizer=0.1), "optimizer must be an optax optimiser"),
  (told(optimizer=optax.adam), r"call it: optax\.adam"),
  (lambda j: {"dispatch": j.train.with_jit}, "dispatch must be what"),
]


def of_numbers(j):
  """A regression of three outputs, and one number an example."""
  numbers = j.data.on_device(j.data.from_arrays(X, Y / 2), batch_size=8, data_seed=0)
  return {"data": numbers, "objective": j.recipes.regression(soft_weight=None), "teacher": None}


def moving(j, decay):
  """A teacher that is an average of its student, by a schedule."""
  return {"teacher": j.teachers.moving_average(decay), "objective": j.recipes.mean_teacher()}


def model(j, values=None, **options):
  return j.types.Model(network(j), variables() if values is None else values, **options)


def unprojected(j):
  mids = lambda s, t: j.losses.hint_l2(s.features["mid"], t.features["mid"])  # noqa: E731
  return lambda s, t, b: {"hint": j.types.Term(mids(s, t))}


def forgetful(j):
  """An objective whose state changes its structure."""
  apply = lambda p, state, s, t, b, *, key: (term()(j)(s, t, b), {"new": s.logits})  # noqa: E731
  return j.types.Objective(init=lambda key, s, t: ({}, {}), apply=apply)


@pytest.mark.parametrize(("make", "message"), FIT)
def test_fit_refuses_before_it_claims_a_folder(j, tmp_path, make, message):
  check(lambda: fit(j, tmp_path / "run", **make(j)), Wrong, message)
  assert not (tmp_path / "run").exists()


def arrays(inputs=X, labels=Y, **options):
  return lambda j: j.data.from_arrays(inputs, labels, **options)


def weightless(j):
  return arrays(weight=np.zeros(16))(j)


def streams(rows, limit=None, **fields):
  return lambda j: j.data.from_dicts(rows, j.data.Fields(**fields), limit=limit)


DATA = [
  (arrays(labels=Y.astype(str)), "labels is text, namely '0': pass label_names="),
  (arrays(labels=np.where(Y == 1, np.nan, Y)), "not finite in row .*ignore="),
  (arrays(labels=Y[:5]), "labels must have the 16 examples"),
  (arrays(labels=Y, weight=-np.ones(16)), "weight of .*not negative"),
  (arrays(labels=Y, weight=np.ones((16, 2))), "weight of .*leading axes"),
  (arrays(labels=Y - 1), "must lie in 0 .. 1 .*row 0 has -1"),
  (arrays(num_classes=2), "row 2 has 2"),
  (arrays(labels=Y + 2**40), "num_classes=1099511627779 must be in"),
  (arrays(num_classes=3.0), "num_classes=3.0 must be an integer"),
  (arrays(X[:0], Y[:0]), "must hold at least one example"),
  (arrays(X[:, :0]), "must hold a number at least of each example"),
  (arrays(X.astype("M8[s]")), "must be real numbers"),
  (arrays(np.zeros(16, [("a", "f4")])), "must be real numbers"),
  (arrays(np.ma.array(X, mask=X == 0)), "inputs has 64 masked numbers"),
  (arrays(labels=np.ma.array(Y, mask=Y == 1)), "labels has 5 masked numbers"),
  (arrays(weight=np.ma.array(Y, mask=Y == 1)), "weight of 'arrays' has 5 masked"),
  (arrays(weight=np.full(16, 1e-300)), "1e-300, which is 0 to a device"),
  (arrays({1: X, "1": X}), "inputs has the key 1, which must be a text"),
  (arrays(label_names=["a", "a", "b"]), "no two the same"),
  (arrays(label_names="abc"), "label_names='abc' must be texts"),
  (arrays(label_names={"a", "b", "c"}), "must be texts in the order"),
  (arrays(label_names=3), "label_names=3 must be texts"),
  (arrays(name=3), "name=3 must be a text"),
  (arrays(X * NAN), "hold NaN in 16 of 16 rows"),
  (arrays(X.astype(complex)), "must be real numbers"),
  (arrays(np.array([object()] * 16)), "must be real numbers"),
  *[(lambda j, b=b: source(j, batch_size=b), "batch_size=") for b in (0, -1, 17, 8.0, None, "8")],
  *[(lambda j, s=s: source(j, data_seed=s), "data_seed") for s in (-1, 1.5, 2**32, None)],
  (lambda j: source(j, views=1.5), "views=1.5 must be an integer"),
  (lambda j: source(j, augmentation="crop"), "augmentation='crop' must be an Augmentation"),
  (lambda j: source(j, normalize="cifar"), "normalize must be"),
  (lambda j: source(j, normalize=((0.0,), (0.0,))), "one positive std"),
  (lambda j: source(j, normalize=((NAN,), (1.0,))), "needs one mean"),
  (lambda j: source(j, labelled=np.ones(3)), "labelled must be 16 zeros and ones"),
  *[
    (lambda j, m=m: getattr(j.data, m)(weightless(j), batch_size=8, data_seed=0), "0 for all 16")
    for m in ("on_device", "streamed")
  ],
  (lambda j: j.data.on_device((X, Y), batch_size=8, data_seed=0), "on_device needs Examples"),
  (lambda j: j.data.streamed(X, batch_size=8, data_seed=0), "streamed needs Examples"),
  (lambda j: source(j).items(1.5, 1), "step=1.5 must be an integer"),
  (lambda j: dataclasses.replace(source(j), batch_size=0), "batch_size=0 must lie in"),
  (streams(3), "needs an iterable of dicts"),
  (streams([]), "gave no rows"),
  (
    lambda j: j.data.from_dicts([{"image": [0.0]}], "image"),
    r"fields='image' must be data\.Fields",
  ),
  (streams([{"image": [0.0], "label": "cat"}]), "pass label_names="),
  (streams([{"image": [0.0], "label": "a"}], label_names="ab"), "label_names='ab' must be texts"),
  (streams([{"image": [0.0], "label": 0}], limit=1.5), "limit=1.5 must be an integer"),
  (streams([{"image": [0.0], "label": 0}], inputs=3), "row 0 of 'rows' has no '3'"),
  (streams([{"image": [0.0], "label": 0}], transform=3), "transform must be a function"),
  (lambda j: j.data.mixed(source(j), source(j), share="a"), "share=a must lie between"),
  (lambda j: j.data.mixed(source(j), source(j), share=NAN), "share=nan must lie between"),
  (lambda j: j.data.some_labels(arrays()(j), "5%", data_seed=0), "share must be in"),
  (lambda j: j.data.load("digitz", "train"), "Did you mean 'digits'"),
  (lambda j: j.data.load(None, "train"), "name=None must be a data set's name"),
  (lambda j: j.data.load("digits", cache=None), "cache=None must be True .* False or a folder"),
  (lambda j: j.data.load("digits", cache=""), "cache='' must be True"),
  (lambda j: j.data.load("digits/none", "train"), "name='digits/none' is none of TFDS's"),
  (lambda j: j.data.load("digits", "train[0:0]"), "is empty"),
  (lambda j: j.data.load("digits", "valid"), "is not a split"),
  (lambda j: j.data.evaluation_batches(arrays()(j), batch_size=2.5), "batch_size=2.5 must be"),
  (lambda j: j.data.divide_by(0), "largest must be positive"),
  (lambda j: j.data.crop(1.5), "padding=1.5 must be an integer"),
  (lambda j: j.types.make_batch(X, Y[:3]), "must have one batch axis"),
  # tokens
  (lambda j: j.data.shifted(TOKENS[:, :1]), "the last of L . 1 tokens is predicted alone"),
  (lambda j: j.data.shifted(TOKENS / 2), "tokens=.* must be an array of integers"),
  (lambda j: j.data.shifted(TOKENS, vocabulary=8), r"tokens\[1\] has the token 8 at position 3"),
  (lambda j: j.data.shifted(TOKENS - 1), r"tokens\[0\] has the token -1 at position 0"),
  (lambda j: j.data.shifted(TOKENS + 2**40), r"tokens\[0\] has the token 1099511627776"),
  (lambda j: j.data.shifted(TOKENS, vocabulary=0), "vocabulary=0"),
  (
    lambda j: j.data.shifted(TOKENS, where=-TOKENS),
    r"where\[0\] must be finite.* -1.0 at position 1",
  ),
  (lambda j: j.data.shifted(TOKENS, where=TOKENS * NAN), r"where\[0\] must be finite"),
  (lambda j: j.data.pack([TOKENS[0], TOKENS[0, :1]], length=4), r"documents\[1\] has 1 tokens"),
  (lambda j: j.data.pack(None, length=4), "documents=None must be a sequence"),
  (lambda j: j.data.pack("abc", length=4), "documents='abc' must be a sequence"),
  (lambda j: j.data.pack([[1, [2, 3]]], length=4), r"documents\[0\]=.* must be integers"),
  (lambda j: j.data.pack([TOKENS[0]], length=4, where=3), "where=3 must be a sequence"),
  (lambda j: j.data.shifted(TOKENS, where=[["a"] * 5] * 16), "where=.* must be numbers"),
  (lambda j: j.data.tokenizers.utf8().decode([104, 300]), "token 300 at position 1"),
  (lambda j: j.data.tokenizers.utf8().encode("a\ud800"), "at 1, half of a character"),
  (lambda j: j.data.tokenizers.utf8().decode(np.array([300])), "token 300"),
  (lambda j: j.data.tokenizers.characters("abc").decode([-1]), "token -1"),
  (lambda j: j.data.tokenizers.characters("abc").decode([0.5]), "must be integers"),
  (
    lambda j: j.data.from_text(__file__, j.data.tokenizers.utf8(), length=4),
    "is the name of a file",
  ),
  (lambda j: j.data.from_text("a", j.data.tokenizers.utf8(), length=4), r"texts\[0\] has 1 tokens"),
  (windows(labels=TOKENS), r"labels .* 5 positions and tokens 4: .*data\.shifted"),
  (windows(TOKENS), r"labels .* 4 positions and tokens 5: .*data\.shifted"),
  (lambda j: j.data.from_arrays(TOKENS, TOKENS[:, 1:]), "4 positions and tokens 5"),
  (windows(TOKENS[:, 1:] / 2), "'tokens' of 'arrays' must be integers"),
  (windows(TOKENS[:, 1:] - 1), "'tokens' of 'arrays' have -1 in row 1 at position 3"),
  (windows(TOKENS[:, 1:] + 2**40), "in row 0 at position 0, which int32 does not hold"),
  (windows(labels=TOKENS[:, 1:] + 1), "row 1 has 9 at position 2"),
  (windows(labels=TOKENS[:, 1:] - 1), "row 1 has -1 at position 3"),
  (windows(segments=np.tile([1, 2, 1, 0], (16, 1))), "'segments' .* 1 in row 0 at position 2"),
  (windows(segments=np.ones((16, 5), int)), r"'segments' .* must be integers \[16, 4\]"),
  (windows(positions=np.full((16, 4), -1)), "'positions' .* -1 in row 0"),
  (windows(weight=-np.ones((16, 4))), "weight of .*not negative"),
  (windows(weight=np.full((16, 4), NAN)), "weight of .*finite"),
]


@pytest.mark.parametrize(("call", "message"), DATA)
def test_data_refuses(j, call, message):
  check(lambda: call(j), Wrong, message)


def evaluated(j, values, seeds=None, classes=3, **options):
  examples = j.data.from_arrays(X, Y % classes if classes == 3 else Y + 2)
  batches = j.data.evaluation_batches(examples, batch_size=8)
  made = j.types.Model(network(j, 7), values, seeds)
  return j.evaluation.evaluate(made, batches, **options)


def labelled(j):
  return j.data.evaluation_batches(arrays()(j), batch_size=8)


def unlabelled(j):
  return j.data.evaluation_batches(j.data.from_arrays(X, None), batch_size=8)


def both(j):
  return j.recipes.combine(j.recipes.kd(), j.recipes.hint("mid", "mid"))


def of_four(j):
  """A teacher that puts out a number more than `variables` do."""
  four = begun(7, 4)
  return j.teachers.frozen(j.types.Model(network(j, 7, 4), {"params": dict(four["params"])}))


def compared(j):
  """Three numbers beside the teacher's four, in a task that does not say what fits."""
  compare = lambda s, t, b: {"a": (jnp.sum(s.logits - t.logits), 1.0)}  # noqa: E731
  task = dataclasses.replace(own_task(j, lambda o, b: {}), compared=compare)
  return evaluated(j, variables(), teacher=of_four(j), task=task)


def own_task(j, sums):
  tasks = j.evaluation.tasks
  return tasks.Task("mine", {"a": tasks.Metric("lower")}, sums)


def made_of(j, **functions):
  """What a user's task makes of sums and rows."""
  tasks, rows = j.evaluation.tasks, {"b": np.ones(2)}
  task = dataclasses.replace(
    own_task(j, lambda o, b: {}),
    **{"each": lambda o, b: {}, "of_all": lambda rows, theirs: {}, **functions},
  )
  return tasks.finished(task, {"a": (np.ones(()), np.ones(()))}, rows, None)


def named(j, name):
  metrics = {name: j.evaluation.tasks.Metric("lower")}
  return j.evaluation.tasks.Task("mine", metrics, lambda o, b: {})


def twice(j):
  """A number alone, and one beside the teacher, of one name."""
  alone = lambda o, b: {"a": (jnp.sum(b.weight), 1.0)}  # noqa: E731
  task = dataclasses.replace(own_task(j, alone), compared=lambda s, t, b: alone(s, b))
  return evaluated(j, variables(), teacher=teacher(j), task=task)


def of_task(j, task):
  return evaluated(j, variables(), task=task)


def circular():
  """A config that holds itself."""
  config = {"rate": 1}
  config["all"] = config
  return config


def with_layers(j, layers):
  return j.networks.models.with_layers({"params": {}}, small_decoder(j), layers)


S = jax.ShapeDtypeStruct((2, 3), jnp.float32)
A = np.zeros((4, 3), np.float32)
PARTS = [
  (lambda j: j.networks.linen(nnx.Linear(4, 3, rngs=nnx.Rngs(0))), "must be a Linen module"),
  (lambda j: j.networks.linen(Net), "make one, module"),
  (lambda j: j.networks.linen(network(j)), "must be a Linen module"),
  (lambda j: j.networks.nnx(Net()), r"use networks\.linen"),
  (lambda j: network(j, features=[3]), "name a path"),
  (lambda j: network(j, train_flag=True), "train_flag=True must be"),
  (lambda j: network(j).apply(STACKED, X, train=False), "the variables, or the inputs, do not fit"),
  (lambda j: j.networks.mixed_precision(Net()), "network must be a Network"),
  (lambda j: j.networks.cohort([network(j)] * 2), "must be two or more by name"),
  (lambda j: j.networks.cohort({"a": Net(), "b": Net()}), "must be a Network"),
  (lambda j: j.networks.members(model(j)), r"must be the model of a networks\.cohort"),
  (lambda j: j.recipes.dml(mutual_weight=-1.0), "mutual_weight must be at least 0"),
  (lambda j: j.recipes.each("kd"), "objective must be a function"),
  (lambda j: j.recipes.mean_teacher(warmup_steps=1.5), "warmup_steps=1.5"),
  (lambda j: j.networks.mixed_precision(network(j), compute="bf16"), "must be a floating dtype"),
  *[
    (lambda j, t=t: j.recipes.kd(temperature=t), "temperature")
    for t in (0, -1.0, NAN, ONE, "4", 10**400)
  ],
  (lambda j: j.recipes.kd(soft_weight=-1.0), "soft_weight must be at least 0"),
  *[
    (lambda j, n=n: j.types.as_objective(both(j), **{n: -1.0}), f"{n} must be")
    for n in ("temperature", "hint_weight")
  ],
  (lambda j: j.recipes.labels(label_smoothing=2.0), r"label_smoothing must be in \[0, 1\]"),
  (lambda j: j.recipes.hint("mid", 0), "teacher_layer=0 must be"),
  (lambda j: j.recipes.hint("mid", "mid", loss=None), "loss must be a function"),
  (lambda j: j.recipes.combine(), "at least one objective"),
  (lambda j: j.losses.soft_target_kl(A, A, temperature=jnp.ones(4)), "temperature must be"),
  (lambda j: j.losses.soft_target_kl(A, A, temperature=None), "temperature must be"),
  (lambda j: j.losses.soft_target_kl(A, A[:, :2]), "must have one shape"),
  (lambda j: j.losses.cross_entropy(A, np.zeros(4)), "labels must be integers"),
  (
    lambda j: j.recipes.projectors.between(S, jax.ShapeDtypeStruct((2, 4, 4, 3), jnp.float32)),
    "projector",
  ),
  (lambda j: j.train.optimizers.sgd(NAN, steps=4), "learning_rate=nan"),
  (lambda j: j.train.optimizers.adamw("0.1", steps=4), "learning_rate='0.1'"),
  (lambda j: j.train.optimizers.sgd(0.1, steps=0), "steps=0"),
  (lambda j: j.train.optimizers.dot(0.1, steps=4, delta=NAN), "delta=nan"),
  (lambda j: j.train.optimizers.dot(0.1, steps=4, apart="labels"), "apart="),
  (lambda j: j.data.transforms.mixup(0), "num_classes=0"),
  (lambda j: j.data.transforms.mixup(3, concentration=None), "concentration=None must be"),
  (lambda j: j.data.transforms.smooth_labels(3, amount="a"), "amount=a must be"),
  (lambda j: j.train.data_parallel([]), "devices is empty"),
  (lambda j: j.train.data_parallel(2), "devices=2 must be devices"),
  (lambda j: j.train.data_parallel(jax.devices()[:1] * 2), "more than once"),
  (lambda j: j.train.with_jit(jax.make_mesh((2,), ("x",))), r"use train\.data_parallel\(\)"),
  (lambda j: j.train.mesh(model=3), "are of 0 devices, and there are 2"),
  (lambda j: j.train.mesh(model=0), "model=0 must be at least 1"),
  (lambda j: j.train.with_jit(sharding="fsdp"), "sharding must be train.fsdp"),
  (lambda j: j.train.with_jit(teacher_sharding={"(": None}), "teacher_sharding must be train.fsdp"),
  (lambda j: j.train.with_jit(batch_axes="model"), "batch_axes='model' must be axes of the mesh"),
  (lambda j: j.train.fsdp(None), "axis=None must name an axis of the mesh"),
  (lambda j: j.train.annotated(["embed"]), "names=.* must say what becomes of a module's names"),
  (lambda j: j.train.shardings({"a": X}, j.train.mesh(), {"b": None}), "rules must be train.fsdp"),
  (lambda j: j.train.annotated(None), "names=None must say what becomes"),
  (lambda j: j.train.with_jit(batch_axes=3), "batch_axes=3 must be axes of the mesh"),
  (lambda j: j.train.Run("r", outputs=[3]), r"outputs=\[3\] must be 'logits' and names"),
  (lambda j: j.train.Run("r", trackers=[j.runs.CSV(), j.runs.CSV()]), "CSV more than once"),
  (lambda j: j.runs.claim("a\0b", {}), "holds the character 0"),
  (lambda j: j.runs.claim("\ud800", {}), "has a character that no file's name can have"),
  (lambda j: j.train.Run("n" * 300), "is too long: a name has 300 characters"),
  (lambda j: j.train.Run("/".join(["n" * 200] * 30)), "is too long"),
  (lambda j: j.train.Run("r", config=circular()), "config cannot be kept as JSON: .* holds itself"),
  (lambda j: j.runs.claim("r", {"a": circular()}), "holds itself, or is nested too deeply"),
  (lambda j: j.train.Run("r", config={1: 0, "1": 1}), "two keys that are one in JSON"),
  (
    lambda j: j.networks.models.with_layers(model(j), small_decoder(j), [0]),
    "variables=.* must be",
  ),
  (lambda j: with_layers(j, None), "layers=None must be the numbers of layers"),
  (lambda j: with_layers(j, [0.5]), "layers=0.5 must be an integer"),
  (lambda j: j.networks.sample(model(j), [[1]], key=0, length=1), "key=0 must be one random key"),
  (
    lambda j: j.reports.Texts(j.data.tokenizers.utf8(), decoders={"pupil": 3}),
    "decoders=.* must be",
  ),
  (lambda j: j.evaluation.tasks.multilabel(threshold=2.0), "positive and at most 1, got 2.0"),
  (lambda j: j.evaluation.tasks.dense(boundary=[1]), r"boundary=\[1\] must be an integer"),
  (lambda j: j.evaluation.tasks.tokens(top_mass=3), "top_mass=3 must be a sequence"),
  (lambda j: j.evaluation.tasks.regression(variance="no"), "variance='no' must be True"),
  (lambda j: j.evaluation.tasks.embedding(["h"]), "feature=.* must be a feature's name"),
  (lambda j: j.evaluation.tasks.retrieval("h", "h"), "are one tower"),
  (lambda j: of_task(j, j.evaluation.tasks.dense()), r"logits are \[8, 3\].*classification\(\)"),
  (
    lambda j: of_task(j, own_task(j, lambda o, b: 1 / 0)),
    "sums of the task 'mine' fails on outputs",
  ),
  (lambda j: of_task(j, own_task(j, lambda o, b: {"a": o.logits})), "must give {name: .sum, count"),
  (lambda j: own_task(j, lambda o: {}), "sums of the task 'mine' must be a function"),
  *[
    (lambda j, f=f: made_of(j, finish=f), "finish of the task 'mine' fails on .'a'")
    for f in (lambda sums: 1 / 0, lambda sums: None, lambda sums: {"a": "b"})
  ],
  (lambda j: made_of(j, of_all=lambda rows, theirs: {"a": 1}), r"gives \['a'\], which is given"),
  (lambda j: named(j, "bytes"), "has the metric 'bytes'.*none of what a report says"),
  (lambda j: named(j, 3), "has the metric 3, which must be a text"),
  (lambda j: twice(j), r"compared of the task 'mine' gives \['a'\], which is given already"),
  (
    lambda j: j.search.affordable({"a": network(j)}, j.search.Budget(bytes=9**9), None),
    "data=None",
  ),
  (lambda j: sharded(j, {"Dense_1/bias": jax.P("data")}), r"bias \[3\].*axis 0 of 3.*divide by 2"),
  (lambda j: sharded(j, {"Dense_9": jax.P("data")}), "'Dense_9', which matches no variable"),
  (lambda j: sharded(j, j.train.fsdp()), "'fsdp', which is no axis of the mesh"),
  (lambda j: sharded(j, teacher=j.train.fsdp("x")), "'x', which is no axis of the mesh"),
  (lambda j: sharded(j, lambda v, mesh: {}[v.path]), "fails on params/Dense_0/bias .*KeyError"),
  (lambda j: sharded(j, lambda v: None), r"must be a function \(variable, mesh\)"),
  (lambda j: sharded(j, {"kernel": lambda v: None}), r"of 'kernel' must be a function"),
  (lambda j: j.train.shardings({"a": X}, None, j.train.fsdp()), "mesh=None must be a mesh"),
  (lambda j: j.teachers.frozen(model(j), dtype="words"), "dtype='words' must be of real numbers"),
  (lambda j: j.teachers.frozen(model(j), dtype=jnp.int8), "dtype=.*int8.* must be of real numbers"),
  (lambda j: evaluated(j, OTHER), "do not fit the network"),
  (lambda j: evaluated(j, variables(), seeds=7), "with seeds=7"),
  (lambda j: evaluated(j, STACKED), "with seeds=None"),
  (lambda j: evaluated(j, variables(), teacher=model(j)), "must be a Teacher"),
  (lambda j: evaluated(j, variables(), teacher=of_four(j)), "3 classes and the teacher 4"),
  (compared, r"outputs .*\(8, 3\)}, of the teacher .*\(8, 4\)}"),
  (lambda j: j.evaluation.evaluate(network(j), source(j)), "batches must be"),
  (lambda j: j.evaluation.costs(network(j), source(j)), "must be a Model"),
  (lambda j: evaluated(j, variables(), classes=5), "have the label 4"),
  (lambda j: j.evaluation.validator(source(j)), "batches must be"),
  (
    lambda j: j.evaluation.validator(jax.tree.map(lambda x: x[:0], labelled(j))),
    "batches hold no batch",
  ),
  (lambda j: program(j, variables())(np.full((2, 4), 1e300)), "infinite in float32"),
  (lambda j: program(j, variables())(np.ma.array(X, mask=X == 0)), "64 masked numbers"),
  (lambda j: j.reports.Texts("utf8"), "tokenizer='utf8' must be one of data.tokenizers"),
  (lambda j: j.networks.sample(network(j), [[1]], key=None, length=1), "must be a Model of one"),
  (lambda j: jax.jit(lambda x: fit(j) and x)(1.0), "call it outside of jit"),
  (lambda j: j.train.Run("gs://bucket/run"), "folder='gs://bucket/run' is an address"),
  (lambda j: fit(j, pathlib.Path("s3://bucket/run")), "is an address"),
  (lambda j: j.teachers.restore("hdfs://host/run", network(j)), "is an address"),
  (lambda j: j.runs.claim("https://host/run", {}), "is an address"),
  (lambda j: j.search.Choice(unlabelled(j)), "no example of validation has a label"),
  (lambda j: j.search.Choice(labelled(j), test=unlabelled(j)), "no example of test has a label"),
  (lambda j: j.evaluation.validator(unlabelled(j)), "no example of batches has a label"),
]


TEACHERS = [
  (lambda j: j.teachers.frozen(None), "model=None must be a Model"),
  (lambda j: j.teachers.frozen(network(j)), r"must be a Model.*Model\(network, variables\)"),
  (lambda j: j.teachers.frozen(model(j, STACKED, seeds=2)), r"one of model\.unstack\(\)"),
  (lambda j: j.teachers.subset(Net(), [0]), "teacher=Net.* must be a Model"),
  (lambda j: j.teachers.ensemble([None]), r"members\[0\]=None must be a Model"),
  (lambda j: j.teachers.ensemble(model(j)), "is empty or no sequence"),
  (lambda j: j.teachers.grouped(model(j), None), "groups=None must be the group of each"),
  (lambda j: j.teachers.layers(None, {"a": "b"}), "variables=None must be the collections"),
  (lambda j: j.teachers.layers({"params": {}}, ["a"]), r"pairs=\['a'\] must be"),
  (lambda j: j.teachers.layers({"params": {}}, {"a": 1}), "pairs=.* must be"),
  (lambda j: model(j, STACKED, seeds=1)(X), "call one of"),
  (lambda j: j.teachers.restore(None, network(j)), "run=None must be a path"),
  (lambda j: j.teachers.moving_average(NAN), "decay"),
  (lambda j: j.teachers.moving_average(None), "decay"),
  (lambda j: j.teachers.ensemble([j.teachers.moving_average()]), "is made of nothing yet"),
  (lambda j: j.teachers.restore("runs/teacher", None), "network=None must be a Network"),
  (lambda j: j.teachers.frozen(model(j), tokenizer="utf8"), "tokenizer='utf8' must be one of"),
  (lambda j: j.teachers.frozen(model(j), dtype=np.float64), "dtype=float64 is made float32"),
  (lambda j: foreign(j, {"logits": A[:2], "where": np.array([NAN, 1])}), "where must be 0 or 1"),
  (lambda j: foreign(j, np.full((2, 3), 1e300)), "a number that float32 has not"),
  (lambda j: foreign(j, [[1.0], [1.0, 2.0]]), "logits are no array"),
  (lambda j: foreign(j, np.ma.array(A[:2], mask=A[:2] == 0)), "logits have masked numbers"),
  (lambda j: born_again(j, "kd"), "objective must be a function"),
  (lambda j: born_again(j, []), "objective must be a function"),
  (lambda j: born_again(j, j.recipes.hint("gone", "mid")), "'gone' is not among"),
  (lambda j: born_again(j, student=model(j)), "student=.* must be a Network"),
  (lambda j: born_again(j, seed=2**32 - 1), "beyond 2.*32 - 1"),
  (lambda j: born_again(j, data=views(j), seed=(0, 1)), "views that come again"),
  (lambda j: j.teachers.vocabulary(model(j), 0), "size=0"),
  (lambda j: j.teachers.vocabulary(network(j), 3), "teacher=.* must be a Model"),
  (
    lambda j: j.teachers.vocabulary(model(j), 2, tokenizer=j.data.tokenizers.utf8()),
    "size=2 is below the 256 tokens",
  ),
]


def foreign(j, said):
  return j.teachers.foreign(lambda inputs: said)(j.types.make_batch(X[:2]))


def views(j):
  return source(j, augmentation=j.data.Augmentation(lambda x, key: x, None))


def born_again(j, objective=None, student=None, **options):
  """Two generations; what is wrong with the second is said before the first makes a step."""

  def trained(step, record):
    raise AssertionError("the first generation was trained")

  given = {"data": source(j), "optimizer": optax.adam(1e-2), "steps": 1, "generations": 2}
  given["watch"] = j.train.Watch(callback=trained)
  student = network(j) if student is None else student
  return j.train.born_again(student, objective, **{**given, **options})


@pytest.mark.parametrize(("call", "message"), TEACHERS)
def test_teachers_refuse(j, call, message):
  with pytest.raises(Wrong, match=message):
    call(j)


@pytest.mark.parametrize(("call", "message"), PARTS)
def test_parts_refuse(j, call, message):
  check(lambda: call(j), Wrong, message)


def written(path, content=b"garbage"):
  path.write_bytes(content)
  return path


FILES = [
  *[
    (lambda j, p, n=n: getattr(j.networks.weights, n)(p / "none"), FileNotFoundError, "path=.*none")
    for n in ("orbax", "msgpack", "safetensors")
  ],
  (
    lambda j, p: j.networks.weights.msgpack(written(p / "a")),
    Exception,
    "truncated, or no msgpack",
  ),
  (
    lambda j, p: j.networks.weights.safetensors(written(p / "a")),
    Exception,
    "truncated, or no safetensors",
  ),
  (lambda j, p: j.networks.weights.orbax(written(p / "a")), ValueError, "is a file"),
  (lambda j, p: j.networks.weights.msgpack(None), TypeError, "path=None must be a path"),
  (
    lambda j, p: j.runs.load_variables(p / "none"),
    FileNotFoundError,
    "no checkpoint at path",
  ),
  (lambda j, p: j.runs.load_variables(3), TypeError, "path=3 must be a path"),
  (lambda j, p: j.runs.Checkpoints(p, keep_last=1.5), TypeError, "keep_last=1.5"),
  (lambda j, p: j.runs.Checkpoints(p).save(1.5, {"a": ONE}), TypeError, "step=1.5"),
  (lambda j, p: j.runs.Checkpoints(p).save(1, ONE), TypeError, "items must be"),
  (lambda j, p: j.runs.Checkpoints(p).save(10**300, {"a": ONE}), ValueError, r"step=1000.* in 0"),
  (lambda j, p: j.runs.Checkpoints(p).save(1, {"n" * 300: ONE}), ValueError, "name of 300 bytes"),
  (lambda j, p: j.export.load_student(p / "none"), FileNotFoundError, "no such folder"),
  (
    lambda j, p: j.networks.pretrained.config(hugging_face(p, "MixtralForCausalLM")),
    ValueError,
    "'MixtralForCausalLM' is not one of",
  ),
  (
    lambda j, p: j.networks.pretrained.variables(hugging_face(p), small_decoder(j)),
    FileNotFoundError,
    "b.safetensors",
  ),
  (lambda j, p: j.export.save_student(p, Net(), stored=S), TypeError, "must be a Model"),
  *[
    (lambda j, p, save=save: save(j, p / "none"), ValueError, "holds NaN")
    for save in (
      lambda j, p: j.export.save_student(p, model(j, BAD), stored=S),
      lambda j, p: j.export.export_file(p.with_suffix(".onnx"), program(j, BAD), (X, Y)),
      lambda j, p: j.networks.pretrained.save(p, BAD, small_decoder(j)),
    )
  ],
  (lambda j, p: j.teachers.restore(p, network(j)), FileNotFoundError, "holds no checkpoints"),
  (lambda j, p: j.runs.read_config(p), FileNotFoundError, "no config.json"),
  (lambda j, p: j.runs.claim(written(p / "a"), {}), NotADirectoryError, "is a file"),
  (lambda j, p: fit(j, written(p / "a")), NotADirectoryError, "is a file"),
  (lambda j, p: fit(j, written(p / "a") / "run"), OSError, "cannot be written"),
  (lambda j, p: fit(j, p / "run", **claimed_by(p)), ValueError, "holds a run of another config"),
  (lambda j, p: fit(j, p, **damaged(p)), ValueError, "config.json is damaged"),
  (lambda j, p: fit(j, written(p / "student").parent), FileExistsError, "student is not a run's"),
  (lambda j, p: fit(j, linked(p / "run")), FileExistsError, "is a link to 'nowhere'"),
  (lambda j, p: fit(j, linked(p / "run") / "below"), FileExistsError, "is a link to 'nowhere'"),
  (lambda j, p: fit(j, linked(p / "student").parent), FileExistsError, "student is not a run's"),
]


def linked(path):
  """A link to nothing."""
  path.symlink_to("nowhere")
  return path


def tracked(**options):
  return lambda j, p: j.runs.track([], {}, **{"folder": p, **options})


def own_cache(**options):
  given = {"folder": "cache", "rows": X[:, :3], "ids": range(16), "name": "arrays", **options}
  return lambda j, p: j.teachers.write(**{**given, "folder": given["folder"] or p})


FILES += [
  (tracked(numbers={"a": 1.0}), ValueError, "step=None and numbers"),
  (tracked(step=1.5, numbers={"a": 1.0}), TypeError, "step=1.5 must be an integer"),
  (tracked(step=1, numbers={"a": "b"}), TypeError, "'a': 'b', which is no number"),
  (tracked(files=["gone.html"]), FileNotFoundError, "gone.html'.* not there"),
  (tracked(files="gone.html"), TypeError, "files='gone.html' must be a list"),
  (tracked(folder="gone"), FileNotFoundError, "folder='.*gone' is not there"),
  (own_cache(folder="gs://bucket/cache"), ValueError, "is an address"),
  (own_cache(name=None), TypeError, "name=None must be a text"),
  (own_cache(ids="0123456789abcdef"), TypeError, "ids=.* must be several texts"),
  (own_cache(view=0.0), TypeError, "view=0.0 must be an integer"),
  (own_cache(floor="a"), TypeError, "floor='a' must be a number"),
  (
    lambda j, p: own_cache(folder=written(p / "manifest.json", b"{").parent)(j, p),
    ValueError,
    "damaged manifest.json",
  ),
  (lambda j, p: own_cache(folder=written(p / "a"))(j, p), ValueError, "is a file"),
  (
    lambda j, p: j.data.from_text(p, j.data.tokenizers.utf8(), length=4),
    FileNotFoundError,
    "is a folder",
  ),
  (
    lambda j, p: j.reports.render_report(p, split="../x"),
    ValueError,
    "split='../x' must be a word",
  ),
  (lambda j, p: config(j, num_attention_heads=0), ValueError, "num_attention_heads=0"),
  (lambda j, p: config(j, rope_scaling=[1]), ValueError, "must be an object"),
  (lambda j, p: config(j, architectures="LlamaForCausalLM"), ValueError, "must be a list"),
  (lambda j, p: config(j, tie_word_embeddings="no"), TypeError, "tie_word_embeddings='no'"),
  (
    lambda j, p: j.networks.pretrained.variables(p, small_decoder(j), dtype="words"),
    TypeError,
    "dtype='words'",
  ),
  (
    lambda j, p: j.networks.pretrained.save(written(p / "a"), {}, small_decoder(j)),
    NotADirectoryError,
    "is a file",
  ),
]


def config(j, **fields):
  told = {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "vocab_size": 32}
  told |= {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
  return j.networks.pretrained.config({**told, "intermediate_size": 16, **fields})


def program(j, values):
  stored = jax.ShapeDtypeStruct((4,), jnp.float32)
  return j.export.as_program(j.types.Model(network(j, 7), values), stored=stored)


def small_decoder(j):
  return j.networks.models.DecoderConfig(
    9, 8, layers=1, heads=2, kv_heads=1, head_dim=4, hidden=8, tied=True
  )


def hugging_face(path, architecture="LlamaForCausalLM"):
  """A folder whose index names a file that is not there."""
  (path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
  index = {"weight_map": {"model.norm.weight": "b.safetensors"}}
  (path / "model.safetensors.index.json").write_text(json.dumps(index))
  return path


# What a folder of each kind has in it.
KINDS = {
  "run": {"config.json": {"data_seed": 0, "accumulate": 1, "average": None, "student": {}}},
  "sweep": {"config.json": {"points": [], "seeds": [], "retrain": []}},
  "study": {"config.json": {"space": {}, "seeds": [], "retrain": []}},
  "search within a budget": {"config.json": {"candidates": [], "budget": {}, "gap": 0.02}},
  "network of export.save_folder": {
    "config.json": {"library_name": "jaxdistill", "outputs": ["logits"]}
  },
  "pretrained model": {"config.json": {"architectures": ["LlamaForCausalLM"]}},
  "cache": {"manifest.json": {"views": {}}},
  "saved variables": {"manifest.json": {"items": {}}},
  "checkpoints": {"10/manifest.json": {"items": {}, "step": 10}},
  "deployed student": {"manifest.json": {"kind": "student"}},
  "report of a run that is gone": {"report.json": {}},
  "run's exports": {"exports.json": {}},
  "series of generations": {"generation1/config.json": {}},
}


@pytest.mark.parametrize("there", KINDS)
def test_a_folder_is_of_one_kind(j, tmp_path, there):
  for name, content in KINDS[there].items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(json.dumps(content))
  of_runs = ("run", "sweep", "study", "search within a budget", "report of a run", "series of")
  of_runs = there.startswith(of_runs) and there != "run's exports"
  for asked in (*KINDS, "report"):
    if asked == there or (of_runs and asked in ("report", "deployed student")):
      j.runs.check_place(tmp_path, asked)
    else:
      with pytest.raises(FileExistsError, match=f"holds a {there}.* a {asked} needs a folder"):
        j.runs.check_place(tmp_path, asked)
  if there in ("cache", "deployed student"):  # which these would remove, and claim, where it lies
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match=f"path=.* holds a {there}"):
      j.runs.save_variables(tmp_path, variables())
    with pytest.raises(FileExistsError, match=f"holds a {there}"):
      j.runs.claim(tmp_path, {"experiment": "mine"})
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_folder_holds_is_asked_before_anything_is_traced(j, tmp_path):
  cache, run = tmp_path / "cache", tmp_path / "run"
  own_cache(folder=None)(j, cache)
  run.mkdir()
  (run / "config.json").write_text(json.dumps(KINDS["run"]["config.json"] | {"points": [1]}))
  j.runs.check_place(run, "run")  # a setting of the user's own
  small, choice = network(j), j.search.Choice(labelled(j))
  options = {"data": source(j), "optimizer": optax.sgd(0.1), "steps": 1}

  def unseen(student, teacher, batch):
    raise AssertionError("the objective was traced")

  for call, there in (
    (lambda: j.train.fit(small, unseen, run=cache, **options), "cache"),
    (
      lambda: j.search.sweep(small, unseen, points=[{}], choice=choice, run=run, **options),
      "run",
    ),
    (lambda: j.teachers.cached(teacher(j), source(j), folder=run), "run"),
    (lambda: j.teachers.fill(teacher(j), source(j), run), "run"),
    (lambda: j.train.born_again(small, unseen, generations=2, run=run, **options), "run"),
    (lambda: j.search.preflight(small, unseen, data=source(j), folder=cache), "cache"),
    (lambda: j.export.save_student(cache, model(j), stored=X[:1]), "cache"),
    (
      lambda: j.reports.compare_students(
        cache, network=small, teacher=teacher(j), batches=labelled(j), examples=24
      ),
      "cache",
    ),
  ):
    check(call, FileExistsError, f"holds a {there}")


def claimed_by(path):
  (path / "run").mkdir()
  (path / "run" / "config.json").write_text(json.dumps({"steps": 3}))
  return {}


def damaged(path):
  (path / "config.json").write_text("{")
  return {}


@pytest.mark.parametrize(("call", "error", "message"), FILES)
def test_files_and_folders_refuse(j, tmp_path, call, error, message):
  check(lambda: call(j, tmp_path), error, message)


@pytest.mark.slow
def test_outputs_are_looked_at_before_a_run_and_those_of_a_finished_one_are_made_anew(j, tmp_path):
  how = {"data": source(j), "optimizer": optax.sgd(0.1), "steps": 1}

  def run(outputs, folder="run", **seeds):
    made = j.train.Run(tmp_path / folder, outputs=outputs, progress=None)
    return j.train.fit(network(j), j.recipes.labels(), run=made, **how, **seeds)

  check(lambda: run(["gone"]), ValueError, r"outputs=\['gone'\] must be some of")
  assert not (tmp_path / "run").exists()
  for outputs in (None, ["logits", "mid"], "mid", None):
    run(outputs)
    wanted = sorted([outputs] if isinstance(outputs, str) else outputs or ["logits"])
    assert list(j.export.load_student(tmp_path / "run").info["outputs"]) == wanted
  for outputs in ("mid", "mid", None):  # of several seeds too
    run(outputs, "several", seed=[0, 1])
  assert j.export.load_student(tmp_path / "several").outputs == ("logits",)


def test_a_home_is_the_users_and_a_link_is_not_written_through(j, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  monkeypatch.chdir(tmp_path)
  assert j.runs.claim("~/run", {}) == tmp_path / "home" / "run"
  assert not (tmp_path / "~").exists()
  (tmp_path / "elsewhere").mkdir()
  (tmp_path / "home" / "run" / "tensorboard").symlink_to(tmp_path / "elsewhere")
  with pytest.warns(j.runs.TrackerWarning, match="is a link out of its folder"):
    j.runs.track(
      [j.runs.TensorBoard()], {}, folder=tmp_path / "home" / "run", step=1, numbers={"a": 1.0}
    )
  assert not any((tmp_path / "elsewhere").iterdir())


def test_nan_in_a_loss_stops_at_its_step_and_the_folder_is_free_again(j, tmp_path):
  def objective(student, teacher, batch, *, step=0.0):
    return {"odd": j.types.Term(student.logits[:, 0] ** 2 * jnp.where(step > 0.5, NAN, 1.0))}

  run = {
    "objective": objective,
    "teacher": None,
    "devices": 1,
    "hyper": {"step": lambda step: step * 1.0},
    "log_every": 1,
  }
  check(
    lambda: fit(j, tmp_path / "run", config={"rate": 1}, **run),
    FloatingPointError,
    "term 'odd' is not finite at step 2",
  )
  # Nothing was saved, so the corrected run may have the folder, whatever was changed.
  j.runs.claim(tmp_path / "run", {"rate": 2})


def test_what_was_trained_is_kept_where_a_validation_fails(j, tmp_path):
  run = {"folder": tmp_path / "run", "steps": 4, "validate_every": 2}
  run |= {"objective": term()(j), "teacher": None, "devices": 1}
  check(lambda: fit(j, validate=lambda m: 0.5, **run), TypeError, "validate must return {name:")
  with j.runs.Checkpoints(tmp_path / "run" / "checkpoints") as saved:
    assert saved.steps() == [2]
  again = fit(j, validate=lambda m: {"accuracy": 1.0}, **run)
  assert [line["step"] for line in again.history] == [4]

  def callback(step, record):
    raise KeyError(step)

  with pytest.raises(KeyError, match="2"):  # it is the user's own
    fit(j, callback=callback, **{**run, "folder": tmp_path / "other"})
  with j.runs.Checkpoints(tmp_path / "other" / "checkpoints") as saved:
    assert saved.steps() == [2]


def test_labels_that_nobody_has_teach_nothing(j):
  unlabelled = j.data.on_device(j.data.from_arrays(X, None), batch_size=8, data_seed=0)
  check(
    lambda: fit(j, data=unlabelled, teacher=None, devices=1, objective=j.recipes.labels()),
    ValueError,
    "has no label that may be used, and no term",
  )


def test_a_number_that_a_task_makes_nan_was_not_measured(j):
  tasks, batches = j.evaluation.tasks, labelled(j)

  def task(bad):
    metrics = {"odd": tasks.Metric("lower"), "even": tasks.Metric("lower")}
    return tasks.Task("mine", metrics, lambda o, b: {"odd": (bad, 1.0), "even": (2.0, 1.0)})

  one, two = j.types.Model(network(j, 7), variables()), j.types.Model(network(j, 7), BAD)
  with pytest.warns(UserWarning, match="'mine' gives NaN for odd"):
    found = j.evaluation.evaluate(one, batches, task=task(NAN))
  assert found == {"even": 2.0}
  # That of outputs which are not finite says so.
  assert np.isnan(j.evaluation.evaluate(two, batches)["nll"])


def test_what_a_config_says_is_the_same_text_in_every_process(j):
  told = {"of": {"b", "a", "c"}, "by": fit, "at": pathlib.PurePosixPath("x")}
  found = j.runs.to_json(told)
  assert found["of"] == ["a", "b", "c"]
  assert " at 0x" not in found["by"]


def test_a_batch_in_which_nothing_counts_is_0_and_measures_nothing(j):
  batch = windows(weight=np.zeros((16, 4)))(j)
  batches = j.data.evaluation_batches(batch, batch_size=8)
  words = j.networks.linen(Words())
  made = j.types.Model(words, words.init(jax.random.key(0), TOKENS[:1]))

  def loss(variables):
    first = jax.tree.map(lambda leaf: leaf[0], batches)
    logits = words.apply(variables, first.inputs["tokens"], train=False, key=None)[0].logits
    terms = {"a": j.types.Term(j.losses.cross_entropy(logits, first.labels))}
    return j.train.reduce_terms(terms, first)[0]

  value, gradient = jax.value_and_grad(loss)(made.variables)
  assert value == 0
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))
  asked = j.types.Teacher(
    made.variables, lambda v, b: words.apply(v, b.inputs["tokens"], train=False, key=None)[0]
  )
  found = j.evaluation.evaluate(asked, batches, task=j.evaluation.tasks.tokens())
  assert "nll" not in found  # absent: a mean of nothing is neither 0 nor a number
  check(
    lambda: j.evaluation.validator(batches, task=j.evaluation.tasks.tokens()),
    ValueError,
    "no example of batches has a label",
  )
