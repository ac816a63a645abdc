"""Intervals, and tests whether a difference may be chance."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

CONFIDENCE_LEVEL = 0.95


def wilson_interval(num_correct: int, num_examples: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share.

    Args:
        num_correct: Number of examples that count.
        num_examples: Number of all examples, at least 1.

    Example:
        >>> low, high = wilson_interval(9, 10)
        >>> round(low, 4), round(high, 4)
        (0.5958, 0.9821)
    """
    from scipy.stats import binomtest

    interval = binomtest(num_correct, num_examples).proportion_ci(CONFIDENCE_LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar_p_value(
    only_first_right: int, only_second_right: int, alternative: Literal["greater", "two-sided"]
) -> float:
    """Return the p-value of the exact McNemar test of two classifiers on the same images.

    Null hypothesis: an image on which exactly one of the two is right is equally likely to favour either.
    McNemar, "Note on the sampling error of the difference between correlated proportions or percentages",
    Psychometrika 12 (1947) 153-157; recommended for two classifiers on one test set by Dietterich, "Approximate
    statistical tests for comparing supervised classification learning algorithms", Neural Computation 10 (1998)
    1895-1923.

    Args:
        only_first_right: Number of images that the first classifier alone classifies correctly.
        only_second_right: Number of images that the second classifier alone classifies correctly.
        alternative: ``greater`` if the first may only be better, ``two-sided`` if it may be better or worse.

    Returns:
        The probability that chance puts the first, or either of them, at least this far ahead; 1 if they never differ.

    Example:
        >>> mcnemar_p_value(5, 0, "greater"), mcnemar_p_value(5, 0, "two-sided")  # 1 in 2 ** 5, twice that
        (0.03125, 0.0625)
        >>> mcnemar_p_value(0, 0, "greater")
        1.0
    """
    from scipy.stats import binomtest

    differing = only_first_right + only_second_right
    return float(binomtest(only_first_right, differing, alternative=alternative).pvalue) if differing else 1.0


class Shift(NamedTuple):
    """The difference of two distributions: an effect size in [0, 1], and the p-value of no difference."""

    effect: float
    p_value: float


def ks_test(now: np.ndarray, then: np.ndarray, num_now: int, num_then: int) -> Shift:
    """Return the two-sample Kolmogorov-Smirnov test of two binned samples.

    Binning can only make D smaller, so the test is conservative.

    Args:
        now: Counts by bin, integers ``[bins]``.
        then: The other sample's counts.
        num_now: Number of independent observations, for example images, in `now`.
        num_then: The same for `then`.

    Returns:
        The distance D, and its asymptotic p-value.

    Example:
        >>> shift = ks_test(np.array([50, 50]), np.array([80, 20]), 100, 100)
        >>> round(shift.effect, 3), shift.p_value < 0.001
        (0.3, True)
    """
    from scipy.stats import kstwobign

    if not (num_now and num_then):
        return Shift(0.0, 1.0)
    distance = float(np.max(np.abs(np.cumsum(now) / now.sum() - np.cumsum(then) / then.sum())))
    return Shift(distance, float(kstwobign.sf(distance * np.sqrt(num_now * num_then / (num_now + num_then)))))


def class_shift(now: np.ndarray, then: np.ndarray) -> Shift:
    """Return the chi-squared test of two samples' class balance.

    Args:
        now: Number of images by class, integers ``[classes]``.
        then: The other sample's counts.

    Returns:
        The total variation distance of the class shares, and the p-value.

    Example:
        >>> shift = class_shift(np.array([500, 1000]), np.array([1000, 1000]))
        >>> round(shift.effect, 3), shift.p_value < 0.001
        (0.167, True)
    """
    from scipy.stats import chi2_contingency

    table = np.stack([now, then])[:, (now + then) > 0]
    if table.shape[1] < 2 or not table.sum(1).all():
        return Shift(0.0, 1.0)
    shares = table / table.sum(1, keepdims=True)
    return Shift(float(np.abs(shares[0] - shares[1]).sum() / 2), float(chi2_contingency(table).pvalue))
