"""Methods as objectives: what to compare, and with what weight.

A recipe returns an objective. `combine` adds objectives up, so that a method is put together from
parts: ``combine(kd(), hint("hidden", "0/hidden"))``. A method of your own needs none of this: a
function ``(student, teacher, batch, *, ...) -> {name: Term}`` is an objective.
"""

from jaxdistill.recipes.basics import combine, fitnet, hint, kd, labels

__all__ = ["combine", "fitnet", "hint", "kd", "labels"]
