"""The sides of `benchmarks/sweep.py`, each run in a process of its own.

A side loads the arrays, the teacher's weights and the order of the batches from one file, trains
its students, measures each on the validation split, and prints one line of JSON. What it imports,
it imports inside, since the clock runs.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time

import numpy as np


@dataclasses.dataclass(frozen=True)
class Task:
  """What every side is asked: the same students, batches and steps."""

  file: str
  network: str
  temperatures: tuple[float, ...]
  soft_weights: tuple[float, ...]
  seeds: tuple[int, ...]
  batch_size: int
  epochs: int
  rate: float
  trained: int = 0
  """How many of the students a side trains that goes one after another; 0 for all."""
  share: tuple[int, int] = (0, 1)
  """Which part of the students this process has: (0, 2) and (1, 2) are the two halves."""
  threads: int = 0
  """PyTorch's; 0 leaves its own choice."""
  at_once: int = 0
  """How many students PyTorch stacks; 0 for all."""
  steps: int = 0
  """How many of the steps the stacked side does, for a trial; 0 for all."""
  device: str = "cpu"
  """PyTorch's; JAX takes its own."""

  def students(self):
    """``(temperature, soft weight, seed)`` of each, evenly taken where not all are trained."""
    every = [(t, w, s) for s in self.seeds for t in self.temperatures for w in self.soft_weights]
    every = every[self.share[0] :: self.share[1]]
    if not self.trained or self.trained >= len(every):
      return every
    return [every[i * len(every) // self.trained] for i in range(self.trained)]


def nested(file):
  """The teacher's variables."""
  variables = {}
  for name in file.files:
    if name.startswith("teacher/"):
      *path, last = name.split("/")[1:]
      node = variables
      for part in path:
        node = node.setdefault(part, {})
      node[last] = file[name]
  return variables


def jax_parts(task):
  """Networks, sources, validation and teacher, for the two sides of this library."""
  from jaxdistill import data, networks, teachers
  from jaxdistill.types import Model

  file = np.load(task.file)
  students = {
    "MLP": lambda: networks.models.MLP(widths=(16,)),
    "ConvNet": lambda: networks.models.ConvNet(channels=(8, 16, 16), strides=(1, 2, 1), dense=64),
  }
  student = networks.linen(students[task.network](), name="student")
  teacher = networks.linen(
    networks.models.ConvNet(channels=(32, 64, 64), strides=(1, 2, 1), dense=256), name="teacher"
  )
  source = data.on_device(
    data.from_arrays(file["images"], file["labels"], name="digits"),
    batch_size=task.batch_size,
    data_seed=task.seeds[0],
    normalize=data.DIGITS,
  )
  validation = data.evaluation_batches(
    data.from_arrays(file["validation_images"], file["validation_labels"], name="digits"),
    batch_size=128,
    normalize=data.DIGITS,
  )
  return student, teachers.frozen(Model(teacher, nested(file))), source, validation


def swept(task):
  """(a) This library's sweep."""
  import gc
  import os

  import jax
  import optax

  from jaxdistill.networks import linen, models  # noqa: F401, see gc
  from jaxdistill.recipes import kd
  from jaxdistill.search import Choice, product, sweep
  from jaxdistill.train import Run

  # As in experiments/temperature.py: a device for each core, and nothing imported is collected.
  jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
  gc.freeze()
  student, teacher, source, validation = jax_parts(task)
  began = time.perf_counter()
  result = sweep(
    student,
    kd(),
    points=product(temperature=task.temperatures, soft_weight=task.soft_weights),
    seeds=task.seeds,
    data=source,
    optimizer=optax.adam(task.rate),
    steps=task.epochs * source.steps_per_epoch,
    choice=Choice(validation),
    teacher=teacher,
    run=Run(progress=None),
  )
  seconds = [time.perf_counter() - began]
  return seconds, [float(value) for row in result.rows for value in row.metrics["accuracy"]]


def alone(task):
  """(b) This library's `train.fit` for one student after another, the teacher in the step."""
  import optax

  from jaxdistill import evaluation, recipes, train

  student, teacher, source, validation = jax_parts(task)
  steps = task.epochs * source.steps_per_epoch
  watch = train.Watch(evaluation.validator(validation), validate_every=steps)
  seconds, accuracies = [], []
  for temperature, soft_weight, seed in task.students():
    began = time.perf_counter()
    fitted = train.fit(
      student,
      recipes.kd(temperature=temperature, soft_weight=soft_weight),
      data=dataclasses.replace(source, data_seed=seed),
      optimizer=optax.adam(task.rate),
      steps=steps,
      seed=seed,
      teacher=teacher,
      watch=watch,
      run=train.Run(progress=None),
    )
    accuracies.append(float(fitted.history[-1]["validation/accuracy"]))
    seconds.append(time.perf_counter() - began)
  return seconds, accuracies


def bare(task):
  """What JAX, Flax and optax take with nothing around them: one function, for students of one seed.

  Compiled with the sweep's options: with JAX's own it takes about a second more.
  """
  import jax
  import jax.numpy as jnp
  import optax

  from jaxdistill import _compile, networks

  began = time.perf_counter()
  file = np.load(task.file)
  teacher = networks.models.ConvNet(channels=(32, 64, 64), strides=(1, 2, 1), dense=256)
  student, optimizer = networks.models.MLP(widths=(16,)), optax.adam(task.rate)
  images, held_out = (file[n].astype(np.float32) / 16 for n in ("images", "validation_images"))
  labels, wanted = (file[n].astype(np.int32) for n in ("labels", "validation_labels"))
  known = jax.jit(teacher.apply, compiler_options=_compile.quick())(nested(file), images)

  def train(arrays, held_out, wanted, order, temperature, weight):
    def loss(variables, rows):
      images, labels, known = (array[rows] for array in arrays)
      logits = student.apply(variables, images)
      hard = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      targets = jax.nn.softmax(known / temperature)
      soft = optax.kl_divergence(jax.nn.log_softmax(logits / temperature), targets)
      return jnp.mean(0.1 * hard + weight * temperature**2 * soft)

    def step(carry, rows):
      variables, state = carry
      updates, state = optimizer.update(jax.grad(loss)(variables, rows), state)
      return (optax.apply_updates(variables, updates), state), None

    variables = student.init(jax.random.key(task.seeds[0]), arrays[0][:1])
    (variables, _), _ = jax.lax.scan(step, (variables, optimizer.init(variables)), order)
    return jnp.mean(jnp.argmax(student.apply(variables, held_out), -1) == wanted)

  temperatures, weights, _ = (np.array(values) for values in zip(*task.students(), strict=True))
  over_students = jax.vmap(train, in_axes=(None, None, None, None, 0, 0))
  given = (images, labels, known), held_out, wanted, file["orders"][0].astype(np.int32)
  compiled = jax.jit(over_students, compiler_options=_compile.brief())
  accuracies = np.asarray(compiled(*given, temperatures, weights))
  return [time.perf_counter() - began], accuracies.tolist()


def pytorch_teacher(variables):
  """The teacher in PyTorch, for images that are turned by half a turn (see `looped`)."""
  import pytorch
  import torch

  module = pytorch.convnet()
  state, weights = module.state_dict(), variables["params"]
  names = [name.removesuffix(".weight") for name in state if name.endswith(".weight")]
  layers = ["convolution1", "convolution2", "convolution3", "dense_layer", "classifier"]
  for name, layer in zip(names, layers, strict=True):
    kernel = weights[layer]["kernel"]
    if kernel.ndim == 4:
      kernel = kernel[::-1, ::-1].transpose(3, 2, 0, 1)
    elif layer == "dense_layer":
      maps = kernel.reshape(4, 4, -1, kernel.shape[-1])
      kernel = maps[::-1, ::-1].transpose(3, 2, 0, 1).reshape(kernel.shape[-1], -1)
    else:
      kernel = kernel.T
    state[f"{name}.weight"] = torch.from_numpy(kernel.copy())
    state[f"{name}.bias"] = torch.from_numpy(weights[layer]["bias"])
  module.load_state_dict(state)
  return module.eval().requires_grad_(False)


@dataclasses.dataclass
class Arrays:
  """What PyTorch's sides read, on their device.

  "SAME" with stride 2 pads an even image after its last row, PyTorch before its first. So its
  images are turned by half a turn, once, and the networks are the same without a layer more.
  """

  inputs: object
  labels: object
  held_out: object
  wanted: object
  orders: object
  """``[seeds, steps, B]``"""
  teacher: object


def pytorch_parts(task):
  """`Arrays` for a PyTorch side."""
  import torch

  if task.threads:
    torch.set_num_threads(task.threads)
  file = np.load(task.file)

  def images(name):
    turned = file[name][:, ::-1, ::-1].transpose(0, 3, 1, 2)
    return torch.from_numpy(turned.astype(np.float32) / 16)

  parts = Arrays(
    inputs=images("images"),
    labels=torch.from_numpy(file["labels"].astype(np.int64)),
    held_out=images("validation_images"),
    wanted=torch.from_numpy(file["validation_labels"].astype(np.int64)),
    orders=torch.from_numpy(file["orders"].astype(np.int64)),
    teacher=pytorch_teacher(nested(file)),
  )
  with torch.no_grad():
    seen = parts.teacher(parts.held_out)
  assert torch.allclose(seen, torch.from_numpy(file["teacher_logits"]), atol=2e-3)
  for field in dataclasses.fields(parts):
    setattr(parts, field.name, getattr(parts, field.name).to(task.device))
  return parts


def pytorch_student(task, seed):
  """A student in PyTorch, on the CPU."""
  import pytorch
  import torch

  torch.manual_seed(seed)
  if task.network == "MLP":
    return pytorch.mlp()
  return pytorch.convnet(channels=(8, 16, 16), dense=64)


def looped(task, precomputed=False):
  """(c) A PyTorch loop, with the teacher on every batch; (d) with its outputs precomputed."""
  import pytorch
  import torch

  parts = pytorch_parts(task)
  with torch.no_grad():
    known = parts.teacher(parts.inputs) if precomputed else None
  seconds, accuracies = [], []
  for temperature, soft_weight, seed in task.students():
    began = time.perf_counter()
    student = pytorch_student(task, seed).to(task.device)
    pytorch.train(
      student,
      parts.inputs,
      parts.labels,
      parts.orders[task.seeds.index(seed)],
      outputs=(lambda _, rows: known[rows])
      if precomputed
      else (lambda images, _: parts.teacher(images)),
      temperature=temperature,
      soft_weight=soft_weight,
      rate=task.rate,
    )
    with torch.no_grad():
      hit = student(parts.held_out).argmax(1) == parts.wanted
      accuracies.append(float(hit.float().mean()))
    seconds.append(time.perf_counter() - began)
  return seconds, accuracies


def stacked(task):
  """(e) PyTorch's own way to have students side by side: their weights stacked, `torch.func.vmap`.

  The teacher's outputs are computed before, the students of a seed share its batches, and Adam,
  which works on each number alone, takes the stacked weights as they are. Written for speed: one
  backward pass of the summed losses is faster than ``vmap(grad)``, and the divergence is written
  out, since PyTorch's own has no rule for vmap and falls back to a loop.
  """
  import torch
  from torch.nn import functional

  began = time.perf_counter()
  parts = pytorch_parts(task)
  with torch.no_grad():
    known = parts.teacher(parts.inputs)
  students, groups = task.students(), len(task.seeds)
  template = pytorch_student(task, 0).to(task.device)

  def forward(weights, images):
    return torch.func.functional_call(template, weights, (images,))

  def loss(weights, images, targets, theirs, temperature, soft_weight):
    ours = forward(weights, images)
    wanted = functional.log_softmax(theirs / temperature, 1)
    apart = wanted - functional.log_softmax(ours / temperature, 1)
    soft = temperature**2 * (wanted.exp() * apart).sum(1).mean()
    return 0.1 * functional.cross_entropy(ours, targets) + soft_weight * soft

  losses = torch.func.vmap(torch.func.vmap(loss, in_dims=(0, None, None, None, 0, 0)))
  every = torch.func.vmap(torch.func.vmap(forward, in_dims=(0, None)), in_dims=(0, None))
  orders = parts.orders[:groups].transpose(0, 1)[: task.steps or None]

  def train(students):
    """Students of all seeds, as many of each; ``[seeds, students of a seed, ...]``."""
    modules = [pytorch_student(task, seed).to(task.device) for _, _, seed in students]
    weights = {
      name: value.detach().unflatten(0, (groups, -1)).clone().requires_grad_()
      for name, value in torch.func.stack_module_state(modules)[0].items()
    }
    temperatures, soft_weights, _ = (
      torch.tensor(values, device=task.device).reshape(groups, -1)
      for values in zip(*students, strict=True)
    )
    optimizer = torch.optim.Adam(weights.values(), lr=task.rate, fused=True)
    for rows in orders:
      batch = parts.inputs[rows], parts.labels[rows], known[rows]
      optimizer.zero_grad()
      losses(weights, *batch, temperatures, soft_weights).sum().backward()
      optimizer.step()
    with torch.no_grad():
      hits = every(weights, parts.held_out).argmax(-1) == parts.wanted
      return hits.float().mean(-1).flatten().tolist()

  by_seed = [[s for s in students if s[2] == seed] for seed in task.seeds]
  width = max(1, (task.at_once or len(students)) // groups)
  accuracies = []
  for first in range(0, len(by_seed[0]), width):
    accuracies += train([s for mine in by_seed for s in mine[first : first + width]])
  return [time.perf_counter() - began], accuracies


def count_compilations():
  """A list that grows by one for each program that XLA compiles from here on."""
  import jax

  found = []

  def note(event, seconds, **_):
    if event.endswith("backend_compile_duration"):
      found.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(note)
  return found


JAX = ("sweep", "alone", "bare")
SIDES = {
  "sweep": swept,
  "alone": alone,
  "bare": bare,
  "pytorch": looped,
  "precomputed": lambda task: looped(task, precomputed=True),
  "stacked": stacked,
}


def main(side, settings):
  read = {name: tuple(v) if isinstance(v, list) else v for name, v in json.loads(settings).items()}
  compiled = count_compilations() if side in JAX else []
  seconds, accuracies = SIDES[side](Task(**read))
  printed = {"seconds": seconds, "accuracy": sum(accuracies) / len(accuracies)}
  print(json.dumps({**printed, "compilations": len(compiled) or None}))


if __name__ == "__main__":
  main(*sys.argv[1:])
