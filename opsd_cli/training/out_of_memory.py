"""Recover from running out of memory, or explain it: the token budget of micro-batches, which is halved, and what to
tell of an error that nothing recovered from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from opsd_cli.data.pairing import PairedBatch
from opsd_cli.settings.config import Config, ZeroSettings
from opsd_cli.settings.memory_errors import Shortage, shortage_of

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
    """What `work` returns; None if it ran out of memory and `recovers`, with everything freed that it held. Only where
    an allocation failed and nothing else: smaller pieces do not repair a broken communicator or kernel."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        shortage = shortage_of(error)
        if not recovers or shortage is None or not shortage.is_recoverable:
            raise
    # Outside the handler: the error's traceback would keep the tensors of every frame it came through.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def ran_out(error: BaseException, config: Config, *, step: int, ranks: int, on_gpu: bool) -> str:
    """What to tell of an error that nothing recovered from: where, what ran out, and every setting that helps, with its
    value."""
    shortage = shortage_of(error) or Shortage("gpu", str(error).splitlines()[0])
    line = shortage.line
    offloads = "cpu" in (config.zero.offload_optimizer, config.zero.offload_parameters)
    if shortage.of == "pinned":
        return (
            f"out of page-locked host memory at step {step} ({line}); raise its limit (ulimit -l unlimited, docker run "
            "--ulimit memlock=-1)" + (f", or keep it on the GPU: zero=stage{config.zero.stage}" if offloads else "")
        )
    if shortage.of == "host" and on_gpu:
        keep = f", or keep more on the GPU: zero=stage{config.zero.stage}" if offloads else ""
        return f"out of host memory at step {step} ({line}); start fewer ranks on this machine: launcher.ranks{keep}"
    advice = f"{smaller(config)}, or {roomier(config.zero, ranks)}"
    if shortage.of == "nccl":
        return f"out of memory at step {step}: NCCL found no room for its buffers ({line}), and cannot go on; {advice}"
    if shortage.of == "suspected":
        return (
            f"probably out of memory at step {step} ({line}, as on a full GPU); {advice}; if it does not help, a "
            "kernel failed before it: CUDA_LAUNCH_BLOCKING=1 shows where"
        )
    recovery = "or let such a step be repeated in smaller pieces: train.halve_on_oom=true"
    if config.train.halve_on_oom:
        recovery = (
            "train.halve_on_oom did not apply: the other ranks were waiting in a collective, every micro-batch was a "
            "single rollout, or the error was outside a micro-batch"
        )
    return f"out of memory at step {step} ({line}); {advice}; {recovery}"


def smaller(config: Config) -> str:
    """The settings that make what stands in memory smaller, with their values."""
    lower = {
        "train.micro_batch_tokens": config.train.micro_batch_tokens,
        "sampling.max_completion_tokens": config.sampling.max_completion_tokens,
        "loss.chunk_mib": config.loss.chunk_mib,
    }
    if hasattr(config.sampler, "max_rows"):
        lower["sampler.max_rows"] = config.sampler.max_rows
    return f"lower {', '.join(f'{key} (now {value})' for key, value in lower.items())}"


def roomier(zero: ZeroSettings, ranks: int) -> str:
    """The next setting of ZeRO that leaves more memory. A single rank has no others to shard over."""
    if ranks > 1 and zero.stage < 3:
        return f"shard more: zero=stage3 (now stage {zero.stage})"
    next_one = "stage2_offload" if ranks == 1 and zero.offload_optimizer == "none" else "stage3_offload"
    return f"use the CPU's memory as well: zero={next_one}"
