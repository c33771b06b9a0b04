"""Freed memory is used again instead of being fetched anew; an allocator that the user set is left alone."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import torch
from opsd_cli.heap import keep_freed_memory

print(keep_freed_memory())
rows = torch.ones(1024, 1024)
for _ in range(20):
    rows.exp()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    rows.exp().mul(2).sum()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def kept_and_faults(**environment: str) -> tuple[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_used_again_and_settings_of_the_user_are_left_alone():
    kept, faults = kept_and_faults()
    assert kept == "True"
    assert faults < 4096, "of the 40,960 pages of twenty rounds"
    own, faults = kept_and_faults(MALLOC_MMAP_THRESHOLD_="65536")
    assert own == "False"
    assert faults > 20_000
