"""Says when a run has gone wrong, from its metrics: entropy, length, truncation, repetition and leaks against the first
steps, held-out accuracy against its best, a step against those before it, and steps that teach nothing. What needs no
window to be plain is said after the first rollouts, and a run that is shorter than two windows is judged at its end.
Torch-free: it sees only metrics that are equal on every rank, so every rank comes to the same verdict; a resume replays
the events."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from statistics import fmean, pstdev
from typing import NamedTuple

from opsd_cli.data.problems import Rollout
from opsd_cli.run.events import Event, number
from opsd_cli.settings.config import GuardSettings, TrainSettings

RATIOS = {"entropy/student": "entropy_ratio", "rollout/length_mean": "length_ratio"}
SHARES = {
    "rollout/truncated": ("truncated_share", "are cut by the length limit; raise sampling.max_completion_tokens"),
    "rollout/repeated": ("repeated_share", "repeat themselves; lower optim.lr, or take fewer steps"),
    "rollout/leaked": (
        "leak_share",
        "speak of a reference that they cannot see; change context.teacher",
    ),
}
"""Metric -> its limit's setting, and what it says of the completions."""

PLAIN_ROLLOUTS = 32  # that all show the same sign, after which it is said without waiting for a window
EQUAL_NATS = 1e-6  # forward KL below which teacher and student are the same up to rounding
PARTED_NATS = 0.3  # mean gap to the sampler: bfloat16 explains some hundredths
NO_SIGNAL, IDENTICAL = "no_signal", "identical"


class Verdict(NamedTuple):
    """What is wrong with a run. Each `name` is told once."""

    name: str
    message: str


class DriftMonitor:
    """Watches one run. A step whose update was refused is no part of any window."""

    def __init__(self, settings: GuardSettings, train: TrainSettings) -> None:
        self._settings = settings
        self._problems = train.problems_per_step
        self._rollouts = train.problems_per_step * train.rollouts_per_problem  # of one step
        self._metrics: list[dict[str, float]] = []
        self.best_accuracy: float | None = None
        self.best_step = self.refused_in_a_row = 0

    def replay(self, events: Iterable[Event]) -> None:
        """Catch up on what a resumed run had done before."""
        for event in events:
            if event["kind"] == "step":
                self.add_step({name: number(value) for name, value in event["metrics"].items()})
            elif event["kind"] == "evaluation":
                is_student = event["role"] == "student" and event["split"] != "retention"
                if is_student and event["step"] > 0:  # before the first update nothing was judged
                    self.verdict_on_accuracy(event["step"], event["accuracy"])

    def add_step(self, metrics: dict[str, float]) -> None:
        if metrics.get("optim/skipped"):
            self.refused_in_a_row += 1
        else:
            self.refused_in_a_row = 0
            self._metrics.append(metrics)

    def verdict_on_step(self) -> Verdict | None:
        """Why the run should not go on after the last step, in words; None if all is well."""
        window = self._settings.window
        if self.refused_in_a_row or len(self._metrics) < window:
            return None
        reasons = [why_no_signal(metrics) for metrics in self._metrics[-window:]]
        if None not in reasons:
            return Verdict(NO_SIGNAL, f"no learning signal in the last {window} steps: {reasons[-1]}")
        if len(self._metrics) < 2 * window:
            return None
        return self._changed(window) or self._gap_risen(window) or self._share_over(window)

    def first_sign(self, *, at_end: bool) -> Verdict | None:
        """What all rollouts since the first step have shown, once there are enough of them or no more will come: that
        they teach nothing, or that they are all alike."""
        steps = len(self._metrics)
        if not steps or self.refused_in_a_row or not (at_end or steps * self._rollouts >= PLAIN_ROLLOUTS):
            return None
        first = "the first step" if steps == 1 else f"the first {steps} steps"
        if all(why_no_signal(metrics) for metrics in self._metrics):  # ends at the first step that teaches
            return Verdict(NO_SIGNAL, f"no learning signal in {first}: {why_no_signal(self._metrics[-1])}")
        if self._problems > 1 and all(m.get("rollout/distinct", 1.0) * self._rollouts < 1.5 for m in self._metrics):
            each = first if steps == 1 else f"each of {first}"
            return Verdict(
                IDENTICAL,
                f"every completion of {each} is the same text, whatever the problem; look at samples.jsonl and at the "
                "prompts with --dry-run",
            )
        return None

    def verdict_at_end(self) -> Verdict | None:
        """What a run too short for `verdict_on_step` has shown in the shares of its completions."""
        steps = len(self._metrics)
        return self._share_over(min(steps, self._settings.window)) if 0 < steps < 2 * self._settings.window else None

    def _changed(self, window: int) -> Verdict | None:
        for name, setting in RATIOS.items():
            first, last, limit = self._mean(name, 0, window), self._mean(name, -window, None), self._limit(setting)
            if first > 0 and last > 0 and not 1 / limit <= last / first <= limit:
                way = f"{'risen' if last > first else 'fallen'} from {first:.3g} to {last:.3g} (mean of {window} steps)"
                return Verdict(name, f"{name} has {way}, more than guard.{setting}={limit} allows")
        return None

    def _gap_risen(self, window: int) -> Verdict | None:
        """Whether the student has become less certain than its teacher, and by more than at the start (2610.05048): a
        teacher that sees the solution is more certain than the student from the first step on."""
        first, last = self._mean("entropy/gap", 0, window), self._mean("entropy/gap", -window, None)
        limit = self._settings.entropy_gap
        if last <= 0 or last - first <= limit:
            return None
        return Verdict(
            "entropy/gap",
            f"the student's entropy minus the teacher's has risen from {first:.3g} to {last:.3g} nats (mean of "
            f"{window} steps), more than guard.entropy_gap={limit} allows; lower optim.lr, or choose a divergence that "
            "sharpens (reverse_kl, routed)",
        )

    def _share_over(self, window: int) -> Verdict | None:
        for name, (setting, what) in SHARES.items():
            share, limit = self._mean(name, -window, None), self._limit(setting)
            if share > limit:
                steps = "step" if window == 1 else f"{window} steps"
                return Verdict(
                    name, f"{share:.0%} of the completions of the last {steps} {what} ({name}, guard.{setting}={limit})"
                )
        return None

    def spike(self) -> Verdict | None:
        """How far the last step's objective stands out of the window before it, if it does."""
        window, limit = self._settings.window, self._settings.spike_ratio
        before = [m["loss/objective"] for m in self._metrics[-1 - window : -1] if "loss/objective" in m]
        if self.refused_in_a_row or len(before) < window:
            return None
        last, mean = self._metrics[-1].get("loss/objective", 0.0), fmean(before)
        if last <= max(before) or last <= limit * max(mean, 0.0):
            return None
        return Verdict(
            "spike",
            f"the objective has jumped to {last:.3g}, above guard.spike_ratio={limit} times its mean over the {window} "
            f"steps before ({mean:.3g}, standard deviation {pstdev(before):.2g}, largest {max(before):.3g})",
        )

    def parted(self) -> Verdict | None:
        """Whether the sampler drew the last step's completions from something else than the weights that train."""
        gap = self._metrics[-1].get("sampler/logprob_gap", 0.0) if self._metrics else 0.0
        if gap <= PARTED_NATS:
            return None
        return Verdict(
            "parted",
            f"the sampler's log-probabilities lie {gap:.3g} nats a token from the trainer's (sampler/logprob_gap), more"
            " than rounding explains: completions come from other weights than those that are trained",
        )

    def verdict_on_accuracy(self, step: int, accuracy: float) -> Verdict | None:
        """As above, after a held-out evaluation."""
        if self.best_accuracy is None or accuracy > self.best_accuracy:
            self.best_accuracy, self.best_step = accuracy, step
        drop, limit = self.best_accuracy - accuracy, self._settings.accuracy_drop
        if drop <= limit:
            return None
        return Verdict(
            "accuracy",
            f"held-out accuracy is {accuracy:.1%} at step {step}, {drop:.1%} below its best ({self.best_accuracy:.1%} "
            f"at step {self.best_step}), more than guard.accuracy_drop={limit}",
        )

    def _mean(self, name: str, start: int, stop: int | None) -> float:
        values = [metrics[name] for metrics in self._metrics[start:stop] if name in metrics]
        return fmean(values) if values else 0.0

    def _limit(self, setting: str) -> float:
        return float(vars(self._settings)[setting])


def why_no_signal(metrics: dict[str, float]) -> str | None:
    """Why a step could not teach anything, in words with what to change; None where it could."""
    if metrics.get("rollout/empty") == 1 or metrics.get("rollout/length_mean") == 0:
        return "every completion is empty; look at the prompts with --dry-run"
    if "loss/objective" not in metrics:  # no token carried loss
        return why_no_loss(metrics)
    if metrics.get("tokens/passed_gate") == 0:
        return "no completion token passes the gate; lower tokens.gate_min"
    if abs(metrics.get("kl/forward", 1.0)) <= EQUAL_NATS and abs(metrics["loss/objective"]) <= EQUAL_NATS:
        return "the teacher equals the student: its context tells the model nothing, or its weights are the same"
    return None


def why_no_loss(metrics: dict[str, float]) -> str:
    """Why not one token of a step carried loss. What comes first is what the others come from: a completion that is cut
    is hardly ever right, and without a right one there is no sibling to show."""
    if metrics.get("rollout/without_context") != 1:
        if metrics.get("rollout/truncated") == 1:
            return (
                "every completion is cut by the length limit and carries no loss; raise "
                "sampling.max_completion_tokens, or set loss.mask_truncated=false"
            )
        return "no completion token carries loss; look at token_rule, tokens.keep, skip_first and pass_powers"
    if metrics.get("rollout/truncated") == 1:
        return (
            "every completion is cut by the length limit, so that no rollout has a privileged context; raise "
            "sampling.max_completion_tokens"
        )
    if metrics.get("rollout/context_too_long", 0) > 0:
        return (
            "no rollout has a privileged context, and those there would be are longer than prompts.max_tokens; raise "
            "it, or set prompts.overflow=shorten"
        )
    return "no rollout has a privileged context; raise train.rollouts_per_problem, or choose another context"


SPEAKS_OF_REFERENCE = re.compile(
    r"\b(reference|provided|given|sample|model) (solution|answer)s?\b"
    r"|\bas (the )?(reference|solution) (says|shows|states|suggests)\b"
    r"|\baccording to the (reference|solution)\b",
    re.IGNORECASE,
)
REPETITION_RATIO = 5.0  # bytes of text for each byte of its deflated form; prose is near 2
REPETITION_BYTES = 120  # shorter texts do not compress enough to tell
BARE_SHARE = 0.25  # of the reference solution's length, below which a right completion is bare


def count_signs(rollouts: Sequence[Rollout], texts: Sequence[str], correct: Sequence[bool]) -> dict[str, float]:
    """How many rollouts show each sign, by metric name."""
    rows = list(zip(rollouts, texts, correct, strict=True))
    return {
        "rollout/empty": float(sum(not text.strip() for text in texts)),
        "rollout/repeated": float(sum(repeats_itself(text) for text in texts)),
        "rollout/leaked": float(sum(bool(SPEAKS_OF_REFERENCE.search(text)) for text in texts)),
        "rollout/bare": float(
            sum(right and len(text) < BARE_SHARE * len(row.prompt.problem.solution) for row, text, right in rows)
        ),
    }


def repeats_itself(text: str) -> bool:
    """Whether a text is mostly copies of its own parts."""
    raw = text.encode("utf-8", "replace")
    return len(raw) >= REPETITION_BYTES and len(raw) / len(zlib.compress(raw)) > REPETITION_RATIO
