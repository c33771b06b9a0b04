"""Estimates with intervals: they are what they are said to be, and they cover as often as they say."""

from __future__ import annotations

import math
import random

import pytest

from opsd_cli.insight.estimates import crossed, mean, ratio, t_quantile


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4.5, 2.6585), (10, 2.2281), (99, 1.9842)]
)
def test_students_t_is_that_of_the_tables(freedom: float, expected: float) -> None:
    assert t_quantile(freedom) == pytest.approx(expected, abs=2e-3)


def test_without_anything_that_failed_there_is_no_share_of_it() -> None:
    assert ratio([0.0, 0.0], [0.0, 0.0]) is None
    assert crossed([]) is None


def test_what_never_varied_is_not_certain() -> None:
    found = ratio([0.0] * 20, [2.0] * 20)
    assert found is not None
    assert (found.value, found.low) == (0.0, -found.high)
    assert 0.1 < found.high < 0.2


def share_covered(covers: list[bool]) -> float:
    return sum(covers) / len(covers)


def test_the_interval_of_a_share_of_failures_covers_it() -> None:
    """Problems of different difficulty, four tries each: the share of failures that a context repairs, less the share
    that another try repairs."""
    chance = random.Random(0)
    hard = (0.05, 0.2, 0.6)  # of a right answer alone
    helped = (0.3, 0.5, 0.8)  # with the context
    truth = sum((1 - p) * (q - p) for p, q in zip(hard, helped, strict=True)) / sum(1 - p for p in hard)
    covers = []
    for _ in range(500):
        numerators, denominators = [], []
        for _ in range(60):
            p, q = (kind := chance.randrange(3), hard[kind])[1], helped[kind]
            failed = sum(chance.random() > p for _ in range(4))
            denominators.append(float(failed))
            numerators.append(float(sum((chance.random() < q) - (chance.random() < p) for _ in range(failed))))
        found = ratio(numerators, denominators)
        assert found is not None
        covers.append(found.low <= truth <= found.high)
    assert 0.93 <= share_covered(covers) <= 0.97


@pytest.mark.parametrize(
    ("seeds", "of_seeds", "least", "most"),
    [(3, 0.0, 0.96, 1.0), (3, 0.04, 0.95, 1.0), (3, 0.1, 0.92, 0.98),
     (2, 0.0, 0.94, 1.0), (2, 0.04, 0.92, 0.98), (2, 0.1, 0.86, 0.94)],
)  # fmt: skip
def test_the_interval_over_problems_and_seeds_covers(seeds: int, of_seeds: float, least: float, most: float) -> None:
    """Right or wrong of 120 problems in two arms: with seeds that do nothing, as much as problems do, and far more. Two
    seeds do not show how far more, which docs/before-you-train.md says."""
    chance = random.Random(1)
    truth, covers = 0.12, []
    for _ in range(300):
        shifts = [chance.gauss(0.0, of_seeds) for _ in range(seeds)]
        rows = []
        for _ in range(120):
            base = chance.choice((0.15, 0.45, 0.7))
            first = [chance.random() < base for _ in shifts]
            second = [chance.random() < base + truth + shift for shift in shifts]
            rows.append([float(b) - float(a) for a, b in zip(first, second, strict=True)])
        found = crossed(rows)
        assert found is not None
        covers.append(found.low <= truth <= found.high)
    assert least <= share_covered(covers) <= most, share_covered(covers)


def test_of_problems_alone_the_interval_is_students() -> None:
    values = [0.0, 1.0, 1.0, -1.0, 0.0, 1.0]
    found, centre = mean(values), sum(values) / 6
    spread = math.sqrt(sum((value - centre) ** 2 for value in values) / 5 / 6)
    assert found is not None
    assert found.high - found.value == pytest.approx(t_quantile(5) * spread)
    assert crossed([[value] for value in values]) == found
