"""Whole runs as real processes: what they leave, that a resume changes nothing, how they stop."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support import run_ranks

import opsd_cli.plugins  # noqa: F401
from opsd_cli.events import read_events
from opsd_cli.run_folder import RunFolder, write_config
from opsd_cli.settings.compose import composed, resolved, session
from opsd_cli.settings.config import plain_tree, typed_config
from opsd_cli.settings.folders import find_folders

SMALL = (
    "train.steps=6", "train.problems_per_step=4", "train.micro_batch_tokens=256", "sampling.max_completion_tokens=16",
    "eval.problems=4", "eval.max_completion_tokens=16", "eval.teacher_prompt=false", "checkpoint.every=3",
    "samples.every=2", "dataset.train_problems=40", "dataset.test_problems=8", "optim.warmup_steps=2",
    "loss.mask_truncated=false", "loss.importance_cap=2.0", "guard.window=2",
)  # fmt: skip


def make_run(folder: Path, *overrides: str) -> RunFolder:
    """A run folder with the frozen config of the quickstart, made small."""
    choices = [item for item in overrides if "." not in item.partition("=")[0]]
    with session(find_folders()):
        tree = composed(["recipe=quickstart", *choices]).tree
        tree, problems = resolved(tree)
    assert not problems
    for item in (*SMALL, *(item for item in overrides if item not in choices)):
        key, _, text = item.partition("=")
        section, leaf = key.split(".")
        tree[section][leaf] = json.loads(text)
    run = RunFolder(folder)
    for path in (run.logs, run.checkpoints):
        path.mkdir(parents=True, exist_ok=True)
    write_config(run, plain_tree(typed_config(tree)))
    return run


def train(run: RunFolder, world_size: int = 1) -> None:
    run_ranks(["-m", "opsd_cli.worker", run.path, "train"], world_size)


def without_clock(events: list[dict]) -> list[dict]:
    """Events as they must repeat: no times, no memory, no notes of phases or of starting."""
    kept = []
    for event in events:
        if event["kind"] in ("progress", "run_started"):
            continue
        event = {key: value for key, value in event.items() if key not in ("time", "seconds")}
        if "metrics" in event:
            event["metrics"] = {
                name: value
                for name, value in event["metrics"].items()
                if not name.startswith(("time/", "memory/")) and name != "tokens/per_second"
            }
        kept.append(event)
    return kept


def as_if_stopped_at_three(run: RunFolder, folder: Path) -> RunFolder:
    """A copy of a finished run as a crash right after its first checkpoint would have left it, with lines after it."""
    shutil.copytree(run.path, folder)
    cut = RunFolder(folder)
    shutil.rmtree(cut.checkpoints / "step_000006")
    (cut.checkpoints / "latest").write_text("step_000003\n")
    shutil.rmtree(cut.model)
    cut.summary.unlink()
    return cut


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (1, ("zero=stage0", "teacher=initial")),
        (1, ("zero=stage1", "teacher=live")),
        (1, ("zero=stage2", "teacher=initial", "lora=r16", "lora.dropout=0.1")),
        (1, ("zero=stage3", "teacher=initial")),
        (1, ("zero=stage1", "lora=r16", "teacher=ema")),
        (1, ("zero=stage2", "teacher=blend", "sampler=static_mix", "train.updates_per_step=2")),
        (2, ("zero=stage2", "teacher=live")),
        (2, ("zero=stage3", "teacher=initial")),
        (2, ("zero=stage3", "teacher=ema")),
        (2, ("zero=stage2", "teacher=sync")),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, tuple) else str(value),
)
def test_six_steps_equal_three_a_resume_and_three(tmp_path: Path, world_size: int, options: tuple[str, ...]):
    whole = make_run(tmp_path / "whole", *options)
    train(whole, world_size)
    resumed = as_if_stopped_at_three(whole, tmp_path / "resumed")
    train(resumed, world_size)

    expected, got = (load_file(run.model / "model.safetensors") for run in (whole, resumed))
    assert expected.keys() == got.keys()
    assert all(expected[name].equal(got[name]) for name in expected)
    assert without_clock(read_events(whole.events)) == without_clock(read_events(resumed.events))
    assert whole.samples.read_text() == resumed.samples.read_text()
    assert json.loads(resumed.summary.read_text())["steps"] == 6
