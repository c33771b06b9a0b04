"""Which rollouts are scored together, and by which rank. Owns the plan of a step's micro-batches; lays nothing out.

All rollouts of a step, whichever rank drew them, are sorted by length and cut into as many pieces as there are
micro-batches on all ranks, with about the same number of tokens each. Neighbours go to different ranks, so that ranks
have equal work at the same time and rows of one micro-batch have similar lengths. Every rank makes the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from opsd_cli.data.pairing import Weighed, row_length


def shared_out(drawn: Sequence[Sequence[Weighed]], *, rank: int, max_tokens: int, padded: bool) -> list[list[Weighed]]:
    """This rank's micro-batches of everything that the ranks drew (one list each): at most `max_tokens` tokens in the
    longer role, or one row that is longer. `padded` counts a row as long as the longest beside it. Ranks may get
    different numbers of them. Rollouts whose tokens all weigh nothing add nothing and are left out."""
    kept = [weighed for one in drawn for weighed in one if any(weighed[1])]
    kept.sort(key=lambda weighed: row_length(weighed[0]))
    cuts = plan([row_length(rollout) for rollout, _ in kept], ranks=len(drawn), max_tokens=max_tokens, padded=padded)
    return [kept[start:stop] for start, stop in cuts[rank :: len(drawn)] if stop > start]


def plan(lengths: Sequence[int], *, ranks: int, max_tokens: int, padded: bool) -> list[tuple[int, int]]:
    """Cut ascending `lengths` into a multiple of `ranks` contiguous pieces, the fewest that keep to `max_tokens`."""
    if not lengths:
        return []
    rounds = max(1, -(-sum(lengths) // (ranks * max_tokens)))
    while True:
        pieces = cut(lengths, rounds * ranks)
        sizes = [(stop - start) * lengths[stop - 1] if padded else sum(lengths[start:stop]) for start, stop in pieces]
        if all(
            size <= max_tokens or stop - start == 1
            for size, (start, stop) in zip(sizes, pieces, strict=True)
            if stop > start
        ):
            return pieces
        rounds += 1


def cut(lengths: Sequence[int], count: int) -> list[tuple[int, int]]:
    """`count` contiguous pieces with about the same sum: a row goes where its middle falls. Some may be empty."""
    total = sum(lengths)
    middles = [after - length / 2 for after, length in zip(accumulate(lengths), lengths, strict=True)]
    owners = [min(count - 1, int(middle * count / total)) for middle in middles]
    starts = [next((i for i, owner in enumerate(owners) if owner >= piece), len(owners)) for piece in range(count)]
    return list(zip(starts, [*starts[1:], len(owners)], strict=True))
