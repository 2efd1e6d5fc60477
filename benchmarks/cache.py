"""What an epoch costs with the teacher in the step, with a full cache, and without a teacher.

ResNet-32x4 into ResNet-8x4 at CIFAR-100's size, the pair of most tables, on made-up images: the
batches, the augmentation (crop and flip), the optimiser and the program around them are the same on
all sides, `jaxdistill.train.fit`'s. They take turns, chunk by chunk, so that they share whatever
the machine does: what a side costs is the median over rounds of its time over that of the plain
training in the same round. The cache lies on the device, as that of CIFAR-100's images does, and is
filled before (its own time is beside it); rows that the host gathers, for caches that are larger,
are a side of their own.

Command:   python benchmarks/cache.py           (results: benchmarks/results/cache-cpu.json)
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time

import jax
import numpy as np
import optax
import tyro

from jaxdistill import data, networks, recipes, teachers, train
from jaxdistill.networks import models
from jaxdistill.runs import environment
from jaxdistill.types import as_objective

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
  out: pathlib.Path | None = None
  """The JSON; by default results/cache-<platform>.json beside this file."""


def main(options: Options) -> None:
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
  teacher, student = (networks.linen(getattr(models, name)(num_classes=100)) for name in PAIR)
  variables = jax.jit(teacher.init)(jax.random.key(1), np.zeros((1, 32, 32, 3), np.float32))
  teach = teachers.frozen(teacher)

  begin = time.perf_counter()
  device = teachers.cached(teach, variables, source, progress=None)
  filling = time.perf_counter() - begin
  # Not filled in advance, so its rows stay with the host; both epochs' views are filled here.
  host = teachers.cached(teach, variables, source_of(2), progress=None)
  host.items(0, (options.rounds + 1) * options.steps)

  # XLA's convolutions inside a loop are twenty times slower on a CPU.
  scan = jax.default_backend() != "cpu"
  sides = {
    "teacher in the step": (recipes.kd(), source, (teach, variables)),
    "full cache on the device": (recipes.kd(), device, (None, None)),
    "full cache on the host": (recipes.kd(), host, (None, None)),
    "plain cross-entropy": (recipes.labels(), source, (None, None)),
  }
  runs, states = {}, {}
  for name, (objective, batches, (given, its)) in sides.items():
    dispatch = train.with_jit(train.data_parallel(jax.devices()[:1]))
    made = train.build_program(
      student,
      as_objective(objective),
      batches,
      optax.sgd(0.05, momentum=0.9),
      0,
      given,
      its,
      dispatch,
      scan=scan,
    )
    runs[name], states[name] = made, dispatch.spread(made.initial())
  seconds = measure(runs, states, options)
  plain = seconds["plain cross-entropy"]
  result = {
    name: {
      "seconds an epoch": 50_000 // options.batch_size * float(np.median(found)),
      "of plain": float(np.median(found / plain)),
    }
    for name, found in seconds.items()
  }
  print(f"{PAIR[0]} into {PAIR[1]}, batch {options.batch_size}, {jax.devices()[0].device_kind}")
  for name, found in result.items():
    epoch, share = found["seconds an epoch"], found["of plain"]
    print(f"  {name:<26} {epoch:9.1f} s an epoch of 50,000  {share:6.3f} of plain")
  print(f"  filling a view of {options.examples} (compiled in it): {filling:.1f} s")
  written = {
    "environment": environment(),
    "pair": PAIR,
    "batch_size": options.batch_size,
    "rounds": options.rounds,
    "sides": result,
    "filling": {"examples": options.examples, "seconds": filling},
  }
  name = f"cache-{jax.default_backend()}.json"
  out = options.out or pathlib.Path(__file__).parent / "results" / name
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(json.dumps(written, indent=2) + "\n")
  print(f"ratio {result['full cache on the device']['of plain']:.3f}")


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
  main(tyro.cli(Options))
