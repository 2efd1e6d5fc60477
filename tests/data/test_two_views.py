"""Two views of each example in a batch, and the strong augmentation, against PIL's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

import small_networks
from jaxdistill import data, networks, recipes, teachers
from jaxdistill.data import _strong
from jaxdistill.data._views import augment
from jaxdistill.types import Model, Term

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (12, 8, 8, 1)).astype(np.uint8)
EXAMPLES = data.from_arrays(IMAGES, np.arange(12) % 3, num_classes=3)
PAIR = data.two_views(data.crop_flip(2), data.crop(2))


def pil(name, image, value):
  """The operation by PIL, of its value."""
  height, width = image.size[::-1]
  affine = Image.Transform.AFFINE
  made = {
    "identity": lambda: image,
    "autocontrast": lambda: ImageOps.autocontrast(image),
    "brightness": lambda: ImageEnhance.Brightness(image).enhance(value),
    "color": lambda: ImageEnhance.Color(image).enhance(value),
    "contrast": lambda: ImageEnhance.Contrast(image).enhance(value),
    "equalize": lambda: ImageOps.equalize(image),
    "posterize": lambda: ImageOps.posterize(image, int(value)),
    "sharpness": lambda: Image.blend(image.filter(ImageFilter.SMOOTH), image, value),
    "solarize": lambda: ImageOps.solarize(image, value),
    "rotate": lambda: image.rotate(value),
    "shear_x": lambda: image.transform(image.size, affine, (1, value, 0, 0, 1, 0)),
    "shear_y": lambda: image.transform(image.size, affine, (1, 0, 0, value, 1, 0)),
    "translate_x": lambda: image.transform(image.size, affine, (1, 0, value * width, 0, 1, 0)),
    "translate_y": lambda: image.transform(image.size, affine, (1, 0, 0, 0, 1, value * height)),
  }
  return np.asarray(made[name]())


def picture(channels):
  """Something with edges, flat parts and a small range, so that no operation is a trivial one."""
  rng = np.random.default_rng(channels)
  coarse = rng.integers(40, 200, (8, 8, channels)).repeat(4, 0).repeat(4, 1)
  return np.clip(coarse + rng.integers(-9, 9, coarse.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("share", [0.1, 0.62])
def test_each_operation_is_pils(channels, share):
  image = picture(channels)
  drawn = Image.fromarray(image[..., 0] if channels == 1 else image)
  names = [*_strong.PIXELS, *_strong.MOVES]
  numbers = jnp.arange(len(names), dtype=jnp.int32)
  change = jax.jit(jax.vmap(_strong.changed, (None, 0, None)))
  made = np.asarray(change(jnp.asarray(image, jnp.float32), numbers, jnp.float32(share)))
  seen = []
  for name, ours, (low, high) in zip(names, made, _strong._RANGES, strict=True):
    want = pil(name, drawn, low + share * (high - low)).reshape(image.shape).astype(float)
    apart = np.abs(ours - want)
    # A pixel may lie on the border of two, or a number between two whole ones.
    assert np.mean(apart > 1) < 0.01, (name, np.mean(apart > 1))
    assert np.mean(apart) < 0.5, (name, np.mean(apart))
    seen.append(np.any(want != image))
  # All but `identity`, and of one channel `color`, did something.
  assert sum(seen) >= len(names) - 2


@pytest.mark.slow
def test_rand_augment_draws_all_and_covers_with_grey():
  strong = data.rand_augment(operations=1, cutout=0.0)
  image = jnp.asarray(picture(3))
  keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(300))
  made = np.asarray(jax.jit(jax.vmap(strong.apply, (None, 0)))(image, keys))
  assert made.dtype == np.uint8
  assert len({row.tobytes() for row in made}) > 150
  square = data.rand_augment(operations=0, cutout=0.5)
  covered = np.asarray(jax.jit(jax.vmap(square.apply, (None, 0)))(image, keys))
  grey = np.all(covered == 127, axis=-1).sum((1, 2))
  assert grey.max() <= 17 * 17
  assert grey.max() > 12 * 12
  assert np.all((covered == np.asarray(image)) | (covered == 127))
  # Whatever white is stored as.
  digits = data.rand_augment(operations=0, cutout=0.0, largest=16.0)
  sixteen = jnp.arange(17, dtype=jnp.uint8)[:16].reshape(4, 4, 1)
  np.testing.assert_array_equal(digits.apply(sixteen, keys[0]), sixteen)


def sources(**options):
  options = {"batch_size": 4, "data_seed": 3, "augmentation": PAIR, "views": 2, **options}
  return [data.on_device(EXAMPLES, **options), data.streamed(EXAMPLES, **options)]


def cut(source, step):
  items = jax.tree.map(lambda leaf: leaf[0], source.items(step, 1))
  return jax.jit(source.cut)(source.shared, items)


@pytest.mark.slow
def test_a_batch_has_two_looks_and_one_label_wherever_its_rows_lie():
  # The strong look by a key, the weak one by a number.
  pair = data.two_views(data.crop_flip(2), data.rand_augment(after=data.crop(1)))
  mine, streamed = (cut(source, 5) for source in sources(augmentation=pair))
  jax.tree.map(np.testing.assert_array_equal, mine, streamed)
  assert sorted(mine.inputs) == ["strong", "weak"]
  assert {leaf.shape for leaf in mine.inputs.values()} == {(4, 8, 8, 1)}
  assert mine.labels.shape == mine.weight.shape == mine.index.shape == (4,)
  np.testing.assert_array_equal(mine.labels, np.asarray(mine.index) % 3)
  # Both are normalised, each by itself.
  assert all(np.max(leaf) <= 1 for leaf in mine.inputs.values())
  # The weak look is what the same augmentation shows alone.
  alone = cut(sources(augmentation=data.crop_flip(2))[0], 5)
  np.testing.assert_array_equal(alone.inputs, mine.inputs["weak"])


def test_looks_are_numbered_and_apart():
  source = sources()[0]
  steps = source.steps_per_epoch  # views come again in every other epoch, in another order

  def shown(epoch):
    batches = [cut(source, epoch * steps + i) for i in range(steps)]
    rows = {}
    for batch in batches:
      for i, index in enumerate(np.asarray(batch.index)):
        rows[int(index)] = {name: np.asarray(x[i]) for name, x in batch.inputs.items()}
    return rows

  first, second, third = (shown(epoch) for epoch in range(3))
  for index, looks in first.items():
    for name in ("weak", "strong"):
      np.testing.assert_array_equal(looks[name], third[index][name])
  assert any(np.any(first[i]["strong"] != second[i]["strong"]) for i in first)
  # The same augmentation twice gives two looks, each a uniform choice of its own.
  twice = data.two_views(data.crop(1), data.crop(1))
  made = jax.jit(lambda: augment(twice, jnp.asarray(IMAGES), 0, jnp.arange(12), 0))()
  same = [np.array_equal(a, b) for a, b in zip(made["weak"], made["strong"], strict=True)]
  assert sum(same) < 6


@pytest.mark.parametrize("weak", [data.identity, data.crop(1)])
def test_one_view_is_enough_where_neither_look_changes(weak):
  source = data.on_device(
    EXAMPLES, batch_size=4, data_seed=0, augmentation=data.two_views(weak, data.identity)
  )
  assert source.views == (1 if weak is data.identity else None)


def plain_network(width):
  return networks.linen(small_networks.Dense(width, norm=True, dropout=0.5), features=["mid"])


def network(width):
  return recipes.with_views(plain_network(width))


def test_a_network_sees_each_look_as_it_would_alone_and_moves_its_averages_twice():
  plain = plain_network(4)
  both, batch = recipes.with_views(plain), cut(sources()[0], 0)
  variables = both.init(jax.random.key(0), batch.inputs)
  jax.tree.map(
    np.testing.assert_array_equal, variables, plain.init(jax.random.key(0), batch.inputs["weak"])
  )
  key = jax.random.key(1)
  made, state = both.apply(variables, batch.inputs, train=True, key=key)
  weak, between = plain.apply(variables, batch.inputs["weak"], train=True, key=key)
  strong, after = plain.apply(
    {**variables, **between}, batch.inputs["strong"], train=True, key=jax.random.fold_in(key, 1)
  )
  np.testing.assert_array_equal(made.logits, weak.logits)
  np.testing.assert_array_equal(made.features["mid"], weak.features["mid"])
  seen = recipes.parts.strong_view(made, "student")
  np.testing.assert_array_equal(seen.logits, strong.logits)
  np.testing.assert_array_equal(seen.features["mid"], strong.features["mid"])
  jax.tree.map(np.testing.assert_array_equal, state, after)
  # One input, as in evaluation and deployment, is as before.
  alone, _ = both.apply(variables, batch.inputs["weak"], train=False, key=None)
  want, _ = plain.apply(variables, batch.inputs["weak"], train=False, key=None)
  jax.tree.map(np.testing.assert_array_equal, alone, want)
  with pytest.raises(ValueError, match="with_views"):
    recipes.parts.strong_view(alone, "student")


def fit(objective, source, teacher, **rest):
  return small_networks.fit(
    network(2),
    objective,
    data=source,
    optimizer=optax.sgd(1e-2),
    steps=6,
    teacher=teacher,
    log_every=1,
    **rest,
  )


@pytest.mark.slow
def test_a_cache_answers_both_looks_as_the_teacher_does():
  source = sources()[0]
  large = network(3)
  teacher = teachers.frozen(Model(large, large.init(jax.random.key(1), jnp.zeros((1, 8, 8, 1)))))
  kept = teachers.cached(teacher, source, features=["strong/logits"])
  objective = recipes.crld(weak_threshold=0.0, strong_threshold=0.0)
  live, cached = fit(objective, source, teacher), fit(objective, kept, None)
  assert set(live.history[0]) >= {"labels", "views"}
  for name in ("labels", "views", "loss"):
    assert live.history[-1][name] == pytest.approx(cached.history[-1][name], rel=1e-4)
  for a, b in zip(jax.tree.leaves(live.variables), jax.tree.leaves(cached.variables), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  # The deployed network is of one image.
  held_out = data.evaluation_batches(EXAMPLES, batch_size=6)
  assert live(jax.tree.map(lambda leaf: leaf[0], held_out)).logits.shape == (6, 3)


def test_mixup_mixes_both_looks_with_those_of_one_partner():
  batch = cut(sources()[0], 0)
  mixed = data.transforms.mixup(3, concentration=1.0)(jax.random.key(0), batch)
  rows = {
    (name, when): np.asarray(one.inputs[name], float).reshape(4, -1)
    for name in ("weak", "strong")
    for when, one in (("before", batch), ("after", mixed))
  }
  for i in range(4):
    found = {}
    for name in ("weak", "strong"):
      before, after = rows[name, "before"], rows[name, "after"][i]
      # Whose look it was mixed with, and how much: x' = s x_i + (1 - s) x_j, solved for s.
      for j in set(range(4)) - {i}:
        apart = before[i] - before[j]
        share = np.dot(after - before[j], apart) / np.dot(apart, apart)
        if np.allclose(share * before[i] + (1 - share) * before[j], after, atol=1e-5):
          found[name] = (j, round(share, 4))
          break
      else:
        assert np.allclose(before[i], after, atol=1e-5)  # its own partner
        found[name] = i
    assert found["weak"] == found["strong"]


def test_what_does_not_go_with_two_views_is_refused():
  with pytest.raises(TypeError, match="strong"):
    data.two_views(data.crop(1), 4)
  with pytest.raises(ValueError, match="weak='two_views"):
    data.two_views(PAIR, data.crop(1))
  masks = data.from_arrays(IMAGES, IMAGES[..., 0] % 3, num_classes=3)
  with pytest.raises(ValueError, match="two views with one label"):
    cut(data.on_device(masks, batch_size=4, data_seed=0, augmentation=PAIR), 0)
  one, two = sources(batch_size=4)[0], sources(augmentation=data.crop(1))[0]
  with pytest.raises(ValueError, match=r"give both data\.two_views"):
    cut(data.mixed(one, two, share=0.5), 0)
  both = cut(data.mixed(one, one, share=0.5), 0)
  assert both.inputs["strong"].shape == (4, 8, 8, 1)


@pytest.mark.slow
def test_a_plain_method_runs_on_the_weak_look():
  def objective(student, teacher, batch):
    return {"labels": Term(jnp.sum(student.logits**2, axis=-1))}

  fitted = fit(objective, sources()[0], None)
  assert np.isfinite(fitted.history[-1]["labels"])
