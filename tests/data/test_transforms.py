"""Mixed batches: what is mixed with what, in which share, and what stays out of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import small_networks
from jaxdistill import losses, recipes, teachers
from jaxdistill.data import transforms
from jaxdistill.train import init_state, make_step
from jaxdistill.types import Model, Outputs, make_batch

SIZE, CLASSES, COUNT = 6, 4, 1000
LABELS = [0, 1, 2, 3, 1, 0]
# A mixed row is share * mine + (1 - share) * partner's, in float32: two roundings of numbers below
# 10, twice (here and there).
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def flat(**options):
  """Row i is around i."""
  rows = np.random.default_rng(0).normal(size=(SIZE, 3)) + np.arange(SIZE)[:, None]
  return make_batch(jnp.asarray(rows, jnp.float32), jnp.asarray(LABELS, jnp.int32), **options)


def images(height=9, width=6):
  """Row i is i everywhere."""
  rows = jnp.arange(SIZE, dtype=jnp.float32).reshape(-1, 1, 1, 1)
  ones = jnp.ones((SIZE, height, width, 2))
  return make_batch(rows * ones, jnp.asarray(LABELS, jnp.int32))


MAKE = {"mixup": (transforms.mixup, flat), "cutmix": (transforms.cutmix, images)}
mixers = pytest.mark.parametrize("name", list(MAKE))


@functools.cache
def program(name):
  """A thousand mixtures of one batch with SIZE classes, compiled once for all tests."""
  with jax.numpy_dtype_promotion("strict"):
    keys = jax.random.split(jax.random.key(0), COUNT)
    every = jax.jit(jax.vmap(MAKE[name][0](SIZE), in_axes=(0, None)))
    return functools.partial(every.lower(keys, distinct(name)).compile(), keys)


def distinct(name, **options):
  """With a class of its own for every row, labels are the mixture itself, [rows, examples].

  Inputs are a tree of two.
  """
  batch = MAKE[name][1]()
  second = batch.inputs.astype(jnp.uint8) if name == "cutmix" else 2 * batch.inputs[:, :1, None]
  tree = {"first": batch.inputs, "second": (second,)}
  return dataclasses.replace(batch, inputs=tree, labels=jnp.eye(SIZE), **options)


@mixers
def test_one_share_for_the_batch_and_partners_are_a_permutation(name):
  mixed = np.asarray(program(name)(distinct(name)).labels, np.float64)
  # Every example is in the batch with a whole in all.
  np.testing.assert_allclose(mixed.sum(axis=1), 1, rtol=1e-6)
  np.testing.assert_allclose(mixed.sum(axis=2), 1, rtol=1e-6)
  for shares in np.diagonal(mixed, axis1=1, axis2=2):
    # One that is its own partner is whole; the others have one share.
    others = shares[shares < 1 - 1e-6]
    assert others.size == 0 or np.ptp(others) < 1e-6
  partners = np.argmax(mixed * (1 - np.eye(SIZE)), axis=2)
  assert len({tuple(p) for p in partners}) > 300  # drawn anew with every key


def test_mixup_mixes_inputs_and_labels_in_one_share():
  batch = distinct("mixup")
  mixed = program("mixup")(batch)
  weights, rows = (np.asarray(x, np.float64) for x in (mixed.labels, batch.inputs["first"]))
  np.testing.assert_allclose(mixed.inputs["first"], weights @ rows, **TOLERANCE)
  wanted = 2 * weights @ rows[:, :1]
  np.testing.assert_allclose(mixed.inputs["second"][0][..., 0], wanted, **TOLERANCE)


def test_cutmix_pastes_one_box_and_counts_its_pixels():
  mixed, sizes = program("cutmix")(distinct("cutmix")), set()
  pasted = np.asarray(mixed.inputs["first"])
  for inputs, labels in zip(pasted, np.asarray(mixed.labels), strict=True):
    boxes = set()
    for i, image in enumerate(inputs[..., 0]):
      counts = np.bincount(image.astype(int).reshape(-1), minlength=SIZE)
      np.testing.assert_allclose(labels[i], counts / (9 * 6), atol=1e-7)
      foreign = image != i
      if foreign.any():
        rows, columns = np.flatnonzero(foreign.any(1)), np.flatnonzero(foreign.any(0))
        box = (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1)
        assert foreign[box[0] : box[1], box[2] : box[3]].all()
        assert np.ptp(image[foreign]) == 0
        boxes.add(box)
    assert len(boxes) <= 1  # the same for every row
    sizes.update((b[1] - b[0], b[3] - b[2]) for b in boxes)
  np.testing.assert_array_equal(pasted[..., 0], pasted[..., 1])
  # Images as they are stored are pasted just so.
  (stored,) = mixed.inputs["second"]
  assert stored.dtype == jnp.uint8
  np.testing.assert_array_equal(stored, pasted)
  # Sides below 9 and 6 made even, so up to 8 and 4, and shorter ones where the edge cuts them off.
  assert {height for height, _ in sizes} == set(range(1, 9))
  assert {width for _, width in sizes} == set(range(1, 5))


def test_cutmixs_boxes_are_as_large_as_published():
  # By their code in NumPy, with as many draws: sides from the root of the share, cut off at edges.
  rng = np.random.default_rng(0)
  side = np.sqrt(1 - rng.beta(1.0, 1.0, size=COUNT))
  areas = np.ones(COUNT)
  for length in (9, 6):
    half, centre = (side * length).astype(int) // 2, rng.integers(0, length, COUNT)
    low, high = np.clip(centre - half, 0, length), np.clip(centre + half, 0, length)
    areas *= (high - low) / length
  mixed = np.asarray(program("cutmix")(distinct("cutmix")).labels)
  ours = 1 - np.min(np.diagonal(mixed, axis1=1, axis2=2), axis=1)
  # Five standard errors of the difference of two means.
  assert abs(ours.mean() - areas.mean()) < 5 * np.sqrt((ours.var() + areas.var()) / COUNT)


def test_shares_are_betas():
  mixed = np.asarray(program("mixup")(distinct("mixup")).labels, np.float64)
  shares = np.min(np.diagonal(mixed, axis1=1, axis2=2), axis=1)
  shares = shares[shares < 1]  # one permutation in 720 is the identity
  assert len(shares) > COUNT - 20
  variance = 1 / (4 * (2 * 0.2 + 1))
  # Five standard errors; (share - 1/2)^2 has a range of 1/4 and so a variance of at most 1/64.
  assert abs(shares.mean() - 0.5) < 5 * np.sqrt(variance / COUNT)
  assert abs(shares.var() - variance) < 5 * np.sqrt(1 / 64 / COUNT)


@pytest.mark.parametrize("concentration", [1e-4, 1e4])
def test_concentration_goes_from_originals_to_halves(concentration):
  transform = transforms.mixup(SIZE, concentration=concentration)
  for seed in range(10):
    mixed = transform(jax.random.key(seed), dataclasses.replace(flat(), labels=jnp.eye(SIZE)))
    shares = np.asarray(mixed.labels)
    # Beta(1e-4, 1e-4) is within 1e-3 of 0 or 1 but once in a thousand times; Beta(1e4, 1e4) has a
    # standard deviation of 0.0035.
    near = [0, 1] if concentration < 1 else [0, 0.5, 1]
    assert np.min(np.abs(shares[..., None] - np.array(near)), axis=-1).max() < 0.02
    if concentration < 1:
      rows = np.asarray(flat().inputs)[shares.argmax(axis=1)]
      np.testing.assert_allclose(mixed.inputs, rows, atol=1e-2)


def test_distributions_mix_as_integers_do(strict_promotion):
  transform, batch = transforms.mixup(SIZE), flat()
  hot = dataclasses.replace(batch, labels=jax.nn.one_hot(batch.labels, SIZE))
  short = dataclasses.replace(batch, labels=batch.labels.astype(jnp.uint8))
  first = transform(jax.random.key(1), batch)
  for other in (hot, short):
    np.testing.assert_array_equal(first.labels, transform(jax.random.key(1), other).labels)
  assert first.labels.dtype == jnp.float32
  np.testing.assert_allclose(first.labels.sum(axis=1), 1, rtol=1e-6)


@mixers
def test_nothing_leaks_from_rows_without_label_or_weight(name):
  labelled = jnp.array([1.0, 0.0, 1.0, 0.0, 1.0, 1.0])
  weight = jnp.array([1.0, 1.0, 0.0, 1.0, 0.5, 1.0])
  # What stands for a label that is not known may be anything.
  labels = jnp.where(labelled[:, None] > 0, jnp.eye(SIZE), jnp.nan)
  partial = dataclasses.replace(distinct(name), labels=labels, labelled=labelled, weight=weight)
  mixed, whole = program(name)(partial), program(name)(distinct(name))
  # (1 + i) (1 + partner), with the same keys and so the same partners.
  numbered = program(name)(distinct(name, weight=1.0 + jnp.arange(SIZE)))
  partner = np.round(np.asarray(numbered.weight) / (1 + np.arange(SIZE))).astype(int) - 1
  assert np.all(np.sort(partner, axis=1) == np.arange(SIZE))
  labelled, weight = np.asarray(labelled), np.asarray(weight)
  np.testing.assert_array_equal(mixed.labelled, labelled * labelled[partner])
  np.testing.assert_array_equal(mixed.weight, weight * weight[partner])
  both = (labelled * labelled[partner]).astype(bool)
  assert both.any()
  assert not both.all()
  np.testing.assert_array_equal(np.asarray(mixed.labels)[~both], 0)
  np.testing.assert_array_equal(np.asarray(mixed.labels)[both], np.asarray(whole.labels)[both])
  np.testing.assert_array_equal(mixed.index, np.broadcast_to(partial.index, mixed.index.shape))
  np.testing.assert_array_equal(mixed.view, np.broadcast_to(partial.view, mixed.view.shape))


def test_bfloat16_inputs_are_mixed_in_float32(strict_promotion):
  half = dataclasses.replace(flat(), inputs=flat().inputs.astype(jnp.bfloat16))
  exact = dataclasses.replace(half, inputs=half.inputs.astype(jnp.float32))
  transform = transforms.mixup(SIZE, concentration=1.0)
  mixed, wanted = (transform(jax.random.key(1), batch).inputs for batch in (half, exact))
  assert mixed.dtype == jnp.bfloat16
  np.testing.assert_array_equal(mixed, wanted.astype(jnp.bfloat16))
  assert np.any(wanted != exact.inputs)


def test_token_weights_are_multiplied():
  weight = jnp.ones((SIZE, 2)).at[0].set(0.0)
  mixed = transforms.mixup(SIZE)(jax.random.key(0), flat(weight=weight))
  assert mixed.weight.shape == (SIZE, 2)
  assert 1 <= int((mixed.weight[:, 0] == 0).sum()) <= 2


def test_smoothing_is_the_losses_smoothing(strict_promotion):
  labelled = jnp.array([1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
  batch = flat(labelled=labelled)
  smoothed = transforms.smooth_labels(CLASSES, amount=0.2)(jax.random.key(0), batch)
  wanted = 0.8 * np.eye(CLASSES)[LABELS] + 0.2 / CLASSES
  wanted[1] = 0
  np.testing.assert_allclose(smoothed.labels, wanted, rtol=1e-6)
  assert smoothed.inputs is batch.inputs
  logits = jnp.asarray(np.random.default_rng(1).normal(size=(SIZE, CLASSES)), jnp.float32)
  ours = losses.cross_entropy(logits, smoothed.labels)
  theirs = losses.cross_entropy(logits, batch.labels, label_smoothing=0.2)
  np.testing.assert_allclose(ours[labelled == 1], theirs[labelled == 1], rtol=1e-5)
  assert float(ours[1]) == 0
  # A batch with its teacher's outputs is as good as any: inputs stay.
  cached = dataclasses.replace(batch, teacher=Outputs(logits))
  assert transforms.smooth_labels(CLASSES)(jax.random.key(0), cached).teacher is not None


def test_smoothing_commutes_with_mixing():
  mix, smooth = transforms.mixup(CLASSES), transforms.smooth_labels(CLASSES)
  key, batch = jax.random.key(2), flat()
  np.testing.assert_allclose(
    mix(key, smooth(key, batch)).labels, smooth(key, mix(key, batch)).labels, rtol=1e-5, atol=1e-7
  )


def test_composed_transforms_have_keys_of_their_own():
  seen = []

  def spy(key, batch):
    seen.append(jax.random.key_data(key).tolist())
    return dataclasses.replace(batch, view=batch.view + len(seen))

  batch = transforms.compose(spy, spy, spy)(jax.random.key(0), flat())
  assert len({tuple(k) for k in seen}) == 3
  assert batch.view.tolist() == [6] * SIZE
  assert transforms.compose()(jax.random.key(0), batch) is batch
  unchecked = getattr(transforms.compose, "__wrapped__", transforms.compose)
  with pytest.raises(TypeError, match=r"transforms\[0\]=\[.*not a list"):
    unchecked([spy])


def cross_entropy(logits, labels):
  logits = logits.astype(np.float64)
  shifted = logits - logits.max(axis=1, keepdims=True)
  return -np.sum(labels * (shifted - np.log(np.exp(shifted).sum(1, keepdims=True))), axis=1)


@pytest.mark.slow
def test_kd_trains_on_mixed_batches_of_each_seeds_own():
  transform = transforms.compose(transforms.mixup(CLASSES), transforms.smooth_labels(CLASSES))
  batch = flat(labelled=jnp.array([1.0, 0.0, 1.0, 1.0, 1.0, 1.0]))
  seen = []

  def spied(key, batch):
    seen.append(transform(key, batch))
    return seen[-1]

  student, network = (small_networks.dense(width, classes=CLASSES) for width in (5, 7))
  variables = jax.jit(network.init)(jax.random.key(1), batch.inputs)
  teacher, optimizer = teachers.frozen(Model(network, variables)), optax.sgd(0.1)
  objective = recipes.kd(temperature=2.0)
  run = make_step(student, objective, optimizer, transform=spied)

  def train(key):
    state = init_state(key, student, objective, optimizer, batch, teacher=teacher)
    after, sums = run(state, teacher, batch)
    mixed = seen.pop()
    # What both networks say of the mixed batch.
    logits = student.apply({"params": state.params}, mixed.inputs, train=False, key=None)[0].logits
    return sums, mixed, logits, teacher(mixed).logits, (state.params, after.params)

  sums, mixed, logits, target, params = jax.jit(jax.vmap(train))(
    jax.random.split(jax.random.key(0), 2)
  )
  assert not np.array_equal(mixed.inputs[0], mixed.inputs[1])
  assert "accuracy" not in sums
  assert all(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, params), strict=True))
  mask, labels = np.asarray(mixed.labelled), np.asarray(mixed.labels, np.float64)
  assert 1 <= mask.sum() < 2 * SIZE
  hard = np.sum(labels * surprise(logits), axis=2)
  soft = np.exp(-surprise(target / 2))
  divergence = 4 * np.sum(soft * (surprise(logits / 2) - surprise(target / 2)), axis=2)
  # Logits of order 1 in float32, a handful of roundings; the divergence is a difference.
  np.testing.assert_allclose(sums["labels"][0], (hard * mask).sum(axis=1), rtol=1e-5)
  np.testing.assert_allclose(sums["labels"][1], mask.sum(axis=1))
  np.testing.assert_allclose(sums["soft"][0], divergence.sum(axis=1), rtol=1e-4)


def surprise(logits):
  """Minus the log-probabilities of all classes."""
  logits = np.asarray(logits, np.float64)
  return np.log(np.exp(logits).sum(axis=-1, keepdims=True)) - logits


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: transforms.mixup(0), r"num_classes=0 must be at least 1"),
    (lambda: transforms.cutmix(-1), r"num_classes=-1"),
    (lambda: transforms.smooth_labels(0), r"num_classes=0"),
    (lambda: transforms.mixup(3, concentration=0.0), r"concentration=0.0.*leave the transform out"),
    (lambda: transforms.cutmix(3, concentration=-1.0), r"concentration=-1.0 must be positive"),
    (lambda: transforms.mixup(3, concentration=np.nan), r"concentration=nan"),
    (lambda: transforms.smooth_labels(3, amount=1.5), r"amount=1.5 must be in \[0, 1\]"),
  ],
)
def test_bad_arguments_say_what_to_do(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_batches_that_do_not_fit_say_so():
  key = jax.random.key(0)
  stored = dataclasses.replace(images(), inputs={"image": jnp.zeros((SIZE, 4, 4, 3), jnp.uint8)})
  with pytest.raises(ValueError, match=r"inputs\['image'\] is uint8; normalise to floats first"):
    transforms.mixup(CLASSES)(key, stored)
  with pytest.raises(ValueError, match=r"images \[B, H, W, C\].*\(6, 3\).*use mixup"):
    transforms.cutmix(CLASSES)(key, flat())
  two = {"a": jnp.zeros((SIZE, 4, 4, 3)), "b": jnp.zeros((SIZE, 8, 4, 3))}
  with pytest.raises(ValueError, match="of one size"):
    transforms.cutmix(CLASSES)(key, dataclasses.replace(images(), inputs=two))
  cached = dataclasses.replace(images(), teacher=Outputs(jnp.zeros((SIZE, CLASSES))))
  for mix in (transforms.mixup(CLASSES), transforms.cutmix(CLASSES)):
    with pytest.raises(ValueError, match=r"brings batch.teacher along.*a teacher that sees"):
      mix(key, cached)
  for labels in (jnp.zeros((SIZE, 3)), jnp.zeros((SIZE, CLASSES), jnp.int32), jnp.zeros(SIZE)):
    with pytest.raises(ValueError, match=r"needs labels \[B\] of integers or \[B, 4\] of floats"):
      transforms.smooth_labels(CLASSES)(key, dataclasses.replace(flat(), labels=labels))


# --- Labels that lie on the images. ---


def masks(**options):
  """Row i is i everywhere, and its mask the number of the pixel, with i in front."""
  batch = images(4, 5)
  numbers = jnp.arange(20, dtype=jnp.int32).reshape(1, 4, 5)
  of_rows = 100 * jnp.arange(SIZE, dtype=jnp.int32).reshape(-1, 1, 1)
  return dataclasses.replace(batch, labels=numbers + of_rows, **options)


@pytest.mark.slow
def test_cutmix_moves_masks_with_their_images_and_what_says_which_pixels_count():
  labelled = jnp.ones((SIZE, 4, 5)).at[2].set(0.0).at[:, 0, 0].set(0.0)
  batch = masks(labelled=labelled, weight=jnp.array([1.0, 1, 1, 1, 0, 1]))
  mix = jax.jit(jax.vmap(transforms.cutmix(3), (0, None)))
  mixed = mix(jax.random.split(jax.random.key(0), 50), batch)
  assert mixed.labels.dtype == jnp.int32
  source = np.asarray(mixed.inputs)[..., 0].astype(int)  # whose pixel it is
  assert np.any(source != np.arange(SIZE).reshape(1, -1, 1, 1))
  pixels = np.arange(20).reshape(4, 5)
  np.testing.assert_array_equal(mixed.labels, 100 * source + pixels)
  known = np.asarray(labelled)[source, *np.indices((4, 5))[:, None, None]]
  np.testing.assert_array_equal(mixed.labelled, known)
  # A weight of each example is the product of both parts', as without masks.
  plain = mix(
    jax.random.split(jax.random.key(0), 50),
    dataclasses.replace(
      batch, labels=jnp.zeros(SIZE, jnp.int32)[:, None, None] + jnp.zeros((1, 4, 5), jnp.int32)
    ),
  )
  np.testing.assert_array_equal(mixed.weight, plain.weight)
  assert np.all(np.asarray(mixed.weight)[:, 4] == 0)
  assert mixed.weight.shape == (50, SIZE)
  # Of one label an image, or a weight of each pixel, they are of pixels afterwards.
  each = mix(
    jax.random.split(jax.random.key(0), 50),
    masks(labelled=jnp.array([1.0, 0, 1, 1, 1, 1]), weight=labelled),
  )
  np.testing.assert_array_equal(each.labelled, (source != 1).astype(float))
  np.testing.assert_array_equal(each.weight, known)
  # Depths, or what else lies there, as they are.
  depths = masks().labels[..., None].astype(jnp.float32)
  moved = mix(jax.random.split(jax.random.key(0), 50), dataclasses.replace(masks(), labels=depths))
  np.testing.assert_array_equal(moved.labels[..., 0], 100 * source + pixels)


def test_mixup_of_masks_mixes_each_pixels_distribution():
  classes = jnp.asarray(np.random.default_rng(1).integers(0, 3, (SIZE, 4, 5)), jnp.int32)
  labelled = jnp.ones((SIZE, 4, 5)).at[3, 1].set(0.0)
  batch = dataclasses.replace(masks(), labels=classes, labelled=labelled)
  mixed = jax.jit(transforms.mixup(3, concentration=1.0))(jax.random.key(2), batch)
  # Row i is i everywhere: what came of the first pixel says the share and the partner's number.
  rows = np.asarray(mixed.inputs, np.float64)[:, 0, 0, 0]
  hot, labels = np.eye(3)[np.asarray(classes)], np.asarray(mixed.labels, np.float64)
  assert labels.shape == (SIZE, 4, 5, 3)
  shares = {}
  for i in range(SIZE):
    # Of the partners that fit, the one whose pixels do, too: s i + (1 - s) j.
    fits = []
    for j in set(range(SIZE)) - {i}:
      share = (rows[i] - j) / (i - j)
      known = np.asarray(labelled[i] * labelled[j])[..., None]
      if -1e-6 <= share <= 1 + 1e-6:
        want = known * (share * hot[i] + (1 - share) * hot[j])
        if np.allclose(labels[i], want, atol=1e-4):
          fits.append((j, share))
          np.testing.assert_array_equal(mixed.labelled[i], known[..., 0])
    if abs(rows[i] - i) > 1e-5:
      assert len(fits) == 1
      shares[i] = fits[0][1]
  assert len(shares) > 1
  assert np.ptp(list(shares.values())) < 1e-4


def test_smoothed_masks_and_labels_that_lie_on_nothing():
  batch = dataclasses.replace(masks(), labels=masks().labels % 3)
  smooth = transforms.smooth_labels(3, amount=0.3)(jax.random.key(0), batch)
  want = 0.7 * np.eye(3)[np.asarray(batch.labels)] + 0.1
  np.testing.assert_allclose(smooth.labels, want, rtol=1e-6)
  small = dataclasses.replace(batch, labels=batch.labels[:, ::2, ::2])
  for transform in (transforms.mixup(3), transforms.cutmix(3), transforms.smooth_labels(3)):
    with pytest.raises(ValueError, match=r"got int32 of shape \(6, 2, 3\)"):
      transform(jax.random.key(0), small)
