"""The state of a run, folded from its events, so that frame, plain lines and closing block show the same numbers."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from opsd_cli.run.events import Event, number

_RECENT_STEPS = 20  # over which speed and time left are averaged
_POINTS = 400  # kept of each curve
CURVES = (
    "loss/objective", "kl/forward", "kl/reverse", "agree/top1", "entropy/student", "entropy/teacher", "entropy/gap",
    "optim/grad_norm", "rollout/accuracy", "rollout/length_mean", "rollout/truncated", "optim/lr",
)  # fmt: skip
"""Metrics of which the display draws a curve."""


@dataclass
class RunView:
    started: Event | None = None
    began: float = math.nan  # unix seconds of the first event of this attempt
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    curves: dict[str, deque[float]] = field(default_factory=lambda: {name: deque(maxlen=_POINTS) for name in CURVES})
    warnings: list[Event] = field(default_factory=list)
    refused: int = 0  # updates
    evaluations: list[Event] = field(default_factory=list)
    comparisons: list[Event] = field(default_factory=list)
    checkpoint: Event | None = None
    progress: Event | None = None  # of the current phase
    ended: Event | None = None
    tokens: float = 0.0  # completion tokens of all steps
    truncated: list[float] = field(default_factory=list)  # share of the completions of each step
    seconds: float = 0.0  # at work, over all attempts
    used_seconds: float = 0.0  # of all steps, which train.seconds counts
    settings: Mapping[str, Any] = field(default_factory=dict)  # by dotted key; those of an unreadable config are none
    _step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT_STEPS))
    _last_time: float = math.nan

    def apply(self, event: Event) -> None:
        kind, time = event["kind"], number(event.get("time"))
        if self.ended is not None or math.isnan(self.began):
            self.began, self.ended = time, None
        if kind != "run_started" and self.started is not None and time > self._last_time:
            self.seconds += time - self._last_time
        self._last_time = time
        if kind == "progress":
            self.progress = event
            return
        self.progress = None
        if kind == "run_started":
            self.started, self.ended, self.step = event, None, _steps(event["start_step"])
        elif kind == "step":
            self.step = _steps(event["step"])
            self.metrics = {name: number(value) for name, value in event["metrics"].items()}
            for name, curve in self.curves.items():
                curve.append(self.metrics.get(name, math.nan))
            self.refused += self.metrics.get("optim/skipped") == 1
            self._step_seconds.append(self.metrics.get("time/step", math.nan))
            self.used_seconds += _finite(self._step_seconds[-1])
            self.tokens += self.metrics.get("tokens/completion", 0.0)
            self.truncated.append(self.metrics.get("rollout/truncated", math.nan))
        elif kind == "evaluation":
            self.evaluations.append(event)
        elif kind == "comparison":
            self.comparisons.append(event)
        elif kind == "warning":
            self.warnings.append(event)
        elif kind == "checkpoint":
            self.checkpoint = event
        elif kind == "run_ended":
            self.ended = event

    @property
    def steps(self) -> int:
        """Steps the run will have."""
        return _steps(self.started["steps"]) if self.started else 0

    @property
    def task(self) -> str:
        """train, eval or check; empty before the run has started."""
        return str(self.started["task"]) if self.started else ""

    @property
    def max_seconds(self) -> float:
        """Seconds that the steps may take together (train.seconds); infinite without a limit."""
        limit = number(self.started.get("max_seconds")) if self.started else math.nan
        return limit if limit > 0 else math.inf

    @property
    def losses(self) -> deque[float]:
        return self.curves["loss/objective"]

    def seconds_left(self, *, now: float | None = None) -> float | None:
        """Seconds until the run ends: its steps at the recent speed, or as many seconds as they may take, and the
        evaluations and checkpoints to come, each taking as long as the last of its kind. `now` (unix seconds) takes off
        what has passed since the last event. None before the second step: the first one also warms up."""
        known = [value for value in self._step_seconds if math.isfinite(value)]
        if len(known) < 2 or self.ended is not None:
            return None
        if len(known) < _RECENT_STEPS:
            known = known[1:]
        steps = max(0.0, min((self.steps - self.step) * sum(known) / len(known), self.max_seconds - self.used_seconds))
        left = steps + self._evaluation_seconds() + self._checkpoint_seconds()
        passed = 0.0 if now is None or not math.isfinite(self._last_time) else now - self._last_time
        return max(0.0, left - max(0.0, passed))

    def _evaluation_seconds(self) -> float:
        """Of those still to come: of the student while training runs, and at its end all that were made before it."""
        last = {(event["role"], event["split"]): event for event in self.evaluations}
        made = {(event["role"], event["split"]) for event in self.evaluations if event["step"] == self.steps}
        at_end = sum(_seconds([event for key, event in last.items() if key not in made]))
        student = [event for (role, split), event in last.items() if (role, split != "retention") == ("student", True)]
        due = self._due("eval.every", is_done=any(event["step"] == self.step for event in student))
        return at_end + due * sum(_seconds(student))

    def _checkpoint_seconds(self) -> float:
        if self.checkpoint is None:
            return 0.0
        due = self._due("checkpoint.every", is_done=self.checkpoint["step"] == self.step)
        return due * sum(_seconds([self.checkpoint]))

    def _due(self, key: str, *, is_done: bool) -> int:
        """How often what a setting makes happen each so many steps is still due before the end; `is_done`: after the
        last step it has happened."""
        every = self.settings.get(key)
        if not isinstance(every, int) or every <= 0:
            return 0
        first = self.step + 1 if is_done else max(1, self.step)
        return max(0, (self.steps - 1) // every - (first - 1) // every)

    def share_done(self) -> float:
        """How far the run is: in steps or in seconds, whichever is further."""
        return min(1.0, max(self.step / max(1, self.steps), self.used_seconds / self.max_seconds))

    def phase_shares(self) -> dict[str, float]:
        """Share of the last step by phase: sample, score, update."""
        step = self.metrics.get("time/step", math.nan)
        names = [name for name in ("sample", "score", "update") if f"time/{name}" in self.metrics]
        return {name: self.metrics[f"time/{name}"] / step for name in names} if step > 0 else {}

    def first_and_last(self, role: str = "student", *, retention: bool = False) -> tuple[Event, Event] | None:
        """The first and the last evaluation of a role on the split of the last one (or on the retention problems)."""
        wanted = [e for e in self.evaluations if e["role"] == role and (e["split"] == "retention") is retention]
        same = [event for event in wanted if event["split"] == wanted[-1]["split"]]
        return (same[0], same[-1]) if same else None

    def last_comparison(self, name: str, split: str, *, step: int) -> Event | None:
        """What was found when that evaluation was compared."""
        wanted = (name, split, step)
        return next((e for e in reversed(self.comparisons) if (e["name"], e["split"], e["step"]) == wanted), None)

    def share_cut(self) -> float:
        """Share of all completions that were cut by the length limit."""
        known = [share for share in self.truncated if math.isfinite(share)]
        return sum(known) / len(known) if known else 0.0


def _steps(number: int) -> int:
    """A number of steps that can be computed with: a file from somewhere else may hold any."""
    return max(0, min(number, 10**12))


def _seconds(events: Iterable[Event]) -> list[float]:
    return [max(0.0, _finite(number(event["seconds"]))) for event in events]


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0
