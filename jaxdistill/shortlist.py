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
from jaxdistill.budget import UNITS, Budget, number
from jaxdistill.selection import METRICS, Row
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
    helps: whether the mean gain is above its standard error (with one seed it has none, and the
      answer is no); the chosen student then learns from the assistant.
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
    if len(self.gain) == 1:
      word = "was tried with one seed, which tells no noise"
    assistant = f"a teaching assistant ({self.name}, {self.parameters:,} parameters)"
    return f"{behind}; {assistant} {word} ({gain})."


@dataclasses.dataclass(frozen=True)
class Compressed:
  """What `jaxdistill.compress.run` returns.

  Attributes:
    budget: the budget.
    candidates: all of them.
    teacher: the teacher's costs, and its metrics on validation.
    chosen: the chosen candidate's name.
    values: the chosen point's values.
    assistant: what came of a teaching assistant; None where none was wanted.
    metric: what was chosen by.
    network: the chosen network.
    variables: its variables, leaves ``[S, ...]`` over the final seeds.
    validation: the metrics of ``student`` and ``baseline`` on validation, ``[S]`` each.
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
  validation: dict[str, dict[str, np.ndarray]]

  @property
  def instance(self) -> int:
    """Which of the final students is best on validation."""
    return int(np.argmax(METRICS[self.metric] * self.validation["student"][self.metric]))

  @property
  def costs(self) -> dict[str, Any]:
    """What the chosen student costs in a process of its own."""
    checked = self._candidate(self.chosen).checked
    assert checked is not None
    return checked

  def sentence(self) -> str:
    """What was chosen, what it costs, and what distillation adds to it."""
    trained = sum(c.row is not None for c in self.candidates)
    values = ", ".join(f"{n} {v:g}" for n, v in self.values.items() if isinstance(v, int | float))
    used = ", ".join(
      f"{number(self.costs[name])} of {number(limit)} {UNITS[name]}"
      for name, limit in self.budget.limits().items()
    )
    quality = "; ".join(
      f"{name} {_spread(self.validation['student'][name])} against "
      f"{_spread(self.validation['baseline'][name])} on labels alone and "
      f"{self.teacher[name]:.4f} of the teacher"
      for name in self._shown()
    )
    text = (
      f"Chosen: {self.chosen} ({values}), of {len(self.candidates)} candidates, {trained} of them "
      f"inside the budget. It uses {used}, measured in a process of its own. On validation, "
      f"{quality} (mean ± std over {len(self.validation['student']['accuracy'])} seeds)."
    )
    return text if self.assistant is None else f"{text} {self.assistant.sentence()}"

  def front(self, over: str = "latency_ms") -> list[str]:
    """The candidates trained to the end that no other beats in both a cost and accuracy.

    Args:
      over: the cost.

    Returns:
      Their names, by increasing cost.
    """
    trained = {
      c.name: (c.costs[over], float(np.mean(c.row.metrics["accuracy"])))
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
    """The candidates as a Markdown table, the teacher's row first, and the sentence.

    Metrics are those on validation, of each candidate's best point as far as it was trained.
    """
    shown, timed = self._shown(), f"ms at batch {self.budget.batch_size}"
    lines = [
      f"| | parameters | bytes | FLOPs | {' | '.join([timed, *shown])} | |",
      "| --- | ---: | ---: | ---: | ---: |" + " ---: |" * len(shown) + " --- |",
    ]
    costs = [number(self.teacher[n]) for n in ("parameters", "bytes", "flops", "latency_ms")]
    values = [f"{self.teacher[name]:.4f}" for name in shown]
    lines.append(f"| teacher | {' | '.join([*costs, *values])} | |")
    for candidate in self.candidates:
      costs = [number(candidate.costs[n]) for n in ("parameters", "bytes", "flops", "latency_ms")]
      row = candidate.row
      values = ["" if row is None else _spread(row.metrics[name]) for name in shown]
      cells = [candidate.name, *costs, *values, self._fate(candidate)]
      lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", self.sentence()])

  def write(self, folder: pathlib.Path) -> None:
    """Writes ``candidates.md``, ``candidates.csv``, ``budget.json`` and ``frontier.png``.

    A limit other than latency has a picture of its own, ``frontier-bytes.png``.

    Args:
      folder: where.
    """
    run_lib.write_text(folder / "candidates.md", self.table() + "\n")
    run_lib.write_text(folder / "candidates.csv", self._csv())
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
    for name in set(self.budget.limits()) - {"latency_ms"}:
      self.picture(folder / f"frontier-{name}.png", name)

  def picture(self, path: pathlib.Path | None, over: str = "latency_ms") -> Any:
    """Draws accuracy over a cost: candidates, the front of the trained ones, the budget.

    Args:
      path: of the PNG; None writes none.
      over: ``latency_ms``, ``bytes``, ``flops`` or ``parameters``.

    Returns:
      The figure, Matplotlib's.
    """
    points: dict[str, tuple[float, float, float | None]]
    points = {"teacher": (self.teacher[over], 100 * self.teacher["accuracy"], None)}
    for candidate in self.candidates:
      if candidate.row is not None:
        values = 100 * candidate.row.metrics["accuracy"]
        std = float(np.std(values, ddof=1)) if len(values) > 1 else None
        points[candidate.name] = (candidate.costs[over], float(np.mean(values)), std)
    return pictures.frontier(
      path,
      points,
      front=self.front(over),
      chosen=self.chosen,
      hollow=[c.name for c in self.candidates if c.row is not None and c.row.status == "dropped"],
      limit=self.budget.limits().get(over),
      xlabel=over.replace("_ms", f" of a batch of {self.budget.batch_size} (ms)"),
      ylabel="validation accuracy (%)",
      title=f"Candidates within {self.budget.describe()}",
    )

  def _candidate(self, name: str) -> Candidate:
    return next(candidate for candidate in self.candidates if candidate.name == name)

  def _shown(self) -> list[str]:
    """The metric that was chosen by, and accuracy."""
    return list(dict.fromkeys([self.metric, "accuracy"]))

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
    table.writerow(["candidate", *UNITS, "seed", *METRICS, "step", "fate"])
    for candidate in self.candidates:
      costs = [candidate.costs[name] for name in UNITS]
      fate = self._fate(candidate).strip("*")
      row = candidate.row
      if row is None:
        table.writerow([candidate.name, *costs, *[""] * (len(METRICS) + 2), fate])
        continue
      for s in range(len(row.metrics["accuracy"])):
        values = [float(row.metrics[name][s]) for name in METRICS]
        table.writerow([candidate.name, *costs, s, *values, row.step, fate])
    return text.getvalue()


def _over(budget: Budget, costs: dict[str, Any]) -> str:
  over = {name: share for name, share in budget.shares(costs).items() if share > 1}
  return ", ".join(f"{name.removesuffix('_ms')} {share:.3g} times" for name, share in over.items())


def _spread(values: np.ndarray) -> str:
  std = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
  return f"{np.mean(values):.4f}{std}"
