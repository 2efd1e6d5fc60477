"""What only a machine with an accelerator can answer, in the minutes that there are.

Such a machine is often there for minutes and without a network, so everything is one command, in
order of worth, and nothing is lost when it is cut off:

1. the machine; a run that is trained, saved, loaded and exported, with a second process beside it;
   the tests that a device can change;
2. a distillation step, ResNet-32x4 into ResNet-8x4: images a second, and its time over its floor,
   against PyTorch's loops;
3. students side by side in one program, against one after another;
4. a sweep of 300 students, whole processes, against PyTorch's;
5. an epoch with a cached teacher over a plain one, from the device and from files;
6. memory and time of a soft-target loss over a language model's vocabulary;
7. CIFAR-100 by the published protocol, ResNet-56 and then ResNet-20 from three seeds, for the time
   that is left: a run that goes on, on another day and machine, until it is done.

Each part is a process of its own. After each figure ``OUT/accelerator.json`` is written anew, whole
or not at all. The same command goes on with what is missing: with what OUT holds, else with what
``benchmarks/results`` holds of the same device and versions. A part that fails or takes too long
is named, and tried again at the next start. The training of item 7 lies in ``OUT-work`` beside
OUT, and is packed into ``OUT/cifar100*.tar`` at its end, to go on from there on another machine.
Needed are JAX, Flax, optax and Orbax. PyTorch, TFDS, Grain, tyro and scikit-learn are taken
where they are there; where not, what needs them is left out, and said.

Command:   python benchmarks/accelerator.py --seconds 420 --data-dir DIR --out runs/accelerator
Tables:    python benchmarks/accelerator.py --tables     (from results/ into README.md)
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import queue
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
MARK = "@measured "
# Kept back at the end: packing the training, and ending a process that has run too long.
RESERVE = 12.0
# Below that a process has hardly started before it is ended.
LEAST = 25.0

Emit = Callable[[str, Any], None]


@dataclasses.dataclass(frozen=True)
class Settings:
  """What every part is told."""

  out: str
  work: str
  data_dir: str | None = None
  tiny: bool = False
  seconds: float = 420.0


@dataclasses.dataclass(frozen=True)
class Part:
  """What one process measures.

  Attributes:
    name: of the part; its figures are ``name/key``.
    keys: the figures, in the order in which they come.
    measure: ``(settings, keys that are missing, emit)``, called in the process.
    cap: seconds after which it is ended.
    needs: modules that must be there.
    goes_on: whether the part is started again until its figure says ``done``.
  """

  name: str
  keys: tuple[str, ...]
  measure: Callable[[Settings, Sequence[str], Emit], None]
  cap: float
  needs: tuple[str, ...] = ()
  goes_on: bool = False

  @property
  def figures(self) -> tuple[str, ...]:
    """The names of its figures in the file."""
    return tuple(f"{self.name}/{key}" for key in self.keys)


# 1. The machine.


def machine(settings: Settings, keys: Sequence[str], emit: Emit) -> None:
  """Versions and hardware."""
  import importlib.metadata

  import jax

  from jaxdistill import runs

  found = runs.environment()
  device = jax.devices()[0]
  found["platform"] = device.platform
  found["memory"] = (device.memory_stats() or {}).get("bytes_limit")
  for name in ("orbax-checkpoint", "torch", "tensorflow-datasets", "grain"):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = None
  emit("versions", found)


def digits(settings: Settings) -> tuple[Any, Any, str]:
  """The handwritten digits in two splits; made-up ones where there is no scikit-learn."""
  import numpy as np

  from jaxdistill import data

  try:
    from sklearn import datasets
  except ImportError:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 1100)
    images = rng.integers(0, 17, (1100, 8, 8, 1)).astype(np.uint8)
    name = "made-up digits"
  else:
    bunch = datasets.load_digits()
    images, labels = bunch.images[..., None].astype(np.uint8)[:1100], bunch.target[:1100]
    name = "digits"
  parts = [
    data.from_arrays(images[cut], labels[cut], num_classes=10, name=name)
    for cut in (slice(0, 990), slice(990, 1100))
  ]
  return *parts, name


def peak_bytes() -> int | None:
  """The most memory that this process has had on JAX's device; None where the device cannot say."""
  import jax

  return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


_BESIDE = """
import json, sys, numpy as np, jax
from jaxdistill import export
student = export.load_student(sys.argv[1])
inputs = np.load(sys.argv[2])
stats = jax.devices()[0].memory_stats() or {}
np.save(sys.argv[3], np.asarray(student(inputs)))
peak = stats.get("peak_bytes_in_use")
print(json.dumps({"device": jax.devices()[0].platform, "peak_bytes": peak}))
"""


def smoke(settings: Settings, keys: Sequence[str], emit: Emit) -> None:
  """A run with checkpoints; its student loaded here, and by a process beside this one."""
  import numpy as np
  import optax

  from jaxdistill import data, export, networks, recipes, train

  examples, held_out, name = digits(settings)
  folder = pathlib.Path(settings.work) / "smoke"
  shutil.rmtree(folder, ignore_errors=True)
  source = data.on_device(examples, batch_size=64, data_seed=0, normalize=data.DIGITS)
  network = networks.linen(
    networks.models.ConvNet(channels=(8, 16, 16), strides=(1, 2, 1), dense=64)
  )
  steps = (1 if settings.tiny else 20) * source.steps_per_epoch
  began = time.perf_counter()
  fitted = train.fit(
    network,
    recipes.labels(),
    data=source,
    optimizer=optax.adam(1e-2),
    steps=steps,
    run=train.Run(folder, progress=None),
  )
  trained = time.perf_counter() - began
  inputs = held_out.inputs[:32]
  outputs = fitted(data.DIGITS(inputs))
  here = np.asarray(export.load_student(folder)(inputs))
  asked, answered = folder / "inputs.npy", folder / "outputs.npy"
  np.save(asked, inputs)
  made = subprocess.run(
    [sys.executable, "-c", _BESIDE, str(folder), str(asked), str(answered)],
    capture_output=True,
    text=True,
    timeout=100,
  )
  beside = None if made.returncode else np.load(answered)
  found = {
    "data": name,
    "steps": steps,
    "seconds": trained,
    "final_loss": fitted.history[-1]["loss"],
    "loaded_differs_by": float(np.max(np.abs(here - np.asarray(outputs.logits)))),
    "peak_bytes": peak_bytes(),
    "beside": {"error": made.stderr.strip().splitlines()[-1:]}
    if beside is None
    else {
      **json.loads(made.stdout.splitlines()[-1]),
      "differs_by": float(np.max(np.abs(beside - here))),
    },
  }
  emit("run", found)
  if "export" in keys:
    report = export.export(
      folder, held_out, kinds=["stablehlo"], normalize=data.DIGITS, check=export.Check(seconds=0.5)
    )
    emit("export", report)


def tests(settings: Settings, keys: Sequence[str], emit: Emit) -> None:
  """The tests that a device can change, on this device."""
  import pytest

  os.environ["JAXDISTILL_TEST_DEVICE"] = "1"
  files = [p for p in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.device" in p.read_text()]
  if settings.tiny:
    files = files[:1]

  class Count:
    """What became of each test."""

    def __init__(self) -> None:
      self.outcomes: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}

    def pytest_runtest_logreport(self, report: Any) -> None:
      if report.when == "call" or report.outcome != "passed":
        self.outcomes[report.outcome].append(report.nodeid)

    def pytest_collectreport(self, report: Any) -> None:
      if report.outcome == "failed":
        self.outcomes["failed"].append(report.nodeid)

  count, began = Count(), time.perf_counter()
  options = ["-o", "addopts=", "-q", "-m", "device", "-p", "no:cacheprovider"]
  options += ["-p", "no:benchmark"]  # it warns beside xdist, and a warning is an error
  if importlib.util.find_spec("xdist") and not settings.tiny:
    # Most of their time is the compiler's.
    options += ["-n", str(min(8, os.cpu_count() or 1))]
  code = pytest.main(
    [*options, "--continue-on-collection-errors", *map(str, files)], plugins=[count]
  )
  if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
    raise SystemExit(f"no test has run: pytest left with {code!r}.")
  numbers = {name: len(ids) for name, ids in count.outcomes.items()}
  seconds = time.perf_counter() - began
  emit("outcome", {**numbers, "failures": count.outcomes["failed"], "seconds": seconds})


# 2. A step over its floor, and PyTorch's.


def pair(settings: Settings) -> tuple[str, str, tuple[int, ...]]:
  """Teacher, student, batch sizes."""
  if settings.tiny:
    return "resnet8", "resnet8", (4,)
  return "resnet32x4", "resnet8x4", (64, 512)


def step_ours(dtype: str) -> Callable[[Settings, Sequence[str], Emit], None]:
  """Our step in float32, or computing in bfloat16."""

  def measure(settings: Settings, keys: Sequence[str], emit: Emit) -> None:
    import step

    from jaxdistill import networks
    from jaxdistill.networks import models

    names = pair(settings)
    both = [networks.linen(getattr(models, name)(num_classes=100)) for name in names[:2]]
    if dtype == "bfloat16":
      both = [networks.mixed_precision(network) for network in both]
    for key in keys:
      options = step.Options(
        rounds=2 if settings.tiny else 7,
        steps=2 if settings.tiny else 50,
        batch_size=int(key),
      )
      rounds, first = step.compare(*both, None, options)
      each = statistics.median(rounds["fit"])
      found = {
        "step_in_chunk_ms": 1e3 * each,
        "by_hand_ms": 1e3 * statistics.median(rounds["by hand"]),
        "over_the_floor": step.ratio(rounds, "fit", "by hand")["median"],
        "quartiles": step.ratio(rounds, "fit", "by hand")["quartiles"],
        "images_per_second": options.batch_size / each,
        "compilation_seconds": first,
        "peak_bytes": peak_bytes(),
      }
      emit(key, found)

  return measure


def step_torch(way: str) -> Callable[[Settings, Sequence[str], Emit], None]:
  """PyTorch's step: as its users write it, and then with what makes it faster."""

  def measure(settings: Settings, keys: Sequence[str], emit: Emit) -> None:
    import pytorch
    import torch

    device = torch_device()
    torch.backends.cudnn.benchmark = True
    teacher_name, student_name, _ = pair(settings)
    for key in keys:
      batch_size = int(key)
      run = pytorch.cifar_step(
        teacher_name, student_name, batch_size, device, autocast=way != "loop", compiled=way
      )
      began = time.perf_counter()
      for _ in range(3):
        run()
      synchronize(device)
      warm = time.perf_counter() - began
      rounds = []
      for _ in range(2 if settings.tiny else 7):
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < (0.05 if settings.tiny else 0.4):
          for _ in range(1 if settings.tiny else 10):
            run()
            count += 1
          synchronize(device)
        rounds.append((time.perf_counter() - began) / count)
      rounds.sort()
      each = rounds[len(rounds) // 2]
      emit(
        key,
        {
          "step_ms": 1e3 * each,
          "images_per_second": batch_size / each,
          "first_steps_seconds": warm,
          "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        },
      )

  return measure


def torch_device() -> str:
  """PyTorch's device: the accelerator where it has one."""
  import torch

  return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize(device: str) -> None:
  """Waits for PyTorch's device."""
  import torch

  if device == "cuda":
    torch.cuda.synchronize()


# 3. Students side by side.


def students(which: str) -> Callable[[Settings, Sequence[str], Emit], None]:
  """A step of so many students in one program: ``conv, way, students``."""

  def measure(settings: Settings, keys: Sequence[str], emit: Emit) -> None:
    import side_by_side

    from jaxdistill import data, networks

    batch_size = 16 if settings.tiny else 64
    if which == "digits":
      source = side_by_side.taught(digits(settings)[0], batch_size, data.DIGITS)
      make, given = (
        networks.models.ConvNet,
        {"channels": (8, 16, 16), "strides": (1, 2, 1), "dense": 64},
      )
    else:
      source = side_by_side.taught(made_up_cifar(256), batch_size, data.CIFAR)
      make, given = (
        networks.models.resnet8 if settings.tiny else networks.models.resnet8x4,
        {"num_classes": 100},
      )
    options = side_by_side.Options(
      steps=2 if settings.tiny else 20, repeats=1 if settings.tiny else 3
    )
    for key in keys:
      conv, way, count = key.split(", ")
      began = time.perf_counter()
      module = make(**given, conv=conv)
      # Steps one by one on a CPU, where a loop makes convolutions slow.
      ms = side_by_side.measure(source, module, way, not settings.tiny, int(count), options)
      emit(key, {"ms_a_student_step": ms, "seconds": time.perf_counter() - began})

  return measure


def made_up_cifar(count: int) -> Any:
  """Made-up images of CIFAR's size."""
  import numpy as np

  from jaxdistill import data

  rng = np.random.default_rng(0)
  images = rng.integers(0, 255, (count, 32, 32, 3)).astype(np.uint8)
  return data.from_arrays(images, rng.integers(0, 100, count), num_classes=100)


# 4. A sweep against PyTorch's, whole processes.


def sweeps(network: str, count: int) -> Callable[[Settings, Sequence[str], Emit], None]:
  """Seconds of whole processes; each key is a side of benchmarks/sweep.py."""

  def measure(settings: Settings, keys: Sequence[str], emit: Emit) -> None:
    import sweep

    options = sweep.Options(epochs=1 if settings.tiny else 30)
    file = pathlib.Path(settings.work) / "sweep.npz"
    if not file.is_file():
      examples, held_out, _ = digits(settings)
      sweep.prepare(options, file, examples, held_out)
    task = sweep.task_of(options, file, network, count)
    if settings.tiny:
      task = dataclasses.replace(task, temperatures=task.temperatures[:4])
    if importlib.util.find_spec("torch"):
      task = dataclasses.replace(task, device=torch_device())
    for key in keys:
      emit(key, sweep.measure(key, task, 1, 100))

  return measure


# 5. A cached teacher.


def cached(settings: Settings, keys: Sequence[str], emit: Emit) -> None:
  """An epoch's time over plain training's."""
  import cache

  options = cache.Options(
    rounds=3 if settings.tiny else 12,
    steps=1 if settings.tiny else 10,
    batch_size=8 if settings.tiny else 64,
    examples=64 if settings.tiny else 6400,
    pair=("resnet8", "resnet8") if settings.tiny else cache.PAIR,
    files=pathlib.Path(settings.work) / "cache"
    if importlib.util.find_spec("array_record")
    else None,
  )
  found = cache.compare(options)
  if options.files is None:
    found["left_out"] = "the cache in files: array_record is not installed"
  emit("epoch", found)


# 6. A loss over a large vocabulary.


def vocabulary(settings: Settings, keys: Sequence[str], emit: Emit) -> None:
  """Memory and time of value and gradient of soft targets at 8,192 tokens of 128,256 classes."""
  import jax
  import jax.numpy as jnp

  from jaxdistill import losses

  tokens, classes = (64, 512) if settings.tiny else (8192, 128_256)
  for key in keys:
    dtype = jnp.dtype(key)

    def loss(student: Any, teacher: Any) -> Any:
      return jnp.mean(losses.soft_target_kl(student, teacher, temperature=2.0))

    shape = jax.ShapeDtypeStruct((tokens, classes), dtype)
    run = jax.jit(jax.value_and_grad(loss)).lower(shape, shape).compile()
    used = run.memory_analysis()
    make = jax.jit(jax.random.normal, static_argnums=(1, 2))
    given = [make(jax.random.key(i), (tokens, classes), dtype) for i in range(2)]
    times = []
    for _ in range(4):
      began = time.perf_counter()
      jax.block_until_ready(run(*given))
      times.append(time.perf_counter() - began)
    emit(
      key,
      {
        "tokens": tokens,
        "classes": classes,
        "milliseconds": 1e3 * min(times[1:]),
        "logits_bytes": tokens * classes * dtype.itemsize,
        "temporary_bytes": used.temp_size_in_bytes,
        "peak_bytes": peak_bytes(),
      },
    )
    del given


# 7. CIFAR-100.


def cifar(settings: Settings, keys: Sequence[str], emit: Emit) -> None:
  """The published protocol, for the time that is left."""
  sys.path.insert(0, str(ROOT / "experiments"))
  import cifar100
  from jaxdistill import _extras, train

  folder = pathlib.Path(settings.work) / "cifar100"
  if settings.tiny:
    config = dataclasses.replace(
      cifar100.SHORT, teacher="resnet8", seeds=1, epochs=1, teacher_epochs=1, fraction=1
    )
    config = dataclasses.replace(config, batch_size=32, published=True)
  else:
    config = cifar100.Config(published=True, seeds=3)
  options = cifar100.Options(
    out=folder,
    data_dir=settings.data_dir,
    seeds_by="vmap" if not settings.tiny else "unroll",
    stop_after=settings.seconds,
  )
  began = time.perf_counter()
  done, left_out = False, None
  try:
    cifar100.main(config, options)
    done = True
  except train.Stopped as stopped:
    print(stopped)
  except _extras.MissingExtraError as missing:  # the report's, once everything is trained
    done, left_out = True, str(missing)
  found: dict[str, Any] = {"done": done, "seconds": time.perf_counter() - began, "runs": {}}
  if left_out is not None:
    found["left_out"] = left_out
  for name in ("teacher", "baseline", "student"):
    lines = folder / name / "metrics.jsonl"
    if lines.is_file() and lines.read_text().strip():
      last = json.loads(lines.read_text().splitlines()[-1])
      found["runs"][name] = {k: last[k] for k in ("step", "epoch", "loss", "examples_per_second")}
  found["done"] = done and "student" in found["runs"]
  if (folder / "report.json").is_file():
    found["report"] = json.loads((folder / "report.json").read_text())
  emit("training", found)


def parts(settings: Settings) -> list[Part]:
  """All parts, in order of worth."""
  sizes = tuple(map(str, pair(settings)[2]))
  counts = (2,) if settings.tiny else (1, 4, 8, 20)
  convolutions = ("lax",) if settings.tiny else ("lax", "patches")
  side_by_side = tuple(
    f"{conv}, {way}, {count}"
    for count in counts
    for conv in convolutions
    for way in ("vmap", "unroll")
    if count > 1 or way == "vmap"  # alone, there is nothing to be beside or after
  )
  sweep_counts = (20,) if settings.tiny else (300,)
  torch = ("torch",)
  found = [
    Part("machine", ("versions",), machine, 60),
    Part("smoke", ("run", "export"), smoke, 90),
    Part("tests", ("outcome",), tests, 120, ("pytest",)),
    Part("step, ours float32", sizes, step_ours("float32"), 100),
    Part("step, PyTorch loop", sizes, step_torch("loop"), 40, torch),
    Part("step, ours bfloat16", sizes, step_ours("bfloat16"), 100),
    Part("step, PyTorch autocast, channels last", sizes, step_torch("eager"), 40, torch),
    Part("step, PyTorch compiled", sizes, step_torch("default"), 90, torch),
    Part("step, PyTorch compiled, CUDA graphs", sizes, step_torch("reduce-overhead"), 90, torch),
    Part("students, ResNet-8x4", side_by_side, students("resnet"), 100),
    Part("students, digits", side_by_side, students("digits"), 80),
  ]
  for network in ("MLP", "ConvNet"):
    for count in sweep_counts:
      name = f"sweep, {count} {network}"
      found.append(Part(name, ("sweep",), sweeps(network, count), 60))
      peers = ("stacked", "processes", "precomputed", "pytorch")
      found.append(Part(name, peers, sweeps(network, count), 100, torch))
  found += [
    Part("cache", ("epoch",), cached, 80),
    Part("vocabulary", ("bfloat16", "float32"), vocabulary, 50),
    Part("cifar100", ("training",), cifar, 10_000, ("tensorflow_datasets", "tyro"), goes_on=True),
  ]
  if settings.tiny:
    # The same of everything, but each kind once.
    found = [
      p for p in found if p.name not in ("step, PyTorch compiled, CUDA graphs", "sweep, 20 ConvNet")
    ]
  return found


# The parent: what is missing, in order, each in a process of its own.


class Results:
  """``accelerator.json``: written anew after every figure, whole or not at all."""

  def __init__(self, folder: pathlib.Path) -> None:
    self.path = folder / "accelerator.json"
    self.body: dict[str, Any] = {"figures": {}, "left_out": {}, "failed": {}}
    if self.path.is_file():
      self.body = json.loads(self.path.read_text())

  @property
  def figures(self) -> dict[str, Any]:
    """What has been measured."""
    return self.body["figures"]

  def write(self) -> None:
    """Writes the file."""
    temporary = self.path.with_name(self.path.name + ".tmp")
    temporary.write_text(json.dumps(self.body, indent=1, default=str) + "\n")
    os.replace(temporary, self.path)

  def add(self, figure: str, value: Any, seconds: float) -> None:
    """Adds a figure."""
    at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    self.figures[figure] = {
      "value": value,
      "at": at,
      "after": round(seconds, 1),
      "commit": commit(),
      "source": source(),
    }
    self.body["failed"].pop(figure, None)
    self.body["left_out"].pop(figure, None)
    self.write()
    print(f"  {figure}: {summary(value)}", flush=True)

  def miss(self, kind: str, figures: Sequence[str], why: str) -> None:
    """Says why figures are not there: ``left_out`` or ``failed``."""
    for figure in figures:
      self.body[kind][figure] = why
    self.write()
    print(f"  {kind.replace('_', ' ')}: {', '.join(figures)}: {why}", flush=True)


@functools.cache
def source() -> str:
  """A digest of library and benchmarks: which code a figure is of, where git cannot tell."""
  digest = hashlib.sha256()
  for path in sorted([*(ROOT / "jaxdistill").rglob("*.py"), *HERE.glob("*.py")]):
    digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
  return digest.hexdigest()[:12]


@functools.cache
def commit() -> str | None:
  """The commit that library and benchmarks are of; None where git cannot tell, or they differ.

  A machine may get the files of one commit beside the history of another.
  """
  git = ["git", "-C", str(ROOT)]
  asked = ["status", "--porcelain", "--", "jaxdistill", "benchmarks/*.py"]
  changed = subprocess.run([*git, *asked], capture_output=True, text=True)
  if changed.returncode or changed.stdout.strip():
    return None
  made = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
  return made.stdout.strip() or None


def summary(value: Any) -> str:
  """A figure on a line."""
  text = json.dumps(value, default=str)
  return text if len(text) < 160 else text[:157] + "..."


def start(part: Part, keys: Sequence[str], settings: Settings, log: Any) -> subprocess.Popen[str]:
  """Starts a part's process. It ends itself, and all it started, once its standard input closes."""
  environment = {
    **os.environ,
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
  }
  told = json.dumps(dataclasses.asdict(settings))
  return subprocess.Popen(
    [sys.executable, __file__, "--child", part.name, *keys, "--settings", told],
    env=environment,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=log,
    text=True,
    start_new_session=True,
  )


def lines_until(process: subprocess.Popen[str], deadline: float) -> Iterator[str]:
  """A process's lines until it ends or its time is over; ends it, and all that it started."""
  found: queue.Queue[str | None] = queue.Queue()

  def read() -> None:
    for line in process.stdout:
      found.put(line)
    found.put(None)

  reader = threading.Thread(target=read, daemon=True)
  reader.start()
  try:
    while (line := found.get(timeout=max(0.01, deadline - time.monotonic()))) is not None:
      yield line
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(10)  # it has closed its output, and is about to leave
  except queue.Empty:
    raise TimeoutError from None
  finally:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    reader.join()
    process.stdin.close()
    process.stdout.close()


def run_part(
  part: Part, keys: Sequence[str], settings: Settings, results: Results, cap: float
) -> None:
  """Runs a part's process, and adds its figures as they come."""
  began, missing = time.monotonic(), list(keys)
  with open(pathlib.Path(settings.out) / "log.txt", "a") as log:
    log.write(f"== {part.name}: {', '.join(keys)}\n")
    log.flush()
    process = start(part, keys, settings, log)
    why = None
    try:
      for line in lines_until(process, began + cap):
        if not line.startswith(MARK):
          log.write(line)
          continue
        figure = json.loads(line[len(MARK) :])
        results.add(f"{part.name}/{figure['key']}", figure["value"], time.monotonic() - began)
        missing.remove(figure["key"])
    except TimeoutError:
      why = f"ended after {cap:.0f} s"
    if missing:
      why = why or f"the process left with {process.returncode}; see log.txt"
      results.miss("failed", [f"{part.name}/{key}" for key in missing], why)


def child(name: str, keys: Sequence[str], settings: Settings) -> None:
  """What a part's process does."""

  def watch() -> None:
    sys.stdin.read()  # until the parent is gone, however it went
    os.killpg(0, signal.SIGKILL)

  threading.Thread(target=watch, daemon=True).start()
  sys.path.insert(0, str(HERE))

  def emit(key: str, value: Any) -> None:
    if key in keys:  # what is kept already may be made again for another's sake, and is told once
      print(MARK + json.dumps({"key": key, "value": value}, default=str), flush=True)

  part = next(p for p in parts(settings) if p.name == name and set(keys) <= set(p.keys))
  part.measure(settings, keys, emit)


def earlier(results: Results, versions: dict[str, Any], folder: pathlib.Path) -> None:
  """Takes over the figures of the same device and versions that the checkout holds."""
  for path in sorted(folder.glob("accelerator*.json")):
    body = json.loads(path.read_text())
    theirs = body["figures"].get("machine/versions", {}).get("value", {})
    if any(theirs.get(key) != versions.get(key) for key in ("device", "jax", "torch")):
      print(f"  {path.name} is of {theirs.get('device')}, jax {theirs.get('jax')}: not taken over.")
      continue
    for figure, found in body["figures"].items():
      results.figures.setdefault(figure, found)
    results.write()
    print(f"  {len(body['figures'])} figures taken over from {path.name}.")


def unpack(settings: Settings, kept: pathlib.Path) -> None:
  """Brings item 7's training to where it goes on, from OUT or from the checkout."""
  folder = pathlib.Path(settings.work) / "cifar100"
  for place in (pathlib.Path(settings.out), kept / "runs"):
    archives = sorted(place.glob("cifar100*.tar"))
    if folder.is_dir() or not archives or settings.tiny:
      continue
    writing = folder.with_name("cifar100.writing")
    shutil.rmtree(writing, ignore_errors=True)
    for archive in archives:
      with tarfile.open(archive) as tar:
        tar.extractall(writing, filter="data")
    os.replace(writing / "cifar100", folder)
    print(f"  the training of CIFAR-100 goes on from {place}.")


def pack(settings: Settings) -> None:
  """Packs item 7's training: a file for each of its runs, small enough to be carried, and one more.

  Left out is what a killed process has left half written.
  """
  folder, out = pathlib.Path(settings.work) / "cifar100", pathlib.Path(settings.out)
  if not folder.is_dir():
    return
  runs = sorted(path for path in folder.iterdir() if path.is_dir())
  rest = sorted(path for path in folder.iterdir() if path.is_file())
  archives = {f"cifar100-{path.name}.tar": [path] for path in runs} | {"cifar100.tar": rest}

  def whole(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    half = any(part.endswith((".writing", ".tmp")) for part in member.name.split("/"))
    return None if half else member

  for name, paths in archives.items():
    temporary = out / f"{name}.tmp"
    with tarfile.open(temporary, "w") as tar:
      for path in paths:
        tar.add(path, f"cifar100/{path.name}", filter=whole)
    os.replace(temporary, out / name)


def run(settings: Settings, anew: Sequence[str], kept: pathlib.Path) -> Results:
  """Measures what is missing, in the time that there is."""
  over = time.monotonic() + settings.seconds
  out = pathlib.Path(settings.out)
  out.mkdir(parents=True, exist_ok=True)
  pathlib.Path(settings.work).mkdir(parents=True, exist_ok=True)
  results = Results(out)
  fresh = not results.figures
  unpack(settings, kept)
  again = {
    figure for part in parts(settings) for figure in part.figures if {part.name, figure} & set(anew)
  }
  for part in parts(settings):
    missing = [
      key
      for key, figure in zip(part.keys, part.figures, strict=True)
      if figure not in results.figures
      or figure in again
      or (part.goes_on and not results.figures[figure]["value"]["done"])
    ]
    if not missing:
      continue
    print(f"{part.name}: {', '.join(missing)}", flush=True)
    figures = [f"{part.name}/{key}" for key in missing]
    absent = [name for name in part.needs if importlib.util.find_spec(name) is None]
    if absent:
      results.miss("left_out", figures, f"not installed: {', '.join(absent)}")
      continue
    left = over - time.monotonic() - RESERVE
    if left < (0 if settings.tiny else LEAST):
      results.miss("left_out", figures, "no time was left")
      continue
    cap = min(part.cap * (4 if settings.tiny else 1), left)  # a CPU is slow to compile
    told = dataclasses.replace(settings, seconds=max(1.0, left - 15)) if part.goes_on else settings
    run_part(part, missing, told, results, cap)
    if part.goes_on:
      pack(settings)
    if part.name == "machine" and fresh and not settings.tiny:
      earlier(results, results.figures["machine/versions"]["value"], kept)
  return results


def installed(wheels: pathlib.Path, work: pathlib.Path) -> str:
  """The folder to import from: wheels are installed, without a network; others are as they are."""
  files = sorted(wheels.glob("*.whl"))
  if not files:
    return str(wheels)
  site = work / "site"
  if not site.is_dir():
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    made = site.with_name("site.writing")
    shutil.rmtree(made, ignore_errors=True)
    subprocess.run([*command, "--no-compile", "--target", made, *files], check=True)
    os.replace(made, site)
  return str(site)


# The tables of README.md.

TITLES = {
  "smoke": "a run, loaded and exported",
  "tests": "tests on the device",
  "step": "a distillation step",
  "students": "students side by side",
  "sweep": "a sweep of 300",
  "cache": "a cached teacher",
  "vocabulary": "a loss over 128,256 classes",
  "cifar100": "CIFAR-100, published",
}


def number(value: float) -> str:
  """Three significant digits."""
  return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """A Markdown table, numbers to the right."""
  shown = [[c if isinstance(c, str) else number(c) for c in row] for row in rows]
  rule = ["---"] + ["---:"] * (len(head) - 1)
  return "\n".join("| " + " | ".join(row) + " |" for row in [list(head), rule, *shown])


def tables(results: dict[str, Any]) -> str:
  """The figures of one machine as Markdown."""
  figures = {name: found["value"] for name, found in results["figures"].items()}
  at = {found["at"][:10] for found in results["figures"].values()}
  commits = sorted(
    {found["commit"] or f"of source {found['source']}" for found in results["figures"].values()}
  )
  about = figures.get("machine/versions", {})
  versions = ", ".join(f"{n} {about[n]}" for n in ("jax", "flax", "torch") if about.get(n))
  days = " to ".join(sorted({min(at), max(at)})) if at else "never"
  text = [
    f"**{about.get('device', 'an unknown device')}**, {versions}; {days}; "
    f"commit {', '.join(commits)}."
  ]

  def of(prefix: str) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if name.startswith(prefix)}

  if of("tests/"):
    found = figures["tests/outcome"]
    text.append(
      f"Tests on the device: {found['passed']} passed, {found['failed']} failed, "
      f"{found['skipped']} skipped."
    )
  if "smoke/run" in figures:
    found = figures["smoke/run"]
    beside = found["beside"]
    ran = "failed" if "error" in beside else f"differs by {beside['differs_by']:.2g}"
    text.append(
      f"A run of {found['steps']} steps took {found['seconds']:.1f} s; its student in a second "
      f"process beside it {ran}."
    )
  steps = of("step, ")
  if steps:
    rows = []
    for name, found in steps.items():
      side, size = name.removeprefix("step, ").rsplit("/", 1)
      ms = found.get("step_in_chunk_ms", found.get("step_ms"))
      over = found.get("over_the_floor", "–")
      began = found.get("compilation_seconds", found.get("first_steps_seconds"))
      rows.append([side, size, found["images_per_second"], ms, over, began])
    rows.sort(key=lambda row: (int(row[1]), -row[2]))
    head = [
      "a step, ResNet-32x4 into ResNet-8x4",
      "batch",
      "images a second",
      "ms",
      "over the floor",
      "first steps, s",
    ]
    text.append(table(head, rows))
  for name in ("ResNet-8x4", "digits"):
    found = of(f"students, {name}/")
    if found:
      keys = [key.split("/", 1)[1].rsplit(", ", 1) for key in found]
      counts = sorted({int(count) for _, count in keys})
      ways = sorted({way for way, _ in keys})
      rows = []
      for way in ways:
        row = [found.get(f"students, {name}/{way}, {c}") for c in counts]
        rows.append([way, *("–" if r is None else r["ms_a_student_step"] for r in row)])
      text.append(table([f"ms a student-step, {name}; students:", *map(str, counts)], rows))
  found = of("sweep, ")
  if found:
    rows = []
    for name, value in found.items():
      what, side = name.removeprefix("sweep, ").split("/")
      own = figures.get(f"sweep, {what}/sweep")
      ratio = value["seconds"] / own["seconds"] if own else "–"
      rows.append([f"{what}, {side}", value["seconds"], ratio])
    text.append(table(["whole processes", "seconds", "of the sweep"], rows))
  if "cache/epoch" in figures:
    rows = [
      [n, v["seconds an epoch"], v["of plain"]] for n, v in figures["cache/epoch"]["sides"].items()
    ]
    text.append(table(["an epoch of 50,000", "seconds", "of plain"], rows))
    if "left_out" in figures["cache/epoch"]:
      text.append(f"Left out: {figures['cache/epoch']['left_out']}.")
  if of("vocabulary/"):
    rows = [
      [n.split("/")[1], v["milliseconds"], v["logits_bytes"] / 1e9, v["temporary_bytes"] / 1e9]
      for n, v in of("vocabulary/").items()
    ]
    text.append(table(["soft targets, 8,192 x 128,256", "ms", "logits, GB", "temporary, GB"], rows))
  if "cifar100/training" in figures:
    found = figures["cifar100/training"]
    rows = [[n, v["epoch"], v["examples_per_second"]] for n, v in found["runs"].items()]
    text.append(
      table(
        [f"CIFAR-100, {'done' if found['done'] else 'under way'}", "epochs", "images a second"],
        rows,
      )
    )
  missing: dict[tuple[str, str], list[str]] = {}
  for figure, why in {**results["left_out"], **results["failed"]}.items():
    part, key = figure.rsplit("/", 1)
    missing.setdefault((part, why), []).append(key)
  if missing:
    rows = "; ".join(f"{part}/{', '.join(keys)} ({why})" for (part, why), keys in missing.items())
    text.append(f"Not measured there: {rows}.")
  return "\n\n".join(text)


def sweep_table(found: dict[str, Any]) -> str:
  """The figures of benchmarks/sweep.py: the fastest program in PyTorch first, whichever it is."""
  import sweep

  peers = [*sweep.PYTORCH, "alone"]
  rows = []
  for name, sides in found["students"].items():
    network, count = name.split("/")
    own = sides["sweep"]["seconds"]

    def shown(side: str, sides: Any = sides, own: float = own) -> str:
      if side not in sides:
        return "–"
      seconds = sides[side]["seconds"]
      return f"{number(seconds)} ({number(seconds / own)})"

    there = [side for side in sweep.PYTORCH if side in sides]
    best = min(there, key=lambda side: sides[side]["seconds"]) if there else None
    first = "–" if best is None else f"{shown(best)}, {sweep.NAMES[best].removeprefix('PyTorch, ')}"
    kind = {"MLP": "MLPs", "ConvNet": "convolutional"}[network]
    programs = sides["sweep"].get("compilations", "–")
    rows.append([f"{count} {kind}", number(own), programs, first, *map(shown, peers)])
  named = [sweep.NAMES[side].removeprefix("PyTorch, ") for side in peers]
  about = found["environment"]
  hardware = f"{about['cores']} cores, {about['processor']}, jax {about['jax']}"
  return f"{hardware}.\n\n" + table(
    ["students", "sweep", "programs compiled", "fastest PyTorch", *named], rows
  )


def vocabulary_table(found: dict[str, Any]) -> str:
  """The figures of benchmarks/vocabulary.py: bytes and seconds of each side, over naive's."""
  cells = sorted(found["cells"], key=lambda cell: (cell["vocabulary"], cell["tokens"]))
  ours = list(dict.fromkeys(side for cell in cells for side in cell.get("bytes", {})))
  timed = list(dict.fromkeys(side for cell in cells for side in cell.get("seconds", {})))

  def shown(values: dict[str, float], side: str) -> str:
    if side not in values:
      return "–"
    over = "" if side == "naive" else f" ({values[side] / values['naive']:.2f})"
    return f"{number(values[side])}{over}"

  rows = []
  for cell in cells:
    used = {side: sum(parts.values()) / 1e9 for side, parts in cell.get("bytes", {}).items()}
    took = cell.get("seconds", {})
    cost = [shown(used, side) for side in ours] + [shown(took, side) for side in timed]
    rows.append([f"{cell['vocabulary']:,}", f"{cell['tokens']:,}", *cost])
  about, options = found["environment"], found["options"]
  hardware = f"{about['cores']} cores, {about['processor']}, jax {about['jax']}"
  grown = "; ".join(
    f"{side} {slope['with bfloat16 in and out']:.3f}"
    for side, slope in found["megabytes a token"].items()
  )
  return "\n\n".join(
    [
      f"{hardware}. Widths {options['memory_width']:,} (student) and "
      f"{options['memory_teacher_width']:,} for memory, {options['width']} and "
      f"{options['teacher_width']} for seconds.",
      table(
        ["words", "tokens", *(f"GB, {side}" for side in ours), *(f"s, {side}" for side in timed)],
        rows,
      ),
      *([f"MB a token with bfloat16 in and out, at the most words: {grown}."] if grown else []),
    ]
  )


def write_tables(readme: pathlib.Path, kept: pathlib.Path) -> None:
  """Puts the tables of the results between their marks in README.md."""
  sys.path.insert(0, str(HERE))
  found = [json.loads(path.read_text()) for path in sorted(kept.glob("accelerator*.json"))]
  bodies = {"accelerator": "\n\n".join(tables(results) for results in found)}
  if not found:
    listed = "; ".join(TITLES.values())
    bodies["accelerator"] = f"Nothing has been measured on an accelerator yet: {listed}."
  if (kept / "sweep.json").is_file():
    bodies["sweep"] = sweep_table(json.loads((kept / "sweep.json").read_text()))
  if (kept / "vocabulary.json").is_file():
    bodies["vocabulary"] = vocabulary_table(json.loads((kept / "vocabulary.json").read_text()))
  text = readme.read_text()
  for name, body in bodies.items():
    marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not marked.search(text):
      raise SystemExit(f"{readme} has no place for its table: <!-- {name} --> ... <!-- end -->.")
    text = marked.sub(lambda found, body=body: f"{found[1]}{body}\n{found[2]}", text)
  readme.write_text(text)
  print(f"wrote the tables of {', '.join(bodies)} into {readme}")


def main(words: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--seconds", type=float, default=420.0, help="the whole budget")
  parser.add_argument(
    "--out", type=pathlib.Path, default=ROOT / "runs" / "accelerator", help="where figures go"
  )
  parser.add_argument(
    "--work", type=pathlib.Path, help="where trainings and caches lie; OUT-work by default"
  )
  parser.add_argument(
    "--data-dir", help="a TFDS data_dir that holds CIFAR-100; its own default when left out"
  )
  parser.add_argument(
    "--wheels", type=pathlib.Path, help="a folder of wheels, or one they were installed into"
  )
  parser.add_argument(
    "--kept", type=pathlib.Path, default=HERE / "results", help="figures of earlier days"
  )
  parser.add_argument(
    "--anew",
    nargs="*",
    default=[],
    metavar="PART",
    help="parts or figures to measure again, by name",
  )
  parser.add_argument(
    "--tiny", action="store_true", help="all items, as small as they get, on a CPU"
  )
  parser.add_argument(
    "--tables", action="store_true", help="write README.md's tables from the figures, and leave"
  )
  parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
  parser.add_argument("--settings", help=argparse.SUPPRESS)
  given = parser.parse_args(words)
  if given.child:
    child(given.child[0], given.child[1:], Settings(**json.loads(given.settings)))
    return
  if given.tables:
    write_tables(HERE / "README.md", given.kept)
    return
  out = given.out.resolve()
  settings = Settings(
    out=str(out),
    work=str((given.work or out.with_name(out.name + "-work")).resolve()),
    data_dir=given.data_dir and os.path.abspath(given.data_dir),
    tiny=given.tiny,
    seconds=given.seconds,
  )
  if given.wheels is not None:
    site = installed(given.wheels.resolve(), pathlib.Path(settings.work))
    os.environ["PYTHONPATH"] = os.pathsep.join([site, os.environ.get("PYTHONPATH", "")])
    sys.path.insert(0, site)
  names = {name for part in parts(settings) for name in (part.name, *part.figures)}
  unknown = sorted(set(given.anew) - names)
  if unknown:
    parser.error(f"--anew {unknown}: there are {sorted({p.name for p in parts(settings)})}")
  began = time.monotonic()
  results = run(settings, given.anew, given.kept)
  every = {figure for part in parts(settings) for figure in part.figures}
  there = every & set(results.figures)
  print(f"{len(there)} of {len(every)} figures in {results.path}, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
  main()
