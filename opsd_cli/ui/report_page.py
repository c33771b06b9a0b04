"""A report as one HTML file: no script, no request, every text from models and data shown literally."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from opsd_cli.insight.charts import charts_of, charts_of_all
from opsd_cli.insight.history import History
from opsd_cli.insight.report import Report, best_against_others, command_of, evaluation_rows, ranking_rows, warnings_of
from opsd_cli.run.evaluations import read_changes
from opsd_cli.ui.pages import render
from opsd_cli.ui.plots import COLOURS, LEGEND_AT_MOST, svg
from opsd_cli.ui.report_text import verdicts_of
from opsd_cli.ui.sample_view import SHADES, ShownSample, shown_samples
from opsd_cli.ui.theme import changes, count, decimal, duration, gibibytes, interval, percent, plural, stated

MOST_CHANGED = 12  # problems of each kind that were won or lost
LONGEST_CELL = 400


@dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Page:
    title: str
    subtitle: str
    verdicts: Sequence[str] = ()
    cards: Sequence[tuple[str, str, str]] = ()
    warnings: Sequence[str] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[tuple[str, str]] = ()
    legend: str = ""
    samples: Sequence[ShownSample] = ()
    late_tables: Sequence[Table] = ()
    commands: Sequence[str] = ()
    settings: Sequence[tuple[str, str]] = field(default_factory=tuple)


def page_of(report: Report) -> str:
    """The whole document."""
    page = _of_one(report.runs[0]) if len(report.runs) == 1 and not report.missing else _of_several(report)
    return render("report.html", page=page, shades=SHADES)


def _of_one(run: History) -> Page:
    summary = run.summary
    started = next(iter(run.of_kind("run_started")), None)
    where = f", {plural(started['ranks'], 'rank')} on {started['device']}" if started else ""
    changed = [_changed_table(run, split) for split in ("test", "validation", "retention")]
    return Page(
        title=run.name,
        subtitle=f"{run.task or 'run'}, {run.state}, {plural(summary['steps'], 'step')}{where}",
        verdicts=list(verdicts_of(run)),
        cards=[card for card in _cards(run) if card[1]],
        warnings=warnings_of(run),
        tables=[_evaluations(run)],
        late_tables=changed,
        charts=[(chart.title, svg(chart)) for chart in charts_of(run)],
        legend="Where a line has a faint one behind it, it is a moving mean over a twentieth of the steps.",
        samples=list(shown_samples(run)),
        commands=[command_of(run)],
        settings=[(key, str(value)) for key, value in run.settings.items()],
    )


def _of_several(report: Report) -> Page:
    rows = list(ranking_rows(report))
    shown = {name: [_cell(name, row) for row in rows] for name in rows[0] if name not in ("after_low", "after_high")}
    kept = [name for name, cells in shown.items() if any(cells)]
    table = Table(
        "Results, the best first",
        [_HEADS.get(name, name) for name in kept],
        [[shown[name][place] for name in kept] for place in range(len(rows))],
        "Accuracy on held-out problems with its 95 % interval. Settings in which all runs agree are not shown.",
    )
    pairs = best_against_others(report)
    paired = Table(
        f"{report.runs[0].name} against the others, problem by problem",
        ["run", "gain", "95 % interval", "problems"],
        [[name, _signed(c["gain"]), f"{_signed(c['low'])} to {_signed(c['high'])}", changes(c)] for name, c in pairs],
        "An exact paired test of two runs. The best of many is also the luckiest: confirm it with other seeds.",
    )
    missing = Table("Left no result", ["run", "why"], [[member.name, member.reason] for member in report.missing])
    drawn = charts_of_all(report.runs, settings=report.differing)
    legend = ", ".join(run.name for run in report.runs) if len(report.runs) <= LEGEND_AT_MOST else ""
    return Page(
        title=report.title,
        subtitle=plural(len(report.runs), "run")
        + (f", {len(report.missing)} without a result" if report.missing else ""),
        tables=[table, paired, missing],
        charts=[(chart.title, svg(chart)) for chart in drawn],
        legend=f"Lines: {legend}." if legend else f"One line for each run; colours repeat after {COLOURS}.",
        commands=list(dict.fromkeys(command_of(run).splitlines()[0] for run in report.runs)),
    )


_HEADS = {
    "exit_code": "exit code",
    **{name: f"accuracy {name}" for name in ("before", "after")},
    **{f"{what}_{when}": f"{what} {when}" for what in ("teacher", "retention") for when in ("before", "after")},
    "p_value": "p of the change",
    "completion_tokens": "tokens",
    "training_seconds": "training",
    "peak_memory_gib": "memory",
}
_WRITTEN: dict[str, Callable[[Any], str]] = {
    **dict.fromkeys(("before", "teacher_before", "teacher_after", "retention_before", "retention_after"), percent),
    "p_value": decimal,
    "completion_tokens": count,
    "training_seconds": duration,
    "peak_memory_gib": gibibytes,
}


def _cell(name: str, row: dict[str, Any]) -> str:
    value = row[name]
    if value is None:
        return ""
    if name == "after":
        return f"{percent(value)} [{100 * row['after_low']:.1f}, {100 * row['after_high']:.1f}]"
    return _WRITTEN[name](value) if name in _WRITTEN else str(value)[:LONGEST_CELL]


def _signed(share: float) -> str:
    return f"{100 * share:+.1f} %"


def _cards(run: History) -> Iterator[tuple[str, str, str]]:
    summary = run.summary
    pairs = (("accuracy", "before", "after"), ("teacher's prompt", "teacher_before", "teacher_after"))
    for label, first, last in (*pairs, ("retention", "retention_before", "retention_after")):
        ends = [summary[name] for name in (first, last) if summary[name]]
        if ends:
            note = f"{ends[-1]['problems']:,} problems; {interval(ends[-1])}{stated(ends[-1])}"
            yield label, " → ".join(percent(end["accuracy"]) for end in ends), note
    if summary["steps"]:
        tokens = f"{count(summary['completion_tokens'])} tokens"
        yield "training", duration(summary["training_seconds"]), f"{plural(summary['steps'], 'step')}, {tokens}"
        yield (
            "peak memory",
            gibibytes(summary["peak_memory_gib"]),
            f"{count(summary['trainable_parameters'])} parameters trained",
        )


def _evaluations(run: History) -> Table:
    rows = [
        [
            *(str(row[name]) for name in ("step", "split", "role")),
            f"{row['correct']:,} of {row['problems']:,}",
            interval(row),
            percent(row["stated"]) if row["stated"] is not None else "",
            count(row["length_mean"]),
            percent(row["truncated"]),
        ]
        for row in evaluation_rows(run)
    ]
    columns = ["step", "split", "prompt", "right", "accuracy", "state an answer", "length", "cut"]
    return Table("Evaluations", columns, rows, "Brackets: 95 % Wilson interval.")


def _changed_table(run: History, split: str) -> Table:
    lines = read_changes(run.folder, split=split)
    shown = [line for kind in ("lost", "won") for line in [x for x in lines if x["change"] == kind][:MOST_CHANGED]]
    rows = [
        [
            line["change"],
            *(str(line.get(key) or "")[:LONGEST_CELL] for key in ("question", "answer", "before", "after")),
        ]
        for line in shown
    ]
    note = f"{len(rows)} of {len(lines)}; all are in {run.folder.name}/evaluations." if len(rows) < len(lines) else ""
    return Table(f"Problems won and lost ({split})", ["", "question", "answer", "before", "after"], rows, note)
