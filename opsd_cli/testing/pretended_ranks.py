"""As many ranks as one likes in one process, a thread each: what they tell each other passes through a table, and what
each sends and receives is counted. Nothing but the transport is pretended."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Barrier, Thread, stack_size
from typing import Any

SECONDS = 120.0  # a rank waits for the others
STACK = 2**20  # bytes of a thread's stack


class Table:
    """Where what ranks tell each other lies, and where they wait for one another."""

    def __init__(self, world_size: int) -> None:
        self.values: list[Any] = [None] * world_size
        self.barrier = Barrier(world_size)


@dataclass
class PretendedRanks:
    """One of the ranks. `sent` and `received` are bytes, as pickled; `seconds` those of this thread's processor."""

    rank: int
    world_size: int
    table: Table
    sent: int = 0
    received: int = 0
    seconds: float = 0.0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        mine = pickle.dumps(value)
        parts = self._meet(mine)
        self.sent += len(mine) * (self.world_size - 1)
        self.received += sum(map(len, parts)) - len(mine)
        return [pickle.loads(part) for part in parts]

    def all_sum(self, values: Sequence[float]) -> list[float]:
        return [sum(column) for column in zip(*self._meet(list(values)), strict=True)]

    def any(self, flag: bool) -> bool:
        return any(self._meet(flag))

    def largest(self, value: int) -> int:
        return int(max(self._meet(value)))

    def from_first(self, value: Any) -> Any:
        """Rank 0's value."""
        return pickle.loads(self._meet(pickle.dumps(value))[0])

    def to_first(self, value: Any) -> list[Any]:
        """Every rank's value on rank 0, nothing elsewhere."""
        mine = pickle.dumps(value)
        parts = self._meet(mine)
        if self.rank > 0:
            self.sent += len(mine)
            return []
        self.received += sum(map(len, parts[1:]))
        return [pickle.loads(part) for part in parts]

    def hand_out(self, values: Sequence[Any]) -> Any:
        """This rank's of rank 0's values."""
        parcels = [*map(pickle.dumps, values)] if self.rank == 0 else []
        mine = self._meet(parcels)[0][self.rank]
        if self.rank == 0:
            self.sent += sum(map(len, parcels[1:]))
        else:
            self.received += len(mine)
        return pickle.loads(mine)

    def exchange(self, parcels: Mapping[int, bytes], expected: Mapping[int, int]) -> dict[int, bytes]:
        """What others send to this one. Raises AssertionError where that is not of the size that was expected."""
        sent = self._meet(dict(parcels))
        arrived = {home: sent[home][self.rank] for home in expected}
        assert {home: len(parcel) for home, parcel in arrived.items()} == dict(expected), "another size was announced"
        assert {home for home, one in enumerate(sent) if self.rank in one} == set(expected), "what comes was announced"
        self.sent += sum(map(len, parcels.values()))
        self.received += sum(map(len, arrived.values()))
        return arrived

    def _meet(self, value: Any) -> list[Any]:
        """Every rank's value, once all are here."""
        self.table.values[self.rank] = value
        self.table.barrier.wait(SECONDS)
        values = list(self.table.values)
        self.table.barrier.wait(SECONDS)
        return values


def on_ranks(world_size: int, work: Callable[[PretendedRanks], Any]) -> tuple[list[Any], list[PretendedRanks]]:
    """What `work` returns on each of so many ranks, and what they have counted. An error of any is raised."""
    table = Table(world_size)
    ranks = [PretendedRanks(rank, world_size, table) for rank in range(world_size)]
    results: list[Any] = [None] * world_size
    errors: list[BaseException] = []

    def run(rank: PretendedRanks) -> None:
        try:
            start = time.thread_time()
            results[rank.rank] = work(rank)
            rank.seconds = time.thread_time() - start
        except BaseException as error:
            errors.append(error)
            table.barrier.abort()

    before = stack_size(STACK)
    try:
        threads = [Thread(target=run, args=[rank]) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        stack_size(before)
    if errors:
        raise errors[0]
    return results, ranks
