"""CIFAR-100: a teacher of the 100 fine classes into a student of the 20 coarse ones.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015. The teacher was trained
for another task than the student's. Its classes are grouped at temperature 1, so that a coarse
class is as probable as the fine ones in it together; which are in it is read off the data.

Command:   python experiments/cifar100_coarse.py --published --out runs/cifar100-coarse
Hardware:  one GPU: ResNet-56 into ResNet-20, the protocol of cifar100.py
Time:      not measured
Expected:  no published figure that we know of; the published setting has not been run by us yet,
           for want of an accelerator
Short:     python experiments/cifar100_coarse.py --short --out runs/cifar100-coarse-short
Got:       the short setting, on two cores of an AMD EPYC (Python 3.11, jax 0.10.2) in 1,425 seconds
           with much other work beside it: teacher 56.72, labels alone 33.50 ± 0.46, distilled
           38.62 ± 0.94 % of the coarse classes on test (mean ± std over five seeds, initialisation
           and data order)

In the short setting the students see a tenth of the images that the teacher saw, the same ones
with and without it: what the gain owes to the fine classes and what to the other images, it does
not say. Nothing was searched: one pilot of this setting on validation, with three seeds (labels
alone 33.1, distilled 38.1 %), then this run.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from typing import Literal

import jax
import numpy as np
import optax

import command_line
from jaxdistill import data, evaluation, networks, recipes, reports, runs, teachers, train
from jaxdistill.networks import models

SCRIPT = "experiments/cifar100_coarse.py"


@dataclasses.dataclass(frozen=True)
class Config:
  """What defines a run; saved as config.json."""

  teacher: str = "resnet56"
  """A factory of networks.models; or "convnet-64-128-256", a ConvNet of these channels."""
  student: str = "resnet20"
  seeds: int = 5
  published: bool = False
  """Train on all of train, as most papers do; otherwise a tenth is held out for validation."""
  fraction: int = 100
  """Percent of the training split that the students see; the teacher sees all of it."""
  epochs: int = 240
  teacher_epochs: int = 240
  batch_size: int = 64
  teacher_batch_size: int = 64
  optimizer: Literal["sgd", "adam"] = "sgd"
  """SGD in three steps with weight decay, for the residual networks; or Adam along a cosine."""
  rate: float = 0.05
  teacher_rate: float = 0.05
  temperature: float = 4.0
  soft_weight: float = 0.9
  hard_weight: float = 0.1


# Networks without normalisation, whose convolutions are matrix products: fast on a CPU.
SHORT = Config(
  teacher="convnet-32-64-128",
  student="convnet-8-16-32",
  fraction=10,
  epochs=60,
  teacher_epochs=20,
  teacher_batch_size=128,
  optimizer="adam",
  rate=2e-3,
  teacher_rate=1e-3,
)


@dataclasses.dataclass(frozen=True)
class Options:
  """How a run is carried out; changes no number beyond rounding."""

  out: pathlib.Path = pathlib.Path("runs/cifar100-coarse")
  """Folder of the run; a run that was stopped goes on there."""
  evaluate: pathlib.Path | None = None
  """Evaluate the run in this folder again instead of training."""
  split: Literal["validation", "test"] = "test"
  """The split to evaluate on."""
  data_dir: str | None = None
  """Where TFDS keeps its data sets; its own default when left out."""
  stop_after: float | None = None
  """Seconds after which the script saves and leaves; started again, it goes on from there."""
  short: bool = False
  """Start from the short setting for a CPU instead of the published one."""
  seeds_by: Literal["vmap", "unroll"] | None = None
  """Seeds side by side or one after another, in one program either way; by what suits."""
  scan: bool | None = None
  """Many steps in one dispatch; by what suits: convolutions in a loop are slow on a CPU."""
  tensorboard: bool = False
  """Also write TensorBoard event files."""


def network(name: str, num_classes: int):
  if name.startswith("convnet-"):
    channels = tuple(int(c) for c in name.split("-")[1:])
    module = networks.models.ConvNet(
      channels=channels,
      strides=(2,) * len(channels),
      dense=2 * channels[-1],
      num_classes=num_classes,
    )
    return networks.linen(module, name=name)
  there = [n for n in models.__all__ if n.startswith(("resnet", "wrn"))]
  if name not in there:
    raise SystemExit(f"{name!r} is no network; there are convnet-8-16-32, {', '.join(there)}.")
  return networks.linen(getattr(models, name)(num_classes=num_classes), name=name)


def load(config: Config, split: str, data_dir: str | None) -> tuple[data.Examples, data.Examples]:
  """One split twice: with its fine labels, and with its coarse ones."""
  part = data.splits("cifar100", published=config.published, data_dir=data_dir)[split]
  if part is None:
    raise SystemExit("--published trains on all of train: there is no validation split.")
  opened = {
    name: data.records("cifar100", part, data_dir=data_dir, labels=name)
    for name in ("label", "coarse_label")
  }
  decoded = opened["label"].features(np.arange(len(opened["label"])))  # once: it takes seconds
  images = np.stack([example["image"] for example in decoded])
  fine, coarse = (
    dataclasses.replace(
      data.from_arrays(
        images,
        np.array([example[name] for example in decoded]),
        num_classes=records.num_classes,
        name=records.name,
        split=part,
        label_names=records.label_names,
      ),
      version=records.version,
    )
    for name, records in opened.items()
  )
  return fine, coarse


def coarse_of_fine(fine: data.Examples, coarse: data.Examples) -> list[int]:
  """The coarse class of each fine class, as the examples have it."""
  pairs = np.unique(np.stack([fine.labels, coarse.labels], axis=1), axis=0)
  if not np.array_equal(pairs[:, 0], np.arange(fine.num_classes)):
    raise SystemExit("A fine class is missing, or in two coarse ones: is this CIFAR-100?")
  return pairs[:, 1].tolist()


def batches_of(examples: data.Examples):
  return data.evaluation_batches(examples, batch_size=200, normalize=data.CIFAR)


def train_all(config: Config, options: Options) -> None:
  teacher, student = network(config.teacher, 100), network(config.student, 20)
  fine, coarse = load(config, "train", options.data_dir)
  held_out = None if config.published else load(config, "validation", options.data_dir)
  groups = coarse_of_fine(fine, coarse)
  seen = len(coarse) * config.fraction // 100
  fewer = dataclasses.replace(
    coarse, inputs=coarse.inputs[:seen], labels=coarse.labels[:seen], ids=coarse.ids[:seen]
  )
  command_line.look_at(fine, teacher, batch_size=config.teacher_batch_size)
  command_line.look_at(fewer, student, batch_size=config.batch_size)
  folder = runs.claim(options.out, {"experiment": "cifar100-coarse", **dataclasses.asdict(config)})
  runs.write_json(folder / "coarse_of_fine.json", groups)

  dispatch = train.with_jit(seeds_by=options.seeds_by, scan=options.scan)

  def fit(name, network, examples, seeds, validation, objective, teacher=None):
    own = "teacher_" if name == "teacher" else ""
    epochs, rate = getattr(config, f"{own}epochs"), getattr(config, f"{own}rate")
    source = data.on_device(
      examples,
      batch_size=getattr(config, f"{own}batch_size"),
      data_seed=0,
      augmentation=data.crop_flip(padding=4),
      normalize=data.CIFAR,
    )
    steps = epochs * source.steps_per_epoch
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    if config.optimizer == "sgd":
      optimizer = train.optimizers.sgd(rate, steps=steps)
    validate = None if validation is None else evaluation.validator(batches_of(validation))
    return train.fit(
      network,
      objective,
      data=[dataclasses.replace(source, data_seed=seed) for seed in seeds],
      optimizer=optimizer,
      steps=steps,
      seed=seeds,
      teacher=teacher,
      dispatch=dispatch,
      watch=train.Watch(
        validate,
        validate_every=max(1, epochs // 10) * source.steps_per_epoch,
        keep_last=1,  # a folder small enough to be carried to another machine
      ),
      run=train.Run(
        folder / name,
        config={"experiment": f"cifar100-coarse/{name}"},
        trackers=[runs.TensorBoard()] if options.tensorboard else [],
      ),
    )

  on_fine, on_coarse = (None, None) if held_out is None else held_out
  # The teacher gets a seed of its own, so that no student shares its data order with it.
  (taught,) = fit("teacher", teacher, fine, [100], on_fine, recipes.labels()).unstack()
  seeds = range(config.seeds)
  fit("baseline", student, fewer, seeds, on_coarse, recipes.labels())
  objective = recipes.kd(
    temperature=config.temperature,
    soft_weight=config.soft_weight,
    hard_weight=config.hard_weight,
  )
  fit("student", student, fewer, seeds, on_coarse, objective, teachers.grouped(taught, groups))


def measure(config: Config, options: Options, folder: pathlib.Path) -> pathlib.Path:
  _, coarse = load(config, options.split, options.data_dir)
  batches = batches_of(coarse)
  groups = json.loads((folder / "coarse_of_fine.json").read_text())
  (taught,) = teachers.restore(folder / "teacher", network(config.teacher, 100)).unstack()
  length = f"{config.epochs} epochs of {config.fraction} % of the training split"
  path, result = reports.compare_students(
    folder,
    network=network(config.student, 20),
    teacher=teachers.grouped(taught, groups),
    batches=batches,
    descriptions={
      "teacher": f"{config.teacher}, trained on the 100 fine classes, then grouped, "
      f"{config.teacher_epochs} epochs of all of the training split",
      "baseline": f"{config.student}, trained on coarse labels alone, {length}",
      "student": f"{config.student}, distilled at temperature {config.temperature:g}, {length}",
    },
    dataset=f"CIFAR-100 {coarse.version}, 20 coarse classes",
    split=options.split,
    examples=coarse,
    seeds=range(config.seeds),
    varied="initialisation and data order",
    commands=runs.commands(SCRIPT, config, folder, options.split, options.data_dir),
  )
  print(f"\n{reports.table(result)}\n\n{result['verdict']}\nReport: {path}")
  return path


def main(config: Config, options: Options) -> None:
  began = time.perf_counter()
  if options.evaluate is not None:
    command_line.first(
      measure, runs.restore_config(options.evaluate, Config), options, options.evaluate
    )
  else:
    with train.time_limit(options.stop_after):
      train_all(config, options)
    command_line.first(measure, config, options, options.out)
  print(f"{time.perf_counter() - began:.0f} s on {jax.devices()[0].device_kind}")


def parse(args: list[str]) -> tuple[Config, Options]:
  return command_line.parse(args, SHORT if "--short" in args else Config(), Options(), __doc__)


if __name__ == "__main__":
  command_line.run(main, parse)
