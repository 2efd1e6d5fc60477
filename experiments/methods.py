"""The library's methods for labels of one class on a pair of networks: one protocol, one table.

The protocol is that of Tian, Krishnan, Isola, "Contrastive Representation Distillation", 2020
(RepDistiller): SGD with momentum, the rate falling in three steps, weight decay, and the last
epoch. Each recipe has its published layers and warm-up, as a share of the run, and its published
weight, unless a tenth or ten times of it is better on the validation split by more than a standard
error of the difference over the seeds; the test split is read once, for the chosen students. All
factors and seeds of a recipe are trained side by side in one program. FSP and AB train the
student's layers first, for an eighth of the epochs on top (RepDistiller's 30 of 240), and FT its
paraphraser, one for all students.

Command:   python experiments/methods.py --out runs/methods
Hardware:  two cores of an Intel Xeon at 2.5 GHz, no accelerator (Python 3.11, jax 0.10.2), commit
           575dd29
Time:      2,578 seconds with other work beside it, 42 minutes of CPU time; compilation of some
           hundred programs included
Expected:  some gain for most methods. The teacher saw its images shifted, the students do not:
           as in digits.py, that is what there is to gain.
Got:       teacher 99.00, labels alone 97.39 ± 0.47 % on the 697 test images. Above labels alone by
           more than two standard errors: FCFD 98.57 ± 0.29, CRLD 98.34 ± 0.08, SRRL, DKD, GDKD,
           SDD, norm and direction, SP, WTTM, PKT, VkD and the projector of features (mimic). Below
           by more than that: KD, RLD, FT, AT, and logit standardization's MLKD, which diverges at
           the published weight of 9 (10.39), and at a tenth and at ten times of it: MLKD's sums of
           squares grow with the examples of a class, so that of 10 classes they are up to 100
           times those of 100, for which that weight was found. MLKD itself trains at 0.09, hardly
           at its own 0.9, and not at 9. The rest is within the noise: all are in
           experiments/README.md.

Two things to know before this is read as an order of methods. The factor is chosen on 110 images,
one of which is 0.9 points: KD's tenth was better there by one image and is worse on the test split
by half a point, where an earlier run, with other rounding, chose the published weight and had
98.25. And 24 epochs on 990 images are not 240 on 50,000.

The same with ``--dataset cifar100`` is the field's pair of resnet32x4 and resnet8x4 (RepDistiller's
README, trained on all of train: teacher 79.42, labels 72.50, KD 73.33, CRD 75.51 %). Here a tenth
of train is held out for the choice. It wants a GPU and has not been run by us.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np

import command_line
from jaxdistill import (
  data,
  evaluation,
  losses,
  networks,
  recipes,
  reports,
  runs,
  search,
  teachers,
  train,
)
from jaxdistill.types import Model, Teacher, Term

SCRIPT = "experiments/methods.py"
FEATURES = ("stem", *(f"stage{i}{end}" for i in (1, 2, 3) for end in ("", "_preact")), "pooled")


@dataclasses.dataclass(frozen=True)
class Config:
  """What defines a run; saved as config.json."""

  dataset: Literal["digits", "cifar100"] = "digits"
  seeds: int = 5
  """Of initialisation and data order together."""
  factors: tuple[float, ...] = (1.0, 0.1, 10.0)
  """Of the published weights; the first is taken unless another is clearly better on validation."""
  teacher_depth: int = 8
  teacher_width: tuple[int, ...] = (16, 16, 32, 64)
  student_depth: int = 8
  student_width: tuple[int, ...] = (4, 4, 8, 16)
  epochs: int = 24
  teacher_epochs: int = 60
  teacher_shift: int = 1
  """Pixels by which the teacher's digits are shifted."""
  batch_size: int = 64
  rate: float = 0.05
  weight_decay: float = 5e-4


CIFAR100 = Config(
  dataset="cifar100",
  teacher_depth=32,
  teacher_width=(32, 64, 128, 256),
  student_depth=8,
  student_width=(32, 64, 128, 256),
  epochs=240,
  teacher_epochs=240,
)
# It shows that everything runs, no more.
SHORT = Config(
  seeds=2,
  factors=(1.0, 10.0),
  teacher_width=(4, 4, 8, 8),
  student_width=(2, 2, 4, 4),
  epochs=2,
  teacher_epochs=2,
)


@dataclasses.dataclass(frozen=True)
class Options:
  """How a run is carried out; changes no number beyond rounding."""

  out: pathlib.Path = pathlib.Path("runs/methods")
  """Folder of the run; one that was stopped goes on there, and one that is finished is measured."""
  methods: tuple[str, ...] = ()
  """Which rows, all of them by default; the others can be added later, in the same folder."""
  split: Literal["validation", "test"] = "test"
  """The split to evaluate on; weights are chosen on validation in any case."""
  data_dir: str | None = None
  """Where TFDS keeps its data sets; its own default when left out."""
  stop_after: float | None = None
  """Seconds after which the script saves and leaves; started again, it goes on from there."""
  short: bool = False
  """Start from a setting that takes a minute instead."""


@dataclasses.dataclass(frozen=True)
class Known:
  """What recipes are made from."""

  config: Config
  steps: int
  labels: np.ndarray
  teacher: Any
  means: Callable[[], Any]
  """The teacher's mean feature of each class."""

  def share(self, epochs: int) -> int:
    """The steps of so many of the 240 published epochs."""
    return max(1, round(self.steps * epochs / 240))

  def margins(self) -> list[Any]:
    """Of the BatchNorms before the stages' last ReLUs."""
    last = (self.config.teacher_depth - 2) // 6 - 1
    return recipes.overhaul_margins(
      self.teacher, [f"stage{i}_block{last}/norm2" for i in (1, 2, 3)]
    )

  def tails(self, who: Literal["teacher", "student"] = "teacher") -> dict[str, Any]:
    """A network from its first and from its second stage on."""
    config = self.config
    size = {
      "teacher": (config.teacher_depth, config.teacher_width),
      "student": (config.student_depth, config.student_width),
    }
    whole = resnet(config, *size[who])
    later = {"stage1": ["stage2", "stage3"], "stage2": ["stage3"]}
    return {
      name: networks.linen(whole.clone(after=name), features=names) for name, names in later.items()
    }


@dataclasses.dataclass(frozen=True)
class Method:
  """A recipe, and the keywords that the factor multiplies: its own weights, not the labels'."""

  make: Callable[[Known], Any]
  weights: tuple[str, ...]
  first: Callable[[], Any] | None = None
  """The objective of a stage before it."""
  shows: Callable[[Any], Any] | None = None
  """What makes both networks put out more than the others need."""
  grows: Callable[[Any, Config], Any] | None = None
  """What is trained in the student's place."""
  folds: Callable[[Model, Any], Model] | None = None
  """What makes the student of it again."""
  two_views: bool = False
  """Whether batches show each image twice, as it is and strongly augmented."""
  taught_by: Callable[[Bench], Teacher | None] | None = None
  """What teaches in the large network's place, which may be nobody."""
  optimizer: Callable[..., Any] = train.optimizers.sgd


def resnet(config: Config, depth: int, width: tuple[int, ...]) -> networks.models.ResNet:
  """As matrix products on a CPU, which are fast for many students at once."""
  classes = 10 if config.dataset == "digits" else 100
  conv = "patches" if jax.default_backend() == "cpu" else "lax"
  return networks.models.ResNet(depth, classes, width=width, conv=conv)


def mimic(student: Any, teacher: Any, batch: Any, *, logit_weight: float = 1.0) -> dict[str, Term]:
  """The teacher's logits alone: Ba, Caruana, "Do Deep Nets Really Need to be Deep?", 2014."""
  del batch
  return {"logits": Term(losses.logit_l2(student.logits, teacher.logits), weight=logit_weight)}


METHODS = {
  "kd": Method(lambda _: recipes.kd(), ("soft_weight",)),
  "kd_standardized": Method(lambda _: recipes.kd_standardized(), ("soft_weight",)),
  "dkd": Method(lambda known: recipes.dkd(warmup_steps=known.share(20)), ("soft_weight",)),
  "dist": Method(lambda _: recipes.dist(), ("inter_weight", "intra_weight")),
  "ctkd": Method(lambda known: recipes.ctkd(warmup_steps=known.share(10)), ("soft_weight",)),
  "ofa": Method(lambda _: recipes.ofa(), ("soft_weight", "ofa_weight")),
  "gdkd": Method(lambda known: recipes.gdkd(warmup_steps=known.share(20)), ("soft_weight",)),
  "rld": Method(
    lambda known: recipes.rld(warmup_steps=known.share(20)), ("target_weight", "nontarget_weight")
  ),
  "nkd": Method(lambda _: recipes.nkd(), ("soft_weight",)),
  "ttm": Method(lambda _: recipes.ttm(), ("soft_weight",)),
  "wttm": Method(lambda _: recipes.wttm(), ("soft_weight",)),
  "wsl": Method(lambda _: recipes.wsl(), ("soft_weight",)),
  "mlkd": Method(lambda _: recipes.mlkd(), ("soft_weight", "class_weight", "batch_weight")),
  "tfkd": Method(lambda _: recipes.tfkd(), ("virtual_weight",)),
  "uskd": Method(lambda _: recipes.uskd(), ("target_weight", "nontarget_weight", "weak_weight")),
  "norm_direction": Method(
    lambda known: recipes.norm_direction(known.means(), warmup_steps=known.share(20)),
    ("soft_weight", "direction_weight"),
  ),
  "fitnet": Method(lambda _: recipes.fitnet(), ("hint_weight",)),
  "attention_transfer": Method(lambda _: recipes.attention_transfer(), ("attention_weight",)),
  "nst": Method(lambda _: recipes.nst(), ("nst_weight",)),
  "vid": Method(lambda _: recipes.vid(), ("vid_weight",)),
  "overhaul": Method(lambda known: recipes.overhaul(margins=known.margins()), ("overhaul_weight",)),
  "cwd": Method(lambda _: recipes.cwd(), ("cwd_weight",)),
  "ickd": Method(lambda _: recipes.ickd(), ("ickd_weight",)),
  "mgd": Method(lambda _: recipes.mgd(), ("mgd_weight",)),
  "structure": Method(lambda _: recipes.structure(), ("structure_weight",)),
  "vkd": Method(lambda _: recipes.vkd(), ("vkd_weight",)),
  "catkd": Method(lambda _: recipes.catkd(), ("cat_weight",)),
  "srrl": Method(
    lambda known: recipes.srrl(known.teacher["params"]["classifier"]),
    ("feature_weight", "regression_weight"),
  ),
  "reviewkd": Method(
    lambda known: recipes.reviewkd(warmup_steps=known.share(20)), ("review_weight",)
  ),
  "fcfd": Method(
    lambda known: recipes.fcfd(known.tails(), known.teacher, warmup_steps=known.share(20)),
    ("map_weight", "soft_weight", "mixed_weight"),
  ),
  # Both ways, as its code has it by default.
  "fcfd_back": Method(
    lambda known: recipes.combine(
      recipes.fcfd(known.tails(), known.teacher, warmup_steps=known.share(20)),
      recipes.fcfd_back(known.tails("student")),
    ),
    ("map_weight", "soft_weight", "mixed_weight"),
    shows=recipes.with_variables,
  ),
  "simkd": Method(
    lambda known: recipes.simkd(known.teacher["params"]["classifier"]), ("simkd_weight",)
  ),
  "fsp": Method(
    lambda _: recipes.fsp(stage=2), ("fsp_weight",), first=lambda: recipes.fsp(stage=1)
  ),
  "activation_boundary": Method(
    lambda _: recipes.activation_boundary(stage=2),
    ("boundary_weight",),
    first=lambda: recipes.activation_boundary(stage=1),
  ),
  "factor_transfer": Method(
    lambda _: recipes.factor_transfer(stage=2),
    ("factor_weight",),
    first=lambda: recipes.factor_transfer(stage=1),
  ),
  "similarity_preserving": Method(
    lambda _: recipes.similarity_preserving(), ("similarity_weight",)
  ),
  "rkd": Method(lambda _: recipes.rkd(), ("rkd_weight",)),
  "pkt": Method(lambda _: recipes.pkt(), ("pkt_weight",)),
  "correlation_congruence": Method(
    lambda _: recipes.correlation_congruence(), ("correlation_weight",)
  ),
  "crd": Method(lambda known: recipes.crd(known.labels), ("crd_weight",)),
  "sdd": Method(
    lambda _: recipes.sdd(),
    ("soft_weight",),
    shows=lambda network: recipes.with_class_maps(network, name="logit_map", bias=True),
  ),
  "mimic": Method(lambda _: mimic, ("logit_weight",)),
  # TTM's authors have it beside CRD (vgg13 to vgg8), Sun et al. their z-scores in front of MLKD.
  "wttm_crd": Method(
    lambda known: recipes.combine(
      recipes.wttm(), recipes.crd(known.labels, crd_weight=0.8, hard_weight=None)
    ),
    ("soft_weight", "crd_weight"),
  ),
  "mlkd_standardized": Method(
    lambda _: recipes.mlkd(
      temperatures=(2.0, 3.0, 5.0, 2.0, 6.0),
      **dict.fromkeys(("soft_weight", "class_weight", "batch_weight"), 9.0),
      standardize=True,
    ),
    ("soft_weight", "class_weight", "batch_weight"),
  ),
  "crld": Method(
    lambda _: recipes.crld(),
    ("within_weight", "cross_weight"),
    shows=recipes.with_views,
    two_views=True,
  ),
  "mlkd_two_views": Method(
    lambda _: recipes.mlkd(two_views=True),
    ("soft_weight", "class_weight", "batch_weight"),
    shows=recipes.with_views,
    two_views=True,
  ),
  "many_to_one": Method(
    lambda known: recipes.many_to_one(run_steps=known.steps),
    ("norm_weight",),
    grows=lambda network, config: recipes.with_many_to_one(network, config.teacher_width[-1]),
    folds=recipes.fold_many_to_one,
  ),
  # One generation (Furlanello et al., 2018), at temperature 1.
  "born_again": Method(
    lambda _: recipes.kd(temperature=1.0, soft_weight=1.0, hard_weight=1.0),
    ("soft_weight",),
    taught_by=lambda bench: bench.past(),
  ),
  # No weight but its share of the past, which is the method's schedule.
  "pskd": Method(
    lambda known: recipes.pskd(len(known.labels), growth_steps=known.steps),
    (),
    taught_by=lambda _: None,
  ),
  # Two students that differ in their first weights; one of them is chosen and measured.
  "dml": Method(
    lambda _: recipes.dml(),
    ("mutual_weight",),
    grows=lambda network, _: networks.cohort({"first": network, "second": network}, lead="first"),
    folds=lambda model, _: networks.members(model)["first"],
  ),
  "mean_teacher": Method(
    lambda known: recipes.mean_teacher(warmup_steps=known.share(5)),
    ("consistency_weight",),
    taught_by=lambda _: teachers.moving_average(),
  ),
  "dot": Method(lambda _: recipes.kd(), ("soft_weight",), optimizer=train.optimizers.dot),
}


@dataclasses.dataclass(frozen=True)
class Trained:
  """A row's students over seeds, those of the factor that was chosen, and their validation."""

  point: Mapping[str, float]
  factor: float | None
  validated: search.Row
  model: Model


class Bench:
  """The data, the two networks, and how a student is trained: the protocol."""

  def __init__(self, config: Config, options: Options) -> None:
    names = data.splits(config.dataset, data_dir=options.data_dir)
    splits = {
      name: data.load(config.dataset, names[name], data_dir=options.data_dir)
      for name in ("train", "validation", options.split)
    }
    digits = config.dataset == "digits"
    self.normalize = data.DIGITS if digits else data.CIFAR
    self.config, self.examples = config, splits["train"]
    self.validation, self.measured = (
      data.evaluation_batches(splits[name], batch_size=256, normalize=self.normalize)
      for name in ("validation", options.split)
    )
    self.count = len(splits[options.split])
    self.version = splits["train"].version
    self.shifted = data.crop(config.teacher_shift) if digits else data.crop_flip(padding=4)
    self.plain = data.crop(0) if digits else self.shifted
    largest = 16.0 if digits else 255.0
    self.twice = data.two_views(self.plain, data.rand_augment(after=self.plain, largest=largest))
    self.teacher = self.network(config.teacher_depth, config.teacher_width, "teacher")
    self.student = self.network(config.student_depth, config.student_width, "student")
    both, size = (self.teacher, self.student), config.batch_size
    command_line.look_at(self.examples, *both, batch_size=size)
    settings = {"experiment": "methods", **dataclasses.asdict(config)}
    self.folder = runs.claim(options.out, settings)

  def network(self, depth: int, width: tuple[int, ...], name: str) -> Any:
    """A ResNet that says what the methods compare."""
    network = networks.linen(resnet(self.config, depth, width), features=FEATURES, name=name)
    # What CAT-KD compares; of the other methods' programs the compiler leaves it out.
    return recipes.with_class_maps(network)

  def source(self, augmentation: Any, data_seed: int = 0) -> data.Source:
    """The training split."""
    return data.on_device(
      self.examples,
      batch_size=self.config.batch_size,
      data_seed=data_seed,
      augmentation=augmentation,
      normalize=self.normalize,
    )

  def steps(self, epochs: int) -> int:
    """Of so many epochs."""
    return epochs * (len(self.examples) // self.config.batch_size)

  def optimizer(
    self, steps: int, rate: float | None = None, make: Callable[..., Any] = train.optimizers.sgd
  ) -> Any:
    """The same for all; DOT is SGD with two momenta."""
    rate = self.config.rate if rate is None else rate
    return make(rate, steps=steps, weight_decay=self.config.weight_decay)

  def fit(self, name: str, network: Any, objective: Any, epochs: int, **rest: Any) -> train.Fitted:
    """A single run: the teacher, and a stage of which all students take the result."""
    steps, augmentation = self.steps(epochs), rest.pop("augmentation", self.plain)
    return train.fit(
      network,
      objective,
      data=self.source(augmentation, data_seed=100),  # an order that no student sees
      optimizer=self.optimizer(steps, rest.pop("rate", None)),
      steps=steps,
      seed=100,
      run=self.folder / name,
      **rest,
    )

  def past(self) -> Teacher:
    """A student of labels alone, of a seed and an order that no other student has."""
    return teachers.frozen(self.fit("past", self.student, recipes.labels(), self.config.epochs))

  def means(self, teacher: Teacher) -> Any:
    """The teacher's mean pooled feature of each class, over the training split."""
    batches = data.evaluation_batches(self.examples, batch_size=256, normalize=self.normalize)
    pooled = jax.lax.map(lambda batch: teacher(batch).features["pooled"], batches)
    labels = np.where(batches.weight > 0, batches.labels, -1).reshape(-1)
    classes = int(labels.max()) + 1
    return losses.class_means(pooled.reshape(-1, pooled.shape[-1]), labels, classes)

  def sweep(
    self, name: str, student: Any, objective: Any, points: Any, epochs: int, **rest: Any
  ) -> search.Result:
    """The students of some points, each from all seeds."""
    augmentation = rest.pop("augmentation", self.plain)
    make = rest.pop("make", train.optimizers.sgd)
    return search.sweep(
      student,
      objective,
      points=points,
      seeds=range(self.config.seeds),
      data=self.source(augmentation),
      optimizer=self.optimizer(self.steps(epochs), make=make),
      steps=self.steps(epochs),
      choice=search.Choice(self.validation),
      run=self.folder / name,
      **rest,
    )


def prepared(bench: Bench, method: Method, teacher: Teacher) -> tuple[Any, Teacher | None, Any]:
  """What is trained, by whom it is taught, and the objective."""
  student = bench.student
  if method.grows is not None:
    student = method.grows(student, bench.config)
  if method.shows is not None:
    student = method.shows(student)
    teacher = teachers.frozen(Model(method.shows(bench.teacher), teacher.variables))
  known = Known(
    bench.config,
    bench.steps(bench.config.epochs),
    bench.examples.labels,
    teacher.variables,
    functools.partial(bench.means, teacher),
  )
  taught_by = teacher if method.taught_by is None else method.taught_by(bench)
  return student, taught_by, method.make(known)


def students(bench: Bench, name: str, method: Method, teacher: Teacher) -> Trained:
  """A method's students, with the factor that is best on validation."""
  config, epochs = bench.config, bench.config.epochs
  student, taught_by, objective = prepared(bench, method, teacher)
  before = max(1, epochs // 8)
  if method.first is not None and name != "factor_transfer":
    return after_a_stage(bench, name, method, objective, before, taught_by)
  if method.first is not None:
    options = {"rate": 0.2 * config.rate, "teacher": taught_by}  # RepDistiller's 0.01, paraphraser
    first = bench.fit(f"{name}/first", student, method.first(), before, **options)
    objective = dataclasses.replace(objective, start=({}, first.state.objective_params))
  points = scaled(objective, method.weights, config.factors)
  found = bench.sweep(
    name,
    student,
    objective,
    points,
    epochs,
    teacher=taught_by,
    augmentation=bench.twice if method.two_views else bench.plain,
    make=method.optimizer,
  )
  row = trained(config, found)
  if method.folds is not None:
    row = dataclasses.replace(row, model=method.folds(row.model, bench.student))
  return row


def after_a_stage(
  bench: Bench, name: str, method: Method, objective: Any, before: int, teacher: Teacher
) -> Trained:
  """The first stage has the weight; the second, from what each factor left, the labels alone."""
  config = bench.config
  points = scaled(method.first(), method.weights, config.factors)
  stage = f"{name}/first", bench.student, method.first()
  first = bench.sweep(*stage, points, before, teacher=teacher)
  made = []
  for i, factor in enumerate(config.factors):
    if first.rows[i].status != "finished":
      continue
    second = bench.sweep(
      f"{name}/second-{factor:g}",
      first.students(i),
      objective,
      [{}],
      config.epochs,
      execution=search.Execution(devices=jax.devices()[:1]),
    )
    made.append(dataclasses.replace(trained(config, second), factor=factor, point=points[i]))
  best, ties = search.best_of([one.validated for one in made], "accuracy")
  return made[0 if 0 in ties else best]


def scaled(objective: Any, weights: tuple[str, ...], factors: tuple[float, ...]) -> list[dict]:
  """The published weights times each factor; a method without weights of its own comes once."""
  if not weights:
    return [{}]
  published = recipes.combine(objective).hyper
  return [{name: factor * published[name] for name in weights} for factor in factors]


def trained(config: Config, found: search.Result) -> Trained:
  """The students of the first factor, or of the one that is clearly better."""
  index = 0 if 0 in found.ties else found.best
  row = found.rows[index]
  factor = config.factors[index] if row.values else None
  return Trained(row.values, factor, row, found.students(index))


def measure(bench: Bench, row: Trained, teacher: Teacher, name: str) -> dict[str, Any]:
  """A row of the table, but for its gain."""
  found = evaluation.evaluate(row.model, bench.measured, teacher=teacher)
  line: dict[str, Any] = {
    "method": name,
    "factor": row.factor,
    "weights": " ".join(f"{n}={value:g}" for n, value in row.point.items()),
    "parameters": evaluation.cost.parameters(row.model.instance(0).variables),
  }
  measured = {"validation": row.validated.metrics["accuracy"]} | {
    n: found[n] for n in ("accuracy", "agreement")
  }
  for label, values in measured.items():
    mean, std = evaluation.metrics.mean_std(100 * np.asarray(values, np.float64))
    line |= {f"{label}_mean": mean, f"{label}_std": std}
  return line | {"seeds": (100 * np.asarray(found["accuracy"], np.float64)).tolist()}


def table(rows: list[dict[str, Any]], teacher: float, parameters: int) -> str:
  """The rows as Markdown, best first; labels alone and the teacher above them."""

  def spread(row: Mapping[str, Any], name: str) -> str:
    std = row[f"{name}_std"]
    return f"{row[f'{name}_mean']:.2f}" + ("" if std is None else f" ± {std:.2f}")

  lines = [
    "| method | factor | accuracy, % | gain, points | agrees with teacher, % | parameters |",
    "| --- | ---: | ---: | ---: | ---: | ---: |",
    f"| teacher | | {teacher:.2f} | | | {parameters:,} |",
  ]
  for row in rows:
    gain = "" if row["gain"] is None else f"{row['gain']:+.2f}"
    gain += "" if row["gain_error"] is None else f" (standard error {row['gain_error']:.2f})"
    factor = "" if row["factor"] is None else f"{row['factor']:g}"
    cells = (spread(row, "accuracy"), gain, spread(row, "agreement"), f"{row['parameters']:,}")
    lines.append(f"| {row['method']} | {factor} | {' | '.join(cells)} |")
  return "\n".join(lines)


def write(
  bench: Bench, options: Options, rows: list[dict[str, Any]], teacher: float, parameters: int
) -> pathlib.Path:
  """Writes the table as CSV and Markdown, and the picture."""
  config, folder = bench.config, bench.folder
  name = "methods" if options.split == "test" else f"methods-{options.split}"
  with (folder / f"{name}.csv").open("w", newline="") as file:
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "seeds": " ".join(f"{s:.4f}" for s in row["seeds"])} for row in rows)
  baseline, *others = rows
  line = (baseline["accuracy_mean"], baseline["accuracy_std"])
  shown = {row["method"]: (row["accuracy_mean"], row["accuracy_std"]) for row in others or rows}
  reports.figures.intervals(
    folder / f"{name}.png",
    shown,
    xlabel=f"accuracy on the {options.split} split, %",
    title=f"{config.dataset} {bench.version}: {config.seeds} seeds, mean ± std",
    lines={"labels alone": line, "teacher": teacher},
  )
  made = table(rows, teacher, parameters)
  command = runs.command(SCRIPT, config, out=folder, split=options.split, data_dir=options.data_dir)
  factors = ", ".join(f"{factor:g}" for factor in config.factors)
  lines = [
    f"# All recipes on {config.dataset}, {options.split} split",
    "",
    f"{bench.count:,} examples of {config.dataset} {bench.version}. Mean ± standard deviation over "
    f"{config.seeds} seeds; initialisation and data order both varied. One teacher. The last step "
    f"of every run. The factor of the published weights, out of {factors}, is the first of these "
    "unless another is better by more than a standard error on validation "
    f"({int(bench.validation.weight.sum()):,} examples). Gain is over labels alone, for which "
    "there was nothing to choose.",
    "",
    made,
    "",
    f"![accuracy of each method]({name}.png)",
    "",
    "```",
    command,
    "```",
    "",
  ]
  path = folder / f"{name}.md"
  path.write_text("\n".join(lines))
  print(f"\n{made}\n\nReport: {path}")
  return path


def main(config: Config, options: Options) -> None:
  began = time.perf_counter()
  with train.time_limit(options.stop_after):
    compare(config, options)
  print(f"{time.perf_counter() - began:.0f} s on {jax.devices()[0].device_kind}")


def compare(config: Config, options: Options) -> pathlib.Path:
  """Trains what is not trained yet, and writes the table."""
  unknown = sorted(set(options.methods) - set(METHODS))
  if unknown:
    raise SystemExit(f"--methods has {unknown}; there are {', '.join(METHODS)}.")
  bench = Bench(config, options)
  learned = bench.fit(
    "teacher",
    bench.teacher,
    recipes.labels(),
    config.teacher_epochs,
    augmentation=bench.shifted,
  )
  teacher = teachers.frozen(learned)
  quality = evaluation.evaluate(learned, bench.measured)
  plain = bench.sweep("labels", bench.student, recipes.labels(), [{}], config.epochs)
  alone = measure(bench, trained(config, plain), teacher, "labels alone")
  baseline = alone | {"gain": None, "gain_error": None}
  rows = []
  for name in options.methods or METHODS:
    row = measure(bench, students(bench, name, METHODS[name], teacher), teacher, name)
    gain = evaluation.metrics.difference(row["seeds"], baseline["seeds"])
    rows.append(row | {"gain": gain["mean"], "gain_error": gain["standard_error"]})
    print(f"{name}: {row['accuracy_mean']:.2f} %, {gain['mean']:+.2f} over labels alone")
  rows.sort(key=lambda row: -row["accuracy_mean"])
  accuracy, parameters = (
    100 * float(quality["accuracy"]),
    evaluation.cost.parameters(learned.variables),
  )
  return write(bench, options, [baseline, *rows], accuracy, parameters)


def parse(args: list[str]) -> tuple[Config, Options]:
  config = CIFAR100 if "cifar100" in args else Config()
  if "--short" in args:
    config = dataclasses.replace(SHORT, dataset=config.dataset)
  idle = {"cifar100": ("teacher_shift",)}
  return command_line.parse(args, config, Options(), __doc__, sweeps=True, idle=idle)


if __name__ == "__main__":
  command_line.run(main, parse)
