"""Tests and intervals against SciPy, closed forms and simulation."""

import numpy as np
import pytest
import scipy.stats

from jaxdistill.reports._pages import significance


@pytest.mark.parametrize(("successes", "trials"), [(0, 12), (8, 10), (12, 12), (671, 697)])
def test_wilson_is_scipys(successes, trials):
  low, high = significance.wilson(successes, trials)
  known = scipy.stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
  np.testing.assert_allclose([low, high], [known.low, known.high], atol=1e-12)


def test_wilson_of_nothing_and_of_several():
  low, high = significance.wilson([0, 5], [0, 10], confidence=0.9)
  assert np.isnan([low[0], high[0]]).all()
  assert 0 < low[1] < 0.5 < high[1] < 1
  with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\), got 95"):
    significance.wilson(1, 2, confidence=95)


def test_mcnemar_counts_what_only_one_knows():
  # 2 · (1 + 10 + 45) / 2¹⁰: ten discordant pairs, two of them on one side.
  first = np.array([True] * 8 + [False] * 2 + [True] * 30 + [False] * 5)
  second = np.array([False] * 8 + [True] * 2 + [True] * 30 + [False] * 5)
  found = significance.mcnemar(first, second)
  assert found == {"first_only": 8, "second_only": 2, "p_value": pytest.approx(112 / 1024)}
  assert significance.mcnemar(first, first)["p_value"] == 1
  with pytest.raises(ValueError, match="of the same examples"):
    significance.mcnemar(first, second[1:])


@pytest.mark.parametrize(("more", "fewer"), [(8, 2), (30, 12), (400, 330)])
def test_sign_flips_of_one_size_are_mcnemars(more, fewer):
  differences = np.r_[np.ones(more), -np.ones(fewer), np.zeros(50)]
  known = scipy.stats.binomtest(fewer, more + fewer).pvalue
  # Exact up to 13; 9,999 draws have a standard error of at most 0.005; the normal law without
  # correction is off by half a step of the count: 0.002 here.
  tolerance = 1e-12 if more + fewer <= 13 else 0.016
  if more + fewer > 300:
    tolerance = 0.003
  assert significance.sign_flips(differences) == pytest.approx(known, abs=tolerance)


def test_a_change_of_one_instance_each_is_a_paired_test():
  random = np.random.default_rng(0)
  first, second = random.random(500) < 0.9, random.random(500) < 0.8
  found = significance.change(first[None], second[None])
  paired = first.astype(float) - second
  assert found["change"] == pytest.approx(paired.mean())
  assert found["error"] == pytest.approx(paired.std(ddof=1) / np.sqrt(500))


def test_the_error_of_a_change_is_that_of_a_crossed_design():
  random = np.random.default_rng(1)
  changes, errors = [], []
  for _ in range(300):
    # A value is an example's part, a seed's part, and noise; 13 examples make quick tests.
    parts = random.normal(0, 1, 13), random.normal(0, 0.5, (5, 1)), random.normal(0, 1, (5, 13))
    found = significance.change(sum(parts), np.zeros((5, 13)))
    changes.append(found["change"])
    errors.append(found["error"])
  known = np.sqrt(1 / 13 + 0.25 / 5 + 1 / 65)
  # 300 draws know a standard deviation to 4 %, three times that.
  assert np.std(changes) == pytest.approx(known, rel=0.12)
  assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(known, rel=0.12)


def test_a_change_must_be_beyond_examples_and_seeds():
  size = 200
  base = np.zeros((5, size))
  # All seeds gain the same two examples: other examples might not.
  few = base.copy()
  few[:, :2] = 1
  assert significance.change(few, base)["p_value"] == pytest.approx(0.5)
  # One seed gains very much: other seeds might not.
  one = base.copy()
  one[0, :150] = 1
  assert significance.change(one, base)["p_value"] > 0.3
  both = base.copy()
  both[:, :40] = 1
  assert significance.change(both, base)["p_value"] < 1e-3
  with pytest.raises(ValueError, match=r"of the same N examples, got .*, 0\)"):
    significance.change(base[:, :0], base[:, :0])  # nothing was measured


def test_welchs_test_is_scipys():
  random = np.random.default_rng(8)
  for sizes in ((2, 2), (3, 5), (20, 4)):
    sides = [random.normal(i, 1 + i, size) for i, size in enumerate(sizes)]
    known = scipy.stats.ttest_ind(*sides, equal_var=False).pvalue
    assert significance.welch(*sides) == pytest.approx(known, rel=1e-9)
  # A side that does not vary: one sample against a known mean.
  known = scipy.stats.ttest_1samp([0.9, 0.92, 0.97], 0.8).pvalue
  assert significance.welch([0.9, 0.92, 0.97], [0.8] * 4) == pytest.approx(known, rel=1e-9)
  with pytest.raises(ValueError, match="at least two runs"):
    significance.welch([1.0], [1.0, 2.0])


def test_unpaired_seeds_have_a_larger_error():
  random = np.random.default_rng(2)
  shared = random.normal(0, 0.3, (5, 1))
  first = shared + random.normal(0.1, 0.1, (5, 50))
  second = shared + random.normal(0, 0.1, (5, 50))
  paired, apart = (significance.change(first, second, paired=p) for p in (True, False))
  assert paired["change"] == apart["change"]
  assert paired["error"] < apart["error"]
  assert paired["p_value"] < apart["p_value"]


def test_changes_without_a_difference_are_rarely_called_real():
  random = np.random.default_rng(3)
  low = 0
  for _ in range(200):
    hard = random.random(30)
    sides = [random.random((3, 30)) < 0.7 + 0.3 * hard for _ in range(2)]
    low += significance.change(*sides)["p_value"] < 0.05
  assert low <= 10  # 5 % of 200; being beyond both kinds of noise makes it rarer


def test_holm_by_hand():
  assert significance.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
  assert significance.holm([0.9, 0.8]) == [1, 1]
  assert significance.holm([]) == []


def test_the_bootstraps_interval_is_the_known_one_for_one_instance():
  random = np.random.default_rng(4)
  first, second = random.random(1000) < 0.9, random.random(1000) < 0.87
  found = significance.bootstrap(first, second, resamples=4000)
  error = (first.astype(float) - second).std(ddof=1) / np.sqrt(1000)
  assert found["change"] == pytest.approx(first.mean() - second.mean())
  # An end of 4,000 draws is known to about 0.04 standard errors; the rest is skew.
  assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * error, rel=0.08)
  again = significance.bootstrap(first, second, resamples=4000)
  assert found == again
  assert significance.bootstrap(first, second, resamples=4000, seed=1) != found


def test_the_bootstrap_draws_seeds_too():
  random = np.random.default_rng(5)
  seeds = np.array([[0.0], [1.0], [0.2], [0.8]])
  first = seeds + random.normal(0, 0.01, (4, 200))
  found = significance.bootstrap(first, np.full((4, 200), 0.1), resamples=2000)
  assert found["high"] - found["low"] > 0.5
  # The same seeds on both sides cancel, where they are paired.
  second = seeds + random.normal(-0.1, 0.01, (4, 200))
  paired = significance.bootstrap(first, second, resamples=2000)
  apart = significance.bootstrap(first, second, paired=False, resamples=2000)
  assert paired["high"] - paired["low"] < 0.1 < apart["high"] - apart["low"]
  assert paired["p_value"] < 0.01 < apart["p_value"]


def test_what_cannot_be_drawn_is_named():
  with pytest.raises(ValueError, match="at least one, got"):
    significance.bootstrap(np.zeros((2, 0)), np.zeros((2, 0)))
  with pytest.raises(ValueError, match="resamples must be at least 1"):
    significance.bootstrap(np.zeros(3), np.zeros(3), resamples=0)
  with pytest.raises(ValueError, match="of the same N"):
    significance.change(np.zeros((1, 3)), np.zeros((1, 4)))


def test_a_p_value_that_no_draw_reaches_is_bounded():
  # 25 of 25 on one side: 2⁻²⁴, of which 9,999 draws see none.
  found = significance.sign_flips(np.ones(25))
  assert 2**-24 <= found < 1e-4
  assert found == pytest.approx(3.18 * 2 * scipy.stats.norm.sf(5))


def test_seeds_are_as_noisy_as_all_groups_say():
  random = np.random.default_rng(6)
  groups = [random.normal(0, 1, (3, n)) for n in (5, 40, 80) for _ in range(200)]
  variance, freedom = significance.pooled_variance([*groups, np.zeros((3, 0))])
  assert freedom == 2 * 600
  assert variance == pytest.approx(1, rel=0.13)  # √(2 / 1200) is 4 %, three times that
  assert significance.pooled_variance([np.ones((1, 4))]) is None
  # Two seeds that agree by chance know nothing of their noise; the groups do.
  alike = np.ones((2, 30))
  alone = significance.change(alike, np.zeros((2, 30)))
  with_noise = significance.change(alike, np.zeros((2, 30)), pooled=(4.0, 50))
  assert alone["p_value"] < 1e-4 < 0.1 < with_noise["p_value"]
