"""`opsd report`: what came of a run, of several, or of a sweep; on the terminal, as one HTML file, or for programs."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opsd_cli.commands.flags import Flags
from opsd_cli.settings.errors import ConfigError, ExitCode, OutsideError, display_path
from opsd_cli.settings.paths import typed_path
from opsd_cli.settings.registry import did_you_mean

if TYPE_CHECKING:
    from opsd_cli.insight.report import Report

HELP = """\
opsd report runs/NAME                    results, curves, warnings and the command to repeat it, on the terminal
opsd report runs/NAME --html FILE        one page with charts and coloured sample rollouts; works without a network
opsd report runs/SWEEP                   a sweep: its members ranked, what the swept settings did, which failed
opsd report runs/A runs/B ...            several runs: what differs, ranked, compared problem by problem
opsd report runs/NAME --csv              every step; of several runs: a line each. --json: everything; --md: a table
opsd report runs/NAME --to wandb         send it to tensorboard, wandb, trackio or mlflow (--project NAME: opsd)
opsd report --check runs/NAME            within, off or not comparable: the figures that its recipe carries; exit code
opsd report --explain kl/forward         what a metric means

RUN is a run folder, a sweep's folder, or a name under ./runs.
exit codes of --check: 0 all within, 4 one is off, 2 one is not comparable
"""


def main(arguments: list[str]) -> int:
    """Run `opsd report ...`. Raises ConfigError, DataError, OutsideError."""
    from opsd_cli.insight.report import as_json, make_report, ranking_rows, step_rows

    flags = Flags("report")
    flags.add_argument("--html", metavar="FILE")
    for name in ("--csv", "--json", "--md", "--check"):
        flags.add_argument(name, action="store_true")
    flags.add_argument("--explain", metavar="METRIC")
    flags.add_argument("--to", metavar="TRACKER")
    flags.add_argument("--project")
    given = flags.read(arguments)
    forms = [f"--{name}" for name in ("csv", "json", "md", "explain", "to", "check") if vars(given)[name]]
    if given.html is not None and (given.to is not None or given.explain is not None or given.check):
        forms.append("--html")
    if len(forms) > 1:
        raise ConfigError(f"{' and '.join(forms)}: one of them at a time")
    if given.project is not None and given.to is None:
        raise ConfigError("--project names where a tracker keeps a run; add --to TRACKER")
    if given.explain is not None:
        print(explain(given.explain))
        return ExitCode.DONE
    if not given.words:
        raise ConfigError("name a run or a sweep: opsd report runs/NAME (see `opsd report --help`)")
    report = make_report(given.words, root=Path("runs"))
    if given.check:
        return _check(report)
    if given.to is not None:
        return _send(report, given.to, given.project or "opsd")
    if given.html is not None:
        _write_page(report, typed_path(given.html))
    if given.csv:
        single = len(report.runs) == 1 and not report.missing
        print(_csv(list(step_rows(report.runs[0]) if single else ranking_rows(report))), end="")
    elif given.json:
        print(as_json(report))
    elif given.md:
        from opsd_cli.ui.report_text import markdown

        print(markdown(report))
    elif given.html is None:
        from opsd_cli.ui.report_text import report_lines

        print("\n".join(report_lines(report)))
    return ExitCode.DONE


def explain(name: str) -> str:
    """The sentence of a metric. Raises ConfigError for one that does not exist."""
    from opsd_cli.run.events import METRICS

    if name not in METRICS:
        raise ConfigError(f"{name}: no such metric{did_you_mean(name, METRICS)}; all are in docs/outputs.md")
    return f"{name}: {METRICS[name]}"


def _check(report: Report) -> int:
    """Each run beside the figures of the recipe that it was made from, as that composes now."""
    from opsd_cli.insight.expected import check_run
    from opsd_cli.ui.columns import aligned

    found = [check_run(run, _recipe_tree(run.chosen.get("recipe"))) for run in report.runs]
    for check in found:
        print(f"{check.run}: {check.verdict}", *(f"  {reason}" for reason in check.reasons), sep="\n")
        rows = [
            {
                "figure": figure.name,
                "expected": f"{figure.expected:g} +- {figure.tolerance:g}",
                "found": "-" if figure.found is None else f"{figure.found:g}",
                "": "" if check.verdict == "not comparable" else "within" if figure.is_within else "off",
            }
            for figure in check.figures
        ]
        print(*(f"  {line}" for line in aligned(rows)), sep="\n")
        if check.source:
            print(f"  expected figures: {check.source}")
    verdicts = {check.verdict for check in found}
    return (
        ExitCode.GUARD
        if "off" in verdicts
        else ExitCode.CHANGE_SOMETHING
        if "not comparable" in verdicts
        else ExitCode.DONE
    )


def _recipe_tree(name: str | None) -> Mapping[str, Any] | None:
    """The tree of a recipe by itself; None where there is none of that name."""
    from opsd_cli.preflight import check
    from opsd_cli.settings.recipe_files import find_folders
    from opsd_cli.settings.typed_config import plain_tree

    folders = find_folders()
    if name is None or name not in folders.files["recipe"]:
        return None
    try:
        _, (member,) = check([f"recipe={name}"], folders)
    except ConfigError:
        return None  # it needs more than its name, such as a path
    return plain_tree(member.config)


def _send(report: Report, kind: str, project: str) -> int:
    from opsd_cli.insight.track import send
    from opsd_cli.insight.trackers import TRACKERS
    from opsd_cli.launch.tracking import require_tracker

    if kind not in TRACKERS:
        raise ConfigError(
            f"--to {kind}: no such tracker{did_you_mean(kind, TRACKERS)} (there are {', '.join(TRACKERS)})"
        )
    require_tracker(kind)
    for run in report.runs:
        steps = send(run.folder, TRACKERS[kind](), kind=kind, project=project)
        print(f"{run.name}: {steps} steps sent to {kind}", file=sys.stderr)
    return ExitCode.DONE


def _write_page(report: Report, file: Path) -> None:
    from opsd_cli.ui.report_page import page_of

    text = page_of(report)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutsideError(f"cannot write {file}: {error.strerror}; give another file to --html") from None
    print(display_path(file.absolute()), file=sys.stderr)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
