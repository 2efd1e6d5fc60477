"""ImageNet, streamed: a ViT-S/16 into a ViT-Ti/16, the teacher's answers cached for every view.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, by consistent views of
a finite number (Beyer et al., "Knowledge distillation: A good teacher is patient and consistent",
2022): teacher and student see the same crop. Pictures are decoded, cut out, resized and recoloured
on the host as they are read (random-resized-crop and colour jitter of 0.4, 224 x 224), and never
held whole; AdamW, five epochs of warm-up and a cosine. The set is prepared once by TFDS, from the
archives that image-net.org gives to who registers there.

Command:   python experiments/imagenet.py --out runs/imagenet
           Before it, on any number of machines: the same with --cache-part 3/16 (a teacher that is
           trained, a part of its cache, and no student).
Hardware:  eight GPUs or a TPU slice
Time:      not measured
Expected:  not measured: we have neither the data nor the hardware.
Short:     python experiments/imagenet.py --short --dataset NAME
Got:       a set of made pictures with ImageNet's features, in the tests: it shows that everything
           runs, no more.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import time

import jax
import optax

import command_line
from jaxdistill import data, evaluation, networks, recipes, reports, runs, teachers, train
from jaxdistill.networks import models

SCRIPT = "experiments/imagenet.py"
# Of the channels of ImageNet's training pictures, 0 to 1.
NORMALIZE = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclasses.dataclass(frozen=True)
class Config:
  """What defines a run; saved as config.json."""

  dataset: str = "imagenet2012"
  """TFDS's name of a set with the features image and label."""
  size: int = 224
  """The edge of a picture in pixels; patches are a fourteenth of it."""
  teacher_width: int = 384
  student_width: int = 192
  """Of the tokens, in heads of 64."""
  depth: int = 12
  seeds: int = 1
  epochs: int = 300
  teacher_epochs: int = 300
  views: int = 8
  """How many crops there are of each picture, each of which the teacher is asked about once."""
  batch_size: int = 1024
  learning_rate: float = 1e-3
  weight_decay: float = 0.05
  temperature: float = 1.0
  soft_weight: float = 0.9
  hard_weight: float = 0.1


SHORT = Config(
  size=28, teacher_width=64, student_width=64, depth=1, seeds=2, epochs=1, teacher_epochs=1,
  views=1, batch_size=16,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
  """How a run is carried out; changes no number beyond rounding."""

  out: pathlib.Path = pathlib.Path("runs/imagenet")
  """Folder of the run; a run that was stopped goes on there."""
  evaluate: pathlib.Path | None = None
  """Evaluate the run in this folder again instead of training."""
  data_dir: str | None = None
  """Where TFDS keeps its data sets; its own default when left out."""
  cache_part: str | None = None
  """Fill this part of the teacher's cache, such as 3/16, and leave."""
  cache_limit_gb: float = 100.0
  """The most that the teacher's cache may take: 1.28 million pictures, 8 views: 21 GB."""
  stop_after: float | None = None
  """Seconds after which the script saves and leaves; started again, it goes on from there."""
  workers: int = 0
  """Processes that decode, where threads do not keep the devices busy."""
  prefetch: int = 8
  """Batches that are read ahead."""
  short: bool = False
  """Start from a setting for a CPU."""


@functools.cache  # what was compiled for a network serves it again, when it is measured
def build_networks(config: Config, classes: int):
  def build(width: int):
    module = models.VisionTransformer(
      patch_size=config.size // 14,
      width=width,
      depth=config.depth,
      num_heads=max(1, width // 64),
      num_classes=classes,
    )
    return networks.linen(module, name=f"vit-{width}/{config.size // 14}")

  return build(config.teacher_width), build(config.student_width)


def source_of(config: Config, options: Options) -> data.Source:
  split = data.splits(config.dataset, data_dir=options.data_dir)["train"]
  return data.streamed(
    data.records(config.dataset, split, data_dir=options.data_dir),
    batch_size=config.batch_size,
    data_seed=0,
    on_host=[data.random_resized_crop(config.size), data.colour_jitter()],
    views=config.views,
    normalize=NORMALIZE,
    prefetch=options.prefetch,
    workers=options.workers,
  )


def held_out(config: Config, options: Options, name: str):
  """A split's records, and its batches: streamed, since decoded it is larger than memory."""
  split = data.splits(config.dataset, data_dir=options.data_dir)[name]
  middle = data.central_crop(config.size)
  records = data.records(config.dataset, split, data_dir=options.data_dir, transform=middle)
  batch_size = min(200, config.batch_size)
  return records, data.evaluation_batches(records, batch_size=batch_size, normalize=NORMALIZE)


def part_of(text: str | None) -> tuple[int, int] | None:
  """3/16, counted from 1, as (2, 16)."""
  number, _, of = (text or "").partition("/")
  if text is None:
    return None
  if not (number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
    raise SystemExit(f"--cache-part {text} must be such as 3/16, counted from 1.")
  return int(number) - 1, int(of)


def train_all(config: Config, options: Options) -> None:
  part = part_of(options.cache_part)
  source = source_of(config, options)
  teacher, student = build_networks(config, source.num_classes)
  folder = runs.claim(options.out, {"experiment": "imagenet", **dataclasses.asdict(config)})
  validate = evaluation.validator(held_out(config, options, "validation")[1])

  def fit(name, network, objective, batches, seeds, epochs):
    steps = epochs * source.steps_per_epoch
    warm_up = min(5, epochs) * source.steps_per_epoch
    rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warm_up, steps + 1)
    return train.fit(
      network,
      objective,
      data=[batches] * len(seeds),  # seeds differ in their initialisation: views are the cache's
      optimizer=optax.adamw(rate, weight_decay=config.weight_decay),
      steps=steps,
      seed=seeds,
      watch=train.Watch(validate, keep_last=1),
      run=train.Run(folder / name, config={"experiment": f"imagenet/{name}"}),
    )

  (taught,) = fit(
    "teacher", teacher, recipes.labels(), source, [100], config.teacher_epochs
  ).unstack()
  frozen = teachers.frozen(taught)
  given = {"dtype": "float16", "limit": round(1e9 * options.cache_limit_gb)}
  if part is not None:
    print(teachers.fill(frozen, source, folder / "outputs", part=part, **given))
    return
  seeds = range(config.seeds)
  fit("baseline", student, recipes.labels(), source, seeds, config.epochs)
  cached = teachers.cached(frozen, source, folder=folder / "outputs", **given)
  objective = recipes.kd(
    temperature=config.temperature,
    soft_weight=config.soft_weight,
    hard_weight=config.hard_weight,
  )
  fit("student", student, objective, cached, seeds, config.epochs)


def measure(config: Config, options: Options, folder: pathlib.Path) -> pathlib.Path:
  records, batches = held_out(config, options, "test")
  teacher, student = build_networks(config, records.num_classes)
  (taught,) = teachers.restore(folder / "teacher", teacher).unstack()
  path, result = reports.compare_students(
    folder,
    network=student,
    teacher=teachers.frozen(taught),
    batches=batches,
    descriptions={
      "teacher": f"{teacher.name}, {config.teacher_epochs} epochs",
      "baseline": f"{student.name}, trained on labels alone, {config.epochs} epochs",
      "student": f"{student.name}, distilled over {config.views} views, {config.epochs} epochs",
    },
    dataset=f"{records.name} {records.version}",
    split="test",
    examples=records,
    seeds=range(config.seeds),
    varied="initialisation",
    commands=runs.commands(SCRIPT, config, folder, "test", options.data_dir),
  )
  print(f"\n{reports.table(result)}\n\n{result['verdict']}\nReport: {path}")
  return path


def main(config: Config, options: Options) -> None:
  began = time.perf_counter()
  if options.evaluate is not None:
    measure(runs.restore_config(options.evaluate, Config), options, options.evaluate)
  else:
    with train.time_limit(options.stop_after):
      train_all(config, options)
    if options.cache_part is None:
      measure(config, options, options.out)
  print(f"{time.perf_counter() - began:.0f} s on {jax.devices()[0].device_kind}")


def parse(args: list[str]) -> tuple[Config, Options]:
  config = SHORT if "--short" in args else Config()
  config, options = command_line.parse(args, config, Options(), __doc__)
  part_of(options.cache_part)  # what is no part says so before anything is read
  return config, options


if __name__ == "__main__":
  command_line.run(main, parse)
