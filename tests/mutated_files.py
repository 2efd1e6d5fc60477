"""Files of ours that somebody broke, or wrote with care: what each reader makes of them.

    python tests/mutated_files.py 2000 --seed 0

makes one of each artefact (a run's folder, its checkpoints and student, a cache, a report, exports,
weights, decoded data), breaks a copy of one in one of many ways (with its digests made right again
in half of them), has the public reader read it, and prints every case in which

- what comes back is neither the artefact nor an error that the reader's docstring names, raised by
  jaxdistill, with the path or the name of a file in it;
- a file outside of the artefact's folder was opened or changed, by Python or by a library;
- it took more memory than ten times what lies in the folder (and what any reading takes, `FREE`);
- the process died, or was not done after a minute.

The reading is done by a process of its own, which is started again where a file ends it. Linux
alone, for its ways to see what a process takes. The exit code is 1 where anything was found.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
OURS = str(ROOT / "jaxdistill")
if __name__ == "__main__":  # the package of this checkout, and its tests' helpers
  sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  os.environ.setdefault("MPLBACKEND", "agg")

import numpy as np

# Reading compiles programs and draws pictures: no file decides that. What is to be found are files
# that claim a gigabyte.
FREE = 64 * 2**20
SECONDS = 60


@dataclasses.dataclass(frozen=True)
class Case:
  """How an artefact is read.

  Attributes:
    read: reads a folder, and returns something that equals itself where the artefact is whole.
    says: the functions whose docstrings name the errors.
    sealed: whether digests cover every byte, so that what is read is what was written or an error.
    links: whether the caller names the file itself, or one that its index names, and may so name a
      link; everything else is named by us, or by a file.
  """

  read: Callable[[pathlib.Path], Any]
  says: tuple[Any, ...]
  sealed: bool = False
  links: bool = False


def cases() -> dict[str, Case]:
  """The readers by artefact."""
  import jaxdistill as jd
  from jaxdistill import export, reports, runs, search, teachers
  from jaxdistill.data import _kept
  from jaxdistill.evaluation import predictions
  from jaxdistill.networks import weights
  from jaxdistill.teachers import command

  network, source, teacher = small_network(), small_source(), small_teacher()
  inputs = np.zeros((2, 4), np.float32)

  def checkpoints(folder: pathlib.Path) -> Any:
    if not all((folder / str(step) / "manifest.json").is_file() for step in (2, 4)):
      return None  # one without a manifest is half written, and the others are what there is
    with runs.Checkpoints(folder) as saved:
      steps = saved.steps(), saved.best(), saved.latest()
      each = [
        (saved.items(s), saved.metadata(s), runs.fingerprint(saved.restore(s))) for s in steps[0]
      ]
    return steps, each

  def run(folder: pathlib.Path) -> Any:
    return runs.fingerprint(teachers.restore(folder, network).variables)

  def goes_on(folder: pathlib.Path) -> Any:
    fitted = train(folder, steps=4)
    return runs.fingerprint(fitted.variables)

  def student(folder: pathlib.Path) -> Any:
    return np.asarray(export.load_student(folder)(inputs)).tolist()

  def cache(folder: pathlib.Path) -> Any:
    made = teachers.cached(teacher, source, folder=folder, progress=None)
    return runs.fingerprint(made.teacher)

  def dropped(folder: pathlib.Path) -> Any:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
      return command.main(["verify", str(folder), "--drop"])

  def report(folder: pathlib.Path) -> Any:
    reports.render_report(folder)

  def compared(folder: pathlib.Path) -> Any:
    return reports.compare_runs(folder / "a", folder / "b", resamples=100) and None

  def answers(folder: pathlib.Path) -> Any:
    return len(predictions.load(folder / "predictions.npz"))

  def kept(folder: pathlib.Path) -> Any:
    return runs.fingerprint(_kept.kept(folder, "set", {"a": 1}, decoded))

  return {
    "config": Case(lambda f: runs.read_config(f) and None, (runs.read_config,)),
    "metrics": Case(lambda f: runs.read_metrics(f) and None, (runs.read_metrics,)),
    "checkpoints": Case(
      checkpoints,
      (runs.Checkpoints.restore, runs.Checkpoints.items, runs.Checkpoints.metadata),
      True,
    ),
    "run": Case(run, (teachers.restore,)),
    "resumed": Case(goes_on, (jd.fit,)),
    "variables": Case(
      lambda f: runs.fingerprint(runs.load_variables(f)), (runs.load_variables,), True
    ),
    "student": Case(student, (export.load_student,), True),
    "cache": Case(cache, (teachers.cached,), True),
    "verified": Case(lambda f: str(teachers.verify_cache(f)) and None, (teachers.verify_cache,)),
    "dropped": Case(dropped, (teachers.verify_cache,)),
    "report": Case(report, (reports.render_report,)),
    "compared": Case(compared, (reports.compare_runs,)),
    "answers": Case(answers, (predictions.load,)),
    "columns": Case(
      lambda f: predictions.read_columns(f / "a.csv") and None,
      (predictions.read_columns,),
      links=True,
    ),
    "exports": Case(lambda f: export.verify_exports(f) and None, (export.verify_exports,)),
    "safetensors": Case(
      lambda f: runs.fingerprint(weights.safetensors(f)), (weights.safetensors,), links=True
    ),
    "msgpack": Case(
      lambda f: runs.fingerprint(weights.msgpack(f / "a.msgpack")), (weights.msgpack,), links=True
    ),
    "orbax": Case(lambda f: runs.fingerprint(weights.orbax(f / "a")), (weights.orbax,)),
    "kept": Case(kept, (), True),
    "choice": Case(lambda f: search.read_choice(f) and None, (search.read_choice,)),
  }


def decoded() -> dict[str, Any]:
  return {
    "inputs": np.arange(3000).reshape(100, 30),
    "ids": np.array([f"a{i}" for i in range(100)]),
  }


def small_network() -> Any:
  import flax.linen as nn

  from jaxdistill import networks

  return networks.linen(nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)]), name="small")


def small_source() -> Any:
  from jaxdistill import data

  x = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
  examples = data.from_arrays(x, np.argmax(x[:, :3], axis=1), name="made")
  return data.on_device(examples, batch_size=20, data_seed=0)


def small_teacher() -> Any:
  import jax
  import jax.numpy as jnp

  from jaxdistill import teachers
  from jaxdistill.types import Model

  network = small_network()
  return teachers.frozen(Model(network, network.init(jax.random.key(0), jnp.zeros((1, 4)))))


def train(folder: pathlib.Path, steps: int) -> Any:
  import optax

  import jaxdistill as jd

  return jd.fit(
    small_network(),
    jd.recipes.labels(),
    data=small_source(),
    optimizer=optax.adam(1e-2),
    steps=steps,
    watch=jd.train.Watch(log_every=2),
    run=jd.train.Run(folder, checkpoint_every=2, progress=None),
  )


def make(place: pathlib.Path) -> None:
  """Writes one of each artefact, each in a folder of its own."""
  import flax.serialization
  import jax
  from orbax.checkpoint import v1 as ocp

  import fabricated
  from jaxdistill import data, export, runs, teachers
  from jaxdistill.data import _kept
  from jaxdistill.networks import weights

  for name in cases():
    (place / name).mkdir()
  fitted = train(place / "run", steps=4)
  variables = jax.tree.map(np.asarray, fitted.variables)
  for name in ("resumed", "student", "config", "metrics", "checkpoints"):
    inside = place / "run" / ("checkpoints" if name == "checkpoints" else "")
    shutil.copytree(inside, place / name, dirs_exist_ok=True)
  for left in ("checkpoints", "metrics.jsonl"):
    shutil.rmtree(place / "student" / left, ignore_errors=True)
  some = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
  examples = data.from_arrays(some, np.argmax(some[:, :3], axis=1), name="held out")
  export.export(place / "run", examples, kinds=["safetensors"], check=export.Check(seconds=0.02))
  shutil.copytree(place / "run" / "exports", place / "exports" / "exports")
  shutil.rmtree(place / "run" / "exports")
  runs.save_variables(place / "variables" / "a", variables)
  shutil.copytree(place / "variables" / "a", place / "variables", dirs_exist_ok=True)
  shutil.rmtree(place / "variables" / "a")
  for name in ("cache", "verified", "dropped"):
    made = teachers.cached(small_teacher(), small_source(), folder=place / name, progress=None)
    assert made.teacher
  columns = "font,size\n" + "serif,1\n" * 400
  found = fabricated.gathered(60)
  for folder in (place / "report", place / "compared" / "a", place / "compared" / "b"):
    fabricated.run(folder, found, pages=folder.name == "report")
    fabricated.exported(folder)
    (folder / "budget.json").write_text('{"limits": {"bytes": 500}, "costs": {"bytes": 400}}')
    (folder / "preflight.json").write_text('[{"check": "a", "message": "b", "fix": "c"}]')
  shutil.copy(place / "report" / "predictions.npz", place / "answers")
  (place / "columns" / "a.csv").write_text(columns)
  runs.write_json(place / "choice" / "budget.json", {"chosen": "a", "costs": {"bytes": 4}})
  halves = {"a": {"params/a/kernel": np.ones((3, 4))}, "b": {"params/b/kernel": np.ones(5)}}
  for name, tensors in halves.items():
    weights.save_safetensors(place / "safetensors" / f"{name}.safetensors", tensors)
  named = {tensor: f"{file}.safetensors" for file, tensors in halves.items() for tensor in tensors}
  index = {"metadata": {}, "weight_map": named}
  (place / "safetensors" / "model.safetensors.index.json").write_text(json.dumps(index))
  (place / "msgpack" / "a.msgpack").write_bytes(flax.serialization.to_bytes(variables))
  ocp.save_pytree(place / "orbax" / "a", variables)
  _kept.kept(place / "kept", "set", {"a": 1}, decoded)


# --- How a file is broken ---------------------------------------------------------------------

DEEP = "[" * 100_000
WIDE = "[" + "{}," * 2_000_000 + "0]"
VALUES: tuple[Any, ...] = (
  None, True, -1, 0, 3, 2**31, 2**63, 10**12, 10**400, 1.5, -0.0, 1e308, float("nan"), float("inf"),
  "", "text", "..", "../outside/whole", "{outside}/whole", "link/whole", "a\0b", "\ud800", "|O",
  "<f8", "float32", "1" * 5000, [], {}, [[]], [1, "a", None], [10**12], [-1], {"a": {"b": []}},
  DEEP, WIDE,
)  # fmt: skip
BITS = ("bits", "cut", "empty", "longer", "zeros", "noise", "repeated")
FILES = ("missing", "link", "hard", "loop", "folder", "pipe", "extra", "folder link")


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def mutate(dice: random.Random, folder: pathlib.Path, outside: pathlib.Path) -> str:
  """Breaks a folder in one way, which is returned in words."""
  every = files_of(folder)
  texts = [p for p in every if p.suffix in (".json", ".jsonl") or "METADATA" in p.name]
  path = dice.choice(texts if texts and dice.random() < 0.6 else every)
  name = path.relative_to(folder).as_posix()
  kind = dice.choice(("json", "json", "json", "bits", "format", "file"))
  shutil.copyfile(dice.choice(every), outside / "whole")
  if kind == "json" and path in texts:
    (folder / "link").symlink_to(outside)
    what = _json(dice, path, outside)
  elif kind == "format" and path.suffix in (".npz", ".safetensors"):
    what = _npz(dice, path) if path.suffix == ".npz" else _safetensors(dice, path, outside)
  elif kind == "file":
    what = _file(dice, path, folder, outside)
  else:
    what = _bits(dice, path)
  again = dice.random() < 0.5
  if again:
    seal(folder, changed=path if path.exists() else None)
  return f"{name}: {what}{', digests made right' if again else ''}"


def _bits(dice: random.Random, path: pathlib.Path) -> str:
  content, how = bytearray(path.read_bytes()), dice.choice(BITS)
  at = dice.randrange(len(content) + 1)
  if how == "bits":
    for _ in range(dice.randrange(1, 9)):
      if content:
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
  elif how == "cut":
    del content[at:]
  elif how == "empty":
    content.clear()
  elif how == "longer":
    content += dice.randbytes(dice.randrange(1, 100))
  elif how == "repeated":
    content[at:at] = content[:at]
  else:
    piece = slice(at, at + dice.randrange(1, 200))
    content[piece] = (
      bytes(len(content[piece])) if how == "zeros" else dice.randbytes(len(content[piece]))
    )
  path.write_bytes(content)
  return f"{how} at {at}"


def _nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
  yield path
  children = (
    value.items()
    if isinstance(value, dict)
    else enumerate(value)
    if isinstance(value, list)
    else ()
  )
  for key, child in children:
    yield from _nodes(child, (*path, key))


def _changed(dice: random.Random, value: Any, outside: pathlib.Path) -> tuple[Any, str]:
  """A JSON value with one of its parts replaced, left out or given another name."""
  path = dice.choice(list(_nodes(value)))
  new = dice.choice(VALUES)
  new = new.replace("{outside}", str(outside)) if isinstance(new, str) else new
  if not path:
    return new, f"all of it {new!r:.40}"
  node = value
  for key in path[:-1]:
    node = node[key]
  how = dice.choice(("replaced", "replaced", "replaced", "left out", "renamed"))
  if how == "left out":
    del node[path[-1]]
  elif how == "renamed" and isinstance(node, dict):
    node[str(new)] = node.pop(path[-1])
  else:
    node[path[-1]] = new
  return value, f"{'.'.join(map(str, path))} {how}, {new!r:.40}"


def _json(dice: random.Random, path: pathlib.Path, outside: pathlib.Path) -> str:
  lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
  at = dice.randrange(len(lines))
  changed, what = _changed(dice, json.loads(lines[at]), outside)
  lines[at] = _text(changed)
  path.write_text("\n".join(lines))
  return what


def _text(value: Any) -> str:
  """JSON, with what Python would not write."""
  text = json.dumps(value)
  for raw in (DEEP, WIDE):
    text = text.replace(json.dumps(raw), raw)
  return text


def _npz(dice: random.Random, path: pathlib.Path) -> str:
  how = dice.choice(
    ("objects", "claims", "negative", "bomb", "left out", "outside", "twice", "swapped", "text")
  )
  with zipfile.ZipFile(path) as archive:
    members = {name: archive.read(name) for name in archive.namelist()}
  victim = dice.choice(sorted(members))
  header = {"descr": "<f8", "fortran_order": False, "shape": (10**12,)}
  if how == "objects":
    header = {**header, "descr": "|O", "shape": (1,)}
  elif how == "negative":
    header["shape"] = (-1,)
  elif how == "bomb":
    header["shape"] = (2**26,)
  made = io.BytesIO()
  np.lib.format.write_array_header_1_0(made, header)
  content = made.getvalue() + (bytes(2**29) if how == "bomb" else b"")
  if how == "left out":
    del members[victim]
  elif how == "swapped":
    members[victim] = members[dice.choice(sorted(members))]
  elif how == "text":
    members[victim] = _npy(np.array(["a", "b"]))
  elif how not in ("outside", "twice"):
    members[victim] = content
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a name that is there twice
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
      for name, data in members.items():
        archive.writestr(f"../{name}" if how == "outside" and name == victim else name, data)
      if how == "twice":
        archive.writestr(victim, _npy(np.arange(3)))
  return f"{victim} {how}"


def _npy(array: np.ndarray) -> bytes:
  made = io.BytesIO()
  np.save(made, array)
  return made.getvalue()


def _safetensors(dice: random.Random, path: pathlib.Path, outside: pathlib.Path) -> str:
  content = path.read_bytes()
  size = int.from_bytes(content[:8], "little")
  changed, what = _changed(dice, json.loads(content[8 : 8 + size]), outside)
  head = _text(changed).encode()
  path.write_bytes(len(head).to_bytes(8, "little") + head + content[8 + size :])
  return f"head {what}"


def _file(
  dice: random.Random, path: pathlib.Path, folder: pathlib.Path, outside: pathlib.Path
) -> str:
  how = dice.choice(FILES)
  if how == "extra":
    path.with_name(path.name + ".extra").write_bytes(b"extra")
    return how
  # The caller may name a link to a folder; one below a manifest is the manifest's to name.
  if how == "folder link" and (path.parent.parent / "manifest.json").exists():
    path = path.parent
  target = outside / "whole" if path.is_file() else outside / "folder"
  (shutil.copyfile if path.is_file() else shutil.copytree)(path, target)
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.unlink()
  if how in ("link", "folder link"):
    path.symlink_to(target)
  elif how == "hard":  # not to be told from a file, and so none of ours to refuse
    path.hardlink_to(target)
    target.unlink()
  elif how == "loop":
    path.symlink_to(path)
  elif how == "folder":
    path.mkdir()
  elif how == "pipe" and path.suffix not in (".csv", ".msgpack"):  # the caller's own to wait for
    os.mkfifo(path)
  return how


def seal(folder: pathlib.Path, changed: pathlib.Path | None) -> None:
  """Makes every size and digest in a folder right again, the innermost manifests first."""
  from jaxdistill import runs

  def entries(value: Any, path: pathlib.Path) -> None:
    if not isinstance(value, dict):
      for one in value if isinstance(value, list) else ():
        entries(one, path)
      return
    beside = value.get("file", path.with_suffix(".npz").name)
    if (
      "sha256" in value
      and isinstance(beside, str)
      and (path.parent / beside.replace("\0", "")).is_file()
    ):
      value |= {k: v for k, v in runs.size_and_digest(path.parent / beside).items() if k in value}
    for one in value.values():
      entries(one, path)

  manifests = [p for p in files_of(folder) if p.suffix == ".json"]
  for path in sorted(manifests, key=lambda p: -len(p.parts)):
    try:
      body = json.loads(path.read_text())
    except (ValueError, RecursionError):
      continue
    if not isinstance(body, dict) or not ("digest" in body or path.name == "exports.json"):
      continue
    if path != changed:
      entries(body, path)
      for name in body["files"] if isinstance(body.get("files"), dict) else ():
        if (path.parent / name).is_file():
          body["files"][name] = runs.size_and_digest(path.parent / name)
    if "digest" in body:
      body["digest"] = runs.digest(body)
    path.write_text(json.dumps(body))


# --- What comes of it -------------------------------------------------------------------------


class Watch:
  """What this process opens and changes, told by Python's audit hook and by the files' times."""

  # What a reading process opens anyway: the interpreter, libraries, what the system says of itself.
  FREELY = ("/proc", "/sys", "/dev", "/usr", "/lib", "/etc/mime", "/etc/localtime")
  CHANGES = (
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.symlink",
    "os.link",
    "os.truncate",
    "shutil.rmtree",
  )

  def __init__(self, work: pathlib.Path) -> None:
    self.folder: str | None = None
    self.seen: list[str] = []
    places = (sys.prefix, sys.base_prefix, str(ROOT), tempfile.gettempdir(), *sys.path)
    places += (os.environ.get("JAX_COMPILATION_CACHE_DIR", ""),)  # where the tests keep programs
    self.free = [os.path.realpath(place) for place in places if place]
    self.work = os.path.realpath(work)
    sys.addaudithook(self)

  def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
    if self.folder is None or (event != "open" and event not in self.CHANGES):
      return
    paths = arguments[:2] if event in ("os.rename", "os.link") else arguments[:1]
    for path in paths:
      if isinstance(path, str | bytes | os.PathLike) and os.fspath(path):
        self._look(event, os.fsdecode(path))

  def _look(self, event: str, path: str) -> None:
    # A name is changed and not what it leads to; what is opened is what it leads to.
    real = (
      os.path.realpath(path)
      if event == "open"
      else os.path.join(os.path.realpath(os.path.dirname(path) or "."), os.path.basename(path))
    )
    inside = real == self.folder or real.startswith(f"{self.folder}/")
    freely = any(real.startswith(place) for place in (*self.free, *self.FREELY))
    if not inside and (real.startswith(self.work) or not freely) and not self._temporary(real):
      self.seen.append(f"{event} {real}")

  def _temporary(self, real: str) -> bool:
    return real.startswith(os.path.join(self.work, "temporary"))

  @contextlib.contextmanager
  def over(self, folder: pathlib.Path, outside: pathlib.Path) -> Iterator[list[str]]:
    for path in files_of(outside):
      os.utime(path, (0, path.stat().st_mtime))
    before = {path: path.stat() for path in files_of(outside)}
    self.seen, self.folder = [], os.path.realpath(folder)
    try:
      yield self.seen
    finally:
      self.folder = None
      after = {path: path.stat() for path in files_of(outside)}
      for path in sorted({*before, *after}):
        if path not in after or path not in before:
          self.seen.append(f"made or removed {path}")
        elif (
          after[path].st_mtime != before[path].st_mtime
          or after[path].st_size != before[path].st_size
        ):
          self.seen.append(f"written {path}")
        elif after[path].st_atime != 0:
          self.seen.append(f"read {path}")


def peak(reset: bool = False) -> int:
  """The most memory that this process has had since the last reset, in bytes."""
  if reset:
    pathlib.Path("/proc/self/clear_refs").write_text("5")
  status = pathlib.Path("/proc/self/status").read_text()
  return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def is_ours(error: BaseException, case: Case, folder: pathlib.Path) -> str | None:
  """Why an error is none that a user should see; None where it is one."""
  names = {kind.__name__ for kind in type(error).__mro__}
  told = {
    n
    for says in case.says
    for n in re.findall(r"^\s+(\w+): ", (says.__doc__ or "").split("Raises:")[-1], re.M)
  }
  if not told & names:
    return "is not in the docstring"
  frame = traceback.extract_tb(error.__traceback__)[-1]
  # An OSError with its file's name says all that there is to say, whoever raises it.
  plain = isinstance(error, OSError) and error.filename is not None
  if not frame.filename.startswith(OURS) and not plain:
    return f"is raised by {frame.filename}:{frame.lineno}"
  if str(folder) not in str(error) and not any(p.name in str(error) for p in folder.rglob("*")):
    return "names no file"
  return None


def attempt(
  case: Case,
  whole: Any,
  folder: pathlib.Path,
  outside: pathlib.Path,
  watch: Watch,
  *,
  sealed_again: bool,
) -> list[str]:
  """Reads a broken artefact, and returns what is wrong with how that went."""
  size = sum(p.stat().st_size for p in files_of(folder))
  found = []
  linked = any(path.is_symlink() for path in folder.rglob("*"))
  before = peak(reset=True)
  signal.alarm(SECONDS)
  try:
    with watch.over(folder, outside) as seen, warnings.catch_warnings():
      warnings.simplefilter("ignore")
      try:
        value = case.read(folder)
      except Exception as error:
        why = is_ours(error, case, folder)
        if why:
          found.append(f"{type(error).__name__} {why}: {str(error)[:300]}")
          frames = [
            f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(OURS)
          ]
          found[-1] += "".join(
            f"\n      {f.filename.removeprefix(OURS)}:{f.lineno} {f.line}" for f in frames[-4:]
          )
      else:
        if case.sealed and not sealed_again and value != whole and value is not None:
          found.append(f"another value came back: {str(value)[:200]}")
  finally:
    signal.alarm(0)
  # A link to a file that the caller may name; not one that a path in a file leads to.
  found += [one for one in seen if not (case.links and one.endswith("outside/whole") and linked)]
  took = peak() - before
  if took > max(FREE, 10 * size):
    found.append(f"took {took / 2**20:.0f} MiB for {size / 2**20:.2f} MiB of files")
  return found


def work(place: pathlib.Path, seed: int, first: int, count: int, only: list[str]) -> None:
  """What the process does that reads: a line of JSON before and after each case."""

  def late(*_: Any) -> None:
    raise TimeoutError(f"not done after {SECONDS} s")

  signal.signal(signal.SIGALRM, late)
  out, sys.stdout = sys.stdout, sys.stderr
  readers = {name: case for name, case in cases().items() if not only or name in only}
  watch = Watch(place)
  whole = {}
  for name, case in readers.items():  # what is imported or compiled at first is no file's to take
    with scratch(place / "artefacts" / name, place) as (folder, _):
      whole[name] = case.read(folder)
  limit = 1024 * int(
    re.search(r"VmSize:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]
  )
  resource.setrlimit(resource.RLIMIT_AS, (limit + 8 * 2**30, resource.RLIM_INFINITY))
  for number in range(first, count):
    dice = random.Random(f"{seed} {number}")
    name = list(readers)[number % len(readers)]
    with scratch(place / "artefacts" / name, place) as (folder, outside):
      what = mutate(dice, folder, outside)
      print(json.dumps({"number": number, "what": f"{name} {what}"}), file=out, flush=True)
      again = what.endswith("digests made right")
      found = attempt(readers[name], whole[name], folder, outside, watch, sealed_again=again)
      print(json.dumps({"number": number, "found": found}), file=out, flush=True)


@contextlib.contextmanager
def scratch(
  artefact: pathlib.Path, place: pathlib.Path
) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
  """A copy of an artefact, and a folder beside it that nothing may touch."""
  folder, outside = place / "reading" / artefact.name, place / "reading" / "outside"
  shutil.copytree(artefact, folder)
  outside.mkdir()
  (outside / "precious.txt").write_text("precious")
  try:
    yield folder, outside
  finally:
    shutil.rmtree(place / "reading")


def run(
  count: int, seed: int = 0, first: int = 0, only: list[str] | None = None
) -> Iterator[tuple[int, str, list[str]]]:
  """Reads so many broken artefacts: ``(number, how it was broken, what is wrong)`` of each."""
  with tempfile.TemporaryDirectory() as folder:
    place = pathlib.Path(folder).resolve()
    (place / "temporary").mkdir()
    (place / "artefacts").mkdir()
    environment = os.environ | {"TMPDIR": str(place / "temporary"), "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {
      "MPLCONFIGDIR": os.environ.get("MPLCONFIGDIR", str(place / "temporary")),
      "XDG_CACHE_HOME": str(place / "temporary"),
    }
    base = [sys.executable, str(pathlib.Path(__file__)), "--folder", str(place)]
    subprocess.run([*base, "--make", "0"], env=environment, check=True)
    while first < count:
      command = [
        *base,
        "--first",
        str(first),
        "--seed",
        str(seed),
        str(count),
        "--only",
        *(only or []),
      ]
      with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as worker:
        begun, answered = None, first - 1
        for line in _lines(worker):
          told = json.loads(line)
          if "what" in told:
            begun = told
          else:
            answered = told["number"]
            yield answered, begun["what"], told["found"]
      shutil.rmtree(place / "reading", ignore_errors=True)
      if answered + 1 < count:
        if begun is None or begun["number"] == answered:
          raise RuntimeError(f"the reading process cannot start: exit {worker.returncode}")
        yield begun["number"], begun["what"], [f"the process ended with {worker.returncode}"]
        answered = begun["number"]
      first = answered + 1


def _lines(worker: subprocess.Popen[str]) -> Iterator[str]:
  """The lines of a process, which is ended where it says nothing for too long."""
  assert worker.stdout is not None
  while True:
    if not select.select([worker.stdout], [], [], 3 * SECONDS)[0]:
      worker.kill()
    line = worker.stdout.readline()
    if not line:
      return
    yield line


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("count", type=int)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--first", type=int, default=0, help="the number of the first case")
  parser.add_argument("--only", nargs="*", default=[], help="artefacts")
  parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
  parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.make:
    make(options.folder / "artefacts")
    return 0
  if options.folder:
    work(options.folder, options.seed, options.first, options.count, options.only)
    return 0
  bad = 0
  for number, what, found in run(options.count, options.seed, options.first, options.only):
    bad += bool(found)
    for one in found:
      print(f"{number} {what}\n    {one}", flush=True)
  print(f"{options.count - options.first} mutated files, {bad} faults")
  return int(bad > 0)


if __name__ == "__main__":
  sys.exit(main())
