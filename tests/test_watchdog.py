"""The watchdog: no rank moves any more, and what each was at is said; what is long but moves is left alone."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from opsd_cli.launch.exit_messages import explain
from opsd_cli.launch.supervisor import Ended, Limits, RankProcess, supervise
from opsd_cli.launch.watchdog import innermost
from opsd_cli.run.folder import RunFolder

pytestmark = pytest.mark.slow

RANK = """
import os, pathlib, sys, time
from opsd_cli.run import heartbeat
from opsd_cli.run.folder import RunFolder
heartbeat.BYTES_SECONDS = 0.2
rank = int(sys.argv[1])
own = heartbeat.Heartbeat(RunFolder(pathlib.Path.cwd()), rank)
"""
SAMPLES_FOR_EVER = "own.enter('step 3: sample'); time.sleep(60)"
WAITS_FOR_EVER = """
own.enter('step 3: sample')
with own.waiting():
    time.sleep(60)
"""


class Screen:
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def poll(self) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)

    def close(self, *, code, message, tail) -> None:
        pass


def run(path: Path, *codes: str, stall_seconds: float | None = 2.0) -> tuple[Ended, list[str], str]:
    """How ranks with this code end, what the screen was told, and the message."""
    folder = RunFolder(path)
    processes = [
        RankProcess(
            rank, (sys.executable, "-c", RANK + code, str(rank)), os.environ, path, folder.log_of(rank),
            folder.error_of(rank).name,
        )
        for rank, code in enumerate(codes)
    ]  # fmt: skip
    screen, limits = Screen(), Limits(settle_seconds=0.3, poll_seconds=0.02, stall_seconds=stall_seconds)
    ended = supervise(processes, screen, limits=limits)
    return ended, screen.notes, explain(ended, folder, processes, limits).message


def test_a_rank_that_stalls_is_named_with_its_phase_and_its_stacks_and_all_are_ended(tmp_path: Path):
    ended, notes, message = run(tmp_path, WAITS_FOR_EVER, SAMPLES_FOR_EVER)
    assert (ended.how, ended.code, ended.rank) == ("stalled", 3, 1)
    assert [note.split(" ")[:2] for note in notes] == [["rank", "0:"], ["rank", "1:"]]
    assert "in 'step 3: sample' for" in notes[0]
    assert "waiting for the other ranks" in notes[0]
    assert "waiting" not in notes[1]
    assert notes[1].endswith("rank_1.stacks")
    assert "time.sleep" not in (tmp_path / "logs" / "rank_1.log").read_text()
    assert 'File "<string>"' in (tmp_path / "logs" / "rank_1.stacks").read_text()
    assert (
        "no progress on any rank for 2 s (launcher.stall_seconds); rank 1 is the slowest: in 'step 3: sample'"
        in message
    )


def test_a_rank_that_has_entered_fewer_phases_is_the_one_that_is_behind(tmp_path: Path):
    further = "own.enter('step 3: sample'); own.enter('step 3: update'); time.sleep(60)"
    assert run(tmp_path, SAMPLES_FOR_EVER, further)[0].rank == 0


def test_a_rank_that_never_began_is_the_one_that_is_behind_and_is_not_asked_for_stacks(tmp_path: Path):
    silent = "pathlib.Path('logs/rank_1.phase').unlink(); pathlib.Path('logs/rank_1.stacks').unlink(); time.sleep(60)"
    ended, notes, message = run(tmp_path, SAMPLES_FOR_EVER, silent)
    assert ended.rank == 1
    assert "rank 1 is the slowest: has not begun" in message
    assert notes[1].endswith("rank_1.log")


def test_a_long_phase_that_moves_is_left_alone_and_so_is_who_waits_for_it(tmp_path: Path):
    moves = (
        "own.beat(); time.sleep(.01)",  # a token
        "open('download', 'ab').write(bytes(2 ** 20)); time.sleep(.1)",  # no sign but its bytes
    )
    for move in moves:
        long = f"end = time.monotonic() + 3\nwhile time.monotonic() < end:\n    {move}"
        waits = "with own.waiting():\n    time.sleep(3)"
        assert run(tmp_path, long, waits)[0] == Ended("completed", 0), move


def test_without_a_limit_silence_means_nothing(tmp_path: Path):
    assert run(tmp_path, "time.sleep(1)", stall_seconds=None)[0].how == "completed"


def test_the_innermost_line_of_opsd_is_found_among_threads_and_libraries():
    stacks = (
        'Thread 0x1 (most recent call first):\n  File "/x/opsd_cli/run/heartbeat.py", line 9 in _watch_bytes\n'
        '  File "/lib/threading.py", line 1 in run\n\n'
        'Current thread 0x2 (most recent call first):\n  File "/lib/torch/distributed.py", line 4 in all_reduce\n'
        '  File "/x/opsd_cli/engine/process_group.py", line 34 in all_sum\n'
        '  File "/x/opsd_cli/rank/entry.py", line 2 in main\n'
    )
    assert innermost(stacks) == ["at /x/opsd_cli/engine/process_group.py:34 in all_sum"]
    assert innermost("") == []
