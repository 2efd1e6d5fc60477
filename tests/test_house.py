"""The house's own rules: floors, public lists, doctests, one file for each foreign library."""

import ast
import doctest
import importlib
import inspect
import pathlib
import pkgutil
import re
import sys

import pytest

import jaxdistill

ROOT = pathlib.Path(jaxdistill.__file__).parent
# A file imports only from floors below its own; the list is the architecture.
FLOORS = [
  ["arguments"],
  ["types", "arguments", "fusion", "pooling"],
  [
    "losses",
    "metrics",
    "projectors",
    "models",
    "cost",
    "examples",
    "views",
    "paths",
    "manifest",
    "optimizers",
    "transforms",
    "precision",
    "terms",
    "ahead",
    "capacity",
    "environment",
    "pending",
    "predictions",
  ],
  [
    "leaves",
    "nnx_modules",
    "orbax_io",
    "dicts",
    "labels",
    "accept",
    "classes",
    "cache_files",
    "pictures",
    "progress",
    "flat",
    "runtimes",
    "separate",
  ],
  ["nnx_taps", "sources", "portable"],
  [
    "checkpoint",
    "capture",
    "capture_nnx",
    "mesh",
    "run",
    "tfds_data",
    "streams",
    "fingerprints",
    "mixtures",
    "folding",
    "int8",
    "onnx_files",
  ],
  ["filling"],
  ["cached", "data", "selection", "weights", "state"],
  [
    "recipes",
    "teachers",
    "step",
    "cache",
    "deployed",
    "exported",
    "fit_arguments",
    "side_by_side",
    "students",
  ],
  ["program", "evaluate", "record", "stops", "points", "once", "export"],
  ["loop", "checks"],
  ["train", "search", "budget"],
  ["sweep", "shortlist", "preflight"],
  ["compression"],
  ["compress"],
  ["pages"],
  ["report"],
  ["compare"],
]
ONE_FILE = {
  "orbax": "orbax_io",
  "tensorflow_datasets": "tfds_data",
  "sklearn": "tfds_data",
  "array_record": "cache_files",
  "grain": "streams",
  "absl": "streams",
  "matplotlib": "pictures",
  "scipy": "pages.significance",
  "tqdm": "progress",
  "tensorboardX": "run",
  "safetensors": "weights",
  "jax2onnx": "onnx_files",
  "qwix": "int8",
}
EVERYWHERE = {"jax", "flax", "optax", "numpy", "jaxtyping", "jaxdistill"}

MODULES = sorted(
  info.name
  for info in pkgutil.walk_packages([str(ROOT)], "jaxdistill.")
  if "__main__" not in info.name
)


def floor_of(name):
  top = name.split(".")[1]
  return next((i for i, floor in enumerate(FLOORS) if top in floor), None)


def imports_of(name):
  module = importlib.import_module(name)
  for node in ast.walk(ast.parse(pathlib.Path(module.__file__).read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{name} has a relative import"
      yield node.module
      if node.module == "jaxdistill":
        yield from (f"jaxdistill.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
  mine = floor_of(name)
  assert mine is not None, f"{name} stands on no floor: name it in FLOORS"
  top = name.split(".")[1]
  for target in imports_of(name):
    if not target.startswith("jaxdistill."):
      continue
    other = target.split(".")[1]
    if other == top and top in ("checks", "losses", "models", "pages", "recipes"):
      continue
    theirs = floor_of(target)
    assert theirs is not None, f"{name} imports {target}"
    assert theirs < mine, f"{name} imports up or along: {target}"


@pytest.mark.parametrize("name", MODULES)
def test_foreign_libraries_have_one_door(name):
  if name.startswith("jaxdistill.export.runtimes."):
    # Scripts that run alone, with what a deployed process has: the library is what they leave out.
    assert not {"jaxdistill", "flax", "optax"} & {t.split(".")[0] for t in imports_of(name)}
    return
  for target in imports_of(name):
    package = target.split(".")[0]
    if package in EVERYWHERE or package in sys.stdlib_module_names:
      continue
    home = ONE_FILE.get(package)
    assert home is not None, f"{name} imports {package}, which is no dependency of the library"
    assert name == f"jaxdistill.{home}", f"{package} is imported by {home} alone, not by {name}"


def natural(name):
  """Constants, classes, functions; numbers by their value: what the linter's sort is."""
  kind = 0 if name.isupper() else 1 if name[0].isupper() else 2
  return kind, [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)]


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_one_sorted_list(name):
  module = importlib.import_module(name)
  assert module.__doc__, f"{name} has no docstring"
  public = module.__all__
  assert list(public) == sorted(public, key=natural), f"{name}.__all__ is not sorted"
  assert len(set(public)) == len(public)
  for entry in public:
    assert hasattr(module, entry), f"{name}.__all__ names {entry}, which is not there"
  defined = {
    entry
    for entry, value in vars(module).items()
    if not entry.startswith("_")
    and (inspect.isfunction(value) or inspect.isclass(value))
    and getattr(value, "__module__", None) == name
  }
  assert defined <= set(public), f"{name} defines {sorted(defined - set(public))} beside __all__"


def documented(name):
  module = importlib.import_module(name)
  yield name, module.__doc__
  for entry in getattr(module, "__all__", []):
    value = getattr(module, entry)
    if getattr(value, "__module__", None) != name or not (
      inspect.isclass(value) or inspect.isroutine(value)
    ):
      continue
    yield f"{name}.{entry}", value.__doc__
    if inspect.isclass(value):
      for member, method in vars(value).items():
        if not member.startswith("_") and inspect.isroutine(method):
          yield f"{name}.{entry}.{member}", method.__doc__


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_documented_and_their_examples_run(name):
  module = importlib.import_module(name)
  parser = doctest.DocTestParser()
  runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
  for label, text in documented(name):
    assert text, f"{label} has no docstring"
    if ".losses." in label and label != name:
      assert ">>>" in text, f"{label} has no example"
    runner.run(parser.get_doctest(text, dict(vars(module)), label, module.__file__, 0))
  assert runner.failures == 0


def test_files_and_functions_stay_readable():
  for path in ROOT.rglob("*.py"):
    text = path.read_text()
    assert len(text.splitlines()) <= 450, f"{path.name} is too long for one screenful of thought"
    for word in ("TODO", "FIXME"):
      assert word not in text, f"{path.name} has {word}"
