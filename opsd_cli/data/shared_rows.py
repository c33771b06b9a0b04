"""The rollouts of a step, of which each rank holds those that it drew: rank 0 plans the micro-batches of all from
outlines, tells each rank its own, and only rows that another rank scores are sent there. Nothing goes to every rank, so
what a rank sends and receives does not grow with their number.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

import numpy as np

from opsd_cli.data.microbatches import Outline, Row, outlines_of, plan_rows
from opsd_cli.data.pairing import Weighed
from opsd_cli.data.problems import PromptPair, Rollout, RolloutKey

PromptAt = Callable[[int], PromptPair]
"""The prompts at a place in the stream of all problems, which every rank has."""

HEAD = struct.Struct("<qiiiiii???")
ROLES = ("student_ids", "teacher_ids", "other_ids")
UNCHANGED = -1  # length of a prompt that the receiver has
NO_LAG = -1
NUMBER = 4  # bytes


class Exchanges(Protocol):
    """This rank among all, each of which can tell another something. Every method is collective."""

    rank: int
    world_size: int

    def to_first(self, value: Any) -> list[Any]: ...

    def hand_out(self, values: Sequence[Any]) -> Any: ...

    def exchange(self, parcels: Mapping[int, bytes], expected: Mapping[int, int]) -> dict[int, bytes]: ...


class Orders(NamedTuple):
    """What a rank is told of the plan."""

    batches: list[list[Row]]
    most: int  # micro-batches of any rank
    leaving: dict[int, list[int]]  # by the rank that wants them: which of this rank's rows
    arriving: dict[int, int]  # bytes, by the rank that sends them


class SharedRows:
    """What all ranks drew. Its methods are collective."""

    def __init__(self, own: Sequence[Weighed], ranks: Exchanges, prompt_at: PromptAt) -> None:
        self._own, self._ranks, self._prompt_at = list(own), ranks, prompt_at
        outlines = outlines_of(self._own)
        if ranks.world_size > 1:
            sizes = [size_of(one, prompt_at(one[0].place)) for one in self._own]
            outlines = [one._replace(size=size) for one, size in zip(outlines, sizes, strict=True)]
        digests = [digest_of(rollout) for rollout, _ in self._own]
        outlines = [one._replace(digest=digest) for one, digest in zip(outlines, digests, strict=True)]
        self._outlines: list[list[Outline]] = ranks.to_first(outlines)

    @property
    def keys(self) -> list[RolloutKey]:
        """Those of all rollouts, on rank 0."""
        return [(one.place, one.number) for of_rank in self._outlines for one in of_rank]

    @property
    def distinct(self) -> int:
        """How many different completions there are, on rank 0; elsewhere 0."""
        return len({one.digest for of_rank in self._outlines for one in of_rank})

    def dealt(self, *, max_tokens: int, padded: bool, shares: bool) -> list[list[Weighed]]:
        """This rank's micro-batches, as many as any rank has: the last of them may be empty. See `plan_rows`."""
        all_orders = self._orders(max_tokens=max_tokens, padded=padded, shares=shares) if self._outlines else []
        orders: Orders = self._ranks.hand_out(all_orders)
        leaving = {
            rank: b"".join(packed(self._own[index], self._prompt_at(self._own[index][0].place)) for index in indices)
            for rank, indices in orders.leaving.items()
        }
        arrived = self._ranks.exchange(leaving, orders.arriving)
        rows = {(self._ranks.rank, index): one for index, one in enumerate(self._own)}
        for home, parcel in arrived.items():
            indices = sorted(index for batch in orders.batches for sender, index in batch if sender == home)
            rows |= zip([(home, index) for index in indices], unpacked(parcel, self._prompt_at), strict=True)
        batches = [[rows[row] for row in batch] for batch in orders.batches]
        return batches + [[] for _ in range(orders.most - len(batches))]

    def _orders(self, *, max_tokens: int, padded: bool, shares: bool) -> list[Orders]:
        plan = plan_rows(self._outlines, max_tokens=max_tokens, padded=padded, shares=shares)
        most = max(1, *map(len, plan))
        leaving: list[defaultdict[int, list[int]]] = [defaultdict(list) for _ in plan]
        arriving: list[defaultdict[int, int]] = [defaultdict(int) for _ in plan]
        for rank, batches in enumerate(plan):
            for home, index in sorted(row for batch in batches for row in batch if row[0] != rank):
                leaving[home][rank].append(index)
                arriving[rank][home] += self._outlines[home][index].size
        return [Orders(batches, most, dict(leaving[rank]), dict(arriving[rank])) for rank, batches in enumerate(plan)]


def digest_of(rollout: Rollout) -> bytes:
    return blake2b(np.asarray(rollout.completion_ids, np.int64).tobytes(), digest_size=16).digest()


def size_of(one: Weighed, known: PromptPair) -> int:
    """Bytes of a row, packed for a rank that has its problem's prompts."""
    rollout, weights = one
    prompts = sum(len(ids) for ids in changed_prompts(rollout.prompt, known).values())
    return HEAD.size + NUMBER * (prompts + len(rollout.completion_ids) + len(rollout.logprobs) + len(weights))


def changed_prompts(prompt: PromptPair, known: PromptPair) -> dict[str, tuple[int, ...]]:
    """The prompts that the other ranks do not have, because rollouts are shown in them."""
    return {name: ids for name in ROLES if (ids := getattr(prompt, name)) != getattr(known, name)}


def packed(one: Weighed, known: PromptPair) -> bytes:
    """A row as bytes, without what the receiver has. Weights and log-probabilities are those of the micro-batch, in
    float32."""
    rollout, weights = one
    changed = changed_prompts(rollout.prompt, known)
    lengths = [len(changed[name]) if name in changed else UNCHANGED for name in ROLES]
    head = HEAD.pack(
        rollout.place, rollout.number, *lengths, len(rollout.completion_ids),
        NO_LAG if rollout.lag is None else rollout.lag,
        rollout.finish_reason == "stop", rollout.correct, bool(rollout.logprobs),
    )  # fmt: skip
    ids = [token for prompt in changed.values() for token in prompt] + list(rollout.completion_ids)
    numbers = np.asarray([*rollout.logprobs, *weights], np.float32)
    return head + np.asarray(ids, np.int32).tobytes() + numbers.tobytes()


def unpacked(parcel: bytes, prompt_at: PromptAt) -> list[Weighed]:
    """The rows of a parcel, in order."""
    rows: list[Weighed] = []
    start = 0
    while start < len(parcel):
        place, number, *lengths, completion, lag, stopped, correct, drawn = HEAD.unpack_from(parcel, start)
        counts = [max(0, length) for length in lengths] + [completion]
        ids = np.frombuffer(parcel, np.int32, sum(counts), start + HEAD.size).tolist()
        after = start + HEAD.size + NUMBER * len(ids)
        numbers = np.frombuffer(parcel, np.float32, completion * (1 + drawn), after).tolist()
        start = after + NUMBER * len(numbers)
        changed: dict[str, Any] = {}
        for name, length in zip(ROLES, lengths, strict=True):
            if length != UNCHANGED:
                changed[name], ids = tuple(ids[:length]), ids[length:]
        rollout = Rollout(
            replace(prompt_at(place), **changed), tuple(ids), "stop" if stopped else "length",
            tuple(numbers[:-completion]), place, number, correct, None if lag == NO_LAG else lag,
        )  # fmt: skip
        rows.append((rollout, numbers[-completion:]))
    return rows
