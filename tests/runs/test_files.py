"""Files written whole or not at all, logs read, trees told from one another."""

import errno
import io
import json
import os
import pathlib
import resource
import sys
import traceback
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import runs
from jaxdistill.runs import _fingerprints


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path):
  path = tmp_path / "a.txt"
  runs.write_text(path, "old")

  def half_way():
    with runs.replacing(path, durable=True) as writing:
      writing.write_text("ne")
      raise OSError("the disk is full")

  with pytest.raises(OSError, match="disk is full"):
    half_way()
  assert path.read_text() == "old"
  runs.write_text(path, "new", durable=True)
  assert path.read_text() == "new"
  assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


OUTSIDE = (
  "../a",
  "/etc/passwd",
  "b/../../a",
  "C:\\a",
  "..\\a",
  "",
  ".",
  "a\0b",
  3,
  None,
  "out",
  "up/a",
)


@pytest.mark.parametrize(
  "name",
  [
    *OUTSIDE,
    pytest.param("1" * 300, id="a long name"),
    pytest.param("1/" * 3000, id="a long path"),
  ],
)
@pytest.mark.parametrize("links", [False, True])
def test_a_path_in_a_file_stays_in_its_folder(tmp_path, name, links):
  if links and name in ("out", "up/a"):
    return  # those are the user's own
  (tmp_path / "here").mkdir()
  (tmp_path / "here" / "out").symlink_to(tmp_path / "a")
  (tmp_path / "here" / "up").symlink_to(tmp_path)
  with pytest.raises(ValueError, match="^names "):
    runs.within(tmp_path / "here", name, links=links)


def test_an_integer_that_no_float_holds_is_refused():
  assert runs.parse_json("[1" + "0" * 300 + ", -1]") == [10**300, -1]
  with pytest.raises(ValueError, match="310 digits"):
    runs.parse_json("1" + "0" * 309)


def test_a_path_in_a_file_may_lie_deeper(tmp_path):
  assert runs.within(tmp_path, "a/..b/c [0.1].txt") == tmp_path / "a/..b/c [0.1].txt"
  (tmp_path / "out").symlink_to(tmp_path.parent)
  assert runs.within(tmp_path, "out/a", links=True) == tmp_path / "out/a"


def test_a_downloaded_folder_may_be_links_to_its_cache(tmp_path):
  """As Hugging Face lays it out: ``snapshots/<revision>/a.json`` leads to ``blobs/<digest>``."""
  folder, blobs = tmp_path / "snapshots" / "main" / "student", tmp_path / "blobs"
  folder.mkdir(parents=True)
  blobs.mkdir()
  (blobs / "0a").write_text("[1]")
  (folder / "a.json").symlink_to("../../../blobs/0a")
  assert runs.read_json(folder / "a.json") == [1]
  (tmp_path / "other").write_text("[1]")
  (folder / "b.json").symlink_to(tmp_path / "other")
  with pytest.raises(ValueError, match="a link out of its folder"):
    runs.read_json(folder / "b.json")
  assert "a link out" in runs.altered(folder / "b.json", {"sha256": runs.sha256(blobs / "0a")})


def test_what_is_written_goes_where_its_name_is_and_not_where_a_link_leads(tmp_path):
  precious = tmp_path / "precious"
  precious.write_text("precious")
  (tmp_path / "here").mkdir()
  for name in ("a.json", "a.json.writing"):
    (tmp_path / "here" / name).symlink_to(precious)
  runs.write_json(tmp_path / "here" / "a.json", [1])
  assert precious.read_text() == "precious"
  assert runs.read_json(tmp_path / "here" / "a.json") == [1]


@pytest.mark.parametrize("kind", ["pipe", "loop", "folder", "deep", "wide", "number"])
def test_json_that_cannot_be_read_is_said_and_not_waited_for(tmp_path, kind):
  path = tmp_path / "a.json"
  if kind == "pipe":
    os.mkfifo(path)
  elif kind == "loop":
    path.symlink_to(path)
  elif kind == "folder":
    path.mkdir()
  else:
    texts = {"deep": "[" * 10**6, "wide": "[" + "{}," * 10**5 + "0]", "number": "9" * 5000}
    path.write_text(texts[kind])
  with pytest.raises(ValueError, match=f"{path} is damaged"):
    runs.read_object(path)


def archive(path, **arrays):
  np.savez_compressed(path, allow_pickle=False, **arrays)
  return path


def test_an_archive_takes_no_more_memory_than_its_size_allows(tmp_path):
  small = archive(tmp_path / "a.npz", a=np.arange(3), b=np.array(["x", "yz"]))
  found = runs.read_npz(small)
  assert found["a"].tolist() == [0, 1, 2]
  assert found["b"].tolist() == ["x", "yz"]
  bomb = archive(tmp_path / "b.npz", a=np.zeros(10_000_000))
  with pytest.raises(ValueError, match="holds 80,000,128 bytes"):
    runs.read_npz(bomb)


def test_what_was_written_is_believed_however_much_it_shrinks(tmp_path):
  """The answers of a student that is sure of everything, and of classes in their order."""
  path = tmp_path / "a.npz"
  arrays = {"sure": np.ones((5, 200_000), np.float32), "labels": np.repeat(np.arange(10), 20_000)}
  for compressed in (True, False):
    runs.write_npz(path, arrays, compressed=compressed)
    for name, array in runs.read_npz(path).items():
      np.testing.assert_array_equal(array, arrays[name])
  few = np.random.default_rng(0).normal(size=1000).astype(np.float32).round(1)
  runs.write_npz(path, {"few": few})
  assert path.stat().st_size < few.nbytes


@pytest.mark.parametrize("kind", ["cut", "text", "objects", "claims", "no numpy", "more"])
def test_an_archive_that_is_damaged_is_said_so(tmp_path, kind):
  path = archive(tmp_path / "a.npz", a=np.arange(300))
  if kind == "cut":
    path.write_bytes(path.read_bytes()[:-100])
  elif kind == "text":
    path.write_text("no archive")
  elif kind == "objects":
    np.savez(path, a=np.array([{}], dtype=object))
  else:
    made = io.BytesIO()
    np.lib.format.write_array_header_1_0(
      made, {"descr": "<f8", "fortran_order": False, "shape": (2**58,)}
    )
    with zipfile.ZipFile(path, "w") as opened:
      if kind == "more":
        made = io.BytesIO()
        np.save(made, np.arange(3))
        made.write(b"more")
      opened.writestr("a.npy", b"other" if kind == "no numpy" else made.getvalue())
  with pytest.raises(ValueError, match="."):
    runs.read_npz(path)


def test_what_was_altered_is_said(tmp_path):
  path = tmp_path / "a"
  path.write_bytes(b"abc")
  written = runs.size_and_digest(path)
  assert runs.altered(path, written) is None
  path.write_bytes(b"abd")
  assert "SHA-256" in runs.altered(path, written)
  assert "SHA-256" in runs.altered(path, {"sha256": written["sha256"]})
  assert runs.altered(path, written, whole=False) is None
  path.write_bytes(b"ab")
  assert runs.altered(path, written, whole=False) == "has 2 bytes, 3 were written"
  assert runs.altered(tmp_path / "b", written) == "is missing"
  # Nothing to compare with is not the same as nothing altered.
  assert "SHA-256" in runs.altered(path, {})


def test_a_manifest_is_read_as_it_was_written(tmp_path):
  path = tmp_path / "manifest.json"
  runs.write_digested(path, {"digest": "of an earlier content", "a": [1, 2]})
  body = runs.read_digested(path)
  assert (body["a"], body["digest"]) == ([1, 2], runs.digest({"a": [1, 2]}))
  path.write_text(json.dumps(body | {"a": [1, 3]}))
  with pytest.raises(ValueError, match="its digest differs"):
    runs.read_digested(path)
  path.write_text("[1, 2]")
  with pytest.raises(ValueError, match="cannot be read"):
    runs.read_digested(path)
  with pytest.raises(FileNotFoundError):
    runs.read_digested(tmp_path / "none.json")


@pytest.mark.parametrize(
  ("system", "variables", "wanted"),
  [
    ("linux", {}, "home/.cache"),
    ("linux", {"XDG_CACHE_HOME": "{}/chosen"}, "chosen"),
    ("linux", {"XDG_CACHE_HOME": "not/absolute"}, "home/.cache"),
    ("darwin", {}, "home/Library/Caches"),
    ("darwin", {"XDG_CACHE_HOME": "{}/chosen"}, "chosen"),
    ("win32", {"LOCALAPPDATA": "{}/local"}, "local"),
  ],
)
def test_the_users_cache_is_where_the_system_has_it(
  tmp_path, monkeypatch, system, variables, wanted
):
  for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
    monkeypatch.delenv(name, raising=False)
  for name, value in variables.items():
    monkeypatch.setenv(name, value.format(tmp_path))
  monkeypatch.setattr(sys, "platform", system)
  monkeypatch.setattr(pathlib.Path, "home", lambda: tmp_path / "home")
  assert runs.user_cache("data") == tmp_path / wanted / "jaxdistill" / "data"
  assert not list(tmp_path.iterdir())


def test_torn_lines_of_a_log_are_counted(tmp_path):
  lines = ['{"step": 1, "loss": 2.0}', '{"step": 2, "lo', '"text"', '{"loss": 1.0}', '{"step": 3}']
  (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
  read, torn = runs.read_metrics(tmp_path)
  assert ([line["step"] for line in read], torn) == ([1, 3], 3)


def test_a_fingerprint_tells_paths_shapes_dtypes_and_values_apart():
  ones = np.ones((2, 3), np.float32)
  trees = [
    {"a": ones},
    {"b": ones},
    {"a": ones.reshape(3, 2)},
    {"a": ones.astype(np.int32)},
    {"a": np.ones((2, 3))},  # 64 bits
    {"a": np.ones((2, 3)) + 1e-15},  # which JAX would round away
    {"a": np.nextafter(ones, 2)},
    {"a": -0 * ones},
    {"a": -0.0 * ones},
    {"a": {"b": ones}},
    {"a/b": ones},
    [ones],
    (None, [ones]),
    {"a": jax.random.key(0)},
    {"a": jax.random.key(1)},
    {"a": 1},
    {},
  ]
  found = [runs.fingerprint(tree) for tree in trees]
  assert len(set(found)) == len(trees)
  assert runs.fingerprint({"a": jnp.asarray(ones)}) == found[0]


def summed_on_the_host(leaf):
  """The checksum's formula over the bits one after another, by NumPy."""
  words = leaf if leaf.dtype == bool else leaf.reshape(-1).view(f"u{min(leaf.dtype.itemsize, 4)}")
  words = words.reshape(-1).astype(np.uint32)
  words = words + np.arange(words.size, dtype=np.uint32) * np.uint32(0x9E3779B9)
  sums = []
  for factor in (0x85EBCA6B, 0xC2B2AE35):
    words = (words ^ (words >> np.uint32(16))) * np.uint32(factor)
    words = words ^ (words >> np.uint32(13))
    sums.append(np.sum(words, dtype=np.uint32))
  return sums


@pytest.mark.parametrize(
  "dtype", ["float32", "bfloat16", "float16", "int8", "bool", "uint32", "complex64"]
)
def test_a_checksum_is_the_same_on_the_host_and_compiled(dtype):
  words = np.random.default_rng(0).integers(-100, 100, (5, 3))
  leaf = jnp.asarray(words > 0 if dtype == "bool" else words).astype(dtype)
  expected = summed_on_the_host(np.asarray(leaf))
  np.testing.assert_array_equal(_fingerprints._sums(leaf), expected)
  np.testing.assert_array_equal(_fingerprints._summed(leaf), expected)
  swapped = leaf.at[0, 0].set(leaf[4, 2]).at[4, 2].set(leaf[0, 0])
  changed = not np.array_equal(swapped, leaf)
  assert changed == (_fingerprints.checksum({"a": leaf}) != _fingerprints.checksum({"a": swapped}))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_tree_is_the_same_however_it_lies_on_the_devices(kind):
  tree = {"a": jnp.arange(24.0).reshape(4, 6), "b": jnp.ones(4, jnp.bfloat16)}
  tree["key"] = jax.random.split(jax.random.key(0), 4)
  types = (getattr(jax.sharding.AxisType, kind),)
  mesh = jax.make_mesh((2,), ("data",), axis_types=types)
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  for function in (runs.tree_identity, runs.fingerprint):
    assert function(jax.device_put(tree, split)) == function(tree)


def test_a_full_disk_is_one_sentence_whoever_notices_it(tmp_path):
  """A full one is hard to have; a file that grows too long is refused by the system likewise."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  before = {"params": {"kernel": np.ones(3)}}
  noise = np.random.default_rng(0).normal(size=100_000)
  with runs.Checkpoints(tmp_path / "checkpoints") as saved:
    log = runs.Metrics(tmp_path)
    saved.save(1, before)
    saved.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
      saved.save(2, {"params": {"kernel": noise}})
      sentence = "step 2.* cannot be written, .*kept$"
      with pytest.raises(runs.CheckpointError, match=sentence) as left:
        saved.wait()
      assert len("".join(traceback.format_exception(left.value))) < 3000
      for write in (
        lambda: runs.write_text(tmp_path / "a.json", "a" * 200_000),
        lambda: log.write(1, {"loss": noise}),
        lambda: runs.save_variables(tmp_path / "student", noise),
      ):
        with pytest.raises(OSError, match="cannot be written, ") as error:
          write()
        assert error.value.errno == errno.EFBIG
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    # Nothing half written takes up what is left, and what was there is whole.
    assert saved.steps() == [1]
    assert saved.restore(1)["params"]["kernel"].tolist() == [1, 1, 1]
  assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "metrics.jsonl"]
  assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]


@pytest.mark.parametrize(
  ("number", "kind", "words"),
  [
    (errno.ENOSPC, OSError, "the disk is full"),
    (errno.EDQUOT, OSError, "quota"),
    (errno.EROFS, OSError, "only to be read"),
    (errno.EACCES, PermissionError, "no right"),
  ],
)
def test_what_keeps_from_writing_is_said_and_known_by_its_number(tmp_path, number, kind, words):
  for error in (OSError(number, "foreign"), ValueError(f"Failed: {os.strerror(number)}")):
    sentence = f"a cannot be written, .*{words}"
    with pytest.raises(kind, match=sentence) as said, runs.writes(tmp_path / "a"):
      raise RuntimeError("wrapped") from error
    assert said.value.errno == number
  with pytest.raises(KeyError), runs.writes(tmp_path / "a"):
    raise KeyError("another")
