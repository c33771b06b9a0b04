"""Running out of memory as something to recover from: the forms such an error takes, the token budget of micro-batches,
which is halved, and the error, which is let go of or explained. Owns no decision about when a step is repeated; that is
`loop`'s."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from opsd_cli.data.pairing import PairedBatch
from opsd_cli.settings.config import Config, ZeroSettings
from opsd_cli.settings.errors import OpsdError

Made = TypeVar("Made")

Kind = Literal["gpu", "host", "pinned", "nccl", "suspected"]

FORMS: tuple[tuple[Kind, str], ...] = (
    ("nccl", r"NCCL(?s:.*)\n(.*(?:Failed to CUDA \w*\s?(?:calloc|malloc|alloc)|out of memory).*)"),
    ("host", r"(.*(?:DefaultCPUAllocator: |Cannot allocate memory|std::bad_alloc).*)"),
    ("suspected", r"(.*CU(?:BLAS|DNN|SOLVER)_STATUS_NOT_INITIALIZED.*)"),
    ("gpu", r"(.*(?:_STATUS_ALLOC_FAILED|_ALLOCATION_FAILED|CUDA_ERROR_OUT_OF_MEMORY|out of memory).*)"),
)
"""What ran out, and the line of an error's text that says so; the first that is found counts. The texts are those of
PyTorch (its allocator, CUDA's runtime and driver, cuBLAS, cuDNN), Triton, NCCL and the C++ library. Triton's `out of
resource` is none of them: a kernel is too large for the card, whatever memory is free."""


class OutOfMemory(Exception):
    """A micro-batch did not fit into the memory of some rank. Raised on every rank at the same place."""


@dataclass(frozen=True)
class Shortage:
    """What kind of memory ran out, and the line that says so.

    gpu: an allocation on the GPU was refused and nothing else happened. host: the same in ordinary memory. pinned: in
    memory that a GPU reads directly. nccl: inside a collective, whose communicator is of no use afterwards. suspected:
    a library could not start, as on a full GPU or after a kernel that failed.
    """

    of: Kind
    line: str

    @property
    def is_recoverable(self) -> bool:
        """Whether the process can go on with smaller pieces."""
        return self.of in ("gpu", "host")


def shortage_of(error: BaseException) -> Shortage | None:
    """What ran out, if this error says that something did: libraries raise it as a plain RuntimeError as well."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return Shortage("host", str(error) or "MemoryError")
    if not isinstance(error, RuntimeError) or isinstance(error, OpsdError):
        return None
    for of, pattern in FORMS:
        if found := re.search(pattern, str(error)):
            return Shortage("pinned" if of == "gpu" and _was_pinning(error) else of, found[1].strip())
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this error says that memory ran out, in any of its forms."""
    return shortage_of(error) is not None


def _was_pinning(error: BaseException) -> bool:
    """Whether host memory was being locked for a GPU: CUDA says the same of it as of its own memory."""
    trace = error.__traceback__
    while trace is not None:
        if "pin_memory" in trace.tb_frame.f_code.co_name or "pinned" in trace.tb_frame.f_code.co_name:
            return True
        trace = trace.tb_next
    return False


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
    """What `work` returns; None when it ran out of memory and `recovers`, with everything let go that it held. Only
    where nothing but an allocation failed: what else a shortage breaks is not mended by smaller pieces."""
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
    """The next setting of ZeRO that leaves more memory. One rank has nobody to share with."""
    if ranks > 1 and zero.stage < 3:
        return f"shard more: zero=stage3 (now stage {zero.stage})"
    next_one = "stage2_offload" if ranks == 1 and zero.offload_optimizer == "none" else "stage3_offload"
    return f"use the CPU's memory as well: zero={next_one}"
