"""Which rollouts are scored together, and by which rank: the plan of a step's micro-batches.

All rollouts of a step, whichever rank drew them, are sorted by length and cut into as many pieces as there are
micro-batches on all ranks, with about the same number of tokens each. Where the rollouts of a problem share its
prompts they stay together, as far as the budget lets them. Every rank computes the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby

from opsd_cli.data.pairing import Weighed, row_length, shared_length


def plan_microbatches(
    drawn: Sequence[Sequence[Weighed]], *, rank: int, max_tokens: int, padded: bool, shares: bool = False
) -> list[list[Weighed]]:
    """This rank's micro-batches of everything that the ranks drew (one list each): at most `max_tokens` tokens in the
    longer role, or a single longer row. `padded` counts a row as long as the longest beside it; where it `shares`, a
    prompt that rows have in common counts once. Ranks may get different numbers of micro-batches. Rollouts whose tokens
    all have weight 0 are left out."""
    weighed = [one for of_rank in drawn for one in of_rank if any(one[1])]
    units = groups_within(weighed, max_tokens) if shares else [[one] for one in weighed]
    units.sort(key=unit_length)
    pieces = cut_to_budget(list(map(unit_length, units)), ranks=len(drawn), max_tokens=max_tokens, padded=padded)
    # Neighbours have similar lengths, so dealing them out in turn gives all ranks equal work at the same time: none
    # waits for another in a collective.
    mine = [units[start:stop] for start, stop in pieces[rank :: len(drawn)] if stop > start]
    return [[one for unit in piece for one in unit] for piece in mine]


def groups_within(weighed: Sequence[Weighed], max_tokens: int) -> list[list[Weighed]]:
    """The rollouts of each problem, the shortest first, in as few groups as keep to `max_tokens`."""
    units: list[list[Weighed]] = []
    for _, group in groupby(weighed, key=lambda one: one[0].place):
        units.append([])
        for one in sorted(group, key=lambda one: row_length(one[0])):
            if units[-1] and unit_length([*units[-1], one]) > max_tokens:
                units.append([])
            units[-1].append(one)
    return units


def unit_length(unit: Sequence[Weighed]) -> int:
    """Tokens of the longest role of rollouts whose common prompts stand once."""
    return shared_length([rollout for rollout, _ in unit])


def cut_to_budget(lengths: Sequence[int], *, ranks: int, max_tokens: int, padded: bool) -> list[tuple[int, int]]:
    """Cut ascending `lengths` into a multiple of `ranks` contiguous pieces, the fewest that keep to `max_tokens`."""
    if not lengths:
        return []
    # No fewer rounds than this can hold the tokens. An even cut may still break the budget (rows are not divisible, and
    # padding adds to them), so add rounds until it does not; a piece of one row is as small as a piece gets.
    rounds = max(1, -(-sum(lengths) // (ranks * max_tokens)))
    while True:
        pieces = cut_evenly(lengths, rounds * ranks)
        sizes = [(stop - start) * lengths[stop - 1] if padded else sum(lengths[start:stop]) for start, stop in pieces]
        if all(
            size <= max_tokens or stop - start == 1
            for size, (start, stop) in zip(sizes, pieces, strict=True)
            if stop > start
        ):
            return pieces
        rounds += 1


def cut_evenly(lengths: Sequence[int], count: int) -> list[tuple[int, int]]:
    """`count` contiguous pieces (start, stop) with about the same sum; some may be empty."""
    # Lay the rows end to end on a ruler with `count` equal parts: a row belongs to the part in which its middle falls.
    total = sum(lengths)
    middles = [after - length / 2 for after, length in zip(accumulate(lengths), lengths, strict=True)]
    owners = [min(count - 1, int(middle * count / total)) for middle in middles]
    starts = [next((i for i, owner in enumerate(owners) if owner >= piece), len(owners)) for piece in range(count)]
    return list(zip(starts, [*starts[1:], len(owners)], strict=True))
