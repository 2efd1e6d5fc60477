"""What a distillation step costs over its floor, in one run.

The floor is one forward pass of the teacher plus one plain cross-entropy step of the student, each
compiled alone. The step is the whole of ours: soft targets at a scheduled temperature, labels, one
matched layer of another width through a projector, the log's sums, and the batch cut from data on
the device. The three take turns in short rounds, so that they share whatever the machine does; the
ratio is that of the medians over rounds.

Command:   python benchmarks/step.py            (results: benchmarks/results/step.json)
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from jaxdistill import capture, data, losses, mesh, models, recipes, report, step, teachers
from jaxdistill.state import init_state


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
      capture.linen(models.ResNet(depth=20, num_classes=100), features=["stage3"]),
      capture.linen(
        models.ResNet(depth=8, num_classes=100, width=(8, 8, 16, 32)), features=["stage3"]
      ),
      "stage3",
    ),
    "attention (ViT width 128, depth 4 to width 64, depth 2)": (
      capture.linen(
        models.VisionTransformer(width=128, depth=4, num_heads=4, **vit), features=["pooled"]
      ),
      capture.linen(
        models.VisionTransformer(width=64, depth=2, num_heads=2, **vit), features=["pooled"]
      ),
      "pooled",
    ),
  }


def sides(teacher, student, layer, options):
  """The floor's two programs and our step, as functions that run one step and wait."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 255, (512, 32, 32, 3)).astype(np.uint8)
  examples = data.from_arrays(images, rng.integers(0, 100, 512), num_classes=100)
  source = data.on_device(
    examples, batch_size=options.batch_size, data_seed=0, normalize=data.CIFAR
  )
  item = jax.tree.map(lambda leaf: leaf[0], source.items(0, 1))
  batch = jax.jit(source.cut)(source.shared, item)
  optimizer = optax.sgd(0.05, momentum=0.9)
  variables = teacher.init(jax.random.key(1), batch.inputs)
  teach = teachers.frozen(teacher)

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

  objective = recipes.combine(recipes.kd(), recipes.hint(layer, layer))
  hyper = {"temperature": optax.linear_schedule(4.0, 2.0, 1000)}
  take = step.make_step(student, teach, objective, optimizer, hyper=hyper)
  dispatch = mesh.with_jit(mesh.data_parallel(jax.devices()[:1]))
  ours = dispatch.compile(
    lambda state, v, shared, item: take(state, v, dispatch.constrain(source.cut(shared, item)))
  )
  ours_state = [
    init_state(
      jax.random.key(0),
      student,
      objective,
      optimizer,
      batch,
      teacher=teach,
      teacher_variables=variables,
    )
  ]

  def run_forward():
    jax.block_until_ready(forward(variables, batch.inputs))

  def run_plain():
    plain_state[0], value = plain(plain_state[0], batch)
    jax.block_until_ready(value)

  def run_ours():
    ours_state[0], sums = ours(ours_state[0], variables, source.shared, item)
    jax.block_until_ready(sums)

  return {"teacher forward": run_forward, "plain step": run_plain, "distillation step": run_ours}


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
  results = {}
  for name, (teacher, student, layer) in pairs().items():
    seconds = measure(sides(teacher, student, layer, options), options)
    floor = seconds["teacher forward"] + seconds["plain step"]
    results[name] = {
      **{side: 1e3 * value for side, value in seconds.items()},
      "floor": 1e3 * floor,
      "ratio": seconds["distillation step"] / floor,
    }
    print(name)
    for side, value in results[name].items():
      print(f"  {side:<20} {value:9.3f}" + ("" if side == "ratio" else " ms"))
  options.out.parent.mkdir(parents=True, exist_ok=True)
  written = {"environment": report.environment(), "batch_size": options.batch_size}
  options.out.write_text(json.dumps({**written, "milliseconds": results}, indent=2) + "\n")
  print(f"ratio {max(result['ratio'] for result in results.values()):.3f}")


if __name__ == "__main__":
  main(tyro.cli(Options))
