"""The watchdog: notices that no rank moves any more, and says what each was at. Owns what silence means and the words
for it; the files it reads are `pulse`'s, the ends of processes the supervisor's.

Movement is any change of what a rank says of itself, seen from here, so that clocks of other machines do not matter. A
rank that waits for another moves no more than that one does: only when all are silent something is wrong.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from opsd_cli.launch.machine import PACKAGE_ROOT
from opsd_cli.run.folder import shown
from opsd_cli.run.heartbeat import Beat, read_beat

_STACK_SECONDS = 2.0
_FRAME = re.compile(r'File "(.+)", line (\d+) in (\S+)')


@dataclass
class _Seen:
    """What is known of one rank: its last word, and when that last changed here."""

    beat: Beat | None
    at: float


class Watchdog:
    """Watches the ranks that leave their signs of life in the folder `logs`."""

    def __init__(self, logs: Path, ranks: Sequence[int], seconds: float | None) -> None:
        now = time.monotonic()
        self._logs, self._seconds = logs, seconds
        self._seen = {rank: _Seen(None, now) for rank in ranks}
        self._looked_at = now

    def finds_silence(self) -> bool:
        """Whether no rank has moved for too long. Looks at the files about ten times in that time."""
        now = time.monotonic()
        if self._seconds is None or now - self._looked_at < min(1.0, self._seconds / 10):
            return False
        self._looked_at = now
        for file in self._logs.glob("rank_*.phase"):
            rank = int(file.stem.removeprefix("rank_"))
            beat = read_beat(file)
            if rank not in self._seen or beat != self._seen[rank].beat:
                self._seen[rank] = _Seen(beat, now)
        return all(now - seen.at >= self._seconds for seen in self._seen.values())

    def behind(self) -> int:
        """The rank the others wait for: one that does not wait itself, has entered fewest phases, moved longest ago."""

        def place(rank: int) -> tuple[bool, int, float]:
            seen = self._seen[rank]
            return (False, 0, seen.at) if seen.beat is None else (seen.beat.waits, seen.beat.entered, seen.at)

        return min(sorted(self._seen), key=place)

    def report(self, ask_for_stacks: Callable[[], None]) -> list[str]:
        """One line for each rank: its phase, for how long, where its program stands, where its stacks are."""
        files = [self._logs / f"rank_{rank}.stacks" for rank in self._seen]
        sizes = {file: file.stat().st_size for file in files if file.exists()}
        ask_for_stacks()
        deadline = time.monotonic() + _STACK_SECONDS
        while any(file.stat().st_size == size for file, size in sizes.items()) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.1)  # for the rest of a stack whose beginning is there
        return [self._line(rank) for rank in sorted(self._seen)]

    def verdict(self) -> str:
        """What happened, in one line that names the rank that is behind."""
        rank = self.behind()
        return (
            f"no rank has moved for {self._seconds:.0f} s (launcher.stall_seconds); rank {rank} is behind: "
            f"{self._at(rank)}; resume to try again, and raise launcher.stall_seconds if it was only slow"
        )

    def _line(self, rank: int) -> str:
        stacks = self._logs / f"rank_{rank}.stacks"
        text = stacks.read_text(encoding="utf-8", errors="replace") if stacks.exists() else ""
        if not text:
            return f"rank {rank}: {self._at(rank)}; log: {shown(self._logs / f'rank_{rank}.log')}"
        where = "".join(f", {frame}" for frame in innermost(text))
        return f"rank {rank}: {self._at(rank)}{where}; stacks: {shown(stacks)}"

    def _at(self, rank: int) -> str:
        seen = self._seen[rank]
        silent = f"silent for {time.monotonic() - seen.at:.0f} s"
        if seen.beat is None:
            return f"has not begun, {silent}"
        waits = ", waiting for the other ranks" if seen.beat.waits else ""
        return f"in '{seen.beat.phase}' for {max(0.0, time.time() - seen.beat.since):.0f} s{waits}, {silent}"


def innermost(stacks: str) -> list[str]:
    """The innermost line of opsd's own in the thread that runs it: the one that began in the worker; at most one."""
    for thread in reversed(stacks.split("\n\n")):
        frames = [frame for frame in _FRAME.findall(thread) if f"{os.sep}opsd_cli{os.sep}" in frame[0]]
        if frames and not frames[-1][0].endswith("heartbeat.py"):
            file, line, function = frames[0]
            return [f"at {file.removeprefix(f'{PACKAGE_ROOT}{os.sep}')}:{line} in {function}"]
    return []
