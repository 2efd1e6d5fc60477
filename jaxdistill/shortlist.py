"""What a compression found: candidates with their costs, the choice, its table and pictures."""

from __future__ import annotations

import csv
import dataclasses
import io
import pathlib
from typing import Any

import numpy as np

from jaxdistill import pictures
from jaxdistill import run as run_lib
from jaxdistill.budget import UNITS, Budget
from jaxdistill.selection import METRICS, Row, score
from jaxdistill.types import Network

__all__ = ["Assistant", "Candidate", "Compressed"]

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One candidate.

  Attributes:
    name: its name.
    costs: from `jaxdistill.budget.measure`, before any training.
    row: its best point; None where it was over the budget and not trained.
    checked: what it costs in a process of its own; None where that was not asked.
  """

  name: str
  costs: dict[str, Any]
  row: Row | None
  checked: dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class Assistant:
  """A teaching assistant that was tried, or wanted.

  Attributes:
    name: the network's; None where none between student and teacher was given.
    parameters: how many it has, or should have.
    behind: how far the student was behind the teacher, as a share of the validation examples.
    row: the best point of the student that it taught.
    gain: of that student over the one taught directly, ``[S]`` over the search's seeds, positive
      for better.
    helps: whether the mean gain is above its standard error; the chosen student then learns from
      the assistant.
    network: the assistant's.
    variables: its variables, leaves ``[1, ...]``.
  """

  name: str | None
  parameters: int
  behind: float
  row: Row | None
  gain: np.ndarray
  helps: bool
  network: Network | None = dataclasses.field(default=None, repr=False)
  variables: PyTree = dataclasses.field(default=None, repr=False)

  def sentence(self) -> str:
    """What came of it."""
    behind = f"The student is {100 * self.behind:.1f} points behind its teacher on validation"
    if self.name is None:
      return (
        f"{behind}, and no network between them was given: a teaching assistant of about "
        f"{self.parameters:,} parameters might help (assistants=)."
      )
    gain = f"{float(np.mean(self.gain)):+.4f}"
    word = "helped, and teaches the student" if self.helps else "did not help beyond noise"
    assistant = f"a teaching assistant ({self.name}, {self.parameters:,} parameters)"
    return f"{behind}; {assistant} {word} ({gain})."


@dataclasses.dataclass(frozen=True)
class Compressed:
  """What `jaxdistill.compress.run` returns.

  Attributes:
    budget: the budget.
    candidates: all of them.
    teacher: the teacher's costs, and its metric on validation.
    chosen: the chosen candidate's name.
    values: the chosen point's values.
    assistant: what came of a teaching assistant; None where none was wanted.
    metric: what was chosen by.
    network: the chosen network.
    variables: its variables, leaves ``[S, ...]`` over the final seeds.
    validation: the metric of ``student`` and ``baseline`` on validation, ``[S]`` each.
  """

  budget: Budget
  candidates: list[Candidate]
  teacher: dict[str, Any]
  chosen: str
  values: dict[str, Any]
  assistant: Assistant | None
  metric: str
  network: Network
  variables: PyTree = dataclasses.field(repr=False)
  validation: dict[str, np.ndarray]

  @property
  def instance(self) -> int:
    """Which of the final students is best on validation."""
    return int(np.argmax(METRICS[self.metric] * self.validation["student"]))

  @property
  def costs(self) -> dict[str, Any]:
    """What the chosen student costs in a process of its own."""
    checked = self._candidate(self.chosen).checked
    assert checked is not None
    return checked

  def sentence(self) -> str:
    """What was chosen, what it costs, and what distillation adds to it."""
    student, baseline = (self.validation[name] for name in ("student", "baseline"))
    trained = sum(c.row is not None for c in self.candidates)
    values = ", ".join(f"{n} {v:g}" for n, v in self.values.items() if isinstance(v, int | float))
    used = ", ".join(
      f"{_number(self.costs[name])} of {_number(limit)} {UNITS[name]}"
      for name, limit in self.budget.limits().items()
    )
    text = (
      f"Chosen: {self.chosen} ({values}), of {len(self.candidates)} candidates, {trained} of them "
      f"inside the budget. It uses {used}, timed in a process of its own. On validation, "
      f"{self.metric} {_spread(student)} against {_spread(baseline)} on labels alone and "
      f"{self.teacher[self.metric]:.4f} of the teacher (mean ± std over {len(student)} seeds)."
    )
    return text if self.assistant is None else f"{text} {self.assistant.sentence()}"

  def front(self) -> list[str]:
    """The candidates trained to the end that no other beats in both latency and the metric."""
    trained = {
      c.name: (c.costs["latency_ms"], float(np.mean(score(c.row, self.metric))))
      for c in self.candidates
      if c.row is not None and c.row.status == "finished"
    }
    finite = {name: found for name, found in trained.items() if np.isfinite(found[1])}

    def beaten(name: str) -> bool:
      time, value = finite[name]
      return any(
        t <= time and v >= value and (t, v) != (time, value)
        for other, (t, v) in finite.items()
        if other != name
      )

    return sorted((n for n in finite if not beaten(n)), key=lambda n: finite[n][0])

  def table(self) -> str:
    """The candidates as a Markdown table, the teacher's row first, and the sentence."""
    lines = [
      "| | parameters | bytes | FLOPs | latency, ms | " + f"{self.metric} (validation) | |",
      "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    costs = [_number(self.teacher[n]) for n in ("parameters", "bytes", "flops", "latency_ms")]
    lines.append(f"| teacher | {' | '.join(costs)} | {self.teacher[self.metric]:.4f} | |")
    for candidate in self.candidates:
      costs = [_number(candidate.costs[n]) for n in ("parameters", "bytes", "flops", "latency_ms")]
      value = "" if candidate.row is None else _spread(candidate.row.metrics[self.metric])
      lines.append(
        f"| {candidate.name} | {' | '.join(costs)} | {value} | {self._fate(candidate)} |"
      )
    return "\n".join([*lines, "", self.sentence()])

  def write(self, folder: pathlib.Path) -> None:
    """Writes ``candidates.md``, ``candidates.csv``, ``budget.json`` and ``frontier.png``.

    Args:
      folder: where.
    """
    (folder / "candidates.md").write_text(self.table() + "\n")
    (folder / "candidates.csv").write_text(self._csv())
    found = {
      "budget": dataclasses.asdict(self.budget),
      "chosen": self.chosen,
      "values": self.values,
      "costs": self.costs,
      "inside": self.budget.inside(self.costs),
      "instance": self.instance,
      "metric": self.metric,
      "validation": self.validation,
      "teacher": self.teacher,
      "assistant": None if self.assistant is None else self.assistant.sentence(),
      "sentence": self.sentence(),
    }
    run_lib.write_json(folder / "budget.json", found)
    self.picture(folder / "frontier.png")

  def picture(self, path: pathlib.Path | None, over: str = "latency_ms") -> Any:
    """Draws the metric over a cost: candidates, the front of the trained ones, the budget.

    Args:
      path: of the PNG; None writes none.
      over: ``latency_ms``, ``bytes``, ``flops`` or ``parameters``.

    Returns:
      The figure, Matplotlib's.
    """
    scale = 100 if self.metric == "accuracy" else 1
    points: dict[str, tuple[float, float, float | None]]
    points = {"teacher": (self.teacher[over], scale * self.teacher[self.metric], None)}
    for candidate in self.candidates:
      if candidate.row is not None:
        values = scale * candidate.row.metrics[self.metric]
        std = float(np.std(values, ddof=1)) if len(values) > 1 else None
        points[candidate.name] = (candidate.costs[over], float(np.mean(values)), std)
    unit = " (%)" if scale == 100 else ""
    return pictures.frontier(
      path,
      points,
      front=self.front() if over == "latency_ms" else [],
      chosen=self.chosen,
      hollow=[c.name for c in self.candidates if c.row is not None and c.row.status == "dropped"],
      limit=self.budget.limits().get(over),
      xlabel=over.replace("_ms", f" of a batch of {self.budget.batch_size} (ms)"),
      ylabel=f"validation {self.metric}{unit}",
      title=f"Candidates within {self.budget.describe()}",
    )

  def _candidate(self, name: str) -> Candidate:
    return next(candidate for candidate in self.candidates if candidate.name == name)

  def _fate(self, candidate: Candidate) -> str:
    if candidate.name == self.chosen:
      return "**chosen**"
    if candidate.row is None:
      return f"over the budget: {_over(self.budget, candidate.costs)}"
    if candidate.checked is not None:
      return f"over it in a process of its own: {_over(self.budget, candidate.checked)}"
    return f"{candidate.row.status}, step {candidate.row.step}"

  def _csv(self) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["candidate", *UNITS, "seed", self.metric, "step", "fate"])
    for candidate in self.candidates:
      costs = [candidate.costs[name] for name in UNITS]
      fate = self._fate(candidate).strip("*")
      row = candidate.row
      for s, value in enumerate([] if row is None else row.metrics[self.metric]):
        table.writerow([candidate.name, *costs, s, float(value), row.step if row else "", fate])
      if row is None:
        table.writerow([candidate.name, *costs, "", "", "", fate])
    return text.getvalue()


def _over(budget: Budget, costs: dict[str, Any]) -> str:
  over = {name: share for name, share in budget.shares(costs).items() if share > 1}
  return ", ".join(f"{name.removesuffix('_ms')} {share:.3g} times" for name, share in over.items())


def _number(value: float | None) -> str:
  if value is None:
    return "–"
  return f"{value:,.4g}" if value < 1000 else f"{round(value):,}"


def _spread(values: np.ndarray) -> str:
  std = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
  return f"{np.mean(values):.4f}{std}"
