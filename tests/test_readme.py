"""What the README shows runs as it stands there."""

import pathlib
import re

import pytest

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.slow
def test_the_examples_run(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  own, added, many, foreign = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
  names = {"__name__": "readme"}
  exec(compile(own, "README.md", "exec"), names)
  assert "accuracy" in capsys.readouterr().out
  # The others go on from the first.
  exec(compile(added, "README.md", "exec"), names)
  assert (tmp_path / "runs" / "mine" / "config.json").exists()
  exec(compile(many, "README.md", "exec"), names)
  assert "Chosen on validation: temperature" in capsys.readouterr().out
  assert (tmp_path / "runs" / "sweep" / "sweep.png").exists()
  exec(compile(foreign, "README.md", "exec"), names)
  assert re.search(r"^\[([012] ){4}[012]\]$", capsys.readouterr().out, re.M)


@pytest.mark.slow
def test_the_page_on_tasks_runs(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  page = (pathlib.Path(__file__).parent.parent / "docs" / "tasks.md").read_text()
  names = {"__name__": "page"}
  for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
    exec(compile(block, "tasks.md", "exec"), names)
  shown = capsys.readouterr().out
  assert "miou" in shown
  assert "Chosen on validation: temperature" in shown
  assert names["mine"].first == "mae"
  assert names["report"]["task"]["name"] == "dense"
  assert (tmp_path / "runs" / "masks" / "report.html").is_file()


def test_the_first_screen_has_both_commands():
  first = README[: README.index("## What comes out")]
  assert "experiments/digits.py" in first
  assert "-m pytest" in first
  assert len(first.splitlines()) < 40
