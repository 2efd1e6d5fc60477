"""A large vocabulary's loss in chunks of tokens, beside the whole and PyTorch, in one run.

The loss is labels and soft targets (`recipes.kd`) of a student's and a teacher's hidden states and
heads, forward and backward. Sides:

- naive: our losses on logits that are there as a whole;
- kept, again: `train.in_chunks`, both ways to the gradient;
- PyTorch: eager, and chunked as TRL's DistillationTrainer does it, each chunk recomputed by
  ``torch.utils.checkpoint`` in the backward pass;
- Liger, on a GPU where it is installed: its fused linear JSD.

Memory is XLA's own analysis of the compiled program at the large sizes, in float32, in which a CPU
makes no copies of its own: nothing is run. What grows with tokens is split into what goes in and
comes out (hidden states and their gradient, half as large in bfloat16) and what lies beside.
Seconds are of the process's CPU time on one thread where there is no accelerator, each side's best
of some rounds in turn.

Command:   python benchmarks/vocabulary.py      (results: benchmarks/results/vocabulary.json)
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import time

import tyro


@dataclasses.dataclass(frozen=True)
class Options:
  """Sizes; the defaults are those of the published figures."""

  out: pathlib.Path = pathlib.Path(__file__).parent / "results" / "vocabulary.json"
  # What is timed.
  tokens: int = 1024
  vocabulary: int = 16_384
  width: int = 128
  teacher_width: int = 128
  tokens_at_once: int = 256
  rounds: int = 4
  # What is analysed.
  memory_tokens: tuple[int, int] = (4096, 8192)
  memory_vocabulary: int = 128_256
  memory_width: int = 2048
  memory_teacher_width: int = 4096
  memory_tokens_at_once: int = 512
  memory: bool = True
  # Whether anything is timed: without, nothing is run.
  seconds: bool = True


KD = {"temperature": 2.0, "soft_weight": 0.5, "hard_weight": 0.5}


def ours(options: Options):
  """``{side: (hidden, kernel, teacher's hidden, its kernel, labels) -> loss}``."""
  import jax
  import jax.numpy as jnp

  from jaxdistill import recipes, train
  from jaxdistill.types import Head, Outputs, make_batch, with_logits

  def loss(objective, whole, hidden, kernel, taught, its_kernel, labels):
    batch = dataclasses.replace(
      make_batch(labels), labels=labels, labelled=jnp.ones(labels.shape[:1])
    )
    seen = [
      Outputs(hidden=hidden, head=Head(kernel)),
      Outputs(hidden=taught, head=Head(its_kernel)),
    ]
    seen = [with_logits(one) for one in seen] if whole else seen
    terms, _ = objective.apply({}, {}, *seen, batch, key=jax.random.key(0))
    return train.reduce_terms(terms, batch)[0]

  def chunked(backward, tokens):
    objective = train.in_chunks(recipes.kd(**KD), tokens_at_once=tokens, backward=backward)
    return functools.partial(loss, objective, False)

  return lambda tokens: {
    "naive": functools.partial(loss, recipes.kd(**KD), True),
    "kept": chunked("kept", tokens),
    "again": chunked("again", tokens),
  }


def analysed(options: Options) -> dict:
  """Bytes of each side's compiled program, at both numbers of tokens."""
  import jax
  import jax.numpy as jnp

  found = {}
  for side, loss in ours(options)(options.memory_tokens_at_once).items():
    found[side] = {}
    for tokens in options.memory_tokens:
      hidden, taught = (
        jax.ShapeDtypeStruct((4, tokens // 4, width), jnp.float32)
        for width in (options.memory_width, options.memory_teacher_width)
      )
      kernels = [
        jax.ShapeDtypeStruct((x.shape[-1], options.memory_vocabulary), jnp.float32)
        for x in (hidden, taught)
      ]
      labels = jax.ShapeDtypeStruct((4, tokens // 4), jnp.int32)
      step = jax.jit(jax.value_and_grad(loss, (0, 1)))
      used = step.lower(hidden, kernels[0], taught, kernels[1], labels).compile().memory_analysis()
      found[side][tokens] = {
        "arguments": used.argument_size_in_bytes,
        "results": used.output_size_in_bytes,
        "temporaries": used.temp_size_in_bytes,
      }
      print(
        f"{side}, {tokens:,} tokens: {sum(found[side][tokens].values()) / 1e9:.2f} GB", flush=True
      )
  return found


def slopes(options: Options, found: dict) -> dict:
  """MB a token of each side: beside what goes in and out, and with that in bfloat16 and float32."""
  few, many = options.memory_tokens
  in_and_out = 2 * options.memory_width + options.memory_teacher_width
  made = {}
  for side, by_tokens in found.items():
    beside = (by_tokens[many]["temporaries"] - by_tokens[few]["temporaries"]) / (many - few)
    total = sum(by_tokens[many].values())
    made[side] = {
      "temporaries": beside / 1e6,
      "with bfloat16 in and out": (beside + 2 * in_and_out) / 1e6,
      "with float32 in and out": (beside + 4 * in_and_out) / 1e6,
      "times below naive": sum(found["naive"][many].values()) / total,
    }
  return made


def calls_of_ours(options: Options, numbers: dict) -> dict:
  """What is timed of ours: compiled, and its first call done."""
  import jax
  import jax.numpy as jnp

  given = {name: jnp.asarray(value) for name, value in numbers.items()}
  calls = {}
  for side, loss in ours(options)(options.tokens_at_once).items():
    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    calls[side] = functools.partial(lambda step: jax.block_until_ready(step(*given.values())), step)
  return calls


def calls_of_pytorch(options: Options, numbers: dict) -> dict:
  """What is timed of PyTorch, and of Liger where it is there; nothing without PyTorch."""
  if importlib.util.find_spec("torch") is None:
    return {}
  import torch
  from torch.nn import functional
  from torch.utils.checkpoint import checkpoint

  device = "cuda" if torch.cuda.is_available() else "cpu"
  if device == "cpu":
    torch.set_num_threads(1)
  hidden, kernel, taught, its_kernel, labels = (
    torch.tensor(value, device=device) for value in numbers.values()
  )
  hidden, taught, labels = hidden.flatten(0, 1), taught.flatten(0, 1), labels.flatten().long()

  def summed(hidden, kernel, taught, labels):
    student, teacher = hidden @ kernel, (taught @ its_kernel).detach()
    temperature = KD["temperature"]
    soft = functional.kl_div(
      functional.log_softmax(student / temperature, dim=-1),
      functional.log_softmax(teacher / temperature, dim=-1),
      reduction="sum",
      log_target=True,
    )
    hard = functional.cross_entropy(student, labels, reduction="sum")
    return KD["soft_weight"] * temperature**2 * soft + KD["hard_weight"] * hard

  def step(loss):
    x, w = hidden.clone().requires_grad_(), kernel.clone().requires_grad_()
    (loss(x, w) / len(labels)).backward()
    if device == "cuda":
      torch.cuda.synchronize()
    return x.grad, w.grad

  def chunked(x, w):
    pieces = zip(*(v.split(options.tokens_at_once) for v in (x, taught, labels)), strict=True)
    return sum(checkpoint(summed, a, w, b, y, use_reentrant=False) for a, b, y in pieces)

  calls = {
    "PyTorch eager": lambda: step(lambda x, w: summed(x, w, taught, labels)),
    "PyTorch chunked": lambda: step(chunked),
  }
  if device == "cuda" and importlib.util.find_spec("liger_kernel"):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    fused = LigerFusedLinearJSDLoss(
      weight_hard_loss=0.5, weight_soft_loss=0.5, temperature=KD["temperature"]
    )
    calls["Liger JSD"] = lambda: step(
      lambda x, w: fused(x, w.T, taught, its_kernel.T, labels) * len(labels)
    )
  return calls


def timed(options: Options) -> dict:
  """The best seconds of each side, which take turns."""
  import jax
  import numpy as np

  rng = np.random.default_rng(0)
  shape = (4, options.tokens // 4)

  def normal(*axes):
    return rng.normal(size=axes).astype(np.float32)

  numbers = {
    "hidden": normal(*shape, options.width),
    "kernel": normal(options.width, options.vocabulary) / options.width**0.5,
    "taught": normal(*shape, options.teacher_width),
    "its_kernel": normal(options.teacher_width, options.vocabulary) / options.teacher_width**0.5,
    "labels": rng.integers(0, options.vocabulary, shape).astype(np.int32),
  }
  calls = {**calls_of_ours(options, numbers), **calls_of_pytorch(options, numbers)}
  clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
  for call in calls.values():
    call()
  best: dict = {}
  for _ in range(options.rounds):
    for side, call in calls.items():
      began = clock()
      call()
      best[side] = min(best.get(side, float("inf")), clock() - began)
  return best


def main(options: Options) -> None:
  """Measures, prints, writes."""
  # Before JAX is imported: CPU seconds of several threads that wait for each other say little.
  os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
  import jax

  from jaxdistill import runs

  best = timed(options) if options.seconds else {}
  print(f"{options.tokens:,} tokens, {options.vocabulary:,} words, {jax.default_backend()}")
  for side, seconds in best.items():
    print(f"  {side:16} {seconds:8.3f} s   {seconds / best['naive']:.2f} of naive")
  result = {"options": dataclasses.asdict(options), "seconds": best}
  result["options"]["out"] = str(options.out.name)
  if options.memory:
    result["bytes"] = analysed(options)
    result["megabytes a token"] = slopes(options, result["bytes"])
    for side, slope in result["megabytes a token"].items():
      print(f"  {side:16} " + ", ".join(f"{name} {value:.4f}" for name, value in slope.items()))
  result["environment"] = runs.environment()
  options.out.parent.mkdir(parents=True, exist_ok=True)
  options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
  main(tyro.cli(Options))
