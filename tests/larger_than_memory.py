"""What a process needs of memory while it goes through more pictures than it could hold.

Pictures at 224 x 224 are made when they are asked for, as bytes; the networks are small. Nothing is
kept of what has passed. The process seems to grow all the same, since the C library's allocator
keeps what threads free for what they ask for next, and it comes in pieces: of `train 4000` (602 MB
of pictures) the process has 630 MB at half and 646 at most, of which 186 to 255 are in use
(mallinfo2) and 245 are the allocator's, free; malloc_trim leaves 365. With
MALLOC_MMAP_THRESHOLD_=65536 in the environment large arrays go back to the system at once: 530 MB
in the first half, 532 in the second, 14 of them free. MALLOC_ARENA_MAX=2 still grows, to 576.

Command:  python tests/larger_than_memory.py train 20000
          python tests/larger_than_memory.py evaluate 50000
          python tests/larger_than_memory.py cache 5000
"""

from __future__ import annotations

import json
import pathlib
import resource
import sys
import tempfile

import flax.linen as nn
import jax
import numpy as np
import optax

from jaxdistill import data, evaluation, networks, recipes, teachers, train
from jaxdistill.types import Model, Outputs, Teacher

SIDE, CLASSES = 224, 1000


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


def source_of(rows: Pictures) -> data.Source:
  records = data.from_sequence(rows, data.Fields(num_classes=CLASSES))
  return data.streamed(records, batch_size=32, data_seed=0, views=1)


def evaluate(rows: Pictures) -> int:
  """One pass of evaluation, and what it counts."""
  records = data.from_sequence(rows, data.Fields(num_classes=CLASSES))
  batches = data.evaluation_batches(records, batch_size=100)
  model = Model(network(), network().init(jax.random.key(0), np.zeros((1, SIDE, SIDE, 3), "f4")))
  metrics, answers = evaluation.examine(model, batches, teacher=teachers.frozen(model))
  assert metrics["agreement"] == 1
  return answers.probability.shape[1]


def training(rows: Pictures) -> int:
  """One epoch of training."""
  source = source_of(rows)
  train.fit(
    network(),
    recipes.labels(),
    data=source,
    optimizer=optax.sgd(1e-3),
    steps=source.steps_per_epoch,
    watch=train.Watch(log_every=20),
    run=train.Run(progress=None),
  )
  return 32 * source.steps_per_epoch


def caching(rows: Pictures) -> int:
  """A cache of 4,000 bytes a picture."""
  wide = Teacher(
    {}, lambda _, batch: Outputs(logits=batch.inputs.reshape(-1, 3 * SIDE**2)[:, :1000])
  )
  with tempfile.TemporaryDirectory() as folder:
    return teachers.fill(wide, source_of(rows), folder, batch_size=32, progress=None).records


WAYS = {"train": training, "evaluate": evaluate, "cache": caching}


def main(way: str, size: int) -> dict:
  rows = Pictures(size)
  shown = WAYS[way](rows)
  seen = sorted(rows.used[len(rows.used) // 4 :])
  return {
    "way": way,
    "pictures": shown,
    "bytes_of_pictures": size * SIDE**2 * 3,
    "after_a_quarter": rows.used[len(rows.used) // 4],
    "most_after_it": seen[-1],
    "at_half": max(rows.used[: len(rows.used) // 2]),
    "most_after_half": max(rows.used[len(rows.used) // 2 :]),
    "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
  }


if __name__ == "__main__":
  print(json.dumps(main(sys.argv[1], int(sys.argv[2]))))
