"""What arrived: exact averages over a split, fidelity to the teacher, and what a model costs.

`tasks` say what labels mean, `metrics` are sums on the device that are divided once at the end;
`cost` counts and times; `predictions` keeps what each model said of each example.
"""

from typing import TYPE_CHECKING

from jaxdistill._door import lazy

if TYPE_CHECKING:  # what `lazy` imports when it is asked for
  from jaxdistill.evaluation import cost as cost
  from jaxdistill.evaluation import metrics as metrics
  from jaxdistill.evaluation import predictions as predictions
  from jaxdistill.evaluation import ranking as ranking
  from jaxdistill.evaluation import tasks as tasks
  from jaxdistill.evaluation._evaluate import (
    Validator,
    costs,
    evaluate,
    examine,
    logits_of,
    taught,
    validator,
  )
  from jaxdistill.evaluation._programs import batches_of, first_of

__all__ = [
  "Validator",  # what `validator` makes: ``model -> {name: number}`` of its task's metrics
  "batches_of",  # the batches of a split one by one, on the device or streamed
  "cost",  # what a network costs: parameters, bytes, floating-point operations, and time
  "costs",  # what a deployed model costs, on this machine
  "evaluate",  # evaluates a model on a whole split, padded rows excluded exactly
  "examine",  # what `evaluate` does, and in the same pass what the model said of each example
  "first_of",  # the first batch of a split
  "logits_of",  # what a model, or a teacher, says of a batch
  "metrics",  # evaluation metrics: exact sums on the device, divided once at the end on the host
  "predictions",  # what each model said of each example
  "ranking",  # what only all examples together can tell: average precision, R², neighbours
  "tasks",  # what labels mean: classes, tags, numbers, pixels, tokens, vectors, two towers
  "taught",  # the batches with what a teacher says of them, for many students to be compared with
  "validator",  # what a run measures on its way: compiled once, called often
]

__getattr__, __dir__ = lazy(__name__)
