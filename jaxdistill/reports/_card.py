"""A finished run's student as a folder for a hub of models, with a card of the report's figures."""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from jaxdistill import _extras, export, runs
from jaxdistill.reports._format import escaped, fenced
from jaxdistill.reports._pages import evidence
from jaxdistill.reports._pages.document import readings
from jaxdistill.reports._pages.summary import agreement, gap_sentence, measured, over_seeds

__all__ = ["write_model_folder"]

# What YAML does not allow between its quotes as it is, and JSON does.
_UNPRINTED = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")


def write_model_folder(
  run: str | os.PathLike[str],
  folder: str | os.PathLike[str],
  *,
  split: str = "test",
  license: str | None = None,
  instance: int = 0,
) -> pathlib.Path:
  """Writes the student as `export.save_folder` does, with a model card as ``README.md``.

  The folder is what ``huggingface_hub.upload_folder(folder_path=...)`` takes. Every figure of the
  card, in its table and in its metadata, is one of ``report.json``; of a run without a report the
  card has none. Texts are escaped, for Markdown and for YAML.

  Args:
    run: the run's folder.
    folder: where to write.
    split: which split's report.
    license: for the metadata, as the hub names it (``"apache-2.0"``); left out by default.
    instance: which of the networks of a run over several seeds.

  Returns:
    The folder.

  Raises:
    FileExistsError: the folder holds something else.
    FileNotFoundError: there is no finished run.
    ImportError: a library is not installed; the message names its extra.
  """
  _extras.need("reports.write_model_folder", "matplotlib", "scipy", "jinja2", "jsonschema")
  target = export.save_folder(run, folder, instance=instance)
  told = runs.read_json(target / "config.json")
  takes = runs.read_json(target / "preprocessor_config.json")["inputs"]
  report = None
  if pathlib.Path(run, f"report{evidence.suffix(split)}.json").is_file():
    found = evidence.read(run, split)
    report = found.report if found.whole is not None else None
  runs.write_text(target / "README.md", _card(told, takes, report, license))
  return target


def _card(
  told: Mapping[str, Any], takes: Any, report: Mapping[str, Any] | None, license: str | None
) -> str:
  """The card: metadata in YAML, then Markdown."""
  (name,) = told["architectures"]
  head: dict[str, Any] = {} if license is None else {"license": license}
  head |= {"library_name": told["library_name"], "tags": ["jax", "knowledge-distillation"]}
  if report is not None:
    head["model-index"] = [{"name": name, "results": _results(report)}]
  # JSON is YAML, and leaves nothing to be read as something else.
  lines = ["---", *(f"{key}: {_yaml(value)}" for key, value in head.items()), "---", ""]
  lines += [f"# {escaped(name)}", ""]
  lines += [f"A student of {told['parameters']:,} parameters, distilled by jaxdistill.", ""]
  lines += ["## What it takes and puts out", "", *fenced([json.dumps(takes)]), ""]
  lines += ["A batch of such inputs as the data set stores them: the program normalises them."]
  outputs = ", ".join(map(escaped, told["outputs"]))
  lines += [
    f"It puts out {outputs}" + (f", {told['num_labels']} classes." if told["num_labels"] else "."),
    "",
  ]
  lines += ["## Use", "", "```python", "from jaxdistill import export", ""]
  lines += ['student = export.load_folder("this folder")', "logits = student(inputs)", "```", ""]
  lines += ["With JAX alone, inputs and outputs in `.npz`:", ""]
  lines += fenced(
    ["python run_stablehlo.py program.stablehlo inputs.npz out --weights model.safetensors"]
  )
  lines += ["", *_figures(report)]
  return "\n".join(lines)


def _figures(report: Mapping[str, Any] | None) -> list[str]:
  """What the report says: verdict, table, how to repeat it."""
  if report is None:
    return ["## Figures", "", "The run has no report, so none are told here.", ""]
  split, examples = escaped(report["split"] or "unknown"), report["examples"]
  lines = [f"## Figures: {escaped(report['dataset'] or 'unknown data')}, {split} split", ""]
  lines += [escaped(report["verdict"] or "There is no verdict."), ""]
  lines += [gap_sentence(report["gap_closed"]), ""]
  many = f"{examples:,} examples. " if examples else ""
  lines += [many + over_seeds(report), ""]
  lines += [measured(report).markdown(), ""]
  agree = agreement(report)
  if len(agree.head) > 1:
    lines += ["### How far they agree with the teacher", "", agree.markdown(), ""]
  if report["commands"]:
    lines += ["## How to repeat it", "", *fenced(report["commands"]), ""]
  return lines


def _results(report: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The student's metrics as the hub's ``model-index`` has them: what was measured alone."""
  student = report["models"].get("student", {})
  metrics = [
    {"type": one.name, "name": one.title, "value": student[one.name]["mean"]}
    for one in readings(report).values()
    if (student.get(one.name) or {}).get("mean") is not None
    and math.isfinite(student[one.name]["mean"])
  ]
  data = {"type": report["dataset"], "name": report["dataset"], "split": report["split"]}
  task = report["task"]["name"]
  return [{"task": {"type": task, "name": task}, "dataset": data, "metrics": metrics}]


def _yaml(value: Any) -> str:
  r"""A value as YAML on one line.

  >>> print(_yaml({"name": 'a: "b"\n---'}))
  {"name": "a: \"b\"\n---"}
  """
  told = json.dumps(value, ensure_ascii=False, allow_nan=False)
  return _UNPRINTED.sub(lambda match: f"\\u{ord(match[0]):04x}", told)
