"""Signs of life: what a rank is doing, in a small file that the supervisor reads (`logs/rank_K.phase`), and its stacks
on request (`logs/rank_K.stacks`). What silence means, the watchdog decides. Entering a phase is one small write in
place. A beat within a phase is a look at the clock, and one write a second at most: cheap enough for every token."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from opsd_cli.run.folder import RunFolder
from opsd_cli.safety.secrets import redact

STACKS_SIGNAL = signal.SIGUSR1
BEAT_SECONDS = 1.0
BYTES_SECONDS = 5.0
MOVED_BYTES = 2**20  # a process that waits reads and writes far less than this between two looks
_LINE_BYTES = 256


@dataclass(frozen=True)
class RankStatus:
    phase: str
    entered: int  # phases entered so far, this one included
    since: float  # unix time at which it was entered
    waits: bool  # for the other ranks
    beats: int  # signs of life so far


class Heartbeat:
    """This rank's own signs of life. Opening it also registers the signal that asks for stacks."""

    def __init__(self, folder: RunFolder, rank: int) -> None:
        folder.logs.mkdir(exist_ok=True)
        self._file = os.open(folder.logs / f"rank_{rank}.phase", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._status = RankStatus("starting", 1, time.time(), waits=False, beats=0)
        self._next = 0.0
        self.beat()
        self._stacks = open(folder.logs / f"rank_{rank}.stacks", "w", encoding="utf-8")  # noqa: SIM115  # for the process's life
        faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True)
        if Path("/proc/self/io").exists():
            threading.Thread(target=self._watch_bytes, daemon=True).start()

    def enter(self, phase: str) -> None:
        """Report that a phase begins."""
        status = self._status
        self._status = RankStatus(redact(phase), status.entered + 1, time.time(), waits=False, beats=status.beats)
        self._write()

    def beat(self) -> None:
        """Report progress within the phase."""
        if time.monotonic() >= self._next:
            self._write()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While this rank waits for the others: it is not the slowest."""
        self._write(waits=True)
        yield  # an error leaves the mark: whoever raised it was waiting
        self._write()

    def _write(self, *, waits: bool = False) -> None:
        self._next = time.monotonic() + BEAT_SECONDS
        self._status = replace(self._status, waits=waits, beats=self._status.beats + 1)
        line = json.dumps(astuple(self._status)).encode()[: _LINE_BYTES - 1]
        with contextlib.suppress(OSError):  # a full disk must not end a run through its heartbeat
            os.pwrite(self._file, line.ljust(_LINE_BYTES - 1) + b"\n", 0)

    def _watch_bytes(self) -> None:
        """Downloading, loading and saving never call `beat`: the bytes that this process moves show that it works."""
        moved = bytes_moved()
        while True:
            time.sleep(BYTES_SECONDS)
            if (now := bytes_moved()) - moved >= MOVED_BYTES:
                self._write(waits=self._status.waits)
            moved = now


def bytes_moved() -> int:
    """Bytes this process has read and written so far: through calls, and between its memory and a disk."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/io", encoding="ascii") as counters:
        return sum(int(line.split()[1]) for line in counters if not line.startswith(("sys", "cancelled")))
    return 0


def read_status(file: Path) -> RankStatus | None:
    """What a rank last reported; None if there is nothing to read."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return RankStatus(*json.loads(file.read_text(encoding="utf-8")))
    return None
