"""Intervals of paired differences: against known formulas, and in simulations with known truths."""

from functools import partial

import numpy as np
import pytest
from scipy.stats import t, ttest_rel

from bnfinetune.comparison.paired import expected_reach, paired_difference, still_racing
from tests.comparison.simulation import simulated


def reaches(first, second, seeds):
    """Student's, of so many seeds that scatter as these, and of these images."""
    apart = np.array(first) - np.array(second)
    images = apart.shape[1]
    by_seed = t.ppf(0.975, seeds - 1) * apart.mean(1).std(ddof=1) / seeds**0.5
    return by_seed, t.ppf(0.975, images - 1) * apart.mean(0).std(ddof=1) / images**0.5


def test_one_seed_is_the_paired_t_test_over_images():
    rng = np.random.default_rng(0)
    first, second = simulated(rng, seeds=1, images=50)
    found = paired_difference(first, second, same_images=True)
    low, high = ttest_rel(first[0], second[0]).confidence_interval()
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.seeds == 1


def test_images_of_their_own_leave_the_t_test_over_seeds():
    rng = np.random.default_rng(0)
    first, second = simulated(rng, seeds=4, images=50)
    found = paired_difference(first, second, same_images=False)
    low, high = ttest_rel(*([each.mean() for each in cell] for cell in (first, second))).confidence_interval()
    assert (found.low, found.high) == pytest.approx((low, high))


def test_both_reaches_add_up_as_squares():
    rng = np.random.default_rng(0)
    first, second = simulated(rng, seeds=3, images=40)
    by_seed, by_image = reaches(first, second, seeds=3)
    found = paired_difference(first, second, same_images=True)
    assert found.high - found.mean == pytest.approx(np.hypot(by_seed, by_image))
    back = paired_difference(second, first, same_images=True)
    assert (back.mean, back.low, back.high) == pytest.approx((-found.mean, -found.high, -found.low))


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_cover_and_losers_are_found(seeds):
    rng = np.random.default_rng(seeds)
    covered = found = 0
    for _ in range(1000):
        same = paired_difference(*simulated(rng, seeds=seeds, images=200), same_images=True)
        covered += same.low <= 0 <= same.high
        found += paired_difference(*simulated(rng, seeds=seeds, images=200, gap=4.0), same_images=True).low > 0
    assert covered >= 940  # 95 % stated; 940 is two standard errors below
    assert found > {2: 200, 3: 800, 5: 990}[seeds]


def test_the_best_cell_hardly_ever_leaves():
    """Equal cells: each time that one leaves, it might have been the best."""
    rng = np.random.default_rng(0)
    gone = 0
    for _ in range(1000):
        pairs = [simulated(rng, seeds=3, images=100)[0] for _ in range(4)]
        cells = {str(number): cell for number, cell in enumerate(pairs)}
        gone += "0" not in still_racing(cells, same_images=True, rounds=1)
    assert gone <= 50
    cells = {"best": simulated(rng, seeds=5, images=500, gap=3.0)[0]}
    cells |= {"worse": simulated(rng, seeds=5, images=500, gap=-3.0)[0]}
    assert list(still_racing(cells, same_images=True, rounds=1)) == ["best"]


def test_the_reach_of_more_seeds_is_that_of_seeds_that_scatter_as_these():
    rng = np.random.default_rng(1)
    first, second = simulated(rng, seeds=4, images=50)
    by_seed, by_image = reaches(first, second, seeds=9)
    expected = partial(expected_reach, first, second)
    assert expected(same_images=False, seeds=9) == pytest.approx(by_seed)
    assert expected(same_images=True, seeds=9) == pytest.approx(np.hypot(by_seed, by_image))
    now = paired_difference(first, second, same_images=True)
    assert expected(same_images=True, seeds=4) == pytest.approx(now.high - now.mean)
