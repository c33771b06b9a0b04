"""A run as its folder tells it: settings, events and state, for tables, reports and comparisons. Only reads, and
imports nothing heavy: looking at a run starts at once."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from opsd_cli.run.events import Event, number, parse_event
from opsd_cli.run.folder import RunFolder, read_command, read_config
from opsd_cli.run.lock import running_process
from opsd_cli.run.summary import summarise
from opsd_cli.settings.errors import ConfigError, DataError
from opsd_cli.settings.paths import typed_path
from opsd_cli.settings.trees import leaves

MEMBERS = "members.jsonl"
"""In a sweep's folder: one line for each member, with its name, its settings and its exit code."""

_PROGRESS, _STEP = b'{"kind": "progress"', b'{"kind": "step"'


@dataclass(frozen=True)
class History:
    """One run. `steps` may be thinned to what a curve needs; `summary` is always of all of them."""

    folder: RunFolder
    name: str  # as it is told apart from the others
    settings: Mapping[str, Any]  # dotted key -> value
    command: Mapping[str, Any]  # the last record of command.json
    events: Sequence[Event]  # without progress and steps
    steps: Sequence[Event]
    summary: Mapping[str, Any]
    state: str  # running, completed, stopped, failed, lost (its process is gone), empty

    def metric(self, name: str) -> tuple[list[int], list[float]]:
        """The steps that report a metric with a finite number, and the numbers."""
        pairs = [(event["step"], number(event["metrics"].get(name))) for event in self.steps]
        known = [(step, value) for step, value in pairs if math.isfinite(value)]
        return [step for step, _ in known], [value for _, value in known]

    def of_kind(self, kind: str) -> list[Event]:
        return [event for event in self.events if event["kind"] == kind]

    @property
    def task(self) -> str:
        return str(self.summary.get("task") or self.command.get("task") or "")

    @cached_property
    def chosen(self) -> Mapping[str, str]:
        """The option of each group; of runs of earlier versions only those that were typed."""
        every = [self.command, *reversed(self.command.get("earlier", []))]
        records = [record for record in every if isinstance(record, dict)]  # a stranger's folder may hold anything
        for record in records:
            if isinstance(record.get("chosen"), dict):
                return {str(group): str(option) for group, option in record["chosen"].items()}
        words = [str(word).partition("=") for record in records for word in _words(record)]
        return {key: value for key, _, value in words if key in ("recipe", "method", "model", "dataset")}

    @property
    def typed(self) -> str:
        """The command that started the run, and not the one that resumed it, quoted for a shell."""
        first = next((record for record in self.command.get("earlier", []) if isinstance(record, dict)), self.command)
        return shlex.join(_words(first))


def _words(record: Mapping[str, Any]) -> list[str]:
    """What was typed, as a record of command.json has it."""
    words = record.get("argv", [])
    return [str(word) for word in words] if isinstance(words, list) else []


def read_history(path: Path, *, name: str | None = None, points: int | None = None) -> History:
    """The run in a folder; of its steps at most about `points`, evenly spread. Raises DataError without a readable
    config."""
    folder = RunFolder(path)
    settings = dict(leaves(read_config(folder)))
    others, lines = _split(folder.events)
    last = parse_event(lines[-1]) if lines else None
    summary = _written_summary(folder) if points is not None else None
    if summary is not None and summary["steps"] != (last["step"] if last else 0):
        summary = None  # of an earlier end: the run has gone on since
    stride = 1 if points is None or summary is None else max(1, len(lines) // points)
    kept = lines[::stride] + (lines[-1:] if lines and (len(lines) - 1) % stride else [])
    steps = [event for line in kept if (event := parse_event(line)) is not None]
    command = read_command(folder)
    if summary is None:
        everything = sorted([*others, *steps], key=lambda event: number(event["time"]))
        summary = summarise(everything, command=command)
    if points is not None and steps:
        steps = [*steps[: -1 : max(1, len(steps) // points)], steps[-1]]
    state = _state(folder, others)
    return History(folder, name or folder.name, settings, command, others, steps, summary, state)


def find_runs(root: Path) -> Iterator[tuple[str, Path]]:
    """Name and path of every run below a folder, those of sweeps as `sweep/member`; the folder itself if it is one."""
    if (root / "config.yaml").is_file():
        yield root.name, root
        return
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        if (path / "config.yaml").is_file():
            yield path.name, path
        elif (path / MEMBERS).is_file():
            yield from ((f"{path.name}/{name}", member) for name, member in find_runs(path))


def read_members(folder: Path) -> list[dict[str, Any]]:
    """What a sweep recorded of its members: `name`, `swept` (settings), `code` (exit code). Empty if it is no sweep."""
    members: dict[str, dict[str, Any]] = {}
    with contextlib.suppress(OSError):
        for line in (folder / MEMBERS).read_bytes().splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                item = json.loads(line)
                if isinstance(item, dict) and {"name", "swept", "code"} <= item.keys():
                    members[str(item["name"])] = item  # of a sweep that was typed again the last counts
    return list(members.values())


def expand(words: Sequence[str], *, root: Path) -> list[tuple[str, Path]]:
    """The runs that the words of a command name: run folders, sweeps (all their members), or names under `root`. Raises
    ConfigError for a word that names none."""
    found: dict[Path, str] = {}
    for word in words:
        candidates = [typed_path(word), root / word]
        runs = next((runs for path in candidates if (runs := list(find_runs(path)))), [])
        if not runs:
            raise ConfigError(f"{word}: no run and no sweep ({' and '.join(map(str, candidates))} hold no config.yaml)")
        found |= {path.absolute(): name for name, path in runs}
    return [(name, path) for path, name in told_apart(found).items()]


def told_apart(runs: Mapping[Path, str]) -> dict[Path, str]:
    """Runs with a name for each: where two have the same, the folders they are in are named too."""
    named, depth = dict(runs), 1
    while depth < max((len(path.parts) for path in named), default=0):
        counted = Counter(named.values())
        same = [path for path, name in named.items() if counted[name] > 1]
        if not same:
            break
        depth += 1
        named |= {path: "/".join(path.parts[-depth:]) for path in same}
    return named


def read_all(words: Sequence[str], *, root: Path, points: int | None = None) -> list[History]:
    """Every run that the words name. Raises ConfigError, DataError."""
    return [read_history(path, name=name, points=points) for name, path in expand(words, root=root)]


def try_read(path: Path, *, name: str, points: int | None = None) -> History | None:
    """A run, or None where its config cannot be read: one damaged folder must not hide the others."""
    try:
        return read_history(path, name=name, points=points)
    except DataError:
        return None


def _split(file: Path) -> tuple[list[Event], list[bytes]]:
    """The events that are neither progress nor steps, and the lines of the steps."""
    try:
        data = file.read_bytes()
    except OSError:
        return [], []
    others, steps = [], []
    for line in data[: data.rfind(b"\n") + 1].split(b"\n"):
        if line.startswith(_STEP):
            steps.append(line)
        elif not line.startswith(_PROGRESS) and (event := parse_event(line)) is not None:
            others.append(event)
    return others, steps


def _written_summary(folder: RunFolder) -> dict[str, Any] | None:
    """summary.json, if it has everything that `summarise` would say."""
    expected = summarise([], command={})
    with contextlib.suppress(OSError, ValueError, RecursionError):
        summary = json.loads(folder.summary.read_bytes())
        if isinstance(summary, dict) and expected.keys() <= summary.keys():
            numbers = [summary[key] for key, value in expected.items() if isinstance(value, int | float)]
            shares = [summary[key] for key in summary if key.endswith(("before", "after"))]
            if all(isinstance(value, int | float) for value in numbers) and all(map(_is_share, shares)):
                return summary
    return None


def _is_share(value: Any) -> bool:
    if not isinstance(value, dict):
        return value is None
    return all(isinstance(value.get(key), int | float) for key in ("accuracy", "low", "high", "problems"))


def _state(folder: RunFolder, events: Sequence[Event]) -> str:
    if running_process(folder) is not None:
        return "running"
    last = next((event for event in reversed(events) if event["kind"] in ("run_started", "run_ended")), None)
    if last is None:
        return "empty"
    return str(last["outcome"]) if last["kind"] == "run_ended" else "lost"
