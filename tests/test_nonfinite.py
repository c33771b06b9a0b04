"""A loss or a gradient that is not finite never reaches the weights; it is kept to be looked at, counted, and ends the
run when it happens too often."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gradient_ranks import make_model
from nonfinite_ranks import trains_in_float16
from support import TESTS, run_ranks, start_ranks
from test_runs import make_run

from opsd_cli.run.events import number, read_events

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_gradient_that_is_not_finite_is_refused_before_the_update_at_every_stage(tmp_path: Path, world_size: int):
    make_model(tmp_path / "tied", tied=True)
    run_ranks([TESTS / "nonfinite_ranks.py", tmp_path], world_size)
    expected = {"refused": "gradient", "norm is finite": False, "unchanged": True, "good update": True}
    scales = {"torch.float32": None, "torch.bfloat16": None, "torch.float16": 65536.0}
    for rank in range(world_size):
        found = json.loads((tmp_path / f"found_{world_size}_{rank}.json").read_text())
        assert len(found) == (13 if trains_in_float16() else 10)
        assert found == {case: {**expected, "scale": scales[case.split()[2]]} for case in found}


def test_refused_updates_are_passed_over_counted_kept_and_end_the_run_when_they_repeat(tmp_path: Path):
    """The gradient of step 1, then on rank 1 the loss of every micro-batch from its seventh on: in a second update."""
    run = make_run(
        tmp_path / "run", "zero=stage2", "teacher=ema", "guard.nonfinite_patience=2", "eval.problems=0",
        "train.updates_per_step=2",
    )  # fmt: skip
    fault = "nonfinite@step.backward:1,rank1:nonfinite@step.loss:7+"
    processes = start_ranks(["-m", "opsd_cli.rank", run.path, "train"], 2, OPSD_FAULT=fault)
    assert [process.wait(timeout=240) for process in processes] == [4, 4]

    events = read_events(run.events)
    steps = [event for event in events if event["kind"] == "step"]
    skipped = [event["metrics"]["optim/skipped"] for event in steps]
    assert skipped[:2] == [1.0, 0.0]
    assert skipped[-3:] == [0.0, 1.0, 1.0]
    assert number(steps[0]["metrics"]["optim/grad_norm"]) == float("inf")
    assert "loss/objective" not in steps[-1]["metrics"]
    last = steps[-1]["step"]
    (first, second) = [event["message"] for event in events if event["kind"] == "warning"]
    refused = "is not finite; the update was refused and the weights are those"
    assert first.startswith(f"step 1: the gradient {refused} of step 0 ")
    assert f"step {last - 1}: the loss {refused} after 1 of the 2 updates of this step " in second
    assert "(1 in a row, guard.nonfinite_patience=2)" in second

    messages = {run.error_of(rank).read_text() for rank in range(2)}
    assert len(messages) == 1
    assert f"step {last}: the loss {refused} of step {last - 1} " in messages.pop()
    names = sorted(file.name for file in run.nonfinite.iterdir())
    assert names == [
        "step_000001_rank0.jsonl", "step_000001_rank1.jsonl",
        f"step_{last - 1:06d}_rank1.jsonl", f"step_{last:06d}_rank1.jsonl",
    ]  # fmt: skip
    kept = [json.loads(line) for line in (run.nonfinite / names[-1]).read_text().splitlines()]
    assert kept
    for rollout in kept:
        assert rollout["refused"] == "loss"
        assert rollout["problem"]
        assert len(rollout["divergence"]) == len(rollout["completion_ids"]) > 0
        assert rollout["student_prompt_ids"]
        assert rollout["teacher_prompt_ids"]
