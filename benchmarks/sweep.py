"""Twenty and three hundred students by a sweep, one after another, and by PyTorch, in one run.

Digits; teacher: 3x3 convolutions of 32, 64 (stride 2) and 64 channels, a dense layer of 256.
Students: an MLP 64-16-10, and the teacher's shape with 8, 16, 16 channels and a dense layer of 64.
30 epochs of batches of 64, Adam. Twenty students: temperatures 1 to 20. Three hundred: those with
three soft weights and five seeds. All sides train the same networks on the same batches for as
many steps, from one teacher's weights, and measure each student on the validation split at its end.

- sweep: `jaxdistill.search.sweep`;
- PyTorch, stacked: all students side by side by `torch.func.vmap`, the teacher's outputs computed
  once before: PyTorch's own way to do what a sweep does, and the fairest peer;
- PyTorch, two processes: an ordinary loop over each half of the students, one thread each, the
  teacher's outputs computed before;
- PyTorch, precomputed: the same loop in one process;
- PyTorch, loop: the teacher run on every batch, as its users' loops do;
- one after another: `jaxdistill.train.fit` for each, with the teacher in the step;
- bare JAX: the floor for 20 MLPs, one function by hand, compiled with the sweep's options.

Each side is a process of its own (or two), and its time is the process's: start-up, imports,
compilation and set-up count. Sides that go one after another train a part of the students, as the
table says, and all but the first are reckoned at the median of those after it, which whatever else
the machine does touches least. PyTorch gets the number of threads with which it is faster.

Command:   python benchmarks/sweep.py           (results: benchmarks/results/sweep.json)
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import optax
from flax import traverse_util
from sweep_sides import Task

from jaxdistill import data, networks, recipes, runs, train

TARGETS = {
  ("MLP", 20): {"pytorch": 10, "alone": 5},
  ("MLP", 300): {"pytorch": 30, "alone": 5},
  ("ConvNet", 20): {"pytorch": 2.5, "alone": 2},
  ("ConvNet", 300): {"pytorch": 4, "alone": 2},
}
NAMES = {
  "sweep": "sweep",
  "stacked": "PyTorch, stacked",
  "processes": "PyTorch, two processes",
  "precomputed": "PyTorch, precomputed",
  "pytorch": "PyTorch, loop",
  "alone": "one after another",
  "bare": "bare JAX",
}
_LONG = 60
"""Seconds after which a side is not run once more."""
PYTORCH = ("stacked", "processes", "precomputed", "pytorch")
WHOLE = ("sweep", "stacked", "bare")
"""Sides that train all students in one program."""


@dataclasses.dataclass(frozen=True)
class Options:
  """What to measure."""

  networks: tuple[str, ...] = ("MLP", "ConvNet")
  counts: tuple[int, ...] = (20, 300)
  sides: tuple[str, ...] = tuple(NAMES)
  repeats: int = 3
  """How often the sides run that train all students, but no more once a minute has gone by; the
  median counts."""
  one_in: int = 20
  """Sides that go one after another train one student in so many, and at least four."""
  epochs: int = 30
  batch_size: int = 64
  rate: float = 1e-3
  out: pathlib.Path = pathlib.Path(__file__).parent / "results" / "sweep.json"


def task_of(options, file, network, count):
  few = count == 20
  return Task(
    file=str(file),
    network=network,
    temperatures=tuple(float(t) for t in range(1, 21)),
    soft_weights=(0.9,) if few else (0.5, 0.7, 0.9),
    seeds=(0,) if few else (0, 1, 2, 3, 4),
    batch_size=options.batch_size,
    epochs=options.epochs,
    rate=options.rate,
  )


def prepare(options, file, examples, held_out):
  """What all sides are given: the data, the order of the batches, and a trained teacher."""
  source = data.on_device(
    examples, batch_size=options.batch_size, data_seed=0, normalize=data.DIGITS
  )
  steps = options.epochs * source.steps_per_epoch
  orders = [dataclasses.replace(source, data_seed=s).items(0, steps)["index"] for s in range(5)]
  teacher = networks.linen(
    networks.models.ConvNet(channels=(32, 64, 64), strides=(1, 2, 1), dense=256)
  )
  fitted = train.fit(
    teacher,
    recipes.labels(),
    data=source,
    optimizer=optax.adam(options.rate),
    steps=steps,
    run=train.Run(progress="teacher"),
  )
  outputs = fitted(data.DIGITS(held_out.inputs))
  weights = traverse_util.flatten_dict(jax.device_get(fitted.variables), sep="/")
  np.savez(
    file,
    images=examples.inputs,
    labels=examples.labels,
    validation_images=held_out.inputs,
    validation_labels=held_out.labels,
    orders=np.stack(orders),
    teacher_logits=np.asarray(outputs.logits),
    **{f"teacher/{name}": value for name, value in weights.items()},
  )
  return float(np.mean(np.argmax(outputs.logits, -1) == held_out.labels))


def call(side, *tasks):
  """Runs a side in a process of its own for each task, at the same time.

  Returns:
    ``(seconds, what it printed)`` of each process.
  """
  script = pathlib.Path(__file__).parent / "sweep_sides.py"
  began = time.perf_counter()

  def run(task):
    command = [sys.executable, str(script), side, json.dumps(dataclasses.asdict(task))]
    made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return time.perf_counter() - began, json.loads(made.stdout.splitlines()[-1])

  with concurrent.futures.ThreadPoolExecutor(len(tasks)) as pool:
    return list(pool.map(run, tasks))


def measure(side, task, repeats, one_in):
  """The seconds that all students of a task take on one side."""
  if side in WHOLE:
    runs, began = [], time.perf_counter()
    while len(runs) < repeats and time.perf_counter() - began < _LONG:
      runs.append(call(side, task)[0])
    runs.sort(key=lambda run: run[0])
    wall, printed = runs[len(runs) // 2]
    printed["inside"] = printed.pop("seconds")
    every = [run[0] for run in runs]
    return {"seconds": wall, "trained": len(task.students()), "all": every, **printed}
  parts = [task]
  if side == "processes":
    parts = [dataclasses.replace(task, share=(i, 2), threads=1) for i in range(2)]
  counts = [len(part.students()) for part in parts]
  some = [min(count, max(4, count // one_in)) for count in counts]
  asked = [dataclasses.replace(p, trained=n) for p, n in zip(parts, some, strict=True)]
  runs = call("precomputed" if side == "processes" else side, *asked)
  each = [printed["seconds"] for _, printed in runs]
  whole = [
    wall - sum(seconds[1:]) + (count - 1) * float(np.median(seconds[1:]))
    for (wall, _), seconds, count in zip(runs, each, counts, strict=True)
  ]
  return {
    "seconds": max(whole),
    "trained": sum(some),
    "measured": max(wall for wall, _ in runs),
    "each": each,
    "accuracy": float(np.mean([printed["accuracy"] for _, printed in runs])),
    "compilations": runs[0][1]["compilations"],
  }


def faster_threads(task):
  """With how many threads PyTorch trains this student faster."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  found = {}
  for threads in sorted({1, cores}):
    [(_, printed)] = call("precomputed", dataclasses.replace(task, trained=2, threads=threads))
    found[threads] = printed["seconds"][-1]
  return min(found, key=found.get), found


def faster_stacked(task):
  """How many students PyTorch stacks faster: all, or twenty (as cores' caches have it)."""
  found = {}
  for at_once in (0, 20):
    [(_, printed)] = call("stacked", dataclasses.replace(task, at_once=at_once, steps=15))
    found[at_once] = printed["seconds"][0]
  return min(found, key=found.get), found


def show(network, count, results):
  print(f"\n{network}, {count} students")
  heads = ("seconds", 10), ("trained", 10), ("accuracy", 10), ("of the sweep", 14), ("compiled", 10)
  print(f"  {'':<24}" + "".join(f"{head:>{width}}" for head, width in heads))
  for side, result in results.items():
    ratio = result["seconds"] / results["sweep"]["seconds"] if "sweep" in results else float("nan")
    print(
      f"  {NAMES[side]:<24}{result['seconds']:>10.2f}{result['trained']:>10}"
      f"{100 * result['accuracy']:>10.2f}{ratio:>14.1f}"
      f"{result['compilations'] or '–':>10}"
    )


def main(options: Options) -> None:
  sides = list(options.sides)
  if importlib.util.find_spec("torch") is None:
    print("PyTorch is not installed: its sides are left out (pip install 'jaxdistill[peers]').")
    sides = [side for side in sides if side not in PYTORCH]
  written = {"environment": runs.environment(), **dataclasses.asdict(options), "out": None}
  written["load"] = os.getloadavg()
  results, ratios = {}, []
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder, "digits.npz")
    names = data.splits("digits")
    splits = [data.load("digits", names[split]) for split in ("train", "validation")]
    written["teacher_accuracy"] = prepare(options, file, *splits)
    for network in options.networks:
      threads = 0
      if any(side in PYTORCH for side in sides):
        threads, tried = faster_threads(task_of(options, file, network, 20))
        written[f"pytorch_threads/{network}"] = {"taken": threads, "seconds_each": tried}
      for count in options.counts:
        task = dataclasses.replace(task_of(options, file, network, count), threads=threads)
        if "stacked" in sides and count > 20:
          at_once, tried = faster_stacked(task)
          task = dataclasses.replace(task, at_once=at_once)
          taken = {"taken": at_once or count, "seconds": tried}
          written[f"pytorch_stacked/{network}/{count}"] = taken
        some = [side for side in sides if side != "bare" or (network, count) == ("MLP", 20)]
        found = {side: measure(side, task, options.repeats, options.one_in) for side in some}
        show(network, count, found)
        results[f"{network}/{count}"] = found
        written["students"] = results  # as far as it has come: a run that is cut off keeps that
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(written, indent=2) + "\n")
        for side in found if "sweep" in found else ():
          target = TARGETS[network, count].get(side)
          if side != "sweep":
            ratios.append((network, count, side, found, target))
  print()
  for network, count, side, found, target in ratios:
    ratio = found[side]["seconds"] / found["sweep"]["seconds"]
    wanted = "" if target is None else f"  (wanted: {target})"
    print(f"ratio {network}, {count} students, {NAMES[side]} to the sweep: {ratio:.1f}{wanted}")


if __name__ == "__main__":
  import tyro  # here, so that benchmarks/accelerator.py can do without it

  main(tyro.cli(Options))
