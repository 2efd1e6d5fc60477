"""A student without any data: a generator learns to make what the digits' teacher is sure of.

Chen et al., "Data-Free Learning of Student Networks" (DAFL), 2019. The teacher is trained on the
8x8 digits that ship inside scikit-learn, as in digits.py; the student sees no image of them, and
no label: it learns the teacher's answers to images that a generator makes of noise, which is
trained to make images that the teacher names without doubt, of all classes. Beside it the same
student on plain noise in the place of those images, and on the labels: what there is to lose.

Command:   python experiments/data_free.py --out runs/data_free
Hardware:  two cores of an Intel Xeon at 2.5 GHz, no accelerator (Python 3.11, jax 0.10.2), commit
           575dd29
Time:      709 seconds with other work beside it, 9 minutes of CPU time
Expected:  far above plain noise, and below labels
Got:       teacher 97.70 % on the 697 test images, labels 96.73 ± 0.47, plain noise 33.29 ± 2.86,
           generated images 63.50 ± 9.38: twice what noise teaches, and far from labels. On
           CIFAR-100, WRN-40-2 into 16-2, Fang et al. ("Contrastive Model Inversion", 2021) have
           43.70 by it, where real images give 70.79.

Generator and student have an Adam each, at the rates of the paper's code for MNIST (student) and of
its successors (generator), and one step each in every step, as in that code. No image of the task
decides anything: the numbers are of the last step, on the test split, which is read once.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import pathlib
import time
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import command_line
from jaxdistill import data, evaluation, networks, recipes, runs, teachers, train

SCRIPT = "experiments/data_free.py"
# Of its batches, which are noise: how many there are in an epoch decides nothing.
STEPS_PER_EPOCH = 100


@dataclasses.dataclass(frozen=True)
class Config:
  """What defines a run; saved as config.json."""

  seeds: int = 5
  """Of initialisation and noise together (of data order, with labels)."""
  batch_size: int = 128
  teacher_epochs: int = 60
  teacher_rate: float = 3e-3
  teacher_shift: int = 1
  """Pixels by which the teacher's images are shifted."""
  steps: int = 4000
  """Of the students without data."""
  epochs: int = 200
  """Of the students of labels."""
  rate: float = 2e-3
  generator_rate: float = 1e-3
  generator_width: int = 32
  teacher_channels: tuple[int, ...] = (16, 32)
  teacher_dense: int = 128
  student_channels: tuple[int, ...] = (8, 8)
  student_dense: int = 24


@dataclasses.dataclass(frozen=True)
class Options:
  """How a run is carried out; changes no number beyond rounding."""

  out: pathlib.Path = pathlib.Path("runs/data_free")
  """Folder of the run; a run that was stopped goes on there."""
  split: Literal["validation", "test"] = "test"
  """The split to evaluate on."""
  data_dir: str | None = None
  """Where TFDS keeps its data sets; its own default when left out."""
  stop_after: float | None = None
  """Seconds after which the script saves and leaves; started again, it goes on from there."""


class Generator(nn.Module):
  """DAFL's generator, for images of 8 x 8 pixels in 0 .. 1: noise, twice enlarged and convolved."""

  width: int

  @nn.compact
  def __call__(self, noise: Any, *, train: bool = False) -> Any:
    """Images ``[B, 8, 8, 1]`` of noise of that shape."""

    def norm(x: Any) -> Any:
      return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)

    # [B, 8, 8, 1] of noise is a vector of 64; the paper's has 100.
    x = nn.Dense(2 * 2 * self.width)(noise.reshape(noise.shape[0], -1))
    x = norm(x.reshape(-1, 2, 2, self.width))
    for _ in range(2):
      x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
      x = nn.leaky_relu(norm(nn.Conv(self.width, (3, 3))(x)), 0.2)
    # Where the paper has tanh and a normalisation, since its images are normalised so.
    return nn.sigmoid(nn.Conv(1, (3, 3))(x))


@functools.cache  # what was compiled for a network serves it again, when it is measured
def build_networks(config: Config) -> tuple[Any, Any, Any]:
  def build(channels: tuple[int, ...], dense: int) -> Any:
    return networks.models.ConvNet(channels=channels, strides=(1, 2), dense=dense)

  teacher = build(config.teacher_channels, config.teacher_dense)
  student = build(config.student_channels, config.student_dense)
  return (
    networks.linen(teacher, features=["hidden"], name="teacher"),
    networks.linen(student, features=["hidden"], name="student"),
    networks.linen(Generator(config.generator_width), name="generator"),
  )


def noise(config: Config, normalize: Any = None) -> data.Source:
  """Batches of nothing but noise, of the shape of the images, drawn anew for every view."""
  size = STEPS_PER_EPOCH * config.batch_size
  drawn = data.Augmentation(
    lambda image, key: jax.random.normal(key, image.shape, image.dtype), None, "noise"
  )
  return data.on_device(
    data.from_arrays(np.zeros((size, 8, 8, 1), np.float32), None, name="noise"),
    batch_size=config.batch_size,
    data_seed=0,
    augmentation=drawn,
    normalize=normalize,
  )


def apart(config: Config) -> Any:
  """An Adam for each of the two networks."""
  rates = {"student": config.rate, "generator": config.generator_rate}
  each = {name: optax.adam(rate) for name, rate in rates.items()}
  return optax.multi_transform(each, {name: name for name in rates})


def train_all(config: Config, options: Options) -> dict[str, Any]:
  """The teacher, and the students by how they were taught."""
  teacher, student, generator = build_networks(config)
  names = data.splits("digits")
  examples = data.load("digits", names["train"], data_dir=options.data_dir)
  command_line.look_at(examples, teacher, student, batch_size=config.batch_size)
  folder = runs.claim(options.out, {"experiment": "data_free", **dataclasses.asdict(config)})
  seeds = range(config.seeds)

  def fit(
    name: str, network: Any, objective: Any, source: data.Source, steps: int, **rest: Any
  ) -> Any:
    first = rest.pop("first_seed", None)
    order = seeds if first is None else [first]
    return train.fit(
      network,
      objective,
      data=[dataclasses.replace(source, data_seed=seed) for seed in order],
      steps=steps,
      seed=order,
      run=train.Run(folder / name, config={"experiment": f"data_free/{name}"}),
      **rest,
    )

  def images(batch_size: int, shift: int = 0) -> data.Source:
    augmentation = data.crop(shift)
    options = {"augmentation": augmentation, "normalize": data.DIGITS}
    return data.on_device(examples, batch_size=batch_size, data_seed=0, **options)

  source = images(64, config.teacher_shift)
  steps = config.teacher_epochs * source.steps_per_epoch
  adam = optax.adam(optax.cosine_decay_schedule(config.teacher_rate, steps))
  labels = recipes.labels()
  taught = fit("teacher", teacher, labels, source, steps, optimizer=adam, first_seed=100)
  (large,) = taught.unstack()
  source = images(64)
  steps = config.epochs * source.steps_per_epoch
  adam = optax.adam(optax.cosine_decay_schedule(6e-3, steps))
  students = {"labels": fit("labels", student, labels, source, steps, optimizer=adam)}
  # The teacher's answers to noise as it comes, in 0 .. 1 as its images are.
  students["noise"] = fit(
    "noise",
    student,
    recipes.kd(temperature=1.0, soft_weight=1.0, hard_weight=None),
    noise(config, normalize=jax.nn.sigmoid),
    config.steps,
    optimizer=optax.adam(config.rate),
    teacher=teachers.frozen(large),
  )
  students["data-free"] = fit(
    "data_free",
    recipes.with_generator(student, generator),
    recipes.dafl(large, student, layer="hidden"),
    noise(config),
    config.steps,
    optimizer=apart(config),
  )
  return {"teacher": large, **students}


def table(rows: list[dict[str, Any]]) -> str:
  """The rows as Markdown."""
  lines = ["| student | images | accuracy, % |", "| --- | --- | ---: |"]
  for row in rows:
    spread = "" if row["std"] is None else f" ± {row['std']:.2f}"
    lines.append(f"| {row['name']} | {row['images']} | {row['mean']:.2f}{spread} |")
  return "\n".join(lines)


def measure(config: Config, options: Options, models: dict[str, Any]) -> pathlib.Path:
  """Reads the split, once, and writes what came out."""
  examples = data.load("digits", data.splits("digits")[options.split], data_dir=options.data_dir)
  batches = data.evaluation_batches(examples, batch_size=128, normalize=data.DIGITS)
  seen = {"teacher": "digits, shifted", "labels": "digits", "noise": "noise in 0 .. 1"}
  rows = []
  for name, model in models.items():
    found = evaluation.evaluate(model, batches)["accuracy"]
    values = 100 * np.asarray(found, np.float64).reshape(-1)
    mean, std = evaluation.metrics.mean_std(values)
    rows.append({"name": name, "images": seen.get(name, "generated"), "mean": mean, "std": std})
  folder = options.out
  stem = "data_free" if options.split == "test" else f"data_free-{options.split}"
  with (folder / f"{stem}.csv").open("w", newline="") as file:
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
  command = runs.command(SCRIPT, config, out=folder, split=options.split, data_dir=options.data_dir)
  lines = [
    f"# Without data, digits, {options.split} split",
    "",
    f"{len(examples):,} examples. Mean ± standard deviation over {config.seeds} seeds; "
    "initialisation, noise and data order all varied. One teacher. The last step of every run.",
    "",
    table(rows),
    "",
    "```",
    command,
    "```",
    "",
  ]
  path = folder / f"{stem}.md"
  path.write_text("\n".join(lines))
  print(f"\n{table(rows)}\n\nReport: {path}")
  return path


def main(config: Config, options: Options) -> None:
  began = time.perf_counter()
  with train.time_limit(options.stop_after):
    models = train_all(config, options)
  command_line.first(measure, config, options, models)
  print(f"{time.perf_counter() - began:.0f} s on {jax.devices()[0].device_kind}")


def parse(args: list[str]) -> tuple[Config, Options]:
  return command_line.parse(args, Config(), Options(), __doc__)


if __name__ == "__main__":
  command_line.run(main, parse)
