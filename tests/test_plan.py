"""The plan says which way a run is computed, and why not the fast one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recipe_support import config_of, opsd

from opsd_cli.engine.packed import LayoutChoice
from opsd_cli.rank.plan import (
    attention_lines,
    completions_line,
    drawn_elsewhere,
    loss_line,
    prompt_lines,
    rows_line,
    sharding_lines,
)
from opsd_cli.run.events import read_events

GPU = torch.device("cuda")  # named only: nothing is put there


@pytest.mark.slow
def test_a_run_says_at_its_start_how_rows_completions_and_loss_are_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], warm_ranks: None
):
    monkeypatch.chdir(tmp_path)
    small = ("train.steps=0", "eval.problems=2", "dataset.retention_problems=0", "dataset.train_problems=20")
    code, _, err = opsd(capsys, "train", "recipe=quickstart", *small, "model.attention=eager")
    assert code == 0, err
    (file,) = tmp_path.glob("runs/*/events.jsonl")
    (started,) = [event for event in read_events(file) if event["kind"] == "run_started"]
    for line in (
        "rows: padded to the longest of a micro-batch: model.attention=eager can only be padded; sdpa and "
        "flash_attention_2 can be packed",
        "completions: drawn by the fast forward pass",
        "loss: in plain PyTorch: the Triton kernel runs on GPUs only",
    ):
        assert line in started["plan"]
        assert f'plan line="{line}"' in err


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (LayoutChoice("packed"), "rows: packed one after another, without padding"),
        (
            LayoutChoice("varlen"),
            "rows: packed one after another, without padding, by torch's kernel for rows of any lengths",
        ),
        (
            LayoutChoice("packed", "no"),
            "rows: packed one after another, without padding; attention runs on groups of similar length: no",
        ),
        (LayoutChoice("flash"), "rows: packed one after another, without padding, by FlashAttention"),
        (LayoutChoice("padded", "no"), "rows: padded to the longest of a micro-batch: no"),
    ],
)
def test_every_layout_has_its_words(rows: LayoutChoice, line: str):
    assert rows_line("rows", rows) == line


def test_a_prompt_of_a_group_is_said_to_be_run_once_or_why_not():
    single, group = (config_of("recipe=quickstart", f"train.rollouts_per_problem={count}") for count in (1, 4))
    assert prompt_lines(single, LayoutChoice("packed")) == []
    (once,) = prompt_lines(group, LayoutChoice("packed"))
    assert once == "prompts: run once for the rollouts of a problem that are scored together"
    for rows, why in (
        (LayoutChoice("packed", "", "they differ"), "they differ"),
        (LayoutChoice("padded", "no"), "rows"),
    ):
        (line,) = prompt_lines(group, rows)
        assert line.startswith(f"prompts: run once for each rollout: {why}")
    off = replace(group, train=replace(group.train, share_prompts=False))
    assert prompt_lines(off, LayoutChoice("packed")) == []


def test_how_weights_became_shards_is_said_with_where_they_were_before():
    cpu = torch.device("cpu")
    in_turn = "shards: each rank took its part of one parameter after another"
    assert sharding_lines(None, GPU) == []
    assert sharding_lines(GPU, GPU) == sharding_lines(cpu, cpu) == [in_turn]
    assert sharding_lines(cpu, GPU) == [
        f"{in_turn}; the card has no room for all of them, so they were checked on the CPU"
    ]


def test_an_attention_that_was_not_asked_for_is_said():
    config = config_of("recipe=quickstart")
    assert attention_lines(config, "eager") == ["attention: eager: this architecture has no sdpa"]
    assert attention_lines(config, "opsd_packed") == []


def test_completions_that_the_engine_does_not_draw_need_no_decision():
    def decide() -> str:
        raise AssertionError("nothing is drawn")

    dataset = config_of("recipe=quickstart", "method=sft")
    elsewhere = drawn_elsewhere(dataset, completer=None)
    assert completions_line(elsewhere, decide, evaluates=False) == "completions: the dataset's reference solutions"
    in_evaluation = completions_line(elsewhere, lambda: "drawn by us", evaluates=True)
    assert in_evaluation.endswith("; in evaluation drawn by us")
    static = config_of("recipe=quickstart")
    elsewhere = drawn_elsewhere(static, completer=None)
    assert completions_line(elsewhere, lambda: "drawn by us", evaluates=False) == "completions: drawn by us"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), ""),
        (("divergence=jsd",), ""),
        (("teacher=blend",), "this target is made of several"),
        (("target=barycentre",), "this target is made of several"),
        (("target=tempered",), "(target.temperature=1.5)"),
        (("tokens=uncertain",), "(tokens.gate="),
        (("tokens=wrong_prefix",), "(tokens.prefix_nats=20)"),
        (("divergence=renyi",), "divergence=renyi with this clip and support"),
        (("loss.importance_cap=2.0",), "loss.importance_cap=2"),
        (("clip=token",), "divergence=forward_kl with this clip and support"),
        (("support=teacher_top100",), "divergence=forward_kl with this clip and support"),
    ],
)
def test_why_the_loss_is_not_one_kernel_on_a_gpu(words: tuple[str, ...], reason: str, monkeypatch: pytest.MonkeyPatch):
    config = config_of("recipe=quickstart", *words)
    monkeypatch.setattr("opsd_cli.rank.plan.find_spec", lambda name: None)
    assert loss_line(config, GPU) == "loss: in plain PyTorch: triton is not installed"
    monkeypatch.setattr("opsd_cli.rank.plan.find_spec", lambda name: "found")
    line = loss_line(config, GPU)
    assert line == "loss: in one Triton kernel" if not reason else reason in line
