"""Two evaluations of the same problems, compared problem by problem: which were won, which were lost, and whether that
could be noise. Paired, because two intervals that overlap say little when both are about the same problems."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import stdev

Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Comparison:
    """Of the problems that both evaluations graded."""

    problems: int
    won: tuple[str, ...]  # ids: wrong in the first, right in the second; of several completions, more of them right
    lost: tuple[str, ...]  # ids: right in the first, wrong in the second
    p_value: float  # of the exact McNemar test, which is the sign test on the problems that changed
    gain: float  # accuracy of the second minus that of the first
    low: float  # 95 % interval of the gain
    high: float


def compare(first: Mapping[str, float], second: Mapping[str, float]) -> Comparison | None:
    """Whether each problem (by id) was right in each, or which share of its completions; None if they share no problem.
    The interval of shares is that of the mean of their differences."""
    shared = [problem for problem in first if problem in second]
    if not shared:
        return None
    won = tuple(problem for problem in shared if second[problem] > first[problem])
    lost = tuple(problem for problem in shared if first[problem] > second[problem])
    if any(grades[problem] not in (0, 1) for grades in (first, second) for problem in shared):
        gains = [second[problem] - first[problem] for problem in shared]
        mean, error = sum(gains) / len(gains), standard_error(gains)
        low, high = max(-1.0, mean - Z_95 * error), min(1.0, mean + Z_95 * error)
        return Comparison(len(shared), won, lost, mcnemar(len(won), len(lost)), mean, low, high)
    right_twice = sum(bool(first[problem] and second[problem]) for problem in shared)
    gain = (len(won) - len(lost)) / len(shared)
    low, high = gain_interval(right_twice, len(won), len(lost), len(shared))
    return Comparison(len(shared), won, lost, mcnemar(len(won), len(lost)), gain, low, high)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of some values; that of two alike where there are fewer than two."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 1.0


def mcnemar(won: int, lost: int) -> float:
    """Two-sided p of the exact McNemar test (1947): how often `won + lost` fair coins fall at least as unevenly. It is
    the sign test on the problems that changed; those that did not change carry no information."""
    changed, ways, tail = won + lost, 1, 0  # ways: in which k of them are of the rarer kind
    for k in range(min(won, lost) + 1):
        tail += ways
        ways = ways * (changed - k) // (k + 1)
    return min(1.0, float(Fraction(2 * tail, 2**changed)))  # of integers, so that no term is rounded


def gain_interval(right_twice: int, won: int, lost: int, problems: int) -> tuple[float, float]:
    """95 % interval of the difference between two paired proportions: the Wilson limits of both, combined with their
    correlation (Newcombe 1998, Statistics in Medicine 17, method 10). Valid for few problems and at 0 and 100 %."""
    wrong_twice = problems - right_twice - won - lost
    first, second = right_twice + lost, right_twice + won
    covariance = float(right_twice * wrong_twice - won * lost)
    if covariance > 0:
        covariance = max(0.0, covariance - problems / 2)
    spread = math.sqrt(first * (problems - first)) * math.sqrt(second * (problems - second))
    phi = covariance / spread if spread else 0.0
    (low_1, high_1), (low_2, high_2) = wilson_interval(first, problems), wilson_interval(second, problems)
    share_1, share_2 = first / problems, second / problems

    def distance(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    gain = share_2 - share_1
    low = gain - distance(share_2 - low_2, high_1 - share_1)
    return max(-1.0, low), min(1.0, gain + distance(high_2 - share_2, share_1 - low_1))


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion (Wilson 1927); `trials` at least 1."""
    return wilson_limits(successes / trials, trials)


def wilson_limits(share: float, trials: float) -> tuple[float, float]:
    """The same for a share of `trials` that need not be a whole number, as effective sample sizes are."""
    z2 = Z_95**2
    middle = share + z2 / (2 * trials)
    half = Z_95 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return max(0.0, (middle - half) / (1 + z2 / trials)), min(1.0, (middle + half) / (1 + z2 / trials))
