"""Signs of life: what a rank is at, kept in a small file that the supervisor reads, and its stacks when it is asked for
them. Owns the form of both files (`logs/rank_K.phase`, `logs/rank_K.stacks`); what silence means is the watchdog's
business. Torch-free.

A phase change is one small write in place. A sign of life within a phase is a look at the clock, and one write a second
at most, so it may be given for every token.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from opsd_cli.run.folder import RunFolder
from opsd_cli.safety.secrets import redacted

ASKS_FOR_STACKS = signal.SIGUSR1
BEAT_SECONDS = 1.0
BYTES_SECONDS = 5.0
MOVED_BYTES = 2**20  # a process that waits reads and writes far less than this between two looks
_LINE_BYTES = 256


@dataclass(frozen=True)
class Beat:
    """What a rank last said of itself."""

    phase: str
    entered: int  # phases entered so far, this one with them
    since: float  # unix time at which it was entered
    waits: bool  # for the other ranks
    beats: int  # signs of life so far


class Pulse:
    """This rank's own signs of life. Opening it also registers the signal that asks for stacks."""

    def __init__(self, folder: RunFolder, rank: int) -> None:
        folder.logs.mkdir(exist_ok=True)
        self._file = os.open(folder.phase_of(rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._beat = Beat("starting", 1, time.time(), waits=False, beats=0)
        self._next = 0.0
        self.beat()
        self._stacks = open(folder.stacks_of(rank), "w", encoding="utf-8")  # noqa: SIM115  # for the process's life
        faulthandler.register(ASKS_FOR_STACKS, file=self._stacks, all_threads=True)
        if Path("/proc/self/io").exists():
            threading.Thread(target=self._watch_bytes, daemon=True).start()

    def enter(self, phase: str) -> None:
        """Say which phase begins."""
        self._beat = Beat(redacted(phase), self._beat.entered + 1, time.time(), waits=False, beats=self._beat.beats)
        self._write()

    def beat(self) -> None:
        """A sign of life within the phase; cheap enough for every token."""
        if time.monotonic() >= self._next:
            self._write()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While this rank waits for the others: it is not the one that is behind."""
        self._write(waits=True)
        yield  # an error leaves the mark: whoever raised it was waiting
        self._write()

    def _write(self, *, waits: bool = False) -> None:
        before = self._beat
        self._next = time.monotonic() + BEAT_SECONDS
        self._beat = Beat(before.phase, before.entered, before.since, waits, before.beats + 1)
        line = json.dumps(list(vars(self._beat).values())).encode()[: _LINE_BYTES - 1]
        with contextlib.suppress(OSError):  # a full disk must not end a run through its signs of life
            os.pwrite(self._file, line.ljust(_LINE_BYTES - 1) + b"\n", 0)

    def _watch_bytes(self) -> None:
        """Downloading, loading and saving give no sign of their own: the bytes that this process moves are theirs."""
        moved = bytes_moved()
        while True:
            time.sleep(BYTES_SECONDS)
            if (now := bytes_moved()) - moved >= MOVED_BYTES:
                self._write(waits=self._beat.waits)
            moved = now


def bytes_moved() -> int:
    """Bytes this process has read and written so far: through calls, and between its memory and a disk."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/io", encoding="ascii") as counters:
        return sum(int(line.split()[1]) for line in counters if not line.startswith(("sys", "cancelled")))
    return 0


def read_beat(file: Path) -> Beat | None:
    """What a rank last said of itself; None when there is nothing to read."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Beat(*json.loads(file.read_text(encoding="utf-8")))
    return None
