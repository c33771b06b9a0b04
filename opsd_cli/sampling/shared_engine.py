"""Completions of the ranks that hold one vLLM engine between them (`sampler.tensor_parallel`). vLLM then has a
scheduler in each of them, and they meet in every step: a rank that asked for something else, or left alone, would leave
the others waiting.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

from opsd_cli.engine.process_group import Ranks
from opsd_cli.sampling.token_sampling import Completion, Draw

AGREED_EVERY = 8  # steps of an engine, each a token of every row: agreeing takes up to a millisecond


def complete_together(
    group: Ranks,
    draws: Sequence[Draw],
    complete: Callable[[list[Draw], Callable[[], bool]], list[Completion]],
    should_stop: Callable[[], bool],
) -> list[Completion]:
    """One completion per draw of this rank, in order. `complete` is called once, on every rank of the group with the
    draws of all of them in rank order, and asks what it is given after each step whether to stop: for all, soon after
    any of them was asked to. Collective in the group, with other numbers of draws or none on some of them. Raises
    RuntimeError where the ranks have not drawn the same."""
    if group.world_size == 1:
        return complete(list(draws), should_stop)
    shares = group.gather(list(draws))
    completions = complete([draw for share in shares for draw in share], agreed(group, should_stop))
    if len(set(group.gather(checksum(completions)))) > 1:
        raise RuntimeError(
            f"the {group.world_size} ranks that hold one vLLM engine (sampler.tensor_parallel) have drawn different "
            "completions of the same draws"
        )
    first = sum(map(len, shares[: group.rank]))
    return completions[first : first + len(draws)]


def agreed(group: Ranks, should_stop: Callable[[], bool]) -> Callable[[], bool]:
    """Whether any rank of the group was asked to stop: the same answer everywhere to calls of the same number."""
    calls, wanted = 0, False

    def stops() -> bool:
        nonlocal calls, wanted
        calls += 1
        wanted = should_stop() or wanted  # asked every time: it is a sign of life too
        return calls % AGREED_EVERY == 0 and group.any(wanted)

    return stops


def checksum(completions: Sequence[Completion]) -> int:
    """Of their ids, equal in every process."""
    return zlib.crc32(repr([done.ids for done in completions]).encode())
