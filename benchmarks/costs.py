"""What a step of each method computes beside one of KD, and what is trained and kept for it.

The pair, the batch and the optimiser are those of experiments/methods.py. A step is the batch's cut
and augmentation, the teacher's forward pass where the method has one, the student forward and
backward, what the method trains beside it, and the optimiser. Its operations are counted in its
jaxpr (`evaluation.cost.flops`), so that the figures are of the method and not of a machine, and
nothing is trained. They are no seconds: a gather, a sort or a small product takes more of these
than its operations say. A loop of unknown length counts one turn. Of the methods in two stages it
is the step in which the networks are compared; the other one is that of labels alone.

Command:   python benchmarks/costs.py            (results: benchmarks/results/costs.json)
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import tempfile

import jax
import tyro

from jaxdistill import evaluation, recipes, teachers, train
from jaxdistill.types import Model, as_objective

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "experiments"))

import methods  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Options:
  """What to count."""

  methods: tuple[str, ...] = ()
  """Which ones, all of them by default; the others can be added later."""
  data_dir: str | None = None
  """Where TFDS keeps its data sets; its own default when left out."""
  out: pathlib.Path = pathlib.Path(__file__).parent / "results" / "costs.json"


class Untrained(methods.Bench):
  """The protocol, with networks as they are initialised: no count depends on their weights."""

  def model(self, network):
    """A network as a teacher."""
    inputs = self.validation.inputs[0]
    return teachers.frozen(Model(network, network.init(jax.random.key(0), inputs)))

  def past(self):
    """An untrained student."""
    return self.model(self.student)


def cost(bench, student, teacher, objective, method):
  """Of one method: operations of a step, numbers that are trained beside the student, and kept."""
  source = bench.source(bench.twice if method.two_views else bench.plain)
  optimizer = bench.optimizer(bench.steps(bench.config.epochs), make=method.optimizer)
  item = jax.tree.map(lambda leaf: leaf[0], source.items(0, 1))
  objective = as_objective(objective)

  def begin(key, shared):
    batch = source.cut(shared, item)
    return train.init_state(key, student, objective, optimizer, batch, teacher=teacher)

  state = jax.eval_shape(begin, jax.random.key(0), source.shared)
  step = train.make_step(student, objective, optimizer)
  of_a_step = evaluation.cost.flops_or_none(
    lambda state, teacher, shared: step(state, teacher, source.cut(shared, item)),
    *(state, teacher, source.shared),
  )
  alone = jax.eval_shape(bench.student.init, jax.random.key(0), bench.validation.inputs[0])
  grown = evaluation.cost.parameters(state.params) - evaluation.cost.parameters(alone["params"])
  sizes = {
    name: evaluation.cost.parameters(getattr(state, name))
    for name in ("objective_params", "objective_state", "teacher")
  }
  return {
    "step_flops": of_a_step,
    "trained_beside": grown + sizes["objective_params"],
    "kept": sizes["objective_state"] + sizes["teacher"],
  }


def count(config, options):
  """The costs of labels alone, and of each method."""
  with tempfile.TemporaryDirectory() as folder:
    bench = Untrained(config, methods.Options(pathlib.Path(folder), data_dir=options.data_dir))
  teacher = bench.model(bench.teacher)
  plain = methods.Method(lambda _: recipes.labels(), ())
  rows = {"labels alone": cost(bench, bench.student, None, recipes.labels(), plain)}
  for name in options.methods or methods.METHODS:
    method = methods.METHODS[name]
    student, taught_by, objective = methods.prepared(bench, method, teacher)
    if method.first is not None and name != "factor_transfer":
      objective = method.first()
    rows[name] = cost(bench, student, taught_by, objective, method)
    print(name, rows[name])
  return rows


def main(options: Options) -> None:
  config = methods.Config()
  record = {"config": json.loads(json.dumps(dataclasses.asdict(config))), "methods": {}}
  if options.methods and options.out.exists():  # what was counted before, of the same pair, stays
    before = json.loads(options.out.read_text())
    if before["config"] == record["config"]:
      record = before
  record["methods"] |= count(config, options)
  options.out.parent.mkdir(parents=True, exist_ok=True)
  options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
  main(tyro.cli(Options, description=__doc__))
