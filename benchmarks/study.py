"""Trials, and seconds, until a study has reached a grid's best student: ours and a PyTorch loop's.

Digits; the MLP student 64-16-10 and the teacher of `benchmarks/sweep.py`, on the same batches. A
grid of temperature, soft weight and learning rate is trained by `jaxdistill.search.sweep`; its best
mean validation nll over the seeds is the target. Then two studies search the box that the grid
spans, the labels' weight 0.1 throughout:

- study: `jaxdistill.search.study`, whose proposals are trained side by side, ``at_once`` of them;
- PyTorch: the same sampler of Optuna's, one trial after another, over an ordinary loop whose
  teacher's outputs were computed before (`benchmarks/pytorch.py`), with the faster of one thread
  and all of them.

Both have Optuna's TPE and no pruner, so that a trial is a trained student, the same number of
trials, and ``repeats`` seeds of the sampler, since how long a search takes is chance; the second
and later ones are in a process that is warm. A trial counts as the first that is as good as the
grid's best or better; where none is, that is written, not extrapolated.
Each side is a process of its own; its seconds are those from the process's start to the end of the
trial, so imports and compilation count. TPE proposes a batch at once with less known, which costs
trials, and it draws from the box between the grid's points too, where the target may be passed.

Command:   python benchmarks/study.py           (results: benchmarks/results/study.json)
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np


@dataclasses.dataclass(frozen=True)
class Options:
  """What to measure."""

  temperatures: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0)
  soft_weights: tuple[float, ...] = (0.5, 0.7, 0.9)
  rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
  seeds: tuple[int, ...] = (0, 1)
  epochs: int = 15
  batch_size: int = 64
  trials: int = 45
  at_once: int = 9
  repeats: int = 3
  threads: int = 0
  """PyTorch's; 0 for the faster of one and all."""
  out: pathlib.Path = pathlib.Path(__file__).parent / "results" / "study.json"


def space(options):
  """The box that the grid spans, as Optuna's distributions."""
  from optuna.distributions import FloatDistribution

  def across(values, log):
    return FloatDistribution(min(values), max(values), log=log)

  return {
    "temperature": across(options.temperatures, True),
    "soft_weight": across(options.soft_weights, False),
    "rate": across(options.rates, True),
  }


def sampler(seed):
  """What both sides propose by."""
  import optuna

  return optuna.samplers.TPESampler(seed=seed, constant_liar=True)


def jax_side(options, file):
  """What the grid and our study share."""
  import optax
  from sweep_sides import Task, jax_parts

  from jaxdistill import recipes, search, train

  student, teacher, source, validation = jax_parts(task(options, file, Task))
  return {
    "student": student,
    "objective": recipes.kd(hard_weight=0.1),
    "data": source,
    "optimizer": lambda rate: optax.adam(rate),
    "steps": options.epochs * source.steps_per_epoch,
    "choice": search.Choice(validation, metric="nll"),
    "seeds": options.seeds,
    "teacher": teacher,
    "run": train.Run(progress=None),
  }


def task(options, file, Task):
  """The networks, batches and teacher of `benchmarks/sweep.py`."""
  some = {"temperatures": (1.0,), "soft_weights": (0.9,), "rate": 1e-3, "network": "MLP"}
  return Task(
    file=file, seeds=options.seeds, batch_size=options.batch_size, epochs=options.epochs, **some
  )


def grid(options, file, began):
  """The grid, by a sweep: each point's mean nll, and the seconds of all of them."""
  from jaxdistill import search

  points = search.product(
    temperature=options.temperatures, soft_weight=options.soft_weights, rate=options.rates
  )
  found = search.sweep(points=points, **jax_side(options, file))
  values = [float(np.mean(row.metrics["nll"])) for row in found.rows]
  return [{"values": values, "seconds": [time.time() - began] * len(values)}]


def study(options, file, began):
  """Ours: each study's values in the order of its trials, and when each ended."""
  import optuna

  from jaxdistill import search

  told, parts = [], jax_side(options, file)
  for seed in range(options.repeats):
    storage = optuna.storages.InMemoryStorage()
    proposals = search.Proposals(
      space(options),
      trials=options.trials,
      at_once=options.at_once,
      sampler=sampler(seed),
      pruner=optuna.pruners.NopPruner(),
      storage=storage,
    )
    search.study(proposals=proposals, **parts)
    trials = optuna.load_study(study_name="study", storage=storage).trials
    told.append(timed(trials, began))
    began = time.time()  # the next study begins in a process that is warm, and is told apart
  return told


def pytorch(options, file, began):
  """Optuna over a loop in PyTorch, one trial after another."""
  import optuna
  import pytorch
  import torch
  from sweep_sides import Task, pytorch_parts, pytorch_student
  from torch.nn import functional

  optuna.logging.set_verbosity(optuna.logging.WARNING)
  torch.set_num_threads(options.threads)
  what = task(options, file, Task)
  parts = pytorch_parts(what)
  with torch.no_grad():
    known = parts.teacher(parts.inputs)

  def trained(trial):
    point = {name: trial._suggest(name, one) for name, one in space(options).items()}
    found = []
    for row, seed in enumerate(options.seeds):
      student = pytorch_student(what, seed)
      pytorch.train(
        student,
        parts.inputs,
        parts.labels,
        parts.orders[row],
        outputs=lambda _, rows: known[rows],
        hard_weight=0.1,
        **point,
      )
      with torch.no_grad():
        found.append(float(functional.cross_entropy(student(parts.held_out), parts.wanted)))
    return float(np.mean(found))

  told = []
  for seed in range(options.repeats):
    made = optuna.create_study(sampler=sampler(seed))
    made.optimize(trained, n_trials=options.trials)
    told.append(timed(made.trials, began))
    began = time.time()
  return told


def timed(trials, began):
  """Values of trials, and the seconds after which each was there."""
  seconds = [trial.datetime_complete.timestamp() - began for trial in trials]
  return {"values": [trial.value for trial in trials], "seconds": seconds}


SIDES = {"grid": grid, "study": study, "pytorch": pytorch}


def call(side, options, file):
  """What a side measured, in a process of its own."""
  settings = json.dumps({**dataclasses.asdict(options), "out": str(options.out)})
  command = [sys.executable, __file__, side, settings, file, str(time.time())]
  made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
  return json.loads(made.stdout.splitlines()[-1])


def faster_threads(options, file):
  """With how many threads PyTorch trains this student faster, by two trials of each."""
  found = {}
  for threads in sorted({1, os.cpu_count() or 1}):
    some = dataclasses.replace(options, threads=threads, trials=3, repeats=1)
    seconds = call("pytorch", some, file)[0]["seconds"]
    found[threads] = (seconds[-1] - seconds[0]) / 2
  return min(found, key=found.get), found


def reached(told, target):
  """By each study: how many trials, and seconds, until one was as good as the target, or None."""
  found = []
  for one in told:
    first = next((i for i, value in enumerate(one["values"]) if value <= target), None)
    at = None if first is None else {"trials": first + 1, "seconds": one["seconds"][first]}
    found.append({"reached": at, "best": min(one["values"]), "all": one["seconds"][-1]})
  return found


def main(options: Options) -> None:
  from sweep import prepare

  from jaxdistill import data, runs

  written = {"environment": runs.environment(), **dataclasses.asdict(options), "out": None}
  written["load"] = os.getloadavg()
  with tempfile.TemporaryDirectory() as folder:
    file = str(pathlib.Path(folder, "digits.npz"))
    names = data.splits("digits")
    teaching = dataclasses.make_dataclass("Teaching", ["epochs", "batch_size", "rate"])
    splits = [data.load("digits", names[split]) for split in ("train", "validation")]
    prepare(teaching(options.epochs, options.batch_size, 1e-3), file, *splits)
    [whole] = call("grid", options, file)
    target = min(whole["values"])
    written["grid"] = {
      "best": target,
      "seconds": whole["seconds"][-1],
      "points": len(whole["values"]),
    }
    print(
      f"grid: {len(whole['values'])} points, best nll {target:.4f}, {whole['seconds'][-1]:.1f} s"
    )
    sides = ["study"]
    if importlib.util.find_spec("torch") is None:
      print("PyTorch is not installed: its side is left out (pip install 'jaxdistill[peers]').")
    else:
      sides.append("pytorch")
      if not options.threads:
        threads, tried = faster_threads(options, file)
        options = dataclasses.replace(options, threads=threads)
        written["pytorch_threads"] = {"taken": threads, "seconds_a_trial": tried}
    for side in sides:
      written[side] = reached(call(side, options, file), target)
      for one in written[side]:
        at = one["reached"]
        where = f"{at['trials']} trials, {at['seconds']:.1f} s" if at else "not reached"
        print(f"{side}: {where}; best {one['best']:.4f} of {options.trials} in {one['all']:.1f} s")
  options.out.parent.mkdir(parents=True, exist_ok=True)
  options.out.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
  if len(sys.argv) > 4 and sys.argv[1] in SIDES:
    read = {n: tuple(v) if isinstance(v, list) else v for n, v in json.loads(sys.argv[2]).items()}
    print(json.dumps(SIDES[sys.argv[1]](Options(**read), sys.argv[3], float(sys.argv[4]))))
  else:
    import tyro  # here, as a side needs none

    main(tyro.cli(Options))
