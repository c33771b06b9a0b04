"""Runs beside each other: which settings differ, what came of them, and whether their difference could be noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from opsd_cli.insight.history import History
from opsd_cli.insight.paired import compare
from opsd_cli.run.evaluations import NAME, completions_file, read_completions

ABSENT = "-"
PLACES = ("run.name", "run.root")  # differ in any two runs and say nothing


def differing(runs: Sequence[History]) -> dict[str, list[Any]]:
    """Dotted key -> its value in each run, for the settings in which the runs are not all the same."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    values = {key: [run.settings.get(key, ABSENT) for run in runs] for key in keys if key not in PLACES}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def results(runs: Sequence[History]) -> list[dict[str, str]]:
    """What came of each run, in words; empty where it is not known."""
    return [_result(run) for run in runs]


def _result(run: History) -> dict[str, str]:
    summary = run.summary

    def share(name: str) -> str:
        found = summary.get(name)
        return f"{100 * found['accuracy']:.1f} % [{100 * found['low']:.1f}, {100 * found['high']:.1f}]" if found else ""

    return {
        "state": run.state,
        "accuracy before": share("before"),
        "accuracy after": share("after"),
        "teacher's prompt before": share("teacher_before"),
        "teacher's prompt after": share("teacher_after"),
        "retention before": share("retention_before"),
        "retention after": share("retention_after"),
        "steps": str(summary["steps"]),
        "completion tokens": f"{summary['completion_tokens']:,}",
        "seconds of training": f"{summary['training_seconds']:,.0f}",
        "peak memory (GiB)": f"{summary['peak_memory_gib']:.2f}",
    }


def compared(first: History, second: History, *, split: str | None = None) -> dict[str, Any] | None:
    """The last evaluations of two runs under the student's prompt, problem by problem: the fields of a comparison.
    None where they share no problem or kept no completions."""
    graded = [_last_grades(run, split) for run in (first, second)]
    comparison = compare(*graded)
    if comparison is None:
        return None
    return {**asdict(comparison), "won": len(comparison.won), "lost": len(comparison.lost)}


def _last_grades(run: History, split: str | None) -> Mapping[str, float]:
    found = [match for path in run.folder.evaluations.glob("step_*.jsonl") if (match := NAME.fullmatch(path.name))]
    wanted = [
        m for m in found if m["role"] == "student" and (m["split"] == split if split else m["split"] != "retention")
    ]
    if not wanted:
        return {}
    last = max(wanted, key=lambda match: int(match["step"]))
    file = completions_file(run.folder, step=int(last["step"]), split=last["split"], role="student")
    return {problem: line["share"] for problem, line in read_completions(file).items()}
