"""What became of the problems that were rendered: how many were kept, dropped or shortened, how long their prompts
were, and when that is too bad to go on. Renders nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opsd_cli.settings.config import PromptSettings
from opsd_cli.settings.errors import DataError


@dataclass(frozen=True)
class Lengths:
    """Prompt lengths of one role before any was dropped or shortened, in tokens."""

    p50: int
    p99: int
    longest: int

    def __str__(self) -> str:
        return f"p50 {self.p50}, p99 {self.p99}, longest {self.longest}"


def lengths(prompts: Sequence[Sequence[int]]) -> Lengths:
    """The lengths of these prompts; zeros when there are none."""
    ordered = sorted(len(ids) for ids in prompts) or [0]
    return Lengths(
        p50=ordered[(len(ordered) - 1) // 2], p99=ordered[(len(ordered) - 1) * 99 // 100], longest=ordered[-1]
    )


@dataclass(frozen=True)
class PromptReport:
    """What became of the problems of one call."""

    kept: int
    dropped_long: int
    shortened: int  # kept, with a cut solution
    student: Lengths
    teacher: Lengths
    other: Lengths | None  # of the third prompts, where the target needs them

    def __str__(self) -> str:
        return (
            f"{self.kept} problems kept, {self.dropped_long} dropped as too long, {self.shortened} "
            f"with a shortened solution; tokens of {self._lengths}"
        )

    def check(self, settings: PromptSettings) -> None:
        """Raises DataError when more than `max_dropped_share` of the problems were dropped, or all of them."""
        total = self.kept + self.dropped_long
        share = self.dropped_long / max(total, 1)
        if self.dropped_long and (share > settings.max_dropped_share or not self.kept):
            raise DataError(
                f"{self.dropped_long} of {total} problems ({share:.1%}) are longer than "
                f"prompts.max_tokens={settings.max_tokens}, above "
                f"prompts.max_dropped_share={settings.max_dropped_share:g} ({self._lengths}); raise "
                "prompts.max_tokens, set prompts.overflow=shorten, or raise prompts.max_dropped_share"
            )

    @property
    def _lengths(self) -> str:
        third = "" if self.other is None else f"; of third prompts: {self.other}"
        return f"student prompts: {self.student}; of teacher prompts: {self.teacher}{third}"


@dataclass(frozen=True)
class FeedbackReport:
    """What became of the teacher's prompts of some rollouts, where these are made of each other."""

    made: int = 0
    shortened: int = 0  # made, with a cut sibling or solution
    nothing_to_show: int = 0  # no correct sibling, and nothing to say of the attempt
    too_long: int = 0

    @property
    def counts(self) -> dict[str, float]:
        """By metric name, the number of these rollouts that have it."""
        return {
            "rollout/without_context": float(self.nothing_to_show + self.too_long),
            "rollout/context_too_long": float(self.too_long),
            "rollout/context_shortened": float(self.shortened),
        }
