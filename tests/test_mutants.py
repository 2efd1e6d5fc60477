"""The list of mutants does not rot: snippets are there, tests exist and are run by default."""

import ast
import functools
import pathlib

import pytest

import mutants

TESTS = pathlib.Path(__file__).parent


@functools.cache
def decorators_of(file):
  """Of each test in a file, its decorators."""
  nodes = ast.parse((TESTS / file).read_text()).body
  functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
  return {node.name: [ast.unparse(mark) for mark in node.decorator_list] for node in functions}


def test_there_are_forty_at_least_of_every_part_and_no_two_alike():
  names = [mutant.name for mutant in mutants.MUTANTS]
  assert len(names) >= 40
  assert len(set(names)) == len(names)
  parts = {"loss", "mask", "step", "resume", "selection", "calibration", "cache", "projector"}
  assert parts <= {name.split(":")[0] for name in names}


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_of_this_code_and_of_tests_that_are_run(mutant):
  text = (mutants.ROOT / "jaxdistill" / mutant.file).read_text()
  assert text.count(mutant.old) == 1, f"{mutant.file} has {mutant.old!r} not once: refresh it"
  assert mutant.old != mutant.new
  ast.parse(text.replace(mutant.old, mutant.new))
  for test in mutant.tests:
    place, _, case = test.removesuffix("]").partition("[")
    file, name = place.split("::")
    assert name in decorators_of(file), f"{file} has no {name}"
    for mark in decorators_of(file)[name]:
      assert mark not in ("pytest.mark.slow", "pytest.mark.parity")
      if case and mark.startswith("pytest.mark.slow_but"):
        assert repr(case) in mark, f"{test} is slow"


def test_what_a_snippet_lacks_is_said_and_no_kill():
  lost = mutants.Mutant("loss: x", "types.py", "no such text", "", "", ())
  assert mutants.run(lost, cache="", timeout=1)[0] == "broken"
