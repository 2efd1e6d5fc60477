"""What a distillation step costs over its floor, in one run.

The floor is one forward pass of the teacher plus one plain cross-entropy step of the student, each
compiled alone. The step is the whole of ours: soft targets at a scheduled temperature, labels, one
matched layer of another width through a projector, the log's sums, and the batch cut from data on
the device. Beside it runs the same step as a plain PyTorch loop has it: the same pair, batch,
projector, terms and optimiser, eager, the images cut from a tensor (extra ``peers``; left out
where PyTorch is not installed). All take turns in short rounds, so that they share whatever the
machine does; the ratios are those of the medians over rounds.

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

from jaxdistill import data, losses, networks, recipes, runs, teachers, train
from jaxdistill.types import Model


@dataclasses.dataclass(frozen=True)
class Options:
  """What to measure."""

  rounds: int = 15
  seconds: float = 0.6
  """How long each side runs in a round."""
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
  """Made-up images of CIFAR's size, on the device."""
  rng = np.random.default_rng(0)
  count = max(512, options.batch_size)
  images = rng.integers(0, 255, (count, 32, 32, 3)).astype(np.uint8)
  examples = data.from_arrays(images, rng.integers(0, 100, count), num_classes=100)
  return data.on_device(examples, batch_size=options.batch_size, data_seed=0, normalize=data.CIFAR)


def sides(teacher, student, objective, options):
  """The floor's two programs and our step, as functions that run one step and wait."""
  source = made_up(options)
  item = jax.tree.map(lambda leaf: leaf[0], source.items(0, 1))
  batch = jax.jit(source.cut)(source.shared, item)
  optimizer = optax.sgd(0.05, momentum=0.9)
  variables = teacher.init(jax.random.key(1), batch.inputs)
  taught = teachers.frozen(Model(teacher, variables))

  forward = jax.jit(lambda v, x: teacher.apply(v, x, train=False, key=None)[0].logits)

  def plain(state, batch):
    params, stats, opt_state = state

    def loss(params):
      outputs, new = student.apply(
        {"params": params, **stats}, batch.inputs, train=True, key=jax.random.key(0)
      )
      return jnp.mean(losses.cross_entropy(outputs.logits, batch.labels)), {**stats, **new}

    (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), stats, opt_state), value

  plain = jax.jit(plain, donate_argnums=0)
  mine = student.init(jax.random.key(0), batch.inputs)
  stats = {name: value for name, value in mine.items() if name != "params"}
  plain_state = [(mine["params"], stats, optimizer.init(mine["params"]))]

  take = train.make_step(student, objective, optimizer)
  dispatch = train.with_jit(train.data_parallel(jax.devices()[:1]))
  ours = dispatch.compile(
    lambda state, t, shared, item: take(state, t, dispatch.constrain(source.cut(shared, item)))
  )
  key = jax.random.key(0)
  ours_state = [train.init_state(key, student, objective, optimizer, batch, teacher=taught)]

  def run_forward():
    jax.block_until_ready(forward(variables, batch.inputs))

  def run_plain():
    plain_state[0], value = plain(plain_state[0], batch)
    jax.block_until_ready(value)

  def run_ours():
    ours_state[0], sums = ours(ours_state[0], taught, source.shared, item)
    jax.block_until_ready(sums)

  sizes = [sum(leaf.size for leaf in jax.tree.leaves(v["params"])) for v in (variables, mine)]
  functions = {"teacher forward": run_forward, "plain step": run_plain}
  return {**functions, "distillation step": run_ours}, sizes


class Chunk:
  """Many of our steps in one dispatch, as `jaxdistill.train.fit` makes them; waits for the last."""

  def __init__(self, teacher, student, objective, options, steps):
    source = made_up(options)
    head = jax.tree.map(lambda leaf: leaf[0], source.items(0, 1))
    batch = jax.jit(source.cut)(source.shared, head)
    variables = jax.jit(teacher.init)(jax.random.key(1), batch.inputs)
    dispatch = train.with_jit(train.data_parallel(jax.devices()[:1]))
    self.steps, self._at = steps, 0
    plan = train.Plan.of(
      student,
      objective,
      data=source,
      optimizer=optax.sgd(0.05, momentum=0.9),
      steps=steps,
      teacher=teachers.frozen(Model(teacher, variables)),
    )
    self._program = train.Program(plan, dispatch)
    self._state = dispatch.spread(self._program.initial())

  def __call__(self):
    """Runs the next chunk."""
    self._state, sums = self._program.run(self._state, self._at, self.steps)
    self._at += self.steps
    jax.block_until_ready(sums)


def peer(pair, sizes, options):
  """The same step in PyTorch, as a function that runs it once."""
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

  def run():
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

  return run


def measure(functions, options):
  """Median seconds of each function over rounds in which they take turns."""
  counts = {}
  for name, function in functions.items():
    function()
    begin = time.perf_counter()
    function()
    counts[name] = max(1, round(options.seconds / (time.perf_counter() - begin)))
  rounds = {name: [] for name in functions}
  for _ in range(options.rounds):
    for name, function in functions.items():
      begin = time.perf_counter()
      for _ in range(counts[name]):
        function()
      rounds[name].append((time.perf_counter() - begin) / counts[name])
  return {name: float(np.median(values)) for name, values in rounds.items()}


def main(options: Options) -> None:
  both = importlib.util.find_spec("torch") is not None
  if not both:
    print("PyTorch is not installed: its side is left out (pip install 'jaxdistill[peers]').")
  results = {}
  for name, (teacher, student, layer, pair) in pairs().items():
    soft = recipes.kd(temperature=optax.linear_schedule(4.0, 2.0, 1000))
    objective = recipes.combine(soft, recipes.hint(layer, layer))
    functions, sizes = sides(teacher, student, objective, options)
    if both:
      functions["PyTorch step"] = peer(pair, sizes, options)
    seconds = measure(functions, options)
    floor = seconds["teacher forward"] + seconds["plain step"]
    results[name] = {side: 1e3 * value for side, value in seconds.items()}
    results[name] |= {"floor": 1e3 * floor, "over the floor": seconds["distillation step"] / floor}
    if both:
      results[name]["PyTorch over ours"] = seconds["PyTorch step"] / seconds["distillation step"]
    print(name)
    for side, value in results[name].items():
      print(f"  {side:<20} {value:9.3f}" + ("" if "over" in side else " ms"))
  options.out.parent.mkdir(parents=True, exist_ok=True)
  written = {"environment": runs.environment(), "batch_size": options.batch_size}
  written["load"] = os.getloadavg()
  if both:
    written["torch"] = importlib.metadata.version("torch")
  options.out.write_text(json.dumps({**written, "milliseconds": results}, indent=2) + "\n")
  if both:
    least = min(result["PyTorch over ours"] for result in results.values())
    print(f"ratio of the PyTorch step to ours, the lesser pair: {least:.3f}")
  most = max(result["over the floor"] for result in results.values())
  print(f"ratio of ours to the floor, the greater pair: {most:.3f}")


if __name__ == "__main__":
  import tyro  # here, so that benchmarks/accelerator.py can do without it

  main(tyro.cli(Options))
