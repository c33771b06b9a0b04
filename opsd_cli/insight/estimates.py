"""Numbers with their 95 % intervals, where problems are drawn at random and each is tried several times: shares of what
failed, and differences over problems and seeds (avg@k and pass@k: `at_k`). tests/test_estimates.py has how often each
interval covers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from opsd_cli.insight.paired import Comparison, wilson_interval

GRID = 400  # of Simpson's rule; even


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float


def points(estimate: Estimate | Comparison) -> str:
    """`+37.2 points [28.0, 45.9]`."""
    value = estimate.gain if isinstance(estimate, Comparison) else estimate.value
    return f"{100 * value:+.1f} points [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate | None:
    """Sum over sum, of clusters that were drawn at random, such as the rollouts of a problem: the ratio estimator with
    its linearised variance (Cochran 1977, section 6.4) and a t interval. None where the denominators sum to nothing."""
    total, n = sum(denominators), sum(value > 0 for value in denominators)
    if total <= 0:
        return None
    share = sum(numerators) / total
    residuals = [y - share * x for y, x in zip(numerators, denominators, strict=True) if x > 0]
    spread = math.sqrt(sum(value * value for value in residuals))
    if n < 2 or spread == 0.0:
        # Nothing varied among n clusters: what else there may be is bounded as for none of n.
        half = wilson_interval(0, n)[1]
    else:
        half = t_quantile(n - 1) * math.sqrt(n / (n - 1)) * spread / total
    return Estimate(share, share - half, share + half)


def mean(values: Sequence[float]) -> Estimate | None:
    """Of problems that were drawn at random."""
    return ratio(values, [1.0] * len(values))


def crossed(differences: Sequence[Sequence[float]]) -> Estimate | None:
    """The mean of differences [problem][seed], where both the problems and the seeds are a sample: two-way random
    effects, with degrees of freedom after Satterthwaite (1946). The mean squares of problems and of seeds are added and
    the rest is not taken off, as it might be: with few seeds an interval that is a little wide (it covers 98 % where
    seeds do nothing) is worth more than one that is sometimes far too narrow. With a single seed, what a seed does is
    not known, and only problems count. None without differences."""
    if not differences or not differences[0]:
        return None
    rows, columns = len(differences), len(differences[0])
    of_problem = [sum(row) / columns for row in differences]
    if columns == 1 or rows == 1:
        return mean(of_problem)
    whole = sum(of_problem) / rows
    of_seed = [sum(row[s] for row in differences) / rows for s in range(columns)]
    problems = columns * sum((value - whole) ** 2 for value in of_problem) / (rows - 1)
    seeds = rows * sum((value - whole) ** 2 for value in of_seed) / (columns - 1)
    parts = ((problems, rows - 1), (seeds, columns - 1))
    variance = sum(square for square, _ in parts) / (rows * columns)
    if variance == 0.0:
        return mean(of_problem)
    freedom = sum(square for square, _ in parts) ** 2 / sum(square**2 / count for square, count in parts)
    half = t_quantile(freedom) * math.sqrt(variance)
    return Estimate(whole, whole - half, whole + half)


@cache
def t_quantile(freedom: float) -> float:
    """Where Student's t with so many degrees of freedom (at least 1) leaves 2.5 % above it."""
    low, high = 0.0, math.pi / 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 0.475 else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _within(angle: float, freedom: float) -> float:
    """The chance of 0 to sqrt(freedom) tan(angle): t's density under that substitution is a power of the cosine."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    step, power = angle / GRID, freedom - 1
    inner = sum((4 if i % 2 else 2) * math.pow(math.cos(i * step), power) for i in range(1, GRID))
    return scale * step / 3 * (1.0 + inner + math.pow(math.cos(angle), power))
