"""What an experiment ends with: teacher, labels alone and distillation, measured side by side."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from jaxdistill import evaluate, report, teachers
from jaxdistill.types import Batch, Network

__all__ = ["runs"]

PyTree = Any


def runs(
  folder: pathlib.Path,
  *,
  network: Network,
  reference: tuple[evaluate.Predict, PyTree],
  batches: Batch,
  descriptions: Mapping[str, str],
  **about: Any,
) -> tuple[pathlib.Path, dict[str, Any]]:
  """Compares the runs ``baseline`` and ``student`` of an experiment's folder with their teacher.

  Args:
    folder: the experiment's folder; the report is written there.
    network: the network of both runs, each of which is over several seeds. What it costs is
      measured once: timing it twice would show the clock's noise as a difference.
    reference: the teacher, as ``(predict, variables)``.
    batches: the split, from `jaxdistill.data.evaluation_batches`.
    descriptions: what ``teacher``, ``baseline`` and ``student`` are, in a few words.
    **about: what `report.build` takes beside the three models.

  Returns:
    ``(the path of report.md, the report)``.

  Raises:
    FileNotFoundError: a run has no usable checkpoint.
    ValueError: a run is not finished.
  """
  predict = evaluate.predictor(network)
  stacked = {name: teachers.restore(folder / name) for name in ("baseline", "student")}
  costs = evaluate.costs(predict, teachers.unstack(stacked["student"])[0], batches)
  teacher = report.measure(*reference, batches, description=descriptions["teacher"])
  students = {
    name: report.measure(
      predict,
      variables,
      batches,
      reference=reference,
      stacked=True,
      costs=costs,
      description=descriptions[name],
    )
    for name, variables in stacked.items()
  }
  result = report.build(
    teacher=teacher, baseline=students["baseline"], student=students["student"], **about
  )
  return report.write(folder, result), result
