"""Two jobs in one folder: the second is refused, and a dead one holds nobody back."""

import json
import os
import subprocess
import sys
import threading

import pytest

from jaxdistill import runs
from jaxdistill.runs import _folder

HOLDS = """
import os, pathlib, sys
from jaxdistill import runs
with runs.hold(pathlib.Path(sys.argv[1])):
  if sys.argv[2] == "forks" and os.fork() == 0:
    print(os.getppid(), flush=True)
    sys.stdin.read()  # the child of a job that is killed lives on
    os._exit(0)
  if sys.argv[2] == "holds":
    print(os.getpid(), flush=True)
  sys.stdin.read()
"""


def job(folder, how):
  """Another process that holds a folder."""
  child = subprocess.Popen(
    [sys.executable, "-W", "ignore", "-c", HOLDS, str(folder), how],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  return child, int(child.stdout.readline())


def refused(folder, words):
  with pytest.raises(FileExistsError, match=words), runs.hold(folder):
    pass


@pytest.mark.slow_but("holds")
@pytest.mark.parametrize("how", ["holds", "forks"])
def test_a_second_job_is_refused_by_name_and_a_killed_one_holds_nobody_back(tmp_path, how):
  child, number = job(tmp_path / "run", how)
  refused(tmp_path / "run", f"process {number} on .* since 20.*another folder")
  child.kill()
  child.wait()
  with runs.hold(tmp_path / "run"):
    assert json.loads((tmp_path / "run" / "lock").read_text())["process"] == os.getpid()
    refused(tmp_path / "run", f"process {os.getpid()} ")
  child.stdin.close()
  child.stdout.close()
  assert not (tmp_path / "run").exists()  # nothing was written into it


def test_a_folder_keeps_what_is_in_it(tmp_path):
  with runs.hold(tmp_path / "run") as _:
    (tmp_path / "run" / "a").write_text("a")
  assert [p.name for p in (tmp_path / "run").iterdir()] == ["a"]


@pytest.mark.parametrize("alive", [True, False])
def test_another_machine_is_believed_while_it_touches_its_lock(tmp_path, monkeypatch, alive):
  """As on a network file system whose locks do not reach other machines."""
  monkeypatch.setattr(_folder, "_TOUCHED", 1)
  lock = tmp_path / "lock"
  lock.write_text(json.dumps({"host": "another", "process": 3, "since": "2026-01-01 00:00:00"}))
  ended = threading.Event()
  touching = threading.Thread(target=_folder._touch, args=(lock, ended))
  if alive:
    touching.start()
  try:
    if alive:
      refused(tmp_path, f"process 3 on another .*remove {lock}")
    else:
      with runs.hold(tmp_path):
        assert json.loads(lock.read_text())["process"] == os.getpid()
  finally:
    ended.set()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"process": "x"}', '{"process": 1e99}'])
def test_a_damaged_lock_that_nobody_has_is_nobodys(tmp_path, monkeypatch, text):
  monkeypatch.setattr(_folder, "_TOUCHED", 0)
  (tmp_path / "lock").write_text(text)
  with runs.hold(tmp_path):
    pass
  assert not (tmp_path / "lock").exists()
