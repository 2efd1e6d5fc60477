"""The house's own rules: doors, limits, doctests; `lint-imports` holds the floors (pyproject)."""

import ast
import builtins
import dis
import doctest
import functools
import importlib
import inspect
import pathlib
import pkgutil
import re
import sys
import tomllib
import types

import pytest

import jaxdistill

ROOT = pathlib.Path(jaxdistill.__file__).parent
PROJECT = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())
CONTRACTS = PROJECT["tool"]["importlinter"]["contracts"]
EVERYWHERE = {"jax", "flax", "optax", "numpy", "jaxtyping", "jaxdistill"}

MODULES = sorted(
  info.name
  for info in pkgutil.walk_packages([str(ROOT)], "jaxdistill.")
  if "__main__" not in info.name
)


def imports_of(name):
  module = importlib.import_module(name)
  for node in ast.walk(ast.parse(pathlib.Path(module.__file__).read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{name} has a relative import"
      yield node.module


def test_the_top_has_eleven_rooms_and_the_words():
  entries = [path for path in ROOT.iterdir() if not path.name.startswith(("_", "."))]
  there = {path.stem for path in entries if path.is_dir() or path.suffix == ".py"}
  assert len(there - {"types"}) <= 11, f"too many names to remember: {sorted(there)}"
  for room in there - {"types"}:
    assert (ROOT / room / "__init__.py").is_file(), f"{room} is no room"


def test_the_contracts_name_every_foreign_library():
  guarded = {
    library
    for contract in CONTRACTS
    if contract["type"] == "protected"
    for library in contract["protected_modules"]
  }
  known = guarded | EVERYWHERE | set(sys.stdlib_module_names)
  for name in MODULES:
    for imported in imports_of(name):
      package = imported.split(".")[0]
      assert package in known, f"{name} imports {package}: say in pyproject.toml whose it is"


@pytest.mark.parametrize("name", [name for name in MODULES if name.count(".") == 1])
def test_a_door_has_a_line_for_each_name_and_nothing_else(name):
  module = importlib.import_module(name)
  path = pathlib.Path(module.__file__)
  if path.name != "__init__.py":
    return
  for node in ast.parse(path.read_text()).body:
    assert not isinstance(node, ast.FunctionDef | ast.ClassDef), f"{name} is a door, and has code"
  listed = re.findall(r'^  "(\w+)",  # \S', path.read_text(), re.MULTILINE)
  assert listed == list(module.__all__), f"{name}.__all__ has names without a word on what they are"


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
def test_public_names_are_documented(name):
  importlib.import_module(name)
  for label, text in documented(name):
    assert text, f"{label} has no docstring"
    if ".losses." in label and label != name:
      assert ">>>" in text, f"{label} has no example"


@pytest.mark.slow_but("jaxdistill.losses.logits")
@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_docstrings_run(name):
  module = importlib.import_module(name)
  parser = doctest.DocTestParser()
  runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
  for label, text in documented(name):
    runner.run(parser.get_doctest(text or "", dict(vars(module)), label, module.__file__, 0))
  assert runner.failures == 0


@functools.cache  # the library is parsed once
def functions():
  """Every function of the library: ``(module.qualified name, node, is it public)``."""
  return [one for path in sorted(ROOT.rglob("*.py")) for one in functions_of(path)]


def functions_of(path):
  module = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)

  def inside(node, name, public):
    for child in ast.iter_child_nodes(node):
      if isinstance(child, ast.FunctionDef | ast.ClassDef):
        full, shown = f"{name}.{child.name}", public and not child.name.startswith("_")
        if isinstance(child, ast.FunctionDef):
          yield full, child, shown or (public and child.name == "__init__")
        yield from inside(child, full, shown and isinstance(child, ast.ClassDef))
      else:
        yield from inside(child, name, public)

  yield from inside(ast.parse(path.read_text()), module, True)


def lines_of_code(function):
  """Lines that hold code: no docstring, no comment, no empty line, none of a function inside."""
  held = set()
  todo = [*function.args.defaults, *function.decorator_list, *function.body]
  if ast.get_docstring(function):
    todo.remove(function.body[0])
  held.update(range(function.lineno, function.body[0].lineno))
  while todo:
    node = todo.pop()
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      continue
    if hasattr(node, "lineno") and not isinstance(node, ast.stmt):
      held.update(range(node.lineno, node.end_lineno + 1))
    elif hasattr(node, "lineno"):
      held.add(node.lineno)
    todo.extend(ast.iter_child_nodes(node))
  return len(held)


def test_a_public_function_has_at_most_twelve_parameters():
  found = {
    name
    for name, node, public in functions()
    if public and len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]) > 12
  }
  assert not found


def test_a_function_is_at_most_sixty_lines_of_code():
  found = {name for name, node, _ in functions() if lines_of_code(node) > 60}
  assert not found


def codes(code):
  yield code
  for constant in code.co_consts:
    if isinstance(constant, types.CodeType):
      yield from codes(constant)


@pytest.mark.parametrize("name", MODULES)
def test_every_name_is_defined(name):
  """Ruff and mypy cannot say it: shapes in annotations are names that are defined nowhere."""
  module = importlib.import_module(name)
  source = pathlib.Path(module.__file__).read_text()
  read = {
    step.argval
    for code in codes(compile(source, module.__file__, "exec", dont_inherit=True))
    for step in dis.get_instructions(code)
    if step.opname == "LOAD_GLOBAL"
  }
  assert read <= {*vars(module), *dir(builtins)}


def test_no_two_files_of_tests_have_one_name():
  """Pytest imports them by it, and stops at the second, but only where both are collected."""
  names = [path.name for path in pathlib.Path(__file__).parent.rglob("test_*.py")]
  assert len(names) == len(set(names)), {name for name in names if names.count(name) > 1}


def test_nothing_is_left_to_be_done_in_the_code():
  for path in ROOT.rglob("*.py"):
    for word in ("TODO", "FIXME"):
      assert word not in path.read_text(), f"{path.name} has {word}"


def test_hooks_have_the_versions_of_the_constraints():
  pinned = (ROOT.parent / "constraints.txt").read_text().splitlines()
  text = (ROOT.parent / ".pre-commit-config.yaml").read_text()
  listed = re.findall(r"additional_dependencies: \[(.*)\]", text)
  assert listed
  for one in ", ".join(listed).split(", "):
    assert one in pinned, f"{one} is not what constraints.txt has"
  hooks = re.findall(r"entry: (\S+)(?: (\S+))?", text)
  script = (ROOT.parent / ".ci" / "run").read_text()
  for words in hooks:
    assert f"/bin/{' '.join(word for word in words if word)}" in script


def test_each_python_of_the_matrix_is_in_the_metadata():
  workflow = (ROOT.parent / ".github" / "workflows" / "ci.yml").read_text()
  (matrix,) = re.findall(r"python: \[(.*)\]", workflow)
  assert "run: .ci/run" in workflow
  prefix = "Programming Language :: Python :: "
  said = [c.removeprefix(prefix) for c in PROJECT["project"]["classifiers"] if c.startswith(prefix)]
  assert re.findall(r"[\d.]+", matrix) == said
  assert (ROOT / "py.typed").is_file()
