"""A display that cannot harm a run: whatever goes wrong in drawing is written to `logs/display.txt`, the screen falls
silent, and the last words are printed plainly. Owns no drawing; a run's record is events.jsonl, which no display
writes.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType

from opsd_cli.launch.supervisor import Display
from opsd_cli.run.folder import RunFolder
from opsd_cli.safety.secrets import redacted
from opsd_cli.settings.terminal_text import one_line


class Shielded:
    """A `Display` around the one that `open_display` makes; it never raises an Exception."""

    def __init__(self, open_display: Callable[[], Display], folder: RunFolder) -> None:
        self._folder = folder
        self._inner: Display | None = None
        with self:
            self._inner = open_display()

    def poll(self) -> None:
        """Show what is new, while the display works."""
        with self:
            if self._inner is not None:
                self._inner.poll()

    def note(self, text: str) -> None:
        """Show one line from the supervisor, plainly if need be."""
        with self:
            if self._inner is not None:
                self._inner.note(text)
                return
        self._say(text)

    def close(self, *, code: int, message: str, tail: Sequence[str]) -> None:
        """Show the end, plainly if need be: the last words are what a person comes back to."""
        with self:
            if self._inner is not None:
                self._inner.close(code=code, message=message, tail=tail)
                return
        for line in message.splitlines():
            self._say(line)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        self._inner = None
        with contextlib.suppress(OSError):  # a full disk may be what is wrong
            path = self._folder.logs / "display.txt"
            path.write_text(redacted("".join(traceback.format_exception(error))), encoding="utf-8", errors="replace")
        self._say(f"the display failed ({type(error).__name__}) and is off; the run goes on: opsd watch RUN shows it")
        return True

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # no stderr, or a closed one
            print(f"opsd: {redacted(one_line(text))}", file=sys.stderr, flush=True)
