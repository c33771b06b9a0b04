"""The screen of a run, fed by its events file: a live frame on a terminal, plain lines anywhere else. Used by
the process that supervises the ranks and by `opsd watch`, in their own thread: whoever calls `poll` draws.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from opsd_cli.run.events import Event, EventFollower
from opsd_cli.run.folder import RunFolder
from opsd_cli.settings.terminal_text import inert
from opsd_cli.ui.closing import next_lines, result_lines, stop_line
from opsd_cli.ui.frame import frame, news
from opsd_cli.ui.lines import lines_of, pairs, stamp_of_now
from opsd_cli.ui.tables import evaluation_table
from opsd_cli.ui.theme import data, has_unicode, is_live, say, talk
from opsd_cli.ui.view import RunView

_REDRAW_SECONDS = 0.2
_QUIET_PROGRESS_SECONDS = 10.0  # between two lines about one phase
_LABEL_WIDTH = 10
_PROSE = ("trained", "accuracy", "teacher", "")


def open_display(run: Path, *, quiet: bool = False, replay: bool = False) -> RunDisplay:
    """The display that suits stderr. A quiet one shows nothing but the error at the end. With `replay` the
    events that are already there are shown as well; a resumed run takes them in silently.
    """
    console = talk()
    kind = RunDisplay if quiet else LiveDisplay if is_live(console) else LineDisplay
    return kind(run, console, since=0.0 if replay else time.time())


class RunDisplay:
    """Follows a run's events. This one draws nothing until the end; see `supervisor.Display`
    for the calls.
    """

    def __init__(self, run: Path, console: Console, *, since: float) -> None:
        self.folder = RunFolder(run)
        self.console = console
        self.view = RunView()
        self._events = EventFollower(self.folder.events)
        self._shown_until = since  # unix seconds: neither a resume nor a rewind shows an event twice
        self._reads_past = True

    def poll(self) -> None:
        """Take in what is new."""
        events = self._events.poll()
        if self._events.rewound:  # a resumed run has dropped the events after its checkpoint
            self.view, self._reads_past = RunView(), True
        for event in events:
            self.view.apply(event)
            if not self._reads_past or event["time"] >= self._shown_until:
                # Whatever follows a new event is new, though the clock may have jumped back since.
                self._reads_past, self._shown_until = False, event["time"]
                self.show(event)
        self._reads_past = False
        self.redraw()

    def show(self, event: Event) -> None:
        """Show one new event."""

    def redraw(self) -> None:
        """Redraw what is redrawn."""

    def note(self, text: str) -> None:
        """Show one line of the supervisor."""

    def close(self, *, code: int, message: str, tail: Sequence[str]) -> None:
        """Only an error is worth a word here: rank 0's screen says the rest."""
        self._explain(message, tail)

    def leave(self, text: str) -> None:
        """Stop showing a run that goes on."""
        say(self.console, Text(inert(text)))

    def _explain(self, message: str, tail: Sequence[str]) -> None:
        for line in tail:
            say(self.console, Text(f"  | {inert(line)}", "label"))
        for line in message.splitlines():
            say(self.console, Text.assemble(("opsd: ", "bad"), inert(line)))

    def _conclude(self, code: int, message: str, tail: Sequence[str]) -> None:
        """Results to stdout when there are any; errors, and what to type after one, to stderr."""
        if code == 0:
            print_result(self.view, self.folder)
            return
        self._explain(message, tail)
        if line := stop_line(self.view, self.folder, code):
            say(self.console, Text(line))


class LineDisplay(RunDisplay):
    """One line per event."""

    def __init__(self, run: Path, console: Console, *, since: float) -> None:
        super().__init__(run, console, since=since)
        self._phase, self._phase_time = "", 0.0

    def show(self, event: Event) -> None:
        """Print an event; of a long phase, only now and then."""
        if event["kind"] == "progress" and not self._is_due(event):
            return
        for line in lines_of(event, self.view):
            self.console.out(line, highlight=False)

    def note(self, text: str) -> None:
        """Print a line of the supervisor."""
        self.console.out(pairs(stamp_of_now(), "note", {"text": text}), highlight=False)

    def close(self, *, code: int, message: str, tail: Sequence[str]) -> None:
        """Print the last words."""
        self._conclude(code, message, tail)

    def _is_due(self, event: Event) -> bool:
        now = time.monotonic()
        if event["phase"] == self._phase and now - self._phase_time < _QUIET_PROGRESS_SECONDS:
            return False
        self._phase, self._phase_time = event["phase"], now
        return True


class LiveDisplay(RunDisplay):
    """A frame that is redrawn a few times a second, with the lasting news above it."""

    def __init__(self, run: Path, console: Console, *, since: float) -> None:
        super().__init__(run, console, since=since)
        self._unicode = has_unicode(console)
        self._began, self._drawn = time.time(), 0.0
        # Drawn by poll(), never by a thread: the ranks die with the thread that started them.
        self._live = Live(
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )
        self._live.start()

    def show(self, event: Event) -> None:
        """Print what lasts."""
        if line := news(event, unicode=self._unicode):
            say(self.console, line, fold=True)

    def redraw(self) -> None:
        """Draw the frame if it is time to."""
        now = time.time()
        if now - self._drawn >= _REDRAW_SECONDS:
            self._drawn = now
            self._live.update(self._frame(now), refresh=True)

    def note(self, text: str) -> None:
        """Print a line of the supervisor above the frame."""
        say(self.console, Text(inert(text), "warn"), fold=True)

    def close(self, *, code: int, message: str, tail: Sequence[str]) -> None:
        """Take the frame away and print the last words."""
        self._live.stop()
        say(self.console, Text())
        self._conclude(code, message, tail)

    def leave(self, text: str) -> None:
        """Take the frame away; the run goes on."""
        self._live.stop()
        super().leave(text)

    def _frame(self, now: float) -> Text:
        width, name = self.console.width, self.folder.name
        return frame(self.view, name=name, width=width, now=now, unicode=self._unicode, began=self._began)


def print_result(view: RunView, folder: RunFolder) -> None:
    """The result of a finished run, to stdout."""
    console = data()
    if view.task == "eval":
        console.print(evaluation_table(view.evaluations))
        return
    arrow = "→" if has_unicode(console) else "->"
    for lines in (result_lines(view, folder, arrow=arrow), next_lines(view, folder)):
        for label, text in lines:
            head = f"{label:<{_LABEL_WIDTH}} " if label else ""
            say(console, Text.assemble((head, "label"), text), fold=label in _PROSE)
