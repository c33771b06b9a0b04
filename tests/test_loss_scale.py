"""float16: the scale of the loss changes nothing but what vanishes; an overflow costs a repetition, not an update."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from gradient_ranks import make_model
from loss_scale_ranks import TOO_HIGH
from nonfinite_ranks import trains_in_float16
from support import TESTS, run_ranks
from test_runs import as_if_stopped_at_three, make_run, train, without_clock

from opsd_cli.engine.zero_config import deepspeed_config, effective_stage, frozen_config
from opsd_cli.run.events import read_events
from opsd_cli.settings.config import OptimSettings, ZeroSettings

IN_FLOAT16 = pytest.mark.skipif(not trains_in_float16(), reason="this CPU has no products in float16")


@IN_FLOAT16
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.slow
def test_updates_in_float16_are_those_of_float32_whatever_the_scale_does(tmp_path: Path, world_size: int):
    make_model(tmp_path / "tied", tied=True)
    run_ranks([TESTS / "loss_scale_ranks.py", tmp_path], world_size)
    ranks = [json.loads((tmp_path / f"found_{world_size}_{rank}.json").read_text()) for rank in range(world_size)]
    assert all(found == ranks[0] for found in ranks)
    for case, found in ranks[0].items():
        overflows = [update for update in found["high"] if update["overflow"]]
        assert len(overflows) > 3, case
        assert not any(update["moved"] or math.isfinite(update["norm"]) for update in overflows), case
        scales = [update["scale"] for update in found["high"]]
        assert scales[: len(overflows) + 1] == [TOO_HIGH * 0.5**i for i in range(len(overflows) + 1)], case
        assert [update["scale"] for update in found["growing"]] == [2.0**16, 2.0**16, 2.0**17, 2.0**17], case
        for name in ("plain", "growing", "high"):
            made = [update for update in found[name] if not update["overflow"]]
            assert all(update["moved"] for update in made), (case, name)
            for one, other in zip(made, found["float32"], strict=True):  # the norm is reported without the scale
                assert one["norm"] == pytest.approx(other["norm"], rel=0.02), (case, name)
        assert found["plain - float32"] < 0.03, case
        assert found["growing - plain"] < 0.003, case
        assert found["high - plain"] < 0.003, case
        assert found["scaler is restored"], case
        assert found["goes on alike"], case


@IN_FLOAT16
@pytest.mark.slow
def test_an_overflow_is_made_good_within_its_step_and_the_scale_survives_a_resume(tmp_path: Path, monkeypatch):
    """A gradient of the first update is not finite once: another run would end there (guard.nonfinite_patience=1)."""
    run = make_run(tmp_path / "run", "zero=stage2", "teacher=ema", 'model.dtype="float16"')
    monkeypatch.setenv("OPSD_FAULT", "nonfinite@step.backward:1")
    train(run)
    events = read_events(run.events)
    steps = [event["metrics"] for event in events if event["kind"] == "step"]
    assert [step["optim/overflows"] for step in steps] == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert {step["optim/loss_scale"] for step in steps} == {2.0**15}
    assert {step["optim/skipped"] for step in steps} == {0.0}
    assert not [event for event in events if event["kind"] == "warning" and "not finite" in event["message"]]
    (started,) = [event for event in events if event["kind"] == "run_started"]
    assert "weights: bundled:tiny in float16" in started["plan"]
    monkeypatch.delenv("OPSD_FAULT")
    resumed = as_if_stopped_at_three(run, tmp_path / "resumed")
    train(resumed)
    assert without_clock(read_events(resumed.events)) == without_clock(events)


def test_deepspeed_is_told_of_float16_and_of_no_growth_of_its_own():
    zero = ZeroSettings(
        stage=0,
        offload_optimizer="none",
        offload_parameters="none",
        bucket_mib=1,
        hpz_ranks=1,
        overlap=False,
        persist_below=0,
        gather="auto",
    )
    optim = OptimSettings(
        lr=1e-3,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.0,
        schedule="constant",
        warmup_steps=0,
        max_grad_norm=1.0,
        state_dtype="float32",
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        stage = effective_stage(zero, dtype, ranks=1)
        assert stage == (0 if dtype is torch.float32 else 2)
        for config in (deepspeed_config(zero, optim, stage=stage, dtype=dtype), frozen_config("sharded", dtype=dtype)):
            assert config["fp16"]["enabled"] is (dtype is torch.float16)
            assert config["bf16"]["enabled"] is (dtype is torch.bfloat16)
            assert config["fp16"].get("loss_scale_window", 2**62) == 2**62
