"""Freed memory is used again instead of being fetched anew; an allocator that the user set is left alone."""

import os
import platform
import subprocess
import sys

import pytest

from opsd_cli.cpu.allocator import OWN_SETTINGS

PAGES_OF_A_ROUND = 2048  # two tensors of 4 MiB
PROGRAM = """
import ctypes
from resource import RUSAGE_SELF, getrusage
import torch
from opsd_cli.cpu.allocator import keep_freed_memory

PR_SET_THP_DISABLE = 41  # pages of 4 KiB, whatever the machine prefers
ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
kept = keep_freed_memory()
rows = torch.ones(1024, 1024)
faults = []
for _ in range(20):
    before = getrusage(RUSAGE_SELF).ru_minflt
    rows.exp().mul(2).sum()
    faults.append(getrusage(RUSAGE_SELF).ru_minflt - before)
print(kept, min(faults))
"""


def kept_and_fewest_faults(**environment: str) -> tuple[str, int]:
    """The fewest page faults of any round: the first ones, and whatever else the machine did, do not count."""
    inherited = {name: value for name, value in os.environ.items() if name not in OWN_SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**inherited, **environment}, capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
@pytest.mark.slow
def test_freed_memory_is_used_again_and_settings_of_the_user_are_left_alone():
    kept, faults = kept_and_fewest_faults()
    assert kept == "True"
    assert faults < PAGES_OF_A_ROUND / 8
    own, faults = kept_and_fewest_faults(MALLOC_MMAP_THRESHOLD_="65536")
    assert own == "False"
    assert faults > PAGES_OF_A_ROUND / 2
