"""A large vocabulary's loss in chunks of tokens, beside the whole and PyTorch, over both sizes.

The loss is labels and soft targets (`recipes.kd`) of a student's and a teacher's hidden states and
heads, forward and backward. Sides:

- naive: our losses on logits that are there as a whole;
- kept, again: `train.in_chunks`, both ways to the gradient;
- PyTorch: eager, and chunked as TRL's DistillationTrainer does it, each chunk recomputed by
  ``torch.utils.checkpoint`` in the backward pass;
- Liger, on a GPU where it is installed: its fused linear JSD.

Memory is XLA's own analysis of the compiled program, in float32, in which a CPU makes no copies of
its own: nothing is run, so widths are those of real models. What grows with tokens is split into
what goes in and comes out (hidden states and their gradient, half as large in bfloat16) and what
lies beside, between the two largest numbers of tokens at the largest vocabulary. Seconds are of
small widths, where the vocabulary is nearly all there is; of the process's CPU time on one thread
where there is no accelerator; each side's best of some rounds in turn. A cell is not timed where a
side would take longer than ``--longest``, by what the cell before it took, or where the logits as a
whole need half of the machine's memory. Every cell is written when it is done.

Command:   python benchmarks/vocabulary.py      (results: benchmarks/results/vocabulary.json)
Tables:    python benchmarks/accelerator.py --tables
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import pathlib
import time

import tyro


@dataclasses.dataclass(frozen=True)
class Options:
  """Sizes; the defaults are those of the published figures."""

  out: pathlib.Path = pathlib.Path(__file__).parent / "results" / "vocabulary.json"
  tokens: tuple[int, ...] = (512, 2048, 8192)
  vocabulary: tuple[int, ...] = (16_384, 128_256)
  # What is timed.
  seconds: bool = True
  width: int = 128
  teacher_width: int = 128
  tokens_at_once: int = 256
  rounds: int = 4
  # Seconds: a side that would need more for one run is not run, and no further round begins after.
  longest: float = 30.0
  # What is analysed.
  memory: bool = True
  memory_width: int = 2048
  memory_teacher_width: int = 4096
  memory_tokens_at_once: int = 512


KD = {"temperature": 2.0, "soft_weight": 0.5, "hard_weight": 0.5}


def ours(tokens_at_once: int):
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

  def chunked(backward):
    objective = train.in_chunks(recipes.kd(**KD), tokens_at_once=tokens_at_once, backward=backward)
    return functools.partial(loss, objective, False)

  return {
    "naive": functools.partial(loss, recipes.kd(**KD), True),
    "kept": chunked("kept"),
    "again": chunked("again"),
  }


def analysed(options: Options, tokens: int, vocabulary: int) -> dict:
  """Bytes of each side's compiled program."""
  import jax
  import jax.numpy as jnp

  widths = (options.memory_width, options.memory_teacher_width)
  hidden, taught = (jax.ShapeDtypeStruct((4, tokens // 4, D), jnp.float32) for D in widths)
  kernels = [jax.ShapeDtypeStruct((D, vocabulary), jnp.float32) for D in widths]
  labels = jax.ShapeDtypeStruct((4, tokens // 4), jnp.int32)
  found = {}
  for side, loss in ours(options.memory_tokens_at_once).items():
    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    used = step.lower(hidden, kernels[0], taught, kernels[1], labels).compile().memory_analysis()
    found[side] = {
      "arguments": used.argument_size_in_bytes,
      "results": used.output_size_in_bytes,
      "temporaries": used.temp_size_in_bytes,
    }
  return found


def slopes(options: Options, cells: list) -> dict:
  """MB a token of each side: beside what goes in and out, and with that in bfloat16 and float32."""
  there = {
    cell["tokens"]: cell["bytes"]
    for cell in cells
    if cell["vocabulary"] == max(options.vocabulary) and "bytes" in cell
  }
  if len(there) < 2:
    return {}
  few, many = sorted(there)[-2:]
  in_and_out = 2 * options.memory_width + options.memory_teacher_width
  made = {}
  for side, used in there[many].items():
    beside = (used["temporaries"] - there[few][side]["temporaries"]) / (many - few)
    made[side] = {
      "temporaries": beside / 1e6,
      "with bfloat16 in and out": (beside + 2 * in_and_out) / 1e6,
      "with float32 in and out": (beside + 4 * in_and_out) / 1e6,
      "times below naive": sum(there[many]["naive"].values()) / sum(used.values()),
    }
  return made


def calls_of_ours(options: Options, numbers: dict) -> dict:
  """What is timed of ours: compiled, and its first call done."""
  import jax
  import jax.numpy as jnp

  given = {name: jnp.asarray(value) for name, value in numbers.items()}
  calls = {}
  for side, loss in ours(options.tokens_at_once).items():
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


def timed(options: Options, tokens: int, vocabulary: int) -> dict:
  """The best seconds of each side, which take turns."""
  import jax
  import numpy as np

  rng = np.random.default_rng(0)
  shape = (4, tokens // 4)

  def normal(*axes):
    return rng.standard_normal(axes, np.float32)

  numbers = {
    "hidden": normal(*shape, options.width),
    "kernel": normal(options.width, vocabulary) / options.width**0.5,
    "taught": normal(*shape, options.teacher_width),
    "its_kernel": normal(options.teacher_width, vocabulary) / options.teacher_width**0.5,
    "labels": rng.integers(0, vocabulary, shape).astype(np.int32),
  }
  numbers = {name: np.asarray(x, "i4" if name == "labels" else "f4") for name, x in numbers.items()}
  calls = {**calls_of_ours(options, numbers), **calls_of_pytorch(options, numbers)}
  clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
  for call in calls.values():
    call()  # compiles
  best: dict = {}
  began = time.perf_counter()
  for i in range(options.rounds):
    if i and time.perf_counter() - began > options.longest:
      break
    for side, call in calls.items():
      start = clock()
      call()
      best[side] = min(best.get(side, float("inf")), clock() - start)
  return best


def left_out(options: Options, cells: list, tokens: int, vocabulary: int) -> str | None:
  """Why a cell is not run, by those before it; None where it is."""
  size = tokens * vocabulary
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  if 8 * 4 * size > memory / 2:  # logits of two networks, and what softmaxes make of them
    return "memory"
  measured = [cell for cell in cells if cell.get("seconds")]
  if measured:
    last = measured[-1]
    slowest = max(last["seconds"].values())
    if slowest * size / (last["tokens"] * last["vocabulary"]) > options.longest:
      return "seconds"
  return None


def measured(options: Options, cells: list, tokens: int, vocabulary: int) -> dict:
  """One cell: seconds and bytes of each side, and what was left out."""
  import jax

  cell: dict = {"tokens": tokens, "vocabulary": vocabulary}
  print(f"{tokens:,} tokens, {vocabulary:,} words, {jax.default_backend()}", flush=True)
  why = left_out(options, cells, tokens, vocabulary)
  if options.seconds and why is None:
    cell["seconds"] = timed(options, tokens, vocabulary)
    naive = cell["seconds"]["naive"]
    for side, seconds in cell["seconds"].items():
      print(f"  {side:16} {seconds:8.3f} s   {seconds / naive:.2f} of naive", flush=True)
  elif options.seconds:
    cell["left out"] = why
  if options.memory:
    cell["bytes"] = analysed(options, tokens, vocabulary)
    for side, used in cell["bytes"].items():
      print(f"  {side:16} {sum(used.values()) / 1e9:8.2f} GB", flush=True)
  return cell


def main(options: Options) -> None:
  """Measures, prints, writes."""
  # Before JAX is imported: CPU seconds of several threads that wait for each other say little.
  os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
  from jaxdistill import runs

  cells: list = []
  said = {**dataclasses.asdict(options), "out": options.out.name}
  options.out.parent.mkdir(parents=True, exist_ok=True)
  pairs = itertools.product(options.tokens, options.vocabulary)
  for tokens, vocabulary in sorted(pairs, key=lambda pair: pair[0] * pair[1]):  # small ones first
    cells.append(measured(options, cells, tokens, vocabulary))
    result = {"options": said, "cells": cells, "megabytes a token": slopes(options, cells)}
    result["environment"] = runs.environment()
    options.out.write_text(json.dumps(result, indent=1) + "\n")
  for side, slope in result["megabytes a token"].items():
    print(f"  {side:16} " + ", ".join(f"{name} {value:.4f}" for name, value in slope.items()))


if __name__ == "__main__":
  main(tyro.cli(Options))
