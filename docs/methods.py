"""Writes the tables of `docs/methods.md`, a row for each method, or checks that they are current.

    python docs/methods.py            # writes
    python docs/methods.py --check    # fails where the page is not what would be written

What a method is, its line in the door of `jaxdistill.recipes` says; where to take it, this file.
Gains are those of the table in experiments/README.md, costs those that benchmarks/costs.py counted.
It imports nothing of the library, so that any Python runs it.
"""

from __future__ import annotations

import json
import pathlib
import re
import sys
from collections.abc import Sequence

from generated import write_or_check

__all__ = ["command", "listed", "main", "page"]

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "methods.md"
BEGIN, END = "<!-- methods: written by docs/methods.py -->", "<!-- methods end -->"
command = "python docs/methods.py"

# Where to take each, by what it looks at.
TAKE = {
  "Of logits": {
    "kd": "first of all, and as the measure of every other one",
    "dkd": "the teacher is nearly always right and sure, so that its other classes hardly weigh",
    "gdkd": "as `dkd`, and the teacher wavers among a few classes",
    "rld": "as `dkd`, and the teacher is often wrong: classes above the label teach nothing",
    "nkd": "as `dkd`, with the label's class at temperature 1",
    "kd_standardized": "the teacher is much larger, so that its logits have another scale",
    "dist": "the teacher is so strong that an exact match is out of reach",
    "ctkd": "a temperature is not to be searched for",
    "ofa": "teacher and student are of different kinds; a step has exits on the student's stages",
    "ttm": "the student's own temperature is to stay 1",
    "wttm": "as `ttm`, and examples differ in how sure the teacher is",
    "wsl": "soft targets are to weigh where the student lags behind on the label",
    "mlkd": "many classes and large batches; at few classes its weights are too large",
    "sdd": "images with several things in them; a classifier of the mean over positions",
    "crld": "images that bear strong augmentation: both networks see two looks",
  },
  "Of features": {
    "hint": "one layer, or several, are to be matched, of any shapes; beside `kd`",
    "fitnet": "as `hint`, one layer with the labels, to compare with published tables",
    "attention_transfer": "convolutions of any widths, and no projector is wanted",
    "nst": "as `attention_transfer`, for where each single channel fires",
    "vid": "the teacher's channels differ in what the student can say of them",
    "overhaul": "a teacher with BatchNorm before its ReLUs",
    "reviewkd": "several stages are to be matched, each by what those above it say",
    "cwd": "masks: where in the image a channel is strongest",
    "mgd": "masks and detectors: maps larger than those of digits",
    "ickd": "wide last maps; with `kd` beside it",
    "structure": "masks: which positions look alike",
    "catkd": "networks that classify a mean over positions; with `with_class_maps`",
    "srrl": "the teacher's classifier is at hand",
    "vkd": "widths differ and the projector is not to do the student's work: transformers, too",
    "norm_direction": "beside any other method, where classes have means",
    "simkd": "a larger deployed network is affordable: the teacher's classifier goes with it",
    "many_to_one": "the student may be wider in training than deployed",
    "fcfd": "the teacher's stages can be run on the student's maps",
    "fcfd_back": "beside `fcfd`, where the student's stages can be run on the teacher's maps",
    "fsp": "stages of both networks have the same widths; before the labels, in two stages",
    "activation_boundary": "the student is to begin well, then learn from labels; in two stages",
    "factor_transfer": "the teacher's map is to be compressed first; in two stages",
  },
  "Of relations": {
    "similarity_preserving": "no projector is wanted, and batches are large",
    "rkd": "embeddings: distances and angles; triples of a batch",
    "pkt": "embeddings: neighbours; no temperature or weight of geometry to choose",
    "correlation_congruence": "embeddings, with projectors of both",
    "crd": "embeddings of a fixed training set: its banks grow with the examples",
    "affinity": "two towers, such as images and texts",
  },
  "Without a teacher, or with each other": {
    "tfkd": "no teacher, and label smoothing is what is compared with",
    "uskd": "no teacher, and an early exit on the student",
    "pskd": "no teacher: what was said an epoch ago is kept for each example",
    "dml": "no teacher, and two students can be trained side by side",
    "mean_teacher": "few labels, many inputs, no teacher",
  },
  "For other labels": {
    "multi_label": "tags: each label is on or off",
    "regression": "numbers",
    "teacher_bounded": "numbers, of a teacher that is often wrong",
    "gaussian_regression": "numbers with a variance",
  },
  "Without data": {
    "dafl": "the training data are gone; [measured apart](experiments.md)",
  },
}
# Of the door's names, those that are no method.
PARTS = {
  *("combine", "each", "fold_many_to_one", "labels", "overhaul_margins", "recipe"),
  *("with_class_maps", "with_generator", "with_many_to_one", "with_variables", "with_views"),
}
HEAD = (
  "| method | what it is | take it where | gain on digits, points | step, KD = 1 | trained beside |"
  " kept |",
  "| --- | --- | --- | ---: | ---: | ---: | ---: |",
)
ABSENT = "not measured"


def listed() -> dict[str, str]:
  """Every method in the door of `jaxdistill.recipes`, with its line there."""
  door = (ROOT / "jaxdistill" / "recipes" / "__init__.py").read_text("utf-8")
  lines = dict(re.findall(r'^  "(\w+)",  # (.*)$', door, re.M))
  modules = {"parts", "projectors"}
  return {name: line for name, line in lines.items() if name not in PARTS | modules}


def gains() -> dict[str, str]:
  """By method, the gain over labels alone and its standard error, as they were measured."""
  text = (ROOT / "experiments" / "README.md").read_text("utf-8").split("### All recipes on one")[1]
  found = re.findall(r"^\| (\w+) \|[^|]*\|[^|]*\| (\S+) \(standard error (\S+)\)", text, re.M)
  return {name: f"{gain} ± {error}" for name, gain, error in found}


def row(name: str, what: str, where: str) -> str:
  """A method's row."""
  record = json.loads((ROOT / "benchmarks" / "results" / "costs.json").read_text("utf-8"))
  costs, one = record["methods"], record["methods"]["kd"]["step_flops"]
  cells = [f"`{name}`", what, where, gains().get(name, ABSENT)]
  if name not in costs:
    return f"| {' | '.join([*cells, ABSENT, ABSENT, ABSENT])} |"
  mine = costs[name]
  step = "not counted" if mine["step_flops"] is None else f"{mine['step_flops'] / one:.2f}"
  return f"| {' | '.join([*cells, step, *(f'{mine[n]:,}' for n in ('trained_beside', 'kept'))])} |"


def tables() -> str:
  """A table for each kind of method.

  Raises:
    ValueError: a method of the door has no row, or a row no method.
  """
  methods = listed()
  rows = [name for kind in TAKE.values() for name in kind]
  if sorted(rows) != sorted(methods):
    missing, more = sorted(set(methods) - set(rows)), sorted(set(rows) - set(methods))
    raise ValueError(f"docs/methods.py: TAKE lacks {missing}, and has {more} beyond the door's.")
  parts = []
  for title, kind in TAKE.items():
    lines = [row(name, methods[name], where) for name, where in kind.items()]
    parts.append("\n".join([f"### {title}", "", *HEAD, *lines]))
  return "\n\n".join(parts)


def page() -> str:
  """The page, its tables written anew."""
  before, rest = PAGE.read_text("utf-8").split(BEGIN)
  _, after = rest.split(END)
  return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
  """Writes the page, or checks it.

  Args:
    arguments: of the command line; None takes the process's own.

  Returns:
    The exit status: 1 where ``--check`` finds another page than would be written.
  """
  about = "Writes the tables of docs/methods.md."
  return write_or_check(PAGE, page, command, about, arguments)


if __name__ == "__main__":
  sys.exit(main())
