"""Shakespeare: what a teacher is worth to a small language model, with few text and with all of it.

Students read 100,000 characters, or the whole million; a student learns from the text alone, or
from the teacher's distribution of every next character too. With few text it can learn the text by
heart, and soft targets tell it what else could have stood there.

Command:   python experiments/shakespeare.py --out runs/shakespeare
Short:     python experiments/shakespeare.py --short --out runs/shakespeare-short
Hardware:  two cores, no accelerator
Expected:  with few text a student that is distilled gains a quarter of a bit a character or more
           over one of as many steps on the text alone; with all of it a few hundredths

Two comparisons, since distilling costs more a step: the same steps, and the same floating-point
operations, where the student without a teacher trains for as many more steps as a teacher costs
that answers at every one. (Here it answers once for each example, since nothing is augmented, so
that comparison favours the text alone.) The teacher's own training is in neither; its seconds are
in the table. ``few`` and ``full`` of the run's folder have a report each, with texts that teacher,
baseline and student write; `python -m jaxdistill report runs/shakespeare/few runs/shakespeare/full`
holds the two students against each other. The teacher read all of the text, so with few text it
stands for one that was trained on much more than the students are given. Rates and sizes were fixed
before anything was measured.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import pathlib
import sys
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import command_line
from jaxdistill import data, evaluation, networks, recipes, reports, runs, teachers, train

SCRIPT = "experiments/shakespeare.py"


@dataclasses.dataclass(frozen=True)
class Config:
  """What defines a run; saved as config.json."""

  length: int = 64
  """Characters that a network sees at once."""
  few: int = 100_000
  """Characters of the training text that students with few text have."""
  seeds: int = 5
  heads: int = 4
  teacher_layers: int = 3
  teacher_width: int = 96
  teacher_steps: int = 1800
  teacher_dropout: float = 0.1
  student_layers: int = 2
  student_width: int = 48
  steps: int = 1200
  batch_size: int = 32
  rate: float = 3e-3
  soft_weight: float = 0.9
  hard_weight: float = 0.1
  characters: int | None = None
  """Of each split, how many are read; all when left out."""


SHORT = Config(
  length=32,
  few=5_000,
  seeds=2,
  teacher_layers=2,
  teacher_width=32,
  teacher_steps=150,
  student_layers=1,
  student_width=16,
  steps=60,
  characters=50_000,
)


@dataclasses.dataclass(frozen=True)
class Options:
  """How a run is carried out; changes no number beyond rounding."""

  out: pathlib.Path = pathlib.Path("runs/shakespeare")
  """Folder of the run; a run that was stopped goes on there."""
  short: bool = False
  """Start from the short setting, which shows that the script runs and no more."""
  evaluate: pathlib.Path | None = None
  """Evaluate the run in this folder again instead of training."""
  split: Literal["train", "validation", "test"] = "test"
  """The split to evaluate on."""
  data_dir: str | None = None
  """Where TFDS keeps its data sets; its own default when left out."""
  stop_after: float | None = None
  """Seconds after which the script saves and leaves; started again, it goes on from there."""


def read(options: Options, split: str) -> str:
  where = {"data_dir": options.data_dir, "inputs": "text", "labels": None}
  return data.load("tiny_shakespeare", split, **where).inputs[0].decode()


def tokenizer_of(options: Options) -> data.tokenizers.Tokenizer:
  """The characters that occur in any split."""
  return data.tokenizers.characters(
    read(options, split) for split in ("train", "validation", "test")
  )


def examples_of(config: Config, text: str, tokenizer: Any) -> data.Examples:
  return data.from_text(text, tokenizer, length=config.length, name="tiny_shakespeare")


def build_networks(config: Config, vocabulary: int):
  """The teacher and the student: Llama's decoder at the size of a few characters."""

  def build(name: str, layers: int, width: int, dropout: float = 0.0):
    decoder = networks.models.DecoderConfig(
      vocabulary,
      width,
      layers=layers,
      heads=config.heads,
      kv_heads=config.heads,
      head_dim=width // config.heads,
      hidden=8 * width // 3,
      tied=True,
      dropout=dropout,
    )
    # 65 logits a character are few: they are made whole.
    return networks.linen(
      networks.models.Decoder(decoder), logits=lambda out: out.head(out.hidden), name=name
    )

  return (
    build("teacher", config.teacher_layers, config.teacher_width, config.teacher_dropout),
    build("student", config.student_layers, config.student_width),
  )


def longer(config: Config, teacher: Any, student: Any) -> int:
  """Steps on the text alone that cost what ``config.steps`` with the teacher's answers cost."""
  tokens = jnp.zeros((1, config.length), jnp.int32)

  def forward(network: Any) -> int:
    variables = jax.eval_shape(network.init, jax.random.key(0), tokens)
    call = lambda v, x: network.apply(v, x, train=False, key=None)[0].logits  # noqa: E731
    return evaluation.cost.flops(call, variables, tokens)

  # Forward and backward are three times the forward pass; the teacher has no backward.
  return round(config.steps * (1 + forward(teacher) / (3 * forward(student))))


def train_all(config: Config, options: Options) -> None:
  text = read(options, "train")[: config.characters]
  tokenizer = tokenizer_of(options)
  teacher, student = build_networks(config, tokenizer.vocabulary)
  folder = runs.claim(options.out, {"experiment": "shakespeare", **dataclasses.asdict(config)})
  texts = {"few": text[: config.few], "full": text}
  sources = {
    name: data.on_device(
      examples_of(config, part, tokenizer), batch_size=config.batch_size, data_seed=0
    )
    for name, part in texts.items()
  }

  def fit(name, network, objective, source, seeds, steps, teacher=None):
    began = time.perf_counter()
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.rate, steps // 20, steps)
    fitted = train.fit(
      network,
      objective,
      data=[dataclasses.replace(source, data_seed=seed) for seed in seeds],
      optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule)),
      steps=steps,
      seed=seeds,
      teacher=teacher,
      run=train.Run(folder / name, config={"experiment": f"shakespeare/{name}"}),
    )
    # A run that is found finished says nothing of how long it took.
    if not (folder / name / "seconds.json").exists():
      runs.write_json(folder / name / "seconds.json", time.perf_counter() - began)
    return fitted

  # A seed of its own, so that no student shares its data order with the teacher.
  objective = recipes.labels()
  (taught,) = fit(
    "teacher", teacher, objective, sources["full"], [100], config.teacher_steps
  ).unstack()
  seeds = list(range(config.seeds))
  soft = recipes.kd(temperature=1.0, soft_weight=config.soft_weight, hard_weight=config.hard_weight)
  more = longer(config, teacher, student)
  for name, source in sources.items():
    fit(f"{name}-labels", student, objective, source, seeds, config.steps)
    fit(f"{name}-longer", student, objective, source, seeds, more)
    fit(f"{name}-distilled", student, soft, source, seeds, config.steps, teachers.frozen(taught))


def measure(config: Config, options: Options, folder: pathlib.Path) -> pathlib.Path:
  tokenizer = tokenizer_of(options)
  text = read(options, options.split)[: config.characters]
  examples = examples_of(config, text, tokenizer)
  batches = data.evaluation_batches(examples, batch_size=64)
  teacher, student = build_networks(config, tokenizer.vocabulary)
  (taught,) = teachers.restore(folder / "teacher", teacher).unstack()
  task = evaluation.tasks.tokens(token_bytes=tokenizer.bytes)
  # Every character of these plays is one byte: bits a character are bits a byte.
  found = {"teacher": evaluation.evaluate(taught, batches, task=task)}
  rows = [{"name": "teacher", "text": "full", "steps": config.teacher_steps}]
  for part in ("few", "full"):
    kinds = ("labels", "longer", "distilled")
    models = {kind: teachers.restore(folder / f"{part}-{kind}", student) for kind in kinds}
    found |= {f"{part}-{kind}": {} for kind in kinds}  # the order of the rows
    found[f"{part}-longer"] = evaluation.evaluate(
      models["longer"], batches, task=task, teacher=teachers.frozen(taught)
    )
    report = report_of(config, options, folder, part, examples, models, taught, task)
    for kind, model, faithful in (
      ("labels", "baseline", "baseline_fidelity"),
      ("distilled", "student", "fidelity"),
    ):
      told = report["models"][model]
      found[f"{part}-{kind}"] = {
        **told["per_seed"],
        **{name: one["mean"] for name, one in report[faithful].items()},
      }
    for kind in kinds:
      steps = longer(config, teacher, student) if kind == "longer" else config.steps
      rows.append({"name": kind, "text": part, "steps": steps})
  bits = {n: np.atleast_1d(np.asarray(one["bits_per_byte"])) for n, one in found.items()}
  for row, name in zip(rows, bits, strict=True):
    row["bits"], row["std"] = evaluation.metrics.mean_std(bits[name])
    row["seconds"] = json.loads((folder / name / "seconds.json").read_text())
    if name != "teacher":
      row |= {one: float(np.mean(found[name][one])) for one in ("agreement", "kl", "ece")}
    if row["name"] in ("labels", "longer"):
      gain = evaluation.metrics.difference(bits[name], bits[f"{row['text']}-distilled"])
      row |= {"gain": gain["mean"], "gain_error": gain["standard_error"]}
  return write(config, options, folder, rows, len(text))


def report_of(
  config: Config,
  options: Options,
  folder: pathlib.Path,
  part: str,
  examples: data.Examples,
  models: dict[str, Any],
  taught: Any,
  task: evaluation.tasks.Task,
) -> dict[str, Any]:
  """The report of the students with few text, or with all of it; its page shows what they write."""
  tokenizer = tokenizer_of(options)
  _, report = reports.compare_students(
    folder / part,
    network={"baseline": models["labels"], "student": models["distilled"]},
    teacher=teachers.frozen(taught, tokenizer=tokenizer),
    batches=data.evaluation_batches(examples, batch_size=64),
    examples=examples,
    descriptions={
      "teacher": f"{config.teacher_layers} layers of width {config.teacher_width}, all of the text",
      "baseline": f"{config.student_layers} layers of width {config.student_width}, text alone",
      "student": f"the same, {config.soft_weight:g} of the loss from the teacher's distribution",
    },
    task=task,
    texts=reports.Texts(tokenizer, prompt=config.length // 2, length=4 * config.length),
    dataset="tiny_shakespeare",
    split=options.split,
    seeds=range(config.seeds),
    varied="initialisation and data order",
    commands=runs.commands(SCRIPT, config, folder, options.split, options.data_dir),
  )
  return report


WORDS = {
  "teacher": "teacher",
  "labels": "text alone, as many steps",
  "longer": "text alone, as many operations",
  "distilled": "distilled",
}


def table(rows: list[dict[str, Any]]) -> str:
  """The rows as Markdown."""

  def shown(row: dict[str, Any], name: str, digits: int = 3) -> str:
    return "–" if row.get(name) is None else f"{row[name]:.{digits}f}"

  lines = [
    "| text | student | steps | bits a character | distilling gains | agreement | ECE | seconds |",
    "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
  ]
  for row in rows:
    spread = "" if row["std"] is None else f" ± {row['std']:.3f}"
    error = "" if row.get("gain_error") is None else f" (standard error {row['gain_error']:.3f})"
    cells = (
      row["text"],
      WORDS[row["name"]],
      f"{row['steps']:,}",
      f"{row['bits']:.3f}{spread}",
      shown(row, "gain") + error,
      shown(row, "agreement"),
      shown(row, "ece"),
      f"{row['seconds']:.0f}",
    )
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def write(
  config: Config, options: Options, folder: pathlib.Path, rows: list[dict[str, Any]], length: int
) -> pathlib.Path:
  """Writes the table as Markdown and CSV."""
  name = "shakespeare" if options.split == "test" else f"shakespeare-{options.split}"
  fields = list(dict.fromkeys(key for row in rows for key in row))
  with (folder / f"{name}.csv").open("w", newline="") as file:
    writer = csv.DictWriter(file, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
  commands = runs.commands(SCRIPT, config, folder, options.split, options.data_dir)
  lines = [
    f"# Shakespeare by characters, {options.split} split",
    "",
    f"{length:,} characters. Mean ± standard deviation over {config.seeds} seeds, with "
    "initialisation and data order both varied; one teacher. The last step of every run. Seconds "
    "are of all seeds together, compilation included.",
    "",
    table(rows),
    "",
    "```",
    *commands,
    "```",
    "",
  ]
  path = folder / f"{name}.md"
  path.write_text("\n".join(lines))
  print(f"\n{table(rows)}\n\nReport: {path}")
  return path


def main(config: Config, options: Options) -> None:
  began = time.perf_counter()
  if options.evaluate is not None:
    measure(runs.restore_config(options.evaluate, Config), options, options.evaluate)
  else:
    with train.time_limit(options.stop_after):
      train_all(config, options)
    measure(config, options, options.out)
  print(f"{time.perf_counter() - began:.0f} s on {jax.devices()[0].device_kind}")


def parse(args: list[str]) -> tuple[Config, Options]:
  return command_line.parse(args, SHORT if "--short" in args else Config(), Options(), __doc__)


if __name__ == "__main__":
  main(*parse(sys.argv[1:]))
