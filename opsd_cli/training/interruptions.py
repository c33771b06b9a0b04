"""What ends an update early or repeats it: a request to stop, memory that runs out, a loss that is not finite, an
overflow in float16. Apart from the loop, which is the method; every rank decides the same at the same place, before the
next collective, because a rank that leaves alone keeps the others waiting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from opsd_cli.data.pairing import PairedBatch
from opsd_cli.loss.types import TokenLoss, Update
from opsd_cli.settings.config import Config
from opsd_cli.training.engine_protocol import Engine, RankGroup
from opsd_cli.training.out_of_memory import OutOfMemory, TokenBudget, tokens_of, within_memory
from opsd_cli.training.step_metrics import StepRecord
from opsd_cli.training.stop_flag import StopRequested


class NotFinite(Exception):
    """The loss of a micro-batch is not finite on some rank. Raised on every rank at the same place, with what this rank
    has computed for its own micro-batch."""

    def __init__(self, batch: PairedBatch, loss: TokenLoss, *, is_here: bool) -> None:
        super().__init__("the loss is not finite")
        self.batch, self.loss, self.is_here = batch, loss, is_here


class Interruptible(Protocol):
    """What is asked of a step's parts."""

    @property
    def config(self) -> Config: ...

    @property
    def engine(self) -> Engine: ...

    @property
    def should_stop(self) -> Callable[[], bool]: ...

    @property
    def budget(self) -> TokenBudget: ...


def stop_together(ranks: RankGroup, should_stop: Callable[[], bool]) -> None:
    """Raise StopRequested on every rank if any was asked to stop."""
    if ranks.any(should_stop()):
        raise StopRequested


class UpdateGuard:
    """The checks of one update, micro-batch by micro-batch."""

    def __init__(self, parts: Interruptible, batches: Sequence[PairedBatch], *, may_stop: bool) -> None:
        self._ranks, self._should_stop, self._may_stop = parts.engine.ranks, parts.should_stop, may_stop
        # A micro-batch of a single rollout cannot be cut, so that trying again would fail again.
        self._recovers = parts.config.train.halve_on_oom and self._ranks.any(
            any(len(batch.rollouts) > 1 for batch in batches)
        )

    def loss_of(self, batch: PairedBatch, score: Callable[[], TokenLoss]) -> TokenLoss:
        """What `score` returns. Raises StopRequested, OutOfMemory or NotFinite on every rank where it happens on any:
        before the backward pass, in which the ranks would exchange what is not finite."""
        # One all-reduce carries all three answers: ranks must agree before the backward pass, and once per micro-batch.
        loss = within_memory(score, recovers=self._recovers)
        is_finite = loss is None or bool(loss.weighted_sum.isfinite())
        stops, lacks, breaks = self._ranks.all_sum(
            [self._should_stop() and self._may_stop, loss is None, not is_finite]
        )
        if stops:
            raise StopRequested
        if loss is None or lacks:
            raise OutOfMemory
        if breaks:
            raise NotFinite(batch, loss, is_here=not is_finite)
        return loss

    def backward(self, work: Callable[[], bool]) -> None:
        """Raises OutOfMemory where memory runs out and there is one rank: with more, the others are in the collectives
        of this pass already."""
        if not within_memory(work, recovers=self._recovers and self._ranks.world_size == 1):
            raise OutOfMemory


def make_update(
    step: int,
    once: Callable[[Sequence[PairedBatch]], Update],
    batches: list[PairedBatch],
    parts: Interruptible,
    record: StepRecord,
    *,
    plan: Callable[[], list[PairedBatch]],
) -> tuple[Update, list[PairedBatch]]:
    """`once`, until it makes an update or refuses one, and the micro-batches it was made from.

    After running out of memory the same rollouts are tried again in smaller pieces, which `plan` makes; after an
    overflow the same update at half the scale. A loss or gradient that is not finite is refused, and the rollouts that
    it may come from are noted.
    """
    engine = parts.engine
    while True:
        mark = record.tokens.mark()
        try:
            update = once(batches)
        except NotFinite as error:
            record.tokens.keep_token_losses(error.batch, error.loss)
            engine.drop_gradients()
            record.suspects = list(error.batch.rollouts) if error.is_here else []
            return Update(lr=engine.learning_rate(step), grad_norm=math.nan, refused="loss"), batches
        except OutOfMemory:
            engine.drop_gradients()
            record.tokens.back_to(mark)
            # By the largest micro-batch of any rank, so that every rank halves to the same budget.
            parts.budget.halve(engine.ranks.largest(max(map(tokens_of, batches))))
            batches = plan()
            continue
        # DeepSpeed has halved the scale by now; the rollouts are the same, so the update is the one that was meant.
        if update.overflow:
            record.tokens.back_to(mark)
            record.overflows += 1
            continue
        if update.refused:
            record.suspects = [rollout for batch in batches for rollout in batch.rollouts]
        return update, batches
