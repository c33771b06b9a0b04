"""Running out of memory as something to recover from: the token budget of micro-batches, which is halved, and the
error, which is let go of or explained. Owns no decision about when a step is repeated; that is `loop`'s."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from opsd_cli.data.pairing import PairedBatch
from opsd_cli.settings.config import Config, ZeroSettings
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


def ran_out(error: Exception, config: Config, *, step: int, ranks: int) -> str:
    """What to tell of an error that nothing recovered from: where, and every setting that helps, with its value."""
    recovery = "or let such a step be repeated in smaller pieces: train.halve_on_oom=true"
    if config.train.halve_on_oom:
        recovery = (
            "train.halve_on_oom could not help: the other ranks were waiting in a collective, every micro-batch was a "
            "single rollout, or it was not a micro-batch"
        )
    lower = {
        "train.micro_batch_tokens": config.train.micro_batch_tokens,
        "sampling.max_completion_tokens": config.sampling.max_completion_tokens,
        "loss.chunk_mib": config.loss.chunk_mib,
    }
    if hasattr(config.sampler, "max_rows"):
        lower["sampler.max_rows"] = config.sampler.max_rows
    settings = ", ".join(f"{key} (now {value})" for key, value in lower.items())
    return (
        f"out of memory at step {step} ({str(error).splitlines()[0]}); lower {settings}, or "
        f"{roomier(config.zero, ranks)}; {recovery}"
    )


def roomier(zero: ZeroSettings, ranks: int) -> str:
    """The next setting of ZeRO that leaves more memory. One rank has nobody to share with."""
    if ranks > 1 and zero.stage < 3:
        return f"shard more: zero=stage3 (now stage {zero.stage})"
    next_one = "stage2_offload" if ranks == 1 and zero.offload_optimizer == "none" else "stage3_offload"
    return f"use the CPU's memory as well: zero={next_one}"


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
