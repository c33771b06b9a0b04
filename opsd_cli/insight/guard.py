"""The guard: says when a run has gone wrong slowly. Owns the comparison of the last window of steps with the first, and
of held-out accuracy with its best; what happens then is the worker's business. Torch-free: it sees only metrics, which
are equal on every rank, so every rank comes to the same verdict; a resume replays the events."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean

from opsd_cli.events import Event, number
from opsd_cli.settings.method_sections import GuardSettings

RATIOS = {"entropy/student": "entropy_ratio", "rollout/length_mean": "length_ratio"}
SHARES = {
    "rollout/truncated": "truncated_share",
    "rollout/repeated": "repeated_share",
    "rollout/leaked": "leak_share",
}


class Guard:
    """Watches one run."""

    def __init__(self, settings: GuardSettings) -> None:
        self._settings = settings
        self._metrics: list[dict[str, float]] = []
        self.best_accuracy: float | None = None
        self.best_step = 0

    def replay(self, events: Iterable[Event]) -> None:
        """Take in what a resumed run had done before."""
        for event in events:
            if event["kind"] == "step":
                self._metrics.append({name: number(value) for name, value in event["metrics"].items()})
            elif event["kind"] == "evaluation" and event["role"] == "student" and event["split"] != "retention":
                self.verdict_on_accuracy(event["step"], event["accuracy"])

    def verdict_on_step(self, metrics: dict[str, float]) -> str | None:
        """Why the run should not go on, in words; None if all is well."""
        self._metrics.append(metrics)
        window = self._settings.window
        if len(self._metrics) < 2 * window:
            return None
        for name, setting in RATIOS.items():
            reason = self._ratio_reason(name, self._mean(name, 0, window), self._mean(name, -window, None), setting)
            if reason:
                return reason
        for name, setting in SHARES.items():
            share, limit = self._mean(name, -window, None), self._limit(setting)
            if share > limit:
                return f"{name} is {share:.2f} over the last {window} steps, above guard.{setting}={limit}"
        return None

    def verdict_on_accuracy(self, step: int, accuracy: float) -> str | None:
        """As above, after a held-out evaluation."""
        if self.best_accuracy is None or accuracy > self.best_accuracy:
            self.best_accuracy, self.best_step = accuracy, step
        drop, limit = self.best_accuracy - accuracy, self._settings.accuracy_drop
        if drop <= limit:
            return None
        return (
            f"held-out accuracy is {accuracy:.1%} at step {step}, {drop:.1%} below its best ({self.best_accuracy:.1%} "
            f"at step {self.best_step}), more than guard.accuracy_drop={limit}"
        )

    def _ratio_reason(self, name: str, first: float, last: float, setting: str) -> str | None:
        limit = self._limit(setting)
        if first <= 0 or 1 / limit <= last / first <= limit:
            return None
        way = "risen" if last > first else "fallen"
        return (
            f"{name} has {way} from {first:.3g} to {last:.3g} (mean of {self._settings.window} steps), more than "
            f"guard.{setting}={limit} allows"
        )

    def _mean(self, name: str, start: int, stop: int | None) -> float:
        return fmean(metrics.get(name, 0.0) for metrics in self._metrics[start:stop])

    def _limit(self, setting: str) -> float:
        return float(vars(self._settings)[setting])
