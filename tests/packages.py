"""Wheel and sdist, installed in empty environments: the core, and each extra apart.

Command:  python tests/packages.py [--python python3.12] [--extras data report] [--core]
By hand:  all extras, one environment after another; with --core the core alone, from both files.

An environment gets nothing but what the file names (with constraints.txt, but for LiteRT, see
CONTRIBUTING.md), and is outside of the checkout. In it everything that the extra promises is
imported, `tests/core_alone.py` is run, and a library of another extra is not there by chance: its
call still says which extra brings it.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# What has other versions of a dependency than constraints.txt.
UNCONSTRAINED = {"litert"}
# Where what is imported is not what is installed; of tools, nothing is imported.
IMPORTED = {
  "import-linter": "importlinter",
  "ipykernel": "ipykernel",
  "mlflow-skinny": "mlflow",
  "myst-parser": "myst_parser",
  "opencv-python-headless": "cv2",
  "pre-commit": "pre_commit",
  "pydata-sphinx-theme": "pydata_sphinx_theme",
  "pytest-xdist": "xdist",
  "scikit-learn": "sklearn",
  "sphinx-copybutton": "sphinx_copybutton",
  "tensorflow-datasets": "tensorflow_datasets",
}
TOOLS = {"ruff"}


def modules(extra: str) -> list[str]:
  """What an extra promises, by the names that are imported."""
  found = []
  for requirement in EXTRAS[extra]:
    name = re.match(r"[\w.-]+", requirement).group()
    if name == PROJECT["name"]:
      for inner in re.search(r"\[(.*?)\]", requirement).group(1).split(","):
        found += modules(inner)
    elif name not in TOOLS:
      found.append(IMPORTED.get(name, name.replace("-", "_")))
  return sorted(set(found))


def run(*command: object) -> None:
  """Runs a command outside of the checkout, and without what this process was told of paths."""
  hidden = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
  done = subprocess.run(
    [str(word) for word in command],
    cwd=tempfile.gettempdir(),
    env={**hidden, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )
  if done.returncode:
    sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def build(python: str, folder: pathlib.Path) -> list[pathlib.Path]:
  """The wheel and the sdist, made as a release is."""
  run(python, "-m", "venv", folder / "builder")
  builder = folder / "builder" / "bin" / "python"
  run(builder, "-m", "pip", "install", "-q", "build")
  run(builder, "-m", "build", "--outdir", folder / "dist", ROOT)
  return sorted((folder / "dist").glob("jaxdistill-*"), key=lambda path: path.suffix, reverse=True)


def installed(python: str, folder: pathlib.Path, file: pathlib.Path, extra: str | None) -> None:
  """Installs a file in an empty environment, and imports what it promises."""
  with tempfile.TemporaryDirectory(dir=folder) as place:
    run(python, "-m", "venv", place)
    inside = pathlib.Path(place, "bin", "python")
    what = f"{file}[{extra}]" if extra else str(file)
    pinned = () if extra in UNCONSTRAINED else ("-c", ROOT / "constraints.txt")
    run(inside, "-m", "pip", "install", "-q", *pinned, what)
    run(inside, "-m", "pip", "check")
    run(inside, ROOT / "tests" / "core_alone.py", pathlib.Path(place, "run"))
    if extra:
      run(inside, "-c", f"import {', '.join(modules(extra))}")
  print(f"{file.name}{f'[{extra}]' if extra else ''}: installed, checked, imported", flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--python", default=sys.executable)
  parser.add_argument("--core", action="store_true", help="no extra")
  parser.add_argument("--extras", nargs="*", choices=sorted(EXTRAS), default=sorted(EXTRAS))
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as place:
    folder = pathlib.Path(place)
    files = build(options.python, folder)
    assert [file.suffix for file in files] == [".whl", ".gz"], files
    for file in files:
      installed(options.python, folder, file, None)
    for extra in () if options.core else options.extras:
      installed(options.python, folder, files[0], extra)


if __name__ == "__main__":
  main()
