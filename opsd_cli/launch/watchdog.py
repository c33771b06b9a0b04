"""The watchdog: notices that no rank makes progress, and reports what each was doing. Progress is any change of a
rank's heartbeat file, timed here, so that clocks of other machines do not matter. A rank that waits for another is as
silent as that one: only when all are silent is something wrong."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from opsd_cli.launch.far_ranks import named
from opsd_cli.launch.rank_environ import PACKAGE_ROOT
from opsd_cli.run.folder import shell_path
from opsd_cli.run.heartbeat import RankStatus, read_status

_STACK_SECONDS = 2.0
_FRAME = re.compile(r'File "(.+)", line (\d+) in (\S+)')


class Watchdog:
    """Watches the heartbeat files in the folder `logs`. `hosts`: of each rank, where they are on several machines."""

    def __init__(self, logs: Path, ranks: Sequence[int], seconds: float | None, *, hosts: Sequence[str] = ()) -> None:
        now = time.monotonic()
        self._logs, self._seconds, self._hosts = logs, seconds, hosts
        self._entered_at = dict.fromkeys(ranks, now)  # when a rank was first seen in its phase (monotonic)
        # A rank's last status, and when it last changed (monotonic).
        self._seen: dict[int, tuple[RankStatus | None, float]] = dict.fromkeys(ranks, (None, now))
        self._looked_at = now

    def is_stalled(self) -> bool:
        """Whether no rank has made progress for too long. Looks at the files about ten times in that time."""
        now = time.monotonic()
        if self._seconds is None or now - self._looked_at < min(1.0, self._seconds / 10):
            return False
        self._looked_at = now
        for file in self._logs.glob("rank_*.phase"):
            rank = int(file.stem.removeprefix("rank_"))
            status = read_status(file)
            before = self._seen[rank][0] if rank in self._seen else None
            if rank not in self._seen or status != before:
                self._seen[rank] = status, now
            if status and (before is None or status.entered != before.entered):
                self._entered_at[rank] = now
        return all(now - at >= self._seconds for _, at in self._seen.values())

    def slowest(self) -> int:
        """The rank the others wait for: it does not wait itself, has entered the fewest phases, is silent longest."""

        def place(rank: int) -> tuple[bool, int, float]:
            status, at = self._seen[rank]
            return (False, 0, at) if status is None else (status.waits, status.entered, at)

        return min(sorted(self._seen), key=place)

    def report(self, ask_for_stacks: Callable[[], None]) -> list[str]:
        """One line for each rank: its phase, for how long, the code it is in, where its stacks are."""
        files = [self._logs / f"rank_{rank}.stacks" for rank in self._seen]
        sizes = {file: file.stat().st_size for file in files if file.exists()}
        ask_for_stacks()
        deadline = time.monotonic() + _STACK_SECONDS
        while any(file.stat().st_size == size for file, size in sizes.items()) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.1)  # for the rest of a stack that has begun to appear
        return [self._line(rank) for rank in sorted(self._seen)]

    def message(self) -> str:
        """What happened, in one line that names the slowest rank."""
        rank = self.slowest()
        return (
            f"no progress on any rank for {self._seconds:.0f} s (launcher.stall_seconds); "
            f"{named(rank, self._hosts)} is the slowest: "
            f"{self._doing(rank)}; resume to try again, and raise launcher.stall_seconds if it was only slow"
        )

    def _line(self, rank: int) -> str:
        who, stacks = named(rank, self._hosts), self._logs / f"rank_{rank}.stacks"
        text = stacks.read_text(encoding="utf-8", errors="replace") if stacks.exists() else ""
        if not text:
            return f"{who}: {self._doing(rank)}; log: {shell_path(self._logs / f'rank_{rank}.log')}"
        where = "".join(f", {frame}" for frame in innermost(text))
        return f"{who}: {self._doing(rank)}{where}; stacks: {shell_path(stacks)}"

    def _doing(self, rank: int) -> str:
        status, at = self._seen[rank]
        silent = f"silent for {time.monotonic() - at:.0f} s"
        if status is None:
            return f"has not begun, {silent}"
        waits = ", waiting for the other ranks" if status.waits else ""
        return f"in '{status.phase}' for {time.monotonic() - self._entered_at[rank]:.0f} s{waits}, {silent}"


def innermost(stacks: str) -> list[str]:
    """The innermost line of opsd's own code in the thread that runs it, the last one listed; at most one."""
    for thread in reversed(stacks.split("\n\n")):
        frames = [frame for frame in _FRAME.findall(thread) if f"{os.sep}opsd_cli{os.sep}" in frame[0]]
        if frames and not frames[-1][0].endswith("heartbeat.py"):
            file, line, function = frames[0]
            return [f"at {file.removeprefix(f'{PACKAGE_ROOT}{os.sep}')}:{line} in {function}"]
    return []
