"""Starts a run's processes and stays until the last one is gone: passes signals on, ends the others when one
fails, leaves no orphan, and says how it ended. Owns processes and their exit codes; what they run, what is
shown on a screen and what an error means to a person are others' business.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from opsd_cli.launching.signals import signal_inbox
from opsd_cli.settings.errors import ExitCode, OutsideError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_STOP_CODES = (ExitCode.INTERRUPTED, ExitCode.TERMINATED)
_NATIVE_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}

How = Literal["completed", "stopped", "failed", "abandoned", "overdue"]


@dataclass(frozen=True)
class RankProcess:
    """One process to start: its command, whole environment, working directory, and where its output goes.

    `error` is where the rank leaves the message of its error. With `stop_file` a request to stop is that file
    appearing (ranks on other machines see it) instead of a signal.
    """

    rank: int
    argv: tuple[str, ...]
    environ: Mapping[str, str]
    cwd: Path
    log: Path
    error: Path
    stop_file: Path | None = None


@dataclass(frozen=True)
class Limits:
    """Seconds the supervisor waits, and for what."""

    save_seconds: float = 1800.0  # after a signal, for the ranks to save and end
    settle_seconds: float = 2.0  # after a rank failed, for the others to end by themselves
    repeat_seconds: float = 0.5  # a second SIGINT within this time is the same Ctrl-C, delivered twice
    poll_seconds: float = 0.1


@dataclass(frozen=True)
class Ended:
    """How a fleet ended. `code` is what opsd returns; `rank` failed first, with `returncode` as the system
    gave it.
    """

    how: How
    code: int
    rank: int | None = None
    returncode: int | None = None


class Display(Protocol):
    """What the supervisor tells the screen. None of it may raise because a terminal or a pipe is gone."""

    def poll(self) -> None:
        """Show what is new; called many times a second."""

    def note(self, text: str) -> None:
        """Show one line from the supervisor."""

    def close(self, *, code: int, message: str, tail: Sequence[str]) -> None:
        """Show the end: the exit code, the error message ("" if none), the end of a log that explains it."""


def supervise(processes: Sequence[RankProcess], display: Display, *, limits: Limits = Limits()) -> Ended:
    """Run the processes to their end. Main thread only: the kernel kills the ranks when the starting thread
    dies.

    The first SIGINT, SIGTERM or SIGHUP asks every rank to save and stop; a later SIGINT abandons the save.
    When a rank fails the others get `settle_seconds`, then SIGKILL. Raises OutsideError when a process cannot
    be started.
    """
    with signal_inbox() as wait, _started(processes) as fleet:
        stop = _Stop(fleet, display, limits)
        while fleet.running:
            for number in wait(limits.poll_seconds):
                stop.receive(number)
            fleet.reap()
            if stop.is_overdue() or fleet.has_failed_since(limits.settle_seconds, asked=stop.asked is not None):
                fleet.kill()
            display.poll()
        display.poll()
        return _verdict(fleet, stop)


class _Fleet:
    """The running processes and the return codes of those that ended."""

    def __init__(self) -> None:
        self.running: dict[int, tuple[RankProcess, subprocess.Popen[bytes]]] = {}
        self.codes: dict[int, int] = {}
        self.killed: set[int] = set()  # ended by us
        self._error_at: dict[int, float] = {}
        self._ended_at: dict[int, float] = {}
        self._groups: list[int] = []

    def start(self, process: RankProcess) -> None:
        """Start one process, leader of its own session; the kernel kills it when this thread dies."""
        process.log.parent.mkdir(parents=True, exist_ok=True)
        with open(process.log, "ab") as log:
            child = subprocess.Popen(
                process.argv,
                env=dict(process.environ),
                cwd=process.cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_dies_with_parent(),
            )
        self.running[process.rank] = (process, child)
        self._groups.append(child.pid)

    def reap(self) -> None:
        """Collect the processes that ended and the errors that were left, also by a rank that hangs on its
        way out.
        """
        for rank, (process, child) in list(self.running.items()):
            with contextlib.suppress(OSError):
                self._error_at[rank] = process.error.stat().st_mtime
            code = child.poll()
            if code is not None:
                self.codes[rank], self._ended_at[rank] = code, time.time()
                del self.running[rank]

    def ask_to_stop(self, number: signal.Signals) -> None:
        """Pass a stop request on to every rank at once."""
        for process, child in self.running.values():
            if process.stop_file is not None:
                process.stop_file.write_text(str(int(number)))
            else:
                child.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    def kill(self) -> None:
        """SIGKILL every process that still runs, with its children."""
        for rank, (_, child) in self.running.items():
            self.killed.add(rank)
            _kill_group(child.pid)

    def failures(self, *, asked: bool) -> list[int]:
        """Ranks that failed, the first one first: ended badly by themselves, or left an error and do not end.

        Dying of SIGTERM or SIGINT is a failure unless it was `asked` for; the stop codes never are.
        """
        stops = {*_STOP_CODES, *((-signal.SIGINT, -signal.SIGTERM) if asked else ())}
        ended = {rank for rank, code in self.codes.items() if code and code not in stops and rank not in self.killed}
        return sorted(ended | self._error_at.keys(), key=lambda rank: (self.failed_at(rank), rank))

    def has_failed_since(self, seconds: float, *, asked: bool) -> bool:
        """True when a rank failed so long ago that those that still run will not end by themselves."""
        failures = self.failures(asked=asked)
        return bool(failures) and time.time() - self.failed_at(failures[0]) >= seconds

    def failed_at(self, rank: int) -> float:
        """Unix time of a rank's error, or else of its end: a failed rank takes others down within
        milliseconds.
        """
        return min(self._error_at.get(rank, math.inf), self._ended_at.get(rank, math.inf))

    def bury(self) -> None:
        """End what is left, ranks and their children; the children get a second to end by themselves."""
        self.kill()
        for _, child in self.running.values():
            child.wait()
        deadline = time.monotonic() + 1.0
        while any(map(_group_lives, self._groups)) and time.monotonic() < deadline:
            time.sleep(0.02)
        for group in self._groups:
            _kill_group(group)


class _Stop:
    """What was asked by signals so far."""

    def __init__(self, fleet: _Fleet, display: Display, limits: Limits) -> None:
        self._fleet, self._display, self._limits = fleet, display, limits
        self.asked: signal.Signals | None = None
        self.how: How | None = None  # set when the ranks were not let to end by themselves
        self._asked_at = 0.0

    def receive(self, number: signal.Signals) -> None:
        """Act on one signal."""
        now = time.monotonic()
        if self.asked is None:
            self.asked, self._asked_at = number, now
            again = "; press Ctrl-C again to abandon the save" if number == signal.SIGINT else ""
            self._display.note(f"{number.name}: stopping at the next safe point and saving a checkpoint{again}")
            self._fleet.ask_to_stop(number)
        elif number == signal.SIGINT and now - self._asked_at > self._limits.repeat_seconds:
            self.how = "abandoned"
            self._display.note("the save is abandoned; the checkpoint before it stays as it is")
            self._fleet.kill()

    def is_overdue(self) -> bool:
        """True when the ranks were asked to stop and have had their time."""
        if self.asked is None or time.monotonic() - self._asked_at < self._limits.save_seconds:
            return False
        self.how = self.how or "overdue"
        return True


@contextlib.contextmanager
def _started(processes: Sequence[RankProcess]) -> Iterator[_Fleet]:
    fleet = _Fleet()
    try:
        for process in processes:
            _start(fleet, process)
        yield fleet
    finally:
        fleet.bury()


def _start(fleet: _Fleet, process: RankProcess) -> None:
    try:
        fleet.start(process)
    except (OSError, subprocess.SubprocessError) as error:
        raise OutsideError(f"cannot start rank {process.rank}: {error}") from None


def _verdict(fleet: _Fleet, stop: _Stop) -> Ended:
    if stop.how == "abandoned":
        return Ended("abandoned", ExitCode.INTERRUPTED)
    if failures := fleet.failures(asked=stop.asked is not None):
        rank = failures[0]
        code = ExitCode.BUG if rank in fleet.killed else fleet.codes[rank]
        return Ended("failed", _exit_code(code), rank, code)
    if stop.how == "overdue":
        return Ended("overdue", ExitCode.ENVIRONMENT)
    if stopped := [code for _, code in sorted(fleet.codes.items()) if code]:
        return Ended("stopped", 128 - stopped[0] if stopped[0] < 0 else stopped[0])
    return Ended("completed", ExitCode.DONE)


def _exit_code(code: int) -> int:
    """A rank's return code as opsd returns it: a native crash is a bug, a kill from outside is the
    environment.
    """
    if code >= 0:
        return code
    return ExitCode.BUG if -code in _NATIVE_CRASHES else ExitCode.ENVIRONMENT


def _dies_with_parent() -> Callable[[], None] | None:
    """For the new process to call: ask for SIGKILL when the parent dies, unless it already has."""
    if sys.platform != "linux":
        return None
    library, parent = ctypes.CDLL(None), os.getpid()  # loaded before the fork

    def prepare() -> None:
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
