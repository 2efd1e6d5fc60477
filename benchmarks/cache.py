"""What an epoch costs with the teacher in the step, with a full cache, and without a teacher.

ResNet-32x4 into ResNet-8x4 at CIFAR-100's size, the pair of most tables, on made-up images: the
batches, the augmentation (crop and flip), the optimiser and the program around them are the same on
all sides, `jaxdistill.train.fit`'s. They take turns, chunk by chunk, so that they share whatever
the machine does: what a side costs is the median over rounds of its time over that of the plain
training in the same round. The cache lies on the device, as that of CIFAR-100's images does, and is
filled before (its own time is beside it). Rows that the host gathers, for caches that are larger,
are a side of their own, and so are rows that are read from files, for those larger than memory.

Command:   python benchmarks/cache.py           (results: benchmarks/results/cache-cpu.json)

With --trial a part of ImageNet's size is filled instead (1.28 million examples, 8 views, 1000
classes, float16; made-up images of 32 x 32, streamed), and what `teachers.fill` says before it and
after its first batches stands beside what was met: bytes, and seconds from then on. The teacher is
a ResNet-20, which changes how long it takes and not what is tried. The command fails where one is
off by more than a fifth.

Command:   python benchmarks/cache.py --trial 0.01
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import sys
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
  trial: float | None = None
  """Fills this part of ImageNet's size, and compares what was said before with what was met."""
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


class Said:
  """A bar that keeps what is said on it, and when."""

  def __init__(self, total: int) -> None:
    self.left, self.lines = total, list[tuple[float, str]]()

  def __enter__(self) -> Said:
    return self

  def __exit__(self, *error: object) -> None:
    pass

  def update(self, count: int, *rest: object) -> None:
    """So many rows more are done."""
    self.left -= count

  def say(self, text: str) -> None:
    """Prints a line, and keeps it."""
    print(text, flush=True)
    self.lines.append((time.perf_counter(), text))


def trial(part: float, folder: pathlib.Path) -> dict[str, dict[str, float]]:
  """Bytes and seconds as `teachers.fill` tells them, and as they come to be."""
  rng, size = np.random.default_rng(0), round(1_281_167 * part)
  images = rng.integers(0, 256, (size, 32, 32, 3)).astype(np.uint8)
  examples = data.from_arrays(images, rng.integers(0, 1000, size), num_classes=1000)
  source = data.streamed(
    examples, batch_size=64, data_seed=0, augmentation=data.crop_flip(4), views=8
  )
  network = networks.linen(models.resnet20(num_classes=1000))
  variables = jax.jit(network.init)(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
  bars: list[Said] = []

  def bar(total: int, *rest: object, **named: object) -> Said:
    bars.append(Said(total))
    return bars[-1]

  with mock.patch.object(_cache, "progress_bar", bar):
    teacher = teachers.frozen(Model(network, variables))
    teachers.fill(teacher, source, folder, dtype="float16", limit=2**63)
  end, ((_, before), (began, rest), *_) = time.perf_counter(), bars[-1].lines
  megabytes = re.search(r"([\d,.]+) MB", before)
  clock = re.findall(r"(\d+) (h|min|s)\b", rest.split(" more for")[0])
  assert megabytes is not None, before
  assert clock, rest
  seconds = sum(int(number) * {"h": 3600, "min": 60, "s": 1}[unit] for number, unit in clock)
  written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
  return {
    "bytes": {"said": 1e6 * float(megabytes[1].replace(",", "")), "met": written},
    "seconds": {"said": seconds, "met": end - began},
  }


def main(options: Options) -> None:
  if options.trial is not None:
    with tempfile.TemporaryDirectory() as folder:
      found = trial(options.trial, options.files or pathlib.Path(folder, "cache"))
    for name, one in found.items():
      off = one["said"] / one["met"] - 1
      print(f"{name}: {one['said']:,.0f} said, {one['met']:,.0f} met, off by {off:+.1%}")
    sys.exit(int(any(abs(one["said"] / one["met"] - 1) > 0.2 for one in found.values())))
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
