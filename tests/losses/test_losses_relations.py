"""Losses on relations against float64 NumPy written from their formulas, and the loss contract."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses
from jaxdistill.losses import relations
from loss_contract import TOLERANCE, assert_finite, check_derivative, jit, n, with_gradients

B, D, E = 6, 4, 5


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


def f32(x):
  return np.asarray(x).astype(np.float32)


# --- The formulas of the paper page, in float64 NumPy. ---


def huber(x):
  return np.where(np.abs(x) < 1, 0.5 * x**2, np.abs(x) - 0.5)


def ref_sp(s, t):
  return ((n(s @ s.T) - n(t @ t.T)) ** 2).mean(1)


def ref_distance(s, t):
  def d(x):
    out = np.sqrt(np.maximum(((x[:, None] - x[None]) ** 2).sum(-1), 1e-12))
    np.fill_diagonal(out, 0)
    return out / out[out > 0].mean()

  return huber(d(s) - d(t)).mean(1)


def ref_angle(s, t):
  def cosines(x):
    e = n(x[None] - x[:, None])
    return np.einsum("ijd,ikd->ijk", e, e)

  return huber(cosines(s) - cosines(t)).mean((1, 2))


def ref_pkt(s, t):
  def p(x):
    x = x / (np.sqrt((x**2).sum(1, keepdims=True)) + 1e-7)
    near = (x @ x.T + 1) / 2
    return near / near.sum(1, keepdims=True)

  a, b = p(t), p(s)
  return (a * np.log((a + 1e-7) / (b + 1e-7))).mean(1)


def ref_cc(s, t):
  size = np.abs(s - t)
  return np.array([(size[i] * size[i + 1]).sum() for i in range(len(s) - 1)])


def ref_contrastive(s, t, temperature):
  scores = np.exp(n(s) @ n(t).T / temperature)
  own = np.diag(scores)
  return -0.5 * (np.log(own / scores.sum(1)) + np.log(own / scores.sum(0)))


# name: (reference, other hyper-parameters, whether the widths may differ).
FORMULAS = {
  "similarity_preserving": (ref_sp, {}, True),
  "relational_distance": (ref_distance, {}, True),
  "relational_angle": (ref_angle, {}, True),
  "probabilistic_transfer": (ref_pkt, {}, True),
  "correlation_congruence": (ref_cc, {}, False),
  "contrastive": (ref_contrastive, {"temperature": 0.5}, False),
}
NAMES = pytest.mark.parametrize("name", FORMULAS)
PAIRWISE = [name for name in FORMULAS if name != "correlation_congruence"]
SCALE_FREE = [name for name in FORMULAS if name != "correlation_congruence"]


def vectors(name, seed, size=B):
  return normal(seed, size, D), normal(seed + 1, size, E if FORMULAS[name][2] else D)


@functools.cache
def compiled(name):
  """Values, and their gradients by student, teacher and hyper-parameters."""
  loss = getattr(losses, name)
  return with_gradients(lambda s, t, hyper, where: loss(s, t, where=where, **hyper))


def run(name, student, teacher, where=None, **hyper):
  """`compiled`, always with a mask, so that a shape is compiled once."""
  where = np.ones(len(student), bool) if where is None else np.asarray(where, bool)
  hyper = {k: f32(v) for k, v in {**FORMULAS[name][1], **hyper}.items()}
  return compiled(name)(f32(student), f32(teacher), hyper, where)


# --- Values. ---


def test_every_public_loss_is_here():
  assert sorted([*FORMULAS, "Banks", "contrastive_bank", "init_banks"]) == sorted(relations.__all__)
  assert set(relations.__all__) <= set(losses.__all__)


@pytest.mark.device
@NAMES
def test_value_is_the_formula(name):
  reference, hyper, _ = FORMULAS[name]
  student, teacher = vectors(name, 0)
  got, gradients = run(name, student, teacher)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, reference(student, teacher, **hyper), **TOLERANCE)
  for gradient in gradients[:2]:
    assert (np.abs(gradient).max(-1) > 1e-6).all()


def test_maps_are_vectors_whatever_their_axes():
  name = "similarity_preserving"
  student, teacher = vectors(name, 0)
  got = jit(getattr(losses, name))(*(f32(x).reshape(B, 1, -1, 1) for x in (student, teacher)))
  np.testing.assert_allclose(got, ref_sp(student, teacher), **TOLERANCE)


@pytest.mark.parametrize("name", ["relational_distance", "relational_angle"])
def test_streaming_several_examples_at_once_is_the_formula(name):
  student, teacher = vectors(name, 2, 64)
  got = jit(getattr(losses, name))(f32(student), f32(teacher))
  np.testing.assert_allclose(got, FORMULAS[name][0](student, teacher), rtol=1e-4, atol=1e-6)


@NAMES
def test_float64_stays_and_gradient_is_the_derivative_of_the_formula(name):
  reference, hyper, _ = FORMULAS[name]
  check_derivative(
    lambda s, t, h: getattr(losses, name)(s, t, **h),
    lambda s, t, h: reference(s, t, **h),
    *vectors(name, 4, 4),
    {k: np.asarray(v) for k, v in hyper.items()},
  )


def test_contrastive_default_temperature():
  student, teacher = vectors("contrastive", 6)
  values, _ = run("contrastive", student, teacher, temperature=0.07)
  np.testing.assert_allclose(values, ref_contrastive(student, teacher, 0.07), rtol=1e-4)
  default = jit(losses.contrastive)(f32(student), f32(teacher))
  np.testing.assert_allclose(default, values, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in FORMULAS if name != "contrastive"])
def test_agreement_is_a_minimum_at_zero(name):
  """Where only relations count, so is a student that is turned and scaled (and moved, for RKD)."""
  student = normal(8, B, D)
  values, gradients = run(name, student, student)
  np.testing.assert_allclose(values, 0, atol=1e-6)
  if name != "correlation_congruence":
    wide = np.linalg.qr(normal(9, E, D))[0].T
    moved = 3 * student @ wide + (7.0 if name.startswith("relational") else 0.0)
    values, gradients = run(name, student, moved)
    np.testing.assert_allclose(values, 0, atol=1e-6)
  np.testing.assert_allclose(gradients[0], 0, atol=1e-6)


def test_contrast_falls_as_each_finds_its_own():
  teacher = normal(10, B, D)
  near, _ = run("contrastive", teacher, teacher)
  far, _ = run("contrastive", np.roll(teacher, 1, axis=0), teacher)
  assert (near < far).all()


# --- The contract: masks, order, transformations, dtypes, extremes. ---


@pytest.mark.parametrize("name", PAIRWISE)
def test_a_mask_is_as_if_the_example_were_not_there(name):
  student, teacher = vectors(name, 12)
  kept = np.array([1, 0, 1, 1, 0, 1], bool)
  junk = np.where(kept[:, None], student, np.nan), np.where(kept[:, None], teacher, np.inf)
  values, gradients = run(name, *junk, where=kept)
  reference, hyper, _ = FORMULAS[name]
  expected = reference(student[kept], teacher[kept], **hyper)
  np.testing.assert_allclose(values[kept], expected, **TOLERANCE)
  assert not np.any(values[~kept])
  assert_finite(gradients)
  assert not np.any(gradients[0][~kept])
  assert (np.abs(gradients[0][kept]).max(-1) > 1e-6).all()


def test_a_pair_with_an_excluded_example_is_zero():
  name = "correlation_congruence"
  student, teacher = vectors(name, 14)
  where = np.array([1, 1, 0, 1, 1, 1], bool)
  values, gradients = run(name, np.where(where[:, None], student, np.nan), teacher, where=where)
  expected = ref_cc(student, teacher) * [1, 0, 0, 1, 1]
  np.testing.assert_allclose(values, expected, **TOLERANCE)
  assert_finite(gradients)


@NAMES
def test_one_example_has_no_relations(name):
  student, teacher = vectors(name, 16)
  for where in (np.zeros(B), np.arange(B) == 3):
    values, gradients = run(name, student, teacher, where=where)
    np.testing.assert_allclose(values, 0, atol=1e-7)
    assert_finite(gradients)
    np.testing.assert_allclose(gradients[0], 0, atol=1e-6)
  values, gradients = run(name, student[:1], teacher[:1])
  assert values.shape == ((0,) if name == "correlation_congruence" else (1,))
  np.testing.assert_allclose(values, 0, atol=1e-7)
  assert_finite(gradients)


@pytest.mark.parametrize("name", PAIRWISE)
def test_order_does_not_matter(name):
  student, teacher = vectors(name, 18)
  order = np.array([3, 5, 0, 1, 4, 2])
  values, _ = run(name, student, teacher)
  moved, _ = run(name, student[order], teacher[order])
  np.testing.assert_allclose(moved, values[order], **TOLERANCE)


@NAMES
def test_halves_are_computed_in_float32_and_vmap_is_a_loop(name, strict_promotion):
  student, teacher = vectors(name, 20, 2 * B)
  student = student.reshape(2, B, -1).astype(jnp.bfloat16)
  teacher = teacher.reshape(2, B, -1).astype(jnp.float16)
  where = np.array([[1, 1, 1, 0, 1, 1], [0, 1, 1, 1, 1, 0]], np.float32)
  hyper = FORMULAS[name][1]
  mapped = jit(jax.vmap(lambda s, t, w: getattr(losses, name)(s, t, where=w, **hyper)))
  got = mapped(student, teacher, where)
  assert got.dtype == jnp.float32
  for i in range(2):
    expected = run(name, student[i], teacher[i], where=where[i])[0]
    np.testing.assert_allclose(np.asarray(got)[i], expected, **TOLERANCE)


def extremes(shape, scale_free):
  """Features at their ends: dead, equal rows, opposite, nearly equal, far from 0, one dead row."""
  zeros, some = np.zeros(shape), normal(22, *shape)
  equal = zeros + some[:1]
  opposite = equal * (-1.0) ** np.arange(shape[0])[:, None]
  one_dead, twins, spike = some.copy(), some.copy(), zeros.copy()
  one_dead[0], twins[1], spike[0] = 0, some[0], 1e4
  ends = [zeros, zeros + 1e4, equal, opposite, one_dead, twins, spike, 1e4 * some]
  ends += [1e4 + 1e-3 * some, 1e-6 * some, 1e-12 * some, 1e-25 * some, equal + 1e-7 * some]
  return ends + [1e30 * some, zeros + 3e38, 1e38 * opposite] * scale_free


@pytest.mark.device
@NAMES
def test_extremes_are_finite(name):
  scale_free = name in SCALE_FREE
  shapes = [x.shape for x in vectors(name, 0)]
  for (i, s), (j, t) in itertools.product(
    *(enumerate(extremes(shape, scale_free)) for shape in shapes)
  ):
    assert_finite(run(name, s, t), f"student {i}, teacher {j}: ")


@pytest.mark.parametrize("name", SCALE_FREE)
def test_no_scale_is_too_large(name):
  student, teacher = vectors(name, 24)
  values, _ = run(name, student, teacher)
  np.testing.assert_allclose(run(name, student * 1e25, teacher * 1e11)[0], values, **TOLERANCE)


@pytest.mark.device
def test_small_distances_far_from_zero_keep_their_digits():
  """Gram matrices would lose them: 1e-3 beside 1e3 is 1e-6 of squares that are rounded at 1e-7."""
  student, teacher = normal(26, B, D), normal(27, B, E)
  values, _ = run("relational_distance", f32(1024 + student / 1024), teacher)
  rounded = f32(1024 + student / 1024).astype(float)
  np.testing.assert_allclose(values, ref_distance(rounded, teacher), **TOLERANCE)


def test_angles_hold_less_than_the_differences():
  size, width = 64, 256
  x = jax.ShapeDtypeStruct((size, width), jnp.float32)
  function = jax.value_and_grad(lambda s, t: jnp.sum(losses.relational_angle(s, t)), (0, 1))
  held = jax.jit(function).lower(x, x).compile().memory_analysis().temp_size_in_bytes
  assert held < 4 * size * size * width / 2


# --- CRD and its banks. ---

LABELS = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2])
N = len(LABELS)
INDEX = np.array([4, 0, 8])


@pytest.fixture(scope="module")
def banks():
  return jax.tree.map(np.asarray, losses.init_banks(jax.random.key(0), LABELS, D))


@functools.cache
def crd(negatives):
  def loss(student, teacher, labels, index, banks, key, where, hyper):
    return losses.contrastive_bank(
      student, teacher, labels, index, banks, key=key, negatives=negatives, where=where, **hyper
    )

  return with_gradients(loss, argnums=(0, 1, 4, 7), allow_int=True)


def run_crd(student, teacher, banks, *, negatives=6, seed=1, where=None, index=INDEX, **hyper):
  hyper = {"temperature": 0.07, "momentum": 0.5} | hyper
  return crd(negatives)(
    f32(student),
    f32(teacher),
    LABELS[np.clip(index, 0, N - 1)],
    index,
    banks,
    jax.random.key(seed),
    np.ones(len(index), bool) if where is None else np.asarray(where, bool),
    {k: f32(v) for k, v in hyper.items()},
  )


def ref_crd(student, teacher, banks, *, repeats=1, temperature=0.07, log_z=None, index=INDEX):
  """CRD when all rows of other classes are negatives, each of them ``repeats`` times."""
  columns = np.stack(
    [np.r_[i, np.tile(np.flatnonzero(LABELS[i] != LABELS), repeats)] for i in index]
  )
  total, zs = 0.0, []
  for side, (v, bank) in enumerate([(n(student), banks.teacher), (n(teacher), banks.student)]):
    scores = np.exp(np.einsum("bd,bkd->bk", v, bank.astype(float)[columns]) / temperature)
    zs.append(scores.mean() * N if log_z is None else np.exp(log_z[side]))
    p, share = scores / zs[-1], (columns.shape[1] - 1) / N
    own = np.log(p[:, 0] / (p[:, 0] + share + 1e-7))
    total = total - own - np.log(share / (p[:, 1:] + share + 1e-7)).sum(1)
  return total, np.log(zs)


def test_banks_begin_as_unit_rows_without_normalizers(banks):
  np.testing.assert_allclose(np.linalg.norm(banks.student, axis=1), 1, rtol=1e-6)
  np.testing.assert_allclose(np.linalg.norm(banks.teacher, axis=1), 1, rtol=1e-6)
  assert not np.allclose(banks.student, banks.teacher)
  assert banks.labels.tolist() == LABELS.tolist()
  assert not banks.normalized


def test_crd_is_the_formula_and_sets_normalizers_once(banks, strict_promotion):
  first, second = (normal(30, 3, D), normal(31, 3, D)), (normal(32, 3, D), normal(33, 3, D))
  values, after, gradients = run_crd(*first, banks)
  expected, log_z = ref_crd(*first, banks)
  np.testing.assert_allclose(values, expected, **TOLERANCE)
  np.testing.assert_allclose(after.log_normalizers, log_z, rtol=1e-5)
  assert after.normalized
  assert after.labels.tolist() == LABELS.tolist()
  assert_finite(gradients[:2])
  assert (np.abs(gradients[0]).max(1) > 1e-3).all()
  assert (np.abs(gradients[1]).max(1) > 1e-3).all()
  again, later, _ = run_crd(*second, after)
  np.testing.assert_allclose(again, ref_crd(*second, after, log_z=log_z)[0], **TOLERANCE)
  np.testing.assert_array_equal(later.log_normalizers, after.log_normalizers)
  assert later.normalized


def test_crd_repeats_negatives_where_there_are_too_few(banks):
  student, teacher = normal(34, 3, D), normal(35, 3, D)
  values, after, _ = run_crd(student, teacher, banks, negatives=18)
  expected, log_z = ref_crd(student, teacher, banks, repeats=3)
  np.testing.assert_allclose(values, expected, **TOLERANCE)
  np.testing.assert_allclose(after.log_normalizers, log_z, rtol=1e-5)


def test_crd_gradient_is_the_derivative(banks):
  """With the normalisers of an earlier batch; the gradient never passes through banks."""
  student, teacher = normal(36, 3, D), normal(37, 3, D)
  known = banks._replace(log_normalizers=f32([2.5, 3.0]), normalized=np.array(True))
  gradients = run_crd(student, teacher, known)[2]
  weights = np.cos(np.arange(3))
  for side in range(2):
    for i, d in itertools.product(range(3), range(D)):
      up, down = [student.copy(), teacher.copy()], [student.copy(), teacher.copy()]
      up[side][i, d] += 1e-5
      down[side][i, d] -= 1e-5
      difference = (
        ref_crd(*up, known, log_z=[2.5, 3.0])[0] - (ref_crd(*down, known, log_z=[2.5, 3.0])[0])
      )
      slope = (weights * difference).sum() / 2e-5
      np.testing.assert_allclose(gradients[side][i, d], slope, rtol=1e-3, atol=1e-4)
  for leaf in (gradients[2].student, gradients[2].teacher, gradients[2].log_normalizers):
    assert not np.any(leaf)
  # The first batch's normalisers are kept numbers too: the gradient is as if they were known.
  first, after, by_first = run_crd(student, teacher, banks)
  known = banks._replace(log_normalizers=after.log_normalizers, normalized=np.array(True))
  again, _, by_known = run_crd(student, teacher, known)
  np.testing.assert_allclose(first, again, rtol=1e-5)
  np.testing.assert_allclose(by_first[0], by_known[0], rtol=1e-4, atol=1e-5)


def test_crd_rows_move_with_momentum(banks):
  student, teacher = normal(38, 3, D), normal(39, 3, D)
  _, after, _ = run_crd(student, teacher, banks, momentum=0.8)
  for old, new, v in (
    (banks.student, after.student, student),
    (banks.teacher, after.teacher, teacher),
  ):
    expected = n(0.8 * old[INDEX] + 0.2 * n(v))
    np.testing.assert_allclose(new[INDEX], expected, rtol=1e-5, atol=1e-6)
    others = np.setdiff1d(np.arange(N), INDEX)
    np.testing.assert_array_equal(new[others], old[others])
  # A row that would vanish stays.
  _, after, _ = run_crd(-banks.student[INDEX], teacher, banks)
  np.testing.assert_array_equal(after.student[INDEX], banks.student[INDEX])


def test_crd_excluded_examples_change_nothing(banks):
  student, teacher = normal(40, 3, D), normal(41, 3, D)
  where = np.array([1, 0, 1], bool)
  junk = np.where(where[:, None], student, np.nan), np.where(where[:, None], teacher, np.inf)
  for stray in (0, -1, 10**6):
    index = np.where(where, INDEX, stray)
    values, after, gradients = run_crd(*junk, banks, where=where, index=index)
    expected, log_z = ref_crd(student[where], teacher[where], banks, index=INDEX[where])
    np.testing.assert_allclose(values[where], expected, **TOLERANCE)
    np.testing.assert_allclose(after.log_normalizers, log_z, rtol=1e-5)
    assert values[1] == 0
    assert_finite(gradients[:2])
    assert not np.any(gradients[0][1])
    changed = np.flatnonzero((after.student != banks.student).any(1))
    assert changed.tolist() == sorted(INDEX[where])
  values, after, gradients = run_crd(*junk, banks, where=np.zeros(3))
  assert not np.any(values)
  jax.tree.map(np.testing.assert_array_equal, after, banks)
  assert_finite(gradients[:2])


@functools.cache
def drawn():
  """Which rows of the banks the values depend on ``[B, N]``, seen from outside."""
  known = losses.Banks(
    jnp.ones((N, D)), jnp.ones((N, D)), jnp.asarray(LABELS), jnp.zeros(2), jnp.ones((), bool)
  )

  def values(side, row, index, key):
    banks = known._replace(**{side: getattr(known, side).at[row].set(0.0)})
    ones = jnp.ones((len(index), D))
    return losses.contrastive_bank(
      ones, ones, jnp.asarray(LABELS)[index], index, banks, key=key, negatives=2, temperature=1.0
    )[0]

  def depends(side, index, key):
    changed = jax.vmap(lambda row: values(side, row, index, key))(jnp.arange(N))
    # A row past the end changes nothing.
    return jnp.abs(changed - values(side, N, index, key)[None]).T > 1e-3

  def both(index, key):
    return depends("student", index, key), depends("teacher", index, key)

  return jit(jax.vmap(both, in_axes=(None, 0)))


def test_crd_draws_other_classes_evenly_without_replacement():
  keys = jax.random.split(jax.random.key(2), 600)
  by_student, by_teacher = (np.asarray(x) for x in drawn()(INDEX, keys))
  np.testing.assert_array_equal(by_student, by_teacher)  # one draw for both sides
  own = np.eye(N, dtype=bool)[INDEX]
  assert by_student[:, own].all()
  negatives = by_student & ~own
  assert (negatives.sum(-1) == 2).all()
  other = LABELS[INDEX][:, None] != LABELS[None]
  assert not np.any(negatives & ~other)
  # Each of 6 rows in a third of 600 draws; the standard error of the share is 0.02.
  np.testing.assert_allclose(negatives.mean(0)[other], 1 / 3, atol=0.08)
  # Examples of one class draw apart, and an example's draw does not hang on its neighbours.
  assert (negatives[:, 1] != negatives[:, 2])[:, [1, 4, 7]].any()
  turned = np.asarray(drawn()(INDEX[[2, 0, 1]], keys)[0])
  np.testing.assert_array_equal(turned, by_student[:, [2, 0, 1]])


def test_crd_at_extremes_is_finite(banks):
  some = normal(42, 3, D)
  ends = [0 * some, some * 1e30, banks.teacher[INDEX], -banks.teacher[INDEX], some * 1e-25]
  for student, teacher in itertools.product(ends, ends):
    for temperature in (1e-3, 0.07, 1e3):
      values, after, gradients = run_crd(student, teacher, banks, temperature=temperature)
      assert_finite((values, after, gradients[:2]))
  alone = banks._replace(labels=np.zeros(N, np.int32))  # nobody is of another class
  values, after, gradients = run_crd(some, some, alone, index=np.array([0, 3, 6]))
  assert_finite((values, after, gradients[:2]))


def test_crd_carries_its_banks_through_scan_and_takes_halves(banks, strict_promotion):
  student, teacher = normal(44, 2, 3, D), normal(45, 2, 3, D)
  student, teacher = student.astype(jnp.bfloat16), teacher.astype(jnp.float16)
  keys = jax.random.split(jax.random.key(1), 2)

  def step(banks, each):
    values, banks = losses.contrastive_bank(
      each[0], each[1], LABELS[INDEX], INDEX, banks, key=each[2], negatives=6
    )
    return banks, values

  after, values = jit(lambda b: jax.lax.scan(step, b, (student, teacher, keys)))(banks)
  assert values.dtype == jnp.float32
  expected = banks
  for i in range(2):
    one, expected, _ = run_crd(student[i], teacher[i], expected)
    np.testing.assert_allclose(np.asarray(values)[i], one, rtol=1e-5)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), after, expected)


@pytest.mark.slow
def test_crd_takes_banks_that_are_numpy_arrays(banks):
  """As a checkpoint or a script has them: not yet arguments of anything that is compiled."""
  student, teacher = f32(normal(13, 3, D)), f32(normal(14, 3, D))
  key = jax.random.key(0)
  values, after = losses.contrastive_bank(
    student, teacher, LABELS[INDEX], INDEX, banks, key=key, negatives=6
  )
  expected, known, _ = run_crd(student, teacher, banks)
  # All the others are negatives, so that the key does not matter.
  np.testing.assert_allclose(values, expected, **TOLERANCE)
  np.testing.assert_allclose(after.student, known.student, **TOLERANCE)


def test_crd_scores_the_bank_without_gathering_rows():
  size, width, batch, negatives = 20_000, 64, 16, 8_000
  floats = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  banks = jax.eval_shape(
    lambda: losses.init_banks(jax.random.key(0), jnp.zeros(size, jnp.int32), width)
  )

  def total(student, teacher, labels, banks):
    values, banks = losses.contrastive_bank(
      student, teacher, labels, labels, banks, key=jax.random.key(0), negatives=negatives
    )
    return jnp.sum(values), banks

  function = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
  labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
  shape = floats((batch, width))
  compiled = function.lower(shape, shape, labels, banks).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 2 * 4 * batch * negatives * width / 5


# --- Errors. ---


@pytest.mark.parametrize("name", ["correlation_congruence", "contrastive"])
def test_widths_that_differ_are_named(name):
  message = r"student \(2, 3\) and teacher \(2, 4\) .*use a projector"
  with pytest.raises(ValueError, match=message):
    getattr(losses, name)(jnp.zeros((2, 3)), jnp.zeros((2, 4)))


def test_crd_refuses_what_does_not_fit(banks):
  def call(student=(3, D), teacher=(3, D), **hyper):
    losses.contrastive_bank(
      jnp.zeros(student),
      jnp.zeros(teacher),
      jnp.asarray(INDEX),
      jnp.asarray(INDEX),
      banks,
      key=jax.random.key(0),
      **hyper,
    )

  with pytest.raises(ValueError, match=r"student \(3, 4\) and teacher \(3, 5\) .*use a projector"):
    call(teacher=(3, 5))
  with pytest.raises(ValueError, match=r"\(3, 5\) and banks.student \(9, 4\) .*use a projector"):
    call((3, 5), (3, 5))
  for name, value in (("negatives", 0), ("temperature", -1.0), ("momentum", 1.5)):
    with pytest.raises(ValueError, match=f"{name} must be .*got {value}"):
      call(**{name: value})
  with pytest.raises(ValueError, match="temperature must be positive, got 0"):
    losses.contrastive(jnp.zeros((2, 3)), jnp.zeros((2, 3)), temperature=0)
  with pytest.raises(ValueError, match="width must be positive, got 0"):
    losses.init_banks(jax.random.key(0), jnp.asarray(LABELS), 0)


def test_masks_of_another_length_are_named():
  import jaxtyping

  jaxtyping.config.update("jaxtyping_disable", True)
  try:
    x = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match=r"where must have shape \(2,\), got \(3,\)"):
      losses.similarity_preserving(x, x, where=jnp.ones(3))
    with pytest.raises(ValueError, match=r"\(2, 3\) and teacher \(1, 3\) must hold the same exam"):
      losses.similarity_preserving(x, x[:1])
  finally:
    jaxtyping.config.update("jaxtyping_disable", False)
