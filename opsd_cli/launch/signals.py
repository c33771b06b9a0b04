"""Signals as a queue: while an inbox is open, SIGINT, SIGTERM and SIGHUP are collected instead of ending the
process, and waiting ends early when one arrives or a child process ends. Owns the handlers; decides nothing.
"""

from __future__ import annotations

import contextlib
import select
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def signal_inbox() -> Iterator[Callable[[float], list[signal.Signals]]]:
    """Yield `wait(seconds)`: the signals that arrived since the last call, after at most that long.

    Main thread only. The handlers of before are back afterwards.
    """
    reading, writing = socket.socketpair()
    reading.setblocking(False)
    writing.setblocking(False)
    arrived: list[signal.Signals] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if number in CAUGHT:
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
    caught = [number for number in CAUGHT if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
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
