"""Recipes on parts of the classes, on numbers and labels, and without a teacher: sums in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import recipes
from jaxdistill.train import reduce_terms
from jaxdistill.types import Outputs, as_objective, make_batch
from test_losses_logits import (
  FORMULAS,
  kl,
  ref_batch_gram,
  ref_class_gram,
  ref_label_weight,
  ref_normalized,
  ref_partition,
  ref_refined,
  ref_transformed,
  softmax,
)
from test_losses_logits import first as first_classes
from test_losses_tasks import (
  ref_bce,
  ref_binary_kl,
  ref_bounded,
  ref_direction,
  ref_gaussian_kl,
  ref_huber,
  ref_nll,
  ref_regions,
  ref_self_nontarget,
  ref_virtual,
)
from test_recipes_logits import CLASSES, KEY, draw, hard, mean, of, parameters, soft, z_scores

MEANS = np.random.default_rng(4).normal(size=(CLASSES, 5))
NUMBERS = np.random.default_rng(5).normal(size=(8, CLASSES))
# Two numbers an example: means of them, and the logarithms of variances, are four.
PAIRS = NUMBERS[:, :2]


def cross(s, t, temperature=1.0):
  """Cross-entropy with the teacher's probabilities."""
  return -(softmax(t, temperature) * np.log(softmax(s, temperature))).sum(-1)


def of_labels(s, y, known, weight=1.0):
  return weight * mean(hard(s, y), known)


def gdkd(s, t, y, weight, known):
  parts = ref_partition(s, t, first_classes(t, 2), 4.0, 1.0, 2.0, 8.0)
  return of_labels(s, y, known) + 0.25 * mean(parts, weight)


def mlkd(s, t, y, weight, known, standardized=False):
  there = weight > 0
  found = of_labels(s, y, known, 0.1)
  for temperature in (4.0, 3.0, 5.0, 2.0, 6.0):
    sharp = (z_scores(s), z_scores(t)) if standardized else (s, t)
    found += 0.9 * mean(soft(*sharp, temperature), weight)
    found += 0.9 * ref_class_gram(s[there], t[there], temperature).mean()
    found += 0.9 * mean(ref_batch_gram(s[there], t[there], temperature), weight[there])
  return found


def wsl(s, t, y, weight, known):
  return of_labels(s, y, known) + 2.5 * 4 * mean(
    ref_label_weight(s, t, y) * cross(s, t, 2.0), known
  )


def pskd(s, t, y, weight, known):
  return of_labels(s, y, known, 0.7) + 0.3 * mean(cross(s, t), weight)


def bounded(s, t, y, weight, known):
  return mean(ref_huber(s, y, 1.0), known) + 0.5 * mean(ref_bounded(s, t, y, 0.0), known)


# name: (objective, keywords, labels or None for classes, the published sum)
PUBLISHED = {
  "gdkd": (recipes.gdkd(top=2), {"gdkd_warmup": 0.25}, None, gdkd),
  "rld": (
    recipes.rld(),
    {"rld_warmup": 0.25},
    None,
    lambda s, t, y, weight, known: (
      of_labels(s, y, known) + 0.25 * mean(ref_refined(s, t, y, 4.0, 1.0, 1.0, 8.0), known)
    ),
  ),
  "nkd": (
    recipes.nkd(),
    {},
    None,
    lambda s, t, y, weight, known: (
      of_labels(s, y, known) + mean(ref_normalized(s, t, y, 3.0, 3.5), known)
    ),
  ),
  "ttm": (
    recipes.ttm(),
    {},
    None,
    lambda s, t, y, weight, known: (
      of_labels(s, y, known) + 45 * mean(ref_transformed(s, t, 0.1)[0], weight)
    ),
  ),
  "wttm": (
    recipes.wttm(),
    {},
    None,
    lambda s, t, y, weight, known: (
      of_labels(s, y, known) + 4 * mean(np.prod(ref_transformed(s, t, 0.2), axis=0), weight)
    ),
  ),
  "wsl": (recipes.wsl(), {}, None, wsl),
  "mlkd": (recipes.mlkd(), {}, None, mlkd),
  "mlkd+ls": (
    recipes.mlkd(standardize=True),
    {},
    None,
    functools.partial(mlkd, standardized=True),
  ),
  "tfkd": (
    recipes.tfkd(),
    {},
    None,
    lambda s, t, y, weight, known: (
      of_labels(s, y, known, 0.9) + 0.1 * mean(ref_virtual(s, y, 0.99, 20.0), known)
    ),
  ),
  "pskd": (recipes.pskd(), {"past_share": 0.3}, None, pskd),
  "mean_teacher": (
    recipes.mean_teacher(),
    {"consistency_warmup": 0.25},
    None,
    lambda s, t, y, weight, known: (
      of_labels(s, y, known) + 25 * mean(((softmax(s) - softmax(t)) ** 2).mean(-1), weight)
    ),
  ),
  "multi_label": (
    recipes.multi_label(),
    {},
    (NUMBERS > 0).astype(float),
    lambda s, t, y, weight, known: (
      mean(ref_bce(s, y), known) + 10 * mean(ref_binary_kl(s, t, 1.0), weight)
    ),
  ),
  "regression": (
    recipes.regression(),
    {},
    NUMBERS,
    lambda s, t, y, weight, known: (
      mean(((s - y) ** 2).mean(-1), known) / 2 + mean(((s - t) ** 2).mean(-1), weight) / 2
    ),
  ),
  "teacher_bounded": (recipes.teacher_bounded(), {}, NUMBERS, bounded),
  "gaussian_regression": (
    recipes.gaussian_regression(),
    {},
    PAIRS,
    lambda s, t, y, weight, known: (
      mean(ref_nll(s, y, 1e-6), known) / 2 + mean(ref_gaussian_kl(s, t, 1e-6), weight) / 2
    ),
  ),
}
NAMES = pytest.mark.parametrize("name", PUBLISHED)
ALONE = ("tfkd",)


@NAMES
def test_the_loss_is_the_published_sum(name, strict_promotion):
  objective, keywords, labels, published = PUBLISHED[name]
  objective = as_objective(objective)
  with jax.enable_x64(True):
    student, teacher, batch = draw()
    if labels is not None:
      batch = batch.replace(labels=jnp.asarray(labels))
    compute = jax.jit(of(objective, **keywords))
    loss, sums = compute({}, {}, student, teacher, batch)
    s, t, y = (np.asarray(x) for x in (student.logits, teacher.logits, batch.labels))
    weight = np.asarray(batch.weight)
    want = published(s, t, y, weight, weight * np.asarray(batch.labelled))
    # The rows that do not count hold anything.
    wild = jnp.where(batch.weight[:, None] > 0, student.logits, 1e4)
    again, _ = compute({}, {}, student.replace(logits=wild), teacher, batch)
    assert float(loss) == pytest.approx(want, rel=1e-10)
    assert float(again) == pytest.approx(float(loss), rel=1e-10)
  # Labelled rows by their weights: 1, 1, 1 and 1 of 8.
  assert float(sums["labels"][1]) == 4


@NAMES
def test_low_precision_logits_make_float32_terms(name, strict_promotion):
  objective, keywords, labels, _ = PUBLISHED[name]
  student, teacher, batch = draw(jnp.bfloat16)
  if labels is not None:
    batch = batch.replace(labels=jnp.asarray(labels, jnp.float32))
  loss, _ = jax.eval_shape(of(objective, **keywords), {}, {}, student, teacher, batch)
  assert loss.dtype == jnp.float32


@NAMES
def test_without_a_teacher_each_says_so_or_needs_none(name):
  objective, keywords, labels, _ = PUBLISHED[name]
  student, _, batch = draw(np.float32)
  if labels is not None:
    batch = batch.replace(labels=jnp.asarray(labels))
  if name in ALONE:
    assert np.isfinite(of(objective, **keywords)({}, {}, student, None, batch)[0])
    return
  with pytest.raises(ValueError, match=f"{name.split('+')[0]} compares with a teacher"):
    objective.apply({}, {}, student, None, batch, key=KEY, **keywords)


def test_labels_of_one_number_an_example():
  student, teacher, batch = draw(np.float32)
  one = [Outputs(x.logits[:, :1]) for x in (student, teacher)]
  two = [Outputs(x.logits[:, :2]) for x in (student, teacher)]
  flat = batch.replace(labels=jnp.asarray(NUMBERS[:, 0], jnp.float32))
  deep = flat.replace(labels=flat.labels[:, None])
  given = {"regression": one, "teacher_bounded": one, "gaussian_regression": two}
  for name, both in given.items():
    compute = of(getattr(recipes, name)())
    np.testing.assert_array_equal(compute({}, {}, *both, flat)[0], compute({}, {}, *both, deep)[0])


def test_without_the_soft_term_no_teacher_is_asked():
  student, teacher, batch = draw(np.float32)
  given = {"multi_label": (NUMBERS > 0), "regression": NUMBERS, "gaussian_regression": PAIRS}
  for name, labels in given.items():
    made = getattr(recipes, name)
    known = batch.replace(labels=jnp.asarray(labels, jnp.float32))
    both = of(made(hard_weight=0.5))({}, {}, student, teacher, known)[1]
    loss, sums = of(made(soft_weight=None, hard_weight=0.5))({}, {}, student, None, known)
    assert sums.keys() == {"labels"}
    total, count = (float(x) for x in sums["labels"])
    assert [total, count] == [float(x) for x in both["labels"]]
    assert float(loss) == pytest.approx(0.5 * total / count, rel=1e-6)


def test_numbers_that_are_not_known_of_an_example_that_has_others():
  """Of a table with holes each number counts by itself; without one nothing changes."""
  student, teacher, batch = draw(np.float32)
  known = np.random.default_rng(6).integers(0, 2, NUMBERS.shape).astype(np.float32)
  known[3] = 0
  count = np.asarray(batch.weight)[:, None] * known
  numbers = np.where(known > 0, NUMBERS, 0).astype(np.float32)
  s, t = np.float64(student.logits), np.float64(teacher.logits)
  D = NUMBERS.shape[1]
  wide = [Outputs(jnp.concatenate([x.logits, 0.1 * x.logits], axis=-1)) for x in (student, teacher)]
  both = [student, teacher]
  huber = np.where(np.abs(s - numbers) < 1, (s - numbers) ** 2 / 2, np.abs(s - numbers) - 0.5)
  ours, theirs = (((x - numbers) ** 2 * known).sum(-1) for x in (s, t))
  bound = np.where(ours > theirs, ours, 0.0), np.asarray(batch.weight) * known.any(-1)
  nll = 0.5 * ((s - numbers) ** 2 / (1e-6 + np.exp(0.1 * s)) + np.log(1e-6 + np.exp(0.1 * s)))
  want = {
    "regression": mean((s - numbers) ** 2, count),
    "teacher_bounded": mean(huber, count) + mean(*bound),
    "gaussian_regression": mean(nll, count),
  }
  for name, value in want.items():
    hyper = {"bounded_weight": 1.0} if name == "teacher_bounded" else {"soft_weight": 0.0}
    compute = of(getattr(recipes, name)(hard_weight=1.0, **hyper))
    given = wide if name == "gaussian_regression" else both
    holes = batch.replace(labels=jnp.asarray(numbers), labelled=jnp.asarray(known))
    loss, sums = compute({}, {}, *given, holes)
    assert float(loss) == pytest.approx(value, rel=1e-5)
    assert float(sums["labels"][1]) == count.sum()
    flat = batch.replace(labels=jnp.asarray(numbers))
    full = flat.replace(labelled=jnp.repeat(flat.labelled[:, None], D, axis=1))
    whole, apart = (float(compute({}, {}, *given, one)[0]) for one in (flat, full))
    assert apart == pytest.approx(whole, rel=1e-5)


def test_labels_that_are_not_known_of_an_example_that_has_others():
  student, teacher, batch = draw(np.float32)
  on = (NUMBERS > 0).astype(np.float32)
  known = np.random.default_rng(6).integers(0, 2, on.shape).astype(np.float32)
  known[3] = 0
  wild = np.where(known > 0, on, np.nan)
  compute = of(recipes.multi_label(soft_weight=0.0))
  given = batch.replace(labels=jnp.asarray(wild), labelled=jnp.asarray(known))
  loss, sums = compute({}, {}, student, teacher, given)
  z = np.float64(student.logits)
  p = 1 / (1 + np.exp(-z))
  each = -(on * np.log(p) + (1 - on) * np.log(1 - p)) * known
  weight = np.asarray(batch.weight) * known.any(-1)
  assert float(loss) == pytest.approx(mean(each.sum(-1), weight), rel=1e-5)
  assert float(sums["labels"][1]) == weight.sum()


@pytest.mark.slow
def test_norm_and_direction_with_and_without_a_projector(strict_promotion):
  student, teacher, batch = draw(np.float32)
  rng = np.random.default_rng(7)
  for width in (5, 3):
    wide = jnp.asarray(rng.normal(size=(8, width)), jnp.float32)
    means = MEANS[:, :width]
    theirs = teacher.replace(features={"vector": wide})
    objective = recipes.norm_direction(np.float32(means), student_layer="vector")
    params = parameters(objective, student, theirs)
    loss, _ = of(objective, nd_warmup=0.5)(params, {}, student, theirs, batch)
    x = np.float64(student.features["vector"])
    if width == 3:
      dense = params["projector"]["dense"]
      x = x @ np.float64(dense["kernel"]) + np.float64(dense["bias"])
    else:
      assert params == {}
    s, t, y = np.float64(student.logits), np.float64(teacher.logits), np.asarray(batch.labels)
    weight = np.asarray(batch.weight)
    known = weight * np.asarray(batch.labelled)
    want = of_labels(s, y, known) + 0.5 * 3.5 * mean(soft(s, t, 4.0), weight)
    want += 2 * mean(ref_direction(x, np.float64(wide), y, means), known)
    assert float(loss) == pytest.approx(want, rel=1e-4)
  with pytest.raises(ValueError, match=r"means=.* must be \[K, D\].*class_means"):
    recipes.norm_direction(MEANS[0])
  with pytest.raises(ValueError, match="norm_direction compares with a teacher"):
    recipes.norm_direction(MEANS, student_layer="vector").init(KEY, student, None)


def test_universal_self_distillation_has_an_exit_and_a_mean_over_who_counts(strict_promotion):
  student, _, batch = draw(np.float32)
  objective = recipes.uskd(student_layer="map", target_weight=0.5, weak_weight=0.2)
  params = parameters(objective, student, None)
  loss, _ = jax.jit(of(objective))(params, {}, student, None, batch)
  s, y = np.float64(student.logits), np.asarray(batch.labels)
  known = np.asarray(batch.weight * batch.labelled)
  dense = params["weak"]["dense"]
  weak = np.float64(student.features["map"]).mean((1, 2)) @ np.float64(dense["kernel"])
  weak = weak + np.float64(dense["bias"])
  q = softmax(s)[np.arange(8), y]
  # The mean of squares is over examples, whatever their weights in the mean of the term.
  target = -(1 + q**2 - (q**2)[known > 0].mean()) * np.log(q)
  smooth = FORMULAS["cross_entropy"][2](weak, None, y, label_smoothing=0.1)
  want = of_labels(s, y, known) + 0.5 * mean(target, known)
  want += 0.1 * mean(ref_self_nontarget(s, weak, y), known) + 0.2 * mean(smooth, known)
  assert float(loss) == pytest.approx(want, rel=1e-5)
  with pytest.raises(ValueError, match="student_layer='stage2' is not among"):
    recipes.uskd().init(KEY, student, None)


@pytest.mark.slow
def test_scale_decoupled_distillation_pools_maps_of_logits(strict_promotion):
  student, teacher, batch = draw(np.float32)
  rng = np.random.default_rng(8)
  maps = [rng.normal(size=(8, size, size, CLASSES)) for size in (4, 2)]
  both = [
    x.replace(features={"logit_map": jnp.asarray(m, jnp.float32)})
    for x, m in zip((student, teacher), maps, strict=True)
  ]
  loss, _ = of(recipes.sdd())({}, {}, *both, batch)
  s, y = np.float64(student.logits), np.asarray(batch.labels)
  known = np.asarray(batch.weight * batch.labelled)
  quarters = [m.reshape(8, 2, m.shape[1] // 2, 2, -1, CLASSES).mean((2, 4)) for m in maps]
  ours, theirs = (
    np.concatenate([m.mean((1, 2))[:, None], q.reshape(8, 4, CLASSES)], 1)
    for m, q in zip(maps, quarters, strict=True)
  )
  want = of_labels(s, y, known, 0.1) + 0.9 * mean(ref_regions(ours, theirs, y, 4.0), known)
  assert float(loss) == pytest.approx(want, rel=1e-5)
  with pytest.raises(ValueError, match="student_layer='logit_map' is not among"):
    recipes.sdd().apply({}, {}, student, teacher, batch, key=KEY)
  with pytest.raises(ValueError, match="sdd compares with a teacher"):
    recipes.sdd().apply({}, {}, student, None, batch, key=KEY)


def test_schedules_and_what_turns_them_off():
  given = {
    "gdkd": ("gdkd_warmup", {"warmup_steps": 10}, 1.0),
    "rld": ("rld_warmup", {"warmup_steps": 10}, 1.0),
    "pskd": ("past_share", {"growth_steps": 10}, 0.8),
  }
  for name, (keyword, steps, end) in given.items():
    make = getattr(recipes, name)
    schedule = make(**steps).hyper[keyword]
    at = [float(schedule(step)) for step in (0, 5, 10, 99)]
    np.testing.assert_allclose(at, [0, end / 2, end, end], atol=1e-6)
    assert make(**dict.fromkeys(steps, 0)).hyper[keyword] == end
    student, teacher, batch = draw(np.float32)
    with pytest.raises(ValueError, match=f"{keyword} is a schedule of the step"):
      make().apply({}, {}, student, teacher, batch, key=None)
    with pytest.raises(ValueError, match=f"{next(iter(steps))}=-1"):
      make(**dict.fromkeys(steps, -1))


def test_what_is_no_temperature_no_count_and_no_loss_is_named():
  for wrong in ("4", 4.0, ()):
    with pytest.raises(TypeError, match=r"temperatures=.* must be a sequence of numbers"):
      recipes.mlkd(temperatures=wrong)
  with pytest.raises(ValueError, match="temperatures must be positive"):
    recipes.mlkd(temperatures=(4.0, 0.0))
  with pytest.raises(TypeError, match=r"top=2.5"):
    recipes.gdkd(top=2.5)
  with pytest.raises(TypeError, match="loss must be a function"):
    recipes.regression(loss="squared")


def test_the_mixture_of_labels_and_past_is_one_cross_entropy():
  student, teacher, batch = draw(np.float32)
  full = batch.replace(labelled=jnp.ones(8), weight=jnp.ones(8))
  loss, _ = of(recipes.pskd(), past_share=0.3)({}, {}, student, teacher, full)
  s, y = np.float64(student.logits), np.asarray(batch.labels)
  mixed = 0.7 * np.eye(CLASSES)[y] + 0.3 * softmax(np.float64(teacher.logits))
  want = np.mean(kl(mixed, softmax(s)) - (mixed * np.log(mixed)).sum(-1))
  assert float(loss) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("name", ["regression", "teacher_bounded", "gaussian_regression"])
def test_numbers_of_each_place_are_as_those_of_as_many_examples(name):
  """Depths of a picture, say: labels [B, L, D], of examples that are known as a whole or not."""
  rng = np.random.default_rng(4)
  s, t, y = (jnp.asarray(rng.normal(size=(4, 5, 2)), jnp.float32) for _ in range(3))
  if name == "gaussian_regression":
    s, t = (jnp.concatenate([x, 0.1 * x], axis=-1) for x in (s, t))
  weight, known = (
    jnp.asarray(x, jnp.float32) for x in ([1.0, 2.0, 0.0, 0.5], [1.0, 0.0, 1.0, 1.0])
  )
  _, _, batch = draw(np.float32)
  compute = of(getattr(recipes, name)())

  def flat(x):
    return jnp.reshape(x, (20, *x.shape[2:]))

  whole = batch.replace(inputs=y, labels=y, weight=weight, labelled=known)
  every = {name: jnp.repeat(x, 5) for name, x in (("weight", weight), ("labelled", known))}
  alone = batch.replace(inputs=flat(y), labels=flat(y), **every)
  got = compute({}, {}, Outputs(s), Outputs(t), whole)
  want = compute({}, {}, Outputs(flat(s)), Outputs(flat(t)), alone)
  assert float(got[0]) == pytest.approx(float(want[0]), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("masks", ["by position", "by example"])
def test_uskd_of_tokens_is_uskd_of_as_many_examples(masks):
  rng = np.random.default_rng(3)
  logits, layer = rng.normal(size=(3, 4, 5)), rng.normal(size=(3, 4, 6))
  labels = rng.integers(0, 5, (3, 4))
  weight = rng.integers(0, 2, (3, 4)).astype(np.float32)
  labelled = (np.arange(12).reshape(3, 4) % 5 > 0).astype(np.float32)
  if masks == "by example":
    weight, labelled = np.array([1.0, 0, 1], np.float32), np.ones(3, np.float32)
  full = [np.broadcast_to(m.reshape(3, -1), (3, 4)) for m in (weight, labelled)]
  objective = recipes.uskd(student_layer="map")

  def sums(logits, layer, labels, weight, labelled):
    student = Outputs(jnp.asarray(logits, jnp.float32), {"map": jnp.asarray(layer, jnp.float32)})
    batch = make_batch(jnp.zeros((len(logits), 1)), labels, weight=weight, labelled=labelled)
    params, state = objective.init(KEY, student, None)
    terms, _ = objective.apply(params, state, student, None, batch, key=KEY)
    return reduce_terms(terms, batch)[1]

  flat = [x.reshape(12, *x.shape[2:]) for x in (logits, layer, labels, *full)]
  found, want = sums(logits, layer, labels, weight, labelled), sums(*flat)
  for name in want:
    np.testing.assert_allclose(found[name], want[name], rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_uskds_exit_of_a_smaller_map_is_resized_and_a_vectors_is_refused():
  logits = jnp.zeros((2, 4, 4, 3))
  objective = recipes.uskd(student_layer="map")
  labels = jnp.zeros((2, 4, 4), jnp.int32)
  batch = make_batch(jnp.zeros((2, 1)), labels, labelled=jnp.ones((2, 4, 4)))
  student = Outputs(logits, {"map": jnp.ones((2, 2, 2, 5))})
  params, state = objective.init(KEY, student, None)
  terms, _ = objective.apply(params, state, student, None, batch, key=KEY)
  assert terms["weak"].values.shape == terms["nontarget"].values.shape == (2, 4, 4)
  with pytest.raises(ValueError, match="a feature with as many axes"):
    objective.init(KEY, Outputs(logits, {"map": jnp.ones((2, 5))}), None)


@pytest.mark.parametrize("shape", [(4,), (2, 4)], ids=["classes", "tokens"])
def test_pskd_remembers_what_it_said_of_each_example(shape):
  """Two epochs in NumPy: labels at first, then its own predictions of the time before."""
  rng = np.random.default_rng(2)
  objective, share = recipes.pskd(6, hard_weight=0.5), 0.3
  labels = rng.integers(0, 4, (6, *shape[:-1]))
  params, state = objective.init(KEY, Outputs(jnp.zeros((3, *shape))), None)
  remembered = np.eye(4)[labels]
  for index, weight in (([0, 4, 2], [1, 1, 1]), ([5, 1, 3], [1, 0, 1]), ([4, 5, 1], [1, 1, 1])):
    z = rng.normal(size=(3, *shape))
    batch = make_batch(
      jnp.zeros((3, 1)), labels[index], index=jnp.array(index), weight=jnp.array(weight, float)
    )
    student = Outputs(jnp.asarray(z, jnp.float32))
    terms, state = objective.apply(
      params, state, student, None, batch, key=KEY, hard_weight=0.5, past_share=share
    )
    q = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    want = -(remembered[index] * np.log(q)).sum(-1)
    there = np.array(weight) > 0
    np.testing.assert_allclose(np.asarray(terms["past"].values)[there], want[there], rtol=1e-5)
    np.testing.assert_allclose(terms["labels"].weight, 0.5 * (1 - share), rtol=1e-6)
    for i, row, one in zip(index, q, there, strict=True):
      remembered[i] = row if one else remembered[i]
  np.testing.assert_array_equal(state["seen"], [1, 1, 1, 1, 1, 1])


def test_pskd_knows_no_past_of_what_it_never_saw_and_refuses_a_teacher():
  objective = recipes.pskd(3)
  student = Outputs(jnp.ones((3, 4)))
  _, state = objective.init(KEY, student, None)
  known = {"labelled": jnp.array([1.0, 0, 0]), "index": jnp.array([0, 1, 3])}
  batch = make_batch(jnp.zeros((3, 1)), jnp.zeros(3, int), **known)
  given = {"key": KEY, "past_share": 0.5}
  terms, state = objective.apply({}, state, student, None, batch, **given)
  np.testing.assert_array_equal(terms["past"].where, [True, False, False])
  assert np.isnan(terms["past"].values[2])  # an index beyond the examples
  np.testing.assert_array_equal(state["seen"], [True, True, False])
  terms, _ = objective.apply({}, state, student, None, batch, **given)
  np.testing.assert_array_equal(terms["past"].where, [True, True, False])
  with pytest.raises(ValueError, match="teacher is not None"):
    objective.init(KEY, student, student)
  for wrong in (0, -1):
    with pytest.raises(ValueError, match="examples"):
      recipes.pskd(wrong)
