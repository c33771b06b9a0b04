"""Ranks on other machines as the command sees them. Three small files in the run folder's `logs`, which every machine
must share, join the two: `nodes.json` is what the command wants of the ranks; `orders` is its sign of life and the
signals that it passes on; `hub.ATTEMPT` is where rank 0's keeper is reached, and in the end that all ranks are gone."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opsd_cli import __version__
from opsd_cli.run.folder import RunFolder, writing
from opsd_cli.run.rank_errors import clear_errors
from opsd_cli.settings.errors import ExitCode

ATTEMPT = "OPSD_ATTEMPT"  # among the words of a rank on another machine, NAME=VALUE
MARK = "opsd-rank: "
"""Begins a line to the runner that is for the command: a failure that a machine may have no other way to tell."""

NODES, ORDERS = "nodes.json", "orders"
_BYTES = 512  # of `orders` and `hub.ATTEMPT`, written in place: a full disk must not end a run through them
_BEAT_SECONDS = 2.0
_READ_SECONDS = 0.5


@dataclass(frozen=True)
class Launch:
    """One attempt at a run on several machines, as the command that started it describes it."""

    attempt: str  # differs from that of every other attempt
    token: str  # opens a keeper's connection to rank 0's; not on any command line
    hosts: tuple[str, ...]  # of each rank, as the host file calls them
    opsd: str  # version of the command
    lost_seconds: float

    def who(self, rank: int) -> str:
        return named(rank, self.hosts)


class Failure(Exception):
    """Why a rank on another machine cannot run, or must end, in one line that need not name it."""

    def __init__(self, rank: int, message: str, *, code: ExitCode, is_consequence: bool = False) -> None:
        super().__init__(message)
        self.rank, self.message, self.code, self.is_consequence = rank, message, code, is_consequence


def named(rank: int, hosts: Sequence[str]) -> str:
    """`rank 3 on node-2`; without hosts `rank 3`."""
    return f"rank {rank} on {hosts[rank]}" if rank < len(hosts) else f"rank {rank}"


def read_launch(folder: RunFolder) -> Launch | None:
    """What the command left for the ranks; None where the file is not there, or is no such file."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        facts = json.loads((folder.logs / NODES).read_text(encoding="utf-8"))
        return Launch(**{**facts, "hosts": tuple(facts["hosts"])})
    return None


class FarRanks:
    """The command's end: begins the files, beats, sends signals, sees that all ranks are gone."""

    def __init__(self, folder: RunFolder, hosts: Sequence[str], *, lost_seconds: float) -> None:
        token = secrets.token_hex(16)
        self.launch = Launch(secrets.token_hex(8), token, tuple(hosts), __version__, lost_seconds)
        self._folder, self._logs = folder, folder.logs
        self._lock, self._is_over = threading.Lock(), threading.Event()
        self._beats = 0
        self._signals: list[int] = []

    @property
    def hosts(self) -> tuple[str, ...]:
        return self.launch.hosts

    def begin(self) -> None:
        """Write the files and beat from now on, once the ranks of an attempt before are gone. Raises OutsideError if
        the folder cannot be written."""
        before = read_launch(self._folder)
        with writing(self._logs):
            self._logs.mkdir(parents=True, exist_ok=True)
            self._write()  # ends them
            if before is not None:
                self._outlast(before)
            path = self._logs / NODES
            path.unlink(missing_ok=True)
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                json.dump(asdict(self.launch), file)
            put(hub_file(self._logs, self.launch.attempt), None)
        # In a thread: a terminal that does not take what the command shows must not end the run.
        threading.Thread(target=self._beat, daemon=True).start()

    def send(self, number: int) -> None:
        """Have every rank receive a signal; SIGKILL ends the keepers too."""
        if signal.SIGKILL not in self._signals:
            self._signals.append(int(number))
            with contextlib.suppress(OSError):  # a full disk: the ranks then end when their time is up
                self._write()

    def close(self, *, seconds: float) -> None:
        """End the ranks that are left, within so many seconds, and say nothing more."""
        if not self.have_ended:
            self.send(signal.SIGKILL)  # also where rank 0's keeper has not begun: others may have
        deadline = time.monotonic() + seconds
        while not self.are_gone and time.monotonic() < deadline:
            time.sleep(0.1)
        self._is_over.set()

    @property
    def have_ended(self) -> bool:
        """True once no rank of this attempt runs any more."""
        state = read_hub(self._logs, self.launch.attempt)
        return state is not None and state.code is not None

    @property
    def are_gone(self) -> bool:
        """True where no rank runs: rank 0's keeper has not begun, or all have ended."""
        return read_hub(self._logs, self.launch.attempt) is None or self.have_ended

    def _beat(self) -> None:
        while not self._is_over.wait(min(_BEAT_SECONDS, self.launch.lost_seconds / 8)):
            with contextlib.suppress(OSError):
                self._write()

    def _write(self) -> None:
        with self._lock:
            self._beats += 1
            put(self._logs / ORDERS, [self.launch.attempt, self._beats, self._signals])

    def _outlast(self, before: Launch) -> None:
        """Wait for the ranks of an attempt whose command was killed: what they still say is of no interest."""
        deadline = time.monotonic() + before.lost_seconds
        while (state := read_hub(self._logs, before.attempt)) and state.code is None and time.monotonic() < deadline:
            time.sleep(0.1)
        hub_file(self._logs, before.attempt).unlink(missing_ok=True)
        clear_errors(self._folder)


class OrdersWatch:
    """A keeper's end: reads the orders in a thread of its own, because a shared file system that is gone may keep a
    reader waiting for ever."""

    def __init__(self, logs: Path, attempt: str) -> None:
        self._path, self._attempt = logs / ORDERS, attempt
        self._signals: list[int] = []
        self._taken = 0
        self.changed_at = time.monotonic()
        self.is_replaced = False  # another attempt works in the folder
        self._is_over = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def take(self) -> list[int]:
        """The signals that arrived since the last call."""
        arrived = self._signals[self._taken :]
        self._taken += len(arrived)
        return arrived

    def close(self) -> None:
        self._is_over.set()

    def _watch(self) -> None:
        beats = -1
        while not self._is_over.is_set():
            with contextlib.suppress(OSError, ValueError, TypeError):
                attempt, now, signals = get(self._path)
                self.is_replaced = attempt != self._attempt
                if now != beats:
                    beats, self._signals, self.changed_at = now, list(map(int, signals)), time.monotonic()
            time.sleep(_READ_SECONDS)


@dataclass(frozen=True)
class HubState:
    """Rank 0's keeper: the port at which it listens and, once all ranks are gone, the exit code of the run."""

    port: int
    code: int | None


def hub_file(logs: Path, attempt: str) -> Path:
    """Of an attempt's own, so that one that is late cannot write over the next one's."""
    return logs / f"hub.{attempt}"


def write_hub(logs: Path, attempt: str, *, port: int, code: int | None = None) -> None:
    with contextlib.suppress(OSError):
        put(hub_file(logs, attempt), [port, code])


def read_hub(logs: Path, attempt: str) -> HubState | None:
    """None where rank 0's keeper of this attempt has not begun."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        port, code = get(hub_file(logs, attempt))
        return HubState(int(port), code)
    return None


def put(path: Path, value: Any) -> None:
    """Write a value in place, so that another machine's next look has it."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(file, json.dumps(value).encode().ljust(_BYTES - 1) + b"\n", 0)
        os.fsync(file)
    finally:
        os.close(file)


def get(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
