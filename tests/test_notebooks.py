"""Every notebook as a newcomer runs it: from top to bottom, in a kernel of its own.

    python tests/test_notebooks.py

runs them all and stores what they show, for who reads the repository; the tests compare it.
"""

import base64
import importlib.metadata
import io
import os
import pathlib
import re
import sys
import tempfile
import tomllib

import matplotlib
import nbclient
import nbformat
import numpy as np
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from PIL import Image

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "colabs").glob("*.ipynb"))


def execute(path, folder):
  """Runs a notebook in the running interpreter and returns it with its outputs."""
  notebook = nbformat.read(path, as_version=4)
  # Without folders to look in, "python3" is this interpreter, whatever kernels the machine knows.
  specs = KernelSpecManager(kernel_dirs=[])
  manager = AsyncKernelManager(
    kernel_name="python3",
    kernel_spec_manager=specs,
    connection_file=str(folder / "connection.json"),
  )
  client = nbclient.NotebookClient(
    notebook, km=manager, timeout=1200, resources={"metadata": {"path": str(folder)}}
  )
  # The compiler's flags come along; what a notebook writes outside its folder goes there too.
  environment = {
    **os.environ,
    "TFDS_DATA_DIR": str(folder / "tfds"),
    "IPYTHONDIR": str(folder / "ipython"),
    "MPLCONFIGDIR": matplotlib.get_cachedir(),  # with the list of fonts, which takes long to make
    "PYTHONPATH": str(ROOT),
  }
  environment.pop("MPLBACKEND", None)  # pictures belong into the notebook
  client.execute(env=environment, cleanup_kc=True)  # the kernel ends with the notebook
  return notebook


def outputs(notebook, kind):
  """The outputs of one MIME type, or of a stream, in order."""
  found = []
  for cell in notebook["cells"]:
    for output in cell.get("outputs", []):
      if output.output_type == "stream" and kind == output.name:
        found.append(output.text)
      elif kind in output.get("data", {}):
        found.append(output.data[kind])
  return found


def rows_of(table):
  """A Markdown table as ``{label: [cells]}``."""
  lines = [line for line in table.splitlines() if line.startswith("|")]
  cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
  return {row[0]: row[1:] for row in cells}


def test_there_are_notebooks():
  names = ["bring_your_own", "compress", "language_models", "quickstart"]
  assert [path.stem for path in NOTEBOOKS] == names


def shown(notebook):
  """The notebook with what its cells show, small; without what libraries say of this machine."""
  for cell in notebook.cells:
    cell.metadata.pop("execution", None)
    kept = []
    for output in cell.get("outputs", []):
      data = output.get("data", {})
      if output.output_type == "stream":
        if output.name != "stdout":
          continue  # warnings
        output.text = "".join(
          line for line in output.text.splitlines(True) if not said_by_tfds(line)
        )
        # The kernel sends what was printed in one piece or in several, as time falls.
        if kept and kept[-1].output_type == "stream":
          kept[-1].text += output.text
          continue
        if not output.text:
          continue
      # A page of a quarter of a megabyte, which GitHub does not show.
      if data.pop("text/html", None):
        data["text/plain"] = "<the page>"
      if "image/png" in data:
        data["image/png"] = in_few_colours(data["image/png"])
      kept.append(output)
    if cell.cell_type == "code":
      cell.outputs = kept
  notebook.metadata.language_info = {"name": "python"}  # of any version
  return notebook


def said_by_tfds(line):
  """In bold, that it prepares the set."""
  return "\x1b[" in line


def opened(png):
  return Image.open(io.BytesIO(base64.b64decode(png)))


def in_few_colours(png):
  made = io.BytesIO()
  opened(png).convert("RGB").quantize(32).save(made, "PNG", optimize=True)
  return base64.b64encode(made.getvalue()).decode()


def wording(notebook):
  """What each cell shows, without what another machine or version would show otherwise."""
  return [[says(output) for output in cell.get("outputs", [])] for cell in notebook.cells]


def says(output):
  data = output.get("data", {})
  if "image/png" in data:
    return "a picture"
  text = output.get("text") or data.get("text/markdown") or data.get("text/plain", "")
  lines = []
  for line in text.splitlines():
    if line.startswith("|") and lines and lines[-1].startswith("|"):
      line = "|" + line.split("|")[1]  # the name of a row
    # A verdict has its own words for each outcome, and so has a choice.
    line = "a verdict" if line.startswith("Chosen: ") or "labels alone (" in line else line
    lines.append(re.sub(r"[\d.,]*\d|[–-]{2,}| +", "#", line).replace("# ± #", "#"))
  return lines


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_as_it_ran(path):
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
  code = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
  assert notebook == shown(notebook.copy())
  assert str(ROOT) not in path.read_text()
  assert path.stat().st_size < 150_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_on_colab_and_says_what_it_runs_on(path):
  notebook = nbformat.read(path, as_version=4)
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  where = project["urls"]["Homepage"].removeprefix("https://github.com/")
  page = f"https://colab.research.google.com/github/{where}/blob/main/colabs/{path.name}"
  assert f"({page})" in notebook.cells[0].source
  (said,) = outputs({"cells": notebook.cells[:3]}, "stdout")
  assert said == "on 1 x cpu (cpu)\n"


@pytest.mark.parametrize("here", ["colab", "checkout", "installed"])
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_installs_what_is_missing_and_leaves_jax(path, here, tmp_path, monkeypatch):
  cell = next(c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code")
  called = []

  class Shell:
    def run_line_magic(self, name, line):
      called.append((name, line))

  monkeypatch.chdir(tmp_path if here == "colab" else ROOT / "colabs")
  if here != "installed":
    monkeypatch.setitem(sys.modules, "jaxdistill", None)  # an import of it fails
  monkeypatch.setattr(tempfile, "mkdtemp", lambda: str(tmp_path))
  names = {"get_ipython": Shell}
  exec(TransformerManager().transform_cell(cell.source), names)
  if here == "installed":
    assert called == []
    return
  ((name, line),) = called
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  address = f"git+{project['urls']['Homepage']}" if here == "colab" else ROOT.as_uri()
  options, extras, wanted = re.fullmatch(
    r"install (.*) 'jaxdistill\[(.*)\] @ (.*)'", line.format(**names)
  ).groups()
  assert (name, options, wanted) == ("pip", f"-q -c {tmp_path / 'kept.txt'}", address)
  assert set(extras.split(",")) <= set(project["optional-dependencies"])
  # pip may take any version of the rest, and none other of what was built for an accelerator.
  kept = dict(line.split("==") for line in (tmp_path / "kept.txt").read_text().splitlines())
  assert kept == {n: importlib.metadata.version(n) for n in kept}
  assert {"jax", "jaxlib"} <= set(kept)
  assert "jaxtyping" not in kept


def test_what_is_printed_beside_another_librarys_word_is_shown_however_the_kernel_cuts_it():
  bold, ours = "\x1b[1mPreparing the set\x1b[0m\n", "{'train': 990}\n"
  for pieces in ([bold + ours], [bold, ours], [bold, "{'train':", " 990}\n"]):
    streams = [nbformat.v4.new_output("stream", name="stdout", text=text) for text in pieces]
    warning = nbformat.v4.new_output("stream", name="stderr", text="slow\n")
    cell = nbformat.v4.new_code_cell("", outputs=[streams[0], warning, *streams[1:]])
    (kept,) = shown(nbformat.v4.new_notebook(cells=[cell])).cells[0].outputs
    assert kept.text == ours


def quickstart_shows_its_pictures_and_the_table(notebook):
  assert len(outputs(notebook, "image/png")) == 3  # the digits, the soft targets, the accuracies
  tables = [text for text in outputs(notebook, "stdout") if "| accuracy, %" in text]
  rows = rows_of(tables[-1])
  assert rows[""] == ["teacher", "baseline", "student"]
  accuracies = [float(re.match(r"[\d.]+", cell)[0]) for cell in rows["accuracy, %"]]
  # Always naming one class is right for a tenth; networks that learned are far from that.
  assert all(80 < accuracy <= 100 for accuracy in accuracies)
  teacher, baseline, student = (int(cell.replace(",", "")) for cell in rows["parameters"])
  assert baseline == student < teacher


def bring_your_own_distils_with_few_labels_and_calls_the_student(notebook):
  text = "".join(outputs(notebook, "stdout"))
  found = {n: float(v) for n, v in re.findall(r"^(\w.*?)\s+([\d.]+)(?: ± [\d.]+)? %$", text, re.M)}
  assert list(found) == ["teacher, all labels", "student, few labels alone", "student, distilled"]
  # 63% of the patients are of one class; networks that learned are far from that.
  assert all(85 < accuracy <= 100 for accuracy in found.values())
  assert "15 of 300 labels" in text
  assert "\nTrue\n" in text  # the first layer, through PyTorch's layout and back
  (again,) = re.findall(r"200 parameters, accuracy ([\d.]+)%", text)
  assert abs(float(again) - found["student, distilled"]) < 3
  assert len(outputs(notebook, "image/png")) == 1


def compress_ends_with_files_and_a_report(notebook):
  text = "".join(outputs(notebook, "stdout"))
  assert len(re.findall(r"student\.\S+: [\d,]+ bytes, passed: True", text)) == 2
  assert "without Flax and jaxdistill: True" in text
  said, labels = (
    re.search(rf"{name}\s+\[([\d ]+)\]", text)[1].split() for name in ("classes", "labels")
  )
  assert sum(a == b for a, b in zip(said, labels, strict=True)) >= 6
  (table,) = outputs(notebook, "text/markdown")
  assert table.count("**chosen**") == 1
  assert "over the budget: bytes" in table
  assert len(outputs(notebook, "image/png")) == 1
  assert any("srcdoc" in page for page in outputs(notebook, "text/html"))


def language_models_ends_with_a_folder_that_reads_back(notebook):
  text = "".join(outputs(notebook, "stdout"))
  assert "['config.json', 'model.safetensors']" in text
  rows = rows_of(text)
  bits = {name: float(rows[name][0]) for name in ("teacher", "text alone", "distilled")}
  # Untrained, a byte costs log2(256) = 8 bits; letters that are equally likely still cost 4.
  assert all(0 < one < 2 for one in bits.values())
  assert rows["teacher"][1:3] == ["100.0", "100.0"]
  assert "read back: True" in text


CHECKS = [
  ("bring_your_own", bring_your_own_distils_with_few_labels_and_calls_the_student),
  ("compress", compress_ends_with_files_and_a_report),
  ("language_models", language_models_ends_with_a_folder_that_reads_back),
  ("quickstart", quickstart_shows_its_pictures_and_the_table),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "check"), CHECKS)
def test_a_notebook_runs_from_top_to_bottom(name, check, tmp_path):
  """One test runs a notebook and looks at it: two would run it twice, each in its own process."""
  # A cell that raises, raises here, with its traceback.
  path = ROOT / "colabs" / f"{name}.ipynb"
  notebook = execute(path, tmp_path)
  check(notebook)
  stored = nbformat.read(path, as_version=4)
  assert wording(shown(notebook)) == wording(stored)
  sizes = [[opened(png).size for png in outputs(one, "image/png")] for one in (notebook, stored)]
  np.testing.assert_allclose(*sizes, rtol=0.1)  # a font may be wider elsewhere


if __name__ == "__main__":
  for path in NOTEBOOKS:
    with tempfile.TemporaryDirectory() as made:
      nbformat.write(shown(execute(path, pathlib.Path(made))), path)
