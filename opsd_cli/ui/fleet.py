"""Several runs as a table that follows them: the members of a sweep, or the runs that were named. On a terminal it is
redrawn; in a pipe a line says when a member's state changes. The table itself goes to stdout at the end."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.text import Text

from opsd_cli.insight.history import read_members
from opsd_cli.run.events import EventFollower
from opsd_cli.run.folder import RunFolder
from opsd_cli.run.lock import running_process
from opsd_cli.ui.columns import aligned
from opsd_cli.ui.display import event_line, settings_of
from opsd_cli.ui.lines import curve
from opsd_cli.ui.theme import console_for, cut, decimal, duration, has_unicode, is_live, percent, plural, print_line
from opsd_cli.ui.view import RunView

LOOK_SECONDS = 1.0
_GRACE_SECONDS = 3.0  # between two members of a sweep nothing runs for a moment
_CURVE_CELLS = 12
_LEAST = ("curve", "warnings", "left", "accuracy", "loss")  # left out of a narrow terminal, in this order
_STATES: dict[int, str] = {0: "done", -1: "not run", 130: "stopped", 143: "stopped"}  # by the exit code of a member
_STYLES = {"done": "good", "failed": "bad", "lost": "bad", "stopped": "warn", "running": "value", "starting": "value"}
_FIRST = ("running", "starting", "failed", "lost", "stopped")  # shown where there is no room for all

Find = Callable[[], Sequence[tuple[str, Path]]]
"""Name and path of every run that there is by now."""


@dataclass
class Member:
    name: str
    folder: RunFolder
    view: RunView
    state: str = "starting"
    is_followed: bool = True  # it may still change
    _events: EventFollower = field(init=False)
    _size: int = -1

    def __post_init__(self) -> None:
        self._events = EventFollower(self.folder.events)

    def look(self) -> None:
        """Read what is new."""
        size = self.folder.events.stat().st_size if self.folder.events.exists() else 0
        if size == self._size and not self.is_followed:
            return
        is_running = running_process(self.folder) is not None  # before its events, so that the last are read
        events = self._events.poll()
        self._size = size
        if self._events.rewound:
            self.view = RunView(settings=self.view.settings)
        for event in events:
            self.view.apply(event)
        self.state = self._state(is_running)
        self.is_followed = is_running

    def _state(self, is_running: bool) -> str:
        if is_running:
            return "starting" if self.view.started is None else "running"
        if self.view.ended is None:
            return "lost" if self.view.started is not None else "empty"
        outcome = str(self.view.ended["outcome"])
        return "done" if outcome == "completed" else cut(outcome, 20)


class Fleet:
    """Several runs, and the sweep that they are members of, if they are."""

    def __init__(self, find: Find, *, title: str, sweep: Path | None = None) -> None:
        self.title = title
        self.members: dict[Path, Member] = {}
        self.recorded: dict[str, int] = {}  # members of the sweep that have ended: name -> exit code
        self.count = 0  # members that the sweep will have, if that is known
        self._find, self._sweep = find, sweep
        self._alive_at: float | None = None  # monotonic time at which something was running

    def look(self) -> None:
        """Read what is new of every run."""
        for name, path in self._find():
            if path not in self.members:
                folder = RunFolder(path)
                self.members[path] = Member(name, folder, RunView(settings=settings_of(folder)))
        for member in self.members.values():
            with contextlib.suppress(OSError):  # of a folder that is gone
                member.look()
        if self._sweep is not None:
            self.recorded = {str(item["name"]): item["code"] for item in read_members(self._sweep)}
            self.count = _planned(self._sweep)
        if self._sweep_runs() or any(member.is_followed for member in self.members.values()):
            self._alive_at = time.monotonic()

    def _sweep_runs(self) -> bool:
        return self._sweep is not None and running_process(RunFolder(self._sweep)) is not None

    @property
    def is_over(self) -> bool:
        """Whether nothing runs and nothing will: a moment after the last member, where more may come."""
        return self._alive_at is None or (
            not self._sweep_runs()
            and not any(member.is_followed for member in self.members.values())
            and (self._sweep is None or time.monotonic() - self._alive_at > _GRACE_SECONDS)
        )

    def states(self) -> dict[str, str]:
        """Name of every member that is known -> its state, those without a folder too."""
        found = {member.name: member.state for member in self.members.values()}
        for name, code in self.recorded.items():
            if found.get(name) not in ("running", "starting", "done"):
                found[name] = _STATES.get(code, "failed")
        return found

    @property
    def waiting(self) -> int:
        """Members of the sweep that have not begun."""
        return max(0, self.count - len(self.states())) if self._sweep_runs() else 0

    def rows(self, *, unicode: bool, name_cells: int = 1000) -> list[dict[str, str]]:
        """A row for each member."""
        by_name = {member.name: member.view for member in self.members.values()}
        return [
            {"run": cut(name, name_cells), "state": state, **_facts(by_name.get(name, RunView()), unicode=unicode)}
            for name, state in self.states().items()
        ]

    def summary(self) -> str:
        """`sweep-1: 8 members, 2 running, 5 done, 1 failed`."""
        counted = Counter(self.states().values())
        if self.waiting:
            counted["waiting"] = self.waiting
        total = sum(counted.values())
        return ", ".join([f"{self.title}: {plural(total, 'run')}", *(f"{n} {state}" for state, n in counted.items())])

    def failures(self) -> Iterator[tuple[str, str]]:
        """Name and message of the members that failed."""
        for member in self.members.values():
            if member.state == "failed" and member.view.ended is not None:
                yield member.name, str(member.view.ended["message"])


def _planned(sweep: Path) -> int:
    """How many members a sweep will have, as its sweep.json says; 0 where it says nothing."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        record = json.loads((sweep / "sweep.json").read_text(encoding="utf-8"))
        if isinstance(record, dict) and isinstance(record.get("members"), int):
            return min(int(record["members"]), 10**6)
    return 0


def _facts(view: RunView, *, unicode: bool) -> dict[str, str]:
    left, pair = view.seconds_left(now=time.time()), view.first_and_last()
    shares = dict.fromkeys(percent(event["accuracy"]) for event in pair) if pair else ()
    return {
        "step": f"{view.step}/{view.steps}" if view.task == "train" else "-",
        "loss": decimal(view.metrics["loss/objective"]) if "loss/objective" in view.metrics else "-",
        "curve": curve(view.losses, _CURVE_CELLS) if unicode else "",
        "accuracy": (" → " if unicode else " -> ").join(shares) or "-",
        "left": duration(left) if left is not None and view.ended is None else "-",
        "warnings": str(len(view.warnings)) if view.warnings else "-",
    }


class FleetScreen:
    """Shows a fleet: a live table on a terminal, a line for each change of state in a pipe."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.console = console_for(sys.stderr)
        self._states: dict[str, str] = {}
        self._live: Live | None = None
        if is_live(self.console):
            self._live = Live(console=self.console, auto_refresh=False, transient=True, vertical_overflow="crop")
            self._live.start()

    def show(self) -> None:
        """Draw what `fleet.look` has found."""
        if self._live is not None:
            lines = self.lines(self.console.width, self.console.height - 1, has_unicode(self.console))
            self._live.update(Text("\n").join(lines), refresh=True)
            return
        for row in self.fleet.rows(unicode=False):
            name, state = row["run"], row["state"]
            if self._states.get(name) != state:
                self._states[name] = state
                facts: dict[str, Any] = {key: row[key] for key in ("run", "state", "step", "loss", "accuracy")}
                line = event_line("member", {key: value for key, value in facts.items() if value != "-"})
                self.console.out(line, highlight=False)

    def lines(self, width: int, height: int, unicode: bool) -> list[Text]:
        """The table, for a terminal's size."""
        rows = self.fleet.rows(unicode=unicode, name_cells=max(8, width - 28))
        if hidden := max(0, len(rows) - max(1, height - 5)):
            order = {state: place for place, state in enumerate(_FIRST)}
            rows = sorted(rows, key=lambda row: order.get(row["state"], len(order)))[: len(rows) - hidden]
        head, *lines = aligned(rows, least=_LEAST, width=width) or ["no run has begun yet"]
        drawn = [Text(), Text(cut(self.fleet.summary(), 1000), "value"), Text(head, "label")]
        drawn += [Text(line, _STYLES.get(row["state"], "label")) for line, row in zip(lines, rows, strict=True)]
        drawn += [Text(f"and {hidden} more", "label")] if hidden else []
        drawn += [Text(f"{cut(name, 60)}: {cut(why, 500)}", "bad") for name, why in self.fleet.failures()]
        for line in drawn:
            line.truncate(width, overflow="ellipsis" if unicode else "crop")
        return drawn[: max(1, height)]

    def close(self, note: str = "") -> None:
        """Leave the table on stdout, why members failed on stderr."""
        if self._live is not None:
            self._live.stop()
        out = console_for(sys.stdout)
        width = out.width if out.file.isatty() else None
        for line in aligned(self.fleet.rows(unicode=has_unicode(out)), least=_LEAST, width=width):
            print_line(out, Text(line))
        for name, why in self.fleet.failures():
            print_line(self.console, Text(f"{cut(name, 200)}: {cut(why, 1000)}", "bad"))
        if note:
            print_line(self.console, Text(note))
