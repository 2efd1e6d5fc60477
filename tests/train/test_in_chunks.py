"""Objectives in chunks of tokens: equal to the whole, whatever the loss, and never as large."""

import dataclasses
import functools
import inspect
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxdistill import data, evaluation, losses, networks, recipes, search, teachers, train
from jaxdistill.train import _fit, in_chunks, reduce_terms
from jaxdistill.train._answered import terms_where_answered
from jaxdistill.types import (
  Head,
  Model,
  Objective,
  Outputs,
  Summed,
  Teacher,
  Term,
  as_objective,
  make_batch,
  with_logits,
)

B, L, D, V = 4, 13, 8, 17
AT_ONCE = 4 * B  # 13 positions in chunks of 4: the last goes back for three of them
# Of two sums over the same numbers in another order; of the largest of an array.
WITHIN = {jnp.float32: 2e-6, jnp.float64: 1e-12}


def kernel_of(rng, width, transposed=False):
  kernel = rng.normal(size=(width, V)) / 2
  return kernel.T if transposed else kernel


def both(dtype=np.float32, *, seed=0):
  """A student with all that a head may have, and a teacher of another width and dtype."""
  rng = np.random.default_rng(seed)
  student = Outputs(
    hidden=rng.normal(size=(B, L, D)).astype(dtype),
    head=Head(kernel_of(rng, D).astype(dtype), rng.normal(size=V).astype(dtype), softcap=4.0),
  )
  teacher = Outputs(
    hidden=rng.normal(size=(B, L, D + 3)).astype(dtype),
    head=Head(kernel_of(rng, D + 3, True).astype(dtype), scale=1.5, transposed=True),
  )
  return jax.tree.map(jnp.asarray, (student, teacher))


def tokens(*, seed=1):
  """Ragged weights, labels that are not all known."""
  rng = np.random.default_rng(seed)
  labels = jnp.asarray(rng.integers(0, V, (B, L)), jnp.int32)
  weight = jnp.asarray(np.arange(L) < rng.integers(4, L + 1, (B, 1)), jnp.float32)
  labelled = jnp.asarray(rng.integers(0, 2, (B, L)), jnp.float32)
  return dataclasses.replace(make_batch(labels), labels=labels, weight=weight, labelled=labelled)


def renyi(s, t, order=0.5):
  """Rényi's divergence, which the library does not have."""
  p, q = jax.nn.log_softmax(t), jax.nn.log_softmax(s)
  return jax.nn.logsumexp(order * p + (1 - order) * q, axis=-1) / (order - 1)


def focal_kl(s, t, focus=2.0):
  """A KL that counts more where the student is far off."""
  p, q = jax.nn.log_softmax(t), jax.nn.log_softmax(s)
  return jnp.sum(jnp.exp(p) * jnp.abs(jnp.exp(p) - jnp.exp(q)) ** focus * (p - q), axis=-1)


def every_loss():
  """Each loss on logits that has one value a token, by its name, of (student, teacher, labels)."""
  found = {
    "renyi": lambda s, t, y: renyi(s, t),
    "focal_kl": lambda s, t, y: focal_kl(s, t),
    "z_loss": lambda s, t, y: losses.z_loss(s),  # its argument has another name
  }
  special = {
    "partition_kl": lambda s, t, y: losses.partition_kl(s, t, t > 0),
    "self_nontarget": lambda s, t, y: losses.self_nontarget(s, t, y),
  }
  # What relates the tokens of a batch to each other is none.
  related = {"batch_gram", "class_gram", "intra_class_correlation", "self_target"}
  for name in losses.__all__:
    function = getattr(losses, name)
    names = list(inspect.signature(function).parameters) if inspect.isfunction(function) else []
    if names[:1] != ["student_logits"] or name in related:
      continue

    def loss(s, t, y, function=function, names=names, name=name):
      y = jax.nn.one_hot(y, V) if name.startswith("binary") else y
      given = {"student_logits": s, "teacher_logits": t, "labels": y}
      return function(*(given[n] for n in names if n in given))

    found[name] = special.get(name, loss)
  return found


def everything(student, teacher, batch, *, temperature):
  """A term of each loss; every third counts labelled tokens alone."""
  terms = {}
  for i, (name, loss) in enumerate(every_loss().items()):
    where = batch.labelled if i % 3 == 0 else None
    values = loss(student.logits, teacher.logits, batch.labels)
    terms[name] = Term(values, weight=0.5 + i / 10, where=where)
  learned = losses.soft_target_kl(student.logits, teacher.logits, temperature=temperature)
  return {**terms, "tempered": Term(learned, weight=temperature)}


def learning(student, teacher, batch, params, *, temperature):
  """What learns a temperature, and a projector that corrects the teacher's logits."""
  corrected = teacher.logits + 0.1 * teacher.logits @ params["projector"]
  values = losses.soft_target_kl(
    student.logits, corrected, temperature=jnp.exp(params["log_temperature"])
  )
  known = losses.cross_entropy(student.logits, batch.labels, label_smoothing=0.1)
  size = losses.z_loss(student.logits)
  return {
    "soft": Term(values, weight=temperature),
    "labels": Term(known, where=batch.labelled, weight=jnp.exp(params["log_temperature"])),
    "z": Term(size, weight=1e-2),
    "norm": Term(jnp.sum(params["projector"] ** 2), weight=0.1, axis="parameters"),
  }


LEARNING = Objective(
  init=lambda key, student, teacher: (
    {"projector": jnp.zeros((V, V)), "log_temperature": jnp.zeros(())},
    {},
  ),
  apply=lambda params, state, student, teacher, batch, *, key, **hyper: (
    learning(student, teacher, batch, params, **hyper),
    state,
  ),
  hyper={"temperature": 2.0},
)


def loss_of(objective, batch, teacher, **hyper):
  """``(params, student, hyper) -> (loss, sums)`` of an objective, as the step has it."""

  def loss(params, student, hyper):
    seen = with_logits(student), None if teacher is None else with_logits(teacher)
    terms, _ = objective.apply(params, {}, *seen, batch, key=jax.random.key(0), **hyper)
    return reduce_terms(terms, batch)

  return loss


def apart(found, wanted):
  """The largest difference of each leaf, over the leaf's largest number."""
  pairs = zip(*map(jax.tree.leaves, (found, wanted)), strict=True)
  return max(
    float(np.max(np.abs(np.subtract(a, b))) / max(np.max(np.abs(b)), 1e-30)) for a, b in pairs
  )


# What compiles all losses takes a minute on two cores.
SLOW = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.float64, marks=SLOW)])
def test_every_loss_in_chunks_is_that_of_the_whole(dtype):
  with jax.enable_x64(dtype == jnp.float64):
    student, teacher = both(dtype)
    batch, hyper = tokens(), {"temperature": jnp.asarray(2.5, dtype)}
    objective = as_objective(everything, temperature=2.0)

    @jax.jit
    def each(student, hyper):
      """The sum of each term, and the gradient of each."""

      def sums(objective, student, hyper):
        return {
          n: s[0] for n, s in loss_of(objective, batch, teacher)({}, student, hyper)[1].items()
        }

      def of(objective):
        totals, pull = jax.vjp(functools.partial(sums, objective), student, hyper)
        ones = {n: jnp.asarray(np.eye(len(totals))[i], dtype) for i, n in enumerate(sorted(totals))}
        return totals, jax.vmap(pull)(ones)

      again = in_chunks(objective, tokens_at_once=AT_ONCE, backward="again")
      return of(objective), of(again)

    (totals, gradients), (found, pulled) = each(student, hyper)
    assert len(totals) > 20
    for i, name in enumerate(sorted(totals)):
      assert apart(found[name], totals[name]) < WITHIN[dtype], name
      mine, theirs = (jax.tree.map(lambda g, i=i: g[i], g[0]) for g in (pulled, gradients))
      assert apart(mine, theirs) < WITHIN[dtype], name
    tempered = [g[1]["temperature"][sorted(totals).index("tempered")] for g in (pulled, gradients)]
    assert apart(*tempered) < WITHIN[dtype]
    masked = np.asarray(batch.weight) == 0
    assert not np.any(np.asarray(pulled[0].hidden)[:, masked])


WAYS = ("kept", True), ("kept", False), ("again", True)


def judged(objective, dtype, devices=None, ways=WAYS):
  """How far an objective in chunks is from the whole: value, sums, and every gradient.

  Of the student's hidden states and head, of a projector and a temperature that are learnt, and of
  one that is a keyword; by both ways to the gradient, with and without the positions that nothing
  counts. The chunks may be shared out over devices, the whole is on one.
  """
  student, teacher = both(dtype)
  batch, hyper = tokens(), {"temperature": jnp.asarray(2.5, dtype)}
  shapes = jax.eval_shape(lambda: (with_logits(student), with_logits(teacher)))
  params, _ = objective.init(jax.random.key(0), *shapes)
  params = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=dtype)).reshape(x.shape), params)

  def of(objective):
    def loss(params, student, hyper, teacher, batch):
      return loss_of(objective, batch, teacher)(params, student, hyper)

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))

  given = (params, student, hyper, teacher, batch)
  whole, worst = of(objective)(*given), {}
  if devices is not None:
    mesh = train.data_parallel(devices)
    spread = NamedSharding(mesh, PartitionSpec(train.AXIS)), NamedSharding(mesh, PartitionSpec())
    given = jax.tree.map(
      lambda x: jax.device_put(x, spread[0 if x.shape[:1] == (B,) else 1]), given
    )
  for backward, compact in ways:
    how = {"tokens_at_once": AT_ONCE, "backward": backward, "compact": compact}
    program = of(in_chunks(objective, **how)).lower(*given).compile()
    # Each device keeps its own rows, in whatever order their positions are taken. (What sorts its
    # classes is gathered by XLA, in chunks or not.)
    assert objective is not LEARNING or "all-gather" not in program.as_text()
    found = program(*given)
    assert jax.tree.structure(found) == jax.tree.structure(whole)
    masked = np.asarray(batch.weight) == 0
    assert not np.any(np.asarray(found[1][1].hidden)[masked])
    worst[backward, compact] = apart(found, whole)
  return worst


@pytest.mark.slow_but("objective1-float64")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("objective", [as_objective(everything, temperature=2.0), LEARNING])
def test_the_loss_in_chunks_and_all_its_gradients(dtype, objective):
  with jax.enable_x64(dtype == jnp.float64):
    assert max(judged(objective, dtype).values()) < WITHIN[dtype]


class Words(nn.Module):
  """The least of a language model: it puts out hidden states and a head."""

  width: int
  tied: bool = False

  @nn.compact
  def __call__(self, tokens):
    table = self.param("embedding", nn.initializers.normal(0.5), (V, self.width))
    x = nn.Dense(5, name="mid")(table[tokens])
    hidden = x[..., :1] + nn.Dense(self.width)(nn.tanh(x))
    if self.tied:
      return Outputs(hidden=hidden, head=Head(table, softcap=5.0, transposed=True))
    kernel = self.param("kernel", nn.initializers.normal(0.5), (self.width, V))
    bias = self.param("bias", nn.initializers.normal(0.5), (V,))
    return Outputs(hidden=hidden, head=Head(kernel, bias))


def network(width, **how):
  return networks.linen(Words(width, **how), features=["mid"], train_flag=None)


def taught(*widths):
  made = [network(width) for width in widths]
  keys = jax.random.split(jax.random.key(5), len(widths))
  models = [
    Model(one, one.init(key, jnp.zeros((1, 2), jnp.int32)))
    for one, key in zip(made, keys, strict=True)
  ]
  return teachers.frozen(models[0]) if len(models) == 1 else teachers.ensemble(models)


def source():
  rng = np.random.default_rng(3)
  words = rng.integers(0, V, (16, L + 1)).astype(np.int32)
  weight = (np.arange(L) < rng.integers(3, L + 1, (16, 1))).astype(np.float32)
  examples = data.from_arrays(words[:, :-1], words[:, 1:], num_classes=V, weight=weight)
  return data.on_device(examples, batch_size=8, data_seed=0)


def fitted(objective, *, dispatch=train.with_jit, **how):
  how = {"optimizer": optax.sgd(0.5), "steps": 3, "teacher": taught(7), "data": source(), **how}
  smaller = {n: how.pop(n) for n in ("accumulate", "tokens_at_once") if n in how}
  made = train.fit(network(6, tied=True), objective, dispatch=dispatch(**smaller), **how)
  return made.state.params, [{**line, "seconds": 0} for line in made.history]


def ways():
  """How `fit` is called, by what is in it."""
  falling = optax.linear_schedule(4.0, 1.0, 3)
  hint = recipes.hint("mid", "mid")
  kd = recipes.kd(temperature=falling, hard_weight=0.5)
  return {
    "features beside it, a schedule": (kd, hint, {}),
    "micro-batches, pmap": (kd, None, {"accumulate": 2, "dispatch": train.with_pmap}),
    "pmap": (kd, None, {"dispatch": train.with_pmap}),
    "seeds, ensemble, a learned temperature": (
      recipes.ctkd(warmup_steps=2),
      None,
      {"seed": [0, 1], "teacher": taught(7, 3), "average": 0.9},
    ),
  }


@pytest.mark.slow
@pytest.mark.parametrize("way", ways())
def test_fit_in_chunks_is_the_same_training(way):
  objective, beside, how = ways()[way]
  chunked = in_chunks(objective, tokens_at_once=3 * 8)
  if beside is not None:
    objective, chunked = (recipes.combine(one, beside) for one in (objective, chunked))
  params, history = fitted(objective, **how)
  if beside is None and "pmap" not in way:
    found, lines = fitted(objective, tokens_at_once=24, **how)
  else:
    found, lines = fitted(chunked, **how)
  assert apart(found, params) < 3e-6
  for line, wanted in zip(lines, history, strict=True):
    assert set(wanted) - set(line) <= {"examples_per_second"}
    for name in ("loss", "labels", "soft", "accuracy"):
      np.testing.assert_allclose(line[name], wanted[name], rtol=1e-5)


@pytest.mark.slow
def test_a_run_in_chunks_goes_on_as_it_was(tmp_path):
  how = {"tokens_at_once": 24, "run": tmp_path / "run"}
  params, _ = fitted(recipes.kd(), **how)
  again, _ = fitted(recipes.kd(), **how)
  jax.tree.map(np.testing.assert_array_equal, params, again)
  with pytest.raises(ValueError, match="another configuration.*step: .*_chunks.py"):
    fitted(recipes.kd(), run=tmp_path / "run")


def on_eight_devices(program):
  """Runs lines of Python in a process of eight devices, with this module as ``t``."""
  paths = [str(pathlib.Path(__file__).parents[1]), str(pathlib.Path(__file__).parents[2])]
  head = f"""
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import sys
sys.path[:0] = {paths!r}
import functools, jax
from jaxdistill import recipes, train
from train import test_in_chunks as t
assert len(jax.devices()) == 8
"""
  subprocess.run([sys.executable, "-c", head + program], check=True, timeout=1800)


@pytest.mark.slow
def test_a_run_on_eight_devices_is_as_on_one():
  on_eight_devices("""
found = []
for devices in (jax.devices()[:1], jax.devices()):
  dispatch = functools.partial(train.with_jit, train.data_parallel(devices))
  found.append(t.fitted(recipes.kd(), tokens_at_once=24, dispatch=dispatch)[0])
assert t.apart(*found) < 2e-6, t.apart(*found)
""")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_eight_devices_are_as_the_whole_on_one(dtype):
  on_eight_devices(f"""
t.B, t.AT_ONCE = 16, 64
dtype = jax.numpy.{dtype}
with jax.enable_x64(dtype == jax.numpy.float64):
  worst = t.judged(t.LEARNING, dtype, jax.devices(), t.WAYS[::2])
  every = t.as_objective(t.everything, temperature=2.0)
  worst["every loss"] = max(t.judged(every, dtype, jax.devices(), t.WAYS[:1]).values())
print(dtype.__name__, worst)
assert max(worst.values()) < t.WITHIN[dtype], worst
""")


def skipping(where):
  """A teacher that skipped some examples."""
  student, teacher = both()
  return student, dataclasses.replace(teacher, where=jnp.asarray(where))


def test_examples_that_a_teacher_skipped_count_for_the_labels_alone():
  student, teacher = skipping([1.0, 0.0, 1.0, 0.0])
  batch, objective = tokens(), recipes.kd(hard_weight=0.5)

  @jax.jit
  def sums(student, teacher):
    found = []
    for one in (objective, in_chunks(objective, tokens_at_once=AT_ONCE)):

      def made(target, batch, one=one):
        seen = with_logits(student), with_logits(target)
        return one.apply({}, {}, *seen, batch, key=jax.random.key(0))

      terms, _ = terms_where_answered(made, teacher, batch)
      found.append(reduce_terms(terms, batch)[1])
    return found

  whole, chunked = sums(student, teacher)
  assert apart(chunked, whole) < 2e-6
  assert float(whole["soft"][1]) == float(jnp.sum(batch.weight[jnp.array([0, 2])]))
  assert float(chunked["labels"][1]) == float(jnp.sum(batch.weight * batch.labelled))


@pytest.mark.parametrize(
  "narrow",
  [
    lambda t: teachers.subset(t, range(V)),
    lambda t: teachers.grouped(t, [[v] for v in range(V)]),
    lambda t: teachers.ensemble([t, t]),
    lambda t: teachers.ensemble([t, Teacher({}, lambda v, b: with_logits(t(b)))], weights=[1, 3]),
  ],
)
def test_a_teacher_is_narrowed_and_combined_where_its_logits_are_made(narrow):
  teacher = taught(7)
  batch = make_batch(jnp.arange(2 * L, dtype=jnp.int32).reshape(2, L) % V)
  outputs = narrow(teacher)(batch)
  assert outputs.logits is None
  wanted = with_logits(teacher(batch)).logits
  np.testing.assert_allclose(with_logits(outputs).logits, wanted, rtol=1e-5, atol=1e-6)


def test_the_heads_gradient_is_summed_in_float32():
  # 2 ** 11 chunks of one position, each of which adds less than bfloat16 can to what is there.
  student = Outputs(
    hidden=jnp.ones((1, 2**11, 1), jnp.bfloat16), head=Head(jnp.zeros((1, 2), jnp.bfloat16))
  )
  batch = make_batch(jnp.zeros((1, 2**11)), labels=jnp.zeros(1, jnp.int32))
  objective = as_objective(lambda s, t, b: {"first": Term(s.logits[..., 0])})
  for backward in ("kept", "again"):
    loss = loss_of(in_chunks(objective, tokens_at_once=1, backward=backward), batch, None)
    gradient = jax.grad(lambda s, loss=loss: loss({}, s, {})[0])(student).head.kernel
    assert gradient.dtype == jnp.bfloat16
    assert gradient.tolist() == [[1.0, 0.0]], backward


def refused(objective, match, *, at_once=AT_ONCE, student=None, error=ValueError, teacher=True):
  mine, theirs = both()
  loss = loss_of(in_chunks(objective, tokens_at_once=at_once), tokens(), theirs)
  with pytest.raises(error, match=match):
    loss({}, mine if student is None else student, {})


def test_what_chunks_cannot_do_says_so():
  refused(recipes.dist(), r"term 'intra' has the axis 'classes'.*recipes.combine\(train.in_chunks")
  refused(
    lambda s, t, b: {"whole": Term(jnp.max(s.logits, axis=(1, 2)))},
    r"term 'whole' has values \[4\].*one value for each, \[4, 4\] here",
  )
  refused(
    lambda s, t, b: {"hint": Term(s.features["mid"] - t.features["mid"])},
    r"features\['mid'\].*take that term outside",
  )
  refused(recipes.kd(), "tokens_at_once=3 is below the 4 examples of a batch", at_once=3)
  refused(
    recipes.kd(),
    r"its logits \[B, L, V\]\), and it is \[4, 17\]",
    student=Outputs(jnp.ones((4, V))),
  )
  refused(
    recipes.kd(),
    "the student's head is .*types.Head",
    student=Outputs(hidden=jnp.ones((4, L, V)), head=lambda x: x),
    error=TypeError,
  )
  with pytest.raises(ValueError, match="tokens_at_once=0 must be at least 1"):
    in_chunks(recipes.kd(), tokens_at_once=0)
  with pytest.raises(TypeError, match="objective"):
    in_chunks(3)
  for dispatch in (train.with_jit, train.with_pmap):
    with pytest.raises(ValueError, match="tokens_at_once=0 must be at least 1"):
      dispatch(tokens_at_once=0)


def test_chunks_of_more_tokens_than_were_asked_for_are_said():
  plan = train.Plan.of(
    network(6), recipes.kd(), data=source(), optimizer=optax.sgd(0.5), steps=3, teacher=taught(7)
  )

  def said(dispatch, **how):
    return _fit._rounded(plan, dispatch(**how))

  # Eight examples of a batch; four of a micro-batch; and two devices with four of these each.
  assert "tokens_at_once=20 is taken as 24" in said(train.with_jit, tokens_at_once=20)
  assert said(train.with_jit, tokens_at_once=24) == said(train.with_jit) == ""
  assert said(train.with_jit, tokens_at_once=20, accumulate=2) == ""
  assert "taken as 12" in said(train.with_jit, tokens_at_once=9, accumulate=2)
  assert "taken as 12" in said(train.with_pmap, tokens_at_once=9)


@pytest.mark.slow
def test_terms_one_by_one_have_no_gradient_where_the_losss_was_kept():
  student, teacher = both()
  for backward, known in (("kept", False), ("again", True)):
    loss = loss_of(
      in_chunks(recipes.kd(), tokens_at_once=AT_ONCE, backward=backward), tokens(), teacher
    )
    gradient = jax.grad(lambda s, loss=loss: loss({}, s, {})[1]["soft"][0])(student)
    assert bool(jnp.isfinite(gradient.hidden).all()) == known


def test_a_sum_by_hand_is_a_term():
  batch = make_batch(jnp.zeros((2, 3)), weight=jnp.array([[1.0, 1, 0], [1, 0, 0]]))
  values = jnp.arange(6.0).reshape(2, 3)
  by_hand = Summed(jnp.sum(values * batch.weight), jnp.sum(batch.weight), 0.5)
  for one, other in zip(
    jax.tree.leaves(reduce_terms({"x": by_hand}, batch)),
    jax.tree.leaves(reduce_terms({"x": Term(values, weight=0.5)}, batch)),
    strict=True,
  ):
    assert float(one) == float(other)


def memory(objective, positions, vocabulary, *, dtype=jnp.float32, widths=(64, 128)):
  """What XLA allocates for value and gradient beside arguments and results."""

  def shape(*axes):
    return jax.ShapeDtypeStruct(axes, dtype)

  ours, theirs = (
    Outputs(hidden=shape(4, positions, width), head=Head(shape(width, vocabulary)))
    for width in widths
  )
  labels = jax.ShapeDtypeStruct((4, positions), jnp.int32)

  def loss(ours, theirs, labels):
    batch = dataclasses.replace(make_batch(labels), labels=labels, labelled=jnp.ones(4))
    return loss_of(objective, batch, theirs)({}, ours, {})[0]

  compiled = jax.jit(jax.value_and_grad(loss)).lower(ours, theirs, labels).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def test_what_nothing_counts_is_not_computed():
  student, teacher = both()
  weight = np.zeros((B, L), np.float32)
  weight[0, 2:5], weight[1, 9:], weight[3, ::3] = 1, 1, 1  # 3, 4, none and 5 of 13 positions
  seen = []

  def objective(student, teacher, batch):
    jax.debug.callback(lambda real: seen.append(bool(real)), jnp.any(student.logits != 0))
    soft = losses.soft_target_kl(student.logits, teacher.logits)
    return {"soft": Term(soft), "labelled": Term(soft, where=batch.labelled)}

  def computed(compact):
    one = in_chunks(objective, tokens_at_once=AT_ONCE, compact=compact)

    def loss(student, weight):
      batch = dataclasses.replace(tokens(), weight=weight)
      return loss_of(one, batch, teacher)({}, student, {})

    compiled, found = jax.jit(jax.value_and_grad(loss, has_aux=True)), []
    for given in (weight, np.zeros_like(weight)):
      del seen[:]
      found.append(jax.block_until_ready(compiled(student, given)))
      jax.effects_barrier()
      found.append(sum(seen))
    return found

  (some, turns, none, no_turns), (whole, all_turns, *_) = computed(True), computed(False)
  # 5 positions in chunks of 4 are two, and 13 are four.
  assert (turns, no_turns, all_turns) == (2, 0, 4)
  assert apart(some, whole) < 2e-6
  assert not np.any(np.asarray(some[1].hidden)[weight == 0])
  assert not any(np.any(leaf) for leaf in jax.tree.leaves((none[0][0], none[1])))


def test_students_side_by_side_have_one_students_logits_at_a_time():
  """12 students, each with its own temperature: as one by one, in little more memory than one."""
  students, vocabulary, at_once = 12, 4096, 256
  chunked = in_chunks(recipes.kd(), tokens_at_once=at_once)

  def shape(*axes):
    return jax.ShapeDtypeStruct(axes, jnp.float32)

  def loss(ours, temperature, theirs, labels):
    batch = dataclasses.replace(
      make_batch(labels), labels=labels, weight=jnp.ones(labels.shape), labelled=jnp.ones(4)
    )
    return loss_of(chunked, batch, theirs)({}, ours, {"temperature": temperature})[0]

  def needed(count):
    ours = Outputs(hidden=shape(count, 4, 128, 16), head=Head(shape(count, 16, vocabulary)))
    theirs = Outputs(hidden=shape(4, 128, 32), head=Head(shape(32, vocabulary)))
    step = jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(0, 0, None, None)))
    labels = jax.ShapeDtypeStruct((4, 128), jnp.int32)
    program = step.lower(ours, shape(count), theirs, labels).compile()
    return program.memory_analysis().temp_size_in_bytes

  # Each more has gradients of its own in memory, and not even half a chunk's logits.
  assert (needed(students) - needed(1)) / (students - 1) < 4 * at_once * vocabulary / 2


@pytest.mark.slow
def test_a_sweep_in_chunks_is_each_student_alone():
  points, seeds = search.product(temperature=[1.0, 4.0], rate=[0.1, 0.5]), [(0, 0), (1, 0)]
  held_out = data.from_arrays(np.zeros((4, L), np.int32), np.ones((4, L), np.int32), num_classes=V)
  found = search.sweep(
    network(6, tied=True),
    recipes.kd(),
    points=points,
    data=source(),
    optimizer=lambda rate: optax.sgd(rate),
    steps=3,
    choice=search.Choice(
      data.evaluation_batches(held_out, batch_size=4), task=evaluation.tasks.tokens()
    ),
    seeds=seeds,
    teacher=taught(7),
    execution=search.Execution(tokens_at_once=24),
    run=train.Run(progress=None),
  )
  for i, row in enumerate(points[:3:2]):
    alone, _ = fitted(
      as_objective(recipes.kd(), temperature=row["temperature"]),
      optimizer=optax.sgd(row["rate"]),
      tokens_at_once=24,
      seed=[0, 1],
    )
    assert apart(found.students(2 * i).variables["params"], alone) < 3e-6


@pytest.mark.slow_but("kept")
@pytest.mark.parametrize("backward", ["kept", "again"])
def test_memory_does_not_grow_with_tokens_times_words(backward):
  chunked = in_chunks(recipes.kd(), tokens_at_once=256, backward=backward)
  small, large = (memory(chunked, positions, 4096) for positions in (128, 512))
  # 1,536 tokens more: of the whole 4 x 4,096 x 4 bytes each, here a copy of the hidden states.
  assert (large - small) / 1536 < 2 * 4 * (64 + 128)
  assert memory(recipes.kd(), 512, 4096) > 6 * large


@pytest.mark.slow
def test_an_optimiser_that_takes_terms_apart_gets_them_in_chunks_that_can():
  apart = {"optimizer": train.optimizers.dot(0.1, steps=3, apart=["labels"])}
  with pytest.raises(ValueError, match='made as one.*backward="again"'):
    fitted(recipes.kd(), tokens_at_once=AT_ONCE, **apart)
  again = in_chunks(recipes.kd(), tokens_at_once=2 * AT_ONCE, backward="again")
  found, whole = fitted(again, **apart)[0], fitted(recipes.kd(), **apart)[0]
  for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)  # sums in another order
