"""Losses on features: value and gradient beside torchdistill's and PyTorch's, in float64."""

import jax
import numpy as np
import pytest
import scipy.stats

import published
from beside import PAIR, PATHS, called, check, close, first, numbers, torch, torchdistill
from jaxdistill import losses

pytestmark = pytest.mark.parity

functional = torch.nn.functional
# (Height and width of the student, of the teacher): equal, even windows, uneven ones.
SAME = [((1, 1), (1, 1)), ((4, 4), (4, 4)), ((7, 5), (7, 5))]
SIZES = [*SAME, ((8, 8), (4, 4)), ((3, 5), (7, 8)), ((9, 2), (5, 6))]
B, C = 3, 4


def maps(seed, sizes, student_width=C, scale=1.0):
  return (
    numbers(seed, B, *sizes[0], student_width, scale=scale),
    numbers(seed + 50, B, *sizes[1], C, scale=scale),
  )


def pooled(theirs):
  """A published loss that takes maps of one size, on channels-last maps of two."""
  return lambda s, t: theirs(*published.smaller(first(s), first(t)))


@pytest.mark.parametrize("sizes", SIZES)
def test_hint_l2(sizes):
  check(losses.hint_l2, pooled(functional.mse_loss), *maps(1, sizes), alone=True)


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 6)])
def test_hints_of_vectors_and_tokens(shape):
  arrays = numbers(2, *shape), numbers(3, *shape)
  check(losses.hint_l2, functional.mse_loss, *arrays, alone=True)

  def cosine(s, t):
    s, t = s.flatten(0, -2), t.flatten(0, -2)
    return functional.cosine_embedding_loss(s, t, torch.ones(len(s)))

  check(losses.hint_cosine, cosine, *arrays, alone=True)


@pytest.mark.parametrize("sizes", SIZES)
def test_hint_cosine(sizes):
  def theirs(s, t):
    return 1 - functional.cosine_similarity(s, t, dim=1).mean()

  check(losses.hint_cosine, pooled(theirs), *maps(4, sizes), alone=True)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_attention_transfer(sizes, scale):
  theirs = pooled(called(torchdistill.ATLoss(PAIR, mode="code")))
  arrays = maps(5, sizes, student_width=6, scale=scale)
  check(losses.attention_transfer, theirs, *arrays, alone=True)


@pytest.mark.parametrize("sizes", SIZES)
def test_factor_transfer(sizes):
  arrays = maps(6, sizes, student_width=5)
  check(losses.factor_transfer, pooled(published.factor_transfer), *arrays, alone=True)


@pytest.mark.parametrize("sizes", SIZES)
def test_factor_transfer_is_torchdistills_of_energies(sizes):
  criterion = torchdistill.FTLoss(p=1, paraphraser_path="m", translator_path="m")

  def theirs(s, t):
    # Its normalisation knows no channels, so it is given the maps without them.
    return called(criterion)(s.square().mean(1), t.square().mean(1))

  check(losses.factor_transfer, pooled(theirs), *maps(7, sizes, 5), alone=True)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_neuron_selectivity(sizes, scale):
  arrays = maps(8, sizes, student_width=3, scale=scale)
  check(losses.neuron_selectivity, pooled(published.neuron_selectivity), *arrays, alone=True)


FLOWS = [
  ((4, 4), (4, 4), (4, 4), (4, 4)),
  ((8, 8), (4, 4), (4, 4), (4, 4)),
  ((7, 5), (3, 4), (2, 6), (5, 4)),
]


def flow_arrays(sizes):
  return [
    numbers(9 + i, B, *size, width)
    for i, (size, width) in enumerate(zip(sizes, (3, 5, 3, 5), strict=True))
  ]


@pytest.mark.parametrize("sizes", FLOWS)
def test_flow_of_solution(sizes):
  check(
    lambda a, b, c, d: losses.flow_of_solution((a, b), (c, d)),
    lambda *arrays: published.flow_of_solution(*(first(x) for x in arrays)),
    *flow_arrays(sizes),
    alone=True,
  )


@pytest.mark.parametrize("sizes", FLOWS)
def test_flow_of_solution_has_torchdistills_matrices(sizes):
  flow = torchdistill.FSPLoss.compute_fsp_matrix

  def theirs(*arrays):
    # Pooled in front, since it would take maxima.
    a, b, c, d = (first(x) for x in arrays)
    return functional.mse_loss(flow(*published.smaller(a, b)), flow(*published.smaller(c, d)))

  check(lambda a, b, c, d: losses.flow_of_solution((a, b), (c, d)), theirs, *flow_arrays(sizes))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("margin", [1.0, 0.3])
def test_activation_boundary(sizes, margin):
  theirs = called(torchdistill.AltActTransferLoss(PAIR, margin=margin, reduction="mean"))
  check(
    lambda s, t: losses.activation_boundary(s, t, margin=margin),
    pooled(theirs),
    *maps(10, sizes),
    constant=(1,),
    alone=True,
  )


@pytest.mark.parametrize("sizes", SIZES)
def test_overhaul(sizes):
  margin = -np.abs(numbers(11, C))
  check(
    lambda s, t: losses.overhaul(s, t, margin=margin),
    lambda s, t: published.overhaul(first(s), first(t), torch.tensor(margin)),
    *maps(12, sizes),
    alone=True,
  )


def test_overhaul_margin_is_scipys_truncated_normal():
  scale = np.array([1.0, -2.0, 0.5, 0.1, 3.0, 1.0, 1.0])
  bias = np.array([0.0, 1.0, -3.0, -0.2, 9.2, 3.08, 3.1])
  spread = np.abs(scale)
  expected = scipy.stats.truncnorm.mean(-np.inf, -bias / spread, loc=bias, scale=spread)
  # The published rule of thumb for units that are hardly ever off: the last one, here.
  rare = scipy.stats.norm.cdf(-bias / spread) <= 1e-3
  assert rare.tolist() == [False] * 6 + [True]
  expected[rare] = -3 * spread[rare]
  with jax.enable_x64(True):
    close(losses.overhaul_margin(scale, bias), expected)


@pytest.mark.parametrize("sizes", SIZES)
def test_hierarchical_context(sizes):
  criterion = called(torchdistill.HierarchicalContextLoss(**PATHS))
  # Its student's module gives a pair, of which it takes the first.
  theirs = pooled(lambda s, t: criterion((s, None), t))
  check(losses.hierarchical_context, theirs, *maps(13, sizes), alone=True)


def variational(mean, teacher, raw):
  """torchdistill's loss; its regressor, which is the variance's place, needs torchvision."""
  variance = (1 + raw.exp()).log() + 1e-5
  variance = variance.reshape(1, -1, *[1] * (mean.ndim - 2))
  return called(torchdistill.VIDLoss(PAIR))((mean, variance), teacher)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_variational_information(sizes, scale):
  def theirs(s, t, raw):
    return variational(*published.smaller(first(s), first(t)), raw)

  check(
    lambda s, t, raw: losses.variational_information(s, t, raw_variance=raw),
    theirs,
    *maps(14, sizes, scale=scale),
    numbers(15, C, scale=3.0),
    alone=True,
    shared=(2,),
  )


def test_variational_information_of_vectors_and_tokens():
  def ours(s, t, raw):
    return losses.variational_information(s, t, raw_variance=raw)

  raw = numbers(16, 6)
  check(ours, variational, numbers(17, 4, 6), numbers(18, 4, 6), raw, alone=True, shared=(2,))
  check(
    ours,
    lambda s, t, raw: variational(first(s), first(t), raw),
    numbers(19, 2, 3, 6),
    numbers(20, 2, 3, 6),
    raw,
    alone=True,
    shared=(2,),
  )


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_inter_channel_correlation(sizes, scale):
  # torchdistill's ChSimLoss divides by the batch size once more: test_disagreements.
  theirs = pooled(called(torchdistill.ChSimLoss(PAIR)))
  check(
    losses.inter_channel_correlation,
    lambda s, t: len(s) * theirs(s, t),
    *maps(21, sizes, scale=scale),
    alone=True,
  )


@pytest.mark.parametrize("num_heads", [1, 2, 4])
@pytest.mark.parametrize("holes", [False, True])
def test_attention_relation(num_heads, holes):
  valid = np.ones((3, 5), bool)
  if holes:
    valid[0, 3:] = valid[2, 1:4] = False
  check(
    lambda s, t, v: losses.attention_relation(s, t, num_heads=num_heads, where=v),
    lambda s, t, v: published.attention_relation(s, t, num_heads, v),
    numbers(22, 3, 5, 8),
    numbers(23, 3, 5, 12),
    valid,
    alone=True,
  )


@pytest.mark.parametrize("sizes", SIZES[1:])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_channel_wise(sizes, temperature):
  def theirs(s, t):
    s, t = ((x / temperature).flatten(2).log_softmax(2) for x in (s, t))
    total = functional.kl_div(s, t, reduction="sum", log_target=True)
    return temperature**2 * total / (s.shape[0] * s.shape[1])

  def ours(s, t):
    return losses.channel_wise(s, t, temperature=temperature)

  check(ours, pooled(theirs), *maps(31, sizes, scale=3.0), alone=True)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("normalize", [False, True])
def test_class_attention(sizes, normalize):
  def theirs(s, t):
    s, t = (functional.adaptive_avg_pool2d(first(x), (2, 2)) for x in (s, t))
    if normalize:
      s, t = (functional.normalize(x.flatten(2), dim=2) for x in (s, t))
    return functional.mse_loss(s, t)

  def ours(s, t):
    return losses.class_attention(s, t, normalize=normalize)

  check(ours, theirs, *maps(32, sizes), alone=True)


@pytest.mark.parametrize("sizes", SIZES[1:])
@pytest.mark.parametrize("window", [1, 2])
def test_pairwise_structure(sizes, window):
  def theirs(s, t):
    pool = torch.nn.MaxPool2d(window, window, ceil_mode=True)
    s, t = (functional.normalize(pool(x).flatten(2), dim=1) for x in (s, t))
    return functional.mse_loss(s.mT @ s, t.mT @ t)

  if max(map(min, zip(*sizes, strict=True))) <= window:
    pytest.skip("one position")

  def ours(s, t):
    return losses.pairwise_structure(s, t, window=window)

  check(ours, pooled(theirs), *maps(33, sizes, student_width=6), alone=True)


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 6)])
def test_hint_normalized(shape):
  def theirs(s, t):
    return functional.smooth_l1_loss(s, functional.layer_norm(t, shape[-1:]))

  check(losses.hint_normalized, theirs, numbers(34, *shape), numbers(35, *shape), alone=True)


@pytest.mark.parametrize("sizes", SAME)
@pytest.mark.parametrize("segments", [1, 3])
def test_many_to_one(sizes, segments):
  def theirs(s, t):
    tiled = first(t).repeat(1, segments, 1, 1)
    return functional.mse_loss(first(s), tiled) * segments

  arrays = maps(36, sizes, student_width=segments * C)
  check(losses.many_to_one, theirs, *arrays, alone=True)
