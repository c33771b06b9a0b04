"""What the C library does with memory that a tensor on the CPU no longer needs.

glibc gives a freed megabyte back to the operating system at once; the next tensor of that size asks for it again, and
the kernel clears it page by page. Operations on tensors of a megabyte (a few rows of logits, activations of a small
model) then take two to four times as long. With these thresholds freed memory stays with the process.
"""

from __future__ import annotations

import ctypes
import os
import platform

REUSED_BYTES = 32 * 2**20  # allocations up to this size come from the heap; the most that glibc takes
KEPT_BYTES = 256 * 2**20  # freed at the end of the heap before any of it goes back
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt(3)
OWN_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def keep_freed_memory() -> bool:
    """Have this process reuse freed memory; returns whether it took effect: not where the C library is another one, or
    where the environment sets the allocator itself."""
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in OWN_SETTINGS):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(MMAP_THRESHOLD, REUSED_BYTES)) and bool(mallopt(TRIM_THRESHOLD, KEPT_BYTES))
