"""Every notebook as a newcomer runs it: from top to bottom, in a kernel of its own."""

import base64
import os
import pathlib
import re

import matplotlib
import nbclient
import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager

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
  for cell in notebook.cells:
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
  names = ["bring_your_own", "compress", "quickstart"]
  assert [path.stem for path in NOTEBOOKS] == names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path):
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
  for cell in notebook.cells:
    if cell.cell_type == "code":
      assert cell.outputs == []
      assert cell.execution_count is None


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


# The quickstart always; the others where there is time for them.
CHECKS = [
  pytest.param(
    "bring_your_own",
    bring_your_own_distils_with_few_labels_and_calls_the_student,
    marks=pytest.mark.slow,
  ),
  pytest.param("compress", compress_ends_with_files_and_a_report, marks=pytest.mark.slow),
  ("quickstart", quickstart_shows_its_pictures_and_the_table),
]


@pytest.mark.parametrize(("name", "check"), CHECKS)
def test_a_notebook_runs_from_top_to_bottom(name, check, tmp_path):
  """One test runs a notebook and looks at it: two would run it twice, each in its own process."""
  # A cell that raises, raises here, with its traceback.
  notebook = execute(ROOT / "colabs" / f"{name}.ipynb", tmp_path)
  code = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
  for picture in outputs(notebook, "image/png"):
    assert base64.b64decode(picture).startswith(b"\x89PNG")
  check(notebook)
