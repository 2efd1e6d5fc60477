"""Steps of large pairs, compiled for machines that are not there: bytes a device, by the compiler.

ViT-L/16 into ViT-S/16 at 224², and a decoder of 8 billion parameters into one of 1 billion (the
shapes of Llama 3.1 8B and Llama 3.2 1B) on 8 windows of 4,096 tokens. Networks, batch and teacher
are shapes alone: nothing is allocated, nothing is run. Students keep float32 parameters and Adam's
moments and compute in bfloat16; teachers are bfloat16; all are cut by `train.fsdp`.

- TPU: compiled by libtpu (``pip install libtpu``) for a topology that JAX describes; without it the
  step is lowered.
- CUDA: lowered, for eight devices that a CPU makes up; no compiler for it works without a GPU. Its
  bytes are those of shapes.

Command:   python benchmarks/ahead_of_time.py
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU machine to be asked what it is
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
  " --xla_force_host_platform_device_count=8"
)

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import optax
import tyro
from jax.experimental import topologies

from jaxdistill import networks, recipes, teachers, train
from jaxdistill.networks.models import Decoder, DecoderConfig, VisionTransformer
from jaxdistill.types import Model, make_batch


@dataclasses.dataclass(frozen=True)
class Options:
  """Which steps, and for what."""

  pairs: tuple[str, ...] = ("vit", "decoder")
  # As libtpu names it, and the bytes of one of its devices: a v5e has 16 GiB.
  topology: str = "v5e:2x4"
  limit: int = 16 * 2**30


HALF = {"dtype": jnp.bfloat16}
SMALL = {"param_dtype": jnp.float32, **HALF}
LARGE = {"param_dtype": jnp.bfloat16, **HALF}


def vision():
  def made(width, depth, heads, dtypes):
    how = {"patch_size": 16, "num_classes": 1000}
    vit = VisionTransformer(width=width, depth=depth, num_heads=heads, **how, **dtypes)
    return networks.linen(vit)

  batch = jax.eval_shape(
    lambda: make_batch(jnp.zeros((512, 224, 224, 3), jnp.bfloat16), jnp.zeros(512, jnp.int32))
  )
  ways = {"ViT-L/16 → ViT-S/16, 512 images": (made(384, 12, 6, SMALL), {})}
  return made(1024, 24, 16, LARGE), batch, ways


def language():
  large = DecoderConfig(
    128_256, 4096, layers=32, heads=32, kv_heads=8, head_dim=128, hidden=14_336, scan=True
  )
  small = DecoderConfig(
    128_256, 2048, layers=16, heads=32, kv_heads=8, head_dim=64, hidden=8192, scan=True, tied=True
  )
  tokens = jax.eval_shape(lambda: jnp.zeros((8, 4096), jnp.int32))
  batch = jax.eval_shape(lambda t: make_batch(t, t, weight=jnp.ones((8, 4096))), tokens)
  again = dataclasses.replace(small, remat="block")
  plain, blocks = (networks.linen(Decoder(c, **SMALL)) for c in (small, again))
  chunks = {"tokens_at_once": 1024}
  ways = {
    "8 B → 1 B, 8 × 4,096 tokens": (plain, {}),
    "the same, 1,024 tokens' logits at once": (plain, chunks),
    "the same, blocks computed again": (blocks, chunks),
  }
  return networks.linen(Decoder(large, **LARGE)), batch, ways


def devices(topology):
  """What is compiled for, and the platform to lower for where no compiler of it is here."""
  described = importlib.util.find_spec("libtpu") is not None
  if described:
    # All eight chips of one host, as a v5litepod-8 has them.
    how = {"topology_name": topology, "chips_per_host_bounds": (2, 4, 1)}
    found = topologies.get_topology_desc(platform="tpu", **how)
    yield f"TPU {topology}", list(found.devices), None
  else:
    yield "TPU, lowered", jax.devices(), "tpu"
  yield "CUDA × 8, lowered", jax.devices(), "cuda"


def main(options: Options) -> None:
  columns = ("student", "optimizer", "teacher", "data", "temporaries")
  print("| step | for | " + " | ".join(columns) + " | all |")
  print("| --- | --- |" + " ---: |" * (len(columns) + 1))
  for pair in options.pairs:
    large, batch, ways = {"vit": vision, "decoder": language}[pair]()
    shapes = jax.eval_shape(large.init, jax.random.key(0), batch.inputs)
    teacher = teachers.frozen(Model(large, shapes))
    for name, (student, how) in ways.items():
      for target, chosen, platform in devices(options.topology):
        mesh = train.mesh(fsdp=len(chosen), devices=chosen)
        rules = {"sharding": train.fsdp(), "teacher_sharding": train.fsdp()}
        found = train.memory(
          student,
          recipes.kd(hard_weight=0.5),
          data=batch,
          optimizer=optax.adamw(1e-3),
          teacher=teacher,
          dispatch=train.with_jit(mesh, **rules, **how),
          limit=options.limit,
          platform=platform,
        )
        cells = [shown(getattr(found, column)) for column in columns]
        known = platform is None and found.temporaries is not None
        whole = shown(found.needed) if known else "–" if platform else "does not fit"
        print(f"| {name} | {target} | " + " | ".join([*cells, whole]) + " |", flush=True)


def shown(size):
  return "–" if size is None else f"{size / 1e9:.2f} GB"


if __name__ == "__main__":
  main(tyro.cli(Options))
