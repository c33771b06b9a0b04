"""Streams, consoles and number formats. Everything that reaches a terminal or a
pipe goes through here: progress and notes to stderr, results to stdout, and neither a closed pipe, a vanished
terminal nor a missing letter in its encoding ever reaches the training.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import sys
from typing import IO, Any

from rich.console import Console
from rich.text import Text
from rich.theme import Theme

from opsd_cli.run.events import number

STYLES = Theme({"label": "dim", "value": "bold", "good": "green", "bad": "bold red", "warn": "yellow", "bar": "cyan"})

_PIPE_WIDTH = 200  # a table in a pipe is cut by nobody


class PatientStream:
    """A text stream that never raises: what its encoding lacks is escaped; once it is closed,
    all is dropped.
    """

    def __init__(self, stream: IO[str] | None) -> None:
        self._stream = stream
        self.encoding = (stream.encoding if isinstance(stream, io.TextIOWrapper) else None) or "utf-8"

    def write(self, text: str) -> int:
        """Write what can be written."""
        if self._stream is not None:
            safe = text.encode(self.encoding, "backslashreplace").decode(self.encoding)
            with self._lost_is_lost():
                self._stream.write(safe)
        return len(text)

    def flush(self) -> None:
        """Flush, if anybody still listens."""
        if self._stream is not None:
            with self._lost_is_lost():
                self._stream.flush()

    def isatty(self) -> bool:
        """True on a terminal."""
        return self._stream is not None and not self._stream.closed and self._stream.isatty()

    def fileno(self) -> int:
        """The file descriptor. OSError when there is none."""
        if self._stream is None:
            raise OSError("no stream")
        return self._stream.fileno()

    @contextlib.contextmanager
    def _lost_is_lost(self) -> Any:
        try:
            yield
        except (OSError, ValueError):  # BrokenPipeError, EIO of a gone terminal; ValueError of a closed file
            self._forget()

    def _forget(self) -> None:
        stream, self._stream = self._stream, None
        if stream is None:
            return
        with contextlib.suppress(OSError, ValueError):
            # Python flushes its streams once more at exit; what is buffered must go nowhere, silently.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def talk() -> Console:
    """The console for progress and notes: stderr."""
    return _console(sys.stderr)


def data() -> Console:
    """The console for results: stdout. In a pipe its lines are not folded."""
    return _console(sys.stdout)


def say(console: Console, text: Text, *, fold: bool = False) -> None:
    """Print one line. On a terminal prose may be folded between words; commands and paths stay whole, to be
    copied.
    """
    console.print(text, soft_wrap=not (fold and console.file.isatty()))


def is_live(console: Console) -> bool:
    """True when the console is a terminal that can redraw a line."""
    return console.file.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


def has_unicode(console: Console) -> bool:
    """True when the console can show more than ASCII."""
    return console.encoding.lower().replace("-", "").startswith("utf")


def percent(share: Any) -> str:
    """0.415 as `41.5 %`."""
    share = number(share)
    return f"{100 * share:.1f} %" if math.isfinite(share) else "-"


def decimal(value: Any) -> str:
    """Four significant digits, without an exponent where a person would not use one."""
    value = number(value)
    if not math.isfinite(value):
        return str(value)
    return f"{value:.4f}" if 0.001 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"


def count(value: Any) -> str:
    """1234 as `1,234`, from a million on as `1.2 M`, then `1.7 B`."""
    value = number(value)
    if not math.isfinite(value):
        return "-"
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if abs(value) >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:,.0f}"


def duration(seconds: Any) -> str:
    """`4.2 s`, `1 min 12 s`, `2 h 03 min`, `3 d 04 h`."""
    seconds = number(seconds)
    if not math.isfinite(seconds):
        return "-"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def gibibytes(value: Any) -> str:
    """`1.3 GiB`."""
    return f"{number(value):.1f} GiB"


def plural(number_of: int, noun: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{number_of:,} {noun}{'' if number_of == 1 else 's'}"


def _console(stream: IO[str] | None) -> Console:
    patient: Any = PatientStream(stream)
    width = None if patient.isatty() or os.environ.get("COLUMNS", "").isdigit() else _PIPE_WIDTH
    return Console(file=patient, theme=STYLES, width=width, highlight=False, markup=False, emoji=False)
