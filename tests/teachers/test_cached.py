"""A teacher's outputs computed once: the same training as with the teacher in the step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill import data, recipes, teachers, train
from jaxdistill.teachers import _cache, _identity
from jaxdistill.types import Head, Model, Outputs, Teacher
from small_networks import dense, untyped

SIZE = 20
SILENT = train.Run(progress=None)


@functools.cache
def pictures():
  rng = np.random.default_rng(0)
  inputs = rng.integers(0, 16, (SIZE, 4, 4, 1)).astype(np.uint8)
  return data.from_arrays(inputs, rng.integers(0, 3, SIZE), num_classes=3, name="pictures")


@functools.cache
def normed():
  return frozen(dense(8, norm=True))


def frozen(network, key=3, dtype=jnp.float32):
  return teachers.frozen(
    Model(network, network.init(jax.random.key(key), jnp.zeros((1, 4, 4, 1), dtype)))
  )


@pytest.fixture
def examples():
  return pictures()


@pytest.fixture
def teacher():
  return normed()


def source_of(kind, examples, data_seed=5, views=3, augmentation=None, **options):
  augmentation = data.crop(1) if augmentation is None else augmentation
  options = {"batch_size": 4, "augmentation": augmentation, "views": views, **options}
  if kind == "mixed":
    few = dataclasses.replace(
      examples, inputs=examples.inputs[::-1][:7], labels=examples.labels[:7], ids=examples.ids[:7]
    )
    source = data.on_device(examples, data_seed=data_seed, **options)
    more = data.streamed(few, data_seed=0, **{**options, "views": 2})
    return data.mixed(source, more, share=0.5)
  make = data.streamed if kind == "streamed" else data.on_device
  return make(examples, data_seed=data_seed, **options)


def run(source, teacher=None, *, steps=50, seed=0, dispatch=None, objective=None):
  return train.fit(
    dense(4),
    objective or recipes.kd(temperature=2.0),
    data=source,
    optimizer=optax.adam(0.01),
    steps=steps,
    seed=seed,
    teacher=teacher,
    dispatch=dispatch,
    watch=train.Watch(log_every=10),
    run=SILENT,
  )


def assert_close(one, other, tolerance):
  for a, b in zip(jax.tree.leaves(one.variables), jax.tree.leaves(other.variables), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


@functools.cache
def in_the_step(kind, seeds=None):
  """The run that caches are compared with."""
  source = source_of(kind, pictures())
  if seeds is None:
    return run(source, normed())
  sources = [dataclasses.replace(source, data_seed=seed) for seed in seeds]
  return run(sources, normed(), seed=seeds)


@pytest.mark.slow_but("on_device-True")
@pytest.mark.parametrize("in_advance", [True, False])
@pytest.mark.parametrize("kind", ["on_device", "streamed", "mixed"])
def test_fifty_steps_equal_those_with_the_teacher_in_the_step(examples, teacher, kind, in_advance):
  source = source_of(kind, examples)
  cached = teachers.cached(teacher, source, in_advance=in_advance, batch_size=8, progress=None)
  # Adam divides by a gradient's size, which amplifies rounding; the requirement is 1e-5.
  assert_close(in_the_step(kind), run(cached), 1e-5)


@pytest.mark.slow
def test_fifty_steps_under_pmap(examples, teacher):
  source = source_of("on_device", examples)
  cached = teachers.cached(teacher, source, batch_size=8, progress=None)
  # The student has no BatchNorm, so that pmap changes rounding alone.
  assert_close(in_the_step("on_device"), run(cached, dispatch=train.with_pmap()), 1e-5)


@pytest.mark.slow
@pytest.mark.device
def test_without_augmentation_one_view_serves_every_seed(examples, teacher):
  source = source_of("on_device", examples, views=None, augmentation=data.identity)
  cached = teachers.cached(teacher, source, progress=None)
  assert source.views == cached.views == 1
  seeds = [3, 5]
  sources, caches = (
    [dataclasses.replace(one, data_seed=seed) for seed in seeds] for one in (source, cached)
  )
  assert caches[0].shared is caches[1].shared
  assert_close(run(sources, teacher, seed=seeds), run(caches, seed=seeds), 1e-5)


# A cache in files.


def filled(folder, examples, teacher, *, kind="on_device", in_advance=True, **options):
  source_options = {n: options.pop(n) for n in ("data_seed", "views") if n in options}
  source = source_of(kind, examples, **source_options)
  options = {"batch_size": 8, "progress": None, "in_advance": in_advance, **options}
  return teachers.cached(teacher, source, folder=folder, **options)


@pytest.mark.slow_but("device-on_device", "host-on_device", "files-streamed")
@pytest.mark.parametrize("kind", ["on_device", "streamed", "mixed"])
@pytest.mark.parametrize("where", ["device", "host", "files"])
def test_wherever_rows_lie_they_are_the_same(tmp_path, monkeypatch, examples, teacher, kind, where):
  memory = teachers.cached(
    teacher, source_of(kind, examples), in_advance=True, batch_size=8, progress=None
  )
  places = {"device": ["host", "device"], "host": ["host"], "files": []}[where]
  monkeypatch.setattr(_cache, "_fits", lambda size, place: place in places)
  found = filled(tmp_path / "cache", examples, teacher, kind=kind)
  assert found.teacher == memory.teacher
  for one in (memory, found):
    assert (one.whole is None) == (one is found and where != "device")
  # Across the ends of epochs and of a round of views.
  batches = []
  for one in (memory, found):
    items = one.items(3, 14)
    batches.append(jax.jit(jax.vmap(functools.partial(one.cut, one.shared)))(items))
  for a, b in zip(*map(jax.tree.leaves, batches), strict=True):
    np.testing.assert_array_equal(a, b)
  assert batches[0].teacher.logits.shape == (14, 4, 3)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["device", "host"])
def test_a_whole_run_agrees_in_float64(examples, where):
  with jax.enable_x64(True):
    teacher = frozen(dense(8, param_dtype=jnp.float64), dtype=jnp.float64)
    source = source_of("on_device", examples, normalize=lambda x: x.astype(jnp.float64) / 16)
    cached = teachers.cached(
      teacher, source, dtype="float64", in_advance=where == "device", batch_size=8, progress=None
    )
    fits = [
      train.fit(
        dense(4, param_dtype=jnp.float64),
        recipes.kd(temperature=2.0),
        data=one,
        optimizer=optax.sgd(0.05, momentum=0.9),
        steps=400,
        teacher=given,
        run=SILENT,
      )
      for one, given in ((source, teacher), (cached, None))
    ]
    # Losses are weighed in float32 in places, so rounding shows; but it is not amplified.
    assert_close(*fits, 1e-9)
  with pytest.raises(ValueError, match="needs jax.enable_x64"):
    teachers.cached(teacher, source, dtype="float64", progress=None)


def test_float16_is_rounded_and_comes_back_as_float32(examples, teacher):
  source = source_of("on_device", examples)
  exact, half = (
    teachers.cached(teacher, source, dtype=dtype, in_advance=True, progress=None)
    for dtype in ("float32", "float16")
  )
  item = jax.tree.map(lambda leaf: leaf[0], source.items(0, 1))
  logits = [one.cut(one.shared, item).teacher.logits for one in (exact, half)]
  assert logits[1].dtype == jnp.float32
  np.testing.assert_allclose(*logits, rtol=2**-11)
  assert not np.array_equal(*logits)
  assert half.shared[1]["logits"].nbytes == exact.shared[1]["logits"].nbytes // 2
  huge = Teacher({}, lambda _, batch: Outputs(logits=1e5 * jnp.ones((len(batch.index), 3))))
  with pytest.raises(ValueError, match="or a number that float16 has not"):
    teachers.cached(huge, source, dtype="float16", in_advance=True, progress=None)
  assert teachers.cached(huge, source, in_advance=True, progress=None).whole


@pytest.mark.slow
def test_features_of_an_ensemble(examples, teacher):
  name, members = "1/mid", [teacher, frozen(dense(8, norm=True), key=4)]
  teach = teachers.ensemble(members, rule="log_mean_probability")
  objective = recipes.combine(recipes.kd(), recipes.hint("mid", name))
  source = source_of("streamed", examples)
  cached = teachers.cached(teach, source, features=[name], batch_size=8, progress=None)
  batch = cached.cut(None, jax.tree.map(lambda leaf: leaf[0], cached.items(0, 1)))
  assert sorted(batch.teacher.features) == [name]
  assert_close(
    run(source, teach, objective=objective, steps=20),
    run(cached, objective=objective, steps=20),
    1e-5,
  )
  with pytest.raises(ValueError, match=rf"features has \['last'\].*it has .*{name}"):
    teachers.cached(teach, source, features=["last"])


@pytest.mark.slow
@pytest.mark.parametrize("in_advance", [True, False])
def test_several_seeds_take_a_cache_each(examples, teacher, in_advance):
  source, seeds = source_of("on_device", examples), (3, 5)
  caches = [
    teachers.cached(
      teacher,
      dataclasses.replace(source, data_seed=seed),
      in_advance=in_advance,
      batch_size=8,
      progress=None,
    )
    for seed in seeds
  ]
  assert_close(in_the_step("on_device", seeds), run(caches, seed=seeds), 1e-5)
  with pytest.raises(ValueError, match=r"data_seed=4, but .* for data_seed=3, and what crop\(1\)"):
    dataclasses.replace(caches[0], data_seed=4).items(0, 1)


def test_the_teacher_is_not_run_again(examples):
  calls = []

  def counted(variables, batch):
    jax.debug.callback(lambda: calls.append(1))
    return Outputs(logits=jnp.zeros((len(batch.index), 3)))

  source = source_of("on_device", examples)
  cached = teachers.cached(Teacher({}, counted), source, batch_size=10, progress=None)
  assert not calls
  cached.items(0, 1)
  jax.effects_barrier()
  assert len(calls) == 2
  cached.items(0, 40 * source.steps_per_epoch)
  cached.items(3, 7)
  jax.effects_barrier()
  assert len(calls) == 2 * 3


def test_what_tells_teachers_apart(teacher):
  mine = Teacher({}, teacher.apply)
  made = [
    teacher,
    teachers.ensemble([teacher, teacher]),
    teachers.ensemble([teacher, teacher], rule="mean_log_probability"),
    teachers.ensemble([teacher, teacher], weights=[1, 3]),
    teachers.subset(teacher, [0, 1]),
    teachers.subset(teacher, [1, 0]),
    teachers.grouped(teacher, [0, 0, 1]),
    teachers.grouped(teachers.subset(teacher, [0, 1]), [0, 1]),
    mine,
    dataclasses.replace(mine, asked="at night"),
    teachers.subset(dataclasses.replace(mine, asked="at night"), [0, 1]),
  ]
  assert len({str(_identity.asked_of(one)) for one in made}) == len(made)


def refused(examples, teacher):
  source = source_of("on_device", examples)
  rows = [{"x": x, "label": 0} for x in examples.inputs]
  stream = data.iterated(
    lambda epoch: rows,
    data.Fields(inputs="x", num_classes=3),
    size=SIZE,
    batch_size=4,
    data_seed=0,
    views=2,
  )
  done = teachers.cached(teacher, source, progress=None)
  head = Head(jnp.zeros((3, 1000)))
  hidden = Teacher({}, lambda _, batch: Outputs(hidden=jnp.zeros((len(batch.index), 3)), head=head))
  no_logits = Teacher({}, lambda _, batch: Outputs(hidden=batch.inputs, head=1))
  return {
    r"shows a new view of crop\(1\) in every epoch.*views=8": {
      "source": source_of("on_device", examples, views=None)
    },
    "a new view of custom in every epoch": {
      "source": source_of(
        "on_device",
        examples,
        views=None,
        augmentation=data.Augmentation(lambda x, key: x, choices=None),
      )
    },
    "only iterates": {"source": stream},
    "brings a teacher's outputs along already": {"source": done},
    "mix the sources first": {"source": lambda: data.mixed(done, source, share=0.5)},
    r"must be a Teacher; make one by teachers.frozen\(model\)": {"teacher": dense(8)},
    "teacher=3 must be a Teacher": {"teacher": 3},
    "must return Outputs": {"teacher": Teacher({}, lambda variables, batch: batch.inputs)},
    "has a transform, which changes the inputs": {
      "source": data.transformed(source, lambda key, batch: batch)
    },
    "puts out no logits": {"teacher": no_logits},
    # What it would take a token: hidden states, logits, and the most likely tokens.
    r"hidden states and a head.* 6 bytes.* 2,000 bytes.* 136": {"teacher": hidden},
    "source must be a Source": {"source": examples},
    "dtype='int8' must be one of float16, float32, float64": {"dtype": "int8"},
    "features='mid' must be a sequence": {"features": "mid"},
    "limit=0 must be at least 1": {"limit": 0},
    "in_advance=1 must be True or False": {"in_advance": 1},
    r"would take 7.2e-07 GB \(3 views of 20 examples, each logits float32\[3\]\), and limit=700": {
      "limit": 700
    },
    "the teacher's logits in view 0 hold NaN": {
      "teacher": jax.tree.map(lambda leaf: leaf * jnp.nan, teacher)
    },
  }


def test_what_cannot_be_cached_says_so_before_the_work(examples, teacher):
  for message, options in refused(examples, teacher).items():
    options = {"teacher": teacher, "in_advance": True, **options}
    source = options.pop("source", source_of("on_device", examples))
    with untyped(), pytest.raises((TypeError, ValueError), match=message):
      teachers.cached(
        options.pop("teacher"),
        source() if callable(source) else source,
        progress=None,
        **options,
      )


def test_records_bring_the_ids_of_their_set(tfds_dir, tmp_path):
  opened = data.records("cifar100", "test[:9]", data_dir=tfds_dir)
  whole = data.load("cifar100", "test[:9]", data_dir=tfds_dir)
  assert opened.read_ids() == whole.ids.tolist()
  assert whole.ids[0].startswith("test_")
  sums = Teacher({}, lambda _, batch: Outputs(logits=batch.inputs.sum((1, 2))))
  options = {"batch_size": 3, "data_seed": 0}
  streamed = teachers.cached(
    sums, data.streamed(opened, **options), folder=tmp_path / "cache", progress=None
  )
  # The same examples from memory find their rows by id.
  again = teachers.cached(None, data.on_device(whole, **options), folder=tmp_path / "cache")
  for one in (streamed, again):
    batch = one.cut(one.shared, jax.tree.map(lambda leaf: leaf[0], one.items(1, 1)))
    np.testing.assert_allclose(
      batch.teacher.logits, batch.inputs.sum((1, 2)), rtol=1e-5
    )  # 1024 in another order
