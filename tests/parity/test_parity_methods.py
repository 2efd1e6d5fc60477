"""Recipes and optimisers beside their published code, with every parameter that they train."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import published
from beside import TOLERANCE, check, close, first, numbers, torch
from jaxdistill import losses, recipes
from jaxdistill.train import optimizers
from jaxdistill.train._step import _moved
from jaxdistill.types import Model, Network, Outputs, make_batch
from test_parity_logits import integers, logits

pytestmark = pytest.mark.parity
functional = torch.nn.functional
KEY = jax.random.key(0)
B = 4


def total(objective, student, teacher, labels=None, params=(), state=()):
  """What a step would take the gradient of."""
  batch = make_batch(jnp.zeros((B, 1)), None if labels is None else jnp.asarray(labels))
  given = (dict(params), dict(state), student, teacher, batch)
  terms = objective.apply(*given, key=KEY, **objective.hyper)[0]
  return sum(term.weight * jnp.mean(term.values) for term in terms.values())


def test_cross_view():
  weak, strong = logits(1, 12, 5), logits(2, 12, 5)
  views = (weak[0], strong[0], weak[1], strong[1])
  bounds = (0.7, 0.5)
  for teacher, bound in zip(views[2:], bounds, strict=True):
    sure = np.exp(teacher).max(1) / np.exp(teacher).sum(1) >= bound
    assert 0 < sure.sum() < len(sure)
  check(
    lambda *x: losses.cross_view_kd(*x, weak_threshold=bounds[0], strong_threshold=bounds[1]),
    lambda *x: published.cross_view(*x, 4.0, bounds),
    *views,
    frozen=(2, 3),
    alone=True,
  )


@pytest.mark.parametrize(("focus", "positive_share"), [(2.0, 0.25), (0.5, 0.6)])
def test_focal(focus, positive_share):
  labels = np.random.default_rng(3).integers(0, 2, (5, 6))
  options = {"focus": focus, "positive_share": positive_share}
  check(
    lambda z, y: losses.binary_focal(z, y, **options),
    lambda z, y: published.focal(z, y, **options),
    numbers(4, 5, 6, scale=3.0),
    labels,
    alone=True,
  )


@pytest.mark.parametrize("members", [2, 3])
def test_mutual_learning(members):
  def ours(labels, *each):
    cohort = {str(i): Outputs(z, {}) for i, z in enumerate(each)}
    student = Outputs(each[0], {}, members=cohort)
    return total(recipes.dml(), student, None, labels)

  each = [numbers(5 + i, B, 3) for i in range(members)]
  check(ours, lambda y, *z: published.mutual(z, y), integers(9, B, 3), *each)


def test_learning_without_data():
  weight = numbers(10, 6, 3)

  def asked(variables, images, *, train, key):
    return Outputs(images @ variables["weight"], {"pooled": jnp.tanh(images)}), {}

  def ours(student, images):
    teacher = Model(Network(init=None, apply=asked), {"weight": jnp.asarray(weight)})
    objective = recipes.dafl(teacher, Network(init=None, apply=asked))
    state = {"teacher": teacher.variables}
    return total(objective, Outputs(student, {"images": images}), None, state=state)

  def theirs(student, images):
    return published.without_data(student, images @ torch.tensor(weight), images.tanh())

  check(ours, theirs, numbers(11, B, 3), numbers(12, B, 6))


@pytest.mark.parametrize("masked", ["channels", "positions"])
def test_masked_generation(masked):
  objective = recipes.mgd(masked=masked, masked_share=0.4, mgd_weight=1.0, hard_weight=None)
  names = ("align", "conv1", "conv2")
  shapes = ((1, 1, 3, 5), (5,), (3, 3, 5, 5), (5,), (3, 3, 5, 5), (5,))
  with jax.enable_x64(True):
    shape = (1, 1, 5) if masked == "channels" else (4, 4, 1)
    # An example's index is its place in the batch here.
    keys = [jax.random.fold_in(jax.random.fold_in(KEY, i), 0) for i in range(B)]
    keep = np.stack([np.asarray(jax.random.uniform(key, shape)) >= 0.4 for key in keys])
  assert 0 < keep.mean() < 1

  def ours(student, teacher, *leaves):
    layers = zip(names, leaves[::2], leaves[1::2], strict=True)
    params = {"generation": {n: {"kernel": k, "bias": b} for n, k, b in layers}}
    outputs = (Outputs(jnp.zeros((B, 3)), {"stage3": x}) for x in (student, teacher))
    return total(objective, *outputs, params=params)

  def theirs(student, teacher, *leaves):
    layers = zip(leaves[::2], leaves[1::2], strict=True)
    return published.generated(first(student), first(teacher), first(torch.tensor(keep)), *layers)

  check(
    ours,
    theirs,
    numbers(13, B, 4, 4, 3),
    numbers(14, B, 4, 4, 5),
    *(numbers(15 + i, *s, scale=0.3) for i, s in enumerate(shapes)),
  )


@pytest.mark.parametrize(("width", "wanted"), [(5, 8), (8, 5), (6, 6)])
def test_an_orthogonal_projector_in_its_codes_coordinates(width, wanted):
  """VkD's projector is PyTorch's parametrisation, of other coordinates than the kernel of ours.

  Every step of these is one along orthogonal matrices, of which either kernel's gradient knows all:
  taken back through PyTorch's own map, ours is the gradient of its coordinates.
  """
  made = torch.nn.utils.parametrizations.orthogonal(
    torch.nn.Linear(width, wanted, bias=False, dtype=torch.float64)
  )
  (coordinates,) = made.parameters()
  with torch.no_grad():  # off the place where they begin; the diagonal has the columns' signs
    coordinates += torch.tensor(numbers(31, *coordinates.shape, scale=0.3)).fill_diagonal_(0)
  student, teacher = numbers(32, B, width), numbers(33, B, wanted)
  given = torch.tensor(student, requires_grad=True)
  normalized = torch.nn.functional.layer_norm(torch.tensor(teacher), (wanted,))
  theirs = torch.nn.functional.smooth_l1_loss(made(given), normalized)
  to_given, to_coordinates = torch.autograd.grad(theirs, (given, coordinates))
  objective = recipes.vkd(soft_weight=None, hard_weight=None)
  tall = wanted > width  # ours takes a square one by its columns

  def ours(student, kernel):
    outputs = (Outputs(jnp.zeros((B, 3)), {"pooled": x}) for x in (student, jnp.asarray(teacher)))
    return total(objective, *outputs, params={"projector": {"kernel": kernel}})

  with jax.enable_x64(True):
    kernel = made.weight.detach().numpy()
    value, (to_student, to_kernel) = jax.value_and_grad(ours, (0, 1))(
      jnp.asarray(student), jnp.asarray(kernel if tall else kernel.T)
    )
  to_weight = torch.tensor(np.asarray(to_kernel if tall else to_kernel.T))
  (taken_back,) = torch.autograd.grad(made.weight, coordinates, to_weight)
  close(value, theirs.detach())
  close(to_student, to_given, "the student's gradient")
  close(taken_back, to_coordinates, "the projector's gradient")


def test_softmax_regression_through_its_connector():
  head = {"kernel": numbers(21, 5, 3), "bias": numbers(22, 3)}
  objective = recipes.srrl(head, hard_weight=None)

  def ours(student, teacher, told, kernel, scale, bias):
    outputs = [
      Outputs(z, {"stage3": x}) for z, x in ((jnp.zeros((B, 3)), student), (told, teacher))
    ]
    _, state = objective.init(KEY, *outputs)
    params = {"connector": {"conv": {"kernel": kernel}, "norm": {"scale": scale, "bias": bias}}}
    return total(objective, *outputs, params=params, state=state)

  def theirs(student, teacher, told, kernel, scale, bias):
    features = published.connected(first(student), kernel, scale, bias).mean((2, 3))
    said = features @ torch.tensor(head["kernel"]) + torch.tensor(head["bias"])
    weights = (objective.hyper[f"{name}_weight"] for name in ("feature", "regression"))
    taught = first(teacher).mean((2, 3))
    return published.softmax_regression(features, taught, said, told, *weights)

  check(
    ours,
    theirs,
    numbers(23, B, 4, 4, 2),
    numbers(24, B, 4, 4, 5),
    numbers(25, B, 3),
    numbers(26, 1, 1, 2, 5),
    numbers(27, 5),
    numbers(28, 5),
  )


def test_function_consistency():
  taught = {"stage2": numbers(51, 3, 4), "logits": numbers(52, 4, 3)}

  def rest(variables, maps, *, train, key):
    upper = jnp.tanh(maps @ variables["stage2"])
    return Outputs(jnp.mean(upper, (1, 2)) @ variables["logits"], {"stage2": upper}), {}

  layers = ("stage1", "stage2")
  tails = {"stage1": Network(init=None, apply=rest)}
  objective = recipes.fcfd(tails, taught, student_layers=layers, warmup_steps=0, hard_weight=None)

  def ours(told, said, *arrays):
    maps, leaves = arrays[:4], arrays[4:]
    student, teacher = (
      Outputs(z, dict(zip(layers, x, strict=True))) for z, x in ((said, maps[:2]), (told, maps[2:]))
    )
    _, state = objective.init(KEY, student, teacher)
    params = {
      f"bridge{i}": {"conv": {"kernel": k}, "norm": {"scale": a, "bias": b}}
      for i, (k, a, b) in enumerate((leaves[:3], leaves[3:]))
    }
    return total(objective, student, teacher, params=params, state=state)

  def theirs(told, said, *arrays):
    maps = [first(x) for x in arrays[:4]]
    kept = {name: torch.tensor(x) for name, x in taught.items()}
    bridged = [
      published.connected(x, *leaves, slope=0.1)
      for x, leaves in zip(maps[:2], (arrays[4:7], arrays[7:]), strict=True)
    ]
    upper = torch.einsum("bchw,cd->bdhw", bridged[0], kept["stage2"]).tanh()
    mixed = upper.mean((2, 3)) @ kept["logits"]
    apart = published.function_consistent((bridged[0],), (bridged[1], upper), *maps[2:])
    soft = sum(published.softened(z, told, 4.0).mean() for z in (said, mixed))
    return soft + 5 * apart

  check(
    ours,
    theirs,
    *(numbers(53 + i, B, 3) for i in range(2)),
    *(numbers(55 + i, B, 4, 4, width) for i, width in enumerate((2, 2, 3, 4))),
    *(numbers(60, 3, 3, 2, 3), numbers(61, 3), numbers(62, 3)),
    *(numbers(63, 3, 3, 2, 4), numbers(64, 4), numbers(65, 4)),
  )


def test_function_consistency_back():
  """The student's later stage, of BatchNorm by the mixed batch, on the teacher's bridged map."""

  def rest(variables, maps, *, train, key):
    x = maps @ variables["kernel"]
    if train:
      over = {"axis": (0, 1, 2), "keepdims": True}
      x = (x - jnp.mean(x, **over)) / jnp.sqrt(jnp.var(x, **over) + 1e-5)
    x = nn.relu(x)
    return Outputs(jnp.mean(x, (1, 2)) @ variables["head"], {"stage2": x}), {}

  layers = ("stage1", "stage2")
  objective = recipes.fcfd_back({"stage1": Network(init=None, apply=rest)}, student_layers=layers)

  def ours(told, maps, kernel, head, conv, scale, bias):
    upper = jnp.zeros((*maps.shape[:3], kernel.shape[1]))
    own = dict(zip(layers, (jnp.zeros((*maps.shape[:3], kernel.shape[0])), upper), strict=True))
    variables = {"kernel": kernel, "head": head}
    student = Outputs(jnp.zeros_like(told), own, variables=variables)
    teacher = Outputs(told, dict(zip(layers, (maps, upper), strict=True)))
    _, state = objective.init(KEY, student, teacher)
    params = {"bridge0": {"conv": {"kernel": conv}, "norm": {"scale": scale, "bias": bias}}}
    return total(objective, student, teacher, params=params, state=state)

  def theirs(told, maps, kernel, head, *bridge):
    x = published.connected(first(maps), *bridge, slope=0.1)
    x = torch.einsum("bchw,cd->bdhw", x, kernel)
    x = functional.batch_norm(x, None, None, training=True).relu()
    return published.softened(x.mean((2, 3)) @ head, told, 4.0).mean()

  sizes = ((B, 3), (B, 4, 4, 5), (2, 4), (4, 3), (3, 3, 5, 2), (2,), (2,))
  check(ours, theirs, *(numbers(70 + i, *size) for i, size in enumerate(sizes)))


@pytest.mark.parametrize("reached", ["both", "labels", "distilled"])
def test_two_momenta(reached):
  steps, options = 5, {"momentum": 0.9, "delta": 0.075, "weight_decay": 0.01}
  begun = numbers(30, 3)
  terms = ("labels", "distilled")
  gradients = [
    [numbers(31 + 2 * t + i, 3) if reached in ("both", terms[i]) else None for i in range(2)]
    for t in range(steps)
  ]
  with jax.enable_x64(True):
    optimizer = optimizers.dot(0.1, steps=steps, milestones=(), **options)
    weights = jnp.asarray(begun)
    state = optimizer.init(weights)
    for pair in gradients:
      own = [jnp.zeros(3) if g is None else jnp.asarray(g) for g in pair]
      moved, state = optimizer.update(sum(own), state, weights, gradients=own)
      weights = weights + moved
    weights = np.asarray(weights)
  close(weights, published.two_momenta(begun, gradients, 0.1, **options))


def test_a_moving_average():
  # As published: the global step is counted before the teacher moves.
  begun, *students = (numbers(40 + i, 3) for i in range(8))
  theirs = torch.tensor(begun)
  with jax.enable_x64(True):
    ours = jnp.asarray(begun)
    for step, student in enumerate(students):
      ours = _moved(ours, jnp.asarray(student), jnp.asarray(step), 0.75, settled=2)
      alpha = min(1 - 1 / (step + 1 + 1), 0.75)
      theirs = torch.lerp(torch.tensor(student), theirs, alpha)
    # The share is a float32, of 24 bits, and TOLERANCE asks for 33.
    assert TOLERANCE < 2**-24
    np.testing.assert_allclose(np.asarray(ours), theirs.numpy(), rtol=0, atol=8 * 2**-24)
