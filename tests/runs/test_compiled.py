"""Compiled programs on disk: the next process compiles nothing, whatever it computes with them."""

import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = """
import sys
import jax, jax.monitoring
from jaxdistill import runs

hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
jax.jit(lambda x: x - 1)(1.0)  # something was compiled before
print(runs.keep_compiled(*sys.argv[1:]))
print(float(jax.jit(lambda x: 2 * x + 1)(3.0)))
print(hits.count("/jax/compilation_cache/cache_hits"))
"""


def lines(*arguments, **environment):
  there = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMP", "JAX_PERS"))}
  command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
  done = subprocess.run(
    command, capture_output=True, text=True, timeout=120, env={**there, **environment}
  )
  assert done.returncode == 0, done.stderr
  return done.stdout.split()


@pytest.mark.slow
def test_the_next_process_finds_what_this_one_compiled(tmp_path):
  assert lines(tmp_path / "here")[:2] == [str(tmp_path / "here"), "7.0"]
  assert any((tmp_path / "here").iterdir())
  assert lines(tmp_path / "here") == [str(tmp_path / "here"), "7.0", "1"]


@pytest.mark.slow
def test_it_lies_where_the_user_has_said(tmp_path):
  own = tmp_path / "jaxdistill" / "compiled"
  assert lines(XDG_CACHE_HOME=str(tmp_path))[0] == str(own)
  named = lines(XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=str(tmp_path / "jax"))
  assert named[0] == str(tmp_path / "jax")
  assert pathlib.Path(named[0]).is_dir()
