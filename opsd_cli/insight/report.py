"""What a report says of runs: results with intervals and paired tests, what differs between them, how they ranked, what
was warned of. Words and numbers only; the terminal and the page show them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from opsd_cli.insight.history import History, expand, read_history, read_members
from opsd_cli.insight.versus import compared, differing
from opsd_cli.run.folder import shell_path
from opsd_cli.settings.errors import ConfigError, DataError
from opsd_cli.settings.paths import typed_path

POINTS = 400
"""Steps of a curve where several runs are drawn: more could not be told apart."""


@dataclass(frozen=True)
class Missing:
    """A member of a sweep that left nothing to read: it did not start, or its folder is damaged."""

    name: str
    reason: str


@dataclass(frozen=True)
class Report:
    title: str
    runs: Sequence[History]  # the best first, if there are several
    missing: Sequence[Missing]
    differing: dict[str, list[Any]]  # setting -> its value in each run
    codes: dict[Path, int]  # folder of a run -> exit code, where a sweep recorded it


def make_report(words: Sequence[str], *, root: Path) -> Report:
    """The runs that the words of a command name, ranked. Raises ConfigError, DataError."""
    paths = expand(words, root=root)
    runs: list[History] = []
    missing: list[Missing] = []
    if len(paths) == 1:
        runs = [read_history(paths[0][1], name=paths[0][0], points=None)]
    else:
        # Nearly all of the time goes into reading events. What a process hands back is thinned, and small.
        with ProcessPoolExecutor(mp_context=get_context("fork")) as readers:
            for found in readers.map(_read, *zip(*paths, strict=True)):
                if isinstance(found, History):
                    runs.append(found)
                else:
                    missing.append(found)
    codes: dict[Path, int] = {}
    for word in words:
        folder = next((path.absolute() for path in (typed_path(word), root / word) if read_members(path)), None)
        for member in read_members(folder) if folder else []:
            path = folder / str(member["name"]) if folder else Path()
            codes[path] = int(member["code"])
            if not (path / "config.yaml").is_file():
                swept = " ".join(map(str, member["swept"]))
                name = path.name if len(words) == 1 else f"{path.parent.name}/{path.name}"
                missing.append(Missing(name, f"{swept}: left no run (exit code {member['code']})"))
    if not runs:
        raise ConfigError(f"{' '.join(words)}: none of these runs can be read: {missing[0].reason if missing else ''}")
    runs.sort(key=_rank)
    title = words[0].rstrip("/").rpartition("/")[2] if len(words) == 1 else f"{len(runs)} runs"
    return Report(title, runs, missing, differing(runs) if len(runs) > 1 else {}, codes)


def _read(name: str, path: Path) -> History | Missing:
    """One run of several."""
    try:
        return read_history(path, name=name, points=POINTS)
    except DataError as error:
        return Missing(name, str(error))


def _rank(run: History) -> tuple[bool, float]:
    """The best accuracy first; runs without one last."""
    after = run.summary["after"]
    return after is None, -after["accuracy"] if after else 0.0


def evaluation_rows(run: History) -> Iterator[dict[str, Any]]:
    """Every evaluation of a run, in order."""
    for event in run.of_kind("evaluation"):
        names = ("step", "split", "role", "problems", "correct", "accuracy", "low", "high", "length_mean", "truncated")
        yield {**{name: event[name] for name in names}, "stated": event.get("stated")}


def ranking_rows(report: Report) -> Iterator[dict[str, Any]]:
    """Each run with what it was told differently and what came of it, the best first; numbers, not words."""
    for place, run in enumerate(report.runs):
        summary = run.summary
        yield {
            "run": run.name,
            **{key: values[place] for key, values in report.differing.items()},
            "state": run.state,
            "exit_code": report.codes.get(run.folder.path),
            **{f"{name}": _accuracy(summary[name]) for name in ("before", "after")},
            **{f"after_{end}": summary["after"][end] if summary["after"] else None for end in ("low", "high")},
            **{name: _accuracy(summary[name]) for name in ("teacher_before", "teacher_after")},
            **{name: _accuracy(summary[name]) for name in ("retention_before", "retention_after")},
            "p_value": summary["change"]["p_value"] if summary["change"] else None,
            "steps": summary["steps"],
            "completion_tokens": summary["completion_tokens"],
            "training_seconds": summary["training_seconds"],
            "peak_memory_gib": summary["peak_memory_gib"],
        }


def _accuracy(evaluation: dict[str, Any] | None) -> float | None:
    return None if evaluation is None else float(evaluation["accuracy"])


def step_rows(run: History) -> Iterator[dict[str, Any]]:
    """Every step of a run with its metrics."""
    for event in run.steps:
        yield {"step": event["step"], "time": event["time"], **event["metrics"]}


def warnings_of(run: History) -> list[str]:
    """What was warned of, each once with how often, the most frequent first."""
    counted = Counter(str(event["message"]) for event in run.of_kind("warning"))
    return [message if n == 1 else f"{message} ({n} times)" for message, n in counted.most_common()]


def best_against_others(report: Report) -> list[tuple[str, dict[str, Any]]]:
    """The run that ended best, compared with each other one that was measured at its end, problem by problem."""
    best, *others = [run for run in report.runs if run.summary["after"]] or report.runs[:1]
    pairs = ((other.name, compared(other, best)) for other in others)
    return [(name, comparison) for name, comparison in pairs if comparison is not None]


def as_json(report: Report) -> str:
    """Everything, for programs."""
    runs = [
        {
            "run": run.name,
            "path": str(run.folder.path),
            "state": run.state,
            "command": run.typed,
            "chosen": dict(run.chosen),
            "settings": dict(run.settings),
            "summary": dict(run.summary),
            "warnings": warnings_of(run),
        }
        for run in report.runs
    ]
    missing = [{"run": member.name, "reason": member.reason} for member in report.missing]
    whole = {"title": report.title, "runs": runs, "missing": missing, "differing": report.differing}
    return json.dumps(whole, indent=1, ensure_ascii=False)


def command_of(run: History) -> str:
    """What to type to get this run again: what was typed, or where its settings are for a member of a sweep."""
    where = f"# the settings of {run.name}: {shell_path(run.folder.config)}"
    return f"{run.typed}\n{where}" if run.typed else where
