"""A run that is killed at any moment ends, when it is started again, with the same bits.

`kill_and_resume` starts a real process, kills it with SIGKILL at a moment that it does not choose,
and starts it again until the run is finished. The suite does so a few times; by hand, a hundred:

  python tests/test_kill.py 100
"""

import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest

CHILD = """
import os, sys
os.environ["XLA_FLAGS"] = (
  "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
)
os.environ["JAX_PLATFORMS"] = "cpu"
import jax, numpy as np, optax
jax.config.update("jax_compilation_cache_dir", os.environ["KILL_CACHE"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
import small_networks
from jaxdistill import data, recipes, teachers

rng = np.random.default_rng(0)
labels = rng.integers(0, 3, 96)
inputs = (rng.normal(size=(96, 4)) + np.eye(3, 4)[labels]).astype(np.float32)
examples = data.from_arrays(inputs, labels, num_classes=3)
source = data.on_device(examples, batch_size=8, data_seed=0)
teacher = small_networks.model(small_networks.dense(7), 1, 4, key=jax.random.key(9))
small_networks.fit(
  small_networks.dense(64, norm=True, dropout=0.3),
  recipes.combine(recipes.kd(), recipes.hint("mid", "mid")),
  data=source,
  optimizer=optax.adam(1e-2),
  steps=480,
  seed=(0, 1),
  teacher=teachers.frozen(teacher),
  average=0.99,
  accumulate=2,
  log_every=4,
  checkpoint_every=12,
  folder=sys.argv[1],
)
"""


def start(folder, cache):
  here = pathlib.Path(__file__).parent
  paths = [str(here), str(here.parent), str(here.parent.parent), os.environ.get("PYTHONPATH", "")]
  environment = {**os.environ, "KILL_CACHE": str(cache), "PYTHONPATH": os.pathsep.join(paths)}
  return subprocess.Popen(
    [sys.executable, "-W", "ignore", "-c", CHILD, str(folder)], env=environment
  )


def step_of(folder):
  """How far a run's log has come."""
  path = folder / "metrics.jsonl"
  lines = path.read_text().splitlines() if path.is_file() else []
  return len(lines)


def kill_and_resume(folder, cache, random_numbers, kills):
  """Kills a run ``kills`` times, each at a random moment of its training, and lets it finish."""
  killed = 0
  while killed < kills:
    process = start(folder, cache)
    begun, seen = time.monotonic(), step_of(folder)
    # Not before it trains: to kill an import proves nothing. Then at any moment at all.
    while process.poll() is None and step_of(folder) == seen and time.monotonic() - begun < 120:
      time.sleep(0.005)
    time.sleep(random_numbers.uniform(0, 0.4))
    if process.poll() is None:
      process.kill()
      killed += 1
    elif process.returncode == 0:
      return killed  # it was faster than its murderer
    else:
      raise AssertionError(f"the run failed with {process.returncode}")
    process.wait()
  process = start(folder, cache)
  assert process.wait(300) == 0
  return killed


def leaves_of(folder):
  from jaxdistill.runs import Checkpoints

  with Checkpoints(folder / "checkpoints") as saved:
    assert saved.latest() == 480
    items = saved.restore(480)
  import jax

  flat, _ = jax.tree.flatten(items)
  return [
    np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
    for x in flat
  ]


def compare(folder, whole):
  """The number of bits in which a run's last checkpoint differs from another's, and its log."""
  mine, theirs = leaves_of(folder), leaves_of(whole)
  assert len(mine) == len(theirs)
  bits = sum(
    int(
      np.unpackbits(
        np.frombuffer(a.tobytes(), np.uint8) ^ np.frombuffer(b.tobytes(), np.uint8)
      ).sum()
    )
    for a, b in zip(mine, theirs, strict=True)
  )
  logs = []
  for run in (folder, whole):
    lines = [json.loads(t) for t in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
      line.pop("examples_per_second")
    logs.append(lines)
  assert logs[0] == logs[1], "metrics.jsonl differs"
  return bits


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bits(tmp_path):
  whole = tmp_path / "whole"
  assert start(whole, tmp_path / "cache").wait(300) == 0
  kills = kill_and_resume(tmp_path / "killed", tmp_path / "cache", random.Random(), kills=3)
  assert kills >= 1
  assert compare(tmp_path / "killed", whole) == 0


def main(wanted):
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    assert start(folder / "whole", folder / "cache").wait(300) == 0
    kills = runs = bits = 0
    while kills < wanted:
      runs += 1
      kills += kill_and_resume(
        folder / f"run{runs}", folder / "cache", random.Random(runs), min(5, wanted - kills)
      )
      bits += compare(folder / f"run{runs}", folder / "whole")
      print(f"{kills} kills in {runs} runs, {bits} differing bits", flush=True)


if __name__ == "__main__":
  main(int(sys.argv[1]))
