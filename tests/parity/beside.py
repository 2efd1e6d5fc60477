"""Puts one of our losses beside a published one: value and every gradient, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

REASON = "no PyTorch or torchdistill here: CONTRIBUTING.md has the command that makes their place"
torch = pytest.importorskip("torch", reason=REASON)
torchdistill = pytest.importorskip("torchdistill.losses.mid_level", reason=REASON)
torch.set_num_threads(1)

# Both sides sum the same few thousand float64 numbers (53 bits) in other orders.
TOLERANCE = 1e-10
# How torchdistill is told which module's output a loss reads.
PATHS = {
  "student_module_path": "m",
  "student_module_io": "output",
  "teacher_module_path": "m",
  "teacher_module_io": "output",
}
PAIR = {
  "pair": {
    "student": {"path": "m", "io": "output"},
    "teacher": {"path": "m", "io": "output"},
  }
}
OUTPUTS = {"student_output_path": "m", "teacher_output_path": "m", "reduction": "batchmean"}


def numbers(seed, *shape, scale=1.0):
  return scale * np.random.default_rng(seed).normal(size=shape)


def first(x):
  """Channels-last to channels-first."""
  return x.movedim(-1, 1)


def called(criterion):
  """A torchdistill loss as a function of the two networks' outputs."""

  def call(student, teacher, *labels):
    return criterion({"m": {"output": student}}, {"m": {"output": teacher}}, *labels)

  return call


def close(ours, theirs, what="value"):
  """Equal to 1e-10 of the largest entry (values are the only entry there is)."""
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  assert ours.dtype == theirs.dtype == np.float64, (what, ours.dtype, theirs.dtype)
  assert np.isfinite(theirs).all(), (
    f"the published {what} is not finite: a disagreement to write down"
  )
  # The floor is for the zeros at equal inputs.
  atol = max(TOLERANCE * np.abs(theirs).max(initial=0), 1e-14)
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol, err_msg=what)


@functools.cache
def compiled(loss, floats):
  def mean(*arrays):
    values = loss(*arrays)
    return jnp.mean(values), values

  return jax.jit(jax.value_and_grad(mean, argnums=floats, has_aux=True))


def evaluate_ours(loss, *inputs):
  """(values, gradients of their mean to the inputs that are floats), as NumPy arrays."""
  with jax.enable_x64(True):
    floats = tuple(i for i, x in enumerate(inputs) if np.issubdtype(x.dtype, np.floating))
    (_, values), gradients = compiled(loss, floats)(*(jnp.asarray(x) for x in inputs))
    return np.asarray(values), [np.asarray(x) for x in gradients]


def evaluate_theirs(loss, *inputs):
  """(value, gradients to the inputs that are floats; None where the loss stops them)."""
  tensors = [torch.tensor(x) for x in inputs]
  leaves = [x.requires_grad_() for x in tensors if x.is_floating_point()]
  value = loss(*tensors)
  value.sum().backward()
  return value.detach().numpy().sum(), [None if x.grad is None else x.grad.numpy() for x in leaves]


def check(ours, theirs, *inputs, frozen=(), constant=(), alone=False, shared=()):
  """Our mean over the batch and its gradients are the published ones.

  Args:
    ours: (arrays) to values.
    theirs: (tensors) to one number.
    *inputs: NumPy arrays; gradients are taken to all that are floats.
    frozen: which of those the published code stops gradients to: there is nothing to compare.
    constant: which of those the loss only compares with a number: our gradient must be 0.
    alone: the loss looks at one example at a time, so that each of our values must be what the
      published code says of a batch of that one.
    shared: which inputs have no batch axis.
  """
  values, gradients = evaluate_ours(ours, *inputs)
  value, expected = evaluate_theirs(theirs, *inputs)
  close(values.mean(), value)
  assert len(gradients) == len(expected)
  for i, (mine, published) in enumerate(zip(gradients, expected, strict=True)):
    if i in frozen or i in constant:
      assert published is None
      assert i in frozen or not mine.any()
      continue
    close(mine, published, f"gradient to input {i}")
  if alone:
    assert len(values) == len(inputs[0])
    for i, mine in enumerate(values):
      own = (x if j in shared else x[i : i + 1] for j, x in enumerate(inputs))
      close(mine.mean(), evaluate_theirs(theirs, *own)[0], f"value of example {i}")
