"""Losses that relate examples, on a batch that is split over a mesh: one device's numbers."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxdistill import losses, train

CHILD = "import conftest, sys, test_mesh_relations as t; t.save(sys.argv[1])"
SIZE, ROWS = 16, 24


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


def bank_loss(student, teacher, index, where):
  labels = jnp.asarray(np.arange(ROWS) % 3, jnp.int32)
  rows = [normal(seed, ROWS, 5).astype(np.float32) for seed in (3, 4)]
  rows = [jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True)) for x in rows]
  banks = losses.Banks(*rows, labels, jnp.zeros(2, jnp.float32), jnp.zeros((), bool))
  return losses.contrastive_bank(
    student, teacher, labels[index], index, banks, key=jax.random.key(4), negatives=6, where=where
  )


LOSSES = {
  "similarity_preserving": losses.similarity_preserving,
  "relational_distance": losses.relational_distance,
  "relational_angle": losses.relational_angle,
  "probabilistic_transfer": losses.probabilistic_transfer,
  "correlation_congruence": losses.correlation_congruence,
  "contrastive": losses.contrastive,
  "intra_class_correlation": losses.intra_class_correlation,
}


def everything(student, teacher, index, where):
  """Of each loss its values and its gradients by student and teacher; and the banks after it."""
  found = {}
  for name, loss in {**LOSSES, "contrastive_bank": None}.items():

    def total(pair, loss=loss):
      if loss is None:
        values, rest = bank_loss(*pair, index, where)
      else:
        values, rest = loss(*pair, where=where), ()
      weights = jnp.cos(jnp.arange(values.size, dtype=values.dtype))
      return jnp.sum(weights * values), (values, rest)

    (_, (values, rest)), gradients = jax.value_and_grad(total, has_aux=True)((student, teacher))
    found[name] = {"values": values, "student": gradients[0], "teacher": gradients[1]}
    for field, leaf in rest._asdict().items() if rest else ():
      found[name][f"banks {field}"] = leaf
  return found


def compute(devices):
  """`everything`, the batch split over so many devices; and which of them took part."""
  with jax.enable_x64(True):
    split = NamedSharding(train.data_parallel(jax.devices()[:devices]), PartitionSpec(train.AXIS))
    batch = (
      normal(0, SIZE, 5),
      normal(1, SIZE, 5),
      np.random.default_rng(2).permutation(ROWS)[:SIZE].astype(np.int32),
      np.arange(SIZE) % 7 != 3,
    )
    given = jax.device_put(batch, split)
    assert len(given[0].addressable_shards) == devices
    assert given[0].addressable_shards[0].data.shape == (SIZE // devices, 5)
    compiled = jax.jit(everything, in_shardings=(split,) * 4).lower(*given).compile()
    communicates = any(word in compiled.as_text() for word in ("all-reduce", "all-gather"))
    assert communicates == (devices > 1)
    return jax.tree.map(np.asarray, compiled(*given))


def save(path):
  """What the process with eight devices does."""
  leaves = {f"{name}/{part}": x for name, of in compute(8).items() for part, x in of.items()}
  np.savez(path, **leaves)


@functools.cache
def on(devices, folder=None):
  if devices <= 2:
    return compute(devices)
  here = pathlib.Path(__file__).parent
  flags = "--xla_force_host_platform_device_count=8"
  path = folder / "eight.npz"
  done = subprocess.run(
    [sys.executable, "-c", CHILD, str(path)],
    cwd=here,
    env={
      **os.environ,
      "XLA_FLAGS": flags,
      "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), str(here.parent.parent)]),
    },
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  found = {}
  with np.load(path) as saved:
    for key in saved:
      name, part = key.split("/")
      found.setdefault(name, {})[part] = saved[key]
  return found


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
  return on(8, tmp_path_factory.mktemp("eight"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LOSSES, "contrastive_bank"])
@pytest.mark.parametrize("devices", [2, 8])
def test_a_mesh_gives_one_devices_value_and_gradient(name, devices, request):
  one = on(1)[name]
  several = request.getfixturevalue("eight")[name] if devices == 8 else on(2)[name]
  assert sorted(one) == sorted(several)
  for part, expected in one.items():
    assert part.startswith("banks") or (expected.dtype == np.float64 and np.any(expected))
    # float64: sums over shares in another order, of numbers up to a hundred. Banks are float32.
    tolerance = 1e-10 if expected.dtype == np.float64 else 1e-6
    np.testing.assert_allclose(
      several[part], expected, rtol=tolerance, atol=tolerance, err_msg=part
    )
