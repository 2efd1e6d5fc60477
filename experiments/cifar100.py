"""CIFAR-100: a deep residual network into a shallow one, by the field's protocol.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, under the protocol of
Tian, Krishnan, Isola, "Contrastive Representation Distillation", 2020 (RepDistiller): 240 epochs,
batch 64, SGD 0.05 with momentum 0.9 and weight decay 5e-4, a tenth of the rate after epochs 150,
180 and 210, crop and flip; temperature 4, soft weight 0.9, hard weight 0.1; the last epoch.

Command:   python experiments/cifar100.py --published --out runs/cifar100
Hardware:  one GPU; every seed of the student side by side in one program
Time:      not measured
Expected:  teacher 72.34, labels alone 69.06, distilled 70.66 % (RepDistiller's README, last epoch)
Short:     python experiments/cifar100.py --short --out runs/cifar100-short
Got:       the short setting, on two cores of an AMD EPYC (Python 3.11, jax 0.10.2) in 629 seconds,
           other work beside it: ResNet-14 8.75, ResNet-8 on labels 7.36 ± 0.19, distilled 6.59 ±
           0.11 % on test (mean ± std over two seeds, initialisation and data order), so that
           distillation hurts. A tenth of the data for three epochs of a teacher that has hardly
           learned anything itself: it shows that everything runs, no more.
           The published setting has not been run by us yet, for want of an accelerator.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import time
from typing import Literal

import jax

import command_line
from jaxdistill import data, evaluation, networks, recipes, reports, runs, teachers, train
from jaxdistill.networks import models

SCRIPT = "experiments/cifar100.py"


@dataclasses.dataclass(frozen=True)
class Config:
  """What defines a run; saved as config.json."""

  teacher: str = "resnet56"
  """A factory of jaxdistill.networks.models."""
  student: str = "resnet20"
  teachers: int = 1
  seeds: int = 5
  published: bool = False
  """Train on all of train, as most papers do; otherwise a tenth is held out for validation."""
  epochs: int = 240
  teacher_epochs: int = 240
  fraction: int = 100
  """Percent of the training split that is used."""
  batch_size: int = 64
  learning_rate: float = 0.05
  weight_decay: float = 5e-4
  temperature: float = 4.0
  soft_weight: float = 0.9
  hard_weight: float = 0.1
  hint_weight: float = 0.0
  """Above 0: match `hint_layer` too, through a projector where the widths differ."""
  hint_layer: str = "stage3"


# A setting that a laptop's CPU finishes in minutes; far from the published accuracy.
SHORT = Config(
  teacher="resnet14",
  student="resnet8",
  seeds=2,
  epochs=3,
  teacher_epochs=4,
  fraction=10,
)


@dataclasses.dataclass(frozen=True)
class Options:
  """How a run is carried out; changes no number beyond rounding."""

  out: pathlib.Path = pathlib.Path("runs/cifar100")
  """Folder of the run; a run that was stopped goes on there."""
  evaluate: pathlib.Path | None = None
  """Evaluate the run in this folder again instead of training."""
  split: Literal["train", "validation", "test"] = "test"
  """The split to evaluate on."""
  data_dir: str | None = None
  """Where TFDS keeps its data sets; its own default when left out."""
  stop_after: float | None = None
  """Seconds after which the script saves and leaves; started again, it goes on from there."""
  short: bool = False
  """Start from the short setting for a CPU instead of the published one."""
  dispatch: Literal["jit", "pmap"] = "jit"
  """How the step is compiled."""
  seeds_by: Literal["vmap", "unroll"] | None = None
  """Seeds side by side or one after another, in one program either way; by what suits."""
  scan: bool | None = None
  """Many steps in one dispatch; by what suits: convolutions in a loop are slow on a CPU."""
  tensorboard: bool = False
  """Also write TensorBoard event files."""


@functools.cache  # what was compiled for a network serves it again, when it is measured
def build_networks(config: Config, axis_name: str | None = None):
  def build(name: str):
    there = [n for n in models.__all__ if n.startswith(("resnet", "wrn"))]
    if name not in there:
      raise SystemExit(f"{name!r} is no CIFAR network; there are {', '.join(there)}.")
    module = getattr(models, name)(num_classes=100, axis_name=axis_name)
    return networks.linen(module, features=[config.hint_layer], name=name)

  return build(config.teacher), build(config.student)


def split_of(config: Config, name: str, data_dir: str | None) -> str:
  chosen = data.splits("cifar100", published=config.published, data_dir=data_dir)[name]
  if chosen is None:
    raise SystemExit("--published trains on all of train: there is no validation split.")
  if name == "train" and config.fraction < 100:
    return f"train[:{config.fraction * (500 if config.published else 450)}]"
  return chosen


def train_all(config: Config, options: Options) -> None:
  # BatchNorm is given the axis, so that it sees the whole batch under pmap as it does under jit.
  mapped = options.dispatch == "pmap"
  axis_name = train.AXIS if mapped else None
  over_devices = train.with_pmap if mapped else train.with_jit
  dispatch = over_devices(seeds_by=options.seeds_by, scan=options.scan)
  examples = data.load(
    "cifar100", split_of(config, "train", options.data_dir), data_dir=options.data_dir
  )
  validate = None
  if not config.published:
    held_out = data.load(
      "cifar100", split_of(config, "validation", options.data_dir), data_dir=options.data_dir
    )
    validate = evaluation.validator(
      data.evaluation_batches(held_out, batch_size=200, normalize=data.CIFAR)
    )

  teacher, student = build_networks(config, axis_name)  # a wrong name says so before the claim
  command_line.look_at(examples, teacher, student, batch_size=config.batch_size)
  folder = runs.claim(options.out, {"experiment": "cifar100", **dataclasses.asdict(config)})

  def fit(name, network, objective, seeds, epochs, teacher=None):
    source = data.on_device(
      examples,
      batch_size=config.batch_size,
      data_seed=0,
      augmentation=data.crop_flip(padding=4),
      normalize=data.CIFAR,
    )
    sources = [dataclasses.replace(source, data_seed=seed) for seed in seeds]
    steps = epochs * source.steps_per_epoch
    return train.fit(
      network,
      objective,
      data=sources,
      optimizer=train.optimizers.sgd(
        config.learning_rate, steps=steps, weight_decay=config.weight_decay
      ),
      steps=steps,
      seed=seeds,
      teacher=teacher,
      dispatch=dispatch,
      watch=train.Watch(
        validate,
        keep_last=1,  # a folder small enough to be carried to another machine
      ),
      run=train.Run(
        folder / name,
        config={"experiment": f"cifar100/{name}"},
        trackers=[runs.TensorBoard()] if options.tensorboard else [],
      ),
    )

  # Teachers get seeds of their own, so that no student shares its data order with one.
  own = range(100, 100 + config.teachers)
  members = fit("teacher", teacher, recipes.labels(), own, config.teacher_epochs)
  seeds = range(config.seeds)
  fit("baseline", student, recipes.labels(), seeds, config.epochs)
  objective = recipes.kd(
    temperature=config.temperature,
    soft_weight=config.soft_weight,
    hard_weight=config.hard_weight,
  )
  if config.hint_weight > 0:
    layer = config.hint_layer
    projector = functools.partial(recipes.projectors.between, axis_name=axis_name)
    weight = config.hint_weight
    hint = recipes.hint(layer, f"0/{layer}", hint_weight=weight, projector=projector)
    objective = recipes.combine(objective, hint)
  fit("student", student, objective, seeds, config.epochs, teachers.ensemble(members.unstack()))


def measure(config: Config, options: Options, folder: pathlib.Path) -> pathlib.Path:
  split = split_of(config, options.split, options.data_dir)
  examples = data.load("cifar100", split, data_dir=options.data_dir)
  batches = data.evaluation_batches(examples, batch_size=200, normalize=data.CIFAR)
  teacher, network = build_networks(config)
  members = teachers.restore(folder / "teacher", teacher).unstack()
  path, result = reports.compare_students(
    folder,
    network=network,
    teacher=teachers.ensemble(members),
    batches=batches,
    descriptions={
      "teacher": f"{config.teachers} {config.teacher}, {config.teacher_epochs} epochs",
      "baseline": f"{config.student}, trained on labels alone, {config.epochs} epochs",
      "student": f"{config.student}, distilled at temperature {config.temperature:g}, "
      f"{config.epochs} epochs",
    },
    dataset=f"CIFAR-100 {examples.version}",
    split=options.split,
    examples=examples,
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
