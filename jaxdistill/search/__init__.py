"""Many students: a sweep, a study, the best one that a budget allows, and checks before them."""

from typing import TYPE_CHECKING

from jaxdistill._door import lazy

if TYPE_CHECKING:  # what `lazy` imports when it is asked for
  from jaxdistill.search._budget import (
    Budget,
    BudgetError,
    measure_in_process,
    measure_network,
    measure_run,
  )
  from jaxdistill.search._checks.findings import Finding, PreflightError, PreflightWarning
  from jaxdistill.search._choice import Choice, Halving, Result, Row, best_of
  from jaxdistill.search._compress import (
    Affordable,
    Assistant,
    Assistants,
    Candidate,
    Compressed,
    affordable,
    compress,
    family,
    read_choice,
  )
  from jaxdistill.search._grid import product
  from jaxdistill.search._preflight import preflight
  from jaxdistill.search._study import Proposals, study
  from jaxdistill.search._sweep import Execution, sweep

__all__ = [
  "Affordable",  # candidates and what each costs, at least one of them inside the budget
  "Assistant",  # a teaching assistant that was tried, or wanted
  "Assistants",  # networks that may stand between teacher and student, and when one is tried
  "Budget",  # what a student may cost; None is no limit, and at least one is given
  "BudgetError",  # no candidate is inside the budget
  "Candidate",  # one candidate
  "Choice",  # by what a point of a search is chosen, and what is done with it
  "Compressed",  # what `jaxdistill.search.compress` returns
  "Execution",  # how a sweep is carried out: devices, memory
  "Finding",  # what a check has found
  "Halving",  # successive halving: after each rung the best 1/factor of the points go on
  "PreflightError",  # the labels look shifted: a run would learn something else
  "PreflightWarning",  # something about a run that is about to start deserves a look
  "Proposals",  # what an Optuna study proposes, how many trials it has, and where it is kept
  "Result",  # what `jaxdistill.search.sweep` and `study` return
  "Row",  # one point of a sweep
  "affordable",  # what all candidates cost; fails at once where none is inside the budget
  "best_of",  # the finished point with the best mean, and those that it does not clearly beat
  "compress",  # chooses, trains and saves the student that does best within a budget
  "family",  # networks of one kind, for every combination of depth
  "measure_in_process",  # `measure_run` in a process of its own
  "measure_network",  # what a network costs as it would be deployed, trained or not
  "measure_run",  # what the student of a finished run costs, by its saved program alone
  "preflight",  # runs all checks that the arguments allow, and warns of what it finds
  "product",  # every combination of the values of some keywords; the last keyword varies fastest
  "read_choice",  # what a finished compression chose: its ``budget.json``
  "study",  # trains a student for every point that an Optuna study proposes, and chooses the best
  "sweep",  # trains a student for every point and seed, and chooses the point that validates best
]

__getattr__, __dir__ = lazy(__name__)
