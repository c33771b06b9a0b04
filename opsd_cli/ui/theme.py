"""Consoles and number formats: progress and notes go to stderr, results to stdout, and neither a closed pipe, a
vanished terminal nor a character that its encoding lacks ever reaches the training."""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Iterator, Mapping
from typing import IO, Any

from rich.console import Console
from rich.text import Text
from rich.theme import Theme

from opsd_cli.run.events import Event, number
from opsd_cli.safety.terminal import escape_controls, escape_line

STYLES = Theme({"label": "dim", "value": "bold", "good": "green", "bad": "bold red", "warn": "yellow", "bar": "cyan"})

_ASCII = ("C", "POSIX")
_COERCED = ("C.UTF-8", "C.utf8", "UTF-8")  # what Python makes of LC_CTYPE under LANG=C
_PIPE_WIDTH = 200  # piped tables are not truncated


class QuietStream:
    """A text stream that never raises: it escapes what its encoding lacks, and drops everything once it is closed."""

    def __init__(self, stream: IO[str] | None) -> None:
        self._stream = stream
        self.encoding = (stream.encoding if isinstance(stream, io.TextIOWrapper) else None) or "utf-8"
        if self.isatty() and is_ascii_locale(os.environ):
            self.encoding = "ascii"

    def write(self, text: str) -> int:
        if self._stream is not None:
            safe = text.encode(self.encoding, "backslashreplace").decode(self.encoding)
            with self._ignore_broken_pipe():
                self._stream.write(safe)
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:
            with self._ignore_broken_pipe():
                self._stream.flush()

    def isatty(self) -> bool:
        return self._stream is not None and not self._stream.closed and self._stream.isatty()

    def fileno(self) -> int:
        if self._stream is None:
            raise OSError("no stream")
        return self._stream.fileno()

    @contextlib.contextmanager
    def _ignore_broken_pipe(self) -> Iterator[None]:
        stream = self._stream
        try:
            yield
        except (OSError, ValueError):  # BrokenPipeError, EIO of a vanished terminal; ValueError of a closed file
            self._stream = None
            if stream is None:
                return
            with contextlib.suppress(OSError, ValueError):
                # Python flushes its streams once more at exit; what is still buffered must not raise then.
                devnull = os.open(os.devnull, os.O_WRONLY)
                os.dup2(devnull, stream.fileno())
                os.close(devnull)


def console_for(stream: IO[str] | None) -> Console:
    """The console on stdout or stderr. In a pipe its lines are not folded."""
    quiet: Any = QuietStream(stream)
    width = None if quiet.isatty() or os.environ.get("COLUMNS", "").isdigit() else _PIPE_WIDTH
    return Console(file=quiet, theme=STYLES, width=width, highlight=False, markup=False, emoji=False)


def print_line(console: Console, text: Text, *, fold: bool = False) -> None:
    """Print one line. On a terminal prose may be folded between words; commands and paths are not, to be copied."""
    console.print(text, soft_wrap=not (fold and console.file.isatty()))


def is_live(console: Console) -> bool:
    """Whether the console is a terminal that can redraw a line."""
    return console.file.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


def is_ascii_locale(environ: Mapping[str, str]) -> bool:
    """Whether the locale says that only ASCII can be shown: Python writes UTF-8 under LANG=C all the same. Without any
    locale, as in many containers, nothing is said."""
    if environ.get("PYTHONUTF8") == "1" or environ.get("PYTHONIOENCODING"):
        return False
    lang, kind = environ.get("LANG", ""), environ.get("LC_CTYPE", "")
    if kind in _COERCED and lang in _ASCII:
        kind = ""
    return (environ.get("LC_ALL", "") or kind or lang) in _ASCII


def has_unicode(console: Console) -> bool:
    """Whether the console can show more than ASCII."""
    if is_ascii_locale(os.environ):
        return False
    return console.encoding.lower().replace("-", "").startswith("utf")


def literal(text: object, *, most: int = 4000) -> str:
    """Text from elsewhere as it is to be shown: control characters visible, and of a very long one the beginning."""
    whole = str(text)
    more = f"... ({len(whole):,} characters)" if len(whole) > most else ""
    return escape_controls(whole[:most]) + more


def cut(text: object, most: int) -> str:
    """The beginning of a text from elsewhere, on one line."""
    whole = str(text)
    return escape_line(whole[:most]) + ("..." if len(whole) > most else "")


def percent(share: Any) -> str:
    """0.415 as `41.5 %`."""
    share = number(share)
    return f"{100 * share:.1f} %" if math.isfinite(share) else "-"


def decimal(value: Any) -> str:
    """Four significant digits, with an exponent only for very large and very small numbers."""
    value = number(value)
    if not math.isfinite(value):
        return str(value)
    return f"{value:.4f}" if 0.001 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"


def count(value: Any) -> str:
    """1234 as `1,234`, from a million on `1.2 M`, then `1.7 B`."""
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
    rounded = round(seconds)
    for size, unit, small_size, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if rounded >= size:
            return f"{rounded // size} {unit} {rounded % size // small_size:02d} {small_unit}"
    return f"{seconds:.1f} s" if seconds < 9.95 else f"{rounded} s"


def gibibytes(value: Any) -> str:
    return f"{number(value):.1f} GiB"


def interval(evaluation: Event | None) -> str:
    """Accuracy with its 95 % interval: `31.5 % [25.4, 38.3]`; empty without an evaluation."""
    if not evaluation:
        return ""
    return f"{percent(evaluation['accuracy'])} [{100 * evaluation['low']:.1f}, {100 * evaluation['high']:.1f}]"


def stated(evaluation: Event) -> str:
    """`, 97.5 % state an answer`; empty for evaluations of versions that did not count it."""
    return f", {percent(evaluation['stated'])} state an answer" if "stated" in evaluation else ""


def plural(count: int, noun: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


NOISE_ABOVE = 0.05
"""p from which on a change may be noise."""


def is_noise(comparison: Event) -> bool:
    """Whether so uneven a split of the problems that changed may be chance."""
    return number(comparison["p_value"]) >= NOISE_ABOVE


def changes(comparison: Event, *, since: str = "") -> str:
    """`12 problems won, 3 lost: more than noise (p = 0.035)`: what differs between two evaluations of the same
    problems. `since`: words that say from what."""
    won, lost, p = comparison["won"], comparison["lost"], number(comparison["p_value"])
    if not won + lost:
        return f"no problem changed{since}"
    shown = "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"
    verdict = "may be noise" if is_noise(comparison) else "more than noise"
    return f"{plural(won, 'problem')} won, {lost:,} lost{since}: {verdict} ({shown})"
