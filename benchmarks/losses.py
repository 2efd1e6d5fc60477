"""What the three hungry losses hold in memory, beside their naive forms, in one run.

Value and gradient by student and teacher are compiled at the sizes of their papers and XLA is asked
what it would allocate besides arguments and results. Nothing is run. The naive forms are the
published codes' own: NST's broadcast product of channels, RKD's [B, B, D] directions and [B, B, B]
angles, CRD's gathered rows of both banks (with the negatives given, as its data loader does).

Command:   python benchmarks/losses.py          (results: benchmarks/results/losses.json)
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import optax
import tyro

from jaxdistill import losses, runs

LIMIT = 0.1


@dataclasses.dataclass(frozen=True)
class Options:
  """Where the numbers go."""

  out: pathlib.Path = pathlib.Path(__file__).parent / "results" / "losses.json"


def normalized(x, axis=-1):
  return x / jnp.maximum(optax.safe_norm(x, 1e-12, axis=axis, keepdims=True), 1e-12)


def naive_neuron_selectivity(student, teacher):
  def rows(maps):
    return normalized(jnp.moveaxis(maps, -1, 1).reshape(maps.shape[0], maps.shape[-1], -1))

  def kernel(a, b):
    return jnp.mean(jnp.sum(a[:, None] * b[:, :, None], axis=-1) ** 2, axis=(1, 2))

  s, t = rows(student), rows(teacher)
  return kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)


def naive_relational_angle(student, teacher):
  def angles(x):
    directions = normalized(x[None] - x[:, None])
    return jnp.einsum("ijd,ikd->ijk", directions, directions)

  return jnp.mean(optax.huber_loss(angles(student), angles(teacher)), axis=(1, 2))


def naive_contrastive_bank(student, teacher, drawn, index, banks, *, temperature=0.07):
  columns = jnp.concatenate([index[:, None], drawn], axis=1)
  size, share = len(banks.labels), drawn.shape[1] / len(banks.labels)

  def side(vectors, bank):
    scores = jnp.exp(jnp.einsum("bkd,bd->bk", bank[columns], vectors) / temperature)
    scores = scores / jax.lax.stop_gradient(jnp.mean(scores) * size)
    own = jnp.log(scores[:, 0] / (scores[:, 0] + share + 1e-7))
    return -own - jnp.sum(jnp.log(share / (scores[:, 1:] + share + 1e-7)), axis=1)

  def remember(bank, vectors):
    mixed = 0.5 * bank[index] + 0.5 * jax.lax.stop_gradient(vectors)
    return bank.at[index].set(normalized(mixed))

  s, t = normalized(student), normalized(teacher)
  values = side(s, banks.teacher) + side(t, banks.student)
  return values, banks._replace(
    student=remember(banks.student, s), teacher=remember(banks.teacher, t)
  )


def floats(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def integers(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.int32)


def held(loss, *arguments, has_aux=False):
  """Bytes that XLA allocates for value and gradient besides arguments and results."""

  def total(*arguments):
    out = loss(*arguments)
    return (jnp.sum(out[0]), out[1]) if has_aux else jnp.sum(out)

  function = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=has_aux))
  return function.lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def cases():
  """Name and size, ours in bytes, the naive form in bytes."""
  maps = floats(64, 32, 32, 64), floats(64, 32, 32, 64)
  yield (
    "neuron_selectivity B=64 C=64 32x32",
    held(losses.neuron_selectivity, *maps),
    held(naive_neuron_selectivity, *maps),
  )
  for size in (64, 256):
    vectors = floats(size, 256), floats(size, 256)
    yield (
      f"relational_angle B={size} D=256",
      held(losses.relational_angle, *vectors),
      held(naive_relational_angle, *vectors),
    )
  size, width, batch, negatives = 50_000, 128, 64, 16_384
  banks = losses.Banks(
    floats(size, width),
    floats(size, width),
    integers(size),
    floats(2),
    jax.ShapeDtypeStruct((), jnp.bool_),
  )
  vectors = floats(batch, width), floats(batch, width)
  key = jax.eval_shape(lambda: jax.random.key(0))
  yield (
    "contrastive_bank N=50000 D=128 B=64, 16384 negatives",
    held(
      lambda s, t, labels, index, banks, key: losses.contrastive_bank(
        s, t, labels, index, banks, key=key, negatives=negatives
      ),
      *vectors,
      integers(batch),
      integers(batch),
      banks,
      key,
      has_aux=True,
    ),
    held(
      naive_contrastive_bank,
      *vectors,
      integers(batch, negatives),
      integers(batch),
      banks,
      has_aux=True,
    ),
  )


def main(options: Options) -> None:
  megabyte = 1e6
  results, worst = {}, 0.0
  print(f"{'loss':<54}{'ours, MB':>10}{'naive, MB':>11}{'ratio':>8}")
  for name, ours, naive in cases():
    ratio = ours / naive
    worst = max(worst, ratio)
    results[name] = {"ours": ours / megabyte, "naive": naive / megabyte, "ratio": ratio}
    print(f"{name:<54}{ours / megabyte:10.2f}{naive / megabyte:11.2f}{ratio:8.4f}")
  options.out.parent.mkdir(parents=True, exist_ok=True)
  written = {"environment": runs.environment(), "limit": LIMIT, "megabytes": results}
  options.out.write_text(json.dumps(written, indent=2) + "\n")
  print(f"ratio {worst:.4f}")
  if worst >= LIMIT:
    raise SystemExit(f"a loss holds {worst:.4f} of its naive form; the limit is {LIMIT}.")


if __name__ == "__main__":
  main(tyro.cli(Options))
