"""Losses on logits: value and gradient beside torchdistill's and PyTorch's, in float64."""

import jax
import numpy as np
import pytest

import published
from beside import PATHS, called, check, numbers, torch, torchdistill
from jaxdistill import losses

pytestmark = pytest.mark.parity

SIZES = [(5, 2), (6, 100)]
# Spread of the logits: flat, as trained, and so far apart that most probabilities are 0.
SCALES = [0.01, 2.0, 1e4]


def logits(seed, batch, classes, scale=2.0):
  return numbers(seed, batch, classes, scale=scale), numbers(seed + 50, batch, classes, scale=scale)


def integers(seed, batch, classes):
  return np.random.default_rng(seed).integers(0, classes, batch)


def mixed(seed, batch, classes):
  return np.random.default_rng(seed).dirichlet(np.ones(classes), batch)


@pytest.mark.parametrize(("batch", "classes"), SIZES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
  ("labels", "smoothing"), [(integers, 0.0), (integers, 0.1), (mixed, 0.0), (mixed, 0.1)]
)
def test_cross_entropy(batch, classes, scale, labels, smoothing):
  # Distributions have a gradient too.
  check(
    lambda s, y: losses.cross_entropy(s, y, label_smoothing=smoothing),
    lambda s, y: torch.nn.functional.cross_entropy(s, y, label_smoothing=smoothing),
    logits(1, batch, classes, scale)[0],
    labels(2, batch, classes),
    alone=True,
  )


@pytest.mark.parametrize(("batch", "classes"), SIZES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd(batch, classes, scale, temperature):
  theirs = called(torchdistill.KDLoss(**PATHS, temperature=temperature, alpha=0.3, beta=0.9))
  # Where a probability is 0, PyTorch's gradient to the teacher is not finite: test_disagreements.
  frozen = (1,) if scale == 1e4 else ()
  check(
    lambda s, t, y: (
      0.3 * losses.cross_entropy(s, y) + 0.9 * losses.soft_target_kl(s, t, temperature=temperature)
    ),
    lambda s, t, y: theirs(s, t.detach() if frozen else t, y),
    *logits(3, batch, classes, scale),
    integers(4, batch, classes),
    frozen=frozen,
    alone=True,
  )


def test_kd_with_mixed_and_smoothed_labels():
  theirs = torchdistill.KDLoss(**PATHS, temperature=2.0, alpha=0.4, label_smoothing=0.1)
  check(
    lambda s, t, y: (
      0.4 * losses.cross_entropy(s, y, label_smoothing=0.1)
      + 0.6 * losses.soft_target_kl(s, t, temperature=2.0)
    ),
    called(theirs),
    *logits(5, 6, 7),
    mixed(6, 6, 7),
    alone=True,
  )


@pytest.mark.parametrize("seed", [0, 1])
def test_kd_with_masked_classes_is_kd_without_them(seed):
  student, teacher = logits(seed, 5, 8)
  kept = np.array([0, 2, 3, 6])
  masked = np.setdiff1d(np.arange(8), kept)

  def ours(s, t):
    s, t = s.at[:, masked].set(-np.inf), t.at[:, masked].set(-np.inf)
    return losses.soft_target_kl(s, t, temperature=4.0)

  theirs = called(torchdistill.KDLoss(**PATHS, temperature=4.0, alpha=0))
  check(ours, lambda s, t: 16 * theirs(s[:, kept], t[:, kept]), student, teacher, alone=True)


@pytest.mark.parametrize(("batch", "classes"), SIZES)
@pytest.mark.parametrize("scale", [2.0, 1e4])
def test_standardized_kd(batch, classes, scale):
  theirs = torchdistill.LogitStdKDLoss(**PATHS, temperature=2.0, alpha=0.1, beta=9.0)

  def ours(s, t, y):
    soft, target = losses.standardize_logits(s), losses.standardize_logits(t)
    return 0.1 * losses.cross_entropy(s, y) + 9.0 * losses.soft_target_kl(
      soft, target, temperature=2.0
    )

  check(ours, called(theirs), *logits(7, batch, classes, scale), integers(8, batch, classes))


def of_soft(divergence):
  """A divergence of (p, q) as a function of logits, with temperature²."""

  def theirs(student, teacher, temperature):
    q, p = published.soften(student, temperature), published.soften(teacher, temperature)
    return temperature**2 * divergence(p, q).mean()

  return theirs


def kl(p, q):
  """PyTorch's, of two of its distributions."""
  divergence = torch.nn.functional.kl_div(q.logits, p.logits, log_target=True, reduction="none")
  return divergence.sum(-1)


def jsd(p, q, beta):
  m = published.mixture(p, q, beta)
  return beta * kl(p, m) + (1 - beta) * kl(q, m)


DIVERGENCES = {
  "soft_target_kl": (losses.soft_target_kl, kl),
  "reverse_kl": (losses.reverse_kl, lambda p, q: kl(q, p)),
  "generalized_jsd": (losses.generalized_jsd, lambda p, q: jsd(p, q, 0.5)),
  "generalized_jsd_0.1": (
    lambda s, t, temperature: losses.generalized_jsd(s, t, beta=0.1, temperature=temperature),
    lambda p, q: jsd(p, q, 0.1),
  ),
  "total_variation": (
    losses.total_variation,
    lambda p, q: torch.cdist(p.probs[:, None], q.probs[:, None], p=1)[:, 0, 0] / 2,
  ),
  "skew_kl": (losses.skew_kl, lambda p, q: kl(p, published.mixture(p, q, 0.1))),
  "skew_reverse_kl": (
    losses.skew_reverse_kl,
    lambda p, q: kl(q, published.mixture(q, p, 0.1)),
  ),
}


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("batch", "classes"), SIZES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_divergences_beside_pytorch(name, batch, classes, temperature):
  ours, divergence = DIVERGENCES[name]
  theirs = of_soft(divergence)
  check(
    lambda s, t: ours(s, t, temperature=temperature),
    lambda s, t: theirs(s, t, temperature),
    *logits(11, batch, classes),
    alone=True,
  )


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_of_logits_far_apart(name):
  ours, divergence = DIVERGENCES[name]
  theirs = of_soft(divergence)
  # So far that most probabilities are 0 in float64.
  check(
    lambda s, t: ours(s, t, temperature=1.0),
    lambda s, t: theirs(s, t, 1.0),
    *logits(12, 5, 6, 1e4),
  )


@pytest.mark.parametrize(("batch", "classes"), SIZES)
@pytest.mark.parametrize(
  ("temperature", "target_weight", "nontarget_weight"), [(4.0, 1.0, 8.0), (1.0, 0.5, 2.0)]
)
def test_decoupled_kd(batch, classes, temperature, target_weight, nontarget_weight):
  check(
    lambda s, t, y: losses.decoupled_kd(
      s,
      t,
      y,
      temperature=temperature,
      target_weight=target_weight,
      nontarget_weight=nontarget_weight,
    ),
    lambda s, t, y: published.decoupled(s, t, y, temperature, target_weight, nontarget_weight),
    *logits(13, batch, classes),
    integers(14, batch, classes),
    alone=True,
  )


@pytest.mark.parametrize(("batch", "classes"), SIZES)
def test_logit_l2(batch, classes):
  theirs = torch.nn.functional.mse_loss
  check(losses.logit_l2, theirs, *logits(15, batch, classes, 1e4), alone=True)


@pytest.mark.parametrize(("batch", "classes"), [(2, 3), *SIZES])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_correlations_of_classes(batch, classes, temperature):
  arrays = logits(16, batch, classes)
  check(
    lambda s, t: losses.inter_class_correlation(s, t, temperature=temperature),
    lambda s, t: published.pearson_loss(s, t, temperature, axis=1),
    *arrays,
    alone=True,
  )
  check(
    lambda s, t: losses.intra_class_correlation(s, t, temperature=temperature),
    lambda s, t: published.pearson_loss(s, t, temperature, axis=0),
    *arrays,
  )


def test_correlation_within_a_class_leaves_examples_out():
  kept = np.array([True, False, True, True, False, True])
  check(
    lambda s, t: losses.intra_class_correlation(s, t, where=kept),
    lambda s, t: published.pearson_loss(s[kept], t[kept], 4.0, axis=0),
    *logits(17, 6, 5),
  )


@pytest.mark.parametrize(("batch", "classes"), SIZES)
@pytest.mark.parametrize(("power", "temperature"), [(1.0, 1.0), (1.5, 1.0), (0.5, 2.0)])
def test_one_for_all(batch, classes, power, temperature):
  check(
    lambda s, t, y: losses.one_for_all(s, t, y, power=power, temperature=temperature),
    lambda s, t, y: published.one_for_all(s, t, y, power, temperature),
    *logits(18, batch, classes),
    integers(19, batch, classes),
    alone=True,
  )


def test_images_of_logits_are_examples_too():
  # [B, H, W, K], as segmentation has them, beside torchdistill's classes on axis 1.
  theirs = torchdistill.KDLoss(**PATHS, temperature=4.0, alpha=0, reduction="none")
  call = called(theirs)
  check(
    losses.soft_target_kl,
    lambda s, t: 16 * call(s.movedim(-1, 1), t.movedim(-1, 1)).sum(1).mean(),
    numbers(20, 2, 3, 2, 5),
    numbers(21, 2, 3, 2, 5),
    alone=True,
  )


def test_float64_is_computed_in_float64():
  with jax.enable_x64(True):
    assert losses.soft_target_kl(*map(jax.numpy.asarray, logits(22, 2, 3))).dtype == np.float64
