"""What the pages show runs as it stands there, and the site is built without a warning."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
SETTING = DOCS / "how" / "_setting.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
# Two pages are run by test_readme.py and test_export.py, with what they print looked at; that on
# losses shows signatures, of functions whose examples are run as doctests.
ELSEWHERE = {DOCS / "tasks.md", DOCS / "export.md", DOCS / "losses.md", SETTING}
PAGES = {
  page.relative_to(DOCS).as_posix(): page
  for page in sorted(DOCS.rglob("*.md"))
  if BLOCK.search(page.read_text("utf-8")) and page not in ELSEWHERE
}


def run(page, names):
  """The blocks of a page, one after another."""
  for block in BLOCK.findall(page.read_text("utf-8")):
    exec(compile(block, page.name, "exec"), names)
  return names


@pytest.fixture(scope="module")
def setting():
  """The names that most pages go on from."""
  return run(SETTING, {"__name__": "setting"})


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_the_blocks_of_a_page_run(name, request, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  names = {"__name__": "page"}
  if SETTING.name in PAGES[name].read_text("utf-8"):
    names |= request.getfixturevalue("setting")
  run(PAGES[name], names)


def test_a_page_of_how_to_shows_code_and_is_short():
  lists = {"index.md", "questions.md", SETTING.name}
  how = [page for page in (DOCS / "how").glob("*.md") if page.name not in lists]
  assert len(how) > 20
  for page in how:
    assert f"how/{page.name}" in PAGES, f"{page.name} shows no code"
    assert len(page.read_text("utf-8").splitlines()) < 90, f"{page.name} is too long"


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("sphinx") is None, reason="needs the extra: pip install '.[docs]'"
)
def test_the_site_is_built_without_a_warning_and_fetches_nothing(tmp_path):
  command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "docs", str(tmp_path)]
  built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert built.returncode == 0, built.stdout + built.stderr
  for page in tmp_path.rglob("*.html"):
    fetched = re.findall(
      r"<(?:script|img|link)\b[^>]*(?:src|href)=\"(https?:[^\"]+)", page.read_text("utf-8")
    )
    assert not fetched, f"{page.name} fetches {fetched}"
  assert (tmp_path / "searchindex.js").stat().st_size > 10_000
