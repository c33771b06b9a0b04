"""A sample of the crash matrix: one run of each family is killed, stopped or meets a full disk, and is continued."""

from __future__ import annotations

import subprocess
import sys

from support import REPOSITORY


def test_a_run_that_was_killed_stopped_or_met_a_full_disk_ends_as_if_nothing_had_happened():
    script = REPOSITORY / "scripts" / "crash_matrix.py"
    command = [sys.executable, script, "--steps", "4", "--sample", "1", "--seed", "7"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-2000:]
    assert "5 cases" in ended.stdout
    assert "0 differ" in ended.stdout
