"""Shakespeare: what a teacher is worth to a small language model, with few text and with all of it.

Students read 100,000 characters, or the whole million; a student learns from the text alone, or
from the teacher's distribution of every next character too. With few text it can learn the text by
heart, and soft targets tell it what else could have stood there.

Command:   python experiments/shakespeare.py --out runs/shakespeare
Short:     python experiments/shakespeare.py --short --out runs/shakespeare-short
Large:     python experiments/shakespeare.py --large --text TEXT --out runs/text
Hardware:  two cores of an Intel Xeon at 2.5 GHz, no accelerator (Python 3.11, jax 0.10.2), commit
           738fca1
Time:      443 seconds, no compilation kept, 12 minutes of CPU time
Expected:  with few text a student that is distilled gains a quarter of a bit a byte or more over
           one of as many steps on the text alone; with all of it a few hundredths
Got:       bits a byte on the 55,770 characters of the test split; teacher 2.591. Few text: alone
           3.386 ± 0.027, distilled 3.100 ± 0.025, a gain of 0.286 (standard error 0.016 over seeds,
           0.008 over passages); alone for as many seconds (583 steps for 500) 3.340 ± 0.012, a gain
           of 0.241 (0.012); for the teacher's training too (2,279 steps, two seeds) 3.338 ± 0.022,
           a gain of 0.232 (0.016). All of it: alone 3.076 ± 0.028, distilled 2.941 ± 0.018, a gain
           of 0.134 (0.015); alone for as many seconds (742 steps) 2.913 ± 0.016, a gain of -0.028
           (0.011): where there is text that a student has not read yet, reading it is worth more
           than this teacher, whose training does not even count there. The clock decides over steps
           at equal seconds: another run of the same machine, at ff2bc51, gave 475, 2,048 and 711 of
           them, and gains of 0.297, 0.155 and -0.018.

Three comparisons, since distilling costs more: the same steps; the same seconds, of the distilled
students' steps and the teacher's answers to them; and the same seconds with the teacher's training
too. There the students without a teacher train for as many more steps as those seconds are worth,
by what a step of theirs took in the same run. Seconds are measured without compilation, at the
median rate of a run's log, and written in ``few-seconds.json`` and ``full-seconds.json``, so that a
run which is stopped goes on with the steps that it had. Students that stand for as many seconds are
trained beside each other, when no clock counts any more. Nothing is augmented, so `fit` asks the
teacher once for each window of the text, and students of all seeds share its answers and its
training, as they would in use; one that is trained alone bears all of it. With the teacher's
training it is few text and two seeds alone that there is time for; with all of the text nothing is
gained without it. The teacher read all of the text, so with few text it stands for one that was
trained on much more than the students are given.
Rates and sizes were fixed before anything was measured; steps are as many as minutes allow, which
is far from what either kind of student would still learn. ``few`` and ``full`` of the run's
folder have a report each, with texts that teacher, baseline and student write;
`python -m jaxdistill report runs/shakespeare/few runs/shakespeare/full` holds the two students
against each other.

``--large`` is for an accelerator and a text of your own, some hundred megabytes: a byte-pair
encoding is trained on it, twelve layers teach four, in bfloat16, and the logits of 8,192 words are
made of some tokens at a time. It has not been run by us.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import pathlib
import shlex
import sys
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import command_line
from jaxdistill import (
  data,
  evaluation,
  networks,
  recipes,
  reports,
  runs,
  teachers,
  train,
  types,
)

SCRIPT = "experiments/shakespeare.py"


@dataclasses.dataclass(frozen=True)
class Config:
  """What defines a run; saved as config.json."""

  length: int = 64
  """Tokens that a network sees at once."""
  vocabulary: int | None = None
  """Tokens of a byte-pair encoding, trained on the training text; left out, its characters."""
  few: int = 100_000
  """Characters of the training text that students with few text have."""
  seeds: int = 5
  taught_seeds: int = 2
  """How many of them train for as many seconds as the teacher's training takes too."""
  teacher_layers: int = 3
  teacher_width: int = 96
  teacher_heads: int = 4
  teacher_steps: int = 1100
  teacher_batch_size: int = 32
  teacher_dropout: float = 0.1
  student_layers: int = 2
  student_width: int = 48
  student_heads: int = 2
  steps: int = 500
  batch_size: int = 16
  rate: float = 3e-3
  dtype: Literal["float32", "bfloat16"] = "float32"
  """Of the computation; parameters are float32."""
  tokens_at_once: int | None = None
  """How many tokens' logits are made at a time; left out, all of a batch's."""
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


LARGE = Config(
  length=512,
  vocabulary=8192,
  few=5_000_000,
  seeds=3,
  teacher_layers=12,
  teacher_width=768,
  teacher_heads=12,
  teacher_steps=20_000,
  teacher_batch_size=64,
  student_layers=4,
  student_width=384,
  student_heads=6,
  steps=20_000,
  batch_size=32,
  rate=6e-4,
  dtype="bfloat16",
  tokens_at_once=4096,
)


@dataclasses.dataclass(frozen=True)
class Options:
  """How a run is carried out; changes no number beyond rounding."""

  out: pathlib.Path = pathlib.Path("runs/shakespeare")
  """Folder of the run; a run that was stopped goes on there."""
  short: bool = False
  """Start from the short setting, which shows that the script runs and no more."""
  large: bool = False
  """Start from the setting for an accelerator."""
  text: pathlib.Path | None = None
  """A file of UTF-8 in place of tiny Shakespeare; its last tenth is validation and test."""
  evaluate: pathlib.Path | None = None
  """Evaluate the run in this folder again instead of training."""
  split: Literal["train", "validation", "test"] = "test"
  """The split to evaluate on."""
  data_dir: str | None = None
  """Where TFDS keeps its data sets; its own default when left out."""
  stop_after: float | None = None
  """Seconds after which the script saves and leaves; started again, it goes on from there."""


def read(options: Options, split: str) -> str:
  """The text of a split."""
  if options.text is None:
    where = {"data_dir": options.data_dir, "inputs": "text", "labels": None}
    return data.load("tiny_shakespeare", split, **where).inputs[0].decode()
  text = options.text.read_text(encoding="utf-8")
  first, second = len(text) * 18 // 20, len(text) * 19 // 20
  return {"train": text[:first], "validation": text[first:second], "test": text[second:]}[split]


@functools.cache  # an encoding of a large text is trained once, and is needed in many places
def tokenizer_of(config: Config, options: Options) -> data.tokenizers.Tokenizer:
  """The characters that occur in any split, or an encoding trained on the training text."""
  if config.vocabulary is None:
    splits = ("train", "validation", "test")
    return data.tokenizers.characters(read(options, split) for split in splits)
  return data.tokenizers.trained([read(options, "train")], config.vocabulary)


def examples_of(
  config: Config, options: Options, text: str, tokenizer: Any, split: str = "cut"
) -> data.Examples:
  """Windows of a text; ``split="pad"`` leaves them in the text's order."""
  name = "tiny_shakespeare" if options.text is None else options.text.stem
  return data.from_text(text, tokenizer, length=config.length, split=split, name=name)


def build_networks(config: Config, vocabulary: int):
  """The teacher and the student: Llama's decoder at the size of a few characters."""

  def build(name: str, layers: int, width: int, heads: int, dropout: float = 0.0):
    decoder = networks.models.DecoderConfig(
      vocabulary,
      width,
      layers=layers,
      heads=heads,
      kv_heads=heads,
      head_dim=width // heads,
      hidden=8 * width // 3,
      tied=True,
      dropout=dropout,
    )
    module = networks.models.Decoder(decoder, dtype=jnp.dtype(config.dtype))
    if config.tokens_at_once is not None:
      return networks.linen(module, name=name)  # hidden states and a head
    # 65 logits a character are few: they are made whole.
    return networks.linen(module, logits=lambda out: out.head(out.hidden), name=name)

  return (
    build(
      "teacher",
      config.teacher_layers,
      config.teacher_width,
      config.teacher_heads,
      config.teacher_dropout,
    ),
    build("student", config.student_layers, config.student_width, config.student_heads),
  )


KINDS = {
  "few": ("labels", "seconds", "taught", "distilled"),
  # With all of the text, the text alone was ahead before the teacher's training was counted.
  "full": ("labels", "seconds", "distilled"),
}


def seeds_of(config: Config, kind: str) -> list[int]:
  """The seeds of a kind of students; the teacher's is its own, so that no data order is shared."""
  if kind == "teacher":
    return [100]
  return list(range(min(config.seeds, config.taught_seeds) if kind == "taught" else config.seeds))


def steady(folder: pathlib.Path, config: Config) -> dict[str, Any]:
  """A run's steps, and the seconds of all of them at the rate of most: there nothing is compiled.

  They are read from the run's log, so that one which was stopped and went on, and one that is found
  finished, have them too.
  """
  lines, _ = runs.read_metrics(folder)
  rate = float(np.median([line["examples_per_second"] for line in lines]))
  kind = folder.name.rpartition("-")[2]
  size = config.teacher_batch_size if kind == "teacher" else config.batch_size
  steps = lines[-1]["step"]
  return {"steps": steps, "seconds": steps * size * len(seeds_of(config, kind)) / rate}


def seconds_of_answers(
  config: Config, folder: pathlib.Path, teacher: types.Network, windows: data.Examples
) -> float:
  """Seconds in which the teacher says what follows each character of some windows.

  `fit` asks it once about each of them, before the steps, where each is seen at least once and the
  logits are whole. Elsewhere the steps ask it, and their seconds have it.
  """
  count = len(windows.labels)
  if config.tokens_at_once is not None or config.steps * config.batch_size * config.seeds < count:
    return 0.0
  # As it was saved: what training gives back may lie in parts on other processes' devices.
  (taught,) = teachers.restore(folder / "teacher", teacher).unstack()
  few = types.make_batch(
    jax.tree.map(lambda x: x[:256], windows.inputs)
  )  # as many as `fit` asks about at a time
  once = evaluation.cost.latency(types.Teacher.__call__, teachers.frozen(taught), few, repeats=5)
  return once["median"] / 1000 * count / len(few.weight)


def totals(took: dict[str, float]) -> dict[str, float]:
  """Seconds of distilling where the teacher is there already, and where it is trained too."""
  there = took["distilled"] + took["answers"]
  return {"seconds": there, "taught": there + took["teacher"]}


def equal_seconds(
  config: Config, folder: pathlib.Path, part: str, teacher: types.Network, windows: data.Examples
) -> dict[str, Any]:
  """What students with a teacher took, and in how many steps those without one take as long.

  It is written down once: clocks never say the same twice, and a run that goes on, or is started
  again, has the steps that it had.
  """
  path = folder / f"{part}-seconds.json"

  def write() -> None:
    if path.exists():
      return
    names = {"labels": f"{part}-labels", "distilled": f"{part}-distilled", "teacher": "teacher"}
    took = {kind: steady(folder / name, config)["seconds"] for kind, name in names.items()}
    took["answers"] = seconds_of_answers(config, folder, teacher, windows)
    a_step = took["labels"] / config.steps
    steps = {kind: max(1, round(total / a_step)) for kind, total in totals(took).items()}
    runs.write_json(path, {"seconds": took, "steps": steps})

  command_line.first(write)  # where there are several processes, by the clock of one
  found: dict[str, Any] = runs.read_json(path)
  return found


def train_all(config: Config, options: Options) -> None:
  text = read(options, "train")[: config.characters]
  tokenizer = tokenizer_of(config, options)
  teacher, student = build_networks(config, tokenizer.vocabulary)
  texts = {"few": text[: config.few], "full": text}
  windows = {name: examples_of(config, options, part, tokenizer) for name, part in texts.items()}
  sources = {
    name: data.on_device(examples, batch_size=config.batch_size, data_seed=0)
    for name, examples in windows.items()
  }
  command_line.look_at(windows["full"], teacher, student, batch_size=config.teacher_batch_size)
  folder = runs.claim(options.out, {"experiment": "shakespeare", **dataclasses.asdict(config)})

  def fit(name, network, objective, source, seeds, steps, teacher=None):
    line = max(1, steps // 20)
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.rate, line, steps)
    return train.fit(
      network,
      objective,
      data=[dataclasses.replace(source, data_seed=seed) for seed in seeds],
      optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule)),
      steps=steps,
      seed=seeds,
      teacher=teacher,
      dispatch=train.with_jit(tokens_at_once=config.tokens_at_once),
      # Twenty lines, each with its rate: enough for the first, which waits for the compiler, and
      # for those that have a checkpoint in them, not to matter.
      watch=train.Watch(log_every=line, validate_every=steps),
      run=train.Run(
        folder / name, config={"experiment": f"shakespeare/{name}"}, checkpoint_every=5 * line
      ),
    )

  objective = recipes.labels()
  source = dataclasses.replace(sources["full"], batch_size=config.teacher_batch_size)
  alone = seeds_of(config, "teacher")
  (taught,) = fit("teacher", teacher, objective, source, alone, config.teacher_steps).unstack()
  seeds = seeds_of(config, "distilled")
  soft = recipes.kd(temperature=1.0, soft_weight=config.soft_weight, hard_weight=config.hard_weight)
  asked = teachers.frozen(taught, tokenizer=tokenizer)
  for name, source in sources.items():
    fit(f"{name}-labels", student, objective, source, seeds, config.steps)
    fit(f"{name}-distilled", student, soft, source, seeds, config.steps, asked)
  found = {part: equal_seconds(config, folder, part, teacher, windows[part]) for part in sources}
  with train.concurrently() as start:  # nobody's clock counts any more
    for name, source in sources.items():
      for kind, steps in found[name]["steps"].items():
        if kind in KINDS[name]:
          some = seeds_of(config, kind)
          start(fit, f"{name}-{kind}", student, objective, source, some, steps)


def measure(config: Config, options: Options, folder: pathlib.Path) -> pathlib.Path:
  tokenizer = tokenizer_of(config, options)
  text = read(options, options.split)[: config.characters]
  examples = examples_of(config, options, text, tokenizer, split="pad")
  batches = data.evaluation_batches(examples, batch_size=64)
  teacher, student = build_networks(config, tokenizer.vocabulary)
  (taught,) = teachers.restore(folder / "teacher", teacher).unstack()
  task = evaluation.tasks.tokens(token_bytes=tokenizer.bytes)
  asked = teachers.frozen(taught, tokenizer=tokenizer)
  told = evaluation.taught(asked, batches, task=task)  # it is asked once for all students
  found = {"teacher": evaluation.examine(taught, batches, task=task)}
  rows = [{"name": "teacher", "text": "full"}]
  took = {}
  for part in ("few", "full"):
    models = {}
    took[part] = totals(runs.read_json(folder / f"{part}-seconds.json")["seconds"])
    for kind in KINDS[part]:
      name = f"{part}-{kind}"
      models[kind] = model = teachers.restore(folder / name, student)
      found[name] = evaluation.examine(model, told, task=task)
      rows.append({"name": kind, "text": part})
    report_of(config, options, folder, part, examples, models, asked, task)
  for row, (name, (metrics, kept)) in zip(rows, found.items(), strict=True):
    bits = np.atleast_1d(metrics["bits_per_byte"])
    row["bits"], row["std"] = evaluation.metrics.mean_std(bits)
    row |= steady(folder / name, config)
    # Those that stand for a time were trained beside each other, and say what they stand for.
    row["seconds"] = took[row["text"]].get(row["name"], row["seconds"])
    row |= {one: np.mean(metrics[one]) for one in BESIDE if one in metrics}
    if row["name"] not in ("teacher", "distilled"):
      distilled, theirs = found[f"{row['text']}-distilled"]
      gain = evaluation.metrics.difference(bits, distilled["bits_per_byte"][: len(bits)])
      row |= {"gain": gain["mean"], "gain_error": gain["standard_error"]}
      row["text_error"] = over_passages(kept, theirs, examples, tokenizer.bytes)
  return write(config, options, folder, rows, len(text))


def over_passages(
  ours: Any, theirs: Any, examples: data.Examples, lengths: np.ndarray
) -> float | None:
  """Standard error over passages of the text of the bits a byte between two kinds of students.

  The next character's loss depends on the last one's, so no character is an independent draw. A
  passage is about a thousand bytes of windows that follow one another, and stands for a document.
  """
  size = ours["where"][0] * lengths[examples.labels]
  windows = max(1, round(1000 / size.sum(axis=1).mean()))
  passages = np.broadcast_to(np.arange(len(size))[:, None] // windows, size.shape)
  theirs = {name: values[: len(ours[name])] for name, values in theirs.items()}
  found = evaluation.metrics.over_documents(
    ours, passages, beside=theirs, sizes=lengths[examples.labels]
  )
  return found["bits_per_byte"]["standard_error"]


BESIDE = ("agreement", "kl", "ece", "acceptance")


def report_of(
  config: Config,
  options: Options,
  folder: pathlib.Path,
  part: str,
  examples: data.Examples,
  models: dict[str, Any],
  teacher: Any,
  task: evaluation.tasks.Task,
) -> None:
  """The report of the students with few text, or with all of it; its page shows what they write."""
  tokenizer = tokenizer_of(config, options)
  reports.compare_students(
    folder / part,
    network={"baseline": models["labels"], "student": models["distilled"]},
    teacher=teacher,
    batches=data.evaluation_batches(examples, batch_size=64),
    examples=examples,
    descriptions={
      "teacher": f"{config.teacher_layers} layers of width {config.teacher_width}, all of the text",
      "baseline": f"{config.student_layers} layers of width {config.student_width}, text alone",
      "student": f"the same, {config.soft_weight:g} of the loss from the teacher's distribution",
    },
    task=task,
    texts=reports.Texts(tokenizer, prompt=config.length // 2, length=4 * config.length),
    dataset=examples.name,
    split=options.split,
    seeds=range(config.seeds),
    varied="initialisation and data order",
    commands=commands_of(config, options, folder),
  )


def commands_of(config: Config, options: Options, folder: pathlib.Path) -> list[str]:
  """What repeats the run, and what measures it again."""
  commands = runs.commands(SCRIPT, config, folder, options.split, options.data_dir)
  if options.text is None:
    return commands
  return [f"{command} --text {shlex.quote(str(options.text))}" for command in commands]


WORDS = {
  "teacher": "teacher",
  "labels": "text alone, as many steps",
  "seconds": "text alone, as many seconds",
  "taught": "text alone, the teacher's training too",
  "distilled": "distilled",
}


def said_seconds(config: Config, folder: pathlib.Path, part: str) -> str:
  """A line of what counts as equal seconds of a text's students."""
  found = runs.read_json(folder / f"{part}-seconds.json")
  took, steps = found["seconds"], found["steps"]
  return (
    f"- {part}: the distilled students' steps take {took['distilled']:.1f} s, the teacher's "
    f"answers {took['answers']:.1f} s: as long as {steps['seconds']:,} steps on the text alone, of "
    f"which {config.steps:,} take {took['labels']:.1f} s. With the teacher's training, "
    f"{took['teacher']:.1f} s, it is {steps['taught']:,} steps."
  )


def table(rows: list[dict[str, Any]]) -> str:
  """The rows as Markdown."""

  def shown(row: dict[str, Any], name: str, digits: int = 3) -> str:
    return "–" if row.get(name) is None else f"{row[name]:.{digits}f}"

  lines = [
    "| text | student | steps | bits a byte | distilling gains | agreement | ECE | seconds |",
    "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
  ]
  for row in rows:
    spread = "" if row["std"] is None else f" ± {row['std']:.3f}"
    error = "" if row.get("gain_error") is None else f" ({row['gain_error']:.3f})"
    if row.get("text_error") is not None:
      error += f" ({row['text_error']:.3f})"
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
  lines = [
    f"# {'Shakespeare' if options.text is None else options.text.name}, {options.split} split",
    "",
    f"{length:,} characters. Mean ± standard deviation over {config.seeds} seeds "
    f"({len(seeds_of(config, 'taught'))} where the teacher's training counts), with initialisation "
    "and data order both varied; one teacher. Behind a gain its standard error over the seeds, and "
    "then over passages of the text. The last step of every run. Seconds are of the steps of all "
    "seeds together, without compilation.",
    "",
    table(rows),
    "",
    *(said_seconds(config, folder, part) for part in KINDS),
    "",
    "```",
    *commands_of(config, options, folder),
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
    command_line.first(
      measure, runs.restore_config(options.evaluate, Config), options, options.evaluate
    )
  else:
    with train.time_limit(options.stop_after):
      train_all(config, options)
    command_line.first(measure, config, options, options.out)
  print(f"{time.perf_counter() - began:.0f} s on {jax.devices()[0].device_kind}")


def parse(args: list[str]) -> tuple[Config, Options]:
  settings = {"--short": SHORT, "--large": LARGE}
  if settings.keys() <= set(args):
    sys.exit("--short and --large are two settings: say one of them.")
  config = next((settings[one] for one in args if one in settings), Config())
  return command_line.parse(args, config, Options(), __doc__)


if __name__ == "__main__":
  command_line.run(main, parse)
