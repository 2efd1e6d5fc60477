"""What `jaxdistill.fit` costs over the same training written by hand, in one run.

The floor is one program, written by hand below: the batch cut from data on the device, shifted,
flipped and normalised (`Source.cut`), the teacher's forward pass, the student's forward and
backward pass, soft targets at a scheduled temperature, labels and one matched layer through a
projector, and the optimiser, compiled with `fit`'s options. `fit` is timed as it is used, its log,
its checks and its dispatch included: it validates after every chunk, and that is where the others
take their turns. Beside it runs the same step as a plain PyTorch loop has it, eager, the images cut
from a tensor (extra ``peers``; left out where PyTorch is not installed). The ratios are medians
over rounds of one side's time over the other's in the same round, with their quartiles.

Command:   python benchmarks/step.py            (results: benchmarks/results/step.json)
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdistill import _compile, data, networks, recipes, runs, teachers, train
from jaxdistill.recipes import projectors
from jaxdistill.types import Model

TEMPERATURE = optax.linear_schedule(4.0, 2.0, 1000)
LIMIT = 1.03


@dataclasses.dataclass(frozen=True)
class Options:
  """What to measure."""

  rounds: int = 15
  steps: int = 12
  """Steps of each side in a round; a chunk of `fit`."""
  batch_size: int = 64
  out: pathlib.Path = pathlib.Path(__file__).parent / "results" / "step.json"


def pairs():
  """A small convolutional pair and a small attention pair, at CIFAR's size, widths differing."""
  vit = {"patch_size": 4, "num_classes": 100}
  return {
    "convolutional (ResNet-20 to ResNet-8, half as wide)": (
      networks.linen(networks.models.ResNet(depth=20, num_classes=100), features=["stage3"]),
      networks.linen(
        networks.models.ResNet(depth=8, num_classes=100, width=(8, 8, 16, 32)), features=["stage3"]
      ),
      "stage3",
      "resnets",
    ),
    "attention (ViT width 128, depth 4 to width 64, depth 2)": (
      networks.linen(
        networks.models.VisionTransformer(width=128, depth=4, num_heads=4, **vit),
        features=["pooled"],
      ),
      networks.linen(
        networks.models.VisionTransformer(width=64, depth=2, num_heads=2, **vit),
        features=["pooled"],
      ),
      "pooled",
      "transformers",
    ),
  }


def made_up(options):
  """Made-up images of CIFAR's size, on the device, with CIFAR's augmentation."""
  rng = np.random.default_rng(0)
  count = max(512, options.batch_size)
  images = rng.integers(0, 255, (count, 32, 32, 3)).astype(np.uint8)
  examples = data.from_arrays(images, rng.integers(0, 100, count), num_classes=100)
  return data.on_device(
    examples,
    batch_size=options.batch_size,
    data_seed=0,
    normalize=data.CIFAR,
    augmentation=data.crop_flip(4),
  )


def optimizer():
  """What both sides train with."""
  return optax.sgd(0.05, momentum=0.9)


class ByHand:
  """The floor: a distillation as one writes it who needs this one alone; a call is a round."""

  def __init__(self, teacher, student, layer, source, variables, options, *, loop):
    self.options, self.source, self.at, self.loop = options, source, 0, loop
    self.variables = variables
    update = optimizer().update
    batch = jax.jit(source.cut)(source.shared, self._items(0, 1, 0))
    theirs, _ = teacher.apply(variables, batch.inputs, train=False, key=None)
    mine = student.init(jax.random.key(0), batch.inputs)
    params, stats = {"student": mine.pop("params")}, {"student": mine}
    projector = None
    if layer is not None:
      ours, _ = student.apply(
        {"params": params["student"], **mine}, batch.inputs, train=False, key=None
      )
      projector = projectors.between(ours.features[layer], theirs.features[layer])
      made = dict(projector.init(jax.random.key(1), ours.features[layer], train=True))
      params["projector"], stats["projector"] = made.pop("params"), made
    self.state = (0, params, stats, optimizer().init(params))

    def loss(params, stats, target, batch, temperature):
      outputs, new = student.apply(
        {"params": params["student"], **stats["student"]},
        batch.inputs,
        train=True,
        key=jax.random.key(0),
      )
      stats = {**stats, "student": {**stats["student"], **new}}
      log_q = jax.nn.log_softmax(outputs.logits / temperature)
      log_p = jax.nn.log_softmax(target.logits / temperature)
      soft = temperature**2 * jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))
      hard = optax.softmax_cross_entropy_with_integer_labels(outputs.logits, batch.labels)
      value = 0.9 * soft + 0.1 * jnp.mean(hard)
      if projector is not None:
        moved, new = projector.apply(
          {"params": params["projector"], **stats["projector"]},
          outputs.features[layer],
          train=True,
          mutable=list(stats["projector"]),
        )
        value = value + jnp.mean((moved - target.features[layer]) ** 2)
        stats = {**stats, "projector": dict(new)}
      return value, stats

    def step(state, variables, shared, item):
      at, params, stats, opt_state = state
      batch = source.cut(shared, item)
      target, _ = teacher.apply(variables, batch.inputs, train=False, key=None)
      temperature = TEMPERATURE(at)
      (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(
        params, stats, target, batch, temperature
      )
      updates, opt_state = update(grads, opt_state, params)
      return (at + 1, optax.apply_updates(params, updates), stats, opt_state), value

    def chunk(state, variables, shared, items):
      return jax.lax.scan(lambda now, item: step(now, variables, shared, item), state, items)

    # With the compiler's options of `fit`, which are worth a fifth to a residual network on a CPU.
    self.program = jax.jit(
      chunk if loop else step, donate_argnums=0, compiler_options=_compile.long()
    )

  def _items(self, at, count, index=None):
    items = self.source.items(at, count)
    return items if index is None else jax.tree.map(lambda leaf: leaf[index], items)

  def __call__(self):
    """As many steps as a chunk has; waits for the last."""
    steps, given = self.options.steps, (self.variables, self.source.shared)
    items = self._items(self.at, steps)
    if self.loop:
      self.state, value = self.program(self.state, *given, items)
    else:
      for i in range(steps):
        item = jax.tree.map(lambda leaf, i=i: leaf[i], items)
        self.state, value = self.program(self.state, *given, item)
    self.at += steps
    jax.block_until_ready((self.state, value))


def peer(pair, sizes, options):
  """The same step in PyTorch, as a function that runs a round of it."""
  import pytorch
  import torch
  from torch import nn
  from torch.nn import functional

  if pair == "resnets":
    teacher, student = pytorch.ResNet(20), pytorch.ResNet(8, width=(8, 8, 16, 32))
    projector = nn.Sequential(nn.Conv2d(32, 64, 1), nn.BatchNorm2d(64), nn.ReLU())
  else:
    teacher, student = (pytorch.VisionTransformer(*size) for size in ((128, 4, 4), (64, 2, 2)))
    projector = nn.Linear(64, 128)
  assert [pytorch.count(teacher), pytorch.count(student)] == sizes, "the networks are not the same"
  teacher.eval().requires_grad_(False)
  optimizer = torch.optim.SGD(
    [*student.parameters(), *projector.parameters()], lr=0.05, momentum=0.9
  )
  random = torch.Generator().manual_seed(0)
  images = torch.randint(0, 255, (512, 3, 32, 32), dtype=torch.uint8, generator=random)
  labels = torch.randint(0, 100, (512,), generator=random)
  mean, std = (255 * torch.tensor(value).view(1, 3, 1, 1) for value in data.CIFAR)
  rows = torch.randperm(512, generator=random)[: options.batch_size]
  steps = [0]

  def step():
    temperature = 4.0 - 2.0 * min(steps[0], 1000) / 1000
    steps[0] += 1
    inputs, targets = (images[rows].float() - mean) / std, labels[rows]
    with torch.no_grad():
      theirs, their_feature = teacher(inputs)
    ours, feature = student(inputs)
    loss = 0.1 * functional.cross_entropy(ours, targets)
    loss = loss + 0.9 * pytorch.soft_targets(ours, theirs, temperature)
    loss = loss + functional.mse_loss(projector(feature), their_feature)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

  def run():
    for _ in range(options.steps):
      step()

  return run


def compare(teacher, student, layer, options, others=lambda sizes: {}):
  """Seconds of a step of each side, round by round: `fit`, by hand, and what `others` makes.

  And the seconds of `fit` up to the end of its first chunk, in which it is traced and compiled.
  ``layer`` is the matched one, or None; ``others`` takes the numbers of parameters.
  """
  source = made_up(options)
  head = source.cut(source.shared, jax.tree.map(lambda leaf: leaf[0], source.items(0, 1)))
  variables = jax.jit(teacher.init)(jax.random.key(1), head.inputs)
  mine = jax.eval_shape(student.init, jax.random.key(0), head.inputs)
  sizes = [sum(leaf.size for leaf in jax.tree.leaves(v["params"])) for v in (variables, mine)]
  on_cpu = jax.default_backend() == "cpu"  # as `fit` decides
  loop = not on_cpu or train.students_by(student, head.inputs) == "vmap"
  by_hand = ByHand(teacher, student, layer, source, variables, options, loop=loop)
  sides = {"by hand": by_hand, **others(sizes)}
  rounds = {name: [] for name in ("fit", *sides)}
  began, first = [], []

  def turns(model):
    del model
    now = time.perf_counter()
    if began:  # the first round of each side compiles
      rounds["fit"].append((now - began[-1]) / options.steps)
    for name, run in sides.items():
      start = time.perf_counter()
      run()
      if began:
        rounds[name].append((time.perf_counter() - start) / options.steps)
    began.append(time.perf_counter())
    first.append(now)
    return {}

  objective = recipes.kd(temperature=TEMPERATURE)
  if layer is not None:
    objective = recipes.combine(objective, recipes.hint(layer, layer))
  start = time.perf_counter()
  train.fit(
    student,
    objective,
    data=source,
    optimizer=optimizer(),
    steps=options.steps * (options.rounds + 1),
    teacher=teachers.frozen(Model(teacher, variables)),
    dispatch=train.with_jit(train.data_parallel(jax.devices()[:1])),
    watch=train.Watch(turns, validate_every=options.steps, log_every=options.steps),
    run=train.Run(progress=None),
  )
  return {name: np.array(seconds) for name, seconds in rounds.items()}, first[0] - start


def ratio(rounds, one, other):
  """One side's time over another's: the median over rounds, and the quartiles."""
  each = rounds[one] / rounds[other]
  return {
    "median": float(np.median(each)),
    "quartiles": [float(q) for q in np.quantile(each, (0.25, 0.75))],
  }


def main(options: Options) -> None:
  both = importlib.util.find_spec("torch") is not None
  if not both:
    print("PyTorch is not installed: its side is left out (pip install 'jaxdistill[peers]').")
  results = {}
  for name, (teacher, student, layer, pair) in pairs().items():
    others = (lambda sizes, pair=pair: {"PyTorch": peer(pair, sizes, options)}) if both else None
    rounds, _ = compare(teacher, student, layer, options, *([others] if others else []))
    results[name] = {
      "milliseconds": {side: 1e3 * float(np.median(found)) for side, found in rounds.items()},
      "fit over by hand": ratio(rounds, "fit", "by hand"),
    }
    if both:
      results[name]["PyTorch over fit"] = ratio(rounds, "PyTorch", "fit")
    print(name)
    for side, value in results[name]["milliseconds"].items():
      print(f"  {side:<20} {value:9.3f} ms a step")
    for side in ("fit over by hand", "PyTorch over fit")[: 1 + both]:
      low, high = results[name][side]["quartiles"]
      print(f"  {side:<20} {results[name][side]['median']:9.3f}  ({low:.3f} to {high:.3f})")
  options.out.parent.mkdir(parents=True, exist_ok=True)
  written = {"environment": runs.environment(), "batch_size": options.batch_size}
  written["load"] = os.getloadavg()
  if both:
    written["torch"] = importlib.metadata.version("torch")
  options.out.write_text(json.dumps({**written, "pairs": results}, indent=2) + "\n")
  most = max(result["fit over by hand"]["median"] for result in results.values())
  print(f"ratio of fit to the floor, the greater pair: {most:.3f} (limit {LIMIT})")
  if most > LIMIT:
    raise SystemExit(f"fit is {most:.3f} times the floor, and the limit is {LIMIT}.")


if __name__ == "__main__":
  import tyro  # here, so that benchmarks/accelerator.py can do without it

  main(tyro.cli(Options))
