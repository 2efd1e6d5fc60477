"""Metrics against float64 NumPy written from their definitions, and statistics by simulation."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.evaluation import metrics

classification = jax.jit(metrics.classification_sums)
fidelity = jax.jit(metrics.fidelity_sums)


def softmax(logits):
  exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
  return exponentials / exponentials.sum(axis=1, keepdims=True)


def make(batch=48, classes=7, seed=0):
  random = np.random.default_rng(seed)
  logits = random.normal(size=(batch, classes)).astype(np.float32) * 2
  return logits, random.integers(classes, size=batch), random.random(batch) < 0.7


def expected(logits, labels):
  """Accuracy, top-5, nll, Brier and ECE, example by example."""
  logits = logits.astype(np.float64)
  probs = softmax(logits)
  right, top5, nll, brier, bins = [], [], [], [], {}
  for row, p, label in zip(logits, probs, labels, strict=True):
    order = list(np.argsort(-row, kind="stable"))
    right.append(order[0] == label)
    top5.append(label in order[:5])
    nll.append(-math.log(p[label]))
    brier.append(sum((p[k] - (k == label)) ** 2 for k in range(len(p))))
    bins.setdefault(math.ceil(p.max() * 15), []).append((right[-1], p.max()))
  ece = sum(
    len(b) * abs(np.mean([r for r, _ in b]) - np.mean([c for _, c in b])) for b in bins.values()
  )
  return {
    "accuracy": np.mean(right),
    "top5": np.mean(top5),
    "nll": np.mean(nll),
    "brier": np.mean(brier),
    "ece": ece / len(labels),
  }


def run(logits, labels, where):
  sums = classification(jnp.asarray(logits), jnp.asarray(labels, jnp.int32), jnp.asarray(where))
  assert all(value.dtype == jnp.float32 for value in sums.values())
  return jax.device_get(sums)


# ------------------------------------------------------------------------------ classification


@pytest.mark.parametrize("classes", [2, 7, 20])
@pytest.mark.usefixtures("strict_promotion")
def test_metrics_are_their_definitions(classes):
  logits, labels, where = make(classes=classes)
  got = metrics.finish(run(logits, labels, where))
  want = expected(logits[where], labels[where])
  assert got.keys() == want.keys()
  for name, value in want.items():
    assert got[name].dtype == np.float64
    assert got[name].shape == ()
    # Sums of 48 float32 values of order 1.
    np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("dtype", [bool, np.float32])
@pytest.mark.usefixtures("strict_promotion")
def test_what_is_masked_cannot_leak(dtype):
  logits, labels, where = make()
  clean = run(logits, labels, where)
  assert 0 < where.sum() < 48
  hidden = np.flatnonzero(~where)
  dirty_logits, dirty_labels = logits.copy(), labels.copy()
  for junk, label in ((np.nan, -1), (np.inf, 10**6), (-np.inf, 7), (3e38, -(2**31))):
    dirty_logits[hidden], dirty_labels[hidden] = junk, label
    dirty = run(dirty_logits, dirty_labels, where.astype(dtype))
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    arguments = jnp.asarray(dirty_logits), jnp.asarray(dirty_labels, jnp.int32)
    taught = jax.device_get(fidelity(arguments[0], arguments[0], arguments[1], jnp.asarray(where)))
    assert taught["agreement"] == taught["fidelity_examples"] == where.sum()
    assert taught["kl"] == 0
    wrong = (logits.argmax(1) != labels)[where].sum()
    assert taught["teacher_wrong"] == wrong


def test_what_is_masked_has_no_part_in_a_gradient():
  logits, labels, where = make(batch=6)
  where[:] = [True, False] * 3
  logits[~where] = np.nan
  arguments = jnp.asarray(labels, jnp.int32), jnp.asarray(where)
  gradient = jax.jit(jax.grad(lambda x: metrics.classification_sums(x, *arguments)["nll"]))
  slope = np.asarray(gradient(jnp.asarray(logits)))
  assert (slope[~where] == 0).all()
  assert (slope[where] != 0).all()


def test_padded_batches_add_up_to_the_whole():
  logits, labels, _ = make()
  whole = run(logits, labels, np.ones(48, bool))
  rows = np.split(np.arange(60).clip(max=47), 5)
  wheres = np.split(np.arange(60) < 48, 5)
  padded = [np.where(w[:, None], logits[r], np.nan) for r, w in zip(rows, wheres, strict=True)]
  padded_labels = [labels[r] for r in rows]
  parts = functools.reduce(metrics.add_sums, map(run, padded, padded_labels, wheres))
  for name in ("examples", "correct", "top5", "bin_count", "bin_correct"):
    np.testing.assert_array_equal(parts[name], whole[name])
  for name, value in metrics.finish(whole).items():
    # Only the order of 48 float32 additions differs.
    np.testing.assert_allclose(metrics.finish(parts)[name], value, rtol=1e-6, err_msg=name)
  assert whole["bin_count"].sum() == 48


def test_ties_and_few_classes():
  flat = np.zeros((1, 10), np.float32)
  for label in range(10):
    sums = run(flat, [label], [True])
    # The first of equals is the top-1 class; top-5 counts strictly greater ones only.
    assert sums["correct"] == (label == 0)
    assert sums["top5"] == 1
  ranked = -np.arange(10, dtype=np.float32)[None, :]
  assert [run(ranked, [k], [True])["top5"] for k in range(10)] == [1] * 5 + [0] * 5
  assert run(ranked[:, :3], [2], [True])["top5"] == 1


def test_bins_are_closed_on_the_right():
  # Two classes around a confidence of 0.6 = 9/15, as finely as float32 has logits.
  start = np.float32(math.log(0.6 / 0.4))
  steps = start + np.arange(-200, 200, dtype=np.float32) * np.spacing(start)
  logits = np.stack([steps, np.zeros_like(steps)], axis=1)[:, None, :]
  each = jax.jit(jax.vmap(metrics.classification_sums, in_axes=(0, None, None)))
  sums = jax.device_get(each(jnp.asarray(logits), jnp.zeros(1, jnp.int32), jnp.ones(1, bool)))
  assert sums["bin_count"].shape == (400, 15)
  confidence, index = sums["bin_confidence"].sum(axis=1), sums["bin_count"].argmax(axis=1)
  edge = np.float32(0.6)
  for below, bin_of_it in ((confidence < edge, 8), (confidence == edge, 8), (confidence > edge, 9)):
    assert below.any()
    assert (index[below] == bin_of_it).all()
  certain = run(np.array([[0.0, -1e4]], np.float32), [0], [True])["bin_count"]
  assert certain.argmax() == 14


def test_calibration_of_a_calibrated_and_of_an_overconfident_network():
  logits = np.log([[0.75, 0.25]] * 4).astype(np.float32)
  calibrated = metrics.finish(run(logits, [0, 0, 0, 1], [True] * 4))
  # One float32 rounding of 0.75, four times.
  np.testing.assert_allclose(calibrated["ece"], 0, atol=1e-6)
  sure = metrics.finish(run(logits * 100, [0, 0, 1, 1], [True] * 4))
  np.testing.assert_allclose(sure["ece"], 0.5, atol=1e-6)
  np.testing.assert_allclose(sure["brier"], 1.0, atol=1e-6)


def test_what_is_counted_and_broken_is_seen():
  logits, labels, _ = make()
  labels = logits.argmax(axis=1)
  broken = logits.copy()
  broken[2] = np.nan
  # argmax of a row of NaN is 0, which must not be taken for an answer.
  labels[2] = 0
  sums = run(broken, labels, np.ones(48, bool))
  assert (sums["examples"], sums["correct"], sums["top5"]) == (48, 47, 47)
  assert all(np.isnan(sums[name]) for name in ("nll", "brier"))
  for label in (-1, 7):
    labels[2] = label
    sums = run(logits, labels, np.ones(48, bool))
    assert (sums["correct"], sums["top5"]) == (47, 47)
    assert np.isnan(sums["nll"])


def test_confident_logits_stay_finite_and_bfloat16_is_computed_in_float32():
  logits = np.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], np.float32)
  sums = run(logits, [0, 0], [True, True])
  assert sums["nll"] == 2e4
  assert all(np.isfinite(value).all() for value in sums.values())
  coarse = jnp.asarray(make()[0], jnp.bfloat16)
  exact = run(coarse.astype(jnp.float32), *make()[1:])
  jax.tree.map(np.testing.assert_array_equal, run(coarse, *make()[1:]), exact)


# ------------------------------------------------------------------------------ fidelity


@pytest.mark.usefixtures("strict_promotion")
def test_fidelity_is_its_definition():
  student, labels, where = make(seed=1)
  teacher = make(seed=2)[0]
  sums = fidelity(
    jnp.asarray(student), jnp.asarray(teacher), jnp.asarray(labels, jnp.int32), jnp.asarray(where)
  )
  sums = jax.device_get(sums)
  got = metrics.finish(sums)
  p, q = softmax(teacher[where].astype(np.float64)), softmax(student[where].astype(np.float64))
  wrong = p.argmax(1) != labels[where]
  want = {
    "agreement": np.mean(p.argmax(1) == q.argmax(1)),
    "kl": np.mean(np.sum(p * np.log(p / q), axis=1)),
    "accuracy_where_teacher_wrong": np.mean((q.argmax(1) == labels[where])[wrong]),
  }
  assert got.keys() == want.keys()
  assert sums["teacher_wrong"] == wrong.sum() > 0
  for name, value in want.items():
    # Sums of 48 float32 values of order 1.
    np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)


def test_fidelity_at_the_edges():
  one = jnp.ones(1, bool)
  label = jnp.zeros(1, jnp.int32)
  far = fidelity(jnp.array([[-1e4, 1e4, 0.0]]), jnp.array([[1e4, -1e4, 0.0]]), label, one)
  assert far["kl"] == 2e4
  masked = fidelity(
    jnp.array([[0.0, 1.0, -jnp.inf]]), jnp.array([[1.0, 0.0, -jnp.inf]]), label, one
  )
  p = 1 / (1 + math.exp(-1))
  np.testing.assert_allclose(masked["kl"], 2 * p - 1, rtol=1e-6)  # float32
  lost = fidelity(jnp.array([[jnp.nan, 1.0, 0.0]]), jnp.array([[1.0, 0.0, 0.0]]), label, one)
  assert lost["agreement"] == 0
  assert jnp.isnan(lost["kl"])
  both = fidelity(*[jnp.full((1, 3), jnp.nan)] * 2, label, one)
  assert (both["agreement"], both["teacher_wrong"]) == (0, 1)


# ------------------------------------------------------------------------------ sums and finish


def test_seeds_are_a_leading_axis():
  logits = np.stack([make(seed=seed)[0] for seed in range(3)])
  _, labels, where = make()
  labels, where = jnp.asarray(labels, jnp.int32), jnp.asarray(where)

  def both(student):
    taught = metrics.fidelity_sums(student, jnp.asarray(logits[0]), labels, where)
    return metrics.classification_sums(student, labels, where) | taught

  swept = metrics.finish(jax.device_get(jax.jit(jax.vmap(both))(jnp.asarray(logits))))
  assert {value.shape for value in swept.values()} == {(3,)}
  for seed in range(3):
    student = jnp.asarray(logits[seed])
    taught = fidelity(student, jnp.asarray(logits[0]), labels, where)
    alone = metrics.finish(jax.device_get(classification(student, labels, where) | taught))
    assert alone.keys() == swept.keys()
    for name, value in alone.items():
      np.testing.assert_allclose(swept[name][seed], value, rtol=1e-6, atol=1e-7, err_msg=name)
  assert swept["agreement"][0] == 1
  assert swept["agreement"][1] < 1


def test_nothing_counted_is_absent_and_not_an_error():
  logits, labels, _ = make()
  assert metrics.finish(run(logits, labels, np.zeros(48, bool))) == {}
  sums = {"fidelity_examples": 4.0, "agreement": 4.0, "kl": 0.0, "teacher_wrong": 0.0}
  perfect = metrics.finish(sums | {"correct_where_teacher_wrong": 0.0})
  assert perfect["agreement"] == 1
  assert perfect.keys() == {"agreement", "kl"}
  some = metrics.finish({"correct": np.array([1.0, 0.0]), "examples": np.array([2.0, 0.0])})
  np.testing.assert_array_equal(some["accuracy"], [0.5, np.nan])


def test_sums_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match=r"\['kl'\]"):
    metrics.add_sums({"correct": 1.0, "kl": 2.0}, {"correct": 1.0})
  with pytest.raises(ValueError, match="loss"):
    metrics.finish({"loss": 1.0})


# ------------------------------------------------------------------------------ runs


def test_mean_std_and_difference():
  assert metrics.mean_std([1, 2, 3, 4]) == (2.5, pytest.approx(math.sqrt(5 / 3)))
  assert metrics.mean_std(np.array([0.5])) == (0.5, None)
  gain = metrics.difference([4.0, 6.0, 8.0], [1.0, 3.0])
  # Variances 4 of three and 2 of two runs.
  assert gain == {"mean": 4.0, "standard_error": pytest.approx(math.sqrt(4 / 3 + 2 / 2))}
  assert metrics.difference([4.0], [1.0, 3.0]) == {"mean": 2.0, "standard_error": None}
  for values in ([], [math.nan], [[1.0], [2.0]]):
    with pytest.raises(ValueError, match="values must be finite"):
      metrics.mean_std(values)


def test_gap_closed_is_a_ratio_of_means():
  gap = metrics.gap_closed(90.0, [80.0] * 5, [82.0, 83.0, 84.0, 85.0, 86.0])
  assert gap["value"] == pytest.approx(0.4)
  assert 0.2 <= gap["low"] < 0.4 < gap["high"] <= 0.6
  assert "single teacher" in gap["note"]
  beyond = metrics.gap_closed([90.0, 90.5], [80.0, 81.0], [95.0, 95.0])
  assert beyond["value"] > 1
  below = metrics.gap_closed([90.0, 90.5], [80.0, 81.0], [75.0, 75.0])
  assert below["high"] < 0
  assert "2 runs" in below["note"]


def test_the_interval_is_the_bootstrap_of_its_description():
  random = np.random.default_rng(5)
  baseline = 80 + random.normal(size=6)
  student = baseline + 3 + 0.2 * random.normal(size=6)
  teacher = 90 + random.normal(size=4)
  got = metrics.gap_closed(teacher, baseline, student, resamples=4000)
  assert got["note"] == ""
  draws = []
  for _ in range(4000):
    pick = random.integers(6, size=6)
    top = np.mean(random.choice(teacher, size=4))
    low = np.mean([baseline[i] for i in pick])
    draws.append((np.mean([student[i] for i in pick]) - low) / (top - low))
  # Two quantiles of 4000 draws differ by 0.06 standard deviations of the draws; four times that.
  tolerance = 0.24 * np.std(draws)
  assert got["low"] == pytest.approx(np.quantile(draws, 0.025), abs=tolerance)
  assert got["high"] == pytest.approx(np.quantile(draws, 0.975), abs=tolerance)
  # Runs that move together by seed say more than runs that do not.
  unpaired = metrics.gap_closed(teacher, baseline, np.append(student, student.mean()))
  assert unpaired["high"] - unpaired["low"] > 1.5 * (got["high"] - got["low"])
  narrow = metrics.gap_closed(teacher, baseline, student, confidence=0.5)
  assert got["low"] < narrow["low"] < narrow["high"] < got["high"]


def test_the_interval_covers_what_it_claims():
  """A true share of 0.5 in 300 experiments of 10 runs each."""
  random = np.random.default_rng(11)
  hits = 0
  for _ in range(300):
    baseline = 80 + random.normal(size=10)
    student = 85 + random.normal(size=10)
    gap = metrics.gap_closed([90.0, 90.0], baseline, student, resamples=500, confidence=0.9)
    hits += gap["low"] <= 0.5 <= gap["high"]
  # 0.9 less the known shortfall of a percentile bootstrap at 10 runs (about 0.04), and 3 standard
  # errors of 0.018 of 300 trials.
  assert 0.80 <= hits / 300 <= 0.95


def test_gap_closed_repeats_and_leaves_numpys_state_alone():
  runs = [90.0, 91.0], [80.0, 81.0, 82.0], [85.0, 84.0, 86.0]
  state = np.random.get_state()[1].copy()
  assert metrics.gap_closed(*runs) == metrics.gap_closed(*runs)
  np.testing.assert_array_equal(np.random.get_state()[1], state)
  assert metrics.gap_closed(*runs, resamples=7) != metrics.gap_closed(*runs, resamples=7, seed=1)


def test_no_share_of_a_gap_within_the_noise():
  def undefined(*args, **options):
    gap = metrics.gap_closed(*args, **options)
    assert gap["value"] is gap["low"] is gap["high"] is None
    assert "not above the baseline beyond noise" in gap["note"]
    return True

  same, student = [0.80, 0.81], [0.9, 0.91]
  assert undefined(same, same, student)
  assert undefined([0.7, 0.7], same, student)
  # Spread of ±1 in four runs each: the difference of 1 has a standard error of 0.82.
  spread = np.array([-1.0, 1.0, -1.0, 1.0])
  assert undefined(spread + 1.0, spread, spread)
  assert metrics.gap_closed(spread + 3.0, spread, spread)["value"] == 0
  # One teacher on 100 examples: 0.85 has a standard error of 0.036; on 10,000 of 0.0036.
  assert undefined(0.85, [0.80, 0.80], student, examples=100)
  assert metrics.gap_closed(0.85, [0.80, 0.80], student, examples=10_000)["value"] > 1
  # A perfect score on a few examples is no certainty: (10 + 2) / 14 has a standard error of 0.094.
  assert undefined(1.0, [0.85, 0.85], student, examples=10)


def test_single_runs_have_no_interval_and_the_note_says_why():
  gap = metrics.gap_closed(0.9, 0.8, 0.85)
  assert gap["value"] == pytest.approx(0.5)
  assert gap["low"] is gap["high"] is None
  for words in ("single teacher", "single baseline", "at least 2 runs"):
    assert words in gap["note"]
  half = metrics.gap_closed([0.9, 0.91], [0.8, 0.81], 0.85)
  assert half["low"] is half["high"] is None


def test_no_interval_where_draws_lose_the_gap():
  # The gap is 2.5 standard errors. A draw that has the last baseline run 4 times or more has none:
  # that is 1.3 % of the draws, and each end of a 99 % interval leaves out 0.5 %.
  baseline = [0.0] * 9 + [10.0]
  gap = metrics.gap_closed([3.5, 3.5], baseline, [2.0] * 10, confidence=0.99)
  assert gap["value"] is not None
  assert gap["low"] is gap["high"] is None
  assert "of draws" in gap["note"]
  # Where they are fewer than what an end leaves out, they lie below everything: 1.3 %, then the
  # 5.7 % of draws with 3 such runs, of share (1 − 3) / (3.5 − 3), reach past 6.4 %.
  options = {"confidence": 0.872, "resamples": 100_000}
  gap = metrics.gap_closed([3.5, 3.5], baseline, [1.0] * 10, **options)
  assert gap["low"] == pytest.approx(-4)


def test_gap_closed_names_what_is_wrong():
  runs = [0.9, 0.91], [0.8, 0.81], [0.85, 0.86]
  with pytest.raises(ValueError, match=r"confidence.*95"):
    metrics.gap_closed(*runs, confidence=95.0)
  with pytest.raises(ValueError, match="resamples"):
    metrics.gap_closed(*runs, resamples=0)
  with pytest.raises(ValueError, match="student must be finite"):
    metrics.gap_closed(runs[0], runs[1], [])
  with pytest.raises(ValueError, match=r"teacher must be a fraction.*90"):
    metrics.gap_closed(90.0, [80.0, 81.0], [85.0, 86.0], examples=10_000)
  with pytest.raises(ValueError, match="examples must be a positive"):
    metrics.gap_closed(*runs, examples=0)


def test_agreement_needs_no_labels():
  student = jnp.array([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
  teacher = jnp.array([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
  labels, where = jnp.array([0, 0, 1]), jnp.ones(3)
  none = metrics.finish(fidelity(student, teacher, labels, where, jnp.zeros(3)))
  assert none["agreement"] == pytest.approx(2 / 3)
  assert np.isfinite(none["kl"])
  assert none.keys() == {"agreement", "kl"}
  some = fidelity(student, teacher, labels, where, jnp.array([1.0, 1.0, 0.0]))
  assert [float(some[name]) for name in ("fidelity_examples", "teacher_wrong")] == [3, 0]


def kept_of(nll, where=None):
  nll = np.asarray(nll, np.float32)
  where = np.ones(nll.shape[1:]) if where is None else np.asarray(where)
  where = np.broadcast_to(where, nll.shape)
  return {"nll": nll, "accuracy": (nll < 1).astype(np.float32), "where": where}


def test_errors_over_documents_are_those_of_independent_documents():
  random = np.random.default_rng(0)
  documents, seeds = 400, 3

  def drawn():
    """Tokens of a document share its difficulty, so that they are no independent draws."""
    sizes = random.integers(2, 9, documents)
    group = np.repeat(np.arange(documents), sizes)
    hard = 2 + random.normal(size=documents)
    nll = hard[group] + 0.1 * random.normal(size=(seeds, len(group)))
    return kept_of(nll[:, None]), group[None], nll.mean(axis=0)

  found = []
  for _ in range(100):
    kept, group, each = drawn()
    one = metrics.over_documents(kept, group)["nll"]
    assert one["mean"] == pytest.approx(each.mean(), rel=1e-6)
    found.append((one["mean"], one["standard_error"]))
  means, errors = np.transpose(found)
  # Over 100 texts the spread of the means is known to 7 %: four times that.
  assert np.mean(errors) == pytest.approx(means.std(ddof=1), rel=0.28)
  naive = each.std() / np.sqrt(len(each))  # as if tokens were independent
  assert np.mean(errors) > 1.8 * naive


def test_two_models_are_compared_document_by_document():
  # Two rows hold three documents, the second in both; one token does not count, whatever it is.
  documents = np.array([[0, 0, 1, 1], [1, 2, 2, 9]])
  where = np.array([[1.0, 1, 1, 1], [1, 1, 0.5, 0]])
  nll = np.array([[[1.0, 2, 3, 4], [5, 6, 7, np.nan]]])
  kept, beside = kept_of(nll, where), kept_of(nll - [[[0.5, 0.5, 0, 0], [0, 1, 1, 0]]], where)
  apart = metrics.over_documents(kept, documents, beside=beside)["nll"]
  totals, weights = np.array([1.0, 0, 1.5]), np.array([2, 3, 1.5])  # of each document, by hand
  mean = totals.sum() / weights.sum()
  error = np.sqrt(3 / 2 * np.sum((totals - mean * weights) ** 2)) / weights.sum()
  assert apart == pytest.approx({"mean": mean, "standard_error": error, "documents": 3})
  same = metrics.over_documents(kept, documents, beside=kept)["nll"]
  assert (same["mean"], same["standard_error"]) == (0, 0)
  # Two bytes a token are half the bits a byte, and one document has no error.
  sizes = np.full(where.shape, 2)
  found = metrics.over_documents(kept, np.zeros_like(documents), sizes=sizes)
  assert found["bits_per_byte"]["mean"] == pytest.approx(found["nll"]["mean"] / 2 / np.log(2))
  assert found["bits_per_byte"]["standard_error"] is None


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"documents": [[0]]}, "documents has the shape"),
    ({"sizes": [[1]]}, "sizes has the shape"),
    ({"sizes": [[0, 0]]}, "no bits a byte"),
    ({"beside": {"nll": 1}}, "beside=.* must be what"),
    ({"kept": kept_of([[[1.0, 2]]], [[0, 0]])}, "no token that counts"),
    ({"beside": kept_of([[[1.0, 2]]], [[1, 0]])}, "beside counts other tokens"),
  ],
)
def test_what_has_no_error_over_documents_is_refused(given, message):
  given = {"kept": kept_of([[[1.0, 2]]]), "documents": [[0, 1]], **given}
  with pytest.raises((TypeError, ValueError), match=message):
    metrics.over_documents(given.pop("kept"), **given)
