"""The end of a run on the screen: its result, where it is, what to type next."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

from rich.table import Table

from opsd_cli.run.events import Event
from opsd_cli.run.folder import RunFolder, read_config, shell_path
from opsd_cli.run.plugin_copies import plugin_flags
from opsd_cli.safety.terminal import escape_controls
from opsd_cli.settings.errors import DataError
from opsd_cli.ui.lines import curve
from opsd_cli.ui.theme import changes, count, decimal, duration, interval, percent, plural, stated
from opsd_cli.ui.view import RunView

Lines = Iterator[tuple[str, str]]
CUT_SHOWN = 0.05  # share of completions that were cut, from which on it is said


def result_lines(view: RunView, folder: RunFolder, *, unicode: bool) -> Lines:
    """Label and text of each line about a finished training or check."""
    if view.task == "check":
        yield from (("", escape_controls(line)) for line in (view.started or {}).get("plan", ()))
        return
    pace = f"{count(view.tokens)} completion tokens, {duration(view.seconds)}"
    yield "trained", f"{plural(view.step, 'step')} ({pace})"
    if view.share_cut() >= CUT_SHOWN:
        yield "", f"{percent(view.share_cut())} of the completions were cut by the length limit"
    losses = [loss for loss in view.losses if math.isfinite(loss)]
    if losses:
        yield "loss", f"{curve(losses) if unicode else ''} {decimal(losses[-1])} in the last step".lstrip()
    yield from _accuracy_lines(view, arrow="→" if unicode else "->")
    changed = sorted(folder.evaluations.glob("changed_*.jsonl"))
    yield from (("changed", shell_path(path)) for path in changed if path.stat().st_size)
    for label, path in (("model", folder.model), ("summary", folder.summary)):
        if path.exists():
            yield label, shell_path(path)
    yield "run", shell_path(folder.path)


def next_lines(view: RunView, folder: RunFolder) -> Lines:
    """Label and text of the commands to type after a finished training."""
    if view.task != "train":
        return
    if folder.model.is_dir():
        yield "evaluate", f"opsd eval {shell_path(folder.model)}{plugin_flags(folder)}"
        yield "load", f"AutoModelForCausalLM.from_pretrained({str(folder.model)!r})"
    with contextlib.suppress(DataError, KeyError, TypeError):
        # More steps continue the same run only under a constant learning rate.
        if read_config(folder)["optim"]["schedule"] == "constant":
            yield "continue", f"{_resume(folder)} train.steps={2 * view.steps}"


def stop_line(view: RunView, folder: RunFolder, code: int) -> str:
    """The last line of a run that did not complete: what is saved, and how to continue; or empty."""
    if view.task == "eval" and view.started is not None and code not in (1, 2):
        return f"what was measured is kept; continue with: {_resume(folder, 'eval')}"
    if view.task not in ("train", "") or code == 2:  # the message says what to change first
        return ""
    if view.started is None:
        return "the run had not begun: nothing was saved" if code in (130, 143) else ""
    if code == 1:  # a bug comes again at the same place, whoever resumes
        return "" if view.checkpoint is None else f"step {view.checkpoint['step']} is saved"
    if view.checkpoint is None:
        return f"nothing was saved yet; start again with: {_resume(folder)}"
    return f"step {view.checkpoint['step']} is saved; continue with: {_resume(folder)}"


def _accuracy_lines(view: RunView, *, arrow: str) -> Lines:
    """Each accuracy before and after, how many problems changed, and what the brackets are."""
    rows = (("accuracy", "student", False), ("teacher", "teacher", False), ("retention", "student", True))
    pairs = [(label, pair) for label, role, other in rows if (pair := view.first_and_last(role, retention=other))]
    for label, (first, last) in pairs:
        problems = plural(last["problems"], "problem")
        counted = f"{escape_controls(last['split'])}, {problems}{stated(last)}"
        what = {"accuracy": counted, "teacher": "under its prompt"}
        shown = interval(last) if first is last else f"{interval(first)} {arrow} {interval(last)}"
        yield label, f"{shown} ({what.get(label, problems)})"
        comparison = view.last_comparison("change", last["split"], step=last["step"])
        if comparison and label != "teacher":
            yield "", changes(comparison)
    if pairs:
        yield "", "brackets: 95 % interval; noise: by an exact paired test"


def _resume(folder: RunFolder, command: str = "train") -> str:
    return f"opsd {command} --resume {shell_path(folder.path)}{plugin_flags(folder)}"


def measured_lines(view: RunView, folder: RunFolder) -> Lines:
    """Label and text of what `opsd eval` found beside its table."""
    for event in view.evaluations:
        yield from _several(event)
    for comparison in view.comparisons:
        yield "teacher", changes(comparison, since=" against the student's prompt")
    if folder.evaluations.is_dir():
        yield "answers", shell_path(folder.evaluations)


def _several(event: Event) -> Lines:
    """What several completions of each problem say, and what a second grader says otherwise."""
    prompt = "" if event["role"] == "student" else f", {escape_controls(event['role'])}'s prompt"
    for name, (value, low, high) in (event.get("at_k") or {}).items():
        yield escape_controls(name), f"{percent(value)} [{100 * low:.1f}, {100 * high:.1f}]{prompt}"
    if (differing := event.get("disagreements")) is not None:
        completions = event["problems"] * event.get("samples", 1)
        yield (
            "graders",
            f"disagree on {differing} of {plural(completions, 'completion')}{prompt} (`second` in the answers)",
        )


def evaluation_table(evaluations: Sequence[Event]) -> Table:
    """One row per evaluation, without lines around the cells, so that a script can read it from a pipe."""
    table = Table(box=None, header_style="label", pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("prompt", "split"):
        table.add_column(name, overflow="fold")
    for name in ("problems", "right", "accuracy", "95 % interval", "answered", "length", "cut", "time"):
        table.add_column(name, justify="right", overflow="fold")
    for event in evaluations:
        table.add_row(
            escape_controls(event["role"]),
            escape_controls(event["split"]),
            count(event["problems"]),
            count(event["correct"]),
            percent(event["accuracy"]),
            f"{100 * event['low']:.1f} to {100 * event['high']:.1f} %",
            percent(event.get("stated", "")),
            count(event["length_mean"]),
            percent(event["truncated"]),
            duration(event["seconds"]),
        )
    return table
