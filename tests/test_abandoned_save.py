"""A save that is given up by a second Ctrl-C, through the real command, and the run that goes on afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import REPOSITORY, opsd

from opsd_cli.engine.checkpoint import damage_of
from opsd_cli.run.events import read_events

pytestmark = pytest.mark.slow

SMALL = (
    "recipe=quickstart", "train.steps=3", "train.problems_per_step=2", "sampling.max_completion_tokens=8",
    "eval.problems=0", "dataset.train_problems=40", "dataset.validation_problems=0", "dataset.test_problems=0",
    "dataset.retention_problems=0",
    "checkpoint.every=1", "launcher.device=cpu", "launcher.ranks=1", "launcher.threads=1",
)  # fmt: skip


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path} within two minutes"
        time.sleep(0.05)


def test_a_second_ctrl_c_gives_up_the_save_and_the_run_goes_on_from_the_checkpoint_before(tmp_path: Path):
    process = subprocess.Popen(
        [sys.executable, "-m", "opsd_cli", "train", *SMALL, "run.name=a"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OPSD_FAULT": "stall@save.engine:2:250"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        run = tmp_path / "runs" / "a"
        wait_for(run / "checkpoints" / "step_000002.part")
        process.send_signal(signal.SIGINT)
        time.sleep(1.0)  # sooner, a second one would be the same Ctrl-C delivered twice
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=30)[0]
    finally:
        process.kill()
    assert process.returncode == 130
    assert "press Ctrl-C again to abandon the save" in said
    assert "the save is abandoned; the previous checkpoint is unchanged" in said
    assert "opsd train --resume runs/a" in said
    assert damage_of(run / "checkpoints" / "step_000001") is None

    resumed = opsd("train", "--resume", "runs/a", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step_000002", "step_000003"]
    assert [event["step"] for event in read_events(run / "events.jsonl") if event["kind"] == "step"] == [1, 2, 3]
