"""A report as lines of text: for a terminal, for a pipe, and as Markdown."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from opsd_cli.insight.history import History
from opsd_cli.insight.report import Report, best_against_others, command_of, ranking_rows, warnings_of
from opsd_cli.insight.samples import divergence_by_class, read_samples
from opsd_cli.safety.terminal import escape_controls
from opsd_cli.ui.columns import aligned, terminal_width
from opsd_cli.ui.lines import curve
from opsd_cli.ui.theme import changes, count, decimal, duration, gibibytes, interval, percent

CURVES = (
    "loss/objective", "kl/forward", "kl/reverse", "entropy/student", "entropy/teacher", "agree/top1",
    "rollout/accuracy", "rollout/length_mean", "rollout/truncated", "optim/grad_norm", "tokens/per_second",
)  # fmt: skip
LEAST = ("exit", "memory", "tokens", "retention", "training", "steps", "teacher after", "before")


def report_lines(report: Report) -> Iterator[str]:
    """The report of one run, or of several, ranked."""
    single = len(report.runs) == 1 and not report.missing
    for line in _of_one(report.runs[0]) if single else _of_several(report):
        yield escape_controls(line)


def markdown(report: Report) -> str:
    """The table of results as GitHub shows it."""
    rows = [_result(row, report) for row in ranking_rows(report)]
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    lines = [columns, ["---"] * len(columns), *([row[name] for name in columns] for row in rows)]
    return "\n".join(
        f"| {' | '.join(escape_controls(c).replace('|', chr(92) + '|') for c in line)} |" for line in lines
    )


def _of_one(run: History) -> Iterator[str]:
    summary = run.summary
    yield f"{run.name}: {run.task or 'run'}, {run.state}, {summary['steps']} of {run.settings.get('train.steps')} steps"
    yield ""
    shown = (("accuracy", "before", "after"), ("teacher's prompt", "teacher_before", "teacher_after"))
    for label, first, last in (*shown, ("retention", "retention_before", "retention_after")):
        ends = [interval(summary[name]) for name in (first, last) if summary[name]]
        if ends:
            yield f"{label:<18}{' -> '.join(ends)}"
    yield from verdicts_of(run)
    table = list(_curves(run))
    if table:
        yield ""
        yield from aligned(table, least=("course",), width=terminal_width())
    by_class = divergence_by_class(read_samples(run.folder.samples))
    if by_class:
        yield ""
        classes = (f"{kind} {decimal(values[0])} -> {decimal(values[-1])}" for kind, (_, values) in by_class.items())
        yield f"divergence by class of token, first and last samples: {', '.join(classes)}"
    yield from _costs(run)
    for warning in warnings_of(run):
        yield f"warning: {warning}"
    yield ""
    yield from command_of(run).splitlines()


def verdicts_of(run: History) -> Iterator[str]:
    """What came of a run, in sentences."""
    summary = run.summary
    if gain := summary["teacher_gain"]:
        yield f"Before training, the teacher's prompt against the student's: {changes(gain)}."
    if change := summary["change"]:
        yield f"After training, against before: {changes(change)}."
    if retained := summary["retention_change"]:
        yield f"On problems of another skill: {changes(retained)}."
    ended = next(iter(reversed(run.of_kind("run_ended"))), None)
    if ended and ended["outcome"] != "completed" and ended["message"]:
        yield f"{ended['outcome']}: {ended['message']}"


def _curves(run: History) -> Iterator[dict[str, str]]:
    unicode = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
    for name in CURVES:
        _, values = run.metric(name)
        if values:
            ends = {"metric": name, "first": decimal(values[0]), "last": decimal(values[-1])}
            yield {**ends, "course": curve(values) if unicode else ""}


def _costs(run: History) -> Iterator[str]:
    summary = run.summary
    if not summary["steps"]:
        return
    sums = {name: sum(run.metric(f"time/{name}")[1]) for name in ("sample", "score", "update", "step")}
    shares = (
        (f"{name} {100 * sums[name] / sums['step']:.0f} %" for name in ("sample", "score", "update"))
        if sums["step"]
        else ()
    )
    yield ""
    yield (
        f"{count(summary['completion_tokens'])} completion tokens in {duration(summary['training_seconds'])} "
        f"({', '.join(shares)}), {gibibytes(summary['peak_memory_gib'])} at most"
    )


def _of_several(report: Report) -> Iterator[str]:
    rows = [_result(row, report) for row in ranking_rows(report)]
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    yield from aligned([{name: row[name] for name in columns} for row in rows], least=LEAST, width=terminal_width())
    for name, comparison in best_against_others(report):
        yield f"{report.runs[0].name} against {name}: {changes(comparison)}"
    for member in report.missing:
        yield f"{member.name}: {member.reason}"


def _result(row: Mapping[str, Any], report: Report) -> dict[str, str]:
    def shares(*names: str) -> str:
        known: Sequence[float] = [row[name] for name in names if row[name] is not None]
        return " -> ".join(map(percent, known))

    ends = "" if row["after"] is None else f" [{100 * row['after_low']:.1f}, {100 * row['after_high']:.1f}]"
    return {
        "run": str(row["run"]),
        **{key.rpartition(".")[2] if _is_short(key, report) else key: str(row[key]) for key in report.differing},
        "state": str(row["state"]),
        "exit": "" if row["exit_code"] in (None, 0) else str(row["exit_code"]),
        "before": shares("before"),
        "after": shares("after") + ends,
        "teacher after": shares("teacher_after"),
        "retention": shares("retention_before", "retention_after"),
        "steps": str(row["steps"]),
        "tokens": count(row["completion_tokens"]),
        "training": duration(row["training_seconds"]),
        "memory": gibibytes(row["peak_memory_gib"]),
    }


def _is_short(key: str, report: Report) -> bool:
    """Whether the last part of a setting's name says which one is meant."""
    last = key.rpartition(".")[2]
    return last not in ("name", "path") and sum(other.rpartition(".")[2] == last for other in report.differing) == 1
