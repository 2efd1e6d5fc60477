"""Methods as objectives: what to compare, and with what weight.

A recipe returns an objective. `combine` adds objectives up, so that a method is put together from
parts: ``combine(kd(), hint("hidden", "0/hidden"))``. A method of your own needs none of this: a
function ``(student, teacher, batch, *, ...) -> {name: Term}`` is an objective.
"""

from jaxdistill.recipes.basics import combine, fitnet, hint, kd, labels
from jaxdistill.recipes.crd import crd
from jaxdistill.recipes.features import (
  attention_transfer,
  nst,
  overhaul,
  overhaul_margins,
  vid,
)
from jaxdistill.recipes.logits import ctkd, dist, dkd, kd_standardized, ofa
from jaxdistill.recipes.relations import (
  correlation_congruence,
  pkt,
  rkd,
  similarity_preserving,
)
from jaxdistill.recipes.review import reviewkd
from jaxdistill.recipes.simkd import simkd
from jaxdistill.recipes.stages import activation_boundary, factor_transfer, fsp

__all__ = [
  "activation_boundary",
  "attention_transfer",
  "combine",
  "correlation_congruence",
  "crd",
  "ctkd",
  "dist",
  "dkd",
  "factor_transfer",
  "fitnet",
  "fsp",
  "hint",
  "kd",
  "kd_standardized",
  "labels",
  "nst",
  "ofa",
  "overhaul",
  "overhaul_margins",
  "pkt",
  "reviewkd",
  "rkd",
  "similarity_preserving",
  "simkd",
  "vid",
]
