"""Commands that start real ranks on the tiny model: a dry run, an evaluation, a sweep with a failing member."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import yaml
from recipe_support import opsd

from opsd_cli.run.events import number, read_events

pytestmark = pytest.mark.slow

FEW = ("dataset.validation_problems=0", "dataset.test_problems=24", "dataset.retention_problems=0")
SMALL = ("recipe=quickstart", "dataset.train_problems=40", *FEW, "train.problems_per_step=2", "train.steps=1")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm_ranks: None) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_dry_run_shows_one_problem_both_ways_and_leaves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = opsd(capsys, "train", *SMALL, "zero=stage2", "--dry-run")
    assert code == 0, err
    assert "on 1 rank with ZeRO stage 0 (instead of zero.stage=2)" in " ".join(out.split())
    assert "student prompt of" in out
    assert "Reference solution:" in out
    assert not list(Path().iterdir())


def test_a_model_is_measured_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("dataset=arithmetic", "dataset.train_problems=4", *FEW, "eval.problems=24")
    useless = "context.teacher='{{question}} {{question}} {{solution}} {{question}}'"  # which this model cannot read
    code, out, err = opsd(capsys, "eval", "tiny", *words, useless)
    assert code == 0, err
    assert "student" in out
    assert re.search(r"^teacher    0 problems won, \d+ lost against the student's prompt: more than noise", out, re.M)
    assert re.search(r"^answers    \S*runs/eval-tiny-001/evaluations$", out, re.M)
    (run,) = Path("runs").iterdir()
    assert run.name == "eval-tiny-001"
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["path"] == "bundled:tiny"
    evaluated = {event["role"]: event for event in read_events(run / "events.jsonl") if event["kind"] == "evaluation"}
    kept = {role: completions(run, f"step_000000_test_{role}") for role in ("student", "teacher")}
    for role, lines in kept.items():
        assert len(lines) == 24
        assert sum(line["correct"] for line in lines) == evaluated[role]["correct"]
    (compared,) = [event for event in read_events(run / "events.jsonl") if event["kind"] == "comparison"]
    (warning,) = [event for event in read_events(run / "events.jsonl") if event["kind"] == "warning"]
    assert warning["name"] == "context"
    assert warning["message"].startswith("the solution does not help this model: 0.0% right with it in the prompt, ")
    assert (compared["name"], compared["since"], compared["problems"]) == ("teacher", 0, 24)
    changed = [t["correct"] - s["correct"] for s, t in zip(kept["student"], kept["teacher"], strict=True)]
    assert (compared["won"], compared["lost"]) == (changed.count(1), changed.count(-1))


def completions(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / "evaluations" / f"{name}.jsonl").read_text().splitlines()]


def test_a_file_of_ones_own_trains_on_the_bundled_model(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"question": f"What is {n} + 1?", "solution": f"{n} + 1 = {n + 1}\n#### {n + 1}", "answer": n + 1}
        for n in range(20)
    ]
    Path("my own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("recipe=jsonl", "dataset.path='my own.jsonl'", "model=tiny", "method=sft", "train.steps=1")
    code, out, err = opsd(capsys, "train", *words)
    assert code == 0, err
    assert 'line="dataset: my own.jsonl, of it the last 2 as test"' in err
    assert "(test, 2 problems" in out
    (run,) = Path("runs").iterdir()
    evaluations = [event for event in read_events(run / "events.jsonl") if event["kind"] == "evaluation"]
    assert [(event["role"], event["step"]) for event in evaluations] == [("student", 0), ("student", 1)]  # no teacher


def test_a_step_without_a_token_that_counts_divides_by_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = opsd(
        capsys, "train", *SMALL, "sampling.max_completion_tokens=1", "eval.problems=0", "run.name=cut"
    )
    assert code == 0, err
    (step,) = [event for event in read_events("runs/cut/events.jsonl") if event["kind"] == "step"]
    assert step["metrics"]["rollout/truncated"] == 1.0
    assert step["metrics"]["rollout/length_mean"] == 1.0
    assert all(math.isfinite(number(value)) for value in step["metrics"].values()), step["metrics"]
    assert step["metrics"]["optim/grad_norm"] == 0.0
    (warning,) = [event for event in read_events("runs/cut/events.jsonl") if event["kind"] == "warning"]
    assert warning["name"] == "no_signal"
    assert warning["message"].startswith("no learning signal in the first step: every completion is cut by the length")
    assert "100.0 % of the completions were cut by the length limit" in out
    assert len(Path("runs/cut/samples.jsonl").read_text().splitlines()) == 2


def test_a_failing_member_does_not_stop_a_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = opsd(
        capsys, "train", "-m", *SMALL, "eval.problems=2", "model.path=./nowhere,bundled:tiny", "run.name=sweep"
    )
    assert code == 2, err
    assert "opsd: 1/2 model.path=./nowhere" in err
    lines = [line for line in out.splitlines() if line.startswith("model.path=")]
    assert "done" in lines[0]
    assert "%" in lines[0]
    assert "failed, exit code 2" in lines[1]
    sweep = Path("runs/sweep")
    members = [json.loads(line) for line in (sweep / "members.jsonl").read_text().splitlines()]
    assert [member["code"] for member in members] == [2, 0]
    done = sweep / members[1]["name"]
    assert (done / "model" / "config.json").is_file()
    assert yaml.safe_load((done / "config.yaml").read_text())["run"]["name"] == done.name
