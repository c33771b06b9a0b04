"""Which rollouts are scored together, and by which rank: the plan of a step's micro-batches.

All rollouts of a step, whichever rank drew them, are sorted by length and cut into as many pieces as there are
micro-batches on all ranks, with about the same number of tokens each. Where the rollouts of a problem share its
prompts they stay together, as far as the budget lets them. The plan is made from outlines, lengths above all, so that
one rank can make it for all without seeing a token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

from opsd_cli.data.pairing import Weighed

Row = tuple[int, int]
"""A rollout of a step: the rank that drew it, and which of that rank's rollouts it is."""


class Outline(NamedTuple):
    """What the plan has to know of a rollout."""

    place: int  # of its problem in the stream of all problems
    number: int  # among the rollouts of that problem
    prompts: tuple[int, int, int]  # tokens of the student's, the teacher's and the third prompt
    same: tuple[int, int, int]  # for each of them a number that prompts of this rank share when they are equal
    completion: int  # tokens
    counts: bool  # some token of it has a weight
    size: int = 0  # bytes, when it is sent to another rank
    digest: bytes = b""  # of the completion


def outlines_of(weighed: Sequence[Weighed]) -> list[Outline]:
    """The outlines of a rank's rollouts, in order."""
    known: dict[tuple[int, ...], int] = {}
    outlines = []
    for rollout, weights in weighed:
        roles = (rollout.prompt.student_ids, rollout.prompt.teacher_ids, rollout.prompt.other_ids)
        student, teacher, other = roles
        first, second, third = (known.setdefault(ids, len(known)) for ids in roles)
        lengths = (len(student), len(teacher), len(other))
        completion, counts = len(rollout.completion_ids), any(weights)
        outlines.append(Outline(rollout.place, rollout.number, lengths, (first, second, third), completion, counts))
    return outlines


def plan_microbatches(
    drawn: Sequence[Sequence[Weighed]], *, rank: int, max_tokens: int, padded: bool, shares: bool = False
) -> list[list[Weighed]]:
    """The micro-batches of `rank`, where all rollouts that the ranks drew (one list each) are at hand: see
    `plan_rows`."""
    outlines = [outlines_of(of_rank) for of_rank in drawn]
    plan = plan_rows(outlines, max_tokens=max_tokens, padded=padded, shares=shares)
    return [[drawn[home][index] for home, index in batch] for batch in plan[rank]]


def plan_rows(
    drawn: Sequence[Sequence[Outline]], *, max_tokens: int, padded: bool, shares: bool
) -> list[list[list[Row]]]:
    """Every rank's micro-batches of everything that the ranks drew (one list each): at most `max_tokens` tokens in the
    longer role, or a single longer row. `padded` counts a row as long as the longest beside it; where it `shares`, a
    prompt that rows have in common counts once. Ranks may get different numbers of micro-batches. Rollouts whose tokens
    all have weight 0 are left out."""
    rows = [(home, index) for home, of_rank in enumerate(drawn) for index, one in enumerate(of_rank) if one.counts]
    lengths = {row: max(drawn[row[0]][row[1]].prompts) + drawn[row[0]][row[1]].completion for row in rows}
    units: list[tuple[int, list[Row]]] = [(lengths[row], [row]) for row in rows]
    if shares:
        units = groups_within(drawn, rows, lengths, max_tokens)
    units.sort(key=lambda unit: unit[0])
    pieces = cut_to_budget([length for length, _ in units], ranks=len(drawn), max_tokens=max_tokens, padded=padded)
    plan: list[list[list[Row]]] = [[] for _ in drawn]
    # Neighbours have similar lengths, so giving each rank one of them in turn is equal work at the same time: none
    # waits for another in a collective.
    for first in range(0, len(pieces), len(drawn)):
        one_each = pieces[first : first + len(drawn)]
        batches = [[row for _, unit in units[start:stop] for row in unit] for start, stop in one_each]
        for batch, owner in zip(batches, owners_of(batches), strict=True):
            plan[owner] += [batch] if batch else []
    return plan


def owners_of(batches: Sequence[Sequence[Row]]) -> list[int]:
    """Which rank takes each of as many micro-batches as there are ranks, one each, so that few rows leave the rank that
    drew them: at most twice as many stay where they are in the best assignment, and no fewer than in plain order."""
    stays = [Counter(home for home, _ in batch) for batch in batches]
    owners: dict[int, int] = {}
    free = set(range(len(batches)))
    for _, batch, home in sorted((-count, batch, home) for batch, of in enumerate(stays) for home, count in of.items()):
        if batch not in owners and home in free:
            owners[batch] = home
            free.remove(home)
    rest = iter(sorted(free))
    found = [owners[batch] if batch in owners else next(rest) for batch in range(len(batches))]
    in_order = list(range(len(batches)))
    kept, plain = (sum(stays[batch][rank] for batch, rank in enumerate(ranks)) for ranks in (found, in_order))
    return found if kept > plain else in_order


def groups_within(
    drawn: Sequence[Sequence[Outline]], rows: Sequence[Row], lengths: dict[Row, int], max_tokens: int
) -> list[tuple[int, list[Row]]]:
    """The rollouts of each problem, the shortest first, in as few groups as keep to `max_tokens`; each with its tokens
    in the longer role, where a prompt that the row before has too counts once."""
    units: list[tuple[int, list[Row]]] = []
    for _, group in groupby(rows, key=lambda row: drawn[row[0]][row[1]].place):
        prompts, before, completions = [0, 0, 0], (-1, -1, -1), 0
        is_first = True
        for row in sorted(group, key=lengths.__getitem__):
            one = drawn[row[0]][row[1]]
            new = [0 if one.same[role] == before[role] else one.prompts[role] for role in range(3)]
            longer = max(map(sum, zip(prompts, new, strict=True))) + completions + one.completion
            if is_first or longer > max_tokens:
                prompts, completions, is_first = list(one.prompts), one.completion, False
                units.append((lengths[row], [row]))
            else:
                prompts, completions = [*map(sum, zip(prompts, new, strict=True))], completions + one.completion
                units[-1] = (longer, [*units[-1][1], row])
            before = one.same
    return units


def cut_to_budget(lengths: Sequence[int], *, ranks: int, max_tokens: int, padded: bool) -> list[tuple[int, int]]:
    """Cut ascending `lengths` into a multiple of `ranks` contiguous pieces, the fewest that keep to `max_tokens`."""
    if not lengths:
        return []
    # No fewer rounds than this can hold the tokens. An even cut may still break the budget (rows are not divisible, and
    # padding adds to them), so add rounds until it does not; a piece of one row is as small as a piece gets.
    each = np.array(lengths, dtype=np.int64)
    before = np.concatenate([[0], each.cumsum()])
    rounds = max(1, -(-int(before[-1]) // (ranks * max_tokens)))
    while True:
        starts, stops = cut_evenly(each, before, rounds * ranks)
        rows = stops - starts
        sizes = rows * each[np.maximum(stops, 1) - 1] if padded else before[stops] - before[starts]
        if bool(((sizes <= max_tokens) | (rows <= 1)).all()):
            return list(zip(starts.tolist(), stops.tolist(), strict=True))
        rounds += 1


def cut_evenly(each: np.ndarray, before: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Where `count` contiguous pieces with about the same sum start and stop; some may be empty. `before` is what comes
    before each row, and the sum."""
    # Lay the rows end to end on a ruler with `count` equal parts: a row belongs to the part in which its middle falls.
    middles = before[1:] - each / 2
    owners = np.minimum(count - 1, (middles * count / before[-1]).astype(np.int64))
    starts = np.searchsorted(owners, np.arange(count), side="left")
    return starts, np.append(starts[1:], len(each))
