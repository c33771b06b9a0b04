"""Which rollouts are scored together, and by which rank: the plan of a step's micro-batches.

All rollouts of a step, whichever rank drew them, are sorted by length and cut into as many pieces as there are
micro-batches on all ranks, with about the same number of tokens each. Every rank computes the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from opsd_cli.data.pairing import Weighed, row_length


def plan_microbatches(
    drawn: Sequence[Sequence[Weighed]], *, rank: int, max_tokens: int, padded: bool
) -> list[list[Weighed]]:
    """This rank's micro-batches of everything that the ranks drew (one list each): at most `max_tokens` tokens in the
    longer role, or a single longer row. `padded` counts a row as long as the longest beside it. Ranks may get different
    numbers of micro-batches. Rollouts whose tokens all have weight 0 are left out."""
    weighed = [one for of_rank in drawn for one in of_rank if any(one[1])]
    weighed.sort(key=lambda one: row_length(one[0]))
    pieces = cut_to_budget(
        [row_length(rollout) for rollout, _ in weighed], ranks=len(drawn), max_tokens=max_tokens, padded=padded
    )
    # Neighbours have similar lengths, so dealing them out in turn gives all ranks equal work at the same time: none
    # waits for another in a collective.
    return [weighed[start:stop] for start, stop in pieces[rank :: len(drawn)] if stop > start]


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
