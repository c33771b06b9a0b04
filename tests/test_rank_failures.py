"""One of two real ranks fails while the other waits for it in a collective: what is said, and that nobody stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import opsd
from test_launcher_supervisor import processes_of, wait_until

from opsd_cli.engine.process_group import lost_connection
from opsd_cli.run.events import read_events

pytestmark = pytest.mark.slow

SMALL = (
    "recipe=quickstart", "run.name=it", "launcher.ranks=2", "launcher.device=cpu", "train.steps=3",
    "train.problems_per_step=4", "train.micro_batch_tokens=256", "sampling.max_completion_tokens=16",
    "eval.problems=0", "dataset.train_problems=40", "checkpoint.every=0", "dataset.validation_problems=0",
    "dataset.test_problems=0", "dataset.retention_problems=0",
)  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "options", "code", "words"),
    [
        ("rank1:raise@step.scored:2", (), 1, ["rank 1: RuntimeError: fault asked for at step.scored"]),
        ("rank1:kill@step.scored:2", (), 3, ["rank 1: the process was killed by SIGKILL"]),
        (
            "rank1:oom@step.accumulated:1",
            ("train.halve_on_oom=true",),
            3,
            ["lower train.micro_batch_tokens (now 256)", "rank 1: out of memory at step 1"],
        ),
        (
            "rank1:stall@step.sampled:2",
            ("launcher.stall_seconds=15",),
            3,
            [
                "rank 0: in 'step 2:", "waiting for the other ranks",
                "rank 1: in 'step 2: sample' for", "at opsd_cli/testing/fault_points.py:",
                "no progress on any rank for 15 s (launcher.stall_seconds); rank 1 is the slowest: in 'step 2: sample'",
            ],
        ),
    ],
    ids=["raises", "is killed", "is out of memory where others wait", "stalls"],
)  # fmt: skip
def test_a_failed_rank_is_named_once_and_the_other_does_not_wait_for_it(tmp_path: Path, fault, options, code, words):
    cold = "kill" in fault  # a rank of a fork server is none of the processes that carry this folder's name
    done = opsd("train", *SMALL, *options, cwd=tmp_path, cold=cold, OPSD_FAULT=fault, OPSD_TEST=str(tmp_path))
    assert done.returncode == code, done.stderr
    for word in words:
        assert word in done.stderr
    (shown,) = [line for line in done.stderr.splitlines() if line.startswith("opsd: ")]
    assert shown.startswith(f"opsd: {words[-1]}")
    assert "Connection closed by peer" not in done.stderr
    last = read_events(tmp_path / "runs" / "it" / "events.jsonl")[-1]
    assert (last["kind"], last["outcome"], last["exit_code"]) == ("run_ended", "failed", code)
    assert words[-1] in last["message"]
    assert wait_until(lambda: not processes_of(tmp_path), 3)
    if "stall" in fault:
        stacks = (tmp_path / "runs" / "it" / "logs" / "rank_0.stacks").read_text()
        assert "opsd_cli/engine/process_group.py" in stacks
        assert json.loads((tmp_path / "runs" / "it" / "logs" / "rank_0.phase").read_text())[3] is True


@pytest.mark.parametrize(
    ("text", "is_lost"),
    [
        (
            "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.77.1.2]:42126.",
            True,
        ),
        ("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection reset by peer", True),
        (
            "Gloo connectFullMesh failed with [/gloo/transport/tcp/pair.cc:152] timed out connecting: SO_ERROR: ...",
            True,
        ),
        ("ncclRemoteError: A call failed possibly due to a network error or a remote process exiting", True),
        (
            "NCCL error in: NCCLUtils.cpp:94, remote process exited or there was a network error, NCCL version 2.21",
            True,
        ),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", False),
        ("The size of tensor a (3) must match the size of tensor b (4)", False),
    ],
)
def test_a_collective_that_lost_a_rank_is_no_bug(text: str, is_lost: bool):
    assert bool(lost_connection(RuntimeError(text))) is is_lost
