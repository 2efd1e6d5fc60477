"""Labels of any shape in two processes: training and evaluation give the numbers of one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import small_networks
import test_processes
from jaxdistill import data, evaluation, networks, recipes, teachers, train
from jaxdistill.evaluation import tasks
from jaxdistill.types import Model

NUMBER, BATCH = 22, 6  # neither two processes nor a batch divide the examples
METHODS = {
  "masks": (recipes.kd, tasks.dense),
  "tags": (recipes.multi_label, tasks.multilabel),
  "numbers": (recipes.regression, tasks.regression),
  "tokens": (recipes.kd, tasks.tokens),
  "vectors": (recipes.rkd, lambda: tasks.embedding("pooled")),
}
IN_FLOAT64 = {"param_dtype": jnp.float64}


class Vectors(nn.Module):
  """A vector, and classes of it."""

  width: int

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(4, name="pooled", **IN_FLOAT64)(nn.tanh(nn.Dense(self.width, **IN_FLOAT64)(x)))
    return nn.Dense(3, **IN_FLOAT64)(x)


def network(task, width):
  """In float64, so that only the order of additions differs."""
  if task == "vectors":
    return networks.linen(Vectors(width), features=["pooled"])
  if task == "masks":
    first, last = nn.Conv(width, (3, 3), **IN_FLOAT64), nn.Conv(3, (1, 1), **IN_FLOAT64)
  elif task == "tokens":
    first, last = nn.Embed(5, width, **IN_FLOAT64), nn.Dense(5, **IN_FLOAT64)
  else:
    out = {"tags": 4, "numbers": 2}[task]
    first, last = nn.Dense(width, **IN_FLOAT64), nn.Dense(out, **IN_FLOAT64)
  return networks.linen(nn.Sequential([first, nn.tanh, last]))


def examples(task):
  """Of which some labels count for less than others, and some for nothing."""
  rng = np.random.default_rng(0)
  weight = rng.integers(0, 3, NUMBER) / 2
  if task == "masks":
    masks = rng.integers(0, 3, (NUMBER, 5, 5)).astype(np.uint8)
    images = rng.normal(size=(NUMBER, 5, 5, 2)) + masks[..., None]
    masks[rng.random(masks.shape) < 0.3] = 255
    return data.from_arrays(images, masks, ignore=255, num_classes=3)
  if task == "tokens":
    ids = rng.integers(0, 5, (NUMBER, 7)).astype(np.int32)
    there = np.arange(7) < rng.integers(1, 8, NUMBER)[:, None]
    return data.from_arrays(ids, (2 * ids + 1) % 5, weight=there.astype(np.float32))
  x = rng.normal(size=(NUMBER, 6))
  labels = {"tags": x[:, :4] > 0.3, "numbers": x[:, :2] ** 2, "vectors": x[:, :3].argmax(1)}[task]
  return data.from_arrays(x, labels, weight=weight)


def measure(task, kind, dispatch=None):
  """Trains on some of the examples and measures on all: what comes out, by name."""
  method, of = METHODS[task]
  known, of_task = examples(task), of()
  make = data.streamed if kind == "streamed" else data.on_device
  views = {"augmentation": data.crop(1)} if task == "masks" else {}
  taught = network(task, 9)
  batches = data.evaluation_batches(known, batch_size=8)
  first = jax.tree.map(lambda leaf: leaf[0], batches)
  teacher = teachers.frozen(Model(taught, taught.init(jax.random.key(9), first.inputs)))
  fitted = small_networks.fit(
    network(task, 4),
    method(),
    data=make(known, batch_size=BATCH, data_seed=0, **views),
    optimizer=optax.adam(0.05),
    steps=6,
    teacher=teacher,
    validate=evaluation.validator(batches, task=of_task),
    validate_every=3,
    log_every=3,
    dispatch=dispatch,
    accumulate=3,
  )
  made = evaluation.evaluate(fitted, batches, teacher=teacher, task=of_task)
  for line in fitted.history:
    made |= {f"{name} at {line['step']}": line[name] for name in line if name not in CLOCKS}
  leaves = enumerate(jax.tree.leaves(fitted.variables))
  return made | {f"leaf {i}": leaf for i, leaf in leaves}


CLOCKS = {"seconds", "steps_per_second", "examples_per_second", "step"}


def work(folder, kind):
  """What each of two processes does: every task, with what it saw in a file of its own."""
  for task in METHODS:
    found = measure(task, kind.split()[1])
    np.savez(folder + f" {task} {jax.process_index()}.npz", **found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["on_device", "streamed"])
def test_labels_of_every_shape_are_one_processes_in_two(tmp_path, kind):
  test_processes.finish(test_processes.begin(tmp_path / "of", f"labels {kind}"))
  for task in METHODS:
    with jax.enable_x64(True):
      dispatch = train.with_jit(train.data_parallel(jax.devices()[:2]))
      one = measure(task, kind, dispatch)
    for process in (0, 1):
      with np.load(tmp_path / f"of {task} {process}.npz") as two:
        assert set(one) == set(two)
        for name in one:
          # Metrics are float32 of float64 outputs; all else is in float64.
          tolerance = 1e-9 if name.startswith("leaf") else 1e-5
          close = {"rtol": tolerance, "atol": tolerance, "err_msg": f"{task}, {name}, {process}"}
          np.testing.assert_allclose(two[name], one[name], **close)
