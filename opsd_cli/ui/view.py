"""The state of a run, folded from its events, so that frame, plain lines and closing block show the same numbers."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from opsd_cli.run.events import Event, number

_RECENT_STEPS = 20  # over which speed and time left are averaged
_LOSSES = 400  # kept for the curve


@dataclass
class RunView:
    started: Event | None = None
    began: float = math.nan  # unix seconds of the first event of this attempt
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=_LOSSES))
    evaluations: list[Event] = field(default_factory=list)
    comparisons: list[Event] = field(default_factory=list)
    checkpoint: Event | None = None
    progress: Event | None = None  # of the current phase
    ended: Event | None = None
    tokens: float = 0.0  # completion tokens of all steps
    truncated: list[float] = field(default_factory=list)  # share of the completions of each step
    seconds: float = 0.0  # at work, over all attempts
    used_seconds: float = 0.0  # of all steps, which train.seconds counts
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
            self.started, self.ended, self.step = event, None, event["start_step"]
        elif kind == "step":
            self.step = event["step"]
            self.metrics = {name: number(value) for name, value in event["metrics"].items()}
            self.losses.append(self.metrics.get("loss/objective", math.nan))
            self._step_seconds.append(self.metrics.get("time/step", math.nan))
            self.used_seconds += _finite(self._step_seconds[-1])
            self.tokens += self.metrics.get("tokens/completion", 0.0)
            self.truncated.append(self.metrics.get("rollout/truncated", math.nan))
        elif kind == "evaluation":
            self.evaluations.append(event)
        elif kind == "comparison":
            self.comparisons.append(event)
        elif kind == "checkpoint":
            self.checkpoint = event
        elif kind == "run_ended":
            self.ended = event

    @property
    def steps(self) -> int:
        """Steps the run will have."""
        return int(self.started["steps"]) if self.started else 0

    @property
    def task(self) -> str:
        """train, eval or check; empty before the run has started."""
        return str(self.started["task"]) if self.started else ""

    @property
    def max_seconds(self) -> float:
        """Seconds that the steps may take together (train.seconds); infinite without a limit."""
        limit = number(self.started.get("max_seconds")) if self.started else math.nan
        return limit if limit > 0 else math.inf

    def seconds_left(self) -> float | None:
        """Seconds the remaining steps will take at the recent speed, or may take, evaluations not counted."""
        known = [value for value in self._step_seconds if math.isfinite(value)]
        if not known:
            return None
        at_this_speed = (self.steps - self.step) * sum(known) / len(known)
        return max(0.0, min(at_this_speed, self.max_seconds - self.used_seconds))

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


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0
