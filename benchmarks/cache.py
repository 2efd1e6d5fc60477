"""What an epoch costs with the teacher in the step, with a full cache, and without a teacher.

ResNet-32x4 into ResNet-8x4 at CIFAR-100's size, the pair of most tables, on made-up images: the
batches, the augmentation (crop and flip), the optimiser and the program around them are the same on
all sides, `jaxdistill.train.fit`'s. They take turns, chunk by chunk, so that they share whatever
the machine does: what a side costs is the median over rounds of its time over that of the plain
training in the same round. The cache lies on the device, as that of CIFAR-100's images does, and is
filled before (its own time is beside it). Rows that the host gathers, for caches that are larger,
are a side of their own, and so are rows that are read from files, for those larger than memory.

Command:   python benchmarks/cache.py           (results: benchmarks/results/cache-cpu.json)
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import tempfile
import time
from typing import Any
from unittest import mock

import jax
import numpy as np
import optax

from jaxdistill import data, networks, recipes, teachers, train
from jaxdistill.networks import models
from jaxdistill.runs import environment
from jaxdistill.teachers import _cache
from jaxdistill.types import Model

PAIR = ("resnet32x4", "resnet8x4")


@dataclasses.dataclass(frozen=True)
class Options:
  """What to measure."""

  rounds: int = 24
  steps: int = 1
  """Steps of a chunk."""
  batch_size: int = 16
  """Small, so that a CPU takes many turns."""
  examples: int = 128
  """Of made-up images; an epoch is CIFAR-100's 50,000."""
  pair: tuple[str, str] = PAIR
  """Teacher and student, factories of `jaxdistill.networks.models`."""
  files: pathlib.Path | None = None
  """Where the cache in files is kept; None leaves that side out."""
  out: pathlib.Path | None = None
  """The JSON; by default results/cache-<platform>.json beside this file."""


def compare(options: Options) -> dict[str, Any]:
  """What every side costs."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 255, (options.examples, 32, 32, 3)).astype(np.uint8)
  examples = data.from_arrays(images, rng.integers(0, 100, options.examples), num_classes=100)

  def source_of(views: int) -> data.Source:
    return data.on_device(
      examples,
      batch_size=options.batch_size,
      data_seed=0,
      augmentation=data.crop_flip(4),
      views=views,
      normalize=data.CIFAR,
    )

  source = source_of(1)
  teacher, student = (
    networks.linen(getattr(models, name)(num_classes=100)) for name in options.pair
  )
  variables = jax.jit(teacher.init)(jax.random.key(1), np.zeros((1, 32, 32, 3), np.float32))
  taught = teachers.frozen(Model(teacher, variables))

  begin = time.perf_counter()
  device = teachers.cached(taught, source, progress=None)
  filling = time.perf_counter() - begin
  # Not filled in advance, so its rows stay with the host; both epochs' views are filled here.
  host = teachers.cached(taught, source_of(2), progress=None)
  steps = (options.rounds + 1) * options.steps
  host.items(0, steps)

  kept = {"full cache on the device": device, "full cache on the host": host}
  if options.files is not None:
    # As a cache that fits neither the device's nor the host's memory is read: row by row.
    with mock.patch.object(_cache, "_fits", return_value=False):
      read = teachers.cached(taught, source, folder=options.files, progress=None)
    kept["full cache in files"] = read

  # XLA's convolutions inside a loop are twenty times slower on a CPU.
  scan = jax.default_backend() != "cpu"
  sides = {
    "teacher in the step": (recipes.kd(), source, taught),
    **{name: (recipes.kd(), made, None) for name, made in kept.items()},
    "plain cross-entropy": (recipes.labels(), source, None),
  }
  runs, states = {}, {}
  for name, (objective, batches, given) in sides.items():
    dispatch = train.with_jit(train.data_parallel(jax.devices()[:1]), scan=scan)
    optimizer = optax.sgd(0.05, momentum=0.9)
    plan = train.Plan.of(
      student, objective, data=batches, optimizer=optimizer, steps=steps, teacher=given
    )
    runs[name] = train.Program(plan, dispatch, longest=options.steps)
    states[name] = dispatch.spread(runs[name].initial())
  seconds = measure(runs, states, options)
  plain = seconds["plain cross-entropy"]
  result = {
    name: {
      "seconds an epoch": 50_000 // options.batch_size * float(np.median(found)),
      "of plain": float(np.median(found / plain)),
    }
    for name, found in seconds.items()
  }
  return {
    "environment": environment(),
    "pair": options.pair,
    "batch_size": options.batch_size,
    "rounds": options.rounds,
    "sides": result,
    "filling": {"examples": options.examples, "seconds": filling},
  }


def main(options: Options) -> None:
  with tempfile.TemporaryDirectory() as folder:
    files = options.files or pathlib.Path(folder, "cache")
    written = compare(dataclasses.replace(options, files=files))
  teacher, student = options.pair
  print(f"{teacher} into {student}, batch {options.batch_size}, {jax.devices()[0].device_kind}")
  for name, found in written["sides"].items():
    epoch, share = found["seconds an epoch"], found["of plain"]
    print(f"  {name:<26} {epoch:9.1f} s an epoch of 50,000  {share:6.3f} of plain")
  filling = written["filling"]
  print(f"  filling a view of {filling['examples']} (compiled in it): {filling['seconds']:.1f} s")
  name = f"cache-{jax.default_backend()}.json"
  out = options.out or pathlib.Path(__file__).parent / "results" / name
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(json.dumps(written, indent=2) + "\n")
  print(f"ratio {written['sides']['full cache on the device']['of plain']:.3f}")


def measure(runs, states, options: Options) -> dict[str, np.ndarray]:
  """Seconds of a step of each side, round by round, reading the next items included."""
  rounds = {name: [] for name in runs}
  for number in range(options.rounds + 1):
    names = list(runs)[number % len(runs) :] + list(runs)[: number % len(runs)]
    for name in names:
      begin = time.perf_counter()
      made = runs[name].run(states[name], number * options.steps, options.steps)
      states[name], _ = jax.block_until_ready(made)
      if number:  # the first one compiles
        rounds[name].append((time.perf_counter() - begin) / options.steps)
  return {name: np.array(values) for name, values in rounds.items()}


if __name__ == "__main__":
  import tyro  # here, so that benchmarks/accelerator.py can do without it

  main(tyro.cli(Options))
