"""The table at the end of a sweep: what set each member apart, what it learnt, kept and cost. Owns the columns; reads
the members' events, so a member that failed shows as far as it came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsd_cli.run.events import number, read_events
from opsd_cli.run.folder import RunFolder
from opsd_cli.run.summary import summarise
from opsd_cli.settings.errors import ExitCode
from opsd_cli.settings.folders import shown

STOPPED = (ExitCode.INTERRUPTED, ExitCode.TERMINATED)
NOT_RUN = -1


@dataclass(frozen=True)
class Result:
    """How one member ended: its run folder's name, what set it apart, its exit code (NOT_RUN: it did not
    start)."""

    name: str
    swept: tuple[str, ...]
    code: int


def table_lines(results: Sequence[Result], folder: Path) -> list[str]:
    """One line per member. Columns that no member has (retention, the teacher's prompt) are left out."""
    rows = [_row(result, folder) for result in results]
    columns = [name for name in rows[0] if any(row[name] for row in rows)] if rows else []
    cells = [[name if name != "member" else "" for name in columns]]
    cells += [[row[name] or "-" for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def accuracy_after(folder: RunFolder) -> float:
    """Held-out accuracy at the end of a run; NaN where it was not measured."""
    after = summarise(read_events(folder.events), command={})["after"]
    return number(after["accuracy"]) if after else math.nan


def _row(result: Result, folder: Path) -> dict[str, str]:
    run = RunFolder(folder / result.name)
    summary = summarise(read_events(run.events), command={})
    status = {0: "done", NOT_RUN: "not run"}.get(result.code, f"failed, exit code {result.code}")
    return {
        "member": " ".join(result.swept) or result.name,
        "before": _interval(summary["before"]),
        "after": _interval(summary["after"]),
        "teacher after": _share(summary["teacher_after"]),
        "retention": _change(summary["retention_before"], summary["retention_after"]),
        "tokens": f"{summary['completion_tokens']:,}" if summary["steps"] else "",
        "seconds": f"{summary['training_seconds']:.0f}" if summary["steps"] else "",
        "status": "stopped" if result.code in STOPPED else status,
        "folder": shown(run.path),
    }


def _share(evaluation: dict[str, Any] | None) -> str:
    return f"{100 * number(evaluation['accuracy']):.1f} %" if evaluation else ""


def _interval(evaluation: dict[str, Any] | None) -> str:
    if not evaluation:
        return ""
    return f"{_share(evaluation)} [{100 * number(evaluation['low']):.1f}, {100 * number(evaluation['high']):.1f}]"


def _change(before: dict[str, Any] | None, after: dict[str, Any] | None) -> str:
    return f"{_share(before)} -> {_share(after)}" if before and after else _share(before or after)
