"""What the supervisor asks of the operating system: a child that dies with its parent, and signals to a child's whole
group. Each is one call that cannot fail in a way that matters. Owns no process and no decision.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


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


def group_lives(group: int) -> bool:
    """True while a process of the group exists."""
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def leave_word(stop_file: Path, number: signal.Signals) -> None:
    """Write the stop file that ranks on other machines look for."""
    with contextlib.suppress(OSError):  # a full disk: the ranks then end when their time is up
        stop_file.write_text(str(int(number)))


def signal_group(group: int, number: signal.Signals) -> None:
    """Send a signal to every process of the group that is left."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
