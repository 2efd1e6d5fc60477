"""Where a published code computes something else than we do: every one is known and stays known.

Each test holds that the numbers differ, that theirs is what we say it is, and that ours is the
formula that our docstring names. What agrees is in the other files.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import published
from beside import (
  OUTPUTS,
  PAIR,
  PATHS,
  called,
  check,
  close,
  evaluate_ours,
  evaluate_theirs,
  first,
  numbers,
  torch,
  torchdistill,
)
from jaxdistill import losses

pytestmark = pytest.mark.parity

functional = torch.nn.functional
LABELS = np.array([2, 0, 1, 2])


def pair(seed, *shape):
  return numbers(seed, *shape), numbers(seed + 50, *shape)


def number(theirs, *arrays):
  return evaluate_theirs(theirs, *arrays)[0]


def differ(ours, theirs, *arrays, least=1e-3):
  """Their number, after a look that it is not ours."""
  value = number(theirs, *arrays)
  mine = evaluate_ours(ours, *arrays)[0].mean()
  assert abs(mine - value) > least * abs(mine), (mine, value)
  return value


def test_torchdistills_kd_without_labels_has_no_squared_temperature():
  arrays = pair(1, 4, 3)
  bare = called(torchdistill.KDLoss(**PATHS, temperature=4.0, alpha=0, beta=0.9))
  check(losses.soft_target_kl, lambda s, t: 16 * bare(s, t), *arrays)
  differ(losses.soft_target_kl, bare, *arrays)
  # Nor any weight: alpha = 0 means labels are ignored, beta too.
  close(number(lambda s, t: bare(s, t, torch.tensor(LABELS)), *arrays), number(bare, *arrays))
  with pytest.raises(TypeError):
    torchdistill.KDLoss(**PATHS, temperature=4.0)


@pytest.mark.parametrize("classes", [2, 3])
def test_gradients_to_a_teacher_that_is_certain(classes):
  # PyTorch differentiates p log p at p = 0; a teacher that learns with us gets a number.
  student, teacher = pair(2, 4, classes)
  bare = called(torchdistill.KDLoss(**PATHS, temperature=1.0, alpha=0))
  _, (_, theirs) = evaluate_theirs(bare, student, teacher * 1e4)
  assert not np.isfinite(theirs).all()
  ours = evaluate_ours(losses.soft_target_kl, student, teacher * 1e4)[1]
  assert all(np.isfinite(gradient).all() for gradient in ours)


@pytest.mark.parametrize("classes", [2, 3, 100])
def test_torchdistills_dist_has_its_guard_elsewhere(classes):
  # It clamps the product of norms where the published code adds 1e-8 to it, as we do.
  student, teacher = pair(3, 4, classes)
  criterion = torchdistill.DISTLoss(**PATHS, beta=1.0, gamma=0.0, tau=4.0)
  differ(losses.inter_class_correlation, called(criterion), student, teacher, least=1e-11)
  within = torchdistill.DISTLoss(**PATHS, beta=0.0, gamma=1.0, tau=4.0)
  differ(losses.intra_class_correlation, called(within), student, teacher, least=1e-11)
  q, p = (torch.tensor(x).div(4).softmax(1) for x in (student, teacher))
  for loss, rows in (
    (losses.inter_class_correlation, (q, p)),
    (losses.intra_class_correlation, (q.T, p.T)),
  ):
    a, b = (x - x.mean(1, keepdim=True) for x in rows)
    norms = a.norm(dim=1) * b.norm(dim=1)
    correlation = criterion.pearson_correlation(*rows, criterion.eps)
    # The one guard in the place of the other.
    expected = 16 * (1 - correlation * norms / (norms + 1e-8))
    close(evaluate_ours(loss, student, teacher)[0], expected.numpy())


def test_torchdistills_sp_divides_rows_by_their_l1_norm():
  student, teacher = pair(4, 5, 6)
  criterion = torchdistill.SPKDLoss(**OUTPUTS)

  def theirs(s, t):
    s, t = (functional.normalize(x @ x.T, p=1, dim=1) for x in (s, t))
    return functional.mse_loss(s, t)

  value = differ(losses.similarity_preserving, called(criterion), student, teacher)
  close(value, number(theirs, student, teacher))
  check(losses.similarity_preserving, published.similarity_preserving, student, teacher)


@pytest.mark.parametrize(
  "kernel", [{"type": "bilinear"}, {"type": "gaussian", "gamma": 0.4, "max_p": 2}]
)
def test_torchdistills_cc_is_another_function(kernel):
  arrays = pair(5, 5, 4)
  criterion = torchdistill.CCKDLoss("m", "m", kernel, reduction="batchmean")

  def theirs(s, t):
    matrices = [x @ x.T for x in (s, t)]
    if kernel["type"] == "gaussian":
      # exp(2γ(x·y − 1)) to the second power of its Taylor series.
      matrices = [np.exp(-0.8) * (1 + 0.8 * x + 0.32 * x**2) for x in matrices]
    return torch.linalg.matrix_norm(matrices[0] - matrices[1]) / len(s) ** 2

  value = differ(losses.correlation_congruence, called(criterion), *arrays)
  close(value, number(theirs, *arrays))
  check(losses.correlation_congruence, published.correlation_congruence, *arrays)


@pytest.mark.parametrize("sizes", [((4, 4), (4, 4)), ((8, 6), (4, 3))])
def test_torchdistills_fsp_takes_maxima_and_norms_of_columns(sizes):
  (large, small), batch = sizes, 3
  arrays = [
    numbers(i, batch, *size, width)
    for i, (size, width) in enumerate(((large, 3), (small, 5), (large, 3), (small, 5)))
  ]
  ends = ("student_first", "student_second", "teacher_first", "teacher_second")
  criterion = torchdistill.FSPLoss({"p": {end: {"path": end, "io": "output"} for end in ends}})

  def called_with(*tensors):
    outputs = {end: {"output": first(x)} for end, x in zip(ends, tensors, strict=True)}
    return criterion(outputs, outputs)

  def theirs(*tensors):
    a, b, c, d = (first(x) for x in tensors)
    a, c = (functional.adaptive_max_pool2d(x, small) for x in (a, c))
    difference = published.flow(a, b) - published.flow(c, d)
    return torch.linalg.vector_norm(difference, dim=1).sum() / batch

  def ours(a, b, c, d):
    return losses.flow_of_solution((a, b), (c, d))

  close(differ(ours, called_with, *arrays), number(theirs, *arrays))
  check(ours, lambda *x: published.flow_of_solution(*map(first, x)), *arrays)


def test_torchdistills_ft_normalizes_without_a_mean_over_channels():
  arrays = pair(7, 3, 4, 4, 5)
  criterion = called(torchdistill.FTLoss(p=1, paraphraser_path="m", translator_path="m"))

  def theirs(s, t):
    s, t = (
      x / torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in (s.flatten(1), t.flatten(1))
    )
    return functional.l1_loss(s, t)

  close(differ(losses.factor_transfer, criterion, *arrays), number(theirs, *arrays))
  check(
    losses.factor_transfer,
    lambda s, t: published.factor_transfer(first(s), first(t)),
    *arrays,
  )


def test_the_papers_attention_transfer_is_not_its_codes():
  arrays = pair(8, 3, 4, 4, 5)
  paper = called(torchdistill.ATLoss(PAIR, mode="paper"))
  code = called(torchdistill.ATLoss(PAIR, mode="code"))

  def theirs(s, t):
    s, t = (functional.normalize(x.square().sum(-1).flatten(1)) for x in (s, t))
    return functional.pairwise_distance(s, t, eps=0).mean()

  value = differ(losses.attention_transfer, lambda s, t: paper(first(s), first(t)), *arrays)
  close(value, number(theirs, *arrays))
  check(losses.attention_transfer, lambda s, t: code(first(s), first(t)), *arrays)


def test_torchdistills_ickd_divides_by_the_batch_size_twice():
  arrays = pair(9, 4, 3, 3, 5)
  criterion = called(torchdistill.ChSimLoss(PAIR))

  def theirs(s, t):
    return criterion(first(s), first(t))

  differ(losses.inter_channel_correlation, theirs, *arrays)
  check(losses.inter_channel_correlation, lambda s, t: len(s) * theirs(s, t), *arrays)


def test_dead_channels_have_no_gradient_with_us():
  # The formula's own is 1e12 times the slope, which would end a run; the value is the same.
  student, teacher = pair(10, 2, 3, 3, 4)
  student[:, :, :, 1] = 0.0
  criterion = called(torchdistill.ChSimLoss(PAIR))

  def theirs(s, t):
    return len(s) * criterion(first(s), first(t))

  value, (gradient, _) = evaluate_theirs(theirs, student, teacher)
  values, (ours, _) = evaluate_ours(losses.inter_channel_correlation, student, teacher)
  close(values.mean(), value)
  assert np.abs(gradient[..., 1]).max() > 1e9
  assert np.abs(ours[..., 1]).max() < 1e3
  alive = [0, 2, 3]
  close(ours[..., alive], gradient[..., alive], "gradient to the others")


def test_equal_rows_have_no_angle_with_us():
  student, teacher = pair(11, 5, 4)
  student[3] = student[1]
  theirs = called(torchdistill.RKDLoss("m", "m", 0, 1, reduction="mean"))
  value, (gradient, _) = evaluate_theirs(theirs, student, teacher)
  values, (ours, _) = evaluate_ours(losses.relational_angle, student, teacher)
  close(values.mean(), value)
  assert np.abs(gradient[[1, 3]]).max() > 1e9
  assert np.abs(ours).max() < 1e3
  apart = [0, 2, 4]
  close(ours[apart], gradient[apart], "gradient to the others")


def test_a_row_of_zeros_has_no_gradient_in_torchdistills_pkt():
  student, teacher = pair(12, 4, 5)
  student[2] = 0.0
  value, (gradient, _) = evaluate_theirs(called(torchdistill.PKTLoss(**PATHS)), student, teacher)
  values, gradients = evaluate_ours(losses.probabilistic_transfer, student, teacher)
  close(values.mean(), value)
  assert np.isnan(gradient[2]).all()
  assert np.isfinite(gradients[0]).all()
  others = [0, 1, 3]
  close(gradients[0][others], gradient[others], "gradient to the others")


def test_a_teacher_without_channels_leaves_torchdistills_ft():
  # 0 / 0: it has no floor under its norms.
  student, teacher = pair(13, 2, 3, 3, 4)
  teacher[0] = 0.0
  criterion = called(torchdistill.FTLoss(p=1, paraphraser_path="m", translator_path="m"))
  assert np.isnan(number(criterion, student, teacher))
  check(
    losses.factor_transfer,
    lambda s, t: published.factor_transfer(first(s), first(t.detach())),
    student,
    teacher,
    frozen=(1,),
  )


def test_torchdistills_crd_cannot_draw_negatives():
  criterion = torchdistill.CRDLoss("m", "extra", "m", 4, 6, 2, num_samples=6)
  outputs = {"m": {"output": torch.ones(2, 4)}, "extra": {"input": {"pos_idx": torch.arange(2)}}}
  with pytest.raises(AttributeError, match="prob"):
    criterion(outputs, outputs)


def test_published_banks_start_with_rows_that_are_no_unit_vectors():
  criterion = torchdistill.CRDLoss("m", "extra", "m", 4, 50, 2, num_samples=50)
  for bank in (criterion.memory_v1, criterion.memory_v2):
    lengths = np.linalg.norm(bank.numpy(), axis=1)
    assert lengths.std() > 0.1
    assert 0.8 < np.sqrt(np.mean(lengths**2)) < 1.2
  banks = losses.init_banks(jax.random.key(0), jnp.arange(50), 4)
  for bank in (banks.student, banks.teacher):
    np.testing.assert_allclose(np.linalg.norm(bank, axis=1), 1, rtol=1e-6)  # float32


def test_the_published_dkd_ends_at_confident_logits():
  # It takes logarithms of sums of a softmax, which are 0 when all the rest is.
  student, teacher = numbers(14, 4, 3), numbers(15, 4, 3)
  student[np.arange(4), LABELS] += 1e4

  def target_part(s, t, y):
    own = functional.one_hot(y, 3).bool()
    q, p = (x.div(4).softmax(1) for x in (s, t))
    q, p = (torch.stack([(x * own).sum(1), (x * ~own).sum(1)], 1) for x in (q, p))
    return functional.kl_div(q.log(), p, reduction="batchmean") * 16

  def ours(s, t, y):
    return losses.decoupled_kd(s, t, y, nontarget_weight=0.0)

  calm = numbers(14, 4, 3)
  check(ours, target_part, calm, teacher, LABELS)
  assert not np.isfinite(number(target_part, student, teacher, LABELS))
  values, gradients = evaluate_ours(ours, student, teacher, LABELS)
  assert np.isfinite(values).all()
  assert all(np.isfinite(gradient).all() for gradient in gradients)
  # What it tends to: the rest's probability times how far away the student has it.
  rest = 1 - torch.tensor(teacher).div(4).softmax(1).numpy()[np.arange(4), LABELS]
  np.testing.assert_allclose(values, 16 * rest * 1e4 / 4, rtol=1e-2)


def test_the_published_one_for_all_ends_at_confident_logits():
  student, teacher = 1e4 * numbers(16, 4, 3), numbers(17, 4, 3)

  def theirs(s, t, y):
    y = functional.one_hot(y, 3)
    return -(((t.softmax(1) + y) - y) * s.softmax(1).log()).sum(1).mean()

  check(losses.one_for_all, theirs, student / 1e4, teacher, LABELS)
  assert not np.isfinite(number(theirs, student, teacher, LABELS))
  check(
    losses.one_for_all,
    lambda s, t, y: published.one_for_all(s, t, y, 1.0, 1.0),
    student,
    teacher,
    LABELS,
  )


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_other_libraries_redefine_the_ends_of_jsd(beta):
  # TRL's and Liger's: the forward divergence at 0, the reverse at 1; the formula is 0 at both.
  student, teacher = pair(18, 4, 5)

  def redefined(s, t):
    q, p = s.log_softmax(1), t.log_softmax(1)
    of, over = (p, q) if beta == 0 else (q, p)
    return functional.kl_div(over, of, log_target=True, reduction="batchmean")

  def ours(s, t):
    return losses.generalized_jsd(s, t, beta=beta)

  np.testing.assert_allclose(evaluate_ours(ours, student, teacher)[0], 0, atol=1e-15)
  assert number(redefined, student, teacher) > 0.1
  named = losses.soft_target_kl if beta == 0 else losses.reverse_kl
  check(lambda s, t: named(s, t, temperature=1.0), redefined, student, teacher)


def test_pytorchs_softplus_is_straight_beyond_20():
  # VID's published code writes log(1 + exp(x)), and so do we, without its overflow.
  raw = np.array([21.0, 25.0, 710.0])
  mean, teacher = pair(19, 4, 3)

  def ours(s, t, r):
    return losses.variational_information(s, t, raw_variance=r)

  def straight(s, t, r):
    variance = functional.softplus(r) + 1e-5
    return (((s - t).square() / variance + variance.log()) / 2).mean()

  def exact(s, t, r):
    variance = torch.logaddexp(r, torch.zeros_like(r)) + 1e-5
    return (((s - t).square() / variance + variance.log()) / 2).mean()

  check(ours, exact, mean, teacher, raw)
  near = mean[:, :1], teacher[:, :1], raw[:1]
  differ(ours, straight, *near, least=1e-12)
  with np.errstate(over="ignore"):
    assert np.isinf(np.log(1 + np.exp(raw[2:]))).all()


def test_torchdistills_standardized_kd_has_a_gradient_of_1e7_at_equal_logits():
  """Ours has none from that row there: its ratio is of nothing to nothing. The values agree."""
  random = np.random.default_rng(9)
  student, teacher = random.normal(size=(3, 4)), random.normal(size=(3, 4))
  student[1] = 0.0
  labels = np.array([2, 0, 3])
  published_loss = torchdistill.LogitStdKDLoss(**PATHS, temperature=2.0, alpha=1, beta=1.0)

  def ours(s, t, y):
    soft = losses.soft_target_kl(
      losses.standardize_logits(s), losses.standardize_logits(t), temperature=2.0
    )
    return losses.cross_entropy(s, y) + soft

  theirs = evaluate_theirs(called(published_loss), student, teacher, labels)
  mine = evaluate_ours(ours, student, teacher, labels)
  close(mine[0].mean(), theirs[0])
  assert np.abs(theirs[1][0][1]).max() > 1e4
  hard = evaluate_ours(lambda s, t, y: losses.cross_entropy(s, y), student, teacher, labels)
  close(mine[1][0][1], hard[1][0][1])


def test_the_published_uskd_ranks_by_logarithms():
  """A name is reused there: log q stands where the paper has q, which is another order."""
  rng = np.random.default_rng(0)
  student, weak = 3 * rng.normal(size=(8, 6)), 3 * rng.normal(size=(8, 6))
  labels = rng.integers(0, 6, 8)
  by_log = differ(
    losses.self_nontarget,
    lambda s, w, y: published.self_nontarget(s, w, y, by_log=True),
    student,
    weak,
    labels,
  )
  assert np.isfinite(by_log)


def test_the_published_focal_loss_mixes_probabilities():
  # One power of a mixture of both cases' probabilities, where ours mixes two losses.
  logits, labels = numbers(60, 4, 5), np.full((4, 5), 0.3)

  def ours(z):
    return losses.binary_focal(z, labels)

  def theirs(z):
    return published.focal(z, torch.tensor(labels), 2.0, 0.25)

  differ(ours, theirs, logits)
  # At 0 and at 1 there is nothing to mix.
  for y in (np.zeros((4, 5)), np.ones((4, 5))):
    check(
      lambda z, y=y: losses.binary_focal(z, y),
      lambda z, y=y: published.focal(z, torch.tensor(y), 2.0, 0.25),
      logits,
    )
