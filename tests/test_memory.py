"""Out of memory: with `train.halve_on_oom` the step is repeated in smaller pieces with the same result. That the
gradients begun before are forgotten at every stage is test_gradients' (variants dropped and broken)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recipe_support import config_of
from support import run_ranks
from test_runs import make_run

from opsd_cli.run.events import read_events
from opsd_cli.run.folder import RunFolder
from opsd_cli.training.interruptions import explain_out_of_memory

EXACT = ("rollout/", "tokens/completion")
CLOSE = ("loss/objective", "kl/reverse", "entropy/teacher", "optim/grad_norm")


def trained(folder: Path, world_size: int, *options: str, fault: str = "") -> RunFolder:
    run = make_run(
        folder, "train.steps=2", "checkpoint.every=0", "eval.problems=0", "train.halve_on_oom=true", "teacher=ema",
        "train.problems_per_step=8", "train.micro_batch_tokens=1024", *options,
    )  # fmt: skip
    given = {"OPSD_FAULT": fault} if fault else {}
    run_ranks(["-m", "opsd_cli.rank", run.path, "train"], world_size, **given)
    return run


def metrics_of(run: RunFolder) -> list[dict]:
    return [event["metrics"] for event in read_events(run.events) if event["kind"] == "step"]


@pytest.mark.slow
def test_a_step_that_runs_out_of_memory_is_repeated_in_smaller_pieces_with_the_same_result(tmp_path: Path):
    calm = [
        e["metrics"] for e in read_events(trained(tmp_path / "calm", 2, "zero=stage2").events) if e["kind"] == "step"
    ]
    cases = {
        "one of two ranks, in the student's pass": (2, ("zero=stage2",), "rank1:oom@step.scored:1"),
        "after the last backward of stage 3, twice": (1, ("zero=stage3",), "oom@step.accumulated:1,oom@step.loss:3"),
    }
    for number, (case, (world_size, options, fault)) in enumerate(cases.items()):
        events = read_events(trained(tmp_path / str(number), world_size, *options, fault=fault).events)
        warnings = [event["message"] for event in events if event["kind"] == "warning"]
        assert any("step 1 ran out of memory and was repeated from the same rollouts" in text for text in warnings), (
            case
        )
        assert any("Set train.micro_batch_tokens=" in text for text in warnings), case
        for made, expected in zip((e["metrics"] for e in events if e["kind"] == "step"), calm, strict=True):
            for name, value in expected.items():
                if name.startswith(EXACT):
                    assert made[name] == value, (case, name)
                elif name in CLOSE:
                    assert made[name] == pytest.approx(value, rel=1e-4, abs=1e-6), (case, name)


@pytest.mark.parametrize(
    ("words", "ranks", "advice"),
    [
        (("zero=stage2",), 2, "shard more: zero=stage3 (now stage 2)"),
        (("zero=stage3",), 2, "as well: zero=stage3_offload"),
        (("zero=stage2",), 1, "as well: zero=stage2_offload"),
        (("zero=stage2_offload",), 1, "as well: zero=stage3_offload"),
    ],
)
def test_what_helps_is_named_with_its_value(words: tuple[str, ...], ranks: int, advice: str):
    config = config_of("recipe=quickstart", "train.micro_batch_tokens=700", "sampler.max_rows=9", *words)
    message = explain_out_of_memory(
        torch.OutOfMemoryError("CUDA out of memory.\nmore"), config, step=4, ranks=ranks, on_gpu=True
    )
    assert message.startswith("out of memory at step 4 (CUDA out of memory.); lower train.micro_batch_tokens (now 700)")
    assert "sampler.max_rows (now 9)" in message
    assert advice in message
    assert "train.halve_on_oom=true" in message
    assert "sampler.max_rows" not in explain_out_of_memory(
        RuntimeError("x"), config_of("recipe=quickstart", "sampler=dataset"), step=1, ranks=1, on_gpu=True
    )
