"""What the commands say of a wrong argument: our words, a status, and nothing long before."""

import numpy as np
import pytest

from jaxdistill import data, teachers
from jaxdistill.__main__ import main


def broken():
  """Fails, as a user's function may."""
  raise KeyError("inside")


def pair():
  """No teacher and no source."""
  return 1, 2


def made():
  """A teacher and a source."""
  examples = data.from_arrays(np.eye(4, dtype=np.float32), np.arange(4))
  return teachers.foreign(lambda x: 3 * x), data.on_device(examples, batch_size=4, data_seed=0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  folder = tmp_path_factory.mktemp("cache")
  teachers.write(folder, 4 * np.eye(4), [str(i) for i in range(4)], name="arrays")
  return str(folder)


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (["budget", "gone"], "no such folder"),
    (["budget", "gone", "--batch-size", "0"], "--batch-size=0 must be at least 1"),
    (["budget", "gone", "--latency-ms", "nan"], "latency_ms must be positive"),
    (["budget", "gone", "--bytes", "0"], "bytes must be positive"),
    (["report", "gone", "--split", "../x"], "split='../x' must be a word"),
    (["report", "gone"], "has neither report.json"),
    (["report", "gone", "--split", "n" * 300], "must be a word"),
    (["report", "gone", "--metadata", "gone.csv"], "gone.csv is no file"),
    (["budget", ""], "run='' must be a path"),
    (["budget", "n" * 300], "is too long"),
    (["export", "gone", "--with", "test_commands:broken"], "KeyError: 'inside' ("),
    (["cache", "verify", __file__], "is no cache"),
    (["cache", "verify", "n" * 300], "is no cache"),
    (["cache", "verify", "CACHE", "--teacher", "test_commands:pair"], "must return (teacher, sour"),
    (["cache", "fill", "c", "--teacher", "test_commands:made", "--limit-gb", "nan"], "--limit-gb"),
    (["cache", "fill", "c", "--teacher", "test_commands:made", "--limit-gb", "inf"], "--limit-gb"),
    (["cache", "fill", __file__, "--teacher", "test_commands:made"], "is a file; name a folder"),
    (["export", "gone", "--with", "nosuch:given"], "No module named 'nosuch'"),
    (["export", "gone", "--with", "json:loads"], "must take no arguments"),
    (["export", "gone", "--with", "json"], "must be module:function"),
    (["cache", "verify", "CACHE", "--teacher", "nosuch:pair"], "No module named 'nosuch'"),
    (["cache", "verify", "CACHE", "--teacher", "json:gone"], "json has no function gone"),
    (["cache", "verify", "CACHE", "--teacher", "os:getpid"], "must return (teacher, source)"),
    (["cache", "verify", "CACHE", "--teacher", "abc"], "must be module:function"),
  ],
)
def test_a_wrong_argument_is_said_in_a_line(words, said, cache, capsys, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  try:
    status = main([cache if word == "CACHE" else word for word in words])
  except SystemExit as left:
    status = left.code
  assert status in (1, 2)
  assert said in capsys.readouterr().err
  assert not any(tmp_path.iterdir())
