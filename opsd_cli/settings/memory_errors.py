"""Recognise that memory ran out, in every form in which PyTorch, CUDA, Triton, NCCL and the C++ library say it: only
some of them raise an error of its own kind."""

from __future__ import annotations

import errno
import re
import traceback
from dataclasses import dataclass
from typing import Literal

from opsd_cli.settings.errors import OpsdError

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


@dataclass(frozen=True)
class Shortage:
    """What kind of memory ran out, and the line that says so. gpu: an allocation on the GPU was refused and nothing
    else happened. host: the same in ordinary memory. pinned: in memory that a GPU reads directly. nccl: inside a
    collective, whose communicator is of no use afterwards. suspected: a library could not start, as on a full GPU or
    after a kernel that failed."""

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
    return shortage_of(error) is not None


def _was_pinning(error: BaseException) -> bool:
    """Whether host memory was being locked for a GPU: CUDA says the same of it as of its own memory."""
    names = (frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__))
    return any("pin_memory" in name or "pinned" in name for name in names)
