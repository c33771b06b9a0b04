"""Run folders with what a finished run leaves, written by the parts that write them, without training anything."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from recipe_support import config_of

from opsd_cli.insight.paired import compare, wilson_interval
from opsd_cli.run.evaluations import changed_lines, changes_file, completions_file, write_lines
from opsd_cli.run.events import EventLog
from opsd_cli.run.folder import RunFolder, write_command, write_config
from opsd_cli.run.summary import write_summary
from opsd_cli.settings.config import Config
from opsd_cli.settings.typed_config import plain_tree

PROBLEMS = 40
STARTED = {
    "run": "x", "task": "train", "start_step": 0, "problems_per_step": 2, "rollouts_per_problem": 1, "ranks": 1,
    "device": "cpu", "parameters": 10, "trainable_parameters": 10, "versions": {}, "dataset_fingerprint": "f",
    "plan": [],
}  # fmt: skip


@cache
def quickstart() -> Config:
    return config_of("recipe=quickstart")


def make_run(
    root: Path,
    name: str,
    *,
    right: tuple[int, int] = (10, 30),
    steps: int = 20,
    changes: dict[str, Any] | None = None,
    outcome: str | None = "completed",
    text: str = "7+3=10.",
    argv: tuple[str, ...] = ("opsd", "train", "recipe=quickstart"),
    message: str = "",
) -> RunFolder:
    """A run that got `right` of 40 problems right before and after its steps; `changes` are settings by dotted key, and
    an `outcome` of None is a run whose process went away."""
    folder = RunFolder(root / name)
    folder.logs.mkdir(parents=True)
    tree = plain_tree(replace(quickstart(), run=replace(quickstart().run, root=str(root), name=name)))
    for key, value in {"train.steps": steps, **(changes or {})}.items():
        section, _, setting = key.partition(".")
        tree[section][setting] = value
    write_config(folder, tree)
    write_command(folder, argv=argv, task="train", device="cpu", chosen={"recipe": "quickstart", "method": "opsd"})
    log = EventLog(folder.events)
    log.write("run_started", **{**STARTED, "run": name, "steps": steps})
    graded = [{f"p{i}": i < n for i in range(PROBLEMS)} for n in right]
    _evaluation(folder, log, 0, right[0], graded[0], text)
    for step in range(1, steps + 1):
        loss = 1.0 / step
        log.progress("sampling", done=step, total=steps)
        log.write(
            "step", step=step, metrics={"loss/objective": loss, "kl/forward": loss, "kl/reverse": loss, **METRICS}
        )
    write_lines(folder.samples, [_sample(step, text) for step in (1, max(2, steps))])
    log.write("warning", name="drift", message=f"possible drift: {text}")
    if outcome == "completed":
        _evaluation(folder, log, steps, right[1], graded[1], text)
        found = compare(*graded)
        assert found is not None
        counted = {**asdict(found), "won": len(found.won), "lost": len(found.lost)}
        log.write("comparison", name="change", step=steps, since=0, split="test", **counted)
        before, after = ({p: {"problem": p, "completion": text} for p in grades} for grades in graded)
        write_lines(changes_file(folder, split="test"), changed_lines(before, after, won=found.won, lost=found.lost))
    if outcome is not None:
        code = 0 if outcome == "completed" else 4
        log.write("run_ended", outcome=outcome, step=steps, exit_code=code, message=message)
    log.close()
    if outcome == "completed":
        write_summary(folder, peak_gib=0.5)
    return folder


METRICS = {
    "entropy/student": 0.2, "entropy/teacher": 0.1, "agree/top1": 0.9, "rollout/accuracy": 0.5,
    "rollout/truncated": 0.0, "rollout/length_mean": 30.0, "optim/grad_norm": 1.0, "optim/lr": 1e-3,
    "tokens/per_second": 100.0, "tokens/completion": 60, "memory/peak_gib": 0.5,
    "time/sample": 0.1, "time/score": 0.05, "time/update": 0.1, "time/step": 0.3,
}  # fmt: skip


def _evaluation(folder: RunFolder, log: EventLog, step: int, correct: int, grades: dict[str, bool], text: str) -> None:
    low, high = wilson_interval(correct, PROBLEMS)
    log.write(
        "evaluation", step=step, split="test", role="student", problems=PROBLEMS, correct=correct, low=low, high=high,
        accuracy=correct / PROBLEMS, length_mean=30.0, truncated=0.0, stated=1.0, seconds=0.5,
    )  # fmt: skip
    lines = [
        {"problem": p, "question": text, "answer": "1", "completion": text, "correct": c} for p, c in grades.items()
    ]
    write_lines(completions_file(folder, step=step, split="test", role="student"), lines)


def _sample(step: int, text: str) -> dict[str, Any]:
    pieces = [text, " So", " 12", "."]
    return {
        "step": step, "problem": "p1", "prompt": text, "teacher_prompt": text, "completion": "".join(pieces),
        "completion_ids": list(range(len(pieces))), "pieces": pieces, "finish_reason": "stop", "answer": "12",
        "reward": 1.0, "divergence": [0.0, 0.4, 2.0, 9.0],
    }  # fmt: skip


def make_sweep(root: Path, members: dict[str, dict[str, Any]]) -> Path:
    """A sweep's folder: each member's name and the arguments of its run; a member of `None` left no folder."""
    root.mkdir(parents=True)
    with open(root / "members.jsonl", "w", encoding="utf-8") as file:
        for name, arguments in members.items():
            if arguments is not None:
                make_run(root, name, **arguments)
            ended = arguments is not None and arguments.get("outcome", "completed") == "completed"
            file.write(json.dumps({"name": name, "swept": [f"optim.lr={name}"], "code": 0 if ended else 4}) + "\n")
    return root
