"""What several completions of each problem say: avg@k, pass@k and maj@k, with intervals over problems. The only place
where these are estimated; pure Python.

A problem is the unit of sampling: completions of one problem are not independent, so that a hundred problems with eight
completions each are a hundred observations and not eight hundred.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

from opsd_cli.insight.paired import wilson_limits

SUBSETS = 200  # of a problem's completions, over which maj@k is averaged where there are more


@dataclass(frozen=True)
class Estimate:
    """A mean over problems, each of which has a value from 0 to 1, and its 95 % interval."""

    value: float
    low: float
    high: float
    problems: int


def average_at(right: Sequence[Sequence[bool]]) -> Estimate:
    """avg@k: the accuracy of one completion, from the k of each problem. `right` holds a list for each problem, of
    whether each of its completions is right; all lists are equally long."""
    return mean_of([sum(one) / len(one) for one in right], most=sum(map(len, right)))


def pass_at(right: Sequence[Sequence[bool]], k: int) -> Estimate:
    """pass@k: how often at least one of k completions is right, from n >= k of each problem."""
    return mean_of([chance_of_one(len(one), sum(one), k) for one in right])


def chance_of_one(samples: int, right: int, k: int) -> float:
    """The chance that at least one of `k` completions is right, where `right` of `samples` were: 1 - C(n-c, k)/C(n, k),
    without bias (Chen et al. 2021, 2107.03374, equation 1). Raises ValueError for k above n."""
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs at least {k} completions of each problem, and there are {samples}")
    return 1.0 - comb(samples - right, k) / comb(samples, k)


@dataclass(frozen=True)
class Vote:
    """What one completion says: a number that completions share which state the same answer, None where it states
    none; and whether that answer is right."""

    answer: int | None
    right: bool


def majority_at(votes: Sequence[Sequence[Vote]], k: int, *, seed: int = 0) -> Estimate:
    """maj@k: how often the answer that most of k completions state is right (self-consistency, 2203.11171), from
    n >= k of each problem. Below n it is averaged over subsets, all of them or 200 drawn by `seed`. A completion
    without an answer has no vote; of answers with equally many, each is taken with the same chance; no vote at all is
    wrong."""
    values = []
    for number, one in enumerate(votes):
        subsets = list(_subsets(one, k, seed=f"{seed} {number}"))
        values.append(sum(map(_majority, subsets)) / len(subsets))
    return mean_of(values)


def _subsets(votes: Sequence[Vote], k: int, *, seed: str) -> Iterable[Sequence[Vote]]:
    if comb(len(votes), k) <= SUBSETS:
        return combinations(votes, k)
    draw = random.Random(seed)
    return (draw.sample(votes, k) for _ in range(SUBSETS))


def _majority(votes: Sequence[Vote]) -> float:
    """The chance that the answer of most is right."""
    counts = Counter(vote.answer for vote in votes if vote.answer is not None)
    most = max(counts.values(), default=0)
    first = [answer for answer, count in counts.items() if count == most]
    right = {vote.answer for vote in votes if vote.right}
    return sum(answer in right for answer in first) / len(first) if first else 0.0


def mean_of(values: Sequence[float], *, most: int | None = None) -> Estimate:
    """The mean of one value from 0 to 1 for each problem, and its interval: that of Wilson, for as many yes-or-no
    problems as would scatter like these values (the effective sample size of survey statistics). Values of 0 and 1
    alone give exactly Wilson's. `most`: the completions behind them, which no effective size exceeds."""
    problems = len(values)
    mean = sum(values) / problems
    scatter = sum((value - mean) ** 2 for value in values) / problems
    size: float = problems
    if scatter > 0:
        size = min(problems * mean * (1 - mean) / scatter, max(problems, most or problems))
    return Estimate(mean, *wilson_limits(mean, size), problems)


def ladder(samples: int) -> list[int]:
    """The k at which something is told of so many completions: powers of two, and all."""
    return sorted({samples, *(2**power for power in range(samples.bit_length()) if 2**power <= samples)})
