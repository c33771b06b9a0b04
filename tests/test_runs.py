"""Whole runs as real processes: what they leave, that a resume changes nothing, how they stop."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import WarmProcess, run_ranks, start_ranks

import opsd_cli.plugins  # noqa: F401
from opsd_cli.engine.disk_space import Counts, checkpoint_bytes
from opsd_cli.run.events import read_events
from opsd_cli.run.folder import RunFolder, write_config
from opsd_cli.settings.compose import compose, resolve, session
from opsd_cli.settings.recipe_files import find_folders
from opsd_cli.settings.typed_config import plain_tree, typed_config

pytestmark = pytest.mark.slow

SMALL = (
    "train.steps=6", "train.problems_per_step=4", "train.micro_batch_tokens=256", "sampling.max_completion_tokens=16",
    "eval.problems=4", "eval.max_completion_tokens=16", "eval.teacher_prompt=false", "checkpoint.every=3",
    "samples.every=2", "dataset.train_problems=40", "dataset.validation_problems=8", "dataset.test_problems=8",
    "dataset.retention_problems=4", "optim.warmup_steps=2",
    "loss.mask_truncated=false", "loss.importance_cap=2.0", "guard.window=2",
)  # fmt: skip


def make_run(folder: Path, *overrides: str) -> RunFolder:
    """A run folder with the frozen config of the quickstart, made small."""
    choices = [item for item in overrides if "." not in item.partition("=")[0]]
    with session(find_folders()):
        tree, _ = compose(["recipe=quickstart", *choices])
        tree, problems = resolve(tree)
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
    run_ranks(["-m", "opsd_cli.rank", run.path, "train"], world_size)


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
                if not name.startswith(("time/", "memory/", "compute/")) and name != "tokens/per_second"
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
    (cut.evaluations / "changed_test.jsonl").unlink()
    for file in cut.evaluations.glob("step_000006_*"):
        file.unlink()
    return cut


SHARDED = ("zero=stage3", "teacher=ema", "sampling.temperature=0.0", "loss.importance_cap=null")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunFolder]:
    """A run of six steps that nothing has interrupted; each once."""

    @cache
    def of(world_size: int, *options: str) -> RunFolder:
        run = make_run(tmp_path_factory.mktemp("whole") / "run", *options)
        train(run, world_size)
        return run

    return of


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (1, ("zero=stage2", "teacher=initial", "lora=r16", "lora.dropout=0.1")),
        (1, ("zero=stage0", "teacher=initial")),
        (1, ("zero=stage2", "teacher=blend", "sampler=static_mix", "train.updates_per_step=2")),
        (2, SHARDED),
        (2, ("zero=stage2", "teacher=sync")),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, tuple) else str(value),
)
def test_six_steps_equal_three_a_resume_and_three(
    whole_run: Callable[..., RunFolder], tmp_path: Path, world_size: int, options: tuple[str, ...]
):
    whole = whole_run(world_size, *options)
    resumed = as_if_stopped_at_three(whole, tmp_path / "resumed")
    train(resumed, world_size)

    expected, got = (load_file(run.model / "model.safetensors") for run in (whole, resumed))
    assert expected.keys() == got.keys()
    assert all(expected[name].equal(got[name]) for name in expected)
    assert without_clock(read_events(whole.events)) == without_clock(read_events(resumed.events))
    assert whole.samples.read_text() == resumed.samples.read_text()
    kept = sorted(file.name for file in whole.evaluations.iterdir())
    assert kept == [
        "changed_retention.jsonl", "changed_test.jsonl", "step_000000_retention_student.jsonl",
        "step_000000_test_student.jsonl", "step_000006_retention_student.jsonl", "step_000006_test_student.jsonl",
    ]  # fmt: skip
    assert all((whole.evaluations / name).read_text() == (resumed.evaluations / name).read_text() for name in kept)
    assert {json.loads(line)["step"] for line in whole.samples.read_text().splitlines()} == {1, 2, 4, 6}
    assert json.loads(resumed.summary.read_text())["steps"] == 6
    assert_the_size_was_foreseen(whole, options)
    assert_drift_is_measured(whole, with_initial_weights=bool({"teacher=initial", "lora=r16"} & set(options)))


def test_a_run_of_two_ranks_goes_on_with_one_sharded_otherwise(whole_run: Callable[..., RunFolder], tmp_path: Path):
    whole = whole_run(2, *SHARDED)
    resumed = as_if_stopped_at_three(whole, tmp_path / "resumed")
    text = resumed.config.read_text()
    resumed.config.write_text(text.replace("stage: 3", "stage: 0"))
    assert resumed.config.read_text() != text
    train(resumed, 1)
    expected, got = (load_file(run.model / "model.safetensors") for run in (whole, resumed))
    for name, weight in expected.items():
        torch.testing.assert_close(got[name], weight, rtol=1e-3, atol=1e-5)
    said = [event["message"] for event in read_events(resumed.events) if event["kind"] == "warning"]
    assert any("was saved by 2 ranks and the run goes on with 1" in message for message in said)
    seen = [[json.loads(line)["problem"] for line in run.samples.open(encoding="utf-8")] for run in (whole, resumed)]
    assert seen[0] == seen[1]  # the data go on where they were


def assert_drift_is_measured(run: RunFolder, *, with_initial_weights: bool) -> None:
    """How far a policy has moved: each update's length, and its KL from the start where that policy is at hand."""
    events = read_events(run.events)
    assert all(event["metrics"]["optim/update_norm"] > 0 for event in events if event["kind"] == "step")
    measured = [event for event in events if event["kind"] == "evaluation" and event["split"] == "test"]
    before, after = [event.get("kl_from_initial") for event in measured]
    assert before is None
    assert (after is not None and 0 < after < 10) if with_initial_weights else after is None


def assert_the_size_was_foreseen(run: RunFolder, options: tuple[str, ...]) -> None:
    """The estimate that decides whether a run fits its disk, against the checkpoint on it."""
    started = next(event for event in read_events(run.events) if event["kind"] == "run_started")
    chosen = dict(option.split("=") for option in options)
    counts = Counts(started["parameters"], started["trainable_parameters"], itemsize=4)
    foreseen = checkpoint_bytes(counts, teacher=chosen["teacher"])
    found = sum(file.stat().st_size for file in (run.checkpoints / "step_000006").rglob("*") if file.is_file())
    assert 0.9 < found / foreseen < 1.1


def start(run: RunFolder) -> WarmProcess:
    """One rank, to be signalled or to end as it does."""
    (process,) = start_ranks(["-m", "opsd_cli.rank", run.path, "train"], 1)
    return process


def wait_for(run: RunFolder, kind: str, *, step: int = 0) -> None:
    """Until the run has written an event of this kind at or after this step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if any(e["kind"] == kind and e.get("step", 0) >= step for e in read_events(run.events)):
            return
        time.sleep(0.05)
    raise AssertionError(f"no {kind} event within two minutes")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_in_a_checkpoint_of_the_last_finished_step(tmp_path: Path, number: int, code: int):
    run = make_run(tmp_path / "stopped", "train.steps=500", "checkpoint.every=0")
    process = start(run)
    wait_for(run, "step", step=2)
    process.send_signal(number)
    assert process.wait(timeout=60) == code
    events = read_events(run.events)
    last_step = max(event["step"] for event in events if event["kind"] == "step")
    (saved,) = [event for event in events if event["kind"] == "checkpoint"]
    assert saved["step"] == last_step
    assert events[-1] | {"time": 0} == {
        "kind": "run_ended", "time": 0, "outcome": "stopped", "step": last_step, "exit_code": code,
        "message": "stopped by a signal",
    }  # fmt: skip
    assert (run.checkpoints / "latest").read_text().strip() == f"step_{last_step:06d}"


def test_a_guard_that_stops_a_run_leaves_the_best_model(tmp_path: Path):
    run = make_run(
        tmp_path / "guarded", "guard=stop", "guard.window=1", "guard.length_ratio=1.0001", "eval.every=1",
        "checkpoint.every=0", "train.steps=50",
    )  # fmt: skip
    assert start(run).wait(timeout=120) == 4
    message = run.error_of(0).read_text()
    assert "guard.length_ratio=1.0001" in message
    assert "model/ holds the best one, step_" in message
    best = (run.checkpoints / "best").read_text().strip()
    evaluations = [e for e in read_events(run.events) if e["kind"] == "evaluation" and e["split"] == "test"]
    measured_while_training = {e["step"]: e["accuracy"] for e in evaluations if e["step"] > 0}
    assert measured_while_training[int(best.removeprefix("step_"))] == max(measured_while_training.values())
    assert (run.model / "model.safetensors").is_file()


def test_a_disk_that_is_too_small_is_refused_with_figures_before_deepspeed_starts(tmp_path: Path):
    run = make_run(
        tmp_path / "large", "checkpoint.keep_last=1000000000000", "checkpoint.every=1", "train.steps=900000000"
    )
    assert start(run).wait(timeout=120) == 3
    message = json.loads(run.error_of(0).read_text())["message"]
    assert re.search(r"has [\d.e+]+ GiB free and this run needs [\d.e+]+ GiB more", message), message
    assert "checkpoint.keep_last=1000000000000" in message
    assert "starting DeepSpeed" not in [e["phase"] for e in read_events(run.events) if e["kind"] == "progress"]
