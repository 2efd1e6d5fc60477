"""report.json, report.md, report.html; figures; two runs compared.

`build_report` puts together what `measure_model` found, `write_report` makes the files, and
`render_report` makes the pages again from a run's folder alone.
"""

from typing import TYPE_CHECKING

from jaxdistill._door import lazy

if TYPE_CHECKING:  # what `lazy` imports when it is asked for
  from jaxdistill.reports import figures as figures
  from jaxdistill.reports._card import write_model_folder
  from jaxdistill.reports._compare import compare_students, gather_predictions
  from jaxdistill.reports._format import Markup, csv_text, grid, plain, with_std
  from jaxdistill.reports._pages.summary import markdown, picture, table
  from jaxdistill.reports._pages.versus import compare_runs, write_comparison
  from jaxdistill.reports._report import (
    Measured,
    build_report,
    measure_model,
    render_report,
    report_schema,
    write_report,
  )
  from jaxdistill.reports._texts import Texts, write_texts

__all__ = [
  "Markup",  # a cell of our own Markdown, which `grid` leaves as it is
  "Measured",  # one model as `evaluation.examine` measured it
  "Texts",  # how sample texts of language models are drawn
  "build_report",  # assembles a report from the measured models
  "compare_runs",  # compares the students of two runs on the examples that both were measured on
  "compare_students",  # baseline and student, runs of a folder or models, beside their teacher
  "csv_text",  # rows as CSV; the first is its head
  "figures",  # pictures of results: models side by side, curves over a setting, methods in rows
  "gather_predictions",  # what all models said of each example, with some to look at
  "grid",  # rows as a Markdown table that is aligned as plain text too
  "markdown",  # ``report.md``: verdict, tables, how to repeat it; what is broken in the numbers
  "measure_model",  # evaluates a model and what it costs
  "picture",  # the metric of the models: every seed a dot, the mean with its standard deviation
  "plain",  # a number in full, a cost for example
  "render_report",  # makes the pages of a report again from a run's folder alone; runs no network
  "report_schema",  # the JSON schema that every ``report.json`` satisfies
  "table",  # the one table: quality, agreement with the teacher, and cost of the models
  "with_std",  # a mean and its standard deviation, which one run has not
  "write_comparison",  # writes the page, and beside it the same as ``.md`` and ``.json``
  "write_model_folder",  # the student as a folder for a hub of models, its card from the report
  "write_report",  # writes ``report.json``, ``report.md``, ``report.html`` and a picture
  "write_texts",  # draws sample texts, which a report shows side by side
]

__getattr__, __dir__ = lazy(__name__)
