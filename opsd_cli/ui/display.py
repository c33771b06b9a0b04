"""The screen of a run, fed by its events file: a live frame on a terminal; in pipes, log files and terminals that
cannot redraw, one line of `key=value` for each event. The process that supervises the ranks and `opsd watch` call
`poll`, which draws."""

from __future__ import annotations

import contextlib
import itertools
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from opsd_cli.insight.samples import SampleRollout, newest_sample
from opsd_cli.run.events import Event, EventFollower, number
from opsd_cli.run.folder import RunFolder, read_config, shell_path
from opsd_cli.safety.terminal import escape_controls
from opsd_cli.settings.errors import DataError
from opsd_cli.settings.trees import leaves
from opsd_cli.ui.closing import evaluation_table, measured_lines, next_lines, result_lines, stop_line
from opsd_cli.ui.frame import frame, lasting_line
from opsd_cli.ui.theme import console_for, duration, has_unicode, is_live, literal, print_line
from opsd_cli.ui.view import RunView

_REDRAW_SECONDS = 0.5  # after something new
_TICK_SECONDS = 1.0  # between two frames that only the clock tells apart
_QUIET_PROGRESS_SECONDS = 10.0  # between two lines about one phase
_LABEL_WIDTH = 10
_NARROWEST = 20  # columns beside a label
_PROSE = ("trained", "accuracy", "teacher", "retention", "")

_STEP_KEYS = {
    "loss/objective": "loss",
    "kl/forward": "kl_forward",
    "kl/reverse": "kl_reverse",
    "agree/top1": "top1",
    "rollout/accuracy": "right",
    "rollout/length_mean": "length",
    "rollout/truncated": "cut",
    "optim/grad_norm": "grad_norm",
    "optim/lr": "lr",
    "tokens/per_second": "tokens_s",
    "time/step": "seconds",
}

_HIDDEN = {"kind", "time", "plan", "versions", "dataset_fingerprint", "model_fingerprint"}


def open_display(run: Path, *, quiet: bool = False, replay: bool = False) -> RunDisplay:
    """The display that suits stderr. A quiet one shows only the error at the end. With `replay` the events that are
    already there are shown too; a resumed run reads them silently."""
    console = console_for(sys.stderr)
    kind = RunDisplay if quiet else LiveDisplay if is_live(console) else LineDisplay
    return kind(run, console, since=0.0 if replay else time.time())


class RunDisplay:
    """Follows a run's events and shows only the error at the end; `supervisor.Display` describes the methods."""

    def __init__(self, run: Path, console: Console, *, since: float) -> None:
        self.folder = RunFolder(run)
        self.console = console
        self._settings = settings_of(self.folder)
        self.view = RunView(settings=self._settings)
        self._events = EventFollower(self.folder.events)
        self._shown_until = since  # unix seconds, so that neither a resume nor a rewind shows an event twice
        self._reads_past = True

    def poll(self) -> None:
        events = self._events.poll()
        if self._events.rewound:  # a resumed run has dropped the events after its checkpoint
            self.view, self._reads_past = RunView(settings=self._settings), True
        for event in events:
            self.view.apply(event)
            if not self._reads_past or event["time"] >= self._shown_until:
                # Everything after a new event is new, even if the clock has jumped back since.
                self._reads_past, self._shown_until = False, event["time"]
                self.show(event)
        self._reads_past = False
        self.redraw()

    def show(self, event: Event) -> None:
        """Show one new event."""

    def redraw(self) -> None:
        """Redraw what changes."""

    def note(self, text: str) -> None:
        """Show one line from the supervisor."""

    def close(self, *, code: int, message: str, tail: Sequence[str]) -> None:
        """Show an error; rank 0's screen shows everything else."""
        self._explain(message, tail)

    def leave(self, text: str) -> None:
        """Stop showing a run that goes on."""
        print_line(self.console, Text(escape_controls(text)))

    def _explain(self, message: str, tail: Sequence[str]) -> None:
        for line in tail:
            print_line(self.console, Text(f"  | {escape_controls(line)}", "label"))
        for line in literal(message, most=20_000).splitlines():
            print_line(self.console, Text.assemble(("opsd: ", "bad"), line))

    def _conclude(self, code: int, message: str, tail: Sequence[str]) -> None:
        """Results to stdout; errors, and what to type after one, to stderr."""
        if code == 0:
            print_result(self.view, self.folder)
            return
        self._explain(message, tail)
        if line := stop_line(self.view, self.folder, code):
            print_line(self.console, Text(line))


class LineDisplay(RunDisplay):
    """One line per event."""

    def __init__(self, run: Path, console: Console, *, since: float) -> None:
        super().__init__(run, console, since=since)
        self._phase, self._phase_time = "", 0.0

    def show(self, event: Event) -> None:
        """Print an event; of a long phase, only now and then."""
        if event["kind"] == "progress":
            now = time.monotonic()
            if event["phase"] == self._phase and now - self._phase_time < _QUIET_PROGRESS_SECONDS:
                return
            self._phase, self._phase_time = event["phase"], now
        for line in lines_of(event, self.view):
            self.console.out(line, highlight=False)

    def note(self, text: str) -> None:
        self.console.out(event_line("note", {"text": text}), highlight=False)

    def close(self, *, code: int, message: str, tail: Sequence[str]) -> None:
        self._conclude(code, message, tail)


class LiveDisplay(RunDisplay):
    """A frame that is redrawn a few times a second, with lines above it that stay."""

    def __init__(self, run: Path, console: Console, *, since: float) -> None:
        super().__init__(run, console, since=since)
        self._unicode = has_unicode(console)
        self._began, self._drawn, self._replays = time.time(), 0.0, since == 0
        self._is_new = False  # something has happened since the last frame
        self._sample: SampleRollout | None = None
        self._samples_size = -1
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
        self._is_new = True
        if line := lasting_line(event):
            print_line(self.console, line, fold=True)

    def redraw(self) -> None:
        now = time.time()
        if 0 <= now - self._drawn < (_REDRAW_SECONDS if self._is_new else _TICK_SECONDS):
            return
        self._drawn, self._is_new = now, False
        # Who watches a run that began earlier wants its clock, not that of the watching.
        began = self.view.began if self._replays and self.view.began > 0 else self._began
        drawn = frame(
            self.view, name=self.folder.name, width=self.console.width, height=self.console.height - 1, now=now,
            unicode=self._unicode, began=began, place=shell_path(self.folder.path), sample=self._newest_sample(),
        )  # fmt: skip
        self._live.update(drawn, refresh=True)

    def _newest_sample(self) -> SampleRollout | None:
        """Read again where the file has changed."""
        with contextlib.suppress(OSError):
            size = self.folder.samples.stat().st_size
            if size != self._samples_size:
                self._samples_size, self._sample = size, newest_sample(self.folder.samples)
        return self._sample

    def note(self, text: str) -> None:
        print_line(self.console, Text(escape_controls(text), "warn"), fold=True)

    def close(self, *, code: int, message: str, tail: Sequence[str]) -> None:
        self._live.stop()
        print_line(self.console, Text())
        self._conclude(code, message, tail)

    def leave(self, text: str) -> None:
        self._live.stop()
        super().leave(text)


def settings_of(folder: RunFolder) -> dict[str, Any]:
    """What is shown of the frozen config; nothing where it cannot be read."""
    try:
        return dict(leaves(read_config(folder)))
    except DataError:
        return {}


def lines_of(event: Event, view: RunView) -> Iterator[str]:
    """The lines of one event; `view` is the run's state after it."""
    seconds, kind = number(event.get("time")), event["kind"]
    stamp = _iso_time(seconds if 0 <= seconds < 4e9 else 0.0)
    if kind == "step":
        facts: dict[str, Any] = {"step": f"{event['step']}/{view.steps}"}
        facts |= {key: view.metrics[name] for name, key in _STEP_KEYS.items() if name in view.metrics}
        if (left := view.seconds_left()) is not None:
            facts["left"] = duration(left)
        yield _pairs(stamp, kind, facts)
        return
    if kind == "progress":
        at = {"at": f"{event['done']}/{event['total']}"} if event["total"] else {}
        yield _pairs(stamp, kind, {"phase": event["phase"], **at})
        return
    yield _pairs(stamp, kind, {key: value for key, value in event.items() if key not in _HIDDEN and value != ""})
    if kind == "run_started" and event["task"] != "check":  # a check's plan is its result
        yield from (_pairs(stamp, "plan", {"line": line}) for line in event["plan"])


def event_line(kind: str, facts: dict[str, Any]) -> str:
    """A line about what has just happened, as those of events."""
    return _pairs(_iso_time(time.time()), kind, facts)


def _pairs(stamp: str, kind: str, facts: dict[str, Any]) -> str:
    """`stamp kind key=value ...`, values with spaces quoted, numbers short."""
    return " ".join([stamp, kind, *(f"{key}={_value(value)}" for key, value in facts.items())])


def _iso_time(seconds: float) -> str:
    """A unix time as ISO 8601 with its offset."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds))


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = literal(value).replace("\n", "\\n").replace("\t", " ")
    return text if re.fullmatch(r"[^\s\"=]+", text) else '"' + text.replace('"', '\\"') + '"'


def print_result(view: RunView, folder: RunFolder) -> None:
    """The result of a finished run, to stdout."""
    console = console_for(sys.stdout)
    if view.task == "eval":
        console.print(evaluation_table(view.evaluations))
        for label, text in measured_lines(view, folder):
            print_labelled(console, label, text)
        return
    lines = result_lines(view, folder, unicode=has_unicode(console))
    if view.task == "check":
        for _, text in lines:
            print_line(console, Text(text), fold=True)
        return
    for label, text in itertools.chain(lines, next_lines(view, folder)):
        print_labelled(console, label, text)


def print_labelled(console: Console, label: str, text: str) -> None:
    """One line of the result. On a terminal prose is folded beside its label; what is there to be copied is not."""
    lines, room = [Text(text)], console.width - _LABEL_WIDTH - 1
    if label in _PROSE and console.file.isatty() and room >= _NARROWEST:
        lines = list(lines[0].wrap(console, room))
    for line in lines:
        head, label = label, ""
        print_line(console, Text.assemble((f"{head:<{_LABEL_WIDTH}} ", "label"), line))
