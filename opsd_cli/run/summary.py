"""`summary.json`: a finished run in one file, made from its events; and the plan that `--dry-run` prints."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from opsd_cli.run.events import Event, number, read_events
from opsd_cli.run.folder import RunFolder, read_command
from opsd_cli.safety.commit_points import reach
from opsd_cli.settings.config import Config
from opsd_cli.settings.errors import OutsideError

SCHEMA = 1
FACTS = ("ranks", "device", "parameters", "trainable_parameters", "versions", "dataset_fingerprint")  # of run_started


def write_summary(folder: RunFolder, *, peak_gib: float) -> dict[str, Any]:
    """Write and return the summary of a run that has ended."""
    summary = summarise(read_events(folder.events), command=read_command(folder))
    summary["peak_memory_gib"] = round(max(peak_gib, summary["peak_memory_gib"]), 3)
    new = Path(f"{folder.summary}.new")
    try:
        new.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        reach("end.summary")
        os.replace(new, folder.summary)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise OutsideError(f"cannot write {folder.summary}: {error.strerror}; free disk space, then resume") from None
    reach("end.summarised")
    return summary


def summarise(events: list[Event], *, command: dict[str, Any]) -> dict[str, Any]:
    """Accuracy before and after with intervals, tokens, time, memory, versions, data and command."""
    first = next((event for event in events if event["kind"] == "run_started"), {})
    steps = [event["metrics"] for event in events if event["kind"] == "step"]
    evaluations = _facts(events, "evaluation")
    return {
        "schema": SCHEMA,
        "run": first.get("run"),
        "task": first.get("task"),
        "steps": len(steps),
        "before": pick(evaluations, "student", step=0),
        "after": pick(evaluations, "student", step=len(steps)) if steps else None,
        "teacher_before": pick(evaluations, "teacher", step=0),
        "teacher_after": pick(evaluations, "teacher", step=len(steps)) if steps else None,
        "retention_before": pick(evaluations, "student", step=0, retention=True),
        "retention_after": pick(evaluations, "student", step=len(steps), retention=True) if steps else None,
        "teacher_gain": _comparison(events, "teacher", step=0),
        "change": _comparison(events, "change", step=len(steps)),
        "retention_change": _comparison(events, "change", step=len(steps), retention=True),
        "evaluations": evaluations,
        "last_step": steps[-1] if steps else None,
        "completion_tokens": int(sum(_known(steps, "tokens/completion"))),
        "training_seconds": round(sum(_known(steps, "time/step")), 3),
        "wall_seconds": round(events[-1]["time"] - events[0]["time"], 3) if events else 0.0,
        "peak_memory_gib": max(_known(steps, "memory/peak_gib"), default=0.0),
        **{key: first.get(key) for key in FACTS},
        "command": command.get("argv"),
    }


def _facts(events: list[Event], kind: str) -> list[dict[str, Any]]:
    """The events of a kind, without kind and time."""
    return [
        {key: value for key, value in event.items() if key not in ("kind", "time")}
        for event in events
        if event["kind"] == kind
    ]


def _comparison(events: list[Event], name: str, *, step: int, retention: bool = False) -> dict[str, Any] | None:
    """The last comparison of a name made at a step."""
    wanted = (name, step, retention)
    found = reversed(_facts(events, "comparison"))
    return next((c for c in found if (c["name"], c["step"], c["split"] == "retention") == wanted), None)


def _known(steps: list[dict[str, Any]], name: str) -> list[float]:
    """The finite values of a metric."""
    values = (number(step.get(name)) for step in steps)
    return [value for value in values if math.isfinite(value)]


def pick(evaluations: list[dict[str, Any]], role: str, *, step: int, retention: bool = False) -> dict[str, Any] | None:
    """The last evaluation of a role at a step, on the held-out problems or on the retention problems."""
    wanted = (role, step, retention)
    matches = (e for e in reversed(evaluations) if (e["role"], e["step"], e["split"] == "retention") == wanted)
    return next(matches, None)


def plan_lines(config: Config, ranks: int, *, stage: int) -> list[str]:
    """What a run would do, in words; `stage` is the ZeRO stage that will run."""
    train, sampling = config.train, config.sampling
    rollouts = train.problems_per_step * train.rollouts_per_problem
    instead = "" if stage == config.zero.stage else f" (instead of zero.stage={config.zero.stage})"
    rule = config.token_rule.plugin_name
    named = f" token_rule={rule}" if rule != "none" else ""
    return [
        f"method: teacher={config.teacher.plugin_name} context={config.context.name} "
        f"divergence={config.divergence.plugin_name} sampler={config.sampler.plugin_name}{named}",
        f"model: {config.model.path}, " + (f"LoRA rank {config.lora.rank}" if config.lora.rank else "all weights"),
        f"steps: {train.steps} of {rollouts} rollouts ({train.problems_per_step} problems x "
        f"{train.rollouts_per_problem}), at most {sampling.max_completion_tokens} tokens each, "
        f"on {ranks} rank{'s' if ranks > 1 else ''} with ZeRO stage {stage}{instead}",
    ]
