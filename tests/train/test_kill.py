"""A run that is killed or stopped at any moment ends, started again, with the same bits.

`strike_and_resume` starts real processes, hits one of them at a moment that it does not choose
(while it compiles, trains, or writes a checkpoint), and starts them again until the run is
finished. The suite does so a few times; by hand, a hundred:

  python tests/train/test_kill.py 100
  python tests/train/test_kill.py 100 --processes 2
  python tests/train/test_kill.py 100 --processes 2 --parts
  python tests/train/test_kill.py 100 --processes 4          (of two devices each)
  python tests/train/test_kill.py 50 --terminate
"""

import argparse
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest

CHILD = """
import os, sys
folder, process, processes, port = sys.argv[1], *map(int, sys.argv[2:])
devices = {1: 2, 2: 1}.get(processes, 2)
os.environ["XLA_FLAGS"] = (
  f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
)
os.environ["JAX_PLATFORMS"] = "cpu"
import jax, numpy as np, optax
if processes > 1:
  jax.distributed.initialize(f"localhost:{port}", processes, process)
jax.config.update("jax_compilation_cache_dir", os.environ["KILL_CACHE"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
import small_networks
from jaxdistill import data, recipes, teachers, train

rng = np.random.default_rng(0)
labels = rng.integers(0, 3, 96)
inputs = (rng.normal(size=(96, 4)) + np.eye(3, 4)[labels]).astype(np.float32)
examples = data.from_arrays(inputs, labels, num_classes=3)
source = data.on_device(examples, batch_size=4 * jax.device_count(), data_seed=0)
teacher = small_networks.model(small_networks.dense(7), 1, 4, key=jax.random.key(9))
if processes > 1:
  # A process that dies before the others know it is noticed by JAX's heartbeats alone.
  import time
  from jaxdistill.train import _processes
  with _processes.together():
    while not _processes._peers()._links:
      time.sleep(0.01)
open(os.environ["KILL_BEGUN"] + str(process), "w").close()
small_networks.fit(
  small_networks.dense(64, norm=True, dropout=0.3),
  recipes.combine(recipes.kd(), recipes.hint("mid", "mid")),
  data=source,
  optimizer=optax.adam(1e-2),
  steps=120 if processes > 2 else 480,  # more processes than most machines' cores are slow
  seed=(0, 1),
  teacher=teachers.frozen(teacher),
  average=0.99,
  accumulate=2,
  dispatch=(
    train.with_jit(train.mesh(fsdp=2), sharding=train.fsdp()) if os.environ["KILL_PARTS"] else None
  ),
  log_every=4,
  checkpoint_every=12,
  folder=folder,
  progress="run",
)
"""
# Seconds that a process may take to leave once it, or the other, was hit; and for a whole run.
LEAVES, WHOLE = 10, 300


def begun(folder, process):
  return folder.with_name(f"{folder.name}.begun{process}")


def start(folder, cache, processes=1):
  """Starts the processes of a run."""
  here = pathlib.Path(__file__).parent
  paths = [str(here), str(here.parent), str(here.parent.parent), os.environ.get("PYTHONPATH", "")]
  environment = {**os.environ, "KILL_CACHE": str(cache), "PYTHONPATH": os.pathsep.join(paths)}
  environment["KILL_BEGUN"] = str(begun(folder, ""))
  environment.setdefault("KILL_PARTS", "")  # whether the student lies in parts over the devices
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  children = []
  for process in range(processes):
    begun(folder, process).unlink(missing_ok=True)
    arguments = map(str, (folder, process, processes, port))
    with begun(folder, f"{process}.log").open("w") as log:
      command = [sys.executable, "-W", "ignore", "-c", CHILD, *arguments]
      children.append(subprocess.Popen(command, env=environment, stderr=log))
  return children


def end(children, within):
  """Waits until all have ended; their statuses, and how long the slowest took."""
  since = time.monotonic()
  try:
    codes = [child.wait(max(0.1, within - time.monotonic() + since)) for child in children]
  finally:
    for child in children:
      child.kill()
  return codes, time.monotonic() - since


def run_whole(folder, cache, processes=1):
  """A run from the start, or from where it stands, to its end."""
  codes, _ = end(start(folder, cache, processes), WHOLE)
  said = begun(folder, "0.log").read_text()
  assert codes == [0] * processes, f"the run failed with {codes}: {said}"


def step_of(folder):
  """How far a run's log has come."""
  path = folder / "metrics.jsonl"
  lines = path.read_text().splitlines() if path.is_file() else []
  return len(lines)


def strike_and_resume(
  folder, cache, random_numbers, strikes, processes=1, number=signal.SIGKILL, within=WHOLE
):
  """Hits a run some times, each at a random moment, and lets it finish.

  Returns:
    How often it was hit, and the most seconds that anybody took to leave then.
  """
  struck, slowest = 0, 0.0
  while struck < strikes:
    children = start(folder, cache, processes)
    since, seen = time.monotonic(), step_of(folder)
    # Not before it is at work: to kill an import proves nothing. Then at any moment at all, of
    # compilation too.
    compiling = random_numbers.random() < 0.3
    while all(child.poll() is None for child in children) and time.monotonic() - since < 120:
      there = all(begun(folder, process).exists() for process in range(processes))
      if there and (compiling or step_of(folder) != seen):
        break
      time.sleep(0.005)
    time.sleep(random_numbers.uniform(0, 3.0 if compiling else 0.4))
    hit = random_numbers.randrange(processes)
    if children[hit].poll() is not None:
      codes, _ = end(children, WHOLE)
      assert codes == [0] * processes, f"the run failed with {codes}"
      return struck, slowest  # it was faster than its murderer
    children[hit].send_signal(number)
    struck += 1
    codes, seconds = end(children, within)
    slowest = max(slowest, seconds)
    check_left(folder, codes, hit, number)
  run_whole(folder, cache, processes)
  return struck, slowest


def check_left(folder, codes, hit, number):
  """Whether all left as they should, and said so."""
  if number == signal.SIGKILL:
    assert codes[hit] == -number
  for process, code in enumerate(codes):
    said = begun(folder, f"{process}.log").read_text()
    if number == signal.SIGTERM:
      # In its last moments it is told too late to stop, and ends as SIGTERM ends a process.
      assert code in (0, 143, -number), said
      if code == 143 and process == 0:  # which shows the run
        assert "asked to stop, and stands at step" in said
    elif process != hit:
      # Of process 0 JAX's own client may be the first to know, and aborts in words of its own.
      assert code == 1 or (hit == 0 and code == -signal.SIGABRT), (code, said)
      assert code != 1 or f"process {hit} of {len(codes)} has died" in said, said


def leaves_of(folder):
  from jaxdistill.runs import Checkpoints, read_config

  with Checkpoints(folder / "checkpoints") as saved:
    steps = read_config(folder)["steps"]
    assert saved.latest() == steps
    items = saved.restore(steps)
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
@pytest.mark.parametrize(
  ("processes", "number", "parts"),
  [
    *((n, number, "") for n in (1, 2) for number in (signal.SIGKILL, signal.SIGTERM)),
    (2, signal.SIGKILL, "parts"),
    (2, signal.SIGTERM, "parts"),
    (4, signal.SIGKILL, ""),
  ],
)
def test_runs_that_are_hit_end_with_the_same_bits(tmp_path, monkeypatch, processes, number, parts):
  monkeypatch.setenv("KILL_PARTS", parts)
  run_whole(tmp_path / "whole", tmp_path / "cache", processes)
  hits, _ = strike_and_resume(
    tmp_path / "hit", tmp_path / "cache", random.Random(), 3, processes, number
  )
  assert hits >= 1
  assert compare(tmp_path / "hit", tmp_path / "whole") == 0


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("strikes", type=int, help="how many")
  parser.add_argument("--processes", type=int, default=1, help="of a run, one of which is hit")
  parser.add_argument("--terminate", action="store_true", help="by SIGTERM, and not by SIGKILL")
  parser.add_argument("--parts", action="store_true", help="the student over the devices")
  parser.add_argument("--seed", type=int, default=0, help="of the moments")
  options = parser.parse_args()
  os.environ["KILL_PARTS"] = "parts" if options.parts else ""
  number = signal.SIGTERM if options.terminate else signal.SIGKILL
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    run_whole(folder / "whole", folder / "cache", options.processes)
    hits = runs = bits = 0
    slowest = 0.0
    while hits < options.strikes:
      runs += 1
      numbers = random.Random(f"{options.seed}/{runs}")
      # Every second run without what was compiled before.
      cache = folder / f"cache{runs}" if runs % 2 else folder / "cache"
      more, seconds = strike_and_resume(
        folder / f"run{runs}",
        cache,
        numbers,
        min(5, options.strikes - hits),
        options.processes,
        number,
        LEAVES,  # on a machine that does nothing else; in the suite no clock decides
      )
      hits, slowest = hits + more, max(slowest, seconds)
      bits += compare(folder / f"run{runs}", folder / "whole")
      print(
        f"{hits} x {number.name} in {runs} runs of {options.processes} processes: {bits} differing "
        f"bits, all had left after {slowest:.1f} s at most",
        flush=True,
      )


if __name__ == "__main__":
  main()
