"""The places between two system calls where a crash must not lose a file that was already there: each says its name, so
that a test can kill the process exactly there (`opsd_cli.testing.fault_points`). Nobody listens in a normal run."""

from __future__ import annotations

from collections.abc import Callable

_listener: Callable[[str], object] | None = None


def reach(point: str) -> None:
    if _listener is not None:
        _listener(point)


def is_watched() -> bool:
    """Whether anybody listens: for a place that must split a write to have a point in it."""
    return _listener is not None


def watch(listener: Callable[[str], object] | None) -> None:
    """From now on tell `listener` the name of each point that is reached, before the work goes on; None: nobody."""
    global _listener
    _listener = listener
