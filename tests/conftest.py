"""How every test runs: two fake devices, shapes checked, rank promotion and warnings as errors.

With ``JAXDISTILL_TEST_DEVICE=1`` in the environment the tests run on whatever device JAX finds, for
``pytest -m device``: those that an accelerator can change.
"""

import importlib
import importlib.metadata
import importlib.util
import itertools
import os
import pathlib
import tempfile

ON_DEVICE = os.environ.get("JAXDISTILL_TEST_DEVICE") == "1"
# The tests compile much and compute little, so the compiler is told not to try hard.
flags = os.environ.get("XLA_FLAGS", "")
wanted = [
  ("--xla_force_host_platform_device_count", "2"),
  ("--xla_backend_optimization_level", "0"),
  ("--xla_llvm_disable_expensive_passes", "true"),
]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones end at a flag unknown
  wanted.append(("--xla_cpu_use_fusion_emitters", "false"))
if ON_DEVICE:  # values are compared with float64's to float32's precision, not to TF32's
  os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
else:
  for flag, value in wanted:
    if flag not in flags:
      flags += f" {flag}={value}"
  os.environ["XLA_FLAGS"] = flags.strip()
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
# One cache of compiled programs for a session and its workers: many tests compile the same ones.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  cache = tempfile.TemporaryDirectory(prefix="compiled")  # removed at exit by whoever made it
  os.environ["JAX_COMPILATION_CACHE_DIR"] = cache.name
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
  os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# What is kept for a user between processes is none of the tests', and none of theirs is kept.
if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker has the folder of who started it
  user = tempfile.TemporaryDirectory(prefix="user")
  os.environ["XDG_CACHE_HOME"] = user.name

import jax
import pytest

# Annotated shapes are checked at every call, in the tests only; a machine that is there for its
# device may lack the checker.
if importlib.util.find_spec("beartype") or not ON_DEVICE:
  importlib.import_module("typecheck").install()

jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = pathlib.Path(__file__).parent.parent
# Seconds of CPU from which a test is named at the end unless it is marked slow, which is how a
# suite that is run all the time is kept short. Not held: a slow machine would fail it.
NAMED = 5.0
SPENT = pytest.StashKey[float]()
SHARED_TFDS = pathlib.Path(os.environ.get("TFDS_DATA_DIR", ROOT.parent / "shared" / "tfds"))


@pytest.fixture
def strict_promotion():
  """Strict dtype promotion; not global, since optax and Flax's norms break under it."""
  with jax.numpy_dtype_promotion("strict"):
    yield


@pytest.fixture(scope="session")
def tfds_dir():
  """A folder with prepared TFDS sets (CIFAR-100 among them), which cannot be made here."""
  if not (SHARED_TFDS / "cifar100").is_dir():
    pytest.skip(f"no prepared CIFAR-100 under {SHARED_TFDS} (set TFDS_DATA_DIR)")
  return SHARED_TFDS


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marks
def pytest_collection_modifyitems(config, items):
  """What is marked ``slow_but`` is slow, but for the cases that the mark names."""
  unseen = {}
  for item in items:
    if mark := item.get_closest_marker("slow_but"):
      case = item.callspec.id
      unseen.setdefault(f"{item.path.name}::{item.originalname}", {*mark.args}).discard(case)
      if case not in mark.args:
        item.add_marker("slow")
  lost = {name: cases for name, cases in unseen.items() if cases}
  if lost and not any("::" in argument for argument in config.args):
    raise pytest.UsageError(f"slow_but names cases that there are not: {lost}")


def spent():
  """Seconds of CPU that this process has used, and the children that it waited for."""
  return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
  item.stash[SPENT] = spent()
  return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
  """A test's setup, call and teardown tell what they cost; workers send it with the rest."""
  report, now = (yield), spent()
  report.cpu, item.stash[SPENT] = now - item.stash[SPENT], now
  return report


def pytest_terminal_summary(terminalreporter):
  """The CPU that the tests took, and which of them the README's command should not run."""
  costs, slow = {}, set()
  for report in itertools.chain.from_iterable(terminalreporter.stats.values()):
    if hasattr(report, "cpu"):
      costs[report.nodeid] = costs.get(report.nodeid, 0.0) + report.cpu
      slow |= {report.nodeid} if "slow" in report.keywords else set()
  if not costs:
    return
  terminalreporter.section(f"{sum(costs.values()):.0f} s of CPU in {len(costs)} tests")
  for name, cost in sorted(costs.items(), key=lambda item: -item[1]):
    if cost > NAMED and name not in slow:
      terminalreporter.line(f"{cost:5.1f} s, and not marked slow: {name}")
