"""A cache's files: refused where they are another's, verified, resumed, written by anybody."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import types

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill import data, recipes, runs, teachers, train
from jaxdistill.teachers import _cache, _cache_files, _cache_shards, cache_writer, command
from jaxdistill.types import Model, Outputs, Teacher
from small_networks import dense

ROOT = pathlib.Path(__file__).parent.parent.parent
SIZE, VIEWS = 20, 3


def pictures(name="pictures", scale=1):
  rng = np.random.default_rng(0)
  inputs = rng.integers(0, 16, (SIZE, 4, 4, 1)).astype(np.uint8) * scale
  return data.from_arrays(inputs, rng.integers(0, 3, SIZE), num_classes=3, name=name)


def one_changed():
  """Beyond the eight examples whose looks are compared."""
  other = pictures()
  other.inputs[17, 2, 3] += 1
  return other


def source_of(examples=None, *, data_seed=5, views=VIEWS, augmentation=None, **options):
  return data.on_device(
    examples or pictures(),
    batch_size=4,
    data_seed=data_seed,
    augmentation=augmentation or data.crop(1),
    views=views,
    **options,
  )


def frozen(width):
  network = dense(width)
  return teachers.frozen(Model(network, network.init(jax.random.key(3), jnp.zeros((1, 4, 4, 1)))))


TEACHER = frozen(6)


def doubled(variables, batch):
  return Outputs(logits=2 * TEACHER.apply(variables, batch).logits)


def make(folder, teacher=TEACHER, source=None, **options):
  source = source or source_of()
  options = {"batch_size": 8, "progress": None, **options}
  return teachers.cached(teacher, source, folder=folder, **options)


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
  """A complete cache of several shards; copied before it is harmed."""
  folder = tmp_path_factory.mktemp("cache") / "complete"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(_cache_files, "SHARD_BYTES", 8 * (12 + 16))
    make(folder, in_advance=True)
  return folder


@pytest.fixture
def copied(complete, tmp_path):
  return pathlib.Path(shutil.copytree(complete, tmp_path / "cache"))


def shards(folder):
  return sorted(path.name for path in folder.glob("*.array_record"))


@pytest.mark.slow
def test_shards_are_array_records_that_grain_opens(complete):
  assert len(shards(complete)) == VIEWS * 3  # 8, 8 and 4 records
  paths = [str(complete / name) for name in shards(complete)[:3]]
  records = grain.sources.ArrayRecordDataSource(paths)
  assert len(records) == SIZE
  assert records[9][:5] == b"\x01\x00\x00\x009"
  logits = np.frombuffer(records[9][5:], "<f4")
  source = source_of()
  item = next(iter(source.whole.every(5, SIZE, 0)))
  expected = TEACHER(source.cut(source.shared, item)).logits[9]
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)  # another batch size


def test_a_manifest_says_what_the_cache_is_of(complete):
  manifest = json.loads((complete / "manifest.json").read_text())
  assert manifest["data"] == {"name": "pictures", "version": "", "size": SIZE}
  assert manifest["augmentation"] == "crop(1)"
  assert manifest["asked"] == {"kind": "frozen"}
  assert ["params/Dense_0/bias", [6], "float32"] in manifest["teacher"]["leaves"]
  assert manifest["libraries"]["jax"] == jax.__version__
  assert len(manifest["teacher"]["outputs"]["logits"]) == len(manifest["looks"]["0"][0]) == 8


OTHERS = {
  "other values": (
    {"teacher": jax.tree.map(lambda leaf: leaf.at[..., 0].add(1e-6), TEACHER)},
    "teacher: its variables have other values",
  ),
  "other shapes": (
    {"teacher": frozen(5)},
    r"teacher: its variables are others, first \['params/Dense_0/bias', \[6\], 'float32'\] there",
  ),
  "another function": (
    {"teacher": Teacher(TEACHER.variables, doubled)},
    r"asked: {'kind': 'frozen'} there, {'function': 'test_cache.doubled'} now",
  ),
  "other words": (
    {"teacher": dataclasses.replace(TEACHER, asked="at night")},
    r"asked: {'kind': 'frozen'} there, 'at night' now",
  ),
  "other outputs": (
    {"teacher": dataclasses.replace(TEACHER, apply=doubled)},
    "teacher: it puts out other logits",
  ),
  "another rule": (
    {"teacher": teachers.grouped(TEACHER, [0, 1, 2])},
    r"asked: {'kind': 'frozen'} there, {'kind': 'grouped', 'groups': \[\[0\], \[1\], \[2\]\], ",
  ),
  "features": ({"features": ["mid"]}, r"arrays: .* there, .*'features/mid'.* now"),
  "another dtype": ({"dtype": "float16"}, "dtype: 'float32' there, 'float16' now"),
  "another set": ({"source": source_of(pictures("others"))}, "data: {'name': 'pictures'"),
  "other pictures": ({"source": source_of(pictures(scale=2))}, "contents: .* other values"),
  "one number of one picture": (
    {"source": source_of(one_changed())},
    "contents: the data have the same name and size, and other values",
  ),
  "other numbers": (
    {"source": source_of(normalize=data.divide_by(7.0))},
    "looks: what the first 8 examples show in view 0 is not",
  ),
  "other ids": (
    {"source": source_of(dataclasses.replace(pictures(), ids=np.arange(1, SIZE + 1).astype(str)))},
    r"other examples: 1 of 20 ids are not in it \(20\)",
  ),
  "another augmentation": (
    {"source": source_of(augmentation=data.crop_flip(1))},
    r"augmentation: 'crop\(1\)' there, 'crop_flip\(1\)' now",
  ),
  "the same name": (
    {
      "source": source_of(augmentation=dataclasses.replace(data.crop(2), choices=9, name="crop(1)"))
    },
    "looks: what the first 8 examples show in view",
  ),
  "another seed": ({"source": source_of(data_seed=6)}, "data_seed: 5 there, 6 now"),
  "other views": ({"source": source_of(views=4)}, "view_count: 3 there, 4 now"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_cache_of_something_else_is_refused_by_name(complete, case):
  options, message = OTHERS[case]
  with pytest.raises(ValueError, match=message):
    make(complete, **options)


def test_another_batch_size_or_library_is_no_reason(copied):
  manifest = json.loads((copied / "manifest.json").read_text())
  manifest["libraries"]["jax"] = "0.0.1"
  _cache_files._write_manifest(copied, manifest)
  make(copied, source=dataclasses.replace(source_of(), batch_size=5))


# Damage.


def harm(folder, kind):
  path = folder / shards(folder)[4]  # the middle of view 1
  content = bytearray(path.read_bytes())
  if kind == "truncated":
    content = content[: len(content) // 2]
  elif kind == "flipped":
    content[-40] ^= 4
  path.write_bytes(content)
  if kind == "missing":
    path.unlink()
  return path.name


@pytest.mark.parametrize("kind", ["truncated", "flipped", "missing"])
def test_a_damaged_shard_is_named(copied, capsys, kind):
  name = harm(copied, kind)
  with pytest.raises(teachers.CacheError, match=f"{name} (has|is) "):
    make(copied)
  assert command.main(["verify", str(copied)]) == 1
  said = capsys.readouterr()
  assert name in said.err
  assert said.err.count("cannot be used") == 1
  assert command.main(["verify", str(copied), "--drop"]) == 1
  capsys.readouterr()
  assert command.main(["verify", str(copied)]) == 0
  assert "2 of 3 views of 20 examples of 'pictures' as float32" in capsys.readouterr().out
  make(copied, in_advance=True)
  assert not teachers.verify_cache(copied)
  assert len(_cache_files.read_manifest(copied)["views"]) == VIEWS


def test_half_a_shard_that_its_manifest_believes_in_is_found_by_its_count(copied, capsys):
  name = harm(copied, "truncated")
  manifest = json.loads((copied / "manifest.json").read_text())
  shard = next(s for s in manifest["views"]["1"] if s["file"] == name)
  shard["bytes"] = (copied / name).stat().st_size
  shard["sha256"] = runs.sha256(copied / name)
  _cache_files._write_manifest(copied, manifest)
  assert command.main(["verify", str(copied)]) == 1
  assert re.search(
    f"{name} (has 0 records, 8 were written|cannot be read)", capsys.readouterr().err
  )


@pytest.mark.parametrize("file", ["manifest.json", "ids.json"])
def test_damage_of_the_other_files_is_found(copied, capsys, file):
  text = (copied / file).read_text()
  (copied / file).write_text(text.replace("1", "2", 1))
  assert command.main(["verify", str(copied)]) == 1
  assert file in capsys.readouterr().err
  with pytest.raises(teachers.CacheError, match=file):
    make(copied)


@pytest.mark.parametrize(
  "name", ["../precious.txt", "{}/precious.txt", "link", "", "manifest.json"]
)
def test_a_manifest_has_no_say_over_files_outside_of_its_folder(copied, capsys, name):
  precious = copied.parent / "precious.txt"
  precious.write_text("mine")
  (copied / "link").symlink_to(precious)
  manifest = json.loads((copied / "manifest.json").read_text())
  shard = manifest["views"]["1"][0]
  shard |= {"file": name.format(copied.parent), **runs.size_and_digest(precious), "records": 0}
  _cache_files._write_manifest(copied, manifest)
  before = (copied / "manifest.json").read_text()
  assert command.main(["verify", str(copied), "--drop"]) == 1
  said = capsys.readouterr().err
  assert "manifest.json names" in said
  assert "--drop" not in said
  assert precious.read_text() == "mine"
  assert (copied / "manifest.json").read_text() == before
  with pytest.raises(teachers.CacheError):
    make(copied)


def test_a_lock_that_is_a_link_is_not_followed(copied, capsys):
  precious = copied.parent / "precious.txt"
  precious.write_text("mine")
  (copied / ".lock").unlink(missing_ok=True)
  (copied / ".lock").symlink_to(precious)
  with pytest.raises(OSError, match=r"\.lock"):
    _cache_files.forget(copied, [0])
  assert precious.read_text() == "mine"


MALFORMED = [
  ("views", []),
  ("views", {"1": 3}),
  ("views", {"one": []}),
  ("views", {"1": [{"file": "a"}]}),
  ("arrays", 3),
  ("arrays", [{"name": "logits"}]),
  ("arrays", [{"name": "logits", "dtype": "|O", "shape": [3]}]),
  ("arrays", [{"name": "logits", "dtype": "<f4", "shape": [-1]}]),
  ("arrays", [{"name": "logits", "dtype": "<f4", "shape": [2**30]}]),
  ("arrays", [{"name": "logits", "dtype": "<f4", "shape": "ab"}]),
  ("ids", "ids.json"),
  ("ids", {"file": 3, "sha256": "a"}),
  ("data", None),
  ("data", {"size": "many"}),
]


@pytest.mark.parametrize(("key", "value"), MALFORMED)
def test_a_manifest_that_is_intact_and_malformed_is_called_so(copied, capsys, key, value):
  manifest = json.loads((copied / "manifest.json").read_text())
  _cache_files._write_manifest(copied, manifest | {key: value})
  assert command.main(["verify", str(copied), "--drop"]) == 1
  assert "The cache cannot be used" in capsys.readouterr().err
  with pytest.raises(teachers.CacheError, match="manifest.json has"):
    make(copied)


def test_json_as_deep_as_one_likes_is_damage(copied, capsys):
  (copied / "manifest.json").write_text("[" * 100_000)
  assert command.main(["verify", str(copied)]) == 1
  assert "nested too deeply" in capsys.readouterr().err


def test_a_folder_of_other_things_is_left_alone(tmp_path, capsys):
  (tmp_path / "notes.txt").write_text("mine")
  with pytest.raises(ValueError, match=r"holds \['notes.txt'\] and no cache"):
    make(tmp_path)
  assert command.main(["verify", str(tmp_path)]) == 1
  assert "is no cache: it has no manifest.json" in capsys.readouterr().err


# The command in a process of its own.


def python(*words, **options):
  program = [sys.executable, *words]
  return subprocess.run(program, capture_output=True, text=True, timeout=120, **options)


NO_JAX = "import sys; sys.modules['jax'] = sys.modules['jaxlib'] = None; "


@pytest.mark.slow
def test_verifying_needs_no_jax(complete):
  program = (
    f"{NO_JAX}from jaxdistill.teachers import command\n"
    "sys.exit(command.main(['verify', sys.argv[1]]))"
  )
  done = python("-c", program, str(complete))
  assert done.returncode == 0, done.stderr
  assert "every digest and count is right" in done.stdout


@pytest.mark.slow
def test_the_command_says_what_is_wrong_and_fails(copied, capsys):
  name = harm(copied, "flipped")
  done = python("-m", "jaxdistill", "cache", "verify", str(copied))
  assert done.returncode == 1
  assert name in done.stderr
  assert "Traceback" not in done.stderr
  assert command.main(["verify", str(copied), "--teacher", "nothing"]) == 1
  assert "nothing must be module:function" in capsys.readouterr().err


def right():
  return TEACHER, source_of()


def wrong():
  return jax.tree.map(lambda leaf: leaf + 1e-3, TEACHER), source_of()


def test_the_teacher_is_compared_on_a_sample(complete, copied, capsys, monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT / "tests"))
  assert command.main(["verify", str(complete), "--teacher", "test_cache:right"]) == 0
  assert "a sample comes out the same" in capsys.readouterr().out
  assert command.main(["verify", str(complete), "--teacher", "test_cache:wrong"]) == 1
  assert "its variables have other values" in capsys.readouterr().err
  # Numbers that were wrong when they were written, so that every digest is right.
  files = _cache_files.read_manifest(copied)
  ids = _cache_files.read_ids(copied, files)
  rows = _cache_files.read_view(copied, files, 1, ids)
  _cache_files.forget(copied, [1])
  for shard in _cache_shards.shards_of(files, [1]):
    changed = {"logits": 1.1 * rows["logits"][shard.first : shard.last]}
    _cache_files.write_rows(copied, files, shard, changed, ids)
  assert _cache_files.publish(copied) == [1]
  assert command.main(["verify", str(copied), "--teacher", "test_cache:right"]) == 1
  assert "logits in view 1 is off by" in capsys.readouterr().err


# Killed while it is being filled.

CHILD = """
import os, signal, sys
sys.path[:0] = sys.argv[2].split(os.pathsep)
import test_cache as t
from jaxdistill.teachers import _cache_files

written = []
replace = os.replace
def dying(source, target):
  written.append(str(target))
  if sum(name.endswith(".array_record") for name in written) == int(sys.argv[3]):
    if sys.argv[4] == "after":
      replace(source, target)
    os.kill(os.getpid(), signal.SIGKILL)
  replace(source, target)
os.replace = dying
_cache_files.SHARD_BYTES = 8 * 28
t.make(sys.argv[1], in_advance=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("shard", "when", "left"), [(5, "before", 1), (6, "after", 1)])
def test_a_cache_that_was_killed_is_filled_on(tmp_path, complete, shard, when, left):
  folder = tmp_path / "cache"
  paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "tests" / "teachers")])
  killed = python("-c", CHILD, str(folder), paths, str(shard), when)
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  assert not teachers.verify_cache(folder)
  manifest = _cache_files.read_manifest(folder)
  assert _cache_files.complete_views(manifest) == list(range(left))
  source = make(folder, in_advance=True)
  assert not teachers.verify_cache(folder)
  assert not list(folder.glob("*.writing"))
  whole = make(complete, source=source_of())
  np.testing.assert_allclose(*(s.shared[1]["logits"] for s in (source, whole)), rtol=1e-6)


def test_views_are_filled_when_they_are_shown_and_never_twice(tmp_path):
  folder, source = tmp_path / "cache", source_of()
  first = make(folder)
  assert _cache_files.complete_views(_cache_files.read_manifest(folder)) == []
  first.items(source.steps_per_epoch, 1)
  assert _cache_files.complete_views(_cache_files.read_manifest(folder)) == [1]
  other = make(folder)
  other.items(0, source.steps_per_epoch)
  # The first one sees what the other has written, and goes on from there.
  first.items(0, 3 * source.steps_per_epoch)
  assert _cache_files.complete_views(_cache_files.read_manifest(folder)) == [0, 1, 2]
  assert len(shards(folder)) == VIEWS * 3
  assert make(folder, in_advance=True).whole is not None  # complete, so it lies on the device


# Filled by several processes.


@pytest.fixture
def eight_a_shard(monkeypatch):
  monkeypatch.setattr(_cache_files, "SHARD_BYTES", 8 * 28)


def fill(folder, teacher=TEACHER, **options):
  options = {"batch_size": 8, "progress": None, **options}
  return teachers.fill(teacher, source_of(), folder, **options)


def views_of(folder):
  return _cache_files.read_manifest(folder)["views"]


def test_parts_filled_apart_make_the_files_of_one_process(tmp_path, complete, eight_a_shard):
  folder = tmp_path / "cache"
  made = [fill(folder, part=(p, 4)) for p in (2, 0, 3, 1)]
  assert [one.shards for one in made] == [2, 2, 3, 2]  # of nine
  assert sum(one.records for one in made) == VIEWS * SIZE
  assert [one.lacking for one in made][-1] == 0
  assert sorted(one.lacking for one in made) == [one.lacking for one in made][::-1]
  assert views_of(folder) == views_of(complete)  # names, sizes and digests
  assert sorted(path.name for path in folder.glob("view-*")) == shards(complete)
  assert fill(folder).shards == 0


def test_a_shard_is_taken_from_the_dead_and_left_to_the_living(
  tmp_path, complete, eight_a_shard, monkeypatch
):
  folder = tmp_path / "cache"
  fill(folder, part=(0, 9))
  _, second, third = _cache_shards.shards_of(_cache_files.read_manifest(folder))[1:4]
  dead = folder / "view-00000-from-000000008.claim"
  dead.write_text(json.dumps({**_cache_shards._me(), "started": "long ago"}))
  silent = folder / "view-00000-from-000000016.claim"
  silent.write_text(json.dumps({"host": "another", "machine": "x", "pid": 1, "started": "1"}))
  os.utime(silent, (0, 0))
  with _cache_shards.claimed(folder, third) as ours:
    assert ours
    made = fill(folder)
    assert (made.shards, made.taken_over, made.lacking) == (7, 2, third.records)
    with _cache_shards.claimed(folder, third) as again:
      assert again is False
  silent.write_text(json.dumps({"host": "another", "machine": "x", "pid": 1, "started": "1"}))
  with _cache_shards.claimed(folder, second) as ours:
    assert ours is False  # it was heard of a moment ago
  assert fill(folder).lacking == 0
  assert views_of(folder) == views_of(complete)


def test_what_a_process_left_of_a_shard_is_not_asked_again(tmp_path, complete, monkeypatch):
  monkeypatch.setattr(_cache_files, "SHARD_BYTES", 16 * 100)
  monkeypatch.setattr(_cache, "PART_SECONDS", 0)
  monkeypatch.setattr(_cache_shards, "SHARDS", 1)
  folder, asked, died = tmp_path / "cache", [], []
  whole = source_of().whole.item

  def item(seed, batch, view, number):
    asked.append(number)
    if number == 3 and not died:
      died.append(True)
      raise ConnectionError("the disk is gone")
    return whole(seed, batch, view, number)

  source = source_of()
  source = dataclasses.replace(source, whole=dataclasses.replace(source.whole, item=item))
  with pytest.raises(ConnectionError):
    teachers.fill(TEACHER, source, folder, batch_size=4, progress=None)
  manifest = _cache_files.read_manifest(folder)
  # Each batch is taken when the next one is on its way: of three that were asked, two.
  assert VIEWS * SIZE - _cache_files.lacking(folder, manifest) == 8
  assert not teachers.verify_cache(folder)
  asked.clear()
  assert teachers.fill(TEACHER, source, folder, batch_size=4, progress=None).lacking == 0
  assert [asked.count(number) for number in (1, 2, 3, 4)] == [2, 3, 3, 3]  # of three views
  rows = [
    _cache_files.read_view(one, m, 0, _cache_files.read_ids(one, m))["logits"]
    for one in (folder, complete)
    for m in [_cache_files.read_manifest(one)]
  ]
  np.testing.assert_allclose(*rows, rtol=1e-5, atol=1e-6)  # another batch size


@pytest.mark.parametrize("rows", [3, 200])
def test_what_a_cache_will_take_is_told_before(tmp_path, rows):
  examples = data.from_arrays(np.zeros((400, 2), np.float32), np.zeros(400, int), num_classes=3)
  source = data.on_device(examples, batch_size=4, data_seed=0)
  teacher = Teacher({}, lambda _, batch: Outputs(logits=jnp.ones((len(batch.index), rows))))
  assert teachers.fill(teacher, source, tmp_path / "c", batch_size=40, progress=None).lacking == 0
  manifest = _cache_files.read_manifest(tmp_path / "c")
  ids = _cache_files.read_ids(tmp_path / "c", manifest)
  all_of_them = _cache_shards.shards_of(manifest)
  told = _cache_files.expected_bytes(cache_writer.row_type(manifest["arrays"]), ids, all_of_them)
  taken = sum(shard["bytes"] for shard in manifest["views"]["0"])
  assert told == pytest.approx(taken, rel=0.2)  # the requirement; blocks of 64 KiB


def test_the_log_tells_bytes_batches_and_time(tmp_path, capsys, eight_a_shard):
  fill(tmp_path / "cache", progress="mine")
  said = capsys.readouterr().err
  assert re.search(r"mine: 60 examples: 1\.2 MB in 9 files of .*, 9 batches of 8", said)
  assert re.search(r"mine: about \d+ s more for one process, by 5 batches of [\d.e-]+ s", said)


@pytest.mark.parametrize(("rows", "batches"), [(10_000, 7), (1_200, 6), (40, None)])
def test_the_time_of_the_rest_is_told_by_more_than_a_moment(monkeypatch, rows, batches):
  """By ten seconds after the batch that compiles, or by a twentieth of all rows."""
  clock, said = [0.0], []
  monkeypatch.setattr(_cache, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
  shown = types.SimpleNamespace(left=rows, say=said.append)
  shown.update = lambda count: setattr(shown, "left", shown.left - count)
  told = _cache._Estimating(shown, "cache", 10)
  for batch, seconds in enumerate([60, 1, 1, 1, 1, 1, 3, 3, 30]):
    clock[0] += seconds
    if batch < rows // 10:
      told(10)
  if batches is None:
    assert said == []
  else:
    each = {6: 8, 7: 11}[batches] / batches  # seconds of these batches
    left = _cache._spoken((rows / 10 - 1 - batches) * each)
    assert said == [
      f"cache: about {left} more for one process, by {batches} batches of {each:.2g} s"
    ]


def test_a_command_fills_parts_and_completes_what_lacks(tmp_path, complete, capsys, monkeypatch):
  monkeypatch.setattr(_cache_files, "SHARD_BYTES", 8 * 28)
  monkeypatch.syspath_prepend(str(ROOT / "tests"))
  folder = str(tmp_path / "cache")
  words = ["fill", folder, "--teacher", "test_cache:right", "--batch-size", "8"]
  assert command.main([*words, "--part", "2/3"]) == 0
  assert "filled 3 files; 40 examples lack" in capsys.readouterr().out
  assert command.main(["verify", folder, "--complete"]) == 1
  assert "40 examples lack" in capsys.readouterr().err
  complete_it = ["verify", folder, "--teacher", "test_cache:right", "--complete"]
  assert command.main(complete_it) == 0
  said = capsys.readouterr().out
  assert "filled 6 files that lacked" in said
  assert "a sample comes out the same" in said
  assert views_of(tmp_path / "cache") == views_of(complete)
  harm(tmp_path / "cache", "flipped")
  assert command.main(complete_it) == 0
  assert "filled 3 files that lacked" in capsys.readouterr().out
  for wrong in ("0/3", "4/3", "3", "1/0"):
    with pytest.raises(SystemExit):
      command.main([*words, "--part", wrong])
  assert command.main([*words[:4], "--limit-gb", "1e-7"]) == 1
  assert "the cache would take" in capsys.readouterr().err


SEVERAL = """
import os, signal, sys, time
sys.path[:0] = sys.argv[2].split(os.pathsep)
import jax
jax.config.update("jax_num_cpu_devices", 2)
import test_cache as t
from jaxdistill.teachers import _cache_files

_cache_files.SHARD_BYTES = 8 * 28
wrote = _cache_files.write_rows
def write(*words):
  time.sleep(0.2)  # so that all three have something to do
  if sys.argv[3] == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
  return wrote(*words)
_cache_files.write_rows = write
print(t.fill(sys.argv[1]))
"""


@pytest.mark.slow
def test_three_processes_of_which_one_is_killed_fill_what_one_fills(tmp_path, eight_a_shard):
  paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "tests" / "teachers")])
  folders = [tmp_path / "one", tmp_path / "three"]
  words = [
    [sys.executable, "-c", SEVERAL, str(folder), paths, fate]
    for folder, fate in [
      (folders[0], "lives"),
      *((folders[1], fate) for fate in ("lives", "dies", "lives")),
    ]
  ]
  started = [subprocess.Popen(w, stdout=subprocess.PIPE, text=True) for w in words]
  said = [one.communicate(timeout=300)[0] for one in started]
  assert [one.returncode for one in started] == [0, 0, -signal.SIGKILL, 0]
  assert sum(int(re.search(r"shards=(\d+)", text)[1]) for text in (said[1], said[3])) <= 9
  assert not teachers.verify_cache(folders[1])
  last = fill(folders[1])
  assert (last.lacking, last.shards, last.taken_over) in [(0, 0, 0), (0, 1, 1)]
  assert views_of(folders[1]) == views_of(folders[0])
  assert not list(folders[1].glob("*.claim"))


# Written by another program.

MAIN = """
rng = np.random.default_rng(1)
order = rng.permutation(20).tolist()
logits = rng.normal(size=(20, 3)).astype(np.float32)
hidden = rng.normal(size=(20, 5)).astype(np.float32)
rows = {"logits": logits[order], "features/hidden": hidden[order]}
import sys
write(sys.argv[1], rows, [str(i) for i in order], name="pictures")
np.savez(sys.argv[2], logits=logits, hidden=hidden)
"""


@pytest.mark.slow
def test_a_program_without_jax_fills_a_cache_and_a_student_learns_from_it(tmp_path):
  writer = pathlib.Path(cache_writer.__file__).read_text().partition("import annotations\n")[2]
  no_library = "sys.modules['jaxdistill'] = sys.modules['array_record'] = None\n"
  program = NO_JAX + no_library + writer + MAIN
  done = python("-c", program, str(tmp_path / "cache"), str(tmp_path / "rows.npz"))
  assert done.returncode == 0, done.stderr
  assert not teachers.verify_cache(tmp_path / "cache")
  source = source_of(augmentation=data.identity, views=None, normalize=data.DIGITS)
  foreign = teachers.cached(None, source, folder=tmp_path / "cache")
  batch = foreign.cut(foreign.shared, jax.tree.map(lambda leaf: leaf[0], foreign.items(2, 1)))
  rows = np.load(tmp_path / "rows.npz")
  np.testing.assert_array_equal(batch.teacher.logits, rows["logits"][batch.index])
  np.testing.assert_array_equal(batch.teacher.features["hidden"], rows["hidden"][batch.index])
  fitted = train.fit(
    dense(16),
    recipes.kd(temperature=1.0, soft_weight=1.0, hard_weight=0.0),
    data=foreign,
    optimizer=optax.adam(0.02),
    steps=300,
    run=train.Run(progress=None),
  )
  losses = [line["loss"] for line in fitted.history]
  assert losses[-1] < 0.1 * losses[0]


def test_who_opens_a_foreign_cache_is_told_what_is_wrong(tmp_path, complete, copied):
  with pytest.raises(ValueError, match="teacher is None, and there is no folder"):
    teachers.cached(None, source_of())
  with pytest.raises(FileNotFoundError, match="is no cache"):
    teachers.cached(None, source_of(), folder=tmp_path / "nowhere")
  with pytest.raises(ValueError, match="data_seed: 5 there, 2 now"):
    teachers.cached(None, source_of(data_seed=2), folder=complete)
  assert teachers.cached(None, source_of(), folder=complete).teacher is not None
  _cache_files.forget(copied, [2])
  with pytest.raises(ValueError, match=r"lacks the views \[2\] of 3"):
    teachers.cached(None, source_of(), folder=copied)
  manifest = _cache_files.read_manifest(complete)
  foreign = {name: value for name, value in manifest.items() if name not in ("teacher", "looks")}
  _cache_files._write_manifest(copied, foreign)
  with pytest.raises(ValueError, match=r"open it by cached\(None, source\)"):
    make(copied)
  _cache_files._write_manifest(copied, {n: v for n, v in foreign.items() if n != "data"})
  with pytest.raises(teachers.CacheError, match="lacks 'data'"):
    make(copied)


def test_rows_of_other_examples_are_noticed(copied):
  """By their ids: a digest would not notice what was written in another order."""
  from array_record.python import array_record_module as array_record

  name = shards(copied)[0]
  reader = array_record.ArrayRecordReader(str(copied / name))
  records = reader.read_all()
  reader.close()
  writer = array_record.ArrayRecordWriter(str(copied / name), _cache_files._OPTIONS)
  for record in [records[1], records[0], *records[2:]]:
    writer.write(record)
  writer.close()
  manifest = json.loads((copied / "manifest.json").read_text())
  shard = next(s for views in manifest["views"].values() for s in views if s["file"] == name)
  shard["bytes"] = (copied / name).stat().st_size
  shard["sha256"] = runs.sha256(copied / name)
  _cache_files._write_manifest(copied, manifest)
  (problem,) = teachers.verify_cache(copied)
  assert f"{name} has another record where that of '0' belongs" in problem
