"""jaxdistill: knowledge distillation in JAX and Flax. A method is a function, a teacher a pytree.

>>> import jaxdistill as jd
>>> jd.losses.soft_target_kl  # doctest: +ELLIPSIS
<function soft_target_kl at ...>

Eleven rooms, each a package whose door is its list of names; importing one imports no other that it
does not need.
"""

from typing import TYPE_CHECKING

from jaxdistill._door import lazy

if TYPE_CHECKING:  # what `lazy` imports when it is asked for
  from jaxdistill import (
    data,
    evaluation,
    export,
    losses,
    networks,
    recipes,
    reports,
    runs,
    search,
    teachers,
    train,
  )
  from jaxdistill.train import fit
  from jaxdistill.types import Batch, Model, Network, Objective, Outputs, Teacher, Term

__version__ = "0.1.0"
__all__ = [
  "Batch",  # examples side by side: inputs, labels, and what may be used of them
  "Model",  # a network and its variables, a pytree: what `fit` returns
  "Network",  # a pure apply function and how to make its variables
  "Objective",  # a method that learns or remembers something: init and apply
  "Outputs",  # what a network puts out: logits, and features by name
  "Teacher",  # variables, a function of them, and what it is asked: a pytree, frozen
  "Term",  # one term of an objective: values, a weight, a mask
  "data",  # examples to batches: sources, streams, views, transforms
  "evaluation",  # what arrived: metrics, fidelity, cost
  "export",  # the deployed model: saved, exported, checked in another process
  "fit",  # a training run
  "losses",  # functions: student, teacher -> one value per example
  "networks",  # any Flax module as a network; our models; foreign weights
  "recipes",  # published methods as objectives
  "reports",  # report.json, .md, .html; figures; two runs compared
  "runs",  # what is on disk: a run's folder, checkpoints, digests
  "search",  # many students: sweep, compress to a budget, checks before either
  "teachers",  # frozen, combined, narrowed, cached
  "train",  # the pure step, the state, the mesh, the loop
]

__getattr__, __dir__ = lazy(__name__)
