"""Running out of memory as something to recover from: the token budget of micro-batches, which is halved, and the
error, which is let go of. Owns no decision about when a step is repeated; that is `loop`'s."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from opsd_cli.data.pairing import PairedBatch
from opsd_cli.settings.config import Config
from opsd_cli.settings.errors import ConfigError

Made = TypeVar("Made")


class OutOfMemory(Exception):
    """A micro-batch did not fit into the memory of some rank. Raised on every rank at the same place."""


class TokenBudget:
    """Tokens of one micro-batch, until the run ends."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def halve(self, largest: int) -> None:
        """Half of the largest micro-batch there was: half of a budget that was never filled would change nothing."""
        self.tokens = max(1, min(self.tokens, largest) // 2)


def tokens_of(batch: PairedBatch) -> int:
    """Tokens of the longer role."""
    return max(sum(batch.student.lengths), sum(batch.teacher.lengths))


def within_memory(work: Callable[[], Made], *, recovers: bool) -> Made | None:
    """What `work` returns; None when it ran out of memory and `recovers`, with everything let go that it held."""
    try:
        return work()
    except torch.OutOfMemoryError:
        if not recovers:
            raise
    # Outside the handler: the error's traceback would keep the tensors of every frame it came through.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def refuse_unrecoverable(config: Config, world_size: int) -> None:
    """Raises ConfigError where `train.halve_on_oom` promises what cannot be done."""
    if not config.train.halve_on_oom or world_size == 1:
        return
    teacher = config.teacher
    sharded = ["zero.stage=3"] if config.zero.stage == 3 else []
    if teacher.plugin_name == "external" and teacher.placement != "replicated":
        sharded.append(f"teacher.placement={teacher.placement}")
    if sharded:
        raise ConfigError(
            f"train.halve_on_oom=true cannot work with {' and '.join(sharded)} on {world_size} ranks: a rank that runs "
            "out of memory leaves the others waiting for its part of the weights; use zero=stage2, or "
            "train.halve_on_oom=false and a smaller train.micro_batch_tokens"
        )
