"""Text to batches of tokens: the shift, packing, masks, tokenizers; each prediction once."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import small_networks
from jaxdistill import data, networks, recipes, types
from jaxdistill.data import tokenizers
from jaxdistill.networks.models import Decoder, DecoderConfig
from jaxdistill.networks.models.decoder import causal_mask

CONFIG = DecoderConfig(256, 16, layers=1, heads=2, kv_heads=1, head_dim=8, hidden=16)


def some(count, seed=0, most=12):
  """Documents of 2 .. most tokens, no token twice: a place says which document it is of."""
  rng = np.random.default_rng(seed)
  sizes = rng.integers(2, most + 1, count)
  starts = np.concatenate([[0], np.cumsum(sizes)])
  return [np.arange(a, b, dtype=np.int64) for a, b in itertools.pairwise(starts)]


def test_the_shift_by_hand():
  tokens = np.array([[3, 1, 4, 1, 5]])
  inputs, labels, weight = data.shifted(tokens, where=np.array([[1, 0, 0, 1, 1]]))
  assert inputs.tolist() == [[3, 1, 4, 1]]
  assert labels.tolist() == [[1, 4, 1, 5]]
  assert weight.tolist() == [[0.0, 0.0, 1.0, 1.0]]
  assert weight.dtype == np.float32
  traced = jax.jit(data.shifted)(jnp.asarray(tokens))
  assert [leaf.tolist() for leaf in traced] == [inputs.tolist(), labels.tolist(), [[1.0] * 4]]


@pytest.mark.parametrize(
  ("tokens", "where", "message"),
  [
    (np.ones((2, 1), int), None, "predicted alone"),
    (np.ones((2, 3)), None, "integers"),
    (np.ones(3, int), None, "integers"),
    (np.ones((2, 3), int), np.ones((2, 2)), "where has the shape"),
  ],
)
def test_windows_that_cannot_be_shifted_are_refused(tokens, where, message):
  with pytest.raises(ValueError, match=message):
    data.shifted(tokens, where=where)


@pytest.mark.parametrize("split", ["cut", "pad"])
@pytest.mark.parametrize("length", [1, 4, 7, 30])
def test_every_prediction_of_every_document_is_there_once(split, length):
  documents = some(40)
  packed = data.pack(documents, length=length, split=split, data_seed=3)
  counted = packed.weight > 0
  pairs = sorted(zip(packed.tokens[counted], packed.labels[counted], strict=True))
  wanted = [(int(a), int(b)) for d in documents for a, b in itertools.pairwise(d)]
  assert pairs == sorted(wanted)
  np.testing.assert_array_equal(counted, packed.segments > 0)
  assert packed.lost == 0
  for row in range(len(packed.tokens)):
    segments, positions = packed.segments[row], packed.positions[row]
    used = int((segments > 0).sum())
    assert (segments[used:] == 0).all()
    assert set(np.diff(segments[:used])) <= {0, 1}
    assert segments[0] == 1
    starts = np.flatnonzero(np.diff(segments[:used], prepend=0))
    for start, end in itertools.pairwise([*starts.tolist(), used]):
      np.testing.assert_array_equal(positions[start:end], np.arange(end - start))
      np.testing.assert_array_equal(
        packed.tokens[row, start + 1 : end], packed.labels[row, start : end - 1]
      )
  if split == "pad":
    assert packed.segments.max() == 1


def test_rows_are_filled_by_first_fit_in_an_order_of_the_seed():
  documents = some(60, seed=1, most=9)
  packed = data.pack(documents, length=10, data_seed=5)
  order = data.epoch_order(5, 0x7061636B, 60)
  rows = []  # written anew: the first row with room, by looking at all of them
  for i in order.tolist():
    size = len(documents[i]) - 1
    row = next((r for r in rows if sum(len(d) - 1 for d in r) + size <= 10), None)
    if row is None:
      rows.append(row := [])
    row.append(documents[i])
  assert len(rows) == len(packed.tokens)
  for row, made in zip(rows, packed.tokens, strict=True):
    want = np.concatenate([d[:-1] for d in row])
    np.testing.assert_array_equal(made[: len(want)], want)
  again = data.pack(documents, length=10, data_seed=5)
  np.testing.assert_array_equal(again.tokens, packed.tokens)
  assert (data.pack(documents, length=10, data_seed=6).tokens[0] != packed.tokens[0]).any()


def test_long_documents_are_cut_or_dropped():
  document = np.arange(10)
  cut = data.pack([document], length=4)
  rows = sorted(cut.tokens.tolist())
  assert rows == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 0, 0, 0]]
  assert sorted(cut.labels[cut.weight > 0].tolist()) == list(range(1, 10))
  # Whatever row a piece is in, it is of its document; a document that was dropped has no number.
  both = data.pack([document, np.arange(20, 23)], length=4)
  own = (both.tokens >= 20).astype(np.int32)
  np.testing.assert_array_equal(both.documents, np.where(both.segments > 0, own, -1))
  assert data.pack([document, np.arange(3)], length=4, split="drop").documents.max() == 1
  dropped = data.pack([document, np.arange(3)], length=4, split="drop")
  assert dropped.lost == 9
  assert dropped.tokens.tolist() == [[0, 1, 0, 0]]
  with pytest.raises(ValueError, match="nothing is left to predict"):
    data.pack([document], length=4, split="drop")


def test_padding_that_is_a_real_token_loses_nothing():
  end = 7
  documents = [np.array([1, 2, end]), np.array([3, end])]
  packed = data.pack(documents, length=5, pad=end)
  assert packed.weight.sum() == 3
  assert (packed.labels[packed.weight > 0] == end).sum() == 2


def test_prompts_are_read_and_not_learnt():
  documents, where = [np.arange(6), np.arange(10, 14)], [[0, 0, 0, 1, 1, 0.5], [0, 1, 1, 1]]
  packed = data.pack(documents, length=9, where=where)
  weights = {
    int(label): float(weight)
    for label, weight, segment in zip(
      packed.labels.ravel(), packed.weight.ravel(), packed.segments.ravel(), strict=True
    )
    if segment
  }
  assert weights == {1: 0, 2: 0, 3: 1, 4: 1, 5: 0.5, 11: 1, 12: 1, 13: 1}


@pytest.mark.parametrize(
  ("documents", "options", "message"),
  [
    ([np.array([1, 2]), np.array([3])], {}, r"documents\[1\] has 1 tokens"),
    ([np.array([1, 300])], {"vocabulary": 256}, r"documents\[0\] has the token 300 at position 1"),
    ([np.array([1, -1])], {}, "the token -1 at position 1"),
    ([np.array([1, 2**31])], {}, "the token 2147483648"),
    ([np.array([1.0, 2.0])], {}, r"documents\[0\] must be integers"),
    ([np.array([[1, 2]])], {}, r"documents\[0\] must be integers"),
    ([np.array([1, 2])], {"where": []}, "where has 0 entries for 1 documents"),
    ([np.array([1, 2])], {"where": [[1]]}, r"where\[0\] must be numbers \[2\]"),
    ([np.array([1, 2])], {"where": [[1, -1]]}, r"where\[0\] must be finite and not neg"),
    ([np.array([1, 2])], {"where": [[1, np.nan]]}, r"where\[0\] must be finite and not neg"),
    ([np.array([1, 2])], {"split": "keep"}, "split='keep'"),
    ([np.array([1, 2])], {"length": 0}, "length=0"),
    ([np.array([1, 2])], {"pad": 9, "vocabulary": 9}, "pad=9"),
    ([], {}, "documents has 0 entries"),
  ],
)
def test_documents_that_do_not_fit_are_refused(documents, options, message):
  with pytest.raises(ValueError, match=message):
    data.pack(documents, **{"length": 4, **options})


TEXTS = ["To be, or not to be:", "that is the question.", "ha", "Ay, there's the rub — né?"]


def texts_of(examples, tokenizer):
  """The documents again, from the packed rows."""
  found = []
  for row in range(len(examples)):
    tokens, segments = examples.inputs["tokens"][row], examples.inputs["segments"][row]
    for segment in range(1, segments.max() + 1):
      here = np.flatnonzero(segments == segment)
      document = [*tokens[here], examples.labels[row, here[-1]]]
      found.append(tokenizer.decode(document))
  return sorted(found)


def test_texts_of_every_kind_are_the_same_examples(tmp_path):
  tokenizer = tokenizers.utf8()
  examples = data.from_text(TEXTS, tokenizer, length=40)
  assert texts_of(examples, tokenizer) == sorted(TEXTS)
  assert examples.num_classes == 256
  assert tokenizer.digest in examples.version
  files = []
  for i, text in enumerate(TEXTS):
    files.append(tmp_path / f"{i}.txt")
    files[-1].write_bytes(text.encode())
  stored = data.from_arrays(np.array([text.encode() for text in TEXTS], object), None)
  for same in (files, [{"text": t} for t in TEXTS], [t.encode() for t in TEXTS], stored):
    other = data.from_text(same, tokenizer, length=40)
    jax.tree.map(np.testing.assert_array_equal, other.inputs, examples.inputs)
    np.testing.assert_array_equal(other.labels, examples.labels)
    np.testing.assert_array_equal(other.weight, examples.weight)
  one = data.from_text(files[0], tokenizer, length=8)
  assert int(one.weight.sum()) == len(TEXTS[0]) - 1


def test_answers_are_learnt_and_prompts_are_not():
  tokenizer = tokenizers.utf8()
  rows = [{"question": "2+2=", "answer": "4"}, {"question": "", "answer": "hm"}]
  examples = data.from_text(rows, tokenizer, length=12, field="answer", prompt="question", end=0)
  learnt = examples.labels[examples.weight > 0]
  assert sorted(learnt.tolist()) == sorted([ord("4"), 0, ord("m"), 0])
  with pytest.raises(ValueError, match=r"texts\[0\] has no \['answer'\]"):
    data.from_text([{"question": "?"}], tokenizer, length=4, field="answer", prompt="question")
  with pytest.raises(ValueError, match="is no dict"):
    data.from_text(["a text"], tokenizer, length=4, prompt="question")


def test_texts_that_are_none_are_refused(tmp_path):
  tokenizer = tokenizers.utf8()
  with pytest.raises(TypeError, match=r"texts\[0\]=3 must be text"):
    data.from_text([3], tokenizer, length=4)
  with pytest.raises(TypeError, match="texts=.*must be a text"):
    data.from_text({"text": "one"}, tokenizer, length=4)
  with pytest.raises(ValueError, match=r"texts\[0\] is no UTF-8"):
    data.from_text([b"\xff\xfe"], tokenizer, length=4)
  with pytest.raises(ValueError, match="end=256"):
    data.from_text(["ab"], tokenizer, length=4, end=256)
  with pytest.warns(UserWarning, match="left out 19 predictions"):
    data.from_text(["a" * 20, "ab"], tokenizer, length=4, split="drop")


def test_batches_on_the_device_and_streamed_are_equal():
  examples = data.from_text(TEXTS * 3, tokenizers.utf8(), length=25)
  sources = [make(examples, batch_size=3, data_seed=1) for make in (data.on_device, data.streamed)]
  items = [source.items(step=2, count=2) for source in sources]
  for step in range(2):
    first, second = (
      source.cut(source.shared, jax.tree.map(lambda leaf, step=step: leaf[step], item))
      for source, item in zip(sources, items, strict=True)
    )
    assert first.weight.shape == first.labels.shape == (3, 25)
    assert first.inputs["tokens"].dtype == jnp.int32
    jax.tree.map(np.testing.assert_array_equal, first, second)
    rows = np.asarray(first.index)
    np.testing.assert_array_equal(first.weight, examples.weight[rows])
    np.testing.assert_array_equal(first.inputs["segments"], examples.inputs["segments"][rows])


@pytest.mark.slow
def test_what_lies_in_padding_reaches_no_parameter():
  examples = data.from_text(TEXTS, tokenizers.utf8(), length=60)
  padding = examples.inputs["segments"] == 0
  assert padding.any()
  tokens = np.where(padding, 77, examples.inputs["tokens"])
  other = dataclasses.replace(
    examples,
    inputs={**examples.inputs, "tokens": tokens},
    labels=np.where(padding, 78, examples.labels),
  )
  network = networks.linen(Decoder(CONFIG), logits=lambda out: out.head(out.hidden))
  found = []
  for these in (examples, other):
    source = data.on_device(these, batch_size=2, data_seed=0)
    fitted = small_networks.fit(
      network, recipes.labels(), data=source, optimizer=optax.adam(1e-2), steps=2
    )
    found.append(fitted.variables)
  embeddings = [np.asarray(v["params"]["embed"].pop("embedding")) for v in found]
  jax.tree.map(np.testing.assert_array_equal, *found)
  np.testing.assert_array_equal(*embeddings)


def test_segments_of_packed_rows_keep_documents_apart():
  packed = data.pack(some(6), length=30)
  at, segments = jnp.asarray(packed.positions), jnp.asarray(packed.segments)
  mask = np.asarray(causal_mask(at, segments, at, segments))
  for row in range(len(mask)):
    for q, k in zip(*np.nonzero(mask[row]), strict=True):
      assert k <= q
      assert q == k or packed.segments[row, q] == packed.segments[row, k] > 0


def test_shakespeare_as_tfds_has_it(tfds_dir):
  if not (tfds_dir / "tiny_shakespeare").is_dir():
    pytest.skip("no tiny_shakespeare beside CIFAR-100")
  text = data.load(
    "tiny_shakespeare", "validation", data_dir=tfds_dir, inputs="text", labels=None, cache=False
  )
  tokenizer = tokenizers.characters(text.inputs[0].decode())
  examples = data.from_text(text, tokenizer, length=128, name="tiny_shakespeare")
  assert int(examples.weight.sum()) == len(text.inputs[0]) - 1
  assert examples.num_classes == tokenizer.vocabulary <= 65
  assert examples.labels.shape == (436, 128)
  whole = np.asarray(examples.inputs["tokens"][examples.weight.sum(axis=1) == 128][:3])
  for row in whole:
    assert tokenizer.decode(row) in text.inputs[0].decode()


def test_bytes_and_characters_go_there_and_back():
  text = "né — £ and\n"
  for made in (tokenizers.utf8(), tokenizers.characters([text, "abc"])):
    tokens = made.encode(text)
    assert tokens.dtype == np.int32
    assert made.decode(tokens) == text
    assert made.bytes.shape == (made.vocabulary,)
    assert made.bytes[tokens].sum() == len(text.encode())
  with pytest.raises(ValueError, match="the character 'z' is none of the tokenizer's 3"):
    tokenizers.characters("abc").encode("abz")
  with pytest.raises(ValueError, match="no character"):
    tokenizers.characters([])
  assert tokenizers.characters("ab").digest != tokenizers.characters("abc").digest
  assert tokenizers.characters("ab").digest == tokenizers.characters(["b", "a"]).digest


def test_byte_pairs_are_trained_kept_and_counted(tmp_path):
  pytest.importorskip("tokenizers", reason="pip install 'jaxdistill[text]'")
  made = tokenizers.trained(TEXTS * 5, 290, special=["<end>"])
  assert made.vocabulary == 290
  assert tokenizers.trained(TEXTS * 5, 290, special=["<end>"]).digest == made.digest
  text = "To be: né — 日本 🙂\n\tthe question"  # bytes that no training text had
  tokens = made.encode(text)
  assert made.decode(tokens) == text
  assert len(tokens) < len(text.encode())
  assert made.bytes[tokens].sum() == len(text.encode())
  assert made.bytes[0] == 0
  assert made.decode([0]) == "<end>"
  (tmp_path / "tokenizer.json").write_text(made.definition)
  read = tokenizers.load(tmp_path)
  assert read.digest == made.digest
  np.testing.assert_array_equal(read.encode(text), tokens)
  np.testing.assert_array_equal(read.bytes, made.bytes)
  examples = data.from_text(TEXTS, read, length=30, end=0)
  assert int(examples.weight.sum()) == sum(len(read.encode(t)) for t in TEXTS)
  with pytest.raises(ValueError, match="vocabulary=200"):
    tokenizers.trained(TEXTS, 200)
  with pytest.raises(TypeError, match="several texts"):
    tokenizers.trained("one text", 300)
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(ValueError, match=r"is no tokenizer\.json"):
    tokenizers.load(tmp_path)
  with pytest.raises(FileNotFoundError, match="there is no tokenizer"):
    tokenizers.load(tmp_path / "nowhere.json")


def test_bytes_of_sentencepiece_and_of_kinds_that_do_not_tell(tmp_path):
  library = pytest.importorskip("tokenizers", reason="pip install 'jaxdistill[text]'")
  pieces = {"<unk>": 0, "▁to": 1, "▁b": 2, "e": 3, "é": 4, "<0xE2>": 5}
  made = library.Tokenizer(library.models.BPE(pieces, [], unk_token="<unk>", byte_fallback=True))
  made.add_special_tokens(["<unk>"])
  made.decoder = library.decoders.Sequence(
    [library.decoders.Replace("▁", " "), library.decoders.ByteFallback(), library.decoders.Fuse()]
  )
  made.save(str(tmp_path / "tokenizer.json"))
  assert tokenizers.load(tmp_path).bytes.tolist() == [0, 3, 2, 1, 2, 1]
  told = json.loads((tmp_path / "tokenizer.json").read_text())
  spaces = [
    {"type": "Prepend", "prepend": "▁"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
  ]
  for change, tells in (
    ({"normalizer": {"type": "Sequence", "normalizers": spaces}}, True),
    ({"normalizer": {"type": "Sequence", "normalizers": [*spaces, {"type": "Lowercase"}]}}, False),
    ({"normalizer": {"type": "NFKC"}}, False),
    ({"decoder": None}, False),
  ):
    (tmp_path / "tokenizer.json").write_text(json.dumps({**told, **change}))
    assert (tokenizers.load(tmp_path).bytes is not None) is tells


def test_batches_are_pytrees_of_tokens():
  examples = data.from_text(TEXTS, tokenizers.utf8(), length=20)
  batches = data.evaluation_batches(examples, batch_size=4)
  assert isinstance(batches, types.Batch)
  assert batches.weight.shape == batches.labels.shape
  assert float(batches.weight.sum()) == examples.weight.sum()
