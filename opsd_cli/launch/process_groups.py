"""What the supervisor asks of the operating system: a child that dies with its parent, signals to a child's whole
group, and its own signals as a queue."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def dies_with_parent() -> Callable[[], None] | None:
    """For the new process to call: ask for SIGKILL when the parent dies, unless it already has."""
    if sys.platform != "linux":
        return None
    library, parent = ctypes.CDLL(None), os.getpid()  # loaded before the fork

    def prepare() -> None:
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def die_with(parent: int) -> None:
    """Of a process that has just been started: SIGKILL when the parent dies, at once if it has already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def signal_group(group: int, number: int) -> bool:
    """Send a signal to every process of the group; False if none is left. Number 0 only asks."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def groups_below(ancestor: int) -> set[int]:
    """The groups of all processes that descend from one, as far as /proc tells; nothing where there is none."""
    parents: dict[int, list[tuple[int, int]]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # Behind the name, which may hold anything: state, parent, group.
            parent, group = map(int, stat.read_text(errors="replace").rpartition(")")[2].split()[1:3])
            parents.setdefault(parent, []).append((int(stat.parent.name), group))
    found, below = set[int](), [ancestor]
    while below:
        for process, group in parents.get(below.pop(), []):
            found.add(group)
            below.append(process)
    return found


NATIVE_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}


def death_of(returncode: int) -> str:
    """How a process ended that left no message, in words."""
    if returncode >= 0:
        return f"the process ended with exit code {returncode} and left no message"
    name = signal.Signals(-returncode).name if -returncode in set(signal.Signals) else f"signal {-returncode}"
    hint = "; the out-of-memory killer does that (see dmesg)" if -returncode == signal.SIGKILL else ""
    return f"the process was killed by {name}{hint}"


@contextlib.contextmanager
def signal_queue() -> Iterator[Callable[[float], list[signal.Signals]]]:
    """Collect SIGINT, SIGTERM and SIGHUP, which would otherwise end the process. Yields `wait(seconds)`: the signals
    that arrived since the last call; it waits at most that long, and returns early at a signal or the end of a child.
    Main thread only. The handlers of before are back afterwards."""
    reading, writing = socket.socketpair()
    reading.setblocking(False)
    writing.setblocking(False)
    arrived: list[signal.Signals] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if number in _CAUGHT:
            arrived.append(signal.Signals(number))

    def wait(seconds: float) -> list[signal.Signals]:
        if not arrived:
            select.select([reading], [], [], seconds)
        with contextlib.suppress(BlockingIOError):
            while reading.recv(4096):
                pass
        taken = arrived[:]
        del arrived[: len(taken)]
        return taken

    # Under nohup SIGHUP is ignored, and stays so.
    caught = [number for number in _CAUGHT if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, receive) for number in (*caught, signal.SIGCHLD)}
    wake_before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    try:
        yield wait
    finally:
        signal.set_wakeup_fd(wake_before)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        reading.close()
        writing.close()
