"""The pages of `jaxdistill.reports`: what is read, what follows from it, and how it is shown.

A page's way: `evidence` reads a run's folder, `document` and `validation` hold its files against
their schemas; `analysis` and `significance` are pure functions of what models said of each example,
and `decision` weighs them; `page` and `versus` put sections together, of tables, figures
(`jaxdistill.reports.figures`) and `exhibits`; `rendering` fills the templates with them. `summary`
says the same in Markdown.
"""

__all__: list[str] = []
