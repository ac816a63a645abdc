import math

import numpy as np
import pytest
from scipy.stats import ks_2samp

from ridgeline.significance import class_shift, ks_test, mcnemar_p_value


@pytest.mark.parametrize(("champion", "candidate"), [(0, 0), (0, 5), (5, 0), (1, 1), (12, 5), (300, 220)])
def test_the_one_sided_p_value_is_the_exact_tail_of_the_binomial(champion, candidate):
    n = champion + candidate
    expected = sum(math.comb(n, k) for k in range(champion, n + 1)) / 2**n
    assert mcnemar_p_value(champion, candidate, "greater") == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("first", "second"), [(5, 0), (0, 5), (12, 5), (300, 220)])
def test_the_two_sided_p_value_counts_both_tails(first, second):
    tail = mcnemar_p_value(max(first, second), min(first, second), "greater")
    assert mcnemar_p_value(first, second, "two-sided") == pytest.approx(2 * tail, rel=1e-9)


def test_the_distances_are_those_of_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 200, 500), rng.integers(30, 256, 700)
    shift = ks_test(np.bincount(a, minlength=256), np.bincount(b, minlength=256), len(a), len(b))
    expected = ks_2samp(a, b, method="asymp")
    assert shift.effect == pytest.approx(expected.statistic)
    assert shift.p_value == pytest.approx(expected.pvalue, rel=0.5)
    same = class_shift(np.array([10, 20, 0]), np.array([100, 200, 0]))
    assert (same.effect, same.p_value) == (pytest.approx(0), pytest.approx(1))
