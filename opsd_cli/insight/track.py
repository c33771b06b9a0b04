"""Sends a run to a tracker by reading its folder: while it goes on, in a process of its own that training neither waits
for nor feels, or after its end.

    python -m opsd_cli.insight.track RUN TRACKER PROJECT       # what a run with track=... starts
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import select
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from opsd_cli.insight.samples import SampleRollout, parse_samples
from opsd_cli.insight.trackers import TRACKERS, WITHOUT_PROJECTS, Tracker
from opsd_cli.run.events import Event, EventFollower, number, read_events
from opsd_cli.run.folder import RunFolder, read_command, read_config
from opsd_cli.run.summary import summarise
from opsd_cli.settings.trees import leaves

POLL_SECONDS = 1.0
RESULTS = ("before", "after", "teacher_before", "teacher_after", "retention_before", "retention_after")


def send(
    folder: RunFolder, tracker: Tracker, *, kind: str, project: str, is_going: Callable[[], bool] = lambda: False
) -> int:
    """Send everything that the tracker does not have yet, until the run is no longer going. Returns the number of steps
    sent; nothing is begun for a run that did not begin. A tracker's own errors pass through."""
    state, events, samples = _State(folder, kind, project), EventFollower(folder.events), _Samples(folder.samples)
    has_begun, sent = False, 0
    while True:
        goes_on = is_going()  # before reading, so that the last events are read
        found = events.poll()
        if found and not has_begun:
            settings = dict(leaves(read_config(folder)))
            identity = _identity(folder)
            tracker.start(folder.path, project=project, name=folder.name, identity=identity, settings=settings)
            has_begun = True
        for event in found:
            values = dict(_values(event))
            if values and state.is_new(event):
                tracker.log(values, step=event["step"])
                sent += event["kind"] == "step"
        for step, rollouts in samples.poll():
            if step > state.sampled:
                tracker.show(rollouts, step=step)
                state.sampled = step
        if has_begun:
            state.keep()  # each time, for a tracker that fails later
        if not goes_on:
            break
        time.sleep(POLL_SECONDS)
    if has_begun:
        tracker.finish(_results(folder), failed=_has_failed(folder))
    return sent


def _values(event: Event) -> Iterator[tuple[str, float]]:
    """What a tracker plots of an event, by name; what is not finite is left out."""
    if event["kind"] == "step":
        pairs = [(name, number(value)) for name, value in event["metrics"].items()]
    elif event["kind"] == "evaluation":
        prefix = f"eval/{event['split']}/{event['role']}"
        names = ("accuracy", "low", "high", "length_mean", "truncated", "stated", "kl_from_initial")
        pairs = [(f"{prefix}/{name}", number(event[name])) for name in names if event.get(name) is not None]
    else:
        pairs = []
    yield from ((name, value) for name, value in pairs if math.isfinite(value))


def _results(folder: RunFolder) -> dict[str, float]:
    summary = summarise(read_events(folder.events), command={})
    found = {f"accuracy_{name}": float(summary[name]["accuracy"]) for name in RESULTS if summary[name]}
    return {**found, "completion_tokens": summary["completion_tokens"], "training_seconds": summary["training_seconds"]}


def _has_failed(folder: RunFolder) -> bool:
    ended = [event for event in read_events(folder.events) if event["kind"] == "run_ended"]
    return not ended or ended[-1]["outcome"] == "failed"


def _identity(folder: RunFolder) -> str:
    """The same for the same run, resumed or sent again: its name and when it was first started."""
    command = read_command(folder)
    first = next(iter(command.get("earlier", [])), command)
    started = str(first.get("time", "")) if isinstance(first, dict) else ""
    return f"{folder.name}-{hashlib.sha256(f'{folder.name} {started}'.encode()).hexdigest()[:8]}"


class _State:
    """How far a tracker has been sent the run, kept in its folder: trackers cannot take a step back, and a resumed run
    repeats the steps after its checkpoint. A project of a tracker is a place of its own."""

    def __init__(self, folder: RunFolder, kind: str, project: str) -> None:
        self._file = folder.logs / f"track_{kind}.json"
        self._project = "" if kind in WITHOUT_PROJECTS else project
        self.steps: dict[str, int] = {}  # kind of event (and evaluation) -> the last step sent
        self.sampled = -1
        kept = self._kept().get(self._project, {})
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):  # nothing was sent yet
            steps = {str(key): int(value) for key, value in kept["steps"].items()}
            self.steps, self.sampled = steps, int(kept["sampled"])

    def _kept(self) -> dict[str, Any]:
        """By project."""
        with contextlib.suppress(OSError, ValueError, RecursionError):
            kept = json.loads(self._file.read_text(encoding="utf-8"))
            return kept if isinstance(kept, dict) else {}
        return {}

    def is_new(self, event: Event) -> bool:
        key = "/".join(str(event.get(part, "")) for part in ("kind", "split", "role"))
        if event["step"] <= self.steps.get(key, -1):
            return False
        self.steps[key] = event["step"]
        return True

    def keep(self) -> None:
        kept = {**self._kept(), self._project: {"steps": self.steps, "sampled": self.sampled}}
        self._file.write_text(json.dumps(kept), encoding="utf-8")


class _Samples:
    """The rollouts that were written since the last look, those of a step together."""

    def __init__(self, file: Path) -> None:
        self._file, self._offset = file, 0

    def poll(self) -> list[tuple[int, list[SampleRollout]]]:
        try:
            data = self._file.read_bytes()
        except OSError:
            return []
        if len(data) < self._offset:  # a resumed run has dropped lines
            self._offset = 0
        new = data[self._offset : data.rfind(b"\n") + 1]
        self._offset += len(new)
        by_step: dict[int, list[SampleRollout]] = {}
        for sample in parse_samples(new):
            by_step.setdefault(sample.step, []).append(sample)
        return sorted(by_step.items())


def main(arguments: list[str]) -> None:
    """Follow a run for as long as standard input is open: whoever started this closes it, or has died."""
    run, kind, project = arguments
    tracker: Any = TRACKERS[kind]()
    send(RunFolder(Path(run)), tracker, kind=kind, project=project, is_going=_input_is_open)


def _input_is_open() -> bool:
    return not select.select([sys.stdin], [], [], 0)[0]


if __name__ == "__main__":
    main(sys.argv[1:])
