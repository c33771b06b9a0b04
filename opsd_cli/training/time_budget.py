"""A budget of wall-clock seconds for the steps of a run (`train.seconds`), asked between steps: what makes changes of a
method comparable in a fixed time. Evaluations, checkpoints and loading do not count."""

from __future__ import annotations

from opsd_cli.settings.config import OptimSettings
from opsd_cli.training.engine_protocol import RankGroup


class TimeBudget:
    """The seconds that steps have taken so far, by rank 0's clock: the same number on every rank, so that all stop
    after the same step."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self.used = 0.0

    def add_step(self, seconds: float, ranks: RankGroup) -> None:
        """Count a step that took so long on this rank. Collective."""
        (of_first,) = ranks.all_sum([seconds if ranks.rank == 0 else 0.0])
        self.used += of_first

    @property
    def is_used_up(self) -> bool:
        return self._seconds is not None and self.used >= self._seconds

    def scheduled_step(self, step: int, optim: OptimSettings, *, steps: int) -> float:
        """Where step `step` stands in the schedule of the learning rate: after warm-up, as far along as the steps or
        the seconds are, whichever is further, so that a schedule comes to its end with the budget."""
        if self._seconds is None or step < optim.warmup_steps:
            return step
        rest = max(0, steps - optim.warmup_steps)
        return max(step, optim.warmup_steps + rest * min(1.0, self.used / self._seconds))
