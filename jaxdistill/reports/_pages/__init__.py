"""The pages of `jaxdistill.reports`: what is read, what follows from it, and how it is shown.

`evidence` reads a run's folder, whatever is broken there; `analysis` and `significance` are pure
functions of what models said of each example; `decision` weighs it; `page` and `versus_page` make
the HTML.
"""

__all__: list[str] = []
