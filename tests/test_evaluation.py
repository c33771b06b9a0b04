"""Accuracy, its interval, and whether a change of it is noise."""

from __future__ import annotations

import itertools
import math

import pytest

from opsd_cli.insight.paired import compare, gain_interval, mcnemar, wilson_interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (131, 500, 0.2255, 0.3022)],
)
def test_the_interval_is_wilsons(successes: int, trials: int, low: float, high: float):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-4)


def test_the_exact_p_is_the_share_of_all_outcomes_that_are_at_least_as_uneven():
    for changed in range(11):
        outcomes = [sum(coins) for coins in itertools.product((0, 1), repeat=changed)]
        for won in range(changed + 1):
            uneven = abs(2 * won - changed)
            share = sum(abs(2 * other - changed) >= uneven for other in outcomes) / len(outcomes)
            assert mcnemar(won, changed - won) == pytest.approx(share, abs=1e-15)


def test_the_exact_p_is_a_number_for_any_count():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(310, 3) == mcnemar(3, 310) < 1e-80
    assert mcnemar(5000, 0) == 0.0, "below the smallest float, not an error"
    assert 0.9 < mcnemar(5000, 5000) <= 1.0


def test_a_gain_has_newcombes_interval():
    # An example of his (36, 12, 2, 0), and the ends, where the Wilson limits are known.
    assert gain_interval(36, 2, 12, 50) == pytest.approx((-0.3404, -0.0569), abs=1e-4)
    assert gain_interval(0, 50, 0, 50) == pytest.approx((1 - math.hypot(0.0713, 0.0713), 1.0), abs=1e-3)
    low, high = gain_interval(0, 0, 0, 32)
    assert high == -low == pytest.approx(wilson_interval(0, 32)[1])


def test_the_interval_of_a_gain_covers_it_nineteen_times_in_twenty():
    """Over every table of 14 problems, weighted by its probability."""
    n = 14
    covered = []
    for both, won, lost in ((0.3, 0.2, 0.1), (0.5, 0.4, 0.05), (0.1, 0.1, 0.1), (0.05, 0.6, 0.3)):
        shares, total = (both, won, lost, 1 - both - won - lost), 0.0
        for a, b, c in itertools.product(range(n + 1), repeat=3):
            if (d := n - a - b - c) >= 0:
                low, high = gain_interval(a, b, c, n)
                ways = math.factorial(n) / math.prod(map(math.factorial, (a, b, c, d)))
                chance = ways * math.prod(share**k for share, k in zip(shares, (a, b, c, d), strict=True))
                total += chance * (low <= won - lost <= high)
        covered.append(total)
    assert min(covered) > 0.93
    assert sum(covered) / len(covered) > 0.945


def test_problems_are_compared_where_both_graded_them():
    first = {"a": True, "b": False, "c": False, "d": True, "only": True}
    second = {"d": False, "c": True, "b": True, "a": True, "other": False}
    found = compare(first, second)
    assert (found.problems, found.won, found.lost, found.gain) == (4, ("b", "c"), ("d",), 0.25)
    assert found.p_value == 1.0
    assert found.low < 0 < found.high
    assert compare(first, {}) is None
