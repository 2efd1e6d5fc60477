"""The command ``jaxdistill report``: a run's report made again, or two runs compared."""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from jaxdistill.evaluation import predictions
from jaxdistill.reports._pages import evidence, versus
from jaxdistill.reports._report import render_report

__all__ = ["main"]

_EXAMPLES = """examples:
  jaxdistill report runs/mine                    writes runs/mine/report.html and .md anew
  jaxdistill report runs/mine runs/other         writes comparison.html
  jaxdistill report runs/mine --metadata a.csv   slices the split by the columns of a.csv"""


def main(args: Sequence[str] | None = None) -> int:
  """The command; returns the exit code.

  Args:
    args: the command line's words; those of the process by default.
  """
  parser = argparse.ArgumentParser(
    prog="jaxdistill report",
    description="Makes a run's report again from its folder, or compares two runs.",
    epilog=_EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("run", type=pathlib.Path, help="the run's folder")
  parser.add_argument("other", type=pathlib.Path, nargs="?", help="a run to compare it with")
  parser.add_argument("--split", default="test", help="which split's report; by default test")
  parser.add_argument(
    "--out",
    type=pathlib.Path,
    help="the comparison's page (comparison.html); its .md and .json lie beside it",
  )
  parser.add_argument(
    "--metadata",
    type=pathlib.Path,
    help="a CSV file whose columns slice the split: a head, and a row for each of its examples",
  )
  options = parser.parse_args(args)
  if options.metadata is not None and options.other is not None:
    parser.error("--metadata is of one run's report; name one run")
  if options.out is not None and options.other is None:
    parser.error("--out is of a comparison; name two runs")
  try:
    if options.other is None:
      columns = predictions.read_columns(options.metadata) if options.metadata else None
      path = render_report(options.run, split=options.split, metadata=columns)
      found = evidence.read(options.run, options.split)
      print(found.report["verdict"] or "There is no verdict.")
      for problem in found.problems:
        print(f"- {problem}", file=sys.stderr)
    else:
      compared = versus.compare_runs(options.run, options.other, split=options.split)
      path = versus.write_comparison(options.out or pathlib.Path("comparison.html"), compared)
      print(versus.markdown(compared.numbers))
  except (OSError, ValueError) as error:
    print(error, file=sys.stderr)
    return 1
  print(f"Report: {path}")
  return 0
