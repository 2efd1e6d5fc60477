"""What the input pipeline costs beside the step, in one run: examples per second of training.

Four programs, each a chunk of distillation steps with the same networks and optimiser:

- step alone: every step gets one fixed batch, ready on the device;
- on the device: the batch is cut inside the program from the whole set as uint8, shifted (and
  flipped) at random, and normalised; the host only draws the order;
- through Grain: the host reads the rows of the next chunk while this one runs; augmentation and
  normalisation are inside the program;
- from files: as through Grain, and the rows are CIFAR-100's pictures as TFDS stored them, decoded
  when they are read. On a CPU the step and the decoder want the same cores.

A pair of ResNets at CIFAR's size, and the digits' pair, whose steps are so short that a pipeline
has nowhere to hide. The sides take turns in short rounds; a pipeline's cost is the median over
rounds of its time over the step's in the same round. A way over the limit ends the script with
status 1 and its name.

Reading alone, with crop and flip inside a program, is counted in seconds of processor time, so
that it is a core's figure on any number of cores; by our reader and, for comparison, through TFDS's
own data source.

Command:   python benchmarks/pipeline.py        (results: benchmarks/results/pipeline.json)
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
import time

import jax
import numpy as np
import optax
import tensorflow_datasets as tfds
import tyro

from jaxdistill import data, networks, recipes, runs, teachers, train
from jaxdistill.types import Model

LIMIT = 1.05
READ = 5000  # images a second of one core
PICTURES = 10 * 512  # read for one timing: ten of a stream's pieces
SHARED = pathlib.Path(__file__).parents[2] / "shared" / "tfds"


@dataclasses.dataclass(frozen=True)
class Options:
  """What to measure."""

  rounds: int = 15
  seconds: float = 1.0
  """How long each side runs in a round, at least one chunk."""
  batch_size: int = 64
  prefetch: int = 4
  data_dir: pathlib.Path | None = SHARED if SHARED.is_dir() else None
  """Where CIFAR-100 was prepared; TFDS's own default (~/tensorflow_datasets)."""
  out: pathlib.Path = pathlib.Path(__file__).parent / "results" / "pipeline.json"


def files(options):
  """CIFAR-100 as TFDS stored it, by our reader and by TFDS's; None where it is not there."""
  try:
    ours = data.records("cifar100", data_dir=options.data_dir)
  except ModuleNotFoundError as error:  # it cannot be prepared here
    print(f"Reading from files is left out: {error}")
    return None
  builder = tfds.builder("cifar100", data_dir=options.data_dir)
  return {
    "our reader": ours,
    "TFDS's data source": dataclasses.replace(ours, source=builder.as_data_source("train")),
  }


def pairs():
  """Teacher, student, examples, normalisation, augmentation, and steps in a chunk."""
  random = np.random.default_rng(0)
  images = random.integers(0, 256, (5000, 32, 32, 3)).astype(np.uint8)
  cifar = data.from_arrays(images, random.integers(0, 100, 5000), num_classes=100)
  small = random.integers(0, 17, (990, 8, 8, 1)).astype(np.uint8)
  digits = data.from_arrays(small, random.integers(0, 10, 990), num_classes=10)
  return {
    "ResNet-20 to ResNet-8 half as wide, 32x32x3, crop and flip": (
      networks.models.ResNet(depth=20, num_classes=100),
      networks.models.ResNet(depth=8, num_classes=100, width=(8, 8, 16, 32)),
      (cifar, data.CIFAR, data.crop_flip(4)),
      1,  # XLA computes its own convolutions slowly inside a loop on a CPU
    ),
    "ConvNet 32, 64, 64 to 8, 16, 16, 8x8x1, crop": (
      networks.models.ConvNet(channels=(32, 64, 64), strides=(1, 2, 1), dense=256),
      networks.models.ConvNet(channels=(8, 16, 16), strides=(1, 2, 1), dense=64),
      (digits, data.DIGITS, data.crop(1)),
      45,
    ),
  }


def sides(teacher, student, examples, chunk, records, options):
  """The programs, as functions that train one chunk and do not wait for it."""
  held, normalize, augmentation = examples
  teacher, student = networks.linen(teacher), networks.linen(student)
  common = {"batch_size": options.batch_size, "data_seed": 0, "normalize": normalize}
  common["augmentation"] = augmentation
  here = data.on_device(held, **common)
  streams = {"through Grain": data.streamed(held, prefetch=options.prefetch, **common)}
  if records is not None:
    streams["from files"] = data.streamed(records, prefetch=options.prefetch, **common)
  item = jax.tree.map(lambda leaf: leaf[0], here.items(0, 1))
  batch = jax.jit(here.cut)(here.shared, item)
  optimizer, objective = optax.adam(1e-3), recipes.kd()
  taught = teachers.frozen(Model(teacher, teacher.init(jax.random.key(1), batch.inputs)))
  take = train.make_step(student, objective, optimizer)
  init = jax.jit(
    lambda key, t: train.init_state(key, student, objective, optimizer, batch, teacher=t)
  )

  def compiled(cut):
    def one(state, t, shared, items):
      return take(state, t, cut(shared, jax.tree.map(lambda leaf: leaf[0], items)))

    def scanned(state, t, shared, items):
      return jax.lax.scan(lambda now, item: take(now, t, cut(shared, item)), state, items)

    return jax.jit(one if chunk == 1 else scanned, donate_argnums=0)

  def side(program, shared, read):
    state, at, sums = [init(jax.random.key(0), taught)], [0], [None]

    def run():
      items = read(at[0])
      at[0] += chunk
      former = sums[0]
      state[0], sums[0] = program(state[0], taught, shared, items)
      # As in training: the next chunk is read while this one runs, and no further ahead.
      jax.block_until_ready(former)

    return run, lambda: jax.block_until_ready(sums[0])

  # The chunk's batches are an argument, so that nothing in the step is the same for all its turns.
  fixed = jax.tree.map(lambda leaf: jax.numpy.stack([leaf] * chunk), batch)
  cut = compiled(here.cut)
  return {
    "step alone": side(compiled(lambda _, batch: batch), None, lambda at: fixed),
    "on the device": side(cut, here.shared, lambda at: here.items(at, chunk)),
    **{
      name: side(compiled(one.cut), one.shared, lambda at, one=one: one.items(at, chunk))
      for name, one in streams.items()
    },
  }


def measure(functions, options):
  """Seconds of a chunk, of each side in each round."""
  counts = {}
  for name, (run, wait) in functions.items():
    run(), wait()
    begin = time.perf_counter()
    run(), wait()
    counts[name] = max(1, round(options.seconds / (time.perf_counter() - begin)))
  rounds = {name: [] for name in functions}
  for _ in range(options.rounds):
    for name, (run, wait) in functions.items():
      begin = time.perf_counter()
      for _ in range(counts[name]):
        run()
      wait()
      rounds[name].append((time.perf_counter() - begin) / counts[name])
  return rounds


def reading(readers, options):
  """Microseconds of processor time that a picture takes, cropped and flipped, by each reader."""
  at, many = 0, 512 // options.batch_size
  common = {"batch_size": options.batch_size, "data_seed": 1, "normalize": data.CIFAR}
  common |= {"augmentation": data.crop_flip(4), "prefetch": options.prefetch}
  first = data.streamed(next(iter(readers.values())), **common)
  cut = jax.jit(lambda items: jax.lax.map(lambda item: first.cut(first.shared, item), items))
  taken = {name: [] for name in readers}
  for _ in range(options.rounds):
    for name, records in readers.items():
      # Opened anew, so that none reads ahead while another is timed.
      stream, at = data.streamed(records, **common), 0
      jax.block_until_ready(cut(stream.items(at, many)))
      begin = time.process_time()
      for _ in range(PICTURES // 512):
        at += many
        jax.block_until_ready(cut(stream.items(at, many)))
      pictures = PICTURES // 512 * many * options.batch_size
      taken[name].append(1e6 * (time.process_time() - begin) / pictures)
  return {
    name: {"microseconds": (middle := float(np.median(times))), "images_a_second": 1e6 / middle}
    for name, times in taken.items()
  }


def main(options: Options) -> None:
  results, readers = {}, files(options)
  for name, (teacher, student, examples, chunk) in pairs().items():
    held, records = examples[0], None
    if readers is not None and held.inputs.shape[1:] == (32, 32, 3):
      records = readers["our reader"]
    rounds = measure(sides(teacher, student, examples, chunk, records, options), options)
    alone = np.array(rounds["step alone"])
    results[name] = {
      side: {
        "milliseconds_per_step": 1e3 * float(np.median(seconds)) / chunk,
        "examples_per_second": chunk * options.batch_size / float(np.median(seconds)),
        "over_the_step": float(np.median(np.array(seconds) / alone)),
        "spread": [float(q) for q in np.quantile(np.array(seconds) / alone, (0.25, 0.75))],
      }
      for side, seconds in rounds.items()
    }
    print(f"{name}\n  {'':<16}{'ms a step':>12}{'examples/s':>12}{'of the step':>12}")
    for side, found in results[name].items():
      print(
        f"  {side:<16}{found['milliseconds_per_step']:>12.3f}"
        f"{found['examples_per_second']:>12.0f}{found['over_the_step']:>12.3f}"
      )
  read = {} if readers is None else reading(readers, options)
  for name, found in read.items():
    print(
      f"reading, crop and flip, {name}: {found['microseconds']:.0f} us of one core an image, "
      f"{found['images_a_second']:.0f} images a second"
      + (f"  (wanted: at least {READ})" if name == "our reader" else "")
    )
  options.out.parent.mkdir(parents=True, exist_ok=True)
  written = {"environment": runs.environment(), "batch_size": options.batch_size}
  written |= {"rounds": options.rounds, "load": os.getloadavg(), "pairs": results, "reading": read}
  options.out.write_text(json.dumps(written, indent=2) + "\n")
  over = []
  for side in ("on the device", "through Grain", "from files"):
    ratios = {n: found[side]["over_the_step"] for n, found in results.items() if side in found}
    over += [f"{side}, {name}: {ratio:.3f}" for name, ratio in ratios.items() if ratio > LIMIT]
    if ratios:
      most = max(ratios.values())
      print(f"ratio of training {side} to the step alone: {most:.3f}  (wanted: at most {LIMIT})")
  if over:
    sys.exit(f"Over {LIMIT} of the step alone: {'; '.join(over)}.")


if __name__ == "__main__":
  main(tyro.cli(Options))
