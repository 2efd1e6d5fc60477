"""The command ``jaxdistill budget``: what a run's student costs, and whether a budget allows it.

`jaxdistill.search.measure_in_process` runs it in a process of its own, which imports none of the
code that trained the student.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from jaxdistill import _check
from jaxdistill.search._budget import UNITS, Budget, measure_run

__all__ = ["main"]

_INSTANCE = "which of the run's networks, where it has several seeds; by default the first, 0"
_EXAMPLES = """examples:
  jaxdistill budget runs/mine/student
  jaxdistill budget runs/mine/student --latency-ms 0.5 --batch-size 64"""


def main(args: Sequence[str] | None = None) -> int:
  """The command: measures a run's student, and says whether it is inside a budget.

  Args:
    args: the command line, without the program's name.

  Returns:
    The exit status: 0 inside the budget, 1 beyond it; with 2 it leaves for wrong arguments, a run
    that is not there among them.
  """
  parser = argparse.ArgumentParser(
    prog="jaxdistill budget",
    description=(
      "Measures what a finished run's student costs on this machine; with limits it says whether\n"
      "they are kept, and the exit code is 1 where they are not."
    ),
    epilog=_EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("run", help="the run's folder")
  parser.add_argument("--instance", type=int, default=0, metavar="N", help=_INSTANCE)
  parser.add_argument(
    "--batch-size", type=int, default=1, metavar="B", help="of the timed call; by default 1"
  )
  parser.add_argument(
    "--latency-ms", type=float, metavar="MS", help="the most that a call may take"
  )
  parser.add_argument("--bytes", type=int, metavar="N", help="the most that its weights may take")
  parser.add_argument("--flops", type=int, metavar="N", help="the most operations of an example")
  parser.add_argument("--parameters", type=int, metavar="N", help="the most parameters")
  parser.add_argument("--json", action="store_true", help="print the costs alone, as JSON")
  given = parser.parse_args(args)
  limits = {name: getattr(given, name) for name in UNITS}
  try:
    _check.whole("--batch-size", given.batch_size)
    asked = any(limit is not None for limit in limits.values())
    budget = Budget(batch_size=given.batch_size, spare=0, **limits) if asked else None
    costs = measure_run(given.run, batch_size=given.batch_size, instance=given.instance)
  except (IndexError, OSError, ValueError) as error:
    parser.exit(2, f"{error}\n")
  if given.json:
    print(json.dumps(costs))
    return int(budget is not None and not budget.inside(costs))
  for name, unit in UNITS.items():
    print(f"{costs[name]:>16,.6g} {unit}" if costs[name] is not None else f"{'unknown':>16} {unit}")
  if budget is None:
    return 0
  inside = budget.inside(costs)
  print(f"{'inside' if inside else 'NOT inside'} the budget of {budget.describe()}")
  return 0 if inside else 1
