"""Several students in one program: side by side or one after another, convolutions in two ways.

The convolutional student of the digits (8, 16, 16 channels, a dense layer of 64; batch 64), its
convolutions by `jax.lax` or as patches and one matrix product, trained with soft targets from
logits in memory: under ``vmap`` in one dispatch of many steps or of one, and one after another
(``unroll``) in dispatches of one step. This is what `jaxdistill.train.students_by` goes by.

Command:   python benchmarks/side_by_side.py    (results: benchmarks/results/side_by_side.json)
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import optax

from jaxdistill import data, networks, recipes, runs, train
from jaxdistill.teachers import cached, frozen
from jaxdistill.types import Model

WAYS = [
  ("lax", "vmap", True),
  ("lax", "vmap", False),
  ("lax", "unroll", False),
  ("patches", "vmap", True),
  ("patches", "vmap", False),
  ("patches", "unroll", False),
]


@dataclasses.dataclass(frozen=True)
class Options:
  """What to measure."""

  students: tuple[int, ...] = (1, 4, 8)
  steps: int = 30
  """In one timing; a dispatch under scan."""
  repeats: int = 3
  """Timings of each way; the least counts, which whatever else runs touches least."""
  out: pathlib.Path = pathlib.Path(__file__).parent / "results" / "side_by_side.json"


def taught(examples, batch_size: int, normalize) -> data.Source:
  """Batches that bring the logits of some teacher along."""
  source = data.on_device(examples, batch_size=batch_size, data_seed=0, normalize=normalize)
  teacher = networks.linen(
    networks.models.MLP((32,), num_classes=examples.num_classes), name="teacher"
  )
  variables = teacher.init(jax.random.key(0), source.normalize(examples.inputs[:1]))
  return cached(frozen(Model(teacher, variables)), source, progress=None)


def measure(source, module, by: str, scan: bool, students: int, options: Options) -> float:
  """Milliseconds of a step of one of the students."""
  values = {"hyper": {"temperature": jnp.linspace(1.0, 8.0, students)}, "optimizer": {}}
  dispatch = train.with_students(train.data_parallel(jax.devices()[:1]), seeds_by=by, scan=scan)
  plan = train.Plan.of(
    networks.linen(module, name="student"),
    recipes.kd(),
    data=[source] * students,
    optimizer=optax.adam(1e-3),
    steps=options.steps * (options.repeats + 1),
    seed=range(students),
  )
  program = train.Program(plan, dispatch, longest=options.steps, values=values)
  state = dispatch.spread(program.initial())
  times = []
  for i in range(options.repeats + 1):  # the first compiles
    began = time.perf_counter()
    state, sums = program.run(state, i * options.steps, options.steps)
    jax.block_until_ready((state, sums))
    times.append(time.perf_counter() - began)
  return 1000 * min(times[1:]) / options.steps / students


def main(options: Options) -> None:
  examples = data.load("digits", data.splits("digits")["train"])
  source = taught(examples, 64, data.DIGITS)
  found = {}
  print(f"{'milliseconds a student-step':34}" + "".join(f"{n:>8}" for n in options.students))
  for conv, by, scan in WAYS:
    name = f"{conv}, {by}, {'many steps' if scan else 'one step'} a dispatch"
    module = networks.models.ConvNet(channels=(8, 16, 16), strides=(1, 2, 1), dense=64, conv=conv)
    found[name] = [measure(source, module, by, scan, n, options) for n in options.students]
    print(f"{name:34}" + "".join(f"{value:8.2f}" for value in found[name]), flush=True)
  best = {
    conv: min(ms[-1] for name, ms in found.items() if name.startswith(conv))
    for conv in ("lax", "patches")
  }
  result = {"environment": runs.environment(), "students": options.students, "ms": found}
  options.out.parent.mkdir(exist_ok=True)
  options.out.write_text(json.dumps(result, indent=2, default=str) + "\n")
  print(
    f"\nratio of the best with lax to the best with patches: {best['lax'] / best['patches']:.2f}"
  )


if __name__ == "__main__":
  import tyro  # here, so that benchmarks/accelerator.py can do without it

  main(tyro.cli(Options))
