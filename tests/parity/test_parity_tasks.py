"""Losses by parts of the classes, of other tasks and without a teacher, beside PyTorch's."""

import numpy as np
import pytest

import published
from beside import check, numbers, torch
from jaxdistill import losses
from test_parity_logits import SIZES, integers, logits

pytestmark = pytest.mark.parity
SIZED = pytest.mark.parametrize(("batch", "classes"), SIZES)
functional = torch.nn.functional


@SIZED
@pytest.mark.parametrize("top", [1, 2])
def test_generalized_decoupled_kd(batch, classes, top):
  top = min(top, classes - 1)  # with all of them at the top the published rest is all of them, too
  check(
    lambda s, t: losses.generalized_decoupled_kd(s, t, top=top, temperature=2.0),
    lambda s, t: published.generalized_decoupled(s, t, top, 2.0, (1.0, 2.0, 8.0)),
    *logits(31, batch, classes),
    alone=True,
  )


@SIZED
def test_refined_kd(batch, classes):
  check(
    losses.refined_kd,
    lambda s, t, y: published.refined(s, t, y, 4.0, 1.0, (1.0, 8.0)),
    *logits(32, batch, classes),
    integers(33, batch, classes),
    alone=True,
  )


@SIZED
@pytest.mark.parametrize(("temperature", "nontarget_weight"), [(1.0, 1.5), (3.0, 3.5)])
def test_normalized_kd(batch, classes, temperature, nontarget_weight):
  hyper = {"temperature": temperature, "nontarget_weight": nontarget_weight}
  check(
    lambda s, t, y: losses.normalized_kd(s, t, y, **hyper),
    lambda s, t, y: published.normalized(s, t, y, temperature, nontarget_weight),
    *logits(34, batch, classes),
    integers(35, batch, classes),
    alone=True,
  )


@SIZED
@pytest.mark.parametrize("power", [0.1, 0.7])
def test_transformed_teacher(batch, classes, power):
  for loss, weighted in (
    (losses.transformed_teacher, False),
    (losses.weighted_transformed_teacher, True),
  ):
    check(
      lambda s, t, loss=loss: loss(s, t, power=power),
      lambda s, t, weighted=weighted: published.transformed(s, t, power, weighted),
      *logits(36, batch, classes),
      alone=True,
    )


@SIZED
def test_weighted_soft_labels(batch, classes):
  check(
    losses.weighted_soft_labels,
    lambda s, t, y: published.weighted_soft_labels(s, t, y, 2.0),
    *logits(37, batch, classes),
    integers(38, batch, classes),
    alone=True,
  )


@SIZED
@pytest.mark.parametrize("temperature", [2.0, 4.0])
def test_correlations_of_multi_level_distillation(batch, classes, temperature):
  for loss, by_class in ((losses.class_gram, True), (losses.batch_gram, False)):
    check(
      lambda s, t, loss=loss: loss(s, t, temperature=temperature),
      lambda s, t, by_class=by_class: published.grams(s, t, temperature, by_class),
      *logits(39, batch, classes),
    )


@SIZED
def test_targets_without_a_teacher(batch, classes):
  given = logits(40, batch, classes)[0], integers(41, batch, classes)
  check(losses.self_target, published.self_target, *given)
  check(
    lambda s, y: losses.virtual_teacher(s, y, temperature=0.5),
    lambda s, y: published.virtual(s, y, 0.99, 0.5),
    *given,
    alone=True,
  )


@SIZED
def test_labels_that_are_on_or_off(batch, classes):
  student, teacher = logits(42, batch, classes)
  check(losses.binary_soft_target_kl, published.multi_label, student, teacher, alone=True)
  check(
    losses.binary_cross_entropy,
    lambda s, y: functional.binary_cross_entropy_with_logits(s, y, reduction="sum") / len(s),
    student,
    np.random.default_rng(43).random((batch, classes)),
    alone=True,
  )


def test_numbers():
  student, target = numbers(44, 6, 4), numbers(45, 6, 4)
  check(
    lambda s, t: losses.huber(s, t, delta=0.7),
    lambda s, t: functional.huber_loss(s, t, delta=0.7),
    student,
    target,
    alone=True,
  )
  check(
    lambda s, t: losses.gaussian_nll(s, t, floor=1e-3),
    lambda s, t: functional.gaussian_nll_loss(s[:, :4], t, s[:, 4:].exp() + 1e-3),
    numbers(46, 6, 8),
    target,
    alone=True,
  )
  normal = torch.distributions.Normal

  def of(x):
    return normal(x[:, :2], (x[:, 2:].exp() + 1e-6).sqrt())

  check(
    losses.gaussian_kl,
    lambda s, t: torch.distributions.kl_divergence(of(t), of(s)).mean(),
    student,
    target,
    alone=True,
  )


def test_scores_of_pairs():
  check(
    losses.margin_mse,
    lambda s, t: functional.mse_loss(s[:, 0] - s[:, 1], t[:, 0] - t[:, 1]),
    *logits(47, 6, 2),
    alone=True,
  )
  check(
    lambda *x: losses.affinity(*x, student_temperature=0.5, teacher_temperature=0.2),
    lambda *x: published.affinity(*x, 0.5, 0.2),
    *(numbers(seed, 6, 5) for seed in (48, 49, 50, 51)),
  )


def test_norm_and_direction():
  check(
    losses.norm_and_direction,
    published.norm_and_direction,
    *logits(52, 7, 5),
    integers(53, 7, 4),
    numbers(54, 4, 5),
    shared=(3,),
    alone=True,
  )


@SIZED
def test_regions_of_an_image(batch, classes):
  shape = batch, 5, classes
  student, teacher = numbers(45, *shape, scale=2.0), numbers(46, *shape, scale=2.0)
  check(
    losses.scale_decoupled_kd,
    lambda s, t, y: published.regions(s, t, y, 4.0),
    student,
    teacher,
    integers(47, batch, classes),
    alone=True,
  )


@SIZED
def test_labels_that_give_way_to_the_past(batch, classes):
  student = logits(48, batch, classes)[0]
  past = torch.tensor(logits(49, batch, classes)[0]).softmax(1).numpy()

  def ours(s, p, y):
    return 0.3 * losses.cross_entropy(s, p) + 0.7 * losses.cross_entropy(s, y)

  check(
    ours,
    lambda s, p, y: published.past_and_labels(s, p, y, 0.3),
    student,
    past,
    integers(50, batch, classes),
    alone=True,
  )


@SIZED
def test_a_student_beside_its_average(batch, classes):
  check(losses.consistency, published.mean_squares, *logits(51, batch, classes), alone=True)


@SIZED
def test_other_classes_by_zipfs_law(batch, classes):
  student, weak = logits(52, batch, classes)
  check(
    losses.self_nontarget,
    lambda s, w, y: published.self_nontarget(s, w, y, by_log=False),
    student,
    weak,
    integers(53, batch, classes),
    constant=(1,),
    alone=True,
  )


def test_a_feature_as_the_teachers_classifier_reads_it():
  features, taught = numbers(54, 6, 5), numbers(55, 6, 5)
  said, told = logits(56, 6, 4)
  check(
    lambda f, t, s, z: losses.hint_l2(f, t) + 5 * losses.logit_l2(s, z),
    lambda f, t, s, z: published.softmax_regression(f, t, s, z, 1.0, 5.0),
    features,
    taught,
    said,
    told,
    alone=True,
  )
