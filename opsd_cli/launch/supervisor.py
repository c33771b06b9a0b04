"""Starts a run's processes and stays until the last one is gone: passes signals on, ends the others when one fails,
leaves no orphan, and reports how they ended."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from opsd_cli.launch.far_ranks import FarRanks
from opsd_cli.launch.process_groups import (
    NATIVE_CRASHES,
    dies_with_parent,
    groups_below,
    signal_group,
    signal_queue,
)
from opsd_cli.launch.runner_log import RunnerLog
from opsd_cli.launch.watchdog import Watchdog
from opsd_cli.run.heartbeat import STACKS_SIGNAL
from opsd_cli.run.rank_errors import RankError
from opsd_cli.settings.errors import ExitCode, OutsideError

_STOP_CODES = (ExitCode.INTERRUPTED, ExitCode.TERMINATED)
SUDDEN = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS}  # deaths that are never a consequence of another rank's error

ATTEMPT_MARK = "--- started"  # a line of the log that begins so marks a start: a resumed run appends to the same file

How = Literal["completed", "stopped", "failed", "abandoned", "overdue", "stalled"]


@dataclass(frozen=True)
class RankProcess:
    """One process to start: its command, full environment, working directory, and where its output goes."""

    rank: int
    argv: tuple[str, ...]
    environ: Mapping[str, str]
    cwd: Path
    log: Path
    errors: str  # the name, or a pattern of names, of error files in the folder of the log
    far: FarRanks | None = None  # the ranks on other machines that this process stands for


@dataclass(frozen=True)
class Limits:
    """Seconds the supervisor waits, and for what."""

    save_seconds: float = 1800.0  # after a signal, for the ranks to save and end
    settle_seconds: float = 2.0  # after a rank failed, for the others to end by themselves
    repeat_seconds: float = 0.5  # a second SIGINT within this time is the same Ctrl-C, delivered twice
    far_seconds: float = 10.0  # for the ranks on other machines to be gone once they were told to
    poll_seconds: float = 0.1
    stall_seconds: float | None = None  # without a sign of life from any rank, before all are ended; None: for ever


@dataclass(frozen=True)
class Ended:
    """How the processes ended. `code` is what opsd returns; `rank` failed first, with the system's `returncode`."""

    how: How
    code: int
    rank: int | None = None
    returncode: int | None = None
    detail: str = ""  # for "stalled": what happened, in one line
    told: RankError | None = None  # what the runner of ranks on other machines said


class Display(Protocol):
    """What the supervisor asks of the screen. No method may raise because a terminal or a pipe is gone."""

    def poll(self) -> None:
        """Show what is new; called many times a second."""

    def note(self, text: str) -> None:
        """Show one line from the supervisor."""

    def leave(self, text: str) -> None:
        """Stop showing a run that goes on, with one line."""

    def close(self, *, code: int, message: str, tail: Sequence[str]) -> None:
        """Show the end: the exit code, the error message ("" if none), the end of a log that explains it."""


def supervise(processes: Sequence[RankProcess], display: Display, *, limits: Limits = Limits()) -> Ended:
    """Run the processes to their end. Main thread only: the kernel kills the ranks when the starting thread dies. The
    first SIGINT, SIGTERM or SIGHUP asks every rank to save and stop; a later SIGINT abandons the save. When a rank
    fails, the others get `settle_seconds`, then SIGKILL; when no rank has given a sign of life for `stall_seconds`, all
    get SIGKILL. Raises OutsideError if a process cannot be started."""
    with signal_queue() as wait, contextlib.closing(_Fleet(limits)) as fleet:
        for process in processes:
            fleet.start(process)
        stop = _Stop(fleet, display, limits)
        watchdog = _watchdog(processes, limits)
        while fleet.running:
            for number in wait(limits.poll_seconds):
                stop.receive(number)
            fleet.reap()
            if fleet.running and stop.how is None and watchdog.is_stalled():
                stop.how = "stalled"
                for line in watchdog.report(lambda: fleet.send(STACKS_SIGNAL)):
                    display.note(line)
            failed = fleet.failures(asked=stop.was_asked)[:1]
            has_settled = any(time.monotonic() - fleet.seen_at[rank] >= limits.settle_seconds for rank in failed)
            if stop.is_out_of_patience() or has_settled:
                fleet.kill(far_seconds=limits.far_seconds)
            display.poll()
        display.poll()
        return _how_it_ended(fleet, stop, watchdog)


def _watchdog(processes: Sequence[RankProcess], limits: Limits) -> Watchdog:
    hosts = next((process.far.hosts for process in processes if process.far), ())
    ranks = range(len(hosts)) if hosts else [process.rank for process in processes]
    return Watchdog(processes[0].log.parent, ranks, limits.stall_seconds, hosts=hosts)


class _Fleet:
    """The running processes and the return codes of those that ended."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._far: dict[int, tuple[FarRanks, RunnerLog]] = {}
        self.running: dict[int, tuple[RankProcess, subprocess.Popen[bytes]]] = {}
        self.codes: dict[int, int] = {}
        self._failed_at: dict[int, float] = {}  # unix time of the error file, or else of the end
        self.seen_at: dict[int, float] = {}  # monotonic time at which that was noticed
        self.killed_at: dict[int, float] = {}  # ranks that did not end by themselves
        self._groups: list[int] = []
        self._far_failures: set[int] = set()  # processes whose ranks elsewhere left an error, whatever code they return

    def start(self, process: RankProcess) -> None:
        """Start one process, leader of its own session; the kernel kills it when this thread dies."""
        try:
            process.log.parent.mkdir(parents=True, exist_ok=True)
            if process.far:
                process.far.begin()
                self._far[process.rank] = process.far, RunnerLog(process.log, process.far.hosts)
            with open(process.log, "ab", buffering=0) as log:
                log.write(f"{ATTEMPT_MARK} {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
                child = subprocess.Popen(
                    process.argv,
                    env=dict(process.environ),
                    cwd=process.cwd,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=dies_with_parent(),
                )
        except (OSError, subprocess.SubprocessError) as error:
            raise OutsideError(f"cannot start rank {process.rank}: {error}") from None
        self.running[process.rank] = (process, child)
        self._groups.append(child.pid)

    def reap(self) -> None:
        """Collect exit codes, and the errors left by ranks that hang on their way out."""
        for rank, (process, child) in list(self.running.items()):
            code = child.poll()
            left = [path.stat().st_mtime for path in process.log.parent.glob(process.errors)]
            if rank in self._far:
                _, log = self._far[rank]
                log.look()
                left += [self._failed_at.get(rank, time.time())] if log.error else []
                if left:
                    self._far_failures.add(rank)
            if code is not None:
                self.codes[rank] = code
                left.append(time.time())
                del self.running[rank]
            if left:
                self._failed_at[rank] = min(left)
                self.seen_at.setdefault(rank, time.monotonic())

    def send(self, number: signal.Signals) -> None:
        """Pass a request on to every rank at once; one for stacks only to ranks that have registered its signal, which
        would end the others."""
        for process, child in self.running.values():
            if process.far:
                process.far.send(number)
            elif number != STACKS_SIGNAL or process.log.with_suffix(".stacks").exists():
                child.send_signal(number)

    def kill(self, *, far_seconds: float = 0.0) -> None:
        """SIGKILL every process that still runs, with its children. Ranks on other machines are told to end first, and
        the process that stands for them has `far_seconds`, over several calls: ssh to a machine that is gone hangs."""
        now = time.monotonic()
        for rank, (process, child) in self.running.items():
            since = now - self.killed_at.setdefault(rank, now)
            if process.far and since == 0:
                process.far.send(signal.SIGKILL)
            is_done = process.far is None or (process.far.have_ended and since >= self._limits.settle_seconds)
            if is_done or since >= far_seconds:
                # pdsh gives each ssh a session of its own, which would wait for a machine that is gone.
                beside = groups_below(child.pid) if process.far else set()
                for group in {child.pid, *beside}:
                    signal_group(group, signal.SIGKILL)

    def failures(self, *, asked: bool) -> list[int]:
        """Ranks that failed, the first one first: a bad exit code of their own, or an error file. A failed rank takes
        others down within milliseconds: the cause is a sudden death, else the oldest error file; the end of a process
        comes later. Dying of SIGTERM or SIGINT is a failure unless `asked` for; the stop codes never are."""
        fine = {0, *_STOP_CODES, *((-signal.SIGINT, -signal.SIGTERM) if asked else ())}
        bad = [
            rank
            for rank in self._failed_at
            if (rank in self.running or self.codes[rank] not in fine or rank in self._far_failures)
            and (rank not in self.killed_at or self.seen_at[rank] <= self.killed_at[rank])
        ]
        sudden = [rank for rank in bad if -self.codes.get(rank, 0) in SUDDEN and rank not in self.killed_at]
        return sorted(bad, key=lambda rank: (rank not in sudden, self._failed_at[rank], rank))

    def told(self, rank: int) -> RankError | None:
        """What the runner of ranks on other machines said of their failure."""
        if rank not in self._far:
            return None
        _, log = self._far[rank]
        return log.error or log.of_ssh()

    def close(self) -> None:
        """End what is left, ranks and their children; the children get a second to end by themselves, ranks on other
        machines `far_seconds`."""
        for far, _ in self._far.values():
            far.close(seconds=self._limits.far_seconds)
        self.kill()
        for _, child in self.running.values():
            child.wait()
        deadline = time.monotonic() + 1.0
        while any(signal_group(group, 0) for group in self._groups) and time.monotonic() < deadline:
            time.sleep(0.02)
        for group in self._groups:
            signal_group(group, signal.SIGKILL)


class _Stop:
    """The stop requests so far."""

    def __init__(self, fleet: _Fleet, display: Display, limits: Limits) -> None:
        self._fleet, self._display, self._limits = fleet, display, limits
        self.was_asked = False
        self.how: How | None = None  # set when the ranks may no longer end by themselves
        self._asked_at = 0.0

    def receive(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if not self.was_asked:
            self.was_asked, self._asked_at = True, now
            again = "; press Ctrl-C again to abandon the save" if number == signal.SIGINT else ""
            self._display.note(f"{number.name}: stopping at the next safe point and saving a checkpoint{again}")
            self._fleet.send(signal.SIGTERM if number == signal.SIGHUP else number)
        elif number == signal.SIGINT and now - self._asked_at > self._limits.repeat_seconds:
            self.how = "abandoned"
            self._display.note("the save is abandoned; the previous checkpoint is unchanged")

    def is_out_of_patience(self) -> bool:
        """True if the ranks must be ended: a second Ctrl-C, or their time to save is up."""
        if self.was_asked and time.monotonic() - self._asked_at >= self._limits.save_seconds:
            self.how = self.how or "overdue"
        return self.how is not None


def _how_it_ended(fleet: _Fleet, stop: _Stop, watchdog: Watchdog) -> Ended:
    if stop.how == "abandoned":
        return Ended("abandoned", ExitCode.INTERRUPTED)
    if failures := fleet.failures(asked=stop.was_asked):
        rank = failures[0]
        returned = ExitCode.BUG if rank in fleet.killed_at else fleet.codes[rank]
        # A native crash is a bug, a kill from outside is the environment.
        by_signal = ExitCode.BUG if -returned in NATIVE_CRASHES else ExitCode.ENVIRONMENT
        return Ended("failed", by_signal if returned < 0 else returned, rank, returned, told=fleet.told(rank))
    if stop.how == "overdue":
        return Ended("overdue", ExitCode.ENVIRONMENT)
    if stop.how == "stalled":
        return Ended("stalled", ExitCode.ENVIRONMENT, watchdog.slowest(), detail=watchdog.message())
    if stopped := [code for _, code in sorted(fleet.codes.items()) if code]:
        return Ended("stopped", 128 - stopped[0] if stopped[0] < 0 else stopped[0])
    return Ended("completed", ExitCode.DONE)
