"""Distillation losses: plain functions, student first, one value per example.

`logits` compares what two networks predict, `features` what they hold inside, and `relations` how
they place examples beside each other. Everything public is here too:
``from jaxdistill import losses``, then ``losses.soft_target_kl(...)``.
"""

from jaxdistill.losses import features, logits, relations
from jaxdistill.losses.features import *  # noqa: F403
from jaxdistill.losses.logits import *  # noqa: F403
from jaxdistill.losses.relations import *  # noqa: F403

__all__ = sorted([*features.__all__, *logits.__all__, *relations.__all__])
