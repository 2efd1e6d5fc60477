"""What a process needs of memory while it goes through more pictures than it could hold.

Pictures at 224 x 224 are made when they are asked for, as bytes; the networks are small. Nothing is
kept of what has passed. The process seems to grow all the same, since the C library's allocator
keeps what threads free for what they ask for next, and it comes in pieces: of `train 4000` (602 MB
of pictures) the process has 630 MB at half and 646 at most, of which 186 to 255 are in use
(mallinfo2) and 245 are the allocator's, free; malloc_trim leaves 365. With
MALLOC_MMAP_THRESHOLD_=65536 in the environment large arrays go back to the system at once: 530 MB
in the first half, 532 in the second, 14 of them free. MALLOC_ARENA_MAX=2 still grows, to 576.

Under a limit the process has no more memory than that, and goes through ten times as much. It is
the system's limit of what a process may write to (RLIMIT_DATA): stricter than a container's, which
counts what has been written, and in need of no right to make one. A step is a wait of 200 ms in the
compiled program, as if an accelerator were at work; what lies between two of them is measured
beside the same step over pictures that lie on the device already, with and without what the host
does to each picture in `experiments/imagenet.py`.

Command:  python tests/larger_than_memory.py train 20000
          python tests/larger_than_memory.py train --limit 1000
          python tests/larger_than_memory.py evaluate 50000
          python tests/larger_than_memory.py cache 5000
          python tests/larger_than_memory.py step 3200
"""

from __future__ import annotations

import argparse
import json
import pathlib
import resource
import tempfile
import time
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

from jaxdistill import data, evaluation, losses, networks, recipes, teachers, train
from jaxdistill.types import Model, Outputs, Teacher, Term

SIDE, CLASSES = 224, 1000
STEP = 0.2  # seconds


class Pictures:
  """Rows that are made when they are read; remembers how much memory there was used by then."""

  def __init__(self, size: int) -> None:
    self.size, self.used = size, []

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, row: int) -> dict:
    if row % 100 == 0:
      self.used.append(used())
    image = np.random.default_rng(row).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    return {"image": image, "label": row % CLASSES}


def used() -> int:
  """Bytes of this process that are in memory now."""
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return pages * resource.getpagesize()


def network() -> networks.Network:
  layers = [nn.Conv(8, (8, 8), strides=8), nn.relu, lambda maps: maps.mean((1, 2))]
  return networks.linen(nn.Sequential([*layers, nn.Dense(CLASSES)]))


def source_of(rows: Pictures, **how: Any) -> data.Source:
  records = data.from_sequence(rows, data.Fields(num_classes=CLASSES))
  return data.streamed(records, batch_size=32, data_seed=0, views=1, **how)


def evaluate(rows: Pictures) -> int:
  """One pass of evaluation, and what it counts."""
  records = data.from_sequence(rows, data.Fields(num_classes=CLASSES))
  batches = data.evaluation_batches(records, batch_size=100)
  model = Model(network(), network().init(jax.random.key(0), np.zeros((1, SIDE, SIDE, 3), "f4")))
  metrics, answers = evaluation.examine(model, batches, teacher=teachers.frozen(model))
  assert metrics["agreement"] == 1
  return answers.probability.shape[1]


def fit(source: data.Source, objective: Any, steps: int) -> None:
  """A training that leaves nothing behind."""
  train.fit(
    network(),
    objective,
    data=source,
    optimizer=optax.sgd(1e-3),
    steps=steps,
    watch=train.Watch(log_every=20),
    run=train.Run(progress=None),
  )


def training(rows: Pictures) -> int:
  """One epoch of training."""
  source = source_of(rows)
  fit(source, recipes.labels(), source.steps_per_epoch)
  return 32 * source.steps_per_epoch


def between(source: data.Source, steps: int) -> list[float]:
  """Seconds from the end of each step's wait to the next one's."""
  began = []

  def wait(_: np.ndarray) -> np.ndarray:
    began.append(time.perf_counter())
    time.sleep(STEP)
    return np.float32(0)

  def objective(student: Outputs, teacher: None, batch: Any) -> dict[str, Term]:
    loss = losses.cross_entropy(student.logits, batch.labels)
    none = jax.ShapeDtypeStruct((), np.float32)
    waited = jax.pure_callback(wait, none, jax.lax.stop_gradient(loss[0]))
    return {"labels": Term(loss + waited, where=batch.labelled)}

  fit(source, objective, steps)
  assert len(began) == steps
  return (np.diff(began) - STEP).tolist()


def stepping(rows: Pictures) -> dict:
  """What a stream adds to a step of 200 ms: between two of them, over what is on the device."""
  few = [rows[row] for row in range(64)]
  examples = data.from_dicts(few, data.Fields(num_classes=CLASSES))
  sources = {
    "on the device": data.on_device(examples, batch_size=32, data_seed=0),
    "streamed": source_of(rows),
    "streamed, cut and recoloured on the host": source_of(
      rows, on_host=[data.random_resized_crop(SIDE), data.colour_jitter()]
    ),
  }
  # The first steps find what was read ahead while they were compiled.
  means = {
    name: 1e3 * float(np.mean(between(source, len(rows) // 32)[5:]))
    for name, source in sources.items()
  }
  first, *others = means
  shares = {name: (means[name] - means[first]) / (1e3 * STEP) for name in others}
  return {"steps": len(rows) // 32, "ms_between": means, "share_of_a_step": shares}


def caching(rows: Pictures) -> int:
  """A cache of 4,000 bytes a picture."""
  wide = Teacher(
    {}, lambda _, batch: Outputs(logits=batch.inputs.reshape(-1, 3 * SIDE**2)[:, :1000])
  )
  with tempfile.TemporaryDirectory() as folder:
    return teachers.fill(wide, source_of(rows), folder, batch_size=32, progress=None).records


WAYS = {"train": training, "evaluate": evaluate, "cache": caching}


def main(way: str, size: int | None, limit: int | None) -> dict:
  """What one of the ways took, over so many pictures, or over ten times a limit in MB."""
  if limit is not None:
    resource.setrlimit(resource.RLIMIT_DATA, (10**6 * limit, 10**6 * limit))
  rows = Pictures(10**7 * (limit or 100) // (3 * SIDE**2) if size is None else size)
  if way == "step":
    return stepping(rows)
  shown = WAYS[way](rows)
  seen = sorted(rows.used[len(rows.used) // 4 :])
  return {
    "way": way,
    "pictures": shown,
    "bytes_of_pictures": len(rows) * SIDE**2 * 3,
    "after_a_quarter": rows.used[len(rows.used) // 4],
    "most_after_it": seen[-1],
    "at_half": max(rows.used[: len(rows.used) // 2]),
    "most_after_half": max(rows.used[len(rows.used) // 2 :]),
    "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
  }


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("way", choices=[*WAYS, "step"])
  parser.add_argument("pictures", type=int, nargs="?", help="by default ten times the limit")
  parser.add_argument("--limit", type=int, help="MB that the process may have")
  options = parser.parse_args()
  print(json.dumps(main(options.way, options.pictures, options.limit)))
