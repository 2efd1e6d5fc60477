"""Pictures changed on the host as they are read: exact by view, in any order, thread or process."""

import threading

import jax
import numpy as np
import optax
import pytest

from jaxdistill import data, losses, teachers, train
from jaxdistill.types import Outputs, Teacher, Term
from small_networks import dense, untyped

SIZE, SIDE = 13, 8
STEPS = (data.random_resized_crop(SIDE), data.colour_jitter())


class Pictures:
  """Pictures of many sizes, as a set of photographs has them."""

  def __len__(self):
    return SIZE

  def __getitem__(self, row):
    rng = np.random.default_rng(row)
    shape = (10 + row % 4, 14 - row % 5, 3)
    return {"image": rng.integers(0, 256, shape, np.uint8), "label": row % 3}


def source_of(*, on_host=STEPS, views=3, data_seed=7, **options):
  records = data.from_sequence(Pictures(), data.Fields(num_classes=3), name="photographs")
  options = {"batch_size": 4, "on_host": on_host, "views": views, **options}
  return data.streamed(records, data_seed=data_seed, **options)


def test_a_view_is_the_same_whenever_and_however_it_is_asked_for():
  source = source_of()
  items = source.items(0, 12)  # four epochs of three steps
  assert items["inputs"].shape == (12, 4, SIDE, SIDE, 3)
  assert items["inputs"].dtype == np.uint8
  shown = {}
  for step in range(12):
    for index, image in zip(items["index"][step], items["inputs"][step], strict=True):
      shown.setdefault((int(index), step // 3 % 3), []).append(image)
  assert any(len(images) == 2 for images in shown.values())  # of the fourth epoch
  for images in shown.values():
    np.testing.assert_array_equal(images[0], images[-1])
  distinct = {image.tobytes() for images in shown.values() for image in images}
  assert len(distinct) == len(shown)
  # From the middle, in other hands, and one view of all of them.
  again = source_of(prefetch=1).items(5, 2)
  np.testing.assert_array_equal(again["inputs"], items["inputs"][5:7])
  (first, *_) = source.whole.every(7, 5, 1)
  for index, image in zip(first["index"], first["inputs"], strict=True):
    if (int(index), 1) in shown:
      np.testing.assert_array_equal(image, shown[int(index), 1][0])
  parts = [source.items(3, 1, (p, 2))["inputs"] for p in range(2)]
  np.testing.assert_array_equal(np.concatenate(parts, 1), items["inputs"][3:4])
  assert not np.array_equal(source_of(data_seed=8).items(0, 1)["inputs"], items["inputs"][:1])
  assert source.augmentation == f"{STEPS[0].name} then {STEPS[1].name}"


@pytest.mark.slow
def test_workers_show_the_same():
  np.testing.assert_array_equal(
    source_of(workers=2).items(0, 4)["inputs"], source_of().items(0, 4)["inputs"]
  )


def test_rectangles_are_within_the_picture_and_as_large_as_asked():
  # A picture whose pixels say where they are: what comes out says what was cut out.
  high, wide = 60, 90
  rows, columns = np.mgrid[:high, :wide].astype(np.uint8)
  image = np.stack([rows, columns, columns], -1)
  crop, rng = data.random_resized_crop(30, scale=(0.25, 0.5), flip=0.5), np.random.default_rng(0)
  shares, ratios, mirrored = [], [], []
  for _ in range(300):
    made = crop.apply(image, rng.random).astype(float)
    height = (made[-1, 0, 0] - made[0, 0, 0]) * 30 / 29
    width = (made[0, -1, 1] - made[0, 0, 1]) * 30 / 29
    mirrored.append(width < 0)
    shares.append(abs(width) * height / (high * wide))
    ratios.append(abs(width) / height)
  # Resizing averages a pixel or two of 30 away at the edges.
  assert 0.22 < min(shares) < 0.3 < 0.45 < max(shares) < 0.54
  assert 0.7 < min(ratios) < 0.85 < 1.2 < max(ratios) < 1.43
  assert 0.4 < np.mean(mirrored) < 0.6  # 3.5 standard errors
  whole = data.random_resized_crop(30, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
  middle = whole.apply(image, rng.random)  # no square has the area: the largest in the middle
  assert middle[0, 0].tolist()[0] < 2
  assert abs(int(middle[0, 0, 1]) - 15) < 2
  assert data.central_crop(20, edge=30)(image).shape == (20, 20, 3)


def test_colours_change_as_they_are_said_to():
  image = np.random.default_rng(0).integers(60, 190, (5, 5, 3), np.uint8)
  for amounts in ({"brightness": 0.3}, {"contrast": 0.3}, {"saturation": 0.3}):
    zero = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0}
    draws = iter([0.1, 0.2, 0.3] + [1 - 1e-9] * 3)  # the order, and the largest factors
    made = data.colour_jitter(**{**zero, **amounts}).apply(image, lambda draws=draws: next(draws))
    grey = image.astype(float) @ [0.299, 0.587, 0.114]
    around = {"brightness": 0.0, "contrast": grey.mean(), "saturation": grey[..., None]}
    expected = around[next(iter(amounts))]
    expected = np.clip(expected + 1.3 * (image - expected), 0, 255)
    np.testing.assert_allclose(made, expected, atol=1)  # rounded to whole numbers


def test_a_cache_of_what_the_host_shows_is_exact(tmp_path):
  source = source_of()
  sums = Teacher({}, lambda _, batch: Outputs(logits=batch.inputs.sum((1, 2))))
  cached = teachers.cached(sums, source, folder=tmp_path / "c", batch_size=4, progress=None)
  batch = cached.cut(cached.shared, jax.tree.map(lambda leaf: leaf[0], cached.items(4, 1)))
  np.testing.assert_allclose(batch.teacher.logits, batch.inputs.sum((1, 2)), rtol=1e-5)
  with pytest.raises(ValueError, match="augmentation: "):
    teachers.cached(sums, source_of(on_host=STEPS[0]), folder=tmp_path / "c", progress=None)
  with pytest.raises(ValueError, match="in every epoch"):
    teachers.cached(sums, source_of(views=None), progress=None)


def test_what_does_not_fit_is_refused():
  with untyped(), pytest.raises(TypeError, match="on_host has"):
    source_of(on_host=[lambda image: image])
  for name, options in {"scale": {"scale": (0.0, 1.0)}, "flip": {"flip": 2}}.items():
    with pytest.raises(ValueError, match=name):
      data.random_resized_crop(8, **options)
  with pytest.raises(ValueError, match="ratio"):
    data.random_resized_crop(8, ratio=(2.0, 1.0))
  with pytest.raises(ValueError, match="brightness"):
    data.colour_jitter(brightness=-1)
  with pytest.raises(ValueError, match="edge=3"):
    data.central_crop(4, edge=3)
  fields = data.Fields(num_classes=3, transform=lambda row: row["image"])
  with pytest.raises(ValueError, match="transform"):
    data.streamed(
      data.from_sequence(Pictures(), fields), batch_size=4, data_seed=0, on_host=STEPS[0]
    )


def test_the_next_batch_is_read_while_a_step_runs():
  """A step waits until the next batch was read: it would wait in vain, if reading waited for it."""
  step_of = np.argsort(data.epoch_order(0, 0, 64)) // 8  # of each row
  read = [threading.Event() for _ in range(8)]
  seen = []

  class Rows:
    def __len__(self):
      return 64

    def __getitem__(self, row):
      read[step_of[row]].set()
      return {"image": np.full(4, row, np.float32), "label": row % 3}

  def objective(student, teacher, batch):
    def wait(row):
      seen.append(read[step_of[row] + 1].wait(20))

    jax.debug.callback(wait, batch.index[0])
    return {"labels": Term(losses.cross_entropy(student.logits, batch.labels))}

  records = data.from_sequence(Rows(), data.Fields(num_classes=3))
  train.fit(
    dense(4),
    objective,
    data=data.streamed(records, batch_size=8, data_seed=0, prefetch=1),
    optimizer=optax.sgd(0.1),
    steps=7,
    dispatch=train.with_jit(train.data_parallel(jax.devices()[:1]), scan=False),
    watch=train.Watch(log_every=1),
    run=train.Run(progress=None),
  )
  jax.effects_barrier()
  assert seen == [True] * 7
