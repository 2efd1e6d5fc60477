"""Teachers of other programs: a Python function of arrays on the host, asked and never compiled.

Such a teacher is a `jaxdistill.Teacher` whose function cannot be part of a compiled program. Who
needs its outputs asks it on the host: a cache while it is filled, and evaluation batch by batch. A
step that asked it would wait for the host in every step, and so it refuses to be traced.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import _check
from jaxdistill.teachers import cache_writer
from jaxdistill.types import Batch, Outputs, Teacher

__all__ = ["OnHost", "foreign"]

_TAKES = ("inputs", "batch")


@dataclasses.dataclass(frozen=True)
class OnHost:
  """A function of another program as what a teacher applies."""

  function: Callable[[Any], Any]
  gives: str
  floor: float
  takes: str
  name: str

  def __call__(self, variables: Any, batch: Batch) -> Outputs:
    """Asks the function about a batch; what it says is checked, and logits are made of it."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(batch)):
      raise TypeError(
        f"the teacher {self.name!r} is of another program and cannot be compiled into a step. Ask "
        "it once: fit(..., data=teachers.cached(teacher, source)), without teacher=."
      )
    host: Batch = jax.device_get(batch)
    made = cache_writer.outputs_of(
      self.function(host if self.takes == "batch" else host.inputs),
      len(host.index),
      gives=self.gives,
      floor=self.floor,
      name_of=lambda row: f"example {int(host.index[row])} (row {row} of a batch)",
    )
    with np.errstate(over="ignore"):  # said below, by name
      there = {name: jnp.asarray(values) for name, values in made.items()}
    for name, values in there.items():
      if not jnp.isfinite(values).all():  # they were, in the dtype that the function gave
        raise ValueError(
          f"the teacher's {name} have a number that {values.dtype} has not: scale them."
        )
    features = {n.split("/", 1)[1]: v for n, v in there.items() if n.startswith("features/")}
    where = there["where"].astype(jnp.float32) if "where" in there else None
    return Outputs(logits=there.get("logits"), features=features, where=where)


def foreign(
  function: Callable[[Any], Any],
  *,
  gives: str = "logits",
  floor: float = cache_writer.FLOOR,
  takes: str = "inputs",
  name: str | None = None,
) -> Teacher:
  """A Python function of arrays on the host as a teacher: of any program, library or server.

  It fills a cache, ``data=teachers.cached(teacher, source, folder=...)``, in batches and under a
  progress bar; one that is killed goes on where it was. `evaluation.evaluate`, `evaluation.taught`
  and reports ask it as they ask any teacher. It is never asked inside of a training step.

  Args:
    function: ``inputs -> outputs``, NumPy arrays. Inputs are a batch's as the student sees them,
      ``[B, ...]`` or a pytree of these: augmented and normalised (where the teacher wants other
      numbers, the function undoes it). Outputs are an array ``[B, ..., K]`` of the kind ``gives``
      (a regressor's ``[B]`` is one output); or a mapping whose names say what each is:
      ``"logits"``, ``"probabilities"`` or ``"binary_probabilities"``, any ``"features/<name>"``,
      and ``"where"`` ``[B]``, 0 for those examples of which the teacher says nothing. They teach
      nothing, in no term that looks at the teacher; their labels count as before.
    gives: what an array is: ``"logits"``; ``"probabilities"``, a softmax's (``predict_proba``),
      which become ``log(max(p, floor))``; ``"binary_probabilities"``, of K yes-or-no questions
      (``[B, K]``, or K of ``[B, 2]``, of no and yes, as scikit-learn gives several labels), which
      become ``log(p) - log(1 - p)``; or ``"features"``, kept as the feature ``"output"``.
    floor: the least probability, 1e-7 by default: a class of probability 0 has the logit −16.1.
    takes: ``"inputs"``, or ``"batch"`` for a function of the whole `Batch` of NumPy arrays, whose
      ``index`` tells which examples they are: ``lambda batch: answers[batch.index]``.
    name: of the teacher and its version; a cache is told by it, and by what the teacher says of the
      first eight examples, of which it is asked twice. The function's own name by default.

  Returns:
    The teacher; it has no variables. It may be a member of an `ensemble`, and be narrowed by
    `subset` and `grouped`.

  Raises:
    TypeError: ``function`` is none, or ``name`` no text.
    ValueError: ``gives``, ``takes`` or ``floor`` is out of range. When it is asked: it gave what is
      no logits, probabilities or features; the message names the example, as
      `cache_writer.outputs_of` does. When a cache is filled: it answers the same question twice.

  >>> import numpy as np
  >>> from jaxdistill.types import make_batch
  >>> halves = foreign(lambda inputs: np.full((len(inputs), 2), 0.5), gives="probabilities")
  >>> round(float(halves(make_batch(np.zeros((1, 3)))).logits[0, 0]), 2)
  -0.69
  """
  if not callable(function):
    raise TypeError(
      f"function={_check.show(function)} must be a function of arrays: model.predict_proba, say."
    )
  for argument, value, known in (("gives", gives, cache_writer.GIVES), ("takes", takes, _TAKES)):
    if value not in known:
      raise ValueError(f"{argument}={value!r} must be one of {', '.join(known)}.")
  _check.number("floor", floor, above=0, most=0.5)
  if not isinstance(name, str | None):
    raise TypeError(f"name={_check.show(name)} must be a text, or None for the function's own.")
  if name is None:
    named = getattr(function, "__qualname__", type(function).__qualname__)
    name = f"{getattr(function, '__module__', '')}.{named}"
  apply = OnHost(function, gives, float(floor), takes, name)
  asked = {"kind": "foreign", "name": name, "gives": gives, "floor": apply.floor, "takes": takes}
  return Teacher({}, apply, json.dumps(asked))
