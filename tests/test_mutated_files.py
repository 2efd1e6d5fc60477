"""What files that somebody broke do: a few of them here, any number by the command itself."""

import sys

import pytest

import mutated_files


@pytest.mark.slow  # two Pythons started anew, and every kind of file made
@pytest.mark.skipif(sys.platform != "linux", reason="it looks at /proc")
def test_no_broken_file_leaves_its_folder_or_raises_what_a_reader_does_not_tell():
  bad = [(what, found) for _, what, found in mutated_files.run(len(mutated_files.cases())) if found]
  assert bad == []


def test_what_it_looks_for_is_found(tmp_path):
  """A reader that believes everything is told of."""
  (tmp_path / "here").mkdir()
  (tmp_path / "outside").mkdir()
  (tmp_path / "outside" / "precious.txt").write_text("precious")
  (tmp_path / "here" / "a.json").write_text("[")
  watch = mutated_files.Watch(tmp_path)

  def found(read):
    case = mutated_files.Case(read, (found,))
    return mutated_files.attempt(
      case, None, tmp_path / "here", tmp_path / "outside", watch, sealed_again=False
    )

  assert found(lambda folder: None) == []
  (raw,) = found(lambda folder: [][1])
  assert "IndexError is not in the docstring" in raw
  assert any(
    "precious" in one for one in found(lambda f: (f / "../outside/precious.txt").read_text())
  )
  assert any("precious" in one for one in found(lambda f: (f / "../outside/precious.txt").unlink()))
  (large,) = found(lambda folder: bytearray(b"a" * 2**27)[:0])
  assert "MiB for 0.00 MiB of files" in large
