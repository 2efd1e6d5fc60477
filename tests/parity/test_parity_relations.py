"""Losses on relations: value and gradient beside torchdistill's and PyTorch's, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import published
from beside import OUTPUTS, PATHS, called, check, close, numbers, torch, torchdistill
from jaxdistill import losses

pytestmark = pytest.mark.parity

# Batch and the two widths, which need not be the same; a map is flattened.
SHAPES = [((5, 4), (5, 4)), ((8, 3), (8, 6)), ((3, 2, 3, 4), (3, 5)), ((2, 6), (2, 3))]
SCALES = [1e-3, 1.0, 1e4]


def features(seed, shapes, scale=1.0):
  return numbers(seed, *shapes[0], scale=scale), numbers(seed + 50, *shapes[1], scale=scale)


def flat(theirs):
  return lambda s, t: theirs(s.flatten(1), t.flatten(1))


def rkd(distance, angle):
  options = {**OUTPUTS, "reduction": "mean"}
  return called(torchdistill.RKDLoss(dist_factor=distance, angle_factor=angle, **options))


# Ours, the published, and which inputs the published code stops gradients to.
CASES = {
  "similarity_preserving": (losses.similarity_preserving, published.similarity_preserving, ()),
  "relational_distance": (losses.relational_distance, rkd(1, 0), (1,)),
  "relational_angle": (losses.relational_angle, rkd(0, 1), (1,)),
  "probabilistic_transfer": (
    losses.probabilistic_transfer,
    flat(called(torchdistill.PKTLoss(**PATHS))),
    (),
  ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("scale", SCALES)
def test_relations(name, shapes, scale):
  ours, theirs, frozen = CASES[name]
  check(ours, theirs, *features(1, shapes, scale), frozen=frozen)


@pytest.mark.parametrize("name", ["relational_distance", "relational_angle"])
def test_rkd_has_the_gradient_to_its_teacher_that_it_has_to_its_student(name):
  # The published code stops the one; both losses are even in student and teacher.
  ours, theirs, frozen = CASES[name]
  student, teacher = features(2, SHAPES[1])
  check(lambda s, t: ours(t, s), theirs, student, teacher, frozen=frozen)


@pytest.mark.parametrize("name", CASES)
def test_relations_among_some_of_the_batch(name):
  ours, theirs, frozen = CASES[name]
  kept = np.array([True, False, True, True, False, True, True, True])
  check(
    lambda s, t: jnp.sum(ours(s, t, where=kept)) / kept.sum(),
    lambda s, t: theirs(s[kept], t[kept]),
    *features(3, SHAPES[1]),
    frozen=frozen,
  )


def test_equal_rows_are_a_pair_of_relational_distance():
  # The floor of 1e-6 under distances counts in the mean distance, in both.
  student, teacher = features(4, SHAPES[1])
  student[3] = student[1]
  teacher[5] = teacher[0]
  check(losses.relational_distance, rkd(1, 0), student, teacher, frozen=(1,))


@pytest.mark.parametrize("shapes", [((5, 4), (5, 4)), ((2, 6), (2, 6)), ((9, 1), (9, 1))])
@pytest.mark.parametrize("scale", SCALES)
def test_correlation_congruence(shapes, scale):
  arrays = features(5, shapes, scale)
  check(losses.correlation_congruence, published.correlation_congruence, *arrays)


@pytest.mark.parametrize("shapes", [((5, 4), (5, 4)), ((2, 6), (2, 6)), ((3, 2, 2), (3, 2, 2))])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_contrastive(shapes, temperature):
  ours, theirs = losses.contrastive, published.contrastive
  check(
    lambda s, t: ours(s, t, temperature=temperature),
    lambda s, t: theirs(s, t, temperature),
    *features(6, shapes),
  )


ROWS, WIDTH, CLASSES = 12, 8, 3
INDEX = np.array([7, 0, 4, 11, 5])
LABELS = np.arange(ROWS) % CLASSES


def unit(seed, *shape):
  x = numbers(seed, *shape)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def float64_banks():
  """Banks as they are before the first batch, in float64."""
  return losses.Banks(
    student=unit(7, ROWS, WIDTH),
    teacher=unit(8, ROWS, WIDTH),
    labels=LABELS.astype(np.int32),
    log_normalizers=np.zeros(2),
    normalized=np.zeros((), bool),
  )


def drawn_rows(key, labels, negatives):
  """Which rows are the negatives, seen from outside: those that the values depend on."""
  ones = np.ones((len(INDEX), WIDTH), np.float32)
  banks = jax.tree.map(jnp.asarray, float64_banks()._replace(normalized=True))

  def values(row):
    teacher = banks.teacher.at[row].set(0.0, mode="drop")
    known = banks._replace(teacher=teacher)
    return losses.contrastive_bank(
      ones, ones, labels, INDEX, known, key=key, negatives=negatives, temperature=1.0
    )[0]

  # The last row is beyond the end: nothing has changed.
  scored = np.asarray(jax.jit(jax.vmap(values))(jnp.arange(ROWS + 1)))
  changed = (scored[:-1] != scored[-1]).T
  changed[np.arange(len(INDEX)), INDEX] = False
  return np.stack([np.flatnonzero(row) for row in changed])


def published_bank(banks, negatives, temperature, momentum):
  criterion = torchdistill.CRDLoss(
    "norm", "extra", "norm", WIDTH, ROWS, negatives, num_samples=ROWS, momentum=momentum
  ).double()
  # It keeps its numbers in float32 until here.
  criterion.params[:] = torch.tensor([negatives, temperature, -1, -1, momentum])
  criterion.params[1], criterion.params[4] = temperature, momentum
  criterion.memory_v1.copy_(torch.tensor(banks.student))
  criterion.memory_v2.copy_(torch.tensor(banks.teacher))
  return criterion


def contrasted(criterion, drawn):
  """Its loss of features that are not yet unit vectors, with the negatives that we drew."""
  index = torch.tensor(INDEX)
  rows = torch.cat([index[:, None], torch.tensor(drawn)], 1)

  def theirs(student, teacher):
    student, teacher = (torch.nn.functional.normalize(x) for x in (student, teacher))
    extra = {"pos_idx": index, "contrast_idx": rows}
    return criterion(
      {"norm": {"output": student}, "extra": {"input": extra}}, {"norm": {"output": teacher}}
    )

  return theirs


@pytest.mark.parametrize(("negatives", "temperature", "momentum"), [(8, 0.07, 0.5), (5, 0.5, 0.9)])
def test_contrastive_bank(negatives, temperature, momentum):
  banks = float64_banks()
  criterion = published_bank(banks, negatives, temperature, momentum)
  labels = LABELS[INDEX]
  # The second batch has the normalisers and the rows that the first left.
  for step in range(2):
    key = jax.random.key(step)
    drawn = drawn_rows(key, labels, negatives)
    assert drawn.shape == (len(INDEX), negatives)
    assert (LABELS[drawn] != labels[:, None]).all()

    def ours(s, t, banks=banks, key=key):
      return losses.contrastive_bank(
        s,
        t,
        labels,
        INDEX,
        banks,
        key=key,
        negatives=negatives,
        temperature=temperature,
        momentum=momentum,
      )

    arrays = features(9 + step, ((len(INDEX), WIDTH), (len(INDEX), WIDTH)))
    with jax.enable_x64(True):
      after = jax.tree.map(np.asarray, jax.jit(ours)(*map(jnp.asarray, arrays))[1])
    check(lambda s, t, ours=ours: ours(s, t)[0], contrasted(criterion, drawn), *arrays)
    banks = after
    close(banks.student, criterion.memory_v1.detach().numpy(), "student's bank")
    close(banks.teacher, criterion.memory_v2.detach().numpy(), "teacher's bank")
    close(np.exp(banks.log_normalizers), criterion.params[2:4].detach().numpy(), "normalisers")
