"""The closed form of a rank's memory against a step on fake tensors, against a real run, and against what it must do by
itself when settings change."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recipe_support import config_of
from simulated_step import batch_of, simulated_peak
from support import REPOSITORY

from opsd_cli.engine import placement
from opsd_cli.insight import plan_drawing
from opsd_cli.insight.model_lookup import find_model
from opsd_cli.insight.plan import larger
from opsd_cli.insight.plan_case import GIB, MIB, Rows, Setup
from opsd_cli.insight.plan_memory import Memory, memory_of
from opsd_cli.insight.plan_setup import Device, setup_of

CPU = Device("a CPU", 16.0, is_gpu=False)
QWEN = find_model("Qwen/Qwen3-1.7B").shape
ROWS = Rows(4624, 4624, 4096, several=True, drawn=4, prompt=129, longest=16)  # what an H100 was measured with
OTHER = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 3, "vocab_size": 4000,
    "num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": False, "head_dim": 32,
}  # fmt: skip
CHECKPOINTS = "train.gradient_checkpointing=true"


@pytest.mark.slow
@pytest.mark.parametrize(  # each pair of model, weights and checkpoints once
    ("model", "words"),
    [
        ("bundled", ("lora=r16",)),
        ("bundled", ("lora=none", CHECKPOINTS)),
        ("other", ("lora=none",)),
        ("other", ("lora=r16", CHECKPOINTS)),
    ],
)
def test_the_student_s_pass_takes_what_a_step_on_fake_tensors_takes(model: str, words: tuple[str, ...], tmp_path: Path):
    folder = REPOSITORY / "opsd_cli" / "assets" / "tiny"
    if model == "other":
        folder = tmp_path
        (folder / "config.json").write_text(json.dumps(OTHER))
    config, rows = config_of("recipe=quickstart", "teacher=live", *words), 6
    simulated = simulated_peak(config, str(folder), batch_of(rows, prompt=60, teacher=120, completion=40))
    setup = setup_of(config, find_model(str(folder)).shape, CPU, ranks=1, threads=torch.get_num_threads())
    lengths = Rows(rows * 100, rows * 160, rows * 40, several=True, drawn=rows, prompt=60, longest=40)
    phase = part_of(memory_of(replace(setup, rows=lengths)), "student")
    assert phase.total - phase.parts["process"] == pytest.approx(simulated, rel=0.05)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None or sys.platform != "linux", reason="the heap is counted by a C library")
def test_a_real_run_holds_what_is_said(tmp_path: Path):
    script, kept = REPOSITORY / "scripts" / "bench" / "plan.py", tmp_path / "found.jsonl"
    words = ["--keep", str(kept), "--only", "tiny_r16_s0_r1"]
    environ = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, str(script), *words], env=environ, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    (row,) = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| tiny_")]
    measured, said = float(row[2]), float(row[3])
    assert said == pytest.approx(measured, rel=0.1)
    assert json.loads(kept.read_text())["name"] == "tiny_r16_s0_r1"


def test_the_plan_gathers_by_layer_where_the_engine_does():
    assert plan_drawing.ROOM_TO_DRAW == placement.ROOM_TO_DRAW


def part_of(memory: Memory, name: str):
    return next(phase for phase in memory.phases if phase.name == name)


def on_a_card(rank: int = 16, **more) -> Setup:
    trained = QWEN.adapter(rank) if rank else 0
    settings = {"card": 80.0, "chunk": 256 * MIB, "trained": trained, "lora_rank": rank} | more
    return Setup(QWEN, ROWS, **settings)


@pytest.mark.parametrize(
    ("rank", "teacher", "times", "measured"),
    [(16, "other", 1, 7.98), (16, "other", 2, 11.2), (16, "other", 4, 17.6), (0, "other", 1, 38.0),
     (0, "other", 2, 41.2), (0, "other", 4, 47.7), (16, "shared", 0, 4.78), (0, "copy", 0, 38.0)],
)  # fmt: skip
def test_distillation_from_a_second_model_takes_what_it_took_on_an_h100(
    rank: int, teacher: str, times: int, measured: float
):
    other = larger(QWEN, times) if times else None
    memory = memory_of(on_a_card(rank, teacher=teacher, other=other))
    assert part_of(memory, "student").total / GIB == pytest.approx(measured, rel=0.03)


def test_a_model_of_so_many_times_the_weights_has_them():
    for times in (1, 2, 4):
        assert larger(QWEN, times).parameters == pytest.approx(times * QWEN.parameters, rel=0.02)


def test_without_sharding_an_update_holds_all_gradients_twice():
    alone = Setup(QWEN, replace(ROWS, student=100, teacher=100), bytes=4, stage=0)
    update = part_of(memory_of(alone), "update")
    assert update.parts["gradients"] == 4 * QWEN.parameters
    assert update.parts["bucket"] == 4 * 500_000_000  # DeepSpeed's limit
    adapters = replace(alone, trained=QWEN.adapter(16), lora_rank=16)
    assert part_of(memory_of(adapters), "update").parts["bucket"] == 4 * QWEN.adapter(16)
    sharded = part_of(memory_of(replace(alone, ranks=4, stage=2)), "update").parts
    assert (sharded["gradients"], sharded["bucket"]) == (QWEN.parameters, 2 * QWEN.parameters)
    assert "update" not in [phase.name for phase in memory_of(replace(alone, bytes=2)).phases]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_more_ranks_never_need_more_memory_than_two(stage: int):
    peaks = [memory_of(on_a_card(0, stage=stage, ranks=ranks)).peak.total for ranks in (2, 4, 8, 64, 1024)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < peaks[0]


@pytest.mark.parametrize(
    "change",
    [{"checkpoints": True}, {"offloads": True}, {"tiles": 4}, {"offload_optimizer": True}, {"half_states": True},
     {"teacher": "shared"}],
    ids=str,
)  # fmt: skip
def test_a_setting_that_saves_memory_saves_some(change: dict):
    rows = replace(ROWS, student=32768, teacher=32768)
    before = replace(on_a_card(0, teacher="copy", checkpoints="checkpoints" not in change), rows=rows)
    assert part_of(memory_of(replace(before, **change)), "student").total < part_of(memory_of(before), "student").total


def test_four_bits_and_a_sharded_or_streamed_teacher_take_less():
    other = larger(QWEN, 4)
    whole, shared, streamed = (
        memory_of(on_a_card(teacher="other", other=other, other_shards=shards, ranks=8)) for shards in (1, 8, 0)
    )
    assert whole.peak.total > shared.peak.total > streamed.peak.total
    assert streamed.host["teacher"] > 0
    assert memory_of(on_a_card(four_bit=True)).peak.total < 0.6 * memory_of(on_a_card()).peak.total
