"""A sample of the crash matrix: one run of each family is killed, stopped or meets a full disk, and is continued."""

from __future__ import annotations

import pytest
from support import REPOSITORY, run_ranks

pytestmark = pytest.mark.slow


def test_a_run_that_was_killed_stopped_or_met_a_full_disk_ends_as_if_nothing_had_happened():
    words = ("--steps", "4", "--sample", "1", "--seed", "7")
    (output,) = run_ranks([REPOSITORY / "scripts" / "crash_matrix.py", *words], 1, seconds=280)
    assert "5 cases" in output
    assert "0 differ" in output
