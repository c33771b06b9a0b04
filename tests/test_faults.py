"""Fault points: each is where its table says, and none does anything unless it was asked to."""

from __future__ import annotations

import errno
import os
import re
import signal
from pathlib import Path

import pytest

from opsd_cli.safety import commit_points
from opsd_cli.settings.errors import ConfigError
from opsd_cli.testing import fault_points

PACKAGE = Path(fault_points.__file__).parents[1]


@pytest.fixture(autouse=True)
def _disarmed():
    yield
    fault_points.arm({})


def arm(spec: str, *, rank: int = 0) -> None:
    fault_points.arm({"OPSD_FAULT": spec, "RANK": str(rank)})


def test_every_point_of_the_table_is_placed_and_no_other():
    placed = [
        name
        for path in PACKAGE.rglob("*.py")
        for name in re.findall(r'\breach\("([^"]+)"\)', path.read_text())
    ]  # fmt: skip
    assert set(placed) == set(fault_points.COMMIT_POINTS)


def test_a_seam_wraps_its_function_while_a_fault_is_armed_and_no_longer():
    from opsd_cli.training import loop

    before = loop.optimize
    arm("raise@step.after_update:1")
    assert loop.optimize is not before
    arm("")
    assert loop.optimize is before


def test_a_point_does_nothing_without_the_variable():
    fault_points.arm({})
    assert not commit_points.is_watched()
    assert not fault_points.reach("step.sampled")


def test_a_fault_comes_at_its_time_once_or_from_then_on():
    arm("raise@step.sampled:2")
    fault_points.reach("step.sampled")
    fault_points.reach("step.scored")
    with pytest.raises(RuntimeError, match=r"step\.sampled"):
        fault_points.reach("step.sampled")
    fault_points.reach("step.sampled")
    arm("nonfinite@step.backward:2+")
    assert [fault_points.reach("step.backward") for _ in range(4)] == [False, True, True, True]


def test_a_fault_is_for_every_rank_or_for_one():
    arm("rank1:nonfinite@step.backward:1,nonfinite@step.backward:2", rank=0)
    assert [fault_points.reach("step.backward") for _ in range(2)] == [False, True]
    arm("rank1:nonfinite@step.backward:1,nonfinite@step.backward:2", rank=1)
    assert [fault_points.reach("step.backward") for _ in range(2)] == [True, True]


def test_each_kind_does_what_it_says():
    import torch

    arm("enospc@save.state:1,oom@step.scored:1,stall@step.sampled:1:0.001,term@step.reported:1,int@step.reported:2")
    with pytest.raises(OSError, match="No space left") as full:
        fault_points.reach("save.state")
    assert full.value.errno == errno.ENOSPC
    with pytest.raises(torch.OutOfMemoryError):
        fault_points.reach("step.scored")
    assert not fault_points.reach("step.sampled")
    got: list[int] = []
    before = {number: signal.signal(number, lambda n, f: got.append(n)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        fault_points.reach("step.reported")
        fault_points.reach("step.reported")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert got == [signal.SIGTERM, signal.SIGINT]


def test_a_kill_takes_the_process_with_it():
    child = os.fork()
    if child == 0:
        arm("kill@step.sampled:1")
        fault_points.reach("step.sampled")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("kill", r"write \[rankR:\]KIND@POINT:N"),
        ("kil@step.sampled:1", "there is no 'kil'.*did you mean 'kill'"),
        ("kill@step.sample:1", "did you mean 'step.sampled'"),
    ],
)
def test_a_fault_that_cannot_be_understood_is_refused(spec: str, words: str):
    with pytest.raises(ConfigError, match=words):
        arm(spec)
