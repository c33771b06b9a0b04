"""Stop a run on request: the flag that SIGINT and SIGTERM set in a rank, and the exception by which all ranks leave a
phase together once they have agreed. The supervisor passes a signal on to every rank; each only sets its flag."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequested(Exception):
    """Every rank has agreed to stop. The weights are those of the last finished update."""


class StopFlag:
    """Set by the first SIGINT or SIGTERM; read once per token and once per micro-batch."""

    def __init__(self) -> None:
        self.signal_number = 0

    def listen(self) -> None:
        """Take over both signals in this process."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def is_set(self) -> bool:
        return self.signal_number != 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = self.signal_number or number
