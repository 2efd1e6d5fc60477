"""Every task's metrics against scikit-learn, or written anew in float64, however examples come."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from sklearn import metrics as known
from sklearn import neighbors

from jaxdistill import data, evaluation, losses, networks, search, teachers, train
from jaxdistill.evaluation import _evaluate, tasks
from jaxdistill.types import Head, Model, Outputs, Teacher, Term

RNG = np.random.default_rng(0)
SIZE = 37


@pytest.fixture(autouse=True)
def same_numbers(monkeypatch):
  """Each test draws the same, in whatever order they run."""
  monkeypatch.setitem(globals(), "RNG", np.random.default_rng(1))


def says(array):
  """A model that says of example i what the array has in its row i."""
  array = jnp.asarray(array, jnp.float32)
  return Teacher(array, lambda rows, batch: Outputs(logits=rows[batch.index]))


def measured(task, outputs, labels, *, batch_size=8, teacher=None, labelled=None, **given):
  examples = data.from_arrays(np.zeros((len(outputs), 1), np.float32), labels, **given)
  batches = data.evaluation_batches(examples, batch_size=batch_size, labelled=labelled)
  beside = None if teacher is None else says(teacher)
  found = evaluation.evaluate(says(outputs), batches, teacher=beside, task=task)
  return {name: float(value) for name, value in found.items()}


def softmax(x):
  e = np.exp(x - x.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_weighted_classes(batch_size):
  logits, labels = RNG.normal(size=(SIZE, 5)), RNG.integers(0, 5, SIZE)
  weight = RNG.random(SIZE) * (RNG.random(SIZE) < 0.8)
  found = measured(None, logits, labels, batch_size=batch_size, weight=weight)
  said = logits.argmax(axis=1)
  # float32 sums of 37 numbers.
  close = {"rel": 1e-5}
  accuracy = known.accuracy_score(labels, said, sample_weight=weight)
  assert found["accuracy"] == pytest.approx(accuracy, **close)
  nll = known.log_loss(labels, softmax(logits), sample_weight=weight, labels=range(5))
  assert found["nll"] == pytest.approx(nll, **close)


@pytest.mark.parametrize("batch_size", [1, 8, 64])
@pytest.mark.parametrize("weighted", [False, True])
def test_multilabel(batch_size, weighted):
  scores = np.round(RNG.normal(size=(SIZE, 4)), 1)  # some of them equal
  labels = RNG.random((SIZE, 4)) < [0.3, 0.4, 0.6, 0.0]
  weight = RNG.integers(0, 3, SIZE).astype(float) if weighted else np.ones(SIZE)
  teacher = scores + RNG.normal(size=scores.shape)
  found = measured(
    tasks.multilabel(), scores, labels, batch_size=batch_size, weight=weight, teacher=teacher
  )
  there, said = weight > 0, scores >= 0
  average = [
    known.average_precision_score(labels[there, k], scores[there, k], sample_weight=weight[there])
    for k in range(3)  # of the fourth label there is no example
  ]
  assert found["map"] == pytest.approx(np.mean(average), rel=1e-6)
  for kind in ("micro", "macro"):
    f1 = known.f1_score(labels, said, average=kind, sample_weight=weight, zero_division=0)
    assert found[f"f1_{kind}"] == pytest.approx(f1, rel=1e-6)
  exact = known.accuracy_score(labels, said, sample_weight=weight)
  assert found["exact"] == pytest.approx(exact, rel=1e-6)
  p = 1 / (1 + np.exp(-scores))
  nll = -np.where(labels, np.log(p), np.log(1 - p))
  assert found["nll"] == pytest.approx(np.average(nll.mean(axis=1), weights=weight), rel=1e-5)
  gaps = []
  for k in range(4):
    bins = np.minimum((np.ceil(p[:, k] * 15) - 1).astype(int), 14)
    off = [abs(np.sum((weight * (labels[:, k] - p[:, k]))[bins == b])) for b in range(15)]
    gaps.append(sum(off) / weight.sum())
  assert found["ece"] == pytest.approx(np.mean(gaps), rel=1e-4)
  kept = {"scores": scores, "labels": labels, "where": np.repeat(weight[:, None], 4, 1)}
  by_label = tasks.multilabel().shown.parts(kept)["label_ece"]
  assert by_label == pytest.approx(dict(enumerate(gaps)), rel=1e-4)
  q = 1 / (1 + np.exp(-teacher))
  kl = q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))
  assert found["kl"] == pytest.approx(np.average(kl.mean(axis=1), weights=weight), rel=1e-4)
  agreement = np.average(((teacher >= 0) == said).mean(axis=1), weights=weight)
  assert found["agreement"] == pytest.approx(agreement, rel=1e-6)


def test_single_labels_may_be_unknown():
  scores, labels = RNG.normal(size=(SIZE, 3)), RNG.integers(0, 2, (SIZE, 3))
  labelled = (RNG.random((SIZE, 3)) < 0.7).astype(float)
  found = measured(tasks.multilabel(), scores, labels, labelled=labelled)
  there = labelled > 0
  accuracy = np.mean(((scores >= 0) == labels)[there])
  assert found["accuracy"] == pytest.approx(accuracy, rel=1e-6)
  average = [
    known.average_precision_score(labels[there[:, k], k], scores[there[:, k], k]) for k in range(3)
  ]
  assert found["map"] == pytest.approx(np.mean(average), rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 8, 64])
@pytest.mark.parametrize("several", [False, True])
def test_regression(batch_size, several):
  # Far from 0: a variance by differences of squares in float32 would be noise.
  labels = 1000 + RNG.normal(size=(SIZE, 3) if several else SIZE)
  outputs = labels + 0.3 * RNG.normal(size=labels.shape)
  weight = RNG.random(SIZE)
  teacher = outputs + 1.0
  shown = outputs if several else outputs[:, None]
  found = measured(
    tasks.regression(),
    shown,
    labels,
    batch_size=batch_size,
    weight=weight,
    teacher=teacher if several else teacher[:, None],
  )
  labels, outputs = (x.astype(np.float32).astype(np.float64) for x in (labels, outputs))
  rmse = known.root_mean_squared_error(labels, outputs, sample_weight=weight)
  assert found["rmse"] == pytest.approx(rmse, rel=1e-6)
  mae = known.mean_absolute_error(labels, outputs, sample_weight=weight)
  assert found["mae"] == pytest.approx(mae, rel=1e-6)
  assert found["r2"] == pytest.approx(
    known.r2_score(labels, outputs, sample_weight=weight), rel=1e-6
  )
  assert found["rmse_to_teacher"] == pytest.approx(1.0, rel=1e-3)  # float32 at 1000


def test_intervals_hold_the_share_that_scipy_says():
  labels, mean, log = RNG.normal(size=(3, SIZE, 2)).astype(np.float32).astype(np.float64)
  weight = RNG.random(SIZE)
  found = measured(
    tasks.regression(variance=True), np.concatenate([mean, log], 1), labels, weight=weight
  )
  normal = scipy.stats.norm(mean, np.exp(log / 2))
  over = np.repeat(weight[:, None], 2, axis=1)
  assert found["nll"] == pytest.approx(np.average(-normal.logpdf(labels), weights=over), rel=1e-5)
  ends = [(level, *normal.interval(level)) for level in np.arange(1, 10) / 10]
  gaps = [
    abs(np.average((low <= labels) & (labels <= high), weights=over) - level)
    for level, low, high in ends
  ]
  assert found["interval_error"] == pytest.approx(np.mean(gaps), rel=1e-5)


def test_a_variance_that_is_right_is_calibrated():
  count = 20_000
  spread = np.exp(RNG.normal(size=count))
  labels = spread * RNG.normal(size=count)
  outputs = np.stack([np.zeros(count), 2 * np.log(spread)], axis=1)
  found = measured(tasks.regression(variance=True), outputs, labels, batch_size=1000)
  # Shares of 20,000 examples are within 1 % of their expectation.
  assert found["interval_error"] < 0.01
  nll = 0.5 * np.log(2 * np.pi) + np.log(spread) + 0.5 * (labels / spread) ** 2
  assert found["nll"] == pytest.approx(nll.mean(), rel=1e-4)
  small = measured(tasks.regression(variance=True), outputs - [[0, 2.0]], labels, batch_size=1000)
  assert small["interval_error"] > 0.1


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_dense(batch_size):
  labels = RNG.integers(0, 3, (9, 6, 5)).astype(np.uint8)
  labels[RNG.random(labels.shape) < 0.2] = 255
  logits, teacher = RNG.normal(size=(2, 9, 6, 5, 4))
  found = measured(
    tasks.dense(), logits, labels, batch_size=batch_size, ignore=255, num_classes=4, teacher=teacher
  )
  there, said = labels != 255, logits.argmax(axis=-1)
  flat = labels[there], said[there]
  assert found["pixel_accuracy"] == pytest.approx(known.accuracy_score(*flat), rel=1e-6)
  iou = known.jaccard_score(*flat, average=None, labels=range(4), zero_division=0)
  assert found["miou"] == pytest.approx(np.mean(iou), rel=1e-6)  # the fourth class is predicted
  accuracy = known.recall_score(*flat, average="macro", labels=range(3))
  assert found["class_accuracy"] == pytest.approx(accuracy, rel=1e-6)
  near = np.zeros(labels.shape, bool)
  for i, y, x in np.ndindex(labels.shape):
    around = labels[i, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
    near[i, y, x] = len(set(around[around != 255].tolist())) > 1
  right = (said == labels)[near & there]
  assert found["boundary_accuracy"] == pytest.approx(right.mean(), rel=1e-6)
  agreement = (teacher.argmax(axis=-1) == said).mean()  # a teacher is compared without labels
  assert found["agreement"] == pytest.approx(agreement, rel=1e-6)


def test_volumes():
  labels = RNG.integers(0, 3, (5, 4, 6, 5)).astype(np.uint8)
  labels[RNG.random(labels.shape) < 0.2] = 255
  logits = RNG.normal(size=(*labels.shape, 3))
  found = measured(tasks.dense(), logits, labels, batch_size=4, ignore=255, num_classes=3)
  there, said = labels != 255, logits.argmax(axis=-1)
  flat = labels[there], said[there]
  assert found["pixel_accuracy"] == pytest.approx(known.accuracy_score(*flat), rel=1e-6)
  iou = known.jaccard_score(*flat, average=None)
  assert found["miou"] == pytest.approx(np.mean(iou), rel=1e-6)
  near = np.zeros(labels.shape, bool)
  for at in np.ndindex(labels.shape):
    window = tuple(slice(max(0, i - 1), i + 2) for i in at[1:])
    around = labels[at[0]][window]
    near[at] = len(set(around[around != 255].tolist())) > 1
  right = (said == labels)[near & there]
  assert found["boundary_accuracy"] == pytest.approx(right.mean(), rel=1e-6)
  # A report has the confusion of each volume, and shows its slice in the middle.
  examples = data.from_arrays(np.zeros((5, 1), np.float32), labels, ignore=255, num_classes=3)
  batch = jax.tree.map(lambda leaf: leaf[0], data.evaluation_batches(examples, batch_size=5))
  kept = tasks.dense().kept(Outputs(logits=jnp.asarray(logits, jnp.float32)), batch)
  assert kept["said"].shape == (5, 6, 5)
  np.testing.assert_array_equal(kept["said"], said[:, 2])
  per_image = tasks.dense().shown.values({n: np.asarray(x) for n, x in kept.items()})
  wanted = [known.accuracy_score(y[t], s[t]) for y, s, t in zip(labels, said, there, strict=True)]
  np.testing.assert_allclose(per_image["pixel_accuracy"], wanted, rtol=1e-6)


def test_tokens():
  labels, weight = RNG.integers(0, 7, (SIZE, 6)), RNG.integers(0, 2, (SIZE, 6)).astype(float)
  logits = RNG.normal(size=(SIZE, 6, 7))
  found = measured(tasks.tokens(), logits, labels, weight=weight)
  there = weight > 0
  nll = known.log_loss(labels[there], softmax(logits)[there], labels=range(7))
  assert found["nll"] == pytest.approx(nll, rel=1e-5)
  assert found["perplexity"] == pytest.approx(np.exp(nll), rel=1e-5)
  accuracy = known.accuracy_score(labels[there], logits.argmax(axis=-1)[there])
  assert found["accuracy"] == pytest.approx(accuracy, rel=1e-6)


def speaks(hidden, head):
  """A model that has hidden states of example i, and a head, in place of logits."""

  def apply(variables, batch):
    return Outputs(hidden=variables[0][batch.index], head=variables[1])

  return Teacher((jnp.asarray(hidden, jnp.float32), head), apply)


@pytest.mark.slow_but("8")
@pytest.mark.parametrize("at_once", [8, 16, 1000])
def test_tokens_are_measured_without_their_logits(at_once):
  length, classes, lengths = 7, 11, np.arange(11) % 4
  labels = RNG.integers(0, classes, (SIZE, length))
  weight = (np.arange(length) < RNG.integers(0, length + 1, (SIZE, 1))).astype(float)
  both, logits = [], []
  for width in (3, 5):
    hidden, kernel = RNG.normal(size=(SIZE, length, width)), RNG.normal(size=(width, classes))
    both.append(speaks(hidden, Head(jnp.asarray(kernel, jnp.float32), softcap=2.0)))
    logits.append(2 * np.tanh(hidden @ kernel / 2))
  task = tasks.tokens(
    token_bytes=lengths, top_mass=(1, 3, 99), by_position=3, tokens_at_once=at_once
  )
  examples = data.from_arrays(np.zeros((SIZE, 1), np.float32), labels, weight=weight)
  batches = data.evaluation_batches(examples, batch_size=8)
  found = evaluation.evaluate(both[0], batches, teacher=both[1], task=task)
  there = weight > 0
  q, p = (softmax(z) for z in logits)
  nll = -np.log(np.take_along_axis(q, labels[..., None], -1))[..., 0]
  kl = (p * np.log(p / q)).sum(-1)
  accepted = np.minimum(p, q).sum(-1)
  right = logits[0].argmax(-1) == labels
  best = np.take_along_axis(p, np.argsort(-q, axis=-1), -1)
  expected = {
    "nll": nll[there].mean(),
    "perplexity": np.exp(nll[there].mean()),
    "bits_per_byte": nll[there].sum() / np.log(2) / lengths[labels][there].sum(),
    "accuracy": right[there].mean(),
    "agreement": (logits[0].argmax(-1) == logits[1].argmax(-1))[there].mean(),
    "kl": kl[there].mean(),
    "reverse_kl": (q * np.log(q / p)).sum(-1)[there].mean(),
    "acceptance": accepted[there].mean(),
    "top_mass_1": best[..., 0][there].mean(),
    "top_mass_3": best[..., :3].sum(-1)[there].mean(),
  }
  for name, value in expected.items():
    assert float(found[name]) == pytest.approx(value, rel=2e-5), name
  assert "top_mass_99" not in found
  part = np.broadcast_to(np.arange(length) * 3 // length, there.shape)
  each = {"nll": nll, "accuracy": right, "kl": kl, "acceptance": accepted}
  for name, values in each.items():
    wanted = [values[there & (part == i)].mean() for i in range(3)]
    np.testing.assert_allclose(found[f"{name}_by_position"], wanted, rtol=2e-5)
  # The same of a teacher that was asked before, whose head is not kept once for each batch.
  told = evaluation.taught(both[1], batches, task=task)
  kernel = told.teacher.head.kernel
  assert len(kernel) > 1
  assert np.shares_memory(kernel[0], kernel[1])
  again = evaluation.evaluate(both[0], told, task=task)
  assert set(again) == set(found)
  for name in found:
    np.testing.assert_array_equal(again[name], found[name])
  # The same of networks that put out logits, and by any other task.
  rows = says(logits[0]), says(logits[1])
  whole = evaluation.evaluate(rows[0], batches, teacher=rows[1], task=task)
  assert set(whole) == set(found)
  for name in found:
    np.testing.assert_allclose(found[name], whole[name], rtol=2e-5)


def test_a_teachers_head_is_brought_once_and_not_by_every_batch():
  labels = RNG.integers(0, 11, (SIZE, 7))
  examples = data.from_arrays(np.zeros((SIZE, 1), np.float32), labels)
  batches, task = data.evaluation_batches(examples, batch_size=8), tasks.tokens()
  hidden, kernel = RNG.normal(size=(SIZE, 7, 3)), jnp.ones((3, 11))
  first = jax.tree.map(lambda leaf: leaf[0], batches)
  asked = _evaluate._Teacher(task, speaks(hidden, Head(kernel)), first)
  assert asked._each.outputs.head is None
  assert asked.outputs.head.kernel.shape == (3, 11)
  # But for one that changes with the batch.
  shift = Teacher(
    kernel, lambda v, b: Outputs(hidden=b.weight[:, None, None], head=Head(v + b.view[0]))
  )
  assert _evaluate._Teacher(task, shift, first)._each.outputs.head.kernel.shape == (3, 11)


def test_eight_bits_a_byte_of_who_knows_nothing_of_bytes():
  labels = RNG.integers(0, 256, (SIZE, 4))
  task = tasks.tokens(token_bytes=np.ones(256, int))
  found = measured(task, np.zeros((SIZE, 4, 256)), labels)
  assert found["bits_per_byte"] == pytest.approx(8, rel=1e-6)
  assert task is tasks.tokens(token_bytes=[1] * 256)
  assert task.first == "bits_per_byte"
  for wrong in ({"token_bytes": [-1]}, {"top_mass": [0]}, {"by_position": -1}):
    with pytest.raises(ValueError, match="must be at least"):
      tasks.tokens(**wrong)


def test_what_would_be_counted_of_other_tokens_is_refused():
  logits, labels = np.zeros((8, 3, 5), np.float32), np.full((8, 3), 4)
  # Fewer than the labels, or more than the logits: another tokenizer's. Padding of logits has none.
  for told in (4, 6):
    with pytest.raises(ValueError, match=f"token_bytes tells {told} tokens.*a label is 4"):
      measured(tasks.tokens(token_bytes=[1] * told), logits, labels)
  padded = np.zeros((8, 3, 7), np.float32)
  found = measured(tasks.tokens(token_bytes=[1] * 5), padded, labels)
  assert found["bits_per_byte"] == pytest.approx(np.log2(7))
  with pytest.raises(TypeError, match=r"logits are \[8, 3, 5\].*tokens\(\) for one a token"):
    measured(tasks.classification(), logits, labels)
  for task, ours in ((tasks.tokens(), logits), (tasks.classification(), logits[:, 0])):
    theirs = np.zeros((*ours.shape[:-1], 7), np.float32)
    with pytest.raises(ValueError, match=r"5 classes and the teacher 7.*vocabulary\(teacher, 5\)"):
      measured(task, ours, labels if ours is logits else labels[:, 0], teacher=theirs)


@pytest.mark.parametrize(
  ("task", "ours", "theirs", "labels"),
  [
    # Of one target or label, which was broadcast over the student's and measured.
    (tasks.regression(), (3,), (1,), np.zeros((4, 3))),
    (tasks.multilabel(), (3,), (1,), np.zeros((4, 3), int)),
    (tasks.regression(variance=True), (4,), (3,), np.zeros((4, 2))),
    # Of other places.
    (tasks.classification(), (3,), (5, 3), np.zeros(4, int)),
    (tasks.tokens(), (5, 3), (6, 3), np.zeros((4, 5), int)),
    (tasks.dense(), (4, 4, 3), (2, 2, 3), np.zeros((4, 4, 4), int)),
    (tasks.embedding(), (3,), (5, 3), np.zeros(4, int)),
  ],
)
def test_a_teacher_of_another_shape_is_refused_by_both(task, ours, theirs, labels):
  mine, other = [(4, *one) for one in (ours, theirs)]
  both = ".*and the teacher.*".join(re.escape(str(list(one))) for one in (mine, other))
  with pytest.raises(ValueError, match=both):
    measured(task, np.ones(mine), labels, batch_size=4, teacher=np.ones(other))


def test_two_towers_beside_a_teacher_of_positions():
  def towers(*shape):
    both = {name: np.ones((4, *shape), np.float32) for name in ("image", "text")}
    return Teacher(
      both, lambda rows, b: Outputs(features={name: x[b.index] for name, x in rows.items()})
    )

  batches = data.evaluation_batches(data.from_arrays(np.zeros((4, 1)), np.arange(4)), batch_size=4)
  task = tasks.retrieval("image", "text", at=[1])
  with pytest.raises(ValueError, match=r"image are \[4, 3\] and the teacher's \[4, 5, 3\]"):
    evaluation.evaluate(towers(3), batches, teacher=towers(5, 3), task=task)


@pytest.mark.parametrize("batch_size", [5, 64])
def test_embedding(batch_size):
  labels = RNG.integers(0, 4, SIZE)
  vectors = np.eye(4, 6)[labels] + RNG.normal(size=(SIZE, 6))
  teacher = vectors + 0.1 * RNG.normal(size=vectors.shape)
  found = measured(
    tasks.embedding(neighbours=3), vectors, labels, batch_size=batch_size, teacher=teacher
  )
  unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
  nearest = neighbors.NearestNeighbors(n_neighbors=4, metric="cosine").fit(vectors)
  near = nearest.kneighbors(vectors, return_distance=False)[:, 1:]  # not itself
  beside = nearest.fit(teacher).kneighbors(teacher, return_distance=False)[:, 1:]
  assert found["recall_at_1"] == pytest.approx(np.mean(labels[near[:, 0]] == labels))
  assert found["recall_at_k"] == pytest.approx((labels[near] == labels[:, None]).any(1).mean())
  same = np.mean(
    [len(set(a) & set(b)) / 3 for a, b in zip(near.tolist(), beside.tolist(), strict=True)]
  )
  assert found["neighbour_agreement"] == pytest.approx(same)
  distance = ((unit[:, None] - unit[None]) ** 2).sum(-1)
  pairs = ~np.eye(SIZE, dtype=bool)
  alike = pairs & (labels[:, None] == labels[None])
  assert found["alignment"] == pytest.approx(distance[alike].mean(), rel=1e-5)
  assert found["uniformity"] == pytest.approx(np.log(np.exp(-2 * distance[pairs]).mean()), rel=1e-5)
  close = {"knn_accuracy": np.ones(near.shape), "weighted_knn_accuracy": None}
  for name, votes in close.items():
    cosines = np.take_along_axis(unit @ unit.T, near, 1)
    votes = np.exp(cosines / 0.07) if votes is None else votes
    counts = np.stack([(votes * (labels[near] == k)).sum(1) for k in range(4)], 1)
    # Of classes with as many votes that of the nearest.
    ties = counts == counts.max(1, keepdims=True)
    first = [next(k for k in labels[row] if tie[k]) for row, tie in zip(near, ties, strict=True)]
    assert found[name] == pytest.approx(np.mean(first == labels)), name
  # And scikit-learn's own vote, whose classes are left to the smallest number where they tie.
  theirs = neighbors.KNeighborsClassifier(3, metric="cosine").fit(vectors, labels)
  clear = [np.bincount(labels[row], minlength=4).max() > 1 for row in near]
  known_to_both = theirs.predict(None) == labels  # None asks each of the others
  mine = evaluation.ranking.hits(vectors, labels, np.ones(SIZE, bool), 3)[:, 0]
  np.testing.assert_array_equal(mine[clear], known_to_both[clear])


def test_embedding_by_weights():
  """Copies are no weights (they are near), so by hand: pairs count by the product of both."""
  labels, vectors = RNG.integers(0, 3, SIZE), RNG.normal(size=(SIZE, 4))
  weight, labelled = RNG.integers(0, 3, SIZE) / 2, np.arange(SIZE) % 5 > 0
  task = tasks.embedding(neighbours=3)
  found = measured(
    task, vectors, labels, batch_size=8, weight=weight, labelled=labelled.astype(float)
  )
  there = weight > 0
  w, y, known_too = weight[there], labels[there], labelled[there]
  unit = vectors[there] / np.linalg.norm(vectors[there], axis=1, keepdims=True)
  distance = ((unit[:, None] - unit[None]) ** 2).sum(-1)
  pairs = np.where(np.eye(len(w)), 0, w[:, None] * w[None])
  alike = pairs * (y[:, None] == y[None]) * known_too[:, None] * known_too[None]
  assert found["alignment"] == pytest.approx(np.average(distance, weights=alike), rel=1e-5)
  potential = np.average(np.exp(-2 * distance), weights=pairs)
  assert found["uniformity"] == pytest.approx(np.log(potential), rel=1e-5)
  nearest = neighbors.NearestNeighbors(n_neighbors=3, metric="cosine").fit(unit[known_too])
  rows = nearest.kneighbors(return_distance=False)
  right = y[known_too][rows] == y[known_too][:, None]
  for name, each in (("recall_at_1", right[:, 0]), ("recall_at_k", right.any(1))):
    assert found[name] == pytest.approx(np.average(each, weights=w[known_too])), name


def test_a_vector_for_each_position():
  """The same as positions that are examples of their own; padding is nobody's neighbour."""
  labels, vectors = RNG.integers(0, 3, (9, 5)), RNG.normal(size=(9, 5, 4))
  weight = (np.arange(5) < RNG.integers(1, 6, 9)[:, None]).astype(float)
  vectors[weight == 0] = 1e3
  task, teacher = tasks.embedding(neighbours=3), vectors + 0.3 * RNG.normal(size=vectors.shape)
  found = measured(task, vectors, labels, batch_size=4, weight=weight, teacher=teacher)
  there = weight > 0
  flat = measured(task, vectors[there], labels[there], teacher=teacher[there])
  assert found == pytest.approx(flat, rel=1e-5)
  # An example's own label is that of its positions.
  of_one = measured(task, vectors, labels[:, 0])
  spread = np.repeat(labels[:, :1], 5, axis=1)
  assert of_one == pytest.approx(measured(task, vectors, spread), rel=1e-6)
  kept = {"vectors": vectors, "labels": labels, "weight": weight, "known": np.ones((9, 5))}
  shown = task.shown.values(kept)["recall_at_1"]
  assert np.average(shown, weights=weight.sum(1)) == pytest.approx(found["recall_at_1"])
  assert task.shown.tells(kept, 2)[0] == labels[2, 0]


@pytest.mark.parametrize("labelled", [False, True])
def test_two_towers(labelled):
  images = RNG.normal(size=(SIZE, 5))
  texts = images + RNG.normal(size=images.shape)
  weight, labels = RNG.random(SIZE), RNG.integers(0, 9, SIZE)

  def towers(*both):
    rows = tuple(jnp.asarray(one, jnp.float32) for one in both)
    names = ("image", "text")
    return Teacher(
      rows,
      lambda v, b: Outputs(features={n: x[b.index] for n, x in zip(names, v, strict=True)}),
    )

  examples = data.from_arrays(
    np.zeros((SIZE, 1), np.float32), labels if labelled else None, weight=weight
  )
  batches = data.evaluation_batches(examples, batch_size=8)
  task = tasks.retrieval("image", "text", at=(1, 4))
  found = evaluation.evaluate(
    towers(images, texts), batches, teacher=towers(images, images), task=task
  )
  a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, texts))
  right = labels[:, None] == labels[None] if labelled else np.eye(SIZE, dtype=bool)
  same = []
  for way, scores in (("image_to_text", a @ b.T), ("text_to_image", b @ a.T)):
    order = np.argsort(-scores, axis=1)
    ranks = np.take_along_axis(right, order, 1).argmax(1)
    for k in (1, 4):
      # The best of those that are right has so many wrong ones before it.
      wanted = np.average(ranks < k, weights=weight)
      assert found[f"{way}_at_{k}"] == pytest.approx(wanted), (way, k)
    same.append(np.average(order[:, 0] == np.arange(SIZE), weights=weight))
  assert found["agreement"] == pytest.approx(np.mean(same))
  # A split without labels is one to choose by.
  assert search.Choice(batches, task=task).metric == "image_to_text_at_1"
  asked = evaluation.validator(batches, task=task)
  assert asked.task.first == "image_to_text_at_1"
  # What is the same everywhere finds nothing.
  flat = evaluation.evaluate(towers(images, 0 * texts + 1), batches, task=task)
  assert labelled or float(flat["image_to_text_at_4"]) == 0


@pytest.mark.parametrize(
  ("task", "outputs", "labels"),
  [
    (None, np.zeros((4, 3)), np.zeros(4)),
    (None, np.zeros((4, 3)), np.zeros((4, 3), int)),
    (tasks.dense(), np.zeros((4, 2, 2, 3)), np.zeros((4, 3, 3), int)),
    (tasks.multilabel(), np.zeros((4, 3)), np.zeros((4, 2), int)),
    (tasks.regression(), np.zeros((4, 3)), np.zeros((4, 2))),
    (tasks.embedding(), np.zeros((4, 2, 2, 3)), np.zeros(4, int)),
    (tasks.embedding(), np.zeros((4, 2, 3)), np.zeros((4, 3), int)),
  ],
)
def test_labels_of_another_task_are_refused(task, outputs, labels):
  with pytest.raises(TypeError, match=r"labels|vector"):
    measured(task, outputs, labels)


@pytest.mark.parametrize(
  ("task", "shape", "names"),
  [
    (None, (5,), {"agreement", "kl"}),
    (tasks.multilabel(), (5,), {"agreement", "kl"}),
    (tasks.regression(), (2,), {"rmse_to_teacher"}),
    (tasks.dense(), (3, 3, 5), {"agreement", "kl"}),
    (
      tasks.tokens(),
      (3, 5),
      {"agreement", "kl", "reverse_kl", "acceptance", "top_mass_1"},
    ),
    (tasks.embedding(), (5,), {"uniformity", "neighbour_agreement"}),
  ],
)
def test_without_labels_there_is_what_needs_none(task, shape, names):
  ours, theirs = RNG.normal(size=(2, SIZE, *shape))
  assert set(measured(task, ours, None, teacher=theirs)) == names


class Regressor(nn.Module):
  """Two targets of four numbers."""

  width: int

  @nn.compact
  def __call__(self, x):
    return nn.Dense(2)(nn.relu(nn.Dense(self.width)(x)))


def objective(student, teacher, batch, *, soft_weight=0.5):
  def error(target):
    return jnp.mean(jnp.square(student.logits - target), axis=-1)

  terms = {"labels": Term(error(batch.labels), where=batch.labelled)}
  if teacher is not None:
    terms["soft"] = Term(error(teacher.logits), weight=soft_weight)
  return terms


def regression_parts(size=96):
  inputs = RNG.normal(size=(size, 4)).astype(np.float32)
  targets = np.stack([inputs[:, 0] * inputs[:, 1], inputs[:, 2]], axis=1)
  return data.from_arrays(inputs, targets)


@pytest.mark.slow
def test_a_regression_from_arrays_to_the_chosen_point(tmp_path):
  examples, held_out = regression_parts(), regression_parts()
  source = data.on_device(examples, batch_size=16, data_seed=0)
  batches = data.evaluation_batches(held_out, batch_size=10)
  task = tasks.regression()
  teacher = train.fit(
    networks.linen(Regressor(32)),
    objective,
    data=source,
    optimizer=optax.adam(1e-2),
    steps=60,
    run=train.Run(progress=None),
  )
  fitted = train.fit(
    networks.linen(Regressor(4)),
    objective,
    data=source,
    optimizer=optax.adam(1e-2),
    steps=30,
    teacher=teachers.frozen(teacher),
    seed=[0, 1],
    watch=train.Watch(evaluation.validator(batches, task=task), validate_every=6),
    run=train.Run(tmp_path / "run", progress=None),
  )
  found = evaluation.evaluate(fitted, batches, teacher=teachers.frozen(teacher), task=task)
  assert set(found) == {"rmse", "mae", "r2", "rmse_to_teacher"}
  for s, one in enumerate(fitted.unstack()):
    said = np.asarray(one(held_out.inputs).logits, np.float64)
    rmse = known.root_mean_squared_error(held_out.labels, said)
    assert found["rmse"][s] == pytest.approx(rmse, rel=1e-5)
    assert float(evaluation.evaluate(one, batches, task=task)["rmse"]) == pytest.approx(
      rmse, rel=1e-5
    )
  # The lower error is the better: the best checkpoint is the one whose mean over seeds is least.
  lines = [line for line in fitted.history if "validation/rmse" in line]
  best = min(lines, key=lambda line: np.mean(line["validation/rmse"]))
  from jaxdistill.runs import Checkpoints

  with Checkpoints(tmp_path / "run" / "checkpoints") as saved:
    assert saved.best() == best["step"]

  result = search.sweep(
    networks.linen(Regressor(4)),
    objective,
    points=[{"rate": 1e-5}, {"rate": 1e-2}],
    seeds=[0, 1],
    data=source,
    optimizer=lambda rate: optax.adam(rate),
    steps=30,
    teacher=teachers.frozen(teacher),
    choice=search.Choice(batches, task=task, test=batches),
    run=train.Run(tmp_path / "sweep", progress=None),
  )
  assert result.metric == "rmse"
  assert result.chosen == {"rate": 1e-2}
  assert "rmse" in result.sentence()
  assert "%" not in result.sentence()


def test_a_users_own_task():
  def sums(outputs, batch):
    error = jnp.abs(outputs.logits[..., 0] - batch.labels)
    return {"mae": tasks.mean(error, tasks.counted(batch, error))}

  mine = tasks.Task("mine", {"mae": tasks.Metric("lower")}, sums)
  labels = RNG.normal(size=SIZE)
  assert measured(mine, labels[:, None] + 0.5, labels) == {"mae": pytest.approx(0.5, rel=1e-5)}
  with pytest.raises(ValueError, match="'accuracy' is not among"):
    mine.metric("accuracy")


def test_a_network_whose_vector_is_a_feature():
  class Tower(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.Dense(6)(x)
      self.sow("intermediates", "pooled", x)
      return nn.Dense(3)(x)

  examples = data.from_arrays(RNG.normal(size=(20, 4)).astype(np.float32), RNG.integers(0, 3, 20))
  batches = data.evaluation_batches(examples, batch_size=8)
  network = networks.linen(Tower(), features=["pooled"])
  model = Model(network, network.init(jax.random.key(0), batches.inputs[0]))
  found = evaluation.evaluate(model, batches, task=tasks.embedding("pooled", neighbours=2))
  vectors = np.asarray(model(examples.inputs).features["pooled"])
  assert {n: float(v) for n, v in found.items()} == pytest.approx(
    measured(tasks.embedding(neighbours=2), vectors, examples.labels), rel=1e-5
  )
  beside = evaluation.taught(teachers.frozen(model), batches, task=tasks.embedding("pooled"))
  assert beside.teacher.logits.shape == (3, 8, 6)


def test_labels_as_soft_targets_reach_the_loss():
  """Dense labels with ignored pixels: the loss counts what the metric counts."""
  logits = jnp.asarray(RNG.normal(size=(2, 3, 3, 4)), jnp.float32)
  labels = RNG.integers(0, 4, (2, 3, 3)).astype(np.uint8)
  labels[0, 0] = 255
  examples = data.from_arrays(np.zeros((2, 1), np.float32), labels, ignore=255, num_classes=4)
  batch = jax.tree.map(lambda leaf: leaf[0], data.evaluation_batches(examples, batch_size=2))
  values = losses.cross_entropy(logits, batch.labels)
  _, sums = train.reduce_terms({"labels": Term(values, where=batch.labelled)}, batch)
  total, count = sums["labels"]
  found = measured(tasks.dense(), logits, labels, ignore=255, num_classes=4)
  assert float(total / count) == pytest.approx(found["nll"], rel=1e-5)
  assert dataclasses.is_dataclass(batch)
