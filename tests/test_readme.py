"""What the README shows runs as it stands there."""

import pathlib
import re

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


def test_the_example_runs(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
  exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
  assert "accuracy" in capsys.readouterr().out
  assert (tmp_path / "runs" / "mine" / "config.json").exists()


def test_the_first_screen_has_both_commands():
  first = README[: README.index("## What comes out")]
  assert "experiments/digits.py" in first
  assert "-m pytest" in first
  assert len(first.splitlines()) < 40
