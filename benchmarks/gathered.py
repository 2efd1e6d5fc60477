"""What a device holds besides, while a teacher in parts is run: by the compiler's memory analysis.

A decoder whose layers are scanned, cut by `train.fsdp` over eight devices that are made up on a
CPU; one pass forward to one number, as a loss is, compiled and not run. Three ways to get the
weights together:

- the compiler: it is told where weights and batch lie, and nothing else;
- before the layers: each stacked weight is made whole in front of the scan;
- at use: in the scan's body, as a training step of this library does (`Network.at_use`).

Command:   python benchmarks/gathered.py
"""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
  " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxdistill import networks, train
from jaxdistill.networks.models import Decoder, DecoderConfig

CONFIG = DecoderConfig(256, 256, layers=8, heads=8, kv_heads=8, head_dim=32, hidden=1024, scan=True)
TOKENS = (2048, 8)


def temporaries(way, dtype):
  """Bytes a device, beside the weights and the batch."""
  network = networks.linen(Decoder(CONFIG, dtype=dtype, param_dtype=dtype))
  tokens = jax.ShapeDtypeStruct(TOKENS, jnp.int32)
  shapes = jax.eval_shape(network.init, jax.random.key(0), tokens)
  mesh = train.mesh(fsdp=8)
  at = train.shardings(shapes, mesh, train.fsdp())
  sharding = train.with_jit(mesh, sharding=train.fsdp()).sharding

  def summed(variables, tokens):
    using = network
    if way == "before the layers":
      variables = jax.tree.map(lambda leaf, a: sharding.gathered(leaf, a.spec), variables, at)
    if way == "at use":
      using = network.at_use(sharding.cut_over(at), sharding.gathered)
    hidden = using.apply(variables, tokens, train=False)[0].hidden
    return jnp.sum(hidden.astype(jnp.float32))

  rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
  given = jax.tree.map(lambda leaf, a: leaf.update(sharding=a), shapes, at)
  compiled = jax.jit(summed).lower(given, tokens.update(sharding=rows)).compile()
  weights = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
  return compiled.memory_analysis().temp_size_in_bytes, weights


def main():
  print(f"{'':20}{'weights, all':>16}{'temporaries a device':>24}")
  for dtype in (jnp.float32, jnp.bfloat16):
    for way in ("the compiler", "before the layers", "at use"):
      held, weights = temporaries(way, dtype)
      print(f"{jnp.dtype(dtype).name:10}{way:20}{weights / 1e6:10.1f} MB{held / 1e6:20.1f} MB")


if __name__ == "__main__":
  main()
